"""Mechanisms between concepts, and a guide that abducts the noise behind them.

The guide reads an observation and proposes concepts; the noise that brings them about follows from the mechanisms. With
``y_i = g_i(parents) + s_i noise_i`` and a proposal ``y_i ~ Normal(m_i(x) + sum_j<i C_ij (y_j - m_j(x)), r_i(x))``, in
the order of the graph,

    noise_i ~ Normal((proposed mean - g_i(parents)) / s_i, r_i / s_i),

a chain of normals whose KL divergences from the standard normal prior are known. Proposals are of concepts and not of
noise, so that a mechanism may sharpen without the reader of images having to follow. The matrix C lets concepts depend
on each other given the observation: of a linear Gaussian model the exact posterior is among the proposals.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro import poutine
from pyro.nn import PyroModule
from torch import Tensor, nn

from probmodels.guides.acyclicity import topological_order

__all__ = ["MECHANISMS", "AbductionGuide", "Mechanisms"]

MECHANISMS = ("additive", "post_nonlinear", "linear", "masked")
_LEAST_SCALE = 0.02  # sd of a concept's own noise, in units of the concept: relations may be deterministic
_BUMPS = 4  # of a monotone function


class Mechanisms(nn.Module):
    """How concepts come about from their causes, one function for each.

    ==================  ==============================================================================================
    ``additive``        ``z_i = g_i(z_parents) + s_i noise_i``, g a network of two hidden layers
    ``post_nonlinear``  ``z_i = h_i(g_i(z_parents) + s_i noise_i)``, h increasing
    ``linear``          ``z_i = sum_j w_ji z_j + b_i + s_i noise_i``, that is ``(I - W')^-1`` times noise
    ``masked``          ``z_i = g_i(l_parents) + noise_i`` of ``l = (I - W')^-1 noise``: Yang et al. (2021), eq. 2 and 3
    ==================  ==============================================================================================

    Parameters
    ----------
    graph
        (cause, effect), edges where it is not 0.
    kind
        One of `MECHANISMS`.
    hidden
        Width of the networks.
    names
        Names of the concepts, for errors.

    Raises
    ------
    ProblemError
        If the graph has a cycle.
    """

    edges: Tensor

    def __init__(self, graph: Tensor, kind: str = "additive", *, hidden: int = 32, names: Sequence[str] = ()) -> None:
        super().__init__()
        size = len(graph)
        self.kind, self.size = kind, size
        self.order = topological_order(graph, names or None)
        self.register_buffer("edges", (torch.as_tensor(graph) != 0).to(torch.get_default_dtype()))
        self.parents = [[j for j in range(size) if self.edges[j, i]] for i in range(size)]
        self.base = nn.Parameter(torch.zeros(size))
        if kind in ("linear", "masked"):
            self.weight = nn.Parameter(0.1 * torch.randn(size, size) * self.edges)
        if kind != "linear":
            self.first = nn.Parameter(
                torch.randn(size, size, hidden) / self.edges.sum(0).clamp(min=1).sqrt()[:, None, None]
            )
            self.offset = nn.Parameter(torch.randn(size, hidden))
            self.second = nn.Parameter(torch.randn(size, hidden, hidden) / math.sqrt(hidden))
            self.last = nn.Parameter(torch.randn(size, hidden) / hidden)
        if kind != "masked":
            self.log_scale = nn.Parameter(torch.full((size,), -0.5))
        if kind == "post_nonlinear":
            self.height = nn.Parameter(torch.full((size, _BUMPS), -4.0))
            self.steepness = nn.Parameter(torch.zeros(size, _BUMPS))
            self.place = nn.Parameter(torch.linspace(-1.5, 1.5, _BUMPS).expand(size, -1).clone())

    def scale(self, i: int) -> Tensor:
        """Sd of a concept's own noise ()."""
        if self.kind == "masked":
            return self.base.new_ones(())
        return _LEAST_SCALE + self.log_scale[i].exp()

    def location(self, i: int, causes: Sequence[Tensor]) -> Tensor:
        """Value without noise (...) from those of the causes (...), all concepts counted; () for one without causes."""
        if not self.parents[i]:
            return self.base[i]
        values = self._parents(i, causes)
        if self.kind == "linear":
            return self.base[i] + values @ self.weight[self.parents[i], i]
        state = F.silu(values @ self.first[i, self.parents[i]] + self.offset[i])
        return self.base[i] + F.silu(state @ self.second[i]) @ self.last[i]

    def value(self, i: int, y: Tensor) -> Tensor:
        """The concept (...) of location and noise together (...)."""
        if self.kind != "post_nonlinear":
            return y
        steps = F.softplus(self.height[i]) * torch.tanh(
            F.softplus(self.steepness[i]) * (y.unsqueeze(-1) - self.place[i])
        )
        return y + steps.sum(-1)

    def cause(self, i: int, z: Tensor, location: Tensor, causes: Sequence[Tensor]) -> Tensor:
        """What a concept (...) of some location is to its effects.

        Itself, but for ``masked``: the linear layer of its noise, ``z - location``. One that is set has the noise that
        would have brought the value about, so that to set it to the value it has changes nothing.
        """
        if self.kind != "masked":
            return z
        noise = z - location + self.base[i]
        if not self.parents[i]:
            return noise
        return noise + self._parents(i, causes) @ self.weight[self.parents[i], i]

    def propagate(
        self, noise: Callable[[int, Tensor], Tensor], concept: Callable[[int, Tensor], Tensor] | None = None
    ) -> list[Tensor]:
        """All concepts (...), each after its causes.

        Parameters
        ----------
        noise
            From a concept's place and its location to its noise (...).
        concept
            From a concept's place and its natural value to what it is, for interventions; None for that value.
        """
        concepts: list[Any] = [None] * self.size
        causes = list(concepts)
        for i in self.order:
            location = self.location(i, causes)
            value = self.value(i, location + self.scale(i) * noise(i, location))
            concepts[i] = value if concept is None else concept(i, value)
            causes[i] = self.cause(i, concepts[i], location, causes)
        return concepts

    def _parents(self, i: int, causes: Sequence[Tensor]) -> Tensor:
        """Values of the causes of a concept (..., cause), some of which may be of several worlds."""
        return torch.stack(torch.broadcast_tensors(*(causes[j] for j in self.parents[i])), -1)


class AbductionGuide(PyroModule):
    """Proposes concepts from an observation, and the noise that brings them about.

    Parameters
    ----------
    mechanisms
        Mechanisms of the model.
    reader
        From observations (data, *shape) to (data, 2 (concept + style)): means, then log sds.
    names
        Names of the concepts.
    num_style
        Latents beside the concepts.
    beta, entropy
        As of the model, see `probmodels.causal_vae`.
    """

    def __init__(
        self,
        mechanisms: Mechanisms,
        reader: nn.Module,
        names: Sequence[str],
        num_style: int,
        *,
        beta: float = 1.0,
        entropy: str = "exact",
    ) -> None:
        super().__init__()
        self.mechanisms, self.reader, self.names, self.num_style = mechanisms, reader, tuple(names), num_style
        self.beta, self.entropy = beta, entropy
        size = mechanisms.size
        self.table: nn.Parameter | None = None
        self.tabulated: Tensor | None = None  # the data of the table
        self.coupling = nn.Parameter(torch.zeros(size, size)) if size > 1 else None

    def propose(self, observation: Tensor, rows: Any = slice(None)) -> tuple[Tensor, Tensor]:
        """Means and sds (data, concept + style) of rows of the data (data, *shape)."""
        found = self.reader(observation[rows]) if self.table is None else self.table[rows]
        mean, log_sd = found.chunk(2, -1)
        return mean, log_sd.clamp(-6.0, 3.0).exp()

    def tabulate(self, observation: Tensor) -> None:
        """Keep what is proposed for data (data, *shape) as parameters of each of them, in the place of the reader.

        How concepts depend on each other given the observation, C above, stays that of all data.
        """
        with torch.no_grad():
            found = self.reader(observation) if self.table is None else self.table.detach().clone()
        self.table, self.tabulated = nn.Parameter(found), observation

    def forward(self, observation: Tensor, *labels: Tensor) -> None:
        """Sites ``noise_<name>`` (data,) and ``style`` (data, style)."""
        mechanisms, size = self.mechanisms, self.mechanisms.size
        axes: Any = {"event_dims": ["style_axis"]}
        with pyro.plate("data", len(observation)) as rows:
            mean, sd = self.propose(observation, rows)
            away: dict[int, Tensor] = {}

            def abducted(i: int, location: Tensor) -> Tensor:
                wanted, scale = mean[:, i], mechanisms.scale(i)
                if away and self.coupling is not None:
                    wanted = wanted + torch.stack([*away.values()], -1) @ self.coupling[i, [*away]]
                fn = dist.Normal((wanted - location) / scale, sd[:, i] / scale)
                noise: Tensor = pyro.sample(f"noise_{self.names[i]}", fn)
                away[i] = location + scale * noise - mean[:, i]
                return noise

            with poutine.scale(scale=self.beta):
                mechanisms.propagate(abducted)
                if self.entropy == "paper":
                    # The divergence of q(z | x) from p(z | u) as well, by the entropy of the concepts once more.
                    spread = sd[:, :size].log().sum(-1) + 0.5 * size * math.log(2 * math.pi * math.e)
                    pyro.factor("entropy", -spread, has_rsample=True)
                if self.num_style:
                    style = dist.Normal(mean[:, size:], sd[:, size:]).to_event(1)
                    pyro.sample("style", style, infer=axes)
