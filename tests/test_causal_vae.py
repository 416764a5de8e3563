"""The causal autoencoder against closed forms: evidence, interventions and counterfactuals of linear models."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pyro
import pytest
import torch
import xarray as xr
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn

from probmodels import Problem, Result, fit_svi
from probmodels.causal_vae import CausalVAE, make_problem, tiny
from probmodels.causal_vae.interventions import (
    Intervene,
    OutsideSupportWarning,
    attribute,
    counterfactual,
    effect,
    refine,
)
from probmodels.datasets.causal import hide_labels, make_concepts
from probmodels.errors import DataError, ProblemError
from probmodels.guides.causal_vae import MECHANISMS, AbductionGuide, Mechanisms

NAMES = ("a", "b", "c", "d")
DIAMOND = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 0]])


@pytest.fixture(autouse=True)
def doubles() -> Any:
    """Closed forms are compared to rounding."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def linear_mechanisms() -> Mechanisms:
    """Linear mechanisms of the graph `DIAMOND`, with random weights."""
    found = Mechanisms(DIAMOND, "linear")
    nn.init.normal_(found.base)
    found.weight.data = torch.randn(4, 4)
    found.log_scale.data = torch.tensor([0.1, -0.5, -0.2, -1.0])
    return found


def total(mechanisms: Mechanisms) -> Tensor:
    """Sum over paths from one concept to another (cause, effect)."""
    return torch.linalg.inv(torch.eye(4) - mechanisms.weight.detach() * mechanisms.edges)


class Exact(nn.Module):
    """Encoder with the means, conditional sds and slopes of the exact posterior of a linear Gaussian model."""

    def __init__(self, gain: Tensor, shift: Tensor, log_sd: Tensor, slope: Tensor) -> None:
        super().__init__()
        self.gain, self.shift, self.log_sd, self.slope = gain, shift, log_sd, slope

    def forward(self, x: Tensor) -> Tensor:
        mean = x @ self.gain.mT + self.shift
        sd = self.log_sd.exp()
        pairs = torch.stack([self.slope[i, j] * sd[j] / sd[i] for i in range(4) for j in range(i)])
        parts = [self.log_sd, pairs, torch.full((4,), -99.0), torch.full((4,), -99.0)]
        return torch.cat([mean, *(part.expand(len(x), -1) for part in parts)], -1)


def linear_pair() -> tuple[CausalVAE, AbductionGuide, torch.distributions.MultivariateNormal]:
    """Model, exact guide and distribution of observations."""
    mechanisms, writer = linear_mechanisms(), nn.Linear(4, 6)
    model = CausalVAE(mechanisms, writer, (6,), NAMES, dims=("feature",))
    with torch.no_grad():
        paths, scale = total(mechanisms), torch.stack([mechanisms.scale(i) for i in range(4)])
        mean_z = mechanisms.base @ paths
        cov_z = paths.mT @ torch.diag(scale**2) @ paths
        weight, sd = writer.weight, model.sd
        seen = torch.distributions.MultivariateNormal(
            mean_z @ weight.mT + writer.bias, weight @ cov_z @ weight.mT + sd**2 * torch.eye(6)
        )
        gain = cov_z @ weight.mT @ torch.linalg.inv(seen.covariance_matrix)
        shift = mean_z - gain @ seen.mean
        posterior = cov_z - gain @ weight @ cov_z
        coupling, log_sd = torch.zeros(4, 4), torch.zeros(4)
        for place, i in enumerate(mechanisms.order):
            before = mechanisms.order[:place]
            if before:
                coupling[i, before] = torch.linalg.solve(posterior[before][:, before], posterior[before, i])
            log_sd[i] = 0.5 * (posterior[i, i] - coupling[i, before] @ posterior[before, i]).log()
    guide = AbductionGuide(mechanisms, Exact(gain, shift, log_sd, coupling), NAMES, 0, label_sd=model.label_sd)
    return model, guide, seen


def test_the_bound_of_the_exact_guide_is_the_evidence() -> None:
    model, guide, seen = linear_pair()
    x = seen.sample((30,))
    # The log ratio of joint and posterior is one number whatever is drawn.
    assert -Trace_ELBO().loss(model, guide, x) == pytest.approx(float(seen.log_prob(x).sum()), abs=1e-6)
    found = np.array([-TraceMeanField_ELBO().loss(model, guide, x) for _ in range(200)])
    assert abs(found.mean() - float(seen.log_prob(x).sum())) < 4 * found.std() / math.sqrt(len(found))


