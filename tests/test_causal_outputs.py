"""What is written of a fitted causal autoencoder, on small models."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

from probmodels import Problem, Result, fit_svi
from probmodels.causal_vae import fitted_model, make_problem
from probmodels.causal_vae.fitted import thinned
from probmodels.causal_vae.interventions import OutsideSupportWarning, counterfactual
from probmodels.causal_vae.outputs import (
    compare_counterfactuals,
    edge_shares,
    summarise_concepts,
    unit_effects,
    write_outputs,
)
from probmodels.datasets.causal import hide_labels, make_concepts
from probmodels.errors import ProblemError, ResultError
from probmodels.inference.programs.programs import fitted

NAMES = ["a", "b", "c"]
EDGES = [["a", "b"], ["a", "c"], ["b", "c"]]
WEIGHT = np.array([[0.0, 0.8, -0.5], [0.0, 0.0, 1.5], [0.0, 0.0, 0.0]])
OWN = np.array([1.0, 0.6, 0.3])


@pytest.fixture(scope="module")
def linear() -> tuple[Problem, Result, xr.Dataset]:
    """A table of a linear model, and a fit that starts from the coefficients it was made by."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=(1500, 3)) * OWN @ np.linalg.inv(np.eye(3) - WEIGHT)
    data = make_concepts(z, 5 + 2 * z, names=NAMES, graph=EDGES)
    problem = make_problem(data, mechanism="linear", hidden=64, label_weight=5.0)
    scale = np.std(z, 0)
    mechanisms: Any = problem.model.mechanisms  # type: ignore[union-attr]
    with torch.no_grad():
        mechanisms.base.zero_()
        mechanisms.weight.copy_(torch.as_tensor(WEIGHT * scale[:, None] / scale))
        mechanisms.log_scale.copy_(torch.as_tensor(np.log(OWN / scale - 0.02)))
    result = fit_svi(problem, num_steps=300, lr=5e-3, batch_size=100, schedule="cosine", num_samples=2, progress=False)
    return problem, result, data


@pytest.fixture(scope="module")
def pictures() -> tuple[Problem, Result]:
    """Colour pictures of a moment's fit, some without labels."""
    rng = np.random.default_rng(1)
    z = rng.uniform(size=(30, 2))
    images = np.broadcast_to(z[:, [0, 1, 0], None, None], (30, 3, 8, 8))
    data = make_concepts(images, z, names=["sky, above", "sea"], graph=[["sky, above", "sea"]])
    problem = make_problem(hide_labels(data, 0.5, seed=0), semi_supervised=True, hidden=8, mechanism="post_nonlinear")
    return problem, fit_svi(problem, num_steps=3, num_samples=2, progress=False)


def test_the_problem_of_a_saved_result_is_the_one_that_was_fitted(pictures: Any, tmp_path: Path) -> None:
    problem, result = pictures
    result.save(tmp_path)
    again = Result.load(tmp_path).rebuild()
    for one, other in zip(problem.args, again.args, strict=True):
        torch.testing.assert_close(one, other)
    first, second = (counterfactual(one, result, {"sea": 0.5}, num_draws=2, progress=False) for one in (problem, again))
    xr.testing.assert_identical(first, second)
    latent = torch.randn(4, 2)
    with fitted(problem, result.guide_state or {}, seed=0) as (model, _):
        torch.testing.assert_close(fitted_model(Result.load(tmp_path)).decode(latent), model.decode(latent))  # type: ignore[attr-defined]
    assert thinned(result, 7).args[0].shape == (7, 3, 8, 8)
    result.tree.attrs["method"] = "diffusion"
    with pytest.raises(ResultError, match=r"the result is of 'diffusion'; give one of probmodels\.causal_vae"):
        fitted_model(result)
    result.tree.attrs["method"] = "causal_vae"


def test_numbers_of_a_linear_model_are_those_of_its_coefficients(linear: Any) -> None:
    _, result, data = linear
    found = summarise_concepts(result)
    assert list(found["parents"]) == ["", "a", "a b"]
    assert (found["labelled"] == 1000).all()
    assert (found["r2"] > 0.95).all()
    assert (found["correlation"] > 0.975).all()
    np.testing.assert_allclose(found["noise_sd"], 2 * OWN, rtol=0.15)  # in units of the labels
    z = (data["label"].values - 5) / 2
    variance = z.var(0)
    # Of b 0.64 of 1, of c what is not its own; squared coefficients, each with the variance of its cause.
    np.testing.assert_allclose(found["explained"], 1 - OWN**2 / variance, atol=0.06)
    wanted = WEIGHT**2 * variance[:, None] / variance
    # Of 1000 rows squares of normals have a relative error of sqrt(2 / 1000); four of these.
    np.testing.assert_allclose(edge_shares(result), wanted, rtol=0.18, atol=0.01)
    paths = np.linalg.inv(np.eye(3) - WEIGHT)
    sd = np.sqrt(variance)
    np.testing.assert_allclose(unit_effects(result), paths * sd[:, None] / sd, atol=0.08)


def test_shares_and_effects_are_exactly_those_of_the_fitted_coefficients(linear: Any) -> None:
    _, result, _ = linear
    mechanisms = fitted_model(result).mechanisms
    weight = (mechanisms.weight * mechanisms.edges).double().numpy()
    np.testing.assert_allclose(unit_effects(result), np.linalg.inv(np.eye(3) - weight), atol=1e-5)
    shares, problem = edge_shares(result), result.rebuild()
    assert problem.data is not None
    variance = problem.data["label"].values.var(0)  # of labels, one each, near that of concepts
    np.testing.assert_allclose(shares, weight**2 * variance[:, None] / variance, rtol=0.18)


