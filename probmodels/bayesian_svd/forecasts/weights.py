"""Weights over cells of the indices that are forecast: of boxes, and a user's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike, NDArray

from probmodels.bayesian_svd.forecasts.projection import Record
from probmodels.bayesian_svd.indices.boxes import MOST_ICE, box_overlap, frozen_cells
from probmodels.datasets.labelled import arranged
from probmodels.datasets.regions import Region, parse_region
from probmodels.errors import DataError, SummaryError
from probmodels.inference.result import Result

__all__ = ["box_weights", "frozen_ahead", "index_weights"]

Array = NDArray[np.float64]


def index_weights(indices: Mapping[str, ArrayLike], record: Record, steps: int) -> dict[str, Array]:
    """Weights of each index over the cells of the fit, or over cells and steps of the forecast."""
    found, size = {}, record.constant.sizes["cell"]
    for name, given in indices.items():
        values = given
        if np.ndim(given) != 2:
            values = arranged(given, f"indices[{name!r}]", {"cell": record.constant["cell"].values})
        try:
            array = np.asarray(values, dtype=float)
        except (TypeError, ValueError) as error:
            raise DataError(f"indices[{name!r}] are no numbers: {error}") from error
        if array.shape not in ((size,), (size, steps)) or not np.isfinite(array).all():
            raise DataError(
                f"indices[{name!r}] must hold {size} finite weights, one for each cell of the fit, or as many for each "
                f"of the {steps} steps"
            )
        if not array.any():
            raise DataError(f"indices[{name!r}] are all zero; does the box hold cells of the fit?")
        found[name] = array
    return found


def box_weights(
    result: Result | xr.DataTree,
    region: str | Mapping[str, Sequence[float]] | Region,
    *,
    times: xr.DataArray | None = None,
) -> Array:
    """Weights over the cells of a result of the area mean of a box, by the area that each cell shares with it.

    Parameters
    ----------
    result
        Result whose cells have lat and lon.
    region
        As for `probmodels.datasets.sst.load_sst`: a name, ``"lat0,lat1,lon0,lon1"`` or a dict.
    times
        Times of a forecast, of which the mean is that of open water: a cell counts with the share of the years of the
        record in which it was open at that time of the year. None takes frozen cells for open water.

    Returns
    -------
    array
        Shape (cell,), or (cell, time); sum 1 over cells.

    Raises
    ------
    DataError
        If the region is unknown, cells have no positions, or none lies in it.
    SummaryError
        If more than half of the box is frozen at a time, as far as the record tells.
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
    share = area / area.sum()
    return share if times is None else _of_open_water(share, constant, times, box.label)


def _of_open_water(share: Array, constant: xr.Dataset, times: xr.DataArray, name: str) -> Array:
    """Shares of the box (cell, time) of the water that is open at that time of the year."""
    ice = frozen_ahead(constant, times)
    frozen = share @ ice
    if (most := float(frozen.max())) > MOST_ICE:
        when = str(times.values[int(frozen.argmax())])[:10]
        raise SummaryError(
            f"{most:.0%} of the box {name} is frozen at {when} by the years of the record, more than {MOST_ICE:.0%}: "
            "the mean of its open water does not stand for it; choose a box with less ice or a shorter forecast, or "
            "take frozen cells for open water (--ice filled)"
        )
    weights = share[:, None] * (1 - ice)
    return np.asarray(weights / weights.sum(0))


def frozen_ahead(constant: xr.Dataset, times: xr.DataArray) -> Array:
    """Share of the years of the record in which each cell was frozen at the time of the year of each time (cell, time).

    Times of the year are months. Where times are no dates, or the record lacks the month, the share is that of all
    times.
    """
    frozen = frozen_cells(constant)
    out = np.repeat(frozen.mean(1)[:, None], times.size, axis=1)
    if not frozen.any() or not all(np.issubdtype(x.dtype, np.datetime64) for x in (times, constant["time"])):
        return out
    own, later = (np.asarray(x.dt.month.values) for x in (constant["time"], times))
    for month in np.intersect1d(own, later):
        out[:, later == month] = frozen[:, own == month].mean(1)[:, None]
    return out
