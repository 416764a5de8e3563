"""Independent tasks on other processes: our own, or the workers of a Dask cluster; failed ones are run again elsewhere.

Functions and arguments travel pickled, functions and classes by name, in memory only. A task is run alone in its
process and on one thread, so that its numbers do not depend on where it runs or what runs beside it.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import multiprocessing
import os
import pickle
import queue
import signal
import sys
import threading
import time
import traceback
import uuid
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, Protocol, Self, runtime_checkable

import torch

from probmodels.errors import ProblemError
from probmodels.inference.runtime.ops import single_thread
from probmodels.inference.runtime.processes import interrupts_ignored, main_hidden, one_thread_environment

__all__ = ["Client", "DaskPool", "Failure", "Pool", "ProcessPool", "check_client", "make_pool"]

_ATTEMPTS = 2  # of a task that raises
_DEATHS = 3  # processes of our own that one task may take with it; of Dask's its scheduler keeps count
_POLL_SECONDS = 0.1
_PATIENCE_SECONDS = 60.0  # without any worker of a cluster, after which its tasks are given up

_log = logging.getLogger(__name__)
_alone = threading.Lock()  # random numbers, parameters and default types belong to the process, not to a thread


@runtime_checkable
class Client(Protocol):
    """What is used of ``distributed.Client``, which need not be installed."""

    def submit(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Run a function on a worker."""

    def scatter(self, data: Any, **options: Any) -> Any:
        """Send data to the workers."""

    def processing(self, workers: Any = None) -> Any:
        """Tasks by worker."""


@dataclass(frozen=True)
class Failure:
    """What a task came to in the end that has no value.

    Attributes
    ----------
    error
        The exception of the task, or one that says what became of its process.
    text
        What to show: the traceback where there is one.
    """

    error: Exception
    text: str


@dataclass
class _Task:
    key: Any
    args: bytes
    label: str
    errors: int = 0
    deaths: int = 0
    where: set[str] = field(default_factory=set)  # places that it failed in


class Pool:
    """Tasks under way, as a context manager; leaving it ends those that are not finished.

    Parameters
    ----------
    function
        What every task calls; it must pickle.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._payload = _pickled((function, torch.get_default_dtype()), self._no_main)

    _no_main = False  # whether the workers have a main module of their own

    @property
    def pending(self) -> int:
        """Tasks that are not finished."""
        raise NotImplementedError

    def submit(self, key: Any, *args: Any, label: str = "task") -> None:
        """Queue the function with arguments, to be known by ``key``."""
        self._send(_Task(key, _pickled(args, self._no_main), label))

    def finished(self) -> list[tuple[Any, Any]]:
        """Keys of tasks that have finished by now, each with its value or a `Failure`; waits a moment for them."""
        raise NotImplementedError

    def drop(self) -> None:
        """Forget tasks that have not begun."""
        raise NotImplementedError

    def close(self) -> None:
        """End what is under way."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _send(self, task: _Task) -> None:
        raise NotImplementedError

    def _settle(self, task: _Task, answer: bytes) -> tuple[Any, Any] | None:
        """Key and outcome of a task that has answered; None if it is to be tried again."""
        where, value, error, text = pickle.loads(answer)
        if error is None:
            return task.key, pickle.loads(value)
        task.errors += 1
        task.where.add(where)
        if task.errors < _ATTEMPTS and not isinstance(error, ProblemError):
            _log.warning("%s failed on worker %s and is tried again: %s", task.label, where, error)
            self._send(task)
            return None
        return task.key, Failure(error, f"on worker {where}:\n{text}")


