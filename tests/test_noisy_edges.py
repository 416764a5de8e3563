"""Noisy edges against enumeration of all graphs, quadrature, and simulated truths."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from pyro import poutine
from scipy import stats
from torch import Tensor

from probmodels import Problem, fit_svi, run_mcmc
from probmodels.errors import DataError, ProblemError
from probmodels.guides.nets import propagate
from probmodels.guides.noisy_edges import disarm_slope
from probmodels.inference import sbc
from probmodels.noisy_edges.model import NoisyCount, Prior, edge_logits, make_problem, prior_logits, tiny
from probmodels.noisy_edges.pairs import PairData, make_pairs

PAIRS = {"blocks": False, "classes": False, "similarity": (), "uneven": False, "trials": 1, "all_pairs": True}
PAIRS |= {"neighbours": 0, "metric": "euclidean", "random": 0.0, "seed": 0}


def graph(num_nodes: int, edges: list[tuple[int, int]], **variables: Any) -> xr.Dataset:
    """Observed edges and variables by node or edge."""
    found = {"source": ("edge", [u for u, _ in edges]), "target": ("edge", [v for _, v in edges])}
    data = xr.Dataset(found).assign_coords(node=[f"n{i}" for i in range(num_nodes)])
    dims = {"x": ("node", "feature"), "y": "node", "split": "node", "graph_index": "node", "count": "edge"}
    return data.assign({name: (dims[name], value) for name, value in variables.items()})


def simulated(num_nodes: int, seed: int, *, deletion: float = 0.3, addition: float = 0.03) -> xr.Dataset:
    """Two classes in a plane, and a noisy graph of them; true edges as ``true_source``, ``true_target``."""
    rng = np.random.default_rng(seed)
    y = np.arange(num_nodes) % 2
    x = 2.0 * np.eye(2)[y] + rng.normal(size=(num_nodes, 2))
    u, v = np.triu_indices(num_nodes, 1)
    true = rng.random(len(u)) < np.where(y[u] == y[v], 0.3, 0.05)
    seen = rng.random(len(u)) < np.where(true, 1 - deletion, addition)
    split = np.where(np.arange(num_nodes) < num_nodes // 2, "train", "test")
    data = graph(num_nodes, list(zip(u[seen], v[seen], strict=True)), x=x, y=y, split=split)
    return data.assign(true_source=("true_edge", u[true]), true_target=("true_edge", v[true]))


SMALL = graph(6, [(0, 1), (0, 2), (1, 2), (3, 4), (2, 5)])
COUNTED = SMALL.assign(count=("edge", [3, 1, 2, 3, 1]))


class Quadrature:
    """Posterior of deletion, addition ratio and one rate by a grid of quantiles of their priors, edges in closed form.

    Parameters
    ----------
    seen
        Counts (pair,).
    trials
        Looks at every pair.
    prior
        Hyperparameters.
    """

    def __init__(self, seen: np.ndarray, trials: int, prior: Prior, size: int = 60) -> None:
        middle = (np.arange(size) + 0.5) / size
        axes = [stats.beta(*prior.deletion), stats.beta(*prior.addition_ratio), stats.norm(*prior.rate)]
        self.deletion, self.ratio, self.rate = np.meshgrid(*(a.ppf(middle) for a in axes), indexing="ij")
        addition, chance = self.ratio * (1 - self.deletion), 1 / (1 + np.exp(-self.rate))
        edge = [chance * stats.binom.pmf(k, trials, 1 - self.deletion) for k in range(trials + 1)]
        none = [(1 - chance) * stats.binom.pmf(k, trials, addition) for k in range(trials + 1)]
        frequency = np.bincount(seen.astype(int), minlength=trials + 1)
        log_density = sum(n * np.log(a + b) for n, a, b in zip(frequency, edge, none, strict=True))
        self.log_evidence = float(np.log(np.mean(np.exp(log_density - log_density.max()))) + log_density.max())
        self.weight = np.exp(log_density - log_density.max())
        self.weight /= self.weight.sum()
        self.edge_given = np.array([float((self.weight * a / (a + b)).sum()) for a, b in zip(edge, none, strict=True)])

    def mean(self, values: np.ndarray) -> float:
        return float((self.weight * values).sum())


@pytest.fixture(scope="module", params=[(SMALL, 1), (COUNTED, 3)], ids=["once", "three times"])
def case(request: pytest.FixtureRequest) -> tuple[Problem, Quadrature, np.ndarray]:
    data, trials = request.param
    problem = make_problem(data, trials=trials, expected_degree=2.0)
    pairs, prior = problem.args
    seen = pairs.seen.numpy()
    return problem, Quadrature(seen, trials, prior), seen.astype(int)


# -- the channel ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trials", [1, 4])
def test_counts_are_a_mixture_of_two_binomials(trials: int) -> None:
    logits, deletion, addition = torch.tensor([-3.0, 0.5]).double(), torch.tensor(0.3), torch.tensor(0.02)
    channel = NoisyCount(logits, deletion, addition, trials)
    values = torch.arange(trials + 1.0).unsqueeze(-1)
    chance = torch.sigmoid(logits).numpy()
    expected = chance * stats.binom.pmf(values, trials, 0.7) + (1 - chance) * stats.binom.pmf(values, trials, 0.02)
    np.testing.assert_allclose(channel.log_prob(values).exp().numpy(), expected, rtol=1e-5)
    torch.manual_seed(0)
    drawn = channel.sample((20_000,))
    share = (drawn == trials).double().mean(0).numpy()
    assert (np.abs(share - expected[-1]) < 4 * np.sqrt(expected[-1] / 20_000)).all()


def test_edges_summed_out_are_all_graphs_enumerated() -> None:
    data = graph(5, [(0, 1), (1, 2), (0, 4)], x=np.random.default_rng(0).normal(size=(5, 2)))
    problem = make_problem(data, similarity=("inner", "distance"), propensity=True)
    pairs, prior = problem.args
    values = {"deletion": torch.tensor(0.3), "addition_ratio": torch.tensor(0.1), "rate_logit": torch.tensor([-0.5])}
    values |= {"coefficient": torch.tensor([0.7, -0.4]), "propensity_scale": torch.tensor(0.5)}
    values["propensity_noise"] = torch.linspace(-1, 1, 5)
    chance = prior_logits(pairs, prior, values).sigmoid().numpy()
    every = np.array(list(itertools.product([0, 1], repeat=10)))  # (graph, pair)
    seen = pairs.seen.numpy()
    rate = np.where(every == 1, 0.7, 0.07)
    joint = np.where(every == 1, chance, 1 - chance) * np.where(seen == 1, rate, 1 - rate)
    weight = joint.prod(1)
    trace = poutine.trace(poutine.condition(problem.model, values)).get_trace(*problem.args, **problem.kwargs)
    trace.compute_log_prob()
    assert float(trace.nodes["observed"]["log_prob_sum"]) == pytest.approx(np.log(weight.sum()), abs=1e-4)
    exact = weight @ every / weight.sum()
    np.testing.assert_allclose(edge_logits(pairs, prior, values).sigmoid().numpy(), exact, atol=1e-5)
    total = float(trace.nodes["num_edges"]["value"])
    assert total == pytest.approx(exact.sum(), abs=1e-4)
    assert float(trace.nodes["mean_degree"]["value"]) == pytest.approx(2 * total / 5)


# -- engines ----------------------------------------------------------------------------------------------------------


def test_chains_agree_with_quadrature(case: tuple[Problem, Quadrature, np.ndarray]) -> None:
    problem, exact, seen = case
    posterior = run_mcmc(problem, num_chains=32, warmup_steps=150, num_samples=100, progress=False).posterior
    pairs = {"deletion": exact.deletion, "addition_ratio": exact.ratio, "rate_logit": exact.rate}
    for name, values in pairs.items():
        mean = exact.mean(values)
        sd = np.sqrt(exact.mean(values**2) - mean**2)
        # 3200 draws, worth at least 800 independent ones: four standard errors are 0.14 sd, and 0.02 are the grid's.
        assert abs(float(posterior[name].mean()) - mean) < 0.16 * sd, name
        assert float(posterior[name].std()) == pytest.approx(sd, rel=0.15), name
    found = posterior["edge_probability"].mean(("chain", "draw")).values
    np.testing.assert_allclose(found, exact.edge_given[seen], atol=0.03)
    drawn = posterior["edge"].mean(("chain", "draw")).values
    assert np.abs(drawn - found).max() < 4 * np.sqrt(0.25 / 3200)


def test_the_guide_is_near_and_its_bound_below_the_evidence(case: tuple[Problem, Quadrature, np.ndarray]) -> None:
    problem, exact, seen = case
    result = fit_svi(problem, num_steps=1500, lr=0.03, lr_decay=0.05, num_samples=2000, progress=False)
    found = result.posterior["edge_probability"].mean(("chain", "draw")).values
    assert np.abs(found - exact.edge_given[seen]).max() < 0.05
    log_weight = result.tree["sample_stats"]["log_weight"].values.ravel()
    bound, error = log_weight.mean(), log_weight.std() / np.sqrt(len(log_weight))
    assert bound < exact.log_evidence + 3 * error
    assert bound > exact.log_evidence - 0.3


def enumerated(seen: Tensor, prior: Prior) -> None:
    """The generative model written out, with edges as sites that the engine enumerates."""
    deletion = pyro.sample("deletion", dist.Beta(*prior.deletion))
    ratio = pyro.sample("addition_ratio", dist.Beta(*prior.addition_ratio))
    rate = pyro.sample("rate_logit", dist.Normal(*prior.rate))
    with pyro.plate("pair", len(seen)):
        edge = pyro.sample("edge", dist.Bernoulli(logits=rate))
        chance = edge * (1 - deletion) + (1 - edge) * ratio * (1 - deletion)
        pyro.sample("observed", dist.Bernoulli(chance), obs=seen)


def test_the_engine_that_sums_edges_out_agrees() -> None:
    pairs, prior = make_problem(SMALL, expected_degree=2.0).args
    problem = Problem("enumerated", enumerated, args=(pairs.seen, prior))
    posterior = run_mcmc(problem, num_chains=32, warmup_steps=150, num_samples=100, progress=False).posterior
    exact = Quadrature(pairs.seen.numpy(), 1, prior)
    drawn = posterior["edge"].mean(("chain", "draw")).values
    np.testing.assert_allclose(drawn, exact.edge_given[pairs.seen.numpy().astype(int)], atol=0.05)


# -- candidates -------------------------------------------------------------------------------------------------------


def log_density(problem: Problem, values: dict[str, Tensor]) -> float:
    """Log density of the observed edges at given values."""
    model = poutine.condition(problem.model, values)
    trace = poutine.trace(poutine.block(model, hide=["edge"])).get_trace(*problem.args, **problem.kwargs)
    trace.compute_log_prob()
    return float(sum(trace.nodes[n]["log_prob_sum"] for n in ("observed", "rest") if n in trace.nodes))


VALUES = {"deletion": torch.tensor(0.3), "addition_ratio": torch.tensor(0.05)}


def test_pairs_left_out_are_counted_where_they_are_alike() -> None:
    data = simulated(30, 1).drop_vars("split").assign(graph_index=("node", np.repeat([0, 1], [14, 16])))
    inside = data["graph_index"].values[data["source"].values] == data["graph_index"].values[data["target"].values]
    kept = data.isel(edge=np.flatnonzero(inside))
    values = {**VALUES, "rate_logit": torch.tensor([-1.0, -3.0, -0.5])}
    every = make_problem(kept, blocks=True, all_pairs=True)
    some = make_problem(kept, blocks=True, all_pairs=False, neighbours=2, random=0.5)
    assert some.args[0].edges.num_pairs < every.args[0].edges.num_pairs == 14 * 13 // 2 + 16 * 15 // 2
    assert some.args[0].weight.eq(1).all()
    assert log_density(some, values) == pytest.approx(log_density(every, values), abs=1e-3)
    for name in ("num_edges", "homophily"):
        one, other = (
            poutine.trace(poutine.condition(p.model, values)).get_trace(*p.args, **p.kwargs) for p in (some, every)
        )
        assert float(one.nodes[name]["value"]) == pytest.approx(float(other.nodes[name]["value"]), rel=1e-4)


def test_weights_of_random_pairs_make_the_log_density_unbiased() -> None:
    data = simulated(30, 2)
    values = {**VALUES, "rate_logit": torch.tensor([-2.0]), "coefficient": torch.tensor([1.0])}

    def log_likelihood(pairs: PairData, weight: Tensor) -> float:
        logits = prior_logits(pairs, Prior((1, 1), (1, 1), (0, 1)), values)
        channel = NoisyCount(logits, values["deletion"], values["addition_ratio"] * (1 - values["deletion"]))
        return float((weight * channel.log_prob(pairs.seen)).sum())

    options = {**PAIRS, "similarity": ("inner",)}
    every = make_pairs(data, **options)
    exact = log_likelihood(every, every.weight)
    key = every.edges.source * 30 + every.edges.target
    found = []
    for seed in range(400):
        some = make_pairs(data, **{**options, "all_pairs": False, "neighbours": 2, "random": 0.5, "seed": seed})
        assert float(some.weight.sum()) == pytest.approx(30 * 29 / 2)
        order = torch.searchsorted(
            *(x.contiguous() for x in (key.sort().values, some.edges.source * 30 + some.edges.target))
        )
        same = some._replace(similarity=every.similarity[key.sort().indices][order])  # of equal origin and scale
        found.append((log_likelihood(same, some.weight), log_likelihood(same, torch.ones_like(some.weight))))
    weighted, plain = np.array(found).T
    error = weighted.std(ddof=1) / np.sqrt(len(weighted))
    assert abs(weighted.mean() - exact) < 4 * error
    assert abs(plain.mean() - exact) > 20 * error  # the control: candidates that stand for themselves alone


def test_large_graphs_keep_moments_of_edges() -> None:
    data = simulated(150, 3)
    problem = make_problem(data, blocks=True)
    result = fit_svi(problem, num_steps=5, num_samples=20, progress=False)
    marginals = result.tree["marginals"].to_dataset()
    assert marginals["edge_probability"].sizes["pair"] == 150 * 149 // 2
    assert "edge_probability" not in result.posterior
    assert {"num_edges", "mean_degree", "homophily"} <= set(result.posterior)


# -- blocks and labels ------------------------------------------------------------------------------------------------


def test_cold_memberships_are_classes_summed_over() -> None:
    """One node of unknown class: its likelihood over noise is that over its two classes."""
    x = np.array([[0.0], [1.0], [0.2], [1.3], [0.6]])
    data = graph(5, [(0, 2), (1, 3), (2, 4)], x=x, y=[0, 1, 0, 1, 0], split=["train"] * 4 + ["test"])
    problem = make_problem(data, blocks=True)
    pairs, prior = problem.args
    prior = prior._replace(temperature=0.02)
    values = {**VALUES, "rate_logit": torch.tensor([0.5, -2.0, 0.0]), "membership_bias": torch.zeros(2)}
    values["membership_weight"] = torch.tensor([[-1.0, 1.0]])

    def likelihood(logits: Tensor) -> Tensor:
        return (
            NoisyCount(logits, values["deletion"], 0.05 * (1 - values["deletion"])).log_prob(pairs.seen).sum(-1).exp()
        )

    torch.manual_seed(0)
    noise = dist.Gumbel(torch.zeros(20_000, 1, 2), 1.0).sample()
    soft = torch.stack([prior_logits(pairs, prior, {**values, "membership_noise": n}) for n in noise[:4000]])
    found = likelihood(soft)
    chance = (pairs.x @ values["membership_weight"])[4].softmax(-1)
    rate = values["rate_logit"]
    exact = torch.tensor(0.0)
    for k in range(2):
        y = torch.tensor([0, 1, 0, 1, k])
        table = torch.tensor([[0, 1], [1, 2]])
        exact = exact + chance[k] * likelihood(rate[table[y[pairs.edges.source], y[pairs.edges.target]]])
    error = float(found.std()) / np.sqrt(len(found))
    assert abs(float(found.mean() - exact)) < 4 * error + 0.02 * float(exact)


LABELLED = graph(
    4,
    [(0, 1), (1, 2), (2, 3)],
    x=np.array([[1.5, 0.0], [-0.2, 0.3], [0.2, -0.3], [-1.5, 0.0]]),
    y=[0, 1, 1, 1],
)


def labelled_marginals(problem: Problem, weights: dict[str, Tensor] | None) -> np.ndarray:
    """Edge marginals (pair,) under labels: parameters by chains without them, weights given or drawn, all graphs."""
    pairs, prior = problem.args
    without = make_problem(LABELLED, similarity=("inner",), expected_degree=2.0)
    draws = run_mcmc(without, num_chains=32, warmup_steps=150, num_samples=200, progress=False).posterior
    chance = torch.as_tensor(draws["edge_probability"].values).flatten(0, 1)  # (draw, pair)
    every = torch.tensor(list(itertools.product([0.0, 1.0], repeat=6)))  # (graph, pair)
    if weights is None:
        torch.manual_seed(1)
        hidden, num_features = problem.kwargs["hidden"], pairs.x.shape[1]
        first = prior.network / np.sqrt(num_features) * torch.randn(len(chance), 1, num_features, hidden)
        second = prior.network / np.sqrt(hidden) * torch.randn(len(chance), 1, hidden, 2)
    else:
        first, second = weights["weight_in"].mT, weights["weight_out"]
    inner = propagate(pairs.x @ first, pairs.edges, every).relu()
    logits = propagate(inner @ second, pairs.edges, every)  # (draw, graph, node, class)
    fit = logits.log_softmax(-1)[..., torch.arange(4), pairs.y].sum(-1).exp()
    weight = torch.where(every == 1, chance.unsqueeze(1), 1 - chance.unsqueeze(1)).prod(-1) * fit
    return (weight.sum(0) @ every / weight.sum()).numpy()


def test_antithetic_graphs_give_the_derivative_of_the_mean() -> None:
    torch.manual_seed(0)
    logits, values = torch.tensor([-2.0, 0.3, 1.5]), torch.randn(8)
    place = torch.tensor([4, 2, 1])
    every = torch.tensor(list(itertools.product([0, 1], repeat=3)), dtype=torch.float32)
    free = logits.clone().requires_grad_()
    probability = torch.where(every == 1, free.sigmoid(), (-free).sigmoid()).prod(-1)
    (exact,) = torch.autograd.grad(probability @ values, free)

    def function(graphs: Tensor) -> Tensor:
        return values[(graphs.long() * place).sum(-1)]

    draws = torch.stack([disarm_slope(function, logits, torch.bernoulli(logits.sigmoid())) for _ in range(4000)])
    error = draws.std(0) / np.sqrt(len(draws))
    assert ((draws.mean(0) - exact).abs() < 4 * error).all()


@pytest.mark.slow
def test_labels_move_edges_as_enumeration_says() -> None:
    options: dict[str, Any] = {"similarity": ("inner",), "labels": True, "hidden": 2, "expected_degree": 2.0}
    problem = make_problem(LABELLED, **options)
    weights = {
        "weight_in": torch.tensor([[3.0, 0.0], [-3.0, 0.0]]),
        "weight_out": torch.tensor([[1.0, -1.0], [-1.0, 1.0]]),
    }
    given = replace(
        problem,
        model=poutine.condition(problem.model, weights),
        guide=poutine.block(poutine.condition(problem.guide, weights), hide=list(weights)),
    )
    result = fit_svi(given, num_steps=1000, lr=0.03, lr_decay=0.05, num_samples=4000, progress=False)
    found = result.posterior["edge"].mean(("chain", "draw")).values
    exact = labelled_marginals(problem, weights)
    assert np.abs(found - exact).max() < 0.05
    before = result.posterior["edge_probability"].mean(("chain", "draw")).values
    assert np.abs(before - exact).max() > 0.05  # the labels say something
    assert result.posterior["class_probability"].dims == ("chain", "draw", "node", "class")


@pytest.mark.slow
def test_importance_weights_mend_the_guide_of_unknown_weights() -> None:
    problem = make_problem(LABELLED, similarity=("inner",), labels=True, hidden=4, expected_degree=2.0)
    exact = labelled_marginals(problem, None)
    result = fit_svi(problem, num_steps=1000, lr=0.03, lr_decay=0.05, num_samples=20_000, progress=False)
    weight = result.tree["sample_stats"]["log_weight"].values.ravel()
    weight = np.exp(weight - weight.max())
    found = weight @ result.posterior["edge"].values[0] / weight.sum()
    assert np.abs(found - exact).max() < 0.05


def test_labels_go_with_everything_that_tells_of_edges() -> None:
    options: dict[str, Any] = {"similarity": ("inner", "distance"), "propensity": True, "trials": 3}
    counted = LABELLED.assign(count=("edge", [1, 2, 3]))
    problem = make_problem(counted, labels=True, hidden=2, all_pairs=False, neighbours=0, random=0.5, **options)
    assert problem.args[0].edges.num_pairs < 6
    result = fit_svi(problem, num_steps=5, num_samples=10, progress=False)
    assert result.posterior["class_probability"].dims == ("chain", "draw", "node", "class")
    assert np.allclose(result.posterior["class_probability"].sum("class"), 1, atol=1e-5)
    assert result.posterior["propensity_noise"].dims == ("chain", "draw", "node")


def test_labelled_edges_are_refused_to_chains() -> None:
    problem = make_problem(LABELLED, labels=True, hidden=2)
    with pytest.raises(ProblemError, match="use fit_svi"):
        run_mcmc(problem, num_samples=2, warmup_steps=2, progress=False)


@pytest.mark.parametrize("weights", ["normal", "point"])
def test_without_shift_the_guide_of_edges_is_exact(weights: str) -> None:
    problem = make_problem(LABELLED, labels=True, hidden=2, weights=weights)
    model, guide = problem.programs()
    assert guide is not None
    torch.manual_seed(0)
    guided = poutine.trace(guide).get_trace(*problem.args, **problem.kwargs)
    trace = poutine.trace(poutine.replay(model, trace=guided)).get_trace(*problem.args, **problem.kwargs)
    torch.testing.assert_close(guided.nodes["edge"]["fn"].logits, trace.nodes["edge"]["fn"].logits)
    assert all(parameter.requires_grad for parameter in guide.parameters())


# -- calibration ------------------------------------------------------------------------------------------------------


def calibrated(inferred_deletion: tuple[float, float]) -> Any:
    """Ranks of parameters and of the number of edges, by importance resampling from the prior."""
    data = simulated(12, 0).drop_vars(["source", "target"]).drop_dims("edge", errors="ignore")
    true = Prior((2.0, 4.0), (1.0, 8.0), (-1.0, 1.0), coefficient=1.0)
    u, v = np.triu_indices(12, 1)

    def build(seen: np.ndarray) -> PairData:
        observed = data.assign(source=("edge", u[seen]), target=("edge", v[seen]))
        return make_pairs(observed, **{**PAIRS, "similarity": ("inner",)})

    def simulate(rng: np.random.Generator) -> tuple[dict[str, Any], PairData]:
        deletion, ratio = rng.beta(*true.deletion), rng.beta(*true.addition_ratio)
        rate, slope = rng.normal(*true.rate), rng.normal()
        inner = build(np.zeros(len(u), dtype=bool)).similarity[:, 0].numpy()
        edge = rng.random(len(u)) < 1 / (1 + np.exp(-rate - slope * inner))
        seen = np.where(edge, rng.random(len(u)) >= deletion, rng.random(len(u)) < ratio * (1 - deletion))
        truth = {"deletion": deletion, "addition_ratio": ratio, "rate": rate, "slope": slope, "edges": edge.sum()}
        return {name: np.asarray(value, dtype=float) for name, value in truth.items()}, build(seen)

    def infer(pairs: PairData, seed: int) -> xr.Dataset:
        torch.manual_seed(seed)
        values = {
            "deletion": dist.Beta(*inferred_deletion).sample((4000,)),
            "addition_ratio": dist.Beta(*true.addition_ratio).sample((4000,)),
            "rate_logit": true.rate[0] + true.rate[1] * torch.randn(4000, 1),
            "coefficient": torch.randn(4000, 1),
        }
        logits = torch.func.vmap(lambda each: prior_logits(pairs, true, each))(values)
        addition = values["addition_ratio"] * (1 - values["deletion"])
        channel = NoisyCount(logits, values["deletion"].unsqueeze(-1), addition.unsqueeze(-1))
        chosen = torch.multinomial(channel.log_prob(pairs.seen).sum(-1).softmax(0), 99, replacement=True)
        kept = {name: value[chosen].squeeze(-1) for name, value in values.items()}
        odds = torch.func.vmap(lambda each: edge_logits(pairs, true, each))({n: x[chosen] for n, x in values.items()})
        edges = torch.bernoulli(odds.sigmoid()).sum(-1)
        found = {"deletion": kept["deletion"], "addition_ratio": kept["addition_ratio"], "rate": kept["rate_logit"]}
        found |= {"slope": kept["coefficient"], "edges": edges}
        return xr.Dataset({name: (("chain", "draw"), value.numpy()[None]) for name, value in found.items()})

    return sbc(simulate, infer, num_replicates=200, num_draws=99, seed=4)


def test_parameters_and_edges_are_calibrated() -> None:
    found = calibrated((2.0, 4.0))
    assert found.ok, found


@pytest.mark.slow
def test_calibration_with_a_wrong_prior_fails() -> None:
    assert not calibrated((8.0, 2.0)).ok


# -- input ------------------------------------------------------------------------------------------------------------

CLASSED = graph(4, [(0, 1)], x=np.eye(4), y=[0, 1, 0, 1], split=["train", "train", "test", "test"])


@pytest.mark.parametrize(
    ("data", "options", "words"),
    [
        (CLASSED, {"blocks": True, "labels": True}, "count it twice"),
        (CLASSED.drop_vars("y"), {"blocks": True}, "no y"),
        (CLASSED.drop_vars("x"), {"labels": True}, "no x"),
        (CLASSED.drop_vars("source"), {}, "lack"),
        (CLASSED.assign(y=("node", [0, 2, 0, 1])), {"blocks": True}, r"of class \[1\]"),
        (CLASSED.assign(y=("node", [0.0, 1.0, 0.0, 1.0])), {"blocks": True}, "whole numbers"),
        (CLASSED.assign(x=("node", [0.0, 1.0, 2.0, 3.0])), {}, "give numbers"),
        (CLASSED.assign(y=("node", [-1, 1, 0, 1])), {"blocks": True}, "have no class"),
        (CLASSED, {"trials": 0}, "trials=0"),
        (CLASSED, {"trials": 3}, "add count"),
        (CLASSED.assign(count=("edge", [4])), {"trials": 3}, "from 1 to trials=3"),
        (
            CLASSED,
            {"similarity": ["cosin"]},
            r"similarity=\['cosin'\]; give a list, each item one of cosine, inner, distance",
        ),
        (CLASSED, {"deletion": (0.0, 1.0)}, r"deletion=\(0.0, 1.0\); give a list of 2 \(a number above 0"),
        (CLASSED, {"deletion": (2.0,)}, r"deletion=\(2.0,\); give a list of 2"),
        (CLASSED, {"expected_degree": -1.0}, "expected_degree=-1.0; give a number of at least 1e-06"),
        (CLASSED, {"all_pairs": False, "neighbours": 1, "random": 0.0}, "nothing stands for them"),
        (CLASSED, {"all_pairs": False, "neighbours": 4}, "neighbours=4"),
        (CLASSED, {"labels": True, "weights": "gauss"}, "weights='gauss'"),
        (CLASSED, {"labels": True, "hidden": 0}, "hidden=0"),
        (CLASSED, {"hidden": 8}, "hidden=8 is not used with labels=False"),
        (CLASSED, {"estimator": "disarm"}, "estimator='disarm' is not used with labels=False"),
        (CLASSED, {"neighbours": 2}, "neighbours=2 is not used with all pairs as candidates"),
        (CLASSED, {"seed": 2}, "seed=2 is not used with all pairs as candidates"),
        (CLASSED, {"all_pairs": False, "neighbours": 0, "metric": "l1"}, "metric='l1' is not used with neighbours=0"),
        (CLASSED.drop_vars("x"), {"all_pairs": False, "neighbours": 2}, "not used with data without features x"),
        (CLASSED, {"similarity": ["cosine", "cosine"]}, "names one of them twice"),
        (CLASSED.assign(source=("edge", [7])), {}, "name nodes 7"),
        (graph(1, []), {}, "no pairs"),
    ],
)
def test_bad_input_is_refused(data: xr.Dataset, options: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        make_problem(data, **options)


def test_features_must_be_finite() -> None:
    broken = CLASSED.copy(deep=True)
    broken["x"][0, 0] = np.nan
    with pytest.raises(DataError, match="not finite"):
        make_problem(broken)


def test_a_graph_without_edges_and_features_will_do() -> None:
    problem = make_problem(graph(4, [])).validate()
    assert problem.sites["observed"].shape == (6,)
    assert "homophily" not in problem.sites


def test_labels_of_pairs_are_node_names() -> None:
    problem = make_problem(CLASSED)
    assert problem.data is not None
    assert problem.data["pair_source"].values[0] == "n0"
    assert problem.data["pair_observed"].values.sum() == 1
    assert tiny().validate().dims()["edge"] == ["pair"]


def test_what_does_not_fit_into_memory_is_refused(monkeypatch):
    monkeypatch.setattr("probmodels.inference.runtime.memory._SMALL", 0)
    monkeypatch.setattr("probmodels.inference.runtime.memory.free_bytes", lambda device: 100)
    monkeypatch.setattr("probmodels.guides.edges.pairs_of_numbers", None)  # pairs are counted before they are listed
    with pytest.raises(ProblemError, match=r"28 candidate pairs need about .* take all_pairs=False"):
        tiny()
    with pytest.raises(ProblemError, match=r"candidate pairs need about .* take all_pairs=False"):
        make_problem(CLASSED, all_pairs=False, neighbours=1, random=0.5)


# -- the verdict on the model -----------------------------------------------------------------------------------------


def seen_graph(kind: str) -> xr.Dataset:
    """Sixty nodes: edges of the model, hubs, or groups of friends who all know each other."""
    rng = np.random.default_rng(0)
    one, other = np.triu_indices(60, 1)
    chance = np.full(len(one), 0.12)
    if kind == "hubs":
        chance = np.where(one < 5, 0.7, 0.04)
    elif kind == "groups":
        chance = np.where(one // 6 == other // 6, 0.9, 0.02)
    seen = rng.random(len(one)) < chance
    return graph(60, list(zip(one[seen].tolist(), other[seen].tolist(), strict=True)))


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("model", {}, ""),
        ("hubs", {}, "variance of degrees"),
        ("hubs", {"propensity": True}, ""),
        ("groups", {}, "number of triangles"),
    ],
)
def test_graphs_outside_of_the_model_are_found(kind: str, options: dict[str, Any], words: str) -> None:
    problem = make_problem(seen_graph(kind), **options)
    result = fit_svi(problem, num_steps=500, lr=0.03, lr_decay=0.05, num_samples=200, progress=False)
    report = result.diagnose()
    found = [finding for finding in report.findings if finding.part == "model"]
    assert len(found) == 2
    assert report.model == ("failed" if words else "passed"), str(report)
    assert not words or any(words in finding.verdict for finding in found if finding.harmful)
