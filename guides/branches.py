"""Which sites of a program that come and go are there, as a function of the values that decide it.

A policy draws the sites of such a program one by one and runs it to see which come next. Where few values decide, each
of their combinations is run once; then many draws can be made at once, and none needs the program.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from probmodels.errors import ProblemError

__all__ = ["Branches", "read_branches"]


@dataclass(frozen=True)
class Branches:
    """Which sites are there.

    Attributes
    ----------
    tables
        Values (value,) of the sites that decide.
    deciding
        By site that comes and goes, which of them do.
    present
        By site, the places in the tables of the values with which it is there.
    """

    tables: Mapping[str, Tensor]
    deciding: Mapping[str, tuple[str, ...]]
    present: Mapping[str, Sequence[tuple[int, ...]]]

    def has(self, name: str, values: Mapping[str, Tensor]) -> Tensor | None:
        """1 where a site is there and 0 elsewhere, for values of the sites before it; None where it always is."""
        if name not in self.deciding:
            return None
        found: Any = 0.0
        for places in self.present[name]:
            pairs = zip(self.deciding[name], places, strict=True)
            equal = [values[site] == self.tables[site][place] for site, place in pairs]
            found = found + torch.stack(torch.broadcast_tensors(*equal)).all(0).to(torch.get_default_dtype())
        return found


def read_branches(
    order: Sequence[str],
    tables: Mapping[str, Tensor],
    deciding: Sequence[str],
    runs: Mapping[tuple[int, ...], Mapping[str, Any]],
) -> Branches:
    """Which sites are there, from a run of the program for each combination of the values that decide.

    Parameters
    ----------
    order
        Sites in the order in which they are drawn.
    tables
        Values (value,) of each.
    deciding
        Sites whose values decide.
    runs
        Nodes of a run by the places of their values.

    Raises
    ------
    ProblemError
        If a site is drawn before one that decides whether it is there.
    """
    before: dict[str, tuple[str, ...]] = {}
    present: dict[str, list[tuple[int, ...]]] = {}
    for place, name in enumerate(order):
        there = {key: bool(nodes.get(f"{name}_present", {"value": True})["value"]) for key, nodes in runs.items()}
        if all(there.values()):
            continue
        known = [i for i, site in enumerate(deciding) if site in order[:place]]
        short = {tuple(key[i] for i in known): flag for key, flag in there.items()}
        if any(short[tuple(key[i] for i in known)] != flag for key, flag in there.items()):
            raise ProblemError(f"site {name!r} is drawn before one that decides whether it is there")
        before[name] = tuple(deciding[i] for i in known)
        present[name] = [key for key, flag in short.items() if flag]
    return Branches({name: tables[name] for name in deciding}, before, present)
