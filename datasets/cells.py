"""Cells of a map as rows of a matrix, and back; cells that lie on no rectangular grid."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from probmodels.datasets.regions import Region, arrange_longitudes
from probmodels.errors import DataError
from probmodels.options import Probability, checked, refuse_unused

__all__ = [
    "ICE",
    "MUCH_ICE",
    "area_weight",
    "cells_inside",
    "check_coarse",
    "coarse_values",
    "coarsened",
    "coarsened_axis",
    "from_cells",
    "mesh_attrs",
    "ocean_cells",
    "place_coords",
    "said_of_ice",
    "scattered_matrix",
    "to_matrix",
]

ICE = "whether the sea is frozen"
MUCH_ICE = 0.2  # share of the times in which a cell is frozen that maps hatch
_AREAS = r"areacell[ao]|cell_?area|t?area(_t)?"  # names of the areas of cells


def area_weight(lat: np.ndarray) -> np.ndarray:
    """Cosine of latitude; rows on the poles get that of a quarter cell off, as their cells are caps, not points."""
    step = float(np.min(np.diff(np.unique(lat)))) if len(lat) > 1 else 1.0
    return np.cos(np.deg2rad(np.minimum(np.abs(lat), 90 - step / 4)))


def ocean_cells(field: xr.DataArray, min_valid: float, mends: list[str]) -> np.ndarray:
    """Cells that are analysed, shape (lat, lon): often enough valid, and not constant."""
    valid = np.isfinite(field.values)
    share = valid.mean(axis=0)
    ocean = (share > 0) & (share >= min_valid)
    if not ocean.any():
        raise DataError(
            f"the selection is all land: no cell of '{field.name}' has {min_valid:.0%} of its {len(valid)} time steps "
            f"(the best has {share.max():.0%}); choose another region or lower min_valid (--min-valid)"
        )
    partly = int(((share > 0) & ~ocean).sum())
    if partly:
        lost = f"{partly} cells with fewer than {min_valid:.0%} valid time steps are treated as land"
        frozen = _frozen_share(field)
        iced = int(((share > 0) & ~ocean & (share + frozen >= min_valid)).sum())
        mends.append(f"{lost}, {iced} of them for sea ice." if iced else f"{lost}.")
    with np.errstate(invalid="ignore"):  # of infinite values
        high, low = np.fmax.reduce(field.values, axis=0), np.fmin.reduce(field.values, axis=0)
        size = max(np.nanmax(np.abs(high)), np.nanmax(np.abs(low)), 1.0)
        constant = ocean & (np.where(ocean, high - low, 0.0) <= 1e-7 * size)
    if constant.any():
        if (constant == ocean).all():
            raise DataError(
                f"all {int(ocean.sum())} cells of '{field.name}' are constant in time; is this the right variable? "
                "(Of less than two years anomalies from their own climatology are zero: --no-anomalies)"
            )
        mends.append(f"{int(constant.sum())} cells are constant in time, as under lasting ice; treated as land.")
    return ocean & ~constant


_SEEN = 0.5  # share of the area of cells that are averaged to one which has to hold values


def coarsened(field: xr.DataArray, size: int) -> xr.DataArray:
    """Means over boxes of ``size`` by ``size`` cells of a field (time, lat, lon), by area."""
    frozen = field["ice"].values if "ice" in field.coords else np.zeros(field.shape, dtype=bool)
    values, frozen = coarse_values(field.values, frozen, field["lat"].values, size)
    coords = {"time": field["time"].values} | {k: coarsened_axis(field[k].values, size) for k in ("lat", "lon")}
    out = xr.DataArray(values, coords, field.dims, name=field.name, attrs=field.attrs)
    return out.assign_coords(ice=(field.dims, frozen & np.isnan(values))) if "ice" in field.coords else out


def check_coarse(field: xr.DataArray, sizes: Mapping[str, int], size: int, mends: list[str]) -> None:
    """Check that boxes of ``size`` by ``size`` cells fit into a field; rows and columns that are left over are said.

    Raises
    ------
    DataError
        If they do not, or the grid is not rectangular.
    """
    if not {"lat", "lon"} <= set(field.dims):
        raise DataError(
            f"coarsen={size} averages boxes of a rectangular grid, which '{field.name}' is not on; leave it out"
        )
    if min(sizes["lat"], sizes["lon"]) < 2 * size:
        raise DataError(f"coarsen={size}: the field has {sizes['lat']} x {sizes['lon']} cells; choose a smaller number")
    left = {name: sizes[name] % size for name in ("lat", "lon")}
    said = f"Boxes of {size} x {size} cells were averaged, by area"
    if any(left.values()):
        said += f"; {left['lat']} rows in the north and {left['lon']} columns in the east that fill none were left out"
    mends.append(f"{said}.")


def coarse_values(values: np.ndarray, frozen: np.ndarray, lat: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Means of boxes (time, lat, lon), NaN where less than half their area holds values, and whether any is frozen."""
    rows, columns = values.shape[1] // size, values.shape[2] // size

    def boxes(array: np.ndarray) -> np.ndarray:
        return array[:, : rows * size, : columns * size].reshape(-1, rows, size, columns, size)

    box, weight = boxes(values), area_weight(lat)[: rows * size].reshape(rows, size)[None, :, :, None, None]
    there = np.isfinite(box)
    area = np.sum(there * weight, axis=(2, 4))
    total = np.sum(np.where(there, box, 0.0) * weight, axis=(2, 4))
    enough = area >= _SEEN * size * weight.sum(axis=2)[..., 0] - 1e-12
    return np.where(enough, total / np.where(area > 0, area, 1.0), np.nan), np.asarray(boxes(frozen).any(axis=(2, 4)))


