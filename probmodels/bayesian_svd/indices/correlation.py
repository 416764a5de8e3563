"""Correlation of an uncertain series with another one, with the uncertainty of both the series and the sample.

A correlation of two series is uncertain even where both are known: they might have come out otherwise, and series that
persist tell less than as many independent times. The two are taken for a joint autoregressive process of one step
(`autoregression`), whose stationary correlation is what is sought; each draw of the uncertain series gives one draw of
its posterior. This holds for series of unlike decays and of any correlation, where the usual formula, Fisher's
transform with fewer effective times, is too sure: that one is for series that are independent.

Series with a trend or a cycle are no such process: take these out first. Draws of an index do not know the other
series: where noise makes the index uncertain, correlations are drawn towards zero.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import xarray as xr
from annotated_types import Interval

from probmodels.bayesian_svd.indices.autoregression import LEAST_NEIGHBOURS, neighbours, stationary_correlation
from probmodels.bayesian_svd.indices.series import match_series
from probmodels.errors import DataError, SummaryError
from probmodels.options import Seed, checked

__all__ = ["check_common_times", "correlate", "correlation_sentences", "effective_times"]

_LEAST = 10  # pairs of values
_MOST_PERSISTENT = 0.99
_FEW = 10.0  # effective times
_TREND = 0.25  # share of variance


@checked(SummaryError)
def correlate(
    index: xr.DataArray,
    series: xr.DataArray,
    *,
    max_lag: Annotated[int, Interval(ge=0, le=1200)] = 0,
    detrend: bool = False,
    seed: Seed = 0,
) -> xr.Dataset:
    """Posterior of the correlation of an index with a series, at lags from ``-max_lag`` to ``max_lag``.

    Parameters
    ----------
    index
        Draws, dims (chain, draw, time) and at most one more, dates along time: an index of
        `probmodels.bayesian_svd.indices.boxes`, or a principal component.
    series
        Over time, from `load_series`, of the same step; times without a partner are left out.
    max_lag
        Largest lag in steps. At a positive lag the index leads: its value at t is set beside that of the series at t +
        lag.
    detrend
        Whether to take a straight line out of both, over the times that have a pair.
    seed
        Seed of the sampling variability.

    Returns
    -------
    xr.Dataset
        Over (chain, draw, ..., lag): ``sample_correlation``, that of these times; ``correlation``, with what other
        samples would have given; ``effective_times``, as if the two were independent. Over lag: ``num_pairs``.

    Raises
    ------
    DataError
        If the dates differ in step or do not overlap in ten times or more, or the series does not vary.
    SummaryError
        If the index lacks draws or dates.
    """
    if not {"chain", "draw", "time"} <= set(index.dims) or index.ndim > 4:
        raise SummaryError(f"index has dims {tuple(map(str, index.dims))}; give (chain, draw, ..., time)")
    if series.dims != ("time",) or "time" not in series.coords:
        raise SummaryError(f"series has dims {tuple(map(str, series.dims))}; give one over time, with dates")
    index = index.transpose("chain", "draw", ..., "time")
    rng = np.random.default_rng(seed)
    common = check_common_times(series, index["time"], max_lag)
    lags = np.array(list(common))
    shape = (*index.shape[:-1], len(lags))
    drawn, sample, size = np.empty((3, *shape))
    pairs = np.empty(len(lags), dtype=np.int64)
    trends = np.empty(len(lags))
    for place, other in enumerate(common.values()):
        both = np.isfinite(other)
        pairs[place] = both.sum()
        times = np.flatnonzero(both)
        x, y = index.values[..., both].astype(float), other[both]
        straight = [_detrended(values, times) for values in (x, y)]
        trends[place] = min(
            1 - after.var(-1).mean() / max(before.var(-1).mean(), 1e-300)
            for before, after in zip((x, y), straight, strict=True)
        )
        if detrend:
            x, y = straight
        sample[..., place], size[..., place] = _correlation(x, y), effective_times(x, y, times)
        rows = stationary_correlation(x.reshape(-1, len(y)), y, neighbours(times), rng)
        drawn[..., place] = rows.reshape(shape[:-1])
    dims = (*index.dims[:-1], "lag")
    out = xr.Dataset(
        {"correlation": (dims, drawn), "sample_correlation": (dims, sample), "effective_times": (dims, size)},
        coords={name: x for name, x in index.coords.items() if "time" not in x.dims} | {"lag": lags},
    )
    out["num_pairs"] = "lag", pairs
    out["lag"].attrs["long_name"] = "steps by which the index leads"
    out["correlation"].attrs["long_name"] = "correlation, with the variability of samples"
    out["sample_correlation"].attrs["long_name"] = "correlation of these times"
    out["effective_times"].attrs["long_name"] = "effectively independent times"
    out.attrs = {"series": str(series.name), "detrended": int(detrend), "cycle": _cycle(series)}
    out.attrs["trend"] = float(trends.max())
    return out


def check_common_times(series: xr.DataArray, time: xr.DataArray, max_lag: int) -> dict[int, np.ndarray]:
    """Values of a series beside each time at each lag, NaN where it has none; check that they can be correlated.

    Raises
    ------
    DataError
        If the dates differ in step, or too few are common at a lag, or the series does not vary there.
    """
    name, found = f"the series {str(series.name)!r}", {}
    for lag in sorted(range(-max_lag, max_lag + 1), key=abs):  # what fails without a lag is said of no lag
        found[lag] = values = match_series(series, time, shift=lag)
        times = np.flatnonzero(np.isfinite(values))
        if len(times) < _LEAST:
            raise DataError(
                f"{name} and the field have {len(times)} times in common at lag {lag}; at least {_LEAST} are needed"
            )
        if (near := len(neighbours(times))) < LEAST_NEIGHBOURS:
            raise DataError(
                f"{name} and the field have {len(times)} times in common at lag {lag}, of which only {near} are as far "
                f"from the next as is usual: how long the two persist cannot be told; at least {LEAST_NEIGHBOURS} are "
                "needed"
            )
        if np.ptp(values[times]) < 1e-12 * max(1.0, np.abs(values[times]).max()):
            raise DataError(f"{name} does not vary over the {len(times)} times in common")
    return dict(sorted(found.items()))


def effective_times(x: np.ndarray, y: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Effectively independent times of the correlation of two series, were they independent of one another.

    With autocorrelations r and s over one step these are T over ``1 + 2 sum_k (1 - k / T) (r s)^k`` (Bartlett, 1935;
    Bretherton et al., 1999). Autocorrelations are corrected for their bias, ``(1 + 3 r) / T`` (Kendall, 1954).

    Parameters
    ----------
    x, y
        Values (..., T) and (T,).
    times
        Their times as whole numbers, ascending, (T,); neighbours are those one apart.

    Returns
    -------
    np.ndarray
        Shape (...), 2 to T.
    """
    size = len(times)
    p = np.clip(_persistence(x, times) * _persistence(y, times), -0.5, _MOST_PERSISTENT**2)
    factor = (1 + p) / (1 - p) - 2 / size * p * (1 - p**size) / (1 - p) ** 2  # 1 + 2 sum_k (1 - k / T) p^k
    return np.clip(size / factor, 2.0, size)


