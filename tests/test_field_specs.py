"""Fields written down: the same as the calls, and what is wrong is said with its table."""

from __future__ import annotations

import copy
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

from probmodels import fit_svi, run_spec
from probmodels.diffusion import make_problem as make_diffusion
from probmodels.diffusion.fitted import make_field
from probmodels.errors import SpecError
from probmodels.guides.schedules import CosineSchedule, LinearSchedule
from probmodels.score_composition.specs import KINDS, load_fields
from probmodels.scores.closed import GaussianMixture, UniformBox
from probmodels.scores.fields import Mixture, Product, guided, linear_observation, negated, tempered
from probmodels.spec import build_problem, load_spec, spec_of_result

ENDS = (-6.0, 4.0)
SCHEDULE = LinearSchedule(*ENDS)
MEANS = [[0.5, 0.0], [-0.5, 0.0]]
RING = GaussianMixture(SCHEDULE, torch.tensor(MEANS), 0.04)
WIDE = GaussianMixture(SCHEDULE, torch.tensor(MEANS[:1]), torch.tensor([[[0.5, 0.2], [0.2, 0.3]]]), [2.0])
BOX = UniformBox(SCHEDULE, [-0.2, -1.0], [0.2, 1.0])
POINTS = torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

TABLES: dict[str, dict[str, Any]] = {
    "ring": {"kind": "gaussian_mixture", "means": MEANS, "covariances": 0.04},
    "wide": {
        "kind": "gaussian_mixture",
        "means": MEANS[:1],
        "covariances": [[[0.5, 0.2], [0.2, 0.3]]],
        "weights": [2],
    },
    "box": {"kind": "uniform_box", "low": [-0.2, -1], "high": [0.2, 1]},
}
COMBINED: dict[str, tuple[dict[str, Any], Any]] = {
    "product": ({"fields": ["ring", "box"], "weights": [1, 2.0]}, Product([RING, BOX], [1.0, 2.0])),
    "mixture": ({"fields": ["ring", "wide"], "weights": [0.3, 0.7]}, Mixture([RING, WIDE], [0.3, 0.7])),
    "negated": ({"field": "ring", "other": "wide", "strength": 0.5}, negated(RING, WIDE, 0.5)),
    "tempered": ({"field": "ring", "power": 2}, tempered(RING, 2.0)),
    "guided": ({"conditional": "ring", "unconditional": "wide", "weight": 3.0}, guided(RING, WIDE, 3.0)),
    "linear_observation": (
        {"field": "ring", "matrix": [[1, 1]], "observed": [0.3], "sd": 0.1, "bridge": "denoised"},
        linear_observation(RING, torch.tensor([[1.0, 1.0]]), torch.tensor([0.3]), 0.1, bridge="denoised"),
    ),
}


def loaded(table: dict[str, Any] | None = None, **changes: Any) -> Any:
    fields = TABLES | ({} if table is None else {"new": table})
    return load_fields(**{"fields": fields, "target": "new" if table else "ring", "gamma": list(ENDS)} | changes)


# -- the same as the calls --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", COMBINED)
def test_tables_are_the_calls_that_they_write_down(kind: str) -> None:
    table, expected = COMBINED[kind]
    found = loaded({"kind": kind, **table})
    for t in (0.0, 0.4):
        torch.testing.assert_close(found.score(POINTS, t), expected.score(POINTS, t))
        torch.testing.assert_close(found.log_density(POINTS, t), expected.log_density(POINTS, t))


def test_every_kind_is_tested() -> None:
    assert {*COMBINED, *(table["kind"] for table in TABLES.values()), "diffusion"} == set(KINDS)


def test_fields_combine_in_depth_and_are_built_once() -> None:
    tables = TABLES | {
        "half": {"kind": "tempered", "field": "ring", "power": 0.5},
        "top": {"kind": "product", "fields": ["half", "ring"]},
    }
    found = load_fields(tables, "top", gamma=ENDS)
    torch.testing.assert_close(found.score(POINTS, 0.3), 1.5 * RING.score(POINTS, 0.3))
    assert found.fields[0].fields[0] is found.fields[1]


def test_schedules_by_name() -> None:
    cosine = loaded(schedule="cosine").schedule
    assert isinstance(cosine, CosineSchedule)
    assert (cosine.start, cosine.end) == ENDS
    assert loaded(gamma=None).schedule.start == LinearSchedule().start


def test_arrays_come_from_files(tmp_path: Path) -> None:
    np.save(tmp_path / "means.npy", np.array(MEANS, dtype=np.float32))
    found = loaded({"kind": "gaussian_mixture", "means": str(tmp_path / "means.npy"), "covariances": 0.04})
    torch.testing.assert_close(found.score(POINTS, 0.3), RING.score(POINTS, 0.3))


