"""Meta generative regularisation: transforms, finders, hypergradients of the look-ahead, verdict, bad input."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

from probmodels import diagnose, fit_bilevel
from probmodels.datasets.images import load_images, make_images
from probmodels.errors import DataError
from probmodels.guides.meta_regularization import FINDERS, make_finder
from probmodels.inference import Problem
from probmodels.inference.bilevel.hypergradients import Descent, Losses, agreement, hypergradient
from probmodels.inference.programs.programs import Programs, opened
from probmodels.meta_regularization import (
    LinearGenerator,
    Transform,
    expected_calibration_error,
    make_problem,
    tiny,
)
from probmodels.meta_regularization.checks import check_draws
from probmodels.meta_regularization.fitted import seen


@pytest.fixture
def double() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def squares(count: int = 24, seed: int = 0) -> xr.Dataset:
    """Images of 4 x 4 pixels, dark above or below; a third of them for testing."""
    rng = np.random.default_rng(seed)
    label = np.tile([0, 1], count // 2)
    images = rng.uniform(0, 0.6, (count, 4, 4))
    images[label == 0, :2] += 0.4
    images[label == 1, 2:] += 0.4
    split = np.repeat(["train", "test"], [2 * count // 3, count - 2 * count // 3])
    return make_images(images, label, split=split, threshold=0)


SMALL: dict[str, Any] = {
    "num_latents": 2,
    "num_synthetic": 6,
    "finder_hidden": 4,
    "hidden": 4,
    "num_features": 3,
}


# -- transforms --------------------------------------------------------------------------------------------------------


def picture(rows: int = 6, columns: int = 8, count: int = 3) -> Tensor:
    return torch.rand(count, 1, rows, columns, generator=torch.Generator().manual_seed(0))


OFF: dict[str, float] = {"flip": 0.0, "degrees": 0.0, "shift": 0.0, "zoom": 0.0, "erase": 0.0}


def test_a_flip_mirrors_left_and_right():
    images = picture()
    found = Transform(**{**OFF, "flip": 1.0})(images)
    torch.testing.assert_close(found, images.flip(-1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("angle", "turns"), [(90, 1), (180, 2), (-90, -1)])
def test_a_rotation_turns_the_pixels_of_a_square_image(angle, turns):
    images = picture(6, 6, 1)
    transform = Transform(**{**OFF, "degrees": 180.0})
    drawn = transform.draw(images)
    radians = torch.tensor(math.radians(angle))
    cos, sin, zero = radians.cos(), radians.sin(), torch.tensor(0.0)
    drawn = drawn._replace(theta=torch.stack([cos, -sin, zero, sin, cos, zero]).reshape(1, 2, 3))
    torch.testing.assert_close(transform.apply(images, drawn), torch.rot90(images, turns, (-2, -1)), atol=1e-4, rtol=0)


def test_a_rotation_keeps_distances_where_sides_differ():
    theta = Transform(**{**OFF, "degrees": 60.0}).draw(picture(6, 12, 50)).theta[:, :, :2]
    sides = torch.diag(torch.tensor([12.0, 6.0]))  # columns and rows, from coordinates to pixels
    pixels = sides @ theta @ sides.inverse()
    torch.testing.assert_close(pixels @ pixels.mT, torch.eye(2).expand(50, 2, 2), atol=1e-5, rtol=0)
    assert pixels[:, 0, 0].min() > 0.5 - 1e-5  # cosine of 60 degrees
    assert pixels[:, 1, 0].min() < -0.5 < 0.5 < pixels[:, 1, 0].max()


def test_a_shift_moves_by_a_share_of_the_side_and_fills_with_zeros():
    images = torch.ones(400, 1, 10, 10)
    transform = Transform(**{**OFF, "shift": 0.2})
    drawn = transform.draw(images)
    assert drawn.theta[:, :, 2].abs().max() <= 0.4  # sides have length 2
    assert drawn.theta[:, :, 2].abs().max() > 0.38
    found = transform.apply(images, drawn)
    assert found[:, :, 3:7, 3:7].min() > 1 - 1e-5
    assert found.min() < 1e-5


def test_erased_pixels_are_a_square_that_may_lie_anywhere():
    images = torch.ones(300, 1, 8, 8)
    found = Transform(**{**OFF, "erase": 0.5})(images)
    assert set(found.unique().tolist()) == {0.0, 1.0}
    assert (found == 0).sum((1, 2, 3)).unique().tolist() == [16]
    assert (found == 0).any(0).all()


def test_a_change_is_replayed_by_its_generator_and_by_its_draw():
    images, transform = picture(), Transform(flip=0.5)
    first = transform(images, torch.Generator().manual_seed(3))
    assert torch.equal(first, transform(images, torch.Generator().manual_seed(3)))
    assert not torch.equal(first, transform(images, torch.Generator().manual_seed(4)))
    drawn = transform.draw(images)
    assert torch.equal(transform.apply(images, drawn), transform.apply(images, drawn))


def test_images_have_derivatives_through_a_change(double):
    images = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    transform = Transform()
    drawn = transform.draw(images)
    assert torch.autograd.gradcheck(lambda x: transform.apply(x, drawn), images)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (OFF, "all strengths"),
        ({"erase": 1.5}, "erase=1.5"),
        ({"degrees": 200}, "degrees=200"),
        ({"flip": -0.1}, "flip=-0.1"),
        ({"zoom": math.nan}, "zoom=nan"),
        ({"shift": "much"}, "shift='much'"),
    ],
)
def test_strengths_out_of_range_are_refused(options, match):
    with pytest.raises(DataError, match=match):
        Transform(**options)


# -- finders -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mlp", "residual"])
def test_the_divergence_of_a_network_is_the_printed_one(double, kind):
    torch.manual_seed(0)
    finder = make_finder(kind, 4, 8)
    with torch.no_grad():
        for value in finder.parameters():
            value.add_(0.5 * torch.randn_like(value))
    z, log_density = finder(torch.randn(50, 4))
    mean, variance = z.mean(0), z.var(0, correction=0)
    printed = 0.5 * (mean.square() + variance - 1 - variance.log()).sum()
    found = (log_density - dist.Normal(0.0, 1.0).log_prob(z).sum(-1)).mean()
    assert found.item() == pytest.approx(printed.item(), rel=1e-5)
    slopes = (torch.autograd.grad(value, finder.parameters(), retain_graph=True) for value in (found, printed))
    for one, other in zip(*slopes, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["residual", "flow"])
def test_finders_start_at_the_prior(kind):
    torch.manual_seed(0)
    noise = torch.randn(7, 3)
    z, _ = make_finder(kind, 3, 8)(noise)
    torch.testing.assert_close(z, noise)


def test_the_density_of_a_flow_is_exact(double):
    torch.manual_seed(0)
    finder = make_finder("flow", 3, 8)
    with torch.no_grad():
        for value in finder.parameters():
            value.add_(2 * torch.randn_like(value))
    noise = torch.randn(5, 3)
    z, log_density = finder(noise)
    jacobian = torch.stack([torch.autograd.functional.jacobian(lambda e: finder(e[None])[0][0], e) for e in noise])
    expected = dist.Normal(0.0, 1.0).log_prob(noise).sum(-1) - torch.linalg.slogdet(jacobian)[1]
    torch.testing.assert_close(log_density, expected)
    assert not torch.allclose(z, noise)


# -- the pair ----------------------------------------------------------------------------------------------------------


def traced(problem: Problem, seed: int = 0) -> Any:
    with pyro.get_param_store().scope():
        pyro.set_rng_seed(seed)
        guide: Any = poutine.trace(problem.guide).get_trace(*problem.args, **problem.kwargs)
        return poutine.trace(poutine.replay(problem.model, guide)).get_trace(*problem.args, **problem.kwargs)


@pytest.mark.parametrize("distance", ["mean", "sum"])
@pytest.mark.parametrize("normalise", [True, False])
def test_the_consistency_site_is_the_printed_loss(double, distance, normalise):
    problem = make_problem(squares(), weight=0.3, distance=distance, normalise=normalise, **SMALL)
    node = traced(problem).nodes["pcr"]
    plain, changed = node["fn"].base_dist.loc, node["value"]
    assert not torch.equal(plain, changed)
    if normalise:
        torch.testing.assert_close(changed.square().mean(-1), torch.ones(6), rtol=1e-3, atol=0)
    squared = (changed - plain).square()
    expected = 0.3 * (squared.mean(-1) if distance == "mean" else squared.sum(-1))
    density = node["fn"].log_prob(changed)
    torch.testing.assert_close(node["fn"].log_prob(plain) - density, expected)
    assert node["scale"] == pytest.approx(1 / 6)


def test_consistency_moves_the_extractor_alone():
    problem = make_problem(squares(), **SMALL)
    trace = traced(problem)
    trace.compute_log_prob()
    loss = -trace.nodes["pcr"]["log_prob"].sum()
    model: Any = problem.model
    slopes = torch.autograd.grad(loss, list(model.extractor.parameters()), retain_graph=True, allow_unused=True)
    assert all(slope is not None and slope.abs().sum() > 0 for slope in slopes[:-1])
    heads = [trace.nodes[name]["value"] for name in ("weight", "bias")]
    assert all(slope is None for slope in torch.autograd.grad(loss, heads, retain_graph=True, allow_unused=True))


def test_parameters_of_a_generator_stay():
    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 16)

        def forward(self, z: Tensor, label: Tensor) -> Tensor:
            return torch.sigmoid(self.linear(z) + label[:, None]).unflatten(-1, (4, 4))

    torch.manual_seed(0)
    decoder = Decoder()
    before = decoder.linear.weight.clone()
    problem = make_problem(squares(), generator=decoder, **SMALL)
    result = fit_bilevel(problem, num_rounds=1, inner_steps=4, unroll_steps=2, num_samples=2, progress=False)
    assert torch.equal(decoder.linear.weight, before)
    assert decoder.linear.weight.requires_grad
    assert not [name for name in result.params() if "linear" in name]


def test_the_linear_generator_has_the_moments_of_the_classes(double):
    data = squares(400)
    images, label = torch.as_tensor(data["image"].values).unsqueeze(1), torch.as_tensor(data["label"].values)
    inside = 0.3 + 0.4 * images  # so that hardly anything is clipped
    generator = LinearGenerator(inside, label, 2, 16)
    torch.manual_seed(0)
    drawn = generator(torch.randn(40_000, 16), torch.ones(40_000, dtype=torch.long))
    own = inside[label == 1]
    torch.testing.assert_close(drawn.mean(0), own.mean(0), atol=4e-3, rtol=0)
    spread = (inside.flatten(1) - generator.mean[label]).square().mean(0).sqrt()
    torch.testing.assert_close(drawn.flatten(1).std(0), spread, atol=4e-3, rtol=0)


# -- hypergradient of the look-ahead -----------------------------------------------------------------------------------


@contextmanager
def look_ahead(problem: Problem) -> Iterator[Any]:
    """Losses of both problems: with noise that is the same at every call, and with that of the generator of torch."""
    assert problem.outer is not None
    with opened(problem, 0) as programs:
        outer = Programs(problem.outer.problem, programs.memo)

        def loss(of: Programs) -> Any:
            def evaluate(values: dict[str, Tensor]) -> Any:
                with programs.standing_in(values):
                    return Trace_ELBO().differentiable_loss(of.model, of.guide, *of.problem.args, **of.problem.kwargs)

            return evaluate

        def quiet(noisy: Any) -> Any:
            def evaluate(values: dict[str, Tensor]) -> Any:
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(1)
                    return noisy(values)

            return evaluate

        params = {name: value.detach().clone() for name, value in programs.params().items()}
        hyper = {name: params.pop(name) for name in problem.outer.hyper}
        torch.manual_seed(5)
        hyper = {name: value + 0.3 * torch.randn_like(value) for name, value in hyper.items()}
        noisy = Losses(loss(programs), loss(outer))
        yield SimpleNamespace(losses=Losses(*map(quiet, noisy)), noisy=noisy, inner=params, hyper=hyper)


def smooth(z: Tensor, label: Tensor) -> Tensor:
    """A fixed generator that is linear before the squashing."""
    weight = torch.linspace(-1, 1, 32, dtype=z.dtype).reshape(2, 16)
    middle = label[:, None].to(z) * torch.linspace(-1, 1, 16, dtype=z.dtype)
    return torch.sigmoid(z @ weight + middle).unflatten(-1, (4, 4))


@pytest.mark.parametrize("finder", FINDERS)
@pytest.mark.parametrize("head", ["point", "normal"])
def test_hypergradients_of_the_look_ahead_agree(double, finder, head):
    problem = make_problem(squares(), generator=smooth, finder=finder, head=head, finder_weight=0.01, **SMALL)
    with look_ahead(problem) as at:

        def run(method: str, hyper: dict[str, Tensor], steps: int) -> Any:
            return hypergradient(method, at.losses, at.inner, hyper, Descent("sgd", 0.5, {}), steps)

        exact = run("unrolled", at.hyper, 1)
        cosine, error = agreement(run("finite_difference", at.hyper, 0).gradient, exact.gradient)
        assert cosine >= 0.999
        assert error < 1e-2
        # The part that passes through the look-ahead alone, without the divergence of the finder.
        direct = run("unrolled", at.hyper, 0).gradient
        through, other = (
            {name: value - direct[name] for name, value in run(*how).gradient.items()}
            for how in (("unrolled", at.hyper, 1), ("finite_difference", at.hyper, 0))
        )
        assert agreement(other, through)[0] >= 0.999
        # Numerical differentiation of the whole look-ahead.
        step, found = 1e-5, {name: torch.zeros_like(value) for name, value in at.hyper.items()}
        for name, value in at.hyper.items():
            for place in range(value.numel()):
                shift = torch.zeros(value.numel())
                shift[place] = step
                ends = [
                    run("unrolled", {**at.hyper, name: value + sign * shift.reshape(value.shape)}, 1).outer_loss
                    for sign in (1, -1)
                ]
                found[name].view(-1)[place] = (ends[0] - ends[1]) / (2 * step)
        assert agreement(exact.gradient, found)[1] <= 1e-4


def test_all_passes_of_a_finite_difference_change_images_alike(double, monkeypatch):
    problem = make_problem(squares(), generator=smooth, **SMALL)
    drawn: list[Any] = []
    draw = Transform.draw

    def recorded(self: Transform, images: Tensor, generator: torch.Generator | None = None) -> Any:
        drawn.append(draw(self, images, generator))
        return drawn[-1]

    monkeypatch.setattr(Transform, "draw", recorded)
    with look_ahead(problem) as at:
        drawn.clear()
        torch.manual_seed(7)
        hypergradient("finite_difference", at.noisy, at.inner, at.hyper, Descent("sgd", 0.1, {}), 2)
    assert len(drawn) == 5  # two steps, then the look-ahead and a point on either side
    assert all(torch.equal(one.theta, drawn[2].theta) and torch.equal(one.kept, drawn[2].kept) for one in drawn[3:])
    assert not torch.equal(drawn[0].theta, drawn[1].theta)


# -- fits and verdicts -------------------------------------------------------------------------------------------------


def fitted(data: xr.Dataset, **options: Any) -> Any:
    problem = make_problem(data, **{**SMALL, "hidden": 16, "num_features": 8, **options})
    return fit_bilevel(problem, num_rounds=2, inner_steps=80, num_samples=20, lr=0.02, hyper_lr=0.02, progress=False)


@pytest.mark.parametrize("finder", FINDERS)
def test_classes_that_images_show_are_learned(finder):
    result = fitted(squares(240), finder=finder, head="normal")
    report = diagnose(result)
    assert report.inference == "passed", report.text()
    assert "expected calibration error" in report.text()


def test_labels_at_random_do_not_pass():
    data = squares(240)
    data["label"] = ("data", np.random.default_rng(1).permutation(data["label"].values))
    report = diagnose(fitted(data))
    assert report.inference == "failed", report.text()


def test_test_images_that_are_copies_do_not_pass():
    data = squares(240)
    split = data["split"].values
    test, train = np.flatnonzero(split == "test"), np.flatnonzero(split == "train")
    data["image"][test] = data["image"].values[train[: len(test)]]
    data["label"][test] = data["label"].values[train[: len(test)]]
    report = diagnose(fitted(data))
    assert any(f.harmful and "are copies of fitted ones" in f.verdict for f in report.findings), report.text()


def test_images_rounded_to_grey_levels_are_known_to_a_generator():
    images = np.random.default_rng(0).random((30, 4, 4))
    found = seen(np.round(images * 255) / 255, images[:20])
    assert found.tolist() == [True] * 20 + [False] * 10


def test_features_that_consistency_has_made_alike_do_not_pass():
    report = diagnose(fitted(squares(240), weight=1e6, normalise=False, degrees=180.0, shift=1.0))
    assert report.inference == "failed", report.text()


def judged(sure: float, right: float, count: int = 400) -> list[Any]:
    """Findings on a result whose test images are classified with some probability, and right with another."""
    rng = np.random.default_rng(0)
    label = rng.integers(2, size=count)
    guess = np.where(rng.random(count) < right, label, 1 - label)
    probability = np.where(np.eye(2)[guess] == 1, sure, 1 - sure)
    role = np.repeat(["train", "test"], [count // 4, count - count // 4])
    dims = ("chain", "draw", "data", "class")
    posterior = xr.Dataset({"class_probability": (dims, probability[None, None])}, {"class": [0, 1]})
    data = xr.Dataset({"label": ("data", label), "role": ("data", role)})
    tree = xr.DataTree.from_dict({"posterior": posterior, "constant_data": data})
    return [finding for finding in check_draws(SimpleNamespace(tree=tree)) if "calibration error" in finding.verdict]


def test_probabilities_that_are_too_sure_are_said_to_be():
    (honest,), (boasting,) = judged(0.8, 0.8), judged(0.97, 0.8)
    assert not honest.harmful, honest.verdict
    assert boasting.harmful, boasting.verdict


def test_the_calibration_error_is_that_of_a_hand_count():
    probability = np.array([[0.95, 0.05], [0.05, 0.95], [0.65, 0.35], [0.35, 0.65]])
    label = np.array([0, 0, 0, 1])
    # Bin of 0.95: one of two right. Bin of 0.65: two of two.
    assert expected_calibration_error(probability, label) == pytest.approx(0.5 * 0.45 + 0.5 * 0.35)


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_validation_images_are_of_every_class_and_never_test_images():
    data = squares(60)
    problem = make_problem(data, validation=0.25, **SMALL)
    role = problem.data["role"].values
    assert (role[data["split"].values == "test"] == "test").all()
    for place in (0, 1):
        assert (role[data["label"].values == place] == "validation").sum() == 5
    assert problem.outer is not None
    assert (role[problem.outer.problem.args[1].numpy()] == "validation").all()


@pytest.mark.parametrize(
    ("data", "options", "match"),
    [
        (squares().drop_vars("label"), {}, "no classes"),
        (squares().assign(label=("data", np.arange(24))), {}, "occurs among the test images alone"),
        (squares(), {"num_classes": 3}, "class 2 has no training image"),
        (squares().assign(label=("data", np.tile([0, 5], 12))), {"num_classes": 2}, "label 5 is out of range"),
        (squares().assign(label=("data", np.tile([0, -1], 12))), {}, "label -1 is below 0"),
        (squares().assign(label=("data", np.tile([0, 0.5], 12))), {}, "label 0.5 is no class"),
        (squares(), {"num_classes": 40}, "16 training images for 40 classes"),
        (squares().assign(label=("data", np.zeros(24, dtype=int))), {}, "fewer than two classes"),
        (squares(), {"validation": 0.0}, "validation=0.0"),
        (squares(), {"validation": 0.01}, "leaves no image to judge the finder"),
        (squares().assign(image=3 * squares()["image"]), {}, r"pixels have to be in \[0, 1\]"),
        (squares(), {"num_latents": 17}, "vary in 10 directions"),
        (squares(), {"generator": lambda z, y: z}, "images of shape"),
        (squares(), {"generator": lambda z, y: 1 / 0}, "ZeroDivisionError"),
        (squares(), {"generator": lambda z, y: smooth(z.detach(), y)}, "no derivative in its latents"),
        (squares(), {"generator": lambda z, y: 2 * smooth(z, y)}, "intensities have to lie"),
        (squares(), {"generator": lambda z, y: z.detach().numpy()}, "returns a ndarray"),
        (squares(), {"finder": "flows"}, "did you mean 'flow'"),
        (squares(), {**OFF}, "all strengths"),
        (squares(), {**OFF, "erase": 0.1}, "less than a pixel"),
    ],
)
def test_bad_input_is_refused_before_anything_is_fitted(data, options, match):
    with pytest.raises(DataError, match=match):
        make_problem(data, **{**SMALL, **options})


def test_tiny_has_what_the_page_says():
    problem = tiny()
    assert problem.sites["class_probability"].dims == ("data", "class")
    assert problem.names("observed") == ["y"]
    assert replace(problem).validate() is not None


@pytest.mark.slow
def test_digits_are_learned_from_few():
    data = load_images(threshold=0, num_train=300)
    problem = make_problem(data, network="conv", prior_sd=0.1)
    result = fit_bilevel(problem, num_rounds=2, inner_steps=100, num_samples=10, progress=False)
    report = diagnose(result)
    assert report.inference == "passed", report.text()
