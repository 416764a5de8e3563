"""Processes in time: precisions, transitions, densities, draws; what the compiled sweep makes of banded precisions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from probmodels.bayesian_svd.noise import unfiltered_by
from probmodels.bayesian_svd.series_sweep import draw_all_series
from probmodels.distributions.covariance import correlation
from probmodels.distributions.processes import (
    PROCESSES,
    banded_precision,
    correlation_at,
    kriging,
    stationary,
    transition,
)
from probmodels.distributions.series import ProcessSeries

STEPS = np.array([1.0, 1.0, 7.0, 0.5, 1.0])
EVEN, UNEVEN = np.ones(39), np.random.default_rng(0).uniform(0.3, 2.0, 39)
BROKEN = np.where(np.arange(39) % 13 == 12, 1e6, 1.0)  # three members
SCALES = {"ar1": [0.0, 0.3, 0.95], "matern32": [0.25, 3.0, 100.0], "matern52": [0.25, 3.0, 30.0]}
CASES = [(process, scale) for process, scales in SCALES.items() for scale in scales]


def covariance(process: str, scale: float, steps: np.ndarray) -> np.ndarray:
    times = np.concatenate([[0.0], np.cumsum(steps)])
    return correlation_at(process, scale, times[:, None] - times)


def dense(bands: np.ndarray) -> np.ndarray:
    size = bands.shape[1]
    full = np.zeros((size, size))
    for beside in range(min(len(bands), size)):
        place = np.arange(size - beside)
        full[place + beside, place] = full[place, place + beside] = bands[beside, : size - beside]
    return full


@pytest.mark.parametrize("process", ["matern32", "matern52"])
def test_correlations_are_those_of_the_kernels(process: str) -> None:
    lags = np.linspace(0, 30, 50)
    want = correlation(torch.as_tensor(lags)[None], process, 3.0).numpy()[0]
    np.testing.assert_allclose(correlation_at(process, 3.0, lags), want, atol=1e-12)


@pytest.mark.parametrize("steps", [STEPS, EVEN, UNEVEN, BROKEN], ids=["few", "even", "uneven", "members"])
@pytest.mark.parametrize(("process", "scale"), CASES)
def test_series_have_the_covariance_of_the_process(process: str, scale: float, steps: np.ndarray) -> None:
    bands, log_det = banded_precision(process, np.array([scale]), steps)
    precision, want = dense(bands[0]), covariance(process, scale, steps)
    np.testing.assert_allclose(np.linalg.inv(precision), want, atol=1e-5)
    assert log_det[0] == pytest.approx(np.linalg.slogdet(precision)[1], abs=1e-6)
    if bands.shape[1] == bands.shape[2]:  # nothing is left out: exact
        np.testing.assert_allclose(np.linalg.inv(precision), want, atol=1e-12)


@pytest.mark.parametrize(("process", "scale"), [("matern32", 100.0), ("matern52", 100.0)])
def test_the_longest_length_scales_keep_their_digits(process: str, scale: float) -> None:
    """Weights of values a hundredth of the length-scale apart against those of a hundred digits."""
    mpmath = pytest.importorskip("mpmath")
    mpmath.mp.dps = 60
    memory, root = kriging(process, np.array([scale]), np.ones(30))[0].shape[2], {"matern32": 3, "matern52": 5}[process]

    def exact(lag: int) -> object:
        x = mpmath.sqrt(root) * lag / mpmath.mpf(scale)
        return (1 + x + (x * x / 3 if root == 5 else 0)) * mpmath.exp(-x)

    gram = mpmath.matrix(memory, memory)
    for i in range(memory):
        for j in range(memory):
            gram[i, j] = exact(abs(i - j))
    side = mpmath.matrix([exact(i + 1) for i in range(memory)])
    want = mpmath.lu_solve(gram, side)
    left = 1 - (side.T * want)[0]
    weights, variance = kriging(process, np.array([scale]), np.ones(30))
    np.testing.assert_allclose(weights[0, -1], np.array([float(x) for x in want]), atol=1e-7)
    assert variance[0, -1] == pytest.approx(float(left), rel=1e-7)


@pytest.mark.parametrize("process", PROCESSES)
def test_states_go_on_as_their_process_does(process: str) -> None:
    scale = 0.6 if process == "ar1" else 2.0
    for step in (0.01, 0.7, 1.5, 40.0):
        kept, fresh = transition(process, scale, step)
        whole = stationary(process)
        np.testing.assert_allclose(kept @ whole @ kept.T + fresh, whole, atol=1e-12)
        assert (kept @ whole)[0, 0] == pytest.approx(float(correlation_at(process, scale, step)), abs=1e-12)
        half, new = transition(process, scale, step / 2)
        np.testing.assert_allclose(half @ half, kept, atol=1e-12)
        np.testing.assert_allclose(half @ new @ half.T + new, fresh, atol=1e-13, rtol=1e-9)


@pytest.mark.parametrize("process", PROCESSES)
def test_the_density_sums_over_the_grid(process: str) -> None:
    weights = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]).double()
    series = ProcessSeries(
        process, torch.tensor(SCALES[process], dtype=torch.float64), torch.tensor(STEPS), weights.log()
    )
    value = torch.as_tensor(np.random.default_rng(0).standard_normal((4, 6, 2)))
    one = [
        [
            stats.multivariate_normal(cov=covariance(process, x, STEPS)).pdf(value[s, :, k].numpy())
            for x in SCALES[process]
        ]
        for s in range(4)
        for k in range(2)
    ]
    parts = np.array(one).reshape(4, 2, 3) * weights.numpy()
    np.testing.assert_allclose(series.log_prob(value), np.log(parts.sum(-1)).sum(-1))
    np.testing.assert_allclose(series.component_logits(value).exp(), parts / parts.sum(-1, keepdims=True))


@pytest.mark.parametrize("process", PROCESSES)
def test_draws_have_the_covariance_of_the_process(process: str) -> None:
    scale = 0.8 if process == "ar1" else 3.0
    series = ProcessSeries(process, torch.tensor([scale]).double(), torch.tensor(STEPS), torch.zeros(1, 1).double())
    torch.manual_seed(0)
    draws = series.sample((40_000,))[..., 0].numpy()
    assert np.abs(np.cov(draws.T) - covariance(process, scale, STEPS)).max() < 5 * math.sqrt(2 / 40_000)


@pytest.mark.parametrize(
    ("process", "scale", "steps", "message"),
    [
        ("ar1", [1.0], [1.0], "below 1"),
        ("matern32", [0.0], [1.0], "positive"),
        ("matern72", [1.0], [1.0], "matern52"),
        ("ar1", [0.5], [0.0], "increase"),
        ("ar1", [0.5, 0.6], [1.0], "give"),
    ],
)
def test_wrong_arguments_are_said(process: str, scale: list[float], steps: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProcessSeries(process, torch.tensor(scale), torch.tensor(steps), torch.zeros(1, 1))


@pytest.mark.parametrize(("process", "scale"), [("ar1", 0.8), ("matern32", 4.0), ("matern52", 4.0)])
@pytest.mark.parametrize("steps", [EVEN, BROKEN], ids=["even", "members"])
def test_series_given_data_are_those_of_the_dense_normal(process: str, scale: float, steps: np.ndarray) -> None:
    """Persistent noise, two effects integrated out, one candidate: mean and covariance of draws."""
    rng, size, d, variance = np.random.default_rng(1), len(steps) + 1, 1.5, 0.7
    phi = 0.4 ** np.minimum(steps, 50.0)
    innovation = 1 - phi**2
    square = np.append(1.0, 1 / innovation)
    square[:-1] += phi**2 / innovation
    filter_ = (phi, np.sqrt(innovation), square, -phi / innovation)
    whitener = np.linalg.inv(unfiltered_by(np.eye(size), phi).T)  # L
    design = np.linalg.qr(whitener @ np.stack([np.ones(size), np.arange(size)], 1))[0]
    projector = np.eye(size) - design @ design.T
    z = projector @ rng.standard_normal(size)
    rows = np.ascontiguousarray(design.T)
    effects = rows, np.ascontiguousarray(rows @ whitener), np.ascontiguousarray(np.linalg.solve(whitener, design).T)
    bands, log_dets = banded_precision(process, np.array([scale]), steps)
    precision = dense(bands[0]) + d**2 / variance * whitener.T @ projector @ whitener
    spread = np.linalg.inv(precision)
    mean = spread @ (d / variance * whitener.T @ z)
    u, state = np.ones((1, 1)), (np.zeros((1, size)), np.zeros(1, dtype=np.int64))
    draws, count = [], 6000
    for _ in range(count):
        draw_all_series(
            rng,
            z[:, None].copy(),
            filter_,
            effects,
            u,
            np.array([d]),
            variance,
            (bands, log_dets, np.zeros((1, 1))),
            state,
        )
        draws.append(state[0][0].copy())
    sd = np.sqrt(np.diag(spread))
    assert np.abs((np.mean(draws, 0) - mean) / sd).max() < 5 / math.sqrt(count)
    error = np.cov(np.array(draws).T) - spread
    assert np.abs(error / np.outer(sd, sd)).max() < 6 / math.sqrt(count)
