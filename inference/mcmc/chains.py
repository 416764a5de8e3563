"""One chain, or all at once: driven to its end, streamed to a folder, watched, stopped and resumed."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pyro
import torch
from tqdm.auto import tqdm

from probmodels.errors import ProblemError
from probmodels.inference.mcmc.kernels import Kernel
from probmodels.inference.problem import Problem
from probmodels.inference.runtime.checkpoint import ChainStore
from probmodels.inference.runtime.ops import (
    Interrupts,
    chain_seed,
    isolated,
    part,
    restore_rng,
    rng_tensors,
    single_thread,
)
from probmodels.inference.runtime.tensors import device_of, with_tensors

__all__ = [
    "SAMPLING",
    "WARMUP",
    "ChainPlan",
    "KernelFactory",
    "Progress",
    "Watch",
    "bare",
    "kernel_name",
    "phase_at",
    "run_chain",
    "run_in_turn",
]

KernelFactory = Callable[[Problem], Kernel]
# Reports (what the chain does, iteration, text for the progress bar) and learns whether the chain shall stop.
Reporter = Callable[[str, int, str], bool]

_KERNEL_STREAM = 0
_FLUSH_BYTES = 64 * 2**20
_REPORT_SECONDS = 0.2
WARMUP, SAMPLING = "warm-up", "sampling"


@dataclass(frozen=True)
class ChainPlan:
    """What one chain, or all of them at once, has to do; ``init`` is a name, or values of the sites to start from."""

    chain: int
    folder: str
    num_samples: int
    warmup_steps: int
    thin: int
    seed: int
    checkpoint_every: float
    dtype: torch.dtype
    init: str | dict[str, torch.Tensor] | None = None

    @property
    def num_sweeps(self) -> int:
        """Sweeps of the whole chain, warm-up included."""
        return self.warmup_steps + self.num_samples * self.thin


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
        report(SAMPLING, plan.num_sweeps, "")
        return True
    seed = chain_seed(plan.seed, plan.chain, _KERNEL_STREAM)
    with isolated(seed), single_thread(), pyro.validation_enabled(False):
        kernel = factory(problem)
        if not isinstance(kernel, Kernel):
            raise ProblemError(
                f"{problem.name}: {kernel_name(factory)} makes a {type(kernel).__name__}, which is no Kernel"
            )
        kernel.seed(seed)
        kernel.init, kernel.tell = plan.init, lambda doing: report(doing, 0, "")
        kernel.setup(plan.warmup_steps, *problem.args, **problem.kwargs)
        params, iteration = kernel.initial_params, 0
        if saved is not None:
            state, iteration = saved
            moved = with_tensors(state, _onto(device_of(problem.args, problem.kwargs, problem.model)))
            kernel.load_state_dict(part(moved, "kernel/"))
            params = part(moved, "params/")
            restore_rng(part(state, "rng/"))

        def commit() -> None:
            state: dict[str, Any] = {f"kernel/{key}": value for key, value in kernel.state_dict().items()}
            state |= {f"params/{key}": value for key, value in params.items()}
            state |= {f"rng/{key}": value for key, value in rng_tensors().items()}
            store.commit(iteration, state, kernel.attrs())

        stop = report(*_stand(kernel, iteration, plan))
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
                stop, last_report = report(*_stand(kernel, iteration, plan)), now
            if now - last_commit >= plan.checkpoint_every or store.pending_bytes >= _FLUSH_BYTES:
                commit()
                last_commit = time.monotonic()
        commit()
        report(phase_at(iteration, plan), iteration, "")
        kernel.cleanup()
    return iteration >= plan.num_sweeps


@dataclass(frozen=True)
class Progress:
    """What a callback learns: where a chain stands (vectorised chains are one), and what the progress bar says.

    Attributes
    ----------
    chain
        Number of the chain, from 0.
    iteration, total
        Sweeps that are done, and those of the whole chain, warm-up included.
    text
        Step size, acceptance and the like.
    phase
        What the chain does: ``"capturing the graph"``, ``"finding starting points"``, ``"warm-up"`` or ``"sampling"``.
    """

    chain: int
    iteration: int
    total: int
    text: str
    phase: str


class Watch:
    """Progress bar, interrupts and time limit of a run, as the process that was called sees them.

    Parameters
    ----------
    label
        What is inferred.
    progress
        Whether a bar is shown.
    checkpoint
        Where the run is saved, for what is said when it stops.
    callbacks
        Called with every report of a chain.
    """

    def __init__(
        self,
        label: str,
        *,
        progress: bool,
        checkpoint: str | Path | None = None,
        callbacks: Sequence[Callable[[Progress], object]] = (),
    ) -> None:
        self._label, self._progress, self._checkpoint, self._callbacks = label, progress, checkpoint, callbacks
        self._done: dict[int, int] = {}
        self._totals: dict[int, int] = {}
        self._deadline, self._interrupts, self._doing = float("inf"), Interrupts(), ""

    def __enter__(self) -> Self:
        self._bar = tqdm(disable=not self._progress, unit="sweep", desc=self._label, dynamic_ncols=True)
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.set_description(self._label)
        self._bar.close()

    def say(self, doing: str) -> None:
        """Show what is being done."""
        if doing != self._doing:
            self._doing = doing
            self._bar.set_description(f"{self._label}, {doing}")

    @contextlib.contextmanager
    def running(self, plans: Sequence[ChainPlan], timeout: float | None) -> Iterator[None]:
        """Count sweeps, and count interrupts instead of being torn out of a sweep, while the block runs.

        SIGTERM does not wait for long: what was saved is kept, and what the sweep or a start has done is lost.
        """
        self._totals = {plan.chain: plan.num_sweeps for plan in plans}
        self._done = dict.fromkeys(self._totals, 0)
        self._deadline = float("inf") if timeout is None else time.monotonic() + timeout
        if self._progress:
            self._bar.reset(sum(self._totals.values()))
        with self._interrupts:
            try:
                yield
            except KeyboardInterrupt as error:
                if not error.args:
                    self.raise_if_stopped()
                raise

    @property
    def stopping(self) -> bool:
        """Whether the chains shall finish their sweep, save and stop."""
        return self._interrupts.count > 0 or time.monotonic() > self._deadline

    def update(self, chain: int, phase: str, iteration: int, text: str) -> None:
        """Show what a chain does and to which iteration it has got."""
        self.say(phase)
        self._bar.update(iteration - self._done[chain])
        self._done[chain] = iteration
        if text:
            self._bar.set_postfix_str(f"chain {chain}: {text}" if len(self._done) > 1 else text, refresh=False)
        for callback in self._callbacks:
            callback(Progress(chain, iteration, self._totals[chain], text, phase))

    def raise_if_stopped(self) -> None:
        """Raise what a stopped run owes its caller.

        Raises
        ------
        KeyboardInterrupt, TimeoutError
            Saying where the chains stand and how to resume.
        """
        done, total = sum(self._done.values()), sum(self._totals.values())
        if not self.stopping or (done == total and not self._interrupts.count):
            return
        how = (
            "nothing was kept, since no checkpoint folder was given"
            if self._checkpoint is None
            else f"draws and states are saved in {self._checkpoint}; repeat the same call to resume"
        )
        kind = KeyboardInterrupt if self._interrupts.count else TimeoutError
        raise kind(f"stopped after {done} of {total} sweeps: {how}")


def run_in_turn(problem: Problem, factory: KernelFactory, plans: list[ChainPlan], watch: Watch) -> None:
    for plan in plans:

        def report(phase: str, iteration: int, text: str, chain: int = plan.chain) -> bool:
            watch.update(chain, phase, iteration, text)
            return watch.stopping

        try:
            finished = run_chain(problem, factory, plan, report)
        except Exception as error:
            error.add_note(f"in chain {plan.chain} of problem {problem.name!r}")
            raise
        if not finished:
            break
    watch.raise_if_stopped()


def bare(factory: Any) -> Any:
    """The class or function behind a maker of a kernel, without ``functools.partial``."""
    while hasattr(factory, "func"):
        factory = factory.func
    return factory


def kernel_name(factory: Any) -> str:
    """Name of the class or function behind a maker of a kernel."""
    return getattr(bare(factory), "__qualname__", type(factory).__name__)


def phase_at(iteration: int, plan: ChainPlan) -> str:
    """What a chain does that has made so many sweeps."""
    return WARMUP if iteration < plan.warmup_steps else SAMPLING


def _stand(kernel: Kernel, iteration: int, plan: ChainPlan) -> tuple[str, int, str]:
    """What a chain reports of itself."""
    log = kernel.logging()
    extra = ", ".join(f"{key} {value}" for key, value in log.items()) if isinstance(log, Mapping) else str(log or "")
    return phase_at(iteration, plan), iteration, f"{iteration}/{plan.num_sweeps} {extra}".rstrip()


def _onto(device: torch.device | None) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: tensor if device is None else tensor.to(device)
