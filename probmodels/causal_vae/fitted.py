"""Fitted causal autoencoders from their results."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from probmodels.causal_vae.model import CausalVAE, make_problem
from probmodels.errors import ResultError
from probmodels.inference.problem import Problem
from probmodels.inference.programs.programs import fitted
from probmodels.inference.result import Result
from probmodels.options import checked

__all__ = ["fitted_model", "thinned"]


def thinned(result: Result, num_rows: int) -> Problem:
    """The problem of a result, with up to so many of its rows, at equal distances, and what was fitted in its programs.

    Raises
    ------
    ResultError
        If the result is not one of a causal autoencoder, or of proposals that were refined for their data.
    """
    if result.tree.attrs.get("method") != "causal_vae":
        raise ResultError(f"the result is of {result.tree.attrs.get('method')!r}; give one of probmodels.causal_vae")
    if "table" in result.params():
        raise ResultError(
            "the result holds proposals that were refined for their data, and no reader of others; give the one that "
            "was refined, or use it with the problem that refine returned"
        )
    problem = result.rebuild()
    assert problem.data is not None
    count = problem.data.sizes["data"]
    if num_rows < count:
        rows = np.linspace(0, count - 1, num_rows).round().astype(int)
        problem = make_problem(problem.data.isel(data=rows), **problem.options)
    with fitted(problem, result.guide_state or {}, seed=0) as (model, guide):
        return replace(problem, model=model, guide=guide)


@checked(ResultError)
def fitted_model(result: Result) -> CausalVAE:
    """The fitted model of a result, from a file too; `Result.rebuild` gives the problem.

    Raises
    ------
    ResultError
        If the result is not one of a causal autoencoder, or of proposals that were refined for their data.
    """
    model = thinned(result, 1).model
    assert isinstance(model, CausalVAE)
    return model.requires_grad_(False).eval()
