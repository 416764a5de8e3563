"""Diffusion against closed forms: Gaussian conditionals, and a mixture whose exact denoiser is known."""

from __future__ import annotations

import copy
import itertools
import math
from functools import partial
from typing import Any

import numpy as np
import pyro
import pytest
import torch
import xarray as xr
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn

from probmodels import Problem, fit_svi
from probmodels.datasets.images import make_images
from probmodels.diffusion import Diffusion, make_problem
from probmodels.diffusion.fitted import NetworkField, bound, make_field, terms as bound_terms
from probmodels.errors import DataError, ProblemError
from probmodels.guides.diffusion import PREDICTIONS, NoisingGuide, Stratified, convert, transition
from probmodels.guides.nets import GradientNetwork, LevelEmbedding, ResidualMLP, UNet
from probmodels.guides.schedules import CosineSchedule, LearnedSchedule, LinearSchedule, NoiseSchedule
from probmodels.inference.programs.programs import fitted
from probmodels.inference.variational.losses import SampledBound
from probmodels.scores.closed import GaussianMixture

ENDS = (-13.3, 6.0)
SD = 0.1
ANGLES = torch.arange(8, dtype=torch.float64) * math.pi / 4
MEANS = torch.stack([ANGLES.cos(), ANGLES.sin()], -1)
NUM_ERRORS = 4.0  # standard errors that a mean may be off


@pytest.fixture(autouse=True)
def own_parameters() -> None:
    """Parameters of a module that is called as a program go to pyro's store."""
    pyro.clear_param_store()
    torch.manual_seed(0)


class Exact(nn.Module):
    """Posterior mean of a datum of the mixture given its noised form, as one of the predictions."""

    def __init__(self, prediction: str = "velocity") -> None:
        super().__init__()
        self.prediction = prediction

    def forward(self, z: Tensor, level: Tensor, label: Tensor | None = None) -> Tensor:
        gamma = (ENDS[0] + (ENDS[1] - ENDS[0]) * level).unsqueeze(-1)
        alpha, sigma = torch.sigmoid(-gamma).sqrt(), torch.sigmoid(gamma).sqrt()
        variance = alpha**2 * SD**2 + sigma**2
        away = z.unsqueeze(1) - alpha.unsqueeze(-1) * MEANS.to(z)  # (row, component, 2)
        share = (-0.5 * away.square().sum(-1) / variance).softmax(-1).unsqueeze(-1)
        x0 = (share * (MEANS.to(z) + (alpha * SD**2 / variance).unsqueeze(-1) * away)).sum(1)
        return convert(x0, "x0", self.prediction, z, alpha, sigma)


def mixture(schedule: NoiseSchedule | None = None) -> GaussianMixture:
    return GaussianMixture(LinearSchedule(*ENDS) if schedule is None else schedule, MEANS, SD**2)


def exact_model(schedule: NoiseSchedule | None = None, **options: Any) -> Diffusion:
    return Diffusion(LinearSchedule(*ENDS) if schedule is None else schedule, Exact(), (2,), **options)


def bent() -> LearnedSchedule:
    """A learned schedule far from a line."""
    schedule = LearnedSchedule(*ENDS, hidden=8).double()
    with torch.no_grad():
        schedule.weights.add_(torch.linspace(8.0, 0.0, 8, dtype=torch.float64))
    return schedule


def points(num_rows: int, seed: int = 0) -> Tensor:
    """Draws (row, 2) of the mixture."""
    return mixture().sample(num_rows, generator=torch.Generator().manual_seed(10_000 + seed))  # not the noise's


def terms(model: Diffusion, x: Tensor, repeats: int) -> Tensor:
    """Minus the bound (repeat, row) by sampled times."""
    found = []
    with torch.no_grad():
        for _ in range(repeats):
            time = ((torch.rand(()) + torch.arange(len(x), dtype=x.dtype) / len(x)) % 1.0)[torch.randperm(len(x))]
            gamma = model.schedule.gamma(x.new_zeros(()))
            z = torch.sigmoid(-gamma).sqrt() * x + torch.sigmoid(gamma).sqrt() * torch.randn_like(x)
            steps = model.diffusion_term(x, torch.randn_like(x), time, None)
            found.append(model.prior_term(x) + steps - model.likelihood(z).log_prob(x))
    return torch.stack(found)


