"""Parts of the posterior that a guide lacks: annealed draws find them."""

from __future__ import annotations

from dataclasses import replace

import lost_modes
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import textbook
import torch
from pyro import poutine

from probmodels.errors import ProblemError, ResultError
from probmodels.guides import with_guide
from probmodels.inference import (
    Problem,
    VarGrad,
    check_modes,
    diagnose,
    enumerate_posterior,
    fit_svi,
    importance_resample,
    run_mcmc,
    with_fixed_sites,
)
from probmodels.inference.flows.annealing import anneal
from probmodels.inference.flows.density import Density
from probmodels.inference.programs.traces import shared_plates
from probmodels.inference.result import Result
from probmodels.inference.runtime.ops import isolated

ALL = {**textbook.PROBLEMS, **lost_modes.PROBLEMS}


@pytest.mark.parametrize("name", ALL)
def test_annealing_gives_the_evidence_of_enumeration(name: str) -> None:
    problem = with_fixed_sites(ALL[name])
    exact = enumerate_posterior(problem)["log_evidence"].values
    with isolated(seed=1):
        frames = shared_plates(poutine.trace(problem.model).get_trace(*problem.args))
        density = Density(problem, problem.model, frames, 1000)
        log_weight = anneal(density).log_weight.numpy()
    assert density.captured
    weight = np.exp(log_weight - log_weight.max(0))
    error = weight.std(0) / weight.mean(0) / np.sqrt(len(weight))
    assert error.max() < 0.1
    assert (np.abs(log_weight.max(0) + np.log(weight.mean(0)) - exact) < 4 * error).all()


@pytest.mark.parametrize("name", lost_modes.PROBLEMS)
def test_a_lost_mode_fails_and_the_whole_posterior_passes(name: str) -> None:
    problem = lost_modes.PROBLEMS[name]
    exact = enumerate_posterior(problem)
    site = problem.names("latent")[0]
    kept = float(exact["probability"].values @ lost_modes.FIRST_MODE[name](exact[site].values))
    _, lost = lost_modes.fit(problem, lost_modes.ExactGuide(problem, lost_modes.FIRST_MODE[name]))
    report = diagnose(lost)
    assert report.inference == "failed"
    assert "misses at least" in str(report)
    modes = lost.group("modes")
    assert abs(float(modes["missed"]) - (1 - kept)) < 4 * float(modes["missed_mcse"])
    gap = float(modes["log_evidence"] - modes["guide_log_evidence"])
    assert abs(gap + np.log(kept)) < 4 * float(modes["mcse"])
    assert diagnose(importance_resample(lost)).inference == "failed"
    assert diagnose(lost_modes.fit(problem, lost_modes.ExactGuide(problem))[1]).inference == "passed"


@pytest.mark.parametrize("name", textbook.PROBLEMS)
def test_exact_guides_pass(name: str) -> None:
    problem = with_fixed_sites(textbook.PROBLEMS[name])
    _, result = lost_modes.fit(problem, lost_modes.ExactGuide(problem))
    assert "modes" in result.tree.children
    report = diagnose(result)
    assert report.inference == "passed", str(report)
    assert float(result.group("modes")["distance"].max()) < 0.03


def two_means(y: torch.Tensor) -> None:
    """A mean of unknown sign."""
    mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 3.0))
    with pyro.plate("obs", len(y)):
        pyro.sample("y", dist.Normal(mu.abs(), 1.0), obs=y)


def shifted(y: torch.Tensor) -> None:
    """One of two sources, and its strength: discrete and continuous sites that depend on each other."""
    z = pyro.sample("z", dist.Bernoulli(0.5))
    mu = pyro.sample("mu", dist.Normal(4 * z - 2, 1.0))
    with pyro.plate("obs", len(y)):
        pyro.sample("y", dist.Normal(mu.abs(), 1.0), obs=y)


Y = torch.tensor([2.2, 1.7, 2.9, 1.8])


def test_continuous_modes_are_found_by_the_evidence() -> None:
    problem = Problem("two_means", two_means, args=(Y,))
    guided = with_guide(problem, "mean_field", init={"mu": 2.0})
    result = fit_svi(guided, num_steps=400, lr=0.05, lr_decay=0.05, num_samples=1000, progress=False)
    before = diagnose(result)
    assert before.inference == "passed"
    assert "check_modes(problem, result)" in str(before)
    modes = check_modes(guided, result, num_particles=500)
    assert abs(float(modes["log_evidence"] - modes["guide_log_evidence"]) - np.log(2)) < 0.2
    assert abs(float((modes["log_weight"].pipe(np.exp) * (modes["mu"] > 0)).sum()) - 0.5) < 0.1
    assert diagnose(result).inference == "failed"


