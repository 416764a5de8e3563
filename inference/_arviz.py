"""The only module that imports arviz; the same numbers on arviz 0.23 and 1.x.

Import it where it is used: arviz costs seconds. Which arviz it is shows in a feature, never in a version string; what
differs by default between the two (interval, rounding, tail probabilities) is given in full.
"""

from __future__ import annotations

from typing import Any

import arviz as az
import numpy as np
import pandas as pd
import xarray as xr

__all__ = ["ARVIZ_1", "bfmi", "ess", "loo", "mcse", "psis", "rhat", "summary", "to_arviz"]

ARVIZ_1 = hasattr(az, "convert_to_datatree")
_TAIL = (0.05, 0.95)


def to_arviz(tree: xr.DataTree) -> Any:
    """What arviz calls inference data: the tree itself in 1.x, an ``InferenceData`` in 0.23."""
    if ARVIZ_1:
        return tree
    groups: dict[str, Any] = {name: group.to_dataset() for name, group in tree.children.items()}
    return az.InferenceData(**groups)


def summary(posterior: xr.Dataset, *, ci_prob: float = 0.94) -> pd.DataFrame:
    """Table of mean, sd, highest-density interval, ess and r_hat, unrounded; one row per entry."""
    options = {"ci_kind": "hdi", "ci_prob": ci_prob} if ARVIZ_1 else {"hdi_prob": ci_prob}
    table = pd.DataFrame(az.summary(posterior, round_to="none", **options))
    low, high = (column for column in table.columns if column.startswith("hdi"))
    table = table.rename(columns={low: "hdi_lower", high: "hdi_upper"})
    return table[["mean", "sd", "hdi_lower", "hdi_upper", "ess_bulk", "ess_tail", "r_hat", "mcse_mean"]]


def rhat(posterior: xr.Dataset) -> xr.Dataset:
    """Rank-normalised split r_hat of every entry."""
    return _dataset(az.rhat(posterior, method="rank"))


def ess(posterior: xr.Dataset, *, kind: str = "bulk") -> xr.Dataset:
    """Effective sample size of every entry, ``kind`` bulk, tail or mean."""
    return _dataset(az.ess(posterior, method=kind, **({"prob": _TAIL} if kind == "tail" else {})))


def mcse(posterior: xr.Dataset) -> xr.Dataset:
    """Monte Carlo standard error of the mean of every entry."""
    return _dataset(az.mcse(posterior, method="mean"))


def psis(log_weight: np.ndarray) -> tuple[np.ndarray, float]:
    """Pareto-smoothed log weights and their k-hat, from log weights (draw,)."""
    if ARVIZ_1:
        from arviz_stats.base import array_stats

        smoothed, khat = array_stats.psislw(log_weight)
    else:
        smoothed, khat = az.psislw(log_weight)
    return np.asarray(smoothed), float(khat)


def bfmi(energy: np.ndarray) -> np.ndarray:
    """Fraction of missing information of every chain, from energies (chain, draw)."""
    if ARVIZ_1:
        from arviz_stats.base import array_stats

        return np.asarray(array_stats.bfmi(energy))
    return np.asarray(az.bfmi(energy))


def loo(tree: xr.DataTree, *, var_name: str | None = None) -> tuple[float, float, np.ndarray]:
    """Expected log predictive density by leave-one-out, its standard error, and the Pareto k of every observation.

    Parameters
    ----------
    tree
        With groups ``posterior`` and ``log_likelihood``.
    var_name
        Observed site, where there are several.
    """
    found = az.loo(to_arviz(tree), pointwise=True, var_name=var_name)
    value = found.elpd if ARVIZ_1 else found.elpd_loo
    return float(value), float(found.se), np.asarray(found.pareto_k)


def _dataset(value: Any) -> xr.Dataset:
    return value if isinstance(value, xr.Dataset) else value.to_dataset()
