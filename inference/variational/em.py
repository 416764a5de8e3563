"""Expectation maximisation in phases, each of which moves the guide, the model, or both by an objective of its own."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from pyro.infer import ELBO, Trace_ELBO

from probmodels.errors import ProblemError
from probmodels.inference.flows.balance import WEIGHTS, Balance
from probmodels.inference.problem import Problem
from probmodels.inference.result import Result
from probmodels.inference.runtime.fingerprints import fingerprint
from probmodels.inference.variational.gradient import Stage
from probmodels.inference.variational.loop import Setting
from probmodels.inference.variational.losses import (
    BALANCES,
    Composite,
    Objective,
    Sleep,
    make_loss,
    objective_of,
    wake,
    wake_phi,
)
from probmodels.inference.variational.options import Callback, Options, Schedule, positive
from probmodels.inference.variational.replay import Memory
from probmodels.inference.variational.training import Trainer, fit

__all__ = ["OBJECTIVES", "Course", "Phase", "fit_em", "make_course"]

OBJECTIVES = {
    "e_step": "guide",
    "wake": "model",
    "wake_phi": "guide",
    "sleep": "guide",
    "replay": "guide",
    "joint": "both",
    **dict.fromkeys(BALANCES, "guide"),
}
"""Objectives by name, and what they move."""

Course = float | Mapping[str, float] | Callable[[int], float]
"""Of a number over the rounds of a fit: constant; ``{"start", "end", "over"}``, which goes from start to end in equal
steps over that share of all rounds, by default 1, and stays there; or a function from the round, counted from 0."""

_PARTICLES = {"wake": 1, "wake_phi": 8, "sleep": 1, "replay": 8}
_OPTIONS: dict[str, Collection[str]] = {"wake": ("weights", "refine"), "replay": ("loss",), "joint": ("weights",)}
_TEMPERED = ("e_step", "joint", "wake_phi", "replay", *BALANCES)
_MOVES = ("guide", "model", "both")
_LEAST_POWER = 1e-6
_FIRST = "objective"  # of a sum, whose other parts go by their names


@dataclass(frozen=True)
class Phase:
    """Steps of one objective.

    Attributes
    ----------
    objective
        ``"e_step"``: the guide by the problem's own loss. ``"wake"``: the model by the importance-weighted bound on the
        data, or by other weights of draws. ``"joint"``: both at the same draws, for problems whose loss is a balance
        objective. ``"wake_phi"``: the guide by self-normalised importance weights. ``"sleep"``: the guide by the
        likelihood of what the model dreams. ``"replay"``: the guide by the best values met so far. ``"VarGrad"`` and
        the other balance objectives by name. Or a function ``(model, guide, *args, **kwargs) -> Tensor ()`` to be
        minimised, or an ELBO. An object with ``state_dict`` and ``load_state_dict`` is kept in checkpoints.
    moves
        ``"guide"``: parameters of the guide that the model does not share; ``"model"``: those of the model; ``"both"``.
        None for what a named or balance objective moves, and both for any other.
    steps
        Steps in a row, or the most of them where ``until`` is given.
    lr
        Step size of Adam, whose moments belong to this phase; None for that of `fit_em`.
    schedule
        From the steps that this phase has made, counted from 0, to a factor of ``lr``.
    until
        A loss, or its `Course`: once the smoothed loss of this phase, of weight 0.9 for what came before, is below, the
        next phase follows. An E-step that has to be good enough, by an annealed measure, before the model moves.
    num_particles
        Draws of each step for a named objective, or values remembered for ``replay``; None for 8 for ``wake_phi`` and
        ``replay``, 1 for the others.
    label
        Name in the history; None for that of the objective.
    static
        Whether an objective of your own depends on parameters, data and random numbers only, so that a graph of it may
        be run in its place. Named ones know.
    options
        Of a named objective: ``weights`` and ``refine`` of ``wake`` (see
        `probmodels.inference.variational.losses.wake`), ``weights`` of ``joint``, ``loss`` of ``replay``, and all of
        balance objectives.
    plus
        Named objectives that are added in every step, with the `Course` of their weight. The loss that is recorded,
        and that ``until`` looks at, stays that of ``objective``.
    """

    objective: str | Objective | ELBO
    moves: str | None = None
    steps: int = 1
    lr: float | None = None
    schedule: Schedule | None = None
    until: Course | None = None
    num_particles: int | None = None
    label: str | None = None
    static: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    plus: Mapping[str, Course] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name in the history."""
        if self.label is not None or isinstance(self.objective, str):
            return self.label or str(self.objective)
        return getattr(self.objective, "__name__", type(self.objective).__name__)


