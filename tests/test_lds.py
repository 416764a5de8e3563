"""LDS: hypergradients and losses against a dense network written out, edges, splits, a case where it must help."""

from __future__ import annotations

import csv
import itertools
import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from probmodels import Problem, Result, fit_bilevel, fit_svi, lds
from probmodels.datasets.graph_data import make_graph
from probmodels.datasets.graphs import simulate_csbm
from probmodels.errors import CheckpointError, DataError, ProblemError, ResultError
from probmodels.guides.edges import NEIGHBOUR, OBSERVED, RANDOM
from probmodels.guides.sparse import SparseMatrix
from probmodels.inference.bilevel import rounds
from probmodels.inference.bilevel.hypergradients import Found
from probmodels.inference.programs.programs import opened
from probmodels.inference.runtime import memory
from probmodels.lds import make_problem, refit_problem, tiny, write_outputs

QUIET = {"progress": False, "num_samples": 4}
L2 = 0.05


@pytest.fixture
def double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def data(*, sparse: bool = False, edges: bool = True, stop: bool = True, seed: int = 0, **options: Any) -> xr.Dataset:
    """Twelve nodes of three classes, three or four to a split."""
    rng = np.random.default_rng(seed)
    y = np.tile([0, 1, 2], 4)
    x = rng.normal(size=(12, 4)) + 2.0 * np.eye(3, 4)[y]
    if sparse:  # of 36 columns each node has two, less than a tenth
        x = np.zeros((12, 36))
        x[np.arange(12), rng.permutation(12)] = rng.normal(size=12)
        x[np.arange(12), 12 + y] = 1.0
    split = np.repeat(["train", "validation", "stop" if stop else "", "test"], 3)
    pairs = [(0, 3), (1, 4), (2, 8), (5, 7), (6, 9), (0, 10), (7, 11)] if edges else None
    return make_graph(x, y, pairs, split=split, **{"nodes": [f"n{i}" for i in range(12)], **options})


def dense_of(problem: Problem, weight: Tensor) -> Tensor:
    """Normalised matrix (node, node) of pairs with these weights."""
    edges = problem.args[0].edges
    matrix = torch.eye(edges.num_nodes).to(weight)
    matrix = matrix.index_put((edges.source, edges.target), weight).index_put((edges.target, edges.source), weight)
    scale = matrix.sum(1).rsqrt()
    return scale[:, None] * matrix * scale


