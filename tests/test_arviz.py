"""The boundary to ArviZ, and our own statistics against it."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import xarray as xr
from inference_models import data, normal_model

from probmodels.inference import Problem
from probmodels.inference.convergence import bfmi, convergence, psis_khat
from probmodels.inference.diagnostics import summarize
from probmodels.inference.predictive import log_likelihood


@pytest.fixture(scope="module")
def ours():
    from probmodels.inference import _arviz

    return _arviz


def correlated(num_chains, num_draws, size=12, seed=0):
    noise = np.random.default_rng(seed).normal(size=(num_chains, num_draws, size))
    draws, phi = noise.copy(), np.linspace(-0.9, 0.98, size)
    for t in range(1, num_draws):
        draws[:, t] = phi * draws[:, t - 1] + noise[:, t]
    draws[..., 3] = np.round(draws[..., 3])  # ties
    draws[0, :, 4] += 3  # a chain apart
    draws[..., 5] = np.exp(5 * draws[..., 5])  # a heavy tail
    return draws


@pytest.mark.parametrize("shape", [(4, 200), (4, 201), (2, 8), (3, 31)])
def test_convergence_equals_arviz(ours, shape):
    draws = correlated(*shape)
    dataset = xr.Dataset({"x": (("chain", "draw", "cell"), draws)})
    found = convergence(draws)
    for name, theirs in (
        ("r_hat", ours.rhat(dataset)),
        ("ess_bulk", ours.ess(dataset)),
        ("ess_tail", ours.ess(dataset, kind="tail")),
        ("mcse_mean", ours.mcse(dataset)),
    ):
        np.testing.assert_allclose(found[name], theirs["x"].values, rtol=1e-8, err_msg=name)


def test_summary_equals_arviz(ours):
    draws = correlated(4, 250, size=6)[..., :5]
    dataset = xr.Dataset({"x": (("chain", "draw", "cell"), draws)}, coords={"cell": list("abcde")})
    mine, theirs = summarize(dataset, ci_prob=0.9), ours.summary(dataset, ci_prob=0.9)
    assert list(mine.index) == list(theirs.index)
    for column in theirs.columns:
        np.testing.assert_allclose(mine[column], theirs[column], rtol=1e-8, err_msg=column)


def test_bfmi_and_khat_equal_arviz(ours):
    rng = np.random.default_rng(0)
    energy = rng.normal(size=(3, 400)).cumsum(1)
    np.testing.assert_allclose(bfmi(energy), ours.bfmi(energy), rtol=1e-10)
    for scale in (0.1, 1.0, 3.0):
        weights = scale * rng.standard_t(4, size=1000)
        assert psis_khat(weights) == pytest.approx(ours.psis(weights)[1], rel=1e-8)


def test_loo_of_a_conjugate_model(ours):
    y = data(12).reshape(1, 12)
    problem = Problem("rows", normal_model, args=(y,))
    rng = np.random.default_rng(0)
    precision = 1 / 4 + 12 / 0.25
    theta = (y.numpy().sum() / 0.25 / precision + precision**-0.5 * rng.normal(size=(4, 1000)))[..., None, None]
    posterior = xr.Dataset({"theta": (("chain", "draw", "row", "one"), theta)})
    tree = xr.DataTree.from_dict({"/posterior": posterior, "/log_likelihood": log_likelihood(problem, posterior)})
    value, error, shapes = ours.loo(tree)
    exact = 0.0
    for i in range(12):  # density of each y given the others
        others = np.delete(y.numpy().ravel(), i)
        left = 1 / 4 + 11 / 0.25
        mean, variance = others.sum() / 0.25 / left, 1 / left + 0.25
        exact -= 0.5 * ((y[0, i].item() - mean) ** 2 / variance + np.log(2 * np.pi * variance))
    assert abs(value - exact) < 0.05  # a Monte Carlo error of 12 terms of about 0.003 each
    assert error > 0
    assert shapes.max() < 0.7


def test_importing_inference_imports_no_torch_and_no_arviz():
    code = (
        "import sys, probmodels.inference as i; assert not {'torch', 'arviz', 'xarray'} & set(sys.modules); "
        "i.diagnose; assert 'arviz' not in sys.modules; assert 'run_mcmc' in dir(i)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        __import__("probmodels.inference").inference.nope  # noqa: B018
