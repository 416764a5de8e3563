"""Forecasts from the posterior of a Bayesian SVD: series beyond the record, the field, and indices of it.

A draw of the forecast goes on from the last state of the series of a draw of the posterior; the field is the effects of
that draw continued, plus its patterns times the series, plus noise. Uncertainty of patterns, effects, decays and noise
is thus part of every interval.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import xarray as xr
from annotated_types import Interval, Len
from numpy.typing import ArrayLike, NDArray

from probmodels.bayesian_svd.forecasts.coupled import draw_coupled, follow_coupled
from probmodels.bayesian_svd.forecasts.new_fields import check_regular, later_times, new_matrix, positions
from probmodels.bayesian_svd.forecasts.predictive import add_field, add_summary, index_draws, noise_ahead
from probmodels.bayesian_svd.forecasts.projection import NewMonths, Record, read_record, series_of
from probmodels.bayesian_svd.forecasts.residuals import check_residuals, residuals_ahead
from probmodels.bayesian_svd.forecasts.tables import described
from probmodels.bayesian_svd.forecasts.transitions import draw_lags, follow, follow_lags
from probmodels.bayesian_svd.forecasts.weights import index_weights
from probmodels.bayesian_svd.grids import to_grid
from probmodels.distributions.processes import explained_at
from probmodels.errors import DataError, SummaryError
from probmodels.inference.result import Result
from probmodels.options import Count, Fraction, Seed, checked, refuse_unused

__all__ = ["QUANTILES", "forecast"]

Array = NDArray[np.float64]

QUANTILES = (0.025, 0.1, 0.25, 0.5, 0.75, 0.9, 0.975)
LAGS = (1, 2, 3, 6, 12)
_TOLD = 0.01  # share of the variance of a series that its last state has to explain
_TREND = 0.5  # of the length of the record: how far a trend is continued


@checked(SummaryError)
def forecast(
    result: Result | xr.DataTree,
    steps: Annotated[int, Interval(ge=1, le=10_000)],
    *,
    new: xr.DataArray | None = None,
    covariates: Mapping[str, ArrayLike] | None = None,
    indices: Mapping[str, ArrayLike] | None = None,
    transition: Literal["ar1", "lags", "coupled"] = "ar1",
    lags: Annotated[Sequence[Annotated[int, Interval(ge=1, le=120)]], Len(1)] = LAGS,
    residuals: Literal["noise", "persistent"] = "noise",
    field: bool = True,
    quantiles: Annotated[Sequence[Fraction], Len(1)] = QUANTILES,
    num_draws: Count = 1000,
    keep_draws: bool = False,
    beyond: bool = False,
    judge: bool = True,
    seed: Seed = 0,
) -> xr.Dataset:
    """Forecast of series, field and indices beyond the record.

    Parameters
    ----------
    result
        Of a Bayesian SVD whose series are a process in time; with ``series="iid"`` the forecast is the climatology with
        its effects.
    steps
        Number of steps of the record to forecast.
    new
        Months after the record, as for `probmodels.bayesian_svd.project`; the forecast starts after the last.
    covariates
        Values of the covariates of the fit at the times between the record and the end of the forecast, one each.
    indices
        Weights over the cells of the fit, or over cells and steps, by the name of the index, which is the weighted sum
        of the field; see `probmodels.bayesian_svd.box_weights`.
    transition
        ``"ar1"``: the process of the model, AR(1) or Matérn. ``"lags"``: an autoregression of each series on several
        lags, estimated from its draws with a prior about an AR(1) process; for monthly records whose modes remember
        longer.
        ``"coupled"``: the same, in which each series also goes on from the last values of all others.
    lags
        Lags of these autoregressions, 1 among them.
    residuals
        What is added to effects and modes. ``"noise"``: the noise of the model. ``"persistent"``, where that is white:
        what effects and modes leave of the record goes on, with its persistence and its correlation between cells; for
        few modes, which leave much of the mean of a box.
    field
        Whether to forecast the field.
    quantiles
        Probabilities of the quantiles.
    num_draws
        Draws that are used, evenly thinned within chains.
    keep_draws
        Whether to return the draws too: of the field, draws × steps × cells numbers.
    beyond
        Whether to forecast further than the process says anything, or than half the record where it has a trend.
    judge
        Whether to diagnose the posterior, so that ``verdict`` says whether it can be trusted.
    seed
        Seed of the draws.

    Returns
    -------
    xr.Dataset
        ``pc_mean``, ``pc_sd`` (mode, time) and ``pc_quantile`` (quantile, mode, time); likewise ``field_*`` over
        (time, lat, lon), or (time, cell) for cells without a grid, of the field as it will be observed, noise included;
        and ``index_*`` (index, time). With ``keep_draws`` also ``pc``, ``field``,
        ``index_draws`` (chain, draw, ...).
        ``told`` (time), the largest share of the variance of a series that its last state explains under the
        process of the model. Coordinate ``lead`` counts steps. Attributes ``verdict`` and ``notes``.

    Raises
    ------
    SummaryError
        If series are no process, times irregular, an option out of range or not used, or the horizon too far.
    DataError
        If the new field does not fit, or weights or covariates are of the wrong length.
    """
    if transition == "ar1":
        refuse_unused(forecast, "transition='ar1'", lags=lags)
    elif 1 not in lags or len(set(lags)) < len(lags):
        raise SummaryError(f"lags={list(lags)}; give different whole numbers, 1 among them")
    tree = result if isinstance(result, xr.DataTree) else result.tree
    record = read_record(tree, num_draws)
    weights = index_weights(indices or {}, record, steps)
    rng = np.random.default_rng(seed)
    matrix, gone = _new_months(record, new)
    told = _check_horizon(record, gone, steps, beyond)
    if transition != "ar1":
        _check_lags(record, transition, lags)
    if residuals == "persistent":
        check_residuals(record)
    at = later_times(record.time, gone + steps)[gone:]
    starts, ends = _split(covariates, gone, steps)
    draws = record.at(at, ends)
    state = _state(record, matrix, starts, rng)  # all that can be refused has been
    series = record.modes(_continued(rng, record, state, steps, transition, lags))
    noise = None
    if field or weights:
        ahead = residuals_ahead if residuals == "persistent" else noise_ahead
        noise = ahead(rng, record, state.new, steps)
    out = xr.Dataset(
        coords={
            "time": ("time", at.values, dict(record.time.attrs)),
            "lead": ("time", np.arange(1, steps + 1, dtype=np.int32)),
            "mode": np.arange(1, series.shape[2] + 1, dtype=np.int32),
            "quantile": np.asarray(quantiles, dtype=float),
        }
    )
    add_summary(out, "pc", series.transpose(0, 2, 1), ("mode", "time"), record, keep_draws)
    if weights:
        out = out.assign_coords(index=list(weights))
        values = index_draws(rng, draws, record, weights, series, noise)
        add_summary(out, "index", values, ("index", "time"), record, keep_draws)
    if field:
        add_field(out, rng, draws, record, series, noise, keep_draws)
        out = to_grid(out, record.constant)
    out["told"] = "time", told
    out = described(out, record, tree, transition, lags, judge=judge, seed=seed)
    return out.assign_attrs(residuals=residuals)


def _new_months(record: Record, new: xr.DataArray | None) -> tuple[xr.DataArray | None, int]:
    """New months as (cell, time), and the steps from the end of the record to the last of them."""
    own, _ = positions(record.time, record.time)
    check_regular(own, own)
    if new is None:
        return None, 0
    matrix = new_matrix(new, record.constant)
    _, after = positions(record.time, matrix["time"])
    check_regular(own, after)
    if after[0] <= 0:
        raise SummaryError(
            f"the new field starts at {matrix['time'].values[0]}, not after the record, which ends at "
            f"{record.time.values[-1]}; give the months that follow it"
        )
    return matrix, int(after[-1])


def _split(covariates: Mapping[str, ArrayLike] | None, gone: int, steps: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Values of covariates at the times of new months, and at those of the forecast after them."""
    if not gone:
        return {}, dict(covariates or {})
    known = {name: np.asarray(values) for name, values in (covariates or {}).items()}
    for name, values in known.items():
        if values.shape != (gone + steps,):
            raise DataError(
                f"covariate {name!r} must hold {gone + steps} values, {gone} from the record to the last new month and "
                f"{steps} of the forecast"
            )
    return {name: x[:gone] for name, x in known.items()}, {name: x[gone:] for name, x in known.items()}


