"""How series go on where each follows the others too: a vector autoregression of the draws of the series.

Modes are independent in the model, but of a record they are not: an anomaly that the ocean carries from one pattern to
the next shows in one series first. For each draw, mode i goes on as

    f_it = sum_l a_il f_i,t-l + sum_j c_ij f_j,t-1 + e_it,    e_it ~ N(0, s_i^2),    j other than i,

on several lags of its own and the last value of all others. As in `transitions` this is a second stage with a conjugate
prior about the AR(1) process of the draw, and the posterior given the series is exact. Coefficients of others have the
prior N(0, s_i^2 / 100), which a hundred values without any coupling would give. Draws that explode are drawn again.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from probmodels.bayesian_svd.draws import blocks

__all__ = ["Coupled", "draw_coupled", "follow_coupled"]

Array = NDArray[np.float64]

_PRIOR = 20.0  # observations of unit variance that the prior of a series' own coefficients is worth, as in transitions
_PRIOR_OTHERS = 100.0
_PRIOR_VARIANCE = 10.0
_TRIES = 20
_LONG = 240  # steps over which a process that explodes is told


class Coupled:
    """Draws of the autoregression.

    Attributes
    ----------
    lags
        Lags of each series.
    own
        Coefficients of its own lags (draw, mode, lag).
    others
        Coefficients of the last values of other series (draw, mode, other mode), zero on the diagonal.
    sd
        Standard deviation of the innovations (draw, mode).
    """

    def __init__(self, lags: Sequence[int], own: Array, others: Array, sd: Array) -> None:
        self.lags, self.own, self.others, self.sd = list(lags), own, others, sd

    def ahead(self, past: Array) -> Array:
        """Mean of the next values (draw, mode), given values (draw, time, mode) up to now."""
        lagged = np.stack([past[:, -lag] for lag in self.lags], axis=-1)
        return np.asarray((self.own * lagged).sum(-1) + np.einsum("skj,sj->sk", self.others, past[:, -1]))

    def explode(self) -> NDArray[np.bool_]:
        """Which draws grow without innovations."""
        longest = max(self.lags)
        values = np.random.default_rng(0).standard_normal((len(self.own), longest, self.own.shape[1]))
        sizes = []
        for _ in range(3):
            for _ in range(_LONG):
                values = np.concatenate([values[:, 1:], self.ahead(values)[:, None]], axis=1)
            sizes.append(np.sqrt((values**2).sum((1, 2))))
            values /= np.maximum(sizes[-1], 1e-300)[:, None, None]
        return np.asarray(sizes[-1] >= 1.0)


def draw_coupled(rng: np.random.Generator, series: Array, decay: Array, lags: Sequence[int]) -> Coupled:
    """Draws of the posterior that this module's docstring states, given series (draw, time, mode) and AR(1) decays."""
    num_draws, _, num_modes = series.shape
    shape = (num_draws, num_modes)
    decay = np.broadcast_to(decay, shape)
    found = Coupled(lags, np.zeros((*shape, len(lags))), np.zeros((*shape, num_modes)), np.zeros(shape))
    left = np.ones(num_draws, dtype=bool)
    for _ in range(_TRIES):
        where = np.flatnonzero(left)
        for block in blocks(len(where), series.shape[1], num_modes + len(lags)):
            at = where[block]
            found.own[at], found.others[at], found.sd[at] = _drawn(rng, series[at], decay[at], lags)
        left[where] = Coupled(lags, found.own[where], found.others[where], found.sd[where]).explode()
        if not left.any():
            return found
    found.own[left], found.others[left] = np.where(np.asarray(lags) == 1, decay[left][..., None], 0.0), 0.0
    found.sd[left] = np.sqrt(1 - decay[left] ** 2)  # hardly any draw is stationary: the process of the model is
    return found


def _drawn(rng: np.random.Generator, series: Array, decay: Array, lags: Sequence[int]) -> tuple[Array, Array, Array]:
    """One draw for each draw of the series: own coefficients, those of others, and sd of innovations."""
    longest, size = max(lags), series.shape[1]
    num_draws, num_modes, num_own = len(series), series.shape[2], len(lags)
    last, now = series[:, longest - 1 : size - 1], series[:, longest:]
    prior = np.concatenate([np.where(np.asarray(lags) == 1, _PRIOR, 2 * _PRIOR), np.full(num_modes - 1, _PRIOR_OTHERS)])
    own, others = np.empty((num_draws, num_modes, num_own)), np.zeros((num_draws, num_modes, num_modes))
    sd = np.empty((num_draws, num_modes))
    for mode in range(num_modes):
        rest = np.arange(num_modes) != mode
        past = np.stack([series[:, longest - lag : size - lag, mode] for lag in lags], axis=-1)
        past = np.concatenate([past, last[:, :, rest]], axis=-1)
        centre = np.zeros((num_draws, len(prior)))
        centre[:, list(lags).index(1)] = decay[:, mode]
        precision = past.swapaxes(1, 2) @ past + np.diag(prior)
        linear = np.einsum("sta,st->sa", past, now[:, :, mode]) + prior * centre
        root = np.linalg.cholesky(precision)
        mean = np.linalg.solve(precision, linear[..., None])[..., 0]
        square = (now[:, :, mode] ** 2).sum(1) + (prior * centre**2).sum(-1) - (linear * mean).sum(-1)
        rate = 0.5 * (_PRIOR_VARIANCE * (1 - decay[:, mode] ** 2) + np.maximum(square, 0.0))
        sd[:, mode] = np.sqrt(rate / rng.gamma(0.5 * (_PRIOR_VARIANCE + now.shape[1]), size=num_draws))
        noise = np.linalg.solve(root.swapaxes(1, 2), rng.standard_normal((num_draws, len(prior), 1)))[..., 0]
        drawn = mean + sd[:, [mode]] * noise
        own[:, mode], others[:, mode, rest] = drawn[:, :num_own], drawn[:, num_own:]
    return own, others, sd


def follow_coupled(rng: np.random.Generator, past: Array, process: Coupled, steps: int) -> Array:
    """Series (draw, time, mode) beyond a past of at least as many times as the longest lag."""
    found = past[:, -max(process.lags) :]
    for _ in range(steps):
        now = process.ahead(found) + process.sd * rng.standard_normal(process.sd.shape)
        found = np.concatenate([found, now[:, None]], axis=1)
    return found[:, -steps:]
