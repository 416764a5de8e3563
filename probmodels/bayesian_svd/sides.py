"""The two sides of a Bayesian singular value decomposition: bases and candidate covariances of its cells and times."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse.linalg
import torch
import xarray as xr
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from torch import Tensor
from torch.distributions import Distribution

from probmodels.bayesian_svd.model import SideData
from probmodels.datasets.checks import SMALLER, check_fits
from probmodels.distributions.covariance import EigenGrid, eigen_grid, euclidean_distance, sphere_points
from probmodels.distributions.landmarks import LandmarkBasis, num_landmarks
from probmodels.errors import DataError

__all__ = [
    "Grid",
    "Leading",
    "cell_widths",
    "check_bases",
    "check_room",
    "leading_patterns",
    "log_density",
    "make_side",
    "points",
    "positions",
    "space_distance",
    "space_side",
]

Array = NDArray[np.float64]

_TAIL = 1e-6  # of variance that a basis leaves out of the roughest candidate
_TAIL_CHOSEN = 1e-3  # where that candidate is rougher than any that is plausible, of which far less is left out
_UNLIKELY = 15.0  # log likelihood below the likeliest
_ROOM = 1.5  # by which a grid reaches beyond the plausible length-scales
_PROFILE = 20  # length-scales that are tried
_MOST_WIDENINGS = 3  # of the default grid of length-scales, by two each
_COPIES = 6  # of the data that preparing them takes
_APART = 1000.0  # distance between fields, in their largest extent
_MOST_DISTANCES = 12_000  # cells between which all distances are formed


def positions(data: xr.DataArray) -> Array:
    """Positions of the cells (n, p): on the sphere, in km, from lat and lon, else x, y, z or the cell coordinate.

    Cells of different fields, by a coordinate ``field``, are so far apart that no kernel joins them.
    """
    names = {str(c) for c in data.coords if data[c].dims == ("cell",)}
    if {"lat", "lon"} <= names:
        found = sphere_points(data["lat"].values, data["lon"].values)
    else:
        axes: list[str] = [c for c in ("x", "y", "z") if c in names] or ["cell"]
        found = np.stack([np.asarray(data[c].values, dtype=np.float64) for c in axes], axis=1)
    if "field" in names:
        place = np.unique(data["field"].values, return_inverse=True)[1]
        found = np.column_stack([found, _APART * np.ptp(found, axis=0).max() * place])
    return found


def _within_fields(data: xr.DataArray, num: int) -> list[float]:
    """Length-scales from the spacing of cells to the largest extent of a field."""
    found, labels = positions(data), data["field"].values
    own = [found[labels == label] for label in np.unique(labels)]
    extent = max(float(np.linalg.norm(np.ptp(x, axis=0))) for x in own)
    spacing = min(float(np.median(cKDTree(x).query(x, k=2)[0][:, 1])) for x in own if len(x) > 1)
    return np.geomspace(min(spacing, extent / 8), extent, num).tolist()


def space_distance(data: xr.DataArray) -> Tensor:
    """Distances between cells: chordal, in km, from lat and lon, else Euclidean."""
    if (size := data.sizes["cell"]) > _MOST_DISTANCES:
        raise DataError(
            f"{size} cells have {8e-9 * size**2:.0f} GB of distances between them; keep fewer directions (leave out "
            "--tail 0, model.effect_scale and the kernel identity), or take a smaller region or a coarser grid"
        )
    return euclidean_distance(positions(data))


def make_side(
    name: str,
    distance: Tensor,
    families: Sequence[str],
    length_scales: Sequence[float] | Mapping[str, Sequence[float]] | None,
    prior: Distribution | None,
    **grid_options: Any,
) -> SideData:
    """Candidate covariances of one side, with each mode's prior weights over them."""
    if "identity" in families:  # white noise has no direction of little variance to leave out
        grid_options["tail"] = 0.0
    grid: EigenGrid = eigen_grid(
        distance, kernels=list(dict.fromkeys(families)), length_scales=length_scales, **grid_options
    )
    return weigh(grid, families, name, prior)


