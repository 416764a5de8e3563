"""The published conditionals on a problem of ours: same format, same ballpark, clear refusals."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from probmodels import run_mcmc
from probmodels.bayesian_svd import make_problem
from probmodels.bayesian_svd.published.compatibility import published_gibbs
from probmodels.errors import ProblemError


def data(n: int = 14, m: int = 12, gap: bool = False) -> xr.DataArray:
    rng = np.random.default_rng(3)
    x, t = np.linspace(0, 1, n), np.linspace(0, 1, m)
    values = 5 * np.outer(np.sin(3 * x), np.cos(6 * t)) + 0.2 * rng.standard_normal((n, m)) + 1.5
    if gap:
        values[2, 3] = np.nan
    return xr.DataArray(values, dims=("cell", "time"), coords={"cell": x, "time": t})


OPTIONS = {"rank": 1, "length_scales_space": [0.2, 0.4, 0.8], "tail": 0.0, "area_weights": False}


@pytest.mark.slow
def test_one_strong_mode_agrees_with_the_exact_sampler() -> None:
    # For one mode the published conditionals are coherent up to the power of d, which a strong mode does not feel.
    problem = make_problem(data(), fixed_effects=(), **OPTIONS)
    run = {"num_samples": 600, "warmup_steps": 200, "num_chains": 2, "chain_method": "sequential", "progress": False}
    ours, theirs = run_mcmc(problem, **run), run_mcmc(problem, kernel=published_gibbs, **run)
    for name in ("d", "sigma"):
        a, b = (r.posterior[name] for r in (ours, theirs))
        error = np.abs(a.mean(("chain", "draw")) - b.mean(("chain", "draw"))) / a.std(("chain", "draw"))
        assert float(error.max()) < 0.4, name  # sd units; 1200 correlated draws give about 0.1 each
    assert theirs.posterior["U"].dims == ours.posterior["U"].dims
    overlap = np.abs(
        (ours.posterior["U"].mean(("chain", "draw")) * theirs.posterior["U"].mean(("chain", "draw"))).sum()
    )
    assert float(overlap) > 0.98


def test_fixed_effects_come_in_the_units_of_the_data() -> None:
    run = {"num_samples": 200, "warmup_steps": 100, "num_chains": 1, "chain_method": "sequential", "progress": False}
    result = run_mcmc(make_problem(data(), effect_scale=10.0, **OPTIONS), kernel=published_gibbs, **run)
    effects = result.posterior["fixed_effects"]
    assert effects.dims == ("chain", "draw", "cell", "effect")
    signal = np.einsum("cdnk,cdk,cdmk->cdnm", *(result.posterior[name].values for name in ("U", "d", "V")))
    bases = result.tree["constant_data"]
    signal = bases["basis_space_matrix"].values @ signal @ bases["basis_time_matrix"].values.T
    fit = (signal + effects.values).mean((0, 1))
    assert np.sqrt(((fit - data().values) ** 2).mean()) < 0.3  # the noise of the data has sd 0.2


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        (lambda: make_problem(data(), **OPTIONS), "effect_scale=10"),
        (lambda: make_problem(data(gap=True), effect_scale=10.0, **OPTIONS), "neither gaps nor"),
    ],
)
def test_what_the_paper_does_not_cover_is_refused(problem, message: str) -> None:
    with pytest.raises(ProblemError, match=message):
        published_gibbs(problem())
