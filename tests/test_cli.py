"""The command line as a user calls it: commands, messages, exit status."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from probmodels import Result, cli

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


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the command line in this process; returns its exit status, standard output and standard error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["probmodels", *arguments])
        with pytest.raises(SystemExit) as left:
            cli.main()
        said = capsys.readouterr()
        return int(left.value.code or 0), said.out, said.err

    return run


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


def test_strict_turns_failed_diagnostics_into_the_exit_status(
    inside: Callable[..., tuple[int, str, str]], finished: tuple[Path, str]
) -> None:
    out, _ = finished
    assert inside("diagnose", str(out))[0] == 0
    status, said, _ = inside("diagnose", str(out), "--strict")
    assert status == 1  # 60 draws cannot reach an effective sample size of 400
    assert "FAILED" in said


def test_show_report_and_list(
    inside: Callable[..., tuple[int, str, str]], finished: tuple[Path, str], tmp_path: Path
) -> None:
    out, _ = finished
    assert "posterior" in inside("show", str(out))[1]
    assert inside("report", str(out), "--out", str(tmp_path))[0] == 0
    assert (tmp_path / "report.html").exists()
    assert "bayesian_svd" in command("list").stdout


def pointwise(folder: Path, shift: float = 0.0, outlier: float = 0.0) -> str:
    """Folder of a result with the log likelihood of forty observations."""
    rng = np.random.default_rng(0)
    y, mu = rng.normal(size=40), 0.15 * rng.normal(size=(2, 300))
    y[0] += outlier
    terms = -0.5 * (y - mu[..., None] - shift) ** 2
    groups = {
        "/posterior": xr.Dataset({"mu": (("chain", "draw"), mu)}),
        "/log_likelihood": xr.Dataset({"y": (("chain", "draw", "obs"), terms)}),
        "/observed_data": xr.Dataset({"y": ("obs", y)}),
    }
    return str(Result(xr.DataTree.from_dict(groups)).save(folder))


def test_compare_ranks_results(inside: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    good, bad = pointwise(tmp_path / "good"), pointwise(tmp_path / "bad", shift=2.0)
    status, said, _ = inside("compare", bad, good, "--strict", "--figure", str(tmp_path / "figures" / "ranking.png"))
    assert status == 0
    assert "'good' predicts best of 2 models" in said
    assert "'bad' predicts worse than 'good'" in said
    assert (tmp_path / "figures" / "ranking.png").read_bytes().startswith(b"\x89PNG")
    status, said, _ = inside("compare", bad, good, "--method", "pseudo_bma", "--num-samples", "200")
    assert status == 0
    assert "weights by pseudo_bma" in said
    wild = pointwise(tmp_path / "wild", outlier=50.0)
    milder = pointwise(tmp_path / "milder", shift=0.1, outlier=50.0)
    assert inside("compare", wild, milder)[0] == 0
    status, said, _ = inside("compare", wild, milder, "--strict")
    assert status == 1
    assert "Pareto k-hat above" in said


def test_compare_refuses_in_one_line(
    inside: Callable[..., tuple[int, str, str]], finished: tuple[Path, str], tmp_path: Path
) -> None:
    one, other = pointwise(tmp_path / "one"), pointwise(tmp_path / "other", outlier=1.0)
    for arguments, said in (
        ([one], "two results or more"),
        ([one, one + "/result.nc"], "given twice"),
        ([one, other], "other observed data"),
        ([one, str(tmp_path / "absent")], "no result.nc"),
        ([one, other, "--method", "waic"], "stacking or pseudo_bma"),
        ([one, other, "--figure", "ranking.txt"], ".png, .pdf or .svg"),
        ([one, other, "--unit", "time"], "unit='time' is no dim"),
        ([one, str(finished[0])], "as one whole"),
    ):
        status, _, error = inside("compare", *arguments)
        assert status == 2
        assert said in error
        assert len(error.strip().splitlines()) == 1
    result = Result.load(one)
    del result.tree["log_likelihood"]
    result.save(tmp_path / "bare")
    status, _, error = inside("compare", one, str(tmp_path / "bare"))
    assert status == 2
    assert "is no registered method" in error


def test_models_that_observe_nothing_are_neither_compared_nor_predicted(
    inside: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    from probmodels import bayesian_network, fit_svi

    result = fit_svi(bayesian_network.tiny(), num_steps=3, num_samples=30, progress=False)
    one, other = str(result.save(tmp_path / "one")), str(result.save(tmp_path / "other"))
    for arguments in (["compare", one, other], ["predict", one, "-o", str(tmp_path / "new.nc")]):
        status, _, error = inside(*arguments)
        assert status == 2
        assert "the model observes nothing" in error
        assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "new.nc").exists()


def test_predict_writes_draws_of_what_was_observed(
    inside: Callable[..., tuple[int, str, str]], finished: tuple[Path, str], tmp_path: Path
) -> None:
    out = tmp_path / "new" / "predicted.nc"
    status, said, error = inside("predict", str(finished[0]), "-o", str(out), "--num-samples", "10", "--seed", "3")
    assert status == 0, error
    assert str(out) in said
    result = Result.load(finished[0])
    observed = result.tree["observed_data"]["Z"]
    with xr.open_dataset(out) as predicted:
        assert predicted["Z"].sizes == {"chain": 2, "draw": 5, **observed.sizes}
        assert predicted.attrs["method"] == "bayesian_svd"
        assert abs(float(predicted["Z"].std()) / float(observed.std()) - 1) < 0.5
        first = predicted["Z"].values
    status, _, error = inside("predict", str(finished[0]), "-o", str(out))
    assert status == 2
    assert "--overwrite" in error
    again = ["predict", str(finished[0]), "-o", str(out), "--num-samples", "10", "--seed", "3", "--overwrite"]
    assert inside(*again)[0] == 0
    with xr.open_dataset(out) as predicted:
        np.testing.assert_array_equal(predicted["Z"].values, first)
    status, _, error = inside("predict", str(finished[0]), "-o", str(out / "below.nc"))
    assert status == 2
    assert "cannot make the folder" in error


def test_data_that_changed_since_the_run_are_said(
    inside: Callable[..., tuple[int, str, str]], field: Path, tmp_path: Path
) -> None:
    own, out = tmp_path / "own.nc", tmp_path / "run"
    own.write_bytes(field.read_bytes())
    assert inside("sst", str(own), "--out", str(out), *SMALL)[0] == 0
    assert "data have changed" not in inside("run", str(out), "--out", str(tmp_path / "same"), "--quiet")[1]
    with xr.open_dataarray(field) as data:
        (data * 1.5).to_netcdf(own)
    status, _, error = inside("predict", str(out), "-o", str(tmp_path / "new.nc"))
    assert status == 2
    assert "the data that its spec names have changed since the run" in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "new.nc").exists()
    status, said, _ = inside("run", str(out), "--out", str(tmp_path / "again"), "--quiet")
    assert status == 0
    assert "Note: the data have changed since the run of" in said


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
    inside: Callable[..., tuple[int, str, str]], field: Path, tmp_path: Path, arguments: list[str], said: str
) -> None:
    filled = [str(field) if a == "FIELD" else a for a in arguments]
    status, out, error = inside("sst", *filled, "--out", str(tmp_path / "out"), "--quiet")
    assert status == 2, out + error
    assert said in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out" / "checkpoint").exists()


@pytest.mark.slow
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
