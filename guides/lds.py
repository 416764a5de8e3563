"""The guide of LDS: edges by their probabilities, and a network's weights as points or normals.

The model draws edges from the same probabilities, so that their divergence is zero; what is special here is their
derivative, the identity: that of the loss with respect to a probability is that with respect to the edge.

References
----------
Franceschi, L., Niepert, M., Pontil, M. and He, X. (2019). Learning discrete structures for graph neural networks.
ICML. https://arxiv.org/abs/1903.11960
Glorot, X. and Bengio, Y. (2010). Understanding the difficulty of training deep feedforward neural networks. AISTATS.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.nn import PyroModule
from torch import Tensor, nn

from probmodels.guides.edges import EdgeSet
from probmodels.guides.relaxed import BernoulliIdentity
from probmodels.guides.sparse import Links, SparseMatrix

__all__ = ["WEIGHTS", "EdgeProbability", "LDSGuide", "NodeData", "weight_dims"]

WEIGHTS = ("point", "normal")
_START_SCALE = 0.01  # of a normal weight, in units of its Glorot scale


class NodeData(NamedTuple):
    """One graph, as model and guide take it.

    Attributes
    ----------
    x
        Features (node, feature), dense or sparse.
    edges, links
        Candidate pairs, and the same as the pattern of a matrix.
    y
        Class of every node (node,), 0 where it is not known.
    """

    x: Tensor | SparseMatrix
    edges: EdgeSet
    links: Links
    y: Tensor


class EdgeProbability(PyroModule):
    """Probability of every candidate pair (pair,), which model and guide share; learned, or fixed."""

    probability: Tensor

    def __init__(self, start: Tensor, learned: bool = True) -> None:
        super().__init__()
        if learned:
            self.probability = nn.Parameter(start)
        else:
            self.register_buffer("probability", start)


class LDSGuide(PyroModule):
    """``q(edge) q(weight_in) q(weight_out)``.

    Parameters
    ----------
    edges
        Probabilities of edges.
    shapes
        Shape of every weight matrix by site.
    weights
        ``"point"`` for points, as in the paper, or ``"normal"`` for independent normals.
    """

    def __init__(self, edges: EdgeProbability, shapes: dict[str, tuple[int, int]], weights: str) -> None:
        super().__init__()
        self.edges, self.shapes, self.weights = edges, shapes, weights

    def forward(self, data: NodeData, known: Tensor, held_out: bool = False) -> None:
        """Sites ``edge`` (pair,), ``weight_in`` (feature, hidden), ``weight_out`` (hidden, class)."""
        with pyro.plate("pair", data.edges.num_pairs), poutine.mask(mask=False):
            pyro.sample("edge", BernoulliIdentity(self.edges.probability))
        with poutine.mask(mask=not held_out):
            for name, shape in self.shapes.items():
                self._weight(name, shape)

    def _weight(self, name: str, shape: tuple[int, int]) -> None:
        glorot = math.sqrt(6 / sum(shape))
        like = self.edges.probability

        def start() -> Tensor:  # drawn when the guide first runs, so that every restart has weights of its own
            return glorot * (2 * torch.rand(shape, dtype=like.dtype, device=like.device) - 1)

        loc = pyro.param(f"{name}_loc", start)
        named: Any = {"event_dims": weight_dims(name)}
        if self.weights == "point":
            pyro.sample(name, dist.Delta(loc, event_dim=2), infer=named)
            return
        scale = pyro.param(
            f"{name}_scale",
            lambda: torch.full(shape, _START_SCALE * glorot, dtype=like.dtype, device=like.device),
            constraint=constraints.softplus_positive,
        )
        pyro.sample(name, dist.Normal(loc, scale).to_event(2), infer=named)


def weight_dims(name: str) -> list[str]:
    """Names of the axes of a weight matrix."""
    return {"weight_in": ["feature", "hidden"], "weight_out": ["hidden", "class"]}[name]
