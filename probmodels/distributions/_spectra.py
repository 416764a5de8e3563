"""Linear algebra of `probmodels.distributions.covariance`: complements, leading eigenvectors, matrices that are
never formed whole.

NumPy arrays throughout, float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from probmodels.errors import CovarianceError

__all__ = ["Array", "Complement", "Restriction", "common_basis", "decompose", "leading_basis"]

_DENSE_LIMIT = 1500  # up to this size one dense eigendecomposition is cheaper than a randomised one
_ROWS = 128  # of a kernel matrix evaluated at a time

Array = NDArray[np.float64]


class Complement:
    """The orthogonal complement of given columns, as the trailing columns of a product of Householder reflections.

    Applying q reflections costs O(n^2 q), where products with an explicit basis would cost O(n^3).
    """

    def __init__(self, columns: Array | None, n: int) -> None:
        self.num_cut = 0
        self.num_points = n
        if columns is None:
            return
        if columns.shape[0] != n or columns.shape[1] >= n:
            raise CovarianceError(f"complement has shape {columns.shape}; expected ({n}, q) with q < {n}")
        norms = np.linalg.norm(columns, axis=0)
        (self._reflections, self._tau), triangle = scipy.linalg.qr(columns / np.where(norms > 0, norms, 1), mode="raw")
        if np.abs(np.diag(triangle)).min() < 1e-10:
            raise CovarianceError(
                "the columns of complement are linearly dependent; drop the redundant ones (a constant covariate "
                "beside an intercept, for example)"
            )
        self.num_cut = columns.shape[1]

    def _reflect(self, matrix: Array, transpose: bool) -> Array:
        a, trans = np.asfortranarray(matrix), b"T" if transpose else b"N"
        _, work, _ = scipy.linalg.lapack.dormqr(b"L", trans, self._reflections, self._tau, a, lwork=-1)
        out, _, _ = scipy.linalg.lapack.dormqr(b"L", trans, self._reflections, self._tau, a, lwork=int(work[0]))
        return out

    def restrict(self, matrix: Array) -> Array:
        """Q'MQ of a symmetric matrix, shape (n - q, n - q)."""
        if not self.num_cut:
            return matrix
        half = self._reflect(matrix, True)[self.num_cut :].T
        return np.ascontiguousarray(self._reflect(half, True)[self.num_cut :])

    def embed(self, vectors: Array) -> Array:
        """Q times vectors, shape (n, r)."""
        if not self.num_cut:
            return vectors
        return self._reflect(np.concatenate([np.zeros((self.num_cut, vectors.shape[1])), vectors]), False)

    def cut_columns(self) -> Array:
        """Orthonormal basis of the columns that are cut, shape (n, q)."""
        return (
            self._reflect(np.eye(self.num_points, self.num_cut), False)
            if self.num_cut
            else np.empty((self.num_points, 0))
        )


class Restriction:
    """Candidates Q'W^1/2 (K + nugget I) W^1/2 Q, whole or projected on a basis; kernels are evaluated row by row.

    Rows come in blocks that stay in the processor's cache: temporaries of n x n numbers would cost more time than the
    arithmetic.
    """

    def __init__(
        self,
        distance: Array,
        evaluate: Callable[[Array, str, float], Array],
        root: Array | None,
        space: Complement,
        nugget: float,
    ) -> None:
        self.distance = distance
        self.evaluate = evaluate  # correlations of given distances, by kernel and length-scale
        self.root = root  # square roots of the weights
        self.space = space
        self.nugget = nugget

    def _blocks(self, kernel: str, scale: float, upper: bool) -> Iterator[tuple[slice, Array]]:
        """Blocks of rows of K; with ``upper`` only their columns from the diagonal on."""
        n = len(self.distance)
        for start in range(0, n, _ROWS):
            rows = slice(start, min(start + _ROWS, n))
            yield rows, self.evaluate(self.distance[rows, start if upper else 0 :], kernel, scale)

    def whole(self, kernel: str, scale: float) -> Array:
        """Candidate without nugget, shape (n - q, n - q)."""
        n = len(self.distance)
        if kernel == "identity":
            k = np.eye(n)
        else:
            k = np.empty((n, n))
            for rows, block in self._blocks(kernel, scale, False):
                k[rows] = block
        if self.root is not None:
            k *= self.root[:, None]
            k *= self.root
        return self.space.restrict(k)

    def whole_noise(self) -> Array:
        """What the nugget adds to a whole candidate, shape (n - q, n - q)."""
        if self.root is None:
            return self.nugget * np.eye(len(self.distance) - self.space.num_cut)
        return self.space.restrict(np.diag(self.nugget * self.root**2))

    def projected(self, kernel: str, scale: float, basis: Array) -> tuple[Array, float]:
        """Candidate without nugget on a basis (n, r) in the complement, shape (r, r), and its share outside of it."""
        columns = np.concatenate([basis, self.space.cut_columns()], 1)
        if self.root is not None:
            columns *= self.root[:, None]
        half = np.zeros((columns.shape[1],) * 2)
        for rows, block in self._blocks(kernel, scale, True):  # K is symmetric: half of it is enough
            width = rows.stop - rows.start
            block[:, :width] *= 0.5
            half += columns[rows].T @ (block @ columns[rows.start :])
        full = half + half.T
        rank = basis.shape[1]
        left = self.total - float(np.trace(full[rank:, rank:]))
        self.check(kernel, scale, left)
        return full[:rank, :rank], max(0.0, 1 - float(np.trace(full[:rank, :rank])) / left)

    @property
    def total(self) -> float:
        """Variance of a candidate over all points, nugget apart."""
        return float(len(self.distance)) if self.root is None else float((self.root**2).sum())

    def check(self, kernel: str, scale: float, variance: float) -> None:
        """Check that a candidate has variance left in the complement."""
        if not variance > 1e-14 * self.total:
            raise CovarianceError(
                f"kernel {kernel!r} with length-scale {scale:.6g} is constant over these points to working precision; "
                "shorten the length-scale, or the period"
            )

    def projected_noise(self, basis: Array) -> Array:
        """What the nugget adds to a candidate on a basis (n, r), shape (r, r)."""
        if self.root is None:
            return self.nugget * np.eye(basis.shape[1])
        return self.nugget * (basis.T @ (self.root[:, None] ** 2 * basis))


