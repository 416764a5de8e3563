"""Annealed importance sampling of latent sites: weighted draws of the posterior that owe nothing to a guide.

Discrete elements start uniform over their values, continuous ones normal with the moments of the prior in unconstrained
space. The path leads from that start s(z) to the joint density p(x, z) through s(z)^(1 - b) p(x, z)^b, with powers b
that are chosen so that no step changes log weights by much. At every power each discrete element is drawn given all
others (Gibbs), and continuous sites make a Hamiltonian move. Where a model excludes values, an entry of log density
minus infinity counts as a large penalty on the way, so that draws may pass there, and as itself in the weights.

Draws are independent of each other, and the mean of their weights is the evidence on average. Rows of plates that all
sites share are annealed side by side, each with a weight of its own.

References
----------
Neal, R. M. (2001). Annealed importance sampling. Statistics and Computing 11.
https://doi.org/10.1023/A:1008923215028
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import Tensor

from probmodels.inference.flows.density import Density, State

__all__ = ["Annealed", "anneal"]

_CHANGE = 0.1  # sd of the log weights that one step adds
_MOST_STEPS = 400
_LAST_SWEEPS = 3  # moves at the posterior itself
_LEAPS = 8
_ACCEPT = 0.8


@dataclass(frozen=True)
class Annealed:
    """Weighted draws.

    Attributes
    ----------
    values
        By site (draw, *shape).
    log_weight
        (draw, *rows); the log of their mean is the log evidence of a row.
    log_joint
        Log joint density (draw, *rows), minus infinity where the model excludes a draw.
    num_steps
        Steps from the start to the posterior.
    """

    values: dict[str, Tensor]
    log_weight: Tensor
    log_joint: Tensor
    num_steps: int


def anneal(density: Density) -> Annealed:
    """Weighted draws of the posterior, from the global generators of random numbers.

    Parameters
    ----------
    density
        Log joint density.
    """
    with torch.no_grad(), pyro.validation_enabled(False):
        state, mover = density.evaluate(*density.start()), _Mover(density)
        log_weight = torch.zeros_like(state.log_joint, dtype=torch.float64)
        power, steps, sd = 0.0, 0, 0.0
        while power < 1.0:
            ratio = (state.log_joint - mover.log_start(state)).double()
            sd = float(ratio.nan_to_num(0.0).std(0).max()) if len(ratio) > 1 else 0.0
            steps += 1
            step = 1.0 - power if steps == _MOST_STEPS else min(_CHANGE / max(sd, 1e-12), 1.0 - power)
            log_weight += step * ratio
            power = 1.0 if steps == _MOST_STEPS else power + step
            state = mover.move(state, power)
        for _ in range(_LAST_SWEEPS):
            state = mover.move(state, 1.0)
    lost = (state.excluded > 0) | log_weight.isnan()  # penalties end here
    log_weight = log_weight.where(~lost, -torch.inf)
    log_joint = state.log_joint.where(~lost, -torch.inf)
    return Annealed(density.values(state.index, state.z), log_weight, log_joint, steps)


class _Mover:
    """Moves that leave s(z)^(1 - b) p(x, z)^b invariant."""

    def __init__(self, density: Density) -> None:
        self._density = density
        self._step = 0.5  # in units of the sds of the draws

    def log_start(self, state: State) -> Tensor:
        """Log density (draw, *rows) of the start."""
        total = torch.full_like(state.log_joint, self._density.log_uniform)
        for site, z in zip(self._density.continuous, state.z, strict=True):
            away = (z - site.mean) / site.sd
            total = total + site.by_row(-0.5 * away**2 - site.sd.log() - 0.5 * math.log(2 * math.pi))
        return total

    def move(self, state: State, power: float) -> State:
        """Every discrete element in turn, then the continuous sites."""
        for place, site in enumerate(self._density.discrete):
            for where in site.places():
                state = self._draw_element(state, place, where, power)
        return self._leap(state, power) if self._density.continuous else state

    def _draw_element(self, state: State, place: int, where: tuple[Any, ...], power: float) -> State:
        """A discrete element from its distribution given all else."""
        site, count = self._density.discrete[place], len(state.log_joint)
        num_values = len(site.table)
        index = [i.repeat(num_values, *[1] * (i.dim() - 1)) for i in state.index]
        values = torch.arange(num_values, device=state.log_joint.device).repeat_interleave(count)
        index[place][where] = values.reshape(-1, *[1] * (index[place][where].dim() - 1))
        found = self._density.evaluate(index, [z.repeat(num_values, *[1] * (z.dim() - 1)) for z in state.z])
        log_joint = found.log_joint.unflatten(0, (num_values, count))
        log_joint = log_joint.where(~log_joint.isnan(), -torch.inf)
        noise = torch.empty_like(log_joint).exponential_().log()
        best = (power * log_joint - noise).argmax(0)  # (draw, *rows)

        def pick(value: Tensor, chosen: Tensor) -> Tensor:
            return torch.take_along_dim(value.unflatten(0, (num_values, count)), chosen.unsqueeze(0), 0).squeeze(0)

        new = [i.clone() if other == place else i for other, i in enumerate(state.index)]
        new[place][where] = best.reshape(new[place][where].shape)
        pairs = zip(self._density.continuous, found.gradients, strict=True)
        gradients = [pick(gradient, own.spread(best)) for own, gradient in pairs]
        return State(new, state.z, pick(found.log_joint, best), pick(found.excluded, best), gradients)

    def _leap(self, state: State, power: float) -> State:
        """A Hamiltonian move of the continuous sites, accepted or not in every row by itself."""
        sites = self._density.continuous
        scales = [z.std(0).clamp(1e-6, 1e6).nan_to_num(1.0) for z in state.z]
        step = self._step * math.exp(0.2 * float(torch.randn(())))
        momenta = [torch.randn_like(z) for z in state.z]

        def energy(at: State, p: Sequence[Tensor]) -> Tensor:
            kinetic: Any = sum(site.by_row(0.5 * v**2) for site, v in zip(sites, p, strict=True))
            return kinetic - power * at.log_joint - (1 - power) * self.log_start(at)

        def force(at: State) -> list[Tensor]:
            pulls = zip(sites, at.z, at.gradients, scales, strict=True)
            return [
                s * (power * g - (1 - power) * (z - site.mean) / site.sd**2).nan_to_num(0.0, 0.0, 0.0)
                for site, z, g, s in pulls
            ]

        now, p = state, momenta
        for _ in range(_LEAPS):
            p = [v + 0.5 * step * f for v, f in zip(p, force(now), strict=True)]
            z = [x + step * s * v for x, s, v in zip(now.z, scales, p, strict=True)]
            now = self._density.evaluate(now.index, z)
            p = [v + 0.5 * step * f for v, f in zip(p, force(now), strict=True)]
        rise = energy(now, p) - energy(state, momenta)
        chance = (-rise).exp().clamp(max=1.0).nan_to_num(0.0)
        taken = torch.rand_like(chance) < chance
        self._step *= math.exp(0.1 * (float(chance.mean()) - _ACCEPT))

        def choose(new: Sequence[Tensor], old: Sequence[Tensor]) -> list[Tensor]:
            return [torch.where(s.spread(taken), a, b) for s, a, b in zip(sites, new, old, strict=True)]

        return State(
            state.index,
            choose(now.z, state.z),
            now.log_joint.where(taken, state.log_joint),
            now.excluded.where(taken, state.excluded),
            choose(now.gradients, state.gradients),
        )
