"""Gridded fields out of NetCDF files, whatever their axes are called: found, ordered and opened lazily.

Axes are found by the attributes of the CF conventions (through cf-xarray where that is installed), then by name.
What comes out is always (time, lat, lon) with ascending latitude and time and longitudes that do not cut the field.
"""

from __future__ import annotations

import glob
import json
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import xarray as xr

from probmodels.datasets.axes import check_degrees, find_axes, find_places, lacking
from probmodels.datasets.calendars import decode_times, frequency, month_number, span_of
from probmodels.datasets.cells import place_coords
from probmodels.datasets.headers import check_declared_sizes, check_netcdf
from probmodels.datasets.reading.variable import choose_variable, labels_of_members, without_extra
from probmodels.datasets.regions import arrange_longitudes
from probmodels.datasets.units import same_units
from probmodels.errors import DataError
from probmodels.options import checked

__all__ = [
    "Source",
    "expand_paths",
    "fill_values",
    "join",
    "load_into_memory",
    "mask_fill_values",
    "mask_invalid",
    "member_labels",
    "open_field",
    "open_parts",
    "present_fill_values",
]

Source: TypeAlias = str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | xr.Dataset | xr.DataArray

_TEXTS = (
    "axis",
    "bounds",
    "calendar",
    "calendar_type",
    "cell_methods",
    "climatology",
    "coordinates",
    "grid_mapping",
    "long_name",
    "standard_name",
)  # attributes that are texts by the CF conventions
_FACTORS, _MISSING = ("scale_factor", "add_offset"), ("_FillValue", "missing_value")
_ZARR = (".zgroup", ".zarray", "zarr.json")
_RANGE = ("valid_range", "valid_min", "valid_max")
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
        A NetCDF file, a Zarr store, a glob pattern, an OPeNDAP address, a list of files that follow one another in
        time, or an xarray object.
    variable
        Name of the variable, where the file holds several fields.

    Returns
    -------
    xr.DataArray
        Dims (time, lat, lon), values and units as in the file; ``attrs["mends"]`` is a JSON list of repairs.
        Values stay on disk where dask is installed; without it they are read to have their fill values masked.
        Curvilinear grids are (time, row, column), stations (time, row), with lat and lon of each cell as coords.

    Raises
    ------
    DataError
        If a file cannot be read, holds no field, or several of which none is named.
    """
    mends: list[str] = []
    parts, _ = open_parts(path_or_paths, variable=variable, mends=mends)
    if find_spec("dask") is not None:
        parts = [part if part.chunks is not None else part.chunk({"time": "auto"}) for part in parts]
    field = join([mask_invalid(part) for part in parts])
    if "lon" in field.dims:
        index, lon = arrange_longitudes(field["lon"].values)
        field = field.isel(lon=as_slice(index)).assign_coords(lon=lon)
    sample = field.isel(time=sorted({0, field.sizes["time"] // 2, field.sizes["time"] - 1}))
    field = mask_fill_values(field, fill_values(sample), mends=mends)
    field.attrs["mends"] = json.dumps(mends)
    return field


def open_parts(
    source: Source, *, variable: str | None, mends: list[str], member: int | None = None
) -> tuple[list[xr.DataArray], list[Path]]:
    """Fields of the single files, lazily and in order of time, and the local files that they come from.

    Where they hold an ensemble, ``member`` tells which of it is read.

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
        where = "data in memory"
        dataset = _with_good_attrs(source, where, mends)
        if any(key in v.attrs for v in dataset.data_vars.values() for key in (*_FACTORS, *_MISSING)):
            dataset = xr.decode_cf(dataset, decode_times=False)  # opened as it lies in the file
        return [_canonical(dataset, variable, member, where=where, mends=mends)], []
    names = expand_paths(source)
    parts: list[xr.DataArray] = []
    with ExitStack() as opened:
        for name in names:
            dataset = opened.enter_context(_open_dataset(name, mends))
            parts.append(_canonical(dataset, variable, member, where=_short(name), mends=mends))
            parts[-1].set_close(dataset.close)
            _check_agreement(parts[0], parts[-1], _short(names[0]), _short(name))
        opened.pop_all()  # all are good: the caller closes them
    if len({part["time"].dtype for part in parts}) > 1:  # of one unit, which has room for all of them
        for i, part in enumerate(parts):
            parts[i] = part.assign_coords(time=part["time"].values.astype("datetime64[s]"))
            parts[i].set_close(part.close)
    parts.sort(key=lambda part: part["time"].values[0])
    return parts, [Path(name) for name in names if "://" not in name]


