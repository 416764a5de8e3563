"""Environment of new processes: threads, interrupts and the caller's script."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import types
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass

__all__ = ["interrupts_ignored", "main_hidden", "one_thread_environment"]

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS", "NUMBA_NUM_THREADS")


@contextlib.contextmanager
def one_thread_environment() -> Iterator[None]:
    """Environment in which numerical libraries of a new process use one thread."""
    saved = {name: os.environ.get(name) for name in _THREADS}
    os.environ.update(dict.fromkeys(_THREADS, "1"))
    try:
        yield
    finally:
        for name, value in saved.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def interrupts_ignored() -> Iterator[None]:
    """Children started inside ignore Ctrl-C from their first instruction on."""
    try:
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    except ValueError:  # not the main thread, which never receives signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler or signal.SIG_DFL)


@contextlib.contextmanager
def main_hidden() -> Iterator[None]:
    """Keep spawned processes from running the caller's script again, where nothing in it is needed."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
