"""Runs of other samplers on the models for timing, each in a fresh process on one core with one thread.

    python benchmarks/peers.py run --peer numpyro --model logistic --chains 4 --warmup 500 --draws 500 --python PATH
    python benchmarks/peers.py cold --peer numpyro blackjax --model eight_schools --python PATH

prints one line of JSON per run. ``PATH`` is the Python of an environment with the peers (``pip install numpyro blackjax
nutpie pymc``; default: the variable ``PROBMODELS_PEERS_PYTHON``); Pyro and this project always run in the present one.
``run_peer`` and ``run_cold`` do the same from Python.

**What is measured.** CPU seconds of the process and its children, and wall seconds, from the start of the interpreter
to its end: ``cpu_import`` until all is imported, ``cpu_compile`` for tracing and compiling where it can be told apart,
``cpu_warmup`` and ``cpu_sample`` where these can, ``cpu_run`` for all that is neither import nor compilation,
``cpu_total``. Loading a compiler, torch's as JAX's, is import. What libraries keep on disk between runs (inductor,
numba and PyTensor caches) starts empty, as for a model fitted for the first time. Draws are saved, and effective
sample sizes and r_hat computed here, by the same functions for all.

**What runs.** Everyone samples the same density of the same data (`reference.speed_data`), from starts that are uniform
in (-2, 2) in unconstrained space (nutpie and PyMC: their own), with a diagonal mass matrix and the library's own
defaults (BlackJAX: the best settings found) unless ``options`` say otherwise. Pyro runs in double precision, with
``jit_compile`` or eager, one chain after the other. NumPyro and BlackJAX run all chains at once, in single precision,
which is their default, or in double (``-x64``).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]
Outcome = tuple[Array, int | None]  # draws (chain, draw, dimension) and the number of divergences after warm-up

# Names of the sites in the order in which draws are stacked along the last axis.
SITES = {"eight_schools": ("mu", "tau", "z"), "logistic": ("w",), "gaussian": ("x",)}
TARGET_ESS = 400
MAX_R_HAT = 1.05  # many short chains show more than the 1.01 of long ones even when each starts in the posterior

_THREADS = {
    **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), "1"),
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
    "RAYON_NUM_THREADS": "1",
    "JAX_PLATFORMS": "cpu",
    "PYTHONWARNINGS": "ignore",
}


class PeerError(RuntimeError):
    """A run that failed: which one, and the end of what it printed."""


# -- the calling side -------------------------------------------------------------------------------------------------


def run_peer(
    peer: str,
    model: str,
    *,
    chains: int,
    warmup: int,
    draws: int,
    seed: int,
    python: str | None = None,
    timeout: float = 3600.0,
    **options: Any,
) -> dict[str, Any]:
    """Measure one run in a fresh process.

    Parameters
    ----------
    peer
        A name in `PEERS`.
    model
        A name in `SITES`.
    chains, warmup, draws, seed
        Sizes and seed of the run; ``warmup`` and ``draws`` per chain.
    python
        Interpreter of an environment that has the peer; None for ``PROBMODELS_PEERS_PYTHON``, else the present one.
    timeout
        Wall seconds after which to give up.
    **options
        Further arguments of the peer, see its function.

    Returns
    -------
    dict
        The request; ``cpu_import``, ``cpu_compile``, ``cpu_warmup``, ``cpu_sample`` (None where they cannot be told
        apart), ``cpu_run``, ``cpu_total``, ``wall``; ``min_ess`` (bulk), ``max_r_hat``, ``divergences``;
        ``ess_per_cpu`` counting everything but the import, ``ess_per_cpu_run`` without compilation as well.

    Raises
    ------
    ValueError
        If peer or model is unknown.
    PeerError
        If the run fails or takes too long.
    """
    if peer not in PEERS or model not in SITES:
        raise ValueError(f"no peer {peer!r} or model {model!r}; choose from {list(PEERS)} and {list(SITES)}")
    request = {"peer": peer, "model": model, "chains": chains, "warmup": warmup, "draws": draws, "seed": seed}
    own = peer in _OWN
    interpreter = sys.executable if own else python or os.environ.get("PROBMODELS_PEERS_PYTHON") or sys.executable
    with tempfile.TemporaryDirectory(prefix="peer-") as folder:
        if not own:
            from reference import speed_data

            np.savez(Path(folder) / "data.npz", **speed_data(model))  # type: ignore[arg-type]
        (Path(folder) / "request.json").write_text(json.dumps({**request, "options": options}))
        total, wall = _measure([interpreter, __file__, "child", folder], folder, f"{peer} on {model}", timeout)
        clock = json.loads((Path(folder) / "clock.json").read_text())
        values = np.load(Path(folder) / "draws.npy")
    return {**request, **options, **_record(clock, total, wall, values)}


def run_cold(peer: str, model: str, *, seed: int, python: str | None = None, attempts: int = 4) -> dict[str, Any]:
    """Time to an effective sample size of 400 in every dimension from a cold process, with the budget in `BUDGETS`.

    Where the run falls short (or `MAX_R_HAT` is exceeded) it is repeated from the start with more draws; only the last
    run counts. What `run_peer` returns, with ``attempts`` and ``reached``.
    """
    chains, warmup, draws, options = BUDGETS[peer, model]
    for attempt in range(1, attempts + 1):
        out = run_peer(peer, model, chains=chains, warmup=warmup, draws=draws, seed=seed, python=python, **options)
        out |= {"attempts": attempt, "reached": out["min_ess"] >= TARGET_ESS and out["max_r_hat"] <= MAX_R_HAT}
        if out["reached"]:
            break
        draws = int(np.ceil(draws * min(max(1.25, 1.2 * TARGET_ESS / out["min_ess"]), 4)))
    return out


def min_ess(draws: Array) -> tuple[float, float]:
    """Smallest bulk effective sample size and largest r_hat over the dimensions of draws (chain, draw, dimension)."""
    from probmodels.inference.diagnostics.convergence import convergence

    statistics = convergence(np.asarray(draws, dtype=np.float64))
    return float(statistics["ess_bulk"].min()), float(statistics["r_hat"].max())


def stack(values: Mapping[str, Any], model: str) -> Array:
    """Draws of the sites of a model, each (chain, draw, ...), as one array (chain, draw, dimension)."""
    parts = [np.asarray(values[name]) for name in SITES[model]]
    return np.concatenate([part.reshape(*part.shape[:2], -1) for part in parts], axis=-1)


def _measure(command: list[str], folder: str, name: str, timeout: float) -> tuple[float, float]:
    """CPU seconds, of children too, and wall seconds of a command, with caches on disk in ``folder``."""
    caches = {key: str(Path(folder) / key) for key in ("TORCHINDUCTOR_CACHE_DIR", "NUMBA_CACHE_DIR")}
    caches["PYTENSOR_FLAGS"] = f"base_compiledir={folder}/pytensor"
    log = Path(folder) / "log.txt"
    start = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(command, env={**os.environ, **_THREADS, **caches}, stdout=output, stderr=output)
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            if time.monotonic() - start > timeout:
                process.kill()
                timeout = float("inf")
            time.sleep(0.01)
    wall = time.monotonic() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        text = log.read_text(errors="replace")
        hint = "install it there, or pass python= of an environment that has it; " if "ModuleNotFound" in text else ""
        tail = "\n".join(text.splitlines()[-12:])
        raise PeerError(
            f"{name}: {command[0]} ended with {process.returncode} after {wall:.0f} s; {hint}it printed:\n{tail}"
        )
    return usage.ru_utime + usage.ru_stime, wall


def _record(clock: Mapping[str, Any], total: float, wall: float, draws: Array) -> dict[str, Any]:
    ess, r_hat = min_ess(draws)
    phases = {f"cpu_{key}": clock[key] for key in ("import", "compile", "warmup", "sample")}
    run = total - clock["import"] - (clock["compile"] or 0.0)
    out = {**phases, "cpu_run": run, "cpu_total": total, "wall": wall}
    out |= {"min_ess": ess, "max_r_hat": r_hat, "divergences": clock["divergences"]}
    out |= {"ess_per_cpu": ess / (total - clock["import"]), "ess_per_cpu_run": ess / run}
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in out.items()}


# -- the measured side ------------------------------------------------------------------------------------------------


class Clock:
    """CPU seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float | None] = dict.fromkeys(("import", "compile", "warmup", "sample"))

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Add what the block takes to a phase."""
        start = cpu_seconds()
        yield
        self.add(phase, cpu_seconds() - start)

    def add(self, phase: str, seconds: float) -> None:
        """Add seconds to a phase."""
        self.seconds[phase] = (self.seconds[phase] or 0.0) + seconds


def cpu_seconds() -> float:
    """CPU seconds of this process since its start, and of its children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