def logits_of(features: Tensor, matrix: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """The network (node, class), written out."""
    return matrix @ (matrix @ features @ first).relu() @ second


def features_of(given: xr.Dataset) -> Tensor:
    return torch.as_tensor(given["x"].values, dtype=torch.get_default_dtype())


def cross_entropy(logits: Tensor, given: xr.Dataset, split: str) -> Tensor:
    """Cross-entropy of every node of a split (node,)."""
    rows = torch.as_tensor(np.flatnonzero(given["split"].values == split))
    y = torch.as_tensor(given["y"].values)[rows]
    return -logits[rows].log_softmax(-1)[torch.arange(len(rows)), y]


def theta_of(result: Result) -> np.ndarray:
    return result.params()["edges.probability"].numpy()


def begun(problem: Problem) -> np.ndarray:
    return problem.guide.edges.probability.detach().numpy()


def ends(problem: Problem) -> list[tuple[int, int]]:
    edges = problem.args[0].edges
    return list(zip(edges.source.tolist(), edges.target.tolist(), strict=True))


# -- the program ----------------------------------------------------------------------------------------------------


@pytest.fixture
def recorded(monkeypatch):
    """What `fit_bilevel` asks for its hypergradients and gets."""
    found: list[tuple[dict[str, Tensor], dict[str, Tensor], Found]] = []
    original = rounds.hypergradient

    def record(method, losses, inner, hyper, *rest, **options):
        answer = original(method, losses, inner, hyper, *rest, **options)
        found.append((dict(inner), dict(hyper), answer))
        return answer

    monkeypatch.setattr(rounds, "hypergradient", record)
    return found


@pytest.mark.parametrize("sparse", [False, True])
def test_the_hypergradient_is_that_of_a_dense_unrolled_network(double, recorded, sparse):
    """With probabilities 0 and 1 and no dropout nothing is random, so that the derivative is exact."""
    given, lr, steps = data(sparse=sparse), 0.02, 6
    problem = make_problem(given, hidden=5, rate=0.0, l2=L2)
    assert isinstance(problem.args[0].x, SparseMatrix) == sparse
    assert problem.args[0].edges.num_pairs == 66
    fit_bilevel(
        problem, num_rounds=1, inner_steps=steps, unroll_steps=steps, lr=lr, optimiser="sgd", hyper_lr=1e-9, **QUIET
    )
    ((inner, hyper, answer),) = recorded
    theta = hyper["edges.probability"]
    assert set(theta.tolist()) == {0.0, 1.0}
    features = features_of(given)

    def program(weight: Tensor) -> Tensor:
        matrix = dense_of(problem, weight)
        layers = [inner[f"{name}_loc"].detach().clone().requires_grad_() for name in ("weight_in", "weight_out")]
        for _ in range(steps):
            loss = cross_entropy(logits_of(features, matrix, *layers), given, "train").sum()
            loss = loss + 3 * L2 / 2 * layers[0].square().sum()  # three training nodes
            slopes = torch.autograd.grad(loss, layers, create_graph=True)
            layers = [layer - lr * slope for layer, slope in zip(layers, slopes, strict=True)]
        return cross_entropy(logits_of(features, matrix, *layers), given, "validation").mean()

    step = 1e-5
    shifts = step * torch.eye(len(theta))
    wanted = torch.stack([(program(theta + s) - program(theta - s)).detach() / (2 * step) for s in shifts])
    found = answer.gradient["edges.probability"]
    assert wanted.abs().max() > 1e-3
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6 * float(wanted.abs().max()))
    assert answer.outer_loss == pytest.approx(float(program(theta).detach()), rel=1e-10)
    # A part of it comes through the weights alone, which a gradient at fixed weights lacks.
    free = theta.clone().requires_grad_()
    still = [answer.inner[f"{name}_loc"] for name in ("weight_in", "weight_out")]
    direct = cross_entropy(logits_of(features, dense_of(problem, free), *still), given, "validation").mean()
    assert (torch.autograd.grad(direct, free)[0] - wanted).norm() > 0.01 * wanted.norm()


def test_a_step_of_the_edges_follows_the_hypergradient_and_is_projected(double, recorded):
    problem = make_problem(data(), hidden=5, rate=0.0, l2=L2)
    result = fit_bilevel(problem, num_rounds=1, inner_steps=4, unroll_steps=2, hyper_lr=2.0, hyper_decay=1.0,
                         keep="last", **QUIET)  # fmt: skip
    theta = torch.as_tensor(begun(problem))
    for size, (_, hyper, answer) in zip((2.0, 1.0), recorded, strict=True):
        torch.testing.assert_close(hyper["edges.probability"], theta)
        theta = (theta - size * answer.gradient["edges.probability"]).clamp(0, 1)
    torch.testing.assert_close(torch.as_tensor(theta_of(result)), theta)
    assert 0 < int(((theta > 0) & (theta < 1)).sum()) < len(theta)
    draws = result.posterior["edge"].values
    assert (draws[..., theta_of(result) == 1] == 1).all()
    assert (draws[..., theta_of(result) == 0] == 0).all()


