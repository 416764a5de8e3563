"""Cells of a map as rows of a matrix, and back."""

from __future__ import annotations

import numpy as np
import pandas as pd
import xarray as xr

from probmodels.errors import DataError
from probmodels.options import Probability, checked, refuse_unused

__all__ = ["area_weight", "from_cells", "ocean_cells", "to_matrix"]


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
        mends.append(f"{partly} cells with fewer than {min_valid:.0%} valid time steps are treated as land.")
    high = np.where(valid, field.values, -np.inf).max(axis=0)
    low = np.where(valid, field.values, np.inf).min(axis=0)
    size = np.nanmax(np.abs(field.values))
    constant = ocean & (np.where(ocean, high - low, 0.0) <= 1e-7 * max(size, 1.0))
    if constant.any():
        if (constant == ocean).all():
            raise DataError(
                f"all {int(ocean.sum())} cells of '{field.name}' are constant in time; is this the right variable?"
            )
        mends.append(f"{int(constant.sum())} cells are constant in time, as under lasting ice; treated as land.")
    return ocean & ~constant


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
        ``lon``, ``lat_index``, ``lon_index`` and ``area_weight`` by cell, and ``time``. The attrs of the field, and
        the axes of its grid as ``grid_lat`` and ``grid_lon``.

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
    attrs = field.attrs | {"grid_lat": lat, "grid_lon": lon}
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
