"""Every option of every loader against values that hardly any option takes: refused as a DataError, or used."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from PIL import Image
from small_data import write_celeba, write_planetoid, write_tu
from wrong_values import WRONG

from probmodels.datasets import LOADERS, get_loader, list_loaders, load
from probmodels.datasets.calendars import parse_period, parse_season
from probmodels.datasets.causal import as_graph, check_concepts, hide_labels, make_concepts
from probmodels.datasets.cells import from_cells, to_matrix
from probmodels.datasets.earnings import sample_earnings, simulate_earnings
from probmodels.datasets.fetch import cached_path, fetch
from probmodels.datasets.graphs import (
    check_graph,
    corrupt,
    from_pyg,
    load_tabular_graph,
    make_graph,
    split_graphs,
    split_nodes,
)
from probmodels.datasets.gridded import open_field
from probmodels.datasets.images import check_images, make_images, read_idx
from probmodels.datasets.paired.views import make_views
from probmodels.datasets.petals import petal_offsets
from probmodels.datasets.regions import parse_region
from probmodels.datasets.scenes import counterfactual, render
from probmodels.datasets.sem import average_effects, draw_sem, sample_sem, sem_of, simulate_sem
from probmodels.datasets.text import check_sentences, make_sentences, simulate_sentences
from probmodels.errors import DataError
from probmodels.options import options_of, options_schema

TABLES = {
    "a": pd.DataFrame({"id": range(8), "x": np.arange(1.0, 9.0)}),
    "b": pd.DataFrame({"id": range(2, 10), "caption": ["a dog", "a cat"] * 4}),
}
# Options with which a loader is quick; paths are below the folder that `files` fills.
SMALL: dict[str, dict[str, Any]] = {
    "cancer": {},
    "captioned_images": {"root": "images"},
    "causal_table": {"path": "table.csv"},
    "celeba": {"root": "celeba", "concepts": ["Young", "Male"], "size": 4},
    "concept_images": {"root": "images", "size": 4},
    "conllu": {"path": "trees.conllu"},
    "csbm": {"num_nodes": 60},
    "digits": {},
    "digit_halves": {},
    "discrete_network": {"num_samples": 20},
    "earnings": {"num_rows": 20},
    "explainer": {"num_nodes": 30, "num_motifs": 5},
    "flow": {"size": 8, "num": 6},
    "gaussian_network": {"num_samples": 20},
    "graph": {"edges": "edges.csv", "nodes": "nodes.csv"},
    "images": {"num_train": 20, "num_test": 10},
    "motifs": {"num_graphs": 8, "folds": 3},
    "paired_tables": {"tables": TABLES, "key": "id"},
    "pendulum": {"size": 8, "num": 6},
    "petals": {"num_rows": 20},
    "planetoid": {"root": "planetoid"},
    "sem": {"num_rows": 20},
    "sentences": {"num_sentences": 5},
    "sst": {"path": "sst.nc"},
    "tu": {"root": "tu", "dataset": "TINY", "folds": 3},
    "wine": {},
}
DATA = {
    "captioned_images": ["captions"],
    "causal_table": ["path"],
    "concept_images": ["table"],
    "graph": ["edges", "nodes"],
}  # of any type
PATHS = {"path", "root", "edges", "nodes"}

# Values that an option does take. What is the default of an option is taken as well and not listed.
TAKEN: dict[str, dict[str, tuple[str, ...]]] = {
    "cancer": {"validation": ("zero",), "stop": ("zero",), "standardise": ("true",)},
    "captioned_images": {"label": ("text",)},
    "causal_table": {"graph": ("empty list",), "test": ("zero",)},
    "celeba": {"num_train": ("none",), "num_test": ("zero", "none"), "graph": ("empty list",)},
    "concept_images": {"graph": ("empty list",), "test": ("zero",)},
    "conllu": {"punctuation": ("true",), "unique": ("true",)},
    "csbm": {
        "mean_degree": ("zero",),
        "homophily": ("zero",),
        "signal": ("zero",),
        "deleted": ("zero",),
        "added": ("zero",),
        "validation": ("zero",),
        "stop": ("zero",),
    },
    "digits": {"validation": ("zero",), "stop": ("zero",), "standardise": ("true",)},
    "discrete_network": {"degree": ("zero",)},
    "earnings": {"test": ("zero",)},
    "explainer": {"deleted": ("zero",), "added": ("zero",), "validation": ("zero",), "stop": ("zero",)},
    "flow": {"noise": ("zero",)},
    "gaussian_network": {"degree": ("zero",)},
    "graph": {
        "edges": ("empty list",),
        "features": ("empty list",),
        "standardise": ("true",),
        "unlabelled": ("true",),
        "mend": ("true",),
    },
    "images": {"threshold": ("zero", "none")},
    "motifs": {"deleted": ("zero",), "added": ("zero",)},
    "pendulum": {"noise": ("zero",)},
    "planetoid": {"download": ("true",), "retained": ("zero",)},
    "sem": {"graph": ("empty list",), "degree": ("zero",), "test": ("zero",)},
    "sst": {
        "min_valid": ("zero",),
        "ice": ("negative", "zero"),
        "fill": ("negative", "zero", "list", "empty list"),
        "daily": ("true",),
        "keep_climatology": ("true",),
    },
    "tu": {"download": ("true",), "deleted": ("zero",), "added": ("zero",)},
    "wine": {"validation": ("zero",), "stop": ("zero",), "standardise": ("true",)},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    rng = np.random.default_rng(0)
    pd.DataFrame(rng.normal(size=(12, 3)), columns=["a", "b", "c"]).to_csv(folder / "table.csv", index=False)
    write_celeba(folder / "celeba")
    (folder / "images").mkdir()
    for place in range(6):
        Image.new("RGB", (6, 5), (40 * place, 0, 0)).save(folder / "images" / f"{place}.png")
    labels = {"file": [f"{place}.png" for place in range(6)], "red": range(6), "odd": [0, 1] * 3}
    pd.DataFrame(labels).to_csv(folder / "images" / "labels.csv", index=False)
    captions = {"file": labels["file"][1:], "text": ["dark", "some red", "red", "more red", "red, bright"]}
    pd.DataFrame(captions).to_csv(folder / "images" / "captions.csv", index=False)
    rows = [f"{word}\t{text}\t_\tNOUN\t_\t_\t{word - 1}\tdep\t_\t_" for word, text in ((1, "red"), (2, "dog"))]
    (folder / "trees.conllu").write_text("\n".join([*rows, "", *rows, ""]))
    pd.DataFrame({"id": range(12), "label": [0, 1] * 6, "h": rng.normal(size=12)}).to_csv(folder / "nodes.csv")
    pd.DataFrame({"source": range(11), "target": range(1, 12)}).to_csv(folder / "edges.csv", index=False)
    write_planetoid(folder / "planetoid" / "Cora" / "raw")
    write_tu(folder / "tu")
    coords = {
        "time": pd.date_range("1990-01-01", periods=48, freq="MS"),
        "lat": ("lat", [-10.0, 0.0, 10.0], {"units": "degrees_north"}),
        "lon": ("lon", [160.0, 180.0, 200.0, 220.0], {"units": "degrees_east"}),
    }
    field = xr.DataArray(20 + rng.normal(size=(48, 3, 4)), coords, ("time", "lat", "lon"), name="sst")
    field.assign_attrs(units="degC", long_name="sea surface temperature").to_netcdf(folder / "sst.nc")
    return folder


def small(name: str, folder: Path) -> dict[str, Any]:
    return {key: str(folder / value) if key in PATHS else value for key, value in SMALL[name].items()}


OPTIONS = [(name, option) for name in LOADERS for option in options_of(get_loader(name))]


@pytest.mark.parametrize(("name", "option"), OPTIONS)
def test_wrong_values_are_refused_and_others_work(
    name: str, option: str, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROBMODELS_CACHE", str(tmp_path))  # where nothing has been downloaded
    monkeypatch.chdir(tmp_path)
    default = options_of(get_loader(name))[option].default
    found = []
    for what, value in WRONG.items():
        try:
            data = load(name, **(small(name, files) | {option: value}))
        except DataError:
            continue
        assert isinstance(data, xr.Dataset | xr.DataArray), what
        assert all(size or "edge" in str(dim) for dim, size in data.sizes.items()), what
        if value is not default and not (type(value) is type(default) and value == default):
            found.append(what)
    assert tuple(found) == TAKEN.get(name, {}).get(option, ())


@pytest.mark.parametrize("name", LOADERS)
def test_options_are_documented_and_annotated(name: str, files: Path) -> None:
    options = options_of(get_loader(name))
    assert [option for option, entry in options.items() if not entry.doc] == []
    assert [option for option, entry in options.items() if entry.annotation is Any] == DATA.get(name, [])
    assert set(options_schema(get_loader(name))["properties"]) == set(options)
    assert isinstance(load(name, **small(name, files)), xr.Dataset | xr.DataArray)


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("causal_table", "path"),
        ("captioned_images", "root"),
        ("captioned_images", "captions"),
        ("celeba", "root"),
        ("concept_images", "root"),
        ("concept_images", "table"),
        ("conllu", "path"),
        ("graph", "edges"),
        ("graph", "nodes"),
        ("images", "root"),
        ("planetoid", "root"),
        ("sst", "path"),
        ("tu", "root"),
    ],
)
def test_paths_that_lead_nowhere_are_refused(name: str, option: str, files: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "noise.csv").write_bytes(np.random.default_rng(0).bytes(3000))
    (tmp_path / "nothing").mkdir()
    bad = ["absent", "empty", "noise.csv", "nothing", "x" * 300, "x/" * 3000, "nul\0", "~nobody/at/home"]
    kind = {"dataset": "idx"} if name == "images" else {}
    for path in bad:
        given = tmp_path / path if path in ("empty", "noise.csv", "nothing") else path
        for download in (False, True) if name in ("planetoid", "tu") and given == tmp_path / "empty" else (False,):
            more = {"download": True} if download else {}
            with pytest.raises(DataError):
                load(name, **(small(name, files) | kind | more | {option: given}))


@pytest.mark.parametrize(
    ("name", "options", "unused"),
    [
        ("causal_table", {"test": 0, "seed": 1}, "seed=1 is not used with test=0"),
        ("conllu", {"vocabulary": ["red", "dog"], "min_count": 1}, "min_count=1 is not used with vocabulary"),
        ("csbm", {"within": 0.2, "between": 0.1, "mean_degree": 3.0}, "mean_degree=3.0 is not used with within"),
        ("graph", {"edges": None, "mend": True}, "mend=True is not used with no edges"),
        ("images", {"root": "pngs"}, "root='pngs' is not used with dataset='digits'"),
        ("planetoid", {"graph": False, "retained": 0.5}, "retained=0.5 is not used with graph=False"),
        ("sem", {"graph": "chain", "degree": 1.0}, "degree=1.0 is not used with graph='chain'"),
        ("sem", {"graph": [["v1", "v2"]], "degree": 1.0}, "degree=1.0 is not used with a graph that is given"),
        ("sst", {"daily": True, "season": "DJF"}, "season='DJF' is not used with daily=True"),
        ("sst", {"anomalies": False, "base_period": 1991}, "base_period=1991 is not used with anomalies=False"),
    ],
)
def test_options_that_are_not_used_are_refused(name: str, options: dict[str, Any], unused: str, files: Path) -> None:
    with pytest.raises(DataError, match=re.escape(unused)):
        load(name, **(small(name, files) | options))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("petals", {"num_rows": 10_000_001}),
        ("petals", {"num_clusters": 2**62}),
        ("sem", {"num_nodes": 1000, "num_rows": 10_000_000, "degree": 2.0}),
        ("sem", {"num_nodes": 100_000}),
        ("gaussian_network", {"num_variables": 10_000, "num_samples": 10_000_000}),
        ("discrete_network", {"num_states": 1000, "num_samples": 10_000_000}),
        ("sentences", {"num_sentences": 1_000_000, "max_length": 1000}),
        ("csbm", {"num_nodes": 1_000_000, "mean_degree": 900_000.0, "homophily": 0.5}),
        ("csbm", {"num_nodes": 1_000_000, "num_features": 100_000}),
        ("explainer", {"num_nodes": 100_000, "num_edges": 99_999, "num_motifs": 1}),
        ("motifs", {"num_graphs": 1_000_000, "sizes": [5, 100_000]}),
        ("pendulum", {"num": 10_000_000, "size": 1024}),
        ("captioned_images", {"size": 2049}),
        ("concept_images", {"size": 2049}),
    ],
)
def test_sizes_beyond_memory_are_refused_before_anything_is_made(
    name: str, options: dict[str, Any], files: Path
) -> None:
    with pytest.raises(DataError, match=r"do not fit in memory|of at most"):
        load(name, **(small(name, files) | options))


NODES = make_graph(np.arange(80.0).reshape(40, 2), [0, 1] * 20, [(node, node + 1) for node in range(39)])
GRAPHS = make_graph(None, [0, 1] * 6, graph=np.repeat(range(12), 2))
TABLE = simulate_earnings(20)
FIELD = xr.DataArray(
    np.random.default_rng(0).normal(size=(12, 2, 3)),
    {"time": pd.date_range("2000-01-01", periods=12, freq="MS"), "lat": [0.0, 1.0], "lon": [10.0, 11.0, 12.0]},
    ("time", "lat", "lon"),
)
ANGLES = {"angle": [1.0, 2.0], "light": [80.0, 90.0]}


@pytest.mark.parametrize(
    ("function", "options"),
    [
        (as_graph, {"graph": [["a", "b"]], "names": ["a", "b"]}),
        (average_effects, {"sem": draw_sem(3, mechanism="additive"), "num_rows": 50}),
        (cached_path, {"name": "ersstv5"}),
        (check_concepts, {"data": TABLE}),
        (check_graph, {"data": NODES}),
        (check_images, {"data": make_images(np.zeros((4, 2, 2)))}),
        (check_sentences, {"data": simulate_sentences(4)}),
        (corrupt, {"data": NODES, "deleted": 0.2}),
        (corrupt, {"data": split_graphs(GRAPHS, folds=3), "deleted": 0.2, "splits": ["test"]}),
        (counterfactual, {"scene": "pendulum", "concepts": ANGLES, "do": {"light": 70.0}, "size": 8}),
        (draw_sem, {}),
        (fetch, {"name": "ersstv5", "offline": True}),
        (from_cells, {"cells": to_matrix(FIELD), "template": to_matrix(FIELD)}),
        (from_pyg, {"data": []}),
        (hide_labels, {"data": TABLE, "share": 0.2}),
        (load_tabular_graph, {}),
        (make_concepts, {"values": np.zeros((4, 2)), "labels": np.eye(4)[:, :2], "names": ["a", "b"]}),
        (make_graph, {"x": np.eye(4), "y": [0, 1, 0, 1], "edges": [[0, 1]], "nodes": list("abcd")}),
        (make_graph, {"x": None, "y": [0, 1], "graph": [0, 0, 1, 1], "graphs": ["a", "b"], "split": ["train"] * 2}),
        (make_images, {"images": np.zeros((4, 2, 2)), "labels": range(4), "split": ["train"] * 4}),
        (make_views, {"views": {"a": np.ones((8, 2)), "b": ["red", "dog"] * 4}, "label": [0, 1] * 4}),
        (make_sentences, {"sentences": [["a", "b"], ["b", "a"]], "brackets": [[(0, 2)], []]}),
        (open_field, {"path_or_paths": FIELD}),
        (parse_period, {"period": 1999}),
        (parse_region, {"region": "global"}),
        (parse_season, {"season": "DJF"}),
        (petal_offsets, {"num_petals": 3}),
        (read_idx, {"path": "absent"}),
        (render, {"scene": "flow", "concepts": [[0.5, 2.5, 3.0, 3.0]], "size": 8}),
        (sample_earnings, {"num_rows": 5, "interventions": {"age": 40.0}}),
        (sample_sem, {"sem": draw_sem(3), "num_rows": 4, "interventions": {"v1": 1.0}}),
        (sem_of, {"data": simulate_sem(3, 10)}),
        (split_graphs, {"data": GRAPHS, "folds": 3}),
        (split_nodes, {"data": NODES, "train": 10, "validation": 10}),
        (to_matrix, {"field": FIELD}),
    ],
    ids=lambda given: getattr(given, "__name__", ""),
)
def test_other_functions_raise_nothing_but_data_errors(
    function: Callable[..., Any], options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROBMODELS_CACHE", str(tmp_path))
    refused = 0
    for option in options_of(function):
        for value in WRONG.values():
            try:
                function(**(options | {option: value}))
            except DataError:
                refused += 1
    assert refused >= 10 * sum(option in options for option in options_of(function))


@pytest.mark.parametrize(
    "name", [1, ["sst"], None, "", "ssst", "os:system", "pandas:read_pickle", "no.such:thing", ":"]
)
def test_names_that_are_no_data_set_are_refused(name: Any) -> None:
    with pytest.raises(DataError, match=r"name=|data set"):
        get_loader(name)


def test_options_that_are_needed_or_unknown_are_said() -> None:
    with pytest.raises(DataError, match="'conllu' needs path; give path="):
        load("conllu")
    with pytest.raises(DataError, match="unknown option 'sigmma' of data set 'petals'; did you mean 'sigma'"):
        load("petals", sigmma=1.0)


PACKAGE = '''"""Buoys at sea."""

from probmodels.errors import DataError
from probmodels.options import Count, checked


@checked(DataError)
def load_buoys(num_buoys: Count = 3) -> list[int]:
    """Buoys by number.

    Parameters
    ----------
    num_buoys
        Number of buoys.
    """
    return list(range(num_buoys))


def load_plainly(num_buoys=3):
    return []
'''


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package of another project, with a loader and its entry points."""
    (tmp_path / "harbour").mkdir()
    (tmp_path / "harbour" / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (tmp_path / "seaside").mkdir()
    (tmp_path / "seaside" / "__init__.py").write_text("")
    (tmp_path / "seaside" / "buoys.py").write_text(PACKAGE)
    info = tmp_path / "seaside-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: seaside\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[probmodels.loaders]\n"
        "buoys = seaside.buoys:load_buoys\n"
        "gone = seaside.buoys:load_gone\n"
        "harbour = harbour:load_ships\n"
        "sst = seaside.buoys:load_buoys\n"
        "two = seaside.buoys:load_buoys\n"
    )
    other = tmp_path / "inland-1.0.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: inland\nVersion: 1.0\n")
    (other / "entry_points.txt").write_text("[probmodels.loaders]\ntwo = seaside.buoys:load_plainly\n")
    monkeypatch.syspath_prepend(tmp_path)
    return "seaside.buoys"


