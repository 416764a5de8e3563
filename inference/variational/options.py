"""What the gradient engines are given: options, schedules of the step size, and what callbacks learn."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from probmodels.errors import ProblemError
from probmodels.inference.programs.capture import COMPILERS

__all__ = ["COMPILE", "Callback", "Options", "Schedule", "Step", "make_schedule", "positive"]

COMPILE = (None, "eager", *COMPILERS)
KEEP = ("last", "best", "average")

Schedule = Callable[[int], float]


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


@dataclass(frozen=True)
class Options:
    """What both engines take; see `fit_svi`."""

    batch_size: int | Mapping[str, int] | None = None
    num_samples: int = 1000
    clip_norm: float | None = None
    patience: int | None = None
    keep: str = "last"
    kl_warmup: int = 0
    compile: str | None = None
    seed: int = 0
    device: str | torch.device | None = None
    dtype: torch.dtype | str | None = None
    callbacks: Sequence[Callback] = ()
    checkpoint: str | Path | None = None
    checkpoint_every: float = 30.0
    progress: bool = True
    distributed: bool | None = False

    def check(self, name: str) -> None:
        """See that every option is in range.

        Raises
        ------
        ProblemError
            If one is not.
        """
        positive(name, num_samples=self.num_samples)
        if self.patience is not None:
            positive(name, patience=self.patience)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int | np.integer) or self.seed < 0:
            raise ProblemError(f"{name}: seed={self.seed!r}; it must be an integer that is not negative")
        if not isinstance(self.kl_warmup, int) or self.kl_warmup < 0:
            raise ProblemError(f"{name}: kl_warmup={self.kl_warmup!r}; give a number of steps, 0 for none")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ProblemError(f"{name}: clip_norm={self.clip_norm}; it must be positive")
        if self.keep not in KEEP:
            raise ProblemError(f"{name}: keep={self.keep!r}; choose one of {KEEP}")
        if self.compile not in COMPILE:
            raise ProblemError(f"{name}: compile={self.compile!r}; choose one of {COMPILE}")

    def torch_dtype(self, name: str) -> torch.dtype | None:
        """The type to compute in; None for that of the data."""
        if self.dtype is None:
            return None
        dtype = getattr(torch, self.dtype, None) if isinstance(self.dtype, str) else self.dtype
        if dtype not in (torch.float32, torch.float64):
            raise ProblemError(f"{name}: dtype={self.dtype!r}; choose 'float32' or 'float64'")
        return dtype


def positive(name: str, **values: Any) -> None:
    """See that numbers of steps, rounds or draws are positive integers.

    Raises
    ------
    ProblemError
        If one is not.
    """
    for key, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
            raise ProblemError(f"{name}: {key}={value!r}; it must be a positive integer")


def make_schedule(name: str, schedule: str | Schedule | None, num_steps: int, lr_decay: float) -> Schedule:
    """Factor of the step size by step, counted from 0.

    Parameters
    ----------
    name
        Of the problem, for errors.
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
        If the name is unknown, or ``lr_decay`` does not go with it.
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
    if schedule not in known:
        raise ProblemError(f"{name}: schedule={schedule!r}; choose one of {[k for k in known if k]} or give a function")
    if schedule == "geometric" and lr_decay == 1.0:
        raise ProblemError(f"{name}: schedule='geometric' needs lr_decay, the ratio of the last step size to the first")
    if schedule in ("constant", "warmup") and lr_decay != 1.0:
        raise ProblemError(f"{name}: schedule={schedule!r} does not decay; leave out lr_decay={lr_decay}")
    return known[schedule]
