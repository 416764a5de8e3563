"""How many modes: the posterior of their number, what is said of it, and modes that vanish."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
import xarray as xr

from probmodels import diagnose, run_mcmc
from probmodels.bayesian_svd import make_problem, write_outputs
from probmodels.bayesian_svd.draws import read_draws
from probmodels.bayesian_svd.patterns.number import (
    check_number,
    draw_number,
    number_of_modes,
    number_sentence,
    signal_to_noise,
)
from probmodels.bayesian_svd.patterns.shrinkage import draw_scales
from probmodels.errors import DataError, SummaryError

SETTINGS: dict[str, Any] = {
    "num_chains": 2,
    "warmup_steps": 300,
    "num_samples": 500,
    "seed": 1,
    "progress": False,
    "chain_method": "sequential",
}


def made(variances: list[float], rank: int, seed: int = 0, times: int = 120, **options: Any) -> Any:
    """A problem of white noise of unit variance and modes of these variances, 4 x 5 cells."""
    rng = np.random.default_rng(seed)
    patterns = np.linalg.qr(rng.standard_normal((20, max(len(variances), 1))))[0][:, : len(variances)]
    series = rng.standard_normal((len(variances), times))
    values = (patterns * np.sqrt(variances)) @ series + rng.standard_normal((20, times))
    coords = {"time": np.arange(times), "lat": np.arange(0.0, 8.0, 2.0), "lon": np.arange(160.0, 170.0, 2.0)}
    data = xr.DataArray(values.T.reshape(times, 4, 5), coords, ("time", "lat", "lon"))
    settings = {"series": "ar1", "frame_prior": "uniform", "area_weights": False, "shrinkage": "log_uniform"}
    return make_problem(data, rank=rank, **{**settings, **options})


@pytest.fixture(scope="module")
def two() -> Any:
    """Two modes that noise does not hide, one of a quarter of the noise, rank 5."""
    return run_mcmc(made([8.0, 3.0, 0.25], 5), **SETTINGS)


def test_modes_that_are_not_there_vanish(two: Any) -> None:
    found = number_of_modes(two.tree)
    assert float(found["number_of_modes_probability"][2]) > 0.9
    assert int(found["number_of_modes"]) == 2
    ratio = signal_to_noise(read_draws(two.tree))
    without = run_mcmc(made([8.0, 3.0, 0.25], 5, shrinkage="none"), **SETTINGS)  # the control: all come out with some
    assert np.median(ratio, axis=0)[4] < 0.2 * np.median(signal_to_noise(read_draws(without.tree)), axis=0)[4]
    with pytest.raises(SummaryError, match="shrinkage='log_uniform'"):
        number_of_modes(without.tree)


def test_noise_alone_has_no_mode() -> None:
    found = number_of_modes(run_mcmc(made([], 4, seed=3), **SETTINGS).tree)
    assert float(found["number_of_modes_probability"][0]) > 0.9
    assert number_sentence(found).startswith("0 modes vary more than the noise")


def test_a_rank_without_room_is_said() -> None:
    result = run_mcmc(made([8.0, 5.0, 3.0], 2), **SETTINGS)
    found = number_of_modes(result.tree)
    assert float(found["number_of_modes_probability"][2]) == 1.0
    assert "limited by the rank, 2, and may be larger" in number_sentence(found)
    finding = next(check_number(result.tree))
    assert finding.harmful
    assert "raise it (--rank 4)" in finding.advice
    assert "as many modes above the noise as the rank allows" in str(diagnose(result))


def test_room_enough_is_no_fault(two: Any) -> None:
    assert not next(check_number(two.tree)).harmful


def test_all_outputs_have_the_number(two: Any, tmp_path: Path) -> None:
    written = write_outputs(two, tmp_path)
    sentence = number_sentence(number_of_modes(two.tree))
    assert sentence.startswith("2 modes vary more than the noise (probability")
    assert sentence in written.table
    assert sentence in (tmp_path / "report.html").read_text()
    assert (tmp_path / "figures" / "number_of_modes.png").exists()
    with xr.open_dataset(tmp_path / "modes.nc") as modes:
        assert float(modes["number_of_modes_probability"].sum()) == pytest.approx(1.0)
        assert int(modes["number_of_modes"]) == 2
    lines = (tmp_path / "tables" / "number_of_modes.csv").read_text().splitlines()
    assert lines[0] == "count,number_of_modes_probability"
    assert len(lines) == 7


def test_the_ratio_is_that_of_signal_and_noise_between_cells() -> None:
    """Generalised eigenvalues of dense covariances, with noise that cells share."""
    rng = np.random.default_rng(5)
    near = np.exp(-np.abs(np.subtract.outer(np.arange(20), np.arange(20))) / 2)
    values = np.outer(np.sin(np.linspace(0, 3, 20)), 3 * rng.standard_normal(80))
    values += np.linalg.cholesky(near) @ rng.standard_normal((20, 80))
    data = xr.DataArray(values, dims=("cell", "time"), coords={"cell": np.arange(20.0), "time": np.arange(80.0)})
    options: dict[str, Any] = {"series": "ar1", "noise": "correlated", "shrinkage": "log_uniform"}
    with pytest.raises(DataError, match="shrinkage with noise='correlated' needs noise_rank"):
        make_problem(data, rank=3, frame_prior="uniform", area_weights=False, **options)
    with pytest.raises(DataError, match="noise_rank=4; give at most the rank, 3"):
        make_problem(data, rank=3, noise_rank=4, frame_prior="uniform", area_weights=False, **options)
    problem = make_problem(data, rank=3, noise_rank=1, frame_prior="uniform", area_weights=False, **options)
    assert problem.data is not None
    assert problem.data.attrs["noise_rank"] == 1
    result = run_mcmc(problem, **SETTINGS | {"num_samples": 20, "warmup_steps": 20})
    draws = read_draws(result.tree)
    ratio = signal_to_noise(draws)
    assert draws.noise is not None
    covariance = np.linalg.inv(draws.noise.precision)
    patterns = draws.patterns()
    for draw in (0, 17):
        signal = patterns[draw] @ patterns[draw].T
        dense = scipy.linalg.eigh(signal, draws.sigma[draw] ** 2 * covariance, eigvals_only=True)[::-1][:3]
        np.testing.assert_allclose(ratio[draw], dense, rtol=1e-6)
    # The sampler's coordinates are those of white noise.
    raw = result.posterior["d"].values.reshape(-1, 3) ** 2 / result.posterior["sigma"].values.reshape(-1, 1) ** 2
    np.testing.assert_allclose(ratio, np.sort(raw, axis=1)[:, ::-1], rtol=1e-4)


def test_scales_are_drawn_from_their_conditional() -> None:
    data = made([4.0], 2).args[0]
    d, scales = np.array([0.3, 5.0]), data.sizes.numpy()
    rng = np.random.default_rng(0)
    draws = np.array([draw_scales(rng, d, data) for _ in range(4000)])
    weights = np.exp(-0.5 * (d[:, None] / scales) ** 2) / scales
    weights /= weights.sum(1, keepdims=True)
    for mode in range(2):
        shares = (draws[:, mode, None] == scales).mean(0)
        assert np.abs(shares - weights[mode]).max() < 4 * 0.5 / np.sqrt(4000)


def test_the_prior_is_even_over_orders_of_magnitude() -> None:
    problem = made([4.0], 1, scale=100.0, noise_prior=(2.0, 2.0))
    torch.manual_seed(0)
    scales = problem.args[0].sizes
    assert float(scales[0]) == pytest.approx(0.1)  # of the noise that the prior expects
    assert float(scales[-1]) == pytest.approx(100.0)
    from probmodels.bayesian_svd.model import _size_prior

    draws = _size_prior(problem.args[0], 1).sample((20_000,)).numpy()
    counts = np.histogram(np.log10(draws), bins=[-1, 0, 1, 2])[0]
    assert counts[0] == pytest.approx(counts[1], rel=0.06)
    assert draws.min() < 0.01  # no size is too small


def test_a_set_of_numbers_has_its_probability(two: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = np.repeat([1, 2, 3, 5], [300, 400, 270, 30])
    ratio = (np.arange(5) < counts[:, None]) + 0.5
    monkeypatch.setattr("probmodels.bayesian_svd.patterns.number.signal_to_noise", lambda _: ratio)
    found = number_of_modes(two.tree)
    np.testing.assert_allclose(found["number_of_modes_probability"], [0, 0.3, 0.4, 0.27, 0, 0.03])
    assert [int(found[f"number_of_modes{x}"]) for x in ("", "_lower", "_upper")] == [2, 1, 3]
    assert number_sentence(found) == "2 modes vary more than the noise (probability 0.40; 95 %: 1 to 3)"
    wide = number_of_modes(two.tree, level=0.99)
    assert int(wide["number_of_modes_upper"]) == 5
    bars = draw_number(found).axes[0].patches
    assert sorted(bar.get_height() for bar in bars) == pytest.approx([0, 0, 0.03, 0.27, 0.3, 0.4])


def test_a_number_that_the_noise_was_not_estimated_about_is_said(two: Any) -> None:
    for about, harmful in ((2, False), (4, True)):
        tree = two.tree.copy()
        tree["constant_data"].attrs["noise_rank"] = about
        finding = list(check_number(tree))[1]
        assert finding.harmful == harmful
        assert f"about {about} modes" in finding.verdict
    assert "--set model.noise_rank=2" in finding.advice


def test_series_that_are_no_process_have_no_number() -> None:
    with pytest.raises(DataError, match="shrinkage needs series that are a process"):
        made([4.0], 2, series="frame")
    with pytest.raises(DataError, match="shrinkage='horseshoe'; choose one of"):
        made([4.0], 2, shrinkage="horseshoe")
    with pytest.raises(DataError, match="noise_rank"):
        made([4.0], 2, noise_rank=1)
