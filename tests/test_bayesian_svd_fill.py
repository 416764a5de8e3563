"""Gaps filled from a posterior: values, intervals that are checked on blocks held out, and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from typer.testing import CliRunner

from probmodels import run_mcmc
from probmodels.bayesian_svd import make_problem, write_outputs
from probmodels.bayesian_svd.correlated import CorrelatedData
from probmodels.bayesian_svd.gaps.blocks import (
    crps_of_draws,
    gap_extents,
    hide_blocks,
    hide_like_gaps,
    hold_out_blocks,
    share_in_larger_gaps,
)
from probmodels.bayesian_svd.gaps.fill import _calibrated, fill_field, held_out_sentence
from probmodels.bayesian_svd.noise import unfiltered_by
from probmodels.bayesian_svd.series_sampler import SeriesGibbs
from probmodels.cli import app
from probmodels.distributions.processes import correlation_at
from probmodels.errors import SummaryError

SETTINGS: dict[str, Any] = {"num_chains": 2, "warmup_steps": 60, "num_samples": 60, "progress": False}


def field(seed: int = 0) -> tuple[xr.DataArray, np.ndarray]:
    """A field on 5 x 6 cells of two modes and correlated noise, and where its gaps are (time, lat, lon)."""
    rng = np.random.default_rng(seed)
    lat, lon = np.meshgrid(np.arange(5) * 4.0 + 30, np.arange(6) * 5.0 + 180, indexing="ij")
    phi = np.full(179, 0.7)
    series = unfiltered_by(rng.standard_normal((2, 180)), phi)
    patterns = np.stack([np.sin(lat / 12) * 2, np.cos(lon / 9)])
    apart = np.hypot(lat.ravel()[:, None] - lat.ravel(), lon.ravel()[:, None] - lon.ravel())
    root = np.linalg.cholesky(np.exp(-apart / 8) + 0.05 * np.eye(30))
    noise = 0.5 * (root @ unfiltered_by(rng.standard_normal((30, 180)), np.full(179, 0.4))).T.reshape(180, 5, 6)
    values = np.einsum("kt,kij->tij", series, patterns) + noise + 10.0
    gaps = np.zeros(values.shape, bool)
    for _ in range(40):
        t, i, j = rng.integers(175), rng.integers(4), rng.integers(5)
        gaps[t : t + 5, i : i + 2, j : j + 2] = True
    dates = np.arange("2000-01", "2015-01", dtype="datetime64[M]").astype("datetime64[ns]")
    coords = {"time": dates, "lat": lat[:, 0], "lon": lon[0]}
    return xr.DataArray(values, dims=("time", "lat", "lon"), coords=coords, attrs={"units": "degC"}), gaps


def inferred(data: xr.DataArray, series: str = "ar1", **options: Any) -> Any:
    problem = make_problem(data, rank=2, series=series, noise="correlated", num_length_scales=5, **options)
    return run_mcmc(problem, **SETTINGS, chain_method="sequential", seed=1)


@pytest.fixture(scope="module")
def filled() -> tuple[Any, xr.Dataset, xr.DataArray, np.ndarray]:
    data, gaps = field()
    result = inferred(data.where(~gaps), hold_out=0.1, hold_out_block=(5, 2, 2))
    return result, fill_field(result, seed=2, progress=False), data, gaps


def test_observed_values_stay_and_gaps_are_filled_with_intervals(filled: Any) -> None:
    _, made, data, gaps = filled
    assert made["filled"].dims == ("time", "lat", "lon")
    assert made["filled"].attrs["units"] == "degC"
    np.testing.assert_array_equal(made["status"].values, gaps)
    np.testing.assert_allclose(made["filled"].values[~gaps], data.values[~gaps])
    assert (made["filled_sd"].values[~gaps] == 0).all()
    assert (made["filled_sd"].values[gaps] > 0).all()
    error = made["filled"].values[gaps] - data.values[gaps]
    spread = np.sqrt(np.mean((data.values - data.values.mean(0))[gaps] ** 2))
    assert np.sqrt(np.mean(error**2)) < 0.4 * spread
    held = (made["filled_lower"].values <= data.values) & (data.values <= made["filled_upper"].values)
    assert 0.88 < held[gaps].mean() < 0.99  # some 700 values in 40 blocks
    assert made.attrs["held_out_coverage"] == pytest.approx(0.95, abs=0.05)
    assert 0.5 < made.attrs["held_out_rmse"] / np.sqrt(np.mean(error**2)) < 2


def test_blocks_held_out_are_not_seen() -> None:
    """Values that are held out change nothing but the scores and what is filled beside them."""
    data, gaps = field()
    first = make_problem(data.where(~gaps), rank=2, hold_out=0.1, hold_out_block=(5, 2, 2))
    block = first.data["held_out_block"].transpose("time", "cell").values.reshape(data.shape)
    wrong = data.where(~gaps).where(block < 0, 99.0).where(~gaps)
    second = make_problem(wrong, rank=2, hold_out=0.1, hold_out_block=(5, 2, 2))
    for one, two in ((first.args[0].z, second.args[0].z), (first.args[0].gaps.observed, second.args[0].gaps.observed)):
        np.testing.assert_array_equal(one, two)


def test_the_same_seed_fills_alike_and_nothing_is_claimed_unchecked() -> None:
    data, gaps = field()
    result = inferred(data.where(~gaps))
    one, two = (fill_field(result, num_draws=20, seed=4, progress=False) for _ in range(2))
    xr.testing.assert_identical(one, two)
    assert "held_out_rmse" not in one.attrs


class Units:
    """A source of normals of which all are zero but one."""

    def __init__(self, place: int) -> None:
        self.place, self.count = place, 0

    def standard_normal(self, size: int) -> np.ndarray:
        out = np.arange(self.count, self.count + size) == self.place
        self.count += size
        return out.astype(float)


@pytest.mark.parametrize("series", ["ar1", "matern32", "matern52"])
def test_series_and_large_gaps_have_the_conditional_of_one_dense_normal(series: str) -> None:
    rng, cells, times, at = np.random.default_rng(0), 6, 10, 4
    dates = (np.datetime64("2000-01", "M") + np.arange(times)).astype("datetime64[ns]")
    values = rng.standard_normal((cells, times)).cumsum(1)
    values[:3, at], values[5, 7] = np.nan, np.nan
    place = {"cell": np.linspace(0, 1, cells), "time": dates}
    problem = make_problem(
        xr.DataArray(values, place, ("cell", "time")),
        rank=2,
        series=series,
        noise="correlated",
        num_length_scales=3,
        area_weights=False,
    )
    kernel, model = SeriesGibbs(problem), problem.args[0]
    data, choice, variance = CorrelatedData(model), np.array([len(model.series.scale) // 2] * 2), 0.3
    u = np.linalg.qr(rng.standard_normal((data._left.shape[0], 2)))[0].T.copy()
    d, f = np.array([1.5, 0.8]), rng.standard_normal((2, times))
    data.draw(rng, u, d, f, variance)
    before = data.complete.copy()

    patterns = data._root @ data._left.T @ (u.T * d)
    missing, fixed = data._missing, data._effects @ data._lifted
    assert missing is not None
    in_time = np.diag(missing.diagonal) + np.diag(missing.beside, 1) + np.diag(missing.beside, -1)
    noise = np.kron(in_time, missing.precision) / variance  # one time after the other
    lag = np.abs(np.subtract.outer(np.arange(times), np.arange(times)))
    own = np.linalg.inv(correlation_at(series, float(model.series.scale[choice[0]]), lag))
    onto = np.kron(np.eye(times), patterns)
    whole = np.block([[np.kron(own, np.eye(2)) + onto.T @ noise @ onto, -onto.T @ noise], [-noise @ onto, noise]])
    known = np.concatenate([f.T.ravel(), (before - fixed).T.ravel()])
    free = np.r_[2 * at : 2 * at + 2, 2 * times + cells * at : 2 * times + cells * at + 3]
    rest = np.setdiff1d(np.arange(len(whole)), free)
    spread = np.linalg.inv(whole[np.ix_(free, free)])
    mean = -spread @ whole[np.ix_(free, rest)] @ known[rest]

    draws = []
    for unit in range(-1, 5):  # none, and each of the five normals
        g = f.copy()
        data.take(before.copy())
        kernel.draw_large_gaps(data, Units(unit), u, d, g, variance, choice)  # type: ignore[arg-type]
        np.testing.assert_array_equal(np.delete(g, at, axis=1), np.delete(f, at, axis=1))
        draws.append(np.r_[g[:, at], (data.complete - fixed)[:3, at]])
    root = (np.array(draws[1:]) - draws[0]).T
    np.testing.assert_allclose(draws[0], mean, atol=1e-8)
    np.testing.assert_allclose(root @ root.T, spread, atol=1e-8)


def test_smooth_series_fill_a_field_as_well() -> None:
    data, gaps = field(3)
    result = inferred(data.where(~gaps), "matern32", hold_out=0.1, hold_out_block=(5, 2, 2))
    made = fill_field(result, seed=2, progress=False)
    held = (made["filled_lower"].values <= data.values) & (data.values <= made["filled_upper"].values)
    assert 0.88 < held[gaps].mean() < 0.99
    error = made["filled"].values[gaps] - data.values[gaps]
    assert np.sqrt(np.mean(error**2)) < 0.4 * np.sqrt(np.mean((data.values - data.values.mean(0))[gaps] ** 2))
    assert made.attrs["held_out_coverage"] == pytest.approx(0.95, abs=0.05)


def test_a_field_without_gaps_is_refused() -> None:
    data, _ = field()
    problem = make_problem(data, rank=2, series="ar1", noise="correlated", num_length_scales=3)
    result = run_mcmc(problem, num_chains=1, warmup_steps=2, num_samples=2, progress=False)
    with pytest.raises(SummaryError, match="nothing is missing"):
        fill_field(result)


def test_a_gap_has_the_cells_that_touch_at_its_time_and_the_times_in_a_row_at_its_cell() -> None:
    missing = np.zeros((12, 6), bool)  # on 3 x 4 cells
    missing[[0, 1, 5], 2] = True  # three that touch at their sides
    missing[[0, 1], 3] = True
    missing[[3, 8], 2] = True  # two alone, one at a corner only
    cells = xr.DataArray(np.zeros((12, 6)), dims=("cell", "time"))
    cells = cells.assign_coords(lat_index=("cell", np.repeat(range(3), 4)), lon_index=("cell", np.tile(range(4), 3)))
    places = np.stack([np.repeat(np.arange(3.0), 4), np.tile(np.arange(4.0), 3)], 1)
    found = gap_extents(cells, missing, places)
    assert found.cells[[0, 1, 5], 2].tolist() == [3, 3, 3]
    assert found.times[[0, 1, 5], 2].tolist() == [2, 2, 1]
    assert found.cells[0, 3] == 2
    assert found.cells[[3, 8], 2].tolist() == [1, 1]
    assert not found.cells[~missing].any()
    assert not found.times[~missing].any()
    stations = gap_extents(xr.Dataset(), missing, np.arange(12.0)[:, None])
    assert stations.cells[[0, 1, 5], 2].tolist() == [4, 4, 4]  # 0, 1, 3 and 5, of which neighbours are near
    assert stations.cells[8, 2] == 1
    two = cells.assign_coords(field=("cell", ["sst"] * 6 + ["slp"] * 6))
    assert gap_extents(two, missing, places).cells[[0, 1, 5], 2].tolist() == [3, 3, 3]
    upside = two.assign_coords(lat_index=("cell", np.tile(np.repeat(range(2), 3), 2)[:12]))
    upside = upside.assign_coords(lon_index=("cell", np.tile(range(3), 4)))
    both = np.zeros((12, 1), bool)
    both[[0, 6]] = True  # at one place, of two fields
    assert gap_extents(upside, both, places).cells[[0, 6], 0].tolist() == [1, 1]


@pytest.mark.parametrize(("cells", "times"), [(1, 1), (4, 5), (12, 2)])
def test_blocks_have_the_shapes_of_the_gaps(cells: int, times: int) -> None:
    """Gaps of one shape: what is hidden elsewhere has it too, and hides nothing that is missing."""
    rng = np.random.default_rng(2)
    seen, places = np.ones((60, 300), bool), np.arange(60.0)[:, None]
    for _ in range(12):
        first, time = rng.integers(60 - cells), rng.integers(300 - times)
        seen[first : first + cells, time : time + times] = False
    block = hide_like_gaps(xr.Dataset(), seen, ~seen, places, 0.1, 2, seed=0)
    assert not (block >= 0)[~seen].any()
    assert (block >= 0).sum() == pytest.approx(0.1 * seen.sum(), rel=0.1)
    sizes = np.bincount(block[block >= 0])
    assert np.median(sizes) == cells * times
    assert share_in_larger_gaps(xr.Dataset(), ~seen, block >= 0, places) == 0
    assert (share_in_larger_gaps(xr.Dataset(), ~seen, hidden_of(seen, places), places) > 0.9) == (cells * times > 1)


def hidden_of(seen: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Single entries, far from each other."""
    return hide_blocks(xr.Dataset(), seen, places, (1, 1, 1), 0.001, 2, seed=0) >= 0


