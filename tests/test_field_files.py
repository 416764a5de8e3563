"""What real files do to readers: each case is read as it is meant, or refused with the cause and a remedy."""

from __future__ import annotations

import datetime as dt
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cftime
import netCDF4
import numpy as np
import pytest
import xarray as xr
from typer.testing import CliRunner

from probmodels import Result
from probmodels.bayesian_svd import make_problem
from probmodels.cli import app
from probmodels.datasets import gridded
from probmodels.datasets.sst import load_sst, open_field
from probmodels.errors import DataError

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from fuzz_files import fuzz

NUM_MONTHS, LAT, LON = 48, np.linspace(60.0, 80.0, 5), np.linspace(150.0, 210.0, 7)
MONTHS = np.arange(NUM_MONTHS) + np.datetime64("1990-01", "M")
DAYS = (MONTHS.astype("datetime64[D]") - np.datetime64("1990-01-01")).astype(float)
NOLEAP = np.cumsum(np.tile([31.0, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31], 4)) - 16  # mid-month


def warm(seed: int = 0) -> np.ndarray:
    """Absolute temperatures in degC, with a seasonal cycle; shape (time, lat, lon)."""
    rng = np.random.default_rng(seed)
    cycle = 3 * np.cos(2 * np.pi * (np.arange(NUM_MONTHS) - 7) / 12)
    return 12 + cycle[:, None, None] + 0.5 * rng.normal(size=(NUM_MONTHS, len(LAT), len(LON)))


def write(
    path: Path,
    values: np.ndarray | None = None,
    time: np.ndarray | None = None,
    time_attrs: dict[str, Any] | None = None,
    attrs: dict[str, Any] | None = None,
    lat: dict[str, Any] | None = None,
    lon: dict[str, Any] | None = None,
    names: tuple[str, str, str] = ("time", "lat", "lon"),
    axes: tuple[np.ndarray, np.ndarray] = (LAT, LON),
    kind: str = "f8",
    format: str = "NETCDF4",
) -> Path:
    """A file, attributes as given; None for what is usual."""
    values = warm() if values is None else values
    time = DAYS if time is None else time
    with netCDF4.Dataset(path, "w", format=format) as file:
        for name, axis in zip(names, (time, *axes), strict=True):
            file.createDimension(name, len(axis))
            file.createVariable(name, axis.dtype if name == names[0] else "f8", (name,))[:] = axis
        file[names[0]].setncatts({"units": "days since 1990-01-01"} if time_attrs is None else time_attrs)
        file[names[1]].setncatts({"units": "degrees_north"} if lat is None else lat)
        file[names[2]].setncatts({"units": "degrees_east"} if lon is None else lon)
        variable = file.createVariable("sst", kind, names)
        variable.setncatts({"units": "degC"} if attrs is None else attrs)
        variable.set_auto_maskandscale(False)
        variable[:] = values
    return path


def load(source: Any, **options: Any) -> tuple[xr.DataArray, str]:
    """The field without its climatology removed, and what was said of it."""
    field = load_sst(source, anomalies=False, **options)
    return field, "\n".join(json.loads(field.attrs["mends"]))


# -- time ---------------------------------------------------------------------------------------------------------

