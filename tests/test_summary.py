"""Maps, series, checks and the EOF comparison of a Bayesian SVD against direct computation."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import xarray as xr
from synthetic_modes import synthetic_result, toy_field

from probmodels.bayesian_svd import draws as draws_module, eof as eof_module
from probmodels.bayesian_svd.eof import eof_baseline, make_anomalies
from probmodels.bayesian_svd.grids import to_grid
from probmodels.bayesian_svd.summary import (
    SummaryError,
    compare_eof,
    summarise_modes,
    summary_table,
    write_modes,
)


@pytest.fixture(scope="module")
def tree():
    return synthetic_result(toy_field())


@pytest.fixture(scope="module")
def modes(tree):
    return summarise_modes(tree)


def expanded(tree):
    """Maps (draw, cell, mode) and standardised series (draw, time, mode), one draw at a time."""
    posterior, constant = tree["posterior"].to_dataset(), tree["constant_data"].to_dataset()
    maps, series = [], []
    for chain in range(posterior.sizes["chain"]):
        for draw in range(posterior.sizes["draw"]):
            one = posterior.isel(chain=chain, draw=draw)
            v = constant["basis_time_matrix"].values @ one["V"].values
            u = constant["basis_space_matrix"].values @ one["U"].values / np.sqrt(constant["weight"].values)[:, None]
            maps.append(u * one["d"].values * v.std(0, ddof=1))
            series.append((v - v.mean(0)) / v.std(0, ddof=1))
    return np.array(maps), np.array(series)


def cells_of(modes, name, tree):
    constant = tree["constant_data"].to_dataset()
    return modes[name].sel(lat=constant["lat"], lon=constant["lon"]).transpose(..., "cell").values


@pytest.mark.parametrize("level", [0.95, 0.5])
def test_maps_and_series_are_moments_of_the_expanded_draws(tree, level):
    modes = summarise_modes(tree, level=level)
    maps, series = expanded(tree)
    bounds = [(1 - level) / 2, (1 + level) / 2]
    for prefix, values in (("mode", maps), ("pc", series)):
        lower, upper = np.quantile(values, bounds, axis=0)
        direct = {"mean": values.mean(0), "sd": values.std(0, ddof=1), "lower": lower, "upper": upper}
        for part, expected in direct.items():
            name = f"{prefix}_{part}"
            found = cells_of(modes, name, tree) if prefix == "mode" else modes[name].values
            np.testing.assert_allclose(found, expected.T, atol=1e-12, err_msg=name)
    np.testing.assert_array_equal(cells_of(modes, "prob_positive", tree), (maps > 0).mean(0).T)
    assert np.isnan(modes["mode_mean"].values).any(), "land is NaN"


def test_blocks_do_not_change_the_numbers(tree, modes, monkeypatch):
    monkeypatch.setattr(draws_module, "_BLOCK", 1000)
    small = summarise_modes(tree, check_draws=100)
    # Replicates are drawn block by block from one stream, and rounding may break the ties of folded ranks.
    for name in set(modes.data_vars) - {"predictive_p_value", "replicated_sd", "mode_r_hat", "mode_ess"}:
        np.testing.assert_allclose(small[name].values, modes[name].values, atol=1e-9, err_msg=str(name))


def test_fraction_of_variance_counts_only_what_the_fixed_effects_leave(tree, modes):
    constant, posterior = tree["constant_data"].to_dataset(), tree["posterior"].to_dataset()
    z = constant["data"].values
    q = np.linalg.qr(constant["fixed_effects_design"].values)[0]
    total = np.sum(constant["weight"].values[:, None] * (z - z @ q @ q.T) ** 2)
    direct = (posterior["d"].values ** 2 / total).reshape(-1, 3)  # V is orthogonal to the effects here
    np.testing.assert_allclose(modes["explained_variance_fraction_mean"], direct.mean(0), rtol=1e-9)
    np.testing.assert_allclose(
        modes["explained_variance_fraction_upper"], np.quantile(direct, 0.975, axis=0), rtol=1e-9
    )

    mixed = tree.copy()
    basis = constant["basis_time_matrix"].values.copy()
    basis[:, 0] = (basis[:, 0] + q[:, 1]) / np.sqrt(2)  # half of the first direction is now trend
    mixed["constant_data"] = constant.assign(basis_time_matrix=(("time", "basis_time"), basis))
    found = summarise_modes(mixed, check_draws=5)["explained_variance_fraction_mean"].values
    v = np.einsum("tr,sri->sti", basis, posterior["V"].values.reshape(-1, *posterior["V"].shape[2:]))
    left = np.sum((v - np.einsum("tq,sqi->sti", q, np.einsum("tq,sti->sqi", q, v))) ** 2, axis=1)
    np.testing.assert_allclose(found, (direct * left).mean(0), rtol=1e-9)


@pytest.mark.parametrize("gaps", [0.0, 0.2])
def test_predictive_check_agrees_with_simulated_data(gaps):
    tree = synthetic_result(toy_field(), num_chains=1, num_draws=400, gaps=gaps, seed=3)
    modes = summarise_modes(tree, check_draws=400)
    constant, posterior = tree["constant_data"].to_dataset(), tree["posterior"].to_dataset()
    data, weight = constant["data"].values, constant["weight"].values
    observed = np.isfinite(data)
    rng = np.random.default_rng(1)
    design = constant["fixed_effects_design"].values

    def variance(field):
        out = np.empty(len(field))
        for c, (row, seen) in enumerate(zip(field, observed, strict=True)):
            q = np.linalg.qr(design[seen])[0]
            rest = row[seen] - q @ (q.T @ row[seen])
            out[c] = rest @ rest / (seen.sum() - design.shape[1])
        return out

    ours, truth = variance(data), []
    for s in range(400):
        one = posterior.isel(chain=0, draw=s)
        u = constant["basis_space_matrix"].values @ one["U"].values * one["d"].values
        field = u @ (constant["basis_time_matrix"].values @ one["V"].values).T
        field = (field + float(one["sigma"]) * rng.normal(size=field.shape)) / np.sqrt(weight)[:, None]
        truth.append(variance(field))
    np.testing.assert_allclose(cells_of(modes, "observed_sd", tree), np.sqrt(ours), rtol=1e-9)
    p = np.mean(np.array(truth) >= ours, axis=0)
    # Difference of two shares of 400 draws: sd <= 0.035; the largest of about 110 cells stays below 4.5 of them.
    np.testing.assert_allclose(cells_of(modes, "predictive_p_value", tree), p, atol=0.16)
    sd = np.sqrt(np.array(truth))
    error = np.abs(cells_of(modes, "replicated_sd", tree) - sd.mean(0)) / (sd.std(0) * np.sqrt(2 / 400))
    assert error.max() < 4.5


def test_residuals_with_gaps_are_those_of_the_observed_entries():
    tree = synthetic_result(toy_field(), num_chains=1, num_draws=20, gaps=0.2, seed=3)
    modes = summarise_modes(tree, check_draws=20)
    constant, posterior = tree["constant_data"].to_dataset(), tree["posterior"].to_dataset()
    data, observed = constant["data"].values, np.isfinite(constant["data"].values)
    design, weight = constant["fixed_effects_design"].values, constant["weight"].values
    square = np.zeros(len(data))
    for s in range(20):
        one = posterior.isel(chain=0, draw=s)
        u = constant["basis_space_matrix"].values @ one["U"].values * one["d"].values / np.sqrt(weight)[:, None]
        rest = data - u @ (constant["basis_time_matrix"].values @ one["V"].values).T
        for c, seen in enumerate(observed):
            q = np.linalg.qr(design[seen])[0]
            square[c] += np.sum((rest[c, seen] - q @ (q.T @ rest[c, seen])) ** 2) / 20
    direct = np.sqrt(square / (observed.sum(1) - 2))
    np.testing.assert_allclose(cells_of(modes, "residual_sd", tree), direct, rtol=1e-8)


def test_rotation_share_points_at_the_near_degenerate_mode():
    field = toy_field()
    rng = np.random.default_rng(0)
    tree = synthetic_result(field, num_draws=300)
    posterior = tree["posterior"].to_dataset()
    u = np.linalg.qr(rng.normal(size=(posterior.sizes["basis_space"], 3)))[0]
    angle = 0.3 * rng.normal(size=600)
    turned = np.repeat(u[None], 600, axis=0)
    turned[:, :, 1] = np.cos(angle)[:, None] * u[:, 1] + np.sin(angle)[:, None] * u[:, 2]
    turned[:, :, 2] = np.cos(angle)[:, None] * u[:, 2] - np.sin(angle)[:, None] * u[:, 1]
    dims = posterior["U"].dims
    tree["posterior"] = posterior.assign(U=(dims, turned.reshape(posterior["U"].shape)))
    share = summarise_modes(tree, check_draws=5)["rotation_share"].values
    assert share[1, 2] > 0.85, "a pure rotation lies along the other mode"
    assert share[2, 1] > 0.85
    assert share[1, 0] < 1e-12


def test_r_hat_of_the_maps_is_that_of_their_draws(tree, modes):
    az = pytest.importorskip("arviz")
    maps, _ = expanded(tree)
    dataset = xr.Dataset({"x": (("chain", "draw", "cell", "mode"), maps.reshape(2, 50, *maps.shape[1:])[:, :, :9])})
    found = cells_of(modes, "mode_r_hat", tree)[:, :9]
    np.testing.assert_allclose(found, az.rhat(dataset)["x"].values.T, atol=5e-3)  # ties of folded ranks
    np.testing.assert_allclose(cells_of(modes, "mode_ess", tree)[:, :9], az.ess(dataset)["x"].values.T, rtol=1e-2)


@pytest.mark.parametrize("weighted", [True, False])
def test_eof_baseline_equals_eofs(weighted):
    standard = pytest.importorskip("eofs.standard")
    constant = synthetic_result(toy_field(), weighted=weighted)["constant_data"].to_dataset()
    anomalies = make_anomalies(constant)
    base = eof_baseline(anomalies, 4)
    solver = standard.Eof(anomalies.values.T, weights=np.sqrt(anomalies.weight))
    maps = solver.eofsAsCovariance(neofs=4, pcscaling=1)
    pcs = solver.pcs(npcs=4, pcscaling=1).T
    for ours, theirs in ((base["eof"].values, maps), (base["eof_pc"].values, pcs)):
        sign = np.sign(np.sum(ours * theirs, axis=1, keepdims=True))
        np.testing.assert_allclose(ours, sign * theirs, atol=1e-6)
    np.testing.assert_allclose(base["eof_fraction"], solver.varianceFraction(neigs=4), rtol=1e-6)


def test_comparison_matches_modes_to_eofs(tree, modes):
    comparison = compare_eof(tree, modes)
    assert (comparison["pattern_correlation"] > 0.99).all()
    assert (comparison["pc_correlation"] > 0.99).all()
    assert (comparison["fraction_difference"] < 0).all(), "EOFs take up noise"
    assert comparison["eof"].dims == modes["mode_mean"].dims
    text = json.loads(comparison.attrs["sentences"])
    assert any("Mode 1 has the pattern of EOF 1" in line for line in text)
    if "eofs_check" in comparison.attrs:
        assert comparison.attrs["eofs_check"] < 1e-6
    flipped = compare_eof(tree, modes.assign(mode_mean=-modes["mode_mean"], pc_mean=-modes["pc_mean"]))
    np.testing.assert_allclose(flipped["eof"], -comparison["eof"])


def test_rotated_pair_is_said_to_be_one_plane(tree, modes, monkeypatch):
    turn = np.array([[1, 0, 0], [0, 0.8, 0.6], [0, -0.6, 0.8]])
    constant = tree["constant_data"].to_dataset()
    base = eof_baseline(make_anomalies(constant), 3)
    base["north_neighbour"] = "mode", np.array([0, 3, 2], dtype=np.int32)
    monkeypatch.setattr(eof_module, "eof_baseline", lambda *_: base.copy())
    # Rotate unit patterns of the pair, as a posterior would.
    size = np.sqrt(np.sum(constant["weight"].values * base["eof"].values ** 2, axis=1, keepdims=True))
    grid = to_grid(xr.Dataset({"mode_mean": (("mode", "cell"), turn @ (base["eof"].values / size))}), constant)
    rotated = modes.assign(mode_mean=(modes["mode_mean"].dims, grid["mode_mean"].values))
    comparison = compare_eof(tree, rotated)
    assert comparison["pattern_correlation"][1] < 0.97
    np.testing.assert_allclose(comparison["plane_correlation"], 1.0, atol=1e-9)
    text = " ".join(json.loads(comparison.attrs["sentences"]))
    assert "Modes 2 and 3: by North's rule" in text
    assert "rotation within modes 2 and 3" in text


def test_north_rule_separates_and_does_not():
    rng = np.random.default_rng(0)
    u = np.linalg.qr(rng.normal(size=(30, 3)))[0]
    v = rng.normal(size=(100, 3))
    v = np.linalg.qr(v - v.mean(0))[0]
    for sizes, expected in (([20, 10, 9.8], [0, 3, 2]), ([20, 10, 3], [0, 0, 0])):
        field = (u * sizes) @ v.T
        constant = xr.Dataset({"data": (("cell", "time"), field)})
        base = eof_baseline(make_anomalies(constant), 3)
        assert base["north_neighbour"].values.tolist() == expected
        np.testing.assert_allclose(base["eof_singular_value"], sizes)


def test_gaps_are_filled_for_the_eofs_and_said():
    whole, holed = (synthetic_result(toy_field(), gaps=gaps) for gaps in (0.0, 0.1))
    complete = eof_baseline(make_anomalies(whole["constant_data"].to_dataset()), 3)
    filled = eof_baseline(make_anomalies(holed["constant_data"].to_dataset()), 3)
    for i in range(3):
        correlation = np.corrcoef(complete["eof"][i], filled["eof"][i])[0, 1]
        assert abs(correlation) > 0.98
    comparison = compare_eof(holed, summarise_modes(holed))
    assert "values are missing" in json.loads(comparison.attrs["sentences"])[-1]
    assert "eofs_check" not in comparison.attrs


def constant_at(lat, lon, **attrs):
    cells = len(lat)
    return xr.Dataset(
        {"data": (("cell", "time"), np.zeros((cells, 3)), attrs)}, coords={"lat": ("cell", lat), "lon": ("cell", lon)}
    )


def test_grid_completes_empty_rows_and_does_not_cut_at_greenwich():
    lat, lon = (x.ravel() for x in np.meshgrid([10.0, 20.0, 40.0, 50.0], [340.0, 350.0, 0.0, 10.0], indexing="ij"))
    values = xr.Dataset({"x": ("cell", np.arange(16.0))})
    grid = to_grid(values, constant_at(lat, lon))
    assert grid["lon"].values.tolist() == [-20, -10, 0, 10]
    assert grid["lat"].values.tolist() == [10, 20, 30, 40, 50]
    assert grid["x"].sel(lat=30).isnull().all()
    assert grid["x"].sel(lat=40, lon=-10) == 9


def test_grid_axes_of_the_data_are_taken_where_they_are_known():
    constant = constant_at(
        [10.0, 20.0], [5.0, 7.0], grid_lat=np.arange(0.0, 40.0, 10.0), grid_lon=np.arange(1.0, 9.0, 2.0)
    )
    constant = constant.assign_coords(lat_index=("cell", [1, 2]), lon_index=("cell", [2, 3]))
    grid = to_grid(xr.Dataset({"x": ("cell", [1.0, 2.0])}), constant)
    assert dict(grid.sizes) == {"lat": 4, "lon": 4}
    assert grid["x"].sel(lat=20, lon=7) == 2


def test_scattered_cells_stay_cells():
    rng = np.random.default_rng(0)
    out = to_grid(xr.Dataset({"x": ("cell", np.zeros(40))}), constant_at(*rng.uniform(0, 50, (2, 40))))
    assert out["x"].dims == ("cell",)
    assert out["lat"].dims == ("cell",)
    plain = xr.Dataset({"data": (("cell", "time"), np.zeros((40, 3)))})
    assert to_grid(out[["x"]].drop_vars(["lat", "lon"]), plain)["x"].dims == ("cell",)


def test_one_chain_has_no_r_hat_and_a_time_without_dates_is_kept():
    tree = synthetic_result(toy_field(), num_chains=1)
    constant = tree["constant_data"].to_dataset().drop_vars("time")
    tree["constant_data"] = xr.DataTree(constant)
    modes = summarise_modes(tree)
    assert "mode_r_hat" not in modes
    assert modes["time"].values.tolist() == list(range(40))


CHECK = """
import sys
from compliance_checker.runner import CheckSuite, ComplianceChecker
CheckSuite.load_all_available_checkers()
passed, errors = ComplianceChecker.run_checker(sys.argv[1], ["cf:1.11"], 0, "normal", output_filename="-")
sys.exit(not passed or errors)
"""


@pytest.mark.parametrize("numeric_time", [False, True])
def test_file_keeps_to_the_cf_conventions(tree, modes, tmp_path, numeric_time):
    pytest.importorskip("compliance_checker")
    if numeric_time:
        constant = tree["constant_data"].to_dataset().drop_vars("time")
        tree = xr.DataTree.from_dict({"posterior": tree["posterior"].to_dataset(), "constant_data": constant})
        modes = summarise_modes(tree)
    path = write_modes(modes, tmp_path / "deep" / "modes.nc")
    done = subprocess.run([sys.executable, "-c", CHECK, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    with xr.open_dataset(path) as back:
        np.testing.assert_allclose(back["mode_mean"], modes["mode_mean"], rtol=1e-6)
        np.testing.assert_array_equal(back["step" if numeric_time else "time"], modes["time"])
        assert back["mode_mean"].dims == ("mode", "lat", "lon")
        assert "_FillValue" not in back["lat"].encoding
        assert {"title", "source", "history", "references", "spec_sha256", "data_sha256"} <= set(back.attrs)


def test_table_is_aligned_and_complete(tree, modes):
    comparison = compare_eof(tree, modes)
    r_hat = xr.Dataset({"d": ("mode", [1.0, 1.02, 1.0]), "U": (("basis_space", "mode"), np.full((4, 3), 1.001))})
    ess = xr.Dataset({"d": ("mode", [900.0, 500.0, 700.0]), "sigma": ((), 100.0)})
    lines = summary_table(modes, comparison, r_hat=r_hat, ess=ess).splitlines()
    assert len({len(line) for line in lines[:5]}) == 1
    for word in ("mode", "variance % [95 %]", "d [95 %]", "length space (km)", "r_hat max", "ESS min", "EOF corr."):
        assert word in lines[0]
    assert "1.020" in lines[3]
    assert "500" in lines[3]
    assert "r_hat" in summary_table(modes), "the maps' own where no other is given"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda tree: xr.DataTree.from_dict({"posterior": tree["posterior"].to_dataset()}), "constant_data are needed"),
        (lambda tree: without(tree, "posterior", "d"), "lacks \\['d'\\]"),
        (lambda tree: without(tree, "constant_data", "data"), "no variable 'data'"),
        (lambda tree: unweighted(tree), "weight that is not positive"),
    ],
)
def test_what_is_missing_is_said(tree, spoil, message):
    with pytest.raises(SummaryError, match=message):
        summarise_modes(spoil(tree))
    with pytest.raises(SummaryError, match="level=95; give a number above 0 and below 1"):
        summarise_modes(tree, level=95)


def without(tree, group, name):
    groups = {key: tree[key].to_dataset() for key in ("posterior", "constant_data")}
    groups[group] = groups[group].drop_vars(name)
    return xr.DataTree.from_dict(groups)


def unweighted(tree):
    groups = {key: tree[key].to_dataset() for key in ("posterior", "constant_data")}
    groups["constant_data"]["weight"] = groups["constant_data"]["weight"] * 0
    return xr.DataTree.from_dict(groups)