def fit_em(
    problem: Problem,
    *,
    num_rounds: int = 1000,
    phases: Sequence[str | Phase | Mapping[str, Any]] = ("e_step", "wake"),
    lr: float = 0.01,
    reward_power: Course = 1.0,
    observed_args: Mapping[str, int | str] | Callable[..., Any] | None = None,
    batch_size: int | Mapping[str, int] | None = None,
    num_samples: int = 1000,
    clip_norm: float | None = None,
    compile: str | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    callbacks: Sequence[Callback] = (),
    checkpoint: str | Path | None = None,
    checkpoint_every: float = 30.0,
    progress: bool = True,
) -> Result:
    """Fit the parameters of a model by turns with its guide, and draw from the guide.

    Parameters
    ----------
    problem
        What to infer; its guide and modules are left as they are.
    num_rounds
        How often the phases follow each other.
    phases
        What a round does, in order: a `Phase`, a mapping of its fields, or the name of an objective for one step of it.
        ``("wake", "sleep")`` is wake-sleep, ``("wake", "wake_phi")`` reweighted wake-sleep, the default variational EM.
    lr
        Step size of phases that have none of their own.
    reward_power
        Power of p(data, z) in all phases that move the guide by it: the balance objectives, ``e_step`` by one of these
        or by ``Trace_ELBO``, ``joint``, ``wake_phi`` and ``replay``. ``{"start": 0.4, "over": 0.6}`` rises from 0.4 to
        1 over the first 60 % of the rounds: annealed EM. The model learns from the draws of such a guide.
    observed_args
        For dreams: observed site to the position or name of the argument that holds its data, or a function ``(args,
        kwargs, dreams) -> (args, kwargs)``; None where every site's data is an argument as it stands.
    batch_size, num_samples, clip_norm, compile, seed, device, dtype
        As in `fit_svi`.
    callbacks, checkpoint, checkpoint_every, progress
        As in `fit_svi`.

    Returns
    -------
    Result
        As that of `fit_svi`; group ``fit`` has ``phase`` by step as well.

    Raises
    ------
    ProblemError
        If the problem has no guide or does not fit it, a phase is unknown or moves nothing, sites change between runs,
        dreams do not find their argument, or an argument is out of range.
    CheckpointError, FitError, KeyboardInterrupt
        As in `fit_svi`.

    References
    ----------
    R. M. Neal, G. E. Hinton, A view of the EM algorithm that justifies incremental, sparse, and other variants, 1998,
    https://doi.org/10.1007/978-94-011-5014-9_12

    Examples
    --------
    >>> result = fit_em(Problem("mine", model, guide, args=(x,)), phases=("wake", "sleep"))  # doctest: +SKIP
    """
    name = problem.name
    positive(name, num_rounds=num_rounds)
    if not lr > 0:
        raise ProblemError(f"{name}: lr={lr}; it must be positive")
    chosen = [_phase(name, phase) for phase in phases]
    if not chosen:
        raise ProblemError(f"{name}: phases is empty; give some of {list(OBJECTIVES)}")
    chosen = _labelled(chosen)
    constant = isinstance(reward_power, int | float) and reward_power == 1.0
    power = (
        None
        if constant
        else make_course(f"{name}: reward_power", reward_power, num_rounds, end=1.0, least=_LEAST_POWER)
    )
    if power is not None and not any(_tempered(name, problem, phase) for phase in chosen):
        raise ProblemError(f"{name}: no phase takes reward_power; leave it out, or take one of {list(_TEMPERED)}")
    courses = [_courses(name, phase, num_rounds) for phase in chosen]

    def make(setting: Setting) -> Trainer:
        problem, plates = setting.programs.problem, list(setting.batches.sizes)
        stages = [
            _stage(problem, phase, lr, observed_args, plates, power, *made)
            for phase, made in zip(chosen, courses, strict=True)
        ]
        return Trainer(setting, stages, num_rounds)

    options = Options(
        batch_size=batch_size,
        num_samples=num_samples,
        clip_norm=clip_norm,
        compile=compile,
        seed=seed,
        device=device,
        dtype=dtype,
        callbacks=callbacks,
        checkpoint=checkpoint,
        checkpoint_every=checkpoint_every,
        progress=progress,
    )
    written = [{f.name: getattr(phase, f.name) for f in fields(phase)} for phase in chosen]
    settings = {"num_rounds": num_rounds, "phases": written, "lr": lr, "observed_args": observed_args}
    settings["reward_power"] = reward_power
    fixed = {"phases": fingerprint(written), "lr": lr, "observed_args": fingerprint(observed_args)}
    given = [reward_power, *(phase.until for phase in chosen), *(c for phase in chosen for c in phase.plus.values())]
    rises = any(isinstance(course, Mapping) for course in given)  # over a share of all rounds
    fixed |= {"reward_power": fingerprint(reward_power), "rounds": num_rounds if rises else None}
    return fit(problem, "em", make, options, settings, fixed)


