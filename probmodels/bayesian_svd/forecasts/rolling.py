"""Skill of the forecasts that a model makes of a field: from origins that roll through the end of its record.

The model of a result is fitted again to the first part of its record; from then on its state alone is updated with each
new time. The field is forecast from many origins, and scored beside simple forecasts that are fitted to the same part:
climatology, persistence, AR(1) of each cell, and a linear inverse model in as many EOFs as the model has modes
(Penland and Sardeshmukh, 1995).

References
----------
Penland, C. and Sardeshmukh, P. D. (1995). The optimal growth of tropical sea surface temperature anomalies. J. Climate
8. https://doi.org/10.1175/1520-0442(1995)008<1999:TOGOTS>2.0.CO;2
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Annotated, Any, Literal

import numpy as np
import xarray as xr
from annotated_types import Interval
from numpy.typing import NDArray
from tqdm.auto import tqdm

from probmodels.bayesian_svd.forecasts.forecasting import forecast
from probmodels.bayesian_svd.forecasts.skill import score_draws, score_normal
from probmodels.bayesian_svd.grids import to_cells
from probmodels.bayesian_svd.prepare import make_problem
from probmodels.errors import SummaryError
from probmodels.inference.labels import group_of, read_json
from probmodels.inference.mcmc.cost import foresee
from probmodels.inference.mcmc.run import run_mcmc
from probmodels.inference.result import Result
from probmodels.options import Fraction, Seed, checked

__all__ = ["forecast_skill", "skill_sentence"]

Array = NDArray[np.float64]

_LEAST = 10  # origins
_OWN = "Bayesian SVD"


@checked(SummaryError)
def forecast_skill(
    result: Result,
    *,
    steps: Annotated[int, Interval(ge=1, le=120)] = 12,
    every: Annotated[int, Interval(ge=1, le=120)] = 3,
    share: Fraction = 0.7,
    transition: Literal["ar1", "lags", "coupled"] = "ar1",
    num_samples: Annotated[int, Interval(ge=20, le=10_000)] = 200,
    seed: Seed = 0,
    progress: bool = True,
    say: Callable[[str], object] | None = None,
) -> xr.Dataset:
    """Scores of past forecasts of the field, by lead, beside simple ones.

    Parameters
    ----------
    result
        Of a Bayesian SVD whose series are a process in time, by MCMC.
    steps
        Leads, in steps of the record.
    every
        Steps between origins.
    share
        Share of the record that everything is fitted to. Anomalies of the data stay those of the whole record.
    transition
        As for `probmodels.bayesian_svd.forecast`.
    num_samples
        Draws of each of two chains of the fit, after as many sweeps of warm-up.
    seed
        Seed of the fit and of the forecasts.
    progress
        Whether bars are shown.
    say
        Is called with sentences on how long it will take, before it begins.

    Returns
    -------
    xr.Dataset
        Over (forecast, lead): ``crps`` and ``rmse``, means over origins and, by area, over the cells that were always
        observed, in units of the data; ``coverage`` of 80 % intervals. Over (forecast, origin) ``crps_of_origin``, the
        mean over leads. Over forecast ``ratio``, the CRPS of the Bayesian SVD over that of the forecast, with
        ``ratio_lower`` and ``ratio_upper``, 95 % by resampling blocks of origins whose forecasts overlap.

    Raises
    ------
    SummaryError
        If there are covariates, fewer than two cells were always observed, or fewer than ten origins are left.
    """
    constant = group_of(result.tree, "constant_data")
    if "data" not in constant or "d" not in result.posterior:
        raise SummaryError("the skill of forecasts is that of a Bayesian SVD; this is the result of something else")
    options = {k: v for k, v in read_json(result.tree.attrs, "options", {}).items() if not k.startswith("hold_out")}
    if options.get("covariates") or "member" in constant.coords or "field" in constant.coords:
        raise SummaryError("the skill of forecasts is of one field without covariates or members; score others by hand")
    data = constant["data"].transpose("cell", "time")
    values = data.values.astype(float)
    whole = np.isfinite(values).all(1)
    size = round(share * values.shape[1])
    origins = np.arange(size - 1, values.shape[1] - steps, every)
    if whole.sum() < 2 or len(origins) < _LEAST:
        raise SummaryError(
            f"{whole.sum()} cells were always observed and {len(origins)} origins are left after share={share} of "
            f"{values.shape[1]} times; at least 2 and {_LEAST} are needed: take a smaller share, every or steps"
        )
    sampling: dict[str, Any] = {"num_samples": num_samples, "warmup_steps": num_samples, "num_chains": 2}
    how: dict[str, Any] = {"transition": transition, "beyond": True, "judge": False, "keep_draws": True}
    how |= {"num_draws": 200, "quantiles": [0.5]}
    problem, began = make_problem(data[:, :size], **options), time.perf_counter()
    if say is not None:
        forecast(result, steps, **how)
        each = time.perf_counter() - began
        say(f"fit to {size} times: {foresee(problem, **sampling) or 'of unknown time'}")
        say(f"{len(origins)} origins, about {1.5 * each * len(origins):.0f} s after it")
    fit = run_mcmc(problem, **sampling, seed=seed, progress=progress)
    weight = constant["weight"].values[whole] / constant["weight"].values[whole].sum()
    design = (
        constant["fixed_effects_design"].transpose("time", ...).values if "fixed_effects_design" in constant else None
    )
    anomalies = _without(values[whole], design, size)
    others = _others(anomalies, np.sqrt(weight), size, steps, result.posterior.sizes["mode"])
    rows: dict[str, list[dict[str, Array]]] = {name: [] for name in (_OWN, *others)}
    rng = np.random.default_rng(seed)
    for origin in tqdm(origins, "forecasts", disable=not progress):
        at, ahead = int(origin), slice(origin + 1, origin + 1 + steps)
        new = data[:, size : at + 1] if at >= size else None
        drawn = forecast(fit, steps, new=new, seed=seed + at, **how)["field"]
        own = to_cells(drawn, constant) if "cell" not in drawn.dims else drawn.transpose(..., "cell").values
        own = own.reshape(-1, steps, own.shape[-1])[:, :, whole].transpose(0, 2, 1).astype(float)
        rows[_OWN].append(score_draws(own, values[whole, ahead], rng))
        for name, made in others.items():
            mean, sd = made(at)
            rows[name].append(score_normal(mean, np.broadcast_to(sd, mean.shape), anomalies[:, ahead]))
    return _summary(rows, weight, data, origins, steps, every, transition)


def _without(values: Array, design: Array | None, size: int) -> Array:
    """Values less their effects, fitted to the first times."""
    if design is None or not design.shape[1]:
        return values
    return np.asarray(values - np.linalg.lstsq(design[:size], values[:, :size].T, rcond=None)[0].T @ design.T)


def _others(
    values: Array, root: Array, size: int, steps: int, count: int
) -> dict[str, Callable[[int], tuple[Array, Array]]]:
    """Means and standard deviations (cell, lead) of simple forecasts, by origin."""
    fit, lead = values[:, :size], np.arange(1, steps + 1)
    sd = fit.std(1)[:, None]
    decay = np.clip((fit[:, 1:] * fit[:, :-1]).mean(1) / (fit**2).mean(1), 0.0, 0.999)[:, None] ** lead
    apart = np.stack([(fit[:, h:] - fit[:, :-h]).std(1) for h in lead], axis=1)
    eofs = np.linalg.svd(root[:, None] * fit, full_matrices=False)[0][:, :count]
    scores = eofs.T @ (root[:, None] * values)
    known = scores[:, :size]
    zero = known @ known.T / size
    step = known[:, 1:] @ known[:, :-1].T / (size - 1) @ np.linalg.inv(zero)
    powers = [np.linalg.matrix_power(step, h) for h in lead]
    patterns = eofs / root[:, None]
    noise = (fit - patterns @ known).var(1)
    errors = np.stack([np.einsum("ci,ij,cj->c", patterns, zero - p @ zero @ p.T, patterns) for p in powers], axis=1)
    spread = np.sqrt(np.maximum(errors, 0.0) + noise[:, None])
    return {
        "climatology": lambda at: (np.zeros((len(values), steps)), sd),
        "persistence": lambda at: (np.repeat(values[:, [at]], steps, 1), apart),
        "AR(1)": lambda at: (values[:, [at]] * decay, sd * np.sqrt(1 - decay**2)),
        "linear inverse model": lambda at: (patterns @ np.stack([p @ scores[:, at] for p in powers], 1), spread),
    }


def _summary(
    rows: dict[str, list[dict[str, Array]]],
    weight: Array,
    data: xr.DataArray,
    origins: NDArray[np.int64],
    steps: int,
    every: int,
    transition: str,
) -> xr.Dataset:
    """What `forecast_skill` returns, of scores (cell, lead) of each origin."""
    out = xr.Dataset(
        coords={"forecast": list(rows), "lead": np.arange(1, steps + 1), "origin": data["time"].values[origins]}
    )
    crps = np.array([[weight @ row["crps"] for row in found] for found in rows.values()])  # (forecast, origin, lead)
    square = np.array([[weight @ row["error"] ** 2 for row in found] for found in rows.values()])
    held = np.array([[weight @ (np.abs(row["pit"] - 0.5) < 0.4) for row in found] for found in rows.values()])
    out["crps"], out["rmse"] = (("forecast", "lead"), crps.mean(1)), (("forecast", "lead"), np.sqrt(square.mean(1)))
    out["coverage"], out["crps_of_origin"] = (
        (("forecast", "lead"), held.mean(1)),
        (("forecast", "origin"), crps.mean(2)),
    )
    each = crps.mean(2)
    length, rng = min(-(-steps // every), len(origins)), np.random.default_rng(0)
    starts = rng.integers(0, len(origins), (2000, -(-len(origins) // length)))
    at = (starts[:, :, None] + np.arange(length)).reshape(2000, -1) % len(origins)
    ratios = each[0][at].mean(1) / each[:, at].mean(2)
    out["ratio"] = "forecast", each[0].mean() / each.mean(1)
    for name, bound in (("lower", 0.025), ("upper", 0.975)):
        out[f"ratio_{name}"] = "forecast", np.quantile(ratios, bound, axis=1)
    units = str(data.attrs.get("units") or "1")
    for name in ("crps", "rmse", "crps_of_origin"):
        out[name].attrs["units"] = units
    return out.assign_attrs(transition=transition, every=every, cells=len(weight), seed_of_blocks=0)


def skill_sentence(found: xr.Dataset) -> str:
    """Which simple forecasts the model is better than, worse than, or not told apart from; of `forecast_skill`."""
    one = found.isel(forecast=slice(1, None))
    names = [str(x) for x in one["forecast"].values]
    better = [n for n, high in zip(names, one["ratio_upper"].values, strict=True) if high < 1]
    worse = [n for n, low in zip(names, one["ratio_lower"].values, strict=True) if low > 1]
    alike = [n for n in names if n not in (*better, *worse)]
    parts = [("better than", better), ("worse than", worse), ("not told apart from", alike)]
    said = "; ".join(f"{words} {', '.join(listed)}" for words, listed in parts if listed)
    return f"By the CRPS of {found.sizes['origin']} origins the model is {said} (95 %)."
