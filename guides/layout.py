"""What an automatic guide needs to know of a model: its latent sites, their bijections, plates and starting values."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.distributions import biject_to, constraints
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

import probmodels.inference.programs.bijections  # noqa: F401 -- maps to positive definite matrices
from probmodels.errors import ProblemError
from probmodels.inference.problem import Problem
from probmodels.inference.programs.minibatch import whole
from probmodels.inference.programs.potential import Potential
from probmodels.inference.runtime.ops import is_generated, isolated
from probmodels.options import hint

__all__ = ["Group", "Part", "Place", "Plate", "as_start", "choose", "make_groups", "move", "read_places"]

_MEDIAN_DRAWS = 15
_START_TRIES = 50


@dataclass(frozen=True)
class Plate:
    """A plate as the model makes it: full size, size of its own subsamples or None, and dim."""

    name: str
    size: int
    subsample_size: int | None
    dim: int


@dataclass(frozen=True)
class Place:
    """A latent site: its support, its plates, and its shape (*batch, *event) in unconstrained space."""

    name: str
    support: Any
    plates: tuple[Plate, ...]
    shape: tuple[int, ...]
    num_batch: int
    event_dim: int  # of the site's value, which may have more event axes than its unconstrained image
    dtype: torch.dtype

    @property
    def bijection(self) -> Any:
        """From unconstrained space to the support; made anew, since not every transform survives being copied."""
        return biject_to(self.support)


@dataclass(frozen=True)
class Part:
    """Entries of a group's vector that are one site's.

    ``axes`` are the site's axes in the order of the vector: those of the group's plates, then all others, which have
    the sizes ``shape``.
    """

    place: Place
    start: int
    stop: int
    axes: tuple[int, ...]
    shape: tuple[int, ...]
    plates: tuple[Plate, ...]  # plates of the site that are none of the group's

    def read(self, z: Tensor) -> Tensor:
        """Unconstrained value of the site from vectors (..., *group batch, size)."""
        batch, count = z.shape[:-1], self.place.num_batch
        lead = batch[: max(len(batch) - count, 0)]
        inner = (1,) * (count - len(batch)) + tuple(batch[len(lead) :])
        kept = tuple(inner[axis] for axis in self.axes[: len(self.axes) - len(self.shape)])
        value = z[..., self.start : self.stop].reshape((*lead, *kept, *self.shape))
        order = [self.axes.index(axis) for axis in range(len(self.axes))]
        if order != sorted(order):
            value = value.permute(*range(len(lead)), *(len(lead) + axis for axis in order))
        return value


@dataclass(frozen=True)
class Group:
    """Sites with one vector for each element of ``plates``; ``batch`` has 1 where there is no plate."""

    plates: tuple[Plate, ...]
    batch: tuple[int, ...]
    parts: tuple[Part, ...]

    @property
    def label(self) -> str:
        """Name of the module that holds the parameters."""
        return "in_" + "_".join(plate.name.replace(".", "_") for plate in self.plates) if self.plates else "joint"

    def gather(self, values: Mapping[str, Tensor]) -> Tensor:
        """Vectors (*batch, size) of unconstrained values of the sites, in the widest type among them."""
        columns = [values[p.place.name].permute(p.axes).reshape(*self.batch, p.stop - p.start) for p in self.parts]
        widest = reduce(torch.promote_types, [column.dtype for column in columns])
        return torch.cat([column.to(widest) for column in columns], -1)

    def within(self, other: Group) -> bool:
        """Whether elements of this group enclose elements of another one."""
        return {plate.name for plate in self.plates} < {plate.name for plate in other.plates}


class _AtMedian(Messenger):
    """Set latent sites to given values, or to the median of a few prior draws in unconstrained space."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._values = values

    def _pyro_sample(self, msg: Any) -> None:
        if msg["value"] is not None or isinstance(msg["fn"], _Subsample) or is_generated(msg):
            return
        if msg["name"] in self._values:
            msg["value"] = self._values[msg["name"]]
        elif not getattr(msg["fn"].support, "is_discrete", False):
            bijection = biject_to(msg["fn"].support)
            median = bijection.inv(msg["fn"].sample((_MEDIAN_DRAWS,))).median(0).values
            msg["value"] = bijection(torch.where(median.isfinite(), median, torch.zeros_like(median)))


