"""What the engines share: isolation of global state, random-number state and atomic files."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.uncondition_messenger import UnconditionMessenger
from pyro.util import get_rng_state, set_rng_state
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.distributions import biject_to

__all__ = [
    "FixGenerated",
    "Interrupts",
    "chain_seed",
    "clean_attrs",
    "foreign_faults",
    "is_enumerable",
    "is_generated",
    "is_improper",
    "isolated",
    "named_deterministic",
    "part",
    "restore_rng",
    "rng_tensors",
    "single_thread",
    "uniform_start",
    "versions",
    "write_atomically",
    "write_json",
]


@contextlib.contextmanager
def isolated(seed: int | None = None) -> Iterator[None]:
    """Run a block in an empty parameter store, and give the caller's random-number state back afterwards.

    Sites with improper priors, which cannot be drawn, get values as starting points have them.

    Parameters
    ----------
    seed
        Seeds torch, numpy and random inside the block; None leaves them as they are.
    """
    state, accelerator = get_rng_state(), _accelerator_rng()
    with pyro.get_param_store().scope(), _StartImproper():
        try:
            if seed is not None:
                pyro.set_rng_seed(seed)
            yield
        finally:
            set_rng_state(state)
            if accelerator is not None:
                torch.get_device_module().set_rng_state(accelerator)


def is_improper(fn: Any) -> bool:
    """Whether a distribution is flat on a whole support, so that nothing can be drawn from it."""
    while not isinstance(fn, dist.ImproperUniform) and (base := getattr(fn, "base_dist", None)) is not None:
        fn = base
    return isinstance(fn, dist.ImproperUniform)


class _StartImproper(Messenger):
    """Give sites with improper priors values that are uniform about zero in unconstrained space."""

    def _pyro_sample(self, msg: Any) -> None:
        if msg["value"] is None and not msg["done"] and is_improper(msg["fn"]):
            msg["value"] = uniform_start(msg)


def uniform_start(msg: Any) -> Tensor:
    """Value of a site that is uniform in [-2, 2] in unconstrained space; a draw of one that is discrete."""
    fn = msg["fn"]
    if getattr(fn.support, "is_discrete", False):
        drawn: Tensor = fn().detach()
        return drawn
    bijection = biject_to(fn.support)
    like = torch.empty(()) if is_improper(fn) else fn().detach()
    found: Tensor = bijection(4 * torch.rand_like(like.new_empty(bijection.inverse_shape(fn.shape()))) - 2)
    return found


class Interrupts:
    """Count SIGINT and SIGTERM inside a block instead of being torn out of a step by them.

    The third one raises KeyboardInterrupt at once, and SIGTERM after a grace time, wherever the block is by then. Where
    not even that ends it, as in a long call of a library, SIGTERM ends the process. Outside the main thread, which
    alone receives signals, all this does nothing.
    """

    _GRACE_SECONDS = 1.0  # to finish a step and to save
    _LAST_SECONDS = 0.6  # to come back to Python

    def __init__(self) -> None:
        self.count = 0
        self._overdue = False
        self._left, self._raised = threading.Event(), threading.Event()
        self._clock: threading.Thread | None = None
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *exc: object) -> None:
        self._left.set()
        try:
            if self._clock is not None:
                self._clock.join()
        finally:
            for number, handler in self._handlers.items():
                signal.signal(number, handler or signal.SIG_DFL)

    def _on_signal(self, number: int, frame: object) -> None:
        self.count += 1
        if self.count > 2 or self._overdue:
            self._raised.set()
            raise KeyboardInterrupt
        if number == signal.SIGTERM and self._clock is None:
            self._clock = threading.Thread(target=self._end, daemon=True, name="probmodels-sigterm")
            self._clock.start()

    def _end(self) -> None:
        if self._left.wait(self._GRACE_SECONDS):
            return
        self._overdue = True
        os.kill(os.getpid(), signal.SIGTERM)  # to the main thread, also where that waits
        if not self._raised.wait(self._LAST_SECONDS):
            os._exit(128 + signal.SIGTERM)


@contextlib.contextmanager
def single_thread() -> Iterator[None]:
    """One thread of torch and of BLAS inside the block: small models run faster, and sums keep one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(limits=1):
            yield
    finally:
        torch.set_num_threads(threads)


def chain_seed(seed: int, *key: int) -> int:
    """Independent 32-bit seed of a stream (chain, purpose) of a run; the same whatever the number of streams."""
    return int(np.random.SeedSequence(seed, spawn_key=key).generate_state(1)[0])


def _accelerator_rng() -> Tensor | None:
    """State of the generator of the accelerator, where there is one that this process uses."""
    if not torch.accelerator.is_available():
        return None
    module: Any = torch.get_device_module()
    used = getattr(module, "is_initialized", lambda: True)()
    return module.get_rng_state() if used else None


def rng_tensors() -> dict[str, Tensor]:
    """State of the global generators of torch, on the CPU and on an accelerator in use, of numpy and of Python."""
    numpy_state = np.random.get_state(legacy=False)  # noqa: NPY002 -- the global generator that pyro and kernels may use
    assert isinstance(numpy_state, dict)
    tail = [numpy_state["state"]["pos"], numpy_state["has_gauss"]]
    version_, words, gauss = random.getstate()
    accelerator = _accelerator_rng()
    return ({} if accelerator is None else {"accelerator": accelerator}) | {
        "torch": torch.get_rng_state(),
        "numpy": torch.tensor([*numpy_state["state"]["key"].tolist(), *tail], dtype=torch.int64),
        "numpy_gauss": torch.tensor(numpy_state["gauss"], dtype=torch.float64),
        "python": torch.tensor([version_, *words], dtype=torch.int64),
        "python_gauss": torch.tensor(np.nan if gauss is None else gauss, dtype=torch.float64),
    }


