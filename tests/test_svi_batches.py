"""Minibatches: unbiased for the loss of all data, the same rows for model and guide, refused where they cannot work."""

from __future__ import annotations

from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoNormal
from svi_models import Amortised, crossed_model, global_model, local_model, problem, rows, vae

from probmodels.errors import ProblemError
from probmodels.inference import fit_svi
from probmodels.inference.programs.minibatch import Minibatches

still = partial(fit_svi, lr=1e-14, num_samples=2, progress=False)  # losses of one and the same guide


def losses(of, **options):
    return still(of, **options).tree["fit"]["loss"].values


@pytest.mark.parametrize("compile", ["eager", "graph"])
@pytest.mark.parametrize("model", [global_model, local_model])
def test_batches_of_an_epoch_average_to_the_full_loss(model, compile):
    point = problem(model, AutoDelta(model))  # draws nothing, so that only the rows differ between steps
    whole = losses(point, num_steps=1, batch_size=12)[0]
    parts = losses(point, num_steps=8, batch_size=3, compile=compile)
    assert parts.std() > 0.1
    np.testing.assert_allclose(parts.reshape(2, 4).mean(1), whole, rtol=1e-10)


def test_the_tail_of_an_epoch_brings_no_bias():
    point = problem(global_model, AutoDelta(global_model))
    whole = losses(point, num_steps=1, batch_size=12)[0]
    parts = losses(point, num_steps=1200, batch_size=5)  # two batches and two rows left over in each epoch
    means = parts.reshape(600, 2).mean(1)
    assert abs(means.mean() - whole) < 4 * means.std() / np.sqrt(600)
    seen = np.concatenate([Minibatches(point, 5, 0).at(step)["row"].numpy() for step in range(1200)])
    counts = np.bincount(seen, minlength=12)
    assert abs(counts - 500).max() < 4.5 * np.sqrt(600 * (10 / 12) * (2 / 12))  # binomial, by epoch


@pytest.mark.parametrize("guide", [Amortised, lambda: AutoNormal(local_model)])
def test_local_latent_values_see_the_rows_of_the_data(guide):
    local = problem(local_model, guide(), loss="TraceMeanField_ELBO")
    whole = losses(local, num_steps=1000)
    parts = losses(local, num_steps=1000, batch_size=4)
    error = np.hypot(whole.std(), parts.std()) / np.sqrt(1000)
    assert abs(parts.mean() - whole.mean()) < 4 * error
    assert error < 0.03 * abs(whole.mean())


def test_a_scale_that_is_left_out_would_show():
    def unscaled(y):
        mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 2.0))
        with pyro.plate("row", len(y)) as i, pyro.poutine.scale(scale=len(i) / len(y)):
            pyro.sample("y", dist.Normal(mu, 0.5), obs=y[i])

    wrong = problem(unscaled, AutoDelta(unscaled))
    whole = losses(wrong, num_steps=1)[0]
    assert abs(losses(wrong, num_steps=8, batch_size=3).mean() / whole - 1) > 0.5


def test_two_plates_are_subsampled_apart():
    y = torch.linspace(0, 1, 24, dtype=torch.float64).reshape(4, 6) ** 2
    crossed = problem(crossed_model, AutoDelta(crossed_model), args=(y,), batch_plates=("row", "column"))
    whole = losses(crossed, num_steps=1)[0]
    parts = losses(crossed, num_steps=3000, batch_size={"row": 2, "column": 3})
    means = parts.reshape(1500, 2).mean(1)
    assert abs(means.mean() - whole) < 4 * means.std() / np.sqrt(1500)
    assert len(np.unique(parts.round(9))) > 60  # of 6 * 20 pairs of subsets


