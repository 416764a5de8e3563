"""Labelled graph data: real sets against their published sizes, noise, simulations, own tables, splits, bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from small_data import write_planetoid, write_tu

from probmodels.datasets import LOADERS, load
from probmodels.datasets.graph_data import apportion, degree_features, import_pyg
from probmodels.datasets.graphs import (
    check_graph,
    corrupt,
    from_pyg,
    load_explainer,
    load_graph,
    load_planetoid,
    load_tabular_graph,
    load_tu,
    make_graph,
    simulate_csbm,
    split_graphs,
    split_nodes,
    without_edges,
)
from probmodels.datasets.pairs import check_pairs, free_pairs, pairs_of_numbers
from probmodels.errors import DataError

X = np.arange(10.0).reshape(5, 2)
Y = ["a", "b", "a", "b", "a"]
RING = np.array([[0, 1], [1, 2], [2, 3], [3, 4], [0, 4]])


def pairs(data: xr.Dataset, prefix: str = "") -> set[tuple[int, int]]:
    return set(zip(data[f"{prefix}source"].values.tolist(), data[f"{prefix}target"].values.tolist(), strict=True))


def counts(data: xr.Dataset) -> dict[str, int]:
    names, sizes = np.unique(data["split"].values, return_counts=True)
    return dict(zip(names.tolist(), sizes.tolist(), strict=True))


def collection(num_graphs: int = 30, size: int = 6, seed: int = 0) -> xr.Dataset:
    """Rings of equal size, two classes by turns, features at random."""
    ring = np.stack([np.arange(size), (np.arange(size) + 1) % size], axis=1)
    edges = np.concatenate([ring + size * place for place in range(num_graphs)])
    x = np.random.default_rng(seed).standard_normal((num_graphs * size, 3))
    return make_graph(x, np.arange(num_graphs) % 2, edges, graph=np.repeat(np.arange(num_graphs), size))


# ------------------------------------------------------------------------------------------------------ real sets


@pytest.mark.parametrize(
    ("name", "nodes", "features", "sizes", "size"),
    [
        ("wine", 178, 13, [59, 71, 48], 10),
        ("cancer", 569, 30, [212, 357], 10),
        ("digits", 1797, 64, [178, 182, 177, 183, 181, 182, 181, 179, 174, 180], 50),
    ],
)
def test_tables_are_graphs_without_edges(name: str, nodes: int, features: int, sizes: list[int], size: int) -> None:
    data = check_graph(load(name, seed=3))
    assert dict(data["x"].sizes) == {"node": nodes, "feature": features}
    assert data.sizes["edge"] == 0
    assert data["x"].dtype == np.float32
    by_class = dict(zip(data["class"].values.tolist(), np.bincount(data["y"]).tolist(), strict=True))
    assert sorted(by_class.values()) == sorted(sizes)
    assert counts(data) == {"train": size, "validation": size, "stop": size, "test": nodes - 3 * size}
    xr.testing.assert_identical(data, load_tabular_graph(name, seed=3))
    assert (data["split"].values != load(name, seed=4)["split"].values).any()


def test_tables_are_scaled_where_that_is_usual() -> None:
    wine = load("wine")["x"]
    np.testing.assert_allclose(wine.mean("node"), 0, atol=1e-6)
    np.testing.assert_allclose(wine.std("node"), 1, atol=1e-6)
    assert load("wine", standardise=False)["x"].max() > 1000
    assert load("digits")["x"].max() == 16
    blank = load("digits", standardise=True)["x"].std("node")
    assert set(np.round(blank.values, 3).tolist()) == {0.0, 1.0}  # pixels that are always 0 stay 0


@pytest.mark.parametrize(
    ("name", "nodes", "edges", "features", "sizes"),
    [
        ("Cora", 2708, 5278, 1433, [351, 217, 418, 818, 426, 298, 180]),
        ("Citeseer", 3327, 4552, 3703, None),
    ],
)
def test_citation_networks_have_their_published_sizes(
    test_data: Callable[[str], Path], name: str, nodes: int, edges: int, features: int, sizes: list[int] | None
) -> None:
    root = test_data("graphs/planetoid")
    before = sorted(root.rglob("*"))
    data = check_graph(load("planetoid", dataset=name.lower(), root=root))
    assert dict(data.sizes) | {"class": 0} == {"node": nodes, "feature": features, "edge": edges, "class": 0}
    assert "true_source" not in data
    if sizes:
        assert np.bincount(data["y"]).tolist() == sizes
    train = 20 * data.sizes["class"]
    assert counts(data) == {"train": train, "validation": 250, "stop": 250, "test": 1000, "": nodes - train - 1500}
    rows = data["x"].sum("feature").values
    np.testing.assert_allclose(rows[rows > 0], 1, atol=1e-5)
    assert sorted(root.rglob("*")) == before  # nothing is written beside the user's files


def test_edges_of_cora_are_retained_by_exact_numbers(test_data: Callable[[str], Path]) -> None:
    root = test_data("graphs/planetoid")
    whole, half, none = (
        load_planetoid("Cora", root=root, normalise=False, **options)
        for options in ({}, {"retained": 0.5, "seed": 7}, {"graph": False})
    )
    assert set(np.unique(whole["x"].values).tolist()) == {0.0, 1.0}
    assert (half.sizes["edge"], none.sizes["edge"]) == (2639, 0)
    assert pairs(half) < pairs(whole)
    assert pairs(half, "true_") == pairs(none, "true_") == pairs(whole)
    held = np.isin(whole["split"].values, ["validation", "stop"])
    assert (np.isin(half["split"].values, ["validation", "stop"]) == held).all()
    assert (half["split"].values != whole["split"].values).any()  # the halves follow the seed


@pytest.mark.parametrize(
    ("name", "graphs", "nodes", "edges", "features", "sizes"),
    [
        ("IMDB-BINARY", 1000, 19773, 96531, 136, [500, 500]),
        ("IMDB-MULTI", 1500, 19502, 98903, 89, [500, 500, 500]),
        ("MUTAG", 188, 3371, 3721, 7, [63, 125]),
    ],
)
def test_collections_have_their_published_sizes(
    test_data: Callable[[str], Path],
    name: str,
    graphs: int,
    nodes: int,
    edges: int,
    features: int,
    sizes: list[int],
) -> None:
    root = test_data("graphs/tu")
    before = sorted(root.rglob("*"))
    data = check_graph(load("tu", dataset=name, root=root))
    assert {dim: data.sizes[dim] for dim in ("graph", "node", "edge", "feature")} == {
        "graph": graphs,
        "node": nodes,
        "edge": edges,
        "feature": features,
    }
    assert np.bincount(data["y"]).tolist() == sizes
    assert (data["x"].sum("feature") == 1).all()  # degrees or atoms, one of each
    assert sorted(root.rglob("*")) == before


def test_the_largest_collection_is_read_from_its_archive(test_data: Callable[[str], Path]) -> None:
    path = test_data("graphs/tu/REDDIT-BINARY.zip")
    data = load_tu("REDDIT-BINARY", root=path.parent)
    assert (data.sizes["graph"], data.sizes["node"], data.sizes["edge"]) == (2000, 859254, 995508)
    assert data["feature"].values.tolist() == ["degree"]  # one has 3062 neighbours: too many for a column each
    assert abs(float(data["x"].mean())) < 1e-4
    assert int(np.bincount(data["graph_index"]).max()) == 3782
    assert not (path.parent / "REDDIT-BINARY").exists()


def test_degrees_are_those_of_the_noisy_graph(test_data: Callable[[str], Path]) -> None:
    data = load_tu("MUTAG", root=test_data("graphs/tu"), features="degree", deleted=0.5, added=0.25, seed=1)
    assert data.sizes["edge"] == 3721 - round(3721 / 2) + round(3721 / 4)
    degree = np.bincount(np.concatenate([data["source"], data["target"]]), minlength=data.sizes["node"])
    assert (data["x"].values.argmax(axis=1) == degree).all()


# ---------------------------------------------------------------------------------------- files of one's own making


@pytest.mark.parametrize("archive", [False, True])
def test_a_collection_is_read_from_folder_or_archive(tmp_path: Path, archive: bool) -> None:
    data = load_tu("TINY", root=write_tu(tmp_path, archive=archive), folds=4)
    assert (data.sizes["graph"], data.sizes["node"], data.sizes["edge"]) == (24, 72, 60)
    assert data["x"].values[:6].argmax(axis=1).tolist() == [1, 2, 1, 2, 2, 2]
    assert data["y"].values[:4].tolist() == [0, 1, 0, 1]
    assert counts(data) == {"train": 12, "validation": 6, "test": 6}


def test_downloads_need_leave_and_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyg = import_pyg("datasets")
    asked: list[str] = []

    def fetch(self: Any) -> None:
        asked.append(self.name)
        for path in Path(self.raw_dir).iterdir():
            path.unlink()
        Path(self.raw_dir).rmdir()
        write_planetoid(Path(self.raw_dir))

    monkeypatch.setattr(pyg.Planetoid, "download", fetch)
    with pytest.raises(DataError, match=r"Cora is not at .*raw: put ind.cora.x, .*download=True"):
        load_planetoid("Cora", root=tmp_path)
    assert not asked
    first = load_planetoid("Cora", root=tmp_path, download=True)
    second = load_planetoid("Cora", root=tmp_path)
    assert asked == ["Cora"]
    assert {path.name for path in (tmp_path / "Cora").iterdir()} == {"raw"}
    xr.testing.assert_identical(first, second)
    assert (first.sizes["edge"], counts(first)["stop"]) == (520, 250)


def test_failed_downloads_and_broken_files_are_data_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyg = import_pyg("datasets")

    def fail(self: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(pyg.TUDataset, "download", fail)
    with pytest.raises(DataError, match=r"could not download TINY: OSError: no route to host"):
        load_tu("TINY", root=tmp_path, download=True)
    write_tu(tmp_path)
    (tmp_path / "TINY" / "raw" / "TINY_A.txt").write_text("1, x\n")
    with pytest.raises(DataError, match="could not read the files of TINY"):
        load_tu("TINY", root=tmp_path)
    (tmp_path / "OTHER.zip").write_bytes(b"no archive")
    with pytest.raises(DataError, match="no zip archive; download it again"):
        load_tu("OTHER", root=tmp_path)
    write_tu(tmp_path, archive=True)
    (tmp_path / "TINY.zip").rename(tmp_path / "MUTAG.zip")
    with pytest.raises(DataError, match=r"lacks MUTAG_A.txt"):
        load_tu("MUTAG", root=tmp_path)


def test_the_default_folder_is_that_of_downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROBMODELS_CACHE", str(tmp_path))
    write_tu(tmp_path / "tu")
    assert load_tu("TINY", folds=3).sizes["graph"] == 24


# ---------------------------------------------------------------------------------------------------------- noise


def test_pairs_are_numbered_in_order() -> None:
    for size in (2, 3, 7):
        every = pairs_of_numbers(np.arange(size * (size - 1) // 2), np.zeros(size, dtype=int))
        assert every.tolist() == np.stack(np.triu_indices(size, 1), axis=1).tolist()
    size = 200_000  # products of 64 bits, no square roots: the last pair of many is exact
    last = size * (size - 1) // 2 - 1
    assert pairs_of_numbers(np.array([0, last]), np.zeros(size, dtype=int)).tolist() == [[0, 1], [size - 2, size - 1]]


def test_free_pairs_are_uniform_over_those_not_taken() -> None:
    rng = np.random.default_rng(0)
    drawn = np.concatenate([free_pairs(RING, np.zeros(5, dtype=int), 2, rng) for _ in range(2000)])
    kinds, times = np.unique(drawn, axis=0, return_counts=True)
    assert kinds.tolist() == [[0, 2], [0, 3], [1, 3], [1, 4], [2, 4]]
    assert (np.abs(times - 800) < 4 * np.sqrt(2000 * 0.4 * 0.6)).all()  # each pair in two fifths of the draws
    assert len(free_pairs(RING, np.zeros(5, dtype=int), 5, rng)) == 5


def test_noise_leaves_exact_counts_and_the_truth() -> None:
    clean = simulate_csbm(200, seed=1)
    num = clean.sizes["edge"]
    noisy = check_graph(corrupt(clean, deleted=0.3, added=0.2, seed=5))
    assert noisy.sizes["edge"] == num - round(0.3 * num) + round(0.2 * num)
    assert pairs(noisy, "true_") == pairs(clean)
    assert len(pairs(noisy) - pairs(clean)) == round(0.2 * num)
    assert len(pairs(clean) - pairs(noisy)) == round(0.3 * num)
    xr.testing.assert_identical(noisy, corrupt(clean, deleted=0.3, added=0.2, seed=5))
    assert pairs(noisy) != pairs(corrupt(clean, deleted=0.3, added=0.2, seed=6))
    assert json.loads(noisy.attrs["noise"]) == [{"deleted": 0.3, "added": 0.2, "seed": 5}]
    assert len(check_pairs(np.array(sorted(pairs(noisy))), np.arange(200))) == noisy.sizes["edge"]


def test_deletions_at_a_lower_rate_are_among_those_at_a_higher() -> None:
    clean = simulate_csbm(100, seed=2)
    kept = [pairs(corrupt(clean, deleted=rate, seed=3)) for rate in (0.25, 0.5, 0.75, 1.0)]
    assert kept[3] < kept[2] < kept[1] < kept[0] < pairs(clean)
    assert kept[3] == set()


def test_noise_upon_noise_keeps_the_first_truth_and_adds_no_true_edge() -> None:
    clean = simulate_csbm(60, mean_degree=6, seed=0)
    twice = corrupt(corrupt(clean, deleted=0.5, seed=0), added=3.0, seed=1)
    assert pairs(twice, "true_") == pairs(clean)
    half = clean.sizes["edge"] - round(0.5 * clean.sizes["edge"])
    assert len(pairs(twice) - pairs(clean)) == round(3 * half)
    assert len(json.loads(twice.attrs["noise"])) == 2


def test_noise_stays_within_graphs_and_shares_out_by_edges() -> None:
    clean = collection()
    noisy = check_graph(corrupt(clean, added=0.5, seed=0))
    index = clean["graph_index"].values
    fresh = np.array(sorted(pairs(noisy) - pairs(clean)))
    assert (index[fresh[:, 0]] == index[fresh[:, 1]]).all()
    assert np.bincount(index[fresh[:, 0]]).tolist() == [3] * 30  # rings of six edges
    full = corrupt(clean, added=1.5, seed=0)  # nine free pairs each
    assert full.sizes["edge"] == 30 * 15


def test_noise_may_touch_some_splits_only() -> None:
    clean = split_graphs(collection(), folds=5, fold=2)
    noisy = corrupt(clean, deleted=0.5, splits=["test"])
    gone = np.array(sorted(pairs(clean) - pairs(noisy)))
    graphs = clean["graph_index"].values[gone[:, 0]]
    assert set(clean["split"].values[graphs].tolist()) == {"test"}
    assert len(gone) == 18  # half of the edges of six rings


def test_graphs_without_edges_keep_the_truth() -> None:
    clean = simulate_csbm(50, seed=0)
    bare = without_edges(clean)
    assert bare.sizes["edge"] == 0
    assert pairs(bare, "true_") == pairs(clean)
    assert corrupt(bare, deleted=0.5, added=0.5).sizes["edge"] == 0  # fractions of none


# ----------------------------------------------------------------------------------------------------- simulations


def test_rates_of_block_models_are_as_asked() -> None:
    data = check_graph(simulate_csbm(2000, classes=4, mean_degree=12, homophily=0.7, deleted=0.25, added=0.4, seed=0))
    truth, seen = pairs(data, "true_"), pairs(data)
    num = 2000 * 12 / 2
    assert abs(len(truth) - num) < 4 * np.sqrt(num)
    y = data["y"].values
    same = np.mean([y[a] == y[b] for a, b in truth])
    assert abs(same - 0.7) < 4 * np.sqrt(0.7 * 0.3 / len(truth))
    lost = len(truth - seen) / len(truth)
    assert abs(lost - 0.25) < 4 * np.sqrt(0.25 * 0.75 / len(truth))
    assert abs(len(seen - truth) - 0.4 * len(truth)) < 4 * np.sqrt(0.4 * len(truth))
    absent = 2000 * 1999 / 2 - len(truth)
    assert data.attrs["addition_rate"] == pytest.approx(0.4 * len(truth) / absent)
    assert np.bincount(y).tolist() == [500] * 4


def test_blocks_have_the_probabilities_given() -> None:
    within, between, times = np.zeros(3), 0, 400
    for seed in range(times):
        data = simulate_csbm(9, classes=3, within=0.6, between=0.1, train=3, seed=seed)
        y = data["y"].values
        ends = y[np.array(sorted(pairs(data)), dtype=int).reshape(-1, 2)]
        inside = ends[:, 0] == ends[:, 1]
        within += np.bincount(ends[inside, 0], minlength=3)
        between += (~inside).sum()
    assert (np.abs(within / times - 3 * 0.6) < 4 * np.sqrt(3 * 0.6 * 0.4 / times)).all()
    assert abs(between / times - 27 * 0.1) < 4 * np.sqrt(27 * 0.1 * 0.9 / times)


def test_features_of_block_models_tell_classes_by_the_signal() -> None:
    data = simulate_csbm(4000, classes=3, num_features=5, signal=2.0, seed=1)
    means = np.stack([data["x"].values[data["y"].values == c].mean(axis=0) for c in range(3)])
    error = 4 * np.sqrt(2 * 3 / 4000)  # of an inner product of means of 4000 / 3 unit normals, times the signal
    np.testing.assert_allclose(means @ means.T, 4 * np.eye(3), atol=2 * error)
    assert float(data["x"].std("node").min()) > 0.9


def test_simulations_follow_their_seed() -> None:
    for simulate in (simulate_csbm, load_explainer):
        one, other = simulate(num_nodes=100, seed=1), simulate(num_nodes=100, seed=2)
        xr.testing.assert_identical(one, simulate(num_nodes=100, seed=1))
        assert pairs(one) != pairs(other)


@pytest.mark.parametrize(("motif", "nodes", "edges", "classes"), [("house", 5, 6, 4), ("cycle", 6, 6, 2)])
def test_explainer_graphs_know_their_motifs(motif: str, nodes: int, edges: int, classes: int) -> None:
    state = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    data = check_graph(load_explainer(motif, num_nodes=50, num_edges=2, num_motifs=8, deleted=0.2, seed=0))
    assert (np.random.get_state()[1] == state[0]).all()  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), state[1])
    assert (data.sizes["node"], data.sizes["class"]) == (50 + 8 * nodes, classes)
    inside = data["true_motif"].values == 1
    assert inside.sum() == 8 * edges
    ends = np.array(sorted(pairs(data, "true_")))  # the order that the variables have
    assert ends.tolist() == np.stack([data["true_source"], data["true_target"]], axis=1).tolist()
    assert (data["y"].values[ends[inside]] > 0).all()  # edges of motifs join nodes of motifs
    assert (ends[inside] >= 50).all()
    total = data.sizes["true_edge"]
    assert data.sizes["edge"] == total - round(0.2 * total)


# ------------------------------------------------------------------------------------------------------ own tables


def write_tables(folder: Path, edges: str = "source,target\nNA,007\n007,x\n", nodes: str = "") -> tuple[Path, Path]:
    nodes = nodes or "id,label,height,width\nNA,red,1,2\n007,blue,3,4.5\nx,red,5,6\n"
    (folder / "edges.csv").write_text(edges)
    (folder / "nodes.csv").write_text(nodes)
    return folder / "edges.csv", folder / "nodes.csv"


def test_a_graph_of_ones_own_from_csv(tmp_path: Path) -> None:
    edges, nodes = write_tables(tmp_path)
    data = check_graph(load("graph", edges=str(edges), nodes=str(nodes), split={"train": 2, "validation": 0}))
    assert data["node"].values.tolist() == ["NA", "007", "x"]  # as they are written
    assert data["feature"].values.tolist() == ["height", "width"]
    assert data["class"].values.tolist() == ["blue", "red"]
    assert pairs(data) == {(0, 1), (1, 2)}
    assert data["x"].values.tolist() == [[1, 2], [3, 4.5], [5, 6]]
    assert data["y"].values.tolist() == [1, 0, 1]
    assert counts(data) == {"train": 2, "test": 1}
    assert data.attrs["name"] == "nodes"


def test_data_survive_a_file(tmp_path: Path) -> None:
    edges, nodes = write_tables(tmp_path)
    for name, data in (
        ("edges", load_graph(edges, nodes)),
        ("none", load_graph(None, nodes)),
        ("many", split_graphs(collection(), folds=3)),
    ):
        data.to_netcdf(tmp_path / f"{name}.nc")
        with xr.open_dataset(tmp_path / f"{name}.nc") as found:
            back = check_graph(found.load())
        assert dict(back.sizes) == dict(data.sizes)
        for variable in data.variables:
            assert (back[variable].values == data[variable].values).all(), variable


def test_frames_arrays_and_columns_by_name() -> None:
    nodes = pd.DataFrame({"key": [10, 20, 30], "kind": [2, 1, 2], "a": [1.0, 2.0, 4.0], "b": [True, False, True]})
    data = load_graph(np.array([[30, 10], [20, 30]]), nodes, id="key", label="kind", standardise=True)
    assert data["node"].values.tolist() == [10, 20, 30]
    assert data["class"].values.tolist() == [1, 2]
    assert pairs(data) == {(0, 2), (1, 2)}
    np.testing.assert_allclose(data["x"].mean("node"), 0, atol=1e-6)
    links = pd.DataFrame({"n": [1, 2], "to": ["20", "10"], "from": ["10", "30"]})  # ids of another type
    named = load_graph(links, nodes, id="key", label="kind", edge_columns=["from", "to"], features=["a"])
    assert pairs(named) == {(0, 1), (0, 2)}
    assert named["feature"].values.tolist() == ["a"]
    bare = load_graph([[0, 2]], nodes[["kind"]], label="kind")  # rows by number, no features
    assert bare["feature"].values.tolist() == ["degree 0", "degree 1"]
    assert "degrees of the nodes" in bare.attrs["mends"]


def test_splits_come_from_a_column() -> None:
    nodes = pd.DataFrame({"label": list("abab"), "v": range(4), "part": ["train", "train", "test", None]})
    data = load_graph(None, nodes, split="part")
    assert data["split"].values.tolist() == ["train", "train", "test", ""]
    assert data["feature"].values.tolist() == ["v"]


def test_unlabelled_nodes_stay_on_request() -> None:
    nodes = pd.DataFrame({"label": ["a", None, "b", "a"], "v": range(4)})
    with pytest.raises(DataError, match=r"1 of 4 labels are missing, such as that of node 1; drop these, or pass"):
        load_graph(None, nodes)
    data = check_graph(load_graph(None, nodes, unlabelled=True, split={"train": 2, "validation": 0}))
    assert data["y"].values.tolist() == [0, -1, 1, 0]
    assert data["split"].values[1] == ""
    assert counts(data) == {"train": 2, "test": 1, "": 1}


def test_a_column_of_graphs_makes_a_collection() -> None:
    nodes = pd.DataFrame(
        {"graph": list("qpqpqp"), "label": [1, 0, 1, 0, 1, 0], "v": range(6), "id": [f"n{k}" for k in range(6)]}
    )
    data = check_graph(load_graph([["n0", "n2"], ["n1", "n3"]], nodes, graph="graph"))
    assert data["graph"].values.tolist() == ["p", "q"]
    assert data["graph_index"].values.tolist() == [0, 0, 0, 1, 1, 1]
    assert data["node"].values.tolist() == ["n1", "n3", "n5", "n0", "n2", "n4"]
    assert data["x"].values[:, 0].tolist() == [1, 3, 5, 0, 2, 4]
    assert (pairs(data), data["y"].values.tolist()) == ({(0, 1), (3, 4)}, [0, 1])
    with pytest.raises(DataError, match="join nodes of different graphs, such as"):
        load_graph([["n0", "n1"]], nodes, graph="graph")
    with pytest.raises(DataError, match=r"column 'label' of nodes differs within graphs q"):
        load_graph(None, nodes.assign(label=[1, 0, 2, 0, 1, 0]), graph="graph")


@pytest.mark.parametrize("installed", [False, True])
def test_parquet_needs_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: bool) -> None:
    path = tmp_path / "nodes.parquet"
    if installed:
        pytest.importorskip("pyarrow", reason="pyarrow is not installed")
        pd.DataFrame({"id": ["u", "v"], "label": [0, 1], "h": [0.5, 1.5]}).to_parquet(path)
        pd.DataFrame({"source": ["v"], "target": ["u"]}).to_parquet(tmp_path / "edges.parquet")
        data = load_graph(tmp_path / "edges.parquet", path)
        assert (pairs(data), data["node"].values.tolist()) == ({(0, 1)}, ["u", "v"])
        path.write_bytes(b"not parquet")
        with pytest.raises(DataError, match="cannot be read as Parquet"):
            load_graph(None, path)
    else:
        path.write_bytes(b"PAR1")
        tables = "probmodels.datasets.graph_tables.find_spec"
        monkeypatch.setattr(tables, lambda name: None if name == "pyarrow" else find_spec(name))
        with pytest.raises(DataError, match="pip install pyarrow, or use CSV"):
            load_graph(None, path)


@pytest.mark.parametrize(
    ("edges", "match"),
    [
        ("source,target\nNA,y\n", r"edges.csv names nodes y that nodes.csv does not have; drop these edges"),
        ("source,target\nx,x\n", r"1 edges join a node to itself, such as x; drop them .* or pass mend=True"),
        ("source,target\nNA,x\nx,NA\n", r"1 edges stand more than once, such as \['NA', 'x'\]; .* or pass mend=True"),
        ("source,target,weight\nNA,x,-1\n", r"column 'weight' of edges.csv: 1 weights are negative, such as .* edge 0"),
        ("source,target,weight\nNA,x,1\nx,007,\n", r"1 weights are missing or infinite, such as that of edge 1"),
        ("source,target,weight\nNA,x,0\n", r"1 weights are 0; weights are not used, so drop"),
        ("source,target,weight\nNA,x,much\n", r"weights are not numbers"),
        ("source,target\nNA,\n", r"column 'target' of edges.csv: 1 ids are missing, such as that of row 0; fill them"),
        ("NA,x\nx,007\n", r"the first row of edges.csv, NA, x, is an edge; give edges.csv a header"),
        ("source\nNA\n", r"edges.csv has one column; edges need two"),
        ("", r"edges: .*edges.csv is empty; copy it anew"),
        ("\n", r"edges.csv cannot be read as CSV"),
    ],
)
def test_bad_edges_are_refused(tmp_path: Path, edges: str, match: str) -> None:
    with pytest.raises(DataError, match=match):
        load_graph(*write_tables(tmp_path, edges))


@pytest.mark.parametrize(
    ("nodes", "options", "match"),
    [
        ("id,label,h\n", {}, r"no rows: a graph without nodes; give at least one node"),
        ("id,label,h\nNA,1,2\n007,0,\nx,1,1\n", {}, r"1 values of the features are missing .* in h of nodes 007; fill"),
        ("id,label,h\nNA,1,2\nNA,0,1\n007,0,1\nx,1,1\n", {}, r"nodes are labelled NA more than once"),
        ("id,label,h\nNA,1,2\n,0,1\n007,0,1\nx,1,1\n", {}, r"1 ids are missing, such as that of row 1"),
        ("id,class,h\nNA,1,2\n007,0,3\nx,1,1\n", {}, r"nodes.csv has no column 'label'; it has id, class, h"),
        ("id,label,h\nNA,1,tall\n007,0,3\nx,1,1\n", {}, r"columns 'h' of nodes.csv are not numbers; encode them"),
        ("id,label,h\nNA,1.5,1\n007,0,3\nx,1,1\n", {}, r"labels are fractions"),
        (
            "id,label,h,split\nNA,1,2,train\n007,0,3,test\nx,1,1,\n",
            {"split": {"train": 2, "validation": 0}},
            r"nodes.csv has a column 'split' of text, which is no feature: pass split='split' .* or name the features",
        ),
        ("", {"split": {"train": 1, "validation": 0}}, r"train=1 leaves classes out .* choose at least 2"),
        ("", {"split": {"train": 2, "validation": 5}}, r"train 2, validation 5, .* more than the 3 labelled nodes"),
        ("", {"split": {"train": 2, "valid": 5}}, r"unknown option 'valid' of split_nodes; did you mean 'validation'"),
        ("", {"split": {"train": 2}}, r"split=.* does not fit split_nodes: .* 'validation'"),
        ("", {"split": "part"}, r"has no column 'part'"),
        ("", {"features": ["depth"]}, r"has no column 'depth'"),
        ("", {"id": "key"}, r"has no column 'key'"),
        ("", {"edge_columns": ["a", "b"]}, r"edges.csv has no column 'a', 'b'"),
        ("", {"edge_columns": ["source"]}, r"edge_columns=\['source'\]; give a list of 2"),
        ("", {"features": ["height", "label"]}, r"features name 'label', which is the column of 'label'"),
        ("", {"features": ["width", "width"]}, r"features name 'width' more than once"),
        ("", {"features": [], "standardise": True}, r"standardise=True is not used with degrees as features"),
    ],
)
def test_bad_nodes_and_options_are_refused(tmp_path: Path, nodes: str, options: dict[str, Any], match: str) -> None:
    with pytest.raises(DataError, match=match):
        load_graph(*write_tables(tmp_path, nodes=nodes), **options)


def test_files_that_are_absent_or_of_another_kind_are_refused(tmp_path: Path) -> None:
    _, nodes = write_tables(tmp_path)
    with pytest.raises(DataError, match=r"edges: there is no file .*links.csv"):
        load_graph(tmp_path / "links.csv", nodes)
    with pytest.raises(DataError, match="nodes is absent: name a table"):
        load_graph([[0, 1]])
    with pytest.raises(DataError, match="nodes is a dict; give a file, or a data frame"):
        load_graph(None, {"label": [0]})
    with pytest.raises(DataError, match="nodes has more than one column 'h'"):
        load_graph(None, pd.DataFrame([[0, 1, 2]], columns=["label", "h", "h"]))
    with pytest.raises(DataError, match=r"nodes: .* is a folder; name a file in it"):
        load_graph(None, tmp_path)
    with pytest.raises(DataError, match="mend=True is not used with no edges"):
        load_graph(None, nodes, mend=True)
    with pytest.raises(DataError, match=r"edge_columns=.* is not used with an array of edges"):
        load_graph([["x", "NA"]], nodes, edge_columns=["source", "target"])
    with pytest.raises(DataError, match=r"edges have shape \(2, 4\)"):
        load_graph(np.zeros((2, 4), dtype=int), nodes)


def test_mending_is_done_on_request_and_said(tmp_path: Path) -> None:
    edges = "source,target,weight\nNA,x,1\nx,NA,1\nx,x,2\n007,x,0\n"
    data = load_graph(*write_tables(tmp_path, edges), mend=True)
    assert pairs(data) == {(0, 2)}
    said = json.loads(data.attrs["mends"])
    assert len(said) == 4
    for part in ("weights are 0", "Weights of edges are not used", "join a node to itself", "more than once"):
        assert any(part in sentence for sentence in said), part


# ------------------------------------------------------------------------------------------------------------- PyG


def pyg_data(**entries: Any) -> Any:
    both = torch.from_numpy(np.concatenate([RING, RING[:, ::-1]]).T.copy())
    given = {"x": torch.from_numpy(X).float(), "y": torch.tensor([0, 1, 0, 1, 0]), "edge_index": both} | entries
    return import_pyg("data").Data(**given)


def test_data_of_pyg_keep_nodes_edges_and_masks() -> None:
    train, val = torch.tensor([1, 1, 0, 0, 0]).bool(), torch.tensor([0, 0, 1, 0, 0]).bool()
    data = check_graph(from_pyg(pyg_data(train_mask=train, val_mask=val)))
    assert pairs(data) == {tuple(edge) for edge in RING.tolist()}
    assert data["split"].values.tolist() == ["train", "train", "validation", "", ""]
    assert (data["x"].values == X).all()
    assert json.loads(data.attrs["mends"]) == []
    one_way = from_pyg(pyg_data(edge_index=torch.from_numpy(RING.T.copy())))
    assert pairs(one_way) == pairs(data)
    again = load_graph(pyg_data(), split={"train": 2, "validation": 1})
    assert counts(again) == {"train": 2, "validation": 1, "test": 2}
    sparse = from_pyg(pyg_data(x=torch.from_numpy(X).float().to_sparse()))
    assert (sparse["x"].values == X).all()
    degrees = from_pyg(pyg_data(x=None))
    assert degrees["x"].values.argmax(axis=1).tolist() == [2] * 5


def test_lists_of_pyg_are_collections() -> None:
    items = [pyg_data(y=torch.tensor([place % 2])) for place in range(6)]
    data = check_graph(load_graph(items, split={"folds": 3, "fold": 1}))
    assert (data.sizes["graph"], data.sizes["node"], data.sizes["edge"]) == (6, 30, 30)
    assert pairs(data) >= {(5, 6), (25, 29)}
    assert counts(data) == {"train": 2, "validation": 2, "test": 2}


def looped(a: int, b: int) -> Any:
    return torch.cat([pyg_data().edge_index, torch.tensor([[a], [b]])], dim=1)


@pytest.mark.parametrize(
    ("entries", "match"),
    [
        ({"edge_index": looped(0, 9)}, "edge_index of graph 0 names nodes 9, but there are nodes 0 to 4"),
        ({"edge_index": looped(2, 2)}, "1 edges join a node to itself, such as 2"),
        ({"edge_index": looped(0, 1)}, r"1 edges of graph 0 stand more than once, such as \[0, 1\]"),
        ({"edge_weight": -torch.ones(10)}, "edge_weight of graph 0: 10 weights are negative"),
        ({"edge_weight": torch.full((10,), torch.nan)}, "10 weights are missing"),
        ({"y": torch.tensor([0, 1])}, "y has 2 labels for 5 nodes"),
        ({"y": None}, "graph 0 has no labels y"),
        ({"y": torch.rand(5, 3)}, r"labels of shape \(5, 3\)"),
        ({"x": torch.full((5, 2), torch.inf)}, "10 values of the features are missing or infinite"),
        ({"train_mask": torch.ones(5, 2)}, r"train_mask has shape \(5, 2\) for 5 nodes"),
        ({"train_mask": torch.ones(5), "test_mask": torch.ones(5)}, "5 nodes of test_mask stand in another mask too"),
        ({"train_mask": torch.tensor([1, 0, 1, 0, 1])}, "classes 1 are absent from the training split"),
        (
            {"x": torch.zeros(0, 2), "y": torch.zeros(0), "edge_index": torch.zeros(2, 0).long()},
            "a graph without nodes",
        ),
    ],
)
def test_bad_data_of_pyg_are_refused(entries: dict[str, Any], match: str) -> None:
    with pytest.raises(DataError, match=match):
        from_pyg(pyg_data(**entries))


def test_bad_lists_of_pyg_are_refused() -> None:
    one = pyg_data(y=torch.tensor([0]))
    for items, match in (
        ([], "no graphs in the list"),
        ([pyg_data()], "graph 0 has 5 labels; in a list, every graph has one"),
        ([one, pyg_data(x=None, y=torch.tensor([1]))], "some graphs have features x and others none"),
        ([pyg_data(x=None, y=torch.tensor([1]))], "graph 0 has no number of nodes"),
        ([one, pyg_data(x=torch.zeros(0, 2), y=torch.tensor([1]), edge_index=None)], "graphs 1 have no nodes"),
        ([one, "graph"], "graph 1 is a str"),
        (import_pyg("data").HeteroData(), "graph 0 is a HeteroData"),
    ):
        with pytest.raises(DataError, match=match):
            from_pyg(items)
    with pytest.raises(DataError, match="names a column, which PyG's Data have not"):
        load_graph(pyg_data(), split="part")
    with pytest.raises(DataError, match="brings its own nodes"):
        load_graph(pyg_data(), "nodes.csv")
    with pytest.raises(DataError, match="label='kind' is not used with PyG's Data"):
        load_graph(pyg_data(), label="kind")
    with pytest.raises(DataError, match="give PyG's Data, or a list of them"):
        from_pyg("graph")


def test_mending_of_pyg_is_said() -> None:
    data = from_pyg(pyg_data(edge_index=torch.cat([looped(2, 2), torch.tensor([[0], [1]])], dim=1)), mend=True)
    assert data.sizes["edge"] == 5
    assert len(json.loads(data.attrs["mends"])) == 2
    used = from_pyg(pyg_data(edge_weight=torch.full((10,), 0.5), edge_attr=torch.ones(10, 2)))
    assert len(json.loads(used.attrs["mends"])) == 2  # neither weights nor attributes are used


# ---------------------------------------------------------------------------------------------------------- splits


def test_shares_follow_largest_remainders_and_limits() -> None:
    weights = np.array([59, 71, 48])
    assert apportion(10, weights, weights).tolist() == [3, 4, 3]
    assert apportion(178, weights, weights).tolist() == weights.tolist()
    assert apportion(10, np.array([5, 5, 0]), np.array([2, 90, 90])).tolist() == [2, 8, 0]
    assert apportion(0, weights, weights).tolist() == [0, 0, 0]
    rng = np.random.default_rng(0)
    for _ in range(200):
        weights, limits = rng.integers(1, 50, 6), rng.integers(0, 50, 6)
        count = int(rng.integers(0, limits.sum() + 1))
        shares = apportion(count, weights, limits)
        assert shares.sum() == count
        assert (shares <= limits).all()


def test_nodes_are_split_by_class_in_the_numbers_asked_for() -> None:
    y = np.repeat([0, 1, 2], [700, 290, 10])
    data = make_graph(np.zeros((1000, 1)), y)
    split = split_nodes(data, train=20, validation=100, stop=50, test=200, seed=1)
    assert counts(split) == {"train": 20, "validation": 100, "stop": 50, "test": 200, "": 630}
    train = np.bincount(y[split["split"].values == "train"])
    assert train.tolist() == [13, 6, 1]  # one of the rare class, whose share would be none
    assert np.bincount(y[split["split"].values == "validation"]).tolist() == [70, 29, 1]
    assert json.loads(split.attrs["split"])["seed"] == 1
    xr.testing.assert_identical(split, split_nodes(data, train=20, validation=100, stop=50, test=200, seed=1))
    other = split_nodes(data, train=20, validation=100, stop=50, test=200, seed=2)
    assert (split["split"].values != other["split"].values).any()


def test_folds_are_disjoint_stratified_and_cover_the_graphs() -> None:
    data = collection(45)
    tests = [split_graphs(data, folds=5, fold=fold, seed=3)["split"].values for fold in range(5)]
    assert (sum((split == "test").astype(int) for split in tests) == 1).all()
    for fold, split in enumerate(tests):
        assert (split == "test").sum() == (split == "validation").sum() == 9
        ones = data["y"].values[split == "test"].sum()
        assert 4 <= ones <= 5
        assert ((split == "validation") == (tests[fold - 1] == "test")).all()
    assert (tests[0] != split_graphs(data, folds=5, fold=0, seed=4)["split"].values).any()


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: split_nodes(collection(), train=2, validation=0), "take split_graphs"),
        (lambda: split_graphs(make_graph(X, Y)), "take split_nodes"),
        (lambda: split_nodes(make_graph(X, Y), train=-1, validation=0), "train=-1; give a whole number of at least 0"),
        (
            lambda: split_nodes(make_graph(X, Y), train=2.5, validation=0),
            "train=2.5; give a whole number of at least 0",
        ),
        (lambda: split_graphs(collection(), folds=2), "folds=2; give a whole number of at least 3"),
        (lambda: split_graphs(collection(), folds=5, fold=5), "choose 0 to 4"),
        (lambda: split_graphs(collection(8), folds=5), "class 0 has 4 graphs, fewer than folds=5"),
        (
            lambda: corrupt(make_graph(X, Y, RING), deleted=1.5),
            "deleted=1.5; give a number of at least 0 and of at most 1",
        ),
        (lambda: corrupt(make_graph(X, Y, RING), added=-1), "added=-1; give a number of at least 0"),
        (lambda: corrupt(make_graph(X, Y, RING), added=1.2), "6 new edges .* only 5 pairs are free"),
        (lambda: corrupt(make_graph(X, Y, RING), added=0.2, splits=["test"]), "nodes of one graph are split"),
        (lambda: corrupt(collection(), added=0.2, splits=["test"]), "no graph is in the splits test"),
        (lambda: corrupt(collection(), added=0.2, splits="test"), "splits='test'; give a list of at least 1"),
        (lambda: simulate_csbm(0), "num_nodes=0; give a whole number of at least 1 and of at most 1000000"),
        (lambda: simulate_csbm(10, classes=11), "classes=11 of 10 nodes"),
        (lambda: simulate_csbm(10, num_features=0), "num_features=0; give a whole number of at least 1"),
        (
            lambda: simulate_csbm(10, mean_degree=20),
            "mean_degree=20 and homophily=0.8 give within=.* is no probability",
        ),
        (lambda: simulate_csbm(10, within=0.5), "within and between go together"),
        (lambda: simulate_csbm(10, within=0.5, between=0.1, homophily=0.5), "homophily=0.5 is not used with within"),
        (lambda: simulate_csbm(1_000_000, mean_degree=9e5, homophily=0.5), "expected_edges=.* do not fit in memory"),
        (lambda: simulate_csbm(100, homophily=1.5), "homophily=1.5; give a number of at least 0 and of at most 1"),
        (lambda: simulate_csbm(100, deleted=2), "deleted=2; give a number of at least 0 and of at most 1"),
        (lambda: simulate_csbm(100, added=1000), "asks for more edges"),
        (lambda: load_explainer("star"), "motif='star'; choose one of house, cycle"),
        (lambda: load_explainer(num_nodes=5), "choose 1 to 4"),
        (lambda: load_explainer(num_motifs=301), "choose 1 to 300"),
        (lambda: load_planetoid("Coral"), "unknown data set 'Coral' of Planetoid; did you mean 'Cora'"),
        (lambda: load_planetoid("Cora", retained=2), "retained=2; give a number of at least 0 and of at most 1"),
        (lambda: load_planetoid("Cora", graph=False, retained=0.5), "retained=0.5 is not used with graph=False"),
        (lambda: load_planetoid("Cora", root=__file__), "test_graphs.py is a file; name the folder"),
        (lambda: load_tu("../MUTAG"), "give a name as TU Dortmund writes it"),
        (lambda: load_tu("MUTAG", folds=5, fold=5), "choose 0 to 4"),
        (lambda: load_tu("MUTAG", features="all"), "features='all'; choose one of auto, degree"),
        (lambda: load_tabular_graph("iris"), "dataset='iris'; choose one of wine, cancer, digits"),
    ],
)
def test_bad_options_are_refused(make: Callable[[], Any], match: str) -> None:
    with pytest.raises(DataError, match=match):
        make()


# ---------------------------------------------------------------------------------------------------------- arrays


@pytest.mark.parametrize(
    ("args", "options", "match"),
    [
        ((X[:4], Y), {}, "features have 4 rows, but labels tell of 5 nodes"),
        ((X, Y, [[0, 5]]), {}, "edges name nodes 5, but there are nodes 0 to 4"),
        ((X, Y, [[0, -1]]), {}, "edges name nodes -1"),
        ((X, Y, [[0, 1, 2]]), {}, r"edges have shape \(1, 3\)"),
        ((X, Y, [[0.5, 1]]), {}, "type float64"),
        ((X[:0], []), {}, "a graph without nodes"),
        ((X[:, 0], Y), {}, r"features have shape \(5,\)"),
        ((X[:, :0], Y), {}, "there are no features"),
        ((X.astype(str), Y), {}, "encode them as numbers"),
        ((X, Y), {"features": ["one"]}, "1 names for 2 features"),
        ((X, Y), {"nodes": [1, 2]}, r"nodes: labels of shape \(2,\) for 5 of them"),
        ((X, [None] * 5), {"unlabelled": True}, "no node has a label"),
        ((X, Y), {"split": ["train"] * 4}, r"split has shape \(4,\) for 5 labels"),
        ((X, Y), {"split": ["train", "train", "valid", "", ""]}, "split has entries 'valid'; choose among train"),
        ((X, Y), {"split": ["train", "test", "", "", ""]}, "classes b are absent from the training split"),
        ((X, [0, 1, None, 0, 1]), {"unlabelled": True, "split": ["train"] * 5}, "1 entries of a split have no label"),
        ((X, [0, 1]), {"graph": [0, 1, 0, 1, 1]}, "nodes of a graph must stand together"),
        ((X, [0, 1, 1]), {"graph": [0, 0, 2, 2, 2]}, "graphs 1 have no nodes"),
        ((X, [0, 1]), {"graph": [0, 0, 1, 1, 2]}, "graph runs from 0 to 2, but there are labels for 2 graphs"),
        ((X, [0, 1], [[1, 2]]), {"graph": [0, 0, 1, 1, 1]}, r"edges join nodes of different graphs, such as \[1, 2\]"),
    ],
)
def test_bad_arrays_are_refused(args: tuple[Any, ...], options: dict[str, Any], match: str) -> None:
    with pytest.raises(DataError, match=match):
        make_graph(*args, **options)


def test_data_sets_of_ones_own_are_checked() -> None:
    data = make_graph(X, Y, RING)
    assert check_graph(data) is data
    for bad, match in (
        (data.drop_vars("y"), r"lack the variable 'y' \('node',\)"),
        (data.transpose("feature", ...), r"x has dims \('feature', 'node'\)"),
        (data.drop_vars("class"), "lack the coordinate 'class'"),
        (data.assign(y=data["y"] + 1), "positions of the 2 classes"),
        (data.assign(source=data["target"]), "join a node to itself"),
        (data.assign(x=data["x"] / 0.0), "missing or infinite, in 0 and 1|missing or infinite, in 0, 1"),
        (data.isel(node=slice(0)), "a graph without nodes"),
        (data["x"], "must be an xr.Dataset, not DataArray"),
    ):
        with np.errstate(all="ignore"), pytest.raises(DataError, match=match):
            check_graph(bad)


def test_many_degrees_are_one_number() -> None:
    star = np.stack([np.zeros(1200, dtype=int), np.arange(1, 1201)], axis=1)
    values, names = degree_features(star, 1201)
    assert (values.shape, names.tolist()) == ((1201, 1), ["degree"])
    assert values[0, 0] == pytest.approx(np.sqrt(1200), rel=1e-3)  # the only node that is not like the rest
    values, names = degree_features(star[:3], 5)
    assert names.tolist() == ["degree 0", "degree 1", "degree 2", "degree 3"]
    assert values.argmax(axis=1).tolist() == [3, 1, 1, 1, 0]


def test_every_row_of_loaders_names_a_function_with_keywords() -> None:
    import inspect

    from probmodels.datasets import get_loader

    for name in LOADERS:
        kinds = {parameter.kind for parameter in inspect.signature(get_loader(name)).parameters.values()}
        assert inspect.Parameter.VAR_KEYWORD not in kinds
        assert "name" not in inspect.signature(get_loader(name)).parameters  # a spec's [data] has its own
