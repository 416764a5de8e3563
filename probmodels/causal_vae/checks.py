"""Whether what a causal autoencoder says of concepts holds where labels were held out.

Its guide is meant to be as wide as it is wrong about labels, and decoders of images are far too sure, so that
importance weights say nothing. What can be tested are intervals: how many labels of rows that were not fitted lie in
those of concepts read in these rows, and in those of mechanisms given the labels of the causes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import binom, norm

from probmodels.causal_vae.worlds import concepts_of, world_of
from probmodels.inference.diagnostics.findings import Finding, Part
from probmodels.inference.diagnostics.guides import still_falling
from probmodels.inference.problem import Problem
from probmodels.inference.result import Result

__all__ = ["check_draws", "check_model"]

_LEVELS = (0.5, 0.9)
_DRAWS = 199  # of concepts, so that the rank of a label among them is one of 200
_FEWEST = 30  # labels of a concept
_FALLING = 0.1  # nats by observed value; the loss has the reading of labels with its weight, too
_FALSE_ALARM = 1e-3  # of each check, over all its comparisons


def check_draws(result: Result) -> Iterator[Finding]:
    """Findings on concepts read in rows that were held out, in place of those on the weights of the guide.

    Labels are compared with the central intervals of 50 and 90 % of what the guide reads in an observation alone, with
    the spread of labels around concepts. Fewer labels in an interval than a binomial number surely has are harmful,
    more are not. Coverage is that over all rows: that intervals are too narrow for some rows and too wide for others
    does not show.
    """
    if "table" in result.params():
        verdict = "proposals were refined for their rows, and nothing is left that reads others"
        yield Finding(False, verdict, "judge the result that was refined", judged=False)
        return
    yield from still_falling(result.tree, _FALLING)
    problem = result.rebuild()
    label, names = _held_out(problem)
    if (~np.isnan(label)).sum(0).min(initial=len(label)) < _FEWEST:
        if "label" not in (problem.data if problem.data is not None else {}):
            verdict, advice = "without labels nothing says which latent is which concept", "give label_weight above 0"
        else:
            verdict = (
                f"fewer than {_FEWEST} rows with labels were held out, so that intervals of concepts are not tested"
            )
            advice = "mark some rows that have labels with split='test'"
        yield Finding(False, verdict, advice, judged=False)
        return
    drawn = _read(problem, result)
    # Ranks of the labels among draws, 0 to 199, in the middle of their steps.
    place = np.where(np.isnan(label), np.nan, ((drawn < label).sum(0) + 0.5) / (len(drawn) + 1))
    advice = (
        "what is read of these concepts is too certain, and so are counterfactuals: take more training rows, fewer "
        "steps or a smaller network (hidden)"
    )
    for level in _LEVELS:
        yield _coverage(place, level, names, f"of concepts read in {len(label)} rows held out", advice, "inference")


def check_model(result: Result) -> Iterator[Finding]:
    """Findings on mechanisms: how many labels held out lie in the 90 % intervals given the labels of their causes.

    A mechanism that is too certain of an effect makes counterfactuals that are. It says nothing on the directions of
    the graph, nor on causes that are not in it.
    """
    problem = result.rebuild()
    label, names = _held_out(problem)
    model: Any = problem.model
    state = {name.replace("$$$", "."): value for name, value in result.params().items()}  # whatever the guide was
    model.load_state_dict({name: state[name] for name, _ in model.named_parameters()}, strict=False)
    mechanisms = model.mechanisms
    caused = [i for i, causes in enumerate(mechanisms.parents) if causes]
    with torch.no_grad():
        y, slope = mechanisms.inverse(torch.as_tensor(label).to(mechanisms.base))
        scale = torch.stack([mechanisms.scale(i) for i in range(len(names))])
        sd = (scale.square() + (model.label_sd / slope).square()).sqrt()
        place = norm.cdf(((y - mechanisms.locations(y)) / sd).double().numpy())[:, caused]
    if (~np.isnan(place)).sum(0).min(initial=_FEWEST) < _FEWEST or not caused:
        return
    advice = "mechanisms are surer of effects than they are right: take a smaller mechanism_hidden or more labels"
    what = f"of mechanisms, given the labels of the causes, in {len(label)} rows held out"
    yield _coverage(place, 0.9, [names[i] for i in caused], what, advice, "model")


def _held_out(problem: Problem) -> tuple[NDArray[np.float64], list[str]]:
    """Labels (held_out, concept) that were held out, in units of the model, and the names of the concepts."""
    assert problem.data is not None
    names = [str(name) for name in problem.data["concept"].values]
    if "held_out_label" not in problem.data:
        return np.empty((0, len(names))), names
    return problem.data["held_out_label"].values, names


def _read(problem: Problem, result: Result) -> NDArray[np.float64]:
    """Draws of labels (draw, held_out, concept) given the observations that were held out."""
    assert problem.data is not None
    seen = torch.as_tensor(problem.data["held_out_observation"].values).to(problem.args[0])
    found = []
    with world_of(replace(problem, args=(seen,)), result, 0) as world, torch.no_grad():
        world.guide = copy.deepcopy(world.guide)
        world.guide.tabulate(seen)  # so that the network reads them once
        for _ in range(_DRAWS):
            z = concepts_of(world.model, world.abduct(), {})
            found.append((z + world.model.label_sd * torch.randn_like(z)).double().numpy())
    return np.stack(found)


def _coverage(
    place: NDArray[np.float64], level: float, names: Sequence[str], what: str, advice: str, part: Part
) -> Finding:  # fmt: skip
    """Whether as many places (row, concept) between 0 and 1 as there should be are in the middle."""
    count = (~np.isnan(place)).sum(0)
    inside = (np.abs(place - 0.5) < level / 2).sum(0)
    alarm = _FALSE_ALARM / (len(names) * len(_LEVELS))
    needed, most = binom.ppf(alarm, count, level) / count, binom.ppf(1 - alarm, count, level) / count
    found = inside / count
    worst = int((found - needed).argmin())
    few = [name for name, bad in zip(names, found < needed, strict=True) if bad]
    verdict = f"{level:.0%} intervals {what} hold {found[worst]:.1%} of the labels of {names[worst]!r}"
    if len(names) > 1:
        verdict += f", the fewest of {len(names)} concepts"
    verdict += f" (at least {needed[worst]:.1%})"
    if len(few) > 1:
        verdict += f"; too few of {', '.join(few)}"
    if few:
        return Finding(True, verdict, advice, part=part)
    wide = (found > most).all()
    return Finding(False, verdict, "intervals are wider than they have to be" if wide else "", part=part)
