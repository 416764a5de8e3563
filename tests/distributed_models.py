"""What workers of the tests run, in a module that they can import."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from inference_models import data, exact, mean_problem

from probmodels.inference import Problem, Result


def shifted(shift: float) -> Problem:
    return mean_problem(args=(data() + shift,), guide=None)


def quick(problem: Problem, *, seed: int) -> Result:
    """The exact posterior of the mean, by a generator of its own."""
    mean, sd = exact(problem.args[0])
    draws = mean + sd * np.random.default_rng(seed).normal(size=(2, 20))
    tree = xr.DataTree.from_dict({"/posterior": xr.Dataset({"mu": (("chain", "draw"), draws)})})
    tree.attrs["method"] = problem.name
    return Result(tree)


def quick_or_dead(problem: Problem, *, seed: int, marker: Path, log: Path | None = None) -> Result:
    """Dies at the first problem that gets here; then like `quick_or_broken` where there is a log."""
    try:
        marker.touch(exist_ok=False)
    except FileExistsError:
        return quick(problem, seed=seed) if log is None else quick_or_broken(problem, seed=seed, log=log)
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def quick_or_broken(problem: Problem, *, seed: int, log: Path) -> Result:
    """Fails at data that are shifted by more than one, and keeps a record of the seeds."""
    if problem.args[0].min() > 1:
        with log.open("a", encoding="utf-8") as stream:
            stream.write(f"{os.getpid()} {seed}\n")
        raise FloatingPointError("the run broke")
    return quick(problem, seed=seed)


def simulate(rng: np.random.Generator) -> tuple[dict[str, Any], float]:
    theta = rng.normal()
    return {"theta": theta}, theta + rng.normal()


def infer(y: float, seed: int) -> xr.Dataset:
    """The exact posterior, by a generator of its own."""
    noise = torch.randn(1, 40, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return xr.Dataset({"theta": (("chain", "draw"), (y / 2 + 0.5**0.5 * noise).numpy())})


def default_dtype(_: int) -> str:
    return str(torch.get_default_dtype())
