"""Sea surface temperature, and any gridded field like it, ready for a decomposition into modes.

`load_sst` reads, selects, masks and removes a climatology; `to_matrix` lays the ocean cells out as rows and
`from_cells` puts results back onto the map. Repairs of the data are reported in ``attrs["mends"]``.

The canonical field
-------------------
`load_sst` returns an `xr.DataArray` with dims (time, lat, lon), float64, NaN on land and in gaps:

- coords ``time`` (datetime64[ns], ascending; first of the month for monthly data; 1 January for seasons that run
  over the year's end, else the first of the season's middle month), ``lat`` (ascending, degrees north), ``lon``
  (ascending, degrees east, never cutting the region), ``area_weight`` (lat), the cosine of latitude, and ``ocean``
  (lat, lon), True for the cells that are analysed;
- attrs ``units``, ``long_name``, ``kind`` ("anomaly" or "absolute"), ``base_period``, ``season``, ``frequency``,
  ``region``, ``period``, ``source_files`` (JSON list of names and sha256) and ``mends`` (JSON list of sentences).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import numpy as np
import xarray as xr
from annotated_types import Interval, Len

from probmodels.datasets.calendars import Period, Season, month_number, parse_period, parse_season, year_month
from probmodels.datasets.cells import (
    area_weight,
    cells_inside,
    from_cells,
    ocean_cells,
    scattered_matrix,
    to_matrix,
)
from probmodels.datasets.checks import SMALLER, check_fits
from probmodels.datasets.climate import (
    in_celsius,
    mask_ice,
    monthly_values,
    refuse_infinities,
    remove_climatology,
    said_of_ice,
    season_means,
    unique_times,
    within_period,
)
from probmodels.datasets.gridded import (
    Source,
    as_slice,
    fill_values,
    join,
    load_into_memory,
    mask_fill_values,
    mask_invalid,
    open_field,
    open_parts,
)
from probmodels.datasets.regions import (
    REGIONS,
    Region,
    arrange_longitudes,
    parse_region,
    select_latitudes,
    select_longitudes,
)
from probmodels.errors import DataError
from probmodels.options import Probability, checked, refuse_unused

__all__ = ["REGIONS", "default_field", "default_path", "from_cells", "load_sst", "open_field", "to_matrix"]

_COPIES = 5  # of the values that reading and repairing them takes
Months: TypeAlias = str | int | slice | Sequence[Any]  # what parse_period reads


def default_path() -> Path:
    """Path of the embedded field: `sst_ndjfm_anom.nc` of the `eofs` package, which the ``sst`` extra installs.

    Raises
    ------
    DataError
        If `eofs` is not installed.
    """
    if find_spec("eofs") is None:
        raise DataError(
            "the default field is shipped in the package eofs: pip install probmodels[sst], or name a file of your own"
        )
    from eofs.examples import example_data_path

    return Path(example_data_path("sst_ndjfm_anom.nc"))


def default_field() -> xr.DataArray:
    """Winter mean (November to March) anomalies of the Pacific, 1963 to 2012, 5 degrees, as `open_field` gives them."""
    return open_field(default_path())


@checked(DataError)
def load_sst(
    path: Source | None = None,
    *,
    region: str | Mapping[str, Sequence[float]] | Region | None = None,
    period: Months | None = None,
    season: str | Annotated[Sequence[Annotated[int, Interval(ge=1, le=12)]], Len(1)] | None = None,
    base_period: Months | None = None,
    anomalies: bool = True,
    min_valid: Probability = 0.5,
    ice: float | None = None,
    daily: bool = False,
    fill: float | Sequence[float] = (),
    variable: str | None = None,
) -> xr.DataArray:
    """Sea surface temperature or another gridded field from files: anomalies of a region, a period and a season.

    The result has the canonical form that this module's docstring describes.

    Parameters
    ----------
    path
        A NetCDF file, glob, OPeNDAP address, list of files or xarray object; the name of a data set that
        `probmodels.datasets.fetch` has downloaded, such as "ersstv5"; None for the embedded default.
    region
        A name of `REGIONS`, ``"lat0,lat1,lon0,lon1"`` or ``{"lat": [20, 60], "lon": [110, 260]}``; None for all.
    period
        ``"1950-2019"``, ``"1950-01/2019-04"`` or ``(1950, 2019)``; None for all. With a season, the period selects
        seasons, and months of the year before its start are read where the first season needs them.
    season
        ``"NDJFM"``, ``"JJA"``, ``"annual"`` or a list of months: means over that season, dated by the year of its
        January where it runs over the year's end. A season lacking a month is dropped and reported; a cell lacking one
        is missing in that season.
    base_period
        Period whose mean seasonal cycle is removed; None for the period of the analysis. A field that holds anomalies
        already is left as it is, unless a base period is given: then it is brought onto that. Not used without
        anomalies.
    anomalies
        Whether to remove the climatology.
    min_valid
        Share of time steps that a cell must have to count as ocean, 0 to 1.
    ice
        Temperature in degC at or below which water is taken for sea ice and masked, usually -1.8; None masks none.
    daily
        Whether to keep values more often than monthly as they are, with a smooth climatology; they are averaged to
        months otherwise. Not used with a season.
    fill
        Further values that mean "missing".
    variable
        Name of the variable, where the file holds several.

    Returns
    -------
    xr.DataArray
        Dims (time, lat, lon), degC for temperatures, otherwise the units of the file. A curvilinear grid or a list of
        stations gives the matrix (cell, time) that `to_matrix` makes of other fields.

    Raises
    ------
    DataError
        If nothing usable is left: unreadable file, no field or several, unknown region, empty selection, land only,
        fewer than 10 time steps, infinite or implausible values, two different fields of one date; or if an option is
        out of range or not used.
    """
    if not anomalies:
        refuse_unused(load_sst, "anomalies=False", base_period=base_period)
    if daily:
        refuse_unused(load_sst, "daily=True", season=season)
    box = None if region is None else parse_region(region)
    span = None if period is None else parse_period(period)
    months_of = None if season is None else parse_season(season)
    base = None if base_period is None else parse_period(base_period, name="base_period")

    mends: list[str] = []
    parts, files = open_parts(_source(path), variable=variable, mends=mends)
    try:
        field = _read(parts, box, span, months_of, base if anomalies else None, mends)
    finally:
        for part in parts:
            part.close()
    extra = np.atleast_1d(np.asarray(fill, dtype=np.float64)).tolist()
    field = mask_fill_values(field, [*fill_values(field), *extra], mends=mends)
    refuse_infinities(field)
    kind, field = in_celsius(field.astype(np.float64), mends)
    if ice is not None:
        field = mask_ice(field, ice, kind, mends)
    else:
        said_of_ice(field, kind, mends)
    field = unique_times(field, mends)
    field, step = monthly_values(field, mends, keep=daily)
    if anomalies:
        kind, base, field = remove_climatology(field, kind, base, span, mends)
    else:
        base = None
    if months_of is not None:
        field = season_means(field, months_of, span, step, mends)
        step = "yearly"
    field = within_period(field, span, mends)
    ocean = ocean_cells(field, min_valid, mends)

    attrs = {
        "kind": kind,
        "base_period": "" if base is None else base.label,
        "season": "" if months_of is None else months_of.label,
        "frequency": step,
        "region": "all" if box is None else f"{box.label} ({box.bounds})",
        "source_files": json.dumps([{"name": file.name, "sha256": _sha256(file)} for file in files]),
        "mends": json.dumps(mends, ensure_ascii=False),
    }
    return _labelled(field, ocean, attrs, said=anomalies and kind == "anomaly")


def _labelled(field: xr.DataArray, ocean: np.ndarray, attrs: Mapping[str, str], *, said: bool) -> xr.DataArray:
    """The canonical field, or the matrix of cells; ``said``: whether its long name has to name anomalies."""
    long_name = str(field.attrs.get("long_name", field.name))
    if said and "anom" not in long_name.lower():
        long_name += " anomaly"
    attrs = {
        "units": field.attrs.get("units", ""),
        "long_name": long_name,
        **attrs,
        "period": "/".join(year_month(int(m)) for m in month_number(field["time"].values[[0, -1]])),
    }
    if "cell" in field.dims:
        return scattered_matrix(field, ocean, attrs)
    lat = field["lat"].values
    coords = {
        "time": ("time", field["time"].values, {"standard_name": "time", "axis": "T"}),
        "lat": ("lat", lat, {"standard_name": "latitude", "units": "degrees_north", "axis": "Y"}),
        "lon": ("lon", field["lon"].values, {"standard_name": "longitude", "units": "degrees_east", "axis": "X"}),
        "area_weight": (
            "lat",
            area_weight(lat),
            {"long_name": "relative area of a cell, cosine of latitude", "units": "1"},
        ),
        "ocean": (("lat", "lon"), ocean, {"long_name": "whether the cell is analysed"}),
    }
    result = xr.DataArray(
        np.where(ocean, field.values, np.nan), coords, ("time", "lat", "lon"), name=field.name, attrs=attrs
    )
    for name in ("lat", "lon"):
        result[name].encoding["_FillValue"] = None  # CF forbids it on coordinates, and xarray would write one
    return result


# ------------------------------------------------------------------------------------------------------- reading


def _source(path: Source | None) -> Source:
    if path is None:
        return default_path()
    if isinstance(path, str) and not os.path.exists(path):
        from probmodels.datasets.fetch import SOURCES, cached_path

        if path in SOURCES:
            return cached_path(path)
    return path


def _read(
    parts: Sequence[xr.DataArray],
    box: Region | None,
    span: Period | None,
    season: Season | None,
    base: Period | None,
    mends: list[str],
) -> xr.DataArray:
    """Only the cells and dates that are needed, in memory."""
    cells = _OnGrid(parts[0], box, mends) if "lat" in parts[0].dims else _Scattered(parts[0], box, mends)
    months = [month_number(part["time"].values) for part in parts]
    _check_periods(months, span, base)
    selected, invalid = [], 0
    wanted_times = [_needed(number, span, season, base) for number in months]
    count = sum(int(keep.sum()) for keep in wanted_times)
    check_fits(f"{count} times of {cells.shape} cells", _COPIES * 8 * count * cells.num, SMALLER)
    for part, keep in zip(parts, wanted_times, strict=True):
        if keep.any():
            read = cells.read(part.isel(time=as_slice(np.flatnonzero(keep))))
            valid = mask_invalid(read)
            invalid += (lost := int(read.notnull().sum() - valid.notnull().sum()))
            if lost and not valid.notnull().any():
                low, high = read.attrs["valid_range"]
                raise DataError(
                    f"all values of '{read.name}', {float(read.min()):g} to {float(read.max()):g}, lie outside of the "
                    f"valid range {low:g} to {high:g} that the file declares; if that is wrong, delete it with "
                    f"'ncatted -a valid_range,{read.name},d,, -a valid_min,{read.name},d,, "
                    f"-a valid_max,{read.name},d,, FILE'"
                )
            selected.append(valid)
    if invalid:
        mends.append(f"{invalid} values lie outside of the valid range that the file declares; masked.")
    return cells.labelled(join(selected))


class _OnGrid:
    """The cells of a rectangular grid in a region."""

    def __init__(self, first: xr.DataArray, box: Region | None, mends: list[str]) -> None:
        self._rows, columns, self._east = _cells(first["lat"].values, first["lon"].values, box, mends)
        self.shape, self.num = f"{len(self._rows)} x {len(columns)}", len(self._rows) * len(columns)
        # A box over the seam of the file is two runs.
        self._runs = np.split(columns, np.flatnonzero(np.diff(columns) != 1) + 1)

    def read(self, part: xr.DataArray) -> xr.DataArray:
        """Their values, in memory."""
        strip = part.isel(lat=as_slice(self._rows))
        return join([load_into_memory(strip.isel(lon=as_slice(run))) for run in self._runs], "lon")

    def labelled(self, field: xr.DataArray) -> xr.DataArray:
        """With longitudes from west to east."""
        return field.assign_coords(lon=self._east)


class _Scattered:
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

    def read(self, part: xr.DataArray) -> xr.DataArray:
        """Their values, in memory."""
        window = load_into_memory(part.isel(self._window).drop_vars(["lat", "lon", "area"]))
        values = window.values.reshape(window.sizes["time"], -1)[:, self._inside]
        return xr.DataArray(values, {"time": part["time"]}, ("time", "cell"), name=part.name, attrs=part.attrs)

    def labelled(self, field: xr.DataArray) -> xr.DataArray:
        """With the place and area of each cell."""
        return field.assign_coords({name: ("cell", v.ravel()[self._chosen]) for name, v in self._places.items()})


def _check_periods(months: Sequence[np.ndarray], span: Period | None, base: Period | None) -> None:
    """Check that the field has times in the periods."""
    first, last = min(m.min() for m in months), max(m.max() for m in months)
    for name, wanted in (("period", span), ("base_period", base)):
        if wanted is not None and not any(wanted.covers(m).any() for m in months):
            raise DataError(
                f"{name} {wanted.label} is empty: the field covers {year_month(first)} to {year_month(last)}; "
                "choose within that"
            )


def _needed(months: np.ndarray, span: Period | None, season: Season | None, base: Period | None) -> np.ndarray:
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


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
