"""Cells of a result put back onto the grid that they come from, rectangular or curvilinear."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xarray as xr

from probmodels.datasets.regions import arrange_longitudes
from probmodels.errors import SummaryError

__all__ = ["to_cells", "to_grid"]

_LAT = {"standard_name": "latitude", "long_name": "latitude", "units": "degrees_north"}
_LON = {"standard_name": "longitude", "long_name": "longitude", "units": "degrees_east"}


def _lat_lon(constant: xr.Dataset) -> tuple[np.ndarray, np.ndarray] | None:
    """Latitude and longitude of the cells, longitudes in the convention that does not cut the region; None without."""
    found = []
    for names in (("lat", "latitude"), ("lon", "longitude")):
        name = next((x for x in names if x in constant.variables and constant[x].dims == ("cell",)), None)
        if name is None:
            return None
        found.append(np.round(constant[name].values.astype(float), 4))
    lat, lon = found
    conventions = (lon, lon % 360, (lon + 180) % 360 - 180)
    return lat, min(conventions, key=np.ptp)


@dataclass(frozen=True)
class _Grid:
    """The grid that cells come from.

    ``lat`` and ``lon`` are its axes, or with dims (y, x) those of a curvilinear one; ``rows`` and ``columns`` the place
    of each cell.
    """

    lat: xr.Variable
    lon: xr.Variable
    rows: np.ndarray
    columns: np.ndarray

    @property
    def dims(self) -> tuple[str, str]:
        """Names of rows and columns."""
        return ("y", "x") if self.lat.ndim == 2 else ("lat", "lon")

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of rows and columns."""
        rows, columns = self.lat.shape if self.lat.ndim == 2 else (self.lat.size, self.lon.size)
        return rows, columns


def _grid(constant: xr.Dataset) -> _Grid | None:
    """The grid of the cells; None for cells without one."""
    attrs = constant["data"].attrs
    if {"lat_index", "lon_index"} <= set(constant.variables) and {"grid_lat", "grid_lon"} <= set(attrs):
        lat, lon = (np.atleast_1d(attrs[name]).astype(float) for name in ("grid_lat", "grid_lon"))
        rows, columns = (constant[name].values.astype(int) for name in ("lat_index", "lon_index"))
        north, (order, east) = np.argsort(lat), arrange_longitudes(lon)  # a field may come as it lies in a file
        if len(order) < len(lon):
            order, east = np.arange(len(lon)), lon
        rows, columns = np.argsort(north)[rows], np.argsort(order)[columns]
        return _Grid(xr.Variable("lat", lat[north]), xr.Variable("lon", east), rows, columns)
    position = _lat_lon(constant)
    if position is None or "field" in constant.coords:
        return None
    if {"y_index", "x_index"} <= set(constant.variables) and {"mesh_lat", "mesh_lon", "mesh_shape"} <= set(attrs):
        return _mesh(constant, position)
    lat, lon = position
    rows, columns = _axis(lat), _axis(lon)
    # Nearest line, since rounding of single-precision coordinates must not lose a cell.
    i, j = (np.abs(axis[None, :] - x[:, None]).argmin(axis=1) for axis, x in ((rows, lat), (columns, lon)))
    lines = max(len(np.unique(lat)), len(np.unique(lon)))
    scattered = min(len(rows), len(columns)) > 1 and 2 * lines > len(lat)
    if scattered or len(np.unique(i * len(columns) + j)) < len(lat):
        return None
    return _Grid(xr.Variable("lat", rows), xr.Variable("lon", columns), i, j)


