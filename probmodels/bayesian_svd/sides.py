"""The two sides of a Bayesian singular value decomposition: bases and candidate covariances of its cells and times."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from torch.distributions import Distribution

from probmodels.bayesian_svd.model import SideData
from probmodels.distributions.covariance import EigenGrid, chordal_distance, eigen_grid, euclidean_distance
from probmodels.errors import DataError

__all__ = ["check_bases", "make_side", "points", "space_distance", "wider_scales"]


def space_distance(data: xr.DataArray) -> Tensor:
    """Chordal distance in km from lat and lon, Euclidean from x, y, z or from the cell coordinate itself."""
    names = {str(c) for c in data.coords if data[c].dims == ("cell",)}
    if {"lat", "lon"} <= names:
        return chordal_distance(data["lat"].values, data["lon"].values)
    axes: list[str] = [c for c in ("x", "y", "z") if c in names] or ["cell"]
    points = np.stack([np.asarray(data[c].values, dtype=np.float64) for c in axes], axis=1)
    return euclidean_distance(points)


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
    log_weights = torch.full((len(families), len(grid.kernels)), -math.inf, dtype=torch.float64)
    for i, family in enumerate(families):
        index = [g for g, candidate in enumerate(grid.kernels) if candidate == family]
        scales = grid.length_scales[index]
        weight = torch.zeros(len(index), dtype=torch.float64)
        if prior is not None and len(index) > 1:  # the mass of each grid point: density times the width of its cell
            weight = _log_density(f"length_prior_{name}", prior, scales) + torch.gradient(scales)[0].log()
        log_weights[i, index] = torch.log_softmax(weight, 0)
    return SideData(grid.values, grid.vectors, log_weights, grid.length_scales, grid.basis)


def _log_density(name: str, prior: Distribution, scales: Tensor) -> Tensor:
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


def check_bases(sides: Mapping[str, SideData], rank: int, tail: float) -> None:
    """Check that both bases have room for all modes."""
    for name, side in sides.items():
        if len(side.basis) and side.basis.shape[1] < rank:
            raise DataError(
                f"the basis along {name} keeps {side.basis.shape[1]} directions at tail={tail}, fewer than the {rank} "
                f"modes; lower tail (--tail) or rank (--rank), or allow shorter length-scales "
                f"(--set model.length_scales_{name}=[...])"
            )


def wider_scales(side: SideData, z: Tensor, patterns: Tensor, families: Sequence[str]) -> dict[str, list[float]]:
    """Length-scales by kernel up to twice as long, where a leading pattern is likeliest at the longest; else none.

    A pattern is scored as a draw of its candidate covariance with a free variance, plus white noise of the residual.
    """
    noise = (z.square().sum() - patterns.square().sum()).clamp(min=1e-12 * z.square().sum()) / z.numel()
    wider: dict[str, list[float]] = {}
    for mode, family in enumerate(families):
        own = torch.nonzero(side.log_weights[mode] > -math.inf).ravel()
        if len(own) < 2 or family == "periodic":
            continue
        pattern = patterns[:, mode]
        variances = pattern.square().mean() * torch.logspace(-1.5, 1.5, 16, dtype=z.dtype)
        scores = []
        for g in own.tolist():
            along = pattern if side.vectors is None else side.vectors[g].T @ pattern
            total = variances[:, None] * side.values[g] / side.values[g].mean() + noise
            scores.append(float((-0.5 * (total.log() + along.square() / total)).sum(1).max()))
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
