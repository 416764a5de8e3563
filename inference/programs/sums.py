"""Sums over discrete sites of an enumerated trace, with masks and scales."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, cast

import torch
from pyro.ops import packed
from pyro.ops.contract import contract_to_tensor
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from probmodels.errors import ProblemError

__all__ = ["Group", "frames", "group_sites", "joint"]

Group = tuple[list[str], bool]  # names of sites that are summed over together, and whether their scale is outside


def joint(trace: Any, groups: Sequence[Group]) -> Tensor:
    """Log density of a trace, discrete sites enumerated: masks apply inside of the sum, scales outside.

    Without groups, nothing is enumerated.
    """
    if not groups:
        return cast("Tensor", trace.log_prob_sum())
    trace.compute_log_prob()
    trace.pack_tensors()
    total: Any = 0.0
    for names, outside in groups:
        terms: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
        for node in (trace.nodes[name] for name in names):
            parts = node["packed"]
            term = parts["log_prob"]
            if outside:
                term = packed.scale_and_mask(parts["unscaled_log_prob"], mask=parts["mask"])
            symbols = frozenset(trace.plate_to_symbol[f.name] for f in frames(node) if f.vectorized)
            terms.setdefault(symbols, []).append(term)
        value = contract_to_tensor(terms, _enumerated(trace))
        total = total + (value * trace.nodes[names[0]]["scale"] if outside else value)
    return cast("Tensor", total)


def group_sites(label: str, trace: Any, discrete: Sequence[str]) -> list[Group]:
    """Which sites of an enumerated trace are summed over together, and whether a scale that they share applies outside.

    Raises
    ------
    ProblemError
        If sites that share a discrete one have different scales; ``label`` names the problem.
    """
    trace.compute_log_prob()
    trace.pack_tensors()
    symbols = _enumerated(trace)
    plain: list[str] = []
    scaled: dict[float, list[str]] = {}
    scales: dict[str, float] = {}
    for name, node in trace.nodes.items():
        if node["type"] != "sample" or isinstance(node["fn"], _Subsample):
            continue
        own = symbols.intersection(node["packed"]["log_prob"]._pyro_dims)
        scale = torch.as_tensor(node["scale"], dtype=torch.float64)
        if own and (scale.numel() > 1 or any(scales.setdefault(symbol, float(scale)) != scale for symbol in own)):
            raise ProblemError(
                f"{label}: site {name!r} has another poutine.scale than what shares its discrete sites "
                f"{discrete}; scale all of them by the same number"
            )
        (scaled.setdefault(float(scale), []) if own and scale != 1 else plain).append(name)
    groups = [(plain, False), *((names, True) for names in scaled.values())]
    return [group for group in groups if group[0]]


def frames(node: Any) -> tuple[Any, ...]:
    """Plates and loops around a site."""
    return cast("tuple[Any, ...]", node["cond_indep_stack"]) if node["type"] == "sample" else ()


def _enumerated(trace: Any) -> set[str]:
    """Symbols of the dims of a packed trace that enumerate discrete sites."""
    return set(trace.symbol_to_dim) - set(trace.plate_to_symbol.values())
