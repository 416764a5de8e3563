"""Every option of every command with values that it cannot have: exit status 2, one line, no traceback."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import typer
import xarray as xr

from probmodels import METHODS, Result, cli, run_mcmc
from probmodels.bayesian_svd import make_problem
from probmodels.bayesian_svd.joint.load import load_joint
from probmodels.datasets import LOADERS
from probmodels.datasets.sst import load_sst
from probmodels.errors import DataError
from probmodels.spec import build_problem, load_data, load_spec, read_spec, run_engine

LONG = "x" * 300
HUGE = "9" * 40
NO_COUNT = ["0", "-1", "1.5", "one", "", "nan", HUGE]
NO_SEED = ["-1", "1.5", "one", "", HUGE]
NO_FOLDER = ["", "FILE/below", f"FOLDER/{LONG}"]
NO_RESULT = ["", "absent", "FILE", "FOLDER", LONG]
NO_FLAG = ["yes"]  # as --flag=yes

# Arguments that work but for what a case changes.
WORKING: dict[str, list[str]] = {
    "sst": ["FIELD", "--rank=2", "--draws=10", "--warmup=1", "--chains=1", "--out=FOLDER/sst", "--quiet"],
    "ranks": ["FIELD", "--rank=1,2", "--block=1,1,1", "--share=0.2", "--repeats=1", "--out=FOLDER/ranks", "--quiet"],
    "processes": ["FIELD", "--rank=1", "--series=iid,ar1", "--block=1", "--out=FOLDER/processes", "--quiet"],
    "run": ["SPEC", "--out=FOLDER/run", "--quiet"],
    "list": [],
    "schema": ["bayesian_svd"],
    "show": ["RESULT"],
    "diagnose": ["RESULT"],
    "report": ["RESULT"],
    "compare": ["RESULT", "OTHER"],
    "predict": ["RESULT", "--out=FOLDER/predicted.nc"],
    "indices": [
        "MODES",
        "--box=one=30,40,180,200",
        "--index=pdo",
        "--published=SERIES",
        "--fitted=1990:1996",
        "--with=SERIES",
        "--max-lag=2",
        "--out=FOLDER/indices",
    ],
    "forecast": ["SVD", "--out=FOLDER/forecast.nc", "--steps=2", "--beyond"],
    "skill": ["SVD", "--out=FOLDER/skill.csv", "--steps=1", "--every=1", "--share=0.3", "--num-samples=20", "--quiet"],
    "project": ["SVD", "LATER", "--out=FOLDER/projection.nc"],
    "panels": ["MODES", "AGAIN", "--out=FOLDER/page.png", "--table=FOLDER/page.csv"],
}

# Argument or option of a command to values that it cannot have.
WRONG: dict[str, dict[str, list[str]]] = {
    "sst": {
        "files": ["absent.nc", "FILE", "FOLDER", "*.nope", LONG, "fetch"],
        "--region": ["nowhere", "1,2,3", "nan,0,0,0", "50,10,0,10"],
        "--period": ["never", "2050:2060", "1997:1991"],
        "--season": ["XYZ", "Q"],
        "--base-period": ["never", "2050:2060"],
        "--variable": ["nope"],
        "--ice": ["cold", "nan", "inf", ""],
        "--fill": ["cold", "nan", "inf", ""],
        "--min-valid": ["-1", "2", "nan", "half", ""],
        "--anomalies": NO_FLAG,
        "--daily": NO_FLAG,
        "--no-anomalies": NO_FLAG,
        "--set": ["", "model.rank", "=3", "model.rank=0", "model.rnk=3", "data.fill=cold"],
        "--rank": [*NO_COUNT, "99"],
        "--fixed-effects": ["trendd", "intercept,3"],
        "--kernel": ["matern27", "", "3"],
        "--kernel-time": ["matern27", "", "3"],
        "--series": ["ar2", "", "3"],
        "--noise": ["red", "", "3"],
        "--tail": ["-1", "2", "nan", "inf", "small", ""],
        "--draws": NO_COUNT,
        "--target-ess": ["0", "-1", "nan", "inf", "many", ""],
        "--warmup": ["-1", "1.5", "one", "", HUGE],
        "--thin": NO_COUNT,
        "--chains": NO_COUNT,
        "--steps": [*NO_COUNT, "3"],
        "--joint": ["slp", "=FIELD", "slp=", "slp=absent.nc", "slp=FILE", "3x=FIELD", "sst=FIELD", "slp=absent.nc:slp"],
        "--coupling": ["eof", "", "mca"],
        "--lags": [*NO_COUNT, "1", "60"],
        "--members": NO_FLAG,
        "--rotation": ["oblimin", "", "3"],
        "--seed": NO_SEED,
        "--engine": ["gibbs", "", "em"],
        "--device": ["tpu", "", "cuda:99", "meta"],
        "--out": NO_FOLDER,
        "--strict": NO_FLAG,
        "--overwrite": NO_FLAG,
        "--quiet": NO_FLAG,
    },
    "ranks": {
        "files": ["absent.nc", "FILE", "FOLDER", "*.nope", LONG],
        "--region": ["nowhere", "1,2,3", "nan,0,0,0", "50,10,0,10"],
        "--period": ["never", "2050:2060"],
        "--season": ["XYZ", "Q"],
        "--base-period": ["never", "2050:2060"],
        "--fixed-effects": ["trendd", "intercept,3"],
        "--rank": [*NO_COUNT, "1,two", "0,1", "99"],
        "--block": ["", "1,1", "0,1,1", "1,1,1,1", "999,1,1", "a,b,c", HUGE],
        "--share": ["0", "1", "-1", "2", "nan", "half", ""],
        "--repeats": NO_COUNT,
        "--noise": ["red", ""],
        "--seed": NO_SEED,
        "--out": NO_FOLDER,
        "--quiet": NO_FLAG,
    },
    "processes": {
        "files": ["absent.nc", "FILE", "FOLDER", "*.nope", LONG],
        "--region": ["nowhere", "1,2,3", "nan,0,0,0", "50,10,0,10"],
        "--period": ["never", "2050:2060"],
        "--season": ["XYZ", "Q"],
        "--base-period": ["never", "2050:2060"],
        "--fixed-effects": ["trendd", "intercept,3"],
        "--series": ["", "ar1", "ar1,ar1", "iid,arma", "frame,ar1"],
        "--rank": [*NO_COUNT, "99"],
        "--block": [*NO_COUNT, "999"],
        "--folds": [*NO_COUNT, "1", "99"],
        "--noise": ["red", ""],
        "--seed": NO_SEED,
        "--out": NO_FOLDER,
        "--quiet": NO_FLAG,
    },
    "run": {
        "spec": ["", "absent.toml", "FILE", "FOLDER", "absent.nc", LONG],
        "--set": [
            "",
            "model.rank",
            "=3",
            "model.rank=0",
            "model.rnk=3",
            "mdel.rank=3",
            "method.x=1",
            "model.rank=[[1]]",
            "inference.device=cuda:99",
            "inference.checkpoint=FILE",
            "inference.num_steps=3",
            "output.rotation=oblimin",
            "output.level=2",
            "output.nope=1",
        ],
        "--out": NO_FOLDER,
        "--device": ["tpu", "", "cuda:99", "meta"],
        "--strict": NO_FLAG,
        "--overwrite": NO_FLAG,
        "--allow-fetch": NO_FLAG,
        "--allow-code": NO_FLAG,
        "--quiet": NO_FLAG,
    },
    "list": {"what": ["nothing", ""]},
    "schema": {"method": ["nothing", "", "os.path", "bayesian_svt"]},
    "show": {"folder": NO_RESULT},
    "diagnose": {"folder": NO_RESULT, "--strict": NO_FLAG, "--allow-code": NO_FLAG},
    "report": {
        "folder": NO_RESULT,
        "--out": NO_FOLDER,
        "--set": ["", "output.rotation", "output.rotation=varimax", "output.path=.", "model.rank=3", "=3"],
        "--allow-code": NO_FLAG,
    },
    "compare": {
        "folders": ["absent", "FILE", "FOLDER", "OTHER"],
        "--method": ["waic", ""],
        "--unit": ["nothing", ""],
        "--num-samples": NO_COUNT,
        "--figure": ["ranking.txt", "", "FILE/below.png", f"FOLDER/{LONG}.png"],
        "--strict": NO_FLAG,
        "--allow-fetch": NO_FLAG,
        "--allow-code": NO_FLAG,
    },
    "predict": {
        "folder": NO_RESULT,
        "--out": ["", "FILE/below.nc", f"FOLDER/{LONG}.nc", "FOLDER"],
        "--num-samples": NO_COUNT,
        "--seed": NO_SEED,
        "--overwrite": NO_FLAG,
        "--allow-fetch": NO_FLAG,
        "--allow-code": NO_FLAG,
    },
    "indices": {
        "folder": [*NO_RESULT, "RESULT"],
        "--out": NO_FOLDER,
        "--box": ["nowhere", "", "=30,40,180,200", "one=30,40", "one=30,30,180,200", "one=-60,-50,0,10"],
        "--effects": NO_FLAG,
        "--no-effects": NO_FLAG,
        "--min-covered": ["-1", "2", "nan", "half", ""],
        "--ice": ["melted", "", "-1.8"],
        "--index": ["amo", ""],
        "--remove-mean": NO_FLAG,
        "--base": ["never", "", "1997:1991"],
        "--published": ["", "absent.csv", "FILE", "FOLDER"],
        "--fitted": ["never", "", "1991:1991"],
        "--with": ["", "absent.csv", "FILE", "FOLDER"],
        "--column": ["nothing", ""],
        "--missing": ["cold", ""],
        "--max-lag": ["-1", "1.5", "one", "", HUGE, "90"],
        "--detrend": NO_FLAG,
        "--strict": NO_FLAG,
        "--level": ["0", "1", "nan", "most", ""],
    },
    "forecast": {
        "folder": [*NO_RESULT, "RESULT"],
        "--out": ["", "FILE/below.nc", f"FOLDER/{LONG}.nc", "FOLDER"],
        "--steps": [*NO_COUNT, "5000"],
        "--new": ["", "absent.nc", "FILE", "FOLDER", LONG, "FIELD"],
        "--box": ["", "=", "nowhere", "a=1,2,3", "a=", "a=nan,0,0,0", "a=-50,-40,0,10"],
        "--ice": ["melted", "", "filled"],
        "--lags": NO_FLAG,
        "--coupled": NO_FLAG,
        "--residuals": NO_FLAG,
        "--table": ["", "FILE/below.csv", f"FOLDER/{LONG}.csv", "FOLDER"],
        "--figure": ["fan.txt", "", "FILE/below.png", f"FOLDER/{LONG}.png"],
        "--num-samples": [*NO_COUNT, "1"],
        "--beyond": NO_FLAG,
        "--seed": NO_SEED,
        "--overwrite": NO_FLAG,
    },
    "skill": {
        "folder": [*NO_RESULT, "RESULT"],
        "--out": ["", "FILE/below.csv", f"FOLDER/{LONG}.csv", "FOLDER"],
        "--steps": [*NO_COUNT, "5000"],
        "--every": [*NO_COUNT, "5000"],
        "--share": ["0", "1", "-1", "nan", "half", ""],
        "--lags": NO_FLAG,
        "--coupled": NO_FLAG,
        "--num-samples": [*NO_COUNT, "1"],
        "--seed": NO_SEED,
        "--overwrite": NO_FLAG,
        "--quiet": NO_FLAG,
    },
    "panels": {
        "folders": ["absent", "FILE", "FOLDER", "RESULT", "AGAIN"],
        "--out": ["page.txt", "", "FILE/below.png", f"FOLDER/{LONG}.png"],
        "--mode": [*NO_COUNT, "4"],
        "--columns": NO_COUNT,
        "--table": ["", "FILE/below.csv", "FOLDER"],
        "--overwrite": NO_FLAG,
    },
    "project": {
        "folder": [*NO_RESULT, "RESULT"],
        "file": ["", "absent.nc", "FILE", "FOLDER", LONG, "FIELD"],
        "--out": ["", "FILE/below.nc", f"FOLDER/{LONG}.nc", "FOLDER"],
        "--level": ["0", "1", "-1", "nan", "inf", "half", ""],
        "--num-samples": [*NO_COUNT, "1"],
        "--seed": NO_SEED,
        "--overwrite": NO_FLAG,
    },
}


def commands() -> dict[str, Any]:
    group: Any = typer.main.get_command(cli.app)
    return group.commands


def cases() -> Iterator[Any]:
    for command, table in WRONG.items():
        for option, values in table.items():
            for value in values:
                yield pytest.param(command, option, value, id=f"{command} {option} {value[:20]}")
        yield pytest.param(command, "--nope", "3", id=f"{command} --nope")


def test_the_table_has_every_option_of_every_command() -> None:
    found = {
        name: {
            option if option.startswith("--") else p.name
            for p in command.params
            if p.name != "help"
            for option in (p.opts[0], *p.secondary_opts)
        }
        for name, command in commands().items()
    }
    assert found == {name: set(table) for name, table in WRONG.items()}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("places")
    rng = np.random.default_rng(0)
    months = np.arange("1990-01", "1998-01", dtype="datetime64[M]").astype("datetime64[ns]")
    lat, lon = np.arange(20.0, 35.0, 5.0), np.arange(170.0, 190.0, 5.0)
    field = xr.DataArray(
        rng.standard_normal((len(months), 3, 4)),
        dims=("time", "lat", "lon"),
        coords={"time": months, "lat": lat, "lon": lon},
        name="sst",
        attrs={"units": "degC", "standard_name": "sea_surface_temperature"},
    )
    field.to_netcdf(folder / "field.nc")
    more = field[:6].assign_coords(time=months[:6] + (months[-1] - months[0]) + np.timedelta64(40, "D"))
    xr.concat([field, more], "time").to_netcdf(folder / "later.nc")
    (folder / "file").write_text("neither TOML nor NetCDF\n")
    (folder / "empty").mkdir()
    (folder / "spec.toml").write_text(
        f'method = "bayesian_svd"\n[data]\nname = "sst"\npath = "{folder}/field.nc"\n[model]\nrank = 2\n'
        "[inference]\nnum_samples = 10\nwarmup_steps = 1\nnum_chains = 1\n"
    )
    for name in ("one", "other"):
        mu = 0.15 * rng.normal(size=(2, 100))
        y = np.linspace(-1, 1, 20)
        groups = {
            "/posterior": xr.Dataset({"mu": (("chain", "draw"), mu)}),
            "/log_likelihood": xr.Dataset({"y": (("chain", "draw", "obs"), -0.5 * (y - mu[..., None]) ** 2)}),
            "/observed_data": xr.Dataset({"y": ("obs", y)}),
        }
        Result(xr.DataTree.from_dict(groups)).save(folder / name)
    sampling: dict[str, Any] = {"num_samples": 10, "warmup_steps": 1, "num_chains": 1, "chain_method": "sequential"}
    wide = xr.DataArray(
        rng.standard_normal((len(months), 5, 7)),
        dims=("time", "lat", "lon"),
        coords={"time": months, "lat": np.arange(25.0, 50.0, 5.0), "lon": np.arange(170.0, 240.0, 10.0)},
    )
    run_mcmc(make_problem(wide, rank=3, series="ar1"), **sampling, progress=False).save(folder / "modes")
    values = "\n".join(f"{str(month)[:7]},{rng.standard_normal():.3f}" for month in months)
    (folder / "series.csv").write_text(f"time,rain\n{values}\n")
    names = {"FIELD": "field.nc", "FILE": "file", "FOLDER": "empty", "SPEC": "spec.toml", "RESULT": "one"}
    shutil.copytree(folder / "modes", folder / "again")
    names |= {"OTHER": "other", "MODES": "modes", "AGAIN": "again", "SERIES": "series.csv"}
    spec = load_spec({**read_spec(folder / "spec.toml"), "output": {"path": str(folder / "svd")}})
    spec["model"] |= {"series": "ar1", "fixed_effects": ["intercept", "trend"]}
    run_engine(spec, build_problem(spec, load_data(spec)), progress=False).save(folder / "svd")
    names |= {"SVD": "svd", "LATER": "later.nc"}
    return {key: str(folder / name) for key, name in names.items()}


@pytest.fixture
def inside(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], places: dict[str, str], tmp_path: Path
) -> Callable[..., tuple[int, str]]:
    """Run the command line in this process and an empty folder; returns its exit status and standard error."""

    def run(*arguments: str) -> tuple[int, str]:
        filled = []
        for argument in arguments:
            option, equals, value = argument.rpartition("=") if argument.startswith("--") else ("", "", argument)
            for key, place in places.items():
                value = value.replace(key, place) if value.split("/")[0] == key else value
            filled.append(f"{option}{equals}{value}")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["probmodels", *filled])
        with pytest.raises(SystemExit) as left:
            cli.main()
        return int(left.value.code or 0), capfd.readouterr().err

    return run


@pytest.mark.parametrize(("command", "option", "value"), list(cases()))
def test_wrong_values_are_one_line_and_status_two(
    inside: Callable[..., tuple[int, str]], command: str, option: str, value: str
) -> None:
    working = WORKING[command]
    arguments = [*working, f"{option}={value}"] if option.startswith("--") else [value, *working[1:]]
    status, said = inside(command, *arguments)
    assert status == 2, said
    assert len(said.strip().splitlines()) == 1, said
    assert "Traceback" not in said


@pytest.mark.parametrize("command", [name for name in WORKING if name not in ("run", "predict")])
def test_what_the_cases_start_from_works(inside: Callable[..., tuple[int, str]], command: str) -> None:
    arguments = [argument.replace("--out=FOLDER", "--out=.") for argument in WORKING[command]]
    assert inside(command, *arguments) == (0, "")


ODD_ATTRIBUTES: list[dict[str, Any]] = [
    {},
    *({"method": method} for method in METHODS),
    {"method": "of_somebody_else"},
    {"method": 5},
    {"spec": "{"},
    {"spec": "[1]"},
    {"spec": '{"method": ["lds"]}'},
    {"spec": '{"method": "os.path", "data": {}}'},
    {"spec": '{"method": "lds", "data": 3}'},
    {"spec": '{"method": "lds", "data": {"name": "tu", "dataset": "MUTAG", "download": true}}'},
    {"diagnosed": '["nothing"]'},
    {"diagnosed": "3"},
    {"engine": 3.5},
]


@pytest.mark.parametrize("attributes", ODD_ATTRIBUTES, ids=str)
def test_results_of_any_model_are_shown_or_refused_in_one_line(
    inside: Callable[..., tuple[int, str]], tmp_path: Path, attributes: dict[str, Any]
) -> None:
    rng = np.random.default_rng(0)
    for name, attrs in (("odd", attributes), ("plain", {})):
        posterior = xr.Dataset({"mu": (("chain", "draw"), rng.normal(size=(2, 50)))})
        result = Result(xr.DataTree.from_dict({"/posterior": posterior}))
        result.tree.attrs.update(attrs)
        result.save(tmp_path / name)
    read = {}
    for command in (["show"], ["diagnose"], ["report"], ["predict", "--out=new.nc"], ["compare", "plain"]):
        status, said = inside(*command, "odd")
        assert status in (0, 2)
        assert len(said.strip().splitlines()) == (1 if status else 0), said
        read[command[0]] = status
    assert read["predict"] == read["compare"] == 2  # neither data nor problem
    if attributes.get("method", "of_somebody_else") == "of_somebody_else" and set(attributes) <= {"method"}:
        assert read["show"] == read["diagnose"] == read["report"] == 0


def test_a_result_file_does_not_say_where_to_write_or_what_to_fetch(
    inside: Callable[..., tuple[int, str]], places: dict[str, str], tmp_path: Path
) -> None:
    there = tmp_path / "there"
    sampling = {"num_samples": 10, "warmup_steps": 1, "num_chains": 1, "checkpoint": str(there / "steps")}
    spec = {
        "method": "bayesian_svd",
        "data": {"name": "sst", "path": places["FIELD"]},
        "model": {"rank": 2},
        "inference": sampling,
        "output": {"path": str(there), "overwrite": True},
    }
    (tmp_path / "sent").mkdir()
    sent = tmp_path / "sent" / "result.nc"
    xr.Dataset(attrs={"spec": json.dumps(spec)}).to_netcdf(sent)
    before = sent.read_bytes()
    assert inside("run", "sent/result.nc", "--quiet") == (0, "")
    assert not there.exists()
    assert sent.read_bytes() == before
    assert Result.load(tmp_path / "sent-again").posterior.sizes["draw"] == 10
    status, said = inside("run", "sent", "--quiet")
    assert status == 2
    assert "sent-again holds a result already; choose another folder with --out, or pass --overwrite" in said
    status, said = inside("run", "sent", "--quiet", "--out=sent")
    assert status == 2
    assert sent.read_bytes() == before
    spec["data"]["path"] = "https://127.0.0.1:1/sst.nc"
    xr.Dataset(attrs={"spec": json.dumps(spec)}).to_netcdf(sent)
    status, said = inside("run", "sent", "--quiet", "--overwrite")
    assert status == 2
    assert "data.path='https://127.0.0.1:1/sst.nc' would be fetched from another machine" in said
    assert "--allow-fetch" in said


@pytest.mark.parametrize("change", ["inference.device=cuda:99", "inference.checkpoint=FILE"])
def test_where_to_compute_is_checked_before_data_are_read(
    inside: Callable[..., tuple[int, str]], places: dict[str, str], change: str
) -> None:
    change = change.replace("FILE", places["FILE"])
    status, said = inside("run", "SPEC", "--out=run", "--set", change, "--set", "data.path=absent.nc", "--quiet")
    assert status == 2
    assert "absent.nc" not in said


def test_a_key_of_another_engine_is_told_as_such(inside: Callable[..., tuple[int, str]]) -> None:
    status, said = inside("run", "SPEC", "--out=run", "--set", "inference.num_steps=3", "--quiet")
    assert status == 2
    assert "'num_steps' is a key of engine svi, not of 'mcmc'; leave it out" in said
    status, said = inside("run", "SPEC", "--out=run", "--set", "data.name=petals", "--quiet")
    assert status == 2
    assert "unknown key 'path' of data set 'petals'" in said


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--series=frame"], "needs series that are a process: leave --series frame out"),
        (["--engine=svi", "--steps=3"], "needs series that are a process: leave --engine svi out"),
    ],
)
def test_correlated_noise_is_refused_where_series_are_numbers(
    inside: Callable[..., tuple[int, str]], given: list[str], message: str
) -> None:
    status, said = inside("sst", "FIELD", "--rank=2", "--out=run", "--quiet", *given, "--noise=correlated")
    assert status == 2
    assert message in said


@pytest.mark.parametrize("noise", ["white", "correlated"])
def test_the_noise_is_as_asked(inside: Callable[..., tuple[int, str]], noise: str) -> None:
    status, said = inside("sst", "FIELD", *WORKING["sst"][1:5], "--out=run", f"--noise={noise}", "--quiet")
    assert status == 0, said
    assert ("noise_level" in Result.load(Path("run")).tree["constant_data"]) == (noise == "correlated")


@pytest.mark.parametrize("rotation", ["varimax", "promax"])
def test_modes_are_rotated_as_asked(inside: Callable[..., tuple[int, str]], rotation: str) -> None:
    assert inside("sst", "FIELD", *WORKING["sst"][1:5], "--out=run", f"--rotation={rotation}", "--quiet") == (0, "")
    assert {"rotated_maps.png", "rotated_pcs.png"} <= {file.name for file in Path("run/figures").iterdir()}
    assert 'id="rotated"' in Path("run/report.html").read_text(encoding="utf-8")
    assert "rotated modes of the population" in Path("run/summary.txt").read_text(encoding="utf-8")
    first = Path(f"run/modes_{rotation}.nc").read_bytes()
    assert inside("report", "run", "--out=plain") == (0, "")  # as its spec says
    assert Path(f"plain/modes_{rotation}.nc").exists()
    other = {"varimax": "promax", "promax": "varimax"}[rotation]
    assert inside("report", "run", "--out=other", "--set", f"output.rotation={other}") == (0, "")
    assert Path(f"other/modes_{other}.nc").read_bytes() != first


def test_one_mode_is_not_rotated_and_nothing_is_read(inside: Callable[..., tuple[int, str]]) -> None:
    status, said = inside("sst", "absent.nc", "--rank=1", "--out=run", "--rotation=varimax", "--quiet")
    assert status == 2
    assert "rotation needs two modes or more" in said
    status, said = inside("run", "SPEC", "--set=model.rank=1", "--set=output.rotation=promax", "--out=run", "--quiet")
    assert status == 2
    assert "rotation needs two modes or more" in said


@pytest.fixture(scope="module")
def fields(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of temperature and pressure that vary together, of the same temperature again, and of other times."""
    folder, rng = tmp_path_factory.mktemp("fields"), np.random.default_rng(1)
    months = np.arange("1990-01", "1998-01", dtype="datetime64[M]").astype("datetime64[ns]")
    series = rng.standard_normal(len(months))
    for name, lat, lon, size, units in (
        ("sst", np.arange(20.0, 35, 5), np.arange(170.0, 190, 5), 1.0, "degC"),
        ("slp", np.arange(30.0, 42, 4), np.arange(180.0, 204, 6), 300.0, "Pa"),
    ):
        shape = np.cos(np.arange(len(lat)))[:, None] + np.sin(np.arange(len(lon)))
        values = series[:, None, None] * shape + 0.3 * rng.standard_normal((len(months), len(lat), len(lon)))
        coords = {"time": months, "lat": lat, "lon": lon}
        field = xr.DataArray(size * values, coords, ("time", "lat", "lon"), name=name, attrs={"units": units})
        field.to_netcdf(folder / f"{name}.nc")
        if name == "sst":
            again = field + 0.3 * rng.standard_normal(field.shape)
            again.assign_attrs(field.attrs).to_netcdf(folder / "again.nc")
            field.isel(lat=slice(0, 2)).to_netcdf(folder / "smaller.nc")
            both = xr.concat([field, again.assign_attrs(field.attrs)], "number")
            both.transpose("time", "number", "lat", "lon").to_netcdf(folder / "both.nc")
            xr.concat([field, field, again], "number").to_netcdf(folder / "three.nc")
            both.isel(number=[0]).to_netcdf(folder / "single.nc")
    years = np.arange("2003-01", "2011-01", dtype="datetime64[M]").astype("datetime64[ns]")
    field.assign_coords(time=years).to_netcdf(folder / "later.nc")
    return folder


