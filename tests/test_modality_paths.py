"""Bridge as a path, and the posterior of weights given the towers: against closed forms, grids and simulated truth."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from pyro import poutine
from torch import Tensor

from probmodels import Result, diagnose, fit_svi, run_mcmc
from probmodels.datasets.paired.views import make_views
from probmodels.errors import DataError, ResultError
from probmodels.inference.diagnostics.report import summarize
from probmodels.inference.predictive import log_likelihood
from probmodels.inference.problem import Problem
from probmodels.inference.runtime.ops import isolated
from probmodels.modality_structure import make_problem, tiny, weights_problem
from probmodels.modality_structure.paths import path_site, sample_path
from probmodels.modality_structure.structures import bridge_covariance, sample_bridge

CHAINS: Any = {"num_chains": 8, "num_samples": 250, "warmup_steps": 200, "progress": False}


def views(num_rows: int, seed: int = 0, noise: float = 0.3, **options: Any) -> Any:
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=(num_rows, 3))
    a, b = rng.normal(size=(2, 3, 6))
    noises = noise * rng.normal(size=(2, num_rows, 6))
    return make_views({"image": shared @ a + noises[0], "text": shared @ b + noises[1]}, **options)


def test_the_path_has_the_density_of_a_multivariate_normal() -> None:
    torch.manual_seed(0)
    ends: tuple[Tensor, Tensor] = (torch.randn(5, 4).double(), torch.randn(5, 4).double())
    points = torch.randn(5, 3, 4).double()
    steps, scale = torch.tensor([0.2, 0.35, 0.05, 0.4]).double(), torch.tensor(0.7).double()
    seen = torch.tensor([True, True, False, True, True])
    with poutine.trace() as trace:
        path_site("path", points, ends, (steps, scale), seen)
    trace.trace.compute_log_prob()
    times = steps[:-1].cumsum(0)
    mean = (1 - times).unsqueeze(-1) * ends[0].unsqueeze(1) + times.unsqueeze(-1) * ends[1].unsqueeze(1)
    law = dist.MultivariateNormal(torch.zeros(3).double(), scale**2 * bridge_covariance(times))
    expected = law.log_prob((points - mean).transpose(1, 2))[seen].sum()
    assert float(trace.trace.log_prob_sum()) == pytest.approx(float(expected), rel=1e-6)


def path_problem(points: Tensor, start: Tensor, end: Tensor) -> Problem:
    """Times and scale of given paths."""

    def model() -> None:
        path = sample_path(points.shape[1], 0.25, points)
        path_site("path", points, (start, end), path, torch.ones(len(points), dtype=torch.bool))

    return Problem("paths", model)


def test_times_and_scale_of_simulated_paths_are_recovered() -> None:
    torch.manual_seed(1)
    times, scale = torch.tensor([0.15, 0.4, 0.8]), 0.6
    start, end = F.normalize(torch.randn(2, 60, 8), dim=-1)
    unit = sample_bridge(start * 0, end * 0, times)
    line = start.unsqueeze(1) + times.unsqueeze(-1) * (end - start).unsqueeze(1)
    result = run_mcmc(path_problem(line + scale * unit, start, end), **CHAINS)
    assert diagnose(result).ok, str(diagnose(result))
    found = result.posterior["path_steps"].cumsum("path_step").isel(path_step=slice(0, 3))
    error = (found.mean(("chain", "draw")) - times.numpy()) / found.std(("chain", "draw"))
    assert (abs(error) < 3.5).all()
    assert (found.std(("chain", "draw")) < 0.05).all()
    drawn = result.posterior["path_scale"]
    assert abs(float(drawn.mean()) - scale) < 3.5 * float(drawn.std()) < 0.1
    # Control: points that lie on no bridge between their ends have a scale that is not that of the noise.
    moved = run_mcmc(path_problem(line.flip(0) + scale * unit, start, end), **CHAINS)
    assert float(moved.posterior["path_scale"].mean()) > float(drawn.mean()) + 5 * float(drawn.std())


def fit(data: Any, lr: float = 0.005, **options: Any) -> Result:
    problem = make_problem(data, size=4, hidden=16, **options)
    return fit_svi(problem, num_steps=120, lr=lr, num_samples=10, progress=False)


def log_joint(problem: Problem, **values: Tensor) -> Tensor:
    """Log densities of all sites for each of many values (point, ...), one after the other."""
    found = []
    with isolated(seed=0), torch.no_grad():
        for point in zip(*values.values(), strict=True):
            given = dict(zip(values, point, strict=True))
            found.append(poutine.trace(poutine.condition(problem.model, given)).get_trace(*problem.args).log_prob_sum())
    return torch.stack(found)


def moments(weight: Tensor, value: Tensor) -> tuple[float, float]:
    mean = float((weight * value).sum())
    return mean, math.sqrt(float((weight * (value - mean).square()).sum()))


def agree(result: Result, name: str, weight: Tensor, value: Tensor) -> None:
    """Check mean and sd of the logarithm against those of a grid, within four Monte Carlo errors."""
    drawn = np.log(result.posterior[name].values).ravel()
    mean, sd = moments(weight, value)
    error = sd / math.sqrt(float(summarize(np.log(result.posterior[[name]])).loc[name, "ess_bulk"]))
    assert abs(drawn.mean() - mean) < 4 * error
    assert abs(drawn.std() - sd) < 4 * error
    assert error < 0.1 * sd


def test_the_posterior_of_the_temperature_is_that_of_a_grid() -> None:
    fitted = fit(views(80, held_out=0.4))
    problem = weights_problem(fitted, split="test")
    result = run_mcmc(problem, **CHAINS)
    assert diagnose(result).ok, str(diagnose(result))
    model: Any = problem.model
    (v, _), (t, _) = model.held.z.values()
    grid = torch.linspace(math.log(0.005), math.log(2), 400).double()
    value = []
    for log_tau in grid:  # in plain torch
        logits = v @ t.T / log_tau.exp()
        loss = F.cross_entropy(logits, torch.arange(len(v)), reduction="sum")
        loss = loss + F.cross_entropy(logits.T, torch.arange(len(v)), reduction="sum")
        value.append(-loss - 0.5 * (log_tau - math.log(0.1)) ** 2)
    weight = torch.stack(value).softmax(0)
    agree(result, "temperature", weight, grid)
    # Control: towers of shuffled pairs leave a temperature at which nothing is sure.
    model.held = model.held._replace(z=dict(model.held.z, text=(t.roll(1, 0), None)))
    shuffled = run_mcmc(problem, **CHAINS)
    assert float(shuffled.posterior["temperature"].median()) > 3 * float(result.posterior["temperature"].median())


def test_the_posterior_of_a_weight_and_a_path_is_that_of_a_grid() -> None:
    fitted = fit(views(40), temperature=0.2, consistency=0.05, path=1)
    problem = weights_problem(fitted, inferred=["consistency"])
    assert set(problem.names("latent")) == {"temperature", "weight_consistency", "path_scale", "path_steps"}
    result = run_mcmc(problem, **CHAINS)
    assert diagnose(result).ok, str(diagnose(result))
    model: Any = problem.model
    (v, _), (t, _) = model.held.z.values()
    num = len(v)
    # Given the towers the weight depends on nothing else: its logarithm has a density in one dimension.
    squares = (v @ t.T - t @ v.T).square().sum() + (v @ v.T - t @ t.T).square().sum()
    log_weight = torch.linspace(math.log(1e-3), math.log(1e4), 4000).double()
    value = num * (num - 1) * log_weight / 2 - log_weight.exp() * squares
    value = value - 0.5 * (log_weight - math.log(0.05)) ** 2
    agree(result, "weight_consistency", value.softmax(0), log_weight)
    # Time and scale in two dimensions.
    log_scale, time = torch.meshgrid(
        torch.linspace(math.log(0.02), math.log(5), 300).double(),
        torch.linspace(0.005, 0.995, 199).double(),
        indexing="ij",
    )
    points = model.held.points["image"].squeeze(1)
    off = (points - v, t - v)  # squared distance to the line is a quadratic in the time
    square = off[0].square().sum() - 2 * time * (off[0] * off[1]).sum() + time**2 * off[1].square().sum()
    variance = (2 * log_scale).exp() * time * (1 - time)
    value = -0.5 * square / variance - 0.5 * points.numel() * variance.log()
    value = value - 0.5 * (log_scale - math.log(0.25)) ** 2 + (time * (1 - time)).log()
    weight = value.flatten().softmax(0)
    agree(result, "path_scale", weight, log_scale.flatten())
    first = result.posterior["path_steps"].isel(path_step=0)
    mean, sd = moments(weight, time.flatten())
    assert abs(float(first.mean()) - mean) < 0.2 * sd
    assert abs(float(first.std()) - sd) < 0.2 * sd
    # The same by the program itself, at a few places.
    some = {
        "temperature": torch.full((3,), 0.2).double(),
        "weight_consistency": torch.full((3,), 0.05).double(),
        "path_scale": torch.tensor([0.1, 0.25, 1.0]).double(),
        "path_steps": torch.tensor([[0.2, 0.8], [0.5, 0.5], [0.9, 0.1]]).double(),
    }
    places = [(s.log(), x[0]) for s, x in zip(some["path_scale"], some["path_steps"], strict=True)]
    plain = []
    for s, x in places:
        variance = (2 * s).exp() * x * (1 - x)
        square = off[0].square().sum() - 2 * x * (off[0] * off[1]).sum() + x**2 * off[1].square().sum()
        plain.append(-0.5 * square / variance - 0.5 * points.numel() * variance.log())
        plain[-1] = plain[-1] - 0.5 * (s - math.log(0.25)) ** 2 - s + (x * (1 - x)).log()
    found, expected = log_joint(problem, **some), torch.stack(plain)
    torch.testing.assert_close(found - found[0], expected - expected[0], rtol=1e-6, atol=1e-5)


def test_log_likelihoods_of_all_sites_are_there_for_both_engines() -> None:
    problem = tiny()
    result = fit_svi(problem, num_steps=3, num_samples=3, progress=False)
    terms = result.add("log_likelihood", problem).group("log_likelihood")
    assert set(terms.data_vars) == set(problem.names("observed"))
    assert {"path_image_to_text", "bridge_image_to_text", "contrast_sound", "match_image_to_text"} <= set(terms)
    held = weights_problem(result)
    chains = run_mcmc(held, num_chains=2, num_samples=4, warmup_steps=4, progress=False)
    drawn = log_likelihood(held, chains.posterior)
    fused = {name for name in terms.data_vars if name.startswith(("fused_", "masked_"))}
    assert fused  # depend on none of what chains draw
    assert set(drawn.data_vars) == set(terms.data_vars) - fused
    assert all(np.isfinite(drawn[name].values).all() for name in drawn)
    # A site to the power of its weight has that power of its log density.
    model: Any = held.model
    z, near = (part["sound"][1] for part in (model.held.z, model.held.near))
    seen = held.args[0][:, 2]
    logits = (z @ near.T)[seen][:, seen] / float(chains.posterior["temperature"][0, 0])
    loss = F.cross_entropy(logits, torch.arange(len(logits)), reduction="sum")
    assert float(drawn["contrast_sound"][0, 0]) == pytest.approx(-0.25 * float(loss), rel=1e-4)


def test_a_path_is_fitted_with_towers_and_a_scale_far_from_its_prior_fails() -> None:
    data = views(120, held_out=0.3)
    near = fit(data, path=3)
    assert "the scale of the path is" in str(diagnose(near))
    assert near.posterior["path_steps"].sizes["path_step"] == 4
    held = weights_problem(fit(data), path=2)
    assert held.sites["path_image_to_text"].shape == (84, 2, 4)
    assert held.sites["path_steps"].shape == (3,)
    far = diagnose(fit(data, lr=0.05, path=3, path_scale=20.0))
    assert far.inference == "failed"
    assert "in place of path" in str(far)
    collapsed = diagnose(fit(data, lr=0.05, path=3))  # the path outweighs the matching
    assert not collapsed.ok
    assert "no better than by chance" in str(collapsed)


def test_wrong_requests_are_refused() -> None:
    data = views(40)
    with pytest.raises(DataError, match="path_scale"):
        make_problem(data, path_scale=0.5)
    result = fit_svi(make_problem(data), num_steps=2, num_samples=2, progress=False)
    with pytest.raises(ResultError, match="'bridge', which the fit left out"):
        weights_problem(result, inferred=["bridge"])
    with pytest.raises(ResultError, match="take more rows"):
        weights_problem(result, max_rows=1)

    def coin() -> None:
        pyro.sample("p", dist.Beta(torch.tensor(1.0), torch.tensor(1.0)))
        pyro.sample("x", dist.Bernoulli(torch.tensor(0.5)), obs=torch.tensor(1.0))

    other = run_mcmc(Problem("coin", coin), num_chains=2, num_samples=4, warmup_steps=4, progress=False)
    with pytest.raises(ResultError, match="'coin'"):
        weights_problem(other)
