"""Maps for figures: land and coasts in plate carrée, fields with their colour bars, dots on cells.

A field is drawn as what it is: (lat, lon) as rectangles, (y, x) with lat and lon of each cell as the quadrilaterals of
its curvilinear grid, stations as points.
"""

from __future__ import annotations

from functools import cache, lru_cache
from importlib.resources import files
from itertools import pairwise
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.colorbar import Colorbar
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.ticker import FuncFormatter, MaxNLocator, MultipleLocator
from matplotlib.transforms import Bbox

from probmodels._axes import BLUE, GREY, SMALL
from probmodels.bayesian_svd.meshes import mesh_extent, mesh_polygons
from probmodels.datasets.cells import MUCH_ICE

__all__ = [
    "coast",
    "colour_bar",
    "draw_map",
    "grid_of_maps",
    "ice_note",
    "largest",
    "latitude",
    "longitude",
    "map_axes",
    "stipple",
    "uncertain_sign",
]

_FINE = 4000  # cells above which a field is a picture within a PDF, not one shape per cell
_BESIDE = 10.0  # degrees beside a map within which the points of a coast are kept, so that lines reach its frame


@cache
def coast() -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Land polygons and coastlines, each (points, 2) of longitude and latitude; Natural Earth, 1:110 million."""
    with files("probmodels").joinpath("data/coastline_110m.npz").open("rb") as file, np.load(file) as stored:
        points, start = stored["points"].astype(float), stored["start"]
    rings = [points[a:b] for a, b in pairwise(start)]
    lines = []
    for ring in rings:
        # The source cuts land along the date line and closes Antarctica through the pole; neither is a coast.
        seam = (np.abs(np.abs(ring[:, 0]) - 180) < 0.02) | (ring[:, 1] < -89)
        lines += [piece for piece in np.split(ring, np.flatnonzero(seam[1:] & seam[:-1]) + 1) if len(piece) > 1]
    return rings, lines


@lru_cache(maxsize=8)
def _coast_within(extent: tuple[float, float, float, float]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Land and coasts that a map shows, cut at its frame: what lies outside would only fill the files of figures."""
    west, east, south, north = extent
    frame = Bbox([[west, south], [east, north]])
    rings, lines = coast()
    land: list[np.ndarray] = []
    coasts: list[np.ndarray] = []
    for shift in (-360.0, 0.0, 360.0, 720.0):
        for ring in rings:
            if ring[:, 0].max() + shift > west and ring[:, 0].min() + shift < east:
                cut = Path(ring + np.array([shift, 0.0])).clip_to_bbox(frame)
                land += [np.asarray(polygon) for polygon in cut.to_polygons()]
        for line in lines:
            moved = line + np.array([shift, 0.0])
            lon, lat = moved.T
            seen = (lon > west - _BESIDE) & (lon < east + _BESIDE) & (lat > south - _BESIDE) & (lat < north + _BESIDE)
            pieces = np.split(moved, np.flatnonzero(np.diff(seen)) + 1)
            coasts += [piece for piece, kept in zip(pieces, _first_of(seen), strict=True) if kept and len(piece) > 1]
    return land, coasts


def _first_of(seen: np.ndarray) -> np.ndarray:
    """Whether each run of equal values holds."""
    return seen[np.concatenate([[0], np.flatnonzero(np.diff(seen)) + 1])]


def _edges(centres: np.ndarray) -> np.ndarray:
    """Boundaries of the cells about sorted centres."""
    if len(centres) == 1:
        return np.array([centres[0] - 0.5, centres[0] + 0.5])
    middle = (centres[1:] + centres[:-1]) / 2
    return np.concatenate([[2 * centres[0] - middle[0]], middle, [2 * centres[-1] - middle[-1]]])


def longitude(value: float, _position: int | None = None) -> str:
    value = (value + 180) % 360 - 180
    if abs(value) % 180 == 0:
        return f"{abs(value):g}°"
    return f"{abs(value):g}°{'E' if value > 0 else 'W'}"


def latitude(value: float, _position: int | None = None) -> str:
    return "EQ" if value == 0 else f"{abs(value):g}°{'N' if value > 0 else 'S'}"


def _spacing(width: float, most: int) -> float:
    """Distance between ticks in degrees, so that at most ``most`` fit."""
    return next((step for step in (1, 2, 5, 10, 15, 20, 30, 60, 90) if width / step <= most), 90)