def test_gaps_larger_than_the_blocks_are_said_and_those_alike_are_not() -> None:
    data, gaps = field()
    alike = make_problem(data.where(~gaps), rank=2, hold_out=0.1)
    small = make_problem(data.where(~gaps), rank=2, hold_out=0.1, hold_out_block=(2, 1, 1))
    assert "larger than any of the blocks" not in alike.data.attrs["mends"]
    assert "leave the size of the blocks out" in small.data.attrs["mends"]


def test_frozen_sea_is_no_gap_that_blocks_are_like() -> None:
    seen, places = np.ones((20, 200), bool), np.arange(20.0)[:, None]
    seen[0:10, 50:150] = False  # frozen
    seen[[3, 8, 12], [10, 20, 30]] = False
    ice = np.zeros(seen.shape, bool)
    ice[0:10, 50:150] = True
    cells = xr.DataArray(np.zeros(seen.shape), dims=("cell", "time"), coords={"ice": (("cell", "time"), ice)})
    block, said = hold_out_blocks(cells, seen, places, 0.05, None, 2)
    assert np.bincount(block[block >= 0]).max() == 1
    assert not said
    _, said = hold_out_blocks(cells.drop_vars("ice"), seen, places, 0.05, (1, 1, 1), 2)
    assert "100% of the missing values" in said[0]


