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
from numpy.typing import NDArray
from scipy.linalg.lapack import dpotrf, dpotri, dtrtrs

from probmodels.bayesian_svd.noise import Noise, estimate_noise, filtered_by
from probmodels.errors import DataError

__all__ = ["QuickFit", "Table", "noise_about", "noise_edge", "quick_fit", "shrunken"]

Array = NDArray[np.float64]

_ROUNDS = (2, 3)  # of modes and missing entries, after each estimate of noise
_TAIL = 0.979  # 95 % point of the Tracy-Widom distribution of order 1
_MOST = 4 * 2**30  # bytes of the factors


class Table(NamedTuple):
    """Weighted data ``values (n, T)``, zero where not ``seen (n, T)``; columns ``design (T, q)`` of the effects of each
    cell; ``steps (T-1,)`` between times in their unit; ``distance (n, n)`` of cells."""

    values: Array
    seen: NDArray[np.bool_]
    design: Array
    steps: Array
    distance: Array


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
        decay = _decays(series, noise.decay, variance, table.steps)
        gain = (1 + noise.decay**2 - 2 * noise.decay * decay) / (1 - noise.decay**2)
        kept = signal > 0
        kept[0] = True  # of no variance where no mode exceeds the noise
        modes = (vectors * np.sqrt(signal * variance / gain))[:, kept]
        state = _States(table, noise, modes, decay[kept], variance, phi)
        mean, scores, hidden, spread, deviation = state.conditional(np.where(table.seen, filled - effects, 0.0), rng)
        filled = np.where(table.seen, table.values, effects + mean)
    spread = spread + _leverage(white_design, scores, phi)[None, :] * (variance * noise.level**2)[:, None]
    spread[table.seen] = 0.0
    completed = filled + np.where(table.seen, 0.0, deviation)
    return QuickFit(filled, spread, completed, noise, values / variance, noise_edge(n, effective))


def _decays(series: Array, phi: float, variance: float, steps: Array) -> Array:
    """Correlation of each mode's series (k, T) over one unit of time, noise along it taken off."""
    ones = np.abs(steps - 1) < 1e-6
    if not ones.any():
        return np.zeros(len(series))
    lagged = np.mean((series[:, 1:] * series[:, :-1])[:, ones], axis=1) - phi * variance
    return np.clip(lagged / np.maximum(np.mean(series**2, axis=1) - variance, 0.1 * variance), 0.0, 0.98)


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


def _tridiagonal(decay: Array) -> tuple[Array, Array]:
    """Diagonal (..., T) and what is beside it (..., T-1) of the precision of processes of unit variance."""
    innovation = 1.0 - decay**2
    diagonal = np.ones((*decay.shape[:-1], decay.shape[-1] + 1))
    diagonal[..., 1:] = 1.0 / innovation
    diagonal[..., :-1] += decay**2 / innovation
    return diagonal, -decay / innovation


class _States:
    """Series of modes and missing entries of each time, jointly normal with a block tridiagonal precision."""

    def __init__(self, table: Table, noise: Noise, modes: Array, decay: Array, variance: float, phi: Array) -> None:
        self.rank, (self.n, self.num_times) = modes.shape[1], table.seen.shape
        self.missing = [np.flatnonzero(~table.seen[:, t]) for t in range(self.num_times)]
        sizes = np.array([self.rank + len(x) for x in self.missing], dtype=float)
        if (need := 16.0 * float(sizes @ sizes)) > _MOST:
            raise DataError(
                f"{need / 2**30:.0f} GiB are needed for what is missing or hidden (at most {_MOST / 2**30:.0f}); take "
                "a smaller region or a coarser grid, or a smaller share"
            )
        self.places = [np.concatenate([np.arange(self.rank), self.rank + x]) for x in self.missing]
        self.phi, self.variance, self.whitener = phi, variance, noise.whitener
        self.sides = np.hstack([-modes, self.whitener])
        self.products = self.sides.T @ self.sides / variance
        self.diagonal, self.beside = _tridiagonal(phi)
        self.own, self.next = _tridiagonal(decay[:, None] ** table.steps)

    def conditional(self, known: Array, rng: np.random.Generator) -> tuple[Array, Array, Array, Array, Array]:
        """Given residuals about effects (n, T), zero where missing: mean of these with what is missing (n, T), mean of
        the series (k, T), covariance of what is missing summed over times in white coordinates (n, n), its variances
        (n, T) and a draw of it about the mean (n, T)."""
        white = self.whitener @ known
        weighted = white * self.diagonal
        weighted[:, 1:] += white[:, :-1] * self.beside
        weighted[:, :-1] += white[:, 1:] * self.beside
        linear = -(self.sides.T @ weighted) / self.variance
        factors, links, parts = self._forwards(linear)
        k, mean, scores = self.rank, known.copy(), np.empty((self.rank, self.num_times))
        moments, spread, deviation = np.zeros((self.n, self.n)), np.zeros_like(known), np.zeros_like(known)
        state = np.zeros((0, 2))  # mean, and a draw about it
        covariance = np.zeros((0, 0))
        for t in range(self.num_times - 1, -1, -1):
            lower, link, gaps = factors[t], links[t], self.missing[t]
            later = self.missing[t + 1] if t + 1 < self.num_times else gaps[:0]
            right = np.stack([parts[t], rng.standard_normal(len(lower))], axis=1)
            state = dtrtrs(lower, right, lower=1, trans=1)[0] - link @ state
            inverse = np.tril(dpotri(lower, lower=1)[0])
            inverse += np.tril(inverse, -1).T
            cross = -link @ covariance
            covariance = inverse - cross @ link.T
            scores[:, t], mean[gaps, t], deviation[gaps, t] = state[:k, 0], state[k:, 0], state[k:, 1]
            spread[gaps, t] = covariance.diagonal()[k:]
            moments[np.ix_(gaps, gaps)] += self.diagonal[t] * covariance[k:, k:]
            if len(gaps) and len(later):
                part = self.beside[t] * cross[k:, k:]
                moments[np.ix_(gaps, later)] += part
                moments[np.ix_(later, gaps)] += part.T
        return mean, scores, self.whitener @ moments @ self.whitener.T, spread, deviation

    def _forwards(self, linear: Array) -> tuple[list[Array], list[Array], list[Array]]:
        """Lower factors of each time's block, its precision's inverse times the block beside, and L^-1 linear."""
        factors: list[Array] = []
        links: list[Array] = []
        parts: list[Array] = []
        k, last = self.rank, self.num_times - 1
        carried, shift = np.zeros((0, 0)), np.zeros(0)
        for t, place in enumerate(self.places):
            block = self.diagonal[t] * self.products[place[:, None], place]
            block[np.arange(k), np.arange(k)] += self.own[:, t]
            right = linear[place, t]
            if t:
                block, right = block - carried, right - shift
            lower = dpotrf(block, lower=1)[0]
            factors.append(lower)
            if t == last:
                parts.append(dtrtrs(lower, right[:, None], lower=1)[0][:, 0])
                links.append(np.zeros((len(place), 0)))
                break
            beside = self.beside[t] * self.products[place[:, None], self.places[t + 1]]
            beside[np.arange(k), np.arange(k)] += self.next[:, t]
            solved = dtrtrs(lower, np.column_stack([beside, right]), lower=1)[0]
            half, part = solved[:, :-1], solved[:, -1]
            carried, shift = half.T @ half, half.T @ part
            parts.append(part)
            links.append(dtrtrs(lower, half, lower=1, trans=1)[0])
        return factors, links, parts
