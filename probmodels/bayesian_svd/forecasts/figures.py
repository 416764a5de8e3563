"""Fan charts of forecasts: what was, and bands of what may come."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import numpy as np
import xarray as xr
from annotated_types import Interval
from matplotlib.figure import Figure

from probmodels._axes import BLUE, GREY, RED, SMALL, clean
from probmodels.bayesian_svd.draws import read_draws
from probmodels.bayesian_svd.figures import _units, time_axis
from probmodels.bayesian_svd.indices.boxes import frozen_cells
from probmodels.errors import SummaryError
from probmodels.inference.result import Result
from probmodels.options import checked

__all__ = ["fan_charts"]

_BANDS = ((0.025, 0.975, 0.15), (0.1, 0.9, 0.3), (0.25, 0.75, 0.5))  # ends, and how dark


@checked(SummaryError)
def fan_charts(
    result: Result | xr.DataTree,
    found: xr.Dataset,
    *,
    indices: Mapping[str, np.ndarray] | None = None,
    history: Annotated[int, Interval(ge=1, le=10_000)] = 60,
) -> Figure:
    """One chart of each series and index: the record's last times, and bands of 50, 80 and 95 % of the forecast.

    Parameters
    ----------
    result
        What the forecast is of.
    found
        From `probmodels.bayesian_svd.forecasts.forecasting.forecast`, with its default quantiles.
    indices
        Weights over cells by name, as they were given to the forecast: the index of the data is drawn where all of its
        cells hold a value.
    history
        Times of the record that are shown.

    Raises
    ------
    SummaryError
        If the forecast lacks the quantiles of a band.
    """
    levels = [*(end for low, high, _ in _BANDS for end in (low, high)), 0.5]
    have = found["quantile"].values
    if lacking := [level for level in levels if not np.isclose(have, level).any()]:
        raise SummaryError(f"the forecast lacks the quantiles {lacking}; leave quantiles at their default")
    tree = result if isinstance(result, xr.DataTree) else result.tree
    charts = _charts(tree, found, indices or {}, history)
    past, ahead = time_axis(tree["constant_data"].to_dataset()["time"])[-history:], time_axis(found["time"])
    figure = Figure(figsize=(8, 1.75 * len(charts) + 0.4), layout="constrained")
    axes = figure.subplots(len(charts), 1, sharex=True, squeeze=False)[:, 0]
    for ax, (title, unit, before, quantile) in zip(axes, charts, strict=True):
        ax.axhline(0, color="0.8", linewidth=0.7, zorder=0)
        ax.plot(past, before, color=GREY, linewidth=1)
        at = {level: quantile.sel(quantile=level, method="nearest").values for level in levels}
        for low, high, dark in _BANDS:
            label = f"{round(100 * (high - low))} %"
            ax.fill_between(ahead, at[low], at[high], color=BLUE, alpha=dark, linewidth=0, label=label)
        ax.plot(ahead, at[0.5], color=BLUE, linewidth=1.2, label="median")
        ax.set_title(title, fontsize=10, loc="left")
        ax.set_ylabel(unit, fontsize=SMALL)
        clean(ax)
    axes[0].legend(fontsize=SMALL, frameon=False, ncols=4, loc="lower right", bbox_to_anchor=(1, 0.98), borderaxespad=0)
    verdict = str(found.attrs.get("verdict"))
    if "FAILED" in verdict or "NOT PASSED" in verdict:
        figure.suptitle(verdict, fontsize=9, color=RED)
    return figure


def _charts(
    tree: xr.DataTree, found: xr.Dataset, indices: Mapping[str, np.ndarray], history: int
) -> list[tuple[str, str, np.ndarray, xr.DataArray]]:
    """Title, unit, values of the record, and quantiles of each series and index."""
    series = read_draws(tree).series(slice(-history, None)).mean(0)
    charts = [
        (f"PC {mode}", "sd", series[:, place], found["pc_quantile"].sel(mode=mode))
        for place, mode in enumerate(found["mode"].values)
    ]
    data = tree["constant_data"].to_dataset()["data"].transpose("cell", "time")
    frozen = frozen_cells(tree["constant_data"].to_dataset()) & (found.attrs.get("ice") == "left_out")
    for name in found["index"].values if "index_mean" in found else ():
        before = np.full(len(series), np.nan)
        if (weights := indices.get(str(name))) is not None:
            before = _past(np.asarray(weights), data.values[:, -history:], frozen[:, -history:])
        charts.append((str(name), _units(data), before, found["index_quantile"].sel(index=name)))
    return charts


def _past(weights: np.ndarray, values: np.ndarray, frozen: np.ndarray) -> np.ndarray:
    """Weighted mean over the cells that are not frozen (time,); NaN where one of these has no value."""
    used = weights != 0
    open_ = np.where(frozen[used], 0.0, weights[used][:, None])
    total = open_.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):  # all of it frozen
        scale = np.where(frozen[used].any(0), weights.sum() / total, 1.0)
    return np.asarray((open_ * np.where(frozen[used], 0.0, values[used])).sum(0) * scale)
