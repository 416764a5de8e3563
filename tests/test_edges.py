"""Candidate edges, straight-through Bernoulli variables and propagation over pairs."""

from __future__ import annotations

import contextlib
import itertools

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch.distributions import kl_divergence

from probmodels.errors import DataError
from probmodels.guides.edges import NEIGHBOUR, OBSERVED, RANDOM, make_edges, nearest_neighbours
from probmodels.guides.nets import pool_mean, propagate
from probmodels.guides.relaxed import BernoulliConcrete, BernoulliIdentity

# -- candidates ----------------------------------------------------------------------------


def two_graphs(**options):
    graph = np.repeat([0, 1], [6, 9])
    x = np.random.default_rng(0).normal(size=(15, 3))
    return make_edges([[0, 1], [3, 2], [14, 6]], graph, features=x, **options), x


def test_candidates_are_proper_pairs_each_once():
    edges, _ = two_graphs(neighbours=2, random=0.5, seed=1)
    pairs = torch.stack([edges.source, edges.target], 1).tolist()
    assert all(low < high for low, high in pairs)
    assert len({tuple(pair) for pair in pairs}) == edges.num_pairs
    assert torch.equal(edges.graph[edges.source], edges.graph[edges.target])
    assert pairs[:3] == [[0, 1], [2, 3], [6, 14]]
    others = int((edges.origin != RANDOM).sum())
    assert int((edges.origin == RANDOM).sum()) == round(0.5 * others)
    assert edges.num_graphs == 2
    assert edges.observed.sum() == 3


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_neighbours_are_the_nearest_within_their_graph(metric):
    edges, x = two_graphs(neighbours=3, metric=metric)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    far = 1 - unit @ unit.T if metric == "cosine" else np.linalg.norm(x[:, None] - x, axis=2)
    graph = edges.graph.numpy()
    far[graph[:, None] != graph] = np.inf
    np.fill_diagonal(far, np.inf)
    wanted = {tuple(sorted((i, int(j)))) for i in range(15) for j in np.argsort(far[i])[:3]}
    assert set(zip(edges.source.tolist(), edges.target.tolist(), strict=True)) >= wanted
    near = edges.origin == NEIGHBOUR
    assert set(zip(edges.source[near].tolist(), edges.target[near].tolist(), strict=True)) <= wanted


def test_all_pairs_are_all_pairs():
    edges, _ = two_graphs(all_pairs=True)
    assert edges.num_pairs == 6 * 5 // 2 + 9 * 8 // 2
    assert (edges.origin == OBSERVED).sum() == 3


def test_random_pairs_are_refreshed_in_place_and_uniform():
    graph = np.repeat([0, 1], [6, 4])
    counts = np.zeros((10, 10))
    first = make_edges([[0, 1], [7, 9]], graph, random=3.0, seed=6)  # four and two random ones
    old = first.origin != RANDOM
    torch.manual_seed(0)
    for _ in range(2000):
        fresh = first.refreshed()
        assert torch.equal(fresh.source[old], first.source[old])
        assert torch.equal(fresh.target[old], first.target[old])
        assert torch.equal(fresh.graph_of_pair, first.graph_of_pair)
        counts[fresh.source, fresh.target] += 1
    assert counts.max() == 2000  # no pair twice at a time
    assert counts[0, 1] == counts[7, 9] == 2000
    own = first.graph_of_pair[~old]
    for number, (start, size) in enumerate([(0, 6), (6, 4)]):
        inside = counts[start : start + size, start : start + size]
        upper = inside[np.triu_indices(size, 1)]
        free, drawn = len(upper) - 1, int((own == number).sum())
        assert 0 < drawn < free
        assert inside.sum() == 2000 * (drawn + 1)
        # Counts are binomial: all within 4.5 standard deviations.
        sd = np.sqrt(2000 * drawn / free * (1 - drawn / free))
        np.testing.assert_allclose(np.sort(upper)[:-1], 2000 * drawn / free, atol=4.5 * sd)


