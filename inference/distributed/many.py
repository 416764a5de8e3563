"""One engine on many problems, over processes of this machine or a Dask cluster."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, overload

from tqdm.auto import tqdm

from probmodels.errors import ProblemError, ProbmodelsError
from probmodels.inference.distributed.pools import Client, Failure, make_pool
from probmodels.inference.problem import Problem
from probmodels.inference.programs.programs import identity
from probmodels.inference.result import Result
from probmodels.inference.runtime.checkpoint import open_checkpoint
from probmodels.inference.runtime.fingerprints import fingerprint
from probmodels.inference.runtime.ops import Interrupts, chain_seed, isolated
from probmodels.options import Count, Seed, checked, refuse_unused

__all__ = ["MapError", "dask_map", "map_problems", "process_map"]


class MapError(ProbmodelsError, RuntimeError):
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


@overload
def map_problems(
    problems: Sequence[Problem],
    run: Callable[..., Result],
    *,
    client: Client | None = None,
    num_workers: Count | None = None,
    seed: Seed = 0,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> list[Result]: ...


@overload
def map_problems(
    problems: Mapping[str, Problem],
    run: Callable[..., Result],
    *,
    client: Client | None = None,
    num_workers: Count | None = None,
    seed: Seed = 0,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> dict[str, Result]: ...


@checked(ProblemError)
def map_problems(
    problems: Sequence[Problem] | Mapping[str, Problem],
    run: Callable[..., Result],
    *,
    client: Client | None = None,
    num_workers: Count | None = None,
    seed: Seed = 0,
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
        Seed of the map; each problem has one of its own by its place, so that results are the same wherever they run.
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
    if client is not None:
        refuse_unused(map_problems, "client", num_workers=num_workers)
    _check_engine(run)
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


@checked(ProblemError)
def process_map(num_workers: Count | None = None) -> Callable[..., list[Any]]:
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


def _infer(run: Callable[..., Result], problem: Problem, seed: int) -> Result:
    """On a worker: one problem; what ``run`` may take from global generators is reproducible as well."""
    with isolated(seed):
        result = run(problem, seed=seed)
    if not isinstance(result, Result):
        raise ProblemError(f"{problem.name}: run returned a {type(result).__name__}; it must return a Result")
    return result


def _check_engine(run: Callable[..., Result]) -> None:
    """Refuse what cannot be called as an engine, before any problem is sent anywhere."""
    try:
        inspect.signature(run).bind(None, seed=0)
    except (TypeError, ValueError) as error:
        raise ProblemError(f"run cannot be called as run(problem, seed=0): {error}; give an engine") from error


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
