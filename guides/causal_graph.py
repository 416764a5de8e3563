"""Distributions of directed acyclic graphs in which the probability of a graph is a product over its nodes.

Each node has a weight for every set of its parents, from prior, likelihood or both; a graph without cycles has their
product. Graphs are built in layers: the first holds the nodes without parents, and of every later node all parents are
in earlier layers, one of them at least in the last. With a_j(U) the sum of node j's weights of parents within U, what
can follow nodes U, of which R are the last layer, is::

    F(U, R) = sum over S of  prod_{j in S} (a_j(U) - a_j(U - R))  F(U + S, S)

over sets S of further nodes. Every graph is counted once, all terms are positive, and there are 4^n of them, so that
normaliser, draws and probabilities of edges are exact.

References
----------
Kuipers, J. and Moffa, G. (2017). Partition MCMC for inference on acyclic digraphs. JASA 112.
https://arxiv.org/abs/1504.05006
Talvitie, T., Vuoksenmaa, A. and Koivisto, M. (2019). Exact sampling of directed acyclic graphs from modular
distributions. UAI.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from numpy.typing import NDArray
from pyro.distributions import constraints
from torch import Tensor

from probmodels.guides.bayesian_network import is_acyclic

__all__ = ["GraphMixture", "GraphTable", "ModularGraphs"]

Floats = NDArray[np.float64]
Sets = NDArray[np.int64]

_NEVER = -1e250  # in place of -inf, which cannot be multiplied by 0


class GraphTable:
    """Sums over all acyclic graphs.

    Parameters
    ----------
    log_weights
        Log weight of every set of parents of every node (node, set), -inf for those that cannot be, such as all that
        hold the node itself; node i belongs to a set whose number has bit i.

    Attributes
    ----------
    log_total
        Log of the sum of the weights of all graphs, -inf if none is possible.
    """

    def __init__(self, log_weights: Floats) -> None:
        self.log_weights, self.size = np.asarray(log_weights, dtype=np.float64), len(log_weights)
        self._weights = np.maximum(self.log_weights, _NEVER)
        self._within = _log_sum_within(self._weights)
        self._bits = (np.arange(2**self.size)[:, None] >> np.arange(self.size) & 1).astype(float)
        self._after = np.zeros((2**self.size, 2**self.size))  # log F, by U and R
        for used in range(2**self.size - 2, -1, -1):
            lasts, _, steps = self._steps(used)
            self._after[used, lasts] = _log_sum(steps, 1)
        total = float(self._after[0, 0])
        self.log_total = -math.inf if total <= _NEVER / 2 else total
        self._layers: dict[tuple[int, int], tuple[Sets, Floats]] = {}
        self._parents: dict[tuple[int, int, int], tuple[Sets, Floats]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> GraphTable:
        """The same: nothing of it changes, and it is large."""
        return self

    def edge_probability(self) -> Floats:
        """Probability of every edge (parent, child)."""
        size = self.size
        before = np.full((2**size, 2**size), _NEVER)  # log weight of all that leads to U and R
        before[0, 0] = 0.0
        holding = np.stack([np.where(self._bits[:, parent] > 0, self._weights, _NEVER) for parent in range(size)])
        holding = np.stack([_log_sum_within(weights) for weights in holding])  # (parent, child, U)
        found = np.zeros((size, size))
        for used in range(2**size - 1):
            lasts, nexts, steps = self._steps(used)
            reached = before[used, lasts][:, None] + steps
            chance = np.exp(reached - self._after[0, 0])
            onward = before[used, lasts][:, None] + steps - self._after[used | nexts, nexts]
            before[used | nexts, nexts] = np.logaddexp(before[used | nexts, nexts], _log_sum(onward, 0))
            placed = chance @ self._bits[nexts]  # (R, child): that the child is in the next layer
            entering = self._entering(used, lasts)
            for parent in np.flatnonzero(self._bits[used]):
                whole = np.repeat(holding[parent][:, [used]].T, len(lasts), 0)
                part = np.where(self._bits[lasts, parent, None] > 0, _NEVER, holding[parent][:, used & ~lasts].T)
                found[parent] += (placed * np.exp(np.minimum(_log_difference(whole, part) - entering, 0.0))).sum(0)
        return found.clip(0.0, 1.0)

    def draw(self, generator: np.random.Generator) -> Floats:
        """A graph (parent, child)."""
        graph, used, last = np.zeros((self.size, self.size)), 0, 0
        while used < 2**self.size - 1:
            if (used, last) not in self._layers:
                _, nexts, steps = self._steps(used, np.array([last]))
                self._layers[used, last] = nexts, np.cumsum(np.exp(steps[0] - steps[0].max()))
            layer = _choose(*self._layers[used, last], generator)
            for node in (place for place in range(self.size) if layer >> place & 1):
                if (node, used, last) not in self._parents:
                    sets = _subsets(used)
                    sets = sets[(sets & last > 0) | (used == 0)]
                    weights = self._weights[node, sets]
                    self._parents[node, used, last] = sets, np.cumsum(np.exp(weights - weights.max()))
                graph[:, node] = self._bits[_choose(*self._parents[node, used, last], generator)]
            used, last = used | layer, layer
        return graph

    def log_probability(self, graph: Floats) -> float:
        """Log probability of one acyclic graph (parent, child)."""
        sets = (graph.T @ 2.0 ** np.arange(self.size)).astype(int)
        return float(self.log_weights[np.arange(self.size), sets].sum() - self.log_total)

    def _steps(self, used: int, lasts: Sets | None = None) -> tuple[Sets, Sets, Floats]:
        """Last layers R, next layers S, and the log weight of these and of all that follows (R, S)."""
        lasts = _subsets(used)[bool(used) :] if lasts is None else lasts
        nexts = _subsets(2**self.size - 1 & ~used)[1:]
        steps = self._entering(used, lasts) @ self._bits[nexts].T + self._after[used | nexts, nexts]
        return lasts, nexts, np.maximum(steps, 2 * self.size * _NEVER)

    def _entering(self, used: int, lasts: Sets) -> Floats:
        """Log weight of every node in the layer after R (R, node)."""
        whole = np.repeat(self._within[:, [used]].T, len(lasts), 0)
        return _log_difference(whole, self._within[:, used & ~lasts].T) if used else whole


class GraphMixture:
    """The mean of distributions of graphs.

    Parameters
    ----------
    tables
        Sums over graphs of each of them.

    Attributes
    ----------
    log_total
        The mean of theirs.
    """

    def __init__(self, tables: Sequence[GraphTable]) -> None:
        self.tables = list(tables)
        self.log_total = float(np.mean([table.log_total for table in tables]))

    def edge_probability(self) -> Floats:
        """Probability of every edge (parent, child)."""
        found: Floats = np.mean([table.edge_probability() for table in self.tables], 0)
        return found

    def draw(self, generator: np.random.Generator) -> Floats:
        """A graph (parent, child)."""
        place = generator.integers(len(self.tables)) if len(self.tables) > 1 else 0
        return self.tables[place].draw(generator)

    def log_probability(self, graph: Floats) -> float:
        """Log probability of one acyclic graph (parent, child)."""
        each = np.array([table.log_probability(graph) for table in self.tables])
        return float(_log_sum(each, 0) - math.log(len(each)))


class ModularGraphs(dist.TorchDistribution):
    """Acyclic graphs by their weights, exactly normalised, with exact draws.

    Parameters
    ----------
    table
        Sums over all graphs.
    batch_shape
        Shape of the batch of independent graphs.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 -- as torch declares it
    support = constraints.independent(constraints.boolean, 2)
    has_enumerate_support = False

    def __init__(self, table: GraphTable, batch_shape: Sequence[int] = ()) -> None:
        self.table = table
        super().__init__(torch.Size(batch_shape), torch.Size((table.size, table.size)), validate_args=False)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> ModularGraphs:
        """The same for more independent graphs."""
        return ModularGraphs(self.table, batch_shape)

    @torch.no_grad()
    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008 -- torch's own signature
        """Independent draws, one by one."""
        shape = (*sample_shape, *self.batch_shape)
        generator = np.random.default_rng(int(torch.randint(2**62, ())))
        graphs = np.stack([self.table.draw(generator) for _ in range(math.prod(shape))])
        return torch.as_tensor(graphs, dtype=torch.get_default_dtype()).reshape(*shape, *self.event_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log probability of graphs (...), -inf where there is a cycle or parents that cannot be."""
        size = self.table.size
        weights = torch.as_tensor(self.table.log_weights, device=value.device)
        node = torch.arange(size, device=value.device)
        sets = (value.mT.double() @ (2.0**node).double()).long()
        density = weights[node, sets].sum(-1) - self.table.log_total
        found = torch.where(is_acyclic(value), density, -torch.inf).to(torch.get_default_dtype())
        return found.expand(torch.broadcast_shapes(found.shape, self.batch_shape))


def _subsets(whole: int) -> Sets:
    """All subsets of a set, the empty one first."""
    found = np.zeros(1, dtype=np.int64)
    for place in range(whole.bit_length()):
        if whole >> place & 1:
            found = np.concatenate([found, found + 2**place])
    return found


def _log_sum_within(weights: Floats) -> Floats:
    """Log sums over all subsets of every set (node, set)."""
    found, sets = weights.copy(), np.arange(weights.shape[1])
    for place in range(len(weights)):
        has = sets[sets >> place & 1 == 1]
        found[:, has] = np.logaddexp(found[:, has], found[:, has - 2**place])
    return found


def _log_difference(whole: Floats, part: Floats) -> Floats:
    """``log(exp(whole) - exp(part))``; what rounding takes to 0 is 1e-16 times as probable as something else."""
    left = -np.expm1(np.minimum(part - whole, 0.0))
    return np.where(left > 0, whole + np.log(left, out=np.zeros_like(left), where=left > 0), _NEVER)


def _log_sum(values: Floats, axis: int) -> Floats:
    top = values.max(axis, keepdims=True)
    found: Floats = (top + np.log(np.exp(values - top).sum(axis, keepdims=True))).squeeze(axis)
    return found


def _choose(sets: Sets, upto: Floats, generator: np.random.Generator) -> int:
    """One of the sets, by cumulated weights."""
    return int(sets[min(np.searchsorted(upto, generator.random() * upto[-1], side="right"), len(sets) - 1)])
