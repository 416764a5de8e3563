"""Gridded fields out of NetCDF files, whatever their axes are called: found, ordered and opened lazily.

Axes are found by the attributes of the CF conventions (through cf-xarray where that is installed), then by name.
What comes out is always (time, lat, lon) with ascending latitude and time and longitudes that do not cut the field.
"""

from __future__ import annotations

import glob
import importlib
import json
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import xarray as xr

from probmodels.datasets.calendars import decode_times
from probmodels.datasets.checks import existing_file
from probmodels.datasets.regions import arrange_longitudes
from probmodels.errors import DataError
from probmodels.options import checked

__all__ = [
    "Source",
    "expand_paths",
    "fill_values",
    "find_axes",
    "join",
    "load_into_memory",
    "mask_fill_values",
    "open_field",
    "open_parts",
]

Source: TypeAlias = str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | xr.Dataset | xr.DataArray

_UNITS = {"lat": r"degrees?_?n(orth)?", "lon": r"degrees?_?e(ast)?", "time": r"\w+\s+since\s+.+|day as %y%m%d.*"}
_STANDARD_NAMES = {"latitude": "lat", "longitude": "lon", "time": "time"}
_AXES = {"Y": "lat", "X": "lon", "T": "time"}
_NAMES = {"lat": r"lat.*|nav_lat|y\d*", "lon": r"lon.*|nav_lon|x\d*", "time": r"time.*|t\d*|date|month|year"}
_SENTINELS = (
    -99.0,
    -99.9,
    -99.99,
    -999.0,
    -999.9,
    -999.99,
    -1000.0,
    -9999.0,
    -9999.9,
    -32768.0,
    -32767.0,
    32767.0,
    999.0,
    9999.0,
)
_HUGE = 1e15  # beyond any geophysical quantity: 1e20, 1e30 and 9.97e36 of NetCDF


