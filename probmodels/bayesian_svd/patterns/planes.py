"""Neighbouring modes that turn into one another, and the planes that they span together.

Two modes of nearly equal variance are known only up to a rotation: each pattern is wide open, the plane of both is not.
Here the rotation of each pair of neighbours has a posterior, beside North's rule of thumb, and modes that are not
separated are reported as a plane: its projection, its share of variance, the variance that it explains at each cell,
and the angles between a draw's plane and the mean plane.

References
----------
North, G. R., Bell, T. L., Cahalan, R. F. and Moeng, F. J. (1982). Sampling errors in the estimation of empirical
orthogonal functions. Mon. Weather Rev. 110. https://doi.org/10.1175/1520-0493(1982)110<0699:SEITEO>2.0.CO;2
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import scipy.linalg
import xarray as xr
from annotated_types import Len
from scipy.sparse.linalg import LinearOperator, eigsh

from probmodels.bayesian_svd.draws import MODES_OF, Draws, blocks, expand, read_draws
from probmodels.errors import SummaryError
from probmodels.options import Count, OneOf, checked

__all__ = [
    "Plane",
    "Rotation",
    "add_planes",
    "groups_of",
    "joined_modes",
    "joined_names",
    "main_axes",
    "plane_of",
    "plane_sentences",
    "read_plane",
]

CERTAIN = 0.95
"""Probability at which two modes count as separated, and a plane as well determined."""

UNKNOWN = 90 / np.sqrt(3)
"""Root mean square in degrees of an angle of which nothing is known, uniform between -90 and 90."""

_ALL = slice(None)
_DENSE = 300  # coordinates up to which the mean matrix is formed


@dataclass(frozen=True)
class Rotation:
    """How a pair of modes turns within its mean plane.

    Attributes
    ----------
    angle
        Degrees between the first mode of a draw and its mean direction in the plane, (draw,), within -90 and 90.
    order
        Posterior probability that the mode whose pattern lies along the first mean direction is the larger.
    """

    angle: np.ndarray
    order: float

    @property
    def sd(self) -> float:
        """Root mean square of the angle in degrees; some 52 where nothing is known of it."""
        return float(np.sqrt(np.mean(self.angle**2)))

    @property
    def separated(self) -> bool:
        """Whether the two modes can be told apart."""
        return self.order >= CERTAIN


@dataclass(frozen=True)
class Plane:
    """The space that some modes span together, draw by draw.

    Attributes
    ----------
    modes
        Numbers of the modes, from 1.
    frames
        Unit patterns in coordinates of the basis (basis_space, draw, mode).
    scale
        Standard deviation that each mode adds to the weighted field (draw, mode).
    basis
        Orthonormal basis of weighted fields (cell, basis_space).
    weight
        Area weight of each cell (cell,).
    mean
        Orthonormal axes of the mean plane (basis_space, mode): those that the mean projection keeps most of.
    """

    modes: tuple[int, ...]
    frames: np.ndarray
    scale: np.ndarray
    basis: np.ndarray
    weight: np.ndarray
    mean: np.ndarray

    def projection(self, cells: slice | np.ndarray = _ALL, draws: slice | np.ndarray = _ALL) -> np.ndarray:
        """Projection U U' on the plane in area-weighted coordinates, between some cells: (draw, cell, cell)."""
        unit = expand(self.basis[cells], self.frames[:, draws])
        return np.asarray(unit @ unit.transpose(0, 2, 1))

    def local_variance(self, cells: slice | np.ndarray = _ALL, draws: slice | np.ndarray = _ALL) -> np.ndarray:
        """Variance that the plane explains at each cell, in squared data units: (draw, cell)."""
        basis = self.basis[cells] / np.sqrt(self.weight[cells])[:, None]
        patterns = expand(basis, self.frames[:, draws]) * self.scale[draws][:, None, :]
        return np.asarray((patterns**2).sum(2))

    def angles(self) -> np.ndarray:
        """Degrees between the plane of each draw and the mean plane, largest principal angle first: (draw, mode)."""
        cosines = np.linalg.svd(np.einsum("rj,rsk->sjk", self.mean, self.frames, optimize=True), compute_uv=False)
        return np.asarray(np.rad2deg(np.arccos(np.clip(cosines[:, ::-1], -1.0, 1.0))))

    def rotation(self) -> Rotation:
        """How the pair turns within its mean plane.

        Raises
        ------
        SummaryError
            If the plane is not that of two modes.
        """
        if len(self.modes) != 2:
            raise SummaryError(f"modes={list(self.modes)}; a rotation is that of two modes")
        along = self.mean.T @ self.frames[:, :, 0]  # (2, draw)
        angle = np.arctan2(along[1], along[0])
        angle = angle - 0.5 * np.angle(np.mean(np.exp(2j * angle)))  # of an axis: 180 degrees are none
        angle = np.rad2deg(0.5 * np.angle(np.exp(2j * angle)))
        larger = self.scale[:, 0] > self.scale[:, 1]
        return Rotation(angle, float(np.mean(larger == (np.abs(angle) < 45))))


