"""Smooth functions from landmarks against matrices of all distances."""

from __future__ import annotations

import numpy as np
import pytest

from probmodels.distributions.covariance import correlation, euclidean_distance
from probmodels.distributions.landmarks import LandmarkBasis, spread_landmarks
from probmodels.errors import CovarianceError


def plane(nx: int, ny: int) -> np.ndarray:
    x, y = np.meshgrid(np.arange(nx), np.arange(ny), indexing="ij")
    return np.stack([x.ravel(), y.ravel()], 1).astype(float)


def exact(basis: LandmarkBasis, points: np.ndarray, kernel: str, scale: float) -> np.ndarray:
    root = np.sqrt(basis.weights)
    whole = root[:, None] * correlation(euclidean_distance(points), kernel, scale).numpy() * root
    return basis.functions.T @ whole @ basis.functions


@pytest.mark.parametrize("kernel", ["matern12", "matern72", "squared_exponential"])
def test_where_every_point_is_a_landmark_covariances_are_exact(kernel):
    points = plane(20, 15)
    weights = np.random.default_rng(0).uniform(0.5, 1.5, 300)
    basis = LandmarkBasis(points, weights, 120)
    whole = exact(basis, points, kernel, 4.0)
    np.testing.assert_allclose(basis.functions.T @ basis.functions, np.eye(120), atol=1e-12)
    np.testing.assert_allclose(basis.covariance(kernel, 4.0), whole, atol=1e-10)
    np.testing.assert_allclose(basis.lost(kernel, 4.0), 1 - np.cumsum(np.diagonal(whole)) / weights.sum(), atol=1e-12)
    grid = basis.grid([(kernel, 4.0), (kernel, 8.0)], 1e-6, 40, 0.0)
    noise = 1e-6 * grid.basis.numpy().T @ (weights[:, None] * grid.basis.numpy())
    for g, scale in enumerate((4.0, 8.0)):
        inside = basis.functions[:, :40].T @ grid.basis.numpy()
        wanted = inside.T @ exact(basis, points, kernel, scale)[:40, :40] @ inside + noise
        np.testing.assert_allclose(grid.covariance(g).numpy(), wanted, atol=1e-9)


def test_more_points_than_landmarks_have_nearly_the_covariances_of_all_distances():
    points = plane(60, 40)  # 2400, of which 1500 are landmarks
    weights = np.ones(2400)
    basis = LandmarkBasis(points, weights, 200)
    whole, found = exact(basis, points, "matern72", 6.0), basis.covariance("matern72", 6.0)
    assert np.abs(found - whole).max() < 2e-3 * np.abs(whole).max()
    lost = 1 - np.cumsum(np.diagonal(whole)) / 2400
    np.testing.assert_allclose(basis.lost("matern72", 6.0)[[20, 60, 150]], lost[[20, 60, 150]], rtol=0.3)
    eigenvalues = [np.linalg.eigvalsh(matrix)[-100:] for matrix in (found, whole)]
    np.testing.assert_allclose(*eigenvalues, rtol=0.03)


def test_functions_go_from_smooth_to_rough():
    basis = LandmarkBasis(plane(30, 1), np.ones(30), 10)
    changes = (np.diff(np.sign(basis.functions), axis=0) != 0).sum(0)
    np.testing.assert_array_equal(changes, np.arange(10))


def test_landmarks_cover_the_points():
    points = np.random.default_rng(1).random((2000, 2)) ** 2  # crowded in a corner
    chosen = spread_landmarks(points, 100)
    assert len(set(chosen.tolist())) == 100
    nearest = np.sqrt(((points[:, None] - points[chosen]) ** 2).sum(-1)).min(1)
    apart = np.sqrt(((points[chosen][:, None] - points[chosen]) ** 2).sum(-1)) + 9 * np.eye(100)
    assert nearest.max() <= 1.2 * apart.min()


def test_landmarks_on_a_lattice_are_as_dense_at_one_end_as_at_the_other():
    chosen = plane(60, 40)[spread_landmarks(plane(60, 40), 1500)]
    shares = np.histogram(chosen[:, 0], bins=6, range=(-0.5, 59.5))[0] / 400
    np.testing.assert_allclose(shares, 1500 / 2400, atol=0.05)


def test_points_that_coincide_are_refused():
    with pytest.raises(CovarianceError, match="coincide"):
        LandmarkBasis(np.zeros((30, 2)), np.ones(30), 10)
