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
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any

import numpy as np
import torch
import xarray as xr
from annotated_types import Len
from numpy.typing import ArrayLike, NDArray
from tqdm.auto import tqdm

from probmodels.causal_graph.tables import rows_given
from probmodels.causal_vae.mechanism_draws import MechanismDraws
from probmodels.causal_vae.worlds import (
    Change,
    Intervene,
    Moments,
    OutsideSupportWarning,
    collect,
    concepts_of,
    rows_of,
    world_of,
)
from probmodels.datasets.causal import position_of
from probmodels.datasets.labelled import arranged
from probmodels.errors import ProblemError
from probmodels.inference.problem import Problem
from probmodels.inference.result import Result
from probmodels.inference.variational.em import Phase, fit_em
from probmodels.options import Count, Draws, Fraction, Natural, Positive, Seed, checked

__all__ = ["Change", "Intervene", "OutsideSupportWarning", "attribute", "counterfactual", "effect", "refine"]


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
    with world_of(problem, result, seed) as world:
        asked = {label: world.changes(one) for label, one in listed.items()}
        worlds: dict[Any, dict[str, Change]] = {"factual": {}}
        worlds |= {("do", label): changes for label, changes in asked.items()}
        concepts: dict[Any, list[np.ndarray]] = {key: [] for key in worlds}
        moments: dict[Any, Moments] = {key: Moments() for key in worlds}
        for _ in tqdm(range(num_draws), desc="draws", disable=not progress):
            noise = world.abduct()
            for key, changes in worlds.items():
                if observations:
                    z, mean = world.run(noise, changes)
                    moments[key].add(mean.double().numpy())
                else:
                    z = concepts_of(world.model, noise, changes)
                concepts[key].append(world.labels(z))
        return collect(world, concepts, moments if observations else None, list(asked), batch)


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
    with world_of(problem, result, seed) as world:
        model, guide = copy.deepcopy((world.model, world.guide))
    guide.tabulate(problem.args[0])
    single = replace(problem, model=model, guide=guide, args=problem.args if labels else problem.args[:1])
    steps = Phase("e_step", schedule=lambda step: 0.1 ** (step / num_steps))
    return single, fit_em(
        single, phases=[steps], num_rounds=num_steps, lr=lr, num_samples=2, seed=seed, progress=progress
    )


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
        ``effect`` (concept,), ``low`` and ``high``, and ``by_row`` (data, concept), means over draws. The intervals
        hold rows drawn anew with replacement, the noise given the observations, and the parameters of mechanisms given
        labels (`probmodels.causal_vae.mechanism_draws`). Where the parameters have no draws, ``low`` and ``high`` are
        nan for concepts that the treatment reaches. The attribute ``interval`` says what intervals hold, or why there
        are none.

    Raises
    ------
    DataError
        If a concept is not known.
    ProblemError
        If no row is given, or an option is out of range.
    """
    with world_of(problem, result, seed) as world:
        names = list(world.names)
        for name in (treatment, *(outcomes or ())):
            position_of(name, names)
        chosen = [name for name in names if name != treatment] if outcomes is None else list(outcomes)
        rows = _rows_given(problem, given)
        changes = [world.changes({treatment: value}) for value in values]
        drawn = MechanismDraws.of(result, world.model, names.index(treatment))
        rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
        fitted_ones, means = [], []
        for _ in tqdm(range(num_draws), desc="draws", disable=not progress):
            noise = world.abduct()
            first, second = (world.labels(concepts_of(world.model, noise, change)) for change in changes)
            fitted_ones.append((second - first)[rows])
            if not drawn.missing:
                factual, carry = concepts_of(world.model, noise, {}), drawn.draw(generator)
                first, second = (world.labels(carry(factual, change)) for change in changes)
            means.append((second - first)[rows][rng.integers(len(rows), size=len(rows))].mean(0))
    low, high = np.quantile(means, [(1 - prob) / 2, (1 + prob) / 2], axis=0, method="weibull")
    if drawn.missing:
        low[drawn.reached] = high[drawn.reached] = np.nan
    found = xr.Dataset(
        {
            "effect": ("concept", np.mean(fitted_ones, (0, 1))),
            "low": ("concept", low),
            "high": ("concept", high),
            "by_row": (("data", "concept"), np.mean(fitted_ones, 0)),
        },
        coords={"concept": names},
        attrs={"treatment": treatment, "prob": prob, "interval": drawn.missing or drawn.HOLDS},
    )
    labels = rows_of(problem)
    return (found if labels is None else found.assign_coords(data=labels[rows])).sel(concept=chosen)


def _rows_given(problem: Problem, given: ArrayLike | None) -> NDArray[np.int64]:
    """Places of the rows that an effect is a mean over."""
    count = len(problem.args[0])
    if given is None:
        return np.arange(count)
    if np.asarray(given).dtype == bool:
        given = arranged(given, "given", {"data": rows_of(problem)}, error=ProblemError)
    rows = rows_given(given, count, ProblemError)
    if not len(rows):
        raise ProblemError("given chooses no row; an effect is a mean over some")
    return np.asarray(rows)


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
    with world_of(problem, result, seed) as world:
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
            found.append(_shapley(world.labels(concepts_of(world.model, mixed, {})), sets.numpy()))
    names = list(world.names)
    return xr.DataArray(
        np.stack(found), dims=("draw", "cause", "effect"), coords={"cause": names, "effect": names}, name="attribution"
    )


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
