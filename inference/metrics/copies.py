"""Rows that are copies of other rows, exactly or nearly."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["near_copies"]

_CHUNK = 2**22  # numbers that are compared at once


def near_copies(rows: NDArray[np.float64], others: NDArray[np.float64], tolerance: float) -> NDArray[np.bool_]:
    """Whether rows are copies of one of the others: no number differs by more than a tolerance.

    Sums of all numbers with random signs tell most rows apart, so that few are compared number by number.

    Parameters
    ----------
    rows
        Rows in question (row, ...).
    others
        What they may be copies of (other, ...), of the same shape but for their number.
    tolerance
        Largest absolute difference of two numbers of a copy.

    Returns
    -------
    numpy.ndarray
        Whether a row is a copy (row,). Rows with numbers that are not finite are no copies.
    """
    if np.shape(rows)[1:] != np.shape(others)[1:]:
        raise ValueError(f"rows of shape {np.shape(rows)[1:]} are compared with rows of shape {np.shape(others)[1:]}")
    size = int(np.prod(np.shape(rows)[1:]))
    first, second = (np.asarray(part, dtype=np.float64).reshape(len(part), size) for part in (rows, others))
    second = second[np.isfinite(second).all(1)]
    finite = np.isfinite(first).all(1)
    found = np.zeros(len(first), dtype=bool)
    signs = np.random.default_rng(0).choice([-1.0, 1.0], size=size)
    order = np.argsort(second @ signs, kind="stable")
    second = second[order]
    sums = second @ signs
    sums.sort()  # as good as sorted already, but for rounding
    largest = max(float(np.abs(part).max(initial=0.0)) for part in (first[finite], second))
    reach = size * (tolerance + 1e-12 * largest)
    step = max(_CHUNK // max(size, 1), 1)
    for i in np.flatnonzero(finite):
        own = first[i] @ signs
        low, high = np.searchsorted(sums, own - reach), np.searchsorted(sums, own + reach, side="right")
        for start in range(low, high, step):
            part = second[start : min(start + step, high)]
            if (np.abs(part - first[i]).max(1, initial=0.0) <= tolerance).any():
                found[i] = True
                break
    return found
