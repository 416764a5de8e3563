"""Networks that guides and models share."""

from __future__ import annotations

import torch
from torch import Tensor

from probmodels.datasets.edges import EdgeSet

__all__ = ["SparseRows", "pool_mean", "propagate"]


def propagate(values: Tensor, edges: EdgeSet, weight: Tensor) -> Tensor:
    """Symmetrically normalised sum over neighbours, ``D^-1/2 (A + I) D^-1/2 values``.

    Differentiable any number of times in both values and weights.

    Parameters
    ----------
    values
        Of every node (..., node, feature).
    edges
        Candidate pairs.
    weight
        Weight of every pair (..., pair), not negative; zero for an absent edge.

    Returns
    -------
    Tensor
        Same shape as ``values``, batch axes broadcast.

    References
    ----------
    Kipf, T. N. and Welling, M. (2017). Semi-supervised classification with graph convolutional networks.
    https://arxiv.org/abs/1609.02907
    """
    source, target = edges.source, edges.target
    degree = weight.new_ones(*weight.shape[:-1], edges.num_nodes)
    degree = degree.index_add(-1, source, weight).index_add(-1, target, weight)
    scale = degree.rsqrt()
    # index_select has a plain sum for a derivative, several times faster than that of indexing.
    share = (weight * scale.index_select(-1, source) * scale.index_select(-1, target)).unsqueeze(-1)
    out = values * scale.square().unsqueeze(-1)
    forward, backward = values.index_select(-2, target) * share, values.index_select(-2, source) * share
    out = out.expand(forward.shape[:-2] + out.shape[-2:])
    return out.index_add(-2, source, forward).index_add(-2, target, backward)


def pool_mean(values: Tensor, edges: EdgeSet) -> Tensor:
    """Mean over the nodes of every graph: (..., node, feature) to (..., graph, feature)."""
    total = values.new_zeros(*values.shape[:-2], edges.num_graphs, values.shape[-1])
    count = values.new_zeros(edges.num_graphs).index_add(0, edges.graph, values.new_ones(edges.num_nodes))
    return total.index_add(-2, edges.graph, values) / count.unsqueeze(-1)


class SparseRows:
    """A constant matrix (row, column) that is mostly zero, to be multiplied from the right.

    Its product is differentiable any number of times in the other factor, which torch's sparse matrices are not.

    Parameters
    ----------
    dense
        Matrix (row, column).
    """

    def __init__(self, dense: Tensor) -> None:
        self.shape = dense.shape
        self.row, self.column = dense.nonzero(as_tuple=True)
        self.value = dense[self.row, self.column]

    def __matmul__(self, other: Tensor) -> Tensor:
        """Product with (column, feature): (row, feature)."""
        picked = other.index_select(0, self.column) * self.value.unsqueeze(-1)
        return picked.new_zeros(self.shape[0], other.shape[1]).index_add(0, self.row, picked)

    def to(self, *args: object, **kwargs: object) -> SparseRows:
        """The same on another device or of another type."""
        moved = object.__new__(SparseRows)
        moved.shape, moved.row, moved.column = self.shape, self.row, self.column
        moved.value = self.value.to(*args, **kwargs)  # type: ignore[call-overload]
        moved.row, moved.column = self.row.to(moved.value.device), self.column.to(moved.value.device)
        return moved

    def dropped(self, rate: float) -> SparseRows:
        """The same with entries left out at random and the others scaled up, as dropout does."""
        thinned = object.__new__(SparseRows)
        thinned.shape, thinned.row, thinned.column = self.shape, self.row, self.column
        thinned.value = torch.nn.functional.dropout(self.value, rate)
        return thinned
