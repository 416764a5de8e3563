"""Sparse matrices that networks on graphs multiply by, differentiable any number of times in entries and factors.

torch's own sparse products have no second derivative, and products by gathering and scattering rows are some twenty
times slower. The two operations here are each other's derivatives::

    product(A, B) = A B             d/dA: sampled(G, B)      d/dB: product(A^T, G)
    sampled(B, C) = (B C^T)_ij      d/dB: product(G, C)      d/dC: product(G^T, B)

with entries (i, j) of a fixed pattern. They are operators of torch, which captured graphs hold as one node each.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from probmodels.datasets.edges import EdgeSet

__all__ = ["Links", "Pattern", "SparseMatrix", "make_links", "make_pattern", "product", "sampled"]

# torch calls its compressed rows a beta, once in a process.
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")


class Pattern(NamedTuple):
    """Where a sparse matrix (row, column) has entries, in compressed rows and in compressed columns.

    Attributes
    ----------
    start, column
        First entry of every row (row + 1,), and column of every entry (entry,), ordered by row and column.
    order
        Of every entry its place by column and row (entry,).
    start_t, column_t, order_t
        The same of the transposed pattern.
    """

    start: Tensor
    column: Tensor
    order: Tensor
    start_t: Tensor
    column_t: Tensor
    order_t: Tensor

    @property
    def transposed(self) -> Pattern:
        """The pattern of the transposed matrix; entry ``e`` of it is entry ``order_t[e]`` of this one."""
        return Pattern(self.start_t, self.column_t, self.order_t, self.start, self.column, self.order)


def make_pattern(row: Tensor, column: Tensor, shape: tuple[int, int]) -> tuple[Pattern, Tensor]:
    """Pattern of the entries (row, column), which may come in any order but only once each.

    Returns
    -------
    tuple
        Pattern, and for every entry of it which of the given ones it is (entry,).
    """
    rows, columns = shape
    given = torch.argsort(row * columns + column)
    row, column = row[given], column[given]
    order_t = torch.argsort(column * rows + row)
    order = torch.empty_like(order_t)
    order[order_t] = torch.arange(len(order), device=order.device)
    starts = (
        torch.searchsorted(key, torch.arange(size + 1, device=key.device))
        for key, size in ((row, rows), (column[order_t], columns))
    )
    start, start_t = starts
    return Pattern(start, column, order, start_t, row[order_t], order_t), given


class Links(NamedTuple):
    """Candidate pairs as the pattern of a symmetric matrix (node, node), for `propagate`.

    Attributes
    ----------
    pattern
        Every pair in both directions.
    pair
        Pair of every entry (entry,).
    """

    pattern: Pattern
    pair: Tensor


def make_links(edges: EdgeSet) -> Links:
    """The candidate pairs of `edges` as a pattern."""
    row, column = edges.directed()
    pattern, given = make_pattern(row, column, (edges.num_nodes, edges.num_nodes))
    return Links(pattern, given % max(edges.num_pairs, 1))


class SparseMatrix(NamedTuple):
    """A matrix (row, column) that is mostly zero, to be multiplied from the right.

    Attributes
    ----------
    pattern
        Where its entries are.
    values
        Entries (entry,).
    """

    pattern: Pattern
    values: Tensor

    @classmethod
    def of(cls, dense: Tensor) -> SparseMatrix:
        """From a dense matrix (row, column)."""
        row, column = dense.nonzero(as_tuple=True)
        pattern, given = make_pattern(row, column, (dense.shape[0], dense.shape[1]))
        return cls(pattern, dense[row, column][given])

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return len(self.pattern.start) - 1, len(self.pattern.start_t) - 1

    def __matmul__(self, other: Tensor) -> Tensor:
        """Product with (column, feature): (row, feature)."""
        return product(self.pattern, self.values, other)

    def dropped(self, rate: float) -> SparseMatrix:
        """The same with entries left out at random and the others scaled up, as dropout does."""
        return SparseMatrix(self.pattern, torch.nn.functional.dropout(self.values, rate))


def product(pattern: Pattern, values: Tensor, dense: Tensor) -> Tensor:
    """Sparse matrix times a dense one.

    Parameters
    ----------
    pattern, values
        Pattern and entries (entry,) of the sparse matrix (row, column).
    dense
        Of shape (column, feature).

    Returns
    -------
    Tensor
        Of shape (row, feature).
    """
    result: Tensor = torch.ops.probmodels.sparse_product(*pattern, values, dense)
    return result


def sampled(pattern: Pattern, left: Tensor, right: Tensor) -> Tensor:
    """Inner products (entry,) of rows of left (row, feature) and right (column, feature) that the pattern pairs."""
    result: Tensor = torch.ops.probmodels.sparse_sampled(*pattern, left, right)
    return result


def _compressed(start: Tensor, column: Tensor, values: Tensor, columns: int) -> Tensor:
    size = (len(start) - 1, columns)
    return torch.sparse_csr_tensor(start, column, values, size, check_invariants=False)


@torch.library.custom_op("probmodels::sparse_product", mutates_args=())
def _product(
    start: Tensor,
    column: Tensor,
    order: Tensor,
    start_t: Tensor,
    column_t: Tensor,
    order_t: Tensor,
    values: Tensor,
    dense: Tensor,
) -> Tensor:
    return _compressed(start, column, values, len(dense)) @ dense


@torch.library.custom_op("probmodels::sparse_sampled", mutates_args=())
def _sampled(
    start: Tensor,
    column: Tensor,
    order: Tensor,
    start_t: Tensor,
    column_t: Tensor,
    order_t: Tensor,
    left: Tensor,
    right: Tensor,
) -> Tensor:
    empty = _compressed(start, column, left.new_zeros(len(column)), len(right))
    return torch.sparse.sampled_addmm(empty, left.contiguous(), right.contiguous().mT, beta=0.0).values().clone()


@_product.register_fake
def _(*args: Tensor) -> Tensor:
    return args[7].new_empty(args[0].shape[0] - 1, args[7].shape[1])


@_sampled.register_fake
def _(*args: Tensor) -> Tensor:
    return args[6].new_empty(args[1].shape[0])


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _product_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *parts, values, dense = ctx.saved_tensors
    pattern = Pattern(*parts)
    to_values = to_dense = None
    if ctx.needs_input_grad[6]:
        to_values = sampled(pattern, grad, dense)
    if ctx.needs_input_grad[7]:
        to_dense = product(pattern.transposed, values.index_select(0, pattern.order_t), grad)
    return *(None for _ in parts), to_values, to_dense


def _sampled_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *parts, left, right = ctx.saved_tensors
    pattern = Pattern(*parts)
    to_left = to_right = None
    if ctx.needs_input_grad[6]:
        to_left = product(pattern, grad, right)
    if ctx.needs_input_grad[7]:
        to_right = product(pattern.transposed, grad.index_select(0, pattern.order_t), left)
    return *(None for _ in parts), to_left, to_right


def _one_by_one(operator: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, int]]:
    """Batches for `torch.vmap`, which sparse products know nothing of."""

    def batched(info: Any, in_dims: tuple[int | None, ...], *args: Tensor) -> tuple[Tensor, int]:
        def chosen(index: int) -> list[Tensor]:
            pairs = zip(args, in_dims, strict=True)
            return [value if dim is None else value.select(dim, index) for value, dim in pairs]

        return torch.stack([operator(*chosen(index)) for index in range(info.batch_size)]), 0

    return batched


for _operator, _backward in ((_product, _product_backward), (_sampled, _sampled_backward)):
    _operator.register_autograd(_backward, setup_context=_keep)
    _operator.register_vmap(_one_by_one(_operator))
