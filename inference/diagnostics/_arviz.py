"""The only module that imports arviz; the same numbers on arviz 0.23 and 1.x.

Import it where it is used: arviz costs seconds. Which arviz it is shows in a feature, never in a version string; what
differs by default between the two (interval, rounding, tail probabilities) is given in full.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import arviz as az
import numpy as np
import pandas as pd
import xarray as xr

__all__ = ["ARVIZ_1", "bfmi", "compare", "ess", "loo", "mcse", "psis", "rhat", "summary", "to_arviz"]

ARVIZ_1 = hasattr(az, "convert_to_datatree")
_TAIL = (0.05, 0.95)


def to_arviz(tree: xr.DataTree) -> Any:
    """What arviz calls inference data, a DataTree in 1.x and an ``InferenceData`` in 0.23; every dim has labels."""
    labelled = tree.map_over_datasets(_labelled)
    if ARVIZ_1:
        return labelled
    groups: dict[str, Any] = {name: group.to_dataset() for name, group in labelled.children.items()}
    return az.InferenceData(attrs=dict(tree.attrs), **groups)


def summary(posterior: xr.Dataset, *, ci_prob: float = 0.94) -> pd.DataFrame:
    """Table of mean, sd, highest-density interval, ess and r_hat, unrounded; one row per entry."""
    options = {"ci_kind": "hdi", "ci_prob": ci_prob} if ARVIZ_1 else {"hdi_prob": ci_prob}
    table = pd.DataFrame(az.summary(posterior, round_to="none", **options))
    low, high = (column for column in table.columns if column.startswith("hdi"))
    table = table.rename(columns={low: "hdi_lower", high: "hdi_upper"})
    # The two take tails of other probabilities for granted.
    tails = ess(posterior, kind="tail")
    table["ess_tail"] = np.concatenate([np.ravel(tails[name]) for name in posterior.data_vars])
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

        smoothed, khat = array_stats.psislw(-log_weight)  # takes log likelihoods
    else:
        smoothed, khat = az.psislw(log_weight)
    return np.asarray(smoothed), float(khat)


def bfmi(energy: np.ndarray) -> np.ndarray:
    """Fraction of missing information of every chain, from energies (chain, draw)."""
    if ARVIZ_1:
        from arviz_stats.base import array_stats

        return np.asarray(array_stats.bfmi(energy))
    return np.asarray(az.bfmi(energy))


def loo(
    tree: xr.DataTree, *, var_name: str | None = None, r_eff: float | None = None
) -> tuple[float, float, np.ndarray]:
    """Expected log predictive density by leave-one-out, its standard error, and the Pareto k of every observation.

    Parameters
    ----------
    tree
        With groups ``posterior`` and ``log_likelihood``.
    var_name
        Observed site, where there are several.
    r_eff
        Effective draws per draw; None for arviz's own estimate.
    """
    found = az.loo(to_arviz(tree), pointwise=True, var_name=var_name, reff=r_eff)
    shapes = np.asarray(found.pareto_k)
    if ARVIZ_1:
        return float(found.elpd), float(found.se), shapes
    return float(found.elpd_loo), float(found.se) * np.sqrt(shapes.size / (shapes.size - 1)), shapes


def compare(trees: Mapping[str, xr.DataTree], *, method: str = "stacking") -> pd.DataFrame:
    """Table of models by leave-one-out: elpd, weight and diff_se, in the order of arviz."""
    found = {name: az.loo(to_arviz(tree), pointwise=True) for name, tree in trees.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # arviz 0.23 calls what pandas 3 deprecates
        options: dict[str, Any] = {"method": method, **({"round_to": "none"} if ARVIZ_1 else {})}
        table = pd.DataFrame(az.compare(found, **options))
    table = table.rename(columns={"elpd_loo": "elpd", "dse": "diff_se"})
    return table[["elpd", "weight", "diff_se"]].astype(float)


def _labelled(dataset: xr.Dataset) -> xr.Dataset:
    """Dataset whose dims have labels, numbers where there were none; without them arviz draws nothing."""
    return dataset.assign_coords({d: np.arange(n) for d, n in dataset.sizes.items() if d not in dataset.coords})


def _dataset(value: Any) -> xr.Dataset:
    return value if isinstance(value, xr.Dataset) else value.to_dataset()
