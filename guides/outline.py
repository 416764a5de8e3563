"""What a policy needs to know of a model: its discrete sites, how their elements lie in plates, which plates are local.

A plate is *local* where nothing outside of it depends on what is drawn inside: given all that lies outside, its rows
are independent in the posterior, too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.distributions import biject_to

import probmodels.inference.programs.bijections  # noqa: F401 -- maps to positive definite matrices
from probmodels.errors import ProblemError
from probmodels.guides.layout import Plate, as_start
from probmodels.inference.problem import Problem
from probmodels.inference.programs.dependence import coupling, upstream
from probmodels.inference.programs.traces import leaf_of
from probmodels.inference.programs.varying import FixedSites
from probmodels.inference.runtime.ops import is_generated
from probmodels.options import hint

__all__ = ["Layout", "Outline", "Variable", "read_outline", "run_model"]

_TRACES = 5  # prior draws that must agree on sites and supports
_MEDIAN_DRAWS = 15


@dataclass(frozen=True)
class Layout:
    """How the elements of a site lie in rows of local plates: rows keep their dims, the others form a chain.

    Attributes
    ----------
    batch
        Batch shape with all rows of all plates.
    chain
        Dims, negative, of batch axes that are no local plate.
    inner
        Sizes of further axes, right of the batch axes, that are parts of the chain.
    """

    batch: tuple[int, ...]
    chain: tuple[int, ...]
    inner: tuple[int, ...]

    @property
    def size(self) -> int:
        """Elements in each row."""
        return math.prod(self.batch[dim] for dim in self.chain) * math.prod(self.inner)

    def rows(self, batch: Sequence[int]) -> tuple[int, ...]:
        """Batch shape with axes of the chain of size 1; ``batch`` may have fewer rows, and more axes on the left."""
        return tuple(1 if axis - len(batch) in self.chain else size for axis, size in enumerate(batch))

    def flat(self, value: Tensor) -> Tensor:
        """From (*batch, *inner, ...) with one further axis to (*rows, element, ...)."""
        if not (self.chain or self.inner):
            return value.unsqueeze(-2)
        num_inner = len(self.inner)
        num_batch = value.dim() - num_inner - 1
        kept = [axis for axis in range(num_batch) if axis - num_batch not in self.chain]
        moved = [axis for axis in range(num_batch) if axis not in kept]
        order = [*kept, *moved, *range(num_batch, num_batch + num_inner), value.dim() - 1]
        return value.permute(order).reshape(*self.rows(value.shape[:num_batch]), self.size, value.shape[-1])

    def full(self, value: Tensor, batch: Sequence[int]) -> Tensor:
        """The inverse: from (*rows, element, further) to (*batch, *inner, further)."""
        if not (self.chain or self.inner):
            return value.squeeze(-2)
        num_batch = len(batch)
        kept = [axis for axis in range(num_batch) if axis - num_batch not in self.chain]
        moved = [axis for axis in range(num_batch) if axis not in kept]
        order = [*kept, *moved]
        value = value.reshape(*(batch[axis] for axis in order), *self.inner, value.shape[-1])
        return value.permute(*(order.index(axis) for axis in range(num_batch)), *range(num_batch, value.dim()))


@dataclass(frozen=True)
class Variable:
    """A latent site: where it lies, and its table of values (value, *leaf) or its support and start."""

    name: str
    plates: tuple[Plate, ...]
    local: tuple[str, ...]
    layout: Layout
    event_dim: int
    dtype: torch.dtype
    table: Tensor | None = None
    kind: str = "table"  # "categorical" and "bernoulli" have distributions of Pyro's own
    support: Any = None
    start: Tensor | None = None  # (*batch, *inner) in unconstrained space

    @property
    def num_values(self) -> int:
        """Values that an element can take."""
        return 0 if self.table is None else len(self.table)


@dataclass(frozen=True)
class Outline:
    discrete: tuple[Variable, ...]
    continuous: tuple[Variable, ...]
    observed: Mapping[str, tuple[Tensor, int, tuple[Plate, ...]]]  # value, number of event axes, plates


def read_outline(problem: Problem, order: Sequence[str] | None, init: Mapping[str, Any]) -> Outline:
    """Run the model a few times and list its sites, discrete ones in the order in which they shall be drawn.

    Raises
    ------
    ProblemError
        If the model has no discrete latent site, a support is not finite or changes between runs, or ``order`` or
        ``init`` names what is not there.
    """
    names = [site.name for site in problem.sites.values() if site.discrete]
    if not names:
        raise ProblemError(
            f"{problem.name}: the model has no discrete latent site, which the guide 'gflownet' is for; take another "
            "automatic guide, as 'structured'"
        )
    nodes = _steady_nodes(problem, names)
    latent = _of_kind(problem, nodes, "latent")
    plates = {name: _plates_of(node) for name, node in nodes.items()}
    varying = isinstance(problem.model, FixedSites)
    if varying and problem.batch_plates:
        raise ProblemError(
            f"{problem.name}: sites that come and go leave one balance for all data; drop batch_plates="
            f"{problem.batch_plates}, or let all sites occur always and mask what does not count (poutine.mask)"
        )
    local = set[str]() if varying else _local_plates(problem, nodes, latent, plates)
    names = _ordered(problem, names, order)
    rest = [name for name in latent if name not in names]
    _check_init(problem, init, rest)
    middle = _medians(problem, nodes, rest, init)
    discrete = [_discrete(problem, name, nodes[name], plates[name], local) for name in names]
    continuous = [_continuous(name, nodes[name], plates[name], local, middle[name]) for name in rest]
    seen = _of_kind(problem, nodes, "observed")
    observed = {n: (node["value"].detach().clone(), node["fn"].event_dim, plates[n]) for n, node in seen.items()}
    discrete.sort(key=_depth)
    continuous.sort(key=_depth)
    return Outline(tuple(discrete), tuple(continuous), observed)


def _of_kind(problem: Problem, nodes: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Nodes of the sites of one kind."""
    return {name: node for name, node in nodes.items() if name in problem.sites and problem.sites[name].kind == kind}


