"""The two sides of a problem by its options: bases and length-scales of the cells and of the times, or the process in
time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from torch import Tensor

from probmodels.bayesian_svd.effects import time_in_years
from probmodels.bayesian_svd.model import SeriesData, SideData
from probmodels.bayesian_svd.series_grid import series_data
from probmodels.bayesian_svd.sides import Grid, check_bases, leading_patterns, make_side, points, space_side
from probmodels.distributions.covariance import time_distance
from probmodels.errors import CovarianceError, DataError

__all__ = ["NUGGET", "Bases", "make_bases"]

NUGGET = 1e-6  # by default
_TAIL_TIME = 1e-6


class Bases(NamedTuple):
    """Both sides, the process of the series where they are one, sentences about the grid of length-scales, and the
    share of each mode's pattern that the basis cannot show."""

    space: SideData
    time: SideData
    process: SeriesData | None
    said: list[str]
    hidden: np.ndarray


def make_bases(
    matrix: xr.DataArray,
    centred: Tensor,
    design: Tensor,
    weight: np.ndarray,
    families: Mapping[str, Sequence[str]],
    options: Mapping[str, Any],
) -> Bases:
    """Bases for a matrix, given its weighted values less effects, the orthonormal design and kernels of the modes."""
    uniform, rank = options["frame_prior"] == "uniform", options["rank"]
    tail = _tail(options)
    grid = Grid(
        families["space"],
        options["length_scales_space"],
        options["length_prior_space"],
        options["num_length_scales"],
        _nugget(options),
        tail,
        options["max_basis"],
    )
    leading = leading_patterns(centred, rank)
    try:
        space, said, hidden = space_side(matrix, leading, None if uniform else weight, grid)
        time, process = _time_side(matrix, design, families["time"], tail, options)
    except CovarianceError as error:
        raise DataError(str(error)) from error
    check_bases({"space": space, "time": time}, rank)
    return Bases(space, time, process, said, hidden)


def _nugget(options: Mapping[str, Any]) -> float:
    given: float | None = options["nugget"]
    return NUGGET if given is None else given


def _tail(options: Mapping[str, Any]) -> float | None:
    """Share of variance that a basis may leave out.

    Effects of proper prior act outside a truncated basis, which the projected likelihood cannot see: none.
    """
    tail: float | None = options["tail"]
    return tail if options["effect_scale"] is None else 0.0


def _time_side(
    matrix: xr.DataArray, design: Tensor, kinds: Sequence[str], tail: float | None, options: Mapping[str, Any]
) -> tuple[SideData, SeriesData | None]:
    """The side of time, and its process where series are one."""
    series, scales, prior = (options[name] for name in ("series", "length_scales_time", "length_prior_time"))
    if series != "frame":
        process = series_data(matrix["time"], series, options["rank"], scales, prior)
        return points(matrix.sizes["time"], options["rank"]), process
    if "member" in matrix.coords and set(kinds) != {"identity"}:
        raise DataError("members share their times, so that kernel_time has none; give series='ar1' or 'iid'")
    side = make_side(
        "time",
        time_distance(time_in_years(matrix["time"])),
        kinds,
        scales,
        prior,
        complement=design if options["effect_scale"] is None and design.shape[1] else None,
        period=options["period"],
        num_length_scales=options["num_length_scales"],
        nugget=_nugget(options),
        tail=_TAIL_TIME if tail is None else tail,
    )
    return side, None