def weigh(grid: EigenGrid, families: Sequence[str], name: str, prior: Distribution | None) -> SideData:
    """Candidates of a side with the prior weights of each mode over them."""
    log_weights = torch.full((len(families), len(grid.kernels)), -math.inf, dtype=torch.float64)
    for i, family in enumerate(families):
        index = [g for g, candidate in enumerate(grid.kernels) if candidate == family]
        scales = grid.length_scales[index]
        weight = torch.zeros(len(index), dtype=torch.float64)
        if prior is not None and len(index) > 1:  # the mass of each grid point: density times the width of its cell
            weight = (
                log_density(f"length_prior_{name}", prior, scales) + torch.as_tensor(cell_widths(scales.numpy())).log()
            )
        log_weights[i, index] = torch.log_softmax(weight, 0)
    return SideData(grid.values, grid.vectors, log_weights, grid.length_scales, grid.basis)


def cell_widths(grid: Array) -> Array:
    """Widths of the cells of an increasing grid, which end half-way to the next point and at the ends of the grid."""
    edges = np.concatenate([grid[:1], 0.5 * (grid[1:] + grid[:-1]), grid[-1:]])
    return np.diff(edges)


def log_density(name: str, prior: Distribution, scales: Tensor) -> Tensor:
    """Log density of a prior at each length-scale."""
    if prior.batch_shape.numel() > 1 or prior.event_shape:
        raise DataError(f"{name} is a batch of distributions or one of vectors; give one of a positive number")
    try:
        found = prior.log_prob(scales).double()
    except ValueError as error:  # scales outside of its support
        raise DataError(f"{name} has no density at the length-scales: {error}") from error
    if found.shape != scales.shape or found.isnan().any() or not (found > -math.inf).any():
        raise DataError(
            f"{name} gives no length-scale of the grid a density; give a distribution over positive numbers"
        )
    return found


def points(num_times: int, rank: int) -> SideData:
    """The side of a process in time, in coordinates of the times themselves."""
    one = functools.partial(torch.ones, dtype=torch.float64)
    return SideData(one(1, num_times), None, torch.zeros(rank, 1, dtype=torch.float64), 0 * one(1), one(0, 0))


def check_bases(sides: Mapping[str, SideData], rank: int) -> None:
    """Check that both bases have room for all modes."""
    for name, side in sides.items():
        if len(side.basis) and side.basis.shape[1] < rank:
            raise DataError(
                f"the basis along {name} keeps {side.basis.shape[1]} directions, fewer than the {rank} "
                f"modes; lower tail (--tail) or rank (--rank), or allow shorter length-scales "
                f"(--set model.length_scales_{name}=[...])"
            )


# --------------------------------------------------------------------------------------------------------------------
# The side of space


class Leading(NamedTuple):
    """Leading patterns of the data: ``patterns (n, k)``, data times the unit series of each, whose norms are the
    singular values, and the ``noise`` variance of an entry that they leave."""

    patterns: Array
    noise: float


class Grid(NamedTuple):
    """What is known of the candidates in space beforehand; ``length_scales`` None where they are to be chosen."""

    families: Sequence[str]
    length_scales: Sequence[float] | None
    prior: Distribution | None
    num: int
    nugget: float
    tail: float | None
    most: int


def leading_patterns(centred: Tensor, rank: int) -> Leading:
    """Leading patterns of data (n, m) less their effects, land and gaps filled."""
    x = centred.numpy()
    start = np.random.default_rng(0).standard_normal(min(x.shape))  # of our own: a function of the arguments
    if rank < min(x.shape) // 4:
        _, size, right = scipy.sparse.linalg.svds(x, rank, v0=start, tol=1e-6)
        right = right[np.argsort(-size)]
    else:
        right = np.linalg.svd(x, full_matrices=False)[2][:rank]
    patterns = x @ right.T
    total = float(np.einsum("ij,ij->", x, x))
    return Leading(patterns, max(total - float((patterns**2).sum()), 1e-12 * total) / x.size)


def check_room(cells: int, times: int, most: int) -> None:
    """Check that data and basis fit into memory.

    Raises
    ------
    DataError
        If they do not.
    """
    marks = min(cells, num_landmarks(most))
    functions = min(cells, most)
    needed = _COPIES * cells * times + 3 * cells * functions + 6 * marks**2 + 2 * _PROFILE * functions**2
    check_fits(
        f"{cells} cells x {times} times",
        8 * needed,
        SMALLER,
    )


