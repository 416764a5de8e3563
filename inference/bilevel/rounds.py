"""Rounds of a bilevel fit: inner steps, a step of the hyperparameters after every few of them, and a judgement."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from probmodels.errors import CheckpointError, FitError, ProblemError
from probmodels.inference.bilevel.hypergradients import (
    Descent,
    Found,
    Losses,
    agreement,
    hypergradient,
    norm,
)
from probmodels.inference.bilevel.scoring import SCORES, score_guide
from probmodels.inference.programs.programs import Programs
from probmodels.inference.runtime.ops import FixGenerated, chain_seed, isolated, part
from probmodels.inference.variational.loop import Loop, Setting
from probmodels.inference.variational.losses import make_loss, objective_of
from probmodels.inference.variational.optimiser import Adam, can_project, project
from probmodels.inference.variational.options import Step

__all__ = ["STOP_BY", "Plan", "Rounds"]

STOP_BY = SCORES
_ROUND_STREAM, _SCORE_STREAM = 3, 4

Values = dict[str, Tensor]


@dataclass(frozen=True)
class Plan:
    """What is `fit_bilevel`'s own; see there."""

    num_rounds: int
    inner_steps: int
    unroll_steps: int
    hypergrad: str
    lr: float
    optimiser: str
    hyper_lr: float
    hyper_optimiser: str
    hyper_decay: float
    solver_steps: int
    damping: float
    restart: bool
    tolerance: float | None
    compare: str | None
    stop_by: str
    num_scores: int
    num_particles: int | None