QUICK = ["--rank=2", "--draws=30", "--warmup=20", "--chains=1", "--out=run", "--quiet"]


@pytest.mark.parametrize("coupling", [[], ["--coupling=cca"]])
def test_fields_are_decomposed_together(
    inside: Callable[..., tuple[int, str]], fields: Path, tmp_path: Path, coupling: list[str]
) -> None:
    asked = [str(fields / "sst.nc"), "--joint", f"slp={fields / 'slp.nc'}:slp", *coupling, *QUICK]
    assert inside("sst", *asked) == (0, "")
    table = pd.read_csv("run/tables/coupled.csv")
    assert table["method"].tolist() == ["cca" if coupling else "mca"]
    assert table["correlation_lower"][0] > 0.8
    with xr.open_dataset("run/coupled.nc") as made:
        assert made["map_mean_sst"].attrs["units"] == "degC"
        assert made["map_mean_slp"].attrs["units"] == "Pa"
        assert made["map_mean_slp"].shape == (1, 3, 4)
        ratio = abs(made["map_mean_slp"]).max() / abs(made["map_mean_sst"]).max()
        assert 200 < float(ratio) < 450
    assert {"joint_maps.png", "coupled_maps.png"} <= {file.name for file in Path("run/figures").iterdir()}
    page = Path("run/report.html").read_text(encoding="utf-8")
    assert page.index('id="joint"') < page.index("figure-coupled_maps") < page.index('id="pcs"')
    shown = re.findall('<figure id="figure-([^"]+)"', page)
    assert shown[0] == "joint_maps"
    assert "leading_modes" not in shown
    assert {"mode_maps_sst", "mode_maps_slp", "trend_slp", "residual_maps_sst"} <= set(shown)
    trends = pd.read_csv("run/tables/trend.csv")
    assert set(zip(trends["field"], trends["units"], strict=True)) == {
        ("sst", "degC per decade"),
        ("slp", "Pa per decade"),
    }
    checker = pytest.importorskip("compliance_checker.runner")
    checker.CheckSuite.load_all_available_checkers()
    passed, errors = checker.ComplianceChecker.run_checker(
        "run/coupled.nc", ["cf:1.11"], 0, "normal", output_filename=str(tmp_path / "cf.txt")
    )
    assert (passed, errors) == (True, False), (tmp_path / "cf.txt").read_text()


