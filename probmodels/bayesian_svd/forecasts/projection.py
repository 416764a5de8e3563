"""New months projected onto the posterior of a Bayesian SVD: their principal components, with uncertainty.

Given a draw of patterns, effects, noise and decays, the series of new months are normal: they continue the process in
time and are observed through the patterns. A Kalman filter runs forwards through the new months, and draws are taken
backwards (Frühwirth-Schnatter, 1994). Where noise is correlated it is part of the state, see `noise_filter`.

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
import xarray as xr
from numpy.typing import ArrayLike, NDArray

from probmodels.bayesian_svd.draws import Draws, read_draws
from probmodels.bayesian_svd.effects import continue_design
from probmodels.bayesian_svd.forecasts.new_fields import check_regular, later_times, new_matrix, positions
from probmodels.bayesian_svd.forecasts.noise_filter import LastNoise, draw_series, last_noise
from probmodels.bayesian_svd.forecasts.states import block_diagonal, end_state, normal_root
from probmodels.distributions.processes import stationary, transition
from probmodels.errors import SummaryError
from probmodels.inference.result import Result
from probmodels.options import Count, Fraction, Seed, checked

__all__ = ["NewMonths", "Record", "noise_after", "project", "read_record", "series_of"]

Array = NDArray[np.float64]

_LOUD = 1.5  # root mean square of residuals of new months in units of the noise


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

    @property
    def scale(self) -> Array:
        """Decays over one step, or length-scales in steps (draw, process)."""
        return self.draws.scale[self.chosen]

    def processes(self) -> Array:
        """Processes at the times of the record (draw, time, process), of which the series of modes are mixtures."""
        return self.draws.processes(self.chosen)

    def last_state(self, processes: Array) -> tuple[Array, Array]:
        """Mean (draw, process, m) and covariance of the states after processes (draw, time, process), which are at the
        times of the record and at regular steps after it."""
        known = np.empty(0) if self.draws.steps is None else self.draws.steps
        steps = np.concatenate([known, np.ones(processes.shape[1] - 1 - len(known))])
        return end_state(self.draws.process, self.scale, processes, steps)

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
    rng: np.random.Generator,
    process: str,
    scale: Array,
    steps: Array,
    start: tuple[Array, Array] | None,
    precision: Array,
    linear: Array,
) -> Array:
    """Draws (draw, time, mode) of series given what the field says; ``start`` is mean (draw, mode, m) and covariance
    of the state before the first step.

    Without a start the first state has the stationary distribution of the process.
    """
    draws, num_modes = scale.shape
    order = len(stationary(process))
    size, seen = num_modes * order, np.arange(num_modes) * order  # places of the values among the states
    eye = np.eye(size)
    if start is None:
        mean = np.zeros((draws, size))
        spread = np.broadcast_to(np.kron(np.eye(num_modes), stationary(process)), (draws, size, size))
    else:
        mean, spread = start[0].reshape(draws, size), block_diagonal(start[1])
    ways = [tuple(map(block_diagonal, transition(process, scale, step))) for step in steps]
    means, spreads = [], []
    for time, (kept, fresh) in enumerate(ways):
        if not (time == 0 and start is None):
            mean, spread = _ahead(kept, fresh, mean, spread)
        told = np.zeros((draws, size, size))
        told[:, seen[:, None], seen] = precision[:, time]
        gain = np.linalg.solve(eye + spread @ told, spread)
        spread = 0.5 * (gain + gain.transpose(0, 2, 1))
        innovation = linear[:, time] - np.einsum("sij,sj->si", precision[:, time], mean[:, seen])
        mean = mean + np.einsum("sij,sj->si", spread[:, :, seen], innovation)
        means.append(mean)
        spreads.append(spread)
    found = np.empty((draws, len(steps), size))
    for time in range(len(steps) - 1, -1, -1):
        mean, spread = means[time], spreads[time]
        if time + 1 < len(steps):
            kept, fresh = ways[time + 1]
            ahead, around = _ahead(kept, fresh, mean, spread)
            gain = np.linalg.solve(around, kept @ spread).transpose(0, 2, 1)
            mean = mean + np.einsum("sij,sj->si", gain, found[:, time + 1] - ahead)
            spread = spread - gain @ (kept @ spread)
        root = np.linalg.cholesky(0.5 * (spread + spread.transpose(0, 2, 1))) if order == 1 else normal_root(spread)
        found[:, time] = mean + np.einsum("sij,sj->si", root, rng.standard_normal(mean.shape))
    return found[:, :, seen]


def _ahead(kept: Array, fresh: Array, mean: Array, spread: Array) -> tuple[Array, Array]:
    """Mean and covariance a step later: ``kept`` of the state is left, ``fresh`` is the covariance of what is new."""
    return np.einsum("sij,sj->si", kept, mean), kept @ spread @ kept.transpose(0, 2, 1) + fresh


@dataclass(frozen=True)
class NewMonths:
    """Draws of the processes at the times of a new field.

    Attributes
    ----------
    processes
        Shape (draw, time, process).
    field
        The new field (cell, time) at those times, NaN where nothing is known.
    draws
        Draws whose effects are those of these times.
    ratio
        Root mean square of the standardised residual at each time, nan where the field holds no value.
    follows
        Whether the times follow the record.
    """

    processes: Array
    field: xr.DataArray
    draws: Draws
    ratio: Array
    follows: bool


def series_of(
    record: Record,
    field: xr.DataArray,
    covariates: Mapping[str, ArrayLike] | None,
    rng: np.random.Generator,
    *,
    filled: bool = False,
) -> NewMonths:
    """Draws of the processes at the times of a new field from `new_matrix`.

    Parameters
    ----------
    record, field, covariates, rng
        The result, the field, values of covariates at its times, and the source of randomness.
    filled
        Whether times that the field skips are drawn, too.
    """
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
    draws, steps = record.at(field["time"], covariates), np.diff(new, prepend=0.0)
    count = np.isfinite(field.values).sum(0)
    if record.draws.noise is None:
        precision, linear, square = _information(record, draws, field.values)
        start = record.last_state(record.processes()) if follows else None
        processes = _draw_series(rng, record.draws.process, record.scale, steps, start, precision, linear)
        rest = square - 2 * np.einsum("stk,stk->st", linear, processes)
        rest += np.einsum("stj,stjk,stk->st", processes, precision, processes)
    else:
        processes = _under_noise(record, draws, field.values, rng, steps, follows)
        rest = _standardised(record, draws, field.values, processes)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = np.sqrt(np.maximum(rest.mean(0), 0.0) / np.where(count > 0, count, np.nan))
    return NewMonths(processes, field, draws, ratio, follows)


def _under_noise(
    record: Record, draws: Draws, field: Array, rng: np.random.Generator, steps: Array, follows: bool
) -> Array:
    """Draws of the processes (draw, time, process) where noise is correlated."""
    assert draws.noise is not None
    assert draws.turn is not None
    chosen, scale = record.chosen, np.sqrt(draws.weight)[:, None]
    patterns = scale * (draws.patterns(draws=chosen) @ draws.turn[chosen].transpose(0, 2, 1))
    seen = np.isfinite(field)
    filled = np.where(seen, field, 0.0)

    def rest(place: int) -> Array:
        return scale * (filled - draws.fixed(draws=chosen[[place]])[0])

    start = (*record.last_state(record.processes()), noise_after(record, None)) if follows else None
    process = draws.process, record.scale
    return draw_series(rng, draws.noise, draws.sigma[chosen], process, patterns, rest, seen, steps, start)


def _standardised(record: Record, draws: Draws, field: Array, processes: Array) -> Array:
    """Sums of squares (draw, time) of what effects and modes leave of a field, in units of the noise of each cell."""
    seen, series = np.isfinite(field), record.modes(processes)
    out = np.empty(series.shape[:2])
    for place, draw in enumerate(record.chosen):
        at = np.array([draw])
        rest = np.where(seen, field, 0.0) - draws.fixed(draws=at)[0] - draws.patterns(draws=at)[0] @ series[place].T
        out[place] = np.sum(np.where(seen, rest / draws.noise_sd(draws=at)[0][:, None], 0.0) ** 2, axis=0)
    return out


def noise_after(record: Record, new: NewMonths | None) -> LastNoise:
    """Noise of the weighted data in the last month of the record, or of new months that follow it."""
    draws, chosen, size = record.draws, record.chosen, record.time.size
    assert draws.noise is not None
    patterns, scale = draws.patterns(draws=chosen), np.sqrt(draws.weight)
    own, _ = positions(record.time, record.time)
    values = record.constant["data"].transpose("cell", "time").values
    effects, series = [draws], record.draws.series(draws=chosen)
    if new is not None:
        own = np.concatenate([own, positions(record.time, new.field["time"])[1]])
        values = np.concatenate([values, new.field.values], axis=1)
        effects.append(new.draws)
        series = np.concatenate([series, record.modes(new.processes)], axis=1)

    def rest(time: int) -> Array:
        at, place = (effects[0], time) if time < size else (effects[1], time - size)
        at = replace(at, design=at.design[[place]], shared_design=at.shared_design[[place]])
        known = at.fixed(draws=chosen)[:, :, 0] + np.einsum("sck,sk->sc", patterns, series[:, time])
        return np.asarray(scale * (values[:, time] - known))

    return last_noise(draws.noise, np.isfinite(values), own, rest)


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
        Of a Bayesian SVD whose series are a process in time: any ``series`` but ``"frame"``.
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
        If series are no process, or times are not whole steps apart.
    DataError
        If the new field has other cells, or other units, base period or season, or lacks covariates.
    """
    tree = result if isinstance(result, xr.DataTree) else result.tree
    record = read_record(tree, num_draws)
    field = new_matrix(new, record.constant)
    new_months = series_of(record, field, covariates, np.random.default_rng(seed))
    series, ratio = record.modes(new_months.processes), new_months.ratio
    times = new_months.field["time"].values
    out = xr.Dataset(coords={"mode": np.arange(1, series.shape[2] + 1, dtype=np.int32), "time": times})
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
    start = (
        "the last state of the record"
        if new_months.follows
        else "the stationary distribution: times overlap with the record"
    )
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
