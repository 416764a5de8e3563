"""What a forecast says of itself, and its numbers as a table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import xarray as xr

from probmodels.bayesian_svd.forecasts.projection import Record
from probmodels.distributions.processes import PROCESSES
from probmodels.errors import SummaryError
from probmodels.inference.result import Result
from probmodels.options import checked

__all__ = ["described", "forecast_table"]


def described(
    out: xr.Dataset,
    record: Record,
    tree: xr.DataTree,
    transition: str,
    lags: Sequence[int],
    *,
    judge: bool,
    seed: int,
) -> xr.Dataset:
    """Names, units, and what is to be known before the forecast is used."""
    units = str(record.constant["data"].attrs.get("units") or "1")
    roots = {
        "pc": ("standardised principal component", "1"),
        "field": (str(record.constant["data"].attrs.get("long_name") or "field"), units),
        "index": ("index", units),
    }
    words = {"_mean": "mean of the forecast", "_sd": "standard deviation of the forecast"}
    words |= {"_quantile": "quantile of the forecast", "": "draws of the forecast"}
    words["_draws"] = "draws of the forecast"
    for root, (label, unit) in roots.items():
        for end, said in words.items():
            if (name := f"{root}{end}") in out:
                out[name].attrs = {"long_name": f"{label}, {said}", "units": unit}
    label = "largest share of the variance of a series that its last state explains"
    out["told"].attrs = {"long_name": label, "units": "1"}
    out["lead"].attrs = {"long_name": "steps since the last state", "units": "1"}
    out["mode"].attrs = {"long_name": "number of the mode", "units": "1"}
    out["quantile"].attrs = {"long_name": "probability of the quantile", "units": "1"}
    notes = []
    if not record.decay.any():
        notes.append("series are independent in time: the forecast is the climatology with its effects")
    report = Result(tree).diagnose() if judge else None
    if report is not None and not report.ok:
        notes.append(f"the posterior that this forecast is of: {report.head}")
    how = f"{PROCESSES[record.draws.process]} process of the model"
    if transition != "ar1":
        others = " and on all series" * (transition == "coupled")
        how = f"autoregression on the lags {list(lags)}{others} of each draw"
    out.attrs = {
        "Conventions": "CF-1.11",
        "title": "Forecast by Bayesian SVD",
        "estimand": "posterior predictive distribution of the field as observed, beyond the record",
        "source": f"Bayesian SVD ({tree.attrs.get('engine', 'inference')}), {how}",
        "verdict": "not judged" if report is None else report.head,
        "notes": "; ".join(notes),
        "seed": seed,
    }
    return out


@checked(SummaryError)
def forecast_table(found: xr.Dataset, path: str | Path | None = None) -> pd.DataFrame:
    """Series and indices of a forecast as a table, one row for each of them and time.

    Parameters
    ----------
    found
        From `probmodels.bayesian_svd.forecast`.
    path
        CSV file to write; None for none.

    Returns
    -------
    pd.DataFrame
        Columns ``name``, ``time``, ``lead``, ``mean``, ``sd`` and ``q2.5`` and so on.
    """
    rows = []
    for root, dim in (("pc", "mode"), ("index", "index")):
        if f"{root}_mean" not in found:
            continue
        for label in found[dim].values:
            part = found.sel({dim: label})
            row = {"name": f"pc{label}" if root == "pc" else str(label), "time": found["time"].values}
            row |= {"lead": found["lead"].values, "mean": part[f"{root}_mean"].values, "sd": part[f"{root}_sd"].values}
            for probability in found["quantile"].values:
                row[f"q{100 * probability:g}"] = part[f"{root}_quantile"].sel(quantile=probability).values
            rows.append(pd.DataFrame(row))
    table = pd.concat(rows, ignore_index=True)
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        table.to_csv(path, index=False)
    return table