@pytest.mark.parametrize("special", ["lags", "members"])
def test_lags_and_members_are_one_option_each(
    inside: Callable[..., tuple[int, str]], fields: Path, special: str
) -> None:
    sst, again = str(fields / "sst.nc"), str(fields / "again.nc")
    asked = [sst, "--lags=3"] if special == "lags" else [sst, again, "--members"]
    assert inside("sst", *asked, *QUICK) == (0, "")
    constant = Result.load(Path("run")).tree["constant_data"]
    assert dict(constant.sizes)["time"] == (32 if special == "lags" else 192)
    assert dict(constant.sizes)["cell"] == (36 if special == "lags" else 12)
    assert Path("run/figures/joint_maps.png").exists() == (special == "lags")
    assert not Path("run/coupled.nc").exists()


def test_one_file_of_members_works_like_a_file_for_each(fields: Path) -> None:
    files = load_joint({"sst": [str(fields / "sst.nc"), str(fields / "again.nc")]}, members=True)
    one = load_joint({"sst": str(fields / "both.nc")}, members=True)
    assert one.sizes == {"cell": 12, "time": 192}
    np.testing.assert_array_equal(one.values, files.values)
    assert list(dict.fromkeys(one["member"].values)) == ["1", "2"]
    assert list(dict.fromkeys(files["member"].values)) == ["sst", "again"]
    pattern = load_joint({"sst": str(fields / "[sa][sg]*[tn].nc")}, members=True)
    assert list(dict.fromkeys(pattern["member"].values)) == ["again", "sst"]
    single = load_sst(fields / "both.nc", member=1)
    np.testing.assert_array_equal(single.values, load_sst(fields / "again.nc").values)