def step_sum(model: Diffusion, x: Tensor, repeats: int) -> Tensor:
    """Minus the bound (repeat,) as the sum over all steps of the KL divergences as they are written in the paper."""
    steps, schedule, found = model.num_steps, model.schedule, []
    assert steps is not None
    times = torch.linspace(0.0, 1.0, steps + 1, dtype=x.dtype)
    with torch.no_grad():
        gammas = schedule.gamma(times)
        ratio = (-gammas).exp()
        for _ in range(repeats):
            gamma = gammas[0]
            z = torch.sigmoid(-gamma).sqrt() * x + torch.sigmoid(gamma).sqrt() * torch.randn_like(x)
            total = model.prior_term(x) - model.likelihood(z).log_prob(x)
            for step in range(1, steps + 1):
                gamma = gammas[step]
                z = torch.sigmoid(-gamma).sqrt() * x + torch.sigmoid(gamma).sqrt() * torch.randn_like(x)
                clean = model.predict(z, gamma.expand(len(x)), None, "x0")
                total = total + 0.5 * (ratio[step - 1] - ratio[step]) * (x - clean).square().sum(-1)
            found.append(total.mean())
    return torch.stack(found)


def agree(one: Tensor, other: Tensor) -> bool:
    """Whether the means of two independent samples are equal within Monte Carlo error."""
    error = (one.var() / len(one) + other.var() / len(other)).sqrt()
    return bool((one.mean() - other.mean()).abs() < NUM_ERRORS * error)


# -- the process ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "wanted"), list(itertools.product(PREDICTIONS, repeat=2)))
def test_predictions_convert_back_and_forth(given: str, wanted: str) -> None:
    x, noise = torch.randn(2, 5, 3, dtype=torch.float64)
    gamma = torch.linspace(-5.0, 5.0, 5, dtype=torch.float64).unsqueeze(-1)
    alpha, sigma = torch.sigmoid(-gamma).sqrt(), torch.sigmoid(gamma).sqrt()
    z = alpha * x + sigma * noise
    known = {"noise": noise, "x0": x, "score": -noise / sigma, "velocity": alpha * noise - sigma * x}
    found = convert(known[given], given, wanted, z, alpha, sigma)
    torch.testing.assert_close(found, known[wanted], rtol=1e-10, atol=1e-10)
    other = torch.randn_like(x)  # of a network, which is no true one
    there = convert(other, given, wanted, z, alpha, sigma)
    torch.testing.assert_close(convert(there, wanted, given, z, alpha, sigma), other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("s", "t"), [(0.0, 0.05), (0.2, 0.9), (0.5, 0.500001)])
def test_transitions_are_conditionals_of_the_joint_normal(s: float, t: float) -> None:
    schedule = CosineSchedule(-6.0, 5.0)
    early, late = (torch.tensor(value, dtype=torch.float64) for value in (s, t))
    x, z = torch.randn(2, 4, 3, dtype=torch.float64)
    alpha_s, alpha_t = schedule.alpha(early), schedule.alpha(late)
    # z_t = (alpha_t / alpha_s) z_s + independent noise, so that their covariance is the share of the variance of z_s.
    covariance = alpha_t / alpha_s * schedule.sigma(early) ** 2
    gain = covariance / schedule.sigma(late) ** 2
    mean, sd = transition(schedule, z, x, late, early)
    torch.testing.assert_close(mean, alpha_s * x + gain * (z - alpha_t * x), rtol=1e-9, atol=1e-9)
    assert float(sd**2) == pytest.approx(float(schedule.sigma(early) ** 2 - gain * covariance), rel=1e-6)


def test_stratified_draws_are_even_and_each_is_uniform() -> None:
    unit = Stratified(torch.tensor(0.0), torch.tensor(1.0))
    draws = unit.expand([8]).rsample(torch.Size([2000]))
    assert ((draws * 8).floor().sort(-1).values == torch.arange(8.0)).all()
    assert float((draws[:, 3].mean() - 0.5).abs()) < NUM_ERRORS * math.sqrt(1 / 12 / 2000)
    assert unit.sample().shape == ()
    assert float(unit.log_prob(torch.tensor(0.3))) == 0.0


