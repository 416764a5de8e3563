"""Noise schedules of diffusion: how the signal fades, as a function of time.

At time t in [0, 1] a datum x is seen as ``z_t = alpha(t) x + sigma(t) noise`` with ``alpha^2 + sigma^2 = 1``. All of
a schedule lies in one increasing function, ``gamma(t) = -log(alpha^2 / sigma^2)``, minus the log signal-to-noise ratio:
``alpha^2 = sigmoid(-gamma)`` and ``sigma^2 = sigmoid(gamma)``.

References
----------
Kingma, D. P., Salimans, T., Poole, B. and Ho, J. (2021). Variational diffusion models. NeurIPS.
https://arxiv.org/abs/2107.00630
Nichol, A. and Dhariwal, P. (2021). Improved denoising diffusion probabilistic models. ICML.
https://arxiv.org/abs/2102.09672
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from annotated_types import Interval
from torch import Tensor, nn

from probmodels.errors import ProblemError
from probmodels.options import NonFinite, Width, checked

__all__ = ["SCHEDULES", "CosineSchedule", "LearnedSchedule", "LinearSchedule", "NoiseSchedule", "TableSchedule"]

_ENDS = (-13.3, 5.0)  # of Kingma et al. (2021), for images of 256 levels
_End = Annotated[float, NonFinite()]  # whose order is checked, and that they are finite


class NoiseSchedule(nn.Module):
    """What schedules share; a new one gives `gamma`, and `slope` where automatic differentiation will not do."""

    def gamma(self, t: Tensor) -> Tensor:
        """Minus the log signal-to-noise ratio at times (...), in [0, 1]."""
        raise NotImplementedError

    def slope(self, t: Tensor) -> Tensor:
        """Derivative of `gamma` with respect to time (...)."""
        with torch.enable_grad():
            t = t.detach().requires_grad_()
            # Terms of different times do not mix, so that the gradient of the sum is the derivative of each.
            (found,) = torch.autograd.grad(self.gamma(t).sum(), t, create_graph=any(True for _ in self.parameters()))
        return found

    def alpha(self, t: Tensor) -> Tensor:
        """Share of the signal (...)."""
        return torch.sigmoid(-self.gamma(t)).sqrt()

    def sigma(self, t: Tensor) -> Tensor:
        """Sd of the noise (...)."""
        return torch.sigmoid(self.gamma(t)).sqrt()

    def levels(self, num_steps: int) -> Tensor:
        """Times (num_steps + 1,) from 1 down to 0, equally spaced."""
        return torch.linspace(1.0, 0.0, num_steps + 1, dtype=torch.float64)

    def check(self, name: str = "schedule", num_points: int = 1001) -> None:
        """Check that `gamma` is finite and increases.

        Raises
        ------
        ProblemError
            If it does not; the message has the time.
        """
        with torch.no_grad():
            t = torch.linspace(0.0, 1.0, num_points, dtype=torch.float64)
            gamma = self.double_gamma(t)
        wrong = ~gamma.isfinite()
        if wrong.any():
            raise ProblemError(
                f"{name}: gamma({float(t[wrong][0]):.3g}) is {float(gamma[wrong][0])}; it must be finite"
            )
        falls = gamma.diff() <= 0
        if falls.any():
            at = int(falls.nonzero()[0])
            raise ProblemError(
                f"{name}: gamma falls or stands still from {float(gamma[at]):.5g} at t={float(t[at]):.4g} to "
                f"{float(gamma[at + 1]):.5g}; noise must increase with time"
            )

    def double_gamma(self, t: Tensor) -> Tensor:
        """`gamma` for checks, in the type of the parameters."""
        like = next(self.parameters(), None)
        return self.gamma(t if like is None else t.to(like)).double()


def _ordered(start: float, end: float) -> None:
    if not (math.isfinite(start) and math.isfinite(end) and start < end):
        raise ProblemError(f"gamma from {start} to {end}; give finite numbers, the first smaller: noise must increase")


class LinearSchedule(NoiseSchedule):
    """``gamma`` falls on a line from ``start`` at time 0 to ``end`` at time 1.

    Raises
    ------
    ProblemError
        If it would not increase.
    """

    @checked(ProblemError)
    def __init__(self, start: _End = _ENDS[0], end: _End = _ENDS[1]) -> None:
        super().__init__()
        _ordered(start, end)
        self.start, self.end = float(start), float(end)

    def gamma(self, t: Tensor) -> Tensor:
        return self.start + (self.end - self.start) * t

    def slope(self, t: Tensor) -> Tensor:
        return torch.full_like(t, self.end - self.start)


class CosineSchedule(NoiseSchedule):
    """``alpha(t) = cos(pi/2 (t + offset)/(1 + offset)) / cos(pi/2 offset/(1 + offset))``, between two values of gamma.

    Parameters
    ----------
    start, end
        Values at times 0 and 1; time is stretched so that the curve runs from the one to the other.
    offset
        Small number that keeps the noise from rising too slowly at first.

    References
    ----------
    Nichol and Dhariwal (2021), equation 17.
    """

    @checked(ProblemError)
    def __init__(
        self,
        start: _End = _ENDS[0],
        end: _End = _ENDS[1],
        offset: Annotated[float, Interval(ge=0, lt=1)] = 0.008,
    ) -> None:
        super().__init__()
        _ordered(start, end)
        self.start, self.end, self.offset = float(start), float(end), float(offset)
        self._first = math.cos(math.pi / 2 * offset / (1 + offset))
        self._from, self._to = (self._angle(value) for value in (self.start, self.end))

    def _angle(self, gamma: float) -> float:
        """Where the curve has a value of gamma; angle = acos(alpha * cos of the offset)."""
        alpha_squared = 1 / (1 + math.exp(gamma))
        return math.acos(min(1.0, math.sqrt(alpha_squared) * self._first))

    def gamma(self, t: Tensor) -> Tensor:
        alpha_squared = ((self._from + (self._to - self._from) * t).cos() / self._first) ** 2
        return torch.log1p(-alpha_squared) - alpha_squared.log()


class TableSchedule(NoiseSchedule):
    """Given levels at equally spaced times, with lines between their gammas.

    Parameters
    ----------
    alpha_squared
        ``alpha^2`` of the levels, at least 2, falling, in (0, 1): the cumulative products of ``1 - beta`` in the usual
        notation.

    Raises
    ------
    ProblemError
        If they do not fall or lie outside; the message has the place.
    """

    table: Tensor

    def __init__(self, alpha_squared: Sequence[float] | Tensor) -> None:
        super().__init__()
        table = torch.as_tensor(alpha_squared, dtype=torch.float64).flatten()
        if len(table) < 2:
            raise ProblemError(f"a schedule needs at least 2 levels; there are {len(table)}")
        outside = ~((table > 0) & (table < 1))
        if outside.any():
            at = int(outside.nonzero()[0])
            raise ProblemError(f"alpha_squared[{at}] is {float(table[at])}; it must lie strictly between 0 and 1")
        rises = table.diff() >= 0
        if rises.any():
            at = int(rises.nonzero()[0])
            raise ProblemError(
                f"alpha_squared[{at}]={float(table[at]):.5g} is not above alpha_squared[{at + 1}]="
                f"{float(table[at + 1]):.5g}; the signal must fade with time"
            )
        self.register_buffer("table", torch.log1p(-table) - table.log())

    def _place(self, t: Tensor) -> tuple[Tensor, Tensor]:
        position = t * (len(self.table) - 1)
        low = position.detach().floor().clamp(0, len(self.table) - 2).long()
        return position, low

    def gamma(self, t: Tensor) -> Tensor:
        position, low = self._place(t)
        table = self.table.to(t)
        return table[low] + (position - low) * (table[low + 1] - table[low])

    def slope(self, t: Tensor) -> Tensor:
        _, low = self._place(t)
        table = self.table.to(t)
        return (table[low + 1] - table[low]) * (len(table) - 1)


class LearnedSchedule(NoiseSchedule):
    """A monotone network between two ends, learned with the model.

    ``gamma(t) = start + (end - start) g(t)`` with ``g(0) = 0``, ``g(1) = 1`` and ``g`` a line plus a layer of sigmoids
    of t, all weights positive. In continuous time the bound does not depend on what ``g`` does in between, and the
    interior is learned by making the loss less variable (see `probmodels.diffusion`).

    Parameters
    ----------
    start, end
        Values at times 0 and 1.
    hidden
        Sigmoids.
    learn_ends
        Whether the ends are parameters too.

    References
    ----------
    Kingma et al. (2021), appendix H.
    """

    @checked(ProblemError)
    def __init__(
        self, start: _End = _ENDS[0], end: _End = _ENDS[1], *, hidden: Width = 64, learn_ends: bool = False
    ) -> None:
        super().__init__()
        _ordered(start, end)
        self.first, self.length = float(start), math.log(end - start)
        if learn_ends:
            self.ends = nn.Parameter(torch.tensor([start, math.log(end - start)]))
        # Steps at equal distances, each as wide as some of them, nearly of no weight at the start: close to a line.
        self.places = nn.Parameter(torch.linspace(0.0, 1.0, hidden))
        self.widths = nn.Parameter(torch.full((hidden,), math.log(math.expm1(hidden / 4))))
        self.weights = nn.Parameter(torch.full((hidden,), math.log(math.expm1(0.05 / hidden))))

    def _ends(self) -> tuple[Tensor | float, Tensor | float]:
        if hasattr(self, "ends"):
            return self.ends[0], self.ends[1].exp()
        return self.first, math.exp(self.length)

    def _course(self, t: Tensor) -> Tensor:
        steps = torch.sigmoid((t.unsqueeze(-1) - self.places) * F.softplus(self.widths))
        return t + steps @ F.softplus(self.weights)

    def gamma(self, t: Tensor) -> Tensor:
        low, high = self._course(t.new_tensor([0.0, 1.0]))
        start, length = self._ends()
        return start + length * (self._course(t) - low) / (high - low)

    def slope(self, t: Tensor) -> Tensor:
        return self.steadied(t)[1]

    def steadied(self, t: Tensor) -> tuple[Tensor, Tensor, Callable[[Tensor], None]]:
        """`gamma` and `slope` at times (row,), of which ends follow the loss, and what lies between its variance.

        Returns
        -------
        tuple
            gamma (row,), slope (row,), and a function that is to be given the loss (row,) made of them before its
            gradient is taken: gradients of the interior then are those of the squared loss. As its mean does not depend
            on the interior, they are those of its variance (Kingma et al. 2021, appendix I).
        """
        low, high = self._course(t.new_tensor([0.0, 1.0]))
        width, weight = F.softplus(self.widths), F.softplus(self.weights)
        bends = torch.sigmoid((t.unsqueeze(-1) - self.places) * width)
        share = (self._course(t) - low) / (high - low)
        rate = (1 + (bends * (1 - bends)) @ (width * weight)) / (high - low)
        losses: list[Tensor] = []
        for value in (share, rate):
            if value.requires_grad:
                value.register_hook(lambda gradient: gradient * 2 * losses[0])
        start, length = self._ends()
        return start + length * share, length * rate, lambda loss: losses.append(loss.detach())


SCHEDULES: dict[str, Any] = {"linear": LinearSchedule, "cosine": CosineSchedule, "learned": LearnedSchedule}
