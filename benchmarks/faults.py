"""Kill runs at random times, repeat each until it ends, and check that it gives the numbers of a run without kills.

    python benchmarks/faults.py [--runs 25] [--seed 0]
    python benchmarks/faults.py --signal SIGTERM --engines vectorized svi    # which runs obey within two seconds

Every run is a process of its own with a checkpoint folder. It and its workers get the signal at a random time after the
engine was called, and the same call is repeated in a new process, until one gets to its end. So is a whole command,
whose outputs have to be complete. Draws, statistics and parameters are compared bit for bit. The last column is the
longest time from a signal to the end of the process. Exits with 1 if any run differs, or if SIGTERM took longer than
two seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"))

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoMultivariateNormal
from pyro.nn import PyroModule
from torch import Tensor, nn

from probmodels import lds
from probmodels.cli import runs
from probmodels.cli.common import INTERRUPTED
from probmodels.inference import Phase, Problem, Result, fit_bilevel, fit_em, fit_svi, run_mcmc

_EVERY = 0.1  # seconds between two checkpoints
_SHARE = 1.0  # of the time of a run left alone, within which a run is killed
_OBEY = 2.0  # seconds that SIGTERM may take
_TIMED = ("seconds",)  # what is measured and not computed


def regression(x: Tensor, y: Tensor) -> None:
    """Normal regression with unknown scales of weights and noise."""
    tau = pyro.sample("tau", dist.HalfNormal(x.new_ones(())))
    sigma = pyro.sample("sigma", dist.HalfNormal(x.new_ones(())))
    with pyro.plate("feature", x.shape[1]):
        weight = pyro.sample("weight", dist.Normal(x.new_zeros(()), tau))
    with pyro.plate("row", len(y)) as i:
        pyro.sample("y", dist.Normal(x[i] @ weight, sigma), obs=y[i])


def mixture(y: Tensor) -> None:
    """Three normal components whose means are parameters."""
    means = pyro.param("means", torch.linspace(-1, 1, 3, dtype=y.dtype))
    with pyro.plate("row", len(y)) as i:
        k = pyro.sample("k", dist.Categorical(y.new_ones(3) / 3))
        pyro.sample("y", dist.Normal(means[k], 0.5), obs=y[i])


class Assignment(PyroModule):
    """Guide of `mixture`: a network from a value to the probabilities of its component."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.net = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 3)).double()
        for parameter in self.net.parameters():
            nn.init.normal_(parameter, 0, 0.3, generator=generator)

    def forward(self, y: Tensor) -> None:
        """Draw the components."""
        with pyro.plate("row", len(y)) as i:
            pyro.sample("k", dist.Categorical(logits=self.net(y[i].unsqueeze(-1))))


def _regression(**fields: Any) -> Problem:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((100, 20))
    y = x @ rng.standard_normal(20) + rng.standard_normal(100)
    args = torch.as_tensor(x), torch.as_tensor(y)
    return Problem("regression", regression, args=args, batch_plates=("row",), **fields)


def vectorized(**options: Any) -> Result:
    """Vectorised ChEES-HMC."""
    return run_mcmc(_regression(), num_chains=8, num_samples=400, warmup_steps=100, **options)


def process(**options: Any) -> Result:
    """NUTS, two chains in processes."""
    return run_mcmc(_regression(), kernel="nuts", num_chains=2, num_samples=30, warmup_steps=30, **options)


def svi(**options: Any) -> Result:
    """A full-rank normal guide by minibatches, best parameters kept."""
    guide = AutoMultivariateNormal(regression)
    return fit_svi(_regression(guide=guide), num_steps=1000, batch_size=40, keep="best", lr_decay=0.1, **options)


def em(**options: Any) -> Result:
    """Wake, sleep and replay in turn."""
    rng = np.random.default_rng(0)
    y = torch.as_tensor(rng.normal(rng.choice([-2.0, 0.0, 1.5], 200), 0.5))
    problem = Problem("mixture", mixture, Assignment(), args=(y,), batch_plates=("row",))
    phases = ("wake", "sleep", Phase("replay", num_particles=4, steps=2))
    return fit_em(problem, num_rounds=100, phases=phases, batch_size=50, **options)


def bilevel(**options: Any) -> Result:
    """Edges of a small graph, a round after the other."""
    return fit_bilevel(lds.tiny(), num_rounds=10, inner_steps=50, **options)


