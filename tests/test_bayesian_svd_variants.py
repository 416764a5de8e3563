"""Kernels mode by mode, every frame prior, every kernel in time: built, valid, and sampled where there is a sampler."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from probmodels import Result, run_mcmc
from probmodels.bayesian_svd import make_problem

RUN = {"num_samples": 150, "warmup_steps": 100, "num_chains": 1, "chain_method": "sequential", "progress": False}
D = (55.6, 24.4)  # singular values of the noiseless field below, to a tenth; the noise adds about one sd of 0.2


@pytest.fixture(scope="module")
def data() -> xr.DataArray:
    rng = np.random.default_rng(0)
    x, months = np.linspace(0, 1, 20), np.arange(36)
    signal = 4 * np.outer(np.sin(3 * x), np.cos(months / 12 * 2 * np.pi)) + 2 * np.outer(
        np.cos(4 * x), np.sin(months / 5)
    )
    time = np.arange("2000-01", "2003-01", dtype="datetime64[M]").astype("datetime64[ns]")
    values = signal + 0.2 * rng.standard_normal(signal.shape)
    return xr.DataArray(values, dims=("cell", "time"), coords={"cell": x, "time": time})


def sampled(data: xr.DataArray, **options) -> Result:
    return run_mcmc(make_problem(data, rank=2, area_weights=False, **options), **RUN)


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_time": ["periodic", "matern12"], "period": 1.0},
        {"kernel_time": "exponential"},
        {"kernel_space": ["matern52", "identity"]},
        {"kernel_space": "squared_exponential", "kernel_time": "matern32", "tail": 1e-5},
        {"frame_prior": "uniform"},
        {"shared_effects": ["trend"]},
        {"effect_scale": 3.0},
    ],
    ids=str,
)
def test_block_sampler_serves_every_variant(data: xr.DataArray, options: dict) -> None:
    posterior = sampled(data, **options).posterior
    d = posterior["d"].mean(("chain", "draw")).values
    np.testing.assert_allclose(
        d, D, atol=1.0
    )  # five posterior sd: the prior moves d little at this signal-to-noise ratio
    u = posterior["U"].values
    np.testing.assert_allclose(
        np.einsum("cdrk,cdrl->cdkl", u, u), np.broadcast_to(np.eye(2), (1, 150, 2, 2)), atol=1e-10
    )


def test_modes_with_kernels_of_their_own_keep_their_labels(data: xr.DataArray) -> None:
    posterior = sampled(data, kernel_space=["identity", "matern52"], kernel_time="identity").posterior
    assert (posterior["length_scale_space"].sel(mode=1) == 0).all()  # the identity kernel has no length-scale
    assert (posterior["length_scale_space"].sel(mode=2) > 0).all()


@pytest.mark.parametrize("prior", ["conditioned", "projected", "macg", "uniform"])
def test_every_frame_prior_makes_a_valid_program(data: xr.DataArray, prior: str) -> None:
    options = {} if prior == "uniform" else {"length_scales_space": [0.2, 0.4]}
    problem = make_problem(data, rank=2, frame_prior=prior, **options).validate()
    assert (problem.kernel is None) == (prior in ("projected", "macg"))
    assert problem.sites["U"].dims == ("basis_space", "mode")
