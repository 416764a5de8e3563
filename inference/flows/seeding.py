"""The log-variance loss at draws of a policy and at annealed draws of the posterior, so that no mode is lost.

A policy that is fitted on its own draws alone has no gradient where it never draws: a mode that is lost early stays
lost. Annealed draws owe nothing to the policy and come to every mode that single moves reach. The log-variance loss
holds at draws from anywhere, so that both kinds meet in it: annealed draws show where the posterior has mass, and draws
of the policy where it has none.

References
----------
Richter, L., Boustati, A., Nüsken, N., Ruiz, F. J. R. and Akyildiz, Ö. D. (2020). VarGrad: a low-variance gradient
estimator for variational inference. NeurIPS 33. https://arxiv.org/abs/2010.10436
Neal, R. M. (2001). Annealed importance sampling. Statistics and Computing 11.
https://doi.org/10.1023/A:1008923215028
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Unpack

import pyro
import torch
from annotated_types import Ge, Interval
from pyro import poutine
from torch import Tensor

from probmodels.errors import ProblemError
from probmodels.inference.flows.annealing import Annealed, anneal
from probmodels.inference.flows.balance import BalanceOptions, VarGrad
from probmodels.inference.flows.density import Density, affordable
from probmodels.inference.flows.exploration import Explore
from probmodels.inference.programs.minibatch import whole
from probmodels.inference.programs.programs import Programs
from probmodels.inference.programs.traces import Frames, by_datum, sample_sites, shared_plates
from probmodels.inference.runtime.ops import is_generated
from probmodels.options import checked

__all__ = ["AnnealedVarGrad"]

_log = logging.getLogger(__name__)
_PLATE = "_draws"
_CHECKED = 5  # draws at which many at once must have the density of one by one
_DIFFERENT = 0.25  # share of annealed draws that stay effective where they are drawn from again
_DEPTH = 8.0  # nats below the density of a uniform policy, under which excluded and hopeless values are alike


class AnnealedVarGrad(VarGrad):
    """`VarGrad` at draws of the guide and at as many annealed draws of the posterior.

    Annealed draws are made once, before the first step, from the seed of the fit. They are made where that takes some
    two seconds of CPU time, latent sites have finitely many values, the posterior stays the same during the fit, every
    step sees all rows, and the guide can be run for many draws at once, as automatic policies can. Elsewhere this is
    `VarGrad`; the attribute ``annealing`` of the result says which, and why.

    Parameters
    ----------
    num_particles
        Draws of the guide in each step where none are annealed, at least 2. Where some are, there are as many of these
        and of the guide if this is larger than ``batch``.
    batch
        Draws of the guide, and annealed draws, in each step where there are some.
    **options
        ``temperature``, ``epsilon``, ``reward_power``, ``floor`` and ``joint``; see `BalanceOptions`.
    """

    @checked(ProblemError)
    def __init__(
        self,
        num_particles: Annotated[int, Ge(2)] = 4,
        *,
        batch: Annotated[int, Interval(ge=2, le=10_000)] = 128,
        **options: Unpack[BalanceOptions],
    ) -> None:
        super().__init__(num_particles, **options)
        self.batch = batch
        self._seeds: _Seeds | None = None

    def prepare(self, programs: Programs, obstacle: str | None, say: Callable[[str], None]) -> str:
        """Make annealed draws, from the global generators of random numbers; says what was made, or why not.

        Parameters
        ----------
        programs
            Model and guide.
        obstacle
            Why the posterior that counts is not that of the model as it stands; None where it is.
        say
            Is told what is being done.
        """
        if self.joint is not None:
            obstacle = "model and guide are fitted at the same draws (joint)"
        found = obstacle or _make_seeds(programs, max(self.batch, self.num_particles), say)
        self._seeds = None if isinstance(found, str) else found
        if isinstance(found, str):
            _log.info("%s: no annealed draws for the fit: %s", programs.problem.name, found)
            return f"none: {found}"
        return found.note

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Loss () over all data, whose gradient moves the guide."""
        if self._seeds is None:
            return super().differentiable_loss(model, guide, *args, **kwargs)
        values, log_p = self._seeds.draws(Explore(self.temperature, self.epsilon), args, kwargs)
        log_p = log_p if self.floor is None else log_p.clamp(min=self.floor)
        power = self.reward_power(self.step) if callable(self.reward_power) else self.reward_power
        return (log_p * power - self._seeds.many.log_density(values, args, kwargs)).var(0).sum() / 2

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """Loss over all data, after a check of all that the objective needs."""
        if self._seeds is None:
            return super().loss(model, guide, *args, **kwargs)
        return float(self.differentiable_loss(model, guide, *args, **kwargs).detach())