def _persistence(values: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Autocorrelation over one step, from neighbours that are there, corrected for bias."""
    centred = values - values.mean(-1, keepdims=True)
    near = np.diff(times) == 1
    if near.sum() < _LEAST:
        return np.zeros(values.shape[:-1])
    product = (centred[..., 1:] * centred[..., :-1])[..., near].mean(-1)
    found = product / np.maximum((centred**2).mean(-1), 1e-300)
    return np.clip(found + (1 + 3 * found) / len(times), -_MOST_PERSISTENT, _MOST_PERSISTENT)


def _detrended(values: np.ndarray, times: np.ndarray) -> np.ndarray:
    line = np.linalg.qr(np.stack([np.ones(len(times)), times - times.mean()], axis=1))[0]
    return np.asarray(values - (values @ line) @ line.T)


def _correlation(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = x - x.mean(-1, keepdims=True), y - y.mean()
    return np.asarray((x @ y) / np.maximum(np.sqrt((x**2).sum(-1) * (y**2).sum()), 1e-300))


def _cycle(series: xr.DataArray) -> float:
    """Share of a monthly series' variance that its mean cycle of the year has beyond what chance gives it."""
    month = series["time"].dt.month.values
    count = np.array([(month == m).sum() for m in range(1, 13)])
    if count.min() < 3:
        return 0.0
    means = np.array([series.values[month == m].mean() for m in range(1, 13)])
    share = float((count * (means - series.values.mean()) ** 2).sum() / (series.size * series.values.var()))
    return max(share - 11 / (series.size - 1), 0.0)


def correlation_sentences(correlation: xr.Dataset) -> list[str]:
    """What a reader of correlations has to know: few independent times, a cycle of the year or trends left in.

    Parameters
    ----------
    correlation
        From `correlate`.
    """
    found = []
    size = float(correlation["effective_times"].mean(("chain", "draw")).min())
    if size < _FEW:
        found.append(
            f"the two series persist so much that their {int(correlation['num_pairs'].min())} common times tell as "
            f"much as {size:.0f} independent ones; expect little of the correlation."
        )
    if (cycle := float(correlation.attrs["cycle"])) > 0.1:
        found.append(
            f"the series {correlation.attrs['series']!r} has a cycle of the year, {cycle:.0%} of its variance; indices "
            "are anomalies: take the mean of each month out of the series first."
        )
    if not int(correlation.attrs["detrended"]) and (trend := float(correlation.attrs["trend"])) > _TREND:
        found.append(
            f"a straight line holds {trend:.0%} or more of the variance of both series; their correlation is largely "
            "that of the two lines; take these out (detrend=True, --detrend)."
        )
    return found
