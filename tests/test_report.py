"""The HTML report: self-contained, complete, and safe against what attributes may hold."""

from __future__ import annotations

import base64
import json
import re
from html import unescape
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import xarray as xr
from synthetic_modes import synthetic_result, toy_field

from probmodels.bayesian_svd import figures as mode_figures
from probmodels.bayesian_svd.report import write_report
from probmodels.bayesian_svd.summary import compare_eof, summarise_modes
from probmodels.inference import Finding, Report


@pytest.fixture(scope="module")
def parts():
    tree = synthetic_result(toy_field())
    constant = tree["constant_data"].to_dataset()
    constant.attrs["mends"] = json.dumps(["Two duplicated months were dropped.", "Units K became degC."])
    constant["data"].attrs |= {
        "region": "north <b>Pacific</b>",
        "source_files": json.dumps([{"name": "sst.nc", "sha256": "abc123"}]),
    }
    tree["constant_data"] = xr.DataTree(constant)
    modes = summarise_modes(tree)
    return tree, modes, compare_eof(tree, modes)


class Structure(HTMLParser):
    """Open and close tags in order, identifiers and references."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.sources: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        found = dict(attrs)
        if "id" in found:
            assert found["id"] not in self.ids
            self.ids.add(found["id"])
        if tag == "a":
            self.links.append(found["href"])
        if "src" in found:
            self.sources.append(found["src"])
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag


def parsed(path) -> tuple[str, Structure]:
    text = path.read_text(encoding="utf-8")
    structure = Structure()
    structure.feed(text)
    assert structure.stack == [], "every tag is closed"
    return text, structure


def test_report_is_one_self_contained_file(parts, tmp_path):
    tree, modes, comparison = parts
    mode_figures.scree(modes, comparison).savefig(tmp_path / "scree.png", dpi=40)
    figures = {
        "mode_maps": mode_figures.mode_maps(modes),
        "scree": tmp_path / "scree.png",
        "own_idea": mode_figures.rhat_map(modes),
    }
    path = write_report(
        tree, modes, figures, tmp_path / "deep", diagnosis="All is well.", comparison=comparison, dpi=40
    )
    assert path == tmp_path / "deep" / "report.html"
    assert [x.name for x in path.parent.iterdir()] == ["report.html"]
    text, structure = parsed(path)
    assert len(structure.sources) == 3
    for source in structure.sources:
        head, code = source.split(",", 1)
        assert head == "data:image/png;base64"
        assert base64.b64decode(code).startswith(b"\x89PNG")
    assert {link.removeprefix("#") for link in structure.links} <= structure.ids
    assert not structure.tags & {"script", "link", "iframe"}
    assert not re.search(r"(src|href)=\"(https?:)?//", text)
    assert {"figure-mode_maps", "figure-scree", "figure-own_idea", "verdict", "more"} <= structure.ids


def test_report_says_what_matters(parts, tmp_path):
    tree, modes, comparison = parts
    text, _ = parsed(
        write_report(tree, modes, {}, tmp_path, diagnosis="All is well.", comparison=comparison, rerun="make it so")
    )
    assert text.index("All is well.") < text.index(">What was done</h2>"), "the verdict comes first"
    for phrase in (
        "Two duplicated months were dropped.",
        "Units K became degC.",
        "sst.nc (sha256 abc123)",
        "North's rule of thumb",
        "neither should be given a physical meaning",
        "Mode 1 has the pattern of EOF 1",
        "2 chains of 50 draws",
        "make it so",
        '"rank": 3',
        "All intervals are conditional on the number of modes",
    ):
        assert phrase in unescape(text), phrase
    assert "north &lt;b&gt;Pacific" in text
    assert "<b>" not in text


@pytest.mark.parametrize(("ok", "expected"), [(True, '<div class="verdict">'), (False, '<div class="verdict bad">')])
def test_verdict_shows_failure(parts, tmp_path, ok, expected):
    class Diagnosis(SimpleNamespace):
        def __str__(self) -> str:
            return "R-hat of <d> is 1.2"

    tree, modes, _ = parts
    text, _ = parsed(write_report(tree, modes, {}, tmp_path, diagnosis=Diagnosis(ok=ok)))
    assert f"{expected}R-hat of &lt;d&gt; is 1.2</div>" in text
    assert "No comparison was made." in text


def test_undiagnosed_draws_are_not_trusted(parts, tmp_path):
    tree, modes, _ = parts
    text, _ = parsed(write_report(tree, modes, {}, tmp_path))
    assert "not diagnosed" in text


def test_attributes_that_are_no_json_do_not_break_it(parts, tmp_path):
    tree, modes, _ = parts
    odd = tree.copy()
    odd.attrs = {"spec": "{", "versions": "none", "engine": "svi"}
    constant = odd["constant_data"].to_dataset()
    constant.attrs["mends"] = "one <mend>"
    constant["data"].attrs["source_files"] = "a.nc"
    odd["constant_data"] = xr.DataTree(constant)
    text, _ = parsed(write_report(odd, modes.drop_vars("mode_r_hat"), {}, tmp_path))
    assert "one &lt;mend&gt;" in text
    assert "a.nc" in text
    assert "variational inference" in text
    assert "There is one chain" in text


def test_findings_come_first_and_the_table_with_the_sampler(parts, tmp_path):
    pd = pytest.importorskip("pandas")
    tree, modes, _ = parts
    findings = [Finding(False, "no trajectory diverged")]
    findings += [Finding(True, f"d: entry {i} is bad", "run longer") for i in range(7)]
    table = pd.DataFrame({"entries": [3], "r_hat_max": [1.2], "r_hat_share": [0.5]}, index=["d"])
    diagnosis = Report(tuple(findings), table)
    text, _ = parsed(write_report(tree, modes, {}, tmp_path, diagnosis=diagnosis))
    assert "do not trust these draws yet.\n✗ d: entry 0 is bad → run longer\n✗ d: entry 1" in text
    assert "… and 3 more" in text
    sampler = text[text.index(">Did the sampler work?</h2>") :]
    assert "<li>✓ no trajectory diverged</li>" in sampler
    assert "<td>d</td><td>3</td><td>1.200</td><td>50.0 %</td>" in sampler


def test_misfit_is_said_at_the_top(parts, tmp_path):
    tree, modes, _ = parts
    modes = modes.copy()
    for p, lag, said in ((0.5, 0.0, False), (0.01, 0.0, True), (0.5, 0.6, True)):
        modes["predictive_p_value"] = modes["predictive_p_value"] * 0 + p
        modes["residual_autocorrelation"] = modes["residual_autocorrelation"] * 0 + lag
        text, _ = parsed(write_report(tree, modes, {}, tmp_path))
        assert ("take intervals as lower bounds" in text) == said
