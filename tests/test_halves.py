"""Whether the halves of a record are of one population."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from probmodels import run_mcmc
from probmodels.bayesian_svd import make_problem
from probmodels.bayesian_svd.checking.halves import compare_halves
from probmodels.bayesian_svd.checks import check_model
from probmodels.distributions.processes import banded_precision

DRAWS, MODES = 100, 3


def series(rng: np.random.Generator, times: int, process: str, scale: float) -> np.ndarray:
    """Series (time, mode) of a process, by the root of its dense precision."""
    bands, _ = banded_precision(process, np.array([scale]), np.ones(times - 1))
    precision = sum(np.diag(bands[0, j, : times - j], -j) for j in range(min(bands.shape[1], times)))
    precision = np.tril(precision) + np.tril(precision, -1).T
    return np.linalg.solve(np.linalg.cholesky(precision).T, rng.standard_normal((times, MODES)))


def p_value(rng: np.random.Generator, found: np.ndarray, process: str, scale: float) -> float:
    """Of a posterior about the series found, whose scale is somewhat uncertain."""
    draws = found + 0.1 * rng.standard_normal((DRAWS, *found.shape))
    scales = scale * np.exp(0.1 * rng.standard_normal((DRAWS, MODES)))
    if process == "ar1":
        scales = scales.clip(0, 0.95)
    return compare_halves(draws, process, scales, np.ones(len(found) - 1)).p_value


@pytest.mark.parametrize(("process", "scale"), [("ar1", 0.0), ("ar1", 0.6), ("matern32", 2.0)])
def test_halves_of_one_process_differ_by_chance(process, scale):
    rng, sets = np.random.default_rng(3), 100
    found = [p_value(rng, series(rng, 80, process, scale), process, scale) for _ in range(sets)]
    # Uniform p-values: below .1 in 10 of 100, with a standard deviation of 3; never nearly always above .5.
    assert np.mean(np.array(found) < 0.1) <= 0.1 + 3 * 0.03
    assert 0.35 < np.median(found) < 0.75


def test_a_variance_that_changes_and_modes_that_turn_are_seen():
    rng = np.random.default_rng(4)
    louder = series(rng, 120, "ar1", 0.3)
    louder[60:, 1] *= 2.0
    louder[:, 1] /= np.sqrt(np.mean(louder[:, 1] ** 2))
    draws = louder + 0.1 * rng.standard_normal((DRAWS, *louder.shape))
    found = compare_halves(draws, "ar1", np.full((DRAWS, MODES), 0.3), np.ones(119))
    assert found.p_value < 0.005
    assert (found.first, found.second) == (1, 1)
    assert found.ratio > 2

    size, angle = np.array([3.0, 2.0]), np.deg2rad(50)  # patterns turn by 50 degrees from one half to the other
    turned = series(rng, 240, "ar1", 0.3)
    signal, turn = turned[:, :2] * size, np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    signal[120:] = signal[120:] @ turn
    values, vectors = np.linalg.eigh(signal.T @ signal / 240)
    turned[:, :2] = (signal @ vectors / np.sqrt(values))[:, ::-1]
    draws = turned + 0.1 * rng.standard_normal((DRAWS, *turned.shape))
    found = compare_halves(draws, "ar1", np.full((DRAWS, MODES), 0.3), np.ones(239))
    assert found.p_value < 0.005
    assert (found.first, found.second) == (0, 1)


@pytest.mark.parametrize("grows", [False, True])
def test_the_verdict_names_the_mode_that_changes(grows):
    rng = np.random.default_rng(5)
    place, times = np.arange(20), 80
    patterns = np.linalg.qr(np.stack([np.sin(place / 4), np.cos(place / 3)], 1))[0]
    series_ = rng.standard_normal((times, 2)) * np.array([3.0, 2.0])
    if grows:
        series_[times // 2 :, 0] *= 2.5
    values = patterns @ series_.T + 0.3 * rng.standard_normal((20, times))
    data = xr.DataArray(values, dims=("cell", "time"), coords={"cell": place / 19.0, "time": np.arange(times)})
    result = run_mcmc(
        make_problem(data, rank=2, series="ar1"),
        num_samples=300,
        warmup_steps=200,
        num_chains=1,
        progress=False,
    )
    (finding,) = [finding for finding in check_model(result) if "one half of the record" in finding.verdict]
    assert finding.harmful is grows
    assert ("variance of mode 1" in finding.verdict) or not grows
