"""What every method has to do, on its own tiny problem; a new row in METHODS is tested unedited."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from probmodels import METHODS, Problem, Result, fit_bilevel, fit_em, fit_svi, get_method, run_mcmc

ALL = sorted(METHODS)


@pytest.fixture(params=ALL, scope="module")
def problem(request: pytest.FixtureRequest) -> Problem:
    return get_method(request.param).tiny()


def sampled(problem: Problem, seed: int = 0) -> Result:
    method = "vectorized" if getattr(problem.kernel, "vectorized", False) else "sequential"
    return run_mcmc(
        problem, num_samples=20, warmup_steps=10, num_chains=2, seed=seed, chain_method=method, progress=False
    )


def fitted(problem: Problem, seed: int = 0, **options: Any) -> Result:
    if problem.guide is None:
        pytest.skip(f"{problem.name} has no guide")
    return fit_svi(problem, **{"num_steps": 10, "num_samples": 20, **options}, seed=seed, progress=False)


def solved(problem: Problem, seed: int = 0, **options: Any) -> Result:
    options = {"num_rounds": 2, "inner_steps": 10, "hyper_lr": 1.0, "keep": "last", "num_samples": 20, **options}
    return fit_bilevel(problem, **options, seed=seed, progress=False)


def phased(problem: Problem, seed: int = 0, **options: Any) -> Result:
    return fit_em(problem, **{"num_rounds": 10, "num_samples": 20, **options}, seed=seed, progress=False)


RUNS = {"mcmc": sampled, "svi": fitted, "em": phased, "bilevel": solved}


def engines(problem: Problem) -> tuple[str, ...]:
    return tuple(getattr(get_method(problem.name), "ENGINES", ("mcmc", "svi")))


@pytest.fixture(params=sorted(RUNS), scope="module")
def result(request: pytest.FixtureRequest, problem: Problem) -> Result:
    if request.param not in engines(problem):
        pytest.skip(f"{problem.name} is made for {engines(problem)}")
    return RUNS[request.param](problem)


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
    again = RUNS[result.tree.attrs["engine"]]
    assert again(problem).posterior.identical(result.posterior)
    assert not again(problem, seed=1).posterior.equals(result.posterior)


def test_a_gradient_reaches_every_parameter(problem: Problem) -> None:
    if "em" in engines(problem):
        end, start = phased(problem), phased(problem, num_rounds=1, lr=1e-9)
    elif "svi" in engines(problem):
        end, start = fitted(problem), fitted(problem, num_steps=1, lr=1e-9)
    elif "bilevel" in engines(problem):
        one = {"num_rounds": 1, "restart": False}
        end, start = (
            solved(problem, **one),
            solved(problem, **one, inner_steps=1, unroll_steps=1, lr=1e-9, hyper_lr=1e-9),
        )
    else:
        pytest.skip(f"{problem.name} is made for {engines(problem)}")
    before = start.params()
    for name, value in end.params().items():
        assert torch.isfinite(value).all(), name
        assert not torch.equal(value, before[name]), f"{name} did not move"


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
