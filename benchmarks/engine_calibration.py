"""Simulation-based calibration of vectorised ChEES-HMC and of NUTS, with controls that must fail.

    python benchmarks/engine_calibration.py [--replicates 200] [--seed 0] [--only NAME ...]

Every replicate draws parameters from the prior and data from the model, infers them anew, and ranks the truth among
99 thinned draws. Each configuration prints its lowest p-value against the limit that Bonferroni's correction sets, how
often central intervals hold the truth, and CPU seconds. The first control infers with a noise 1.5 times too wide; the
second accepts all proposals at three times the step size that suits.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import common
import numpy as np
import pyro
import pyro.distributions as dist
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor

from probmodels.inference import Problem, run_mcmc, sbc
from probmodels.inference.mcmc.chees import ChEESKernel

Array = NDArray[np.float64]
NUM_DRAWS = 99
VECTORISED = {"num_chains": 16, "num_samples": 50, "warmup_steps": 150}
ONE_CHAIN = {"kernel": "nuts", "num_chains": 1, "num_samples": 297, "warmup_steps": 150, "chain_method": "sequential"}


# -- models ------------------------------------------------------------------------------------------------------------

GROUPS, ROWS = 5, 4


def hierarchy_model(y: Tensor, factor: float = 1.0) -> None:
    """Group means (group,) around mu with sd tau, data (row, group) around them with sd sigma; all unknown."""
    mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 2.0))
    tau = pyro.sample("tau", dist.LogNormal(y.new_zeros(()), 0.5))
    sigma = pyro.sample("sigma", dist.LogNormal(y.new_zeros(()), 0.5))
    with pyro.plate("group", GROUPS, dim=-1):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        with pyro.plate("row", ROWS, dim=-2):
            pyro.sample("y", dist.Normal(theta, factor * sigma), obs=y)


def simulate_hierarchy(rng: np.random.Generator) -> tuple[dict[str, Any], Array]:
    mu, tau, sigma = 2 * rng.normal(), np.exp(0.5 * rng.normal()), np.exp(0.5 * rng.normal())
    theta = mu + tau * rng.normal(size=GROUPS)
    return {"mu": mu, "tau": tau, "sigma": sigma, "theta": theta}, theta + sigma * rng.normal(size=(ROWS, GROUPS))


DESIGN = np.random.default_rng(20).normal(size=(60, 3))


def logistic_model(y: Tensor, factor: float = 1.0) -> None:
    """Intercept and three slopes of 60 binary responses."""
    design = torch.as_tensor(DESIGN, dtype=y.dtype)
    intercept = pyro.sample("intercept", dist.Normal(y.new_zeros(()), 1.0))
    slope = pyro.sample("slope", dist.Normal(y.new_zeros(3), 1.5).to_event(1))
    with pyro.plate("row", len(design)):
        pyro.sample("y", dist.Bernoulli(logits=(intercept + design @ slope) / factor), obs=y)


def simulate_logistic(rng: np.random.Generator) -> tuple[dict[str, Any], Array]:
    intercept, slope = rng.normal(), 1.5 * rng.normal(size=3)
    chance = 1 / (1 + np.exp(-intercept - DESIGN @ slope))
    return {"intercept": intercept, "slope": slope}, (rng.random(len(DESIGN)) < chance).astype(float)


POINTS = 25


def mixture_model(y: Tensor, factor: float = 1.0) -> None:
    """Two normals whose means are ordered, with weight, lower mean and gap unknown; assignments are summed out."""
    weight = pyro.sample("weight", dist.Beta(y.new_tensor(2.0), 2.0))
    low = pyro.sample("low", dist.Normal(y.new_tensor(-1.0), 1.0))
    gap = pyro.sample("gap", dist.LogNormal(y.new_tensor(0.8), 0.5))
    with pyro.plate("row", POINTS):
        upper = pyro.sample("upper", dist.Bernoulli(weight))
        pyro.sample("y", dist.Normal(low + gap * upper, factor), obs=y)


def simulate_mixture(rng: np.random.Generator) -> tuple[dict[str, Any], Array]:
    weight, low, gap = rng.beta(2, 2), -1 + rng.normal(), np.exp(0.8 + 0.5 * rng.normal())
    upper = rng.random(POINTS) < weight
    return {"weight": weight, "low": low, "gap": gap}, low + gap * upper + rng.normal(size=POINTS)


# -- kernels -----------------------------------------------------------------------------------------------------------


class AcceptsAll(ChEESKernel):
    """Leapfrog at three times the step size that suits, and every proposal accepted that is a number."""

    def end_warmup(self) -> None:
        super().end_warmup()
        self._step *= 3

    def _leapfrog(self, momentum: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x, velocity, potential, slope = super()._leapfrog(momentum, steps)
        if self._count > self._warmup:  # as if the energy had not changed
            start = self._potential + 0.5 * momentum.square().sum(1)
            potential = torch.where(torch.isfinite(potential), start - 0.5 * velocity.square().sum(1), potential)
        return x, velocity, potential, slope


@dataclass(frozen=True)
class Setting:
    """What is simulated, and how it is inferred."""

    model: Callable[..., None]
    simulate: Callable[[np.random.Generator], tuple[dict[str, Any], Array]]
    run: dict[str, Any] = field(default_factory=lambda: VECTORISED)
    factor: float = 1.0
    control: bool = False

    def infer(self, y: Array, seed: int) -> xr.Dataset:
        problem = Problem(self.model.__name__, self.model, args=(torch.as_tensor(y), self.factor))
        return run_mcmc(problem, seed=seed, progress=False, **self.run).posterior


MODELS = {
    "hierarchy": (hierarchy_model, simulate_hierarchy),
    "logistic": (logistic_model, simulate_logistic),
    "mixture": (mixture_model, simulate_mixture),
}
SETTINGS = {
    **{f"{name}, vectorised": Setting(*parts) for name, parts in MODELS.items()},
    **{f"{name}, NUTS": Setting(*parts, run=ONE_CHAIN) for name, parts in MODELS.items()},
    "control: wide noise": Setting(*MODELS["hierarchy"], factor=1.5, control=True),
    "control: accepts all": Setting(*MODELS["hierarchy"], run={**VECTORISED, "kernel": AcceptsAll}, control=True),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicates", type=int, default=200)
    parser.add_argument("--nuts-replicates", type=int, default=40, help="of NUTS, which is slower; default 40")
    parser.add_argument("--control-replicates", type=int, default=80, help="of the controls; default 80")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=list(SETTINGS), help="some configurations; default all")
    options = parser.parse_args()
    rows, wrong = [], []
    for name, setting in SETTINGS.items():
        if options.only and name not in options.only:
            continue
        replicates = options.nuts_replicates if setting.run is ONE_CHAIN else options.replicates
        replicates = options.control_replicates if setting.control else replicates
        start = time.process_time()
        found = sbc(setting.simulate, setting.infer, num_replicates=replicates, num_draws=NUM_DRAWS, seed=options.seed)
        seconds = time.process_time() - start
        lowest = min(float(tests[v].min()) for tests in found.pvalues.values() for v in tests.data_vars)
        row = {
            "configuration": name,
            "replicates": replicates,
            "tests": found.num_tests,
            "lowest p": f"{lowest:.2g}",
            "limit": f"{found.limit:.2g}",
            "verdict": ("passed" if found.ok else "FAILED") + (", as it must" if setting.control != found.ok else ""),
        }
        shares = {float(p): [] for p in found.coverage["prob"]}
        for share in found.coverage.data_vars.values():
            for prob, values in shares.items():
                values.extend(np.atleast_1d(share.sel(prob=prob).values).ravel())
        for (
            prob,
            values,
        ) in shares.items():  # the error of one entry: those of a replicate are not independent
            error = np.sqrt(prob * (1 - prob) / replicates)
            row[f"{prob:.0%} intervals"] = f"{np.mean(values):.3f} ± {error:.3f}"
        rows.append({**row, "seed": options.seed, "CPU s": round(seconds)})
        if found.ok == setting.control:
            wrong.append(name)
        print(found, f"{seconds:.0f} CPU s", sep="\n", flush=True)
    common.report("engine_calibration", rows, **vars(options))
    print(f"not as they should be: {wrong}" if wrong else "all as they should be")
    return len(wrong)


if __name__ == "__main__":
    sys.exit(main())
