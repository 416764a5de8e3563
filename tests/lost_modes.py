"""Models of several modes, all of whose values can be listed, and guides that are their posterior, or a part of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from probmodels.inference import Problem, VarGrad, enumerate_posterior, fit_svi
from probmodels.inference.result import Result

HEIGHTS = torch.tensor([-2.1, -1.8, -2.4, 2.0, 2.3, 1.7, 0.1])


def latin_square() -> None:
    """Twelve squares, and others that break a rule here and there."""
    z = pyro.sample("z", dist.Categorical(torch.ones(3) / 3).expand([9]).to_event(1))
    square, broken = z.unflatten(-1, (3, 3)), 0.0
    for i, j in ((0, 1), (0, 2), (1, 2)):
        broken = broken + (square[..., i, :] == square[..., j, :]).float().sum(-1)
        broken = broken + (square[..., :, i] == square[..., :, j]).float().sum(-1)
    pyro.factor("rules", -4.0 * broken)


def magnet() -> None:
    """Ten spins that like to agree: all up or all down."""
    s = pyro.sample("s", dist.Bernoulli(0.5).expand([10]).to_event(1))
    pyro.factor("energy", 0.12 * (2 * s - 1).sum(-1).square())


def unknown_number(x: Tensor) -> None:
    """One to three components, the first element; the component of each value, of which there are no more."""
    z = pyro.sample("z", dist.Categorical(torch.ones(3) / 3).expand([len(x) + 1]).to_event(1))
    count, label = z[..., :1], z[..., 1:]
    pyro.factor("possible", torch.where(label <= count, 0.0, -torch.inf).sum(-1))
    pyro.factor("prior", -len(x) * (count[..., 0] + 1).float().log())
    place = torch.tensor([[0.0, 0.0, 0.0], [-2.0, 2.0, 0.0], [-2.0, 0.0, 2.0]])
    loc = place.flatten().index_select(0, (3 * count + label).flatten()).reshape(label.shape)
    scale = torch.tensor([2.0, 0.6, 0.5]).index_select(0, count.flatten()).reshape(count.shape)
    pyro.sample("x", dist.Normal(loc, scale).to_event(1), obs=x)


PROBLEMS = {
    "latin_square": Problem("latin_square", latin_square),
    "magnet": Problem("magnet", magnet),
    "unknown_number": Problem("unknown_number", unknown_number, args=(HEIGHTS,)),
}
FIRST_MODE: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "latin_square": lambda z: z[:, 0] == 0,
    "magnet": lambda s: s.sum(1) > 5,
    "unknown_number": lambda z: z[:, 0] == 1,
}
"""What a guide that has lost modes still draws."""


class Listed(dist.TorchDistribution):
    """One of the rows of a table (configuration, *shape), by weights (configuration,); its density in one entry."""

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 -- as torch declares it
    support = constraints.real

    def __init__(self, table: Tensor, weight: Tensor, event_dim: int) -> None:
        self.table, self.weight = table, weight
        shape = table.shape[1:]
        split = len(shape) - event_dim
        super().__init__(shape[:split], shape[split:], validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Listed:
        """The same, which has one size."""
        return self

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008 -- torch's own signature
        """Draw a row."""
        index = (self.weight.log() - torch.empty_like(self.weight).exponential_().log()).argmax(-1, keepdim=True)
        return self.table.index_select(0, index).squeeze(0)

    def matches(self, value: Tensor) -> Tensor:
        """Which rows (configuration,) are this value."""
        return (self.table == value).reshape(len(self.table), -1).all(1).to(self.weight)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density (*batch,), the first entry of which stands for all."""
        total = ((self.matches(value) * self.weight).sum().log() - self.weight.sum().log()).reshape(1)
        size = torch.Size(self.batch_shape).numel()
        return torch.cat([total, total.new_zeros(size - 1)]).reshape(self.batch_shape)


class ExactGuide(nn.Module):
    """The posterior of a problem, site by site given those before; or the part of it that ``keep`` chooses."""

    def __init__(self, problem: Problem, keep: Callable[[np.ndarray], np.ndarray] | None = None) -> None:
        super().__init__()
        found = enumerate_posterior(problem)
        probability = found["probability"].values
        self.rows = probability.ndim > 1
        self.names = problem.names("latent")
        self.event_dims = {name: 0 if problem.batch_plates else self._event_dim(problem, name) for name in self.names}
        tables = {name: found[name].values for name in self.names}
        if keep is not None:
            probability = probability * keep(tables[self.names[0]])
        self.register_buffer("weight", torch.tensor(probability))
        for name in self.names:
            self.register_buffer(f"table_{name}", torch.tensor(tables[name]))

    @staticmethod
    def _event_dim(problem: Problem, name: str) -> int:
        return sum(dim.startswith(f"{name}_dim") for dim in problem.sites[name].dims)

    def forward(self, *args: Any) -> None:
        """Sample every site."""
        weight = self.weight + 0.0 * pyro.param("idle", torch.zeros(()))
        if self.rows:
            with pyro.plate("data", weight.shape[1]):
                pyro.sample("z", dist.Categorical(weight.T))
            return
        for name in self.names:
            fn = Listed(self.get_buffer(f"table_{name}"), weight, self.event_dims[name])
            with pyro.plate(*self._plate(name)) if fn.batch_shape else _nothing():
                value = pyro.sample(name, fn)
            weight = weight * fn.matches(value)

    def _plate(self, name: str) -> tuple[str, int]:
        return {"s": ("spin", 9), "cause_on": ("cause", 5)}[name]


def _nothing() -> Any:
    import contextlib

    return contextlib.nullcontext()


def fit(problem: Problem, guide: Any, seed: int = 0) -> tuple[Problem, Result]:
    """A result of a guide as it stands."""
    from dataclasses import replace

    problem = replace(problem, guide=guide, loss=VarGrad(2, floor=-1000.0))
    return problem, fit_svi(problem, num_steps=1, lr=1e-12, num_samples=1000, progress=False, seed=seed)
