"""Graphs with labelled nodes, and collections of labelled graphs: loaders, the user's own tables, noise and splits.

The canonical data set
----------------------
Every loader returns an `xr.Dataset`, and every method on graphs takes one, with dims ``node``, ``feature``, ``edge``
and, for collections, ``graph``:

- ``x`` (node, feature) float32; ``source``, ``target`` (edge) int64, positions of nodes, ``source < target``:
  undirected edges, each once, none from a node to itself; there may be none at all;
- ``y`` int64, positions in the coordinate ``class``, and ``split`` str, "train", "validation", "stop" (for early
  stopping), "test" or "": both (node), or both (graph) with ``graph_index`` (node) int64, ascending from 0; where
  labels are missing, ``y`` is -1 and ``split`` "";
- ``true_source``, ``true_target`` (true_edge) where true edges are known; ``source`` and ``target`` are what is seen;
- coords ``node``, ``feature``, ``graph`` and ``class`` with labels;
- attrs ``name``, ``source``, and as JSON ``mends`` (sentences on what was repaired) and, where they were made here,
  ``split`` and ``noise`` with their seeds; ``features`` is "degree" where features are degrees of the seen edges.

Files are read by PyG's own `Planetoid` and `TUDataset`, in a folder of their own for the time of reading, so that
nothing is written beside the user's files.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, TypedDict, Unpack

import numpy as np
import xarray as xr

from probmodels.datasets.checks import AnyPath
from probmodels.datasets.graph_data import (
    SPLITS,
    Folds,
    check_graph,
    import_pyg,
    make_graph,
    split_graphs,
    split_nodes,
    standardised,
)
from probmodels.datasets.graph_noise import Added, corrupt, load_explainer, simulate_csbm, without_edges
from probmodels.datasets.graph_tables import from_pyg, load_graph
from probmodels.errors import DataError
from probmodels.options import Default, Natural, OneOf, Probability, Seed, checked, hint, refuse_unused

__all__ = [
    "SPLITS",
    "check_graph",
    "corrupt",
    "from_pyg",
    "load_cancer",
    "load_digits",
    "load_explainer",
    "load_graph",
    "load_planetoid",
    "load_tabular_graph",
    "load_tu",
    "load_wine",
    "make_graph",
    "simulate_csbm",
    "split_graphs",
    "split_nodes",
    "without_edges",
]

_TABLES = {
    "wine": ("load_wine", 10, True),
    "cancer": ("load_breast_cancer", 10, True),
    "digits": ("load_digits", 50, False),
}
_PLANETOID = {"cora": "Cora", "citeseer": "Citeseer", "pubmed": "Pubmed"}
_PLANETOID_FILES = ("x", "tx", "allx", "y", "ty", "ally", "graph", "test.index")
_TU_FILES = ("A", "graph_indicator", "graph_labels")


class TableOptions(TypedDict, total=False):
    """Options of the tables of scikit-learn.

    Attributes
    ----------
    train, validation, stop
        Sizes of splits as in `split_nodes`, by default 10 each for wine and cancer and 50 for digits; the rest is for
        testing.
    standardise
        Whether to scale features to mean 0 and standard deviation 1; by default yes, but not for digits.
    seed
        Seed of the split.
    """

    train: Annotated[Natural | None, Default(None)]
    validation: Annotated[Natural | None, Default(None)]
    stop: Annotated[Natural | None, Default(None)]
    standardise: Annotated[bool | None, Default(None)]
    seed: Annotated[Seed, Default(0)]


@checked(DataError)
def load_tabular_graph(dataset: Annotated[str, OneOf(_TABLES)] = "wine", **options: Unpack[TableOptions]) -> xr.Dataset:
    """Tables of scikit-learn as graphs without edges, split as LDS splits them.

    Parameters
    ----------
    dataset
        "wine" (178 nodes, 13 features, 3 classes), "cancer" (569, 30, 2) or "digits" (1797, 64, 10).
    **options
        As in `TableOptions`.

    Raises
    ------
    DataError
        If the name is unknown or the sizes do not fit.
    """
    from sklearn import datasets as tables

    loader, size, scaled = _TABLES[dataset]
    table = getattr(tables, loader)()
    standardise = options.get("standardise")
    data = make_graph(
        standardised(table.data) if (scaled if standardise is None else standardise) else table.data,
        np.asarray(table.target_names)[table.target],
        features=[str(name) for name in table.feature_names],
        name=dataset,
        source=f"scikit-learn, {loader}",
    )
    train, validation, stop = (
        size if given is None else given
        for given in (options.get("train"), options.get("validation"), options.get("stop"))
    )
    return split_nodes(data, train=train, validation=validation, stop=stop, seed=options.get("seed", 0))


@checked(DataError)
def load_wine(**options: Unpack[TableOptions]) -> xr.Dataset:
    """Wines of three growers, as nodes of a graph without edges: 178 nodes, 13 features, 3 classes.

    Parameters
    ----------
    **options
        As in `TableOptions`.
    """
    return load_tabular_graph("wine", **options)


@checked(DataError)
def load_cancer(**options: Unpack[TableOptions]) -> xr.Dataset:
    """Breast tumours, benign and malignant, as nodes of a graph without edges: 569 nodes, 30 features, 2 classes.

    Parameters
    ----------
    **options
        As in `TableOptions`.
    """
    return load_tabular_graph("cancer", **options)


@checked(DataError)
def load_digits(**options: Unpack[TableOptions]) -> xr.Dataset:
    """Written digits, as nodes of a graph without edges: 1797 nodes, 64 features, 10 classes.

    Parameters
    ----------
    **options
        As in `TableOptions`.
    """
    return load_tabular_graph("digits", **options)


@checked(DataError)
def load_planetoid(
    dataset: str = "Cora",
    *,
    root: AnyPath | None = None,
    download: bool = False,
    normalise: bool = True,
    graph: bool = True,
    retained: Probability = 1.0,
    seed: Seed = 0,
) -> xr.Dataset:
    """Citation networks with the splits of Planetoid; half of its validation nodes are for early stopping.

    Parameters
    ----------
    dataset
        "Cora" (2708 nodes, 5278 edges), "Citeseer" (3327, 4552) or "Pubmed", in capitals or not.
    root
        Folder with ``<dataset>/raw/ind.<dataset>.x`` and so on; None for the folder of downloads.
    download
        Whether files that are absent may be downloaded into ``root``.
    normalise
        Whether to divide the features of every node by their sum.
    graph
        Whether to keep the edges.
    retained
        Fraction of edges that stay; not used without edges.
    seed
        Seed of the halving of the validation nodes and of the edges that go.

    Returns
    -------
    xr.Dataset
        As this module describes it; where edges were dropped, ``true_source`` and ``true_target`` have them all.

    Raises
    ------
    DataError
        If the name is unknown, files are absent or broken, or an option is out of range or not used.

    References
    ----------
    Yang, Z., Cohen, W. and Salakhutdinov, R. (2016). Revisiting semi-supervised learning with graph embeddings. ICML.
    """
    if dataset.lower() not in _PLANETOID:
        raise DataError(f"unknown data set {dataset!r} of Planetoid{hint(dataset, _PLANETOID.values())}")
    if not graph:
        refuse_unused(load_planetoid, "graph=False", retained=retained)
    name = _PLANETOID[dataset.lower()]
    files = [f"ind.{name.lower()}.{part}" for part in _PLANETOID_FILES]
    with _private_copy(name, "planetoid", root, files, download) as folder:
        item = import_pyg("datasets").Planetoid(folder, name)[0]
    x = item.x.numpy()
    if normalise:
        x = x / np.maximum(x.sum(axis=1, keepdims=True), 1)
    split = np.full(len(x), "", dtype="<U10")
    split[item.train_mask.numpy()] = "train"
    split[item.test_mask.numpy()] = "test"
    held = np.random.default_rng(seed).permutation(np.flatnonzero(item.val_mask.numpy()))
    split[held[: len(held) // 2]], split[held[len(held) // 2 :]] = "validation", "stop"
    ends = item.edge_index.numpy().T
    data = make_graph(
        x, item.y.numpy(), ends[ends[:, 0] < ends[:, 1]], split=split, name=name, source="Planetoid, read by PyG"
    ).assign_attrs(split=json.dumps({"train": "public", "test": "public", "validation": "halved", "seed": seed}))
    if not graph:
        return without_edges(data)
    return data if retained == 1 else corrupt(data, deleted=1 - retained, seed=seed)


@checked(DataError)
def load_tu(
    dataset: str = "IMDB-BINARY",
    *,
    root: AnyPath | None = None,
    download: bool = False,
    features: Literal["auto", "degree"] = "auto",
    deleted: Probability = 0.0,
    added: Added = 0.0,
    folds: Folds = 10,
    fold: Natural = 0,
    seed: Seed = 0,
) -> xr.Dataset:
    """Collections of labelled graphs from TU Dortmund, split into stratified folds.

    Parameters
    ----------
    dataset
        "IMDB-BINARY" (1000 graphs), "IMDB-MULTI" (1500), "MUTAG" (188), "REDDIT-BINARY" (2000), or any other.
    root
        Folder with ``<dataset>/raw/<dataset>_A.txt`` and so on, or with ``<dataset>.zip``; None for the folder of
        downloads.
    download
        Whether files that are absent may be downloaded into ``root``.
    features
        "auto" takes attributes and labels of nodes where there are any, else degrees; "degree" takes degrees.
        Degrees are those of the observed edges, noise included: a column for each, or the standardised degree where
        one is 1000 or more.
    deleted, added
        Noise, as in `corrupt`.
    folds, fold
        As in `split_graphs`.
    seed
        Seed of folds and noise.

    Raises
    ------
    DataError
        If files are absent or broken, or options out of range.

    References
    ----------
    Morris, C. et al. (2020). TUDataset: a collection of benchmark datasets for learning with graphs.
    https://arxiv.org/abs/2007.08663
    """
    if not re.fullmatch(r"\w[\w.-]{0,99}", dataset):
        raise DataError(f"dataset={dataset!r}; give a name as TU Dortmund writes it, such as 'MUTAG'")
    if fold >= folds:
        raise DataError(f"fold={fold} is out of range: choose 0 to {folds - 1}")
    files = [f"{dataset}_{part}.txt" for part in _TU_FILES]
    with _private_copy(dataset, "tu", root, files, download) as folder:
        items = list(import_pyg("datasets").TUDataset(folder, dataset, use_node_attr=True))
    if not items:
        raise DataError(f"the files of {dataset} hold no graph; copy them anew")
    given = items[0].x is not None and features == "auto"
    sizes = np.array([item.num_nodes for item in items])
    ends = np.concatenate(
        [item.edge_index.numpy().T + start for item, start in zip(items, np.cumsum(sizes) - sizes, strict=True)]
    )
    data = make_graph(
        np.concatenate([item.x.numpy() for item in items]) if given else None,
        np.array([int(item.y) for item in items]),
        np.unique(np.sort(ends, axis=1), axis=0),
        graph=np.repeat(np.arange(len(items)), sizes),
        name=dataset,
        source="TU Dortmund, read by PyG",
    )
    data = split_graphs(data, folds=folds, fold=fold, seed=seed)
    return corrupt(data, deleted=deleted, added=added, seed=seed) if deleted or added else data


# ------------------------------------------------------------------------------------------------------- reading


@contextlib.contextmanager
def _private_copy(name: str, family: str, root: AnyPath | None, files: list[str], download: bool) -> Iterator[str]:
    """A folder with links to the raw files, where PyG may write; it is gone afterwards."""
    where = _root(root, family)
    with tempfile.TemporaryDirectory(prefix="probmodels-") as folder:
        raw = Path(folder) / name / "raw"
        raw.mkdir(parents=True)
        found = _raw_folder(where, name, files)
        archive = where / f"{name}.zip"
        packed = os.path.isfile(archive)
        if found is not None:
            for path in found.iterdir():
                _link(path, raw / path.name)
        elif packed:
            _extract(archive, raw, files)
        elif not download:
            raise DataError(
                f"{name} is not at {where / name / 'raw'}: put {files[0]}, {files[1]}, ... there"
                f"{f', or {name}.zip into {where}' if family == 'tu' else ''}, name another folder by root=, or allow "
                "a download by download=True"
            )
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # PyG reports every step
                yield folder
        except DataError:
            raise
        except Exception as error:
            task = "download" if found is None and not packed else "read the files of"
            raise DataError(f"PyG could not {task} {name}: {type(error).__name__}: {error}; see {where}") from error
        if found is None and not packed:
            try:
                shutil.copytree(raw, where / name / "raw", dirs_exist_ok=True)
            except (OSError, shutil.Error) as error:
                raise DataError(f"cannot write {name} to {where} ({error}); name another folder by root=") from error


def _root(root: AnyPath | None, family: str) -> Path:
    if root is not None:
        text = os.path.expanduser(os.fspath(root))
        if os.path.isfile(text):
            raise DataError(f"root: {text} is a file; name the folder that it lies in")
        return Path(text)
    from probmodels.datasets.fetch import cache_folder

    return cache_folder() / family


def _raw_folder(where: Path, name: str, files: list[str]) -> Path | None:
    """The folder with the raw files of a data set, whose name may be written in capitals or not."""
    if os.path.isdir(where):
        for folder in sorted(where.iterdir()):
            if folder.name.lower() == name.lower() and all((folder / "raw" / file).exists() for file in files):
                return folder / "raw"
    return None


def _link(path: Path, link: Path) -> None:
    try:
        link.symlink_to(path.resolve())
    except OSError:  # systems where links need rights
        shutil.copy(path, link)


def _extract(archive: Path, raw: Path, files: list[str]) -> None:
    """The text files of an archive, whatever folder they lie in."""
    try:
        with zipfile.ZipFile(archive) as packed:
            for member in packed.namelist():
                if member.endswith(".txt"):
                    (raw / Path(member).name).write_bytes(packed.read(member))
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError) as error:  # the last: locked by a password
        raise DataError(f"{archive} is no zip archive; download it again ({error})") from error
    absent = [file for file in files if not (raw / file).exists()]
    if absent:
        raise DataError(f"{archive} lacks {', '.join(absent)}; is it the archive of this data set?")
