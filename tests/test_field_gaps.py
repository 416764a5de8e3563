"""Gaps of fields filled by a diffusion prior."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

from probmodels import fit_svi
from probmodels.diffusion import make_problem
from probmodels.diffusion.fitted import make_field
from probmodels.errors import DataError, ProblemError
from probmodels.guides.schedules import LinearSchedule
from probmodels.scores.closed import GaussianMixture
from probmodels.scores.fields import FunctionField
from probmodels.scores.gaps import Modes, fill_gaps, leading_modes

SCHEDULE = LinearSchedule(-10.0, 5.0)
NUM_DRAWS = 2000
SD = 0.1


def covariance(size: int) -> np.ndarray:
    """Covariance (size, size) with correlated neighbours and sds from 0.8 to 1.2."""
    place = np.arange(size)
    sd = np.linspace(0.8, 1.2, size)
    return sd[:, None] * sd * np.exp(-np.abs(place[:, None] - place) / 3)


def fields_of(table: np.ndarray, lat: int = 2, lon: int = 3) -> xr.DataArray:
    """Rows (time, lat, lon) with labels."""
    coords = {
        "time": np.array("2000-01", "datetime64[M]").astype("datetime64[ns]") + np.arange(len(table)),
        "lat": np.arange(lat) * 10.0,
        "lon": np.arange(lon) * 20.0,
    }
    return xr.DataArray(table.reshape(-1, lat, lon), coords, ("time", "lat", "lon"), attrs={"units": "degC"})


def gapped(size: int = 6, lat: int = 2) -> xr.DataArray:
    """Three fields with gaps of their own: half, all but one, and none."""
    rng = np.random.default_rng(0)
    table = rng.multivariate_normal(np.zeros(size), covariance(size), 3)
    table[0, ::2] = np.nan
    table[1, 1:] = np.nan
    return fields_of(table, lat, size // lat)


def exact(mean: np.ndarray, cov: np.ndarray, y: np.ndarray, sd: float) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of a normal vector given noisy entries."""
    seen = np.isfinite(y)
    gain = np.linalg.solve(cov[np.ix_(seen, seen)] + sd**2 * np.eye(seen.sum()), cov[seen]).T
    return mean + gain @ (y - mean)[seen], cov - gain @ cov[seen]


def agree(draws: np.ndarray, mean: np.ndarray, cov: np.ndarray, limit: float = 5.0) -> None:
    """Draws (draw, cell) have these moments, within so many Monte Carlo errors of independent draws.

    Variances are given 2 % more, for the noise of level 0 and for chains that have just arrived there.
    """
    sd, count = np.sqrt(np.diag(cov)), len(draws)
    assert np.abs((draws.mean(0) - mean) / sd).max() < limit / math.sqrt(count)
    scale = np.outer(sd, sd)
    error = np.sqrt((1 + (cov / scale) ** 2) / count)  # of the entries of a covariance of normal draws
    assert (np.abs(np.cov(draws.T) - cov) / scale < limit * error + 0.02).all()


@pytest.mark.parametrize("line", [False, True], ids=["density", "score"])
def test_cells_have_the_exact_posterior_of_a_normal_prior(line: bool) -> None:
    prior: Any = GaussianMixture(SCHEDULE, torch.zeros(1, 6), torch.as_tensor(covariance(6))[None])
    if line:
        prior = FunctionField(SCHEDULE, (6,), prior.score)
    fields = gapped()
    options = {"num_levels": 25, "num_draws": NUM_DRAWS, "num_steps": 5, "progress": False}
    found = fill_gaps(prior, fields, sd=SD, **options)
    assert float(found["acceptance"].min()) > 0.5
    for place, row in enumerate(fields.values.reshape(3, 6)):
        agree(found["draws"].values[:, place].reshape(NUM_DRAWS, 6), *exact(np.zeros(6), covariance(6), row, SD))


@pytest.mark.parametrize("method", ["hmc", "reverse"])
def test_modes_of_a_white_prior_are_principal_components_with_noise(method: str) -> None:
    rng = np.random.default_rng(1)
    train = fields_of(1.0 + rng.multivariate_normal(np.zeros(12), covariance(12), 100), 3, 4)
    modes = leading_modes(train, 5)
    patterns = modes.patterns.values.reshape(5, 12)
    mean, cov = modes.mean.values.ravel(), patterns.T @ patterns + modes.noise**2 * np.eye(12)
    prior = GaussianMixture(LinearSchedule(-3.0, 7.0), torch.zeros(1, 5), 1.0)  # exact for all that its level 0 hides
    fields = train[:2].copy()
    fields[0, 0] = np.nan
    fields[1, :, 1:] = np.nan
    levels = {"num_levels": 20} if method == "hmc" else {"num_levels": 400}
    found = fill_gaps(
        prior, fields, sd=SD, modes=modes, num_draws=NUM_DRAWS, method=method, **levels, progress=False, seed=3
    )
    for place, row in enumerate(fields.values.reshape(2, 12)):
        agree(found["draws"].values[:, place].reshape(NUM_DRAWS, 12), *exact(mean, cov, row, SD))


