"""Conditional autoencoders: likelihoods by hand, images of the class asked for, verdicts, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

from probmodels import Result, diagnose, fit_svi
from probmodels.conditional_vae import (
    check_draws,
    check_model,
    image_evidence,
    image_fidelity,
    latent_information,
    make_problem,
    sample_images,
    tiny,
    write_outputs,
)
from probmodels.conditional_vae.checks import judge_fidelity
from probmodels.conditional_vae.model import ConditionalVAE, RoundedLogistic
from probmodels.datasets.images import make_images
from probmodels.edges.checks import judge_copies
from probmodels.errors import DataError, ResultError
from probmodels.inference import fidelity

SHAPE = (4, 4)


def stripes(count: int, seed: int, num_values: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Images of 4 x 4 pixels, of class "flat" with bright rows and of class "tall" with bright columns."""
    rng = np.random.default_rng(seed)
    label = np.array(["flat", "tall"])[np.arange(count) % 2]
    strength = rng.uniform(0.05, 0.95, (count, 4))
    level = np.where((label == "flat")[:, None, None], strength[:, :, None], strength[:, None, :])
    level = np.broadcast_to(level, (count, *SHAPE))
    if num_values is None:
        return (rng.random((count, *SHAPE)) < level).astype(float), label
    last = num_values - 1
    return np.clip(np.round((level + rng.normal(0, 0.05, level.shape)) * last), 0, last) / last, label


def data(seed: int = 0, num_values: int | None = 9, count: int = 400) -> xr.Dataset:
    images, label = stripes(count, seed, num_values)
    return make_images(images, label, split=np.repeat(["train", "test"], [count - 100, 100]), threshold=None)


@pytest.fixture(scope="module")
def result() -> Result:
    problem = make_problem(data(num_values=None, count=900), num_latents=3, hidden=32, guide_hidden=64)
    return fit_svi(
        problem, num_steps=1200, lr=0.005, schedule="warmup_cosine", batch_size=50, num_samples=5, progress=False
    )


def model(likelihood: str, num_values: int | None = None) -> ConditionalVAE:
    torch.manual_seed(0)
    return ConditionalVAE((2, 3), 2, 3, likelihood=likelihood, num_values=num_values, hidden=5).double()


