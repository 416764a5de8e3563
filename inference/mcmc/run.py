"""Markov chain Monte Carlo: chains at once or in processes of our own, streamed draws, checkpoints and resume.

Draws depend on the problem, the kernel, ``seed``, ``warmup_steps`` and ``thin`` alone: chains in processes have
random-number streams of their own, so that the number of workers and interruptions change nothing. Vectorised chains
adapt together and share a stream, so that their draws depend on ``num_chains`` as well.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import math
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import xarray as xr
from annotated_types import Interval

from probmodels.errors import CaptureError, ChainError, ProblemError
from probmodels.inference.distributed.pools import Client
from probmodels.inference.labels import take_marginals, to_dataset
from probmodels.inference.mcmc.chains import ChainPlan, KernelFactory, Progress, Watch, bare, kernel_name, run_in_turn
from probmodels.inference.mcmc.chees import ChEESKernel
from probmodels.inference.mcmc.cost import check_room_in_memory, num_processes
from probmodels.inference.mcmc.kernels import Kernel, NUTSKernel
from probmodels.inference.mcmc.stopping import first_look, next_look
from probmodels.inference.predictive import complete
from probmodels.inference.problem import Problem
from probmodels.inference.programs.potential import Potential
from probmodels.inference.result import Result, build_tree
from probmodels.inference.runtime.checkpoint import ChainStore, check_room, open_checkpoint, read_draws
from probmodels.inference.runtime.fingerprints import fingerprint
from probmodels.inference.runtime.ops import isolated, part
from probmodels.inference.runtime.tensors import device_of, find_device, with_tensors
from probmodels.options import (
    Count,
    Draws,
    Natural,
    NonNegative,
    OneOf,
    Positive,
    Seed,
    check_options,
    checked,
    hint,
    refuse_unused,
)

__all__ = ["ChainError", "picklable", "run_mcmc"]

_log = logging.getLogger(__name__)

_KERNELS: dict[str, type[Kernel]] = {"chees": ChEESKernel, "nuts": NUTSKernel}
# Chains, draws and warm-up where the caller names none: vectorised chains are many and cheap.
_DEFAULTS = {
    True: {"num_chains": 32, "num_samples": 250, "warmup_steps": 300},
    False: {"num_chains": 4, "num_samples": 1000, "warmup_steps": 1000},
}
_START_STREAM = 3

Chains = Annotated[int, Interval(ge=1, le=2**20)]


@checked(ProblemError)
def run_mcmc(
    problem: Problem,
    *,
    kernel: Annotated[str, OneOf(tuple(_KERNELS))] | KernelFactory | None = None,
    kernel_options: Mapping[str, Any] | None = None,
    num_samples: Draws | None = None,
    warmup_steps: Natural | None = None,
    num_chains: Chains | None = None,
    target_ess: Positive | None = None,
    thin: Count = 1,
    chain_method: Literal["vectorized", "process", "sequential", "dask"] | None = None,
    init: str | Result | xr.Dataset | None = None,
    num_workers: Count | None = None,
    client: Client | None = None,
    seed: Seed = 0,
    device: str | torch.device | None = None,
    progress: bool = True,
    callbacks: Sequence[Callable[[Progress], object]] = (),
    checkpoint: str | Path | None = None,
    checkpoint_every: NonNegative = 30.0,
    timeout: Positive | None = None,
) -> Result:
    """Draw from the posterior of a problem.

    Parameters
    ----------
    problem
        What to infer.
    kernel
        ``"chees"``, ``"nuts"``, a function from problem to `Kernel`, or None for the problem's own kernel, else
        ChEES-HMC, with NUTS as fallback for models that have no static graph; the reason is logged and kept in the
        result.
    kernel_options
        Keyword arguments of the kernel, such as ``target_accept_prob``.
    num_samples
        Draws kept per chain, of which diagnostics need 4; None for 250 with vectorised chains, else 1000.
    warmup_steps
        Sweeps before the first draw, left out of the result; None for 300 with vectorised chains, else 1000.
    num_chains
        Number of chains; None for 32 vectorised ones, else 4.
    target_ess
        Effective sample size at which to stop: draws are looked at a few times, first when a quarter of
        ``num_samples`` is there, and chains end where they would pass the verdict with this as its ``ess_min``. Draws
        are those of a longer run, up to there; chains that do not mix run to ``num_samples``. None for all of them.
    thin
        Sweeps per draw kept.
    chain_method
        ``"vectorized"``: all chains at once in this process; ``"process"``: chains in parallel processes;
        ``"sequential"``: one after the other in this process; ``"dask"``: on the cluster of ``client``. None for
        vectorised where the kernel is, else processes.
    init
        Where chains start: ``"pathfinder"`` (normals along quasi-Newton paths; the default), ``"uniform"``,
        ``"prior"``, or the draws of a guide or of an earlier run to start from.
    num_workers
        Processes; None for one per CPU, at most one per chain.
    client
        ``distributed.Client`` of ``chain_method="dask"``.
    seed
        Non-negative; the same seed gives the same draws, whatever ``num_workers`` and, except for ``"vectorized"``,
        ``chain_method``.
    device
        Where the chains compute, such as ``"cuda"``; None for where the problem lies. The problem is moved there, and
        draws come back to the CPU.
    progress
        Whether to show a progress bar, which says what is done from the first second on.
    callbacks
        Called in this process with a `Progress`: when a chain begins to do something else, a few times a second, and at
        the end of every chain.
    checkpoint
        Folder for draws and states. If it holds an unfinished run of the same call, that run is continued to the same
        draws as if it had never stopped; ``num_samples`` may be larger than before and, except for ``"vectorized"``,
        ``num_chains``.
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
        If the problem is broken, an option is out of range or not used by what the others choose, or the problem
        cannot be vectorised though asked to, or cannot be sent to another process.
    CheckpointError
        If the checkpoint cannot be written, is damaged, or belongs to another run.
    ChainError
        If a chain raises or its process dies.
    KeyboardInterrupt
        After an interrupt, once every running chain has finished its sweep and saved its state.
    TimeoutError
        After ``timeout``, in the same way.
    """
    there = find_device(problem.name, device)
    moved = problem if there is None else problem.to(there)
    if there is not None:
        kernel = with_tensors(kernel, lambda tensor: tensor.to(there))
    factory, method = _choose(moved, kernel, kernel_options, chain_method)
    may_fall_back = kernel is None and chain_method is None
    if method != "process" and not may_fall_back:
        refuse_unused(run_mcmc, f"chain_method={method!r}", num_workers=num_workers)
    if method == "dask":  # before anything is prepared, which may take a minute
        from probmodels.inference.distributed.pools import check_client

        check_client(client)
    else:
        refuse_unused(run_mcmc, f"chain_method={method!r}", client=client)
    if checkpoint is None:
        refuse_unused(run_mcmc, "checkpoint=None", checkpoint_every=checkpoint_every)
    asked: dict[str, Any] = {"num_samples": num_samples, "warmup_steps": warmup_steps, "num_chains": num_chains}
    defaults = _DEFAULTS[method == "vectorized"]
    sizes = {name: defaults[name] if value is None else value for name, value in asked.items()}
    keeping: dict[str, Any] = {"checkpoint": checkpoint, "checkpoint_every": checkpoint_every, "timeout": timeout}
    watching: dict[str, Any] = {"progress": progress, "callbacks": callbacks}
    try:
        with Watch(problem.name, checkpoint=checkpoint, **watching) as watch:
            watch.say("checking the problem")
            _check(moved, factory, density=init is None or isinstance(init, str))
            starts = _starts(moved, factory, init, sizes["num_chains"], seed)
            _prepare(moved, factory, watch)
            run = _Run(
                problem, moved, factory, method, **sizes, thin=thin, seed=seed, init=starts, target_ess=target_ess
            )
            return run.result(watch, **keeping, num_workers=num_workers, client=client)
    except CaptureError as error:
        if not may_fall_back:
            raise ProblemError(
                f"{problem.name}: chains cannot be vectorised: {error}; leave chain_method and kernel out to fall back "
                "to NUTS, or pass kernel='nuts'"
            ) from error
        reason = str(error)
    _log.warning("%s: NUTS instead of vectorised HMC: %s", problem.name, reason)
    spawn = _may_spawn() and picklable(moved)
    known = inspect.signature(NUTSKernel).parameters
    options: dict[str, Any] = {name: value for name, value in (kernel_options or {}).items() if name in known}
    result = run_mcmc(
        problem,
        kernel="nuts",
        kernel_options=options,
        chain_method="process" if spawn else "sequential",
        num_workers=num_workers if spawn else None,
        init=init,
        target_ess=target_ess,
        thin=thin,
        seed=seed,
        device=device,
        **asked,
        **keeping,
        **watching,
    )
    result.tree.attrs["fallback"] = reason
    return result


@dataclass
class _Run:
    """One call of `run_mcmc` with every choice made; ``moved`` is the problem on the device of the chains."""

    problem: Problem
    moved: Problem
    factory: KernelFactory
    method: str
    num_samples: int
    warmup_steps: int
    num_chains: int
    thin: int
    seed: int
    init: str | list[dict[str, torch.Tensor]] | None
    target_ess: float | None

    def __post_init__(self) -> None:
        if self.method == "vectorized":
            self.factory = partial(self.factory, num_chains=self.num_chains)  # type: ignore[call-arg]

    def result(
        self,
        watch: Watch,
        *,
        num_workers: int | None,
        client: Any,
        checkpoint: str | Path | None,
        checkpoint_every: float,
        timeout: float | None,
    ) -> Result:
        """Run the chains and put their draws together."""
        started = time.monotonic()
        processes = num_processes(self.num_chains, num_workers) if self.method == "process" else 0
        check_room_in_memory(self.problem, self.num_chains, self.num_samples, processes)
        with contextlib.ExitStack() as stack:
            if checkpoint is None:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="probmodels-")))
            else:
                folder = stack.enter_context(open_checkpoint(checkpoint, self._identity()))
            every = checkpoint_every if checkpoint is not None else float("inf")
            check_room(folder, self._draw_bytes())
            for plan in self._plans(folder, every, self.num_samples):
                ChainStore(Path(plan.folder)).verify()
            limit, target = self.num_samples, self.target_ess
            look: int | None = limit if target is None else first_look(limit)
            while look is not None:
                plans = self._plans(folder, every, look)
                with watch.running(plans, None if timeout is None else timeout - (time.monotonic() - started)):
                    self._run(plans, watch, num_workers, client)
                watch.say("completing the draws")
                stores = [ChainStore(Path(plan.folder)) for plan in plans]
                tree = self._tree(read_draws(stores, look), stores[0].attrs())
                look = None if target is None else next_look(tree, look, limit, target)
        tree.attrs["sampling_seconds"] = round(time.monotonic() - started, 3)
        return Result(tree)

    @property
    def _small(self) -> Problem:
        """Only what a kernel may need, which travels to the workers."""
        return replace(self.moved, guide=None, align=None, invariants=None)

    def _run(self, plans: list[ChainPlan], watch: Watch, num_workers: int | None, client: Any) -> None:
        """Have all chains write their draws and states to their folders."""
        if self.method == "process":
            from probmodels.inference.mcmc.workers import run_in_processes

            watch.say("starting processes")
            run_in_processes(self._small, self.factory, plans, watch, num_workers)
        elif self.method == "dask":
            from probmodels.inference.mcmc.dask import run_on_dask

            watch.say("sending the problem to the cluster")
            run_on_dask(self._small, self.factory, plans, watch, client)
        else:
            run_in_turn(self._small, self.factory, plans, watch)

    def _tree(self, found: dict[str, torch.Tensor], attrs: Mapping[str, Any]) -> xr.DataTree:
        """Tree of what the chains wrote, which is emptied on the way."""
        problem = self.problem
        draws = {name: self._by_chain(found.pop(name)) for name in list(found)}
        sites, stats = part(draws, "draw/"), part(draws, "stat/")
        del draws
        if self.method == "vectorized":
            with isolated(self.seed):
                exported = Potential(self._small).export_many(torch.as_tensor(sites.pop("z")))
            sites = {name: value.numpy() for name, value in exported.items()}
        dims = {**dict(factory_dims(self.factory)), **problem.dims()}
        values = complete(problem, sites, seed=self.seed)
        groups = take_marginals(problem, values)
        posterior = to_dataset(values, dims, problem.coords)
        if stats:
            groups["sample_stats"] = _stats(stats).assign_attrs(attrs)
        names = ("num_samples", "warmup_steps", "num_chains", "thin", "seed")
        settings = {name: getattr(self, name) for name in names} | {"chain_method": self.method}
        settings |= {} if self.target_ess is None else {"target_ess": self.target_ess}
        tree = build_tree(problem, posterior, engine="mcmc", seed=self.seed, settings=settings, groups=groups)
        tree.attrs["kernel"] = kernel_name(self.factory)
        return tree

    def _plans(self, folder: Path, checkpoint_every: float, num_samples: int) -> list[ChainPlan]:
        count = 1 if self.method == "vectorized" else self.num_chains
        return [self._plan(chain, folder, checkpoint_every, num_samples) for chain in range(count)]

    def _plan(self, chain: int, folder: Path, checkpoint_every: float, num_samples: int) -> ChainPlan:
        return ChainPlan(
            chain=chain,
            folder=str(folder / ("chains" if self.method == "vectorized" else f"chain-{chain}")),
            num_samples=num_samples,
            warmup_steps=self.warmup_steps,
            thin=self.thin,
            seed=self.seed,
            checkpoint_every=checkpoint_every,
            dtype=torch.get_default_dtype(),
            init=self._init_of(chain),
        )

    def _init_of(self, chain: int) -> str | dict[str, torch.Tensor] | None:
        if not isinstance(self.init, list):
            return self.init
        if self.method != "vectorized":
            return self.init[chain]
        return {name: torch.stack([start[name] for start in self.init]) for name in self.init[0]}

    def _draw_bytes(self) -> int:
        """About what all draws take on disk; variables that are a kernel's own are not known beforehand."""
        kinds = ("latent",) if self.method == "vectorized" else ("latent", "deterministic")
        size = sum(math.prod(site.shape) for site in self.problem.sites.values() if site.kind in kinds)
        given = (*self.problem.args, *self.problem.kwargs.values())
        widths = [value.element_size() for value in given if isinstance(value, torch.Tensor)]
        return self.num_chains * self.num_samples * size * max([torch.get_default_dtype().itemsize, *widths])

    def _by_chain(self, draws: torch.Tensor) -> np.ndarray:
        """Draws (chain, draw, ...) from those of every store; one store holds all chains where they are vectorised."""
        if self.method != "vectorized":
            return draws.numpy()
        array = draws[0].numpy()
        if array.ndim == 1:  # a statistic that all chains share
            return np.broadcast_to(array, (self.num_chains, len(array)))
        return array.swapaxes(0, 1)

    def _identity(self) -> dict[str, Any]:
        """All that decides the draws."""
        problem = self.problem
        return {
            "engine": "mcmc",
            "problem": problem.name,
            "model": fingerprint(problem.model),
            "args": fingerprint(problem.args),
            "kwargs": fingerprint(problem.kwargs),
            "reparam": {name: type(reparam).__name__ for name, reparam in problem.reparam.items()},
            "kernel": fingerprint(self.factory),
            "device": (device_of(self.moved.args, self.moved.kwargs, self.moved.model) or torch.device("cpu")).type,
            "init": fingerprint(self.init),
            "warmup_steps": self.warmup_steps,
            "thin": self.thin,
            "seed": self.seed,
            "dtype": str(torch.get_default_dtype()),
        }


