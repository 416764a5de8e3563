r"""Dependence of two variables by grids: the maximal and the total information coefficient.

For every size of grid, the partition of both axes that makes the cells most informative is sought, its mutual
information divided by the most that such a grid could have, and the scores put into the characteristic matrix. Its
maximum, MIC, says how strong a dependence is, its mean, the normalised TIC, serves to tell dependence from none.

The best grid is approximated as published: one axis is cut into rows of equal counts, the other by dynamic programming,
at borders of runs of points that share a row (clumps), joined into at most c times as many as there are columns.

References
----------
Reshef, D. N. et al. (2011). Detecting novel associations in large data sets. Science 334, supporting material.
https://doi.org/10.1126/science.1205438
Reshef, Y. A., Reshef, D. N., Finucane, H. K., Sabeti, P. C. and Mitzenmacher, M. (2016). Measuring dependence
powerfully and equitably. JMLR 17. https://jmlr.org/papers/v17/15-308.html
"""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
import xarray as xr
from annotated_types import Interval
from numba import njit
from numpy.typing import ArrayLike, NDArray

from probmodels.datasets.checks import as_array
from probmodels.datasets.labelled import arranged_together
from probmodels.errors import ProblemError
from probmodels.options import checked

__all__ = ["characteristic_matrix", "mic", "tic"]

_JIT: dict[str, Any] = {"cache": True, "nogil": True}
_LEAST = 4  # observations, and cells of the largest grid: 2 by 2

Exponent = Annotated[float, Interval(gt=0, le=1)]
Candidates = Annotated[float, Interval(gt=0, le=1e6)]


@checked(ProblemError)
def mic(x: ArrayLike, y: ArrayLike, *, alpha: Exponent = 0.6, c: Candidates = 15, equipartition: bool = False) -> float:
    """Maximal information coefficient: 0 for independent variables, 1 for noiseless functions, as n grows.

    Parameters
    ----------
    x, y, alpha, c, equipartition
        As in `characteristic_matrix`.

    Returns
    -------
    float
        The largest entry of the characteristic matrix, in [0, 1] (Reshef et al. 2011): with ``equipartition``, MIC_e
        (Reshef et al. 2016). Of finitely many independent observations it is above 0.

    Raises
    ------
    ProblemError
        As `characteristic_matrix`.
    """
    return float(characteristic_matrix(x, y, alpha=alpha, c=c, equipartition=equipartition).max())


@checked(ProblemError)
def tic(
    x: ArrayLike,
    y: ArrayLike,
    *,
    alpha: Exponent = 0.6,
    c: Candidates = 15,
    equipartition: bool = False,
    normalised: bool = True,
) -> float:
    """Total information coefficient, which sums evidence of dependence over all grids.

    Parameters
    ----------
    x, y, alpha, c, equipartition
        As in `characteristic_matrix`.
    normalised
        Whether to divide by the number of entries, so that TIC lies in [0, 1] and sizes of data compare.

    Returns
    -------
    float
        Mean, or sum, of the entries of the characteristic matrix (Reshef et al. 2016): with
        ``equipartition``, TIC_e.

    Raises
    ------
    ProblemError
        As `characteristic_matrix`.
    """
    scores = characteristic_matrix(x, y, alpha=alpha, c=c, equipartition=equipartition)
    return float(scores.mean() if normalised else scores.sum())


@checked(ProblemError)
def characteristic_matrix(
    x: ArrayLike, y: ArrayLike, *, alpha: Exponent = 0.6, c: Candidates = 15, equipartition: bool = False
) -> xr.DataArray:
    r"""Largest mutual information of grids by their size, over the log of the shorter side.

    Grids of up to :math:`B = \max(n^\alpha, 4)` cells are scored. Only ranks count: increasing maps of either variable
    change nothing, decreasing ones what the approximation is off by. A variable of fewer values than there are parts to
    cut it into has as many parts as values.

    Parameters
    ----------
    x, y
        Observations (observation,), finite.
    alpha
        Exponent of the number of cells, in (0, 1]: large for complex relations, small for power against independence.
    c
        How many candidate borders there are for each column.
    equipartition
        Whether the side of more parts (x, of as many) is always the one of equal counts: the equicharacteristic
        matrix, which is cheaper and less biased. Otherwise each side is in turn, the better grid counts, and swapping
        the variables transposes the matrix.

    Returns
    -------
    xr.DataArray
        (x_bins, y_bins) in [0, 1], from 2 parts; nan where a grid would have more than B cells.

    Raises
    ------
    ProblemError
        If shapes differ, there are fewer than 4 observations, values are missing, or options out of range.
    """
    first, second = _observations(x, y)
    cells = max(len(first) ** alpha, _LEAST)
    size = np.arange(2, int(cells / 2) + 1)
    every = np.full_like(size, size[-1])
    columns = _scores(first, second, cells, c, size - 1 if equipartition else every)
    rows = _scores(second, first, cells, c, size if equipartition else every)
    scores = np.fmax(columns, rows.T).clip(0, 1)  # rounding may leave the interval
    return xr.DataArray(scores, {"x_bins": size, "y_bins": size}, ("x_bins", "y_bins"), "characteristic_matrix")