def member_labels(source: str | os.PathLike[str] | xr.Dataset, *, variable: str | None = None) -> list[str]:
    """Labels of the members that a file holds along a dimension such as "realization"; none without such a dimension.

    Raises
    ------
    DataError
        If the file cannot be read, or holds no field, or several of which none is named.
    """
    if isinstance(source, xr.Dataset):
        return labels_of_members(source, _find_field(source, variable, "data in memory").name)
    with _open_dataset(os.fspath(source), []) as dataset:
        return labels_of_members(dataset, _find_field(dataset, variable, _short(os.fspath(source))).name)


def load_into_memory(field: xr.DataArray) -> xr.DataArray:
    """The field with its values read from disk.

    Raises
    ------
    DataError
        If they cannot be read.
    """
    try:
        return field.load()
    except Exception as error:  # libraries raise whatever they like for damaged chunks
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
        if any(os.path.exists(os.path.join(text, name)) for name in _ZARR):
            if find_spec("zarr") is None:
                raise DataError(f"{text} is a Zarr store, which the package zarr reads: pip install probmodels[sst]")
            return [text]
        raise DataError(f"{text} is a folder; name a file in it, or all with '{text}/*.nc'")
    if glob.has_magic(text):
        found = sorted(name for name in glob.glob(text) if os.path.isfile(name))
        if not found:
            raise DataError(f"no file matches '{text}' (working folder: {os.getcwd()})")
        return found
    raise DataError(f"file not found: {text} (working folder: {os.getcwd()})")


def _short(name: str) -> str:
    return name if "://" in name else os.path.basename(name)


def _open_dataset(name: str, mends: list[str]) -> xr.Dataset:
    """A file with its attributes made good, its values and times as they lie there, coordinates in memory."""
    store = os.path.isdir(name)
    path = None if "://" in name or store else check_netcdf(name)
    kind, hint = ("Zarr", "is it complete?") if store else ("NetCDF", f"is it complete? Try 'ncdump -h {name}'")
    try:
        with warnings.catch_warnings():
            # two different fill values in one variable are legal to mask, and xarray warns of them
            warnings.simplefilter("ignore", xr.SerializationWarning)
            options: dict[str, Any] = {"engine": "zarr", "consolidated": False} if store else {}
            raw = xr.open_dataset(name, decode_cf=False, **options)
    except Exception as error:  # libraries raise whatever they like for a damaged file
        raise DataError(f"{name} cannot be read as {kind} ({error}); {hint}") from error
    try:
        if path is not None:
            check_declared_sizes(raw, path)
            if not raw.variables:
                _refuse_groups(path)
        good = _with_good_attrs(raw, _short(name), mends)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", xr.SerializationWarning)
            dataset = xr.decode_cf(good, decode_times=False)
        for variable in dataset.variables.values():
            if variable.ndim < 2:
                variable.load()
    except DataError:
        raw.close()
        raise
    except Exception as error:
        raw.close()
        raise DataError(f"{name} cannot be read as {kind} ({error}); {hint}") from error
    dataset.set_close(raw.close)
    return dataset


def _refuse_groups(path: Path) -> None:
    """Raise DataError where a file without variables has groups."""
    import netCDF4

    with netCDF4.Dataset(path) as file:
        groups = list(file.groups)
    if groups:
        raise DataError(
            f"{path} holds only groups: {', '.join(groups)}; copy one into a file of its own with "
            f"'ncks -G : -g {groups[0]} IN OUT'"
        )


