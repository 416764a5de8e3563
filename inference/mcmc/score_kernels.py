"""Langevin and Hamiltonian Monte Carlo where only the score of the target, or of a part of it, is known.

The log ratio of densities in the acceptance probability is a line integral of the score (`line_integrals`), so that
targets without a log density get a Metropolis correction. Warm-up may walk through a sequence of targets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from annotated_types import Interval, Len
from torch import Tensor

from probmodels.errors import ProblemError
from probmodels.inference.mcmc.kernels import Kernel, Params
from probmodels.inference.mcmc.line_integrals import (
    RULES,
    Evaluation,
    Target,
    check_rule,
    evaluate_start,
    finite,
    log_ratio,
)
from probmodels.inference.problem import Problem
from probmodels.inference.programs.potential import Potential
from probmodels.inference.runtime.ops import part
from probmodels.options import Count, Fraction, OneOf, Positive, checked

__all__ = ["Damping", "Moved", "Points", "RuleName", "ScoreKernel", "Transition"]

_RULES = {"hamiltonian": "curve-simpson", "langevin": "simpson"}  # see `Transition` for why no free one
_TARGET_ACCEPT = {"hamiltonian": 0.8, "langevin": 0.574}
FREE_RULES = ("curve", "curve-newton")  # that need no evaluation beyond the trajectory
_FREE_ACCEPTANCE, _TRIED_STEPS = 0.95, 20  # least of these rules, and steps after which it is known
_DIVERGENCE = 1000.0  # change of energy above which a proposal counts as divergent
_TALLIES = ("steps", "accept", "error", "checked", "evaluations", "divergences", "step_size")

Proposal = Annotated[str, OneOf(tuple(_RULES))]
RuleName = Annotated[str, OneOf(RULES)]
Points = Annotated[int, Interval(ge=1, le=1000)]
Damping = Annotated[float, Interval(ge=0, lt=1)]  # at one, momenta would never be refreshed


@dataclass(frozen=True)
class Moved:
    """Where one transition led.

    Attributes
    ----------
    x, v
        Position and momentum (chain, *event).
    evaluation
        The target at ``x``, for the next transition.
    accept_prob
        Acceptance probability (chain,); one where uncorrected.
    log_ratio
        Log of the ratio of joint densities of proposal and start (chain,), which is minus the change of energy; where
        uncorrected, by the rule that needs no evaluation.
    diverging
        Whether the proposal was not finite or its energy rose by more than 1000 (chain,).
    evaluations
        Evaluations of the target, per chain.
    error
        Difference of ``log_ratio`` from that of a finer rule (chain,), where it was asked for.
    """

    x: Tensor
    v: Tensor
    evaluation: Evaluation
    accept_prob: Tensor
    log_ratio: Tensor
    diverging: Tensor
    evaluations: int
    error: Tensor | None = None


class Transition:
    """One step of Hamiltonian or Langevin Monte Carlo on a target given by its score.

    The momentum is refreshed, ``v' = c v + sqrt(1 - c^2) z`` with ``c = damping``, moved along ``num_leapfrog``
    leapfrog steps with the score, and negated where the proposal is rejected: with ``c > 0`` the chain would not leave
    the target invariant otherwise. A Langevin step is the one with ``c = 0`` and a single leapfrog step, that is
    ``y = x + h s(x) + sqrt(2 h) z`` for ``h = step**2 / 2``, with the acceptance probability of MALA.

    Parameters
    ----------
    proposal
        ``"hamiltonian"`` or ``"langevin"``.
    corrected
        Whether proposals are accepted or rejected; otherwise all are taken.
    rule, num_points
        How the line integral is computed, see `log_ratio`: by default ``"curve-simpson"``, which evaluates the middle
        of every leapfrog step, and ``"simpson"`` for Langevin. ``"curve-newton"`` and ``"curve"`` need no evaluation
        beyond the trajectory, but err by as much as the trajectory itself: they are for steps far below the scale of
        the target, with ``adapt=False``.
    num_leapfrog, damping
        Steps of a Hamiltonian trajectory, and the share ``c`` in [0, 1) of the momentum that is kept.
    check_points
        Compare every log ratio with that of a Gauss-Legendre rule of so many points on the straight segment.

    Raises
    ------
    ProblemError
        If an option is out of its range.

    References
    ----------
    Horowitz, A. M. (1991). A generalized guided Monte Carlo algorithm. Physics Letters B 268.
    Sjöberg, A., Lindqvist, J., Önnheim, M., Jirstrand, M. and Svensson, L. (2023). MCMC-correction of score-based
    diffusion models for model composition. https://arxiv.org/abs/2307.14012
    """

    @checked(ProblemError)
    def __init__(
        self,
        proposal: Proposal = "hamiltonian",
        *,
        corrected: bool = True,
        rule: RuleName | None = None,
        num_points: Points = 5,
        num_leapfrog: Count = 3,
        damping: Damping = 0.5,
        check_points: Points | None = None,
    ) -> None:
        rule = _RULES[proposal] if rule is None else rule
        check_rule(rule, num_points)
        if check_points is not None:
            check_rule("gauss", check_points)
        langevin = proposal == "langevin"
        self.corrected, self.rule = corrected, rule if corrected else "curve-newton"
        self.num_points, self._check_points = num_points, check_points
        self._num_leapfrog, self._damping = (1, 0.0) if langevin else (num_leapfrog, damping)

    @torch.no_grad()
    def __call__(
        self, target: Target, x: Tensor, v: Tensor | None, evaluation: Evaluation, step: float | Tensor
    ) -> Moved:
        """Move all chains once.

        Parameters
        ----------
        target
            What ``evaluation`` is of.
        x, v
            Position and momentum (chain, *event); without a momentum it is drawn.
        evaluation
            The target at ``x``.
        step
            Leapfrog step, a length in units of ``x``: a number, or one by chain (chain,).
        """
        noise = torch.randn_like(x)
        v = noise if v is None else self._damping * v + math.sqrt(1 - self._damping**2) * noise
        size: Any = step.reshape(-1, *[1] * (x.ndim - 1)) if isinstance(step, Tensor) and step.ndim else step
        y, w, points, evaluations = x, v, [x], [evaluation]
        for _ in range(self._num_leapfrog):
            w = w + 0.5 * size * evaluations[-1].score
            y = y + size * w
            points.append(y)
            evaluations.append(target(y))
            w = w + 0.5 * size * evaluations[-1].score
        lost = ~(finite(y) & finite(w))
        kinetic = 0.5 * (_square(v) - _square(w))
        change, extra = log_ratio(self.rule, target, points, evaluations, self.num_points)
        ratio = torch.where(lost, math.nan, change + kinetic)
        error = None
        if self._check_points is not None:
            finer, _ = log_ratio("gauss", target, points, evaluations, self._check_points)
            error = change - finer
        diverging = ~(ratio >= -_DIVERGENCE)
        count = self._num_leapfrog + extra
        if not self.corrected:
            taken = (~lost).to(ratio)
            return Moved(y, w, evaluations[-1], taken, ratio, diverging, count, error)
        accept_prob = torch.exp(torch.nan_to_num(ratio, nan=-math.inf).clamp(max=0))
        chosen = torch.rand_like(accept_prob) < accept_prob
        kept = _choose(chosen, evaluations[-1], evaluation)
        return Moved(_where(chosen, y, x), _where(chosen, w, -v), kept, accept_prob, ratio, diverging, count, error)


class ScoreKernel(Kernel):
    """Metropolis-corrected sampling of targets given by their scores, all chains at once.

    Warm-up visits ``targets`` in order, each for an equal share of its steps, the remainder going to the last, which
    is the one that draws are of. The problem names and shapes the site; of its log density nothing is used: let the
    latent site be a normal with ``.mask(False)``. Positions are those of the unconstrained space of `Potential`.

    Parameters
    ----------
    problem
        What the draws are of.
    num_chains
        Chains, moved at once.
    targets
        Functions of positions (chain, *event) to an `Evaluation`, the one to sample last.
    proposal, corrected, rule, num_points, num_leapfrog, damping, check_points
        As in `Transition`.
    step_size
        Leapfrog step, a length in units of ``x`` (for Langevin proposals ``h = step_size**2 / 2``): one for each
        target, or one for all. Good values are near the smallest sd of the target, less in many dimensions.
    adapt
        Whether warm-up tunes a factor on the step sizes to ``target_accept``; never done where uncorrected.
    target_accept
        Mean acceptance to tune to: by default 0.8 for Hamiltonian and 0.574 for Langevin proposals.
    start
        Positions (chain, *event), or a function of the number of chains that draws them.
    between
        Proposes positions (chain, *event) when target number ``level`` is entered from the one before, given
        ``(level, x)``; by default chains stay where they are.
    final
        Maps positions (chain, *event) to what is kept as draws, of the same shape; by default themselves.
    names
        Names of the targets, for messages and statistics; their numbers by default.

    Raises
    ------
    ProblemError
        If options, shapes or numbers of steps do not fit, or a score is not finite where chains enter a target.
    """

    vectorized = True

    @checked(ProblemError)
    def __init__(
        self,
        problem: Problem,
        *,
        num_chains: Count,
        targets: Annotated[Sequence[Target], Len(1)],
        start: Tensor | Callable[[int], Tensor],
        step_size: Positive | Sequence[Positive],
        proposal: Proposal = "hamiltonian",
        corrected: bool = True,
        rule: RuleName | None = None,
        num_points: Points = 5,
        num_leapfrog: Count = 3,
        damping: Damping = 0.5,
        adapt: bool = True,
        target_accept: Fraction | None = None,
        between: Callable[[int, Tensor], Tensor] | None = None,
        final: Callable[[Tensor], Tensor] | None = None,
        names: Sequence[str] | None = None,
        check_points: Points | None = None,
    ) -> None:
        super().__init__()
        try:
            self._transition = Transition(
                proposal,
                corrected=corrected,
                rule=rule,
                num_points=num_points,
                num_leapfrog=num_leapfrog,
                damping=damping,
                check_points=check_points,
            )
        except ProblemError as error:
            raise ProblemError(f"{problem.name}: {error}") from error
        count = len(targets)
        sizes = [float(size) for size in step_size] if isinstance(step_size, Sequence) else [float(step_size)] * count
        if len(sizes) != count:
            raise ProblemError(
                f"{problem.name}: step_size holds {len(sizes)} numbers for {count} targets; give one for each of them, "
                "or one for all"
            )
        if names is not None and len(names) != count:
            raise ProblemError(f"{problem.name}: there are {len(names)} names for {count} targets")
        target_accept = _TARGET_ACCEPT[proposal] if target_accept is None else target_accept
        self._problem, self.num_chains, self._targets, self._start = problem, num_chains, list(targets), start
        self._sizes, self._between, self._final = sizes, between, final
        self._names = [str(index) for index in range(count)] if names is None else list(names)
        self._adapting, self._aim = adapt and corrected, target_accept
        self._options = {"proposal": proposal, "corrected": corrected, "rule": self._transition.rule}
        self._level, self._count, self._updates = 0, 0, 0
        self._log_factor = self._log_factor_mean = 0.0
        self._tally = {name: torch.zeros(count, dtype=torch.float64) for name in _TALLIES}
        self._x = self._v = torch.empty(0)
        self._evaluation = Evaluation(self._x)
        self._moved: Moved | None = None

    def setup(self, warmup_steps: int, *args: Any, **kwargs: Any) -> None:
        """Place the chains and evaluate the first target.

        Raises
        ------
        ProblemError
            If there are fewer warm-up steps than targets, starts are of the wrong shape, or the target is not finite.
        """
        count, name = len(self._targets), self._problem.name
        if count > 1 and warmup_steps < count:
            raise ProblemError(
                f"{name}: warmup_steps={warmup_steps} cannot visit {count} targets; take at least {count}"
            )
        share = warmup_steps // count
        self._warmup, self._entries = warmup_steps, {index * share: index for index in range(1, count)}
        self.say("finding starting points")
        start = self._start(self.num_chains) if callable(self._start) else self._start
        potential = Potential(self._problem)
        size = potential.size
        if len(start) != self.num_chains or start[0].numel() != size:
            raise ProblemError(
                f"{name}: starts have shape {tuple(start.shape)}; with {self.num_chains} chains of {size} unknowns it "
                f"must be ({self.num_chains}, ...) with {size} entries a chain"
            )
        self._x = start.detach().clone().to(potential.like.device)
        self._v = torch.randn_like(self._x)
        self._enter(0)

    @property
    def initial_params(self) -> Params:
        """Starts of the chains: ``z`` (chain, size), unconstrained."""
        return self._params()

    @initial_params.setter
    def initial_params(self, params: Params) -> None:
        self._x = params["z"].reshape(self._x.shape)
        self._enter(self._level)

    @torch.no_grad()
    def sample(self, params: Params) -> Params:
        """One transition of every chain, on the next target where its turn has come; ``z`` (chain, size)."""
        if self._count in self._entries and self._count < self._warmup:
            level = self._entries[self._count]
            if self._between is not None:
                self._x = self._between(level, self._x)
            self._enter(level)
        self._count += 1
        step = self._step
        moved = self._transition(self._targets[self._level], self._x, self._v, self._evaluation, step)
        self._x, self._v, self._evaluation = moved.x, moved.v, moved.evaluation
        self._record(moved, step)
        self._check_free_rule()
        if self._adapting and self._count <= self._warmup:
            self._adapt(float(moved.accept_prob.mean()))
        return self._params()

    def export(self, params: Params) -> Params:
        """What is kept of a state: ``z`` (chain, size)."""
        if self._final is None:
            return params
        with torch.no_grad():
            return {"z": self._final(params["z"].reshape(self._x.shape)).reshape(self.num_chains, -1)}

    def end_warmup(self) -> None:
        """Fix the step size at its average over the last target's share of warm-up."""
        if self._updates:
            self._log_factor = self._log_factor_mean

    def sample_stats(self) -> dict[str, Any]:
        """Acceptance, change of energy, divergence and step size, by chain."""
        if self._moved is None:
            raise ProblemError(f"{self._problem.name}: there is no draw yet")
        return {
            "acceptance_rate": self._moved.accept_prob,
            "energy_change": -self._moved.log_ratio,
            "diverging": self._moved.diverging,
            "step_size": self._last_step,
        }

    def attrs(self) -> dict[str, Any]:
        """Options, and under ``levels`` what happened on each target, draws included."""
        tally = {name: values.tolist() for name, values in self._tally.items()}
        steps, checked = tally["steps"], tally["checked"]

        def mean(name: str, counts: list[float]) -> list[float | None]:
            return [total / number if number else None for total, number in zip(tally[name], counts, strict=True)]

        levels: dict[str, Any] = {
            "name": self._names,
            "steps": [int(value) for value in steps],
            "acceptance_rate": mean("accept", [number * self.num_chains for number in steps]),
            "step_size": [value or None for value in tally["step_size"]],
            "evaluations": [int(value) for value in tally["evaluations"]],
            "divergences": [int(value) for value in tally["divergences"]],
        }
        if sum(checked):
            levels["line_error"] = mean("error", checked)
        aim = {"target_accept_prob": self._aim} if self._adapting else {}
        return {**self._options, **aim, "levels": levels}

    def logging(self) -> dict[str, str]:
        """Target, step size and acceptance for the progress bar."""
        shown = {"target": self._names[self._level], "step size": f"{self._step:.2e}"}
        if self._moved is not None:
            shown["acc"] = f"{float(self._moved.accept_prob.mean()):.2f}"
        return shown

    def state_dict(self) -> dict[str, Tensor | int | float | str]:
        """Position, momentum, evaluation, place among the targets, and the state of adaptation."""
        names = ("level", "count", "updates", "log_factor", "log_factor_mean", "x", "v")
        state = {name: getattr(self, f"_{name}") for name in names}
        parts = vars(self._evaluation)
        state |= {f"evaluation/{name}": value for name, value in parts.items() if value is not None}
        return state | {f"tally/{name}": value for name, value in self._tally.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state_dict``."""
        self._evaluation = Evaluation(**part(state, "evaluation/"))
        self._tally = part(state, "tally/")
        for name, value in state.items():
            if "/" not in name:
                setattr(self, f"_{name}", value)

    @property
    def _step(self) -> float:
        return self._sizes[self._level] * math.exp(self._log_factor)

    def _params(self) -> Params:
        return {"z": self._x.reshape(self.num_chains, -1)}

    def _enter(self, level: int) -> None:
        """Evaluate a target where the chains stand; the factor on its step size is that of the target before."""
        label = f"{level}" if self._names[level] == str(level) else f"{level} ({self._names[level]})"
        # Uncorrected chains that went astray on the way are counted as diverging, and stop no others.
        alive = (
            None
            if self._transition.corrected or not self._count
            else torch.zeros(self.num_chains, dtype=torch.bool, device=self._x.device)
        )
        try:
            self._evaluation = evaluate_start(self._targets[level], self._x, alive=alive)
            check_rule(self._transition.rule, self._transition.num_points, self._evaluation)
        except ProblemError as error:
            raise ProblemError(f"{self._problem.name}: target {label}: {error}") from error
        self._level, self._updates = level, 0
        self._tally["evaluations"][level] += 1

    def _check_free_rule(self) -> None:
        """Refuse a rule that needs no evaluation where steps are so long that it errs by as much as they do."""
        rule, level = self._transition.rule, self._level
        steps = float(self._tally["steps"][level])
        if rule not in FREE_RULES or not self._transition.corrected or steps < _TRIED_STEPS:
            return
        rate = float(self._tally["accept"][level]) / (steps * self.num_chains)
        if rate < _FREE_ACCEPTANCE:
            raise ProblemError(
                f"{self._problem.name}: target {self._names[level]}: acceptance is {rate:.2f} with rule={rule!r}, "
                f"whose error is as large as that of the steps; shorten step_size until it is {_FREE_ACCEPTANCE} or "
                f"more, or take rule={_RULES['hamiltonian']!r}"
            )

    def _adapt(self, accept: float) -> None:
        """Robbins-Monro on the log factor, and its average, within the present target."""
        self._updates += 1
        self._log_factor += self._updates**-0.6 * (accept - self._aim)
        self._log_factor_mean += self._updates**-0.75 * (self._log_factor - self._log_factor_mean)

    def _record(self, moved: Moved, step: float) -> None:
        self._moved, self._last_step = moved, step
        level, tally = self._level, self._tally
        tally["steps"][level] += 1
        tally["accept"][level] += float(moved.accept_prob.sum())
        tally["evaluations"][level] += moved.evaluations
        tally["divergences"][level] += int(moved.diverging.sum())
        tally["step_size"][level] = step
        if moved.error is not None:
            errors = moved.error[torch.isfinite(moved.error)]
            tally["error"][level] += float(errors.abs().sum())
            tally["checked"][level] += len(errors)


def _square(x: Tensor) -> Tensor:
    return x.square().reshape(len(x), -1).sum(1)


def _where(chosen: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(chosen.reshape(-1, *[1] * (a.ndim - 1)), a, b)


def _choose(chosen: Tensor, a: Evaluation, b: Evaluation) -> Evaluation:
    """Evaluation ``a`` of the chosen chains and ``b`` of the others."""

    def merged(p: Tensor | None, q: Tensor | None) -> Tensor | None:
        return None if p is None or q is None else _where(chosen, p, q)

    return Evaluation(_where(chosen, a.score, b.score), merged(a.line, b.line), merged(a.known, b.known))