def plane_of(draws: Draws, modes: Sequence[int], scale: np.ndarray) -> Plane:
    """The plane of some modes of draws with an orthonormal basis; ``scale`` as in `Plane`, of all modes."""
    index = [mode - 1 for mode in modes]
    frames = draws.space[:, :, index]
    return Plane(tuple(modes), frames, scale[:, index], draws.basis_space, draws.weight, main_axes(frames, len(index)))


def main_axes(frames: np.ndarray, count: int) -> np.ndarray:
    """Leading eigenvectors (basis, count) of the mean of X X' over draws, from all X (basis, draw, mode)."""
    size, num_draws = frames.shape[:2]
    flat = frames.reshape(size, -1)
    if size <= max(_DENSE, count):
        return np.asarray(scipy.linalg.eigh(flat @ flat.T / num_draws, subset_by_index=(size - count, size - 1))[1])
    mean = LinearOperator((size, size), matvec=lambda x: flat @ (flat.T @ x) / num_draws, dtype=float)
    return np.asarray(eigsh(mean, k=count, v0=flat.sum(1) + flat[:, 0])[1])


@checked(SummaryError)
def read_plane(
    tree: xr.DataTree,
    modes: Annotated[Sequence[Count], Len(2)],
    *,
    of: Annotated[str, OneOf(tuple(MODES_OF))] | None = None,
) -> Plane:
    """The plane of some modes of a result, with its draws.

    Parameters
    ----------
    tree
        Result of a Bayesian SVD.
    modes
        Numbers of the modes, from 1; two for a plane, more for a larger space.
    of
        Whose modes, as for `probmodels.bayesian_svd.summary.summarise_modes`.

    Returns
    -------
    Plane
        Its draws: projection, variance explained at each cell, principal angles, and the rotation of a pair.

    Raises
    ------
    SummaryError
        If the result lacks what is needed, or a mode.
    """
    draws = read_draws(tree, of).orthonormal()
    if len(set(modes)) < len(modes) or max(modes) > draws.d.shape[1]:
        raise SummaryError(f"modes={list(modes)}; give different numbers between 1 and {draws.d.shape[1]}")
    return plane_of(draws, modes, draws.d * draws.spread()[1])


def add_planes(out: xr.Dataset, draws: Draws, scale: np.ndarray, fraction: np.ndarray, bounds: np.ndarray) -> None:
    """Put the separation of neighbours over ``pair`` into a summary, and those not separated over ``plane``.

    Parameters
    ----------
    out
        Summary over ``mode``, for modes of the population with ``effective_times_mean``.
    draws
        Draws of the modes.
    scale, fraction
        Standard deviation and share of variance of each mode (draw, mode).
    bounds
        Probabilities of the ends of intervals (2,).
    """
    count, draws = draws.d.shape[1], draws.orthonormal()
    if count < 2:
        return
    turns = [plane_of(draws, (i, i + 1), scale).rotation() for i in range(1, count)]
    out.coords["pair"] = "pair", np.arange(1, count, dtype=np.int32)
    out["pair"].attrs = {"long_name": "number of the first of two neighbouring modes", "units": "1"}
    _put(
        out,
        "order_probability",
        "pair",
        [x.order for x in turns],
        "probability that the first of a pair, by pattern, is the larger mode",
        "1",
    )
    _put(
        out,
        "rotation_sd",
        "pair",
        [x.sd for x in turns],
        "posterior standard deviation of the angle by which a pair "
        "is rotated in its mean plane; 52 where nothing is known",
        "degree",
    )
    for name, values in zip(("lower", "upper"), np.quantile([x.angle for x in turns], bounds, axis=1), strict=True):
        _put(out, f"rotation_{name}", "pair", values, f"{name} end of the interval of that angle", "degree")
    if "effective_times_mean" in out:
        variance = (scale**2 + draws.noise_variance()[:, None] / len(draws.weight)).mean(0)
        error = variance * np.sqrt(2 / out["effective_times_mean"].values)
        gap = np.maximum(np.abs(variance[:-1] - variance[1:]), 1e-300)
        angle = np.minimum(np.rad2deg(np.maximum(error[:-1], error[1:]) / gap), UNKNOWN)
        _put(
            out,
            "north_angle",
            "pair",
            angle,
            "rotation of a pair by North's rule of thumb with the effective number of times, at most 52",
            "degree",
        )
    joined = [mode for mode, turn in enumerate(turns, 1) if not turn.separated]
    if groups := groups_of(joined):
        _add_groups(out, [plane_of(draws, group, scale) for group in groups], fraction, bounds)


def groups_of(joined: Sequence[int]) -> list[tuple[int, ...]]:
    """Modes in groups, from the first modes of the pairs that are joined."""
    groups: list[list[int]] = []
    for mode in joined:
        if groups and groups[-1][-1] == mode:
            groups[-1].append(mode + 1)
        else:
            groups.append([mode, mode + 1])
    return [tuple(group) for group in groups]