def command(checkpoint: str = "", checkpoint_every: float = _EVERY, progress: bool = False) -> Result:
    """The command line: data, fit, result, and all its outputs, which must be there at the end."""
    folder = Path(checkpoint or tempfile.mkdtemp(prefix="faults-")) / "run"
    phases = [{"objective": "e_step", "lr": 0.02}, {"objective": "wake", "lr": 0.1}]
    inference = {"engine": "em", "num_rounds": 300, "num_samples": 50, "phases": phases}
    spec = {
        "method": "hierarchical_mixture",
        "data": {"name": "petals", "num_rows": 200},
        "inference": {**inference, "checkpoint_every": checkpoint_every},
        "output": {"path": str(folder)},
    }
    if not (folder / "report.html").exists():  # else killed after the last file was in its place
        with contextlib.redirect_stdout(None):
            runs.execute(spec, strict=False, quiet=not progress)
    for name in ("report.html", "summary.txt", "result.nc"):
        if not (folder / name).stat().st_size:
            raise SystemExit(f"{name} is empty")
    return Result.load(folder)


ENGINES: dict[str, Callable[..., Result]] = {f.__name__: f for f in (vectorized, process, svi, em, bilevel, command)}


def numbers(result: Result) -> dict[str, np.ndarray]:
    """Every array of a result that is computed."""
    found = {
        f"{group.name}/{name}": values.values
        for group in result.tree.subtree
        for name, values in group.data_vars.items()
        if name not in _TIMED
    }
    state = result.guide_state or {}
    return found | {f"state/{name}": value.detach().numpy() for name, value in state.items()}


def child(engine: str, checkpoint: str, target: str) -> None:
    """One attempt: says when the engine is called, writes the numbers at the end."""
    torch.set_num_threads(1)
    importlib.import_module("torch._dynamo")  # which takes longer than most of these runs: kills shall hit the engine
    print("called", flush=True)
    options: dict[str, Any] = {"checkpoint": checkpoint, "checkpoint_every": _EVERY} if checkpoint else {}
    np.savez(target, **numbers(ENGINES[engine](progress=False, **options)))


def attempt(
    engine: str, checkpoint: Path | str, target: Path, kill_after: float = float("inf"), number: int = signal.SIGKILL
) -> tuple[bool, float]:
    """Whether a run got to its end, and seconds: from the call of the engine to its end, or from the signal to it."""
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-c", "import sys, faults; faults.child(*sys.argv[1:])"]
    running = subprocess.Popen(
        [*command, engine, str(checkpoint), str(target)],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert running.stdout is not None
    running.stdout.readline()
    began = time.monotonic()
    try:
        _, errors = running.communicate(timeout=None if kill_after == float("inf") else kill_after)
    except subprocess.TimeoutExpired:
        began = time.monotonic()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.pid, number)
        _, errors = running.communicate()
        if running.returncode not in (0, -number, -signal.SIGINT, 128 + number, INTERRUPTED):
            raise SystemExit(f"{engine}: signal {number} made the run in {checkpoint} fail:\n{errors}") from None
        return running.returncode == 0, time.monotonic() - began
    if running.returncode:
        raise SystemExit(f"{engine}: the run in {checkpoint} failed:\n{errors}")
    return True, time.monotonic() - began


def same(one: Path, other: Path) -> bool:
    """Whether two files of numbers hold the same names, types and bits."""
    with np.load(one) as a, np.load(other) as b:
        return set(a) == set(b) and all(
            a[name].dtype == b[name].dtype and a[name].shape == b[name].shape and a[name].tobytes() == b[name].tobytes()
            for name in a
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=25, help="over all engines")
    parser.add_argument("--engines", nargs="*", choices=list(ENGINES), default=list(ENGINES))
    parser.add_argument("--seed", type=int, default=0, help="of the times at which runs are killed")
    parser.add_argument("--signal", choices=["SIGKILL", "SIGTERM"], default="SIGKILL")
    options = parser.parse_args(arguments)
    rng = np.random.default_rng(options.seed)
    chosen = options.engines
    counts = {engine: len(range(place, options.runs, len(chosen))) for place, engine in enumerate(chosen)}
    number = signal.Signals[options.signal]
    bad = 0
    print(f"{'engine':<12}{'runs':>6}{'kills':>7}{'equal':>7}{'seconds':>9}{'to its end':>12}")
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        for engine, count in counts.items():
            if not count:
                continue
            folder = Path(name, engine)
            folder.mkdir()
            _, alone = attempt(engine, "", folder / "alone.npz")
            equal, waits = 0, [0.0]
            for run in range(count):
                target = folder / f"{run}.npz"
                ended = False
                while not ended:
                    after = _SHARE * alone * rng.random()
                    ended, seconds = attempt(engine, folder / f"run-{run}", target, after, number)
                    waits += [] if ended else [seconds]
                equal += same(target, folder / "alone.npz")
            bad += count - equal + (number == signal.SIGTERM and max(waits) > _OBEY)
            kills = len(waits) - 1
            print(f"{engine:<12}{count:>6}{kills:>7}{equal:>7}{alone:>9.1f}{max(waits):>12.2f}", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