def test_with_any_of_the_labels_the_bound_is_the_evidence_of_observations_and_labels() -> None:
    model, guide, seen = linear_pair()
    model.label_sd = torch.tensor([0.7, 0.1, 0.4, 0.02])
    guide.label_sd = model.label_sd
    guide.eval()  # what is for fitting the reader alone is left out
    x, label = seen.sample((8,)), torch.randn(8, 4)
    known = torch.rand(8, 4) < 0.5
    known[0], known[1] = True, False
    mechanisms: Any = model.mechanisms
    with torch.no_grad():
        paths, scale = total(mechanisms), torch.stack([mechanisms.scale(i) for i in range(4)])
        spread = paths.mT @ torch.diag(scale**2) @ paths
        both = torch.cat([model.writer.weight, torch.eye(4)])
        error = torch.diag(torch.cat([(model.sd**2).expand(6), model.label_sd**2]))
        mean, covariance = both @ (mechanisms.base @ paths), both @ spread @ both.mT + error
        mean[:6] += model.writer.bias
        wanted = 0.0
        for row, values in enumerate(torch.cat([x, label], -1)):
            chosen = torch.cat([torch.ones(6, dtype=torch.bool), known[row]])
            normal = torch.distributions.MultivariateNormal(mean[chosen], covariance[chosen][:, chosen])
            wanted += float(normal.log_prob(values[chosen]))
    assert -Trace_ELBO().loss(model, guide, x, label, known) == pytest.approx(wanted, abs=1e-6)
    found = np.array([-TraceMeanField_ELBO().loss(model, guide, x, label, known) for _ in range(100)])
    assert abs(found.mean() - wanted) < 4 * found.std() / math.sqrt(len(found))


def test_readers_learn_by_the_density_of_labels_under_their_proposals() -> None:
    model, guide, seen = linear_pair()
    guide.label_sd = torch.tensor([0.7, 0.1, 0.4, 0.02])
    x, label = seen.sample((5,)), torch.randn(5, 4)
    known = torch.rand(5, 4) < 0.6
    found = guide.propose(x)
    said = guide.reading(found, label, known).detach()
    mean, covariance = moments(guide, x)
    covariance = covariance + torch.diag(guide.label_sd**2)
    for row in range(5):
        chosen = known[row]
        normal = torch.distributions.MultivariateNormal(mean[row, chosen], covariance[chosen][:, chosen])
        squares = ((label - mean)[row, chosen] ** 2 / (0.01**2 + guide.label_sd[chosen] ** 2)).sum()
        wanted = normal.log_prob(label[row, chosen]) + 0.5 * chosen.sum() * math.log(2 * math.pi) - 0.5 * squares
        assert float(said[row]) == pytest.approx(float(wanted), rel=1e-6)
    # While fitting, it is a term of the loss; means of rows that labels tell in full are moved by it alone.
    every = torch.ones(5, 4, dtype=torch.bool)
    reader: Any = guide.reader
    reader.shift = nn.Parameter(reader.shift)
    guide.label_weight = 3.0
    (moved,) = torch.autograd.grad(
        TraceMeanField_ELBO().differentiable_loss(model, guide, x, label, every), reader.shift
    )
    wanted = -3.0 * ((label - mean) / (0.01**2 + guide.label_sd**2)).sum(0)
    torch.testing.assert_close(moved, wanted)


