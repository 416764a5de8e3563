"""Guide of noisy edges that explain labels: exact conditional log odds of every edge, corrected by what labels say.

Given the parameters and without labels, edges are independent with known log odds. Labels make them dependent; the
guide keeps them independent and adds to the log odds of each a number to be fitted::

    parameters ~ structured normal in unconstrained space,  weights of the network ~ normals or points
    A_uv | parameters ~ Bernoulli(logits = exact log odds_uv(parameters) + shift_uv)

At ``shift = 0`` its divergence from the conditional distribution of the edges is zero for every draw of the parameters,
so that an edge that tells nothing about labels adds neither bias nor noise.

References
----------
Dong, Z., Mnih, A. and Tucker, G. (2020). DisARM: an antithetic gradient estimator for binary latent variables. NeurIPS.
https://arxiv.org/abs/2006.10680
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Annotated, Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.nn import PyroModule, PyroParam
from torch import Tensor

from probmodels.errors import ProblemError
from probmodels.guides.auto import FlatGuide, make_guide
from probmodels.guides.relaxed import BernoulliConcrete, BernoulliIdentity
from probmodels.inference.problem import Problem
from probmodels.options import OneOf, Seed, checked

__all__ = ["ESTIMATORS", "WEIGHTS", "EdgeGuide", "disarm_slope", "make_edge_guide"]

_TEMPERATURE = 0.5
_FEW = 500  # pairs up to which an unbiased derivative is worth its noise
_START = 0.1  # standard deviation of a weight
WEIGHTS = ("normal", "point")
ESTIMATORS = ("disarm", "concrete", "identity")

LogOdds = Callable[[Any, Any, Mapping[str, Tensor]], Tensor]
Fit = Callable[[Any, Mapping[str, Tensor], Tensor], Tensor]


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
    fit
        Log likelihood (...) of the labels, from the model's first argument, the latent sites and edges (..., pair).
    num_pairs
        Candidate pairs.
    points
        Whether a weight is one value, with its prior as penalty, instead of a normal.
    estimator
        How the expected log likelihood of the labels is differentiated by the log odds. ``"disarm"``: from the
        difference between two antithetic graphs, unbiased, noisier the more edges are uncertain. ``"concrete"`` and
        ``"identity"``: through the edges, by `BernoulliConcrete` and `BernoulliIdentity`, biased but less noisy.
    """

    def __init__(
        self,
        channel: FlatGuide,
        weights: Mapping[str, Tensor],
        log_odds: LogOdds,
        fit: Fit,
        num_pairs: int,
        *,
        points: bool = False,
        estimator: str = "disarm",
    ) -> None:
        super().__init__("guide")
        self.channel = channel
        self.shift: Any = PyroParam(torch.zeros(num_pairs))
        for name, start in weights.items():
            setattr(self, f"{name}_loc", PyroParam(start))
            if not points:
                setattr(self, f"{name}_scale", PyroParam(torch.full_like(start, _START), constraints.positive))
        self._points, self._log_odds, self._fit, self._estimator = points, log_odds, fit, estimator

    def forward(self, data: Any, prior: Any, **options: Any) -> None:
        """Sample all latent sites of the model."""
        values = self.channel(data, prior, **options)
        hidden, num_features = self.weight_in_loc.shape
        units = pyro.plate("hidden", hidden, dim=-2)
        with units, pyro.plate("feature", num_features, dim=-1):
            values["weight_in"] = pyro.sample("weight_in", self._weight("weight_in"))
        with units, pyro.plate("class", self.weight_out_loc.shape[1], dim=-1):
            values["weight_out"] = pyro.sample("weight_out", self._weight("weight_out"))
        logits = self._log_odds(data, prior, values) + self.shift
        edges: Any = {
            "disarm": lambda: dist.Bernoulli(logits=logits),
            "concrete": lambda: BernoulliConcrete(_TEMPERATURE, logits=logits),
            "identity": lambda: BernoulliIdentity(logits=logits),
        }[self._estimator]()
        with pyro.plate("pair", len(self.shift), dim=-1):
            edge = pyro.sample("edge", edges)
        if self._estimator == "disarm":
            slope = disarm_slope(lambda graphs: self._fit(data, values, graphs), logits.detach(), edge)
            # Zero, with the derivative that the expected log likelihood of the labels has.
            pyro.factor("labels", ((logits.detach() - logits) * slope).sum(), has_rsample=True)

    def _weight(self, name: str) -> Any:
        loc = getattr(self, f"{name}_loc")
        return dist.Delta(loc) if self._points else dist.Normal(loc, getattr(self, f"{name}_scale"))


@torch.no_grad()
def disarm_slope(function: Callable[[Tensor], Tensor], logits: Tensor, edge: Tensor) -> Tensor:
    """Unbiased derivative (pair,) of the mean of a function of graphs (..., pair) by the log odds of independent edges.

    With uniform u, an edge is 1[u > 1 - p] and its antithetic partner 1[u < p]; the partner is drawn given the edge.

    Parameters
    ----------
    function
        From graphs (2, pair) to values (2,).
    logits
        Log odds (pair,) of the edges.
    edge
        A draw of them (pair,).
    """
    chance, other = logits.sigmoid(), (-logits).sigmoid()
    partner = torch.bernoulli(
        torch.where(edge > 0, (chance - other).clamp(min=0) / chance, (chance / other).clamp(max=1))
    )
    value = function(torch.stack([edge, partner]))
    sign = torch.where(edge == partner, 0.0, edge - partner)
    return 0.5 * (value[0] - value[1]) * sign * logits.abs().sigmoid()


@checked(ProblemError)
def make_edge_guide(
    problem: Problem,
    log_odds: LogOdds,
    fit: Fit,
    *,
    weights: Annotated[str, OneOf(WEIGHTS)] = "normal",
    estimator: Annotated[str, OneOf(ESTIMATORS)] | None = None,
    seed: Seed = 0,
) -> EdgeGuide:
    """Guide of a problem with latent sites ``edge`` (pair,), ``weight_in``, ``weight_out`` and continuous others.

    Parameters
    ----------
    problem
        A problem without guide.
    log_odds, fit
        As in `EdgeGuide`.
    weights
        ``"normal"`` or ``"point"``.
    estimator
        As in `EdgeGuide`; None for ``"disarm"`` up to 500 pairs, beyond which its noise outweighs the bias of
        ``"concrete"``.
    seed
        Seed of the start of the weights, which have to differ from each other.

    Raises
    ------
    ProblemError
        If an option is unknown.
    """
    num_pairs = problem.sites["edge"].shape[0]
    if estimator is None:
        estimator = "disarm" if num_pairs <= _FEW else "concrete"
    generator = torch.Generator().manual_seed(seed)
    start = {}
    for name in ("weight_in", "weight_out"):
        shape = problem.sites[name].shape
        start[name] = torch.randn(shape, generator=generator) * math.sqrt(2 / sum(shape))

    def hold(site: Any) -> Any:
        return {"generated": True} if site["name"] in ("edge", *start) else {}

    channel = replace(problem, model=poutine.infer_config(problem.model, hold), transient=())
    flat = make_guide(channel, "structured")
    assert isinstance(flat, FlatGuide)
    return EdgeGuide(
        flat,
        start,
        log_odds,
        fit,
        num_pairs,
        points=weights == "point",
        estimator=estimator,
    )
