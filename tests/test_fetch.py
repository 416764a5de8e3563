"""Downloads, against a server on loopback that breaks, changes and lies on request."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import requests
import xarray as xr

from probmodels.datasets import fetch as fetching
from probmodels.datasets.fetch import SOURCES, cached_path, fetch
from probmodels.datasets.sst import load_sst
from probmodels.errors import DataError

HADISST = "/hadobs/hadisst/data/HadISST_sst.nc.gz"
ERSST = "/Datasets/noaa.ersst.v5/sst.mnmean.nc"
FAST = {"progress": False, "wait": 0.0, "retries": 3, "timeout": 5.0}


@dataclass
class Served:
    """What the server does: one body per path, how many bytes it sends before hanging up, whether it knows ranges."""

    bodies: dict[str, bytes] = field(default_factory=dict)
    hang_up_after: list[int] = field(default_factory=list)  # one entry per request, then no more hanging up
    ranges: bool = True
    etag: str | None = '"one"'
    status: int | None = None
    requests: list[dict[str, str]] = field(default_factory=list)
    redirects: dict[str, str] = field(default_factory=dict)  # path to address
    length: bool = True  # whether it says how long a body is
    url: str = ""


def make_handler(served: Served) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            served.requests.append(dict(self.headers))
            if served.status is not None:
                self.send_error(served.status)
                return
            if self.path in served.redirects:
                self.send_response(302)
                self.send_header("Location", served.redirects[self.path])
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            if self.path not in served.bodies:
                self.send_error(404)
                return
            body = served.bodies[self.path]
            start = 0
            wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            same = self.headers.get("If-Range") in (None, served.etag)
            if wanted and served.ranges and same:
                start = int(wanted[1])
                if start >= len(body):
                    self.send_response(416)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
            else:
                self.send_response(200)
            if served.length:
                self.send_header("Content-Length", str(len(body) - start))
            if served.etag:
                self.send_header("ETag", served.etag)
            self.end_headers()
            stop = served.hang_up_after.pop(0) if served.hang_up_after else len(body)
            self.wfile.write(body[start : start + stop])
            self.close_connection = True

    return Handler


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    state = Served()
    server = ThreadingHTTPServer(("127.0.0.1", 0), make_handler(state))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}"
    yield state
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def netcdf(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A field of about 700 kB, several chunks of a transfer."""
    rng = np.random.default_rng(0)
    values = 15 + rng.normal(size=(120, 20, 36)) + 5 * np.sin(np.arange(120) * np.pi / 6)[:, None, None]
    coords = {
        "time": np.arange("1990-01", "2000-01", dtype="datetime64[M]").astype("datetime64[ns]"),
        "lat": ("lat", np.linspace(-47.5, 47.5, 20), {"units": "degrees_north"}),
        "lon": ("lon", np.arange(0.0, 360.0, 10.0), {"units": "degrees_east"}),
    }
    path = tmp_path_factory.mktemp("served") / "sst.nc"
    xr.Dataset({"sst": (("time", "lat", "lon"), values, {"units": "degC"})}, coords).to_netcdf(path)
    return path.read_bytes()


def test_download_is_recorded_verified_and_then_comes_from_the_cache(served, netcdf, tmp_path, monkeypatch):
    served.bodies[ERSST] = netcdf
    path = fetch("ersstv5", cache_dir=tmp_path, base_url=served.url, **FAST)
    assert path.read_bytes() == netcdf
    record = json.loads((tmp_path / "ersstv5.nc.json").read_text())
    assert record["sha256"] == record["file_sha256"] == hashlib.sha256(netcdf).hexdigest()
    assert record["url"] == served.url + ERSST
    assert record["etag"] == '"one"'
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ersstv5.nc", "ersstv5.nc.json"]
    assert fetch("ersstv5", cache_dir=tmp_path, base_url=served.url, offline=True) == path
    assert len(served.requests) == 1
    monkeypatch.setenv("PROBMODELS_CACHE", str(tmp_path))
    assert load_sst("ersstv5").sizes == {"time": 120, "lat": 20, "lon": 36}


def test_interrupted_transfer_goes_on_where_it_stopped(served, netcdf, tmp_path):
    served.bodies[ERSST] = netcdf
    served.hang_up_after = [200_000, 150_000]
    path = fetch("ersstv5", cache_dir=tmp_path, base_url=served.url, **FAST)
    assert path.read_bytes() == netcdf
    starts = [int(request["Range"][6:-1]) for request in served.requests[1:]]
    # what the client holds back in its buffers when the line breaks is at most a chunk of 64 kB
    assert 200_000 - 65_536 <= starts[0] <= 200_000
    assert starts[0] + 150_000 - 65_536 <= starts[1] <= starts[0] + 150_000
    assert served.requests[1]["If-Range"] == '"one"'


