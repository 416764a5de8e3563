"""Expectation maximisation in phases, each of which moves the guide, the model, or both by an objective of its own."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from pyro.infer import ELBO

from probmodels.inference.fingerprints import fingerprint
from probmodels.inference.gradient import Stage
from probmodels.inference.loop import Setting
from probmodels.inference.losses import Memory, Objective, Sleep, make_loss, objective_of, wake, wake_phi
from probmodels.inference.minibatch import Minibatches
from probmodels.inference.options import Callback, Options, Schedule, positive
from probmodels.inference.problem import Problem, ProblemError
from probmodels.inference.result import Result
from probmodels.inference.training import Trainer, fit

__all__ = ["OBJECTIVES", "Phase", "fit_em"]

OBJECTIVES = {"e_step": "guide", "wake": "model", "wake_phi": "guide", "sleep": "guide", "replay": "guide"}
"""Objectives by name, and what they move."""

_PARTICLES = {"wake": 1, "wake_phi": 8, "sleep": 1, "replay": 8}
_MOVES = ("guide", "model", "both")


@dataclass(frozen=True)
class Phase:
    """Steps of one objective.

    Attributes
    ----------
    objective
        ``"e_step"``: the guide by the problem's own loss. ``"wake"``: the model by the importance-weighted bound on the
        data. ``"wake_phi"``: the guide by self-normalised importance weights. ``"sleep"``: the guide by the likelihood
        of what the model dreams. ``"replay"``: the guide by the best values met so far. Or a function ``(model, guide,
        *args, **kwargs) -> Tensor ()`` to be minimised, or an ELBO. An object with ``state_dict`` and
        ``load_state_dict`` is kept in checkpoints.
    moves
        ``"guide"``: parameters of the guide that the model does not share; ``"model"``: those of the model; ``"both"``.
        None for what a named objective moves, and both for any other.
    steps
        Steps in a row, or the most of them where ``until`` is given.
    lr
        Step size of Adam, whose moments belong to this phase; None for that of `fit_em`.
    schedule
        From the steps that this phase has made, counted from 0, to a factor of ``lr``.
    until
        A loss, or a function from the round, counted from 0, to one: once the smoothed loss of this phase is below, the
        next phase follows. An E-step that has to be good enough, by an annealed measure, before the model moves.
    num_particles
        Draws of each step for a named objective, or values remembered for ``replay``; None for 8 for ``wake_phi`` and
        ``replay``, 1 for the others.
    label
        Name in the history; None for that of the objective.
    static
        Whether an objective of your own depends on parameters, data and random numbers only, so that a graph of it may
        be run in its place. Named ones know.
    """

    objective: str | Objective | ELBO
    moves: str | None = None
    steps: int = 1
    lr: float | None = None
    schedule: Schedule | None = None
    until: float | Callable[[int], float] | None = None
    num_particles: int | None = None
    label: str | None = None
    static: bool = False

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

    def make(setting: Setting) -> Trainer:
        problem, batches = setting.programs.problem, setting.batches
        stages = [_stage(problem, phase, lr, observed_args, batches) for phase in chosen]
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
    fixed = {"phases": fingerprint(written), "lr": lr, "observed_args": fingerprint(observed_args)}
    return fit(problem, "em", make, options, settings, fixed)


def _phase(name: str, given: str | Phase | Mapping[str, Any]) -> Phase:
    """A phase as it was given, checked."""
    if isinstance(given, Mapping):
        known = [f.name for f in fields(Phase)]
        for key in given:
            if key not in known:
                close = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"choose from {known}"
                raise ProblemError(f"{name}: a phase has no {key!r}; {hint}")
        if "objective" not in given:
            raise ProblemError(f"{name}: the phase {dict(given)} lacks its objective; choose from {list(OBJECTIVES)}")
        given = Phase(**given)
    phase = given if isinstance(given, Phase) else Phase(given)
    if isinstance(phase.objective, str) and phase.objective not in OBJECTIVES:
        close = difflib.get_close_matches(phase.objective, OBJECTIVES, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"choose one of {list(OBJECTIVES)} or give a function"
        raise ProblemError(f"{name}: no phase is called {phase.objective!r}; {hint}")
    if not isinstance(phase.objective, str | ELBO) and not callable(phase.objective):
        raise ProblemError(f"{name}: a phase cannot minimise {phase.objective!r}; give a name or a function")
    if phase.moves not in (None, *_MOVES):
        raise ProblemError(f"{name}: phase {phase.name} moves {phase.moves!r}; choose one of {_MOVES}")
    positive(f"{name}: phase {phase.name}", steps=phase.steps)
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


def _stage(problem: Problem, phase: Phase, lr: float, observed_args: Any, batches: Minibatches) -> Stage:
    """What the loop minimises in a phase."""
    plates = list(batches.sizes)
    count = phase.num_particles
    objective: Any = phase.objective
    static = phase.static
    if isinstance(objective, ELBO):
        objective = objective_of(objective)
        static = True
    elif isinstance(objective, str):
        kind = objective
        static = kind != "replay"
        if kind == "e_step":
            objective = objective_of(make_loss(problem, count))
        elif kind == "sleep":
            objective = Sleep(problem, observed_args, plates, count or _PARTICLES[kind])
        elif kind == "replay":
            objective = Memory(problem, count or _PARTICLES[kind], plates)
        else:
            objective = {"wake": wake, "wake_phi": wake_phi}[kind](count or _PARTICLES[kind])
    moves = phase.moves or OBJECTIVES.get(str(phase.objective), "both")
    threshold = phase.until
    until: Callable[[int], float] | None = None
    if threshold is not None:
        until = threshold if callable(threshold) else lambda _: threshold
    schedule = phase.schedule or (lambda step: 1.0)
    return Stage(phase.name, objective, moves, phase.steps, phase.lr or lr, schedule, until, static)
