"""Precision matrices of series, banded, compiled: products, factors, solutions, quadratic forms.

A matrix P of T times with p diagonals below its own is an array of bands (p + 1, T), of which ``[j, t]`` is the entry
of row t + j and column t (`probmodels.distributions.processes.banded_precision`). To it is added a multiple of L'L, L
the filter of persistent noise, which is tridiagonal. First-order autoregressions have p = 1 and code of their own.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from probmodels.bayesian_svd.sweep import JIT

__all__ = ["back", "factor", "precision_times", "quadratic", "room", "solve"]


@njit(**JIT)
def precision_times(bands, x, out):
    """A banded matrix times a vector (T,)."""
    size = x.shape[0]
    if bands.shape[0] == 2:
        diagonal, side = bands[0], bands[1]
        for t in range(size):
            s = diagonal[t] * x[t]
            if t > 0:
                s += side[t - 1] * x[t - 1]
            if t + 1 < size:
                s += side[t] * x[t + 1]
            out[t] = s
        return
    for t in range(size):
        out[t] = bands[0, t] * x[t]
    for j in range(1, min(bands.shape[0], size)):
        for t in range(size - j):
            out[t] += bands[j, t] * x[t + j]
            out[t + j] += bands[j, t] * x[t]


@njit(**JIT)
def quadratic(bands, products):
    """x'Px from the products (p + 1, T) of a vector with itself j places on."""
    size = products.shape[1]
    total = np.dot(bands[0], products[0])
    for j in range(1, min(bands.shape[0], size)):
        total += 2.0 * np.dot(bands[j, : size - j], products[j, : size - j])
    return total


@njit(**JIT)
def room(bands):
    """Room for the factors of a matrix of so many bands (p + 1, T)."""
    width, size = bands.shape
    return np.empty((2, size)) if width == 2 else np.empty((size, width))


@njit(**JIT)
def factor(bands, weight, filter_, lower):
    """LDL' of the banded P + ``weight`` L'L into ``lower`` from `room`; log det.

    With two bands its rows are pivots and subdiagonal; with more, row t is pivot t and what is below it.
    """
    if bands.shape[0] == 2:
        return _factor_two(bands[0], bands[1], weight, filter_, lower[0], lower[1])
    square, beside = filter_[2], filter_[3]
    width, size = bands.shape
    for j in range(width):
        for t in range(size):
            lower[t, j] = bands[j, t]
    for t in range(size):
        lower[t, 0] += weight * square[t]
        if t + 1 < size:
            lower[t, 1] += weight * beside[t]
    return _factor_more(lower)


@njit(**JIT)
def _factor_two(diagonal, side, weight, filter_, pivot, ratio):
    """The same of a tridiagonal matrix."""
    square, beside = filter_[2], filter_[3]
    logdet = 0.0
    product = 1.0
    size = diagonal.shape[0]
    for t in range(size):
        p = diagonal[t] + weight * square[t]
        if t > 0:
            p -= ratio[t - 1] * (side[t - 1] + weight * beside[t - 1])
        pivot[t] = p
        product *= p
        if product > 1e200 or product < 1e-200 or t + 1 == size:
            logdet += math.log(product)
            product = 1.0
        if t + 1 < size:
            ratio[t] = (side[t] + weight * beside[t]) / p
    return logdet


@njit(**JIT)
def _factor_more(lower):
    """LDL' in place of a matrix whose columns from the diagonal on are the rows of ``lower``; log det."""
    size, width = lower.shape
    logdet = 0.0
    product = 1.0
    for t in range(size):
        p = lower[t, 0]
        product *= p
        if product > 1e200 or product < 1e-200 or t + 1 == size:
            logdet += math.log(product)
            product = 1.0
        last = min(width, size - t)
        for i in range(1, last):
            share = lower[t, i] / p
            for j in range(i, last):
                lower[t + i, j - i] -= share * lower[t, j]
        for i in range(1, last):
            lower[t, i] /= p
    return logdet


@njit(**JIT)
def solve(lower, two, x):
    """Solve in place with the factors of `factor`; ``two`` says whether there are two bands."""
    size = x.shape[0]
    if two:
        pivot, ratio = lower[0], lower[1]
        for t in range(1, size):
            x[t] -= ratio[t - 1] * x[t - 1]
        for t in range(size):
            x[t] /= pivot[t]
        for t in range(size - 2, -1, -1):
            x[t] -= ratio[t] * x[t + 1]
        return
    width = lower.shape[1]
    for t in range(size):
        for j in range(1, min(width, size - t)):
            x[t + j] -= lower[t, j] * x[t]
    for t in range(size):
        x[t] /= lower[t, 0]
    back(lower, two, x)


@njit(**JIT)
def back(lower, two, x):
    """Solve L'y = x in place."""
    size = x.shape[0]
    if two:
        ratio = lower[1]
        for t in range(size - 2, -1, -1):
            x[t] -= ratio[t] * x[t + 1]
        return
    width = lower.shape[1]
    for t in range(size - 2, -1, -1):
        s = x[t]
        for j in range(1, min(width, size - t)):
            s -= lower[t, j] * x[t + j]
        x[t] = s