def test_transfer_resumes_in_a_later_call(served, netcdf, tmp_path):
    served.bodies[ERSST] = netcdf
    served.hang_up_after = [300_000, 0, 0, 0]
    with pytest.raises(DataError, match="could not be downloaded"):
        fetch("ersstv5", cache_dir=tmp_path, base_url=served.url, **FAST)
    assert not (tmp_path / "ersstv5.nc").exists()
    served.requests.clear()
    assert fetch("ersstv5", cache_dir=tmp_path, base_url=served.url, **FAST).read_bytes() == netcdf
    assert int(served.requests[0]["Range"][6:-1]) >= 200_000


@pytest.mark.parametrize("ranges", [True, False])
def test_a_file_that_changed_meanwhile_is_fetched_whole(served, netcdf, tmp_path, ranges):
    served.bodies[ERSST] = b"\x89HDF of last month" * 20_000
    served.ranges = ranges
    served.hang_up_after = [200_000, 0, 0, 0]
    with pytest.raises(DataError):
        fetch("ersstv5", cache_dir=tmp_path, base_url=served.url, **FAST)
    served.bodies[ERSST], served.etag = netcdf, '"two"'
    assert fetch("ersstv5", cache_dir=tmp_path, base_url=served.url, **FAST).read_bytes() == netcdf


def test_a_longer_file_without_etag_is_noticed_by_its_size(served, netcdf, tmp_path):
    served.bodies[ERSST], served.etag = b"\x89HDF of last month" * 20_000, None
    served.hang_up_after = [200_000, 0, 0, 0]
    with pytest.raises(DataError):
        fetch("ersstv5", cache_dir=tmp_path, base_url=served.url, **FAST)
    served.bodies[ERSST] = netcdf
    assert fetch("ersstv5", cache_dir=tmp_path, base_url=served.url, **FAST).read_bytes() == netcdf


def test_all_bytes_arrived_but_not_the_last_step(served, netcdf, tmp_path):
    served.bodies[ERSST] = netcdf
    (tmp_path / "ersstv5.part").write_bytes(netcdf)
    note = {"url": served.url + ERSST, "size": str(len(netcdf)), "etag": '"one"'}
    (tmp_path / "ersstv5.part.json").write_text(json.dumps(note))
    assert fetch("ersstv5", cache_dir=tmp_path, base_url=served.url, **FAST).read_bytes() == netcdf


def test_wrong_checksum_is_refused_and_nothing_left_behind(served, netcdf, tmp_path):
    served.bodies[ERSST] = netcdf
    with pytest.raises(DataError, match="does not have the sha256 asked for"):
        fetch("ersstv5", cache_dir=tmp_path, base_url=served.url, sha256="0" * 64, **FAST)
    assert list(tmp_path.iterdir()) == []
    right = hashlib.sha256(netcdf).hexdigest()
    assert fetch("ersstv5", cache_dir=tmp_path, base_url=served.url, sha256=right, **FAST).exists()
    with pytest.raises(DataError, match="update=True"):
        fetch("ersstv5", cache_dir=tmp_path, base_url=served.url, sha256="0" * 64, **FAST)


def test_file_changed_on_disk_is_refused(served, netcdf, tmp_path):
    served.bodies[ERSST] = netcdf
    path = fetch("ersstv5", cache_dir=tmp_path, base_url=served.url, **FAST)
    path.write_bytes(netcdf[:-1])
    with pytest.raises(DataError, match=r"has changed since it was downloaded.*update=True"):
        cached_path("ersstv5", cache_dir=tmp_path)
    assert fetch("ersstv5", cache_dir=tmp_path, base_url=served.url, update=True, **FAST).read_bytes() == netcdf


def test_a_failed_update_keeps_the_old_file(served, netcdf, tmp_path):
    served.bodies[ERSST] = netcdf
    path = fetch("ersstv5", cache_dir=tmp_path, base_url=served.url, **FAST)
    served.status = 503
    with pytest.raises(DataError, match="503"):
        fetch("ersstv5", cache_dir=tmp_path, base_url=served.url, update=True, **FAST)
    assert path.read_bytes() == netcdf
    assert cached_path("ersstv5", cache_dir=tmp_path) == path


def test_gzip_is_unpacked(served, netcdf, tmp_path):
    packed = gzip.compress(netcdf)
    served.bodies[HADISST] = packed
    path = fetch("hadisst", cache_dir=tmp_path, base_url=served.url, **FAST)
    assert path.read_bytes() == netcdf
    record = json.loads((tmp_path / "hadisst.nc.json").read_text())
    assert record["sha256"] == hashlib.sha256(packed).hexdigest()
    assert record["file_sha256"] == hashlib.sha256(netcdf).hexdigest()


def test_damaged_gzip_is_refused(served, netcdf, tmp_path):
    served.bodies[HADISST] = gzip.compress(netcdf)[:-1000]
    with pytest.raises(DataError, match="damaged"):
        fetch("hadisst", cache_dir=tmp_path, base_url=served.url, **FAST)
    assert list(tmp_path.iterdir()) == []


def test_an_error_page_is_no_data(served, tmp_path):
    served.bodies[ERSST] = b"<html>Under maintenance</html>"
    with pytest.raises(DataError, match="gave no NetCDF file"):
        fetch("ersstv5", cache_dir=tmp_path, base_url=served.url, **FAST)
    assert list(tmp_path.iterdir()) == []