def coarsened_axis(axis: np.ndarray, size: int) -> np.ndarray:
    """Centres of boxes of ``size`` cells."""
    return np.asarray(axis[: len(axis) // size * size].reshape(-1, size).mean(axis=1))


def _frozen_share(field: xr.DataArray) -> np.ndarray:
    """Share of the times in which each cell is frozen."""
    return field["ice"].values.mean(axis=0) if "ice" in field.coords else np.zeros(field.shape[1:])


def said_of_ice(field: xr.DataArray, ocean: np.ndarray, mends: list[str]) -> None:
    """Say in how many cells that are analysed ice has a large share."""
    count = int((ocean & (_frozen_share(field) > MUCH_ICE)).sum())
    if count:
        mends.append(
            f"{count} cells are frozen in more than {MUCH_ICE:.0%} of the times, which maps hatch: their modes are "
            "those of open water."
        )


@checked(DataError)
def to_matrix(field: xr.DataArray, *, min_valid: Probability = 0.5) -> xr.DataArray:
    """Lay the ocean cells of a field out as the rows of a matrix.

    Parameters
    ----------
    field
        Dims (time, lat, lon), as from `load_sst` or `open_field`.
    min_valid
        Share of valid time steps below which a cell is land; not used where the field has a coord ``ocean``.

    Returns
    -------
    xr.DataArray
        Dims (cell, time), cells from south-west row by row, NaN in gaps; coords ``cell`` (0, 1, ...), ``lat``,
        ``lon``, ``lat_index``, ``lon_index`` and ``area_weight`` by cell, ``time``, and ``ice`` where the field has
        it. The attrs of the field, and the axes of its grid as ``grid_lat`` and ``grid_lon``.

    Raises
    ------
    DataError
        If the field has other dims, or no ocean cell, or an option is out of range or not used.
    """
    if "ocean" in field.coords:
        refuse_unused(to_matrix, "the field's coord 'ocean'", min_valid=min_valid)
    if set(field.dims) != {"time", "lat", "lon"}:
        raise DataError(f"the field has dims {field.dims}; expected (time, lat, lon), as load_sst gives")
    field = field.transpose("time", "lat", "lon")
    ocean = field["ocean"].values if "ocean" in field.coords else ocean_cells(field, min_valid, [])
    rows, columns = np.nonzero(ocean)
    lat, lon = field["lat"].values, field["lon"].values
    coords = {
        "cell": np.arange(len(rows)),
        "time": field["time"].variable,
        "lat": ("cell", lat[rows], {"standard_name": "latitude", "units": "degrees_north"}),
        "lon": ("cell", lon[columns], {"standard_name": "longitude", "units": "degrees_east"}),
        "lat_index": ("cell", rows),
        "lon_index": ("cell", columns),
        "area_weight": ("cell", area_weight(lat)[rows]),
    }
    if "climatology" in field.coords:
        cycle = field["climatology"].transpose("time", "lat", "lon")
        coords["climatology"] = ("cell", "time"), cycle.values[:, rows, columns].T, cycle.attrs
    attrs = field.attrs | {"grid_lat": lat, "grid_lon": lon}
    if "ice" in field.coords:
        coords["ice"] = ("cell", "time"), field["ice"].values[:, rows, columns].T, field["ice"].attrs
    return xr.DataArray(
        field.values[:, rows, columns].T.astype(np.float64), coords, ("cell", "time"), name=field.name, attrs=attrs
    )


@checked(DataError)
def from_cells(cells: xr.DataArray | np.ndarray, template: xr.DataArray) -> xr.DataArray:
    """Put values of ocean cells back onto the map, NaN on land.

    Parameters
    ----------
    cells
        Labelled with a dim ``cell``, or an array in which exactly one axis has the number of cells.
    template
        The matrix that `to_matrix` gave, or the field that it was given.

    Returns
    -------
    xr.DataArray
        The other dims in their order, then lat and lon.

    Raises
    ------
    DataError
        If the number of cells does not fit.
    """
    matrix = template if "cell" in template.dims else to_matrix(template)
    if not {"grid_lat", "grid_lon"} <= set(matrix.attrs):
        raise DataError(
            "the template lacks the attrs grid_lat and grid_lon of its grid; use the matrix that to_matrix gave"
        )
    lat, lon = (np.atleast_1d(matrix.attrs[k]) for k in ("grid_lat", "grid_lon"))
    size = matrix.sizes["cell"]
    if not isinstance(cells, xr.DataArray):
        values = np.asarray(cells)
        fits = [axis for axis, length in enumerate(values.shape) if length == size]
        if len(fits) != 1:
            raise DataError(
                f"an array of shape {values.shape} does not have one axis of {size} cells; label it with dim 'cell'"
            )
        cells = xr.DataArray(values, dims=["cell" if axis == fits[0] else f"dim_{axis}" for axis in range(values.ndim)])
    if cells.sizes.get("cell") != size:
        raise DataError(
            f"values with dims {dict(cells.sizes)} do not fit a template of {size} cells; "
            "were they made from another field?"
        )
    if "cell" in cells.coords and "cell" in matrix.coords:
        own, wanted = pd.Index(cells["cell"].values), pd.Index(matrix["cell"].values)
        if not (own.is_unique and own.isin(wanted).all()):
            raise DataError(
                "values along 'cell' have other labels than the template; were they made from another field?"
            )
        cells = cells.isel(cell=own.get_indexer(wanted))
    rest = [d for d in cells.dims if d != "cell"]
    values = cells.transpose(*rest, "cell").values
    grid = np.full((*values.shape[:-1], len(lat), len(lon)), np.nan, dtype=np.result_type(values.dtype, np.float32))
    grid[..., matrix["lat_index"].values, matrix["lon_index"].values] = values
    coords = {name: c for name, c in cells.coords.items() if "cell" not in c.dims}
    coords |= {
        "lat": ("lat", lat, {"standard_name": "latitude", "units": "degrees_north", "axis": "Y"}),
        "lon": ("lon", lon, {"standard_name": "longitude", "units": "degrees_east", "axis": "X"}),
    }
    return xr.DataArray(grid, coords, (*rest, "lat", "lon"), name=cells.name, attrs=cells.attrs)


# -------------------------------------------------------------------------------- cells on no rectangular grid


def place_coords(
    dataset: xr.Dataset, places: tuple[str, str], field: xr.DataArray, where: str, mends: list[str]
) -> dict[str, np.ndarray]:
    """Latitude, longitude and relative area of each cell of a curvilinear grid or list of stations.

    Areas are those of the file, else come from the positions of neighbours; stations count alike.
    """
    lat, lon = (dataset.variables[name].transpose(*dataset.variables[places[0]].dims).values for name in places)
    lat, lon = lat.astype(np.float64), lon.astype(np.float64)
    wrong = ~(np.isfinite(lat) & np.isfinite(lon) & (np.abs(lat) <= 90 + 1e-3) & (np.abs(lon) <= 540))
    if wrong.all() or np.ptp(lat[~wrong]) == np.ptp(lon[~wrong]) == 0:
        raise DataError(
            f"{where}: '{places[0]}' and '{places[1]}' are not degrees; give the file latitudes and longitudes"
        )
    lat, lon = np.where(wrong, np.nan, lat), np.where(wrong, np.nan, lon)
    dims = dataset.variables[places[0]].dims
    shape = " x ".join(str(size) for size in lat.shape)
    area = _area_of_file(dataset, field, dims)
    if area is not None:
        how = f"weighted by their areas '{area}'"
        areas = dataset.variables[area].transpose(*dims).values.astype(np.float64)
        areas = np.where(np.isfinite(areas) & (areas > 0) & (areas < 1e15), areas, np.nan)
    elif lat.ndim == 2 and min(lat.shape) > 1:
        how, areas = "weighted by the areas that the positions of their neighbours give", _areas_of_positions(lat, lon)
    else:
        how, areas = "of equal weight, as the file gives them no area", np.ones(lat.shape)
    kind = "stations" if lat.ndim == 1 else "cells of a curvilinear grid"
    areas = np.where(np.isnan(areas) & ~wrong, np.nanmedian(areas), areas)
    mends.append(f"{where}: {shape} {kind} ({', '.join(map(str, dims))}), {how}.")
    return {"lat": lat, "lon": lon, "area": areas / np.nanmax(areas)}


def _area_of_file(dataset: xr.Dataset, field: xr.DataArray, dims: tuple[object, ...]) -> str | None:
    """Name of the variable that holds the areas of the cells."""
    measures = re.search(r"area:\s*(\w+)", str(field.attrs.get("cell_measures", "")))
    for name, variable in dataset.variables.items():
        named = re.fullmatch(_AREAS, str(name).lower()) or variable.attrs.get("standard_name") == "cell_area"
        if set(variable.dims) == set(dims) and (named or (measures is not None and name == measures[1])):
            return str(name)
    return None


def _areas_of_positions(lat: np.ndarray, lon: np.ndarray) -> np.ndarray:
    """Areas of the parallelograms between half-way points to the neighbours of each cell, on the unit sphere."""
    phi, lam = np.deg2rad(lat), np.deg2rad(lon)
    points = np.stack([np.cos(phi) * np.cos(lam), np.cos(phi) * np.sin(lam), np.sin(phi)], axis=-1)
    across = np.cross(np.gradient(points, axis=0), np.gradient(points, axis=1))
    areas = np.linalg.norm(across, axis=-1)
    areas[~(areas > 1e-12)] = np.nan
    return np.ones(lat.shape) if np.isnan(areas).all() else areas


def cells_inside(lat: np.ndarray, lon: np.ndarray, region: Region | None, mends: list[str]) -> np.ndarray:
    """Places, flattened, of the cells in a region, each position once, ordered from south-west row by row.

    Raises
    ------
    DataError
        If there is none.
    """
    inside = np.isfinite(lat) & np.isfinite(lon)
    if region is not None:
        east = (lon - region.west) % 360
        inside &= (lat >= region.south) & (lat <= region.north) & (east <= region.width)
    found = np.flatnonzero(inside)
    if not len(found):
        covered = f"{np.nanmin(lat):g} to {np.nanmax(lat):g} N, {np.nanmin(lon):g} to {np.nanmax(lon):g} E"
        assert region is not None
        raise DataError(
            f"region {region.label} ({region.bounds}) holds no cell of the field, which covers {covered}; choose a "
            "region inside it"
        )
    places = np.stack([np.round(lat.ravel()[found], 4), np.round(lon.ravel()[found] % 360, 4) % 360], 1)
    _, first = np.unique(places, axis=0, return_index=True)
    if (repeated := len(found) - len(first)) > 0:
        mends.append(f"{repeated} cells lie where others do, as where a grid overlaps itself; kept once.")
    return found[np.sort(first)]


def scattered_matrix(field: xr.DataArray, ocean: np.ndarray, attrs: Mapping[str, Any]) -> xr.DataArray:
    """Cells (time, cell) of no rectangular grid as the matrix (cell, time) that `to_matrix` makes of others.

    A curvilinear grid, as `mesh_attrs` gives it in ``attrs``, gets its longitudes in the convention of the cells.
    """
    field = field.isel(cell=np.flatnonzero(ocean))
    lat = field["lat"].values
    west = arrange_longitudes(field["lon"].values)[1][0]

    def eastward(lon: np.ndarray) -> np.ndarray:
        return np.asarray(np.round(west + (lon - west + 1e-4) % 360 - 1e-4, 4))

    coords = {
        "cell": np.arange(len(lat)),
        "time": field["time"].variable,
        "lat": ("cell", lat, {"standard_name": "latitude", "units": "degrees_north"}),
        "lon": ("cell", eastward(field["lon"].values), {"standard_name": "longitude", "units": "degrees_east"}),
        "area_weight": ("cell", field["area"].values / field["area"].values.max()),
    }
    coords |= {name: ("cell", field[name].values) for name in ("y_index", "x_index") if name in field.coords}
    if "ice" in field.coords:
        coords["ice"] = ("cell", "time"), field["ice"].values.T, {"long_name": ICE}
    attrs = dict(attrs)
    if "mesh_lon" in attrs:
        attrs["mesh_lon"] = eastward(np.asarray(attrs["mesh_lon"]))
    return xr.DataArray(field.values.T, coords, ("cell", "time"), name=field.name, attrs=attrs)


def mesh_attrs(lat: np.ndarray, lon: np.ndarray) -> dict[str, np.ndarray]:
    """A curvilinear grid (y, x) as attributes, which NetCDF has in one dimension only."""
    return {"mesh_lat": lat.ravel(), "mesh_lon": lon.ravel(), "mesh_shape": np.asarray(lat.shape, dtype=np.int32)}
