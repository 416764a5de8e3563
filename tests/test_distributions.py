"""Frame distributions against quadrature, dense null-space formulas and Monte Carlo.

Moments of exact draws are compared with expectations under the density. The statistic is the largest |z| over the
entries compared; at 4.5 one comparison of correct code fails with probability 7e-6, so all of this file's (about
1500) with 1 %, and seeds are fixed.
"""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal, init_to_value
from torch.distributions import transform_to

from probmodels.distributions import (
    FrameReparam,
    MatrixAngularCentralGaussian,
    SequentialConditioned,
    SequentialProjected,
    UniformFrame,
    gram_schmidt,
    stiefel,
)
from probmodels.distributions.covariance import correlation, eigen_grid, euclidean_distance

Z_MAX = 4.5
SIZES = [(2, 1), (2, 2), (3, 1), (3, 2), (3, 3)]
F64 = torch.float64


@pytest.fixture(autouse=True)
def _seed():
    pyro.set_rng_seed(0)
    pyro.clear_param_store()


def covariances(n, scales=(0.6, 1.2, 2.0), nugget=0.3):
    """Matern covariances on a line, shape (len(scales), n, n)."""
    d = euclidean_distance(np.arange(float(n)))
    return torch.stack([correlation(d, "matern72", s) + nugget * torch.eye(n, dtype=F64) for s in scales])


def grid_of(n, scales=(0.6, 1.2, 2.0), nugget=0.3):
    return eigen_grid(euclidean_distance(np.arange(float(n))), length_scales=scales, nugget=nugget)


def some_log_weights(k, num):
    """Unequal weights, one of them zero, shape (k, num)."""
    weights = torch.arange(1.0, k * num + 1, dtype=F64).reshape(k, num)
    weights[0, 0] = 0.0
    return weights.log()


def make(name, n, k):
    """A distribution of each kind over (n, k) frames."""
    if name == "uniform":
        return UniformFrame(n, k, dtype=F64)
    if name == "macg":
        return MatrixAngularCentralGaussian.from_covariance(covariances(n)[1], k)
    if name == "macg mixture":
        return MatrixAngularCentralGaussian.from_grid(grid_of(n), k, torch.tensor([0.2, 0.5, 0.3], dtype=F64).log())
    cls = SequentialConditioned if name.startswith("conditioned") else SequentialProjected
    if name.endswith("mixture"):
        return cls.from_grid(grid_of(n), k, some_log_weights(k, 3))
    return cls.from_covariance(covariances(n)[:k])


NAMES = ["uniform", "macg", "macg mixture", "conditioned", "conditioned mixture", "projected", "projected mixture"]


def quadrature(n, k):
    """Frames (N, n, k) and weights (N,) that integrate over the manifold; spectrally accurate for smooth densities."""
    if n == 2:
        t = 2 * math.pi * torch.arange(400, dtype=F64) / 400
        first = torch.stack([t.cos(), t.sin()], -1)
        weight = torch.full((400,), 2 * math.pi / 400, dtype=F64)
    else:
        nodes, node_weights = (torch.from_numpy(x) for x in np.polynomial.legendre.leggauss(24))
        t = 2 * math.pi * torch.arange(48, dtype=F64) / 48
        z, t = torch.meshgrid(nodes, t, indexing="ij")
        ring = (1 - z * z).sqrt()
        first = torch.stack([ring * t.cos(), ring * t.sin(), z], -1).reshape(-1, 3)
        weight = (node_weights[:, None] * 2 * math.pi / 48).expand(-1, 48).reshape(-1)
    columns = [first]
    if n == 3 and k > 1:
        # any frame field orthogonal to the first column: e_3 x u never vanishes at Gauss nodes
        a = torch.linalg.cross(torch.tensor([0.0, 0.0, 1.0], dtype=F64).expand_as(first), first)
        a = a / a.norm(dim=-1, keepdim=True)
        b = torch.linalg.cross(first, a)
        s = 2 * math.pi * torch.arange(48, dtype=F64) / 48
        second = s.cos()[:, None, None] * a + s.sin()[:, None, None] * b
        columns = [first.expand_as(second).reshape(-1, 3), second.reshape(-1, 3)]
        weight = (weight * 2 * math.pi / 48).expand(48, -1).reshape(-1)
    if k == n:  # the last column is determined up to its sign
        last = torch.stack([-first[:, 1], first[:, 0]], -1) if n == 2 else torch.linalg.cross(*columns)
        columns = [torch.cat([c, c]) for c in columns] + [torch.cat([last, -last])]
        weight = weight.repeat(2)
    return torch.stack(columns, -1), weight


