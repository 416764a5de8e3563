"""What a run will take, known before it starts: memory from the sizes of sites, time from these and a few sweeps."""

from __future__ import annotations

import math
import os
import statistics
import time
from typing import Any

import torch

from probmodels.inference.mcmc.kernels import Kernel
from probmodels.inference.problem import Problem
from probmodels.inference.runtime.memory import check_memory
from probmodels.inference.runtime.ops import single_thread
from probmodels.inference.runtime.tensors import tensors_of

__all__ = ["check_room_in_memory", "foresee", "num_processes", "seconds_of_sweep"]

_COPIES = 3.5  # of all draws that putting them together and summing them up takes
_PROCESS = 400 * 2**20  # bytes that a process takes for itself
_SWEEPS = 5
_START = 5.0  # seconds until processes have imported what they need and start their chains
_TOGETHER = 1.2  # times as long as alone that a sweep takes beside others, which share caches and memory
_PER_NUMBER = 8e-7  # seconds for each number drawn to complete, judge, summarise and write it
_PAGE = 10.0  # seconds for figures and the page


def num_processes(num_chains: int, num_workers: int | None) -> int:
    """Processes in which chains run: at most one for each chain, by default one for each usable CPU."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return min(num_workers or cpus, num_chains)


def _size(problem: Problem) -> int:
    """Numbers of a draw."""
    return sum(math.prod(site.shape) for site in problem.sites.values() if site.kind in ("latent", "deterministic"))


def _bytes(problem: Problem, num_draws: int, processes: int) -> int:
    held = sum(tensor.nbytes for tensor in tensors_of(problem.args, problem.kwargs))
    held += 0 if problem.data is None else problem.data.nbytes
    return int(_COPIES * 8 * _size(problem) * num_draws) + processes * (held + _PROCESS)


def check_room_in_memory(problem: Problem, num_chains: int, num_samples: int, processes: int) -> None:
    """Check that draws of chains in processes fit into the memory that is free.

    Raises
    ------
    ProblemError
        If they do not.
    """
    check_memory(
        problem.name,
        _bytes(problem, num_chains * num_samples, processes),
        torch.device("cpu"),
        f"{num_samples} draws of {num_chains} chains in {processes} processes",
        "keep fewer draws (a higher thin keeps the length of the run), use fewer num_workers, or make the data smaller",
    )


def seconds_of_sweep(kernel: Kernel) -> float:
    """Median time of a sweep of a kernel that has been set up, with its draw exported; the first, which may compile,
    does not count."""
    params: dict[str, Any] = kernel.initial_params
    seconds = []
    with single_thread():
        for _ in range(_SWEEPS + 1):
            start = time.perf_counter()
            params = kernel.sample(params)
            kernel.export(params)
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def foresee(
    problem: Problem,
    *,
    num_chains: int = 4,
    num_samples: int = 1000,
    warmup_steps: int = 1000,
    thin: int = 1,
    num_workers: int | None = None,
) -> str | None:
    """A sentence on time and memory of a run with the problem's own kernel; None where that cannot tell.

    Times are those of processors that nothing else keeps busy.

    Parameters
    ----------
    problem
        To be sampled.
    num_chains, num_samples, warmup_steps, thin, num_workers
        As for `run_mcmc`.
    """
    time_one = getattr(problem.kernel, "seconds_of_sweep", None)
    if time_one is None:
        return None
    one = float(time_one(problem))
    processes = num_processes(num_chains, num_workers)
    sweeps = warmup_steps + num_samples * thin
    rounds = math.ceil(num_chains / processes)
    seconds = _START + one * (_TOGETHER if processes > 1 else 1.0) * sweeps * rounds
    after = _PAGE + _PER_NUMBER * _size(problem) * num_chains * num_samples
    memory = _bytes(problem, num_chains * num_samples, processes) / 2**30
    return (
        f"{num_chains} chains of {sweeps} sweeps, {1e3 * one:.2g} ms each, in {processes} processes will take about "
        f"{_spell(seconds)}, and {memory:.1f} GiB of memory; summaries, files and figures another {_spell(after)}"
    )


def _spell(seconds: float) -> str:
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.2g} {unit}"
    return f"{max(seconds, 1):.0f} s"