def moments(guide: AbductionGuide, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (data, concept) and covariance of what is proposed, for a reader whose spread is that of all data."""
    found = guide.propose(x)
    paths = torch.linalg.inv(torch.eye(4) - found.slope[0])
    return found.mean.detach(), (paths @ torch.diag(found.sd[0] ** 2) @ paths.mT).detach()


def test_proposals_follow_curved_mechanisms() -> None:
    """Exactly the posterior of an effect given its cause, where the observation is concepts with noise."""
    mechanisms = Mechanisms(torch.tensor([[0, 1], [0, 0]]), hidden=5)
    for parameter in mechanisms.parameters():
        nn.init.normal_(parameter)
    own, error, x = float(mechanisms.scale(1).detach()), 0.7, torch.randn(6, 2)
    share = (1 / own**2) / (1 / own**2 + 1 / error**2)
    with torch.no_grad():
        mean = torch.stack([x[:, 0], share * mechanisms.location(1, [x[:, 0]]) + (1 - share) * x[:, 1]], -1)
    sd = torch.tensor([0.5, math.sqrt(1 / (1 / own**2 + 1 / error**2))])
    rest = torch.tensor([0.0, 0.0, math.log(share / (1 - share)) + 2.0, -99.0, -99.0])
    found = torch.cat([mean, sd.log().expand(6, -1), rest.expand(6, -1)], -1)
    guide = AbductionGuide(mechanisms, nn.Identity(), ["a", "b"], 0)
    guide.tabulate(found)
    nodes: Any = poutine.trace(guide).get_trace(found).nodes
    with torch.no_grad():
        a = mechanisms.location(0, []) + mechanisms.scale(0) * nodes["noise_a"]["value"]
        location = mechanisms.location(1, [a])
        wanted = share * location + (1 - share) * x[:, 1]
    torch.testing.assert_close(nodes["noise_b"]["fn"].mean * own + location, wanted, rtol=0, atol=1e-9)
    torch.testing.assert_close(nodes["noise_b"]["fn"].stddev * own, sd[1].expand(6))


@pytest.mark.parametrize("kind", MECHANISMS)
def test_labelled_concepts_are_their_labels(kind: str) -> None:
    mechanisms = Mechanisms(DIAMOND, kind, hidden=5)
    for parameter in mechanisms.parameters():
        nn.init.normal_(parameter, std=0.7)
    reader = nn.Linear(3, AbductionGuide.num_outputs(4, 0))
    guide = AbductionGuide(mechanisms, reader, NAMES, 0, label_sd=1e-4)
    model = CausalVAE(mechanisms, nn.Linear(4, 3), (3,), NAMES, label_sd=1e-4)
    x, label = torch.randn(6, 3), torch.randn(6, 4)
    trace: Any = poutine.trace(guide).get_trace(x, label, torch.ones(6, 4, dtype=torch.bool))
    nodes: Any = poutine.trace(poutine.replay(model, trace)).get_trace(x).nodes
    found = torch.stack([nodes[name]["value"] for name in NAMES], -1)
    torch.testing.assert_close(found, label, rtol=0, atol=1e-3)


def test_the_published_objective_counts_the_entropy_twice() -> None:
    model, guide, seen = linear_pair()
    x = seen.sample((7,))
    exact = -Trace_ELBO().loss(model, guide, x)
    guide.entropy = "paper"
    sd = guide.propose(x).sd
    entropy = (sd.log() + 0.5 * math.log(2 * math.pi * math.e)).sum()
    assert -Trace_ELBO().loss(model, guide, x) == pytest.approx(exact + float(entropy), abs=1e-6)


# -- interventions ----------------------------------------------------------------------------------------------------


def worlds(kind: str, graph: Tensor = DIAMOND) -> tuple[CausalVAE, dict[str, Tensor], Tensor]:
    """A model of random mechanisms, noise, and observations of the right shape."""
    size = len(graph)
    mechanisms = Mechanisms(graph, kind, hidden=5)
    for parameter in mechanisms.parameters():
        nn.init.normal_(parameter, std=0.7)
    names = [chr(ord("a") + i) for i in range(size)]
    model = CausalVAE(mechanisms, nn.Linear(size, 3), (3,), names, dims=("feature",))
    return model, {f"noise_{name}": torch.randn(6) for name in names}, torch.zeros(6, 3)


def concepts(model: CausalVAE, noise: dict[str, Tensor], x: Tensor, changes: dict[str, Any]) -> Tensor:
    with torch.no_grad(), Intervene(changes):
        nodes: Any = poutine.trace(poutine.condition(model, data=noise)).get_trace(x).nodes
    return torch.stack([nodes[name]["value"] for name in model.names], -1)


@pytest.mark.parametrize("kind", MECHANISMS)
def test_setting_concepts_to_their_values_changes_nothing(kind: str) -> None:
    model, noise, x = worlds(kind)
    factual = concepts(model, noise, x, {})
    for chosen in (["a"], ["b"], ["d"], ["a", "b"], ["a", "b", "c", "d"]):
        same = {name: factual[:, model.names.index(name)] for name in chosen}
        torch.testing.assert_close(concepts(model, noise, x, same), factual, rtol=0, atol=1e-9)
    torch.testing.assert_close(concepts(model, noise, x, {"b": lambda z: z + 0.0}), factual)


@pytest.mark.parametrize("kind", MECHANISMS)
def test_setting_an_effect_leaves_its_causes(kind: str) -> None:
    model, noise, x = worlds(kind)
    factual = concepts(model, noise, x, {})
    changed = concepts(model, noise, x, {"b": 5.0})
    torch.testing.assert_close(changed[:, [0, 2]], factual[:, [0, 2]])  # neither a cause nor an effect of b
    assert (changed[:, 1] == 5.0).all()
    assert (changed[:, 3] - factual[:, 3]).abs().min() > 1e-6


@pytest.mark.parametrize("kind", MECHANISMS)
def test_chains_of_any_depth_carry_a_change_to_their_end(kind: str) -> None:
    model, noise, x = worlds(kind, torch.eye(7).roll(1, 1).triu())
    factual = concepts(model, noise, x, {})
    changed = concepts(model, noise, x, {"b": lambda z: z + 1.0})
    assert (changed[:, 1] - factual[:, 1] - 1.0).abs().max() < 1e-12
    assert ((changed - factual)[:, 2:].abs().max(0).values > 1e-9).all()
    if (
        kind != "masked"
    ):  # whose concepts do not screen their causes from their effects: the linear layer goes past them
        between = concepts(model, noise, x, {"b": lambda z: z + 1.0, "d": factual[:, 3]})
        torch.testing.assert_close(between[:, 3:], factual[:, 3:])


def test_linear_counterfactuals_are_sums_over_paths() -> None:
    model, noise, x = worlds("linear")
    factual = concepts(model, noise, x, {})
    paths = total(model.mechanisms)
    for place, name in enumerate(model.names):
        changed = concepts(model, noise, x, {name: lambda z: z + 2.0})
        torch.testing.assert_close(changed, factual + 2.0 * paths[place])


@pytest.mark.parametrize("kind", MECHANISMS)
def test_numbers_and_tensors_are_what_pyro_does(kind: str) -> None:
    model, noise, x = worlds(kind)
    value = torch.randn(6)
    program = poutine.do(poutine.condition(model, data=noise), data={"b": value})
    nodes: Any = poutine.trace(program).get_trace(x).nodes
    torch.testing.assert_close(nodes["d"]["value"], concepts(model, noise, x, {"b": value})[:, 3])


@pytest.mark.parametrize("kind", MECHANISMS)
def test_worlds_side_by_side_are_those_of_chirho(kind: str) -> None:
    handlers = pytest.importorskip("chirho.counterfactual.handlers", reason="chirho is not installed (extra 'causal')")
    from chirho.interventional.handlers import do

    model, noise, x = worlds(kind)
    value = torch.randn(6)
    with torch.no_grad(), handlers.MultiWorldCounterfactual(first_available_dim=-3), do(actions={"b": value}):
        nodes: Any = poutine.trace(poutine.condition(model, data=noise)).get_trace(x).nodes
    values = torch.broadcast_tensors(*(nodes[name]["value"] for name in model.names))
    both = torch.stack(values, -1).reshape(2, 6, 4)
    torch.testing.assert_close(both[0], concepts(model, noise, x, {}))
    torch.testing.assert_close(both[1], concepts(model, noise, x, {"b": value}))


def test_monotone_functions_rise() -> None:
    mechanisms = Mechanisms(DIAMOND, "post_nonlinear", hidden=3)
    for parameter in mechanisms.parameters():
        nn.init.normal_(parameter, std=2.0)
    y = torch.linspace(-5, 5, 300)
    for i in range(4):
        assert (mechanisms.value(i, y).diff() > 0).all()
    z = torch.stack([mechanisms.value(i, y) for i in range(4)], -1)
    again = mechanisms.inverse(z)[0]
    torch.testing.assert_close(again, y[:, None].expand(-1, 4), rtol=0, atol=1e-5)
    middle = (y[1:] + y[:-1]) / 2
    steps = mechanisms.inverse(torch.stack([mechanisms.value(i, middle) for i in range(4)], -1))[1]
    torch.testing.assert_close(z.diff(dim=0) / y.diff()[:, None], steps, rtol=0.02, atol=0.01)


# -- fitted models ----------------------------------------------------------------------------------------------------


def table(num_rows: int = 400, seed: int = 0) -> xr.Dataset:
    """A cause, its squared effect, and a table of five numbers that tells both; labels in units of their own."""
    rng = np.random.default_rng(seed)
    cause = rng.normal(size=num_rows)
    result = cause**2 + 0.1 * rng.normal(size=num_rows)
    z = np.stack([cause, result], -1)
    values = np.tanh(z @ rng.normal(size=(2, 5)) / 4) + 0.02 * rng.normal(size=(num_rows, 5))
    split = np.where(np.arange(num_rows) < 0.75 * num_rows, "train", "test")
    return make_concepts(values, 10 + 3 * z, names=["cause", "result"], split=split, graph=[["cause", "result"]])


@pytest.fixture(scope="module")
def fitted_pair() -> tuple[Problem, Result]:
    options: dict[str, Any] = {"hidden": 64, "mechanism_hidden": 16, "label_weight": 5.0, "label_sd": 0.1}
    problem = make_problem(table(), **options)
    result = fit_svi(problem, num_steps=800, lr=0.005, schedule="cosine", num_samples=2, progress=False, seed=1)
    return make_problem(table(), **options, split="test"), result


def test_concepts_and_counterfactuals_are_those_of_the_truth(fitted_pair: tuple[Problem, Result]) -> None:
    problem, result = fitted_pair
    assert problem.data is not None
    label = problem.data["label"].values * problem.data["scale"].values + problem.data["centre"].values
    found = counterfactual(problem, result, {"cause": 10.0 + 3 * 1.0}, num_draws=10, progress=False)
    assert found["counterfactual"].dims == ("draw", "data", "concept")
    assert found["observation"].dims == ("data", "feature")
    abducted = found["factual"].mean("draw").values
    for place in range(2):
        assert np.corrcoef(abducted[:, place], label[:, place])[0, 1] > 0.95
    moved = found["counterfactual"].mean("draw")
    np.testing.assert_allclose(moved.sel(concept="cause"), 13.0, atol=1e-5)
    # The effect of a cause of 1 is 1 with the row's own noise, of sd 0.1; in units of the labels, 13 and 0.3.
    error = moved.sel(concept="result").values - (13.0 + label[:, 1] - 10 - 3 * ((label[:, 0] - 10) / 3) ** 2)
    spread = label[:, 1].std()
    assert math.sqrt((error**2).mean()) < 0.25 * spread
    again = counterfactual(problem, result, {"cause": 13.0}, num_draws=10, progress=False)
    xr.testing.assert_identical(found, again)


def noisy_pair(seed: int = 0) -> tuple[xr.Dataset, np.ndarray]:
    """Two concepts of a linear model, seen with an error of sd 1, and their true values in the rows for testing."""
    rng = np.random.default_rng(seed)
    a = rng.normal(size=2200)
    z = np.stack([a, 0.8 * a + 0.6 * rng.normal(size=2200)], 1)
    split = np.where(np.arange(2200) < 1200, "train", "test")
    data = make_concepts(z + rng.normal(size=z.shape), z, names=["a", "b"], graph=[["a", "b"]], split=split)
    return data, z[1200:]


@pytest.fixture(scope="module")
def noisy_fit() -> tuple[Problem, Result]:
    torch.set_default_dtype(torch.float32)
    problem = make_problem(noisy_pair()[0], mechanism="linear", hidden=16)
    fit: dict[str, Any] = {"num_steps": 450, "lr": 0.02, "schedule": "warmup_cosine", "batch_size": 200}
    return problem, fit_svi(problem, **fit, num_samples=2, progress=False)


def test_abduction_is_as_wide_as_the_posterior_and_covers(noisy_fit: tuple[Problem, Result]) -> None:
    torch.set_default_dtype(torch.float32)
    data, truth = noisy_pair()
    test = make_problem(data, mechanism="linear", hidden=16, split="test")
    found = counterfactual(test, noisy_fit[1], {"a": 1.0}, num_draws=400, observations=False, progress=False)
    covariance = np.array([[1.0, 0.8], [0.8, 1.0]])
    exact = np.sqrt(np.diag(np.linalg.inv(np.linalg.inv(covariance) + np.eye(2))))  # 0.636
    np.testing.assert_allclose(found["factual"].std("draw").mean("data"), exact, rtol=0.06)
    other = truth[:, 1] + 0.8 * (1 - truth[:, 0])
    for draws, values in (
        (found["factual"].values, truth),
        (found["counterfactual"].values[..., 1], other),
    ):
        low, high = np.quantile(draws, [0.05, 0.95], axis=0)
        assert np.abs(((low <= values) & (values <= high)).mean(0) - 0.9).max() < 0.03


def test_mechanisms_are_those_of_the_labels_and_not_of_their_readings(noisy_fit: tuple[Problem, Result]) -> None:
    torch.set_default_dtype(torch.float32)
    problem, result = noisy_fit
    label = noisy_pair()[0]["label"].values[:1200]
    slope, cut = np.polyfit(*label.T, 1)
    error = np.std(label[:, 1] - slope * label[:, 0] - cut) / (np.std(label[:, 0]) * math.sqrt(1200))
    found = effect(problem, result, "a", (-1.0, 1.0), num_draws=199, progress=False)
    assert abs(float(found["effect"][0]) - 2 * slope) < 2 * error  # one standard error; slopes of readings are 18 off
    half = float(found["high"][0] - found["low"][0]) / 2
    assert half == pytest.approx(1.96 * 2 * error, rel=0.25)  # quantiles of 199 draws have an error of 8 % each


def test_refined_proposals_are_the_posterior_of_each_datum_and_the_model_stays() -> None:
    model, guide, seen = linear_pair()
    x = seen.sample((20,))
    exact = guide.propose(x)[0].detach()
    reader: Any = guide.reader
    reader.shift = reader.shift + torch.randn(4)  # wrong, and the gain as well
    reader.gain = 0.5 * reader.gain
    ones = xr.DataArray(np.ones(4), dims="concept")
    data = xr.Dataset({"centre": 0 * ones, "scale": ones, "least": -99 * ones, "most": 99 * ones})
    problem = Problem("causal_vae", model, guide, args=(x,), data=data.assign(observation=(("data", "feature"), x)))
    result = fit_svi(problem, num_steps=1, lr=1e-12, num_samples=2, progress=False)
    before = guide.propose(x)[0].detach()
    assert (before - exact).abs().max() > 0.5
    single, refined = refine(problem, result, num_steps=400, lr=0.05, progress=False)
    found = counterfactual(single, refined, {"a": 0.0}, num_draws=400, observations=False, progress=False)
    spread = found["factual"].std("draw").values
    error = np.abs(found["factual"].mean("draw").values - exact.numpy())
    # Monte Carlo error of 400 draws, and the steps' own noise.
    assert (error < 5 * spread / math.sqrt(400) + 0.1 * spread).all()
    for name, value in result.params().items():
        if not name.startswith("table"):
            assert torch.equal(torch.as_tensor(refined.params()[name]), torch.as_tensor(value)), name
    again = refine(single, refined, num_steps=1, lr=1e-9, progress=False)[1]  # goes on from the first
    assert (torch.as_tensor(again.params()["table"]) - torch.as_tensor(refined.params()["table"])).abs().max() < 1e-6
    with pytest.raises(ProblemError, match="refined for other data"):
        counterfactual(replace(single, args=(x[:8],)), refined, {"a": 0.0}, num_draws=1, progress=False)
    with pytest.raises(ProblemError, match="the problem has none"):
        refine(problem, result, labels=True)
    assert guide.table is None
    torch.testing.assert_close(guide.propose(x)[0].detach(), before)
    with pytest.raises(ProblemError, match="has no concepts to set"):
        refine(replace(problem, name="other"), result)


def test_effects_are_differences_of_worlds_with_intervals(fitted_pair: tuple[Problem, Result]) -> None:
    problem, result = fitted_pair
    found = effect(problem, result, "cause", (10.0, 13.0), num_draws=40, progress=False)
    assert list(found["concept"].values) == ["result"]
    # From 0 to 1 the square rises by 1, 3 in units of the labels.
    assert found["effect"].values == pytest.approx(3.0, abs=1.0)
    assert (found["low"] <= found["effect"]).all()
    assert (found["effect"] <= found["high"]).all()
    back = effect(problem, result, "result", (10.0, 13.0), num_draws=3, progress=False)
    np.testing.assert_allclose(back["effect"], 0.0, atol=1e-9)  # an effect is no cause
    some = effect(problem, result, "cause", (10.0, 13.0), given=np.arange(5), num_draws=40, progress=False)
    assert some["by_row"].sizes["data"] == 5


def test_batches_are_single_interventions_side_by_side(fitted_pair: tuple[Problem, Result]) -> None:
    problem, result = fitted_pair
    many = {"low": {"cause": 9.0}, "both": {"cause": 11.0, "result": 12.0}}
    found = counterfactual(problem, result, many, num_draws=3, progress=False)
    alone = counterfactual(problem, result, many["both"], num_draws=3, progress=False)
    xr.testing.assert_allclose(found["counterfactual"].sel(intervention="both", drop=True), alone["counterfactual"])
    bare = counterfactual(problem, result, many, num_draws=3, observations=False, progress=False)
    xr.testing.assert_allclose(bare["counterfactual"], found["counterfactual"])
    assert "observation" not in bare


def test_shares_of_a_difference_sum_to_it(fitted_pair: tuple[Problem, Result]) -> None:
    problem, result = fitted_pair
    shares = attribute(problem, result, 3, 8, num_draws=4, seed=2)
    factual = counterfactual(problem, result, {}, num_draws=4, seed=2, progress=False)["factual"]
    difference = factual.isel(data=8, drop=True) - factual.isel(data=3, drop=True)
    np.testing.assert_allclose(shares.sum("cause"), difference, atol=1e-9)
    np.testing.assert_allclose(shares.sel(cause="result", effect="cause"), 0.0, atol=1e-12)


def test_values_beyond_the_data_are_warned_of(fitted_pair: tuple[Problem, Result]) -> None:
    problem, result = fitted_pair
    with pytest.warns(OutsideSupportWarning, match=r"do\(cause=99\) lies outside of what was seen in training"):
        counterfactual(problem, result, {"cause": 99.0}, num_draws=1, progress=False)
    with pytest.raises(DataError, match="caus"):
        counterfactual(problem, result, {"caus": 1.0}, num_draws=1, progress=False)
    with pytest.raises(ProblemError, match="not finite"):
        counterfactual(problem, result, {"cause": math.nan}, num_draws=1, progress=False)
    with pytest.raises(ProblemError, match=r"do\(cause='high'\); give a number"):
        counterfactual(problem, result, {"cause": "high"}, num_draws=1, progress=False)
    with pytest.raises(ProblemError, match=r"do\(cause\) has shape \(3,\); give one number, or one for each of"):
        counterfactual(problem, result, {"cause": np.ones(3)}, num_draws=1, progress=False)
    with pytest.raises(ProblemError, match="causal_vae: num_draws=True; give a whole number"):
        counterfactual(problem, result, {"cause": 9.0}, num_draws=True, progress=False)
    with pytest.raises(ProblemError, match=r"prob=1\.0; give a number above 0 and below 1"):
        effect(problem, result, "cause", (9.0, 10.0), prob=1.0)
    with pytest.raises(ProblemError, match=r"given=.*; give places of rows below"):
        effect(problem, result, "cause", (9.0, 10.0), given=[900], num_draws=1, progress=False)
    with pytest.raises(ProblemError, match="there is no row 900"):
        attribute(problem, result, 0, 900)
    with pytest.raises(ProblemError, match="chooses no row"):
        effect(problem, result, "cause", (9.0, 10.0), given=np.zeros(100, dtype=bool), num_draws=1, progress=False)


def test_labelled_interventions_and_graphs_are_put_in_order(fitted_pair: tuple[Problem, Result]) -> None:
    problem, result = fitted_pair
    assert problem.data is not None
    rows = problem.data["observation"]["data"].values
    values = xr.DataArray(np.linspace(9.0, 11.0, len(rows)), {"data": rows}, ("data",))
    wanted = counterfactual(problem, result, {"cause": values.values}, num_draws=2, progress=False)
    for turned in (values[::-1], values[::-1].to_pandas()):
        xr.testing.assert_identical(
            counterfactual(problem, result, {"cause": turned}, num_draws=2, progress=False), wanted
        )
    strange = values.assign_coords(data=rows + 5000)
    with pytest.raises(ProblemError, match=r"do\(cause\) along 'data' has the labels"):
        counterfactual(problem, result, {"cause": strange}, num_draws=1, progress=False)
    some = xr.DataArray(np.arange(len(rows)) < 7, {"data": rows}, ("data",))
    one, other = (
        effect(problem, result, "cause", (10.0, 11.0), given=given, num_draws=2, progress=False)
        for given in (some.values, some[::-1])
    )
    xr.testing.assert_identical(one, other)
    names = ["cause", "result"]
    graph = xr.DataArray([[0, 0], [1, 0]], {"effect": names, "cause": names}, ("effect", "cause"))
    again = make_problem(table(), graph=graph[::-1], hidden=4)
    assert again.data is not None
    np.testing.assert_array_equal(again.data["graph"], [[0, 1], [0, 0]])


def test_rows_without_labels_count_by_their_observation_alone() -> None:
    data = hide_labels(table(40), 0.5, seed=1)
    problem = make_problem(data, semi_supervised=True, hidden=8)
    label, known = problem.args[1], problem.args[2]
    assert int((~known).sum()) == 2 * 15
    moved = torch.where(known, label, label + 100.0)
    other = replace(problem, args=(problem.args[0], moved, known))
    first, second = (
        fit_svi(one, num_steps=3, num_samples=1, progress=False, compile="eager") for one in (problem, other)
    )
    np.testing.assert_array_equal(first.tree["fit"]["loss"], second.tree["fit"]["loss"])
    with pytest.raises(DataError, match="give semi_supervised=True"):
        make_problem(data)


def test_weak_labels_count_by_their_own_spread() -> None:
    problem = make_problem(table(40), hidden=8, label_sd={"result": 2.0}, label_weight=1.0)
    nodes: Any = poutine.trace(problem.model).get_trace(*problem.args).nodes
    z = torch.stack([nodes["cause"]["value"], nodes["result"]["value"]], -1)
    spread = torch.tensor([0.005, 2.0])
    wanted = torch.distributions.Normal(z, spread).log_prob(problem.args[1]).sum(-1)
    torch.testing.assert_close(nodes["label"]["fn"].log_prob(problem.args[1]), wanted)
    with pytest.raises(DataError, match="reslt"):
        make_problem(table(40), label_sd={"reslt": 2.0})
    with pytest.raises(DataError, match=r"label_sd=\{'result': 0.0\}; give a number of at least 1e-06"):
        make_problem(table(40), label_sd={"result": 0.0})


@pytest.mark.parametrize("network", ["mlp", "conv"])
def test_images_of_any_size_are_read_and_written(network: str) -> None:
    rng = np.random.default_rng(0)
    data = make_concepts(rng.uniform(size=(6, 3, 13, 10)), rng.normal(size=(6, 2)), names=["a", "b"])
    problem = make_problem(data, graph=[["a", "b"]], network=network, hidden=8, num_style=2)
    assert problem.validate().dims()["observation"] == ["data", "channel", "row", "column"]
    assert problem.options["network"] == network


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mechanism": "additve"}, "mechanism='additve'; choose one of"),
        ({"network": "conv"}, "it takes images"),
        ({"entropy": "none"}, "entropy='none'; choose one of"),
        ({"beta": 0.0}, "beta=0.0; give a number above 0"),
        ({"label_weight": -1.0}, "label_weight=-1.0"),
        ({"graph": "learned"}, "graph='learned'; choose one of data or a list"),
        ({"graph": [["cause", "result"], ["result", "cause"]]}, "cycle"),
        ({"graph": np.zeros((3, 3))}, r"graph of shape \(3, 3\) for 2 concepts"),
        ({"split": "valid"}, "split='valid'; choose one of train, test"),
        ({"hidden": 0}, "hidden=0; give a whole number of at least 1"),
        ({"label_sd": {"result": "wide"}}, "label_sd="),
        ({"mechanism": "linear", "mechanism_hidden": 8}, "mechanism_hidden=8 is not used with mechanism='linear'"),
        ({"label_weight": 0.0, "label_sd": 0.5}, "label_sd=0.5 is not used with label_weight=0"),
        ({"label_weight": 0.0, "equations_weight": 1.0}, "equations_weight=1.0 is not used with label_weight=0"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        make_problem(table(20), **options)


def test_rows_of_a_split_that_there_are_not_are_refused() -> None:
    data = table(20)
    with pytest.raises(DataError, match="no row has split='test'"):
        make_problem(data.isel(data=np.flatnonzero(data["split"] == "train")), split="test")


def test_what_a_problem_keeps_makes_it_again_for_another_split_and_without_labels() -> None:
    for options in ({"split": "test"}, {"label_weight": 0.0}, {"graph": [["cause", "result"]], "mechanism": "linear"}):
        problem = make_problem(table(40), **{"hidden": 8, **options})
        assert problem.data is not None
        again = make_problem(problem.data, **problem.options)
        assert again.data is not None
        xr.testing.assert_identical(again.data, problem.data)
        for one, other in zip(problem.args, again.args, strict=True):
            torch.testing.assert_close(one, other)
    with pytest.raises(DataError, match="the data keep no labels"):
        make_problem(make_problem(table(40), label_weight=0.0).data)


def test_the_tiny_problem_has_concepts_by_name() -> None:
    torch.set_default_dtype(torch.float32)
    assert {"noise_a", "a", "noise_b", "b", "noise_c", "c", "style", "label", "observation"} == set(tiny().sites)