class Task:
    """What a peer is asked to do.

    Attributes
    ----------
    model, chains, warmup, draws, seed, options
        As in `run_peer`.
    data
        Arguments of the model, arrays by name; empty for peers that read `reference` themselves.
    clock
        Where phases are noted; the import of all libraries is one of them.
    """

    def __init__(self, folder: Path) -> None:
        request = json.loads((folder / "request.json").read_text())
        self.peer: str = request["peer"]
        self.model: str = request["model"]
        self.chains, self.warmup, self.draws, self.seed = (
            int(request[key]) for key in ("chains", "warmup", "draws", "seed")
        )
        self.options: dict[str, Any] = request["options"]
        path = folder / "data.npz"
        self.data: dict[str, Array] = dict(np.load(path)) if path.exists() else {}
        self.clock = Clock()


def child(folder: Path) -> None:
    """Do what ``request.json`` asks for; leave ``draws.npy`` and ``clock.json``."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    task = Task(folder)
    task.clock.add("import", cpu_seconds())
    draws, divergences = PEERS[task.peer](task)
    if draws.shape[:2] != (task.chains, task.draws):
        raise PeerError(f"{task.peer} returned draws of shape {draws.shape}, not ({task.chains}, {task.draws}, ...)")
    np.save(folder / "draws.npy", draws)
    (folder / "clock.json").write_text(json.dumps({**task.clock.seconds, "divergences": divergences}))


def run_ours(task: Task) -> Outcome:
    """This project's `run_mcmc`; options are its arguments, as ``compile="inductor"``."""
    with task.clock("import"):
        import torch._dynamo  # noqa: F401  -- which captures load
        from reference import speed_problem

        from probmodels.inference import run_mcmc
    result = run_mcmc(
        speed_problem(task.model),
        num_chains=task.chains,
        warmup_steps=task.warmup,
        num_samples=task.draws,
        seed=task.seed,
        progress=False,
        **{"chain_method": "vectorized", **task.options},
    )
    posterior, stats = result.tree["posterior"], result.tree["sample_stats"]
    values = {name: posterior[name].transpose("chain", "draw", ...).values for name in SITES[task.model]}
    return stack(values, task.model), int(stats["diverging"].sum())


