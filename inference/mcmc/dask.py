"""Chains on a Dask cluster.

A chain on a cluster is run in legs of about a minute. A leg takes the state of the chain and returns the next one with
the draws in between, as the bytes of the files that a chain writes anyway, which the caller puts into the chain's
folder; so no file system need be shared, a worker that dies costs no more than its leg, and the run that is resumed
after an interrupt, here or on a cluster, is the same.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from probmodels.errors import ChainError, CheckpointError, ProblemError
from probmodels.inference.distributed.pools import DaskPool, Failure, Pool
from probmodels.inference.mcmc.chains import SAMPLING, WARMUP, ChainPlan, KernelFactory, Watch, phase_at, run_chain
from probmodels.inference.problem import Problem
from probmodels.inference.runtime.checkpoint import ChainStore
from probmodels.inference.runtime.ops import write_atomically

__all__ = ["run_on_dask"]

_LEG_SECONDS = 60.0  # what the death of a worker may cost
_LEG_SETUPS = 20  # a leg is at least so many times as long as it takes to begin it
_LEG_BYTES = 256 * 2**20
_REPORT_SECONDS = 1.0
_GRACE_SECONDS = 20.0  # for the other chains to save after one has failed
_STATE = "state.json"


def run_on_dask(
    problem: Problem, factory: KernelFactory, plans: Sequence[ChainPlan], watch: Watch, client: Any
) -> None:
    """Run all chains on the workers of a Dask cluster.

    Parameters
    ----------
    problem, factory
        What every worker receives; both must pickle by name.
    plans
        The chains; their folders are written here and need not be visible to workers.
    watch
        Progress bar and interrupts of the calling process.
    client
        A ``distributed.Client``.

    Raises
    ------
    ProblemError
        If there is no client, or problem or kernel cannot be sent to a worker.
    ChainError
        If a chain raises on two workers, or more workers die of it than the cluster allows; the others save first.
    """
    run = f"probmodels-{uuid.uuid4().hex}"
    shown = dict.fromkeys((plan.chain for plan in plans), -1)
    failure: Exception | None = None
    told, deadline = False, float("inf")
    with DaskPool(partial(_leg, problem, factory, run), client, topic=run) as pool, _stopped(pool) as stop:
        for plan in plans:
            _next_leg(pool, plan, watch)
        while pool.pending and time.monotonic() < deadline:
            for plan, outcome in pool.finished():
                if isinstance(outcome, Failure):
                    failure = failure or _chain_error(plan, outcome)
                    continue
                if outcome.files:
                    _write_store(Path(plan.folder), outcome.files)
                    shown[plan.chain] = json.loads(outcome.files[_STATE])["step"]
                    watch.update(plan.chain, phase_at(shown[plan.chain], plan), shown[plan.chain], "")
                if not outcome.complete and not told:
                    _next_leg(pool, plan, watch)
            for chain, phase, iteration, text in pool.messages():
                if iteration >= shown[chain]:  # not from a leg that is over, or run again after a death
                    shown[chain] = iteration
                    watch.update(chain, phase, iteration, text)
            if failure is not None:
                deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
            if (watch.stopping or failure is not None) and not told:
                told = True
                stop()
    if failure is not None:
        raise failure
    watch.raise_if_stopped()


@dataclass(frozen=True)
class _Leg:
    """What a leg of a chain brought: files of its store, new draws only, and whether the chain is at its end."""

    files: dict[str, bytes]
    complete: bool


def _leg(
    problem: Problem,
    factory: KernelFactory,
    run: str,
    plan: ChainPlan,
    files: dict[str, bytes],
    seconds: float,
) -> _Leg:
    """On a worker: continue a chain for some time, or until the event named ``run`` is set."""
    from distributed import Event, get_client, get_worker

    worker, flag = get_worker(), Event(run, get_client())
    if flag.is_set():
        return _Leg({}, complete=False)
    began, told = time.monotonic(), float("-inf")
    end: float | None = None
    stopping = False
    with tempfile.TemporaryDirectory(dir=worker.local_directory, prefix="probmodels-") as name:
        folder = Path(name)
        for file, content in files.items():
            (folder / file).write_bytes(content)

        def report(phase: str, iteration: int, text: str) -> bool:
            nonlocal end, told, stopping
            now = time.monotonic()
            if end is None and phase in (WARMUP, SAMPLING):
                end = now + max(seconds, _LEG_SETUPS * (now - began))
            if now - told >= _REPORT_SECONDS:
                told = now
                worker.log_event(run, (plan.chain, phase, iteration, text))
                stopping = flag.is_set()
            full = sum(file.stat().st_size for file in folder.glob("draws-*")) > _LEG_BYTES
            return stopping or full or (end is not None and now >= end)

        local = replace(plan, folder=name, checkpoint_every=float("inf"))
        complete = run_chain(problem, factory, local, report)
        found = {file.name: file.read_bytes() for file in folder.iterdir()}
    return _Leg(found, complete)


def _next_leg(pool: Pool, plan: ChainPlan, watch: Watch) -> None:
    """Have a chain go on from where its folder says, unless it is at its end."""
    folder = Path(plan.folder)
    store = ChainStore(folder)
    saved = store.resume()
    files: dict[str, bytes] = {}
    if saved is not None:
        complete = store.num_draws >= plan.num_samples
        iteration = plan.num_sweeps if complete else saved[1]
        watch.update(plan.chain, phase_at(iteration, plan), iteration, "")
        if complete:
            return
        record = json.loads((folder / _STATE).read_bytes())
        files = {name: (folder / name).read_bytes() for name in (_STATE, record["file"])}
    pool.submit(plan, plan, files, min(plan.checkpoint_every, _LEG_SECONDS), label=f"chain {plan.chain}")


def _write_store(folder: Path, files: Mapping[str, bytes]) -> None:
    """Add what a leg brought to the folder of its chain; renaming the state's record is the commit, as on a worker."""
    try:
        for name in sorted(files, key=lambda name: name == _STATE):
            write_atomically(folder / name, partial(_write, files[name]))
    except OSError as error:
        raise CheckpointError(f"cannot write {folder}: {error}; free some space or choose another folder") from error
    for old in folder.glob("state-*.safetensors"):
        if old.name not in files:
            old.unlink(missing_ok=True)


def _write(content: bytes, path: Path) -> None:
    path.write_bytes(content)


def _chain_error(plan: ChainPlan, outcome: Failure) -> Exception:
    if isinstance(outcome.error, ProblemError | CheckpointError):
        return outcome.error
    return ChainError(f"chain {plan.chain} failed; {outcome.text}")


@contextlib.contextmanager
def _stopped(pool: DaskPool) -> Iterator[Callable[[], None]]:
    """Gives what tells legs to stop; those that still run when the block is left are told so."""
    from distributed import Event

    event = Event(pool.topic, pool.client)

    def stop() -> None:
        with contextlib.suppress(Exception):  # the cluster may be gone, and its tasks with it
            event.set()
            pool.drop()

    try:
        yield stop
    finally:
        if pool.pending:
            stop()
        else:
            with contextlib.suppress(Exception):
                event.clear()
