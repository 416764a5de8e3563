"""What modes leave of a record, and how it goes on: residuals that persist and are alike in neighbouring cells.

A model of white noise takes what no mode holds for independent in time and from cell to cell. Real residuals are not,
and where modes are few much of the mean of a box is of them. Given a draw of effects, modes and series the residuals of
the record are known numbers. Here they go on as

    r_t+1 = phi r_t + e_t,    e_t ~ N(0, C),

with phi the correlation of neighbouring times of all cells together, and C the covariance of ``r_t+1 - phi r_t`` over
the record. Draws of C need no matrix of cells by cells: they are sums of the innovations of the record with independent
normal weights.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from probmodels.bayesian_svd.forecasts.new_fields import positions
from probmodels.bayesian_svd.forecasts.projection import NewMonths, Record
from probmodels.errors import SummaryError

__all__ = ["check_residuals", "residuals_ahead"]

Array = NDArray[np.float64]

_LEAST = 30  # pairs of neighbouring times
_MOST_PERSISTENT = 0.99


def check_residuals(record: Record) -> None:
    """Check that the residuals of a record are to be estimated, and can be."""
    if record.draws.noise is not None:
        raise SummaryError(
            "residuals='persistent' is for noise that the model takes for white; that of noise='correlated' persists "
            "already: leave residuals out"
        )
    own, _ = positions(record.time, record.time)
    if (pairs := int((np.diff(own) == 1).sum())) < _LEAST:
        raise SummaryError(
            f"residuals='persistent' needs {_LEAST} pairs of neighbouring times; the record has {pairs}: take "
            "residuals='noise'"
        )


def residuals_ahead(rng: np.random.Generator, record: Record, new: NewMonths | None, steps: int) -> NDArray[np.float32]:
    """Residuals beyond the last month (draw, cell, time), in data units.

    Parameters
    ----------
    rng, record
        Source of randomness, and the result.
    new
        Months after the record, every step of the record from its end on; None for none.
    steps
        Steps of the forecast.
    """
    data = record.constant["data"].transpose("cell", "time").values
    place, _ = positions(record.time, record.time)
    if new is not None:
        data = np.concatenate([data, new.field.values], axis=1)
        place = np.concatenate([place, np.arange(1.0, new.field.sizes["time"] + 1)])
    seen = np.isfinite(data)
    size = record.time.size
    pairs = np.flatnonzero(np.diff(place[:size]) == 1)
    both = seen[:, pairs] & seen[:, pairs + 1]
    last = np.where(seen.any(1), data.shape[1] - 1 - np.argmax(seen[:, ::-1], axis=1), -1)
    gone = np.where(last >= 0, place[-1] - place[last], np.inf)
    scale = 1 / np.sqrt(np.maximum(both.sum(1), 1))
    found = np.empty((len(record.chosen), len(data), steps), dtype=np.float32)
    for row in range(len(found)):
        rest = data - _explained(record, new, row)
        rest[~seen] = 0.0
        before, after = rest[:, pairs], rest[:, pairs + 1]
        ratio = (before * after * both).sum() / max(float((before**2 * both).sum()), 1e-300)
        decay = float(np.clip(ratio, 0.0, _MOST_PERSISTENT))
        fresh = (after - decay * before) * both * scale[:, None]
        sd = np.sqrt((fresh**2).sum(1) / (1 - decay**2))
        kept = decay**gone
        state = kept * rest[np.arange(len(rest)), last] + np.sqrt(1 - kept**2) * sd * rng.standard_normal(len(rest))
        innovations = fresh @ rng.standard_normal((len(pairs), steps))
        for step in range(steps):
            state = decay * state + innovations[:, step]
            found[row, :, step] = state
    return found


def _explained(record: Record, new: NewMonths | None, row: int) -> Array:
    """What effects and modes of one draw say of the record, and of new months after it (cell, time)."""
    draws, draw = record.draws, record.chosen[[row]]
    patterns = draws.patterns(draws=draw)[0]
    parts = [draws.fixed(draws=draw)[0] + patterns @ draws.series(draws=draw)[0].T]
    if new is not None:
        parts.append(new.draws.fixed(draws=draw)[0] + patterns @ new.processes[row].T)
    return np.concatenate(parts, axis=1)
