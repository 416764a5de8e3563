"""Matérn processes in time, as Markov processes of their derivatives.

A process f of unit variance with a Matérn correlation of order m - 1/2 solves a linear stochastic differential equation
of order m: its state ``x = (f, f' / l, ..., f^(m-1) / l^(m-1))``, with ``l = sqrt(2m - 1) / length-scale``, is a Markov
process (Hartikainen and Särkkä, 2010). Order 1/2 is the first-order autoregression, ``l = -log(decay)``.

Seen at discrete times, f itself remembers little: given the p values before it, earlier ones hardly matter, since the
roots of the moving average of the sampled process are at most .27 (3/2) and .43 (5/2) at even steps. `kriging` gives
the weights of those p values, by a filter from a stationary start, so that nothing nearly singular is inverted.
`banded_precision` is the precision matrix of the series that is made by them.

References
----------
Hartikainen, J. and Särkkä, S. (2010). Kalman filtering and smoothing solutions to temporal Gaussian process regression
models. IEEE MLSP. https://doi.org/10.1109/MLSP.2010.5589113
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "PROCESSES",
    "banded_precision",
    "correlation_at",
    "explained_at",
    "kriging",
    "products_summed",
    "rate",
    "stationary",
    "transition",
]

Array = NDArray[np.float64]

PROCESSES = {"ar1": "AR(1)", "matern32": "Matérn 3/2", "matern52": "Matérn 5/2"}
"""Names of the processes, also in words; the first is parametrised by its decay over one unit of time, the others by a
length-scale."""

_GENERATOR: dict[str, list[list[float]]] = {
    "ar1": [[-1.0]],
    "matern32": [[0.0, 1.0], [-1.0, -2.0]],
    "matern52": [[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [-1.0, -3.0, -3.0]],
}
_STATIONARY: dict[str, list[list[float]]] = {
    "ar1": [[1.0]],
    "matern32": [[1.0, 0.0], [0.0, 1.0]],
    "matern52": [[1.0, 0.0, -1 / 3], [0.0, 1 / 3, 0.0], [-1 / 3, 0.0, 1.0]],
}
_DIFFUSION = {"ar1": 2.0, "matern32": 4.0, "matern52": 16 / 3}
_ROOT = {"matern32": math.sqrt(3.0), "matern52": math.sqrt(5.0)}
_MEMORY = {"ar1": 1, "matern32": 12, "matern52": 16}  # covariances are then right to 4e-6 of the variance
_FAR = 700.0  # exp of minus it is still a number
_NONE = 30.0  # beyond it nothing is left of a correlation that a sum of squares would show
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(16)
_WINDOWS = 512  # windows of steps that are filtered at a time


def rate(process: str, scale: ArrayLike) -> Array:
    """``l`` of a process: per unit of time, what makes times numbers.

    Parameters
    ----------
    process
        One of `PROCESSES`.
    scale
        Decay over one unit of time, in [0, 1), under ``"ar1"``; else length-scale, positive. Any shape.
    """
    values = np.asarray(scale, dtype=float)
    if process == "ar1":
        return -np.log(np.maximum(values, 1e-300))
    return np.asarray(_ROOT[process] / values)


def correlation_at(process: str, scale: ArrayLike, lag: ArrayLike) -> Array:
    """Correlation over a lag; scale (as in `rate`) and lag broadcast."""
    if process == "ar1":
        return np.asarray(np.asarray(scale, dtype=float) ** np.abs(lag))
    x = np.minimum(rate(process, scale) * np.abs(lag), _FAR)
    return np.asarray((1 + x if process == "matern32" else 1 + x + x * x / 3) * np.exp(-x))


def stationary(process: str) -> Array:
    """Covariance of the state (m, m)."""
    return np.array(_STATIONARY[process])


def _kept(process: str, x: Array) -> Array:
    """exp(G x) for the generator G, whose eigenvalues are all -1: shape (..., m, m)."""
    size = len(_GENERATOR[process])
    nilpotent = np.array(_GENERATOR[process]) + np.eye(size)
    term = total = np.broadcast_to(np.eye(size), (*x.shape, size, size))
    for power in range(1, size):
        term = term @ nilpotent * x[..., None, None] / power
        total = total + term
    return np.exp(-x)[..., None, None] * total


def transition(process: str, scale: ArrayLike, step: ArrayLike) -> tuple[Array, Array]:
    """How the state goes on: matrix A and covariance Q of what is new, both (..., m, m).

    Parameters
    ----------
    process
        One of `PROCESSES`.
    scale, step
        As in `rate`, and time that passes; they broadcast.
    """
    x = np.minimum(rate(process, scale) * np.asarray(step, dtype=float), _FAR)
    kept, whole = _kept(process, x), stationary(process)
    near = np.minimum(x, 1.0)  # by quadrature, where the difference below would lose its digits
    nodes = 0.5 * near[..., None] * (1 + _NODES)
    column = _kept(process, nodes)[..., -1]  # (..., node, m)
    weights = 0.5 * _DIFFUSION[process] * near[..., None] * _WEIGHTS
    short = np.einsum("...n,...ni,...nj->...ij", weights, column, column)
    return kept, np.where((x > 1.0)[..., None, None], whole - kept @ whole @ kept.swapaxes(-1, -2), short)


def explained_at(process: str, scale: ArrayLike, lag: ArrayLike) -> Array:
    """Share of the variance of a series that its state explains after a lag; scale (as in `rate`) and lag broadcast."""
    x = np.minimum(rate(process, scale) * np.asarray(lag, dtype=float), _FAR)
    row = _kept(process, x)[..., 0, :]
    return np.asarray(np.einsum("...i,ij,...j->...", row, stationary(process), row))


def products_summed(process: str, scale: Array, steps: Array) -> Array:
    """Sum over all pairs of times of the product of two correlations: (G, G).

    Parameters
    ----------
    process, scale, steps
        As in `kriging`.
    """
    times = np.concatenate([[0.0], np.cumsum(steps)])
    slowest = float(rate(process, scale).min())
    total = np.full((len(scale), len(scale)), float(len(times)))
    for apart in range(1, len(times)):
        lags, count = np.unique(times[apart:] - times[:-apart], return_counts=True)
        if slowest * lags[0] > _NONE:
            break
        values = correlation_at(process, scale[:, None], lags)
        total += 2 * (values * count) @ values.T
    return total


def kriging(process: str, scale: Array, steps: Array) -> tuple[Array, Array]:
    """Each value of a series given the p before it.

    Parameters
    ----------
    process
        One of `PROCESSES`.
    scale
        As in `rate`, shape (G,).
    steps
        Times between neighbours, positive, shape (T-1,).

    Returns
    -------
    tuple of array
        Weights (G, T, p) of the values 1, ..., p places before, zero for those before the first, and variances (G, T)
        of what is left. The first p values are exact.
    """
    memory = min(_MEMORY[process], max(len(steps), 1))
    padded = np.concatenate([np.full(memory, np.inf), steps])  # nothing is left of what was before the first
    windows, place = np.unique(np.lib.stride_tricks.sliding_window_view(padded, memory), axis=0, return_inverse=True)
    parts = [_filtered(process, scale, windows[i : i + _WINDOWS]) for i in range(0, len(windows), _WINDOWS)]
    weights, variance = (np.concatenate(part, axis=1)[:, place.ravel()] for part in zip(*parts, strict=True))
    return weights[:, :, ::-1].copy(), variance


def _filtered(process: str, scale: Array, windows: Array) -> tuple[Array, Array]:
    """Weights (G, W, p), earliest first, and variances (G, W) of a value after p others at steps (W, p)."""
    memory = windows.shape[1]
    shape = len(scale), len(windows)
    size = len(_GENERATOR[process])
    spread = np.broadcast_to(stationary(process), (*shape, size, size))
    mean = np.zeros((*shape, size, memory))  # of the state, as a linear function of the values
    for place in range(memory):
        gain = spread[..., 0] / spread[..., :1, 0]
        mean = mean - gain[..., None] * mean[..., :1, :]
        mean[..., place] += gain
        spread = spread - gain[..., None] * spread[..., :1, :]
        kept, fresh = transition(process, scale[:, None], windows[:, place])
        mean = kept @ mean
        spread = kept @ spread @ kept.swapaxes(-1, -2) + fresh
    return mean[..., 0, :], spread[..., 0, 0]


def banded_precision(process: str, scale: Array, steps: Array) -> tuple[Array, Array]:
    """Precision matrices of series of unit variance.

    Parameters
    ----------
    process, scale, steps
        As in `kriging`.

    Returns
    -------
    tuple of array
        Bands (G, p + 1, T), of which ``[g, j, t]`` is the entry of row t + j and column t, zero where there is no such
        row, and log determinants (G,).
    """
    if process == "ar1":
        return _tridiagonal(scale, steps)
    weights, variance = kriging(process, scale, steps)
    count, size, memory = weights.shape
    rows = np.concatenate([np.ones((count, size, 1)), -weights], axis=2)  # of the filter: row t, columns t, t-1, ...
    scaled = rows / variance[..., None]
    bands = np.zeros((count, memory + 1, size))
    for beside in range(min(memory + 1, size)):
        for back in range(memory + 1 - beside):
            first = beside + back
            bands[:, beside, : size - first] += scaled[:, first:, back] * rows[:, first:, first]
    return bands, -np.log(variance).sum(1)


def _tridiagonal(decay: Array, steps: Array) -> tuple[Array, Array]:
    """The same for first-order autoregressions, in closed form."""
    phi = decay[:, None] ** steps
    innovation = -np.expm1(2 * steps * np.log(np.maximum(decay, 1e-300))[:, None])  # 1 - phi^2, without cancellation
    bands = np.zeros((len(decay), 2, len(steps) + 1))
    bands[:, 0] = 1.0
    bands[:, 0, 1:] = 1 / innovation
    bands[:, 0, :-1] += phi**2 / innovation
    bands[:, 1, :-1] = -phi / innovation
    return bands, -np.log(innovation).sum(1)