def test_the_denoiser_of_the_tests_is_the_one_of_the_scores() -> None:
    z = torch.randn(6, 2, dtype=torch.float64)
    for t in (0.1, 0.5, 0.9):
        level = torch.full((6,), t, dtype=torch.float64)
        torch.testing.assert_close(Exact("x0")(z, level), mixture().denoise(z, t), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(Exact("score")(z, level), mixture().score(z, t), rtol=1e-8, atol=1e-8)


# -- the bound --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [None, 7])
def test_losses_of_all_predictions_are_one(num_steps: int | None) -> None:
    class Wrong(Exact):
        """A denoiser with an error that depends on the point, as a network has one."""

        def forward(self, z: Tensor, level: Tensor, label: Tensor | None = None) -> Tensor:
            gamma = (ENDS[0] + (ENDS[1] - ENDS[0]) * level).unsqueeze(-1)
            alpha, sigma = torch.sigmoid(-gamma).sqrt(), torch.sigmoid(gamma).sqrt()
            return convert((3 * z).sin(), "velocity", self.prediction, z, alpha, sigma)

    x, noise = points(50), torch.randn(50, 2, dtype=torch.float64)
    time = torch.rand(50, dtype=torch.float64)
    found = {}
    for prediction in PREDICTIONS:
        model = Diffusion(LinearSchedule(*ENDS), Wrong(prediction), (2,), prediction=prediction, num_steps=num_steps)
        model.range = ENDS[0], ENDS[1] - ENDS[0]  # in double precision
        found[prediction] = model.diffusion_term(x, noise, time, None)
    for value in found.values():
        torch.testing.assert_close(value, found["noise"], rtol=1e-8, atol=1e-8)


def test_the_prior_term_is_the_divergence_of_normals() -> None:
    x = points(5)
    gamma = torch.tensor(ENDS[1], dtype=torch.float64)
    last = torch.distributions.Normal(torch.sigmoid(-gamma).sqrt() * x, torch.sigmoid(gamma).sqrt())
    exact = torch.distributions.kl_divergence(last, torch.distributions.Normal(torch.zeros_like(x), 1.0)).sum(-1)
    torch.testing.assert_close(exact_model().prior_term(x), exact)


@pytest.mark.parametrize(("num_steps", "published"), [(10, 19.4), (50, 2.45)])
def test_the_chain_of_sites_has_the_bound_of_the_paper(num_steps: int, published: float) -> None:
    x = points(200)
    model = exact_model(num_steps=num_steps, explicit=True)
    guide = NoisingGuide(model.schedule, (2,), model.encode, num_steps)
    exact = step_sum(model, x, 20)
    repeats = 12
    analytic, sampled = (
        torch.tensor([kind().loss(model, guide, x) / len(x) for _ in range(repeats)], dtype=torch.float64)
        for kind in (TraceMeanField_ELBO, Trace_ELBO)
    )
    assert agree(analytic, exact)
    assert agree(sampled, exact)
    # Data of another draw: the bound differs by as much as 200 points say.
    assert float(exact.mean()) == pytest.approx(published, abs=0.1 * published)


def test_sampled_times_are_unbiased_for_the_chain() -> None:
    x = points(400)
    exact = step_sum(exact_model(num_steps=10), x, 20)
    collapsed = exact_model(num_steps=10)
    guide = NoisingGuide(collapsed.schedule, (2,), collapsed.encode, None)
    loss = SampledBound()
    found = torch.tensor([loss.loss(collapsed, guide, x) / len(x) for _ in range(100)], dtype=torch.float64)
    assert agree(found, exact)
    assert float(found.std() / 10) < 0.25  # of 19.4, so that a wrong factor of time would be seen
    trace = poutine.trace(guide).get_trace(x)
    assert {"time", "noise", "noise_0"} <= set(trace.nodes)


def test_the_bound_tends_to_the_exact_likelihood() -> None:
    x = points(5000)
    exact = -mixture().log_density(x, 0.0)
    assert float(exact.mean()) == pytest.approx(0.318, abs=NUM_ERRORS * float(exact.std()) / math.sqrt(len(x)) + 1e-3)
    found = [terms(exact_model(num_steps=steps), x, 30).mean(1) - exact.mean() for steps in (50, 200, 1000)]
    found.append(terms(exact_model(), x, 150).mean(1) - exact.mean())
    gaps = [float(gap.mean()) for gap in found]
    errors = [float(gap.std()) / math.sqrt(len(gap)) for gap in found]
    assert gaps[0] > gaps[1] > gaps[2] > gaps[3] - NUM_ERRORS * math.hypot(errors[2], errors[3])
    assert gaps[1] > 0.3  # where 1000 steps come within 0.15
    assert gaps[2] < 0.15 + NUM_ERRORS * errors[2]
    assert abs(gaps[3]) < 0.05 + NUM_ERRORS * errors[3]
    assert errors[3] < 0.02


def test_the_bound_in_continuous_time_does_not_depend_on_the_schedule() -> None:
    x = points(5000)
    linear, cosine, learned = (
        terms(exact_model(schedule), x, 60) for schedule in (LinearSchedule(*ENDS), CosineSchedule(*ENDS), bent())
    )
    for other in (cosine, learned):
        assert agree(other.mean(1), linear.mean(1))
        assert float(other.var()) != pytest.approx(float(linear.var()), rel=0.05)
    # In discrete time it does.
    few = [terms(exact_model(schedule, num_steps=20), x, 4).mean() for schedule in (LinearSchedule(*ENDS), bent())]
    assert float(abs(few[0] - few[1])) > 0.5


def test_the_interior_of_a_learned_schedule_has_the_gradient_of_the_variance() -> None:
    class Plain(NoiseSchedule):
        """The same curve, differentiated as it stands."""

        def __init__(self, of: LearnedSchedule) -> None:
            super().__init__()
            self.of = of

        def gamma(self, t: Tensor) -> Tensor:
            return self.of.gamma(t)

    x, noise = points(30), torch.randn(30, 2, dtype=torch.float64)
    time = torch.rand(30, dtype=torch.float64)
    schedule = bent()
    net = ResidualMLP((2,), hidden=8, blocks=1).double()
    nn.init.normal_(net.write.weight)
    inside, weights = list(schedule.parameters()), [net.write.weight, net.read.weight]

    def loss(kind: NoiseSchedule) -> Tensor:
        return Diffusion(kind, net, (2,)).diffusion_term(x, noise, time, None)

    torch.testing.assert_close(loss(schedule), loss(Plain(schedule)))
    found = torch.autograd.grad(loss(schedule).sum(), inside + weights)
    squared = torch.autograd.grad(loss(Plain(schedule)).square().sum(), inside)
    plain = torch.autograd.grad(loss(Plain(schedule)).sum(), weights)
    for one, other in zip(found, (*squared, *plain), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-7)


def test_a_learned_schedule_lowers_the_variance_at_an_equal_bound() -> None:
    x = points(5000)
    schedule = LearnedSchedule(*ENDS)
    model = exact_model(schedule)
    guide = NoisingGuide(schedule, (2,), model.encode, None)
    data = {"args": (x.float(),), "batch_plates": ("data",), "transient": ("noise", "noise_0")}
    problem = Problem("exact", model, guide, loss=SampledBound(), **data)
    options: dict[str, Any] = {"batch_size": 512, "num_samples": 2, "progress": False, "compile": "eager"}
    result = fit_svi(problem, num_steps=300, lr=0.05, lr_decay=0.05, keep="average", **options)
    with fitted(problem, result.guide_state or {}, seed=0) as (model, _):
        found = copy.deepcopy(model.schedule).double()
    learned, linear = terms(exact_model(found), x, 60), terms(exact_model(), x, 60)
    assert agree(learned.mean(1), linear.mean(1))
    # No schedule of these ends comes below 0.56, which the optimal density of levels has.
    assert 0.5 < float(learned.var()) / float(linear.var()) < 0.8


# -- images of few values ---------------------------------------------------------------------------------------------


def pixels(num_rows: int, num_values: int, seed: int = 0) -> xr.Dataset:
    rng = np.random.default_rng(seed)
    values = rng.integers(num_values, size=(num_rows, 2, 3))
    return make_images(values / (num_values - 1), rng.integers(2, size=num_rows), threshold=None)


@pytest.mark.parametrize("gamma", [-13.0, -5.0, 0.0])
def test_the_likelihood_of_values_sums_to_one(gamma: float) -> None:
    model = Diffusion(LinearSchedule(gamma, 5.0), nn.Identity(), (1,), num_values=5)
    z = torch.linspace(-3.0, 3.0, 7, dtype=torch.float64).unsqueeze(-1)
    table = torch.stack([model.likelihood(z).log_prob(torch.full_like(z, k)) for k in range(5)], -1)
    torch.testing.assert_close(table.exp().sum(-1), torch.ones(7, dtype=torch.float64))
    values = torch.arange(5.0, dtype=torch.float64).unsqueeze(-1)
    assert model.encode(values).flatten().tolist() == pytest.approx([-0.8, -0.4, 0.0, 0.4, 0.8])
    torch.testing.assert_close(model.decode(model.encode(values) + 0.1), values)
    # The density of z around each value decides, which are what the weights are made of.
    centre = z / torch.sigmoid(torch.tensor(-gamma, dtype=torch.float64)).sqrt()
    normal = torch.distributions.Normal(model.encode(values).flatten(), math.exp(gamma / 2))
    torch.testing.assert_close(table, normal.log_prob(centre).log_softmax(-1))


def test_bits_per_dim_of_uniform_pixels_are_those_of_their_number() -> None:
    # A network of values starts at zero, as the exact denoiser of uniform pixels: the bound is tight, for any data.
    problem = make_problem(pixels(400, 4), hidden=4, blocks=1, num_values=4, prediction="values", gamma=(-9.0, 8.0))
    result = fit_svi(problem, num_steps=1, lr=1e-12, num_samples=2, progress=False, compile="eager")
    found = np.array([bound(problem, result, num_draws=50, seed=seed).attrs["bits_per_dim"] for seed in range(8)])
    error = found.std(ddof=1) / math.sqrt(8)
    assert error < 0.01
    assert found.mean() == pytest.approx(2.0, abs=NUM_ERRORS * error + 1e-3)


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_problem(pixels(30, 5), hidden=8, blocks=1, num_values=5, prediction="values", conditional=True)
    model, guide = problem.programs()
    with torch.no_grad():
        drawn = poutine.trace(guide).get_trace(*problem.args)

        def scores() -> list[Tensor]:
            trace = poutine.trace(poutine.replay(model, trace=drawn)).get_trace(*problem.args)
            trace.compute_log_prob()
            return [trace.nodes[name]["log_prob"] for name in ("steps", "observation")]

        whole, exact_terms = scores(), bound_terms(model, *problem.args, num_draws=2)
        monkeypatch.setattr(
            "probmodels.diffusion.model._NUMBERS", 4 * math.prod(model.shape) * 5
        )  # four rows of thirty
        for found, exact in zip(scores(), whole, strict=True):
            torch.testing.assert_close(found, exact)
        xr.testing.assert_allclose(bound_terms(model, *problem.args, num_draws=2), exact_terms, rtol=1e-4)
        likelihood = model.likelihood(torch.zeros(30, *model.shape))
        assert likelihood.sample().shape == (30, *model.shape)
        assert likelihood.expand((2, 30)).sample((3,)).shape == (3, 2, 30, *model.shape)


def test_a_network_of_values_is_the_posterior_mean_of_a_pixel() -> None:
    prior = torch.tensor([0.7, 0.1, 0.2], dtype=torch.float64)

    class Constant(nn.Module):
        def forward(self, z: Tensor, level: Tensor, label: Tensor | None = None) -> Tensor:
            return prior.log().expand(*z.shape, 3)

    model = Diffusion(LinearSchedule(-5.0, 5.0), Constant(), (2,), num_values=3, prediction="values")
    z, gamma = torch.randn(4, 2, dtype=torch.float64), torch.linspace(-4.0, 4.0, 4, dtype=torch.float64)
    alpha, sigma = torch.sigmoid(-gamma).sqrt()[:, None, None], torch.sigmoid(gamma).sqrt()[:, None, None]
    values = torch.tensor([-2 / 3, 0.0, 2 / 3], dtype=torch.float64)
    joint = prior * torch.distributions.Normal(alpha * values, sigma).log_prob(z.unsqueeze(-1)).exp()
    mean = (joint * values).sum(-1) / joint.sum(-1)
    torch.testing.assert_close(model.predict(z, gamma, None, "x0"), mean)
    noise = (z - alpha.squeeze(-1) * mean) / sigma.squeeze(-1)
    torch.testing.assert_close(model.predict(z, gamma, None, "noise"), noise)

    # Its loss is that of a network that predicts this mean.
    class Mean(nn.Module):
        def forward(self, z: Tensor, level: Tensor, label: Tensor | None = None) -> Tensor:
            return model.predict(z, -5.0 + 10.0 * level, None, "x0")

    other = Diffusion(LinearSchedule(-5.0, 5.0), Mean(), (2,), num_values=3, prediction="x0")
    x, time = model.encode(torch.tensor([[0.0, 2.0]], dtype=torch.float64)).expand(4, 2), gamma / 10 + 0.5
    one, two = (m.diffusion_term(x, torch.full_like(z, 0.3), time, None) for m in (model, other))
    torch.testing.assert_close(one, two)


# -- labels, networks -------------------------------------------------------------------------------------------------


def test_labels_are_dropped_as_often_as_asked() -> None:
    seen: list[Tensor] = []

    class Watch(nn.Module):
        def forward(self, z: Tensor, level: Tensor, label: Tensor) -> Tensor:
            seen.append(label)
            return torch.zeros_like(z)

    data, label = torch.zeros(4000, 1), torch.arange(4000) % 3
    model = Diffusion(LinearSchedule(), Watch(), (1,), num_classes=3, label_dropout=0.25)
    guide = NoisingGuide(model.schedule, (1,), model.encode, None, ("label_shown",))
    SampledBound().loss(model, guide, data, label)
    dropped = seen[0].sum(-1) == 0
    assert float((dropped.float().mean() - 0.25).abs()) < NUM_ERRORS * math.sqrt(0.25 * 0.75 / 4000)
    kept = torch.nn.functional.one_hot(label[~dropped], 3).float()
    torch.testing.assert_close(seen[0][~dropped], kept)
    always = Diffusion(LinearSchedule(), Watch(), (1,), num_classes=3)
    assert "label_shown" not in poutine.trace(always).get_trace(data, label).nodes
    assert (seen[-1].sum(-1) == 1).all()
    found = always.indicators(torch.tensor([-1, 2]), data)
    assert found is not None
    assert found.tolist() == [[0, 0, 0], [0, 0, 1]]  # a negative class is not known


@pytest.mark.parametrize("shape", [(5, 7), (2, 5, 3), (1, 8, 8), (1, 1)])
@pytest.mark.parametrize("num_outputs", [None, 4])
@pytest.mark.parametrize("kind", [ResidualMLP, UNet])
def test_networks_keep_shapes_and_start_at_zero(kind: Any, shape: tuple[int, ...], num_outputs: int | None) -> None:
    net = kind(shape, hidden=6, num_classes=3, num_outputs=num_outputs, dropout=0.1)
    z, level, label = torch.randn(3, *shape), torch.rand(3), torch.eye(3)
    found = net(z, level, label)
    assert found.shape == (3, *shape, *([] if num_outputs is None else [num_outputs]))
    assert (found == 0).all()
    for parameter in net.write.parameters():
        nn.init.normal_(parameter)
    net.eval()
    found = net(z, level, label)
    assert found.isfinite().all()
    assert not torch.allclose(found, net(z, 1 - level, label))  # told the level
    assert not torch.allclose(found, net(z, level, label.flip(0)))  # and the class
    # Rows do not see each other.
    torch.testing.assert_close(net(z[1:2], level[1:2], label[1:2]), found[1:2], rtol=1e-4, atol=1e-4)


def test_networks_take_points_and_fine_detail() -> None:
    net = ResidualMLP((3,), hidden=8, frequencies=2)
    assert net.read.in_features == 3 * 5
    assert net(torch.randn(4, 3), torch.rand(4)).shape == (4, 3)
    told = LevelEmbedding(8, 2)
    level = torch.rand(3)
    torch.testing.assert_close(told(level), told(level, torch.zeros(3, 2)))  # no class, as one that is not known


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_densities_of_gradient_networks_have_the_scores_that_are_predicted(prediction: str) -> None:
    inner = ResidualMLP((2,), hidden=8, blocks=1)
    torch.nn.init.normal_(inner.write.weight)
    schedule = LinearSchedule(-2.0, 3.0)
    model = Diffusion(schedule, GradientNetwork(inner).double(), (2,), prediction=prediction)
    field = NetworkField(model)
    z = torch.randn(6, 2, dtype=torch.float64)
    found = field.evaluate(z, 0.3)
    assert found.line is None
    torch.testing.assert_close(found.score, field.score(z, 0.3))
    torch.testing.assert_close(found.known, field.log_density(z, 0.3))
    step = 1e-5 * torch.eye(2, dtype=torch.float64)
    rises = [field.log_density(z + one, 0.3) - field.log_density(z - one, 0.3) for one in step]
    torch.testing.assert_close(torch.stack(rises, -1) / 2e-5, found.score, rtol=1e-6, atol=1e-7)


def test_gradient_networks_are_fitted_through_their_derivative() -> None:
    problem = make_problem(table(), hidden=32, blocks=1, gamma=(-8.0, 5.0), energy=True)
    options: dict[str, Any] = {"num_samples": 2, "progress": False, "batch_size": 128}
    start = bound(problem, fit_svi(problem, num_steps=1, lr=1e-12, **options))
    fits = [fit_svi(problem, num_steps=100, lr=0.005, compile=kind, **options) for kind in ("graph", "eager")]
    np.testing.assert_allclose(*[fit.tree["fit"]["loss"][:20] for fit in fits], rtol=1e-4)
    after = bound(problem, fits[0])
    gain = start.attrs["nats_per_datum"] - after.attrs["nats_per_datum"]
    assert gain > 6 * math.hypot(start.attrs["nats_error"], after.attrs["nats_error"])
    assert make_field(fits[0]).has_density


def test_fields_take_other_schedules_of_the_same_levels() -> None:
    model = Diffusion(LinearSchedule(*ENDS), Exact(), (2,))
    model.network.register_parameter("unused", nn.Parameter(torch.zeros(1, dtype=torch.float64)))
    cosine, z = CosineSchedule(-10.0, 4.0), points(9)
    found = NetworkField(model, None, cosine).score(z, 0.4)
    # Ends of gamma, by which the network is told its level, are single numbers of 32 bits.
    torch.testing.assert_close(found, mixture(cosine).score(z, 0.4), rtol=1e-5, atol=1e-6)
    with pytest.raises(ProblemError, match=r"fitted between -13\.3 and 6; stay within"):
        NetworkField(model, None, LinearSchedule(-13.0, 7.0))


def test_outputs_of_an_image_belong_to_their_pixels() -> None:
    net = UNet((2, 4, 4), hidden=4, num_outputs=3)
    with torch.no_grad():
        net.write.bias.copy_(torch.arange(6.0))
    found = net(torch.zeros(1, 2, 4, 4), torch.zeros(1))
    assert (found[0, 0] == torch.tensor([0.0, 1.0, 2.0])).all()
    assert (found[0, 1] == torch.tensor([3.0, 4.0, 5.0])).all()


# -- fits -------------------------------------------------------------------------------------------------------------


def table(num_rows: int = 500) -> xr.DataArray:
    return xr.DataArray(points(num_rows).numpy(), dims=("point", "axis"))


def test_a_fit_improves_the_bound() -> None:
    problem = make_problem(table(), hidden=32, blocks=1, gamma=(-8.0, 5.0))
    options: dict[str, Any] = {"num_samples": 2, "progress": False, "compile": "eager", "batch_size": 128}
    before, after = (
        bound(problem, fit_svi(problem, num_steps=steps, lr=lr, keep="average", **options))
        for steps, lr in ((1, 1e-12), (300, 0.005))
    )
    gain = before.attrs["nats_per_datum"] - after.attrs["nats_per_datum"]
    assert gain > 6 * math.hypot(before.attrs["nats_error"], after.attrs["nats_error"])
    # No model beats the truth but by what 500 points happen to say.
    exact = -mixture().log_density(points(500), 0.0)
    assert after.attrs["nats_per_datum"] > float(exact.mean()) - NUM_ERRORS * after.attrs["nats_error"] - 0.3


def test_fits_are_captured_and_equal_those_run_as_written() -> None:
    problem = make_problem(
        pixels(40, 5),
        hidden=8,
        blocks=1,
        num_values=5,
        prediction="values",
        dropout=0.1,
        schedule="learned",
        gamma=(-6.0, 4.0),
        learn_ends=True,
    )
    one, other = (
        fit_svi(problem, num_steps=5, batch_size=16, num_samples=2, progress=False, compile=kind)
        for kind in ("graph", "eager")
    )
    assert one.tree.attrs["execution"] == "graph"
    np.testing.assert_allclose(one.tree["fit"]["loss"], other.tree["fit"]["loss"], rtol=1e-4)


def test_explicit_chains_are_fitted_and_kept() -> None:
    problem = make_problem(table(20), hidden=8, blocks=1, num_steps=3, explicit=True, gamma=(-4.0, 4.0))
    result = fit_svi(problem, num_steps=2, num_samples=3, progress=False, compile="eager")
    assert {f"level_{step}" for step in range(4)} <= set(result.posterior)
    assert result.posterior["level_0"].dims == ("chain", "draw", "data", "axis")
    same = bound(make_problem(table(20), hidden=8, blocks=1, num_steps=3, gamma=(-4.0, 4.0)), result)
    chain = bound(problem, result)
    assert chain.attrs["nats_per_datum"] == pytest.approx(same.attrs["nats_per_datum"])


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"explicit": True}, "explicit=True with num_steps=None"),
        ({"explicit": True, "num_steps": 500}, "has 1 to 200 steps"),
        ({"num_steps": 0}, "num_steps"),
        ({"num_values": 1}, "num_values"),
        ({"num_values": 4}, "intensities are not of 4 values"),
        ({"network": "transformer"}, "network='transformer'; choose one of"),
        ({"schedule": "sigmoid"}, "schedule='sigmoid'; choose one of"),
        ({"prediction": "epsilon"}, "prediction='epsilon'; choose one of"),
        ({"prediction": "values"}, "prediction='values' without num_values"),
        ({"learn_ends": True}, "learn_ends=True is not used with schedule='linear'"),
        ({"label_dropout": 1.0}, "label_dropout=1.0"),
        ({"dropout": -0.5}, "dropout=-0.5"),
        ({"energy": True, "prediction": "values", "num_values": 3}, "log odds are no gradient"),
        ({"gamma": (1.0,)}, "give a list of 2"),
        ({"split": "valid"}, "no image has split='valid'"),
        ({"hidden": 0}, "hidden"),
        ({"frequencies": -1}, "frequencies"),
        ({"depth": 3}, "depth=3 is not used with network='mlp'"),
        ({"network": "unet", "blocks": 2}, "blocks=2 is not used with network='unet'"),
        ({"label_dropout": 0.2}, "label_dropout=0.2 is not used with conditional=False"),
        ({"gamma": (4.0, -4.0)}, "noise must increase"),
        ({"gamma": (-100.0, 5.0)}, "gamma="),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        make_problem(pixels(6, 3), **options)