@dataclass
class _Many:
    """A guide that runs for many draws at once, in a plate around all others.

    Attributes
    ----------
    program
        The guide, or what stands for it where it cannot be run for many draws.
    frames
        Plates that all sites share.
    depth
        Batch axes of the sites.
    event_dims
        Event axes by site.
    """

    program: Callable[..., Any]
    frames: Frames
    depth: int
    event_dims: Mapping[str, int]

    def trace(self, count: int, args: Any, kwargs: Any, values: Mapping[str, Tensor] | None = None) -> Any:
        """Trace of the guide at new draws, or at values (draw, *shape) by site."""
        program = self.program
        if values is not None:
            program = poutine.condition(program, {name: self._lift(name, value) for name, value in values.items()})
        with pyro.plate(_PLATE, count, dim=-1 - self.depth):
            return poutine.trace(program).get_trace(*args, **kwargs)

    def log_density(self, values: Mapping[str, Tensor], args: Any, kwargs: Any) -> Tensor:
        """Log density (draw, *rows) at values (draw, *shape) by site."""
        count = len(next(iter(values.values())))
        trace = self.trace(count, args, kwargs, values)
        trace.compute_log_prob()
        (frame,) = (frame for frame in sample_sites(trace)[0]["cond_indep_stack"] if frame.name == _PLATE)
        return by_datum(trace, {**self.frames, _PLATE: frame}).reshape(count, *_sizes(self.frames))

    def _lift(self, name: str, value: Tensor) -> Tensor:
        missing = self.depth - (value.dim() - 1 - self.event_dims[name])
        return value.reshape(value.shape[0], *[1] * missing, *value.shape[1:])


@dataclass
class _Seeds:
    """Annealed draws, all of one weight, and what evaluates them and draws of a guide.

    Attributes
    ----------
    many
        The guide.
    tables
        Values (value, *leaf) by discrete site.
    log_joint
        Log density of the model (draw, *rows) from indices by site.
    values, log_p
        Annealed draws, (draw, *shape) by site, and their log density under the model (draw, *rows).
    lowest
        Log density (*rows) that anything counts as at least.
    batch
        Draws of each kind.
    note
        What was made.
    """

    many: _Many
    tables: Mapping[str, Tensor]
    log_joint: Callable[[Sequence[Tensor]], Tensor]
    values: Mapping[str, Tensor]
    log_p: Tensor
    lowest: Tensor
    batch: int
    note: str

    def draws(self, explore: Explore, args: Any, kwargs: Any) -> tuple[dict[str, Tensor], Tensor]:
        """Draws of the guide and annealed ones, by site, and their log densities (draw, *rows) under the model."""
        with torch.no_grad():
            with explore:
                trace = self.many.trace(self.batch, args, kwargs)
            own = {
                name: trace.nodes[name]["value"].reshape(self.batch, *known.shape[1:])
                for name, known in self.values.items()
            }
            index = [_index(own[name], table) for name, table in self.tables.items()]
            chosen = torch.randint(len(self.log_p), (self.batch,), device=self.log_p.device)
            values = {n: torch.cat([own[n].to(known), known[chosen]]) for n, known in self.values.items()}
            log_p = self.log_joint(index).nan_to_num(-torch.inf)
            return values, torch.cat([torch.maximum(log_p, self.lowest), self.log_p[chosen]])


def _make_seeds(programs: Programs, batch: int, say: Callable[[str], None]) -> _Seeds | str:
    """Annealed draws, or why there are none."""
    problem, model, guide = programs.problem, programs.model, programs.guide
    if any(not site.finite for site in problem.sites.values() if site.kind == "latent"):
        return "latent sites are continuous, or have infinitely many values"
    args, kwargs = problem.args, problem.kwargs
    with torch.no_grad(), whole(problem)():
        draw: Any = poutine.trace(guide).get_trace(*args, **kwargs)
        hidden = poutine.block(model, hide_fn=is_generated)
        trace: Any = poutine.trace(poutine.replay(hidden, trace=draw)).get_trace(*args, **kwargs)
    names = [site["name"] for site in sample_sites(draw)]
    if set(names) != set(problem.names("latent")):
        return "the guide does not draw the latent sites of the model and no others"
    frames = shared_plates(trace, draw)
    say("capturing the model for annealing")
    density = affordable(problem, model, frames)
    if isinstance(density, str):
        return density
    many = _many(guide, density, draw, frames, args, kwargs)
    if many is None:
        return "the guide cannot be run for many draws at once"
    say(f"annealing {density.num_draws} draws")
    found = anneal(density)
    if not found.log_weight.isfinite().any(0).all():
        return "no annealed draw has a finite density under the model"
    return _resampled(density, many, found, frames, batch)


