"""Simulated graphs that differ in one small motif among edges that say nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np
import xarray as xr
from annotated_types import Interval, Len

from probmodels.datasets.checks import check_size
from probmodels.datasets.graph_data import Folds, make_graph, split_graphs
from probmodels.datasets.graph_noise import Added, corrupt
from probmodels.errors import DataError
from probmodels.options import Natural, OneOf, Probability, Seed, checked

__all__ = ["MOTIFS", "simulate_motifs"]

MOTIFS = {  # on five nodes; those of six edges cannot be told apart by counting
    "bowtie": ((0, 1), (0, 2), (1, 2), (0, 3), (0, 4), (3, 4)),
    "cycle": ((0, 1), (1, 2), (2, 3), (3, 4), (0, 4)),
    "house": ((0, 1), (1, 2), (2, 3), (3, 4), (0, 4), (1, 4)),
    "star": ((0, 1), (0, 2), (0, 3), (0, 4)),
}
_MOTIF_NODES = 5
_Size = Annotated[int, Interval(ge=1, le=100_000)]


@checked(DataError)
def simulate_motifs(
    num_graphs: Annotated[int, Interval(ge=1, le=1_000_000)] = 200,
    *,
    motifs: Annotated[Sequence[Annotated[str, OneOf(MOTIFS)]], Len(2)] = ("house", "bowtie"),
    sizes: tuple[_Size, _Size] = (5, 15),
    deleted: Probability = 0.0,
    added: Added = 0.0,
    folds: Folds = 10,
    fold: Natural = 0,
    seed: Seed = 0,
) -> xr.Dataset:
    """Random trees, each with one motif tied to it by an edge; the class of a graph is its motif.

    Features are degrees of the observed edges. Attribute ``noise`` says what was deleted and added.

    Parameters
    ----------
    num_graphs
        Number of graphs; classes take turns.
    motifs
        Two or more of "house", "bowtie" (both of six edges), "cycle" (five) and "star" (four).
    sizes
        Fewest and most nodes of a tree, drawn uniformly. A new node of a tree is tied to one of those before it.
    deleted, added
        Noise, as in `corrupt`.
    folds, fold
        As in `split_graphs`.
    seed
        Seed of all draws.

    Returns
    -------
    xr.Dataset
        As `probmodels.datasets.graphs` describes it.

    Raises
    ------
    DataError
        If there are fewer than two motifs, one is unknown or named twice, or a number is out of range.

    References
    ----------
    Luo, D. et al. (2020). Parameterized explainer for graph neural network. NeurIPS. (Motifs on random graphs.)
    """
    if len(set(motifs)) < len(motifs):
        raise DataError(f"motifs={list(motifs)}; name each motif once")
    if sizes[0] > sizes[1]:
        raise DataError(f"sizes={list(sizes)}; give the fewest nodes of a tree first, then the most")
    check_size(num_graphs=num_graphs, nodes=sizes[1] + _MOTIF_NODES)
    if num_graphs < folds * len(motifs):
        raise DataError(f"num_graphs={num_graphs} are too few for {folds} folds of {len(motifs)} classes; take more")
    rng = np.random.default_rng(seed)
    edges, graph, start = [], [], 0
    for number in range(num_graphs):
        size = int(rng.integers(sizes[0], sizes[1] + 1))
        base = start + size  # the motif comes after the tree
        edges += [(start + int(rng.integers(node)), start + node) for node in range(1, size)]
        edges += [(base + one, base + other) for one, other in MOTIFS[motifs[number % len(motifs)]]]
        edges.append((start + int(rng.integers(size)), base + int(rng.integers(_MOTIF_NODES))))
        graph += [number] * (size + _MOTIF_NODES)
        start = base + _MOTIF_NODES
    data = make_graph(
        None,
        [motifs[number % len(motifs)] for number in range(num_graphs)],
        edges,
        graph=graph,
        name="motifs",
        source="simulated: motifs on random trees",
        seed=seed,
    )
    data = split_graphs(data, folds=folds, fold=fold, seed=seed)
    return corrupt(data, deleted=deleted, added=added, seed=seed) if deleted or added else data
