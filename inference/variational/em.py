"""Expectation maximisation in phases, each of which moves the guide, the model, or both by an objective of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any, Literal, Unpack

from annotated_types import Len
from pyro.infer import ELBO, Trace_ELBO

from probmodels.errors import ProblemError
from probmodels.inference.flows.balance import Balance, Weights
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
from probmodels.inference.variational.options import Schedule, StepOptions
from probmodels.inference.variational.replay import Memory
from probmodels.inference.variational.training import Trainer, fit
from probmodels.options import Count, OneOf, Particles, Passes, Positive, check_options, checked, hint, options_of

__all__ = ["OBJECTIVES", "Course", "Phase", "check_phases", "fit_em", "make_course"]

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
"""A number that may change over the rounds of a fit: a constant; ``{"start", "end", "over"}``, which goes from start to
end in equal steps over that share of all rounds, by default 1, and then stays; or a function of the round, counted from
0."""

_TEMPERED = ("e_step", "joint", "wake_phi", "replay", *BALANCES)
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
        Options of a named objective: ``weights`` and ``refine`` of ``wake`` (see
        `probmodels.inference.variational.losses.wake`), ``weights`` of ``joint``, ``loss`` of ``replay``, and all of
        balance objectives.
    plus
        Named objectives that are added in every step, with the `Course` of their weight. The loss that is recorded,
        and that ``until`` looks at, stays that of ``objective``.
    """

    objective: str | Objective | ELBO
    moves: Literal["guide", "model", "both"] | None = None
    steps: Count = 1
    lr: Positive | None = None
    schedule: Schedule | None = None
    until: Course | None = None
    num_particles: Particles | None = None
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