def test_fitted_models_are_combined_with_closed_forms(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    data = xr.DataArray(rng.normal(size=(60, 2)), dims=("data", "axis"))
    problem = make_diffusion(data, hidden=8, blocks=1, schedule="learned", gamma=ENDS)
    result = fit_svi(problem, num_steps=20, lr=0.01, num_samples=2, progress=False, compile="eager")
    result.save(tmp_path)
    tables = TABLES | {
        "fit": {"kind": "diffusion", "path": str(tmp_path)},
        "both": {"kind": "product", "fields": ["fit", "box"]},
    }
    points = POINTS.float()
    fit, box = make_field(result), UniformBox(make_field(result).schedule, [-0.2, -1.0], [0.2, 1.0])
    found = load_fields(tables, "both", schedule="fit")
    torch.testing.assert_close(found.score(points, 0.4), fit.score(points, 0.4) + box.score(points, 0.4))
    with pytest.raises(SpecError, match=r"\[data.fields.both\] field 1 has another noise schedule"):
        load_fields(tables, "both", gamma=(-8.0, 8.0))
    with pytest.raises(SpecError, match="leave it out with schedule='fit'"):
        load_fields(tables, "both", schedule="fit", gamma=ENDS)
    with pytest.raises(SpecError, match=r"gamma=.* is not used with target='fit', of no closed form"):
        load_fields(tables, "fit", gamma=ENDS)
    with pytest.raises(SpecError, match=r"\[data.fields.fit\] .*the model knows no labels"):
        load_fields(tables | {"fit": {"kind": "diffusion", "path": str(tmp_path), "label": 3}}, "fit")


# -- as a spec --------------------------------------------------------------------------------------------------------

SPEC = """
method = "score_composition"
[data]
name = "fields"
target = "both"
gamma = [-6.0, 4.0]
[data.fields.ring]
kind = "gaussian_mixture"
means = [[0.5, 0.0], [-0.5, 0.0]]
covariances = 0.04
[data.fields.box]
kind = "uniform_box"
low = [-0.2, -1.0]
high = [0.2, 1.0]
[data.fields.both]
kind = "product"
fields = ["ring", "box"]
[model]
num_levels = 5
width = 0.1
[inference]
num_chains = 20
warmup_steps = 10
num_samples = 4
progress = false
kernel_options = { sampler = "mala" }
"""


def test_a_spec_runs_and_its_result_makes_the_problem_again(tmp_path: Path) -> None:
    path = tmp_path / "spec.toml"
    path.write_text(SPEC + f'[output]\npath = "{tmp_path / "run"}"\n', encoding="utf-8")
    result = run_spec(path)
    assert result.posterior["x"].shape == (20, 4, 2)
    assert result.tree["sample_stats"].attrs["proposal"] == "langevin"
    again: Any = build_problem(spec_of_result(tmp_path / "run" / "result.nc"))
    torch.testing.assert_close(again.model.field.score(POINTS, 0.3), Product([RING, BOX]).score(POINTS, 0.3))
    assert len(again.model.times) == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "field"}, r"\[data\] unknown name 'field'; did you mean 'fields'"),
        ({"name": "sst"}, r"\[data\] unknown name 'sst'; known: fields"),
        ({"targets": "both"}, r"\[data\] unknown key 'targets' of data set 'fields'; did you mean 'target'"),
    ],
)
def test_wrong_keys_of_the_table_are_refused(change: dict[str, Any], message: str) -> None:
    spec = tomllib.loads(SPEC)
    spec["data"] |= change
    with pytest.raises(SpecError, match=message):
        load_spec(spec)


