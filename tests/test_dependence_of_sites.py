"""Rows of plates that depend on each other, however the program computes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from probmodels import Problem, fit_svi, run_mcmc
from probmodels.errors import ProblemError
from probmodels.guides import with_guide
from probmodels.guides.gflownet import make_policy
from probmodels.inference import VarGrad, check_exact
from probmodels.inference.programs.dependence import coupling, upstream

WAYS: dict[str, Callable[[Tensor], float]] = {
    "numpy": lambda z: float(z.numpy().sum()),
    "asarray": lambda z: float(np.asarray(z).sum()),
    "dlpack": lambda z: float(np.from_dlpack(z.contiguous()).sum()),
    "tolist": lambda z: float(sum(z.tolist())),
    "int": lambda z: float(sum(int(v) for v in z)),
    "item": lambda z: z.sum().item(),
    "condition": lambda z: 8.0 if (z == 1).sum() >= 3 else 0.0,
}


def coupled(way: str) -> Problem:
    """Six bits of which three should be 1, in a plate, counted in some way that torch does not see."""

    def model() -> None:
        with pyro.plate("bits", 6):
            z = pyro.sample("z", dist.Bernoulli(0.5))
        pyro.factor("three", torch.tensor(-1.5 * (WAYS[way](z) - 3) ** 2))

    return Problem(way, model)


@pytest.mark.parametrize("way", WAYS)
def test_rows_that_are_counted_outside_of_torch_are_not_taken_for_independent(way: str) -> None:
    problem = coupled(way)
    found = coupling(problem, "bits")
    assert found is not None
    assert (found.plate, found.site) == ("bits", "three")
    assert found.size > 1
    assert make_policy(problem).local_plates == ()


@pytest.mark.parametrize("way", ["numpy", "tolist", "int"])
def test_values_that_leave_torch_reach_all_that_comes_after(way: str) -> None:
    with torch.no_grad():
        assert upstream(coupled(way), ["z"]) == {"z": {"z"}, "three": {"z"}}


def test_rows_that_leave_torch_one_by_one_stay_independent() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("rows", 4):
            z = pyro.sample("z", dist.Categorical(torch.ones(3)))
            loc = torch.tensor([(-1.0, 0.0, 2.0)[k] for k in z.tolist()])
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    problem = Problem("rows", model, args=(torch.tensor([0.3, -1.0, 2.0, 0.1]),))
    assert coupling(problem, "rows") is None
    assert make_policy(problem).local_plates == ("rows",)


def test_impossible_combinations_couple_rows() -> None:
    def model() -> None:
        with pyro.plate("rows", 4):
            z = pyro.sample("z", dist.Categorical(torch.ones(3)))
        pyro.factor("different", torch.where(z[0] == z[3], -torch.inf, 0.0))

    found = coupling(Problem("different", model), "rows")
    assert found is not None
    assert found.size == float("inf")


def test_rows_given_what_lies_outside_are_independent() -> None:
    """Crossed and nested plates, continuous sites, a row of impossible values: nothing couples."""

    def model(x: Tensor) -> None:
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.3))
        columns, rows = pyro.plate("columns", 5, dim=-1), pyro.plate("rows", 30, dim=-2)
        with columns:
            a = pyro.sample("a", dist.Normal(0.0, scale))
        with rows:
            b = pyro.sample("b", dist.Categorical(torch.tensor([0.5, 0.5, 0.0])).expand([30, 1]))
        with rows, columns:
            pyro.sample("x", dist.Normal(1e3 * a + b, scale), obs=x)

    problem = Problem("crossed", model, args=(torch.linspace(-3e3, 3e3, 150).reshape(30, 5),))
    assert coupling(problem, "rows") is None
    assert coupling(problem, "columns") is None
    assert coupling(problem, "nothing") is None


def test_noise_of_the_model_itself_is_the_same_at_all_values() -> None:
    def model(x: Tensor) -> None:
        noise = torch.randn(6)
        with pyro.plate("rows", 6):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + noise, 1.0), obs=x)

    assert coupling(Problem("noisy", model, args=(torch.zeros(6),)), "rows") is None


def neighbours(x: Tensor, observed_outside: bool) -> None:
    """A chain in a plate whose rows are subsampled as if they were independent."""
    with pyro.plate("data", len(x), subsample_size=len(x)) as i:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        near = torch.cat([z[:1], z[:-1]]) if not observed_outside else z
        pyro.sample("x", dist.Normal(z + near, 1.0), obs=x[i])


@pytest.mark.parametrize("batch_plates", [(), ("data",)])
def test_a_fit_refuses_plates_whose_rows_are_not_independent(batch_plates: tuple[str, ...]) -> None:
    x = torch.linspace(-1, 1, 40)
    wrong = Problem("chain", neighbours, args=(x, False), batch_plates=batch_plates)
    with pytest.raises(ProblemError, match=r"plate 'data': its rows depend on each other through site 'x'.*to_event"):
        fit_svi(with_guide(wrong, "mean_field"), num_steps=2, progress=False)
    right = Problem("rows", neighbours, args=(x, True), batch_plates=batch_plates)
    assert fit_svi(with_guide(right, "mean_field"), num_steps=2, progress=False).posterior.sizes["data"] == 40


@pytest.mark.slow
def test_a_policy_of_coupled_rows_finds_their_posterior() -> None:
    """Drawn row by row, as plates of independent rows are, the total variation would be .44."""
    problem = replace(with_guide(coupled("numpy"), "gflownet", hidden=32), loss=VarGrad(16))
    result = fit_svi(problem, num_steps=250, lr=0.03, lr_decay=0.05, num_samples=200, seed=0, progress=False)
    assert float(check_exact(problem, result)["total_variation"]) < 0.05


# --- enumerated values ------------------------------------------------------------------------------------------------


def summed(shift: Callable[[Tensor], Any]) -> Problem:
    def model(y: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 2.0))
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal(m + 2 * shift(z), 0.3), obs=y)

    def guide(y: Tensor) -> None:
        pyro.sample("m", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 0.2))

    y = torch.tensor([0.1, 0.2, 2.1, 1.9])
    return Problem("summed", model, guide, args=(y,), loss="TraceEnum_ELBO")


@pytest.mark.parametrize(
    "shift",
    [lambda z: float(z.numpy().sum()), lambda z: 1.0 if bool(z.any()) else 0.0, lambda z: float(bool(z.all()))],
    ids=["numpy", "any", "all"],
)
def test_enumerated_values_that_are_read_are_refused(shift: Callable[[Tensor], Any]) -> None:
    problem = summed(shift)
    for run in (lambda: fit_svi(problem, num_steps=2, progress=False), lambda: run_mcmc(problem, progress=False)):
        with pytest.raises(ProblemError, match="site 'y' has another density at single values of"):
            run()


@pytest.mark.parametrize("shift", [lambda z: z, lambda z: torch.tensor(z.numpy())], ids=["torch", "array"])
def test_enumerated_values_that_stay_whole_are_summed(shift: Callable[[Tensor], Any]) -> None:
    result = run_mcmc(summed(shift), num_chains=4, warmup_steps=200, num_samples=200, seed=0, progress=False)
    # The mean of y is m + 1 where half of the values are 1; the other mode, all 0 or all 1, is far less likely.
    assert float(result.posterior.m.mean()) == pytest.approx(0.075, abs=0.05)
