"""The published conditionals against brute force, and the proof that they form no joint density.

Where a tolerance is in standard errors, four of them are allowed: with some sixty comparisons at fixed seeds a false
alarm would come once in two hundred suites.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from probmodels.bayesian_svd.published.fast import FastPublishedGibbs
from probmodels.bayesian_svd.published.sampler import PublishedGibbs
from probmodels.distributions import covariance
from probmodels.errors import ProblemError


def line(size, end=1.0):
    x = np.linspace(0.0, end, size)
    return np.abs(x[:, None] - x[None])


def correlation(name, distance, length_scale):
    return covariance.correlation(distance, name, length_scale).numpy()


def low_rank(n, m, d, noise, seed):
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.standard_normal((size, len(d))))[0] for size in (n, m))
    return (left * np.asarray(d)) @ right.T + noise * rng.standard_normal((n, m))


PORTS = pytest.mark.parametrize("port", [PublishedGibbs, FastPublishedGibbs], ids=["plain", "fast"])


def make(n=12, m=9, rank=3, port=PublishedGibbs, **config):
    settings = {
        "kernel_space": "matern32",
        "kernel_time": "matern12",
        "bounds_space": (0.0, 2.0),
        "bounds_time": (0.0, 2.0),
    }
    z = low_rank(n, m, [6.0, 4.0, 2.0], 0.3, seed=1)
    return port(z, line(n), line(m), rank, **{**settings, **config})


def standard_error(draws):
    """Standard error of a mean of correlated draws (num, ...), from 50 batch means."""
    batches = draws[: len(draws) // 50 * 50].reshape(50, -1, *draws.shape[1:]).mean(1)
    return batches.std(0, ddof=1) / np.sqrt(50)


def assert_means_agree(draws, expected, errors=4.0, floor=0.0):
    draws = np.asarray(draws)
    z = np.abs(draws.mean(0) - expected) / (standard_error(draws) + floor)
    assert np.max(z) < errors, f"largest deviation {np.max(z):.1f} standard errors"


# -- kernels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["matern12", "matern32", "matern52", "matern72"])
def test_bessel_form_is_the_closed_form(name):
    closed, bessel = (make(kernel_space=name, bessel=bessel).sides["space"].build(0.7) for bessel in (False, True))
    np.testing.assert_allclose(closed, bessel, rtol=1e-10, atol=1e-14)


# -- protocol ---------------------------------------------------------------------------------------------------------


def sweeps(kernel, count):
    return [kernel.sample(kernel.initial_params) for _ in range(count)]


@PORTS
@pytest.mark.parametrize("shape", [(5,), (2,)], ids=["shared", "per location"])
def test_shapes_and_orthonormal_frames(shape, port):
    rng = np.random.default_rng(0)
    covariates = rng.standard_normal((9, 2)) if shape == (2,) else rng.standard_normal((12, 9, 5))
    kernel = make(covariates=covariates, port=port)
    kernel.setup(20)
    params = sweeps(kernel, 30)[-1]
    assert {name: tuple(value.shape) for name, value in params.items()} == {
        "U": (12, 3),
        "V": (9, 3),
        "d": (3,),
        "sigma": (),
        "length_scale_space": (3,),
        "length_scale_time": (3,),
        "beta": (12, 2) if shape == (2,) else (5,),
    }
    for site in ("U", "V"):
        frame = params[site]
        assert frame.dtype == torch.float64
        assert (frame.T @ frame - torch.eye(3)).abs().max() < 1e-10
    assert (params["d"] > 0).all()
    assert ((params["length_scale_space"] > 0) & (params["length_scale_space"] < 2)).all()
    assert all(np.isfinite(value) for value in kernel.sample_stats().values())
    assert not kernel.coherent
    assert "no joint density" in kernel.caveats


def test_seeds_reproduce():
    first, second, other = make(seed=3), make(), make(seed=4)
    second.seed(3)
    a, b, c = (sweeps(kernel, 5)[-1] for kernel in (first, second, other))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["U"], c["U"])


@PORTS
@pytest.mark.parametrize("before", [7, 25], ids=["in warm-up", "after"])
def test_resuming_is_not_interrupting(before, port):
    whole, broken = (make(covariates=np.ones((9, 1)), seed=5, port=port) for _ in range(2))
    for kernel in (whole, broken):
        kernel.setup(20)
    expected = sweeps(whole, before + 15)
    sweeps(broken, before)
    resumed = make(covariates=np.ones((9, 1)), seed=99, port=port)
    resumed.setup(20)
    resumed.load_state_dict(broken.state_dict())
    for a, b in zip(expected[before:], sweeps(resumed, 15), strict=True):
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=0, atol=0)


def test_redundant_work_changes_no_draw():
    lean, redundant = make(seed=6), make(seed=6, bessel=True, redundant=True)
    for a, b in zip(sweeps(lean, 10), sweeps(redundant, 10), strict=True):
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-6, atol=1e-6)


def test_initial_params_can_be_set():
    kernel = make()
    params = kernel.initial_params
    kernel.initial_params = {"d": params["d"] + 1, "length_scale_time": torch.full((3,), 0.3)}
    assert torch.equal(kernel.initial_params["d"], params["d"] + 1)
    assert torch.equal(kernel.initial_params["U"], params["U"])
    with pytest.raises(ProblemError, match=r"'d' of shape \(4,\) does not fit"):
        kernel.initial_params = {"d": torch.ones(4)}


def test_warmup_adapts_acceptance_and_then_stops():
    kernel = make(seed=7)
    kernel.setup(300)
    sweeps(kernel, 300)
    steps = kernel.step_d.copy()
    sweeps(kernel, 300)
    np.testing.assert_array_equal(steps, kernel.step_d)
    rates = np.array(kernel.diagnostics()["acceptance_d"])
    assert ((rates > 0.15) & (rates < 0.6)).all()  # target 0.25 to 0.45


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"z": np.full((12, 9), np.nan)}, "108 entries that are not finite"),
        ({"z": np.ones(5)}, "expected a matrix"),
        ({"rank": 9}, "choose 1 to 8"),
        ({"rank": 0}, "choose 1 to 8"),
        ({"distance_space": line(9)}, r"distance_space must be .* shape \(12, 12\)"),
        ({"kernel_time": "matern"}, "kernel_time='matern' is unknown"),
        ({"bounds_time": (2.0, 1.0)}, "0 <= lower < upper"),
        ({"bounds_time": None}, "give length_scale_time"),
        ({"length_scale_space": 5.0}, "must lie within"),
        ({"covariates": np.ones((8, 1))}, "coefficients of each location"),
        ({"covariates": np.full((9, 1), np.inf)}, "drop or fill"),
    ],
)
def test_bad_input_says_what_to_do(change, message):
    good = {
        "z": low_rank(12, 9, [3.0], 0.3, seed=1),
        "distance_space": line(12),
        "distance_time": line(9),
        "rank": 2,
        "bounds_space": (0.0, 2.0),
        "bounds_time": (0.0, 2.0),
    }
    with pytest.raises(ProblemError, match=message):
        PublishedGibbs(**{**good, **change})


def test_state_of_another_problem_is_refused():
    with pytest.raises(ProblemError, match="belongs to these data"):
        make(rank=2).load_state_dict(make(rank=3).state_dict())


# -- each conditional against brute force -----------------------------------------------------------------------------


def half_t(variance, dof):
    """Log density of a variance whose root is half-t with scale 1e6."""
    return -0.5 * np.log(variance) - 0.5 * (dof + 1) * np.log1p(variance / (dof * 1e12))


@PORTS
def test_d_and_noise_given_the_frames_match_a_grid(port):
    kernel = make(n=6, m=5, rank=1, seed=8, port=port)
    kernel.step_d[:] = 0.5
    space, time = kernel.sides["space"], kernel.sides["time"]
    space.variance[:], time.variance[:] = 5.0, 7.0
    draws = []
    for _ in range(20_000):
        kernel.draw_d()
        kernel.draw_noise()
        draws.append((kernel.d[0], np.log(kernel.noise_variance)))

    d, log_variance = np.meshgrid(np.linspace(0.01, 15, 600), np.linspace(-8, 4, 600), indexing="ij")
    variance = np.exp(log_variance)
    fit = float(space.frame[:, 0] @ kernel.z @ time.frame[:, 0])
    squares = (kernel.z**2).sum() - 2 * d * fit + d**2
    rate = space.quadratic[0] / space.variance[0] + time.quadratic[0] / time.variance[0]
    log_density = (6 - 2 + 5 - 2) * np.log(d) - 0.5 * d**2 * rate - 15 * np.log(variance) - 0.5 * squares / variance
    weight = np.exp((log_density + half_t(variance, 1) + log_variance) - (log_density + log_variance).max())
    weight /= weight.sum()
    assert_means_agree(draws, [(weight * d).sum(), (weight * log_variance).sum()])
    second = np.array(draws) ** 2
    assert_means_agree(second, [(weight * d**2).sum(), (weight * log_variance**2).sum()])


@PORTS
def test_mixture_variance_matches_a_grid(port):
    kernel = make(seed=9, port=port)
    side = kernel.sides["time"]
    draws = []
    for _ in range(20_000):
        kernel.draw_variances("time")
        draws.append(np.log(side.variance))
    log_variance = np.linspace(-12, 25, 20_000)
    variance = np.exp(log_variance)
    for i in range(3):
        squares = kernel.d[i] ** 2 * side.quadratic[i]
        log_density = -0.5 * 7 * log_variance - 0.5 * squares / variance + half_t(variance, 1) + log_variance
        weight = np.exp(log_density - log_density.max())
        assert_means_agree(np.array(draws)[:, i], (weight * log_variance).sum() / weight.sum())


@PORTS
def test_length_scale_matches_a_grid(port):
    n = 30
    distance = line(n)
    rough = np.linalg.cholesky(correlation("matern12", distance, 0.15)) @ np.random.default_rng(2).standard_normal(n)
    z = 5 * np.outer(rough, np.linspace(-1, 1, 8)) + 0.1 * np.random.default_rng(3).standard_normal((n, 8))
    kernel = port(
        z,
        distance,
        line(8),
        1,
        kernel_space="matern12",
        kernel_time="identity",
        bounds_space=(0.0, 4.0),
        length_scale_space=0.2,
        seed=10,
    )
    side = kernel.sides["space"]
    side.variance[:] = kernel.d[0] ** 2 / n
    side.step[:] = 0.1
    draws = []
    for _ in range(10_000):
        kernel.draw_length_scales("space")
        side.project(0)
        draws.append(side.length_scale[0])

    grid = np.linspace(0.002, 3.998, 1000)
    value = kernel.d[0] * side.frame[:, 0]
    log_density = []
    for rho in grid:
        matrix = side.variance[0] * (correlation("matern12", distance, rho) + 1e-8 * np.eye(n))
        log_density.append(-0.5 * np.linalg.slogdet(matrix)[1] - 0.5 * value @ np.linalg.solve(matrix, value))
    weight = np.exp(np.array(log_density) - max(log_density))
    weight /= weight.sum()
    assert weight[grid > 2].sum() < 0.01  # the published correction is wrong near the upper bound only
    assert_means_agree(np.log(draws), (weight * np.log(grid)).sum())


@PORTS
def test_column_draw_matches_the_dense_formula(port):
    kernel = make(n=7, m=6, rank=3, seed=11, bounds_space=None, length_scale_space=(0.3, 0.6, 1.0), port=port)
    space, time = kernel.sides["space"], kernel.sides["time"]
    space.variance[:], kernel.noise_variance = 2.0, 4.0
    i, others = 1, [0, 2]
    rest, d = space.frame[:, others].copy(), kernel.d[1]
    drawn = []
    for _ in range(20_000):
        kernel.draw_column("space", i)
        drawn.append(space.frame[:, i].copy())

    # the same normal without a null space: the kernel projected off the other columns, times the likelihood
    projector = np.eye(7) - rest @ rest.T
    before = (
        space.variance[i] / d**2 * projector @ (correlation("matern32", line(7), 0.6) + 1e-8 * np.eye(7)) @ projector
    )
    data = projector @ kernel.z @ time.frame[:, i] / d  # a direct observation of u with variance sigma^2 / d^2
    weight = before @ np.linalg.inv(before + kernel.noise_variance / d**2 * np.eye(7))
    mean, covariance = weight @ data, before - weight @ before
    values, vectors = np.linalg.eigh(covariance)
    normal = np.random.default_rng(0).standard_normal((200_000, 7)) * np.sqrt(np.clip(values, 0, None))
    expected = mean + normal @ vectors.T
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    drawn = np.array(drawn)
    assert np.abs(drawn @ rest).max() < 1e-10
    assert_means_agree(drawn, expected.mean(0), floor=1e-12)
    assert_means_agree(drawn**2, (expected**2).mean(0), floor=1e-12)


def agree(first, second):
    """Deviation of two chains' means, in standard errors."""
    return np.abs(first.mean(0) - second.mean(0)) / np.hypot(standard_error(first), standard_error(second))


