"""Specs: checked before anything is read, and the same run as the calls written out."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from inference_models import mean_problem
from pyro.infer.autoguide import AutoDelta

from probmodels import Problem, Result, fit_bilevel, fit_svi, run_mcmc, run_spec
from probmodels.bayesian_svd import make_problem
from probmodels.errors import ProblemError, ResultError, SpecError
from probmodels.guides import with_guide
from probmodels.inference import Outer
from probmodels.schema import spec_schema
from probmodels.spec import build_problem, change_spec, load_spec, read_spec, run_engine, spec_of_result


@pytest.fixture(scope="module")
def field(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty years of a 4 x 5 box with one mode, as a NetCDF file."""
    rng = np.random.default_rng(0)
    years = np.arange(np.datetime64("1980-01-15", "D"), np.datetime64("2010-01-15", "D"), np.timedelta64(365, "D"))
    lat, lon = np.arange(30.0, 50.0, 5.0), np.arange(180.0, 205.0, 5.0)
    series, pattern = rng.standard_normal(len(years)), np.add.outer(np.sin(lat / 10), np.cos(lon / 10))
    values = series[:, None, None] * pattern + 0.2 * rng.standard_normal((len(years), lat.size, lon.size))
    path = tmp_path_factory.mktemp("field") / "sst.nc"
    data = xr.DataArray(
        values, dims=("time", "lat", "lon"), coords={"time": years.astype("datetime64[ns]"), "lat": lat, "lon": lon}
    )
    data.attrs.update(
        units="degC", long_name="sea surface temperature anomaly", standard_name="sea_surface_temperature"
    )
    data.to_dataset(name="sst").to_netcdf(path)
    return path


def spec(path: Path, **tables: dict) -> dict:
    base = {
        "method": "bayesian_svd",
        "data": {"name": "sst", "path": str(path)},
        "model": {"rank": 2, "length_scales_space": [500.0, 1000.0]},
        "inference": {
            "num_samples": 10,
            "warmup_steps": 5,
            "num_chains": 2,
            "chain_method": "sequential",
            "progress": False,
        },
    }
    for name, table in tables.items():
        base[name] = {**base.get(name, {}), **table}
    return base


def test_a_spec_is_the_calls_that_it_writes_down(field: Path, tmp_path: Path) -> None:
    result = run_spec(spec(field, output={"path": str(tmp_path / "run")}))
    from probmodels.datasets.sst import load_sst

    problem = make_problem(load_sst(str(field)), rank=2, length_scales_space=[500.0, 1000.0])
    by_hand = run_mcmc(problem, num_samples=10, warmup_steps=5, num_chains=2, chain_method="sequential", progress=False)
    assert result.posterior.equals(by_hand.posterior)
    loaded = Result.load(tmp_path / "run").posterior
    exact = [name for name in loaded if name not in problem.rounded]
    assert exact
    assert loaded[exact].equals(result.posterior[exact])


def test_a_result_runs_itself_again(field: Path, tmp_path: Path) -> None:
    result = run_spec(spec(field, output={"path": str(tmp_path / "a")}))
    again = spec_of_result(tmp_path / "a" / "result.nc")
    again["output"] = {"path": str(tmp_path / "b")}
    assert run_spec(again).posterior.equals(result.posterior)


def test_toml_and_dict_agree(field: Path, tmp_path: Path) -> None:
    text = f'method = "bayesian_svd"\n[data]\nname = "sst"\npath = "{field}"\n[model]\nrank = 2\n'
    (tmp_path / "s.toml").write_text(text)
    assert load_spec(tmp_path / "s.toml") == load_spec(
        {"method": "bayesian_svd", "data": {"name": "sst", "path": str(field)}, "model": {"rank": 2}}
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inference": {"num_sample": 3}}, r"\[inference\] unknown key 'num_sample'; did you mean 'num_samples'"),
        ({"model": {"rnk": 3}}, r"\[model\] unknown key 'rnk'; did you mean 'rank'"),
        ({"inference": {"engine": "mcm"}}, r"unknown engine 'mcm'; did you mean 'mcmc'"),
        ({"output": {"pth": "x"}}, r"\[output\] unknown key 'pth'; did you mean 'path'"),
        ({"data": {"regoin": "pacific"}}, r"\[data\] unknown key 'regoin' of data set 'sst'; did you mean 'region'"),
        ({"inference": {"gide": "map"}}, r"\[inference\] unknown key 'gide'; did you mean 'guide'"),
    ],
)
def test_unknown_keys_are_refused_with_the_closest(field: Path, change: dict, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        load_spec(spec(field, **change))


def test_unknown_methods_tables_and_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="did you mean 'bayesian_svd'"):
        load_spec({"method": "bayesian_svt"})
    with pytest.raises(SpecError, match="unknown key 'modle'; did you mean 'model'"):
        load_spec({"method": "bayesian_svd", "modle": {}})
    with pytest.raises(SpecError, match="names no method"):
        load_spec({})
    with pytest.raises(SpecError, match="cannot read the spec"):
        load_spec(tmp_path / "absent.toml")
    (tmp_path / "bad.toml").write_text("method = ")
    with pytest.raises(SpecError, match="not valid TOML"):
        load_spec(tmp_path / "bad.toml")
    with pytest.raises(SpecError, match="names no data set"):
        build_problem(load_spec({"method": "bayesian_svd", "model": {"rank": 2}}))