def space_side(
    data: xr.DataArray, leading: Leading, weight: Array | None, grid: Grid
) -> tuple[SideData, list[str], Array]:
    """Basis and candidates of the patterns, sentences on what was chosen, and what the basis does not show.

    Parameters
    ----------
    data
        Cells with their positions.
    leading
        Leading patterns of the data, by which length-scales are chosen where none are given.
    weight
        Weights of the cells (n,); None for patterns that are not weighted.
    grid
        Kernels, length-scales or how many, and the size of the basis.

    Returns
    -------
    tuple
        The side; sentences; share of the variance of each leading pattern that is outside of the basis, less what noise
        would have there, shape (k,).
    """
    if "field" in data.coords and grid.length_scales is None:
        grid = grid._replace(length_scales=_within_fields(data, grid.num))
    full = grid.tail == 0 or "identity" in grid.families or data.sizes["cell"] <= grid.most
    side, said = (_every_direction if full else _smooth_directions)(data, leading, weight, grid)
    return side, said, _hidden(side, leading)


def _every_direction(
    data: xr.DataArray, leading: Leading, weight: Array | None, grid: Grid
) -> tuple[SideData, list[str]]:
    """The basis of the roughest candidate, from all distances; its default grid grows where patterns ask for it."""
    make = functools.partial(
        make_side,
        "space",
        space_distance(data),
        grid.families,
        prior=grid.prior,
        weights=None if weight is None else torch.as_tensor(weight),
        num_length_scales=grid.num,
        nugget=grid.nugget,
        tail=_TAIL if grid.tail is None else grid.tail,
    )
    side = make(length_scales=grid.length_scales)
    said: list[str] = []
    for _ in range(_MOST_WIDENINGS if grid.length_scales is None else 0):
        if not (wider := _wider_scales(side, leading, grid.families)):
            break
        side = make(length_scales=wider)
        said = [_widened(max(max(scales) for scales in wider.values()), data)]
    return side, said


def _smooth_directions(
    data: xr.DataArray, leading: Leading, weight: Array | None, grid: Grid
) -> tuple[SideData, list[str]]:
    """A basis of smooth functions, and a default grid of the length-scales that leading patterns can have.

    Length-scales shorter than all that are plausible for any leading pattern cost most of the basis and would get no
    posterior weight.
    """
    n = data.sizes["cell"]
    basis = LandmarkBasis(positions(data), np.ones(n) if weight is None else weight, grid.most)
    chosen = grid.length_scales is None
    candidates, said = _chosen(basis, leading, grid, data) if chosen else (_given(grid), [])
    tail = (_TAIL_CHOSEN if chosen else _TAIL) if grid.tail is None else grid.tail
    roughest: dict[str, float] = {}
    for name, scale in candidates:
        roughest[name] = min(scale, roughest.get(name, math.inf))
    lost = np.max([basis.lost(name, scale) for name, scale in roughest.items()], axis=0)
    fits = bool(lost[-1] <= tail)
    rank = int(np.argmax(lost <= tail)) + 1 if fits else len(lost)
    rank = max(rank, min(4 * len(grid.families) + 20, len(lost)))
    sentence = (
        f"patterns are made of {rank} smooth functions on {n} cells, and their length-scales start at "
        f"{_length(min(roughest.values()), data)}"
    )
    if chosen:
        sentence += ": shorter ones are unlikely for the leading patterns"
    if not fits:
        sentence += f"; of the roughest, {lost[-1]:.1%} of the variance is left out (max_basis={grid.most})"
    said.append(f"{sentence}; tail=0 keeps every direction (--tail 0)")
    made = basis.grid(candidates, grid.nugget, rank, float(lost[rank - 1]))
    return weigh(made, grid.families, "space", grid.prior), said


def _given(grid: Grid) -> list[tuple[str, float]]:
    """Candidates, by kernel and length-scale, of the length-scales that are given."""
    scales = np.atleast_1d(np.asarray(grid.length_scales, dtype=np.float64)).tolist()
    return [(name, scale) for name in dict.fromkeys(grid.families) for scale in scales]


