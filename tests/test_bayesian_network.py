"""Structures of Bayesian networks: counts, scores, prior, policy and fits against closed forms and enumeration."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from scipy import stats
from scipy.special import gammaln

from probmodels import Result, fit_svi
from probmodels.bayesian_network import make_problem, tiny
from probmodels.bayesian_network.graphs import AcyclicGraphs, all_graphs
from probmodels.bayesian_network.outputs import (
    class_graph,
    draw_network,
    network_table,
    summarise_network,
    write_outputs,
)
from probmodels.bayesian_network.scores import bdeu, best_score, bge, parent_scores
from probmodels.datasets import load
from probmodels.errors import DataError, ResultError
from probmodels.guides.bayesian_network import EdgePolicy, GraphPolicy, is_acyclic, reachable
from probmodels.inference import check_exact
from probmodels.inference.flows.balance import ParallelVarGrad


def graph_of(size: int, *edges: tuple[int, int]) -> torch.Tensor:
    graph = torch.zeros(size, size)
    for a, b in edges:
        graph[a, b] = 1
    return graph


def total(scores: np.ndarray, graph: torch.Tensor) -> float:
    sets = (graph.numpy() * 2 ** np.arange(len(graph))[:, None]).sum(0).astype(int)
    return float(scores[np.arange(len(graph)), sets].sum())


# -- graphs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "count"), [(1, 1), (2, 3), (3, 25), (4, 543), (5, 29281)])
def test_graphs_are_as_many_as_they_should_be(size: int, count: int) -> None:
    graphs = all_graphs(size)
    assert len(graphs) == count == len(graphs.unique(dim=0))
    assert math.exp(AcyclicGraphs(size).log_total) == pytest.approx(count)


def test_the_number_of_large_graphs_is_the_published_one() -> None:
    # OEIS A003024
    assert math.exp(AcyclicGraphs(8).log_total) == pytest.approx(783702329343)


def test_cycles_are_found_however_long() -> None:
    ring = [(i, (i + 1) % 6) for i in range(6)]
    assert not is_acyclic(graph_of(6, *ring))
    assert is_acyclic(graph_of(6, *ring[:-1]))
    assert not is_acyclic(graph_of(3, (1, 1)))
    assert not is_acyclic(graph_of(3, (0, 2), (2, 0)))
    np.testing.assert_array_equal(reachable(graph_of(6, *ring[:-1])), np.triu(np.ones((6, 6))))


@pytest.mark.parametrize(("probability", "most"), [(0.5, None), (0.3, None), (0.3, 1), (0.7, 2)])
def test_prior_sums_to_one_and_draws_follow_it(probability: float, most: int | None) -> None:
    prior = AcyclicGraphs(4, probability, most)
    graphs = prior.enumerate_support()
    chance = prior.log_prob(graphs).exp()
    assert float(chance.sum()) == pytest.approx(1, abs=1e-5)
    odds = Fraction(probability) / (1 - Fraction(probability))
    assert float(chance[1] / chance[0]) == pytest.approx(float(odds) ** float(graphs[1].sum() - graphs[0].sum()), 1e-4)
    assert prior.log_prob(graph_of(4, (0, 1), (1, 2), (2, 0))) == -math.inf
    torch.manual_seed(0)
    count = 1000
    draws = prior.sample((count,))
    where = (draws.flatten(1)[:, None] == graphs.flatten(1)).all(-1)
    assert (where.sum(1) == 1).all()
    edges = np.bincount(draws.sum((1, 2)).int(), minlength=7)
    wanted = np.bincount(graphs.sum((1, 2)).int(), chance, minlength=7) * count
    some = wanted > 5
    assert stats.chisquare(edges[some], wanted[some] / wanted[some].sum() * edges[some].sum()).pvalue > 1e-3
    # Every one of the edges is as probable as the others: five standard errors of a frequency.
    share = draws.mean(0)[~torch.eye(4, dtype=torch.bool)]
    exact = float((chance * graphs[:, 0, 1]).sum())
    assert (share - exact).abs().max() < 5 * math.sqrt(exact * (1 - exact) / count)


def test_more_parents_than_allowed_are_impossible() -> None:
    prior = AcyclicGraphs(3, 0.5, 1)
    assert len(prior.enumerate_support()) == 16  # directed forests of three nodes
    assert prior.log_prob(graph_of(3, (0, 2), (1, 2))) == -math.inf


# -- scores -----------------------------------------------------------------------------------------------------------


def test_bge_of_one_variable_is_its_integral() -> None:
    x = np.array([[0.3], [-1.2], [0.8]])
    weight, extra = 0.7, 2.5
    scale = weight * (extra - 1) / (weight + 1)

    mean = np.linspace(-30, 30, 6001)[:, None]
    precision = np.exp(np.linspace(-12, 5, 800))
    log_density = stats.norm.logpdf(mean, 0, 1 / np.sqrt(weight * precision))
    log_density += stats.gamma.logpdf(precision, (1 + extra) / 2, scale=2 / scale)
    log_density += sum(stats.norm.logpdf(row, mean, 1 / np.sqrt(precision)) for row in x[:, 0])
    integral = np.trapezoid(np.trapezoid(np.exp(log_density), mean[:, 0], axis=0), precision)
    assert bge(x, mean_weight=weight, extra_degrees=extra)[1] == pytest.approx(math.log(integral), abs=1e-3)


def test_bge_of_two_variables_is_a_product_of_predictive_densities() -> None:
    generator = np.random.default_rng(0)
    x = generator.standard_normal((6, 2)) @ [[1.0, 0.7], [0.0, 0.5]]
    weight, degrees, mean, scatter = 1.0, 4.0, np.zeros(2), 0.5 * np.eye(2)
    expected = 0.0
    for row in x:
        free = degrees - 1
        shape = scatter * (weight + 1) / (weight * free)
        expected += stats.multivariate_t.logpdf(row, mean, shape, df=free)
        scatter = scatter + weight / (weight + 1) * np.outer(row - mean, row - mean)
        mean, weight, degrees = (weight * mean + row) / (weight + 1), weight + 1, degrees + 1
    assert bge(x)[3] == pytest.approx(expected, rel=1e-9)


def test_bdeu_is_that_of_counts_by_hand() -> None:
    # Parent 0, 0, 1, 1, 1 and child 0, 1, 1, 1, 1; equivalent sample size 2.
    x = np.array([[0, 0], [0, 1], [1, 1], [1, 1], [1, 1]])
    scores = parent_scores(bdeu(x, np.array([2, 2]), sample_size=2.0))
    alone = gammaln(2) - gammaln(7) + gammaln(1 + 1) + gammaln(1 + 4) - 2 * gammaln(1)
    given = gammaln(1) - gammaln(3) + 2 * (gammaln(1.5) - gammaln(0.5))  # two rows with parent 0, one of each state
    given += gammaln(1) - gammaln(4) + gammaln(3.5) - gammaln(0.5)  # three with parent 1
    assert scores[1, 0] == pytest.approx(alone)
    assert scores[1, 1] == pytest.approx(given)
    assert scores[1, 2] == -np.inf


@pytest.mark.parametrize("kind", ["bge", "bdeu"])
def test_equivalent_graphs_have_equal_scores_and_others_have_not(kind: str) -> None:
    if kind == "bge":
        of_sets = bge(load("gaussian_network", num_variables=4, num_samples=40, seed=2)["x"].values)
    else:
        data = load("discrete_network", num_variables=4, num_samples=60, num_states=3, seed=2)
        of_sets = bdeu(data["x"].values, data["num_states"].values)
    scores = parent_scores(of_sets)
    by_class: dict[bytes, list[float]] = {}
    for graph in all_graphs(4):
        by_class.setdefault(class_graph(graph.numpy()).tobytes(), []).append(total(scores, graph))
    assert len(by_class) == 185  # classes of graphs of four nodes, Gillispie and Perlman (2002)
    assert max(np.ptp(values) for values in by_class.values()) < 1e-8
    assert len(np.unique(np.round([values[0] for values in by_class.values()], 6))) > 150


def test_classes_share_colliders_and_what_follows_from_them() -> None:
    chain, fork = graph_of(3, (0, 1), (1, 2)), graph_of(3, (1, 0), (1, 2))
    np.testing.assert_array_equal(class_graph(chain), class_graph(fork))
    collider = graph_of(4, (0, 2), (1, 2), (2, 3))  # what comes after a collider cannot be turned round
    np.testing.assert_array_equal(class_graph(collider), collider)


def test_the_best_score_is_that_of_the_best_graph() -> None:
    scores = parent_scores(bge(load("gaussian_network", num_variables=4, num_samples=50, seed=3)["x"].values))
    assert best_score(scores) == pytest.approx(max(total(scores, graph) for graph in all_graphs(4)))


# -- guide ------------------------------------------------------------------------------------------------------------


def rough_policy(size: int, max_parents: int | None = None) -> EdgePolicy:
    """A policy with random weights."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(size, 2**size, generator=generator)
    for node, number in itertools.product(range(size), range(2**size)):
        if number >> node & 1 or number.bit_count() > (max_parents or size):
            scores[node, number] = -torch.inf
    policy = EdgePolicy(scores, hidden=8)
    with torch.no_grad():
        policy.second.normal_(generator=generator)
    return policy


