"""Series of modes and missing entries, jointly normal: their expectation and covariance given what is seen.

Modes have series that are AR(1) processes of unit variance, noise the covariance ``sigma^2 A kron N`` of
`probmodels.bayesian_svd.noise`. Given patterns, decays and that covariance, series and missing entries of all times
have a precision that is block tridiagonal in time; one pass forwards and one backwards give means and covariances.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.linalg.lapack import dpotrf, dpotri, dtrtrs

from probmodels.errors import DataError

__all__ = ["States", "decays"]

Array = NDArray[np.float64]

_MOST = 4 * 2**30  # bytes of the factors


def decays(series: Array, phi: float, variance: float, steps: Array) -> Array:
    """Correlation of each mode's series (k, T) over one unit of time, noise along it taken off."""
    ones = np.abs(steps - 1) < 1e-6
    if not ones.any():
        return np.zeros(len(series))
    lagged = np.mean((series[:, 1:] * series[:, :-1])[:, ones], axis=1) - phi * variance
    return np.clip(lagged / np.maximum(np.mean(series**2, axis=1) - variance, 0.1 * variance), 0.0, 0.98)


def _tridiagonal(decay: Array) -> tuple[Array, Array]:
    """Diagonal (..., T) and what is beside it (..., T-1) of the precision of processes of unit variance."""
    innovation = 1.0 - decay**2
    diagonal = np.ones((*decay.shape[:-1], decay.shape[-1] + 1))
    diagonal[..., 1:] = 1.0 / innovation
    diagonal[..., :-1] += decay**2 / innovation
    return diagonal, -decay / innovation


class States:
    """Series of modes and missing entries of each time, jointly normal with a block tridiagonal precision.

    Parameters
    ----------
    seen
        True where observed (n, T).
    steps
        Times between neighbours (T-1,), in the unit of the decays.
    whitener
        Matrix (n, n) that makes noise of one time white.
    phi
        Correlation of the noise of neighbouring times (T-1,).
    modes
        Patterns times the sizes of their series, in coordinates where noise is white (n, k).
    decay
        Correlation of each series over one unit of time (k,).
    variance
        Of the noise in these coordinates.

    Raises
    ------
    DataError
        If the factors would take more than 4 GiB.
    """

    def __init__(
        self,
        seen: NDArray[np.bool_],
        steps: Array,
        whitener: Array,
        phi: Array,
        modes: Array,
        decay: Array,
        variance: float,
    ) -> None:
        self.rank, (self.n, self.num_times) = modes.shape[1], seen.shape
        self.missing = [np.flatnonzero(~seen[:, t]) for t in range(self.num_times)]
        sizes = np.array([self.rank + len(x) for x in self.missing], dtype=float)
        if (need := 16.0 * float(sizes @ sizes)) > _MOST:
            raise DataError(
                f"{need / 2**30:.0f} GiB are needed for what is missing or hidden (at most {_MOST / 2**30:.0f}); take "
                "a smaller region or a coarser grid, drop the times with the largest gaps, or hide a smaller share"
            )
        self.places = [np.concatenate([np.arange(self.rank), self.rank + x]) for x in self.missing]
        self.whitener = whitener
        self.sides = np.hstack([-modes, whitener])
        self.products = self.sides.T @ self.sides / variance
        self.variance = variance
        self.diagonal, self.beside = _tridiagonal(phi)
        self.own, self.next = _tridiagonal(decay[:, None] ** steps)

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
