"""Interventions on the concepts of a fitted causal model: what would be, and what would have been.

An intervention sets a concept, or changes it: a number or a tensor, as ``pyro.poutine.do`` takes it; or a function of
the value that the concept would have had, a soft intervention. Concepts that are not set follow from their causes by
their mechanisms and their own noise.

- `counterfactual`: of given data. The guide abducts the noise, and the same noise brings about another world.
- `refine`: a guide whose proposals are fitted to each datum, for counterfactuals that have to be as good as they can.
- `effect`: of one concept on others, over the data or a part of them.
- `attribute`: what of the difference between two worlds is due to which concept's noise.

References
----------
Pearl, J. (2009). Causality, 2nd edition, chapter 7.1. Cambridge University Press.
Budhathoki, K., Janzing, D., Bloebaum, P. and Ng, H. (2021). Why did the distribution change? AISTATS.
https://arxiv.org/abs/2102.13384
"""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Annotated, Any

import numpy as np
import torch
import xarray as xr
from annotated_types import Len
from numpy.typing import ArrayLike
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor
from tqdm.auto import tqdm

from probmodels.causal_graph.tables import rows_given
from probmodels.datasets.causal import position_of
from probmodels.datasets.labelled import arranged
from probmodels.errors import ProblemError
from probmodels.inference.problem import Problem
from probmodels.inference.programs.programs import fitted
from probmodels.inference.result import Result
from probmodels.inference.runtime.ops import isolated
from probmodels.inference.variational.em import Phase, fit_em
from probmodels.options import Count, Draws, Fraction, Natural, Positive, Seed, checked

__all__ = ["Change", "Intervene", "OutsideSupportWarning", "attribute", "counterfactual", "effect", "refine"]

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
            msg["value"] = _changed(msg["value"], self.changes[msg["name"]])


def _changed(natural: Tensor, change: Change) -> Tensor:
    """A concept under an intervention."""
    if callable(change):
        return change(natural)
    return torch.as_tensor(change, dtype=natural.dtype, device=natural.device) + torch.zeros_like(natural)


class _World:
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
    change = arranged(change, f"do({name})", {"data": _rows(problem)}, error=ProblemError)
    try:
        value = np.asarray(change, dtype=np.float64)
    except (TypeError, ValueError):
        raise ProblemError(f"do({name}={change!r}); give a number, one for each datum, or a function") from None
    if not np.isfinite(value).all():
        raise ProblemError(f"do({name}) is not finite; give numbers")
    if value.ndim > 1 or value.size not in (1, count):
        raise ProblemError(f"do({name}) has shape {value.shape}; give one number, or one for each of {count} data")
    return value


def _rows(problem: Problem) -> Any:
    """Labels of the rows of a problem; None where they have none."""
    table = None if problem.data is None else problem.data["observation"]
    return None if table is None or "data" not in table.coords else table["data"].values


def _rescaled(change: Callable[[Tensor], Tensor], centre: float, scale: float) -> Callable[[Tensor], Tensor]:
    return lambda natural: (change(natural * scale + centre) - centre) / scale


@contextmanager
def _world(problem: Problem, result: Result, seed: int) -> Iterator[_World]:
    if problem.name != "causal_vae":
        raise ProblemError(f"{problem.name} has no concepts to set; give a problem of probmodels.causal_vae")
    with fitted(problem, result.guide_state or {}, seed=seed) as (model, guide), isolated(seed):
        tabulated = getattr(guide, "tabulated", None)
        if tabulated is not None and not torch.equal(problem.args[0], tabulated):
            raise ProblemError(f"{problem.name}: these proposals were refined for other data; refine them for these")
        yield _World(problem, model, guide)