@pytest.mark.parametrize(("size", "most"), [(2, None), (3, None), (4, None), (4, 1)])
def test_density_of_the_guide_sums_to_one_over_acyclic_graphs(size: int, most: int | None) -> None:
    policy = rough_policy(size, most)
    graphs = all_graphs(size)
    with torch.no_grad():
        chance = GraphPolicy(policy).log_prob(graphs).exp()
        cyclic = GraphPolicy(policy).log_prob(graph_of(size, (0, 1), (1, 0)))
    assert float(chance.sum()) == pytest.approx(1, abs=1e-5)
    assert cyclic == -math.inf
    few = (graphs.sum(-2) <= (most or size)).all(-1)
    assert (chance[few] > 0).all()
    assert (chance[~few] == 0).all()


@pytest.mark.parametrize("flatter", [{}, {"temperature": 3.0, "epsilon": 0.5}])
def test_draws_of_the_guide_follow_its_density(flatter: dict[str, float]) -> None:
    policy, graphs, count = rough_policy(3), all_graphs(3), 20_000
    torch.manual_seed(1)
    draws = GraphPolicy(policy).explored(**flatter).sample((count,))
    where = (draws.flatten(1)[:, None] == graphs.flatten(1)).all(-1)
    assert (where.sum(1) == 1).all()
    counts = where.sum(0).numpy()
    with torch.no_grad():
        chance = GraphPolicy(policy).log_prob(graphs).double().exp().numpy()
    differ = stats.chisquare(counts, chance / chance.sum() * count).pvalue
    assert differ < 1e-10 if flatter else differ > 1e-3


