"""Fields of scores: gradients of their densities, closed forms against quadrature, composition, what is refused."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats

from probmodels.errors import ProblemError
from probmodels.guides.schedules import CosineSchedule, LearnedSchedule, LinearSchedule, TableSchedule
from probmodels.scores.closed import GaussianMixture, UniformBox
from probmodels.scores.fields import (
    Conditioned,
    EnergyField,
    Field,
    FunctionField,
    Mixture,
    Product,
    ScoreOnly,
    from_diffusers,
    guided,
    linear_observation,
    negated,
    tempered,
)

SCHEDULE = LinearSchedule(-5.0, 4.0)
TIMES = (0.0, 0.3, 0.71, 1.0)
COVARIANCES = torch.tensor([[[0.3, 0.1], [0.1, 0.2]], [[0.05, -0.02], [-0.02, 0.4]], [[0.2, 0.0], [0.0, 0.1]]])
MIXTURE = GaussianMixture(SCHEDULE, torch.tensor([[0.0, 0.5], [1.0, -0.5], [-0.8, 0.1]]), COVARIANCES, [0.5, 0.2, 0.3])
NARROW = GaussianMixture(SCHEDULE, torch.tensor([[0.2, 0.1], [-0.5, 0.4]]), torch.tensor([[0.2, 0.3], [0.1, 0.1]]))
BOX = UniformBox(SCHEDULE, [-0.2, -1.0], [0.2, 1.0])
ENERGY = EnergyField(SCHEDULE, (2,), lambda z, t: (z**4).sum(-1) / 4 + t * z[:, 0] * z[:, 1])
MATRIX, OBSERVED, NOISE = torch.tensor([[1.0, 0.5]]), torch.tensor([0.7]), 0.3


def log_label(z, t):
    """Log probability of the first component of the mixture."""
    return MIXTURE.components(z, t)[0].log_softmax(-1)[:, 0]


FIELDS = {
    "mixture": MIXTURE,
    "box": BOX,
    "energy": ENERGY,
    "function": FunctionField(
        SCHEDULE, (2,), lambda z, t: -z / (1 + t), log_density=lambda z, t: -(z**2).sum(-1) / (2 + 2 * t)
    ),
    "noise": FunctionField(
        SCHEDULE,
        (2,),
        noise=lambda z, t: z * MIXTURE.scales(t, z)[1],
        log_density=lambda z, t: -(z**2).sum(-1) / 2,
    ),
    "product": Product([MIXTURE, BOX]),
    "powers": Product([MIXTURE, NARROW, BOX], [1.7, -0.4, 0.5]),
    "mixture of fields": Mixture([MIXTURE, BOX, NARROW], [0.2, 1.0, 3.0]),
    "mixture of products": Mixture([Product([MIXTURE, BOX]), NARROW]),
    "conditioned": Conditioned(MIXTURE, log_label, 3.0),
    "conditioned product": Conditioned(Product([MIXTURE, NARROW]), log_label, 0.5),
    "negated": negated(MIXTURE, NARROW, 0.3),
    "tempered": tempered(MIXTURE, 2.5),
    "guided": guided(NARROW, MIXTURE, 1.8),
    "noised bridge": linear_observation(MIXTURE, MATRIX, OBSERVED, NOISE),
    "denoised bridge": linear_observation(MIXTURE, MATRIX, OBSERVED, NOISE, bridge="denoised"),
}


def points(count=40, seed=0, size=2):
    return torch.randn(count, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("t", TIMES)
@pytest.mark.parametrize("name", FIELDS)
def test_scores_are_gradients_of_log_densities(name, t):
    field, z, step = FIELDS[name], points(), 1e-5
    score, log_density = field.score(z, t), field.log_density(z, t)
    assert score.shape == z.shape
    assert log_density.shape == z.shape[:1]
    assert field.has_density
    for axis in range(2):
        shift = step * torch.eye(2, dtype=torch.float64)[axis]
        slope = (field.log_density(z + shift, t) - field.log_density(z - shift, t)) / (2 * step)
        torch.testing.assert_close(score[:, axis], slope, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("name", FIELDS)
def test_evaluations_agree_with_scores_and_densities_and_single_precision_with_double(name):
    field, z = FIELDS[name], points()
    found = field.evaluate(z, 0.4)
    assert found.line is None
    torch.testing.assert_close(found.score, field.score(z, 0.4))
    torch.testing.assert_close(found.known, field.log_density(z, 0.4))
    single = field.evaluate(z.float(), 0.4)
    assert single.score.dtype == torch.float32
    torch.testing.assert_close(single.score.double(), found.score, rtol=2e-4, atol=2e-4)


# -- closed forms -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", TIMES)
def test_noised_mixtures_are_convolutions(t):
    field = GaussianMixture(SCHEDULE, torch.tensor([[0.4], [-1.0]]), torch.tensor([[0.2], [0.05]]), [1.0, 3.0])
    z = points(30, size=1)
    alpha, sigma = (float(value) for value in field.scales(t, z))
    x = np.linspace(-5, 4, 40_001)
    clean = 0.25 * stats.norm.pdf(x, 0.4, math.sqrt(0.2)) + 0.75 * stats.norm.pdf(x, -1.0, math.sqrt(0.05))
    noised = np.trapezoid(clean * stats.norm.pdf(z.numpy(), alpha * x, sigma), x, axis=1)
    np.testing.assert_allclose(field.log_density(z, t).exp(), noised, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("t", TIMES)
def test_noised_boxes_are_convolutions(t):
    field = UniformBox(SCHEDULE, [-0.3], [0.8])
    z = points(30, size=1)
    alpha, sigma = (float(value) for value in field.scales(t, z))
    x = np.linspace(-0.3, 0.8, 40_001)
    noised = np.trapezoid(stats.norm.pdf(z.numpy(), alpha * x, sigma) / 1.1, x, axis=1)
    np.testing.assert_allclose(field.log_density(z, t).exp(), noised, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_boxes_far_out_pull_to_their_nearest_side(dtype):
    """Many sds outside of a side, at distance d, the score is ``-d / sigma^2`` up to the curvature of the tail."""
    field = UniformBox(LinearSchedule(), [-0.2, -1.0], [0.2, 1.0])
    z = torch.tensor([[1.2, -5.0], [-30.0, 1e4], [1e15, -1e25]], dtype=dtype)
    alpha, sigma = field.scales(0.0, z.double())
    side = alpha * torch.tensor([[0.2, -1.0], [-0.2, 1.0], [0.2, -1.0]])
    score = field.score(z, 0.0)
    torch.testing.assert_close(score.double(), -(z.double() - side) / sigma**2, rtol=1e-4, atol=0.0)


def test_symmetric_boxes_have_symmetric_scores_and_none_in_the_middle():
    z = points()
    torch.testing.assert_close(BOX.score(-z, 0.2), -BOX.score(z, 0.2), rtol=1e-10, atol=1e-12)
    assert BOX.score(torch.zeros(1, 2), 0.2).abs().max() < 1e-6


@pytest.mark.parametrize("t", [0.0, 0.6])
@pytest.mark.parametrize("field", [MIXTURE, BOX], ids=["mixture", "box"])
def test_exact_draws_have_the_moments_of_the_density(field, t):
    count = 20_000
    z = field.sample(count, t, generator=torch.Generator().manual_seed(1))
    alpha, sigma = field.scales(t, z)
    if field is MIXTURE:
        mean = field.weights @ field.means
        spread = torch.einsum("k,kij->ij", field.weights, field.covariances) + (
            torch.einsum("k,ki,kj->ij", field.weights, field.means, field.means) - torch.outer(mean, mean)
        )
    else:
        mean, spread = torch.zeros(2).double(), torch.diag((field.high - field.low) ** 2 / 12)
    expected = alpha**2 * spread + sigma**2 * torch.eye(2, dtype=torch.float64)
    assert (z.mean(0) - alpha * mean).abs().max() < 4 * (expected.diagonal().max() / count).sqrt()
    assert (z.T.cov() - expected).abs().max() < 5 * expected.diagonal().max() * math.sqrt(2 / count)
    again = field.sample(count, t, generator=torch.Generator().manual_seed(1))
    assert torch.equal(z, again)


@pytest.mark.parametrize("t", TIMES)
def test_denoised_points_are_posterior_means(t):
    """Tweedie's formula against the mean of ``x | z``, a mixture of components' regressions."""
    z = points()
    alpha, sigma = MIXTURE.scales(t, z)
    logs, means = [], []
    for mean, covariance, weight in zip(MIXTURE.means, MIXTURE.covariances, MIXTURE.weights, strict=True):
        spread = alpha**2 * covariance + sigma**2 * torch.eye(2, dtype=torch.float64)
        logs.append(weight.log() + torch.distributions.MultivariateNormal(alpha * mean, spread).log_prob(z))
        gain = alpha * covariance @ torch.linalg.inv(spread)
        means.append(mean + (z - alpha * mean) @ gain.T)
    share = torch.stack(logs, -1).softmax(-1)
    expected = torch.einsum("nk,nkd->nd", share, torch.stack(means, 1))
    torch.testing.assert_close(MIXTURE.denoise(z, t), expected, rtol=1e-10, atol=1e-10)


def test_posteriors_given_linear_observations_are_those_of_bayes():
    matrix, observed, sd = torch.tensor([[1.0, 0.5], [0.3, -0.2]]), torch.tensor([0.7, 0.1]), 0.3
    posterior, x = MIXTURE.given(matrix, observed, sd), points()

    def log_clean(field):
        parts = torch.distributions.MultivariateNormal(field.means, field.covariances).log_prob(x.unsqueeze(1))
        return (parts + field.weights.log()).logsumexp(-1)

    joint = log_clean(MIXTURE) + torch.distributions.Normal(x @ matrix.double().T, sd).log_prob(observed).sum(-1)
    ratio = joint - log_clean(posterior)  # the log evidence, at all points
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-10, atol=1e-10)
    evidence = sum(
        weight * torch.distributions.MultivariateNormal(
            matrix.double() @ mean, matrix.double() @ covariance @ matrix.double().T + sd**2 * torch.eye(2)
        ).log_prob(observed.double()).exp()
        for mean, covariance, weight in zip(MIXTURE.means, MIXTURE.covariances, MIXTURE.weights, strict=True)
    )  # fmt: skip
    torch.testing.assert_close(ratio[0], evidence.log())
    assert posterior.weights.sum() == pytest.approx(1.0)


# -- composition ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", TIMES)
def test_score_and_gradient_of_a_class_make_the_score_of_its_component(t):
    one = GaussianMixture(SCHEDULE, MIXTURE.means[:1], MIXTURE.covariances[:1])
    z = points()
    torch.testing.assert_close(Conditioned(MIXTURE, log_label).score(z, t), one.score(z, t), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("t", TIMES)
def test_mixtures_of_components_are_the_mixture(t):
    parts = [GaussianMixture(SCHEDULE, MIXTURE.means[[k]], MIXTURE.covariances[[k]]) for k in range(3)]
    field, z = Mixture(parts, MIXTURE.weights.tolist()), points()
    torch.testing.assert_close(field.score(z, t), MIXTURE.score(z, t), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(field.log_density(z, t), MIXTURE.log_density(z, t), rtol=1e-10, atol=1e-10)


def test_products_negations_powers_and_guidance_weigh_log_densities():
    z, t = points(), 0.3
    p, q = MIXTURE.log_density(z, t), NARROW.log_density(z, t)
    torch.testing.assert_close(Product([MIXTURE, NARROW]).log_density(z, t), p + q)
    torch.testing.assert_close(negated(MIXTURE, NARROW, 0.3).log_density(z, t), 1.3 * p - 0.3 * q)
    torch.testing.assert_close(tempered(MIXTURE, 2.5).log_density(z, t), 2.5 * p)
    torch.testing.assert_close(guided(NARROW, MIXTURE, 1.8).log_density(z, t), 1.8 * q - 0.8 * p)
    assert guided(NARROW, MIXTURE, 1.0) is NARROW


def test_what_is_known_and_what_is_integrated_are_kept_apart():
    z, t = points(), 0.3
    scores = ScoreOnly(MIXTURE)
    found = Product([scores, BOX], [2.0, 0.5]).evaluate(z, t)
    torch.testing.assert_close(found.line, 2 * MIXTURE.score(z, t))
    torch.testing.assert_close(found.known, 0.5 * BOX.log_density(z, t))
    torch.testing.assert_close(found.score, found.line + 0.5 * BOX.score(z, t))
    found = Conditioned(scores, log_label, 3.0).evaluate(z, t)
    torch.testing.assert_close(found.line, MIXTURE.score(z, t))
    torch.testing.assert_close(found.known, 3 * log_label(z, t))
    found = Conditioned(Product([scores, BOX]), log_label).evaluate(z, t)
    torch.testing.assert_close(found.known, BOX.log_density(z, t) + log_label(z, t))
    for field in (scores, Product([scores, BOX]), Conditioned(scores, log_label)):
        assert not field.has_density
        with pytest.raises(ProblemError, match="knows scores but no log density"):
            field.log_density(z, t)


def test_bridges_end_at_the_posterior():
    """With little noise at level 0, both densities are proportional there to that of the posterior."""
    schedule = LinearSchedule(-18.0, 4.0)
    prior = GaussianMixture(schedule, MIXTURE.means, MIXTURE.covariances, MIXTURE.weights)
    exact = prior.given(MATRIX, OBSERVED, NOISE).log_density(points(), 0.0)
    for bridge in ("noised", "denoised"):
        found = linear_observation(prior, MATRIX, OBSERVED, NOISE, bridge=bridge).log_density(points(), 0.0)
        difference = found - exact
        assert (difference - difference.mean()).abs().max() < 1e-4


def test_the_denoised_bridge_is_exact_for_one_normal_of_unit_variance():
    """Equation 7 of Song et al. (2023): then it is the noised posterior's density at all times."""
    prior = GaussianMixture(SCHEDULE, torch.zeros(1, 2), 1.0)
    posterior = prior.given(MATRIX, OBSERVED, NOISE)
    z = points()
    for t in TIMES:
        found = linear_observation(prior, MATRIX, OBSERVED, NOISE, bridge="denoised").score(z, t)
        torch.testing.assert_close(found, posterior.score(z, t), rtol=1e-6, atol=1e-8)


