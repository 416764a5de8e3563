"""Fixed effects in time: a design matrix from named terms, without formulas.

Terms are ``"intercept"``, ``"trend"`` (per decade for dates, per unit of a numeric axis), ``"annual"`` and
``"semiannual"`` (a cosine and a sine each; dates only), and the names of user covariates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike, NDArray

from probmodels.datasets.labelled import arranged
from probmodels.errors import DataError
from probmodels.options import hint

__all__ = ["TERMS", "effect_design", "time_in_years"]

TERMS = ("intercept", "trend", "annual", "semiannual")

_SECONDS_PER_YEAR = 365.2425 * 86400.0
_HARMONICS = {"annual": 1.0, "semiannual": 2.0}


def time_in_years(time: xr.DataArray) -> NDArray[np.float64]:
    """Dates as fractional years since 2000, numbers as they are; shape (T,).

    Raises
    ------
    DataError
        If the axis holds neither dates nor numbers.
    """
    values = np.asarray(time.values)
    if np.issubdtype(values.dtype, np.datetime64):
        seconds = (values.astype("datetime64[s]") - np.datetime64("2000-01-01", "s")).astype(np.float64)
        return seconds / _SECONDS_PER_YEAR
    if np.issubdtype(values.dtype, np.number):
        return values.astype(np.float64)
    raise DataError(f"the axis {time.name!r} holds {values.dtype} values; expected dates (datetime64) or numbers")


def effect_design(
    time: xr.DataArray, terms: Sequence[str], covariates: Mapping[str, ArrayLike] | None = None
) -> xr.DataArray:
    """Design matrix of the fixed effects.

    Parameters
    ----------
    time
        The time axis, shape (T,): dates, or numbers.
    terms
        Names out of `TERMS` and of ``covariates``.
    covariates
        Series along time, each of length T and finite; those of xarray or pandas are put in order by their times.

    Returns
    -------
    xr.DataArray
        Dims (time, effect); coordinate ``effect`` names the columns ("annual" gives ``annual_cos`` and ``annual_sin``).

    Raises
    ------
    DataError
        For unknown or repeated terms, covariates of the wrong length or not finite, harmonics of a numeric axis, or
        columns that are linearly dependent.
    """
    covariates = dict(covariates or {})
    known = (*TERMS, *covariates)
    years = time_in_years(time)
    dated = np.issubdtype(time.dtype, np.datetime64)
    if len(set(terms)) != len(terms):
        raise DataError(f"fixed effects {list(terms)} name a term twice; keep one of each")
    columns: dict[str, NDArray[np.float64]] = {}
    for term in terms:
        if term in covariates:
            try:
                given = arranged(covariates[term], f"covariate {term!r}", {"time": time.values})
                series = np.asarray(given, dtype=np.float64)
            except (TypeError, ValueError) as error:
                raise DataError(f"covariate {term!r} is no series of numbers: {error}") from error
            if series.shape != years.shape or not np.isfinite(series).all():
                raise DataError(
                    f"covariate {term!r} must hold {years.size} finite values, one per time; got shape {series.shape}"
                )
            columns[term] = series
        elif term == "intercept":
            columns[term] = np.ones_like(years)
        elif term == "trend":
            columns[term] = (years - years.mean()) / (10.0 if dated else 1.0)
        elif term in _HARMONICS:
            if not dated:
                raise DataError(f"the term {term!r} needs dates on the time axis; this one is numeric")
            if np.unique(np.round(years % 1.0, 2)).size < 3:
                raise DataError(
                    f"the term {term!r} cannot be told from the intercept: the data hold one time of year only; drop it"
                )
            phase = 2.0 * np.pi * _HARMONICS[term] * years
            columns[f"{term}_cos"], columns[f"{term}_sin"] = np.cos(phase), np.sin(phase)
        else:
            raise DataError(f"unknown effect {term!r}{hint(term, known)}")
    design = np.stack(list(columns.values()), axis=1) if columns else np.zeros((years.size, 0))
    if columns and np.linalg.matrix_rank(design / np.linalg.norm(design, axis=0)) < design.shape[1]:
        raise DataError(
            f"the fixed effects {list(columns)} are linearly dependent over these {years.size} times; drop one"
        )
    return xr.DataArray(design, dims=("time", "effect"), coords={"effect": list(columns)})
