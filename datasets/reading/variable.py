"""Which variable of a data set is the field, and what becomes of its dimensions besides time and places: members of an
ensemble, and dimensions of length 1.
"""

from __future__ import annotations

from typing import Any

import xarray as xr

from probmodels.errors import DataError

__all__ = ["choose_variable", "labels_of_members", "without_extra"]

_MEMBERS = {"member", "members", "member_id", "ensemble", "ens", "ensemble_member", "number"}
_MEMBERS |= {"realization", "realisation", "run"}


def choose_variable(dataset: xr.Dataset, dims: set[Any], variable: str | None, where: str) -> str:
    """Name of the field: as asked, or the only one of numbers over these dims."""
    listing = ", ".join(f"{name} ({', '.join(map(str, v.dims))})" for name, v in dataset.data_vars.items()) or "none"
    if variable is not None:
        _check_named(dataset, dims, variable, f"{where}: ", listing)
        return variable
    bounds = {v.attrs[key] for v in dataset.variables.values() for key in ("bounds", "climatology") if key in v.attrs}
    shaped = {str(name): v for name, v in dataset.data_vars.items() if dims <= set(v.dims) and name not in bounds}
    found = [name for name, v in shaped.items() if v.dtype.kind in "iuf" and "flag_values" not in v.attrs]
    if not found and shaped:
        raise DataError(f"{where}: no variable is a field of numbers: {_no_numbers(shaped)}")
    if not found:
        raise DataError(f"{where}: no variable has time, latitude and longitude; its variables: {listing}")
    if len(found) > 1:
        raise DataError(
            f"{where}: several fields: {', '.join(found)}; choose one with variable='{found[0]}' (--variable)"
        )
    return found[0]


def _check_named(dataset: xr.Dataset, dims: set[Any], variable: str, where: str, listing: str) -> None:
    """Check that a variable that the user names is a field of numbers."""
    if variable not in dataset.variables:
        raise DataError(f"{where}no variable '{variable}'; its variables: {listing}")
    missing = dims - set(dataset[variable].dims)
    if missing:
        lacks = ", ".join(sorted(map(str, missing)))
        raise DataError(f"{where}variable '{variable}' lacks the dims {lacks}; its variables: {listing}")
    if dataset[variable].dtype.kind not in "biuf":
        raise DataError(f"{where}variable '{variable}' holds no numbers, but {dataset[variable].dtype}")


def _no_numbers(shaped: dict[str, xr.DataArray]) -> str:
    """Why variables of the right dims are no fields of numbers, and what can be done."""
    reasons = ", ".join(
        f"'{name}' {'carries flag_values' if v.dtype.kind in 'iuf' else f'is of type {v.dtype}'}"
        for name, v in shaped.items()
    )
    flags = [name for name, v in shaped.items() if v.dtype.kind in "iuf"]
    return reasons + (f"; to read one as a field all the same, name it with variable='{flags[0]}'" if flags else "")


def labels_of_members(dataset: xr.Dataset, name: str) -> list[str]:
    """Labels of the members of an ensemble that a variable holds: of their axis, or else their numbers from 1."""
    dim = _member_dim(dataset[name])
    if dim is None:
        return []
    count = dataset.sizes[dim]
    labels = [str(x) for x in dataset[dim].values] if dim in dataset.coords else []
    return labels if len(set(labels)) == count else [str(i + 1) for i in range(count)]


def _member_dim(field: xr.DataArray) -> str | None:
    """The dimension of the members, by its name or by the standard name of its axis."""
    for dim in map(str, field.dims):
        named = field.coords[dim].attrs.get("standard_name") if dim in field.coords else None
        if dim.lower() in _MEMBERS or named == "realization":
            return dim
    return None


def without_extra(field: xr.DataArray, name: str, dims: set[str], member: int | None, where: str) -> xr.DataArray:
    """The field of one member, without dimensions of length 1 besides time, latitude and longitude; others are refused.

    Members are counted from 0; None where the field has one only.
    """
    if len(set(field.dims)) < field.ndim:
        raise DataError(f"{where}: '{name}' has a dimension twice: {', '.join(map(str, field.dims))}")
    own = _member_dim(field)
    if member is not None:
        if own is None:
            raise DataError(f"{where}: '{name}' holds no ensemble, so that member={member} is not used; leave it out")
        if member >= field.sizes[own]:
            last = field.sizes[own] - 1
            raise DataError(f"{where}: '{name}' has the members 0 to {last} along '{own}', not member={member}")
        field = field.isel({own: member}, drop=True)
    for extra in [d for d in field.dims if d not in dims]:
        if field.sizes[extra] != 1:
            cause = f"has a dimension '{extra}' of length {field.sizes[extra]} besides time, latitude and longitude"
            if str(extra).lower() == "expver":
                raise DataError(
                    f"{where}: '{name}' {cause}: ERA5 (1) and its preliminary months (5); join them in Python with "
                    "x.sel(expver=1).combine_first(x.sel(expver=5)), or keep the first with 'ncks -d expver,0 IN OUT'"
                )
            if extra == own:
                raise DataError(
                    f"{where}: '{name}' holds {field.sizes[extra]} members of an ensemble along '{extra}'; take one "
                    "(member=0), or all of them (--members)"
                )
            raise DataError(
                f"{where}: '{name}' {cause}; select one of it first, for example with xarray's .isel({extra}=0) or "
                f"'ncks -d {extra},0 IN OUT'"
            )
        field = field.isel({extra: 0}, drop=True)
    return field