def test_images_are_data_too():
    shape = (1, 2, 3)
    normal = EnergyField(SCHEDULE, shape, lambda z, t: (z**2).flatten(1).sum(-1) / 2)
    z = torch.randn(5, *shape, dtype=torch.float64)
    field = linear_observation(Product([normal, tempered(normal, 0.5)]), torch.ones(1, 6), torch.tensor([2.0]), 0.1)
    assert field.score(z, 0.2).shape == z.shape
    assert Mixture([normal, tempered(normal, 2.0)]).score(z, 0.2).shape == z.shape


# -- networks ---------------------------------------------------------------------------------------------------------


class Predictor:
    """A substitute for a network of diffusers: predicts the noise of the mixture and records the steps asked for."""

    def __init__(self, table):
        self.field = GaussianMixture(TableSchedule(table), MIXTURE.means, MIXTURE.covariances, MIXTURE.weights)
        self.steps, self.given = [], {}

    def __call__(self, z, timestep, **given):
        self.steps.append(timestep)
        self.given = given
        t = timestep / 99
        return SimpleNamespace(sample=-self.field.scales(t, z)[1] * self.field.score(z, t))


def test_networks_of_diffusers_become_fields():
    table = torch.cumprod(1 - torch.linspace(1e-3, 0.1, 100, dtype=torch.float64), 0)
    network = Predictor(table)
    scheduler = SimpleNamespace(alphas_cumprod=table, config=SimpleNamespace(prediction_type="epsilon"))
    field, z = from_diffusers(network, scheduler, (2,), label=3), points()
    torch.testing.assert_close(field.score(z, 1.0), network.field.score(z, 1.0))
    torch.testing.assert_close(field.score(z, 10 / 99), network.field.score(z, 10 / 99))
    assert network.steps == [pytest.approx(99.0), pytest.approx(10.0)]
    assert network.given == {"label": 3}
    alpha, sigma = field.scales(10 / 99, z)
    torch.testing.assert_close(alpha**2, table[10])
    torch.testing.assert_close(sigma**2, 1 - table[10])
    with pytest.raises(ProblemError, match="v_prediction"):
        from_diffusers(
            network, SimpleNamespace(alphas_cumprod=table, config=SimpleNamespace(prediction_type="v_prediction")), (2,)
        )