def test_the_verdict_says_which_share_is_in_larger_gaps(filled: Any) -> None:
    _, made, _, _ = filled
    made = made.copy()
    made.attrs["share_in_larger_gaps"] = 0.0
    assert "WARNING" not in held_out_sentence(made)
    made.attrs["share_in_larger_gaps"] = 0.3
    assert "WARNING: 30% of the filled values lie in gaps that are larger" in held_out_sentence(made)


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_intervals_too_narrow_or_wide_are_corrected(factor: float) -> None:
    rng = np.random.default_rng(3)
    places = np.linspace(0, 1, 20)[:, None]
    block = hide_blocks(xr.Dataset(), np.ones((20, 240), bool), places, (4, 1, 1), 0.4, 1, seed=0)
    hidden = block >= 0
    values = rng.standard_normal(hidden.sum())
    draws = factor * rng.standard_normal((400, hidden.sum()))
    months = np.arange(240) % 12
    found, scores = _calibrated(draws, values, hidden, block, months, rng.standard_normal((20, 2)), 0.9)
    np.testing.assert_allclose(found.mean(), 1 / factor, rtol=0.1)
    assert scores["coverage"] == pytest.approx(0.9, abs=0.03)
    assert abs(scores["coverage_uncalibrated"] - 0.9) > 0.08