def run_pyro(task: Task, *, jit: bool) -> Outcome:
    """Pyro's NUTS; one chain after the other, as its MCMC does where there is one core."""
    with task.clock("import"):
        import pyro
        import torch
        from pyro.infer import MCMC, NUTS
        from reference import speed_model
    torch.set_num_threads(1)
    model, args = speed_model(task.model)
    chains, divergences = [], 0
    for chain in range(task.chains):
        pyro.set_rng_seed(1000 * task.seed + chain)
        kernel = NUTS(model, jit_compile=jit, ignore_jit_warnings=True, **task.options)
        marks = {"setup": cpu_seconds()}

        def note(_kernel: Any, _params: Any, stage: str, _step: int, marks: dict[str, float] = marks) -> None:
            marks[stage.lower()] = cpu_seconds()

        mcmc = MCMC(kernel, task.draws, warmup_steps=task.warmup, disable_progbar=True, hook_fn=note)
        mcmc.run(*args)
        # The first hook comes after the first step, so that tracing counts as warm-up here.
        warm = next(value for stage, value in marks.items() if stage.startswith("warm"))
        task.clock.add("warmup", warm - marks["setup"])
        task.clock.add("sample", cpu_seconds() - warm)
        chains.append({name: value.detach().numpy() for name, value in mcmc.get_samples(group_by_chain=True).items()})
        divergences += sum(len(where) for where in mcmc.diagnostics()["divergences"].values())
    values = {name: np.concatenate([chain[name] for chain in chains]) for name in SITES[task.model]}
    return stack(values, task.model), divergences


