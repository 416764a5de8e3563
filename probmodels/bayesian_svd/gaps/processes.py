"""Which process the series of a field follow: blocks of times are hidden, and each process fills them.

Modes and noise are fitted once, without sampling (`quick`), and are the same for all processes. In the coordinates
where noise is white the data along a mode are a series of their own,

    y_t = s f_t + e_t + effects,

f of unit variance with the correlation of the process, e of noise whose variance and persistence are known from all
other axes, effects of a wide prior. So what is hidden is normal given what is left, for each scale of the process and
each s; these are weighted by their likelihood on what is left, with the prior of the sampler. A process is judged by
the log density of what was hidden, of all modes.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import xarray as xr
from annotated_types import Interval, Len
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import cho_factor, cho_solve, solve_triangular
from scipy.special import logsumexp
from threadpoolctl import threadpool_limits
from tqdm.auto import tqdm

from probmodels.bayesian_svd.gaps.constant import data_of
from probmodels.bayesian_svd.gaps.quick import Table, quick_fit, table_of
from probmodels.bayesian_svd.gaps.rank_outputs import write_comparison
from probmodels.bayesian_svd.noise import filtered_by
from probmodels.bayesian_svd.series_grid import series_data
from probmodels.bayesian_svd.sides import cell_widths
from probmodels.distributions.processes import correlation_at
from probmodels.errors import DataError
from probmodels.options import Count, Positive, Seed, checked

__all__ = ["compare_processes", "write_processes"]

Array = NDArray[np.float64]

_BLOCK = 6
_LEAST = 10  # blocks
_MOST_TIMES = 3000  # matrices of times by times
_COMPLETE = 0.75  # share of the cells that a time has to hold
_SCALES = 20  # of each process, from the grid of the sampler
_SIZES = np.geomspace(0.5, 2.0, 5)  # of the variance of a series, times that of what is left
_WIDE = 1.0  # variance of what is left of effects after least squares, over that of the data
_TOLD_APART = 2.0  # standard errors of their paired difference from which two processes are told apart


@checked(DataError)
@threadpool_limits.wrap(limits=1)
def compare_processes(
    data: xr.DataArray | xr.Dataset,
    series: Annotated[Sequence[Literal["iid", "ar1", "matern32", "matern52"]], Len(2, 4)] = (
        "iid",
        "ar1",
        "matern32",
        "matern52",
    ),
    *,
    rank: Annotated[int, Interval(ge=1, le=10_000)] = 5,
    fixed_effects: Sequence[str] = ("intercept",),
    covariates: Mapping[str, ArrayLike] | None = None,
    area_weights: bool | Annotated[Sequence[Positive], Len(1)] = True,
    block: Count | None = None,
    folds: Annotated[int, Interval(ge=2, le=50)] = 5,
    noise: Literal["correlated", "white"] = "correlated",
    seed: Seed = 0,
    progress: bool = True,
) -> xr.Dataset:
    """Compare processes of the series by how well they fill hidden blocks of times.

    Parameters
    ----------
    data
        As `make_problem` takes it: (cell, time), or a field (time, lat, lon); missing entries NaN. They are filled by
        the fit; times that lack more than a quarter of the cells are left out.
    series
        Processes, as in `make_problem`.
    rank
        Number of modes; those that do not exceed noise are left out.
    fixed_effects, covariates, area_weights
        As in `make_problem`.
    block
        Times of a hidden block. None for 6, or a tenth of the times where that is less.
    folds
        In how many rounds the blocks are hidden, each block once.
    noise
        As in `make_problem`: ``"correlated"`` between near cells and neighbouring times, or ``"white"``.
    seed
        Seed of which blocks are hidden together.
    progress
        Whether to show a progress bar.

    Returns
    -------
    xr.Dataset
        Over ``series``: ``log_density`` of what is hidden given the rest, in nats a time, mean over times;
        ``shortfall``, by how much it is below that of the best, with the standard error ``shortfall_se`` of this
        difference paired by block; ``alike``, whether it is not told apart from the best, by two such standard errors.
        Over (series, block) ``block_log_density``. ``num_modes``, median over folds. Attributes ``best`` and
        ``sentence``.

    Raises
    ------
    DataError
        For data that `make_problem` refuses, processes given twice, fewer than ten blocks, more than 3000 times, or if
        no mode exceeds the noise.
    """
    if len(set(series)) < len(series):
        raise DataError(f"series={list(series)}; give different processes")
    constant = data_of(data, rank, fixed_effects, covariates, area_weights)
    grids = {name: _grid(constant["time"], name) for name in series}
    table = table_of(constant)
    usable = np.flatnonzero(table.seen.mean(0) >= _COMPLETE)
    if len(usable) > _MOST_TIMES:
        raise DataError(f"{len(usable)} times are more than {_MOST_TIMES}: give means over longer times, or a period")
    length = max(min(_BLOCK, len(usable) // 10), 1) if block is None else block
    blocks = [usable[first : first + length] for first in range(0, len(usable) - length + 1, length)]
    if len(blocks) < _LEAST:
        raise DataError(
            f"block={length}: {len(usable)} times hold {len(blocks)} blocks; at least {_LEAST} are needed to judge by: "
            "take shorter blocks"
        )
    along = _along_modes(table, usable, rank, noise == "correlated", progress)
    if not (num_modes := along.values.shape[1]):
        raise DataError("no mode exceeds the noise, so that nothing tells processes apart; look at `ranks` first")
    turn = np.random.default_rng(seed).permutation(len(blocks)) % min(folds, len(blocks))
    found = np.zeros((len(series), len(blocks)))
    for fold, (place, grid) in tqdm(
        list(itertools.product(range(turn.max() + 1), enumerate(grids.values()))), "processes", disable=not progress
    ):
        hidden = [blocks[number] for number in np.flatnonzero(turn == fold)]
        left = np.setdiff1d(usable, np.concatenate(hidden))
        found[place, turn == fold] = _log_densities(along, grid, left, hidden)
    return _scored(found, list(series), length, num_modes, noise, seed)


class _Grid(NamedTuple):
    """Scales (g,) of a process and their log prior."""

    process: str
    scale: Array
    log_prior: Array


def _grid(times: xr.DataArray, series: str) -> _Grid:
    """Grid of the sampler, thinned."""
    whole = series_data(times, series, 1)
    scale = whole.scale.numpy()
    scale = scale[np.unique(np.linspace(0, len(scale) - 1, _SCALES).round().astype(int))]
    weight = cell_widths(scale) if whole.process == "ar1" and len(scale) > 1 else np.ones(len(scale))
    return _Grid(whole.process, scale, np.log(weight / weight.sum()))


class _Along(NamedTuple):
    """Data along modes in coordinates where noise is white in space: ``values (T, k)``, NaN at times left out;
    ``design (T, q)``; ``times (T,)``; ``variance`` of the noise and its correlation ``decay`` over one unit of time."""

    values: Array
    design: Array
    times: Array
    variance: float
    decay: float


def _along_modes(table: Table, usable: NDArray[np.int_], rank: int, correlated: bool, progress: bool) -> _Along:
    """Fit modes to the times that are usable, and look along those that exceed noise."""
    times = np.concatenate([[0.0], np.cumsum(table.steps)])
    steps, fit = np.diff(times[usable]), None
    part = Table(table.values[:, usable], table.seen[:, usable], table.design[usable], steps, table.distance)
    for number in tqdm(range(1, rank + 1), "modes", disable=not progress):  # each begins where the one before ended
        fit = quick_fit(part, number, correlated=correlated, rng=np.random.default_rng(0), start=fit)
    assert fit is not None
    noise, phi = fit.noise, fit.noise.decay**steps
    white = noise.whitener @ fit.mean
    basis = np.linalg.qr(filtered_by(np.ascontiguousarray(part.design.T), phi).T)[0]
    filtered = filtered_by(white, phi)
    centred = filtered - (filtered @ basis) @ basis.T
    free = len(usable) - basis.shape[1]
    values, vectors = np.linalg.eigh(centred @ centred.T / free)
    variance = float(values[:-rank].sum() * free / ((len(values) - rank) * (free - rank)))
    modes = vectors[:, ::-1][:, :rank][:, fit.spectrum[:rank] > fit.edge]
    out = np.full((len(times), modes.shape[1]), np.nan)
    out[usable] = white.T @ modes
    return _Along(out, table.design, times, variance, noise.decay)


def _log_densities(along: _Along, grid: _Grid, left: NDArray[np.int_], hidden: Sequence[NDArray[np.int_]]) -> Array:
    """Log density (block,) of what is hidden given what is left, of all modes together."""
    variance = along.variance
    lag = np.abs(np.subtract.outer(along.times, along.times))
    effects = np.linalg.qr(along.design)[0] * np.sqrt(len(lag))
    values = along.values - effects @ np.linalg.lstsq(effects[left], along.values[left], rcond=None)[0]
    spread = values[left].var(axis=0)
    noise = along.decay**lag + _WIDE * float(spread.max()) / variance * effects @ effects.T
    lower = np.linalg.cholesky(noise[np.ix_(left, left)])
    seen = solve_triangular(lower, values[left], lower=True)
    other = np.concatenate(hidden)
    ends = np.cumsum([0, *(len(block) for block in hidden)])
    noise_across = solve_triangular(lower, noise[np.ix_(left, other)], lower=True)
    logs = np.empty((len(grid.scale), len(_SIZES), len(spread)))
    densities = np.empty((*logs.shape, len(hidden)))
    for place, scale in enumerate(grid.scale):
        signal = correlation_at(grid.process, scale, lag)
        half = solve_triangular(lower, signal[np.ix_(left, left)], lower=True)
        sizes, vectors = np.linalg.eigh(solve_triangular(lower, half.T, lower=True))
        turned = vectors.T @ seen
        across = vectors.T @ solve_triangular(lower, signal[np.ix_(left, other)], lower=True)
        noise_turned = vectors.T @ noise_across
        for mode, total in enumerate(spread):
            for step, factor in enumerate(_SIZES):
                size = factor * max(float(total) - variance, 0.1 * variance)
                own = size * np.maximum(sizes, 0.0) + variance
                logs[place, step, mode] = -0.5 * np.sum(np.log(own) + turned[:, mode] ** 2 / own)
                joint = size * across + variance * noise_turned
                mean = joint.T @ (turned[:, mode] / own)
                for number, block in enumerate(hidden):
                    part = joint[:, ends[number] : ends[number + 1]]
                    about = size * signal[np.ix_(block, block)] + variance * noise[np.ix_(block, block)]
                    about = about - part.T @ (part / own[:, None])
                    rest = values[block, mode] - mean[ends[number] : ends[number + 1]]
                    densities[place, step, mode, number] = _log_normal(rest, about)
    weights = logs + grid.log_prior[:, None, None]
    weights = weights - logsumexp(weights, axis=(0, 1))
    return np.asarray(logsumexp(densities + weights[..., None], axis=(0, 1)).sum(0))


def _log_normal(rest: Array, covariance: Array) -> float:
    """Log density of a normal at ``rest`` from its mean."""
    factor = cho_factor(covariance, lower=True)
    square = float(rest @ cho_solve(factor, rest))
    return -0.5 * (square + len(rest) * np.log(2 * np.pi)) - float(np.log(np.diag(factor[0])).sum())


def _scored(found: Array, series: list[str], length: int, num_modes: int, noise: str, seed: int) -> xr.Dataset:
    """What `compare_processes` returns, of log densities (series, block)."""
    count = found.shape[1]
    best = int(np.argmax(found.sum(1)))
    below = found[best] - found
    out = xr.Dataset(coords={"series": series})
    out["log_density"] = "series", found.mean(1) / length
    out["shortfall"] = "series", below.mean(1) / length
    out["shortfall_se"] = "series", below.std(1, ddof=1) / np.sqrt(count) / length
    out["alike"] = "series", below.mean(1) <= _TOLD_APART * below.std(1, ddof=1) / np.sqrt(count)
    out["block_log_density"] = ("series", "block"), found
    out["num_modes"] = (), num_modes
    out.attrs = {"best": series[best], "block": length, "noise": noise, "seed": seed, "blocks": count}
    return out.assign_attrs(sentence=_sentence(out))


def _sentence(found: xr.Dataset) -> str:
    """What the comparison says, in words."""
    best, modes = found.attrs["best"], int(found["num_modes"])
    text = (
        f"With {found.attrs['noise']} noise and {modes} mode{'s' * (modes != 1)} that exceed{'s' * (modes == 1)} it, "
        f"series={best} fills {found.attrs['blocks']} hidden blocks of {found.attrs['block']} times best"
    )
    others = [name for name in found["series"].values if name != best]
    alike = [str(name) for name in others if found["alike"].sel(series=name)]
    worse = [str(name) for name in others if name not in alike]
    if alike:
        text += f". Not told apart from it: {', '.join(alike)} (differences are below two standard errors)"
    if worse:
        one = found.sel(series=worse)
        parts = zip(worse, one["shortfall"].values, one["shortfall_se"].values, strict=True)
        text += ". Worse: " + ", ".join(f"{name} by {by:.2g} ± {se:.1g} nats a time" for name, by, se in parts)
    return text + "."


@checked(DataError)
def write_processes(comparison: xr.Dataset, out: str | Path) -> str:
    """Write ``processes.csv`` and ``processes.nc``.

    Parameters
    ----------
    comparison
        From `compare_processes`.
    out
        Folder, made where it is not there.

    Returns
    -------
    str
        The table, as text.

    Raises
    ------
    DataError
        If the folder cannot be written.
    """
    table = comparison[["log_density", "shortfall", "shortfall_se", "alike"]].to_dataframe()
    write_comparison(comparison, table, Path(out), "processes")
    return table.to_string(float_format="%.4g")
