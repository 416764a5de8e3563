"""Weights over cells of the indices that are forecast: of boxes, and a user's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike, NDArray

from probmodels.bayesian_svd.forecasts.projection import Record
from probmodels.bayesian_svd.indices.boxes import box_overlap
from probmodels.datasets.labelled import arranged
from probmodels.datasets.regions import Region, parse_region
from probmodels.errors import DataError
from probmodels.inference.result import Result

__all__ = ["box_weights", "index_weights"]

Array = NDArray[np.float64]


def index_weights(indices: Mapping[str, ArrayLike], record: Record) -> dict[str, Array]:
    """Weights of each index over the cells of the fit."""
    found, size = {}, record.constant.sizes["cell"]
    for name, given in indices.items():
        values = arranged(given, f"indices[{name!r}]", {"cell": record.constant["cell"].values})
        try:
            array = np.asarray(values, dtype=float)
        except (TypeError, ValueError) as error:
            raise DataError(f"indices[{name!r}] are no numbers: {error}") from error
        if array.shape != (size,) or not np.isfinite(array).all():
            raise DataError(f"indices[{name!r}] must hold {size} finite weights, one for each cell of the fit")
        if not array.any():
            raise DataError(f"indices[{name!r}] are all zero; does the box hold cells of the fit?")
        found[name] = array
    return found


def box_weights(result: Result | xr.DataTree, region: str | Mapping[str, Sequence[float]] | Region) -> Array:
    """Weights over the cells of a result of the area mean of a box, by the area that each cell shares with it.

    Parameters
    ----------
    result
        Result whose cells have lat and lon.
    region
        As for `probmodels.datasets.sst.load_sst`: a name, ``"lat0,lat1,lon0,lon1"`` or a dict.

    Returns
    -------
    array
        Shape (cell,), sum 1.

    Raises
    ------
    DataError
        If the region is unknown, cells have no positions, or none lies in it.
    """
    tree = result if isinstance(result, xr.DataTree) else result.tree
    constant, box = tree["constant_data"].to_dataset(), parse_region(region)
    if not {"lat", "lon"} <= set(constant.coords):
        raise DataError("the cells of this result have no lat and lon; give weights over cells instead of a box")
    lat, lon = constant["lat"].values.astype(float), constant["lon"].values.astype(float)
    area, _ = box_overlap(lat, lon, box, constant)
    if not area.any():
        raise DataError(
            f"region {box.label} ({box.bounds}) holds no cell of the result, which covers {lat.min():g} to "
            f"{lat.max():g} N, {lon.min():g} to {lon.max():g} E"
        )
    return area / area.sum()
