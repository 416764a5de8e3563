"""Traces of model and guide: sites with a density, and log densities by datum.

Rows of plates that all sites stand in are independent of each other: they are what is called data here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

__all__ = ["Frames", "by_datum", "leaf_of", "plate_scale", "sample_sites", "scored", "shared_plates", "sum_by_datum"]

Frames = Mapping[str, Any]  # plates by name


def leaf_of(fn: Any) -> Any:
    """Distribution of the elements of a site, without masks, expansions and independent axes."""
    while isinstance(fn, dist.Independent | dist.MaskedDistribution | dist.ExpandedDistribution):
        fn = fn.base_dist
    return fn


def sample_sites(trace: Any) -> list[dict[str, Any]]:
    """Sample sites of a trace that have a density."""
    samples = [node for node in trace.nodes.values() if node["type"] == "sample"]
    return [s for s in samples if not isinstance(s["fn"], _Subsample) and not s["infer"].get("_deterministic")]


def scored(program: Any, values: Any, args: Any, kwargs: Any) -> Any:
    """Trace of a program at the values of another trace, with its log densities."""
    trace = poutine.trace(poutine.replay(program, trace=values)).get_trace(*args, **kwargs)
    trace.compute_log_prob()
    return trace


def shared_plates(*traces: Any) -> Frames:
    """Plates that all sites of the traces stand in: what lies in different rows of them is independent."""
    stacks = [
        {frame.name: frame for frame in site["cond_indep_stack"] if frame.vectorized}
        for trace in traces
        for site in sample_sites(trace)
    ]
    return {name: frame for name, frame in stacks[0].items() if all(name in stack for stack in stacks)}


def plate_scale(shared: Frames) -> float:
    """What a sum over the rows of the plates stands for."""
    return math.prod(frame.full_size / frame.size for frame in shared.values())


def by_datum(trace: Any, shared: Frames) -> Tensor:
    """Log density of a trace in each row of the plates, for that row alone."""
    return sum_by_datum([site["log_prob"] for site in sample_sites(trace)], shared)


def sum_by_datum(log_probs: Iterable[Tensor], shared: Frames) -> Tensor:
    """Sum of log densities, scaled as traces have them, in each row of the plates, for that row alone."""
    dims = {frame.dim for frame in shared.values()}
    total: Any = torch.zeros(())
    for value in log_probs:
        others = [axis for axis in range(value.dim()) if axis - value.dim() not in dims]
        total = total + (value.sum(others, keepdim=True) if others else value)
    return total / plate_scale(shared)
