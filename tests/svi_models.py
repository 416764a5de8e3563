"""Problems for the tests of fits, at module level so that they are copied as a user's would be."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoNormal
from pyro.nn import PyroModule
from torch import Tensor, nn

from probmodels.inference import Problem


class OwnELBO(Trace_ELBO):
    """Pyro's own loss under another name, which runs by Pyro's own methods."""


def rows(size: int = 12, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.linspace(-1.0, 2.0, size, dtype=dtype)


def global_model(y: Tensor) -> None:
    """One mean for all rows; ``subsample_size`` is there to be overridden."""
    mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 2.0))
    with pyro.plate("row", len(y), subsample_size=5) as i:
        pyro.sample("y", dist.Normal(mu, 0.5), obs=y[i])


def local_model(y: Tensor) -> None:
    """A mean for all rows and a latent value for each of them."""
    mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 2.0))
    with pyro.plate("row", len(y)) as i:
        theta = pyro.sample("theta", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(theta, 0.5), obs=y[i])


def crossed_model(y: Tensor) -> None:
    """Rows and columns, both of which may be subsampled."""
    mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 2.0))
    with pyro.plate("row", y.shape[0], dim=-2) as i, pyro.plate("column", y.shape[1], dim=-1) as j:
        pyro.sample("y", dist.Normal(mu, 0.5), obs=y[i][:, j])


class Amortised(PyroModule):
    """Guide of `local_model` whose local part is read from the row's data."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(1, 2).double()
        nn.init.constant_(self.net.weight, 0.3)
        nn.init.constant_(self.net.bias, -0.2)
        self.loc = nn.Parameter(torch.tensor(0.1, dtype=torch.float64))

    def forward(self, y: Tensor) -> None:
        pyro.sample("mu", dist.Normal(self.loc, 0.3))
        with pyro.plate("row", len(y)) as i:
            loc, log_scale = self.net(y[i].unsqueeze(-1)).unbind(-1)
            pyro.sample("theta", dist.Normal(loc, log_scale.exp()))


class Mixed(PyroModule):
    """Guide of `mixed_model`: a discrete site, which has no pathwise gradient, before a normal one."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(12, dtype=torch.float64))
        self.loc = nn.Parameter(torch.zeros(12, dtype=torch.float64))

    def forward(self, y: Tensor) -> None:
        with pyro.plate("row", len(y)):
            k = pyro.sample("k", dist.Bernoulli(logits=self.logits))
            pyro.sample("theta", dist.Normal(self.loc + k, 0.5))


def mixed_model(y: Tensor) -> None:
    with pyro.plate("row", len(y)):
        k = pyro.sample("k", dist.Bernoulli(torch.full_like(y, 0.3)))
        theta = pyro.sample("theta", dist.Normal(2 * k, 1.0))
        pyro.sample("y", dist.Normal(theta, 0.5), obs=y)


encoder = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4))
decoder = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 4))


def vae_model(x: Tensor) -> None:
    """A variational autoencoder of plain functions, whose networks lie outside them."""
    pyro.module("decoder", decoder)
    with pyro.plate("row", len(x)) as i:
        z = pyro.sample("z", dist.Normal(x.new_zeros(len(i), 2), 1.0).to_event(1))
        pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x[i])


def vae_guide(x: Tensor) -> None:
    pyro.module("encoder", encoder)
    with pyro.plate("row", len(x)) as i:
        loc, log_scale = encoder(x[i]).chunk(2, -1)
        pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def images(size: int = 20) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.rand(size, 4, generator=generator) < 0.4).float()


def problem(model: Any = global_model, guide: Any = None, **changes: Any) -> Problem:
    guide = AutoNormal(model) if guide is None else guide
    fields = {"name": "mine", "model": model, "guide": guide, "args": (rows(),), "batch_plates": ("row",)}
    return Problem(**{**fields, **changes})


def vae(**changes: Any) -> Problem:
    return Problem(**{"name": "vae", "model": vae_model, "guide": vae_guide, "args": (images(),), **changes})


def delta(model: Any) -> AutoDelta:
    return AutoDelta(model)