def _check_init(problem: Problem, init: Mapping[str, Any], continuous: Sequence[str]) -> None:
    """Check that starting values are given for continuous latent sites alone."""
    for name in init:
        if name not in continuous:
            raise ProblemError(
                f"{problem.name}: init names {name!r}, which is no continuous latent site{hint(name, continuous)}"
            )


def _ordered(problem: Problem, names: list[str], order: Sequence[str] | None) -> list[str]:
    """Discrete sites in the order that was asked for, or else in that of the model."""
    if order is None:
        if isinstance(problem.model, FixedSites):
            return [name for name in problem.model.order if name in names]
        return names
    unknown = [name for name in order if name not in names]
    if unknown or sorted(order) != sorted(names):
        what = f"names {unknown[0]!r}{hint(unknown[0], names)}" if unknown else f"is {list(order)}"
        raise ProblemError(f"{problem.name}: order {what}; it must name each of the discrete sites {names} once")
    return list(order)


def _depth(variable: Variable) -> int:
    return len(variable.local)


def run_model(problem: Problem) -> Any:
    """Nodes by name of one run of the model."""
    return poutine.trace(problem.model).get_trace(*problem.args, **problem.kwargs).nodes


def _steady_nodes(problem: Problem, names: Sequence[str]) -> dict[str, Any]:
    """Sites of a prior draw, whose discrete ones are the same in further draws."""
    first: dict[str, Any] = {}
    for _ in range(_TRACES):
        nodes = {name: node for name, node in run_model(problem).items() if node["type"] == "sample"}
        drawn = [
            name
            for name, node in nodes.items()
            if not node["is_observed"]
            and not isinstance(node["fn"], _Subsample)
            and not is_generated(node)
            and getattr(node["fn"].support, "is_discrete", False)
        ]
        different = sorted(set(drawn) ^ set(names))
        if different:
            raise ProblemError(
                f"{problem.name}: the discrete site {different[0]!r} is not there in every run of the model; list "
                "its sites by with_fixed_sites, as with_guide does, or mask what does not count (poutine.mask)"
            )
        first = first or nodes
        for name in names:
            one, two = (_table(problem, name, found[name]["fn"])[0] for found in (first, nodes))
            if one.shape != two.shape or not torch.equal(one, two):
                raise ProblemError(
                    f"{problem.name}: the support of the discrete site {name!r} changes between runs of the model, "
                    f"from {len(one)} to {len(two)} values; give it all values that it may ever take, and those that "
                    "are impossible a probability of zero"
                )
            if first[name]["value"].shape != nodes[name]["value"].shape:
                raise ProblemError(f"{problem.name}: the shape of the discrete site {name!r} changes between runs")
    return first


def _table(problem: Problem, name: str, fn: Any) -> tuple[Tensor, Any]:
    """Values (value, *leaf) of one element of a site, and the distribution of its elements."""
    fn = leaf_of(fn)
    try:
        values = fn.enumerate_support(expand=False)
    except NotImplementedError as error:
        raise ProblemError(
            f"{problem.name}: the discrete site {name!r} of distribution {type(fn).__name__} has no finite list of "
            "values, which a policy chooses from; truncate it, as a Categorical of the values that matter"
        ) from error
    return values.detach().reshape(len(values), *fn.event_shape), fn


