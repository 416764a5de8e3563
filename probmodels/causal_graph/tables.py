"""Tables of labelled concepts, as methods that learn graphs take them."""

from __future__ import annotations

import reprlib
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import ArrayLike, NDArray

from probmodels.datasets.labelled import arranged
from probmodels.errors import DataError, ProbmodelsError

__all__ = ["complete_labels", "kept_labels", "refuse_few_values", "rows_given"]

_FEWEST_ROWS = 10
_FEWEST_VALUES = 10


def complete_labels(data: xr.Dataset | xr.DataArray | pd.DataFrame) -> xr.DataArray:
    """Labels (data, concept) of the training rows that have all of them.

    Parameters
    ----------
    data
        A data set with ``label`` (data, concept), of which rows with ``split`` other than ``"train"`` are left out; an
        array of these dims; or a frame whose columns are concepts.

    Raises
    ------
    DataError
        If there are no such labels, fewer than 10 complete rows, fewer than 2 concepts, or a concept is constant,
        infinite, or named twice.
    """
    if isinstance(data, pd.DataFrame):
        table = _from_frame(data)
    elif isinstance(data, xr.Dataset):
        if "label" not in data:
            raise DataError(f"data hold {list(data.data_vars)}; name the concepts' values 'label' (data, concept)")
        table = data["label"]
        if "split" in data:
            table = table[(data["split"] == "train").values]
    else:
        table = data
    if set(table.dims) != {"data", "concept"}:
        raise DataError(f"labels have dims {table.dims}; expected data and concept")
    table = table.transpose("data", "concept").astype(np.float64)
    for dim in table.dims:
        if dim not in table.coords:
            table = table.assign_coords({dim: np.arange(table.sizes[dim])})
    names = pd.Index(table["concept"].values.astype(str))
    if len(names) < 2:
        raise DataError(f"data have {len(names)} concepts; a graph needs at least 2")
    if not names.is_unique:
        raise DataError(f"concept {names[names.duplicated()][0]!r} occurs twice; give each a name of its own")
    complete = table[~np.isnan(table.values).any(1)]
    if len(complete) < _FEWEST_ROWS:
        raise DataError(f"{len(complete)} of {len(table)} rows have all labels; give at least {_FEWEST_ROWS}")
    values = complete.values
    if not np.isfinite(values).all():
        raise DataError("labels hold infinite values; drop their rows")
    constant = np.ptp(values, axis=0) <= 1e-12 * np.abs(values).max(0)
    if constant.any():
        raise DataError(f"concept {names[constant.argmax()]!r} is constant; leave it out")
    return complete.reset_coords(drop=True).rename(None).assign_coords(concept=list(names))


def kept_labels(data: xr.Dataset | xr.DataArray | pd.DataFrame, labels: xr.DataArray) -> xr.Dataset:
    """What a problem keeps of its data: the labels, and the true graph (cause, effect) where the data come with one."""
    names = labels["concept"].values
    kept: dict[str, Any] = {"label": labels}
    for name in ("graph", "true_graph"):
        if isinstance(data, xr.Dataset) and name in data:
            if set(data[name].dims) != {"cause", "effect"} or set(data[name].shape) != {len(names)}:
                raise DataError(
                    f"{name} has dims {dict(data[name].sizes)}; expected cause and effect, {len(names)} each"
                )
            axes = {"cause": names, "effect": names}
            kept["true_graph"] = (["cause", "effect"], arranged(data[name], name, axes))
    return xr.Dataset(kept, coords={"cause": names, "effect": names} if "true_graph" in kept else {})


def refuse_few_values(labels: xr.DataArray, caused: NDArray[np.bool_]) -> None:
    """Refuse concepts of few different values, which no continuous noise explains, where they may have causes.

    Parameters
    ----------
    labels
        (data, concept).
    caused
        Whether a concept may have causes (concept,).

    Raises
    ------
    DataError
        If a concept has fewer than 10 different values, and half as many as rows.
    """
    for name, values in zip(labels["concept"].values[caused], labels.values.T[caused], strict=True):
        number = len(np.unique(values))
        if number < _FEWEST_VALUES and 2 * number < len(values):
            raise DataError(
                f"concept {str(name)!r} has {number} different values; noise of a concept that may have causes has to "
                "be continuous, or directions are wrong and certain. If no other concept causes it, say so: tiers with "
                "it in the first group, before all others; for categories take probmodels.bayesian_network; or leave "
                "it out"
            )


def rows_given(given: ArrayLike, count: int, error: type[ProbmodelsError]) -> NDArray[np.int64]:
    """Places of rows, given as such or as truth values (data,).

    Raises
    ------
    ``error``
        If there is no such row.
    """
    rows = np.asarray(given)
    if rows.dtype == bool and rows.shape == (count,):
        return np.flatnonzero(rows)
    if rows.ndim != 1 or (rows.size and (rows.dtype.kind not in "iu" or rows.min() < 0 or rows.max() >= count)):
        raise error(
            f"given={reprlib.repr(given)}; give places of rows below {count}, or a truth value for each of them"
        )
    return rows.astype(np.int64)


def _from_frame(data: pd.DataFrame) -> xr.DataArray:
    bad = [str(name) for name, kind in data.dtypes.items() if kind.kind not in "iufb"]
    if bad:
        raise DataError(f"column {bad[0]!r} holds no numbers; leave it out, or give its categories numbers")
    coords = {"concept": [str(name) for name in data.columns], "data": np.arange(len(data))}
    return xr.DataArray(data.to_numpy(dtype=np.float64), dims=("data", "concept"), coords=coords)