@checked(ProblemError)
def fit_em(
    problem: Problem,
    *,
    num_rounds: Count = 1000,
    phases: Annotated[Sequence[str | Objective | ELBO | Phase | Mapping[str, Any]], Len(1), Passes(check_phases)] = (
        "e_step",
        "wake",
    ),
    lr: Positive = 0.01,
    reward_power: Annotated[Course, Passes(_power)] = 1.0,
    observed_args: Mapping[str, int | str] | Callable[..., Any] | None = None,
    **options: Unpack[StepOptions],
) -> Result:
    """Fit the parameters of a model by turns with its guide, and draw from the guide.

    Parameters
    ----------
    problem
        What to infer; its guide and modules are left as they are.
    num_rounds
        How often the phases follow each other.
    phases
        What a round does, in order: a `Phase`, a mapping of its fields, or an objective, named or own, for one step.
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
    **options
        ``batch_size``, ``num_samples``, ``clip_norm``, ``compile``, ``seed``, ``device``, ``dtype``, ``callbacks``,
        ``checkpoint``, ``checkpoint_every`` and ``progress``: see
        `probmodels.inference.variational.options.StepOptions` and what it extends.

    Returns
    -------
    Result
        As that of `fit_svi`; group ``fit`` has ``phase`` by step as well.

    Raises
    ------
    ProblemError
        If the problem has no guide or does not fit it, a phase is unknown or moves nothing, sites change between runs,
        dreams do not find their argument, or an option is out of range.
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
    chosen = _labelled([_phase(phase) for phase in phases])
    dreams = any("sleep" in (phase.objective, *phase.plus) for phase in chosen)
    if observed_args is not None and not dreams:
        raise ProblemError(f"{name}: observed_args is not used without a phase 'sleep'; leave it out")
    constant = isinstance(reward_power, int | float) and reward_power == 1.0
    power = None if constant else _power(reward_power, num_rounds)
    if power is not None and not any(_tempered(name, problem, phase) for phase in chosen):
        raise ProblemError(f"{name}: no phase takes reward_power; leave it out, or take one of {list(_TEMPERED)}")
    courses = [_courses(phase, num_rounds) for phase in chosen]

    def make(setting: Setting) -> Trainer:
        making = _Making(setting.programs.problem, observed_args, list(setting.batches.sizes))
        stages = [_stage(making, phase, lr, power, *made) for phase, made in zip(chosen, courses, strict=True)]
        return Trainer(setting, stages, num_rounds)

    written = [{f.name: getattr(phase, f.name) for f in fields(phase)} for phase in chosen]
    settings = {"num_rounds": num_rounds, "phases": written, "lr": lr, "observed_args": observed_args}
    settings["reward_power"] = reward_power
    fixed = {"phases": fingerprint(written), "lr": lr, "observed_args": fingerprint(observed_args)}
    given = [reward_power, *(phase.until for phase in chosen), *(c for phase in chosen for c in phase.plus.values())]
    rises = any(isinstance(course, Mapping) for course in given)  # over a share of all rounds
    fixed |= {"reward_power": fingerprint(reward_power), "rounds": num_rounds if rises else None}
    complete: Any = {**options, "distributed": False}
    return fit(problem, "em", make, complete, settings, fixed)


def check_phases(phases: Sequence[str | Objective | ELBO | Phase | Mapping[str, Any]]) -> None:
    """Check what phases are made of, as far as that depends on no problem.

    Raises
    ------
    ProblemError
        If a field, objective or option of a phase is unknown, out of range or not used.
    """
    for phase in phases:
        _courses(_phase(phase), 1)


def _phase(given: str | Objective | ELBO | Phase | Mapping[str, Any]) -> Phase:
    """A phase as it was given, checked."""
    given = given if isinstance(given, Phase | Mapping) else Phase(given)
    values = dict(given) if isinstance(given, Mapping) else vars(given)
    if "objective" not in values:
        raise ProblemError(f"the phase {values} lacks its objective; choose one of {', '.join(OBJECTIVES)}")
    title = values.get("label") or values["objective"]
    where = f"phase {title}: " if isinstance(title, str) else "phase: "
    check_options(Phase, values, where=where, error=ProblemError, of=" of a phase")
    phase = given if isinstance(given, Phase) else Phase(**values)
    for objective in [phase.objective, *phase.plus]:
        if isinstance(objective, str) and objective not in OBJECTIVES:
            raise ProblemError(f"no phase is called {objective!r}{hint(objective, OBJECTIVES)}")
    if phase.objective in phase.plus:
        raise ProblemError(f"{where}it adds itself; leave {phase.objective!r} out of plus")
    if phase.until is not None and phase.steps == 1:
        raise ProblemError(f"{where}it has until and steps=1; let steps be the most that it may take")
    _check_options(where, phase)
    return phase


def _check_options(where: str, phase: Phase) -> None:
    """Check what only some objectives take: draws, options, and whether they are static."""
    kind, given = phase.objective, _options(phase)
    if isinstance(kind, str):
        if phase.static:
            raise ProblemError(f"{where}static=True is not used with a named objective; leave it out")
        if phase.num_particles is not None and "num_particles" in phase.options:
            raise ProblemError(f"{where}num_particles stands in the phase and among its options; give it once")
        maker = _FREE.get(kind) or _BOUND[kind]
        known = [name for name in options_of(maker) if name != "making"]
        check_options(maker, given, where=where, error=ProblemError, of=f" of {kind}", known=known)
        if kind in _FREE:
            _FREE[kind](**given)
    elif given:
        raise ProblemError(f"{where}{', '.join(given)} not used with an objective of your own; leave it out")


def _labelled(phases: Sequence[Phase]) -> list[Phase]:
    """Phases of different names: a second ``sleep`` becomes ``sleep_2``."""
    names = [phase.name for phase in phases]
    repeats = [names[:place].count(name) for place, name in enumerate(names)]
    return [
        replace(phase, label=f"{phase.name}_{count + 1}") if count else phase
        for phase, count in zip(phases, repeats, strict=True)
    ]


def make_course(
    where: str, given: Course, rounds: int, *, end: float | None = None, least: float = -math.inf
) -> Callable[[int], float]:
    """Value by round, counted from 0.

    Parameters
    ----------
    where
        Names what it is of, for errors.
    given
        As in `Course`.
    rounds
        Number of rounds of the whole fit.
    end
        Where it ends unless it says so; None where it has to.
    least
        None of its numbers is smaller.

    Raises
    ------
    ProblemError
        If a mapping has other keys or lacks one, or a number is out of range.
    """
    if callable(given):
        return given
    course = dict(given) if isinstance(given, Mapping) else {"start": given, "end": given}
    course = {"over": 1.0, **({} if end is None else {"end": end}), **course}
    known = ("start", "end", "over")
    for key in course:
        if key not in known:
            raise ProblemError(f"{where}={given!r}; a course has no {key!r}{hint(key, known)}")
    for key in known:
        if key not in course:
            raise ProblemError(f"{where}={given!r}; it lacks {key!r}")
    if not 0 < course["over"] <= 1:
        raise ProblemError(f"{where}={given!r}; over is a share of all rounds: give a number above 0 and of at most 1")
    if min(course["start"], course["end"]) < least:
        raise ProblemError(f"{where}={given!r}; give numbers of at least {least:g}")
    start, stop = float(course["start"]), float(course["end"])
    last = max(math.ceil(course["over"] * rounds) - 1, 1)
    return lambda turn: start + (stop - start) * min(turn / last, 1.0)


def _power(given: Course, rounds: int = 1) -> Callable[[int], float]:
    return make_course("reward_power", given, rounds, end=1.0, least=_LEAST_POWER)


def _courses(phase: Phase, rounds: int) -> tuple[Callable[[int], float] | None, dict[str, Any]]:
    """The threshold of a phase, and the weights of what it adds."""
    where = f"phase {phase.name}: "
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


@dataclass(frozen=True)
class _Making:
    """What the objectives of a problem are made of.

    Attributes
    ----------
    problem
        As it is fitted.
    observed_args
        As in `fit_em`.
    plates
        Plates of which a step sees some rows.
    """

    problem: Problem
    observed_args: Any
    plates: Sequence[str]


def _e_step(making: _Making, num_particles: Particles | None = None) -> Any:
    loss = make_loss(making.problem, num_particles)
    if isinstance(loss, Balance):
        loss.joint = None  # an E-step leaves the model
    return objective_of(loss)


def _joint(making: _Making, num_particles: Particles | None = None, *, weights: Weights | None = None) -> Any:
    loss = make_loss(making.problem, num_particles)
    if not isinstance(loss, Balance):
        raise ProblemError(
            f"{making.problem.name}: phase joint takes a balance objective as the loss of the problem, which is "
            f"{type(loss).__name__}; take loss='VarGrad', or the phases e_step and wake"
        )
    loss.joint = weights or loss.joint or "equal"
    return objective_of(loss)


def _sleep(making: _Making, num_particles: Particles = 1) -> Sleep:
    return Sleep(making.problem, making.observed_args, making.plates, num_particles)


def _replay(
    making: _Making, num_particles: Particles = 8, *, loss: Annotated[str, OneOf(BALANCES)] | None = None
) -> Memory:
    return Memory(making.problem, num_particles, making.plates, None if loss is None else BALANCES[loss]())


_BOUND: dict[str, Callable[..., Any]] = {"e_step": _e_step, "joint": _joint, "sleep": _sleep, "replay": _replay}
_FREE: dict[str, Callable[..., Any]] = {"wake": wake, "wake_phi": wake_phi, **BALANCES}  # that need no problem


def _options(phase: Phase) -> dict[str, Any]:
    """Options of the objective of a phase, draws among them."""
    count = {} if phase.num_particles is None else {"num_particles": phase.num_particles}
    return count | dict(phase.options)


def _objective(making: _Making, kind: str, options: Mapping[str, Any]) -> Any:
    """A named objective."""
    return objective_of(_FREE[kind](**options)) if kind in _FREE else _BOUND[kind](making, **options)


def _stage(
    making: _Making,
    phase: Phase,
    lr: float,
    power: Callable[[int], float] | None,
    until: Callable[[int], float] | None,
    plus: Mapping[str, Callable[[int], float]],
) -> Stage:
    """What the loop minimises in a phase."""
    problem, objective = making.problem, phase.objective
    static = phase.static or isinstance(objective, ELBO) or (isinstance(objective, str) and objective != "replay")
    made = _objective(making, objective, _options(phase)) if isinstance(objective, str) else objective
    made = objective_of(made) if isinstance(made, ELBO) else made
    tempered = [] if power is None else _tempered(problem.name, problem, phase)
    courses = dict(plus)
    if plus or tempered:
        parts = {_FIRST: made, **{key: _objective(making, key, {}) for key in plus}}
        made = Composite({key: _function(problem, part) for key, part in parts.items()}, tempered)
        static = static and "replay" not in plus
        if tempered and power is not None:
            courses["reward_power"] = power
    schedule = phase.schedule or (lambda step: 1.0)
    moves = phase.moves or _moved(phase)
    return Stage(phase.name, made, moves, phase.steps, phase.lr or lr, schedule, until, courses, static)


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
