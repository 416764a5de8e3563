"""What `fit_svi` and `fit_em` share: stages of objectives with their optimisers, and the frame of every fit."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
import xarray as xr
from torch import Tensor

from probmodels.errors import CaptureError, FitError, ProblemError
from probmodels.inference.diagnostics.modes import look_for_modes
from probmodels.inference.labels import take_marginals, to_dataset
from probmodels.inference.problem import Problem
from probmodels.inference.programs.dependence import check_rows
from probmodels.inference.programs.enumeration import Enumeration
from probmodels.inference.programs.minibatch import Minibatches
from probmodels.inference.programs.programs import cast, identity, opened, sample_guide
from probmodels.inference.result import Result, build_tree
from probmodels.inference.runtime.checkpoint import open_checkpoint
from probmodels.inference.runtime.fingerprints import fingerprint
from probmodels.inference.runtime.memory import check_memory
from probmodels.inference.runtime.ops import (
    chain_seed,
    part,
    restore_rng,
    rng_tensors,
    single_thread,
)
from probmodels.inference.runtime.tensors import find_device
from probmodels.inference.variational.constraints import followers
from probmodels.inference.variational.data_parallel import Ranks, join, shared_sizes
from probmodels.inference.variational.gradient import Gradient, Stage
from probmodels.inference.variational.loop import Bar, Loop, Setting, quiet
from probmodels.inference.variational.optimiser import Adam
from probmodels.inference.variational.options import FitOptions, Step, find_dtype
from probmodels.options import filled

__all__ = ["Trainer", "fit"]

_GRAPH_STEPS = 200  # steps that repay a capture
_SAMPLE_STREAM = 1
_ANNEAL_STREAM = 5  # beside those of draws, of minibatches and of check_modes
_SMOOTH = 50  # steps over which losses are averaged to judge progress
_AVERAGE = 6.94  # power of the weights of an average of parameters, whose sd then is a tenth of the steps made
_log = logging.getLogger(__name__)


class Trainer(Loop):
    """Stages in turn, round after round, with all that is needed to stop and to go on.

    Parameters
    ----------
    setting
        Programs, rows, options, folder and ranks.
    stages
        What is minimised, in this order in every round.
    rounds
        How often.
    """

    def __init__(self, setting: Setting, stages: Sequence[Stage], rounds: int) -> None:
        super().__init__(setting, ("loss", "grad_norm", "seconds", "stage"))
        programs, ranks = self.programs, self.ranks
        self.stages, self.rounds = stages, rounds
        self.label = stages[0].label if len(stages) == 1 else "em"
        self.total = rounds * sum(stage.steps for stage in stages)
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
        self.followers = followers(programs.model, programs.guide)
        self.gradients = [Gradient(programs, stage, self.followers) for stage in stages]
        self.annealing = self._anneal()
        self._prepare()
        self.optimisers = [self._optimiser(stage) for stage in stages]
        self.resume()

    @property
    def execution(self) -> str:
        """How steps were evaluated, by stage."""
        if len(self.gradients) == 1:
            return self.gradients[0].execution
        return "; ".join(f"{gradient.stage.label}: {gradient.execution}" for gradient in self.gradients)

    @property
    def progress(self) -> str:
        """Stage, smoothed loss and gradient norm."""
        _, norm, _, place = self.history[-1]
        stage = f"{self.stages[int(place)].label} " if len(self.stages) > 1 else ""
        return f"{stage}loss {self.recent[int(place)]:.4g}, gradient {norm:.3g}"

    @property
    def stalled(self) -> bool:
        """Whether the smoothed loss has not improved for as many steps as the options say."""
        patience = self.options["patience"]
        return patience is not None and self.number - self.best_step >= patience

    def dataset(self) -> xr.Dataset:
        """Loss, gradient norm and seconds by step; the stage where there are several."""
        found = super().dataset()
        if len(self.stages) > 1:
            labels = np.array([stage.label for stage in self.stages])
            found["phase"] = ("step", labels[found["stage"].values.astype(int)])
        return found.drop_vars("stage")

    def settle(self) -> None:
        """Take the best or the average parameters where the options say so."""
        if self.options["keep"] != "last":
            self.programs.load_params(self.best)

    def advance(self) -> Step | None:
        """One step of the optimiser of the present stage; None at the end of the plan."""
        return self._step() if self._next() else None

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
        loss, gradients = self.gradients[self.place](*self._inputs(stage, self.number, self.round))
        params = self.programs.params()
        if self.ranks.size > 1:
            moved = {name: params[name] for name in self.programs.moved_by(stage.moves)}
            loss, gradients = self.ranks.mean(loss, gradients, moved)
        names, values = list(gradients), list(gradients.values())
        if not values:
            whose = "guide or model" if stage.moves == "both" else stage.moves
            raise ProblemError(f"{self.name}: the loss of {stage.label} depends on no parameter of the {whose}")
        total = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(values)))
        value, norm = float(loss), float(total)
        if not math.isfinite(value) or not math.isfinite(norm):
            raise FitError(
                f"{self.name}: at step {self.number + 1} the loss is {value} and its gradient norm {norm}; "
                f"try a smaller lr than {stage.lr}, clip_norm=10, or other starting values of the guide"
            )
        limit = self.options["clip_norm"]
        if limit is not None and norm > limit:
            values = list(torch._foreach_mul(values, limit / (norm + 1e-6)))
        lr = stage.lr * stage.schedule(self.made[self.place])
        self.optimisers[self.place].step(params, dict(zip(names, values, strict=True)), lr)
        return self._record(value, norm, began)

    def _record(self, loss: float, norm: float, began: float) -> Step:
        place = self.place
        self.made[place] += 1
        self.turn += 1
        seconds = time.perf_counter() - began
        self.record(loss, norm, seconds, place)
        weight = max(0.1, 1 / self.made[place])
        self.recent[place] = loss if self.made[place] == 1 else (1 - weight) * self.recent[place] + weight * loss
        judged = self.number - self.options["kl_warmup"]  # losses before have other weights
        if judged > 0:
            weight = max(1 / _SMOOTH, 1 / judged)
            self.smooth = loss if judged == 1 else (1 - weight) * self.smooth + weight * loss
        if judged <= 0 or self.smooth < self.best_loss:
            self.best_loss, self.best_step = self.smooth, self.number
            if self.options["keep"] == "best":
                self._keep()
        if self.options["keep"] == "average":
            # Step k of n has a weight in proportion to k^6.94 (Karras et al. 2024, https://arxiv.org/abs/2312.02696,
            # equation 121): the share of the fit that it looks back over is the same however long that is.
            self._keep(1 - (1 - 1 / self.number) ** (_AVERAGE + 1))
        step = Step(self.number, loss, norm, seconds, self.stages[place].label)
        for follower in self.followers:
            follower.after_step(step)
        return step

    def _keep(self, weight: float = 1.0) -> None:
        """Move what is kept to the present parameters, by this share of the way."""
        params = self.programs.params()
        if self.best.keys() == params.keys():
            with torch.no_grad():
                kept = [self.best[name] for name in params]
                if weight == 1.0:
                    torch._foreach_copy_(kept, list(params.values()))
                else:
                    torch._foreach_lerp_(kept, list(params.values()), weight)
        else:
            self.best = {name: value.detach().clone() for name, value in params.items()}

    def _inputs(self, stage: Stage, step: int, turn: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Rows of a step and what else changes with it and with the round, both counted from 0."""
        warmup = self.options["kl_warmup"]
        values = {name: course(turn) for name, course in stage.courses.items()}
        if warmup:
            values["kl"] = min(step / warmup, 1.0)
        rows = self.ranks.share(self.batches.at(step))
        return rows, {name: torch.as_tensor(value).to(self._like) for name, value in values.items()}

    def _anneal(self) -> str | None:
        """Let objectives make what they need before the first step, from the seed alone; what they say of it."""
        saved, said = rng_tensors(), []
        with quiet():
            for place, stage in enumerate(self.stages):
                pyro.set_rng_seed(chain_seed(self.options["seed"], _ANNEAL_STREAM, place))
                prepare = getattr(stage.objective, "prepare", lambda *_: None)
                said.append(prepare(self.programs, self._obstacle(stage), self.bar.say))
        restore_rng(saved)
        return "; ".join(filter(None, said)) or None

    def _obstacle(self, stage: Stage) -> str | None:
        """Why the posterior that a stage fits the guide to is not that of the model as it stands, with all rows."""
        if any(size < rows for rows, size in self.batches.sizes.values()):
            return "a step sees a part of the rows (batch_size)"
        if self.options["kl_warmup"]:
            return "the weight of the KL divergence changes (kl_warmup)"
        others = [other for other in self.stages if other is not stage and other.moves != "guide"]
        if any(self.programs.moved_by("model") for _ in others):
            return "parameters of the model are learned, so that the posterior moves"
        return None

    def _prepare(self) -> None:
        """Check everything that a step needs, and capture what can be, without a trace in state or random numbers."""
        saved, buffers = rng_tensors(), {k: v.clone() for k, v in self.programs.buffers().items()}
        wanted = self.options["compile"]
        compiler = wanted or ("graph" if self.total >= _GRAPH_STEPS else "eager")
        self.batches.check(self.programs.problem, self.programs.model)
        moments = (0, 0), (max(1, self.options["kl_warmup"] // 2), self.rounds // 2)
        with quiet():
            for gradient in self.gradients:
                self.bar.say(f"checking {gradient.stage.label}")
                examples = [self._inputs(gradient.stage, *moment) for moment in moments]
                gradient.check(*examples[0])
                with pyro.validation_enabled(False):
                    if compiler != "eager":
                        self._capture(gradient, compiler, examples)
        for name, buffer in self.programs.buffers().items():
            buffer.copy_(buffers[name])
        restore_rng(saved)

    def _capture(self, gradient: Gradient, compiler: str, examples: Any) -> None:
        try:
            gradient.capture(compiler, examples, self.bar.say)
        except CaptureError as error:
            gradient.execution = f"eager: {error}"
            level = logging.INFO if self.options["compile"] is None else logging.WARNING
            _log.log(level, "%s: %s runs eagerly: %s", self.name, gradient.stage.label, error)

    def _optimiser(self, stage: Stage) -> Adam:
        if not self.programs.moved_by(stage.moves):
            raise ProblemError(
                f"{self.name}: {stage.label} has nothing to move: the {stage.moves} has no parameter of its own"
            )
        return Adam()

    def state(self) -> dict[str, Any]:
        """Best parameters, moments of the optimisers, states of the objectives, and where in the plan."""
        state: dict[str, Any] = {f"best/{name}": value for name, value in self.best.items()}
        for place, optimiser in enumerate(self.optimisers):
            state |= {f"adam/{place}/{name}": value for name, value in optimiser.state_dict().items()}
            known: dict[str, Any] = getattr(self.stages[place].objective, "state_dict", dict)()
            state |= {f"objective/{place}/{name}": value for name, value in known.items()}
            state |= {f"made/{place}": self.made[place], f"recent/{place}": self.recent[place]}
        return state | {name: getattr(self, name) for name in _SCALARS}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take what `state` returned."""
        self.best = part(state, "best/")
        for place, (stage, optimiser) in enumerate(zip(self.stages, self.optimisers, strict=True)):
            optimiser.load_state_dict(part(state, f"adam/{place}/"))
            if hasattr(stage.objective, "load_state_dict"):
                stage.objective.load_state_dict(part(state, f"objective/{place}/"))
            self.made[place], self.recent[place] = state[f"made/{place}"], state[f"recent/{place}"]
        for name in _SCALARS:
            setattr(self, name, state[name])


_SCALARS = ("round", "place", "turn", "smooth", "best_loss", "best_step")


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
    make: Callable[[Setting], Loop],
    options: FitOptions,
    settings: Mapping[str, Any],
    fixed: Mapping[str, Any],
) -> Result:
    """Fit a problem by a loop and draw from its guide.

    Parameters
    ----------
    problem
        What to infer.
    engine
        Name for the result.
    make
        Makes the loop.
    options
        What the engine was given; defaults are taken for what is left out.
    settings
        What the engine was given beyond ``options``, for the record.
    fixed
        What of that has to be the same in a resumed fit, JSON-ready.
    """
    name, options = problem.name, filled(FitOptions, options)
    dtype, device = _check(problem, engine, options)
    problem = problem if device is None else problem.to(device)
    problem = problem if dtype is None else cast(problem, dtype)
    rank, size = join(name, options["distributed"])
    if rank > 0:
        options |= {"progress": False, "callbacks": ()}
    seed = options["seed"]
    with _default_dtype(dtype), Bar(f"{name}: fit_{engine}", options["progress"]) as bar:
        bar.say("checking the problem")
        problem.validate()
        check_rows(problem)
        if any(site.enumerated for site in problem.sites.values()):
            Enumeration(problem).check()
        _check_draws(problem, options)
        wanted = options["batch_size"] if size == 1 else shared_sizes(problem, options["batch_size"])
        batches = Minibatches(problem, wanted, seed)
        ranks = Ranks(problem, batches.sizes, seed, size)
        with contextlib.ExitStack() as stack:
            folder = _open_checkpoint(stack, problem, engine, options, fixed, ranks)
            stack.enter_context(single_thread())
            programs = stack.enter_context(opened(problem, seed))
            programs.check_stable()
            pyro.set_rng_seed(seed)
            loop = make(Setting(programs, batches, options, folder, ranks, bar))
            loop.check_room()
            loop.run()
            programs.end_training()
            bar.say("drawing from the guide")
            finish = getattr(programs.guide, "finish", None)  # what a guide does once its parameters are fitted
            if finish is not None:
                finish(replace(problem, model=programs.model))
            ranks.equalise([*programs.state().values(), torch.from_numpy(loop.history)])
            state = programs.result_state()
            pyro.set_rng_seed(chain_seed(seed, _SAMPLE_STREAM))
            draws, weights = sample_guide(problem, programs.model, programs.guide, num_samples=options["num_samples"])
        groups = take_marginals(problem, draws)
        posterior = to_dataset(draws, problem.dims(), problem.coords)
        groups |= {"sample_stats": weights, "fit": loop.dataset()}
        shown = {**settings, **{key: options.get(key) for key in _RECORDED}}
        tree = build_tree(problem, posterior, engine=engine, seed=seed, settings=shown, groups=groups)
    tree.attrs["execution"] = loop.execution
    if loop.annealing is not None:
        tree.attrs["annealing"] = loop.annealing
    result = Result(tree, state)
    if size == 1:
        with single_thread(), _default_dtype(dtype):
            look_for_modes(problem, result, seed=seed)
    return result


def _check(problem: Problem, engine: str, options: FitOptions) -> tuple[torch.dtype | None, torch.device | None]:
    """Type and device to compute in, after the checks that no annotation makes."""
    name, every = problem.name, options["checkpoint_every"]
    if problem.guide is None:
        raise ProblemError(f"{name}: fit_{engine} needs a guide and the problem has none; use run_mcmc")
    folder = options["checkpoint"]
    if folder is not None and (not str(folder) or "\0" in str(folder)):
        raise ProblemError(f"{name}: checkpoint={folder!r}; give a folder, or None for no checkpoint")
    if folder is None and every != filled(FitOptions, {})["checkpoint_every"]:
        raise ProblemError(f"{name}: checkpoint_every={every!r} is not used without checkpoint; leave it out")
    return find_dtype(name, options["dtype"]), find_device(name, options["device"])


def _check_draws(problem: Problem, options: FitOptions) -> None:
    """Check that the draws will fit into memory."""
    kept = [site for name, site in problem.sites.items() if site.kind != "observed" and name not in problem.transient]
    count, item = options["num_samples"], torch.empty(0).element_size()
    size = count * item * sum(math.prod(site.shape) for site in kept)
    check_memory(problem.name, size, torch.device("cpu"), f"num_samples={count} draws", "take fewer of them")


def _open_checkpoint(
    stack: contextlib.ExitStack,
    problem: Problem,
    engine: str,
    options: FitOptions,
    fixed: Mapping[str, Any],
    ranks: Ranks,
) -> Path | None:
    """Checkpoint folder of a fit, if it was given one; all ranks agree that they fit the same."""
    target = options["checkpoint"]
    if target is None and ranks.size == 1:
        return None
    same = {**_identity(problem, engine, options, fixed), **ranks.identity()}
    ranks.check_same(problem.name, same)
    return None if target is None else ranks.first(lambda: stack.enter_context(open_checkpoint(target, same)))


_RECORDED = ("batch_size", "num_samples", "clip_norm", "patience", "keep", "kl_warmup", "compile", "seed", "dtype")


def _identity(problem: Problem, engine: str, options: FitOptions, fixed: Mapping[str, Any]) -> dict[str, Any]:
    """All that decides the numbers of a fit."""
    names = ("batch_size", "clip_norm", "patience", "keep", "kl_warmup", "compile", "seed")
    chosen = {key: fingerprint(options.get(key)) for key in names}
    return {"engine": engine, **identity(problem), **chosen, **fixed, "dtype": str(torch.get_default_dtype())}
