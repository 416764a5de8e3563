"""New months projected onto a posterior, and forecasts from it: exactness against dense normals, refusals, verdicts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from scipy import signal, stats

from probmodels import Result, cli, run_mcmc
from probmodels.bayesian_svd import make_problem
from probmodels.bayesian_svd.effects import continue_design, effect_design
from probmodels.bayesian_svd.forecasts import forecasting
from probmodels.bayesian_svd.forecasts.commands import read_new
from probmodels.bayesian_svd.forecasts.coupled import Coupled, draw_coupled, follow_coupled
from probmodels.bayesian_svd.forecasts.figures import fan_charts
from probmodels.bayesian_svd.forecasts.forecasting import forecast
from probmodels.bayesian_svd.forecasts.new_fields import later_times
from probmodels.bayesian_svd.forecasts.projection import project
from probmodels.bayesian_svd.forecasts.tables import forecast_table
from probmodels.bayesian_svd.forecasts.transitions import draw_lags, follow_lags
from probmodels.bayesian_svd.forecasts.weights import box_weights
from probmodels.bayesian_svd.summary import write_modes
from probmodels.distributions.processes import correlation_at
from probmodels.errors import DataError, SummaryError
from probmodels.spec import build_problem, load_data, load_spec, run_engine

DECAY, SIZE, NOISE = np.array([0.9, 0.5]), np.array([3.0, 1.5]), 0.4
CELLS, TIMES, DRAWS = 9, 48, 4000
LATITUDES, LONGITUDES = np.repeat([20.0, 22.0, 24.0], 3), np.tile([200.0, 202.0, 204.0], 3)
WEIGHT = np.cos(np.deg2rad(LATITUDES)) / np.cos(np.deg2rad(LATITUDES)).mean()


def months(count: int, start: str = "2000-01") -> np.ndarray:
    first = np.datetime64(start, "M")
    return (first + np.arange(count)).astype("datetime64[ns]")


def frame() -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(1).standard_normal((CELLS, 2)))[0]


def walk(size: int, rng: np.random.Generator, decay: np.ndarray = DECAY) -> np.ndarray:
    found = np.empty((size, len(decay)))
    found[0] = rng.standard_normal(len(decay))
    for time in range(1, size):
        found[time] = decay * found[time - 1] + np.sqrt(1 - decay**2) * rng.standard_normal(len(decay))
    return found


def known(
    *,
    num_draws: int = DRAWS,
    series: np.ndarray | None = None,
    decay: np.ndarray = DECAY,
    time: np.ndarray | None = None,
    effects: tuple[str, ...] = ("intercept", "trend"),
    chains: int = 1,
    **attrs: Any,
) -> xr.DataTree:
    """A posterior that knows all parameters: every draw is the same, so that moments of forecasts are exact."""
    rng = np.random.default_rng(0)
    time = months(TIMES) if time is None else time
    series = walk(len(time), rng) if series is None else series
    design = effect_design(xr.DataArray(time, dims="time", coords={"time": time}), effects)
    coefficients = np.stack([1.0 + 0.1 * np.arange(CELLS), 0.3 * np.arange(CELLS)], axis=1)[:, : len(effects)]
    patterns = frame() * SIZE / np.sqrt(WEIGHT)[:, None]
    data = coefficients @ design.values.T + patterns @ series.T
    data += NOISE / np.sqrt(WEIGHT)[:, None] * rng.standard_normal(data.shape)

    def alike(value: np.ndarray) -> np.ndarray:
        return np.broadcast_to(value, (chains, num_draws // chains, *np.shape(value)))

    posterior = xr.Dataset(
        {
            "U": (("chain", "draw", "basis_space", "mode"), alike(frame())),
            "F": (("chain", "draw", "time", "mode"), alike(series)),
            "d": (("chain", "draw", "mode"), alike(SIZE)),
            "sigma": (("chain", "draw"), alike(np.array(NOISE))),
            "autocorrelation": (("chain", "draw", "mode"), alike(decay)),
            "fixed_effects": (("chain", "draw", "cell", "effect"), alike(coefficients)),
        }
    )
    constant = xr.Dataset(
        {
            "data": (("cell", "time"), data, attrs),
            "weight": ("cell", WEIGHT),
            "basis_space_matrix": (("cell", "basis_space"), np.eye(CELLS)),
            "fixed_effects_design": design,
        },
        coords={"time": time, "cell": np.arange(CELLS), "lat": ("cell", LATITUDES), "lon": ("cell", LONGITUDES)},
    )
    return xr.DataTree.from_dict({"posterior": posterior, "constant_data": constant})


def smooth(process: str, num_draws: int = DRAWS) -> xr.DataTree:
    """The same, of series that are Matérn processes of length-scales 6 and 2 months."""
    months_ago, scale = np.arange(TIMES), np.array([6.0, 2.0])
    covariance = correlation_at(process, scale[:, None, None], months_ago[:, None] - months_ago)
    root = np.linalg.cholesky(covariance + 1e-12 * np.eye(TIMES))
    series = np.einsum("kts,ks->tk", root, np.random.default_rng(3).standard_normal((2, TIMES)))
    tree = known(num_draws=num_draws, series=series, decay=correlation_at(process, scale, 1.0))
    length_scale = np.broadcast_to(scale / 12, tree["posterior"]["d"].shape)
    posterior, constant = tree["posterior"].to_dataset(), tree["constant_data"].to_dataset()
    posterior["length_scale_time"] = ("chain", "draw", "mode"), length_scale
    constant["time_steps"] = "step", np.ones(TIMES - 1)
    constant.attrs |= {"series": process, "time_step": 1 / 12}
    return xr.DataTree.from_dict({"posterior": posterior, "constant_data": constant})


def ahead(tree: xr.DataTree, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (time, mode) and covariance (mode, time, time) of the series at steps after the record."""
    posterior, attrs = tree["posterior"].to_dataset(), tree["constant_data"].attrs
    process = attrs.get("series", "ar1")
    scale = posterior["autocorrelation"] if process == "ar1" else posterior["length_scale_time"] / attrs["time_step"]
    times = np.append(np.arange(1 - TIMES, 1), places)
    whole = correlation_at(process, scale.values[0, 0][:, None, None], times[:, None] - times)
    gain = np.linalg.solve(whole[:, :TIMES, :TIMES] + 1e-13 * np.eye(TIMES), whole[:, :TIMES, TIMES:]).swapaxes(1, 2)
    mean = np.einsum("kts,sk->tk", gain, posterior["F"].values[0, 0])
    return mean, whole[:, TIMES:, TIMES:] - gain @ whole[:, :TIMES, TIMES:]


