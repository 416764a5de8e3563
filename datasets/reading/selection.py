"""Which cells and times of a field are read: those of a region, on a grid or scattered, and of the periods needed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr

from probmodels.datasets.calendars import Period, Season, year_month
from probmodels.datasets.cells import cells_inside, mesh_attrs
from probmodels.datasets.gridded import as_slice, join, load_into_memory
from probmodels.datasets.regions import Region, arrange_longitudes, select_latitudes, select_longitudes
from probmodels.errors import DataError

__all__ = ["OnGrid", "Scattered", "check_periods", "needed_times"]


class OnGrid:
    """The cells of a rectangular grid in a region."""

    def __init__(self, first: xr.DataArray, box: Region | None, mends: list[str]) -> None:
        self._rows, columns, self._east = _cells(first["lat"].values, first["lon"].values, box, mends)
        self.shape, self.num = f"{len(self._rows)} x {len(columns)}", len(self._rows) * len(columns)
        self.sizes = {"lat": len(self._rows), "lon": len(columns)}
        # A box over the seam of the file is two runs.
        self._runs = np.split(columns, np.flatnonzero(np.diff(columns) != 1) + 1)

    def read(self, part: xr.DataArray) -> xr.DataArray:
        """Their values, in memory."""
        strip = part.isel(lat=as_slice(self._rows))
        return join([load_into_memory(strip.isel(lon=as_slice(run))) for run in self._runs], "lon")

    def labelled(self, field: xr.DataArray) -> xr.DataArray:
        """With longitudes from west to east."""
        return field.assign_coords(lon=self._east)


class Scattered:
    """The cells of a curvilinear grid or a list of stations in a region, as (time, cell)."""

    def __init__(self, first: xr.DataArray, box: Region | None, mends: list[str]) -> None:
        self._dims = first.dims[1:]
        self._places = {name: first[name].values for name in ("lat", "lon", "area")}
        lat = self._places["lat"]
        self._chosen = cells_inside(lat, self._places["lon"], box, mends)
        index = np.unravel_index(self._chosen, lat.shape)
        self._window = {dim: slice(i.min(), i.max() + 1) for dim, i in zip(self._dims, index, strict=True)}
        sizes = [window.stop - window.start for window in self._window.values()]
        self._inside = np.ravel_multi_index([i - i.min() for i in index], sizes)
        self.shape, self.num = " x ".join(map(str, sizes)), int(np.prod(sizes))
        self.sizes: dict[str, int] = {}
        self._index = [i - i.min() for i in index]
        window = tuple(self._window.values())
        self._mesh = (lat[window], self._places["lon"][window]) if len(sizes) == 2 and min(sizes) > 1 else None

    def read(self, part: xr.DataArray) -> xr.DataArray:
        """Their values, in memory."""
        window = load_into_memory(part.isel(self._window).drop_vars(["lat", "lon", "area"]))
        values = window.values.reshape(window.sizes["time"], -1)[:, self._inside]
        return xr.DataArray(values, {"time": part["time"]}, ("time", "cell"), name=part.name, attrs=part.attrs)

    def labelled(self, field: xr.DataArray) -> xr.DataArray:
        """With the place and area of each cell, and the part of a curvilinear grid that it is in."""
        field = field.assign_coords({name: ("cell", v.ravel()[self._chosen]) for name, v in self._places.items()})
        if self._mesh is None:
            return field
        index = {name: ("cell", place) for name, place in zip(("y_index", "x_index"), self._index, strict=True)}
        return field.assign_coords(index).assign_attrs(mesh_attrs(*self._mesh))


def check_periods(months: Sequence[np.ndarray], span: Period | None, base: Period | None) -> None:
    """Check that the field has times in the periods."""
    first, last = min(m.min() for m in months), max(m.max() for m in months)
    for name, wanted in (("period", span), ("base_period", base)):
        if wanted is not None and not any(wanted.covers(m).any() for m in months):
            raise DataError(
                f"{name} {wanted.label} is empty: the field covers {year_month(first)} to {year_month(last)}; "
                "choose within that"
            )


def needed_times(months: np.ndarray, span: Period | None, season: Season | None, base: Period | None) -> np.ndarray:
    """Which times, by their months, are analysed or needed for a season or the climatology."""
    if span is None:
        return np.ones(len(months), dtype=bool)
    margin = 12 if season is not None else 0
    keep = Period(span.first - margin, span.last + margin, "").covers(months)
    return keep if base is None else keep | base.covers(months)


def _cells(
    lat: np.ndarray, lon: np.ndarray, box: Region | None, mends: list[str]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows and columns of the cells in a region, and longitudes of the columns from west to east."""
    rows = np.arange(len(lat))
    columns, east = arrange_longitudes(lon)
    if box is None:
        return rows, columns, east
    covered = f"{lat[0]:g} to {lat[-1]:g} N, {east[0]:g} to {east[-1]:g} E"
    rows = select_latitudes(lat, box)
    columns, east = select_longitudes(lon, box)
    if not len(rows) or not len(columns):
        raise DataError(
            f"region {box.label} ({box.bounds}) holds no cell of the field, which covers {covered}; "
            "choose a region inside it"
        )
    ends = (
        lat[rows[0]] - box.south,
        box.north - lat[rows[-1]],
        east[0] - box.west,
        box.west + box.width - east[-1],
    )
    steps = [np.median(np.diff(axis)) if len(axis) > 1 else 0.0 for axis in (lat, np.unique(lon))]
    if max(ends[:2]) > steps[0] or (max(ends[2:]) > steps[1] and box.width < 360):
        mends.append(f"Region {box.label} ({box.bounds}) reaches beyond the field, which covers {covered}.")
    return rows, columns, east
