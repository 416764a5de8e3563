"""Figures of modes: maps of patterns, principal components, scree, residuals and agreement of chains."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from probmodels._axes import BLUE, RED, SMALL, clean
from probmodels.bayesian_svd.effects import time_in_years
from probmodels.bayesian_svd.maps import colour_bar, draw_map, grid_of_maps, ice_note, largest, stipple, uncertain_sign
from probmodels.bayesian_svd.patterns.planes import joined_modes, joined_names

__all__ = [
    "eof_difference",
    "leading_modes",
    "local_variance_maps",
    "mode_maps",
    "pcs",
    "plane_maps",
    "residual_maps",
    "rhat_map",
    "scree",
    "trend_map",
]


_WHOSE = {"modes of the population": " of the population", "modes of these times": " of these times"}


def _units(array: xr.DataArray) -> str:
    units = str(array.attrs.get("units", "1"))
    return {"1": "", "degC": "°C", "degree_C": "°C", "celsius": "°C"}.get(units, units)


def _mode_title(modes: xr.Dataset, i: int) -> str:
    mean, low, high = (100 * float(modes[f"explained_variance_fraction_{x}"][i]) for x in ("mean", "lower", "upper"))
    whose = _WHOSE.get(str(modes.attrs.get("estimand")), "")
    number, kind = int(modes["mode"][i]), str(modes.attrs.get("rotation", "")).split(":")[0].capitalize()
    mark = "~" * (number in joined_modes(modes))  # not separated from a neighbour
    return (
        f"{f'{kind} mode' if kind else 'Mode'} {number}{mark}{whose}: {mean:.1f} % of variance [{low:.1f}, {high:.1f}]"
    )


def leading_modes(
    modes: xr.Dataset, comparison: xr.Dataset | None = None, *, most: int = 6, sure: float = 0.95
) -> Figure:
    """The leading modes on one page: map, principal component with its interval, explained variance with its own.

    Dots mark cells whose sign is uncertain: neither positive nor negative with more than the probability ``sure``.

    Parameters
    ----------
    modes
        From `probmodels.bayesian_svd.summary.summarise_modes`.
    comparison
        From `probmodels.bayesian_svd.eof.compare_eof`: the EOFs' shares of variance are drawn too.
    most
        Modes that are shown, the first ones.
    sure
        Probability of the sign above which a cell has no dot.
    """
    count = min(modes.sizes["mode"], most)
    below = 0.3 + ice_note(modes["mode_mean"])
    height = 2.05 * count + 0.3 + below
    figure = Figure(figsize=(11.0, height))
    margins = {"left": 0.05, "right": 0.985, "bottom": below / height, "top": 1 - 0.45 / height}
    grid = figure.add_gridspec(count, 3, width_ratios=[1.2, 1.35, 0.6], hspace=0.3, wspace=0.17, **margins)
    unit = f"{_units(modes['mode_mean'])} per sd of PC".strip()
    level = 100 * float(modes.attrs.get("interval_level", 0.95))
    for i in range(count):
        left, right = figure.add_subplot(grid[i, 0]), figure.add_subplot(grid[i, 1])
        mean = modes["mode_mean"][i]
        bound = largest(mean)
        draw_map(figure, left, mean, unit, cmap="RdBu_r", vmin=-bound, vmax=bound)
        stipple(left, uncertain_sign(modes["prob_positive"][i], sure))
        left.set_title(_mode_title(modes, i).partition(":")[0], fontsize=10, loc="left")
        draw_pc(right, modes, i)
        right.set_title(f"PC {int(modes['mode'][i])} (sd), with its {level:g} % interval", fontsize=10, loc="left")
    _shares(figure.add_subplot(grid[:, 2]), modes, comparison, count)
    return figure


def _shares(ax: Any, modes: xr.Dataset, comparison: xr.Dataset | None, count: int) -> None:
    """Explained variance of the modes beside their rows, with the interval, and that of the EOFs."""
    mean, low, high = (
        100 * modes[f"explained_variance_fraction_{x}"].values[:count] for x in ("mean", "lower", "upper")
    )
    place = np.arange(count)
    error = [(mean - low).clip(0), (high - mean).clip(0)]  # a narrow interval may lie beside the mean
    ax.errorbar(mean, place, xerr=error, fmt="o", color=BLUE, capsize=3, markersize=5, linewidth=1.4)
    top = 1.25 * float(high.max())
    for at, *numbers in zip(place, mean, low, high, strict=True):
        middle = float(np.clip(numbers[0], 0.42 * top, 0.62 * top))
        ax.text(middle, at - 0.09, "{:.1f} % [{:.1f}, {:.1f}]".format(*numbers), ha="center", fontsize=SMALL)
    if comparison is not None:
        share = 100 * comparison["eof_fraction"].values[:count]
        ax.plot(share, place + 0.09, "s", color=RED, markerfacecolor="white", markersize=4, label="EOF")
        ax.legend(fontsize=SMALL, frameon=False, loc="lower right")
    ax.set_ylim(count - 0.5, -0.5)
    ax.set_xlim(0, top)
    ax.set_yticks(place, [str(x) for x in modes["mode"].values[:count]])
    whose = _WHOSE.get(str(modes.attrs.get("estimand")), "")
    ax.set_title(f"share of the variance\n{whose} (%)".replace("\n ", "\n"), fontsize=9, loc="left")
    clean(ax)


def local_variance_maps(local: xr.Dataset, *, level: float = 0.95) -> Figure:
    """Share of the variance of each cell that each mode explains: mean, and lower and upper end of the interval.

    Parameters
    ----------
    local
        From `probmodels.bayesian_svd.patterns.local.local_variance`.
    level
        Probability of the intervals, for the titles.
    """
    count, kinds = local.sizes["mode"], ("mean", "lower", "upper")
    figure, axes = grid_of_maps(local["local_fraction_mean"], count + 1, 3, width=4.7, bars=False)
    whose = _WHOSE.get(str(local.attrs.get("estimand")), "").replace(" of", " of the variance of", 1)
    style: dict[str, Any] = {"cmap": "YlGnBu", "vmin": 0, "vmax": 100, "bar": False}
    for j, kind in enumerate(kinds):
        for i in range(count + 1):
            array = local[f"local_fraction_{kind}"][i] if i < count else local[f"modes_fraction_{kind}"]
            drawn = draw_map(figure, axes[i, j], 100 * array, "%", **style)
            axes[i, j].label_outer()
            name = f"Mode {int(local['mode'][i])}" if i < count else "All modes"
            words = f"share{whose}" if kind == "mean" else f"{kind} end of {100 * level:g} %"
            axes[i, j].set_title(f"{name}: {words}", fontsize=9, loc="left")
    if drawn is not None:  # one bar for all, which have one scale
        axes[0, 0].get_gridspec().update(right=0.92, wspace=0.06, hspace=0.22)
        colour_bar(
            figure.colorbar(drawn, cax=figure.add_axes((0.94, 0.3, 0.012, 0.4))), "% of the variance of the cell"
        )
    return figure


def trend_map(trend: xr.Dataset, *, sure: float = 0.95) -> Figure:
    """Trend of each cell, with dots where its sign is uncertain, and the probability that it is positive.

    Parameters
    ----------
    trend
        From `probmodels.bayesian_svd.patterns.local.trend_maps`.
    sure
        Probability of the sign above which a cell has no dot.
    """
    mean, probability = trend["trend_mean"], trend["trend_prob_positive"]
    figure, axes = grid_of_maps(mean, 1, 2)
    bound = largest(mean)
    unit = _units(mean).replace("degC", "°C").replace("(10 year)-1", "per decade")
    draw_map(figure, axes[0, 0], mean, unit, cmap="RdBu_r", vmin=-bound, vmax=bound)
    stipple(axes[0, 0], uncertain_sign(probability, sure))
    axes[0, 0].set_title(str(mean.attrs["long_name"]), fontsize=10, loc="left")
    steps = [0, 0.025, 0.1, 0.3, 0.7, 0.9, 0.975, 1]
    draw_map(figure, axes[0, 1], probability, "P(trend > 0)", cmap="RdBu_r", norm=BoundaryNorm(steps, 256))
    axes[0, 1].set_title("probability that the trend is positive", fontsize=10, loc="left")
    return figure


def mode_maps(modes: xr.Dataset, *, sure: float = 0.95) -> Figure:
    """Posterior mean and standard deviation of every mode, side by side.

    Dots mark cells whose sign is uncertain: neither positive nor negative with more than the probability ``sure``. A
    mode that is not separated from its neighbour bears a ``~``.

    Parameters
    ----------
    modes
        From `probmodels.bayesian_svd.summary.summarise_modes`: ``mode_mean``, ``mode_sd``, ``prob_positive`` over
        (mode, lat, lon), ``explained_variance_fraction_*`` over mode.
    sure
        Probability of the sign above which a cell has no dot.
    """
    mean, sd = modes["mode_mean"], modes["mode_sd"]
    figure, axes = grid_of_maps(mean, modes.sizes["mode"], 2)
    unit = f"{_units(mean)} per sd of PC".strip()
    for i in range(modes.sizes["mode"]):
        bound = largest(mean[i])
        draw_map(figure, axes[i, 0], mean[i], unit, cmap="RdBu_r", vmin=-bound, vmax=bound)
        stipple(axes[i, 0], uncertain_sign(modes["prob_positive"][i], sure))
        axes[i, 0].set_title(_mode_title(modes, i), fontsize=10, loc="left")
        top = largest(sd[i])
        low = min(float(np.nanquantile(sd[i], 0.01)), top / 2)  # at least a factor of two, or even fields look rough
        draw_map(figure, axes[i, 1], sd[i], unit, cmap="YlGnBu", vmin=low, vmax=top)
        axes[i, 1].set_title("posterior sd", fontsize=10, loc="left")
    return figure


def plane_maps(modes: xr.Dataset) -> Figure:
    """Variance that each plane of modes that are not separated explains at a cell: mean, and width of its interval.

    Raises
    ------
    KeyError
        If the modes have no plane: all neighbours are separated.
    """
    if "plane_variance_mean" not in modes:
        raise KeyError("the modes have no plane: all neighbours are separated")
    mean = modes["plane_variance_mean"]
    width = modes["plane_variance_upper"] - modes["plane_variance_lower"]
    figure, axes = grid_of_maps(mean, modes.sizes["plane"], 2)
    unit = _units(mean).replace("degC2", "°C²")
    level = 100 * float(modes.attrs.get("interval_level", 0.95))
    for i in range(modes.sizes["plane"]):
        share = 100 * float(modes["plane_fraction_mean"][i])
        sure = "well determined" if int(modes["plane_determined"][i]) else "not well determined"
        title = f"{joined_names(modes, i)} together: {share:.1f} % of variance, {sure}"
        for ax, array, words in ((axes[i, 0], mean, title), (axes[i, 1], width, f"width of the {level:g} % interval")):
            draw_map(figure, ax, array[i], unit, cmap="YlGnBu", vmin=0, vmax=largest(mean[i]))
            ax.set_title(words, fontsize=10, loc="left")
    return figure


def time_axis(time: xr.DataArray) -> np.ndarray:
    """Times as matplotlib can draw them: dates as they are, others and those before its first year as decimal years."""
    if time.dtype == object:
        return np.array([t.year + (t.dayofyr - 1) / 365.25 for t in time.values])
    if time.dtype.kind == "M" and (time.values.astype("datetime64[s]") < np.datetime64("0002-01-01")).any():
        return time_in_years(time) + 2000.0
    return time.values


def draw_pc(ax: Any, modes: xr.Dataset, i: int, comparison: xr.Dataset | None = None) -> None:
    """A principal component with its interval, and that of the EOFs; each member of an ensemble on its own."""
    time, level = time_axis(modes["time"]), 100 * float(modes.attrs.get("interval_level", 0.95))
    width = 1.0 if len(time) < 200 else 0.7
    ax.axhline(0, color="0.7", linewidth=0.7, zorder=0)
    starts = [0, *(np.flatnonzero(time[1:] <= time[:-1]) + 1), len(time)]  # where the next member begins
    for first, end in pairwise(starts):
        part, label = slice(first, end), (lambda text: text) if first == 0 else (lambda _: None)
        low, high = modes["pc_lower"][i, part], modes["pc_upper"][i, part]
        ax.fill_between(time[part], low, high, color=BLUE, alpha=0.3, linewidth=0, label=label(f"{level:g} % interval"))
        if comparison is not None:  # beneath the mean, which a dashed line over many months would hide
            eof = comparison["eof_pc"][i, part]
            ax.plot(time[part], eof, color="0.1", linewidth=0.7, linestyle=(0, (3, 2)), label=label("EOF"))
        ax.plot(time[part], modes["pc_mean"][i, part], color=BLUE, linewidth=width, label=label("posterior mean"))
    ax.margins(x=0.01)
    clean(ax)


def pcs(modes: xr.Dataset, comparison: xr.Dataset | None = None) -> Figure:
    """Standardised principal components with their intervals, and those of the EOFs where a comparison is given."""
    count = modes.sizes["mode"]
    figure = Figure(figsize=(10, 1.75 * count + 0.3), layout="constrained")
    axes = figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0]
    for i, ax in enumerate(axes):
        draw_pc(ax, modes, i, comparison)
        ax.set_title(_mode_title(modes, i).replace("Mode ", "PC ").replace(" mode ", " PC "), fontsize=10, loc="left")
        ax.set_ylabel("sd", fontsize=SMALL)
    axes[0].legend(fontsize=SMALL, frameon=False, ncols=3, loc="lower right", bbox_to_anchor=(1, 0.98), borderaxespad=0)
    return figure


def scree(modes: xr.Dataset, comparison: xr.Dataset | None = None) -> Figure:
    """Variance explained by each mode with its interval, beside that of the EOFs with North's sampling error."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    ax = figure.subplots()
    number = modes["mode"].values
    mean, low, high = (100 * modes[f"explained_variance_fraction_{x}"].values for x in ("mean", "lower", "upper"))
    level = 100 * float(modes.attrs.get("interval_level", 0.95))
    style: dict[str, Any] = {"linestyle": "none", "capsize": 3, "markersize": 5, "linewidth": 1.2}
    ax.errorbar(
        number - 0.08,
        mean,
        [(mean - low).clip(0), (high - mean).clip(0)],  # a narrow interval may lie beside the mean
        marker="o",
        color=BLUE,
        label=f"posterior mean, {level:g} % interval",
        **style,
    )
    if comparison is not None:
        share, error = (100 * comparison[x].values for x in ("eof_fraction", "eof_fraction_error"))
        ax.errorbar(
            number + 0.08,
            share,
            error,
            marker="s",
            color=RED,
            markerfacecolor="white",
            label="EOF, North's sampling error",
            **style,
        )
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}" if f"{value:g}"[0] in "235" else ""))
    ax.tick_params(which="minor", labelsize=SMALL)
    ax.set_xticks(number)
    ax.set_xlim(number[0] - 0.5, number[-1] + 0.5)
    ax.set_xlabel("mode")
    whose = _WHOSE.get(str(modes.attrs.get("estimand")), "").replace(" of these times", "")
    ax.set_ylabel(f"variance{whose} explained (%)")
    ax.legend(fontsize=SMALL, frameon=False)
    clean(ax)
    return figure