def restore_rng(state: Mapping[str, Tensor]) -> None:
    """Set the global generators to what `rng_tensors` returned."""
    torch.set_rng_state(state["torch"])
    if "accelerator" in state and torch.accelerator.is_available():
        module: Any = torch.get_device_module()
        module.set_rng_state(state["accelerator"])
    *key, pos, has_gauss = state["numpy"].tolist()
    legacy = ("MT19937", np.array(key, dtype=np.uint32), pos, has_gauss, state["numpy_gauss"].item())
    np.random.set_state(legacy)  # noqa: NPY002 -- see rng_tensors
    version_, *words = state["python"].tolist()
    gauss = state["python_gauss"].item()
    random.setstate((version_, tuple(words), None if np.isnan(gauss) else gauss))


def part(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Entries of a flat state whose keys start with a prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def is_generated(msg: Mapping[str, Any]) -> bool:
    """Whether a message or trace node is a sample site marked ``infer={"generated": True}``."""
    return msg["type"] == "sample" and bool((msg.get("infer") or {}).get("generated"))


def is_enumerable(fn: Any) -> bool:
    """Whether a distribution lists the values of its support."""
    if not getattr(fn, "has_enumerate_support", False):
        return False
    try:
        fn.enumerate_support(expand=False)
    except NotImplementedError:
        return False
    return True


def named_deterministic(name: str, value: Tensor, event_dims: Sequence[str] = ()) -> Tensor:
    """A deterministic site with names for its event axes, its other axes those of the plates around it.

    `pyro.deterministic` calls every axis an event axis, and names none.

    Parameters
    ----------
    name
        Name of the site.
    value
        Value, (*plates, *event_dims).
    event_dims
        Name of every event axis.
    """
    infer: Any = {"_deterministic": True, "event_dims": list(event_dims)}
    point = dist.Delta(value, event_dim=len(event_dims)).mask(False)
    found: Tensor = pyro.sample(name, point, obs=value, infer=infer)
    return found


class Unobserve(UnconditionMessenger):
    """Sample observed sites, as ``poutine.uncondition`` does, and leave deterministic ones their value.

    Pyro observes deterministic sites at a Delta all of whose axes are event axes: sampled, it would be repeated over
    the plates around it.
    """

    def _pyro_sample(self, msg: Any) -> None:
        if not (msg["infer"] or {}).get("_deterministic"):
            super()._pyro_sample(msg)


class FixGenerated(Messenger):
    """Hide generated sites and hold each at its first value, so that a log density spends nothing on them."""

    def __init__(self) -> None:
        super().__init__()
        self._values: dict[str, Any] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if is_generated(msg):
            msg["stop"] = True
            if msg["name"] in self._values:
                msg["value"], msg["done"] = self._values[msg["name"]], True

    def _pyro_post_sample(self, msg: Any) -> None:
        if is_generated(msg) and msg["name"] not in self._values:
            self._values[msg["name"]] = msg["value"].detach()


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Have ``write`` fill a temporary neighbour of ``path``, then rename it: readers see the old or the new file.

    Neighbours that processes left when they were killed are removed.

    Raises
    ------
    OSError
        If it cannot be written, also where a library says so by an error of its own.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with foreign_faults():
            write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    for left in path.parent.glob(f".{path.name}.*.tmp"):
        if not _runs(left.name.split(".")[-2]):
            left.unlink(missing_ok=True)


def _runs(process: str) -> bool:
    """Whether a process of this number may be running; those that were killed leave half-written files."""
    if sys.platform == "win32" or not process.isdigit():
        return True  # there a signal cannot ask
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


@contextlib.contextmanager
def foreign_faults() -> Iterator[None]:
    """Errors of the libraries of netCDF and safetensors about a file, which may be RuntimeErrors, as OSErrors."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        if "HDF error" in str(error) or type(error).__name__ == "SafetensorError":
            raise OSError(f"the file cannot be written ({error}); is the disk full?") from error
        raise


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically."""
    write_atomically(path, lambda file: file.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8"))


def clean_attrs(attrs: Mapping[Any, Any]) -> dict[str, Any]:
    """Attributes as netCDF can hold them: bool, None, dicts and nested lists become JSON text."""

    def clean(value: Any) -> Any:
        if isinstance(value, bool | np.bool_ | Mapping) or value is None:
            return json.dumps(value if not isinstance(value, np.bool_) else bool(value), default=str)
        if isinstance(value, str | int | float | np.integer | np.floating):
            return value
        if isinstance(value, np.ndarray) and value.ndim <= 1 and value.dtype.kind in "iuf":
            return value
        if isinstance(value, list | tuple) and value and all(type(item) in (int, float) for item in value):
            return list(value)
        return json.dumps(value, default=str) if isinstance(value, list | tuple) else str(value)

    return {str(key): clean(value) for key, value in attrs.items()}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the numbers of a run."""
    found = {"python": platform.python_version()}
    for name in ("probmodels", "torch", "pyro-ppl", "numpy", "scipy", "numba", "xarray", "arviz"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
