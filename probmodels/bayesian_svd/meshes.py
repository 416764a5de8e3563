"""Cells of curvilinear grids as polygons of longitude and latitude: across the date line, and about the poles."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["cell_corners", "mesh_extent", "mesh_polygons"]

Array = NDArray[np.float64]

_POLE = 1e-3  # degrees from a pole within which a corner lies on it
_TOP = 89.5  # latitude from which a map reaches to the pole


def cell_corners(lat: Array, lon: Array) -> tuple[Array, Array]:
    """Latitude and longitude of the corners (y + 1, x + 1): between the cells about them, beyond edges straight on.

    A corner of which no cell has a place is NaN. They are found on the sphere, so that no date line matters.
    """
    phi, lam = np.deg2rad(lat), np.deg2rad(lon)
    points = np.stack([np.cos(phi) * np.cos(lam), np.cos(phi) * np.sin(lam), np.sin(phi)], axis=-1)
    for axis in (0, 1):
        points = np.moveaxis(points, axis, 0)
        points = np.concatenate([_beyond(points[1:2], points[:1]), points, _beyond(points[-2:-1], points[-1:])])
        points = np.moveaxis(points, 0, axis)
    around = np.stack([points[:-1, :-1], points[:-1, 1:], points[1:, :-1], points[1:, 1:]])
    known = np.isfinite(around[..., 0])
    total = np.where(known[..., None], around, 0.0).sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        x, y, z = np.moveaxis(total / np.where(known.any(0), np.linalg.norm(total, axis=-1), np.nan)[..., None], -1, 0)
    return np.rad2deg(np.arcsin(np.clip(z, -1, 1))), np.rad2deg(np.arctan2(y, x))


def _beyond(before: Array, last: Array) -> Array:
    """Points as far beyond the last as those before it, on the great circle of both."""
    return 2 * np.sum(before * last, axis=-1, keepdims=True) * last - before


def mesh_extent(lat: Array, lon: Array, shown: NDArray[np.bool_]) -> tuple[float, float, float, float]:
    """West, east, south and north of the cells ``shown`` (y, x), at most once around the globe."""
    shown = shown & np.isfinite(lat) & np.isfinite(lon)
    if not shown.any():
        shown = np.isfinite(lat) & np.isfinite(lon)
    corner_lat, corner_lon = cell_corners(lat, lon)
    around = [_around(x)[shown] for x in (corner_lat, corner_lon)]
    turned = lon[shown][:, None] + (around[1] - lon[shown][:, None] + 180) % 360 - 180
    west, east = float(turned.min()), float(turned.max())
    if east - west > 330:  # cells near a pole reach far to both sides
        west = float(lon[shown].min()) if east - west <= 360 else float((lon[shown].min() + lon[shown].max()) / 2 - 180)
        east = west + 360.0
    south, north = float(np.nanmin(around[0])), float(np.nanmax(around[0]))
    polar = lat[shown][_winding(around[1]) != 0]
    north = 90.0 if north > _TOP or (polar > 0).any() else north
    south = -90.0 if south < -_TOP or (polar < 0).any() else south
    return west, east, south, north


def _around(corners: Array) -> Array:
    """Values at the four corners of each cell (y, x, 4), one after the other."""
    return np.stack([corners[:-1, :-1], corners[:-1, 1:], corners[1:, 1:], corners[1:, :-1]], axis=-1)


def _winding(lon: Array) -> Array:
    """How often the corners (cell, 4) of each cell go around a pole."""
    steps = (np.diff(lon, axis=1, append=lon[:, :1]) + 180) % 360 - 180
    return np.asarray(np.round(np.nansum(steps, axis=1) / 360))


def mesh_polygons(
    lat: Array, lon: Array, shown: NDArray[np.bool_], extent: tuple[float, float, float, float]
) -> tuple[list[Array], NDArray[np.int_]]:
    """Polygons (corner, 2) of longitude and latitude of the cells ``shown``, and the place of each among all cells.

    A cell that the frame of the map cuts is there on both sides, and one about a pole reaches up to it.
    """
    west, east, _, _ = extent
    corner_lat, corner_lon = (_around(x).reshape(-1, 4) for x in cell_corners(lat, lon))
    place = np.flatnonzero((shown & np.isfinite(lat) & np.isfinite(lon)).ravel())
    corner_lat, corner_lon = corner_lat[place], corner_lon[place]
    middle = west + (lon.ravel()[place] - west) % 360
    turned = middle[:, None] + (corner_lon - middle[:, None] + 180) % 360 - 180
    simple = (_winding(corner_lon) == 0) & (np.abs(corner_lat).max(axis=1) < 90 - _POLE)
    polygons = list(np.stack([turned, corner_lat], axis=-1))
    for i in np.flatnonzero(~simple):
        polygons[i] = _about_pole(middle[i], corner_lat[i], corner_lon[i])
    out, places = [], []
    for polygon, at in zip(polygons, place, strict=True):
        low, high = polygon[:, 0].min(), polygon[:, 0].max()
        for shift in (0.0, 360.0, -360.0):
            if shift == 0.0 or (low + shift < east and high + shift > west):
                out.append(polygon + np.array([shift, 0.0]))
                places.append(at)
    return out, np.asarray(places, dtype=int)


def _about_pole(middle: float, lat: Array, lon: Array) -> Array:
    """Polygon of a cell that has a pole inside or as a corner: its other corners, then along the pole."""
    pole = 90.0 if lat.mean() > 0 else -90.0
    at_pole = np.abs(lat) >= 90 - _POLE
    if at_pole.any():  # start behind the pole and end before it
        start = np.flatnonzero(at_pole & ~np.roll(at_pole, -1))[0] + 1
        order = [k % 4 for k in range(start, start + 4) if not at_pole[k % 4]]
        lat, lon = lat[order], lon[order]
    else:
        lat, lon = np.append(lat, lat[0]), np.append(lon, lon[0])
    path = np.unwrap(lon, period=360)
    path += 360 * np.round((middle - path.mean()) / 360)
    return np.column_stack([np.r_[path, path[-1], path[0]], np.r_[lat, pole, pole]])
