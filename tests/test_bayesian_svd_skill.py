"""Ranks of what came among past forecasts: right ones pass, and what is wrong is said, by lead."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from scipy import stats

from probmodels import run_mcmc
from probmodels.bayesian_svd import make_problem
from probmodels.bayesian_svd.forecasts.forecasting import forecast
from probmodels.bayesian_svd.forecasts.skill import rank_calibration, score_draws, score_normal
from probmodels.errors import SummaryError

DECAY, LEADS, APART = 0.9, 6, 3


def autoregressive(rng: np.random.Generator, size: int, count: int = 1, decay: float = DECAY) -> np.ndarray:
    """Series of unit variance (time, series)."""
    out = rng.standard_normal((size, count))
    for time in range(1, size):
        out[time] = decay * out[time - 1] + np.sqrt(1 - decay**2) * out[time]
    return out


def ranks(seed: int, decay: float = DECAY, narrow: float = 1.0) -> np.ndarray:
    """Ranks (origin, series, lead) of AR(1) forecasts of a decay, of series of decay .9."""
    series = autoregressive(np.random.default_rng(seed), 300, 2)
    lead = np.arange(1, LEADS + 1)
    found = []
    for origin in range(0, 300 - LEADS, APART):
        mean, sd = series[origin][:, None] * decay**lead, narrow * np.sqrt(1 - decay ** (2 * lead)) * np.ones((2, 1))
        found.append(score_normal(mean, sd, series[origin + 1 : origin + 1 + LEADS].T)["pit"])
    return np.array(found)


def test_right_forecasts_pass_as_often_as_they_should() -> None:
    found = [rank_calibration(ranks(seed), apart=APART) for seed in range(25)]
    assert sum("Ranks are not" in one.attrs["verdict"] for one in found) <= 2  # each of 2 of 100 at most
    assert np.mean([one["coverage"].values for one in found]) == pytest.approx(0.8, abs=0.02)
    assert np.mean([one["correlation"].sel(lead=3) for one in found]) == pytest.approx(0.0, abs=0.05)


@pytest.mark.parametrize("seed", range(3))
def test_independent_series_in_place_of_persistent_ones_are_said(seed: int) -> None:
    """Climatology holds its levels, so that only the likeness of errors tells it from a right forecast."""
    found = rank_calibration(ranks(seed, decay=0.0), apart=APART)
    assert found["coverage"].values == pytest.approx(0.8, abs=0.12)
    assert found["correlation"].sel(lead=1) == pytest.approx(DECAY**APART, abs=0.15)
    assert "errors of forecasts that do not overlap are alike" in found.attrs["verdict"]


@pytest.mark.parametrize("narrow", [0.6, 1.7])
def test_intervals_too_narrow_or_wide_are_said(narrow: float) -> None:
    found = rank_calibration(ranks(0, narrow=narrow), apart=APART)
    want = 2 * stats.norm.cdf(stats.norm.ppf(0.9) * narrow) - 1
    assert found["coverage"].mean() == pytest.approx(want, abs=0.05)
    assert "ranks are not uniform" in found.attrs["verdict"]


@pytest.mark.parametrize("seed", range(3))
def test_a_cycle_that_the_forecast_misses_is_said(seed: int) -> None:
    """Pooled over the year its ranks are still uniform, and those of neighbouring origins not alike."""
    series = autoregressive(np.random.default_rng(seed), 360, 2)
    cycle = np.cos(2 * np.pi * np.arange(360) / 12)[:, None]
    lead, found = np.arange(1, 4), {}
    for name, values in (("none", series), ("cycle", series + cycle)):
        rows = [
            score_normal(values[t][:, None] * DECAY**lead, np.sqrt(1 - DECAY ** (2 * lead)), values[t + 1 : t + 4].T)
            for t in range(0, 357, APART)
        ]
        found[name] = rank_calibration([row["pit"] for row in rows], apart=APART, period=12)
    assert "misses a cycle" in found["cycle"].attrs["verdict"]
    assert "Ranks are not" not in found["none"].attrs["verdict"]
    assert found["none"].attrs["p_cycle"] > 0.01


def test_origins_at_one_place_of_the_cycle_are_refused() -> None:
    with pytest.raises(SummaryError, match="at 1 places of the cycle"):
        rank_calibration(ranks(0), apart=12, period=12)


def test_leads_with_too_few_forecasts_are_left_out() -> None:
    found = rank_calibration(ranks(1)[:12], apart=1)
    assert np.isfinite(found["p_uniform"].values).tolist() == [True] + [False] * (LEADS - 1)


def test_draws_are_scored_as_their_distribution() -> None:
    rng = np.random.default_rng(0)
    truth = rng.standard_normal((3, 4))
    draws = score_draws(0.5 + 2 * rng.standard_normal((4000, 3, 4)), truth, rng)
    exact = score_normal(np.full((3, 4), 0.5), np.full((3, 4), 2.0), truth)
    for name, tolerance in (("crps", 0.05), ("error", 0.1), ("pit", 0.03)):
        assert draws[name].shape == truth.shape
        np.testing.assert_allclose(draws[name], exact[name], atol=tolerance)


@pytest.mark.parametrize("wrong", [np.zeros((20, 3)), np.full((20, 1, 2), 1.5), np.full((5, 1, 1), 0.5), [[[np.nan]]]])
def test_what_are_no_ranks_is_refused(wrong: object) -> None:
    with pytest.raises(SummaryError, match="at least 10 origins"):
        rank_calibration(wrong)  # type: ignore[arg-type]


def test_the_wrong_process_of_a_model_is_said() -> None:
    """A model of series that are independent in time, of a field whose series persist, and the right one."""
    rng, known, later = np.random.default_rng(3), 160, 180
    series = autoregressive(rng, known + later, 2) * [3.0, 1.5]
    patterns, _ = np.linalg.qr(rng.standard_normal((8, 2)))
    values = patterns @ series.T + 0.3 * rng.standard_normal((8, known + later))
    dates = (np.datetime64("1990-01", "M") + np.arange(known + later)).astype("datetime64[ns]")
    data = xr.DataArray(values, dims=("cell", "time"), coords={"cell": np.arange(8), "time": dates})
    indices, verdicts = dict(zip("ab", patterns.T, strict=True)), {}
    for process in ("iid", "ar1"):
        problem = make_problem(data[:, :known], rank=2, series=process, kernel_space="identity")
        result = run_mcmc(problem, num_chains=1, warmup_steps=60, num_samples=100, seed=0, progress=False)
        found = []
        for origin in range(known, known + later - 3, 3):
            made = forecast(
                result,
                3,
                new=data[:, known : origin + 1],
                indices=indices,
                keep_draws=True,
                field=False,
                beyond=True,
                judge=False,
            )
            draws = made["index_draws"].values[0]
            truth = (patterns.T @ values)[:, origin + 1 : origin + 4]
            found.append(score_draws(draws, truth, rng)["pit"])
        verdicts[process] = rank_calibration(np.array(found), apart=3).attrs["verdict"]
    assert "alike" in verdicts["iid"]
    assert "Ranks are not" not in verdicts["ar1"]