def read_places(problem: Problem, init: Mapping[str, Any]) -> tuple[list[Place], dict[str, Tensor]]:
    """Places of the latent sites in program order, and their starts in unconstrained space."""
    _refuse_discrete(problem)
    names = [name for name in problem.names("latent") if not problem.sites[name].discrete]
    if not names:
        raise ProblemError(f"{problem.name}: the model has no continuous latent site, which an automatic guide needs")
    for name in init:
        if name not in names:
            raise ProblemError(f"{problem.name}: init names {name!r}, which is no latent site{hint(name, names)}")
    with isolated(seed=0), torch.no_grad(), pyro.validation_enabled(False):
        subsamples = _subsamples(problem)
        with whole(problem)():
            potential = Potential(replace(problem, reparam={}))  # refuses models whose sites change between runs
            prior: Any = _trace(problem, problem.model)
            bijections = {name: _bijection(problem, name, prior.nodes[name]) for name in names}
            given = {name: as_start(problem, name, init[name], prior.nodes[name]["value"]) for name in init}
            middle: Any = _trace(problem, _AtMedian(given)(problem.model))
            medians = {name: bijections[name].inv(middle.nodes[name]["value"]) for name in names}
            for name in names:
                other = _bijection(problem, name, middle.nodes[name])
                _check_static(problem, name, bijections[name], other, torch.zeros_like(medians[name]))
            start = _find_start(problem, potential, medians, set(given))
        places = [_make_place(problem, name, medians[name], middle.nodes[name], subsamples) for name in names]
        return places, {place.name: _complete(start[place.name], place) for place in places}


def _trace(problem: Problem, model: Callable[..., Any]) -> Any:
    return poutine.trace(model).get_trace(*problem.args, **problem.kwargs)


def _refuse_discrete(problem: Problem) -> None:
    discrete = [site.name for site in problem.sites.values() if site.discrete]
    if not discrete:
        return
    loss = problem.loss if isinstance(problem.loss, str) else type(problem.loss).__name__
    if "Enum" not in loss:
        raise ProblemError(
            f"{problem.name}: automatic guides are for continuous sites and {discrete} are discrete; sum them out in "
            "the model, or mark them infer={'enumerate': 'parallel'} and use loss 'TraceEnum_ELBO'"
        )


def _bijection(problem: Problem, name: str, node: Mapping[str, Any]) -> Any:
    try:
        bijection = biject_to(node["fn"].support)
        unconstrained = bijection.inv(node["value"])
        bijection.log_abs_det_jacobian(unconstrained, node["value"])
    except NotImplementedError as error:
        raise ProblemError(
            f"{problem.name}: site {name!r} has support {node['fn'].support}, which has no map from unconstrained "
            "space with a density; reparametrise the model, or write a guide for it"
        ) from error
    return bijection


def as_start(problem: Problem, name: str, value: Any, like: Tensor) -> Tensor:
    """The starting value that ``init`` has for a site, as a tensor like the site's.

    Raises
    ------
    ProblemError
        If it holds no finite numbers, or has another shape.
    """
    try:
        start = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    except (TypeError, ValueError, RuntimeError):
        raise ProblemError(
            f"{problem.name}: init[{name!r}]={value!r}; give numbers, in lists of equal lengths"
        ) from None
    if start.shape != like.shape:
        shapes = f"{tuple(start.shape)} and the site {tuple(like.shape)}"
        raise ProblemError(f"{problem.name}: init[{name!r}] has shape {shapes}")
    if not torch.isfinite(start).all():
        raise ProblemError(f"{problem.name}: init[{name!r}]={value!r}; give finite numbers")
    return start


def _check_static(problem: Problem, name: str, one: Any, two: Any, point: Tensor) -> None:
    """Refuse supports that move with other sites, since the guide reads them once."""
    if not all(torch.allclose(one(point + shift), two(point + shift), equal_nan=True) for shift in (-0.5, 1.0)):
        raise ProblemError(
            f"{problem.name}: the support of site {name!r} moves with other sites; let the site have a fixed support, "
            "as a fraction of the moving range, and derive the value with pyro.deterministic"
        )


def _find_start(
    problem: Problem, potential: Potential, medians: dict[str, Tensor], fixed: set[str]
) -> dict[str, Tensor]:
    """Medians, or where the density there is not finite the first point tried where it and its gradient are."""

    def candidates() -> Iterator[dict[str, Tensor]]:
        yield medians
        yield {name: torch.zeros_like(value) for name, value in medians.items()}
        for attempt in range(_START_TRIES):
            radius = 2.0 / (1 + attempt % 4)
            yield {name: radius * (2 * torch.rand_like(value) - 1) for name, value in medians.items()}

    for candidate in candidates():
        start = {name: medians[name] if name in fixed else value for name, value in candidate.items()}
        z = torch.cat([value.reshape(-1).to(potential.like) for value in start.values()])
        try:
            value, gradient = potential.evaluate(z)
        except (ValueError, LinAlgError):  # arguments that a distribution cannot have
            continue
        if torch.isfinite(value) and torch.isfinite(gradient).all():
            return start
    raise ProblemError(
        f"{problem.name}: neither the median of the prior nor {_START_TRIES} points around the origin of unconstrained "
        "space have a finite log density and gradient; check the data, or give starting values by init={...}"
    )