def _add_groups(out: xr.Dataset, planes: list[Plane], fraction: np.ndarray, bounds: np.ndarray) -> None:
    """Share of variance, principal angle, verdict and map of each plane."""
    out.coords["plane"] = "plane", np.arange(1, len(planes) + 1, dtype=np.int32)
    out["plane"].attrs = {"long_name": "number of the plane of modes that are not separated", "units": "1"}
    for name, end in (("first", 0), ("last", -1)):
        numbers = np.array([plane.modes[end] for plane in planes], dtype=np.int32)
        _put(out, f"plane_{name}_mode", "plane", numbers, f"{name} mode of the plane", "1")
    shares = np.stack([fraction[:, [mode - 1 for mode in plane.modes]].sum(1) for plane in planes], axis=1)
    largest = np.stack([plane.angles()[:, 0] for plane in planes], axis=1)
    for key, value in _reduced(shares, bounds).items():
        _put(out, f"plane_fraction_{key}", "plane", value, f"share of variance that the plane explains, {key}", "1")
    for key, value in _reduced(largest, bounds).items():
        words = f"largest principal angle between the plane of a draw and the mean plane, {key}"
        _put(out, f"plane_angle_{key}", "plane", value, words, "degree")
    certain = np.mean(largest < 45, axis=0)
    words = "1 where the largest principal angle is below 45 degrees with a probability of 95 %"
    _put(out, "plane_determined", "plane", (certain >= CERTAIN).astype(np.int8), words, "1")
    num_cells, num_draws = len(planes[0].basis), planes[0].frames.shape[1]
    maps = {key: np.empty((len(planes), num_cells)) for key in ("mean", "sd", "lower", "upper")}
    for place, plane in enumerate(planes):
        for block in blocks(num_cells, num_draws, len(plane.modes)):
            for key, value in _reduced(plane.local_variance(block), bounds).items():
                maps[key][place, block] = value
    for key, value in maps.items():
        out[f"plane_variance_{key}"] = ("plane", "cell"), value
        out[f"plane_variance_{key}"].attrs["long_name"] = f"variance that the plane explains at a cell, {key}"


def _put(out: xr.Dataset, name: str, dim: str, values: object, words: str, units: str) -> None:
    out[name] = xr.Variable(dim, np.asarray(values), {"long_name": words, "units": units})


def _reduced(values: np.ndarray, bounds: np.ndarray) -> dict[str, np.ndarray]:
    """Mean, sd and quantiles over draws."""
    lower, upper = np.quantile(values, bounds, axis=0)
    return {"mean": values.mean(0), "sd": values.std(0, ddof=1), "lower": lower, "upper": upper}


def joined_modes(modes: xr.Dataset) -> set[int]:
    """Numbers of the modes of a summary that are in a plane."""
    if "plane" not in modes.dims:
        return set()
    ends = zip(modes["plane_first_mode"].values, modes["plane_last_mode"].values, strict=True)
    return {mode for first, last in ends for mode in range(int(first), int(last) + 1)}


def joined_names(modes: xr.Dataset, place: int) -> str:
    """The modes of a plane in words: ``Modes 2 and 3``, ``Modes 2 to 4``."""
    first, last = (int(modes[f"plane_{end}_mode"][place]) for end in ("first", "last"))
    return f"Modes {first} {'and' if last == first + 1 else 'to'} {last}"


def plane_sentences(modes: xr.Dataset) -> list[str]:
    """What a summary says of its planes, one sentence for each."""
    out = []
    for place in range(modes.sizes.get("plane", 0)):
        first, last = (int(modes[f"plane_{end}_mode"][place]) for end in ("first", "last"))
        pairs = range(first - 1, last - 1)
        order = ", ".join(f"{float(modes['order_probability'][i]):.2f}" for i in pairs)
        turned = ", ".join(f"{float(modes['rotation_sd'][i]):.0f}°" for i in pairs)
        if "north_angle" in modes:
            turned += "; North's rule: " + ", ".join(f"{float(modes['north_angle'][i]):.0f}°" for i in pairs)
        share = [100 * float(modes[f"plane_fraction_{x}"][place]) for x in ("mean", "lower", "upper")]
        angle = [float(modes[f"plane_angle_{x}"][place]) for x in ("mean", "lower", "upper")]
        sure = "is well determined" if int(modes["plane_determined"][place]) else "is not well determined either"
        what = "plane" if last == first + 1 else "space"
        out.append(
            f"{joined_names(modes, place)} are not separated: their order is known with probability {order}, and they "
            f"rotate by {turned}. Read them together: their {what} explains {share[0]:.1f} % of the variance "
            f"[{share[1]:.1f}, {share[2]:.1f}] and {sure} (largest angle to the mean {what} {angle[0]:.0f}° "
            f"[{angle[1]:.0f}, {angle[2]:.0f}])."
        )
    return out
