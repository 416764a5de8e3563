r"""How latents stand for concepts: linear prediction, one-to-one matches, disentanglement and completeness.

Latents (data, latent) and concepts (data, concept) are arrays, tensors or labelled; a missing concept, nan, leaves out
its row for that concept alone. Scores of prediction are taken on rows that no regression was fitted to.

References
----------
Eastwood, C. and Williams, C. K. I. (2018). A framework for the quantitative evaluation of disentangled representations.
ICLR. https://openreview.net/forum?id=By-7dz-AZ
Hyvärinen, A. and Morioka, H. (2016). Unsupervised feature extraction by time-contrastive learning and nonlinear ICA.
NeurIPS. https://arxiv.org/abs/1605.06336
Kuhn, H. W. (1955). The Hungarian method for the assignment problem. Naval Research Logistics Quarterly 2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Annotated, Any, TypeAlias

import numpy as np
import torch
import xarray as xr
from annotated_types import Interval
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import linear_sum_assignment
from scipy.stats import rankdata

from probmodels.datasets.labelled import arranged, labels_of, row_labels
from probmodels.errors import ProblemError
from probmodels.options import OneOf, Seed, checked

__all__ = ["dci", "match_latents", "r_squared"]

Floats: TypeAlias = NDArray[np.float64]
Table: TypeAlias = "ArrayLike | torch.Tensor | xr.DataArray"

_LEAST_HELD_OUT = 2


@checked(ProblemError)
def r_squared(latents: Table, concepts: Table, *, test: float | ArrayLike = 0.5, seed: Seed = 0) -> xr.DataArray:
    """Share of the variance of each concept that a linear regression on all latents explains, held out.

    Parameters
    ----------
    latents, concepts
        (data, latent) and (data, concept).
    test
        Share of rows to hold out, drawn at random, or which ones (data,), as False and True.
    seed
        Seed of the draw of rows.

    Returns
    -------
    xr.DataArray
        (concept): 1 where all is explained, below 0 where the mean of the held-out rows would do better.

    Raises
    ------
    ProblemError
        If shapes do not fit, latents are missing, a concept has one value only among the rows fitted or held out, or
        too few rows have it.
    """
    from sklearn.linear_model import LinearRegression

    z, u, test = _tables(latents, concepts, test)
    scores = []
    for fit, held, target in _splits(z, u, test, seed):
        if fit.sum() <= z.sizes["latent"] + 1:
            raise ProblemError(
                f"{fit.sum()} rows to fit a regression on {z.sizes['latent']} latents; give more rows or hold out fewer"
            )
        regression = LinearRegression().fit(z.values[fit], target[fit])
        scores.append(_explained(target[held], regression.predict(z.values[held])))
    return xr.DataArray(scores, {"concept": u["concept"].values}, ("concept",), "r_squared")


@checked(ProblemError)
def match_latents(latents: Table, concepts: Table, *, ranks: bool = False) -> xr.Dataset:
    """One latent for each concept, by the largest sum of absolute correlations (Hungarian method, Kuhn 1955).

    Latents that were learned without labels come in any order and with any sign: match them before they are compared
    with concepts one by one, as ``latents[:, match["position"].values]``.

    Parameters
    ----------
    latents, concepts
        (data, latent) and (data, concept), with no fewer latents than concepts.
    ranks
        Whether to correlate ranks (Spearman), which any monotone relation leaves at 1, instead of values (Pearson).

    Returns
    -------
    xr.Dataset
        Over concept: ``position`` and ``label`` of its latent, and ``correlation`` with it, whose sign says whether
        the latent is turned. ``correlations`` (latent, concept), 0 for a latent without variance. Scalars: ``mcc``, the
        mean absolute correlation of the matches (Hyvärinen and Morioka 2016), and ``permuted``, whether some concept
        is matched by another latent than the one in its place.

    Raises
    ------
    ProblemError
        As `r_squared`, or if there are fewer latents than concepts.
    """
    z, u, _ = _tables(latents, concepts)
    _check_rows(z, u)
    if z.sizes["latent"] < u.sizes["concept"]:
        raise ProblemError(
            f"{z.sizes['latent']} latents for {u.sizes['concept']} concepts; give at least one for each, or leave out "
            "concepts"
        )
    correlations = np.stack(
        [_correlations(z.values[known], column[known], ranks) for _, column, known in _columns(u)],
        axis=1,
    )
    position, concept = linear_sum_assignment(-np.abs(correlations))
    position = position[np.argsort(concept)]
    found = correlations[position, np.arange(len(position))]
    return xr.Dataset(
        {
            "position": ("concept", position),
            "label": ("concept", z["latent"].values[position]),
            "correlation": ("concept", found),
            "correlations": (("latent", "concept"), correlations),
            "mcc": float(np.abs(found).mean()),
            "permuted": bool((position != np.arange(len(position))).any()),
        },
        coords={"latent": z["latent"].values, "concept": u["concept"].values},
    )


@checked(ProblemError)
def dci(
    latents: Table,
    concepts: Table,
    *,
    regressor: Annotated[str, OneOf(("boosting", "forest", "lasso"))] = "boosting",
    test: float | ArrayLike = 0.5,
    seed: Annotated[int, Interval(ge=0, lt=2**32)] = 0,
) -> xr.Dataset:
    r"""Disentanglement, completeness and informativeness (Eastwood and Williams 2018, section 2).

    A regression of each concept on all latents says how important each latent is to it: :math:`R_{ij}`. A latent is
    disentangled as far as one concept alone has its importance, a concept complete as far as one latent alone is
    important to it: 1 minus the entropy of the shares, in units of its maximum. None of the three depends on the order
    or signs of latents.

    Parameters
    ----------
    latents, concepts
        (data, latent) and (data, concept), at least two of each.
    regressor
        ``"boosting"`` or ``"forest"`` of trees, with mean decreases of impurity as importances, or ``"lasso"``, with
        absolute coefficients of standardised latents and a penalty by cross-validation.
    test, seed
        As in `r_squared`; the seed is also that of the regressor.

    Returns
    -------
    xr.Dataset
        Scalars ``disentanglement``, the mean over latents by their shares of importance, and ``completeness`` and
        ``informativeness``, means over concepts. ``latent_disentanglement`` (latent), nan for one of no importance;
        ``concept_completeness`` (concept), nan where no latent matters, which counts as 0; ``concept_informativeness``
        (concept), the held-out share of variance explained; ``importance`` (latent, concept).

    Raises
    ------
    ProblemError
        As `r_squared`, or if there is one latent or concept only, or the regressor is not known.
    """
    z, u, test = _tables(latents, concepts, test)
    if min(z.sizes["latent"], u.sizes["concept"]) < 2:
        raise ProblemError(
            f"{z.sizes['latent']} latents and {u.sizes['concept']} concepts; of one alone nothing can be disentangled"
        )
    importance, scores = [], []
    for fit, held, target in _splits(z, u, test, seed):
        centre, scale = z.values[fit].mean(axis=0), z.values[fit].std(axis=0)
        scaled = (z.values - centre) / np.where(scale > 0, scale, 1)
        model = _REGRESSORS[regressor](seed).fit(scaled[fit], target[fit])
        weight = model.coef_ if regressor == "lasso" else model.feature_importances_
        importance.append(np.abs(weight))
        scores.append(_explained(target[held], model.predict(scaled[held])))
    table = np.stack(importance, axis=1)
    by_latent, by_concept = _concentration(table), _concentration(table.T)
    share = table.sum(axis=1) / max(table.sum(), np.finfo(float).tiny)
    return xr.Dataset(
        {
            "disentanglement": float(np.nansum(share * by_latent)),
            "completeness": float(np.nan_to_num(by_concept).mean()),
            "informativeness": float(np.mean(scores)),
            "latent_disentanglement": ("latent", by_latent),
            "concept_completeness": ("concept", by_concept),
            "concept_informativeness": ("concept", scores),
            "importance": (("latent", "concept"), table),
        },
        coords={"latent": z["latent"].values, "concept": u["concept"].values},
        attrs={"regressor": regressor},
    )


def _boosting(seed: int) -> Any:
    from sklearn.ensemble import GradientBoostingRegressor

    return GradientBoostingRegressor(random_state=seed)


def _forest(seed: int) -> Any:
    from sklearn.ensemble import RandomForestRegressor

    return RandomForestRegressor(random_state=seed)


def _lasso(seed: int) -> Any:
    from sklearn.linear_model import LassoCV

    return LassoCV(random_state=seed)


_REGRESSORS: dict[str, Callable[[int], Any]] = {"boosting": _boosting, "forest": _forest, "lasso": _lasso}


def _concentration(weight: Floats) -> Floats:
    """1 minus the entropy of the shares in each row, in units of its maximum; nan for a row of zeros."""
    total = weight.sum(axis=1, keepdims=True)
    share = np.divide(weight, total, out=np.zeros_like(weight), where=total > 0)
    logs = np.log(share, out=np.zeros_like(share), where=share > 0)
    found = 1 + (share * logs).sum(axis=1) / np.log(weight.shape[1])
    return np.where(total[:, 0] > 0, found, np.nan)


def _explained(truth: Floats, predicted: Floats) -> float:
    return float(1 - np.mean((truth - predicted) ** 2) / truth.var())


def _correlations(latents: Floats, concept: Floats, ranks: bool) -> Floats:
    """The value for every latent with a concept (latent,)."""
    if ranks:
        latents, concept = rankdata(latents, axis=0), rankdata(concept)
    a, b = latents - latents.mean(axis=0), concept - concept.mean()
    size = np.sqrt((a**2).sum(axis=0) * (b**2).sum())
    return np.divide(a.T @ b, size, out=np.zeros_like(size), where=np.ptp(latents, axis=0) > 0)


def _tables(latents: Table, concepts: Table, test: Any = None) -> tuple[xr.DataArray, xr.DataArray, Any]:
    """As (data, latent) and (data, concept), with labels, and which rows are held out, all rows in one order."""
    rows = row_labels(latents, concepts, test)
    test = arranged(test, "test", {"data": rows}, error=ProblemError) if np.ndim(test) else test
    return _table(latents, "latent", rows), _table(concepts, "concept", rows), test


def _table(values: Table, dim: str, rows: Any) -> xr.DataArray:
    """As (data, dim), with labels."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().numpy()
    labels: Any = labels_of(values, dim, axis=1)
    array = np.asarray(arranged(values, f"{dim}s", {"data": rows, dim: None}, error=ProblemError))
    if array.ndim != 2 or array.dtype.kind not in "biuf":
        raise ProblemError(f"{dim}s have shape {array.shape} and type {array.dtype}; give numbers (data, {dim})")
    if not array.shape[1]:
        raise ProblemError(f"there is no {dim}; give at least one")
    labels = np.arange(array.shape[1]) if labels is None else labels
    return xr.DataArray(array.astype(float), {dim: labels}, ("data", dim))