def _many(guide: Any, density: Density, draw: Any, frames: Frames, args: Any, kwargs: Any) -> _Many | None:
    """The guide for many draws at once, if it then has the density of one by one."""
    sites = {site["name"]: site for site in sample_sites(draw)}
    depth = max(site["value"].dim() - site["fn"].event_dim for site in sites.values())
    frame_dims = [-frame.dim for site in sites.values() for frame in site["cond_indep_stack"]]
    event_dims = {name: site["fn"].event_dim for name, site in sites.items()}
    try:
        program = guide.for_many(*density.branches()) if hasattr(guide, "for_many") else guide
        many = _Many(program, frames, max([depth, *frame_dims]), event_dims)
        with torch.no_grad(), pyro.validation_enabled(False):
            found = many.trace(_CHECKED, args, kwargs)
            values = {n: found.nodes[n]["value"].reshape(_CHECKED, *s["value"].shape) for n, s in sites.items()}
            together = many.log_density(values, args, kwargs)
            for place in range(_CHECKED):
                program = poutine.condition(guide, {name: value[place] for name, value in values.items()})
                trace: Any = poutine.trace(program).get_trace(*args, **kwargs)
                trace.compute_log_prob()
                one = by_datum(trace, frames).reshape(together.shape[1:])
                if not torch.allclose(one, together[place], rtol=1e-3, atol=1e-3):
                    return None
    except Exception as error:  # of a guide that is not made for it, which may be any
        _log.info("the guide does not run for many draws at once: %s", error)
        return None
    return many


def _resampled(density: Density, many: _Many, found: Annealed, frames: Frames, batch: int) -> _Seeds:
    """Annealed draws of equal weights, drawn in every row by itself.

    The loss holds at draws from anywhere. So where few draws have nearly all of the weight, weights are flattened, lest
    these few be all that steps see.
    """
    count, rows = len(found.log_weight), _sizes(frames)
    effective = _effective(found.log_weight)
    log_weight = found.log_weight
    while _effective(log_weight) < _DIFFERENT * count and log_weight.isfinite().sum(0).min() > _DIFFERENT * count:
        log_weight = 0.7 * log_weight
    weight = (log_weight - log_weight.logsumexp(0)).exp().reshape(count, -1)
    index = torch.multinomial(weight.T, count, replacement=True).T.reshape(count, *rows)
    values = {}
    for site in density.discrete:
        value = found.values[site.name]
        where = site.spread(index).reshape(*site.spread(index).shape, *[1] * (value.dim() - 1 - len(site.shape)))
        values[site.name] = torch.take_along_dim(value, where.expand(value.shape), 0)
    log_evidence = found.log_weight.logsumexp(0) - math.log(count)
    log_p = torch.take_along_dim(found.log_joint, index, 0)
    lowest = (log_evidence + density.log_uniform - _DEPTH).to(log_p)
    return _Seeds(
        many,
        {site.name: site.table for site in density.discrete},
        density.vectorised(batch),
        values,
        torch.maximum(log_p, lowest),
        lowest,
        batch,
        f"{count} draws in {found.num_steps} steps, {effective:.0f} of them effective"
        + (" in the worst row" if rows else ""),
    )


def _effective(log_weight: Tensor) -> float:
    """Effective draws of log weights (draw, *rows), in the worst row."""
    weight = (log_weight - log_weight.logsumexp(0)).exp()
    return float((1 / weight.square().sum(0)).min())


def _index(value: Tensor, table: Tensor) -> Tensor:
    """Places (draw, *shape) in a table (value, *leaf) of values (draw, *shape, *leaf)."""
    num_leaf = table.dim() - 1
    equal = value.unsqueeze(value.dim() - num_leaf) == table
    return (equal.flatten(equal.dim() - num_leaf).all(-1) if num_leaf else equal).to(torch.long).argmax(-1)


def _sizes(frames: Frames) -> list[int]:
    return [frame.size for frame in sorted(frames.values(), key=lambda frame: frame.dim)]
