"""Policies for discrete sites: a guide that draws one value after the other, each given all that were drawn before.

A generative flow network builds an object step by step so that it ends at z with probability proportional to a reward.
Here the object is the set of latent values of a model, a step is one element of a site, and the reward is p(x, z). No
two orders of steps lead to one state, so that the backward policy is 1 and the balance conditions say::

    q(z | x) = prod_t q(z_t | z_1, ..., z_{t-1}, x)  =  p(x, z) / Z(x)

for all z. The guide is the policy; objectives that enforce the balance stand in `probmodels.inference.balance`, and
those that only need densities of given values, as sleep and wake-phi phases, work as well.

Which elements need each other is read off the model. A plate is *local* where nothing outside of it depends on what is
drawn inside: given all that lies outside, its rows are independent in the posterior, too. Rows of local plates share
the parameters of one network, whose inputs are the observed values of the row, arguments with a row for it, and what
was drawn outside: the policy is amortised, and a minibatch touches its own rows only. Elements of other plates and of
event axes are drawn one after the other, in one sample site, so that any dependence between them can be expressed.

Two networks give the logits:

=======  ===========================================================================================================
``mlp``  per element one hidden layer and a linear map of all that came before, masked so that all elements of a site
         are scored at once; parameters grow with the square of the number of elements
``gru``  a recurrent state shared by all elements, each with a place of its own; parameters grow linearly
=======  ===========================================================================================================

Continuous sites are drawn first, as normals in unconstrained space whose means are linear in the continuous values
before them (``structured``) or constant (``mean_field``). They are conditional on no discrete value; the discrete ones
are conditional on them. Their density can be evaluated at given values, which the maps of `probmodels.guides.auto` do
not offer.

References
----------
Bengio, E., Jain, M., Korablyov, M., Precup, D. and Bengio, Y. (2021). Flow network based generative models for
non-iterative diverse candidate generation. NeurIPS 34. https://arxiv.org/abs/2106.04399
Hu, E. J., Malkin, N., Jain, M., Everett, K., Graikos, A. and Bengio, Y. (2023). GFlowNet-EM for learning compositional
latent variable models. ICML. https://arxiv.org/abs/2302.06576
Germain, M., Gregor, K., Murray, I. and Larochelle, H. (2015). MADE: masked autoencoder for distribution estimation.
ICML. https://arxiv.org/abs/1502.03509
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.inspect import TrackProvenance
from pyro.nn import PyroModule, PyroParam
from pyro.ops.provenance import get_provenance
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor, nn
from torch.distributions import biject_to, constraints

import probmodels.inference.bijections  # noqa: F401 -- maps to positive definite matrices
from probmodels.guides.layout import Plate, hint, move
from probmodels.inference.minibatch import whole
from probmodels.inference.ops import is_generated, isolated
from probmodels.inference.problem import Problem, ProblemError

__all__ = ["AutoGFlowNet", "Autoregressive", "DiscretePolicy", "make_policy"]

_TRACES = 5  # prior draws that must agree on sites and supports
_MEDIAN_DRAWS = 15
_MLP_LIMIT = 2_000_000  # numbers of a network above which the recurrent one is taken unless asked for
_WHOLE_LIMIT = 512  # observed numbers up to which they are an input of what lies outside of local plates


def make_policy(
    problem: Problem,
    *,
    hidden: int = 64,
    network: str | None = None,
    order: Sequence[str] | None = None,
    data: Sequence[int | str] | None = None,
    continuous: str = "structured",
    init: Mapping[str, Any] | None = None,
    init_scale: float = 0.1,
    log_z: bool = False,
    flows: bool = False,
) -> DiscretePolicy:
    """An autoregressive guide of a problem with discrete latent sites.

    Parameters
    ----------
    problem
        Its model is run a few times, in isolation and from a fixed seed: equal problems give equal guides.
    hidden
        Width of the networks.
    network
        ``"mlp"`` or ``"gru"``; None for ``"mlp"`` where it has no more than two million numbers.
    order
        Discrete sites in the order in which they shall be drawn; None for that of the program. Sites outside of local
        plates come first in any case.
    data
        Arguments of the model, by position or name, that rows of local plates may look at besides observed values:
        tensors with one entry for each row. None for all of them.
    continuous
        ``"structured"`` or ``"mean_field"``.
    init
        Starting values of continuous sites; the others start at the median of their prior.
    init_scale
        Standard deviation of continuous sites at the start, in unconstrained space.
    log_z
        Whether there is a deterministic site ``log_Z``, the log normaliser of the reward: one number for each row of
        the plate that holds all latent sites, a function of its data; or one for all.
    flows
        Whether there is a deterministic site ``log_flow_<site>`` before the first site, and before each discrete one
        that lies in no more local plates than all latent sites do: the log flow through what was drawn so far.

    Returns
    -------
    DiscretePolicy
        A Pyro program of the same arguments as the model.

    Raises
    ------
    ProblemError
        If the model has no discrete latent site, a support is not finite or changes between runs, or an option is
        unknown or out of range.
    """
    name = problem.name
    if not isinstance(hidden, int) or isinstance(hidden, bool) or hidden < 1:
        raise ProblemError(f"{name}: hidden={hidden!r}; it must be a positive integer")
    for option, value, known in (
        ("network", network, (None, "mlp", "gru")),
        ("continuous", continuous, ("structured", "mean_field")),
    ):
        if value not in known:
            raise ProblemError(f"{name}: {option}={value!r}; choose from {[k for k in known if k is not None]}")
    if not init_scale > 0:
        raise ProblemError(f"{name}: init_scale={init_scale}; it must be positive")
    with isolated(seed=0), torch.no_grad(), pyro.validation_enabled(False), whole(problem)():
        outline = _read(problem, order, init or {})
        return DiscretePolicy(problem, outline, hidden, network, data, continuous, init_scale, log_z, flows)


AutoGFlowNet = make_policy


# --- what the model tells --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layout:
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
class _Variable:
    """A latent site: where it lies, and its table of values (value, *leaf) or its support and start."""

    name: str
    plates: tuple[Plate, ...]
    local: tuple[str, ...]
    layout: _Layout
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
class _Outline:
    discrete: tuple[_Variable, ...]
    continuous: tuple[_Variable, ...]
    observed: Mapping[str, tuple[Tensor, int, tuple[Plate, ...]]]  # value, number of event axes, plates


def _read(problem: Problem, order: Sequence[str] | None, init: Mapping[str, Any]) -> _Outline:
    names = [site.name for site in problem.sites.values() if site.discrete]
    if not names:
        raise ProblemError(
            f"{problem.name}: the model has no discrete latent site, which the guide 'gflownet' is for; take another "
            "automatic guide, as 'structured'"
        )
    nodes = _steady_nodes(problem, names)
    latent = {n: node for n, node in nodes.items() if n in problem.sites and problem.sites[n].kind == "latent"}
    plates = {name: _plates_of(node) for name, node in nodes.items()}
    local = _local_plates(problem, nodes, latent, plates)
    if order is not None:
        unknown = [name for name in order if name not in names]
        if unknown or sorted(order) != sorted(names):
            what = f"names {unknown[0]!r}{hint(unknown[0], names)}" if unknown else f"is {list(order)}"
            raise ProblemError(f"{problem.name}: order {what}; it must name each of the discrete sites {names} once")
        names = list(order)
    for name in init:
        if name not in latent or name in names:
            raise ProblemError(
                f"{problem.name}: init names {name!r}, which is no continuous latent site"
                f"{hint(name, [n for n in latent if n not in names])}"
            )
    rest = [name for name in latent if name not in names]
    middle = _medians(problem, nodes, rest, init)
    discrete = [_discrete(problem, name, nodes[name], plates[name], local) for name in names]
    continuous = [_continuous(name, nodes[name], plates[name], local, middle[name]) for name in rest]
    observed = {
        name: (node["value"].detach().clone(), node["fn"].event_dim, plates[name])
        for name, node in nodes.items()
        if name in problem.sites and problem.sites[name].kind == "observed"
    }
    discrete.sort(key=_depth)
    continuous.sort(key=_depth)
    return _Outline(tuple(discrete), tuple(continuous), observed)


def _depth(variable: _Variable) -> int:
    return len(variable.local)


def _run(problem: Problem) -> Any:
    return poutine.trace(problem.model).get_trace(*problem.args, **problem.kwargs).nodes


def _steady_nodes(problem: Problem, names: Sequence[str]) -> dict[str, Any]:
    """Sites of a prior draw, whose discrete ones are the same in further draws."""
    first: dict[str, Any] = {}
    for _ in range(_TRACES):
        nodes = {name: node for name, node in _run(problem).items() if node["type"] == "sample"}
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
                f"{problem.name}: the discrete site {different[0]!r} is not there in every run of the model; let all "
                "sites occur always, and mask what does not count (poutine.mask)"
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
    while isinstance(fn, dist.Independent | dist.MaskedDistribution | dist.ExpandedDistribution):
        fn = fn.base_dist
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
    above = _upstream(problem, set(latent))
    if above is None:
        return {name for name in sizes if name in problem.batch_plates}
    inside = {name: {plate.name for plate in found} for name, found in plates.items()}
    local = {
        name
        for name in sizes
        if name in problem.batch_plates
        or all(name in inside[site] for site, parents in above.items() for parent in parents if name in inside[parent])
    }
    # Two sites that explain one value must lie one in the other's plates: else they depend on each other crosswise.
    while True:
        crossing: set[str] = set()
        for site, parents in above.items():
            family = [inside[other] & local for other in {*parents, site} & set(latent)]
            for one in family:
                crossing = crossing.union(*(one ^ two for two in family if not (one <= two or two <= one)))
        free = sorted(crossing - set(problem.batch_plates), key=lambda name: (sizes[name], name))
        if not free:
            return local
        local.discard(free[0])


def _upstream(problem: Problem, latent: Collection[str]) -> dict[str, set[str]] | None:
    """Latent sites that the density of each site depends on, itself among them; None where that cannot be tracked."""
    try:
        with TrackProvenance():
            nodes = _run(problem)
        return {
            name: set(get_provenance(node["fn"].log_prob(node["value"]))) & set(latent)
            for name, node in nodes.items()
            if node["type"] == "sample" and not isinstance(node["fn"], _Subsample) and not _is_leaf(node)
        }
    except Exception:  # tensors that carry their origin do not go through every operation
        return None


def _is_leaf(node: Any) -> bool:
    """Whether a site has no density in a fit: it is deterministic or generated."""
    return bool(node["infer"].get("_deterministic")) or is_generated(node)


def _make_layout(shape: Sequence[int], inner: Sequence[int], plates: Iterable[Plate]) -> _Layout:
    rows = {plate.dim for plate in plates}
    chain = tuple(dim for dim in range(-len(shape), 0) if dim not in rows)
    return _Layout(tuple(shape), chain, tuple(inner))


def _discrete(problem: Problem, name: str, node: Any, plates: tuple[Plate, ...], local: set[str]) -> _Variable:
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
    return _Variable(name, plates, names, layout, event_dim, value.dtype, table, kind)


def _continuous(name: str, node: Any, plates: tuple[Plate, ...], local: set[str], start: Tensor) -> _Variable:
    num_batch = node["value"].dim() - node["fn"].event_dim
    own = tuple(plate for plate in plates if plate.name in local)
    layout = _make_layout(start.shape[:num_batch], start.shape[num_batch:], own)
    names = tuple(sorted(plate.name for plate in own))
    return _Variable(
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
        found = _run(problem)
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
            like = nodes[name]["value"]
            value = torch.as_tensor(init[name], dtype=like.dtype, device=like.device)
            if value.shape != like.shape:
                raise ProblemError(
                    f"{problem.name}: init[{name!r}] has shape {tuple(value.shape)} and the site {tuple(like.shape)}"
                )
            start = biject_to(nodes[name]["fn"].support).inv(value)
        starts[name] = torch.where(start.isfinite(), start, torch.zeros_like(start)).contiguous()
    return starts


# --- inputs ----------------------------------------------------------------------------------------------------------


class _Inputs(nn.Module):
    """What the rows of some local plates may look at: their part of tensors among the arguments, standardised.

    Values are read from the arguments at every call, so that other data of the same shapes give other posteriors;
    observed values that are no argument are kept.
    """

    def __init__(
        self,
        problem: Problem,
        plates: Sequence[Plate],
        observed: Mapping[str, tuple[Tensor, int, tuple[Plate, ...]]],
        wanted: Sequence[int | str] | None,
        like: Tensor,
    ) -> None:
        super().__init__()
        self._plates = tuple(sorted(plates, key=lambda plate: plate.dim))
        self._sources: list[tuple[int | str | None, tuple[int, ...], tuple[int | None, ...]]] = []
        given: dict[Any, Any] = {**dict(enumerate(problem.args)), **problem.kwargs}
        used: set[int | str] = set()
        names = {plate.name for plate in plates}
        for value, num_event, site_plates in observed.values():
            equal = [k for k, arg in given.items() if isinstance(arg, Tensor) and _same(arg, value)]
            used.update(equal)
            dims = {plate.name: value.dim() - num_event + plate.dim for plate in site_plates}
            axes = {p.name: dims[p.name] for p in plates if p.name in dims and value.shape[dims[p.name]] == p.size}
            if (names and not axes) or (not names and (not equal or value.numel() > _WHOLE_LIMIT)):
                continue
            self._add(equal[0] if equal else None, value, axes, like)
        if wanted is not None:
            for key in wanted:
                if key not in given or not isinstance(given[key], Tensor):
                    raise ProblemError(
                        f"{problem.name}: data names {key!r}, which is no tensor among the arguments {list(given)}"
                    )
        for key, arg in given.items():
            if not isinstance(arg, Tensor) or key in used or (wanted is not None and key not in wanted):
                continue
            for plate in self._plates:
                places = [axis for axis, size in enumerate(arg.shape) if size == plate.size]
                if places and plate.size > 1:
                    self._add(key, arg, {plate.name: places[0]}, like)
                    break
        self.width = sum(len(self.get_buffer(f"mean_{i}")) for i in range(len(self._sources)))

    def _add(self, key: int | str | None, value: Tensor, axes: Mapping[str, int], like: Tensor) -> None:
        index = len(self._sources)
        row_axes = tuple(axes.get(plate.name) for plate in self._plates)
        self._sources.append((key, tuple(value.shape), row_axes))
        if key is None:
            self.register_buffer(f"kept_{index}", value.to(like))
        rows = self._lay(value.to(like), row_axes)
        flat = rows.reshape(-1, rows.shape[-1])
        flat = flat.where(flat.isfinite(), torch.zeros_like(flat))
        single = len(flat) < 2
        mean = flat.mean().expand(flat.shape[-1]) if single else flat.mean(0)
        sd = (flat.std(unbiased=False).expand(flat.shape[-1])) if single else flat.std(0, unbiased=False)
        self.register_buffer(f"mean_{index}", mean.clone())
        self.register_buffer(f"scale_{index}", torch.where(sd > 1e-8, sd, torch.ones_like(sd)))

    def _lay(self, value: Tensor, row_axes: Sequence[int | None]) -> Tensor:
        """From the shape of a source to (*rows, feature), rows at the dims of the plates."""
        depth = max((-plate.dim for plate in self._plates), default=0)
        found = {plate.dim: axis for plate, axis in zip(self._plates, row_axes, strict=True) if axis is not None}
        kept = [found[dim] for dim in range(-depth, 0) if dim in found]
        rest = [axis for axis in range(value.dim()) if axis not in kept]
        rows = [value.shape[found[dim]] if dim in found else 1 for dim in range(-depth, 0)]
        return value.permute([*kept, *rest]).reshape([*rows, -1])

    def forward(self, plates: Mapping[str, Any], like: Tensor, args: Any, kwargs: Any) -> Tensor:
        """Inputs (*rows, feature) of the rows that the plates chose."""
        parts = []
        for index, (key, shape, row_axes) in enumerate(self._sources):
            value = self.get_buffer(f"kept_{index}") if key is None else _given(key, args, kwargs)
            part = self._lay(value.reshape(shape).to(like), row_axes)
            for plate, axis in zip(self._plates, row_axes, strict=True):
                if axis is not None and plates[plate.name].subsample_size < plate.size:
                    part = part.index_select(plate.dim - 1, plates[plate.name].indices.to(part.device))
            part = (part - self.get_buffer(f"mean_{index}")) / self.get_buffer(f"scale_{index}")
            parts.append(torch.where(part.isfinite(), part, torch.zeros_like(part)))
        return _join(parts) if parts else like.new_zeros(0)


def _given(key: int | str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    return args[key] if isinstance(key, int) else kwargs[key]


def _same(arg: Tensor, value: Tensor) -> bool:
    return arg.numel() == value.numel() and bool(torch.equal(arg.reshape(value.shape).to(value.dtype), value))


def _broadcast(*shapes: Sequence[int]) -> tuple[int, ...]:
    """Joint shape; that of torch takes as long as a small matrix product."""
    if all(shape == shapes[0] for shape in shapes):
        return tuple(shapes[0])
    depth = max(len(shape) for shape in shapes)
    padded = [(1,) * (depth - len(shape)) + tuple(shape) for shape in shapes]
    return tuple(next((size for size in sizes if size != 1), 1) for sizes in zip(*padded, strict=True))


def _join(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate along the last axis, the others broadcast."""
    if len(parts) == 1:
        return parts[0]
    shape = _broadcast(*(part.shape[:-1] for part in parts))
    return torch.cat([part.expand(*shape, part.shape[-1]) for part in parts], -1)


