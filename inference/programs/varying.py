"""Programs whose discrete sites come and go, as programs whose sites stay.

A program may draw how many values it draws: ``for t in range(length)``. Engines and results know a fixed set of sites.
So a site that a run leaves out is drawn from a pseudo-prior, uniform over its values, on which nothing depends: the
joint density grows by a normalised factor, and the posterior of what is there stays as it is, as in Carlin and Chib
(1995). A categorical site that has fewer values in one run than in another, as ``Categorical(torch.ones(k) / k)`` does,
has all of them, those that the run lacks with probability zero.

References
----------
Carlin, B. P. and Chib, S. (1995). Bayesian model choice via Markov chain Monte Carlo methods. J. R. Stat. Soc. B 57(3).
https://doi.org/10.1111/j.2517-6161.1995.tb02042.x
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.indep_messenger import IndepMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import nn

from probmodels.errors import ProblemError
from probmodels.inference.problem import Problem
from probmodels.inference.programs.minibatch import whole
from probmodels.inference.programs.traces import leaf_of, sample_sites
from probmodels.inference.runtime.ops import is_generated, isolated

__all__ = ["FixedSites", "is_discrete", "num_values", "seen", "with_fixed_sites"]

_FEW = 20  # prior draws after which sites that were in all of them are taken to be in every run


def with_fixed_sites(problem: Problem, num_traces: int = 200) -> Problem:
    """The problem with a model of the same posterior whose discrete latent sites are there in every run.

    For each site that comes and goes a deterministic site ``<name>_present`` says whether a draw has it; where it is 0
    the value of the site is noise. A problem whose sites stay is returned as it is.

    Parameters
    ----------
    problem
        Its model is run, in isolation and from a fixed seed.
    num_traces
        Prior draws in which every site has to occur at least once, and the longest run of the program too.

    Raises
    ------
    ProblemError
        If a site that comes and goes is observed, continuous or without finite support, stands in a plate that is not
        always there, or has another shape or support from run to run.
    """
    found, gone, growing, longest = _listed(problem, num_traces)
    if not gone and not growing:
        return problem
    order = longest + [name for name in found if name not in longest]
    missing = {name: _pseudo(problem, name, found[name]) for name in order if name in gone}
    latent = tuple(name for name in order if not found[name]["is_observed"])
    return replace(problem, model=FixedSites(problem.model, missing, latent, problem.name, growing))


def _listed(problem: Problem, num_traces: int) -> tuple[dict[str, Any], list[str], dict[str, int], list[str]]:
    """Nodes of sites by prior draws; those that come and go; most values where these vary; sites of the longest run."""
    found: dict[str, Any] = {}
    counts: dict[str, int] = {}
    growing: dict[str, int] = {}
    longest: list[str] = []
    total = 0
    with isolated(seed=0), torch.no_grad(), pyro.validation_enabled(False), whole(problem)():
        while total < _FEW or (total < num_traces and (growing or min(counts.values(), default=total) < total)):
            trace: Any = poutine.trace(problem.model).get_trace(*problem.args, **problem.kwargs)
            sites = {node["name"]: node for node in sample_sites(trace) if not is_generated(node)}
            for name, node in sites.items():
                counts[name] = counts.get(name, 0) + 1
                known = found.setdefault(name, node)
                _compare(problem, name, known, node)
                sizes = [num_values(one["fn"]) for one in (known, node)]
                if sizes[0] != sizes[1]:
                    _refuse_mask(problem, name, node["fn"])
                    growing[name] = max(sizes)
                    found[name] = known if sizes[0] == growing[name] else node
            longest = max(longest, list(sites), key=len)
            total += 1
    gone = [name for name, count in counts.items() if count < total]
    return found, gone, growing, longest


@dataclass(frozen=True)
class _Missing:
    """What stands in for a site that is not there: equally likely values, in the plates of the site."""

    prior: Any
    plates: tuple[tuple[str, int, int], ...]  # name, size, dim


class FixedSites(nn.Module):
    """A model that draws from pseudo-priors what a run of another leaves out; made by `with_fixed_sites`.

    Parameters
    ----------
    model
        Program whose sites come and go.
    missing
        What may be left out, by site.
    order
        Latent sites as the longest run met them.
    label
        Name of the problem, for errors.
    growing
        Most values of the categorical sites that have more in some runs than in others.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        missing: Mapping[str, _Missing],
        order: tuple[str, ...],
        label: str,
        growing: Mapping[str, int],
    ):
        super().__init__()
        self.model, self.missing, self.order, self.label = model, dict(missing), order, label
        self.growing = dict(growing)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model and draw what it left out.

        Raises
        ------
        ProblemError
            If a run has a discrete site that none of the runs before had.
        """
        with _Names() as met, _Padded(self.growing, self.label):
            value = self.model(*args, **kwargs)
        for name in met.names:
            self.check(name)
        self.fill(met.names)
        for name in self.missing:
            pyro.deterministic(f"{name}_present", torch.tensor(float(name in met.names)))
        return value

    def check(self, name: str) -> None:
        """Refuse a site that is not on the list.

        Raises
        ------
        ProblemError
            If it is not.
        """
        if name not in self.order:
            raise ProblemError(
                f"{self.label}: the discrete site {name!r} was in none of the prior draws by which the sites were "
                "listed; bound the length of the program, or list them from more draws by "
                "with_fixed_sites(problem, num_traces=...)"
            )

    def fill(self, met: Collection[str]) -> None:
        """Draw the sites that are missing where some were met."""
        for name, site in self.missing.items():
            if name not in met:
                with ExitStack() as stack:
                    for plate, size, dim in site.plates:  # no pyro.plate, whose name the model may have used
                        stack.enter_context(IndepMessenger(plate, size, dim))
                    pyro.sample(name, site.prior)


class _Padded(Messenger):
    """Give categorical sites values that a run lacks, of probability zero; a program that is given one sees another."""

    def __init__(self, growing: Mapping[str, int], label: str) -> None:
        super().__init__()
        self._growing, self._label = growing, label
        self._own: dict[str, int] = {}

    def _pyro_sample(self, msg: Any) -> None:
        name, fn = msg["name"], msg["fn"]
        if name not in self._growing:
            return
        most, own, leaf = self._growing[name], num_values(fn), leaf_of(fn)
        if own > most:
            raise ProblemError(
                f"{self._label}: the site {name!r} has {own} values, more than the {most} in the prior draws by which "
                "sites were listed; list them from more draws by with_fixed_sites(problem, num_traces=...)"
            )
        self._own[name] = own
        logits = torch.nn.functional.pad(leaf.logits, (0, most - own), value=-torch.inf)
        padded = dist.Categorical(logits=logits, validate_args=False)
        msg["fn"] = padded.expand(fn.batch_shape + fn.event_shape).to_event(fn.event_dim)

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] in self._own:
            msg["value"] = seen(msg["value"], self._own[msg["name"]])


def seen(value: Any, count: int) -> Any:
    """What a program sees that has fewer values: the last one in the place of those that it lacks."""
    return value.clamp(max=count - 1)


class _Names(Messenger):
    """Names of the discrete latent sites of a run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and is_discrete(msg):
            self.names.add(msg["name"])