class Rounds(Loop):
    """Rounds of inner steps with a step of the hyperparameters after every few of them."""

    label = "bilevel"

    def __init__(self, setting: Setting, plan: Plan) -> None:
        columns = ["round", "inner_loss", "outer_loss", "grad_norm", "hypergrad_norm", "seconds"]
        super().__init__(setting, columns + ["cosine", "relative_error"] * (plan.compare is not None))
        problem = self.programs.problem
        assert problem.outer is not None
        self.plan, self.hyper = plan, dict(problem.outer.hyper)
        self.total = plan.num_rounds * math.ceil(plan.inner_steps / plan.unroll_steps)
        others = [Programs(other, self.programs.memo) for other in problem.outer.problems()]
        self._outer, self._judge = others[0], others[-1]
        self.bar.say("checking the outer problem")
        for programs in others:
            programs.check_stable()
        self._leaves = self.programs.params()
        self._check_parameters(others)
        self.inner = [name for name in self._leaves if name not in self.hyper]
        self._losses = Losses(*(self._loss(programs) for programs in (self.programs, self._outer)))
        self._descent = Descent(plan.optimiser, plan.lr, {})
        self._optimiser = Adam()
        self.round = self._made = 0  # steps of the hyperparameters in this round
        self._highest = self._lowest = math.inf
        self._lowest_at = self._inner_made = 0
        self._scores: list[list[float]] = []
        self._best_score, self._best_round = math.inf, -1
        self.best: Values = {}
        self._start = norm(self._values(self.inner))
        self._check_reach()
        self._check_judge()
        self.resume()

    # -- the loop ------------------------------------------------------------------------------------------------------

    @property
    def execution(self) -> str:
        """How steps were evaluated."""
        return "eager"

    @property
    def progress(self) -> str:
        """Round, losses and the best score so far."""
        row = dict(zip(self._columns, self.history[-1], strict=True))
        best = f", best {self.plan.stop_by} {self._best_score:.4g}" if self._scores else ""
        return f"round {int(row['round']) + 1}: inner {row['inner_loss']:.4g}, outer {row['outer_loss']:.4g}{best}"

    @property
    def stalled(self) -> bool:
        """Whether as many rounds as the options say have brought nothing better."""
        patience = self.options["patience"]
        return patience is not None and bool(self._scores) and len(self._scores) - 1 - self._best_round >= patience

    def advance(self) -> Step | None:
        """Some inner steps and one of the hyperparameters; at the end of a round, its judgement."""
        plan = self.plan
        if self.round >= plan.num_rounds:
            return None
        began = time.perf_counter()
        if self._made == 0:
            self._begin_round()
        steps = min(plan.unroll_steps, plan.inner_steps - self._inner_made)
        seed = int(torch.randint(2**31, ()))
        inner, hyper, descent = self._values(self.inner), self._values(list(self.hyper)), self._descent.copy()
        found = self._hypergradient(plan.hypergrad, inner, hyper, self._descent, steps, seed)
        extra: tuple[float, ...] = ()
        if plan.compare is not None:
            other = self._hypergradient(plan.compare, inner, hyper, descent, steps, seed)
            extra = agreement(found.gradient, other.gradient)
        size = norm(found.gradient)
        self._finite(found, size)
        self._put(found.inner)
        self._move_hyper(found.gradient)
        self._made += 1
        self._inner_made += steps
        losses = found.inner_loss, found.outer_loss
        self.record(self.round, *losses, found.inner_norm, size, time.perf_counter() - began, *extra)
        if self._inner_made >= plan.inner_steps or self._settled(found.lowest):
            self._end_round()
        return Step(self.number, found.outer_loss, size, time.perf_counter() - began, "outer")

    def settle(self) -> None:
        """Take the best round's parameters back where the options say so."""
        if self.options["keep"] == "best" and self.best:
            self.programs.load_params(self.best)

    def dataset(self) -> xr.Dataset:
        """History by step and, of the scores, by round."""
        found = super().dataset()
        found["round"] = found["round"].astype(np.int64)
        scores = np.array(self._scores).reshape(-1, len(STOP_BY))
        for place, name in enumerate(STOP_BY):
            if not np.isnan(scores[:, place]).all():
                found[name] = ("judged_round", scores[:, place])
        return found.assign_attrs(best_round=self._best_round)

    def state(self) -> dict[str, Any]:
        """Moments, best parameters, scores, and where in the plan."""
        state: dict[str, Any] = {f"moments/{name}": value for name, value in self._descent.moments.items()}
        state["count"] = self._descent.count
        state |= {f"best/{name}": value for name, value in self.best.items()}
        state |= {f"adam/{name}": value for name, value in self._optimiser.state_dict().items()}
        state["start"] = self._start
        state["scores"] = torch.tensor(self._scores, dtype=torch.float64).reshape(-1, len(STOP_BY))
        return state | {name: getattr(self, name) for name in _SCALARS}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take what `state` returned."""
        self._descent.moments, self._descent.count = part(state, "moments/"), state["count"]
        self.best = part(state, "best/")
        self._optimiser.load_state_dict(part(state, "adam/"))
        self._scores = state["scores"].tolist()
        for name in _SCALARS:
            setattr(self, name, state[name])
        restarts = self.plan.restart and self.round + 1 < self.plan.num_rounds and not self.stalled
        if restarts and not math.isclose(state["start"], self._start, rel_tol=1e-6):
            raise CheckpointError(
                f"{self.name}: the checkpoint is of a fit whose parameters had other starting values, which the next "
                "round would need; seed the making of modules (torch.manual_seed), or take another folder"
            )

    # -- rounds --------------------------------------------------------------------------------------------------------

    def _begin_round(self) -> None:
        self._highest = self._lowest = math.inf
        self._lowest_at = self._inner_made = 0
        if not self.plan.restart:
            return
        self._descent = Descent(self.plan.optimiser, self.plan.lr, {})
        if self.round:
            hyper = self._values(list(self.hyper))
            # Modules that functions hold are not copied with them: they were trained, and so would be the fresh ones.
            self.programs.put_back()
            with isolated(chain_seed(self.options["seed"], _ROUND_STREAM, self.round)):
                fresh = Programs(self.programs.problem).params()
            self._put({name: fresh[name].detach() for name in self.inner} | hyper)

    def _end_round(self) -> None:
        scores = self._score(self.plan.num_scores)
        self._scores.append([scores.get(name, math.nan) for name in STOP_BY])
        score = scores[self.plan.stop_by]
        if not math.isfinite(score):
            warnings.warn(
                f"{self.name}: {self.plan.stop_by} of round {self.round + 1} is {score}, and it cannot be the best: "
                "some observation has no probability under any draw",
                stacklevel=2,
            )
        if score < self._best_score:
            self._best_score, self._best_round = score, self.round
            self.best = self._values(list(self._leaves))
        self.round, self._made = self.round + 1, 0

    def _settled(self, loss: float) -> bool:
        """Whether the inner loss has stopped falling."""
        if self.plan.tolerance is None:
            return False
        if self._lowest_at == 0:
            self._highest = self._lowest = loss
        # A share of the loss itself would depend on the constants in it.
        if loss < self._lowest - self.plan.tolerance * (self._highest - self._lowest) or self._lowest_at == 0:
            self._lowest, self._lowest_at = loss, self._inner_made
        return self._inner_made - self._lowest_at >= 20

    def _score(self, num_draws: int) -> dict[str, float]:
        return score_guide(self._judge, num_draws, chain_seed(self.options["seed"], _SCORE_STREAM, self.round))

    def _move_hyper(self, gradient: Values) -> None:
        plan = self.plan
        lr = plan.hyper_lr / (1 + plan.hyper_decay * self.number)
        with torch.no_grad():
            if plan.hyper_optimiser == "adam":
                self._optimiser.step(self._leaves, gradient, lr)
            else:
                for name, slope in gradient.items():
                    self._leaves[name].sub_(slope, alpha=lr)
            for name, constraint in self.hyper.items():
                if constraint is not None:
                    self._leaves[name].copy_(project(self._leaves[name], constraint))

    def _hypergradient(
        self, method: str, inner: Values, hyper: Values, descent: Descent, steps: int, seed: int
    ) -> Found:
        options: dict[str, Any] = {"solver_steps": self.plan.solver_steps, "damping": self.plan.damping}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return hypergradient(method, self._losses, inner, hyper, descent, steps, **options)

    # -- evaluation ----------------------------------------------------------------------------------------------------

    def _loss(self, programs: Programs) -> Callable[[Values], Tensor]:
        """Loss () of a problem as a function of all parameters."""
        problem, model = programs.problem, FixGenerated()(programs.model)
        objective: Any = objective_of(make_loss(problem, self.plan.num_particles))
        evaluate = getattr(objective, "differentiable_loss", objective)
        if hasattr(objective, "prepare"):
            moves = "hyperparameters are learned, so that the posterior moves"
            self.annealing = objective.prepare(programs, moves, self.bar.say)

        def loss(values: Values) -> Tensor:
            with self.programs.standing_in(values):
                found: Tensor = evaluate(model, programs.guide, *problem.args, **problem.kwargs)
            return found

        return loss

    def _values(self, names: Sequence[str]) -> Values:
        return {name: self._leaves[name].detach().clone() for name in names}

    def _put(self, values: Values) -> None:
        with torch.no_grad():
            for name, value in values.items():
                self._leaves[name].copy_(value)

    def _check_parameters(self, others: Sequence[Programs]) -> None:
        known = set(self._leaves)
        for name, constraint in self.hyper.items():
            if name not in known:
                raise ProblemError(f"{self.name}: there is no hyperparameter {name!r}; parameters are {sorted(known)}")
            if constraint is not None and not can_project(constraint):
                raise ProblemError(
                    f"{self.name}: cannot project hyperparameter {name!r} on {constraint}; use an interval"
                )
        if not self.hyper or known == set(self.hyper):
            raise ProblemError(
                f"{self.name}: parameters are {sorted(known)}; some, but not all, must be hyperparameters"
            )
        ids = {id(value) for value in self._leaves.values()}
        for programs in others:
            parts = [part for part in (programs.model, programs.guide) if isinstance(part, nn.Module)]
            strange = [n for part in parts for n, value in part.named_parameters() if id(value) not in ids]
            if set(programs.params()) != known or strange:
                lost = sorted(set(programs.params()) ^ known) or strange
                raise ProblemError(
                    f"{self.name}: inner and outer problem do not share the parameters {lost}; give both the same "
                    "guide and modules, and pyro.param the same names"
                )

    def _check_reach(self) -> None:
        """Check that the outer loss depends on the hyperparameters, itself or through the inner parameters."""
        state = torch.get_rng_state()
        values = {name: value.requires_grad_() for name, value in self._values(list(self._leaves)).items()}
        with torch.enable_grad():
            touched = [_touched(loss(values), values) for loss in self._losses]
        torch.set_rng_state(state)
        idle = [name for name in self.hyper if name not in touched[0] | touched[1]]
        if idle:
            raise ProblemError(
                f"{self.name}: no gradient reaches the hyperparameters {idle}: neither loss depends on them, or what "
                "they are used for is not differentiable; use a straight-through or relaxed variable"
            )
        if not touched[1] & set(self.inner):
            raise ProblemError(f"{self.name}: the outer loss depends on no inner parameter; use fit_svi")

    def _check_judge(self) -> None:
        """Check that rounds can be judged as they shall be."""
        problem = self._judge.problem
        if not problem.names("observed"):
            raise ProblemError(f"{self.name}: rounds are judged by {problem.name!r}, which observes nothing; give stop")
        if self.plan.stop_by not in self._score(1):
            raise ProblemError(
                f"{self.name}: stop_by={self.plan.stop_by!r} needs observations of a discrete distribution; "
                "choose stop_by='log_loss'"
            )

    def _finite(self, found: Found, size: float) -> None:
        values = {"inner_loss": found.inner_loss, "grad_norm": found.inner_norm, "outer_loss": found.outer_loss}
        for key, value in {**values, "hypergrad_norm": size}.items():
            if not math.isfinite(value):
                raise FitError(
                    f"{self.name}: in round {self.round + 1}, step {self.number + 1}, {key} is {value}; try a smaller "
                    f"lr than {self.plan.lr}, a smaller hyper_lr than {self.plan.hyper_lr}, or damping"
                )


_SCALARS = (
    "round",
    "_made",
    "_inner_made",
    "_highest",
    "_lowest",
    "_lowest_at",
    "_best_score",
    "_best_round",
)


def _touched(loss: Tensor, values: Values) -> set[str]:
    if not loss.requires_grad:
        return set()
    found: tuple[Tensor | None, ...] = torch.autograd.grad(loss, list(values.values()), allow_unused=True)
    return {name for name, value in zip(values, found, strict=True) if value is not None}
