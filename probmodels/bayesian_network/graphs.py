"""Distribution of directed acyclic graphs, and what counts them.

Graphs are counted by their sinks, nodes without children: a graph whose sinks are taken away is acyclic again, each
sink chooses its parents among what is left, and all sinks of that have to be among them. The same counts, with a weight
for every edge and a limit on parents, normalise the distribution and draw from it.

References
----------
Kuipers, J. and Moffa, G. (2015). Uniform random generation of large acyclic digraphs. Stat. Comput. 25.
https://doi.org/10.1007/s11222-013-9428-y
Robinson, R. W. (1973). Counting labeled acyclic digraphs. In: New Directions in the Theory of Graphs. Academic Press.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np
import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor

from probmodels.guides.bayesian_network import is_acyclic

__all__ = ["AcyclicGraphs", "all_graphs"]

_LISTED_NODES = 5  # 29,281 graphs; one more has 3.8 million


class AcyclicGraphs(TorchDistribution):
    """Directed acyclic graphs on labelled nodes, edges independent but for the ban on cycles.

    Exactly normalised. Draws are exact, too, and made one by one.

    Parameters
    ----------
    num_nodes
        Number of nodes.
    edge_probability
        What the probability of an edge would be if cycles were allowed; 0.5 makes all graphs equally probable.
    max_parents
        Most parents of a node; None for any number.
    batch_shape
        Shape of the batch of independent graphs.

    Attributes
    ----------
    log_total
        Log of the sum over all graphs of the odds of an edge to the power of their number of edges.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 -- as torch declares it
    support = constraints.independent(constraints.boolean, 2)

    def __init__(
        self,
        num_nodes: int,
        edge_probability: float = 0.5,
        max_parents: int | None = None,
        batch_shape: Sequence[int] = (),
    ) -> None:
        self.num_nodes, self.edge_probability, self.max_parents = num_nodes, edge_probability, max_parents
        self._odds = Fraction(edge_probability) / (1 - Fraction(edge_probability))
        self._most = num_nodes - 1 if max_parents is None else min(max_parents, num_nodes - 1)
        self.log_total = _log(sum(_counts(num_nodes, self._most, self._odds)))
        super().__init__(torch.Size(batch_shape), torch.Size((num_nodes, num_nodes)), validate_args=False)

    @property
    def has_enumerate_support(self) -> bool:  # type: ignore[override]
        """Whether the graphs are few enough to be listed."""
        return self.num_nodes <= _LISTED_NODES

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> AcyclicGraphs:
        """The same for more independent graphs."""
        return AcyclicGraphs(self.num_nodes, self.edge_probability, self.max_parents, batch_shape)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """All graphs (graph, 1 ..., parent, child)."""
        if not self.has_enumerate_support:
            raise NotImplementedError(f"graphs of {self.num_nodes} nodes are too many to be listed")
        graphs = all_graphs(self.num_nodes)
        graphs = graphs[(graphs.sum(-2) <= self._most).all(-1)]
        graphs = graphs.reshape(-1, *[1] * len(self.batch_shape), *self.event_shape)
        return graphs.expand(-1, *self.batch_shape, *self.event_shape) if expand else graphs

    def log_prob(self, value: Tensor) -> Tensor:
        """Log probability of graphs (...), -inf where there is a cycle or a node has too many parents."""
        number = value.flatten(-2).sum(-1)
        density = number * math.log(self._odds) - self.log_total
        possible = is_acyclic(value) & (value.sum(-2) <= self._most).all(-1)
        found: Tensor = torch.where(possible, density, -torch.inf)
        return found.expand(torch.broadcast_shapes(found.shape, self.batch_shape))

    @torch.no_grad()
    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008 -- torch's own signature
        """Exact draws: how many sinks a graph has, then those of the graph without them, then the parents of each."""
        shape = (*sample_shape, *self.batch_shape)
        generator = np.random.default_rng(int(torch.randint(2**62, ())))
        graphs = np.stack([self._draw(generator) for _ in range(math.prod(shape))])
        return torch.as_tensor(graphs, dtype=torch.get_default_dtype()).reshape(*shape, *self.event_shape)

    def _draw(self, generator: np.random.Generator) -> np.ndarray:
        left = self.num_nodes
        layers = [
            _choose(_counts(left, self._most, self._odds), generator)
        ]  # sinks, then those of what is left, and so on
        while (left := left - layers[-1]) > 0:
            rest = enumerate(_counts(left, self._most, self._odds))
            ways = [count * _attached(layers[-1], sinks, left, self._most, self._odds) for sinks, count in rest]
            layers.append(_choose(ways, generator))
        graph = np.zeros((self.num_nodes, self.num_nodes))
        nodes = list(generator.permutation(self.num_nodes))
        above: list[Any] = []  # nodes of earlier layers, the last of which is all that has to be covered
        bare: list[Any] = []
        for layer in reversed(layers):
            here = [nodes.pop() for _ in range(layer)]
            for done, node in enumerate(here):
                parents = self._parents(above, bare, layer - done - 1, generator)
                graph[parents, node] = 1
                bare = [other for other in bare if other not in parents]
            above, bare = above + here, here
        return graph

    def _parents(self, above: list[Any], bare: list[Any], more: int, generator: np.random.Generator) -> list[Any]:
        """Parents of a node: among nodes above, of which ``more`` further nodes have to cover the bare ones left."""
        others = [node for node in above if node not in bare]
        choices = [(c, b) for c in range(len(bare) + 1) for b in range(len(others) + 1) if b + c <= self._most]
        ways = [
            math.comb(len(bare), c)
            * math.comb(len(others), b)
            * self._odds ** (b + c)
            * _attached(more, len(bare) - c, len(above), self._most, self._odds)
            for c, b in choices
        ]
        c, b = choices[_choose(ways, generator)]
        picked = [*generator.permutation(len(bare))[:c], *(generator.permutation(len(others))[:b] + len(bare))]
        return [[*bare, *others][place] for place in picked]