@pytest.mark.parametrize(
    ("guide", "message"),
    [
        ("low_rnk", r"\[inference\] no automatic guide is called 'low_rnk'; did you mean 'low_rank'"),
        ({"name": "low_rank", "rnk": 3}, r"\[inference\] guide 'low_rank' has no option 'rnk'; did you mean 'rank'"),
        ({"rank": 3}, "give a name, or a table"),
        (3, "give a name, or a table"),
    ],
)
def test_wrong_guides_are_refused_before_anything_is_read(guide: object, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        load_spec({"method": "noisy_edges", "inference": {"engine": "svi", "guide": guide}})


def test_an_engine_without_guide_takes_none() -> None:
    with pytest.raises(SpecError, match="engine 'mcmc' fits no guide; leave out 'guide'"):
        load_spec({"method": "noisy_edges", "inference": {"engine": "mcmc", "guide": "map"}})


def test_a_guide_by_name_is_that_of_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    inference = {"engine": "svi", "guide": {"name": "low_rank", "rank": 2}, "num_steps": 5, "num_samples": 4}
    checked = load_spec({"method": "noisy_edges", "inference": {**inference, "progress": False}})
    monkeypatch.setattr("probmodels.noisy_edges.make_problem", lambda data: mean_problem())
    result = run_engine(checked, build_problem(checked, data=object()))
    by_hand = fit_svi(with_guide(mean_problem(), "low_rank", rank=2), num_steps=5, num_samples=4, progress=False)
    assert result.posterior.equals(by_hand.posterior)
    assert '"rank": 2' in result.tree.attrs["spec"]


def test_what_is_nested_without_end_is_refused() -> None:
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(SpecError, match="nested too deeply"):
        load_spec({"method": "bayesian_svd", "model": {"rank": deep}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": 3}, "method=3; give the name of a method"),
        ({"method": ["bayesian_svd"]}, r"method=\['bayesian_svd'\]; give the name of a method"),
        ({"method": "os.path"}, "there is no module 'os.path'"),
        ({"method": "json.decoder"}, "json.decoder is no method, it lacks make_problem"),
        ({"data": [1]}, r"'data' must be a table of keys, not \[1\]"),
        ({"model": None}, "'model' must be a table of keys, not None"),
        ({"data": {"name": 3}}, r"\[data\] name=3; give the name of a data set"),
        ({"data": {"name": "ssst"}}, r"\[data\] unknown data set 'ssst'; did you mean 'sst'"),
        ({"data": {"path": "x.nc"}}, r"\[data\] names no data set; add name = \.\.\. to path"),
        ({"data": {"name": "sst", "path": "a\0b"}}, r"data\.path='a\\x00b' holds a character that is none"),
        ({"data": {"name": "sst", "ice": "cold"}}, r"\[data\] ice='cold'; give a number"),
        ({"model": {}}, r"\[model\] needs rank; add rank = "),
        ({"model": {"rank": "4"}}, r"\[model\] rank='4'; give a whole number"),
        ({"model": {"rank": True}}, r"\[model\] rank=True; give a whole number"),
        ({"model": {"rank": 10**30}}, r"\[model\] rank=1000.*less than 2\*\*63"),
        ({"model": {"rank": 2, "kernel_space": "\ud800"}}, r"holds a character that is none"),
        ({"model": {3: 4}}, "model has the key 3; keys are texts"),
        ({"inference": {"engine": ["mcmc"]}}, r"\[inference\] unknown engine \['mcmc'\]"),
        ({"inference": {"num_samples": 1.5}}, r"\[inference\] num_samples=1\.5; give a whole number"),
        ({"inference": {"engine": "svi", "guide": {"name": "low_rank", "rank": 0}}}, "guide 'low_rank': rank=0; give"),
        (
            {"inference": {"engine": "svi", "guide": {"name": "map", "init_scale": "x"}}},
            "init_scale='x'; give a number",
        ),
        (
            {"inference": {"engine": "mcmc", "client": "tcp://there"}},
            r"\[inference\] client='tcp://there'; give a Client",
        ),
        ({"output": {"path": ""}}, r"\[output\] path=''; give a text that is not empty"),
        ({"output": {"path": 3}}, r"\[output\] path=3; give a text"),
        ({"output": {"path": "a\0b"}}, "holds a character that is none"),
        ({"output": {"path": "runs/" + "x" * 256}}, r"\[output\] path has a part of 256 bytes; 255 are the"),
        ({"output": {"path": "é" * 128}}, r"\[output\] path has a part of 256 bytes"),
        ({"output": {"path": "runs", "overwrite": "yes"}}, r"\[output\] overwrite='yes'; give true or false"),
    ],
    ids=lambda item: str(item)[:60],
)
def test_wrong_values_are_refused_before_anything_is_read(change: dict, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        load_spec({"method": "bayesian_svd", "model": {"rank": 2}, **change})


@pytest.mark.parametrize(
    "content",
    [b"method = ", b"\xff\xfe", b"x = " + b"[" * 5000, b"x = " + b"9" * 5000, b"method = 'a\0b'", b"a.b = 1\na = 2"],
)
def test_files_that_are_no_toml_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.toml").write_bytes(content)
    with pytest.raises(SpecError):
        load_spec(tmp_path / "bad.toml")


# -- changes of single values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "place", "value"),
    [
        ("model.rank=6", ("model", "rank"), 6),
        ("model.rank = 6", ("model", "rank"), 6),
        ("model.kernel_space=matern52", ("model", "kernel_space"), "matern52"),
        ('model.fixed_effects=["trend"]', ("model", "fixed_effects"), ["trend"]),
        ("data.path=a=b.nc", ("data", "path"), "a=b.nc"),
        ("inference.guide.rank=3", ("inference", "guide", "rank"), 3),
        ("output.path=1\n[model]\nrank = 9", ("output", "path"), "1\n[model]\nrank = 9"),
        ("method=lds", ("method",), "lds"),
    ],
)
def test_a_change_sets_one_value(change: str, place: tuple[str, ...], value: object) -> None:
    changed = read_spec({"method": "bayesian_svd"})
    change_spec(changed, change)
    found: Any = changed
    for key in place:
        found = found[key]
    assert found == value
    assert changed["model"].get("rank") in (None, 6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("rank", "sets nothing; write a key and a value"),
        ("=3", "sets nothing"),
        ("model..rank=3", "sets nothing"),
        ("method.name=3", "method is 'bayesian_svd', no table"),
        ("output.path='a\0b", "holds a character that is none"),
    ],
)
def test_changes_that_are_none_are_refused(change: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        change_spec(read_spec({"method": "bayesian_svd"}), change)


# -- results are data -----------------------------------------------------------------------------------------------


def result_file(folder: Path, spec: object) -> Path:
    """A file of a result that says that it was made by a spec."""
    path = folder / "result.nc"
    xr.Dataset(attrs={"spec": spec if isinstance(spec, str | int) else json.dumps(spec)}).to_netcdf(path)
    return path


SENT = {"method": "bayesian_svd", "model": {"rank": 2}, "data": {"name": "sst"}}


def test_a_result_does_not_say_where_to_write(tmp_path: Path) -> None:
    there = {"output": {"path": "/etc/cron.d", "overwrite": True}, "inference": {"checkpoint": "/etc", "thin": 2}}
    found = spec_of_result(result_file(tmp_path, {**SENT, **there}))
    assert found["output"] == {}
    assert found["inference"] == {"thin": 2, "engine": "mcmc"}
    assert spec_of_result(tmp_path) == found


@pytest.mark.parametrize(
    "data",
    [
        {"name": "sst", "path": "https://example.org/sst.nc"},
        {"name": "sst", "path": ["a.nc", " //server/share/b.nc"]},
        {"name": "sst", "path": "\\\\server\\share\\b.nc"},
        {"name": "tu", "dataset": "MUTAG", "download": True},
    ],
)
def test_a_result_does_not_fetch_on_its_own_word(tmp_path: Path, data: dict) -> None:
    path = result_file(tmp_path, {**SENT, "data": data})
    with pytest.raises(SpecError, match="would be fetched from another machine, on the word of a file alone"):
        spec_of_result(path)
    assert spec_of_result(path, allow_fetch=True)["data"] == data


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("{", ResultError, "is damaged"),
        ("[1]", ResultError, r"is damaged: it is \[1\]"),
        (3, ResultError, "is damaged"),
        ("[" * 100_000, ResultError, "is damaged"),
        ({"method": "bayesian_svd"}, SpecError, "holds no spec of its data"),
        ({**SENT, "data": 3}, SpecError, "'data' must be a table"),
        ({**SENT, "inference": []}, SpecError, "'inference' must be a table"),
        ({**SENT, "method": "antigravity"}, SpecError, "unknown method"),
        ({**SENT, "method": "probmodels.errors"}, SpecError, "probmodels.errors is no method"),
    ],
    ids=lambda item: str(item)[:40],
)
def test_a_damaged_spec_in_a_result_is_said(tmp_path: Path, spec: object, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        spec_of_result(result_file(tmp_path, spec))


def test_files_that_are_no_results_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.nc").write_text("no NetCDF")
    for path in (tmp_path / "text.nc", tmp_path / "absent.nc", tmp_path):
        with pytest.raises(ResultError, match="cannot read"):
            spec_of_result(path)


# -- JSON Schema ----------------------------------------------------------------------------------------------------

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.toml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_valid_against_the_schema_of_their_method(path: Path) -> None:
    schema = spec_schema(path.stem)
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(json.loads(json.dumps(schema)))
    written = tomllib.loads(path.read_text(encoding="utf-8"))
    validator.validate(written)
    for change in ("model.nonsense=1", "inference.seed=-1", "output.path=''", "method=other", "data.name=nothing"):
        changed = read_spec(written)
        change_spec(changed, change)
        assert not validator.is_valid(changed), change


def test_the_spec_of_the_page_is_valid() -> None:
    page = (Path(__file__).parents[1] / "docs" / "specs.md").read_text(encoding="utf-8")
    text = page.partition("```toml\n")[2].partition("```")[0]
    written = tomllib.loads(text)
    jsonschema.Draft202012Validator(spec_schema("noisy_edges")).validate(written)
    assert load_spec(written)["inference"]["engine"] == "svi"


def test_the_schema_knows_guides_and_needs_the_engine_only_where_it_is_not_the_first() -> None:
    validator = jsonschema.Draft202012Validator(spec_schema("noisy_edges"))

    def valid(**inference: object) -> bool:
        return validator.is_valid({"method": "noisy_edges", "inference": inference})

    assert valid(num_samples=10)
    assert not valid(num_steps=10)
    assert valid(engine="svi", num_steps=10, guide="map")
    assert valid(engine="svi", guide={"name": "low_rank", "rank": 3})
    assert not valid(engine="svi", guide={"name": "low_rank", "rank": 0})
    assert not valid(engine="svi", guide={"name": "mean_field", "rank": 3})
    assert not valid(engine="mcmc", guide="map")


# -- engines that apply ---------------------------------------------------------------------------------------------


def test_a_method_without_mcmc_is_run_by_its_first_engine() -> None:
    assert load_spec({"method": "vib_gsl"})["inference"] == {"engine": "svi"}
    assert load_spec({"method": "noisy_edges"})["inference"] == {"engine": "mcmc"}
    assert load_spec({"method": "bayesian_svd", "model": {"rank": 2}})["inference"] == {"engine": "mcmc"}
    # Keys are those of that engine.
    assert load_spec({"method": "vib_gsl", "inference": {"num_steps": 3}})["inference"]["engine"] == "svi"
    with pytest.raises(SpecError, match="'warmup_steps' is a key of engine mcmc, not of 'svi'"):
        load_spec({"method": "vib_gsl", "inference": {"warmup_steps": 3}})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"phases": ["wak"]}, "no phase is called 'wak'; did you mean 'wake'"),
        ({"phases": [{}]}, "lacks its objective"),
        ({"phases": [{"objective": "wake", "step": 2}]}, "phase wake: unknown option 'step' of a phase; did you mean"),
        ({"phases": [{"objective": "wake", "lr": -1}]}, "phase wake: lr=-1; give a number above 0 or None"),
        (
            {"phases": [{"objective": "wake", "plus": {"sleep": -1}}]},
            "phase wake: sleep=-1; give numbers of at least 0",
        ),
        ({"phases": [{"objective": "wake", "num_particles": 10**9}]}, "num_particles=1000000000; give a whole number"),
        ({"reward_power": {"start": 0.5, "over": 3}}, "reward_power=.*over is a share of all rounds"),
    ],
)
def test_parts_of_phases_are_checked_when_a_spec_is_read(options: dict, message: str) -> None:
    with pytest.raises(SpecError, match=rf"^\[inference\] .*{message}"):
        load_spec({"method": "discrete_vae", "inference": {"engine": "em", **options}})