@pytest.mark.parametrize("weights", ["point", "normal"])
@pytest.mark.parametrize("l2", [0.0, L2])
def test_losses_are_those_written_out(double, weights, l2):
    if weights == "normal" and not l2:
        pytest.skip("normal weights have a proper prior")
    given = data()
    problem = make_problem(given, hidden=5, rate=0.0, weights=weights, l2=l2)
    assert problem.outer is not None
    assert problem.outer.stop is not None
    matrix, features = dense_of(problem, torch.as_tensor(begun(problem)).double()), features_of(given)
    with opened(problem, seed=0) as programs:
        values = programs.params()
        locs = [values[f"{name}_loc"].detach().clone() for name in ("weight_in", "weight_out")]
        assert all(loc.std() > 0 for loc in locs)

        def loss(args: Any, **options: Any) -> float:
            torch.manual_seed(0)
            return float(
                TraceMeanField_ELBO().differentiable_loss(programs.model, programs.guide, *args, **options).detach()
            )

        inner = loss(problem.args)
        others = {
            name: loss(other.args, **other.kwargs)
            for name, other in (("validation", problem.outer.problem), ("stop", problem.outer.stop))
        }
        torch.manual_seed(0)
        torch.bernoulli(torch.as_tensor(begun(problem)))  # as edges are drawn, though nothing is random in them
        scales, drawn = [], locs
        if weights == "normal":
            scales = [torch.nn.functional.softplus(values[f"{n}_scale"].detach()) for n in ("weight_in", "weight_out")]
            drawn = [loc + scale * torch.randn(loc.shape) for loc, scale in zip(locs, scales, strict=True)]
    logits = logits_of(features, matrix, *drawn)
    wanted = float(cross_entropy(logits, given, "train").sum())
    precision = 3 * l2  # of three training nodes
    if weights == "point" and l2:
        wanted += 0.5 * precision * float(locs[0].square().sum())
        wanted += 0.5 * locs[0].numel() * math.log(2 * math.pi / precision)  # nothing for the flat second layer
    for loc, scale in zip(locs, scales, strict=False):
        prior = Normal(torch.zeros_like(loc), precision**-0.5)
        wanted += float(kl_divergence(Normal(loc, scale), prior).sum())
    assert inner == pytest.approx(wanted, rel=1e-9)
    for name, value in others.items():
        assert value == pytest.approx(float(cross_entropy(logits, given, name).mean()), rel=1e-9)


def test_dropout_is_of_the_inner_problem_alone():
    problem = make_problem(data(), hidden=5, rate=0.5, l2=L2)
    assert problem.outer is not None
    with opened(problem, seed=0) as programs:

        def losses(args: Any, **options: Any) -> set[float]:
            elbo = TraceMeanField_ELBO()
            return {
                float(elbo.differentiable_loss(programs.model, programs.guide, *args, **options).detach())
                for _ in range(5)
            }

        assert len(losses(problem.args)) == 5
        other = problem.outer.problem
        assert len(losses(other.args, **other.kwargs)) == 1


def test_draws_are_the_network_on_drawn_graphs(double):
    given = data()
    problem = make_problem(given, hidden=5, rate=0.5, l2=L2)
    result = fit_bilevel(problem, num_rounds=1, inner_steps=20, hyper_lr=0.5, progress=False, num_samples=16)
    params, posterior = result.params(), result.posterior.isel(chain=0)
    theta = torch.as_tensor(theta_of(result))
    assert ((theta > 0) & (theta < 1)).any()
    y = posterior["class_probability"].values
    for draw in range(16):
        edge = torch.as_tensor(posterior["edge"].values[draw], dtype=torch.float64)
        assert set(edge.tolist()) <= {0.0, 1.0}
        matrix = dense_of(problem, edge)
        chance = logits_of(features_of(given), matrix, params["weight_in_loc"], params["weight_out_loc"]).softmax(-1)
        np.testing.assert_allclose(y[draw], chance, atol=1e-6)
        total = float(edge.sum())
        alike = sum(float(chance[u] @ chance[v]) for (u, v), e in zip(ends(problem), edge, strict=True) if e)
        assert float(posterior["num_edges"][draw]) == total
        assert float(posterior["mean_degree"][draw]) == pytest.approx(2 * total / 12)
        assert float(posterior["homophily"][draw]) == pytest.approx(alike / total, rel=1e-5)
    assert posterior["class_probability"].std("draw").max() > 1e-3  # graphs differ


# -- edges ----------------------------------------------------------------------------------------------------------


def test_observed_edges_start_at_one_and_all_other_pairs_at_zero():
    given = data()
    problem = make_problem(given)
    assert sorted(ends(problem)) == list(itertools.combinations(range(12), 2))
    started = {pair for pair, value in zip(ends(problem), begun(problem), strict=True) if value == 1}
    observed = zip(given["source"].values, given["target"].values, strict=True)
    assert started == {(min(pair), max(pair)) for pair in observed}
    assert (begun(problem) == 0).sum() == 66 - len(started)


def nearest(given: xr.Dataset, number: int, metric: str) -> set[tuple[int, int]]:
    x = given["x"].values.astype(float)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    far = 1 - unit @ unit.T if metric == "cosine" else np.linalg.norm(x[:, None] - x, axis=2)
    np.fill_diagonal(far, np.inf)
    return {(min(u, int(v)), max(u, int(v))) for u in range(len(x)) for v in np.argsort(far[u])[:number]}


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("edges", [True, False])
def test_neighbours_start_at_one_where_they_are_asked_for_or_nothing_was_observed(metric, edges):
    given = data(edges=edges)
    for candidates in ("all", 0, 2, 5):
        problem = make_problem(
            given, start="neighbours" if edges else None, neighbours=3, metric=metric, candidates=candidates
        )
        started = {pair for pair, value in zip(ends(problem), begun(problem), strict=True) if value == 1}
        assert started == nearest(given, 3, metric)
        assert set(ends(problem)) >= nearest(given, max(3, candidates if candidates != "all" else 11), metric)