def test_fields_of_learned_schedules_take_their_precision():
    field = GaussianMixture(LearnedSchedule(-5.0, 4.0), MIXTURE.means, MIXTURE.covariances)
    alpha, sigma = field.scales(0.5, points())
    assert alpha.dtype == torch.float64
    assert float(alpha**2 + sigma**2) == pytest.approx(1.0, abs=1e-6)
    assert not field.score(points(), 0.5).requires_grad


# -- what is refused --------------------------------------------------------------------------------------------------


def refused(text, make, *args, **options):
    with pytest.raises(ProblemError, match=text):
        make(*args, **options)


def test_compositions_that_make_no_sense_are_refused():
    other = GaussianMixture(CosineSchedule(-5.0, 4.0), MIXTURE.means, MIXTURE.covariances)
    wide = UniformBox(SCHEDULE, [0.0] * 3, [1.0] * 3)
    refused("field 1 has another noise schedule than field 0: gamma differs by", Product, [MIXTURE, other])
    refused(r"field 1 is of data \(3,\) and field 0 of \(2,\)", Product, [MIXTURE, wide])
    refused("there is no field", Product, [])
    refused("3 weights for 2 fields", Product, [MIXTURE, BOX], [1, 2, 3])
    refused("weight 1 is 0", Product, [MIXTURE, BOX], [1.0, 0.0])
    refused("weight=0 of a likelihood", Conditioned, MIXTURE, log_label, 0.0)
    for weight in (math.nan, math.inf):
        refused("weights must be finite numbers", Product, [MIXTURE, BOX], [1.0, weight])
        refused("weight=", Conditioned, MIXTURE, log_label, weight)
    refused("fields=", Product, [MIXTURE, "box"])
    refused("weights must be finite numbers", Product, [MIXTURE, BOX], ["one", "two"])
    refused("they must be positive", Mixture, [MIXTURE, BOX], [1.0, -1.0])
    refused("field 1 of the mixture, a ScoreOnly, has no log density", Mixture, [MIXTURE, ScoreOnly(BOX)])
    refused("weight 0 is 0", tempered, MIXTURE, 0.0)
    refused("weight 1 is -?0", negated, MIXTURE, BOX, 0.0)
    # Tables and functions of the same curve go together.
    table = torch.sigmoid(-SCHEDULE.gamma(torch.linspace(0, 1, 11, dtype=torch.float64)))
    Product([MIXTURE, GaussianMixture(TableSchedule(table), MIXTURE.means, 0.1)])


