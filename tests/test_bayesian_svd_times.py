"""Single times and cycles that would make modes wrong: the tests of them, and the verdict on data that have them."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from probmodels import run_mcmc
from probmodels.bayesian_svd import make_problem
from probmodels.bayesian_svd.checking.times import calendar_cycle, largest_jump, regular_cycle
from probmodels.bayesian_svd.checks import check_model
from probmodels.bayesian_svd.series_grid import series_data
from probmodels.bayesian_svd.sides import cell_widths

CELLS, TIMES = 12, 96


def innovations(seed: int, times: int = TIMES) -> np.ndarray:
    """Those of one posterior draw of two processes."""
    return np.random.default_rng(seed).standard_normal((1, times, 2))


def test_white_innovations_have_uniform_p_values() -> None:
    years = np.arange(TIMES) / 12
    p = np.array(
        [
            [largest_jump(new).p_value, calendar_cycle(new, years).p_value, regular_cycle(new).p_value]  # type: ignore[union-attr]
            for new in map(innovations, range(400))
        ]
    )
    for level in (0.05, 0.2):  # the last two are Bonferroni's: at most the level
        error = 4 * np.sqrt(level * (1 - level) / 400)
        share = (p < level).mean(0)
        assert abs(share[0] - level) < error
        assert (share[1:] < level + error).all()
        assert (share[1:] > 0.5 * level - error).all()


def test_a_cycle_is_named_with_its_period() -> None:
    new = innovations(0)
    new[..., 1] += np.cos(2 * np.pi * np.arange(TIMES) / 12)
    calendar, regular = calendar_cycle(new, np.arange(TIMES) / 12), regular_cycle(new)
    assert calendar is not None
    assert regular is not None
    for found in (calendar, regular):
        assert found.period == pytest.approx(12.0)
        assert found.process == 1
        assert found.p_value < 1e-4
    assert calendar_cycle(new, np.arange(TIMES) * 1.0) is None  # winters show no cycle of the year


def test_the_largest_innovation_is_named() -> None:
    new = innovations(1)
    new[:, 40, 1] = -7.0
    found = largest_jump(new)
    assert (found.time, found.process) == (40, 1)
    assert found.size == pytest.approx(-7.0)
    assert found.p_value == pytest.approx(2 * TIMES * 2.56e-12, rel=0.01)


def test_decays_are_uniform_up_to_the_ends_of_their_grid() -> None:
    found = series_data(xr.DataArray(np.arange(50.0), dims="time", name="time"), "ar1", 1)
    grid, weights = found.scale.numpy(), found.log_weights[0].exp().numpy()
    np.testing.assert_allclose(cell_widths(grid).sum(), grid[-1] - grid[0])
    below = np.cumsum(weights) - 0.5 * weights
    np.testing.assert_allclose(below[1:-1], grid[1:-1] / grid[-1], atol=0.5 * weights.max())
    assert weights[0] == pytest.approx(0.5 * grid[1] / grid[-1])


def simulated(kind: str, seed: int) -> xr.DataArray:
    """Two modes and white noise, with an outlying time, a cycle, or as the model has it."""
    rng = np.random.default_rng(seed)
    x = np.linspace(0, 1, CELLS)
    patterns = np.linalg.qr(np.stack([1 + 0.3 * x, np.cos(np.pi * x)], 1))[0] * [3.0, 1.5]
    series = rng.standard_normal((2, TIMES))
    for time in range(1, TIMES):
        series[:, time] = 0.5 * series[:, time - 1] + np.sqrt(0.75) * series[:, time]
    if kind == "cycle":
        series[0] += np.sqrt(2) * np.cos(2 * np.pi * np.arange(TIMES) / 12)
    values = patterns @ series + 0.5 * rng.standard_normal((CELLS, TIMES))
    if kind == "outlier":
        values[:, 30] += 8 * 0.5 * rng.standard_normal(CELLS)
    return xr.DataArray(values, dims=("cell", "time"), coords={"cell": x, "time": np.arange(TIMES, dtype=float)})


@pytest.mark.parametrize(
    ("kind", "words"), [("model", None), ("outlier", "at time 30.0"), ("cycle", "cycle of 12 steps")]
)
def test_the_verdict_names_single_times_and_cycles(kind: str, words: str | None) -> None:
    for seed in range(3):
        made = make_problem(simulated(kind, seed), rank=2, series="ar1")
        result = run_mcmc(
            made, num_chains=2, warmup_steps=200, num_samples=200, seed=seed, progress=False, chain_method="sequential"
        )
        found = [str(finding.verdict) for finding in check_model(result) if finding.harmful]
        named = [sentence for sentence in found if "at time" in sentence or "cycle" in sentence]
        assert all(words in sentence for sentence in named) if words else not named
        assert bool(named) == bool(words)
