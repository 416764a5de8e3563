"""Figures of posteriors: maps of modes, series, spectra, checks and diagnostics.

Every function returns a new `matplotlib.figure.Figure` and touches neither pyplot nor matplotlib's settings, so that it
works without a display and inside other programs; ``figure.savefig(path)`` writes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Annotated

import numpy as np
import pandas as pd
import xarray as xr
from annotated_types import Interval
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from probmodels._axes import BLUE, COLOURS, GREY, RED, SMALL, clean
from probmodels.errors import DataError, ResultError
from probmodels.inference.diagnostics.findings import label
from probmodels.options import Fraction, checked, hint

__all__ = [
    "bilevel_losses",
    "forest",
    "image_grid",
    "loss",
    "plot_trace",
    "predictive_check",
    "rank",
    "ranking",
    "rhat_histogram",
]

Rows = Annotated[int, Interval(ge=1, le=500)]
Bins = Annotated[int, Interval(ge=2, le=10_000)]
Limit = Annotated[float, Interval(ge=1, le=1e6)]

_SHOWN = 500  # draws of a chain that a trace shows: about as many as there are dots in a row
_SMALL, _FEW = 12, 4  # entries of a variable of which all are shown by default; of larger ones, so many


def _scalars(
    posterior: xr.Dataset, variables: Sequence[str] | None, most: int
) -> list[tuple[str, str, NDArray[np.float64]]]:
    """Variable, label and draws (chain, draw) of entries of the chosen variables, ``most`` at most.

    By default those of all variables: of large ones the first few.
    """
    drawn = {str(name): x for name, x in posterior.data_vars.items() if {"chain", "draw"} <= set(x.dims)}
    for name in variables or ():
        if name not in drawn:
            raise ResultError(f"the posterior has no {name!r}{hint(name, drawn)}")
    out = []
    for name in drawn if variables is None else variables:
        array = drawn[name].transpose("chain", "draw", ...)
        entries = _FEW if variables is None and array[0, 0].size > _SMALL else most
        for place in islice(np.ndindex(*array.shape[2:]), entries):
            out.append((name, label(name, array, place), array.values[(..., *place)].astype(np.float64)))
    return out[:most]


@checked(ResultError)
def plot_trace(posterior: xr.Dataset, variables: Sequence[str] | None = None, *, most: Rows = 12) -> Figure:
    """Draws in their order and their distribution, one row per scalar and one colour per chain.

    ``variables`` of the posterior are all by default, and of those with more than twelve entries the first four;
    ``most`` limits the rows.
    """
    rows = _scalars(posterior, variables, most)
    figure = Figure(figsize=(10, 1.15 * max(len(rows), 1) + 0.3), layout="constrained")
    axes = figure.subplots(max(len(rows), 1), 2, squeeze=False, width_ratios=[3, 1])
    for (left, right), (_, name, values) in zip(axes, rows, strict=False):
        bins = np.histogram_bin_edges(values[np.isfinite(values)], bins=40)
        shown = np.unique(np.linspace(0, values.shape[1] - 1, min(values.shape[1], _SHOWN)).round().astype(int))
        for chain, draws in enumerate(values):
            color = COLOURS[chain % len(COLOURS)]
            left.plot(shown, draws[shown], color=color, linewidth=0.4, alpha=0.8)
            if (finite := draws[np.isfinite(draws)]).size:
                right.hist(finite, bins=bins, color=color, histtype="step", density=True, linewidth=0.9)
        left.set_ylabel(name, fontsize=SMALL, rotation=0, ha="right", va="center")
        left.margins(x=0)
        right.set_yticks([])
        right.xaxis.set_major_locator(MaxNLocator(3))
        for ax in (left, right):
            clean(ax)
    for ax in axes[:-1, 0]:
        ax.tick_params(labelbottom=False)
    axes[-1, 0].set_xlabel("draw", fontsize=SMALL)
    return figure


@checked(ResultError)
def rank(
    posterior: xr.Dataset, variables: Sequence[str] | None = None, *, most: Rows = 12, num_bins: Bins = 20
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
    for ax, (_, name, values) in zip(axes, rows, strict=False):
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


@checked(ResultError)
def forest(
    posterior: xr.Dataset, variables: Sequence[str] | None = None, *, most: Rows = 40, ci_prob: Fraction = 0.94
) -> Figure:
    """Medians with central intervals, of half the draws (thick) and of ``ci_prob`` of them; one panel per variable.

    ``variables`` and ``most`` as for `trace`.
    """
    panels: dict[str, list[tuple[str, NDArray[np.float64]]]] = {}
    for variable, name, values in _scalars(posterior, variables, most):
        panels.setdefault(variable, []).append((name, values[np.isfinite(values)]))
    heights = [len(rows) for rows in panels.values()] or [1]
    figure = Figure(figsize=(6.5, 0.24 * sum(heights) + 0.45 * len(heights) + 0.2), layout="constrained")
    axes = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights).ravel()
    outer = (1 - ci_prob) / 2
    for ax, rows in zip(axes, panels.values(), strict=False):
        for i, (_, values) in enumerate(rows):
            if values.size:
                low, first, middle, third, high = np.quantile(values, [outer, 0.25, 0.5, 0.75, 1 - outer])
                ax.plot([low, high], [i, i], color=BLUE, linewidth=1)
                ax.plot([first, third], [i, i], color=BLUE, linewidth=3)
                ax.plot(middle, i, "o", color="white", markeredgecolor=BLUE, markersize=4)
        ax.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=SMALL)
        ax.set_ylim(len(rows) - 0.5, -0.5)
        ax.tick_params(axis="x", labelsize=SMALL)
        clean(ax)
    return figure


@checked(ResultError)
def predictive_check(observed: xr.Dataset, predicted: xr.Dataset, *, most: Rows = 50) -> Figure:
    """Distribution of the observed values of every site among those of replicated data; one panel per site.

    Titles give the shares of the replicated data whose mean, and whose standard deviation, exceed those observed.

    Parameters
    ----------
    observed
        Group ``observed_data`` of a result.
    predicted
        Draws of the same sites, dims (chain, draw, ...): group ``posterior_predictive``.
    most
        Data sets that are drawn.

    Raises
    ------
    ResultError
        If they share no site of numbers.
    """
    names = [name for name in predicted.data_vars if name in observed and observed[name].dtype.kind in "biuf"]
    if not names:
        raise ResultError(f"there are no predictions of {list(observed.data_vars)}; add 'posterior_predictive' first")
    figure = Figure(figsize=(7, 2.4 * len(names)), layout="constrained")
    for ax, name in zip(figure.subplots(len(names), 1, squeeze=False).ravel(), names, strict=True):
        values = predicted[name].transpose("chain", "draw", ...).values
        replicated = values.reshape(values.shape[0] * values.shape[1], -1).astype(np.float64)
        data = np.ravel(observed[name].values).astype(np.float64)
        if replicated.shape[1] == data.size:
            replicated, data = replicated[:, np.isfinite(data)], data[np.isfinite(data)]
        keep = np.linspace(0, len(replicated) - 1, min(most, len(replicated))).round().astype(int)
        shown = replicated[keep]
        bins = _bins(np.concatenate([shown.ravel(), data]), int(np.clip(2 * np.sqrt(data.size), 8, 40)))
        for i, row in enumerate(shown):
            counts = np.histogram(row[np.isfinite(row)], bins=bins)[0]
            ax.stairs(counts / max(row.size, 1), bins, color=GREY, alpha=0.3, label=None if i else "replicated")
        ax.stairs(
            np.histogram(data, bins=bins)[0] / max(data.size, 1), bins, color=BLUE, linewidth=1.6, label="observed"
        )
        shares = [(f(replicated, axis=1) > f(data)).mean() for f in (np.mean, np.std)]
        ax.set_title(f"{name}: mean {shares[0]:.0%}, sd {shares[1]:.0%} of replicates above", fontsize=9, loc="left")
        ax.set_yticks([])
        ax.legend(fontsize=SMALL, frameon=False)
        clean(ax)
    return figure


def _bins(values: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """Edges of bins; around every whole number where there are few of them and nothing else."""
    values = values[np.isfinite(values)]
    if values.size and np.ptp(values) < 40 and (values == np.round(values)).all():
        return np.arange(values.min() - 0.5, values.max() + 1)
    return np.histogram_bin_edges(values, bins=count)


@checked(ResultError)
def rhat_histogram(r_hat: xr.Dataset, *, limit: Limit = 1.01) -> Figure:
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


@checked(ResultError)
def loss(fit: xr.Dataset) -> Figure:
    """Loss of variational inference over its steps, with a running median.

    Parameters
    ----------
    fit
        Group ``fit`` of the result, with the variable ``loss`` over one dim.

    Raises
    ------
    ResultError
        If it has no such variable.
    """
    if "loss" not in fit:
        raise ResultError("group fit has no loss; give that of a result of fit_svi or fit_em")
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


@checked(DataError)
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


@checked(ResultError)
def ranking(table: pd.DataFrame) -> Figure:
    """How far models predict worse than the best, with two standard errors, and their weights.

    ``table`` is that of a `probmodels.inference.diagnostics.comparison.Comparison`.
    """
    if lacking := [name for name in ("elpd_diff", "diff_se", "weight") if name not in table]:
        raise ResultError(f"the table lacks {', '.join(lacking)}; give that of a Comparison")
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


@checked(DataError)
def image_grid(images: np.ndarray, title: str, labels: Sequence[Sequence[str]] | None = None) -> Figure:
    """Images in [0, 1] in one figure, with what to write below each.

    Parameters
    ----------
    images
        (grid row, grid column, row, column), of ink, or (grid row, grid column, row, column, 3) of colours.
    title
        Above all.
    labels
        Labels of every image; None for none.

    Raises
    ------
    DataError
        If images have other dims, or there is no label for each.
    """
    if images.ndim not in (4, 5) or not images.size:
        raise DataError(
            f"images of shape {images.shape}; give (grid row, grid column, row, column), or colours as well"
        )
    height, width = images.shape[:2]
    if labels is not None and [len(line) for line in labels] != [width] * height:
        raise DataError(f"labels={labels!r}; give {height} lists of {width} texts each, one for each image")
    figure = Figure(figsize=(0.6 * width + 0.2, (0.6 if labels is None else 0.75) * height + 0.5), layout="constrained")
    figure.suptitle(title, fontsize=9)
    for i, line in enumerate(figure.subplots(height, width, squeeze=False)):
        for j, ax in enumerate(line):
            ax.imshow(images[i, j], cmap="gray_r", vmin=0, vmax=1)
            ax.set(xticks=[], yticks=[])
            if labels is not None:
                ax.set_xlabel(labels[i][j], fontsize=6, labelpad=1)
    return figure
