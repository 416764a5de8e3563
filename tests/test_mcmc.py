"""run_mcmc: exact posteriors, equal draws whatever the method, interruption and resume, failures."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from inference_models import SCALE, ExactKernel, SlowKernel, data, exact, mean_problem, normal_model
from pyro.infer.reparam import LocScaleReparam

from probmodels.errors import ChainError, CheckpointError, ProblemError
from probmodels.inference import NUTSKernel, Problem, run_mcmc
from probmodels.inference.diagnostics.convergence import convergence

short = partial(run_mcmc, num_samples=40, warmup_steps=10, num_chains=2, chain_method="sequential", progress=False)


def check_mean_and_sd(draws, mean, sd, z=4.5):
    """Mean within z Monte Carlo errors, sd within z of its own (var of a normal's sample sd is sd^2 / 2 ess)."""
    found = convergence(draws)
    ess = np.minimum(found["ess_bulk"], draws.shape[0] * draws.shape[1])
    assert np.all(np.abs(draws.mean((0, 1)) - mean) < z * sd / np.sqrt(ess))
    assert np.all(np.abs(draws.std((0, 1)) / sd - 1) < z / np.sqrt(ess))  # half the ess: squares mix no slower here


def test_nuts_finds_a_conjugate_posterior():
    y = torch.tensor([[0.5, 1.0, 0.2], [-1.0, -2.0, 0.3]], dtype=torch.float64)
    problem = Problem("rows", normal_model, args=(y,), coords={"row": ["a", "b"]})
    result = run_mcmc(
        problem, num_samples=200, warmup_steps=150, num_chains=2, chain_method="sequential", seed=1, progress=False
    )
    theta = result.posterior["theta"]
    assert theta.dims == ("chain", "draw", "row", "theta_dim_1")
    assert theta.dtype == np.float64
    precision = 1 / 4 + y.shape[1] / SCALE**2
    check_mean_and_sd(theta.values[..., 0], y.numpy().sum(1) / SCALE**2 / precision, precision**-0.5)
    stats = result.tree["sample_stats"]
    assert stats["diverging"].dtype == bool
    assert not stats["diverging"].any()
    assert 0.6 < float(stats["acceptance_rate"].mean()) < 0.98  # the target is 0.8
    assert set(stats.data_vars) >= {"lp", "energy", "step_size", "n_steps", "tree_depth"}
    assert result.diagnose(ess_min=100, rhat_max=1.05).ok


def raw_regression(x, y):
    beta = pyro.sample("beta", dist.Normal(y.new_zeros(2), 1e7).to_event(1))
    log_sigma = pyro.sample("log_sigma", dist.Normal(y.new_tensor(10.0), 10.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(beta[0] + beta[1] * x, log_sigma.exp()), obs=y)


def test_nuts_moves_on_raw_scales_as_on_standardised_ones():
    rng = np.random.default_rng(0)
    x = rng.normal(67.0, 3.8, 300)
    y = -60000.0 + 1250.0 * x + 19000.0 * rng.standard_normal(300)
    problem = Problem("raw", raw_regression, args=(torch.tensor(x), torch.tensor(y)))
    result = run_mcmc(problem, kernel="nuts", chain_method="sequential", num_chains=1, num_samples=150,
                      warmup_steps=80, progress=False)  # fmt: skip
    columns = np.stack([np.ones(300), x], 1)
    inverse = np.linalg.inv(columns.T @ columns)
    fitted = inverse @ columns.T @ y
    sd = np.sqrt(((y - columns @ fitted) ** 2).sum() / (298 - 2) * inverse.diagonal())  # of Student's t
    check_mean_and_sd(result.posterior["beta"].values, fitted, sd)
    assert float(result.tree["sample_stats"]["n_steps"].mean()) < 12  # a mass matrix learned from far away: hundreds


def scaled_model(y):
    scale = pyro.sample("scale", dist.LogNormal(y.new_zeros(()), 0.5))
    pyro.sample("w", dist.Normal(y.new_zeros(()), scale))
    pyro.sample("p", dist.Dirichlet(y.new_ones(3)))


def test_nuts_exports_reparametrised_and_constrained_sites():
    problem = Problem("scaled", scaled_model, args=(data(),), reparam={"w": LocScaleReparam(0.0)})
    result = short(problem, num_samples=150, warmup_steps=100, num_chains=1)
    assert set(result.posterior.data_vars) == {"scale", "w", "p"}
    check_mean_and_sd(np.log(result.posterior["scale"].values), 0.0, 0.5)
    np.testing.assert_allclose(result.posterior["p"].sum("p_dim_0"), 1, atol=1e-9)
    check_mean_and_sd(result.posterior["p"].values[..., 0], 1 / 3, np.sqrt(2 / 9 / 4))
    centred = short(replace(problem, reparam={}), num_samples=5, num_chains=1)
    assert not np.array_equal(centred.posterior["w"], result.posterior["w"][:, :5])


def test_custom_kernel_is_exact_and_the_rest_is_filled_in():
    result = short(mean_problem(), num_samples=1500)
    mean, sd = exact(data())
    posterior = result.posterior
    check_mean_and_sd(posterior["mu"].values, mean, sd)
    np.testing.assert_array_equal(posterior["twice"], 2 * posterior["mu"])
    assert posterior["new"].dims == ("chain", "draw", "obs")
    assert list(posterior["obs"].values) == list("abcdef")
    residual = posterior["new"] - posterior["mu"]
    check_mean_and_sd(residual.values, 0.0, SCALE)
    assert result.tree["observed_data"]["y"].dims == ("obs",)
    assert result.tree.attrs["engine"] == "mcmc"


def test_draws_do_not_depend_on_method_workers_or_number_of_chains():
    one = short(mean_problem(), num_chains=3)
    two = short(mean_problem(), num_chains=3, chain_method="process", num_workers=1)
    fewer = short(mean_problem(), num_chains=2)
    assert one.posterior.identical(two.posterior)
    assert fewer.posterior.identical(one.posterior.isel(chain=slice(2)))
    assert not np.array_equal(one.posterior["mu"][0], one.posterior["mu"][1])
    assert not np.array_equal(one.posterior["mu"], short(mean_problem(), num_chains=3, seed=1).posterior["mu"])


def test_thinning_keeps_every_nth_sweep():
    every = short(mean_problem(), num_samples=40)
    third = short(mean_problem(), num_samples=10, thin=3)
    np.testing.assert_array_equal(third.posterior["mu"], every.posterior["mu"][:, 2:30:3])


def test_global_state_is_given_back():
    torch.manual_seed(5)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    handler = signal.getsignal(signal.SIGINT)
    short(mean_problem())
    assert torch.equal(before, torch.get_rng_state())
    assert torch.get_num_threads() == threads
    assert signal.getsignal(signal.SIGINT) is handler


class StopAfter:
    """Raises SIGINT once the clock of the chain says so."""

    def __init__(self, sweeps):
        self.sweeps = sweeps

    def __call__(self, problem):
        kernel = self.kernel_class(problem)
        sample, left = kernel.sample, [self.sweeps]

        def interrupting(params):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGINT)
            return sample(params)

        kernel.sample = interrupting
        return kernel


@pytest.mark.parametrize("kernel_class", [ExactKernel, NUTSKernel])
@pytest.mark.parametrize("sweeps", [4, 25])
def test_resumed_run_gives_the_draws_of_an_uninterrupted_one(tmp_path, monkeypatch, kernel_class, sweeps):
    monkeypatch.setattr("probmodels.inference.mcmc.chains._REPORT_SECONDS", 0.0)
    monkeypatch.setattr(StopAfter, "kernel_class", kernel_class, raising=False)
    monkeypatch.setattr("probmodels.inference.mcmc.run.fingerprint", lambda value: "same")
    options = {"num_samples": 30, "warmup_steps": 20, "num_chains": 1}
    plain = short(mean_problem(), kernel=kernel_class, **options)
    options["checkpoint_every"] = 0.0
    with pytest.raises(KeyboardInterrupt, match="repeat the same call to resume"):
        short(mean_problem(), kernel=StopAfter(sweeps), checkpoint=tmp_path / "run", **options)
    resumed = short(mean_problem(), kernel=kernel_class, checkpoint=tmp_path / "run", **options)
    assert resumed.posterior.identical(plain.posterior)
    assert resumed.tree["sample_stats"].to_dataset().identical(plain.tree["sample_stats"].to_dataset())


def test_finished_runs_are_read_back_and_extended(tmp_path):
    folder = tmp_path / "run"
    first = short(mean_problem(), checkpoint=folder)
    failing = partial(ExactKernel, fail_at=1)
    files = {file: file.stat().st_mtime_ns for file in folder.rglob("*.safetensors")}
    again = short(mean_problem(), checkpoint=folder)
    assert again.posterior.identical(first.posterior)
    assert files == {file: file.stat().st_mtime_ns for file in folder.rglob("*.safetensors")}
    longer = short(mean_problem(), checkpoint=folder, num_samples=60, num_chains=3)
    assert longer.posterior.identical(short(mean_problem(), num_samples=60, num_chains=3).posterior)
    with pytest.raises(CheckpointError, match="kernel"):
        short(mean_problem(kernel=failing), checkpoint=folder)


def test_foreign_and_damaged_checkpoints_are_refused(tmp_path):
    folder = tmp_path / "run"
    short(mean_problem(), checkpoint=folder)
    for changes, options, message in (
        ({"args": (data() + 1,)}, {}, "args"),
        ({}, {"seed": 7}, r"seed \(checkpoint: 0, this run: 7\)"),
        ({"name": "other"}, {}, "problem"),
        ({}, {"warmup_steps": 11}, "warmup_steps"),
    ):
        with pytest.raises(CheckpointError, match=message):
            short(mean_problem(**changes), checkpoint=folder, **options)
    draws = next((folder / "chain-1").glob("draws-*"))
    draws.write_bytes(draws.read_bytes()[:-5] + b"wrong")
    with pytest.raises(CheckpointError, match="checksum differs"):
        short(mean_problem(), checkpoint=folder)
    draws.unlink()
    with pytest.raises(CheckpointError, match="file is missing"):
        short(mean_problem(), checkpoint=folder)
    (folder / "chain-0" / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match="delete the folder"):
        short(mean_problem(), checkpoint=folder)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="holds files but no checkpoint"):
        short(mean_problem(), checkpoint=tmp_path / "notes")
    with pytest.raises(CheckpointError, match="cannot write"):
        short(mean_problem(), checkpoint=tmp_path / "notes" / "a.txt" / "run")


