"""Log joint density of a model at many draws at once, in terms of indices of discrete values."""

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

__all__ = ["Density", "State", "affordable"]

_log = logging.getLogger(__name__)
_PENALTY = 30.0  # nats on the way for an entry that the model excludes
_PRIOR_DRAWS = 64  # for the moments of continuous sites
_BRANCHES = 16  # most combinations of values that a program may branch on, each of them captured
_CHUNK_BYTES = 64 * 2**20
_PARTICLES, _FEWEST = 2000, 500  # draws that are annealed unasked for, at most and at least
_WORK = 2_000_000  # numbers that all of them take
_MOST_ELEMENTS, _MOST_SITES = 4000, 40
_LISTED = 500  # configurations of a program that is run for each of them


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

    def spread(self, value: Tensor) -> Tensor:
        """From (draw, *rows) to what broadcasts with (draw, *shape)."""
        rows = iter(value.shape[1:])
        sizes = [next(rows) if axis in self.row_axes else 1 for axis in range(len(self.shape))]
        return value.reshape(value.shape[0], *sizes)


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
class State:
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
        self._graphs: dict[tuple[int, ...], tuple[Any, Any]] = {}  # of one draw, and of as many as are run at once
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

    def evaluate(self, index: Sequence[Tensor], z: Sequence[Tensor]) -> State:
        """State of draws (draw, ...)."""
        parts = [*index, *z]
        count = len(parts[0])
        if not self.captured:
            rows = [self._one([part[draw] for part in parts]) for draw in range(count)]
            found = [torch.stack(values) for values in zip(*rows, strict=True)]
        elif self._branching:
            found = self._by_branch(parts, count)
        else:
            found = self._chunks(self._graphs[()][1], parts)
        shape = (count, *self._rows)
        return State(list(index), list(z), found[0].reshape(shape), found[1].reshape(shape), found[2:])

    def vectorised(self, count: int) -> Callable[[Sequence[Tensor]], Tensor]:
        """Function from indices (draw, ...) of the discrete sites of ``count`` draws to the log density (draw, *rows).

        It can be captured in its turn where the program was. For models without continuous sites.
        """
        shape = (count, *self._rows)
        if not self.captured:
            return lambda index: self.evaluate(index, []).log_joint
        with torch.no_grad(), pyro.validation_enabled(False):
            index, _ = self.start(count)
            graphs = {key: batch(one, *index[self._branching :]) for key, (one, _) in self._graphs.items()}

        def evaluate(index: Sequence[Tensor]) -> Tensor:
            found: Any = None
            for key, graph in graphs.items():
                value = graph(*index[self._branching :])[0].reshape(shape)
                if found is not None:
                    pairs = zip(index[: self._branching], key, strict=True)
                    here = torch.stack([part.reshape(count) == place for part, place in pairs]).all(0)
                    value = torch.where(here.reshape(count, *[1] * len(self._rows)), value, found)
                found = value
            return found

        return evaluate

    def branches(self) -> tuple[list[str], dict[tuple[int, ...], Mapping[str, Any]]]:
        """Sites that the program branches on, and by the indices of their values the sites of a run, as traced."""
        first = self.discrete[: self._branching]
        found = {}
        with torch.no_grad(), pyro.validation_enabled(False):
            for key in self._graphs:
                held = {s.name: _look_up(s, torch.full(s.shape, i)) for s, i in zip(first, key, strict=True)}
                found[key] = self._run({name: value.to(self._device) for name, value in held.items()}).nodes
        return [site.name for site in first], found

    def _by_branch(self, parts: Sequence[Tensor], count: int) -> list[Tensor]:
        """Draws of each combination of values of the first sites by the graph that holds these."""
        keys = torch.stack([part.reshape(count) for part in parts[: self._branching]], 1)
        found: list[Tensor] = []
        for key, (_, graph) in self._graphs.items():
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

    def start(self, count: int | None = None) -> tuple[list[Tensor], list[Tensor]]:
        """Random indices and unconstrained values of as many draws as there shall be, or of another number."""
        count = count or self.num_draws
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

    def _captured(self, held: Mapping[str, Tensor], examples: Sequence[Sequence[Tensor]]) -> tuple[Any, Any]:
        """Graphs of the density, of one draw and of many, where the first sites have given values."""
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
        return graph, batched


def _look_up(site: _Discrete, index: Tensor) -> Tensor:
    """Values (..., *leaf) at indices (...)."""
    found = site.table.index_select(0, index.reshape(-1))
    return found.reshape((*index.shape, *site.table.shape[1:]))


def affordable(problem: Problem, model: Callable[..., Any], frames: Frames) -> Density | str:
    """The density of a model that some two seconds of CPU time anneal, or why it takes more or cannot be done.

    That is decided by the model alone, never by a clock: all latent sites have finitely many values, elements and rows
    are few, and the model can be captured as a graph or has few configurations.

    Parameters
    ----------
    problem, model, frames
        As `Density` takes them.
    """
    latent = [site for site in problem.sites.values() if site.kind == "latent"]
    infinite = [site.name for site in latent if not site.finite]
    if infinite or not latent:
        return f"site {infinite[0]!r} does not have finitely many values" if infinite else "no site is latent"
    elements = sum(math.prod(site.shape) for site in latent)
    if elements > _MOST_ELEMENTS or len(latent) > _MOST_SITES:
        return (
            f"{len(latent)} latent sites with {elements} elements, of at most {_MOST_SITES} and {_MOST_ELEMENTS} that "
            "are annealed unasked for"
        )
    density = Density(problem, model, frames, _PARTICLES)
    density.num_draws = min(_PARTICLES, _WORK // density.work)
    if density.num_draws < _FEWEST:
        return "moving every element in turn takes too long"
    if not (density.captured or density.num_configurations <= _LISTED):
        return f"the model is not captured as a graph and has more than {_LISTED} configurations"
    return density
