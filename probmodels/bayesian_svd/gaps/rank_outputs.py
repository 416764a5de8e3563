"""What a user reads of a comparison of numbers of modes: a figure, a table, a NetCDF file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import xarray as xr
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from probmodels._axes import BLUE, RED, SMALL, clean
from probmodels.errors import DataError
from probmodels.options import checked

__all__ = ["draw_ranks", "write_ranks"]

_COLUMNS = ("rmse", "rmse_se", "crps", "crps_se", "coverage", "coverage_se", "excess", "excess_se", "num_modes", "edge")


@checked(DataError)
def draw_ranks(comparison: xr.Dataset) -> Figure:
    """Errors by number of modes, and variances along all axes beside the edge of noise.

    Parameters
    ----------
    comparison
        From `probmodels.bayesian_svd.gaps.ranks.compare_ranks`.
    """
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    rank, chosen, best = comparison["rank"].values, comparison.attrs["chosen"], comparison.attrs["best"]
    left.errorbar(rank, comparison["rmse"], comparison["rmse_se"], color=BLUE, marker="o", markersize=4, capsize=2)
    for place, colour, words in ((best, BLUE, "least error"), (chosen, RED, "fewest within one standard error")):
        left.axvline(place, color=colour, linewidth=0.8, linestyle="--", label=f"{words}: {place}")
    left.set_xlabel("number of modes")
    units = comparison.attrs["units"]
    left.set_ylabel("error of hidden blocks" + ("" if units == "1" else f" ({units})"), fontsize=SMALL)
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
    folder, table = Path(out), comparison[list(_COLUMNS)].to_dataframe()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        table.to_csv(folder / "ranks.csv", float_format="%.6g")
        comparison.to_netcdf(folder / "ranks.nc", engine="netcdf4")
        draw_ranks(comparison).savefig(folder / "ranks.png", dpi=150)
    except OSError as error:
        raise DataError(f"cannot write to {folder}: {error.strerror or error}; choose another folder") from error
    return table[["rmse", "rmse_se", "crps", "coverage", "num_modes"]].to_string(float_format="%.4g")
