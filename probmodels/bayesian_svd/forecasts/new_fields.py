"""Times and cells of new fields beside those of a result: steps after the record, cells in the order of the fit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

from probmodels.bayesian_svd.effects import time_in_years
from probmodels.datasets.calendars import frequency, month_number
from probmodels.datasets.cells import to_matrix
from probmodels.datasets.labelled import arranged
from probmodels.errors import DataError, SummaryError

__all__ = ["check_regular", "later_times", "new_matrix", "positions"]

Array = NDArray[np.float64]

_NEAR = 0.15  # of a step: months and years differ in length
_SAME = ("units", "kind", "base_period", "season", "frequency")  # attributes that new fields share with those fitted


# -- times ------------------------------------------------------------------------------------------------------------


def positions(time: xr.DataArray, later: xr.DataArray) -> tuple[Array, Array]:
    """Both axes in units of the usual step of the first, whole numbers where they are near some."""
    values, others = time.values, later.values
    if values.dtype.kind != others.dtype.kind and "M" in (values.dtype.kind, others.dtype.kind):
        raise DataError(f"the new times hold {others.dtype} values, where those of the fit hold {values.dtype}")
    kind = frequency(values) if values.dtype.kind == "M" else "other"
    if kind in ("monthly", "yearly"):
        unit = 1.0 if kind == "monthly" else 12.0
        own, new = month_number(values) / unit, month_number(others) / unit
    else:
        own, new = time_in_years(time), time_in_years(later)
        unit = float(np.median(np.diff(own)))
        own, new = (own - own[-1]) / unit, (new - own[-1]) / unit
    zero = own[-1]
    own, new = own - zero, new - zero
    return _whole(own), _whole(new)


def _whole(positions: Array) -> Array:
    near = positions.round()
    return np.where(np.abs(positions - near) < _NEAR, near, positions)


def check_regular(own: Array, new: Array) -> None:
    """Check that times are whole steps apart."""
    for name, place in (("times of the fit", own), ("new times", new)):
        off = place != place.round()
        if off.any():
            raise SummaryError(
                f"{int(off.sum())} of the {place.size} {name} are no whole number of steps from the last one of the "
                f"fit, the first at index {int(np.argmax(off))}; bring both to means over the same regular steps"
            )


def later_times(time: xr.DataArray, steps: int) -> xr.DataArray:
    """The times that follow at the usual step of an axis: calendar months or years where they are that far apart."""
    values = time.values
    if values.dtype.kind != "M":
        found: Any = values[-1] + np.median(np.diff(values)) * np.arange(1, steps + 1)
    else:
        kind = frequency(values)
        last = pd.Timestamp(values[-1])
        if kind in ("monthly", "yearly"):
            unit = "months" if kind == "monthly" else "years"
            try:
                dates = [last + pd.DateOffset(**{unit: step}) for step in range(1, steps + 1)]
            except pd.errors.OutOfBoundsDatetime as error:
                raise SummaryError(
                    f"{steps} steps after {last.date()} are beyond the calendar of NumPy, 2262"
                ) from error
            found = np.array(dates, dtype=values.dtype)
        else:
            found = values[-1] + np.median(np.diff(values).astype(np.int64)).astype(int) * np.arange(1, steps + 1)
    return xr.DataArray(found, dims="time", coords={"time": found}, name="time", attrs=time.attrs)


# -- cells ------------------------------------------------------------------------------------------------------------


def new_matrix(new: xr.DataArray, constant: xr.Dataset) -> xr.DataArray:
    """A new field as (cell, time), cells in the order of the fit, times ascending.

    Raises
    ------
    DataError
        If cells of the fit are missing, times are repeated, values infinite, or the field says of itself that it is of
        other units, another base period or season than the one fitted.
    """
    _check_kind(new, constant["data"])
    if {"lat", "lon"} <= set(new.dims):
        full = new.assign_coords(ocean=(("lat", "lon"), np.ones((new.sizes["lat"], new.sizes["lon"]), dtype=bool)))
        new = to_matrix(full)
    if "time" not in new.dims or new.ndim != 2:
        raise DataError(f"the new field has dims {tuple(map(str, new.dims))}; give (cell, time) or (time, lat, lon)")
    if "time" not in new.coords:
        raise DataError("the new field has no coordinate 'time'; give the dates of its months")
    if not new["time"].size:
        raise DataError("the new field holds no time")
    cell = next(str(dim) for dim in new.dims if dim != "time")
    new = new.transpose(cell, "time").sortby("time")
    values = _same_cells(new, constant).astype(float)
    if np.isinf(values).any():
        raise DataError(f"the new field holds {int(np.isinf(values).sum())} infinite entries; mark gaps by NaN")
    if len(np.unique(new["time"].values)) < new["time"].size:
        raise DataError("times of the new field are repeated; give each once")
    return xr.DataArray(values, dims=("cell", "time"), coords={"time": new["time"].values})


def _check_kind(new: xr.DataArray, data: xr.DataArray) -> None:
    """Check that a field is of the same units, base period and season as the data, as far as both say so."""
    for name in _SAME:
        own, other = str(data.attrs.get(name, "")), str(new.attrs.get(name, ""))
        if own and other and own != other:
            raise DataError(
                f"the new field has {name}={other!r}, where the fit had {own!r}; load it with the options of the fit "
                f"(load_sst(..., base_period=...) with the base period of the fit, and the same season)"
            )


def _same_cells(new: xr.DataArray, constant: xr.Dataset) -> NDArray[Any]:
    """Values (cell, time) of the cells of the fit, found by latitude and longitude where both have them, or label."""
    wanted, have = _places(constant), _places(new)
    if wanted is not None and have is not None:
        place = {key: index for index, key in enumerate(have)}
        if missing := [key for key in wanted if key not in place]:
            north, east = missing[0]
            raise DataError(
                f"the new field lacks {len(missing)} of the {len(wanted)} cells of the fit, the first at {north:g} N, "
                f"{east:g} E; give all of them, NaN where there is no value"
            )
        return np.asarray(new.values[[place[key] for key in wanted]])
    values = np.asarray(arranged(new, "the new field", {"cell": constant["cell"].values, "time": None}))
    if len(values) != constant.sizes["cell"]:
        raise DataError(f"the new field has {len(values)} cells, where the fit has {constant.sizes['cell']}")
    return values


def _places(cells: xr.Dataset | xr.DataArray) -> list[tuple[float, float]] | None:
    """Latitude and longitude of each cell; None where they are not known."""
    if not {"lat", "lon"} <= set(cells.coords):
        return None
    lat, lon = cells["lat"].values.astype(float), cells["lon"].values.astype(float) % 360
    return list(zip(lat.round(3).tolist(), (lon.round(3) % 360).tolist(), strict=True))
