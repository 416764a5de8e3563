"""Views of the same things in two or more modalities: rows that belong together, some of which may lack a modality.

Data set ``digit_halves`` cuts scikit-learn's digits in two: the halves of an image are two views of it.

References
----------
Alpaydin, E. and Kaynak, C. (1998). Optical recognition of handwritten digits. UCI Machine Learning Repository.
https://doi.org/10.24432/C50P49
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from probmodels.datasets.checks import as_array
from probmodels.datasets.labelled import labels_of
from probmodels.errors import DataError
from probmodels.options import Fraction, Seed, checked

__all__ = ["check_views", "load_digit_halves", "make_views"]

_TAKEN = ("label", "modality", "present", "row", "split", "temperature")  # names that no modality can have


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
    views = dict(zip(names, np.split(table.images / 16.0, 2, axis=axis), strict=True))
    return make_views(views, label=table.target, held_out=held_out, seed=seed)


@checked(DataError)
def make_views(
    views: Mapping[str, Any],
    *,
    present: Any = None,
    label: Any = None,
    split: Any = None,
    held_out: Fraction = 0.2,
    seed: Seed = 0,
) -> xr.Dataset:
    """Modalities of the same rows as labelled data.

    Parameters
    ----------
    views
        Name to array (row, ...) of each modality, rows in the same order. Further axes are flattened.
    present
        Whether a row has a modality (row, modality), in the order of ``views``; None if all have all. A modality may
        then hold only the rows that have it, in their order; of the other rows its values are not read.
    label
        Classes of the rows (row,), for diagnostics alone; None for none.
    split
        ``"train"`` or ``"test"`` for each row; None for a random choice.
    held_out
        Share of the rows that are held out if ``split`` is None.
    seed
        Seed of their choice.

    Returns
    -------
    xr.Dataset
        A variable (row, <name>_feature) for each modality, ``present`` (row, modality), ``split`` (row), and ``label``
        (row) as text where it is known.

    Raises
    ------
    DataError
        If lengths or labels of rows differ, values are not finite, rows are all zero, or nothing is held out.
    """
    arrays = {str(name): as_array(values, f"modality {name!r}", numbers=True) for name, values in views.items()}
    for name, array in arrays.items():
        if not name.isidentifier() or name in _TAKEN or "_to_" in name:
            raise DataError(f"modality {name!r}; give a name like 'image', none of {', '.join(_TAKEN)}, without '_to_'")
        if array.ndim < 2 or not array.size:
            raise DataError(f"modality {name!r} has shape {array.shape}; give rows of one or more numbers")
    if len(arrays) < 2:
        raise DataError(f"{len(arrays)} modalities; give two or more by name, as {{'image': ..., 'text': ...}}")
    seen = _present(arrays, present)
    count = len(seen)
    _check_rows({name: view for name, view in views.items() if len(arrays[name]) == count})
    split_of = _split(split, count, held_out, seed)
    found = xr.Dataset(
        {
            **{
                name: (("row", f"{name}_feature"), _filled(name, array, seen[:, place]))
                for place, (name, array) in enumerate(arrays.items())
            },
            "present": (("row", "modality"), seen.astype(np.int8)),
            "split": ("row", split_of),
        },
        coords={"modality": list(arrays)},
    )
    if label is not None:
        classes = as_array(label, "label")
        if classes.shape != (count,):
            raise DataError(f"label has shape {classes.shape}; give one for each of the {count} rows")
        found["label"] = ("row", classes.astype(str))
    check_views(found)
    return found


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
        seen = data["present"].sel(modality=name).values.astype(bool)
        values = data[name].values[seen]
        if not np.isfinite(values).all():
            raise DataError(f"modality {name!r} is not finite everywhere; mark rows that lack it by present")
        empty = np.flatnonzero(seen)[(values == 0).all(1)]
        if len(empty):
            raise DataError(
                f"modality {name!r} is all zero in {len(empty)} rows, as row {empty[0]}: an empty caption says "
                "nothing; drop such rows, or mark by present that they lack it"
            )
    for part in ("train", "test"):
        if not (data["split"].values == part).any():
            raise DataError(f"no row has split={part!r}; the verdict needs rows to learn from and rows held out")


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


def _filled(name: str, array: NDArray[Any], seen: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Values (row, feature), zero in rows that lack the modality."""
    flat = array.reshape(len(array), -1).astype(float)
    found = np.zeros((len(seen), flat.shape[1]))
    found[seen] = flat[seen] if len(flat) == len(seen) else flat
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
