"""Noise schedules: ends, order, slopes, and the gradients of a learned one."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from probmodels.errors import ProblemError
from probmodels.guides.schedules import (
    SCHEDULES,
    CosineSchedule,
    LearnedSchedule,
    LinearSchedule,
    NoiseSchedule,
    TableSchedule,
)

ENDS = (-6.0, 4.0)
DDPM = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))  # the table of Ho et al. (2020)


def bent(seed: int = 0, *, learn_ends: bool = False) -> LearnedSchedule:
    """A learned schedule far from a line, in double precision."""
    schedule = LearnedSchedule(*ENDS, hidden=8, learn_ends=learn_ends).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        schedule.weights.copy_(torch.randn(8, generator=generator, dtype=torch.float64))
        schedule.widths.add_(torch.randn(8, generator=generator, dtype=torch.float64))
    return schedule


MAKERS: dict[str, Callable[[], NoiseSchedule]] = {
    "linear": lambda: LinearSchedule(*ENDS),
    "cosine": lambda: CosineSchedule(*ENDS),
    "learned": lambda: LearnedSchedule(*ENDS).double(),
    "bent": bent,
    "bent, ends learned": lambda: bent(learn_ends=True),
    "table": lambda: TableSchedule(DDPM),
}


@pytest.fixture(params=MAKERS)
def schedule(request: pytest.FixtureRequest) -> NoiseSchedule:
    return MAKERS[request.param]()


def test_gamma_increases_between_its_ends(schedule: NoiseSchedule) -> None:
    schedule.check()
    time = torch.linspace(0.0, 1.0, 501, dtype=torch.float64)
    gamma = schedule.gamma(time).detach()
    assert (gamma.diff() > 0).all()
    table = isinstance(schedule, TableSchedule)
    first, last = (np.log(1 / DDPM[i] - 1) for i in (0, -1)) if table else ENDS
    assert gamma[[0, -1]].tolist() == pytest.approx([first, last], abs=1e-6)  # parameters start in single precision


def test_slope_is_the_derivative(schedule: NoiseSchedule) -> None:
    # Away from the knots of the table, where there is none.
    time = (torch.arange(1, 998, 14, dtype=torch.float64) + 0.37) / 999
    slope = schedule.slope(time).detach()
    moving = time.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(schedule.gamma(moving).sum(), moving)
    torch.testing.assert_close(slope, gradient, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(NoiseSchedule.slope(schedule, time).detach(), gradient, rtol=1e-12, atol=1e-12)
    step = 1e-6
    with torch.no_grad():
        difference = (schedule.gamma(time + step) - schedule.gamma(time - step)) / (2 * step)
    torch.testing.assert_close(slope, difference, rtol=1e-5, atol=1e-5)


def test_signal_and_noise_have_unit_variance_together(schedule: NoiseSchedule) -> None:
    time = torch.linspace(0.0, 1.0, 21, dtype=torch.float64)
    alpha, sigma = schedule.alpha(time).detach(), schedule.sigma(time).detach()
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(time))
    torch.testing.assert_close(-2 * (alpha / sigma).log(), schedule.gamma(time).detach())


def test_the_cosine_is_that_of_its_paper() -> None:
    time = torch.linspace(0.0, 0.99, 12, dtype=torch.float64)
    angle = (time + 0.008) / 1.008 * math.pi / 2
    alpha = angle.cos() / math.cos(0.008 / 1.008 * math.pi / 2)
    exact = -2 * (alpha.log() - 0.5 * (1 - alpha**2).log())
    schedule = CosineSchedule(float(exact[1]), float(exact[-1]))  # between times 0.09 and 0.99 of the paper's
    torch.testing.assert_close(schedule.gamma(torch.linspace(0.0, 1.0, 11, dtype=torch.float64)), exact[1:])


def test_a_table_is_met_at_its_levels_and_a_line_between() -> None:
    schedule = TableSchedule(DDPM)
    gamma = schedule.gamma(torch.linspace(0.0, 1.0, 1000, dtype=torch.float64))
    np.testing.assert_allclose(gamma.numpy(), np.log(1 / DDPM - 1), rtol=1e-10)
    middle = schedule.gamma(torch.tensor(0.5 / 999, dtype=torch.float64))
    assert float(middle) == pytest.approx(float(gamma[:2].mean()))
    assert TableSchedule([0.9, 0.1]).gamma(torch.tensor(1.0)).dtype == torch.float32  # as the times are


def test_levels_go_down_from_one_to_zero() -> None:
    assert LinearSchedule().levels(4).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_a_learned_schedule_starts_near_a_line_and_keeps_its_ends() -> None:
    time = torch.linspace(0.0, 1.0, 101)
    schedule = LearnedSchedule(*ENDS)
    assert float((schedule.gamma(time).detach() - LinearSchedule(*ENDS).gamma(time)).abs().max()) < 0.05 * (
        ENDS[1] - ENDS[0]
    )
    free = LearnedSchedule(*ENDS, learn_ends=True)
    torch.testing.assert_close(free.gamma(time), schedule.gamma(time))
    assert {name for name, _ in free.named_parameters()} - {name for name, _ in schedule.named_parameters()} == {"ends"}
    with torch.no_grad():
        free.ends.copy_(torch.tensor([-3.0, math.log(5.0)]))
    assert free.gamma(time)[[0, -1]].tolist() == pytest.approx([-3.0, 2.0], abs=1e-5)
    assert SCHEDULES["learned"] is LearnedSchedule


@pytest.mark.parametrize("learn_ends", [False, True])
def test_the_interior_follows_the_square_of_the_loss_and_the_ends_the_loss(learn_ends: bool) -> None:
    # A loss of gamma, its slope and a network, as that of diffusion is.
    time = torch.linspace(0.02, 0.97, 9, dtype=torch.float64)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 1)).double()

    def loss(schedule: LearnedSchedule, steadied: bool) -> Tensor:
        if steadied:
            gamma, slope, backwards = schedule.steadied(time)
        else:
            gamma = schedule.gamma(time)
            moving = time.clone().requires_grad_()
            (slope,) = torch.autograd.grad(schedule.gamma(moving).sum(), moving, create_graph=True)
        term = slope * (gamma.sin() - net(gamma.unsqueeze(-1)).squeeze(-1)) ** 2
        if steadied:
            backwards(term)
        return term

    schedule = bent(learn_ends=learn_ends)
    inside = [getattr(schedule, name) for name in ("places", "widths", "weights")]
    others = [*net.parameters(), *([schedule.ends] if learn_ends else [])]
    torch.testing.assert_close(loss(schedule, True), loss(schedule, False))
    found = torch.autograd.grad(loss(schedule, True).sum(), inside + others)
    squared = torch.autograd.grad(loss(schedule, False).square().sum(), inside)
    plain = torch.autograd.grad(loss(schedule, False).sum(), others)
    for one, other in zip(found, (*squared, *plain), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", [LinearSchedule, CosineSchedule, LearnedSchedule])
@pytest.mark.parametrize("ends", [(1.0, 1.0), (2.0, -2.0), (float("nan"), 1.0), (0.0, float("inf"))])
def test_noise_must_increase(kind: type[LinearSchedule], ends: tuple[float, float]) -> None:
    with pytest.raises(ProblemError, match="noise must increase"):
        kind(*ends)


def test_offsets_of_the_cosine_lie_in_range() -> None:
    with pytest.raises(ProblemError, match=r"offset=-0\.1"):
        CosineSchedule(offset=-0.1)
    with pytest.raises(ProblemError, match=r"offset=1\.0"):
        CosineSchedule(offset=1.0)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([0.5], "at least 2 levels; there are 1"),
        ([1.0, 0.5], r"alpha_squared\[0\] is 1.0"),
        ([0.9, 0.5, 0.0], r"alpha_squared\[2\] is 0.0"),
        ([0.9, float("nan")], r"alpha_squared\[1\] is nan"),
        ([0.9, 0.5, 0.5], r"alpha_squared\[1\]=0.5 is not above alpha_squared\[2\]"),
    ],
)
def test_tables_must_fall(table: list[float], message: str) -> None:
    with pytest.raises(ProblemError, match=message):
        TableSchedule(table)


def test_schedules_of_ones_own_are_checked() -> None:
    class Mine(NoiseSchedule):
        def __init__(self, gamma: Callable[[Tensor], Tensor]) -> None:
            super().__init__()
            self.curve = gamma

        def gamma(self, t: Tensor) -> Tensor:
            return self.curve(t)

    Mine(lambda t: t**3 + t).check()
    with pytest.raises(ProblemError, match=r"mine: gamma falls or stands still from .* at t=0.5"):
        Mine(lambda t: t.clamp(max=0.5)).check("mine")
    with pytest.raises(ProblemError, match=r"schedule: gamma\(0\) is -inf; it must be finite"):
        Mine(torch.log).check()
    with pytest.raises(NotImplementedError):
        NoiseSchedule().gamma(torch.zeros(()))
