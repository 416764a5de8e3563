"""The list of models, and what their definitions share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from probmodels import Problem

__all__ = ["MODELS", "PARALLEL", "Entry", "listed", "made", "random"]

PARALLEL: Any = {"enumerate": "parallel"}


@dataclass(frozen=True)
class Entry:
    """A model on the list.

    Attributes
    ----------
    follows
        Tutorial, example or class of Pyro that the model is written after.
    make
        Makes the problem.
    reason
        Why it has no graph: what the message says, and the code that it shows. None where there is a graph.
    near
        Values by site about which there is a density, where there is none at most points.
    """

    follows: str
    make: Callable[[], Problem]
    reason: tuple[str, str] | None = None
    near: Mapping[str, list[Any]] = field(default_factory=dict)


MODELS: dict[str, Entry] = {}


def random(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers that are the same at every call."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def listed(
    name: str, follows: str, *, args: Callable[[], tuple[Any, ...]] = tuple, reparam: Any = None, **notes: Any
) -> Callable[[Any], Any]:
    """Put a model on the list, with the function that makes its arguments; ``notes`` are attributes of `Entry`."""

    def add(model: Any) -> Any:
        MODELS[name] = Entry(follows, lambda: Problem(_label(name), model, args=args(), reparam=reparam or {}), **notes)
        return model

    return add


def made(name: str, follows: str, **notes: Any) -> Callable[[Any], Any]:
    """Put a model on the list that a function makes together with its arguments: ``(model, args)``."""

    def add(maker: Any) -> Any:
        def problem() -> Problem:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model, args = maker()
            return Problem(_label(name), model, args=args)

        MODELS[name] = Entry(follows, problem, **notes)
        return maker

    return add


def _label(name: str) -> str:
    return name.replace(" ", "_")
