"""Indices that are modes of a region, such as the Pacific Decadal Oscillation, as posterior series.

An index like that of the Pacific Decadal Oscillation is the principal component of a leading mode of sea surface
temperature. Which pattern leads depends on the years there are, and where two modes explain alike one hardly knows.
Each draw of a Bayesian SVD is a population with a covariance of its own; its leading mode in the region and the series
of it are one draw of the index (`mode_index`), so that intervals hold what the years leave open about the pattern, and
noise.

Published indices are made from other regions, products and patterns. `published_index` says what a published series is
in terms of the modes of a field, a regression on their series with persistent residuals in each draw, and predicts it
for other times, with the residual in the interval.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np
import xarray as xr

from probmodels.bayesian_svd.draws import Draws, blocks, read_draws
from probmodels.bayesian_svd.indices.boxes import cell_positions, frozen_cells, thinned
from probmodels.bayesian_svd.indices.series import match_series, time_steps
from probmodels.bayesian_svd.sides import cell_widths
from probmodels.datasets.calendars import month_number, parse_period
from probmodels.datasets.regions import Region, parse_region, select_latitudes
from probmodels.errors import DataError, SummaryError
from probmodels.options import Count, OneOf, Seed, checked

__all__ = [
    "DEFINITIONS",
    "Definition",
    "ModeRegion",
    "mode_index",
    "mode_region",
    "published_index",
    "published_values",
]

_LEAST = 30  # times of a base period
_DECAYS = np.tanh(np.linspace(0.0, 2.3, 24))  # of residuals, up to 0.98


@dataclass(frozen=True)
class Definition:
    """What an index is: a mode of a region, with the sign of its positive phase, in units of its spread over a period.

    Attributes
    ----------
    label
        What it is called.
    mode
        Number of the mode, from 1.
    region
        Where the mode is that of.
    warm, cool
        Boxes that are warmer, and cooler, in the positive phase.
    base
        Period over which the index has mean zero and standard deviation one.
    reference
        Where it is defined.
    """

    label: str
    mode: int
    region: str
    warm: str
    cool: str
    base: str
    reference: str


DEFINITIONS = {
    "pdo": Definition(
        "Pacific Decadal Oscillation",
        mode=1,
        region="north_pacific",
        warm="25,60,225,245",
        cool="30,45,160,205",
        base="1900-1993",
        reference="Mantua et al. (1997), https://doi.org/10.1175/1520-0477(1997)078<1069:APICOW>2.0.CO;2",
    ),
    "npgo": Definition(
        "North Pacific Gyre Oscillation, from sea surface temperature",
        mode=2,
        region="25,62,180,250",
        warm="30,45,180,215",
        cool="30,60,220,245",
        base="1950-2004",
        reference="Di Lorenzo et al. (2008), https://doi.org/10.1029/2007GL032838",
    ),
}
"""Definitions of `mode_index` by name."""


@checked(SummaryError)
def mode_index(
    tree: xr.DataTree,
    name: Annotated[str, OneOf(tuple(DEFINITIONS))],
    *,
    remove_mean: bool = False,
    base: str | None = None,
    num_draws: Count = 1000,
) -> xr.Dataset:
    """Draws of an index that is a mode of the field in a region.

    In each draw this is the mode of the covariance that its patterns have over the cells of the region, weighted as the
    data were; its series is the same combination of the series of the draw, scaled to mean zero and standard deviation
    one over the base period. Mean, trend and other effects of the cells are taken out, noise too.

    The definition takes the global mean out of the field first. A result knows its own region only: take the global
    mean out of the data before inference, or let ``remove_mean`` take out that of the region's cells, which is another
    thing.

    Parameters
    ----------
    tree
        Result of a Bayesian SVD on cells with latitude and longitude, of at least two modes more than the index needs.
    name
        A key of `DEFINITIONS`.
    remove_mean
        Whether the area-weighted mean over the cells of the region is taken out at each time; frozen ones count as the
        open water that their patterns are of.
    base
        Period such as "1950-1993" in place of that of the definition. Where fewer than 30 times of the data lie in it,
        all times are used.
    num_draws
        Draws that are kept, of all chains together, evenly thinned.

    Returns
    -------
    xr.Dataset
        Over (chain, draw, index, time) ``signal``; over (index, cell) ``pattern``, the posterior mean of what one unit
        of the index adds to the field, with ``lat`` and ``lon``. Over index: ``pattern_agreement``, the mean
        correlation of the patterns of the draws with their mean pattern, and ``variance_share``, the posterior mean of
        the share of the variance of the signal that the mode has in the region; ``base_times``.

    Raises
    ------
    SummaryError
        If cells lack positions or dates, none lie in the region or in the boxes that give the sign, or there are too
        few modes.
    DataError
        If the period cannot be read.
    """
    definition = DEFINITIONS[name]
    draws, constant = read_draws(tree), tree["constant_data"].to_dataset()
    where = mode_region(constant, draws.d.shape[1], name, base)
    inside, ends, in_base = where.cells, where.ends, where.in_base
    chosen, chains = thinned(draws, num_draws)
    weight = draws.weight[inside]
    turn, share = np.empty((len(chosen), draws.d.shape[1])), np.empty(len(chosen))
    patterns = np.empty((len(chosen), len(inside)))
    for part in blocks(len(chosen), len(inside), draws.d.shape[1]):
        found = draws.patterns(inside, chosen[part])  # (draw, cell, mode)
        if remove_mean:
            found = found - (weight @ found)[:, None, :] / weight.sum()
        values, vectors = np.linalg.eigh(np.einsum("sci,c,scj->sij", found, weight, found))
        one = vectors[:, :, -definition.mode]
        pattern = np.einsum("sci,si->sc", found, one)
        sign = np.sign(pattern[:, ends[0]].mean(1) - pattern[:, ends[1]].mean(1))[:, None]
        turn[part], patterns[part] = sign * one, sign * pattern
        share[part] = values[:, -definition.mode] / values.sum(1)
    series = _combined(draws, chosen, turn)
    centre, spread = series[:, in_base].mean(1), series[:, in_base].std(1, ddof=1)
    series = (series - centre[:, None]) / spread[:, None]
    patterns *= spread[:, None]
    out = _labelled({"signal": series[:, None]}, chains, [name], constant)
    out["signal"].attrs = {"long_name": definition.label, "units": "1"}
    out["pattern"] = ("index", "cell"), patterns.mean(0)[None]
    out["pattern"].attrs["units"] = str(constant["data"].attrs.get("units", "1"))
    lat, lon = cell_positions(constant)
    out = out.assign_coords(lat=("cell", lat[inside]), lon=("cell", lon[inside]))
    out["pattern_agreement"] = "index", [_agreement(patterns, weight)]
    out["variance_share"] = "index", [share.mean()]
    out["base_times"] = "index", [int(in_base.sum())]
    frozen = frozen_cells(constant)[inside].mean(1) @ weight / weight.sum()
    out.attrs = {"base_period": where.base_label, "mean_removed": int(remove_mean), "ice_share": float(frozen)}
    out.attrs["references"] = definition.reference
    return out


@dataclass(frozen=True)
class ModeRegion:
    """Where and when an index is defined, of the cells and times of a result.

    Attributes
    ----------
    cells
        Places of the cells of the region.
    ends
        Which of these are in the warm and in the cool box.
    in_base
        Which times are of the base period (time,).
    base_label
        What that period is called.
    """

    cells: np.ndarray
    ends: list[np.ndarray]
    in_base: np.ndarray
    base_label: str


def mode_region(constant: xr.Dataset, num_modes: int, name: str, base: str | None) -> ModeRegion:
    """Cells and times of an index; check that it can be computed.

    Parameters
    ----------
    constant
        Group ``constant_data`` of a result.
    num_modes
        Modes of the result.
    name, base
        As for `mode_index`.

    Raises
    ------
    SummaryError, DataError
        As of `mode_index`.
    """
    definition = DEFINITIONS[name]
    lat, lon = cell_positions(constant)
    inside = np.flatnonzero(_within(lat, lon, parse_region(definition.region)))
    if not len(inside):
        raise SummaryError(f"no cell lies in the region of {name}, {parse_region(definition.region).bounds}")
    if num_modes < definition.mode + 2:
        raise SummaryError(
            f"{name} is mode {definition.mode} of its region; {num_modes} modes of the field are too few to "
            f"tell: infer at least {definition.mode + 2} (--rank)"
        )
    ends = [_within(lat[inside], lon[inside], parse_region(box)) for box in (definition.warm, definition.cool)]
    if not all(end.any() for end in ends):
        raise SummaryError(
            f"the sign of {name} is that of {parse_region(definition.warm).bounds} against "
            f"{parse_region(definition.cool).bounds}, where the field has no cells"
        )
    return ModeRegion(inside, ends, *_base_times(constant, definition.base if base is None else base))


def _within(lat: np.ndarray, lon: np.ndarray, region: Region) -> np.ndarray:
    """Which cells have their centre in a region."""
    inside = np.zeros(len(lat), dtype=bool)
    inside[select_latitudes(lat, region)] = True
    return inside & ((lon - region.west + 1e-4) % 360 <= region.width + 2e-4)


def _base_times(constant: xr.Dataset, base: str) -> tuple[np.ndarray, str]:
    """Which times lie in a period, and what it is; all where few do."""
    time = constant["time"].values if "time" in constant.coords else np.zeros(0)
    if not np.issubdtype(time.dtype, np.datetime64):
        raise SummaryError("the result has no dates, which the base period of an index needs")
    period = parse_period(base, name="base")
    inside = period.covers(month_number(time))
    if inside.sum() < _LEAST:
        return np.ones(len(time), dtype=bool), f"all times, since {inside.sum()} of them lie in {period.label}"
    return inside, period.label


def _combined(draws: Draws, chosen: np.ndarray, turn: np.ndarray) -> np.ndarray:
    """Series of the draws in a combination (draw, mode) of their own: (draw, time)."""
    size = len(draws.time if draws.basis_time is None else draws.basis_time)
    out = np.empty((len(chosen), size))
    for times in blocks(size, *turn.shape):
        out[:, times] = np.einsum("stk,sk->st", draws.series(times, chosen), turn)
    return out


def _agreement(patterns: np.ndarray, weight: np.ndarray) -> float:
    """Mean correlation, about zero, of patterns (draw, cell) with their mean."""
    root = np.sqrt(weight)
    unit = patterns * root / np.linalg.norm(patterns * root, axis=1, keepdims=True)
    mean = unit.mean(0)
    return float((unit @ mean).mean() / max(np.linalg.norm(mean), 1e-300))


def _labelled(values: dict[str, np.ndarray], chains: int, names: list[str], constant: xr.Dataset) -> xr.Dataset:
    """Draws (draw of all chains, index, time) with their labels."""
    time = constant["time"]
    return xr.Dataset(
        {key: (("chain", "draw", "index", "time"), x.reshape(chains, -1, *x.shape[1:])) for key, x in values.items()},
        coords={"index": names, "time": ("time", time.values, time.attrs)},
    )


# -- published series -------------------------------------------------------------------------------------------------


@checked(SummaryError)
def published_index(
    tree: xr.DataTree, series: xr.DataArray, *, fitted: str, num_draws: Count = 1000, seed: Seed = 0
) -> xr.Dataset:
    """What a published index is in terms of the modes of this field, and a prediction of it at all times.

    In each draw the published values of the period ``fitted`` are regressed on the series of all modes, with flat
    priors of the coefficients and of the log of the scale, and residuals that are a first-order autoregressive process
    whose decay is uniform on a grid; all are drawn from their posterior. Values outside of the period are not used.

    Parameters
    ----------
    tree
        Result of a Bayesian SVD with dates.
    series
        Over time, from `probmodels.bayesian_svd.indices.series.load_series`, of the step of the field.
    fitted
        Period whose values are used, such as "1950-1993".
    num_draws
        Draws that are kept, of all chains together, evenly thinned.
    seed
        Seed of coefficients and residuals.

    Returns
    -------
    xr.Dataset
        Over (chain, draw, index, time): ``signal``, what the modes say, and ``published``, with a residual as other
        values of the published series have, also at times at which these are known. Over (chain, draw, index):
        ``residual_sd`` and ``residual_autocorrelation``. Over index: ``variance_told``, the share of the variance of
        the published values used that their residual does not have, at least 0; ``correlation_elsewhere`` of the mean
        signal with the published values that were not used, and ``held_elsewhere``, the share of these that lie in the
        95 % interval of ``published``; NaN where there are none.

    Raises
    ------
    DataError
        If the period or the dates cannot be used, or the period holds too few values.
    """
    draws, constant = read_draws(tree), tree["constant_data"].to_dataset()
    num_modes = draws.d.shape[1]
    target, use = published_values(constant, num_modes, series, fitted)
    steps, _ = time_steps(constant["time"].values, "the field")
    rng = np.random.default_rng(seed)
    chosen, chains = thinned(draws, num_draws)
    gaps = np.diff(steps[use]).astype(float)
    signal, shown = np.empty((2, len(chosen), len(target)))
    spread, decay = np.empty((2, len(chosen)))
    for part in blocks(len(chosen), len(target), num_modes):
        for place, modes in zip(np.arange(len(chosen))[part], draws.series(draws=chosen[part]), strict=True):
            columns = np.concatenate([np.ones((len(modes), 1)), modes], axis=1)
            found, scale, decay[place] = _regressed(columns[use], target[use], gaps, rng)
            signal[place] = columns @ found
            spread[place] = scale
            shown[place] = signal[place] + scale * _autoregressive(decay[place], np.diff(steps), rng)
    name = f"published {series.name}"
    values = {"signal": signal[:, None], "published": shown[:, None]}
    out = _labelled(values, chains, [name], constant)
    out["signal"].attrs = {"long_name": f"{series.name} in terms of the modes of the field", "units": "1"}
    out["published"].attrs = {
        "long_name": f"{series.name} in terms of the modes of the field, with its residual",
        "units": "1",
    }
    for key, x in (("residual_sd", spread), ("residual_autocorrelation", decay)):
        out[key] = ("chain", "draw", "index"), x.reshape(chains, -1, 1)
    out["variance_told"] = "index", [max(0.0, 1 - float(np.mean(spread**2)) / float(target[use].var()))]
    other = np.isfinite(target) & ~use
    correlation = held = np.nan
    if other.sum() > 2 and np.ptp(target[other]) > 0:
        correlation = float(np.corrcoef(signal.mean(0)[other], target[other])[0, 1])
        low, high = np.quantile(shown[:, other], [0.025, 0.975], axis=0)
        held = float(np.mean((low <= target[other]) & (target[other] <= high)))
    out["correlation_elsewhere"], out["held_elsewhere"] = ("index", [correlation]), ("index", [held])
    out["num_elsewhere"] = "index", [int(other.sum())]
    out.attrs = {
        "fitted": parse_period(fitted, name="fitted").label,
        "fitted_values": int(use.sum()),
        "series": str(series.name),
    }
    return out


def published_values(
    constant: xr.Dataset, num_modes: int, series: xr.DataArray, fitted: str
) -> tuple[np.ndarray, np.ndarray]:
    """Published values at the times of a result, and which of them are used; check that they are enough.

    Parameters
    ----------
    constant
        Group ``constant_data`` of a result.
    num_modes
        Modes of the result.
    series, fitted
        As for `published_index`.

    Raises
    ------
    DataError
        As of `published_index`.
    """
    if "time" not in constant.coords:
        raise DataError("the result has no dates; a published index cannot be set beside it")
    target = match_series(series, constant["time"])
    period = parse_period(fitted, name="fitted")
    use = period.covers(month_number(constant["time"].values)) & np.isfinite(target)
    if use.any() and np.ptp(target[use]) < 1e-12 * max(1.0, np.abs(target[use]).max()):
        raise DataError(f"{str(series.name)!r} does not vary in {period.label}; take another period")
    if use.sum() < (least := 5 * (num_modes + 2)):
        raise DataError(
            f"{use.sum()} values of {str(series.name)!r} lie in {period.label} and in the field; {num_modes} modes "
            f"need {least} or more: take a longer period, or fewer modes"
        )
    return target, use


def _regressed(
    columns: np.ndarray, target: np.ndarray, gaps: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, float, float]:
    """One draw of coefficients (k,), stationary residual sd and decay of a regression with AR(1) residuals.

    ``gaps`` are the steps between neighbouring times (T - 1,). Coefficients and scale are integrated out of the
    density of the decay, which is drawn on a grid.
    """
    size, count = columns.shape
    fits = []
    for decay in _DECAYS:
        carry = decay**gaps
        root = np.sqrt(1 - carry**2)

        def white(x: np.ndarray, carry: np.ndarray = carry, root: np.ndarray = root) -> np.ndarray:
            shape = (-1,) + (1,) * (x.ndim - 1)
            return np.concatenate([x[:1], (x[1:] - carry.reshape(shape) * x[:-1]) / root.reshape(shape)])

        q, r = np.linalg.qr(white(columns))
        y = white(target)
        along = q.T @ y
        square = float(y @ y - along @ along)
        log_density = -np.log(root).sum() - np.log(np.abs(np.diag(r))).sum() - 0.5 * (size - count) * np.log(square)
        fits.append((log_density, r, along, square))
    log_density = np.array([fit[0] for fit in fits]) + np.log(cell_widths(_DECAYS))
    weights = np.exp(log_density - log_density.max())
    place = rng.choice(len(fits), p=weights / weights.sum())
    _, r, along, square = fits[place]
    scale = float(np.sqrt(square / rng.chisquare(size - count)))
    return np.linalg.solve(r, along + scale * rng.standard_normal(count)), scale, float(_DECAYS[place])


def _autoregressive(decay: float, gaps: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A series of unit variance, (T,)."""
    out = rng.standard_normal(len(gaps) + 1)
    carry = decay ** gaps.astype(float)
    root = np.sqrt(1 - carry**2)
    for t in range(1, len(out)):
        out[t] = carry[t - 1] * out[t - 1] + root[t - 1] * out[t]
    return out
