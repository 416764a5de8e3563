"""CPU seconds until there is something to see: of imports and commands, and of chains before their first sweep.

    python benchmarks/startup.py commands
    python benchmarks/startup.py chains                         # two-level model, reference posteriors, 4 and 64 chains
    python benchmarks/startup.py chains --models two_level --chains 64 --init uniform --seeds 0 1 2

Part ``commands``: `import probmodels`, commands that only print, and the first use. Each row is a process of its own,
run ``--repeats`` times after one run that is not counted and that fills the caches of the file system and of compiled
Python files. The first row is the interpreter alone.

Part ``chains``: what `run_mcmc` spends on the graph, on starting points and on 300 sweeps of warm-up, and what the
starts are worth: the least effective sample size of 200 draws per 1000 gradients of a chain, r-hat and divergences.
Before the first sweep there are also the checks of the problem, and what torch loads when it first runs a graph.
``two_level`` has 100 groups with an intercept and a slope each (205 unknowns, 1,629 rows), ``markov`` is a hidden
Markov chain of two states, unrolled over 30 steps.
"""

from __future__ import annotations

import common  # isort: skip  (pins threads before numpy is loaded)

import argparse
import itertools
import resource
import subprocess
import sys
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

PROBMODELS = ["-m", "probmodels.cli"]
COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "import probmodels": ["-c", "import probmodels"],
    "probmodels --help": [*PROBMODELS, "--help"],
    "probmodels list": [*PROBMODELS, "list"],
    "import torch": ["-c", "import torch"],
    "import pyro": ["-c", "import pyro"],
    "run_mcmc, imported": ["-c", "from probmodels import run_mcmc"],
}


def cpu_seconds(arguments: list[str]) -> float:
    """CPU seconds, user and system, of one process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime)


def two_level(group: Tensor, x: Tensor, y: Tensor, groups: int = 100) -> None:
    """y ~ N(a_g + b_g x, sigma) with normal intercepts and slopes by group (row,)."""
    mu = pyro.sample("mu", dist.Normal(y.new_zeros(2), 5.0).to_event(1))
    tau = pyro.sample("tau", dist.HalfNormal(y.new_ones(2)).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(y.new_ones(())))
    with pyro.plate("groups", groups):
        effect = pyro.sample("effect", dist.Normal(mu, tau).to_event(1))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(effect[group, 0] + effect[group, 1] * x, sigma), obs=y)


def two_level_data(groups: int = 100, rows: int = 1629, seed: int = 0) -> tuple[Tensor, ...]:
    """At least one row in every group."""
    rng = np.random.default_rng(seed)
    group = np.sort(np.concatenate([np.arange(groups), rng.integers(0, groups, rows - groups)]))
    x = rng.standard_normal(rows)
    intercept, slope = (loc + sd * rng.standard_normal(groups) for loc, sd in ((1.0, 0.8), (-0.5, 0.4)))
    y = intercept[group] + slope[group] * x + 0.7 * rng.standard_normal(rows)
    return torch.tensor(group), torch.tensor(x), torch.tensor(y)


def markov(y: Tensor) -> None:
    """Two hidden states that emit N(mu_k, 1), one program step per time."""
    transition = pyro.sample("transition", dist.Dirichlet(y.new_ones(2, 2)).to_event(1))
    mu = pyro.sample("mu", dist.Normal(y.new_tensor([-1.0, 1.0]), 1.0).to_event(1))
    state: Any = 0
    for step in pyro.markov(range(len(y))):
        state = pyro.sample(f"state_{step}", dist.Categorical(transition[state]), infer={"enumerate": "parallel"})
        pyro.sample(f"y_{step}", dist.Normal(mu[state], 1.0), obs=y[step])


def markov_data(steps: int = 30) -> tuple[Tensor, ...]:
    rng = np.random.default_rng(0)
    states = np.cumsum(rng.random(steps) < 0.2) % 2
    return (torch.tensor(2.0 * states - 1 + rng.standard_normal(steps)),)


def chains(names: list[str], counts: list[int], seeds: list[int], options: dict[str, Any]) -> None:
    """Phases of `run_mcmc` in CPU seconds."""
    import reference

    from probmodels.inference import Problem, run_mcmc
    from probmodels.inference.diagnostics.convergence import convergence

    own: dict[str, Any] = {"two_level": (two_level, two_level_data), "markov": (markov, markov_data)}
    rows = []
    for name in names or [*own, *reference.NAMES]:
        problem = Problem(name, own[name][0], args=own[name][1]()) if name in own else reference.load(name).problem
        for count, seed in itertools.product(counts, seeds):
            phases = reference.Phases()
            result = run_mcmc(
                problem,
                num_chains=count,
                warmup_steps=300,
                num_samples=200,
                progress=False,
                callbacks=[phases],
                seed=seed,
                **options,
            )
            starts = phases.between("finding starting points", "warm-up")
            warmup = phases.between("warm-up", "sampling")
            stats = result.tree["sample_stats"].to_dataset()
            latent = [result.posterior[site] for site in problem.names("latent") if not problem.sites[site].discrete]
            found = [convergence(draws.transpose("chain", "draw", ...)) for draws in latent]
            ess = min(float(np.nanmin(values["ess_bulk"])) for values in found)
            rows.append(
                {
                    "model": name,
                    "chains": count,
                    "seed": seed,
                    "to first sweep, CPU s": phases.between("called", "warm-up"),
                    "graph, CPU s": phases.between("capturing the graph", "finding starting points"),
                    "starts, CPU s": starts,
                    "warm-up, CPU s": warmup,
                    "starts / warm-up": starts / warmup,
                    "ess per 1000 gradients": 1000 * ess / (count * float(stats["n_steps"][0].sum())),
                    "r_hat": max(float(np.nanmax(values["r_hat"])) for values in found),
                    "divergences": int(stats["diverging"].sum()),
                    "moved chains": stats.attrs["moved_chains"],
                }
            )
            print(common.table(rows[-1:]), flush=True)
    common.report("startup_chains", rows, **options)


def commands(repeats: int) -> None:
    rows = []
    for name, arguments in COMMANDS.items():
        seconds = [cpu_seconds(arguments) for _ in range(repeats + 1)][1:]
        rows.append({"what": name, "CPU s, median (range)": common.spread(seconds)})
    common.report("startup", rows, repeats=repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=["commands", "chains"], default="commands")
    parser.add_argument("--repeats", type=int, default=5, help="runs of every command")
    parser.add_argument("--models", nargs="*", default=[], help="two_level, markov or reference posteriors")
    parser.add_argument("--chains", nargs="*", type=int, default=[4, 64])
    parser.add_argument("--init", default="pathfinder", choices=["pathfinder", "uniform", "prior"])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    options = parser.parse_args()
    if options.part == "chains":
        chains(options.models, options.chains, options.seeds, {"init": options.init})
    else:
        commands(options.repeats)


if __name__ == "__main__":
    main()