def test_files_of_a_table(linear: Any, tmp_path: Path) -> None:
    _, result, _ = linear
    outputs = write_outputs(result, tmp_path / "out", dpi=40)
    assert outputs.report.read_text(encoding="utf-8").startswith(outputs.table)
    assert "a -> b, a -> c, b -> c" in outputs.table
    figures = {path.stem for path in (tmp_path / "out" / "figures").glob("*.png")}
    assert figures == {"graph", "mechanisms", "effects", "loss"}
    concepts = pd.read_csv(tmp_path / "out" / "concepts.csv", index_col="concept")
    expected = summarise_concepts(result)
    np.testing.assert_allclose(concepts["r2"], expected["r2"], rtol=1e-4)
    edges = pd.read_csv(tmp_path / "out" / "edges.csv")
    assert edges[["cause", "effect"]].to_numpy().tolist() == EDGES
    shares, effects = edge_shares(result), unit_effects(result)
    for row in edges.itertuples():
        assert row.share == pytest.approx(float(shares.sel(cause=row.cause, effect=row.effect)), rel=1e-4)
        assert row.unit_effect == pytest.approx(float(effects.sel(cause=row.cause, effect=row.effect)), rel=1e-4)
    written = pd.read_csv(tmp_path / "out" / "effects.csv", index_col=0)
    np.testing.assert_allclose(written.to_numpy(), effects.values, rtol=1e-4, atol=1e-6)


def test_files_of_pictures_with_labels_missing(pictures: Any, tmp_path: Path) -> None:
    _, result = pictures
    with warnings.catch_warnings():
        warnings.simplefilter("error", OutsideSupportWarning)  # the ends of what was seen were seen
        write_outputs(result, tmp_path, dpi=40)
    figures = {path.stem for path in (tmp_path / "figures").glob("*.png")}
    assert figures == {"graph", "mechanisms", "effects", "loss", "traversal_sky_above", "traversal_sea"}
    concepts = pd.read_csv(tmp_path / "concepts.csv", index_col="concept")
    assert list(concepts["labelled"]) == [15, 15]


@pytest.mark.parametrize("mechanism", ["masked", "additive"])
def test_models_without_edges_or_labels_are_written(mechanism: str, tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(20, 2))
    data = make_concepts(values, values, names=["a", "b"])
    problem = make_problem(data, graph=None, hidden=4, label_weight=0.0, mechanism=mechanism)
    result = fit_svi(problem, num_steps=2, num_samples=2, progress=False)
    write_outputs(result, tmp_path, dpi=40)
    concepts = pd.read_csv(tmp_path / "concepts.csv", index_col="concept")
    assert concepts[["correlation", "r2"]].isna().all().all()
    assert (concepts["labelled"] == 0).all()
    assert {path.stem for path in (tmp_path / "figures").glob("*.png")} == {"graph", "effects", "loss"}


def test_curves_of_masked_mechanisms_are_over_the_linear_layer(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(20, 2))
    data = make_concepts(values, values, names=["a", "b"], graph=[["a", "b"]])
    problem = make_problem(data, hidden=4, mechanism="masked")
    write_outputs(fit_svi(problem, num_steps=2, num_samples=2, progress=False), tmp_path, dpi=40)
    assert (tmp_path / "figures" / "mechanisms.png").stat().st_size > 0


def test_counterfactuals_are_put_beside_the_truth(pictures: Any) -> None:
    problem, result = pictures
    found = counterfactual(problem, result, {"sea": 0.5}, num_draws=3, progress=False)
    truth, images = found["factual"].mean("draw").values, np.zeros((30, 3, 8, 8))
    figure = compare_counterfactuals(found, truth, images, rows=[1, 4])
    assert len(figure.axes) == 2 * 3
    shown = [np.asarray(ax.images[0].get_array()) for ax in figure.axes]
    np.testing.assert_allclose(shown[3], np.moveaxis(found["factual_observation"].values[4], 0, -1))
    np.testing.assert_allclose(shown[4], np.moveaxis(found["observation"].values[4], 0, -1))
    assert (shown[5] == 0).all()
    assert "sea 0.5" in figure.axes[1].get_xlabel()
    assert "sky" not in figure.axes[1].get_xlabel()  # a cause that stayed
    assert len(compare_counterfactuals(found, truth).axes) == 2
    with pytest.raises(ProblemError, match="truth_images of shape"):
        compare_counterfactuals(found, truth, images[:3])
    with pytest.raises(ProblemError, match="truth_concepts of shape"):
        compare_counterfactuals(found, truth[:3])
    with pytest.raises(ProblemError, match=r"rows=\[30\]; there are 30"):
        compare_counterfactuals(found, truth, rows=[30])
    with pytest.raises(ResultError, match="num_draws=0; give a whole number"):
        edge_shares(result, num_draws=0)
    with pytest.raises(ProblemError, match="nothing to compare"):
        compare_counterfactuals(found, np.ones((30, 2)))
    batch = counterfactual(problem, result, {"one": {"sea": 0.5}}, num_draws=1, progress=False)
    with pytest.raises(ProblemError, match="batch of interventions"):
        compare_counterfactuals(batch, truth)