def test_mixed_sites_and_their_evidence() -> None:
    problem = Problem("shifted", shifted, args=(Y,))
    grid = torch.linspace(-12, 12, 20001, dtype=torch.float64)
    like = dist.Normal(grid.abs()[:, None], 1.0).log_prob(Y.double()).sum(1)
    exact = sum((dist.Normal(4 * z - 2, 1.0).log_prob(grid) + like).exp().sum() * 0.5 for z in (0.0, 1.0))
    guided = with_guide(problem, "gflownet")
    result = fit_svi(guided, num_steps=1, num_samples=200, progress=False)
    assert "modes" not in result.tree.children
    modes = check_modes(guided, result, num_particles=1000)
    log_exact = float((exact * (grid[1] - grid[0])).log())
    assert abs(float(modes["log_evidence"]) - log_exact) < 4 * float(modes["mcse"]) < 0.4
    assert float(modes["missed"]) >= 0.0  # a policy has a density of continuous sites as well


def test_equal_seeds_give_equal_numbers() -> None:
    problem, result = lost_modes.fit(
        lost_modes.PROBLEMS["magnet"], lost_modes.ExactGuide(lost_modes.PROBLEMS["magnet"])
    )
    first, second, other = (check_modes(problem, result, num_particles=200, seed=seed) for seed in (3, 3, 4))
    assert first.identical(second)
    assert not first.equals(other)


def test_results_keep_what_was_found(tmp_path: object) -> None:
    _, result = lost_modes.fit(lost_modes.PROBLEMS["magnet"], lost_modes.ExactGuide(lost_modes.PROBLEMS["magnet"]))
    result.save(tmp_path)
    again = Result.load(tmp_path)
    assert str(diagnose(again)) == str(diagnose(result))
    assert again.group("modes").equals(result.group("modes"))


def test_annealing_that_found_too_little_does_not_pass_a_guide() -> None:
    _, result = lost_modes.fit(lost_modes.PROBLEMS["magnet"], lost_modes.ExactGuide(lost_modes.PROBLEMS["magnet"]))
    result.tree["modes"]["ess"] = 12.0
    report = diagnose(result)
    assert "annealing found too little" in str(report)
    assert "lacks no more" not in str(report)


def test_a_rare_value_drawn_too_often_does_not_fail_a_guide_that_is_close() -> None:
    def model() -> None:
        pyro.sample("rare", dist.Bernoulli(1e-6))
        pyro.sample("even", dist.Bernoulli(0.5))

    def guide() -> None:
        pyro.sample("rare", dist.Bernoulli(0.003))
        pyro.sample("even", dist.Bernoulli(logits=pyro.param("logit", torch.tensor(0.0))))

    problem = Problem("rare", model, guide, loss=VarGrad(2))
    result = fit_svi(problem, num_steps=1, lr=1e-12, num_samples=1000, progress=False)
    assert 0 < float(result.posterior["rare"].sum()) < 10
    assert diagnose(result).inference == "passed"


def test_a_distance_that_its_error_leaves_open_is_not_judged() -> None:
    _, result = lost_modes.fit(lost_modes.PROBLEMS["magnet"], lost_modes.ExactGuide(lost_modes.PROBLEMS["magnet"]))
    for distance, verdict in ((0.05, "passed"), (0.095, "not judged"), (0.15, "failed")):
        result.tree["modes"]["distance"] = distance
        result.tree["modes"]["distance_mcse"] = 0.01
        assert diagnose(result).inference == verdict


def coins() -> None:
    with pyro.plate("coin", 400):
        pyro.sample("z", dist.Bernoulli(0.5))


def test_large_models_are_not_looked_into_unasked() -> None:
    problem = Problem("coins", coins)
    guided = replace(problem, guide=with_guide(problem, "gflownet").guide, loss=VarGrad())
    result = fit_svi(guided, num_steps=1, num_samples=50, progress=False)
    assert float(result.group("modes")["missed"].max()) == 0.0  # rows are independent, each of one element

    def tied() -> None:
        coins_sum = pyro.sample("z", dist.Bernoulli(0.5).expand([100]).to_event(1)).sum()
        pyro.factor("even", -0.001 * coins_sum)

    guided = with_guide(Problem("tied", tied), "gflownet")
    result = fit_svi(guided, num_steps=1, num_samples=50, progress=False)
    assert "modes" not in result.tree.children


def counts() -> None:
    pyro.sample("n", dist.Poisson(3.0))


def test_refusals() -> None:
    def guide() -> None:
        pyro.sample("n", dist.Poisson(pyro.param("rate", torch.tensor(3.0))))

    problem = Problem("counts", counts, guide, loss=VarGrad(2))
    result = fit_svi(problem, num_steps=1, num_samples=50, progress=False)
    with pytest.raises(ProblemError, match="no finite list of values"):
        check_modes(problem, result)
    with pytest.raises(ProblemError, match="num_particles=3"):
        check_modes(problem, result, num_particles=3)
    chains = run_mcmc(Problem("two_means", two_means, args=(Y,)), num_samples=5, warmup_steps=5, progress=False)
    with pytest.raises(ResultError, match="no guide"):
        check_modes(Problem("two_means", two_means, args=(Y,)), chains)
