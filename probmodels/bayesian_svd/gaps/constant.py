"""Data of a field as comparisons without sampling take it: what a problem keeps, with no prior of patterns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import xarray as xr
from numpy.typing import ArrayLike

from probmodels.bayesian_svd.prepare import make_problem

__all__ = ["data_of"]


def data_of(
    data: xr.DataArray | xr.Dataset,
    rank: int,
    fixed_effects: Sequence[str],
    covariates: Mapping[str, ArrayLike] | None,
    area_weights: bool | Sequence[float],
) -> xr.Dataset:
    """Constant data of the problem of a field, whose cells, weights, effects and times are those of a run.

    Raises
    ------
    DataError
        For data that `make_problem` refuses, or a rank that they do not carry.
    """
    problem = make_problem(
        data,
        rank=rank,
        series="ar1",
        frame_prior="uniform",
        fixed_effects=fixed_effects,
        covariates=covariates,
        area_weights=area_weights,
    )
    assert problem.data is not None
    return problem.data
