"""What the engines that fit a guide are given: options, schedules of the step size, and what callbacks learn."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from annotated_types import Interval
from typing_extensions import TypedDict  # which knows what it extends in Python 3.11 as well

from probmodels.errors import ProblemError
from probmodels.options import Count, Default, Draws, Natural, NonNegative, Positive

__all__ = [
    "Callback",
    "Decay",
    "FitOptions",
    "RunOptions",
    "Schedule",
    "Step",
    "StepOptions",
    "find_dtype",
    "make_schedule",
]

Schedule = Callable[[int], float]
Decay = Annotated[float, Interval(gt=0, le=1)]


@dataclass(frozen=True)
class Step:
    """What a callback learns after a step: its number from 1, the loss, the gradient norm and the seconds it took.

    ``phase`` names the objective that the step was for.
    """

    number: int
    loss: float
    grad_norm: float
    seconds: float
    phase: str = "svi"


Callback = Callable[[Step], bool | None]


class RunOptions(TypedDict, total=False):
    """What `fit_svi`, `fit_em` and `fit_bilevel` take.

    Attributes
    ----------
    seed
        From 0 to 2**32 - 1; the same seed gives the same numbers.
    device
        Where to compute; None for where the problem lies.
    dtype
        ``"float32"`` or ``"float64"`` for data, parameters and draws; None for the problem's own.
    callbacks
        Called with a `Step` after every step; one that returns True ends the fit.
    checkpoint
        Folder for the state; an unfinished fit of the same call found there is continued to the same numbers.
    checkpoint_every
        Seconds between two checkpoints, 0 for one after every step.
    progress
        Whether to show a progress bar.
    """

    seed: Annotated[int, Interval(ge=0, lt=2**32), Default(0)]
    device: Annotated[str | torch.device | None, Default(None)]
    dtype: Annotated[Literal["float32", "float64"] | torch.dtype | None, Default(None)]
    callbacks: Annotated[Sequence[Callback], Default(())]
    checkpoint: Annotated[str | Path | None, Default(None)]
    checkpoint_every: Annotated[NonNegative, Default(30.0)]
    progress: Annotated[bool, Default(True)]


class StepOptions(RunOptions, total=False):
    """What `fit_svi` and `fit_em` take.

    Attributes
    ----------
    batch_size
        Rows that a step sees of every plate in ``problem.batch_plates``, or of each by name; None for all. Model and
        guide take their data with the indices that the plate gives. Every step's loss is unbiased for that of all data.
    num_samples
        Draws taken from the fitted guide, with all data.
    clip_norm
        Largest norm of the gradient over all parameters.
    compile
        ``"graph"``: loss and gradient are captured once and run without Python programs; ``"inductor"``: the graph
        becomes machine code, which takes seconds and a C++ compiler; ``"eager"``: as written. None for a graph where
        there is one and the number of steps repays it. What cannot be captured runs eagerly; attribute ``execution`` of
        the result says which and why. All give the same numbers but for rounding.
    """

    batch_size: Annotated[Count | Mapping[str, Count] | None, Default(None)]
    num_samples: Annotated[Draws, Default(1000)]
    clip_norm: Annotated[Positive | None, Default(None)]
    compile: Annotated[Literal["graph", "inductor", "eager"] | None, Default(None)]


class FitOptions(StepOptions, total=False):
    """What `fit_svi` takes, beside what is its own.

    Attributes
    ----------
    patience
        Stop after so many steps in which the smoothed loss has not improved; None for never.
    keep
        ``"last"`` parameters; the ``"best"`` by smoothed loss; or their ``"average"`` over about the last tenth of the
        steps, which noise moves less.
    kl_warmup
        Steps in which the weight of the latent sites' log densities, in model and guide, rises from 0 to 1.
    distributed
        Whether the processes that ``torchrun`` started fit together: each sees its share of the rows of a step, and all
        return the same result, that of one process but for rounding, or, where rows have latent sites, for noise. None
        for where a process group of ``torch.distributed`` has been started. Callbacks are called on the first rank.
    """

    patience: Annotated[Count | None, Default(None)]
    keep: Annotated[Literal["last", "best", "average"], Default("last")]
    kl_warmup: Annotated[Natural, Default(0)]
    distributed: Annotated[bool | None, Default(None)]


def find_dtype(name: str, dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The type to compute in; None for that of the data.

    Raises
    ------
    ProblemError
        If it is neither of the two that there are.
    """
    found = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    if found not in (None, torch.float32, torch.float64):
        raise ProblemError(f"{name}: dtype={dtype!r}; choose 'float32' or 'float64'")
    return found


def make_schedule(name: str, schedule: str | Schedule | None, num_steps: int, lr_decay: float) -> Schedule:
    """Factor of the step size by step, counted from 0.

    Parameters
    ----------
    name
        Name of the problem, for errors.
    schedule
        ``"constant"``; ``"geometric"``, down to ``lr_decay``; ``"cosine"``, down to ``lr_decay``, or 0 where that is 1;
        ``"warmup"``, rising over the first tenth; ``"warmup_cosine"``; or a function of the step. None for geometric.
    num_steps
        Steps of the whole fit.
    lr_decay
        Ratio of the last factor to the first.

    Raises
    ------
    ProblemError
        If ``lr_decay`` does not go with it.
    """
    if callable(schedule):
        if lr_decay != 1.0:
            raise ProblemError(f"{name}: lr_decay={lr_decay} goes with no schedule of your own; let the function decay")
        return schedule
    last = max(num_steps - 1, 1)
    rise = max(1, num_steps // 10)
    low = 0.0 if lr_decay == 1.0 else lr_decay

    def geometric(step: int) -> float:
        return lr_decay ** (step / last)

    def cosine(step: int) -> float:
        return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(step / last, 1.0)))

    def warmup(step: int) -> float:
        return min((step + 1) / rise, 1.0)

    known: dict[str | None, Schedule] = {
        None: geometric,
        "constant": lambda step: 1.0,
        "geometric": geometric,
        "cosine": cosine,
        "warmup": warmup,
        "warmup_cosine": lambda step: warmup(step) * cosine(step),
    }
    if schedule == "geometric" and lr_decay == 1.0:
        raise ProblemError(f"{name}: schedule='geometric' needs lr_decay, the ratio of the last step size to the first")
    if schedule in ("constant", "warmup") and lr_decay != 1.0:
        raise ProblemError(f"{name}: schedule={schedule!r} does not decay; leave out lr_decay={lr_decay}")
    return known[schedule]