def leading_basis(matrix: Array, tail: float, max_rank: int) -> Array:
    """Leading eigenvectors that leave out at most ``tail`` of the trace, at most ``max_rank``, shape (n, r)."""
    n = len(matrix)
    trace = np.trace(matrix)

    def cut(values: NDArray[Any], vectors: Array) -> Array | None:
        """The shortest sufficient leading part of descending Ritz pairs; None where all of them do not suffice."""
        enough = np.flatnonzero(1 - np.cumsum(values) / trace <= tail)
        if not enough.size and values.size < max_rank:
            return None
        return vectors[:, : min(int(enough[0]) + 1 if enough.size else max_rank, max_rank)]

    rng = np.random.default_rng(0)  # of our own: the result is a function of the arguments
    block = n
    if n > _DENSE_LIMIT:
        # The spectrum of a kernel matrix over its size converges as points fill the domain, so a sample tells the rank.
        some = np.sort(rng.choice(n, 600, replace=False))
        values = np.linalg.eigvalsh(matrix[np.ix_(some, some)])[::-1]
        block = min(int((1 - np.cumsum(values) / values.sum() > tail).sum() * 1.25) + 20, max_rank + 20)
    start = rng.standard_normal((n, 0))
    while block < n // 2:
        start = np.concatenate([start, rng.standard_normal((n, block - start.shape[1]))], 1)
        for _ in range(2):
            start = np.linalg.qr(matrix @ start)[0]
        values, vectors = np.linalg.eigh(start.T @ (matrix @ start))
        start = start @ vectors[:, ::-1]
        basis = cut(values[::-1], start)
        if basis is not None:
            return basis
        block = int(1.5 * block)
    values, vectors = scipy.linalg.eigh(matrix)
    basis = cut(values[::-1], vectors[:, ::-1])
    return vectors[:, ::-1] if basis is None else basis  # None: rounding alone keeps the share above the tail


def decompose(
    restriction: Restriction, candidates: list[tuple[str, float]], basis: Array | None
) -> tuple[Array, Array, Array | None, float]:
    """Eigenvectors of the first candidate, eigenpairs of all in terms of them, and the largest share cut off."""
    noise = restriction.whole_noise() if basis is None else restriction.projected_noise(basis)
    num, rank = len(candidates), len(noise)
    values = np.empty((num, rank))
    vectors = np.empty((num, rank, rank)) if num > 1 else None
    first = np.empty(0)
    lost = 0.0
    for g, (kernel, scale) in enumerate(candidates):
        if basis is None:
            matrix, cut = restriction.whole(kernel, scale), 0.0
        else:
            matrix, cut = restriction.projected(kernel, scale, basis)
        lost = max(lost, cut)
        ascending, columns = scipy.linalg.eigh(matrix if kernel == "identity" else matrix + noise, driver="evd")
        if not ascending[0] > rank * np.finfo(float).eps * ascending[-1]:
            raise CovarianceError(
                f"kernel {kernel!r} with length-scale {scale:.6g} is not positive definite (eigenvalues "
                f"{ascending[0]:.3g} to {ascending[-1]:.3g}): raise the nugget, truncate with tail, or check that "
                "the distances are Euclidean (on the sphere chordal, not great-circle)"
            )
        values[g], columns = ascending[::-1], columns[:, ::-1]
        if g == 0:
            first = columns
        if vectors is not None:
            vectors[g] = np.eye(rank) if g == 0 else first.T @ columns
    return first, values, vectors, lost


def common_basis(restriction: Restriction, candidates: list[tuple[str, float]], tail: float, max_rank: int) -> Array:
    """Basis (n - q, r) that cuts at most ``tail`` off the roughest candidate of each kernel: that of their mean.

    What the basis cuts off a member of a mean of F matrices of equal trace is at most F times what it cuts off the
    mean, which makes the bound hold for the members.
    """
    roughest: dict[str, float] = {}
    for kernel, scale in candidates:
        roughest[kernel] = min(scale, roughest.get(kernel, math.inf))
    mean: Array | None = None
    for kernel, scale in roughest.items():
        matrix = restriction.whole(kernel, scale)
        restriction.check(kernel, scale, float(np.trace(matrix)))
        matrix /= np.trace(matrix)
        mean = matrix if mean is None else mean + matrix
    assert mean is not None  # there is at least one kernel
    return leading_basis(mean, tail / len(roughest), max_rank)