SCRIPT = """
import sys
from inference_models import SlowKernel, mean_problem
from probmodels.inference import run_mcmc
print("ready", flush=True)
run_mcmc(mean_problem(kernel=SlowKernel), num_samples=300, warmup_steps=10, num_chains=2, progress=False,
         chain_method=sys.argv[1], checkpoint=sys.argv[2])
"""


@pytest.mark.parametrize(
    ("method", "number"),
    [pytest.param("process", signal.SIGINT, marks=pytest.mark.slow), ("sequential", signal.SIGTERM)],
)
def test_interrupted_process_saves_and_resumes(tmp_path, method, number):
    folder = tmp_path / "run"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", SCRIPT, method, str(folder)]
    running = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert running.stdout is not None
    running.stdout.readline()
    deadline = time.monotonic() + 60
    while not (folder / "chain-0").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    os.killpg(running.pid, number)  # as Ctrl-C does: parent and workers alike
    _, errors = running.communicate(timeout=60)
    assert running.returncode != 0
    assert "KeyboardInterrupt: stopped after" in errors
    assert "repeat the same call to resume" in errors
    assert (folder / "chain-0" / "state.json").exists()
    options = {"num_samples": 300, "warmup_steps": 10, "num_chains": 2}
    resumed = short(mean_problem(kernel=SlowKernel), checkpoint=folder, **options)  # resumed by the other method
    plain = short(mean_problem(kernel=ExactKernel), **options)  # the same chain, without the sleep
    assert resumed.posterior.identical(plain.posterior)


