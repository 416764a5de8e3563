"""Candidate edges of graphs: ragged lists of node pairs, never a square matrix.

A model of uncertain edges says something about *candidate pairs* only: those that were observed, nearest neighbours in
feature space, and random others that stand for all the rest. Their number grows with the number of nodes, not with its
square.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import xarray as xr
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from probmodels.datasets import DataError
from probmodels.datasets.pairs import Pairs, check_pairs, free_pairs, pairs_of_numbers

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

    def refreshed(self, seed: int) -> EdgeSet:
        """The same pairs with fresh random ones in place of the random ones."""
        old = self.origin == RANDOM
        count = int(old.sum())
        if not count:
            return self
        kept = torch.stack([self.source[~old], self.target[~old]], dim=1).cpu().numpy()
        drawn = free_pairs(kept, self.graph.cpu().numpy(), count, np.random.default_rng(seed))
        fresh = torch.from_numpy(drawn).to(self.source.device)
        source, target = self.source.clone(), self.target.clone()
        source[old], target[old] = fresh[:, 0], fresh[:, 1]
        return self._replace(source=source, target=target)


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


def make_edges(
    pairs: ArrayLike,
    graph: ArrayLike,
    *,
    features: ArrayLike | None = None,
    neighbours: int = 0,
    metric: str = "cosine",
    random: float = 0.0,
    all_pairs: bool = False,
    seed: int = 0,
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
    random
        Random pairs per observed or neighbour pair, or per node where there are none.
    all_pairs
        Take every pair within a graph instead, which suits graphs of up to some hundred nodes.
    seed
        Of the random pairs.

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
    if not isinstance(neighbours, int | np.integer) or neighbours < 0:
        raise DataError(f"neighbours={neighbours!r}; give a whole number, 0 for none")
    if not random >= 0:
        raise DataError(f"random={random!r}; give the number of random pairs per other pair, 0 for none")
    parts, origins = [observed], [OBSERVED]
    if all_pairs:
        parts.append(_all_pairs(nodes))
        origins.append(NEIGHBOUR)
    elif neighbours:
        if features is None:
            raise DataError(f"neighbours={neighbours} needs features to tell which nodes are near each other")
        parts.append(nearest_neighbours(features, nodes, int(neighbours), metric=metric))
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


def nearest_neighbours(
    features: ArrayLike, graph: NDArray[np.int64], neighbours: int, *, metric: str = "cosine"
) -> Pairs:
    """Pairs (pair, 2) of nodes of which at least one is among the nearest of the other, within their graph.

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
        except ValueError as error:
            raise DataError(f"metric={metric!r} is not known to scikit-learn's NearestNeighbors: {error}") from error
        near = model.kneighbors(return_distance=False)  # without the node itself
        found.append(start + np.stack([np.repeat(np.arange(size), neighbours), near.ravel()], axis=1))
    return np.unique(np.sort(np.concatenate(found), axis=1), axis=0).astype(np.int64)


def _all_pairs(graph: NDArray[np.int64]) -> Pairs:
    sizes = np.bincount(graph)
    total = int((sizes * (sizes - 1) // 2).sum())
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