def _with_good_attrs(dataset: xr.Dataset, where: str, mends: list[str]) -> xr.Dataset:
    """The dataset with attributes of the wrong type read where that is plain, else left out and reported."""
    good = dataset.copy(deep=False)
    for key in _TEXTS:
        if not isinstance(good.attrs.get(key, ""), str):
            mends.append(f"{where}: the global attribute {key} is {good.attrs.pop(key)!r} and no text; left aside.")
    for name, variable in good.variables.items():
        attrs = dict(variable.attrs)
        if "units" in attrs and not isinstance(attrs["units"], str):
            attrs["units"] = str(attrs["units"])
        for key in _TEXTS:
            if key in attrs and not isinstance(attrs[key], str):
                mends.append(f"{where}: the attribute {key} of '{name}' is {attrs.pop(key)!r} and no text; left aside.")
        for key in (*_FACTORS, *_MISSING):
            if key not in attrs or (variable.dtype.kind not in "iuf" and key in _MISSING):
                continue
            numbers = _numbers(attrs[key])
            if len(numbers) == 1 or (numbers and key in _MISSING):
                if isinstance(attrs[key], str):
                    attrs[key] = numbers[0]
            elif key in _FACTORS:
                raise DataError(
                    f"{where}: {key} = {attrs[key]!r} of '{name}' is no number; set it, for example with "
                    f"'ncatted -a {key},{name},o,d,0.01 FILE'"
                )
            else:
                mends.append(f"{where}: the attribute {key} of '{name}' is {attrs.pop(key)!r}, no number; left aside.")
        variable.attrs = attrs
    return good


def _numbers(value: Any) -> list[float]:
    """The finite numbers that an attribute holds, or nothing; texts are read."""
    try:
        parts = re.split(r"[,\s]+", value.strip().rstrip("fF")) if isinstance(value, str) else np.ravel(value).tolist()
        found = [float(part) for part in parts]
    except (TypeError, ValueError):
        return []
    return found if np.isfinite(found).all() or not isinstance(value, str) else []


# ------------------------------------------------------------------------------------------------- the variable


class _Place(NamedTuple):
    """Where the field lies in a data set: its axes, places of cells off a grid, its time, dims and name."""

    axes: Mapping[str, str]
    places: Any
    time: xr.Variable
    along: list[str]
    across: list[str]
    name: str


def _find_field(dataset: xr.Dataset, variable: str | None, where: str) -> _Place:
    axes = find_axes(dataset)
    places = find_places(dataset, axes, variable) if "time" in axes else None
    if places is None and set(axes) != {"time", "lat", "lon"}:
        raise DataError(f"{where}: no recognisable field: {lacking(dataset, axes)}")
    time = dataset.variables[axes["time"]]
    if places is None:
        across = [str(dataset.variables[axes[key]].dims[0]) for key in ("lat", "lon")]
    else:
        across = [str(dim) for dim in dataset.variables[places[0]].dims]
    along = [] if time.ndim == 0 else [str(time.dims[0])]  # one map, its date beside it
    return _Place(axes, places, time, along, across, choose_variable(dataset, {*along, *across}, variable, where))


def _canonical(
    dataset: xr.Dataset, variable: str | None, member: int | None, *, where: str, mends: list[str]
) -> xr.DataArray:
    """The field of one dataset, lazily, as (time, lat, lon) with decoded dates, longitudes in the order of the file.

    Fields of a curvilinear grid or of stations are (time, row, column) or (time, row), with lat, lon and, where the
    file has it, the area of each cell as coords.
    """
    axes, places, time, along, across, name = _find_field(dataset, variable, where)
    field = without_extra(dataset[name], name, {*along, *across}, member, where)
    if places is None:
        check_degrees(dataset, axes, field, where)
    if not along:
        field, along = field.expand_dims("time"), ["time"]
    field = field.transpose(*along, *across)
    for dim in (*along, *across):
        if field.sizes[dim] == 0:
            raise DataError(f"{where}: the axis {dim} of '{name}' is empty")
    dates, time_order = _dates(dataset, time, where, mends)
    field = field.isel({along[0]: as_slice(time_order)})
    dims: tuple[str, ...] = ("time", "lat", "lon")
    if places is None:
        field, coords = _on_grid(dataset, axes, field, across, where, mends)
    else:
        dims = ("time", "row", "column")[: 1 + len(across)]
        coords = {key: (dims[1:], values) for key, values in place_coords(dataset, places, field, where, mends).items()}
    values = field.variable.copy(deep=False)  # a DataArray made anew from it keeps the values on disk
    values.dims = dims
    values.attrs = _with_valid_range(field.variable, name, where, mends)
    found = xr.DataArray(values, {"time": dates[time_order], **coords}, name=name)
    chunks = field.variable.encoding.get("preferred_chunks", {})
    found.encoding = {"preferred_chunks": {"time": chunks[along[0]]}} if along[0] in chunks else {}
    return found