def test_two_components_keep_their_shares() -> None:
    # Cells are both near +1 or both near -1; a cell seen near 0.1 leaves the other side possible.
    means = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])
    prior = GaussianMixture(SCHEDULE, means, 0.25)
    fields = xr.DataArray([[0.1, np.nan]], dims=("time", "cell"))
    found = fill_gaps(prior, fields, sd=0.3, num_draws=NUM_DRAWS, num_levels=50, num_steps=5, progress=False)
    truth = prior.given(torch.tensor([[1.0, 0.0]]), torch.tensor([0.1]), 0.3)
    wanted = float(truth.sample(200_000, generator=torch.Generator().manual_seed(0))[:, 1].gt(0).double().mean())
    share = float((found["draws"][:, 0, 1] > 0).mean())
    assert abs(share - wanted) < 5 * math.sqrt(wanted * (1 - wanted) / NUM_DRAWS)


def test_labels_land_and_attributes_are_kept() -> None:
    table = np.random.default_rng(2).normal(size=(20, 6))
    table[:, 4] = np.nan
    train = fields_of(table)
    modes = leading_modes(train, 2)
    fields = train[:3].copy()
    fields[:, 0, 0] = np.nan
    prior = GaussianMixture(SCHEDULE, torch.zeros(1, 2), 1.0)
    probs = (0.1, 0.5, 0.9)
    found = fill_gaps(prior, fields, sd=0.1, modes=modes, num_draws=7, probs=probs, progress=False)
    assert found["draws"].dims == ("draw", "time", "lat", "lon")
    assert found["quantiles"].dims == ("quantile", "time", "lat", "lon")
    assert found["mean"].dims == found["sd"].dims == ("time", "lat", "lon")
    for name in ("time", "lat", "lon"):
        assert found[name].equals(fields[name])
    assert found["mean"].attrs["units"] == "degC"
    assert np.array_equal(found["mean"].isnull().all("time"), train.isnull().all("time"))
    assert np.array_equal(found["observed"], fields.notnull())
    ocean = np.isfinite(train.values[0])
    np.testing.assert_allclose(found["mean"].values[:, ocean], found["draws"].mean("draw").values[:, ocean])
    np.testing.assert_allclose(found["quantiles"].values[1][:, ocean], np.median(found["draws"], axis=0)[:, ocean])


def test_a_map_of_cells_leaves_out_land_and_gives_the_same_draws() -> None:
    prior = GaussianMixture(SCHEDULE, torch.zeros(1, 4), torch.as_tensor(covariance(4))[None])
    flat = xr.DataArray([[0.5, np.nan, np.nan, -0.3]], dims=("time", "cell"))
    table = np.full((1, 6), np.nan)
    table[0, [0, 1, 3, 5]] = flat.values[0]
    fields = fields_of(table)
    ocean = xr.DataArray([[True, True, False], [True, False, True]], dims=("lat", "lon"))
    options = {"sd": 0.1, "num_draws": 5, "num_levels": 5, "progress": False}
    found = fill_gaps(prior, fields, cells=ocean, **options)
    same = fill_gaps(prior, flat, **options)
    np.testing.assert_array_equal(found["draws"].values[:, :, ocean.values], same["draws"].values)
    assert found["draws"].isnull().values[:, :, ~ocean.values].all()


@pytest.mark.parametrize("method", ["hmc", "reverse"])
def test_cells_seen_almost_exactly_are_kept(method: str) -> None:
    sd, fields = 1e-3, gapped()
    prior = GaussianMixture(SCHEDULE, torch.zeros(1, 6), torch.as_tensor(covariance(6))[None])
    found = fill_gaps(prior, fields, sd=sd, method=method, num_draws=50, progress=False)
    off = np.abs(found["draws"] - fields).values[:, found["observed"].values]
    assert off.max() < 6 * sd
    repeated = fill_gaps(prior, fields, sd=sd, method=method, num_draws=50, progress=False)
    assert repeated.identical(found)
    other = fill_gaps(prior, fields, sd=sd, method=method, num_draws=50, seed=1, progress=False)
    assert not other["draws"].equals(found["draws"])


