"""How well the draws of a guide predict observations: log loss and share of errors."""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from probmodels.inference.programs.programs import Programs

__all__ = ["SCORES", "score_guide"]

SCORES = ("log_loss", "error")


def score_guide(programs: Programs, num_draws: int, seed: int) -> dict[str, float]:
    """Scores of the observations of a problem, each predicted by the average over draws of the guide.

    Parameters
    ----------
    programs
        Inside their parameter store.
    num_draws
        Draws of the guide.
    seed
        Seed of the draws; the state of the global generator stays as it is.

    Returns
    -------
    dict
        ``log_loss``: of every observation the negative log of its mean probability, averaged. ``error``, where some
        observations are discrete with finitely many values: the share that is not the most probable value.
    """
    args, kwargs = programs.problem.args, programs.problem.kwargs
    logs: dict[str, list[Tensor]] = {}
    probs: dict[str, list[Tensor]] = {}
    truth: dict[str, Tensor] = {}
    masks: dict[str, Tensor] = {}  # of observations that count
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for _ in range(num_draws):
            guide: Any = poutine.trace(programs.guide).get_trace(*args, **kwargs)
            model: Any = poutine.trace(poutine.replay(programs.model, trace=guide)).get_trace(*args, **kwargs)
            for name in programs.problem.names("observed"):
                node = model.nodes[name]
                log = node["fn"].log_prob(node["value"])
                masks[name] = torch.as_tensor(True if node["mask"] is None else node["mask"]).expand(log.shape)
                logs.setdefault(name, []).append(log)
                found = _probabilities(node["fn"])
                if found is not None:
                    probs.setdefault(name, []).append(found)
                    truth[name] = node["value"]
    count = math.log(num_draws)
    losses = [(torch.logsumexp(torch.stack(rows), 0) - count)[masks[name]] for name, rows in logs.items()]
    scores = {"log_loss": -float(torch.cat(losses).mean())}
    if probs:
        guesses = {name: torch.stack(rows).mean(0).argmax(-1) for name, rows in probs.items()}
        wrong = [(guess != truth[name])[masks[name]] for name, guess in guesses.items()]
        scores["error"] = float(torch.cat(wrong).double().mean())
    return scores


def _probabilities(fn: Any) -> Tensor | None:
    """Probabilities (..., value) of an observed discrete variable with finitely many values; None for any other."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    if isinstance(fn, torch.distributions.Categorical):
        return fn.probs
    if isinstance(fn, torch.distributions.Bernoulli):
        return torch.stack([1 - fn.probs, fn.probs], -1)
    return None
