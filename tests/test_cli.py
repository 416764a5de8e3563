"""The command line as a person meets it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from probmodels import Result

SMALL = ["--rank", "2", "--draws", "30", "--warmup", "10", "--thin", "1", "--chains", "2", "--quiet"]


def command(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "probmodels.cli", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        **options,
    )


@pytest.fixture(scope="module")
def field(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(1)
    months = np.arange("1990-01", "1998-01", dtype="datetime64[M]").astype("datetime64[ns]")
    lat, lon = np.arange(20.0, 45.0, 5.0), np.arange(170.0, 200.0, 5.0)
    pattern, series = np.add.outer(np.sin(lat / 8), np.cos(lon / 8)), rng.standard_normal(len(months))
    season = 3 * np.cos(2 * np.pi * (np.arange(len(months)) - 8) / 12)
    values = (
        18 + season[:, None, None] + series[:, None, None] * pattern + 0.3 * rng.standard_normal((len(months), 5, 6))
    )
    values[:, 0, 0] = np.nan
    data = xr.DataArray(
        values, dims=("time", "lat", "lon"), coords={"time": months, "lat": lat, "lon": lon}, name="sst"
    )
    data.attrs.update(units="degC", standard_name="sea_surface_temperature")
    path = tmp_path_factory.mktemp("cli") / "sst.nc"
    data.to_netcdf(path)
    return path


@pytest.fixture(scope="module")
def finished(field: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("run") / "sst"
    run = command("sst", str(field), "--out", str(out), *SMALL)
    assert run.returncode == 0, run.stderr
    return out, run.stdout


def test_the_main_job_writes_what_it_promises(finished: tuple[Path, str]) -> None:
    out, said = finished
    for name in ("result.nc", "modes.nc", "report.html", "summary.txt", "figures/mode_maps.png", "figures/scree.png"):
        assert (out / name).stat().st_size > 0, name
    assert not (out / "checkpoint").exists()
    assert "EOF corr." in said
    with xr.open_dataset(out / "modes.nc") as modes:
        assert {"mode_mean", "mode_sd", "prob_positive", "pc_mean"} <= set(modes)
        assert modes["mode_mean"].sizes == {"mode": 2, "lat": 5, "lon": 6}
        assert np.isnan(modes["mode_mean"].values[:, 0, 0]).all()
    result = Result.load(out)
    assert result.posterior.sizes["draw"] == 30
    assert "data_sha256" in str(result.tree.attrs) or "sha256" in str(result.tree["constant_data"]["data"].attrs)


def test_a_second_run_into_the_same_folder_is_refused(field: Path, finished: tuple[Path, str]) -> None:
    run = command("sst", str(field), "--out", str(finished[0]), *SMALL)
    assert run.returncode == 2
    assert "--overwrite" in run.stderr
    assert "Traceback" not in run.stderr


def test_strict_turns_failed_diagnostics_into_the_exit_status(finished: tuple[Path, str]) -> None:
    out, _ = finished
    assert command("diagnose", str(out)).returncode == 0
    strict = command("diagnose", str(out), "--strict")
    assert strict.returncode == 1  # 60 draws cannot reach an effective sample size of 400
    assert "FAILED" in strict.stdout


def test_show_report_and_list(finished: tuple[Path, str], tmp_path: Path) -> None:
    out, _ = finished
    assert "posterior" in command("show", str(out)).stdout
    assert command("report", str(out), "--out", str(tmp_path)).returncode == 0
    assert (tmp_path / "report.html").exists()
    assert "bayesian_svd" in command("list").stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["absent.nc"], "absent.nc"),
        (["FIELD", "--region", "north_pacfic"], "north_pacific"),
        (["FIELD", "--period", "2050:2060"], "1990"),
        (["FIELD", "--rank", "99"], "out of range"),
        (["FIELD", "--kernel", "matern27"], "did you mean 'matern72'"),
        (["FIELD", "--fixed-effects", "intercept,trendd"], "did you mean 'trend'"),
        (["FIELD", "--engine", "gibbs"], "unknown engine"),
        (["fetch", "ersst"], "ersstv5"),
    ],
)
def test_bad_input_is_one_clear_line_before_any_sampling(
    field: Path, tmp_path: Path, arguments: list[str], said: str
) -> None:
    filled = [str(field) if a == "FIELD" else a for a in arguments]
    run = command("sst", *filled, "--out", str(tmp_path / "out"), "--quiet")
    assert run.returncode == 2, run.stdout + run.stderr
    assert said in run.stderr
    assert "Traceback" not in run.stderr
    assert not (tmp_path / "out" / "checkpoint").exists()


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT to a process")
def test_an_interrupted_run_goes_on_to_the_same_draws(field: Path, tmp_path: Path) -> None:
    long = ["--rank", "2", "--draws", "2000", "--warmup", "10", "--thin", "1", "--chains", "2", "--quiet"]
    arguments = [sys.executable, "-m", "probmodels.cli", "sst", str(field), "--out"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    subprocess.run([*arguments, str(whole), *long], check=True, capture_output=True, timeout=300)
    process = subprocess.Popen([*arguments, str(cut), *long], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(cut.glob("checkpoint/chain-*/*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    if process.returncode == 0:
        pytest.skip("the run was over before the interrupt came")
    assert process.returncode == 130, said
    assert "resume" in said
    subprocess.run([*arguments, str(cut), *long], check=True, capture_output=True, timeout=300)
    assert Result.load(cut).posterior.equals(Result.load(whole).posterior)
