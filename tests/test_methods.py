"""What every method has to do, on its own tiny problem; a new row in METHODS is tested unedited."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from pyro import poutine

from probmodels import Problem, Result, fit_bilevel, fit_em, fit_svi, get_method, run_mcmc, write_report
from probmodels.errors import ProblemError
from probmodels.inference.result import build_tree
from probmodels.inference.runtime.ops import isolated
from probmodels.inference.runtime.packing import ROUNDING
from probmodels.methods import names_of_methods
from probmodels.report import show

ALL = sorted(names_of_methods())


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
    return tuple(get_method(problem.name).ENGINES)


@pytest.fixture(params=sorted(RUNS), scope="module")
def result(request: pytest.FixtureRequest, problem: Problem) -> Result:
    if request.param not in engines(problem):
        pytest.skip(f"{problem.name} is made for {engines(problem)}")
    return RUNS[request.param](problem)


@pytest.mark.parametrize("name", ALL)
def test_a_method_names_its_source(name: str) -> None:
    assert "http" in get_method(name).REFERENCE


@pytest.mark.parametrize("name", ALL)
def test_a_method_names_its_engines(name: str) -> None:
    assert get_method(name).ENGINES
    assert set(get_method(name).ENGINES) <= set(RUNS)


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
    if problem.names("latent"):  # a point estimate has nothing to draw
        assert not again(problem, seed=1).posterior.equals(result.posterior)


@pytest.mark.parametrize("name", ALL)
def test_a_problem_can_be_made_again_from_its_own_data_and_options(name: str, tmp_path: Path) -> None:
    problem = get_method(name).tiny()
    tree = build_tree(replace(problem, align=None, invariants=None), xr.Dataset(), engine="svi", seed=0, settings={})
    Result(tree).save(tmp_path)
    again = Result.load(tmp_path).rebuild()
    assert again.options.keys() == problem.options.keys()
    assert again.data is not None
    xr.testing.assert_identical(again.data, problem.data)
    assert again.sites == problem.sites
    assert {dim: list(labels) for dim, labels in again.coords.items()} == {
        dim: list(labels) for dim, labels in problem.coords.items()
    }
    with isolated(seed=0), torch.no_grad():
        drawn = poutine.trace(problem.model).get_trace(*problem.args, **problem.kwargs)
    with isolated(seed=0), torch.no_grad():
        replayed = poutine.trace(poutine.replay(again.model, drawn)).get_trace(*again.args, **again.kwargs)
    for trace in (drawn, replayed):
        trace.compute_log_prob()
    for name, node in drawn.nodes.items():
        if "log_prob" in node:
            torch.testing.assert_close(replayed.nodes[name]["log_prob"], node["log_prob"], rtol=1e-5, atol=1e-5)


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
    assert set(loaded.tree.children) == set(result.tree.children)
    exact = [name for name in result.posterior if name not in problem.rounded]
    assert loaded.posterior[exact].equals(result.posterior[exact])
    for name in set(result.posterior) - set(exact):
        moved = np.abs(loaded.posterior[name] - result.posterior[name])
        assert (moved <= ROUNDING * result.posterior[name].std(("chain", "draw"))).all(), name
    if problem.rounded:  # once: what is saved again is kept to the last digit
        result = loaded
        result.save(tmp_path / "again")
        loaded = Result.load(tmp_path / "again", problem)
        assert loaded.posterior.equals(result.posterior)
    if not problem.names("observed"):
        with pytest.raises(ProblemError, match="observes nothing"):
            loaded.predict(problem)
        return
    before, after = (r.predict(problem, num_samples=4, seed=3) for r in (result, loaded))
    assert before.equals(after)


def reachable(*roots: Any) -> list[torch.Tensor]:
    """Tensors that objects reach by the references that Python's garbage collector knows of, whatever holds them.

    Modules and classes are not entered; of the globals of a function those tensors count that its code names.
    """
    seen: dict[int, Any] = {}
    left = list(roots)
    while left:
        item = left.pop()
        if id(item) in seen or isinstance(item, type | ModuleType | CodeType):
            continue
        seen[id(item)] = item
        inside = gc.get_referents(item)
        if isinstance(item, FunctionType):
            names = {name for code in codes(item.__code__) for name in code.co_names}
            inside = [other for other in inside if other is not item.__globals__]
            named = [item.__globals__.get(name) for name in names]
            inside += [other for other in named if isinstance(other, torch.Tensor | torch.nn.Module)]
        left += inside
    return [item for item in seen.values() if isinstance(item, torch.Tensor)]


def codes(code: CodeType) -> list[CodeType]:
    return [code, *(part for const in code.co_consts if isinstance(const, CodeType) for part in codes(const))]


def parts(problem: Problem) -> list[Any]:
    return [getattr(problem, name) for name in ("model", "guide", "args", "kwargs", "loss", "kernel", "outer")]


def test_a_move_to_another_device_leaves_no_tensor_behind(problem: Problem) -> None:
    before = reachable(*parts(problem))
    found = reachable(*parts(problem.to("meta")))
    assert len(found) >= len(before) > 0
    assert [tuple(tensor.shape) for tensor in found if tensor.device.type != "meta"] == []
    assert {tensor.device.type for tensor in before} == {"cpu"}
    assert problem.to("cpu").validate().sites.keys() == problem.sites.keys()


def test_a_tensor_that_no_move_can_reach_is_found_by_the_test_of_moves() -> None:
    hidden = replace(get_method("score_composition").tiny(), kwargs={"hidden": iter([torch.zeros(3)])})
    (left,) = (tensor for tensor in reachable(*parts(hidden.to("meta"))) if tensor.device.type != "meta")
    assert left.shape == (3,)


def test_a_result_has_a_page_and_groups_for_arviz(result: Result, tmp_path: Path) -> None:
    written = write_report(result, tmp_path, dpi=30)
    page = written.report.read_text(encoding="utf-8")
    assert page.index('class="verdict') < page.index("<figure")
    assert "https://" not in page.partition("<figure")[0]
    assert show(result).startswith(f"Result of {result.tree.attrs['method']}")
    data = result.to_arviz()
    assert set(data.posterior.data_vars) == set(result)
    if observed := result.rebuild().names("observed"):
        assert set(result.add("posterior_predictive").group("posterior_predictive")) == set(observed)
