"""Several fields, members of an ensemble or lags of a field from files: the data set ``joint`` of a spec.

::

    [data]
    name = "joint"
    region = "north_pacific"
    [data.fields]
    sst = "sst.nc"
    slp = { path = "slp.nc", variable = "slp" }
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import xarray as xr
from annotated_types import Interval, Len

from probmodels.bayesian_svd.joint.stack import stack_fields, stack_lags, stack_members
from probmodels.datasets.gridded import expand_paths, member_labels
from probmodels.datasets.sst import load_sst
from probmodels.errors import DataError
from probmodels.options import Positive, Probability, check_options, checked

__all__ = ["FURTHER_LOADERS", "load_joint"]

_MIN_TIMES = 10

Files = str | Annotated[Sequence[str], Len(1)] | Mapping[str, Any]


@checked(DataError)
def load_joint(
    fields: Annotated[Mapping[str, Files], Len(1)],
    *,
    lags: Annotated[int, Interval(ge=2, le=1000)] | None = None,
    members: bool = False,
    weights: Mapping[str, Positive] | None = None,
    region: str | None = None,
    period: str | None = None,
    season: str | None = None,
    base_period: str | None = None,
    anomalies: bool = True,
    min_valid: Probability = 0.5,
    ice: float | None = None,
    daily: bool = False,
    fill: float | Sequence[float] = (),
) -> xr.DataArray:
    """Several fields, members of an ensemble, or windows of one field, as one matrix of cells.

    Parameters
    ----------
    fields
        By name: a file or files, or a table of ``path`` and options of `probmodels.datasets.sst.load_sst` that are this
        field's own, such as ``variable``. Two or more are stacked, on the times that all have; one with ``lags`` or
        ``members``.
    lags
        Times in a window, for patterns that evolve; see `probmodels.bayesian_svd.joint.stack.stack_lags`.
    members
        Whether the field is an ensemble: members share patterns, and each has series of its own. They are the files, or
        in a single file those along its dimension ``member``, ``ensemble``, ``realization``, ``number`` or the like.
    weights
        Share of each field in the total variance; equal by default.
    region, period, season, base_period, anomalies, min_valid, ice, daily, fill
        Of all fields, as for `probmodels.datasets.sst.load_sst`; ``ice`` is of fields in degrees Celsius only.

    Returns
    -------
    xr.DataArray
        Dims (cell, time), for ``make_problem``.

    Raises
    ------
    DataError
        If a file cannot be read, fields share fewer than 10 times, members differ in grid or times, or options do not
        go together.
    """
    common = {
        "region": region,
        "period": period,
        "season": season,
        "base_period": base_period,
        "anomalies": anomalies,
        "min_valid": min_valid,
        "ice": ice,
        "daily": daily,
        "fill": fill,
    }
    given = {name: _options(name, files, common) for name, files in fields.items()}
    _check_kind(fields, lags, members, weights)
    if members:
        ((name, options),) = given.items()
        return _members(name, options)
    loaded = {name: load_sst(**options) for name, options in given.items()}
    if lags is not None:
        return stack_lags(next(iter(loaded.values())), lags)
    return stack_fields(_on_shared_times(loaded), weights=weights)


FURTHER_LOADERS = {"joint": load_joint}


def _options(name: str, files: Files, common: Mapping[str, Any]) -> dict[str, Any]:
    """Options of ``load_sst`` for a field; those that are left at their defaults are left out."""
    if not re.fullmatch(r"[A-Za-z]\w*", name):
        raise DataError(f"fields: {name!r} is no name of a field; take letters, digits and _, such as slp")
    own = dict(files) if isinstance(files, Mapping) else {"path": files}
    if "path" not in own:
        raise DataError(f"fields.{name} names no file; add path = ...")
    check_options(load_sst, own, where=f"fields.{name}: ", error=DataError)
    defaults = {"anomalies": True, "min_valid": 0.5, "daily": False}
    asked = {key: value for key, value in common.items() if value is not None and value != defaults.get(key, ())}
    return asked | own


def _check_kind(
    fields: Mapping[str, Files], lags: int | None, members: bool, weights: Mapping[str, float] | None
) -> None:
    """Check that what is asked of the fields goes together."""
    if members and lags is not None:
        raise DataError(f"members=True and lags={lags}; choose one of them")
    special = "members=True" if members else f"lags={lags}" if lags is not None else None
    if special is None and len(fields) < 2:
        raise DataError(f"fields={list(fields)}; name two or more, or give lags or members")
    if special is not None and len(fields) > 1:
        raise DataError(f"{special} is of one field; fields={list(fields)} are {len(fields)}")
    if special is not None and weights is not None:
        raise DataError(f"weights={dict(weights)} is not used with {special}; leave it out")


def _on_shared_times(fields: dict[str, xr.DataArray]) -> dict[str, xr.DataArray]:
    """Fields at the times that all have; what is left out is said."""
    shared: np.ndarray | None = None
    for field in fields.values():
        times = field["time"].values
        shared = times if shared is None else np.intersect1d(shared, times)
    spans = ", ".join(f"{name} {_span(field['time'].values)}" for name, field in fields.items())
    if shared is None or len(shared) < _MIN_TIMES:
        count = 0 if shared is None else len(shared)
        raise DataError(
            f"the fields share {count} times ({spans}); at least {_MIN_TIMES} are needed: give fields of the same "
            "period, season and steps"
        )
    out = {}
    for name, field in fields.items():
        lost = field.sizes["time"] - len(shared)
        mends = json.loads(field.attrs.get("mends", "[]"))
        mends += [f"{lost} times of {name} are left out, which not all fields have"] * (lost > 0)
        out[name] = field.sel(time=shared).assign_attrs(mends=json.dumps(mends, ensure_ascii=False))
    return out


def _span(times: np.ndarray) -> str:
    return f"{str(times[0])[:10]} to {str(times[-1])[:10]}"


def _members(name: str, options: dict[str, Any]) -> xr.DataArray:
    """Members of an ensemble: of one file that holds them all, or a file each."""
    if "member" in options:
        raise DataError(
            f"fields.{name}.member={options['member']} is not used with members=True; leave one of them out"
        )
    path = options.pop("path")
    paths = expand_paths(path)
    own = [member_labels(file, variable=options.get("variable")) for file in paths]
    _check_members(name, paths, [len(labels) for labels in own])
    if len(paths) == 1:
        parts = [load_sst(path, member=i, **options) for i in range(len(own[0]))]
        labels = own[0]
    else:
        parts = [load_sst(file, **options) for file in paths]
        stems = [Path(file).stem for file in paths]
        labels = stems if len(set(stems)) == len(stems) else [str(i + 1) for i in range(len(paths))]
    for label, part in zip((paths if len(paths) > 1 else labels)[1:], parts[1:], strict=True):
        _check_alike(parts[0], part, label, paths[0] if len(paths) > 1 else labels[0])
    ocean = np.logical_and.reduce([part["ocean"].values for part in parts]) if "ocean" in parts[0].coords else None
    if ocean is not None:
        parts = [part.assign_coords(ocean=(("lat", "lon"), ocean)) for part in parts]
    return stack_members(xr.concat(parts, "member", combine_attrs="override").assign_coords(member=labels))


def _check_members(name: str, paths: Sequence[str], counts: Sequence[int]) -> None:
    """Check that there are several members: along a dimension of the one file, or a file each."""
    if len(paths) == 1 and counts[0] < 2:
        raise DataError(
            f"members=True takes one file of {name} with two members or more along a dimension such as 'member', "
            f"'number' or 'realization', or two files or more, one for each; {paths[0]} holds one"
        )
    if len(paths) > 1 and max(counts) > 1:
        held = ", ".join(f"{Path(path).name} {max(count, 1)}" for path, count in zip(paths, counts, strict=True))
        raise DataError(
            f"members=True takes one file that holds all members of {name}, or several files that hold one each; of "
            f"those given hold: {held}. Join or part them first"
        )


def _check_alike(one: xr.DataArray, other: xr.DataArray, label: str, first: str) -> None:
    for axis in ("time", "lat", "lon"):
        a, b = one[axis].values, other[axis].values
        if a.shape != b.shape or (a != b).any():
            sizes = f" ({b.size} and {a.size})" if a.size != b.size else ""
            raise DataError(f"{label} and {first} differ in {axis}{sizes}; members have the same grid and times")
