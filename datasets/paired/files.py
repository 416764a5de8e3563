"""Views from files of the user's own: a folder of images with captions, and tables whose rows have a key in common."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import xarray as xr
from annotated_types import Len
from numpy.typing import NDArray

from probmodels.datasets.checks import AnyPath, existing_file, existing_folder
from probmodels.datasets.paired.views import KINDS, Classes, make_views
from probmodels.datasets.paired.words import words_of
from probmodels.datasets.reading.files import Pixels, read_images, read_table, want_columns
from probmodels.errors import DataError
from probmodels.options import Count, Fraction, OneOf, Seed, checked, refuse_unused

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["load_captioned_images", "load_paired_tables"]

_Column = Annotated[str, Len(1)]
_Tables = Annotated[Mapping[str, Any], Len(2)]


@checked(DataError)
def load_captioned_images(
    root: AnyPath,
    captions: Any = "captions.csv",
    *,
    file: _Column = "file",
    text: _Column = "text",
    label: _Column | None = None,
    classes: Classes | None = None,
    size: Pixels = 32,
    colour: bool = True,
    crop: bool = True,
    held_out: Fraction = 0.2,
    min_count: Count = 1,
    seed: Seed = 0,
) -> xr.Dataset:
    """A folder of images and a table with a caption for each.

    Parameters
    ----------
    root
        The folder.
    captions
        CSV or JSON file, in the folder or elsewhere, or data frame: column ``file`` of paths below the folder, column
        ``text`` of captions and, where there is one, column ``split`` of "train" and "test". A JSON file holds a list
        of such rows, or captions by path. Images without a caption are left out.
    file, text
        Names of these columns.
    label
        Column of classes, for diagnostics alone; None for none.
    classes
        Classes that there are; another label is an error. None for those that occur.
    size
        Pixels along a side.
    colour
        Whether to keep three channels, or one of brightness.
    crop
        Whether to cut images that are not square to the square in their middle, or else to squeeze them.
    held_out
        Share of the rows that are held out, chosen at random; not used where there is a column ``split``.
    min_count
        As in `make_views`.
    seed
        Seed of the choice; not used where nothing is chosen.

    Returns
    -------
    xr.Dataset
        As `make_views` returns it, with modalities ``image`` and ``text``, and the paths as ``file`` (row,).

    Raises
    ------
    DataError
        If files are absent, unreadable or listed twice, a caption has no words, a label is missing or none of the
        classes, nothing is held out, or an option is out of range or not used.
    """
    folder = existing_folder(root)
    if isinstance(captions, str | os.PathLike) and os.path.isfile(inside := folder / captions):
        captions = inside
    as_text = [file, text, *([label] if label else [])]
    rows, where = _read_json(captions, file, text) if _is_json(captions) else read_table(captions, "captions", as_text)
    want_columns(rows, as_text, where)
    rows = rows.reset_index(drop=True)
    _check_texts(rows, text, where)
    files = rows[file].astype(str).str.strip()
    if files.duplicated().any():
        raise DataError(
            f"{where} lists {files[files.duplicated()].iloc[0]!r} more than once; give each image one caption, such as "
            "all of them in one text"
        )
    absent = [name for name in files if not os.path.isfile(folder / name)]
    if absent:
        raise DataError(
            f"{where} has captions of {len(rows)} images, of which {len(absent)} are not in {folder}, such as "
            f"{absent[0]!r}; mend the path or drop the row"
        )
    split = _given_split(rows, where)
    if split is not None:
        refuse_unused(load_captioned_images, f"column 'split' of {where}", held_out=held_out, seed=seed)
    images = read_images([folder / name for name in files], size, colour, crop)
    data = make_views(
        {"image": images, "text": rows[text].tolist()},
        label=None if label is None else rows[label].to_numpy(),
        classes=classes,
        min_count=min_count,
        **({"held_out": held_out, "seed": seed} if split is None else {"split": split}),
    )
    return data.assign(file=("row", files.to_numpy(dtype=np.str_)))


@checked(DataError)
def load_paired_tables(
    tables: _Tables,
    key: _Column,
    *,
    kinds: Mapping[str, Annotated[str, OneOf(KINDS)]] | None = None,
    label: _Column | None = None,
    classes: Classes | None = None,
    held_out: Fraction = 0.2,
    min_count: Count = 1,
    seed: Seed = 0,
) -> xr.Dataset:
    """Two or more tables, each a modality, whose rows are joined by a key.

    Parameters
    ----------
    tables
        Name of each modality to a CSV file, a data frame, or a file ``.npz`` of NumPy with two arrays: one named as the
        key (row,), and another of vectors, pictures or texts, with rows as `make_views` takes them. A table holds
        columns of numbers, or one column of texts.
    key
        Column that says which rows belong together; it names a row of a table once. A row that is not in a table lacks
        that modality.
    kinds
        As in `make_views`.
    label
        Column of classes, in one table or more, for diagnostics alone; None for none. A column ``split`` of "train" and
        "test" is taken in the same way, where there is one.
    classes
        Classes that there are; another label is an error. None for those that occur.
    held_out
        Share of the rows that are held out, chosen at random; not used where there is a column ``split``.
    min_count
        As in `make_views`.
    seed
        Seed of the choice; not used where nothing is chosen.

    Returns
    -------
    xr.Dataset
        As `make_views` returns it, with the keys as ``key`` (row,).

    Raises
    ------
    DataError
        If a file or a column is absent, a key is missing or repeated, an entry is missing or no number, tables share no
        keys or differ in the label of a row, or an option is out of range or not used.
    """
    read = {str(name): _read_rows(table, str(name), key, label) for name, table in tables.items()}
    keys = list(dict.fromkeys(one for part in read.values() for one in part.keys))
    place = {one: row for row, one in enumerate(keys)}
    present = np.zeros((len(keys), len(read)), dtype=bool)
    for column, part in enumerate(read.values()):
        present[[place[one] for one in part.keys], column] = True
        if not any(set(part.keys) & set(other.keys) for other in read.values() if other is not part):
            raise DataError(
                f"no {key!r} of {part.where} is in another table, such as {part.keys[0]!r}; write keys alike in all"
            )
    order = {name: np.argsort([place[one] for one in part.keys]) for name, part in read.items()}
    split = _joined(read, "split", keys, place)
    if split is not None:
        refuse_unused(load_paired_tables, "column 'split'", held_out=held_out, seed=seed)
    labels = None if label is None else _joined(read, label, keys, place)
    if label is not None and labels is None:
        raise DataError(f"no table has the column {label!r} of labels")
    data = make_views(
        {name: part.values[order[name]] for name, part in read.items()},
        kinds=kinds,
        present=present,
        label=labels,
        classes=classes,
        min_count=min_count,
        **({"held_out": held_out, "seed": seed} if split is None else {"split": split}),
    )
    return data.assign(key=("row", np.array(keys, dtype=np.str_)))


class _Rows:
    """Rows of a table: keys, values (row, ...), columns of label and split where it has them, what to call it."""

    def __init__(self, keys: list[str], values: NDArray[Any], columns: dict[str, list[Any]], where: str) -> None:
        self.keys, self.values, self.columns, self.where = keys, values, columns, where
        lost = next((row for row, one in enumerate(keys) if one.strip() in ("", "nan", "None")), None)
        if lost is not None:
            raise DataError(f"{where}: row {lost} has no key; fill it, or drop the row")
        again = next((one for place, one in enumerate(sorted(keys)) if place and sorted(keys)[place - 1] == one), None)
        if again is not None:
            raise DataError(f"{where} has more than one row of key {again!r}; keep one")


def _read_rows(source: Any, name: str, key: str, label: str | None) -> _Rows:
    if isinstance(source, str | os.PathLike) and os.fspath(source).endswith(".npz"):
        return _read_npz(existing_file(source, f"table {name!r}"), key)
    rows, where = read_table(source, f"table {name!r}", [key, "split", *([label] if label else [])])
    want_columns(rows, [key], where)
    about = [column for column in ("split", label) if column is not None and column in rows.columns]
    features = [column for column in rows.columns if column not in (key, *about)]
    if not features:
        raise DataError(f"{where} has no columns beside {', '.join(map(repr, rows.columns))}")
    columns = {column: rows[column].tolist() for column in about}
    return _Rows(list(map(str, rows[key])), _values(rows, features, where), columns, where)


def _values(rows: pd.DataFrame, features: Sequence[str], where: str) -> NDArray[Any]:
    """Numbers (row, feature), or texts (row,) of a single column."""
    texts = [column for column in features if rows[column].map(lambda one: isinstance(one, str)).any()]
    if texts and len(features) > 1:
        raise DataError(
            f"{where}: column {texts[0]!r} holds texts, as {next(x for x in rows[texts[0]] if isinstance(x, str))!r}, "
            "beside other columns; encode it as numbers, leave it out, or give it a table of its own"
        )
    for column in features:
        lost = np.flatnonzero(rows[column].isna())
        if len(lost):
            raise DataError(
                f"{where}: column {column!r} of row {lost[0]} is empty ({len(lost)} in all); fill it, or drop the row, "
                "which then lacks this modality"
            )
    if texts:
        _check_texts(rows, texts[0], where)
        return rows[texts[0]].to_numpy(dtype=object)
    try:
        return rows[list(features)].to_numpy(dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{where} holds entries that are no numbers ({error}); encode them, or leave them out"
        ) from error


def _check_texts(rows: pd.DataFrame, column: str, where: str) -> None:
    """Check that every text has words."""
    for row, text in enumerate(rows[column]):
        if not isinstance(text, str) or not words_of(text):
            said = f"holds {text!r}" if isinstance(text, str) else "is empty"
            raise DataError(
                f"{where}: column {column!r} of row {row} {said}: an empty caption says nothing; write one, or drop "
                "the row"
            )


def _read_npz(path: Path, key: str) -> _Rows:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read as a file .npz of NumPy: {error}") from error
    others = [name for name in arrays if name != key]
    if key not in arrays or len(others) != 1:
        raise DataError(f"{path.name} holds the arrays {', '.join(map(repr, arrays))}; give {key!r} and one other")
    values = arrays[others[0]]
    if arrays[key].ndim != 1 or not values.ndim or len(values) != len(arrays[key]):
        raise DataError(
            f"{path.name}: {others[0]!r} has shape {values.shape} and {key!r} {arrays[key].shape}; give each row a key"
        )
    return _Rows(arrays[key].astype(str).tolist(), values, {}, path.name)


def _joined(
    read: Mapping[str, _Rows], column: str, keys: Sequence[str], place: Mapping[str, int]
) -> NDArray[Any] | None:
    """Entries of a column by key, from all tables that have it; None where none has."""
    found: list[Any] = [None] * len(keys)
    tables = [part for part in read.values() if column in part.columns]
    for part in tables:
        for one, value in zip(part.keys, part.columns[column], strict=True):
            known = found[place[one]]
            if known is not None and value == value and known != value:
                raise DataError(f"{part.where}: {column!r} of {one!r} is {value!r}, and {known!r} in another table")
            found[place[one]] = value if value == value else known
    lost = next((key for key, one in zip(keys, found, strict=True) if one is None), None)
    if tables and lost is not None:
        raise DataError(f"no table says {column!r} of the row {lost!r}; fill it, or drop the row")
    return np.array(found) if tables else None


def _given_split(rows: pd.DataFrame, where: str) -> NDArray[Any] | None:
    if "split" not in rows.columns:
        return None
    found = rows["split"].fillna("").astype(str).str.strip().to_numpy(dtype=np.str_)
    strange = np.flatnonzero(~np.isin(found, ("train", "test")))
    if len(strange):
        raise DataError(f"{where}: split of row {strange[0]} is {found[strange[0]]!r}; write 'train' or 'test'")
    return found


def _is_json(source: Any) -> bool:
    return isinstance(source, str | os.PathLike) and os.fspath(source).endswith(".json")


def _read_json(source: Any, file: str, text: str) -> tuple[pd.DataFrame, str]:
    """A table of a list of rows, or of captions by path."""
    import pandas as pd

    path = existing_file(source, "captions")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read as JSON: {error}") from error
    if isinstance(content, dict):
        content = [{file: name, text: caption} for name, caption in content.items()]
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise DataError(f"{path} holds a {type(content).__name__}; give a list of rows, or captions by path")
    if not content:
        raise DataError(f"{path.name} has no rows")
    return pd.DataFrame(content), path.name
