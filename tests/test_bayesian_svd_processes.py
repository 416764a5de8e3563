"""Which process series follow: log densities against dense normals, the right process found, and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from scipy.special import logsumexp
from scipy.stats import multivariate_normal

from probmodels.bayesian_svd.gaps.processes import (
    _SIZES,
    _WIDE,
    _Along,
    _Grid,
    _log_densities,
    compare_processes,
    write_processes,
)
from probmodels.distributions.processes import correlation_at
from probmodels.errors import DataError


def field(process: str, scale: float, seed: int = 0, times: int = 240) -> xr.DataArray:
    """A field of 24 cells: two modes of a process, and white noise; months."""
    rng = np.random.default_rng(seed)
    lag = np.abs(np.subtract.outer(np.arange(times), np.arange(times)))
    root = np.linalg.cholesky(correlation_at(process, scale, lag) + 1e-9 * np.eye(times))
    patterns = np.linalg.qr(rng.standard_normal((24, 2)))[0] * [6.0, 4.0]
    values = patterns @ (root @ rng.standard_normal((times, 2))).T + rng.standard_normal((24, times)) + 10
    dates = (np.datetime64("1990-01", "M") + np.arange(times)).astype("datetime64[ns]")
    return xr.DataArray(values, {"time": dates, "cell": np.arange(24)}, ("cell", "time"))


def compared(data: xr.DataArray, *series: Any, **options: Any) -> xr.Dataset:
    return compare_processes(data, series, rank=2, noise="white", progress=False, **options)


@pytest.mark.parametrize("process", ["ar1", "matern52"])
def test_log_densities_are_those_of_dense_normals(process: str) -> None:
    rng, scales = np.random.default_rng(0), np.array([0.3, 0.8]) if process == "ar1" else np.array([1.5, 4.0])
    times = np.array([0.0, 1, 2, 4, 5, 6, 7, 9, 10, 11, 12, 13])
    along = _Along(rng.standard_normal((12, 2)), np.ones((12, 1)), times, 0.4, 0.3)
    left, hidden = np.array([0, 1, 4, 5, 6, 9, 11]), [np.array([2, 3]), np.array([7, 8]), np.array([10])]
    found = _log_densities(along, _Grid(process, scales, np.log([0.25, 0.75])), left, hidden)
    lag, centred = np.abs(np.subtract.outer(times, times)), along.values - along.values[left].mean(0)
    spread = centred[left].var(0)
    noise = 0.4 * 0.3**lag + _WIDE * spread.max()
    want = np.zeros(3)
    for mode in range(2):
        logs, terms = [], []
        for scale, weight in zip(scales, (0.25, 0.75), strict=True):
            for size in _SIZES * max(spread[mode] - 0.4, 0.04):
                whole, y = size * correlation_at(process, scale, lag) + noise, centred[:, mode]
                own = multivariate_normal(cov=whole[np.ix_(left, left)]).logpdf(y[left])
                both = [np.append(left, block) for block in hidden]
                logs.append(own + np.log(weight))
                terms.append([multivariate_normal(cov=whole[np.ix_(b, b)]).logpdf(y[b]) - own for b in both])
        want += logsumexp(np.array(terms) + (np.array(logs) - logsumexp(logs))[:, None], axis=0)
    np.testing.assert_allclose(found, want, atol=1e-8)


def test_persistent_series_are_not_taken_for_independent_ones(tmp_path: Path) -> None:
    found = compared(field("ar1", 0.9), "iid", "ar1")
    assert found.attrs["best"] == "ar1"
    assert float(found["shortfall"].sel(series="iid")) > 4 * float(found["shortfall_se"].sel(series="iid"))
    assert found["alike"].values.tolist() == [False, True]
    assert "series=ar1 fills 40 hidden blocks of 6 times best. Worse: iid by" in found.attrs["sentence"]
    assert "ar1" in write_processes(found, tmp_path / "new")
    table = pd.read_csv(tmp_path / "new" / "processes.csv")
    np.testing.assert_allclose(table["log_density"], found["log_density"], rtol=1e-5)
    assert xr.load_dataset(tmp_path / "new" / "processes.nc").attrs["best"] == "ar1"


def test_independent_series_are_not_taken_for_persistent_ones() -> None:
    for seed in range(3):
        found = compared(field("ar1", 0.0, seed), "iid", "ar1", "matern32")
        assert bool(found["alike"].sel(series="iid"))


def test_smooth_series_are_told_from_rough_ones() -> None:
    smooth = compared(field("matern52", 8.0), "ar1", "matern52", block=2)
    assert smooth.attrs["best"] == "matern52"
    assert not bool(smooth["alike"].sel(series="ar1"))
    rough = compared(field("ar1", 0.9, 1), "ar1", "matern52", block=2)
    assert rough.attrs["best"] == "ar1"
    assert not bool(rough["alike"].sel(series="matern52"))


def test_gaps_and_persistent_noise_are_taken_in() -> None:
    data = field("ar1", 0.9, 2)
    gaps = np.random.default_rng(0).random(data.shape) < 0.05
    gaps[:20, 60:63] = True  # times that hardly hold a value
    found = compare_processes(data.where(~gaps), ("iid", "ar1"), rank=2, progress=False)
    assert found.attrs["best"] == "ar1"
    assert not bool(found["alike"].sel(series="iid"))
    assert found.attrs["blocks"] == 39


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "twice": ({"series": ("iid", "iid")}, "different processes"),
    "unknown": ({"series": ("iid", "arma")}, "each item one of iid, ar1"),
    "one": ({"series": ("iid",)}, "2"),
    "long": ({"block": 40}, "at least 10 are needed"),
    "none": ({"block": 0}, "at least 1"),
    "folds": ({"folds": 1}, "at least 2"),
    "noise": ({"noise": "red"}, "white"),
}


@pytest.mark.parametrize("case", list(WRONG))
def test_what_cannot_be_compared_is_refused(case: str) -> None:
    options, words = WRONG[case]
    with pytest.raises(DataError, match=words):
        compare_processes(field("ar1", 0.5), **{"rank": 2, "progress": False, **options})


def test_noise_alone_tells_no_process() -> None:
    rng = np.random.default_rng(0)
    data = field("ar1", 0.5).copy(data=rng.standard_normal((24, 240)))
    with pytest.raises(DataError, match="no mode exceeds the noise"):
        compared(data, "iid", "ar1")
