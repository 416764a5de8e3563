"""Series of modes as a process in time: steps of the time axis, and grids of decays or length-scales."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import xarray as xr
from torch.distributions import Distribution

from probmodels.bayesian_svd.effects import time_in_years
from probmodels.bayesian_svd.model import SeriesData
from probmodels.bayesian_svd.sides import cell_widths, log_density
from probmodels.errors import DataError

__all__ = ["series_data"]

_DECAYS, _LARGEST_DECAY = 40, 2.65  # of a grid up to tanh(2.65) = 0.990
_LENGTHS, _SHORTEST = 100, 0.25  # of a grid from a quarter of a step, where neighbours are correlated by less than .01
_LONGEST = 100.0  # times the shortest step: beyond, variances of what is new fall below 1e-9 and sums lose their digits
_FRESH = 1e6  # steps after which nothing is left of a series: between members of an ensemble


def series_data(
    times: xr.DataArray,
    series: str,
    rank: int,
    length_scales: Sequence[float] | None = None,
    prior: Distribution | None = None,
) -> SeriesData:
    """Grid of a process over the usual step of the time axis, and the steps in units of it.

    Where all steps are near a whole number of the usual one, as those of months are, they are taken for it; else they
    are kept as they are. The grid of decays is even in the inverse hyperbolic tangent of the decay, which spreads its
    information evenly; weights make the prior uniform on (0, 1). The grid of length-scales is even in their logarithm,
    as is their prior, from a quarter of the usual step to half the record, at most a hundred of the shortest step.

    Parameters
    ----------
    times
        The time axis; with a coordinate ``member``, one record after the other.
    series
        ``"iid"``, ``"ar1"``, ``"matern32"`` or ``"matern52"``.
    rank
        Number of series.
    length_scales, prior
        Grid of length-scales of a Matérn process in place of the default one, in years or the axis's unit, and their
        prior.

    Raises
    ------
    DataError
        If times do not increase, or some are so near one another that no length-scale is left, or a length-scale is
        too long for them.
    """
    years = time_in_years(times)
    steps = np.diff(years)
    fresh = np.zeros(len(steps), dtype=bool)
    if "member" in times.coords:
        fresh = times["member"].values[1:] != times["member"].values[:-1]
        steps[fresh] = np.median(steps[~fresh])
    if (steps <= 0).any():
        raise DataError(f"series={series!r} needs times that increase; sort the data by time and drop repeated ones")
    step = float(np.median(steps))
    steps = steps / step
    whole = np.maximum(steps.round(), 1.0)
    if (np.abs(steps - whole) < 0.15 + 0.02 * whole).all():  # a calendar: months and years differ in length
        steps = whole
    if not fresh.all():
        step *= float(np.diff(years)[~fresh].sum() / (step * steps[~fresh].sum()))
    shortest, record = float(steps.min()), float(_longest_stretch(steps, fresh))
    steps[fresh] = _FRESH
    if series == "iid":
        scale, weights = np.zeros(1), np.ones(1)
    elif series == "ar1":
        scale = np.tanh(np.linspace(0.0, _LARGEST_DECAY, _DECAYS))
        weights = cell_widths(scale)
    else:
        scale = _length_scales(series, length_scales, step, shortest, record)
        weights = np.ones(len(scale))
        if prior is not None and len(scale) > 1:  # the mass of each grid point: density times the width of its cell
            density = log_density("length_prior_time", prior, torch.as_tensor(step * scale))
            weights = cell_widths(scale) * np.exp((density - density.max()).numpy())
    with np.errstate(divide="ignore"):
        log_weights = torch.as_tensor(np.log(weights / weights.sum())).expand(rank, -1).contiguous()
    process = "ar1" if series == "iid" else series
    return SeriesData(process, torch.as_tensor(scale), log_weights, torch.as_tensor(steps), step)


def _length_scales(
    series: str, given: Sequence[float] | None, step: float, shortest: float, record: float
) -> np.ndarray:
    """Grid of length-scales in steps, from one in the unit of the time axis or by default."""
    most = _LONGEST * shortest
    if given is not None:
        scale = np.unique(np.asarray(given, dtype=float)) / step
        if scale[-1] > most * (1 + 1e-9):
            raise DataError(
                f"length_scales_time={scale[-1] * step:.4g} is more than {_LONGEST:g} times the shortest step between "
                f"times, {shortest * step:.4g}; give at most {most * step:.4g}"
            )
        return scale
    longest = min(0.5 * record, most)
    if longest < 2 * _SHORTEST:
        raise DataError(
            f"series={series!r} takes length-scales of at most {_LONGEST:g} times the shortest step between times, "
            f"which is {shortest:.2g} of the usual one; take means over regular steps, or series='ar1'"
        )
    return np.geomspace(_SHORTEST, longest, _LENGTHS)


def _longest_stretch(steps: np.ndarray, fresh: np.ndarray) -> float:
    """Longest time between the first and the last value of a record, of one member where there are some."""
    return max(float(part[1:].sum()) for part in np.split(np.append(0.0, steps), 1 + np.flatnonzero(fresh)))
