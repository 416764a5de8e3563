"""Concepts of the user's own: a folder of images with a table of labels, CelebA, and tables of concepts alone.

References
----------
Liu, Z., Luo, P., Wang, X. and Tang, X. (2015). Deep learning face attributes in the wild. ICCV. The data, for research
that is not commercial, are at https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import xarray as xr
from annotated_types import Len
from numpy.typing import NDArray

from probmodels.datasets.causal import Edges, as_graph, make_concepts, position_of, split_rows
from probmodels.datasets.checks import AnyPath, Share, existing_folder
from probmodels.datasets.reading.files import Pixels, read_images, read_table, want_columns
from probmodels.errors import DataError
from probmodels.options import Count, Natural, Seed, checked, refuse_unused

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["load_causal_table", "load_celeba", "load_concept_images"]

_Names = Annotated[Sequence[str], Len(1)]

_SUFFIXES = (".png", ".jpg", ".jpeg")
_PARTITION = {0: "train", 2: "test"}  # 1 is CelebA's validation, which is left out


@checked(DataError)
def load_concept_images(
    root: AnyPath,
    table: Any = "labels.csv",
    *,
    concepts: _Names | None = None,
    size: Pixels = 32,
    colour: bool = True,
    crop: bool = True,
    graph: Edges | None = None,
    file: str = "file",
    test: Share = 0.2,
    seed: Seed = 0,
) -> xr.Dataset:
    """A folder of PNG or JPEG images, and a table with a row of concept labels for each.

    Parameters
    ----------
    root
        The folder.
    table
        CSV file, in the folder or elsewhere, or data frame: column ``file`` of paths below the folder, columns of
        concepts, empty where not labelled, and, where there is one, column ``split`` of "train" and "test".
    concepts
        Columns to take; None for all that are left.
    size
        Pixels along a side.
    colour
        Whether to keep three channels, or one of brightness.
    crop
        Whether to cut images that are not square to the square in their middle, or else to squeeze them.
    graph
        Edges between concepts, as in `as_graph`; None where they are not known.
    file
        Column of the paths.
    test
        Share of rows for testing, chosen at random; not used where the table has a column ``split``.
    seed
        Seed of the choice; not used where nothing is chosen.

    Returns
    -------
    xr.Dataset
        As `make_concepts` returns it, with the paths as ``file`` (data,).

    Raises
    ------
    DataError
        If files are absent, unreadable, listed twice, or without a row in the table; labels cannot be used; or an
        option is out of range or not used.
    """
    folder = existing_folder(root)
    if isinstance(table, str | os.PathLike):
        inside = folder / table
        table = inside if os.path.isfile(inside) else table
    rows, where = read_table(table, "table", text=[file])
    want_columns(rows, [file], where)
    if "split" in rows.columns:
        refuse_unused(load_concept_images, f"column 'split' of {where}", test=test, seed=seed)
    names, labels = _labels(rows, concepts, where, leave=[file, "split"])
    if graph is not None:
        as_graph(graph, names)
    split = _split(rows, test, seed, load_concept_images)
    files = rows[file].astype(str).str.strip()
    if files.duplicated().any():
        raise DataError(f"{where} lists {files[files.duplicated()].iloc[0]!r} more than once; keep one row of labels")
    absent = [name for name in files if not os.path.isfile(folder / name)]
    if absent:
        raise DataError(
            f"{where} has labels of {len(rows)} images, of which {len(absent)} are not in {folder}, such as "
            f"{absent[0]!r}; mend the path or drop the row"
        )
    listed = {(folder / name).resolve() for name in files}
    found = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in _SUFFIXES]
    more = [path for path in found if path.resolve() not in listed]
    if more:
        raise DataError(
            f"{folder} has {len(found)} images, but {where} labels of {len(rows)}; there is no row for "
            f"{more[0].name!r}: add one, empty where its concepts are not known, or move the image"
        )
    data = make_concepts(
        read_images([folder / name for name in files], size, colour, crop),
        labels,
        names=names,
        split=split,
        graph=graph,
        name=folder.name,
        source=f"images of {folder.name}, labels of {where}",
    )
    return data.assign(file=("data", files.to_numpy(dtype=np.str_)))


@checked(DataError)
def load_celeba(
    root: AnyPath,
    *,
    concepts: _Names = ("Young", "Male", "Bald", "No_Beard"),
    size: Pixels = 64,
    num_train: Count | None = 10_000,
    num_test: Natural | None = 2_000,
    graph: Edges | None = None,
    seed: Seed = 0,
) -> xr.Dataset:
    """Faces of the user's own copy of CelebA with attributes, 0 or 1, as concepts.

    Parameters
    ----------
    root
        Folder with the folder ``img_align_celeba``, ``list_attr_celeba.txt`` and, where there is one,
        ``list_eval_partition.txt``; or with these as CSV files.
    concepts
        Attributes, by their names in the list.
    size
        Pixels along a side; images are cut to the square in their middle.
    num_train, num_test
        How many images of each, at most, chosen at random; None for all, which takes 12 bytes a pixel. They are from
        the parts for training and testing of the partition; without one, a tenth is for testing.
    graph
        Edges between concepts, as in `as_graph`.
    seed
        Seed of the choice.

    Returns
    -------
    xr.Dataset
        As `make_concepts` returns it, with ``file`` (data,).

    Raises
    ------
    DataError
        If files are absent or unreadable, or an attribute is unknown or constant.
    """
    if graph is not None:
        as_graph(graph, concepts)
    folder = existing_folder(root)
    images = folder / "img_align_celeba"
    images = images / images.name if (images / images.name).is_dir() else images
    if not images.is_dir():
        raise DataError(f"there is no folder {images}; root is what holds img_align_celeba")
    table = _celeba_list(folder, "list_attr_celeba")
    if table is None:
        raise DataError(f"{folder} holds neither list_attr_celeba.txt nor list_attr_celeba.csv")
    places = [position_of(name, list(table.columns)) for name in concepts]
    partition = _celeba_list(folder, "list_eval_partition")
    rng = np.random.default_rng(seed)
    if partition is None:
        splits = split_rows(len(table), len(table) - len(table) // 10, rng)
    else:
        missing = table.index.difference(partition.index)
        if len(missing):
            raise DataError(
                f"list_eval_partition of {folder} has no row for {missing[0]!r}, which list_attr_celeba has"
            )
        splits = partition.loc[table.index].iloc[:, 0].map(_PARTITION).fillna("").to_numpy(dtype=np.str_)
    chosen = [
        rng.permutation(np.flatnonzero(splits == part))[:count]
        for part, count in (("train", num_train), ("test", num_test))
    ]
    rows = np.concatenate(chosen)
    if not len(rows):
        raise DataError(f"{folder} has no images for training or testing by its lists")
    files = table.index[rows]
    data = make_concepts(
        read_images([images / name for name in files], size, colour=True, crop=True),
        (table.iloc[rows, places].to_numpy() > 0).astype(np.float64),  # -1 and 1 in the list
        names=concepts,
        split=splits[rows],
        graph=graph,
        name="celeba",
        source="CelebA, the user's copy",
    )
    return data.assign(file=("data", files.to_numpy(dtype=np.str_)))


@checked(DataError)
def load_causal_table(
    path: Any,
    *,
    concepts: _Names | None = None,
    observed: _Names | None = None,
    graph: Edges | None = None,
    test: Share = 0.2,
    seed: Seed = 0,
) -> xr.Dataset:
    """A table whose columns are concepts, observed as they are or through other columns.

    Parameters
    ----------
    path
        CSV file or data frame, of numbers; a column ``split`` holds "train" and "test", where there is one.
    concepts
        Columns that are concepts, empty where not labelled; None for all.
    observed
        Columns that are observed, all filled; None for those that are no concepts or, where there are none, for the
        concepts themselves.
    graph
        Edges between concepts, as in `as_graph`; None where they are not known.
    test
        Share of rows for testing, chosen at random; not used where the table has a column ``split``.
    seed
        Seed of the choice; not used where nothing is chosen.

    Returns
    -------
    xr.Dataset
        As `make_concepts` returns it.

    Raises
    ------
    DataError
        If the file or a column is absent, entries are no numbers, an observation is missing, or an option is out of
        range or not used.
    """
    rows, where = read_table(path, "path")
    if "split" in rows.columns:
        refuse_unused(load_causal_table, f"column 'split' of {where}", test=test, seed=seed)
    names, labels = _labels(rows, concepts, where, leave=["split"])
    features = observed or [name for name in map(str, rows.columns) if name not in (*names, "split")] or names
    features, values = _labels(rows, features, where, leave=["split"])
    empty = np.argwhere(~np.isfinite(values))
    if len(empty):
        row, column = empty[0]
        raise DataError(
            f"{where}: {features[column]!r} of row {row} is missing or infinite, and it is observed; fill it or drop "
            "the row, or name the columns that are observed by observed=[...]: concepts alone may be missing"
        )
    return make_concepts(
        values,
        labels,
        names=names,
        features=features,
        split=_split(rows, test, seed, load_causal_table),
        graph=graph,
        name=Path(path).stem if isinstance(path, str | os.PathLike) else "table",
        source=where,
    )


def _labels(
    rows: pd.DataFrame, names: Sequence[str] | None, where: str, leave: Sequence[str]
) -> tuple[list[str], NDArray[np.float64]]:
    """Names and numbers (row, column) of columns, by default of all but those to leave; empty cells are nan."""
    chosen = [name for name in rows.columns if name not in leave] if names is None else list(names)
    if not chosen:
        raise DataError(f"{where} has no columns of concepts beside {', '.join(map(repr, rows.columns))}")
    again = [name for place, name in enumerate(chosen) if name in chosen[:place]]
    if again:
        raise DataError(f"column {again[0]!r} of {where} is named more than once; name each column once")
    want_columns(rows, chosen, where)
    columns = []
    for name in chosen:
        try:
            columns.append(rows[name].to_numpy(dtype=np.float64, na_value=np.nan))
        except (TypeError, ValueError) as error:
            raise DataError(
                f"column {name!r} of {where} is no numbers ({error}); encode it, or leave it out"
            ) from error
    return chosen, np.stack(columns, axis=1)


def _split(rows: pd.DataFrame, test: float, seed: int, loader: Callable[..., Any]) -> NDArray[np.str_]:
    if "split" in rows.columns:
        return rows["split"].fillna("").astype(str).str.strip().to_numpy(dtype=np.str_)
    if not test:
        refuse_unused(loader, "test=0, where all rows are for training", seed=seed)
    return split_rows(len(rows), len(rows) - round(test * len(rows)), np.random.default_rng(seed))


def _celeba_list(folder: Path, stem: str) -> pd.DataFrame | None:
    """Rows of one of CelebA's lists by file name; None where the list is absent."""
    import pandas as pd

    path = next((p for p in (folder / f"{stem}.txt", folder / f"{stem}.csv") if p.is_file()), None)
    if path is None:
        return None
    try:
        if path.suffix == ".csv":
            return pd.read_csv(path, index_col=0)
        if stem == "list_attr_celeba":  # a count, then names of all columns but the first
            names = path.read_text().split("\n", 2)[1].split()
            return pd.read_csv(path, sep=r"\s+", skiprows=2, header=None, index_col=0, names=["file", *names])
        return pd.read_csv(path, sep=r"\s+", header=None, index_col=0)
    except (OSError, IndexError, ValueError) as error:
        raise DataError(f"{path} cannot be read as a list of CelebA: {error}; copy it anew") from error