def test_data_are_checked() -> None:
    with pytest.raises(DataError, match=r"data\[3, 1\] is nan; drop what is missing"):
        make_problem(table(5).where(np.arange(10).reshape(5, 2) != 7))
    with pytest.raises(DataError, match="the first axis counts data"):
        make_problem(xr.DataArray(np.zeros(3), dims="row"))
    with pytest.raises(DataError, match="conditional and num_values are for images"):
        make_problem(table(5), num_values=3)
    with pytest.raises(DataError, match="split='test' is not used with data without splits"):
        make_problem(table(5), split="test")
    kept = make_problem(pixels(6, 3), num_values=3).data
    assert kept is not None
    for options, message in (
        ({"num_values": 2}, "other numbers than 0 to 1"),
        ({"num_values": 3, "conditional": True}, "hold no labels"),
        ({"num_values": 3, "split": "test"}, "those of 'train' alone"),
    ):
        with pytest.raises(DataError, match=message):
            make_problem(kept, **options)
    with pytest.raises(DataError, match="it takes images"):
        make_problem(table(5), network="unet")
    with pytest.raises(DataError, match="the images have no labels"):
        make_problem(pixels(6, 3).drop_vars("label"), conditional=True)
    broken = pixels(6, 3)
    broken["image"] = broken["image"].copy(data=np.where(np.arange(36).reshape(6, 2, 3) == 7, 1.5, broken["image"]))
    with pytest.raises(DataError, match=r"1\.5"):
        make_problem(broken)