def picklable(problem: Problem) -> bool:
    """Whether a problem can be sent to another process."""
    from probmodels.inference.mcmc.workers import pack

    try:
        pack(replace(problem, guide=None, align=None, invariants=None), NUTSKernel)
    except ProblemError:
        return False
    return True


def _choose(
    problem: Problem, kernel: str | KernelFactory | None, options: Mapping[str, Any] | None, chain_method: str | None
) -> tuple[KernelFactory, str]:
    """Maker of the kernel, and how chains run."""
    factory: Any = kernel
    if kernel is None:
        own = problem.kernel
        if chain_method == "vectorized" and not getattr(own, "vectorized", False):
            own = None
        factory = own or (ChEESKernel if chain_method in (None, "vectorized") else NUTSKernel)
    elif isinstance(kernel, str):
        factory = _KERNELS[kernel]
    elif isinstance(kernel, Kernel):
        kind = type(kernel).__name__
        raise ProblemError(f"{problem.name}: kernel must be a function that makes a Kernel, not a {kind}")
    vectorized = bool(getattr(bare(factory), "vectorized", False))
    if options:
        _check_kernel_options(problem, factory, options)
        factory = partial(factory, **options)
    _check_complete(problem, factory, {"num_chains": 1} if vectorized else {})
    method = chain_method or ("vectorized" if vectorized else "process" if _may_spawn() else "sequential")
    if vectorized != (method == "vectorized"):
        how = "moves all chains at once" if vectorized else "moves one chain at a time"
        raise ProblemError(f"{problem.name}: {kernel_name(factory)} {how}; leave out chain_method={chain_method!r}")
    return factory, method


