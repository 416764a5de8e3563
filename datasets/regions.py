"""Boxes of latitude and longitude, by name or by bounds, and the cells of a grid that lie in them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from probmodels.errors import DataError
from probmodels.options import hint

__all__ = ["REGIONS", "Region", "arrange_longitudes", "parse_region", "select_latitudes", "select_longitudes"]

_EDGE = 1e-4  # degrees; float32 coordinates at 360 are exact to 3e-5


@dataclass(frozen=True)
class Region:
    """A box: ``south <= lat <= north`` and the longitudes met going east from ``west`` for ``width`` degrees."""

    label: str
    south: float
    north: float
    west: float
    width: float

    @property
    def bounds(self) -> str:
        """Bounds in words, for messages and provenance."""
        return f"{self.south:g} to {self.north:g} N, {self.west:g} to {self.west + self.width:g} E"


# name: south, north, west, east. The North Pacific box is that of the Pacific Decadal Oscillation (Mantua et al. 1997,
# https://doi.org/10.1175/1520-0477(1997)078<1069:APICOW>2.0.CO;2); the Nino boxes are those of NOAA's Climate
# Prediction Center.
REGIONS: dict[str, tuple[float, float, float, float]] = {
    "global": (-90, 90, 0, 360),
    "pacific": (-60, 65, 110, 290),
    "north_pacific": (20, 65, 110, 260),
    "tropical_pacific": (-20, 20, 120, 290),
    "south_pacific": (-60, -20, 145, 290),
    "north_atlantic": (0, 65, 280, 360),
    "tropical_atlantic": (-20, 20, -60, 15),
    "indian_ocean": (-30, 30, 40, 110),
    "southern_ocean": (-70, -40, 0, 360),
    "nino12": (-10, 0, 270, 280),
    "nino3": (-5, 5, 210, 270),
    "nino34": (-5, 5, 190, 240),
    "nino4": (-5, 5, 160, 210),
}


def parse_region(region: str | Mapping[str, Any] | Region) -> Region:
    """Region from a name, ``"lat0,lat1,lon0,lon1"`` or ``{"lat": [lat0, lat1], "lon": [lon0, lon1]}``.

    Longitudes run eastwards from ``lon0`` to ``lon1`` and may be written 0 to 360 or -180 to 180, so that
    ``110, -100`` is the same as ``110, 260``; either entry of the dict may be left out.

    Raises
    ------
    DataError
        If the name is unknown or the bounds cannot be read.
    """
    how = "write it as 'lat0,lat1,lon0,lon1' or {'lat': [20, 60], 'lon': [110, 260]}"
    if isinstance(region, Region):
        return region
    if isinstance(region, Mapping):
        unknown = [key for key in region if key not in ("lat", "lon")]
        if unknown:
            raise DataError(f"region has unknown keys {', '.join(map(repr, unknown))}; {how}")
        if not region:
            raise DataError(f"region={{}} bounds nothing; {how}")
        try:
            south, north = (_number(x) for x in region.get("lat", (-90, 90)))
            west, east = (_number(x) for x in region.get("lon", (0, 360)))
        except (TypeError, ValueError) as error:
            raise DataError(f"region={dict(region)!r} does not hold two numbers each for lat and lon; {how}") from error
        return _box(f"{south:g},{north:g},{west:g},{east:g}", south, north, west, east)
    if not isinstance(region, str):
        raise DataError(f"region={region!r} is not a region; {how}")
    numbers = re.split(r"\s*[,/]\s*|\s+", region.strip())
    if len(numbers) == 4:
        try:
            south, north, west, east = (float(x) for x in numbers)
        except ValueError as error:
            raise DataError(f"region={region!r} does not hold four numbers; {how}") from error
        return _box(region, south, north, west, east)
    name = region.strip().lower().replace("-", "_").replace(" ", "_")
    if name not in REGIONS:
        raise DataError(f"unknown region {region!r}{hint(name, REGIONS)}; or {how}")
    return _box(name, *REGIONS[name])


def _number(value: Any) -> float:
    if isinstance(value, bool | str):
        raise TypeError(f"{value!r} is no number")
    return float(value)


def _box(label: str, south: float, north: float, west: float, east: float) -> Region:
    south, north = min(south, north), max(south, north)
    if not (np.isfinite([south, north, west, east]).all() and -90 <= south <= north <= 90):
        raise DataError(f"region {label}: latitudes must lie within -90 to 90, longitudes be finite")
    if abs(west) > 360 or abs(east) > 360:
        raise DataError(f"region {label}: longitudes must lie within -180 to 360")
    if abs(east - west) >= 360:
        return Region(label, south, north, 0.0, 360.0)
    width = (east - west) % 360
    west = west % 360
    if west + width > 360:  # where 0-360 would cut the box, -180-180 may not
        west -= 360
    return Region(label, south, north, west, width)


def arrange_longitudes(lon: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Order and values of longitudes that cut the circle in its widest gap, or at 0 where a grid has none.

    Parameters
    ----------
    lon
        Longitudes in degrees east, shape (n,), any convention, cyclic points allowed.

    Returns
    -------
    tuple
        Indices into ``lon`` (cyclic points once) and the ascending longitudes there; they start within
        -180 to 360 and never cut the field, so that a box over the Pacific stays in one piece.
    """
    circle = np.round(lon % 360, 4) % 360
    circle, index = np.unique(circle, return_index=True)
    gaps = np.diff(circle, append=circle[0] + 360)
    widest = int(np.argmax(gaps))
    if len(circle) == 1 or widest == len(circle) - 1 or gaps[widest] <= 1.5 * np.median(gaps):
        return index, circle
    order = np.roll(np.arange(len(circle)), -(widest + 1))
    values = np.unwrap(circle[order], period=360)
    return index[order], values - 360 if values[-1] > 360 else values


def select_longitudes(lon: np.ndarray, region: Region) -> tuple[np.ndarray, np.ndarray]:
    """Indices and eastward ascending values of the longitudes within a region; empty where there is none."""
    if region.width >= 360:
        return arrange_longitudes(lon)
    offset = (lon - region.west + _EDGE) % 360 - _EDGE
    inside = np.flatnonzero(offset <= region.width + _EDGE)
    offset, index = np.unique(np.round(offset[inside], 4), return_index=True)
    return inside[index], np.round(region.west + offset, 4)


def select_latitudes(lat: np.ndarray, region: Region) -> np.ndarray:
    """Indices of the latitudes within a region, in the given order."""
    return np.flatnonzero((lat >= region.south - _EDGE) & (lat <= region.north + _EDGE))