@pytest.mark.parametrize(
    ("method", "engine", "message"),
    [
        ("vib_gsl", "mcmc", r"\[inference\] engine 'mcmc' does not apply to 'vib_gsl'; choose one of svi$"),
        ("noisy_edges", "em", "engine 'em' does not apply to 'noisy_edges'; choose one of mcmc, svi$"),
        ("noisy_edges", "bilevel", "engine 'bilevel' does not apply to 'noisy_edges'"),
        ("vib_gsl", "sv", "unknown engine 'sv'; did you mean 'svi'"),
    ],
)
def test_engines_that_do_not_apply_are_refused(method: str, engine: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        load_spec({"method": method, "inference": {"engine": engine}})


def test_a_bilevel_spec_is_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"num_rounds": 2, "inner_steps": 4, "unroll_steps": 2, "hypergrad": "cg", "num_samples": 4, "seed": 3}
    options["progress"] = False
    checked = load_spec({"method": "lds", "inference": {"engine": "bilevel", **options}})
    monkeypatch.setattr("probmodels.lds.make_problem", lambda data: shrinkage())
    result = run_engine(checked, build_problem(checked, data=object()))
    by_hand = fit_bilevel(shrinkage(), **options)
    assert result.posterior.equals(by_hand.posterior)
    assert result.tree.attrs["engine"] == "bilevel"
    assert '"hypergrad": "cg"' in result.tree.attrs["spec"]
    with pytest.raises(SpecError, match="unknown key 'num_round'; did you mean 'num_rounds'"):
        load_spec({"method": "lds", "inference": {"engine": "bilevel", "num_round": 2}})


