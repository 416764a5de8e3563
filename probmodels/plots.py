"""Figures of posteriors: maps of modes, series, spectra, checks and diagnostics.

Every function returns a new `matplotlib.figure.Figure` and touches neither pyplot nor matplotlib's settings, so that it
works without a display and inside other programs; ``figure.savefig(path)`` writes it.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from probmodels._axes import BLUE, COLOURS, GREY, RED, SMALL, clean
from probmodels.bayesian_svd.maps import draw_map, grid_of_maps, largest, stipple
from probmodels.datasets import DataError

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "bilevel_losses",
    "eof_difference",
    "image_grid",
    "loss",
    "mode_maps",
    "pcs",
    "rank",
    "ranking",
    "residual_maps",
    "rhat_histogram",
    "rhat_map",
    "scree",
    "trace",
]


def _units(array: xr.DataArray) -> str:
    units = str(array.attrs.get("units", "1"))
    return {"1": "", "degC": "°C", "degree_C": "°C", "celsius": "°C"}.get(units, units)


def _mode_title(modes: xr.Dataset, i: int) -> str:
    mean, low, high = (100 * float(modes[f"explained_variance_fraction_{x}"][i]) for x in ("mean", "lower", "upper"))
    return f"Mode {int(modes['mode'][i])}: {mean:.1f} % of variance [{low:.1f}, {high:.1f}]"


def mode_maps(modes: xr.Dataset, *, sure: float = 0.95) -> Figure:
    """Posterior mean and standard deviation of every mode, side by side.

    Dots mark cells whose sign is positive, or negative, with more than the probability ``sure``.

    Parameters
    ----------
    modes
        From `probmodels.bayesian_svd.summary.summarise_modes`: ``mode_mean``, ``mode_sd``, ``prob_positive`` over
        (mode, lat, lon), ``explained_variance_fraction_*`` over mode.
    sure
        Probability of the sign above which a cell is dotted.
    """
    mean, sd = modes["mode_mean"], modes["mode_sd"]
    figure, axes = grid_of_maps(mean, modes.sizes["mode"], 2)
    unit = f"{_units(mean)} per sd of PC".strip()
    for i in range(modes.sizes["mode"]):
        bound = largest(mean[i])
        draw_map(figure, axes[i, 0], mean[i], unit, cmap="RdBu_r", vmin=-bound, vmax=bound)
        probability = modes["prob_positive"][i]
        stipple(axes[i, 0], (probability > sure) | (probability < 1 - sure))
        axes[i, 0].set_title(_mode_title(modes, i), fontsize=10, loc="left")
        top = largest(sd[i])
        low = min(float(np.nanquantile(sd[i], 0.01)), top / 2)  # at least a factor of two, or even fields look rough
        draw_map(figure, axes[i, 1], sd[i], unit, cmap="YlGnBu", vmin=low, vmax=top)
        axes[i, 1].set_title("posterior sd", fontsize=10, loc="left")
    return figure


def _time_axis(time: xr.DataArray) -> np.ndarray:
    """Times as matplotlib can draw them: dates as they are, calendars of their own as decimal years."""
    if time.dtype == object:
        return np.array([t.year + (t.dayofyr - 1) / 365.25 for t in time.values])
    return time.values


def pcs(modes: xr.Dataset, comparison: xr.Dataset | None = None) -> Figure:
    """Standardised principal components with their intervals, and those of the EOFs where a comparison is given."""
    count = modes.sizes["mode"]
    figure = Figure(figsize=(10, 1.75 * count + 0.3), layout="constrained")
    axes = figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0]
    time = _time_axis(modes["time"])
    level = 100 * float(modes.attrs.get("interval_level", 0.95))
    for i, ax in enumerate(axes):
        ax.axhline(0, color="0.7", linewidth=0.7, zorder=0)
        ax.fill_between(
            time,
            modes["pc_lower"][i],
            modes["pc_upper"][i],
            color=BLUE,
            alpha=0.3,
            linewidth=0,
            label=f"{level:g} % interval",
        )
        if comparison is not None:  # beneath the mean, which a dashed line over many months would hide
            ax.plot(time, comparison["eof_pc"][i], color="0.1", linewidth=0.7, linestyle=(0, (3, 2)), label="EOF")
        ax.plot(
            time, modes["pc_mean"][i], color=BLUE, linewidth=1.2 if len(time) < 200 else 0.7, label="posterior mean"
        )
        ax.set_title(_mode_title(modes, i).replace("Mode", "PC"), fontsize=10, loc="left")
        ax.set_ylabel("sd", fontsize=SMALL)
        clean(ax)
        ax.margins(x=0.01)
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
        [mean - low, high - mean],
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
    ax.set_ylabel("variance explained (%)")
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


def _scalars(posterior: xr.Dataset, variables: Sequence[str] | None, most: int) -> list[tuple[str, np.ndarray]]:
    """Named scalar components (chain, draw) of the chosen variables; small ones by default."""
    if variables is None:
        chosen: list[Hashable] = [
            name
            for name, x in posterior.data_vars.items()
            if x.size <= 12 * posterior.sizes["chain"] * posterior.sizes["draw"]
        ]
    else:
        unknown = [name for name in variables if name not in posterior]
        if unknown:
            raise KeyError(f"the posterior has no {unknown}; it has {sorted(map(str, posterior.data_vars))}")
        chosen = list(variables)
    out = []
    for name in chosen:
        array = posterior[name].transpose("chain", "draw", ...)
        labels = [array[d].values if d in array.coords else np.arange(array.sizes[d]) for d in array.dims[2:]]
        for index in np.ndindex(*array.shape[2:]):
            label = ", ".join(str(values[i]) for values, i in zip(labels, index, strict=True))
            out.append((f"{name}[{label}]" if label else str(name), array.values[(..., *index)]))
    return out[:most]


def trace(posterior: xr.Dataset, variables: Sequence[str] | None = None, *, most: int = 12) -> Figure:
    """Draws in their order and their distribution, one row per scalar and one colour per chain.

    ``variables`` of the posterior are those with at most twelve components by default; ``most`` limits the rows.
    """
    rows = _scalars(posterior, variables, most)
    figure = Figure(figsize=(10, 1.15 * max(len(rows), 1) + 0.3), layout="constrained")
    axes = figure.subplots(max(len(rows), 1), 2, squeeze=False, width_ratios=[3, 1])
    for (left, right), (name, values) in zip(axes, rows, strict=False):
        bins = np.histogram_bin_edges(values, bins=40)
        for chain, draws in enumerate(values):
            color = COLOURS[chain % len(COLOURS)]
            left.plot(draws, color=color, linewidth=0.4, alpha=0.8)
            right.hist(draws, bins=bins, color=color, histtype="step", density=True, linewidth=0.9)
        left.set_ylabel(name, fontsize=SMALL, rotation=0, ha="right", va="center")
        left.margins(x=0)
        right.set_yticks([])
        for ax in (left, right):
            clean(ax)
    for ax in axes[:-1, 0]:
        ax.tick_params(labelbottom=False)
    axes[-1, 0].set_xlabel("draw", fontsize=SMALL)
    return figure


def rank(
    posterior: xr.Dataset, variables: Sequence[str] | None = None, *, most: int = 12, num_bins: int = 20
) -> Figure:
    """Histograms of the ranks of each chain among all draws; flat ones mean that the chains agree.

    The band holds 95 % of the bars of independent draws. Parameters as for `trace`.
    """
    rows = _scalars(posterior, variables, most)
    columns = min(4, max(len(rows), 1))
    lines = -(-len(rows) // columns) or 1
    figure = Figure(figsize=(2.6 * columns, 1.9 * lines + 0.3), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for ax in axes[len(rows) :]:
        ax.set_visible(False)
    for ax, (name, values) in zip(axes, rows, strict=False):
        ranks = values.ravel().argsort().argsort().reshape(values.shape) / values.size
        expected = values.shape[1] / num_bins
        sd = np.sqrt(expected * (1 - 1 / num_bins))
        ax.axhspan(expected - 1.96 * sd, expected + 1.96 * sd, color="0.9", zorder=0)
        for chain, row in enumerate(ranks):
            counts = np.histogram(row, bins=num_bins, range=(0, 1))[0]
            ax.stairs(counts, np.linspace(0, 1, num_bins + 1), color=COLOURS[chain % len(COLOURS)], linewidth=0.9)
        ax.set_title(name, fontsize=9)
        ax.set_ylim(0, None)
        ax.set_yticks([])
        ax.set_xticks([0, 0.5, 1])
        clean(ax)
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


def rhat_histogram(r_hat: xr.Dataset, *, limit: float = 1.01) -> Figure:
    """Distribution of R-hat (variables less chain and draw) over all entries, and the share beyond ``limit``."""
    figure = Figure(figsize=(6, 3), layout="constrained")
    ax = figure.subplots()
    arrays = {str(name): x.values[np.isfinite(x.values)].ravel() for name, x in r_hat.data_vars.items()}
    arrays = {name: values for name, values in arrays.items() if values.size}
    everything = np.concatenate(list(arrays.values())) if arrays else np.ones(1)
    bins = np.linspace(min(0.999, everything.min()), max(everything.max(), limit + 0.002), 41)
    order = sorted(arrays, key=lambda name: -arrays[name].size)
    ax.hist(
        [arrays[name] for name in order], bins=list(bins), stacked=True, label=order,
        color=[COLOURS[i % len(COLOURS)] for i in range(len(order))],
    )  # fmt: skip
    ax.axvline(limit, color="0.2", linewidth=0.8, linestyle="--")
    beyond = 100 * np.mean(everything > limit)
    ax.set_title(f"{everything.size} entries, {beyond:.2g} % beyond {limit:g}", fontsize=10, loc="left")
    ax.set_yscale("log")
    ax.set_xlabel("R-hat")
    ax.set_ylabel("entries")
    if order:
        ax.legend(fontsize=SMALL, frameon=False)
    clean(ax)
    return figure


def loss(fit: xr.Dataset) -> Figure:
    """Loss of variational inference over its steps, with a running median.

    Parameters
    ----------
    fit
        Group ``fit`` of the result, with the variable ``loss`` over one dim.
    """
    values = fit["loss"].values.ravel()
    figure = Figure(figsize=(7, 3), layout="constrained")
    ax = figure.subplots()
    ax.plot(values, color="0.7", linewidth=0.6, label="loss")
    width = max(1, len(values) // 50)
    if len(values) >= 2 * width:
        smooth = np.median(np.lib.stride_tricks.sliding_window_view(values, width), axis=1)
        ax.plot(np.arange(len(smooth)) + width / 2, smooth, color=BLUE, linewidth=1.4, label=f"median of {width}")
    finite = values[np.isfinite(values)]
    if finite.size > 10:
        # The first steps fall from so high that they would flatten what matters, the end.
        tail = finite[len(finite) // 10 :]
        pad = 0.1 * np.ptp(tail) or 1.0
        ax.set_ylim(tail.min() - pad, tail.max() + pad)
    ax.set_xlabel("step")
    ax.set_ylabel("loss")
    ax.legend(fontsize=SMALL, frameon=False)
    clean(ax)
    return figure


def bilevel_losses(fit: xr.Dataset) -> Figure:
    """Losses of a bilevel program by step, and the scores of its rounds, of which the best is marked.

    Parameters
    ----------
    fit
        Group ``fit`` of a result of `fit_bilevel`.

    Raises
    ------
    DataError
        If it is not one.
    """
    lost = [name for name in ("round", "inner_loss", "outer_loss") if name not in fit]
    if lost:
        raise DataError(f"group fit lacks {lost}; give that of a result of fit_bilevel")
    names = [name for name in ("inner_loss", "outer_loss", "log_loss", "error") if name in fit]
    number = fit["round"].values
    steps, best = np.arange(1, len(number) + 1), int(fit.attrs.get("best_round", -1))
    last = np.append(np.flatnonzero(np.diff(number)), len(number) - 1) + 1.0  # step that ends each round
    first = np.append(0.0, last[:-1])
    figure = Figure(figsize=(7.0, 1.5 * len(names) + 0.6), layout="constrained")
    panels = figure.subplots(len(names), 1, sharex=True)
    for ax, name in zip(panels, names, strict=True):
        for start in first[1:]:
            ax.axvline(start + 0.5, color="0.85", linewidth=0.6, zorder=0)
        if 0 <= best < len(last):
            ax.axvspan(first[best] + 0.5, last[best] + 0.5, color=RED, alpha=0.12, linewidth=0, zorder=0)
        values = fit[name].values
        if name in ("inner_loss", "outer_loss"):
            ax.plot(steps, values, color=BLUE, linewidth=0.9)
        else:
            ends = last[: len(values)]  # the round that was broken off has no score
            ax.plot(ends, values, color=BLUE, marker="o", markersize=4, linewidth=1.1)
            if 0 <= best < len(ends):
                ax.plot(ends[best], values[best], color=RED, marker="o", markersize=6)
        ax.set_ylabel(name.replace("_", " "), fontsize=SMALL)
        clean(ax)
    panels[-1].set_xlabel("step of the hyperparameters")
    panels[-1].set_xlim(0.5, len(steps) + 0.5)
    marked = f", shaded the best, round {best + 1}" if best >= 0 else ""
    panels[0].set_title(f"{len(last):,} rounds, lines between them{marked}", fontsize=10, loc="left")
    return figure


def ranking(table: pd.DataFrame) -> Figure:
    """How far models predict worse than the best, with two standard errors, and their weights.

    ``table`` is that of a `probmodels.inference.diagnostics.comparison.Comparison`.
    """
    figure = Figure(figsize=(6.5, 0.4 * len(table) + 1.1), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[3, 1])
    rows = np.arange(len(table))
    left.axvline(0, color=GREY, linewidth=0.8, linestyle="--")
    left.errorbar(table["elpd_diff"], rows, xerr=2 * table["diff_se"], fmt="o", color=BLUE, capsize=3, markersize=5)
    left.set_yticks(rows, [str(name) for name in table.index])
    left.set_ylim(len(table) - 0.5, -0.5)
    left.set_xlabel("elpd less that of the best, ± 2 se")
    right.barh(rows, table["weight"], height=0.5, color=BLUE)
    right.set_xlim(0, 1)
    right.set_xlabel("weight")
    for ax in (left, right):
        clean(ax)
    return figure


def image_grid(images: np.ndarray, title: str, labels: Sequence[Sequence[str]] | None = None) -> Figure:
    """Images in [0, 1] in one figure, with what to write below each.

    Parameters
    ----------
    images
        (grid row, grid column, row, column), of ink, or (grid row, grid column, row, column, 3) of colours.
    title
        Above all.
    labels
        Of every image; None for none.
    """
    height, width = images.shape[:2]
    figure = Figure(figsize=(0.6 * width + 0.2, (0.6 if labels is None else 0.75) * height + 0.5), layout="constrained")
    figure.suptitle(title, fontsize=9)
    for i, line in enumerate(figure.subplots(height, width, squeeze=False)):
        for j, ax in enumerate(line):
            ax.imshow(images[i, j], cmap="gray_r", vmin=0, vmax=1)
            ax.set(xticks=[], yticks=[])
            if labels is not None:
                ax.set_xlabel(labels[i][j], fontsize=6, labelpad=1)
    return figure
