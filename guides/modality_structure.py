"""Towers that embed modalities on a sphere, and a guide of positive numbers: temperatures and weights."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.nn import PyroModule
from torch import Tensor, nn

from probmodels.guides.nets import make_reader

__all__ = ["PositiveGuide", "Tower"]

_START_SD = 0.1  # of the logarithms


class Tower(nn.Module):
    """A network from rows (row, feature) of one modality to points on the unit sphere.

    Parameters
    ----------
    num_features
        Numbers of a row.
    size
        Length of an embedding.
    hidden
        Width of the hidden layers.
    separate
        Whether there is a second head, for what the modality does not share.
    """

    def __init__(self, num_features: int, size: int, hidden: int, separate: bool) -> None:
        super().__init__()
        self.trunk = make_reader((num_features,), hidden, hidden=hidden)
        self.shared = nn.Linear(hidden, size)
        self.own = nn.Linear(hidden, size) if separate else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Shared and, where there is a second head, independent embeddings (row, size) of length 1."""
        state = F.silu(self.trunk(x))
        own = None if self.own is None else F.normalize(self.own(state), dim=-1)
        return F.normalize(self.shared(state), dim=-1), own


class PositiveGuide(PyroModule):
    """Independent log-normal distributions of positive sites.

    Parameters
    ----------
    starts
        Name of a site to its median at the start.
    """

    def __init__(self, starts: Mapping[str, float]) -> None:
        super().__init__()
        self.names = tuple(starts)
        self.location = nn.ParameterDict({name: torch.tensor(math.log(value)) for name, value in starts.items()})
        self.log_sd = nn.ParameterDict({name: torch.tensor(math.log(_START_SD)) for name in starts})

    def forward(self, *data: Tensor) -> None:
        """Sites by their names, each a number."""
        for name in self.names:
            pyro.sample(name, dist.LogNormal(self.location[name], self.log_sd[name].exp()))