def test_time_limit_stops_and_says_so(tmp_path):
    with pytest.raises(TimeoutError, match="saved in"):
        short(mean_problem(kernel=SlowKernel), num_samples=5000, timeout=0.5, checkpoint=tmp_path / "run")


@pytest.mark.parametrize("method", ["process", "sequential"])
def test_a_failing_chain_is_reported(method):
    problem = mean_problem(kernel=partial(ExactKernel, fail_at=5))
    with pytest.raises((ChainError, FloatingPointError)) as caught:
        short(problem, chain_method=method)
    text = str(caught.value) + "".join(getattr(caught.value, "__notes__", []))
    assert "chain" in text
    assert "the kernel broke" in text


def test_a_dying_worker_is_reported():
    began = time.monotonic()
    with pytest.raises(ChainError, match=r"chain 0.* exit code 3"):
        short(mean_problem(kernel=partial(ExactKernel, die_at=5)), chain_method="process", num_chains=1)
    assert time.monotonic() - began < 40


def test_what_cannot_be_sent_to_a_process_says_how_to_mend_it():
    problem = mean_problem(kernel=lambda p: ExactKernel(p))
    with pytest.raises(ProblemError, match="top level of a module, or pass chain_method='sequential'"):
        short(problem, chain_method="process")
    assert short(problem, chain_method="sequential").posterior.sizes["draw"] == 40