# -- units ------------------------------------------------------------------------------------------------------------


def test_data_of_any_units_are_standardised_and_drawn_in_them():
    """Draws of N(500, 100^2) had mean 98 and sd 0.9."""
    from probmodels.scores.samplers import sample

    rng = np.random.default_rng(0)
    plain = rng.normal(size=(800, 2))
    raw = plain * [100.0, 0.01] + [500.0, -3.0]
    options = {"hidden": 16, "gamma": (-8.0, 5.0), "seed": 0}
    fit = partial(fit_svi, num_steps=150, lr=3e-3, batch_size=256, num_samples=2, progress=False)
    result = fit(make_problem(xr.DataArray(raw, dims=("data", "feature")), **options))
    drawn = sample(make_field(result), 1000, num_steps=50, progress=False).double().numpy()
    np.testing.assert_allclose((drawn.mean(0) - [500.0, -3.0]) / [100.0, 0.01], 0.0, atol=0.25)
    np.testing.assert_allclose(drawn.std(0) / [100.0, 0.01], 1.0, atol=0.15)


def test_the_bound_of_standardised_data_has_the_jacobian():
    """In units of their sd, data have a bound that is larger by the sum of the logs of the sds."""
    rng = np.random.default_rng(0)
    plain = xr.DataArray(rng.normal(size=(400, 2)), dims=("data", "feature"))
    plain = (plain - plain.mean("data")) / plain.std("data")
    raw = plain * [100.0, 0.01] + [500.0, -3.0]
    options = {"hidden": 16, "gamma": (-8.0, 5.0), "seed": 0}
    found = []
    for data in (plain, raw):
        problem = make_problem(data, **options)
        result = fit_svi(problem, num_steps=20, lr=1e-3, num_samples=2, progress=False, seed=1)
        found.append(float(bound(problem, result, num_draws=4, seed=2)["elbo"].mean()))
    assert found[0] - found[1] == pytest.approx(math.log(100.0) + math.log(0.01), abs=1e-3)


