"""Candidate pairs of an observed graph with what is known of them, for models of independent pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from probmodels.datasets.graph_data import standardised
from probmodels.datasets.pairs import count_pairs
from probmodels.errors import DataError
from probmodels.guides.edges import RANDOM, EdgeSet, make_edges
from probmodels.inference.runtime.memory import check_memory

__all__ = ["SIMILARITIES", "PairData", "check_room", "make_pairs", "takes_all_pairs"]

SIMILARITIES = ("cosine", "inner", "distance")

_ALL_PAIRS = 50_000  # pairs up to which all of them are candidates by default
_BY_PAIR = 32  # numbers by pair that every evaluation has
_CHUNK = 20_000  # pairs whose features are compared at once

Ints = NDArray[np.int64]


class PairData(NamedTuple):
    """Candidate pairs and what is known of them.

    Attributes
    ----------
    edges
        Candidate pairs.
    seen
        How often each pair was seen as an edge (pair,), of ``trials`` times.
    trials
        How often every pair was looked at.
    weight
        How many pairs each candidate stands for (pair,).
    similarity
        Standardised similarities of the two nodes (pair, similarity), which may be none.
    x
        Standardised features (node, feature), which may be none.
    num_classes
        Classes of nodes; 1 without any.
    known, y
        Nodes (known,) whose classes enter inference, and these classes (known,).
    unknown
        Nodes (unlabelled,) whose classes a block model infers.
    blocks
        Number of each pair of classes (class, class), symmetric; one entry without a block model.
    block_pair
        That number for each pair (pair,), where both classes are known.
    same
        Whether the two nodes are of one class (pair,), as 0 and 1; None where a class is unknown even to the data.
    rest, rest_same
        Number of pairs that are no candidates and that no candidate stands for, all of them never seen, and of those of
        one class among them (block_pair,); None where there are none.
    """

    edges: EdgeSet
    seen: Tensor
    trials: int
    weight: Tensor
    similarity: Tensor
    x: Tensor
    num_classes: int
    known: Tensor
    y: Tensor
    unknown: Tensor
    blocks: Tensor
    block_pair: Tensor
    same: Tensor | None
    rest: Tensor | None
    rest_same: Tensor | None

    @property
    def num_block_pairs(self) -> int:
        """Pairs of classes that have a rate of their own."""
        return len(self.blocks) * (len(self.blocks) + 1) // 2


def takes_all_pairs(data: xr.Dataset, wanted: bool | None) -> bool:
    """Whether all pairs are candidates: as wanted, or for None where there are few.

    Raises
    ------
    DataError
        If the data hold no graph, or none with a pair of nodes.
    """
    total = count_pairs(_graph_of_node(data))
    if not total:
        raise DataError("graphs of one node each have no pairs; give graphs of two nodes or more")
    return total <= _ALL_PAIRS if wanted is None else wanted


def make_pairs(
    data: xr.Dataset,
    *,
    blocks: bool,
    classes: bool,
    similarity: Sequence[str],
    uneven: bool,
    trials: int,
    all_pairs: bool,
    neighbours: int,
    metric: str,
    random: float,
    seed: int,
) -> PairData:
    """Candidate pairs of a dataset, each with the number of pairs that it stands for.

    Pairs that were observed, nearest neighbours and all others chosen for certain stand for themselves. Of the M pairs
    that are left, none of which was seen, m are drawn at random without replacement; each has the inclusion probability
    m / M and the weight M / m, so that a weighted sum over candidates is unbiased for the sum over all pairs (Horvitz
    and Thompson 1952). Where pairs of equal classes are alike, those that are left are counted instead.

    Parameters
    ----------
    data
        As `probmodels.noisy_edges.make_problem` takes them.
    blocks
        Whether pairs differ by the classes of their nodes.
    classes
        Whether classes are needed at all.
    similarity
        Some of `SIMILARITIES`.
    uneven
        Whether pairs differ by more than classes and similarities.
    trials, all_pairs, neighbours, metric, random, seed
        As there.

    Raises
    ------
    DataError
        If a variable is missing or holds what cannot be used, or pairs would be left out that nothing stands for.
    ProblemError
        If all pairs are asked for and would not fit into memory.
    """
    graph = _graph_of_node(data)
    num_nodes, total = len(graph), count_pairs(graph)
    x = _features(data)
    own, known, num_classes = _classes(data, classes)
    unknown = np.setdiff1d(np.arange(num_nodes), known) if blocks else known[:0]
    if x is None and (similarity or len(unknown) or (classes and not blocks)):
        raise DataError("data have no x (node, feature), which this model needs; add features, or known classes alone")
    if all_pairs:  # before they are listed
        check_room(total)
    edges = make_edges(
        np.stack([data["source"].values, data["target"].values], axis=1),
        graph,
        features=x,
        neighbours=0 if x is None or all_pairs else neighbours,
        metric=metric,
        random=random,
        all_pairs=all_pairs,
        seed=seed,
    )
    source, target = edges.source.numpy(), edges.target.numpy()
    drawn, left = edges.origin == RANDOM, total - edges.num_pairs
    alike = not (similarity or uneven or len(unknown))
    weight = torch.ones(edges.num_pairs)
    if left and not alike:
        weight[drawn] = _weight_of_drawn(int(drawn.sum()), left)
    table = _numbered(num_classes if blocks else 1)
    member = np.where(np.isin(np.arange(num_nodes), unknown), 0, own) if blocks else np.zeros_like(own)
    block_pair, same = table[member[source], member[target]], own[source] == own[target]
    rest = rest_same = None
    if left and alike:
        others = _census(graph, member, own, table)
        others[:, 0] -= np.bincount(block_pair, minlength=len(others))
        others[:, 1] -= np.bincount(block_pair[same], minlength=len(others))
        rest, rest_same = torch.from_numpy(others).to(weight).unbind(1)
    return PairData(
        edges=edges,
        seen=_counts(data, edges, trials).to(weight),
        trials=trials,
        weight=weight,
        similarity=_similarities(x, edges, similarity, weight),
        x=_standardised(x).to(weight) if x is not None else weight.new_zeros(num_nodes, 0),
        num_classes=num_classes,
        known=torch.from_numpy(known),
        y=torch.from_numpy(own[known]),
        unknown=torch.from_numpy(unknown),
        blocks=torch.from_numpy(table),
        block_pair=torch.from_numpy(block_pair),
        same=torch.from_numpy(same).to(weight) if (own >= 0).all() else None,
        rest=rest,
        rest_same=rest_same,
    )


def _weight_of_drawn(chosen: int, left: int) -> float:
    """How many pairs each of those drawn at random stands for, where ``left`` others are no candidates."""
    if not chosen:
        raise DataError(f"{left:,} pairs are left out and nothing stands for them; choose random > 0, or all_pairs")
    return (left + chosen) / chosen


def check_room(num_pairs: int, more: int = 0) -> None:
    """Check that an evaluation with its gradient fits into memory, of ``more`` numbers by pair than it always has.

    Raises
    ------
    ProblemError
        If it needs more than is free.
    """
    check_memory(
        "noisy_edges",
        (_BY_PAIR + more) * num_pairs * torch.finfo(torch.get_default_dtype()).bits // 8,
        torch.device("cpu"),
        f"{num_pairs:,} candidate pairs",
        "take all_pairs=False, fewer neighbours, or a smaller share of random pairs",
    )


def _graph_of_node(data: xr.Dataset) -> Ints:
    """Graph (node,) that every node belongs to."""
    num_nodes = data.sizes.get("node", 0)
    lost = [name for name in ("source", "target") if name not in data]
    if lost or not num_nodes:
        raise DataError(f"data lack {lost or 'nodes'}; give source and target (edge) and x or y (node, ...)")
    found: Ints = data["graph_index"].values if "graph_index" in data else np.zeros(num_nodes, dtype=np.int64)
    return found


def _features(data: xr.Dataset) -> NDArray[np.float64] | None:
    if "x" not in data:
        return None
    if set(data["x"].dims) != {"node", "feature"} or data["x"].dtype.kind not in "iufb":
        raise DataError(f"x has dims {data['x'].dims} and type {data['x'].dtype}; give numbers (node, feature)")
    x = data["x"].transpose("node", "feature").values.astype(np.float64)
    if not np.isfinite(x).all():
        raise DataError("x holds entries that are not finite; fill or drop them")
    return x if x.shape[1] else None


def _classes(data: xr.Dataset, needed: bool) -> tuple[Ints, Ints, int]:
    """Class of every node or -1, nodes whose class enters inference, and the number of classes."""
    if "y" not in data or data["y"].dims != ("node",):
        if needed:
            raise DataError("data have no y (node), the classes of nodes; add them, or leave blocks and labels out")
        return np.full(data.sizes["node"], -1), np.zeros(0, dtype=np.int64), 1
    y = data["y"].values
    if y.dtype.kind not in "iu" or (y < -1).any():
        raise DataError(f"y of type {y.dtype} must hold whole numbers from 0, and -1 where a class is not known")
    y = y.astype(np.int64)
    if not needed:
        return y, np.zeros(0, dtype=np.int64), 1
    trained = data["split"].values == "train" if "split" in data else y >= 0
    if (y[trained] < 0).any():
        raise DataError(f"{int((y[trained] < 0).sum())} training nodes have no class; take them out of the split")
    num_classes = max(data.sizes.get("class", 0), int(y.max()) + 1)
    absent = np.setdiff1d(np.arange(num_classes), y[trained])
    if len(absent) or not num_classes:
        raise DataError(f"no training node is of class {absent.tolist()}; change the split, or merge classes")
    return y, np.flatnonzero(trained), num_classes


def _counts(data: xr.Dataset, edges: EdgeSet, trials: int) -> Tensor:
    """How often each candidate pair was seen."""
    count = edges.observed.double()
    if trials == 1 and "count" not in data:
        return count
    if "count" not in data:
        raise DataError(f"trials={trials}, but data do not say how often each edge was seen; add count (edge)")
    seen = data["count"].values
    if seen.dtype.kind not in "iu" or (seen < 1).any() or (seen > trials).any():
        raise DataError(f"count of an edge must be a whole number from 1 to trials={trials}; drop edges never seen")
    pairs = np.sort(np.stack([data["source"].values, data["target"].values], axis=1), axis=1)
    order = np.lexsort((pairs[:, 1], pairs[:, 0]))  # the order in which observed pairs stand first
    count[: len(seen)] = torch.from_numpy(seen[order].astype(np.float64))
    return count


def _numbered(size: int) -> Ints:
    """Symmetric table (size, size) that numbers unordered pairs: 00, 01, 11, 02, ..."""
    low, high = np.minimum.outer(range(size), range(size)), np.maximum.outer(range(size), range(size))
    return high * (high + 1) // 2 + low


def _census(graph: Ints, member: Ints, own: Ints, table: Ints) -> Ints:
    """Number of all pairs within graphs, and of those of one class (block_pair, 2)."""
    kinds, label = np.unique(np.stack([member, own], axis=1), axis=0, return_inverse=True)
    size = np.zeros((int(graph[-1]) + 1, len(kinds)), dtype=np.int64)
    np.add.at(size, (graph, label.ravel()), 1)
    found = np.zeros((int(table.max()) + 1, 2), dtype=np.int64)
    for i, (block, kind) in enumerate(kinds):
        for j, (other, also) in enumerate(kinds[: i + 1]):
            number = (size[:, i] * (size[:, i] - 1) // 2 if i == j else size[:, i] * size[:, j]).sum()
            found[table[block, other]] += number * np.array([1, kind == also])
    return found


def _standardised(x: NDArray[np.float64]) -> Tensor:
    return torch.from_numpy(standardised(x)).double()


def _similarities(x: NDArray[np.float64] | None, edges: EdgeSet, kinds: Sequence[str], weight: Tensor) -> Tensor:
    """Similarities (pair, similarity), standardised over all pairs as far as candidates tell."""
    if x is None or not kinds:
        return weight.new_zeros(edges.num_pairs, 0)
    values = {"cosine": normalize(torch.from_numpy(x)), "inner": _standardised(x), "distance": _standardised(x)}
    found = []
    for start in range(0, edges.num_pairs, _CHUNK):
        source, target = edges.source[start : start + _CHUNK], edges.target[start : start + _CHUNK]
        both = [(values[kind][source], values[kind][target]) for kind in kinds]
        columns = [
            -(one - other).norm(dim=-1) if kind == "distance" else (one * other).sum(-1)
            for kind, (one, other) in zip(kinds, both, strict=True)
        ]
        found.append(torch.stack(columns, -1))
    raw, share = torch.cat(found), (weight / weight.sum()).double().unsqueeze(-1)
    centred = raw - (share * raw).sum(0)
    spread = (share * centred.square()).sum(0).sqrt()
    return (centred / torch.where(spread > 1e-8, spread, 1.0)).to(weight)
