"""The boundary to ArviZ, and our own statistics against it."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from inference_models import auto_guide, data, normal_model

from probmodels.inference import Problem, Result, compare, fit_svi, importance_resample, loo as our_loo, run_mcmc
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


def groups_model(y: torch.Tensor) -> None:
    """Means of three groups around a common one; y (group, obs)."""
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with pyro.plate("group", y.shape[0], dim=-2):
        theta = pyro.sample("theta", dist.Normal(mu, 0.5))
        with pyro.plate("obs", y.shape[1], dim=-1):
            pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def pooled_model(y: torch.Tensor) -> None:
    """One mean of all groups."""
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with pyro.plate("group", y.shape[0], dim=-2), pyro.plate("obs", y.shape[1], dim=-1):
        pyro.sample("y", dist.Normal(mu, sigma), obs=y)


GROUPS = torch.tensor([[-1.0], [0.0], [1.0]]) + torch.linspace(-0.6, 0.6, 8)


def groups_problem(model=groups_model, **changes) -> Problem:
    coords = {"group": ["a", "b", "c"]}
    return Problem(**{"name": model.__name__, "model": model, "args": (GROUPS,), "coords": coords, **changes})


def filled(problem: Problem, engine: str) -> Result:
    """A result with all groups that ArviZ knows."""
    if engine == "mcmc":
        options = {"num_chains": 2, "chain_method": "sequential", "num_samples": 60, "warmup_steps": 60}
        result = run_mcmc(problem, progress=False, **options)
    else:
        result = fit_svi(problem, num_steps=200, lr=0.05, num_samples=120, progress=False)
    return result.add("log_likelihood", problem).add("posterior_predictive", problem).add("prior", problem)


@pytest.fixture(scope="module", params=["mcmc", "svi"])
def complete(request):
    return filled(groups_problem(guide=auto_guide(groups_model)), request.param)


@pytest.fixture(scope="module")
def pooled():
    return filled(groups_problem(pooled_model), "mcmc")


def num_panels(found) -> int:
    """Axes of a figure of either arviz."""
    figure = found.viz["figure"].item() if hasattr(found, "viz") else np.ravel(found)[0].figure
    return len(figure.axes)


CALLS = {
    "summary": lambda az, x: az.summary(x),
    "ess": lambda az, x: az.ess(x),
    "rhat": lambda az, x: az.rhat(x),
    "loo": lambda az, x: az.loo(x),
    "plot_trace": lambda az, x: az.plot_trace(x),
    "plot_rank": lambda az, x: az.plot_rank(x, **({"method": "envelope"} if hasattr(az, "plot_ppc_dist") else {})),
    "plot_forest": lambda az, x: az.plot_forest(x, var_names=["mu", "theta"]),
    "plot_pair": lambda az, x: az.plot_pair(x, var_names=["mu", "sigma"]),
    "plot_ppc": lambda az, x: az.plot_ppc(x) if hasattr(az, "plot_ppc") else az.plot_ppc_dist(x),
    "plot_ppc of the prior": lambda az, x: (
        az.plot_ppc(x, group="prior") if hasattr(az, "plot_ppc") else az.plot_ppc_dist(x, group="prior_predictive")
    ),
}


@pytest.mark.filterwarnings("ignore")  # of arviz, about itself
@pytest.mark.parametrize("name", CALLS)
def test_arviz_takes_what_results_give(complete, name, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    import arviz as az

    found = CALLS[name](az, complete.to_arviz())
    if name == "summary":
        assert set(found.index) == {"mu", "sigma", *(f"theta[{x}, 0]" for x in "abc")}
    elif name == "loo":
        assert found.n_data_points == GROUPS.numel()
    elif name in ("ess", "rhat"):
        found = found if isinstance(found, xr.Dataset) else found.to_dataset()
        assert set(found.data_vars) == {"mu", "sigma", "theta"}
    else:
        assert num_panels(found) >= 1
    import matplotlib.pyplot as plt

    plt.close("all")


@pytest.mark.filterwarnings("ignore")
def test_arviz_compares_results_and_draws_energies(complete, pooled):
    import arviz as az
    import matplotlib.pyplot as plt

    table = az.compare({"groups": complete.to_arviz(), "pooled": pooled.to_arviz()})
    assert list(table.index) == ["groups", "pooled"]
    assert num_panels(az.plot_energy(pooled.to_arviz())) >= 1
    plt.close("all")


def test_groups_that_are_added_hold_what_they_should(complete, tmp_path):
    loaded = Result.load(complete.save(tmp_path))
    for result in (complete, loaded):
        sizes = dict(result.posterior.sizes)
        terms = result.group("log_likelihood")["y"]
        assert terms.dims == ("chain", "draw", "group", "obs")
        theta, sigma = result["theta"].values.reshape(sizes["chain"], sizes["draw"], 3, 1), result["sigma"].values
        wanted = dist.Normal(torch.tensor(theta), torch.tensor(sigma)[..., None, None]).log_prob(GROUPS).numpy()
        np.testing.assert_allclose(terms, wanted, rtol=1e-4, atol=1e-4)
        assert result.group("posterior_predictive")["y"].shape == terms.shape
        prior, predictive = result.group("prior"), result.group("prior_predictive")
        assert set(prior) == {"mu", "sigma", "theta"}
        assert set(predictive) == {"y"}
        assert prior["mu"].shape == (1, 500)
        assert abs(float(prior["mu"].std()) / 2 - 1) < 4.5 / np.sqrt(1000)


def trained_model(y: torch.Tensor) -> None:
    """The scale is a parameter."""
    scale = pyro.param("scale", torch.ones(()), constraint=dist.constraints.positive)
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("obs", len(y)):
        pyro.sample("y", dist.Normal(mu, scale), obs=y)


def test_groups_have_the_parameters_that_were_fitted():
    y = 0.1 * torch.linspace(-1.0, 1.0, 20)
    problem = Problem("trained", trained_model, guide=auto_guide(trained_model), args=(y,))
    result = fit_svi(problem, num_steps=400, lr=0.05, num_samples=300, progress=False)
    scale = float(result.params()["scale"])
    assert scale < 0.2
    mu = result["mu"].values[..., None]
    wanted = dist.Normal(torch.tensor(mu), scale).log_prob(y).numpy()
    added = result.add("log_likelihood", problem).add("posterior_predictive", problem).add("prior", problem)
    np.testing.assert_allclose(added.group("log_likelihood")["y"], wanted, rtol=1e-4)
    assert our_loo(result, problem).elpd == pytest.approx(our_loo(added).elpd)
    spread = float((added.group("posterior_predictive")["y"] - result["mu"]).std())
    assert abs(spread / scale - 1) < 4.5 / np.sqrt(2 * 6000)
    resampled = importance_resample(result, 100)
    assert resampled.params()["scale"] == result.params()["scale"]
    spread = float((resampled.predict(problem)["y"] - resampled["mu"]).std())
    assert abs(spread / scale - 1) < 4.5 / np.sqrt(2 * 2000)
    spread = float((added.group("prior_predictive")["y"] - added.group("prior")["mu"]).std())
    assert abs(spread / scale - 1) < 4.5 / np.sqrt(2 * 10000)
