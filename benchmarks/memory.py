"""Peak memory of sampling against the number of draws: it should grow with the chunk that is written, not with draws.

Usage: ``python benchmarks/memory.py [--size 20000] [--draws 50 200 800]``. Every row is a fresh process. ``sampling``
is how far the peak of resident memory rose while chains ran and streamed their draws to disk, above what a run of two
draws takes; ``result`` is how far that of the whole call rose, which has to hold all draws, above the same call with
two draws; ``size`` is that of the draws of all chains. Of chains in processes, sampling is that of one worker.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"))

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from probmodels.inference import Problem, run_mcmc
from probmodels.inference.mcmc import chains
from probmodels.inference.mcmc.chains import ChainPlan
from probmodels.inference.mcmc.chees import ChEESKernel
from probmodels.inference.mcmc.kernels import NUTSKernel

_CHAINS = 8  # vectorised ones
_WARMUP = 5
_CHUNKS = 6  # that sampling may take: rows, their stack, what is left free between them
_MEGABYTE = 2**20
_METHODS = ("vectorized", "process")


def wide(y: Tensor) -> None:
    """One normal latent variable for each datum, independent."""
    with pyro.plate("row", len(y)):
        theta = pyro.sample("theta", dist.Normal(y.new_zeros(()), 1.0))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=y)


def problem(size: int) -> Problem:
    """The wide model with data of its prior predictive."""
    y = torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2**0.5
    return Problem("wide", wide, args=(y,))


def peak() -> float:
    """Largest resident memory so far, in MB."""
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / _MEGABYTE


def sample(method: str, size: int, draws: int, folder: str) -> None:
    """One chain, or all vectorised ones, as a worker runs them; prints the peak."""
    vectorized = method == "vectorized"
    plan = ChainPlan(0, folder, draws, _WARMUP, 1, 0, float("inf"), torch.get_default_dtype(), "uniform")

    def make(problem: Problem) -> ChEESKernel | NUTSKernel:
        if vectorized:
            return ChEESKernel(problem, num_chains=_CHAINS, metric="diagonal")
        return NUTSKernel(problem, max_tree_depth=3)

    assert chains.run_chain(problem(size), make, plan, lambda iteration, text: False)
    print(peak())


def whole(method: str, size: int, draws: int, folder: str) -> None:
    """The call that a user makes, after which the draws are in memory; prints the peak of the calling process."""
    if method == "vectorized":
        options: dict[str, Any] = {"num_chains": _CHAINS, "kernel": "chees", "kernel_options": {"metric": "diagonal"}}
    else:
        options = {"num_chains": 2, "kernel": "nuts", "kernel_options": {"max_tree_depth": 3}}
    result = run_mcmc(
        problem(size),
        num_samples=draws,
        warmup_steps=_WARMUP,
        init="uniform",
        checkpoint=folder,
        progress=False,
        **options,
    )
    assert result.posterior.sizes["draw"] == draws
    print(peak())


def fresh(part: str, method: str, size: int, draws: int, chunk: float) -> float:
    """Peak of a process of its own."""
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    code = "import sys, memory; memory.run(*sys.argv[1:])"
    with tempfile.TemporaryDirectory(prefix="memory-") as folder:
        command = [sys.executable, "-c", code, part, method, *map(str, (size, draws, chunk)), folder]
        done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{part} of {method} with {draws} draws failed:\n{done.stderr}")
    return float(done.stdout.split()[-1])


def run(part: str, method: str, size: str, draws: str, chunk: str, folder: str) -> None:
    """What a fresh process does."""
    torch.set_num_threads(1)
    chains._FLUSH_BYTES = int(float(chunk) * _MEGABYTE)
    {"sampling": sample, "result": whole}[part](method, int(size), int(draws), folder)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 1 if sampling takes more than a few chunks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=20_000, help="unknowns of the model")
    parser.add_argument("--draws", type=int, nargs="+", default=[50, 200, 800], help="draws per chain")
    parser.add_argument("--chunk", type=float, default=16, help="MB of draws at which they are written")
    options = parser.parse_args(arguments)
    size, chunk = options.size, options.chunk
    bad = False
    print(f"{size} unknowns, chunks of {chunk:g} MB; MB above a run of two draws")
    print(f"{'method':<12}{'chains':>7}{'draws':>7}{'size':>8}{'sampling':>10}{'result':>8}")
    for method in _METHODS:
        count = _CHAINS if method == "vectorized" else 2
        base = {part: fresh(part, method, size, 2, chunk) for part in ("sampling", "result")}
        sampled = []
        for draws in options.draws:
            rise = {part: fresh(part, method, size, draws, chunk) - base[part] for part in base}
            sampled.append(rise["sampling"])
            mass = count * draws * size * 8 / _MEGABYTE
            row = f"{method:<12}{count:>7}{draws:>7}{mass:>8.0f}"
            print(f"{row}{rise['sampling']:>10.0f}{rise['result']:>8.0f}", flush=True)
        bad |= max(sampled) > _CHUNKS * chunk
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