def _on_grid(
    dataset: xr.Dataset, axes: Mapping[str, str], field: xr.DataArray, dims: Sequence[str], where: str, mends: list[str]
) -> tuple[xr.DataArray, dict[str, Any]]:
    """A field of a rectangular grid with ascending latitudes, and its axes."""
    lat, lon = (dataset.variables[axes[key]].values.astype(np.float64) for key in ("lat", "lon"))
    order = np.argsort(lat, kind="stable")
    if len(np.unique(np.round(lat, 4))) != len(lat):
        raise DataError(f"{where}: latitudes repeat; remove the doubled rows")
    if (repeated := len(lon) - len(arrange_longitudes(lon)[0])) > 0:
        mends.append(f"{where}: {repeated} longitudes repeat around the circle; kept once.")
    return field.isel({dims[0]: as_slice(order)}), {"lat": np.round(lat[order], 4), "lon": np.round(lon, 4)}


def _dates(dataset: xr.Dataset, time: xr.Variable, where: str, mends: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Dates of a time axis, and their order."""
    bounds = _time_bounds(dataset, time)
    dates, said = decode_times(
        np.atleast_1d(time.values),
        time.attrs,
        where=where,
        bounds=bounds,
        coverage_start=str(dataset.attrs.get("time_coverage_start", "")),
    )
    mends.extend(said)
    if "bounds" in time.attrs and bounds is None:
        mends.extend(_said_of_bounds(dates, time.attrs["bounds"], where))
    if (np.diff(dates) < np.timedelta64(0, "s")).any():
        mends.append(f"{where}: times are not in order; sorted, {str(dates.min())[:10]} to {str(dates.max())[:10]}.")
    return dates, np.argsort(dates, kind="stable")


def _said_of_bounds(dates: np.ndarray, name: str, where: str) -> list[str]:
    """A sentence where the file lacks the bounds that tell which month the first of a month stands for."""
    if frequency(np.sort(dates)) == "submonthly" or (dates != dates.astype("datetime64[M]")).any():
        return []
    return [
        f"{where}: the bounds '{name}' of the times are not in the file; dates are taken for the months that they "
        f"begin, {span_of(month_number(np.sort(dates)))}; if they end them, shift the times with "
        "'cdo shifttime,-1month IN OUT'."
    ]


def _time_bounds(dataset: xr.Dataset, time: xr.Variable) -> np.ndarray | None:
    """Numbers (time, 2) that bound the time steps, where the file has them."""
    name = time.attrs.get("bounds")
    if name not in dataset.variables or dataset[name].dtype.kind not in "iuf":
        return None
    if dataset[name].size != 2 * time.size:
        return None
    bounds = load_into_memory(dataset[name]).values.astype(np.float64)
    bounds = bounds[None] if time.ndim == 0 else bounds
    return bounds if bounds.ndim == 2 and bounds.shape[1] == 2 else None


def _with_valid_range(variable: xr.Variable, name: str, where: str, mends: list[str]) -> dict[str, Any]:
    """Attributes of a variable with its valid range, as one pair in its units, in place of what the file writes."""
    attrs = {key: value for key, value in variable.attrs.items() if key not in _RANGE}
    written = {key: variable.attrs[key] for key in _RANGE if key in variable.attrs}
    if not written:
        return attrs
    low, high = -np.inf, np.inf
    for key, value in written.items():
        numbers = _numbers(value)
        if len(numbers) != (2 if key == "valid_range" else 1):
            mends.append(f"{where}: the attribute {key} of '{name}' is {value!r}, no range; left aside.")
            continue
        scale, offset = (float(variable.encoding.get(k, default)) for k, default in zip(_FACTORS, (1, 0), strict=True))
        if scale != 1 or offset != 0:  # the range is of the type that it is about
            packed = isinstance(value, str) or np.asarray(value).dtype.kind in "iu"
            numbers = sorted(scale * x + offset for x in numbers) if packed else numbers
        low = max(low, numbers[0]) if key != "valid_max" else low
        high = min(high, numbers[-1]) if key != "valid_min" else high
    if not low < high:
        mends.append(f"{where}: the valid range {low:g} to {high:g} of '{name}' is empty; left aside.")
        return attrs
    return attrs | {"valid_range": (low, high)}


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
        own, theirs = first[axis].values, part[axis].values
        if own.shape != theirs.shape or not np.allclose(own, theirs, atol=1e-3, equal_nan=True):
            raise DataError(
                f"{name}: its {axis} axis ({theirs.size} values from {theirs.flat[0]:g}) differs from that "
                f"of {first_name} ({own.size} from {own.flat[0]:g}); "
                "open only files of one grid together"
            )
    for what, one, other in (
        ("variable", first.name, part.name),
        ("units", first.attrs.get("units", ""), part.attrs.get("units", "")),
    ):
        if one != other and not same_units(str(one), str(other)):
            raise DataError(
                f"{name}: {what} '{other}' differs from '{one}' of {first_name}; "
                "open only files of one product together"
            )


# ---------------------------------------------------------------------------------------------------- fill values


def mask_invalid(part: xr.DataArray) -> xr.DataArray:
    """Mask what lies outside of the valid range that the file declares (rounding of 32 bits apart)."""
    if "valid_range" not in part.attrs:
        return part
    low, high = part.attrs["valid_range"]
    slack = 1e-6 * max((abs(x) for x in (low, high) if np.isfinite(x)), default=0.0)
    masked = part.where(part.isnull() | ((part >= low - slack) & (part <= high + slack)))
    masked.attrs = {key: value for key, value in part.attrs.items() if key != "valid_range"}
    return masked


def fill_values(field: xr.DataArray) -> list[float]:
    """Well-known fill values, such as -1000 and -999, that stand further from all other values than those spread."""
    found, low, high = present_fill_values(field)
    low, high = (low, high) if low <= high else (0.0, 0.0)
    spread = max(high - low, 1.0)
    return [v for v in _SENTINELS if v in found and not low - spread <= v <= high + spread]


def present_fill_values(field: xr.DataArray) -> tuple[set[float], float, float]:
    """Well-known fill values that a field holds, and the lowest and highest of its other values."""
    sentinels = np.asarray(_SENTINELS, dtype=field.dtype if field.dtype.kind == "f" else np.float64)
    values = field.values
    values = values[np.isfinite(values) & (np.abs(values) < _HUGE)]
    if not values.size:
        return set(), np.inf, -np.inf
    low, high = float(values.min()), float(values.max())
    if low > max(v for v in _SENTINELS if v < 0) and high < min(v for v in _SENTINELS if v > 0):
        return set(), low, high
    found = {v for v, s in zip(_SENTINELS, sentinels, strict=True) if (values == s).any()}
    rest = values[~np.isin(values, sentinels)]
    return found, *((float(rest.min()), float(rest.max())) if rest.size else (np.inf, -np.inf))


def mask_fill_values(field: xr.DataArray, fill: Sequence[float], *, mends: list[str]) -> xr.DataArray:
    """Mask the values ``fill`` and those beyond 1e15; reported in ``mends`` if any is listed or, in memory, found."""
    if field.dtype.kind != "f":
        field = field.astype(np.float64)
    huge = np.isfinite(field) & (np.abs(field) >= _HUGE)
    wrong = huge | field.isin(np.asarray(fill, dtype=field.dtype))
    found = [f"{v:g}" + ", sea ice in HadISST" * (v == -1000.0) for v in fill]
    if field.chunks is None and bool(huge.any()):
        found.append("beyond 1e15")
    if found:
        count = "values" if field.chunks is not None else f"{int(wrong.sum())} values"
        mends.append(f"{count} ({', '.join(found)}) are fill values that the file does not declare; masked.")
    return field.where(~wrong)
