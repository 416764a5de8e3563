"""Which variables of a file are time, latitude and longitude, and whether they are degrees."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import TypeAlias

import numpy as np
import xarray as xr

from probmodels.datasets.calendars import is_date
from probmodels.errors import DataError

__all__ = ["REGRID", "check_degrees", "find_axes", "find_places", "lacking"]

REGRID = "regrid it first, for example with 'cdo remapbil,r360x180 IN OUT'"

_UNITS = {"lat": r"degrees?_?n(orth)?", "lon": r"degrees?_?e(ast)?", "time": r"\w+\s+since\s+.+|day as %y%m%d.*"}
_STANDARD_NAMES = {"latitude": "lat", "longitude": "lon", "time": "time"}
_AXES = {"Y": "lat", "X": "lon", "T": "time"}
_NAMES = {"lat": r"lat.*|nav_lat|y\d*", "lon": r"lon.*|nav_lon|x\d*", "time": r"time.*|t\d*|date|month|year"}
_MAPS = r"(nav_|[a-z])?_?(lat|lon)(itude)?(_?[a-z])?"  # names of latitudes and longitudes in two dimensions
_NOT_DEGREES = r"k?m|(kilo)?met(er|re)s?|rad(ian)?s?|1|index|count|pixels?"
_MOST_LON, _MOST_SPAN = 540.0, 400.0  # degrees; ocean models write -280 to 80

_Rule: TypeAlias = Callable[[str, xr.Variable], str | None]


def find_axes(dataset: xr.Dataset) -> dict[str, str]:
    """Names of the ``time``, ``lat`` and ``lon`` variables of a dataset, by attributes, then by name.

    Returns
    -------
    dict
        Keys ``"time"``, ``"lat"``, ``"lon"``, those that were found; the variables have one dim each, time may have
        none where the file holds a single map.
    """
    bounds = {v.attrs.get("bounds") for v in dataset.variables.values()}
    free = {str(k): v for k, v in dataset.variables.items() if "bound" not in str(k).lower() and k not in bounds}
    vectors = {name: v for name, v in free.items() if v.ndim == 1}
    axes: dict[str, str] = {}
    for rule in (_by_cf_xarray(dataset), _by_attributes, _by_name):
        for key in ("time", "lat", "lon"):
            if key in axes:
                continue
            found = [name for name, variable in vectors.items() if rule(name, variable) == key]
            if len(found) > 1:  # an axis proper goes before an auxiliary coordinate of the same kind
                found = [name for name in found if vectors[name].dims == (name,)] or found
            if found and all(vectors[found[0]].dims != vectors[name].dims for name in axes.values()):
                axes[key] = found[0]
    if "time" not in axes:
        scalars = [name for name, v in free.items() if v.ndim == 0]
        found = [name for name in scalars if _by_attributes(name, free[name]) == "time" or _is_date(free[name])]
        axes |= {"time": found[0]} if found else {}
    return axes


def find_places(dataset: xr.Dataset, axes: Mapping[str, str], variable: str | None) -> tuple[str, str] | None:
    """Names of latitudes and longitudes of single cells: of a curvilinear grid, or of a list of stations.

    Parameters
    ----------
    dataset
        A file.
    axes
        What `find_axes` found.
    variable
        Name of the field, where it is known.

    Returns
    -------
    tuple or None
        Variables that share their one or two dims; None where latitude and longitude are axes of a rectangular grid.
    """
    if {"lat", "lon"} <= set(axes) and all(_declared(dataset.variables[axes[key]]) == key for key in ("lat", "lon")):
        return None
    wanted = None if variable is None or variable not in dataset else set(dataset[variable].dims)
    found: dict[str, list[str]] = {"lat": [], "lon": []}
    for name, v in dataset.variables.items():
        key = _declared(v) or _place_name(str(name))
        lies = wanted is None or set(v.dims) <= wanted
        if key in found and v.ndim in (1, 2) and v.dtype.kind in "iuf" and lies and "bound" not in str(name).lower():
            found[key].append(str(name))
    for lat in found["lat"]:
        dims = dataset.variables[lat].dims
        for lon in found["lon"]:
            fields = [v for v in dataset.data_vars.values() if set(dims) < set(v.dims)]
            if dataset.variables[lon].dims == dims and fields:
                return lat, lon
    return None


def _place_name(name: str) -> str | None:
    """Whether a variable is called like a latitude or longitude of cells."""
    found = re.fullmatch(_MAPS, name.lower())
    return None if found is None else found[2]


def _by_cf_xarray(dataset: xr.Dataset) -> _Rule:
    """A rule that asks cf-xarray; it knows nothing where that extra is not installed."""
    if find_spec("cf_xarray") is None:
        return lambda name, variable: None
    importlib.import_module("cf_xarray")
    named = {
        name: _STANDARD_NAMES[key]
        for key, names in dataset.cf.coordinates.items()
        if key in _STANDARD_NAMES
        for name in names
    }
    return lambda name, variable: named.get(name)


def _by_attributes(name: str, variable: xr.Variable) -> str | None:
    if (key := _declared(variable)) is not None:
        return key
    return _AXES.get(str(variable.attrs.get("axis", "")).upper())


def _declared(variable: xr.Variable) -> str | None:
    """What standard name or units say that a variable is."""
    attrs = variable.attrs
    if (key := _STANDARD_NAMES.get(str(attrs.get("standard_name", "")).lower())) is not None:
        return key
    units = str(attrs.get("units", "")).strip().lower()
    return next((key for key, pattern in _UNITS.items() if re.fullmatch(pattern, units)), None)


def _by_name(name: str, variable: xr.Variable) -> str | None:
    if variable.dtype.kind == "M" or (variable.dtype.kind in "OSU" and _is_date(variable)):
        return "time"
    if variable.dtype.kind not in "iufOSU":
        return None
    key = next((key for key, pattern in _NAMES.items() if re.fullmatch(pattern, name.lower())), None)
    return key if variable.dtype.kind in "iuf" or key == "time" else None


def _is_date(variable: xr.Variable) -> bool:
    """Whether a variable of texts or objects holds dates."""
    if variable.dtype.kind == "M":
        return True
    return variable.dtype.kind in "OSU" and bool(variable.size) and is_date(variable.values.ravel()[:1].tolist()[0])


def lacking(dataset: xr.Dataset, axes: Mapping[str, str]) -> str:
    """Which axes a dataset lacks, what it has, and what to do."""
    missing = " and ".join(name for name in ("time", "lat", "lon") if name not in axes)
    if _maps(dataset):
        mend = f"its coordinates are two-dimensional: {REGRID}"
    else:
        mend = "give its coordinates the units 'degrees_north', 'degrees_east' and 'days since ...'"
    contents = ", ".join(f"{k} ({', '.join(map(str, v.dims))})" for k, v in dataset.variables.items()) or "nothing"
    return f"no {missing} axis among {contents}; {mend}"


def _maps(dataset: xr.Dataset) -> list[str]:
    """Names of latitudes and longitudes in two dimensions."""
    return [
        str(name)
        for name, v in dataset.variables.items()
        if v.ndim == 2 and (_declared(v) in ("lat", "lon") or re.fullmatch(_MAPS, str(name).lower()))
    ]


def check_degrees(dataset: xr.Dataset, axes: Mapping[str, str], field: xr.DataArray, where: str) -> None:
    """Check that latitude and longitude are degrees on the globe: by units, standard names and ranges.

    Raises
    ------
    DataError
        If they are indices of a curvilinear grid, lengths of a projection, of a rotated pole, or out of range.
    """
    declared = {key: _declared(dataset.variables[axes[key]]) == key for key in ("lat", "lon")}
    plane = {dim for key in ("lat", "lon") for dim in dataset.variables[axes[key]].dims}
    maps = [name for name in _maps(dataset) if set(dataset.variables[name].dims) == plane]
    mapping = dataset.variables.get(str(field.attrs.get("grid_mapping", "")), xr.Variable((), 0)).attrs
    projection = str(mapping.get("grid_mapping_name", "latitude_longitude"))
    for key, words, most in (("lat", "latitudes", 90 + 1e-3), ("lon", "longitudes", _MOST_LON)):
        name = axes[key]
        variable = dataset.variables[name]
        standard = str(variable.attrs.get("standard_name", "")).lower()
        units = str(variable.attrs.get("units", "")).strip()
        if standard.startswith(("projection_", "grid_l")):
            raise DataError(f"{where}: '{name}' holds {standard.replace('_', ' ')}, no {words}; {REGRID}")
        if re.fullmatch(_NOT_DEGREES, units, re.IGNORECASE):
            raise DataError(f"{where}: '{name}' is in units '{units}', so that it holds no {words}; {REGRID}")
        if maps and not declared[key]:
            raise DataError(
                f"{where}: '{name}' holds no {words}, which are two-dimensional here ({', '.join(maps)}); {REGRID}"
            )
        if projection != "latitude_longitude" and not declared[key]:
            raise DataError(f"{where}: '{name}' holds no {words}: the grid is of mapping '{projection}'; {REGRID}")
        values = variable.values.astype(np.float64)
        if not np.isfinite(values).all():
            raise DataError(f"{where}: {int((~np.isfinite(values)).sum())} of {len(values)} {words} are missing")
        if np.abs(values).max() > most or np.ptp(values) > _MOST_SPAN:
            raise DataError(
                f"{where}: {words} '{name}' from {values.min():g} to {values.max():g} are not degrees; is the grid "
                f"projected? Then {REGRID}"
            )
    if all(_is_index(axes[key], dataset.variables[axes[key]]) for key in ("lat", "lon")):
        raise DataError(
            f"{where}: '{axes['lat']}' and '{axes['lon']}' count rows and columns and name no units; give the file "
            "latitudes and longitudes, with units 'degrees_north' and 'degrees_east'"
        )


def _is_index(name: str, variable: xr.Variable) -> bool:
    """Whether an axis called y or x without units counts 0, 1, 2, ... or 1, 2, 3, ..."""
    values = variable.values
    plain = not variable.attrs.get("units") and re.fullmatch(r"[yx]\d*", name.lower()) is not None
    return plain and any(np.array_equal(values, np.arange(first, first + len(values))) for first in (0, 1))
