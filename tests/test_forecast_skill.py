"""Skill of past forecasts of a field, from rolling origins, beside simple forecasts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from typer.testing import CliRunner

from probmodels import run_mcmc
from probmodels.bayesian_svd import make_problem
from probmodels.bayesian_svd.forecasts.rolling import forecast_skill, skill_sentence
from probmodels.cli import app
from probmodels.errors import SummaryError
from probmodels.inference.result import Result

MONTHS = (np.datetime64("1980-01", "M") + np.arange(240)).astype("datetime64[ns]")


def fitted(decay: float) -> Result:
    """Two modes of 25 cells whose series persist."""
    rng = np.random.default_rng(0)
    series = rng.standard_normal((len(MONTHS), 2))
    for t in range(1, len(MONTHS)):
        series[t] = decay * series[t - 1] + np.sqrt(1 - decay**2) * series[t]
    y, x = np.meshgrid(np.linspace(0, 2, 5), np.linspace(0, 3, 5), indexing="ij")
    values = np.einsum("tk,kij->tij", series * [2.0, 1.0], np.stack([np.cos(y) * np.cos(x), np.sin(x + y)]))
    values += 0.3 * rng.standard_normal(values.shape)
    coords = {"time": MONTHS, "lat": np.arange(20.0, 45, 5), "lon": np.arange(180.0, 220, 8)}
    data = xr.DataArray(values, coords, ("time", "lat", "lon"), attrs={"units": "degC"})
    options = {"num_samples": 30, "warmup_steps": 30, "num_chains": 1, "progress": False}
    return run_mcmc(make_problem(data, rank=2, series="ar1", num_length_scales=3), chain_method="sequential", **options)


@pytest.fixture(scope="module")
def persistent() -> Result:
    return fitted(0.9)


def test_a_model_that_is_right_beats_what_is_not(persistent: Result) -> None:
    said: list[str] = []
    found = forecast_skill(persistent, steps=6, num_samples=60, progress=False, say=said.append)
    assert "23 origins, about" in said[1]
    ratio, upper = (found[name].sel(forecast=["climatology", "persistence"]) for name in ("ratio", "ratio_upper"))
    assert (ratio < 0.95).all()
    assert (upper < 1).all()
    assert float(found["ratio"].sel(forecast="linear inverse model")) == pytest.approx(1, abs=0.1)
    assert float(found["coverage"].sel(forecast="Bayesian SVD").mean()) == pytest.approx(0.8, abs=0.1)
    assert (np.diff(found["crps"].sel(forecast="AR(1)")) > -0.05).all()
    assert "better than climatology, persistence" in skill_sentence(found)


def test_without_persistence_nothing_is_gained_over_climatology() -> None:
    found = forecast_skill(fitted(0.0), steps=3, num_samples=60, progress=False)
    assert float(found["ratio"].sel(forecast="climatology")) == pytest.approx(1, abs=0.04)
    assert float(found["ratio"].sel(forecast="persistence")) < 0.85


def test_the_command_writes_scores_by_lead(persistent: Result, tmp_path: Path) -> None:
    folder = persistent.save(tmp_path / "run")
    command = [
        "skill",
        str(folder),
        "--steps",
        "2",
        "--every",
        "6",
        "--num-samples",
        "20",
        "--out",
        str(tmp_path / "s.csv"),
    ]
    found = CliRunner().invoke(app, command)
    assert found.exit_code == 0, found.output
    assert "By the CRPS of 12 origins" in found.output
    table = pd.read_csv(tmp_path / "s.csv")
    assert len(table) == 5 * 2
    assert set(table.columns) == {"forecast", "lead", "crps", "rmse", "coverage"}


def test_too_short_a_rest_is_refused(persistent: Result) -> None:
    with pytest.raises(SummaryError, match=r"origins are left after share=0\.9"):
        forecast_skill(persistent, share=0.9, progress=False)
