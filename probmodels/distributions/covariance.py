"""Covariance kernels on points, on the sphere and in time, and their eigenpairs on a grid of length-scales.

A kernel k turns a distance d and a length-scale l into a correlation. With a nugget and positive weights w the
covariance of the n points is

    Omega = W^1/2 (K + nugget I) W^1/2,    K_ab = k(d_ab; l),    W = diag(w).

A method that learns l evaluates many such matrices. `eigen_grid` fixes a set of candidates beforehand and stores the
eigenpairs of all of them in one common orthonormal basis B (n, r), so that a density or a draw under any candidate
costs O(r^2) and no factorisation. B may leave out fixed effects (`complement`) and directions that carry next to no
variance under the roughest candidate (`tail`).

Distances must be Euclidean ones. On the sphere this means the chord through the Earth: a Matérn kernel smoother than
Matérn 1/2 is not positive definite in the great-circle distance.

References
----------
Rasmussen, C. E. and Williams, C. K. I. (2006). Gaussian Processes for Machine Learning, chapter 4.
Gneiting, T. (2013). Strictly and non-strictly positive definite functions on spheres. Bernoulli 19(4).
https://doi.org/10.3150/12-BEJSP06
Halko, N., Martinsson, P. G. and Tropp, J. A. (2011). Finding structure with randomness. SIAM Review 53(2).
https://doi.org/10.1137/090771806
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
from annotated_types import Interval, Len
from numpy.typing import ArrayLike
from torch import Tensor

from probmodels.distributions._spectra import Array, Complement, Restriction, common_basis, decompose
from probmodels.errors import CovarianceError
from probmodels.options import Count, NonNegative, OneOf, Positive, checked, hint

__all__ = [
    "KERNELS",
    "CovarianceError",
    "EigenGrid",
    "chordal_distance",
    "correlation",
    "eigen_grid",
    "euclidean_distance",
    "sphere_points",
    "time_distance",
]

_SECONDS = {
    "seconds": 1.0,
    "hours": 3600.0,
    "days": 86400.0,
    "months": 86400 * 365.2425 / 12,
    "years": 86400 * 365.2425,
}
_MAX_BYTES = 4 << 30


def _matern12(x: Tensor) -> Tensor:
    return torch.exp(-x)


def _matern32(x: Tensor) -> Tensor:
    s = math.sqrt(3) * x
    return (1 + s) * torch.exp(-s)


def _matern52(x: Tensor) -> Tensor:
    s = math.sqrt(5) * x
    return (1 + s + s * s / 3) * torch.exp(-s)


def _matern72(x: Tensor) -> Tensor:
    s = math.sqrt(7) * x
    return (1 + s * (1 + s * (0.4 + s / 15))) * torch.exp(-s)


def _squared_exponential(x: Tensor) -> Tensor:
    return torch.exp(-0.5 * x * x)


_PROFILES: dict[str, Callable[[Tensor], Tensor]] = {
    "matern12": _matern12,
    "matern32": _matern32,
    "matern52": _matern52,
    "matern72": _matern72,
    "squared_exponential": _squared_exponential,
    "exponential": _matern12,
}

KERNELS: tuple[str, ...] = (*_PROFILES, "periodic", "identity")
"""Names of the kernels. ``exponential`` is Matérn 1/2 (the usual name in time); ``periodic`` needs a period."""

Kernel = Annotated[str, OneOf(KERNELS)]


def _check_kernel(kernel: str) -> None:
    if kernel not in KERNELS:
        raise CovarianceError(f"unknown kernel {kernel!r}{hint(kernel, KERNELS)}")


def _check_period(period: float | None) -> float:
    if period is None or not (math.isfinite(period) and period > 0):
        raise CovarianceError(f"the periodic kernel needs a positive period in the unit of the distance; got {period}")
    return float(period)


def _check_labels(lat: Any, lon: Any) -> None:
    """Check that arrays of xarray or pandas that carry labels carry the same ones, in one order."""
    if not (hasattr(lat, "to_numpy") and hasattr(lon, "to_numpy")):
        return
    one, other = (getattr(values, "to_series", lambda values=values: values)().index for values in (lat, lon))
    if not any(isinstance(index, pd.RangeIndex) for index in (one, other)) and not one.equals(other):
        raise CovarianceError("lat and lon have other labels, or the same in another order; put both in one order")


def _finite(values: ArrayLike | Tensor, name: str, ndim: tuple[int, ...]) -> Array:
    array = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values, dtype=np.float64)
    if array.ndim not in ndim:
        raise CovarianceError(f"{name} has shape {array.shape}; expected {' or '.join(map(str, ndim))} dimension(s)")
    if array.size == 0:
        raise CovarianceError(f"{name} is empty")
    if not np.isfinite(array).all():
        where = np.argwhere(~np.isfinite(array))[0].tolist()
        raise CovarianceError(f"{name} holds a non-finite entry at index {where}; drop those points first")
    return array


# --------------------------------------------------------------------------------------------------------------------
# Distances


def euclidean_distance(points: ArrayLike | Tensor) -> Tensor:
    """Euclidean distances between points.

    Parameters
    ----------
    points
        Coordinates, shape (n, p), or (n,) for points on a line; finite.

    Returns
    -------
    Tensor
        Distances in the unit of the coordinates, shape (n, n), float64; zero diagonal, exactly symmetric.

    Raises
    ------
    CovarianceError
        If ``points`` is empty, not finite, or has more than two dimensions.
    """
    x = _finite(points, "points", (1, 2))
    x = x[:, None] if x.ndim == 1 else x
    squared = np.zeros((len(x), len(x)))
    for column in x.T:  # differences rather than Gram matrices: no cancellation between near points
        squared += (column[:, None] - column[None, :]) ** 2
    return torch.from_numpy(np.sqrt(squared))


@checked(CovarianceError)
def chordal_distance(lat: ArrayLike | Tensor, lon: ArrayLike | Tensor, radius: Positive = 6371.0) -> Tensor:
    """Straight-line distances through the Earth between points on it.

    The chord is the distance in which every kernel of this module is positive definite. Great-circle distances are
    not: in them Matérn kernels smoother than Matérn 1/2 and the squared exponential have negative eigenvalues
    (Gneiting 2013). Up to 3000 km the two differ by less than one per cent.

    Parameters
    ----------
    lat, lon
        Latitude and longitude in degrees, shape (n,); any longitude convention.
    radius
        Radius of the sphere; the default is the Earth's mean radius in km, which makes the result km.

    Returns
    -------
    Tensor
        Distances, shape (n, n), float64.

    Raises
    ------
    CovarianceError
        If the shapes or labels differ, an entry is not finite, a latitude lies outside [-90, 90] or the radius is not
        positive.
    """
    return euclidean_distance(sphere_points(lat, lon, radius))


@checked(CovarianceError)
def sphere_points(lat: ArrayLike | Tensor, lon: ArrayLike | Tensor, radius: Positive = 6371.0) -> Array:
    """Positions in space of points on the Earth, between which Euclidean distances are chords.

    Parameters
    ----------
    lat, lon, radius
        As for `chordal_distance`.

    Returns
    -------
    Array
        Shape (n, 3), in the unit of the radius.

    Raises
    ------
    CovarianceError
        As for `chordal_distance`.
    """
    _check_labels(lat, lon)
    phi, lam = _finite(lat, "lat", (1,)), _finite(lon, "lon", (1,))
    if phi.shape != lam.shape:
        raise CovarianceError(f"lat has {phi.size} points but lon has {lam.size}; pass one pair per point")
    if np.abs(phi).max() > 90:
        raise CovarianceError(f"latitude {phi[np.abs(phi).argmax()]} lies outside [-90, 90]; are lat and lon swapped?")
    phi, lam = np.deg2rad(phi), np.deg2rad(lam)
    return radius * np.stack([np.cos(phi) * np.cos(lam), np.cos(phi) * np.sin(lam), np.sin(phi)], 1)


@checked(CovarianceError)
def time_distance(times: Any, unit: Annotated[str, OneOf(_SECONDS)] = "years") -> Tensor:
    """Absolute differences between times.

    Parameters
    ----------
    times
        Shape (n,): numbers (their unit is kept and ``unit`` ignored), ``datetime64``, or datetime-like objects whose
        difference has ``total_seconds`` (datetime, cftime).
    unit
        Unit of the result for dates: years (of 365.2425 days), months, days, hours or seconds.

    Returns
    -------
    Tensor
        Differences, shape (n, n), float64.

    Raises
    ------
    CovarianceError
        If the unit is unknown, a time is missing, or ``times`` is not one-dimensional.
    """
    array = np.asarray(times.detach().cpu() if isinstance(times, Tensor) else times)
    if array.ndim == 1 and array.size and np.issubdtype(array.dtype, np.datetime64):
        if np.isnat(array).any():
            raise CovarianceError(f"times holds NaT at index {int(np.isnat(array).argmax())}; drop those steps first")
        array = (array - array[0]) / np.timedelta64(1, "us") / 1e6 / _SECONDS[unit]
    elif array.ndim == 1 and array.size and array.dtype == object and hasattr(array[0], "year"):
        array = np.array([(t - array[0]).total_seconds() for t in array]) / _SECONDS[unit]
    return euclidean_distance(_finite(array, "times", (1,)))


# --------------------------------------------------------------------------------------------------------------------
# Kernels


def correlation(
    distance: ArrayLike | Tensor, kernel: str, length_scale: float | Tensor, *, period: float | None = None
) -> Tensor:
    """Correlation at given distances.

    Matérn kernels are in the standard form of Rasmussen and Williams, a polynomial times exp(-sqrt(2 nu) d / l);
    squared exponential exp(-d^2 / 2 l^2); periodic exp(-2 sin^2(pi d / period) / l^2) with dimensionless l; identity
    one at distance zero, else zero.

    Parameters
    ----------
    distance
        Euclidean (on the sphere: chordal) distances of any shape.
    kernel
        One of `KERNELS`.
    length_scale
        Positive, in the unit of the distance (periodic: dimensionless; identity: ignored). A tensor broadcasts
        against ``distance`` and keeps its gradient.
    period
        Period of the periodic kernel, in the unit of the distance.

    Returns
    -------
    Tensor
        Correlations in the shape of ``distance``, float64.

    Raises
    ------
    CovarianceError
        For an unknown kernel, a length-scale that is not positive, or a missing period.
    """
    _check_kernel(kernel)
    d = torch.as_tensor(distance, dtype=torch.float64)
    if kernel == "identity":
        return (d == 0).to(torch.float64)
    scale = torch.as_tensor(length_scale, dtype=torch.float64, device=d.device)
    if not bool((scale > 0).all()) or not bool(torch.isfinite(scale).all()):
        raise CovarianceError(f"length_scale={length_scale} of kernel {kernel!r} must be positive and finite")
    if kernel == "periodic":
        return torch.exp(-2 * (torch.sin((math.pi / _check_period(period)) * d) / scale) ** 2)
    return _PROFILES[kernel](d / scale)


# --------------------------------------------------------------------------------------------------------------------
# Eigenpairs of a set of candidates


@dataclass(frozen=True)
class EigenGrid:
    """Eigenpairs of G candidate covariances of n points in one common orthonormal basis of rank r.

    Candidate g is ``basis @ vectors[g] @ diag(values[g]) @ vectors[g].T @ basis.T``.

    Attributes
    ----------
    basis
        Orthonormal columns, shape (n, r).
    values
        Eigenvalues, nugget and weights included, all positive, shape (G, r).
    vectors
        Eigenvectors in columns, in coordinates of the basis, shape (G, r, r); None where every candidate is diagonal
        in the basis. From `eigen_grid`, ``vectors[0]`` is the identity.
    length_scales
        Shape (G,); zero for the identity kernel, of which it is the limit.
    kernels
        Kernel of each candidate, length G.
    tail
        Largest share of variance (nugget apart) that the basis cuts off from any candidate; zero at full rank.
    """

    basis: Tensor
    values: Tensor
    vectors: Tensor | None
    length_scales: Tensor
    kernels: tuple[str, ...]
    tail: float

    @property
    def rank(self) -> int:
        """Number r of basis columns."""
        return self.basis.shape[1]

    @property
    def num_points(self) -> int:
        """Number n of points."""
        return self.basis.shape[0]

    @property
    def size(self) -> int:
        """Number G of candidates."""
        return self.values.shape[0]

    def select(self, index: int) -> EigenGrid:
        """The grid that holds candidate ``index`` alone, in the same basis."""
        if not -self.size <= index < self.size:
            raise CovarianceError(f"candidate {index} does not exist; the grid holds {self.size}")
        index %= self.size
        one = slice(index, index + 1)
        vectors = None if self.vectors is None else self.vectors[one]
        return EigenGrid(self.basis, self.values[one], vectors, self.length_scales[one], self.kernels[one], self.tail)

    def covariance(self, index: int) -> Tensor:
        """Candidate ``index`` in coordinates of the basis, shape (r, r)."""
        one = self.select(index)
        if one.vectors is None:
            return torch.diag(one.values[0])
        return (one.vectors[0] * one.values[0]) @ one.vectors[0].T


def _check_distance(distance: ArrayLike | Tensor) -> Array:
    d = _finite(distance, "distance", (1, 2))
    if d.ndim == 1 or d.shape[0] != d.shape[1]:
        raise CovarianceError(
            f"distance has shape {d.shape}; expected a square matrix: pass points through euclidean_distance, "
            "chordal_distance or time_distance first"
        )
    if d.min() < 0:
        raise CovarianceError(f"distance holds a negative entry ({d.min()})")
    if np.diagonal(d).any() or np.abs(d - d.T).max() > 1e-9 * max(d.max(), 1e-300):
        raise CovarianceError("distance must be symmetric with a zero diagonal")
    return d


def _default_length_scales(d: Array, kernel: str, num: int) -> Array:
    if kernel == "periodic":
        return np.geomspace(0.25, 4.0, num)
    positive = d[d > 0]
    if not positive.size:
        raise CovarianceError("no two points are apart, so there is no default length-scale; pass length_scales")
    nearest = np.where(d > 0, d, np.inf).min(1)
    upper = d.max() / 2
    return np.geomspace(min(float(np.median(nearest)), upper / 4), upper, num)


def _candidates(
    d: Array,
    kernels: tuple[str, ...],
    length_scales: Sequence[float] | ArrayLike | Tensor | Mapping[str, Sequence[float]] | None,
    num_length_scales: int,
) -> list[tuple[str, float]]:
    if len(set(kernels)) != len(kernels):
        raise CovarianceError(f"kernels={kernels} must name each kernel once")
    if isinstance(length_scales, Mapping) and (stray := set(length_scales) - set(kernels)):
        raise CovarianceError(f"length_scales given for {sorted(stray)}, not among kernels={kernels}")
    out: list[tuple[str, float]] = []
    for kernel in kernels:
        given = length_scales.get(kernel) if isinstance(length_scales, Mapping) else length_scales
        if kernel == "identity":
            out.append((kernel, 0.0))
            continue
        if given is None:
            scales = _default_length_scales(d, kernel, num_length_scales)
        else:
            scales = np.atleast_1d(_finite(given, f"length_scales of {kernel!r}", (0, 1)))
        if scales.min() <= 0:
            raise CovarianceError(f"length-scale {scales.min()} of kernel {kernel!r} must be positive")
        out += [(kernel, float(scale)) for scale in scales]
    return out


@checked(CovarianceError)
def eigen_grid(
    distance: ArrayLike | Tensor,
    *,
    kernels: Kernel | Annotated[Sequence[Kernel], Len(1)] = "matern72",
    length_scales: ArrayLike | Tensor | Mapping[str, Sequence[float]] | None = None,
    num_length_scales: Count = 24,
    nugget: NonNegative = 1e-6,
    weights: ArrayLike | Tensor | None = None,
    complement: ArrayLike | Tensor | None = None,
    tail: Annotated[float, Interval(ge=0, lt=1)] = 0.0,
    max_rank: Count | None = None,
    period: Positive | None = None,
) -> EigenGrid:
    """Eigenpairs of candidate covariances, one for each kernel and length-scale.

    Parameters
    ----------
    distance
        Euclidean distances of the n points, shape (n, n): from `chordal_distance`, `euclidean_distance` or
        `time_distance`.
    kernels
        One kernel or several, each once; the candidates of all are put in one grid, kernel by kernel.
    length_scales
        Length-scales of every kernel, or a mapping from kernel to its own; in the unit of the distance. Default:
        ``num_length_scales`` log-spaced values from the median distance to the nearest neighbour (at most an eighth
        of the largest distance) to half the largest distance; for the periodic kernel from 0.25 to 4.
    nugget
        Variance added to the diagonal of every correlation matrix but the identity's.
    weights
        Positive weights w, shape (n,): candidates become W^1/2 Omega W^1/2. Default: none.
    complement
        Columns, shape (n, q), linearly independent: basis and candidates are restricted to their orthogonal
        complement (the covariance of a draw from which the columns are regressed out).
    tail
        Share of variance that the basis may cut off from any candidate. Zero keeps full rank n - q. Otherwise the
        basis holds leading eigenvectors of the roughest candidate of each kernel.
    max_rank
        Upper bound of the rank, even where ``tail`` would need more.
    period
        Period of the periodic kernel, in the unit of the distance.

    Returns
    -------
    EigenGrid
        Float64 tensors on the CPU.

    Raises
    ------
    CovarianceError
        If the distances are not square, symmetric and finite, points coincide without a nugget, a kernel,
        length-scale, period, weight or tail is out of range, a candidate is not positive definite, or the result
        would not fit in memory.
    """
    d = _check_distance(distance)
    n = len(d)
    families = (kernels,) if isinstance(kernels, str) else tuple(kernels)
    candidates = _candidates(d, families, length_scales, num_length_scales)
    names = tuple(kernel for kernel, _ in candidates)
    if "periodic" in names:
        _check_period(period)
    if nugget == 0 and set(names) != {"identity"}:
        _check_distinct(d)
    root = None if weights is None else _root_weights(weights, n)
    space = Complement(None if complement is None else _finite(complement, "complement", (2,)), n)
    full = n - space.num_cut
    truncated = tail > 0 or (max_rank is not None and max_rank < full)
    if truncated and "identity" in names:
        raise CovarianceError(
            "the identity kernel spreads its variance evenly, so no basis can be truncated: use tail=0 and no max_rank"
        )

    if set(names) == {"identity"} and root is None:  # diagonal in any basis
        any_basis = torch.from_numpy(space.embed(np.eye(full)))
        ones, zero = torch.ones(1, full, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        return EigenGrid(any_basis, ones, None, zero, names, 0.0)

    def evaluate(distances: Array, kernel: str, scale: float) -> Array:
        return correlation(distances, kernel, scale, period=period).numpy()

    restriction = Restriction(d, evaluate, root, space, nugget)
    if truncated:
        basis, values, vectors, lost = _truncated(restriction, candidates, space, tail, min(max_rank or full, full))
    else:
        _check_size(len(candidates), full)
        first, values, vectors, lost = decompose(restriction, candidates, None)
        basis = space.embed(first)
    return EigenGrid(
        basis=torch.from_numpy(np.ascontiguousarray(basis)),
        values=torch.from_numpy(values),
        vectors=None if vectors is None else torch.from_numpy(vectors),
        length_scales=torch.tensor([scale for _, scale in candidates], dtype=torch.float64),
        kernels=names,
        tail=lost,
    )


def _check_distinct(distance: Array) -> None:
    """Check that no two points coincide."""
    apart = distance + np.eye(len(distance))
    if apart.min() == 0:
        a, b = np.argwhere(apart == 0)[0].tolist()
        raise CovarianceError(f"points {a} and {b} coincide: drop one of them or set a positive nugget")


def _root_weights(weights: ArrayLike | Tensor, n: int) -> Array:
    """Square roots of the weights, checked."""
    w = _finite(weights, "weights", (1,))
    if w.shape != (n,) or w.min() <= 0:
        raise CovarianceError(f"weights must be {n} positive numbers; got shape {w.shape}, smallest {w.min()}")
    return np.sqrt(w)


def _check_size(num_candidates: int, rank: int) -> None:
    """Check that the eigenvectors of all candidates fit into memory."""
    size = 8 * num_candidates * rank**2
    if size > _MAX_BYTES:
        raise CovarianceError(
            f"{num_candidates} candidates of rank {rank} would take {1e-9 * size:.1f} GB; truncate (tail or "
            "max_rank) or use fewer length-scales"
        )


def _truncated(
    restriction: Restriction, candidates: list[tuple[str, float]], space: Complement, tail: float, cap: int
) -> tuple[Array, Array, Array | None, float]:
    """Basis of at most ``cap`` directions, eigenpairs of all candidates in it, and the share of variance cut off."""
    target = tail
    while True:
        basis = space.embed(common_basis(restriction, candidates, target, cap))
        rank = basis.shape[1]
        _check_size(len(candidates), rank)
        first, values, vectors, lost = decompose(restriction, candidates, basis)
        if lost <= tail or rank == cap:
            return basis @ first, values, vectors, lost
        if target < 1e-3 * min(tail, np.finfo(float).eps):
            names = ", ".join(dict.fromkeys(name for name, _ in candidates))
            raise CovarianceError(
                f"a kernel of {names} is so nearly constant over these points that rounding hides what a basis leaves "
                f"out; shorten length-scales or period, or raise tail={tail:g}"
            )
        target /= 10  # a smoother candidate loses more than the roughest: rare, but the bound is promised for all
