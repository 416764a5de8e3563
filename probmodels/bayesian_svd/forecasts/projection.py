"""New months projected onto the posterior of a Bayesian SVD: their principal components, with uncertainty.

Given a draw of patterns, effects, noise and decays, the series of new months are normal: they continue the process in
time and are observed through the patterns. A Kalman filter runs forwards through the new months, and draws are taken
backwards (Frühwirth-Schnatter, 1994).

References
----------
Frühwirth-Schnatter, S. (1994). Data augmentation and dynamic linear models. J. Time Ser. Anal. 15.
https://doi.org/10.1111/j.1467-9892.1994.tb00184.x
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import ArrayLike, NDArray

from probmodels.bayesian_svd.draws import Draws, read_draws
from probmodels.bayesian_svd.effects import continue_design, time_in_years
from probmodels.datasets.calendars import frequency, month_number
from probmodels.datasets.cells import to_matrix
from probmodels.datasets.labelled import arranged
from probmodels.errors import DataError, SummaryError
from probmodels.inference.result import Result
from probmodels.options import Count, Fraction, Seed, checked

__all__ = ["Record", "check_regular", "later_times", "new_matrix", "positions", "project", "read_record", "series_of"]

Array = NDArray[np.float64]

_NEAR = 0.15  # of a step: months and years differ in length
_LOUD = 1.5  # root mean square of residuals of new months in units of the noise
_SAME = ("units", "kind", "base_period", "season", "frequency")  # attributes that new fields share with those fitted


@dataclass(frozen=True)
class Record:
    """Draws of a result thinned alike in each chain, and the times and cells that it was fitted to.

    Attributes
    ----------
    draws
        All draws of the result.
    chosen
        Places of those that are used (draw,), as many of each chain.
    constant
        The group ``constant_data`` of the result.
    decay
        Correlation of each process over one step (draw, process); zero where series are independent in time.
    """

    draws: Draws
    chosen: NDArray[np.int64]
    constant: xr.Dataset
    decay: Array

    @property
    def time(self) -> xr.DataArray:
        """Times of the record."""
        return self.constant["time"]

    def processes(self) -> Array:
        """Processes at the times of the record (draw, time, process), of which the series of modes are mixtures."""
        series, turn = self.draws.series(draws=self.chosen), self.draws.turn
        return series if turn is None else series @ turn[self.chosen].transpose(0, 2, 1)

    def modes(self, processes: Array) -> Array:
        """Series of the modes (draw, time, mode) from processes."""
        return processes if self.draws.turn is None else processes @ self.draws.turn[self.chosen]

    def by_chain(self, values: NDArray[Any]) -> NDArray[Any]:
        """Values (draw, ...) as (chain, draw, ...)."""
        return values.reshape(self.draws.num_chains, -1, *values.shape[1:])

    def at(self, later: xr.DataArray, covariates: Mapping[str, ArrayLike] | None) -> Draws:
        """Draws whose effects are those of later times."""
        designs, known = [], set()
        for name, dim in (("fixed_effects_design", "effect"), ("shared_effects_design", "shared_effect")):
            if name not in self.constant:
                designs.append(np.zeros((later.size, 0)))
                continue
            design = self.constant[name].rename({dim: "effect"}) if dim != "effect" else self.constant[name]
            known |= set(map(str, design["effect"].values))
            own = {key: value for key, value in (covariates or {}).items() if key in known}
            designs.append(continue_design(design, self.time, later, own))
        if strange := set(covariates or {}) - known:
            raise SummaryError(f"covariates={sorted(strange)} are no effects of this result; leave them out")
        return replace(self.draws, design=designs[0], shared_design=designs[1])


def read_record(tree: xr.DataTree, num_draws: int) -> Record:
    """Draws of a result whose series are a process in time.

    Raises
    ------
    SummaryError
        If its series are no process, or a group or variable is absent.
    """
    if "posterior" in tree.children and "F" not in tree["posterior"] and "V" in tree["posterior"]:
        raise SummaryError(
            "the series of this result (series='frame') are numbers, not a process in time, so that nothing follows "
            "for other times; infer with series='ar1' (--series ar1)"
        )
    draws, constant = read_draws(tree), tree["constant_data"].to_dataset()
    each = draws.num_draws // draws.num_chains
    count = min(each, -(-num_draws // draws.num_chains))
    within = np.unique(np.linspace(0, each - 1, count).round().astype(int))
    chosen = (np.arange(draws.num_chains)[:, None] * each + within).ravel()
    if draws.decay is None:
        raise SummaryError("the posterior lacks 'autocorrelation'; was the result cut down?")
    return Record(draws, chosen, constant, draws.decay[chosen])


# -- times ------------------------------------------------------------------------------------------------------------


def positions(time: xr.DataArray, later: xr.DataArray) -> tuple[Array, Array]:
    """Both axes in units of the usual step of the first, whole numbers where they are near some."""
    values, others = time.values, later.values
    if values.dtype.kind != others.dtype.kind and "M" in (values.dtype.kind, others.dtype.kind):
        raise DataError(f"the new times hold {others.dtype} values, where those of the fit hold {values.dtype}")
    kind = frequency(values) if values.dtype.kind == "M" else "other"
    if kind in ("monthly", "yearly"):
        unit = 1.0 if kind == "monthly" else 12.0
        own, new = month_number(values) / unit, month_number(others) / unit
    else:
        own, new = time_in_years(time), time_in_years(later)
        unit = float(np.median(np.diff(own)))
        own, new = (own - own[-1]) / unit, (new - own[-1]) / unit
    zero = own[-1]
    own, new = own - zero, new - zero
    return _whole(own), _whole(new)


def _whole(positions: Array) -> Array:
    near = positions.round()
    return np.where(np.abs(positions - near) < _NEAR, near, positions)


def check_regular(own: Array, new: Array) -> None:
    """Check that times are whole steps apart."""
    for name, place in (("times of the fit", own), ("new times", new)):
        off = place != place.round()
        if off.any():
            raise SummaryError(
                f"{int(off.sum())} of the {place.size} {name} are no whole number of steps from the last one of the "
                f"fit, the first at index {int(np.argmax(off))}; bring both to means over the same regular steps"
            )


def later_times(time: xr.DataArray, steps: int) -> xr.DataArray:
    """The times that follow at the usual step of an axis: calendar months or years where they are that far apart."""
    values = time.values
    if values.dtype.kind != "M":
        found: Any = values[-1] + np.median(np.diff(values)) * np.arange(1, steps + 1)
    else:
        kind = frequency(values)
        last = pd.Timestamp(values[-1])
        if kind in ("monthly", "yearly"):
            unit = "months" if kind == "monthly" else "years"
            try:
                dates = [last + pd.DateOffset(**{unit: step}) for step in range(1, steps + 1)]
            except pd.errors.OutOfBoundsDatetime as error:
                raise SummaryError(
                    f"{steps} steps after {last.date()} are beyond the calendar of NumPy, 2262"
                ) from error
            found = np.array(dates, dtype=values.dtype)
        else:
            found = values[-1] + np.median(np.diff(values).astype(np.int64)).astype(int) * np.arange(1, steps + 1)
    return xr.DataArray(found, dims="time", coords={"time": found}, name="time", attrs=time.attrs)


# -- cells ------------------------------------------------------------------------------------------------------------


def new_matrix(new: xr.DataArray, constant: xr.Dataset) -> xr.DataArray:
    """A new field as (cell, time), cells in the order of the fit, times ascending.

    Raises
    ------
    DataError
        If cells of the fit are missing, times are repeated, values infinite, or the field says of itself that it is of
        other units, another base period or season than the one fitted.
    """
    _check_kind(new, constant["data"])
    if {"lat", "lon"} <= set(new.dims):
        full = new.assign_coords(ocean=(("lat", "lon"), np.ones((new.sizes["lat"], new.sizes["lon"]), dtype=bool)))
        new = to_matrix(full)
    if "time" not in new.dims or new.ndim != 2:
        raise DataError(f"the new field has dims {tuple(map(str, new.dims))}; give (cell, time) or (time, lat, lon)")
    if "time" not in new.coords:
        raise DataError("the new field has no coordinate 'time'; give the dates of its months")
    if not new["time"].size:
        raise DataError("the new field holds no time")
    cell = next(str(dim) for dim in new.dims if dim != "time")
    new = new.transpose(cell, "time").sortby("time")
    values = _same_cells(new, constant).astype(float)
    if np.isinf(values).any():
        raise DataError(f"the new field holds {int(np.isinf(values).sum())} infinite entries; mark gaps by NaN")
    if len(np.unique(new["time"].values)) < new["time"].size:
        raise DataError("times of the new field are repeated; give each once")
    return xr.DataArray(values, dims=("cell", "time"), coords={"time": new["time"].values})


def _check_kind(new: xr.DataArray, data: xr.DataArray) -> None:
    """Check that a field is of the same units, base period and season as the data, as far as both say so."""
    for name in _SAME:
        own, other = str(data.attrs.get(name, "")), str(new.attrs.get(name, ""))
        if own and other and own != other:
            raise DataError(
                f"the new field has {name}={other!r}, where the fit had {own!r}; load it with the options of the fit "
                f"(load_sst(..., base_period=...) with the base period of the fit, and the same season)"
            )


def _same_cells(new: xr.DataArray, constant: xr.Dataset) -> NDArray[Any]:
    """Values (cell, time) of the cells of the fit, found by latitude and longitude where both have them, or label."""
    wanted, have = _places(constant), _places(new)
    if wanted is not None and have is not None:
        place = {key: index for index, key in enumerate(have)}
        if missing := [key for key in wanted if key not in place]:
            north, east = missing[0]
            raise DataError(
                f"the new field lacks {len(missing)} of the {len(wanted)} cells of the fit, the first at {north:g} N, "
                f"{east:g} E; give all of them, NaN where there is no value"
            )
        return np.asarray(new.values[[place[key] for key in wanted]])
    values = np.asarray(arranged(new, "the new field", {"cell": constant["cell"].values, "time": None}))
    if len(values) != constant.sizes["cell"]:
        raise DataError(f"the new field has {len(values)} cells, where the fit has {constant.sizes['cell']}")
    return values


def _places(cells: xr.Dataset | xr.DataArray) -> list[tuple[float, float]] | None:
    """Latitude and longitude of each cell; None where they are not known."""
    if not {"lat", "lon"} <= set(cells.coords):
        return None
    lat, lon = cells["lat"].values.astype(float), cells["lon"].values.astype(float) % 360
    return list(zip(lat.round(3).tolist(), (lon.round(3) % 360).tolist(), strict=True))


# -- filter -----------------------------------------------------------------------------------------------------------


def _information(record: Record, draws: Draws, field: Array) -> tuple[Array, Array, Array]:
    """What a field (cell, time) says of the series at each time: precision (draw, time, mode, mode), linear term
    (draw, time, mode), and the sum of squares of the standardised field (draw, time)."""
    seen = np.isfinite(field)
    holes, group = np.unique(seen, axis=1, return_inverse=True)  # months of the same gaps share their products
    group = np.ravel(group)
    num_modes = draws.d.shape[1]
    precision = np.empty((len(record.chosen), field.shape[1], num_modes, num_modes))
    linear, square = np.empty(precision.shape[:3]), np.empty(precision.shape[:2])
    filled = np.where(seen, field, 0.0)
    for place, draw in enumerate(record.chosen):
        at = np.array([draw])
        noise = draws.noise_sd(draws=at)[0]
        pattern = draws.patterns(draws=at)[0] / noise[:, None]
        rest = np.where(seen, (filled - draws.fixed(draws=at)[0]) / noise[:, None], 0.0)
        linear[place] = rest.T @ pattern
        square[place] = np.einsum("ct,ct->t", rest, rest)
        by_hole = np.stack([(pattern * hole[:, None]).T @ pattern for hole in holes.T])
        precision[place] = by_hole[group]
    return precision, linear, square


def _draw_series(
    rng: np.random.Generator, decay: Array, steps: Array, start: Array | None, precision: Array, linear: Array
) -> Array:
    """Draws (draw, time, mode) of AR(1) series given what the field says; ``start`` is the state before the first step.

    Without a start the first state has the stationary distribution of the process.
    """
    draws, num_modes = decay.shape
    eye = np.eye(num_modes)
    means, spreads = [], []
    mean = np.zeros((draws, num_modes)) if start is None else start
    spread = np.broadcast_to(eye if start is None else 0 * eye, (draws, num_modes, num_modes))
    for time, step in enumerate(steps):
        if not (time == 0 and start is None):
            mean, spread = _ahead(decay**step, mean, spread)
        gain = np.linalg.solve(eye + spread @ precision[:, time], spread)
        spread = 0.5 * (gain + gain.transpose(0, 2, 1))
        innovation = linear[:, time] - np.einsum("sij,sj->si", precision[:, time], mean)
        mean = mean + np.einsum("sij,sj->si", spread, innovation)
        means.append(mean)
        spreads.append(spread)
    found = np.empty((draws, len(steps), num_modes))
    for time in range(len(steps) - 1, -1, -1):
        mean, spread = means[time], spreads[time]
        if time + 1 < len(steps):
            kept = decay ** steps[time + 1]
            ahead, around = _ahead(kept, mean, spread)
            gain = np.linalg.solve(around, kept[:, :, None] * spread).transpose(0, 2, 1)
            mean = mean + np.einsum("sij,sj->si", gain, found[:, time + 1] - ahead)
            spread = spread - gain @ (kept[:, :, None] * spread)
        root = np.linalg.cholesky(0.5 * (spread + spread.transpose(0, 2, 1)))
        found[:, time] = mean + np.einsum("sij,sj->si", root, rng.standard_normal(mean.shape))
    return found


def _ahead(kept: Array, mean: Array, spread: Array) -> tuple[Array, Array]:
    """Mean and covariance a step later, of which the share ``kept`` (draw, mode) of each state is left."""
    later = kept[:, :, None] * spread * kept[:, None, :]
    return kept * mean, later + (1 - kept**2)[:, :, None] * np.eye(kept.shape[1])


def series_of(
    record: Record,
    field: xr.DataArray,
    covariates: Mapping[str, ArrayLike] | None,
    rng: np.random.Generator,
    *,
    filled: bool = False,
) -> tuple[Array, xr.DataArray, Array, bool]:
    """Draws of the series at the times of a new field from `new_matrix`.

    Parameters
    ----------
    record, field, covariates, rng
        The result, the field, values of covariates at its times, and the source of randomness.
    filled
        Whether times that the field skips are drawn, too.

    Returns
    -------
    tuple
        Series (draw, time, mode); their times; the root mean square of the standardised residual at each time, nan
        where it holds no value; and whether the times follow the record.
    """
    if record.draws.noise is not None:
        raise SummaryError(
            "new months are projected where noise is independent in space and time, and this result has "
            "noise='correlated'; fit it to a record that holds the new months, or infer with noise='white'"
        )
    own, new = positions(record.time, field["time"])
    check_regular(own, new)
    follows = bool(new[0] > 0)
    if filled and follows:
        times = later_times(record.time, int(new[-1]))
        values = np.full((field.sizes["cell"], times.size), np.nan)
        values[:, new.astype(int) - 1] = field.values
        held = times.values.copy()
        held[new.astype(int) - 1] = field["time"].values
        field = xr.DataArray(values, dims=("cell", "time"), coords={"time": held})
        new = np.arange(1.0, times.size + 1)
    draws = record.at(field["time"], covariates)
    precision, linear, square = _information(record, draws, field.values)
    start = record.draws.series(slice(-1, None), record.chosen)[:, 0] if follows else None
    steps = np.diff(new, prepend=0.0)
    series = _draw_series(rng, record.decay, steps, start, precision, linear)
    rest = square - 2 * np.einsum("stk,stk->st", linear, series)
    rest += np.einsum("stj,stjk,stk->st", series, precision, series)
    count = np.isfinite(field.values).sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = np.sqrt(np.maximum(rest.mean(0), 0.0) / np.where(count > 0, count, np.nan))
    return series, field["time"], ratio, follows


@checked(SummaryError)
def project(
    result: Result | xr.DataTree,
    new: xr.DataArray,
    *,
    covariates: Mapping[str, ArrayLike] | None = None,
    level: Fraction = 0.95,
    num_draws: Count = 1000,
    seed: Seed = 0,
) -> xr.Dataset:
    """Principal components of months that the posterior has not seen.

    What is found is the series given the posterior as it was fitted: each draw of patterns, effects, noise and decays
    is taken as it is, and the new months do not update it. Where they follow the record, the series continue from its
    last state; where they overlap with it or precede it, the process starts anew from its stationary distribution.

    Parameters
    ----------
    result
        Of a Bayesian SVD with ``series="ar1"`` or ``"iid"``.
    new
        The new field, dims (cell, time) or (time, lat, lon), on the cells of the fit, gaps NaN. Anomalies have to be
        relative to the climatology of the fit. Times are whole steps of the record from its last one; they may skip
        some.
    covariates
        Values at the new times of the covariates of the fit.
    level
        Probability content of the intervals.
    num_draws
        Draws that are used, evenly thinned within chains.
    seed
        Seed of the draws.

    Returns
    -------
    xr.Dataset
        ``pc`` (chain, draw, time, mode), ``pc_mean``, ``pc_sd``, ``pc_lower`` and ``pc_upper`` (mode, time), in units
        of the standard deviation of the process; ``residual_ratio`` (time), the root mean square of what the modes
        leave of the new field in units of the noise: about 1 where the patterns serve. Attribute ``start`` says where
        the process starts.

    Raises
    ------
    SummaryError
        If series are no process, noise is correlated, or times are not whole steps apart.
    DataError
        If the new field has other cells, or other units, base period or season, or lacks covariates.
    """
    tree = result if isinstance(result, xr.DataTree) else result.tree
    record = read_record(tree, num_draws)
    field = new_matrix(new, record.constant)
    series, times, ratio, follows = series_of(record, field, covariates, np.random.default_rng(seed))
    out = xr.Dataset(coords={"mode": np.arange(1, series.shape[2] + 1, dtype=np.int32), "time": times.values})
    out["pc"] = ("chain", "draw", "time", "mode"), record.by_chain(series)
    bounds = np.quantile(series, [(1 - level) / 2, (1 + level) / 2], axis=0)
    parts = {"mean": series.mean(0), "sd": series.std(0, ddof=1), "lower": bounds[0], "upper": bounds[1]}
    words = {"mean": "posterior mean", "sd": "posterior standard deviation"}
    words |= {
        "lower": f"lower end of the {100 * level:g} % interval",
        "upper": f"upper end of the {100 * level:g} % interval",
    }
    for name, values in parts.items():
        attrs = {"long_name": f"standardised principal component of new months, {words[name]}", "units": "1"}
        out[f"pc_{name}"] = ("mode", "time"), values.T, attrs
    out["pc"].attrs = {"long_name": "draws of the standardised principal component of new months", "units": "1"}
    label = "root mean square of the residual of the new field in units of the noise"
    out["residual_ratio"] = "time", ratio, {"long_name": label, "units": "1"}
    out["time"].attrs = dict(record.time.attrs)
    start = "the last state of the record" if follows else "the stationary distribution: times overlap with the record"
    notes = []
    if (loud := ratio > _LOUD).any():
        worst = int(np.nanargmax(ratio))
        notes.append(
            f"at {int(loud.sum())} of {ratio.size} times the patterns leave more of the new field than noise "
            f"(ratio up to {ratio[worst]:.2f}, at most {_LOUD:g}): it may be no anomalies of the climatology of the "
            "fit, or hold patterns that the fit has not seen"
        )
    out.attrs = {
        "Conventions": "CF-1.11",
        "title": "Principal components of new months",
        "estimand": "series of new months given the posterior of the record; patterns are not updated",
        "start": start,
        "notes": "; ".join(notes),
        "interval_level": level,
        "seed": seed,
    }
    return out
