"""New months where noise is correlated: one filter along time for series and noise, and the noise of the last month.

Given a draw, the weighted field less its effects is ``x_t = L f_t + e_t``: f independent processes of unit variance,
AR(1) or Matérn, and e an AR(1) process of cells with covariance ``sigma^2 N``. Nothing else is added, so that the noise
of a cell that is seen is known once f is. The state of the filter is thus that of the processes, f with its derivatives
where these are Matérn, and the noise of those cells that are missing now and seen later; in months without gaps it is
the first alone. Given f, covariances of the noise are the same in all draws, up to sigma^2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from probmodels.bayesian_svd.forecasts.states import block_diagonal, normal_root
from probmodels.bayesian_svd.noise import Noise
from probmodels.datasets.checks import check_fits
from probmodels.distributions.processes import stationary, transition

__all__ = ["LastNoise", "draw_series", "last_noise"]

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

_FORGOTTEN = 1e-14  # share of the variance of the noise that it still has of its past, where the past is left aside


@dataclass(frozen=True)
class LastNoise:
    """Noise of a month given the series: ``mean`` (draw, cell), ``covariance`` (cell, cell) over sigma^2, and ``seen``
    (cell,), where the noise is known."""

    mean: Array
    covariance: Array
    seen: Mask

    def drawn(self, rng: np.random.Generator, sigma: Array) -> Array:
        """Draws of it (draw, cell)."""
        if self.seen.all():
            return self.mean
        gone = np.flatnonzero(~self.seen)
        out = self.mean.copy()
        root = _root(self.covariance[np.ix_(gone, gone)])
        out[:, gone] += sigma[:, None] * (rng.standard_normal((len(out), len(gone))) @ root.T)
        return out


def last_noise(noise: Noise, seen: Mask, places: Array, rest: Callable[[int], Array]) -> LastNoise:
    """Noise of the last of some months, given what effects and modes leave of all of them.

    Parameters
    ----------
    noise
        Its covariance.
    seen
        True where observed (cell, time).
    places
        Times in units of the decay (time,).
    rest
        Weighted data less effects and modes at a time (draw, cell), anything where missing.
    """
    covariance, last = noise.root @ noise.root.T, seen.shape[1] - 1
    complete = np.flatnonzero(seen.all(axis=0))
    first = complete[-1] if len(complete) else 0
    if noise.decay <= 0:
        first = last
    elif noise.decay < 1:
        reach = math.log(_FORGOTTEN) / (2 * math.log(noise.decay))
        first = max(first, int(np.searchsorted(places, places[last] - reach)))
    mean, spread = np.zeros((1, len(seen))), covariance
    for time in range(first, last + 1):
        if time > first:
            kept = noise.decay ** (places[time] - places[time - 1])
            mean, spread = kept * mean, kept**2 * spread + (1 - kept**2) * covariance
        own = np.flatnonzero(seen[:, time])
        found = rest(time)
        if len(own) == len(seen):
            mean, spread = found, np.zeros_like(spread)
        elif len(own):
            gain = np.linalg.solve(spread[np.ix_(own, own)], spread[own]).T
            mean = mean + (found[:, own] - mean[:, own]) @ gain.T
            spread = spread - gain @ spread[own]
            mean[:, own], spread[own], spread[:, own] = found[:, own], 0.0, 0.0
        else:
            mean = np.broadcast_to(mean, found.shape)
    return LastNoise(mean, spread, seen[:, last])


@dataclass(frozen=True)
class _Step:
    """From one month to the next that holds a value: what is the same in all draws.

    ``own`` and ``gone`` are the cells that are seen, and those missing now and seen later; of each, whether it ``was``
    seen in the month before, and else its ``place`` in the noise of the state then. ``inverse`` is of the covariance of
    the innovations of cells seen, ``regression`` of those of cells gone on them, ``left`` the covariance that remains.
    """

    kept: float
    own: NDArray[np.int_]
    gone: NDArray[np.int_]
    own_was: Mask
    own_place: NDArray[np.int_]
    gone_was: Mask
    gone_place: NDArray[np.int_]
    inverse: Array
    regression: Array
    left: Array


def _steps(noise: Noise, seen: Mask, before: Mask, ahead: Array, fresh: bool) -> tuple[NDArray[np.int_], list[_Step]]:
    """Cells of the noise in the first state, and the steps; ``before`` says which were seen where it starts."""
    covariance = noise.root @ noise.root.T
    later = np.cumsum(seen[:, ::-1], axis=1)[:, ::-1] > 0  # at this month or after
    patterns = len(np.unique(seen, axis=1).T)
    check_fits(
        f"{patterns} months with different gaps in {len(seen)} cells",
        8 * patterns * len(seen) ** 2,
        "project fewer months at a time",
    )
    first = state = np.flatnonzero(~before & later[:, 0])
    was, known, steps = before, dict[object, _Step](), list[_Step]()
    for time in range(seen.shape[1]):
        own = np.flatnonzero(seen[:, time])
        after = later[:, time + 1] if time + 1 < seen.shape[1] else np.zeros(len(seen), dtype=bool)
        gone = np.flatnonzero(~seen[:, time] & after)
        key = (seen[:, time].tobytes(), was.tobytes(), gone.tobytes(), state.tobytes(), float(ahead[time]))
        if key not in known:
            inverse = np.asarray(np.linalg.inv(covariance[np.ix_(own, own)]), dtype=np.float64)
            regression = covariance[np.ix_(gone, own)] @ inverse
            known[key] = _Step(
                kept=0.0 if fresh and time == 0 else float(noise.decay ** ahead[time]),
                own=own,
                gone=gone,
                own_was=was[own],
                own_place=np.searchsorted(state, own[~was[own]]),
                gone_was=was[gone],
                gone_place=np.searchsorted(state, gone[~was[gone]]),
                inverse=inverse,
                regression=regression,
                left=covariance[np.ix_(gone, gone)] - regression @ covariance[np.ix_(own, gone)],
            )
        steps.append(known[key])
        was, state = seen[:, time], gone
    return first, steps


def draw_series(
    rng: np.random.Generator,
    noise: Noise,
    sigma: Array,
    process: tuple[str, Array],
    patterns: Array,
    rest: Callable[[int], Array],
    seen: Mask,
    ahead: Array,
    start: tuple[Array, Array, LastNoise] | None,
) -> Array:
    """Draws (draw, time, process) of the series of new months.

    Parameters
    ----------
    rng
        Source of randomness.
    noise
        Covariance of the noise of the weighted data.
    sigma
        Its scale (draw,).
    process
        Name of the processes, and their decays over one step or length-scales in steps (draw, process).
    patterns
        What one unit of each adds to the weighted data (draw, cell, process).
    rest
        Weighted data less effects of a draw (cell, time), anything where missing.
    seen
        True where observed (cell, time).
    ahead
        Steps from the month before (time,).
    start
        Mean (draw, process, m) and covariance (draw, process, m, m) of the states of the processes and noise, all
        before the first month; None where both start anew.
    """
    name, scale = process
    told, times = np.flatnonzero(seen.any(axis=0)), np.cumsum(ahead)
    (num_draws, count), order = scale.shape, len(stationary(name))
    size = count * order
    before = np.ones(len(seen), dtype=bool) if start is None else start[2].seen
    gaps = np.diff(times[told], prepend=0.0)
    first, steps = _steps(noise, seen[:, told], before, gaps, start is None) if len(told) else (told, [])
    onward = [transition(name, scale, step) for step in np.unique(gaps)]
    place = np.searchsorted(np.unique(gaps), gaps)
    states = np.empty((num_draws, len(ahead) + 1, size))  # the first is that before the first month
    for draw in range(num_draws):
        covariance, last = np.zeros((size + len(first),) * 2), np.zeros(len(seen))
        mean = np.zeros(len(covariance))
        if start is None:
            covariance[:size, :size] = np.kron(np.eye(count), stationary(name))
        else:
            covariance[:size, :size] = block_diagonal(start[1][draw])
            covariance[size:, size:] = sigma[draw] ** 2 * start[2].covariance[np.ix_(first, first)]
            mean[:size], mean[size:] = start[0][draw].ravel(), start[2].mean[draw, first]
            last = start[2].mean[draw] + patterns[draw] @ start[0][draw, :, 0]
        ways = [(block_diagonal(kept[draw]), block_diagonal(fresh[draw])) for kept, fresh in onward]
        filter_ = _Filter(patterns[draw], sigma[draw] ** 2, order)
        observed = rest(draw)[:, told] if len(told) else np.empty((len(seen), 0))
        filter_.forward(steps, observed, [ways[i] for i in place], mean, covariance, last)
        states[draw, np.append(0, 1 + told)] = filter_.backward(rng, mean, covariance)
    states = states.reshape(num_draws, len(ahead) + 1, count, order)
    _bridge(rng, states, name, scale, times, told)
    return np.ascontiguousarray(states[:, 1:, :, 0])


class _Filter:
    """The filter of one draw: forwards along months, then a draw backwards."""

    def __init__(self, patterns: Array, variance: float, order: int) -> None:
        self.patterns, self.variance = patterns, variance
        self.values = np.arange(patterns.shape[1]) * order  # places of the series among the states
        self.size = patterns.shape[1] * order
        self._passed: list[tuple[Array, Array, Array, Array, Array]] = []
        self._known: dict[int, tuple[Array, Array, Array]] = {}

    def forward(
        self,
        steps: list[_Step],
        rest: Array,
        ways: list[tuple[Array, Array]],
        mean: Array,
        spread: Array,
        last: Array,
    ) -> None:
        """From the mean and covariance of the state before the first month, and the weighted data ``last`` then.

        ``ways`` say of each step what is kept of the states of the processes, and the covariance of what is new.
        """
        for time, (step, (kept, fresh)) in enumerate(zip(steps, ways, strict=True)):
            image, told, onward = self._products(step, len(mean))
            now, noise = rest[:, time], self.variance * (1 - step.kept**2)
            innovation = now[step.own] - step.kept * np.where(step.own_was, last[step.own], 0.0)
            centre = np.concatenate([mean, kept @ mean[: self.size]])
            across = spread[:, : self.size] @ kept.T
            ahead = kept @ across[: self.size] + fresh
            wide = np.block([[spread, across], [across.T, ahead]])
            wide = np.linalg.solve(np.eye(len(wide)) + wide @ told / noise, wide)
            wide = 0.5 * (wide + wide.T)
            centre = centre + wide @ ((image.T @ innovation - told @ centre) / noise)
            mean, spread = onward @ centre, onward @ wide @ onward.T
            mean[self.size :] += step.kept * np.where(step.gone_was, last[step.gone], 0.0)
            mean[self.size :] += step.regression @ innovation
            spread[self.size :, self.size :] += noise * step.left
            self._passed.append((centre, wide, onward, mean, spread))
            last = now

    def _products(self, step: _Step, size: int) -> tuple[Array, Array, Array]:
        """What innovations say of the state before and that of the processes now, and how the state now depends on
        both."""
        if id(step) in self._known:
            return self._known[id(step)]
        own = self.size
        weights = np.zeros((len(step.own), size + own))
        weights[:, self.values] = -step.kept * self.patterns[step.own] * step.own_was[:, None]
        weights[np.flatnonzero(~step.own_was), own + step.own_place] = step.kept
        weights[:, size + self.values] = self.patterns[step.own]
        image = step.inverse @ weights
        onward = np.zeros((own + len(step.gone), size + own))
        onward[:own, size:] = np.eye(own)
        onward[own:, self.values] = -step.kept * self.patterns[step.gone] * step.gone_was[:, None]
        onward[own + np.flatnonzero(~step.gone_was), own + step.gone_place] = step.kept
        onward[own:] -= step.regression @ weights
        self._known[id(step)] = image, weights.T @ image, onward
        return self._known[id(step)]

    def backward(self, rng: np.random.Generator, mean: Array, spread: Array) -> Array:
        """A draw of the states of the processes (1 + time, ...), before the first month and at each, given the mean and
        covariance of the state before the first."""
        out = np.empty((len(self._passed) + 1, self.size))
        if self._passed:
            *_, mean, spread = self._passed[-1]
        state = mean + _root(spread) @ rng.standard_normal(len(mean))
        for time in range(len(self._passed) - 1, -1, -1):
            centre, wide, onward, mean, spread = self._passed[time]
            out[time + 1] = state[: self.size]
            size = len(centre) - self.size
            gain = scipy.linalg.solve(spread, onward @ wide[:, :size], assume_a="pos").T
            inner = wide[:size, :size] - gain @ onward @ wide[:, :size]
            state = centre[:size] + gain @ (state - mean)
            state = state + _root(inner) @ rng.standard_normal(size)
        out[0] = state[: self.size]
        return out


def _root(covariance: Array) -> Array:
    """A matrix whose square is the covariance, which rounding may have left not quite positive."""
    values, vectors = np.linalg.eigh(0.5 * (covariance + covariance.T))
    return np.asarray(vectors * np.sqrt(np.maximum(values, 0.0)))


def _bridge(
    rng: np.random.Generator, states: Array, name: str, scale: Array, times: Array, told: NDArray[np.int_]
) -> None:
    """Draw the states (draw, 1 + time, process, m) of months that hold no value, between those that do."""
    for time in np.setdiff1d(np.arange(len(times)), told):
        kept, spread = transition(name, scale, times[time] - (times[time - 1] if time > 0 else 0.0))
        mean = np.einsum("skij,skj->ski", kept, states[:, time])
        if len(after := told[told > time]):
            kept, fresh = transition(name, scale, times[after[0]] - times[time])
            image = kept @ spread
            gain = np.linalg.solve(image @ kept.swapaxes(-1, -2) + fresh, image).swapaxes(-1, -2)
            missed = states[:, 1 + after[0]] - np.einsum("skij,skj->ski", kept, mean)
            mean, spread = mean + np.einsum("skij,skj->ski", gain, missed), spread - gain @ image
        root = normal_root(spread)
        states[:, 1 + time] = mean + np.einsum("skij,skj->ski", root, rng.standard_normal(mean.shape))
