"""Discrete latent sites given the continuous ones, by enumeration: assignments, marginal probabilities, sums."""

from __future__ import annotations

import contextlib
import copy
import traceback
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import infer_discrete
from pyro.ops import packed
from pyro.ops.contract import contract_to_tensor
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from probmodels.errors import ProblemError
from probmodels.inference.problem import Problem
from probmodels.inference.programs.minibatch import whole
from probmodels.inference.programs.reading import where
from probmodels.inference.runtime.ops import is_enumerable, is_generated, isolated

__all__ = ["Enumeration"]

_CHECKS = 4  # draws of the prior, and as many values whose elements are all the same


class Enumeration:
    """The discrete latent sites of a problem, enumerated in parallel by Pyro.

    Parameters
    ----------
    problem
        The problem that was inferred.

    Attributes
    ----------
    names
        Discrete latent sites whose support can be enumerated, in program order. Others are values like any other.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._program = poutine.block(problem.model, hide_fn=is_generated)  # leaves tell nothing about the sites
        with isolated(seed=0), torch.no_grad():
            nodes: Any = poutine.trace(self._program).get_trace(*problem.args, **problem.kwargs).nodes
        found = [name for name, site in problem.sites.items() if site.discrete]
        self.names = [name for name in found if is_enumerable(nodes[name]["fn"])]
        frames = [frame for node in nodes.values() if node["type"] == "sample" for frame in _plates(node)]
        self._first_dim = -1 - max((-frame.dim for frame in frames), default=0)

    def assign(self, values: Mapping[str, Tensor], names: Sequence[str], temperature: int) -> dict[str, Tensor]:
        """Values of discrete sites, from their joint distribution given all else (1) or its mode (0).

        Parameters
        ----------
        values
            The other latent sites.
        names
            Sites to assign.
        temperature
            1 or 0.
        """
        program = self._configured(values, names)
        with self._refusing():
            sampler = infer_discrete(program, first_available_dim=self._first_dim, temperature=temperature)
            nodes: Any = poutine.trace(sampler).get_trace(*self.problem.args, **self.problem.kwargs).nodes
        sites = self.problem.sites
        return {name: nodes[name]["value"].expand(sites[name].shape) for name in names}

    def marginals(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Probability of every value of every discrete site, given the other sites: batch shape, then support.

        It is the derivative of the log normaliser with respect to the site's log probabilities.
        """
        with torch.enable_grad():
            trace = self._trace(values)
            terms: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
            leaves: dict[str, Any] = {}  # packed tensors carry attributes of Pyro's
            for name, node in _factors(trace.nodes).items():
                term = node["packed"]["log_prob"]
                dims = term._pyro_dims
                if name in self.names:
                    term = leaves[name] = term.detach().requires_grad_()
                    term._pyro_dims = dims
                symbols = frozenset(trace.plate_to_symbol[f.name] for f in _plates(node))
                terms.setdefault(symbols, []).append(term)
            total = contract_to_tensor(terms, self._enumerated(trace))
            found = torch.autograd.grad(total, list(leaves.values()))
        out = {}
        for (name, leaf), value in zip(leaves.items(), found, strict=True):
            node, shape = trace.nodes[name], self.problem.sites[name].shape
            own = _symbol(node)
            plates = [trace.plate_to_symbol[f.name] for f in sorted(_plates(node), key=lambda frame: frame.dim)]
            kept = [symbol for symbol in [*plates, own] if symbol in leaf._pyro_dims]
            gone = [axis for axis, symbol in enumerate(leaf._pyro_dims) if symbol not in kept]
            value = value.sum(gone) if gone else value
            left = [symbol for symbol in leaf._pyro_dims if symbol in kept]
            value = value.permute([left.index(symbol) for symbol in kept])
            out[name] = value.reshape(*shape[: len(shape) - node["fn"].event_dim], -1)
        return out

    def log_prob(self, values: Mapping[str, Tensor], observed: Sequence[str]) -> dict[str, Tensor]:
        """Log density of every element of observed sites given the other sites, discrete ones enumerated.

        Raises
        ------
        ProblemError
            If elements share discrete sites, so that the sum has no factor for each of them.
        """
        trace = self._trace(values)
        return {name: self._summed(trace, name) for name in observed}

    def check(self) -> None:
        """Check that enumerated values act on the model as single values do, at a few values of all sites.

        Where the model takes them out of torch, by ``.numpy()``, ``int()`` or a condition, it sees all values of the
        support at once, and sums over what is no density.

        Raises
        ------
        ProblemError
            If a site has another density at single values than at these among the enumerated.
        """
        if not self.names:
            return
        args, kwargs = self.problem.args, self.problem.kwargs
        for turn in range(2 * _CHECKS):
            with isolated(seed=turn), torch.no_grad(), pyro.validation_enabled(False), whole(self.problem)():
                nodes: Any = poutine.trace(self._program).get_trace(*args, **kwargs).nodes
                values = {n: node["value"] for n, node in _factors(nodes).items() if not node["is_observed"]}
                if turn >= _CHECKS:  # all elements alike: what any() and all() tell apart
                    values |= {name: _constant(nodes[name], turn - _CHECKS) for name in self.names}
                pyro.set_rng_seed(turn)
                single: Any = poutine.trace(poutine.condition(self._program, values)).get_trace(*args, **kwargs)
                single.compute_log_prob()
                pyro.set_rng_seed(turn)
                found = self._at(self._trace(values), values)
            for name, node in _factors(single.nodes).items():
                if not _agree(found[name], node["log_prob"]):
                    raise ProblemError(
                        f"{self.problem.name}: site {name!r} has another density at single values of {self.names} "
                        "than where Pyro enumerates them: the model reads these values out of torch, by .numpy(), "
                        ".tolist(), int() or a condition, and sees all of the support at once; use torch's own "
                        "operations, as torch.where and indexing by tensors"
                    )

    def _at(self, trace: Any, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Log density of every site in an enumerated trace where discrete sites have the given values."""
        places: dict[str, tuple[Tensor, int]] = {}  # by symbol: sites of a Markov chain use dims in turns
        for name in self.names:
            node = trace.nodes[name]
            support = node["fn"].enumerate_support(expand=False)
            num_event = node["fn"].event_dim
            value = values[name]
            lead = (1,) * (value.dim() - num_event)
            listed = support.reshape(len(support), *lead, *node["fn"].event_shape)
            same = listed == value
            same = same.flatten(same.dim() - num_event).all(-1) if num_event else same
            places[_symbol(node)] = same.long().argmax(0), len(support)
        out: dict[str, Tensor] = {}
        for name, node in _factors(trace.nodes).items():
            found = node["log_prob"]
            for dim, symbol in node["infer"].get("_dim_to_symbol", {}).items():
                index, count = places.get(symbol, (None, 0))
                if index is not None and -dim <= found.dim() and found.shape[dim] == count > 1:
                    index = index.reshape((1,) * (found.dim() - index.dim()) + index.shape)
                    found = torch.take_along_dim(found, index, dim)
            out[name] = found
        return out

    def joint(self, values: Mapping[str, Tensor]) -> Tensor:
        """Log density of the other sites and the data (scalar), discrete sites enumerated."""
        trace = self._trace(values)
        terms: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
        for node in _factors(trace.nodes).values():
            symbols = frozenset(trace.plate_to_symbol[f.name] for f in _plates(node))
            terms.setdefault(symbols, []).append(node["packed"]["log_prob"])
        return contract_to_tensor(terms, self._enumerated(trace))

    def _trace(self, values: Mapping[str, Tensor]) -> Any:
        program = poutine.enum(self._configured(values, self.names), first_available_dim=self._first_dim)
        with self._refusing():
            trace: Any = poutine.trace(program).get_trace(*self.problem.args, **self.problem.kwargs)
            trace.compute_log_prob()
            trace.pack_tensors()
        return trace

    def _configured(self, values: Mapping[str, Tensor], names: Sequence[str]) -> Any:
        """The model at given values, its discrete sites marked for enumeration at their full shape in plates."""
        wanted = set(names)
        given = {name: value for name, value in values.items() if name not in wanted}

        def configure(site: Any) -> Any:
            return {"enumerate": "parallel", "expand": True, "num_samples": None} if site["name"] in wanted else {}

        program = _InPlates(wanted, -1 - self._first_dim)(poutine.condition(self._program, given))
        return poutine.infer_config(program, configure)

    def _summed(self, trace: Any, name: str) -> Tensor:
        factors = _factors(trace.nodes)
        terms = {other: node["packed"]["log_prob"] for other, node in factors.items()}
        node, enumerated = trace.nodes[name], self._enumerated(trace)
        linked = enumerated.intersection(terms[name]._pyro_dims)
        if not linked:
            return node["log_prob"]
        group = [name]
        while len(group) < len(grown := [n for n in terms if linked.intersection(terms[n]._pyro_dims)]):
            group = grown
            linked = enumerated.intersection(symbol for n in group for symbol in terms[n]._pyro_dims)
        self._check_factors(name, {n: factors[n] for n in group})
        value = _log_sum([terms[n] for n in group], linked)
        rest = [n for n in group if n != name]
        if any(n not in self.names for n in rest):  # what else the discrete sites explain is given too: condition on it
            value = _log_sum([value, _negated(_log_sum([terms[n] for n in rest], linked))], set())
        shape = node["value"].shape
        return packed.unpack(value, trace.symbol_to_dim).expand(shape[: len(shape) - node["fn"].event_dim])

    def _check_factors(self, name: str, group: Mapping[str, Any]) -> None:
        """Refuse a sum over discrete sites that ties elements of a site to each other or to other data."""
        plates = {frame.name for frame in _plates(group[name])}
        for other, node in group.items():
            own, site = {frame.name for frame in _plates(node)}, self.problem.sites.get(other)
            if own != plates or (other != name and site is not None and site.kind == "observed"):
                shared = [n for n in self.names if n in group]
                raise ProblemError(
                    f"{self.problem.name}: the log likelihood of {name!r} has no factor for each of its elements: "
                    f"{name!r} in plates {sorted(plates)} and {other!r} in plates {sorted(own)} are tied by the "
                    f"discrete sites {shared}, which are enumerated; put all that one discrete value explains into "
                    "one site with event axes, or compare models on held-out data"
                )

    def _enumerated(self, trace: Any) -> set[str]:
        return set(trace.symbol_to_dim) - set(trace.plate_to_symbol.values())

    @contextlib.contextmanager
    def _refusing(self) -> Iterator[None]:
        try:
            yield
        except (ValueError, RuntimeError, IndexError) as error:
            first = str(error).partition("\n")[0]
            line = "" if isinstance(error, ValueError) else where(traceback.extract_tb(error.__traceback__))
            raise ProblemError(
                f"{self.problem.name}: the discrete sites {self.names} cannot be enumerated: {first}{line}; write the "
                "model so that it broadcasts over dims left of its plates, as for Pyro's parallel enumeration"
            ) from error


class _InPlates(Messenger):
    """Give enumerated values of sites the full shape of the last dims, which are those of plates, and no other.

    Without it, sites that no data tell apart would be one and the same random variable. With the full shape also along
    the dims of other enumerated sites, a chain that is unrolled over time would need a dim for every step.
    """

    def __init__(self, names: set[str], num_dims: int) -> None:
        super().__init__()
        self._names, self._num_dims = names, num_dims

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] not in self._names:
            return
        fn = msg["fn"] = copy.copy(msg["fn"])
        values = fn.enumerate_support(expand=False)
        batch, event = fn.batch_shape, fn.event_shape
        left = max(0, len(batch) - self._num_dims)
        full = values.expand(len(values), *(1 for _ in batch[:left]), *batch[left:], *event)
        fn.enumerate_support = lambda expand=True: full if expand else values


def _symbol(node: Any) -> str:
    """Symbol of the dim that enumerates a site."""
    symbol: str = node["infer"]["_dim_to_symbol"][node["infer"]["_enumerate_dim"]]
    return symbol


def _constant(node: Any, place: int) -> Tensor:
    """A value of a discrete site whose elements are all the same one of its support."""
    support = node["fn"].enumerate_support(expand=False)
    value: Tensor = support[place % len(support)].expand(node["value"].shape)
    return value


def _agree(one: Tensor, two: Tensor) -> bool:
    """Whether two log densities are the same but for rounding and expansion."""
    tolerance = 1e3 * torch.finfo(two.dtype).eps
    one, two = torch.broadcast_tensors(one, two)
    return torch.allclose(one, two, rtol=tolerance, atol=tolerance)


def _plates(node: Any) -> list[Any]:
    return [frame for frame in node["cond_indep_stack"] if frame.vectorized]


def _factors(nodes: Any) -> dict[str, Any]:
    """Sites of a trace that enter its density: no deterministic and no subsampling ones."""
    sampled = {name: node for name, node in nodes.items() if node["type"] == "sample"}
    return {
        name: node
        for name, node in sampled.items()
        if not isinstance(node["fn"], _Subsample) and not node["infer"].get("_deterministic")
    }


def _log_sum(terms: Sequence[Any], dims: set[str]) -> Any:
    """Log of the sum of products of packed factors over some of their dims."""
    joined = packed.broadcast_all(*terms)
    names = joined[0]._pyro_dims
    axes = [axis for axis, symbol in enumerate(names) if symbol in dims]
    value: Any = torch.stack(joined).sum(0)
    value = value.logsumexp(axes) if axes else value
    value._pyro_dims = "".join(symbol for symbol in names if symbol not in dims)
    return value


def _negated(term: Any) -> Any:
    value: Any = -term
    value._pyro_dims = term._pyro_dims
    return value
