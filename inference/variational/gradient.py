"""Loss and gradient of one objective, evaluated as written or captured as a graph."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro.infer import ELBO
from torch import Tensor

from probmodels.errors import CaptureError, FitError, ProblemError
from probmodels.inference.programs.capture import capture, compare, compile_graph, lift
from probmodels.inference.programs.minibatch import subsampled
from probmodels.inference.programs.programs import Programs
from probmodels.inference.runtime.ops import FixGenerated
from probmodels.inference.variational.losses import KLWeight, Objective
from probmodels.inference.variational.options import Schedule

__all__ = ["Gradient", "Stage"]

_log = logging.getLogger(__name__)


@dataclass
class Stage:
    """One objective with the parameters that it moves: what `fit_svi`, or a `Phase` of `fit_em`, makes of a problem.

    Nothing is left open here. A phase is what a reader writes down, with names and gaps, and what results keep.

    Attributes
    ----------
    label
        Name in the history.
    objective
        Function ``(model, guide, *args, **kwargs) -> Tensor ()``, or an ELBO that is run by its own methods.
    moves
        ``"guide"``, ``"model"`` or ``"both"``.
    steps
        Most steps in a row.
    lr
        Step size of Adam.
    schedule
        From the steps that this stage has made to a factor of ``lr``.
    until
        From the round, counted from 0, to a loss; once the smoothed loss is below, the next stage follows.
    courses
        From the round to a value, by name: what the objective takes by its method ``at``.
    static
        Whether the objective depends on nothing but parameters, data and random numbers, so that it may be captured.
    """

    label: str
    objective: Objective | ELBO
    moves: str
    steps: int
    lr: float
    schedule: Schedule = lambda step: 1.0
    until: Callable[[int], float] | None = None
    courses: Mapping[str, Callable[[int], float]] = field(default_factory=dict)
    static: bool = True


class Gradient:
    """Loss and gradient of an objective, evaluated as written or as a captured graph.

    Parameters
    ----------
    programs
        Model and guide.
    stage
        What is minimised.
    followers
        Modules whose buffers change between steps.

    Attributes
    ----------
    execution
        ``"graph"``, ``"inductor"``, ``"eager"``, or ``"eager: <why>"`` where a graph was wanted.
    """

    def __init__(self, programs: Programs, stage: Stage, followers: Sequence[Any] = ()) -> None:
        self.programs, self.stage, self.followers = programs, stage, followers
        self.execution = "eager"
        self._model = FixGenerated()(programs.model)
        self._moved = set(programs.moved_by(stage.moves)) if stage.moves != "both" else None
        self._graph: Callable[..., Any] | None = None
        self._names: list[str] = []  # parameters with a gradient, in the order of the graph's outputs
        self._leaves: list[Tensor] = []

    def __call__(self, indices: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
        """Loss () and gradients by parameter.

        Parameters
        ----------
        indices
            Rows that the step sees, by plate.
        values
            What changes from step to step, () by name: ``kl``, the weight of the KL divergence, and what the objective
            takes by its method ``at``.
        """
        if self._graph is None:
            return self._evaluate(indices, values)
        with torch.no_grad():
            try:
                loss, *gradients = self._graph(*self._leaves, *indices.values(), *values.values())
            except RuntimeError as error:
                raise FitError(
                    f"{self.programs.problem.name}: the captured graph fails at a step ({str(error).splitlines()[0]}): "
                    "sizes depend on values that change; give compile='eager'"
                ) from error
        return loss, dict(zip(self._names, gradients, strict=True))

    def check(self, indices: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
        """Evaluate the objective once with pyro's own checks on, which the steps then do without.

        Raises
        ------
        ProblemError
            If it cannot be evaluated.
        """
        try:
            with pyro.validation_enabled(True), subsampled(indices):
                objective, model, guide, args, kwargs = self._arguments(values)
                evaluate = getattr(objective, "loss", objective)
                loss = evaluate(model, guide, *args, **kwargs)
        except ProblemError:
            raise
        except (ValueError, RuntimeError, IndexError) as error:
            rows = "; model and guide see a subset of rows here" if indices else ""
            text = (str(error).strip() or type(error).__name__).partition("Trace Shapes:")[0]  # with pyro's advice
            text = " ".join(text.split())
            raise ProblemError(f"{self.programs.problem.name}: the loss cannot be evaluated: {text}{rows}") from error
        if evaluate is objective and not (isinstance(loss, Tensor) and loss.numel() == 1):
            shape = f" of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else ""
            raise ProblemError(
                f"{self.programs.problem.name}: {self.stage.label} gives a {type(loss).__name__}{shape}; "
                "return a loss, Tensor ()"
            )

    def capture(
        self,
        compiler: str,
        examples: Sequence[tuple[Mapping[str, Tensor], Mapping[str, Tensor]]],
        say: Callable[[str], None],
    ) -> None:
        """Exchange the objective for a graph of it, if it has one, which agrees with it at all ``examples``.

        Parameters
        ----------
        compiler
            ``"graph"`` or ``"inductor"``.
        examples
            Indices and values as `__call__` takes them.
        say
            Is told what is being done.

        Raises
        ------
        CaptureError
            If there is no such graph.
        """
        if hasattr(self.stage.objective, "loss_and_grads"):
            raise CaptureError(f"{type(self.stage.objective).__name__} computes its gradient by methods of its own")
        if not self.stage.static:
            raise CaptureError("its objective may depend on more than parameters and data")
        say(f"capturing {self.stage.label} as a graph")
        params = self.programs.params()
        before = {name: value.clone() for name, value in self.programs.buffers().items()}
        _, gradients = self._evaluate(*examples[0])
        changed = [name for name, value in self.programs.buffers().items() if not torch.equal(value, before[name])]
        if changed:
            raise CaptureError(f"buffers change during a step: {changed}")
        moving = [getattr(one, name) for one in self.followers for name in one.moving]
        self._names, self._leaves = list(gradients), [*params.values(), *moving]
        rows, names = (list(part) for part in examples[0])

        def function(*inputs: Tensor) -> tuple[Tensor, ...]:
            indices = dict(zip(rows, inputs, strict=False))
            loss, found = self._evaluate(indices, dict(zip(names, inputs[len(rows) :], strict=True)))
            return loss, *(found[name] for name in self._names)

        def at(*arguments: Tensor) -> tuple[Tensor, ...]:
            with torch.no_grad():
                for leaf, value in zip(self._leaves, arguments, strict=False):
                    leaf.copy_(value)
            return function(*arguments[len(self._leaves) :])

        kept = [leaf.detach().clone() for leaf in self._leaves]
        arguments = [(*kept, *indices.values(), *values.values()) for indices, values in examples]
        graph = capture(lift(function, self._leaves, *arguments[0][len(kept) :]), *arguments[0])
        state = torch.get_rng_state()
        try:
            for index, example in enumerate(arguments):
                moved = [v + 0.01 * index * (1 + v.abs()) * torch.randn_like(v) for v in kept]
                compare(at, graph, (*moved, *example[len(kept) :]), None)
            self._graph, self.execution = graph, "graph"
            if compiler != "graph":
                say(f"compiling {self.stage.label}")
                self._compile(compiler, at, arguments[0])
        finally:
            torch.set_rng_state(state)
            with torch.no_grad():
                for leaf, value in zip(self._leaves, kept, strict=True):
                    leaf.copy_(value)

    def _compile(self, compiler: str, at: Callable[..., Any], arguments: Sequence[Tensor]) -> None:
        """Exchange the graph for machine code; where that fails it stays a graph."""
        try:
            compiled = compile_graph(self._graph, compiler, *arguments)  # type: ignore[arg-type]
            compare(at, compiled, arguments, None)
        except CaptureError as error:
            self.execution = f"graph: {error}"
            _log.warning(
                "%s: %s: not compiled, run as a graph: %s", self.programs.problem.name, self.stage.label, error
            )
        else:
            self._graph, self.execution = compiled, compiler

    def _evaluate(self, indices: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
        with torch.enable_grad(), subsampled(indices):
            objective, model, guide, args, kwargs = self._arguments(values)
            if hasattr(objective, "loss_and_grads"):
                for value in self.programs.params().values():
                    value.grad = None
                loss = objective.loss_and_grads(model, guide, *args, **kwargs)
                gradients = {name: value.grad for name, value in self._targets().items()}
            else:
                loss = objective(model, guide, *args, **kwargs)
                targets = self._targets()  # a program may make a parameter late
                if loss.requires_grad:
                    found = torch.autograd.grad(loss, list(targets.values()), allow_unused=True)
                    gradients = dict(zip(targets, found, strict=True))
                else:
                    gradients = {}
                loss = loss.detach()
        return loss, {name: value for name, value in gradients.items() if value is not None}

    def _targets(self) -> dict[str, Tensor]:
        params = self.programs.params()
        return params if self._moved is None else {name: params[name] for name in params if name in self._moved}

    def _arguments(self, values: Mapping[str, Tensor]) -> tuple[Any, Any, Any, tuple[Any, ...], Mapping[str, Any]]:
        """Objective, model, guide and their arguments, at values of what changes."""
        objective: Any = self.stage.objective
        if self.stage.courses:
            objective = objective.at({name: values[name] for name in self.stage.courses})
        model, guide = self._model, self.programs.guide
        if "kl" in values:
            model, guide = KLWeight(values["kl"], guide=False)(model), KLWeight(values["kl"], guide=True)(guide)
        return objective, model, guide, self.programs.problem.args, self.programs.problem.kwargs
