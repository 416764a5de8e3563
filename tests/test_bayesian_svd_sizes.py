"""Many cells: bases of smooth functions, what they leave out, and whether that is said."""

from __future__ import annotations

import json

import numpy as np
import pytest
import xarray as xr

from probmodels import run_mcmc
from probmodels.bayesian_svd import make_problem, sides
from probmodels.distributions.covariance import correlation, euclidean_distance
from probmodels.errors import DataError


def field(nx: int = 20, ny: int = 14, num_times: int = 60, scale: float = 6.0, leading: str = "smooth") -> xr.DataArray:
    """Two smooth modes and noise on a plane, with a checkerboard before them where asked."""
    rng = np.random.default_rng(3)
    x, y = (a.ravel().astype(float) for a in np.meshgrid(np.arange(nx), np.arange(ny), indexing="ij"))
    root = np.linalg.cholesky(
        correlation(euclidean_distance(np.stack([x, y], 1)), "matern72", scale).numpy() + 1e-8 * np.eye(x.size)
    )
    patterns = root @ rng.standard_normal((x.size, 2))
    values = patterns * [3.0, 1.5] @ rng.standard_normal((2, num_times)) + rng.standard_normal((x.size, num_times))
    if leading == "rough":
        values += 4 * np.outer((-1.0) ** (x + y), rng.standard_normal(num_times))
    coords = {"cell": np.arange(x.size), "x": ("cell", x), "y": ("cell", y), "time": np.arange(float(num_times))}
    return xr.DataArray(values, dims=("cell", "time"), coords=coords)


def run(problem, draws=500):
    return run_mcmc(
        problem, num_chains=2, num_samples=draws, warmup_steps=150, chain_method="sequential", progress=False
    )


@pytest.mark.parametrize("options", [{}, {"length_scales_space": [3.0, 6.0, 12.0]}])
def test_the_posterior_of_a_truncated_basis_is_that_of_every_direction(options):
    """Means of the patterns in data units, of d and of sigma within Monte Carlo error."""
    few, all_ = (
        make_problem(field(), rank=2, series="ar1", **options, **size) for size in ({"max_basis": 90}, {"tail": 0.0})
    )
    assert few.data.sizes["basis_space"] <= 90
    assert all_.data.sizes["basis_space"] == 280
    found = []
    for problem in (few, all_):
        posterior = run(problem).posterior
        u = (
            problem.data["basis_space_matrix"].values[::9]
            @ posterior["U"].transpose("chain", "draw", ..., "mode").values
        )
        d, sigma = posterior["d"].values, posterior["sigma"].values
        draws = np.concatenate([(u * d[:, :, None]).reshape(*sigma.shape, -1), d, sigma[..., None]], axis=2)
        draws = np.moveaxis(draws, 2, 0)  # (entry, chain, draw)
        batches = draws.reshape(len(draws), 20, -1).mean(2)  # of 50 draws
        found.append((draws.reshape(len(draws), -1), batches.var(1, ddof=1) / 20))
    (one, error_one), (other, error_other) = found
    z = (one.mean(1) - other.mean(1)) / np.sqrt(error_one + error_other)
    assert np.sqrt(np.mean(z**2)) < 1.6
    assert np.abs(z).max() < 5
    ratio = one.std(1) / other.std(1)
    assert 0.9 < np.median(ratio) < 1.1


def test_the_basis_and_the_shortest_length_scale_follow_the_data():
    smooth, rough = (make_problem(field(scale=s), rank=2, series="ar1", max_basis=150).data for s in (8.0, 3.0))
    assert smooth.sizes["basis_space"] < rough.sizes["basis_space"]
    assert 8 / 4 < float(smooth["length_scales_space"].min()) < 8
    assert float(rough["length_scales_space"].min()) < 3
    assert "length-scales start at" in json.loads(smooth.attrs["mends"])[-1]
    assert "tail=0" in json.loads(smooth.attrs["mends"])[-1]


def test_a_leading_pattern_that_is_too_rough_for_the_basis_is_said():
    hidden = make_problem(field(leading="rough"), rank=2, series="ar1", max_basis=60)
    assert hidden.data["hidden"].values[0] > 0.9
    report = run(hidden, 60).diagnose(ess_min=1, rhat_max=100)
    verdict = next(finding for finding in report.findings if "does not show" in finding.verdict)
    assert verdict.harmful
    assert "leading pattern 1" in verdict.verdict
    assert "max_basis" in verdict.advice
    for shown in (
        make_problem(field(), rank=2, series="ar1", max_basis=60),
        make_problem(field(leading="rough"), rank=2, series="ar1"),
    ):
        assert shown.data["hidden"].values.max() < 0.01


def test_a_field_of_few_cells_keeps_every_direction():
    made = make_problem(field(), rank=2, series="ar1").data
    assert made.sizes["basis_space"] == 280
    assert float(made["length_scales_space"].min()) == 1.0


def test_no_matrix_of_all_distances_is_formed_for_many_cells(monkeypatch):
    data = field(12, 10, 15)
    many = data.isel(cell=np.zeros(3000, dtype=int)).assign_coords(
        cell=np.arange(3000), x=("cell", np.arange(3000) // 50 + 0.0), y=("cell", np.arange(3000) % 50 + 0.0)
    )
    many = many + np.random.default_rng(0).standard_normal(many.shape)

    def refuse(*_):
        raise AssertionError("all distances")

    monkeypatch.setattr(sides, "euclidean_distance", refuse)
    monkeypatch.setattr(sides, "eigen_grid", refuse)
    assert make_problem(many, rank=1, series="iid", max_basis=50, num_length_scales=4).data.sizes["basis_space"] == 50


def test_every_direction_of_very_many_cells_is_refused_before_its_memory_is_asked_for():
    size = 13_000
    rng = np.random.default_rng(0)
    values = np.outer(np.ones(size), rng.standard_normal(12)) + rng.standard_normal((size, 12))
    data = xr.DataArray(values, dims=("cell", "time"), coords={"cell": np.arange(size), "time": np.arange(12.0)})
    with pytest.raises(DataError, match=r"13000 cells have 1 GB of distances.*--tail 0"):
        make_problem(data, rank=1, series="iid", tail=0.0)


def test_the_size_of_the_basis_is_refused_where_it_is_not_used():
    with pytest.raises(DataError, match=r"max_basis=80 is not used with tail=0"):
        make_problem(field(), rank=1, tail=0.0, max_basis=80)
    with pytest.raises(DataError, match="max_basis=10"):
        make_problem(field(), rank=1, max_basis=10)