class ProcessPool(Pool):
    """Processes of our own, spawned, one thread each.

    Parameters
    ----------
    function
        As in `Pool`.
    num_workers
        Most processes at a time; None for one per usable CPU.
    """

    def __init__(self, function: Callable[..., Any], num_workers: int | None = None) -> None:
        super().__init__(function)
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
        self._num_workers = num_workers or cpus
        self._queue: deque[_Task] = deque()
        self._processes: list[_Process] = []

    @property
    def pending(self) -> int:
        return len(self._queue) + sum(process.task is not None for process in self._processes)

    def finished(self) -> list[tuple[Any, Any]]:
        self._assign()
        busy = {process.pipe: process for process in self._processes if process.task is not None}
        ready = [busy[pipe] for pipe in wait(list(busy), _POLL_SECONDS) if isinstance(pipe, Connection)]
        return [found for process in ready if (found := self._listen(process)) is not None]

    def drop(self) -> None:
        self._queue.clear()

    def close(self) -> None:
        self._queue.clear()
        for process in self._processes:
            process.end()
        self._processes.clear()

    def _send(self, task: _Task) -> None:
        self._queue.append(task)

    def _assign(self) -> None:
        idle = [process for process in self._processes if process.task is None]
        missing = min(len(self._queue) - len(idle), self._num_workers - len(self._processes))
        if missing > 0:
            # Without this a script that lacks a guard of __name__ would run itself again in every process.
            hide = b"__main__" not in self._payload
            with one_thread_environment(), interrupts_ignored(), main_hidden() if hide else contextlib.nullcontext():
                idle += [_Process() for _ in range(missing)]
            self._processes += idle[-missing:]
        for process, task in zip(idle, list(self._queue), strict=False):
            self._queue.popleft()
            process.task = task
            with contextlib.suppress(OSError):  # a dead process is noticed at its pipe
                process.pipe.send((self._payload, task.args))

    def _listen(self, process: _Process) -> tuple[Any, Any] | None:
        task, process.task = process.task, None
        assert task is not None
        try:
            found = self._settle(task, process.pipe.recv_bytes())
        except (EOFError, OSError):
            self._processes.remove(process)
            task.deaths += 1
            code = process.end(patience=1.0)
            text = f"its process ended with exit code {code} (negative: a signal; -9: often out of memory)"
            if task.deaths < _DEATHS:
                _log.warning("%s is tried again: %s", task.label, text)
                self._queue.append(task)
                return None
            return task.key, Failure(RuntimeError(f"{text}, {task.deaths} times over"), text)
        if task.errors:  # whatever went wrong may have left its mark
            self._processes.remove(process)
            process.end()
        return found


class _Process:
    """A process that answers tasks one by one."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, far_end = context.Pipe()
        self.task: _Task | None = None
        self._process: SpawnProcess = context.Process(target=_serve, args=(far_end,), daemon=True, name="probmodels")
        self._process.start()
        far_end.close()

    def end(self, patience: float = 0.0) -> int | None:
        """Kill it unless it ends by itself in ``patience`` seconds; its exit code if it does."""
        self._process.join(timeout=patience)
        code = self._process.exitcode
        self._process.kill()
        self._process.join()
        self._process.close()
        self.pipe.close()
        return code


class DaskPool(Pool):
    """Workers of a Dask cluster.

    Parameters
    ----------
    function
        As in `Pool`; workers find it by name.
    client
        A ``distributed.Client``.
    topic
        Under which tasks log `messages`; None for a new one.

    Raises
    ------
    ProblemError
        If there is no client, or function or arguments cannot be sent; from `finished`, if there have been no workers
        for a minute.
    """

    _no_main = True

    def __init__(self, function: Callable[..., Any], client: Any, topic: str | None = None) -> None:
        check_client(client)
        super().__init__(function)
        self.client = client
        self.topic = topic or f"probmodels-{uuid.uuid4().hex}"
        self._tasks: dict[Any, _Task] = {}  # by future
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        # One task makes the payload, so that it travels from worker to worker and is made again if they die.
        self._shared = self._submit(_same, self._payload, key=f"{self.topic}-payload")
        client.subscribe_topic(self.topic, lambda event: self._inbox.put(event[1]))
        self._alone_since: float | None = None
        if not client.nthreads():
            _log.warning("the cluster has no workers yet; waiting for them for %g seconds", _PATIENCE_SECONDS)

    @property
    def pending(self) -> int:
        return len(self._tasks)

    def finished(self) -> list[tuple[Any, Any]]:
        ready = [future for future in self._tasks if future.done()]
        if not ready:
            self._check_workers()
            time.sleep(_POLL_SECONDS)
        return [found for future in ready if (found := self._collect(future)) is not None]

    def _check_workers(self) -> None:
        """Give up where the cluster has had no workers for a while."""
        if self.client.nthreads():
            self._alone_since = None
            return
        now = time.monotonic()
        self._alone_since = now if self._alone_since is None else self._alone_since
        if now - self._alone_since > _PATIENCE_SECONDS:
            raise ProblemError(
                f"the cluster has had no workers for {_PATIENCE_SECONDS:g} seconds; start some, or give a client of a "
                "cluster that has workers"
            )

    def messages(self) -> Iterator[Any]:
        """What tasks have logged under `topic` since the last call."""
        with contextlib.suppress(queue.Empty):
            while True:
                yield self._inbox.get_nowait()

    def drop(self) -> None:
        begun = set(itertools.chain.from_iterable(self.client.processing().values()))
        for future in [future for future in self._tasks if future.key not in begun and not future.done()]:
            del self._tasks[future]
            future.cancel()

    def close(self) -> None:
        with contextlib.suppress(Exception):  # the cluster may be gone
            self.client.unsubscribe_topic(self.topic)
            self.client.cancel([*self._tasks, self._shared])
        self._tasks.clear()

    def _send(self, task: _Task) -> None:
        others = [address for address in self.client.nthreads() if address not in task.where] if task.where else []
        options: dict[str, Any] = {"workers": others, "allow_other_workers": True} if others else {}
        key = f"{task.label.replace(' ', '-')}-{uuid.uuid4().hex}"
        self._tasks[self._submit(_call, self._shared, task.args, key=key, **options)] = task

    def _submit(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sending large graph")
            return self.client.submit(function, *args, pure=False, **options)

    def _collect(self, future: Any) -> tuple[Any, Any] | None:
        task = self._tasks.pop(future)
        try:
            return self._settle(task, future.result())
        except Exception as error:  # of the cluster, since a task's own are part of its answer
            return task.key, Failure(error, f"the cluster gave up: {type(error).__name__}: {error}")


def make_pool(function: Callable[..., Any], client: Any = None, num_workers: int | None = None) -> Pool:
    """Workers of the client's cluster, or processes of our own where there is no client."""
    return ProcessPool(function, num_workers) if client is None else DaskPool(function, client)