def test_candidates_are_what_was_asked_for():
    given = data()
    observed = {(min(p), max(p)) for p in zip(given["source"].values, given["target"].values, strict=True)}
    assert set(ends(make_problem(given, candidates=0))) == observed
    assert set(ends(make_problem(given, candidates=2))) == observed | nearest(given, 2, "cosine")
    more = make_problem(given, candidates=2, random=0.5, seed=1)
    known = observed | nearest(given, 2, "cosine")
    origin = more.args[0].edges.origin
    assert set(ends(more)) > known
    assert int((origin == RANDOM).sum()) == round(0.5 * len(known))
    assert begun(more)[(origin == RANDOM).numpy()].max() == 0
    assert set(ends(more)) != set(ends(make_problem(given, candidates=2, random=0.5, seed=2)))
    assert set(origin.tolist()) == {OBSERVED, NEIGHBOUR, RANDOM}


def test_large_graphs_have_candidates_near_each_node_by_default(monkeypatch):
    monkeypatch.setattr("probmodels.lds._ALL_PAIRS", 65)
    monkeypatch.setattr("probmodels.lds._CANDIDATES", 3)
    given = data(edges=False)
    assert set(ends(make_problem(given, neighbours=2))) == nearest(given, 3, "cosine")


def test_probabilities_stay_within_their_bounds():
    given = simulate_csbm(40, train=8, validation=10, stop=6, seed=0)
    result = fit_bilevel(
        make_problem(given), num_rounds=2, inner_steps=30, lr=0.05, hyper_lr=20.0, keep="last", **QUIET
    )
    theta = theta_of(result)
    assert theta.min() == 0
    assert theta.max() == 1
    assert ((theta > 0) & (theta < 1)).any()
    np.testing.assert_array_equal(result.posterior["edge_probability"].values[0, 0], theta)


def test_it_does_without_a_graph_and_without_stopping_nodes():
    problem = make_problem(data(edges=False, stop=False), neighbours=3, l2=L2)
    assert problem.outer is not None
    assert problem.outer.stop is None
    result = fit_bilevel(problem, num_rounds=2, inner_steps=20, lr=0.05, hyper_lr=0.5, **QUIET)
    assert result.tree["fit"].sizes["judged_round"] == 2
    assert (theta_of(result) != begun(problem)).any()
    np.testing.assert_allclose(result.posterior["class_probability"].sum("class"), 1, rtol=1e-5)


# -- labels ---------------------------------------------------------------------------------------------------------


def test_labels_of_test_nodes_are_never_looked_at():
    run = partial(fit_bilevel, num_rounds=2, inner_steps=20, lr=0.05, hyper_lr=0.5, **QUIET)
    given = data()
    test = np.flatnonzero(given["split"].values == "test")
    y = given["y"].values.copy()
    y[test] = (y[test] + 1) % 3
    first, second = run(make_problem(given, l2=L2)), run(make_problem(given.assign(y=("node", y)), l2=L2))
    assert first.posterior.identical(second.posterior)
    hidden = given.copy(deep=True)  # they may as well be unknown
    hidden["y"][test], hidden["split"][test] = -1, ""
    assert run(make_problem(hidden, l2=L2)).posterior.identical(first.posterior)
    y = given["y"].values.copy()
    y[3:6] = y[[4, 5, 3]]  # of validation nodes: the control
    assert not run(make_problem(given.assign(y=("node", y)), l2=L2)).posterior.equals(first.posterior)


def test_each_problem_sees_its_own_nodes():
    problem = make_problem(data())
    assert problem.outer is not None
    assert problem.outer.stop is not None
    labels = {name: found.coords["known"] for name, found in
              (("train", problem), ("validation", problem.outer.problem), ("stop", problem.outer.stop))}  # fmt: skip
    for place, name in enumerate(labels):
        assert list(labels[name]) == [f"n{i}" for i in range(3 * place, 3 * place + 3)]