def test_a_network_of_coordinates_goes_in() -> None:
    train = fields_of(np.random.default_rng(4).multivariate_normal(np.zeros(12), covariance(12), 40), 3, 4)
    modes = leading_modes(train, 4, noise=0.3)
    coordinates = modes.coordinates(train)
    assert coordinates.dims == ("time", "mode")
    np.testing.assert_allclose(coordinates.values.T @ coordinates.values / 40, np.eye(4), atol=1e-10)
    problem = make_problem(coordinates, hidden=8, blocks=1, gamma=(-3.0, 5.0))
    result = fit_svi(problem, num_steps=5, num_samples=2, progress=False)
    fields = train[:2].copy()
    fields[:, 1] = np.nan
    found = fill_gaps(make_field(result), fields, sd=0.1, modes=modes, num_draws=10, progress=False)
    assert np.isfinite(found["draws"].values).all()
    assert (found["sd"].values[:, 1] > found["sd"].values[:, 0]).mean() > 0.7


# -- what is refused --------------------------------------------------------------------------------------------------


PRIOR = GaussianMixture(SCHEDULE, torch.zeros(1, 6), 1.0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sd": 0.0}, "sd=0.0"),
        ({"sd": math.nan}, "sd=nan"),
        ({"method": "ddim"}, "method='ddim'"),
        ({"probs": (0.5, 1.5)}, "probs="),
        ({"step_size": -1.0}, "step_size=-1.0"),
        ({"num_draws": 0}, "num_draws=0"),
        ({"num_levels": 1}, "num_levels=1"),
        ({"num_steps": 0}, "num_steps=0"),
        ({"method": "reverse", "num_steps": 3}, "num_steps=3 is not used with method='reverse'"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ProblemError, match=words):
        fill_gaps(PRIOR, gapped(), **({"sd": 0.1} | options))


def test_a_prior_of_another_size_is_refused() -> None:
    with pytest.raises(ProblemError, match=r"data \(6,\) and there are 8 cells"):
        fill_gaps(PRIOR, gapped(8), sd=0.1)


def test_values_that_cannot_be_used_are_refused() -> None:
    fields = gapped()
    infinite, empty = fields.copy(), fields.copy()
    infinite[2, 1, 0] = np.inf
    empty[1] = np.nan
    with pytest.raises(DataError, match=r"fields\[2, 1, 0\] is infinite"):
        fill_gaps(PRIOR, infinite, sd=0.1)
    with pytest.raises(DataError, match="no cell of field 1 is observed"):
        fill_gaps(PRIOR, empty, sd=0.1)
    with pytest.raises(DataError, match="first axis counts fields"):
        fill_gaps(PRIOR, fields[0, 0], sd=0.1)
    ocean = xr.ones_like(fields[0], dtype=bool).drop_vars("time")
    ocean[0, 1] = False  # field 0 is observed there
    with pytest.raises(DataError, match="cells that the prior does not have"):
        fill_gaps(PRIOR, fields, sd=0.1, cells=ocean)
    with pytest.raises(DataError, match="other values of 'lat'"):
        fill_gaps(PRIOR, fields, sd=0.1, cells=ocean.assign_coords(lat=[5.0, 15.0]))
    with pytest.raises(DataError, match="other cells"):
        fill_gaps(PRIOR, fields, sd=0.1, cells=ocean[:, :2])


def test_scores_that_are_not_finite_say_where() -> None:
    broken = FunctionField(SCHEDULE, (6,), lambda z, t: z * math.nan)
    with pytest.raises(ProblemError, match="at t=1"):
        fill_gaps(broken, gapped(), sd=0.1, num_draws=3, progress=False)


def test_modes_want_complete_fields() -> None:
    train = fields_of(np.random.default_rng(5).normal(size=(20, 6)))
    modes = leading_modes(train, 2)
    assert isinstance(modes, Modes)
    holes = train.copy()
    holes[3, 0, 0] = np.nan
    with pytest.raises(DataError, match="gaps"):
        leading_modes(holes, 2)
    with pytest.raises(DataError, match="missing"):
        modes.coordinates(holes)
    with pytest.raises(DataError, match="num_modes=6"):
        leading_modes(train, 6)
    with pytest.raises(DataError, match="noise=0"):
        leading_modes(train, 2, noise=0.0)
    with pytest.raises(ProblemError, match="either modes"):
        fill_gaps(PRIOR, train, sd=0.1, modes=modes, cells=modes.mean.notnull())
