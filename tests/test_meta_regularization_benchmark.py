"""The loop of benchmarks/meta_regularization.py: its hypergradient, and what its generators and rows see."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
os.environ.update(
    dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")
)
import meta_regularization as bench

from probmodels.conditional_vae.sampling import fitted_problem


@pytest.fixture(scope="module")
def images() -> bench.Images:
    return bench.load("digits", None)


def test_the_hypergradient_is_that_of_the_look_ahead() -> None:
    generator = torch.Generator().manual_seed(0)
    theta, target, rows = (torch.randn(4, dtype=torch.float64, generator=generator) for _ in range(3))
    phi = torch.randn(4, dtype=torch.float64, generator=generator).requires_grad_()
    theta = theta.requires_grad_()
    trial: Any = object.__new__(bench.Trial)
    trial.part = {"validation": rows}

    def pulled() -> torch.Tensor:
        return (theta * phi.sin()).square().sum()

    def log_loss(shown: torch.Tensor) -> torch.Tensor:
        return ((theta - target) * shown).square().sum()

    before = theta.detach().clone()
    direction = trial._look_ahead([theta], theta.cos().sum() + pulled(), log_loss)
    (found,) = trial._mixed([theta], [phi], direction, pulled)
    torch.testing.assert_close(theta.detach(), before, atol=1e-12, rtol=0)  # the classifier is where it was

    (slope,) = torch.autograd.grad(theta.cos().sum() + pulled(), theta, create_graph=True)
    ahead = theta - bench.LOOK_AHEAD * slope
    (exact,) = torch.autograd.grad(((ahead - target) * rows).square().sum(), phi)
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-8)


def test_reported_images_are_none_of_those_that_train_or_develop(images: bench.Images) -> None:
    pool = np.concatenate(images.pool)
    parts = (pool, images.development, images.test)
    assert sum(map(len, parts)) == len(np.unique(np.concatenate(parts)))
    assert min(map(len, images.pool)) >= max(bench.SIZES)


@pytest.mark.parametrize("strong", [False, True])
def test_generators_see_no_image_that_judges(images: bench.Images, strong: bool) -> None:
    trial = bench.Trial(images, 5, 0, images.test[:50], strong=strong)
    data = fitted_problem(trial.generator).data
    assert data is not None
    fitted = {image.tobytes() for image in data["image"].values.astype(np.float64)}
    judged = np.concatenate([trial.part["validation"], trial.part["test"]])
    assert not fitted & {image.tobytes() for image in trial.data["image"].values[judged].astype(np.float64)}
    assert (len(fitted) > 500) == strong


def test_a_row_is_fitted_and_a_better_one_is_seen(images: bench.Images, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "STEPS", 60)
    trial = bench.Trial(images, 10, 0, images.test)
    base = trial.fit(bench.ROWS["base"], 1.0)
    assert base["accuracy"] > 0.6
    assert base == trial.fit(bench.ROWS["base"], 1.0)
    moved = trial.fit(bench.ROWS["MGR, residual"], 1.0)
    assert moved["accuracy"] > 0.6
    assert moved["NLL"] != base["NLL"]
