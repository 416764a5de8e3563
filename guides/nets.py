"""Networks that guides and models share."""

from __future__ import annotations

from torch import Tensor

from probmodels.datasets.edges import EdgeSet
from probmodels.guides.sparse import Links, product

__all__ = ["pool_mean", "propagate"]


def propagate(values: Tensor, edges: EdgeSet, weight: Tensor, links: Links | None = None) -> Tensor:
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
    links
        The pairs as `make_links` orders them, for a product that is an order of magnitude faster; with these neither
        values nor weights have further axes.

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
    scale = degree.rsqrt().unsqueeze(-1)
    out = values * scale
    if links is not None:
        return scale * (out + product(links.pattern, weight.index_select(-1, links.pair), out))
    # index_select has a plain sum for a derivative, several times faster than that of indexing.
    share = weight.unsqueeze(-1)
    forward, backward = out.index_select(-2, target) * share, out.index_select(-2, source) * share
    return scale * out.index_add(-2, source, forward).index_add(-2, target, backward)


def pool_mean(values: Tensor, edges: EdgeSet) -> Tensor:
    """Mean over the nodes of every graph: (..., node, feature) to (..., graph, feature)."""
    total = values.new_zeros(*values.shape[:-2], edges.num_graphs, values.shape[-1])
    count = values.new_zeros(edges.num_graphs).index_add(0, edges.graph, values.new_ones(edges.num_nodes))
    return total.index_add(-2, edges.graph, values) / count.unsqueeze(-1)
