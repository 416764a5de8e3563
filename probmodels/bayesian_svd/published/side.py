"""A frame and its kernels as the published sampler handles them: dense, in the full space, one column at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import linalg
from scipy.special import gamma, kv

from probmodels.distributions.covariance import KERNELS, correlation
from probmodels.errors import ProblemError

__all__ = ["Side", "cholesky", "factorise", "log_normal", "make_side", "project"]

Array = NDArray[np.float64]

_SMOOTHNESS = {"matern12": 0.5, "matern32": 1.5, "matern52": 2.5, "matern72": 3.5, "exponential": 0.5}


def _matern_bessel(nu: float, distance: Array, length_scale: float) -> Array:
    """Matérn correlation of any smoothness, through the modified Bessel function of the second kind."""
    r = np.sqrt(2.0 * nu) * distance / length_scale
    positive = np.where(r > 0, r, 1.0)
    return np.where(r > 0, 2.0 ** (1.0 - nu) / gamma(nu) * positive**nu * kv(nu, positive), 1.0)


@dataclass
class Side:
    """Frame of one side (space or time), its kernels, and what the conditionals keep of the null spaces.

    With ``p = size - k + 1``, entry i of ``null`` is (size, p), of ``projected`` and ``inverse`` (p, p), of
    ``coordinates`` (p,), the column in the basis ``null[i]``.
    """

    frame: Array  # (size, k)
    distance: Array  # (size, size)
    kernel: str
    length_scale: Array  # (k,)
    bounds: tuple[float, float] | None
    nugget: float
    bessel: bool
    variance: Array  # (k,), the mixture variances of the half-Cauchy prior
    step: Array  # (k,), standard deviations of the length-scale proposals
    quadratic: Array = field(init=False)  # (k,) coordinates' inverse coordinates, as of the latest column draws
    matrix: list[Array] = field(init=False)  # k of (size, size)
    null: list[Array] = field(init=False)
    projected: list[Array] = field(init=False)
    inverse: list[Array] = field(init=False)
    coordinates: list[Array] = field(init=False)

    def __post_init__(self) -> None:
        self.rebuild()

    @property
    def size(self) -> int:
        return self.frame.shape[0]

    def rebuild(self) -> None:
        """Recompute everything that follows from frame and length-scales."""
        rank = self.frame.shape[1]
        empty = np.empty(0)
        self.matrix = [self.build(rho) for rho in self.length_scale]
        self.null, self.projected, self.inverse, self.coordinates = ([empty] * rank for _ in range(4))
        self.quadratic = np.zeros(rank)
        for i in range(rank):
            self.project(i)
            self.locate(i, self.null[i].T @ self.frame[:, i])

    def build(self, length_scale: float) -> Array:
        """Kernel matrix with its nugget, (size, size)."""
        if self.bessel and self.kernel in _SMOOTHNESS:
            matrix = _matern_bessel(_SMOOTHNESS[self.kernel], self.distance, length_scale)
        else:
            matrix = correlation(self.distance, self.kernel, length_scale).numpy()
        matrix[np.diag_indices_from(matrix)] += self.nugget
        return matrix

    def project(self, i: int) -> None:
        """Null space of the other columns, and the kernel and its inverse within it."""
        others = np.delete(self.frame, i, axis=1)
        self.null[i] = linalg.null_space(others.T) if others.size else np.eye(self.size)
        self.projected[i] = project(self.null[i], self.matrix[i])
        self.inverse[i] = _symmetric_inverse(self.projected[i])

    def locate(self, i: int, coordinates: Array) -> None:
        """Set column i by its coordinates, of unit length, in ``null[i]``."""
        self.coordinates[i] = coordinates
        self.quadratic[i] = coordinates @ self.inverse[i] @ coordinates


def project(null: Array, matrix: Array) -> Array:
    return null.T @ matrix @ null


def _symmetric_inverse(matrix: Array) -> Array:
    """Inverse through LU (getrf, getri), symmetrised: what Julia's ``inv(Hermitian)`` calls."""
    factor, pivots, _ = linalg.lapack.dgetrf(matrix)
    inverse, info = linalg.lapack.dgetri(factor, pivots)
    if info != 0:
        raise np.linalg.LinAlgError(
            "the kernel matrix is singular in the null space of the other columns; "
            "raise nugget or lower the upper bound of the length-scale"
        )
    return 0.5 * (inverse + inverse.T)


def cholesky(matrix: Array, what: str) -> Array:
    """Upper factor; the error says which matrix failed."""
    try:
        return linalg.cholesky(matrix, lower=False, check_finite=False)
    except np.linalg.LinAlgError as error:
        raise np.linalg.LinAlgError(
            f"{what} is not positive definite; raise nugget or lower the upper bound of the length-scale"
        ) from error


def make_side(
    name: str,
    frame: Array,
    distance: ArrayLike,
    kernel: str,
    length_scale: float | Sequence[float] | None,
    bounds: tuple[float, float] | None,
    *,
    nugget: float,
    bessel: bool,
    kind: type[Side] = Side,
) -> Side:
    """Check the inputs of one side and start it at ``frame``."""
    size, rank = frame.shape
    matrix = np.array(distance, dtype=float)
    if matrix.shape != (size, size) or not np.isfinite(matrix).all() or (matrix < 0).any():
        raise ProblemError(
            f"distance_{name} must be a finite, non-negative matrix of shape ({size}, {size}); got shape {matrix.shape}"
        )
    if kernel not in KERNELS or kernel == "periodic":
        known = ", ".join(k for k in KERNELS if k != "periodic")
        raise ProblemError(f"kernel_{name}={kernel!r} is unknown; choose one of {known}")
    if bounds is not None and not 0 <= bounds[0] < bounds[1] < np.inf:
        raise ProblemError(f"bounds_{name}={bounds}: the bounds must satisfy 0 <= lower < upper")
    if kernel == "identity":  # has no length-scale
        bounds, length_scale = None, 1.0
    if length_scale is None:
        if bounds is None:
            raise ProblemError(f"give length_scale_{name}, or bounds_{name} to learn it")
        length_scale = 0.5 * (bounds[0] + bounds[1])
    scales = np.array(np.broadcast_to(np.asarray(length_scale, dtype=float), (rank,)))
    low, high = bounds or (0.0, np.inf)
    if not ((scales > low) & (scales < high)).all():
        raise ProblemError(f"length_scale_{name}={scales.tolist()} must lie within ({low}, {high})")
    step = np.full(rank, 0.02 * (high - low) if bounds is not None else 0.0)
    return kind(
        frame=np.array(frame),
        distance=matrix,
        kernel=kernel,
        length_scale=scales,
        bounds=bounds,
        variance=np.ones(rank),
        step=step,
        nugget=nugget,
        bessel=bessel,
    )


def log_normal(value: Array, variance: float, matrix: Array) -> float:
    """Log density of Normal(0, variance * matrix) at ``value``, up to the constant that proposals share."""
    factor = cholesky(variance * matrix, "the kernel matrix of a proposed length-scale")
    white = linalg.solve_triangular(factor, value, trans=1)
    return float(-np.log(np.diag(factor)).sum() - 0.5 * white @ white)


def factorise(matrix: Array) -> None:
    """Inverse and determinant of a kernel as the published software computes them, each time it copies one."""
    for _ in range(2):
        lower, _info = linalg.lapack.dpotrf(matrix, lower=1)
        half, _info = linalg.lapack.dtrtri(lower, lower=1)
    half.T @ half
    linalg.lu_factor(matrix)