def test_the_score_of_draws_is_that_of_their_distribution() -> None:
    draws = np.random.default_rng(1).standard_normal((200_000, 1))
    want = 2 * np.exp(-0.5) / np.sqrt(2 * np.pi) + (2 * 0.8413447 - 1) - 1 / np.sqrt(np.pi)
    assert crps_of_draws(draws, np.array([1.0]))[0] == pytest.approx(want, abs=0.01)


def test_white_noise_is_refused() -> None:
    data, gaps = field()
    problem = make_problem(data.where(~gaps), rank=2, series="ar1", num_length_scales=3)
    result = run_mcmc(problem, num_chains=1, warmup_steps=2, num_samples=2, progress=False)
    with pytest.raises(SummaryError, match="infer with noise='correlated'"):
        fill_field(result)


def test_a_run_that_held_blocks_out_writes_the_filled_field(filled: Any, tmp_path: Path) -> None:
    result, made, _, gaps = filled
    written = write_outputs(result, tmp_path)
    assert "95 % intervals hold" in written.table
    with xr.open_dataset(tmp_path / "filled.nc") as found:
        np.testing.assert_array_equal(found["status"].values == 1, gaps)
        np.testing.assert_allclose(found["filled"].values[~gaps], made["filled"].values[~gaps], rtol=1e-6)
        assert found.attrs["Conventions"] == "CF-1.11"
        assert found["filled_lower"].dtype == np.float32


