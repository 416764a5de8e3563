"""Two tests that fail if the block sampler does not draw from the posterior of the model.

Joint distribution (Geweke 2004, https://doi.org/10.1198/016214504000001132): where sweeps alternate with fresh data
drawn given the parameters, the parameters must keep their prior, of which exact draws are known. Its power is great: a
power of d in the column update that is off by one moves means by 40 standard errors.

Simulation-based calibration: ranks of truths from the prior among posterior draws are uniform. It also covers
preparation, gaps and effects, and the start, which is the sampler's own and not the truth. `benchmarks/calibration.py`
holds the long version. The chance that a correct sampler fails is below 1e-3 for each test, and the seeds are fixed.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import xarray as xr
from pyro import poutine
from scipy import stats

from probmodels.bayesian_svd import BlockGibbs, make_problem
from probmodels.bayesian_svd.model import frame_prior

NUM_DRAWS = 31
BURN, THIN = 120, 12
GRID = [0.15, 0.3, 0.6, 1.0]
SITES = ("U", "V", "d", "sigma", "length_index_space", "length_index_time")


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
    if options.get("frame_prior") == "uniform":  # has no kernels
        settings = {k: v for k, v in settings.items() if k.split("_")[0] not in ("kernel", "length", "nugget", "tail")}
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


@pytest.mark.parametrize(
    ("options", "missing"),
    [
        pytest.param(*values, id=name, marks=pytest.mark.slow if "gaps" in name else ())
        for name, values in OPTIONS.items()
    ],
)
def test_ranks_are_uniform(options, missing):
    assert least_pvalue(ranks(options, missing, 60)) > 1e-3


def test_a_wrong_prior_is_found_out():
    """Check that the test detects a wrong prior of the frames, which changes nothing but densities."""
    assert least_pvalue(ranks({}, 0.0, 60, wrong={"frame_prior": "uniform"})) < 1e-3


# -- joint distribution -----------------------------------------------------------------------------------------------

VARIANTS = {
    "length-scales": {},
    "kernels of their own": {"kernel_space": ["matern12", "matern72", "matern72"]},
    "uniform": {"frame_prior": "uniform"},
}


def moments(data, u, v, d, sigma, g_space, g_time):
    """Functions of draws (draw, ...) whose means are compared, (draw, function)."""
    out = [d, d**2, np.log(sigma)[:, None]]
    for frame, side, g in ((u, data.space, g_space), (v, data.time, g_time)):
        count = len(side.values)
        if count > 1:
            out.append((g[:, :, None] == np.arange(count)).reshape(len(d), -1).astype(float))
        out += [frame[:, 0] ** 2, frame[:, 1] * frame[:, 3]]
        for candidate in {0, count - 1}:
            vectors = (
                torch.eye(frame.shape[1], dtype=torch.float64) if side.vectors is None else side.vectors[candidate]
            )
            image = np.einsum("ij,sik->sjk", vectors.numpy(), frame)
            values = side.values[candidate].numpy()[:, None]
            out += [np.log((image**2 / values).sum(1)), np.log((image**2 * values).sum(1))]
    return np.concatenate(out, axis=1)


@pytest.mark.parametrize(
    "options",
    [pytest.param(options, id=name, marks=pytest.mark.slow if options else ()) for name, options in VARIANTS.items()],
)
def test_parameters_keep_their_prior_where_data_are_drawn_anew(options):
    any_values = np.random.default_rng(0).standard_normal((8, 10))
    settings = {"rank": 3, "fixed_effects": ("intercept", "trend"), "scale": 1.5, "noise_prior": (6.0, 1.8)}
    if options.get("frame_prior") != "uniform":  # which has no kernels
        settings |= {"nugget": 1e-3, "length_scales_space": [0.15, 0.4, 1.0], "length_scales_time": [0.15, 0.4, 1.0]}
    made = problem(any_values, area_weights=False, **settings, **options)
    data, rng = made.args[0], np.random.default_rng(3)

    num_exact, exact = 30_000, []
    torch.manual_seed(1)
    indices = []
    for side in (data.space, data.time):
        prior = frame_prior(side, made.kwargs["prior"])
        frames = prior.sample((num_exact,))
        exact.append(frames.numpy())
        several = len(side.values) > 1
        indices.append(
            torch.distributions.Categorical(logits=prior.component_logits(frames)).sample() if several else 0
        )
    d = 1.5 * np.abs(rng.standard_normal((num_exact, 3)))
    sigma = np.sqrt(1.8 / rng.standard_gamma(6.0, num_exact))
    expected = moments(data, *exact, d, sigma, *(np.asarray(index) for index in indices))

    kernel = BlockGibbs(made, num_steps=3, num_passes=2)
    kernel.seed(7)
    kernel.setup(1)
    params, reduced = kernel.initial_params, kernel._data
    num_batches, kept = 100, []
    for _ in range(20_000):
        u, v, d = params["U"].numpy(), params["V"].numpy(), params["d"].numpy()
        z = (u * d) @ v.T
        z += float(params["sigma"]) * rng.standard_normal(z.shape)
        reduced.z, reduced.z_transposed, reduced.total = z, np.ascontiguousarray(z.T), float((z**2).sum())
        params = kernel.sample(params)
        kept.append([params[name].numpy() for name in SITES])
    assert reduced.count == z.size  # nothing lies outside the bases
    found = moments(data, *(np.array(draws) for draws in zip(*kept, strict=True)))
    batches = found.reshape(num_batches, -1, found.shape[1]).mean(1)
    error = np.sqrt(batches.var(0, ddof=1) / num_batches + expected.var(0) / num_exact)
    moving = error > 1e-9  # not so candidates that a mode is denied, and log 1
    np.testing.assert_allclose(found.mean(0)[~moving], expected.mean(0)[~moving], atol=1e-9)
    deviation = (found.mean(0) - expected.mean(0))[moving] / error[moving]
    assert np.abs(deviation).max() < 5.0
    assert np.sqrt((deviation**2).mean()) < 1.6
