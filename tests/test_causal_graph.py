"""Causal graphs of concepts: sums over graphs, scores and posteriors against closed forms and enumeration."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from scipy import stats
from scipy.special import logsumexp, softmax

from probmodels import acyclic_sem, fit_svi, run_mcmc
from probmodels.bayesian_network.graphs import all_graphs
from probmodels.causal_graph import CausalGraph, ExactGraphs, edge_probabilities, make_problem, tiny, write_outputs
from probmodels.causal_graph.scores import _RATIOS, _SHAPE, _STEP, _places, _shapes, mechanism_scores, noise_gain
from probmodels.errors import DataError, ProblemError
from probmodels.guides.bayesian_network import is_acyclic
from probmodels.guides.causal_graph import GraphTable, ModularGraphs


def random_weights(size: int, scale: float, seed: int = 0) -> np.ndarray:
    """Random log weights of all sets of parents; some sets are impossible."""
    generator = np.random.default_rng(seed)
    weights = scale * generator.standard_normal((size, 2**size))
    weights[generator.random(weights.shape) < 0.1] = -np.inf
    weights[:, 0] = 0.0
    for node in range(size):
        weights[node, np.arange(2**size) >> node & 1 == 1] = -np.inf
    return weights


def listed(weights: np.ndarray) -> tuple[torch.Tensor, np.ndarray]:
    """All graphs with their log weights."""
    graphs = all_graphs(len(weights))
    sets = (graphs.numpy() * 2 ** np.arange(len(weights))[:, None]).sum(1).astype(int)
    return graphs, weights[np.arange(len(weights)), sets].sum(1)


def labels_of(table: pd.DataFrame) -> xr.DataArray:
    values = table.to_numpy(copy=True)
    return xr.DataArray(values, dims=("data", "concept"), coords={"concept": list(table.columns)})


def bent(num: int, seed: int = 0) -> pd.DataFrame:
    """A common cause, a curved effect of it, and an effect of both."""
    generator = np.random.default_rng(seed)
    cause, first, second = generator.standard_normal((3, num))
    middle = cause**2 + 0.5 * first
    return pd.DataFrame({"cause": cause, "middle": middle, "last": np.tanh(2 * cause) * middle + 0.5 * second})


# -- sums over graphs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "scale"), [(1, 1.0), (2, 1.0), (3, 5.0), (4, 1.0), (4, 300.0), (4, 1e5), (5, 10.0)])
def test_sums_over_graphs_are_those_of_enumeration(size: int, scale: float) -> None:
    weights = random_weights(size, scale)
    table, (graphs, listed_weights) = GraphTable(weights), listed(weights)
    total = logsumexp(listed_weights)
    assert table.log_total == pytest.approx(total, rel=1e-12, abs=1e-9)
    chance = np.exp(listed_weights - total)
    edges = np.tensordot(chance, graphs.numpy(), 1)
    np.testing.assert_allclose(table.edge_probability(), edges, atol=1e-10)
    found = ModularGraphs(table).log_prob(graphs).numpy()
    np.testing.assert_allclose(np.exp(found), chance, atol=1e-5)  # 32 bits


def test_equal_weights_count_graphs() -> None:
    # OEIS A003024
    weights = np.zeros((8, 256))
    for node in range(8):
        weights[node, np.arange(256) >> node & 1 == 1] = -np.inf
    assert math.exp(GraphTable(weights).log_total) == pytest.approx(783702329343)


def test_draws_have_their_probabilities() -> None:
    weights = random_weights(3, 1.0, seed=1)
    graphs, log_weights = listed(weights)
    torch.manual_seed(0)
    draws = ModularGraphs(GraphTable(weights)).sample((4000,))
    place = (draws.flatten(1)[:, None] == graphs.flatten(1)).all(-1)
    assert (place.sum(1) == 1).all()
    counts, expected = place.sum(0).numpy(), 4000 * np.exp(log_weights - logsumexp(log_weights))
    assert (counts[expected == 0] == 0).all()
    common = expected > 5
    share = expected[common] / expected[common].sum() * counts[common].sum()
    assert stats.chisquare(counts[common], share).pvalue > 1e-3


def test_cycles_are_impossible_and_so_is_a_table_of_nothing_else() -> None:
    table = GraphTable(random_weights(3, 1.0))
    ring = torch.roll(torch.eye(3), 1, 1)
    assert ModularGraphs(table).log_prob(ring) == -math.inf
    only = np.full((2, 4), -np.inf)
    only[0, 2] = only[1, 1] = 0.0  # each node has to be a parent of the other
    assert GraphTable(only).log_total == -math.inf


# -- scores -----------------------------------------------------------------------------------------------------------


def test_scores_of_linear_mechanisms_are_student_densities() -> None:
    x = np.random.default_rng(0).standard_normal((15, 3))
    found = mechanism_scores(x, kernels=("linear",), noise="normal", floors=[0.1, 0.3]).log_likelihood
    assert found.shape == (2, 3, 8)
    for causes in ([], [0], [0, 1]):
        products = x[:, causes] @ x[:, causes].T / max(len(causes), 1)
        terms = [
            stats.multivariate_t.logpdf(
                x[:, 2], np.zeros(15), 15 / 2 * 0.3**2 / _SHAPE * (np.eye(15) + ratio * products), df=2 * _SHAPE
            )
            for ratio in _RATIOS
        ]
        expected = logsumexp(terms) - math.log(len(terms))
        assert found[1, 2, sum(2**cause for cause in causes)] == pytest.approx(expected, abs=1e-8)
    assert (found[:, 2, 4:] == -np.inf).all()


def test_kernels_of_full_rank_are_exact() -> None:
    x = np.random.default_rng(1).standard_normal((12, 2))
    found = mechanism_scores(x, kernels=("additive",), noise="normal", num_points=12, floors=[0.2]).log_likelihood
    terms = []
    for length in (0.7, 1.5):
        kernel = np.outer(x[:, 0], x[:, 0]) + np.exp(-0.5 * (x[:, [0]] - x[:, 0]) ** 2 / length**2)
        terms += [
            stats.multivariate_t.logpdf(
                x[:, 1], np.zeros(12), 12 / 2 * 0.2**2 / _SHAPE * (np.eye(12) + ratio * kernel), df=2 * _SHAPE
            )
            for ratio in _RATIOS
        ]
    assert found[0, 1, 1] == pytest.approx(logsumexp(terms) - math.log(len(terms)), abs=1e-3)


def test_shapes_of_noise_are_standardised_densities() -> None:
    density = np.exp(_shapes() - 0.5 * _places() ** 2) / math.sqrt(2 * math.pi)
    # Heavy tails go on beyond the table.
    np.testing.assert_allclose(density.sum(1) * _STEP, 1, atol=2e-3)
    np.testing.assert_allclose((density * _places()).sum(1) * _STEP, 0, atol=0.01)
    light = np.maximum(density[:, 0], density[:, -1]) < 1e-10
    assert light.sum() > 10
    np.testing.assert_allclose((density * _places() ** 2).sum(1)[light] * _STEP, 1, atol=5e-3)


def test_shapes_gain_what_entropy_says_and_lose_little() -> None:
    generator = np.random.default_rng(0)
    laplace = noise_gain(generator.laplace(size=4000))
    # The relative entropy of Laplace against normal noise is 0.0724; four standard errors of it, and log of 96 shapes.
    assert laplace == pytest.approx(4000 * 0.0724, abs=4 * 14 * math.sqrt(4000 / 1000) + math.log(96))
    assert -math.log(len(_shapes())) - 0.1 < noise_gain(generator.standard_normal(4000)) < 0


# -- posteriors -------------------------------------------------------------------------------------------------------


def test_curved_mechanisms_have_directions_and_linear_normal_ones_have_none() -> None:
    problem = make_problem(bent(400))
    found = edge_probabilities(problem)
    assert found.dims == ("cause", "effect")
    for cause, effect in (("cause", "middle"), ("cause", "last"), ("middle", "last")):
        assert float(found.sel(cause=cause, effect=effect)) > 0.95
    generator = np.random.default_rng(0)
    shares = []
    for _ in range(10):
        first, noise = generator.standard_normal((2, 400))
        pair = edge_probabilities(make_problem(pd.DataFrame({"a": first, "b": first + noise}))).values
        assert pair[0, 1] + pair[1, 0] > 0.99
        shares.append(pair[0, 1])
    # Exact probabilities of two graphs of one class would all be 1/2; these are so within what 400 rows say by chance.
    assert 0.3 < np.mean(shares) < 0.7
    assert np.median(np.abs(np.array(shares) - 0.5)) < 0.4


def test_draws_are_acyclic_and_as_frequent_as_exact_edges() -> None:
    problem = tiny()
    result = run_mcmc(
        problem, num_samples=1000, warmup_steps=0, num_chains=2, chain_method="sequential", progress=False
    )
    draws = result.posterior["graph"]
    assert draws.dims == ("chain", "draw", "cause", "effect")
    assert is_acyclic(torch.as_tensor(draws.values)).all()
    exact = edge_probabilities(problem)
    # Independent draws: five standard errors of a frequency among 2000.
    assert (np.abs(draws.mean(("chain", "draw")) - exact) < 5 * np.sqrt(exact * (1 - exact) / 2000) + 1e-6).all()


def test_the_policy_comes_close_to_exact_edges() -> None:
    values = np.random.default_rng(3).standard_normal((60, 2))
    values[:, 1] += 0.3 * values[:, 0]
    problem = make_problem(pd.DataFrame(values, columns=["a", "b"]), hidden=4, num_particles=16, anneal=0)
    result = fit_svi(problem, num_steps=200, lr=0.03, lr_decay=0.1, num_samples=2000, progress=False)
    found = result.posterior["graph"].mean(("chain", "draw"))
    exact = edge_probabilities(problem)
    assert 0.02 < exact.values[0, 1] < 0.98
    assert float(np.abs(found - exact).max()) < 0.05  # 0.011 is the standard error of a frequency of 2000


def test_directions_of_relations_without_noise_are_averaged_over_what_data_cannot_tell() -> None:
    generator = np.random.default_rng(0)
    angle, sun = generator.uniform(-1, 1, 300), generator.standard_normal(300)
    data = pd.DataFrame({"angle": angle, "place": np.tan(angle), "sun": sun, "heat": sun**2 + sun})
    data["heat"] += 0.3 * generator.standard_normal(300)
    with pytest.warns(UserWarning, match="predict angle, place to within 0.04"):
        problem = make_problem(data, hidden=8, num_particles=16, anneal=0)
    found = edge_probabilities(problem)
    forth, back = (float(found.sel(cause=c, effect=e)) for c, e in (("angle", "place"), ("place", "angle")))
    assert forth + back == pytest.approx(1, abs=1e-3)
    assert 0.2 < forth < 0.8
    assert float(found.sel(cause="sun", effect="heat")) > 0.99  # what data tell stays told
    ordered = make_problem(data, order=["angle", "place", "sun", "heat"])  # warnings are errors here
    assert float(edge_probabilities(ordered).sel(cause="angle", effect="place")) > 0.99
    with pytest.warns(UserWarning, match="predict angle, place"):
        one = edge_probabilities(make_problem(data, floors=[0.02]))
    assert float(one.sel(cause="angle", effect="place")) in (pytest.approx(0, abs=0.05), pytest.approx(1, abs=0.05))


def test_few_rows_do_not_look_like_relations_without_noise() -> None:
    for seed in range(12):  # warnings are errors here
        values = np.random.default_rng(seed).standard_normal((12, 3))
        assert len(make_problem(pd.DataFrame(values, columns=["a", "b", "c"])).model.posterior.tables) == 1


def test_floors_come_in_any_order_and_are_checked() -> None:
    data = bent(40)
    one, two = (make_problem(data, floors=given) for given in ([0.04, 0.005], np.array([0.005, 0.04])))
    xr.testing.assert_identical(edge_probabilities(one), edge_probabilities(two))
    for bad in (0.0, [], [0.01, 1.5]):
        with pytest.raises(DataError, match="floors="):
            make_problem(data, floors=bad)


def test_densities_of_averaged_posteriors_are_those_of_draws() -> None:
    scores = np.random.default_rng(0).normal(scale=3.0, size=(5, 3, 8))
    prior = random_weights(3, 1.0)
    model = CausalGraph(scores, prior)
    graph, log_prior = listed(prior)
    graph = graph[log_prior > -np.inf].to(torch.get_default_dtype())
    weights = [listed(prior + np.where(np.isfinite(prior), one, 0))[1][log_prior > -np.inf] for one in scores]
    exact = np.mean([softmax(one) for one in weights], 0)
    density = (ModularGraphs(model.prior).log_prob(graph) + model.log_likelihood(graph)).double()
    np.testing.assert_allclose(density.softmax(0).numpy(), exact, atol=1e-5)
    evidence = [GraphTable(prior + np.where(np.isfinite(prior), one, 0)).log_total for one in scores]
    assert float(density.logsumexp(0)) == pytest.approx(np.mean(evidence) - model.prior.log_total, abs=1e-4)
    chosen = [model.posterior.log_probability(one) for one in graph.double().numpy()]
    np.testing.assert_allclose(np.exp(chosen), exact, atol=1e-12)
    generator = np.random.default_rng(1)
    drawn = np.mean([model.posterior.draw(generator) for _ in range(4000)], 0)
    edges = model.posterior.edge_probability()
    assert (np.abs(drawn - edges) < 5 * np.sqrt(edges * (1 - edges) / 4000) + 1e-6).all()


def test_knowledge_holds_in_every_draw() -> None:
    data = bent(60)
    known: dict[str, Any] = {"required": [("last", "middle")], "forbidden": [("cause", "last")]}
    problem = make_problem(data, **known, hidden=8, num_particles=16, anneal=0)
    for least, result in (
        (
            1.0,
            run_mcmc(problem, num_samples=200, warmup_steps=0, num_chains=1, chain_method="sequential", progress=False),
        ),
        (0.95, fit_svi(problem, num_steps=50, lr=0.01, num_samples=200, progress=False)),  # improbable, not impossible
    ):
        graphs = result.posterior["graph"]
        assert graphs.sel(cause="last", effect="middle").mean() >= least
        assert (graphs.sel(cause="cause", effect="last") == 0).all()
        assert (graphs.sel(cause="middle", effect="last") == 0).all()
    ordered = edge_probabilities(make_problem(data, order=["last", "middle", "cause"])).values
    assert (ordered[np.tril_indices(3)[::-1]] >= 0).all()
    assert not np.tril(ordered[::-1, ::-1]).any()
    with pytest.raises(DataError, match="max_parents=1 is less"):
        make_problem(data, required=[("last", "middle"), ("cause", "middle")], max_parents=1)


# -- input and output -------------------------------------------------------------------------------------------------


def test_only_complete_rows_for_training_count() -> None:
    data = bent(100)
    labels = labels_of(data)
    labels[:5, 1] = np.nan
    split = np.where(np.arange(100) < 80, "train", "test")
    problem = make_problem(xr.Dataset({"label": labels, "split": ("data", split)}))
    assert problem.data is not None
    assert problem.data["label"].sizes == {"data": 75, "concept": 3}
    same = make_problem(data.iloc[5:80])
    np.testing.assert_array_equal(edge_probabilities(problem), edge_probabilities(same))


def test_the_true_graph_is_kept_and_comes_back() -> None:
    data, truth = bent(40), np.triu(np.ones((3, 3), dtype=int), 1)
    problem = make_problem(xr.Dataset({"label": labels_of(data), "graph": (("effect", "cause"), truth.T)}))
    assert problem.data is not None
    np.testing.assert_array_equal(problem.data["true_graph"], truth)
    again = make_problem(problem.data)
    assert again.data is not None
    xr.testing.assert_identical(again.data, problem.data)


def test_a_problem_without_posterior_is_refused() -> None:
    other = acyclic_sem.tiny()
    with pytest.raises(ProblemError, match="no posterior"):
        edge_probabilities(other)
    with pytest.raises(ProblemError, match="use fit_svi"):
        ExactGraphs(other)


def test_outputs_are_written(tmp_path: Path) -> None:
    result = run_mcmc(tiny(), num_samples=50, warmup_steps=0, num_chains=2, chain_method="sequential", progress=False)
    out = write_outputs(result, tmp_path)
    assert "a -> b" in out.table
    assert {"edges.csv", "graphs.csv", "summary.txt"} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda d: d.assign(last=1.0), {}, "concept 'last' is constant"),
        (lambda d: d.assign(last="x"), {}, "column 'last' holds no numbers"),
        (lambda d: d.iloc[:5], {}, "5 of 5 rows have all labels"),
        (lambda d: d[["last"]], {}, "1 concepts"),
        (lambda d: d.assign(last=np.inf), {}, "infinite"),
        (lambda d: pd.DataFrame(np.random.default_rng(0).random((20, 13))), {}, "13 concepts"),
        (lambda d: d.to_dict(), {}, "give a Dataset or a DataArray or a DataFrame"),
        (
            lambda d: xr.Dataset({"label": labels_of(d), "graph": (("cause", "effect"), np.eye(2))}),
            {},
            r"graph has dims \{'cause': 2, 'effect': 2\}; expected",
        ),
        (lambda d: xr.Dataset({"x": 1}), {}, "name the concepts' values 'label'"),
        (lambda d: d, {"graph": "point"}, "unknown option 'graph'"),
        (lambda d: d, {"mechanism": "linear", "num_points": 40}, "num_points=40 is not used with mechanism"),
        (lambda d: d, {"edge_probability": 1.0}, "edge_probability"),
        (lambda d: d, {"max_parents": 0}, "max_parents"),
        (lambda d: d, {"order": ["cuase", "last"]}, "did you mean 'cause'"),
        (lambda d: d, {"required": [("cause", "last"), ("last", "cause")]}, "cause -> last -> cause"),
    ],
)
def test_bad_input_is_refused(change: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        make_problem(change(bent(40)), **options)