def test_sizes_of_batches_may_be_numpy_integers():
    y = torch.linspace(0, 1, 24, dtype=torch.float64).reshape(4, 6)
    crossed = problem(crossed_model, AutoDelta(crossed_model), args=(y,), batch_plates=("row", "column"))
    given = losses(crossed, num_steps=3, batch_size={"row": np.int64(2), "column": np.int32(3)})
    assert np.array_equal(given, losses(crossed, num_steps=3, batch_size={"row": 2, "column": 3}))
    assert Minibatches(crossed, np.int64(2), 0).sizes == {"row": (4, 2), "column": (6, 2)}


def test_a_fit_by_batches_finds_the_optimum_and_draws_for_all_rows():
    fitted = fit_svi(
        problem(local_model, Amortised(), loss="TraceMeanField_ELBO"),
        num_steps=2500,
        lr=0.02,
        lr_decay=0.02,
        batch_size=4,
        num_samples=300,
        progress=False,
    )
    assert fitted.posterior["theta"].shape == (1, 300, 12)
    # E[theta | y, mu] is linear in y with slope 1 / (1 + 0.25); spread sqrt(0.2).
    assert abs(fitted.params()["net$$$weight"][0].item() - 0.8) < 0.05
    spread = torch.exp(fitted.params()["net$$$weight"][1] * rows() + fitted.params()["net$$$bias"][1])
    assert abs(spread.mean().item() / 0.2**0.5 - 1) < 0.05


def test_resumed_batches_are_those_of_an_uninterrupted_fit(tmp_path):
    options = {"num_steps": 260, "batch_size": 7, "num_samples": 5, "progress": False, "lr_decay": 0.1, "keep": "best"}
    options |= {"schedule": "warmup_cosine", "kl_warmup": 40, "clip_norm": 5.0}
    plain = fit_svi(vae(batch_plates=("row",)), **options)
    assert plain.tree.attrs["execution"] == "graph"

    def stop(step):
        if step.number in (23, 120):
            raise RuntimeError("killed")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="killed"):
            fit_svi(vae(batch_plates=("row",)), callbacks=[stop], checkpoint=tmp_path, checkpoint_every=0.0, **options)
    resumed = fit_svi(vae(batch_plates=("row",)), checkpoint=tmp_path, **options)
    assert resumed.posterior.identical(plain.posterior)
    np.testing.assert_array_equal(resumed.tree["fit"]["loss"], plain.tree["fit"]["loss"])


def ignores_rows(y):
    mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 2.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(mu, 0.5), obs=y)


def takes_the_first_rows(y):
    mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 2.0))
    with pyro.plate("row", len(y)) as i:
        pyro.sample("y", dist.Normal(mu, 0.5), obs=y[: len(i)])


def test_models_that_ignore_the_rows_are_refused():
    for model in (ignores_rows, takes_the_first_rows):
        with pytest.raises(ProblemError, match=r"site 'y' .* does not hold the rows that plate 'row' chose"):
            still(problem(model), num_steps=3, batch_size=3)
        assert still(problem(model), num_steps=3).posterior.sizes["draw"] == 2


def test_a_guide_of_all_local_values_at_once_is_refused():
    with pytest.raises(ProblemError, match=r"loss cannot be evaluated: Shape mismatch.*subset of rows"):
        still(problem(local_model, AutoDiagonalNormal(local_model)), num_steps=3, batch_size=3)


@pytest.mark.parametrize(
    ("changes", "size", "message"),
    [
        ({"batch_plates": ()}, 3, r"batch_plates=\(...\) from \['row'\]"),
        ({}, {"rows": 3}, "did you mean 'row'"),
        ({}, {"column": 3}, r"none of its batch_plates; known: row"),
        ({}, 13, "choose an integer from 1 to 12"),
        ({}, 0, "batch_size=0; give a whole number of at least 1"),
        ({}, {"row": 2.5}, "give a whole number of at least 1"),
        ({"batch_plates": ("column",)}, 3, "column"),
    ],
)
def test_batches_that_do_not_fit_are_refused(changes, size, message):
    with pytest.raises(ProblemError, match=message):
        still(problem(**changes), num_steps=3, batch_size=size)