def test_first_actions_of_an_earlier_graph_are_kept() -> None:
    policy = rough_policy(4)
    torch.manual_seed(0)
    past, kept = GraphPolicy(policy).sample((50,)), torch.arange(50) % 7
    again = GraphPolicy(policy, (50,)).completed(past, kept)
    assert is_acyclic(again).all()
    same = (policy.actions(again) == policy.actions(past)).unflatten(-1, (-1, 2)).all(-1)
    before = torch.arange(policy.num_pairs) < kept[:, None]
    assert same[before].all()
    assert not same[~before].all()
    assert GraphPolicy(policy).completed(past[0], torch.tensor(3)).shape == (4, 4)


def test_all_draws_at_once_give_the_loss_of_single_ones() -> None:
    problem = tiny()
    loss = ParallelVarGrad(8)
    torch.manual_seed(0)
    (run,) = loss._runs(problem.model, problem.guide, (), {})
    gap = loss._log_reward(run) - run.log_q()
    assert gap.shape == (8,)
    graph = run.draw.nodes["graph"]["value"]
    prior, guide = AcyclicGraphs(3), GraphPolicy(problem.guide)
    alone = [prior.log_prob(g) + problem.model.log_likelihood(g) - guide.log_prob(g) for g in graph]
    torch.testing.assert_close(gap, torch.stack(alone), atol=1e-3, rtol=1e-5)
    torch.testing.assert_close(loss._by_datum([run]), torch.stack(alone).var() / 2, atol=1e-3, rtol=1e-3)


# -- fits -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fit() -> tuple[Any, Result]:
    data = load("gaussian_network", num_variables=4, num_samples=100, seed=0)
    problem = make_problem(data, num_particles=32, hidden=32, anneal=100)
    return problem, fit_svi(problem, num_steps=300, lr=0.03, schedule="cosine", clip_norm=5.0, progress=False)


def test_a_fit_has_the_exact_posterior(fit: tuple[Any, Result]) -> None:
    problem, result = fit
    found = check_exact(problem, result)
    assert float(found["mass"]) == pytest.approx(1, abs=1e-4)
    assert float(found["total_variation"]) < 0.05
    assert float(found["log_evidence"] - found["elbo"]) < 0.05


def test_the_summary_has_the_exact_marginals(fit: tuple[Any, Result], tmp_path) -> None:
    problem, result = fit
    graphs = all_graphs(4)
    weight = problem.model.log_likelihood(graphs).double().softmax(0)
    exact = torch.einsum("g,gab->ab", weight, graphs.double()).numpy()
    paths = torch.einsum("g,gab->ab", weight, reachable(graphs).double()).numpy() - np.eye(4)
    out = summarise_network(result)
    # Five standard errors of a share of 1000 draws, and what a total variation of 0.05 may do.
    assert np.abs(out["edge_probability"].values - exact).max() < 5 * 0.5 / math.sqrt(1000) + 0.05
    assert np.abs(out["path_probability"].values - paths).max() < 5 * 0.5 / math.sqrt(1000) + 0.05
    assert float(out["class_probability"][0]) >= float(out["graph_probability"][0])
    assert list(out["parent"].values) == ["v1", "v2", "v3", "v4"]
    written = write_outputs(result, tmp_path)
    assert written.table == network_table(result)
    edges = pd.read_csv(tmp_path / "edges.csv")
    assert len(edges) == 12
    assert edges["true"].sum() == problem.data["true_graph"].sum()
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"network.png", "loss.png"}


