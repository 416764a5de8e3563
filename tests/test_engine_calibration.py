"""The engines against exact posteriors, on models of many supports and handlers; calibration, with controls that fail.

Tolerances are Monte Carlo errors of the draws themselves: of their mean for means, of their squared deviations from
the exact mean for variances, of indicators at the exact quantile for quantiles, each from its effective sample size.
"""

from __future__ import annotations

import warnings
from functools import cache, partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from engine_models import CASES, LEVELS
from pyro import poutine
from scipy import stats

from probmodels.errors import ProblemError
from probmodels.guides import with_guide
from probmodels.inference import Problem, fit_svi, run_mcmc, sbc
from probmodels.inference.diagnostics.convergence import convergence
from probmodels.inference.mcmc.chees import ChEESKernel
from probmodels.inference.programs.potential import Potential

LIMIT = 4.0  # Monte Carlo errors
vectorised = partial(run_mcmc, num_chains=32, num_samples=40, warmup_steps=100, progress=False, seed=3)


@cache
def case_of(name, dtype=torch.float64):
    return CASES[name](dtype)


def distance(draws, exact, sd=None):
    """Distance of a mean of draws (chain, draw, ...) from its exact value, in Monte Carlo errors; ``sd`` if known."""
    spread = draws.std((0, 1), ddof=1)
    ess = np.square(spread / np.where(spread > 0, convergence(draws)["mcse_mean"], 1))
    ess = np.where(spread > 0, ess, draws.shape[0] * draws.shape[1])
    return np.max(np.abs(draws.mean((0, 1)) - exact) / (spread if sd is None else sd) * np.sqrt(ess))


def check(case, result):
    """Means, standard deviations and quantiles of all sites."""
    for name, mean in case.mean.items():
        draws = result.posterior[name].values.astype(np.float64)
        random = np.ones(mean.shape, dtype=bool) if name not in case.sd else case.sd[name] > 0
        np.testing.assert_allclose(draws[..., ~random], np.broadcast_to(mean[~random], draws[..., ~random].shape))
        draws, mean = draws[..., random], mean[random]
        assert distance(draws, mean) < LIMIT, name
        if name in case.sd:
            assert distance((draws - mean) ** 2, case.sd[name][random] ** 2) < LIMIT, name
        for level, value in zip(LEVELS, case.quantile[name], strict=True):
            below = (draws <= value[random]).astype(float)
            assert distance(below, level, np.sqrt(level * (1 - level))) < LIMIT, (name, level)


EACH = pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float64) for name in CASES] + [(name, torch.float32) for name in ("pairs", "panel")],
    ids=str,
)


@EACH
def test_vectorised_chains_find_the_exact_posterior(name, dtype):
    case = case_of(name, dtype)
    result = vectorised(case.problem)
    assert result.tree.attrs["kernel"] == "ChEESKernel"  # no fallback
    assert {str(result.posterior[site].dtype) for site in case.mean} == {str(dtype).removeprefix("torch.")}
    assert not result.tree["sample_stats"]["diverging"].any()
    check(case, result)


@pytest.mark.parametrize("name", ["regression", "normal_hierarchy"])
def test_nuts_finds_the_exact_posterior(name):
    options = {"chain_method": "sequential", "num_chains": 1, "num_samples": 160, "warmup_steps": 60}
    check(case_of(name), run_mcmc(case_of(name).problem, kernel="nuts", seed=2, progress=False, **options))


@pytest.mark.parametrize("metric", ["diagonal", "dense", "low_rank"])
def test_every_metric_leaves_a_correlated_posterior_exact(metric):
    case = case_of("normal_hierarchy")
    check(case, vectorised(case.problem, kernel="chees", kernel_options={"metric": metric}, seed=5))


@pytest.mark.parametrize("init", ["prior", "uniform"])  # others start by pathfinder
def test_starts_by_name_leave_the_posterior_exact(init):
    check(case_of("pairs"), vectorised(case_of("pairs").problem, init=init, seed=6))


@pytest.mark.parametrize(("name", "guide"), [("normal_mean", "mean_field"), ("normal_hierarchy", "full_rank")])
def test_a_guide_that_holds_the_posterior_finds_it_and_chains_start_from_it(name, guide):
    case = case_of(name)
    problem = with_guide(case.problem, guide, path_gradient=True)  # whose gradient has no noise at the posterior
    fit = fit_svi(problem, num_steps=2000, lr=0.05, lr_decay=0.01, num_samples=4000, progress=False)
    check(case, fit)
    assert float(fit.tree["sample_stats"]["log_weight"].std()) < 0.01  # log p - log q is constant
    check(case, vectorised(case.problem, init=fit, warmup_steps=100, seed=7))