@checked(ProblemError)
def counterfactual(
    problem: Problem,
    result: Result,
    interventions: Mapping[str, Any] | Mapping[Any, Mapping[str, Any]],
    *,
    num_draws: Draws = 20,
    observations: bool = True,
    seed: Seed = 0,
    progress: bool = True,
) -> xr.Dataset:
    """What data would have been, had concepts been others.

    Parameters
    ----------
    problem
        Problem of the data in question, made with the options of the one that was fitted; ``split="test"`` for test
        data.
    result
        Result of `fit_svi`.
    interventions
        Concept to a value in the units of the labels: one for all data, one for each (data,), or a function of the
        natural values, a tensor. Several concepts may be changed at once. A mapping of labels to such mappings is a
        batch of interventions.
    num_draws
        Number of draws of the noise.
    observations
        Whether observations are wanted, too.
    seed, progress
        Seed of the draws; whether to show a bar.

    Returns
    -------
    xr.Dataset
        ``counterfactual`` (draw, data, concept) in the units of the labels and ``observation`` (data, ...), the mean
        over draws of its mean, with ``observation_sd`` over draws; ``factual`` and ``factual_observation`` of the same
        noise without an intervention. A batch has ``intervention`` for a first axis.

    Raises
    ------
    DataError
        If a concept is not known.
    ProblemError
        If a value is not finite, or the problem is none of concepts.

    Warns
    -----
    OutsideSupportWarning
        If a concept is set to a value beyond those of the training data.
    """
    batch = bool(interventions) and all(isinstance(one, Mapping) for one in interventions.values())
    listed: dict[Any, Any] = dict(interventions) if batch else {None: interventions}
    with _world(problem, result, seed) as world:
        asked = {label: world.changes(one) for label, one in listed.items()}
        worlds: dict[Any, dict[str, Change]] = {"factual": {}}
        worlds |= {("do", label): changes for label, changes in asked.items()}
        concepts: dict[Any, list[np.ndarray]] = {key: [] for key in worlds}
        moments: dict[Any, _Moments] = {key: _Moments() for key in worlds}
        for _ in tqdm(range(num_draws), desc="draws", disable=not progress):
            noise = world.abduct()
            for key, changes in worlds.items():
                if observations:
                    z, mean = world.run(noise, changes)
                    moments[key].add(mean.double().numpy())
                else:
                    z = _concepts(world.model, noise, changes)
                concepts[key].append(world.labels(z))
        return _collect(world, concepts, moments if observations else None, list(asked), batch)


@checked(ProblemError)
def refine(
    problem: Problem,
    result: Result,
    *,
    num_steps: Count = 100,
    lr: Positive = 0.02,
    labels: bool = False,
    seed: Seed = 0,
    progress: bool = True,
) -> tuple[Problem, Result]:
    """Abduct the noise of each datum by itself: E-steps from what the fitted guide proposes, the model held.

    A guide that reads all data by one network is wrong by a little for each of them; proposals that are parameters of
    each datum are not (semi-amortised inference). Problem and result that are returned belong together and stand in for
    those that were given, in `counterfactual`, `effect` and `attribute`; for outputs on disk keep the latter.

    Parameters
    ----------
    problem, result
        As in `counterfactual`.
    num_steps, lr
        Number and size of the E-steps, all data at once; step sizes fall to a tenth.
    labels
        Whether labels count as seen, where data have them.
    seed, progress
        Seed of the draws; whether to show a bar.

    Raises
    ------
    ProblemError
        If the problem is none of concepts, has no labels and they shall count, or an option is out of range.

    References
    ----------
    Kim, Y., Wiseman, S., Miller, A. C., Sontag, D. and Rush, A. M. (2018). Semi-amortized variational autoencoders.
    ICML. https://arxiv.org/abs/1802.02550
    """
    if labels and len(problem.args) == 1:
        raise ProblemError("labels=True, and the problem has none; leave it out")
    with _world(problem, result, seed) as world:
        model, guide = copy.deepcopy((world.model, world.guide))
    guide.tabulate(problem.args[0])
    single = replace(problem, model=model, guide=guide, args=problem.args if labels else problem.args[:1])
    steps = Phase("e_step", schedule=lambda step: 0.1 ** (step / num_steps))
    return single, fit_em(
        single, phases=[steps], num_rounds=num_steps, lr=lr, num_samples=2, seed=seed, progress=progress
    )


class _Moments:
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