def test_loaders_of_other_packages(package: str) -> None:
    known = list_loaders()
    assert package not in sys.modules
    assert list(known)[: len(LOADERS)] == list(LOADERS)
    assert known["buoys"] == "Buoys by number."
    assert known["sst"].startswith("Sea surface temperature")  # a name of ours is not taken over
    assert known["harbour"] == ""
    assert load("buoys", num_buoys=2) == load(f"{package}:load_buoys", num_buoys=2) == [0, 1]
    assert get_loader("sst").__module__ == "probmodels.datasets.sst"
    with pytest.raises(DataError, match="num_buoys=0; give a whole number of at least 1"):
        load("buoys", num_buoys=0)
    with pytest.raises(DataError, match="unknown data set 'buoy'; did you mean 'buoys'"):
        load("buoy")
    with pytest.raises(DataError, match=r"'gone': cannot import .*AttributeError"):
        get_loader("gone")
    with pytest.raises(DataError, match=r"'harbour': cannot import .*RuntimeError: imported"):
        get_loader("harbour")
    with pytest.raises(DataError, match=r"'two' is both seaside.buoys:load_buoys and seaside.buoys:load_plainly"):
        get_loader("two")
    with pytest.raises(DataError, match=r"'seaside.buoys:load_plainly' is no loader: decorate the function"):
        get_loader(f"{package}:load_plainly")
    with pytest.raises(DataError, match=r"'probmodels.datasets.fetch:fetch' is no loader"):
        get_loader("probmodels.datasets.fetch:fetch")


def test_data_sets_are_listed_without_imports() -> None:
    code = (
        "import sys; from probmodels.datasets import LOADERS, list_loaders; found = list_loaders();"
        "assert set(LOADERS) <= set(found) and all(found[name] for name in LOADERS);"
        "print(*{'numpy', 'xarray', 'torch', 'pandas', 'pydantic'} & set(sys.modules))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == ""
