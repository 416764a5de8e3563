"""Fields that are read chunk by chunk: the same values as in memory, and memory of a chunk."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

from probmodels.datasets import checks
from probmodels.datasets.reading import chunks
from probmodels.datasets.sst import load_sst
from probmodels.errors import DataError

LAT, LON = np.arange(-9.0, 10, 2), np.arange(0.5, 360, 15)


def daily(years: int = 3, seed: int = 0) -> xr.Dataset:
    """Days of a cold sea in kelvin, with land, gaps, and ice in the south of each winter."""
    days = np.arange(np.datetime64("2001-01-01"), np.datetime64(f"{2001 + years}-01-01")).astype("datetime64[ns]")
    rng = np.random.default_rng(seed)
    phase = 2 * np.pi * (days - days.astype("datetime64[Y]")) / np.timedelta64(365, "D")
    level = 3 + 0.6 * LAT[:, None] + np.cos(np.deg2rad(LON))
    values = 273.15 + level + 3 * np.cos(phase)[:, None, None] + 0.4 * rng.standard_normal((len(days), 10, 24))
    values = np.maximum(values, 271.35).astype(np.float32)  # -1.8 degC
    values[:, 4:6, 3] = np.nan
    values[rng.random(values.shape) < 0.05] = np.nan
    values[200:203] = np.nan
    coords = {"time": days, "lat": ("lat", LAT, {"units": "degrees_north"}), "lon": LON}
    return xr.Dataset({"sst": (("time", "lat", "lon"), values, {"units": "K", "long_name": "sst"})}, coords)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is large, and a chunk holds seven days."""
    monkeypatch.setattr(chunks, "_WHOLE", 0)
    monkeypatch.setattr(chunks, "_CHUNK", 7 * 8 * LAT.size * LON.size)


def said(field: xr.DataArray) -> str:
    return " ".join(json.loads(field.attrs["mends"]))


WAYS: dict[str, dict[str, Any]] = {
    "months": {},
    "a region over the seam": {"region": "-8,4,-60,40"},
    "a period and another base": {"period": "2002/2003", "base_period": "2001/2002"},
    "seasons": {"season": "DJF", "base_period": "2001/2003"},
    "ice": {"ice": -1.79, "min_valid": 0.3},
    "coarse": {"coarsen": 4},
    "coarse with ice": {"coarsen": 2, "ice": -1.79, "min_valid": 0.3},
    "coarse days": {"coarsen": 3, "daily": True},
    "temperatures": {"anomalies": False, "fill": (271.5,)},
}


def in_both_ways(monkeypatch: pytest.MonkeyPatch, source: Any, **options: Any) -> tuple[xr.DataArray, xr.DataArray]:
    with monkeypatch.context() as patch:
        patch.setattr(chunks, "_WHOLE", 10**18)
        whole = load_sst(source, **options)
    return whole, load_sst(source, **options)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("way", [pytest.param(options, id=name) for name, options in WAYS.items() if name != "seasons"])
