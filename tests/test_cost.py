"""Memory and time that are told, or refused, before they are spent."""

from __future__ import annotations

import re
import time

import numpy as np
import pytest
import xarray as xr

from probmodels import run_mcmc
from probmodels.bayesian_svd import make_problem
from probmodels.bayesian_svd.prepare import tiny
from probmodels.datasets import checks
from probmodels.datasets.sst import load_sst
from probmodels.errors import DataError, ProblemError
from probmodels.inference.mcmc import cost
from probmodels.inference.problem import Problem


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with one GiB free."""
    monkeypatch.setattr(checks, "free_memory", lambda: 2**30)
    monkeypatch.setattr("probmodels.inference.runtime.memory.free_memory", lambda: 2**30)


def field(num_times: int, lat: int = 4, lon: int = 5) -> xr.DataArray:
    values = np.random.default_rng(0).standard_normal((num_times, lat, lon))
    time = np.datetime64("1900-01", "M") + np.arange(num_times)
    coords = {"time": time.astype("datetime64[ns]"), "lat": np.arange(lat) + 10.0, "lon": np.arange(lon) + 180.0}
    return xr.DataArray(values, coords, ("time", "lat", "lon"), name="sst", attrs={"units": "degC"})


def test_a_field_too_large_to_load_is_refused_before_it_is_read(little_memory, monkeypatch):
    huge = field(24).isel(lat=[0] * 40, lon=[0] * 40).assign_coords(lat=np.arange(40.0), lon=np.arange(40.0))
    monkeypatch.setattr("probmodels.datasets.reading.chunks._COPIES", 5 * 6_000)
    with pytest.raises(
        DataError, match=r"24 times of 40 x 40 cells need about 8\.6 GiB, and 1\.0 GiB are free; .*--region"
    ):
        load_sst(huge)
    assert load_sst(huge, region="0,3,0,3").sizes["time"] == 24  # a part of it fits


def test_a_matrix_too_large_to_be_prepared_is_refused(little_memory, monkeypatch):
    data = field(40)
    make_problem(data, rank=1, series="iid")
    monkeypatch.setattr("probmodels.bayesian_svd.sides._COPIES", 10**6)
    with pytest.raises(DataError, match=r"20 cells x 40 times need about 6\.0 GiB.*coarser"):
        make_problem(data, rank=1, series="iid")


def test_draws_that_do_not_fit_are_refused_before_the_first_sweep(little_memory, monkeypatch):
    problem = tiny()

    def fail(*_):
        raise AssertionError("it ran")

    monkeypatch.setattr("probmodels.inference.mcmc.run.run_in_turn", fail)
    monkeypatch.setattr("probmodels.inference.mcmc.workers.run_in_processes", fail)
    for method in ("sequential", "process"):
        with pytest.raises(ProblemError, match=r"10000000 draws of 4 chains .* GiB are free; keep fewer draws"):
            run_mcmc(problem, num_samples=10**7, chain_method=method, progress=False)


def test_what_is_foreseen_grows_with_draws_chains_and_processes(monkeypatch):
    monkeypatch.setattr(cost, "num_processes", lambda chains, workers: min(workers or 2, chains))
    monkeypatch.setattr(tiny().kernel, "seconds_of_sweep", classmethod(lambda *_: 0.01))

    def foreseen(**options: int) -> tuple[str, float, str]:
        said = cost.foresee(tiny(), **options)
        pattern = r".* will take about (.*), and (.*) GiB of memory; summaries, files and figures another (.*)"
        found = re.fullmatch(pattern, said)
        return found[1], float(found[2]), found[3]

    # 1500 sweeps of 10 ms, 1.2 times as long beside others, after 5 s of starting processes
    assert foreseen(num_samples=1000, warmup_steps=500)[0] == "41 s"
    assert foreseen(num_samples=1000, warmup_steps=500, num_workers=1)[0] == "65 s"
    assert foreseen(num_samples=1000, warmup_steps=500, num_workers=4)[0] == "23 s"
    assert foreseen(num_samples=1000, warmup_steps=500, thin=20)[0] == "8.3 min"
    assert foreseen(num_samples=10**6)[1] > 3 * foreseen(num_samples=10**3)[1]
    assert foreseen(num_samples=10)[2] == "10 s"
    assert foreseen(num_samples=10**6)[2].endswith(("min", "h"))
    assert "4 chains of 1500 sweeps, 10 ms each, in 2 processes" in cost.foresee(tiny(), warmup_steps=500)


def test_nothing_is_foreseen_for_a_model_whose_kernel_cannot_tell():
    assert cost.foresee(Problem("plain", lambda: None)) is None


class Slow:
    """A kernel whose first sweep compiles."""

    initial_params: dict = {}  # noqa: RUF012
    pause = 0.3

    def sample(self, params):
        time.sleep(self.pause)
        self.pause = 0.004
        return params

    def export(self, params):
        time.sleep(0.004)
        return params


def test_the_time_of_a_sweep_holds_its_draw_and_no_compilation():
    assert 0.008 <= cost.seconds_of_sweep(Slow()) < 0.1


def test_a_kernel_tells_the_time_of_its_sweeps():
    small, large = (make_problem(field(num, 10, 14), rank=3, series="ar1") for num in (40, 4000))
    one, other = (problem.kernel.seconds_of_sweep(problem) for problem in (small, large))
    assert 0 < 2 * one < other