def test_chains_of_a_reparametrised_model_start_from_draws_of_the_model_as_it_stands():
    case = case_of("funnel")
    values = {"log_scale": torch.tensor(0.7, dtype=torch.float64), "x": torch.tensor([1.0, -2.0, 0.0, 3.0]).double()}
    potential = Potential(case.problem)
    assert set(potential.slots) == {"log_scale", "x_decentered"}
    found = potential.export(potential.from_draw(values))
    for site, value in values.items():
        torch.testing.assert_close(found[site], value)
    rng = np.random.default_rng(0)
    log_scale = rng.normal(size=(1, 40))
    x = np.exp(log_scale)[..., None] * rng.normal(size=(1, 40, 4))
    draws = xr.Dataset({"log_scale": (("chain", "draw"), log_scale), "x": (("chain", "draw", "item"), x)})
    check(case, vectorised(case.problem, init=draws, num_samples=30, warmup_steps=100, seed=8))


# -- potentials --------------------------------------------------------------------------------------------------------


@EACH
def test_graph_of_all_chains_is_the_program_at_points_near_and_far(name, dtype):
    potential = Potential(case_of(name, dtype).problem)
    points = torch.as_tensor(np.random.default_rng(1).normal(0, 2, (6, potential.size)), dtype=dtype)
    with torch.no_grad(), pyro.validation_enabled(False), warnings.catch_warnings():
        warnings.simplefilter("error")  # as of operations that vmap runs entry by entry
        values, gradients = potential.batched(6)(points)
        wanted = [potential.evaluate(point) for point in points]
    precise = 1e-9 if dtype == torch.float64 else 2e-4
    scale = float(gradients.abs().max())
    torch.testing.assert_close(values, torch.stack([value for value, _ in wanted]), rtol=precise, atol=precise)
    torch.testing.assert_close(gradients, torch.stack([g for _, g in wanted]), rtol=precise, atol=precise * scale)


def scaled_mixture(y, scale):
    weight = pyro.sample("weight", dist.Beta(y.new_tensor(2.0), 2.0))
    with pyro.plate("row", len(y)), poutine.scale(scale=scale):
        which = pyro.sample("which", dist.Bernoulli(weight))
        pyro.sample("y", dist.Normal(2 * which, 1.0), obs=y)


def likelihood_scaled(y, scale):
    weight = pyro.sample("weight", dist.Beta(y.new_tensor(2.0), 2.0))
    with pyro.plate("row", len(y)):
        which = pyro.sample("which", dist.Bernoulli(weight))
        with poutine.scale(scale=scale):
            pyro.sample("y", dist.Normal(2 * which, 1.0), obs=y)


def test_scaled_data_are_repeated_data_also_where_discrete_sites_are_summed_out():
    y = torch.tensor([0.3, 1.9, -0.4], dtype=torch.float64)
    scaled = Potential(Problem("scaled", scaled_mixture, args=(y, 3.0)))
    repeated = Potential(Problem("repeated", scaled_mixture, args=(y.repeat(3), 1.0)))
    for point in (-1.0, 0.2, 1.5):
        z = torch.tensor([point], dtype=torch.float64)
        torch.testing.assert_close(scaled.evaluate(z), repeated.evaluate(z))
    with pytest.raises(ProblemError, match=r"'y' has another poutine.scale than what shares its discrete sites"):
        Potential(Problem("likelihood", likelihood_scaled, args=(y, 3.0)))


def ragged_model(y, kept, scale):
    mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 2.0))
    plates = pyro.plate("person", 2, dim=-2), pyro.plate("visit", 3, dim=-1)
    with plates[0], plates[1], poutine.mask(mask=kept), poutine.scale(scale=scale):
        x = pyro.sample("x", dist.Normal(mu, 1.0).expand([2]).to_event(1))
        pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_entries_that_are_masked_out_keep_their_density_and_change_no_other(scale):
    kept = torch.tensor([[True, True, False], [True, False, False]])
    y = torch.linspace(-1, 2, 12, dtype=torch.float64).reshape(2, 3, 2)
    potential = Potential(Problem("ragged", ragged_model, args=(y, kept, scale)))
    z = torch.as_tensor(np.random.default_rng(0).normal(size=potential.size))
    mu, x = z[0].numpy(), z[1:].reshape(2, 3, 2).numpy()
    own = stats.norm.logpdf(x, mu, 1)
    weight = np.where(kept, scale, 0.0)[..., None]
    wanted = (
        stats.norm.logpdf(mu, 0, 2)
        + (weight * (own + stats.norm.logpdf(y, x, 1))).sum()
        + (own * ~kept.numpy()[..., None]).sum()
    )
    assert float(potential.log_density(z)) == pytest.approx(wanted, rel=1e-12)


def flat_model(y):
    with poutine.mask(mask=False):
        x = pyro.sample("x", dist.Normal(y.new_zeros(()), 1.0))
    pyro.sample("y", dist.Normal(x, 2.0), obs=y)