def test_closed_forms_with_wrong_shapes_are_refused():
    means = MIXTURE.means
    refused("means of shape", GaussianMixture, SCHEDULE, means[0], 1.0)
    refused("covariances of shape", GaussianMixture, SCHEDULE, means, COVARIANCES[:2])
    refused("give 3 that are not negative", GaussianMixture, SCHEDULE, means, 1.0, [1.0, 1.0])
    refused("give 3 that are not negative", GaussianMixture, SCHEDULE, means, 1.0, [1.0, -1.0, 1.0])
    refused("give 3 that are not negative", GaussianMixture, SCHEDULE, means, 1.0, [0.0, 0.0, 0.0])
    refused("eigenvalue of -1", GaussianMixture, SCHEDULE, means, -torch.eye(2).expand(3, 2, 2))
    refused("low below high", UniformBox, SCHEDULE, [0.0, 1.0], [1.0, 1.0])
    refused("low below high", UniformBox, SCHEDULE, [0.0], [1.0, 1.0])


def test_components_of_weight_zero_are_absent():
    field = GaussianMixture(SCHEDULE, MIXTURE.means, COVARIANCES, [1.0, 0.0, 0.0])
    one = GaussianMixture(SCHEDULE, MIXTURE.means[:1], COVARIANCES[:1])
    torch.testing.assert_close(field.score(points(), 0.2), one.score(points(), 0.2))


