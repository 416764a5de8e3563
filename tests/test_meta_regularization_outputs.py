"""Outputs of meta generative regularisation: images that the finder chooses early and late, and their changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from probmodels import Result, conditional_vae, fit_bilevel, fit_svi
from probmodels.errors import ResultError
from probmodels.guides.meta_regularization import FINDERS
from probmodels.meta_regularization import chosen_images, make_problem, tiny, write_outputs


def fitted(finder: str, hyper_lr: float = 0.1) -> Result:
    data = tiny().data
    assert data is not None
    problem = make_problem(
        data.drop_vars("role"), finder=finder, num_latents=2, num_synthetic=6, finder_hidden=4, hidden=4, num_features=3
    )
    return fit_bilevel(
        problem, num_rounds=1, inner_steps=20, hyper_optimiser="adam", hyper_lr=hyper_lr, keep="last", num_samples=10,
        progress=False,
    )  # fmt: skip


@pytest.mark.parametrize("finder", FINDERS)
def test_images_are_those_of_the_first_and_of_the_last_finder(finder: str) -> None:
    result = fitted(finder)
    found = chosen_images(result)
    assert found["early"].shape == found["late"].shape == found["changed"].shape == (2, 6, 4, 4)
    assert float(np.abs(found["early"] - found["late"]).max()) > 0.01
    assert float(np.abs(found["changed"] - found["late"]).max()) > 0.01
    if finder != "mlp":  # which starts at the prior
        noise = found["early_latent"].values
        assert abs(noise.mean()) < 4 / noise.size**0.5
        assert abs(noise.var() - 1) < 4 * (2 / noise.size) ** 0.5
    generator = result.rebuild().model.generator
    late = torch.as_tensor(found["late_latent"].values[:3], dtype=torch.get_default_dtype())
    assert generator(late, torch.zeros(3, dtype=torch.long)).shape == (3, 1, 4, 4)


def test_a_finder_that_did_not_move_chooses_the_same_images() -> None:
    found = chosen_images(fitted("residual", hyper_lr=1e-12))
    np.testing.assert_allclose(found["early"], found["late"], atol=1e-6)
    assert float(np.abs(found["changed"] - found["late"]).max()) > 0.01


def test_outputs_are_written_and_agree_with_the_result(tmp_path: Path) -> None:
    result = fitted("residual")
    write_outputs(result, tmp_path)
    assert {path.name for path in (tmp_path / "figures").iterdir()} >= {"chosen.png", "changes.png"}
    table = pd.read_csv(tmp_path / "classes.csv")
    chance = result.tree["posterior"]["class_probability"].values.mean((0, 1))
    np.testing.assert_allclose(table[["p_0", "p_1"]].values, chance, rtol=1e-5)
    test = table[table["role"] == "test"]
    loss = -np.log(np.where(test["class"] == 0, test["p_0"], test["p_1"])).mean()
    assert f"log loss {loss:.3f}" in (tmp_path / "summary.txt").read_text(encoding="utf-8")
    moments = pd.read_csv(tmp_path / "latents.csv")
    found = chosen_images(result)
    np.testing.assert_allclose(moments["late_mean"], found["late_latent"].mean("draw"), rtol=1e-4)


def test_outputs_of_a_generator_that_no_file_holds_have_no_images(tmp_path: Path) -> None:
    data = tiny().data
    assert data is not None
    problem = make_problem(
        data.drop_vars("role"), generator=lambda z, y: torch.sigmoid(z.mean(-1))[:, None, None].expand(-1, 4, 4),
        num_latents=2, num_synthetic=6, hidden=4, num_features=3,
    )  # fmt: skip
    result = fit_bilevel(problem, num_rounds=1, inner_steps=5, num_samples=5, progress=False)
    write_outputs(result, tmp_path)
    assert "Images that the finder chooses are not shown" in (tmp_path / "summary.txt").read_text(encoding="utf-8")
    assert not list((tmp_path / "figures").glob("c*.png"))


def test_results_of_other_methods_are_refused(tmp_path: Path) -> None:
    other = fit_svi(conditional_vae.tiny(), num_steps=2, num_samples=2, progress=False)
    for function in (chosen_images, lambda result: write_outputs(result, tmp_path)):
        with pytest.raises(ResultError, match=r"not one of probmodels\.meta_regularization"):
            function(other)
