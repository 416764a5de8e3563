"""New months under correlated noise: against one dense normal, coverage of the true series, and what differs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from typer.testing import CliRunner

from probmodels import run_mcmc
from probmodels.bayesian_svd import make_problem
from probmodels.bayesian_svd.draws import read_draws
from probmodels.bayesian_svd.forecasts.forecasting import forecast
from probmodels.bayesian_svd.forecasts.projection import noise_after, project, read_record, series_of
from probmodels.cli import app
from probmodels.distributions.processes import correlation_at
from probmodels.spec import build_problem, load_data, load_spec, run_engine

DECAY, SIZE, SIGMA, PERSISTENCE = np.array([0.9, 0.4]), np.array([2.0, 1.2]), 0.7, 0.6
CELLS, TIMES = 6, 9
SCALES = {"ar1": DECAY, "matern32": np.array([6.0, 1.5]), "matern52": np.array([5.0, 2.0])}
WEIGHT = np.linspace(0.7, 1.3, CELLS)


def months(count: int, start: str = "2000-01") -> np.ndarray:
    return (np.datetime64(start, "M") + np.arange(count)).astype("datetime64[ns]")


def parts(cells: int = CELLS) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Eigenvectors and eigenvalues of the covariance of noise, and patterns that are orthonormal where it is white."""
    rng = np.random.default_rng(1)
    vectors, _ = np.linalg.qr(rng.standard_normal((cells, cells)))
    values = np.linspace(0.2, 2.0, cells)
    frame, _ = np.linalg.qr(rng.standard_normal((cells, 2)))
    return vectors, values, (vectors * np.sqrt(values)) @ frame


def covariance() -> np.ndarray:
    vectors, values, _ = parts()
    return (vectors * values) @ vectors.T


def walk(rng: np.random.Generator, size: int, decay: np.ndarray, root: np.ndarray) -> np.ndarray:
    """AR(1) processes (time, process) with a stationary covariance of that root."""
    out = rng.standard_normal((size, len(root))) @ root.T
    for time in range(1, size):
        out[time] = decay * out[time - 1] + np.sqrt(1 - decay**2) * out[time]
    return out


def simulated(
    seed: int, later: int, gaps: tuple[tuple[Any, Any], ...] = (), process: str = "ar1"
) -> tuple[xr.DataTree, xr.DataArray, Any]:
    """A posterior of one draw that knows all parameters, a new field, and its true processes."""
    rng, (vectors, values, space) = np.random.default_rng(seed), parts()
    lag = np.abs(np.subtract.outer(np.arange(TIMES + later), np.arange(TIMES + later)))
    roots = [np.linalg.cholesky(correlation_at(process, scale, lag)) for scale in SCALES[process]]
    series = np.stack([root @ rng.standard_normal(TIMES + later) for root in roots], axis=1)
    noise = SIGMA * walk(rng, TIMES + later, np.full(CELLS, PERSISTENCE), vectors * np.sqrt(values))
    field = (1.0 + ((space * SIZE) @ series.T + noise.T)) / np.sqrt(WEIGHT)[:, None]
    for cell, time in gaps:
        field[cell, time] = np.nan
    posterior = {
        "U": (("basis_space", "mode"), space),
        "F": (("time", "mode"), series[:TIMES]),
        "d": ("mode", SIZE),
        "sigma": ((), SIGMA),
        "autocorrelation": ("mode", correlation_at(process, SCALES[process], 1.0)),
        "fixed_effects": (("cell", "effect"), 1.0 / np.sqrt(WEIGHT)[:, None]),
    }
    if process != "ar1":
        posterior["length_scale_time"] = "mode", SCALES[process] / 12
    time = months(TIMES + later)
    constant = xr.Dataset(
        {
            "data": (("cell", "time"), field[:, :TIMES]),
            "weight": ("cell", WEIGHT),
            "basis_space_matrix": (("cell", "basis_space"), np.eye(CELLS)),
            "fixed_effects_design": (("time", "effect"), np.ones((TIMES, 1))),
            "noise_level": ("cell", np.sqrt(np.diag(covariance()) / WEIGHT)),
            "noise_vectors": (("cell", "noise_component"), vectors),
            "noise_values": ("noise_component", values),
        },
        coords={"time": time[:TIMES], "cell": np.arange(CELLS), "effect": ["intercept"]},
        attrs={"noise_kernel": "m", "noise_length_scale": 1.0, "noise_share": 0.5, "noise_decay": PERSISTENCE}
        | {"series": process, "time_step": 1 / 12},
    )
    tree = xr.DataTree.from_dict({"posterior": xr.Dataset(posterior), "constant_data": constant})
    new = xr.DataArray(field[:, TIMES:], dims=("cell", "time"), coords={"time": time[TIMES:], "cell": np.arange(CELLS)})
    return tree, new, series[TIMES:]