def test_functions_that_return_something_else_are_refused_with_the_time():
    wrong = FunctionField(SCHEDULE, (2,), lambda z, t: z[:, :1])
    refused(r"the score at t=0.25 is \(40, 1\) for points \(40, 2\)", wrong.score, points(), 0.25)
    listed = FunctionField(SCHEDULE, (2,), noise=lambda z, t: z.tolist())
    refused("the score at t=0.5 is list", listed.score, points(), 0.5)
    refused("either score or noise", FunctionField, SCHEDULE, (2,))
    refused("either score or noise", FunctionField, SCHEDULE, (2,), lambda z, t: z, noise=lambda z, t: z)
    refused("lies outside", MIXTURE.score, points(), 1.5)
    refused("lies outside", MIXTURE.score, points(), math.nan)


def test_observations_that_do_not_fit_are_refused():
    matrix, observed = torch.ones(1, 2), torch.ones(1)
    refused("for data of 2 numbers", linear_observation, MIXTURE, torch.ones(1, 3), observed, 0.1)
    refused("for data of 2 numbers", linear_observation, MIXTURE, matrix, torch.ones(2), 0.1)
    for sd in (0.0, -1.0, math.nan, math.inf):
        refused("sd=", linear_observation, MIXTURE, matrix, observed, sd)
    refused("leave out what is missing", linear_observation, MIXTURE, matrix, torch.tensor([math.nan]), 0.1)
    refused("choose one of noised, denoised", linear_observation, MIXTURE, matrix, observed, 0.1, bridge="none")


def test_a_new_field_gives_a_score_or_an_evaluation():
    class Normal(Field):
        has_density = True

        def score(self, z, t):
            return -z

        def log_density(self, z, t):
            return -(z**2).sum(-1) / 2

    found = Normal(SCHEDULE, [2]).evaluate(points(), 0.1)
    assert found.line is None
    assert torch.equal(found.score, -points())
    torch.testing.assert_close(
        Product([Normal(SCHEDULE, (2,)), MIXTURE]).score(points(), 0.1), MIXTURE.score(points(), 0.1) - points()
    )