def test_where_a_redirected_file_came_from_is_recorded(served, netcdf, tmp_path):
    served.bodies["/elsewhere/sst.nc"] = netcdf
    other = served.url.replace("127.0.0.1", "localhost")
    served.redirects[ERSST] = f"{other}/elsewhere/sst.nc?token=secret"
    served.bodies["/elsewhere/sst.nc?token=secret"] = netcdf
    fetch("ersstv5", cache_dir=tmp_path, base_url=served.url, **FAST)
    record = json.loads((tmp_path / "ersstv5.nc.json").read_text())
    assert record["url"] == served.url + ERSST
    assert record["served_from"] == f"{other}/elsewhere/sst.nc"


def test_redirections_that_drop_encryption_are_refused(tmp_path, monkeypatch):
    answers = requests.Response()
    answers.status_code, answers.url, answers.history = 200, "http://elsewhere.org/sst.nc", [requests.Response()]
    answers.history[0].url, answers.raw = SOURCES["ersstv5"].url, io.BytesIO()
    monkeypatch.setattr(requests, "get", lambda *args, **kwargs: answers)
    with pytest.raises(DataError, match=r"redirects to http://elsewhere.org/sst.nc without encryption.*by hand"):
        fetch("ersstv5", cache_dir=tmp_path, **FAST)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", ["NETCDF3_CLASSIC", "NETCDF4"])
def test_a_body_that_ends_early_without_a_stated_length_is_refused(served, tmp_path, format):
    path = tmp_path / "whole.nc"
    coords = {"time": np.arange(12.0), "lat": np.arange(4.0), "lon": np.arange(5.0)}
    field = xr.DataArray(np.ones((12, 4, 5)), coords, ("time", "lat", "lon"), name="sst")
    field.to_netcdf(path, format=format)
    served.bodies[ERSST], served.length = path.read_bytes()[:-300], False
    with pytest.raises(DataError, match=r"gave no NetCDF file that is whole: .* is cut short"):
        fetch("ersstv5", cache_dir=tmp_path / "cache", base_url=served.url, **FAST)
    assert not (tmp_path / "cache" / "ersstv5.nc").exists()


def test_bodies_and_what_they_unpack_to_are_bounded(served, netcdf, tmp_path, monkeypatch):
    served.bodies[HADISST] = gzip.compress(b"\x89HDF\r\n\x1a\n" + bytes(10_000_000))
    with pytest.raises(DataError, match=r"unpacks to more than \d+ bytes, which no field does"):
        fetch("hadisst", cache_dir=tmp_path, base_url=served.url, **FAST)
    monkeypatch.setattr(fetching, "_MOST_BYTES", 100_000)
    served.bodies[ERSST] = netcdf
    with pytest.raises(DataError, match=r"sends more than 100000 bytes.*by hand"):
        fetch("ersstv5", cache_dir=tmp_path, base_url=served.url, **FAST)
    assert list(tmp_path.iterdir()) == []


def test_not_found_is_not_tried_again(served, tmp_path):
    with pytest.raises(DataError, match=r"404.*by hand"):
        fetch("ersstv5", cache_dir=tmp_path, base_url=served.url, **FAST)
    assert len(served.requests) == 1


def test_without_network_the_message_says_what_to_do_by_hand(tmp_path, netcdf, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(DataError, match=r"check the network, or download it by hand from .*HadISST_sst.nc.gz"):
        fetch("hadisst", cache_dir=tmp_path, base_url="http://127.0.0.1:9", **FAST)
    with pytest.raises(DataError, match=r"offline=True.*put it at .*hadisst.nc.gz"):
        fetch("hadisst", cache_dir=tmp_path, offline=True)
    (tmp_path / "hadisst.nc.gz").write_bytes(gzip.compress(netcdf))
    path = fetch("hadisst", cache_dir=tmp_path, offline=True)
    assert path.read_bytes() == netcdf
    (tmp_path / "cobe2.nc").write_bytes(netcdf)
    assert fetch("cobe2", cache_dir=tmp_path, offline=True).name == "cobe2.nc"
    assert json.loads((tmp_path / "cobe2.nc.json").read_text())["url"] == "put there by hand"


def test_names(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="did you mean 'hadisst'"):
        fetch("hadsst", cache_dir=tmp_path)
    with pytest.raises(DataError, match="probmodels sst fetch oisst"):
        cached_path("oisst", cache_dir=tmp_path)
    monkeypatch.setenv("PROBMODELS_CACHE", str(tmp_path))
    with pytest.raises(DataError, match="probmodels sst fetch oisst"):
        load_sst("oisst")
    assert set(SOURCES) == {"ersstv5", "hadisst", "oisst", "cobe2"}
    assert all(source.url.startswith("https://") and source.terms for source in SOURCES.values())


def test_a_cache_that_cannot_be_written(served, netcdf, tmp_path):
    served.bodies[ERSST] = netcdf
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="PROBMODELS_CACHE"):
        fetch("ersstv5", cache_dir=tmp_path / "file", base_url=served.url, **FAST)