def test_a_limit_on_parents_and_discrete_data_fit() -> None:
    data = load("discrete_network", num_variables=3, num_samples=200, seed=1)
    problem = make_problem(data, score="bdeu", max_parents=1, edge_probability=0.2, anneal=0, hidden=16)
    result = fit_svi(problem, num_steps=150, lr=0.03, schedule="cosine", clip_norm=5.0, progress=False)
    assert float(check_exact(problem, result)["total_variation"]) < 0.05
    assert result.posterior["graph"].sum("parent").max() <= 1


# -- errors -----------------------------------------------------------------------------------------------------------


def test_frames_arrays_and_data_sets_are_alike() -> None:
    data = load("discrete_network", num_variables=3, num_samples=40, concentration=3.0, seed=0)
    frame = data["x"].to_pandas()
    words = frame.map(lambda state: "ab"[state])
    wanted = make_problem(data, score="bdeu").model.scores
    for other in (data["x"], data.drop_vars("num_states"), frame, words, words.astype("category"), frame.astype(bool)):
        torch.testing.assert_close(make_problem(other, score="bdeu").model.scores, wanted)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda x: x.assign(b=1.0), {}, "'b' is constant"),
        (lambda x: x.assign(b=np.nan), {}, "'b' has missing values"),
        (lambda x: x.assign(b=np.where(x["a"] > 0, np.inf, 0)), {}, "'b' has infinite"),
        (lambda x: x.assign(b=["u", "v"] * 5), {}, "'b' holds categories; take score='bdeu'"),
        (lambda x: x, {"score": "bdeu"}, "'a' has fractions"),
        (lambda x: x.iloc[:1], {}, "1 rows; give at least 2"),
        (lambda x: x[["a"]], {}, "1 variables; give 2 to 12"),
        (lambda x: pd.concat([x.add_suffix(str(i)) for i in range(5)], axis=1), {}, "15 variables"),
        (lambda x: x.set_axis(["a", "b", "a"], axis=1), {}, "'a' occurs twice"),
        (lambda x: x.to_numpy(), {}, "data=array.*; give a Dataset or a DataArray or a DataFrame"),
        (lambda x: xr.Dataset({"y": ("sample", x["a"])}), {}, r"\['y'\]; name the table"),
        (lambda x: x, {"score": "bic"}, "score='bic'; choose"),
        (lambda x: x, {"edge_probability": 1.0}, "edge_probability=1.0; give a number above 0 and below 1"),
        (lambda x: x, {"max_parents": 0}, "max_parents=0"),
        (lambda x: x, {"extra_degrees": 1.0}, "extra_degrees=1.0"),
        (lambda x: x, {"num_particles": 1}, "num_particles=1"),
        (lambda x: x, {"sample_size": 2.0}, "sample_size=2.0 is not used with score='bge'"),
        (lambda x: x, {"score": "bdeu", "mean_weight": 2.0}, "mean_weight=2.0 is not used with score='bdeu'"),
    ],
)
def test_what_cannot_be_used_is_refused(change, options: dict, message: str) -> None:
    frame = pd.DataFrame(np.random.default_rng(0).standard_normal((10, 3)), columns=["a", "b", "c"])
    with pytest.raises(DataError, match=message):
        make_problem(change(frame), **options)


def test_outputs_refuse_options_out_of_range() -> None:
    draws = xr.Dataset({"graph": (("chain", "draw", "parent", "child"), np.zeros((1, 2, 2, 2)))})
    with pytest.raises(ResultError, match="top=0; give a whole number of at least 1"):
        summarise_network(draws, top=0)
    with pytest.raises(ResultError, match=r"least=1\.5; give a number"):
        draw_network(summarise_network(draws), least=1.5)


def test_states_that_were_not_announced_are_refused() -> None:
    data = load("discrete_network", num_variables=3, num_samples=40, concentration=3.0, seed=0)
    with pytest.raises(DataError, match="between 0 and num_states - 1"):
        make_problem(data.assign(x=data["x"] + 1), score="bdeu")


def test_simulators_refuse_what_they_cannot_make() -> None:
    with pytest.raises(DataError, match="num_variables=1"):
        load("gaussian_network", num_variables=1)
    with pytest.raises(DataError, match="degree=5"):
        load("discrete_network", num_variables=4, degree=5.0)
