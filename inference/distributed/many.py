"""Beyond one machine: chains on a Dask cluster, and one engine on many problems.

A chain on a cluster is run in legs of about a minute. A leg takes the state of the chain and returns the next one with
the draws in between, as the bytes of the files that a chain writes anyway, which the caller puts into the chain's
folder; so no file system need be shared, a worker that dies costs no more than its leg, and the run that is resumed
after an interrupt, here or on a cluster, is the same.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, overload

from tqdm.auto import tqdm

from probmodels.inference.distributed.pools import DaskPool, Failure, Pool, make_pool
from probmodels.inference.mcmc.chains import ChainError, ChainPlan, KernelFactory, Watch, run_chain
from probmodels.inference.problem import Problem, ProblemError
from probmodels.inference.programs.programs import identity
from probmodels.inference.result import Result
from probmodels.inference.runtime.checkpoint import ChainStore, CheckpointError, open_checkpoint
from probmodels.inference.runtime.fingerprints import fingerprint
from probmodels.inference.runtime.ops import Interrupts, chain_seed, isolated, write_atomically

__all__ = ["MapError", "dask_map", "map_problems", "process_map", "run_on_dask"]

_LEG_SECONDS = 60.0  # what the death of a worker may cost
_LEG_SETUPS = 20  # a leg is at least so many times as long as it takes to begin it
_LEG_BYTES = 256 * 2**20
_REPORT_SECONDS = 1.0
_GRACE_SECONDS = 20.0  # for the other chains to save after one has failed
_STATE = "state.json"


class MapError(RuntimeError):
    """Problems that failed while others were inferred.

    Attributes
    ----------
    failures
        What happened, with traceback, by name of the problem.
    results
        Results of the problems that did not fail, by name.
    """

    def __init__(self, message: str, failures: Mapping[str, str], results: Mapping[str, Result]) -> None:
        super().__init__(message)
        self.failures, self.results = dict(failures), dict(results)


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
                    watch.update(plan.chain, shown[plan.chain], "")
                if not outcome.complete and not told:
                    _next_leg(pool, plan, watch)
            for chain, iteration, text in pool.messages():
                if iteration >= shown[chain]:  # not from a leg that is over, or run again after a death
                    shown[chain] = iteration
                    watch.update(chain, iteration, text)
            if failure is not None:
                deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
            if (watch.stopping or failure is not None) and not told:
                told = True
                stop()
    if failure is not None:
        raise failure
    watch.raise_if_stopped()


@overload
def map_problems(
    problems: Sequence[Problem],
    run: Callable[..., Result],
    *,
    client: Any = None,
    num_workers: int | None = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> list[Result]: ...


@overload
def map_problems(
    problems: Mapping[str, Problem],
    run: Callable[..., Result],
    *,
    client: Any = None,
    num_workers: int | None = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> dict[str, Result]: ...


def map_problems(
    problems: Sequence[Problem] | Mapping[str, Problem],
    run: Callable[..., Result],
    *,
    client: Any = None,
    num_workers: int | None = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> list[Result] | dict[str, Result]:
    """Infer many problems side by side: regions, parameter sweeps, simulated data.

    Parameters
    ----------
    problems
        A sequence, or problems by name.
    run
        Engine, called as ``run(problem, seed=...)``: ``fit_svi``, or ``functools.partial(run_mcmc, num_samples=500)``,
        or a function of a module. Its own progress bars are off unless it says otherwise.
    client
        ``distributed.Client`` of a Dask cluster; None for processes on this machine.
    num_workers
        Processes, where there is no client; None for one per CPU.
    seed
        Of all problems; each has a seed of its own by its place, so that results are the same wherever they run.
    checkpoint
        Folder for results, written as they come. A repeated call does what is missing; more problems may be appended.
    progress
        Whether to show how many are done.

    Returns
    -------
    list or dict
        Results in the order of the problems, by name where problems are.

    Raises
    ------
    ProblemError
        If a problem or ``run`` cannot be sent to another process, or there is no Dask.
    CheckpointError
        If the checkpoint cannot be written, or belongs to other problems, another ``run`` or another seed.
    MapError
        If problems fail, each on two workers; after all others have been inferred.
    KeyboardInterrupt
        After an interrupt; results that are done are kept in the checkpoint.

    Examples
    --------
    >>> results = map_problems(regions, partial(fit_svi, num_steps=5000), checkpoint="runs/regions")  # doctest: +SKIP
    """
    named = problems if isinstance(problems, Mapping) else {f"{i} ({p.name})": p for i, p in enumerate(problems)}
    names = list(named)
    for name, value, least in (("seed", seed, 0), ("num_workers", 1 if num_workers is None else num_workers, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ProblemError(f"map_problems: {name}={value!r}; it must be a whole number of at least {least}")
    failures: dict[str, Failure] = {}
    with contextlib.ExitStack() as stack:
        folders = stack.enter_context(_folders(named, run, seed, checkpoint))
        results = {name: Result.load(folder) for name, folder in folders.items() if (folder / "result.nc").exists()}
        bar = tqdm(total=len(names), initial=len(results), disable=not progress, desc="problems", unit="problem")
        pool = stack.enter_context(make_pool(partial(_infer, _quiet(run)), client, num_workers))
        stack.enter_context(bar)
        interrupts = stack.enter_context(Interrupts())
        for place, name in enumerate(names):
            if name not in results:
                pool.submit(name, named[name], chain_seed(seed, place), label=f"problem {name}")
        while pool.pending:
            for name, outcome in pool.finished():
                if isinstance(outcome, Failure):
                    failures[name] = outcome
                else:
                    results[name] = outcome
                    if name in folders:
                        outcome.save(folders[name])
                bar.update()
            if interrupts.count:
                how = "nothing is kept, since no checkpoint folder was given"
                if checkpoint is not None:
                    how = f"results are kept in {checkpoint}; repeat the same call for the others"
                raise KeyboardInterrupt(f"stopped after {len(results)} of {len(names)} problems: {how}")
    results = {name: results[name] for name in names if name in results}
    if failures:
        raise _map_error(failures, results, len(names))
    return results if isinstance(problems, Mapping) else list(results.values())


def process_map(num_workers: int | None = None) -> Callable[..., list[Any]]:
    """A ``map`` over processes of our own, for ``sbc``, ``vsbc`` and ``kfold``.

    Parameters
    ----------
    num_workers
        Processes; None for one per CPU.

    Returns
    -------
    Callable
        Takes a function and iterables as the builtin ``map`` does, and returns a list in order. An exception is that
        of the first item that fails, twice.

    Examples
    --------
    >>> sbc(simulate, infer, map=process_map())  # doctest: +SKIP
    """
    return partial(_map, None, num_workers)


def dask_map(client: Any) -> Callable[..., list[Any]]:
    """A ``map`` over the workers of a Dask cluster; see `process_map`.

    Parameters
    ----------
    client
        A ``distributed.Client``.
    """
    return partial(_map, client, None)


def _map(client: Any, num_workers: int | None, function: Callable[..., Any], *iterables: Iterable[Any]) -> list[Any]:
    items = list(zip(*iterables, strict=False))
    found: dict[int, Any] = {}
    with make_pool(function, client, num_workers) as pool:
        for place, item in enumerate(items):
            pool.submit(place, *item, label=f"item {place}")
        while pool.pending:
            for place, outcome in pool.finished():
                if isinstance(outcome, Failure):
                    outcome.error.add_note(outcome.text)
                    raise outcome.error
                found[place] = outcome
    return [found[place] for place in range(len(items))]


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

        def report(iteration: int, text: str) -> bool:
            nonlocal end, told, stopping
            now = time.monotonic()
            end = now + max(seconds, _LEG_SETUPS * (now - began)) if end is None else end
            if now - told >= _REPORT_SECONDS:
                told = now
                worker.log_event(run, (plan.chain, iteration, text))
                stopping = flag.is_set()
            full = sum(file.stat().st_size for file in folder.glob("draws-*")) > _LEG_BYTES
            return stopping or full or now >= end

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
        watch.update(plan.chain, plan.num_sweeps if complete else saved[1], "")
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


def _infer(run: Callable[..., Result], problem: Problem, seed: int) -> Result:
    """On a worker: one problem; what ``run`` may take from global generators is reproducible as well."""
    with isolated(seed):
        result = run(problem, seed=seed)
    if not isinstance(result, Result):
        raise ProblemError(f"{problem.name}: run returned a {type(result).__name__}; it must return a Result")
    return result


def _quiet(run: Callable[..., Result]) -> Callable[..., Result]:
    """The same without progress bars, unless they were asked for."""
    takes = "progress" in inspect.signature(run).parameters
    return partial(run, progress=False) if takes and "progress" not in getattr(run, "keywords", {}) else run


@contextlib.contextmanager
def _folders(
    problems: Mapping[str, Problem], run: Callable[..., Result], seed: int, checkpoint: str | Path | None
) -> Iterator[dict[str, Path]]:
    """Folder of every problem's result in the checkpoint, which is seen to be that of the same call."""
    if checkpoint is None:
        yield {}
        return
    with open_checkpoint(checkpoint, {"engine": "map_problems", "run": fingerprint(run), "seed": seed}) as root:
        folders = {name: root / f"problem-{place:05d}" for place, name in enumerate(problems)}
        for name, folder in folders.items():
            with open_checkpoint(folder, {"engine": "map_problems", **identity(problems[name])}):
                pass
        yield folders


def _map_error(failures: Mapping[str, Failure], results: Mapping[str, Result], total: int) -> MapError:
    """The error that lists what failed; tracebacks after the list."""
    heads = [f"  {name}: {type(failure.error).__name__}: {failure.error}" for name, failure in failures.items()]
    texts = {name: failure.text for name, failure in failures.items()}
    lines = [
        f"{len(failures)} of {total} problems failed; the results of the others are in this error's 'results', and in "
        "the checkpoint if there is one:",
        *heads,
        *(f"{name}, {text}" for name, text in texts.items()),
    ]
    return MapError("\n".join(lines), texts, results)