def features(frame):
    """Even functions of each column, of which every distribution here has non-trivial means, shape (..., F)."""
    outer = frame.unsqueeze(-2) * frame.unsqueeze(-3)  # u_a u_b by column, (..., n, n, k)
    rows, columns = torch.tril_indices(frame.shape[-2], frame.shape[-2]).unbind()
    second = outer[..., rows, columns, :].flatten(-2)
    cross = (frame[..., :1].square() * frame[..., -1:].square()).flatten(-2)  # between first and last column
    return torch.cat([second, cross], -1)


def largest_z(draws, expected, expected_se=0.0):
    """Largest |z| of independent draws (N, F) against means (F,); entries that do not vary must agree."""
    difference = (draws.mean(0) - expected).abs()
    se = (draws.var(0) / len(draws) + expected_se**2).sqrt()
    fixed = se < 1e-12
    assert (difference[fixed] < 1e-9).all()
    return (difference[~fixed] / se[~fixed]).max().item() if (~fixed).any() else 0.0


def dense_log_prob(frame, covariance, kind):
    """Density of one frame (n, k) with covariances (k, n, n) by explicit null spaces and inverses."""
    u, total = frame.numpy(), 0.0
    for i in range(u.shape[1]):
        omega = covariance[i].numpy()
        null = np.linalg.qr(np.concatenate([u[:, :i], np.eye(len(u))], 1))[0][:, i:] if i else np.eye(len(u))
        p = null.shape[1]
        if kind is SequentialConditioned:
            precision = null.T @ np.linalg.inv(omega) @ null
        else:
            precision = np.linalg.inv(null.T @ omega @ null)
        w = null.T @ u[:, i]
        total += math.lgamma(p / 2) - math.log(2) - p / 2 * math.log(math.pi)
        total += 0.5 * np.linalg.slogdet(precision)[1] - p / 2 * math.log(w @ precision @ w)
    return total


# --------------------------------------------------------------------------------------------------------------------
# Densities and draws


