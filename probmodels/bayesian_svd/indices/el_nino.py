"""Which times were El Niño or La Niña, with probabilities: the mean of the field over the box of Niño 3.4."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import pandas as pd
import xarray as xr
from annotated_types import Interval

from probmodels.bayesian_svd.indices.boxes import box_indices
from probmodels.errors import SummaryError
from probmodels.options import Count, Fraction, checked

__all__ = ["el_nino_sentences", "el_nino_table"]

_BOX = "nino34"
_SURE = 0.9  # probability above which a time is named
_MOST_TIMES = 120  # of which sentences list those that are named; months of many years are for the table


@checked(SummaryError)
def el_nino_table(
    tree: xr.DataTree,
    modes: xr.Dataset,
    *,
    threshold: Annotated[float, Interval(gt=0, lt=10)] = 0.5,
    level: Fraction = 0.95,
    num_draws: Count = 1000,
) -> pd.DataFrame:
    """Index of Niño 3.4 at each time and the probability that it is high or low.

    The index of a draw is the area-weighted mean of the field, gaps filled, over 5°S to 5°N, 170°W to 120°W, less mean
    and trend of the cells in that draw, in units of its own standard deviation over the times. Where nothing is missing
    only mean and trend are uncertain.

    Parameters
    ----------
    tree
        Result of a Bayesian SVD.
    modes
        From `probmodels.bayesian_svd.summary.summarise_modes`.
    threshold
        Bound in standard deviations, above which El Niño is said, and below whose negative La Niña.
    level
        Probability of the intervals.
    num_draws
        Draws that are used.

    Returns
    -------
    pd.DataFrame
        A row for each time: ``time``, ``mean``, ``lower``, ``upper``, ``prob_el_nino``, ``prob_la_nina``; attributes
        ``mode``, the number of the mode whose principal component goes with the index most closely, ``correlation``
        with it, and ``threshold``. Empty where the field does not cover the box.

    Raises
    ------
    SummaryError
        If the result lacks what is needed, or an option is out of range.
    """
    if "lat" not in tree["constant_data"].variables:
        return pd.DataFrame()
    try:
        field = box_indices(tree, [_BOX], effects=False, num_draws=num_draws)["field"]
    except SummaryError as error:
        if "cells of the field cover" in str(error):
            return pd.DataFrame()
        raise
    values = field.isel(index=0).transpose("chain", "draw", "time").values.reshape(-1, field.sizes["time"])
    index = (values - values.mean(1, keepdims=True)) / values.std(1, keepdims=True)
    lower, upper = np.quantile(index, [(1 - level) / 2, (1 + level) / 2], axis=0)
    related = [float(np.corrcoef(index.mean(0), pc)[0, 1]) for pc in modes["pc_mean"].transpose("mode", "time").values]
    leading = int(np.argmax(np.abs(related)))
    frame = pd.DataFrame(
        {
            "time": _labels(modes["time"], tree["constant_data"]["data"].attrs.get("frequency") == "yearly"),
            "mean": index.mean(0),
            "lower": lower,
            "upper": upper,
            "prob_el_nino": (index > threshold).mean(0),
            "prob_la_nina": (index < -threshold).mean(0),
        }
    )
    frame.attrs = {"mode": int(modes["mode"][leading]), "correlation": related[leading], "threshold": threshold}
    return frame


def _labels(time: xr.DataArray, yearly: bool) -> list[str]:
    """Months, or of yearly values the year; a season that is dated by its January or February has both its years."""
    if time.dtype.kind != "M":
        return [str(x) for x in time.values]
    months = [str(x) for x in time.values.astype("datetime64[M]")]
    if not yearly:
        return months
    years = [int(x[:4]) for x in months]
    crosses = all(x[5:7] in ("01", "02") for x in months)
    return [f"{year - 1}/{year % 100:02d}" if crosses else str(year) for year in years]


def el_nino_sentences(table: pd.DataFrame) -> list[str]:
    """Which mode is El Niño's, and of no more than 120 times which were El Niño, La Niña, or may have been.

    Parameters
    ----------
    table
        From `el_nino_table`.
    """
    if not len(table):
        return []
    size = table.attrs["threshold"]
    out = [
        f"Mode {table.attrs['mode']} goes with the index of Niño 3.4 (mean of the field over 5°S-5°N, 170°W-120°W, "
        f"without the trend): their correlation is {abs(table.attrs['correlation']):.2f}."
    ]
    if len(table) > _MOST_TIMES:
        return out
    for column, name, bound in (
        ("prob_el_nino", "El Niño", f"above {size:g}"),
        ("prob_la_nina", "La Niña", f"below -{size:g}"),
    ):
        sure, doubtful = table[table[column] >= _SURE], table[(table[column] >= 0.5) & (table[column] < _SURE)]
        listed = ", ".join(f"{row.time} ({getattr(row, column):.2f})" for row in sure.itertuples()) or "none"
        maybe = ", ".join(f"{row.time} ({getattr(row, column):.2f})" for row in doubtful.itertuples())
        out.append(
            f"{name}, index {bound} standard deviations with a probability of {_SURE:g} or more: {listed}."
            + (f" With 0.5 to {_SURE:g}: {maybe}." if maybe else "")
        )
    return out
