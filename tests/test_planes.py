"""Rotation of neighbouring modes, and planes of modes that are not separated."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from synthetic_modes import synthetic_result, toy_field

from probmodels import run_mcmc
from probmodels.bayesian_svd import figures, make_problem
from probmodels.bayesian_svd.eof import compare_eof
from probmodels.bayesian_svd.patterns.planes import UNKNOWN, groups_of, plane_sentences, read_plane
from probmodels.bayesian_svd.reporting.sections import variance_section
from probmodels.bayesian_svd.summary import summarise_modes, summary_table
from probmodels.errors import SummaryError

CELLS, NOISE = 14, 0.3


def population(sizes, seed, times=60):
    """Values (cell, time) of two smooth patterns with white series of known sizes, and the patterns."""
    rng = np.random.default_rng(seed)
    x = np.linspace(0, 1, CELLS)
    smooth = np.exp(-0.5 * ((x[:, None] - x) / 0.25) ** 2) + 1e-8 * np.eye(CELLS)
    patterns = np.linalg.qr(np.linalg.cholesky(smooth) @ rng.standard_normal((CELLS, 2)))[0]
    values = (patterns * sizes) @ rng.standard_normal((2, times)) + NOISE * rng.standard_normal((CELLS, times))
    return xr.DataArray(values, dims=("cell", "time"), coords={"cell": x, "time": np.arange(float(times))}), patterns


def inferred(sizes, seed, times=60):
    data, patterns = population(sizes, seed, times)
    problem = make_problem(data, rank=2, series="iid", area_weights=False, kernel_space="matern72")
    options = {
        "num_chains": 1,
        "chain_method": "sequential",
        "warmup_steps": 150,
        "num_samples": 500,
        "progress": False,
        "seed": seed,
    }
    return run_mcmc(problem, **options).tree, patterns


def test_patterns_of_equal_modes_are_wide_open_and_their_plane_is_not():
    tree, _ = inferred([2.0, 2.0], 1, 100)
    modes = summarise_modes(tree)
    assert modes["order_probability"].item() < 0.95
    assert modes["rotation_sd"].item() > 20
    assert modes["plane_first_mode"].values.tolist() == [1]
    assert modes["plane_last_mode"].values.tolist() == [2]
    assert modes["plane_determined"].item() == 1
    # In one unit: sd of a pattern's entries over their size, and that of the plane's local standard deviation.
    single = modes["mode_sd"].mean().item() / np.sqrt((modes["mode_mean"] ** 2).mean().item())
    plane = (modes["plane_variance_sd"] / 2 / np.sqrt(modes["plane_variance_mean"])).mean().item()
    plane /= np.sqrt(modes["plane_variance_mean"].mean().item())
    assert single > 3 * plane
    assert "~" in summary_table(modes)
    assert "well determined" in plane_sentences(modes)[0]
    comparison = compare_eof(tree, modes)
    comparison["north_neighbour"][:] = 0  # the EOFs of these data are apart, the modes of the posterior are not
    rows = str(variance_section(modes, comparison, None))
    assert rows.count("apart in its data, not by the posterior (~)") == 2
    comparison["north_neighbour"][:] = [2, 1]
    assert "apart in its data" not in str(variance_section(modes, comparison, None))


def test_modes_of_unequal_size_are_separated_and_have_no_plane():
    tree, _ = inferred([4.0, 1.0], 2)
    modes = summarise_modes(tree)
    assert modes["order_probability"].item() == 1
    assert modes["rotation_sd"].item() < 10
    assert modes["north_angle"].item() < 20
    assert "plane" not in modes.dims
    assert "~" not in summary_table(modes)
    assert "~" not in str(variance_section(modes, compare_eof(tree, modes), None))
    with pytest.raises(KeyError, match="all neighbours are separated"):
        figures.plane_maps(modes)


def test_plane_of_modes_under_the_noise_is_not_called_determined():
    rng = np.random.default_rng(3)
    noise = xr.DataArray(rng.standard_normal((30, 20)), dims=("cell", "time"))
    problem = make_problem(noise, rank=2, series="iid", frame_prior="uniform")
    tree = run_mcmc(
        problem, num_chains=1, chain_method="sequential", warmup_steps=100, num_samples=300, progress=False
    ).tree
    modes = summarise_modes(tree)
    assert modes["plane_determined"].values.tolist() == [0]
    assert "not well determined" in plane_sentences(modes)[0]


@pytest.mark.slow
def test_interval_of_the_variance_of_a_plane_at_a_cell_holds_the_truth():
    held = []
    for seed in range(24):
        tree, patterns = inferred([2.0, 2.0], 100 + seed)
        local = read_plane(tree, [1, 2]).local_variance()
        low, high = np.quantile(local, [0.025, 0.975], axis=0)
        truth = 4.0 * (patterns**2).sum(1)
        held.append(np.mean((low <= truth) & (truth <= high)))
    assert abs(np.mean(held) - 0.95) < 3 * max(np.std(held, ddof=1), 0.05) / np.sqrt(len(held))


def test_rotation_is_measured_in_degrees_whatever_signs_and_labels():
    """Draws that are a known rotation of two axes, with signs at random and labels by size."""
    tree = synthetic_result(toy_field(), rank=2, num_draws=400)
    rng = np.random.default_rng(0)
    count = 800
    angle = np.deg2rad(15) * rng.standard_normal(count)
    axes = np.linalg.qr(rng.standard_normal((tree["posterior"].sizes["basis_space"], 2)))[0]
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]).transpose(2, 0, 1)
    frames = axes @ turn * rng.choice([-1.0, 1.0], (count, 1, 2))
    swapped = rng.random(count) < 0.3
    frames[swapped] = frames[swapped][:, :, ::-1]
    posterior = tree["posterior"].to_dataset()
    posterior["U"] = posterior["U"].dims, frames.reshape(posterior["U"].shape)
    posterior["d"] = posterior["d"].dims, np.broadcast_to([2.0, 1.0], posterior["d"].shape).copy()
    tree["posterior"] = xr.DataTree(posterior)
    plane = read_plane(tree, [1, 2])
    assert plane.angles().max() < 1e-5
    turned = plane.rotation()
    assert turned.order == pytest.approx(1 - swapped.mean(), abs=0.01)
    assert np.std(turned.angle[~swapped]) == pytest.approx(15, rel=0.1)
    assert not turned.separated
    unit = plane.projection()
    assert unit.shape[1] == unit.shape[2] == tree["constant_data"].sizes["cell"]
    assert np.allclose(unit[0], unit[-1])
    assert np.trace(unit[0]) == pytest.approx(2)
    local = np.einsum("sii->si", unit) / plane.weight  # both modes of the same size would explain this
    assert np.all(plane.local_variance() >= local * plane.scale.min() ** 2 - 1e-9)


def test_angle_of_which_nothing_is_known_has_the_sd_of_a_uniform_one():
    tree = synthetic_result(toy_field(), rank=2, num_draws=2000)
    rng = np.random.default_rng(0)
    angle = rng.uniform(0, np.pi, 4000)
    axes = np.linalg.qr(rng.standard_normal((tree["posterior"].sizes["basis_space"], 2)))[0]
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]).transpose(2, 0, 1)
    posterior = tree["posterior"].to_dataset()
    posterior["U"] = posterior["U"].dims, (axes @ turn).reshape(posterior["U"].shape)
    tree["posterior"] = xr.DataTree(posterior)
    turned = read_plane(tree, [1, 2]).rotation()
    assert turned.sd == pytest.approx(UNKNOWN, rel=0.03)
    assert turned.order == pytest.approx(0.5, abs=0.05)


def test_neighbours_that_are_joined_make_groups():
    assert groups_of([]) == []
    assert groups_of([1, 2, 5]) == [(1, 2, 3), (5, 6)]


def test_variance_of_a_plane_is_that_of_its_maps_and_is_on_the_grid():
    field = toy_field()
    tree = synthetic_result(field, rank=2)
    posterior = tree["posterior"].to_dataset()
    posterior["d"] = posterior["d"].dims, posterior["d"].values[..., ::-1].copy()  # the order contradicts the patterns
    tree["posterior"] = xr.DataTree(posterior)
    labels = np.random.default_rng(0).permutation(posterior.sizes["draw"]) < posterior.sizes["draw"] // 2
    u = posterior["U"].values.copy()
    u[:, labels] = u[:, labels][..., ::-1]
    posterior["U"] = posterior["U"].dims, u
    tree["posterior"] = xr.DataTree(posterior)
    modes = summarise_modes(tree)
    assert "plane" in modes.dims
    expected = (modes["mode_sd"] ** 2 * 99 / 100 + modes["mode_mean"] ** 2).sum("mode", skipna=False)
    assert np.allclose(modes["plane_variance_mean"][0], expected, equal_nan=True, rtol=1e-6)
    assert modes["plane_variance_mean"].attrs["units"] == "degC2"
    figure = figures.plane_maps(modes)
    assert "Modes 1 and 2 together" in figure.axes[0].get_title(loc="left")
    assert "~" in figures.mode_maps(modes).axes[0].get_title(loc="left")


@pytest.mark.parametrize("wrong", [[1, 1], [1, 7], [1], [0, 1], "12", [1.5, 2], None])
def test_modes_that_are_not_there_are_refused(wrong):
    tree = synthetic_result(toy_field(), rank=3, num_draws=5)
    with pytest.raises(SummaryError, match="modes"):
        read_plane(tree, wrong)


def test_rotation_is_that_of_a_pair():
    tree = synthetic_result(toy_field(), rank=3, num_draws=5)
    plane = read_plane(tree, [1, 2, 3])
    assert plane.angles().shape == (10, 3)
    with pytest.raises(SummaryError, match="two modes"):
        plane.rotation()