# -- does it help ---------------------------------------------------------------------------------------------------


def share_within(given: xr.Dataset, problem: Problem, theta: np.ndarray) -> float:
    """Expected share of edges within a class, of those at test nodes."""
    pairs, y, test = np.array(ends(problem)), given["y"].values, given["split"].values == "test"
    at_test = test[pairs].any(1)
    alike = y[pairs[:, 0]] == y[pairs[:, 1]]
    return float(theta[at_test & alike].sum() / theta[at_test].sum())


def test_learned_edges_join_nodes_of_a_class_where_observed_ones_do_not():
    """Two false edges for a true one, and features that tell something of the class."""
    given = simulate_csbm(
        100, mean_degree=4.0, homophily=0.9, added=2.0, num_features=8, signal=2.0, train=10, validation=40, stop=20,
        seed=3,
    )  # fmt: skip
    problem = make_problem(given, hidden=8)
    run = partial(fit_bilevel, num_rounds=2, lr=0.02, hyper_optimiser="adam", progress=False, num_samples=12)
    learned = run(problem, inner_steps=100, hyper_lr=0.03)
    fixed = run(make_problem(given, hidden=8, candidates=0), inner_steps=100, unroll_steps=50, hyper_lr=1e-9)
    before, after = (share_within(given, problem, theta) for theta in (begun(problem), theta_of(learned)))
    test, y = given["split"].values == "test", given["y"].values

    def accuracy(result: Result) -> float:
        chance = result.posterior["class_probability"].mean(("chain", "draw")).values
        return float((chance.argmax(1) == y)[test].mean())

    good, plain = accuracy(learned), accuracy(fixed)
    assert after > before + 0.05
    # Two binomial standard errors of a difference over 60 test nodes, as if the two did not share them.
    assert good > plain - 2 * math.sqrt(2 * plain * (1 - plain) / test.sum())


def test_the_verdict_is_on_nodes_that_chose_nothing():
    given = simulate_csbm(
        150, mean_degree=6.0, homophily=0.9, num_features=8, signal=3.0, train=20, validation=30, stop=20, seed=3
    )
    run = partial(fit_bilevel, num_rounds=2, lr=0.02, hyper_optimiser="adam", progress=False, num_samples=20)
    report = run(make_problem(given, hidden=8), inner_steps=100, hyper_lr=0.03).diagnose()
    assert report.ok
    assert "80 nodes held out" in str(report)
    assert "edges are hyperparameters" in str(report)
    assert "k-hat" not in str(report)
    shuffled = given.assign(y=("node", np.random.default_rng(0).permutation(given["y"].values)))
    wrong = run(make_problem(shuffled, hidden=8), inner_steps=100, hyper_lr=0.03).diagnose()
    assert wrong.inference == "failed"
    everything = given.assign(split=("node", np.where(given["split"] == "test", "train", given["split"])))
    assert run(make_problem(everything, hidden=8), inner_steps=5).diagnose().inference == "not judged"


# -- weights, refitting, files --------------------------------------------------------------------------------------


def test_normal_weights_have_spread_and_points_have_none():
    run = partial(fit_bilevel, num_rounds=1, inner_steps=80, unroll_steps=20, lr=0.05, hyper_lr=1e-9, progress=False)
    normal, point = (
        run(make_problem(data(), hidden=4, l2=L2, weights=weights), num_samples=10) for weights in ("normal", "point")
    )
    ratios = []
    for name in ("weight_in", "weight_out"):
        assert point.posterior[name].std("draw").max() < 1e-6
        scale = normal.params()[f"{name}_scale"].numpy()
        assert scale.min() > 0.02  # they start at a hundredth of a number below 1
        ratios.append((normal.posterior[name].var("draw", ddof=1).values[0] / scale**2).ravel())
    # The variance of ten normal draws has a relative error of sqrt(2 / 9); five such of the mean over 28 weights.
    assert abs(np.concatenate(ratios).mean() - 1) < 5 * math.sqrt(2 / 9 / 28)
    assert normal.posterior["class_probability"].std("draw").max() > 0.01
    assert point.posterior["class_probability"].std("draw").max() < 1e-6  # edges are 0 and 1


