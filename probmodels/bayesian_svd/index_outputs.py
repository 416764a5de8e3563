"""What a user reads of climate indices: a table, a NetCDF file of draws, a figure, sentences."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from probmodels._axes import BLUE, RED, SMALL, clean
from probmodels.bayesian_svd.figures import time_axis
from probmodels.bayesian_svd.indices import index_table, summarise_indices
from probmodels.errors import SummaryError
from probmodels.options import Fraction, checked

__all__ = ["draw_indices", "index_sentences", "write_indices"]

_LARGE_RATIO = 1.5


def draw_indices(summary: xr.Dataset) -> Figure:
    """Series of each index with its interval: of the signal, and of the field where the two are there.

    Parameters
    ----------
    summary
        From `probmodels.bayesian_svd.indices.summarise_indices`.
    """
    names = [str(name) for name in summary["index"].values]
    figure = Figure(figsize=(10, 1.9 * len(names) + 0.3), layout="constrained")
    axes = figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0]
    time, level = time_axis(summary["time"]), 100 * float(summary.attrs.get("interval_level", 0.95))
    for name, ax in zip(names, axes, strict=True):
        one = summary.sel(index=name)
        ax.axhline(0, color="0.7", linewidth=0.7, zorder=0)
        for part, colour, words in (("signal", BLUE, "signal"), ("field", RED, "field, gaps filled")):
            if f"{part}_mean" not in one:
                continue
            low, high = one[f"{part}_lower"], one[f"{part}_upper"]
            ax.fill_between(time, low, high, color=colour, alpha=0.3, linewidth=0, label=f"{words}, {level:g} %")
            ax.plot(time, one[f"{part}_mean"], color=colour, linewidth=0.8)
        ax.set_title(name, fontsize=10, loc="left")
        ax.set_ylabel(str(next(iter(one.data_vars.values())).attrs.get("units", "")), fontsize=SMALL)
        ax.margins(x=0.01)
        clean(ax)
    axes[0].legend(fontsize=SMALL, frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 0.98))
    return figure


def index_sentences(indices: xr.Dataset) -> list[str]:
    """What a reader of the indices has to know: how much of a box is covered and observed, how noise behaves.

    Parameters
    ----------
    indices
        From `probmodels.bayesian_svd.indices.box_indices`.
    """
    found = []
    for name in indices["index"].values:
        one = indices.sel(index=name)
        covered, ratio, observed = float(one["covered"]), float(one["noise_ratio"]), one["observed"].values
        if np.isnan(covered):
            found.append(f"{name}: cells have no grid; how much of the box they cover is unknown.")
        elif covered < 0.995:
            found.append(f"{name}: cells cover {covered:.0%} of the box; the rest is land or outside of the field.")
        if (gaps := int((observed < 1 - 1e-9).sum())) > 0:
            found.append(f"{name}: {gaps} of {len(observed)} times have gaps in the box, which draws fill.")
        if np.isnan(ratio):
            found.append(f"{name}: the box is never observed as a whole, so that its noise could not be checked.")
        elif ratio > _LARGE_RATIO:
            found.append(
                f"{name}: modes leave {ratio:.1f} times as much of the mean of the box as noise that is independent "
                "from cell to cell would; intervals of the signal are too narrow, those of filled gaps allow for it."
            )
    return found


@checked(SummaryError)
def write_indices(indices: xr.Dataset, folder: str | Path, *, level: Fraction = 0.95) -> list[str]:
    """Write ``indices.csv`` (mean, sd and interval at each time), ``indices.nc`` (all draws) and ``indices.png``.

    Parameters
    ----------
    indices
        From `probmodels.bayesian_svd.indices.box_indices`.
    folder
        Where to; made where it is missing, files of the same names are replaced.
    level
        Probability of the intervals.

    Returns
    -------
    list
        What a reader has to know, sentence by sentence.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    summary, sentences = summarise_indices(indices, level=level), index_sentences(indices)
    index_table(summary).to_csv(folder / "indices.csv", index=False, float_format="%.6g")
    both = xr.merge([indices, summary], combine_attrs="override").assign_attrs(
        interval_level=level, comment=" ".join(sentences)
    )
    encoding = {name: {"dtype": "float32"} for name, x in both.data_vars.items() if {"chain", "draw"} <= set(x.dims)}
    both.to_netcdf(folder / "indices.nc", engine="netcdf4", encoding=encoding)
    draw_indices(summary).savefig(folder / "indices.png", dpi=110)
    return sentences
