"""Walks of chains from noise to data, and their pictures."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from PIL import Image

from probmodels import run_mcmc, run_spec
from probmodels.errors import DataError, ProblemError, ResultError
from probmodels.guides.schedules import LinearSchedule
from probmodels.inference.result import Result
from probmodels.score_composition import make_problem, tiny, walk, write_outputs
from probmodels.score_composition.figures import animate, density, samples
from probmodels.scores.closed import GaussianMixture
from probmodels.scores.fields import FunctionField, Product, ScoreOnly

SCHEDULE = LinearSchedule(-6.0, 6.0)
MIXTURE = GaussianMixture(SCHEDULE, torch.tensor([[0.6, 0.2], [-0.6, -0.2]]), torch.tensor([[0.2, 0.1]]))
LINE = FunctionField(SCHEDULE, (1,), lambda z, t: -z)


@pytest.fixture(scope="module")
def walked() -> xr.DataArray:
    return walk(make_problem(MIXTURE, num_levels=15, width=0.3), num_chains=1500, per_level=4, seed=1)


# -- walks ------------------------------------------------------------------------------------------------------------


def test_walks_start_as_noise_and_end_at_the_target(walked: xr.DataArray) -> None:
    assert walked.dims == ("level", "chain", "feature")
    assert walked.shape == (16, 1500, 2)
    np.testing.assert_allclose(walked["time"], [1.0, *np.linspace(1.0, 0.0, 15)])
    # Chains are independent, so that errors of means and second moments are those of so many draws.
    noise = walked[0].values.astype(float)
    assert (np.abs(noise.mean(0)) < 4.5 / math.sqrt(1500)).all()
    assert (np.abs((noise**2).mean(0) - 1) < 4.5 * math.sqrt(2 / 1500)).all()
    x = walked[-1].values.astype(float)
    alpha, sigma = (float(value) for value in MIXTURE.scales(0.0, MIXTURE.means))
    means = alpha * MIXTURE.means.numpy()
    variances = alpha**2 * MIXTURE.covariances[0].numpy() + sigma**2 * np.eye(2)
    second = variances + means.T @ means / 2  # about zero, the mean of the two
    squares = x[:, :, None] * x[:, None, :]
    assert (np.abs(x.mean(0)) < 4.5 * x.std(0) / math.sqrt(1500)).all()
    assert (np.abs(squares.mean(0) - second) < 4.5 * squares.std(0) / math.sqrt(1500)).all()
    # A control: errors of this size tell the target from noise.
    assert (np.abs((noise**2).mean(0) - np.diag(second)) > 4.5 * squares.std(0).diagonal() / math.sqrt(1500)).all()


def test_walks_have_seeds_and_leave_that_of_the_caller() -> None:
    problem = tiny()
    state = torch.get_rng_state()
    one, same, other = (walk(problem, num_chains=5, seed=seed, sampler="mala") for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    xr.testing.assert_identical(one, same)
    assert not np.array_equal(one, other)


def test_walks_keep_the_axes_of_images() -> None:
    field = FunctionField(SCHEDULE, (2, 3), lambda z, t: -z)
    assert walk(make_problem(field, num_levels=3), num_chains=4).dims == ("level", "chain", "row", "column")


def test_walks_refuse_what_they_cannot_do() -> None:
    with pytest.raises(ProblemError, match="per_level=0"):
        walk(tiny(), per_level=0)
    with pytest.raises(ProblemError, match="sampler='nuts'"):
        walk(tiny(), sampler="nuts")


# -- pictures ---------------------------------------------------------------------------------------------------------


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(float)


def test_animations_have_a_frame_for_every_level_that_is_shown(walked: xr.DataArray, tmp_path: Path) -> None:
    few = walked[:, :50]
    for name, options, frames in (("all", {}, 16), ("some", {"num_frames": 6, "field": MIXTURE}, 6)):
        path = animate(few, tmp_path / "new" / f"{name}.gif", dpi=50, **options)
        with Image.open(path) as image:
            assert image.format == "GIF"
            assert image.n_frames == frames
            first = np.asarray(image.convert("RGB")).astype(float)
            durations = []
            for frame in range(frames):
                image.seek(frame)
                durations.append(image.info["duration"])
            last = np.asarray(image.convert("RGB")).astype(float)
        assert np.abs(first - last).max() > 50
        assert durations[-1] >= 1000 > durations[0]
        assert path.stat().st_size < 500_000


@pytest.mark.parametrize("field", [MIXTURE, ScoreOnly(MIXTURE)], ids=["density", "arrows"])
def test_fields_are_drawn_below_the_chains(field: Any, walked: xr.DataArray) -> None:
    figure = density(field, walked[:, :100], num_panels=3)
    axes = figure.axes
    assert len(axes) == 3
    assert [ax.get_title() for ax in axes] == ["time 1.00", "time 0.36", "time 0.00"]
    for ax in axes:
        kinds = {type(part).__name__ for part in ax.collections}
        assert kinds == ({"QuadContourSet"} if field.has_density else {"Quiver"})
        points = ax.lines[0].get_xydata()
        (low, high), (bottom, top) = ax.get_xlim(), ax.get_ylim()
        inside = (points > [low, bottom]).all(1) & (points < [high, top]).all(1)
        assert inside.mean() > 0.9


def test_lost_chains_do_not_stop_a_picture(walked: xr.DataArray, tmp_path: Path) -> None:
    lost = walked[:, :20].copy()
    lost[-1, :10] = np.nan
    lost[-2] = np.nan
    density(MIXTURE, lost).savefig(tmp_path / "density.png")
    assert pixels(tmp_path / "density.png").std() > 0


def test_pictures_of_other_things_are_refused(walked: xr.DataArray, tmp_path: Path) -> None:
    line = walk(make_problem(LINE, num_levels=3), num_chains=4)
    for call in (lambda: density(LINE, line), lambda: animate(line, tmp_path / "a.gif")):
        with pytest.raises(DataError, match="give points in the plane"):
            call()
    with pytest.raises(DataError, match=r"written as \.gif"):
        animate(walked, tmp_path / "a.mp4")
    with pytest.raises(DataError, match="num_panels=1"):
        density(MIXTURE, walked, num_panels=1)
    assert samples(xr.DataArray(np.zeros((2, 3, 4)), dims=("chain", "draw", "feature"))) is None


# -- outputs ----------------------------------------------------------------------------------------------------------

RUN = {"num_samples": 4, "warmup_steps": 12, "num_chains": 30, "progress": False}
SPEC = {
    "method": "score_composition",
    "data": {
        "name": "fields",
        "target": "both",
        "gamma": [-6.0, 6.0],
        "fields": {
            "pair": {"kind": "gaussian_mixture", "means": [[0.5, 0.0], [-0.5, 0.0]], "covariances": 0.04},
            "box": {"kind": "uniform_box", "low": [-1.0, -0.2], "high": [1.0, 0.2]},
            "both": {"kind": "product", "fields": ["pair", "box"]},
        },
    },
    "model": {"num_levels": 6},
    "inference": RUN | {"kernel_options": {"sampler": "uhmc", "step_size": 0.3}},
}


def test_runs_of_a_spec_write_all_figures(tmp_path: Path) -> None:
    result = run_spec(SPEC | {"output": {"path": str(tmp_path / "run")}})
    for name, found in (("now", result), ("later", Result.load(tmp_path / "run"))):
        written = write_outputs(found, tmp_path / name)
        figures = tmp_path / name / "figures"
        assert {path.name for path in figures.iterdir()} == {"levels.png", "samples.png", "density.png", "walk.gif"}
        for path in figures.iterdir():
            assert pixels(path).std() > 0
        with Image.open(figures / "walk.gif") as image:
            assert image.n_frames == 7
        assert ", uncorrected" in written.table
        assert written.report.read_text(encoding="utf-8").startswith(written.table)


def test_a_spec_whose_fields_are_gone_says_so_after_the_rest(tmp_path: Path) -> None:
    result = run_spec(SPEC)
    kept = json.loads(result.tree["constant_data"]["fields"].item())
    kept["fields"]["box"] = {"kind": "diffusion", "path": "gone"}
    result.tree["constant_data"] = xr.DataTree(xr.Dataset({"fields": ((), json.dumps(kept))}))
    with pytest.raises(ResultError, match=r"\[data.fields.box\] no result.nc in gone"):
        write_outputs(result, tmp_path)
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"levels.png", "samples.png"}


def test_runs_by_hand_are_pictured_with_their_problem(tmp_path: Path) -> None:
    problem = make_problem(Product([ScoreOnly(MIXTURE)]), num_levels=6, width=0.3)
    result = run_mcmc(problem, **RUN)
    write_outputs(result, tmp_path / "without")
    assert not (tmp_path / "without" / "figures" / "walk.gif").exists()
    assert ", uncorrected" not in write_outputs(result, tmp_path / "with", problem=problem).table
    assert (tmp_path / "with" / "figures" / "walk.gif").exists()
