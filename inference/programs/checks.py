"""Checks that methods share: memory that a step needs, and parameters that nothing would move."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn

from probmodels.inference.runtime.ops import isolated

__all__ = ["parameters_without_gradient"]


def parameters_without_gradient(
    program: Callable[..., Any], args: tuple[Any, ...], site: str, module: str | None = None, num_draws: int = 8
) -> list[str]:
    """Parameters of a program that one of its sites does not depend on.

    Parameters
    ----------
    program
        Model or guide: a function or a module. It is left as it is.
    args
        Arguments of the program.
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
            loss = (value * torch.randn_like(value)).sum()
            found: tuple[Tensor | None, ...] = torch.autograd.grad(loss, [*dead.values()], allow_unused=True)
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