def repeated(tree: xr.DataTree, num_draws: int) -> xr.DataTree:
    posterior = tree["posterior"].to_dataset().expand_dims(chain=1, draw=num_draws)
    return xr.DataTree.from_dict({"posterior": posterior, "constant_data": tree["constant_data"].to_dataset()})


def dense(
    tree: xr.DataTree, new: xr.DataArray, places: np.ndarray, *, follows: bool = True, process: str = "ar1"
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Mean and covariance of the processes at new months, and of the noise of all months, from one big normal."""
    constant, space = tree["constant_data"].to_dataset(), parts()[2] * SIZE
    root = np.sqrt(WEIGHT)[:, None]
    state = tree["posterior"]["F"].values
    record = constant["data"].values * root - 1.0 - space @ state.T
    rest = new.values * root - 1.0
    times = np.r_[np.arange(TIMES), TIMES - 1 + places] if follows else TIMES - 1 + places
    own = PERSISTENCE ** np.abs(np.subtract.outer(times, times))
    noise = SIGMA**2 * np.kron(own, covariance())  # one month after the other
    count, mode = len(places), []
    centres = np.zeros((count, 2))
    for number, scale in enumerate(SCALES[process]):  # given the whole record of the series where they follow it
        every = np.r_[np.arange(TIMES) - (TIMES - 1), places] if follows else places
        whole = correlation_at(process, scale, np.abs(np.subtract.outer(every, every)))
        past = len(every) - count
        gain = np.linalg.solve(whole[:past, :past], whole[:past, past:]).T
        mode.append(whole[past:, past:] - gain @ whole[:past, past:])
        if follows:
            centres[:, number] = gain @ state[:, number]
    prior = np.einsum("ktu,kj->tkuj", np.array(mode), np.eye(2)).reshape(2 * count, 2 * count)
    centre = centres.ravel()
    whole = np.block(
        [[prior, np.zeros((2 * count, len(noise)))], [np.zeros((len(noise), 2 * count)), noise]]
    )  # series, then noise
    centre = np.r_[centre, np.zeros(len(noise))]
    past = len(noise) // CELLS - count
    rows = np.concatenate([np.zeros((past * CELLS, 2 * count)), np.kron(np.eye(count), space)])
    rows = np.concatenate([rows, np.eye(len(noise))], axis=1)
    values = np.concatenate([record.T.ravel() if past else [], rest.T.ravel()])
    seen = np.isfinite(values)
    rows, values = rows[seen], values[seen]
    gain = np.linalg.solve(rows @ whole @ rows.T, rows @ whole).T
    mean, spread = centre + gain @ (values - rows @ centre), whole - gain @ rows @ whole
    return mean[: 2 * count].reshape(count, 2), spread[: 2 * count, : 2 * count], mean[2 * count :], spread


class Fixed:
    """A source of normals that gives no, one and then each other unit, so that draws are their mean and a root."""

    def __init__(self, sizes: list[tuple[int, ...]], num_draws: int) -> None:
        self.sizes, self.units = sizes, np.eye(num_draws)[:, 1:]
        self.place, self.draw = 0, 0
        self.each = sum(size[0] for size in sizes if len(size) == 1) // num_draws

    def standard_normal(self, shape: int | tuple[int, ...]) -> np.ndarray:
        if isinstance(shape, tuple):
            size = math.prod(shape[1:])
            found = self.units[:, self.each + self.place : self.each + self.place + size]
            self.place += size
            return found.reshape(shape)
        found = self.units[self.draw, self.place : self.place + shape]
        self.place += shape
        if self.place == self.each:
            self.draw, self.place = self.draw + 1, 0
        return found


class Recording:
    """Sizes of the normals that are asked for."""

    def __init__(self) -> None:
        self.sizes: list[tuple[int, ...]] = []

    def standard_normal(self, shape: int | tuple[int, ...]) -> np.ndarray:
        self.sizes.append((shape,) if isinstance(shape, int) else shape)
        return np.zeros(shape)


CASES: dict[str, tuple[tuple[tuple[Any, Any], ...], list[int], bool]] = {
    "complete": ((), [1, 2, 3, 4], True),
    "gaps": (((0, TIMES), (slice(2, 5), TIMES + 1), (0, TIMES + 1), (5, TIMES + 2)), [1, 2, 3, 4], True),
    "gaps at the end of the record": (((1, TIMES - 1), (4, slice(TIMES - 4, TIMES + 1))), [1, 2, 3], True),
    "a cell that is never seen": (((3, slice(TIMES)), (2, slice(TIMES, None))), [1, 2, 3], True),
    "the record ends empty": (((slice(None), slice(TIMES - 2, TIMES)), (0, TIMES)), [1, 2], True),
    "skipped months": (((0, TIMES + 1),), [2, 5, 6], True),
    "an empty month": (((slice(None), TIMES + 1), (1, TIMES + 2), (slice(None), TIMES + 3)), [1, 2, 3, 4], True),
    "not after the record": (((0, TIMES), (slice(None), TIMES + 1)), [-3, -2, -1], False),
}


@pytest.mark.parametrize("process", list(SCALES))
@pytest.mark.parametrize("case", list(CASES))
def test_new_months_have_the_conditional_of_one_dense_normal(case: str, process: str) -> None:
    gaps, steps, follows = CASES[case]
    tree, new, _ = simulated(0, len(steps), gaps, process)
    places = np.array(steps, dtype=float)
    new = new.assign_coords(time=(np.datetime64("2000-09", "M") + np.array(steps)).astype("datetime64[ns]"))
    probe = Recording()
    series_of(read_record(repeated(tree, 1), 1), new, None, probe)  # type: ignore[arg-type]
    size = sum(math.prod(shape[1:]) if len(shape) > 1 else shape[0] for shape in probe.sizes)
    record = read_record(repeated(tree, size + 1), size + 1)
    sizes = [shape for shape in probe.sizes if len(shape) == 1] * (size + 1)
    found = series_of(record, new, None, Fixed(sizes, size + 1))  # type: ignore[arg-type]
    assert found.follows is follows
    draws = found.processes.reshape(size + 1, -1)
    mean, spread, *_ = dense(tree, new, places, follows=follows, process=process)
    np.testing.assert_allclose(draws[0], mean.ravel(), atol=1e-8)
    root = (draws[1:] - draws[0]).T
    np.testing.assert_allclose(root @ root.T, spread, atol=1e-8)
    assert np.abs(spread - np.diag(np.diag(spread))).max() > 1e-3  # the dense covariance has something to show


@pytest.mark.parametrize("later", [0, 3])
def test_noise_of_the_last_month_is_that_of_the_dense_normal(later: int) -> None:
    gaps = ((1, TIMES - 1), (4, slice(3, TIMES + later)), (0, TIMES + later - 1), (2, 5))
    tree, new, true = simulated(1, later, gaps)
    record = read_record(repeated(tree, 1), 1)
    found = None
    if later:
        found = series_of(record, new, None, np.random.default_rng(0))
        found.processes[0] = true  # given the series, so that both condition on the same
    noise = noise_after(record, found)
    own = PERSISTENCE ** np.abs(np.subtract.outer(np.arange(TIMES + later), np.arange(TIMES + later)))
    whole = np.kron(own, covariance())
    data = np.concatenate([tree["constant_data"]["data"].values, new.values], axis=1) * np.sqrt(WEIGHT)[:, None] - 1.0
    series = np.concatenate([tree["posterior"]["F"].values, true])
    rest = (data - (parts()[2] * SIZE) @ series.T).T.ravel()
    seen = np.isfinite(rest)
    gain = whole[:, seen] @ np.linalg.inv(whole[np.ix_(seen, seen)])
    np.testing.assert_allclose(noise.mean[0], (gain @ rest[seen])[-CELLS:], atol=1e-8)
    np.testing.assert_allclose(noise.covariance, (whole - gain @ whole[seen])[-CELLS:, -CELLS:], atol=1e-8)
    draws = noise.drawn(np.random.default_rng(0), np.array([2.0]))
    np.testing.assert_array_equal(draws[0][noise.seen], noise.mean[0][noise.seen])
    assert (draws[0][~noise.seen] != noise.mean[0][~noise.seen]).all()


def test_intervals_hold_the_true_series_closer_than_under_white_noise() -> None:
    held, errors = [], {"correlated": 0.0, "white": 0.0}
    for seed in range(60):
        tree, new, true = simulated(seed, 6, ((0, TIMES + 1), (4, TIMES), (4, TIMES + 1)))
        tree = repeated(tree, 120)
        turn = read_draws(tree).turn
        assert turn is not None
        found, modes = project(tree, new, num_draws=120, seed=seed), true @ turn[0]
        held.append((modes > found["pc_lower"].values.T) & (modes < found["pc_upper"].values.T))
        errors["correlated"] += float(np.sum((found["pc_mean"].values.T - modes) ** 2))
        constant = tree["constant_data"].to_dataset().drop_vars(["noise_level", "noise_vectors", "noise_values"])
        white = xr.DataTree.from_dict({"posterior": tree["posterior"].to_dataset(), "constant_data": constant})
        errors["white"] += float(np.sum((project(white, new, num_draws=120)["pc_mean"].values.T - true) ** 2))
    assert np.mean(held) == pytest.approx(0.94, abs=0.03)  # 120 draws give intervals of about .94
    assert errors["correlated"] < 0.9 * errors["white"]


def test_a_residual_of_the_size_of_the_noise_is_told_from_a_larger_one() -> None:
    tree, new, _ = simulated(3, 40, ((2, TIMES + 3),))
    tree = repeated(tree, 100)
    found = project(tree, new)
    assert float(found["residual_ratio"].mean()) == pytest.approx(1, abs=0.15)
    assert float((found["residual_ratio"] > 1.5).mean()) < 0.1  # six cells vary more than fields do
    assert "patterns leave more" in project(tree, new + 9 * np.cos(3 * np.arange(CELLS))[:, None]).attrs["notes"]


def test_a_forecast_from_new_months_is_that_from_a_longer_record() -> None:
    """Months whose series are known leave the noise of the last of them; noise of the record is forgotten."""
    tree, new, _ = simulated(4, 3)
    tree = repeated(tree, 1500)
    found = forecast(tree, 2, new=new, num_draws=1500, keep_draws=True, judge=False)
    mean, _, noise, whole = dense(tree_of_one(tree), new, np.array([1.0, 2.0, 3.0]))
    space, root = parts()[2] * SIZE, np.sqrt(WEIGHT)
    last = np.r_[4:6, len(whole) - CELLS : len(whole)]  # series and noise of the last new month
    joint, centre = whole[np.ix_(last, last)], np.r_[mean[-1], noise[-CELLS:]]
    kept = np.r_[DECAY, np.full(CELLS, PERSISTENCE)]
    onward = np.concatenate([space, np.eye(CELLS)], axis=1) / root[:, None]
    fresh = np.zeros_like(joint)
    fresh[:2, :2] = np.diag(1 - DECAY**2)
    fresh[2:, 2:] = SIGMA**2 * (1 - PERSISTENCE**2) * covariance()
    expected = 1 / root + onward @ (kept * centre)
    cov = onward @ (kept[:, None] * joint * kept + fresh) @ onward.T
    draws = found["field"].values.reshape(1500, 2, CELLS)[:, 0]
    assert (np.abs(draws.mean(0) - expected) < 5 * np.sqrt(np.diag(cov) / 1500)).all()
    assert np.abs(np.cov(draws.T) - cov).max() < 6 * np.sqrt(2 / 1500) * np.diag(cov).max()


def tree_of_one(tree: xr.DataTree) -> xr.DataTree:
    posterior = tree["posterior"].to_dataset().isel(chain=0, draw=0)
    return xr.DataTree.from_dict({"posterior": posterior, "constant_data": tree["constant_data"].to_dataset()})


@pytest.mark.slow
def test_held_out_months_of_a_fit_are_held_by_their_intervals() -> None:
    rng, cells, size = np.random.default_rng(5), 12, 190
    places = np.linspace(0, 1, cells)
    root = np.linalg.cholesky(np.exp(-np.abs(np.subtract.outer(places, places)) / 0.15))
    pattern = np.stack([np.cos(np.pi * places), np.sin(2 * np.pi * places)], axis=1) * [2.0, 1.2]
    signal = pattern @ walk(rng, size, np.array([0.9, 0.7]), np.eye(2)).T
    values = signal + 0.5 * walk(rng, size, np.full(cells, 0.5), root).T
    data = xr.DataArray(values, dims=("cell", "time"), coords={"cell": places, "time": months(size)})
    problem = make_problem(
        data[:, :-30], rank=2, series="ar1", noise="correlated", length_scales_space=[0.4], tail=0.0, area_weights=False
    )
    result = run_mcmc(
        problem, num_samples=200, warmup_steps=150, num_chains=2, progress=False, chain_method="sequential"
    )
    new = data[:, -30:].copy()
    new[:3, 4], new[5, 8] = np.nan, np.nan
    record = read_record(result.tree, 400)
    found = series_of(record, new, None, np.random.default_rng(0))
    said = np.einsum("sck,stk->sct", record.draws.patterns(draws=record.chosen), record.modes(found.processes))
    low, high = np.quantile(said + found.draws.fixed(draws=record.chosen), [0.025, 0.975], axis=0)
    share = np.mean((low < signal[:, -30:]) & (signal[:, -30:] < high))
    assert share > 0.85  # of 30 months of two series: one fit
    assert np.mean(high - low) < 4 * 0.5


def test_commands_take_results_with_correlated_noise(tmp_path: Path) -> None:
    rng, lat, lon = np.random.default_rng(0), np.array([20.0, 25.0, 30.0]), np.array([170.0, 175.0, 180.0, 185.0])
    series = walk(rng, 100, np.array([0.9]), np.eye(1))[:, 0]
    values = 15 + series[:, None, None] * np.cos(np.deg2rad(4 * (lon - 175)))
    values = values + 0.4 * walk(rng, 100, np.full(12, 0.5), np.eye(12)).reshape(100, 3, 4)
    coords = {"time": months(100, "1990-01"), "lat": lat, "lon": lon}
    raw = xr.DataArray(values, coords, ("time", "lat", "lon"), name="sst", attrs={"units": "degC"})
    raw[:90].to_netcdf(tmp_path / "field.nc")
    raw[95, 0, 0] = np.nan
    raw.to_netcdf(tmp_path / "later.nc")
    spec = load_spec(
        {
            "method": "bayesian_svd",
            "data": {"name": "sst", "path": str(tmp_path / "field.nc")},
            "model": {"rank": 1, "series": "ar1", "noise": "correlated", "num_length_scales": 4},
            "inference": {"num_samples": 100, "warmup_steps": 60, "num_chains": 2, "chain_method": "sequential"},
            "output": {"path": str(tmp_path / "result")},
        }
    )
    run_engine(spec, build_problem(spec, load_data(spec)), progress=False).save(tmp_path / "result")
    result, later = str(tmp_path / "result"), str(tmp_path / "later.nc")
    done = CliRunner().invoke(app, ["project", result, later, f"--out={tmp_path}/p.nc"])
    assert done.exit_code == 0, done.output
    with xr.open_dataset(tmp_path / "p.nc") as found:
        assert found.sizes["time"] == 10
        anomalies = series - np.stack([series[month:90:12].mean() for month in range(12)])[np.arange(100) % 12]
        assert abs(np.corrcoef(found["pc_mean"].values[0], anomalies[90:])[0, 1]) > 0.9
        assert float(found["residual_ratio"].max()) < 2
    done = CliRunner().invoke(app, ["forecast", result, f"--new={later}", "--steps=3", f"--out={tmp_path}/f.nc"])
    assert done.exit_code == 0, done.output
    with xr.open_dataset(tmp_path / "f.nc") as found:
        assert str(found["time"].values[0])[:7] == "1998-05"
        assert np.isfinite(found["field_mean"]).all()
    checker = pytest.importorskip("compliance_checker.runner")
    checker.CheckSuite.load_all_available_checkers()
    for name in ("p", "f"):
        passed, errors = checker.ComplianceChecker.run_checker(
            str(tmp_path / f"{name}.nc"), ["cf:1.11"], 0, "normal", output_filename=str(tmp_path / "cf.txt")
        )
        assert (passed, errors) == (True, False), (tmp_path / "cf.txt").read_text()