def test_refreshed_pairs_are_new_ones_and_as_many_as_there_is_room_for():
    graph = np.repeat(np.arange(4), [1, 5, 1, 3])
    full = make_edges([[1, 2]], graph, random=12.0)  # all that there are
    torch.manual_seed(0)
    fresh = full.refreshed()
    assert set(zip(*(x.tolist() for x in fresh[:2]), strict=True)) == set(
        zip(*(x.tolist() for x in full[:2]), strict=True)
    )
    some = make_edges([[1, 2], [7, 9]], graph, random=1.0)
    assert len({tuple(some.refreshed().source.tolist()) for _ in range(20)}) > 1
    torch.manual_seed(1)
    one = some.refreshed()
    torch.manual_seed(1)
    assert torch.equal(some.refreshed().source, one.source)
    alone = make_edges([], np.arange(3))
    assert alone.refreshed().num_pairs == 0


def test_neighbours_found_before_are_the_same_candidates():
    graph, x = np.zeros(12, dtype=int), np.random.default_rng(0).normal(size=(12, 2))
    pairs, rank = nearest_neighbours(x, graph, 5)
    for few in (1, 3, 5):
        np.testing.assert_array_equal(pairs[rank < few], nearest_neighbours(x, graph, few)[0])
    one = make_edges([[0, 1]], graph, features=x, neighbours=5, random=0.5, seed=2)
    other = make_edges([[0, 1]], graph, near=pairs, random=0.5, seed=2)
    assert all(torch.equal(left, right) for left, right in zip(one[:4], other[:4], strict=True))


def test_random_pairs_stay_within_graphs_of_all_sizes():
    graph = np.repeat(np.arange(5), [1, 3, 1, 1, 4])
    edges = make_edges([[1, 2]], graph, random=8.0)
    pairs = set(zip(edges.source.tolist(), edges.target.tolist(), strict=True))
    within = {(i, j) for i in range(10) for j in range(i + 1, 10) if graph[i] == graph[j]}
    assert pairs == within  # one observed and the eight others


def test_random_pairs_fill_a_graph_to_the_last_one():
    edges = make_edges([[0, 1]], np.zeros(5, dtype=int), random=9.0)
    assert edges.num_pairs == 10
    with pytest.raises(DataError, match="only 9 pairs are free"):
        make_edges([[0, 1]], np.zeros(5, dtype=int), random=10.0)


@pytest.mark.parametrize(
    ("pairs", "graph", "options", "message"),
    [
        ([[0, 7]], [0, 0], {}, "edges name nodes 7, but there are nodes 0 to 1"),
        ([[1, 1]], [0, 0], {}, "1 edges join a node to itself, such as 1"),
        ([[0, 1], [1, 0]], [0, 0], {}, "stand more than once"),
        ([[0, 1]], [0, 1], {}, "join nodes of different graphs"),
        ([[0.5, 1]], [0, 0], {}, "give positions of nodes"),
        ([], [], {}, "no graph without nodes"),
        ([], [0, 2], {}, "none without nodes"),
        (
            [],
            [0, 0],
            {"neighbours": 2, "features": np.ones((2, 1))},
            "the smallest graph has 2 nodes; choose at most 1",
        ),
        ([], [0, 0, 0], {"neighbours": 1}, "needs features"),
        ([], [0, 0], {"neighbours": 1, "features": [[np.nan], [1.0]]}, "not finite"),
        ([], [0, 0, 0], {"neighbours": 1, "features": np.ones((3, 1)), "metric": "magic"}, "metric='magic'"),
        ([], np.zeros(20000, dtype=int), {"all_pairs": True}, "leave out all_pairs"),
        ([], [0, 0], {"near": [[0, 2]]}, "neighbour pairs name nodes 2"),
        ([], [0, 0], {"neighbours": 1.5}, "neighbours=1.5; give a whole number of at least 0"),
        ([], [0, 0], {"random": float("nan")}, "random=nan; give a number of at least 0"),
    ],
)
def test_bad_graphs_are_refused(pairs, graph, options, message):
    with pytest.raises(DataError, match=message):
        make_edges(pairs, graph, **options)


