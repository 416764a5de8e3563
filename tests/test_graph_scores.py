"""Scores of recovered graphs: by hand, over all graphs of few nodes, and against interventions in linear models."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import xarray as xr

from probmodels.errors import ProblemError
from probmodels.inference.metrics.graphs import (
    cpdag,
    edge_auroc,
    edge_average_precision,
    edge_calibration,
    edge_scores,
    shd,
    shd_cpdag,
    structural_intervention_distance,
)


def graph(size: int, *edges: tuple[int, int]) -> np.ndarray:
    found = np.zeros((size, size), dtype=np.int8)
    for edge in edges:
        found[edge] = 1
    return found


def acyclic_graphs(size: int) -> list[np.ndarray]:
    """All of them: subsets of the edges along every order."""
    found = {}
    pairs = list(itertools.combinations(range(size), 2))
    for order in itertools.permutations(range(size)):
        for chosen in itertools.product((0, 1), repeat=len(pairs)):
            one = graph(size, *((order[a], order[b]) for (a, b), is_edge in zip(pairs, chosen, strict=True) if is_edge))
            found[one.tobytes()] = one
    return list(found.values())


CHAIN = graph(3, (0, 1), (1, 2))
FORK = graph(3, (1, 0), (1, 2))
COLLIDER = graph(3, (0, 1), (2, 1))
THREE, FOUR = acyclic_graphs(3), acyclic_graphs(4)


def test_all_graphs_are_listed() -> None:
    assert [len(THREE), len(FOUR)] == [25, 543]


# -- distances --------------------------------------------------------------------------------------------------------


def test_distance_by_hand() -> None:
    assert shd(CHAIN, FORK) == 1  # reversed
    assert shd(CHAIN, graph(3, (0, 1))) == 1  # missing
    assert shd(CHAIN, graph(3, (0, 1), (1, 2), (0, 2))) == 1  # added
    assert shd(CHAIN, graph(3, (1, 0), (0, 2))) == 3
    assert shd(CHAIN, cpdag(CHAIN)) == 2  # both edges lose their direction
    assert shd(CHAIN, graph(3)) == 2


def test_distance_is_a_metric() -> None:
    every = np.stack(THREE)
    table = shd(every[:, None], every[None])
    np.testing.assert_array_equal(table, table.T)
    np.testing.assert_array_equal(table == 0, np.eye(len(every), dtype=bool))
    assert (table[:, None] <= table[:, :, None] + table[None]).all()


def test_distance_of_classes_is_zero_where_no_observation_can_tell() -> None:
    assert shd_cpdag(CHAIN, FORK) == 0
    assert shd_cpdag(CHAIN, COLLIDER) == 2  # two lines against two arrows
    np.testing.assert_array_equal(shd_cpdag(CHAIN, np.stack([FORK, COLLIDER])), [0, 2])


def test_class_is_shared_iff_skeleton_and_colliders_are() -> None:
    classes: dict[bytes, set[Any]] = {}
    for one in FOUR:
        joined = one + one.T
        colliders = frozenset(
            (a, c, b)
            for c in range(4)
            for a, b in itertools.combinations(np.flatnonzero(one[:, c]).tolist(), 2)
            if not joined[a, b]
        )
        classes.setdefault(cpdag(one).tobytes(), set()).add((joined.tobytes(), colliders))
    assert len(classes) == 185  # of Markov equivalence classes on 4 nodes
    assert all(len(kinds) == 1 for kinds in classes.values())
    assert len(set().union(*classes.values())) == 185


def test_class_has_the_arrows_that_all_members_share() -> None:
    members: dict[bytes, list[np.ndarray]] = {}
    for one in FOUR:
        members.setdefault(cpdag(one).tobytes(), []).append(one)
    for code, graphs in members.items():
        found = np.frombuffer(code, dtype=np.int8).reshape(4, 4)
        np.testing.assert_array_equal(found, np.max(graphs, axis=0))


def test_intervention_distance_of_the_published_example() -> None:
    """Two graphs at the same Hamming distance from the truth (Peters and Bühlmann 2015, section 1)."""
    edges = [(0, 1), *((cause, effect) for cause in (0, 1) for effect in (2, 3, 4))]
    truth = graph(5, *edges)
    added, turned = graph(5, *edges, (2, 3)), graph(5, (1, 0), *edges[1:])
    assert shd(truth, added) == shd(truth, turned) == 1
    assert structural_intervention_distance(truth, added) == 0
    assert structural_intervention_distance(truth, turned) == 8


def test_intervention_distance_against_effects_in_linear_models() -> None:
    rng = np.random.default_rng(0)
    for _ in range(150):
        true, found = (FOUR[i] for i in rng.integers(len(FOUR), size=2))
        weights = true * rng.uniform(0.5, 1.5, (4, 4)) * rng.choice([-1, 1], (4, 4))
        total = np.linalg.inv(np.eye(4) - weights)  # of i on j, over all directed paths
        covariance = total.T @ np.diag(rng.uniform(0.5, 2, 4)) @ total
        wrong = 0
        for i, j in itertools.permutations(range(4), 2):
            parents = np.flatnonzero(found[:, i])
            on = [i, *parents]
            slope = 0.0 if j in parents else np.linalg.solve(covariance[np.ix_(on, on)], covariance[on, j])[0]
            wrong += abs(slope - total[i, j]) > 1e-9
        assert structural_intervention_distance(true, found) == wrong


def test_intervention_distance_is_zero_for_graphs_with_more_edges() -> None:
    for one, other in itertools.product(THREE, THREE):
        if (one <= other).all():
            assert structural_intervention_distance(one, other) == 0


# -- edges ------------------------------------------------------------------------------------------------------------


def test_edge_scores_by_hand() -> None:
    truth = graph(4, (0, 1), (1, 2), (2, 3))
    found = graph(4, (0, 1), (2, 1), (0, 3))
    assert edge_scores(truth, found) == pytest.approx((1 / 3, 1 / 3, 1 / 3))
    assert edge_scores(truth, found, skeleton=True) == pytest.approx((2 / 3, 2 / 3, 2 / 3))
    lines = cpdag(truth)
    assert edge_scores(truth, lines) == pytest.approx((1 / 2, 1, 2 / 3))
    assert edge_scores(truth, lines, skeleton=True) == (1, 1, 1)
    none = edge_scores(truth, graph(4))
    assert np.isnan(none.precision)
    assert (none.recall, none.f1) == (0, 0)


def test_scores_over_draws() -> None:
    draws = np.stack([[CHAIN, FORK], [COLLIDER, CHAIN]])
    np.testing.assert_array_equal(shd(CHAIN, draws), [[0, 1], [1, 0]])
    np.testing.assert_array_equal(edge_scores(CHAIN, draws).recall, [[1, 0.5], [0.5, 1]])


def test_ranking_by_hand() -> None:
    score = np.array([[9, 0.7, 0.1], [0.7, 9, 0.4], [0.2, 0.3, 9]])  # the diagonal does not count
    # true edges 0.7 and 0.4 against 0.7, 0.1, 0.2, 0.3: 3.5 and 3 of 4
    assert edge_auroc(CHAIN, score) == pytest.approx(6.5 / 8)
    # both of 0.7 first: precision 1/2 at recall 1/2; then 2/3
    assert edge_average_precision(CHAIN, score) == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert edge_auroc(CHAIN, CHAIN) == edge_average_precision(CHAIN, CHAIN) == 1
    assert edge_auroc(CHAIN, 1 - CHAIN) == 0
    assert edge_auroc(CHAIN, np.full((3, 3), 0.5)) == 0.5


def test_pairs_of_all_graphs_are_pooled() -> None:
    graphs = np.stack([CHAIN, graph(3)])  # the second has no edge to rank by itself
    scores = np.stack([np.full((3, 3), 0.6), np.full((3, 3), 0.2)])
    assert edge_auroc(graphs, scores) == pytest.approx((4 * 0.5 + 6) / 10)
    table = edge_calibration(graphs, scores, bins=2)
    assert table["count"].values.tolist() == [6, 6]
    assert float(table["ece"]) == pytest.approx((0.2 + (0.6 - 1 / 3)) / 2)
    assert float(table["brier"]) == pytest.approx((6 * 0.2**2 + 2 * 0.4**2 + 4 * 0.6**2) / 12)


def test_a_calibrated_forecaster_has_no_error_but_that_of_monte_carlo() -> None:
    rng = np.random.default_rng(0)
    chance = rng.uniform(size=(400, 6, 6))
    truth = (rng.uniform(size=chance.shape) < chance) & ~np.eye(6, dtype=bool)
    table = edge_calibration(truth, chance)
    share, p = table["count"].values / 12_000, table["probability"].values
    # The distance in a bin is about |N(0, s)|: mean s sqrt(2 / pi), variance s^2 (1 - 2 / pi).
    s = np.sqrt(p * (1 - p) / table["count"].values)
    mean, sd = np.sum(share * s) * np.sqrt(2 / np.pi), np.sqrt(np.sum((share * s) ** 2) * (1 - 2 / np.pi))
    assert abs(float(table["ece"]) - mean) < 4 * sd
    # E p (1 - p) = 1/6; the square of truth minus probability has variance E p (1 - p) (1 - 3 p (1 - p)) - 1/36
    assert abs(float(table["brier"]) - 1 / 6) < 4 * np.sqrt((1 / 6 - 3 / 30 - 1 / 36) / 12_000)
    assert float(edge_calibration(truth, chance**2)["ece"]) > 0.1  # the control: 1/2 - 1/3 on average


# -- labels and refusals ----------------------------------------------------------------------------------------------


def labelled(values: np.ndarray, names: str, dims: tuple[str, str] = ("cause", "effect")) -> xr.DataArray:
    return xr.DataArray(values, {dim: list(names) for dim in dims}, dims)


def test_labels_put_graphs_into_one_order() -> None:
    truth = labelled(CHAIN, "abc")
    other = truth.sel(cause=list("cab"), effect=list("bca"))  # causes and effects each in an order of their own
    assert shd(truth, other) == 0
    assert shd(truth, other.transpose("effect", "cause")) == 0
    assert shd(truth, labelled(CHAIN, "abc", ("parent", "child"))) == 0
    assert shd(truth, truth.values) == 0
    assert edge_auroc(truth, other) == 1
    draws = xr.concat([other, other], "draw").transpose("effect", "draw", "cause")
    np.testing.assert_array_equal(shd(truth, draws), [0, 0])


CYCLE = graph(3, (0, 1), (1, 2), (2, 0))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: shd(CHAIN, graph(4)), "same nodes"),
        (lambda: shd(CHAIN, CHAIN[:2]), "square"),
        (lambda: shd(CHAIN, 0.5 * CHAIN), "threshold"),
        (lambda: shd(CHAIN, CHAIN + np.eye(3)), "itself"),
        (lambda: shd(np.stack([CHAIN] * 2), np.stack([CHAIN] * 3)), "leading axes"),
        (lambda: shd(CHAIN, CHAIN.astype(str)), "numbers"),
        (lambda: shd(labelled(CHAIN, "abc"), labelled(CHAIN, "abd")), "other nodes"),
        (lambda: shd(CHAIN, labelled(CHAIN, "aab")), "each once"),
        (lambda: shd(CHAIN, xr.DataArray(CHAIN, dims=("x", "y"))), "cause"),
        (lambda: shd_cpdag(CHAIN, CYCLE), "cycle"),
        (lambda: cpdag(CYCLE), "cycle"),
        (lambda: cpdag(np.stack([CHAIN])), "one graph"),
        (lambda: structural_intervention_distance(CHAIN, CYCLE), "cycle"),
        (lambda: structural_intervention_distance(CHAIN, np.stack([CHAIN])), "one of each"),
        (lambda: edge_auroc(graph(3), np.zeros((3, 3))), "is no edge"),
        (lambda: edge_average_precision(1 - np.eye(3), np.zeros((3, 3))), "is an edge"),
        (lambda: edge_auroc(CHAIN, np.full((3, 3), np.nan)), "missing"),
        (lambda: edge_calibration(CHAIN, 2 * CHAIN), r"\[0, 1\]"),
        (lambda: edge_calibration(graph(1), graph(1)), "no pair"),
    ],
)
def test_refusals(call: Any, says: str) -> None:
    with pytest.raises(ProblemError, match=says):
        call()
