"""Chains that end where their draws suffice: where they stop, that nothing else changes, and that bad chains do not."""

from __future__ import annotations

import json
import time
from functools import partial

import numpy as np
import pytest
from inference_models import ExactKernel, exact, mean_problem

from probmodels.errors import ProblemError
from probmodels.inference import run_mcmc
from probmodels.inference.mcmc.stopping import first_look

run = partial(run_mcmc, num_samples=2000, warmup_steps=20, chain_method="sequential", progress=False)


class ApartKernel(ExactKernel):
    """Each chain has a mean of its own, half a standard deviation from the others'."""

    def seed(self, seed: int) -> None:
        super().seed(seed)
        self._seed = seed

    def setup(self, warmup_steps, *args, **kwargs) -> None:
        super().setup(warmup_steps, *args, **kwargs)
        self._mean = self._mean + self._sd * np.random.default_rng(self._seed).normal()


class SlowerKernel(ExactKernel):
    """The same chain at a millisecond a sweep."""

    def sample(self, params):
        time.sleep(0.001)
        return super().sample(params)


def test_chains_stop_where_draws_pass_and_are_those_of_a_longer_run():
    found = run(mean_problem(), target_ess=700)
    count = found.posterior.sizes["draw"]
    assert first_look(2000) == 500
    assert 500 < count < 1000  # a third of the draws is effective
    assert found.diagnose(ess_min=700).ok
    assert not run(mean_problem(), num_samples=500).diagnose(ess_min=700).ok
    fixed = run(mean_problem(), num_samples=count)
    assert found.posterior.identical(fixed.posterior)
    spec = json.loads(found.tree.attrs["spec"])["inference"]  # which repeats the run
    assert (spec["num_samples"], spec["target_ess"]) == (2000, 700)


def test_chains_that_disagree_run_to_the_end_and_the_verdict_fails():
    found = run(mean_problem(kernel=ApartKernel), num_samples=800, target_ess=50)
    assert found.posterior.sizes["draw"] == 800
    assert not found.diagnose().ok


def test_a_target_out_of_reach_is_that_of_the_whole_run():
    found = run(mean_problem(), num_samples=300, target_ess=1e6)
    assert found.posterior.identical(run(mean_problem(), num_samples=300).posterior)


def test_an_interrupted_run_stops_at_the_same_draw(tmp_path):
    options = {"num_samples": 1200, "target_ess": 600}
    slow = {**options, "checkpoint": tmp_path / "run", "checkpoint_every": 0.1}
    for timeout in (0.5, 1.0):  # before the first look, and after some of its chains
        with pytest.raises(TimeoutError):
            run(mean_problem(kernel=SlowerKernel), timeout=timeout, **slow)
    resumed = run(mean_problem(kernel=SlowerKernel), **slow)
    plain = run(mean_problem(), **options)
    assert 300 < plain.posterior.sizes["draw"] < 1200
    assert resumed.posterior.identical(plain.posterior)


@pytest.mark.parametrize("method", ["process", "vectorized"])
def test_chains_of_every_method_stop(method):
    own = {"kernel": "chees", "num_chains": 16} if method == "vectorized" else {}
    options = {"num_samples": 800, "warmup_steps": 60, "chain_method": method, **own}
    found = run(mean_problem(), target_ess=200, **options)
    count = found.posterior.sizes["draw"]
    assert count < 800
    assert found.posterior.identical(run(mean_problem(), **{**options, "num_samples": count}).posterior)


def test_stopping_favours_no_estimates():
    """Over many runs the mean of the draws kept is unbiased, and their spread is as told."""
    mean, sd = exact(mean_problem().args[0])
    z = []
    for seed in range(15):
        found = run(mean_problem(), target_ess=150, num_samples=400, seed=seed)
        draws = found.posterior["mu"].values
        ess = draws.size / 3  # of a chain with correlation one half
        z.append((draws.mean() - float(mean)) / (float(sd) / np.sqrt(ess)))
    assert abs(np.mean(z)) < 4 / np.sqrt(len(z))
    assert 0.45 < np.std(z) < 1.65


@pytest.mark.parametrize("wrong", [0, -1.0, float("nan"), float("inf"), True, "400", [400]])
def test_targets_that_are_no_positive_number_are_refused(wrong):
    with pytest.raises(ProblemError, match="target_ess="):
        run(mean_problem(), target_ess=wrong)
