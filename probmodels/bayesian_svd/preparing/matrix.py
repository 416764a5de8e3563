"""The data of a Bayesian SVD as a matrix of cells by times, weights of its cells, and whether they can bear a model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from probmodels.bayesian_svd.noise import MOST_CELLS
from probmodels.bayesian_svd.sides import check_room
from probmodels.datasets.calendars import decode_times
from probmodels.datasets.labelled import arranged
from probmodels.errors import DataError

__all__ = ["as_matrix", "cell_weights", "check_field", "check_told_apart"]

_MIN_TIMES = 10


def as_matrix(data: xr.DataArray | xr.Dataset) -> tuple[xr.DataArray, list[str]]:
    """The data as (cell, time), land dropped, and a sentence for each repair, those of earlier steps included."""
    try:
        mends: list[str] = list(map(str, json.loads(data.attrs.get("mends", "[]"))))
    except (TypeError, ValueError):  # an attribute of that name from elsewhere
        mends = []
    if isinstance(data, xr.Dataset):
        if "data" not in data:
            raise DataError(f"data hold {list(data.data_vars)}; give an array, or a data set with an array 'data'")
        data = data["data"]
    if {"lat", "lon"} <= set(data.dims):
        from probmodels.datasets.sst import to_matrix

        data = to_matrix(data)
    if data.ndim != 2:
        raise DataError(f"data has dims {tuple(map(str, data.dims))}; expected (cell, time) or (time, lat, lon)")
    row, column = data.dims
    data = data.rename({k: v for k, v in ((row, "cell"), (column, "time")) if k != v}).astype(np.float64)
    if np.isinf(data.values).any():
        raise DataError(f"data holds {int(np.isinf(data.values).sum())} infinite entries; mark missing entries by NaN")
    seen = np.isfinite(data.values)
    if not seen.any():
        raise DataError("data holds no finite entry")
    land = ~seen.any(axis=1)
    if land.any():
        mends.append(f"{int(land.sum())} of {land.size} cells never hold a value; they are land and left out")
        data = data[~land]
    _check_values(data)
    for name in ("cell", "time"):
        if name not in data.coords:
            data = data.assign_coords({name: np.arange(data.sizes[name])})
    if data["time"].dtype.kind in "OSU":
        dates, _ = decode_times(data["time"].values, {}, where="the axis 'time'")
        data = data.assign_coords(time=dates)
    return data, mends


def _check_values(data: xr.DataArray) -> None:
    """Check that there are enough times, each with a value, and that each cell varies."""
    if data.sizes["time"] < _MIN_TIMES:
        raise DataError(f"data has {data.sizes['time']} times; at least {_MIN_TIMES} are needed")
    empty = ~np.isfinite(data.values).any(axis=0)
    if empty.any():
        raise DataError(
            f"{int(empty.sum())} times hold no value at all, the first at index {int(np.argmax(empty))}; drop them, or "
            "choose a period without them (--period)"
        )
    with np.errstate(invalid="ignore"):
        spread = np.nanmax(data.values, axis=1) - np.nanmin(data.values, axis=1)
    if (spread == 0).any():
        raise DataError(
            f"{int((spread == 0).sum())} cells are constant in time, the first at index {int(np.argmax(spread == 0))}; "
            "drop them (load_sst and the command sst take them for land)"
        )


def cell_weights(data: xr.DataArray, area_weights: bool | Sequence[float]) -> np.ndarray:
    """Weights of the cells, of mean 1: all alike, by area, or as given."""
    size = data.sizes["cell"]
    if area_weights is False:
        return np.ones(size)
    if area_weights is True:
        if "lat" not in data.coords:
            return np.ones(size)
        if "area_weight" in data.coords:
            weight = np.asarray(data["area_weight"].values, dtype=np.float64)
        else:
            weight = np.cos(np.deg2rad(np.asarray(data["lat"].values, dtype=np.float64)))
        if (weight <= 1e-6).any():
            raise DataError(
                "area weights vanish at the poles; leave out cells at latitude ±90 (--region=-89,89,0,360) or set "
                "area_weights=False (--set model.area_weights=false)"
            )
    else:
        given = arranged(area_weights, "area_weights", {"cell": data["cell"].values})
        weight = np.asarray(given, dtype=np.float64)
        if weight.shape != (size,):
            raise DataError(f"area_weights has {len(weight)} numbers; give {size}, one for each cell, or true or false")
    return weight / weight.mean()


def check_field(
    matrix: xr.DataArray, seen: np.ndarray, local: xr.DataArray, common: xr.DataArray, options: Mapping[str, Any]
) -> None:
    """Check that field, memory, effects and noise go together, before anything is computed."""
    _check_extent(options["rank"], seen, local.sizes["effect"])
    check_room(seen.shape[0], seen.shape[1], options["max_basis"])
    overlap = set(local["effect"].values) & set(common["effect"].values)
    if options["effect_scale"] is None and overlap:
        raise DataError(
            f"{sorted(overlap)} cannot be local and shared at once under a flat prior; drop one or set effect_scale"
        )
    if options["noise"] == "correlated" and matrix.sizes["cell"] > MOST_CELLS:
        raise DataError(
            f"noise='correlated' takes at most {MOST_CELLS} cells, not {matrix.sizes['cell']}; take a coarser "
            "grid or a smaller region, or noise='white'"
        )


def _check_extent(rank: int, seen: np.ndarray, num_effects: int) -> None:
    """Check that the data (cell, time) are enough for the modes, and each cell for its effects."""
    n, num_times = seen.shape
    if rank > (most := min(n, num_times - num_effects) - 1):
        data = f"{n} cell{'s' * (n != 1)} x {num_times} times with {num_effects} fixed effects"
        if most < 1:
            raise DataError(f"{data} are too few data for any mode; take a larger region or period, or fewer effects")
        raise DataError(f"rank={rank} is out of range: {data} allow 1 to {most}")
    if (seen.sum(1) <= num_effects + 1).any():
        worst = int(np.argmin(seen.sum(1)))
        raise DataError(
            f"cell {worst} holds {seen[worst].sum()} values, too few for {num_effects} fixed effects; "
            "drop it (--min-valid with a higher share), or take fewer effects (--fixed-effects)"
        )


def check_told_apart(seen: np.ndarray, design: np.ndarray, effects: list[str]) -> None:
    """Check that the orthonormal design (time, effect) keeps full rank at the times that each cell holds."""
    if not effects:
        return
    smallest = np.linalg.eigvalsh(np.einsum("nt,tq,ts->nqs", seen.astype(float), design, design))[:, 0]
    if smallest.min() < 1e-10:
        worst = int(smallest.argmin())
        raise DataError(
            f"cell {worst} holds values at {seen[worst].sum()} times, which cannot tell its fixed effects "
            f"{effects} apart; drop the cell (--min-valid with a higher share) or an effect (--fixed-effects)"
        )
