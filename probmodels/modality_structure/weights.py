"""The posterior of temperature, weights and path given the towers of a fitted result, for Markov chains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from probmodels.errors import ResultError
from probmodels.inference.problem import Problem
from probmodels.inference.programs.programs import fitted
from probmodels.inference.result import Result
from probmodels.modality_structure.model import GAUSSIAN, ModalityStructure, Points, Read, make_problem
from probmodels.modality_structure.views import Augmentation, augmentations, tensors
from probmodels.options import Count, OneOf, Seed, checked, options_of

__all__ = ["HeldTowers", "weights_problem"]

_FEWEST = 2  # rows


class HeldTowers(PyroModule):
    """The model with its towers held: embeddings, and those of one draw of augmented views, are data.

    Parameters
    ----------
    structure
        Model whose sites to take.
    read
        Embeddings of rows.
    """

    def __init__(self, structure: ModalityStructure, read: Read) -> None:
        super().__init__()
        self.structure, self.held = structure, read

    def forward(self, present: Tensor) -> None:
        """The sites of the model, ``present`` (row, modality) being which rows have which modality."""
        self.structure.sites(present, self.held)


@checked(ResultError)
def weights_problem(
    result: Result,
    *,
    split: Literal["train", "test"] = "train",
    inferred: Sequence[Annotated[str, OneOf(GAUSSIAN)]] | None = None,
    path: Points | None = None,
    max_rows: Count | None = None,
    seed: Seed = 0,
) -> Problem:
    """Temperature, weights and path as the only latent sites, the towers held as they were fitted.

    Parameters
    ----------
    result
        Result of `fit_svi` of this method.
    split
        Whose rows are the data.
    inferred
        Structures of the fit whose weights are latent, with the priors of the model about the weights of the fit; None
        for those that were latent in the fit.
    path
        Points of the path, with the prior of `make_problem`, whether or not there was one in the fit; None for those of
        the fit.
    max_rows
        How many rows to take, chosen at random, all of which are candidates of each; None for all.
    seed
        Seed of their choice.

    Returns
    -------
    Problem
        For `run_mcmc`. The temperature is latent whether or not it was so in the fit.

    Raises
    ------
    ResultError
        If the result is not one of this method, a weight is named that was 0 in the fit, or no two rows share a pair of
        modalities.

    Notes
    -----
    What is drawn from is the posterior given the towers, not the joint one: the towers were fitted to the same rows, or
    to others of ``split="train"``, and their uncertainty is left out. Intervals are therefore too narrow for the
    question of what another fit would give. With ``split="test"`` the towers have not seen the rows, and the
    temperature is the one at which their matching is as sure as it is right. A fusion encoder is left out: its sites
    hold none of what is drawn.
    """
    if result.tree.attrs.get("method") != "modality_structure":
        raise ResultError(f"the result is of {result.tree.attrs.get('method')!r}; give one of modality_structure")
    problem = result.rebuild()
    data = problem.data
    assert data is not None
    present, views = tensors(data, split)
    if max_rows is not None and max_rows < len(present):
        some = torch.from_numpy(np.sort(np.random.default_rng(seed).choice(len(present), max_rows, replace=False)))
        present, views = present[some], [x[some] for x in views]
    model: Any
    with fitted(problem, result.guide_state or {}, seed=0) as (model, _), torch.no_grad():
        for name in inferred or ():
            if name not in model.weights:
                known = [weight for weight in model.weights if weight in GAUSSIAN]
                raise ResultError(f"inferred names {name!r}, which the fit left out; choose among {known}")
        places = {name: place for place, name in enumerate(model.names)}
        if not any((present[:, places[a]] & present[:, places[b]]).sum() >= _FEWEST for a, b in model.pairs):
            raise ResultError(f"no two of {len(present)} rows have both modalities of a pair; take more rows")
        if path is not None:
            model.path = path
            model.augment = model.augment or _augmentations(problem)
        read = model.read(views)
        model.temperature, model.towers, model.fusion = None, nn.ModuleDict(), None  # of a copy
        model.inferred = model.inferred if inferred is None else tuple(inferred)
    found = Problem(name="modality_structure_weights", model=HeldTowers(model, read), args=(present,), data=data)
    return found.mapped(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)


def _augmentations(problem: Problem) -> dict[str, Augmentation]:
    """Random changes of the views as `make_problem` has them by default."""
    known = options_of(make_problem)
    assert problem.data is not None
    return augmentations(problem.data, *(known[name].default for name in ("dropout", "shift", "flip", "erase")))