def _phase(name: str, given: str | Phase | Mapping[str, Any]) -> Phase:
    """A phase as it was given, checked."""
    if isinstance(given, Mapping):
        known = [f.name for f in fields(Phase)]
        for key in given:
            if key not in known:
                raise ProblemError(f"{name}: a phase has no {key!r}; {_hint(key, known)}")
        if "objective" not in given:
            raise ProblemError(f"{name}: the phase {dict(given)} lacks its objective; choose from {list(OBJECTIVES)}")
        given = Phase(**given)
    phase = given if isinstance(given, Phase) else Phase(given)
    if isinstance(phase.objective, str):
        _known(name, phase.objective)
    if not isinstance(phase.objective, str | ELBO) and not callable(phase.objective):
        raise ProblemError(f"{name}: a phase cannot minimise {phase.objective!r}; give a name or a function")
    if phase.moves not in (None, *_MOVES):
        raise ProblemError(f"{name}: phase {phase.name} moves {phase.moves!r}; choose one of {_MOVES}")
    positive(f"{name}: phase {phase.name}", steps=phase.steps)
    if phase.until is not None and phase.steps == 1:
        raise ProblemError(f"{name}: phase {phase.name} has until and steps=1; let steps be the most that it may take")
    if not isinstance(phase.options, Mapping):
        raise ProblemError(f"{name}: phase {phase.name} has options={phase.options!r}; give values by name")
    _check_options(name, phase)
    if not isinstance(phase.plus, Mapping):
        raise ProblemError(f"{name}: phase {phase.name} has plus={phase.plus!r}; give weights by name of an objective")
    for other in phase.plus:
        _known(name, other)
        if other == phase.objective:
            raise ProblemError(f"{name}: phase {phase.name} adds itself; leave {other!r} out of plus")
    if phase.lr is not None and not phase.lr > 0:
        raise ProblemError(f"{name}: phase {phase.name} has lr={phase.lr}; it must be positive")
    if phase.num_particles is not None:
        positive(f"{name}: phase {phase.name}", num_particles=phase.num_particles)
        if phase.objective == "wake_phi" and phase.num_particles < 2:
            raise ProblemError(
                f"{name}: phase wake_phi weighs draws against each other; it needs num_particles=2 or more"
            )
    return phase


