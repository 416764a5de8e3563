"""Pictures of two small machines, from their physics: a pendulum in sunlight, and water that leaves a tank.

The pendulum turns by ``angle`` about a pivot 11 above the ground, and light falls at the slope ``light``; angles are in
gons, of which a right angle has 100. The shadow of the rod on the ground is described by its ``length`` and by the
``position`` of its middle::

    x(p) = p_x - (p_y - ground) cot(light)                        the shadow of a point p
    length = max(3, |x(pivot) - x(tip)|)
    position = (x(pivot) + x(tip)) / 2

A ball of radius ``ball`` lies in a tank and lifts the water to ``height``; water leaves through a hole at height
``hole`` and comes down at distance ``flow`` from the wall, where the drop is to a height of 1/2::

    height = level + ball^3
    flow = sqrt(2 * 0.98 * height * (hole - 1/2))

``level``, the water before the ball went in, is no concept: it is the exogenous part of ``height``.

A picture is drawn from all four concepts, not from the causes alone: under an intervention on the length of the shadow,
the shadow changes and nothing else does.

References
----------
Yang, M., Liu, F., Chen, Z., Shen, X., Hao, J. and Wang, J. (2021). CausalVAE: disentangled representation learning via
neural structural causal models. CVPR. https://arxiv.org/abs/2004.08697

Scenes and ranges are theirs. Pictures are drawn anew, in a frame that holds all of the scene, and labels are not cut to
whole numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import xarray as xr
from annotated_types import Interval
from numpy.typing import NDArray

from probmodels.datasets.causal import as_graph, causal_order, make_concepts, position_of, split_rows
from probmodels.datasets.checks import as_array, check_size
from probmodels.datasets.labelled import arranged
from probmodels.errors import DataError
from probmodels.options import NonNegative, OneOf, Seed, checked

__all__ = ["SCENES", "Scene", "counterfactual", "mechanism", "render", "simulate_flow", "simulate_pendulum"]

Array = NDArray[np.float64]

_Pixels = Annotated[int, Interval(ge=8, le=1024)]
_Rows = Annotated[int, Interval(ge=2, le=10_000_000)]

_PIVOT, _GROUND, _SKY = (10.0, 10.5), -0.5, 20.5
_BALL_AT, _TIP_AT = 8.0, 9.5  # distances from the pivot
_SHORTEST = 3.0
_GRAVITY, _LANDING = 0.98, 0.5
_WALL, _FLOOR = 8.0, 0.5  # where the jet starts, and on what the ball lies
_PIXELS = 1 << 19  # drawn at a time


@dataclass(frozen=True)
class Scene:
    """What there is to know of a scene.

    Attributes
    ----------
    name
        Key in `SCENES`.
    concepts, units
        Names of the concepts, and what they are measured in.
    low, high
        Ranges of the concepts in the published data, rounded outwards for effects.
    graph
        Adjacency (cause, effect).
    effects
        Functions that give concepts which have causes, from columns (row,) by name, up to what is exogenous in them.
    resting
        The exogenous part of effects where it is not known.
    frame
        Left end, lower end and side of the square that is drawn.
    draw
        Function that draws concepts by name and a jitter, all (row, 1, 1), on a `_Canvas`.
    """

    name: str
    concepts: tuple[str, ...]
    units: tuple[str, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    graph: NDArray[np.int8]
    effects: Mapping[str, Callable[[Mapping[str, Array]], Array]]
    resting: Mapping[str, float]
    frame: tuple[float, float, float]
    draw: Callable[[_Canvas, Mapping[str, NDArray[np.float32]], NDArray[np.float32]], None]


# --------------------------------------------------------------------------------------------------------- physics


@checked(DataError)
def mechanism(
    scene: Annotated[str, OneOf(SCENES)] | Scene, values: Any, interventions: Mapping[str, Any] | None = None
) -> NDArray[np.float64]:
    """Concepts after interventions: effects follow their causes, and keep what was exogenous in them.

    An effect moves by what its mechanism moves: ``x' = x + f(causes') - f(causes)``. Without interventions values come
    back as they are, to the bit.

    Parameters
    ----------
    scene
        Name in `SCENES`.
    values
        Concepts (row, concept) in the order of the scene, or with the names of its concepts on that axis, or numbers or
        arrays (row,) by name. An effect that is nan or
        absent is computed from its causes; concepts without causes have to be there.
    interventions
        Values to hold concepts at, numbers or arrays (row,), by name. One row of values serves any number of them.

    Returns
    -------
    array
        (row, concept).

    Raises
    ------
    DataError
        If a concept is unknown, a cause is missing, or a value is infinite or of another number of rows.
    """
    scene = SCENES[scene] if isinstance(scene, str) else scene
    held = {scene.concepts[position_of(name, scene.concepts)]: value for name, value in (interventions or {}).items()}
    columns, held = _aligned(scene, values, held)
    before, after = dict(columns), dict(columns)
    for place in causal_order(scene.graph):
        name = scene.concepts[place]
        effect = scene.effects.get(name)
        if effect is not None:
            expected = effect(before)
            before[name] = np.where(np.isnan(before[name]), expected + scene.resting[name], before[name])
            after[name] = before[name] + (effect(after) - expected)
        after[name] = held.get(name, after[name])
    return np.stack([after[name] for name in scene.concepts], axis=1)


@checked(DataError)
def counterfactual(
    scene: Annotated[str, OneOf(SCENES)] | Scene,
    concepts: Any,
    do: Mapping[str, Any],
    *,
    size: _Pixels = 32,
    jitter: Any = None,
) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
    """What these very scenes would be under interventions.

    Parameters
    ----------
    scene, concepts, do
        As in `mechanism`.
    size, jitter
        As in `render`; the jitter of the factual pictures gives those of the same water jets.

    Returns
    -------
    tuple
        Concepts (row, concept) and images (row, channel, size, size).

    Raises
    ------
    DataError
        As in `mechanism` and `render`.
    """
    after = mechanism(scene, concepts, do)
    return after, render(scene, after, size, jitter=jitter)


def _shadow(values: Mapping[str, Array]) -> tuple[Array, Array]:
    """Shadows of the pivot and of the tip."""
    angle, light = values["angle"] * (np.pi / 200), values["light"] * (np.pi / 200)
    slope = np.cos(light) / np.sin(light)  # finite where the sun stands overhead, unlike the tangent
    pivot = _PIVOT[0] - (_PIVOT[1] - _GROUND) * slope
    tip = _PIVOT[0] + _TIP_AT * np.sin(angle) - (_PIVOT[1] - _TIP_AT * np.cos(angle) - _GROUND) * slope
    return pivot, tip


def _length(values: Mapping[str, Array]) -> Array:
    pivot, tip = _shadow(values)
    return np.maximum(_SHORTEST, np.abs(pivot - tip))


def _position(values: Mapping[str, Array]) -> Array:
    pivot, tip = _shadow(values)
    return (pivot + tip) / 2


def _lifted(values: Mapping[str, Array]) -> Array:
    return values["ball"] ** 3


def _reach(values: Mapping[str, Array]) -> Array:
    return np.sqrt(2 * _GRAVITY * np.maximum(values["height"], 0) * np.maximum(values["hole"] - _LANDING, 0))


def _aligned(scene: Scene, values: Any, held: Mapping[str, Any]) -> tuple[dict[str, Array], dict[str, Array]]:
    """Columns (row,) of values, nan where absent, and of interventions, all of one number of rows."""
    given = _by_concept(scene, values)
    names = [*(f"concept {name!r}" for name in given), *(f"intervention on {name!r}" for name in held)]
    entries = zip(names, (*given.values(), *held.values()), strict=True)
    columns = [as_array(value, name, numbers=True).astype(np.float64) for name, value in entries]
    columns = [column.reshape(-1) if column.ndim == 0 else column for column in columns]
    rows = max((len(column) for column in columns if column.ndim == 1), default=1)
    may_lack = [f"concept {effect!r}" for effect in scene.effects]
    for name, column in zip(names, columns, strict=True):
        _check_column(name, column, rows, may_lack=name in may_lack)
    absent = [name for name in scene.concepts if name not in given and name not in scene.effects]
    if absent:
        raise DataError(f"concept {absent[0]!r} is absent; it has no causes to follow from, so give it")
    spread = [np.broadcast_to(column, rows) for column in columns]
    found = {name: np.full(rows, np.nan) for name in scene.concepts}
    return found | dict(zip(given, spread, strict=False)), dict(zip(held, spread[len(given) :], strict=True))


def _by_concept(scene: Scene, values: Any) -> dict[str, Any]:
    """Values by the names of concepts, from a mapping or a table (row, concept)."""
    if isinstance(values, Mapping):
        return {scene.concepts[position_of(name, scene.concepts)]: value for name, value in values.items()}
    table = _table(scene, values)
    if table.ndim != 2 or table.shape[1] != len(scene.concepts):
        raise DataError(f"concepts of shape {table.shape}; give (row, concept) with {', '.join(scene.concepts)}")
    return dict(zip(scene.concepts, table.T, strict=True))


def _table(scene: Scene, values: Any) -> Array:
    """Concepts (row, concept) in the order of the scene."""
    ordered = arranged(values, "concepts", {"data": None, "concept": scene.concepts})
    return as_array(ordered, "concepts", numbers=True).astype(np.float64)


def _check_column(name: str, column: Array, rows: int, *, may_lack: bool) -> None:
    """Check that a column has one number for each row or for all, missing only where it follows from others."""
    if column.ndim != 1 or len(column) not in (1, rows):
        raise DataError(f"{name} has shape {column.shape} where there are {rows} rows; give a number, or one a row")
    if np.isinf(column).any() or (np.isnan(column).any() and not may_lack):
        raise DataError(f"{name} is missing or infinite in row {int((~np.isfinite(column)).argmax())}; give a number")


# -------------------------------------------------------------------------------------------------------- pictures


@checked(DataError)
def render(
    scene: Annotated[str, OneOf(SCENES)] | Scene, concepts: Any, size: _Pixels = 32, *, jitter: Any = None
) -> NDArray[np.float32]:
    """Draw scenes in colour, with edges that fade over a pixel, so that pictures change smoothly with concepts.

    Parameters
    ----------
    scene
        Name in `SCENES`.
    concepts
        (row, concept), all finite; they need not fit together. What has no extent, such as a shadow of negative length,
        is not drawn.
    size
        Pixels along a side, at least 8.
    jitter
        Additions to the gravity of the jets of water (row,), in the pictures only; None for none.

    Returns
    -------
    array
        (row, channel, size, size) in [0, 1]: red, green and blue; the first row is the uppermost.

    Raises
    ------
    DataError
        If shapes do not fit or values are not finite.
    """
    scene = SCENES[scene] if isinstance(scene, str) else scene
    table = _table(scene, concepts)
    if table.ndim != 2 or table.shape[1] != len(scene.concepts) or not np.isfinite(table).all():
        raise DataError(f"concepts of shape {table.shape}; give finite (row, concept) of {', '.join(scene.concepts)}")
    jitters = np.zeros(len(table)) if jitter is None else as_array(jitter, "jitter", numbers=True)
    if jitters.shape != (len(table),) or not (jitters > -_GRAVITY).all():
        raise DataError(f"jitter of shape {jitters.shape}; give one above {-_GRAVITY} for each of {len(table)} rows")
    check_size(rows=len(table), channels=3, size=size, width=size)
    images = np.empty((len(table), 3, size, size), dtype=np.float32)
    step = max(1, _PIXELS // size**2)
    for start in range(0, len(table), step):
        part = slice(start, start + step)
        canvas = _Canvas(images[part], scene.frame)
        columns = {name: table[part, i, None, None].astype(np.float32) for i, name in enumerate(scene.concepts)}
        scene.draw(canvas, columns, jitters[part, None, None].astype(np.float32))
    return images


class _Canvas:
    """Images (row, channel, size, size), white at first; shapes go over them by the share of a pixel they cover."""

    def __init__(self, images: NDArray[np.float32], frame: tuple[float, float, float]) -> None:
        self.images = images
        self.images[:] = 1
        size = images.shape[-1]
        self.left, self.bottom, side = frame
        self.pixel = side / size
        ticks = (np.arange(size, dtype=np.float32) + np.float32(0.5)) * np.float32(self.pixel)
        self.x, self.y = self.left + ticks, (self.bottom + ticks)[::-1, None]

    def paint(self, covered: NDArray[np.float32], colour: tuple[float, float, float]) -> None:
        """Lay a colour over pixels, as far as they are covered (row, size, size)."""
        for channel, value in enumerate(colour):
            layer = self.images[:, channel]
            layer += covered * (np.float32(value) - layer)

    def between(self, at: NDArray[Any], low: Any, high: Any) -> NDArray[np.float32]:
        """Share of pixels centred at signed distances ``at`` that lies between two others."""
        half = np.float32(self.pixel / 2)
        return np.clip((np.minimum(at + half, high) - np.maximum(at - half, low)) / np.float32(self.pixel), 0, 1)

    def box(self, left: Any, right: Any, bottom: Any, top: Any) -> NDArray[np.float32]:
        return self.between(self.x, left, right) * self.between(self.y, bottom, top)

    def disc(self, x: Any, y: Any, radius: Any) -> NDArray[np.float32]:
        """Area by four vertical chords in a pixel, which holds for discs smaller than one too."""
        covered: Any = np.float32(0)
        for place in (-0.375, -0.125, 0.125, 0.375):
            across = self.x + np.float32(place * self.pixel) - x
            inside = np.maximum(radius, 0) ** 2 - across**2
            half = np.sqrt(np.maximum(inside, 0))
            covered = covered + self.between(self.y - y, -half, half)
        return covered / np.float32(4)

    def segment(self, start: tuple[Any, Any], end: tuple[Any, Any], width: float) -> NDArray[np.float32]:
        along = end[0] - start[0], end[1] - start[1]
        square = np.maximum(along[0] ** 2 + along[1] ** 2, np.float32(1e-12))
        share = np.clip(((self.x - start[0]) * along[0] + (self.y - start[1]) * along[1]) / square, 0, 1)
        distance = np.hypot(self.x - start[0] - share * along[0], self.y - start[1] - share * along[1])
        return self.between(distance, -width / 2, width / 2)

    def jet(self, x: float, hole: Any, reach: Any, width: float) -> NDArray[np.float32]:
        """The parabola from (x, hole) down to (x + reach, landing); its distance is that to first order."""
        drop, positive = hole - _LANDING, np.maximum(reach, np.float32(1e-3))
        fall = drop / positive**2 * (self.x - x)
        distance = (self.y - hole + fall * (self.x - x)) / np.sqrt(1 + 4 * fall**2)
        there = (drop > 0) & (reach > 0)
        return self.between(distance, -width / 2, width / 2) * self.box(x, np.inf, _LANDING, np.inf) * there


def _draw_pendulum(canvas: _Canvas, values: Mapping[str, NDArray[np.float32]], jitter: NDArray[np.float32]) -> None:
    angle, light = values["angle"] * np.float32(np.pi / 200), values["light"] * np.float32(np.pi / 200)
    ball = _PIVOT[0] + _BALL_AT * np.sin(angle), _PIVOT[1] - _BALL_AT * np.cos(angle)
    sun = _PIVOT[0] + (_SKY - _PIVOT[1]) * np.cos(light) / np.sin(light)
    canvas.paint(canvas.disc(sun, _SKY, 3.0), (1.0, 0.65, 0.0))
    half = values["length"] / 2
    canvas.paint(
        canvas.box(values["position"] - half, values["position"] + half, _GROUND - 0.5, _GROUND + 0.5), (0.2, 0.2, 0.3)
    )
    canvas.paint(canvas.segment(_PIVOT, ball, 0.6), (0.0, 0.0, 0.0))
    canvas.paint(canvas.disc(*ball, 1.5), (0.7, 0.13, 0.13))


def _draw_flow(canvas: _Canvas, values: Mapping[str, NDArray[np.float32]], jitter: NDArray[np.float32]) -> None:
    ball, hole, water = values["ball"], values["hole"], (0.53, 0.81, 0.98)
    canvas.paint(canvas.box(3.0, _WALL, 0.0, 5 + values["height"]), water)
    for left, right, bottom, top in (
        (-np.inf, np.inf, -0.3, 0.0),  # the ground
        (2.7, 3.0, 0.0, 12.0),
        (_WALL, _WALL + 0.3, 0.0, hole - 0.3),  # below and above the hole
        (_WALL, _WALL + 0.3, np.maximum(hole + 0.3, 0), 12.0),
    ):
        canvas.paint(canvas.box(left, right, bottom, top), (0.0, 0.0, 0.0))
    reach = values["flow"] * np.sqrt(1 + jitter / np.float32(_GRAVITY))
    canvas.paint(canvas.jet(_WALL, hole, reach, 0.5), water)
    canvas.paint(canvas.disc(5.5, _FLOOR + ball, ball), (0.7, 0.13, 0.13))


# ------------------------------------------------------------------------------------------------------- data sets


def _make_scene(name: str, concepts: dict[str, tuple[str, float, float]], edges: list[list[str]], **kw: Any) -> Scene:
    units, low, high = zip(*concepts.values(), strict=True)
    return Scene(name, tuple(concepts), units, low, high, as_graph(edges, list(concepts)), **kw)


SCENES: dict[str, Scene] = {
    "pendulum": _make_scene(
        "pendulum",
        {"angle": ("gon", -40, 43), "light": ("gon", 60, 147), "length": ("1", 3, 12.6), "position": ("1", 2, 19.7)},
        [["angle", "length"], ["angle", "position"], ["light", "length"], ["light", "position"]],
        effects={"length": _length, "position": _position},
        resting={"length": 0.0, "position": 0.0},
        frame=(-2.5, -1.5, 25.0),
        draw=_draw_pendulum,
    ),
    "flow": _make_scene(
        "flow",
        {"ball": ("1", 5 / 30, 34 / 30), "height": ("1", 1, 5.36), "flow": ("1", 1.7, 6.62), "hole": ("1", 2, 14 / 3)},
        [["ball", "height"], ["height", "flow"], ["hole", "flow"]],
        effects={"height": _lifted, "flow": _reach},
        resting={"height": 2.45, "flow": 0.0},  # the middle of the published levels
        frame=(1.5, -0.5, 14.0),
        draw=_draw_flow,
    ),
}


@checked(DataError)
def simulate_pendulum(
    size: _Pixels = 32,
    num: _Rows | None = None,
    *,
    noise: NonNegative = 0.0,
    num_train: _Rows | None = None,
    seed: Seed = 0,
) -> xr.Dataset:
    """Pictures of a pendulum, the sun, and the shadow of the pendulum on the ground.

    Parameters
    ----------
    size
        Pixels along a side.
    num
        Number of pictures, with angles drawn uniformly from their ranges; None for the published grid of 7308.
    noise
        Standard deviation of normal disturbances of length and position; 0, as published, makes these functions of the
        angles, which leaves the graph unidentified from labels alone.
    num_train
        Number of pictures for training, chosen at random; None for 5482 of 7308, as published, and three quarters of
        other numbers.
    seed
        Seed of all draws.

    Returns
    -------
    xr.Dataset
        As `make_concepts` returns it, with ``unit`` (concept,).

    Raises
    ------
    DataError
        If an option is out of range.
    """
    check_size(num=num or 1, channels=3, size=size, width=size)
    rng = np.random.default_rng(seed)
    scene = SCENES["pendulum"]
    light = np.array([gon for gon in range(60, 148) if gon != 100])
    roots = _roots(scene, num, {"angle": np.arange(-40, 44), "light": light}, rng)
    concepts = mechanism(scene, roots)
    concepts[:, 2:] += noise * rng.standard_normal((len(concepts), 2))
    return _simulated(scene, concepts, size, None, num_train, 5482 / 7308, rng, f"simulate_pendulum, seed {seed}")


@checked(DataError)
def simulate_flow(
    size: _Pixels = 32,
    num: _Rows | None = None,
    *,
    noise: Annotated[float, Interval(ge=0, le=1000)] = 0.01,
    num_train: _Rows | None = None,
    seed: Seed = 0,
) -> xr.Dataset:
    """Pictures of a tank, the ball in its water, and the jet from a hole in its wall.

    Parameters
    ----------
    size
        Pixels along a side.
    num
        Number of pictures, with ball, level and hole drawn uniformly from their ranges; None for the published grid of
        8100.
    noise
        Size of the disturbance of the jet in the picture, not of its label: the gravity of 0.98 becomes
        ``0.98 + noise * max(|n|, 1)`` with standard normal n.
    num_train
        Number of pictures for training, chosen at random; None for four fifths, 6480 of 8100 as published.
    seed
        Seed of all draws.

    Returns
    -------
    xr.Dataset
        As `make_concepts` returns it, with ``unit`` (concept,), and ``jitter`` (data,) as `counterfactual` takes it.

    Raises
    ------
    DataError
        If an option is out of range.
    """
    check_size(num=num or 1, channels=3, size=size, width=size)
    rng = np.random.default_rng(seed)
    scene = SCENES["flow"]
    grid = {"ball": np.arange(5, 35) / 30, "level": np.arange(10, 40) / 10, "hole": np.arange(6, 15) / 3}
    roots = _roots(scene, num, grid, rng)
    level = roots.pop("level")
    concepts = mechanism(scene, roots | {"height": level + roots["ball"] ** 3})
    jitter = noise * np.maximum(np.abs(rng.standard_normal(len(concepts))), 1)
    data = _simulated(scene, concepts, size, jitter, num_train, 0.8, rng, f"simulate_flow, seed {seed}")
    return data.assign(jitter=("data", jitter))


def _roots(scene: Scene, num: int | None, grid: dict[str, NDArray[Any]], rng: np.random.Generator) -> dict[str, Array]:
    """What has no causes: all points of a grid, or so many of the box around it."""
    if num is None:
        points = np.meshgrid(*grid.values(), indexing="ij")
        return {name: point.reshape(-1).astype(np.float64) for name, point in zip(grid, points, strict=True)}
    return {name: rng.uniform(values.min(), values.max(), num) for name, values in grid.items()}


def _simulated(
    scene: Scene,
    concepts: Array,
    size: int,
    jitter: Array | None,
    num_train: int | None,
    share: float,
    rng: np.random.Generator,
    source: str,
) -> xr.Dataset:
    num_train = round(share * len(concepts)) if num_train is None else num_train
    if num_train > len(concepts):
        raise DataError(f"num_train={num_train} is out of range: there are {len(concepts)} pictures")
    return make_concepts(
        render(scene, concepts, size, jitter=jitter),
        concepts,
        names=scene.concepts,
        split=split_rows(len(concepts), num_train, rng),
        graph=scene.graph,
        units=scene.units,
        name=scene.name,
        source=source,
    )