def test_a_prior_that_is_masked_out_on_purpose_stays_flat():
    potential = Potential(Problem("flat", flat_model, args=(torch.tensor(3.0, dtype=torch.float64),)))
    value, gradient = potential.evaluate(torch.tensor([1.0], dtype=torch.float64))
    assert float(value) == pytest.approx(-stats.norm.logpdf(3, 1, 2))
    assert float(gradient) == pytest.approx(-0.5)


def subset_model(y):
    mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 2.0))
    with pyro.plate("row", len(y), subsample_size=2) as rows:
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y[rows])


def noisy_model(y):
    mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 2.0))
    pyro.sample("y", dist.Normal(mu + torch.rand(()), 1.0), obs=y[0])


def moving_model(y):
    top = pyro.sample("top", dist.Gamma(y.new_tensor(3.0), 1.0))
    pyro.sample("share", dist.Uniform(y.new_zeros(()), top))


def test_plates_that_engines_may_subsample_hold_all_rows():
    y = torch.linspace(-1, 2, 9, dtype=torch.float64)
    value, _ = Potential(Problem("all", subset_model, args=(y,), batch_plates=("row",))).evaluate(y[:1])
    wanted = stats.norm.logpdf(-1, 0, 2) + stats.norm.logpdf(y.numpy(), -1, 1).sum()
    assert float(value) == pytest.approx(-wanted)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (subset_model, r"plates \['row'\] hold random subsets of their rows; name them in batch_plates"),
        (noisy_model, "by pyro.sample"),
        (moving_model, "support of site 'share' moves with other sites"),
    ],
)
@pytest.mark.parametrize("kernel", [None, "nuts"])
def test_densities_that_are_no_function_of_the_sites_are_refused(model, message, kernel):
    problem = Problem("broken", model, args=(torch.linspace(-1, 2, 9, dtype=torch.float64),))
    with pytest.raises(ProblemError, match=message):
        run_mcmc(problem, kernel=kernel, chain_method="sequential" if kernel else None, num_samples=5, progress=False)


# -- calibration -------------------------------------------------------------------------------------------------------

SIZE, REPLICATES = 6, 60


def location_scale(y, factor=1.0):
    """Location and scale of every row of ``y`` (row, column)."""
    with pyro.plate("row", len(y), dim=-2):
        mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 1.0))
        sigma = pyro.sample("sigma", dist.LogNormal(y.new_zeros(()), 0.5))
        with pyro.plate("column", SIZE, dim=-1):
            pyro.sample("y", dist.Normal(mu, factor * sigma), obs=y)


class AcceptsAll(ChEESKernel):
    """Leapfrog at three times the step size that suits, and every proposal accepted that is a number."""

    def end_warmup(self):
        super().end_warmup()
        self._step *= 3

    def _leapfrog(self, momentum, steps):
        x, velocity, potential, slope = super()._leapfrog(momentum, steps)
        if self._count > self._warmup:  # as if the energy had not changed
            start = self._potential + 0.5 * momentum.square().sum(1)
            potential = torch.where(torch.isfinite(potential), start - 0.5 * velocity.square().sum(1), potential)
        return x, velocity, potential, slope


def simulate(rng):
    mu, sigma = rng.normal(), np.exp(0.5 * rng.normal())
    return {"mu": mu, "sigma": sigma}, rng.normal(mu, sigma, SIZE)


def calibrated(kernel="chees", factor=1.0):
    """Simulation-based calibration with all replicates as rows of one model, whose posterior is their product."""
    calibrate = partial(sbc, simulate, num_replicates=REPLICATES, num_draws=79, seed=1)
    data = []

    def note(y, seed):
        data.append(y)
        return xr.Dataset({"mu": (("chain", "draw"), np.zeros((1, 79)))})

    calibrate(note)
    problem = Problem("location and scale", location_scale, args=(torch.as_tensor(np.stack(data)), factor))
    found = vectorised(problem, kernel=kernel, init="prior").posterior.squeeze(drop=True)
    rows = {y.tobytes(): row for row, y in enumerate(data)}
    return calibrate(lambda y, seed: found.isel(row=rows[y.tobytes()]))


def test_vectorised_chains_are_calibrated():
    found = calibrated()
    assert found.ok, str(found)
    assert abs(float(found.table["90%"].mean()) - 0.9) < 4 * np.sqrt(0.09 / (2 * REPLICATES))


@pytest.mark.parametrize("wrong", [{"factor": 1.5}, {"kernel": AcceptsAll}], ids=["model", "kernel"])
def test_a_wrong_model_and_a_wrong_kernel_are_found_out(wrong):
    found = calibrated(**wrong)
    assert not found.ok, str(found)
