"""Convergence statistics of many entries at once, in numpy.

Rank-normalised split r_hat, bulk and tail effective sample size and Monte Carlo error, all for arrays
(chain, draw, entry), a block of entries at a time. They agree with ArviZ, which takes one entry at a time.

References
----------
Vehtari, A., Gelman, A., Simpson, D., Carpenter, B. and Bürkner, P.-C. (2021). Rank-normalization, folding, and
localization: an improved r_hat. Bayesian Analysis 16(2). https://doi.org/10.1214/20-BA1221
Margossian, C. C., Hoffman, M. D., Sountsov, P., Riou-Durand, L., Vehtari, A. and Gelman, A. (2024). Nested R-hat:
assessing the convergence of Markov chain Monte Carlo when running many short chains. Bayesian Analysis.
https://arxiv.org/abs/2110.13017
Vehtari, A., Simpson, D., Gelman, A., Yao, Y. and Gabry, J. (2024). Pareto smoothed importance sampling. JMLR 25.
Zhang, J. and Stephens, M. A. (2009). A new and efficient estimation method for the generalized Pareto distribution.
Technometrics 51(3).
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

import numpy as np
import xarray as xr
from annotated_types import Len
from numpy.typing import ArrayLike, NDArray
from scipy import fft
from scipy.special import ndtri

from probmodels.datasets.checks import as_array
from probmodels.errors import DiagnosticsError
from probmodels.options import Fraction, OneOf, Positive, checked

__all__ = ["EQUAL_WEIGHTS", "bfmi", "convergence", "hdi", "psis", "psis_khat"]

Array = NDArray[np.float64]

_BLOCK_VALUES = 2**20  # values of a block of entries: small enough for memory and threads, large enough for numpy
_FIRST_LAGS = 12
MANY_CHAINS = 16  # from which on nested r_hat is computed
_APART = 5.0  # robust standard deviations between a chain's mean and the others'
EQUAL_WEIGHTS = 0.01  # range of log weights below which the tail of a guide's weights is rounding, not shape
STATISTICS = ("r_hat", "ess_bulk", "ess_tail", "mcse_mean")


@checked(DiagnosticsError)
def convergence(
    draws: ArrayLike, statistics: Annotated[Sequence[Annotated[str, OneOf(STATISTICS)]], Len(1)] = STATISTICS
) -> dict[str, Array]:
    """Statistics of every entry.

    Parameters
    ----------
    draws
        Array (chain, draw, ...); at least four draws.
    statistics
        Those that are computed.

    Returns
    -------
    dict
        ``r_hat``, ``ess_bulk``, ``ess_tail`` and ``mcse_mean``, each of the shape of an entry; nan where an entry is
        not finite, and r_hat nan where it is constant. From 16 chains on, ``nested_r_hat`` as well.

    Notes
    -----
    r_hat of many short chains exceeds 1.01 even where all is well, since each mean of a short chain has few draws
    behind it. Nested r_hat compares the means of groups of chains instead. A single chain that stands apart would be
    lost in its group; there, nested r_hat is r_hat.
    """
    array = _array(draws, "draws", "chain", "draw")
    shape = array.shape[2:]
    flat = array.reshape(*array.shape[:2], -1)
    names = [*statistics, *["nested_r_hat"] * (flat.shape[0] >= MANY_CHAINS)]
    out = {name: np.full(flat.shape[-1], np.nan) for name in names}
    if flat.shape[1] >= 4:
        step = max(1, _BLOCK_VALUES // (flat.shape[0] * flat.shape[1]))

        def fill(start: int) -> None:
            block = np.ascontiguousarray(np.moveaxis(flat[..., start : start + step], -1, 0), dtype=np.float64)
            finite = np.isfinite(block).all((1, 2))
            if finite.any():
                for name, value in _block(block[finite], names).items():
                    out[name][start : start + step][finite] = value

        with ThreadPoolExecutor(os.cpu_count()) as pool:  # numpy sorts and transforms without holding the lock
            list(pool.map(fill, range(0, flat.shape[-1], step)))
    return {name: value.reshape(shape) for name, value in out.items()}


@checked(DiagnosticsError)
def hdi(draws: ArrayLike, prob: Fraction) -> tuple[Array, Array]:
    """Bounds of the shortest interval that holds ``prob`` of the draws (chain, draw, ...) of every entry."""
    array = _array(draws, "draws", "chain", "draw").astype(np.float64)
    ordered = np.sort(array.reshape(-1, *array.shape[2:]), axis=0)
    inside = int(np.floor(prob * len(ordered)))
    best = np.argmin(ordered[inside:] - ordered[: len(ordered) - inside], axis=0)[None]
    return np.take_along_axis(ordered, best, 0)[0], np.take_along_axis(ordered, best + inside, 0)[0]


def bfmi(energy: ArrayLike) -> Array:
    """Fraction of missing information of every chain, from energies (chain, draw)."""
    array = _array(energy, "energy", "chain", "draw").astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):  # energies of a chain that stands still
        return np.square(np.diff(array, axis=1)).mean(1) / array.var(1, ddof=1)


@checked(DiagnosticsError)
def psis(log_weight: ArrayLike, *, r_eff: Positive = 1.0) -> tuple[Array, float]:
    """Pareto-smoothed importance weights and the shape of their tail.

    Parameters
    ----------
    log_weight
        Log weights (draw,); minus infinity is a weight of zero.
    r_eff
        Effective draws per draw, below 1 for correlated draws: sets how many weights make the tail.

    Returns
    -------
    tuple
        Log weights (draw,) whose exponentials sum to one, and k-hat: infinite where fewer than five weights are not
        negligible beside the largest; nan where there is no tail to judge, as for equal weights, weights of few values,
        fewer than 25 draws, or weights that are nan or infinite. Weights without a finite k-hat are not smoothed.
    """
    weight = _array(log_weight, "log_weight", "draw").astype(np.float64).ravel()
    count = len(weight)
    if not count or np.isnan(weight).any() or not np.isfinite(top := weight.max()):
        return weight, float("nan")
    weight -= top
    khat = float("nan")
    tail = int(np.ceil(min(0.2 * count, 3 * np.sqrt(count / r_eff))))
    if count > tail + 1 and tail >= 5:
        order = np.argsort(weight, kind="stable")
        least = np.log(np.finfo(float).tiny)  # below which a weight is negligible beside the largest
        cutoff = max(weight[order[-tail - 1]], least)
        order = order[np.searchsorted(weight[order], cutoff, side="right") :]
        excess = np.exp(weight[order]) - np.exp(cutoff)
        if len(excess) < 5 and cutoff == least:
            khat = float("inf")
        elif len(excess) >= 5 and excess[-1] - excess[0] > np.finfo(float).eps * 100:
            khat, scale = _pareto(excess)
            level = (np.arange(len(excess)) + 0.5) / len(excess)
            quantiles = scale * np.expm1(-khat * np.log1p(-level)) / khat if khat else -scale * np.log1p(-level)
            weight[order] = np.minimum(np.log(quantiles + np.exp(cutoff)), 0.0)
    return weight - np.log(np.exp(weight).sum()), khat


def psis_khat(log_weight: ArrayLike) -> float:
    """Shape of the generalised Pareto distribution in the tail of importance weights (draw,); nan without a tail."""
    return psis(log_weight)[1]


def _array(values: ArrayLike, name: str, *dims: str) -> NDArray[Any]:
    """An array of numbers with at least these dims, and a draw in it where it has draws of chains."""
    if isinstance(values, xr.DataArray) and set(dims) <= set(values.dims):
        values = values.transpose(*dims, ...)
    found = as_array(values, name, numbers=True, error=DiagnosticsError)
    if found.ndim < len(dims) or (len(dims) > 1 and 0 in found.shape[: len(dims)]):
        raise DiagnosticsError(f"{name} has shape {found.shape}; give numbers ({', '.join(dims)}, ...), at least one")
    return found


def _pareto(excess: Array) -> tuple[float, float]:
    """Shape, with the weak prior of PSIS, and scale of a generalised Pareto distribution from ascending excesses."""
    count = len(excess)
    grid = 30 + int(np.sqrt(count))
    quarter = excess[int(count / 4 + 0.5) - 1]
    theta = 1 / excess[-1] + (1 - np.sqrt(grid / (np.arange(1, grid + 1) - 0.5))) / (3 * quarter)
    shape = np.log1p(-theta[:, None] * excess).mean(1)
    profile = count * (np.log(-theta / shape) - shape - 1)
    with np.errstate(over="ignore"):  # weights of nothing
        weight = 1 / np.exp(profile - profile[:, None]).sum(1)
    weight = np.where(weight >= 10 * np.finfo(float).eps, weight, 0)
    mean = float(np.sum(theta * weight) / weight.sum())
    raw = float(np.log1p(-mean * excess).mean())
    return (raw * count + 10 * 0.5) / (count + 10), -raw / mean


def _block(values: Array, names: Collection[str]) -> dict[str, Array]:
    """The named statistics of a block (entry, chain, draw)."""
    pooled = values.reshape(len(values), -1)
    order = np.argsort(pooled, axis=1)
    ordered = np.take_along_axis(pooled, order, 1)
    split = _split(values)
    if values.shape[2] % 2 == 0:
        ranked = _normal_scores(pooled, order, ordered).reshape(split.shape)
        centre = np.median(pooled, axis=1)
    else:  # splitting drops the middle draw, so that the pool is another
        ranked = _normal_scores(split.reshape(len(split), -1)).reshape(split.shape)
        centre = np.median(split.reshape(len(split), -1), axis=1)
    folded = np.abs(split - centre[:, None, None]).reshape(len(split), -1)
    spreads = _normal_scores(folded).reshape(split.shape)
    out = {"r_hat": np.fmax(_split_rhat(ranked), _split_rhat(spreads))}
    if "ess_bulk" in names:
        out["ess_bulk"] = _ess(ranked)
    if "ess_tail" in names:
        out["ess_tail"] = _tail_ess(values, ordered)
    if "mcse_mean" in names:
        out["mcse_mean"] = pooled.std(axis=1, ddof=1) / np.sqrt(_ess(split))
    if "nested_r_hat" in names:
        nested = np.fmax(_nested_rhat(ranked), _nested_rhat(spreads))
        out["nested_r_hat"] = np.where(_one_apart(ranked) | _one_apart(spreads), out["r_hat"], nested)
    return {name: out[name] for name in names}


def _tail_ess(values: Array, ordered: Array) -> Array:
    """The smaller effective sample size of the 5 % and the 95 % quantile, from draws and from all of them in order."""
    found = np.full(len(values), np.inf)
    for prob in (0.05, 0.95):
        position = prob * (ordered.shape[1] - 1)
        low = int(position)
        high = min(low + 1, ordered.shape[1] - 1)
        bound = ordered[:, low] + (position - low) * (ordered[:, high] - ordered[:, low])
        found = np.minimum(found, _ess(_split((values <= bound[:, None, None]).astype(np.float64))))
    return found


def _split(values: Array) -> Array:
    """Halves of the chains as chains of their own: (entry, chain, draw) to (entry, 2 chain, draw // 2)."""
    half = values.shape[2] // 2
    return np.stack([values[..., :half], values[..., -half:]], axis=2).reshape(len(values), -1, half)


def _normal_scores(pooled: Array, order: NDArray[np.intp] | None = None, ordered: Array | None = None) -> Array:
    """Normal scores of the ranks of every row (entry, value); equal values share their mean rank."""
    if order is None:
        order = np.argsort(pooled, axis=1)
    if ordered is None:
        ordered = np.take_along_axis(pooled, order, 1)
    size = pooled.shape[1]
    table = ndtri((np.arange(1, size + 0.75, 0.5) - 0.375) / (size + 0.25))  # scores of the ranks 1, 1.5, 2, ... size
    position = np.arange(size)
    in_order = np.broadcast_to(table[::2], pooled.shape)
    starts = ordered[:, 1:] != ordered[:, :-1]
    tied = ~starts.all(1)
    if tied.any():
        edge = np.ones((int(tied.sum()), 1), dtype=bool)
        first = np.maximum.accumulate(np.where(np.hstack([edge, starts[tied]]), position, 0), axis=1)
        last = np.where(np.hstack([starts[tied], edge]), position, size)
        last = np.minimum.accumulate(last[:, ::-1], axis=1)[:, ::-1]
        in_order = in_order.copy()
        in_order[tied] = table[first + last]
    scores = np.empty_like(pooled)
    np.put_along_axis(scores, order, in_order, 1)
    return scores


def _split_rhat(values: Array) -> Array:
    """r_hat of chains (entry, chain, draw)."""
    num_draws = values.shape[2]
    between = num_draws * values.mean(2).var(1, ddof=1)
    within = values.var(2, ddof=1).mean(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.sqrt((between / within + num_draws - 1) / num_draws)


def _nested_rhat(values: Array) -> Array:
    """r_hat of groups of neighbouring chains, from split chains (entry, 2 chain, draw).

    First and second halves make groups of their own, so that a drift of all chains together shows. A group has at
    most sixteen chains: then chains that never move give 1.03 or more.
    """
    halves = values.reshape(len(values), -1, 2, values.shape[2])
    means, spreads = halves.mean(3), halves.var(3, ddof=1)  # (entry, chain, half)
    num_chains = means.shape[1]
    groups = np.array_split(np.arange(num_chains), num_chains // min(16, int(np.sqrt(num_chains))))
    within = np.stack([means[:, g].var(1, ddof=1) + spreads[:, g].mean(1) for g in groups], 1).mean((1, 2))
    between = np.stack([means[:, g].mean(1) for g in groups], 1).reshape(len(values), -1).var(1, ddof=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.sqrt(1 + between / within)


def _one_apart(values: Array) -> NDArray[np.bool_]:
    """Whether the mean of some chain lies far from those of the others, from split chains (entry, 2 chain, draw)."""
    means = values.reshape(len(values), values.shape[1] // 2, -1).mean(2)
    distance = np.abs(means - np.median(means, axis=1, keepdims=True))
    return np.asarray(distance.max(1) > _APART * 1.4826 * np.median(distance, axis=1))


def _ess(values: Array) -> Array:
    """Effective sample size of chains (entry, chain, draw) by Geyer's initial monotone sequence."""
    num_chains, num_draws = values.shape[1:]
    total = num_chains * num_draws
    if num_draws < 4:
        return np.full(len(values), np.nan)
    constant = np.ptp(values, axis=(1, 2)) < np.finfo(float).resolution
    means = values.mean(2)
    between = means.var(1, ddof=1) if num_chains > 1 else np.zeros(len(values))
    centred = values - means[..., None]
    # Most chains are settled by their first lags, which are cheaper to sum than to transform.
    tau, settled = _autocorrelation_time(_first_covariances(centred, min(_FIRST_LAGS, num_draws)), between, num_draws)
    if not settled.all():
        tau[~settled], _ = _autocorrelation_time(_covariances(centred[~settled]), between[~settled], num_draws)
    return np.where(constant, total, total / np.maximum(tau, 1 / np.log10(total)))


def _first_covariances(centred: Array, num_lags: int) -> Array:
    """Autocovariances (entry, lag) at the first lags, averaged over the chains of centred values."""
    num_chains, num_draws = centred.shape[1:]
    sums = [np.einsum("ecd,ecd->e", centred[..., : num_draws - lag], centred[..., lag:]) for lag in range(num_lags)]
    return np.stack(sums, axis=1) / (num_chains * num_draws)


def _covariances(centred: Array) -> Array:
    """Autocovariances (entry, lag) at all lags, averaged over the chains of centred values."""
    num_draws = centred.shape[2]
    length = fft.next_fast_len(2 * num_draws, real=True)
    spectrum = fft.rfft(centred, n=length, axis=2)
    power = np.square(spectrum.real).mean(1) + np.square(spectrum.imag).mean(1)
    return fft.irfft(power, n=length, axis=1)[:, :num_draws] / num_draws


def _autocorrelation_time(covariance: Array, between: Array, num_draws: int) -> tuple[Array, NDArray[np.bool_]]:
    """Autocorrelation time of every entry, and whether the given lags suffice to know it.

    Autocorrelations come in pairs of lags, summed up to the first pair that is not positive, or to the last pair.
    """
    within = covariance[:, 0] * num_draws / (num_draws - 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        rho = 1 - (within[:, None] - covariance) / (covariance[:, 0] + between)[:, None]
    rho[:, 0] = 1
    all_pairs = -(-(num_draws - 4) // 2) + 1
    num_pairs = min(all_pairs, covariance.shape[1] // 2)
    even, odd = rho[:, 0 : 2 * num_pairs : 2], rho[:, 1 : 2 * num_pairs : 2]
    pairs = even + odd
    ends = pairs <= 0
    ends[:, -1] |= num_pairs == all_pairs
    stop = ends.argmax(1)
    kept = np.where(np.arange(num_pairs) < stop[:, None], np.minimum.accumulate(pairs, axis=1), 0).sum(1)
    last_even = np.take_along_axis(even, stop[:, None], 1)[:, 0]
    last_pair = np.take_along_axis(pairs, stop[:, None], 1)[:, 0]
    tau = -1 + 2 * kept + np.where((last_even > 0) | (last_pair >= 0), last_even, 0)
    return tau, np.asarray(ends.any(1))
