"""Processes that run chains: single-threaded, watched, and told to stop through their pipe."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle  # in memory only, between a process and its own children; nothing pickled is written or read
import signal
import sys
import time
import traceback
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, ForkServerProcess, SpawnContext, SpawnProcess
from typing import TYPE_CHECKING, Any

import torch

from probmodels.errors import ChainError, CheckpointError, ProblemError
from probmodels.inference.mcmc.chains import ChainPlan, KernelFactory, run_chain
from probmodels.inference.problem import Problem
from probmodels.inference.runtime.processes import interrupts_ignored, main_hidden, one_thread_environment

if TYPE_CHECKING:
    from probmodels.inference.mcmc.chains import Watch

__all__ = ["pack", "run_in_processes"]

_GRACE_SECONDS = 20.0  # for the other chains to save after one has failed


@dataclass
class _Worker:
    process: ForkServerProcess | SpawnProcess
    pipe: Connection
    plan: ChainPlan | None = None
    told: bool = False


@dataclass
class _Pool:
    """Workers, the chains that no worker has taken yet, and the failure that ends the run."""

    watch: Watch
    queue: list[ChainPlan]
    workers: list[_Worker] = field(default_factory=list)
    failure: Exception | None = None
    deadline: float = float("inf")
    ended: bool = False

    @property
    def busy(self) -> list[_Worker]:
        """Workers that run a chain."""
        return [worker for worker in self.workers if worker.plan is not None]

    def run(self) -> None:
        """Hand out all chains and wait for their end, or after a failure for the others to save."""
        for worker in self.workers:
            _assign(worker, self.queue)
        while busy := self.busy:
            if self.watch.stopping or self.failure is not None:
                self._stop(busy)
                if time.monotonic() > self.deadline:
                    break
            self._hear(busy)
            if self.failure is not None:
                self.deadline = min(self.deadline, time.monotonic() + _GRACE_SECONDS)
        if self.failure is None:
            for worker in self.workers:
                _send(worker, None)
            self.ended = True

    def _stop(self, busy: list[_Worker]) -> None:
        """Start no other chain, and tell those that run to stop."""
        self.queue.clear()
        for worker in busy:
            if not worker.told:
                worker.told = True
                _send(worker, "stop")

    def _hear(self, busy: list[_Worker]) -> None:
        """Wait for messages and deaths of workers, and handle them."""
        for ready in wait([w.pipe for w in busy] + [w.process.sentinel for w in busy], timeout=0.2):
            for worker in busy:
                if worker.plan is not None and ready in (worker.pipe, worker.process.sentinel):
                    self.failure = _listen(worker, self.queue, self.watch) or self.failure

    def close(self) -> None:
        """End all processes, at once unless all chains have come to an end."""
        for worker in self.workers:
            if not self.ended:
                worker.process.kill()
            worker.process.join(timeout=5)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
            worker.pipe.close()
            worker.process.close()


def run_in_processes(
    problem: Problem, factory: KernelFactory, plans: list[ChainPlan], watch: Watch, num_workers: int | None
) -> None:
    """Run all chains in worker processes.

    Parameters
    ----------
    problem, factory
        What every worker receives; both must pickle.
    plans
        The chains.
    watch
        Progress bar and interrupts of the calling process.
    num_workers
        Number of processes; None for one per usable CPU.

    Raises
    ------
    ProblemError
        If problem or kernel cannot be sent to another process.
    CheckpointError
        If draws or states cannot be written.
    ChainError
        If a chain raises anything else or its worker dies; the others save their state first.
    """
    payload = pack(problem, factory)
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    pool, context = _Pool(watch, list(plans)), _context(problem, factory)
    try:
        for _ in range(min(num_workers or cpus, len(plans))):
            pool.workers.append(_start(payload, context, needs_main=b"__main__" in payload))
        pool.run()
    finally:
        pool.close()
    if pool.failure is not None:
        raise pool.failure
    watch.raise_if_stopped()


def pack(problem: Problem, factory: KernelFactory) -> bytes:
    """What is sent to a worker process.

    Raises
    ------
    ProblemError
        If it cannot be sent: where the model was defined, and where to define it instead.
    """
    remedy = "define model and kernel at the top level of a module, or pass chain_method='sequential'"
    try:
        payload = pickle.dumps((problem, factory))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ProblemError(
            f"{problem.name}: the problem cannot be sent to another process ({error}); {remedy}"
        ) from error
    if b"__main__" in payload and not os.path.isfile(getattr(sys.modules["__main__"], "__file__", "")):
        raise ProblemError(
            f"{problem.name}: model or kernel is defined in this notebook or session, where other processes cannot "
            f"find it; {remedy}"
        )
    return payload


def _context(problem: Problem, factory: KernelFactory) -> ForkServerContext | SpawnContext:
    """How workers start: on Linux as forks of one process that has imported what all of them need, else from nothing.

    That process stays for later runs; it has no threads, and no state of this one.
    """
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    needed = {getattr(part, "__module__", "") for part in (problem.model, getattr(factory, "func", factory))}
    context.set_forkserver_preload([__name__, *sorted(name for name in needed if name.startswith("probmodels."))])
    return context


def _start(payload: bytes, context: ForkServerContext | SpawnContext, *, needs_main: bool) -> _Worker:
    pipe, far_end = context.Pipe()
    process = context.Process(target=_work, args=(far_end,), daemon=True, name="probmodels-chain")
    with one_thread_environment(), interrupts_ignored(), contextlib.nullcontext() if needs_main else main_hidden():
        process.start()
    far_end.close()
    worker = _Worker(process, pipe)
    _send(worker, payload)
    return worker


def _assign(worker: _Worker, queue: list[ChainPlan]) -> None:
    worker.plan = queue.pop(0) if queue else None
    if worker.plan is not None:
        _send(worker, worker.plan)


def _send(worker: _Worker, message: Any) -> None:
    with contextlib.suppress(OSError):  # a dead worker is noticed by its sentinel
        if isinstance(message, bytes):
            worker.pipe.send_bytes(message)
        else:
            worker.pipe.send(message)


def _listen(worker: _Worker, queue: list[ChainPlan], watch: Watch) -> Exception | None:
    """Handle one message of a worker, or its death; the failure if there is one."""
    assert worker.plan is not None
    chain = worker.plan.chain
    try:
        if not worker.pipe.poll():
            if worker.process.is_alive():
                return None
            raise EOFError
        kind, *rest = worker.pipe.recv()
    except (EOFError, OSError):
        worker.plan = None
        worker.process.join(timeout=5)
        if watch.stopping:  # the signal that stops the run may have ended the worker too
            return None
        return ChainError(
            f"chain {chain}: its process ended with exit code {worker.process.exitcode} before the chain was done. "
            "A negative code is a signal (-9: often out of memory). If the call stands in a script that defines the "
            "model, put it under 'if __name__ == \"__main__\":'; chain_method='sequential' shows the error itself"
        )
    if kind == "progress":
        watch.update(chain, *rest)
        return None
    worker.plan = None
    if kind == "stopped" and not watch.stopping:
        return ChainError(f"chain {chain}: its process was told to end (SIGTERM); its state is saved")
    if kind == "failed":
        return ChainError(f"chain {chain} failed:\n{rest[0]}")
    if kind == "refused":
        error: Exception = rest[0](rest[1])
        return error
    if not worker.told:
        _assign(worker, queue)
    return None


def _work(pipe: Connection) -> None:
    """Main function of a worker: receive the problem, then chains, until told that there are no more."""
    stop = terminated = False

    def on_terminate(number: int, frame: object) -> None:
        nonlocal stop, terminated
        stop = terminated = True

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt means
    signal.signal(signal.SIGTERM, on_terminate)
    torch.set_num_threads(1)

    def report(phase: str, iteration: int, text: str) -> bool:
        nonlocal stop
        try:
            pipe.send(("progress", phase, iteration, text))
            while pipe.poll():
                stop = pipe.recv() == "stop" or stop
        except (EOFError, OSError):  # the parent is gone: save and end
            stop = True
        return stop

    with contextlib.suppress(EOFError, OSError):
        problem: Any = None
        factory: Any = None
        error = None
        try:
            problem, factory = pickle.loads(pipe.recv_bytes())
        except (AttributeError, ImportError, pickle.UnpicklingError, TypeError):
            error = (
                f"{traceback.format_exc()}the problem cannot be rebuilt in another process; define model and kernel "
                "at the top level of a module, or pass chain_method='sequential'"
            )
        while (plan := pipe.recv()) is not None:
            if plan == "stop":
                continue
            if error is None:
                stop = terminated
                torch.set_default_dtype(plan.dtype)
                try:
                    finished = run_chain(problem, factory, plan, report)
                except (ProblemError, CheckpointError) as refusal:
                    pipe.send(("refused", type(refusal), str(refusal)))
                except Exception:
                    pipe.send(("failed", traceback.format_exc()))
                else:
                    pipe.send(("done",) if finished or not terminated else ("stopped",))
            else:
                pipe.send(("failed", error))
