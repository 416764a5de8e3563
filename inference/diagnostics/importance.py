"""What the importance weights of a guide's draws say: corrected moments, and draws resampled by them.

References
----------
Vehtari, A., Simpson, D., Gelman, A., Yao, Y. and Gabry, J. (2024). Pareto smoothed importance sampling. JMLR 25.
Skare, Ø., Bølviken, E. and Holden, L. (2003). Improved sampling-importance resampling and reduced bias importance
sampling. Scandinavian Journal of Statistics 30(4). https://doi.org/10.1111/1467-9469.00360
"""

from __future__ import annotations

import json
from copy import copy
from typing import TypeVar

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike, NDArray

from probmodels.datasets.checks import as_array
from probmodels.datasets.labelled import arranged, labels_of
from probmodels.errors import ImportanceError
from probmodels.inference.diagnostics.convergence import EQUAL_WEIGHTS, psis
from probmodels.inference.labels import ResultLike, group_of
from probmodels.options import Draws, Seed, checked

__all__ = ["importance_moments", "importance_resample"]

_Held = TypeVar("_Held", bound=ResultLike)
RESAMPLED = "importance_resampled"  # attribute of the tree: JSON of k-hat, draws before, effective ones, seed


@checked(ImportanceError)
def importance_resample(result: _Held, num_samples: Draws | None = None, *, seed: Seed = 0) -> _Held:
    """Draws of a guide resampled by their Pareto-smoothed importance weights, so that they follow the posterior.

    Parameters
    ----------
    result
        Result of `fit_svi` or another engine that keeps ``log_weight`` in ``sample_stats``.
    num_samples
        Draws to keep, each at most once: the fewer of many, the closer they follow the weights. None for as many as
        the weights are worth, at most a quarter.
    seed
        Seed of the choice.

    Returns
    -------
    Result
        One chain of independent draws; every group that has draws is resampled alike. Parameters stay those that were
        fitted, predictions use these draws, and the root attribute ``importance_resampled`` keeps k-hat.

    Raises
    ------
    ImportanceError
        If there are no weights, they are not finite, or fewer draws than asked for have a weight above zero.

    Notes
    -----
    Above a k-hat of 0.7 the draws of the guide miss part of the posterior, and no choice among them can mend that;
    `diagnose` says so of the resampled result, too.
    """
    tree = result.tree
    stats = group_of(tree, "sample_stats")
    if "log_weight" not in stats:
        raise ImportanceError("the result has no 'log_weight' in sample_stats; resample the result of fit_svi")
    smoothed, khat = psis(stats["log_weight"].transpose("chain", "draw").values)
    weight = np.exp(smoothed)
    if not np.isfinite(weight).all():
        raise ImportanceError("the importance weights are not finite; see diagnose(result)")
    if num_samples is None:
        num_samples = max(1, min(len(weight) // 4, int(1 / np.square(weight).sum())))
    positive = int((weight > 0).sum())
    if num_samples > positive:
        raise ImportanceError(f"num_samples={num_samples}; choose at most the {positive} draws of positive weight")
    chosen = np.random.default_rng(seed).choice(len(weight), num_samples, replace=False, p=weight / weight.sum())
    num_draws = stats.sizes["draw"]
    place = {
        "chain": xr.DataArray(chosen // num_draws, dims="draw"),
        "draw": xr.DataArray(chosen % num_draws, dims="draw"),
    }

    def pick(values: xr.DataArray) -> xr.DataArray:
        if not {"chain", "draw"} <= set(values.dims):
            return values
        picked = values.isel(place).drop_vars("chain", errors="ignore").expand_dims("chain")
        return picked.transpose("chain", "draw", ...).assign_coords(chain=[0], draw=np.arange(num_samples))

    groups = {}
    for name, node in tree.children.items():
        kept = node.to_dataset().drop_vars(["log_weight", "log_weight_by_row"], errors="ignore")
        if kept.data_vars:
            groups[f"/{name}"] = kept.map(pick, keep_attrs=True)
    resampled = xr.DataTree.from_dict(groups)
    about = {"khat": None if np.isnan(khat) else khat, "num_draws": len(weight), "seed": seed}
    about |= {"effective": 1 / float(np.square(weight).sum()), "unequal": bool(np.ptp(smoothed) > EQUAL_WEIGHTS)}
    resampled.attrs = {**tree.attrs, RESAMPLED: json.dumps(about)}
    found = copy(result)
    found.tree = resampled
    return found


def importance_moments(draws: ArrayLike, log_weight: ArrayLike) -> dict[str, NDArray[np.float64]]:
    """Mean and sd of every entry under self-normalised weights, and their Monte Carlo errors.

    Parameters
    ----------
    draws
        Array (draw, ...).
    log_weight
        Normalised log weights (draw,), as from `probmodels.inference.diagnostics.convergence.psis`.

    Returns
    -------
    dict
        ``mean``, ``sd``, ``mcse_mean``, ``mcse_sd``, each of the shape of an entry.

    Raises
    ------
    ImportanceError
        If these are no numbers, or not as many weights as draws.
    """
    if isinstance(draws, xr.DataArray) and "draw" in draws.dims:
        draws = draws.transpose("draw", ...)
    log_weight = arranged(log_weight, "log_weight", {"draw": labels_of(draws, "draw")}, error=ImportanceError)
    values = as_array(draws, "draws", numbers=True, error=ImportanceError).astype(np.float64)
    weight = np.exp(as_array(log_weight, "log_weight", numbers=True, error=ImportanceError).astype(np.float64))
    if weight.ndim != 1 or not weight.size or values.shape[:1] != weight.shape:
        raise ImportanceError(
            f"draws of shape {values.shape} and log_weight of shape {weight.shape}; give (draw, ...) and (draw,)"
        )
    weight /= weight.sum()
    mean = np.tensordot(weight, values, 1)
    squares = np.square(values - mean)
    variance = np.tensordot(weight, squares, 1)
    sd = np.sqrt(variance)
    with np.errstate(divide="ignore", invalid="ignore"):  # entries that are constant
        mcse_sd = np.sqrt(np.tensordot(weight**2, np.square(squares - variance), 1)) / (2 * sd)
    return {"mean": mean, "sd": sd, "mcse_mean": np.sqrt(np.tensordot(weight**2, squares, 1)), "mcse_sd": mcse_sd}
