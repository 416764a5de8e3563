"""Whether single times or a cycle are beyond what the processes of the series give.

Both are judged by what is new in the series given their past, which is white noise of unit variance where the model
holds (`probmodels.bayesian_svd.forecasts.states.innovations`), at the parameters of each posterior draw. A statistic of
known distribution then has it where the model holds (Johnson 2004), so that the median of its p-values over draws is
below q in at most 2 q of all data.

References
----------
Fisher, R. A. (1929). Tests of significance in harmonic analysis. Proc. R. Soc. A 125.
https://doi.org/10.1098/rspa.1929.0151
Johnson, V. E. (2004). A Bayesian chi-squared test for goodness-of-fit. Ann. Statist. 32.
https://doi.org/10.1214/009053604000000616
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import fdtrc, ndtr

__all__ = ["Cycle", "Jump", "calendar_cycle", "largest_jump", "regular_cycle"]

Array = NDArray[np.float64]


class Jump(NamedTuple):
    """The largest innovation: its mean ``size`` in standard deviations, place in ``time``, ``process``; ``p_value``."""

    size: float
    time: int
    process: int
    p_value: float


class Cycle(NamedTuple):
    """The clearest cycle: ``period`` in steps of time, ``share`` of the variance of innovations, ``process``, and
    ``p_value`` among all that were tried."""

    period: float
    share: float
    process: int
    p_value: float


def largest_jump(new: Array) -> Jump:
    """The largest of all innovations (draw, time, process)."""
    largest = np.abs(new).max((1, 2))
    p = -np.expm1(new[0].size * np.log1p(-np.minimum(2 * ndtr(-largest), 0.5)))
    time, process = np.unravel_index(int(np.abs(new.mean(0)).argmax()), new.shape[1:])
    return Jump(float(new[:, time, process].mean()), int(time), int(process), float(np.median(p)))


def calendar_cycle(new: Array, years: Array) -> Cycle | None:
    """The annual or semiannual cycle of innovations (draw, time, process) at times in years (time,).

    F-test of a sine and a cosine; None where steps are too long to show either.
    """
    step = float(np.median(np.diff(years)))
    found = []
    for number in (1.0, 2.0):
        if number * step > 0.45 or (years[-1] - years[0]) * number < 3:
            continue
        angle = 2 * math.pi * number * years
        waves = np.linalg.qr(np.stack([np.ones_like(angle), np.cos(angle), np.sin(angle)], 1))[0]
        centred = new - new.mean(1, keepdims=True)
        share = np.sum(np.einsum("tw,stk->swk", waves[:, 1:], centred) ** 2, 1) / np.sum(centred**2, 1)
        found.append((1 / (number * step), share))
    if not found:
        return None
    rest = new.shape[1] - 3
    tried = len(found) * new.shape[2]
    tests = [(period, share, fdtrc(2, rest, share / (1 - share) * rest / 2)) for period, share in found]
    return _clearest(tests, tried)


def regular_cycle(new: Array) -> Cycle | None:
    """The clearest cycle of any period of innovations (draw, time, process) at equal steps: Fisher's test."""
    size = new.shape[1]
    frequencies = np.arange(1, (size - 1) // 2 + 1)
    if len(frequencies) < 5:
        return None
    power = np.abs(np.fft.rfft(new, axis=1)[:, frequencies]) ** 2
    power /= power.sum(1, keepdims=True)
    place = power.mean(0).argmax(0)  # of each process
    share = power.max(1)
    # The first term of Fisher's sum: an upper bound, exact where it is small.
    p = np.minimum(1.0, len(frequencies) * (1 - share) ** (len(frequencies) - 1))
    process = int(np.median(p, axis=0).argmin())
    period = size / float(frequencies[place[process]])
    return _clearest([(period, share, p)], new.shape[2])


def _clearest(tests: list[tuple[float, Array, Array]], tried: int) -> Cycle:
    """The test of the least median p-value, from (period, shares, p-values), both (draw, process)."""
    medians = [np.median(p, axis=0) for _, _, p in tests]
    place = int(np.argmin([m.min() for m in medians]))
    process = int(medians[place].argmin())
    period, share, _ = tests[place]
    return Cycle(period, float(np.median(share[:, process])), process, min(1.0, tried * float(medians[place][process])))
