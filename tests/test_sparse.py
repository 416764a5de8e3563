"""Sparse products against dense algebra: values, first and second derivatives, batches, captured graphs, stand-ins."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from probmodels import Problem
from probmodels.guides.edges import EdgeSet, make_edges
from probmodels.guides.nets import propagate
from probmodels.guides.sparse import Pattern, SparseMatrix, make_links, make_pattern, product, sampled
from probmodels.inference.programs.programs import opened

F64 = torch.float64
# Row 2 and column 1 of the first pattern are empty; the second has no entries.
ENTRIES = {
    "holes": ([3, 0, 0, 1, 3, 3], [2, 4, 0, 3, 0, 4], (4, 5)),
    "empty": ([], [], (3, 2)),
    "tall": ([0, 5, 2], [0, 0, 0], (6, 1)),
}


def pattern_of(name: str) -> tuple[Pattern, Tensor, Tensor, Tensor, tuple[int, int]]:
    """Pattern, places of its entries in the order of the pattern, the order, and the shape."""
    rows, columns, shape = ENTRIES[name]
    row, column = torch.tensor(rows, dtype=torch.int64), torch.tensor(columns, dtype=torch.int64)
    pattern, given = make_pattern(row, column, shape)
    return pattern, row[given], column[given], given, shape


def dense_of(row: Tensor, column: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    return values.new_zeros(shape).index_put((row, column), values)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = F64, grad: bool = False) -> Tensor:
    found = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)
    return found.requires_grad_(grad)


def graph(num_nodes: int = 7, isolated: int = 2, seed: int = 0) -> EdgeSet:
    """A graph with nodes that are in no pair."""
    rng = np.random.default_rng(seed)
    upper = np.argwhere(np.triu(rng.random((num_nodes - isolated,) * 2) < 0.6, 1))
    return make_edges(upper, np.zeros(num_nodes, dtype=int))


# -- patterns -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ENTRIES)
def test_a_pattern_holds_the_entries_by_row_and_by_column(name):
    pattern, row, column, given, (rows, columns) = pattern_of(name)
    assert sorted(given.tolist()) == list(range(len(row)))
    assert torch.equal(torch.repeat_interleave(torch.arange(rows), pattern.start.diff()), row)
    assert torch.equal(pattern.column, column)
    assert (torch.diff(row * columns + column) > 0).all()
    turned = pattern.transposed
    assert len(turned.start) - 1 == columns
    assert torch.equal(turned.column, row[pattern.order_t])
    assert torch.equal(torch.repeat_interleave(torch.arange(columns), turned.start.diff()), column[pattern.order_t])
    assert torch.equal(pattern.order_t[pattern.order], torch.arange(len(row)))
    assert all(torch.equal(*both) for both in zip(turned.transposed, pattern, strict=True))


def test_links_name_the_pair_of_every_entry():
    edges = graph()
    pattern, pair = make_links(edges)
    row = torch.repeat_interleave(torch.arange(edges.num_nodes), pattern.start.diff())
    ends = torch.stack([torch.minimum(row, pattern.column), torch.maximum(row, pattern.column)])
    assert torch.equal(ends, torch.stack([edges.source, edges.target])[:, pair])
    assert torch.equal(pair.bincount(), torch.full((edges.num_pairs,), 2))


# -- products -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("name", ENTRIES)
def test_products_are_those_of_dense_algebra(name, dtype):
    pattern, row, column, _, shape = pattern_of(name)
    values = randn(len(row), dtype=dtype)
    dense, other = randn(shape[1], 3, seed=1, dtype=dtype), randn(shape[0], 3, seed=2, dtype=dtype)
    matrix = dense_of(row, column, values, shape)
    found = product(pattern, values, dense)
    assert found.dtype == dtype
    torch.testing.assert_close(found, matrix @ dense)
    torch.testing.assert_close(product(pattern.transposed, values[pattern.order_t], other), matrix.T @ other)
    inner = sampled(pattern, other, dense)
    assert inner.dtype == dtype
    torch.testing.assert_close(inner, (other @ dense.T)[row, column])
    # Factors that do not lie in memory row by row.
    torch.testing.assert_close(product(pattern, values, dense.T.contiguous().T), matrix @ dense)
    torch.testing.assert_close(sampled(pattern, other.T.contiguous().T, dense.T.contiguous().T), inner)


@pytest.mark.parametrize("name", ENTRIES)
def test_first_and_second_derivatives_are_those_of_differences(name):
    pattern, row, _, _, shape = pattern_of(name)
    values, dense = randn(len(row), grad=True), randn(shape[1], 3, seed=1, grad=True)
    left = randn(shape[0], 3, seed=2, grad=True)
    for operator, inputs in ((product, (values, dense)), (sampled, (left, dense))):
        # Squares, so that derivatives depend on the values that they are taken at.
        assert torch.autograd.gradcheck(lambda a, b, f=operator: f(pattern, a, b).square(), inputs)
        assert torch.autograd.gradgradcheck(lambda a, b, f=operator: f(pattern, a, b).square(), inputs)


@pytest.mark.parametrize("name", ENTRIES)
def test_a_derivative_may_be_wanted_for_one_factor_alone(name):
    pattern, row, column, _, shape = pattern_of(name)
    values, dense = randn(len(row)), randn(shape[1], 3, seed=1)
    for which in range(2):
        inputs = [values.clone(), dense.clone()]
        inputs[which].requires_grad_()
        slope = torch.autograd.grad(product(pattern, *inputs).square().sum(), inputs[which])[0]
        wanted = (dense_of(row, column, inputs[0], shape) @ inputs[1]).square().sum()
        torch.testing.assert_close(slope, torch.autograd.grad(wanted, inputs[which])[0])


def test_sparse_matrices_multiply_as_the_dense_ones_that_they_came_from():
    dense = randn(6, 5) * (randn(6, 5, seed=1) > 0.3)
    dense[2], dense[:, 1] = 0, 0
    matrix, other = SparseMatrix.of(dense), randn(5, 4, seed=2, grad=True)
    assert matrix.shape == (6, 5)
    assert len(matrix.values) == int((dense != 0).sum())
    torch.testing.assert_close(matrix @ other, dense @ other)
    assert torch.autograd.gradgradcheck(lambda w: (matrix @ w).square(), (other,))
    assert SparseMatrix.of(torch.zeros(3, 2)).shape == (3, 2)


@pytest.mark.parametrize("rate", [0.2, 0.5])
def test_dropout_keeps_the_mean(rate):
    dense = randn(6, 5) * (randn(6, 5, seed=1) > 0.3)
    matrix, other = SparseMatrix.of(dense), randn(5, 4, seed=2)
    torch.manual_seed(0)
    draws = torch.stack([matrix.dropped(rate).values for _ in range(4000)])
    assert ((draws == 0) | torch.isclose(draws, matrix.values / (1 - rate))).all()
    mean = product(matrix.pattern, draws.mean(0), other)
    # An entry x has variance x^2 rate / (1 - rate) after dropout; 24 sums of them within 5 standard errors.
    limit = 5 * (dense.square() @ other.square() * rate / (1 - rate) / 4000).sqrt()
    assert ((mean - dense @ other).abs() <= limit + 1e-12).all()
    assert draws.std(0).min() > 0


# -- propagation over links -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_propagation_over_links_is_propagation(dtype):
    edges = graph()
    values = randn(edges.num_nodes, 3, dtype=dtype)
    for weight in (randn(edges.num_pairs, dtype=dtype).abs(), (randn(edges.num_pairs, dtype=dtype) > 0).to(dtype)):
        found = propagate(values, edges, weight, make_links(edges))
        assert found.dtype == dtype
        torch.testing.assert_close(found, propagate(values, edges, weight))
    lonely = make_edges([], np.zeros(4, dtype=int))
    some = randn(4, 3, dtype=dtype)
    torch.testing.assert_close(propagate(some, lonely, some.new_zeros(0), make_links(lonely)), some)


def test_propagation_over_links_can_be_differentiated_twice():
    edges = graph()
    links = make_links(edges)
    values = randn(edges.num_nodes, 3, grad=True)
    weight = randn(edges.num_pairs, seed=1).abs().requires_grad_()
    assert torch.autograd.gradcheck(lambda v, w: propagate(v, edges, w, links), (values, weight))
    assert torch.autograd.gradgradcheck(lambda v, w: propagate(v, edges, w, links), (values, weight))
    slopes = [
        torch.autograd.grad(propagate(values, edges, weight, which).square().sum(), (values, weight))
        for which in (links, None)
    ]
    torch.testing.assert_close(*slopes)


# -- torch's transformations ----------------------------------------------------------------------------------------


def test_batches_are_products_one_by_one():
    pattern, row, _, _, shape = pattern_of("holes")
    values, dense, left = randn(4, len(row)), randn(shape[1], 4, 3, seed=1), randn(shape[0], 3, seed=2)
    both = torch.vmap(lambda v, d: product(pattern, v, d), in_dims=(0, 1))(values, dense)
    torch.testing.assert_close(both, torch.stack([product(pattern, values[i], dense[:, i]) for i in range(4)]))
    one = torch.vmap(lambda d: sampled(pattern, left, d), in_dims=1, out_dims=1)(dense)
    torch.testing.assert_close(one, torch.stack([sampled(pattern, left, dense[:, i]) for i in range(4)], 1))
    edges = graph()
    links, x = make_links(edges), randn(edges.num_nodes, 2)
    weights = randn(4, edges.num_pairs).abs()
    three = torch.vmap(torch.vmap(lambda v, d: product(pattern, v, d), in_dims=(None, 0)), in_dims=(0, None))
    twice = three(values, dense.movedim(1, 0))  # batches of batches
    torch.testing.assert_close(twice[1, 2], product(pattern, values[1], dense[:, 2]))
    assert twice.shape == (4, 4, shape[0], 3)
    found = torch.vmap(lambda w: propagate(x, edges, w, links))(weights)
    torch.testing.assert_close(found, propagate(x, edges, weights))


def test_batches_are_one_node_of_a_captured_graph_and_have_derivatives():
    pattern, row, _, _, shape = pattern_of("holes")
    values, dense = randn(4, len(row), grad=True), randn(shape[1], 3, seed=1, grad=True)
    captured = make_fx(torch.vmap(lambda v: product(pattern, v, dense)))(values)
    assert sum("sparse_product" in str(node.target) for node in captured.graph.nodes) == 1
    assert torch.autograd.gradcheck(lambda v, d: product(pattern, v, d).square(), (values, dense))
    assert torch.autograd.gradgradcheck(lambda v, d: product(pattern, v, d).square(), (values, dense))
    left = randn(4, shape[0], 3, seed=2, grad=True)
    assert torch.autograd.gradgradcheck(lambda a, d: sampled(pattern, a, d).square(), (left, dense))


def test_products_and_their_derivatives_can_be_captured():
    pattern, row, _, _, shape = pattern_of("holes")

    def curvature(values: Tensor, dense: Tensor) -> Tensor:
        loss = product(pattern, values, dense).square().sum() + sampled(pattern, dense[: shape[0]], dense).pow(3).sum()
        first = torch.autograd.grad(loss, (values, dense), create_graph=True)
        second = torch.autograd.grad(sum(slope.square().sum() for slope in first), (values, dense))
        return torch.cat([slope.flatten() for slope in second])

    def inputs(seed: int) -> tuple[Tensor, Tensor]:
        return randn(len(row), seed=seed, grad=True), randn(shape[1], 3, seed=seed + 1, grad=True)

    captured = make_fx(curvature)(*inputs(0))
    names = {str(node.target) for node in captured.graph.nodes if node.op == "call_function"}
    assert {"probmodels.sparse_product.default", "probmodels.sparse_sampled.default"} <= names
    torch.testing.assert_close(captured(*inputs(7)), curvature(*inputs(7)))  # not those that it was captured with


def test_operators_are_registered_as_torch_wants_them():
    pattern, row, _, _, shape = pattern_of("holes")
    values, dense = randn(len(row), grad=True), randn(shape[1], 3, seed=1, grad=True)
    torch.library.opcheck(torch.ops.probmodels.sparse_product.default, (*pattern, values, dense))
    left = randn(shape[0], 3, seed=2, grad=True)
    torch.library.opcheck(torch.ops.probmodels.sparse_sampled.default, (*pattern, left, dense))


class Holder(torch.nn.Module):
    """A guide whose parameters go straight into the operators."""

    def __init__(self) -> None:
        super().__init__()
        self.pattern, row, _, _, shape = pattern_of("holes")
        self.values, self.dense = torch.nn.Parameter(randn(len(row))), torch.nn.Parameter(randn(shape[1], 3, seed=1))
        self.left = torch.nn.Parameter(randn(shape[0], 3, seed=2))

    def forward(self) -> None:
        """A program without sites."""

    def total(self) -> Tensor:
        first = product(self.pattern, self.values, self.dense).square().sum()
        return first + sampled(self.pattern, self.left, self.dense).square().sum()


def test_tensors_that_stand_in_for_parameters_reach_the_operators():
    """`fit_bilevel` puts unrolled parameters in the place of those that programs hold, by an override of torch."""
    import pyro

    holder = Holder()

    def guide() -> None:
        pyro.module("holder", holder)

    with opened(Problem("held", lambda: None, guide), seed=0) as programs:
        found = programs.params()
        assert len(found) == 3
        others = {name: (2 * value.detach()).requires_grad_() for name, value in found.items()}
        with programs.standing_in(others):
            stood = holder.total()
        slopes = torch.autograd.grad(stood, [*others.values()], allow_unused=True)
        own = holder.total()
    assert all(slope is not None and slope.abs().max() > 0 for slope in slopes)
    torch.testing.assert_close(stood, 16 * own)  # of fourth degree