@pytest.mark.parametrize("weights", ["point", "normal"])
def test_refitting_holds_the_edges_and_takes_more_nodes(tmp_path, weights):
    problem = make_problem(data(), hidden=4, rate=0.0, l2=L2, weights=weights)
    result = fit_bilevel(problem, num_rounds=1, inner_steps=20, hyper_lr=0.5, **QUIET)
    again = refit_problem(problem, result)
    assert list(again.coords["known"]) == ["n0", "n1", "n2", "n3", "n4", "n5"]
    assert again.args[1].tolist() == [0, 1, 2, 3, 4, 5]
    # Weight decay is per node, so that twice the nodes have twice the precision.
    assert again.model.precisions == {name: 2 * value for name, value in problem.model.precisions.items()}
    assert again.outer is None
    fitted = fit_svi(again, num_steps=60, lr=0.05, **QUIET)
    assert "edges.probability" not in fitted.params()
    np.testing.assert_array_equal(fitted.posterior["edge_probability"].values[0, 0], theta_of(result))
    assert fitted.tree["fit"]["loss"][-5:].mean() < fitted.tree["fit"]["loss"][:5].mean()
    np.testing.assert_array_equal(theta_of(result), result.params()["edges.probability"])
    result.save(tmp_path)  # a result that was saved serves as well
    same = refit_problem(problem, Result.load(tmp_path, problem), splits=["train", "validation", "stop"])
    assert len(same.args[1]) == 9
    torch.testing.assert_close(same.model.edges.probability, again.model.edges.probability)


def test_refitting_refuses_results_and_splits_that_do_not_fit():
    problem = make_problem(data(), hidden=4)
    run = partial(fit_bilevel, num_rounds=1, inner_steps=5, **QUIET)
    with pytest.raises(ResultError, match="no probabilities of edges that fit lds"):
        refit_problem(problem, run(make_problem(data(), hidden=4, candidates=2)))
    result = run(problem)
    with pytest.raises(ResultError, match="no probabilities of edges that fit lds"):
        refit_problem(problem, fit_svi(refit_problem(problem, result), num_steps=2, **QUIET))
    with pytest.raises(DataError, match="'other' is no problem of lds"):
        refit_problem(Problem("other", lambda: None, args=()), result)
    with pytest.raises(DataError, match=r"no labelled node has a split of \['nowhere'\]; choose among train"):
        refit_problem(problem, result, splits=["train", "nowhere"])
    with pytest.raises(DataError, match=r"no labelled node has a split of \[\]"):
        refit_problem(problem, result, splits=[])
    assert refit_problem(problem, result, splits="validation").args[1].tolist() == [3, 4, 5]


def test_large_results_keep_moments_and_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr("probmodels.guides.edges._KEPT_PAIRS", 10)
    monkeypatch.setattr("probmodels.lds._KEPT", 10)
    problem = make_problem(data(), hidden=4)
    result = fit_bilevel(problem, num_rounds=1, inner_steps=20, hyper_lr=0.5, **QUIET)
    marginals = result.tree["marginals"].to_dataset()
    names = {"edge", "edge_probability", "weight_in", "weight_out", "class_probability"}
    assert names <= set(marginals)
    assert not names & set(result.posterior)
    np.testing.assert_allclose(marginals["edge_probability"], theta_of(result), atol=1e-6)
    written = write_outputs(result, tmp_path)
    assert "source" in written.table
    given, chance = data(), marginals["class_probability"].values
    right = (chance.argmax(1) == given["y"].values)[9:].sum()  # the last three are for testing
    assert f"{right} of 3 test nodes are predicted right: {right / 3:.1%}." in written.table
    with (tmp_path / "nodes.csv").open(encoding="utf-8") as file:
        nodes = list(csv.DictReader(file))
    assert [row["node"] for row in nodes] == [f"n{i}" for i in range(12)]
    assert [row["class"] for row in nodes] == given["y"].values.astype(str).tolist()
    assert [row["split"] for row in nodes] == given["split"].values.tolist()
    assert [row["predicted"] for row in nodes] == chance.argmax(1).astype(str).tolist()
    np.testing.assert_allclose([float(row["probability_2"]) for row in nodes], chance[:, 2], rtol=1e-5)
    totals = sum(float(row["degree_mean"]) for row in nodes)
    assert totals == pytest.approx(2 * marginals["edge_probability"].values.sum(), rel=1e-4)
    rows = (tmp_path / "edges.csv").read_text().splitlines()
    assert len(rows) == 1 + 66
    assert (tmp_path / "summary.txt").exists()
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"adjacency.png", "loss.png"}


