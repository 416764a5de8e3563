"""Pictures of composed scores: levels, draws, and chains on their way down over the density that they are drawn from.

Figures follow `probmodels.plots`: each is new, and none needs a display.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import xarray as xr
from annotated_types import Interval
from matplotlib import colormaps
from matplotlib.animation import PillowWriter
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from numpy.typing import NDArray

from probmodels import plots
from probmodels._axes import BLUE, RED, SMALL, clean
from probmodels.errors import DataError
from probmodels.options import checked
from probmodels.outputs import Dpi
from probmodels.scores.fields import Field

__all__ = ["animate", "density", "levels", "samples"]

_DEPTHS = (-12.0, -8.0, -5.0, -3.0, -2.0, -1.0, -0.5, 0.0)  # of log densities below the highest
_PALE = ListedColormap(colormaps["Blues"](np.linspace(0.06, 0.6, len(_DEPTHS) - 1)))
_GRID, _ARROWS = 120, 15  # points along an axis


def levels(found: xr.Dataset) -> Figure:
    """Acceptance and step sizes along the levels, of `probmodels.score_composition.levels_of`."""
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots(1, 2, sharex=True)
    for ax, name, title in zip(axes, ("acceptance_rate", "step_size"), ("acceptance", "step size"), strict=True):
        ax.plot(found["time"], found[name], ".-", lw=1, ms=3)
        ax.set(xlabel="time, from noise (1) to data (0)", title=title)
    axes[0].invert_xaxis()
    axes[0].set_ylim(0, 1.05)
    axes[1].set_yscale("log")
    return figure


def samples(draws: xr.DataArray) -> Figure | None:
    """Draws (chain, draw, ...) of points in the plane, or some of those of images; None for others."""
    shape = draws.shape[2:]
    points = draws.values.reshape(-1, *shape)
    if shape == (2,):
        figure = Figure(figsize=(4, 4), layout="constrained")
        ax = figure.subplots()
        ax.plot(points[:, 0], points[:, 1], ".", ms=2, alpha=min(1.0, 2000 / len(points)))
        ax.set(aspect="equal", title=f"{len(points):,} draws")
        return figure
    if len(shape) == 2:
        shown = points[np.linspace(0, len(points) - 1, 48).astype(int)]
        spread = np.ptp(shown) or 1.0
        return plots.image_grid(((shown - shown.min()) / spread).reshape(4, 12, *shape), "draws")
    return None


@checked(DataError)
def density(field: Field, walked: xr.DataArray, *, num_panels: Annotated[int, Interval(ge=2, le=100)] = 4) -> Figure:
    """Chains over the log density of their level, at some levels; over arrows of the score where it is not known.

    Parameters
    ----------
    field
        A field of points in the plane.
    walked
        Positions (level, chain, 2) with ``time``, of `probmodels.score_composition.walk`.
    num_panels
        Levels that are shown, the first and the last among them.

    Raises
    ------
    DataError
        If the positions are not of points in the plane.
    """
    _check_planar(walked)
    shown = _shown(len(walked), num_panels)
    figure = Figure(figsize=(2.8 * len(shown), 3.1), layout="constrained")
    frames = _frames(walked.values[shown], smooth=1)
    for ax, place, frame in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, frames, strict=True):
        _draw(ax, field, walked[place], frame)
        clean(ax)
    figure.suptitle("log density and chains" if field.has_density else "scores and chains", fontsize=9)
    return figure


@checked(DataError)
def animate(
    walked: xr.DataArray,
    path: str | Path,
    *,
    field: Field | None = None,
    num_frames: Annotated[int, Interval(ge=2)] = 48,
    fps: Annotated[int, Interval(ge=1, le=100)] = 10,
    dpi: Dpi = 80,
) -> Path:
    """Write an animation, a GIF, of chains on their way from noise to data; the last frame stays for a second.

    Parameters
    ----------
    walked
        Positions (level, chain, 2) with ``time``, of `probmodels.score_composition.walk`.
    path
        Path of the file, which is replaced.
    field
        Draws the log density of every level, or arrows of its score, below the chains.
    num_frames
        Levels that are shown, at most.
    fps, dpi
        Frames a second, and dots an inch of 4 inches.

    Returns
    -------
    Path
        Path of the file.

    Raises
    ------
    DataError
        If the positions are not of points in the plane, or the name does not end in ``.gif``.
    """
    _check_planar(walked)
    path = Path(path)
    if path.suffix != ".gif":
        raise DataError(f"path={str(path)!r}; animations are written as .gif")
    path.parent.mkdir(parents=True, exist_ok=True)
    shown = _shown(len(walked), num_frames)
    frames = _frames(walked.values[shown], smooth=5)
    figure = Figure(figsize=(4, 4.2))
    FigureCanvasAgg(figure)
    ax = figure.add_axes((0.1, 0.07, 0.87, 0.87))  # the same place in every frame
    writer = PillowWriter(fps=fps)
    with writer.saving(figure, str(path), dpi):
        for place, frame in zip(shown, frames, strict=True):
            ax.clear()
            _draw(ax, field, walked[place], frame)
            writer.grab_frame()
        for _ in range(fps - 1):
            writer.grab_frame()
    return path


def _check_planar(walked: xr.DataArray) -> None:
    if walked.ndim != 3 or walked.shape[2] != 2 or "time" not in walked.coords:
        raise DataError(
            f"positions have shape {walked.shape}; give points in the plane, (level, chain, 2) with a coordinate "
            "'time', of probmodels.score_composition.walk"
        )


def _shown(total: int, count: int) -> NDArray[Any]:
    """Places of at most so many levels, the first and the last among them, closer towards the last."""
    left = np.linspace(1.0, 0.0, count) ** 1.7  # what tells fields apart appears late
    return np.unique(((total - 1) * (1 - left)).round().astype(int))


def _frames(positions: NDArray[Any], smooth: int) -> NDArray[Any]:
    """Middle and half width of what is shown of each level, (level, 3); averages over so many levels."""
    found = []
    for points in positions:
        points = points[np.isfinite(points).all(-1)]
        if not len(points):  # lost, all of them
            points = np.array([[-1.0, -1.0], [1.0, 1.0]])
        low, high = np.quantile(points, [0.01, 0.99], axis=0)
        found.append([*(low + high) / 2, np.log(max(0.65 * (high - low).max(), 1e-6))])
    around = np.pad(found, ((smooth // 2, smooth // 2), (0, 0)), mode="edge")
    mean = np.stack([np.convolve(column, np.full(smooth, 1 / smooth), "valid") for column in around.T], -1)
    mean[:, 2] = np.exp(mean[:, 2])
    return mean


def _draw(ax: Axes, field: Field | None, points: xr.DataArray, frame: NDArray[Any]) -> None:
    """One level: density or arrows, and the chains."""
    (x, y, half), t = frame, float(points["time"])
    low, high = np.array([x, y]) - half, np.array([x, y]) + half
    if field is not None and field.has_density:
        across, up, grid = _grid(low, high, _GRID)
        depth = field.log_density(grid, t).detach().double().numpy().reshape(_GRID, _GRID)
        finite = depth[np.isfinite(depth)]
        ax.contourf(across, up, depth - finite.max(initial=-np.inf), _DEPTHS, cmap=_PALE)
    elif field is not None:
        across, up, grid = _grid(low, high, _ARROWS)
        arrows = field.score(grid, t).detach().double().numpy()
        length = np.linalg.norm(arrows, axis=-1, keepdims=True)
        # Saturating lengths: scores grow without bound away from the mass, and their direction is what tells.
        arrows = arrows / (length + np.median(length) + 1e-12)
        ax.quiver(across, up, *arrows.T.reshape(2, _ARROWS, _ARROWS), color=BLUE, alpha=0.6, scale=_ARROWS, width=0.004)
    shown = points.values
    ax.plot(shown[:, 0], shown[:, 1], ".", color=RED, ms=5, alpha=0.8, mew=0)
    ax.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), aspect="equal")
    ax.set_title(f"time {t:.2f}", fontsize=SMALL)
    ax.tick_params(labelsize=SMALL)


def _grid(low: NDArray[Any], high: NDArray[Any], count: int) -> tuple[NDArray[Any], NDArray[Any], torch.Tensor]:
    """Places across and up, and all points (count * count, 2), row after row."""
    across, up = (np.linspace(a, b, count) for a, b in zip(low, high, strict=True))
    points = np.stack(np.meshgrid(across, up), -1).reshape(-1, 2)
    return across, up, torch.as_tensor(points, dtype=torch.get_default_dtype())
