"""The main job on ERSST v5 as users get it: a served subset of the North Pacific with a mislabelled calendar."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from probmodels import Result, run_mcmc
from probmodels.bayesian_svd import make_problem
from probmodels.bayesian_svd.checks import check_model
from probmodels.bayesian_svd.eof import compare_eof
from probmodels.bayesian_svd.summary import summarise_modes
from probmodels.datasets.sst import load_sst


@pytest.fixture(scope="module")
def result(test_data: Callable[[str], Path]) -> Result:
    field = load_sst(str(test_data("sst/ersst_v5_north_pacific_1950_2019.nc")), period="2000:2019")
    problem = make_problem(field, rank=3, fixed_effects=["intercept", "trend"], num_length_scales=6, tail=1e-4)
    return run_mcmc(problem, num_samples=60, warmup_steps=40, num_chains=1, chain_method="sequential", progress=False)


def test_patterns_are_those_of_the_eofs(result: Result) -> None:
    modes = summarise_modes(result.tree)
    comparison = compare_eof(result.tree, modes)
    assert (comparison["pattern_correlation"].values > 0.97).all()  # 232 months leave little noise in three modes
    assert modes["mode_mean"].sizes == {"mode": 3, "lat": 19, "lon": 51}


def test_the_pacific_decadal_pattern_leads(result: Result) -> None:
    first = summarise_modes(result.tree)["mode_mean"].sel(mode=1)
    centre = first.sel(lat=slice(35, 43), lon=slice(170, 205))
    coast = first.sel(lat=slice(45, 58), lon=slice(218, 236))
    assert float(centre.mean()) * float(coast.mean()) < 0  # the horseshoe: central Pacific against the American coast
    assert float(np.abs(centre).mean()) > 0.3  # degC per standard deviation of the PC


def test_the_calendar_is_mended_and_said(result: Result) -> None:
    mends = json.loads(result.tree["constant_data"].attrs["mends"])
    assert any("360_day" in sentence for sentence in mends)
    time = result.tree["constant_data"]["time"].values
    assert (str(time[0])[:7], str(time[-1])[:7]) == ("2000-01", "2019-04")


@pytest.mark.slow
def test_winters_with_masked_ice_are_of_the_model_of_correlated_noise(test_data: Callable[[str], Path]) -> None:
    path = str(test_data("sst/ersst_v5_north_pacific_1950_2019.nc"))
    field = load_sst(path, season="DJF", ice=-1.79)
    effects = ["intercept", "trend"]
    problem = make_problem(field, rank=4, fixed_effects=effects, series="ar1", noise="correlated")
    seen = np.isfinite(problem.data["data"].values)
    assert seen.all(axis=0).mean() < 0.5  # most winters have a gap
    found = run_mcmc(problem, num_samples=200, warmup_steps=150, num_chains=1, progress=False)
    assert [x.verdict for x in check_model(found) if x.harmful] == []