def test_a_guide_by_name_is_that_of_the_outer_problem_too(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"num_rounds": 1, "inner_steps": 400, "unroll_steps": 50, "lr": 0.05, "hyper_lr": 1e-9}
    inference = {"engine": "bilevel", "guide": "map", **options, "num_samples": 1, "progress": False}
    checked = load_spec({"method": "lds", "inference": inference})
    monkeypatch.setattr("probmodels.lds.make_problem", lambda data: shrinkage())
    result = run_engine(checked, build_problem(checked, data=object()))
    assert set(result.params()) == {"log_scale", "guide.joint.loc"}
    assert float(result.posterior["mean"].mean()) == pytest.approx(1.0, abs=1e-3)  # mode: 3 / (2 + 1)


def test_a_method_without_outer_problem_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    inference = {"engine": "bilevel", "guide": "map", "progress": False}
    checked = load_spec({"method": "lds", "inference": inference})
    monkeypatch.setattr("probmodels.lds.make_problem", lambda data: mean_problem())
    with pytest.raises(ProblemError, match="fit_bilevel needs an outer problem"):
        run_engine(checked, build_problem(checked, data=object()))


def shrinkage() -> Problem:
    """A mean whose prior sd is a hyperparameter, judged by other data."""

    def model(y: torch.Tensor) -> None:
        log_scale = pyro.param("log_scale", lambda: torch.zeros(()))
        mean = pyro.sample("mean", dist.Normal(0.0, log_scale.exp()))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    guide = AutoDelta(model)
    judged = Problem("judged", model, guide, args=(torch.tensor([0.1, 0.3]),))
    outer = Outer(judged, {"log_scale": None})
    return Problem("shrinkage", model, guide, args=(torch.tensor([1.0, 2.0]),), outer=outer)