# --- networks --------------------------------------------------------------------------------------------------------


class _Network(nn.Module):
    """Logits of the elements of a group's sites, one site after the other.

    A state (*rows, width) holds what was drawn so far; `score` gives the logits (*rows, element, value) of a site's
    elements each given those before it, `draw` draws them, and `push` makes the state that follows.
    """

    state_width: int  # of the state after all sites

    def __init__(self, sizes: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        ends = [0]
        for size, _ in sizes:
            ends.append(ends[-1] + size)
        self.ends, self.counts = tuple(ends), tuple(count for _, count in sizes)
        self.top = max(self.counts)

    def begin(self, inputs: Tensor) -> Tensor:
        raise NotImplementedError

    def score(self, state: Tensor, site: int, hot: Tensor | None) -> Tensor:
        raise NotImplementedError

    def draw(self, state: Tensor, site: int, choose: Callable[[Tensor], Tensor]) -> Tensor:
        raise NotImplementedError

    def push(self, state: Tensor, site: int, hot: Tensor) -> Tensor:
        raise NotImplementedError

    def _padded(self, hot: Tensor) -> Tensor:
        return nn.functional.pad(hot, (0, self.top - hot.shape[-1])) if hot.shape[-1] < self.top else hot


class _Masked(_Network):
    """One hidden layer for each element, of inputs and of indicators of all values before it, and a linear map."""

    def __init__(self, sizes: Sequence[tuple[int, int]], num_inputs: int, hidden: int) -> None:
        super().__init__(sizes)
        total = self.ends[-1]
        self.num_inputs, self.hidden = num_inputs, hidden
        self.state_width = num_inputs + total * self.top
        first = torch.randn(total, self.state_width, hidden + self.top)
        first[..., :num_inputs, :] /= math.sqrt(max(num_inputs, 1))
        first[..., num_inputs:, :] /= math.sqrt(total)
        first[..., hidden:] = 0.0
        bias = torch.cat([torch.randn(total, hidden) * 0.5, torch.zeros(total, self.top)], -1)
        self.first, self.bias = nn.Parameter(first), nn.Parameter(bias)
        self.second = nn.Parameter(torch.zeros(total, hidden, self.top))  # every value is equally likely at the start

    def begin(self, inputs: Tensor) -> Tensor:
        return inputs

    def push(self, state: Tensor, site: int, hot: Tensor) -> Tensor:
        return _join([state, self._padded(hot).flatten(-2)])

    def score(self, state: Tensor, site: int, hot: Tensor | None) -> Tensor:
        start, stop = self.ends[site : site + 2]
        layer = self._layer(state, start, stop)
        if stop - start > 1:
            assert hot is not None
            own = self._own(start, stop)
            mask = torch.ones(stop - start, stop - start, dtype=own.dtype, device=own.device).tril(-1)
            hot = self._padded(hot).to(own.dtype).flatten(-2)
            weight = (own * mask[..., None, None]).flatten(1, 2)  # (element, earlier * value, out)
            layer = layer + (hot @ weight.permute(1, 0, 2).flatten(1)).unflatten(-1, weight.shape[::2])
        return self._head(layer, start, stop)[..., : self.counts[site]]

    def draw(self, state: Tensor, site: int, choose: Callable[[Tensor], Tensor]) -> Tensor:
        start, stop = self.ends[site : site + 2]
        layer, own, drawn = self._layer(state, start, stop), self._own(start, stop), []
        for element in range(stop - start):
            here = slice(element, element + 1)
            logits = self._head(layer[..., here, :], start + element, start + element + 1)[..., : self.counts[site]]
            hot = choose(logits)  # (*rows, 1, value)
            drawn.append(hot)
            if element + 1 < stop - start:
                weight = own[:, element, : hot.shape[-1]].permute(1, 0, 2).flatten(1)
                layer = layer + (hot.squeeze(-2) @ weight).unflatten(-1, (stop - start, -1))
        return torch.cat(drawn, -2)

    def _own(self, start: int, stop: int) -> Tensor:
        """Weights (element, earlier element, value, out) between the elements of a site."""
        columns = slice(self.num_inputs + start * self.top, self.num_inputs + stop * self.top)
        return self.first[start:stop, columns].unflatten(1, (stop - start, self.top))

    def _layer(self, state: Tensor, start: int, stop: int) -> Tensor:
        bias = self.bias[start:stop]
        if state.shape[-1] == 0:
            return bias.expand(*state.shape[:-1], *bias.shape)
        weight = self.first[start:stop, : state.shape[-1]].permute(1, 0, 2).flatten(1)
        return (state @ weight).unflatten(-1, bias.shape) + bias

    def _head(self, layer: Tensor, start: int, stop: int) -> Tensor:
        # The root keeps what one step of Adam moves the logits by from growing with the width.
        inside, direct = layer[..., : self.hidden].tanh() / math.sqrt(self.hidden), layer[..., self.hidden :]
        return (inside.unsqueeze(-2) @ self.second[start:stop]).squeeze(-2) + direct


class _Recurrent(_Network):
    """A state that every value passes through, with a place for each element and a head for each site."""

    def __init__(self, sizes: Sequence[tuple[int, int]], num_inputs: int, hidden: int) -> None:
        super().__init__(sizes)
        total = self.ends[-1]
        self.hidden, self.state_width = hidden, 2 * hidden
        self.read = nn.Linear(num_inputs, hidden) if num_inputs else None
        self.gru = nn.GRU(hidden, hidden, batch_first=True)
        self.embed = nn.Parameter(torch.randn(len(sizes), self.top, hidden))
        self.place = nn.Parameter(torch.randn(total, hidden))
        self.mix = nn.Linear(2 * hidden, hidden)
        self.heads = nn.Parameter(torch.zeros(len(sizes), hidden, self.top))
        self.bias = nn.Parameter(torch.zeros(total, self.top))

    def begin(self, inputs: Tensor) -> Tensor:
        if self.read is None:
            return self.place.new_zeros(*inputs.shape[:-1], self.state_width)
        seen = self.read(inputs).tanh()
        return torch.cat([torch.zeros_like(seen), seen], -1)

    def score(self, state: Tensor, site: int, hot: Tensor | None) -> Tensor:
        start, stop = self.ends[site : site + 2]
        passed, seen = state.chunk(2, -1)
        before = passed.unsqueeze(-2)
        if stop - start > 1:
            assert hot is not None
            after = self._passed(state, site, hot[..., :-1, :])
            before = torch.cat([before.expand(*after.shape[:-2], 1, -1), after], -2)
        return self._head(before, seen, site, slice(start, stop))

    def draw(self, state: Tensor, site: int, choose: Callable[[Tensor], Tensor]) -> Tensor:
        start, stop = self.ends[site : site + 2]
        passed, seen = state.chunk(2, -1)
        drawn: list[Tensor] = []
        for element in range(start, stop):
            hot = choose(self._head(passed.unsqueeze(-2), seen, site, slice(element, element + 1)))
            drawn.append(hot)
            if element + 1 < stop:
                step = hot @ self.embed[site, : hot.shape[-1]] + self.place[element]
                passed = self._run(step, passed)[..., -1, :]
        return torch.cat(drawn, -2)

    def push(self, state: Tensor, site: int, hot: Tensor) -> Tensor:
        seen = state.chunk(2, -1)[1]
        return _join([self._passed(state, site, hot)[..., -1, :], seen])

    def _passed(self, state: Tensor, site: int, hot: Tensor) -> Tensor:
        """States (*rows, element, hidden) after each of the first elements of a site."""
        start = self.ends[site]
        steps = hot @ self.embed[site, : hot.shape[-1]] + self.place[start : start + hot.shape[-2]]
        return self._run(steps, state.chunk(2, -1)[0])

    def _run(self, steps: Tensor, passed: Tensor) -> Tensor:
        rows = _broadcast(steps.shape[:-2], passed.shape[:-1])
        steps = steps.expand(*rows, *steps.shape[-2:]).reshape(-1, *steps.shape[-2:])
        first = passed.expand(*rows, self.hidden).reshape(1, -1, self.hidden).contiguous()
        return self.gru(steps, first)[0].reshape(*rows, -1, self.hidden)

    def _head(self, before: Tensor, seen: Tensor, site: int, elements: slice) -> Tensor:
        place = self.place[elements]
        rows = _broadcast(before.shape[:-2], seen.shape[:-1])
        both = _join([before.expand(*rows, *before.shape[-2:]), seen.unsqueeze(-2)])
        inside = (self.mix(both) + place).tanh() / math.sqrt(self.hidden)  # as in `_Masked`
        count = self.counts[site]
        return inside @ self.heads[site, :, :count] + self.bias[elements, :count]


NETWORKS: dict[str, type[Any]] = {"mlp": _Masked, "gru": _Recurrent}


class Autoregressive(dist.TorchDistribution):
    """Elements of a discrete site, each given those before it; made by `DiscretePolicy`.

    The log density of an entry of the batch is that of its value given the earlier ones: over a plate whose rows depend
    on each other, the sum over rows is the joint log density, and single rows are conditional ones.

    Parameters
    ----------
    network
        Gives the logits.
    state
        What was drawn before, (*rows, width).
    site
        Place of the site in its group.
    layout
        Which axes of the batch are rows.
    table
        Values (value, *leaf) of an element.
    batch_shape, event_shape
        Of the site.
    temperature, epsilon
        Draws come from ``(1 - epsilon) softmax(logits / temperature) + epsilon uniform``, element by element;
        densities never do.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 -- as torch declares it
    has_enumerate_support = False

    def __init__(
        self,
        network: _Network,
        state: Tensor,
        site: int,
        layout: _Layout,
        table: Tensor,
        batch_shape: Sequence[int],
        event_shape: Sequence[int] = (),
        *,
        temperature: float = 1.0,
        epsilon: float = 0.0,
    ) -> None:
        self._parts = (network, state, site, layout, table)
        self.temperature, self.epsilon = temperature, epsilon
        super().__init__(torch.Size(batch_shape), torch.Size(event_shape), validate_args=False)

    @property
    def support(self) -> Any:
        """One of the values of the table, in every element."""
        kind: Any = constraints.integer_interval(self._parts[4].min(), self._parts[4].max())
        return constraints.independent(kind, self.event_dim) if self.event_dim else kind

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> Autoregressive:
        """The same for a larger batch, whose further axes are independent."""
        return self._like(batch_shape, self.temperature, self.epsilon)

    def explored(self, temperature: float = 1.0, epsilon: float = 0.0) -> Autoregressive:
        """The same with other draws: of logits divided by a temperature, mixed with uniform ones."""
        return self._like(self.batch_shape, temperature, epsilon)

    def _like(self, batch_shape: Sequence[int], temperature: float, epsilon: float) -> Autoregressive:
        return Autoregressive(*self._parts, batch_shape, self.event_shape, temperature=temperature, epsilon=epsilon)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008 -- torch's own signature
        """Draw element by element."""
        network, state, site, layout, table = self._parts
        batch = (*sample_shape, *self.batch_shape)
        with torch.no_grad():
            state = state.expand(*layout.rows(batch), state.shape[-1])
            hot = layout.full(network.draw(state, site, self._choose), batch)
            return table[hot.argmax(-1)]

    def log_prob(self, value: Tensor) -> Tensor:
        """Log probability (*batch) of each entry given the earlier ones."""
        network, state, site, layout, table = self._parts
        indicators = _indicators(value, table)
        num_inner = len(layout.inner)
        shape = _broadcast(indicators.shape[: indicators.dim() - num_inner - 1], self.batch_shape)
        indicators = indicators.expand(*shape, *indicators.shape[indicators.dim() - num_inner - 1 :]).to(state.dtype)
        hot = layout.flat(indicators)
        state = state.expand(*hot.shape[:-2], state.shape[-1])
        logits = network.score(state, site, hot).log_softmax(-1)
        density = layout.full((logits * hot).sum(-1, keepdim=True), shape).squeeze(-1)
        return density.flatten(len(shape)).sum(-1) if num_inner else density

    def _choose(self, logits: Tensor) -> Tensor:
        if self.temperature != 1.0:
            logits = logits / self.temperature
        if self.epsilon > 0.0:
            mixed = (1 - self.epsilon) * logits.softmax(-1) + self.epsilon / logits.shape[-1]
            logits = mixed.log()
        noise = torch.empty_like(logits).exponential_()
        best = (logits - noise.log()).argmax(-1, keepdim=True)
        # Not one_hot, which reads values, so that no graph could hold it.
        return (best == torch.arange(logits.shape[-1], device=best.device)).to(logits.dtype)


def _indicators(value: Tensor, table: Tensor) -> Tensor:
    """Which value of a table (value, *leaf) each element (..., *leaf) has: (..., value)."""
    num_leaf = table.dim() - 1
    equal = value.unsqueeze(value.dim() - num_leaf) == table
    return equal.flatten(equal.dim() - num_leaf).all(-1) if num_leaf else equal


# --- the guide -------------------------------------------------------------------------------------------------------


class _Group(nn.Module):
    """Discrete sites that lie in the same local plates: inputs, network, and what else they look at."""

    def __init__(self, members: Sequence[_Variable], inputs: _Inputs, network: _Network, outer: Sequence[int]) -> None:
        super().__init__()
        self.inputs, self.network, self.outer = inputs, network, tuple(outer)
        for index, member in enumerate(members):
            assert member.table is not None
            self.register_buffer(f"table_{index}", member.table.clone())
        self.members = tuple(replace(member, table=None) for member in members)


class DiscretePolicy(PyroModule):
    """An autoregressive guide of discrete and continuous sites; made by `make_policy`.

    It holds no reference to the model, so that it copies, pickles and moves like any module. Parameters are called
    ``guide.policy.*`` and, for continuous sites, ``guide.site_<name>.*``.

    Attributes
    ----------
    local_plates
        Plates whose rows share one network and are drawn independently of each other.
    """

    def __init__(
        self,
        problem: Problem,
        outline: _Outline,
        hidden: int,
        network: str | None,
        data: Sequence[int | str] | None,
        continuous: str,
        init_scale: float,
        log_z: bool,
        flows: bool,
    ) -> None:
        super().__init__("guide")
        self._flows = flows
        latent = (*outline.discrete, *outline.continuous)
        self._plates = {plate.name: plate for variable in latent for plate in variable.plates}
        self.local_plates = tuple(sorted({name for variable in latent for name in variable.local}))
        self._refuse_subsampled(problem)
        like = _like(problem, outline)
        self._continuous = outline.continuous
        self._normals(continuous, init_scale)
        groups = list(dict.fromkeys(variable.local for variable in outline.discrete))
        built: list[_Group] = []
        for local in groups:
            members = [variable for variable in outline.discrete if variable.local == local]
            outer = [index for index, other in enumerate(groups[: len(built)]) if set(other) < set(local)]
            inputs = _Inputs(problem, [self._plates[name] for name in local], outline.observed, data, like)
            width = inputs.width + sum(built[index].network.state_width for index in outer)
            width += sum(v.layout.size for v in self._continuous if set(v.local) <= set(local))
            sizes = [(m.layout.size, m.num_values) for m in members]
            built.append(_Group(members, inputs, _network(network, sizes, width, hidden), outer))
        self.policy = nn.ModuleList(built)
        self._common = _common(latent)
        self._log_z = log_z
        if log_z or (flows and self._continuous):
            common = [self._plates[name] for name in self._common]
            self.log_z_inputs = _Inputs(problem, common, outline.observed, data, like)
            self.log_z = _Head(self.log_z_inputs.width, hidden)
        if flows:
            free = [group for group in built if set(group.members[0].local) == set(self._common)]
            widths: list[int] = [group.network.state_width for group in free for _ in group.members]
            self.flow = nn.ModuleList(_Head(width, hidden) for width in widths)
        self.to(like.dtype).to(like.device)
        for variable in self._continuous:  # whose types are their own
            self.get_submodule(f"site_{variable.name}").to(variable.dtype)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample every latent site; returns the values by name."""
        plates = {p.name: pyro.plate(p.name, p.size, dim=p.dim) for p in self._plates.values()}
        values: dict[str, Tensor] = {}
        unconstrained: dict[str, Tensor] = {}
        policy: Any = self.policy
        like = policy[0].network.bias
        if self._log_z:
            self._state_log_z("log_Z", plates, like, args, kwargs)
        if self._flows and self._continuous:
            self._state_log_z(f"log_flow_{self._continuous[0].name}", plates, like, args, kwargs)
        for variable in self._continuous:
            values[variable.name] = self._draw_continuous(variable, plates, unconstrained)
        states: list[Tensor] = []
        heads = iter(self.flow) if self._flows else None
        for group in policy:
            local = set(group.members[0].local)
            parts = [group.inputs(plates, like, args, kwargs)]
            parts += [unconstrained[v.name].to(like) for v in self._continuous if set(v.local) <= local]
            parts += [states[index] for index in group.outer]
            parts = [part for part in parts if part.shape[-1]] or parts[:1]
            state = group.network.begin(_join(parts))
            for place, variable in enumerate(group.members):
                if heads is not None and local == set(self._common):
                    self._state(f"log_flow_{variable.name}", next(heads)(state).squeeze(-1), plates)
                table = group.get_buffer(f"table_{place}")
                value = self._draw(group.network, state, place, variable, table, plates)
                values[variable.name] = value
                hot = variable.layout.flat(_indicators(value, table).to(like.dtype))
                state = group.network.push(state, place, hot)
            states.append(state)
        return values

    def _draw(
        self,
        network: _Network,
        state: Tensor,
        place: int,
        variable: _Variable,
        table: Tensor,
        plates: Mapping[str, Any],
    ) -> Tensor:
        layout = variable.layout
        batch = list(layout.batch)
        for plate in variable.plates:
            batch[plate.dim] = plates[plate.name].subsample_size
        if layout.size == 1 and variable.kind != "table":
            logits = network.score(state, place, None).squeeze(-2)
            lead = len(batch) + 1 - logits.dim()
            logits = logits.reshape((1,) * lead + logits.shape) if lead > 0 else logits
            if variable.kind == "categorical":
                fn: Any = dist.Categorical(logits=logits)
            else:
                fn = dist.Bernoulli(logits=logits[..., 1] - logits[..., 0])
            if len(fn.batch_shape) <= len(batch):
                fn = fn.expand(batch)
        else:
            event = (*layout.inner, *table.shape[1:])
            fn = Autoregressive(network, state, place, layout, table, batch, event)
        with ExitStack() as stack:
            for plate in variable.plates:
                stack.enter_context(plates[plate.name])
            return pyro.sample(variable.name, fn)

    def _normals(self, family: str, init_scale: float) -> None:
        """Parameters of the continuous sites."""
        seen: list[_Variable] = []
        for variable in self._continuous:
            assert variable.start is not None
            inner = PyroModule()
            inner.loc = nn.Parameter(variable.start.clone())
            inner.scale = PyroParam(torch.full_like(variable.start, init_scale), constraints.positive)
            before = [v for v in seen if set(v.local) <= set(variable.local)] if family == "structured" else []
            inner.before = tuple(v.name for v in before)
            if before:
                width = sum(v.layout.size for v in before)
                inner.slope = nn.Parameter(variable.start.new_zeros(width, variable.layout.size))
            setattr(self, f"site_{variable.name}", inner)
            seen.append(variable)

    def _draw_continuous(
        self, variable: _Variable, plates: Mapping[str, Any], unconstrained: dict[str, Tensor]
    ) -> Tensor:
        """Sample a continuous site; adds its distance (*rows, element) from the middle, in unconstrained space."""
        inner = getattr(self, f"site_{variable.name}")
        layout, count = variable.layout, len(variable.layout.batch)
        loc, scale = inner.loc, inner.scale
        for plate in variable.plates:
            if plates[plate.name].subsample_size < plate.size:
                rows = plates[plate.name].indices.to(loc.device)
                loc, scale = (p.index_select(count + plate.dim, rows) for p in (loc, scale))
        middle = loc
        if inner.before:
            shift = _join([unconstrained[name].to(loc.dtype) for name in inner.before]) @ inner.slope
            rows = _broadcast(shift.shape[:-1], layout.rows(loc.shape[:count]))
            batch = (*rows[: len(rows) - count], *loc.shape[:count])
            middle = loc + layout.full(shift.expand(*rows, -1).unsqueeze(-1), batch).squeeze(-1)
        num_inner = len(layout.inner)
        base = dist.Normal(middle, scale).to_event(num_inner)
        bijection = biject_to(variable.support)
        fn = dist.TransformedDistribution(base, [bijection])
        with ExitStack() as stack:
            for plate in variable.plates:
                stack.enter_context(plates[plate.name])
            value: Tensor = pyro.sample(variable.name, fn)
        away = bijection.inv(value) - loc.detach()
        unconstrained[variable.name] = layout.flat(away.unsqueeze(-1)).squeeze(-1)
        return value

    def _refuse_subsampled(self, problem: Problem) -> None:
        own = _subsample_sizes(problem)
        for name in self._plates:
            if name in own:
                raise ProblemError(
                    f"{problem.name}: plate {name!r} around a latent site takes {own[name]} of its "
                    f"{self._plates[name].size} rows by itself; make it pyro.plate({name!r}, "
                    f"{self._plates[name].size}) and let the engine subsample it: batch_plates=({name!r},)"
                )

    def _state_log_z(self, name: str, plates: Mapping[str, Any], like: Tensor, args: Any, kwargs: Any) -> None:
        value = self.log_z(self.log_z_inputs(plates, like, args, kwargs)).squeeze(-1)
        self._state(name, value, plates)

    def _state(self, name: str, value: Tensor, plates: Mapping[str, Any]) -> None:
        """A deterministic site with a number for each row of the plates that all latent sites share."""
        own = [self._plates[plate] for plate in self._common]
        shape = [1] * max((-plate.dim for plate in own), default=0)
        for plate in own:
            shape[plate.dim] = plates[plate.name].subsample_size
        value = value.expand(shape) if value.dim() <= len(shape) else value
        with ExitStack() as stack:
            for plate in own:
                stack.enter_context(plates[plate.name])
            pyro.deterministic(name, value, event_dim=0)

    def _apply(self, fn: Any, recurse: bool = True) -> DiscretePolicy:
        for variable in self._continuous:
            move(variable.support, fn)
        return super()._apply(fn, recurse)


class _Head(nn.Module):
    """A number for each row: one hidden layer, whose last bias moves a constant."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.width = width
        self.first, self.second = nn.Linear(max(width, 1), hidden), nn.Linear(hidden, 1)

    def forward(self, state: Tensor) -> Tensor:
        """From (*rows, at most width) to (*rows, 1); what a state does not hold yet counts as zero."""
        missing = max(self.width, 1) - state.shape[-1]
        return self.second(self.first(nn.functional.pad(state, (0, missing))).tanh())


def _network(name: str | None, sizes: Sequence[tuple[int, int]], width: int, hidden: int) -> _Network:
    if name is None:
        total, top = sum(size for size, _ in sizes), max(count for _, count in sizes)
        name = "mlp" if total * (width + total * top) * (hidden + top) <= _MLP_LIMIT else "gru"
    found: _Network = NETWORKS[name](sizes, width, hidden)
    return found


def _common(latent: Iterable[_Variable]) -> tuple[str, ...]:
    """Local plates that all latent sites lie in."""
    return tuple(sorted(set.intersection(*(set(variable.local) for variable in latent))))


def _like(problem: Problem, outline: _Outline) -> Tensor:
    """A tensor of the type and on the device of the networks."""
    tensors = [value for value in (*problem.args, *problem.kwargs.values()) if isinstance(value, Tensor)]
    tensors += [value for value, _, _ in outline.observed.values()]
    tensors += [variable.start for variable in outline.continuous if variable.start is not None]
    found = next((value for value in tensors if value.is_floating_point()), None)
    device = tensors[0].device if tensors else None
    return torch.empty(0, dtype=found.dtype if found is not None else torch.get_default_dtype(), device=device)


def _subsample_sizes(problem: Problem) -> dict[str, int]:
    """Plates that the model itself subsamples, and that no engine does."""
    nodes = _run(problem)
    return {
        name: len(node["value"])
        for name, node in nodes.items()
        if isinstance(node.get("fn"), _Subsample) and len(node["value"]) < node["fn"].size
    }
