"""Kernels and eigenpairs against closed forms and dense linear algebra."""

import math

import cftime
import numpy as np
import pytest
import scipy.linalg
import scipy.special
import torch

from probmodels.distributions import _spectra, covariance
from probmodels.distributions.covariance import (
    KERNELS,
    CovarianceError,
    chordal_distance,
    correlation,
    eigen_grid,
    euclidean_distance,
    time_distance,
)

RADIUS = 6371.0
STATIONARY = [k for k in KERNELS if k not in ("periodic", "identity")]


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def line(rng):
    """Distances of 40 irregular points on a line of length 10, shape (40, 40)."""
    return euclidean_distance(np.sort(rng.uniform(0, 10, 40)))


def on_the_sphere(rng, n):
    """Latitude and longitude in degrees of points spread evenly over the sphere, each shape (n,)."""
    return np.rad2deg(np.arcsin(rng.uniform(-1, 1, n))), rng.uniform(-180, 180, n)


def great_circle(lat, lon):
    """Haversine distances in km, shape (n, n)."""
    phi, lam = np.deg2rad(lat), np.deg2rad(lon)
    h = np.sin((phi[:, None] - phi) / 2) ** 2
    h = h + np.cos(phi[:, None]) * np.cos(phi) * np.sin((lam[:, None] - lam) / 2) ** 2
    return 2 * RADIUS * np.arcsin(np.sqrt(h.clip(0, 1)))


def dense(d, kernel, scale, nugget, weights=None, period=None):
    """W^1/2 (K + nugget I) W^1/2, shape (n, n), written out."""
    k = correlation(d, kernel, scale, period=period).numpy() + nugget * np.eye(len(d))
    root = np.ones(len(d)) if weights is None else np.sqrt(weights)
    return root[:, None] * k * root


def true_tail(d, grid, weights=None, complement=None, period=None):
    """Largest share of variance outside of the basis, by dense projections."""
    n = len(d)
    keep = np.eye(n)
    if complement is not None:
        q = np.linalg.qr(complement)[0]
        keep = keep - q @ q.T
    basis = grid.basis.numpy()
    shares = []
    for kernel, scale in zip(grid.kernels, grid.length_scales.tolist(), strict=True):
        k = dense(d, kernel, scale, 0.0, weights, period)
        shares.append(1 - np.trace(basis.T @ k @ basis) / np.trace(keep @ k))
    return max(shares)


# --------------------------------------------------------------------------------------------------------------------
# Distances


def test_chord_is_the_straight_line_under_the_great_circle(rng):
    lat, lon = on_the_sphere(rng, 50)
    expected = 2 * RADIUS * np.sin(great_circle(lat, lon) / (2 * RADIUS))
    # haversine loses half the digits near the antipode
    np.testing.assert_allclose(chordal_distance(lat, lon).numpy(), expected, atol=1e-3)


def test_chord_of_antipodes_and_of_longitude_conventions():
    d = chordal_distance([0.0, 0.0, 90.0, 90.0], [-10.0, 170.0, 0.0, 123.0])
    assert d[0, 1].item() == pytest.approx(2 * RADIUS)
    assert d[0, 2].item() == pytest.approx(RADIUS * math.sqrt(2))
    assert d[2, 3].item() == pytest.approx(0.0, abs=1e-9)  # one pole, two longitudes
    torch.testing.assert_close(chordal_distance([10, 20], [-10, 190]), chordal_distance([10, 20], [350, -170]))
    assert chordal_distance([0, 0], [0, 180], radius=1.0)[0, 1].item() == pytest.approx(2.0)


def test_euclidean_distance_is_symmetric_with_a_zero_diagonal(rng):
    points = rng.normal(size=(20, 3))
    d = euclidean_distance(points).numpy()
    np.testing.assert_allclose(d, np.linalg.norm(points[:, None] - points, axis=-1), rtol=1e-12)
    assert (d == d.T).all()
    assert (np.diag(d) == 0).all()


def test_time_distance_of_dates_numbers_and_model_calendars():
    days = np.array(["2000-01-01", "2000-01-02", "2001-01-01"], dtype="datetime64[D]")
    torch.testing.assert_close(time_distance(days, "days")[0], torch.tensor([0.0, 1.0, 366.0], dtype=torch.float64))
    assert time_distance(days)[0, 2].item() == pytest.approx(366 / 365.2425)
    assert time_distance(days.astype("datetime64[ns]"), "hours")[0, 1].item() == pytest.approx(24.0)
    model = np.array([cftime.Datetime360Day(2000, 2, 30), cftime.Datetime360Day(2001, 2, 30)])
    assert time_distance(model, "days")[0, 1].item() == pytest.approx(360.0)
    torch.testing.assert_close(time_distance([0, 2, 5]), euclidean_distance([0.0, 2.0, 5.0]))


