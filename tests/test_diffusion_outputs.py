"""What is made of a fitted diffusion model, and the results that it is made from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import xarray as xr

from probmodels import Problem, Result, fit_svi
from probmodels.datasets.images import make_images
from probmodels.diffusion import make_problem
from probmodels.diffusion.fitted import fitted_model, make_field, terms
from probmodels.diffusion.outputs import bound_by_level, generate, reverse_coverage, write_outputs
from probmodels.errors import DataError, ProblemError, ResultError


@pytest.fixture(scope="module")
def normal() -> tuple[Problem, Result]:
    """Points of a normal of unit variance, for which a velocity of zero is right and stays so."""
    points = np.random.default_rng(0).normal(size=(400, 2))
    data = xr.DataArray(points, dims=("row", "feature"), coords={"feature": ["east", "north"]})
    problem = make_problem(data, hidden=8, blocks=1)
    return problem, fit_svi(problem, num_steps=1, lr=1e-9, num_samples=2, progress=False, compile="eager")


@pytest.fixture(scope="module")
def images() -> tuple[Problem, Result]:
    """Images that are all black or all white, by class, fitted for a moment."""
    rng = np.random.default_rng(1)
    label = rng.integers(2, size=240)
    pixels = np.broadcast_to(label[:, None, None], (240, 3, 3)).astype(float)
    split = np.repeat(["train", "test"], [200, 40])
    data = make_images(pixels, np.array([3, 7])[label], split=split, threshold=None)
    problem = make_problem(data, hidden=32, blocks=1, num_values=2, conditional=True, gamma=(-6.0, 4.0))
    options = {"num_steps": 300, "lr": 5e-3, "batch_size": 100, "num_samples": 2, "keep": "average"}
    return problem, fit_svi(problem, progress=False, **options)


def test_the_model_of_a_saved_result_is_the_one_that_was_fitted(images, tmp_path) -> None:
    problem, result = images
    result.save(tmp_path)
    model = fitted_model(Result.load(tmp_path, problem))
    field = make_field(result, 7)
    z = torch.randn(5, 3, 3, generator=torch.Generator().manual_seed(0))
    other = type(field)(model, 1)
    torch.testing.assert_close(other.score(z, 0.4), field.score(z, 0.4))
    assert not model.training


def test_results_that_keep_their_options_beside_the_data_are_read(images) -> None:
    _, result = images
    older = Result(result.tree.copy(), result.guide_state)
    older.tree["observed_data"].attrs["options"] = older.tree.attrs.pop("options")
    z = torch.randn(5, 3, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(make_field(older, 3).score(z, 0.4), make_field(result, 3).score(z, 0.4))


def test_levels_add_up_to_the_bound(normal) -> None:
    problem, result = normal
    levels = bound_by_level(result, num_levels=10, num_draws=20)
    whole = terms(fitted_model(result), problem.args[0], num_draws=40)
    error = np.hypot(float((levels["error"] ** 2).sum() ** 0.5), float(whole["error"].mean()) / 400**0.5)
    assert abs(float(levels["loss"].sum()) + float(whole["steps"].mean())) < 4 * error
    assert (levels["log_snr"].diff("level") < 0).all()


def test_new_data_are_labelled_and_those_of_the_model(normal) -> None:
    drawn = generate(normal[1], 4000, num_steps=100, progress=False)
    assert drawn.dims == ("sample", "feature")
    np.testing.assert_array_equal(drawn["feature"], ["east", "north"])
    # Standard errors of mean and variance of 4000 draws are 0.016 and 0.022.
    np.testing.assert_allclose(drawn.mean("sample"), 0.0, atol=0.064)
    np.testing.assert_allclose(drawn.var("sample"), 1.0, atol=0.1)
    assert generate(normal[1], 5, num_steps=5, progress=False).identical(
        generate(normal[1], 5, num_steps=5, progress=False)
    )


def test_classes_are_drawn_as_asked_for(images) -> None:
    for label, mean in ((3, 0.0), (7, 1.0)):
        drawn = generate(images[1], 50, label=label, num_steps=30, progress=False)
        assert drawn.shape == (50, 3, 3)
        assert set(np.unique(drawn)) <= {0.0, 1.0}
        assert abs(float(drawn.mean()) - mean) < 0.1
    both = generate(images[1], 200, num_steps=30, progress=False).mean(("row", "column"))
    assert 0.3 < float(both.mean()) < 0.7


def test_the_reverse_process_of_the_right_model_covers(normal) -> None:
    found = reverse_coverage(normal[1], num_data=300, num_steps=40, num_draws=99)
    # Of the 100 ranks among 99 draws, 50 and 90 lie inside.
    z = (found["coverage"] - found["prob"]) / found["error"]
    assert abs(z).max() < 4


def test_coverage_shows_a_wrong_model(normal) -> None:
    problem, _ = normal
    wide = xr.DataArray(1.95 * problem.args[0].numpy(), dims=("row", "feature"))
    other = make_problem(wide, hidden=8, blocks=1)
    result = fit_svi(other, num_steps=1, lr=1e-9, num_samples=2, progress=False, compile="eager")
    found = reverse_coverage(result, times=((1.0, 0.2),), num_steps=20)
    assert float(found["coverage"].sel(prob=0.9).max()) < 0.75


def test_outputs_are_written(images, normal, tmp_path) -> None:
    written = write_outputs(images[1], tmp_path / "images")
    assert "held-out data" in written.table
    assert "bits per number" in written.report.read_text(encoding="utf-8")
    names = {path.stem for path in (tmp_path / "images" / "figures").glob("*.png")}
    assert names == {"samples", "denoising", "levels", "loss"}
    with xr.open_dataset(tmp_path / "images" / "samples.nc") as drawn:
        assert list(drawn["class"].values) == ["3", "7"]
    write_outputs(normal[1], tmp_path / "points")
    assert {path.stem for path in (tmp_path / "points" / "figures").glob("*.png")} == {"samples", "levels", "loss"}


def test_what_cannot_be_done_is_said(normal, images) -> None:
    with pytest.raises(ProblemError, match="conditional=True"):
        generate(normal[1], 3, label=1)
    with pytest.raises(ProblemError, match=r"it knows \['3', '7'\]"):
        generate(images[1], 3, label=5)
    for options, message in (({"guidance": 2.0}, "guidance=2.0 is not used"), ({"method": "euler"}, "choose one of")):
        with pytest.raises(ProblemError, match=message):
            generate(normal[1], 3, **options)
    with pytest.raises(DataError, match="a late time and an earlier one"):
        reverse_coverage(normal[1], times=[(0.2, 0.5)])
    other = Result(normal[1].tree.copy(), normal[1].guide_state)
    other.tree.attrs["method"] = "lds"
    with pytest.raises(ResultError, match="not one of a diffusion model"):
        fitted_model(other)


# -- the verdict ------------------------------------------------------------------------------------------------------


def untrained(data: xr.DataArray | xr.Dataset, **options) -> Result:
    problem = make_problem(data, hidden=8, blocks=1, **options)
    return fit_svi(problem, num_steps=1, lr=1e-9, num_samples=2, progress=False, compile="eager")


def test_the_verdict_is_on_bound_and_draws(images) -> None:
    assert "still falling" in str(images[1].diagnose())
    fitted = fit_svi(
        images[0], num_steps=900, lr=5e-3, schedule="warmup_cosine", batch_size=100, num_samples=2, progress=False
    )
    report = fitted.diagnose()
    assert report.ok, str(report)
    assert "40 data held out" in str(report)
    assert "importance weights" not in str(report)


def test_data_that_were_held_out_may_be_given(normal) -> None:
    assert normal[1].diagnose().inference == "not judged"
    rng = np.random.default_rng(1)
    parts = {"observation": (("data", "feature"), rng.normal(size=(400, 2)))}
    held_out = xr.Dataset({**parts, "held_out": (("held_out", "feature"), rng.normal(size=(100, 2)))})
    assert untrained(held_out).diagnose().ok  # for which a velocity of zero is right
    shifted = held_out.assign(held_out=held_out["held_out"] + 4.0)
    assert "learned by heart" in str(untrained(shifted).diagnose())


@pytest.mark.parametrize("kind", ["ring", "images"])
def test_draws_of_an_untrained_model_fail(kind: str, images) -> None:
    if kind == "images":
        problem, _ = images
        result = fit_svi(problem, num_steps=1, lr=1e-9, num_samples=2, progress=False)
    else:  # of mean zero and unit variance, as noise
        rng = np.random.default_rng(0)
        angle = 2 * np.pi * rng.integers(8, size=1000) / 8
        ring = np.sqrt(2) * np.stack([np.cos(angle), np.sin(angle)], 1) + 0.1 * rng.normal(size=(1000, 2))
        result = untrained(xr.DataArray(ring, dims=("row", "feature")))
    report = result.diagnose()
    assert report.inference == "failed"
    assert "principal components" in next(finding.verdict for finding in report.findings if finding.harmful)


def test_a_model_that_learned_by_heart_fails() -> None:
    rng = np.random.default_rng(2)
    pixels = rng.integers(2, size=(70, 4, 4)).astype(float)
    data = make_images(pixels, split=np.repeat(["train", "test"], [20, 50]), threshold=None)
    problem = make_problem(data, hidden=64, blocks=2, num_values=2, gamma=(-6.0, 4.0))
    result = fit_svi(problem, num_steps=700, lr=5e-3, num_samples=2, keep="average", progress=False)
    report = result.diagnose()
    assert report.inference == "failed"
    assert "learned by heart" in str(report)
