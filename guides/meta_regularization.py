"""Guide of meta generative regularisation: a finder of latents for the generator, and weights of the classifier's head.

The finder maps noise ``e ~ Normal(0, I)`` to latents whose images teach the extractor most::

    "mlp"        z = m(e)                   the published form
    "residual"   z = e + m(e)               m starts at 0, so that the finder starts at the prior
    "flow"       z = flow(e)                autoregressive flows that start as the identity, with an exact density

Networks have no density. For them ``log q(z)`` is that of the independent normal with the mean and variance of the
batch of latents, so that the mean of ``log q(z) - log p(z)`` is the published divergence exactly::

    KL[Normal(mean, variance) || Normal(0, I)] = 1/2 sum_d (mean_d^2 + variance_d - 1 - log variance_d)

References
----------
Yamaguchi, S., Chijiwa, D., Kanai, S., Kumagai, A. and Kashima, H. (2023). Regularizing neural networks with
meta-learning generative models. NeurIPS. https://arxiv.org/abs/2307.13899
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.nn import PyroModule
from torch import Tensor, nn

from probmodels.guides.flows import AffineFlow

__all__ = [
    "FINDERS",
    "HEADS",
    "FinderGuide",
    "FlowFinder",
    "NetworkFinder",
    "head_dims",
    "head_terms",
    "latent_terms",
    "make_finder",
]

FINDERS = ("mlp", "residual", "flow")
HEADS = ("point", "normal")
_NUM_FLOWS = 2
_START_SCALE = 0.01  # of a normal weight, in units of its Glorot scale
_LEAST_VARIANCE = 1e-6  # of a batch of latents, so that its logarithm stays finite


class NetworkFinder(nn.Module):
    """``m(e)`` or ``e + m(e)`` with a network of one hidden layer.

    Parameters
    ----------
    size
        Length of a latent.
    hidden
        Width of the hidden layer.
    residual
        Whether the noise is added; the network then starts at 0.
    """

    def __init__(self, size: int, hidden: int, residual: bool) -> None:
        super().__init__()
        self.first, self.second, self.residual = nn.Linear(size, hidden), nn.Linear(hidden, size), residual
        if residual:
            nn.init.zeros_(self.second.weight)
            nn.init.zeros_(self.second.bias)

    def forward(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Latents (row, size) of noise (row, size), and their log density (row,) by the moments of the batch."""
        found: Tensor = self.second(nn.functional.leaky_relu(self.first(noise)))
        z = noise + found if self.residual else found
        variance, mean = torch.var_mean(z, 0, correction=0)
        scale = (variance + _LEAST_VARIANCE).sqrt()
        return z, dist.Normal(mean, scale).log_prob(z).sum(-1)


class FlowFinder(nn.Module):
    """Two autoregressive flows, the second over the reversed order.

    Parameters
    ----------
    size
        Length of a latent.
    hidden
        Width of the hidden layers.
    """

    def __init__(self, size: int, hidden: int) -> None:
        super().__init__()
        self.flows = nn.ModuleList(AffineFlow(size, hidden) for _ in range(_NUM_FLOWS))

    def forward(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Latents (row, size) of noise (row, size), and their log density (row,)."""
        z, log_density = noise, dist.Normal(torch.zeros_like(noise), 1.0).log_prob(noise).sum(-1)
        for flow in self.flows:
            z, stretch = flow(z)
            z, log_density = z.flip(-1), log_density - stretch
        return z, log_density


def make_finder(kind: str, size: int, hidden: int) -> nn.Module:
    """A finder of `FINDERS`."""
    return FlowFinder(size, hidden) if kind == "flow" else NetworkFinder(size, hidden, kind == "residual")


class FinderGuide(PyroModule):
    """``q(z) q(weight) q(bias)``.

    Parameters
    ----------
    finder
        From noise to latents and their log density.
    size
        Length of a latent.
    shapes
        Shape of ``weight`` and ``bias`` of the head.
    head
        ``"point"``, or ``"normal"`` for independent normals.
    weight
        Weight of the mean divergence of the latents from their prior, in the outer loss; the model has the same.
    """

    def __init__(
        self, finder: nn.Module, size: int, shapes: dict[str, tuple[int, ...]], head: str, weight: float
    ) -> None:
        super().__init__()
        self.finder, self.size, self.shapes, self.head, self.weight = finder, size, shapes, head, weight

    def forward(self, images: Tensor, rows: Tensor, label: Tensor, synthetic: Tensor, held_out: bool = False) -> None:
        """Sites ``z`` (synthetic, latent), ``weight`` (class, feature_axis), ``bias`` (class,).

        Arguments are those of the model, `probmodels.meta_regularization.MetaRegularization`.
        """
        noise = torch.randn(len(synthetic), self.size, dtype=images.dtype, device=images.device)
        z, log_density = self.finder(noise)
        named: Any = {"event_dims": ["latent"]}
        with pyro.plate("synthetic", len(synthetic)), latent_terms(len(synthetic), self.weight, held_out):
            pyro.sample("z", dist.Delta(z, log_density, event_dim=1), infer=named)
        with head_terms(len(rows), held_out):
            for name, shape in self.shapes.items():
                self._weight(name, shape, images)

    def _weight(self, name: str, shape: tuple[int, ...], like: Tensor) -> None:
        limit = math.sqrt(6 / (shape[0] + shape[-1])) if len(shape) == 2 else 0.0
        options: Any = {"dtype": like.dtype, "device": like.device}

        def start() -> Tensor:  # drawn when the guide first runs, so that every restart has weights of its own
            return limit * (2 * torch.rand(shape, **options) - 1)

        loc = pyro.param(f"{name}_loc", start)
        named: Any = {"event_dims": head_dims(name)}
        if self.head == "point":
            pyro.sample(name, dist.Delta(loc, event_dim=len(shape)), infer=named)
            return
        scale = pyro.param(
            f"{name}_scale",
            lambda: torch.full(shape, _START_SCALE, **options),
            constraint=constraints.softplus_positive,
        )
        pyro.sample(name, dist.Normal(loc, scale).to_event(len(shape)), infer=named)


@contextlib.contextmanager
def latent_terms(count: int, weight: float, held_out: bool) -> Iterator[None]:
    """Count the density of latents in the outer loss alone, as a weighted mean over them, in model and guide alike."""
    with poutine.mask(mask=held_out), poutine.scale(scale=weight / count):
        yield


@contextlib.contextmanager
def head_terms(count: int, held_out: bool) -> Iterator[None]:
    """Count the density of the head in the inner loss alone, over the number of labelled images."""
    with poutine.mask(mask=not held_out), poutine.scale(scale=1 / count):
        yield


def head_dims(name: str) -> list[str]:
    """Names of the axes of a site of the head."""
    return {"weight": ["class", "feature_axis"], "bias": ["class"]}[name]
