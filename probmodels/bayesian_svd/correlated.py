"""The data as the modes see them where noise is correlated: whitened, filtered, and with what is missing drawn.

Given the effects and the modes, what is missing is normal. Its precision is that of the noise at the missing entries,
a tridiagonal matrix along time times the inverse covariance of the cells: block tridiagonal in time, one block for each
time with gaps. It is the same at each sweep but for sigma, and so is factored once.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve_triangular

from probmodels.bayesian_svd.augment import ReducedData
from probmodels.bayesian_svd.model import MatrixData
from probmodels.bayesian_svd.noise import filtered_by, unfiltered_by
from probmodels.errors import ProblemError

__all__ = ["CorrelatedData", "Missing", "seen_by_modes"]

Array = NDArray[np.float64]

_MOST = 4 * 2**30  # bytes of the factors
_LARGE = 0.25  # share of the cells whose absence makes series and what is missing be drawn at once


class Missing:
    """Missing entries of normal noise of known precision, up to its variance.

    Parameters
    ----------
    mask
        True where observed (n, T).
    precision
        Inverse covariance of the cells (n, n).
    phi
        Correlation of the noise of neighbouring times (T-1,).

    Raises
    ------
    ProblemError
        If the factors would take more than 4 GiB.
    """

    def __init__(self, mask: NDArray[np.bool_], precision: Array, phi: Array) -> None:
        sizes = (~mask).sum(0).astype(float)
        if (need := 24.0 * float(sizes @ sizes)) > _MOST:
            raise ProblemError(
                f"the gaps need {need / 2**30:.0f} GiB where noise is correlated (at most {_MOST / 2**30:.0f}); take a "
                "smaller region or a coarser grid, drop the times with the largest gaps, or noise='white'"
            )
        self.mask, self.precision = mask, precision
        innovation = 1.0 - phi**2
        self.diagonal = np.ones(mask.shape[1])
        self.diagonal[1:] = 1.0 / innovation
        self.diagonal[:-1] += phi**2 / innovation
        self.beside = -phi / innovation
        self.places = [np.flatnonzero(~mask[:, t]) for t in range(mask.shape[1])]
        self.times = [int(t) for t in np.flatnonzero(sizes)]
        self._lower: dict[int, Array] = {}
        self._next: dict[int, Array] = {}  # L^-1 times the block beside, where the next time has gaps too
        for t in self.times:
            own = self.places[t]
            block = self.diagonal[t] * precision[np.ix_(own, own)]
            if (before := self._next.get(t - 1)) is not None:
                block -= before.T @ before
            self._lower[t] = np.linalg.cholesky(block)
            if t + 1 < mask.shape[1] and len(later := self.places[t + 1]) and self.beside[t] != 0.0:
                beside = self.beside[t] * precision[np.ix_(own, later)]
                self._next[t] = solve_triangular(self._lower[t], beside, lower=True, check_finite=False)

    def draw(self, rng: np.random.Generator | None, residual: Array, sd: float) -> Array:
        """The residual (n, T) with its gaps drawn given what is observed, or their mean where ``rng`` is None."""
        rest = np.where(self.mask, residual, 0.0)
        weighted = rest * self.diagonal
        weighted[:, 1:] += rest[:, :-1] * self.beside
        weighted[:, :-1] += rest[:, 1:] * self.beside
        linear = -(self.precision @ weighted[:, self.times])
        parts: dict[int, Array] = {}
        for place, t in enumerate(self.times):
            right = linear[self.places[t], place]
            if (before := self._next.get(t - 1)) is not None:
                right = right - before.T @ parts[t - 1]
            parts[t] = solve_triangular(self._lower[t], right, lower=True, check_finite=False)
        later: Array | None = None
        for t in self.times[::-1]:
            part = parts[t] if rng is None else parts[t] + sd * rng.standard_normal(len(parts[t]))
            if t in self._next:
                assert later is not None
                part = part - self._next[t] @ later
            later = solve_triangular(self._lower[t], part, lower=True, trans=1, check_finite=False)
            rest[self.places[t], t] = later
        return rest


class CorrelatedData:
    """The data as the modes see them: ``z (ru, T)``, squared norm ``total`` before reduction, entries ``count``.

    Parameters
    ----------
    data
        Reduced data of a model whose noise is correlated.

    Attributes
    ----------
    static
        True where nothing is missing.
    complete
        Weighted data (n, T) with what is missing as drawn last; where something is missing.
    shared, effects
        Of the interface of `ReducedData`; empty.
    """

    def __init__(self, data: MatrixData) -> None:
        assert data.noise is not None
        noise = data.noise
        self._whitener, self._root, self._left = noise.whitener.numpy(), noise.root.numpy(), noise.left.numpy()
        self._phi, self._design = noise.phi.numpy(), data.design.numpy()
        self._back = np.linalg.inv(data.design_root.numpy())
        self._root_weight = np.sqrt(data.weight.numpy())[:, None]
        self.shared, self.effects = np.zeros(0), np.zeros((len(self._root), 0))
        self.count = float(data.num_free)
        self.static = data.gaps is None
        self._along = data.z_design.numpy()
        self._missing: Missing | None = None
        if data.gaps is not None:
            mask = data.gaps.mask.numpy()
            self._missing = Missing(mask, self._whitener.T @ self._whitener, self._phi)
            self.complete = data.gaps.observed.numpy().copy()
            absent = (~mask).mean(0)
            self._large = [int(t) for t in np.flatnonzero(absent > _LARGE)]
            own = self._missing.places
            precision = self._missing.precision
            self._factors = {t: np.linalg.cholesky(precision[np.ix_(own[t], own[t])]) for t in self._large}
            self._effects = np.zeros((len(mask), self._design.shape[1]))
            self._lifted = unfiltered_by(np.ascontiguousarray(self._design.T), self._phi)  # (q, T)
        self._set(np.ascontiguousarray(data.z.numpy()), float(data.z.square().sum() + data.rest))

    def _set(self, z: Array, total: float) -> None:
        self.z, self.z_transposed, self.total = z, np.ascontiguousarray(z.T), total

    def draw(self, rng: np.random.Generator, u: Array, d: Array, f: Array, noise: float) -> None:
        """Draw effects, then what is missing, given patterns by rows (k, ru), d (k,), series (k, T), the variance."""
        if self._missing is None:
            return
        signal = self._left.T @ (u.T * d)  # in white coordinates
        effects = self._along - signal @ (filtered_by(f, self._phi) @ self._design)
        effects += np.sqrt(noise) * rng.standard_normal(effects.shape)
        self._effects = self._root @ effects
        mean = self._root @ (signal @ f + effects @ self._lifted)
        residual = self._missing.draw(rng, self.complete - mean, np.sqrt(noise))
        self.take(np.where(self._missing.mask, self.complete, mean + residual))

    def draw_large(self, rng: np.random.Generator, u: Array, d: Array, f: Array, noise: float, bands: Array) -> None:
        """Draw the series (k, T), in place, and what is missing at once, at each time with a large gap.

        Drawn in turns, they would hold one another where modes are many and the noise is small. Given its neighbours,
        the noise of a time is normal with the covariance of cells over the diagonal of the precision in time, and the
        series are independent normals, of which ``bands`` (k, p + 1, T) are the precisions, as in
        `probmodels.bayesian_svd.banded`. What is missing is integrated out where the series are drawn.
        """
        if self._missing is None or not self._large:
            return
        missing, (size, num_times) = self._missing, f.shape
        signal = self._left.T @ (u.T * d)
        patterns, image = self._root @ signal, self._whitener.T @ signal  # X and its product with the precision
        gram = np.diag(d**2)
        fixed = self._effects @ self._lifted
        for t in self._large:
            own, lower, share = missing.places[t], self._factors[t], missing.diagonal[t]
            shift, linear = np.zeros(len(patterns)), np.zeros(size)
            for other, beside in ((t - 1, t - 1), (t + 1, t)):
                if 0 <= other < num_times:
                    residual = self.complete[:, other] - fixed[:, other] - patterns @ f[:, other]
                    shift -= missing.beside[beside] / share * residual
            for apart in range(1, min(bands.shape[1], num_times)):
                for other in (t - apart, t + apart):
                    if 0 <= other < num_times:
                        linear -= bands[:, apart, min(t, other)] * f[:, other]
            mean = fixed[:, t] + shift
            rest = self.complete[:, t] - mean
            rest[own] = 0.0
            weighted = missing.precision @ rest
            half = solve_triangular(lower, np.column_stack([image[own], weighted[own]]), lower=True, check_finite=False)
            scale = share / noise
            precision = scale * (gram - half[:, :-1].T @ half[:, :-1]) + np.diag(bands[:, 0, t])
            linear += scale * (patterns.T @ weighted - half[:, :-1].T @ half[:, -1])
            root = np.linalg.cholesky(precision)
            centre = solve_triangular(root, linear, lower=True) + rng.standard_normal(size)
            f[:, t] = solve_triangular(root, centre, lower=True, trans=1)
            part = half[:, :-1] @ f[:, t] - half[:, -1] + rng.standard_normal(len(own)) / np.sqrt(scale)
            self.complete[own, t] = mean[own] + solve_triangular(lower, part, lower=True, trans=1)
        self.take(self.complete)

    def take(self, complete: Array) -> None:
        """Take complete weighted data (n, T)."""
        self.complete = complete
        white = filtered_by(self._whitener @ complete, self._phi)
        self._along = white @ self._design
        total = float(np.vdot(white, white) - np.vdot(self._along, self._along))
        z = self._left @ white - (self._left @ self._along) @ self._design.T
        self._set(np.ascontiguousarray(z), total)

    def local_effects(self, rng: np.random.Generator, u: Array, d: Array, f: Array, noise: float) -> Array:
        """Coefficients of the named design in the units of the data (n, q)."""
        along = filtered_by(f, self._phi) @ self._design
        effects = self._along - self._left.T @ (u.T * d) @ along
        effects = effects + np.sqrt(noise) * rng.standard_normal(effects.shape)
        return (self._root @ effects) @ self._back.T / self._root_weight

    def state(self) -> dict[str, Array]:
        """What a chain needs to go on."""
        return {} if self._missing is None else {"complete": self.complete.copy()}

    def load(self, state: Mapping[str, Array]) -> None:
        """Go on from `state`."""
        if self._missing is not None:
            self.take(state["complete"])


def seen_by_modes(data: MatrixData) -> ReducedData | CorrelatedData:
    """The data of a model as its modes see them."""
    return ReducedData(data) if data.noise is None else CorrelatedData(data)