@checked(DataError)
def open_field(path_or_paths: Source, *, variable: str | None = None) -> xr.DataArray:
    """Open a gridded field lazily, in canonical axes and with fill values masked.

    Parameters
    ----------
    path_or_paths
        A NetCDF file, a glob pattern, an OPeNDAP address, a list of files that follow one another in time, or an
        xarray object.
    variable
        Name of the variable, where the file holds several fields.

    Returns
    -------
    xr.DataArray
        Dims (time, lat, lon), values and units as in the file; ``attrs["mends"]`` is a JSON list of repairs.
        Values stay on disk where dask is installed; without it they are read to have their fill values masked.

    Raises
    ------
    DataError
        If a file cannot be read, holds no field, or several of which none is named.
    """
    mends: list[str] = []
    parts, _ = open_parts(path_or_paths, variable=variable, mends=mends)
    if find_spec("dask") is not None:
        parts = [part if part.chunks is not None else part.chunk({"time": "auto"}) for part in parts]
    field = join(parts)
    index, lon = arrange_longitudes(field["lon"].values)
    field = field.isel(lon=as_slice(index)).assign_coords(lon=lon)
    sample = field.isel(time=sorted({0, field.sizes["time"] // 2, field.sizes["time"] - 1}))
    field = mask_fill_values(field, fill_values(sample), mends=mends)
    field.attrs["mends"] = json.dumps(mends)
    return field


def open_parts(source: Source, *, variable: str | None, mends: list[str]) -> tuple[list[xr.DataArray], list[Path]]:
    """Fields of the single files, lazily and in order of time, and the local files that they come from.

    Longitudes stay in the order of the file, as files are read fast in runs of neighbours only.
    The caller closes them (`xr.DataArray.close`) once read; ``mends`` is appended to.
    """
    if isinstance(source, xr.DataArray):
        name = ("" if source.name is None else str(source.name)) or variable or "field"
        try:
            source = source.to_dataset(name=name)
        except ValueError as error:
            raise DataError(f"data in memory: {error}; rename the array") from error
    if isinstance(source, xr.Dataset):
        return [_canonical(source, variable, where="data in memory", mends=mends)], []
    names = expand_paths(source)
    parts: list[xr.DataArray] = []
    with ExitStack() as opened:
        for name in names:
            dataset = opened.enter_context(_open_dataset(name))
            part = _canonical(dataset, variable, where=_short(name), mends=mends)
            part.set_close(dataset.close)
            parts.append(part)
            _check_agreement(parts[0], part, _short(names[0]), _short(name))
        opened.pop_all()  # all are good: the caller closes them
    parts.sort(key=lambda part: part["time"].values[0])
    return parts, [Path(name) for name in names if "://" not in name]


def load_into_memory(field: xr.DataArray) -> xr.DataArray:
    """The field with its values read from disk.

    Raises
    ------
    DataError
        If they cannot be read.
    """
    try:
        return field.load()
    except (OSError, RuntimeError, ValueError) as error:
        raise DataError(f"the values of '{field.name}' cannot be read ({error}); copy the file anew") from error


def join(parts: Sequence[xr.DataArray], dim: str = "time") -> xr.DataArray:
    """Parts one after another along a dim, the attributes of the first kept."""
    if len(parts) == 1:
        return parts[0]
    return xr.concat(parts, dim, coords="minimal", compat="override", join="override", combine_attrs="override")


def expand_paths(path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[str]:
    """Existing files that a path, a glob pattern or a list of them stands for.

    Raises
    ------
    DataError
        If there is none.
    """
    if not isinstance(path, str | os.PathLike):
        if not path:
            raise DataError("the list of files is empty; name at least one NetCDF file")
        return [name for entry in path for name in expand_paths(entry)]
    text = os.path.expanduser(os.fspath(path))
    if "://" in text or os.path.isfile(text):
        return [text]
    if os.path.isdir(text):
        raise DataError(f"{text} is a folder; name a file in it, or all with '{text}/*.nc'")
    if glob.has_magic(text):
        found = sorted(name for name in glob.glob(text) if os.path.isfile(name))
        if not found:
            raise DataError(f"no file matches '{text}' (working folder: {os.getcwd()})")
        return found
    raise DataError(f"file not found: {text} (working folder: {os.getcwd()})")


def _short(name: str) -> str:
    return name if "://" in name else os.path.basename(name)


def _open_dataset(name: str) -> xr.Dataset:
    if "://" not in name:
        existing_file(name)
        with open(name, "rb") as stream:
            magic = stream.read(4)
        if magic[:2] == b"\x1f\x8b" or magic == b"PK\x03\x04":
            raise DataError(f"{name} is compressed; unpack it first (gunzip or unzip)")
        if magic[:3] != b"CDF" and magic != b"\x89HDF":
            raise DataError(f"{name} is not a NetCDF file (it starts with {magic!r}); convert it to NetCDF first")
    try:
        with warnings.catch_warnings():
            # two different fill values in one variable are legal to mask, and xarray warns of them
            warnings.simplefilter("ignore", xr.SerializationWarning)
            return xr.open_dataset(name, decode_times=False)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise DataError(f"{name} cannot be read as NetCDF ({error}); is it complete? Try 'ncdump -h' on it") from error


# --------------------------------------------------------------------------------------------- variable and axes


def find_axes(dataset: xr.Dataset) -> dict[str, xr.Variable]:
    """One-dimensional ``time``, ``lat`` and ``lon`` variables of a dataset, by attributes, then by name.

    Returns
    -------
    dict
        Keys ``"time"``, ``"lat"``, ``"lon"``, those that were found; each value's only dim is the axis' dim.
    """
    vectors = {str(k): v for k, v in dataset.variables.items() if v.ndim == 1 and "bound" not in str(k).lower()}
    axes: dict[str, xr.Variable] = {}
    for rule in (_by_cf_xarray(dataset), _by_attributes, _by_name):
        for key in ("time", "lat", "lon"):
            if key in axes:
                continue
            found = [name for name, variable in vectors.items() if rule(name, variable) == key]
            if len(found) > 1:  # an axis proper goes before an auxiliary coordinate of the same kind
                found = [name for name in found if vectors[name].dims == (name,)] or found
            if found and all(vectors[found[0]].dims != axis.dims for axis in axes.values()):
                axes[key] = vectors[found[0]]
    return axes


def _by_cf_xarray(dataset: xr.Dataset) -> Any:
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
    attrs = variable.attrs
    if (key := _STANDARD_NAMES.get(str(attrs.get("standard_name", "")).lower())) is not None:
        return key
    units = str(attrs.get("units", "")).strip().lower()
    for key, pattern in _UNITS.items():
        if re.fullmatch(pattern, units):
            return key
    return _AXES.get(str(attrs.get("axis", "")).upper())


def _by_name(name: str, variable: xr.Variable) -> str | None:
    if variable.dtype.kind in "OM":
        return "time"
    if variable.dtype.kind not in "iuf":
        return None
    return next((key for key, pattern in _NAMES.items() if re.fullmatch(pattern, name.lower())), None)


def _choose_variable(dataset: xr.Dataset, dims: set[Any], variable: str | None, where: str) -> str:
    listing = ", ".join(f"{name} ({', '.join(map(str, v.dims))})" for name, v in dataset.data_vars.items()) or "none"
    if variable is not None:
        if variable not in dataset.variables:
            raise DataError(f"{where}: no variable '{variable}'; its variables: {listing}")
        missing = dims - set(dataset[variable].dims)
        if missing:
            lacking = ", ".join(sorted(map(str, missing)))
            raise DataError(f"{where}: variable '{variable}' lacks the dims {lacking}; its variables: {listing}")
        return variable
    bounds = {v.attrs[key] for v in dataset.variables.values() for key in ("bounds", "climatology") if key in v.attrs}
    found = [
        str(name)
        for name, v in dataset.data_vars.items()
        if dims <= set(v.dims) and v.dtype.kind in "iuf" and name not in bounds and "flag_values" not in v.attrs
    ]
    if not found:
        raise DataError(f"{where}: no variable has time, latitude and longitude; its variables: {listing}")
    if len(found) > 1:
        raise DataError(f"{where}: several fields: {', '.join(found)}; choose one with variable='{found[0]}'")
    return found[0]


def _canonical(dataset: xr.Dataset, variable: str | None, *, where: str, mends: list[str]) -> xr.DataArray:
    """The field of one dataset, lazily, as (time, lat, lon) with decoded dates, longitudes in the order of the file."""
    axes = find_axes(dataset)
    if set(axes) != {"time", "lat", "lon"}:
        raise DataError(f"{where}: no recognisable field: {_lacking(dataset, axes)}")
    dim = {key: str(axis.dims[0]) for key, axis in axes.items()}
    name = _choose_variable(dataset, set(dim.values()), variable, where)
    field = _without_extra(dataset[name], name, set(dim.values()), where)
    field = field.transpose(dim["time"], dim["lat"], dim["lon"])
    for key, d in dim.items():
        if field.sizes[d] == 0:
            raise DataError(f"{where}: the {key} axis of '{name}' is empty")

    lat = axes["lat"].values.astype(np.float64)
    lon = axes["lon"].values.astype(np.float64)
    if not (np.isfinite(lat).all() and np.isfinite(lon).all() and np.abs(lat).max() <= 90 + 1e-3):
        raise DataError(
            f"{where}: latitudes {lat.min():g} to {lat.max():g} or longitudes are not degrees; is the grid projected?"
        )
    lat_order = np.argsort(lat, kind="stable")
    if len(np.unique(lat)) != len(lat):
        raise DataError(f"{where}: latitudes repeat; remove the doubled rows")
    if (repeated := len(lon) - len(arrange_longitudes(lon)[0])) > 0:
        mends.append(f"{where}: {repeated} longitudes repeat around the circle; kept once.")
    dates, time_mends = decode_times(
        axes["time"].values,
        axes["time"].attrs,
        where=where,
        bounds=_time_bounds(dataset, axes["time"]),
        coverage_start=dataset.attrs.get("time_coverage_start"),
    )
    mends.extend(time_mends)
    time_order = np.argsort(dates, kind="stable")
    if (np.diff(dates) < np.timedelta64(0, "ns")).any():
        mends.append(f"{where}: times are not in order; sorted, {str(dates.min())[:10]} to {str(dates.max())[:10]}.")

    field = field.isel({dim["time"]: as_slice(time_order), dim["lat"]: as_slice(lat_order)})
    coords = {"time": dates[time_order], "lat": np.round(lat[lat_order], 4), "lon": np.round(lon, 4)}
    values = field.variable.copy(deep=False)  # a DataArray made anew from it keeps the values on disk
    values.dims = ("time", "lat", "lon")
    return xr.DataArray(values, coords=coords, name=name)


def _lacking(dataset: xr.Dataset, axes: Mapping[str, Any]) -> str:
    """Which axes a dataset lacks, what it has, and what to do."""
    missing = " and ".join(name for name in ("time", "lat", "lon") if name not in axes)
    flat = any(v.ndim == 2 and _by_attributes(str(k), v) in ("lat", "lon") for k, v in dataset.variables.items())
    mend = (
        "its coordinates are two-dimensional: regrid it first, for example with 'cdo remapbil,r360x180'"
        if flat
        else "give its coordinates the units 'degrees_north', 'degrees_east' and 'days since ...'"
    )
    contents = ", ".join(f"{k} ({', '.join(map(str, v.dims))})" for k, v in dataset.variables.items()) or "nothing"
    return f"no {missing} axis among {contents}; {mend}"


def _without_extra(field: xr.DataArray, name: str, dims: set[str], where: str) -> xr.DataArray:
    """The field without dimensions of length 1 besides time, latitude and longitude; others are refused."""
    for extra in [d for d in field.dims if d not in dims]:
        if field.sizes[extra] != 1:
            raise DataError(
                f"{where}: '{name}' has a dimension '{extra}' of length {field.sizes[extra]} besides time, latitude "
                f"and longitude; select one of it first, for example with xarray's .isel({extra}=0)"
            )
        field = field.isel({extra: 0}, drop=True)
    return field


def _time_bounds(dataset: xr.Dataset, time: xr.DataArray | xr.Variable) -> np.ndarray | None:
    """Numbers (time, 2) that bound the time steps, where the file has them."""
    name = time.attrs.get("bounds")
    if name not in dataset.variables or dataset[name].dtype.kind not in "iuf":
        return None
    bounds: np.ndarray = dataset[name].values
    return bounds if bounds.ndim == 2 and bounds.shape[1] == 2 else None


def as_slice(index: np.ndarray) -> np.ndarray | slice:
    """A slice where the indices have a constant step, which files read in one go."""
    if len(index) < 2:
        return slice(int(index[0]), int(index[0]) + 1) if len(index) else index
    step = int(index[1] - index[0])
    if step == 0 or (np.diff(index) != step).any():
        return index
    stop = int(index[-1]) + step
    return slice(int(index[0]), stop if stop >= 0 else None, step)


def _check_agreement(first: xr.DataArray, part: xr.DataArray, first_name: str, name: str) -> None:
    for axis in ("lat", "lon"):
        if first.sizes[axis] != part.sizes[axis] or not np.allclose(first[axis], part[axis], atol=1e-3):
            raise DataError(
                f"{name}: its {axis} axis ({part.sizes[axis]} values from {float(part[axis][0]):g}) differs from that "
                f"of {first_name} ({first.sizes[axis]} from {float(first[axis][0]):g}); "
                "open only files of one grid together"
            )
    for what, one, other in (
        ("variable", first.name, part.name),
        ("units", first.attrs.get("units"), part.attrs.get("units")),
    ):
        if one != other:
            raise DataError(
                f"{name}: {what} '{other}' differs from '{one}' of {first_name}; "
                "open only files of one product together"
            )


# ---------------------------------------------------------------------------------------------------- fill values


def fill_values(field: xr.DataArray) -> list[float]:
    """Well-known fill values, such as -1000 and -999, that stand further from all other values than those spread."""
    sentinels = np.asarray(_SENTINELS, dtype=field.dtype if field.dtype.kind == "f" else np.float64)
    values = field.values
    values = values[np.isfinite(values) & (np.abs(values) < _HUGE)]
    rest = values[~np.isin(values, sentinels)]
    low, high = (float(rest.min()), float(rest.max())) if rest.size else (0.0, 0.0)
    spread = max(high - low, 1.0)
    return [
        v
        for v, s in zip(_SENTINELS, sentinels, strict=True)
        if (values == s).any() and not low - spread <= v <= high + spread
    ]


def mask_fill_values(field: xr.DataArray, fill: Sequence[float], *, mends: list[str]) -> xr.DataArray:
    """Mask the values ``fill`` and those beyond 1e15; reported in ``mends`` if any is listed or, in memory, found."""
    if field.dtype.kind != "f":
        field = field.astype(np.float64)
    huge = np.isfinite(field) & (np.abs(field) >= _HUGE)
    wrong = huge | field.isin(np.asarray(fill, dtype=field.dtype))
    found = [f"{v:g}" for v in fill]
    if field.chunks is None and bool(huge.any()):
        found.append("beyond 1e15")
    if found:
        count = "values" if field.chunks is not None else f"{int(wrong.sum())} values"
        mends.append(f"{count} ({', '.join(found)}) are fill values that the file does not declare; masked.")
    return field.where(~wrong)
