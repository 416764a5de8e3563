"""States of the processes that series are: filtered from values that draws hold, and how well values follow them.

A Matérn process goes on from its value and its derivatives (`probmodels.distributions.processes`), of which draws hold
the values alone. Files hold them rounded; a filter that knows of the rounding finds the derivatives.

References
----------
Johnson, V. E. (2004). A Bayesian chi-squared test for goodness-of-fit. Ann. Statist. 32.
https://doi.org/10.1214/009053604000000616

Ljung, G. M. and Box, G. E. P. (1978). On a measure of lack of fit in time series models. Biometrika 65.
https://doi.org/10.1093/biomet/65.2.297
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from scipy.special import chdtrc

from probmodels.distributions.processes import stationary, transition

__all__ = ["block_diagonal", "end_state", "innovations", "normal_root", "whiteness"]

Array = NDArray[np.float64]

_ROUNDING = 6e-4  # root mean square error of a value of a file, in posterior standard deviations of its entry
_LAST = 100  # values from which the last state is found


def _filtered(process: str, scale: Array, series: Array, steps: Array) -> Iterator[tuple[Array, Array, Array, Array]]:
    """At each time: mean (draw, process, m) and covariance (draw, process, m, m) of the state given the values so far,
    and what is new in the value and its variance (draw, process).

    Scale (draw, process), series (draw, time, process), steps (time - 1,).
    """
    rounding = (_ROUNDING * series.std(0)) ** 2 + 1e-14  # (time, process)
    spread = np.broadcast_to(stationary(process), (*scale.shape, *stationary(process).shape))
    mean = np.zeros(spread.shape[:-1])
    known = {step: transition(process, scale, step) for step in np.unique(steps)} if len(np.unique(steps)) < 50 else {}
    for time in range(series.shape[1]):
        if time:
            step = float(steps[time - 1])
            kept, fresh = known[step] if known else transition(process, scale, step)
            mean = np.einsum("skij,skj->ski", kept, mean)
            spread = kept @ spread @ kept.swapaxes(-1, -2) + fresh
        variance = spread[..., 0, 0] + rounding[time]
        new = series[:, time] - mean[..., 0]
        gain = spread[..., 0] / variance[..., None]
        mean = mean + gain * new[..., None]
        spread = spread - gain[..., None] * spread[..., :1, :]
        yield mean, spread, new, variance


def end_state(process: str, scale: Array, series: Array, steps: Array) -> tuple[Array, Array]:
    """Mean (draw, process, m) and covariance (draw, process, m, m) of the states at the last time.

    Parameters
    ----------
    process
        Name of the process, of `probmodels.distributions.processes.PROCESSES`.
    scale
        Decay over one step or length-scale in steps (draw, process).
    series
        Values (draw, time, process).
    steps
        Times between neighbours (time - 1,), in steps.
    """
    if process == "ar1":  # its state is its value
        return series[:, -1, :, None], np.zeros((*scale.shape, 1, 1))
    *_, (mean, spread, _, _) = _filtered(process, scale, series[:, -_LAST:], steps[1 - min(_LAST, series.shape[1]) :])
    return mean, spread


def innovations(process: str, scale: Array, series: Array, steps: Array) -> Array:
    """What is new in each value given those before, over its standard deviation: (draw, time, process).

    White, of unit variance, where series are draws of their process. Arguments as of `end_state`.
    """
    parts = [new / np.sqrt(variance) for _, _, new, variance in _filtered(process, scale, series, steps)]
    return np.stack(parts, axis=1)


def whiteness(new: Array, lags: int) -> tuple[Array, Array]:
    """How far innovations (draw, time, process) are from white noise.

    Parameters
    ----------
    new
        From `innovations`.
    lags
        Number of lags, from 1.

    Returns
    -------
    tuple of array
        Median over draws of the correlation at each lag (lag, process), and of the p-value (process,) of the
        portmanteau test of Ljung and Box (1978). At the parameters of a posterior draw a statistic of known
        distribution has that distribution where the model holds (Johnson, 2004), so that the median is below q in at
        most 2 q of all data.
    """
    size = new.shape[1]
    found = np.stack([(new[:, lag:] * new[:, :-lag]).sum(1) for lag in range(1, lags + 1)]) / (new**2).sum(1)
    weights = size * (size + 2) / (size - np.arange(1.0, lags + 1))
    p = chdtrc(lags, np.einsum("l,lsk->sk", weights, found**2))
    return np.median(found, axis=1), np.median(p, axis=0)


def normal_root(spread: Array) -> Array:
    """A root of covariances (..., m, m), which may be singular."""
    values, vectors = np.linalg.eigh(0.5 * (spread + spread.swapaxes(-1, -2)))
    return np.asarray(vectors * np.sqrt(np.maximum(values, 0.0))[..., None, :])


def block_diagonal(blocks: Array) -> Array:
    """Matrices (..., mode, m, m) as blocks of one (..., mode m, mode m)."""
    *shape, count, order, _ = blocks.shape
    found = np.zeros((*shape, count, order, count, order))
    for place in range(count):
        found[..., place, :, place, :] = blocks[..., place, :, :]
    return found.reshape(*shape, count * order, count * order)