@dataclass(frozen=True)
class _State:
    """Processes (draw, time, process) up to where the forecast starts, and what new months say."""

    series: Array
    new: NewMonths | None


def _state(
    record: Record, matrix: xr.DataArray | None, covariates: Mapping[str, ArrayLike], rng: np.random.Generator
) -> _State:
    series = record.processes()
    if matrix is None:
        return _State(series, None)
    later = series_of(record, matrix, covariates, rng, filled=True)
    return _State(np.concatenate([series, later.processes], axis=1), later)


def _check_lags(record: Record, transition: str, lags: Sequence[int]) -> None:
    """Check that an autoregression can be estimated from the record."""
    own, _ = positions(record.time, record.time)
    if (np.diff(own) != 1).any():
        raise SummaryError(
            f"transition={transition!r} needs a record without holes between its times; take transition='ar1'"
        )
    if own.size < 4 * max(lags):
        raise SummaryError(
            f"lags up to {max(lags)} need a record of at least {4 * max(lags)} times; this one has {own.size}"
        )
    if not record.decay.any():
        raise SummaryError(
            f"transition={transition!r} needs series='ar1'; those of this result are independent in time"
        )


def _continued(
    rng: np.random.Generator, record: Record, state: _State, steps: int, transition: str, lags: Sequence[int]
) -> Array:
    """Draws of the processes beyond the state (draw, time, process)."""
    if transition == "ar1":
        return follow(rng, record.draws.process, record.scale, *record.last_state(state.series), steps)
    known = state.series[:, : record.time.size]
    if transition == "coupled":
        return follow_coupled(rng, state.series, draw_coupled(rng, known, record.decay, lags), steps)
    coefficients, sd = draw_lags(rng, known, record.decay, lags)
    return follow_lags(rng, state.series, coefficients, sd, lags, steps)


def _check_horizon(record: Record, gone: int, steps: int, beyond: bool) -> Array:
    """Share of variance that the last state explains at each lead; check that the forecast says something."""
    process, scale = record.draws.process, record.scale
    told = np.array([explained_at(process, scale, lead).mean(0).max() for lead in range(1, steps + 1)])
    if beyond:
        return told
    if record.decay.any() and told[-1] < _TOLD:
        most = int((told >= _TOLD).sum())
        raise SummaryError(
            f"steps={steps}: beyond {most} steps the last state explains less than {_TOLD:.0%} of the variance of "
            "every series, so that the forecast is climatology; take "
            + (f"at most {most} steps" if most else "longer records")
            + ", or beyond=True (--beyond)"
        )
    names = [
        str(x) for key in ("effect", "shared_effect") if key in record.constant for x in record.constant[key].values
    ]
    own, _ = positions(record.time, record.time)
    if "trend" in names and gone + steps > (most := int(_TREND * (own[-1] - own[0]))):
        raise SummaryError(
            f"steps={steps}: the trend would be continued for {gone + steps} steps beyond a record of "
            f"{int(own[-1] - own[0])}; take at most {max(most - gone, 0)}, or beyond=True (--beyond)"
        )
    return told