# -- straight-through variables ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [BernoulliIdentity, lambda probs: BernoulliConcrete(0.5, probs=probs)])
def test_values_are_hard_with_the_right_frequency(kind):
    probs = torch.tensor([0.0, 0.1, 0.5, 1.0])
    torch.manual_seed(0)
    values = kind(probs).rsample((20000,))
    assert set(values.unique().tolist()) == {0.0, 1.0}
    # Four standard errors of a frequency; nothing is left to chance at the ends.
    limit = 4 * (probs * (1 - probs) / 20000).sqrt() + 1e-5
    assert ((values.mean(0) - probs).abs() <= limit).all()


def test_the_identity_has_derivative_one_and_the_concrete_that_of_its_relaxation():
    probs = torch.tensor([0.2, 0.7], requires_grad=True)
    value = BernoulliIdentity(probs).rsample()
    assert torch.autograd.grad(value.sum(), probs)[0].tolist() == [1.0, 1.0]
    logits = torch.tensor([0.3, -1.0], requires_grad=True)
    slopes = []
    for hard in (True, False):
        torch.manual_seed(3)
        drawn = BernoulliConcrete(0.4, logits=logits, hard=hard).rsample((5,))
        slopes.append(torch.autograd.grad(drawn.sum(), logits)[0])
    assert torch.equal(*slopes)


