"""The loop behind `fit_svi` and `fit_em`: gradients, optimisers, schedules, history, checkpoints, interrupts."""

from __future__ import annotations

import contextlib
import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
import xarray as xr
from torch import Tensor
from tqdm.auto import tqdm

from probmodels.inference.capture import CaptureError
from probmodels.inference.checkpoint import check_room, open_checkpoint, read_state, write_state
from probmodels.inference.fingerprints import fingerprint
from probmodels.inference.gradient import Gradient, Stage
from probmodels.inference.minibatch import Minibatches
from probmodels.inference.ops import (
    Interrupts,
    chain_seed,
    part,
    restore_rng,
    rng_tensors,
    single_thread,
)
from probmodels.inference.optimiser import Adam
from probmodels.inference.options import Options, Step
from probmodels.inference.problem import Problem, ProblemError
from probmodels.inference.programs import Programs, cast, identity, opened, sample_guide
from probmodels.inference.ranks import Ranks, join, shared_sizes
from probmodels.inference.result import Result, build_tree, take_marginals, to_dataset

__all__ = ["FitError", "Trainer", "fit"]

_GRAPH_STEPS = 200  # steps that repay a capture
_SAMPLE_STREAM = 1
_SMOOTH = 50  # steps over which losses are averaged to judge progress
_log = logging.getLogger(__name__)


class FitError(RuntimeError):
    """A fit that broke down: at which step and what to try."""