# --------------------------------------------------------------------------------------------------------------------
# Kernels


@pytest.mark.parametrize(("kernel", "nu"), [("matern12", 0.5), ("matern32", 1.5), ("matern52", 2.5), ("matern72", 3.5)])
def test_matern_is_the_bessel_form(kernel, nu):
    d = np.linspace(0.01, 9, 50)
    s = math.sqrt(2 * nu) * d / 1.7
    bessel = 2 ** (1 - nu) / math.gamma(nu) * s**nu * scipy.special.kv(nu, s)
    np.testing.assert_allclose(correlation(d, kernel, 1.7).numpy(), bessel, rtol=1e-12)


def test_other_kernels_are_their_formulas():
    d = np.linspace(0, 3, 7)
    np.testing.assert_allclose(correlation(d, "squared_exponential", 0.8), np.exp(-0.5 * (d / 0.8) ** 2))
    np.testing.assert_allclose(correlation(d, "exponential", 0.8), np.exp(-d / 0.8))
    periodic = correlation(d, "periodic", 0.8, period=1.5)
    np.testing.assert_allclose(periodic, np.exp(-2 * np.sin(np.pi * d / 1.5) ** 2 / 0.64))
    np.testing.assert_allclose(periodic[[0, 3, 6]], 1.0)  # distances 0, 1.5 and 3 are whole periods
    np.testing.assert_array_equal(correlation(d, "identity", 1.0), d == 0)


def test_length_scale_keeps_its_gradient_and_broadcasts():
    scale = torch.tensor([0.5, 2.0], dtype=torch.float64, requires_grad=True)
    d = torch.linspace(0.1, 2, 5, dtype=torch.float64).unsqueeze(-1)
    assert torch.autograd.gradcheck(lambda s: correlation(d, "matern52", s), scale)


@pytest.mark.parametrize("kernel", STATIONARY)
@pytest.mark.parametrize("scale", [300.0, 3000.0, 15000.0])
def test_kernels_are_positive_definite_in_the_chord(rng, kernel, scale):
    k = correlation(chordal_distance(*on_the_sphere(rng, 300)), kernel, scale).numpy()
    values = np.linalg.eigvalsh(k)
    assert values[0] > -300 * np.finfo(float).eps * values[-1]  # rounding of the eigenvalues


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_are_positive_definite_in_time(rng, kernel):
    d = time_distance(np.sort(rng.uniform(0, 10, 100)))
    values = np.linalg.eigvalsh(correlation(d, kernel, 0.7, period=1.0).numpy())
    assert values[0] > -100 * np.finfo(float).eps * values[-1]


def test_smooth_matern_is_not_positive_definite_in_the_great_circle(rng):
    d = great_circle(*on_the_sphere(rng, 300))
    np.fill_diagonal(d, 0.0)
    with pytest.raises(CovarianceError, match="not great-circle"):
        eigen_grid((d + d.T) / 2, kernels="matern72", length_scales=[15000.0])


# --------------------------------------------------------------------------------------------------------------------
# Eigenpairs


