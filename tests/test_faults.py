"""Runs that are killed, interrupted, or meet full disks, unwritable folders and damaged or foreign checkpoints."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from inference_models import auto_guide, data, mean_model, mean_problem
from safetensors import SafetensorError

from probmodels.errors import CheckpointError, ResultError
from probmodels.inference import fit_svi, run_mcmc
from probmodels.inference.runtime.checkpoint import (
    ChainStore,
    check_room,
    open_checkpoint,
    read_draws,
    read_state,
    write_state,
)
from probmodels.spec import run_spec

OPTIONS = {"num_samples": 30, "warmup_steps": 20, "num_chains": 4, "progress": False, "kernel": "chees"}
PACE = 0.004  # seconds that a sweep or step takes at least where a run shall be hit while it runs


def vectorized(**options: Any) -> Any:
    return run_mcmc(mean_problem(), **{**OPTIONS, **options})


def svi(**options: Any) -> Any:
    problem = mean_problem(guide=auto_guide(mean_model))
    return fit_svi(problem, **{"num_steps": 150, "num_samples": 10, "progress": False, "lr_decay": 0.1, **options})


@pytest.fixture(scope="module")
def plain() -> Any:
    """What vectorised chains give that nothing disturbs."""
    return vectorized()


def slow_vectorized(folder: str) -> None:
    """Run the same chains in a process of their own, slowly enough to be killed on the way."""
    append = ChainStore.append

    def paced(self, draw, stats):
        time.sleep(PACE)
        append(self, draw, stats)

    ChainStore.append = paced
    print("called", flush=True)
    vectorized(num_samples=150, checkpoint=folder, checkpoint_every=0.02)


def slow_svi(folder: str) -> None:
    """Run the same fit in a process of its own, slowly enough to be killed on the way."""
    print("called", flush=True)
    svi(num_steps=250, checkpoint=folder, checkpoint_every=0.02, callbacks=[lambda step: time.sleep(PACE)])


def start(function: str, folder: Path) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", f"import sys, test_faults; test_faults.{function}(sys.argv[1])", str(folder)]
    running = subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert running.stdout is not None
    assert running.stdout.readline() == "called\n"
    return running


def wait_for_step(folder: Path, step: int) -> None:
    """Wait until a checkpoint has got to a step."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        state = folder / "state.json"
        if state.exists() and json.loads(state.read_text())["step"] >= step:
            return
        time.sleep(0.005)
    raise AssertionError(f"no commit of step {step} in {folder}")


def assert_equal(result: Any, other: Any) -> None:
    assert result.posterior.identical(other.posterior)
    if "fit" in result.tree.children:
        for name in ("loss", "grad_norm"):
            np.testing.assert_array_equal(result.tree["fit"][name], other.tree["fit"][name])
    for name, value in result.params().items():
        assert torch.equal(value, other.params()[name])
    stats, others = (tree["sample_stats"].to_dataset() for tree in (result.tree, other.tree))
    assert stats.identical(others)


# -- kill -9 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "steps", "finish"),
    [
        pytest.param("slow_vectorized", (5, 60), partial(vectorized, num_samples=150), marks=pytest.mark.slow),
        ("slow_svi", (70,), partial(svi, num_steps=250)),
    ],
)
def test_killed_runs_resume_to_the_same_numbers(tmp_path, function, steps, finish):
    inner = tmp_path / "chains" if function == "slow_vectorized" else tmp_path
    for step in steps:
        running = start(function, tmp_path)
        wait_for_step(inner, step)
        os.killpg(running.pid, signal.SIGKILL)
        running.communicate(timeout=60)
        assert running.returncode == -signal.SIGKILL
    assert json.loads((inner / "state.json").read_text())["step"] < 170
    assert_equal(finish(checkpoint=tmp_path), finish())


class Killed(BaseException):
    """A simulated death of the process between two file operations."""


