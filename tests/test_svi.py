"""fit_svi: exact posteriors, reproducible and resumable fits, errors."""

from __future__ import annotations

from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from inference_models import SCALE, MeanGuide, auto_guide, data, exact, mean_model, mean_problem
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDelta

from probmodels.inference import CheckpointError, FitError, Problem, ProblemError, fit_svi

quick = partial(fit_svi, num_steps=30, num_samples=20, progress=False)


def test_fit_finds_a_conjugate_posterior():
    problem = mean_problem(loss="TraceMeanField_ELBO")
    result = fit_svi(problem, num_steps=800, lr=0.05, lr_decay=0.02, num_samples=2000, progress=False)
    mean, sd = exact(data())
    draws = result.posterior["mu"].values
    # The optimum is exact; what remains is the noise of the last steps (lr 0.001) and of 2000 draws (0.022 sd).
    assert abs(draws.mean() - mean) < 0.15 * sd
    assert abs(draws.std() / sd - 1) < 0.12
    params = result.params()
    assert abs(params["loc"].item() - mean) < 0.12 * sd
    assert abs(params["spread"].item() / sd - 1) < 0.1
    np.testing.assert_array_equal(result.posterior["twice"], 2 * result.posterior["mu"])
    residual = (result.posterior["new"] - result.posterior["mu"]).values
    assert abs(residual.std() / SCALE - 1) < 4 / np.sqrt(2 * residual.size)
    assert result.tree["fit"].sizes["step"] == 800
    assert float(result.tree["fit"]["loss"][-50:].mean()) < float(result.tree["fit"]["loss"][:50].mean())
    assert result.diagnose().ok


def test_log_weights_are_log_p_minus_log_q():
    result = quick(mean_problem())
    params, posterior = result.params(), result.posterior
    mu, y = torch.as_tensor(posterior["mu"].values[0]), data()
    log_p = dist.Normal(0.0, 2.0).log_prob(mu) + dist.Normal(mu[:, None], SCALE).log_prob(y).sum(-1)
    log_q = dist.Normal(params["loc"], params["spread"]).log_prob(mu)
    np.testing.assert_allclose(result.tree["sample_stats"]["log_weight"][0], log_p - log_q, rtol=1e-6)


def test_a_guide_that_is_far_too_narrow_fails_the_diagnosis():
    result = quick(mean_problem(), num_steps=1, lr=1e-6, num_samples=500)
    wide = result.diagnose()
    assert wide.khat is not None
    narrow = Problem("narrow", mean_model, narrow_guide, (data(),))
    report = quick(narrow, num_samples=1000).diagnose()
    assert not report.ok
    assert report.khat > 0.7
    assert "misses part of the posterior" in str(report)


def narrow_guide(y):
    loc = pyro.param("loc", torch.tensor(1.0, dtype=torch.float64))
    pyro.sample("mu", dist.Normal(loc, 0.02))


@pytest.mark.parametrize("make_guide", [MeanGuide, lambda: auto_guide(mean_model)])
def test_the_same_seed_gives_the_same_numbers_and_the_guide_is_left_alone(make_guide):
    guide = make_guide()
    before = {name: value.detach().clone() for name, value in guide.named_parameters()}
    problem = mean_problem(guide=guide)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = quick(problem)
    assert torch.equal(state, torch.get_rng_state())
    assert first.posterior.identical(quick(problem).posterior)
    assert not first.posterior.identical(quick(problem, seed=1).posterior)
    assert all(torch.equal(value, before[name]) for name, value in guide.named_parameters())
    assert len(before) == len(list(guide.named_parameters()))
    assert not list(pyro.get_param_store().keys())


def test_point_estimates_have_no_khat():
    point = mean_problem(guide=AutoDelta(pyro.poutine.block(mean_model, hide=["new"])))
    report = quick(point).diagnose()
    assert report.ok
    assert "point estimate" in str(report)


def stop_at(number):
    import os
    import signal

    def callback(step):
        if step.number == number:
            os.kill(os.getpid(), signal.SIGINT)

    return callback


@pytest.mark.parametrize("keep", ["last", "best"])
def test_resumed_fit_gives_the_numbers_of_an_uninterrupted_one(tmp_path, keep):
    options = {"num_steps": 40, "num_samples": 10, "progress": False, "lr_decay": 0.1, "keep": keep}
    problem = mean_problem(guide=auto_guide(mean_model))
    plain = fit_svi(problem, **options)
    with pytest.raises(KeyboardInterrupt, match=r"after step 17 of 40.*repeat the same call"):
        fit_svi(problem, checkpoint=tmp_path / "fit", callbacks=[stop_at(17)], **options)
    resumed = fit_svi(problem, checkpoint=tmp_path / "fit", **options)
    assert resumed.posterior.identical(plain.posterior)
    np.testing.assert_array_equal(resumed.tree["fit"]["loss"], plain.tree["fit"]["loss"])
    again = fit_svi(problem, checkpoint=tmp_path / "fit", **options)
    assert again.posterior.identical(plain.posterior)
    with pytest.raises(CheckpointError, match="lr "):
        fit_svi(problem, checkpoint=tmp_path / "fit", lr=0.5, **options)


def test_callbacks_and_patience_end_a_fit():
    seen = []
    quick(mean_problem(), callbacks=[lambda step: seen.append(step.number) or step.number == 12])
    assert seen == list(range(1, 13))
    result = fit_svi(mean_problem(), num_steps=5000, lr=0.3, patience=60, num_samples=5, progress=False)
    assert result.tree["fit"].sizes["step"] < 3000


def test_a_loss_that_is_not_finite_says_what_to_try():
    class Cliff(Trace_ELBO):
        def loss_and_grads(self, *args, **kwargs):
            super().loss_and_grads(*args, **kwargs)
            return float("nan")

    with pytest.raises(FitError, match=r"at step 1 the loss is nan .* try a smaller lr than 0.01"):
        quick(mean_problem(loss=Cliff()))


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"guide": None}, {}, "use run_mcmc"),
        ({}, {"batch_size": 3}, r"batch_plates=\(...\) from \['obs'\]"),
        ({}, {"num_steps": 0}, "num_steps=0"),
        ({}, {"keep": "first"}, "choose 'last' or 'best'"),
        ({}, {"num_particles": 0}, "num_particles=0"),
        ({"loss": "Trace_ELB"}, {}, "did you mean 'Trace_ELBO'"),
        ({"loss": "bogus"}, {}, "choose one of"),
        ({"guide": lambda y: pyro.sample("mu", dist.Normal(0.0, 1.0)) and None}, {}, "no parameter to fit"),
    ],
)
def test_arguments_out_of_range_are_refused(changes, options, message):
    with pytest.raises(ProblemError, match=message):
        quick(mean_problem(**changes), **options)


def test_clipping_and_particles():
    result = quick(mean_problem(), clip_norm=1e-12, num_particles=3)
    assert result.tree["fit"]["grad_norm"].min() > 1e-12  # recorded before clipping
    assert fit_svi(mean_problem(), num_steps=5, num_samples=7, progress=True).posterior.sizes["draw"] == 7
