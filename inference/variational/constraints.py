"""Equality constraints on parameters while they are fitted, by augmented Lagrangians.

A `Constraint` is a module of a model or guide that adds ``multiplier h + penalty h^2 / 2`` to what is minimised, for an
h that shall become 0. `fit_svi` and `fit_em` let it follow their steps: every so often the multiplier grows by
``penalty h``, and the penalty itself where |h| has not fallen enough since.

References
----------
Nocedal, J. and Wright, S. (2006). Numerical optimization, chapter 17.3. Springer.
Zheng, X., Aragam, B., Ravikumar, P. and Xing, E. (2018). DAGs with NO TEARS. NeurIPS. https://arxiv.org/abs/1803.01422
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Protocol, runtime_checkable

import torch
from annotated_types import Ge, Interval
from torch import Tensor, nn

from probmodels.errors import ProblemError
from probmodels.options import Count, Natural, Positive, checked

if TYPE_CHECKING:
    from probmodels.inference.variational.options import Step

__all__ = ["Constraint", "Follower", "followers"]


@runtime_checkable
class Follower(Protocol):
    """A module that changes some of its buffers between steps.

    Attributes
    ----------
    moving
        Names of the buffers that it changes, which captured graphs then read anew at every step.
    """

    moving: tuple[str, ...]

    def after_step(self, step: Step) -> None:
        """Take note of a step."""


def followers(*programs: Any) -> list[Any]:
    """Modules of programs that follow the steps of an engine, each once."""
    found = {id(one): one for part in programs if isinstance(part, nn.Module) for one in part.modules()}
    return [one for one in found.values() if isinstance(one, Follower)]


class Constraint(nn.Module):
    """``h = 0`` by an augmented Lagrangian.

    Parameters
    ----------
    violation
        Gives h () from parameters of the same model or guide: a module of it, or a method of one.
    every
        Steps between changes of the multiplier.
    growth
        Factor of the penalty where |h| has not fallen to ``fall`` times what it was.
    fall
        Share of h that has to be left behind.
    start
        Steps before the first change.
    penalty, most
        First and largest penalty.

    Raises
    ------
    ProblemError
        If an option is out of range.
    """

    multiplier: Tensor
    penalty: Tensor
    before: Tensor
    moving = ("multiplier", "penalty", "before")

    @checked(ProblemError)
    def __init__(
        self,
        violation: Callable[[], Tensor],
        *,
        every: Count = 100,
        growth: Annotated[float, Ge(1)] = 3.0,
        fall: Annotated[float, Interval(gt=0, le=1)] = 0.5,
        start: Natural = 0,
        penalty: Positive = 1.0,
        most: Positive = 1e8,
    ) -> None:
        super().__init__()
        if penalty > most:
            raise ProblemError(f"penalty={penalty} exceeds most={most}; give a smaller one")
        self._violation = (violation,)  # in a tuple, or a module's parameters would be registered here as well
        self.every, self.growth, self.fall = every, growth, fall
        self.start, self.most = start, most
        self.register_buffer("multiplier", torch.zeros(()))
        self.register_buffer("penalty", torch.tensor(float(penalty)))
        self.register_buffer("before", torch.tensor(torch.inf))

    def violation(self) -> Tensor:
        """What shall be zero ()."""
        return self._violation[0]()

    def forward(self) -> Tensor:
        """What is added to the loss ()."""
        h = self.violation()
        return self.multiplier * h + 0.5 * self.penalty * h**2

    def after_step(self, step: Step) -> None:
        """Raise the multiplier, and the penalty if h falls too slowly, where a round of steps is over."""
        if step.number <= self.start or (step.number - self.start) % self.every:
            return
        with torch.no_grad():
            h = self.violation().detach()
            self.multiplier += self.penalty * h
            if float(h.abs()) > self.fall * float(self.before):
                self.penalty.mul_(self.growth).clamp_(max=self.most)
            self.before.copy_(h.abs())