@pytest.fixture
def die_at(monkeypatch):
    """Make the n-th renaming or removal of a file the last thing that happens before or after it."""

    def arm(count: int, *, before: bool) -> None:
        left = [count]

        def wrap(function):
            def dying(*args, **kwargs):
                left[0] -= 1
                if left[0] == 0 and before:
                    raise Killed
                result = function(*args, **kwargs)
                if left[0] == 0:
                    raise Killed
                return result

            return dying

        monkeypatch.setattr(os, "replace", wrap(os.replace))
        monkeypatch.setattr(shutil, "disk_usage", wrap(shutil.disk_usage))

    return arm


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("count", range(1, 13))
def test_a_store_survives_death_at_every_file_operation(tmp_path, die_at, monkeypatch, count, before):
    """A chain of numbers 0, 1, 2, ... that commits every third: what is read back is what an undisturbed one wrote."""

    def run() -> torch.Tensor:
        with open_checkpoint(tmp_path / "run", {"seed": 1}) as folder:
            check_room(folder, 100)
            store = ChainStore(folder / "chain")
            store.verify()
            saved = store.resume()
            state, step = ({"x": torch.tensor(0)}, 0) if saved is None else saved
            assert int(state["x"]) == step == store.num_draws
            while step < 9:
                store.append({"x": state["x"]}, {})
                state, step = {"x": state["x"] + 1}, step + 1
                if step % 3 == 0:
                    store.commit(step, state)
            return store.read(9)["draw/x"]

    with monkeypatch.context():
        die_at(count, before=before)
        with pytest.raises(Killed):
            run()
        monkeypatch.undo()
    for name in (
        ".run.json.7.tmp",
        ".probmodels-probe-7",
        "chain/.state.json.7.tmp",
        "chain/.draws-1.safetensors.7.tmp",
    ):
        if (tmp_path / "run" / name).parent.exists():
            (tmp_path / "run" / name).write_bytes(b"half")  # which a process that is killed does not tidy up
    assert run().tolist() == list(range(9))
    assert [file.name for file in (tmp_path / "run").rglob(".*")] == [".lock"]
    assert len(list((tmp_path / "run" / "chain").glob("state-*"))) == 1


