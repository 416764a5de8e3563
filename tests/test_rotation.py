"""Varimax and promax of the modes of every draw."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import xarray as xr
from synthetic_modes import synthetic_result, toy_field

from probmodels.bayesian_svd.draws import read_draws
from probmodels.bayesian_svd.noise import Noise
from probmodels.bayesian_svd.patterns.rotation import rotate, rotate_draws
from probmodels.bayesian_svd.summary import summarise_modes, summary_table, write_modes
from probmodels.errors import SummaryError


def criterion(loadings, weight):
    share = weight / weight.sum()
    return (share @ loadings**4 - (share @ loadings**2) ** 2).sum()


def turned(angle):
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def test_varimax_of_a_pair_is_the_best_of_all_angles():
    rng = np.random.default_rng(0)
    loadings, weight = rng.standard_normal((20, 30, 2)) ** 3, rng.uniform(0.2, 2, 30)
    turn, _ = rotate(loadings, weight, np.broadcast_to(np.eye(2), (20, 2, 2)))
    angles = np.linspace(0, np.pi / 2, 2001)
    for one, found in zip(loadings, turn, strict=True):
        best = max(criterion(one @ turned(angle), weight) for angle in angles)
        assert criterion(one @ found, weight) == pytest.approx(best, rel=1e-5)
        assert np.allclose(found.T @ found, np.eye(2))


def test_area_weights_count_as_repeated_cells():
    rng = np.random.default_rng(1)
    loadings, weight = rng.standard_normal((1, 20, 3)), rng.choice([1, 30], 20)
    start = np.eye(3)[None]
    weighted, _ = rotate(loadings, weight.astype(float), start)
    repeated, _ = rotate(np.repeat(loadings, weight, axis=1), np.ones(weight.sum()), start)
    plain, _ = rotate(loadings, np.ones(20), start)
    assert np.allclose(weighted, repeated, atol=1e-5)
    assert not np.allclose(weighted, plain, atol=1e-2)


def simple(seed=0, num_draws=200, scatter=0.02):
    """Population draws whose loadings are two blocks of cells, rotated and signed at random in every draw."""
    rng = np.random.default_rng(seed)
    cells, times = 24, 50
    weight = rng.uniform(0.5, 1.5, cells)
    weight /= weight.mean()
    blocks = np.zeros((cells, 2))
    blocks[:10, 0], blocks[10:, 1] = 1.5, 1.0
    loadings = blocks + scatter * rng.standard_normal((num_draws, cells, 2))
    series = rng.standard_normal((num_draws, times, 2)) * 0.1 + rng.standard_normal((times, 2))
    weighted = np.sqrt(weight)[:, None] * loadings
    left, size, right = np.linalg.svd(weighted, full_matrices=False)
    sign = rng.choice([-1.0, 1.0], (num_draws, 1, 2))
    u, f = left * sign, series @ right.transpose(0, 2, 1) * sign
    posterior = xr.Dataset(
        {
            "U": (("chain", "draw", "basis_space", "mode"), u.reshape(2, -1, cells, 2)),
            "F": (("chain", "draw", "time", "mode"), f.reshape(2, -1, times, 2)),
            "d": (("chain", "draw", "mode"), size.reshape(2, -1, 2)),
            "sigma": (("chain", "draw"), np.full((2, num_draws // 2), 0.3)),
            "autocorrelation": (("chain", "draw", "mode"), np.full((2, num_draws // 2, 2), 0.5)),
        }
    )
    signal = blocks @ series[0].T
    constant = xr.Dataset(
        {
            "basis_space_matrix": (("cell", "basis_space"), np.eye(cells)),
            "weight": ("cell", weight),
            "data": (("cell", "time"), signal + 0.3 * rng.standard_normal(signal.shape), {"units": "degC"}),
            "time_steps": ("step", np.ones(times - 1)),
        },
        coords={"time": np.arange(times), "cell": np.arange(cells)},
    )
    tree = xr.DataTree.from_dict({"posterior": posterior, "constant_data": constant})
    tree.attrs = {"method": "bayesian_svd", "engine": "mcmc", "spec": json.dumps({})}
    return tree, blocks, series, weight


def test_simple_patterns_are_found_again_with_labels_and_signs_alike():
    tree, blocks, series, weight = simple()
    plain, modes = summarise_modes(tree), summarise_modes(tree, rotation="varimax")
    assert np.allclose(modes["mode_mean"].values.T, blocks, atol=0.05)
    assert modes["mode_sd"].max() < 0.06
    assert np.allclose(modes["pc_mean"].values.T, series.mean(0), atol=0.05)
    assert plain["mode_sd"].max() > 0.5  # the signs of the draws given are at random
    shares = [float(x["explained_variance_fraction_mean"].sum()) for x in (plain, modes)]
    assert shares[0] == pytest.approx(shares[1], rel=1e-10)
    total = (weight @ blocks**2).sum() + 24 * 0.09
    assert np.allclose(modes["explained_variance_fraction_mean"], weight @ blocks**2 / total, atol=0.01)
    assert "series_correlation_mean" not in modes


@pytest.mark.parametrize("method", ["varimax", "promax"])
def test_signal_of_a_draw_stays_what_it_was(method):
    tree, *_ = simple(scatter=0.3)
    draws = read_draws(tree)
    rotated, correlation = rotate_draws(draws, method)
    before = draws.patterns() @ draws.series().transpose(0, 2, 1)
    after = rotated.patterns() @ rotated.series().transpose(0, 2, 1)
    assert np.allclose(before, after)
    assert np.allclose(np.linalg.norm(rotated.space, axis=0), 1)
    assert np.allclose(np.einsum("sii->si", correlation), 1)
    off = np.abs(correlation[:, 0, 1])
    assert off.max() < 1e-10 if method == "varimax" else off.mean() > 0.01


def test_signal_of_these_times_stays_too_and_a_mean_of_the_series_is_kept():
    tree = synthetic_result(toy_field(), rank=3, num_draws=20)
    draws = read_draws(tree)
    rotated = rotate_draws(draws, "promax")[0]
    before = draws.patterns() @ draws.series().transpose(0, 2, 1)
    assert np.allclose(before, rotated.patterns() @ rotated.series().transpose(0, 2, 1))
    assert np.allclose(rotated.spread()[1], 1)


def test_promax_is_simpler_where_simple_series_correlate():
    """Loadings of simple structure whose factors correlate at .5: promax finds both, varimax cannot."""
    rng = np.random.default_rng(0)
    tree, blocks, _, weight = simple()
    root = np.linalg.cholesky([[1.0, 0.5], [0.5, 1.0]])
    draws = read_draws(tree)
    loadings = (np.sqrt(weight)[:, None] * (blocks + 0.02 * rng.standard_normal((len(draws.d), 24, 2)))) @ root
    left, size, _ = np.linalg.svd(loadings, full_matrices=False)
    posterior = tree["posterior"].to_dataset()
    posterior["U"] = posterior["U"].dims, left.reshape(posterior["U"].shape)
    posterior["d"] = posterior["d"].dims, size.reshape(posterior["d"].shape)
    tree["posterior"] = xr.DataTree(posterior)
    promax, varimax = (summarise_modes(tree, rotation=method) for method in ("promax", "varimax"))
    assert promax["series_correlation_mean"][0, 1].item() == pytest.approx(0.5, abs=0.08)
    off = [np.abs(modes["mode_mean"].values.T[blocks == 0]).mean() for modes in (promax, varimax)]
    assert off[0] < 0.1 < off[1]
    assert "do not add up" in summary_table(promax)


def test_mixed_processes_have_their_autocorrelation_and_effective_times():
    tree, *_ = simple()
    posterior = tree["posterior"].to_dataset()
    posterior["autocorrelation"] = posterior["autocorrelation"] * 0 + xr.DataArray([0.9, 0.2], dims="mode")
    tree["posterior"] = xr.DataTree(posterior)
    draws = read_draws(tree)
    mixing = rotate_draws(draws, "varimax")[0].turn
    modes = summarise_modes(tree, rotation="varimax")
    lag = np.abs(np.subtract.outer(np.arange(50), np.arange(50)))
    correlation = np.einsum("sjk,jtu->sktu", mixing**2, np.stack([0.9**lag, 0.2**lag]))
    assert np.allclose(modes["autocorrelation_mean"], correlation[:, :, 0, 1].mean(0))
    assert np.allclose(modes["effective_times_mean"], (2500 / (correlation**2).sum((2, 3))).mean(0))


def test_rotated_modes_are_written(tmp_path):
    tree = synthetic_result(toy_field(), rank=3)
    path = write_modes(summarise_modes(tree, rotation="promax"), tmp_path / "modes.nc")
    with xr.open_dataset(path) as stored:
        assert stored.attrs["title"].startswith("Promax modes")
        assert stored.attrs["rotation"].startswith("promax: series are correlated")
        assert stored["series_correlation_mean"].dims == ("mode", "other_mode")


def test_rotation_of_one_mode_and_unknown_rotations_are_refused():
    tree = synthetic_result(toy_field(), rank=1, num_draws=5)
    with pytest.raises(SummaryError, match="two modes or more"):
        summarise_modes(tree, rotation="varimax")
    for wrong in ("verimax", "", 1, True, ["varimax"]):
        with pytest.raises(SummaryError, match="rotation"):
            summarise_modes(tree, rotation=wrong)


def test_a_basis_that_is_not_orthonormal_changes_neither_patterns_nor_rotations():
    """Where noise is correlated, coordinates are those in which it is white."""
    tree, *_ = simple()
    draws = read_draws(tree)
    skew = np.eye(24) + 0.2 * np.random.default_rng(0).standard_normal((24, 24))
    noise = Noise(np.eye(24), np.ones(24), 0.0, "matern32", 1.0, np.zeros(24))
    space = np.tensordot(np.linalg.inv(skew), draws.space, 1)
    skewed = replace(draws, noise=noise, basis_space=draws.basis_space @ skew, space=space)
    again = skewed.orthonormal()
    assert np.allclose(again.basis_space.T @ again.basis_space, np.eye(24))
    assert np.allclose(again.patterns(), draws.patterns())
    skewed, plain = (rotate_draws(x, "varimax")[0].patterns() for x in (skewed, draws))
    assert np.allclose(skewed, plain, atol=1e-4)
