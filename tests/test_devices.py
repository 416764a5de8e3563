"""Engines on every device that torch has here: draws come back to the CPU and agree with the exact posterior."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from inference_models import MeanGuide, data, exact, mean_model

from probmodels.inference import Problem, fit_svi, log_likelihood, posterior_predictive, run_mcmc
from probmodels.inference.runtime.tensors import tensors_of

DEVICES = ["cpu", *([torch.accelerator.current_accelerator().type] if torch.accelerator.is_available() else [])]
ENGINES = {
    "chees": partial(run_mcmc, kernel="chees", num_samples=100, warmup_steps=100, num_chains=16),
    "nuts": partial(
        run_mcmc, kernel="nuts", num_samples=200, warmup_steps=100, num_chains=2, chain_method="sequential"
    ),
    "svi": partial(fit_svi, num_steps=500, lr=0.05, num_samples=400),
}


@pytest.fixture(params=DEVICES)
def device(request: Any) -> str:
    return request.param


def problem() -> Problem:
    return Problem("mean", mean_model, MeanGuide().float(), (data(dtype=torch.float32),))


@pytest.mark.parametrize("engine", ENGINES)
def test_engines_run_on_every_device_there_is(engine: str, device: str, tmp_path: Any) -> None:
    given = problem()
    run = partial(ENGINES[engine], given, device=device, progress=False)
    result = run()
    mean, sd = exact(data())
    draws = result.posterior["mu"].values
    assert abs(draws.mean() - mean) < 0.3 * sd
    assert abs(draws.std() / sd - 1) < 0.3
    assert {tensor.device.type for tensor in tensors_of(given)} == {"cpu"}
    assert all(tensor.device.type == "cpu" for tensor in (result.guide_state or {}).values())
    resumed = run(checkpoint=tmp_path)  # states are written, and read back by a call that finds its end there
    assert run(checkpoint=tmp_path).posterior.identical(resumed.posterior)


def test_what_follows_from_draws_is_computed_where_the_problem_lies(device: str) -> None:
    given = problem()
    posterior = run_mcmc(given, num_samples=30, warmup_steps=30, num_chains=2, kernel="chees", progress=False).posterior
    moved = given.to(device)
    new = posterior_predictive(moved, posterior, seed=1)["y"]
    assert abs(float(new.mean()) - exact(data())[0]) < 0.3
    np.testing.assert_allclose(log_likelihood(moved, posterior)["y"], log_likelihood(given, posterior)["y"], rtol=1e-4)