def _labelled(phases: Sequence[Phase]) -> list[Phase]:
    """Phases of different names: a second ``sleep`` becomes ``sleep_2``."""
    names = [phase.name for phase in phases]
    repeats = [names[:place].count(name) for place, name in enumerate(names)]
    return [
        replace(phase, label=f"{phase.name}_{count + 1}") if count else phase
        for phase, count in zip(phases, repeats, strict=True)
    ]


def _known(name: str, objective: Any) -> None:
    """See that there is an objective of a name."""
    if objective not in OBJECTIVES:
        raise ProblemError(f"{name}: no phase is called {objective!r}; {_hint(objective, OBJECTIVES)}")


def _hint(word: Any, known: Collection[str]) -> str:
    close = difflib.get_close_matches(str(word), list(known), n=1)
    return f"did you mean {close[0]!r}?" if close else f"choose from {list(known)}"


def _check_options(name: str, phase: Phase) -> None:
    kind = phase.objective if isinstance(phase.objective, str) else ""
    known: Collection[str] = _OPTIONS.get(kind, ())
    if kind in BALANCES:
        try:
            BALANCES[kind](**phase.options)
        except TypeError as error:
            raise ProblemError(f"{name}: phase {phase.name} has options={dict(phase.options)}: {error}") from error
        return
    for key in phase.options:
        if key not in known:
            what = _hint(key, known) if known else "it has none"
            raise ProblemError(f"{name}: phase {phase.name} has no option {key!r}; {what}")


def make_course(
    where: str, given: Course, rounds: int, *, end: float | None = None, least: float = -math.inf
) -> Callable[[int], float]:
    """Value by round, counted from 0.

    Parameters
    ----------
    where
        Names what it is of, for errors.
    given
        See `Course`.
    rounds
        Of the whole fit.
    end
        Where it ends unless it says so; None where it has to.
    least
        None of its numbers is smaller.

    Raises
    ------
    ProblemError
        If it is none, or out of range.
    """
    if callable(given):
        return given
    course = dict(given) if isinstance(given, Mapping) else {"start": given, "end": given}
    course = {"over": 1.0, **({} if end is None else {"end": end}), **course}
    strange = sorted(set(course) - {"start", "end", "over"}) or sorted({"start", "end", "over"} - set(course))
    if strange:
        raise ProblemError(f"{where}={given!r}; give a number, or its 'start', 'end' and 'over', not {strange}")
    for key, value in course.items():
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not number or not (0 < value <= 1 if key == "over" else value >= least):
            what = f"{key} must be" if isinstance(given, Mapping) else "it must be"
            range_ = "a share of all rounds in (0, 1]" if key == "over" else f"a finite number of at least {least:g}"
            raise ProblemError(f"{where}={given!r}; {what} {range_}")
    start, stop = float(course["start"]), float(course["end"])
    last = max(math.ceil(course["over"] * rounds) - 1, 1)
    return lambda turn: start + (stop - start) * min(turn / last, 1.0)


def _courses(name: str, phase: Phase, rounds: int) -> tuple[Callable[[int], float] | None, dict[str, Any]]:
    """The threshold of a phase, and the weights of what it adds."""
    where = f"{name}: phase {phase.name}: "
    until = None if phase.until is None else make_course(f"{where}until", phase.until, rounds)
    plus = {key: make_course(f"{where}{key}", given, rounds, least=0.0) for key, given in phase.plus.items()}
    return until, plus


def _tempered(name: str, problem: Problem, phase: Phase) -> list[str]:
    """Parts of a phase, by name, that take a power of the reward."""
    found = []
    for key, objective in {_FIRST: phase.objective, **{other: other for other in phase.plus}}.items():
        loss = make_loss(problem) if objective in ("e_step", "joint") else objective
        kind = type(loss)
        if isinstance(loss, ELBO) and not (isinstance(loss, Balance) or kind is Trace_ELBO):
            raise ProblemError(
                f"{name}: reward_power does not go with {kind.__name__}, which does not weigh the log density of the "
                "model alone; take a balance objective, as 'VarGrad', or Trace_ELBO"
            )
        if isinstance(loss, Balance) and callable(loss.reward_power):
            raise ProblemError(f"{name}: {kind.__name__} has a reward_power of its own that changes; give one of them")
        if isinstance(loss, ELBO) or objective in _TEMPERED:
            found.append(key)
    return found


