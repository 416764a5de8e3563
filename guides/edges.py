"""Candidate edges of graphs: ragged lists of node pairs, never a square matrix.

A model of uncertain edges says something about *candidate pairs* only: those that were observed, nearest neighbours in
feature space, and random others that stand for all the rest. Their number grows with the number of nodes, not with its
square.
"""

from __future__ import annotations

import warnings
from typing import Annotated, NamedTuple

import numpy as np
import torch
import xarray as xr
from annotated_types import Interval
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from probmodels.datasets.labelled import arranged, row_labels
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
_MOST_CHOSEN = 20  # times the number of neighbours, by which a node may be chosen
_MANY, _TIED = 100, 20  # nodes, and times as many of them as distinct features, from which on ties are said
_FEW_GROUPS = 2000  # distinct features whose distances are all computed


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
        Seed of the random pairs, and of the choice among nodes that are equally near.

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
    rows = row_labels(features, graph, dim="node")
    graph = arranged(graph, "graph", {"node": rows})
    features = arranged(features, "features", {"node": rows, "feature": None})
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
        parts.append(nearest_neighbours(features, nodes, int(neighbours), metric=metric, seed=seed)[0])
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
    features: ArrayLike, graph: NDArray[np.int64], neighbours: Count, *, metric: str = "cosine", seed: Seed = 0
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
    seed
        Seed of the choice among nodes that are equally near.

    Raises
    ------
    DataError
        If features do not fit or are not finite, a graph is too small, or the metric is unknown.

    Warns
    -----
    UserWarning
        If nodes have few distinct features, so that chance chooses among equals, or pairs of a node that is the nearest
        of very many others are left out.
    """
    values = np.asarray(features, dtype=np.float32)
    if values.ndim != 2 or len(values) != len(graph):
        raise DataError(f"features of shape {values.shape} for {len(graph)} nodes; give (node, feature)")
    if not np.isfinite(values).all():
        raise DataError("features hold entries that are not finite; fill or drop them before asking for neighbours")
    norm = np.linalg.norm(values, axis=1, keepdims=True)
    if metric == "cosine" and norm.all():  # the same order as among unit vectors, which scikit-learn finds faster
        values, metric = (values / norm).round(6), "euclidean"  # so that rows of one direction are equal
    starts = np.flatnonzero(np.diff(graph, prepend=-1))
    sizes = np.diff(starts, append=len(graph))
    if neighbours >= sizes.min():
        raise DataError(
            f"neighbours={neighbours}, but the smallest graph has {sizes.min()} nodes; choose at most {sizes.min() - 1}"
        )
    rng, found, ranks, distinct = np.random.default_rng(seed), [], [], 0
    for start, size in zip(starts, sizes, strict=True):
        try:
            near, kinds = _near(values[start : start + size], neighbours, metric, rng)
        except (TypeError, ValueError) as error:
            raise DataError(f"metric={metric!r} is not known to scikit-learn's NearestNeighbors: {error}") from error
        distinct += kinds
        ends, rank = _capped(near, _MOST_CHOSEN * neighbours, rng)
        found.append(start + ends)
        ranks.append(rank)
    ends, rank = np.sort(np.concatenate(found), axis=1).astype(np.int64), np.concatenate(ranks)
    _warn_of_ties(distinct, len(graph), len(graph) * neighbours - len(ends))
    order = np.lexsort((rank, ends[:, 1], ends[:, 0]))  # the lower rank of a pair that stands twice comes first
    ends, rank = ends[order], rank[order]
    once = np.concatenate([[True], (ends[1:] != ends[:-1]).any(axis=1)])
    return ends[once], rank[once]


def _near(
    values: NDArray[np.float32], neighbours: int, metric: str, rng: np.random.Generator
) -> tuple[NDArray[np.int64], int]:
    """The nearest (node, neighbour) of every node, itself left out, and the number of distinct features.

    Nodes of the same features are equally near. Were the first of them taken for all, they would become hubs. So the
    nodes of a feature stand in a random circle, and each takes those that follow its own place.
    """
    from sklearn.neighbors import NearestNeighbors

    distinct, group = np.unique(values, axis=0, return_inverse=True)
    group, count = group.ravel(), len(distinct)
    if count == len(values):
        model = NearestNeighbors(n_neighbors=neighbours, metric=metric).fit(values)
        return model.kneighbors(return_distance=False).astype(np.int64), count
    shuffled = rng.permutation(len(values))
    members = np.split(shuffled[np.argsort(group[shuffled], kind="stable")], np.cumsum(np.bincount(group))[:-1])
    wanted = count - 1 if count <= _FEW_GROUPS else min(neighbours, count - 1)
    order = np.empty((count, 0), dtype=np.int64)
    model = NearestNeighbors(n_neighbors=max(wanted, 1), metric=metric).fit(distinct)
    if wanted:
        distance, others = model.kneighbors()
        turned = (others - np.arange(count)[:, None]) % count  # groups that are equally near, each from its own place
        order = np.take_along_axis(others, np.lexsort((turned, distance.round(6))), axis=1)
    near = np.empty((len(values), neighbours), dtype=np.int64)
    for own, nodes in enumerate(members):
        place, filled = np.arange(len(nodes)), 0
        for other in (own, *order[own]):
            size, skip = len(members[other]), int(other == own)
            taken = min(neighbours - filled, size - skip)
            steps = place[:, None] + skip + np.arange(taken)
            near[nodes, filled : filled + taken] = members[other][steps % size]
            filled += taken
            if filled == neighbours:
                break
    return near, count


def _capped(
    near: NDArray[np.int64], most: int, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pairs (pair, 2) of nodes and their nearest, with ranks (pair,); nodes chosen by more than ``most`` keep these."""
    count, neighbours = near.shape
    ends = np.stack([np.repeat(np.arange(count), neighbours), near.ravel()], axis=1)
    rank = np.tile(np.arange(neighbours), count)
    order = np.lexsort((rng.random(len(ends)), rank, ends[:, 1]))  # those that choose a node, nearest first
    place = np.arange(len(ends)) - np.searchsorted(ends[order, 1], ends[order, 1])
    kept = np.sort(order[place < most])
    return ends[kept], rank[kept]


def _warn_of_ties(distinct: int, count: int, dropped: int) -> None:
    if count >= _MANY and distinct < count / _TIED:
        warnings.warn(
            f"{count:,} nodes have {distinct:,} distinct features, so that nearest neighbours are chosen at random "
            "among equals; give features that tell nodes apart, or candidates='observed'",
            stacklevel=5,
        )
    if dropped:
        warnings.warn(
            f"{dropped:,} neighbour pairs are left out: some nodes are the nearest of more than {_MOST_CHOSEN} times "
            "as many others as neighbours asks for",
            stacklevel=5,
        )


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