def _mesh(constant: xr.Dataset, position: tuple[np.ndarray, np.ndarray]) -> _Grid:
    """A curvilinear grid; the longitudes of its other cells are those nearest to the cells that are analysed."""
    attrs = constant["data"].attrs
    shape = tuple(np.asarray(attrs["mesh_shape"], dtype=int).tolist())
    lat, lon = (np.asarray(attrs[name], dtype=float).reshape(shape) for name in ("mesh_lat", "mesh_lon"))
    rows, columns = (constant[name].values.astype(int) for name in ("y_index", "x_index"))
    middle = 0.5 * (position[1].min() + position[1].max())
    lon = middle + (lon - middle + 180) % 360 - 180
    lat[rows, columns], lon[rows, columns] = position
    return _Grid(xr.Variable(("y", "x"), lat), xr.Variable(("y", "x"), lon), rows, columns)


def _axis(values: np.ndarray) -> np.ndarray:
    """Sorted grid lines through ``values``; evenly spaced ones are completed, so that empty rows show as such."""
    unique = np.unique(values)
    if len(unique) < 3:
        return unique
    steps = np.diff(unique) / np.diff(unique).min()
    count = round(steps.sum()) + 1
    if np.allclose(steps, np.round(steps), atol=1e-2) and count <= 4 * len(unique):
        return np.round(np.linspace(unique[0], unique[-1], count), 4)
    return unique


def to_grid(cells: xr.Dataset, constant: xr.Dataset) -> xr.Dataset:
    """Variables over ``cell`` put on the grid that the cells come from, NaN elsewhere.

    The grid is (lat, lon), or for curvilinear ones (y, x) with lat and lon of each cell. Cells scattered without a grid
    keep the dim ``cell``, with their lat and lon where known. Where data were frozen, the coord ``ice_share`` says in
    which share of the times.
    """
    grid, ice = _grid(constant), _ice_share(constant)
    if grid is None or "cell" not in cells.dims:
        position = _lat_lon(constant)
        if position is None:
            return cells
        cells = cells.assign_coords(lat=("cell", position[0], _LAT), lon=("cell", position[1], _LON))
        return cells if ice is None or "cell" not in cells.dims else cells.assign_coords(ice_share=ice)
    out = xr.Dataset(coords={k: v for k, v in cells.coords.items() if "cell" not in v.dims}, attrs=cells.attrs)
    for name, array in cells.data_vars.items():
        if "cell" not in array.dims:
            out[name] = array
            continue
        array = array.transpose(..., "cell")
        field = np.full((*array.shape[:-1], *grid.shape), np.nan)
        field[..., grid.rows, grid.columns] = array.values
        out[name] = xr.Variable((*array.dims[:-1], *grid.dims), field, array.attrs)
    if ice is not None:
        share = np.full(grid.shape, np.nan)
        share[grid.rows, grid.columns] = ice.values
        out = out.assign_coords(ice_share=(grid.dims, share, ice.attrs))
    out = out.assign_coords(lat=grid.lat, lon=grid.lon)
    for name, attrs, axis in (("lat", _LAT, "Y"), ("lon", _LON, "X")):
        out[name].attrs = attrs | ({"axis": axis} if name in out.dims else {})
    return out


def _ice_share(constant: xr.Dataset) -> xr.Variable | None:
    """Share of the times in which each cell is frozen; None where none ever is."""
    if "ice" not in constant.variables:
        return None
    share = constant["ice"].transpose("cell", "time").values.astype(bool).mean(axis=1)
    attrs = {"long_name": "share of the times in which the cell is frozen", "units": "1"}
    return xr.Variable("cell", share, attrs)


def to_cells(array: xr.DataArray, constant: xr.Dataset) -> np.ndarray:
    """Values over cells, (..., cell), of a map that `to_grid` made.

    Raises
    ------
    SummaryError
        If the map does not have the shape of the grid.
    """
    if "cell" in array.dims:
        return array.transpose(..., "cell").values
    grid = _grid(constant)
    if grid is None or any(array.sizes.get(dim) != size for dim, size in zip(grid.dims, grid.shape, strict=True)):
        raise SummaryError(
            f"a map with {dict(array.sizes)} does not fit the cells of this result; was it made from another?"
        )
    return array.transpose(..., *grid.dims).values[..., grid.rows, grid.columns]