def is_discrete(node: Any) -> bool:
    """Whether a site is discrete, neither deterministic nor generated nor a subsample."""
    return (
        not isinstance(node["fn"], _Subsample)
        and not node["infer"].get("_deterministic")
        and not is_generated(node)
        and bool(getattr(node["fn"].support, "is_discrete", False))
    )


def _compare(problem: Problem, name: str, one: Any, two: Any) -> None:
    shapes = tuple(one["value"].shape), tuple(two["value"].shape)
    if shapes[0] != shapes[1]:
        raise ProblemError(
            f"{problem.name}: site {name!r} has shape {shapes[0]} in one run of the model and {shapes[1]} in another; "
            "draw its elements as sites of their own, or give it the largest shape and mask what does not count"
        )


def num_values(fn: Any) -> int:
    """Values of a categorical site; 0 of other kinds, which do not change their number."""
    leaf = leaf_of(fn)
    return int(leaf.logits.shape[-1]) if isinstance(leaf, dist.Categorical) else 0


def _refuse_mask(problem: Problem, name: str, fn: Any) -> None:
    while isinstance(fn, dist.Independent | dist.ExpandedDistribution):
        fn = fn.base_dist
    if isinstance(fn, dist.MaskedDistribution):
        raise ProblemError(
            f"{problem.name}: the masked site {name!r} has more values in some runs of the model than in others; give "
            "it all of them in every run, and mask it by poutine.mask"
        )


def _pseudo(problem: Problem, name: str, node: Any) -> _Missing:
    """The pseudo-prior of a site that comes and goes."""
    what = "observed" if node["is_observed"] else "" if is_discrete(node) else "continuous"
    if what:
        raise ProblemError(
            f"{problem.name}: the {what} site {name!r} is not there in every run of the model; only discrete latent "
            "sites may come and go: let it occur always, and mask it where it does not count (poutine.mask)"
        )
    leaf, fn = leaf_of(node["fn"]), node["fn"]
    if not isinstance(leaf, dist.Bernoulli | dist.Categorical | dist.OneHotCategorical):
        raise ProblemError(
            f"{problem.name}: the discrete site {name!r} of distribution {type(leaf).__name__} is not there in every "
            "run of the model; such a site may be a Bernoulli, a Categorical or a OneHotCategorical"
        )
    parameter = torch.zeros_like(leaf.probs if isinstance(leaf, dist.Bernoulli) else leaf.logits)
    prior = type(leaf)(logits=parameter, validate_args=False)  # checks read values, which no graph could hold
    frames = [frame for frame in node["cond_indep_stack"] if frame.vectorized]
    prior = prior.expand(node["value"].shape[: node["value"].dim() - leaf.event_dim])
    plates = tuple((frame.name, frame.full_size or frame.size, frame.dim) for frame in frames)
    return _Missing(prior.to_event(fn.event_dim - leaf.event_dim), plates)
