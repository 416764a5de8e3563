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

from probmodels.guides.edges import EdgeSet

__all__ = ["Links", "Pattern", "SparseMatrix", "make_links", "make_pattern", "product", "sampled"]

with warnings.catch_warnings():  # torch says once in a process that its compressed rows are a beta
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor([0, 0], [], [], (1, 1), check_invariants=False)


class Pattern(NamedTuple):
    """Where a sparse matrix (row, column) has entries, in compressed rows and in compressed columns.

    Attributes
    ----------
    start, column
        First entry of every row (row + 1,), and column of every entry (entry,), ordered by row and column.
    order
        Place of every entry by column and row (entry,).
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
        Pattern and entries (..., entry) of the sparse matrix (row, column).
    dense
        Matrices (..., column, feature).

    Returns
    -------
    Tensor
        Products (..., row, feature), batch axes broadcast.
    """
    result: Tensor = torch.ops.probmodels.sparse_product(*pattern, values, dense)
    return result


def sampled(pattern: Pattern, left: Tensor, right: Tensor) -> Tensor:
    """Inner products (..., entry) of the rows of left (..., row, feature) and right (..., column, feature) in pairs."""
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
    def one(values: Tensor, dense: Tensor) -> Tensor:
        return _compressed(start, column, values, len(dense)) @ dense

    return _each(one, (values, 1), (dense, 2), (len(start) - 1, dense.shape[-1]))


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
    empty = _compressed(start, column, left.new_zeros(len(column)), right.shape[-2])

    def one(left: Tensor, right: Tensor) -> Tensor:
        return torch.sparse.sampled_addmm(empty, left.contiguous(), right.contiguous().mT, beta=0.0).values().clone()

    return _each(one, (left, 2), (right, 2), (len(column),))


def _each(
    one: Callable[[Tensor, Tensor], Tensor],
    first: tuple[Tensor, int],
    second: tuple[Tensor, int],
    shape: tuple[int, ...],
) -> Tensor:
    """An operation at every index of the batch; factors come with the number of their own axes."""
    (a, axes_a), (b, axes_b) = first, second
    if a.dim() == axes_a and b.dim() == axes_b:
        return one(a, b)
    batch = _batch(a, axes_a, b, axes_b)
    left, right = (
        value.expand(*batch, *value.shape[-axes:]).reshape(-1, *value.shape[-axes:]) for value, axes in (first, second)
    )
    found = a.new_empty(len(left), *shape)
    for index, (x, y) in enumerate(zip(left, right, strict=True)):
        found[index] = one(x, y)
    return found.reshape(*batch, *shape)


def _batch(a: Tensor, axes_a: int, b: Tensor, axes_b: int) -> torch.Size:
    return torch.broadcast_shapes(a.shape[: a.dim() - axes_a], b.shape[: b.dim() - axes_b])


@_product.register_fake
def _(*args: Tensor) -> Tensor:
    return args[7].new_empty(*_batch(args[6], 1, args[7], 2), args[0].shape[0] - 1, args[7].shape[-1])


@_sampled.register_fake
def _(*args: Tensor) -> Tensor:
    return args[6].new_empty(*_batch(args[6], 2, args[7], 2), args[1].shape[0])


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _product_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *parts, values, dense = ctx.saved_tensors
    pattern = Pattern(*parts)
    to_values = to_dense = None
    if ctx.needs_input_grad[6]:
        to_values = sampled(pattern, grad, dense).sum_to_size(values.shape)
    if ctx.needs_input_grad[7]:
        to_dense = product(pattern.transposed, values.index_select(-1, pattern.order_t), grad).sum_to_size(dense.shape)
    return *(None for _ in parts), to_values, to_dense


def _sampled_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *parts, left, right = ctx.saved_tensors
    pattern = Pattern(*parts)
    to_left = to_right = None
    if ctx.needs_input_grad[6]:
        to_left = product(pattern, grad, right).sum_to_size(left.shape)
    if ctx.needs_input_grad[7]:
        to_right = product(pattern.transposed, grad.index_select(-1, pattern.order_t), left).sum_to_size(right.shape)
    return *(None for _ in parts), to_left, to_right


def _batched(operator: Callable[..., Tensor], axes: tuple[int, int]) -> Callable[..., tuple[Tensor, int]]:
    """Batches for `torch.vmap`, in one node of a captured graph however many there are."""

    def batched(info: Any, in_dims: tuple[int | None, ...], *args: Tensor) -> tuple[Tensor, int]:
        if any(dim is not None for dim in in_dims[:6]):
            raise NotImplementedError("the patterns of sparse products cannot be batched")
        parts = [value if dim is None else value.movedim(dim, 0) for value, dim in zip(args, in_dims, strict=True)]
        outer = [int(dim is not None) for dim in in_dims[6:]]
        inner = [value.dim() - own - new for value, own, new in zip(parts[6:], axes, outer, strict=True)]
        for place, new, own in zip((6, 7), outer, inner, strict=True):  # batch axes of its own come after the new one
            if new:
                shape = parts[place].shape
                parts[place] = parts[place].reshape(shape[0], *[1] * (max(inner) - own), *shape[1:])
        return operator(*parts), 0

    return batched


for _operator, _backward, _axes in ((_product, _product_backward, (1, 2)), (_sampled, _sampled_backward, (2, 2))):
    _operator.register_autograd(_backward, setup_context=_keep)
    _operator.register_vmap(_batched(_operator, _axes))