@pytest.mark.parametrize("loss", [Trace_ELBO, pytest.param(TraceMeanField_ELBO, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "kind",
    [
        lambda p: BernoulliIdentity(p),
        lambda p: BernoulliConcrete(0.5, probs=p),
        lambda p: dist.RelaxedBernoulliStraightThrough(torch.tensor(0.5), probs=p),
    ],
    ids=["identity", "concrete", "pyro"],
)
def test_the_elbo_is_that_of_enumeration(kind, loss):
    probs, prior = torch.tensor([0.3, 0.6, 0.9]), torch.tensor([0.5, 0.2, 0.7])
    table = torch.tensor([-1.0, 2.0, 0.5])

    def model():
        with pyro.plate("pair", 3):
            edge = pyro.sample("edge", dist.Bernoulli(prior))
        pyro.factor("fit", (table * edge).sum() + edge[0] * edge[1])

    def guide():
        with pyro.plate("pair", 3):
            pyro.sample("edge", kind(probs))

    exact = 0.0
    for values in itertools.product([0.0, 1.0], repeat=3):
        edge = torch.tensor(values)
        q = dist.Bernoulli(probs).log_prob(edge).sum()
        joint = dist.Bernoulli(prior).log_prob(edge).sum() + (table * edge).sum() + edge[0] * edge[1]
        exact -= float(q.exp() * (joint - q))
    if kind(probs).__class__ is dist.RelaxedBernoulliStraightThrough and loss is Trace_ELBO:
        pytest.skip("Pyro's own variable has a density, which only the analytic divergence replaces")
    torch.manual_seed(0)
    draws = np.array([loss().loss(model, guide) for _ in range(4000)])
    assert abs(draws.mean() - exact) < 4 * draws.std() / np.sqrt(4000)


def test_divergences_are_those_of_bernoulli_variables_and_take_the_guides_scale():
    p = dist.Bernoulli(torch.tensor([0.3, 0.8]))
    plain = kl_divergence(torch.distributions.Bernoulli(torch.tensor([0.5, 0.1])), p)
    for q in (BernoulliIdentity(torch.tensor([0.5, 0.1])), BernoulliConcrete(0.3, probs=torch.tensor([0.5, 0.1]))):
        torch.testing.assert_close(kl_divergence(q, p), plain)
        torch.testing.assert_close(kl_divergence(q.expand([4, 2]), p), plain.expand(4, 2))
        torch.testing.assert_close(kl_divergence(q.to_event(1), p.to_event(1)), plain.sum())

        def guide(q=q):
            with poutine.scale(scale=0.1):
                pyro.sample("edge", q.to_event(1))

        def model():
            with poutine.scale(scale=0.1):
                pyro.sample("edge", p.to_event(1))

        assert TraceMeanField_ELBO().loss(model, guide) == pytest.approx(0.1 * float(plain.sum()), rel=1e-5)


# -- networks ----------------------------------------------------------------------------


def test_propagation_is_the_normalised_matrix_and_differentiable_twice():
    edges, _ = two_graphs(neighbours=2)
    generator = torch.Generator().manual_seed(0)
    weight = torch.rand(edges.num_pairs, generator=generator, dtype=torch.float64, requires_grad=True)
    values = torch.randn(15, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    dense = torch.eye(15, dtype=torch.float64)
    dense = dense.index_put((edges.source, edges.target), weight).index_put((edges.target, edges.source), weight)
    scale = dense.sum(1).rsqrt()
    torch.testing.assert_close(propagate(values, edges, weight), scale[:, None] * dense * scale @ values)
    assert torch.autograd.gradgradcheck(lambda v, w: propagate(v, edges, w), (values, weight))
    both = propagate(values, edges, torch.stack([weight, weight**2]))
    torch.testing.assert_close(both[1], propagate(values, edges, weight**2))


def test_pooling_is_the_mean_over_the_nodes_of_a_graph():
    edges, x = two_graphs()
    values = torch.from_numpy(x)
    torch.testing.assert_close(pool_mean(values, edges), torch.stack([values[:6].mean(0), values[6:].mean(0)]))


# -- ties -------------------------------------------------------------------------------------------------------------


def degrees(pairs, count):
    return np.bincount(pairs.ravel(), minlength=count)


@pytest.mark.parametrize(("rows", "metric"), [(7, "euclidean"), (7, "cosine"), (2000, "euclidean"), (1, "euclidean")])
def test_nodes_of_the_same_features_make_no_hubs(rows, metric):
    """Sixty of 10,000 nodes with seven distinct features had degrees above 1,000."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(rows, 7))[rng.integers(rows, size=5000)]
    with pytest.warns(UserWarning, match="chosen at random") if rows < 100 else contextlib.nullcontext():
        pairs, _ = nearest_neighbours(values, np.zeros(5000, dtype=np.int64), 4, metric=metric)
    assert degrees(pairs, 5000).min() >= 4
    assert degrees(pairs, 5000).max() <= (8 if rows < 100 else 60)  # each is chosen by four at most among many equals


def test_features_equally_far_from_each_other_make_no_hubs():
    """Each feature alone, as of one-hot degrees: groups of two, all at the same distance."""
    values = np.repeat(np.eye(300), 2, axis=0)
    pairs, _ = nearest_neighbours(values, np.zeros(600, dtype=np.int64), 3, metric="euclidean")
    assert degrees(pairs, 600).max() <= 10


def test_ties_are_broken_by_the_seed_and_few_neighbours_are_among_many():
    values = np.repeat(np.random.default_rng(0).normal(size=(20, 3)), [1, 2, 3, 5, 9] * 4, axis=0)
    graph = np.zeros(len(values), dtype=np.int64)
    many, rank = nearest_neighbours(values, graph, 6)
    again, _ = nearest_neighbours(values, graph, 6)
    other, _ = nearest_neighbours(values, graph, 6, seed=1)
    np.testing.assert_array_equal(many, again)
    assert not np.array_equal(many, other)
    few, _ = nearest_neighbours(values, graph, 2)
    np.testing.assert_array_equal(many[rank < 2], few)
    distance = np.linalg.norm(values[:, None] - values[None], axis=2)
    np.fill_diagonal(distance, np.inf)
    unit = values / np.linalg.norm(values, axis=1, keepdims=True)
    distance = np.linalg.norm(unit[:, None] - unit[None], axis=2)
    np.fill_diagonal(distance, np.inf)
    for i in range(len(values)):  # as near as any six, whichever of equals they are
        partners = many[(many == i).any(1)].sum(1) - i
        assert np.sort(distance[i])[5] >= np.sort(distance[i, partners])[5] - 1e-5


def test_a_node_near_all_others_is_chosen_by_a_bounded_number():
    rng = np.random.default_rng(0)
    rim = rng.normal(size=(400, 200))
    values = np.concatenate([np.zeros((1, 200)), 10 * rim / np.linalg.norm(rim, axis=1, keepdims=True)])
    with pytest.warns(UserWarning, match="neighbour pairs are left out"):
        pairs, _ = nearest_neighbours(values, np.zeros(401, dtype=np.int64), 2, metric="euclidean")
    assert degrees(pairs, 401)[0] <= 42