def run_numpyro(task: Task, *, x64: bool) -> Outcome:
    """NumPyro's NUTS, chains vectorised."""
    with task.clock("import"):
        import jax
        import jax.numpy as jnp
        import numpyro
        import numpyro.distributions as dist
        from numpyro.infer import MCMC, NUTS

        jax.config.update("jax_enable_x64", x64)
    compiling = _JaxCompilation(jax)

    def eight_schools(y: Any, sigma: Any) -> None:
        mu = numpyro.sample("mu", dist.Normal(0, 5))
        tau = numpyro.sample("tau", dist.HalfCauchy(5))
        with numpyro.plate("school", len(y)):
            z = numpyro.sample("z", dist.Normal(0, 1))
            numpyro.sample("y", dist.Normal(mu + tau * z, sigma), obs=y)

    def logistic(features: Any, y: Any) -> None:
        w = numpyro.sample("w", dist.Normal(0, 1).expand([features.shape[1]]).to_event(1))
        numpyro.sample("y", dist.Bernoulli(logits=features @ w), obs=y)

    def gaussian(precision: Any) -> None:
        x = numpyro.sample("x", dist.ImproperUniform(dist.constraints.real_vector, (), (len(precision),)))
        numpyro.factor("density", -0.5 * x @ (precision @ x))

    model = {"eight_schools": eight_schools, "logistic": logistic, "gaussian": gaussian}[task.model]
    mcmc = MCMC(
        NUTS(model, **task.options),
        num_warmup=task.warmup,
        num_samples=task.draws,
        num_chains=task.chains,
        chain_method="vectorized",
        progress_bar=False,
    )
    start, began = cpu_seconds(), time.time()
    mcmc.run(jax.random.PRNGKey(task.seed), **{name: jnp.asarray(value) for name, value in task.data.items()})
    values = {name: np.asarray(value) for name, value in mcmc.get_samples(group_by_chain=True).items()}
    busy = (cpu_seconds() - start) / (time.time() - began)
    task.clock.add("compile", compiling.wall() * busy)
    return stack(values, task.model), int(mcmc.get_extra_fields()["diverging"].sum())