@pytest.mark.parametrize("kernel", [*STATIONARY, "periodic", "identity"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("cut", [0, 2])
def test_full_rank_grid_reproduces_every_candidate(rng, line, kernel, weighted, cut):
    weights = rng.uniform(0.2, 1.0, 40) if weighted else None
    complement = np.stack([np.ones(40), np.arange(40.0)], 1) if cut else None
    grid = eigen_grid(
        line, kernels=kernel, length_scales=[0.5, 2.0], weights=weights, complement=complement, nugget=1e-4, period=1.5
    )
    basis = grid.basis.numpy()
    assert (grid.num_points, grid.rank) == (40, 40 - cut)
    assert grid.size == (1 if kernel == "identity" else 2)
    assert grid.tail == 0.0
    np.testing.assert_allclose(basis.T @ basis, np.eye(40 - cut), atol=1e-12)
    if cut:
        np.testing.assert_allclose(basis.T @ complement, 0.0, atol=1e-11)
    for g in range(grid.size):
        nugget = 0.0 if kernel == "identity" else 1e-4
        scale = grid.length_scales[g].item() if nugget else 1.0
        expected = basis.T @ dense(line, kernel, scale, nugget, weights, period=1.5) @ basis
        np.testing.assert_allclose(grid.covariance(g).numpy(), expected, atol=1e-12)
    assert (grid.values > 0).all()
    assert (grid.values[0].diff() <= 0).all()
    if grid.vectors is None:
        assert grid.size == 1
    else:
        torch.testing.assert_close(grid.vectors[0], torch.eye(40 - cut, dtype=torch.float64))
        torch.testing.assert_close(
            grid.vectors.mT @ grid.vectors, torch.eye(40 - cut, dtype=torch.float64).expand(2, -1, -1)
        )


def test_identity_is_diagonal_in_any_basis():
    d = euclidean_distance(np.zeros(6))  # the identity needs no distances, so that points may coincide
    plain = eigen_grid(d, kernels="identity")
    torch.testing.assert_close(plain.basis, torch.eye(6, dtype=torch.float64))
    assert plain.vectors is None
    torch.testing.assert_close(plain.values, torch.ones(1, 6, dtype=torch.float64))
    assert plain.length_scales.tolist() == [0.0]
    cut = eigen_grid(d, kernels="identity", complement=torch.ones(6, 1))
    assert cut.rank == 5
    torch.testing.assert_close(cut.basis.sum(0), torch.zeros(5, dtype=torch.float64))


def test_several_kernels_share_a_grid(line):
    grid = eigen_grid(
        line,
        kernels=["matern32", "periodic", "identity"],
        length_scales={"matern32": [1.0, 2.0], "periodic": [0.5]},
        period=2.0,
        nugget=1e-3,
    )
    assert grid.kernels == ("matern32", "matern32", "periodic", "identity")
    assert grid.length_scales.tolist() == [1.0, 2.0, 0.5, 0.0]
    torch.testing.assert_close(grid.covariance(3), torch.eye(40, dtype=torch.float64))
    torch.testing.assert_close(grid.select(-2).covariance(0), grid.covariance(2))
    torch.testing.assert_close(grid.select(1).basis, grid.basis)


def test_single_candidate_is_diagonal(line):
    grid = eigen_grid(line, length_scales=[2.0], tail=1e-4)
    assert grid.vectors is None
    expected = grid.basis.T @ torch.from_numpy(dense(line, "matern72", 2.0, 1e-6)) @ grid.basis
    torch.testing.assert_close(torch.diag(grid.values[0]), expected, atol=1e-12, rtol=0)


def test_default_length_scales_run_from_spacing_to_half_the_domain():
    d = euclidean_distance(np.arange(101.0))
    scales = eigen_grid(d, kernels="matern12").length_scales
    assert len(scales) == 24
    assert scales[0].item() == pytest.approx(1.0)
    assert scales[-1].item() == pytest.approx(50.0)
    torch.testing.assert_close(scales.log().diff(), scales.log().diff()[:1].expand(23))
    pair = eigen_grid(euclidean_distance([0.0, 8.0]), num_length_scales=3).length_scales
    assert pair.tolist() == pytest.approx([1.0, 2.0, 4.0])


@pytest.mark.parametrize("tail", [1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("kernels", ["matern72", ["squared_exponential", "matern72", "periodic"]])
def test_truncation_keeps_its_promise_for_every_candidate(rng, tail, kernels):
    d = euclidean_distance(np.sort(rng.uniform(0, 10, 120)))
    weights, complement = rng.uniform(0.5, 1.0, 120), np.ones((120, 1))
    grid = eigen_grid(
        d, kernels=kernels, length_scales=[1.0, 2.0, 4.0], weights=weights, complement=complement, tail=tail, period=3.0
    )
    share = true_tail(d, grid, weights, complement, period=3.0)
    assert share <= tail + 1e-12
    assert grid.tail == pytest.approx(share, abs=1e-12)
    assert grid.rank < 100
    np.testing.assert_allclose(grid.basis.T @ grid.basis, np.eye(grid.rank), atol=1e-12)
    np.testing.assert_allclose(grid.basis.sum(0), 0.0, atol=1e-11)
    for g in (0, grid.size - 1):
        candidate = dense(d, grid.kernels[g], grid.length_scales[g].item(), 1e-6, weights, 3.0)
        np.testing.assert_allclose(
            grid.covariance(g), grid.basis.T.numpy() @ candidate @ grid.basis.numpy(), atol=1e-11
        )


def test_truncation_is_no_longer_than_needed(line):
    share = np.linalg.eigvalsh(dense(line, "matern72", 1.0, 0.0))[::-1] / 40
    needed = int((1 - np.cumsum(share) > 1e-3).sum()) + 1
    assert eigen_grid(line, length_scales=[1.0, 3.0], tail=1e-3).rank == needed


def test_basis_that_fails_a_candidate_is_made_again_with_a_tighter_bound(line, monkeypatch):
    leading, tails = _spectra.leading_basis, []

    def clumsy(matrix, tail, max_rank):
        tails.append(tail)
        return leading(matrix, tail, max_rank)[:, 1 if len(tails) == 1 else 0 :]

    monkeypatch.setattr(_spectra, "leading_basis", clumsy)
    grid = eigen_grid(line, length_scales=[1.0, 3.0], tail=1e-3)
    assert tails == pytest.approx([1e-3, 1e-4])
    assert true_tail(line, grid) <= 1e-3


def test_max_rank_binds_and_is_reported(line):
    grid = eigen_grid(line, length_scales=[1.0, 3.0], max_rank=5, tail=1e-9)
    assert grid.rank == 5
    assert grid.tail == pytest.approx(true_tail(line, grid))
    assert grid.tail > 1e-3
    assert eigen_grid(line, length_scales=[1.0], max_rank=99).rank == 40


def test_randomised_route_agrees_with_the_dense_one(rng, monkeypatch):
    d = euclidean_distance(rng.uniform(0, 10, (900, 2)))
    weights, complement = rng.uniform(0.5, 1.0, 900), rng.normal(size=(900, 2))
    options = {"length_scales": [4.0, 8.0], "weights": weights, "complement": complement, "tail": 1e-5}
    exact = eigen_grid(d, **options)
    monkeypatch.setattr(_spectra, "_DENSE_LIMIT", 600)
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002 - that it is untouched
    fast = eigen_grid(d, **options)
    assert torch.equal(state, torch.get_rng_state())
    assert (numpy_state == np.random.get_state()[1]).all()  # noqa: NPY002
    assert torch.equal(fast.basis, eigen_grid(d, **options).basis)
    assert true_tail(d, fast, weights, complement) <= 1e-5
    assert exact.rank <= fast.rank <= 1.05 * exact.rank
    np.testing.assert_allclose(complement.T @ fast.basis.numpy(), 0.0, atol=1e-10)
    # leading eigenvalues carry all but 1e-5 of the trace, and agree far better than that
    np.testing.assert_allclose(fast.values[:, :20], exact.values[:, :20], rtol=1e-6)

    # both routes describe the same covariance between points, up to the tail
    def between(grid):
        return grid.basis @ grid.covariance(1) @ grid.basis.T

    assert (between(fast) - between(exact)).abs().max() < 1e-3 * between(exact).abs().max()


def test_randomised_route_with_max_rank_is_near_the_best_basis(rng, monkeypatch):
    d = euclidean_distance(rng.uniform(0, 10, (900, 2)))
    best = eigen_grid(d, length_scales=[3.0], max_rank=30).tail
    monkeypatch.setattr(_spectra, "_DENSE_LIMIT", 600)
    grid = eigen_grid(d, length_scales=[3.0], max_rank=30)
    assert grid.rank == 30
    assert grid.tail == pytest.approx(best, rel=0.02)


def test_rough_kernels_fall_back_to_the_dense_route(rng, monkeypatch):
    d = euclidean_distance(rng.uniform(0, 10, (700, 2)))
    monkeypatch.setattr(_spectra, "_DENSE_LIMIT", 600)
    grid = eigen_grid(d, kernels="matern12", length_scales=[1.0], tail=1e-2)
    assert grid.rank > 350
    assert true_tail(d, grid) <= 1e-2


# --------------------------------------------------------------------------------------------------------------------
# Errors

SQUARE = np.abs(np.subtract.outer(np.arange(5.0), np.arange(5.0)))


def with_nan():
    d = SQUARE.copy()
    d[1, 2] = np.nan
    return d


@pytest.mark.parametrize(
    ("distance", "options", "message"),
    [
        (with_nan(), {}, r"non-finite entry at index \[1, 2\]"),
        (np.zeros((4, 3)), {}, "expected a square matrix"),
        (np.zeros(4), {}, "euclidean_distance"),
        (np.empty((0, 0)), {}, "empty"),
        (-SQUARE, {}, "negative entry"),
        (np.triu(SQUARE), {}, "symmetric"),
        (SQUARE, {"kernels": "matern73"}, "did you mean 'matern72'"),
        (SQUARE, {"kernels": "none of them"}, "choose one of matern12"),
        (SQUARE, {"kernels": ["matern12", "matern12"]}, "each kernel once"),
        (SQUARE, {"kernels": []}, "at least 1"),
        (SQUARE, {"length_scales": [1.0, -2.0]}, "length-scale -2.0 of kernel 'matern72' must be positive"),
        (SQUARE, {"length_scales": [1.0, np.inf]}, "non-finite"),
        (SQUARE, {"length_scales": {"matern12": [1.0]}}, "not among kernels"),
        (SQUARE, {"num_length_scales": 0}, "num_length_scales=0"),
        (SQUARE, {"kernels": "periodic"}, "needs a positive period"),
        (SQUARE, {"kernels": "periodic", "period": -1.0}, "period=-1.0; give a number above 0"),
        (SQUARE, {"nugget": -1.0}, "nugget=-1.0"),
        (SQUARE, {"tail": 1.0}, "tail=1.0"),
        (SQUARE, {"max_rank": 0}, "max_rank=0"),
        (SQUARE, {"kernels": "identity", "tail": 1e-6}, "identity kernel spreads"),
        (SQUARE, {"kernels": ["matern12", "identity"], "max_rank": 2}, "identity kernel spreads"),
        (np.zeros((3, 3)), {}, "no two points are apart"),
        (euclidean_distance([0.0, 1.0, 1.0]), {"nugget": 0.0}, "points 1 and 2 coincide"),
        (SQUARE, {"length_scales": [1e4], "nugget": 0.0}, "not positive definite"),
        (SQUARE, {"length_scales": [1e10], "tail": 1e-6, "complement": np.ones((5, 1))}, "constant over these points"),
        (SQUARE, {"length_scales": [1e30], "tail": 1e-6, "complement": np.ones((5, 1))}, "constant over these points"),
        (
            SQUARE,
            {"kernels": "periodic", "period": 1e9, "tail": 1e-6, "complement": np.ones((5, 1))},
            "constant over these points",
        ),
        (SQUARE, {"weights": np.ones(4)}, "5 positive numbers"),
        (SQUARE, {"weights": np.array([1, 1, 0, 1, 1])}, "5 positive numbers"),
        (SQUARE, {"complement": np.ones((4, 1))}, r"expected \(5, q\)"),
        (SQUARE, {"complement": np.ones((5, 2))}, "linearly dependent"),
        (SQUARE, {"complement": np.zeros((5, 1))}, "linearly dependent"),
        (SQUARE, {"complement": np.eye(5)}, "q < 5"),
    ],
)
def test_bad_input_is_named(distance, options, message):
    with pytest.raises(CovarianceError, match=message):
        eigen_grid(distance, **options)


def test_a_grid_too_large_for_memory_is_refused(monkeypatch):
    monkeypatch.setattr(covariance, "_MAX_BYTES", 1000)
    with pytest.raises(CovarianceError, match="truncate"):
        eigen_grid(SQUARE, length_scales=[1.0] * 9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: chordal_distance([0, 100], [0, 0]), "are lat and lon swapped"),
        (lambda: chordal_distance([0, 1], [0]), "one pair per point"),
        (lambda: chordal_distance([0, np.nan], [0, 0]), "non-finite"),
        (lambda: chordal_distance([0], [0], radius=0.0), "radius"),
        (lambda: euclidean_distance(np.zeros((2, 2, 2))), "dimension"),
        (lambda: time_distance(np.array(["2000-01-01", "NaT"], dtype="datetime64[D]")), "NaT at index 1"),
        (lambda: time_distance([0, 1], "weeks"), "unit='weeks'; choose one of"),
        (lambda: correlation([1.0], "matern12", 0.0), "must be positive"),
        (lambda: correlation([1.0], "matern12", math.nan), "must be positive"),
        (lambda: eigen_grid(SQUARE).select(24), "candidate 24 does not exist"),
    ],
)
def test_bad_arguments_of_helpers_are_named(call, message):
    with pytest.raises(CovarianceError, match=message):
        call()
