"""SIGTERM ends a run soon, whatever it does, and keeps what was saved.

The bar of two seconds is measured by benchmarks/faults.py; the limit here is wide, for machines that are busy.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from inference_models import ExactKernel, StuckKernel, mean_problem

from probmodels.inference import Result, run_mcmc
from probmodels.inference.runtime.checkpoint import ChainStore

LIMIT = 10.0
short = partial(run_mcmc, num_samples=50, warmup_steps=20, num_chains=2, chain_method="sequential", progress=False)


def terminated(script: str, *arguments: str, **variables: str) -> tuple[int, str]:
    """Exit status and errors of a script that gets SIGTERM when it has printed a line."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]), **variables}
    command = [sys.executable, "-c", script, *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, text=True, **pipes) as running:
        said = running.stdout.readline()
        began = time.monotonic()
        running.terminate()
        _, errors = running.communicate(timeout=60)
    assert said, errors
    assert time.monotonic() - began < LIMIT
    return running.returncode, errors


STAGES = """
import sys
from inference_models import StuckKernel, mean_problem
from probmodels.inference import run_mcmc
run_mcmc(mean_problem(kernel=StuckKernel), num_samples=50, warmup_steps=20, num_chains=2, progress=False,
         chain_method=sys.argv[1], checkpoint=sys.argv[2], checkpoint_every=0.0)
"""


@pytest.mark.parametrize(("stage", "saved"), [("setup", 0), ("warm-up", 10), ("sampling", 40)])
@pytest.mark.parametrize("method", ["sequential", pytest.param("process", marks=pytest.mark.slow)])
def test_a_sweep_that_does_not_end_is_left_and_the_run_resumes(tmp_path, method, stage, saved):
    status, errors = terminated(STAGES, method, str(tmp_path / "run"), STUCK_IN=stage)
    assert status == -signal.SIGINT  # as Python ends by KeyboardInterrupt
    assert "KeyboardInterrupt: stopped after" in errors
    assert "repeat the same call to resume" in errors
    found = [ChainStore(tmp_path / "run" / f"chain-{chain}").resume() for chain in range(2)]
    # Chains in processes run side by side, and the signal comes when the first of them is stuck.
    assert max(0 if chain is None else chain[1] for chain in found) == saved
    resumed = short(mean_problem(kernel=StuckKernel), checkpoint=tmp_path / "run")
    assert resumed.posterior.identical(short(mean_problem(kernel=ExactKernel)).posterior)


PHASES = """
import sys, torch
from inference_models import mean_problem
from probmodels.inference import run_mcmc
from probmodels.inference.mcmc import metric
from probmodels.inference.programs.potential import Potential

def hang(*args, **options):
    print("there", flush=True)
    while True:
        torch.linalg.eigh(torch.randn(200, 200))

if sys.argv[1] == "capturing the graph":
    Potential.captured = hang
else:
    metric.find_paths = hang
run_mcmc(mean_problem(), kernel="chees", progress=False)
"""


@pytest.mark.parametrize("phase", ["capturing the graph", "finding starting points"])
def test_what_comes_before_the_first_sweep_is_left(phase):
    status, errors = terminated(PHASES, phase)
    assert status == -signal.SIGINT  # as Python ends by KeyboardInterrupt
    assert "KeyboardInterrupt: stopped after 0 of" in errors


FIT = """
import sys, time
from inference_models import mean_problem
from probmodels.guides import with_guide
from probmodels.inference import fit_svi

def slow(step):
    if step.number == 20:
        print("there", flush=True)
        time.sleep(60)

fit_svi(with_guide(mean_problem(guide=None), "mean_field"), num_steps=40, checkpoint=sys.argv[1], checkpoint_every=0.0,
        callbacks=[slow], progress=False)
"""


def test_a_step_of_a_fit_that_does_not_end_is_left(tmp_path):
    status, errors = terminated(FIT, str(tmp_path))
    assert status == -signal.SIGINT  # as Python ends by KeyboardInterrupt
    assert f"KeyboardInterrupt: stopped after step 20 of 40: the state is saved in {tmp_path}" in errors


LIBRARY = """
import torch
from probmodels.inference.runtime.ops import Interrupts

with Interrupts():
    print("there", flush=True)
    while True:
        torch.linalg.eigvals(torch.randn(2500, 2500))  # does not come back to Python for seconds
"""


def test_a_long_call_of_a_library_ends_with_the_process():
    status, _ = terminated(LIBRARY, OMP_NUM_THREADS="1")
    assert status in (-signal.SIGINT, 128 + signal.SIGTERM)  # the former where the call was over in time


OUTPUTS = """
import sys, time
from probmodels.cli import runs

write = runs.write
if len(sys.argv) == 3:
    def slow(*args, **options):
        print("there", flush=True)
        time.sleep(60)
    runs.write = slow
spec = {
    "method": "hierarchical_mixture",
    "data": {"name": "petals", "num_rows": 100},
    "inference": {"engine": "em", "num_rounds": 2, "num_samples": 10, "phases": [{"objective": "wake"}]},
    "output": {"path": sys.argv[1]},
}
runs.execute(spec, strict=False, quiet=True)
"""


@pytest.mark.slow
def test_a_command_that_writes_its_outputs_is_ended_and_writes_them_when_it_is_repeated(tmp_path):
    folder = tmp_path / "run"
    status, _ = terminated(OUTPUTS, str(folder), "slow")
    assert status == -signal.SIGTERM
    assert not (folder / "report.html").exists()
    before = (folder / "result.nc").read_bytes()
    subprocess.run([sys.executable, "-c", OUTPUTS, str(folder)], check=False, capture_output=True)
    assert (folder / "report.html").exists()
    assert (folder / "result.nc").read_bytes() == before
    Result.load(folder)
