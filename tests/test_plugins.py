"""Methods of other packages: the one of the documentation, installed and run as the page says; and broken ones."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import xarray as xr

from probmodels import Result, cli, get_method
from probmodels.errors import ResultError, SpecError
from probmodels.methods import list_methods, refuse_code
from probmodels.report import write_report
from probmodels.spec import build_problem, load_spec, spec_of_result

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "adding_a_method.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"```(?:python|toml)\n# (\S+\.(?:py|toml))\n(.*?)```", PAGE, flags=re.DOTALL))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The documented files, as they stand."""
    folder = tmp_path_factory.mktemp("written")
    for name, text in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def installed(written: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment in which the documented package is installed."""
    folder = tmp_path_factory.mktemp("installed")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run(
        [*install, "--disable-pip-version-check", "--target", str(folder), str(written)],
        check=True,
        capture_output=True,
        timeout=300,
    )
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]), "MPLBACKEND": "agg"}


def run(*arguments: str, cwd: Path, env: dict[str, str]) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_page_has_all_files_of_a_package() -> None:
    assert set(FILES) == {
        "pyproject.toml",
        "probmodels_ppca/__init__.py",
        "probmodels_ppca/guide.py",
        "ppca.toml",
        "test_ppca.py",
    }


def test_a_method_touches_six_files() -> None:
    table = PAGE.partition("## Here: six files")[2].partition("\n\n##")[0]
    files = re.findall(r"^\| `([^`]+)` \|", table, flags=re.MULTILINE)
    assert len(files) == len(set(files)) == 6
    for file in files:  # as one method has them
        assert (ROOT / file.replace("foo", "vib_gsl")).is_file(), file


def test_the_method_of_the_page_runs_as_the_page_says(written: Path, installed: dict[str, str]) -> None:
    said = run("probmodels.cli", "list", cwd=written, env=installed)
    assert re.search(
        r"^ppca +Probabilistic principal component analysis\.\n +Tipping and Bishop \(1999\)", said, re.MULTILINE
    )
    said = run("probmodels.cli", "list", "data", cwd=written, env=installed)
    assert re.search(r"^ppca_rows +Rows of three features, made of two components\.$", said, re.MULTILINE)
    changed = ["--set", "inference.num_steps=500", "--quiet"]
    assert "Report: " in run("probmodels.cli", "run", "ppca.toml", *changed, cwd=written, env=installed)
    result = Result.load(written / "runs" / "ppca")
    assert result.posterior["z"].dims == ("chain", "draw", "row", "component")
    assert "row 400, component 2" in run("probmodels.cli", "show", "runs/ppca", cwd=written, env=installed)
    run("probmodels.cli", "predict", "runs/ppca", "--out", "new.nc", "--num-samples", "3", cwd=written, env=installed)
    schema = json.loads(run("probmodels.cli", "schema", "ppca", cwd=written, env=installed))
    validator = jsonschema.Draft202012Validator(schema)
    validator.validate(tomllib.loads(FILES["ppca.toml"]))
    assert not validator.is_valid(tomllib.loads(FILES["ppca.toml"].replace("ppca_rows", "ppca_row")))


def test_the_tests_of_the_page_pass(written: Path, installed: dict[str, str]) -> None:
    assert "3 passed" in run("pytest", "-q", "-p", "no:cacheprovider", "test_ppca.py", cwd=written, env=installed)


def test_the_method_of_the_page_conforms(installed: dict[str, str]) -> None:
    conformance = ["tests/test_methods.py", "-k", "ppca", "-c", "pyproject.toml"]
    said = run("pytest", "-q", "-p", "no:cacheprovider", *conformance, cwd=ROOT, env=installed)
    assert int(re.search(r"(\d+) passed", said)[1]) >= 8  # type: ignore[index]
    assert "failed" not in said


# -- by their dotted paths ------------------------------------------------------------------------------------------

METHOD = '''"""A method."""
REFERENCE = "Nobody (2000), https://example.org"
ENGINES = ("mcmc",)
def make_problem(data): ...
def tiny(): ...
'''


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """Dotted path of a module of a package that nobody has declared; the test says which text it has."""
    name = f"elsewhere_{abs(hash(request.node.name))}"
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("")
    (tmp_path / name / "method.py").write_text(request.param, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    return f"{name}.method"


@pytest.mark.parametrize("module", [METHOD], indirect=True)
def test_a_spec_may_name_a_module(module: str) -> None:
    assert get_method(module).REFERENCE.startswith("Nobody")
    assert load_spec({"method": module})["inference"] == {"engine": "mcmc"}


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (METHOD.replace("def tiny(): ...", ""), r"is no method, it lacks tiny\(\) -> Problem$"),
        (METHOD.replace("ENGINES", "engines"), "it lacks ENGINES, a tuple of names of mcmc, svi, em, bilevel"),
        ("raise SystemExit('imported')", r"it lacks make_problem\(data, \*\*options\) -> Problem; tiny"),
        ("x = 1\ndef (", r"cannot be imported: method\.py, line 2: "),
        (METHOD.replace("(data)", "()"), r"make_problem takes no data; expected make_problem\(data, \*\*options\)"),
        (METHOD.replace('("mcmc",)', '("gibbs",)'), r"ENGINES=\('gibbs',\); expected ENGINES, a tuple of names"),
        (METHOD.replace('("mcmc",)', '"mcmc"'), "ENGINES='mcmc'; expected"),
        (METHOD.replace('("mcmc",)', "()"), r"ENGINES=\(\); expected"),
        (METHOD + "tiny = 3\n", "tiny=3; expected tiny"),
        (METHOD + "import nowhere_to_be_found\n", "cannot import .*: ModuleNotFoundError: No module named 'nowhere"),
    ],
    indirect=["module"],
    ids=range(10),
)
def test_modules_that_are_no_methods_are_refused(module: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        get_method(module)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (METHOD.replace("data): ...", "data): return 3"), "make_problem returned a int, not a Problem"),
        (
            METHOD.replace("data): ...", "data):\n    return {}['a']"),
            r"make_problem failed: KeyError: 'a' \(method\.py, line 5\)",
        ),
    ],
    indirect=["module"],
    ids=range(2),
)
def test_what_a_method_fails_to_make_is_said(module: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        build_problem(load_spec({"method": module}), data=xr.Dataset())


WRITING = '''"""A method."""
import pyro
import pyro.distributions as dist
from probmodels.inference import Problem
REFERENCE = "Nobody (2000), https://example.org"
ENGINES = ("mcmc",)
def model():
    pyro.sample("z", dist.Normal(0.0, 1.0))
def make_problem(data):
    return Problem("writing", model)
def tiny():
    return make_problem(None)
def write_outputs(result, folder):
    return 3
'''


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (WRITING, "write_outputs returned a int, not what write_all returns"),
        (
            WRITING.replace("return 3", "return 1 / 0"),
            r"write_outputs failed: ZeroDivisionError: .*\(method\.py, line 14\)",
        ),
    ],
    indirect=["module"],
    ids=range(2),
)
def test_outputs_that_a_method_fails_to_write_leave_the_result(
    module: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = tmp_path / "spec.toml"
    sampling = "num_samples = 8\nwarmup_steps = 2\nnum_chains = 1\n"
    spec.write_text(f'method = "{module}"\n[data]\nname = "petals"\n[inference]\n{sampling}')
    monkeypatch.setattr(sys, "argv", ["probmodels", "run", str(spec), "--out", str(tmp_path / "out"), "--quiet"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert re.search(f"method '{module}': {message}", said)
    assert len(said.strip().splitlines()) == 1
    assert Result.load(tmp_path / "out").posterior.sizes["draw"] == 8


def test_a_module_without_a_folder_is_told_how_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "quite_my_own.py").write_text(METHOD)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(SpecError, match=r"named by a dotted path: put quite_my_own\.py into a folder"):
        get_method("quite_my_own")


def test_a_declared_method_that_is_gone_is_listed_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    information = tmp_path / "gone-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: gone\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[probmodels.methods]\ngone = gone.method\nlds = gone.method\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    listed = {method.name: method for method in list_methods()}
    assert listed["gone"].summary == "cannot be used: there is no module 'gone.method'"
    assert listed["lds"].module == "probmodels.lds"
    with pytest.raises(SpecError, match=r"method 'gone': there is no module 'gone\.method'; install it"):
        get_method("gone")
    with pytest.raises(SpecError, match="did you mean 'gone'"):
        get_method("gonne")


PLANTED = '''"""A method that leaves a trace when it is imported."""
from pathlib import Path

Path(__file__).with_name("ran").touch()
REFERENCE = "https://example.org"
ENGINES = ("svi",)


def make_problem(data):
    """A problem."""


def tiny():
    """A problem."""
'''


@pytest.mark.parametrize(
    "spec",
    [
        {"method": "planted_method.model", "data": {"name": "sst"}},
        {"method": "bayesian_svd", "data": {"name": "planted_loader.model:make_problem"}},
    ],
    ids=["method", "loader"],
)
def test_code_that_a_result_file_names_is_not_imported(
    spec: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (name,) = re.findall(r"planted_\w+", json.dumps(spec))
    package = tmp_path / name
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "model.py").write_text(PLANTED, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    draws = xr.Dataset({"z": (("chain", "draw"), np.zeros((1, 4)))})
    tree = xr.DataTree.from_dict({"/posterior": draws})
    tree.attrs = {"method": str(spec["method"]), "spec": json.dumps(spec), "options": "{}"}
    Result(tree).save(tmp_path / "run")
    loaded = Result.load(tmp_path / "run")
    with pytest.raises(SpecError, match=rf"names the code '{name}\.model.*--allow-code.*import {name}\.model first"):
        spec_of_result(tmp_path / "run")
    shown = tmp_path / "shown"
    if name == "planted_method":
        write_report(loaded, shown)
        with pytest.raises(ResultError, match=r"names the code 'planted_method\.model'"):
            loaded.rebuild()
    assert not (package / "ran").exists()
    if name == "planted_method":
        allow = ["report", str(tmp_path / "run"), "--out", str(shown), "--allow-code"]
        monkeypatch.setattr(sys, "argv", ["probmodels", *allow])
        with pytest.raises(SystemExit):
            cli.main()
        assert (package / "ran").exists()
    get_method(f"{name}.model")  # the same code is run where the caller asks for it, so that the trace could be seen
    assert (package / "ran").exists()
    refuse_code(f"{name}.model")
