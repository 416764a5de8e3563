"""Whether a guide lacks a part of the posterior: annealed draws, which owe nothing to the guide, say what it misses.

Weights of a guide's own draws cannot show a mode that it never draws. Draws that are annealed from a start that is
uniform in discrete values come to modes in proportion to their mass, as far as single elements can be moved on the way.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
import xarray as xr
from annotated_types import Interval
from pyro import poutine

from probmodels.errors import ProblemError, ResultError
from probmodels.inference.diagnostics.convergence import EQUAL_WEIGHTS, psis
from probmodels.inference.flows.annealing import Annealed, anneal
from probmodels.inference.flows.density import Density, affordable
from probmodels.inference.labels import group_of
from probmodels.inference.problem import Problem
from probmodels.inference.programs.draws import map_draws
from probmodels.inference.programs.minibatch import whole
from probmodels.inference.programs.programs import fitted
from probmodels.inference.programs.traces import Frames, by_datum, sample_sites, shared_plates
from probmodels.inference.result import Result
from probmodels.inference.runtime.ops import chain_seed, is_generated
from probmodels.options import Seed, checked

__all__ = ["check_modes", "look_for_modes"]

_log = logging.getLogger(__name__)

_PARTICLES = 2000
_RARE = 0.1  # of its posterior probability, below which a guide (almost) never draws a value
_GROUPS = 8  # of annealed draws, for the Monte Carlo error
_STREAM = 2


@checked(ProblemError)
def check_modes(
    problem: Problem,
    result: Result,
    *,
    num_particles: Annotated[int, Interval(ge=100, le=1_000_000)] = _PARTICLES,
    seed: Seed = 0,
) -> xr.Dataset:
    """Look for parts of the posterior that a fitted guide lacks, by annealed importance sampling.

    Parameters
    ----------
    problem
        What was inferred.
    result
        Result of an engine that fits a guide. What is found is kept in its group ``modes``, where `diagnose` reads it.
    num_particles
        Annealed draws.
    seed
        Seed of the draws.

    Returns
    -------
    xr.Dataset
        By row of the plates that all sites share: ``log_evidence`` by annealing, its Monte Carlo error ``mcse``,
        effective draws ``ess`` and Pareto k-hat ``khat`` of the annealed weights; ``guide_log_evidence`` by the
        importance weights of the guide's own draws, with ``guide_mcse``; and where the density of the guide can be
        evaluated, ``missed``, the share of annealed mass that the guide gives less than a tenth of its posterior
        probability, and ``distance``, the total variation between guide and posterior on the annealed draws, with
        ``missed_mcse`` and ``distance_mcse``. The draws themselves: ``log_weight`` (particle, ...), normalised, and
        the value of every site, (particle, ...).

    Raises
    ------
    ProblemError
        If a discrete site has no finite list of values, or a continuous one no map from unconstrained space.
    ResultError
        If the result has no parameters of this problem.

    Notes
    -----
    The estimate can be trusted where ``ess`` is large and ``khat`` at most 0.7. A mode that no draw comes to on the
    way, as one that is narrow and far from all else, is seen by neither.

    References
    ----------
    Neal, R. M. (2001). Annealed importance sampling. Statistics and Computing 11.
    """
    if result.guide_state is None:
        raise ResultError(f"{problem.name}: the result has no guide; take one of fit_svi or fit_em")
    modes = _look(problem, result, num_particles, seed)
    assert modes is not None
    result.tree["modes"] = xr.DataTree(modes)
    return modes


def look_for_modes(problem: Problem, result: Result, *, seed: int) -> None:
    """What an engine does after a fit: `check_modes` where it is `affordable`."""
    latent = [site for site in problem.sites.values() if site.kind == "latent"]
    if result.guide_state is None or not all(site.finite for site in latent):
        return
    try:
        modes = _look(problem, result, None, seed)
    except Exception as error:  # of a program that does not run at all values of its sites
        _log.info("%s: check_modes was not run: %s", problem.name, error)
        return
    if modes is not None:
        result.tree["modes"] = xr.DataTree(modes)


def _look(problem: Problem, result: Result, num_particles: int | None, seed: int) -> xr.Dataset | None:
    """As `check_modes`; with as many draws as are affordable for None, and nothing where these are too few."""
    assert result.guide_state is not None
    with fitted(problem, result.guide_state, seed=chain_seed(seed, _STREAM)) as (model, guide):
        with torch.no_grad(), whole(problem)():
            draw: Any = poutine.trace(guide).get_trace(*problem.args, **problem.kwargs)
            hidden = poutine.block(model, hide_fn=is_generated)
            trace: Any = poutine.trace(poutine.replay(hidden, trace=draw)).get_trace(*problem.args, **problem.kwargs)
        frames = shared_plates(trace, draw)
        density = (
            Density(problem, model, frames, num_particles) if num_particles else affordable(problem, model, frames)
        )
        if isinstance(density, str):
            _log.info("%s: check_modes was not run: %s", problem.name, density)
            return None
        found = anneal(density)
        log_guide = _log_guide(problem, guide, draw, frames, found)
    return _compared(problem, result, frames, found, log_guide)


def _log_guide(problem: Problem, guide: Any, draw: Any, frames: Frames, found: Annealed) -> np.ndarray | None:
    """Log density (particle, *rows) of the guide at annealed draws; None where it draws more than the model knows."""
    names = [site["name"] for site in sample_sites(draw)]
    if any(name not in found.values for name in names):
        return None
    arrays = {name: found.values[name].cpu().numpy() for name in names}
    # Each configuration once: a guide that cannot be captured runs draw by draw.
    flat = np.concatenate([value.reshape(len(value), -1).astype(np.float64) for value in arrays.values()], 1)
    _, first, inverse = np.unique(flat, axis=0, return_index=True, return_inverse=True)
    all_rows = whole(problem)

    def score(values: Mapping[str, Any]) -> dict[str, Any]:
        with all_rows():
            program = poutine.condition(guide, dict(values))
            trace: Any = poutine.trace(program).get_trace(*problem.args, **problem.kwargs)
            trace.compute_log_prob()
            return {"log_q": by_datum(trace, frames)}

    given = {name: value[first][None] for name, value in arrays.items()}
    label = f"{problem.name}: density of the guide"
    log_q = map_draws(score, given, (1, len(first)), label=label, random=False)["log_q"][0].astype(np.float64)
    return log_q.reshape(len(first), *_sizes(frames))[inverse.reshape(-1)]


def _sizes(frames: Frames) -> list[int]:
    return [frame.size for frame in sorted(frames.values(), key=lambda frame: frame.dim)]


@dataclass(frozen=True)
class _Mean:
    """A weighted mean by row, and its Monte Carlo error."""

    value: np.ndarray
    mcse: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray, weight: np.ndarray) -> _Mean:
        """Of values in [0, 1] and normalised weights (particle, *rows).

        The error counts what effective draws might miss altogether: one draw more on either side.
        """
        mean = (weight * values).sum(0)
        mcse = np.sqrt((weight**2 * (values - mean) ** 2).sum(0))
        return cls(mean, np.maximum(mcse, (weight**2).sum(0)))


def _compared(
    problem: Problem, result: Result, frames: Frames, found: Annealed, log_guide: np.ndarray | None
) -> xr.Dataset:
    """What annealed draws say of the guide."""
    dims = [frame.name for frame in sorted(frames.values(), key=lambda frame: frame.dim)]
    log_weight = found.log_weight.cpu().numpy().astype(np.float64)
    count, top = len(log_weight), log_weight.max(0)
    if not np.isfinite(top).all():
        raise ProblemError(
            f"{problem.name}: no annealed draw has a finite density under the model, so that nothing can be compared"
        )
    weight = np.exp(log_weight - top)
    mean = weight.mean(0)
    groups = np.stack([group.mean(0) for group in np.array_split(weight, _GROUPS)]) / mean
    error = np.maximum(weight.std(0, ddof=1) / mean / math.sqrt(count), groups.std(0, ddof=1) / math.sqrt(_GROUPS))
    weight /= weight.sum(0)
    variables: dict[str, Any] = {
        "log_evidence": top + np.log(mean),
        "mcse": error,
        "ess": 1 / (weight**2).sum(0),
        "khat": _khat(log_weight),
    }
    variables |= _own_evidence(result, dims)
    if log_guide is not None:
        log_p = found.log_joint.cpu().numpy().astype(np.float64)
        with np.errstate(invalid="ignore", over="ignore"):
            ratio = np.exp(log_guide - log_p + _best_evidence(variables))  # guide by posterior
        ratio = np.where(weight > 0, ratio, 1.0)
        parts = {"missed": (ratio < _RARE).astype(np.float64), "distance": np.clip(1 - ratio, 0, 1)}
        for name, values in parts.items():
            estimate = _Mean.of(values, weight)
            variables |= {name: estimate.value, f"{name}_mcse": estimate.mcse}
    data: dict[str, Any] = {name: (dims, value) for name, value in variables.items()}
    with np.errstate(divide="ignore"):
        data["log_weight"] = (["particle", *dims], np.log(weight))
    for name, value in found.values.items():
        if name not in data:
            data[name] = (["particle", *problem.sites[name].dims], value.cpu().numpy())
    coords = {dim: problem.coords.get(dim, np.arange(frames[dim].size)) for dim in dims}
    return xr.Dataset(data, coords=coords, attrs={"num_steps": found.num_steps})


def _best_evidence(found: Mapping[str, np.ndarray]) -> np.ndarray:
    """Log evidence by annealing, or where the guide's own agrees, the mean of both by their precisions."""
    one, own = found["log_evidence"], found.get("guide_log_evidence")
    if own is None:
        return one
    precision, other = (1 / np.maximum(found[name], 1e-6) ** 2 for name in ("mcse", "guide_mcse"))
    both = (precision * one + other * own) / (precision + other)
    return np.where(np.abs(one - own) <= 2 * np.hypot(found["mcse"], found["guide_mcse"]), both, one)


def _khat(log_weight: np.ndarray) -> np.ndarray:
    """Pareto k-hat by row; minus infinity where weights are equal."""
    flat = log_weight.reshape(len(log_weight), -1)
    shapes = [psis(column)[1] if np.ptp(column) > EQUAL_WEIGHTS else -np.inf for column in flat.T]
    return np.array(shapes, dtype=np.float64).reshape(log_weight.shape[1:])


def _own_evidence(result: Result, dims: list[str]) -> dict[str, np.ndarray]:
    """Log evidence by the importance weights of the guide's draws, which the result keeps, and its error."""
    stats = group_of(result.tree, "sample_stats")
    name = "log_weight_by_row" if dims else "log_weight"
    if name not in stats:
        return {}
    weights = stats[name].transpose("chain", "draw", *dims).values.astype(np.float64)
    weights = weights.reshape(-1, *weights.shape[2:])
    top = weights.max(0)
    if len(weights) < 2 or not np.isfinite(top).all():
        return {}
    scaled = np.exp(weights - top)
    mean = scaled.mean(0)
    error = scaled.std(0, ddof=1) / mean / math.sqrt(len(weights))
    return {"guide_log_evidence": top + np.log(mean), "guide_mcse": error}
