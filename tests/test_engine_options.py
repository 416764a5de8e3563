"""Every option of every engine, given values that are wrong for most: refused by an error of the project, or good."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from inference_models import ExactKernel
from torch import Tensor
from wrong_values import WRONG

from probmodels.errors import CheckpointError, FitError, ProblemError
from probmodels.inference import (
    NUTSKernel,
    Outer,
    Problem,
    Result,
    discrete_marginals,
    fit_bilevel,
    fit_em,
    fit_svi,
    infer_discrete,
    log_likelihood,
    map_problems,
    posterior_predictive,
    prior_predictive,
    run_mcmc,
)
from probmodels.inference.mcmc.chees import ChEESKernel
from probmodels.options import options_of

"""Values by name: one wrong value of each kind, and some that are right for some options."""


@dataclass(frozen=True)
class Engine:
    """An engine and what it takes for a run that ends at once.

    Attributes
    ----------
    function
        The engine.
    problem
        Makes what it is given.
    settings
        Options of a fast run.
    accepted
        By option the names of the `WRONG` that it takes.
    """

    function: Callable[..., Result]
    problem: Callable[[], Problem]
    settings: Mapping[str, Any]
    accepted: Mapping[str, set[str]] = field(default_factory=dict)


def model(y: Tensor, strict: bool = True) -> None:
    """A mean whose prior sd is a parameter; observed with its prior or, where not ``strict``, with a flat one."""
    log_sd = pyro.param("log_sd", lambda: torch.zeros((), dtype=torch.float64))
    mu = pyro.sample("mu", dist.Normal(torch.zeros_like(log_sd), log_sd.exp() if strict else 10 * log_sd.exp()))
    with pyro.plate("row", 4) as rows:
        pyro.sample("y", dist.Normal(mu, 0.5), obs=y[rows])


def guide(y: Tensor, strict: bool = True) -> None:
    loc = pyro.param("loc", lambda: torch.zeros((), dtype=torch.float64))
    pyro.sample("mu", dist.Normal(loc + 0.0 * y.mean(), 0.3))


DATA = torch.tensor([0.3, -0.1, 0.8, 0.4], dtype=torch.float64)


def plain() -> Problem:
    return Problem("tiny", model, guide, args=(DATA,), batch_plates=("row",))


def nested() -> Problem:
    outer = Problem("outer", model, guide, args=(DATA + 0.1,), kwargs={"strict": False})
    return Problem("tiny", model, guide, args=(DATA,), outer=Outer(outer, {"log_sd": None}))


RUN: dict[str, set[str]] = {
    "seed": {"zero"},
    "device": {"none"},
    "dtype": {"none"},
    "callbacks": {"empty list"},
    "checkpoint": {"text", "none"},
    "checkpoint_every": {"zero"},
    "progress": {"true"},
}
STEP = RUN | {"batch_size": {"none"}, "clip_norm": {"none"}, "compile": {"none"}}
ENGINES = {
    "svi": Engine(
        fit_svi,
        plain,
        {"num_steps": 2, "num_samples": 2, "progress": False},
        STEP
        | {
            "schedule": {"none"},
            "num_particles": {"none"},
            "patience": {"none"},
            "kl_warmup": {"zero"},
            "distributed": {"none"},
        },
    ),
    "em": Engine(
        fit_em,
        plain,
        {"num_rounds": 1, "phases": ("e_step", "wake", "sleep"), "num_samples": 2, "progress": False},
        STEP | {"observed_args": {"none"}},
    ),
    "bilevel": Engine(
        fit_bilevel,
        nested,
        {
            "num_rounds": 1,
            "inner_steps": 4,
            "unroll_steps": 2,
            "hypergrad": "cg",
            "num_scores": 2,
            "num_samples": 2,
            "progress": False,
        },
        RUN
        | {
            "outer": {"none"},
            "hyper_decay": {"zero"},
            "damping": {"zero"},
            "restart": {"true"},
            "tolerance": {"zero", "none"},
            "compare": {"none"},
            "patience": {"none"},
            "num_particles": {"none"},
        },
    ),
}
ENGINES["mcmc"] = Engine(
    run_mcmc,
    plain,
    {
        "kernel": ExactKernel,
        "chain_method": "sequential",
        "num_samples": 4,
        "warmup_steps": 2,
        "num_chains": 2,
        "progress": False,
    },
    {
        **{name: kinds for name, kinds in RUN.items() if name != "dtype"},
        "kernel": {"none"},
        "kernel_options": {"none"},
        "num_samples": {"none"},
        "warmup_steps": {"zero", "none"},
        "num_chains": {"none"},
        "chain_method": {"none"},
        "init": {"none"},
        "num_workers": {"none"},
        "client": {"none"},
        "timeout": {"none"},
        "target_ess": {"none"},
    },
)
CASES = [(name, option) for name, engine in ENGINES.items() for option in options_of(engine.function, skip=1)]


@pytest.mark.parametrize(("name", "option"), CASES)
def test_every_value_is_refused_or_works(
    name: str, option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    engine = ENGINES[name]
    for kind, value in WRONG.items():
        settings = {**engine.settings, option: value}
        if option == "checkpoint_every":  # which is refused where there is no checkpoint
            settings["checkpoint"] = tmp_path / kind
        if kind in engine.accepted.get(option, ()):
            result = engine.function(engine.problem(), **settings)
            assert bool(torch.isfinite(torch.as_tensor(result.posterior["mu"].values)).all()), (option, kind)
            continue
        with pytest.raises((ProblemError, FitError, CheckpointError)):
            pytest.fail(f"{option}={value!r} gave {engine.function(engine.problem(), **settings)}")


@pytest.mark.parametrize("name", ENGINES)
def test_wrong_names_are_refused_with_the_closest(name: str) -> None:
    engine = ENGINES[name]
    with pytest.raises(ProblemError, match=r"unknown option 'num_sample' of \w+; did you mean 'num_samples'"):
        engine.function(engine.problem(), num_sample=3)


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("value", [object(), None, "text"])
def test_what_is_no_problem_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ProblemError, match=r"problem=.*; give a Problem"):
        ENGINES[name].function(value)


KERNELS: dict[str, dict[str, set[str]]] = {"nuts": {"full_mass": {"true"}}, "chees": {}}
KERNEL_CASES = [
    (kernel, option)
    for kernel, maker in (("nuts", NUTSKernel), ("chees", ChEESKernel))
    for option in options_of(maker, skip=1)
    if option != "num_chains"
]


@pytest.mark.parametrize(("kernel", "option"), KERNEL_CASES)
def test_every_value_of_an_option_of_a_kernel_is_refused_before_the_model_runs_or_works(
    kernel: str, option: str
) -> None:
    settings: dict[str, Any] = {"kernel": kernel, "num_samples": 4, "warmup_steps": 2, "num_chains": 1}
    settings |= {"chain_method": "sequential"} if kernel == "nuts" else {}
    for kind, value in WRONG.items():
        given = {"kernel_options": {option: value}, "progress": False}
        if kind in KERNELS[kernel].get(option, ()):
            result = run_mcmc(plain(), **settings, **given)
            assert bool(torch.isfinite(torch.as_tensor(result.posterior["mu"].values)).all()), (option, kind)
            continue
        with pytest.raises(ProblemError, match=f"tiny: kernel_options: {option}="):
            run_mcmc(replace(plain(), model=never), **settings, **given)


def never(y: Tensor) -> None:
    pytest.fail("the model ran")


DRAWS = xr.Dataset({"mu": (("chain", "draw"), [[0.1, 0.2, 0.3, 0.4]])})
FUNCTIONS: dict[str, tuple[Callable[..., Any], tuple[Any, ...], dict[str, set[str]]]] = {
    "prior": (prior_predictive, (), {"seed": {"zero"}, "progress": {"true"}}),
    "posterior": (posterior_predictive, (DRAWS,), {"seed": {"zero"}, "progress": {"true"}}),
    "likelihood": (log_likelihood, (DRAWS,), {"progress": {"true"}}),
    "discrete": (infer_discrete, (DRAWS,), {}),
    "marginals": (discrete_marginals, (DRAWS,), {}),
    "map": (
        map_problems,
        (fit_svi,),
        {
            "problems": {"empty list"},
            "client": {"none"},
            "num_workers": {"none"},
            "seed": {"zero"},
            "checkpoint": {"text", "none"},
            "progress": {"true"},
        },
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_argument_of_what_follows_from_problems_is_refused_or_works(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    function, rest, accepted = FUNCTIONS[name]
    options = list(options_of(function))
    positional = dict(zip(options, (plain() if name != "map" else [], *rest), strict=False))
    for option in options:
        for kind, value in WRONG.items():
            if kind in accepted.get(option, ()):
                assert function(**positional | {option: value}) is not None
                continue
            with pytest.raises((ProblemError, CheckpointError)):
                pytest.fail(f"{option}={value!r} gave {function(**positional | {option: value})}")
