"""The page and the text of a result of any model, by any engine, of today or of an earlier release."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from inference_models import auto_guide, data, mean_model, mean_problem, normal_model
from test_report import parsed

from probmodels import fit_svi, run_mcmc, write_report
from probmodels.errors import ResultError
from probmodels.inference import Problem, Result
from probmodels.report import draw_result, show

OLD = Path(__file__).parent / "data" / "old_result"


@pytest.fixture(scope="module")
def drawn() -> Result:
    problem = mean_problem(name="mean <of> six")
    options = {"num_samples": 200, "num_chains": 2, "chain_method": "sequential", "progress": False}
    return run_mcmc(problem, warmup_steps=5, **options).add("posterior_predictive", problem)


@pytest.fixture(scope="module")
def fitted() -> Result:
    problem = mean_problem(guide=auto_guide(mean_model))
    return fit_svi(problem, num_steps=100, num_samples=100, progress=False)


def test_a_result_of_any_model_has_a_page(drawn: Result, tmp_path: Path) -> None:
    written = write_report(drawn, tmp_path / "new", dpi=40)
    assert written.report == tmp_path / "new" / "report.html"
    files = {str(path.relative_to(written.folder)) for path in written.folder.rglob("*") if path.is_file()}
    names = ("forest", "trace", "rank", "predictive_check")
    assert files == {"report.html", "summary.txt", "summary.csv", *(f"figures/{name}.png" for name in names)}
    text, structure = parsed(written.report)
    assert text.index('class="verdict') < text.index('id="posterior"') < text.index("<figure")
    assert {f"figure-{name}" for name in names} <= structure.ids
    assert len(structure.sources) == 4
    assert not structure.tags & {"script", "link", "iframe"}
    assert not re.search(r"(src|href)=\"(https?:)?//", text)
    assert {link.removeprefix("#") for link in structure.links} <= structure.ids
    assert "mean &lt;of&gt; six" in text
    assert "<of>" not in text
    for phrase in ("new[a]", "… and 2 more of new", "2 chains of 200 draws", "version of torch", '"engine": "mcmc"'):
        assert phrase in unescape(text), phrase
    table = pd.read_csv(written.folder / "summary.csv", index_col="entry")
    assert table.loc["mu", "mean"] == pytest.approx(float(drawn["mu"].mean()), rel=1e-4)
    assert "mu" in written.table


def test_the_verdict_of_a_page_is_that_of_the_diagnostics(drawn: Result, fitted: Result, tmp_path: Path) -> None:
    stuck = Result(drawn.tree.copy())
    stuck.tree["posterior"] = drawn.posterior + xr.DataArray([0.0, 9.0], dims="chain")
    for name, result, good in (("stuck", stuck, False), ("fitted", fitted, True)):
        written = write_report(result, tmp_path / name, dpi=40)
        text, _ = parsed(written.report)
        assert written.diagnosis.ok == good
        assert ('<div class="verdict">' in text) == good
        assert ("do not trust these draws yet" in text) == (not good)


def test_a_fit_shows_its_loss_and_one_chain_no_ranks(fitted: Result) -> None:
    assert set(draw_result(fitted)) == {"loss", "forest", "trace"}
    assert draw_result(Result(xr.DataTree())) == {}


def test_large_and_odd_posteriors_have_a_page(tmp_path: Path) -> None:
    problem = Problem("rows", normal_model, args=(data(300).reshape(300, 1),), guide=auto_guide(normal_model))
    result = fit_svi(problem, num_steps=20, num_samples=20, progress=False)
    text, _ = parsed(write_report(result, tmp_path, dpi=40).report)
    assert "… and 296 more of theta" in text
    result.tree.attrs = {"spec": "{", "versions": "none", "engine": "svi"}
    parsed(write_report(result, tmp_path, dpi=40).report)


def test_a_method_adds_its_own_tables_and_figures(tmp_path: Path) -> None:
    written = write_report(Result.load(OLD), tmp_path, dpi=40)
    text, structure = parsed(written.report)
    assert written.file == "report.html"
    assert written.figures
    assert {f"figure-{name}" for name in (*written.figures, "forest", "trace", "loss")} <= structure.ids
    assert "Results of the method" in text
    assert written.table.splitlines()[0] in unescape(text)
    assert not (tmp_path / "summary.csv").exists()  # the method's own files are enough


def test_a_folder_that_cannot_be_written_is_said(drawn: Result, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResultError, match="cannot write"):
        write_report(drawn, tmp_path / "file")
    with pytest.raises(ResultError, match="dpi=0"):
        write_report(drawn, tmp_path, dpi=0)


def test_a_result_is_shown_as_text(drawn: Result) -> None:
    shown = show(drawn)
    assert shown.startswith("Result of mean <of> six by mcmc, 2 × 200 draws")
    assert re.search(r"^seed +0$", shown, flags=re.MULTILINE)
    assert re.search(r"^posterior +mu, twice, new \(chain 2, draw 200, obs 6\)$", shown, flags=re.MULTILINE)
    assert re.search(r"^mu +-?\d", shown, flags=re.MULTILINE)
    assert "… and 2 more of new" in shown
    assert "noisy_edges" in show(Result.load(OLD))
    empty = Result(xr.DataTree.from_dict({"/posterior": xr.Dataset()}))
    empty.tree.attrs["options"] = json.dumps({"rank": np.pi})
    assert "rank" in show(empty)
