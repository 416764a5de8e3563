"""Whether annealed chains of a composed field reached level 0 and stand there for its density.

Chains start in noise and are independent of each other, so that each is a draw of its own: R-hat between chains that
stay in the mode that they came down to says nothing. What can go wrong is a level that chains do not follow, a test
that is left out, and modes that got the wrong number of chains on the way down.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from scipy.stats import t as student

from probmodels.errors import ProbmodelsError
from probmodels.inference.diagnostics.findings import Finding
from probmodels.inference.result import Result
from probmodels.score_composition.model import levels_of, make_move
from probmodels.scores.samplers import weighted

__all__ = ["check_draws"]

_LEAST_ACCEPTANCE = 0.4  # on a level, below which chains lag behind
_LEAST_CHAINS = 50
_SHIFT = 0.1  # of a moment, in units of its spread, that is harmless
_FALSE_ALARM = 1e-3  # of each comparison, over all its moments
_MOST_NUMBERS = 16  # of a datum, whose masses are compared with weighted samples
_GROUPS, _GROUP_SIZE, _STEPS = 8, 250, 60  # of weighted samples, about a CPU second


def check_draws(result: Result) -> Iterator[Finding]:
    """Findings on annealed chains, in place of those on chains that move through the whole density.

    Checked are the Metropolis test and its acceptance on every level, that draws of level 0 no longer drift, and the
    moments of all draws against those of weighted samples (`probmodels.scores.samplers.weighted`), whose masses do not
    depend on where chains came down. A fault that both samplers share, such as a mode that no noise leads to, does not
    show.
    """
    stats = result.tree["sample_stats"].attrs
    if "levels" not in stats:  # another kernel, whose chains are to be judged as chains
        return
    levels, draws = levels_of(result), result.posterior["x"].transpose("chain", "draw", ...).values
    if str(stats["corrected"]).lower() != "true":
        verdict = "steps were taken without a Metropolis test, so that the draws have another density, by the step size"
        yield Finding(False, verdict, "take sampler='hmc' or 'mala'", judged=False)
    least = float(levels["acceptance_rate"].min())
    verdict = f"the acceptance rate is {least:.2f} or more on every level (at least {_LEAST_ACCEPTANCE})"
    advice = "take a smaller step_size, or adapt=True" if least < _LEAST_ACCEPTANCE else ""
    yield Finding(not least >= _LEAST_ACCEPTANCE, verdict, advice)
    if lost := int(levels["divergences"].sum()):
        share = lost / (len(draws) * max(levels.sizes["level"], 1))
        verdict = f"{lost:,} trajectories diverged, {share:.2%} of the levels of all chains (at most 1%)"
        yield Finding(share > 0.01, verdict, "take a smaller step_size or more levels")
    if len(draws) < _LEAST_CHAINS:
        verdict = f"{len(draws)} chains are too few to judge draws that are independent by chain"
        yield Finding(False, verdict, f"take {_LEAST_CHAINS} or more (num_chains)", judged=False)
        return
    yield from _drift(draws)
    yield from _masses(result, draws)


def _moments(x: np.ndarray) -> np.ndarray:
    """Numbers and their products (..., moment) of draws (..., size); squares alone where there are many numbers."""
    size = x.shape[-1]
    if size > _MOST_NUMBERS:
        return np.concatenate([x, x**2], axis=-1)
    row, column = np.triu_indices(size)
    return np.concatenate([x, x[..., row] * x[..., column]], axis=-1)


def _drift(draws: np.ndarray) -> Iterator[Finding]:
    """Whether moments differ between the first and the last half of the draws of level 0, chain by chain."""
    half = draws.shape[1] // 2
    if not half:
        return
    moments = _moments(draws.reshape(*draws.shape[:2], -1))
    change = moments[:, -half:].mean(1) - moments[:, :half].mean(1)
    error = change.std(0, ddof=1) / math.sqrt(len(change))
    shift, surely = _shift(change.mean(0), error, moments.reshape(-1, moments.shape[-1]).std(0), len(change) - 1)
    verdict = f"from the first to the last draws of level 0, means and products of numbers move by {shift:.2f} sd"
    verdict += f" (at most {_SHIFT})"
    yield _told(shift, surely, verdict, "take more steps on each level (warmup_steps)")


def _shift(change: np.ndarray, error: np.ndarray, spread: np.ndarray, freedom: np.ndarray | int) -> tuple[float, bool]:
    """Largest change of a moment in units of its spread, and whether one is surely above the limit."""
    with np.errstate(divide="ignore", invalid="ignore"):
        size = np.nan_to_num(np.abs(change) / spread)
        excess = np.nan_to_num((np.abs(change) - _SHIFT * spread) / error, nan=-np.inf)
    limit = student.isf(_FALSE_ALARM / 2 / max(size.size, 1), freedom)
    return float(size.max(initial=0)), bool((excess > limit).any())


def _told(shift: float, surely: bool, verdict: str, advice: str) -> Finding:
    """A shift that is surely above the limit is harmful, one that may be chance is not judged."""
    if surely or shift <= _SHIFT:
        return Finding(surely, verdict, advice if surely else "")
    return Finding(
        False, f"{verdict}, which may be chance", f"take more chains (num_chains); if it stays, {advice}", judged=False
    )


def _masses(result: Result, draws: np.ndarray) -> Iterator[Finding]:
    """Moments of the draws against those of weighted samples."""
    stay = "chains may stay in the modes that they came down to, so that each mode has the mass of the way down"
    advice = "compare with probmodels.scores.samplers.weighted, whose masses are those of the density"
    size = math.prod(draws.shape[2:])
    if size > _MOST_NUMBERS:
        yield Finding(
            False, f"{stay}; data of {size} numbers are not compared with weighted samples", advice, judged=False
        )
        return
    try:
        model: Any = result.rebuild().model
        options = json.loads(result.tree.attrs.get("spec", "{}")).get("inference", {}).get("kernel_options") or {}
        groups, spread = _weighted(model, denoise=bool(options.get("denoise", True)))
    except ProbmodelsError as error:
        yield Finding(False, f"{stay}; weighted samples cannot be drawn: {error}", advice, judged=False)
        return
    moments = _moments(draws.reshape(*draws.shape[:2], -1)).mean(1)
    parts = np.stack([moments.var(0, ddof=1) / len(moments), groups.var(0, ddof=1) / len(groups)])
    freedom = parts.sum(0) ** 2 / (parts**2 / np.array([[len(moments) - 1], [len(groups) - 1]])).sum(0)  # Welch
    shift, surely = _shift(moments.mean(0) - groups.mean(0), np.sqrt(parts.sum(0)), spread, freedom)
    verdict = f"{stay}; means and products of numbers differ from those of weighted samples by {shift:.2f} sd "
    verdict += f"(at most {_SHIFT})"
    yield _told(shift, surely, verdict, "take more levels and more steps on each, or the weighted samples")


def _weighted(model: Any, *, denoise: bool) -> tuple[np.ndarray, np.ndarray]:
    """Moments (group, moment) of groups of weighted samples, and their spread (moment,) over all of them."""
    move = make_move(model.field, width=model.width)
    found = []
    for group in range(_GROUPS):
        run = weighted(
            model.field, _GROUP_SIZE, num_steps=_STEPS, move=move, denoise=denoise, seed=group, progress=False
        )
        found.append(_moments(run.samples.reshape(_GROUP_SIZE, -1).double().cpu().numpy()))
    return np.stack([group.mean(0) for group in found]), np.concatenate(found).std(0)
