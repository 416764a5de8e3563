"""Candidate edges of graphs: ragged lists of node pairs, never a square matrix.

A model of uncertain edges says something about *candidate pairs* only: those that were observed, nearest neighbours in
feature space, and random others that stand for all the rest. Their number grows with the number of nodes, not with its
square.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from probmodels.datasets import DataError

__all__ = ["NEIGHBOUR", "OBSERVED", "RANDOM", "EdgeSet", "check_pairs", "make_edges", "nearest_neighbours"]

OBSERVED, NEIGHBOUR, RANDOM = 0, 1, 2
_ALL_PAIRS_LIMIT = 50_000_000  # above which a list of all pairs would take gigabytes in every step
_TRIES = 50

Pairs = NDArray[np.int64]


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
        kept = np.stack([self.source[~old].numpy(), self.target[~old].numpy()], axis=1)
        fresh = torch.from_numpy(_random_pairs(self.graph.numpy(), kept, count, np.random.default_rng(seed)))
        source, target = self.source.clone(), self.target.clone()
        source[old], target[old] = fresh[:, 0], fresh[:, 1]
        return self._replace(source=source, target=target)


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
    observed = check_pairs(pairs, nodes)
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
        fresh = _random_pairs(nodes, known, count, np.random.default_rng(seed))
        known, origin = np.concatenate([known, fresh]), np.concatenate([origin, np.full(len(fresh), RANDOM)])
    return EdgeSet(
        torch.from_numpy(known[:, 0].copy()),
        torch.from_numpy(known[:, 1].copy()),
        torch.from_numpy(origin.astype(np.int8)),
        torch.from_numpy(nodes.copy()),
        int(nodes[-1]) + 1,
    )


def check_pairs(pairs: ArrayLike, graph: ArrayLike) -> Pairs:
    """Edges (edge, 2) with the smaller node first, each once.

    Parameters
    ----------
    pairs
        Edges (edge, 2).
    graph
        Graph of every node (node,).

    Raises
    ------
    DataError
        If nodes are unknown, an edge joins a node to itself or two graphs, or an edge stands twice.
    """
    nodes, found = np.asarray(graph), np.asarray(pairs)
    if found.size == 0:
        return np.zeros((0, 2), dtype=np.int64)
    if found.ndim != 2 or found.shape[1] != 2 or found.dtype.kind not in "iu":
        raise DataError(f"edges of shape {found.shape} and type {found.dtype}; give whole numbers of shape (edge, 2)")
    found = found.astype(np.int64)
    unknown = np.unique(found[(found < 0) | (found >= len(nodes))])
    if len(unknown):
        raise DataError(f"edges name nodes {_some(unknown)}, but nodes are numbered from 0 to {len(nodes) - 1}")
    loops = np.unique(found[found[:, 0] == found[:, 1], 0])
    if len(loops):
        raise DataError(f"edges join nodes {_some(loops)} to themselves; drop them, models add self-loops of their own")
    across = found[nodes[found[:, 0]] != nodes[found[:, 1]]]
    if len(across):
        raise DataError(f"edges such as {across[0].tolist()} join nodes of different graphs; drop them")
    found = np.sort(found, axis=1)
    key = found[:, 0] * len(nodes) + found[:, 1]
    order = np.argsort(key, kind="stable")
    twice = found[order[1:]][np.diff(key[order]) == 0]
    if len(twice):
        raise DataError(
            f"edges such as {twice[0].tolist()} stand more than once ({len(twice)} of {len(found)}); edges are "
            "undirected here: list each of them once, in one direction"
        )
    return found[order]


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
    starts = np.flatnonzero(np.diff(graph, prepend=-1))
    sizes = np.diff(starts, append=len(graph)).astype(np.int64)
    total = int((sizes * (sizes - 1) // 2).sum())
    if total > _ALL_PAIRS_LIMIT:
        raise DataError(
            f"all pairs of these graphs are {total:,}, more than {_ALL_PAIRS_LIMIT:,}; "
            "leave out all_pairs, and take neighbours=... and random=... as candidates"
        )
    parts = [start + np.stack(np.triu_indices(size, 1), axis=1) for start, size in zip(starts, sizes, strict=True)]
    return np.concatenate(parts).astype(np.int64)


def _joined(parts: list[Pairs], num_nodes: int) -> Pairs:
    """Pairs with the number of the first part that holds them (pair, 3), ordered by part and pair."""
    place = np.concatenate([np.full(len(part), index) for index, part in enumerate(parts)])
    pairs = np.concatenate(parts)
    _, first = np.unique(pairs[:, 0] * num_nodes + pairs[:, 1], return_index=True)  # the first of equal ones
    kept = np.column_stack([pairs, place])[first]
    return kept[np.argsort(kept[:, 2], kind="stable")].astype(np.int64)


def _random_pairs(graph: NDArray[np.int64], known: Pairs, count: int, rng: np.random.Generator) -> Pairs:
    """Pairs (count, 2) within graphs that are not known, uniform over all of them."""
    starts = np.flatnonzero(np.diff(graph, prepend=-1))
    sizes = np.diff(starts, append=len(graph)).astype(np.int64)
    free = int((sizes * (sizes - 1) // 2).sum()) - len(known)
    if count > free:
        raise DataError(f"{count} random pairs were asked for, but only {free} pairs are left; choose a smaller random")
    num_nodes, weight = len(graph), sizes * (sizes - 1.0)
    keys = np.unique(known[:, 0] * num_nodes + known[:, 1])
    chosen = np.zeros(0, dtype=np.int64)
    for _ in range(_TRIES):
        draw = 2 * (count - len(chosen)) + 16
        place = rng.choice(len(starts), draw, p=weight / weight.sum())
        one = rng.integers(sizes[place])
        other = (one + rng.integers(1, sizes[place])) % sizes[place]
        low, high = starts[place] + np.minimum(one, other), starts[place] + np.maximum(one, other)
        fresh = low * num_nodes + high
        fresh = fresh[~np.isin(fresh, keys)]
        _, first = np.unique(np.concatenate([chosen, fresh]), return_index=True)
        chosen = np.concatenate([chosen, fresh])[np.sort(first)][:count]
        if len(chosen) == count:
            break
    else:  # nearly all pairs are taken: list those that are left
        every = _all_pairs(graph)
        left = np.setdiff1d(every[:, 0] * num_nodes + every[:, 1], keys)
        chosen = rng.choice(left, count, replace=False)
    chosen = np.sort(chosen)
    return np.stack([chosen // num_nodes, chosen % num_nodes], axis=1)


def _some(values: NDArray[np.int64]) -> str:
    shown = ", ".join(map(str, values[:5]))
    return shown + (f" and {len(values) - 5} more" if len(values) > 5 else "")