def test_new_data_are_judged_in_the_units_that_were_fitted():
    rng = np.random.default_rng(0)
    raw = xr.DataArray(500 + 100 * rng.normal(size=(300, 1)), dims=("data", "feature"))
    options = {"hidden": 16, "gamma": (-8.0, 5.0), "seed": 0}
    problem = make_problem(raw, **options)
    result = fit_svi(problem, num_steps=100, lr=3e-3, num_samples=2, progress=False)
    own = float(bound(problem, result, num_draws=8)["elbo"].mean())
    far = float(bound(make_problem(raw + 300, **options), result, num_draws=8)["elbo"].mean())
    assert far < own - 2  # 300 is three sds, which cost 4.5 nats under a normal density


def test_fields_of_other_units_cannot_be_composed():
    from probmodels.scores.fields import Product, linear_observation

    rng = np.random.default_rng(0)
    options = {"hidden": 8, "gamma": (-8.0, 5.0), "seed": 0}
    fields = []
    for scale in (100.0, 200.0):
        data = xr.DataArray(scale * rng.normal(size=(100, 2)), dims=("data", "feature"))
        fields.append(make_field(fit_svi(make_problem(data, **options), num_steps=2, num_samples=2, progress=False)))
    with pytest.raises(ProblemError, match="another location or scale"):
        Product(fields)
    assert Product([fields[0], fields[0]]).units is fields[0].units
    given = linear_observation(fields[0], [[1.0, 0.0]], [150.0], 10.0)
    location, scale = fields[0].units
    at = (torch.tensor([[150.0, 0.0]]) - location) / scale
    assert float(given.log_likelihood(at, 0.0)) > float(given.log_likelihood(at + 1.0, 0.0))


def test_constant_numbers_and_huge_data_are_refused():
    with pytest.raises(DataError, match="number 1 of the data is constant"):
        make_problem(xr.DataArray(np.c_[500 + np.arange(20.0), np.ones(20)], dims=("data", "feature")))
    with pytest.raises(DataError, match="so large"):
        make_problem(xr.DataArray(1e300 * np.c_[np.arange(20.0), -np.arange(20.0)], dims=("data", "feature")))