def _same(payload: bytes) -> bytes:
    return payload


def _call(payload: bytes, args: bytes) -> bytes:
    """Run a task where it was sent to: pickled (place, pickled value, exception or None, traceback)."""
    place = _place()
    with _alone:
        before = torch.get_default_dtype()
        try:
            function, dtype = _unpickled(payload)
            arguments = _unpickled(args)
            torch.set_default_dtype(dtype)
            with single_thread():
                value = pickle.dumps(function(*arguments))
        except Exception as error:
            return pickle.dumps((place, None, _portable(error), traceback.format_exc()))
        finally:
            torch.set_default_dtype(before)
    return pickle.dumps((place, value, None, ""))


def _serve(pipe: Connection) -> None:
    """Main function of a process of our own: answer tasks until killed, or the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt means
    with contextlib.suppress(EOFError, OSError):
        while True:
            pipe.send_bytes(_call(*pipe.recv()))


def _place() -> str:
    """Name of this worker."""
    if "distributed" in sys.modules:
        from distributed import get_worker

        with contextlib.suppress(ValueError):
            return str(get_worker().address)
    return f"process {os.getpid()}"


def _portable(error: Exception) -> Exception:
    """The same exception if it survives the journey, else one with its text."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _pickled(thing: Any, no_main: bool) -> bytes:
    remedy = "define functions, model, guide and kernel at the top level of a module that workers can import"
    try:
        payload = pickle.dumps(thing)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ProblemError(f"this cannot be sent to another process ({error}); {remedy}") from error
    alien = no_main or not os.path.isfile(getattr(sys.modules["__main__"], "__file__", ""))
    if b"__main__" in payload and alien:
        raise ProblemError(
            f"part of this is defined in the main script or notebook, where workers cannot find it; {remedy}"
        )
    return payload


def _unpickled(payload: bytes) -> Any:
    try:
        return pickle.loads(payload)
    except (AttributeError, ImportError) as error:
        raise ImportError(
            f"a worker cannot import what it is to run ({error}); install the module on every worker, or send it with "
            "client.upload_file"
        ) from error


def check_client(client: Any) -> None:
    """Check that a client of a cluster is there and connected.

    Raises
    ------
    ProblemError
        If it is not, or Dask is not installed.
    """
    how = "client=distributed.Client(address), or distributed.Client() for workers on this machine"
    try:
        from distributed import Client
    except ImportError as error:
        raise ProblemError("Dask is not installed; pip install probmodels[dask]") from error
    if not isinstance(client, Client):
        got = "no client was given" if client is None else f"client is a {type(client).__name__}"
        raise ProblemError(f"running on Dask needs a client and {got}; pass {how}")
    if client.asynchronous:
        raise ProblemError(f"the client is asynchronous; pass {how}, without asynchronous=True")
    if client.status != "running":
        raise ProblemError(f"the client is {client.status}; pass {how}")
