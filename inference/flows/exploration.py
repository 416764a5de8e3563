"""Draws of a guide other than its own: flatter ones that explore, and ones that keep a part of an earlier draw.

A guide draws its sites one after the other. Each is a step; one whose distribution draws element by element, and has
a method ``completed`` to draw the last of them anew, is as many as ``num_steps`` of the distribution says. Sites of
`Delta` distributions follow from the others and are none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from probmodels.errors import ProblemError
from probmodels.inference.programs.traces import Frames, sample_sites, scored
from probmodels.options import Positive, Probability, checked

__all__ = ["Explore", "Recall", "by_event", "count_steps", "cut", "drawn", "retraced", "with_values"]


class Explore(Messenger):
    """Draw sites without gradients, and discrete ones of finite support from a flatter distribution.

    With p the distribution of the site, draws follow (1 - epsilon) p^(1/temperature) / c + epsilon / m, where c
    normalises and m counts the values of positive probability. Traces keep p itself, so that log densities are those
    of the program.
    A distribution that draws element by element has a method ``explored`` that flattens each of them.
    Continuous sites, unbounded supports, and values that are given by other handlers are left as they are.

    Parameters
    ----------
    temperature
        Positive; above 1 for flatter draws.
    epsilon
        Share of uniform draws, in [0, 1].
    """

    @checked(ProblemError)
    def __init__(self, temperature: Positive = 1.0, epsilon: Probability = 0.0) -> None:
        super().__init__()
        self.temperature, self.epsilon = temperature, epsilon

    def _pyro_sample(self, msg: Any) -> None:
        if msg["done"] or msg["is_observed"] or isinstance(msg["fn"], _Subsample):
            return
        with torch.no_grad():
            value = self._draw(msg)
        # A new tensor, since a transform that remembers this one would answer with constants for its inverse.
        msg["value"], msg["done"] = value.detach(), True

    def _draw(self, msg: Any) -> Tensor:
        fn = _base(msg["fn"])
        flatter = (self.temperature, self.epsilon) != (1.0, 0.0)
        if flatter and hasattr(fn, "explored"):  # draws element by element
            value: Tensor = fn.explored(self.temperature, self.epsilon).sample()
            return value
        if flatter and fn.has_enumerate_support:
            return self._flatter(fn)
        value = msg["fn"](*msg["args"], **msg["kwargs"])
        return value

    def _flatter(self, fn: Any) -> Tensor:
        values = fn.enumerate_support()  # (values, batch, event)
        logs = fn.log_prob(values)
        possible = (logs > -math.inf).to(logs.dtype)
        tempered = (logs / self.temperature).softmax(0)
        weights = (1 - self.epsilon) * tempered + self.epsilon * possible / possible.sum(0)
        index = dist.Categorical(probs=weights.movedim(0, -1), validate_args=False).sample()
        index = index.reshape(1, *index.shape, *[1] * len(fn.event_shape)).expand(1, *values.shape[1:])
        return torch.take_along_dim(values, index, 0).squeeze(0)


class Recall(Explore):
    """Go some steps back in an earlier draw, and forward again: the first steps are kept, the others drawn anew.

    Later steps are drawn given those that are kept, since the program sees them as it goes. A distribution of several
    steps has ``num_steps`` and methods ``explored``, as for `Explore`, and ``completed(value, kept)``: a draw whose
    first ``kept`` steps, a tensor over its batch, are those of ``value``, none where that is negative.

    Parameters
    ----------
    past
        Trace of the earlier draw.
    kept
        Steps that are kept, one number for all data or one for each, as `cut` has it.
    temperature, epsilon
        How the others are drawn; see `Explore`.
    """

    def __init__(self, past: Any, kept: Tensor, temperature: float = 1.0, epsilon: float = 0.0) -> None:
        super().__init__(temperature, epsilon)
        self._past, self._kept, self._made = past, kept, 0

    def __enter__(self) -> Any:
        self._made = 0
        return super().__enter__()

    def _draw(self, msg: Any) -> Tensor:
        fn = _base(msg["fn"])
        steps = _steps(fn)
        if not steps:
            return super()._draw(msg)
        value, left = self._past.nodes[msg["name"]]["value"], self._kept - self._made
        self._made += steps
        if steps > 1:
            fresh: Tensor = fn.explored(self.temperature, self.epsilon).completed(value, left)
        else:
            fresh = super()._draw(msg)
        return torch.where(by_event(left >= steps, value, msg["fn"]), value, fresh)


def count_steps(trace: Any) -> int:
    """Steps of a draw."""
    return sum(_steps(_base(site["fn"])) for site in sample_sites(trace))


def cut(trace: Any, shared: Frames) -> Tensor:
    """How many steps of a draw to keep, uniformly from none to all but one, for each datum of the plates."""
    sizes = {frame.dim: frame.size for frame in shared.values()}
    shape = [sizes.get(dim, 1) for dim in range(min(sizes, default=0), 0)]
    device = next((site["value"].device for site in sample_sites(trace)), None)
    return torch.randint(count_steps(trace), shape, device=device)


def retraced(guide: Any, draw: Any, args: Any, kwargs: Any) -> Any:
    """Trace of a draw whose path to its values is drawn anew from the backward policy of the guide, if it has one.

    Such a guide, which reaches the same values on several paths, has a method ``retrace(values, *args, **kwargs)``:
    from values by site, those of the latent sites of the model at least, to those of the auxiliary sites on a path
    that ends there, drawn from the policy whose density the guide subtracts from its own. Dreams need it, too. Draws
    of other guides are returned as they are.
    """
    if not hasattr(guide, "retrace"):
        return draw
    with torch.no_grad():
        path = guide.retrace({site["name"]: site["value"] for site in sample_sites(draw)}, *args, **kwargs)
    return scored(guide, with_values(draw, path), args, kwargs)


def drawn(guide: Any, args: Any, kwargs: Any) -> Any:
    """Trace of a guide that no gradient enters, with its log densities."""
    with torch.no_grad():
        trace = poutine.trace(guide).get_trace(*args, **kwargs)
        trace.compute_log_prob()
    for node in sample_sites(trace):  # or a transform that remembers its result would answer with constants
        node["value"] = node["value"].detach()
    return trace


def with_values(trace: Any, values: Mapping[str, Tensor]) -> Any:
    """Copy of a trace that holds other values, or more, to replay programs at; its densities are the old ones."""
    changed = trace.copy()
    for name, value in values.items():
        node = changed.nodes.get(name, {"type": "sample", "name": name, "is_observed": False, "infer": {}})
        changed.nodes[name] = {**node, "value": value}
    return changed


def by_event(chosen: Tensor, value: Tensor, fn: Any) -> Tensor:
    """Entries by datum, laid out so that they meet those of a value of a distribution, which are in its data."""
    num_batch = value.dim() - fn.event_dim
    shape = chosen.shape[max(chosen.dim() - num_batch, 0) :]
    return chosen.reshape((*shape, *[1] * fn.event_dim))


def _base(fn: Any) -> Any:
    while isinstance(fn, dist.Independent | dist.MaskedDistribution):
        fn = fn.base_dist
    return fn


def _steps(fn: Any) -> int:
    """Steps of a distribution without its wrappers."""
    if isinstance(fn, dist.Delta):
        return 0
    return int(fn.num_steps) if hasattr(fn, "completed") else 1