def _extent(array: xr.DataArray) -> tuple[float, float, float, float]:
    """West, east, south and north of the cells."""
    lon, lat = array["lon"].values, array["lat"].values
    if lat.ndim == 2:
        return mesh_extent(lat, lon, array.notnull().any([d for d in array.dims if d not in array["lat"].dims]).values)
    if "lat" in array.dims:
        lon, lat = _edges(lon), _edges(lat)
        return lon[0], lon[-1], max(lat[0], -90.0), min(lat[-1], 90.0)
    pad = 0.05 * max(np.ptp(lon), np.ptp(lat), 1.0)
    return lon.min() - pad, lon.max() + pad, max(lat.min() - pad, -90.0), min(lat.max() + pad, 90.0)


def _stretch(south: float, north: float) -> float:
    """Length of a degree of latitude over that of longitude in the middle of the map, bounded towards the poles."""
    return float(min(1 / np.cos(np.deg2rad(np.clip((south + north) / 2, -70, 70))), 2.0))


def map_axes(ax: Axes, extent: tuple[float, float, float, float]) -> None:
    """Turn axes into a map in plate carrée: land, coast, ticks in degrees, aspect true in the middle latitude."""
    west, east, south, north = extent
    land, coasts = _coast_within(extent)
    ax.add_collection(PolyCollection(land, facecolor="0.9", edgecolor="none", zorder=0), autolim=False)
    ax.add_collection(LineCollection(coasts, color="0.25", linewidth=0.6, zorder=3), autolim=False)
    ax.set_xlim(west, east)
    ax.set_ylim(south, north)
    ax.set_aspect(_stretch(south, north))
    ax.xaxis.set_major_locator(MultipleLocator(_spacing(east - west, 6)))
    ax.yaxis.set_major_locator(MultipleLocator(_spacing(north - south, 5)))
    ax.xaxis.set_major_formatter(FuncFormatter(longitude))
    ax.yaxis.set_major_formatter(FuncFormatter(latitude))
    ax.tick_params(labelsize=SMALL, length=2.5, color=GREY)
    for spine in ax.spines.values():
        spine.set_color(GREY)


def grid_of_maps(
    array: xr.DataArray, rows: int, columns: int, *, width: float = 5.2, bars: bool = True
) -> tuple[Figure, np.ndarray]:
    """Figure whose panels have the shape of the map, (rows, columns) axes, with room for a colour bar at each or, where
    ``bars`` is False, for one on the right of all.
    """
    if "lat" not in array.coords:
        figure = Figure(figsize=(width * columns, 2.4 * rows), layout="constrained")
        return figure, figure.subplots(rows, columns, squeeze=False)
    west, east, south, north = _extent(array)
    height = min((width - 1.5) * (north - south) / (east - west) * _stretch(south, north), 1.6 * width)
    # Margins in inches: all maps have the same frame, so that no layout engine has to measure every label.
    left, bottom, top, below = 0.55, 0.25 + ice_note(array), 0.35, 0.6 if bars else 0.35
    right, beside, own = (0.1, 0.65, width - 0.65) if bars else (0.85, 0.15, width - 1.5)
    across = left + columns * own + (columns - 1) * beside + right
    down = bottom + rows * height + (rows - 1) * below + top
    figure = Figure(figsize=(across, down))
    space = {"left": left / across, "right": 1 - right / across, "bottom": bottom / down, "top": 1 - top / down}
    space |= {"wspace": beside / own, "hspace": below / height}
    return figure, figure.subplots(rows, columns, squeeze=False, gridspec_kw=space)


def ice_note(array: xr.DataArray) -> float:
    """Inches below a map for the words on cells that are hatched as ice; 0 where none is."""
    return 0.17 if "ice_share" in array.coords and bool((array["ice_share"] > MUCH_ICE).any()) else 0.0


def draw_map(figure: Figure, ax: Axes, array: xr.DataArray, label: str, *, bar: bool = True, **style: Any) -> Any:
    """Draw a field, or stations as points, or without positions as a line over cells; with its colour bar.

    Cells that are frozen in more than a fifth of the times, by the coord ``ice_share``, are hatched.

    Returns what a colour bar for several maps may be made of; None for a line.
    """
    if "lat" not in array.coords:
        ax.plot(array.values, color=BLUE, linewidth=1)
        ax.set_ylabel(label, fontsize=SMALL)
        ax.tick_params(labelsize=SMALL)
        return None
    if "lat" in array.dims:
        drawn: Any = ax.pcolormesh(
            _edges(array["lon"].values),
            _edges(array["lat"].values),
            array.transpose("lat", "lon").values,
            zorder=1,
            rasterized=array.size > _FINE,
            **style,
        )
    elif array["lat"].ndim == 2:
        drawn = _draw_mesh(ax, array, **style)
    else:
        drawn = ax.scatter(
            array["lon"], array["lat"], c=array.values, s=22, edgecolor="0.3", linewidth=0.3, zorder=4, **style
        )
    map_axes(ax, _extent(array))
    if "ice_share" in array.coords and "cell" not in array.dims:
        _hatch_ice(ax, array)
    if bar:
        colour_bar(figure.colorbar(drawn, ax=ax, shrink=0.85, aspect=18, pad=0.02), label, even="norm" not in style)
    return drawn


