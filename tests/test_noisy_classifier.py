"""Classifiers of noised images: against the posterior of classes in closed form, as guidance, what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from probmodels import fit_svi
from probmodels.datasets.images import make_images
from probmodels.diffusion import make_problem as make_diffusion
from probmodels.diffusion.classifier import class_likelihood, make_problem
from probmodels.diffusion.fitted import make_field
from probmodels.errors import DataError
from probmodels.scores.fields import Conditioned
from probmodels.scores.samplers import sample

ENDS = (-4.0, 4.0)


@pytest.fixture(scope="module")
def images():
    """Dark and bright images of 2 x 2 pixels, all pixels of one value."""
    label = np.arange(400) % 2
    return make_images(np.broadcast_to(label[:, None, None], (400, 2, 2)) * 1.0, label, threshold=None)


@pytest.fixture(scope="module")
def field(images):
    problem = make_diffusion(images, hidden=16, blocks=1, num_values=2, prediction="values", gamma=ENDS)
    options = {"num_steps": 300, "lr": 0.01, "lr_decay": 0.1, "batch_size": 100, "num_samples": 2, "keep": "average"}
    return make_field(fit_svi(problem, **options, progress=False))


@pytest.fixture(scope="module")
def classifier(images, field):
    problem = make_problem(images, field, hidden=16)
    options = {"num_steps": 600, "lr": 0.01, "lr_decay": 0.05, "num_samples": 2, "keep": "average"}
    return problem, fit_svi(problem, **options, progress=False)


@pytest.mark.parametrize("t", [0.3, 0.6, 1.0])
def test_probabilities_are_those_of_bayes(field, classifier, t):
    # Pixels are -1/2 or 1/2, so that log odds of bright are alpha sum(z) / sigma^2.
    alpha, sigma = (float(value) for value in field.scales(t, torch.zeros(())))
    generator = torch.Generator().manual_seed(0)
    x = (torch.arange(500) % 2 - 0.5).reshape(-1, 1, 1)
    z = alpha * x + sigma * torch.randn(500, 2, 2, generator=generator)
    exact = torch.sigmoid(alpha * z.sum((1, 2)) / sigma**2)
    found = class_likelihood(*classifier, 1)(z, t).exp()
    assert float((found - exact).abs().mean()) < 0.05
    both = found + class_likelihood(*classifier, 0)(z, t).exp()
    assert torch.allclose(both, torch.ones(500), atol=1e-5)


def test_guided_images_are_of_the_class(field, classifier):
    wanted = torch.arange(200) % 2
    likelihood = class_likelihood(*classifier, wanted.tolist())
    drawn = sample(Conditioned(field, likelihood), 200, num_steps=30, progress=False)
    plain = sample(field, 200, num_steps=30, progress=False)
    right = (drawn.mean((1, 2)) > 0) == wanted.bool()
    assert float(right.double().mean()) > 0.97
    assert 0.3 < float((plain.mean((1, 2)) > 0).double().mean()) < 0.7  # without: about half, sd 0.035


def test_what_does_not_fit_is_refused(images, field, classifier):
    with pytest.raises(DataError, match="the classifier knows"):
        class_likelihood(*classifier, 7)
    with pytest.raises(DataError, match="no labels"):
        make_problem(images.drop_vars("label"), field)
    with pytest.raises(DataError, match="choose one of mlp, unet"):
        make_problem(images, field, network="rnn")
    with pytest.raises(DataError, match="must be the same"):
        make_problem(make_images(np.zeros((4, 3, 2)), np.arange(4), threshold=None), field)
