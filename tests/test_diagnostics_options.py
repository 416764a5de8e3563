"""Every argument of results and diagnostics, given values that are wrong for most: refused as it should be, or used."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from inference_models import auto_guide, data, mean_model, mean_problem
from wrong_values import WRONG

from probmodels.errors import DiagnosticsError, ImportanceError, ProblemError, ProbmodelsError, ResultError
from probmodels.inference import (
    Problem,
    Result,
    check_exact,
    check_weights,
    compare,
    coverage,
    diagnose,
    enumerate_posterior,
    fit_svi,
    importance_resample,
    kfold,
    loo,
    sbc,
    vsbc,
)
from probmodels.options import options_of


def simulate(rng: np.random.Generator) -> tuple[dict[str, Any], Any]:
    return {"mu": rng.normal()}, None


def infer(value: Any, seed: int) -> xr.Dataset:
    return xr.Dataset({"mu": (("chain", "draw"), np.random.default_rng(seed).normal(size=(2, 60)))})


def split(train: np.ndarray, test: np.ndarray) -> tuple[Problem, Problem]:
    return problem(data(6)[train]), problem(data(6)[test])


def problem(y: torch.Tensor | None = None) -> Problem:
    return mean_problem(args=(data() if y is None else y,), coords={}, guide=auto_guide(mean_model))


def coin_model(y: torch.Tensor) -> None:
    with pyro.plate("obs", len(y)):
        side = pyro.sample("side", dist.Bernoulli(0.4))
        pyro.sample("y", dist.Normal(side, 1.0), obs=y)


def coin_guide(y: torch.Tensor) -> None:
    chance = pyro.param("chance", torch.full((len(y),), 0.5), constraint=dist.constraints.unit_interval)
    with pyro.plate("obs", len(y)):
        pyro.sample("side", dist.Bernoulli(chance))


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    """What the functions take."""
    result = fit_svi(problem(), num_steps=60, num_samples=40, progress=False)
    discrete = Problem("coins", coin_model, coin_guide, args=(torch.tensor([0.1, 0.9]),))
    return {
        "result": result,
        "problem": problem(),
        "models": {"a": loo(result, problem()), "b": loo(result, problem(), correct=False)},
        "discrete": discrete,
        "discrete result": fit_svi(discrete, num_steps=5, num_samples=10, progress=False),
    }


@dataclass(frozen=True)
class Case:
    """A function and good arguments, some by the name of what the fixture made.

    Attributes
    ----------
    error
        What it raises for wrong ones.
    accepted
        By argument the names of the `WRONG` that it takes.
    """

    function: Callable[..., Any]
    error: type[ProbmodelsError]
    arguments: Mapping[str, Any]
    accepted: Mapping[str, set[str]] = field(default_factory=dict)


CALIBRATE: dict[str, Any] = {"simulate": simulate, "infer": infer, "num_replicates": 20, "num_draws": 19}
CASES = {
    "diagnose": Case(
        diagnose,
        DiagnosticsError,
        {"result": "result"},
        {"ess_min": {"zero"}, "entry_share": {"zero"}, "divergence_share": {"zero"}},
    ),
    "loo": Case(
        loo,
        DiagnosticsError,
        {"result": "result", "problem": "problem"},
        {"unit": {"none"}, "num_samples": {"none"}, "correct": {"true"}},
    ),
    "compare": Case(compare, DiagnosticsError, {"models": "models"}),
    "kfold": Case(
        kfold,
        DiagnosticsError,
        {"split": split, "infer": infer, "num_observations": 6, "num_folds": 2},
        {"groups": {"none"}, "unit": {"none"}, "seed": {"zero"}},
    ),
    "sbc": Case(sbc, DiagnosticsError, CALIBRATE, {"seed": {"zero"}}),
    "vsbc": Case(vsbc, DiagnosticsError, CALIBRATE, {"seed": {"zero"}}),
    "coverage": Case(coverage, DiagnosticsError, {"truth": {"mu": 0.0}, "posterior": infer(None, 0)}),
    "importance_resample": Case(
        importance_resample, ImportanceError, {"result": "result"}, {"num_samples": {"none"}, "seed": {"zero"}}
    ),
    "enumerate_posterior": Case(enumerate_posterior, ProblemError, {"problem": "discrete"}, {"result": {"none"}}),
    "check_exact": Case(check_exact, ProblemError, {"problem": "discrete", "result": "discrete result"}),
    "check_weights": Case(
        check_weights, ProblemError, {"problem": "discrete", "result": "discrete result"}, {"seed": {"zero"}}
    ),
    "summary": Case(Result.summary, ResultError, {"self": "result"}, {"var_names": {"none", "empty list"}}),
    "predict": Case(
        Result.predict,
        ResultError,
        {"self": "result", "problem": "problem"},
        {"num_samples": {"none"}, "seed": {"zero"}},
    ),
    "add": Case(
        Result.add,
        ResultError,
        {"self": "result", "name": "prior", "problem": "problem", "num_samples": 3},
        {"num_samples": {"none"}, "seed": {"zero"}},
    ),
    "save": Case(
        Result.save,
        ResultError,
        {"self": "result", "folder": "folder"},
        {"folder": {"text", "empty text"}, "overwrite": {"true"}},
    ),
    "load": Case(Result.load, ResultError, {"folder": "saved"}, {"problem": {"none"}}),
}


@pytest.mark.parametrize("name", CASES)
def test_every_value_is_refused_or_works(
    name: str, made: Mapping[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    case, numbers = CASES[name], itertools.count()
    made["result"].save("saved")
    for option, (kind, value) in itertools.product(options_of(case.function), WRONG.items()):
        given = {key: made.get(item, item) if isinstance(item, str) else item for key, item in case.arguments.items()}
        given |= {"folder": f"folder {next(numbers)}"} if given.get("folder") == "folder" else {}
        given[option] = value
        if kind in case.accepted.get(option, ()):
            case.function(**given)
            continue
        with pytest.raises(case.error):
            pytest.fail(f"{option}={value!r} gave {case.function(**given)}")


@pytest.mark.parametrize("name", CASES)
def test_wrong_names_are_refused(name: str, made: Mapping[str, Any]) -> None:
    case = CASES[name]
    with pytest.raises(case.error, match="unknown option 'colour'"):
        case.function(**{key: made.get(str(item)) for key, item in case.arguments.items() if key == "self"}, colour=1)
