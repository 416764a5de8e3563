"""Which sites of a program depend on which, and whether the rows of a plate are independent of each other.

Two ways that complement each other. Tensors that carry their origin show what the density of a site is computed from,
whatever the values are; a value that leaves torch, by ``.numpy()``, ``.tolist()``, ``int()`` or a condition, is taken
to reach all that comes after. And mixed second differences of the log joint show whether two groups of rows act on it
apart from each other, however the program computes it: they are zero for all values where rows are independent given
the rest, but a dependence that few values show may stay unseen.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.inspect import TrackProvenance
from pyro.ops.provenance import ProvenanceTensor, get_provenance
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.overrides import TorchFunctionMode

from probmodels.errors import ProblemError
from probmodels.inference.problem import Problem
from probmodels.inference.programs.minibatch import plate_sizes, subsampled, whole
from probmodels.inference.programs.reading import LEAVING
from probmodels.inference.programs.traces import sample_sites
from probmodels.inference.runtime.ops import FixGenerated, is_generated, isolated
from probmodels.inference.runtime.tensors import device_of

__all__ = ["Coupling", "check_rows", "coupling", "upstream"]

_log = logging.getLogger(__name__)

_LEAVE = LEAVING | {
    getattr(torch.Tensor, name)
    for name in ("data_ptr", "item", "is_nonzero", "__bool__", "__int__", "__float__", "__index__", "__complex__")
}
_ROUNDS = 12  # a pair of rows is missed by all of them with probability 2^-12
_FIT_ROUNDS = 4  # before a fit, whose start should take no longer than its first steps
_ROWS = 16  # rows of a batch plate that are looked at, next to each other
_ROUNDING = 256  # second differences that rounding may make, in units of the precision of the terms
_Values = dict[str, Tensor]


# --- origins ----------------------------------------------------------------------------------------------------------


class _Leaving(TorchFunctionMode):
    """Notes the origins of values that leave torch."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: frozenset[str] = frozenset()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _LEAVE and args and isinstance(args[0], ProvenanceTensor):
            self.seen |= get_provenance(args[0])
        return func(*args, **(kwargs or {}))


class _Moments(Messenger):
    """Notes what has left torch when each site begins."""

    def __init__(self, leaving: _Leaving) -> None:
        super().__init__()
        self.leaving = leaving
        self.at: dict[str, frozenset[str]] = {}

    def _pyro_sample(self, msg: Any) -> None:
        self.at[msg["name"]] = self.leaving.seen


def upstream(problem: Problem, latent: Collection[str]) -> dict[str, set[str]] | None:
    """Latent sites that the density of each site depends on, itself among them.

    Parameters
    ----------
    problem
        Its model is run once.
    latent
        Names of the sites that are looked for.

    Returns
    -------
    dict or None
        Names by site; None where origins cannot be followed.
    """
    leaving = _Leaving()
    moments = _Moments(leaving)
    try:
        with TrackProvenance(), moments, leaving:
            nodes: Any = poutine.trace(problem.model).get_trace(*problem.args, **problem.kwargs).nodes
        return {
            name: (set(get_provenance(node["fn"].log_prob(node["value"]))) | moments.at[name]) & set(latent)
            for name, node in nodes.items()
            if node["type"] == "sample" and not isinstance(node["fn"], _Subsample) and not _has_no_density(node)
        }
    except Exception:  # tensors that carry their origin do not go through every operation
        return None


def _has_no_density(node: Any) -> bool:
    """Whether a site has no density in a fit: it is deterministic or generated."""
    return bool(node["infer"].get("_deterministic")) or is_generated(node)


# --- second differences -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Coupling:
    """Rows of a plate that are not independent given all that lies outside of it.

    Attributes
    ----------
    plate
        Name of the plate.
    site
        Site whose log density shows it, or "" where the model did not run at the values that were tried.
    size
        Mixed second difference, in nats; infinite where a combination of possible rows is impossible.
    """

    plate: str
    site: str
    size: float

    def __str__(self) -> str:
        if not self.site:
            return f"plate {self.plate!r}: the model does not run at other values of single rows"
        return (
            f"plate {self.plate!r}: its rows depend on each other through site {self.site!r}, by a mixed second "
            f"difference of the log density of {self.size:.3g}"
        )


def coupling(problem: Problem, plate: str, rounds: int = _ROUNDS) -> Coupling | None:
    """Whether the rows of a plate depend on each other, given all that lies outside of it.

    All latent values within the plate are changed in one random half of its rows, in the other half, and in both.
    Rows are independent where the two changes of the log density add up; that is compared for every number of every
    site, at values drawn from the prior and at random ones from finite supports.

    Parameters
    ----------
    problem
        Its model is run ``6 * rounds`` times.
    plate
        Name of a vectorised plate of the model.
    rounds
        Splits into two halves.

    Returns
    -------
    Coupling or None
        The first dependence that was found.
    """
    few = subsampled(_few(problem, plate_sizes(problem)))
    for rows in (few, whole(problem)()):  # a model may need all rows
        with isolated(seed=0), torch.no_grad(), pyro.validation_enabled(False), rows:
            seeds = torch.randint(2**31, (2 * rounds,)).tolist()
            try:
                draws = [_prior(problem, plate, seed, uniform=place % 2 == 1) for place, seed in enumerate(seeds)]
                return _differences(problem, plate, draws, rounds)
            except Exception as error:  # of any model, at values of its own sites
                _log.debug("%s: plate %r: %s", problem.name, plate, error)
    return Coupling(plate, "", float("nan"))


