"""What every method has to do, on its own tiny problem; a new row in METHODS is tested unedited."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from probmodels import METHODS, Problem, Result, fit_svi, get_method, run_mcmc

ALL = sorted(METHODS)


@pytest.fixture(params=ALL, scope="module")
def problem(request: pytest.FixtureRequest) -> Problem:
    return get_method(request.param).tiny()


def sampled(problem: Problem, seed: int = 0) -> Result:
    return run_mcmc(
        problem, num_samples=20, warmup_steps=10, num_chains=2, seed=seed, chain_method="sequential", progress=False
    )


def fitted(problem: Problem, seed: int = 0) -> Result:
    if problem.guide is None:
        pytest.skip(f"{problem.name} has no guide")
    return fit_svi(problem, num_steps=10, num_samples=20, seed=seed, progress=False)


@pytest.fixture(params=["mcmc", "svi"], scope="module")
def result(request: pytest.FixtureRequest, problem: Problem) -> Result:
    applies = getattr(get_method(problem.name), "ENGINES", ("mcmc", "svi"))
    if request.param not in applies:
        pytest.skip(f"{problem.name} is made for {applies}")
    return {"mcmc": sampled, "svi": fitted}[request.param](problem)


@pytest.mark.parametrize("name", ALL)
def test_a_method_names_its_source(name: str) -> None:
    assert "http" in get_method(name).REFERENCE


def test_problem_is_valid(problem: Problem) -> None:
    assert problem.validate() is problem


def test_draws_are_finite_and_labelled(problem: Problem, result: Result) -> None:
    posterior = result.posterior
    for name, site in problem.sites.items():
        if site.kind != "latent":
            continue
        assert posterior[name].dims == ("chain", "draw", *site.dims)
        assert np.isfinite(posterior[name].values).all()
    for dim, labels in problem.coords.items():
        if dim in posterior.dims:
            np.testing.assert_array_equal(posterior[dim].values, np.asarray(labels))


def test_seeds_reproduce_and_differ(problem: Problem, result: Result) -> None:
    again = sampled if result.tree.attrs["engine"] == "mcmc" else fitted
    assert again(problem).posterior.identical(result.posterior)
    assert not again(problem, seed=1).posterior.equals(result.posterior)


def test_a_gradient_reaches_every_parameter(problem: Problem) -> None:
    start = fitted(problem).params()
    end = fit_svi(problem, num_steps=1, num_samples=2, lr=1e-9, progress=False).params()
    for name, value in start.items():
        assert torch.isfinite(value).all(), name
        assert not torch.equal(value, end[name]), f"{name} did not move"


def test_save_and_load_keep_draws_and_predictions(problem: Problem, result: Result, tmp_path) -> None:
    result.save(tmp_path)
    loaded = Result.load(tmp_path, problem)
    assert loaded.posterior.equals(result.posterior)
    assert set(loaded.tree.children) == set(result.tree.children)
    before, after = (r.predict(problem, num_samples=4, seed=3) for r in (result, loaded))
    assert before.equals(after)


def test_a_device_move_works(problem: Problem) -> None:
    moved = problem.to("cpu")
    assert moved.validate().sites.keys() == problem.sites.keys()
