"""Simulated motifs: what tells the classes apart, and what does not."""

from __future__ import annotations

import numpy as np
import pytest

from probmodels.datasets.graph_motifs import MOTIFS, simulate_motifs
from probmodels.errors import DataError


def triangles(data, graph: int) -> int:
    nodes = np.flatnonzero(data["graph_index"].values == graph)
    matrix = np.zeros((len(nodes), len(nodes)), dtype=int)
    own = np.isin(data["source"].values, nodes)
    matrix[data["source"].values[own] - nodes[0], data["target"].values[own] - nodes[0]] = 1
    matrix += matrix.T
    return int(np.trace(matrix @ matrix @ matrix) // 6)


def test_graphs_are_trees_with_one_motif_of_their_class():
    data = simulate_motifs(40, seed=3)
    nodes = np.bincount(data["graph_index"].values)
    edges = np.bincount(data["graph_index"].values[data["source"].values])
    assert nodes.min() >= 10
    assert nodes.max() <= 20
    np.testing.assert_array_equal(edges, nodes - 5 - 1 + 6 + 1)  # tree, motif and the edge between
    names = data["class"].values[data["y"].values]
    wanted = {"bowtie": 2, "house": 1}
    assert [triangles(data, g) for g in range(40)] == [wanted[name] for name in names]
    assert sorted(set(data["split"].values)) == ["test", "train", "validation"]


def test_noise_and_seeds():
    clean, noisy = simulate_motifs(30, seed=1), simulate_motifs(30, seed=1, added=0.5)
    assert noisy.sizes["edge"] == round(1.5 * clean.sizes["edge"])
    np.testing.assert_array_equal(noisy["true_source"], clean["source"])
    assert simulate_motifs(30, seed=1).identical(clean)
    assert not simulate_motifs(30, seed=2)["source"].equals(clean["source"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"motifs": ["house"]}, "a list of at least 2, each item one of bowtie, cycle, house, star"),
        ({"motifs": ["house", "horse"]}, "each item one of bowtie, cycle, house, star"),
        ({"motifs": ["house", "house"]}, "name each motif once"),
        ({"sizes": [5, 3]}, "fewest nodes of a tree"),
        ({"num_graphs": 15}, "too few for 10 folds of 2 classes"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(DataError, match=message):
        simulate_motifs(**options)


def test_motifs_have_the_edges_that_are_said():
    assert {name: len(edges) for name, edges in MOTIFS.items()} == {"bowtie": 6, "cycle": 5, "house": 6, "star": 4}
