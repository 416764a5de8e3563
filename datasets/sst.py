"""Sea surface temperature, and any gridded field like it, ready for a decomposition into modes.

`load_sst` reads, selects, masks and removes a climatology; `to_matrix` lays the ocean cells out as rows and
`from_cells` puts results back onto the map. Repairs of the data are reported in ``attrs["mends"]``.

The canonical field
-------------------
`load_sst` returns an `xr.DataArray` with dims (time, lat, lon), float64, NaN on land and in gaps:

- coords ``time`` (datetime64[ns], ascending; first of the month for monthly data; 1 January for seasons that run
  over the year's end, else the first of the season's middle month), ``lat`` (ascending, degrees north), ``lon``
  (ascending, degrees east, never cutting the region), ``area_weight`` (lat), the cosine of latitude, ``ocean``
  (lat, lon), True for the cells that are analysed, and ``ice`` (time, lat, lon), True where these are frozen and so
  masked, if any are;
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

from probmodels.datasets.calendars import (
    Period,
    Season,
    month_number,
    parse_period,
    parse_season,
    year_month,
)
from probmodels.datasets.cells import (
    ICE,
    area_weight,
    check_coarse,
    from_cells,
    ocean_cells,
    said_of_ice,
    scattered_matrix,
    to_matrix,
)
from probmodels.datasets.climate import remove_climatology, removed_cycle, season_means, within_period
from probmodels.datasets.gridded import Source, open_field, open_parts
from probmodels.datasets.reading.chunks import Selection, read_field
from probmodels.datasets.reading.selection import OnGrid, Scattered, check_periods, needed_times
from probmodels.datasets.regions import REGIONS, Region, parse_region
from probmodels.errors import DataError
from probmodels.options import Natural, Probability, checked, refuse_unused

__all__ = ["REGIONS", "default_field", "default_path", "from_cells", "load_sst", "open_field", "to_matrix"]

Months: TypeAlias = str | int | slice | Sequence[Any]  # what parse_period reads


def default_path() -> Path:
    """Path of the embedded field: `sst_ndjfm_anom.nc` of the `eofs` package, which the ``sst`` extra installs.

    Raises
    ------
    DataError
        If `eofs` is not installed.
    """
    package = find_spec("eofs")  # looked at, not imported: that takes dask.array and more along
    if package is None or package.origin is None:
        raise DataError(
            "the default field is shipped in the package eofs: pip install probmodels[sst], or name a file of your own"
        )
    return Path(package.origin).parent / "examples" / "example_data" / "sst_ndjfm_anom.nc"


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
    coarsen: Annotated[int, Interval(ge=1, le=1000)] = 1,
    fill: float | Sequence[float] = (),
    variable: str | None = None,
    member: Natural | None = None,
    keep_climatology: bool = False,
) -> xr.DataArray:
    """Sea surface temperature or another gridded field from files: anomalies of a region, a period and a season.

    The result has the canonical form that this module's docstring describes.

    Parameters
    ----------
    path
        A NetCDF file, Zarr store, glob, OPeNDAP address, list of files or xarray object; the name of a data set that
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
        Temperature in degC at or below which water is taken for sea ice and masked, usually -1.79; None masks none.
        The coord ``ice`` says where that was.
    daily
        Whether to keep values more often than monthly as they are, with a smooth climatology; they are averaged to
        months otherwise. Not used with a season.
    coarsen
        Cells along a side of the boxes that are averaged into one cell each, by area; of a rectangular grid.
    fill
        Further values that mean "missing".
    variable
        Name of the variable, where the file holds several.
    member
        Which member is read, from 0, where the file holds an ensemble along a dimension such as "member", "number" or
        "realization".
    keep_climatology
        Whether to keep the climatology that is removed, as the coordinate ``climatology`` over the dims of the field,
        by which anomalies can be turned into values again. Not used with daily values or without anomalies.

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
        refuse_unused(load_sst, "anomalies=False", base_period=base_period, keep_climatology=keep_climatology)
    if daily:
        refuse_unused(load_sst, "daily=True", season=season, keep_climatology=keep_climatology)
    box, span, months_of, base = _chosen(region, period, season, base_period)
    mends: list[str] = []
    parts, files = open_parts(_source(path), variable=variable, mends=mends, member=member)
    try:
        selection = _selected(parts, box, span, months_of, base if anomalies else None, coarsen, mends)
        extra = np.atleast_1d(np.asarray(fill, dtype=np.float64)).tolist()
        kind, field, step = read_field(selection, daily=daily, coarsen=coarsen, fill=extra, ice=ice, mends=mends)
    finally:
        for part in parts:
            part.close()
    removed = None
    if anomalies:
        before = field if keep_climatology and kind != "anomaly" else None
        kind, base, field = remove_climatology(field, kind, base, span, mends)
        removed = None if before is None else removed_cycle(before, field)
    else:
        base = None
    if months_of is not None:
        removed = removed if removed is None else season_means(removed, months_of, span, step, [])
        field = season_means(field, months_of, span, step, mends)
        step = "yearly"
    field = within_period(field, span, mends)
    ocean = ocean_cells(field, min_valid, mends)
    said_of_ice(field, ocean, mends)

    attrs = {
        "kind": kind,
        "base_period": _label(base),
        "season": _label(months_of),
        "frequency": step,
        "region": "all" if box is None else f"{box.label} ({box.bounds})",
        "source_files": json.dumps([{"name": file.name, "sha256": _sha256(file)} for file in files]),
        "mends": json.dumps(mends, ensure_ascii=False),
    }
    found = _labelled(field, ocean, attrs, said=anomalies and kind == "anomaly")
    if removed is None:
        return found
    cycle = _labelled(within_period(removed, span, []), ocean, attrs, said=False)
    return found.assign_coords(climatology=(found.dims, cycle.values.astype(np.float32), removed.attrs))


