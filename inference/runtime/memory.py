"""Memory that is free, and a check before it is needed."""

from __future__ import annotations

import torch

from probmodels.datasets.checks import free_memory
from probmodels.errors import ProblemError

__all__ = ["check_memory", "free_bytes"]

_SMALL = 2**28  # bytes below which nobody asks what is free


def free_bytes(device: torch.device) -> int | None:
    """Memory that is free on a device, a limit of the control group included; None where nobody says."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return free_memory()


def check_memory(name: str, needed: int, device: torch.device, what: str, remedy: str) -> None:
    """Check that something fits into memory; below 256 MiB nobody asks.

    Parameters
    ----------
    name
        Name of the method.
    needed
        Bytes.
    device
        Where they are needed.
    what
        Needs them: a plural, such as ``"3 pairs of 2 graphs"``.
    remedy
        What to change, as a sentence would go on.

    Raises
    ------
    ProblemError
        If it needs more than is free.
    """
    free = None if needed < _SMALL else free_bytes(device)
    if free is not None and needed > free:
        raise ProblemError(
            f"{name}: {what} need about {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free; {remedy}"
        )
