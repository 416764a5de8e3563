"""Reading gridded fields: every quirk of real files on small synthetic ones, then the real ones."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import netCDF4
import numpy as np
import pytest
import xarray as xr

from probmodels.datasets import climate, get_loader, gridded, load, sst
from probmodels.datasets.calendars import month_number, parse_period, parse_season
from probmodels.datasets.reading import chunks
from probmodels.datasets.regions import REGIONS, arrange_longitudes, parse_region, select_longitudes
from probmodels.datasets.sst import default_field, from_cells, load_sst, open_field, to_matrix
from probmodels.errors import DataError

LAT = np.arange(-55.0, 56.0, 10.0)
LON = np.arange(5.0, 360.0, 10.0)
LAND = (slice(None), slice(2, 5), slice(8, 12))  # 12 cells of the grid
NUM_MONTHS = 120


def truth(num_months: int = NUM_MONTHS, start: str = "1990-01") -> xr.DataArray:
    """Seasonal cycle of 5 degC, peaking in August, with independent anomalies of 0.5 degC; NaN on land."""
    rng = np.random.default_rng(7)
    time = np.arange(num_months) + np.datetime64(start, "M")
    phase = month_number(time) % 12
    values = 15 + 5 * np.cos(2 * np.pi * (phase - 7) / 12)[:, None, None] + 0.1 * LON[None, None, :] / 10
    values = values + 0.5 * rng.normal(size=(num_months, len(LAT), len(LON)))
    values[LAND] = np.nan
    coords = {"time": time.astype("datetime64[ns]"), "lat": LAT, "lon": LON}
    return xr.DataArray(values, coords, ("time", "lat", "lon"), name="sst", attrs={"units": "degC"})


def dataset(field: xr.DataArray | None = None, **attrs: Any) -> xr.Dataset:
    """A dataset with CF attributes on its axes; ``attrs`` replace those of the variable."""
    field = truth() if field is None else field
    field = field.assign_attrs(attrs)
    result = field.to_dataset(name=field.name)
    result["lat"].attrs["units"] = "degrees_north"
    result["lon"].attrs["units"] = "degrees_east"
    return result


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    def write(data: xr.Dataset, name: str = "sst.nc", **encoding: Any) -> Path:
        path = tmp_path / name
        data.to_netcdf(path, encoding=encoding or {"time": {"units": "days since 1800-01-01", "dtype": "float64"}})
        return path

    return write


def mends_of(field: xr.DataArray) -> str:
    return "\n".join(json.loads(field.attrs["mends"]))


# ----------------------------------------------------------------------------------------------- canonical form


def test_plain_file(save):
    path = save(dataset())
    field = load_sst(path, anomalies=False)
    assert field.dims == ("time", "lat", "lon")
    assert field.dtype == np.float64
    assert field["time"].dtype == np.dtype("datetime64[ns]")
    np.testing.assert_allclose(field.values, truth().values, rtol=1e-12)
    np.testing.assert_array_equal(field["ocean"].values, np.isfinite(truth().values).all(axis=0))
    np.testing.assert_allclose(field["area_weight"], np.cos(np.deg2rad(LAT)))
    assert field.attrs["units"] == "degC"
    assert field.attrs["kind"] == "absolute"
    assert field.attrs["frequency"] == "monthly"
    assert field.attrs["period"] == "1990-01/1999-12"
    assert json.loads(field.attrs["mends"]) == []
    (source,) = json.loads(field.attrs["source_files"])
    assert source["name"] == "sst.nc"
    assert len(source["sha256"]) == 64


def test_field_survives_netcdf(save, tmp_path):
    field = load_sst(save(dataset()))
    field.to_netcdf(tmp_path / "again.nc")
    with xr.open_dataarray(tmp_path / "again.nc") as again:
        xr.testing.assert_identical(again.load(), field)


def test_poles_have_a_positive_weight(save):
    field = truth().assign_coords(lat=np.linspace(-90, 90, len(LAT)))
    weight = load_sst(save(dataset(field)))["area_weight"].values
    assert (weight > 0.05).all()
    assert weight[0] == weight[-1] < weight[1]


@pytest.mark.parametrize("extras", [True, False], ids=["cf-xarray and dask", "neither"])
@pytest.mark.parametrize(
    ("names", "attributes"),
    [
        ({"time": "time", "lat": "latitude", "lon": "longitude"}, {"lat": {"units": "degrees_north"}}),
        ({"time": "T", "lat": "Y", "lon": "X"}, {"lat": {"standard_name": "latitude"}, "lon": {"axis": "X"}}),
        ({"time": "TIME", "lat": "LAT45_65", "lon": "LON53_101"}, {}),
        (
            {"time": "months", "lat": "rows", "lon": "columns"},
            {"lat": {"units": "degreeN"}, "lon": {"units": "degree_E"}},
        ),
    ],
    ids=["ERDDAP", "IRI", "FERRET", "units only"],
)
def test_axes_are_found(save, monkeypatch, names, attributes, extras):
    if not extras:
        monkeypatch.setattr(gridded, "find_spec", lambda name: None)
    data = truth().rename(names).to_dataset(name="field")
    for key, name in names.items():
        data[name].attrs = dict(attributes.get(key, {}))
    path = save(data, **{names["time"]: {"units": "days since 1800-01-01"}})
    np.testing.assert_allclose(open_field(path).values, truth().values)
    assert open_field(path).dims == ("time", "lat", "lon")
    assert (open_field(path).chunks is not None) == extras


def test_cf_axes_on_index_dims(save):
    data = dataset().rename({"lat": "j", "lon": "i"})
    data = data.assign_coords(
        nav_lat=("j", LAT, {"units": "degrees_north"}), nav_lon=("i", LON, {"units": "degrees_east"})
    )
    path = save(data.drop_vars(["i", "j"]))
    np.testing.assert_allclose(load_sst(path, anomalies=False)["lon"], LON)


def test_singleton_depth_bounds_and_descending_latitudes(save):
    data = dataset(truth().isel(lat=slice(None, None, -1)).expand_dims(depth=[0.0], axis=1))
    data["lat"].attrs["bounds"] = "lat_bnds"
    data["lat_bnds"] = (("lat", "nv"), np.zeros((len(LAT), 2)))
    field = load_sst(save(data), anomalies=False)
    np.testing.assert_allclose(field.values, truth().values)
    np.testing.assert_array_equal(field["lat"], LAT)


def test_longitudes_never_cut_the_pacific(save):
    west_east = truth().assign_coords(lon=(LON + 180) % 360 - 180).sortby("lon")
    path = save(dataset(west_east))
    field = load_sst(path, region="north_pacific", anomalies=False)
    np.testing.assert_array_equal(field["lon"], np.arange(115.0, 260.0, 10.0))
    np.testing.assert_allclose(field.values, truth().sel(lat=slice(20, 65), lon=slice(110, 260)).values)
    part = save(dataset(west_east.where((west_east.lon > 120) | (west_east.lon < -100), drop=True)), "part.nc")
    np.testing.assert_array_equal(load_sst(part)["lon"], np.arange(125.0, 260.0, 10.0))


def test_a_region_beyond_the_file_is_said(save):
    part = save(dataset(truth().sel(lon=slice(150, 250))))
    assert "reaches beyond the field, which covers -55 to 55 N, 155 to 245 E" in mends_of(
        load_sst(part, region="north_pacific")
    )
    assert json.loads(load_sst(part, region="-50,50,150,250").attrs["mends"]) == []


def test_regions_over_the_prime_meridian(save):
    field = load_sst(save(dataset()), region="tropical_atlantic", anomalies=False)
    np.testing.assert_array_equal(field["lon"], np.arange(-55.0, 16.0, 10.0))
    np.testing.assert_allclose(field.sel(lon=-5.0).values, truth().sel(lon=355.0, lat=slice(-20, 20)).values)


def test_cyclic_longitudes_are_kept_once(save):
    cyclic = xr.concat([truth(), truth().isel(lon=[0]).assign_coords(lon=[365.0])], "lon")
    field = load_sst(save(dataset(cyclic)))
    np.testing.assert_array_equal(field["lon"], LON)
    assert "1 longitudes repeat" in mends_of(field)


@pytest.mark.parametrize("seed", range(5))
def test_arranged_longitudes_are_the_same_points_on_the_circle(seed):
    rng = np.random.default_rng(seed)
    lon = rng.permutation(rng.integers(-180, 360, size=12)).astype(float)
    index, values = arrange_longitudes(lon)
    assert (np.diff(values) > 0).all()
    assert values[-1] - values[0] < 360
    np.testing.assert_allclose((values - lon[index]) % 360, 0, atol=1e-9)
    assert len(index) == len(np.unique(lon % 360))


@pytest.mark.parametrize("name", REGIONS)
def test_named_regions_select_connected_longitudes(name):
    region = parse_region(name)
    index, values = select_longitudes(LON, region)
    assert len(index)
    np.testing.assert_allclose(np.diff(values), 10.0)
    np.testing.assert_allclose((values - LON[index]) % 360, 0)
    assert -180 <= values[0] <= values[-1] <= 360


@pytest.mark.parametrize(
    "region",
    ["20,60,110,260", "20,60,110,-100", {"lat": [20, 60], "lon": [110, 260]}, {"lat": (60, 20), "lon": (-250, -100)}],
)
def test_spellings_of_one_box(region):
    box = parse_region(region)
    assert (box.south, box.north, box.west, box.width) == (20, 60, 110, 150)


# ------------------------------------------------------------------------------------- values: fills, units, ice


@pytest.mark.parametrize("fill", [-1000.0, -999.0, 1e20, -1e30, -9999.0])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_undeclared_fill_values(save, fill, dtype):
    field = truth().fillna(fill).astype(dtype)
    path = save(dataset(field), sst={"_FillValue": None}, time={"units": "days since 1800-01-01"})
    loaded = load_sst(path, anomalies=False)
    np.testing.assert_array_equal(np.isnan(loaded.values), np.isnan(truth().values))
    assert "fill values that the file does not declare" in mends_of(loaded)
    np.testing.assert_array_equal(np.isnan(open_field(path).values), np.isnan(truth().values))


def test_declared_fill_values(save):
    path = save(
        dataset(truth(), missing_value=1e20), sst={"_FillValue": -999.0}, time={"units": "days since 1800-01-01"}
    )
    with netCDF4.Dataset(path, "a") as file:
        file["sst"].set_auto_mask(False)
        file["sst"][5, 0, 0] = 1e20
    loaded = load_sst(path, anomalies=False)
    assert np.isnan(loaded.values[5, 0, 0])
    assert int(np.isnan(loaded.values).sum()) == int(truth().isnull().sum()) + 1
    assert json.loads(loaded.attrs["mends"]) == []


def test_packed_integers(save):
    encoding = {"dtype": "int16", "scale_factor": 0.01, "add_offset": 10.0, "_FillValue": -32768}
    path = save(dataset(), sst=encoding, time={"units": "days since 1800-01-01"})
    np.testing.assert_allclose(load_sst(path, anomalies=False).values, truth().values, atol=0.0051)


def test_values_that_only_look_like_fill_values_stay(save):
    heights = (truth() * 100 - 2500).rename("height").assign_attrs(units="m", long_name="height of a surface")
    heights[3, 0, 0] = -999.0
    assert float(open_field(save(dataset(heights)))[3, 0, 0]) == -999.0


def test_own_fill_value(save):
    path = save(dataset(truth().fillna(77.0)))
    with pytest.raises(
        DataError, match=r"no sea surface temperatures.*first is 77 on 1990-01-01 at -35 N, 85 E.*fill="
    ):
        load_sst(path)
    loaded = load_sst(path, fill=77, anomalies=False)
    np.testing.assert_array_equal(np.isnan(loaded.values), np.isnan(truth().values))


@pytest.mark.parametrize(
    ("shift", "units", "said"),
    [
        (0.0, "degrees_C", ""),
        (0.0, "Celsius", ""),
        (273.15, "K", ""),
        (273.15, "kelvin", ""),
        (273.15, "degC", "are in kelvin; converted"),
        (273.15, "", "declares no units, but its values"),
        (0.0, "", "by its values"),
        (0.0, "K", "are in degC; not converted"),
    ],
)
def test_kelvin_and_celsius(save, shift, units, said):
    loaded = load_sst(save(dataset(truth() + shift, units=units)), anomalies=False)
    np.testing.assert_allclose(loaded.values, truth().values, atol=1e-9)
    assert loaded.attrs["units"] == "degC"
    assert said in mends_of(loaded)
    assert bool(mends_of(loaded)) == bool(said)


def test_other_quantities_keep_their_units(save):
    pressure = (truth() + 1000).rename("slp")
    loaded = load_sst(save(dataset(pressure, units="mb")), anomalies=False)
    assert loaded.attrs["units"] == "mb"
    np.testing.assert_allclose(loaded.values, pressure.values)


def test_sea_ice_is_an_option(save):
    field = truth().astype("float32")
    field[:60, 0, :] = -1.8
    path = save(dataset(field))
    assert np.isfinite(load_sst(path, anomalies=False).values[:60, 0]).all()
    loaded = load_sst(path, ice=-1.8, anomalies=False)
    assert np.isnan(loaded.values[:60, 0]).all()
    assert np.isfinite(loaded.values[60:, 0]).all()
    assert f"{60 * len(LON)} values at or below -1.8 degC" in mends_of(loaded)
    with pytest.raises(DataError, match="holds anomalies; leave ice out"):
        load_sst(save(dataset(field, long_name="SST anomaly"), "anomaly.nc"), ice=-1.8)


def test_cells_with_few_valid_months_are_land(save):
    field = truth()
    field[:80, 0, 0] = np.nan
    field[:20, 0, 1] = np.nan
    path = save(dataset(field))
    loaded = load_sst(path, anomalies=False)
    assert not loaded["ocean"].values[0, 0]
    assert np.isnan(loaded.values[:, 0, 0]).all()
    assert loaded["ocean"].values[0, 1]
    assert np.isnan(loaded.values[:20, 0, 1]).all()
    assert "1 cells with fewer than 50% valid" in mends_of(loaded)
    assert load_sst(path, min_valid=0.3)["ocean"].values[0, 0]


@pytest.mark.parametrize("value", [0.0, -1.8, 12.34])
@pytest.mark.parametrize("anomalies", [True, False])
def test_constant_cells_are_dropped_and_said(save, value, anomalies):
    field = truth().astype("float32")
    field[:, 0, :7] = value
    loaded = load_sst(save(dataset(field)), anomalies=anomalies)
    assert not loaded["ocean"].values[0, :7].any()
    assert loaded["ocean"].values[0, 7:].all()
    assert "7 cells are constant in time" in mends_of(loaded)


# -------------------------------------------------------------------------------------------------------- dates


def raw_times(path: Path, numbers: np.ndarray, **attrs: Any) -> Path:
    """Overwrite the time axis of a file with raw numbers and attributes."""
    with netCDF4.Dataset(path, "a") as file:
        time = file["time"]
        for name in time.ncattrs():
            if name != "_FillValue":
                time.delncattr(name)
        time.setncatts(attrs)
        time[:] = numbers
    return path


MONTHS = np.arange(NUM_MONTHS) + np.datetime64("1990-01", "M")
EPOCH_SECONDS = MONTHS.astype("datetime64[s]").astype(np.int64).astype(float)
DAYS_1800 = (MONTHS.astype("datetime64[D]") - np.datetime64("1800-01-01")).astype(float)


@pytest.mark.parametrize(
    ("numbers", "attrs", "said"),
    [
        (EPOCH_SECONDS, {"units": "seconds since 1970-01-01T00:00:00Z"}, ""),
        (EPOCH_SECONDS, {"units": "seconds since 1970-01-01T00:00:00Z", "calendar": "360_day"}, "read as 'standard'"),
        (DAYS_1800 + 15, {"units": "days since 1800-01-01", "calendar": "360_day"}, "read as 'standard'"),
        (DAYS_1800, {"units": "days since 1800-01-01", "calendar": "noleap"}, "read as 'standard'"),
        (30.0 * np.arange(NUM_MONTHS) + 15, {"units": "days since 1990-01-01", "calendar": "360_day"}, ""),
        (30.0 * np.arange(NUM_MONTHS), {"units": "days since 1990-01-01"}, "read as '360_day'"),
        (360 + np.arange(NUM_MONTHS) + 0.5, {"units": "months since 1960-01-01", "calendar": "360"}, ""),
        (30 + np.arange(NUM_MONTHS) / 12, {"units": "years since 1960-01-01"}, ""),
        (np.array([int(str(m).replace("-", "")) for m in MONTHS], float), {}, ""),
        (
            np.array([int(str(m).replace("-", "") + "16") for m in MONTHS], float) + 0.5,
            {"units": "day as %Y%m%d.%f"},
            "",
        ),
    ],
    ids=[
        "epoch",
        "epoch as 360_day",
        "days as 360_day",
        "days as noleap",
        "true 360_day",
        "360_day as standard",
        "months since",
        "years since",
        "YYYYMM",
        "YYYYMMDD",
    ],
)
def test_time_axes(save, numbers, attrs, said):
    field = load_sst(raw_times(save(dataset()), numbers, **attrs), anomalies=False)
    np.testing.assert_array_equal(field["time"].values, MONTHS.astype("datetime64[ns]"))
    assert said in mends_of(field)
    assert bool(mends_of(field)) == bool(said)


def test_wrong_calendar_of_daily_data_is_seen_by_the_coverage(save):
    days = np.arange(np.datetime64("1990-01-01"), np.datetime64("1991-01-01"))
    data = dataset(truth(len(days)).assign_coords(time=days.astype("datetime64[ns]")))
    data.attrs["time_coverage_start"] = "1990-01-01T00:00:00Z"
    seconds = days.astype("datetime64[s]").astype(np.int64).astype(float)
    path = raw_times(save(data), seconds, units="seconds since 1970-01-01", calendar="360_day")
    field = load_sst(path, anomalies=False)
    assert field.sizes["time"] == 12
    assert "the file says that it starts on 1990-01-01" in mends_of(field)


def test_end_of_month_stamps_with_bounds(save):
    data = dataset()
    ends = [*DAYS_1800[1:].tolist(), DAYS_1800[-1] + 31]
    path = save(data)
    with netCDF4.Dataset(path, "a") as file:
        file.createDimension("nv", 2)
        file.createVariable("time_bnds", "f8", ("time", "nv"))[:] = np.stack([DAYS_1800, ends], axis=1)
    raw_times(path, np.array(ends), units="days since 1800-01-01", bounds="time_bnds")
    field = load_sst(path, anomalies=False)
    np.testing.assert_array_equal(field["time"].values, MONTHS.astype("datetime64[ns]"))
    assert "stamp the end of their interval" in mends_of(field)


@pytest.mark.parametrize("units", ["", "fortnights since the flood", "days"])
def test_unreadable_times(save, units):
    with pytest.raises(DataError, match="units"):
        load_sst(raw_times(save(dataset()), np.arange(float(NUM_MONTHS)), units=units))


def test_missing_times(save):
    numbers = DAYS_1800.copy()
    numbers[4] = np.nan
    with pytest.raises(DataError, match="1 of 120 times are missing"):
        load_sst(raw_times(save(dataset()), numbers, units="days since 1800-01-01"))


def test_unsorted_times_are_sorted_and_said(save):
    shuffled = truth().isel(time=np.random.default_rng(0).permutation(NUM_MONTHS))
    field = load_sst(save(dataset(shuffled)), anomalies=False)
    np.testing.assert_allclose(field.values, truth().values)
    assert "times are not in order; sorted, 1990-01-01 to 1999-12-01" in mends_of(field)


def test_duplicated_times(save):
    doubled = truth().isel(time=[*range(10), 9, *range(10, NUM_MONTHS)])
    field = load_sst(save(dataset(doubled)), anomalies=False)
    np.testing.assert_allclose(field.values, truth().values)
    assert "1 dates occur twice with equal values (1990-10-01)" in mends_of(field)
    doubled[10] += 1.0
    with pytest.raises(DataError, match="dates occur twice with different values: 1990-10-01"):
        load_sst(save(dataset(doubled), "different.nc"))


def test_missing_months_are_said(save):
    field = load_sst(save(dataset(truth().isel(time=[*range(20), *range(24, NUM_MONTHS)]))))
    assert "The dates have holes, which the analysis spans: 1991-08 to 1992-01" in mends_of(field)


def test_daily_values_become_months(save):
    days = np.arange(np.datetime64("1990-01-01"), np.datetime64("1991-02-04"))
    rng = np.random.default_rng(0)
    values = rng.normal(15, 3, size=(len(days), len(LAT), len(LON)))
    daily = xr.DataArray(values, {"time": days.astype("datetime64[ns]"), "lat": LAT, "lon": LON}, name="sst")
    field = load_sst(save(dataset(daily, units="degC")), anomalies=False)
    np.testing.assert_allclose(field.values, daily.isel(time=slice(396)).resample(time="MS").mean().values)
    assert "averaged to 13 months; dropped for lack of half their days: 1991-02" in mends_of(field)


# ------------------------------------------------------------------------------------- periods, seasons, anomalies


def test_anomalies_have_no_mean_cycle_over_the_base_period(save):
    field = load_sst(save(dataset()), base_period="1991-1995", period=(1993, 1998))
    expected = truth().groupby("time.month") - truth().sel(time=slice("1991", "1995")).groupby("time.month").mean()
    np.testing.assert_allclose(field.values, expected.sel(time=slice("1993", "1998")).values, atol=1e-12)
    assert field.attrs["base_period"] == "1991-01/1995-12"
    assert field.attrs["kind"] == "anomaly"
    default = load_sst(save(dataset()), period="1991-1995")
    assert default.attrs["base_period"] == "1991-01/1995-12"
    np.testing.assert_allclose(default.groupby("time.month").mean().fillna(0.0), 0.0, atol=1e-12)


def test_base_period_beyond_the_data_is_said(save):
    field = load_sst(save(dataset()), base_period="1971-2000")
    assert "base period 1971-01/2000-12 reaches beyond the data; 1990-01 to 1999-12 was used" in mends_of(field)


def test_gaps_do_not_spoil_the_climatology(save):
    field = truth()
    field[5, 0, 0] = np.nan
    loaded = load_sst(save(dataset(field)))
    june = field[5::12, 0, 0]
    np.testing.assert_allclose(loaded.values[5::12, 0, 0], (june - june.mean()).values, atol=1e-12)


def test_fields_that_are_anomalies_already(save):
    anomaly = truth().groupby("time.month") - truth().groupby("time.month").mean()
    anomaly = anomaly.drop_vars("month").assign_attrs(units="degC") + 0.05
    for data in (dataset(anomaly), dataset(anomaly + 3.0, long_name="SST anomalies")):
        loaded = load_sst(save(data))
        np.testing.assert_allclose(loaded.values, data["sst"].values)
        assert "holds anomalies already; no climatology was removed" in mends_of(loaded)
        assert loaded.attrs["base_period"] == ""
        assert loaded.attrs["kind"] == "anomaly"
        (save(data)).unlink()
    moved = load_sst(save(dataset(anomaly, long_name="anomaly")), base_period="1990-1999")
    assert "brought onto the base period" in mends_of(moved)
    assert abs(float(moved.mean())) < 1e-12


def test_seasonal_means_are_dated_by_january(save):
    decade = truth(132)
    field = load_sst(save(dataset(decade)), season="NDJFM", anomalies=False)
    np.testing.assert_array_equal(field["time"].dt.year, np.arange(1991, 2001))
    expected = decade.sel(time=slice("1990-11", "1991-03")).mean("time", skipna=False)
    np.testing.assert_allclose(field.values[0], expected.values)
    assert "Seasons NDJFM that lack a month were dropped: 1990, 2001." in mends_of(field)
    assert field.attrs["frequency"] == "yearly"
    summer = load_sst(save(dataset()), season=[6, 7, 8], anomalies=False)
    np.testing.assert_array_equal(
        summer["time"].values[[0, -1]], np.array(["1990-07-01", "1999-07-01"], "datetime64[ns]")
    )
    assert summer.attrs["season"] == "JJA"
    assert json.loads(summer.attrs["mends"]) == []


def test_a_period_of_seasons_reads_the_autumn_before(save):
    path = save(dataset(truth(300, "1980-01")))
    field = load_sst(path, season="DJF", period="1985-1999", base_period="1981-1990")
    np.testing.assert_array_equal(field["time"].dt.year, np.arange(1985, 2000))
    whole = truth(300, "1980-01")
    monthly = whole.groupby("time.month") - whole.sel(time=slice("1981", "1990")).groupby("time.month").mean()
    expected = monthly.sel(time=slice("1984-12", "1985-02")).mean("time", skipna=False)
    np.testing.assert_allclose(field.values[0], expected.values, atol=1e-12)
    assert json.loads(field.attrs["mends"]) == []


def test_season_of_yearly_data_is_refused(save):
    yearly = truth().groupby("time.year").mean().rename(year="time")
    dates = np.array([f"{y}-01-15" for y in yearly["time"].values], "datetime64[ns]")
    path = save(dataset(yearly.assign_coords(time=dates).assign_attrs(units="degC")))
    with pytest.raises(DataError, match="needs monthly data, but 'sst' is yearly"):
        load_sst(path, season="DJF")
    field = load_sst(path)
    np.testing.assert_allclose(field.mean("time").fillna(0.0), 0.0, atol=1e-12)


@pytest.mark.parametrize(
    ("season", "months", "label"),
    [
        ("NDJFM", (11, 12, 1, 2, 3), "NDJFM"),
        ("djf", (12, 1, 2), "DJF"),
        ("JJA", (6, 7, 8), "JJA"),
        ([12, 1, 2], (12, 1, 2), "DJF"),
        ([1, 2, 12], (12, 1, 2), "DJF"),
        ([1, 7], (1, 7), "1,7"),
        ("annual", tuple(range(1, 13)), "annual"),
    ],
)
def test_seasons(season, months, label):
    parsed = parse_season(season)
    assert (parsed.months, parsed.label) == (months, label)


@pytest.mark.parametrize(
    ("season", "match"),
    [("J", "January or June or July"), ("DJM", "not a run"), ([0, 1], "1 to 12"), ([1.5], "1 to 12"), (5, "1 to 12")],
)
def test_bad_seasons(season, match):
    with pytest.raises(DataError, match=match):
        parse_season(season)


@pytest.mark.parametrize(
    ("period", "label"),
    [
        ("1950-2019", "1950-01/2019-12"),
        ("1950-01/2019-04", "1950-01/2019-04"),
        ("1950-03:2019-04", "1950-03/2019-04"),
        ((1950, 2019), "1950-01/2019-12"),
        (["1950-02", None], "1950-02/"),
        ("1950/", "1950-01/"),
        (1999, "1999-01/1999-12"),
        (slice("1950-01-01", "2019-04-30"), "1950-01/2019-04"),
    ],
)
def test_periods(period, label):
    assert parse_period(period).label == label


@pytest.mark.parametrize(
    "period", ["soon", "2019-1950", (1950, 1960, 1970), "1950-13/1951-01", "/", 3.5, True, {}, 10**30]
)
def test_bad_periods(period):
    with pytest.raises(DataError, match="period"):
        parse_period(period)


# ----------------------------------------------------------------------------------------------- several files


@pytest.mark.parametrize("extras", [True, False], ids=["dask", "no dask"])
def test_several_files(save, tmp_path, monkeypatch, extras):
    if not extras:
        monkeypatch.setattr(gridded, "find_spec", lambda name: None)
    for i in range(10):
        save(dataset(truth().isel(time=slice(12 * i, 12 * i + 12))), f"sst.{1990 + i}.nc")
    field = load_sst(str(tmp_path / "sst.*.nc"), period="1991-1998", anomalies=False)
    np.testing.assert_allclose(field.values, truth().sel(time=slice("1991", "1998")).values)
    assert len(json.loads(field.attrs["source_files"])) == 10
    np.testing.assert_allclose(open_field(tmp_path / "sst.199?.nc").values, truth().values)
    reverse = [tmp_path / f"sst.{year}.nc" for year in range(1999, 1989, -1)]
    np.testing.assert_allclose(load_sst(reverse, anomalies=False).values, truth().values)
    save(dataset(truth().isel(time=slice(110, 120))), "sst.overlap.nc")
    assert "10 dates occur twice" in mends_of(load_sst(tmp_path / "sst.*.nc"))


def test_files_of_different_grids_or_products(save, tmp_path):
    save(dataset(), "a.nc")
    save(dataset(truth().isel(lat=slice(3, None))), "b.nc")
    with pytest.raises(DataError, match=r"b.nc: its lat axis \(9 values from -25\) differs from that of a.nc"):
        load_sst(tmp_path / "*.nc")
    save(dataset(truth() + 273.15, units="K"), "b.nc")
    with pytest.raises(DataError, match="units 'K' differs from 'degC'"):
        load_sst(tmp_path / "*.nc")


def test_data_in_memory():
    np.testing.assert_allclose(load_sst(truth(), anomalies=False).values, truth().values)
    field = load_sst(dataset(), anomalies=False)
    assert json.loads(field.attrs["source_files"]) == []


def test_reading_is_lazy(save, monkeypatch):
    path = save(dataset())
    read: list[int] = []
    real = climate.refuse_infinities
    monkeypatch.setattr(chunks, "refuse_infinities", lambda field: (read.append(field.size), real(field)))
    load_sst(path, region="nino34", period="1991-1993")
    assert read == [36 * 2 * 5]  # three years of the ten cells in the box


# --------------------------------------------------------------------------------------------------- bad input


def test_files_that_are_none(tmp_path):
    with pytest.raises(DataError, match="file not found"):
        load_sst(tmp_path / "absent.nc")
    with pytest.raises(DataError, match="no file matches"):
        load_sst(tmp_path / "absent*.nc")
    with pytest.raises(DataError, match="is a folder"):
        load_sst(tmp_path)
    with pytest.raises(DataError, match="list of files is empty"):
        load_sst([])
    for content, match in (
        (b"time,sst\n", "not a NetCDF file"),
        (b"\x1f\x8b123", "compressed"),
        (b"", "text.nc is empty"),
    ):
        (tmp_path / "text.nc").write_bytes(content)
        with pytest.raises(DataError, match=match):
            load_sst(tmp_path / "text.nc")
    (tmp_path / "cut.nc").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    with pytest.raises(DataError, match="cannot be read as NetCDF"):
        load_sst(tmp_path / "cut.nc")


def test_no_field(save):
    with pytest.raises(DataError, match="no recognisable field: no time axis among"):
        load_sst(dataset(truth()).isel(time=0, drop=True))
    with pytest.raises(DataError, match="no variable has time, latitude and longitude; its variables: index"):
        load_sst(dataset().mean(("lat", "lon")).rename(sst="index").assign_coords(lat=LAT, lon=LON))
    levels = dataset(truth().expand_dims(depth=[0.0, 10.0]))
    with pytest.raises(DataError, match="dimension 'depth' of length 2"):
        load_sst(save(levels))
    curved = dataset().rename(lat="y", lon="x").drop_vars(["x", "y"])
    curved["latitude"] = (("y", "x"), np.zeros((len(LAT), len(LON))), {"units": "degrees_north"})
    with pytest.raises(DataError, match="two-dimensional: regrid"):
        load_sst(curved)
    with pytest.raises(DataError, match="are not degrees"):
        load_sst(dataset(truth().assign_coords(lat=1000 * LAT)))


def test_two_fields(save):
    data = dataset()
    data["ssta"] = data["sst"] - 15
    path = save(data)
    with pytest.raises(DataError, match=r"several fields: sst, ssta; choose one with variable='sst'"):
        load_sst(path)
    assert load_sst(path, variable="sst").name == "sst"
    assert load_sst(path, variable="ssta").attrs["kind"] == "anomaly"
    with pytest.raises(DataError, match="no variable 'tos'; its variables: sst"):
        load_sst(path, variable="tos")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"region": "north_pacifik"}, "did you mean 'north_pacific'"),
        ({"region": "10,20"}, "unknown region"),
        ({"region": {"lat": [0, 10], "long": [0, 10]}}, "unknown keys 'long'"),
        ({"region": "0,95,0,10"}, "within -90 to 90"),
        ({"region": "60,80,0,360"}, "holds no cell of the field, which covers -55 to 55 N, 5 to 355 E"),
        ({"region": "-37,-13,83,117"}, "all land"),
        ({"period": "2010-2020"}, r"period 2010-01/2020-12 is empty: the field covers 1990-01 to 1999-12"),
        ({"base_period": "1961-1980"}, "base_period 1961-01/1980-12 is empty"),
        ({"base_period": "1991-01/1991-06"}, "holds no month 7"),
        ({"period": "1990-01/1990-09"}, "only 9 time steps are left, at least 10"),
        ({"season": "DJF", "period": "1990-1998"}, "only 8 time steps"),
        ({"min_valid": 1.5}, "min_valid=1.5; give a number of at least 0 and of at most 1"),
        ({"region": {}}, "bounds nothing"),
        ({"region": {"lat": [0]}}, "two numbers each"),
        ({"season": []}, "a list of at least 1, each item a whole number"),
        ({"season": [6, 6]}, "different months from 1 to 12"),
        ({"anomalies": False, "base_period": "1991-1995"}, "base_period='1991-1995' is not used with anomalies=False"),
    ],
)
def test_bad_selections(save, options, match):
    with pytest.raises(DataError, match=match):
        load_sst(save(dataset()), **options)


def test_infinities_and_constants(save):
    field = truth()
    field[3, 1, 2] = np.inf
    with pytest.raises(
        DataError, match="1 values of 'sst' are infinite; the first is inf on 1990-04-01 at -45 N, 25 E"
    ):
        load_sst(save(dataset(field)))
    with pytest.raises(DataError, match="are constant in time"):
        load_sst(save(dataset(truth() * 0 + 4)))
    with pytest.raises(DataError, match=r"Of less than two years .* --no-anomalies"):
        load_sst(save(dataset(truth(10))))  # each month is its own climatology
    assert load_sst(save(dataset(truth(10))), anomalies=False).sizes["time"] == 10
    with pytest.raises(DataError, match="no valid value"):
        load_sst(save(dataset(truth() * np.nan)))


# ---------------------------------------------------------------------------------------------- cells and maps


def test_cells_and_back(save):
    gappy = truth()
    gappy[3, 0, 1] = np.nan
    field = load_sst(save(dataset(gappy)))
    matrix = to_matrix(field)
    assert matrix.dims == ("cell", "time")
    assert matrix.sizes == {"cell": len(LAT) * len(LON) - 12, "time": NUM_MONTHS}
    assert int(matrix.isnull().sum()) == 1
    assert set(matrix.coords) == {"cell", "time", "lat", "lon", "lat_index", "lon_index", "area_weight"}
    np.testing.assert_allclose(matrix["area_weight"], np.cos(np.deg2rad(matrix["lat"])))
    for template in (field, matrix):
        xr.testing.assert_equal(
            from_cells(matrix, template), field.drop_vars(["ocean", "area_weight"]).transpose("time", ...)
        )
        modes = from_cells(matrix.values[:, :3].T, template)
        assert modes.dims == ("dim_0", "lat", "lon")
        np.testing.assert_allclose(modes.values, field.values[:3])
    draws = xr.DataArray(
        np.ones((2, matrix.sizes["cell"], 3)), dims=("draw", "cell", "mode"), coords={"mode": [1, 2, 3]}
    )
    assert from_cells(draws, matrix).dims == ("draw", "mode", "lat", "lon")
    np.testing.assert_array_equal(from_cells(draws, matrix)["mode"], [1, 2, 3])


def test_matrix_survives_netcdf(save, tmp_path):
    matrix = to_matrix(load_sst(save(dataset()), region="nino34"))
    matrix.to_netcdf(tmp_path / "matrix.nc")
    with xr.open_dataarray(tmp_path / "matrix.nc") as again:
        xr.testing.assert_equal(from_cells(again, again), from_cells(matrix, matrix))


def test_matrix_of_an_open_field(save):
    matrix = to_matrix(open_field(save(dataset())))
    assert matrix.sizes["cell"] == len(LAT) * len(LON) - 12


def test_cells_that_do_not_fit():
    matrix = to_matrix(truth())
    with pytest.raises(DataError, match="do not fit a template of 420 cells"):
        from_cells(matrix.isel(cell=slice(5)), matrix)
    with pytest.raises(DataError, match=r"shape \(3, 4\) does not have one axis of 420 cells"):
        from_cells(np.zeros((3, 4)), matrix)
    with pytest.raises(DataError, match="expected"):
        to_matrix(truth().isel(lat=0))


# ---------------------------------------------------------------------------------------------------- real data


def test_ersst_of_the_north_pacific(test_data):
    path = test_data("sst/ersst_v5_north_pacific_1950_2019.nc")
    field = load_sst(path, anomalies=False)
    assert field.sizes == {"time": 832, "lat": 19, "lon": 51}
    np.testing.assert_array_equal(
        field["time"].values, np.arange("1950-01", "2019-05", dtype="datetime64[M]").astype("datetime64[ns]")
    )
    assert int(field["ocean"].sum()) == 717
    assert to_matrix(field).shape == (717, 832)
    assert "declares calendar '360_day'" in mends_of(field)
    cycle = field.groupby("time.month").mean()
    warmest = cycle["month"].values[cycle.fillna(-99.0).argmax("month").values][field["ocean"].values]
    assert np.isin(warmest, [8, 9]).mean() > 0.98  # the ocean lags the sun by two months north of 30 N
    coldest = cycle["month"].values[cycle.fillna(99.0).argmin("month").values][field["ocean"].values]
    assert np.isin(coldest, [1, 2, 3, 4]).mean() > 0.98
    winters = load_sst(path, season="NDJFM", base_period="1981-2010")
    np.testing.assert_array_equal(winters["time"].dt.year, np.arange(1951, 2020))


def test_el_nino_of_2015_in_global_ersst(test_data):
    field = load_sst(test_data("sst/ersst_v5_global_2010_2020.nc"), region="nino34")
    assert field.sizes["time"] == 128
    index = field.weighted(field["area_weight"]).mean(("lat", "lon"))
    assert str(index["time"].values[np.argmax(index.values)])[:7] in ("2015-11", "2015-12")
    assert 2.0 < float(index.max()) < 3.5
    pacific = load_sst(test_data("sst/ersst_v5_global_2010_2020.nc"), region="pacific", ice=-1.8)
    assert (np.diff(pacific["lon"]) == 2.0).all()


def test_sea_level_pressure_as_a_ferret_user_wrote_it(test_data):
    field = load_sst(test_data("sst/ncep_slp_north_pacific_1948_2019.nc"), anomalies=False)
    assert field.sizes == {"time": 854, "lat": 21, "lon": 49}
    assert field.attrs["period"] == "1948-01/2019-02"
    assert int(field["ocean"].sum()) == 21 * 49
    assert "declares no units" in mends_of(field)
    assert 950 < float(field.min()) < float(field.max()) < 1060


def test_default_field():
    pytest.importorskip("eofs")
    field = load_sst()
    assert field.sizes == {"time": 50, "lat": 18, "lon": 30}
    assert int(field["ocean"].sum()) == 450
    np.testing.assert_array_equal(field["time"].dt.year, np.arange(1963, 2013))
    assert field.attrs["kind"] == "anomaly"
    assert field.attrs["frequency"] == "yearly"
    assert field.attrs["units"] == "degC"
    assert "no climatology was removed" in mends_of(field)
    np.testing.assert_allclose(default_field().values, field.values)
    assert abs(float(load_sst(base_period="1963-2012").mean())) < 1e-12


def test_default_field_without_eofs(monkeypatch):
    monkeypatch.setattr(sst, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install probmodels\[sst\]"):
        load_sst()


def test_finding_the_default_field_imports_nothing_of_its_package():
    pytest.importorskip("eofs")
    code = (
        "import sys; from probmodels.datasets.sst import default_path; assert default_path().is_file(); "
        "print(*{'eofs', 'dask'} & sys.modules.keys())"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).split() == []


# ---------------------------------------------------------------------------------------------------- front door


def test_load_by_name(save):
    path = save(dataset())
    xr.testing.assert_identical(load("sst", path=path, region="nino34"), load_sst(path, region="nino34"))
    assert get_loader("sst") is load_sst
    with pytest.raises(DataError, match="did you mean 'sst'"):
        load("ssts")


@pytest.mark.parametrize(
    ("module", "heavy"), [("datasets", "torch xarray pooch"), ("datasets.sst", "torch arviz pooch")]
)
def test_importing_stays_light(module, heavy):
    code = f"import sys, probmodels.{module}; print(*set({heavy.split()}) & sys.modules.keys())"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).split() == []