def test_a_second_commit_of_a_step_leaves_the_first_whole_until_it_is_done(tmp_path, monkeypatch):
    write_state(tmp_path, 5, {"x": torch.tensor(1.0)}, {})

    def fail(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("probmodels.inference.runtime.checkpoint.write_json", fail)
        with pytest.raises(CheckpointError, match=r"cannot write .*state\.json.*No space left"):
            write_state(tmp_path, 5, {"x": torch.tensor(2.0)}, {})
    found = read_state(tmp_path)
    assert found is not None
    assert found[0]["x"] == 1
    write_state(tmp_path, 5, {"x": torch.tensor(3.0)}, {})
    found = read_state(tmp_path)
    assert found is not None
    assert found[0]["x"] == 3
    assert len(list(tmp_path.glob("state-*"))) == 1


# -- signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_vectorised_chains_that_are_interrupted_say_how_to_resume(tmp_path, monkeypatch, plain, number):
    from probmodels.inference.mcmc.chees import ChEESKernel

    sample = ChEESKernel.sample

    def hit(self, params):
        if self._count == 33:
            os.kill(os.getpid(), number)
        return sample(self, params)

    monkeypatch.setattr("probmodels.inference.mcmc.chains._REPORT_SECONDS", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(ChEESKernel, "sample", hit)
        message = rf"after 34 of 50 sweeps: draws and states are saved in {re.escape(str(tmp_path))}; repeat the same"
        with pytest.raises(KeyboardInterrupt, match=message):
            vectorized(checkpoint=tmp_path)
    assert json.loads((tmp_path / "chains" / "state.json").read_text())["chunks"][0]["draws"] == 14
    assert_equal(vectorized(checkpoint=tmp_path), plain)


# -- damaged and foreign ----------------------------------------------------------------------------------------------


@pytest.fixture
def no_sampling(monkeypatch):
    def fail(*args):
        raise AssertionError("a sweep was made")

    monkeypatch.setattr("probmodels.inference.mcmc.chees.ChEESKernel.sample", fail)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """Checkpoint of vectorised chains that were stopped after some draws; to be copied."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("probmodels.inference.mcmc.chains._REPORT_SECONDS", 0.0)
        patch.setattr("probmodels.inference.mcmc.chains.Watch.stopping", property(lambda self: self._done[0] >= 40))
        with pytest.raises(TimeoutError, match="after 40 of 50"):
            vectorized(checkpoint=folder, checkpoint_every=0.0)
    return folder


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def change_a_number(folder: Path) -> None:
    """Damage a file so that it is still valid JSON."""
    text = (folder / "state.json").read_text()
    assert '"kernel/count": 40' in text
    (folder / "state.json").write_text(text.replace('"kernel/count": 40', '"kernel/count": 41'))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: flip(sorted(f.glob("draws-*"))[1], -3), r"draws-\d+\.safetensors is damaged: its checksum"),
        (lambda f: min(f.glob("draws-*")).unlink(), r"draws-0+\.safetensors is damaged: the file is missing"),
        (lambda f: flip(next(f.glob("state-*")), 100), r"state-0+40.* is damaged: its checksum"),
        (lambda f: os.truncate(f / "state.json", 200), r"state\.json is damaged: .*delete the folder"),
        (change_a_number, r"state\.json is damaged: its checksum"),
        (lambda f: (f / "state.json").write_text("[]"), r"state\.json is damaged: entries are missing"),
        (lambda f: os.truncate(f.parent / "run.json", 30), r"run\.json is damaged"),
        (lambda f: os.truncate(f.parent / "run.json", 0), r"run\.json is damaged"),
    ],
)
def test_damaged_checkpoints_are_refused_before_a_sweep(tmp_path, stopped, no_sampling, damage, message):
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    damage(folder / "chains")
    with pytest.raises(CheckpointError, match=message):
        vectorized(checkpoint=folder)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (partial(vectorized, seed=3), r"seed \(checkpoint: 0, this run: 3\)"),
        (partial(vectorized, num_chains=5), r"num_chains \(checkpoint: 4, this run: 5\)"),
        (
            partial(vectorized, kernel_options={"target_accept_prob": 0.7}),
            r"target_accept_prob \(checkpoint: null, this run: 0\.7\)",
        ),
        (partial(vectorized, warmup_steps=21), r"warmup_steps \(checkpoint: 20, this run: 21\)"),
        (partial(vectorized, init="uniform"), r"init \(checkpoint: null, this run: .uniform"),
        (partial(vectorized, kernel="nuts"), r"kernel"),
        (svi, r"engine \(checkpoint: .mcmc.*, this run: .svi"),
    ],
)
def test_checkpoints_of_other_runs_are_refused_before_a_sweep(stopped, no_sampling, run, message):
    files = {file: file.stat().st_mtime_ns for file in stopped.rglob("*")}
    with pytest.raises(CheckpointError, match=message):
        run(checkpoint=stopped)
    assert files == {file: file.stat().st_mtime_ns for file in stopped.rglob("*")}


def other_model(y):
    return mean_model(y)


def test_checkpoints_of_other_models_and_data_are_refused(stopped, no_sampling):
    for changes, message in (({"model": other_model}, "model .*other_model"), ({"args": (data() * 2,)}, "args")):
        with pytest.raises(CheckpointError, match=message):
            run_mcmc(mean_problem(**changes), checkpoint=stopped, **OPTIONS)


def test_copies_of_a_stopped_run_are_continued(tmp_path, stopped, plain):
    """Check that copies which are not damaged can be continued."""
    shutil.copytree(stopped, tmp_path / "run")
    assert_equal(vectorized(checkpoint=tmp_path / "run"), plain)


# -- folders and disks ------------------------------------------------------------------------------------------------


def test_folders_that_cannot_be_written_are_found_before_a_sweep(tmp_path, no_sampling):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot write to folder .*file/run.*choose another folder"):
        vectorized(checkpoint=tmp_path / "file" / "run")
    if os.geteuid() == 0:  # for whom every folder can be written
        return
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(CheckpointError, match="cannot write to folder"):
        vectorized(checkpoint=tmp_path / "locked")


def test_outputs_that_cannot_be_written_are_found_before_a_spec_is_run(tmp_path, monkeypatch):
    def fail(*args):
        raise AssertionError("data were read")

    monkeypatch.setattr("probmodels.spec.build_problem", fail)
    (tmp_path / "file").write_text("")
    (tmp_path / "result.nc").write_text("")
    spec = {"method": "bayesian_svd", "data": {"name": "sst"}, "model": {"rank": 2}}
    for path, message in ((tmp_path / "file" / "run", "cannot write to folder"), (tmp_path, "holds a result already")):
        with pytest.raises(ResultError, match=message):
            run_spec({**spec, "output": {"path": str(path)}})
    with pytest.raises(AssertionError, match="data were read"):
        run_spec({**spec, "output": {"path": str(tmp_path), "overwrite": True}})


@pytest.mark.parametrize("with_checkpoint", [True, False])
def test_a_disk_that_will_not_hold_the_draws_is_found_before_a_sweep(
    tmp_path, monkeypatch, no_sampling, with_checkpoint
):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(2_000_000, 1_000_000, 1_000_000))
    options = {"checkpoint": tmp_path} if with_checkpoint else {}
    with pytest.raises(CheckpointError, match=r"has 1 MB left.* about 3\.2 MB"):
        vectorized(num_samples=100_000, **options)  # 4 chains of one number of 8 bytes


def test_what_a_folder_holds_counts_as_part_of_what_it_needs(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(2000, 1000, 1000))
    (tmp_path / "chains").mkdir()
    (tmp_path / "chains" / "draws-0.safetensors").write_bytes(bytes(500))
    check_room(tmp_path, 1500)
    with pytest.raises(CheckpointError, match=r"has 1 kB left.* about 1\.1 kB"):
        check_room(tmp_path, 1600)


def test_a_disk_that_fills_up_leaves_earlier_commits(tmp_path, monkeypatch, plain):
    from safetensors.torch import save_file

    left = [7]

    def filling(tensors, path):
        left[0] -= 1
        if left[0] < 0:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save_file(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr("probmodels.inference.runtime.checkpoint.save_file", filling)
        with pytest.raises(CheckpointError, match=r"cannot write .*No space left on device.*free some space"):
            vectorized(checkpoint=tmp_path, checkpoint_every=0.0)
    assert not list(tmp_path.rglob("*.tmp"))
    assert json.loads((tmp_path / "chains" / "state.json").read_text())["step"] == 7
    assert_equal(vectorized(checkpoint=tmp_path), plain)


def full_disk(problem: Any) -> Any:
    """Kernel in whose process nothing can be written."""
    from probmodels.inference import NUTSKernel
    from probmodels.inference.runtime import checkpoint

    def fail(*args):
        raise OSError(28, "No space left on device")

    checkpoint.save_file = fail
    return NUTSKernel(problem)


@pytest.mark.slow
def test_a_disk_that_fills_up_under_a_worker_is_reported_alike(tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot write .*No space left on device.*free some space"):
        run_mcmc(
            mean_problem(),
            kernel=full_disk,
            num_samples=2,
            warmup_steps=2,
            num_chains=1,
            checkpoint=tmp_path,
            chain_method="process",
            progress=False,
        )


def test_a_disk_that_will_not_hold_a_fit_is_found_before_a_step(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(20_000, 10_000, 10_000))
    monkeypatch.setattr(
        "probmodels.inference.variational.training.Trainer.run", lambda trainer: pytest.fail("a step was made")
    )
    with pytest.raises(CheckpointError, match=r"has 10 kB left.* about 2\d\d kB"):
        svi(num_steps=3000, checkpoint=tmp_path)  # two copies of 3000 rows of four doubles


def test_a_disk_that_fills_up_under_safetensors_is_reported_alike(tmp_path, monkeypatch):
    def fail(*args):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("probmodels.inference.runtime.checkpoint.save_file", fail)
    with pytest.raises(CheckpointError, match=r"cannot write .*state-0.*No space left"):
        write_state(tmp_path, 0, {"x": torch.tensor(1.0)}, {})


# -- one run to a folder ----------------------------------------------------------------------------------------------


def test_a_folder_in_use_is_refused_until_its_run_has_ended(tmp_path):
    with open_checkpoint(tmp_path, {"seed": 1}):
        for run in (vectorized, svi):
            with pytest.raises(CheckpointError, match="another run is writing"):
                run(checkpoint=tmp_path)
    with open_checkpoint(tmp_path, {"seed": 1}):
        pass


def test_a_folder_is_free_again_when_its_run_was_killed(tmp_path):
    running = start("slow_svi", tmp_path)
    wait_for_step(tmp_path, 20)
    with pytest.raises(CheckpointError, match="another run is writing"):
        svi(num_steps=250, checkpoint=tmp_path)
    os.killpg(running.pid, signal.SIGKILL)
    running.communicate(timeout=60)
    svi(num_steps=250, checkpoint=tmp_path)


# -- draws ------------------------------------------------------------------------------------------------------------


def test_draws_of_several_stores_are_read_into_one_array(tmp_path):
    stores = [ChainStore(tmp_path / name) for name in "ab"]
    for place, store in enumerate(stores):
        store.resume()
        for draw in range(5):
            store.append({"x": torch.tensor([place, draw])}, {"lp": draw})
            if draw in (1, 4):
                store.commit(draw, {})
    found = read_draws(stores, 4)
    assert found["draw/x"].tolist() == [[[place, draw] for draw in range(4)] for place in (0, 1)]
    assert found["stat/lp"].tolist() == [[0, 1, 2, 3]] * 2
    with pytest.raises(CheckpointError, match="b holds 5 draws where 6 were expected"):
        read_draws(stores[1:], 6)


# -- outputs ----------------------------------------------------------------------------------------------------------


SPEC = """
method = "hierarchical_mixture"
[data]
name = "petals"
num_rows = 60
[inference]
engine = "em"
num_rounds = 120
num_samples = 30
checkpoint_every = 0.05
[[inference.phases]]
objective = "e_step"
lr = 0.02
[[inference.phases]]
objective = "wake"
lr = 0.1
[output]
path = "run"
"""


def command(folder: Path, *options: str) -> subprocess.Popen[str]:
    """The command line in a process of its own."""
    (folder / "spec.toml").write_text(SPEC)
    return subprocess.Popen(
        [sys.executable, "-m", "probmodels.cli", "run", "spec.toml", *options],
        cwd=folder,
        env={**os.environ, "MPLBACKEND": "agg"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["building the problem", "compiling", "writing to"])
@pytest.mark.parametrize("delay", [0.0, 0.4])
def test_a_command_that_is_killed_at_any_stage_ends_when_it_is_repeated(tmp_path, stage, delay):
    running = command(tmp_path)
    assert running.stderr is not None
    for line in running.stderr:
        if line.startswith(stage):
            break
    time.sleep(delay)
    os.killpg(running.pid, signal.SIGKILL)
    running.communicate(timeout=60)
    again = command(tmp_path)
    _, errors = again.communicate(timeout=300)
    whole = (tmp_path / "run" / "report.html").exists()
    assert whole, errors
    assert again.returncode in (0, 2), errors  # 2: the first run had written all before it was killed
    assert again.returncode == 0 or "holds a result already" in errors
    assert not list((tmp_path / "run").glob(".*.tmp"))
    assert (tmp_path / "run" / "summary.txt").exists()


def test_a_result_without_its_outputs_gets_them_by_the_same_command(tmp_path, monkeypatch, capsys):
    from probmodels.cli import runs
    from probmodels.cli.specs import run

    monkeypatch.chdir(tmp_path)
    (tmp_path / "spec.toml").write_text(SPEC.replace("120", "20"))
    with monkeypatch.context() as patch:

        def die(*args, **options):
            raise Killed

        patch.setattr(runs, "write", die)
        with pytest.raises(Killed):
            run(Path("spec.toml"), quiet=True)
    written = (tmp_path / "run" / "result.nc").stat().st_mtime_ns
    other = (tmp_path / "spec.toml").read_text().replace("num_rounds = 20", "num_rounds = 21")
    (tmp_path / "other.toml").write_text(other)
    with pytest.raises(Exception, match="holds a result already"):
        run(Path("other.toml"), quiet=True)
    run(Path("spec.toml"), quiet=True)
    assert "outputs are not complete" in capsys.readouterr().out
    assert (tmp_path / "run" / "report.html").exists()
    assert (tmp_path / "run" / "result.nc").stat().st_mtime_ns == written
    with pytest.raises(Exception, match="holds a result already"):
        run(Path("spec.toml"), quiet=True)


@pytest.mark.skipif(sys.platform == "win32", reason="limits of the size of files are those of POSIX")
@pytest.mark.parametrize("limit", [2_000, 30_000])
def test_results_that_a_disk_cannot_hold_are_a_result_error(tmp_path, limit):
    """The library of netCDF says so by an error of its own; a limit of the size of files stands for a full disk."""
    code = f"""
import resource, signal, sys
import numpy as np, xarray as xr
from probmodels.errors import ResultError
from probmodels.inference import Result

draws = np.random.default_rng(0).normal(size=(4, 20000))
tree = xr.DataTree.from_dict({{"/posterior": xr.Dataset({{"x": (("chain", "draw"), draws)}})}})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
try:
    Result(tree).save(sys.argv[1])
except ResultError as error:
    print("refused:", error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run")], capture_output=True, text=True, check=False
    )
    assert done.stdout.startswith("refused: cannot write a result to"), done.stderr[-2000:]
    assert not list((tmp_path / "run").glob("*.nc"))