def test_chunks_give_what_is_found_in_memory(
    way: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    daily().to_netcdf(tmp_path / "sst.nc")
    whole, found = in_both_ways(monkeypatch, tmp_path / "sst.nc", **way)
    assert "cells were read in chunks of" in said(found)
    assert "chunks" not in said(whole)
    assert found.attrs["kind"] == whole.attrs["kind"]
    assert float(whole.std()) > 0.01
    np.testing.assert_array_equal(found.values, whole.values)  # every bit
    xr.testing.assert_identical(found.drop_attrs(), whole.drop_attrs())
    if "ice" in way:
        assert 0 < int(found["ice"].sum()) < found["ice"].size / 2
        assert np.isnan(found.values[found["ice"].values]).all()


@pytest.mark.usefixtures("small")
def test_many_files_overlapping_files_and_dask_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = daily()
    for year in (2003, 2001, 2002):
        given.sel(time=str(year)).to_netcdf(tmp_path / f"sst.{year}.nc")
    whole, found = in_both_ways(monkeypatch, str(tmp_path / "sst.*.nc"))
    np.testing.assert_array_equal(found.values, whole.values)
    given.sel(time=slice("2002-12-20", "2003-01-10")).to_netcdf(tmp_path / "sst.again.nc")
    again = load_sst(str(tmp_path / "sst.*.nc"))
    assert "22 dates occur twice with equal values" in said(again)
    np.testing.assert_array_equal(again.values, whole.values)
    with xr.open_mfdataset(str(tmp_path / "sst.20*.nc"), chunks={"time": 10}) as lazily:
        np.testing.assert_array_equal(load_sst(lazily).values, whole.values)
    other = given.sel(time=slice("2002-12-20", "2003-01-10")) + 1
    other.to_netcdf(tmp_path / "sst.again.nc")
    with pytest.raises(DataError, match="dates occur twice with different values: 2002-12-20"):
        load_sst(str(tmp_path / "sst.*.nc"))


@pytest.mark.usefixtures("small")
def test_packed_values_and_ranges_are_read_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = daily()
    given["sst"].attrs["valid_range"] = np.array([260.0, 282.0], dtype=np.float32)
    given.to_netcdf(
        tmp_path / "sst.nc",
        encoding={
            "sst": {"dtype": "int16", "scale_factor": 0.01, "add_offset": 273.15, "_FillValue": -999, "zlib": True}
        },
    )
    whole, found = in_both_ways(monkeypatch, tmp_path / "sst.nc", anomalies=False)
    np.testing.assert_array_equal(found.values, whole.values)
    count = next(x for x in json.loads(whole.attrs["mends"]) if "outside of the valid range" in x)
    assert count in json.loads(found.attrs["mends"])


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("version", [2, 3])
def test_a_zarr_store_is_read_like_a_file(version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("zarr")
    given, packed = daily(), {"dtype": "int16", "scale_factor": 0.01, "add_offset": 273.15, "_FillValue": -999}
    given.to_netcdf(tmp_path / "sst.nc", encoding={"sst": packed})
    given.to_zarr(
        tmp_path / "sst.zarr",
        encoding={"sst": packed | {"chunks": (20, 5, 24)}},
        zarr_format=version,
        consolidated=False,
    )
    whole, found = in_both_ways(monkeypatch, tmp_path / "sst.zarr")
    np.testing.assert_array_equal(found.values, whole.values)
    np.testing.assert_array_equal(found.values, load_sst(tmp_path / "sst.nc").values)
    assert "in chunks of 20" in said(found)
    (source,) = json.loads(found.attrs["source_files"])
    assert source["name"] == "sst.zarr"
    given.isel(time=slice(1000)).to_zarr(tmp_path / "short.zarr", zarr_format=version, consolidated=False)
    assert json.loads(load_sst(tmp_path / "short.zarr").attrs["source_files"])[0]["sha256"] != source["sha256"]


def test_a_chunk_is_of_whole_chunks_of_the_file_where_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    part = xr.DataArray(np.zeros((1000, 2, 2)), dims=("time", "lat", "lon"))
    monkeypatch.setattr(chunks, "_CHUNK", 8 * 100 * 50)  # fifty times of a hundred cells
    for stored, expected in ((1, 50), (20, 40), (70, 70), (400, 400)):
        part.encoding = {"preferred_chunks": {"time": stored}}
        assert chunks._chunk_length(part, 100) == expected
    monkeypatch.setattr(chunks, "free_memory", lambda: 10**6)
    assert chunks._chunk_length(part, 100) == 50  # four hundred would take 1.6 MB with their copies
    assert chunks._chunk_length(part.chunk({"time": 25}), 100) == 50


def spoilt(change: Callable[[np.ndarray], None]) -> xr.Dataset:
    given = daily(2)
    change(given["sst"].values)
    return given


def sentinel(values: np.ndarray) -> None:
    values[505, 1, 2] = -999.0  # on one day, which no sample need hold


def infinite(values: np.ndarray) -> None:
    values[505, 1, 2] = np.inf


def hot(values: np.ndarray) -> None:
    values[505, 1, 2] = 400.0


def celsius(values: np.ndarray) -> None:
    values[500:] -= 273.15


@pytest.mark.usefixtures("small")
def test_a_fill_value_on_one_day_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, found = in_both_ways(monkeypatch, spoilt(sentinel))
    np.testing.assert_array_equal(found.values, whole.values)
    assert "1 values (-999) are fill values" in said(found)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("change", "match"),
    [
        (infinite, "1 values of 'sst' are infinite; the first is inf on 2002-05-21"),
        (hot, "1 values of 'sst' are no sea surface temperatures"),
        (celsius, "is in kelvin at|are no sea surface temperatures"),
    ],
)
def test_what_is_wrong_in_one_chunk_is_refused(change: Callable[[np.ndarray], None], match: str) -> None:
    with pytest.raises(DataError, match=match):
        load_sst(spoilt(change))


def test_boxes_of_cells_are_averaged_by_area() -> None:
    given = daily()
    found = load_sst(given, coarsen=4, anomalies=False)
    assert found.sizes == {"time": 36, "lat": 2, "lon": 6}
    assert "Boxes of 4 x 4 cells were averaged, by area; 2 rows in the north and 0 columns" in said(found)
    box = given["sst"].isel(lat=slice(4, 8), lon=slice(8, 12))
    weight = np.cos(np.deg2rad(box["lat"]))
    mean = box.weighted(weight).mean(("lat", "lon")).resample(time="MS").mean() - 273.15
    np.testing.assert_allclose(found.values[:, 1, 2], mean.values, atol=1e-4)
    assert float(found["lat"][1]) == LAT[4:8].mean()
    assert float(found["lon"][2]) == LON[8:12].mean()
    with pytest.raises(DataError, match="coarsen=6: the field has 10 x 24 cells"):
        load_sst(given, coarsen=6)


@pytest.mark.usefixtures("small")
def test_too_large_a_result_is_refused_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_SMALL", 0)
    monkeypatch.setattr(checks, "free_memory", lambda: 100_000)

    def never(*_: object) -> None:
        raise AssertionError("nothing is read")

    monkeypatch.setattr(chunks.OnGrid, "read", never)
    with pytest.raises(
        DataError, match=r"36 times of 240 cells, reduced from 1095 times of 10 x 24, need about .* GiB"
    ):
        load_sst(daily())


PEAK = """
import sys
from pathlib import Path
from probmodels.datasets.sst import load_sst
def peak():  # of this process alone; getrusage starts from that of its parent
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
load_sst(sys.argv[1], region="-5,5,0,5", anomalies=False)  # imports what reading needs
before = peak()
field = load_sst(sys.argv[1])
print(peak() - before, float(field.std()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process is read from /proc")
def test_memory_stays_far_below_the_size_of_the_file(tmp_path: Path) -> None:
    """300 MB of days: about 600 MB as 64-bit numbers, of which a loader in memory holds several copies."""
    days, shape = 730, (240, 428)
    coords = {
        "time": np.datetime64("2001-01-01", "ns") + np.arange(days) * np.timedelta64(1, "D"),
        "lat": np.linspace(-60, 60, shape[0]),
        "lon": np.linspace(0, 359, shape[1]),
    }
    rng = np.random.default_rng(0)
    few = rng.standard_normal((73, *shape)).astype(np.float32)
    for part in range(2):
        values = 15 + (1 + part) * np.concatenate([few] * 5)
        time = coords["time"][part * 365 : part * 365 + 365]
        xr.Dataset({"sst": (("time", "lat", "lon"), values, {"units": "degC"})}, coords | {"time": time}).to_netcdf(
            tmp_path / f"sst{part}.nc"
        )
    size = sum(file.stat().st_size for file in tmp_path.glob("*.nc"))
    assert size > 290e6
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path / "sst*.nc")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    grown = 1024 * int(done.stdout.split()[0])
    reduced = 8 * 24 * np.prod(shape)  # 20 MB
    assert grown < 4 * reduced + 8 * chunks._CHUNK
    assert grown < size / 2
