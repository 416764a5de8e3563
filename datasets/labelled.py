"""Arrays that carry labels, of xarray or pandas, put in the order that is wanted: by label, never by place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

from probmodels.errors import DataError, ProbmodelsError

__all__ = ["arranged", "arranged_together", "labels_of", "row_labels"]


def arranged(
    values: Any,
    name: str,
    dims: Mapping[str, Sequence[Any] | NDArray[Any] | pd.Index | None],
    *,
    error: type[ProbmodelsError] = DataError,
) -> Any:
    """Put axes and entries of a labelled array in the order that is wanted; other values come back as they are.

    Axes whose names are among those wanted go to their places; one of another name fills the place that is left, and
    so do those without names, in their order.
    Entries are then sorted by their labels. Labels that number the entries 0, 1, 2, ... in order, as those that pandas
    makes by itself, say nothing and are passed over where they are not the wanted ones.

    Parameters
    ----------
    values
        Array of xarray, frame or series of pandas, or anything else.
    name
        Name of the values, for messages.
    dims
        Names of the axes in the order that is wanted, each with the labels that are wanted along it; None for any.
    error
        What is raised.

    Returns
    -------
    array or Any
        An array of NumPy for labelled values; other values as they are.

    Raises
    ------
    ``error``
        If labels differ from those wanted, or are repeated, or several axes have other names.
    """
    if not isinstance(values, xr.DataArray | pd.DataFrame | pd.Series):
        return values
    own, axes = _axes(values)
    found: NDArray[Any] = np.asarray(values)
    if len(own) != len(dims):
        return found  # of the wrong number of axes, which the caller refuses
    strange = [dim for dim in own if dim not in dims and not dim.startswith("dim_")]
    if isinstance(values, xr.DataArray) and len(strange) > 1:
        raise error(
            f"{name} has the axes {', '.join(map(repr, own))}, where {', '.join(map(repr, dims))} are expected; rename "
            "them, or give an array without labels"
        )
    free = iter(place for place, dim in enumerate(own) if dim not in dims)
    order = [own.index(dim) if dim in own else next(free) for dim in dims]
    found = found.transpose(order)
    for axis, (dim, wanted) in enumerate(dims.items()):
        labels = axes[order[axis]]
        if wanted is None or labels is None:
            continue
        places = _places(labels, pd.Index(wanted), f"{name} along {dim!r}", error)
        found = found if places is None else found.take(places, axis)
    return found


def arranged_together(
    values: Mapping[str, Any], dims: Sequence[str], *, error: type[ProbmodelsError] = DataError
) -> list[Any]:
    """Put arrays of the same axes in the order of the first that carries labels, axis by axis, as `arranged` does.

    Parameters
    ----------
    values
        Arrays by name; None for those that are not given.
    dims
        Names of the axes.
    error
        What is raised.

    Raises
    ------
    ``error``
        If labels of one array differ from those of another, or are repeated.
    """
    wanted = {dim: row_labels(*values.values(), dim=dim, axis=axis) for axis, dim in enumerate(dims)}
    return [arranged(one, name, wanted, error=error) for name, one in values.items()]


def labels_of(values: Any, dim: str, axis: int = 0) -> pd.Index | None:
    """Labels of the axis of a name, or else of the one at a place; None where there are none that say anything."""
    if not isinstance(values, xr.DataArray | pd.DataFrame | pd.Series):
        return None
    own, axes = _axes(values)
    place = own.index(dim) if dim in own else axis
    labels = axes[place] if place < len(axes) else None
    return None if labels is None or _numbered(labels) else labels


def row_labels(*values: Any, dim: str = "data", axis: int = 0) -> pd.Index | None:
    """Labels, as of `labels_of`, of the first of some arrays that has any."""
    return next((found for one in values if (found := labels_of(one, dim, axis)) is not None), None)


def _axes(values: xr.DataArray | pd.DataFrame | pd.Series) -> tuple[list[str], list[pd.Index | None]]:
    """Names and labels of all axes."""
    if isinstance(values, xr.DataArray):
        own = [str(dim) for dim in values.dims]
        return own, [pd.Index(values[dim].values) if dim in values.coords else None for dim in values.dims]
    return [str(axis.name) for axis in values.axes], list(values.axes)


def _places(have: pd.Index, want: pd.Index, what: str, error: type[ProbmodelsError]) -> NDArray[np.intp] | None:
    """Places of the entries in the order that is wanted; None where they are in it, or labels say nothing."""
    if len(have) != len(want):
        if _numbered(have):
            return None  # the caller refuses the number
        raise error(f"{what} has {len(have)} labels, {_some(have)}, where {len(want)} are expected, {_some(want)}")
    if have.equals(want):
        return None
    if not (have.is_unique and set(have) == set(want)):
        have, want = have.astype(str), want.astype(str)
    if have.is_unique and want.is_unique and set(have) == set(want):
        return have.get_indexer(want)
    if _numbered(have) or _numbered(want):
        return None
    for labels in (have, want):
        if not labels.is_unique:
            again = labels[labels.duplicated()][0]
            raise error(
                f"{what}: the label {again!r} occurs more than once, in another order; give each one of its own"
            )
    strange = [label for label in have if label not in want]
    missing = [label for label in want if label not in have]
    where = f"{strange[0]!r} is not expected" if strange else f"{missing[0]!r} is missing"
    raise error(f"{what} has the labels {_some(have)}, where {_some(want)} are expected ({where}); "
                "give the same labels in any order, or an array without labels")  # fmt: skip


def _numbered(labels: pd.Index) -> bool:
    """Whether labels are 0, 1, 2, ... in order."""
    text = labels.astype(str)
    return bool((text == [str(place) for place in range(len(text))]).all())


def _some(labels: pd.Index) -> str:
    shown = ", ".join(map(repr, labels[:4].tolist()))
    return f"{shown}, ..." if len(labels) > 4 else shown