class Trainer:
    """Stages in turn, round after round, with all that is needed to stop and to go on.

    Parameters
    ----------
    programs
        Model and guide.
    stages
        What is minimised, in this order in every round.
    rounds
        How often.
    batches
        Rows of every step.
    options
        Of the engine.
    folder
        Checkpoint folder, or None.
    ranks
        This process among those that fit together.
    """

    def __init__(
        self,
        programs: Programs,
        stages: Sequence[Stage],
        rounds: int,
        batches: Minibatches,
        options: Options,
        folder: Path | None,
        ranks: Ranks,
    ) -> None:
        self.programs, self.stages, self.rounds = programs, stages, rounds
        self.batches, self.options, self.folder, self.ranks = batches, options, folder, ranks
        self.name = programs.problem.name
        self._rows = np.empty((1024, 4))  # loss, gradient norm, seconds, stage
        self.number = 0  # steps made
        self.round = self.place = self.turn = 0  # where in the plan: turn counts the steps of a stage in a row
        self.made = [0] * len(stages)  # steps of every stage
        self.recent = [math.nan] * len(stages)  # smoothed loss of every stage
        self.smooth = self.best_loss = math.inf
        self.best_step = 0
        self.best: dict[str, Tensor] = {}
        params = list(programs.params().values())
        if not params:
            raise ProblemError(f"{self.name}: model and guide have no parameter to fit; use run_mcmc")
        self._like = params[0]
        ranks.equalise(programs.state().values())
        self.gradients = [Gradient(programs, stage) for stage in stages]
        self._prepare()
        self.optimisers = [self._optimiser(stage) for stage in stages]
        saved = None if folder is None else ranks.first(lambda: read_state(folder))
        if saved is not None:
            self._load(saved[0])

    @property
    def history(self) -> np.ndarray:
        """Loss, gradient norm, seconds and stage of every step."""
        return self._rows[: self.number]

    @property
    def total(self) -> int:
        """Most steps that the plan can have."""
        return self.rounds * sum(stage.steps for stage in self.stages)

    def run(self) -> None:
        """Make the steps that are left.

        Raises
        ------
        FitError
            If the loss or its gradient stops being finite.
        KeyboardInterrupt
            After an interrupt, once the step is finished and the state saved.
        """
        options, saved_at = self.options, time.monotonic()
        with Interrupts() as interrupts, _quiet(), _Bar(self) as bar:
            while self._next():
                step = self._step()
                bar.show()
                ended = any([callback(step) for callback in options.callbacks])
                due = self.folder is not None and time.monotonic() - saved_at >= options.checkpoint_every
                ended, interrupted, due = self.ranks.agree(ended, interrupts.count > 0, due)
                if ended:
                    break
                if options.patience is not None and self.number - self.best_step >= options.patience:
                    break
                if interrupted:
                    self.save()
                    how = (
                        "nothing was kept, since no checkpoint folder was given"
                        if self.folder is None
                        else f"the state is saved in {self.folder}; repeat the same call to resume"
                    )
                    raise KeyboardInterrupt(f"stopped after step {self.number} of {self.total}: {how}")
                if due:
                    self.save()
                    saved_at = time.monotonic()
        self.save()
        if options.keep == "best":
            self.programs.load_params(self.best)

    def check_room(self) -> None:
        """See that the disk holds two states at once, of which the old one goes when the new one is whole.

        Raises
        ------
        CheckpointError
            If it does not.
        """
        if self.folder is None:
            return
        params = sum(value.nbytes for value in self.programs.params().values())
        state = sum(value.nbytes for value in self.programs.state().values()) + (2 * len(self.stages) + 1) * params
        folder, needed = self.folder, 2 * (state + self.total * self._rows[0].nbytes)
        self.ranks.first(lambda: check_room(folder, needed))

    def _next(self) -> bool:
        """Go to the stage of the next step; False at the end of the plan."""
        stage = self.stages[self.place]
        below = stage.until is not None and self.turn > 0 and self.recent[self.place] < stage.until(self.round)
        if self.turn >= stage.steps or below:
            if self.place + 1 == len(self.stages) and self.round + 1 >= self.rounds:
                return False
            self.place, self.turn = (self.place + 1) % len(self.stages), 0
            self.round += self.place == 0
        return True

    def _step(self) -> Step:
        """One step of the optimiser of the present stage."""
        began = time.perf_counter()
        stage = self.stages[self.place]
        self.ranks.seed_step(self.number)
        loss, gradients = self.gradients[self.place](*self._inputs(self.number))
        params = self.programs.params()
        if self.ranks.size > 1:
            moved = {name: params[name] for name in self.programs.moved_by(stage.moves)}
            loss, gradients = self.ranks.mean(loss, gradients, moved)
        names, values = list(gradients), list(gradients.values())
        total = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(values)))
        value, norm = float(loss), float(total)
        if not math.isfinite(value) or not math.isfinite(norm):
            raise FitError(
                f"{self.name}: at step {self.number + 1} the loss is {value} and its gradient norm {norm}; "
                f"try a smaller lr than {stage.lr}, clip_norm=10, or other starting values of the guide"
            )
        limit = self.options.clip_norm
        if limit is not None and norm > limit:
            values = list(torch._foreach_mul(values, limit / (norm + 1e-6)))
        lr = stage.lr * stage.schedule(self.made[self.place])
        self.optimisers[self.place].step(params, dict(zip(names, values, strict=True)), lr)
        return self._record(value, norm, began)

    def _record(self, loss: float, norm: float, began: float) -> Step:
        place = self.place
        self.made[place] += 1
        self.turn += 1
        self.number += 1
        weight = max(0.1, 1 / self.made[place])
        self.recent[place] = loss if self.made[place] == 1 else (1 - weight) * self.recent[place] + weight * loss
        judged = self.number - self.options.kl_warmup  # losses before have other weights
        if judged > 0:
            weight = max(1 / _SMOOTH, 1 / judged)
            self.smooth = loss if judged == 1 else (1 - weight) * self.smooth + weight * loss
        if judged <= 0 or self.smooth < self.best_loss:
            self.best_loss, self.best_step = self.smooth, self.number
            if self.options.keep == "best":
                self._keep()
        if self.number > len(self._rows):
            self._rows = np.concatenate([self._rows, np.empty_like(self._rows)])
        seconds = time.perf_counter() - began
        self._rows[self.number - 1] = loss, norm, seconds, place
        return Step(self.number, loss, norm, seconds, self.stages[place].label)

    def _keep(self) -> None:
        params = self.programs.params()
        if self.best.keys() == params.keys():
            with torch.no_grad():
                torch._foreach_copy_([self.best[name] for name in params], list(params.values()))
        else:
            self.best = {name: value.detach().clone() for name, value in params.items()}

    def _inputs(self, step: int) -> tuple[dict[str, Tensor], Tensor | None]:
        """Rows and weight of the KL divergence of a step, counted from 0."""
        warmup = self.options.kl_warmup
        weight = None if not warmup else torch.as_tensor(min(step / warmup, 1.0)).to(self._like)
        return self.ranks.share(self.batches.at(step)), weight

    def _prepare(self) -> None:
        """Check everything that a step needs, and capture what can be, without a trace in state or random numbers."""
        saved, buffers = rng_tensors(), {k: v.clone() for k, v in self.programs.buffers().items()}
        wanted = self.options.compile
        compiler = wanted or ("graph" if self.total >= _GRAPH_STEPS else "eager")
        self.batches.check(self.programs.problem, self.programs.model)
        examples = [self._inputs(step) for step in (0, max(1, self.options.kl_warmup // 2))]
        with _quiet():
            for gradient in self.gradients:
                gradient.check(*examples[0])
                with pyro.validation_enabled(False):
                    if compiler != "eager":
                        self._capture(gradient, compiler, examples)
        for name, buffer in self.programs.buffers().items():
            buffer.copy_(buffers[name])
        restore_rng(saved)

    def _capture(self, gradient: Gradient, compiler: str, examples: Any) -> None:
        try:
            gradient.capture(compiler, examples)
        except CaptureError as error:
            gradient.execution = f"eager: {error}"
            level = logging.INFO if self.options.compile is None else logging.WARNING
            _log.log(level, "%s: %s runs eagerly: %s", self.name, gradient.stage.label, error)

    def _optimiser(self, stage: Stage) -> Adam:
        if not self.programs.moved_by(stage.moves):
            raise ProblemError(
                f"{self.name}: {stage.label} has nothing to move: the {stage.moves} has no parameter of its own"
            )
        return Adam()

    def save(self) -> None:
        """Commit the state to the checkpoint folder, if there is one."""
        if self.folder is None:
            return
        state: dict[str, Any] = dict(self.programs.state())
        state |= {f"best/{name}": value for name, value in self.best.items()}
        for place, optimiser in enumerate(self.optimisers):
            state |= {f"adam/{place}/{name}": value for name, value in optimiser.state_dict().items()}
            known: dict[str, Any] = getattr(self.stages[place].objective, "state_dict", dict)()
            state |= {f"objective/{place}/{name}": value for name, value in known.items()}
            state |= {f"made/{place}": self.made[place], f"recent/{place}": self.recent[place]}
        state |= {f"rng/{name}": value for name, value in rng_tensors().items()}
        state |= {name: getattr(self, name) for name in _SCALARS}
        state["rows"], folder = torch.from_numpy(self.history), self.folder
        self.ranks.first(lambda: write_state(folder, self.number, state, {}))

    def _load(self, state: Mapping[str, Any]) -> None:
        self.programs.load(state)
        self.best = part(state, "best/")
        for place, (stage, optimiser) in enumerate(zip(self.stages, self.optimisers, strict=True)):
            optimiser.load_state_dict(part(state, f"adam/{place}/"))
            if hasattr(stage.objective, "load_state_dict"):
                stage.objective.load_state_dict(part(state, f"objective/{place}/"))
            self.made[place], self.recent[place] = state[f"made/{place}"], state[f"recent/{place}"]
        for name in _SCALARS:
            setattr(self, name, state[name])
        self._rows = np.concatenate([state["rows"].numpy(), np.empty((1024, 4))])
        restore_rng(part(state, "rng/"))


_SCALARS = ("number", "round", "place", "turn", "smooth", "best_loss", "best_step")


class _Bar:
    """Progress with the time that is left, the smoothed loss and the present stage; drawn ten times a second."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self._shown_at = 0.0

    def __enter__(self) -> _Bar:
        trainer = self.trainer
        label = trainer.stages[0].label if len(trainer.stages) == 1 else "em"
        total, done = trainer.total, min(trainer.number, trainer.total)
        self._bar = tqdm(total=total, initial=done, disable=not trainer.options.progress, desc=label, unit="step")
        return self

    def show(self) -> None:
        """Draw it, if it is time."""
        if not self.trainer.options.progress or time.monotonic() - self._shown_at < 0.1:
            return
        self._shown_at = time.monotonic()
        self._draw()

    def _draw(self) -> None:
        trainer = self.trainer
        _, norm, _, place = trainer.history[-1]
        stage = f"{trainer.stages[int(place)].label} " if len(trainer.stages) > 1 else ""
        self._bar.set_postfix_str(f"{stage}loss {trainer.recent[int(place)]:.4g}, gradient {norm:.3g}", refresh=False)
        self._bar.update(trainer.number - self._bar.n)

    def __exit__(self, *exc: object) -> None:
        if self.trainer.options.progress and self.trainer.number > self._bar.n:
            self._draw()
        self._bar.close()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Pyro's checks off, and its warnings of losses that are not finite, which are errors here."""
    with warnings.catch_warnings(), pyro.validation_enabled(False):
        warnings.filterwarnings("ignore", message="Encountered (NaN|\\+inf)")
        yield


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype | None) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def fit(
    problem: Problem,
    engine: str,
    plan: Callable[[Problem, Minibatches], Sequence[Stage]],
    rounds: int,
    options: Options,
    settings: Mapping[str, Any],
    fixed: Mapping[str, Any],
) -> Result:
    """Fit a problem by a plan and draw from its guide.

    Parameters
    ----------
    problem
        What to infer.
    engine
        Name for the result.
    plan
        Makes the stages.
    rounds
        How often they follow each other.
    options
        What the engine was given.
    settings
        What the engine was given beyond ``options``, for the record.
    fixed
        What of that has to be the same in a resumed fit, JSON-ready.
    """
    name = problem.name
    if problem.guide is None:
        raise ProblemError(f"{name}: fit_{engine} needs a guide and the problem has none; use run_mcmc")
    options.check(name)
    dtype = options.torch_dtype(name)
    problem = problem if options.device is None else problem.to(options.device)
    problem = problem if dtype is None else cast(problem, dtype)
    with _default_dtype(dtype):
        problem.validate()
        size = join(name, options.distributed)
        wanted = options.batch_size if size == 1 else shared_sizes(problem, options.batch_size)
        batches = Minibatches(problem, wanted, options.seed)
        ranks = Ranks(problem, batches.sizes, options.seed, size)
        if ranks.rank > 0:
            options = replace(options, progress=False, callbacks=())
        target, folder = options.checkpoint, None
        with contextlib.ExitStack() as stack:
            if target is not None or size > 1:
                same = {**_identity(problem, engine, options, fixed), **ranks.identity()}
                ranks.check_same(name, same)
            if target is not None:
                folder = ranks.first(lambda: stack.enter_context(open_checkpoint(target, same)))
            stack.enter_context(single_thread())
            programs = stack.enter_context(opened(problem, options.seed))
            programs.check_stable()
            pyro.set_rng_seed(options.seed)
            trainer = Trainer(programs, plan(problem, batches), rounds, batches, options, folder, ranks)
            trainer.check_room()
            trainer.run()
            finish = getattr(programs.guide, "finish", None)  # what a guide does once its parameters are fitted
            if finish is not None:
                finish(replace(problem, model=programs.model))
            ranks.equalise([*programs.state().values(), torch.from_numpy(trainer.history)])
            state = programs.result_state()
            pyro.set_rng_seed(chain_seed(options.seed, _SAMPLE_STREAM))
            draws, log_weight = sample_guide(problem, programs.model, programs.guide, num_samples=options.num_samples)
        groups = take_marginals(problem, draws)
        posterior = to_dataset(draws, problem.dims(), problem.coords)
        groups |= {"sample_stats": to_dataset({"log_weight": log_weight}, {}, {}), "fit": _history(trainer)}
        shown = {**settings, **{key: value for key, value in vars(options).items() if key in _RECORDED}}
        tree = build_tree(problem, posterior, engine=engine, seed=options.seed, settings=shown, groups=groups)
    tree.attrs["execution"] = "; ".join(
        gradient.execution if len(trainer.gradients) == 1 else f"{gradient.stage.label}: {gradient.execution}"
        for gradient in trainer.gradients
    )
    return Result(tree, state)


_RECORDED = ("batch_size", "num_samples", "clip_norm", "patience", "keep", "kl_warmup", "compile", "seed", "dtype")


def _identity(problem: Problem, engine: str, options: Options, fixed: Mapping[str, Any]) -> dict[str, Any]:
    """All that decides the numbers of a fit."""
    names = ("batch_size", "clip_norm", "patience", "keep", "kl_warmup", "compile", "seed")
    chosen = {key: fingerprint(getattr(options, key)) for key in names}
    return {"engine": engine, **identity(problem), **chosen, **fixed, "dtype": str(torch.get_default_dtype())}


def _history(trainer: Trainer) -> xr.Dataset:
    """Loss, gradient norm and seconds by step, numbered from 1; the stage where there are several."""
    table = trainer.history
    variables: dict[str, Any] = {
        name: ("step", table[:, column].copy()) for column, name in enumerate(("loss", "grad_norm", "seconds"))
    }
    if len(trainer.stages) > 1:
        labels = np.array([stage.label for stage in trainer.stages])
        variables["phase"] = ("step", labels[table[:, 3].astype(int)])
    return xr.Dataset(variables, coords={"step": np.arange(1, len(table) + 1)})