def _observations(x: ArrayLike, y: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    x, y = arranged_together({"x": x, "y": y}, ["data"], error=ProblemError)
    first, second = (
        as_array(values, name, numbers=True, error=ProblemError).astype(float)
        for name, values in {"x": x, "y": y}.items()
    )
    if first.ndim != 1 or first.shape != second.shape:
        raise ProblemError(f"x of shape {first.shape} and y of shape {second.shape}; give both by observation (n,)")
    if len(first) < _LEAST:
        raise ProblemError(f"{len(first)} observations make no grid of 2 by 2 cells; give at least {_LEAST}")
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise ProblemError("x or y has values that are missing or infinite; leave out these observations")
    return first, second


def _scores(
    along: NDArray[np.float64], across: NDArray[np.float64], cells: float, c: float, most_columns: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Scores (columns, rows) from 2, of rows of equal counts and the best columns: nan where there are none.

    ``most_columns`` (rows,) limits columns beside the number of cells.
    """
    position, value = (np.unique(x, return_inverse=True)[1].reshape(-1) for x in (along, across))
    order = np.lexsort((value, position))
    position, value = position[order], value[order]
    ends = np.flatnonzero(np.diff(position, append=-1))  # of points at one position
    starts = np.concatenate([[0], ends[:-1] + 1])
    scores = np.full((len(most_columns), len(most_columns)), np.nan)
    for rows, most in enumerate(most_columns, 2):
        columns = min(int(cells / rows), most)
        if columns < 2:
            continue
        part = _equal_counts(np.bincount(value), rows)
        row, rows_used = part[value], part[-1] + 1
        kind = np.where(row[starts] == row[ends], row[starts], rows + np.arange(len(ends)))  # of several: like no other
        clump = np.cumsum(np.diff(kind, prepend=kind[0]) != 0)[position]
        clumps = int(c * int(cells / rows)) or 1
        if clump[-1] >= clumps:
            clump = _equal_counts(np.bincount(clump), clumps)[clump]
        count = np.zeros((clump[-1] + 2, rows_used), dtype=np.int64)
        np.add.at(count, (clump + 1, row), 1)
        information = _best_columns(count.cumsum(axis=0), columns)
        shorter = np.minimum(np.arange(2, columns + 1), max(rows_used, 2))
        scores[: columns - 1, rows - 2] = information / np.log(shorter)
    return scores


@njit(**_JIT)
def _equal_counts(sizes: NDArray[np.int64], parts: int) -> NDArray[np.int64]:
    """Part of each of consecutive groups of points (group,), at most ``parts`` of them, of counts as equal as can be.

    A group joins the part at hand if that brings its count closer to the one wanted, else opens the next. The count
    wanted is what is left over the parts that are left.
    """
    part = np.empty(len(sizes), np.int64)
    left = 0
    for size in sizes:
        left += size
    wanted = left / parts
    at, count = 0, 0
    for group, size in enumerate(sizes):
        if count > 0 and abs(count + size - wanted) >= abs(count - wanted):
            at, count = at + 1, 0
            wanted = left / (parts - at)
        part[group] = at
        count += size
        left -= size
    return part


@njit(**_JIT)
def _best_columns(count: NDArray[np.int64], columns: int) -> NDArray[np.float64]:
    """Mutual information in nats of rows and the best partition into at most 2, 3, ... columns (columns - 1,).

    ``count`` (border, row) has the points of each row before each border. H(rows | columns) is a sum over columns, so
    that the best partition of the points before a border into so many columns is a best one of the points before an
    earlier border into one less, and a last column.
    """
    borders, rows = count.shape
    total = np.zeros(borders, np.int64)
    for t in range(borders):
        for q in range(rows):
            total[t] += count[t, q]
    n = total[-1]
    xlogx = np.zeros(n + 1)
    for i in range(2, n + 1):
        xlogx[i] = i * np.log(i)
    best = np.zeros((columns, borders))  # least n H(rows | columns) of the points before a border
    cost = np.empty(borders)
    for t in range(1, borders):
        for s in range(t):
            cost[s] = xlogx[total[t] - total[s]]
            for q in range(rows):
                cost[s] -= xlogx[count[t, q] - count[s, q]]
        best[0, t] = cost[0]
        for k in range(1, columns):
            least = best[k - 1, t]
            for s in range(1, t):
                least = min(least, best[k - 1, s] + cost[s])
            best[k, t] = least
    found = np.empty(columns - 1)
    for k in range(1, columns):
        found[k - 1] = (best[0, -1] - best[k, -1]) / n  # one column: n H(rows)
    return found