MID = DAYS + 14
TIMES: dict[str, tuple[np.ndarray, dict[str, Any], str, str]] = {  # values, attributes, first month, what is said
    "Ferret": (24 * MID, {"units": "HOURS since 01-JAN-1990 00:00:00"}, "1990-01", ""),
    "slashes": (MID, {"units": "days since 1990/01/01"}, "1990-01", ""),
    "a year": (MID, {"units": "days since 1990"}, "1990-01", ""),
    "digits": (MID, {"units": "days since 19900101"}, "1990-01", ""),
    "day first": (MID - 30, {"units": "days since 31.01.1990"}, "1990-01", ""),
    "time zone": (MID, {"units": "days since 1990-01-01 00:00:00 UTC"}, "1990-01", ""),
    "year 0, noleap": (NOLEAP, {"units": "days since 0000-01-01 00:00:00", "calendar": "noleap"}, "0000-01", ""),
    "year 1990, noleap": (
        NOLEAP + 1990 * 365,
        {"units": "days since 0000-01-01 00:00:00", "calendar": "noleap"},
        "1990-01",
        "",
    ),
    "year 0, 360_day": (
        30.0 * np.arange(NUM_MONTHS) + 15,
        {"units": "days since 0000-01-01", "calendar": "360_day"},
        "0000-01",
        "",
    ),
    "control run": (NOLEAP + 365, {"units": "days since 0001-01-01", "calendar": "noleap"}, "0002-01", ""),
    "year 2300": (MID, {"units": "days since 2300-01-01"}, "2300-01", ""),
    "year -5000": (MID, {"units": "days since -5000-01-01", "calendar": "proleptic_gregorian"}, "-5000-01", ""),
    "nanoseconds": (
        (MONTHS.astype("datetime64[ns]").astype(np.int64)),
        {"units": "nanoseconds since 1970-01-01T00:00:00+00:00"},
        "1990-01",
        "",
    ),
    "weeks": (MID / 7, {"units": "weeks since 1990-01-01"}, "1990-01", ""),
    "calendar_type": (
        30.0 * np.arange(NUM_MONTHS) + 15,
        {"units": "days since 1990-01-01", "calendar_type": "THIRTY_DAY_MONTHS"},
        "1990-01",
        "",
    ),
    "bounds of a number": (MID, {"units": "days since 1990-01-01", "bounds": 5}, "1990-01", "bounds of 'time' is"),
    "dangling bounds": (
        DAYS,
        {"units": "days since 1990-01-01", "bounds": "time_bnds"},
        "1990-01",
        "the bounds 'time_bnds' of the times are not in the file.*if they end them.*cdo shifttime,-1month",
    ),
    "dangling bounds that do no harm": (
        MID,
        {"units": "days since 1990-01-01", "bounds": "time_bnds"},
        "1990-01",
        "",
    ),
    "year 1 in today's calendar": (
        (MONTHS.astype("datetime64[D]") - np.datetime64("0001-01-01")).astype(float),
        {"units": "days since 0001-01-01"},
        "1990-01",
        "read as 'proleptic_gregorian', 1990-01 to 1993-12",
    ),
    "year 1 in the mixed calendar": (
        cftime.date2num(
            [cftime.DatetimeGregorian(1990 + i // 12, i % 12 + 1, 1) for i in range(NUM_MONTHS)],
            "days since 0001-01-01",
            "standard",
        ).astype(float),
        {"units": "days since 0001-01-01"},
        "1990-01",
        "",
    ),
    "twelfths of a year": (
        365.25 / 12 * np.arange(NUM_MONTHS),
        {"units": "days since 1990-01-01"},
        "1990-01",
        "steps of 30.4375 days, a twelfth of a year",
    ),
}


@pytest.mark.parametrize("case", TIMES)
def test_times_are_the_months_that_they_say(case: str, tmp_path: Path) -> None:
    time, attrs, first, said = TIMES[case]
    field, mends = load(write(tmp_path / "sst.nc", time=time, time_attrs=attrs))
    expected = np.datetime64(first, "M") + np.arange(NUM_MONTHS)
    np.testing.assert_array_equal(field["time"].values.astype("datetime64[M]"), expected)
    np.testing.assert_array_equal(field["time"].values, expected.astype("datetime64[s]"))
    assert re.search(said, mends)
    assert bool(mends) == bool(said)


@pytest.mark.parametrize(
    ("attrs", "message"),
    [
        ({"units": "days since 02.01.1990"}, "cannot read the origin '02.01.1990'"),
        ({"units": "days since the flood"}, "cannot read the origin 'the flood'"),
        ({"units": "days since 1990-13-01"}, "'1990-13-01'"),
        ({"units": "fortnights since 1990-01-01"}, "count fortnights, which is not a unit of time"),
        ({"units": "days since 1990-01-01", "calendar": "noleep"}, "unknown calendar 'noleep'; did you mean 'noleap'"),
        ({"units": "weeks since 1990-01-01", "calendar": "none"}, "unknown calendar 'none'.*cdo setcalendar"),
    ],
)
def test_times_that_cannot_be_read_name_the_cause(attrs: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        load(write(tmp_path / "sst.nc", time=MID, time_attrs=attrs))
    with pytest.raises(DataError, match="more than 10000 years"):
        load(write(tmp_path / "far.nc", time=1e20 + MID, time_attrs={"units": "days since 1990-01-01"}))


@pytest.mark.parametrize(
    "times",
    [
        [str(month) + "-15" for month in MONTHS],
        [dt.date(1990 + i // 12, i % 12 + 1, 15) for i in range(NUM_MONTHS)],
        [dt.datetime(1990 + i // 12, i % 12 + 1, 15, 6) for i in range(NUM_MONTHS)],
        [cftime.DatetimeNoLeap(1990 + i // 12, i % 12 + 1, 15) for i in range(NUM_MONTHS)],
        np.array([str(month) + "-15" for month in MONTHS], dtype="S10"),
    ],
    ids=["texts", "dates", "datetimes", "cftime", "bytes"],
)
def test_times_in_memory(times: Any) -> None:
    held = times if isinstance(times, np.ndarray) else np.array(times, dtype=object)
    field = xr.DataArray(
        warm(), {"time": held, "lat": LAT, "lon": LON}, ("time", "lat", "lon"), "sst", {"units": "degC"}
    )
    np.testing.assert_array_equal(load(field)[0]["time"].values, MONTHS.astype("datetime64[ns]"))


def test_texts_as_times_in_a_file(tmp_path: Path) -> None:
    field = xr.DataArray(warm(), {"lat": LAT, "lon": LON}, ("time", "lat", "lon"), "sst", {"units": "degC"})
    texts = np.array([str(month) + "-15" for month in MONTHS], dtype="S10")
    field.assign_coords(time=texts).to_netcdf(tmp_path / "sst.nc")
    np.testing.assert_array_equal(load(tmp_path / "sst.nc")[0]["time"].values, MONTHS.astype("datetime64[ns]"))
    field.assign_coords(time=np.array(["soon"] * NUM_MONTHS, dtype="S10")).to_netcdf(tmp_path / "soon.nc")
    with pytest.raises(DataError, match=r"b'soon' is not a date; write times as 1990-01-31"):
        load(tmp_path / "soon.nc")


@pytest.mark.parametrize("bounds", [False, True])
def test_one_map_per_file(bounds: bool, tmp_path: Path) -> None:
    for i in range(14):
        with netCDF4.Dataset(tmp_path / f"sst.{i:02d}.nc", "w") as file:
            for name, axis in (("lat", LAT), ("lon", LON)):
                file.createDimension(name, len(axis))
                file.createVariable(name, "f8", (name,))[:] = axis
            file.createVariable("time", "f8", ()).setncatts({"units": "days since 1990-01-01"})
            file["time"][...] = DAYS[i + 1] if bounds else MID[i]
            if bounds:
                file["time"].bounds = "time_bnds"
                file.createDimension("nv", 2)
                file.createVariable("time_bnds", "f8", ("nv",))[:] = DAYS[i : i + 2]
            file.createVariable("sst", "f8", ("lat", "lon"))[:] = warm()[i]
            file["sst"].units = "degC" if i % 2 else "Celsius"
    field, _ = load(str(tmp_path / "sst.*.nc"))
    np.testing.assert_array_equal(field["time"].values, MONTHS[:14].astype("datetime64[ns]"))
    np.testing.assert_allclose(field.values, warm()[:14])


def test_parts_before_and_after_the_range_of_nanoseconds(tmp_path: Path) -> None:
    write(tmp_path / "a.nc", time_attrs={"units": "days since 1674-01-01"}, time=MID)
    write(tmp_path / "b.nc", time_attrs={"units": "days since 1990-01-01"}, time=MID)
    years = load(str(tmp_path / "?.nc"))[0]["time"].dt.year
    np.testing.assert_array_equal(np.unique(years), [1674, 1675, 1676, 1677, 1990, 1991, 1992, 1993])


def test_model_years_go_all_the_way(tmp_path: Path) -> None:
    time, attrs, _, _ = TIMES["year 0, noleap"]
    write(tmp_path / "control.nc", warm()[:24], time[:24], attrs)
    options = ["--rank=1", "--draws=8", "--warmup=1", "--chains=1", "--quiet", "--min-valid=0.4"]
    options += ["--set", "model.length_scales_space=[500.0]", f"--out={tmp_path / 'run'}"]
    status = CliRunner().invoke(app, ["sst", str(tmp_path / "control.nc"), *options])
    assert status.exit_code == 0, status.output
    result = Result.load(tmp_path / "run")
    expected = np.datetime64("0000-01", "M") + np.arange(24)
    np.testing.assert_array_equal(result.group("constant_data")["time"].values, expected.astype("datetime64[s]"))
    assert result.rebuild().data is not None
    assert json.loads(result.tree.attrs["spec"])["model"]["length_scales_space"] == [500.0]


def test_matrices_with_dates_as_objects() -> None:
    dates = [dt.date(1990 + i // 12, i % 12 + 1, 15) for i in range(NUM_MONTHS)]
    data = xr.DataArray(warm().reshape(48, 35).T, dims=("cell", "time"), coords={"time": np.array(dates, dtype=object)})
    problem = make_problem(data, rank=1, fixed_effects=["intercept", "annual"], length_scales_space=[3.0])
    assert problem.data is not None
    assert problem.data["time"].dtype == np.dtype("datetime64[ns]")


# -- grids --------------------------------------------------------------------------------------------------------

INDICES = (np.arange(5.0), np.arange(7.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"names": ("time", "y", "x"), "axes": INDICES, "lat": {}, "lon": {}}, "count rows and columns"),
        (
            {
                "names": ("time", "y", "x"),
                "axes": (25 * INDICES[0], 25 * INDICES[1]),
                "lat": {"units": "km", "standard_name": "projection_y_coordinate", "axis": "Y"},
                "lon": {"units": "km", "standard_name": "projection_x_coordinate", "axis": "X"},
            },
            "'y' holds projection y coordinate, no latitudes; regrid",
        ),
        ({"lat": {"units": "km", "axis": "Y"}, "lon": {"units": "km"}}, "'lat' is in units 'km'.*regrid"),
        ({"lon": {"units": "m"}}, "'lon' is in units 'm'.*regrid"),
        (
            {
                "names": ("time", "rlat", "rlon"),
                "lat": {"units": "degrees", "standard_name": "grid_latitude", "axis": "Y"},
                "lon": {"units": "degrees", "standard_name": "grid_longitude", "axis": "X"},
            },
            "'rlat' holds grid latitude, no latitudes; regrid",
        ),
        ({"axes": (LAT, 1e5 * LON)}, r"longitudes 'lon' from 1.5e\+07.* are not degrees.*regrid"),
        (
            {"axes": (LAT, np.where(LON == 150, 1e20, LON))},
            r"longitudes 'lon' from 160 to 1e\+20 are not degrees",
        ),
        ({"axes": (LAT, np.where(LON == 150, np.nan, LON))}, "1 of 7 longitudes are missing"),
    ],
    ids=["y, x alone", "projected", "km", "metres", "rotated", "metres as degrees", "1e20", "missing"],
)
def test_grids_that_are_not_of_degrees(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "sst.nc", **options)
    with pytest.raises(DataError, match=message):
        load(path)


# -- attributes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attrs", "packed"),
    [
        ({"valid_range": [-2.0, 40.0]}, False),
        ({"valid_min": -2.0, "valid_max": 40.0}, False),
        ({"valid_max": np.float32(40.0)}, False),
        ({"valid_range": "-2, 40"}, False),
        ({"valid_range": np.array([-200, 4000], "i2"), "scale_factor": 0.01}, True),
        ({"valid_max": 40.0, "scale_factor": 0.01}, True),
    ],
)
def test_valid_ranges_are_obeyed(attrs: dict[str, Any], packed: bool, tmp_path: Path) -> None:
    values = warm()
    values[3, 2, 2] = 55.0
    raw = np.round(100 * values).astype("i2") if packed else values
    path = write(tmp_path / "sst.nc", raw, attrs={"units": "degC", **attrs}, kind="i2" if packed else "f8")
    field, mends = load(path)
    assert np.isnan(field.values[3, 2, 2])
    assert int(np.isnan(field.values).sum()) == 1
    assert "1 values lie outside of the valid range that the file declares" in mends
    assert int(open_field(path).isnull().sum()) == 1
    assert "valid_range" not in open_field(path).attrs


def test_a_valid_range_that_leaves_nothing_is_said(tmp_path: Path) -> None:
    path = write(tmp_path / "sst.nc", attrs={"units": "degC", "valid_range": [270.0, 310.0]})
    with pytest.raises(DataError, match=r"lie outside of the valid range 270 to 310.*ncatted -a valid_range,sst,d"):
        load(path)
    _, mends = load(write(tmp_path / "b.nc", attrs={"units": "degC", "valid_range": [310.0, 270.0]}))
    assert "the valid range 310 to 270 of 'sst' is empty; left aside" in mends


def test_factors_as_text(tmp_path: Path) -> None:
    raw = np.round(100 * warm()).astype("i2")
    path = write(tmp_path / "sst.nc", raw, attrs={"units": "degC", "scale_factor": "0.01"}, kind="i2")
    np.testing.assert_allclose(load(path)[0].values, warm(), atol=0.006)
    path = write(tmp_path / "b.nc", raw, attrs={"units": "degC", "scale_factor": "small"}, kind="i2")
    with pytest.raises(DataError, match=r"scale_factor = 'small' of 'sst' is no number.*ncatted -a scale_factor,sst"):
        load(path)


@pytest.mark.parametrize("key", ["coordinates", "standard_name", "grid_mapping", "cell_methods", "long_name"])
def test_numbers_where_texts_belong_are_left_aside_and_said(key: str, tmp_path: Path) -> None:
    _, mends = load(write(tmp_path / "sst.nc", attrs={"units": "degC", key: 5}))
    assert f"the attribute {key} of 'sst' is" in mends


def test_a_number_as_global_attribute_is_left_aside_and_said(tmp_path: Path) -> None:
    path = write(tmp_path / "sst.nc")
    with netCDF4.Dataset(path, "a") as file:
        file.coordinates = -1.5
    assert "the global attribute coordinates is" in load(path)[1]


def test_a_missing_value_as_text(tmp_path: Path) -> None:
    values = warm()
    values[:, 1, 1] = 7.77
    field, _ = load(write(tmp_path / "sst.nc", values, attrs={"units": "degC", "missing_value": "7.77"}))
    assert np.isnan(field.values[:, 1, 1]).all()
    _, mends = load(write(tmp_path / "b.nc", attrs={"units": "degC", "missing_value": "none"}))
    assert "the attribute missing_value of 'sst' is 'none', no number; left aside" in mends


def test_flags_are_passed_over_and_that_is_said(tmp_path: Path) -> None:
    path = write(tmp_path / "sst.nc", attrs={"units": "degC", "flag_values": np.array([0.0, 1.0])})
    with pytest.raises(DataError, match=r"'sst' carries flag_values; to read one .* name it with variable='sst'"):
        load(path)
    np.testing.assert_allclose(load(path, variable="sst")[0].values, warm())


# -- units --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("units", "factor", "offset"),
    [
        ("Celcius", 1, 0),
        ("degree_Celsius", 1, 0),
        ("kelvins", 1, 273.15),
        ("degK", 1, 273.15),
        ("degF", 1.8, 32),
        ("0.01 degC", 100, 0),
        ("0.01 K", 100, 27315),
        ("degs", 1, 0),
        ("Kelwin", 1, 273.15),
    ],
)
def test_spellings_of_temperature(units: str, factor: float, offset: float, tmp_path: Path) -> None:
    field, _ = load(write(tmp_path / "sst.nc", factor * warm() + offset, attrs={"units": units}))
    np.testing.assert_allclose(field.values, warm(), atol=1e-6)
    assert field.attrs["units"] == "degC"
    wrong = warm()
    wrong[5, 1, 2] = 90.0
    with pytest.raises(DataError, match=r"are no sea surface temperatures.*1990-06-01 at 65 N, 170 E"):
        load(write(tmp_path / "wrong.nc", factor * wrong + offset, attrs={"units": units}))


@pytest.mark.parametrize("units", ["m", "K m s-1", "1", "none"])
def test_other_units_are_left_alone(units: str, tmp_path: Path) -> None:
    field, _ = load(write(tmp_path / "sst.nc", 300 * warm(), attrs={"units": units}))
    assert field.attrs["units"] == units


def test_land_at_zero_kelvin_names_the_value_of_the_file(tmp_path: Path) -> None:
    for land in (slice(0, 1), slice(0, 4)):  # a little land, and mostly land
        values = warm() + 273.15
        values[:, land] = 0.0
        path = write(tmp_path / f"{land.stop}.nc", values, attrs={"units": "K"})
        with pytest.raises(DataError, match=r"the file is in K\); the first is 0 on .* fill=0 \(--fill 0 "):
            load(path)
        np.testing.assert_allclose(load(path, fill=0)[0].values[:, 4], warm()[:, 4], atol=1e-9)


def test_kelvin_from_some_date_on(tmp_path: Path) -> None:
    for start in (10, 40):
        values = warm()
        values[start:] += 273.15
        with pytest.raises(
            DataError, match=rf"kelvin at {48 - start} of 48 times, {MONTHS[start]}-01 to 1993-12-01, .*cdo subc,273.15"
        ):
            load(write(tmp_path / f"{start}.nc", values))


COLD = {
    "seasonal": lambda rng: (
        1 + 4 * np.cos(2 * np.pi * np.arange(48) / 12)[:, None, None] + 0.1 * rng.normal(size=(48, 5, 7))
    ),
    "around zero": lambda rng: (
        4 * np.cos(2 * np.pi * np.arange(48) / 12)[:, None, None] + 0.5 * rng.normal(size=(48, 5, 7))
    ),
    "noise": lambda rng: np.clip(1 + 4 * rng.normal(size=(48, 5, 7)), -9, 60),
}


@pytest.mark.parametrize("case", COLD)
def test_cold_seas_are_absolute_in_either_unit(case: str, tmp_path: Path) -> None:
    values = COLD[case](np.random.default_rng(3))
    fields = [
        load_sst(write(tmp_path / f"{units}.nc", values + shift, attrs={"units": units}))
        for units, shift in (("degC", 0.0), ("K", 273.15))
    ]
    for field in fields:
        assert field.attrs["kind"] == "anomaly"
        assert field.attrs["base_period"] == "1990-01/1993-12"
    np.testing.assert_allclose(fields[0].values, fields[1].values, atol=1e-9)
    assert load(tmp_path / "degC.nc")[0].attrs["kind"] == "absolute"


@pytest.mark.parametrize("units", ["degC", "K"])
def test_anomalies_without_a_name_are_recognised_in_either_unit(units: str, tmp_path: Path) -> None:
    values = 0.7 * np.random.default_rng(4).normal(size=(48, 5, 7)) + 0.03
    values += 0.03 - values.mean(axis=0)
    assert load(write(tmp_path / "sst.nc", values, attrs={"units": units}))[0].attrs["kind"] == "anomaly"


# -- files --------------------------------------------------------------------------------------------------------


def damaged(path: Path, change: Callable[[bytearray], None]) -> Path:
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"GRIB\x00\x00\x00\x02" + bytes(99), "is a GRIB file; convert it with 'cdo -f nc copy"),
        (b"\x0e\x03\x13\x01" + bytes(99), "HDF4"),
        (b"<!DOCTYPE html><html>", "is a web page"),
        (b"\x1f\x8b" + bytes(99), "gunzip"),
        (b"CDF\x01" + bytes(2), "cannot be read as NetCDF"),
        (b"CDF\x01\x00\x00\x00\x00\x00\x00\x00\x0a\x7f\xff\xff\xff" + bytes(99), "its header lists 2147483647 entries"),
        (b"\x89HDF\r\n\x1a\n" + bytes(99), "cannot be read as NetCDF"),
    ],
)
def test_files_of_another_kind(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.nc").write_bytes(content)
    with pytest.raises(DataError, match=message):
        load(tmp_path / "x.nc")


@pytest.mark.parametrize("format", ["NETCDF3_CLASSIC", "NETCDF3_64BIT_OFFSET", "NETCDF3_64BIT_DATA", "NETCDF4"])
def test_files_cut_short(format: str, tmp_path: Path) -> None:
    path = write(tmp_path / "sst.nc", format=format)
    np.testing.assert_allclose(load(path)[0].values, warm())
    damaged(path, lambda data: data.__delitem__(slice(len(data) - 500, None)))
    with pytest.raises(DataError, match=r"is cut short.*Copy it anew"):
        load(path)


def test_records_of_the_classic_format(tmp_path: Path) -> None:
    field = xr.DataArray(
        warm().astype("f4"), {"time": MONTHS.astype("datetime64[ns]"), "lat": LAT, "lon": LON}, name="sst"
    )
    for kinds in ({"sst": "f4"}, {"sst": "f4", "flag": "i1"}):
        data = xr.Dataset({name: field.astype(kind) for name, kind in kinds.items()})
        path = tmp_path / f"{len(kinds)}.nc"
        data.to_netcdf(path, format="NETCDF3_CLASSIC", unlimited_dims=["time"])
        assert load(path, variable="sst")[0].shape == (48, 5, 7)
        damaged(path, lambda data: data.__delitem__(slice(len(data) - 40, None)))
        with pytest.raises(DataError, match="is cut short"):
            load(path, variable="sst")


def test_groups_zarr_and_shapes_that_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with netCDF4.Dataset(tmp_path / "groups.nc", "w") as file:
        file.createGroup("ocean")
    with pytest.raises(DataError, match=r"holds only groups: ocean; .*'ncks -G : -g ocean"):
        load(tmp_path / "groups.nc")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / ".zgroup").write_text("{}")
    with pytest.raises(DataError, match=r"cannot be read as Zarr|no recognisable field"):
        load(tmp_path / "store")
    with monkeypatch.context() as patch:
        patch.setattr(gridded, "find_spec", lambda _: None)
        with pytest.raises(DataError, match=r"is a Zarr store, which the package zarr reads: pip install"):
            load(tmp_path / "store")
    with netCDF4.Dataset(write(tmp_path / "huge.nc"), "a") as file:
        file.createDimension("huge", 10**10)
        file.createVariable("level", "f8", ("huge",))
    with pytest.raises(DataError, match="'level' declares 10000000000 values, which a file of"):
        load(tmp_path / "huge.nc")


@pytest.mark.parametrize("level", ["depth", "expver"])
def test_dimensions_too_many(level: str, tmp_path: Path) -> None:
    with netCDF4.Dataset(write(tmp_path / "sst.nc"), "a") as file:
        file.renameVariable("sst", "old")
        file["old"].flag_values = [0.0, 1.0]
        file.createDimension(level, 2)
        file.createVariable("sst", "f8", ("time", level, "lat", "lon"))[:] = warm()[:, None]
    remedy = "preliminary months.*combine_first" if level == "expver" else r"\.isel\(depth=0\)"
    with pytest.raises(DataError, match=rf"dimension '{level}' of length 2 .*{remedy}.*'ncks -d {level},0 IN OUT'"):
        load(tmp_path / "sst.nc", variable="sst")


def test_damaged_chunks(tmp_path: Path) -> None:
    field = xr.DataArray(warm(), {"time": MONTHS.astype("datetime64[ns]"), "lat": LAT, "lon": LON}, name="sst")
    path = tmp_path / "sst.nc"
    field.to_netcdf(path, encoding={"sst": {"zlib": True, "chunksizes": (48, 5, 7)}})
    start = path.read_bytes().find(b"\x78\x5e")
    damaged(path, lambda data: data.__setitem__(slice(start + 100, start + 300), bytes(200)))
    with pytest.raises(DataError, match=r"the values of 'sst' cannot be read.*copy the file anew"):
        load(path)


def test_repeated_latitudes_and_open_ranges(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="latitudes repeat"):
        load(write(tmp_path / "a.nc", axes=(np.array([60.0, 65.0, 70.0, 70.0 + 1e-9, 75.0]), LON)))
    open_ended = write(tmp_path / "b.nc", attrs={"units": "degC", "valid_range": [-np.inf, np.inf]})
    assert not load(open_ended)[0].isnull().any()


@pytest.mark.parametrize("kind", ["fields", "results"])
def test_damaged_files_are_read_whole_or_refused(kind: str) -> None:
    counts, said, _ = fuzz(kind, 100, seed=1)
    assert not said
    assert sum(counts.values()) == 100
    assert 10 < counts["read"] < 90


def test_texts_whose_heap_is_damaged_do_not_hang(tmp_path: Path) -> None:
    path = tmp_path / "sst.nc"
    with netCDF4.Dataset(write(path), "a") as file:
        file.createVariable("name", str, ("lat",))[:] = np.array(["a", "b", "c", "d", "e"], dtype=object)
    load(path)
    heap = path.read_bytes().find(b"GCOL")
    damaged(path, lambda data: data.__setitem__(slice(heap + 24, heap + 32), b"\xff" * 8))
    with pytest.raises(DataError, match="its heap of texts is damaged"):
        load(path)