# -- seeds and checkpoints ------------------------------------------------------------------------------------------


def test_seeds_reproduce_and_differ():
    run = partial(fit_bilevel, num_rounds=2, inner_steps=10, hyper_lr=0.5, **QUIET)
    one, two, other = (run(make_problem(data()), seed=seed) for seed in (0, 0, 1))
    assert one.posterior.identical(two.posterior)
    assert not one.posterior.equals(other.posterior)


class Stop(Exception):
    pass


def test_an_interrupted_fit_goes_on_to_the_same_numbers(tmp_path):
    run = partial(fit_bilevel, num_rounds=3, inner_steps=20, unroll_steps=4, hyper_lr=0.5, **QUIET)
    make = partial(make_problem, data(sparse=True), hidden=4, weights="normal", l2=L2)

    def fail(step):
        if step.number == 8:
            raise Stop

    with pytest.raises(Stop):
        run(make(), checkpoint=tmp_path, checkpoint_every=0.0, callbacks=[fail])
    resumed, plain = run(make(), checkpoint=tmp_path), run(make())
    assert resumed.posterior.identical(plain.posterior)
    for name in ("inner_loss", "outer_loss", "hypergrad_norm", "log_loss", "error"):
        np.testing.assert_array_equal(resumed.tree["fit"][name], plain.tree["fit"][name])
    with pytest.raises(CheckpointError):
        run(make_problem(data(sparse=True, seed=1), hidden=4, weights="normal", l2=L2), checkpoint=tmp_path)


def test_changed_options_are_other_fits(tmp_path):
    run = partial(fit_bilevel, num_rounds=1, inner_steps=5, checkpoint=tmp_path, **QUIET)
    run(make_problem(data(), hidden=4, l2=L2))
    for options in ({"l2": 2 * L2}, {"rate": 0.1}):
        with pytest.raises(CheckpointError):
            run(make_problem(data(), hidden=4, **{"l2": L2, **options}))


# -- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": "nothing"}, "start='nothing'; choose one of observed, neighbours"),
        ({"weights": "gamma"}, "weights='gamma'; choose one of point, normal"),
        ({"candidates": "some"}, "candidates='some'; give a whole number of at least 0 or one of all or None"),
        ({"candidates": -1}, "candidates=-1; give a whole number of at least 0"),
        ({"candidates": 2.5}, "candidates=2.5; give a whole number"),
        ({"candidates": True}, "candidates=True; give a whole number"),
        ({"candidates": 12}, "candidates=12, but every node has 11 others; choose at most 11, or 'all'"),
        ({"start": "neighbours", "neighbours": 12}, "the smallest graph has 12 nodes; choose at most 11"),
        ({"neighbours": 0}, "neighbours=0; give a whole number of at least 1"),
        ({"start": "neighbours", "metric": "magic"}, "metric='magic' is not known"),
        ({"candidates": 2, "random": -1.0}, "random=-1.0; give a number of at least 0"),
        ({"hidden": 0}, "hidden=0; give a whole number of at least 1"),
        ({"hidden": "16"}, "hidden='16'; give a whole number"),
        ({"rate": "0.5"}, "rate='0.5'; give a number"),
        ({"l2": True}, "l2=True; give a number"),
        ({"random": "3", "candidates": 2}, "random='3'; give a number"),
        ({"rate": 1.0}, "rate=1.0; give a number of at least 0 and below 1"),
        ({"rate": -0.1}, "rate=-0.1; give a number of at least 0"),
        ({"l2": -1.0}, "l2=-1.0; give a number of at least 0"),
        ({"l2": float("nan")}, "l2=nan; give a number"),
        ({"l2": 0.0, "weights": "normal"}, "l2=0 with weights='normal'; give a number above 0"),
        ({"neighbours": 3}, "neighbours=3 is not used with start='observed'"),
        ({"metric": "euclidean"}, "metric='euclidean' is not used with start='observed' and candidates='all'"),
        ({"random": 2.0}, "random=2.0 is not used with candidates='all'"),
        ({"seed": 1}, "seed=1 is not used with candidates='all'"),
        ({"seed": 1, "candidates": 2}, "seed=1 is not used with random=0"),
        ({"candidates": 2, "metric": "mahalanobis"}, "metric='mahalanobis' is not known"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(DataError, match=message):
        make_problem(data(), **options)


@pytest.mark.parametrize(("options", "asked"), [({}, [10]), ({"candidates": 4}, [10]), ({"candidates": 20}, [20])])
def test_neighbours_are_looked_for_once(monkeypatch, options, asked):
    found = []
    plain = lds.nearest_neighbours

    def count(x, graph, neighbours, **rest):
        found.append(neighbours)
        return plain(x, graph, neighbours, **rest)

    monkeypatch.setattr(lds, "nearest_neighbours", count)
    monkeypatch.setattr("probmodels.guides.edges.nearest_neighbours", count)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 3)), np.arange(60) % 2
    problem = make_problem(
        make_graph(x, y, split=np.repeat(["train", "validation"], 30)), metric="euclidean", **options
    )
    assert found == asked
    near = np.argsort(np.linalg.norm(x[:, None] - x, axis=2), axis=1)[:, 1:11]
    wanted = {(min(i, int(j)), max(i, int(j))) for i in range(60) for j in near[i]}
    starting = {pair for pair, theta in zip(ends(problem), begun(problem), strict=True) if theta}
    assert starting == wanted


