"""Views of the same things in two or more modalities: rows that belong together, some of which may lack a modality.

The dims of a view say its kind: vectors (row, <name>_feature), pictures (row, <name>_channel, <name>_row,
<name>_column), or texts (row, <name>_token) of codes of words, 0 for none, with the words as <name>_word. A spectrogram
is a picture.

Data set ``digit_halves`` cuts scikit-learn's digits in two: the halves of an image are two views of it.

References
----------
Alpaydin, E. and Kaynak, C. (1998). Optical recognition of handwritten digits. UCI Machine Learning Repository.
https://doi.org/10.24432/C50P49
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import xarray as xr
from annotated_types import Len
from numpy.typing import NDArray

from probmodels.datasets.checks import as_array
from probmodels.datasets.labelled import labels_of
from probmodels.datasets.paired.words import encode
from probmodels.errors import DataError
from probmodels.options import Count, Fraction, OneOf, Seed, checked, refuse_unused

__all__ = ["KINDS", "Classes", "check_views", "kind_of", "load_digit_halves", "make_views", "read_rows"]

KINDS = {"vectors": ("feature",), "pictures": ("channel", "row", "column"), "texts": ("token",)}  # kind to its axes
Classes = Annotated[Sequence[str], Len(2)]
_CHANNELS = (1, 2, 3, 4)

_TAKEN = (
    "file",
    "key",
    "label",
    "modality",
    "present",
    "row",
    "split",
    "temperature",
)  # names that no modality can have


@checked(DataError)
def load_digit_halves(
    cut: Literal["columns", "rows"] = "columns", *, held_out: Fraction = 0.25, seed: Seed = 0
) -> xr.Dataset:
    """Halves of the 1797 digits of scikit-learn as two views of them.

    Parameters
    ----------
    cut
        ``"columns"`` for modalities ``left`` and ``right``, ``"rows"`` for ``upper`` and ``lower``.
    held_out
        Share of the rows that are held out.
    seed
        Seed of their choice.

    Returns
    -------
    xr.Dataset
        As `make_views` returns it, with digits as labels.
    """
    from sklearn.datasets import load_digits

    table = load_digits()
    axis, names = (2, ("left", "right")) if cut == "columns" else (1, ("upper", "lower"))
    halves = (half.reshape(len(half), -1) for half in np.split(table.images / 16.0, 2, axis=axis))
    views = dict(zip(names, halves, strict=True))
    return make_views(views, label=table.target, held_out=held_out, seed=seed)


@checked(DataError)
def make_views(
    views: Mapping[str, Any],
    *,
    kinds: Mapping[str, Annotated[str, OneOf(KINDS)]] | None = None,
    present: Any = None,
    label: Any = None,
    classes: Classes | None = None,
    split: Any = None,
    held_out: Fraction = 0.2,
    min_count: Count = 1,
    seed: Seed = 0,
) -> xr.Dataset:
    """Modalities of the same rows as labelled data.

    Parameters
    ----------
    views
        Name to rows of each modality, in the same order: numbers (row, feature); pictures (row, row, column), (row,
        channel, row, column) or (row, row, column, channel), of up to four channels; or texts (row,). Tables of pandas
        are (row, feature).
    kinds
        Name to ``"vectors"``, ``"pictures"`` or ``"texts"`` where the shape does not say it: pictures that are to be
        read as vectors, and codes (row, token) of words, which are whole numbers, 0 for none.
    present
        Whether a row has a modality (row, modality), in the order of ``views``; None if all have all. A modality may
        then hold only the rows that have it, in their order; of the other rows its values are not read.
    label
        Classes of the rows (row,), for diagnostics alone; None for none.
    classes
        Classes that there are; a label that is none of them is an error. None for those that occur.
    split
        ``"train"`` or ``"test"`` for each row; None for a random choice.
    held_out
        Share of the rows that are held out if ``split`` is None.
    min_count
        How often a word of a text has to occur in rows to learn from; rarer ones are left out.
    seed
        Seed of the choice of rows.

    Returns
    -------
    xr.Dataset
        A variable for each modality, with dims as the module says, ``present`` (row, modality), ``split`` (row), and
        ``label`` (row) as text where it is known.

    Raises
    ------
    DataError
        If lengths or labels of rows differ, values are not finite, rows are all zero, a text has no words, a label is
        missing or none of the classes, or nothing is held out.
    """
    names = [str(name) for name in views]
    for name in names:
        if not name.isidentifier() or name in _TAKEN or "_to_" in name:
            raise DataError(f"modality {name!r}; give a name like 'image', none of {', '.join(_TAKEN)}, without '_to_'")
    if len(names) < 2:
        raise DataError(f"{len(names)} modalities; give two or more by name, as {{'image': ..., 'text': ...}}")
    arrays = {name: _with_axes(name, values) for name, values in zip(names, views.values(), strict=True)}
    kind = {name: _kind(name, array, kinds or {}) for name, array in arrays.items()}
    if unknown := [name for name in kinds or {} if name not in kind]:
        raise DataError(f"kinds names {unknown[0]!r}, which is no modality; choose among {', '.join(names)}")
    if "texts" not in kind.values():
        refuse_unused(make_views, "no texts", min_count=min_count)
    if split is not None:
        refuse_unused(make_views, "split", held_out=held_out, seed=seed)
    seen = _present(arrays, present)
    count = len(seen)
    _check_rows({name: views[name] for name in views if len(arrays[str(name)]) == count})
    split_of = _split(split, count, held_out, seed)
    found = xr.Dataset(
        {"present": (("row", "modality"), seen.astype(np.int8)), "split": ("row", split_of)}, coords={"modality": names}
    )
    for place, name in enumerate(names):
        there = seen[:, place]
        values = _spread(arrays[name], there)
        if kind[name] == "texts":
            values, words = encode(values, name, there, split_of == "train", min_count)
            found = found.assign_coords({f"{name}_word": words})
        else:
            values = _numbers(name, kind[name], values, there)
        found[name] = (("row", *(f"{name}_{axis}" for axis in KINDS[kind[name]])), values)
    if label is not None:
        found["label"] = ("row", _classes(label, count, classes))
    else:
        refuse_unused(make_views, "no label", classes=classes)
    check_views(found)
    return found


def kind_of(view: xr.DataArray) -> str:
    """Kind of a view by its dims, one of `KINDS`.

    Raises
    ------
    DataError
        If it has the dims of none.
    """
    for kind, axes in KINDS.items():
        if view.dims == ("row", *(f"{view.name}_{axis}" for axis in axes)):
            return kind
    raise DataError(
        f"modality {view.name!r} has the dims {', '.join(map(str, view.dims))}, which no kind of view has; make the "
        "data with datasets.paired.views.make_views"
    )


def check_views(data: xr.Dataset) -> None:
    """Check that data are views as `make_views` returns them.

    Raises
    ------
    DataError
        If something is missing, values are not finite, a row is empty, or nothing is held out.
    """
    lacking = [name for name in ("present", "split") if name not in data]
    if lacking or "modality" not in data.coords:
        raise DataError(
            f"the data lack {', '.join(lacking) or 'modality'}; make them with datasets.paired.views.make_views"
        )
    names = [str(name) for name in data["modality"].values]
    absent = [name for name in names if name not in data]
    if absent:
        raise DataError(f"the data lack the modality {absent[0]!r}; make them with datasets.paired.views.make_views")
    for name in names:
        _check_view(data, name)
    for part in ("train", "test"):
        if not (data["split"].values == part).any():
            raise DataError(f"no row has split={part!r}; the verdict needs rows to learn from and rows held out")


def _check_view(data: xr.Dataset, name: str) -> None:
    kind = kind_of(data[name])
    seen = data["present"].sel(modality=name).values.astype(bool)
    values = data[name].values[seen].reshape(seen.sum(), -1)
    if not np.isfinite(values).all():
        row = np.flatnonzero(seen)[np.argwhere(~np.isfinite(values))[0, 0]]
        raise DataError(
            f"modality {name!r} is not finite everywhere, as in row {row}; mark rows that lack it by present"
        )
    if kind == "texts":
        words = data.sizes.get(f"{name}_word", 0)
        if values.dtype.kind not in "iu" or (values.size and (values.min() < 0 or values.max() >= words)):
            raise DataError(f"modality {name!r} holds codes of none of its {words} words; make it with make_views")
    empty = np.flatnonzero(seen)[(values == 0).all(1)]
    if len(empty) and kind != "pictures":  # one may be black
        what = "an empty caption" if kind == "texts" else "such a row"
        raise DataError(
            f"modality {name!r} is all zero in {len(empty)} rows, as row {empty[0]}: {what} says nothing; drop such "
            "rows, or mark by present that they lack it"
        )


def read_rows(name: str, kind: str, values: NDArray[Any], num_words: int) -> NDArray[Any]:
    """Other rows of a modality, with the axes that `make_views` gives them.

    Parameters
    ----------
    name, kind
        Of the modality.
    values
        Vectors, pictures, or codes of words.
    num_words
        Codes that there are, for texts.

    Raises
    ------
    DataError
        If they are not of this kind, not finite, or no codes of words.
    """
    as_array(values, f"rows of {name!r}", numbers=True)
    if values.ndim < 2 or not values.size:
        raise DataError(f"rows of {name!r} have the shape {values.shape}; give rows of one or more numbers")
    if kind != "texts":
        if not np.isfinite(values).all():
            raise DataError(f"rows of {name!r} are not finite everywhere")
        return _numbers(name, kind, values, np.ones(len(values), dtype=bool))
    if values.ndim != 2 or values.dtype.kind not in "iu" or values.min() < 0 or values.max() >= num_words:
        raise DataError(f"rows of {name!r} are no texts, and no codes (row, token) of its {num_words} words")
    return values


def _with_axes(name: str, values: Any) -> NDArray[Any]:
    array = as_array(values, f"modality {name!r}")
    if not array.ndim or not array.size:
        raise DataError(f"modality {name!r} has shape {array.shape}; give rows of one or more numbers, or texts")
    return array


def _kind(name: str, array: NDArray[Any], kinds: Mapping[str, str]) -> str:
    """Kind of a modality: as given, or by the number of its axes."""
    if array.dtype.kind not in "fiub":
        if array.ndim == 1 and array.dtype.kind in "UO" and kinds.get(name, "texts") == "texts":
            return "texts"
        as_array(array, f"modality {name!r}", numbers=True)
    if array.ndim == 1 or array.ndim > 4:
        raise DataError(f"modality {name!r} has shape {array.shape}; give rows of one or more numbers, or texts")
    return kinds.get(name, "vectors" if array.ndim == 2 else "pictures")


def _numbers(name: str, kind: str, array: NDArray[Any], there: NDArray[np.bool_]) -> NDArray[Any]:
    """Vectors (row, feature) or pictures (row, channel, row, column), zero in rows that lack them."""
    found = np.where(there.reshape(-1, *[1] * (array.ndim - 1)), array, 0)
    if kind == "vectors":
        return found.reshape(len(found), -1).astype(float)
    if found.ndim == 2:
        raise DataError(f"modality {name!r} has shape {array.shape}; pictures are (row, row, column), or have channels")
    if found.ndim == 4 and found.shape[1] not in _CHANNELS:
        found = np.moveaxis(found, -1, 1)
    if found.ndim == 4 and found.shape[1] not in _CHANNELS:
        raise DataError(
            f"modality {name!r} has shape {array.shape}; pictures have up to {_CHANNELS[-1]} channels, as the second "
            f"axis or the last; read as vectors they may have any shape: kinds={{{name!r}: 'vectors'}}"
        )
    return (found if found.ndim == 4 else found[:, None]).astype(np.float32)


def _classes(label: Any, count: int, classes: Sequence[str] | None) -> NDArray[np.str_]:
    """Classes of the rows as text."""
    found = as_array(label, "label")
    if found.shape != (count,):
        raise DataError(f"label has shape {found.shape}; give one for each of the {count} rows")
    lost = [row for row, one in enumerate(found.tolist()) if one is None or one != one]
    if lost:
        raise DataError(f"label of row {lost[0]} is missing ({len(lost)} in all); give each row a class, or no labels")
    texts: NDArray[np.str_] = found.astype(str)
    for row in [] if classes is None else np.flatnonzero(~np.isin(texts, list(classes))):
        raise DataError(f"label {str(texts[row])!r} of row {row} is none of the classes {', '.join(classes or ())}")
    return texts


def _present(arrays: Mapping[str, NDArray[Any]], present: Any) -> NDArray[np.bool_]:
    """Whether a row has a modality (row, modality)."""
    lengths = {name: len(array) for name, array in arrays.items()}
    if present is None:
        if len(set(lengths.values())) > 1:
            said = ", ".join(f"{name!r} {length}" for name, length in lengths.items())
            raise DataError(f"modalities have different numbers of rows ({said}); say by present which rows lack one")
        return np.ones((next(iter(lengths.values())), len(arrays)), dtype=bool)
    seen = as_array(present, "present", numbers=True)
    if seen.ndim != 2 or seen.shape[1] != len(arrays) or not np.isin(seen, (0, 1)).all():
        raise DataError(
            f"present has shape {seen.shape}; give true or false (row, modality) of {len(arrays)} modalities"
        )
    for place, (name, length) in enumerate(lengths.items()):
        if length not in (len(seen), int(seen[:, place].sum())):
            raise DataError(
                f"modality {name!r} has {length} rows; present has {len(seen)}, of which "
                f"{int(seen[:, place].sum())} have it"
            )
    return seen.astype(bool)


def _check_rows(views: Mapping[str, Any]) -> None:
    """Refuse rows that are labelled otherwise in one modality than in another."""
    labels = {name: found for name, view in views.items() if (found := _labels(view)) is not None}
    first = next(iter(labels), None)
    for name, found in labels.items():
        if first is not None and not found.equals(labels[first]):
            raise DataError(f"rows of {name!r} are labelled otherwise than those of {first!r}; put them in one order")


def _labels(view: Any) -> Any:
    """Labels of the rows of a view; None for none."""
    if isinstance(view, xr.DataArray):
        dim = view.dims[0] if view.dims else None
        return view.indexes.get(dim, None)
    return labels_of(view, "row", 0)


def _spread(array: NDArray[Any], there: NDArray[np.bool_]) -> NDArray[Any]:
    """All rows, from all of them or from those that have the modality."""
    if len(array) == len(there):
        return array
    found = np.zeros((len(there), *array.shape[1:]), dtype=array.dtype)
    found[there] = array
    return found


def _split(split: Any, count: int, held_out: float, seed: int) -> NDArray[Any]:
    if split is None:
        found = np.full(count, "train", dtype="<U5")
        found[np.random.default_rng(seed).permutation(count)[: round(held_out * count)]] = "test"
        return found
    given = as_array(split, "split").astype(str)
    if given.shape != (count,) or not np.isin(given, ("train", "test")).all():
        raise DataError(f"split has shape {given.shape}; give 'train' or 'test' for each of the {count} rows")
    return given
