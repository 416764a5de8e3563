"""Checks that methods share: memory that a step needs, and parameters that nothing would move."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn

from probmodels.inference.problem import ProblemError
from probmodels.inference.runtime.ops import isolated

__all__ = ["check_memory", "free_bytes", "parameters_without_gradient"]

_SMALL = 2**28  # bytes below which nobody asks what is free


def free_bytes(device: torch.device) -> int | None:
    """Memory that is free on a device, a limit of the control group included; None where nobody says."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = []
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found.append(1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]))
    with contextlib.suppress(OSError, ValueError):  # the limit may be the word "max"
        group = Path("/sys/fs/cgroup")
        found.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return min(found, default=None)


def check_memory(name: str, needed: int, device: torch.device, what: str, remedy: str) -> None:
    """See that something fits into memory; below 256 MiB nobody asks.

    Parameters
    ----------
    name
        Of the method.
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


def parameters_without_gradient(
    program: Callable[..., Any], args: tuple[Any, ...], site: str, module: str | None = None, num_draws: int = 8
) -> list[str]:
    """Parameters of a program that one of its sites does not depend on.

    Parameters
    ----------
    program
        Model or guide: a function or a module. It is left as it is.
    args
        Of the program.
    site
        Sample or deterministic site of the program.
    module
        Name of a module, an attribute of the program, whose parameters are asked for; None for all parameters of the
        program, those of `pyro.param` included.
    num_draws
        Draws over which a parameter may show a gradient that is not zero.

    Returns
    -------
    list of str
        Names of the parameters whose gradient is absent or zero in every draw: within the module, or within the
        program.
    """
    program = copy.deepcopy(program)
    with isolated(seed=0), torch.enable_grad():
        dead = _parameters(program, args) if module is None else dict(getattr(program, module).named_parameters())
        for _ in range(num_draws):
            value: Any = poutine.trace(program).get_trace(*args).nodes[site]["value"]
            if not value.requires_grad or not dead:
                break
            # A random direction, since a plain sum of normalised values may be constant.
            found = torch.autograd.grad((value * torch.randn_like(value)).sum(), [*dead.values()], allow_unused=True)
            pairs = zip(list(dead.items()), found, strict=True)
            dead = {name: value for (name, value), grad in pairs if grad is None or not grad.any()}
    return list(dead)


def _parameters(program: Callable[..., Any], args: tuple[Any, ...]) -> dict[str, Tensor]:
    """All parameters that a program has or uses; some come into being in a run only."""
    with torch.no_grad():
        poutine.trace(program).get_trace(*args)
    own = dict(program.named_parameters()) if isinstance(program, nn.Module) else {}
    known = {id(value) for value in own.values()}
    return own | {name: raw for name, raw in pyro.get_param_store().named_parameters() if id(raw) not in known}