@cache
def _attached(new: int, sinks: int, above: int, most: int, odds: Fraction) -> Fraction:
    """Weight of all ways in which new nodes choose parents among those above so that no sink of these stays one."""
    total = Fraction(0)
    for spared in range(sinks + 1):
        choices = sum(math.comb(above - spared, k) * odds**k for k in range(min(most, above - spared) + 1))
        total += (-1) ** spared * math.comb(sinks, spared) * Fraction(choices) ** new
    return total


@cache
def _counts(size: int, most: int, odds: Fraction) -> tuple[Fraction, ...]:
    """Weight of all acyclic graphs by their number of sinks, odds to the power of the number of edges for each."""
    if size == 0:
        return (Fraction(1),)
    found = [Fraction(0)]
    for sinks in range(1, size + 1):
        rest = _counts(size - sinks, most, odds)
        ways = (c * _attached(sinks, s, size - sinks, most, odds) for s, c in enumerate(rest))
        found.append(math.comb(size, sinks) * sum(ways, Fraction(0)))
    return tuple(found)


def _choose(weights: Sequence[Fraction], generator: np.random.Generator) -> int:
    total = sum(weights)
    chances = np.array([float(weight / total) for weight in weights])
    return int(generator.choice(len(chances), p=chances / chances.sum()))


def _log(value: Fraction | int) -> float:
    fraction = Fraction(value)
    return math.log(fraction.numerator) - math.log(fraction.denominator)


def all_graphs(num_nodes: int) -> Tensor:
    """All acyclic graphs (graph, parent, child) of up to 5 nodes."""
    pairs = list(itertools.combinations(range(num_nodes), 2))
    codes = torch.arange(3 ** len(pairs)).unsqueeze(-1) // 3 ** torch.arange(len(pairs)) % 3
    graphs = torch.zeros(len(codes), num_nodes, num_nodes)
    for code, (low, high) in zip(codes.T, pairs, strict=True):
        graphs[:, low, high], graphs[:, high, low] = (code == 1).float(), (code == 2).float()
    return graphs[is_acyclic(graphs)].to(torch.get_default_dtype())