def _check(problem: Problem, factory: Any, *, density: bool) -> None:
    """Refuse a problem that is broken, whose draws cannot be kept, or that the kernel cannot compute where it lies."""
    problem.validate(guide=False, density=density)
    kept = [name for name in problem.transient if problem.sites[name].kind == "latent"]
    if kept:
        raise ProblemError(
            f"{problem.name}: transient={kept}; chains have to keep draws of latent sites, leave them out"
        )
    where = device_of(problem.args, problem.kwargs, problem.model)
    if getattr(bare(factory), "on_cpu", False) and where is not None and where.type != "cpu":
        raise ProblemError(
            f"{problem.name}: {kernel_name(factory)} computes on the CPU, and the problem lies on {where}; pass "
            "device='cpu', or another kernel"
        )


def _prepare(problem: Problem, factory: Any, watch: Watch) -> None:
    """Let the kernel do once what all chains share."""
    maker: Any = bare(factory)
    if isinstance(maker, type) and issubclass(maker, Kernel) and maker.prepare.__func__ is not Kernel.prepare.__func__:  # type: ignore[attr-defined]
        watch.say("compiling the sweep")
        maker.prepare(problem)


def _check_kernel_options(problem: Problem, factory: Any, options: Mapping[str, Any]) -> None:
    """Compare options with the annotations of what makes the kernel; the number of chains is an option of the run."""
    maker = bare(factory)
    if isinstance(maker, type):
        function: Any = inspect.unwrap(maker.__init__)  # type: ignore[misc]
    else:
        function = maker if inspect.isroutine(maker) else maker.__call__
    parameters = inspect.signature(maker).parameters
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    known = None if open_ended else [name for name in list(parameters)[1:] if name != "num_chains"]
    where = f"{problem.name}: kernel_options: "
    check_options(function, options, where=where, error=ProblemError, of=f" of {kernel_name(factory)}", known=known)


