"""Guide of the conditional autoencoder: an encoder that reads an image together with its class.

``q(z | x, y) = Normal(m(x, y), L(x, y) L(x, y)^T)`` with a lower triangular L, one network for both. Latents that
explain an image together are correlated.

References
----------
Sohn, K., Lee, H. and Yan, X. (2015). Learning structured output representation using deep conditional generative
models. NeurIPS 28.
"""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.nn import PyroModule
from torch import Tensor

from probmodels.guides.nets import make_reader

__all__ = ["ConditionalEncoder"]

_LEAST_SCALE = 1e-3  # of a latent, so that its divergence stays finite


class ConditionalEncoder(PyroModule):
    """The guide.

    Parameters
    ----------
    shape
        Rows and columns of an image.
    num_latents, num_classes
        Numbers of latents, and of classes.
    hidden
        Width of the two hidden layers.
    """

    def __init__(self, shape: tuple[int, int], num_latents: int, num_classes: int, *, hidden: int = 256) -> None:
        super().__init__()
        self.num_classes, self.num_latents = num_classes, num_latents
        below = num_latents * (num_latents - 1) // 2
        self.encoder = make_reader((math.prod(shape) + num_classes,), 2 * num_latents + below, hidden=hidden)

    def moments(self, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Means (row, latent) and triangles L (row, latent, latent), given images (row, row, column) and their classes.

        Classes are places (row,).
        """
        shown = torch.eye(self.num_classes, dtype=image.dtype, device=image.device)[label]
        found = self.encoder(torch.cat([image.flatten(1), shown], 1))
        mean, spread, below = found.tensor_split([self.num_latents, 2 * self.num_latents], -1)
        scale = F.softplus(spread) + _LEAST_SCALE
        unit = torch.diag_embed(torch.ones_like(scale))
        row, column = torch.tril_indices(self.num_latents, self.num_latents, -1, device=image.device)
        unit = unit.index_put((torch.arange(len(unit), device=image.device).unsqueeze(1), row, column), below)
        return mean, scale.unsqueeze(-1) * unit

    def forward(self, image: Tensor, label: Tensor) -> None:
        """Site ``z`` (data, latent)."""
        axes: Any = {"event_dims": ["latent"]}
        with pyro.plate("data", len(image)) as rows:
            mean, triangle = self.moments(image[rows], label[rows])
            pyro.sample("z", dist.MultivariateNormal(mean, scale_tril=triangle), infer=axes)
