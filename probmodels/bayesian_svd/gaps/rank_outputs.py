"""What a user reads of a comparison of numbers of modes: a figure, a table, a NetCDF file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from probmodels._axes import BLUE, RED, SMALL, clean
from probmodels.errors import DataError
from probmodels.options import checked

__all__ = ["draw_ranks", "write_comparison", "write_ranks"]

_SHOWN = ("rmse", "rmse_se", "crps", "excess", "excess_se", "alike", "coverage", "num_modes")
_COLUMNS = (*_SHOWN, "crps_se", "coverage_se", "edge")


@checked(DataError)
def draw_ranks(comparison: xr.Dataset) -> Figure:
    """CRPS of hidden blocks by number of modes, and variances along all axes beside the edge of noise.

    Parameters
    ----------
    comparison
        From `probmodels.bayesian_svd.gaps.ranks.compare_ranks`.
    """
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    rank, chosen, best = comparison["rank"].values, comparison.attrs["chosen"], comparison.attrs["best"]
    units = comparison.attrs["units"]
    alike = comparison["alike"].values
    left.errorbar(rank, comparison["crps"], comparison["crps_se"], color=BLUE, linewidth=1, capsize=2)
    for which, fill, words in ((alike, BLUE, "not told apart from the best"), (~alike, "white", "worse than the best")):
        left.plot(rank[which], comparison["crps"].values[which], "o", color=BLUE, markerfacecolor=fill, label=words)
    for place, colour, words in ((best, BLUE, "least"), (chosen, RED, "chosen")):
        left.axvline(place, color=colour, linewidth=0.8, linestyle="--", label=f"{words}: {place}")
    left.set_xlabel("number of modes")
    left.set_ylabel("CRPS of hidden blocks" + ("" if units == "1" else f" ({units})"), fontsize=SMALL)
    left.legend(fontsize=SMALL, frameon=False)

    widest = comparison.isel(rank=-1)
    shown = min(comparison.sizes["axis"], max(2 * int(rank[-1]), int(rank[-1]) + 5))
    axis, spectrum = np.arange(1, shown + 1), widest["spectrum"].values[:shown]
    reported = axis <= chosen
    for which, colour, words in ((reported, RED, f"the {chosen} chosen"), (~reported, BLUE, "beyond them")):
        right.plot(axis[which], spectrum[which], "o", color=colour, markersize=4, label=words)
    right.axhline(float(widest["edge"]), color="0.4", linewidth=0.8, linestyle="--", label="edge of noise")
    right.set_yscale("log")
    right.set_xlabel("mode")
    right.set_ylabel("variance over that of noise", fontsize=SMALL)
    right.legend(fontsize=SMALL, frameon=False)
    for ax in (left, right):
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        clean(ax)
    return figure


@checked(DataError)
def write_ranks(comparison: xr.Dataset, out: str | Path) -> str:
    """Write ``ranks.csv``, ``ranks.nc`` and ``ranks.png``.

    Parameters
    ----------
    comparison
        From `probmodels.bayesian_svd.gaps.ranks.compare_ranks`.
    out
        Folder, made where it is not there.

    Returns
    -------
    str
        The table, as text.

    Raises
    ------
    DataError
        If the folder cannot be written.
    """
    table = comparison[list(_COLUMNS)].to_dataframe()
    write_comparison(comparison, table, Path(out), "ranks", draw_ranks(comparison))
    return table[list(_SHOWN)].to_string(float_format="%.4g")


def write_comparison(
    comparison: xr.Dataset, table: pd.DataFrame, folder: Path, name: str, figure: Figure | None = None
) -> None:
    """Write ``NAME.csv``, ``NAME.nc`` and where there is a figure ``NAME.png``.

    Raises
    ------
    DataError
        If the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        table.to_csv(folder / f"{name}.csv", float_format="%.6g")
        comparison.to_netcdf(folder / f"{name}.nc", engine="netcdf4")
        if figure is not None:
            figure.savefig(folder / f"{name}.png", dpi=150)
    except OSError as error:
        raise DataError(f"cannot write to {folder}: {error.strerror or error}; choose another folder") from error
