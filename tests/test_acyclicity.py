"""Measures of cycles against matrix functions and closed forms, projections to acyclic graphs, and prior knowledge."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from probmodels.causal_graph.knowledge import Knowledge
from probmodels.errors import DataError, ProblemError
from probmodels.guides.acyclicity import (
    find_cycle,
    is_dag,
    log_determinant,
    to_dag,
    topological_order,
    trace_exponential,
    trace_power,
)
from probmodels.guides.bayesian_network import is_acyclic

MEASURES: list[Callable[[Tensor], Tensor]] = [
    trace_exponential,
    trace_power,
    lambda w: log_determinant(w, s=4.0),
    lambda w: log_determinant(w, s=None),
]


def all_directed(size: int) -> Tensor:
    """Every graph without self loops (graph, node, node)."""
    off = torch.nonzero(~torch.eye(size, dtype=torch.bool))
    bits = torch.tensor(list(itertools.product([0.0, 1.0], repeat=len(off))), dtype=torch.float64)
    graphs = torch.zeros(len(bits), size, size, dtype=torch.float64)
    graphs[:, off[:, 0], off[:, 1]] = bits
    return graphs


def ring(size: int, weight: float) -> Tensor:
    return weight * torch.roll(torch.eye(size, dtype=torch.float64), 1, 1)


def test_values_are_those_of_matrix_functions() -> None:
    generator = np.random.default_rng(0)
    weights = generator.uniform(0, 0.3, (5, 4, 4))
    tensor = torch.as_tensor(weights)
    exponential = [np.trace(scipy.linalg.expm(w)) - 4 for w in weights]
    power = [np.trace(np.linalg.matrix_power(np.eye(4) + w / 4, 4)) - 4 for w in weights]
    series = [sum(np.trace(np.linalg.matrix_power(w / 1.5, k)) / k for k in range(1, 400)) for w in weights]
    np.testing.assert_allclose(trace_exponential(tensor), exponential, rtol=1e-12)
    np.testing.assert_allclose(trace_power(tensor), power, rtol=1e-12)
    np.testing.assert_allclose(log_determinant(tensor, s=1.5), series, rtol=1e-9)


@pytest.mark.parametrize("weight", [0.3, 0.9])
def test_rings_of_two_and_three_have_closed_forms(weight: float) -> None:
    pair, three = ring(2, weight), ring(3, weight)
    assert float(trace_exponential(pair)) == pytest.approx(2 * math.cosh(weight) - 2, rel=1e-12)
    roots = math.exp(weight) + 2 * math.exp(-weight / 2) * math.cos(math.sqrt(3) / 2 * weight)
    assert float(trace_exponential(three)) == pytest.approx(roots - 3, rel=1e-9)
    assert float(trace_power(pair)) == pytest.approx(weight**2 / 2, rel=1e-12)
    assert float(trace_power(three)) == pytest.approx(3 * (weight / 3) ** 3, rel=1e-9)
    for s in (1.0, 2.0):
        assert float(log_determinant(pair, s)) == pytest.approx(-math.log(1 - (weight / s) ** 2), rel=1e-9)
        assert float(log_determinant(three, s)) == pytest.approx(-math.log(1 - (weight / s) ** 3), rel=1e-9)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_measures_are_zero_for_acyclic_graphs_and_no_other(size: int) -> None:
    graphs = all_directed(size)
    acyclic = is_acyclic(graphs)
    for measure in MEASURES:
        found = measure(graphs)
        assert found[acyclic].abs().max() < 1e-12
        assert (found[~acyclic] > 1e-3).all()
    np.testing.assert_array_equal([is_dag(graph) for graph in graphs], acyclic)


@pytest.mark.parametrize("measure", MEASURES[:3])
def test_gradients_are_those_of_differences(measure: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    weights = torch.rand(2, 4, 4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda w: measure(w.square()), weights)


def test_the_gradient_of_the_log_determinant_is_an_inverse() -> None:
    weights = (0.2 * torch.ones(3, 3, dtype=torch.float64)).requires_grad_()
    (found,) = torch.autograd.grad(log_determinant(weights, 2.0), weights)
    torch.testing.assert_close(found, torch.linalg.inv(2.0 * torch.eye(3, dtype=torch.float64) - weights).T.detach())


def test_the_log_determinant_knows_its_domain() -> None:
    with pytest.raises(ProblemError, match=r"spectral radius 1.2.*below s=1 only"):
        log_determinant(torch.stack([ring(3, 0.5), ring(3, 1.2)]))
    assert float(log_determinant(ring(3, 1.2), s=1.3)) > 0
    # The determinant is positive again beyond two negative factors, where the measure does not exist.
    with pytest.raises(ProblemError, match="spectral radius"):
        log_determinant(torch.block_diag(ring(2, 2.0), ring(2, 2.0)))
    far = 50 * torch.rand(4, 4, dtype=torch.float64)
    assert torch.isfinite(log_determinant(far, s=None))


def test_orders_put_causes_first_and_cycles_are_named() -> None:
    graph = torch.zeros(4, 4)
    graph[3, 1] = graph[1, 0] = 1
    assert topological_order(graph) == [2, 3, 1, 0]
    assert topological_order(np.zeros((3, 3))) == [0, 1, 2]
    graph[0, 3] = 1
    assert find_cycle(graph) == [0, 3, 1]
    with pytest.raises(ProblemError, match="a -> d -> b -> a"):
        topological_order(graph, names="abcd")
    for every in all_directed(3):
        cycle = find_cycle(every)
        assert all(every[a, b] for a, b in zip(cycle, [*cycle[1:], *cycle[:1]], strict=True))
    with pytest.raises(ProblemError, match="square"):
        is_dag(torch.zeros(2, 3))


def test_the_weakest_edges_of_cycles_are_dropped() -> None:
    weights = torch.tensor([[9.0, 0.9, 0.0], [0.1, 0.0, 0.8], [-0.5, 0.05, 0.0]])
    graph = to_dag(weights, 0.01)
    assert graph.tolist() == [[0, 1, 0], [0, 0, 1], [0, 0, 0]]
    assert to_dag(weights, 0.85).sum() == 1
    kept = to_dag(weights, 0.01, keep=torch.tensor([[0, 0, 0], [0, 0, 0], [1, 0, 0]]))
    assert kept.tolist() == [[0, 1, 0], [0, 0, 0], [1, 1, 0]]
    generator = torch.Generator().manual_seed(0)
    for size in (2, 5, 8):
        assert is_dag(to_dag(torch.randn(size, size, generator=generator)))
    for every in all_directed(3)[is_acyclic(all_directed(3))]:
        assert torch.equal(to_dag(every), every)
    with pytest.raises(ProblemError, match="cycle"):
        to_dag(weights, keep=torch.ones(3, 3))


# -- knowledge --------------------------------------------------------------------------------------------------------

NAMES = ["angle", "light", "length", "position"]


def test_nothing_known_allows_everything_but_self_loops() -> None:
    found = Knowledge(NAMES)
    assert torch.equal(found.allowed, ~torch.eye(4, dtype=torch.bool))
    assert not found.required.any()


def test_an_order_allows_edges_downwards_only() -> None:
    found = Knowledge(NAMES, order=["position", "light", "angle", "length"])
    place = torch.tensor([2, 1, 3, 0])
    assert torch.equal(found.allowed, place[:, None] < place)
    partial = Knowledge(NAMES, order=["light", "angle"])
    assert not partial.allowed[0, 1]
    assert partial.allowed.sum() == 11


def test_tiers_forbid_the_way_back() -> None:
    found = Knowledge(NAMES, tiers=[["angle", "light"], ["length", "position"]])
    assert not found.allowed[2:, :2].any()
    assert found.allowed.sum() == 8
    free = Knowledge(NAMES, tiers=[["angle"], ["length"]])
    assert not free.allowed[2, 0]
    assert free.allowed.sum() == 11


def test_what_would_close_a_cycle_with_required_edges_is_not_allowed() -> None:
    found = Knowledge(NAMES, required=[("angle", "light"), ("light", "length")], forbidden=[["position", "angle"]])
    assert found.required.nonzero().tolist() == [[0, 1], [1, 2]]
    assert found.allowed[0, 2]
    assert not found.allowed[[1, 2, 2, 3], [0, 1, 0, 0]].any()
    assert found.allowed.sum() == 12 - 4
    assert (found.allowed | ~found.required).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"required": [("angle", "light"), ("light", "length"), ("length", "angle")]},
            "angle -> light -> length -> angle",
        ),
        (
            {"required": [("angle", "light")], "forbidden": [("angle", "light")]},
            "angle -> light, but forbidden holds it as well",
        ),
        ({"required": [("length", "light")], "tiers": [["light"], ["length"]]}, "length -> light, but tiers put"),
        ({"required": [("length", "light")], "order": ["light", "length"]}, "length -> light, but order puts"),
        ({"order": ["light", "length"], "tiers": [["length"], ["light"]]}, "order puts light before length, but tiers"),
        ({"tiers": [["light"], ["length", "light"]]}, "tiers holds 'light' twice"),
        ({"order": ["light", "light"]}, "order holds 'light' twice"),
        ({"names": ["a", "a"]}, "names holds 'a' twice"),
        ({"required": [("angel", "light")]}, "required names 'angel', which is no concept; did you mean 'angle'"),
        ({"tiers": [["xyz"]]}, "tiers names 'xyz', which is no concept; known: angle, light"),
        ({"order": ["lenght"]}, "did you mean 'length'"),
        ({"forbidden": [("light", "light")]}, "from 'light' to itself"),
        ({"forbidden": ["light"]}, r"forbidden=\['light'\]; give a list, each item a list of 2"),
        ({"forbidden": [("light", "length", "angle")]}, "each item a list of 2"),
        ({"forbidden": "light"}, "give a list"),
        ({"tiers": ["light", "length"]}, "give a list, each item a list"),
    ],
)
def test_contradictions_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Knowledge(**{"names": NAMES, **options})
