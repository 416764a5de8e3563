"""Policy of directed acyclic graphs: pairs of nodes are visited one after the other, each gets an edge or none.

A state holds the edges between the pairs visited so far, an action is no edge, or one in either direction unless a path
leads back. Every graph is reached on one path only, so that the density of the guide is the product of the actions'::

    q(graph) = prod_t q(action_t | edges before t)

Logits are a network's, one hidden layer for each pair that sees all edges before it, plus what could be said if the
parents of each node were chosen by themselves: the log of the scores of all completions of its parents, summed. The
network has to learn only what the ban on cycles adds to that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor, nn

__all__ = ["EdgePolicy", "GraphPolicy", "is_acyclic", "reachable"]


def reachable(graph: Tensor) -> Tensor:
    """Whether a path of any length, none included, leads from one node to another: (..., from, to) as 0 and 1.

    Parameters
    ----------
    graph
        Adjacency (..., parent, child), 0 and 1.
    """
    size = graph.shape[-1]
    paths = graph + torch.eye(size, dtype=graph.dtype, device=graph.device)
    for _ in range(max(size - 1, 1).bit_length()):
        paths = (paths @ paths).clamp(max=1)
    return paths.clamp(max=1)


def is_acyclic(graph: Tensor) -> Tensor:
    """Whether graphs (..., parent, child) have no cycle: (...)."""
    back = reachable(graph) * graph.mT  # edges whose child leads to their parent
    return back.flatten(-2).sum(-1) == 0


class EdgePolicy(nn.Module):
    """Guide of a latent site ``graph`` (parent, child).

    Parameters
    ----------
    scores
        Log weight of every set of parents of every node (node, set), -inf for those that cannot be.
    hidden
        Width of the hidden layer of each pair.
    look_ahead
        Whether logits start from the completions of parents.
    seed
        Seed of the starting values.
    """

    sets: Tensor  # what an edge before adds to the parents of the child (direction, pair, before * direction)
    places: Tensor  # of the table of gains, by (direction, pair), at no parents
    gain: Tensor  # see `_gain`, flat
    earlier: Tensor  # which actions come before a pair (pair, before * direction)
    edges: Tensor  # places of edges in a flat graph (pair * direction)

    def __init__(self, scores: Tensor, *, hidden: int = 64, look_ahead: bool = True, seed: int = 0) -> None:
        super().__init__()
        size = len(scores)
        pairs = [(low, high) for high in range(size) for low in range(high)]
        self.num_nodes, self.num_pairs, self.hidden = size, len(pairs), hidden
        self.pairs = tuple(pairs)
        order = torch.arange(self.num_pairs)
        low, high = torch.tensor(pairs).T
        # An action is an entry of (pair, direction): from the lower node to the higher one, or back.
        bits = torch.zeros(size, self.num_pairs, 2)
        bits[high, order, 0], bits[low, order, 1] = 2.0**low, 2.0**high
        earlier = (order[:, None] < order).to(bits)  # (before, pair)
        ends = torch.stack([bits[high], bits[low]])  # of the child of each direction (direction, pair, before, 2)
        self.register_buffer("sets", (ends * earlier.T[:, :, None]).flatten(2))
        decided = torch.stack([earlier.T @ ((low == n) | (high == n)).to(bits) for n in range(size)]).long()
        gain = _gain(scores.double()).to(bits)
        child = torch.stack([high, low])
        places = (child * (size - 1) + decided[child, order]) * 2**size
        self.register_buffer("places", places)
        self.register_buffer("gain", gain.flatten())
        self.register_buffer("earlier", earlier.repeat_interleave(2, 0).T.contiguous())
        self.register_buffer("edges", torch.stack([low * size + high, high * size + low], -1).flatten())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.first = nn.Parameter(torch.randn(self.num_pairs, 2 * self.num_pairs, hidden) / math.sqrt(size))
            self.bias = nn.Parameter(torch.randn(self.num_pairs, hidden) / 2)
        self.second = nn.Parameter(torch.zeros(self.num_pairs, hidden, 2))
        self.constant = nn.Parameter(torch.zeros(self.num_pairs, 2))
        self.trust = nn.Parameter(torch.full((self.num_pairs, 2), 1.0 if look_ahead else 0.0))

    def forward(self, *args: Any, **kwargs: Any) -> None:
        """Site ``graph``."""
        pyro.module("policy", self)
        pyro.sample("graph", GraphPolicy(self))

    def actions(self, graph: Tensor) -> Tensor:
        """Indicators (..., pair * direction) of the edges of graphs (..., parent, child)."""
        return graph.flatten(-2)[..., self.edges].to(self.bias.dtype)

    def graphs(self, actions: Tensor) -> Tensor:
        """Graphs (..., parent, child) of indicators (..., pair * direction)."""
        flat = actions.new_zeros(*actions.shape[:-1], self.num_nodes**2)
        return flat.index_copy(-1, self.edges, actions).unflatten(-1, (self.num_nodes, self.num_nodes))

    def logits(self, actions: Tensor) -> Tensor:
        """Log odds (..., pair, direction) of each edge against none, given those before."""
        seen = torch.einsum("...e,peh->...ph", actions, self.first * self.earlier.unsqueeze(-1))
        found = torch.einsum("...ph,phc->...pc", (seen + self.bias).tanh(), self.second) + self.constant
        sets = torch.einsum("...e,dpe->...dp", actions, self.sets).long()
        gain = self.gain[sets + self.places].mT
        found = found + self.trust * gain.clamp(min=-1e4)
        before = actions.unsqueeze(-2) * self.earlier
        paths = reachable(self.graphs(before))  # (..., pair, from, to)
        back = paths.flatten(-2).gather(-1, self._back().expand(*paths.shape[:-2], 2))
        return found.masked_fill((back > 0) | (gain == -torch.inf), -torch.inf)

    def _back(self) -> Tensor:
        """Where the path stands that would close a cycle (pair, direction)."""
        return self.edges.unflatten(0, (-1, 2)).flip(-1)

    def draw(self, batch: Sequence[int], temperature: float, epsilon: float, past: Any = None) -> Tensor:
        """Graphs (*batch, parent, child), of which the first actions may be those of ``past``: graphs, and how many."""
        size, rows = self.num_nodes, math.prod(batch)
        bias = self.bias
        actions = bias.new_zeros(rows, 2 * self.num_pairs)
        paths = torch.eye(size, dtype=bias.dtype, device=bias.device).expand(rows, size, size)
        given = None if past is None else (self.actions(past[0]).expand(*batch, -1).reshape(rows, -1), past[1])
        for pair, (low, high) in enumerate(self.pairs):
            before = slice(0, 2 * pair)
            seen = (actions[:, before] @ self.first[pair, before] + bias[pair]).tanh()
            sets = (actions[:, before] @ self.sets[:, pair, before].T).long()
            gain = self.gain[sets + self.places[:, pair]]
            logits = seen @ self.second[pair] + self.constant[pair] + self.trust[pair] * gain.clamp(min=-1e4)
            back = torch.stack([paths[:, high, low], paths[:, low, high]], -1) > 0
            logits = logits.masked_fill(back | (gain == -torch.inf), -torch.inf)
            action = _choose(logits, temperature, epsilon)
            if given is not None:
                keep = (pair < given[1]).expand(tuple(batch)).reshape(rows, 1)
                action = torch.where(keep, given[0][:, 2 * pair : 2 * pair + 2], action)
            actions = actions.index_copy(1, torch.arange(2 * pair, 2 * pair + 2, device=bias.device), action)
            there = paths[:, :, low, None] * paths[:, high, None] * action[:, 0, None, None]
            again = paths[:, :, high, None] * paths[:, low, None] * action[:, 1, None, None]
            paths = (paths + there + again).clamp(max=1)
        return self.graphs(actions).reshape(*batch, size, size)


def _choose(logits: Tensor, temperature: float, epsilon: float) -> Tensor:
    """Indicators (row, direction) of draws, none of them for no edge, from log odds against that."""
    logits = torch.cat([torch.zeros_like(logits[:, :1]), logits], -1)
    flatter = (logits / temperature).softmax(-1)
    if epsilon > 0:
        possible = (logits > -torch.inf).to(logits.dtype)
        flatter = (1 - epsilon) * flatter + epsilon * possible / possible.sum(-1, keepdim=True)
    noise = torch.empty_like(flatter).exponential_()
    best = (flatter / noise).argmax(-1, keepdim=True)
    return (best == torch.arange(1, logits.shape[-1], device=logits.device)).to(logits.dtype)


def _gain(scores: Tensor) -> Tensor:
    """What an edge adds (node, decided, set) to the log weight of all completions of a set of parents of a node.

    Pairs that a node is in are visited by the other node; ``decided`` counts those that have been.
    """
    size = len(scores)
    sets = torch.arange(2**size, device=scores.device)
    found = []
    for node in range(size):
        ahead, gains = scores[node], []
        for other in reversed([n for n in range(size) if n != node]):
            more = torch.where(sets >> other & 1 == 0, ahead[sets | 1 << other], -torch.inf)
            gains.append(torch.where(more == -torch.inf, -torch.inf, more - ahead))
            ahead = torch.logaddexp(ahead, more)
        found.append(torch.stack(gains[::-1]))
    return torch.stack(found)


class GraphPolicy(dist.TorchDistribution):
    """Graphs as an `EdgePolicy` draws them.

    Parameters
    ----------
    policy
        Gives the logits.
    batch_shape
        Shape of the batch of independent graphs.
    temperature, epsilon
        How draws are explored, see `probmodels.inference.flows.exploration.Explore`; densities are those of the policy.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 -- as torch declares it
    support = constraints.independent(constraints.boolean, 2)
    has_enumerate_support = False

    def __init__(
        self, policy: EdgePolicy, batch_shape: Sequence[int] = (), *, temperature: float = 1.0, epsilon: float = 0.0
    ) -> None:
        self.policy, self.temperature, self.epsilon = policy, temperature, epsilon
        event = torch.Size((policy.num_nodes, policy.num_nodes))
        super().__init__(torch.Size(batch_shape), event, validate_args=False)

    @property
    def num_steps(self) -> int:
        """Pairs of nodes."""
        return self.policy.num_pairs

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> GraphPolicy:
        """The same for more independent graphs."""
        return GraphPolicy(self.policy, batch_shape, temperature=self.temperature, epsilon=self.epsilon)

    def explored(self, temperature: float = 1.0, epsilon: float = 0.0) -> GraphPolicy:
        """The same with flatter draws."""
        return GraphPolicy(self.policy, self.batch_shape, temperature=temperature, epsilon=epsilon)

    @torch.no_grad()
    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008 -- torch's own signature
        """Graphs, pair by pair."""
        return self.policy.draw((*sample_shape, *self.batch_shape), self.temperature, self.epsilon)

    @torch.no_grad()
    def completed(self, value: Tensor, kept: Tensor) -> Tensor:
        """Graphs whose first ``kept`` (batch) pairs are those of ``value``."""
        batch = value.shape[:-2]
        return self.policy.draw(batch, self.temperature, self.epsilon, (value, torch.as_tensor(kept)))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log probability of graphs, -inf where there is a cycle."""
        actions = self.policy.actions(value)
        taken = actions.unflatten(-1, (-1, 2))
        logits = self.policy.logits(actions)
        chosen = torch.where(taken > 0, logits, 0.0).sum(-1)
        density = (chosen - _log_total(logits)).sum(-1)
        return torch.where(is_acyclic(value.to(actions.dtype)), density, -torch.inf)


def _log_total(logits: Tensor) -> Tensor:
    """Log of 1 + sum of exp, the normaliser of log odds (..., direction)."""
    return torch.cat([torch.zeros_like(logits[..., :1]), logits], -1).logsumexp(-1)
