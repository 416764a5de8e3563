"""How series go on: the process of the model, or an autoregression on several lags of its draws.

The autoregression is a second stage. The posterior of the model takes each series for its process; draws of the series
are nearly free of that prior where the data are many, and may remember longer. For each draw and mode the coefficients
and the variance of the innovations have a conjugate prior about the AR(1) process of the decay of that draw over one
step,

    a | s^2 ~ N((decay, 0, ...), s^2 diag(1/n, 1/2n, ...)),  s^2 ~ InverseGamma(m / 2, m (1 - decay^2) / 2),

so that the posterior given the series is exact. Explosive draws are drawn again.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from probmodels.bayesian_svd.forecasts.states import normal_root
from probmodels.distributions.processes import transition

__all__ = ["draw_lags", "follow", "follow_lags"]

Array = NDArray[np.float64]

_PRIOR = 20.0  # observations of unit variance that the prior of coefficients is worth
_PRIOR_VARIANCE = 10.0  # and that of the variance
_TRIES = 50


def follow(rng: np.random.Generator, process: str, scale: Array, mean: Array, spread: Array, steps: int) -> Array:
    """Series of a process beyond a state of this mean (draw, mode, m) and covariance: (draw, time, mode).

    Scale (draw, mode) as in `probmodels.distributions.processes.rate`.
    """
    found = np.empty((len(mean), steps, mean.shape[1]))
    state = mean
    if spread.any():
        state = mean + np.einsum("skij,skj->ski", normal_root(spread), rng.standard_normal(mean.shape))
    kept, fresh = transition(process, scale, 1.0)
    root = normal_root(fresh)
    for step in range(steps):
        state = np.einsum("skij,skj->ski", kept, state)
        state += np.einsum("skij,skj->ski", root, rng.standard_normal(mean.shape))
        found[:, step] = state[..., 0]
    return found


def draw_lags(rng: np.random.Generator, series: Array, decay: Array, lags: Sequence[int]) -> tuple[Array, Array]:
    """Coefficients (draw, mode, lag) and sd of innovations (draw, mode), given series (draw, time, mode).

    They are draws of the posterior that this module's docstring states, conditional on processes that are stationary.
    """
    longest, size = max(lags), series.shape[1]
    past = np.stack([series[:, longest - lag : size - lag] for lag in lags], axis=-1)  # (draw, time, mode, lag)
    now = series[:, longest:]
    prior = np.where(np.asarray(lags) == 1, _PRIOR, 2 * _PRIOR)
    centre = np.where(np.asarray(lags) == 1, decay[..., None], 0.0)
    precision = np.einsum("stkl,stkm->sklm", past, past, optimize=True) + np.diag(prior)
    linear = np.einsum("stkl,stk->skl", past, now, optimize=True) + prior * centre
    mean = np.linalg.solve(precision, linear[..., None])[..., 0]
    square = np.einsum("stk,stk->sk", now, now) + (prior * centre**2).sum(-1) - (linear * mean).sum(-1)
    shape = 0.5 * (_PRIOR_VARIANCE + now.shape[1])
    rate = 0.5 * (_PRIOR_VARIANCE * (1 - decay**2) + np.maximum(square, 0.0))
    factor = np.linalg.cholesky(np.linalg.inv(precision))
    coefficients, sd = np.empty_like(mean), np.empty(mean.shape[:2])
    left = np.ones(mean.shape[:2], dtype=bool)
    for _ in range(_TRIES):
        spread = np.sqrt(rate[left] / rng.gamma(shape, size=int(left.sum())))
        noise = np.einsum("alm,am->al", factor[left], rng.standard_normal((int(left.sum()), len(lags))))
        coefficients[left], sd[left] = mean[left] + spread[:, None] * noise, spread
        left[left] = _radius(coefficients[left], lags) >= 1.0
        if not left.any():
            return coefficients, sd
    coefficients[left] = centre[left]  # hardly any draw is stationary: the process of the model is
    sd[left] = np.sqrt(1 - np.broadcast_to(decay, left.shape)[left] ** 2)
    return coefficients, sd


def _radius(coefficients: Array, lags: Sequence[int]) -> Array:
    """Largest size of the eigenvalues of the companion matrix: below 1 for stationary processes."""
    size = max(lags)
    companion = np.zeros((len(coefficients), size, size))
    companion[:, np.arange(1, size), np.arange(size - 1)] = 1.0
    companion[:, 0, np.asarray(lags) - 1] = coefficients
    return np.abs(np.linalg.eigvals(companion)).max(-1)


def follow_lags(
    rng: np.random.Generator, past: Array, coefficients: Array, sd: Array, lags: Sequence[int], steps: int
) -> Array:
    """Series (draw, time, mode) beyond a past of at least as many times as the longest lag."""
    longest = max(lags)
    found = np.concatenate([past[:, -longest:], np.empty((len(past), steps, past.shape[2]))], axis=1)
    for step in range(longest, longest + steps):
        mean = np.einsum("skl,slk->sk", coefficients, np.stack([found[:, step - lag] for lag in lags], axis=1))
        found[:, step] = mean + sd * rng.standard_normal(sd.shape)
    return found[:, longest:]
