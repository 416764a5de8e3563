"""Chains, problems and maps on a real Dask cluster and in processes: same numbers, and nothing lost to dead workers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import ranks_script
import torch
from distributed_models import default_dtype, infer, quick, quick_or_broken, quick_or_dead, shifted, simulate
from inference_models import ExactKernel, SlowKernel, mean_problem

from probmodels.errors import ChainError, CheckpointError, ProblemError
from probmodels.inference import Result, fit_svi, run_mcmc
from probmodels.inference.diagnostics.calibration import sbc
from probmodels.inference.distributed.many import MapError, dask_map, map_problems, process_map
from probmodels.inference.mcmc import dask as ours, run as run_module
from probmodels.inference.mcmc.chains import Watch
from probmodels.inference.programs.minibatch import Minibatches
from probmodels.inference.runtime.ops import chain_seed
from probmodels.inference.variational.data_parallel import Ranks, shared_sizes

distributed = pytest.importorskip("distributed")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:distributed"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # sockets of workers that were killed
]
short = partial(run_mcmc, num_samples=30, warmup_steps=10, num_chains=3, progress=False)


@pytest.fixture(scope="module")
def client():
    options = {"n_workers": 2, "threads_per_worker": 1, "processes": True, "dashboard_address": ":0"}
    with distributed.LocalCluster(**options) as cluster, distributed.Client(cluster) as client:
        yield client


@pytest.fixture
def kill_soon(client):
    """Kill, without a warning, the worker that runs a task whose name has the given prefix."""
    killed: list[int] = []
    threads = []

    def kill(prefix, after):
        def run():
            time.sleep(after)
            pids = client.run(os.getpid)
            while not killed:
                for worker, keys in client.processing().items():
                    if any(key.startswith(prefix) for key in keys) and worker in pids and not killed:
                        killed.append(pids[worker])
                        os.kill(pids[worker], signal.SIGKILL)
                time.sleep(0.02)

        threads.append(threading.Thread(target=run))
        threads[-1].start()
        return killed

    yield kill
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("kernel", [ExactKernel, pytest.param("nuts", marks=pytest.mark.slow)])
def test_draws_do_not_depend_on_where_chains_run(client, kernel):
    run = partial(short, mean_problem(), kernel=kernel, num_chains=2)
    results = [
        run(chain_method=method, client=client if method == "dask" else None) for method in ("sequential", "dask")
    ]
    assert results[0].posterior.identical(results[1].posterior)
    assert results[0].tree["sample_stats"].identical(results[1].tree["sample_stats"])


def interrupt_when_kept(folder):
    """Sends this process SIGINT once a chain has saved draws in the folder."""
    deadline = time.monotonic() + 60
    while not list(folder.glob("chain-*/draws-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("first", ["dask", "sequential"])
def test_an_interrupted_run_is_resumed_elsewhere(client, monkeypatch, tmp_path, first):
    monkeypatch.setattr(ours, "_LEG_SECONDS", 0.2)
    second = {"dask": "sequential", "sequential": "dask"}[first]
    run = partial(run_mcmc, mean_problem(), num_samples=100, warmup_steps=5, num_chains=3, seed=4, progress=False)
    clients = {"dask": client, "sequential": None}
    resumable = partial(run, kernel=SlowKernel, checkpoint=tmp_path / "run", checkpoint_every=0.1)
    thread = threading.Thread(target=interrupt_when_kept, args=(tmp_path / "run",))
    thread.start()
    with pytest.raises(KeyboardInterrupt, match="repeat the same call to resume"):
        resumable(chain_method=first, client=clients[first], num_samples=5000)
    thread.join()
    resumed = resumable(chain_method=second, client=clients[second])
    assert resumed.posterior.identical(run(kernel=ExactKernel, chain_method="sequential").posterior)


def test_a_chain_that_fails_says_how_and_the_others_are_saved(client, tmp_path):
    broken = partial(SlowKernel, fail_at=30)
    with pytest.raises(ChainError, match=r"(?s)chain \d failed.*FloatingPointError: the kernel broke"):
        short(mean_problem(), kernel=broken, chain_method="dask", client=client, checkpoint=tmp_path / "run")


class Local(ExactKernel):
    pass


def test_what_cannot_be_sent_to_a_cluster_is_refused(client, monkeypatch):
    dask = partial(short, mean_problem(), kernel=ExactKernel, chain_method="dask")
    with pytest.raises(ProblemError, match=r"no client was given; pass client=distributed.Client"):
        dask()
    with pytest.raises(ProblemError, match="client='tcp://scheduler:8786'; give a Client or None"):
        dask(client="tcp://scheduler:8786")

    with monkeypatch.context() as patch:  # nothing is prepared for a cluster that is out of reach
        patch.setattr(run_module, "_prepare", lambda *_: pytest.fail("prepared"))
        gone = distributed.Client(client.cluster)
        gone.close()
        with pytest.raises(ProblemError, match="the client is closed; pass client="):
            dask(client=gone)

    class Hidden(ExactKernel):
        pass

    with pytest.raises(ProblemError, match="top level of a module"):
        dask(kernel=Hidden, client=client)
    Local.__module__ = "__main__"
    Local.__qualname__ = "Local"
    import __main__

    __main__.Local = Local
    try:
        with pytest.raises(ProblemError, match="script or notebook"):
            dask(kernel=Local, client=client)
    finally:
        del __main__.Local


@pytest.mark.slow
def test_a_problem_that_keeps_failing_is_named_and_the_others_are_inferred_though_a_process_dies(tmp_path):
    """One process at a time: the first dies, the second infers one problem and fails at the other, the third fails."""
    problems = [shifted(0.0), shifted(1.0)]
    log = tmp_path / "log"
    run = partial(quick_or_dead, marker=tmp_path / "marker", log=log)
    with pytest.raises(MapError, match=r"1 of 2 problems failed.*\n  1 \(mean\): FloatingPointError") as caught:
        map_problems(problems, run, num_workers=1, progress=False)
    assert "the run broke" in caught.value.failures["1 (mean)"]
    right = quick(problems[0], seed=chain_seed(0, 0))
    assert caught.value.results["0 (mean)"].posterior.identical(right.posterior)
    (first, seed), (second, again) = [line.split() for line in log.read_text().splitlines()]
    assert first != second
    assert seed == again == str(chain_seed(0, 1))


def test_a_repeated_map_does_what_is_missing_and_refuses_what_is_foreign(client, tmp_path):
    problems = [shifted(0.0), shifted(1.0), shifted(0.5)]
    run = partial(map_problems, run=partial(quick_or_broken, log=tmp_path / "log"), client=client, progress=False)
    client.wait_for_workers(2)
    with pytest.raises(MapError, match="1 of 3 problems failed") as caught:
        run(problems, checkpoint=tmp_path / "map")
    assert list(caught.value.results) == ["0 (mean)", "2 (mean)"]
    workers, seeds = zip(*(line.split() for line in (tmp_path / "log").read_text().splitlines()), strict=True)
    assert len(set(workers)) == 2  # of two workers, the other one is preferred
    assert seeds == (str(chain_seed(0, 1)),) * 2
    before = (tmp_path / "map" / "problem-00000" / "result.nc").stat().st_mtime_ns
    (again,) = run(problems[:1], checkpoint=tmp_path / "map")
    assert before == (tmp_path / "map" / "problem-00000" / "result.nc").stat().st_mtime_ns
    assert again.posterior.identical(quick(problems[0], seed=chain_seed(0, 0)).posterior)
    with pytest.raises(CheckpointError, match="problem-00001 belongs to another run"):
        run([problems[0], problems[2]], checkpoint=tmp_path / "map")
    with pytest.raises(CheckpointError, match="seed"):
        run(problems, checkpoint=tmp_path / "map", seed=1)


def test_guides_are_fitted_on_a_cluster(client):
    fit = partial(fit_svi, num_steps=5, num_samples=7)
    (found,) = map_problems([mean_problem()], fit, client=client, progress=False, seed=3)
    here = fit_svi(mean_problem(), num_steps=5, num_samples=7, seed=chain_seed(3, 0), progress=False)
    assert found.posterior.identical(here.posterior)
    assert all(torch.equal(found.guide_state[name], value) for name, value in here.guide_state.items())


def test_calibration_maps_over_workers(client):
    run = partial(sbc, simulate, infer, num_replicates=20, num_draws=9)
    here = run()
    assert run(map=dask_map(client)).ranks.identical(here.ranks)
    assert process_map(2)(simulate, []) == []


def test_maps_take_the_default_dtype_along_and_raise_what_was_raised(client):
    torch.set_default_dtype(torch.float64)
    try:
        assert dask_map(client)(default_dtype, range(2)) == ["torch.float64"] * 2
    finally:
        torch.set_default_dtype(torch.float32)
    with pytest.raises(ZeroDivisionError, match="zero") as caught:
        dask_map(client)(divmod, [1, 1], [1, 0])
    assert "Traceback" in caught.value.__notes__[0]


def test_a_killed_worker_costs_no_draw(client, kill_soon, monkeypatch, tmp_path):
    monkeypatch.setattr(ours, "_LEG_SECONDS", 0.3)
    run = partial(run_mcmc, mean_problem(), num_samples=250, warmup_steps=10, num_chains=2, progress=False)
    phases, update = [], Watch.update
    monkeypatch.setattr(
        Watch, "update", lambda self, *shown: update(self, *shown) or phases.append((shown[1], shown[3]))
    )
    killed = kill_soon("chain", 0.8)
    found = run(kernel=SlowKernel, chain_method="dask", client=client, checkpoint=tmp_path / "run")
    assert killed
    assert found.posterior.identical(run(kernel=ExactKernel, chain_method="sequential").posterior)
    assert len(list((tmp_path / "run" / "chain-0").glob("draws-*"))) > 1
    assert any(phase == "sampling" and text for phase, text in phases)


def test_problems_have_the_same_results_on_a_cluster_though_a_worker_dies(client, tmp_path):
    problems = {name: shifted(shift) for name, shift in (("north", 0.0), ("south", 0.5), ("east", 0.7))}
    found = map_problems(
        problems, partial(quick_or_dead, marker=tmp_path / "marker"), seed=7, progress=False, client=client
    )
    assert (tmp_path / "marker").exists()
    assert list(found) == list(problems)
    for place, (result, problem) in enumerate(zip(found.values(), problems.values(), strict=True)):
        assert result.posterior.identical(quick(problem, seed=chain_seed(7, place)).posterior)


def test_a_chain_that_kills_its_workers_is_given_up(client, monkeypatch):
    monkeypatch.setattr(client.cluster.scheduler, "allowed_failures", 0)
    fatal = partial(ExactKernel, die_at=5)
    with pytest.raises(ChainError, match=r"chain 0 failed.*KilledWorker"):
        short(mean_problem(), kernel=fatal, num_chains=1, chain_method="dask", client=client)


@pytest.mark.slow
def test_ranks_of_torchrun_fit_what_one_process_fits(tmp_path):
    script = Path(__file__).with_name("ranks_script.py")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    with subprocess.Popen(
        [*torchrun, str(script), str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        alone = {name: ranks_script.fit(name) for name in ranks_script.problems()}
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    found = {path.name: Result.load(path) for path in tmp_path.iterdir() if (path / "result.nc").exists()}
    for name, result in alone.items():
        for rank in (0, 1):
            other = found[f"{name}-{rank}"]
            np.testing.assert_allclose(other.tree["fit"]["loss"], result.tree["fit"]["loss"], rtol=1e-9)
            for key, value in result.params().items():
                torch.testing.assert_close(other.params()[key], value, rtol=1e-7, atol=1e-9)
            np.testing.assert_allclose(other.posterior.to_array(), result.posterior.to_array(), rtol=1e-6)
    for name in ("regression", "groups", "crossed", "noisy", "resumed"):
        assert found[f"{name}-0"].posterior.identical(found[f"{name}-1"].posterior)
        assert found[f"{name}-0"].tree["fit"].identical(found[f"{name}-1"].tree["fit"])
    np.testing.assert_array_equal(found["resumed-0"].tree["fit"]["loss"], found["noisy-0"].tree["fit"]["loss"])
    assert found["resumed-0"].posterior.identical(found["noisy-0"].posterior)
    for rank in (0, 1):
        assert "stopped after step 17 of 40" in (tmp_path / f"stopped-{rank}").read_text()
        assert "differ in ['seed']" in (tmp_path / f"refused-{rank}").read_text()


def test_ranks_need_torchrun_and_rows_to_share(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ProblemError, match=r"torchrun --nproc-per-node=2 script.py"):
        fit_svi(mean_problem(), distributed=True)
    with pytest.raises(ProblemError, match=r"give the problem batch_plates=\(...\) from \['obs'\]"):
        shared_sizes(mean_problem(), None)


def test_ranks_part_the_rows_of_one_plate(monkeypatch):
    problem, options = ranks_script.problems()["crossed"]
    batches = Minibatches(problem, options["batch_size"], 0)
    seen, weights = [], []
    for rank in range(3):
        monkeypatch.setattr("torch.distributed.get_rank", lambda rank=rank: rank)
        ranks = Ranks(problem, batches.sizes, 0, 3)
        rows = ranks.share(batches.at(1))
        assert torch.equal(rows["row"], batches.at(1)["row"])
        seen.append(rows["column"])
        weights.append(ranks.weight)
    assert torch.equal(torch.cat(seen), batches.at(1)["column"])
    assert weights == [0.5, 0.25, 0.25]
    with pytest.raises(ProblemError, match="5 ranks cannot share 4 rows of plate 'column'"):
        Ranks(problem, batches.sizes, 0, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"run": "fit_svi"}, "run='fit_svi'; give a function"),
        ({"run": len}, r"run cannot be called as run\(problem, seed=0\)"),
        ({"run": fit_svi, "seed": -1}, "seed=-1; give a whole number of at least 0"),
        ({"run": fit_svi, "num_workers": 0}, "num_workers=0; give a whole number of at least 1"),
        ({"run": fit_svi, "problems": [mean_problem(), "mean"]}, r"(?s)problems=.*; give a list, each item a Problem"),
        ({"run": fit_svi, "client": 3}, "client=3; give a Client or None"),
        (
            {"run": fit_svi, "client": SimpleNamespace(submit=len, scatter=len, processing=len), "num_workers": 2},
            "num_workers=2 is not used with client",
        ),
    ],
)
def test_bad_arguments_of_map_problems_are_refused_before_a_process_starts(monkeypatch, options, message):
    monkeypatch.setattr("probmodels.inference.distributed.many.make_pool", lambda *args: pytest.fail("a pool was made"))
    with pytest.raises(ProblemError, match=message):
        map_problems(**{"problems": [mean_problem()], "progress": False, **options})


def test_a_cluster_without_workers_is_given_up(monkeypatch):
    monkeypatch.setattr("probmodels.inference.distributed.pools._PATIENCE_SECONDS", 0.5)
    options = {"n_workers": 0, "processes": False, "dashboard_address": None}
    began = time.monotonic()
    run = partial(run_mcmc, num_samples=5, warmup_steps=5)
    with (
        distributed.LocalCluster(**options) as cluster,
        distributed.Client(cluster) as empty,
        pytest.raises(ProblemError, match=r"no workers for 0\.5 seconds; start some"),
    ):
        map_problems([mean_problem()], run, client=empty)
    assert time.monotonic() - began < 30