@pytest.mark.slow
def test_session_models_run_in_processes_if_they_live_in_modules():
    """A program without a file: problems from modules work; problems of its own are refused with the remedy."""
    script = """
import inference_models as m
from probmodels.errors import ProblemError
from probmodels.inference import run_mcmc
options = dict(num_samples=5, warmup_steps=2, num_chains=1, progress=False)
print(run_mcmc(m.mean_problem(), **options).posterior.sizes["draw"])
def model(y): return m.mean_model(y)
try:
    run_mcmc(m.mean_problem(model=model), **options)
except ProblemError as error:
    print("refused", error)
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(
        [sys.executable, "-"], input=script, env=environment, capture_output=True, text=True, timeout=90
    )
    assert done.stdout.startswith("5\nrefused"), done.stderr
    assert "notebook" in done.stdout


def discrete_model(y):
    pyro.sample("k", dist.Bernoulli(0.5))


def bounded_model(y):
    with pyro.plate("obs", len(y)):
        pyro.sample("y", dist.Uniform(torch.zeros(()), 1.0), obs=y)


def test_problems_that_nuts_cannot_do_are_refused():
    with pytest.raises(ProblemError, match="no continuous latent site"):
        short(Problem("d", discrete_model, args=(data(),)))
    with pytest.raises(ProblemError, match="no continuous latent site"):
        short(Problem("b", bounded_model, args=(torch.full((3,), 0.5),)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "num_samples=0; give a whole number of at least 1"),
        ({"num_chains": 0}, "num_chains=0; give a whole number of at least 1"),
        ({"num_chains": 2.5}, "num_chains=2.5; give a whole number"),
        ({"seed": -1}, "seed=-1; give a whole number of at least 0"),
        ({"seed": True}, "seed=True; give a whole number"),
        ({"chain_method": "proces"}, "chain_method='proces'; choose one of .*; did you mean 'process'"),
        ({"kernel": "nut"}, "kernel='nut'; choose one of chees, nuts or .*; did you mean 'nuts'"),
        ({"kernel": 3}, "kernel=3; choose one of chees, nuts or a function"),
        ({"kernel": ExactKernel(mean_problem())}, "must be a function that makes a Kernel, not a ExactKernel"),
        ({"kernel": lambda: None}, "cannot make a kernel: too many positional arguments"),
        ({"kernel": lambda problem: problem}, "no Kernel"),
        ({"kernel_options": {"fail_att": 3}}, "unknown option 'fail_att' of ExactKernel; did you mean 'fail_at'"),
        ({"kernel_options": {"fail_at": "soon"}}, "kernel_options: fail_at='soon'; give a whole number or None"),
        ({"num_workers": 2}, "num_workers=2 is not used with chain_method='sequential'"),
        ({"client": "tcp://scheduler:8786"}, "client='tcp://scheduler:8786'; give a Client or None"),
        (
            {"client": SimpleNamespace(submit=len, scatter=len, processing=len)},
            "client=.* is not used with chain_method='sequential'",
        ),
        ({"checkpoint_every": 1.0}, "checkpoint_every=1.0 is not used with checkpoint=None"),
    ],
)
def test_arguments_out_of_range_are_refused(options, message):
    with pytest.raises(ProblemError, match=message):
        short(mean_problem(), **options)


@pytest.mark.parametrize(
    ("kernel", "options", "message"),
    [
        ("nuts", {"max_tree_depth": 0}, "max_tree_depth=0; give a whole number of at least 1 and of at most 20"),
        ("nuts", {"target_accept_prob": 1.0}, "target_accept_prob=1.0; give a number above 0 and below 1"),
        ("chees", {"metric": "dens"}, "metric='dens'; choose one of .*; did you mean 'dense'"),
        ("chees", {"compiler": "eager"}, "compiler='eager'; choose one of graph, inductor"),
        ("chees", {"num_chains": 3}, "unknown option 'num_chains' of ChEESKernel"),
    ],
)
def test_options_of_kernels_are_compared_with_their_constructors_before_anything_runs(kernel, options, message):
    def never(y):
        raise AssertionError("the model ran")

    with pytest.raises(ProblemError, match=f"mean: kernel_options: {message}"):
        run_mcmc(mean_problem(model=never), kernel=kernel, kernel_options=options, progress=False)


def test_alignment_and_invariants_are_applied():
    problem = mean_problem(align=lambda ds: ds.assign(mu=-ds["mu"]), invariants=lambda ds: ds[["mu"]] ** 2)
    result = short(problem)
    plain = short(mean_problem())
    np.testing.assert_array_equal(result.posterior["mu"], -plain.posterior["mu"])
    np.testing.assert_array_equal(result.tree["invariants"]["mu"], plain.posterior["mu"] ** 2)
    assert "mu (invariant)" in result.diagnose().table.index
    assert short(replace(problem, diagnosed=("mu",))).diagnose().table.index[0] == "mu"


class Compiled(ExactKernel):
    """A kernel with work to do before all chains."""

    @classmethod
    def prepare(cls, problem):
        cls.prepared = problem.name


@pytest.mark.parametrize(
    ("options", "phases"),
    [
        ({"kernel": "nuts"}, ["checking the problem", "capturing the graph", "finding starting points"]),
        ({"kernel": Compiled}, ["checking the problem", "compiling the sweep"]),
        ({"kernel": partial(Compiled, fail_at=None)}, ["checking the problem", "compiling the sweep"]),
        ({"chain_method": "process"}, ["checking the problem", "starting processes"]),
    ],
)
def test_the_bar_says_what_is_done_before_the_first_sweep(monkeypatch, options, phases):
    said = []
    monkeypatch.setattr("probmodels.inference.mcmc.chains._REPORT_SECONDS", 0.0)
    monkeypatch.setattr(
        "probmodels.inference.mcmc.chains.tqdm.set_description", lambda bar, text, *rest: said.append(text)
    )
    short(mean_problem(), **{"num_chains": 1, "num_samples": 4, "progress": True, **options})
    assert said == [f"mean, {doing}" for doing in (*phases, "warm-up", "sampling", "completing the draws")] + ["mean"]


def test_the_bar_is_there_before_the_problem_is_run(capsys):
    def slow(y):
        assert "mean, checking the problem" in capsys.readouterr().err
        raise KeyError("stop")

    with pytest.raises(KeyError):
        short(mean_problem(model=slow), progress=True)


def test_a_problem_is_computed_where_it_is_told_and_is_left_where_it_was():
    plain, here = short(mean_problem()), short(mean_problem(), device="cpu")
    assert here.posterior.identical(plain.posterior)
    for device in ("meta", "nowhere", torch.device("cuda", 99)):
        with pytest.raises(ProblemError, match="mean: cannot compute on device="):
            short(mean_problem(kernel=None), device=device)


class OnCPU(ExactKernel):
    on_cpu = True


def test_kernels_that_compute_on_the_cpu_refuse_problems_elsewhere(monkeypatch):
    monkeypatch.setattr("probmodels.inference.mcmc.run.find_device", lambda name, device: torch.device(device))
    monkeypatch.setattr(Problem, "validate", lambda problem, **options: problem)
    with pytest.raises(ProblemError, match="OnCPU computes on the CPU, and the problem lies on meta"):
        short(mean_problem(kernel=OnCPU), device="meta")


def test_a_checkpoint_belongs_to_a_kind_of_device(tmp_path):
    short(mean_problem(), checkpoint=tmp_path)
    run = tmp_path / "run.json"
    run.write_text(run.read_text().replace('"device": "cpu"', '"device": "cuda"'))
    with pytest.raises(CheckpointError, match=r"device \(checkpoint: \"cuda\", this run: \"cpu\"\)"):
        short(mean_problem(), checkpoint=tmp_path)
