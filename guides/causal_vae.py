"""Mechanisms between concepts, and a guide that abducts the noise behind them.

The guide reads an observation and proposes concepts; the noise that brings them about follows from the mechanisms. With
``y_i = g_i(parents) + s_i noise_i`` and a proposal, in the order of the graph,

    y_i ~ Normal(c_i(y_<i, x), r_i(x)),
    c_i = m_i(x) + sum_j<i C_ij(x) (y_j - m_j(x)) + k_i(x) (g_i(y) - g_i(m(x))) + l_i(x) (g_i(m(x)) - m_i(x)),
    noise_i ~ Normal((c_i - g_i(y)) / s_i, r_i / s_i),

a chain of normals whose KL divergences from the standard normal prior are known. Proposals are of concepts and not of
noise, so that a mechanism may sharpen without the reader of images having to follow. C lets concepts depend on each
other given the observation: of a linear Gaussian model the exact posterior is among the proposals. With gains k
proposals follow curved mechanisms, and with leans l what was read gives way to mechanisms that are sharper than it.

Where labels are known, concepts are inferred from these too: the proposal, with mechanisms replaced by their tangents,
is multiplied by the normal density of the labels, which is a chain of normals again. The reader learns by how well it
tells the labels, as the classifier of Kingma et al. (2014) does, so that its proposals are as wide as it is uncertain.

References
----------
Kingma, D. P., Rezende, D. J., Mohamed, S. and Welling, M. (2014). Semi-supervised learning with deep generative models.
NeurIPS. https://arxiv.org/abs/1406.5298
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro import poutine
from pyro.nn import PyroModule
from torch import Tensor, nn

from probmodels.guides.acyclicity import topological_order

__all__ = ["MECHANISMS", "AbductionGuide", "Mechanisms", "Proposal"]

MECHANISMS = ("additive", "post_nonlinear", "linear", "masked")
_LEAST_SCALE = 0.02  # sd of a concept's own noise, in units of the concept: relations may be deterministic
_BUMPS = 4  # of a monotone function
_HALVINGS = 24  # to invert one
_TOLERANCE = 0.01  # sd by which errors of means are weighed, in units of the concepts
_STEP = 0.05  # of the differences that stand for derivatives of mechanisms, in units of the concepts


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
        return self.curve(self.coefficients(i), self.parent_values(i, causes))

    def coefficients(self, i: int) -> dict[str, Tensor]:
        """Parameters of the location of a concept that has causes."""
        if self.kind == "linear":
            return {"base": self.base[i], "weight": self.weight[self.parents[i], i]}
        first = self.first[i, self.parents[i]]
        rest = {"offset": self.offset[i], "second": self.second[i], "last": self.last[i]}
        return {"base": self.base[i], "first": first, **rest}

    @staticmethod
    def curve(coefficients: Mapping[str, Tensor], values: Tensor) -> Tensor:
        """Location (...) of a concept with such `coefficients`, from the values of its causes (..., cause)."""
        if "weight" in coefficients:
            return coefficients["base"] + values @ coefficients["weight"]
        state = F.silu(values @ coefficients["first"] + coefficients["offset"])
        return coefficients["base"] + F.silu(state @ coefficients["second"]) @ coefficients["last"]

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
        return noise + self.parent_values(i, causes) @ self.weight[self.parents[i], i]

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

    def locations(self, y: Tensor) -> Tensor:
        """What concepts are without noise (..., concept) where all are ``y`` before their increasing functions."""
        causes: list[Any] = [None] * self.size
        found: list[Any] = list(causes)
        for i in self.order:
            found[i] = self.location(i, causes).expand(y.shape[:-1])
            causes[i] = self.cause(i, self.value(i, y[..., i]), found[i], causes)
        return torch.stack(found, -1)

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """What concepts (..., concept) are before their increasing functions, and the slopes of these there."""
        if self.kind != "post_nonlinear":
            return z, torch.ones_like(z)
        height, steepness = F.softplus(self.height), F.softplus(self.steepness)
        low, high = z - height.sum(-1), z + height.sum(-1)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            above = middle + (height * torch.tanh(steepness * (middle.unsqueeze(-1) - self.place))).sum(-1) > z
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        y = (low + high) / 2
        flat = 1 - torch.tanh(steepness * (y.unsqueeze(-1) - self.place)).square()
        return y, 1 + (height * steepness * flat).sum(-1)

    def parent_values(self, i: int, causes: Sequence[Tensor]) -> Tensor:
        """Values of the causes of a concept (..., cause), some of which may be of several worlds."""
        return torch.stack(torch.broadcast_tensors(*(causes[j] for j in self.parents[i])), -1)


class Proposal(NamedTuple):
    """What a reader says of concepts and style, before the increasing functions of concepts.

    Attributes
    ----------
    mean, sd
        (data, concept + style); the sd of a concept is that given those before it.
    slope
        What a concept changes by with those before it (data, concept, concept before it).
    gain
        How far it follows its mechanism (data, concept), from 0 to 1.
    lean
        How far it gives way to its mechanism (data, concept), from 0 to 1.
    """

    mean: Tensor
    sd: Tensor
    slope: Tensor
    gain: Tensor
    lean: Tensor

    def held(self) -> Proposal:
        """The same without derivatives, but for that of the means."""
        return Proposal(self.mean, *(part.detach() for part in self[1:]))


class _Chain(NamedTuple):
    """Concepts as a chain of normals, exactly but for the bend of mechanisms.

    Attributes
    ----------
    mean, sd
        (data, concept), the sd given the concepts before.
    slope
        (data, concept, concept before it).
    """

    mean: Tensor
    sd: Tensor
    slope: Tensor


class _Bend(NamedTuple):
    """What mechanisms are around a point, to take from them what they have beyond their tangents.

    Attributes
    ----------
    point, location
        The point and the locations there (data, concept).
    tangent
        Derivatives there (data, concept, concept before it).
    """

    point: Tensor
    location: Tensor
    tangent: Tensor

    def beyond(self, location: Tensor, y: Tensor) -> Tensor:
        """Of locations (data, concept) at y (data, concept)."""
        return location - self.location - (self.tangent @ (y - self.point).unsqueeze(-1)).squeeze(-1)


class AbductionGuide(PyroModule):
    """Proposes concepts from an observation and labels, and the noise that brings them about.

    Parameters
    ----------
    mechanisms
        Mechanisms of the model.
    reader
        From observations (data, *shape) to (data, `num_outputs`).
    names
        Names of the concepts.
    num_style
        Latents beside the concepts.
    label_sd
        Sd of labels around concepts, of all or of each (concept,).
    label_weight
        Weight of how well the reader tells labels, while fitting.
    beta, entropy
        As of the model, see `probmodels.causal_vae`.
    """

    label_sd: Tensor

    def __init__(
        self,
        mechanisms: Mechanisms,
        reader: nn.Module,
        names: Sequence[str],
        num_style: int,
        *,
        label_sd: float | Tensor = 0.005,
        label_weight: float = 1.0,
        beta: float = 1.0,
        entropy: str = "exact",
    ) -> None:
        super().__init__()
        self.mechanisms, self.reader, self.names, self.num_style = mechanisms, reader, tuple(names), num_style
        self.label_weight, self.beta, self.entropy = label_weight, beta, entropy
        self.table: nn.Parameter | None = None
        self.tabulated: Tensor | None = None  # the data of the table
        size, order = mechanisms.size, torch.tensor(mechanisms.order)
        after, before = torch.tril_indices(size, size, -1)
        self.register_buffer(
            "label_sd", torch.as_tensor(label_sd, dtype=torch.get_default_dtype()).expand(size).clone()
        )
        self._after, self._before = order[after].tolist(), order[before].tolist()

    @staticmethod
    def num_outputs(size: int, num_style: int) -> int:
        """How many numbers a reader gives for so many concepts: means, log sds, slopes, gains and leans."""
        return 2 * (size + num_style) + size * (size - 1) // 2 + 2 * size

    def propose(self, observation: Tensor, rows: Any = slice(None)) -> Proposal:
        """What rows of the data (data, *shape) say."""
        found = self.reader(observation[rows]) if self.table is None else self.table[rows]
        size = self.mechanisms.size
        width = size + self.num_style
        mean, log_sd, pairs, gain, lean = found.split([width, width, len(self._after), size, size], -1)
        sd = log_sd.clamp(-6.0, 3.0).exp()
        slope = pairs.new_zeros(len(found), size, size)
        slope[:, self._after, self._before] = pairs
        slope = slope * sd[:, :size, None] / sd[:, None, :size]  # of one sd by one sd
        caused = (self.mechanisms.edges.sum(0) > 0).to(gain)
        return Proposal(mean, sd, slope, caused * torch.sigmoid(gain - 2.0), caused * torch.sigmoid(lean - 4.0))

    def tabulate(self, observation: Tensor) -> None:
        """Keep what is proposed for data (data, *shape) as parameters of each of them, in the place of the reader."""
        with torch.no_grad():
            found = self.reader(observation) if self.table is None else self.table.detach().clone()
        self.table, self.tabulated = nn.Parameter(found), observation

    def forward(self, observation: Tensor, label: Tensor | None = None, known: Tensor | None = None) -> None:
        """Sites ``noise_<name>`` (data,) and ``style`` (data, style).

        Parameters
        ----------
        observation
            (data, *shape).
        label, known
            Labels (data, concept), and whether they are known; None to infer concepts from observations alone.
        """
        mechanisms, size = self.mechanisms, self.mechanisms.size
        axes: Any = {"event_dims": ["style_axis"]}
        with pyro.plate("data", len(observation)) as rows:
            found = self.propose(observation, rows)
            style_mean, style_sd = found.mean[:, size:], found.sd[:, size:]
            found = found._replace(mean=found.mean[:, :size], sd=found.sd[:, :size])
            labelled = label is not None and known is not None and self.table is None
            if labelled:
                seen, there = label[rows], known[rows]  # type: ignore[index]
                if self.training and self.label_weight:
                    told = self.reading(found, seen, there)
                    pyro.factor("reading", -self.label_weight * told, has_rsample=True)
                    # The bound moves means where labels are missing, and nothing else of the reader.
                    mean = torch.where(there.all(-1, keepdim=True), found.mean.detach(), found.mean)
                    found = found._replace(mean=mean).held()
            chain, bend = self._chain(found)
            gain = found.gain
            if labelled:
                prior, chain = chain, self._given(chain, seen, there)
                gain = gain * (chain.sd / prior.sd).square()
            y: list[Any] = [torch.zeros_like(chain.mean[:, 0])] * size

            def abducted(i: int, location: Tensor) -> Tensor:
                scale, before = mechanisms.scale(i), torch.stack(y, -1)
                wanted = chain.mean[:, i] + (chain.slope[:, i] * (before - chain.mean)).sum(-1)
                if mechanisms.parents[i]:
                    straight = bend.location[:, i] + (bend.tangent[:, i] * (before - bend.point)).sum(-1)
                    wanted = wanted + (gain[:, i] * (location - straight)).detach()
                fn = dist.Normal((wanted - location) / scale, chain.sd[:, i] / scale)
                noise: Tensor = pyro.sample(f"noise_{self.names[i]}", fn)
                y[i] = location + scale * noise
                return noise

            with poutine.scale(scale=self.beta):
                mechanisms.propagate(abducted)
                if self.entropy == "paper":
                    # The divergence of q(z | x) from p(z | u) as well, by the entropy of the concepts once more.
                    spread = chain.sd.log().sum(-1) + 0.5 * size * math.log(2 * math.pi * math.e)
                    pyro.factor("entropy", -spread, has_rsample=True)
                if self.num_style:
                    pyro.sample("style", dist.Normal(style_mean, style_sd).to_event(1), infer=axes)

    def reading(self, found: Proposal, label: Tensor, known: Tensor) -> Tensor:
        """Objective (data,) of a reader: how well it tells known labels (data, concept) from observations alone.

        The log density of the labels under what is proposed, as a function of all but the means; and squares of the
        errors of means, since the density itself would give all its weight to concepts that are sharp already
        (Seitzer et al. 2022). Of curved mechanisms the density takes the bend at the labels, as if these had no error.

        References
        ----------
        Seitzer, M., Tavakoli, A., Antic, D. and Martius, G. (2022). On the pitfalls of heteroscedastic uncertainty
        estimation with probabilistic neural networks. ICLR. https://arxiv.org/abs/2203.09168
        """
        order = self.mechanisms.order
        y, variance = self._before_functions(label)
        squares = torch.where(known, (y - found.mean).square() / (_TOLERANCE**2 + variance), 0.0).sum(-1)
        chain, bend = self._chain(found._replace(mean=found.mean.detach()))
        eye = torch.eye(len(order), dtype=torch.float64, device=y.device)
        sd, slope = chain.sd[:, None, order].double(), chain.slope[:, order][:, :, order].double()
        spread = torch.linalg.solve_triangular(eye - slope, eye, upper=False, unitriangular=True) * sd
        covariance = spread @ spread.mT + torch.diag_embed(variance[:, order].double())
        there = known[:, order]
        factor = torch.linalg.cholesky(torch.where(there.unsqueeze(-1) & there.unsqueeze(-2), covariance, eye))
        diagonal = factor.diagonal(dim1=-2, dim2=-1)
        at = torch.where(known, y, chain.mean)
        away = (at - chain.mean)[:, order].double()
        with torch.no_grad():
            location = self.mechanisms.locations(at)
        error = torch.linalg.solve_triangular(factor, away.unsqueeze(-1), upper=False).squeeze(-1)
        error = error - (found.gain * bend.beyond(location, at))[:, order] / diagonal
        density = torch.where(there, -0.5 * error.square() - diagonal.log(), 0.0).sum(-1)
        return density.to(squares) - 0.5 * squares

    def _chain(self, found: Proposal) -> tuple[_Chain, _Bend]:
        """A proposal as a chain of normals around what it is where all noise is 0, and mechanisms there, held."""
        mechanisms, mean = self.mechanisms, found.mean
        with torch.no_grad():
            there = mechanisms.locations(mean)
        lent = found.lean * (there - mean)
        point = torch.zeros_like(mean)
        columns: list[Any] = [None] * mechanisms.size
        locations: list[Any] = list(columns)
        causes: list[Any] = list(columns)
        for i in mechanisms.order:
            with torch.no_grad():
                locations[i] = mechanisms.location(i, causes).expand(len(mean))
            moved = (found.slope[:, i] * (point - mean)).sum(-1) + found.gain[:, i] * (locations[i] - there[:, i])
            columns[i] = mean[:, i] + lent[:, i] + moved
            point = torch.stack([mean[:, j] if columns[j] is None else columns[j] for j in range(mechanisms.size)], -1)
            with torch.no_grad():
                causes[i] = mechanisms.cause(i, mechanisms.value(i, columns[i]), locations[i], causes)
        with torch.no_grad():
            step = _STEP * torch.eye(mechanisms.size, dtype=mean.dtype, device=mean.device).unsqueeze(1)
            up, down = mechanisms.locations(torch.cat([point + step, point - step])).chunk(2)
            tangent = ((up - down) / (2 * _STEP)).movedim(0, -1)
        slope = found.slope + found.gain.unsqueeze(-1) * tangent
        return _Chain(point, found.sd, slope), _Bend(point, torch.stack(locations, -1), tangent)

    def _given(self, chain: _Chain, label: Tensor, known: Tensor) -> _Chain:
        """The product of a chain and of the normal densities of known labels (data, concept), a chain again."""
        order = self.mechanisms.order
        back = torch.tensor(order).argsort().tolist()
        y, variance = self._before_functions(label)
        eye = torch.eye(len(order), dtype=torch.float64, device=y.device)
        rest = (eye - chain.slope[:, order][:, :, order].double()) / chain.sd[:, order, None].double()
        told = torch.where(known, 1 / variance, 0.0)[:, order].double()
        precision = rest.mT @ rest + torch.diag_embed(told)
        # Precision = U U' with U upper triangular: the last concept first, as a chain has each given those before it.
        upper = torch.linalg.cholesky(precision.flip(-1, -2)).flip(-1, -2)
        diagonal = upper.diagonal(dim1=-2, dim2=-1)
        pull = told * torch.where(known, y - chain.mean, 0.0)[:, order]
        half = torch.linalg.solve_triangular(upper, pull.unsqueeze(-1), upper=True)
        moved = torch.linalg.solve_triangular(upper.mT, half, upper=False).squeeze(-1)
        slope = eye - upper.mT / diagonal.unsqueeze(-1)
        return _Chain(
            chain.mean + moved[:, back].to(y), (1 / diagonal)[:, back].to(y), slope[:, back][:, :, back].to(y)
        )

    def _before_functions(self, label: Tensor) -> tuple[Tensor, Tensor]:
        """Labels before the increasing functions of mechanisms, with their variance there, both (data, concept)."""
        with torch.no_grad():
            y, slope = self.mechanisms.inverse(label)
            return y, (self.label_sd / slope).square()