def _subsamples(problem: Problem) -> dict[str, tuple[int, bool]]:
    """Plates that the model itself subsamples: how many elements it takes, and whether it says which."""
    nodes: Any = _trace(problem, problem.model).nodes
    return {
        name: (len(node["value"]), node["fn"].subsample_size is None)
        for name, node in nodes.items()
        if isinstance(node.get("fn"), _Subsample) and len(node["value"]) < node["fn"].size
    }


def _make_place(
    problem: Problem, name: str, like: Tensor, node: Any, subsamples: Mapping[str, tuple[int, bool]]
) -> Place:
    support = node["fn"].support
    shape, num_batch = list(like.shape), node["value"].dim() - node["fn"].event_dim
    plates = []
    for frame in reversed(node["cond_indep_stack"]):
        if not frame.vectorized:
            raise ProblemError(
                f"{problem.name}: site {name!r} lies in the sequential plate {frame.name!r}; automatic guides need "
                "vectorised plates: 'with pyro.plate(...)' in place of 'for ... in pyro.plate(...)'"
            )
        size = frame.full_size or frame.size
        taken, chosen = subsamples.get(frame.name, (None, False))
        if chosen:
            raise ProblemError(
                f"{problem.name}: plate {frame.name!r} around the latent site {name!r} is given its subsample, which a "
                f"guide cannot know; make it pyro.plate({frame.name!r}, {size}) and let the engine subsample it: "
                f"batch_plates=({frame.name!r},)"
            )
        batched = taken is not None or frame.name in problem.batch_plates
        if batched and any(tensor.numel() > 1 for _, _, tensor in _tensors(support)):
            raise ProblemError(
                f"{problem.name}: the support of site {name!r} differs between the elements of plate {frame.name!r}, "
                "which is subsampled; let the site have one support, and scale the value with pyro.deterministic"
            )
        shape[num_batch + frame.dim] = size
        plates.append(Plate(frame.name, size, taken, frame.dim))
    return Place(name, support, tuple(plates), tuple(shape), num_batch, node["fn"].event_dim, like.dtype)


def _complete(start: Tensor, place: Place) -> Tensor:
    """A start for all elements of plates that the model itself subsamples: those left out take the others' mean."""
    for axis, size in enumerate(place.shape):
        if start.shape[axis] != size:
            start = start.mean(axis, keepdim=True).expand(*start.shape[:axis], size, *start.shape[axis + 1 :])
    return start


def make_groups(places: Sequence[Place], split: set[str] | None) -> tuple[Group, ...]:
    """Sites by those of their plates that are in ``split``, None for all; enclosing groups first."""
    members: dict[frozenset[Plate], list[Place]] = {}
    for place in places:
        kept = frozenset(plate for plate in place.plates if split is None or plate.name in split)
        members.setdefault(kept, []).append(place)
    groups = []
    for plates, inside in sorted(members.items(), key=lambda item: len(item[0])):
        ordered = tuple(sorted(plates, key=lambda plate: plate.dim))
        batch = [1] * max((-plate.dim for plate in ordered), default=0)
        for plate in ordered:
            batch[plate.dim] = plate.size
        parts, start = [], 0
        for place in inside:
            own = [place.num_batch + plate.dim for plate in ordered]
            others = [axis for axis in range(len(place.shape)) if axis not in own]
            shape = tuple(place.shape[axis] for axis in others)
            outer = tuple(plate for plate in place.plates if plate not in plates)
            stop = start + math.prod(shape)
            parts.append(Part(place, start, stop, (*own, *others), shape, outer))
            start = stop
        groups.append(Group(ordered, tuple(batch), tuple(parts)))
    return tuple(groups)


def choose(value: Tensor, outer: Sequence[Plate], plates: Mapping[str, Any], place: Place) -> Tensor:
    """Elements of a minibatch, along plates that the vector holds in full."""
    for plate in outer:
        if plates[plate.name].subsample_size < plate.size:
            axis = plate.dim - (len(place.shape) - place.num_batch)
            value = value.index_select(axis, plates[plate.name].indices.to(value.device))
    return value


def move(support: Any, fn: Callable[[Tensor], Tensor]) -> None:
    """Apply a function to the tensors that a support holds, as the ends of an interval."""
    for owner, name, value in _tensors(support):
        setattr(owner, name, fn(value))


def _tensors(support: Any) -> list[tuple[Any, str, Tensor]]:
    """Tensors of a support with the constraint and the attribute that hold them."""
    found = []
    for name, value in getattr(support, "__dict__", {}).items():
        if isinstance(value, Tensor):
            found.append((support, name, value))
        for inner in value if isinstance(value, list | tuple) else [value]:
            if isinstance(inner, constraints.Constraint):
                found += _tensors(inner)
    return found
