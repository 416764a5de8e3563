"""Whether a model fits the data: observed values among those that the posterior predicts."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import xarray as xr

from probmodels.inference.diagnostics.findings import Finding
from probmodels.inference.labels import group_of

__all__ = ["predictive_findings"]

_LEVEL = 0.95  # of the predictive intervals
_LEAST_DRAWS = 100  # of which an interval of that level can be told
_LEAST_VALUES = 20  # of which a share can be told


def predictive_findings(tree: xr.DataTree) -> Iterator[Finding]:
    """Share of the observed values inside their posterior predictive intervals, of every site that was predicted.

    The predictions have seen the values, so that more than the level lies inside where the model fits; fewer, by more
    than four binomial standard errors, do where it predicts too narrowly. What this cannot see is a model that is too
    wide, or dependence between values that the model lacks.
    """
    observed, predicted = group_of(tree, "observed_data"), group_of(tree, "posterior_predictive")
    for name, values in observed.data_vars.items():
        if name not in predicted or not {"chain", "draw"} <= set(predicted[name].dims):
            continue
        draws = predicted[name].transpose("chain", "draw", ...)
        if draws.shape[2:] != values.shape or values.dtype.kind not in "biuf":
            continue
        drawn = draws.values.reshape(-1, *values.shape).astype(np.float64)
        seen = values.values.astype(np.float64)
        known = np.isfinite(seen) & np.isfinite(drawn).all(0)
        if len(drawn) < _LEAST_DRAWS or known.sum() < _LEAST_VALUES:
            continue
        low, high = np.quantile(drawn[:, known], [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2], axis=0)
        inside = float(((low <= seen[known]) & (seen[known] <= high)).mean())
        least = _LEVEL - 4 * np.sqrt(_LEVEL * (1 - _LEVEL) / known.sum())
        verdict = f"{inside:.1%} of the values of {name} lie inside their {_LEVEL:.0%} posterior predictive intervals "
        verdict += f"(at least {least:.1%})"
        if inside < least:
            advice = "look at plots.predictive_check; the model lacks variation that the data have"
            yield Finding(True, f"{verdict}: the model predicts too narrowly", advice, part="model")
        else:
            yield Finding(False, verdict, part="model")
