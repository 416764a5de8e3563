"""Samplers along a field: moments, densities along the flow, weights on products whose answer is known."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from probmodels.errors import ProblemError
from probmodels.guides.schedules import CosineSchedule, LinearSchedule, TableSchedule
from probmodels.score_composition import make_move
from probmodels.scores.closed import GaussianMixture, UniformBox
from probmodels.scores.fields import FunctionField, Mixture, Product, ScoreOnly, tempered
from probmodels.scores.samplers import METHODS, flow_log_density, reverse_step, sample, weighted

SCHEDULE = LinearSchedule(-7.0, 6.0)
MIXTURE = GaussianMixture(
    SCHEDULE,
    torch.tensor([[0.0, 0.7], [1.0, -0.5]]),
    torch.tensor([[[0.3, 0.1], [0.1, 0.2]], [[0.1, -0.05], [-0.05, 0.2]]]),
    [0.7, 0.3],
)
# Two mixtures along a line, whose modes agree more in one place than in the other.
LEFT = GaussianMixture(SCHEDULE, torch.tensor([[-1.0], [1.0]]), torch.tensor([[0.05], [0.1]]), [0.5, 0.5])
RIGHT = GaussianMixture(SCHEDULE, torch.tensor([[-0.7], [1.6]]), torch.tensor([[0.2], [0.3]]), [0.3, 0.7])


def moments(field, t=0.0):
    """Mean and covariance of a mixture of normals at a time."""
    alpha, sigma = field.scales(t, field.means)
    mean = field.weights @ field.means
    centred = field.means - mean
    spread = torch.einsum("k,kij->ij", field.weights, field.covariances + centred.unsqueeze(2) * centred.unsqueeze(1))
    return alpha * mean, alpha**2 * spread + sigma**2 * torch.eye(len(mean), dtype=torch.float64)


def product_at_zero(first, second, powers=(1.0, 1.0)):
    """Weights, means, variances and log integral of ``p^a q^b`` at level 0, for one-dimensional components.

    Exact where a power is 1, or one mixture has a single component.
    """
    rows = []
    alpha, sigma = (float(value) for value in first.scales(0.0, first.means))
    for i, j in itertools.product(range(len(first.means)), range(len(second.means))):
        parts = [
            (
                float(field.weights[k].log()),
                alpha * float(field.means[k]),
                alpha**2 * float(field.covariances[k]) + sigma**2,
            )
            for field, k in ((first, i), (second, j))
        ]
        precision = sum(power / part[2] for power, part in zip(powers, parts, strict=True))
        mean = sum(power * part[1] / part[2] for power, part in zip(powers, parts, strict=True)) / precision
        height = sum(
            power * (part[0] - 0.5 * (mean - part[1]) ** 2 / part[2] - 0.5 * math.log(2 * math.pi * part[2]))
            for power, part in zip(powers, parts, strict=True)
        )
        rows.append((height + 0.5 * math.log(2 * math.pi / precision), mean, 1 / precision))
    logs, means, variances = (np.array(column) for column in zip(*rows, strict=True))
    total = np.logaddexp.reduce(logs)
    return np.exp(logs - total), means, variances, float(total)


def summary(weights, means, variances):
    """Mean, variance and mass above zero of a mixture along a line."""
    mean = weights @ means
    return mean, weights @ (variances + means**2) - mean**2, weights @ stats.norm.sf(0, means, np.sqrt(variances))


# -- one distribution -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"num_steps": 200},
        {"method": "ddim", "num_steps": 200},
        {"method": "ddim", "num_steps": 200, "eta": 0.7},
        {"method": "flow"},
    ],
    ids=["ancestral", "ddim", "ddim 0.7", "flow"],
)
def test_draws_have_the_moments_of_the_mixture(options):
    """Check within 4 standard errors plus one per cent of the spread, for the error of finite steps."""
    count = 8000
    x = sample(MIXTURE, count, batch_size=count, progress=False, dtype=torch.float64, **options)
    # Draws are posterior means of data: less spread than the data by the mean posterior variance.
    reference = MIXTURE.denoise(MIXTURE.sample(200_000, generator=torch.Generator().manual_seed(0)), 0.0)
    mean, spread = reference.mean(0), reference.T.cov()
    scale = float(spread.diagonal().max())
    assert (x.mean(0) - mean).abs().max() < 4 * math.sqrt(scale / count) + 0.01 * math.sqrt(scale)
    assert (x.T.cov() - spread).abs().max() < 4 * scale * math.sqrt(2 / count) + 0.02 * scale
    upper = (x[:, 1] > x[:, 0]).double().mean()
    share = (reference[:, 1] > reference[:, 0]).double().mean()
    assert abs(upper - share) < 4 * 0.5 / math.sqrt(count) + 0.005


def test_one_reverse_step_is_the_regression_of_a_normal():
    """For one normal the posterior of ``z_s`` given ``z_t`` is known; the mean of a step agrees to first order."""
    field = GaussianMixture(SCHEDULE, torch.tensor([[0.5]]), 0.3)
    z, t, s = torch.full((40_000, 1), 0.4, dtype=torch.float64), 0.5, 0.49
    torch.manual_seed(0)
    drawn = reverse_step(field, z, t, s)
    (a_t, s_t), (a_s, s_s) = field.scales(t, z), field.scales(s, z)
    variance_t, variance_s = a_t**2 * 0.3 + s_t**2, a_s**2 * 0.3 + s_s**2
    gain = (a_t / a_s) * variance_s / variance_t
    assert drawn.mean() == pytest.approx(float(a_s * 0.5 + gain * (0.4 - a_t * 0.5)), abs=0.005)
    assert drawn.var() == pytest.approx(float(variance_s - gain**2 * variance_t), rel=0.05)


def test_the_same_seed_gives_the_same_draws_and_leaves_the_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    options = {"num_steps": 5, "progress": False, "batch_size": 4}
    first, again, other = (sample(MIXTURE, 10, seed=seed, **options) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(2), expected)
    assert first.shape == (10, 2)
    assert first.dtype == torch.float32
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[:4], first[4:8])
    one, two = (weighted(MIXTURE, 10, num_steps=5, seed=4, progress=False).samples for _ in range(2))
    assert torch.equal(one, two)


def test_deterministic_draws_depend_on_the_noise_alone():
    z = torch.randn(5, 2)
    assert torch.equal(reverse_step(MIXTURE, z, 0.5, 0.4, eta=0.0), reverse_step(MIXTURE, z, 0.5, 0.4, eta=0.0))
    assert not torch.equal(reverse_step(MIXTURE, z, 0.5, 0.4), reverse_step(MIXTURE, z, 0.5, 0.4))


@pytest.mark.parametrize("probes", [None, 20], ids=["exact", "hutchinson"])
def test_densities_along_the_flow_are_exact(probes):
    """Check within 0.01 nat, and with random directions within their Monte Carlo error."""
    z = MIXTURE.sample(40, generator=torch.Generator().manual_seed(2))
    wide = GaussianMixture(LinearSchedule(-7.0, 12.0), MIXTURE.means, MIXTURE.covariances, MIXTURE.weights)
    found, exact = flow_log_density(wide, z, num_probes=probes, seed=1), wide.log_density(z, 0.0)
    if probes is None:
        assert (found - exact).abs().max() < 0.01
        return
    one = torch.stack([flow_log_density(wide, z, num_probes=1, seed=seed, tolerance=1e-3) for seed in range(5)])
    error = float(one.std(0).mean()) / math.sqrt(probes)
    assert abs(float((found - exact).mean())) < 0.01 + 4 * error / math.sqrt(len(z))
    assert (found - exact).abs().max() < 0.01 + 5 * error


def test_densities_of_scores_alone_and_of_diagonal_fields():
    """The Hessian of a field of independent parts is diagonal, for which one probe of signs is exact."""
    field = GaussianMixture(LinearSchedule(-7.0, 12.0), torch.tensor([[0.5, -0.2]]), torch.tensor([[0.3, 0.1]]))
    z = field.sample(10, generator=torch.Generator().manual_seed(2))
    found = flow_log_density(ScoreOnly(field), z, num_probes=1)
    assert (found - field.log_density(z, 0.0)).abs().max() < 0.01


# -- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("powers", [(1.0, 1.0), (1.0, 2.0)], ids=["equal", "unequal"])
@pytest.mark.parametrize("weights", ["energy", "feynman_kac"])
def test_weighted_draws_have_the_shares_of_modes_of_the_product(weights, powers):
    """Compare shares with exact ones, and check that reverse steps alone give wrong shares."""
    second = RIGHT if powers[1] == 1 else GaussianMixture(SCHEDULE, torch.tensor([[0.2]]), 0.6)
    field = Product([LEFT, second], powers)
    mean, variance, above = summary(*product_at_zero(LEFT, second, powers)[:3])
    count, runs = 2000, 3
    known = field if weights == "energy" else Product([ScoreOnly(LEFT), ScoreOnly(second)], powers)
    move = make_move(known, num_steps=1, width=0.2)
    found = [
        weighted(known, count, num_steps=80, weights=weights, move=move, denoise=False, seed=seed, progress=False)
        for seed in range(runs)
    ]
    x = torch.cat([one.samples for one in found]).double()
    # Resampling makes runs noisier than independent draws; their own spread is the error.
    shares = torch.stack([(one.samples > 0).double().mean() for one in found])
    spread = max(float(shares.std()) / math.sqrt(runs), 0.5 / math.sqrt(count * runs))
    assert abs(float((x > 0).double().mean()) - above) < 4 * spread + 0.01
    assert abs(float(x.mean()) - mean) < (4 * spread + 0.01) * 2.5
    assert float(x.var()) == pytest.approx(variance, rel=0.08)
    plain = sample(field, 2 * count, num_steps=80, batch_size=2 * count, progress=False)
    if powers == (1.0, 1.0):
        assert abs(float((plain > 0).double().mean()) - above) > 0.05
    else:
        assert abs(float(plain.var()) - variance) > 0.08 * variance or abs(float(plain.mean()) - mean) > 0.05


def test_the_evidence_of_a_product_is_its_integral():
    expected = product_at_zero(LEFT, RIGHT)[3]
    field = Product([LEFT, RIGHT])
    found = [
        weighted(field, 1000, num_steps=60, move=make_move(field, num_steps=1, width=0.2), seed=seed, progress=False)
        for seed in range(4)
    ]
    estimates = np.array([one.log_evidence for one in found])
    assert abs(estimates.mean() - expected) < 4 * max(estimates.std(ddof=1), 0.01) / 2
    # A normalised density has none, and a constant factor is found.
    assert weighted(MIXTURE, 2000, num_steps=20, progress=False).log_evidence == pytest.approx(0.0, abs=0.15)
    three = Mixture([MIXTURE], [3.0])
    assert weighted(three, 2000, num_steps=20, progress=False).log_evidence == pytest.approx(math.log(3), abs=0.15)
    scores = weighted(field, 50, num_steps=5, weights="feynman_kac", progress=False)
    assert math.isnan(scores.log_evidence)


def test_what_weighted_returns():
    field = Product([LEFT, RIGHT])
    found = weighted(field, 100, num_steps=20, progress=False, dtype=torch.float64)
    assert found.samples.shape == (100, 1)
    assert found.samples.dtype == torch.float64
    assert found.effective.shape == (20,)
    assert (found.effective <= 100.001).all()
    assert (found.effective >= 1).all()
    assert found.resampled[-1] == 19
    assert found.evaluations == 20
    moved = weighted(field, 100, num_steps=20, move=make_move(field, num_steps=2, num_leapfrog=3), progress=False)
    assert moved.evaluations == 20 + 20 * (1 + 2 * 3)
    always = weighted(field, 100, num_steps=20, threshold=1.1, progress=False)
    assert always.resampled == tuple(range(20))


def test_products_that_are_flat_start_wider():
    """``p^0.3`` of a normal at the noisy end has variance 1 / 0.3."""
    field = tempered(ScoreOnly(GaussianMixture(SCHEDULE, torch.zeros(1, 1), 1.0)), 0.3)
    found = weighted(field, 4000, num_steps=100, denoise=False, progress=False)
    assert float(found.samples.var()) == pytest.approx(1 / 0.3, rel=0.12)


# -- what is refused --------------------------------------------------------------------------------------------------


def test_options_out_of_range_are_refused():
    for name in ("num_steps", "batch_size"):
        for value in (0, 1.5, True):
            with pytest.raises(ProblemError, match=f"{name}="):
                sample(MIXTURE, 10, progress=False, **{name: value})
    with pytest.raises(ProblemError, match="num_samples=0"):
        sample(MIXTURE, 0)
    with pytest.raises(ProblemError, match="method='euler'; choose"):
        sample(MIXTURE, 10, method="euler")
    with pytest.raises(ProblemError, match="eta=2"):
        sample(MIXTURE, 10, method="ddim", eta=2)
    for options, message in (
        ({"eta": 0.5}, "eta=0.5 is not used with method='ancestral'"),
        ({"method": "flow", "num_steps": 5}, "num_steps=5 is not used with method='flow'"),
        ({"method": "ddim", "tolerance": 1e-3}, "tolerance=0.001 is not used with method='ddim'"),
    ):
        with pytest.raises(ProblemError, match=message):
            sample(MIXTURE, 10, progress=False, **options)
    with pytest.raises(ProblemError, match="times go down"):
        reverse_step(MIXTURE, torch.zeros(1, 2), 0.4, 0.5)
    with pytest.raises(ProblemError, match="num_probes=0"):
        flow_log_density(MIXTURE, torch.zeros(1, 2), num_probes=0)


def test_weights_that_the_field_does_not_know_are_refused():
    scores = ScoreOnly(MIXTURE)
    with pytest.raises(ProblemError, match="weights='energy' needs log densities"):
        weighted(Product([scores, scores]), 10, weights="energy")
    with pytest.raises(ProblemError, match="is for a Product of fields; this is a ScoreOnly"):
        weighted(scores, 10)
    with pytest.raises(ProblemError, match="choose one of energy, feynman_kac"):
        weighted(MIXTURE, 10, weights="none")
    with pytest.raises(ProblemError, match="noise has no such density"):
        weighted(Product([scores, scores], [1.0, -1.0]), 10)
    with pytest.raises(ProblemError, match="sampler='nuts'"):
        make_move(MIXTURE, sampler="nuts")


def test_scores_that_are_not_finite_are_named_with_their_time():
    field = FunctionField(SCHEDULE, (2,), lambda z, t: -z if t > 0.5 else z * math.nan)
    for method, options in (("ancestral", {"num_steps": 10}), ("ddim", {"num_steps": 10}), ("flow", {})):
        with pytest.raises(ProblemError, match=r"sample \[0, 0\] is nan at t=0\.\d+"):
            sample(field, 5, method=method, progress=False, **options)
    with pytest.raises(ProblemError, match=r"at t=0\.4"):
        weighted(Product([field, field]), 5, num_steps=10, progress=False)


@pytest.mark.parametrize(
    "schedule",
    [CosineSchedule(-7.0, 6.0), TableSchedule(torch.sigmoid(torch.linspace(7, -6, 30, dtype=torch.float64)))],
    ids=["cosine", "table"],
)
def test_other_schedules_serve_as_well(schedule):
    field = GaussianMixture(schedule, MIXTURE.means, MIXTURE.covariances, MIXTURE.weights)
    x = sample(field, 4000, num_steps=100, batch_size=4000, progress=False)
    assert (x.double().mean(0) - moments(field)[0]).abs().max() < 4 * 0.7 / math.sqrt(4000) + 0.01


def test_boxes_are_filled():
    x = sample(UniformBox(SCHEDULE, [-0.5], [1.5]), 4000, num_steps=150, progress=False)
    assert float(x.mean()) == pytest.approx(0.5, abs=4 * 0.58 / math.sqrt(4000) + 0.01)
    assert float(x.var()) == pytest.approx(4 / 12, rel=0.05)
    assert x.min() > -0.55
    assert x.max() < 1.55


def test_scores_of_another_type_leave_that_of_the_draws():
    schedule = LinearSchedule(-6.0, 5.0)
    field = FunctionField(schedule, (2,), lambda z, t: -z.double())
    for method in METHODS:
        steps = {} if method == "flow" else {"num_steps": 10}
        assert sample(field, 5, method=method, progress=False, **steps).dtype == torch.get_default_dtype()
    found = weighted(Product([field, field]), 20, num_steps=10, progress=False)
    assert found.samples.dtype == torch.get_default_dtype()