@pytest.mark.parametrize(("n", "k"), SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_density_integrates_to_one_and_draws_have_its_moments(name, n, k):
    fn = make(name, n, k)
    frames, weights = quadrature(n, k)
    mass = weights * fn.log_prob(frames).exp()
    assert mass.sum().item() == pytest.approx(1.0, abs=1e-5)  # of the quadrature
    draws = fn.sample((20_000,))
    assert stiefel.check(draws).all()
    assert largest_z(features(draws), mass @ features(frames)) < Z_MAX
    assert largest_z(draws.flatten(1), torch.zeros(n * k, dtype=F64)) < Z_MAX


def test_negative_control_the_wrong_density_is_noticed():
    frames, weights = quadrature(3, 2)
    covariance = covariances(3, (0.6, 3.0))
    mass = weights * SequentialProjected.from_covariance(covariance).log_prob(frames).exp()
    draws = SequentialConditioned.from_covariance(covariance).sample((20_000,))
    assert largest_z(features(draws), mass @ features(frames)) > 10


@pytest.mark.parametrize("name", [n for n in NAMES if n != "uniform"])
def test_draws_match_the_density_in_more_dimensions(name):
    """Expectations under exact draws against uniform frames weighted by the density."""
    fn, uniform = make(name, 5, 3), make("uniform", 5, 3)
    frames = uniform.sample((200_000,))
    ratio = (fn.log_prob(frames) - uniform.log_prob(frames)).exp()
    assert abs(ratio.mean() - 1) < Z_MAX * ratio.std() / len(ratio) ** 0.5
    values = features(frames)
    mean = (ratio[:, None] * values).mean(0) / ratio.mean()
    mean_se = (ratio[:, None] * (values - mean)).std(0) / len(ratio) ** 0.5 / ratio.mean()
    assert largest_z(features(fn.sample((20_000,))), mean, mean_se) < Z_MAX


@pytest.mark.parametrize("kind", [SequentialConditioned, SequentialProjected])
def test_log_prob_is_the_null_space_formula(kind):
    covariance = covariances(6, (0.5, 1.0, 2.0, 3.0), nugget=1e-3)
    fn = kind.from_covariance(covariance)
    frames = torch.cat([fn.sample((3,)), UniformFrame(6, 4, dtype=F64).sample((3,))])
    expected = torch.tensor([dense_log_prob(u, covariance, kind) for u in frames], dtype=F64)
    torch.testing.assert_close(fn.log_prob(frames), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", [SequentialConditioned, SequentialProjected])
def test_smooth_kernels_of_many_points_stay_accurate(kind):
    """Condition number 7e7: inverses in the reference formula lose half of the digits, the density must not."""
    grid = eigen_grid(euclidean_distance(np.linspace(0, 10, 100)), length_scales=[3.0], nugget=1e-6)
    fn = kind.from_grid(grid, 5)
    frames = fn.sample((4,))
    error = (frames.mT @ frames - torch.eye(5, dtype=F64)).abs().max()
    assert error < 1e-13
    covariance = grid.covariance(0).expand(5, -1, -1)
    expected = torch.tensor([dense_log_prob(u, covariance, kind) for u in frames], dtype=F64)
    torch.testing.assert_close(fn.log_prob(frames), expected, rtol=1e-6, atol=1e-4)


def test_one_column_is_the_angular_central_gaussian():
    omega = covariances(4)[1]
    u = UniformFrame(4, 1, dtype=F64).sample((50,))
    quadratic = (u.mT @ torch.linalg.inv(omega) @ u).flatten()
    expected = math.lgamma(2.0) - math.log(2 * math.pi**2) - 0.5 * torch.logdet(omega) - 2 * quadratic.log()
    for kind in (SequentialConditioned, SequentialProjected, MatrixAngularCentralGaussian):
        torch.testing.assert_close(kind.from_covariance(omega, 1).log_prob(u), expected)


@pytest.mark.parametrize("kind", [SequentialConditioned, SequentialProjected, MatrixAngularCentralGaussian])
def test_identity_covariance_is_uniform_whatever_its_scale(kind):
    uniform = UniformFrame(5, 3, dtype=F64)
    frames = uniform.sample((20,))
    fn = kind.from_covariance(7.0 * torch.eye(5, dtype=F64), 3)
    torch.testing.assert_close(fn.log_prob(frames), uniform.log_prob(frames))
    area = sum(math.log(2) + p / 2 * math.log(math.pi) - math.lgamma(p / 2) for p in (5, 4, 3))
    assert uniform.log_prob(frames)[0].item() == pytest.approx(-area)


@pytest.mark.parametrize("kind", [SequentialConditioned, SequentialProjected, MatrixAngularCentralGaussian])
def test_projected_normal_on_the_circle_has_its_exact_distribution_function(kind):
    """If (a cos s, b sin s) points along u, with Omega = diag(a^2, b^2), then s is uniform."""
    fn = kind.from_covariance(torch.diag(torch.tensor([4.0, 0.25], dtype=F64)), 1)
    u = fn.sample((5000,)).squeeze(-1)
    s = torch.atan2(u[:, 1] / 0.5, u[:, 0] / 2.0)
    assert scipy.stats.kstest(s.numpy(), scipy.stats.uniform(-math.pi, 2 * math.pi).cdf).pvalue > 1e-3


def test_angular_central_gaussian_does_not_see_rotations_of_its_columns():
    fn = make("macg mixture", 5, 3)
    frames, rotation = fn.sample((10,)), UniformFrame(3, 3, dtype=F64).sample()
    torch.testing.assert_close(fn.log_prob(frames @ rotation), fn.log_prob(frames))
    assert not torch.allclose(
        make("conditioned", 5, 3).log_prob(frames @ rotation), make("conditioned", 5, 3).log_prob(frames)
    )


@pytest.mark.parametrize("name", NAMES)
def test_signs_of_columns_do_not_matter(name):
    fn = make(name, 5, 3)
    frames = fn.sample((10,))
    torch.testing.assert_close(fn.log_prob(frames * torch.tensor([1.0, -1.0, -1.0])), fn.log_prob(frames))
    assert (fn.mean == 0).all()


# --------------------------------------------------------------------------------------------------------------------
# Mixtures over candidates


@pytest.mark.parametrize("kind", [SequentialConditioned, SequentialProjected])
def test_mixture_and_component_logits_are_hand_written_sums(kind):
    n, k, scales = 5, 2, (0.6, 1.2, 2.0)
    grid, log_weights = grid_of(n, scales), some_log_weights(k, 3)
    fn = kind.from_grid(grid, k, log_weights)
    frame = fn.sample()
    candidates = torch.stack([grid.covariance(g) for g in range(3)])
    first = [dense_log_prob(frame[:, :1], candidates[g : g + 1], kind) for g in range(3)]
    second = [dense_log_prob(frame, candidates[[g, g]], kind) - first[g] for g in range(3)]
    joint = log_weights.log_softmax(-1) + torch.tensor([first, second], dtype=F64)
    assert fn.log_prob(frame).item() == pytest.approx(joint.logsumexp(-1).sum().item())
    torch.testing.assert_close(fn.component_logits(frame).exp(), joint.softmax(-1))


def test_mixture_of_angular_central_gaussians_shares_one_candidate():
    fn, grid = make("macg mixture", 5, 3), grid_of(5)
    frame = fn.sample()
    terms = torch.stack(
        [MatrixAngularCentralGaussian.from_covariance(grid.covariance(g), 3).log_prob(frame) for g in range(3)]
    )
    joint = torch.tensor([0.2, 0.5, 0.3], dtype=F64).log() + terms
    torch.testing.assert_close(fn.log_prob(frame), joint.logsumexp(0))
    torch.testing.assert_close(fn.component_logits(frame).exp(), joint.softmax(0))


@pytest.mark.parametrize("name", ["conditioned mixture", "projected mixture", "macg mixture"])
def test_component_probabilities_average_to_the_weights(name):
    """Law of total probability over exact draws."""
    fn = make(name, 6, 2)
    probabilities = fn.component_logits(fn.sample((5000,))).exp()
    assert largest_z(probabilities.flatten(1), fn.log_weights.exp().flatten()) < Z_MAX


def test_fixed_kernels_are_one_hot_weights():
    covariance, grid = covariances(5), grid_of(5)
    fixed = SequentialConditioned.from_covariance(covariance)
    one_hot = SequentialConditioned.from_grid(grid, 3, torch.eye(3, dtype=F64).log())
    frames = UniformFrame(5, 3, dtype=F64).sample((10,))
    torch.testing.assert_close(fixed.log_prob(frames), one_hot.log_prob(grid.basis.mT @ frames))
    torch.testing.assert_close(fixed.component_logits(frames).exp(), torch.eye(3, dtype=F64).expand(10, 3, 3))
    common = SequentialConditioned.from_covariance(covariance[0], 3)
    repeated = SequentialConditioned.from_covariance(covariance[:1].expand(3, 5, 5))
    torch.testing.assert_close(common.log_prob(frames), repeated.log_prob(frames))


# --------------------------------------------------------------------------------------------------------------------
# Gradients, shapes, validation


@pytest.mark.parametrize("kind", [SequentialConditioned, SequentialProjected, MatrixAngularCentralGaussian])
def test_gradients_are_finite_differences(kind):
    grid, k = grid_of(4), 2
    shape = (3,) if kind is MatrixAngularCentralGaussian else (k, 3)
    frame = UniformFrame(4, k, dtype=F64).sample()
    inputs = (frame, grid.values.clone(), grid.vectors.clone(), torch.randn(shape, dtype=F64))

    def log_prob(u, values, vectors, log_weights):
        return kind(values, vectors, k, log_weights, validate_args=False).log_prob(u)

    assert torch.autograd.gradcheck(log_prob, tuple(x.requires_grad_() for x in inputs))


def test_ruled_out_candidates_leave_gradients_finite():
    fn = SequentialProjected.from_covariance(covariances(4))
    frame = fn.sample().requires_grad_()
    assert torch.isfinite(torch.autograd.grad(fn.log_prob(frame), frame)[0]).all()


@pytest.mark.parametrize("kind", [SequentialConditioned, SequentialProjected])
@pytest.mark.parametrize("diagonal", [False, True])
def test_batches_are_independent_distributions(kind, diagonal):
    grid, k = grid_of(4), 2
    values = grid.values * torch.tensor([1.0, 2.0, 3.0], dtype=F64).reshape(3, 1, 1) ** torch.arange(4.0)
    vectors = None if diagonal else torch.stack([grid.vectors, grid.vectors.flip(-1), grid.vectors.flip(-2)])
    log_weights = torch.randn(2, 1, k, 3, dtype=F64)
    fn = kind(values, vectors, k, log_weights)
    assert fn.batch_shape == (2, 3)
    assert fn.event_shape == (4, 2)
    draws = fn.sample((7000,))
    assert draws.shape == (7000, 2, 3, 4, 2)
    assert fn.sample().shape == (2, 3, 4, 2)
    log_prob, logits = fn.log_prob(draws[:10]), fn.component_logits(draws[:10])
    assert log_prob.shape == (10, 2, 3)
    assert logits.shape == (10, 2, 3, k, 3)
    assert fn.log_prob(draws[0, 0, 0]).shape == (2, 3)
    for a in range(2):
        for b in range(3):
            one = kind(values[b], None if vectors is None else vectors[b], k, log_weights[a, 0])
            torch.testing.assert_close(one.log_prob(draws[:10, a, b]), log_prob[:, a, b])
            torch.testing.assert_close(one.component_logits(draws[:10, a, b]), logits[:, a, b])
    one = kind(values[2], None if vectors is None else vectors[2], k, log_weights[1, 0])
    reference = features(one.sample((7000,)))
    se = reference.std(0) / len(reference) ** 0.5
    assert largest_z(features(draws[:, 1, 2]), reference.mean(0), se) < Z_MAX


@pytest.mark.parametrize("name", NAMES)
def test_expand_shares_parameters_and_draws_independently(name):
    fn = make(name, 4, 2)
    wide = fn.expand([3, 2])
    draws = wide.sample((5,))
    assert draws.shape == (5, 3, 2, 4, 2)
    assert not torch.equal(draws[0, 0, 0], draws[0, 0, 1])
    torch.testing.assert_close(wide.log_prob(draws), fn.log_prob(draws))
    assert wide.log_prob(draws[0, 0, 0]).shape == (3, 2)
    assert wide.mean.shape == (3, 2, 4, 2)
    if name != "uniform":
        assert wide.values is fn.values
        assert wide.component_logits(draws[0, 0, 0]).shape[:2] == (3, 2)


def test_batch_of_covariances():
    covariance = torch.stack([covariances(4), 2 * covariances(4).flip(0)])  # (2, 3, 4, 4)
    fn = SequentialConditioned.from_covariance(covariance)
    assert (fn.batch_shape, fn.event_shape) == ((2,), (4, 3))
    macg = MatrixAngularCentralGaussian.from_covariance(covariance, 2)
    assert (macg.batch_shape, macg.event_shape) == ((2, 3), (4, 2))
    frame = macg.sample()
    alone = MatrixAngularCentralGaussian.from_covariance(covariance[1, 2], 2)
    torch.testing.assert_close(macg.log_prob(frame)[1, 2], alone.log_prob(frame[1, 2]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constraint_allows_rounding_and_nothing_else(dtype):
    frames = UniformFrame(300, 20, dtype=dtype).sample((4,))
    assert frames.dtype == dtype
    assert stiefel.check(frames).shape == (4,)
    assert stiefel.check(frames).all()
    assert not stiefel.check(1.01 * frames).any()
    assert not stiefel.check(frames.roll(1, 0)[:1] * torch.eye(20, dtype=dtype)[0]).any()
    with pytest.raises(ValueError, match="support"):
        UniformFrame(300, 20).log_prob(1.01 * frames)


def test_single_precision_is_supported():
    grid = grid_of(6)
    fn = SequentialConditioned(grid.values.float(), grid.vectors.float(), 2)
    frames = fn.sample((5,))
    assert frames.dtype == torch.float32
    exact = SequentialConditioned.from_grid(grid, 2, validate_args=False).log_prob(frames.double())
    torch.testing.assert_close(fn.log_prob(frames).double(), exact, rtol=1e-4, atol=1e-4)


def test_any_matrix_transforms_to_a_frame():
    transform = transform_to(stiefel)
    x = torch.randn(3, 5, 2, dtype=F64)
    assert stiefel.check(transform(x)).all()
    assert stiefel.check(transform(torch.zeros(5, 2))).all()
    frame = transform(x)
    torch.testing.assert_close(transform(transform.inv(frame)), frame)
    assert (gram_schmidt(x).mT @ x).diagonal(dim1=-2, dim2=-1).min() > 0
    assert transform == transform_to(stiefel)


VALUES = torch.ones(2, 4, dtype=F64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SequentialConditioned(VALUES, None, 5), "4 rows allow 1 to 4"),
        (lambda: SequentialProjected(VALUES, None, 0), "4 rows allow 1 to 4"),
        (lambda: UniformFrame(2, 3), "2 rows allow 1 to 2"),
        (lambda: SequentialConditioned(VALUES[0], None, 2), r"expected \(\*batch, candidates, rows\)"),
        (lambda: SequentialConditioned(VALUES, torch.eye(4), 2), r"vectors has shape \(4, 4\)"),
        (lambda: SequentialConditioned(-VALUES, None, 2), "smallest is -1"),
        (lambda: SequentialConditioned(VALUES, 2 * torch.eye(4).expand(2, 4, 4), 2), "orthogonal matrices"),
        (lambda: SequentialConditioned(VALUES, None, 2, torch.zeros(3)), "last size must be 2"),
        (lambda: SequentialConditioned(VALUES, None, 2, torch.zeros(3, 2)), "one row per column"),
        (lambda: SequentialConditioned(VALUES, None, 2, torch.full((2,), -math.inf)), "leave each row a candidate"),
        (lambda: SequentialConditioned(VALUES, None, 2, torch.tensor([0.0, math.nan])), "leave each row a candidate"),
        (lambda: SequentialConditioned(VALUES.expand(3, 2, 4), None, 2, torch.zeros(2, 2, 2)), "do not broadcast"),
        (lambda: SequentialConditioned.from_covariance(torch.eye(4)), "num_columns is needed"),
        (lambda: SequentialConditioned.from_covariance(torch.eye(4).expand(2, 4, 4), 3), "covariance holds 2"),
        (lambda: SequentialConditioned.from_covariance(torch.ones(4, 4), 2), "not positive definite"),
        (lambda: SequentialConditioned.from_covariance(torch.ones(4, 3), 2), "expected square"),
        (lambda: SequentialConditioned.from_covariance(torch.eye(4).roll(1, 0), 2), "not symmetric"),
        (lambda: MatrixAngularCentralGaussian.from_covariance(torch.eye(4) * math.nan, 2), "non-finite"),
        (lambda: FrameReparam(grid_of(4)), "holds 3 candidates"),
        (lambda: FrameReparam(torch.eye(4).expand(2, 4, 4)), "expected one covariance"),
        (lambda: FrameReparam(torch.ones(4, 4)), "not positive definite"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --------------------------------------------------------------------------------------------------------------------
# Reparametrisation


def references(n):
    grid = grid_of(n)
    return {"none": None, "grid": grid.select(1), "covariance": grid.covariance(2)}


def frame_model(fn):
    return lambda: pyro.sample("U", fn)


@pytest.mark.parametrize("which", ["none", "grid", "covariance"])
@pytest.mark.parametrize("name", ["uniform", "conditioned mixture", "projected", "macg"])
def test_reparametrised_prior_has_the_moments_of_the_distribution(which, name):
    """Normals weighted by the density ratio that the site carries, against exact draws: exact for any reference."""
    fn = make(name, 4, 2)
    model = poutine.reparam(frame_model(fn.expand([50_000])), {"U": FrameReparam(references(4)[which])})
    trace = poutine.trace(model).get_trace()
    assert not trace.nodes["U_unconstrained"]["is_observed"]
    assert trace.nodes["U_unconstrained"]["fn"].event_shape == (4, 2)
    frames, ratio = trace.nodes["U"]["value"], trace.nodes["U"]["fn"].log_prob(trace.nodes["U"]["value"]).exp()
    assert stiefel.check(frames).all()
    assert abs(ratio.mean() - 1) <= Z_MAX * ratio.std() / len(ratio) ** 0.5 + 1e-12
    mean = (ratio[:, None] * features(frames)).mean(0) / ratio.mean()
    mean_se = (ratio[:, None] * (features(frames) - mean)).std(0) / len(ratio) ** 0.5
    assert largest_z(features(fn.sample((20_000,))), mean, mean_se) < Z_MAX


def test_reference_equal_to_the_prior_leaves_no_ratio():
    grid = grid_of(4)
    fn = SequentialProjected.from_grid(grid.select(2), 3)
    for model_fn, reference in ((fn, grid.select(2)), (fn, grid.covariance(2)), (UniformFrame(4, 3, dtype=F64), None)):
        trace = poutine.trace(
            poutine.reparam(frame_model(model_fn.expand([5])), {"U": FrameReparam(reference)})
        ).get_trace()
        trace.compute_log_prob()
        torch.testing.assert_close(trace.nodes["U"]["log_prob"], torch.zeros(5, dtype=F64), atol=1e-10, rtol=0)


@pytest.mark.slow
def test_nuts_on_the_reparametrised_prior_reproduces_exact_draws():
    fn = SequentialConditioned.from_grid(grid_of(3, (0.6, 1.5)), 2, torch.tensor([[0.7, 0.3], [0.2, 0.8]]).log())
    # twenty independent frames in one chain: the spread of their means gives errors that know the autocorrelation
    model = poutine.reparam(frame_model(fn.expand([20]).to_event(1)), {"U": FrameReparam(grid_of(3).covariance(1))})
    mcmc = MCMC(NUTS(model, max_tree_depth=4), num_samples=120, warmup_steps=60, disable_progbar=True)
    mcmc.run()
    draws = features(Predictive(model, mcmc.get_samples(), return_sites=["U"])()["U"].reshape(120, 20, 3, 2))
    exact = features(fn.sample((20_000,)))
    se = (draws.mean(0).var(0) / 20 + exact.var(0) / len(exact)).sqrt()
    # t with 19 degrees of freedom over about 15 correlated entries: 5 is exceeded with probability below 2e-3
    assert ((draws.mean((0, 1)) - exact.mean(0)).abs() / se).max() < 5
    # the errors are small enough for the comparison to mean something
    assert se.max() < 0.03


def test_reparam_works_in_plates_and_with_dimensions_made_events():
    fn = make("conditioned", 4, 3)

    def model():
        with pyro.plate("series", 6, dim=-2), pyro.plate("chain", 2, dim=-1):
            pyro.sample("U", fn)
        pyro.sample("V", fn.expand([5]).to_event(1))

    config = {"U": FrameReparam(), "V": FrameReparam(grid_of(4).covariance(0))}
    trace = poutine.trace(poutine.reparam(model, config)).get_trace()
    trace.compute_log_prob()
    assert trace.nodes["U_unconstrained"]["value"].shape == (6, 2, 4, 3)
    assert trace.nodes["U"]["log_prob"].shape == (6, 2)
    assert trace.nodes["V"]["log_prob"].shape == ()
    u, v = trace.nodes["U"]["value"], trace.nodes["V"]["value"]
    expected = fn.log_prob(u) - UniformFrame(4, 3).log_prob(u)
    torch.testing.assert_close(trace.nodes["U"]["log_prob"], expected)
    reference = SequentialProjected.from_covariance(grid_of(4).covariance(0), 3)
    torch.testing.assert_close(trace.nodes["V"]["log_prob"], (fn.log_prob(v) - reference.log_prob(v)).sum())


@pytest.mark.parametrize("which", ["none", "grid", "covariance"])
@pytest.mark.parametrize("guide_class", [AutoNormal, AutoMultivariateNormal])
def test_automatic_guides_fit_and_start_where_told(which, guide_class):
    start = UniformFrame(4, 2, dtype=F64).sample()
    direction = UniformFrame(4, 2, dtype=F64).sample()
    fn = make("conditioned", 4, 2)

    def model():
        u = pyro.sample("U", fn)
        pyro.sample("x", dist.Normal(u, 0.3).to_event(2), obs=direction)

    model = poutine.reparam(model, {"U": FrameReparam(references(4)[which])})
    guide = guide_class(model, init_loc_fn=init_to_value(values={"U": start}), init_scale=1e-6)
    guide()
    frame = Predictive(model, guide=guide, num_samples=1, return_sites=["U"])()["U"]
    torch.testing.assert_close(frame.reshape(4, 2), start, atol=1e-4, rtol=0)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    losses = [svi.step() for _ in range(60)]
    assert np.isfinite(losses).all()
    assert np.mean(losses[-10:]) < np.mean(losses[:10])


def test_automatic_guide_starts_by_itself():
    guide = AutoNormal(poutine.reparam(frame_model(make("macg", 4, 2)), {"U": FrameReparam()}))
    guide()
    assert torch.isfinite(guide.median()["U_unconstrained"]).all()


def test_reparam_says_what_it_cannot_do():
    fn = make("conditioned", 4, 2)
    with pytest.raises(ValueError, match="'U' is observed"):
        poutine.reparam(lambda: pyro.sample("U", fn, obs=fn.sample()), {"U": FrameReparam()})()
    with pytest.raises(ValueError, match="'U' is a Normal"):
        poutine.reparam(lambda: pyro.sample("U", dist.Normal(0.0, 1.0)), {"U": FrameReparam()})()
    with pytest.raises(ValueError, match="3 rows but the frame has 4"):
        poutine.reparam(frame_model(fn), {"U": FrameReparam(torch.eye(3, dtype=F64))})()