def residual_maps(modes: xr.Dataset) -> Figure:
    """What the modes leave over: residual sd, noise sd of the model, predictive p-value, autocorrelation in time."""
    figure, axes = grid_of_maps(modes["residual_sd"], 2, 2)
    residual, noise = modes["residual_sd"], modes["noise_sd"]
    top = max(largest(residual), largest(noise))
    unit = _units(residual)
    style: dict[str, Any] = {"cmap": "YlGnBu", "vmin": 0, "vmax": top}
    draw_map(figure, axes[0, 0], residual, unit, **style)
    axes[0, 0].set_title("residual sd, data less modes", fontsize=10, loc="left")
    draw_map(figure, axes[0, 1], noise, unit, **style)
    axes[0, 1].set_title("noise sd of the model", fontsize=10, loc="left")
    p = modes["predictive_p_value"]
    steps = [0, 0.025, 0.1, 0.3, 0.7, 0.9, 0.975, 1]
    draw_map(figure, axes[1, 0], p, "P(replicated > observed)", cmap="RdBu_r", norm=BoundaryNorm(steps, 256))
    outside = 100 * float(((p < 0.025) | (p > 0.975)).sum() / p.notnull().sum())
    axes[1, 0].set_title(
        f"predictive check of the variance: {outside:.0f} % of cells outside 95 %", fontsize=10, loc="left"
    )
    lag = modes["residual_autocorrelation"]
    bound = max(largest(lag), 0.1)
    draw_map(figure, axes[1, 1], lag, "correlation", cmap="RdBu_r", vmin=-bound, vmax=bound)
    axes[1, 1].set_title("lag-1 autocorrelation of the residual", fontsize=10, loc="left")
    return figure