def _chosen(
    region: str | Mapping[str, Sequence[float]] | Region | None,
    period: Months | None,
    season: str | Sequence[int] | None,
    base_period: Months | None,
) -> tuple[Region | None, Period | None, Season | None, Period | None]:
    """What is asked for, read; None for what is not."""
    return (
        None if region is None else parse_region(region),
        None if period is None else parse_period(period),
        None if season is None else parse_season(season),
        None if base_period is None else parse_period(base_period, name="base_period"),
    )


def _label(part: Period | Season | None) -> str:
    return "" if part is None else part.label


def _selected(
    parts: Sequence[xr.DataArray],
    box: Region | None,
    span: Period | None,
    season: Season | None,
    base: Period | None,
    coarsen: int,
    mends: list[str],
) -> Selection:
    """The cells and dates that are needed."""
    cells = OnGrid(parts[0], box, mends) if "lat" in parts[0].dims else Scattered(parts[0], box, mends)
    if coarsen > 1:
        check_coarse(parts[0], cells.sizes, coarsen, mends)
    months = [month_number(part["time"].values) for part in parts]
    check_periods(months, span, base)
    return Selection(parts, cells, [needed_times(number, span, season, base) for number in months])


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
        mesh = {name: field.attrs[name] for name in ("mesh_lat", "mesh_lon", "mesh_shape") if name in field.attrs}
        return scattered_matrix(field, ocean, attrs | mesh)
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
    if "ice" in field.coords and (frozen := field["ice"].values & ocean).any():
        coords["ice"] = ("time", "lat", "lon"), frozen, {"long_name": ICE}
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


def _sha256(path: Path) -> str:
    """Of a file, or of all files of a store by their names."""
    if path.is_file():
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    whole = hashlib.sha256()
    for file in sorted(x for x in path.rglob("*") if x.is_file()):
        whole.update(f"{file.relative_to(path).as_posix()} {_sha256(file)}\n".encode())
    return whole.hexdigest()
