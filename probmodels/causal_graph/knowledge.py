"""What is known of a causal graph before data are seen: edges that there are or are not, tiers, an order.

References
----------
Meek, C. (1995). Causal inference and causal explanation with background knowledge. UAI.
https://arxiv.org/abs/1302.4972
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from probmodels.errors import DataError
from probmodels.guides.acyclicity import find_cycle, spell_cycle
from probmodels.options import checked, hint

__all__ = ["Edges", "Knowledge", "Names"]

Names = Sequence[str]
Edges = Sequence[tuple[str, str]]


class Knowledge:
    """Edges that a graph over named concepts must have, may have and must not have.

    Parameters
    ----------
    names
        Names of the concepts, each once.
    required, forbidden
        Edges as pairs (cause, effect) of names.
    tiers
        Groups of names, early ones first: no edge leads from a later group to an earlier one. A concept of no group is
        free.
    order
        Names, causes first: no edge leads from a later one to an earlier one. It need not hold all of them.

    Attributes
    ----------
    required
        Whether an edge must be there, booleans (cause, effect).
    allowed
        Whether an edge may be there, booleans (cause, effect): not from a concept to itself, not where it would close
        a cycle with required ones.

    Raises
    ------
    DataError
        If a name is unknown or there twice, required edges close a cycle, or two statements contradict each other.
    """

    @checked(DataError)
    def __init__(
        self,
        names: Names,
        required: Edges = (),
        forbidden: Edges = (),
        tiers: Sequence[Names] | None = None,
        order: Names | None = None,
    ) -> None:
        self.names = _listed("names", names)
        self.required = self._edges("required", required)
        banned = self._edges("forbidden", forbidden)
        by_tiers = self._late("tiers", tiers or ())
        by_order = self._late("order", [[name] for name in order or ()])
        cycle = find_cycle(self.required)
        if cycle:
            raise DataError(
                f"required edges close a cycle, {spell_cycle(cycle, self.names)}; take one of them out of required"
            )
        self._refuse(self.required & banned, "required holds {} -> {}, but forbidden holds it as well")
        self._refuse(self.required & by_tiers, "required holds {} -> {}, but tiers put the effect before its cause")
        self._refuse(self.required & by_order, "required holds {} -> {}, but order puts the effect before its cause")
        self._refuse(by_order & by_tiers.T, "order puts {1} before {0}, but tiers put it after")
        paths = torch.eye(len(self.names), dtype=torch.bool)
        for _ in self.names:
            paths = paths | (paths.double() @ self.required.double() > 0)
        self.allowed = ~(banned | by_tiers | by_order | paths.T)  # the diagonal is a path of no edge

    def _edges(self, what: str, pairs: Edges) -> Tensor:
        found = torch.zeros(len(self.names), len(self.names), dtype=torch.bool)
        for pair in pairs:
            cause, effect = (self._place(what, name) for name in pair)
            if cause == effect:
                raise DataError(f"{what} holds an edge from {pair[0]!r} to itself; take it out")
            found[cause, effect] = True
        return found

    def _late(self, what: str, groups: Sequence[Names]) -> Tensor:
        """Whether the group of a concept comes after that of another (late, early)."""
        _listed(what, [name for group in groups for name in group])  # refuses names that are there twice
        found = torch.zeros(len(self.names), len(self.names), dtype=torch.bool)
        early: list[int] = []
        for group in groups:
            late = [self._place(what, name) for name in group]
            for place in late:
                found[place, early] = True
            early = early + late
        return found

    def _refuse(self, bad: Tensor, why: str) -> None:
        for one, other in bad.nonzero().tolist():
            raise DataError(f"{why.format(self.names[one], self.names[other])}; take one of the two back")

    def _place(self, what: str, name: str) -> int:
        if name not in self.names:
            raise DataError(f"{what} names {name!r}, which is no concept{hint(name, self.names)}")
        return self.names.index(name)


def _listed(what: str, names: Names) -> list[str]:
    """Names as a list, each there once."""
    for name in names:
        if list(names).count(name) > 1:
            raise DataError(f"{what} holds {name!r} twice; name it once")
    return list(names)