@pytest.mark.parametrize("name", ["matern12", "matern32", "matern52", "matern72", "squared_exponential", "exponential"])
def test_the_fast_port_has_the_same_kernels_in_the_null_space(name):
    plain, fast = (
        make(kernel_space=name, bounds_space=None, length_scale_space=(0.2, 0.4, 0.7), nugget=1e-6, port=port)
        for port in (PublishedGibbs, FastPublishedGibbs)
    )
    frame = torch.from_numpy(np.linalg.qr(np.random.default_rng(0).standard_normal((12, 3)))[0])
    for kernel in (plain, fast):
        kernel.initial_params = {"U": frame}
    ours, theirs = fast.sides["space"], plain.sides["space"]
    for i in range(3):
        np.testing.assert_allclose(np.tril(ours.matrix[i]), np.tril(theirs.matrix[i]), rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(ours.log_det[i], np.linalg.slogdet(theirs.projected[i])[1], rtol=1e-6)
        np.testing.assert_allclose(ours.quadratic[i], theirs.quadratic[i], rtol=1e-6)


@pytest.mark.parametrize(("rank", "i"), [(1, 0), (3, 0), (3, 1), (3, 2)])
def test_the_fast_port_draws_columns_of_the_same_mean_and_covariance(rank, i):
    plain, fast = (make(rank=rank, port=port) for port in (PublishedGibbs, FastPublishedGibbs))
    side, partner = fast.sides["time"], fast.sides["space"].frame[:, i]
    side.variance[:], variance, d = 3.0, 5.0, 2.5
    fit, zero = fast.z.T @ partner, np.zeros((2, 9))
    mean = side.draw(i, fit, d, variance, zero)
    unit = np.eye(18).reshape(18, 2, 9)
    root = np.array([side.draw(i, np.zeros(9), d, variance, normal) for normal in unit])  # linear in the normals
    null, inverse = plain.sides["time"].null[i], plain.sides["time"].inverse[i]
    covariance = np.linalg.inv(d**2 / 3.0 * inverse + d**2 / variance * np.eye(len(inverse)))
    np.testing.assert_allclose(root.T @ root, null @ covariance @ null.T, rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(mean, null @ covariance @ (null.T @ fit) * d / variance, rtol=1e-8, atol=1e-12)


@pytest.mark.slow
def test_the_fast_port_is_the_same_chain():
    z = low_rank(12, 9, [30.0, 15.0], 0.5, seed=1)  # strong modes far apart, so that both chains mix well
    chains = []
    for port in (PublishedGibbs, FastPublishedGibbs):
        kernel = port(
            z,
            line(12),
            line(9),
            2,
            kernel_space="matern32",
            kernel_time="matern12",
            bounds_space=(0.0, 2.0),
            bounds_time=(0.0, 2.0),
            seed=21,
        )
        kernel.setup(300)
        sweeps(kernel, 300)
        draws = sweeps(kernel, 3000)
        scalars = ("d", "sigma", "length_scale_space", "length_scale_time")
        values = [[np.log(p[name].numpy()).ravel() for name in scalars] + [p["U"].numpy()[::4, 0]] for p in draws]
        chains.append(np.array([np.concatenate(row) for row in values]))
    assert agree(*chains).max() < 4.0
    centre = chains[0].mean(0)
    assert agree(*((chain - centre) ** 2 for chain in chains)).max() < 4.0


@pytest.mark.parametrize("shared", [False, True])
def test_fixed_effects_match_ridge_regression(shared):
    rng = np.random.default_rng(12)
    covariates = rng.standard_normal((12, 9, 2)) if shared else rng.standard_normal((9, 2))
    kernel = make(covariates=covariates, seed=13)
    kernel.noise_variance = 50.0  # so that the prior matters
    draws = []
    for _ in range(5000):
        kernel.draw_beta()
        draws.append(kernel.beta.copy())
    residual = kernel.z - kernel._signal()
    design = covariates.reshape(-1, 2) if shared else np.kron(np.eye(12), covariates)
    precision = design.T @ design / 50.0 + np.eye(design.shape[1]) / 100.0
    mean = np.linalg.solve(precision, design.T @ residual.ravel() / 50.0)
    draws = np.array(draws).reshape(5000, -1)
    assert_means_agree(draws, mean)
    np.testing.assert_allclose(draws.std(0), np.sqrt(np.diag(np.linalg.inv(precision))), rtol=0.06)  # 6 standard errors


# -- coherence --------------------------------------------------------------------------------------------------------


def prior_chain(length_scales, num_draws, seed):
    """log det U' Lambda_2 U after each draw of column 1 and of column 2, with the data switched off: (num_draws, 2)."""
    n = 5
    kernel = PublishedGibbs(
        np.random.default_rng(0).standard_normal((n, n)),
        line(n),
        line(n),
        2,
        kernel_time="identity",
        length_scale_space=length_scales,
        seed=seed,
    )
    kernel.noise_variance = np.inf
    side = kernel.sides["space"]
    precision = np.linalg.inv(side.matrix[1])
    recorded = np.empty((num_draws, 2))
    for t in range(num_draws):
        for i in range(2):
            kernel.draw_column("space", i)
            recorded[t, i] = np.linalg.slogdet(side.frame.T @ precision @ side.frame)[1]
    return recorded, precision


def test_conditionals_of_different_kernels_form_no_joint_density():
    # Under any joint density both columns' draws leave it invariant, so the two means would agree.
    recorded, _ = prior_chain((0.1, 0.8), 8000, seed=14)
    difference = recorded[:, 0] - recorded[:, 1]
    assert abs(difference.mean()) > 10 * standard_error(difference)


def test_conditionals_of_a_common_kernel_have_their_known_joint_density():
    recorded, precision = prior_chain((0.3, 0.3), 8000, seed=15)
    difference = recorded[:, 0] - recorded[:, 1]
    assert abs(difference.mean()) < 4 * standard_error(difference)
    # pi(U) ~ det(U' Lambda U)^-(n-k+1)/2, by importance from another frame distribution: angular central Gaussian,
    # density ~ det(U' Lambda U)^-n/2
    factor = np.linalg.cholesky(np.linalg.inv(precision))
    normal = factor @ np.random.default_rng(1).standard_normal((400_000, 5, 2))
    gram = np.swapaxes(normal, 1, 2) @ precision @ normal
    log_det = np.linalg.slogdet(gram)[1] - np.linalg.slogdet(np.swapaxes(normal, 1, 2) @ normal)[1]
    weight = np.exp(0.5 * (5 - 4) * (log_det - log_det.max()))  # exponents n/2 - (n-k+1)/2
    expected = (weight * log_det).sum() / weight.sum()
    assert_means_agree(recorded.mean(1), expected)
