"""Candidate edges of graphs: ragged lists of node pairs, never a square matrix.

A model of uncertain edges says something about *candidate pairs* only: those that were observed, nearest neighbours in
feature space, and random others that stand for all the rest. Their number grows with the number of nodes, not with its
square.
"""

from __future__ import annotations

from typing import Annotated, NamedTuple

import numpy as np
import torch
import xarray as xr
from annotated_types import Interval
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from probmodels.datasets.pairs import Pairs, check_pairs, count_pairs, free_pairs, pairs_of_numbers
from probmodels.errors import DataError
from probmodels.options import Count, Natural, Seed, checked

__all__ = [
    "NEIGHBOUR",
    "OBSERVED",
    "RANDOM",
    "EdgeSet",
    "label_pairs",
    "make_edges",
    "nearest_neighbours",
    "transient_sites",
]

OBSERVED, NEIGHBOUR, RANDOM = 0, 1, 2
_KEPT_PAIRS = 10_000  # of which results keep draws
_ALL_PAIRS_LIMIT = 50_000_000  # above which a list of all pairs would take gigabytes in every step


class EdgeSet(NamedTuple):
    """Candidate pairs of nodes in one graph or many.

    Nodes are numbered through over all graphs. Every pair stands once, smaller node first, both nodes in one graph.

    Attributes
    ----------
    source, target
        Nodes (pair,) of every pair, ``source < target``.
    origin
        Why a pair is a candidate (pair,): `OBSERVED`, `NEIGHBOUR` or `RANDOM`.
    graph
        Graph (node,) that every node belongs to, in ascending order.
    num_graphs
        Number of graphs.
    """

    source: Tensor
    target: Tensor
    origin: Tensor
    graph: Tensor
    num_graphs: int = 1

    @property
    def num_nodes(self) -> int:
        """Nodes of all graphs."""
        return len(self.graph)

    @property
    def num_pairs(self) -> int:
        """Candidate pairs of all graphs."""
        return len(self.source)

    @property
    def observed(self) -> Tensor:
        """Whether a pair is an edge of the observed graph (pair,)."""
        return self.origin == OBSERVED

    @property
    def graph_of_pair(self) -> Tensor:
        """Graph (pair,) that every pair belongs to."""
        return self.graph[self.source]

    def directed(self) -> Tensor:
        """Every pair in both directions, as PyG's ``edge_index`` (2, 2 pair): all forward, then all backward."""
        forward = torch.stack([self.source, self.target])
        return torch.cat([forward, forward.flip(0)], dim=1)

    def refreshed(self) -> EdgeSet:
        """The same pairs with fresh random ones in place of the random ones, as many in every graph.

        The F free pairs of a graph, in a circle from a random start, are cut into as many runs as it has random pairs,
        m, and each run gives one: they differ, and every free pair is drawn with probability m / F. Numbers come from
        torch's generator, and no size from values, so that this may be captured as a graph of operations. Random pairs
        have to stand by ascending graph, as in all sets of `make_edges`.
        """
        source, target, graph, device = self.source, self.target, self.graph, self.source.device
        drawn, place = self.origin == RANDOM, torch.arange(self.num_pairs, device=device)

        def by_graph(value: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
            """Sums (graph,), and those of all graphs before."""
            sums = torch.zeros(self.num_graphs, dtype=torch.int64, device=device).index_add(0, index, value.long())
            return sums, sums.cumsum(0) - sums

        # All pairs within graphs are numbered in order; ``first`` is the number of the first pair of every node.
        sizes, before = by_graph(torch.ones_like(graph), graph)
        partners = (before + sizes)[graph] - torch.arange(self.num_nodes, device=device) - 1
        first = torch.cat([partners.new_zeros(1), partners.cumsum(0)])
        total = first[-1] + self.num_pairs
        taken = torch.where(drawn, total, first[source] + target - source - 1).sort().values - place
        own = graph[source]
        count, earlier = by_graph(drawn, own)
        fixed, _ = by_graph(~drawn, own)
        free = sizes * (sizes - 1) // 2 - fixed
        turn = drawn.long().cumsum(0) - 1 - earlier[own]  # of a random pair among those of its graph
        room, runs = free[own].clamp(min=1), count[own].clamp(min=1)
        low, high = turn * room // runs, (turn + 1) * room // runs

        def below(size: Tensor) -> Tensor:
            return (torch.rand(size.shape, dtype=torch.float64, device=device) * size).long().minimum(size - 1)

        start = below(free.clamp(min=1))[own]
        number = (free.cumsum(0) - free)[own] + (start + low + below((high - low).clamp(min=1))) % room
        number = number + torch.searchsorted(taken, number, right=True)  # as `free_pairs` has it
        node = torch.searchsorted(first, number, right=True) - 1
        other = number - first[node] + node + 1
        return self._replace(source=torch.where(drawn, node, source), target=torch.where(drawn, other, target))


def label_pairs(data: xr.Dataset, edges: EdgeSet) -> xr.Dataset:
    """The data with ``pair_source``, ``pair_target`` (labels of nodes) and ``pair_observed``, dim ``pair``."""
    node = data["node"].values if "node" in data.coords else np.arange(edges.num_nodes)
    return data.assign(
        pair_source=("pair", node[edges.source.cpu().numpy()]),
        pair_target=("pair", node[edges.target.cpu().numpy()]),
        pair_observed=("pair", edges.observed.cpu().numpy()),
    )


def transient_sites(edges: EdgeSet) -> tuple[str, ...]:
    """Sites by pair whose draws would be too many to keep, as a problem's ``transient`` takes them."""
    return ("edge", "edge_probability") if edges.num_pairs > _KEPT_PAIRS else ()


@checked(DataError)
def make_edges(
    pairs: ArrayLike,
    graph: ArrayLike,
    *,
    features: ArrayLike | None = None,
    neighbours: Natural = 0,
    metric: str = "cosine",
    near: ArrayLike | None = None,
    random: Annotated[float, Interval(ge=0, le=1e6)] = 0.0,
    all_pairs: bool = False,
    seed: Seed = 0,
) -> EdgeSet:
    """Candidates: the observed pairs, nearest neighbours in feature space, and random pairs.

    Parameters
    ----------
    pairs
        Observed edges (edge, 2), whole numbers, each once in either direction; may be empty.
    graph
        Graph of every node (node,), ascending from 0; zeros for one graph.
    features
        Array (node, feature) for neighbours, finite.
    neighbours
        Nearest neighbours of every node that become candidates, within its graph.
    metric
        Distance of scikit-learn's ``NearestNeighbors``: ``"cosine"``, ``"euclidean"``, ...
    near
        Neighbours that were found before, as pairs (pair, 2), in place of ``features``, ``neighbours`` and ``metric``.
    random
        Random pairs per observed or neighbour pair, or per node where there are none.
    all_pairs
        Take every pair within a graph instead, which suits graphs of up to some hundred nodes.
    seed
        Seed of the random pairs.

    Returns
    -------
    EdgeSet
        Sorted by source and target within each origin.

    Raises
    ------
    DataError
        If pairs are no proper edges, the number of neighbours exceeds what the smallest graph has, features are absent
        or not finite, or all pairs would be too many.
    """
    nodes = np.asarray(graph, dtype=np.int64)
    if nodes.ndim != 1 or not len(nodes):
        raise DataError("there is no graph without nodes: give at least one")
    if nodes[0] != 0 or (np.diff(nodes) < 0).any() or (np.diff(nodes) > 1).any():
        raise DataError("graph must number the graph of every node in ascending order from 0, none without nodes")
    observed = check_pairs(pairs, np.arange(len(nodes)), nodes)
    parts, origins = [observed], [OBSERVED]
    if all_pairs:
        parts.append(_all_pairs(nodes))
        origins.append(NEIGHBOUR)
    elif near is not None:
        parts.append(check_pairs(near, np.arange(len(nodes)), nodes, what="neighbour pair"))
        origins.append(NEIGHBOUR)
    elif neighbours:
        if features is None:
            raise DataError(f"neighbours={neighbours} needs features to tell which nodes are near each other")
        parts.append(nearest_neighbours(features, nodes, int(neighbours), metric=metric)[0])
        origins.append(NEIGHBOUR)
    found = _joined(parts, len(nodes))
    known, origin = found[:, :2], np.array(origins)[found[:, 2]]
    if random and not all_pairs:
        count = round(random * (len(known) or len(nodes)))
        fresh = free_pairs(known, nodes, count, np.random.default_rng(seed))
        known, origin = np.concatenate([known, fresh]), np.concatenate([origin, np.full(len(fresh), RANDOM)])
    return EdgeSet(
        torch.from_numpy(known[:, 0].copy()),
        torch.from_numpy(known[:, 1].copy()),
        torch.from_numpy(origin.astype(np.int8)),
        torch.from_numpy(nodes.copy()),
        int(nodes[-1]) + 1,
    )


@checked(DataError)
def nearest_neighbours(
    features: ArrayLike, graph: NDArray[np.int64], neighbours: Count, *, metric: str = "cosine"
) -> tuple[Pairs, NDArray[np.int64]]:
    """Pairs (pair, 2) of nodes of which at least one is among the nearest of the other, within their graph; ranks.

    The rank (pair,) of a pair is the place, from 0, of one node among the nearest of the other, the lower of the two:
    pairs of rank below k are those of k neighbours.

    Parameters
    ----------
    features
        Array (node, feature), finite.
    graph
        Graph of every node (node,), ascending.
    neighbours
        Neighbours of every node.
    metric
        As in `make_edges`.

    Raises
    ------
    DataError
        If features do not fit or are not finite, a graph is too small, or the metric is unknown.
    """
    from sklearn.neighbors import NearestNeighbors

    values = np.asarray(features, dtype=np.float32)
    if values.ndim != 2 or len(values) != len(graph):
        raise DataError(f"features of shape {values.shape} for {len(graph)} nodes; give (node, feature)")
    if not np.isfinite(values).all():
        raise DataError("features hold entries that are not finite; fill or drop them before asking for neighbours")
    norm = np.linalg.norm(values, axis=1, keepdims=True)
    if metric == "cosine" and norm.all():  # the same order as among unit vectors, which scikit-learn finds faster
        values, metric = values / norm, "euclidean"
    starts = np.flatnonzero(np.diff(graph, prepend=-1))
    sizes = np.diff(starts, append=len(graph))
    if neighbours >= sizes.min():
        raise DataError(
            f"neighbours={neighbours}, but the smallest graph has {sizes.min()} nodes; choose at most {sizes.min() - 1}"
        )
    found = []
    for start, size in zip(starts, sizes, strict=True):
        try:
            model = NearestNeighbors(n_neighbors=neighbours, metric=metric).fit(values[start : start + size])
            near = model.kneighbors(return_distance=False)  # without the node itself
        except (TypeError, ValueError) as error:
            raise DataError(f"metric={metric!r} is not known to scikit-learn's NearestNeighbors: {error}") from error
        found.append(start + np.stack([np.repeat(np.arange(size), neighbours), near.ravel()], axis=1))
    ends = np.sort(np.concatenate(found), axis=1).astype(np.int64)
    rank = np.tile(np.arange(neighbours), len(graph))
    order = np.lexsort((rank, ends[:, 1], ends[:, 0]))  # the lower rank of a pair that stands twice comes first
    ends, rank = ends[order], rank[order]
    once = np.concatenate([[True], (ends[1:] != ends[:-1]).any(axis=1)])
    return ends[once], rank[once]


def _all_pairs(graph: NDArray[np.int64]) -> Pairs:
    total = count_pairs(graph)
    if total > _ALL_PAIRS_LIMIT:
        raise DataError(
            f"all pairs of these graphs are {total:,}, more than {_ALL_PAIRS_LIMIT:,}; "
            "leave out all_pairs, and take neighbours=... and random=... as candidates"
        )
    return pairs_of_numbers(np.arange(total), graph)


def _joined(parts: list[Pairs], num_nodes: int) -> Pairs:
    """Pairs with the number of the first part that holds them (pair, 3), ordered by part and pair."""
    place = np.concatenate([np.full(len(part), index) for index, part in enumerate(parts)])
    pairs = np.concatenate(parts)
    _, first = np.unique(pairs[:, 0] * num_nodes + pairs[:, 1], return_index=True)  # the first of equal ones
    kept = np.column_stack([pairs, place])[first]
    return kept[np.argsort(kept[:, 2], kind="stable")].astype(np.int64)
