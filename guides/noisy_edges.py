"""Guide of noisy edges that explain labels: exact conditional log odds of every edge, corrected by what labels say.

Given the parameters and without labels, edges are independent with known log odds. Labels make them dependent; the
guide keeps them independent and adds to the log odds of each a number to be fitted::

    parameters ~ structured normal in unconstrained space
    A_uv | parameters ~ Bernoulli(logits = exact log odds_uv(parameters) + shift_uv)

At ``shift = 0`` its divergence from the conditional distribution of the edges is zero for every draw of the parameters,
so that an edge that tells nothing about labels adds neither bias nor noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.nn import PyroModule, PyroParam
from torch import Tensor

from probmodels.datasets import DataError
from probmodels.guides.auto import FlatGuide, make_guide
from probmodels.guides.relaxed import BernoulliConcrete, BernoulliIdentity
from probmodels.inference.problem import Problem

__all__ = ["EdgeGuide", "make_edge_guide"]

_TEMPERATURE = 0.5
_START = 0.1  # standard deviation of a weight
_WEIGHTS = ("normal", "point")
_RELAXATIONS = ("concrete", "identity")

LogOdds = Callable[[Any, Any, Mapping[str, Tensor]], Tensor]


class EdgeGuide(PyroModule):
    """Parameters of the channel, weights of the network, then the edges.

    Parameters
    ----------
    channel
        Guide of all latent sites but the edges and the weights.
    weights
        Starts of ``weight_in`` (hidden, feature) and ``weight_out`` (hidden, class).
    log_odds
        Log odds (pair,) of the edges without labels, from the model's first two arguments and the latent sites.
    num_pairs
        Candidate pairs.
    points
        Whether a weight is one value, with its prior as penalty, instead of a normal.
    relaxation
        ``"concrete"`` or ``"identity"``: how derivatives pass through edges.
    """

    def __init__(
        self,
        channel: FlatGuide,
        weights: Mapping[str, Tensor],
        log_odds: LogOdds,
        num_pairs: int,
        *,
        points: bool = False,
        relaxation: str = "concrete",
    ) -> None:
        super().__init__("guide")
        self.channel = channel
        self.shift: Any = PyroParam(torch.zeros(num_pairs))
        for name, start in weights.items():
            setattr(self, f"{name}_loc", PyroParam(start))
            if not points:
                setattr(self, f"{name}_scale", PyroParam(torch.full_like(start, _START), constraints.positive))
        self._points, self._log_odds, self._relaxation = points, log_odds, relaxation

    def forward(self, data: Any, prior: Any, **options: Any) -> None:
        """Sample all latent sites of the model."""
        values = self.channel(data, prior, **options)
        logits = self._log_odds(data, prior, values) + self.shift
        with pyro.plate("pair", len(self.shift), dim=-1):
            if self._relaxation == "identity":
                edge: Any = BernoulliIdentity(logits=logits)
            else:
                edge = BernoulliConcrete(_TEMPERATURE, logits=logits)
            pyro.sample("edge", edge)
        hidden, num_features = self.weight_in_loc.shape
        units = pyro.plate("hidden", hidden, dim=-2)
        with units, pyro.plate("feature", num_features, dim=-1):
            pyro.sample("weight_in", self._weight("weight_in"))
        with units, pyro.plate("class", self.weight_out_loc.shape[1], dim=-1):
            pyro.sample("weight_out", self._weight("weight_out"))

    def _weight(self, name: str) -> Any:
        loc = getattr(self, f"{name}_loc")
        return dist.Delta(loc) if self._points else dist.Normal(loc, getattr(self, f"{name}_scale"))


def make_edge_guide(
    problem: Problem, log_odds: LogOdds, *, weights: str = "normal", relaxation: str = "concrete", seed: int = 0
) -> EdgeGuide:
    """Guide of a problem with latent sites ``edge`` (pair,), ``weight_in``, ``weight_out`` and continuous others.

    Parameters
    ----------
    problem
        Without guide.
    log_odds, relaxation
        As in `EdgeGuide`.
    weights
        ``"normal"`` or ``"point"``.
    seed
        Of the start of the weights, which have to differ from each other.

    Raises
    ------
    DataError
        If an option is unknown.
    """
    for name, value, known in (("weights", weights, _WEIGHTS), ("relaxation", relaxation, _RELAXATIONS)):
        if value not in known:
            raise DataError(f"{name}={value!r}; choose one of {known}")
    generator = torch.Generator().manual_seed(seed)
    start = {}
    for name in ("weight_in", "weight_out"):
        shape = problem.sites[name].shape
        start[name] = torch.randn(shape, generator=generator) * math.sqrt(2 / sum(shape))

    def hold(site: Any) -> Any:
        return {"generated": True} if site["name"] in ("edge", *start) else {}

    channel = replace(problem, model=poutine.infer_config(problem.model, hold), transient=())
    return EdgeGuide(
        make_guide(channel, "structured"),
        start,
        log_odds,
        problem.sites["edge"].shape[0],
        points=weights == "point",
        relaxation=relaxation,
    )