def by_hand(net: ConditionalVAE, z: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Output of the decoder, layer by layer in NumPy."""
    found = np.concatenate([z, np.eye(3)[label]], 1)
    layers = [layer for layer in net.decoder.modules() if isinstance(layer, torch.nn.Linear)]
    for place, layer in enumerate(layers):
        found = found @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()
        if place < len(layers) - 1:
            found = found / (1 + np.exp(-found))  # the networks' activation, x sigmoid(x)
    return found.reshape(-1, 2, 3)


@pytest.mark.parametrize("likelihood", ["bernoulli", "normal", "logistic"])
def test_likelihoods_are_their_formulas(likelihood: str) -> None:
    net = model(likelihood, 5 if likelihood == "logistic" else None)
    rng = np.random.default_rng(1)
    z, label = rng.normal(size=(7, 2)), np.arange(7) % 3
    f = by_hand(net, z, label)
    x = rng.integers(0, 5, (7, 2, 3)) / 4 if likelihood != "bernoulli" else rng.integers(0, 2, (7, 2, 3)).astype(float)
    scale = float(net.log_scale.detach().exp()) if likelihood != "bernoulli" else math.nan
    if likelihood == "bernoulli":
        chance = 1 / (1 + np.exp(-f))
        each = x * np.log(chance) + (1 - x) * np.log(1 - chance)
    elif likelihood == "normal":
        each = -0.5 * ((x - 0.5 - f) / scale) ** 2 - math.log(scale) - 0.5 * math.log(2 * math.pi)
    else:
        upper, lower = (1 / (1 + np.exp(-(x + side - 0.5 - f) / scale)) for side in (1 / 8, -1 / 8))
        each = np.log(np.where(x == 1, 1.0, upper) - np.where(x == 0, 0.0, lower))
    found = net.likelihood(torch.as_tensor(z), torch.as_tensor(label)).log_prob(torch.as_tensor(x))
    np.testing.assert_allclose(found.detach().numpy(), each.sum((1, 2)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("num_values", [2, 17, 256])
@pytest.mark.parametrize("scale", [1e-3, 0.05, 3.0])
def test_the_rounded_logistic_sums_to_one_over_its_values(num_values: int, scale: float) -> None:
    location = torch.tensor([-0.7, 0.0, 0.31, 0.5, 1.0, 1.9], dtype=torch.float64)
    found = RoundedLogistic(location, torch.tensor(scale, dtype=torch.float64), num_values)
    values = torch.arange(num_values, dtype=torch.float64).unsqueeze(1) / (num_values - 1)
    chance = found.log_prob(values).exp()
    np.testing.assert_allclose(chance.sum(0).numpy(), 1.0, rtol=0, atol=1e-9)
    np.testing.assert_allclose((values * chance).sum(0).numpy(), found.mean.numpy(), rtol=0, atol=1e-9)


def test_draws_of_the_rounded_logistic_have_its_probabilities() -> None:
    torch.manual_seed(0)
    found = RoundedLogistic(torch.tensor(0.3), torch.tensor(0.2), 5)
    count = torch.bincount((found.sample((20_000,)) * 4).round().long(), minlength=5) / 20_000
    chance = found.log_prob(torch.arange(5.0) / 4).exp()
    assert (count - chance).abs().max() < 4 * math.sqrt(0.25 / 20_000)


def test_gradients_of_a_sharp_likelihood_stay_finite() -> None:
    location = torch.tensor([0.0, 5.0, -5.0], requires_grad=True)
    found = RoundedLogistic(location, torch.tensor(1e-3), 256).log_prob(torch.tensor([0.5, 0.0, 1.0]))
    found.sum().backward()
    assert location.grad is not None
    assert torch.isfinite(location.grad).all()
    assert torch.isfinite(found).all()


def test_new_images_are_of_the_class_that_was_asked_for(result: Result) -> None:
    for label, axis in (("flat", 2), ("tall", 1)):
        images = sample_images(result, 300, label=label, seed=1)
        assert set(images["label"].values) == {label}
        along, across = (images["image"].values.mean(a).var(1).mean() for a in (axis, 3 - axis))
        assert along > 1.3 * across, "rows of one brightness, or columns"
    both = sample_images(result, 3)
    assert both["label"].values.tolist() == ["flat"] * 3 + ["tall"] * 3
    assert set(np.unique(both["image"].values)) == {0.0, 1.0}
    means = sample_images(result, 3, pixels=False)["image"].values
    assert ((means > 0) & (means < 1)).all()


def test_new_images_have_the_intensities_of_their_likelihood() -> None:
    for likelihood, num_values in (("logistic", 9), ("normal", None)):
        problem = make_problem(
            data(), likelihood=likelihood, num_values=num_values, num_latents=2, hidden=4, guide_hidden=4
        )
        drawn = sample_images(fit_svi(problem, num_steps=2, num_samples=2, progress=False), 50)["image"].values * 8
        assert ((drawn >= 0) & (drawn <= 8)).all()
        assert np.allclose(drawn, drawn.round(), atol=1e-6) == (likelihood == "logistic")


def test_the_verdict_passes_what_is_right(result: Result) -> None:
    found = diagnose(result)
    assert found.ok, str(found)
    assert {finding.part for finding in found.findings} == {"inference", "model"}


def shaken(result: Result, change: str) -> Result:
    """The result with a guide that is too sure, or a decoder that does not know classes."""
    state = dict(result.guide_state or {})
    for name, value in state.items():
        if change == "sure" and name.endswith("encoder$$$5.bias"):
            state[name] = value - torch.cat([torch.zeros(3), torch.full((3,), 1.5), torch.zeros(3)])
        if change == "classes" and name.endswith("decoder$$$0.weight"):
            state[name] = torch.cat([value[:, :-2], value[:, -2:].flip(1)], 1)
    return Result(result.tree, state)


def test_a_guide_that_is_too_sure_fails(result: Result) -> None:
    wrong = shaken(result, "sure")
    bad = [finding for finding in check_draws(wrong) if finding.harmful]
    assert bad
    assert all("intervals of latents hold" in finding.verdict for finding in bad)
    assert bad[0].part == "inference"


def test_a_decoder_that_confuses_classes_fails(result: Result) -> None:
    wrong = shaken(result, "classes")
    bad = [finding for finding in check_model(wrong) if finding.harmful]
    assert any("are of the class asked for" in finding.verdict for finding in bad)


def test_missing_classes_and_copies_are_harmful_and_fresh_images_are_not() -> None:
    (train, train_label), (held, held_label), (new, new_label) = (
        stripes(n, s, 9) for n, s in ((200, 0), (100, 1), (100, 2))
    )

    def judged(images: np.ndarray, label: np.ndarray) -> list[str]:
        report = fidelity(
            images, train, held, synthetic_label=label, train_label=train_label, held_out_label=held_label
        )
        return [finding.verdict for finding in judge_fidelity(report) if finding.harmful]

    assert not judged(new, new_label)
    board = np.indices(SHAPE).sum(0) % 2  # which is like no image of either class
    assert "surely below" in judged(np.where((new_label == "tall")[:, None, None], board, new), new_label)[0]
    assert "copies" in judged(train[:100], train_label[:100])[0]


def test_images_that_copy_held_out_ones_are_said_to_have_seen_them() -> None:
    noise = np.random.default_rng(0).random((100, *SHAPE))
    new = np.repeat(noise[60:], 2, 0)
    report = fidelity(new, noise[:60], noise[60:], num_permutations=999)
    classes = xr.concat([report, report.assign_coords({"class": ["a"]})], "class")
    assert any(f.harmful and "the generator saw them" in f.verdict for f in judge_fidelity(classes))


def test_held_out_images_that_are_copies_are_harmful_but_not_those_alike_by_chance() -> None:
    rng = np.random.default_rng(0)
    train, fresh = rng.random((200, *SHAPE)), rng.random((100, *SHAPE))
    assert judge_copies(train, train[:40] + 0.4 / 255).harmful
    assert judge_copies(train, np.concatenate([fresh[:90], train[:10]])).harmful
    few = judge_copies(train, np.concatenate([fresh[:98], train[:2]]))
    assert not few.harmful
    assert few.advice
    assert not judge_copies(train, fresh).advice
    small, others = (rng.integers(0, 2, (n, 3, 4)).astype(float) for n in (400, 100))
    assert judge_copies(small, others).advice  # some are alike by chance
    assert not judge_copies(small, others).harmful
    twice = rng.permutation(np.repeat(rng.random((150, *SHAPE)), 2, axis=0))  # split at random
    assert judge_copies(twice[:240], twice[240:]).harmful


def test_two_images_held_out_are_too_few_to_pass() -> None:
    images, label = stripes(60, 0, 9)
    some = make_images(images, label, split=np.repeat(["train", "test"], [58, 2]), threshold=None)
    problem = make_problem(some, likelihood="logistic", num_values=9, num_latents=2, hidden=8, guide_hidden=8)
    report = diagnose(fit_svi(problem, num_steps=2, num_samples=2, progress=False))
    assert not report.ok
    assert any(f.part == "inference" and not f.judged for f in report.findings)


def test_evidence_of_images_is_above_their_bound_and_that_of_other_images_below(result: Result) -> None:
    found = image_evidence(result)
    assert found.sizes["data"] == 100
    assert (found["log_evidence"] >= found["elbo"]).all()
    assert (
        float(image_evidence(result, held_out=False)["log_evidence"].mean()) > float(found["log_evidence"].mean()) - 1
    )
    assert latent_information(result).shape == (3,)


def test_a_model_that_learned_by_heart_is_told_by_images_held_out() -> None:
    images, label = stripes(120, 3, 9)
    few = make_images(images, label, split=np.repeat(["train", "test"], [20, 100]), threshold=None)
    problem = make_problem(few, likelihood="logistic", num_values=9, num_latents=4, hidden=128, guide_hidden=128)
    wrong = fit_svi(problem, num_steps=2000, lr=0.005, num_samples=5, progress=False)
    assert any(f.harmful and "log likelihood" in f.verdict for f in check_model(wrong))


def test_outputs_are_written(result: Result, tmp_path: Path) -> None:
    write_outputs(result, tmp_path)
    names = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*")}
    assert {
        "samples.nc",
        "summary.txt",
        "figures/samples.png",
        "figures/reconstructions.png",
        "figures/loss.png",
    } <= names
    assert "Log likelihood of held-out images" in (tmp_path / "summary.txt").read_text(encoding="utf-8")
    with xr.open_dataset(tmp_path / "samples.nc") as drawn:
        assert drawn.sizes["data"] == 100


def test_a_saved_result_makes_the_same_images(result: Result, tmp_path: Path) -> None:
    again = Result.load(result.save(tmp_path / "run"))
    for label in (None, "tall"):
        xr.testing.assert_equal(sample_images(again, 5, label=label), sample_images(result, 5, label=label))


def test_labels_keep_their_kind() -> None:
    images, _ = stripes(40, 0)
    for label in (np.arange(40) % 2 == 0, np.arange(40) % 2 + 3, np.arange(40) % 2 + 0.0):
        some = make_images(images, label, split=np.repeat(["train", "test"], [30, 10]))
        fitted = fit_svi(make_problem(some, num_latents=2, hidden=4, guide_hidden=4), num_steps=2, progress=False)
        drawn = sample_images(fitted, 2)["label"]
        assert drawn.dtype == label.dtype
        assert drawn.values.tolist() == sorted(label.tolist())[::20][:1] * 2 + sorted(label.tolist())[-1:] * 2


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"label": None}, {}, "the images have no labels"),
        ({"label": np.repeat(["a"], 20)}, {}, "fewer than two classes"),
        ({"label": np.arange(20) % 3 - 1}, {}, "label -1 is below 0"),
        ({"label": np.arange(20) % 3 + 0.5}, {}, "label 0.5 is no class"),
        ({"label": np.where(np.arange(20) == 3, np.nan, 1.0)}, {}, "label nan is no class"),
        ({"label": np.arange(20) % 5}, {"num_classes": 4}, "label 4 is out of range: num_classes=4 has 0 to 3"),
        ({"label": np.arange(20) % 3}, {"num_classes": 4}, "class 3 has no training image"),
        ({"label": np.arange(20) % 3}, {"num_classes": 16}, "15 training images for 16 classes"),
        ({"label": np.repeat(["a", "b", "c"], [8, 8, 4])}, {}, "class c has no training image"),
        ({"label": np.array(["a", "all"])[np.arange(20) % 2]}, {}, "a class is called 'all'"),
        ({"label": np.array(["a", "b"])[np.arange(20) % 2]}, {"num_classes": 2}, "num_classes=2 is not used"),
        ({"split": np.repeat("train", 20)}, {}, "no image is held out"),
        ({}, {"likelihood": "bernoulli", "num_values": None}, "pixels have to be 0 or 1"),
        ({}, {"num_values": 8}, "intensities are not of 8 values in equal steps"),
        ({}, {"num_values": None}, "needs num_values"),
        ({}, {"likelihood": "normal"}, "num_values=9 is not used"),
    ],
)
def test_what_is_wrong_is_refused_before_training(change: dict, options: dict, message: str) -> None:
    images, label = stripes(20, 0, 9)
    given = {"label": label, "split": np.repeat(["train", "test"], [15, 5])} | change
    some = make_images(images, given["label"], split=given["split"], threshold=None)
    with pytest.raises(DataError, match=message):
        make_problem(some, **{"likelihood": "logistic", "num_values": 9, **options})


def test_images_outside_of_intensities_are_refused() -> None:
    some = data(count=120)
    some["image"][0, 0, 0] = 1.5
    with pytest.raises(DataError, match=r"image\[0, 0, 0\] is 1.5; pixels have to be in \[0, 1\]"):
        make_problem(some, likelihood="normal")


def test_classes_unknown_to_the_model_and_other_results_are_refused(result: Result) -> None:
    with pytest.raises(ResultError, match="label='round' is no class of the model; it knows flat, tall"):
        sample_images(result, 1, label="round")
    other = fit_svi(tiny(), num_steps=2, progress=False)
    other.tree.attrs["method"] = "diffusion"
    for function in (sample_images, image_fidelity, image_evidence):
        with pytest.raises(ResultError, match=r"not one of probmodels\.conditional_vae"):
            function(other, *([1] if function is sample_images else []))
