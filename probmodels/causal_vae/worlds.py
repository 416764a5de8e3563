"""A fitted causal autoencoder with abducted noise, evaluated under interventions."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import xarray as xr
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from probmodels.datasets.causal import position_of
from probmodels.datasets.labelled import arranged
from probmodels.errors import ProblemError
from probmodels.inference.problem import Problem
from probmodels.inference.programs.programs import fitted
from probmodels.inference.result import Result
from probmodels.inference.runtime.ops import isolated

__all__ = [
    "Change",
    "Intervene",
    "Moments",
    "OutsideSupportWarning",
    "World",
    "collect",
    "concepts_of",
    "rows_of",
    "world_of",
]

Change = float | Tensor | Callable[[Tensor], Tensor]


class OutsideSupportWarning(UserWarning):
    """A concept is set to a value that was not seen in training: mechanisms and decoder extrapolate."""


class Intervene(Messenger):
    """Set concepts, or change them by functions, wherever a program makes them by ``pyro.deterministic``.

    Parameters
    ----------
    changes
        Name to a number, a tensor that broadcasts with the concept, or a function of its natural value.
    """

    def __init__(self, changes: Mapping[str, Change]) -> None:
        super().__init__()
        self.changes = dict(changes)

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] in self.changes:
            msg["value"] = changed(msg["value"], self.changes[msg["name"]])


def changed(natural: Tensor, change: Change) -> Tensor:
    """A concept under an intervention."""
    if callable(change):
        return change(natural)
    return torch.as_tensor(change, dtype=natural.dtype, device=natural.device) + torch.zeros_like(natural)


class World:
    """A fitted model with abducted noise, evaluated under interventions.

    Concepts are in units of the model here: training labels have mean 0 and sd 1.
    """

    def __init__(self, problem: Problem, model: Any, guide: Any) -> None:
        assert problem.data is not None
        self.problem, self.model, self.guide = problem, model, guide
        self.names: tuple[str, ...] = model.names
        self.centre = problem.data["centre"].values
        self.scale = problem.data["scale"].values

    def abduct(self) -> dict[str, Tensor]:
        """One draw of noise and style given the data."""
        with torch.no_grad():
            nodes: Any = poutine.trace(self.guide).get_trace(self.problem.args[0]).nodes
        return {name: node["value"] for name, node in nodes.items() if node["type"] == "sample" and name != "data"}

    def run(self, noise: Mapping[str, Tensor], changes: Mapping[str, Change]) -> tuple[Tensor, Tensor]:
        """Concepts (data, concept) and mean observations (data, *shape)."""
        with torch.no_grad(), Intervene(changes):
            program = poutine.trace(poutine.condition(self.model, data=dict(noise)))
            nodes: Any = program.get_trace(self.problem.args[0]).nodes
        concepts = [nodes[name]["value"] for name in self.names]
        return torch.stack(torch.broadcast_tensors(*concepts), -1), nodes["observation"]["fn"].mean

    def changes(self, wanted: Mapping[str, Any]) -> dict[str, Change]:
        """Interventions in units of the labels as interventions in those of the model."""
        found: dict[str, Change] = {}
        for name, change in wanted.items():
            place = position_of(name, self.names)
            centre, scale = float(self.centre[place]), float(self.scale[place])
            if callable(change):
                found[name] = _rescaled(change, centre, scale)
            else:
                value = _value(name, change, self.problem)
                self._warn(name, place, value)
                found[name] = torch.as_tensor((value - centre) / scale, dtype=self.problem.args[0].dtype)
        return found

    def _warn(self, name: str, place: int, value: np.ndarray) -> None:
        assert self.problem.data is not None
        least, most = (float(self.problem.data[key][place]) for key in ("least", "most"))
        if value.min() < least or value.max() > most:
            seen = f"{value.min():.5g}" if value.size == 1 else f"{value.min():.5g} to {value.max():.5g}"
            warnings.warn(
                f"do({name}={seen}) lies outside of what was seen in training, {least:.5g} to {most:.5g}; mechanisms "
                "and decoder extrapolate",
                OutsideSupportWarning,
                stacklevel=4,
            )

    def labels(self, concepts: Tensor) -> np.ndarray:
        """Concepts in units of the labels."""
        return concepts.double().numpy() * self.scale + self.centre


def _value(name: str, change: Any, problem: Problem) -> np.ndarray:
    """Value of an intervention, one for all data or one for each."""
    count = len(problem.args[0])
    change = arranged(change, f"do({name})", {"data": rows_of(problem)}, error=ProblemError)
    try:
        value = np.asarray(change, dtype=np.float64)
    except (TypeError, ValueError):
        raise ProblemError(f"do({name}={change!r}); give a number, one for each datum, or a function") from None
    if not np.isfinite(value).all():
        raise ProblemError(f"do({name}) is not finite; give numbers")
    if value.ndim > 1 or value.size not in (1, count):
        raise ProblemError(f"do({name}) has shape {value.shape}; give one number, or one for each of {count} data")
    return value


def rows_of(problem: Problem) -> Any:
    """Labels of the rows of a problem; None where they have none."""
    table = None if problem.data is None else problem.data["observation"]
    return None if table is None or "data" not in table.coords else table["data"].values


def _rescaled(change: Callable[[Tensor], Tensor], centre: float, scale: float) -> Callable[[Tensor], Tensor]:
    return lambda natural: (change(natural * scale + centre) - centre) / scale


@contextmanager
def world_of(problem: Problem, result: Result, seed: int) -> Iterator[World]:
    if problem.name != "causal_vae":
        raise ProblemError(f"{problem.name} has no concepts to set; give a problem of probmodels.causal_vae")
    with fitted(problem, result.guide_state or {}, seed=seed) as (model, guide), isolated(seed):
        tabulated = getattr(guide, "tabulated", None)
        if tabulated is not None and not torch.equal(problem.args[0], tabulated):
            raise ProblemError(f"{problem.name}: these proposals were refined for other data; refine them for these")
        yield World(problem, model, guide)


class Moments:
    """Running mean and sd."""

    def __init__(self) -> None:
        self.count, self.mean, self.square = 0, np.zeros(()), np.zeros(())

    def add(self, value: np.ndarray) -> None:
        self.count += 1
        away = value - self.mean
        self.mean = self.mean + away / self.count
        self.square = self.square + away * (value - self.mean)

    @property
    def sd(self) -> np.ndarray:
        return np.sqrt(self.square / max(1, self.count - 1))


def collect(
    world: World, concepts: Mapping[Any, list[np.ndarray]], moments: Mapping[Any, Moments] | None, labels: list[Any],
    batch: bool,
) -> xr.Dataset:  # fmt: skip
    """Results with the names of their axes."""
    assert world.problem.data is not None
    table = world.problem.data["observation"]
    lead = ("intervention",) if batch else ()

    def joined(values: list[np.ndarray]) -> np.ndarray:
        return np.stack(values) if batch else values[0]

    keys = [("do", label) for label in labels]
    found = xr.Dataset(
        {
            "counterfactual": ((*lead, "draw", "data", "concept"), joined([np.stack(concepts[key]) for key in keys])),
            "factual": (("draw", "data", "concept"), np.stack(concepts["factual"])),
        },
        coords={"concept": list(world.names)},
    )
    if moments is not None:
        dims = tuple(str(dim) for dim in table.dims)
        found["observation"] = ((*lead, *dims), joined([moments[key].mean for key in keys]))
        found["observation_sd"] = ((*lead, *dims), joined([moments[key].sd for key in keys]))
        found["factual_observation"] = (dims, moments["factual"].mean)
    if batch:
        found = found.assign_coords(intervention=[str(label) for label in labels])
    return found.assign_coords({str(dim): table[dim] for dim in table.dims if dim in table.coords})


def concepts_of(model: Any, noise: Mapping[str, Tensor], changes: Mapping[str, Change]) -> Tensor:
    """Concepts (row, concept) of any noise (row,) under interventions, without what is made of them."""
    names = model.names

    def set_or_left(i: int, value: Tensor) -> Tensor:
        return changed(value, changes[names[i]]) if names[i] in changes else value

    with torch.no_grad():
        concepts = model.mechanisms.propagate(lambda i, _: noise[f"noise_{names[i]}"], set_or_left)
    return torch.stack(concepts, -1)