def _collect(
    world: _World, concepts: Mapping[Any, list[np.ndarray]], moments: Mapping[Any, _Moments] | None, labels: list[Any],
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


@checked(ProblemError)
def effect(
    problem: Problem,
    result: Result,
    treatment: str,
    values: tuple[Any, Any],
    *,
    outcomes: Annotated[Sequence[str], Len(1)] | None = None,
    given: ArrayLike | None = None,
    num_draws: Draws = 100,
    prob: Fraction = 0.95,
    seed: Seed = 0,
    progress: bool = True,
) -> xr.Dataset:
    """Mean difference that a concept makes to others when it is set to the second of two values instead of the first.

    Parameters
    ----------
    problem, result
        As in `counterfactual`.
    treatment
        The concept that is set.
    values
        In units of the labels, or functions of the natural value.
    outcomes
        Concepts to look at; None for all others.
    given
        Rows (data,) to average over, a conditional effect; None for all.
    num_draws
        Number of draws of the noise.
    prob
        Mass of the intervals.
    seed, progress
        As in `counterfactual`.

    Returns
    -------
    xr.Dataset
        ``effect`` (concept,), ``low`` and ``high``: of the mean over rows that are drawn anew with replacement for
        every draw of the noise, so that both the choice of the data and what they leave open of the noise count; the
        parameters of the mechanisms are taken as they were fitted. ``by_row`` (data, concept), means over draws.

    Raises
    ------
    DataError
        If a concept is not known.
    ProblemError
        If no row is given, or an option is out of range.
    """
    both = {"first": {treatment: values[0]}, "second": {treatment: values[1]}}
    found = counterfactual(
        problem, result, both, num_draws=num_draws, observations=False, seed=seed, progress=progress
    )["counterfactual"]  # fmt: skip
    names = [str(name) for name in found["concept"].values]
    chosen = [name for name in names if name != treatment] if outcomes is None else list(outcomes)
    for name in chosen:
        position_of(name, names)
    difference = found.isel(intervention=1, drop=True) - found.isel(intervention=0, drop=True)
    if given is not None:
        if np.asarray(given).dtype == bool:
            given = arranged(given, "given", {"data": _rows(problem)}, error=ProblemError)
        rows = rows_given(given, difference.sizes["data"], ProblemError)
        if not len(rows):
            raise ProblemError("given chooses no row; an effect is a mean over some")
        difference = difference.isel(data=rows)
    difference = difference.sel(concept=chosen)
    count, rng = difference.sizes["data"], np.random.default_rng(seed)
    means = np.stack([draw[rng.integers(count, size=count)].mean(0) for draw in difference.values])
    ends = np.quantile(means, [(1 - prob) / 2, (1 + prob) / 2], axis=0)
    return xr.Dataset(
        {
            "effect": ("concept", difference.values.mean((0, 1))),
            "low": ("concept", ends[0]),
            "high": ("concept", ends[1]),
            "by_row": difference.mean("draw"),
        },
        attrs={"treatment": treatment, "prob": prob},
    )


@checked(ProblemError)
def attribute(
    problem: Problem,
    result: Result,
    first: Natural,
    second: Natural,
    *,
    num_draws: Draws = 20,
    seed: Seed = 0,
) -> xr.DataArray:
    """What of the difference between two rows is due to the noise of which concept.

    Rows differ in the noise of their concepts. Each concept's share in the change of another is its Shapley value: what
    exchanging its noise for that of the second row changes, on average over all orders of exchanging them.

    Parameters
    ----------
    problem, result
        As in `counterfactual`.
    first, second
        Places of two rows.
    num_draws, seed
        Number of draws of the noise, and their seed.

    Returns
    -------
    xr.DataArray
        (draw, cause, effect) in units of the labels; sums over causes are the differences of the concepts.

    Raises
    ------
    ProblemError
        If there are more than 12 concepts, or no such rows.

    References
    ----------
    Budhathoki et al. (2021), section 3.
    """
    with _world(problem, result, seed) as world:
        size, count = len(world.names), len(problem.args[0])
        if size > 12:
            raise ProblemError(f"attribution goes through all 2^{size} sets of concepts; there may be 12 concepts")
        for row in (first, second):
            if row >= count:
                raise ProblemError(f"there is no row {row}; the data have {count}")
        sets = torch.tensor(list(itertools.product((False, True), repeat=size)))  # the first concept slowest
        found = []
        for _ in range(num_draws):
            noise = world.abduct()
            mixed = {}
            for place, name in enumerate(world.names):
                own = noise[f"noise_{name}"]
                mixed[f"noise_{name}"] = torch.where(sets[:, place], own[second], own[first])
            found.append(_shapley(world.labels(_concepts(world.model, mixed, {})), sets.numpy()))
    names = list(world.names)
    return xr.DataArray(
        np.stack(found), dims=("draw", "cause", "effect"), coords={"cause": names, "effect": names}, name="attribution"
    )


def _concepts(model: Any, noise: Mapping[str, Tensor], changes: Mapping[str, Change]) -> Tensor:
    """Concepts (row, concept) of any noise (row,) under interventions, without what is made of them."""
    names = model.names

    def changed(i: int, value: Tensor) -> Tensor:
        return _changed(value, changes[names[i]]) if names[i] in changes else value

    with torch.no_grad():
        concepts = model.mechanisms.propagate(lambda i, _: noise[f"noise_{names[i]}"], changed)
    return torch.stack(concepts, -1)


def _shapley(values: np.ndarray, sets: np.ndarray) -> np.ndarray:
    """Shapley values (player, outcome) of the worth (set, outcome) of all sets (set, player)."""
    size = sets.shape[1]
    number = sets.sum(1)
    share = np.array([math.factorial(k) * math.factorial(size - k - 1) / math.factorial(size) for k in range(size)])
    found = np.empty((size, values.shape[1]))
    for player in range(size):
        without = np.flatnonzero(~sets[:, player])
        with_it = without + 2 ** (size - 1 - player)
        found[player] = share[number[without]] @ (values[with_it] - values[without])
    return found
