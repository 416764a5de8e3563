"""Annealed importance sampling of latent sites: weighted draws of the posterior that owe nothing to a guide.

Discrete elements start uniform over their values, continuous ones normal with the moments of the prior in unconstrained
space. The path leads from that start s(z) to the joint density p(x, z) through s(z)^(1 - b) p(x, z)^b, with powers b
that are chosen so that no step changes log weights by much. At every power each discrete element is drawn given all
others (Gibbs), and continuous sites make a Hamiltonian move. Where a model excludes values, an entry of log density
minus infinity counts as a large penalty on the way, so that draws may pass there, and as itself in the weights.

Draws are independent of each other, and the mean of their weights is the evidence on average. Rows of plates that all
sites share are annealed side by side, each with a weight of its own.

References
----------
Neal, R. M. (2001). Annealed importance sampling. Statistics and Computing 11.
https://doi.org/10.1023/A:1008923215028
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import biject_to

import probmodels.inference.programs.bijections  # noqa: F401 -- maps to positive definite matrices
from probmodels.errors import CaptureError, ProblemError
from probmodels.inference.problem import Problem
from probmodels.inference.programs.capture import batch, capture
from probmodels.inference.programs.minibatch import whole
from probmodels.inference.programs.traces import Frames, leaf_of, sample_sites, sum_by_datum
from probmodels.inference.runtime.ops import FixGenerated, is_generated

__all__ = ["Annealed", "Density", "anneal"]

_log = logging.getLogger(__name__)
_PENALTY = 30.0  # nats on the way for an entry that the model excludes
_CHANGE = 0.1  # sd of the log weights that one step adds
_MOST_STEPS = 400
_LAST_SWEEPS = 3  # moves at the posterior itself
_PRIOR_DRAWS = 64  # for the moments of continuous sites
_LEAPS = 8
_ACCEPT = 0.8
_BRANCHES = 16  # most combinations of values that a program may branch on, each of them captured
_CHUNK_BYTES = 64 * 2**20


@dataclass(frozen=True)
class _Discrete:
    """A discrete site: its values (value, *leaf), shape of its elements, and which of their axes are rows."""

    name: str
    table: Tensor
    shape: tuple[int, ...]
    row_axes: tuple[int, ...]

    def places(self) -> list[tuple[Any, ...]]:
        """Index of every element, with all of its rows, into indices (draw, *shape)."""
        free = [range(1) if axis in self.row_axes else range(size) for axis, size in enumerate(self.shape)]
        whole_axis = slice(None)
        return [
            (whole_axis, *(whole_axis if axis in self.row_axes else place for axis, place in enumerate(places)))
            for places in itertools.product(*free)
        ]


@dataclass(frozen=True)
class _Continuous:
    """A continuous site in unconstrained space: shape, which of its axes are rows, moments of the prior."""

    name: str
    support: Any
    shape: tuple[int, ...]
    row_axes: tuple[int, ...]
    mean: Tensor
    sd: Tensor

    def by_row(self, value: Tensor) -> Tensor:
        """Sum of (draw, *shape) in every row: (draw, *rows)."""
        axes = [1 + axis for axis in range(len(self.shape)) if axis not in self.row_axes]
        return value.sum(axes) if axes else value

    def spread(self, value: Tensor) -> Tensor:
        """From (draw, *rows) to what broadcasts with (draw, *shape)."""
        rows = iter(value.shape[1:])
        sizes = [next(rows) if axis in self.row_axes else 1 for axis in range(len(self.shape))]
        return value.reshape(value.shape[0], *sizes)


@dataclass
class _State:
    """Draws: indices by discrete, unconstrained values by continuous site; log density, what is excluded, gradients.

    Attributes
    ----------
    log_joint
        Log density (draw, *rows), penalised where the model excludes values.
    excluded
        Number of excluded entries (draw, *rows).
    gradients
        Of the log density with respect to the continuous sites.
    """

    index: list[Tensor]
    z: list[Tensor]
    log_joint: Tensor
    excluded: Tensor
    gradients: list[Tensor]


@dataclass(frozen=True)
class Annealed:
    """Weighted draws.

    Attributes
    ----------
    values
        By site (draw, *shape).
    log_weight
        (draw, *rows); the log of their mean is the log evidence of a row.
    log_joint
        Log joint density (draw, *rows), minus infinity where the model excludes a draw.
    num_steps
        Steps from the start to the posterior.
    """

    values: dict[str, Tensor]
    log_weight: Tensor
    log_joint: Tensor
    num_steps: int


class Density:
    """Log joint density of a model at many draws, in every row of the plates that all sites share.

    To be made and used inside the parameter store of the model. The model is captured as a graph that runs for all
    draws at once; where it branches on the values of its first sites, one graph is captured for each combination of
    these; and otherwise it runs draw by draw, the densities of discrete configurations remembered.

    Parameters
    ----------
    problem
        Names the sites.
    model
        Its model, with the parameters that count.
    frames
        Plates that all sites share.
    num_draws
        Draws that are annealed together.

    Raises
    ------
    ProblemError
        If a discrete site has no finite list of values, or a continuous one no map from unconstrained space.
    """

    def __init__(self, problem: Problem, model: Callable[..., Any], frames: Frames, num_draws: int) -> None:
        self._problem, self._frames, self.num_draws = problem, frames, num_draws
        self._model = FixGenerated()(poutine.block(model, hide_fn=is_generated))
        self._whole = whole(problem)
        self._rows = [frame.size for frame in sorted(frames.values(), key=lambda frame: frame.dim)]
        self._known: dict[bytes, tuple[Tensor, ...]] = {}
        self._graphs: dict[tuple[int, ...], Any] = {}
        self._branching = 0  # discrete sites, from the first on, whose values graphs hold
        self._size = 0
        dims = {frame.dim for frame in frames.values()}
        with torch.no_grad(), pyro.validation_enabled(False):
            nodes = self._run({}).nodes
            latent = {name: nodes[name] for name in problem.names("latent")}
            self.discrete = [self._describe(n, node, dims) for n, node in latent.items() if problem.sites[n].discrete]
            self.continuous = self._moments({n: x for n, x in latent.items() if not problem.sites[n].discrete}, dims)
        self._device = next(iter(latent.values()))["value"].device

    @cached_property
    def captured(self) -> bool:
        """Whether graphs stand for the program; the first question makes them."""
        with torch.no_grad(), pyro.validation_enabled(False):
            self._capture()
        return bool(self._graphs)

    @property
    def log_uniform(self) -> float:
        """Log density of one configuration of a row where all values of discrete elements are equally likely."""
        return -sum(len(site.places()) * math.log(len(site.table)) for site in self.discrete)

    @property
    def work(self) -> int:
        """Numbers that moving every discrete element of a draw once takes, in proportion."""
        places = [(len(site.places()), len(site.table)) for site in self.discrete]
        return math.prod(self._rows) * sum(n for n, _ in places) * sum(n * values for n, values in places)

    @property
    def num_configurations(self) -> float:
        """Configurations of the discrete elements of all rows."""
        return math.exp(min(-self.log_uniform * math.prod(self._rows), 700.0))

    def values(self, index: Sequence[Tensor], z: Sequence[Tensor]) -> dict[str, Tensor]:
        """Values of the sites at unconstrained values and indices, those of the last sites, of one draw or many."""
        sites = self.discrete[len(self.discrete) - len(index) :]
        found = {site.name: _look_up(site, i) for site, i in zip(sites, index, strict=True)}
        return found | {s.name: biject_to(s.support)(x) for s, x in zip(self.continuous, z, strict=True)}

    def evaluate(self, index: Sequence[Tensor], z: Sequence[Tensor]) -> _State:
        """State of draws (draw, ...)."""
        parts = [*index, *z]
        count = len(parts[0])
        if not self.captured:
            rows = [self._one([part[draw] for part in parts]) for draw in range(count)]
            found = [torch.stack(values) for values in zip(*rows, strict=True)]
        elif self._branching:
            found = self._by_branch(parts, count)
        else:
            found = self._chunks(self._graphs[()], parts)
        shape = (count, *self._rows)
        return _State(list(index), list(z), found[0].reshape(shape), found[1].reshape(shape), found[2:])

    def _by_branch(self, parts: Sequence[Tensor], count: int) -> list[Tensor]:
        """Draws of each combination of values of the first sites by the graph that holds these."""
        keys = torch.stack([part.reshape(count) for part in parts[: self._branching]], 1)
        found: list[Tensor] = []
        for key, graph in self._graphs.items():
            chosen = (keys == torch.tensor(key, device=self._device)).all(1).nonzero().squeeze(1)
            if not len(chosen):
                continue
            out = self._chunks(graph, [part.index_select(0, chosen) for part in parts[self._branching :]])
            found = found or [value.new_empty(count, *value.shape[1:]) for value in out]
            for values, value in zip(found, out, strict=True):
                values.index_copy_(0, chosen, value)
        return found

    def _chunks(self, graph: Any, parts: Sequence[Tensor]) -> list[Tensor]:
        """A batched graph at draws of any number."""
        out: list[list[Tensor]] = []
        for start in range(0, len(parts[0]), self._size):
            piece = [part[start : start + self._size] for part in parts]
            count = len(piece[0])
            if count < self._size:
                piece = [torch.cat([part, part[:1].expand(self._size - count, *part.shape[1:])]) for part in piece]
            out.append([value[:count] for value in graph(*piece)])
        return out[0] if len(out) == 1 else [torch.cat(values) for values in zip(*out, strict=True)]

    def _one(self, parts: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Log density, excluded entries and gradients of one draw."""
        if self.continuous:
            return self._evaluate({}, parts)
        key = b"".join(part.to(torch.int16).cpu().numpy().tobytes() for part in parts)
        if key not in self._known:
            self._known[key] = self._evaluate({}, parts)
        return self._known[key]

    def _evaluate(self, held: Mapping[str, Tensor], parts: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The same by the program, at values of the first sites that are held, and indices and unconstrained values."""
        count = len(self.discrete) - len(held)
        index, z = parts[:count], parts[count:]
        if not z:
            return self._log_density(held, index, z)
        with torch.enable_grad():
            leaves = [part.detach().requires_grad_(True) for part in z]
            log_joint, excluded = self._log_density(held, index, leaves)
            gradients = torch.autograd.grad(log_joint.sum(), leaves, materialize_grads=True)
        return log_joint.detach(), excluded, *gradients

    def _log_density(
        self, held: Mapping[str, Tensor], index: Sequence[Tensor], z: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        values = {**held, **self.values(index, z)}
        trace = self._run(values)
        trace.compute_log_prob()
        scores = [site["log_prob"] for site in sample_sites(trace)]
        lost = [torch.isneginf(score) for score in scores]
        penalised = [torch.where(gone, -_PENALTY, score) for gone, score in zip(lost, scores, strict=True)]
        total = sum_by_datum(penalised, self._frames).reshape(self._rows)
        for site, value in zip(self.continuous, z, strict=True):
            volume = biject_to(site.support).log_abs_det_jacobian(value, values[site.name])
            axes = [axis for axis in range(volume.dim()) if axis not in site.row_axes]
            total = total + (volume.sum(axes) if axes else volume)
        excluded = sum_by_datum([gone.to(total.dtype) for gone in lost], self._frames).reshape(self._rows)
        return total, excluded.expand_as(total)

    def _run(self, values: Mapping[str, Tensor]) -> Any:
        with self._whole():
            program = poutine.condition(self._model, dict(values)) if values else self._model
            return poutine.trace(program).get_trace(*self._problem.args, **self._problem.kwargs)

    def _describe(self, name: str, node: Any, dims: set[int]) -> _Discrete:
        leaf, value = leaf_of(node["fn"]), node["value"]
        try:
            table = leaf.enumerate_support(expand=False)
        except NotImplementedError as error:
            raise ProblemError(
                f"{self._problem.name}: site {name!r} of distribution {type(leaf).__name__} has no finite list of "
                "values to anneal over"
            ) from error
        num_batch = value.dim() - node["fn"].event_dim
        shape = tuple(value.shape[: value.dim() - len(leaf.event_shape)])
        rows = tuple(axis for axis in range(num_batch) if axis - num_batch in dims)
        return _Discrete(name, table.detach().reshape(len(table), *leaf.event_shape), shape, rows)

    def _moments(self, nodes: Mapping[str, Any], dims: set[int]) -> list[_Continuous]:
        """Continuous sites with the mean and sd of prior draws in unconstrained space."""
        if not nodes:
            return []
        draws: dict[str, list[Tensor]] = {name: [] for name in nodes}
        for _ in range(_PRIOR_DRAWS):
            met = self._run({}).nodes
            for name, node in nodes.items():
                try:
                    draws[name].append(biject_to(node["fn"].support).inv(met[name]["value"]))
                except NotImplementedError as error:
                    raise ProblemError(
                        f"{self._problem.name}: site {name!r} has support {node['fn'].support}, which has no map from "
                        "unconstrained space, so that it cannot be annealed"
                    ) from error
        found = []
        for name, node in nodes.items():
            stacked = torch.stack(draws[name])
            mean, sd = stacked.mean(0), stacked.std(0)
            mean = torch.where(mean.isfinite(), mean, 0.0)
            sd = torch.where(sd.isfinite(), sd.clamp(1e-6, 1e6), 1.0)
            num_batch = node["value"].dim() - node["fn"].event_dim
            rows = tuple(axis for axis in range(num_batch) if axis - num_batch in dims)
            found.append(_Continuous(name, node["fn"].support, tuple(mean.shape), rows, mean, sd))
        return found

    def start(self) -> tuple[list[Tensor], list[Tensor]]:
        """Random indices and unconstrained values of as many draws as there shall be."""
        count = self.num_draws
        index = [torch.randint(len(s.table), (count, *s.shape), device=self._device) for s in self.discrete]
        z = [s.mean + s.sd * torch.randn(count, *s.shape).to(s.mean) for s in self.continuous]
        return index, z

    def _capture(self) -> None:
        """Graphs that agree with the program, of the program or of its branches; none where there are none."""
        index, z = self.start()
        parts = [*index, *z]
        examples = [[part[draw] for part in parts] for draw in range(min(4, self.num_draws))]
        self._size = self.num_draws * max((len(site.table) for site in self.discrete), default=1)
        rows = math.prod(self._rows)
        self._size = max(1, min(self._size, _CHUNK_BYTES // (8 * (rows + sum(part[0].numel() for part in parts)))))
        for branching in range(len(self.discrete) + 1):
            first = self.discrete[:branching]
            counts = [len(site.table) for site in first]
            if math.prod(counts) > _BRANCHES or any(math.prod(site.shape) > 1 for site in first):
                return
            try:
                graphs = {}
                for key in itertools.product(*map(range, counts)):
                    chosen = [
                        torch.full(site.shape, value, device=self._device)
                        for site, value in zip(first, key, strict=True)
                    ]
                    held = {site.name: _look_up(site, value) for site, value in zip(first, chosen, strict=True)}
                    graphs[key] = self._captured(held, [example[branching:] for example in examples])
            except CaptureError as error:
                _log.info("%s: no graph of the log density: %s", self._problem.name, error)
                continue
            self._graphs, self._branching = graphs, branching
            return

    def _captured(self, held: Mapping[str, Tensor], examples: Sequence[Sequence[Tensor]]) -> Any:
        """Batched graph of the density where the first sites have given values."""
        if not examples[0]:
            raise CaptureError("all sites are held")

        def function(*parts: Tensor) -> tuple[Tensor, ...]:
            return self._evaluate(held, parts)

        graph = capture(function, *examples[0], checks=[tuple(example) for example in examples[1:]])
        stacked = [torch.stack([part] * self._size) for part in examples[0]]
        batched = batch(graph, *stacked)
        for place, example in enumerate(examples):
            for part, value in zip(stacked, example, strict=True):
                part[place % self._size] = value
        together = batched(*stacked)
        for place, example in enumerate(examples[: self._size]):
            for one, many in zip(graph(*example), together, strict=True):
                if not torch.allclose(one, many[place], rtol=1e-3, atol=1e-3, equal_nan=True):
                    raise CaptureError("the batched graph differs from that of one draw")
        return batched


def _look_up(site: _Discrete, index: Tensor) -> Tensor:
    """Values (..., *leaf) at indices (...)."""
    found = site.table.index_select(0, index.reshape(-1))
    return found.reshape((*index.shape, *site.table.shape[1:]))


def anneal(density: Density) -> Annealed:
    """Weighted draws of the posterior, from the global generators of random numbers.

    Parameters
    ----------
    density
        Log joint density.
    """
    with torch.no_grad(), pyro.validation_enabled(False):
        state, mover = density.evaluate(*density.start()), _Mover(density)
        log_weight = torch.zeros_like(state.log_joint, dtype=torch.float64)
        power, steps, sd = 0.0, 0, 0.0
        while power < 1.0:
            ratio = (state.log_joint - mover.log_start(state)).double()
            sd = float(ratio.nan_to_num(0.0).std(0).max()) if len(ratio) > 1 else 0.0
            steps += 1
            step = 1.0 - power if steps == _MOST_STEPS else min(_CHANGE / max(sd, 1e-12), 1.0 - power)
            log_weight += step * ratio
            power = 1.0 if steps == _MOST_STEPS else power + step
            state = mover.move(state, power)
        for _ in range(_LAST_SWEEPS):
            state = mover.move(state, 1.0)
    lost = (state.excluded > 0) | log_weight.isnan()  # penalties end here
    log_weight = log_weight.where(~lost, -torch.inf)
    log_joint = state.log_joint.where(~lost, -torch.inf)
    return Annealed(density.values(state.index, state.z), log_weight, log_joint, steps)


class _Mover:
    """Moves that leave s(z)^(1 - b) p(x, z)^b invariant."""

    def __init__(self, density: Density) -> None:
        self._density = density
        self._step = 0.5  # in units of the sds of the draws

    def log_start(self, state: _State) -> Tensor:
        """Log density (draw, *rows) of the start."""
        total = torch.full_like(state.log_joint, self._density.log_uniform)
        for site, z in zip(self._density.continuous, state.z, strict=True):
            away = (z - site.mean) / site.sd
            total = total + site.by_row(-0.5 * away**2 - site.sd.log() - 0.5 * math.log(2 * math.pi))
        return total

    def move(self, state: _State, power: float) -> _State:
        """Every discrete element in turn, then the continuous sites."""
        for place, site in enumerate(self._density.discrete):
            for where in site.places():
                state = self._draw_element(state, place, where, power)
        return self._leap(state, power) if self._density.continuous else state

    def _draw_element(self, state: _State, place: int, where: tuple[Any, ...], power: float) -> _State:
        """A discrete element from its distribution given all else."""
        site, count = self._density.discrete[place], len(state.log_joint)
        num_values = len(site.table)
        index = [i.repeat(num_values, *[1] * (i.dim() - 1)) for i in state.index]
        values = torch.arange(num_values, device=state.log_joint.device).repeat_interleave(count)
        index[place][where] = values.reshape(-1, *[1] * (index[place][where].dim() - 1))
        found = self._density.evaluate(index, [z.repeat(num_values, *[1] * (z.dim() - 1)) for z in state.z])
        log_joint = found.log_joint.unflatten(0, (num_values, count))
        log_joint = log_joint.where(~log_joint.isnan(), -torch.inf)
        noise = torch.empty_like(log_joint).exponential_().log()
        best = (power * log_joint - noise).argmax(0)  # (draw, *rows)

        def pick(value: Tensor, chosen: Tensor) -> Tensor:
            return torch.take_along_dim(value.unflatten(0, (num_values, count)), chosen.unsqueeze(0), 0).squeeze(0)

        new = [i.clone() if other == place else i for other, i in enumerate(state.index)]
        new[place][where] = best.reshape(new[place][where].shape)
        pairs = zip(self._density.continuous, found.gradients, strict=True)
        gradients = [pick(gradient, own.spread(best)) for own, gradient in pairs]
        return _State(new, state.z, pick(found.log_joint, best), pick(found.excluded, best), gradients)

    def _leap(self, state: _State, power: float) -> _State:
        """A Hamiltonian move of the continuous sites, accepted or not in every row by itself."""
        sites = self._density.continuous
        scales = [z.std(0).clamp(1e-6, 1e6).nan_to_num(1.0) for z in state.z]
        step = self._step * math.exp(0.2 * float(torch.randn(())))
        momenta = [torch.randn_like(z) for z in state.z]

        def energy(at: _State, p: Sequence[Tensor]) -> Tensor:
            kinetic: Any = sum(site.by_row(0.5 * v**2) for site, v in zip(sites, p, strict=True))
            return kinetic - power * at.log_joint - (1 - power) * self.log_start(at)

        def force(at: _State) -> list[Tensor]:
            pulls = zip(sites, at.z, at.gradients, scales, strict=True)
            return [
                s * (power * g - (1 - power) * (z - site.mean) / site.sd**2).nan_to_num(0.0, 0.0, 0.0)
                for site, z, g, s in pulls
            ]

        now, p = state, momenta
        for _ in range(_LEAPS):
            p = [v + 0.5 * step * f for v, f in zip(p, force(now), strict=True)]
            z = [x + step * s * v for x, s, v in zip(now.z, scales, p, strict=True)]
            now = self._density.evaluate(now.index, z)
            p = [v + 0.5 * step * f for v, f in zip(p, force(now), strict=True)]
        rise = energy(now, p) - energy(state, momenta)
        chance = (-rise).exp().clamp(max=1.0).nan_to_num(0.0)
        taken = torch.rand_like(chance) < chance
        self._step *= math.exp(0.1 * (float(chance.mean()) - _ACCEPT))

        def choose(new: Sequence[Tensor], old: Sequence[Tensor]) -> list[Tensor]:
            return [torch.where(s.spread(taken), a, b) for s, a, b in zip(sites, new, old, strict=True)]

        return _State(
            state.index,
            choose(now.z, state.z),
            now.log_joint.where(taken, state.log_joint),
            now.excluded.where(taken, state.excluded),
            choose(now.gradients, state.gradients),
        )