def field(tree: xr.DataTree, count: int, seed: int = 5, start: str = "2004-01") -> xr.DataArray:
    """New months of the same process, as the posterior has it, without effects of the record."""
    time = months(count, start)
    last = tree["posterior"]["F"].values[0, 0, -1]
    rng = np.random.default_rng(seed)
    state, rows = last, []
    for _ in range(count):
        state = DECAY * state + np.sqrt(1 - DECAY**2) * rng.standard_normal(2)
        rows.append(state)
    constant = tree["constant_data"].to_dataset()
    later = xr.DataArray(time, dims="time", coords={"time": time})
    design = continue_design(constant["fixed_effects_design"], constant["time"], later)
    values = tree["posterior"]["fixed_effects"].values[0, 0] @ design.T
    values = values + (frame() * SIZE / np.sqrt(WEIGHT)[:, None]) @ np.array(rows).T
    values += NOISE / np.sqrt(WEIGHT)[:, None] * rng.standard_normal(values.shape)
    coords = {"time": time, "cell": np.arange(CELLS), "lat": ("cell", LATITUDES), "lon": ("cell", LONGITUDES)}
    return xr.DataArray(values, dims=("cell", "time"), coords=coords)


def dense(tree: xr.DataTree, new: xr.DataArray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance (time * mode) of the series at steps after the record, given a field, by one big normal."""
    constant = tree["constant_data"].to_dataset()
    design = continue_design(constant["fixed_effects_design"], constant["time"], new["time"])
    rest = new.values - tree["posterior"]["fixed_effects"].values[0, 0] @ design.T
    size = len(places)
    mean, spread = ahead(tree, places)
    cov = np.zeros((size, 2, size, 2))
    cov[:, [0, 1], :, [0, 1]] = spread
    mean, cov = mean.ravel(), cov.reshape(2 * size, 2 * size)
    pattern = frame() * SIZE / np.sqrt(WEIGHT)[:, None]
    rows, values, noise = [], [], []
    for time in range(size):
        for cell in np.flatnonzero(np.isfinite(rest[:, time])):
            row = np.zeros((size, 2))
            row[time] = pattern[cell]
            rows.append(row.ravel())
            values.append(rest[cell, time])
            noise.append(NOISE**2 / WEIGHT[cell])
    seen = np.array(rows)
    gain = np.linalg.solve(seen @ cov @ seen.T + np.diag(noise), seen @ cov).T
    return (mean + gain @ (np.array(values) - seen @ mean)).reshape(size, 2), cov - gain @ seen @ cov


# -- effects and times ------------------------------------------------------------------------------------------------


def axis(values: Any) -> xr.DataArray:
    return xr.DataArray(values, dims="time", coords={"time": values}, name="time")


def test_effects_are_continued_with_the_centre_of_the_fit() -> None:
    whole = axis(months(60))
    terms = ("intercept", "trend", "annual", "semiannual")
    design = effect_design(whole[:48], terms)
    continued = continue_design(design, whole[:48], whole)
    np.testing.assert_allclose(continued[:48], design.values)
    np.testing.assert_allclose(np.diff(continued[:, 1], 2), 0, atol=1e-3)  # months differ in length
    assert continued[:48, 1].mean() == pytest.approx(0, abs=1e-12)
    assert continued[-1, 1] > design.values[-1, 1]
    assert not np.allclose(continued, effect_design(whole, terms).values)  # which would be centred anew


def test_covariates_have_to_be_given_even_where_they_are_named_as_a_term() -> None:
    whole, rng = axis(months(60)), np.random.default_rng(0)
    covariates = {"trend": rng.standard_normal(48), "enso": rng.standard_normal(48)}
    design = effect_design(whole[:48], ("intercept", "trend", "enso"), covariates)
    with pytest.raises(DataError, match="'trend' is a covariate"):
        continue_design(design, whole[:48], whole[48:], {"enso": np.ones(12)})
    with pytest.raises(DataError, match="12 finite values"):
        continue_design(design, whole[:48], whole[48:], {"enso": np.ones(12), "trend": np.ones(11)})
    found = continue_design(design, whole[:48], whole[48:], {"enso": np.ones(12), "trend": np.arange(12.0)})
    np.testing.assert_array_equal(found[:, 1], np.arange(12.0))


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        (months(24), ["2002-01-01", "2002-02-01", "2002-03-01"]),
        (months(13) + np.timedelta64(14, "D"), ["2001-02-15", "2001-03-15", "2001-04-15"]),
        (np.array(["1999-10-31", "1999-11-30", "1999-12-31"], "datetime64[ns]"), ["2000-01-31", "2000-02-29"]),
        (np.array([f"{y}-02-01" for y in range(1990, 2000)], "datetime64[ns]"), ["2000-02-01", "2001-02-01"]),
        (np.datetime64("2000-02-27", "ns") + np.arange(3) * np.timedelta64(1, "D"), ["2000-03-01", "2000-03-02"]),
        (np.arange(5.0) / 2, [2.5, 3.0]),
    ],
)
def test_times_go_on_by_calendar_months_and_years(times: np.ndarray, expected: list[Any]) -> None:
    found = later_times(axis(times), len(expected)).values
    if isinstance(expected[0], str):
        assert [str(date)[:10] for date in found] == expected
    else:
        np.testing.assert_allclose(found, expected)


# -- projection -------------------------------------------------------------------------------------------------------


def compare(draws: np.ndarray, mean: np.ndarray, cov: np.ndarray) -> None:
    """Draws (draw, time, mode) against the moments of a normal, within five Monte Carlo errors."""
    count, flat = len(draws), draws.reshape(len(draws), -1)
    sd = np.sqrt(np.diag(cov))
    assert (np.abs(flat.mean(0) - mean.ravel()) < 5 * sd / np.sqrt(count)).all()
    found = np.cov(flat.T) / np.outer(sd, sd)
    assert np.abs(found - cov / np.outer(sd, sd)).max() < 5 * np.sqrt(2 / count)


CASES = ("complete", "gaps", "skipped months", "after a hole")


@pytest.mark.parametrize(
    ("series", "case"), [*(("ar1", case) for case in CASES), ("matern32", "gaps"), ("matern52", "after a hole")]
)
def test_new_months_have_the_exact_conditional_distribution(series: str, case: str) -> None:
    tree = known() if series == "ar1" else smooth(series)
    new, places = field(tree, 6), np.arange(1, 7)
    if case == "gaps":
        new[:, 0], new[3:, 2], new[:, 5] = np.nan, np.nan, np.nan
    if case in ("skipped months", "after a hole"):
        places = places[[0, 1, 4]] if case == "skipped months" else places[[3, 5]]
        new = new[:, places - 1]
    found = project(tree, new, num_draws=DRAWS)
    assert found.attrs["start"].startswith("the last state")
    compare(found["pc"].values[0], *dense(tree, new, places))


def test_cells_are_matched_by_place_not_by_order() -> None:
    tree = known(num_draws=50)
    new = field(tree, 4)
    order = np.random.default_rng(0).permutation(CELLS)
    moved = new[order].assign_coords(cell=np.arange(CELLS), lon=("cell", LONGITUDES[order] - 360))
    xr.testing.assert_allclose(project(tree, moved), project(tree, new))
    grid = new.drop_vars("cell").set_index(cell=["lat", "lon"]).unstack("cell").transpose("time", "lat", "lon")
    xr.testing.assert_allclose(project(tree, grid), project(tree, new))
    with pytest.raises(DataError, match="lacks 1 of the 9 cells"):
        project(tree, new[1:])


def test_months_of_the_record_start_from_the_stationary_process() -> None:
    tree = known(num_draws=2000)
    empty = field(tree, 3, start="2001-01") * np.nan
    found = project(tree, empty)
    assert found.attrs["start"].startswith("the stationary distribution")
    assert found["pc"].std().item() == pytest.approx(1, abs=0.05)
    np.testing.assert_array_equal(found["residual_ratio"], np.nan)


def test_a_field_that_is_no_anomaly_of_the_fit_is_told() -> None:
    tree = known(num_draws=50)
    new = field(tree, 6)
    assert project(tree, new).attrs["notes"] == ""
    assert float(project(tree, new)["residual_ratio"].mean()) == pytest.approx(1, abs=0.3)
    raw = new + 8 * np.cos(np.arange(CELLS))[:, None]  # a climatology that is still there
    assert "patterns leave more" in project(tree, raw).attrs["notes"]


@pytest.mark.parametrize(("name", "value"), [("units", "K"), ("base_period", "1991-01/2020-12"), ("kind", "absolute")])
def test_fields_of_another_kind_are_refused(name: str, value: str) -> None:
    tree = known(num_draws=50, units="degC", base_period="1950-01/1979-12", kind="anomaly")
    new = field(tree, 3).assign_attrs({name: value})
    with pytest.raises(DataError, match=f"{name}='{value}'"):
        project(tree, new)
    with pytest.raises(DataError, match=f"{name}='{value}'"):
        forecast(tree, 2, new=new, judge=False)


def wrong_fields() -> dict[str, tuple[Any, type[Exception], str]]:
    new = field(known(num_draws=2), 4)
    late = new["time"].values.copy()
    late[2] += np.timedelta64(400, "D")
    numbers = new.assign_coords(time=np.arange(4.0))
    return {
        "repeated": (xr.concat([new, new], "time"), DataError, "repeated"),
        "infinite": (new.where(new < 1, np.inf), DataError, "infinite"),
        "numbers": (numbers, DataError, "new times hold float64"),
        "no time": (new.drop_vars("time"), DataError, "no coordinate 'time'"),
        "other dims": (new.expand_dims("depth"), DataError, "dims"),
        "no array": (new.values, SummaryError, "new="),
    }


@pytest.mark.parametrize("case", list(wrong_fields()))
def test_wrong_fields_are_refused(case: str) -> None:
    new, error, match = wrong_fields()[case]
    with pytest.raises(error, match=match):
        project(known(num_draws=20), new)


# -- forecast ---------------------------------------------------------------------------------------------------------


def test_series_field_and_indices_have_the_exact_moments() -> None:
    tree = known()
    weights = box_weights(tree, "21,25,199,203")
    assert weights.sum() == pytest.approx(1)
    assert (weights > 0).sum() == 4
    found = forecast(tree, 8, indices={"box": weights}, num_draws=DRAWS, keep_draws=True, judge=False)
    last = tree["posterior"]["F"].values[0, 0, -1]
    lead = found["lead"].values[:, None]
    mean, variance = last * DECAY**lead, 1 - DECAY ** (2 * lead)
    error = 5 / np.sqrt(DRAWS)
    assert (np.abs(found["pc_mean"].values.T - mean) < error * np.sqrt(variance)).all()
    np.testing.assert_allclose(found["pc_sd"].values.T ** 2, variance, rtol=5 * np.sqrt(2 / DRAWS))
    constant = tree["constant_data"].to_dataset()
    design = continue_design(constant["fixed_effects_design"], constant["time"], found["time"])
    pattern = frame() * SIZE / np.sqrt(WEIGHT)[:, None]
    centre = tree["posterior"]["fixed_effects"].values[0, 0] @ design.T + pattern @ mean.T  # (cell, time)
    spread = np.einsum("ci,ti,di->tcd", pattern, variance, pattern) + np.diag(NOISE**2 / WEIGHT)
    sd = np.sqrt(np.einsum("tcc->ct", spread))
    cells = found["field_mean"].values.reshape(8, CELLS).T
    assert (np.abs(cells - centre) < error * sd).all()
    np.testing.assert_allclose(found["field_sd"].values.reshape(8, CELLS).T, sd, rtol=5 / np.sqrt(2 * DRAWS))
    own = np.sqrt(np.einsum("c,tcd,d->t", weights, spread, weights))
    assert (np.abs(found["index_mean"][0] - weights @ centre) < error * own).all()
    np.testing.assert_allclose(found["index_sd"][0], own, rtol=5 / np.sqrt(2 * DRAWS))
    levels = stats.norm.cdf((found["pc_quantile"][:, 0, 0] - mean[0, 0]) / np.sqrt(variance[0, 0]))
    np.testing.assert_allclose(levels, found["quantile"], atol=error / 2)
    assert found["field"].dims == ("chain", "draw", "time", "lat", "lon")
    assert str(found["time"].values[0])[:7] == "2004-01"


@pytest.mark.parametrize("process", ["matern32", "matern52"])
def test_smooth_series_go_on_with_their_derivatives(process: str) -> None:
    """Moments of the normal given all values of the record; a forecast from the last value alone would miss them."""
    tree = smooth(process)
    found = forecast(tree, 6, num_draws=DRAWS, field=False, judge=False, keep_draws=True)
    mean, spread = ahead(tree, np.arange(1, 7))
    variance = np.einsum("ktt->tk", spread)
    error = 5 / np.sqrt(DRAWS)
    assert (np.abs(found["pc_mean"].values.T - mean) < error * np.sqrt(variance)).all()
    np.testing.assert_allclose(found["pc_sd"].values.T ** 2, variance, rtol=5 * np.sqrt(2 / DRAWS))
    draws, sd = found["pc"].values[0][:, 0], np.sqrt(variance[:, 0])  # of the first mode
    wrong = (np.cov(draws.T) - spread[0]) / np.outer(sd, sd)
    assert np.abs(wrong).max() < error * np.sqrt(2)
    rho = correlation_at(process, 6.0, 1.0)
    last = tree["posterior"]["F"].values[0, 0, -1, 0]
    assert abs(mean[0, 0] - rho * last) > np.sqrt(variance[0, 0])
    assert found["told"].values[0] == pytest.approx(1 - variance[0].min(), abs=0.02)
    assert "Matérn" in found.attrs["source"]


def test_rounded_draws_still_know_their_derivatives() -> None:
    """Values rounded as in files, of draws that differ: the mean forecast moves by far less than its sd."""
    tree = smooth("matern52", num_draws=500)
    posterior, rng = tree["posterior"].to_dataset(), np.random.default_rng(0)
    posterior["F"] = posterior["F"] + 0.05 * rng.standard_normal((1, 500, 1, 2)) * np.sin(np.arange(TIMES) / 4)[:, None]
    step = 2e-3 * posterior["F"].values.std((0, 1))
    rounded = posterior.assign(F=(posterior["F"] / step).round() * step)
    exact, found = (
        forecast(
            xr.DataTree.from_dict({"posterior": draws, "constant_data": tree["constant_data"].to_dataset()}),
            4,
            num_draws=500,
            field=False,
            judge=False,
        )
        for draws in (posterior, rounded)
    )
    assert (np.abs(found["pc_mean"] - exact["pc_mean"]) < 0.2 * exact["pc_sd"]).all()
    np.testing.assert_allclose(found["pc_sd"], exact["pc_sd"], rtol=0.15)


def test_correlated_noise_persists_and_modes_are_mixtures_of_processes() -> None:
    """Against moments of processes and noise written out; the last time lacks a cell, the one before is complete."""
    rng, tree = np.random.default_rng(3), known(effects=("intercept",))
    turned, _ = np.linalg.qr(rng.standard_normal((CELLS, CELLS)))
    values, share = np.linspace(0.3, 2.0, CELLS), 0.7
    covariance = (turned * values) @ turned.T
    white = (turned / np.sqrt(values)).T
    space = np.linalg.inv(white) @ frame()  # orthonormal where noise is white, not by area
    posterior, constant = tree["posterior"].to_dataset(), tree["constant_data"].to_dataset()
    posterior["U"] = posterior["U"].dims, np.broadcast_to(space, posterior["U"].shape)
    scale = np.sqrt(WEIGHT)
    signal = (space * SIZE) @ posterior["F"].values[0, 0].T / scale[:, None]
    mean = posterior["fixed_effects"].values[0, 0]
    noise = NOISE * np.linalg.cholesky(covariance) @ walk(TIMES, rng, np.full(CELLS, share)).T / scale[:, None]
    constant["data"].values[:] = mean + signal + noise
    constant["data"].values[4, -1] = np.nan
    constant["noise_level"] = "cell", np.sqrt(np.diag(covariance)) / scale
    constant["noise_vectors"] = ("cell", "noise_component"), turned
    constant["noise_values"] = "noise_component", values
    constant.attrs |= {"noise_kernel": "matern12", "noise_length_scale": 1.0, "noise_share": 0.5, "noise_decay": share}
    tree = xr.DataTree.from_dict({"posterior": posterior, "constant_data": constant})
    weights = {"mean": np.full(CELLS, 1 / CELLS)}
    found = forecast(tree, 4, indices=weights, num_draws=DRAWS, keep_draws=True, judge=False)
    last, lead = posterior["F"].values[0, 0, -1], found["lead"].values
    seen = np.arange(CELLS) != 4
    gain = covariance[:, seen] @ np.linalg.inv(covariance[np.ix_(seen, seen)])
    before, last_seen = share * noise[:, -2] * scale, noise[seen, -1] * scale[seen]
    rest = before + gain @ (last_seen - before[seen])
    left = (1 - share**2) * NOISE**2 * (covariance - gain @ covariance[seen])
    pattern = space * SIZE / scale[:, None]
    for place, step in enumerate(lead):
        centre = mean[:, 0] + pattern @ (DECAY**step * last) + share**step * rest / scale
        spread = (pattern * (1 - DECAY ** (2 * step))) @ pattern.T
        own = share ** (2 * step) * left + (1 - share ** (2 * step)) * NOISE**2 * covariance
        spread += own / scale[:, None] / scale
        sd = np.sqrt(np.diag(spread))
        draws = found["field"].values[0, :, place].reshape(DRAWS, CELLS)
        assert (np.abs(draws.mean(0) - centre) < 5 * sd / np.sqrt(DRAWS)).all()
        assert np.abs(np.cov(draws.T) - spread).max() < 6 * np.sqrt(2 / DRAWS) * sd.max() ** 2
        own_sd = np.sqrt(spread.sum()) / CELLS
        assert float(found["index_sd"][0, place]) == pytest.approx(own_sd, rel=5 / np.sqrt(2 * DRAWS))
    with pytest.raises(SummaryError, match="noise='correlated' persists already"):
        forecast(tree, 4, residuals="persistent", judge=False)


@pytest.mark.parametrize("case", ["complete", "a cell without its last value", "new months"])
def test_residuals_that_persist_and_are_alike_in_cells_go_on(case: str) -> None:
    """Against the moments that an AR(1) process of the residuals has, which all cells share but for a part of noise."""
    share, rng, size = 0.8, np.random.default_rng(9), 1500
    tree = known(num_draws=2000, time=months(size, "1880-01"), effects=("intercept",))
    constant = tree["constant_data"].to_dataset()
    noise = rng.standard_normal((CELLS, size))
    common = signal.lfilter([1.0], [1.0, -share], np.sqrt(1 - share**2) * (rng.standard_normal(size) + 0.3 * noise))
    pattern = frame() * SIZE / np.sqrt(WEIGHT)[:, None]
    series = tree["posterior"]["F"].values[0, 0]
    own = 1.0 + 0.1 * np.arange(CELLS)[:, None]
    constant["data"].values[:] = own + pattern @ series.T + common
    last, gone = common[:, -1], np.ones(CELLS)
    new = None
    if case == "a cell without its last value":
        constant["data"].values[0, -1] = np.nan
        last[0], gone[0] = common[0, -2], 2.0
    if case == "new months":
        new = field(tree, 2, start=str(constant["time"].values[-1].astype("datetime64[M]") + 1))
    tree = xr.DataTree.from_dict({"posterior": tree["posterior"].to_dataset(), "constant_data": constant})
    weights = {"mean": np.full(CELLS, 1 / CELLS)}
    options = {"indices": weights, "num_draws": 2000, "keep_draws": True, "judge": False, "beyond": True}
    found = forecast(tree, 3, residuals="persistent", new=new, **options)
    covariance = np.cov(common)
    for place in range(3):
        kept = share ** (place + gone)
        spread = covariance * (1 - np.outer(kept, kept))
        spread = spread + (pattern * (1 - DECAY ** (2 * (place + 1)))) @ pattern.T
        draws = found["field"].values[0, :, place].reshape(-1, CELLS)
        np.testing.assert_allclose(draws.std(0), np.sqrt(np.diag(spread)), rtol=0.1)
        expected = np.sqrt(spread.sum()) / CELLS
        assert float(found["index_sd"][0, place]) == pytest.approx(expected, rel=0.12)
        if new is None:
            centre = own[:, 0] + pattern @ (DECAY ** (place + 1) * series[-1]) + kept * last
            assert (np.abs(draws.mean(0) - centre) < 0.15).all()
    plain = forecast(tree, 3, new=new, **options)
    assert float(found["index_sd"][0, 0]) > 1.2 * float(plain["index_sd"][0, 0])  # cells apart cancel
    np.testing.assert_allclose(found["index_draws"][0, :, 0], found["field"].mean(("lat", "lon"))[0], rtol=1e-4)


def test_a_forecast_starts_from_the_new_months() -> None:
    tree = known()
    new = field(tree, 5)
    new[:, 3] = np.nan
    part = new[:, [0, 2, 3, 4]]  # the second month is skipped
    found = forecast(tree, 2, new=part, num_draws=DRAWS, judge=False, field=False)
    places = np.array([1, 3, 4, 5])
    mean, cov = dense(tree, part, places)
    expected = mean[-1] * DECAY[None] ** np.array([[1], [2]])
    state = np.diag(cov)[-2:]
    variance = DECAY ** (2 * np.array([[1], [2]])) * state + 1 - DECAY ** (2 * np.array([[1], [2]]))
    assert (np.abs(found["pc_mean"].values.T - expected) < 5 * np.sqrt(variance / DRAWS)).all()
    np.testing.assert_allclose(found["pc_sd"].values.T ** 2, variance, rtol=5 * np.sqrt(2 / DRAWS))
    assert str(found["time"].values[0])[:7] == "2004-06"
    assert "field_mean" not in found


def test_ranks_are_uniform_and_show_a_cycle_or_a_break_that_the_model_lacks() -> None:
    tree = known(num_draws=400, effects=("intercept",))
    weights = {"mean": WEIGHT / WEIGHT.sum()}
    found = forecast(tree, 12, indices=weights, keep_draws=True, judge=False, field=False)
    draws = found["index_draws"].sel(index="mean").values[0]  # (draw, time)
    assert list(found["index"].values) == ["mean"]
    truths = np.stack([field_after(tree, seed) for seed in range(150)]) @ weights["mean"]
    ranks = {"as it is": truths, "cycle": truths + 2 * np.cos(2 * np.pi * np.arange(12) / 12), "break": truths + 1.5}
    p = {
        name: stats.kstest((draws[None] < values[:, None]).mean(1)[:, 2], "uniform").pvalue
        for name, values in ranks.items()
    }
    assert p["as it is"] > 0.01
    shifted = {
        name: stats.kstest((draws[None] < ranks[name][:, None]).mean(1)[:, 0], "uniform").pvalue for name in ranks
    }
    assert shifted["cycle"] < 1e-4
    assert shifted["break"] < 1e-4


def field_after(tree: xr.DataTree, seed: int) -> np.ndarray:
    return field(tree, 12, seed=100 + seed).values.T  # (time, cell)


def test_a_record_with_gaps_at_its_end_and_holes_can_be_forecast() -> None:
    rng = np.random.default_rng(0)
    time = months(60)
    series = walk(60, rng)
    values = (frame() * SIZE) @ series.T + 0.3 * rng.standard_normal((CELLS, 60))
    values[2:, 56:] = np.nan
    keep = np.r_[0:20, 23:60]
    coords = {"cell": np.linspace(0, 1, CELLS), "time": time[keep]}
    data = xr.DataArray(values[:, keep], dims=("cell", "time"), coords=coords)
    problem = make_problem(data, rank=2, series="ar1", length_scales_space=[0.3], area_weights=False, tail=0.0)
    result = run_mcmc(problem, num_samples=60, warmup_steps=40, num_chains=2, progress=False, chain_method="sequential")
    found = forecast(result, 3)
    assert np.isfinite(found["field_mean"]).all()
    assert str(found["time"].values[0])[:7] == "2005-01"
    assert found.attrs["verdict"] != "not judged"
    assert "FAILED" in found.attrs["verdict"]  # sixty draws are too few
    assert found.attrs["verdict"] in found.attrs["notes"]
    with pytest.raises(SummaryError, match="without holes"):
        forecast(result, 3, transition="lags", lags=[1, 2])
    figure = fan_charts(result, found)
    assert len(figure.axes) == 2
    assert "FAILED" in figure.get_suptitle()


def bad_trees() -> dict[str, tuple[xr.DataTree, dict[str, Any], str]]:
    small = known(num_draws=20)
    frame_tree = known(num_draws=20)
    frame_tree["posterior"] = frame_tree["posterior"].to_dataset().rename(F="V", time="basis_time")
    lost = known(num_draws=20)
    lost["posterior"] = lost["posterior"].to_dataset().drop_vars("fixed_effects")
    free = known(num_draws=20, decay=np.zeros(2))
    return {
        "no steps": (small, {"steps": 0}, "steps=0"),
        "a text": (small, {"steps": "3"}, "steps='3'"),
        "too many": (small, {"steps": 10**30}, "steps="),
        "trend too far": (known(num_draws=20, decay=np.array([0.97, 0.5])), {"steps": 30}, "take at most 23"),
        "nothing told": (known(num_draws=20, effects=("intercept",)), {"steps": 40}, "take at most 21 steps"),
        "frame": (frame_tree, {"steps": 3}, "series='frame'"),
        "no effects": (lost, {"steps": 3}, "lacks the fixed effects"),
        "lags unused": (small, {"steps": 3, "lags": [1, 2]}, "not used with transition='ar1'"),
        "lags without 1": (small, {"steps": 3, "transition": "lags", "lags": [2, 3]}, "1 among them"),
        "lags too long": (small, {"steps": 3, "transition": "lags", "lags": [1, 24]}, "at least 96 times"),
        "lags of none": (free, {"steps": 3, "transition": "lags", "lags": [1, 2]}, "independent in time"),
        "no residuals": (
            known(num_draws=20, time=months(24)),
            {"steps": 3, "residuals": "persistent"},
            "30 pairs of neighbouring times; the record has 23",
        ),
        "strange residuals": (small, {"steps": 3, "residuals": "white"}, "residuals='white'"),
        "weights": (small, {"steps": 3, "indices": {"x": np.ones(4)}}, "9 finite weights"),
        "zero weights": (small, {"steps": 3, "indices": {"x": np.zeros(CELLS)}}, "all zero"),
        "unknown covariate": (small, {"steps": 3, "covariates": {"enso": [1, 2, 3]}}, "no effects of this result"),
        "quantile": (small, {"steps": 3, "quantiles": [1.5]}, "quantiles="),
        "old months": (small, {"steps": 3, "new": field(small, 3, start="2003-11")}, "not after the record"),
    }


@pytest.mark.parametrize("case", list(bad_trees()))
def test_what_cannot_be_forecast_is_refused(case: str) -> None:
    tree, options, match = bad_trees()[case]
    with pytest.raises((SummaryError, DataError), match=match):
        forecast(tree, **{"judge": False, **options})


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"steps": 40}, "take at most 21 steps"),
        ({"steps": 3, "transition": "coupled", "lags": [1, 24]}, "at least 96 times"),
        ({"steps": 3, "covariates": {"enso": [1, 2, 3]}}, "must hold 8 values"),
        ({"steps": 3, "covariates": {"enso": np.ones(8)}}, "no effects of this result"),
    ],
)
def test_refusals_come_before_new_months_are_projected(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], match: str
) -> None:
    monkeypatch.setattr(forecasting, "series_of", lambda *_, **__: pytest.fail("projected before all was checked"))
    tree = known(num_draws=20)
    with pytest.raises((SummaryError, DataError), match=match):
        forecast(tree, new=field(tree, 5), judge=False, **options)


def test_dates_beyond_the_calendar_are_refused() -> None:
    with pytest.raises(SummaryError, match="beyond the calendar"):
        forecast(known(num_draws=4), 5000, beyond=True, judge=False)


def test_times_that_are_no_whole_steps_apart_are_refused() -> None:
    times = np.cumsum(np.r_[1.0, np.ones(30), 0.5, np.ones(10)])
    tree = known(num_draws=20, time=times, effects=("intercept",))
    with pytest.raises(SummaryError, match="no whole number of steps"):
        forecast(tree, 3, judge=False)


def test_further_and_independent_series_are_allowed_when_asked_and_said() -> None:
    tree = known(num_draws=200, effects=("intercept",))
    found = forecast(tree, 40, judge=False, beyond=True)
    assert float(found["told"][-1]) < 0.01
    assert found["told"].values[:2] == pytest.approx(DECAY.max() ** np.array([2, 4]))
    free = forecast(known(num_draws=200, decay=np.zeros(2), effects=("intercept",)), 40, judge=False)
    assert "independent in time" in free.attrs["notes"]


# -- lags -------------------------------------------------------------------------------------------------------------


def test_lags_find_a_memory_that_one_lag_lacks_and_none_where_there_is_none() -> None:
    rng = np.random.default_rng(0)
    size, lags = 1200, (1, 2, 12)
    long = np.zeros(size)
    for time in range(12, size):
        long[time] = 0.5 * long[time - 1] + 0.35 * long[time - 12] + rng.standard_normal()
    long /= long.std()
    short = walk(size, rng, np.array([0.8]))[:, 0]
    series = np.broadcast_to(np.stack([long, short], axis=1), (500, size, 2))
    decay = np.broadcast_to([np.corrcoef(long[1:], long[:-1])[0, 1], 0.8], (500, 2))
    coefficients, sd = draw_lags(rng, series, decay, lags)
    mean, spread = coefficients.mean(0), coefficients.std(0)
    assert (np.abs(mean - [[0.5, 0.0, 0.35], [0.8, 0.0, 0.0]]) < 4 * spread + 0.03).all()
    assert spread.max() < 0.06
    assert sd[:, 1].mean() == pytest.approx(0.6, abs=0.05)
    ahead = follow_lags(rng, series, coefficients, sd, lags, 400)
    assert ahead[:, -1].std(0) == pytest.approx([1, 1], abs=0.25)  # stationary


def test_coefficients_have_the_conjugate_posterior() -> None:
    """Against the normal-inverse-gamma written out for one series."""
    rng = np.random.default_rng(1)
    y, rho = walk(80, rng, np.array([0.6]))[:, 0], 0.6
    x, now = np.stack([y[1:-1], y[:-2]], axis=1), y[2:]
    prior, centre = np.diag([20.0, 40.0]), np.array([rho, 0.0])
    precision = x.T @ x + prior
    mean = np.linalg.solve(precision, x.T @ now + prior @ centre)
    shape = (10 + len(now)) / 2
    rest = now @ now + centre @ prior @ centre - mean @ precision @ mean
    rate = (10 * (1 - rho**2) + rest) / 2
    series = np.broadcast_to(y[:, None], (20_000, 80, 1))
    found, sd = draw_lags(rng, series, np.full((20_000, 1), rho), (1, 2))
    variance = rate / (shape - 1) * np.linalg.inv(precision)
    assert (np.abs(found[:, 0].mean(0) - mean) < 5 * np.sqrt(np.diag(variance) / 20_000)).all()
    np.testing.assert_allclose(np.cov(found[:, 0].T), variance, rtol=0.05, atol=1e-4)
    assert (sd**2).mean() == pytest.approx(rate / (shape - 1), rel=0.02)


# -- files and figures ------------------------------------------------------------------------------------------------


# -- coupled ----------------------------------------------------------------------------------------------------------

TURN = 0.9 * np.array([[np.cos(0.5), -np.sin(0.5)], [np.sin(0.5), np.cos(0.5)]])  # one series hands on to the other


def turning(rng: np.random.Generator, draws: int, size: int) -> np.ndarray:
    """Two series of unit variance, either of which follows both."""
    found = np.empty((draws, size, 2))
    now = rng.standard_normal((draws, 2))
    for time in range(size):
        now = now @ TURN.T + np.sqrt(1 - 0.81) * rng.standard_normal((draws, 2))
        found[:, time] = now
    return found


def test_series_that_follow_others_are_found_and_none_where_there_are_none() -> None:
    rng = np.random.default_rng(5)
    size = 2000
    series = turning(rng, 200, size)
    decay = np.full((200, 2), 0.8)
    found = draw_coupled(rng, series, decay, (1, 2))
    others = np.stack([found.others[:, 0, 1], found.others[:, 1, 0]])
    np.testing.assert_allclose(others.mean(1), [TURN[0, 1], TURN[1, 0]], atol=0.05)  # the prior draws to zero by 5 %
    assert not np.diagonal(found.others, axis1=1, axis2=2).any()
    apart = draw_coupled(rng, persistent_pair(rng, 400, 300), decay[:1], (1,)).others
    values = np.concatenate([apart[:, 0, 1], apart[:, 1, 0]])
    assert abs(values.mean()) < 5 * values.std() / np.sqrt(800)
    assert values.std() < 1.6 * np.sqrt(2 * (1 - 0.64) / 400)  # of estimate and of posterior, and no more


def persistent_pair(rng: np.random.Generator, draws: int, size: int) -> np.ndarray:
    noise = rng.standard_normal((draws, size, 2))
    noise[:, 1:] *= 0.6
    return signal.lfilter([1.0], [1.0, -0.8], noise, axis=1)


def test_forecasts_of_coupled_series_have_the_moments_of_their_process() -> None:
    """Few parameters are in doubt where the past is long; then the forecast is that of the true process."""
    rng = np.random.default_rng(6)
    past = np.broadcast_to(turning(rng, 1, 6000), (4000, 6000, 2))[:, -3000:]
    process = draw_coupled(rng, past[:20], np.full((20, 2), 0.8), (1, 2))
    tiled = Coupled(
        [1, 2], *(np.tile(x, (200, *(1,) * (x.ndim - 1))) for x in (process.own, process.others, process.sd))
    )
    ahead = follow_coupled(rng, past, tiled, 4)
    last, power, spread = past[0, -1], np.eye(2), np.zeros((2, 2))
    for step in range(4):
        power, spread = TURN @ power, TURN @ spread @ TURN.T + (1 - 0.81) * np.eye(2)
        np.testing.assert_allclose(ahead[:, step].mean(0), power @ last, atol=0.12)
        np.testing.assert_allclose(np.cov(ahead[:, step].T), spread, atol=0.08)
    _, sd = draw_lags(rng, past[:20], np.full((20, 2), 0.8), (1, 2))
    assert sd.mean() > 1.1 * process.sd.mean()  # what each alone cannot tell


def test_no_draw_of_coupled_series_explodes() -> None:
    rng = np.random.default_rng(7)
    walks = np.cumsum(0.3 * rng.standard_normal((300, 60, 3)), axis=1)
    found = draw_coupled(rng, walks, np.full((300, 3), 0.97), (1, 2, 3))
    assert not found.explode().any()
    ahead = follow_coupled(rng, walks, found, 400)
    assert np.isfinite(ahead).all()
    assert np.median(np.abs(ahead[:, -1])) < 50
    wild = Coupled([1], np.full((1, 2, 1), 1.02), np.zeros((1, 2, 2)), np.ones((1, 2)))
    assert wild.explode().all()


def test_the_table_and_the_file_hold_what_was_forecast(tmp_path: Path) -> None:
    tree = known(num_draws=100, units="degC")
    weights = {"box": box_weights(tree, "19,25,199,205")}
    found = forecast(tree, 4, indices=weights, judge=False)
    table = forecast_table(found, tmp_path / "below" / "table.csv")
    assert list(table["name"].unique()) == ["pc1", "pc2", "box"]
    assert len((tmp_path / "below" / "table.csv").read_text().splitlines()) == 1 + 3 * 4
    assert table.query("name == 'box' and lead == 2")["q97.5"].item() == float(found["index_quantile"][-1, 0, 1])
    with xr.open_dataset(write_modes(found, tmp_path / "f.nc")) as read:
        xr.testing.assert_allclose(read["field_mean"].astype(float), found["field_mean"], rtol=1e-5)
        assert read["field_mean"].attrs["units"] == "degC"
        assert read.attrs["verdict"] == "not judged"
        assert str(read["index"].values[0]) == "box"
    with xr.open_dataset(write_modes(project(tree, field(tree, 3)), tmp_path / "p.nc")) as read:
        assert read["pc_mean"].dims == ("mode", "time")
    figure = fan_charts(tree, found, indices=weights)
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["PC 1", "PC 2", "box"]
    shown = figure.axes[2].lines[1].get_ydata()  # the record
    expected = weights["box"] @ tree["constant_data"]["data"].values
    np.testing.assert_allclose(shown, expected)
    with pytest.raises(SummaryError, match="lacks the quantiles"):
        fan_charts(tree, forecast(tree, 2, quantiles=[0.5], judge=False))


def test_the_same_seed_gives_the_same_forecast_and_chains_are_thinned_alike() -> None:
    tree = known(num_draws=300, chains=3)
    first, again = (forecast(tree, 2, num_draws=90, judge=False, keep_draws=True, seed=4) for _ in range(2))
    xr.testing.assert_identical(first, again)
    assert first["pc"].sizes["chain"] == 3
    assert first["pc"].sizes["draw"] == 30
    assert not np.allclose(first["pc"], forecast(tree, 2, num_draws=90, judge=False, keep_draws=True, seed=5)["pc"])


# -- command line -----------------------------------------------------------------------------------------------------


def raw_months(count: int, seed: int = 3) -> xr.DataArray:
    """Temperatures with an annual cycle, of which those of more months begin with those of fewer."""
    rng = np.random.default_rng(seed)
    steps, series = rng.standard_normal((200, 3, 4)), walk(200, np.random.default_rng(seed + 1))
    pattern = np.random.default_rng(seed + 2).standard_normal((2, 3, 4))
    cycle = 15 + 5 * np.cos(2 * np.pi * np.arange(200) / 12)
    values = cycle[:, None, None] + np.einsum("tk,kij->tij", series, pattern) + 0.3 * steps
    coords = {"time": months(count, "1990-01"), "lat": [20.0, 25.0, 30.0], "lon": [170.0, 175.0, 180.0, 185.0]}
    attrs = {"units": "degC", "standard_name": "sea_surface_temperature"}
    return xr.DataArray(values[:count], dims=("time", "lat", "lon"), coords=coords, name="sst", attrs=attrs)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a field, the same with eight more months, and a result of the first."""
    folder = tmp_path_factory.mktemp("run")
    raw_months(96).to_netcdf(folder / "field.nc")
    raw_months(104).to_netcdf(folder / "later.nc")
    revised = raw_months(104)
    revised.values += 0.5 * np.sin(np.arange(104))[:, None, None]
    revised.to_netcdf(folder / "revised.nc")
    raw_months(104)[90:].to_netcdf(folder / "new_alone.nc")
    spec = load_spec(
        {
            "method": "bayesian_svd",
            "data": {"name": "sst", "path": str(folder / "field.nc")},
            "model": {"rank": 2, "series": "ar1", "fixed_effects": ["intercept", "trend"]},
            "inference": {"num_samples": 150, "warmup_steps": 100, "num_chains": 2, "chain_method": "sequential"},
            "output": {"path": str(folder / "result")},
        }
    )
    run_engine(spec, build_problem(spec, load_data(spec)), progress=False).save(folder / "result")
    return folder


def test_a_file_of_new_months_has_the_climatology_of_the_fit(run: Path) -> None:
    result = Result.load(run / "result")
    new = read_new(result, str(run / "later.nc"))
    assert [str(x)[:7] for x in new["time"].values[[0, -1]]] == ["1998-01", "1998-08"]
    raw = raw_months(104)
    climatology = np.stack([raw[month:96:12].mean("time") for month in range(12)])
    expected = raw.values[96:] - climatology[np.arange(8) % 12]
    np.testing.assert_allclose(new.values.T, expected.reshape(8, 12), atol=1e-9)
    for name, match in (
        ("field.nc", "not after the record"),
        ("revised.nc", "differ from it"),
        ("new_alone.nc", "base period is that of the fit, 1990-01/1997-12"),
    ):
        with pytest.raises(DataError, match=match):
            read_new(result, str(run / name))


def test_commands_write_forecasts_and_projections(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def command(*arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["probmodels", *arguments])
        with pytest.raises(SystemExit) as left:
            cli.main()
        said = capsys.readouterr()
        assert left.value.code in (0, None), said.err
        return said.out

    result, later = str(run / "result"), str(run / "later.nc")
    said = command("project", result, later, f"--out={run}/p.nc")
    assert "Diagnostics" in said
    with xr.open_dataset(run / "p.nc") as found:
        assert found.sizes["time"] == 8
        assert found.attrs["start"] == "the last state of the record"
        assert found.attrs["notes"] == ""
        assert float(found["residual_ratio"].max()) < 1.5
    files = [f"--out={run}/f.nc", f"--table={run}/f.csv", f"--figure={run}/f.png"]
    said = command(
        "forecast", result, *files, f"--new={later}", "--steps=6", "--box=middle=22.5,27.5,172.5,182.5", "--lags"
    )
    also = command("forecast", result, f"--out={run}/g.nc", "--steps=6", "--coupled", "--residuals", f"--new={later}")
    assert "pc1" in also
    assert "middle" in said
    assert (run / "f.png").stat().st_size > 10_000
    assert (run / "f.csv").read_text().startswith("name,time,lead,mean,sd,q2.5")
    with xr.open_dataset(run / "g.nc") as found:
        assert "lags [1, 2, 3, 6, 12] and on all series" in found.attrs["source"]
        assert found.attrs["residuals"] == "persistent"
    with xr.open_dataset(run / "f.nc") as found:
        assert found.attrs["residuals"] == "noise"
        assert str(found["time"].values[0])[:7] == "1998-09"
        assert found["field_mean"].dims == ("time", "lat", "lon")
        assert "lags [1, 2, 3, 6, 12]" in found.attrs["source"]
        middle = found["field_mean"].sel(lat=25, lon=[175, 180]).mean("lon")
        spread = float(found["index_sd"].max())
        np.testing.assert_allclose(found["index_mean"].sel(index="middle"), middle, atol=5 * spread / np.sqrt(300))