def run_blackjax(task: Task, *, x64: bool) -> Outcome:
    """BlackJAX's ChEES-HMC: adaptation and draws in one compiled function.

    Options: ``learning_rate`` of Adam for the trajectory length, ``step_size`` to start from, and arguments of
    ``blackjax.chees_adaptation``; the defaults here did best of those tried, see `BUDGETS`.
    """
    with task.clock("import"):
        import blackjax
        import jax
        import jax.numpy as jnp
        import optax
        from jax.scipy.stats import cauchy, norm

        jax.config.update("jax_enable_x64", x64)
    options = {"learning_rate": 0.1, "step_size": 0.1, "mass_matrix_estimation": "diagonal", **task.options}
    data = {name: jnp.asarray(value) for name, value in task.data.items()}

    def eight_schools(q: Any) -> Any:
        mu, log_tau, z = q[0], q[1], q[2:]
        prior = norm.logpdf(mu, 0, 5) + cauchy.logpdf(jnp.exp(log_tau), 0, 5) + log_tau + norm.logpdf(z).sum()
        return prior + norm.logpdf(data["y"], mu + jnp.exp(log_tau) * z, data["sigma"]).sum()

    def logistic(q: Any) -> Any:
        logits = data["features"] @ q
        return norm.logpdf(q).sum() + (data["y"] * logits - jax.nn.softplus(logits)).sum()

    def gaussian(q: Any) -> Any:
        return -0.5 * q @ (data["precision"] @ q)

    log_density = {"eight_schools": eight_schools, "logistic": logistic, "gaussian": gaussian}[task.model]
    size = {"eight_schools": 10, "logistic": 20, "gaussian": 50}[task.model]
    optimiser, step_size = optax.adam(options.pop("learning_rate")), options.pop("step_size")
    adaptation = blackjax.chees_adaptation(log_density, task.chains, adaptation_info_fn=lambda *_: None, **options)

    def run(key: Any) -> Any:
        start_key, warm_key, draw_key = jax.random.split(key, 3)
        starts = jax.random.uniform(start_key, (task.chains, size), minval=-2, maxval=2)
        (states, parameters), _ = adaptation.run(warm_key, starts, step_size, optimiser, task.warmup)
        kernel = jax.vmap(blackjax.dynamic_hmc(log_density, **parameters).step)

        def step(states: Any, key: Any) -> Any:
            states, info = kernel(jax.random.split(key, task.chains), states)
            return states, (states.position, info.is_divergent)

        return jax.lax.scan(step, states, jax.random.split(draw_key, task.draws))[1]

    key = jax.random.PRNGKey(task.seed)
    with task.clock("compile"):
        compiled = jax.jit(run).lower(key).compile()
    positions, divergent = compiled(key)
    draws = np.asarray(positions).swapaxes(0, 1).copy()
    if task.model == "eight_schools":
        draws[..., 1] = np.exp(draws[..., 1])
    return draws, int(divergent.sum())


def run_pymc(task: Task, *, nutpie: bool) -> Outcome:
    """A PyMC model sampled by nutpie (compiled by numba) or by PyMC's own NUTS; chains one after the other."""
    with task.clock("import"):
        import pymc as pm
        import pytensor.tensor as pt

        if nutpie:
            import nutpie as sampler
    data = task.data
    with pm.Model() as model:
        if task.model == "eight_schools":
            mu = pm.Normal("mu", 0, 5)
            tau = pm.HalfCauchy("tau", 5)
            z = pm.Normal("z", 0, 1, shape=8)
            pm.Normal("y", mu + tau * z, data["sigma"], observed=data["y"])
        elif task.model == "logistic":
            w = pm.Normal("w", 0, 1, shape=20)
            pm.Bernoulli("y", logit_p=pt.dot(data["features"], w), observed=data["y"])
        else:
            x = pm.Flat("x", shape=50, initval=np.zeros(50))
            pm.Potential("density", -0.5 * pt.dot(x, pt.dot(data["precision"], x)))
    settings = {"draws": task.draws, "tune": task.warmup, "chains": task.chains, "cores": 1}
    if nutpie:
        with task.clock("compile"):
            compiled = sampler.compile_pymc_model(model)
        trace = sampler.sample(compiled, **settings, seed=task.seed, progress_bar=False, save_warmup=False)
    else:
        with model:
            trace = pm.sample(
                **settings, random_seed=task.seed, progressbar=False, compute_convergence_checks=False, **task.options
            )
    values = {name: trace.posterior[name].values for name in SITES[task.model]}
    return stack(values, task.model), int(trace.sample_stats["diverging"].sum())