@pytest.mark.parametrize("dim", ["member", "ensemble", "realization", "number", "Realisation", "m"])
def test_members_lie_along_any_of_the_usual_dimensions(fields: Path, tmp_path: Path, dim: str) -> None:
    with xr.open_dataset(fields / "both.nc") as both:
        named = both.rename(number=dim).assign_coords({dim: (dim, ["r1", "r2"])})
        if dim == "m":
            named[dim].attrs["standard_name"] = "realization"
        named.to_netcdf(tmp_path / "named.nc")
    found = load_joint({"sst": str(tmp_path / "named.nc")}, members=True)
    assert list(dict.fromkeys(found["member"].values)) == ["r1", "r2"]


def test_members_that_cannot_be_read_are_refused(fields: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the members 0 to 1 along 'number', not member=2"):
        load_sst(fields / "both.nc", member=2)
    with pytest.raises(DataError, match="holds no ensemble"):
        load_sst(fields / "sst.nc", member=0)
    with pytest.raises(DataError, match="leave one of them out"):
        load_joint({"sst": {"path": str(fields / "both.nc"), "member": 0}}, members=True)
    with xr.open_dataset(fields / "both.nc") as both:
        both.rename(number="depth").to_netcdf(tmp_path / "depth.nc")
    with pytest.raises(DataError, match="two files or more"):
        load_joint({"sst": str(tmp_path / "depth.nc")}, members=True)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["sst.nc", "--joint", "slp=later.nc"], "the fields share 0 times (sst 1990-01-01 to 1997-12-01, slp 2003"),
        (["sst.nc", "--joint", "slp=slp.nc:nope"], "nope"),
        (["sst.nc", "--joint", "slp=slp.nc", "--lags=2"], "lags=2 is of one field"),
        (["sst.nc", "--joint", "slp=slp.nc", "--series=frame", "--coupling=mca"], "modes of the population"),
        (["sst.nc", "--joint", "slp=slp.nc", "--rank=1", "--coupling=mca"], "a higher model.rank"),
        (["sst.nc", "--members"], "two files or more"),
        (["single.nc", "--members"], "two files or more"),
        (["sst.nc", "smaller.nc", "--members"], "differ in lat (2 and 3)"),
        (["sst.nc", "both.nc", "--members"], "sst.nc 1, both.nc 2"),
        (["both.nc", "three.nc", "--members"], "both.nc 2, three.nc 3"),
        (["both.nc"], "2 members of an ensemble along 'number'; take one (member=0), or all of them (--members)"),
        (["sst.nc", "slp.nc", "--members", "--lags=2"], "choose one of them"),
        (["--lags=2"], "the embedded one stands alone"),
        (["fill", "sst.nc", "--lags=2"], "'sst fill' is of one field"),
        (["fill", "sst.nc", "--series=frame"], "series that are a process"),
        (["sst.nc", "--coupling=mca"], "is of several fields"),
    ],
)
def test_fields_that_do_not_go_together_are_refused_before_the_run(
    inside: Callable[..., tuple[int, str]], fields: Path, asked: list[str], message: str
) -> None:
    placed = [
        f"{word.partition('=')[0]}={fields / word.partition('=')[2]}"
        if word.startswith("slp=")
        else str(fields / word)
        if word.endswith(".nc")
        else word
        for word in asked
    ]
    status, said = inside("sst", *QUICK, *placed)
    assert status == 2
    assert message in said
    assert len(said.strip().splitlines()) == 1


