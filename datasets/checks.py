"""Checks that loaders share: arrays and paths given by the user, and sizes whose product has to fit in memory."""

from __future__ import annotations

import contextlib
import math
import os
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from annotated_types import Interval
from numpy.typing import NDArray

from probmodels.errors import DataError, ProbmodelsError

__all__ = [
    "SMALLER",
    "AnyPath",
    "Share",
    "as_array",
    "check_fits",
    "check_size",
    "existing_file",
    "existing_folder",
    "free_memory",
]

AnyPath = str | os.PathLike[str]
Share = Annotated[float, Interval(ge=0, lt=1)]  # of rows that are held back: some have to be left

SMALLER = (
    "choose a smaller region (--region) or a shorter period (--period), or make the grid coarser first, for example "
    "with 'cdo gridboxmean,2,2 IN OUT'"
)

_SMALL = 2**28  # bytes below which nobody asks what is free
_MOST_NUMBERS = 1 << 31  # 16 GiB of 64-bit floats


def as_array(
    values: Any, name: str, *, numbers: bool = False, error: type[ProbmodelsError] = DataError
) -> NDArray[Any]:
    """An array of what was given.

    Parameters
    ----------
    values
        Array, or nested sequences.
    name
        Name of the values, for messages.
    numbers
        Whether its entries have to be numbers.
    error
        What is raised.

    Raises
    ------
    ``error``
        If rows differ in length, or entries are no numbers where they have to be.
    """
    try:
        found = np.asarray(values)
    except (TypeError, ValueError, OverflowError, RuntimeError) as fault:  # of a tensor that needs a gradient, too
        raise error(f"{name} cannot be made an array ({fault}); give rows of one length") from fault
    if numbers and found.dtype.kind not in "fiub":
        raise error(f"{name} of type {found.dtype} and shape {found.shape}; give numbers")
    return found


def existing_file(path: AnyPath, name: str = "path") -> Path:
    """Path of a file that is there, can be read and holds something.

    Parameters
    ----------
    path
        The path; a leading ``~`` is the home folder.
    name
        Name of the option, for messages.

    Raises
    ------
    DataError
        If there is no such file, or it is a folder, empty or not readable.
    """
    text = os.path.expanduser(os.fspath(path))
    if os.path.isdir(text):
        raise DataError(f"{name}: {text} is a folder; name a file in it")
    if not os.path.isfile(text):
        raise DataError(f"{name}: there is no file {text} (working folder: {os.getcwd()})")
    if not os.access(text, os.R_OK):
        raise DataError(f"{name}: {text} may not be read; change its permissions")
    if not os.path.getsize(text):
        raise DataError(f"{name}: {text} is empty; copy it anew")
    return Path(text)


def existing_folder(path: AnyPath, name: str = "root") -> Path:
    """Path of a folder that is there and can be read.

    Parameters
    ----------
    path, name
        As in `existing_file`.

    Raises
    ------
    DataError
        If there is no such folder, or it is a file or not readable.
    """
    text = os.path.expanduser(os.fspath(path))
    if os.path.isfile(text):
        raise DataError(f"{name}: {text} is a file; name the folder that it lies in")
    if not os.path.isdir(text):
        raise DataError(f"{name}: there is no folder {text} (working folder: {os.getcwd()})")
    if not os.access(text, os.R_OK | os.X_OK):
        raise DataError(f"{name}: {text} may not be read; change its permissions")
    return Path(text)


def check_size(**sizes: int) -> None:
    """Check that an array of these sizes has at most 2**31 numbers, before it is made.

    Parameters
    ----------
    **sizes
        Lengths of its axes, by the names of the options that decide them.

    Raises
    ------
    DataError
        If it has more.
    """
    count = math.prod(sizes.values())
    if count > _MOST_NUMBERS:
        listed = ", ".join(f"{name}={size}" for name, size in sizes.items())
        raise DataError(f"{listed}: together {count:.3g} numbers, which do not fit in memory; choose smaller sizes")


def free_memory() -> int | None:
    """Bytes of memory that are free, a limit of the control group included; None where nobody says."""
    found = []
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found.append(1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]))
    with contextlib.suppress(OSError, ValueError):  # the limit may be the word "max"
        group = Path("/sys/fs/cgroup")
        found.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return min(found, default=None)


def check_fits(what: str, needed: int, remedy: str) -> None:
    """Check that something fits into memory; below 256 MiB nobody asks.

    Parameters
    ----------
    what
        Needs it, such as ``"5000 x 1000 values"``.
    needed
        Bytes.
    remedy
        What to change, as a sentence would go on.

    Raises
    ------
    DataError
        If it needs more than is free.
    """
    free = None if needed < _SMALL else free_memory()
    if free is not None and needed > free:
        raise DataError(f"{what} need about {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free; {remedy}")
