"""Short simulation-based calibration of the block sampler; `benchmarks/calibration.py` holds the long version.

Truths come from the model's own prior and data from its likelihood; ranks of the truth among posterior draws are
uniform if and only if sampler and model agree. Chains start where the sampler always starts, not at the truth. The
chance that a correct sampler fails is 1e-3 for each calibration, and the seeds are fixed.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import xarray as xr
from pyro import poutine
from scipy import stats

from probmodels.bayesian_svd import BlockGibbs, make_problem

NUM_DRAWS = 31
BURN, THIN = 120, 12
GRID = [0.15, 0.3, 0.6, 1.0]


def problem(values, **options):
    settings = {
        "rank": 2,
        "kernel_space": "matern72",
        "kernel_time": "matern32",
        "length_scales_space": GRID,
        "length_scales_time": GRID,
        "nugget": 1e-4,
        "tail": 0.0,
        "area_weights": np.linspace(0.5, 1.5, len(values)),
        "scale": 3.0,
        "noise_prior": (5.0, 0.75),
    }
    coords = {"cell": np.linspace(0, 1, len(values)), "time": np.linspace(0, 1, values.shape[1])}
    return make_problem(xr.DataArray(values, dims=("cell", "time"), coords=coords), **{**settings, **options})


def functionals(data, draw):
    """Labelled parameters, and products that no sign touches."""
    u, v, d = (data.space.basis @ draw["U"]).numpy(), (data.time.basis @ draw["V"]).numpy(), draw["d"].numpy()
    parts = [
        d,
        [float(draw["sigma"])],
        u[3] * v[4],
        u[1] * u[8],
        v[2] * v[9],
        u[2:4, 0] * v[5:7, 0] * u[5:7, 1] * v[1:3, 1],
        [(u[6] * d) @ v[7], u[2] @ u[5]],
        draw["length_scale_space"].numpy(),
        draw["length_scale_time"].numpy(),
    ]
    if "shared_effects" in draw:
        parts += [draw["shared_effects"].numpy(), draw["fixed_effects"].numpy()[[0, 7]].ravel()]
    return np.concatenate(parts)


def simulate(template, rng, missing):
    data = template.args[0]
    torch.manual_seed(int(rng.integers(2**31)))
    trace = poutine.trace(template.model).get_trace(*template.args, **template.kwargs)
    truth = {name: trace.nodes[name]["value"] for name in trace.stochastic_nodes}
    u, v = data.space.basis @ truth["U"], data.time.basis @ truth["V"]
    values = ((u * truth["d"]) @ v.T).numpy()
    root_weight = np.sqrt(data.weight.numpy())[:, None]
    if "shared_effects" in truth:
        named = rng.standard_normal((len(values), 2)) @ np.linalg.inv(data.design_root.numpy()).T / root_weight
        times = np.linspace(0, 1, values.shape[1])
        truth["fixed_effects"] = torch.as_tensor(named)
        values += root_weight * (named[:, :1] + named[:, 1:] * times)
        values += root_weight * (times - times.mean()) * truth["shared_effects"].numpy()
    else:  # a flat prior has no draws: any effects will do
        values += 5.0 * rng.standard_normal((len(values), 1))
    values += float(truth["sigma"]) * rng.standard_normal(values.shape)
    values /= root_weight
    while missing:
        gaps = rng.random(values.shape) < missing
        if (~gaps).sum(1).min() >= 5 and (~gaps).any(0).all():
            values[gaps] = np.nan
            break
    return functionals(data, truth), values


def infer(values, seed, options, **kernel_options):
    made = problem(values, **options)
    kernel = BlockGibbs(made, **kernel_options)
    kernel.seed(seed)
    kernel.setup(BURN)
    params = kernel.initial_params
    out = []
    for step in range(BURN + THIN * NUM_DRAWS):
        params = kernel.sample(params)
        if step >= BURN and (step - BURN) % THIN == 0:
            out.append(functionals(made.args[0], kernel.export(params)))
    return np.stack(out)


def ranks(options, missing, num_replicates, wrong=None):
    template = problem(np.random.default_rng(0).standard_normal((10, 12)), **options)
    rows = []
    for replicate in range(num_replicates):
        rng = np.random.default_rng([7, replicate])
        truth, values = simulate(template, rng, missing)
        draws = infer(values, replicate, {**options, **(wrong or {})})
        below, equal = (draws < truth).sum(0), (draws == truth).sum(0)
        rows.append(below + rng.integers(0, equal + 1))  # ties of discrete quantities are broken at random
    return np.stack(rows)


def least_pvalue(found):
    """Kolmogorov-Smirnov and chi-square over all quantities, times their number (Bonferroni)."""
    rng = np.random.default_rng(0)
    out = []
    for rank in found.T:
        out.append(stats.kstest((rank + rng.random(len(rank))) / (NUM_DRAWS + 1), "uniform").pvalue)
        out.append(stats.chisquare(np.histogram(rank, bins=np.arange(0, NUM_DRAWS + 2, 4))[0]).pvalue)
    return min(1.0, min(out) * len(out))


OPTIONS = {
    "complete, flat intercept": ({}, 0.0),
    "gaps, shared effect, proper local effects": (
        {
            "fixed_effects": ["intercept", "ramp"],
            "shared_effects": ["trend"],
            "covariates": {"ramp": np.linspace(0, 1, 12)},
            "effect_scale": 1.0,
        },
        0.2,
    ),
}


@pytest.mark.parametrize(("options", "missing"), OPTIONS.values(), ids=OPTIONS)
def test_ranks_are_uniform(options, missing):
    assert least_pvalue(ranks(options, missing, 60)) > 1e-3


def test_a_wrong_prior_is_found_out():
    """The test has the power to see an error of the prior of the frames, which touches nothing but densities."""
    assert least_pvalue(ranks({}, 0.0, 60, wrong={"frame_prior": "uniform"})) < 1e-3
