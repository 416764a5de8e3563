"""Fields on curvilinear grids and at stations, daily values, and sea ice."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from probmodels import run_mcmc
from probmodels.bayesian_svd import make_problem, write_outputs
from probmodels.datasets.sst import load_sst, open_field, to_matrix
from probmodels.errors import DataError

NY, NX, MONTHS = 9, 12, 48
DATES = (np.datetime64("1990-01", "M") + np.arange(MONTHS)).astype("datetime64[ns]")


def smooth(lat: np.ndarray, lon: np.ndarray, dates: np.ndarray, seed: int = 0) -> np.ndarray:
    """A field (time, ...) at given places: a cycle, one mode, noise."""
    rng = np.random.default_rng(seed)
    phase = 2 * np.pi * (dates - dates.astype("datetime64[Y]")) / np.timedelta64(365, "D")
    pattern = np.cos(np.deg2rad(3 * (lon - 190))) + 0.02 * lat
    shape = (-1, *[1] * lat.ndim)
    values = 15 + 6 * np.cos(phase).reshape(shape) + rng.standard_normal(len(dates)).reshape(shape) * pattern
    return values + 0.2 * rng.standard_normal(values.shape)


def rotated() -> tuple[np.ndarray, np.ndarray]:
    """Places of a grid turned by 30 degrees about (10 N, 190 E)."""
    y, x = np.meshgrid(np.arange(NY) * 3.0 - 12, np.arange(NX) * 3.0 - 18, indexing="ij")
    return 10 + 0.5 * x + 0.87 * y, 190 + 0.87 * x - 0.5 * y


def curvilinear(**extra: tuple[tuple[str, str], np.ndarray]) -> xr.Dataset:
    lat, lon = rotated()
    values = smooth(lat, lon, DATES)
    values[:, 2:4, 5] = np.nan  # land
    return xr.Dataset(
        {"tos": (("time", "j", "i"), values, {"units": "degC", "coordinates": "nav_lat nav_lon"}), **extra},
        {
            "time": DATES,
            "nav_lat": (("j", "i"), lat, {"units": "degrees_north"}),
            "nav_lon": (("j", "i"), (lon + 180) % 360 - 180, {"units": "degrees_east"}),
        },
    )


def stations(num: int = 14) -> xr.Dataset:
    rng = np.random.default_rng(2)
    lat, lon = rng.uniform(-20, 30, num), rng.uniform(170, 220, num)
    return xr.Dataset(
        {"sst": (("station", "time"), smooth(lat, lon, DATES).T, {"units": "degC"})},
        {"time": DATES, "lat": ("station", lat), "lon": ("station", lon)},
    )


def mends(data: xr.DataArray) -> str:
    return " ".join(json.loads(data.attrs["mends"]))


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_curvilinear_grid_is_a_matrix_of_its_cells(on_disk: bool, tmp_path: Path) -> None:
    given = curvilinear()
    if on_disk:
        given.to_netcdf(tmp_path / "tos.nc")
    data = load_sst(tmp_path / "tos.nc" if on_disk else given, anomalies=False)
    lat, lon = (values.ravel() for values in rotated())
    ocean = np.isfinite(given["tos"].values[0]).ravel()
    assert data.dims == ("cell", "time")
    np.testing.assert_allclose(data["lat"], lat[ocean])
    np.testing.assert_allclose(data["lon"] % 360, lon[ocean], atol=1e-4)
    assert np.ptp(data["lon"].values) < 60  # not cut at the date line
    np.testing.assert_allclose(data.values, given["tos"].values.reshape(MONTHS, -1)[:, ocean].T)
    assert "9 x 12 cells of a curvilinear grid (j, i), weighted by the areas that the positions" in mends(data)


def test_only_the_region_and_period_are_read() -> None:
    box = {"lat": [0, 15], "lon": [-178, -160]}
    data = load_sst(curvilinear(), region=box, period="1990/1992")
    everything = load_sst(curvilinear(), period="1990/1992")
    inside = (
        (everything["lat"] >= 0) & (everything["lat"] <= 15) & (everything["lon"] >= 182) & (everything["lon"] <= 200)
    )
    np.testing.assert_allclose(data.values, everything.values[inside.values])
    with pytest.raises(DataError, match="holds no cell of the field, which covers"):
        load_sst(curvilinear(), region="north_atlantic")


def test_areas_from_positions_are_those_of_a_rectangular_grid() -> None:
    lat, lon = np.meshgrid(np.arange(-30.0, 61, 3), np.arange(150.0, 200, 4), indexing="ij")
    values = smooth(lat, lon, DATES)
    coords = {"time": DATES, "lat": (("y", "x"), lat), "lon": (("y", "x"), lon)}
    data = load_sst(xr.Dataset({"sst": (("time", "y", "x"), values, {"units": "degC"})}, coords))
    inner = np.abs(data["lat"] - 15) < 40
    ratio = data["area_weight"] / np.cos(np.deg2rad(data["lat"]))
    assert float(ratio[inner].std() / ratio[inner].mean()) < 1e-3


def test_areas_of_the_file_are_taken() -> None:
    area = np.linspace(1e9, 3e9, NY * NX).reshape(NY, NX)
    data = load_sst(curvilinear(areacello=(("j", "i"), area)))
    ocean = np.isfinite(curvilinear()["tos"].values[0])
    np.testing.assert_allclose(data["area_weight"], area[ocean] / area[ocean].max())
    assert "weighted by their areas 'areacello'" in mends(data)
    weight = make_problem(data, rank=1, series="iid").data["weight"]
    np.testing.assert_allclose(weight, data["area_weight"] / data["area_weight"].mean())


def test_stations_count_alike_and_it_is_said() -> None:
    data = load_sst(stations())
    assert data.shape == (14, MONTHS)
    np.testing.assert_array_equal(data["area_weight"], 1.0)
    assert "14 stations (station), of equal weight, as the file gives them no area" in mends(data)


def test_cells_where_a_grid_overlaps_itself_are_kept_once() -> None:
    given = curvilinear()
    doubled = xr.concat([given, given.isel(i=[0, 1])], "i")
    data = load_sst(doubled)
    assert data.sizes["cell"] == load_sst(given).sizes["cell"]
    assert "18 cells lie where others do" in mends(data)


def test_places_that_are_missing_or_no_degrees() -> None:
    given = curvilinear()
    given["nav_lat"][0, 0] = np.nan
    given["nav_lon"][1, 1] = 1e20
    assert load_sst(given).sizes["cell"] == NY * NX - 2 - 2
    given["nav_lat"][:] = 4e5
    with pytest.raises(DataError, match="'nav_lat' and 'nav_lon' are not degrees"):
        load_sst(given)


def test_a_rectangular_grid_with_maps_of_its_places_stays_one() -> None:
    lat, lon = np.arange(-6.0, 6, 2), np.arange(180.0, 190, 2)
    maps = np.meshgrid(lat, lon, indexing="ij")
    values = smooth(*maps, DATES)
    data = xr.Dataset(
        {"sst": (("time", "lat", "lon"), values, {"units": "degC"})},
        {
            "time": DATES,
            "lat": ("lat", lat, {"units": "degrees_north"}),
            "lon": ("lon", lon, {"units": "degrees_east"}),
            "TLAT": (("lat", "lon"), maps[0], {"units": "degrees_north"}),
            "TLONG": (("lat", "lon"), maps[1], {"units": "degrees_east"}),
        },
    )
    assert load_sst(data).dims == ("time", "lat", "lon")
    assert open_field(curvilinear()).dims == ("time", "row", "column")


@pytest.mark.parametrize("made", [curvilinear, stations])
def test_a_field_of_scattered_cells_goes_all_the_way(made, tmp_path: Path) -> None:
    problem = make_problem(load_sst(made()), rank=1, series="ar1")
    result = run_mcmc(problem, num_chains=2, num_samples=60, warmup_steps=40, chain_method="sequential", progress=False)
    written = write_outputs(result, tmp_path)
    assert {"mode_maps.png", "residual_maps.png"} <= {path.name for path in tmp_path.rglob("*.png")}
    modes = xr.open_dataset(tmp_path / "modes.nc")
    assert modes["mode_mean"].dims == (("mode", "y", "x") if made is curvilinear else ("mode", "cell"))
    pattern = np.cos(np.deg2rad(3 * (modes["lon"] - 190))) + 0.02 * modes["lat"]
    mean = modes["mode_mean"].values[0]
    known = np.isfinite(mean)
    assert abs(np.corrcoef(mean[known], pattern.values[known])[0, 1]) > 0.98
    assert written.file == "report.html"


# -- daily values and ice ---------------------------------------------------------------------------------------


def daily(years: int = 4) -> xr.DataArray:
    days = np.arange(np.datetime64("2001-01-01"), np.datetime64(f"{2001 + years}-01-01")).astype("datetime64[ns]")
    lat, lon = np.arange(30.0, 36, 2), np.arange(180.0, 188, 2)
    values = smooth(*np.meshgrid(lat, lon, indexing="ij"), days)
    values[40:90, 0, 0] = np.nan
    return xr.DataArray(
        values, {"time": days, "lat": lat, "lon": lon}, ("time", "lat", "lon"), name="sst", attrs={"units": "degC"}
    )


def test_daily_values_are_kept_where_asked_and_lose_a_smooth_cycle() -> None:
    given = daily()
    kept = load_sst(given, daily=True)
    assert kept.sizes["time"] == given.sizes["time"]
    assert kept.attrs["frequency"] == "submonthly"
    assert "a mean and 3 harmonics of the year" in mends(kept)
    np.testing.assert_array_equal(np.isnan(kept), np.isnan(given))
    assert "holes" not in mends(kept)
    gone = given.isel(time=np.r_[0:100, 103 : given.sizes["time"]])
    assert "holes, which the analysis spans: 2001-04-10 to 2001-04-14." in mends(load_sst(gone, daily=True))
    phase = 2 * np.pi * given["time"].dt.dayofyear.values / 365.25
    for wave in (np.ones_like(phase), np.cos(phase), np.sin(phase)):
        assert np.abs(np.nanmean(kept.values * wave[:, None, None], axis=0)).max() < 0.05
    months = load_sst(given)
    assert months.sizes["time"] == 48
    steps = np.abs(np.diff(kept.values - (given.values - 15), axis=0))  # of the cycle: no jump where months change
    assert np.nanmax(steps) < 0.15
    problem = make_problem(load_sst(given, daily=True, period="2001/2001"), rank=1, series="ar1")
    assert problem.data.sizes["time"] == 365
    assert float(problem.data["time_steps"].max()) == 1.0


def test_a_cell_with_too_few_days_has_no_cycle_and_it_is_said() -> None:
    given = daily(2)
    given[10:, 1, 1] = np.nan
    kept = load_sst(given, daily=True, min_valid=0.0)
    assert "10 values have no climatology" in mends(kept)
    assert not kept["ocean"].values[1, 1]


def test_values_at_the_freezing_point_are_said_or_masked() -> None:
    given = daily()
    given[100:130, 2, 2] = -1.8
    said = mends(load_sst(given))
    assert "30 values in 1 cells are -1.8 degC, the freezing point, as under sea ice" in said
    assert "--ice=-1.79" in said
    assert "masked" in mends(load_sst(given, ice=-1.79))
    assert "freezing" not in mends(load_sst(given, ice=-1.79)) + mends(load_sst(daily()))


def test_the_mark_of_sea_ice_is_named() -> None:
    given = daily()
    given[100:130, 2, 2] = -1000.0
    assert "-1000, sea ice in HadISST" in mends(load_sst(given))


def test_a_matrix_of_scattered_cells_needs_no_second_step() -> None:
    with pytest.raises(DataError, match="expected \\(time, lat, lon\\)"):
        to_matrix(load_sst(stations()))
