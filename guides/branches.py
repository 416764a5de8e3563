"""Policies of programs whose sites come and go.

A policy draws the sites of such a program one by one and runs it to see which come next. Where few values decide, each
of their combinations is run once; then many draws can be made at once, and none needs the program.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from probmodels.errors import ProblemError
from probmodels.guides.policy_networks import indicators, site_distribution
from probmodels.inference.programs.varying import FixedSites, is_discrete, num_values, seen

__all__ = ["Branches", "Follow", "read_branches"]


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


class Follow(Messenger):
    """Give the sites of a program the distributions of a policy, in the order in which the program meets them."""

    def __init__(self, program: FixedSites, group: Any, state: Tensor, values: dict[str, Tensor]) -> None:
        super().__init__()
        self.places = {variable.name: place for place, variable in enumerate(group.members)}
        self.drawn: set[str] = set()
        self._own: dict[str, int] = {}  # values that the program knows
        self._program, self._group, self._state, self._values, self._next = program, group, state, values, 0

    def _pyro_sample(self, msg: Any) -> None:
        name, group = msg["name"], self._group
        if name in self._values:  # continuous sites, drawn before
            msg["value"], msg["done"] = self._values[name], True
        elif name in self.places:
            place = self.places[name]
            if place < self._next:
                raise ProblemError(
                    f"{self._program.label}: the site {name!r} comes after {group.members[self._next - 1].name!r} in "
                    "one run of the model and before it in another; draw sites in one order, whichever there are"
                )
            for gap in range(self._next, place):
                self._push(gap, None)
            variable, table = group.members[place], group.get_buffer(f"table_{place}")
            batch = list(variable.layout.batch)
            self._own[name] = num_values(msg["fn"])
            msg["fn"] = site_distribution(group.network, self._state, place, variable, table, batch)
            self._next = place + 1
        elif is_discrete(msg):
            self._program.check(name)

    def _pyro_post_sample(self, msg: Any) -> None:
        name = msg["name"]
        if name in self.places:
            self.drawn.add(name)
            self._values[name] = msg["value"]
            self._push(self.places[name], msg["value"])
            if name in self._program.growing:
                msg["value"] = seen(msg["value"], self._own[name])

    def _push(self, place: int, value: Tensor | None) -> None:
        """Go on with a value, or past a site that is not there."""
        network, layout = self._group.network, self._group.members[place].layout
        table = self._group.get_buffer(f"table_{place}")
        if value is None:
            hot = self._state.new_zeros(*layout.rows(layout.batch), layout.size, len(table))
        else:
            hot = layout.flat(indicators(value, table).to(self._state.dtype))
        self._state = network.push(self._state, place, hot)
