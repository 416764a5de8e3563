"""Which cells are neighbours, along each direction."""

from __future__ import annotations

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from scipy.spatial import cKDTree

__all__ = ["neighbours"]

_AMONG = 25  # nearest cells that neighbours are sought among: cells may be far longer than wide


def neighbours(constant: xr.Dataset) -> list[NDArray[np.int64]]:
    """The neighbour of each cell, once for each direction; none where cells have no positions.

    On a plane or a sphere these are the nearest cell that lies rather east or west, and the nearest that lies rather
    north or south: the nearest of all may be of one direction everywhere, and say nothing of the other. A cell without
    one in a direction has its nearest cell there.
    """
    if {"lat", "lon"} <= set(constant.coords):
        lat, lon = (np.deg2rad(constant[name].values.astype(float)) for name in ("lat", "lon"))
        points = np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)], axis=1)
        east = np.stack([-np.sin(lon), np.cos(lon), 0 * lon], axis=1)
        north = np.stack([-np.sin(lat) * np.cos(lon), -np.sin(lat) * np.sin(lon), np.cos(lat)], axis=1)
        along = [east, north]
    else:
        axes = [name for name in ("x", "y", "z") if name in constant.coords and constant[name].dims == ("cell",)]
        axes = axes or [name for name in ("cell",) if name in constant.coords]
        if not axes or any(constant[name].dtype.kind not in "iuf" for name in axes):
            return []
        points = np.stack([constant[name].values.astype(float) for name in axes], axis=1)
        along = [np.broadcast_to(axis, points.shape) for axis in np.eye(len(axes))[:2]]
    if len(points) < 2:
        return []
    own = np.zeros(len(points))
    if "field" in constant.coords:  # neighbours are of the same field
        own = np.unique(constant["field"].values, return_inverse=True)[1].astype(float)
    apart = np.column_stack([points, 1e3 * (1 + np.ptp(points)) * own])
    place = cKDTree(apart).query(apart, k=min(_AMONG, len(points)))[1]
    place = np.where(place == np.arange(len(points))[:, None], place[:, 1:2], place)  # copies may come before the cell
    nearest = np.where(place[:, 0] == np.arange(len(points)), place[:, 1], place[:, 0])
    if len(along) < 2:
        return [nearest]
    steps = points[place] - points[:, None]
    size = [np.abs(np.einsum("ckd,cd->ck", steps, axis)) for axis in along]
    same = own[place] == own[:, None]
    found = []
    for one, other in ((0, 1), (1, 0)):
        fits = same & (size[one] > size[other])
        found.append(np.where(fits.any(1), place[np.arange(len(place)), fits.argmax(1)], nearest))
    return found
