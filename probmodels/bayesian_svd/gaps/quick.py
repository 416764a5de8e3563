"""Modes of a given number without sampling: variances by shrinkage, and the exact conditional of what is missing.

The model is that of the sampler: effects of each cell, modes whose series are AR(1) processes of unit variance, and
noise of covariance ``sigma^2 A kron N`` (see `probmodels.bayesian_svd.noise`). In the coordinates where noise is white,
modes are the leading eigenvectors of the second moments. Their variances are shrunken as Donoho, Gavish and Johnstone
derive for eigenvectors that are themselves estimated: what does not exceed the edge of pure noise is no mode. Given
them, series and missing entries are jointly normal and block tridiagonal in time; one pass forwards and one backwards
give their means and covariances. Moments, modes and missing entries are found in turns (expectation maximisation).

References
----------
Donoho, D. L., Gavish, M. and Johnstone, I. M. (2018). Optimal shrinkage of eigenvalues in the spiked covariance model.
Ann. Stat. 46. https://arxiv.org/abs/1311.0851
Johnstone, I. M. (2001). On the distribution of the largest eigenvalue in principal components analysis. Ann. Stat. 29.
https://doi.org/10.1214/aos/1009210544
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from probmodels.bayesian_svd.gaps.states import States, decays
from probmodels.bayesian_svd.noise import Noise, estimate_noise, filtered_by
from probmodels.bayesian_svd.sides import space_distance

__all__ = ["QuickFit", "Table", "noise_about", "noise_edge", "quick_fit", "shrunken", "table_of"]

Array = NDArray[np.float64]

_ROUNDS = (2, 3)  # of modes and missing entries, after each estimate of noise
_TAIL = 0.979  # 95 % point of the Tracy-Widom distribution of order 1


class Table(NamedTuple):
    """Weighted data ``values (n, T)``, zero where not ``seen (n, T)``; columns ``design (T, q)`` of the effects of each
    cell; ``steps (T-1,)`` between times in their unit; ``distance (n, n)`` of cells."""

    values: Array
    seen: NDArray[np.bool_]
    design: Array
    steps: Array
    distance: Array


def table_of(constant: xr.Dataset) -> Table:
    """Weighted data, effects and distances of a problem, by the data that it keeps."""
    values = constant["data"].transpose("cell", "time").values.astype(float)
    seen, root = np.isfinite(values), np.sqrt(constant["weight"].values)[:, None]
    if "fixed_effects_design" in constant:
        design = constant["fixed_effects_design"].transpose("time", ...).values.astype(float)
    else:
        design = np.zeros((values.shape[1], 0))
    distance = space_distance(constant["data"]).numpy()
    return Table(np.where(seen, values * root, 0.0), seen, design, constant["time_steps"].values, distance)


class QuickFit(NamedTuple):
    """What is missing, and the modes.

    ``mean (n, T)`` is that of each entry given those seen and ``variance (n, T)`` its variance, zero where seen;
    ``completed (n, T)`` has one draw of what is missing; ``noise`` its covariance; ``spectrum (n,)`` variances along
    all axes of the whitened data, in units of the noise variance ``sigma^2``; ``edge`` the largest that noise alone
    gives.
    """

    mean: Array
    variance: Array
    completed: Array
    noise: Noise
    spectrum: Array
    edge: float


def noise_edge(num_cells: int, num_times: float) -> float:
    """Variance that the leading axis of white noise of unit variance exceeds in 5 of 100 data sets."""
    root, other = np.sqrt(num_times - 1), np.sqrt(num_cells)
    centre, width = (root + other) ** 2, (root + other) * (1 / root + 1 / other) ** (1 / 3)
    return float((centre + _TAIL * width) / num_times)


def shrunken(spectrum: Array, num_cells: int, num_times: float) -> Array:
    """Variance of the signal along estimated axes, in units of the noise variance.

    Parameters
    ----------
    spectrum
        Variances of the data along the axes (k,), in units of the noise variance.
    num_cells, num_times
        Of the data; times less effects.

    Returns
    -------
    Array
        Zero up to `noise_edge`.
    """
    ratio = num_cells / num_times
    inside = np.maximum(spectrum - 1 - ratio, 2 * np.sqrt(ratio))
    spike = (inside + np.sqrt(np.maximum(inside**2 - 4 * ratio, 0.0))) / 2
    cosine = np.maximum(1 - ratio / spike**2, 0.0) / (1 + ratio / spike)
    return np.where(spectrum > noise_edge(num_cells, num_times), spike * cosine, 0.0)


def quick_fit(
    table: Table, rank: int, *, correlated: bool, rng: np.random.Generator, start: QuickFit | None = None
) -> QuickFit:
    """Fit modes and noise, and the conditional of what is missing.

    Parameters
    ----------
    table
        Data, effects and distances.
    rank
        Number of modes; those that noise would give too come out as zero.
    correlated
        Whether noise has a level of each cell, a correlation between cells and persistence.
    rng
        Of the draw that completes the data.
    start
        Another fit to the same data, to begin from.

    Raises
    ------
    DataError
        If the gaps need more than 4 GiB.
    """
    n = len(table.values)
    white = Noise(np.eye(n), np.ones(n), 0.0, "none", 0.0, np.zeros(n))
    every = np.ones_like(table.seen)
    noise, completed, level = white, None, np.ones(n)
    if start is not None:
        completed, level = start.completed, start.noise.level
    for rounds in _ROUNDS:
        if correlated or completed is None:
            known, seen = (table.values, table.seen) if completed is None else (completed, every)
            found, filled = _noise(known, seen, table, rank, level)
            noise = found if correlated else white
            completed = filled if completed is None else completed
        fit = _with_noise(table, rank, noise, completed, rounds, rng)
        completed, level = fit.completed, noise.level
    return fit


def noise_about(table: Table, rank: int) -> tuple[Noise, Array]:
    """Covariance of the noise about a number of modes, and the data with gaps filled (n, T).

    Fits of each smaller number come first: a fit that begins without levels of the cells takes noisy cells for modes.
    """
    fit: QuickFit | None = None
    for number in range(1, rank + 1):
        fit = quick_fit(table, number, correlated=True, rng=np.random.default_rng(0), start=fit)
    assert fit is not None
    return fit.noise, fit.mean


def _noise(values: Array, seen: NDArray[np.bool_], table: Table, rank: int, level: Array) -> tuple[Noise, Array]:
    """Covariance of the noise and filled data, found from data over a first guess of the level of each cell (n,).

    Without the guess the first modes are those of the noisiest cells, and some stay so.
    """
    scale = level[:, None]
    found, filled = estimate_noise(values / scale, seen, table.design, table.steps, table.distance, rank)
    root = scale * found.root
    sizes, vectors = np.linalg.eigh(root @ root.T)
    return found._replace(values=sizes.clip(1e-10 * sizes[-1]), vectors=vectors), filled * scale


def _with_noise(
    table: Table, rank: int, noise: Noise, filled: Array, rounds: int, rng: np.random.Generator
) -> QuickFit:
    """Modes and missing entries in turns, given the covariance of the noise."""
    (n, num_times), design = filled.shape, table.design
    phi = noise.decay**table.steps
    whitener = noise.whitener
    white_design = filtered_by(np.ascontiguousarray(design.T), phi).T
    basis, back = np.linalg.qr(white_design)
    free = num_times - design.shape[1]
    effective = free * float(table.seen.mean())
    hidden = np.zeros((n, n))  # expected second moments of what is missing, about its mean
    for _ in range(rounds):
        white = filtered_by(whitener @ filled, phi)
        along = white @ basis
        centred = white - along @ basis.T
        values, vectors = np.linalg.eigh((centred @ centred.T + hidden) / free)
        values, vectors = values[::-1], vectors[:, ::-1][:, :rank]
        variance = float(values[rank:].sum() * free / ((n - rank) * (free - rank)))
        signal = shrunken(values[:rank] / variance, n, effective)
        effects = noise.root @ (along @ np.linalg.inv(back).T) @ design.T
        series = vectors.T @ (whitener @ (filled - effects))
        decay = decays(series, noise.decay, variance, table.steps)
        gain = (1 + noise.decay**2 - 2 * noise.decay * decay) / (1 - noise.decay**2)
        kept = signal > 0
        kept[0] = True  # of no variance where no mode exceeds the noise
        modes = (vectors * np.sqrt(signal * variance / gain))[:, kept]
        state = States(table.seen, table.steps, whitener, phi, modes, decay[kept], variance)
        mean, scores, hidden, spread, deviation = state.conditional(np.where(table.seen, filled - effects, 0.0), rng)
        filled = np.where(table.seen, table.values, effects + mean)
    spread = spread + _leverage(white_design, scores, phi)[None, :] * (variance * noise.level**2)[:, None]
    spread[table.seen] = 0.0
    completed = filled + np.where(table.seen, 0.0, deviation)
    return QuickFit(filled, spread, completed, noise, values / variance, noise_edge(n, effective))


def _leverage(design: Array, scores: Array, phi: Array) -> Array:
    """Variance that estimated coefficients of effects and patterns add at each time (T,), over that of noise.

    A pattern is the regression of the cells on its series, as an effect is on its column.
    """
    columns = np.hstack([design, filtered_by(scores, phi).T])
    plain = np.hstack([design, scores.T])
    used = np.sum(columns**2, axis=0) > 0
    columns, plain = columns[:, used], plain[:, used]
    gram = columns.T @ columns
    gram[np.diag_indices_from(gram)] += 1e-9 * np.trace(gram) / max(len(gram), 1)
    return np.einsum("tk,tk->t", plain, np.linalg.solve(gram, plain.T).T)