def _draw_mesh(ax: Axes, array: xr.DataArray, *, vmin: Any = None, vmax: Any = None, **style: Any) -> PolyCollection:
    """Draw a field (y, x) on the cells of a curvilinear grid."""
    lat, lon = array["lat"], array["lon"]
    values = array.transpose(*lat.dims).values
    polygons, place = mesh_polygons(lat.values, lon.values, np.isfinite(values), _extent(array))
    drawn = PolyCollection(
        polygons, edgecolors="face", linewidth=0.2, zorder=1, rasterized=len(polygons) > _FINE, **style
    )
    drawn.set_array(values.ravel()[place])
    if vmin is not None or vmax is not None:
        drawn.set_clim(vmin, vmax)
    ax.add_collection(drawn, autolim=False)
    return drawn


def _hatch_ice(ax: Axes, array: xr.DataArray) -> None:
    """Hatch the cells that are frozen in more than a fifth of the times, and say so below the lowest map."""
    frozen = array["ice_share"].values > MUCH_ICE
    if not frozen.any():
        return
    if array["lat"].ndim == 2:
        polygons, _ = mesh_polygons(array["lat"].values, array["lon"].values, frozen, _extent(array))
    else:
        east, north = _edges(array["lon"].values), _edges(array["lat"].values)
        corners = ((0, 0), (0, 1), (1, 1), (1, 0))
        polygons = [np.array([[east[j + b], north[i + a]] for a, b in corners]) for i, j in np.argwhere(frozen)]
    outline = Path.make_compound_path(*(Path(polygon, closed=False) for polygon in polygons))
    ax.add_patch(PathPatch(outline, facecolor="none", edgecolor="0.35", hatch="////", linewidth=0, zorder=2))
    place = ax.get_subplotspec()
    if place is None or place.is_last_row():
        ax.set_xlabel(f"hatched: ice in more than {MUCH_ICE:.0%} of the times", fontsize=SMALL - 1, loc="left")


def colour_bar(bar: Colorbar, label: str, *, even: bool = True) -> None:
    """Small ticks and a label; ``even`` where colours are not in steps of their own."""
    bar.ax.tick_params(labelsize=SMALL, length=2.5)
    if even:
        bar.ax.yaxis.set_major_locator(MaxNLocator(5))
    else:
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    bar.set_label(label, fontsize=SMALL)
    bar.outline.set_linewidth(0.4)


def largest(array: xr.DataArray, quantile: float = 0.995) -> float:
    """Largest size to show; a few extreme cells must not take the colour from the rest."""
    values = np.abs(array.values[np.isfinite(array.values)])
    return float(np.quantile(values, quantile)) or 1.0 if values.size else 1.0


def stipple(ax: Axes, shown: xr.DataArray) -> None:
    """Small dots on the cells where ``shown`` holds, thinned on fine grids."""
    if "cell" in shown.dims or "lat" not in shown.coords:
        return
    rows, columns = ("lat", "lon") if "lat" in shown.dims else map(str, shown["lat"].dims)
    step = max(1, int(np.ceil(max(shown.sizes[columns] / 60, shown.sizes[rows] / 40))))
    thinned = shown.transpose(rows, columns)[::step, ::step]
    lat, lon = xr.broadcast(thinned["lat"], thinned["lon"])
    marked = thinned.values.astype(bool) & np.isfinite(lat.values)
    ax.scatter(lon.values[marked], lat.values[marked], s=1.3, color="0.1", linewidth=0, zorder=2)


def uncertain_sign(probability: xr.DataArray, sure: float = 0.95) -> xr.DataArray:
    """Where the sign is neither positive nor negative with more than the probability ``sure``; false where unknown."""
    return (probability <= sure) & (probability >= 1 - sure)
