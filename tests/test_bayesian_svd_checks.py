"""Verdicts on the model of the Bayesian SVD, and grids of length-scales that grow."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from scipy.ndimage import gaussian_filter1d
from scipy.signal import lfilter

from probmodels import run_mcmc
from probmodels.bayesian_svd import check_model, make_problem
from probmodels.bayesian_svd.checking.neighbours import neighbours


def field(noise: str = "white", seed: int = 0) -> xr.DataArray:
    """One mode, 40 cells x 80 times, with noise of the model or of another kind."""
    rng = np.random.default_rng(seed)
    x = np.linspace(0, 1, 40)
    rest = rng.normal(size=(40, 80))
    if noise == "smooth in space":
        rest = 3 * gaussian_filter1d(rng.normal(size=(40, 80)), 3, axis=0)
    elif noise == "red":
        rest = lfilter([0.6], [1, -0.8], rng.normal(size=(40, 200)), axis=1)[:, -80:]
    elif noise == "unequal":
        rest = 2 * rest * np.where(np.arange(40) % 2, 0.3, 1.4)[:, None]
    values = np.outer(1 + 0.5 * np.sin(3 * x), 3 * rng.normal(size=80)) + rest
    return xr.DataArray(values, dims=("cell", "time"), coords={"cell": x, "time": np.arange(80.0)})


def fitted(data: xr.DataArray, **options):
    problem = make_problem(data, rank=1, **(options or {"num_length_scales": 12}))
    return run_mcmc(problem, num_chains=2, num_samples=150, warmup_steps=100, chain_method="sequential", progress=False)


@pytest.mark.parametrize(
    ("noise", "said"),
    [
        ("white", None),
        ("smooth in space", "residuals of neighbouring cells"),
        ("red", "residuals of neighbouring times"),
        ("unequal", "of the cells the variance"),
    ],
)
def test_noise_that_the_model_lacks_fails_the_model_and_not_the_sampler(noise, said):
    report = fitted(field(noise)).diagnose(ess_min=20, rhat_max=1.2)
    assert report.inference == "passed", str(report)
    bad = [finding.verdict for finding in report.findings if finding.harmful]
    if said is None:
        assert report.model == "passed", str(report)
    else:
        assert report.model == "failed"
        assert any(said in verdict for verdict in bad)
        assert "FAILED: the model does not fit the data; the draws themselves passed." in str(report)


def test_data_of_the_model_are_seldom_said_not_to_fit():
    """Limits leave room for chance: 20 data sets of the model, each with three checks."""
    assert all(fitted(field(seed=seed)).diagnose().model == "passed" for seed in range(1, 21, 4))


def test_draws_at_the_end_of_a_grid_are_said_with_the_option():
    data = field()
    short = fitted(data, length_scales_space=[0.05, 0.1]).diagnose()
    verdict = next(x for x in short.findings if "at the last point of its grid" in x.verdict)
    assert "0.1" in verdict.verdict
    assert "length_scales_space=[...]" in verdict.advice
    assert "last point" not in str(fitted(data, length_scales_space=[0.05, 0.5, 1.0, 20.0, 400.0]).diagnose())


def test_the_default_grid_grows_where_patterns_are_smoother_than_it_goes():
    rng = np.random.default_rng(0)
    x = np.linspace(0, 1, 40)

    def problem(pattern):
        values = np.outer(pattern, 3 * rng.normal(size=60)) + 0.1 * rng.normal(size=(40, 60))
        data = xr.DataArray(values, dims=("cell", "time"), coords={"cell": x, "time": np.arange(60.0)})
        return make_problem(data, rank=1, num_length_scales=12).data

    rough = problem(np.sin(25 * x))
    assert float(rough["length_scales_space"].max()) == pytest.approx(0.5)
    assert "widened" not in rough.attrs["mends"]
    smooth = problem(1 + 0.3 * x)
    assert float(smooth["length_scales_space"].max()) > 0.9
    assert "the default grid of length-scales in space was widened" in smooth.attrs["mends"]


def test_neighbours_along_each_direction() -> None:
    """Cells that are long to the east have all their nearest ones to the north."""
    lat, lon = (x.ravel() for x in np.meshgrid(np.arange(0.0, 8, 1), np.arange(0.0, 40, 4), indexing="ij"))
    cells = xr.Dataset(coords={"lat": ("cell", lat), "lon": ("cell", lon)})
    east, north = neighbours(cells)
    np.testing.assert_array_equal(lat[east], lat)
    np.testing.assert_array_equal(np.abs(lon[east] - lon), 4)
    np.testing.assert_array_equal(lon[north], lon)
    np.testing.assert_array_equal(np.abs(lat[north] - lat), 1)
    assert [len(neighbours(xr.Dataset(coords={"cell": np.arange(5.0)})))] == [1]
    assert neighbours(xr.Dataset(coords={"cell": list("abc")})) == []
    copies = neighbours(cells.isel(cell=[0, 0, 1, 9]))
    assert all((near != np.arange(4)).all() for near in copies)


@pytest.mark.parametrize(("along", "fails"), [("east", True), ("north", True), ("none", False)])
def test_noise_that_is_alike_in_one_direction_fails(along: str, fails: bool) -> None:
    rng = np.random.default_rng(0)
    coords = {"time": np.arange(80.0), "lat": np.arange(0.0, 8, 1), "lon": np.arange(0.0, 40, 4)}
    noise = rng.standard_normal((80, 8, 10))
    if along != "none":
        axis = 2 if along == "east" else 1
        place = np.arange(noise.shape[axis])
        root = np.linalg.cholesky(np.exp(-np.abs(place[:, None] - place) / 3))
        noise = np.moveaxis(np.tensordot(noise, root, (axis, 1)), -1, axis)
    field = 3 * rng.standard_normal((80, 1, 1)) * np.cos(np.linspace(0, 2, 10)) + 0.4 * noise
    problem = make_problem(
        xr.DataArray(field, coords, ("time", "lat", "lon")), rank=1, series="iid", num_length_scales=3
    )
    options = {"num_samples": 40, "warmup_steps": 40, "num_chains": 1, "progress": False, "seed": 1}
    found = [x.verdict for x in check_model(run_mcmc(problem, chain_method="sequential", **options)) if x.harmful]
    assert any("neighbouring cells" in verdict for verdict in found) == fails
