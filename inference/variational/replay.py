"""Values of latent sites that are worth remembering from step to step."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from probmodels.inference.flows.balance import Balance
from probmodels.inference.flows.exploration import drawn, with_values
from probmodels.inference.problem import Problem
from probmodels.inference.programs.minibatch import whole
from probmodels.inference.programs.traces import Frames, by_datum, plate_scale, sample_sites, scored, shared_plates
from probmodels.inference.variational.losses import chosen_rows, refuse_auxiliary, row_index

__all__ = ["Memory"]


class Memory:
    """Objective of a guide at the best latent values met so far: cross entropy, weighed by p(data, z), or a balance.

    Every step draws from the guide, keeps for each datum the ``capacity`` different values of largest p(data, z) among
    those drawn and those remembered, and fits the guide to them: by the cross entropy from them, or by a balance
    objective at them and the new draw, which holds whatever values it is evaluated at. See `wake` for what a datum is.

    Parameters
    ----------
    problem
        Holds the data.
    capacity
        Values kept for each datum.
    plates
        Plates of which a step sees some rows.
    balance
        Objective that is evaluated at the values; None for the cross entropy.

    References
    ----------
    L. B. Hewitt, T. A. Le, J. B. Tenenbaum, Learning to learn generative programs with Memoised Wake-Sleep, UAI 2020,
    https://arxiv.org/abs/2007.03132
    """

    def __init__(
        self, problem: Problem, capacity: int = 8, plates: Collection[str] = (), balance: Balance | None = None
    ) -> None:
        self._problem, self.capacity, self._plates, self._balance = problem, capacity, set(plates), balance
        self._values: dict[str, Tensor] = {}  # (capacity, rows ...) by site
        self._valid: Tensor | None = None  # (capacity, data ...)

    def prepare(self, programs: Any, obstacle: str | None, say: Any) -> str | None:
        """What the balance does before the first step, in words."""
        why = obstacle or "it is evaluated at remembered values (replay)"
        return None if self._balance is None else self._balance.prepare(programs, why, say)

    def state_dict(self) -> dict[str, Tensor]:
        """Remembered values by site, and which of them are any."""
        known = {} if self._valid is None else {"valid": self._valid}
        return known | {f"value/{name}": value for name, value in self._values.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Remember what `state_dict` returned."""
        self._valid = state.get("valid")
        self._values = {k.removeprefix("value/"): v for k, v in state.items() if k.startswith("value/")}

    def __call__(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        with torch.no_grad():
            draw = drawn(guide, args, kwargs)
            if self._balance is None:
                refuse_auxiliary(self._problem, draw, self._problem.sites)
            trace = scored(model, draw, args, kwargs)
            shared = shared_plates(trace, draw)
            if self._valid is None:
                self._make(model, guide, args, kwargs)
            kept, weight = self._update(model, draw, by_datum(trace, shared), shared, args, kwargs)
        loss: Any = 0.0
        past = [_with(draw, kept, slot) for slot in range(self.capacity)]
        if self._balance is not None:
            return self._balance.at(model, guide, [*past, draw], *args, **kwargs)
        for slot, values in enumerate(past):
            log_q = by_datum(scored(guide, values, args, kwargs), shared)
            loss = loss - plate_scale(shared) * (weight[slot] * log_q).where(weight[slot] > 0, 0.0).sum()
        return loss

    def _make(self, model: Any, guide: Any, args: Any, kwargs: Any) -> None:
        """Room for the values of all data."""
        with whole(self._problem)():
            draw = drawn(guide, args, kwargs)
            trace = scored(model, draw, args, kwargs)
        size = by_datum(trace, shared_plates(trace, draw))
        self._valid = size.new_zeros((self.capacity, *size.shape), dtype=torch.bool)
        self._values = {
            site["name"]: site["value"].expand(self.capacity, *site["value"].shape).clone()
            for site in sample_sites(draw)
        }

    def _update(
        self, model: Any, draw: Any, score: Tensor, shared: Frames, args: Any, kwargs: Any
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Best values (capacity, ...) by site of the rows at hand, remembered as well, and their weights."""
        assert self._valid is not None
        chosen = chosen_rows(draw, self._plates)
        sites = {site["name"]: site for site in sample_sites(draw)}
        here: dict[str, Any] = {}
        for name, site in sites.items():
            shape = self._values[name].shape[1:]
            here[name] = (slice(None), *row_index(shape, site["fn"].event_dim, site["cond_indep_stack"], chosen))
        there = (slice(None), *row_index(self._valid.shape[1:], 0, tuple(shared.values()), chosen))
        valid = self._valid[there]
        kept = {name: self._values[name][here[name]] for name in sites}
        scores, repeated = [], torch.zeros_like(score, dtype=torch.bool)
        for slot in range(self.capacity):
            past = _with(draw, kept, slot)
            log_p = by_datum(scored(model, past, args, kwargs), shared)
            scores.append(log_p.where(valid[slot], -torch.inf))
            repeated = repeated | (valid[slot] & _same(draw, past, shared))
        scores.append(score.where(~repeated, -torch.inf))
        best, order = torch.stack(scores).topk(self.capacity, 0)
        order = order.where(best > -torch.inf, order[:1])  # until there are as many, the best stands in
        for name, site in sites.items():
            candidates = torch.cat([kept[name], site["value"].unsqueeze(0)])
            index = order.reshape(*order.shape, *[1] * site["fn"].event_dim)
            kept[name] = torch.take_along_dim(candidates, index.expand(-1, *candidates.shape[1:]), 0)
            self._values[name][here[name]] = kept[name]
        self._valid[there] = best > -torch.inf
        return kept, best.softmax(0)


def _with(draw: Any, values: Mapping[str, Tensor], slot: int) -> Any:
    return with_values(draw, {name: value[slot] for name, value in values.items()})


def _same(left: Any, right: Any, shared: Frames) -> Tensor:
    """Whether two traces hold the same values in each row of the plates."""
    dims = {frame.dim for frame in shared.values()}
    same: Any = torch.tensor(True)
    for site in sample_sites(left):
        equal = site["value"] == right.nodes[site["name"]]["value"]
        equal = equal.flatten(equal.dim() - site["fn"].event_dim).all(-1) if site["fn"].event_dim else equal
        for axis in range(equal.dim()):
            if axis - equal.dim() not in dims:
                equal = equal.all(axis, keepdim=True)
        same = same & equal
    return same
