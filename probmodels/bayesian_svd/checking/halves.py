"""Whether the two halves of a record are of one population, from the series of its modes.

Series of the population are independent stationary processes of unit variance. If the variance of a mode changes, the
mean square of its series differs between the halves by more than the process allows; if patterns change within the
span of the modes, two series correlate in one half otherwise than in the other. Both are entries of the second moments
of the halves, which are compared with those of series drawn from the processes of each posterior draw.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from probmodels.distributions.processes import stationary, transition

__all__ = ["Halves", "compare_halves"]

Array = NDArray[np.float64]


class Halves(NamedTuple):
    """How unlike the halves of a record are: ``p_value`` of the largest difference of their second moments, and the
    places of the two modes that it is of, equal where it is of a variance; ``ratio`` of the second half's moment of
    the first of them to the first half's, the mean over draws."""

    p_value: float
    first: int
    second: int
    ratio: float


def compare_halves(series: Array, process: str, scale: Array, steps: Array, seed: int = 0) -> Halves:
    """Compare the second moments of the series in both halves with what their processes give.

    Parameters
    ----------
    series
        Draws of the processes (draw, time, mode), of unit variance.
    process
        One of `probmodels.distributions.processes.PROCESSES`.
    scale
        Of each process, as in `probmodels.distributions.processes.rate`, (draw, mode).
    steps
        Times between neighbours (time - 1,).
    seed
        Of the replicated series.

    Returns
    -------
    Halves
        Posterior predictive p-value of the largest of all differences, each over its spread in replicated series.
    """
    found = _differences(series)
    replicated = _differences(_replicated(np.random.default_rng(seed), process, scale, steps))
    spread = replicated.std(axis=0)
    rows, columns = np.triu_indices(series.shape[2])
    seen = np.abs(found / spread)[:, rows, columns]
    largest = np.abs(replicated / spread)[:, rows, columns].max(1)
    place = int(seen.mean(0).argmax())
    first, second = int(rows[place]), int(columns[place])
    half = series.shape[1] // 2
    squares = np.square(series[..., first])
    ratio = float(np.mean(squares[:, half:].mean(1) / squares[:, :half].mean(1)))
    return Halves(float(np.mean(largest[None, :] >= seen.max(1)[:, None])), first, second, ratio)


def _differences(series: Array) -> Array:
    """Second moments of the first half less those of the second (draw, mode, mode)."""
    half = series.shape[1] // 2
    first, second = (np.einsum("sti,stj->sij", part, part) / part.shape[1] for part in np.split(series, [half], 1))
    return np.asarray(first - second)


def _replicated(rng: np.random.Generator, process: str, scale: Array, steps: Array) -> Array:
    """Series (draw, time, mode) from the processes of each draw."""
    lags, place = np.unique(np.concatenate([[np.inf], steps]), return_inverse=True)
    moves = []
    for lag in np.minimum(lags, 1e6):
        kept, fresh = transition(process, scale, float(lag))
        values, vectors = np.linalg.eigh(fresh)
        moves.append((kept, vectors * np.sqrt(values.clip(0))[..., None, :]))
    size = len(stationary(process))
    state = np.zeros((*scale.shape, size))
    out = np.empty((len(scale), len(steps) + 1, scale.shape[1]))
    for time, move in enumerate(place.ravel()):
        kept, root = moves[move]
        state = np.einsum("skij,skj->ski", kept, state)
        state += np.einsum("skij,skj->ski", root, rng.standard_normal(state.shape))
        out[:, time] = state[..., 0]
    return out