@pytest.mark.parametrize("series", ["ar1", "matern32"])
def test_the_command_fills_a_file_with_temperatures(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], series: str
) -> None:
    data, gaps = field()
    data = (data + 3 * np.cos(np.pi * data["time"].dt.month / 6)).rename("sst").assign_attrs(units="degC")
    data.where(~gaps).to_dataset().to_netcdf(tmp_path / "sst.nc")
    small = ["--draws", "20", "--warmup", "20", "--chains", "1", "--rank", "2", "--set", "model.hold_out=0.1"]
    small += ["--set", "model.num_length_scales=3", "--out", str(tmp_path / "run"), "--series", series]
    found = CliRunner().invoke(app, ["sst", "fill", str(tmp_path / "sst.nc"), *small])
    assert found.exit_code == 0, found.output
    assert "gaps filled: " in found.output
    assert "WARNING" not in found.output  # blocks are like the gaps
    assert "filling gaps: 100%" in found.output + capfd.readouterr().err
    with xr.open_dataset(tmp_path / "run" / "filled.nc") as made:
        assert made["sst_filled"].sizes == {"time": 180, "lat": 5, "lon": 6}
        assert made["sst_filled"].attrs["standard_name"] == "sea_surface_temperature"
        for end in ("lower", "upper"):
            apart = (made[f"sst_filled_{end}"] - made["sst_filled"]) - (made[f"filled_{end}"] - made["filled"])
            np.testing.assert_allclose(apart, 0, atol=1e-4)
            assert f"sst_filled_{end}" in made["sst_filled"].attrs["ancillary_variables"].split()
        assert float((made["sst_filled_upper"] - made["sst_filled_lower"]).values[gaps].min()) > 0
        error = (made["sst_filled"] - data).values
        np.testing.assert_allclose(error[~gaps], 0, atol=1e-5)
        assert np.sqrt(np.mean(error[gaps] ** 2)) < 1.0  # whose seasonal cycle has an amplitude of 3
        assert abs(float(made["filled"].mean())) < 0.5
    checker = pytest.importorskip("compliance_checker.runner")
    checker.CheckSuite.load_all_available_checkers()
    passed, errors = checker.ComplianceChecker.run_checker(
        str(tmp_path / "run" / "filled.nc"), ["cf:1.11"], 0, "normal", output_filename=str(tmp_path / "cf.txt")
    )
    assert passed, (tmp_path / "cf.txt").read_text()
    assert not errors