def _plates_of(node: Any) -> tuple[Plate, ...]:
    frames = [frame for frame in reversed(node["cond_indep_stack"]) if frame.vectorized]
    return tuple(Plate(f.name, f.full_size or f.size, None, f.dim) for f in frames)


def _local_plates(
    problem: Problem, nodes: Mapping[str, Any], latent: Mapping[str, Any], plates: Mapping[str, tuple[Plate, ...]]
) -> set[str]:
    """Names of the plates whose rows are independent given all outside, so that their sites nest."""
    sizes = {plate.name: plate.size for found in plates.values() for plate in found}
    above = upstream(problem, set(latent))
    if above is None:
        return {name for name in sizes if name in problem.batch_plates}
    inside = {name: {plate.name for plate in found} for name, found in plates.items()}
    local = {
        name
        for name in sizes
        if name in problem.batch_plates
        or all(name in inside[site] for site, parents in above.items() for parent in parents if name in inside[parent])
    }
    local = {name for name in local if name in problem.batch_plates or coupling(problem, name) is None}
    # Two sites that explain one value must lie one in the other's plates: else they depend on each other crosswise.
    while True:
        crossing = _crossing([[inside[o] & local for o in {*up, site} & set(latent)] for site, up in above.items()])
        free = sorted(crossing - set(problem.batch_plates), key=lambda name: (sizes[name], name))
        if not free:
            return local
        local.discard(free[0])


def _crossing(families: Sequence[Sequence[set[str]]]) -> set[str]:
    """Plates of which one site of a family has some and another site others."""
    found: set[str] = set()
    for family in families:
        for one in family:
            found = found.union(*(one ^ two for two in family if not (one <= two or two <= one)))
    return found


def _make_layout(shape: Sequence[int], inner: Sequence[int], plates: Iterable[Plate]) -> Layout:
    rows = {plate.dim for plate in plates}
    chain = tuple(dim for dim in range(-len(shape), 0) if dim not in rows)
    return Layout(tuple(shape), chain, tuple(inner))


def _discrete(problem: Problem, name: str, node: Any, plates: tuple[Plate, ...], local: set[str]) -> Variable:
    table, leaf = _table(problem, name, node["fn"])
    value, event_dim = node["value"], node["fn"].event_dim
    num_batch = value.dim() - event_dim
    inner = tuple(value.shape[num_batch : value.dim() - leaf.event_dim])
    own = tuple(plate for plate in plates if plate.name in local)
    kind = "table"
    if event_dim == 0 and torch.equal(table, torch.arange(len(table)).to(table)):
        kind = {dist.Categorical: "categorical", dist.Bernoulli: "bernoulli"}.get(type(leaf), "table")
    layout = _make_layout(value.shape[:num_batch], inner, own)
    names = tuple(sorted(plate.name for plate in own))
    return Variable(name, plates, names, layout, event_dim, value.dtype, table, kind)


def _continuous(name: str, node: Any, plates: tuple[Plate, ...], local: set[str], start: Tensor) -> Variable:
    num_batch = node["value"].dim() - node["fn"].event_dim
    own = tuple(plate for plate in plates if plate.name in local)
    layout = _make_layout(start.shape[:num_batch], start.shape[num_batch:], own)
    names = tuple(sorted(plate.name for plate in own))
    return Variable(
        name, plates, names, layout, node["fn"].event_dim, start.dtype, support=node["fn"].support, start=start
    )


def _medians(
    problem: Problem, nodes: Mapping[str, Any], names: Sequence[str], init: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Where continuous sites start, in unconstrained space."""
    if not names:
        return {}
    draws: dict[str, list[Tensor]] = {name: [] for name in names}
    for _ in range(_MEDIAN_DRAWS):
        found = run_model(problem)
        for name in names:
            try:
                draws[name].append(biject_to(found[name]["fn"].support).inv(found[name]["value"]))
            except NotImplementedError as error:
                raise ProblemError(
                    f"{problem.name}: site {name!r} has support {found[name]['fn'].support}, which has no map from "
                    "unconstrained space; reparametrise the model, or write a guide for it"
                ) from error
    starts = {}
    for name in names:
        start = torch.stack(draws[name]).median(0).values
        if name in init:
            value = as_start(problem, name, init[name], nodes[name]["value"])
            start = biject_to(nodes[name]["fn"].support).inv(value)
        starts[name] = torch.where(start.isfinite(), start, torch.zeros_like(start)).contiguous()
    return starts
