"""Numbers behind the figures of a run, as tables: one row each, with what the row is an estimate of."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import xarray as xr

__all__ = ["effect_tables", "mode_tables"]

_PARTS = ("mean", "lower", "upper")
_BY_MODE = {"explained_variance_fraction": "fraction", "singular_value": "d"}
_BY_MODE |= {name: name for name in ("autocorrelation", "effective_times", "length_scale_space", "length_scale_time")}
_OF_EOF = ("eof_fraction", "eof_fraction_error", "pattern_correlation", "pc_correlation")


def mode_tables(*summaries: tuple[xr.Dataset, xr.Dataset]) -> dict[str, pd.DataFrame]:
    """Tables of the modes.

    Parameters
    ----------
    summaries
        What `probmodels.bayesian_svd.summary.summarise_modes` and `probmodels.bayesian_svd.eof.compare_eof` made of a
        result, once for each estimand.

    Returns
    -------
    dict
        ``principal_components``, a row for each estimand, mode and time; ``explained_variance``, a row for each
        estimand and mode, with all that the figure of explained variance shows; and ``number_of_modes``, the posterior
        probability of each number of modes, where it is known.
    """
    pairs = list(summaries)
    number = "number_of_modes_probability"
    return {
        **({"number_of_modes": pairs[0][0][number].to_dataframe().reset_index()} if number in pairs[0][0] else {}),
        "principal_components": pd.concat([_series(*pair) for pair in pairs], ignore_index=True),
        "explained_variance": pd.concat([_shares(*pair) for pair in pairs], ignore_index=True),
    }


def _series(modes: xr.Dataset, comparison: xr.Dataset) -> pd.DataFrame:
    time = modes["time"].values
    label = np.datetime_as_string(time, unit="D") if time.dtype.kind == "M" else time.astype(str)
    count = modes.sizes["mode"]
    columns = {
        name: modes[f"pc_{name}"].transpose("mode", "time").values.ravel() for name in ("mean", "sd", *_PARTS[1:])
    }
    return pd.DataFrame(
        {
            "estimand": modes.attrs["estimand"],
            "mode": np.repeat(modes["mode"].values, len(label)),
            "time": np.tile(label, count),
            **columns,
            "eof": comparison["eof_pc"].transpose("mode", "time").values.ravel(),
        }
    )


def _shares(modes: xr.Dataset, comparison: xr.Dataset) -> pd.DataFrame:
    found: dict[str, object] = {"estimand": modes.attrs["estimand"], "mode": modes["mode"].values}
    for name, short in _BY_MODE.items():
        found |= {f"{short}_{part}": modes[f"{name}_{part}"].values for part in _PARTS if f"{name}_{part}" in modes}
    return pd.DataFrame(found | {name: comparison[name].values for name in _OF_EOF})


def effect_tables(local: xr.Dataset, trend: xr.Dataset) -> dict[str, pd.DataFrame]:
    """Tables over the cells.

    Parameters
    ----------
    local, trend
        From `probmodels.bayesian_svd.patterns.local`.

    Returns
    -------
    dict
        ``local_variance``, a row for each mode and cell, with "all" for all modes together; and ``trend``, a row for
        each cell, where there is one.
    """
    estimand = local.attrs["estimand"]
    each = {part: local[f"local_fraction_{part}"] for part in _PARTS}
    together = {part: local[f"modes_fraction_{part}"] for part in _PARTS}
    parts = [_over_cells({k: v.isel(mode=i) for k, v in each.items()}) for i in range(local.sizes["mode"])]
    named = zip([*map(str, local["mode"].values), "all"], [*parts, _over_cells(together)], strict=True)
    rows = [frame.assign(estimand=estimand, mode=mode) for mode, frame in named]
    tables = {"local_variance": _first(pd.concat(rows, ignore_index=True), "estimand", "mode")}
    if "trend_mean" in trend:
        frame = _over_cells({part: trend[f"trend_{part}"] for part in (*_PARTS, "prob_positive")})
        units = str(trend["trend_mean"].attrs["units"]).replace("(10 year)-1", "per decade")
        tables["trend"] = _first(frame.assign(estimand=estimand.replace("modes", "trend"), units=units), "estimand")
    return tables


def _over_cells(arrays: Mapping[str, xr.DataArray]) -> pd.DataFrame:
    """A row for each cell that holds values, with its position where it has one."""
    data = xr.Dataset({name: array.drop_vars(["mode", "ice_share"], errors="ignore") for name, array in arrays.items()})
    frame = data.to_dataframe().reset_index().dropna(subset=list(arrays))
    return _first(frame, *(name for name in ("lat", "lon") if name in frame)).reset_index(drop=True)


def _first(frame: pd.DataFrame, *names: str) -> pd.DataFrame:
    """Columns of these names first."""
    return frame[[*names, *(name for name in frame.columns if name not in names)]]
