"""Markov chain Monte Carlo: chains in processes of our own, streamed draws, checkpoints and resume.

Draws depend on the problem, the kernel, ``seed``, ``warmup_steps`` and ``thin`` alone: every chain has its own
random-number streams, so that the number of workers, the chain method and interruptions change nothing.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
import xarray as xr
from tqdm.auto import tqdm

from probmodels.inference.checkpoint import ChainStore, open_checkpoint
from probmodels.inference.kernels import Kernel, NUTSKernel
from probmodels.inference.ops import (
    Interrupts,
    chain_seed,
    fingerprint,
    isolated,
    part,
    restore_rng,
    rng_tensors,
    single_thread,
)
from probmodels.inference.predictive import complete
from probmodels.inference.problem import Problem, ProblemError
from probmodels.inference.result import Result, build_tree, to_dataset

__all__ = ["ChainError", "ChainPlan", "KernelFactory", "run_chain", "run_mcmc"]

KernelFactory = Callable[[Problem], Kernel]
# Reports (iteration, text for the progress bar) and learns whether the chain shall stop.
Reporter = Callable[[int, str], bool]

_KERNEL_STREAM = 0
_FLUSH_BYTES = 64 * 2**20
_REPORT_SECONDS = 0.2


class ChainError(RuntimeError):
    """A chain that failed: which one and how."""


@dataclass(frozen=True)
class ChainPlan:
    """What one chain has to do."""

    chain: int
    folder: str
    num_samples: int
    warmup_steps: int
    thin: int
    seed: int
    checkpoint_every: float
    dtype: torch.dtype

    @property
    def num_sweeps(self) -> int:
        """Sweeps of the whole chain, warm-up included."""
        return self.warmup_steps + self.num_samples * self.thin


def run_mcmc(
    problem: Problem,
    *,
    kernel: str | KernelFactory | None = None,
    num_samples: int = 1000,
    warmup_steps: int = 1000,
    num_chains: int = 4,
    thin: int = 1,
    chain_method: str = "process",
    num_workers: int | None = None,
    seed: int = 0,
    progress: bool = True,
    checkpoint: str | Path | None = None,
    checkpoint_every: float = 30.0,
    timeout: float | None = None,
) -> Result:
    """Draw from the posterior of a problem.

    Parameters
    ----------
    problem
        What to infer.
    kernel
        ``"nuts"``, a function from problem to `Kernel`, or None for the problem's own kernel, else NUTS.
    num_samples
        Draws kept per chain.
    warmup_steps
        Sweeps before the first draw, left out of the result.
    num_chains
        Number of chains.
    thin
        Sweeps per draw kept.
    chain_method
        ``"process"``: chains run in parallel processes; ``"sequential"``: one after the other in this process.
    num_workers
        Processes; None for one per CPU, at most one per chain.
    seed
        Non-negative; the same seed gives the same draws, whatever ``chain_method`` and ``num_workers``.
    progress
        Whether to show a progress bar.
    checkpoint
        Folder for draws and states. If it holds an unfinished run of the same call, that run is continued to the same
        draws as if it had never stopped; ``num_samples`` and ``num_chains`` may be larger than before.
    checkpoint_every
        Seconds between two checkpoints of a chain.
    timeout
        Seconds after which to stop as if interrupted.

    Returns
    -------
    Result
        Groups ``posterior``, ``sample_stats``, ``observed_data``, ``constant_data``, ``invariants`` where defined.

    Raises
    ------
    ProblemError
        If the problem is broken, or cannot be sent to another process.
    CheckpointError
        If the checkpoint cannot be written, is damaged, or belongs to another run.
    ChainError
        If a chain raises or its process dies.
    KeyboardInterrupt
        After an interrupt, once every running chain has finished its sweep and saved its state.
    TimeoutError
        After ``timeout``, in the same way.
    """
    for name, value, least in (
        ("num_samples", num_samples, 1),
        ("warmup_steps", warmup_steps, 0),
        ("num_chains", num_chains, 1),
        ("thin", thin, 1),
        ("seed", seed, 0),
        ("num_workers", 1 if num_workers is None else num_workers, 1),
    ):
        if value < least:
            raise ProblemError(f"{problem.name}: {name}={value}; it must be at least {least}")
    if chain_method not in ("process", "sequential"):
        raise ProblemError(f"{problem.name}: chain_method={chain_method!r}; choose 'process' or 'sequential'")
    factory = _choose_kernel(problem, kernel)
    problem.validate(guide=False)
    if isinstance(factory, type) and issubclass(factory, Kernel):
        factory.prepare()
    settings: dict[str, Any] = {"num_samples": num_samples, "warmup_steps": warmup_steps}
    settings |= {"num_chains": num_chains, "thin": thin, "seed": seed, "chain_method": chain_method}
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        if checkpoint is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="probmodels-")))
        else:
            folder = open_checkpoint(checkpoint, _identity(problem, factory, warmup_steps, thin, seed))
        plans = [
            ChainPlan(
                chain=chain,
                folder=str(folder / f"chain-{chain}"),
                num_samples=num_samples,
                warmup_steps=warmup_steps,
                thin=thin,
                seed=seed,
                checkpoint_every=checkpoint_every if checkpoint is not None else float("inf"),
                dtype=torch.get_default_dtype(),
            )
            for chain in range(num_chains)
        ]
        # Only what a kernel may need travels to the workers.
        bare = replace(problem, guide=None, align=None, invariants=None)
        with _Watch(plans, checkpoint=checkpoint, progress=progress, timeout=timeout) as watch:
            if chain_method == "process":
                from probmodels.inference.workers import run_in_processes

                run_in_processes(bare, factory, plans, watch, num_workers)
            else:
                _run_in_turn(bare, factory, plans, watch)
        parts = [ChainStore(Path(plan.folder)).read(num_samples) for plan in plans]
    draws = {name: np.stack([part[name].numpy() for part in parts]) for name in parts[0]}
    sites = {name.removeprefix("draw/"): value for name, value in draws.items() if name.startswith("draw/")}
    stats = {name.removeprefix("stat/"): value for name, value in draws.items() if name.startswith("stat/")}
    del draws, parts
    dims = {**dict(factory_dims(factory)), **problem.dims()}
    posterior = to_dataset(complete(problem, sites, seed=seed), dims, problem.coords)
    groups = {"sample_stats": _stats(stats)} if stats else {}
    result = Result(build_tree(problem, posterior, engine="mcmc", seed=seed, settings=settings, groups=groups))
    result.tree.attrs["kernel"] = _name(factory)
    result.tree.attrs["sampling_seconds"] = round(time.monotonic() - started, 3)
    return result


def run_chain(problem: Problem, factory: KernelFactory, plan: ChainPlan, report: Reporter) -> bool:
    """Run or continue one chain, streaming draws and states to its folder.

    Returns
    -------
    bool
        Whether the chain is complete; False if ``report`` asked to stop.
    """
    store = ChainStore(Path(plan.folder))
    saved = store.resume()
    if saved is not None and store.num_draws >= plan.num_samples:
        report(plan.num_sweeps, "")
        return True
    seed = chain_seed(plan.seed, plan.chain, _KERNEL_STREAM)
    with isolated(seed), single_thread(), pyro.validation_enabled(False):
        kernel = factory(problem)
        if not isinstance(kernel, Kernel):
            raise ProblemError(f"{problem.name}: {_name(factory)} makes a {type(kernel).__name__}, which is no Kernel")
        kernel.seed(seed)
        kernel.setup(plan.warmup_steps, *problem.args, **problem.kwargs)
        params, iteration = kernel.initial_params, 0
        if saved is not None:
            state, iteration = saved
            kernel.load_state_dict(part(state, "kernel/"))
            params = part(state, "params/")
            restore_rng(part(state, "rng/"))

        def commit() -> None:
            state: dict[str, Any] = {f"kernel/{key}": value for key, value in kernel.state_dict().items()}
            state |= {f"params/{key}": value for key, value in params.items()}
            state |= {f"rng/{key}": value for key, value in rng_tensors().items()}
            store.commit(iteration, state)

        stop = report(iteration, _text(kernel, iteration, plan))
        last_report = last_commit = time.monotonic()
        while iteration < plan.num_sweeps and not stop:
            if iteration == plan.warmup_steps:
                kernel.end_warmup()
            params = kernel.sample(params)
            iteration += 1
            if iteration > plan.warmup_steps and (iteration - plan.warmup_steps) % plan.thin == 0:
                store.append(kernel.export(params), kernel.sample_stats())
            now = time.monotonic()
            if now - last_report >= _REPORT_SECONDS:
                stop, last_report = report(iteration, _text(kernel, iteration, plan)), now
            if now - last_commit >= plan.checkpoint_every or store.pending_bytes >= _FLUSH_BYTES:
                commit()
                last_commit = time.monotonic()
        commit()
        report(iteration, "")
        kernel.cleanup()
    return iteration >= plan.num_sweeps


class _Watch:
    """Progress bar, interrupts and time limit of a run, as the process that was called sees them."""

    def __init__(
        self, plans: list[ChainPlan], *, checkpoint: str | Path | None, progress: bool, timeout: float | None
    ) -> None:
        self._done = dict.fromkeys((plan.chain for plan in plans), 0)
        self._total = sum(plan.num_sweeps for plan in plans)
        self._checkpoint, self._progress = checkpoint, progress
        self._deadline = float("inf") if timeout is None else time.monotonic() + timeout
        self._interrupts = Interrupts()

    def __enter__(self) -> _Watch:
        self._bar = tqdm(total=self._total, disable=not self._progress, unit="sweep", desc="chains", dynamic_ncols=True)
        self._interrupts.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._interrupts.__exit__(*exc)
        self._bar.close()

    @property
    def stopping(self) -> bool:
        """Whether the chains shall finish their sweep, save and stop."""
        return self._interrupts.count > 0 or time.monotonic() > self._deadline

    def update(self, chain: int, iteration: int, text: str) -> None:
        """Show that a chain has got to an iteration."""
        self._bar.update(iteration - self._done[chain])
        self._done[chain] = iteration
        if text:
            self._bar.set_postfix_str(f"chain {chain}: {text}", refresh=False)

    def raise_if_stopped(self) -> None:
        """Raise what a stopped run owes its caller.

        Raises
        ------
        KeyboardInterrupt, TimeoutError
            Saying where the chains stand and how to resume.
        """
        done = sum(self._done.values())
        if not self.stopping or (done == self._total and not self._interrupts.count):
            return
        how = (
            "nothing was kept, since no checkpoint folder was given"
            if self._checkpoint is None
            else f"draws and states are saved in {self._checkpoint}; repeat the same call to resume"
        )
        kind = KeyboardInterrupt if self._interrupts.count else TimeoutError
        raise kind(f"stopped after {done} of {self._total} sweeps: {how}")


def _run_in_turn(problem: Problem, factory: KernelFactory, plans: list[ChainPlan], watch: _Watch) -> None:
    for plan in plans:

        def report(iteration: int, text: str, chain: int = plan.chain) -> bool:
            watch.update(chain, iteration, text)
            return watch.stopping

        try:
            finished = run_chain(problem, factory, plan, report)
        except Exception as error:
            error.add_note(f"in chain {plan.chain} of problem {problem.name!r}")
            raise
        if not finished:
            break
    watch.raise_if_stopped()


def _choose_kernel(problem: Problem, kernel: str | KernelFactory | None) -> KernelFactory:
    if kernel is None:
        return problem.kernel or NUTSKernel
    if isinstance(kernel, str):
        if kernel != "nuts":
            raise ProblemError(f"{problem.name}: kernel={kernel!r}; choose 'nuts' or give a maker of a Kernel")
        return NUTSKernel
    if not callable(kernel) or isinstance(kernel, Kernel):
        kind = type(kernel).__name__
        raise ProblemError(f"{problem.name}: kernel must be a function that makes a Kernel, not a {kind}")
    return kernel


def _identity(problem: Problem, factory: KernelFactory, warmup_steps: int, thin: int, seed: int) -> dict[str, Any]:
    """All that decides the draws of a run."""
    return {
        "engine": "mcmc",
        "problem": problem.name,
        "model": fingerprint(problem.model),
        "args": fingerprint(problem.args),
        "kwargs": fingerprint(problem.kwargs),
        "reparam": {name: type(reparam).__name__ for name, reparam in problem.reparam.items()},
        "kernel": fingerprint(factory),
        "warmup_steps": warmup_steps,
        "thin": thin,
        "seed": seed,
        "dtype": str(torch.get_default_dtype()),
    }


def factory_dims(factory: Any) -> Mapping[str, Any]:
    """Axis names that the kernel class declares for variables of its own."""
    while hasattr(factory, "func"):  # functools.partial
        factory = factory.func
    return getattr(factory, "dims", {})


def _stats(stats: Mapping[str, np.ndarray]) -> xr.Dataset:
    typed = {name: value.astype(bool) if name == "diverging" else value for name, value in stats.items()}
    typed |= {name: value.astype(np.int64) for name, value in typed.items() if name in ("n_steps", "tree_depth")}
    return to_dataset(typed, {}, {})


def _text(kernel: Kernel, iteration: int, plan: ChainPlan) -> str:
    phase = "warm-up" if iteration < plan.warmup_steps else "draws"
    log = kernel.logging()
    extra = ", ".join(f"{key} {value}" for key, value in log.items()) if isinstance(log, Mapping) else str(log or "")
    return f"{phase} {iteration}/{plan.num_sweeps} {extra}".rstrip()


def _name(factory: Any) -> str:
    while hasattr(factory, "func"):
        factory = factory.func
    return getattr(factory, "__qualname__", type(factory).__name__)
