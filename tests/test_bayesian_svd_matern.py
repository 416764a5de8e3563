"""Bayesian SVD whose series are Matérn processes in time: grids, sites and summaries, what the verdict says of them."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

from probmodels import Result, run_mcmc
from probmodels.bayesian_svd import make_problem
from probmodels.bayesian_svd.checks import check_model
from probmodels.bayesian_svd.draws import read_draws
from probmodels.bayesian_svd.forecasts.forecasting import forecast
from probmodels.bayesian_svd.summary import _add_persistence, summarise_modes
from probmodels.distributions.processes import correlation_at
from probmodels.errors import DataError

TIMES = 240


def field(process: str, scale: float, times: int = TIMES, cells: int = 12) -> xr.DataArray:
    """Two modes of a process, monthly."""
    rng, lags = np.random.default_rng(2), np.subtract.outer(np.arange(times), np.arange(times))
    root = np.linalg.cholesky(correlation_at(process, scale, lags) + 1e-10 * np.eye(times))
    series = rng.standard_normal((2, times)) @ root.T
    place = np.linspace(0, 1, cells)
    values = np.stack([np.cos(2 * place), np.sin(5 * place)], 1) @ (np.array([[1.5], [0.7]]) * series)
    values += 0.2 * rng.standard_normal(values.shape)
    dates = (np.datetime64("1990-01", "M") + np.arange(times)).astype("datetime64[ns]")
    return xr.DataArray(values, dims=("cell", "time"), coords={"cell": place, "time": dates})


@functools.lru_cache
def fitted(process: str, scale: float, series: str) -> Result:
    problem = make_problem(field(process, scale), rank=2, series=series, num_length_scales=5, area_weights=False)
    settings: dict[str, Any] = {"num_chains": 1, "warmup_steps": 150, "num_samples": 200, "seed": 1, "progress": False}
    return run_mcmc(problem, **settings)


def series_of(series: str, times: Any, **options: Any) -> Any:
    values = np.random.default_rng(0).standard_normal((6, len(times)))
    data = xr.DataArray(values, dims=("cell", "time"), coords={"cell": np.linspace(0, 1, 6), "time": times})
    return make_problem(data, rank=2, series=series, area_weights=False, **options).args[0].series


def test_length_scales_are_learned_in_years_and_kept_with_the_draws(tmp_path: Any) -> None:
    result = fitted("matern32", 4.0, "matern32")
    draws = result.posterior["length_scale_time"]
    assert draws.dims == ("chain", "draw", "mode")
    assert (np.abs(np.log(draws.mean(("chain", "draw")) / (4 / 12))) < 0.4).all()
    modes = summarise_modes(result.tree)
    assert modes["length_scale_time_mean"].attrs["units"] == "year"
    known = correlation_at("matern32", 12 * draws.values, 1.0)
    np.testing.assert_allclose(result.posterior["autocorrelation"], known, rtol=1e-4)
    result.save(tmp_path)
    again = read_draws(Result.load(tmp_path).tree)
    assert again.process == "matern32"
    np.testing.assert_allclose(again.scale, 12 * draws.values[0], rtol=1e-3)
    found, exact = (forecast(x, 3, field=False, judge=False, num_draws=200) for x in (Result.load(tmp_path), result))
    assert (np.abs(found["pc_mean"] - exact["pc_mean"]) < 0.3 * exact["pc_sd"]).all()


def test_independent_times_follow_the_process() -> None:
    draws = read_draws(fitted("matern32", 4.0, "matern32").tree)
    steps = np.where(np.arange(TIMES - 1) % 60 == 59, 1e6, 1.0)  # four members
    times = np.concatenate([[0.0], np.cumsum(steps)])
    lags = times[:, None] - times
    scale = np.array([[3.0, 8.0]] * 2)
    plain = replace(draws, length_scale=scale, decay=correlation_at("matern32", scale, 1.0), steps=steps)
    share = np.array([[0.6, 0.4], [0.4, 0.6]])
    for turn in (None, np.sqrt(np.stack([share] * 2))):
        out = xr.Dataset(coords={"mode": [1, 2]})
        _add_persistence(out, replace(plain, turn=turn), np.array([0.025, 0.975]))
        parts = np.stack([correlation_at("matern32", x, lags) for x in (3.0, 8.0)])
        whole = parts if turn is None else np.einsum("ji,jts->its", share, parts)
        np.testing.assert_allclose(out["effective_times_mean"], TIMES**2 / (whole**2).sum((1, 2)), rtol=1e-6)


def said(result: Result) -> tuple[bool, str]:
    """Whether the check of the process fails, and what else is said of it."""
    found = [x for x in check_model(result) if "what is new in series" in x.verdict or "hardly remember" in x.advice]
    return any(x.harmful for x in found), " ".join(f"{x.verdict}; {x.advice}" for x in found)


@pytest.mark.parametrize(("process", "scale"), [("matern32", 4.0), ("matern52", 5.0), ("ar1", 0.8)])
def test_series_that_follow_their_process_pass(process: str, scale: float) -> None:
    failed, words = said(fitted(process, scale, process))
    assert not failed
    assert "do not go on" not in words


@pytest.mark.parametrize(
    ("process", "scale", "series"), [("ar1", 0.8, "matern52"), ("ar1", 0.9, "matern32"), ("ar1", 0.5, "iid")]
)
def test_series_that_remember_more_than_their_process_fail(process: str, scale: float, series: str) -> None:
    failed, words = said(fitted(process, scale, series))
    assert failed
    assert "do not go on" in words


def test_smooth_series_under_autoregressions_are_said_and_fail_nothing() -> None:
    failed, words = said(fitted("matern52", 5.0, "ar1"))
    assert not failed
    assert "do not go on as AR(1) processes do" in words


def test_white_series_are_fitted_at_the_end_of_the_grid_which_is_said() -> None:
    result = fitted("ar1", 0.0, "matern52")
    failed, words = said(result)
    assert not failed
    assert "the series hardly remember the step before" in words
    assert float(result.posterior["autocorrelation"].quantile(0.9)) < 0.15
    modes = summarise_modes(result.tree)
    assert float(modes["effective_times_mean"].min()) > 0.9 * TIMES


def test_grids_go_to_half_the_record_and_keep_away_from_near_times() -> None:
    even = series_of("matern32", np.arange(50.0))
    assert float(even.scale[-1]) == pytest.approx(24.5)
    assert float(series_of("matern52", np.arange(500.0)).scale[-1]) == pytest.approx(100)
    uneven = np.cumsum(np.where(np.arange(60) % 7 == 3, 0.1, 1.0))
    assert float(series_of("matern52", uneven).scale[-1]) == pytest.approx(10)
    own = series_of("matern32", np.arange(50.0), length_scales_time=[4.0, 1.0, 2.0])
    np.testing.assert_allclose(own.scale, [1, 2, 4])
    prior = torch.distributions.LogNormal(torch.tensor(2.0), torch.tensor(0.2))
    weights = series_of("matern32", np.arange(50.0), length_prior_time=prior).log_weights.exp()
    mean = float((weights[0] * even.scale.log()).sum())
    assert mean == pytest.approx(2.0, abs=0.02)


@pytest.mark.parametrize(
    ("times", "options", "message"),
    [
        (np.arange(50.0), {"length_scales_time": [1.0, 200.0]}, "give at most 100"),
        (np.arange(50.0), {"kernel_time": "matern32"}, "kernel_time"),
        (np.arange(50.0), {"period": 3.0}, "period"),
        (np.cumsum(np.where(np.arange(50) % 7 == 3, 1e-3, 1.0)), {}, "shortest step"),
    ],
)
def test_what_a_matern_process_cannot_take_is_refused(times: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        series_of("matern32", times, **options)
