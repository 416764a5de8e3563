"""Towers that embed modalities on a sphere, and a guide of positive numbers: temperatures and weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.nn import PyroModule
from torch import Tensor, nn

from probmodels.guides.nets import make_reader

__all__ = ["NETWORKS", "PositiveGuide", "TokenReader", "Tower"]

# By kind of a modality; the first is the default.
NETWORKS = {"vectors": ("mlp",), "pictures": ("conv", "mlp"), "texts": ("mean", "attention")}

_START_SD = 0.1  # of the logarithms
_START_STEPS = 20.0  # concentration


class TokenReader(nn.Module):
    """A network from codes of words (row, token), 0 for none, to numbers (row, output), whatever their order.

    Parameters
    ----------
    num_words
        Codes, that of none included.
    num_outputs
        Numbers.
    network
        ``"mean"``: the mean of the words' embeddings and two layers; ``"attention"``: a mean with learned weights.
    """

    def __init__(self, num_words: int, num_outputs: int, network: str) -> None:
        super().__init__()
        self.words = nn.Embedding(num_words, num_outputs)
        self.score = nn.Linear(num_outputs, 1) if network == "attention" else None
        self.read = nn.Sequential(nn.Linear(num_outputs, num_outputs), nn.SiLU(), nn.Linear(num_outputs, num_outputs))

    def forward(self, codes: Tensor) -> Tensor:
        """Numbers (row, output); those of a row without words are the same for all such rows."""
        words = self.words(codes)
        share = (codes > 0).to(words)
        if self.score is not None:
            score = self.score(words.tanh()).squeeze(-1)
            share = share * (score - score.amax(1, keepdim=True).detach()).exp()
        share = share / share.sum(1, keepdim=True).clamp(min=torch.finfo(share.dtype).tiny)
        return self.read((share.unsqueeze(-1) * words).sum(1))


class Tower(nn.Module):
    """A network from rows of one modality to points on the unit sphere.

    Parameters
    ----------
    shape
        Of a row: (feature,), (channel, row, column) or, of texts, (word,), the number of codes.
    size
        Length of an embedding.
    hidden
        Width of the hidden layers.
    separate
        Whether there is a second head, for what the modality does not share.
    network
        ``"mlp"``, ``"conv"``, ``"mean"`` or ``"attention"``, see `make_reader` and `TokenReader`.
    """

    def __init__(self, shape: Sequence[int], size: int, hidden: int, separate: bool, network: str = "mlp") -> None:
        super().__init__()
        words = network in NETWORKS["texts"]
        self.trunk: nn.Module = (
            TokenReader(shape[0], hidden, network)
            if words
            else make_reader(tuple(shape), hidden, network=network, hidden=hidden)
        )
        self.shared = nn.Linear(hidden, size)
        self.own = nn.Linear(hidden, size) if separate else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Shared and, where there is a second head, independent embeddings (row, size) of length 1."""
        state = F.silu(self.trunk(x))
        own = None if self.own is None else F.normalize(self.own(state), dim=-1)
        return F.normalize(self.shared(state), dim=-1), own


class PositiveGuide(PyroModule):
    """Independent log-normal distributions of positive sites, and a Dirichlet distribution of the steps of a path.

    Parameters
    ----------
    starts
        Name of a site to its median at the start.
    num_points
        Points of the path, whose site is ``path_steps`` (point + 1,); 0 for none.
    """

    def __init__(self, starts: Mapping[str, float], num_points: int = 0) -> None:
        super().__init__()
        self.log_steps = nn.Parameter(torch.full((num_points + 1,), math.log(_START_STEPS))) if num_points else None
        self.names = tuple(starts)
        self.location = nn.ParameterDict({name: torch.tensor(math.log(value)) for name, value in starts.items()})
        self.log_sd = nn.ParameterDict({name: torch.tensor(math.log(_START_SD)) for name in starts})

    def forward(self, *data: Tensor) -> None:
        """Sites by their names, each a number but for ``path_steps``."""
        for name in self.names:
            pyro.sample(name, dist.LogNormal(self.location[name], self.log_sd[name].exp()))
        if self.log_steps is not None:
            pyro.sample("path_steps", dist.Dirichlet(self.log_steps.exp()))
