"""Pairs of nodes as rows of two positions: checked, numbered in order, and drawn from those that are free."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from probmodels.datasets.checks import as_array
from probmodels.datasets.labelled import arranged
from probmodels.errors import DataError

__all__ = ["Pairs", "check_pairs", "count_pairs", "free_pairs", "pairs_of_numbers", "some"]

Pairs = NDArray[np.int64]


def check_pairs(
    edges: ArrayLike | None,
    node: NDArray[Any],
    index: NDArray[np.int64] | None = None,
    *,
    mend: bool = False,
    mends: list[str] | None = None,
    what: str = "edge",
) -> Pairs:
    """Edges (edge, 2) in ascending order, smaller position first, each once.

    Parameters
    ----------
    edges
        Positions of nodes (edge, 2), in either direction; None for no edge.
    node
        Labels of the nodes (node,), for messages.
    index
        Graph of every node (node,), or None for one graph.
    mend
        Whether to drop self-loops and keep repeated edges once, in place of an error.
    mends
        List to which sentences on repairs are added.
    what
        Name of an edge, for messages.

    Raises
    ------
    DataError
        If nodes are unknown, an edge joins a node to itself or two graphs, or an edge stands twice.
    """
    mends = [] if mends is None else mends
    found = (
        np.zeros((0, 2), dtype=np.int64)
        if edges is None
        else as_array(arranged(edges, f"{what}s", {what.replace(" ", "_"): None, "end": None}), f"{what}s")
    )
    if found.size == 0:
        return np.zeros((0, 2), dtype=np.int64)
    if found.ndim != 2 or found.shape[1] != 2 or found.dtype.kind not in "iu":
        raise DataError(f"{what}s have shape {found.shape} and type {found.dtype}; give positions of nodes (edge, 2)")
    found = np.sort(found.astype(np.int64), axis=1)
    unknown = np.unique(found[(found < 0) | (found >= len(node))])
    if len(unknown):
        raise DataError(
            f"{what}s name nodes {some(unknown)}, but there are nodes 0 to {len(node) - 1}; drop these {what}s, or add "
            "the nodes with their features and labels"
        )
    loops = found[:, 0] == found[:, 1]
    if loops.any():
        told = f"{loops.sum()} {what}s join a node to itself, such as {some(node[np.unique(found[loops, 0])])}"
        if not mend:
            raise DataError(f"{told}; drop them (models add self-loops of their own), or pass mend=True")
        mends.append(f"{told}; dropped.")
        found = found[~loops]
    if index is not None and (across := index[found[:, 0]] != index[found[:, 1]]).any():
        pair = node[found[across][0]].tolist()
        raise DataError(f"{across.sum()} {what}s join nodes of different graphs, such as {pair}; drop them")
    once, count = np.unique(found, axis=0, return_counts=True)
    if (again := count > 1).any():
        told = f"{again.sum()} {what}s stand more than once, such as {node[once[again][0]].tolist()}"
        if not mend:
            raise DataError(f"{told}; edges are undirected: list each once, in one direction, or pass mend=True")
        mends.append(f"{told}; taken once.")
    return once


def count_pairs(graph: NDArray[np.int64]) -> int:
    """Number of all pairs within graphs, from the graph of every node (node,)."""
    return sum(size * (size - 1) // 2 for size in np.bincount(graph).tolist())


def free_pairs(taken: Pairs, graph: NDArray[np.int64], count: int, rng: np.random.Generator) -> Pairs:
    """Pairs within graphs that are not taken, uniform over all such pairs, without listing them.

    Pairs are numbered in order. The r-th free number is r plus how many taken numbers lie below it, and the j-th taken
    one, which has j taken ones below it, is passed once r reaches it less j.

    Parameters
    ----------
    taken
        Pairs (pair, 2) within graphs, each once, in either direction.
    graph
        Graph of every node (node,), ascending.
    count
        Number of pairs to draw.
    rng
        Generator that draws them.

    Returns
    -------
    Pairs
        Array (count, 2), in ascending order.

    Raises
    ------
    DataError
        If fewer are free.
    """
    starts = _first_numbers(graph)
    low, high = taken.min(axis=1), taken.max(axis=1)
    number = np.sort(starts[low] + high - low - 1)
    free = int(starts[-1]) - len(number)
    if count > free:
        raise DataError(f"{count} new pairs were asked for, but only {free} pairs are free; ask for fewer")
    drawn = np.sort(rng.choice(free, count, replace=False))
    drawn = drawn + np.searchsorted(number - np.arange(len(number)), drawn, side="right")
    return pairs_of_numbers(drawn, graph)


def pairs_of_numbers(number: NDArray[np.int64], graph: NDArray[np.int64]) -> Pairs:
    """The pairs i < j (k, 2) that have these numbers when all pairs within graphs are listed in order.

    Parameters
    ----------
    number
        Numbers from 0 (k,).
    graph
        Graph of every node (node,), ascending.
    """
    starts = _first_numbers(graph)
    low = np.searchsorted(starts, number, side="right") - 1  # the last of equal ones, since others have no pairs
    return np.stack([low, number - starts[low] + low + 1], axis=1)


def some(values: Any, most: int = 5) -> str:
    """The first of some labels in words."""
    values = list(values)
    shown = ", ".join(str(value) for value in values[:most])
    return shown + (f" and {len(values) - most} more" if len(values) > most else "")


def _first_numbers(graph: NDArray[np.int64]) -> NDArray[np.int64]:
    """Number of the first pair whose smaller node is each node (node,), and the number of all pairs."""
    ends = np.searchsorted(graph, graph, side="right")  # of the graph of every node
    return np.concatenate([[0], np.cumsum(ends - np.arange(len(graph)) - 1)])
