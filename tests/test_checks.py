"""Checks that methods share: memory, and parameters that nothing moves."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule, PyroParam
from torch import nn
from torch.distributions import constraints

from probmodels.errors import ProblemError
from probmodels.inference.programs.checks import parameters_without_gradient
from probmodels.inference.runtime import memory
from probmodels.inference.runtime.memory import check_memory, free_bytes

CPU = torch.device("cpu")


def test_what_exceeds_free_memory_is_refused_with_a_remedy(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2**30)
    check_memory("name", 2**30, CPU, "7 rows", "take fewer")
    with pytest.raises(ProblemError, match=r"^name: 7 rows need about 1\.5 GiB, and 1\.0 GiB are free; take fewer$"):
        check_memory("name", 3 * 2**29, CPU, "7 rows", "take fewer")


def test_little_memory_is_not_asked_for(monkeypatch):
    asked = []
    monkeypatch.setattr(memory, "free_bytes", asked.append)
    check_memory("name", 2**28 - 1, CPU, "7 rows", "take fewer")
    assert not asked
    check_memory("name", 2**40, CPU, "7 rows", "take fewer")  # and where nobody says what is free, nothing is refused
    assert asked == [CPU]


def test_free_memory_is_a_number_of_bytes():
    free = free_bytes(CPU)
    assert free is None or free > 2**20


class Guide(PyroModule):
    """A guide whose site depends on ``used`` alone, by its own parameters and those of a plain module."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(1, 2), nn.Linear(1, 2)
        self.width = PyroParam(torch.ones(2), constraints.positive)
        self.spare = PyroParam(torch.ones(2), constraints.positive)

    def forward(self, x):
        pyro.sample("other", dist.Normal(self.idle(x), self.spare).to_event(1))
        pyro.sample("z", dist.Normal(self.used(x), self.width).to_event(1))


def test_parameters_of_modules_that_a_site_does_not_depend_on():
    guide, x = Guide(), torch.ones(1)
    before = [value.clone() for value in guide.parameters()]
    state = torch.get_rng_state()
    assert set(parameters_without_gradient(guide, (x,), "z")) == {"idle.weight", "idle.bias", "spare_unconstrained"}
    assert parameters_without_gradient(guide, (x,), "z", "used") == []
    assert parameters_without_gradient(guide, (x,), "z", "idle") == ["weight", "bias"]
    # A weight that is multiplied by zero has a gradient, which is zero.
    assert parameters_without_gradient(guide, (0 * x,), "z", "used") == ["weight"]
    assert all(torch.equal(value, old) for value, old in zip(guide.parameters(), before, strict=True))
    assert torch.equal(state, torch.get_rng_state())
    assert not list(pyro.get_param_store().keys())


def test_parameters_of_functions_that_a_site_does_not_depend_on():
    net = nn.Linear(1, 2)

    def guide(x):
        pyro.module("net", net)
        scale = pyro.param("scale", lambda: torch.ones(2), constraint=constraints.positive)
        pyro.param("idle", lambda: torch.zeros(3))
        pyro.sample("z", dist.Normal(net(x), scale).to_event(1))

    assert parameters_without_gradient(guide, (torch.ones(1),), "z") == ["idle"]
    assert parameters_without_gradient(guide, (torch.zeros(1),), "z") == ["net$$$weight", "idle"]
    assert all(value.grad is None for value in net.parameters())


def test_a_parameter_that_matters_in_some_draws_is_not_idle():
    def guide():
        shift = pyro.param("shift", lambda: torch.zeros(()))
        side = pyro.sample("side", dist.Bernoulli(0.1))
        pyro.sample("z", dist.Normal(side * shift, pyro.param("scale", lambda: torch.ones(()))))

    assert parameters_without_gradient(guide, (), "z", num_draws=1) == ["shift"]
    assert parameters_without_gradient(guide, (), "z", num_draws=100) == []
