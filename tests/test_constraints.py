"""Augmented Lagrangians inside of the engines: a constrained optimum in closed form."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyro
import pytest
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from probmodels import Problem, fit_svi
from probmodels.errors import ProblemError
from probmodels.inference.variational.constraints import Constraint, followers
from probmodels.inference.variational.options import Step


class Sum(nn.Module):
    """Two numbers whose sum shall be 1."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(2))

    def forward(self) -> Tensor:
        return self.value.sum() - 1


class Plane(PyroModule):
    """Squared distance from (1, 2), least on the line at (0, 1), where the multiplier is 2."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.sum = Sum()
        self.constraint = Constraint(self.sum, **options)

    def forward(self) -> None:
        pyro.factor("distance", -(self.sum.value - torch.tensor([1.0, 2.0])).square().sum())
        pyro.factor("constraint", -self.constraint())


def plane(**options: Any) -> Problem:
    return Problem(name="plane", model=Plane(**options), guide=nothing)


def nothing() -> None:
    """A guide of no sites."""


quick: dict[str, Any] = {"lr": 0.05, "num_samples": 2, "progress": False}


@pytest.mark.parametrize("compile", ["graph", "eager"])
def test_the_constrained_optimum_and_its_multiplier_are_found(compile: str) -> None:
    problem = plane(every=50)
    result = fit_svi(problem, num_steps=1500, compile=compile, lr_decay=0.05, **quick)
    assert result.tree.attrs["execution"] == compile
    np.testing.assert_allclose(result.params()["sum$$$value"], [0.0, 1.0], atol=1e-3)
    assert result.guide_state is not None
    assert float(result.guide_state["buffer/model/constraint.multiplier"]) == pytest.approx(2.0, abs=0.01)
    # The problem keeps what it started from.
    assert float(problem.model.constraint.multiplier) == 0.0


def test_captured_graphs_see_that_multipliers_move() -> None:
    one, other = (
        fit_svi(plane(every=20, growth=2.0), num_steps=300, compile=kind, **quick) for kind in ("graph", "eager")
    )
    np.testing.assert_allclose(one.tree["fit"]["loss"], other.tree["fit"]["loss"], rtol=1e-4, atol=1e-5)


def test_interrupted_fits_go_on_with_their_multipliers(tmp_path: Any) -> None:
    def stop(step: Step) -> bool:
        return step.number == 130

    whole = fit_svi(plane(every=20), num_steps=200, **quick)
    options = {"checkpoint": tmp_path, "checkpoint_every": 0.0, **quick}
    fit_svi(plane(every=20), num_steps=200, callbacks=[stop], **options)
    rest = fit_svi(plane(every=20), num_steps=200, **options)
    np.testing.assert_array_equal(whole.tree["fit"]["loss"], rest.tree["fit"]["loss"])
    assert whole.guide_state is not None
    assert rest.guide_state is not None
    for name, value in whole.guide_state.items():
        torch.testing.assert_close(value, rest.guide_state[name], rtol=0, atol=0)


def test_penalties_grow_where_violations_stand_still() -> None:
    constraint = Constraint(Sum(), every=10, start=20, growth=3.0, fall=0.5, most=5.0)
    seen = []
    for number in range(1, 61):
        constraint.after_step(Step(number, 0.0, 0.0, 0.0))
        seen.append((float(constraint.multiplier), float(constraint.penalty)))
    # Always h = -1: nothing up to step 20, one change at 30 with the first penalty, then growth to the most.
    assert seen[28] == (0.0, 1.0)
    assert seen[29] == (-1.0, 1.0)
    assert seen[39] == (-2.0, 3.0)
    assert seen[59] == (-10.0, 5.0)
    assert followers(constraint, constraint, nothing) == [constraint]


@pytest.mark.parametrize("options", [{"every": 0}, {"every": 2.5}, {"growth": 0.5}, {"fall": 0.0}, {"penalty": 0.0}])
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(ProblemError, match=next(iter(options))):
        Constraint(Sum(), **options)
