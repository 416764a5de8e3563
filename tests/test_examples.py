"""Examples and the code in the documentation run as they stand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest

from probmodels import METHODS
from probmodels.cli import runs
from probmodels.cli.sst import sst
from probmodels.spec import load_spec

ROOT = Path(__file__).parents[1]
SPECS = sorted((ROOT / "examples").glob("*.toml"))
OTHER_VERDICTS = {  # of examples that do not pass, and should not
    "bayesian_svd": "the model does not fit the data; the draws themselves passed",  # neighbouring cells are correlated
}
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
EMBEDDED = (
    "bayesian_svd",
    "explore_field",
    "pacific_decadal_oscillation",
    "ranks_and_noise",
)  # scripts that use the default field


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_specs_are_valid_and_name_themselves(path: Path) -> None:
    spec = load_spec(path)
    assert spec["method"] == path.stem
    assert spec["output"]["path"] == f"runs/{path.stem}"


@pytest.mark.parametrize("path", SPECS + SCRIPTS, ids=lambda path: path.name)
def test_every_example_says_how_long_it_takes_and_is_listed(path: Path) -> None:
    head = path.read_text(encoding="utf-8")[:1500]
    assert re.search(r"\bTakes about (\d+ seconds|1 minute|[23] minutes)\b", head)
    rows = [line for line in (ROOT / "examples" / "README.md").read_text(encoding="utf-8").splitlines() if "|" in line]
    assert sum(f"[{path.name}]({path.name})" in row for row in rows) == 1


def test_every_method_has_an_example() -> None:
    assert {path.stem for path in SPECS} == set(METHODS)


def test_the_spec_of_the_main_job_is_what_the_command_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict = {}
    monkeypatch.setattr(runs, "execute", lambda spec, **options: found.update(spec))
    sst()
    written = tomllib.loads((ROOT / "examples" / "bayesian_svd.toml").read_text(encoding="utf-8"))
    assert {key: found[key] for key in ("method", "data", "model", "inference")} == {
        key: written[key] for key in ("method", "data", "model", "inference")
    }


def run_example(path: Path, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """The command of the head of a spec, on one thread."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    command = [sys.executable, "-m", "probmodels.cli", "run", str(path), "--out", str(folder / "run"), "--quiet"]
    return subprocess.run(
        [*command, *options], cwd=folder, env={**os.environ, **threads}, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_specs_run_and_their_verdict_is_the_one_that_they_announce(path: Path, tmp_path: Path) -> None:
    if path.stem == "bayesian_svd" and find_spec("eofs") is None:
        pytest.skip("the default field comes with the package eofs (extra 'sst')")
    run = run_example(path, tmp_path, "--strict")
    if path.stem in OTHER_VERDICTS:
        assert run.returncode == 1, run.stderr
        assert OTHER_VERDICTS[path.stem] in run.stdout
    else:
        assert run.returncode == 0, f"{run.stdout}\n{run.stderr}"
        assert "Diagnostics passed" in run.stdout


@pytest.mark.slow
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_scripts_run_and_their_assertions_hold(path: Path, tmp_path: Path) -> None:
    if path.stem in EMBEDDED and find_spec("eofs") is None:
        pytest.skip("the default field comes with the package eofs (extra 'sst')")
    small = {"PROBMODELS_EXAMPLE_DRAWS": "40", "MPLBACKEND": "agg", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-W", "error", "-W", "ignore:\\s*ArviZ is undergoing:FutureWarning", str(path)],
        cwd=tmp_path,
        env={**os.environ, **small},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert not list(tmp_path.iterdir()), "an example writes nothing that it does not announce"