def check_rows(problem: Problem) -> None:
    """Check that plates whose rows a fit takes apart have independent rows.

    These are ``batch_plates``, and plates that all sites of the model stand in, whose rows losses count as data.

    Parameters
    ----------
    problem
        What is about to be fitted.

    Raises
    ------
    ProblemError
        If the rows of such a plate depend on each other, by whatever computation.
    """
    with isolated(seed=0), torch.no_grad(), pyro.validation_enabled(False), whole(problem)():
        sites = sample_sites(poutine.trace(problem.model).get_trace(*problem.args, **problem.kwargs))
    stacks = [{frame.name for frame in site["cond_indep_stack"] if frame.vectorized} for site in sites]
    if not stacks:
        return
    for plate in sorted(set.intersection(*stacks) | (set(problem.batch_plates) & set.union(*stacks))):
        found = coupling(problem, plate, _FIT_ROUNDS)
        if found is not None and found.site:
            raise ProblemError(
                f"{problem.name}: {found}; a plate says that its rows are independent given what lies outside: draw "
                "what couples them outside of the plate, or take '.to_event(1)' instead of the plate"
            )


def _few(problem: Problem, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """Rows of batch plates to look at: neighbours, since neighbours depend on each other if any rows do."""
    device = device_of(problem.args, problem.kwargs, problem.model)
    return {
        name: torch.arange(sizes[name], device=device)[sizes[name] // 2 :][:_ROWS]
        for name in problem.batch_plates
        if name in sizes
    }


def _prior(problem: Problem, plate: str, seed: int, uniform: bool) -> tuple[_Values, dict[str, tuple[int, int]]]:
    """Values of latent sites, of discrete ones uniform over the support where asked for; axis and rows of the plate."""
    pyro.set_rng_seed(seed)
    nodes: Any = poutine.trace(problem.model).get_trace(*problem.args, **problem.kwargs).nodes
    values: _Values = {}
    places: dict[str, tuple[int, int]] = {}
    for name, node in _latent(nodes):
        value = node["value"]
        if uniform and getattr(node["fn"].support, "is_discrete", False):
            value = _uniform(node["fn"], value)
        values[name] = value
        frames = [frame for frame in node["cond_indep_stack"] if frame.vectorized and frame.name == plate]
        if frames and value.dim() - node["fn"].event_dim + frames[0].dim >= 0:
            places[name] = value.dim() - node["fn"].event_dim + frames[0].dim, frames[0].size
    return values, places


def _latent(nodes: Any) -> Iterator[tuple[str, Any]]:
    for name, node in nodes.items():
        is_sample = node["type"] == "sample" and not node["is_observed"] and not isinstance(node["fn"], _Subsample)
        if is_sample and not _has_no_density(node):
            yield name, node


def _uniform(fn: Any, value: Tensor) -> Tensor:
    """Random values of a finite support, elements apart; what was drawn where there is no list of them."""
    try:
        support = fn.enumerate_support(expand=False)
    except (NotImplementedError, ValueError):
        return value
    inner = fn.event_shape
    support = support.reshape(len(support), *inner)
    lead = value.shape[: value.dim() - len(inner)]
    return support[torch.randint(len(support), lead, device=value.device)].to(value)


def _differences(problem: Problem, plate: str, draws: list[Any], rounds: int) -> Coupling | None:
    places = draws[0][1]
    size = max((size for _, size in places.values()), default=0)
    if size < 2:
        return None
    for turn in range(rounds):
        base, other = draws[2 * turn][0], draws[2 * turn + 1][0]
        half = torch.randperm(size) < (size + 1) // 2
        low, high = _mixed(base, other, places, half), _mixed(base, other, places, ~half)
        both = _mixed(base, other, places, torch.ones_like(half))
        found = _largest(*(_scores(problem, values) for values in (base, low, high, both)))
        if found is not None:
            return Coupling(plate, *found)
    return None


def _scores(problem: Problem, values: _Values) -> _Values:
    """Log densities of all sites at values of the latent ones, with the same noise every time."""
    pyro.set_rng_seed(0)
    with FixGenerated(), poutine.condition(data=values):
        trace: Any = poutine.trace(problem.model).get_trace(*problem.args, **problem.kwargs)
    trace.compute_log_prob()
    return {site["name"]: site["log_prob"] for site in sample_sites(trace)}


def _mixed(base: _Values, other: _Values, places: Mapping[str, tuple[int, int]], rows: Tensor) -> _Values:
    """The values of ``base`` with some rows of the plate from ``other``."""
    mixed = dict(base)
    for name, (axis, _) in places.items():
        shape = [1] * base[name].dim()
        shape[axis] = -1
        mixed[name] = torch.where(rows.to(base[name].device).reshape(shape), other[name], base[name])
    return mixed


def _largest(base: _Values, low: _Values, high: _Values, both: _Values) -> tuple[str, float] | None:
    """Site with a second difference that rounding cannot make, and how large it is."""
    for name, a in base.items():
        b, c, d = low[name], high[name], both[name]
        possible, swapped = a.isfinite() & d.isfinite(), b.isfinite() & c.isfinite()
        if bool((possible != swapped).any()):
            return name, float("inf")
        terms = torch.stack([a, d, -b, -c])[:, possible].double()
        gap = terms.sum(0).abs()
        if bool((gap > _ROUNDING * torch.finfo(a.dtype).eps * (1 + terms.abs().sum(0))).any()):
            return name, float(gap.max())
    return None