def _moved(phase: Phase) -> str:
    """What a phase moves, unless it says so."""
    objective = phase.objective
    first = OBJECTIVES.get(objective, "both") if isinstance(objective, str) else "both"
    if isinstance(objective, Balance):
        first = "both" if objective.joint is not None else "guide"
    elif phase.options.get("joint") is not None:
        first = "both"
    moved = {first, *(OBJECTIVES[other] for other in phase.plus)}
    return first if len(moved) == 1 else "both"


def _stage(
    problem: Problem,
    phase: Phase,
    lr: float,
    observed_args: Any,
    plates: Sequence[str],
    power: Callable[[int], float] | None,
    until: Callable[[int], float] | None,
    plus: Mapping[str, Callable[[int], float]],
) -> Stage:
    """What the loop minimises in a phase."""
    objective: Any = phase.objective
    static = phase.static or isinstance(objective, ELBO)
    if isinstance(objective, ELBO):
        objective = objective_of(objective)
    elif isinstance(objective, str):
        static = objective != "replay"
        objective = _objective(problem, objective, phase.num_particles, phase.options, observed_args, plates)
    tempered = [] if power is None else _tempered(problem.name, problem, phase)
    courses = dict(plus)
    if plus or tempered:
        parts = {key: _objective(problem, key, None, {}, observed_args, plates) for key in plus}
        parts = {key: _function(problem, part) for key, part in {_FIRST: objective, **parts}.items()}
        objective, static = Composite(parts, tempered), static and "replay" not in plus
        if tempered and power is not None:
            courses["reward_power"] = power
    schedule = phase.schedule or (lambda step: 1.0)
    moves = phase.moves or _moved(phase)
    return Stage(phase.name, objective, moves, phase.steps, phase.lr or lr, schedule, until, courses, static)


def _objective(
    problem: Problem,
    kind: str,
    count: int | None,
    options: Mapping[str, Any],
    observed_args: Any,
    plates: Sequence[str],
) -> Any:
    """A named objective."""
    particles = count or _PARTICLES.get(kind, 1)
    if kind in BALANCES:
        return objective_of(BALANCES[kind](**({} if count is None else {"num_particles": count}), **options))
    if kind == "sleep":
        return Sleep(problem, observed_args, plates, particles)
    if kind == "wake":
        return wake(particles, **options)
    if kind == "wake_phi":
        return wake_phi(particles)
    if kind == "replay":
        loss = options.get("loss")
        if loss is not None and loss not in BALANCES:
            raise ProblemError(f"{problem.name}: replay has loss={loss!r}; {_hint(loss, BALANCES)}")
        return Memory(problem, particles, plates, None if loss is None else BALANCES[loss]())
    loss = make_loss(problem, count)
    if kind == "joint":
        if not isinstance(loss, Balance):
            raise ProblemError(
                f"{problem.name}: phase joint takes a balance objective as the loss of the problem, which is "
                f"{type(loss).__name__}; take loss='VarGrad', or the phases e_step and wake"
            )
        loss.joint = options.get("weights", loss.joint or "equal")
        if loss.joint not in WEIGHTS:
            raise ProblemError(f"{problem.name}: phase joint has weights={loss.joint!r}; choose one of {WEIGHTS}")
    elif isinstance(loss, Balance):
        loss.joint = None  # an E-step leaves the model
    return objective_of(loss)


def _function(problem: Problem, objective: Any) -> Objective:
    """An objective as a function that can be added to others."""
    if not hasattr(objective, "loss_and_grads"):
        return objective
    if isinstance(objective, Balance) or not hasattr(objective, "differentiable_loss"):
        raise ProblemError(
            f"{problem.name}: {type(objective).__name__} cannot be a part of a sum, since it counts steps or computes "
            "its gradient by itself; give it a phase of its own"
        )
    return objective.differentiable_loss
