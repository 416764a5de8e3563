"""The boundary to ArviZ, and our own statistics against it."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import xarray as xr
from inference_models import data, normal_model

from probmodels.inference import Problem, Result, compare, loo as our_loo
from probmodels.inference.diagnostics.comparison import _relative_efficiency
from probmodels.inference.diagnostics.convergence import bfmi, convergence, psis
from probmodels.inference.diagnostics.report import summarize
from probmodels.inference.predictive import log_likelihood


@pytest.fixture(scope="module")
def ours():
    from probmodels.inference.diagnostics import _arviz

    return _arviz


@pytest.fixture(scope="module")
def tails(ours):
    """Relative difference that tails allow: arviz 1.x cuts them off one draw later."""
    return 0.1 if ours.ARVIZ_1 else 1e-8


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


def test_bfmi_and_psis_equal_arviz(ours, tails):
    rng = np.random.default_rng(0)
    energy = rng.normal(size=(3, 400)).cumsum(1)
    np.testing.assert_allclose(bfmi(energy), ours.bfmi(energy), rtol=1e-10)
    for scale in (0.1, 1.0, 3.0):
        weights = scale * rng.standard_t(4, size=1000)
        smoothed, khat = psis(weights)
        theirs, their_khat = ours.psis(weights)
        assert khat == pytest.approx(their_khat, rel=tails, abs=tails)
        np.testing.assert_allclose(smoothed, theirs, atol=tails)


@pytest.fixture(scope="module")
def fitted():
    """Exact draws of a conjugate model with one outlier, and their pointwise log likelihood."""
    y = data(12)
    y[3] = 4.0
    problem = Problem("rows", normal_model, args=(y.reshape(1, 12),))
    precision = 1 / 4 + 12 / 0.25
    noise = np.random.default_rng(0).normal(size=(4, 1000))
    theta = (float(y.sum()) / 0.25 / precision + precision**-0.5 * noise)[..., None, None]
    posterior = xr.Dataset({"theta": (("chain", "draw", "row", "one"), theta)})
    tree = xr.DataTree.from_dict({"/posterior": posterior, "/log_likelihood": log_likelihood(problem, posterior)})
    return Result(tree)


def test_loo_equals_arviz(ours, tails, fitted):
    mine = our_loo(fitted)
    r_eff = _relative_efficiency(fitted.tree["log_likelihood"]["y"].transpose("chain", "draw", ...).values)
    value, error, shapes = ours.loo(fitted.tree, r_eff=r_eff)
    assert mine.elpd == pytest.approx(value, rel=tails / 100)
    assert mine.se == pytest.approx(error, rel=tails / 100)
    np.testing.assert_allclose(mine.khat["y"].values.ravel(), shapes.ravel(), rtol=tails, atol=tails)


@pytest.mark.parametrize(("method", "theirs"), [("stacking", "stacking"), ("pseudo_bma", "BB-pseudo-BMA")])
def test_comparison_equals_arviz(ours, fitted, method, theirs):
    rng = np.random.default_rng(1)
    results = {"a": fitted}
    for name, shift in (("b", 0.3), ("c", -0.2)):
        tree = fitted.tree.copy()
        terms = fitted.tree["log_likelihood"].to_dataset()
        tree["log_likelihood"] = terms + shift * xr.DataArray(rng.normal(size=12), dims="column")
        results[name] = Result(tree)
    mine = compare(results, method=method).table
    table = ours.compare({name: found.tree for name, found in results.items()}, method=theirs).loc[mine.index]
    np.testing.assert_allclose(mine["elpd"], table["elpd"], rtol=1e-3)  # another r_eff
    np.testing.assert_allclose(mine["diff_se"], np.sqrt(12 / 11) * table["diff_se"], atol=0.02)
    # Their stacking stops early, and a bootstrap of 1000 scatters by 0.5 / sqrt(1000) at most.
    np.testing.assert_allclose(mine["weight"], table["weight"], atol=0.01 if method == "stacking" else 0.07)


def test_importing_inference_imports_no_torch_and_no_arviz():
    code = (
        "import sys, probmodels.inference as i; assert not {'torch', 'arviz', 'xarray'} & set(sys.modules); "
        "i.diagnose; assert 'arviz' not in sys.modules; assert 'run_mcmc' in dir(i)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    with pytest.raises(AttributeError, match=r"attribute .?nope"):
        __import__("probmodels.inference").inference.nope  # noqa: B018
