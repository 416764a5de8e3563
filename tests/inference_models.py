"""Small problems with exact answers, at module level so that they pickle."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import Tensor

from probmodels.inference.mcmc.kernels import Kernel
from probmodels.inference.problem import Problem
from probmodels.inference.runtime.ops import is_generated

SCALE = 0.5


def normal_model(y: Tensor) -> None:
    """theta ~ Normal(0, 2), y ~ Normal(theta, SCALE): one theta per row of ``y`` (row, column)."""
    rows, columns = pyro.plate("row", y.shape[0], dim=-2), pyro.plate("column", y.shape[1], dim=-1)
    with rows:
        theta = pyro.sample("theta", dist.Normal(y.new_zeros(()), 2.0))  # (row, 1)
    with rows, columns:
        pyro.sample("y", dist.Normal(theta, SCALE), obs=y)


def mean_model(y: Tensor) -> None:
    """mu ~ Normal(0, 2), y ~ Normal(mu, SCALE), with a deterministic and a generated site."""
    mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 2.0))
    pyro.deterministic("twice", 2 * mu)
    with pyro.plate("obs", len(y)):
        pyro.sample("y", dist.Normal(mu, SCALE), obs=y)
        pyro.sample("new", dist.Normal(mu, SCALE), infer={"generated": True})


def exact(y: Tensor) -> tuple[float, float]:
    """Posterior mean and sd of ``mu``."""
    precision = 1 / 4 + len(y) / SCALE**2
    return float(y.sum()) / SCALE**2 / precision, precision**-0.5


def data(size: int = 6, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.linspace(0.2, 1.8, size, dtype=dtype)


class MeanGuide(PyroModule):
    """Normal guide of ``mu``, which holds the exact posterior."""

    def __init__(self) -> None:
        super().__init__()
        self.loc = PyroParam(torch.zeros((), dtype=torch.float64))
        self.spread = PyroParam(torch.ones((), dtype=torch.float64), constraint=dist.constraints.positive)

    def forward(self, y: Tensor) -> None:
        pyro.sample("mu", dist.Normal(self.loc, self.spread))


class ExactKernel(Kernel):
    """Autoregressive chain with the exact posterior of ``mu`` as its stationary distribution."""

    def __init__(self, problem: Problem, *, fail_at: int | None = None, die_at: int | None = None) -> None:
        self._y = problem.args[0]
        self._fail_at, self._die_at = fail_at, die_at

    def seed(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def setup(self, warmup_steps: int, *args: Any, **kwargs: Any) -> None:
        self._mean, self._sd = exact(self._y)
        self._count = 0

    @property
    def initial_params(self) -> dict[str, Tensor]:
        return {"mu": torch.zeros((), dtype=torch.float64)}

    @initial_params.setter
    def initial_params(self, params: dict[str, Tensor]) -> None:
        raise AttributeError("the start is fixed")

    def sample(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        self._count += 1
        if self._count == self._fail_at:
            raise FloatingPointError("the kernel broke")
        if self._count == self._die_at:
            import os

            os._exit(3)
        noise = self._rng.normal() + 1e-3 * torch.randn(()).item()  # the global generator must be restored as well
        return {"mu": self._mean + 0.5 * (params["mu"] - self._mean) + 0.75**0.5 * self._sd * noise}

    def sample_stats(self) -> dict[str, float]:
        return {"lp": float(self._count)}

    def state_dict(self) -> dict[str, Tensor | int | float | str]:
        state = self._rng.bit_generator.state["state"]
        return {"count": self._count, "state": str(state["state"]), "inc": str(state["inc"])}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._count = int(state["count"])
        full = self._rng.bit_generator.state
        full["state"] = {"state": int(state["state"]), "inc": int(state["inc"])}
        self._rng.bit_generator.state = full


class SlowKernel(ExactKernel):
    """The same chain at eight milliseconds a sweep, slow enough to be interrupted."""

    def sample(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        import time

        time.sleep(0.008)
        return super().sample(params)


class StuckKernel(ExactKernel):
    """The same chain, which says so and hangs where the environment says."""

    def setup(self, warmup_steps: int, *args: Any, **kwargs: Any) -> None:
        self._hang("setup")
        super().setup(warmup_steps, *args, **kwargs)

    def sample(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        if self._count in (10, 40):
            self._hang("warm-up" if self._count == 10 else "sampling")
        return super().sample(params)

    @staticmethod
    def _hang(stage: str) -> None:
        if os.environ.get("STUCK_IN") == stage:
            print(stage, flush=True)
            for _ in range(6000):
                time.sleep(0.01)


def mean_problem(**changes: Any) -> Problem:
    y = data()
    fields: dict[str, Any] = {"name": "mean", "model": mean_model, "guide": MeanGuide(), "args": (y,)}
    fields |= {"kernel": ExactKernel, "coords": {"obs": list("abcdef")}}
    return Problem(**{**fields, **changes})


def auto_guide(model: Any) -> AutoNormal:
    return AutoNormal(poutine.block(model, hide_fn=is_generated))