def test_keys_that_are_missing_are_named() -> None:
    spec = tomllib.loads(SPEC)
    del spec["data"]["target"]
    with pytest.raises(SpecError, match=r"\[data\] needs target; add target = "):
        build_problem(load_spec(spec))


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fields": {}}, r"\[data\] fields must be tables"),
        ({"fields": ["ring"]}, r"fields=\['ring'\]; give a table"),
        ({"fields": {"ring": "normal"}}, r"\[data.fields.ring\] must be a table with a kind, not 'normal'"),
        ({"target": "rong"}, r"\[data\] target: there is no field 'rong'; did you mean 'ring'"),
        ({"target": 3}, "target=3; give a text"),
        ({"schedule": "learned"}, r"\[data\] schedule='learned'; choose one of \('linear', 'cosine'\)"),
        ({"schedule": "box"}, r"\[data\] schedule='box'; .*or name a field of kind 'diffusion'"),
        ({"schedule": ["linear"]}, r"schedule=\['linear'\]; give a text"),
        ({"gamma": [4.0, -6.0]}, r"\[data\] gamma from 4.0 to -6.0; .*noise must increase"),
        ({"gamma": [1.0]}, r"gamma=\[1.0\]; give a list of 2"),
        ({"gamma": "wide"}, "gamma='wide'; give a list of 2"),
    ],
)
def test_wrong_options_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        loaded(**changes)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({}, r"\[data.fields.new\] has no kind; add kind = one of diffusion, gaussian_mixture"),
        ({"kind": "products"}, r"\[data.fields.new\] unknown kind 'products'; did you mean 'product'"),
        ({"kind": 3}, r"\[data.fields.new\] unknown kind 3; known: diffusion"),
        ({"kind": "tempered", "field": "ring", "powers": 2}, r"unknown key 'powers'; did you mean 'power'"),
        ({"kind": "tempered", "field": "ring"}, r"\[data.fields.new\] has no 'power', which kind 'tempered' needs"),
        ({"kind": "tempered", "field": "rings", "power": 2}, r"new\] field: there is no field 'rings'; did you mean"),
        ({"kind": "tempered", "field": "ring", "power": "2"}, r"\[data.fields.new\] power='2'; give a number"),
        ({"kind": "tempered", "field": "ring", "power": True}, r"power=True; give a number"),
        ({"kind": "tempered", "field": "ring", "power": float("nan")}, r"power=nan; give a number"),
        ({"kind": "tempered", "field": "ring", "power": 10**400}, r"power=10+; give a number"),
        ({"kind": "uniform_box", "low": [0.0], "high": [float("inf")]}, r"high=\[inf\]; give numbers"),
        ({"kind": "tempered", "field": "ring", "power": 0}, r"\[data.fields.new\] weight 0 is 0.0"),
        ({"kind": "tempered", "field": "new", "power": 2}, r"new\] field: 'new' is made of itself: new -> new"),
        ({"kind": "product", "fields": "ring"}, r"\[data.fields.new\] fields='ring'; give a list of names"),
        ({"kind": "product", "fields": []}, r"\[data.fields.new\] there is no field to compose"),
        ({"kind": "product", "fields": ["ring", "bar"]}, r"there is no field 'bar'"),
        ({"kind": "product", "fields": ["ring"], "weights": [1, 2]}, r"\[data.fields.new\] 2 weights for 1 fields"),
        ({"kind": "mixture", "fields": ["ring"], "weights": [-1.0]}, r"\[data.fields.new\] weights=.*must be positive"),
        ({"kind": "uniform_box", "low": [0.0], "high": [-1.0]}, r"\[data.fields.new\] low and high"),
        ({"kind": "uniform_box", "low": ["a"], "high": [1.0]}, r"new\] low=\['a'\]; give numbers, in lists"),
        ({"kind": "uniform_box", "low": "low.txt", "high": [1.0]}, r"low='low.txt'; give numbers, or the path of a"),
        ({"kind": "uniform_box", "low": "no.npy", "high": [1.0]}, r"new\] low: cannot read 'no.npy'"),
        (
            {"kind": "gaussian_mixture", "means": [[0.0], [1.0, 2.0]], "covariances": 1.0},
            r"new\] means=\[\[0.0\], \[1.0, 2.0\]\]; give numbers, in lists of equal lengths",
        ),
        (
            {"kind": "gaussian_mixture", "means": [[0.0, 0.0]], "covariances": [1.0, 1.0, 1.0]},
            r"\[data.fields.new\] covariances of shape \(3,\) for 1 means of size 2",
        ),
        ({"kind": "gaussian_mixture", "means": [[0.0]], "covariances": -1.0}, r"new\] covariances have an eigenvalue"),
        (
            {"kind": "linear_observation", "field": "ring", "matrix": [[1]], "observed": [0.0], "sd": 1},
            r"\[data.fields.new\] matrix \(1, 1\) and observed \(1,\) for data of 2 numbers",
        ),
        ({"kind": "diffusion", "path": 3}, r"\[data.fields.new\] path=3; give a text"),
        ({"kind": "diffusion", "path": "nowhere"}, r"\[data.fields.new\] no result.nc in nowhere"),
    ],
)
def test_wrong_tables_are_refused(table: dict[str, Any], message: str) -> None:
    kept = copy.deepcopy(table)
    with pytest.raises(SpecError, match=message):
        load_fields(TABLES | {"new": table}, "new", gamma=ENDS)
    assert table == kept


def test_fields_that_are_made_of_each_other_are_refused() -> None:
    loop = {
        "one": {"kind": "tempered", "field": "two", "power": 2},
        "two": {"kind": "tempered", "field": "one", "power": 2},
    }
    with pytest.raises(SpecError, match="'one' is made of itself: one -> two -> one"):
        load_fields(loop, "one")