def test_data_that_do_not_fit_are_refused():
    given = data()
    split = given["split"].values
    with pytest.raises(DataError, match="lack the variable 'split'"):
        make_problem(given.drop_vars("split"))
    with pytest.raises(DataError, match=r"no labelled node has the split 'train'.*load_graph, or datasets\.graphs"):
        make_problem(given.assign(split=("node", np.full(12, ""))))
    with pytest.raises(DataError, match="no labelled node has the split 'validation'"):
        make_problem(given.assign(split=("node", np.where(split == "validation", "", split))))
    with pytest.raises(DataError, match="classes 2 are absent from the training split"):
        make_problem(given.assign(split=("node", np.where(np.arange(12) == 2, "test", split))))
    with pytest.raises(DataError, match="classes 3 have no node in 'train'"):
        make_problem(given.drop_vars("class").assign_coords({"class": [0, 1, 2, 3]}))
    with pytest.raises(DataError, match="start='observed', but no edge was observed"):
        make_problem(data(edges=False), start="observed")
    with pytest.raises(DataError, match="hold many; take vib_gsl"):
        make_problem(make_graph(np.ones((4, 2)), [0, 1], [(0, 1)], graph=[0, 0, 1, 1]))
    with pytest.raises(DataError, match="give a Dataset"):
        make_problem(given["x"])
    with pytest.raises(DataError, match="all nodes have the same features"):
        make_problem(make_graph(None, given["y"].values, split=split), neighbours=2)
    alone = make_graph(np.ones((1, 2)), [0], split=["train"])
    with pytest.raises(DataError, match="'validation'"):
        make_problem(alone)


def test_a_step_that_would_not_fit_into_memory_is_refused(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2**28)
    rng = np.random.default_rng(0)
    split = np.repeat(["train", "validation", "test"], [10, 10, 780])
    large = make_graph(rng.normal(size=(800, 3)), np.arange(800) % 2, split=split)
    with pytest.raises(ProblemError, match=r"319,600 candidate pairs of 800 nodes need about .* GiB.*fewer candidates"):
        make_problem(large, candidates="all")
    assert make_problem(large).args[0].edges.num_pairs < 20 * 800
    with monkeypatch.context() as patch:  # they are counted before they are listed
        patch.setattr("probmodels.guides.edges.pairs_of_numbers", None)
        with pytest.raises(ProblemError, match="319,600 candidate pairs"):
            make_problem(large, candidates="all")
    # Dropout leaves a copy of dense features in every evaluation: 800 x 13,000 of them take 40 MiB, six more 240.
    wide = make_graph(rng.normal(size=(800, 13_000)).astype(np.float32), np.arange(800) % 2, split=split)
    with pytest.raises(ProblemError, match=r"of 800 nodes need about 0\.3 GiB.*hidden units or features"):
        make_problem(wide)
    assert make_problem(wide, rate=0.0).args[0].x.shape == (800, 13_000)


def test_the_tiny_problem_fits():
    result = fit_bilevel(tiny(), num_rounds=1, inner_steps=10, **QUIET)
    assert result.posterior["class_probability"].dims == ("chain", "draw", "node", "class")