def eof_difference(modes: xr.Dataset, comparison: xr.Dataset) -> Figure:
    """Deterministic EOFs, and the posterior mean less the EOF; dots where the EOF lies outside the interval."""
    figure, axes = grid_of_maps(modes["mode_mean"], modes.sizes["mode"], 2)
    unit = f"{_units(modes['mode_mean'])} per sd of PC".strip()
    for i in range(modes.sizes["mode"]):
        eof = comparison["eof"][i]
        difference = modes["mode_mean"][i] - eof
        bound = largest(eof)
        draw_map(figure, axes[i, 0], eof, unit, cmap="RdBu_r", vmin=-bound, vmax=bound)
        title = f"EOF {i + 1}: {100 * float(comparison['eof_fraction'][i]):.1f} % of variance"
        axes[i, 0].set_title(title, fontsize=10, loc="left")
        bound = largest(difference)
        draw_map(figure, axes[i, 1], difference, unit, cmap="PuOr_r", vmin=-bound, vmax=bound)
        stipple(axes[i, 1], (eof < modes["mode_lower"][i]) | (eof > modes["mode_upper"][i]))
        correlation = float(comparison["pattern_correlation"][i])
        axes[i, 1].set_title(
            f"posterior mean less EOF (pattern correlation {correlation:.3f})", fontsize=10, loc="left"
        )
    return figure


def rhat_map(modes: xr.Dataset) -> Figure:
    """Largest R-hat over the modes at every cell.

    Raises
    ------
    KeyError
        If the modes come from a single chain, which has no R-hat.
    """
    if "mode_r_hat" not in modes:
        raise KeyError("the modes have no mode_r_hat: a single chain has none; run two chains or more")
    worst = modes["mode_r_hat"].max("mode")
    figure, axes = grid_of_maps(worst, 1, 1, width=6.5)
    top = max(float(worst.max()), 1.02)
    draw_map(figure, axes[0, 0], worst, "R-hat", cmap="magma_r", vmin=1.0, vmax=top)
    axes[0, 0].set_title(
        f"worst R-hat of the modes at each cell (largest {float(worst.max()):.3f})", fontsize=10, loc="left"
    )
    return figure
