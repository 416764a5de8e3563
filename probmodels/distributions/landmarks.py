"""Smooth functions on many points, and covariances in terms of them, without a matrix of all distances.

`LandmarkBasis` spreads landmarks over the points and takes the leading eigenvectors of a Matérn 7/2 correlation there,
smooth ones first. Functions at all points follow by kriging (Nyström's extension) and are made orthonormal. A Gaussian
process enters as the distribution of the coefficients that fit its values at the landmarks. Where every point is a
landmark, all of this is exact; else cost and memory grow with the number of points alone, not with its square.

NumPy arrays throughout, float64.

References
----------
Williams, C. K. I. and Seeger, M. (2001). Using the Nyström method to speed up kernel machines. NeurIPS 13.
Eldar, Y. et al. (1997). The farthest point strategy for progressive image sampling. IEEE Trans. Image Process. 6(9).
https://doi.org/10.1109/83.623193
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.linalg
import torch
from scipy.spatial import cKDTree
from scipy.spatial.distance import cdist

from probmodels.distributions._spectra import Array
from probmodels.distributions.covariance import EigenGrid, correlation
from probmodels.errors import CovarianceError

__all__ = ["LandmarkBasis", "num_landmarks", "spread_landmarks"]

_ROWS = 4096  # points extended at a time
_PER_FUNCTION = 2.5  # landmarks for each function, where there are points enough: fewer would alias
_LEAST = 1500  # landmarks
_SPACINGS = 3.0  # length-scale that makes the functions, in distances between landmarks
_ROUNDING = 1e-11  # of the largest eigenvalue; functions below are rounding error where they are extended


def num_landmarks(num_functions: int) -> int:
    """Landmarks for so many functions, where there are points enough."""
    return max(_LEAST, int(_PER_FUNCTION * num_functions))


def spread_landmarks(points: Array, num: int) -> np.ndarray:
    """Indices of ``num`` points that cover the set (n, p) evenly: each the farthest from those before it."""
    shaken = 0.2 * _median_nearest(points) * np.random.default_rng(0).standard_normal(points.shape)
    points = points + shaken  # on a lattice many are equally far, and would be taken from one end to the other
    chosen = np.empty(num, dtype=np.int64)
    chosen[0] = int(np.argmin(((points - points.mean(0)) ** 2).sum(1)))
    nearest = ((points - points[chosen[0]]) ** 2).sum(1)
    for i in range(1, num):
        chosen[i] = int(np.argmax(nearest))
        np.minimum(nearest, ((points - points[chosen[i]]) ** 2).sum(1), out=nearest)
    return np.sort(chosen)


class LandmarkBasis:
    """Orthonormal functions on points, from smooth to rough.

    Parameters
    ----------
    points
        Coordinates (n, p) in which distances are Euclidean.
    weights
        Positive weights (n,): a draw of a covariance is multiplied by their roots.
    num_functions
        Most functions.

    Attributes
    ----------
    functions
        Orthonormal columns, shape (n, r), r at most ``num_functions``.
    spacing
        Median distance of a point to its nearest neighbour.
    extent
        Largest distance between landmarks.
    """

    def __init__(self, points: Array, weights: Array, num_functions: int) -> None:
        n = len(points)
        num = min(n, num_landmarks(num_functions))
        self._chosen = np.arange(n) if num == n else spread_landmarks(points, num)
        marks = points[self._chosen]
        self._distance = cdist(marks, marks)
        self.extent = float(self._distance.max())
        self.spacing = _median_nearest(points)
        if not self.spacing > 0:
            raise CovarianceError("points coincide; drop the repeated ones")
        self.weights = weights
        self._root = np.sqrt(weights)
        scale = _SPACINGS * _median_nearest(marks)
        values, vectors = scipy.linalg.eigh(_matern(self._distance, scale), driver="evd")
        values, vectors = values[::-1][:num_functions], vectors[:, ::-1][:, :num_functions]
        if num == n:
            functions = vectors
        else:
            kept = values > _ROUNDING * values[0]
            extend = vectors[:, kept] / values[kept]
            functions = np.empty((n, extend.shape[1]))
            for start in range(0, n, _ROWS):
                rows = slice(start, start + _ROWS)
                functions[rows] = _matern(cdist(points[rows], marks), scale) @ extend
        self.functions: Array = np.linalg.qr(self._root[:, None] * functions)[0]
        # The least-squares fit of the first r functions to values at the landmarks is R_r^-1 Q_r', with leading blocks.
        self._fit, self._triangle = np.linalg.qr(self.functions[self._chosen])
        self._noise = self.functions.T @ (weights[:, None] * self.functions)

    def _fitted(self, kernel: str, scale: float, rank: int | None = None) -> Array:
        """Covariance of the fit of the first functions to a process at the landmarks, where they are orthonormal."""
        half = self._fit[:, :rank].T * self._root[self._chosen]
        return half @ (correlation(self._distance, kernel, scale).numpy() @ half.T)

    def covariance(self, kernel: str, scale: float, rank: int | None = None) -> Array:
        """Covariance (rank, rank) of the coefficients of a Gaussian process, without nugget."""
        triangle = self._triangle[:rank, :rank]
        half = scipy.linalg.solve_triangular(triangle, self._fitted(kernel, scale, rank))
        return scipy.linalg.solve_triangular(triangle, half.T)

    def lost(self, kernel: str, scale: float) -> Array:
        """Share of the variance of a process that the first 1, 2, ..., r functions leave out, shape (r,)."""
        inside = np.cumsum(np.diagonal(self._fitted(kernel, scale)))
        return np.maximum(1 - inside / self.weights[self._chosen].sum(), 0.0)

    def grid(self, candidates: Sequence[tuple[str, float]], nugget: float, rank: int, tail: float) -> EigenGrid:
        """Eigenpairs of candidate covariances, by kernel and length-scale, in the first ``rank`` functions."""
        values = np.empty((len(candidates), rank))
        vectors = np.empty((len(candidates), rank, rank))
        for g, (kernel, scale) in enumerate(candidates):
            matrix = self.covariance(kernel, scale, rank)
            ascending, columns = scipy.linalg.eigh(matrix + nugget * self._noise[:rank, :rank], driver="evd")
            if not ascending[0] > rank * np.finfo(float).eps * ascending[-1]:
                raise CovarianceError(
                    f"kernel {kernel!r} with length-scale {scale:.6g} is not positive definite (eigenvalues "
                    f"{ascending[0]:.3g} to {ascending[-1]:.3g}): raise the nugget"
                )
            values[g], vectors[g] = ascending[::-1], columns[:, ::-1]
        first = vectors[0].copy()
        vectors = first.T @ vectors
        vectors[0] = np.eye(rank)
        return EigenGrid(
            basis=torch.from_numpy(np.ascontiguousarray(self.functions[:, :rank] @ first)),
            values=torch.from_numpy(values),
            vectors=torch.from_numpy(vectors) if len(candidates) > 1 else None,
            length_scales=torch.tensor([scale for _, scale in candidates], dtype=torch.float64),
            kernels=tuple(kernel for kernel, _ in candidates),
            tail=tail,
        )


def _matern(distance: Array, scale: float) -> Array:
    return correlation(distance, "matern72", scale).numpy()


def _median_nearest(points: Array) -> float:
    """Median distance of a point to its nearest neighbour."""
    return float(np.median(cKDTree(points).query(points, k=2)[0][:, 1]))
