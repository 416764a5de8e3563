"""Fitted generators of meta generative regularisation: images by hand, gradients, leaks, and what is refused."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

from probmodels import Result, conditional_vae, diffusion, fit_bilevel, fit_svi
from probmodels.datasets.images import make_images
from probmodels.diffusion.fitted import make_field
from probmodels.errors import DataError
from probmodels.inference.diagnostics.findings import Finding
from probmodels.meta_regularization import fitted_generator, make_problem
from probmodels.meta_regularization.checks import check_draws
from probmodels.meta_regularization.fitted import seen
from probmodels.scores.samplers import reverse_step

CLASSES = np.array(["dark", "light"])
SMALL: dict[str, Any] = {"num_synthetic": 6, "finder_hidden": 4, "hidden": 4, "num_features": 3}


def halves(seed: int, train: int = 60, test: int = 40) -> xr.Dataset:
    """Images of 4 x 4 pixels of 5 intensities, of class "dark" or "light"."""
    rng = np.random.default_rng(seed)
    label = CLASSES[np.arange(train + test) % 2]
    low = np.where(label == "dark", 0, 2)[:, None, None]
    split = np.repeat(["train", "test"], [train, test])
    return make_images((low + rng.integers(0, 3, (train + test, 4, 4))) / 4, label, split=split, threshold=None)


@pytest.fixture(scope="module")
def autoencoder() -> Result:
    problem = conditional_vae.make_problem(
        halves(0), likelihood="logistic", num_values=5, num_latents=3, hidden=16, guide_hidden=16
    )
    return fit_svi(problem, num_steps=300, lr=0.01, num_samples=2, progress=False)


@pytest.fixture(scope="module")
def sampler() -> Result:
    problem = diffusion.make_problem(halves(0), conditional=True, num_values=5, hidden=32, blocks=1)
    return fit_svi(problem, num_steps=300, lr=0.01, num_samples=2, progress=False)


def test_the_generator_of_an_autoencoder_is_its_decoder(autoencoder: Result) -> None:
    found = fitted_generator(autoencoder, CLASSES[::-1], (4, 4))  # positions are those of the asker
    assert found.num_latents == 3
    z = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    images = found.generator(z, torch.zeros(50, dtype=torch.long))
    model: Any = conditional_vae.sampling.fitted_problem(autoencoder).model
    by_hand = 0.5 + model.decoder(torch.cat([z, torch.tensor([0.0, 1.0]).expand(50, 2)], 1)).reshape(50, 4, 4)
    torch.testing.assert_close(images, by_hand.clamp(0, 1), atol=1e-6, rtol=0)
    assert images.mean() > 0.6 > 0.4 > found.generator(z, torch.ones(50, dtype=torch.long)).mean()
    assert torch.autograd.grad(images.sum(), z)[0].abs().sum() > 0


def test_the_generator_of_a_diffusion_model_is_its_deterministic_sampler(sampler: Result) -> None:
    found = fitted_generator(sampler, CLASSES, (4, 4))
    assert found.num_latents == 16
    noise = torch.randn(50, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    images = found.generator(noise, torch.ones(50, dtype=torch.long))
    field = make_field(sampler, "light")
    times = field.schedule.levels(8).tolist()
    with torch.no_grad():
        z = noise.reshape(50, 4, 4)
        for t, s in itertools.pairwise(times):
            z = reverse_step(field, z, t, s, eta=0.0)
        x = field.to_data(field.denoise(z, 0.0))
    torch.testing.assert_close(images.detach(), (((x + 1) * 2.5 - 0.5) / 4).clamp(0, 1), atol=1e-4, rtol=0)
    assert images.mean() > 0.6
    assert torch.autograd.grad(images.sum(), noise)[0].abs().sum() > 0


@pytest.mark.parametrize("kind", ["autoencoder", "sampler"])
def test_a_fitted_generator_regularises_from_its_folder(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    result: Result = request.getfixturevalue(kind)
    folder = str(result.save(tmp_path / "generator"))
    problem = make_problem(halves(1), generator=folder, **SMALL)
    fitted = fit_bilevel(problem, num_rounds=1, inner_steps=5, num_samples=10, progress=False)
    assert fitted.rebuild().model.size == {"autoencoder": 3, "sampler": 16}[kind]  # the path is kept, and read again
    of_result: Any = make_problem(halves(1), generator=result, **SMALL).model
    of_folder: Any = problem.model
    z, label = torch.zeros(2, of_folder.size), torch.tensor([0, 1])
    assert torch.equal(of_result.generator(z, label), of_folder.generator(z, label))


def leaks(data: xr.Dataset, generator: Result) -> list[Finding]:
    problem = make_problem(data, generator=generator, **SMALL)
    fitted = fit_bilevel(problem, num_rounds=1, inner_steps=5, num_samples=10, progress=False)
    return [finding for finding in check_draws(fitted) if "the generator was fitted to" in finding.verdict]


def test_a_generator_that_saw_test_images_is_harmful_and_one_of_other_images_is_not(autoencoder: Result) -> None:
    validation, test = leaks(halves(1), autoencoder)
    assert "fitted to 0 of" in validation.verdict
    assert (validation.mark, test.mark) == ("✓", "✓")

    validation, test = leaks(halves(0), autoencoder)  # its own training images
    assert "fitted to 12 of the 12 validation images" in validation.verdict
    assert (validation.mark, test.mark) == ("!", "✓")

    turned = halves(0)
    turned["split"] = ("data", np.where(turned["split"] == "train", "test", "train"))
    test = leaks(turned, autoencoder)[1]
    assert "fitted to 60 of the 60 test images" in test.verdict
    assert test.harmful


def test_images_are_known_again_where_the_generator_saw_them_in_black_and_white() -> None:
    rng = np.random.default_rng(0)
    images = rng.random((20, 4, 4))
    assert seen(images, images[:5]).tolist() == [True] * 5 + [False] * 15
    assert seen(images, (images[:5] >= 0.5).astype(float)).tolist() == [True] * 5 + [False] * 15
    assert not seen(images, rng.random((20, 4, 4))).any()


def test_a_generator_of_another_kind_class_or_size_is_refused(autoencoder: Result, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="generator='nowhere'"):
        make_problem(halves(1), generator="nowhere", **SMALL)
    with pytest.raises(DataError, match="num_latents=5, but the generator has 3; leave it out"):
        make_problem(halves(1), generator=autoencoder, num_latents=5, **SMALL)
    data = halves(1)
    with pytest.raises(DataError, match="generator knows no class 'red'; it was fitted to dark, light"):
        fitted_generator(autoencoder, np.array(["dark", "red"]), (4, 4))
    with pytest.raises(DataError, match="generator makes images of 4 x 4"):
        make_problem(data.isel(row=slice(3)), generator=autoencoder, **SMALL)
    unconditional = fit_svi(diffusion.make_problem(halves(0), hidden=8, blocks=1), num_steps=2, progress=False)
    with pytest.raises(DataError, match="knows no classes; fit one with conditional=True"):
        make_problem(data, generator=unconditional, **SMALL)
    other = fit_bilevel(
        make_problem(data, num_latents=2, **SMALL), num_rounds=1, inner_steps=5, num_samples=2, progress=False
    )
    with pytest.raises(DataError, match="the result is of 'meta_regularization'; give one of 'conditional_vae' or"):
        make_problem(data, generator=other, **SMALL)
