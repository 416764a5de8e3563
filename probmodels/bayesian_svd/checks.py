"""Whether the model of a Bayesian SVD fits its data: residuals that are not white, cells that vary otherwise, grids.

The model takes what no mode holds for noise: white, that is independent between cells and times and of one level, or
correlated, of a covariance that was estimated beforehand. Where the noise is more alike between cells or times, the
data hold less information than the model believes, and intervals are too narrow. Residuals are judged in coordinates
where the noise that was assumed is white.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import xarray as xr
from scipy.special import chdtrc

from probmodels.bayesian_svd.checking.halves import compare_halves
from probmodels.bayesian_svd.checking.times import Cycle, calendar_cycle, largest_jump, regular_cycle
from probmodels.bayesian_svd.draws import Draws, read_draws
from probmodels.bayesian_svd.effects import time_in_years
from probmodels.bayesian_svd.eof import eof_baseline, make_anomalies
from probmodels.bayesian_svd.forecasts.states import innovations, whiteness
from probmodels.bayesian_svd.noise import MOST_CELLS
from probmodels.bayesian_svd.patterns.number import check_number
from probmodels.bayesian_svd.summary import residual_checks
from probmodels.distributions.processes import PROCESSES
from probmodels.inference.diagnostics.findings import Finding
from probmodels.inference.labels import ResultLike, group_of

__all__ = ["NoiseInWords", "check_model", "drift", "misfit", "noise_in_words"]

_NARROW = "intervals are too narrow"

_OUTSIDE, _LAG, _NEIGHBOUR = 0.10, 0.2, 0.3
_HELD, _LEADING = 0.7, 0.1  # of the leading EOF by modes; its share of variance from which it matters
_SMALL = 0.05  # share of the leading EOF from which a mode is named
_AT_END = 0.1  # share of draws at an end of a grid of length-scales that is worth a word
_HIDDEN = 0.05  # share of the variance of a leading pattern of the data that the basis may leave out
_SAME, _FEWEST = 0.005, 20  # p-value of the halves of a record; steps from which they are compared
_DRIFT = 1.5  # variance of one third of the record over that of another
_INNOVATIONS, _LAGS = 100, 5  # draws and lags of the check of the process of series
_REMEMBERED, _SURPRISE = 0.15, 1e-3  # correlation of innovations that matters, and p-value that chance hardly gives
_JUMP = 1e-5  # p-value of the largest innovation
_SINGLE, _CHANCE = 6.0, 1e-6  # mean square of the residuals of one time over the usual one, and its p-value
_CYCLE = 0.005  # p-value of a cycle
_SIDES = {"space": "length_scales_space", "time": "length_scales_time"}


def check_model(result: ResultLike) -> Iterator[Finding]:
    """Findings on the fit of the model: variance by cell, residuals of neighbouring times and cells, length-scales.

    Limits leave room for three standard errors of a share or correlation of data that are of the model. They cannot
    see dependence over longer distances or lags. A drift of the noise over the record is said, and fails nothing.
    """
    tree = result.tree
    checks = residual_checks(tree)
    found = misfit(checks)
    constant = group_of(tree, "constant_data")
    cells, times = (constant.sizes[dim] for dim in ("cell", "time"))
    noise = noise_in_words(constant)
    limit = _OUTSIDE + 3 * math.sqrt(0.05 * 0.95 / cells)
    verdict = f"at {found['outside']:.0%} of the cells the variance is outside the central 95 % that the model expects "
    verdict += f"(at most {limit:.0%})"
    yield _finding(found["outside"], limit, verdict, f"{noise.levels}; where there is more, {_NARROW}; {noise.instead}")
    error = 3 * 1.25 / math.sqrt(cells * times)  # of the median of a correlation
    for name, limit, near in (("lag", _LAG, "times"), ("neighbour", _NEIGHBOUR, "cells")):
        if name in found:
            limit += error
            verdict = f"residuals of neighbouring {near} have a median correlation of {found[name]:.2f}{noise.beyond} "
            verdict += f"(at most {limit:.2f})"
            advice = f"{getattr(noise, near)}, so that {_NARROW}: read them as lower bounds; {noise.instead}"
            yield _finding(found[name], limit, verdict, advice)
    yield from _drifts(checks["residual_variance"].values)
    yield from _single_times(checks["residual_variance"].values, cells, constant["time"])
    yield from _ends(tree)
    yield from _process(tree)
    yield from _halves(tree)
    yield from _lost(tree)
    yield from _hidden(group_of(tree, "constant_data"))
    yield from check_number(tree)


class NoiseInWords(NamedTuple):
    """What a model says of its noise, and what to do where that is not so.

    Of the ``levels`` of cells, and of neighbouring ``cells`` and ``times``; ``beyond`` what correlation residuals are
    judged, empty where it is white; what to do ``instead``.
    """

    levels: str
    cells: str
    times: str
    beyond: str
    instead: str


def noise_in_words(constant: xr.Dataset) -> NoiseInWords:
    """What the model of a result says of its noise, given what the result keeps of the data."""
    if "noise_kernel" not in constant.attrs:
        instead = "take noise='correlated' (--noise correlated), which allows for it"
        if "series" not in constant.attrs:
            instead += " where series are a process, series='ar1' (--series ar1)"
        if constant.sizes["cell"] > MOST_CELLS:
            instead = f"take at most {MOST_CELLS:,} cells with noise='correlated' (--noise correlated)"
        return NoiseInWords(
            "the model has noise of one level for all cells",
            "the model takes the noise of cells for independent",
            "the model takes the noise of times for independent",
            "",
            f"{instead}, or more modes",
        )
    decay = float(constant.attrs["noise_decay"])
    masked = "ice" in constant.coords
    frozen = "mostly missing (--min-valid 1)" if masked else "frozen or mostly missing (--ice=-1.79 --min-valid 1)"
    return NoiseInWords(
        "the level of the noise of each cell was estimated beforehand and does not fit all of them",
        "the noise of near cells is more alike than the model has it, whose correlation was estimated beforehand",
        f"the noise persists for longer than the model has it, AR(1) of {decay:.2f} over one step of time",
        " beyond that of the noise in the model",
        f"take more modes (--rank), leave out cells that are {frozen}, or take means over longer times",
    )


def misfit(checks: xr.Dataset) -> dict[str, float]:
    """What `residual_checks` or `summarise_modes` found, in one number each.

    Returns
    -------
    dict
        ``outside``, share of cells whose predictive p-value is outside 95 %; ``lag`` and, where cells have positions,
        ``neighbour``, the median correlation of the residuals of neighbouring times and cells.
    """
    p = checks["predictive_p_value"]
    found = {"outside": float(((p < 0.025) | (p > 0.975)).sum() / p.notnull().sum())}
    for key, name in (("lag", "residual_autocorrelation"), ("neighbour", "residual_neighbour_correlation")):
        if name in checks:
            found[key] = float(checks[name].median())
    return found


def drift(variance: np.ndarray) -> tuple[float, float]:
    """Whether a mean square of residuals drifts over the record, from its thirds.

    Parameters
    ----------
    variance
        Mean square of the residuals at each time (T,).

    Returns
    -------
    tuple
        Log ratio of the two thirds that differ most, the later over the earlier, and its standard error. That comes
        from the scatter of times within thirds and their lag-1 correlation, so that it allows for residuals of one time
        that are correlated between cells.
    """
    thirds = np.array_split(variance, 3)
    means = np.array([part.mean() for part in thirds])
    rest = np.concatenate([part - mean for part, mean in zip(thirds, means, strict=True)])
    square = float(rest @ rest)
    lag = max(0.0, float(rest[1:] @ rest[:-1]) / square) if square > 0 else 0.0
    spread = square / max(len(rest) - 3, 1) * (1 + lag) / max(1 - lag, 0.05)
    logs = np.log(np.maximum(means, 1e-300))
    errors = spread / np.array([len(part) for part in thirds]) / np.maximum(means, 1e-300) ** 2
    high, low = int(logs.argmax()), int(logs.argmin())
    ratio = float(logs[high] - logs[low]) * (1.0 if high > low else -1.0)
    return ratio, math.sqrt(float(errors[high] + errors[low]))


def _drifts(variance: np.ndarray) -> Iterator[Finding]:
    """A drift of the level of the noise, by more than its sampling error allows and enough to matter."""
    ratio, error = drift(variance)
    if abs(ratio) > math.log(_DRIFT) and abs(ratio) > 4 * error:
        one, other = ("a later", "an earlier") if ratio > 0 else ("an earlier", "a later")
        verdict = (
            f"the variance of residuals is {math.exp(abs(ratio)):.1f} times as large in {one} third of the record as "
        )
        verdict += f"in {other} one (more than {_DRIFT} is said)"
        advice = "the model has one level of noise for all times: intervals are too narrow where it is larger; "
        yield Finding(False, verdict, advice + "take a shorter period", part="model")


def _halves(tree: xr.DataTree) -> Iterator[Finding]:
    """Whether modes of the population change from one half of the record to the other."""
    posterior = group_of(tree, "posterior")
    if "F" not in posterior or "autocorrelation" not in posterior:
        return
    draws = read_draws(tree, "population")
    if draws.steps is None or len(draws.steps) < _FEWEST:
        return
    few = draws.thinned(100)
    found = compare_halves(draws.processes(few), draws.process, draws.scale[few], draws.steps)
    # Under correlated noise the modes that are reported are mixtures of what is compared here.
    one, two = ("mode", "modes") if draws.turn is None else ("process", "processes")
    what = f"the variance of {one} {found.first + 1}"
    if found.first != found.second:
        what = f"the correlation of {two} {found.first + 1} and {found.second + 1}"
    verdict = f"from one half of the record to the other {what} changes most, by what its process gives with "
    verdict += f"probability {found.p_value:.3f} (at least {_SAME})"
    advice = (
        "the modes are not those of one population: analyse the halves apart, or add an effect that holds the change"
    )
    yield Finding(found.p_value < _SAME, verdict, advice if found.p_value < _SAME else "", part="model")


def _finding(value: float, limit: float, verdict: str, advice: str) -> Finding:
    bad = not value <= limit
    return Finding(bad, verdict, advice if bad else "", part="model")


def _ends(tree: xr.DataTree) -> Iterator[Finding]:
    """Length-scales of which draws pile up at an end of their grid."""
    posterior, constant = group_of(tree, "posterior"), group_of(tree, "constant_data")
    for side, option in _SIDES.items():
        name = f"length_scale_{side}"
        if name not in posterior or option not in constant:
            continue
        grid = np.unique(constant[option].values)
        grid = grid[grid > 0]
        if len(grid) < 2:
            continue
        draws = posterior[name].transpose(..., "mode").values.reshape(-1, posterior.sizes["mode"])
        for end, value in (("last", grid[-1]), ("first", grid[0])):
            share = np.isclose(draws, value).mean(0)
            if share.max() > _AT_END:
                mode = int(share.argmax())
                verdict = (
                    f"{share[mode]:.0%} of the draws of {name} of mode {mode + 1} are at the {end} point of its grid"
                )
                verdict += f", {value:.4g} (at most {_AT_END:.0%})"
                advice = f"give a wider grid, {option}=[...], or a prior, length_prior_{side}"
                if side == "time" and end == "first":
                    advice = (
                        "the series hardly remember the step before: series='ar1' or 'iid' say the same more simply"
                    )
                yield Finding(False, verdict, advice, part="model")


def _process(tree: xr.DataTree) -> Iterator[Finding]:
    """Whether what is new in the series, given their past, is white noise, as their process has it.

    Series that remember more than a Matérn process or white noise says hold fewer independent values than the model
    believes. An autoregression that is too rough for its series is on the safe side, and is said alone.
    """
    posterior = group_of(tree, "posterior")
    if "F" not in posterior or "autocorrelation" not in posterior:
        return
    draws = read_draws(tree, "population")
    if draws.steps is None:
        return
    chosen = draws.thinned(_INNOVATIONS)
    new = innovations(draws.process, draws.scale[chosen], draws.processes(chosen), draws.steps)
    yield from _jumps(new, draws, group_of(tree, "constant_data")["time"])
    correlations, p = whiteness(new, _LAGS)
    largest = np.abs(correlations).max(0)  # of each process
    bad = (largest > _REMEMBERED) & (p < _SURPRISE)
    white = not draws.scale.any()
    name = "white noise" if white else f"{PROCESSES[draws.process]} processes"
    if draws.process == "ar1" and not white and not bad.any():
        return
    process = int(np.where(bad, largest, 0.0).argmax()) if bad.any() else int(largest.argmax())
    lag = int(np.abs(correlations[:, process]).argmax())
    verdict = (
        f"what is new in series {process + 1} given its past has a correlation of {correlations[lag, process]:.2f} "
        f"over {lag + 1} step{'s' * (lag > 0)}, p = {p[process]:.2g} (no white noise if beyond {_REMEMBERED} and below "
        f"{_SURPRISE})"
    )
    advice = f"the series do not go on as {name} do, so that intervals are too narrow or too wide; compare series='ar1'"
    advice += ", 'matern32' and 'matern52'"
    harmful = bool(bad.any()) and (white or draws.process != "ar1")
    yield Finding(harmful, verdict, advice if bad.any() else "", part="model")


def _single_times(values: np.ndarray, cells: int, times: xr.DataArray) -> Iterator[Finding]:
    """A time at which residuals are larger by far than at others: an error of the data, or an event of its own kind."""
    usual = float(np.median(values))
    time = int(values.argmax())
    ratio = float(values[time]) / usual if usual > 0 else 1.0
    # Of residuals that are independent between cells; correlated ones scatter more, for which the ratio leaves room.
    p = len(values) * float(chdtrc(cells, cells * ratio))
    if ratio > _SINGLE and p < _CHANCE:
        verdict = f"residuals at {_name(times, time)} vary {ratio:.0f} times as much as at other times "
        advice = "one time can draw the modes to itself: look at its data, and leave it out if they are wrong"
        yield Finding(True, f"{verdict}(at most {_SINGLE:g} times)", advice, part="model")


def _jumps(new: np.ndarray, draws: Draws, times: xr.DataArray) -> Iterator[Finding]:
    """Single times and cycles that the processes of the series do not give."""
    one = "series" if draws.turn is None else "process"
    jump = largest_jump(new)
    if jump.p_value < _JUMP:
        verdict = f"{one} {jump.process + 1} jumps by {abs(jump.size):.1f} standard deviations at "
        verdict += f"{_name(times, jump.time)}, p = {jump.p_value:.1g} (at least {_JUMP:g})"
        advice = "one time can draw the modes to itself: look at its data, and leave it out if they are wrong"
        yield Finding(True, verdict, advice, part="model")
    cycle = _cycle(new, draws, times)
    if cycle is not None and cycle.p_value < _CYCLE:
        verdict = (
            f"{cycle.share:.0%} of what is new in {one} {cycle.process + 1} is a cycle of {cycle.period:.3g} steps, "
        )
        verdict += f"p = {cycle.p_value:.1g} (at least {_CYCLE:g})"
        advice = (
            "a cycle that was left in is taken for internal variability: take anomalies from a climatology, or the "
        )
        yield Finding(True, verdict, advice + "effects 'annual' and 'semiannual'", part="model")


def _cycle(new: np.ndarray, draws: Draws, times: xr.DataArray) -> Cycle | None:
    """The cycle of the year where times are dates; else of any period, where they are regular."""
    if "member" in times.coords:
        return None
    if np.issubdtype(times.dtype, np.datetime64):
        return calendar_cycle(new, time_in_years(times))
    assert draws.steps is not None
    return regular_cycle(new) if np.ptp(draws.steps) < 1e-6 else None


def _name(times: xr.DataArray, place: int) -> str:
    """A time in words."""
    value = times.values[place]
    if np.issubdtype(times.dtype, np.datetime64):
        return str(value.astype("datetime64[D]"))
    return f"time {value}"


def _hidden(constant: xr.Dataset) -> Iterator[Finding]:
    """Leading patterns of the data that the basis in space does not show."""
    if "hidden" not in constant:
        return
    hidden = constant["hidden"].values
    mode = int(hidden.argmax())
    verdict = (
        f"{hidden[mode]:.0%} of the variance of leading pattern {mode + 1} of the data is of a scale that the basis "
    )
    verdict += f"in space does not show (at most {_HIDDEN:.0%})"
    advice = "it counts as noise: give more functions, model.max_basis, or every direction, --tail 0"
    yield _finding(float(hidden[mode]), _HIDDEN, verdict, advice)


def _by_mode(shares: np.ndarray) -> str:
    """Which mode holds how much of the leading EOF, largest first, small shares together."""
    order = [int(i) for i in np.argsort(-shares) if shares[i] >= _SMALL] or [int(np.argmax(shares))]
    words = [f"mode {i + 1} {shares[i]:.0%}" for i in order]
    if len(order) < len(shares):
        words.append(f"the other{'s' * (len(shares) - len(order) > 1)} {shares.sum() - shares[order].sum():.0%}")
    return ", ".join(words)


def _lost(tree: xr.DataTree) -> Iterator[Finding]:
    """Whether correlated noise took the place of the leading EOF, which modes then do not hold."""
    constant = group_of(tree, "constant_data")
    if "noise_level" not in constant:
        return
    draws, anomalies = read_draws(tree, "times"), make_anomalies(constant)
    leading = eof_baseline(anomalies, 1)
    pattern = np.sqrt(anomalies.weight) * leading["eof"].values[0]
    pattern /= np.linalg.norm(pattern)
    weighted = draws.patterns(draws=draws.thinned(50)) * np.sqrt(draws.weight)[None, :, None]
    basis = np.linalg.qr(weighted)[0]  # (draw, cell, mode)
    each = np.mean(np.einsum("n,snk->sk", pattern, basis) ** 2, axis=0)  # modes are orthogonal by area
    held = float(each.sum())
    share = float(leading["eof_fraction"][0])
    bad = held < _HELD and share > _LEADING
    verdict = (
        f"modes hold {held:.0%} of the leading EOF (at least {_HELD:.0%}), which explains {share:.0%} of the variance: "
        f"{_by_mode(each)}"
    )
    advice = "the model takes it for noise: mask sea ice (--ice=-1.79), leave out cells that are frozen at times "
    advice += "(--min-valid 1), or take noise='white' (--noise white)"
    yield Finding(bad, verdict, advice if bad else "", part="model")