class _JaxCompilation:
    """Wall seconds in which JAX traced or compiled; the spans that it reports may overlap."""

    def __init__(self, jax: Any) -> None:
        self._spans: list[tuple[float, float]] = []
        jax.monitoring.register_event_duration_secs_listener(self._note)

    def _note(self, event: str, duration: float, **_: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            self._spans.append((time.time() - duration, time.time()))

    def wall(self) -> float:
        """Length of the union of all spans."""
        total, end = 0.0, float("-inf")
        for first, last in sorted(self._spans):
            total += max(0.0, last - max(first, end))
            end = max(end, last)
        return total


def _with(run: Callable[..., Outcome], **settings: bool) -> Callable[[Task], Outcome]:
    return lambda task: run(task, **settings)


PEERS: dict[str, Callable[[Task], Outcome]] = {
    "probmodels": run_ours,
    "pyro": _with(run_pyro, jit=True),
    "pyro-eager": _with(run_pyro, jit=False),
    "numpyro": _with(run_numpyro, x64=False),
    "numpyro-x64": _with(run_numpyro, x64=True),
    "blackjax": _with(run_blackjax, x64=False),
    "blackjax-x64": _with(run_blackjax, x64=True),
    "nutpie": _with(run_pymc, nutpie=True),
    "pymc": _with(run_pymc, nutpie=False),
}
_OWN = ("probmodels", "pyro", "pyro-eager")  # run in the environment of this project

# Chains, warm-up and draws per chain, and options: the cheapest found for each that reach the target with most seeds.
# Samplers whose chains cost what they take get few, those whose cost is compilation get many. Tried for BlackJAX:
# learning rates 0.02, 0.05 and 0.1, unit and diagonal mass, 16 to 64 chains, warm-up of 50 to 300.
BUDGETS: dict[tuple[str, str], tuple[int, int, int, dict[str, Any]]] = {
    ("pyro", "eight_schools"): (1, 150, 1100, {}),
    ("pyro", "logistic"): (1, 150, 500, {}),
    ("pyro", "gaussian"): (1, 150, 700, {}),
    ("numpyro", "eight_schools"): (4, 200, 220, {}),
    ("numpyro", "logistic"): (4, 150, 140, {}),
    ("numpyro", "gaussian"): (4, 200, 200, {}),
    ("blackjax", "eight_schools"): (64, 100, 40, {}),
    ("blackjax", "logistic"): (32, 50, 50, {}),
    ("blackjax", "gaussian"): (64, 100, 60, {}),
    ("nutpie", "eight_schools"): (4, 200, 250, {}),
    ("nutpie", "logistic"): (4, 150, 100, {}),
    ("nutpie", "gaussian"): (4, 200, 200, {}),
    ("pymc", "eight_schools"): (2, 200, 400, {}),
    ("pymc", "logistic"): (2, 200, 250, {}),
    ("pymc", "gaussian"): (2, 200, 400, {}),
}
BUDGETS |= {
    ("probmodels", "eight_schools"): (32, 100, 80, {}),
    ("probmodels", "logistic"): (16, 60, 60, {}),
    ("probmodels", "gaussian"): (32, 60, 60, {}),
}
BUDGETS |= {(f"{p}-eager", m): budget for (p, m), budget in BUDGETS.items() if p == "pyro"}
BUDGETS |= {(f"{p}-x64", m): budget for (p, m), budget in BUDGETS.items() if p in ("numpyro", "blackjax")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=("run", "cold", "child"))
    parser.add_argument("folder", nargs="?", type=Path, help=argparse.SUPPRESS)
    parser.add_argument(
        "--peer", nargs="+", choices=list(PEERS), default=[name for name in PEERS if name != "probmodels"]
    )
    parser.add_argument("--model", nargs="+", choices=list(SITES), default=list(SITES))
    parser.add_argument("--chains", type=int, default=4)
    parser.add_argument("--warmup", type=int, default=500)
    parser.add_argument("--draws", type=int, default=500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--python", help="interpreter of an environment that has the peers")
    parser.add_argument("--options", type=json.loads, default={}, help="further arguments of the peer, as JSON")
    given = parser.parse_args()
    if given.mode == "child":
        return child(given.folder)
    for model in given.model:
        for peer in given.peer:
            for seed in given.seeds:
                if given.mode == "cold":
                    out = run_cold(peer, model, seed=seed, python=given.python)
                else:
                    budget = {"chains": given.chains, "warmup": given.warmup, "draws": given.draws, "seed": seed}
                    out = run_peer(peer, model, **budget, python=given.python, **given.options)
                print(json.dumps(out), flush=True)


if __name__ == "__main__":
    main()
