"""Sea ice has a state of its own: it is masked, kept, drawn and never filled as if it were water."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from typer.testing import CliRunner

from probmodels import Result, run_mcmc
from probmodels.bayesian_svd import make_problem, write_outputs
from probmodels.bayesian_svd.figures import leading_modes, mode_maps
from probmodels.bayesian_svd.forecasts.forecasting import forecast
from probmodels.bayesian_svd.forecasts.new_fields import later_times
from probmodels.bayesian_svd.forecasts.weights import box_weights
from probmodels.bayesian_svd.gaps.fill import fill_field, write_filled
from probmodels.bayesian_svd.maps import draw_map
from probmodels.bayesian_svd.summary import summarise_modes, write_modes
from probmodels.cli import app
from probmodels.datasets.sst import load_sst, to_matrix
from probmodels.errors import DataError, SummaryError

LAT, LON, YEARS = np.arange(50.0, 70, 4), np.arange(170.0, 194, 4), 14
CHECK = """
import sys
from compliance_checker.runner import CheckSuite, ComplianceChecker
CheckSuite.load_all_available_checkers()
passed, errors = ComplianceChecker.run_checker(sys.argv[1], ["cf:1.11"], 0, "normal", output_filename="-")
sys.exit(not passed or errors)
"""


def sea(step: str = "M", *, frozen: bool = True) -> xr.DataArray:
    """Temperatures with a cycle and one mode; the north freezes in winter, its last row for most of the year."""
    dates = np.arange(f"1990-01{'-01' * (step == 'D')}", f"{1990 + YEARS}-01", dtype=f"datetime64[{step}]")
    rng = np.random.default_rng(0)
    dates = dates.astype("datetime64[D]")
    years = (dates - dates.astype("datetime64[Y]")) / np.timedelta64(365, "D")
    series = np.convolve(rng.standard_normal(len(dates) + 8), np.ones(9) / 3, "valid")[:, None, None]
    level = (64 - LAT)[:, None] * 0.4 + 0.01 * (LON - 180)
    values = level - 3.0 * np.cos(2 * np.pi * years)[:, None, None] + series * np.cos(np.deg2rad(LON))
    values = values + 0.3 * rng.standard_normal(values.shape)
    values = np.maximum(values, -1.8) if frozen else values + 20
    coords = {"time": dates.astype("datetime64[ns]"), "lat": LAT, "lon": LON}
    return xr.DataArray(values, coords, ("time", "lat", "lon"), name="sst", attrs={"units": "degC"})


def said(field: xr.DataArray) -> str:
    return " ".join(json.loads(field.attrs["mends"]))


def test_the_mask_of_ice_goes_with_the_field() -> None:
    given = sea()
    field = load_sst(given, ice=-1.79, min_valid=0.595)
    ocean = field["ocean"].values
    cold = given.values <= -1.79
    np.testing.assert_array_equal(field["ice"].values, cold & ocean)
    np.testing.assert_array_equal(np.isnan(field.values), cold | ~ocean)
    lasting = int((cold.mean(axis=0) > 0.405).sum())
    assert lasting > 0
    assert f"treated as land, {lasting} of them for sea ice" in said(field)
    much = int(((cold.mean(axis=0) > 0.2) & ocean).sum())
    assert f"{much} cells are frozen in more than 20% of the times, which maps hatch" in said(field)
    matrix = to_matrix(field)
    np.testing.assert_array_equal(matrix["ice"].values, cold[:, ocean].T)


def test_what_is_frozen_is_said_by_default_and_open_water_says_nothing() -> None:
    given = sea()
    field = load_sst(given)
    assert "ice" not in field.coords
    count = int((np.abs(given.values + 1.8) < 1e-3).sum())
    assert f"{count} values in " in said(field)
    assert "the freezing point" in said(field)
    open_water = load_sst(sea(frozen=False), ice=-1.79)
    assert "ice" not in open_water.coords
    assert "ice" not in said(open_water)
    with pytest.raises(DataError, match="needs temperatures in degC"):
        load_sst(sea(frozen=False).assign_attrs(long_name="sst anomaly"), ice=-1.79)


def test_a_month_or_season_is_frozen_where_no_value_is_left_for_it() -> None:
    days = sea("D").sel(time=slice("1990", "1992"))
    months = load_sst(days, ice=-1.79, min_valid=0.0)
    cold = days.values <= -1.79
    number = days["time"].dt.year.values * 12 + days["time"].dt.month.values
    whole = np.stack([cold[number == n].all(axis=0) for n in np.unique(number)])
    np.testing.assert_array_equal(months["ice"].values, whole & months["ocean"].values)
    partly = np.stack([cold[number == n].any(axis=0) for n in np.unique(number)]) & ~whole
    assert partly.any()
    assert np.isfinite(months.values[partly & months["ocean"].values]).all()
    winters = load_sst(sea(), season="DJF", ice=-1.79, min_valid=0.0)
    monthly = sea()
    rows = (monthly["time"] >= np.datetime64("1990-12")) & (monthly["time"].dt.month.isin([12, 1, 2]))
    cold = (monthly.values[rows.values] <= -1.79)[: 3 * winters.sizes["time"]].reshape(-1, 3, 5, 6).any(axis=1)
    np.testing.assert_array_equal(winters["ice"].values, cold & winters["ocean"].values)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Result:
    field = load_sst(sea(), ice=-1.79, min_valid=0.5)
    hole = field.where(~((field["time"].dt.year == 1995) & (field["lat"] == 50)))
    problem = make_problem(
        hole, rank=1, series="ar1", noise="correlated", num_length_scales=4, hold_out=0.1, hold_out_block=(4, 2, 2)
    )
    made = run_mcmc(
        problem, num_chains=2, num_samples=40, warmup_steps=40, progress=False, chain_method="sequential", seed=1
    )
    folder = tmp_path_factory.mktemp("ice")
    made.save(folder / "result")
    return Result.load(folder / "result")


def passes(path: Path) -> None:
    pytest.importorskip("compliance_checker")
    done = subprocess.run([sys.executable, "-c", CHECK, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_ice_is_not_filled_and_other_gaps_are(result: Result, tmp_path: Path) -> None:
    constant = result.tree["constant_data"].to_dataset()
    assert constant["ice"].dtype == bool
    found = fill_field(result, num_draws=20, keep_draws=True, progress=False)
    status, filled = found["status"].values, found["filled"].values
    ice = np.zeros(status.shape, dtype=bool)
    ice[:, constant["lat_index"].values, constant["lon_index"].values] = constant["ice"].values.T
    assert ice.any()
    np.testing.assert_array_equal(status == 2, ice)
    for name in ("filled", "filled_sd", "filled_lower", "filled_upper"):
        assert np.isnan(found[name].values[ice]).all()
    assert np.isnan(found["filled_draws"].values[:, ice]).all()
    gaps = status == 1
    assert gaps[60:72, 0].any()
    assert np.isfinite(filled[gaps]).all()
    with xr.open_dataset(write_filled(found, tmp_path / "filled.nc")) as file:
        assert file["status"].attrs["flag_meanings"] == "observed filled sea_ice"
        assert "ice_share" in file.data_vars
    passes(tmp_path / "filled.nc")


def hatched(modes: xr.Dataset) -> bool:
    figure = Figure()
    ax = figure.subplots()
    draw_map(figure, ax, modes["mode_mean"][0], "degC")
    return any(isinstance(patch, PathPatch) and patch.get_hatch() for patch in ax.patches)


def test_maps_hatch_ice_and_files_hold_its_share(result: Result, tmp_path: Path) -> None:
    modes = summarise_modes(result.tree)
    constant = result.tree["constant_data"].to_dataset()
    share = modes["ice_share"].values[constant["lat_index"].values, constant["lon_index"].values]
    np.testing.assert_allclose(share, constant["ice"].values.mean(axis=1))
    assert share.max() > 0.2
    assert hatched(modes)
    for drawn in (mode_maps(modes), leading_modes(modes)):  # words on ice are below the lowest map, not on its cells
        maps = [ax for ax in drawn.axes if any(isinstance(x, PathPatch) and x.get_hatch() for x in ax.patches)]
        assert len(maps) >= modes.sizes["mode"]
        assert not [text for ax in maps for text in ax.texts]
        said = [ax for ax in maps if "ice" in ax.get_xlabel()]
        assert said
        assert all(ax.get_subplotspec().is_last_row() for ax in said)
        drawn.draw_without_rendering()
        assert all(ax.xaxis.label.get_window_extent().y0 >= 0 for ax in said)  # nothing of them is cut off
    assert not hatched(modes.assign_coords(ice_share=modes["ice_share"] * 0.1))
    assert not hatched(modes.drop_vars("ice_share"))
    with xr.open_dataset(write_modes(modes, tmp_path / "modes.nc")) as file:
        np.testing.assert_allclose(file["ice_share"], modes["ice_share"], rtol=1e-6)
        assert "ice_share" in file.data_vars
        assert file["ice_share"].attrs["units"] == "1"
    passes(tmp_path / "modes.nc")


def test_all_outputs_are_written(result: Result, tmp_path: Path) -> None:
    written: Any = write_outputs(result, tmp_path, dpi=30)
    assert written.file == "report.html"
    assert "frozen in more than 20%" in (tmp_path / "report.html").read_text(encoding="utf-8")
    for table in (tmp_path / "tables").glob("*.csv"):
        assert "ice_share" not in table.read_text().splitlines()[0]


BASIN, NORTH = "48,68,168,192", "60,68,168,192"


def test_forecasts_of_boxes_leave_out_what_freezes_at_that_time_of_the_year(result: Result) -> None:
    constant = result.tree["constant_data"].to_dataset()
    steps = 8  # from January
    times = later_times(constant["time"], steps)
    filled, weights = box_weights(result, BASIN), box_weights(result, BASIN, times=times)
    ice = constant["ice"].transpose("cell", "time").values.astype(bool)
    for place, month in enumerate(times.dt.month.values):
        share = filled * (1 - ice[:, constant["time"].dt.month.values == month].mean(1))
        np.testing.assert_allclose(weights[:, place], share / share.sum())
    assert abs(weights[:, 0] - filled).max() > 0.005  # January
    np.testing.assert_allclose(weights[:, -1], filled)  # August
    with pytest.raises(SummaryError, match=r"frozen at 2004-0\d-01 by the years of the record.*--ice filled"):
        box_weights(result, NORTH, times=times)
    indices = {"open": weights, "all": filled}
    found = forecast(result, steps, indices=indices, keep_draws=True, judge=False, beyond=True, seed=3)
    field = found["field"].stack(cell=("lat", "lon")).dropna("cell", how="all")
    order = pd.MultiIndex.from_arrays([constant["lat"].values, constant["lon"].values])
    draws = field.sel(cell=order).transpose("chain", "draw", "time", "cell").values
    for name, given in indices.items():
        own = np.einsum("...tc,ct->...t", draws, given if given.ndim == 2 else given[:, None] * np.ones(steps))
        index = found["index_draws"].sel(index=name).transpose("chain", "draw", "time").values
        np.testing.assert_allclose(index, own, atol=1e-4)  # noise is that of the field
    assert float(abs(found["index_mean"].sel(index="open") - found["index_mean"].sel(index="all"))[0]) > 1e-3


def test_weights_of_each_step_under_white_noise() -> None:
    """Means and spread of an index whose weights differ between steps, beside those of two fixed ones."""
    field = load_sst(sea(frozen=False))
    problem = make_problem(field, rank=1, series="ar1", num_length_scales=4)
    options = {"num_chains": 1, "num_samples": 300, "warmup_steps": 60, "progress": False, "seed": 1}
    made = run_mcmc(problem, chain_method="sequential", **options)
    one, other = box_weights(made, "48,53,168,192"), box_weights(made, "58,63,168,192")
    turned = np.stack([one, other], axis=1)
    found = forecast(made, 2, indices={"turned": turned, "one": one, "other": other}, judge=False, field=False)
    for place, name in enumerate(("one", "other")):
        for part in ("mean", "sd"):
            got, want = (float(found[f"index_{part}"].sel(index=x)[place]) for x in ("turned", name))
            assert got == pytest.approx(want, abs=0.25 * float(found["index_sd"].sel(index=name)[place]))
    with pytest.raises(DataError, match="as many for each of the 3 steps"):
        forecast(made, 3, indices={"turned": turned}, judge=False, field=False)


@pytest.mark.parametrize("ice", ["left_out", "filled"])
def test_the_command_forecasts_boxes_of_open_water(result: Result, tmp_path: Path, ice: str) -> None:
    folder = result.save(tmp_path / "run")
    command = ["forecast", str(folder), "--steps", "4", "--box", f"basin={BASIN}", f"--ice={ice}", "--beyond"]
    command += ["--out", str(tmp_path / "out.nc"), "--figure", str(tmp_path / "fan.png")]
    found = CliRunner().invoke(app, command)
    assert found.exit_code == 0, found.output
    with xr.open_dataset(tmp_path / "out.nc") as file:
        assert ("index_ice_share" in file) == (ice == "left_out")
        if ice == "left_out":
            assert 0 < float(file["index_ice_share"].max()) <= 0.5
    north = CliRunner().invoke(app, [*command[:4], "--box", f"north={NORTH}", *command[6:], "--overwrite"])
    assert (north.exit_code == 0) == (ice == "filled")
