"""Several fields, members of an ensemble or lags of a field as one matrix that `make_problem` takes.

Fields and lags are stacked as cells with a coordinate ``field``: patterns of different fields are independent in the
prior, each smooth on its own. Members are strung along time with a coordinate ``member``: they share patterns, and each
has series of its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated

import numpy as np
import xarray as xr
from annotated_types import Interval, Len

from probmodels.bayesian_svd.effects import time_in_years
from probmodels.bayesian_svd.grids import to_grid
from probmodels.datasets.cells import area_weight, to_matrix
from probmodels.errors import DataError, SummaryError
from probmodels.options import Positive, checked

__all__ = ["split_fields", "stack_fields", "stack_lags", "stack_members"]

_INDEX = ("lat_index", "lon_index", "y_index", "x_index")  # places of cells on their grid
_GRID = ("grid_lat", "grid_lon", "mesh_lat", "mesh_lon", "mesh_shape")
_PLACES = ("lat", "lon", "x", "y", "z")


@checked(DataError)
def stack_fields(
    fields: Annotated[Mapping[str, xr.DataArray], Len(2)], *, weights: Mapping[str, Positive] | None = None
) -> xr.DataArray:
    """Fields on the same times as one matrix of cells, each scaled to the same total variance.

    Parameters
    ----------
    fields
        By name: (time, lat, lon), or (cell, time) with coordinates lat and lon, or x, y, z, or a numeric cell.
    weights
        Share of each field in the total variance, by the same names; equal by default.

    Returns
    -------
    xr.DataArray
        Dims (cell, time) without units, for `make_problem`. Coordinates of the cells: ``field``, positions,
        ``area_weight``, and ``field_scale``, the factor back to the units of each field.

    Raises
    ------
    DataError
        If there are fewer than two fields, they are not on the same times, or differ in how cells are placed.
    """
    given = dict(weights or dict.fromkeys(fields, 1.0))
    if set(given) != set(fields):
        raise DataError(f"weights are for {sorted(given)}; give one for each of {sorted(fields)}")
    parts = {name: _cells(name, field) for name, field in fields.items()}
    first = next(iter(parts))
    for name, part in parts.items():
        _check_times(first, parts[first], name, part)
    places = {name: {c for c in _PLACES if c in part.coords} for name, part in parts.items()}
    if len({frozenset(x) for x in places.values()}) > 1:
        raise DataError(f"cells are placed by {places}; give all fields the same kind of coordinates")
    scales = {}
    for name, part in parts.items():
        variance = float((part.var("time") * part["area_weight"]).sum())
        if not variance > 0:
            raise DataError(f"the field {name!r} does not vary; leave it out")
        share = given[name] * sum(x.sizes["cell"] for x in parts.values()) / sum(given.values())
        scales[name] = float(np.sqrt(variance / share))
    units = {name: str(part.attrs.get("units", "1")) for name, part in parts.items()}
    mends = [x for part in parts.values() for x in json.loads(part.attrs.get("mends", "[]"))]
    attrs = {"long_name": " and ".join(parts), "units": "1", "field_units": json.dumps(units)}
    return _stacked(parts, scales, attrs | {"mends": json.dumps(mends)})


def _stacked(parts: Mapping[str, xr.DataArray], scales: Mapping[str, float], attrs: dict[str, str]) -> xr.DataArray:
    """Cells of all parts, each divided by its scale."""
    sizes = [part.sizes["cell"] for part in parts.values()]
    coords = {
        "cell": np.arange(sum(sizes)),
        "time": next(iter(parts.values()))["time"].variable,
        "field": ("cell", np.repeat(list(parts), sizes)),
        "field_scale": ("cell", np.repeat([scales[name] for name in parts], sizes)),
    }
    for coord in ("area_weight", *_INDEX, *_PLACES):
        if all(coord in part.coords for part in parts.values()):
            coords[coord] = "cell", np.concatenate([part[coord].values for part in parts.values()])
    grids = {f"{axis}_{name}": part.attrs[axis] for name, part in parts.items() for axis in _GRID if axis in part.attrs}
    values = np.concatenate([part.values / scales[name] for name, part in parts.items()])
    return xr.DataArray(values, coords, ("cell", "time"), name="data", attrs=attrs | grids)


def _cells(name: str, field: xr.DataArray) -> xr.DataArray:
    """A field as (cell, time) with positions and area weights."""
    if {"lat", "lon"} <= set(field.dims):
        field = to_matrix(field)
    if set(field.dims) != {"cell", "time"} or "time" not in field.coords:
        dims = tuple(map(str, field.dims))
        raise DataError(f"the field {name!r} has dims {dims}; expected (time, lat, lon) or (cell, time), with times")
    field = field.transpose("cell", "time").astype(np.float64)
    if not any(c in field.coords for c in _PLACES):
        if "cell" not in field.coords or field["cell"].dtype.kind not in "iuf":
            raise DataError(f"cells of the field {name!r} have no position; give them lat and lon, or x")
        field = field.assign_coords(x=("cell", field["cell"].values.astype(float)))
    if "area_weight" not in field.coords:
        weight = area_weight(field["lat"].values) if "lat" in field.coords else np.ones(field.sizes["cell"])
        field = field.assign_coords(area_weight=("cell", weight))
    return field


def _check_times(first: str, one: xr.DataArray, name: str, other: xr.DataArray) -> None:
    """Check that two fields are on the same times."""
    a, b = one["time"].values, other["time"].values
    if a.dtype.kind != b.dtype.kind:
        raise DataError(
            f"times of {first!r} are {a.dtype}, those of {name!r} {b.dtype}; bring both to one calendar (load_sst does)"
        )
    if len(a) != len(b) or (a != b).any():
        common = len(np.intersect1d(a, b))
        raise DataError(
            f"{first!r} has {len(a)} times from {a[0]} to {a[-1]}, {name!r} has {len(b)} from {b[0]} to {b[-1]}, and "
            f"{common} are in both; give fields on the same times (xarray.align(a, b, join='inner') keeps the shared)"
        )


def split_fields(summary: xr.Dataset, tree: xr.DataTree) -> dict[str, xr.Dataset]:
    """Maps of a summary over stacked cells, field by field, on the grid and in the units of each.

    Parameters
    ----------
    summary
        From `probmodels.bayesian_svd.summary.summarise_modes` or `probmodels.bayesian_svd.joint.coupled.couple`.
    tree
        The result that it was made from, of a problem of `stack_fields` or `stack_lags`.

    Returns
    -------
    dict
        Summaries by the name of the field.

    Raises
    ------
    SummaryError
        If the result is not that of stacked fields.
    """
    constant = tree["constant_data"].to_dataset()
    if "field" not in constant.coords or "cell" not in summary.dims:
        raise SummaryError("the result is not that of several fields; stack them by stack_fields before make_problem")
    attrs, names = constant["data"].attrs, constant["field"].values
    units = json.loads(attrs.get("field_units", "{}"))
    out = {}
    for name in dict.fromkeys(names.tolist()):
        cells = np.flatnonzero(names == name)
        own = constant.isel(cell=cells).drop_vars(["field"])
        own["data"].attrs = {k: attrs[f"{k}_{name}"] for k in _GRID if f"{k}_{name}" in attrs}
        part = summary.isel(cell=cells).drop_vars([c for c in summary.coords if summary[c].dims == ("cell",)])
        for variable, array in part.data_vars.items():
            if "cell" in array.dims and str(variable).startswith(_IN_UNITS):
                power = 2 if str(variable).startswith("plane_variance") else 1
                unit = _unit(units.get(name, "1"), str(array.attrs.get("units", "1")), power)
                scale = xr.DataArray(own["field_scale"].values ** power, dims="cell")
                part[variable] = (array * scale).assign_attrs(array.attrs | {"units": unit})
        part = to_grid(part, own)
        part.attrs = summary.attrs | {"field": str(name)}
        out[str(name)] = part
    return out


def _unit(unit: str, scaled: str, power: int) -> str:
    """Units of a variable of a field: those of the field or their square, per decade where the scaled one is."""
    if scaled.endswith(_PER_DECADE):
        return _PER_DECADE if unit == "1" else f"{unit} {_PER_DECADE}"
    return unit if power == 1 or unit == "1" else f"{unit}{power}"


_PER_DECADE = "(10 year)-1"
_IN_UNITS = (
    *(
        f"{root}_{part}"
        for root in ("mode", "map", "trend", "plane_variance")
        for part in ("mean", "sd", "lower", "upper")
    ),
    "noise_sd",
    "residual_sd",
    "observed_sd",
    "replicated_sd",
)


@checked(DataError)
def stack_members(field: xr.DataArray, *, member: str = "member") -> xr.DataArray:
    """Members of an ensemble strung along time: patterns are shared, series are each member's own.

    Parameters
    ----------
    field
        Dims ``member`` and (time, lat, lon) or (cell, time).
    member
        Name of the dim of the members.

    Returns
    -------
    xr.DataArray
        Dims (cell, time), the times of one member after those of another, with a coordinate ``member`` along time.
        ``make_problem`` starts the series afresh with each member, where they are a process.

    Raises
    ------
    DataError
        If the dims are others, or there is one member only.
    """
    rest = set(map(str, field.dims)) - {member}
    if member not in field.dims or rest not in ({"time", "lat", "lon"}, {"cell", "time"}):
        dims = tuple(map(str, field.dims))
        raise DataError(f"the field has dims {dims}; expected {member!r} and (time, lat, lon) or (cell, time)")
    if field.sizes[member] < 2:
        raise DataError(f"there is one {member}; an ensemble has two or more")
    parts = [field.isel({member: i}, drop=True) for i in range(field.sizes[member])]
    out = xr.concat(parts, "time", combine_attrs="override")
    out = to_matrix(out) if "lat" in out.dims else out.transpose("cell", "time")
    labels = field[member].values if member in field.coords else np.arange(field.sizes[member])
    return out.assign_coords(member=("time", np.repeat(labels, field.sizes["time"])))


@checked(DataError)
def stack_lags(field: xr.DataArray, lags: Annotated[int, Interval(ge=2, le=1000)]) -> xr.DataArray:
    """Windows of neighbouring times as one matrix, for extended modes: patterns that evolve over the lags.

    Windows do not overlap, so that each value counts once: the times of a matrix of overlapping windows share most of
    their values, which the model would take for new data, and intervals would be too narrow.

    Parameters
    ----------
    field
        Dims (time, lat, lon) or (cell, time), at even steps of time.
    lags
        Times in a window.

    Returns
    -------
    xr.DataArray
        Dims (cell, time): cells of lag 0, then of lag 1 and so on, named in the coordinate ``field``; times are the
        first of each window.

    Raises
    ------
    DataError
        If steps are uneven, or there are fewer times than windows need.
    """
    matrix = _cells("field", field)
    steps = np.diff(time_in_years(matrix["time"]))
    if len(steps) and np.abs(steps - np.median(steps)).max() > 0.15 * abs(np.median(steps)):
        raise DataError("the steps between times are uneven; a lag has no one length (take whole years of months)")
    windows = matrix.sizes["time"] // lags
    if windows < 2:
        raise DataError(f"lags={lags} of {matrix.sizes['time']} times leave {windows} windows; give fewer lags")
    first = matrix["time"][: windows * lags : lags]
    parts = {f"lag {i}": matrix[:, i : windows * lags : lags].assign_coords(time=first.values) for i in range(lags)}
    mends = json.loads(matrix.attrs.get("mends", "[]"))
    if rest := matrix.sizes["time"] - windows * lags:
        mends.append(f"the last {rest} times do not fill a window of {lags} and are left out")
    units = str(matrix.attrs.get("units", "1"))
    attrs = {
        "units": units,
        "long_name": f"{matrix.attrs.get('long_name', 'field')} over {lags} lags",
        "field_units": json.dumps(dict.fromkeys(parts, units)),
        "mends": json.dumps(mends),
    }
    return _stacked(parts, dict.fromkeys(parts, 1.0), attrs)