def test_fields_of_a_spec_are_checked_by_their_loader(
    inside: Callable[..., tuple[int, str]], fields: Path, tmp_path: Path
) -> None:
    data = f'[data]\nname = "joint"\n[data.fields]\nsst = "{fields}/sst.nc"\nslp = {{ path = "{fields}/slp.nc" }}\n'
    run = "[model]\nrank = 2\nseries = 'ar1'\n[inference]\nnum_samples = 10\nwarmup_steps = 5\nnum_chains = 1\n"
    (tmp_path / "joint.toml").write_text(f'method = "bayesian_svd"\n{data}{run}[output]\ncoupling = "cca"\n')
    status, said = inside("run", "joint.toml", "--out=run", "--quiet", "--set=data.fields.slp.pth=x")
    assert status == 2
    assert "fields.slp: unknown option 'pth'; did you mean 'path'?" in said
    status, said = inside("run", "joint.toml", "--out=run", "--quiet", "--set=data.regin=x")
    assert status == 2
    assert "unknown key 'regin' of data set 'joint'; did you mean 'region'?" in said


def test_the_module_is_the_command_line() -> None:
    run = subprocess.run([sys.executable, "-m", "probmodels", "--version"], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0
    assert run.stdout.strip()


@pytest.mark.parametrize("where", ["load_data", "run_engine", "load_spec"])
def test_an_interrupt_is_one_line_that_says_how_to_go_on(
    inside: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def interrupted(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"probmodels.spec.{where}", interrupted)
    status, said = inside("run", "SPEC", "--out=run", "--quiet")
    assert status == 130
    assert "the same command again goes on from what is kept" in said
    assert len(said.strip().splitlines()) == 1


def test_a_run_says_what_it_does_from_the_first_moment(inside: Callable[..., tuple[int, str]]) -> None:
    status, said = inside("run", "SPEC", "--out=run", "--set", "inference.thin=2")
    assert status == 0
    steps = ["reading the spec", "checking the spec", "loading data: sst", "building the problem: bayesian_svd"]
    found = [said.find(f"{step} ...") for step in [*steps, "compiling, and running mcmc", "writing to run"]]
    assert found == sorted(found)
    assert found[0] == 0
    cost = r"\d+ chains? of \d+ sweeps, .* ms each, .* will take about \d.*, and .* GiB of memory; "
    assert re.search(cost + r"summaries, files and figures another \d", said)


def test_what_is_listed_is_read_without_importing_it() -> None:
    code = (
        "import sys\nfrom probmodels.cli.specs import list_known\n"
        "for what in ('methods', 'data'):\n    list_known(what)\n"
        "print([name for name in ('torch', 'pyro', 'xarray', 'numpy', 'matplotlib') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    lines = run.stdout.splitlines()
    assert lines[-1] == "[]"
    assert {*METHODS, *LOADERS} <= {line.partition(" ")[0] for line in lines}


@pytest.mark.parametrize(
    "arguments", [["nothing"], ["--nope"], ["--version=3"], ["run"], ["compare"], ["predict", "x"]]
)
def test_what_is_no_command_is_one_line_and_status_two(
    inside: Callable[..., tuple[int, str]], arguments: list[str]
) -> None:
    status, said = inside(*arguments)
    assert status == 2
    assert len(said.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["sst", "--set=model.hold_out=1"], "hold_out=1; give a number of at least 0 and of at most 0.5"),
        (["sst", "--set=model.hold_out=0.2", "--set=model.hold_out_block=[100,3,4]"], "the data have 50 times"),
        (["sst", "--set=model.hold_out_block=[6,3,4]"], "hold_out_block"),
        (["sst", "--rank=1", "--rotation=varimax"], "rotation='varimax' of one mode"),
        (["ranks", "--block=100,3,4"], "the data have 50 times, of which a block may have 25"),
        (["ranks", "--block=6,90,4"], "the data have 18 cells along latitude"),
        (["ranks", "--share=0"], "share=0.0; give a number above 0"),
        (["ranks", "--share=1"], "share=1.0; give a number above 0 and of at most 0.5"),
    ],
)
def test_what_cannot_be_held_out_or_rotated_is_refused_before_the_run(
    inside: Callable[..., tuple[int, str]], asked: list[str], message: str
) -> None:
    status, said = inside(*asked, "--out=run")
    assert status == 2
    assert message in said
    assert "compiling" not in said
    assert not list(Path("run").glob("*"))
