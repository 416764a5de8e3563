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

__all__ = ["TERMS", "continue_design", "effect_design", "time_in_years"]

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
        elif term in TERMS:
            if term in _HARMONICS and not dated:
                raise DataError(f"the term {term!r} needs dates on the time axis; this one is numeric")
            if term in _HARMONICS and np.unique(np.round(years % 1.0, 2)).size < 3:
                raise DataError(
                    f"the term {term!r} cannot be told from the intercept: the data hold one time of year only; drop it"
                )
            columns |= _columns(term, years, float(years.mean()), dated)
        else:
            raise DataError(f"unknown effect {term!r}{hint(term, known)}")
    design = np.stack(list(columns.values()), axis=1) if columns else np.zeros((years.size, 0))
    if columns and np.linalg.matrix_rank(design / np.linalg.norm(design, axis=0)) < design.shape[1]:
        raise DataError(
            f"the fixed effects {list(columns)} are linearly dependent over these {years.size} times; drop one"
        )
    return xr.DataArray(design, dims=("time", "effect"), coords={"effect": list(columns)})


def _columns(term: str, years: NDArray[np.float64], centre: float, dated: bool) -> dict[str, NDArray[np.float64]]:
    """Columns of one of `TERMS`; ``centre`` is the mean time of the data that effects are fitted to."""
    if term == "intercept":
        return {term: np.ones_like(years)}
    if term == "trend":
        return {term: (years - centre) / (10.0 if dated else 1.0)}
    phase = 2.0 * np.pi * _HARMONICS[term] * years
    return {f"{term}_cos": np.cos(phase), f"{term}_sin": np.sin(phase)}


def continue_design(
    design: xr.DataArray, time: xr.DataArray, later: xr.DataArray, covariates: Mapping[str, ArrayLike] | None = None
) -> NDArray[np.float64]:
    """Columns of a design at other times, centred and scaled as they were at those of the fit.

    Parameters
    ----------
    design
        What `effect_design` gave, dims (time, effect).
    time, later
        The times of the fit, and those to continue to.
    covariates
        Values at the later times of the columns that are no terms of ours.

    Returns
    -------
    array
        Shape (later, effect).

    Raises
    ------
    DataError
        If a covariate is not given at the later times, is of the wrong length or not finite, or is none of the columns.
    """
    covariates = dict(covariates or {})
    years, dated = time_in_years(time), np.issubdtype(time.dtype, np.datetime64)
    fitted: dict[str, NDArray[np.float64]] = {}
    continued: dict[str, NDArray[np.float64]] = {}
    for term in TERMS:
        fitted |= _columns(term, years, float(years.mean()), dated)
        continued |= _columns(term, time_in_years(later), float(years.mean()), dated)
    names = [str(name) for name in design["effect"].values]
    columns = []
    for name, column in zip(names, design.transpose("time", "effect").values.T, strict=True):
        if name in fitted and np.allclose(fitted[name], column, rtol=1e-6, atol=1e-6):  # not a covariate of that name
            columns.append(continued[name])
            continue
        if name not in covariates:
            raise DataError(
                f"the effect {name!r} is a covariate: give its {later.size} values at the new times, "
                f"covariates={{{name!r}: ...}}"
            )
        given = np.asarray(arranged(covariates[name], f"covariate {name!r}", {"time": later.values}), dtype=np.float64)
        if given.shape != (later.size,) or not np.isfinite(given).all():
            raise DataError(f"covariate {name!r} must hold {later.size} finite values, one for each new time")
        columns.append(given)
    return np.stack(columns, axis=1) if columns else np.zeros((later.size, 0))