def _check_complete(problem: Problem, factory: Any, options: Mapping[str, Any]) -> None:
    """Refuse what cannot be called as the maker of a kernel, as one whose options are missing."""
    try:
        inspect.signature(factory).bind(problem, **options)
    except (TypeError, ValueError) as error:
        raise ProblemError(
            f"{problem.name}: {kernel_name(factory)} cannot make a kernel: {error}; give its options as kernel_options"
        ) from error


def _may_spawn() -> bool:
    """Whether this process may start others; workers of pools may not."""
    return not multiprocessing.current_process().daemon


def _starts(
    problem: Problem, factory: Any, init: str | Result | xr.Dataset | None, num_chains: int, seed: int
) -> str | list[dict[str, torch.Tensor]] | None:
    """What kernels are told about where to start: a name, or one set of values per chain."""
    if init is None:
        return None
    known = getattr(bare(factory), "inits", ())
    if isinstance(init, str):
        if init not in known:
            near = hint(init, known)
            raise ProblemError(f"{problem.name}: init={init!r}, which {kernel_name(factory)} does not know{near}")
        return init
    if not known:
        raise ProblemError(f"{problem.name}: {kernel_name(factory)} chooses its starts itself; leave init out")
    posterior = init if isinstance(init, xr.Dataset) else init.posterior
    sites = {name: site for name, site in problem.sites.items() if site.kind == "latent" and not site.discrete}
    lost = [name for name in sites if name not in posterior]
    if lost:
        raise ProblemError(f"{problem.name}: init lacks the sites {lost}; it has {list(posterior.data_vars)}")
    stacked = {name: posterior[name].transpose("chain", "draw", ...).values for name in sites}
    for name, site in sites.items():
        if stacked[name].shape[2:] != site.shape:
            raise ProblemError(
                f"{problem.name}: init has site {name!r} of shape {stacked[name].shape[2:]}; the model has {site.shape}"
            )
    flat = {name: torch.as_tensor(value.reshape(-1, *value.shape[2:])) for name, value in stacked.items()}
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(_START_STREAM,)))
    count = len(next(iter(flat.values())))
    chosen = rng.choice(count, num_chains, replace=count < num_chains)
    return [{name: value[row] for name, value in flat.items()} for row in chosen]


def factory_dims(factory: Any) -> Mapping[str, Any]:
    """Axis names that the kernel class declares for variables of its own."""
    return getattr(bare(factory), "dims", {})


def _stats(stats: Mapping[str, np.ndarray]) -> xr.Dataset:
    typed = {name: value.astype(bool) if name == "diverging" else value for name, value in stats.items()}
    typed |= {name: value.astype(np.int64) for name, value in typed.items() if name in ("n_steps", "tree_depth")}
    return to_dataset(typed, {}, {})