def _check_rows(z: xr.DataArray, u: xr.DataArray) -> None:
    if z.sizes["data"] != u.sizes["data"]:
        raise ProblemError(f"{z.sizes['data']} rows of latents and {u.sizes['data']} of concepts; give them row by row")
    if not np.isfinite(z.values).all():
        raise ProblemError("latents are missing or infinite in some rows; leave out these rows")
    if np.isinf(u.values).any():
        raise ProblemError("concepts are infinite in some rows; mark what is not known by nan")
    for name, column, known in _columns(u):
        if known.sum() < 2 or np.ptp(column[known]) == 0:
            raise ProblemError(f"concept {name!r} has fewer than two values; leave it out")


def _columns(u: xr.DataArray) -> Iterator[tuple[Any, Floats, NDArray[np.bool_]]]:
    """Label, values and which are known, for each concept."""
    for name, column in zip(u["concept"].values.tolist(), u.values.T, strict=True):
        yield name, column, np.isfinite(column)


def _splits(
    z: xr.DataArray, u: xr.DataArray, test: float | ArrayLike, seed: int
) -> Iterator[tuple[NDArray[np.bool_], NDArray[np.bool_], Floats]]:
    """Rows to fit and rows held out, both of known values, and the values, for each concept."""
    _check_rows(z, u)
    held = _held_out(z.sizes["data"], test, seed)
    for name, column, known in _columns(u):
        fit, apart = known & ~held, known & held
        for rows, said in ((fit, "to fit"), (apart, "held out")):
            if rows.sum() < _LEAST_HELD_OUT or np.ptp(column[rows]) == 0:
                raise ProblemError(
                    f"concept {name!r} has fewer than two values among {rows.sum()} labelled rows {said}; give more "
                    "rows, or leave it out"
                )
        yield fit, apart, column


def _held_out(size: int, test: float | ArrayLike, seed: int) -> NDArray[np.bool_]:
    if np.ndim(test):
        mask = np.asarray(test)
        if mask.shape != (size,) or mask.dtype != bool:
            raise ProblemError(f"test has shape {mask.shape} and type {mask.dtype}; give booleans by row ({size},)")
        return mask
    share = np.asarray(test)
    if share.dtype.kind != "f" or not 0 < share < 1:
        raise ProblemError(f"test={test!r}; give a share of rows between 0 and 1, or booleans by row")
    mask = np.zeros(size, dtype=bool)
    mask[np.random.default_rng(seed).permutation(size)[: round(size * float(share))]] = True
    return mask