def _chosen(
    basis: LandmarkBasis, leading: Leading, grid: Grid, data: xr.DataArray
) -> tuple[list[tuple[str, float]], list[str]]:
    """Candidates of length-scales that are plausible for leading patterns, and a sentence where they are very long."""
    first, longest = _plausible(basis, leading, grid)
    usual = basis.extent / 2
    scales = {name: np.geomspace(first[name], max(longest, usual), grid.num).tolist() for name in first}
    said = [_widened(longest, data)] if longest > _ROOM * usual else []
    return [(name, scale) for name in scales for scale in scales[name]], said


def _plausible(basis: LandmarkBasis, leading: Leading, grid: Grid) -> tuple[dict[str, float], float]:
    """The shortest length-scale by kernel that is plausible for a leading pattern, with room, and the longest."""
    scales = np.geomspace(basis.spacing, 4 * basis.extent, _PROFILE)
    first: dict[str, float] = {}
    last = 0.0
    for name in dict.fromkeys(grid.families):
        modes = [i for i, family in enumerate(grid.families) if family == name]
        nugget = max(grid.nugget, 1e-9)  # long scales have no room for less
        tried = basis.grid([(name, float(x)) for x in scales], nugget, basis.functions.shape[1], 0.0)
        scores = _scores(tried.values, tried.vectors, tried.basis.numpy().T @ leading.patterns[:, modes], leading.noise)
        likely = scores > scores.max(0) - _UNLIKELY
        shortest = scales[likely.argmax(0)].min()
        first[name] = float(max(shortest / _ROOM, basis.spacing))
        last = max(last, float(_ROOM * scales[len(scales) - 1 - likely[::-1].argmax(0)].max()))
    return first, last


def _scores(values: Tensor, vectors: Tensor | None, patterns: Array, noise: float) -> Array:
    """Log likelihood of patterns (r, k), in coordinates of a basis, under each candidate, shape (G, k).

    A pattern is scored as a draw of its candidate covariance with a free variance, plus white noise.
    """
    pattern = torch.as_tensor(patterns)
    variances = pattern.square().mean(0) * torch.logspace(-1.5, 1.5, 16, dtype=pattern.dtype)[:, None]  # (16, k)
    scores = []
    for g, value in enumerate(values):
        along = pattern if vectors is None else vectors[g].T @ pattern
        total = variances[:, None] * (value / value.mean())[:, None] + noise  # (16, r, k)
        scores.append((-0.5 * (total.log() + along.square() / total)).sum(1).max(0).values)
    return torch.stack(scores).numpy()


def _wider_scales(side: SideData, leading: Leading, families: Sequence[str]) -> dict[str, list[float]]:
    """Length-scales by kernel up to twice as long, where a leading pattern is likeliest at the longest; else none."""
    patterns = side.basis.numpy().T @ leading.patterns
    wider: dict[str, list[float]] = {}
    for mode, family in enumerate(families):
        own = torch.nonzero(side.log_weights[mode] > -math.inf).ravel()
        if len(own) < 2:
            continue
        vectors = None if side.vectors is None else side.vectors[own]
        scores = _scores(side.values[own], vectors, patterns[:, [mode]], leading.noise)
        scales = side.length_scales[own]
        if scales[int(np.argmax(scores))] == scales.max():
            first, last = float(scales.min()), float(scales.max())
            wider[family] = np.geomspace(first, 2 * last, len(own)).tolist()
    if wider:  # kernels that need no wider grid keep theirs
        for mode, family in enumerate(families):
            own = torch.nonzero(side.log_weights[mode] > -math.inf).ravel()
            if family != "identity":
                wider.setdefault(family, side.length_scales[own].tolist())
    return wider


def _hidden(side: SideData, leading: Leading) -> Array:
    """Share of each leading pattern outside of the basis, less the share that white noise would have there."""
    square = (leading.patterns**2).sum(0)
    inside = ((side.basis.numpy().T @ leading.patterns) ** 2).sum(0)
    noise = leading.noise * (len(leading.patterns) - side.basis.shape[1])
    return np.clip((square - inside - noise) / square, 0.0, 1.0)


def _widened(longest: float, data: xr.DataArray) -> str:
    return (
        f"the default grid of length-scales in space was widened to {_length(longest, data)}, since leading patterns "
        "are smoother than it allows"
    )


def _length(value: float, data: xr.DataArray) -> str:
    unit = " km" if {"lat", "lon"} <= {str(name) for name in data.coords} else ""
    return f"{float(f'{value:.2g}'):g}{unit}"
