"""The guide against the exact sampler on the embedded field: northern Pacific sea surface temperature, four modes.

The reference is ``run_mcmc`` with the block sampler. For each variable the table gives, over its entries, the median
distance of the means in posterior standard deviations, the share within 0.2 of them, the median ratio of standard
deviations and the share between 0.9 and 1.1. The Monte Carlo error of either is about 0.03. ``cells`` are the patterns
expanded from the basis to the cells. The log weights of the guide's draws give the PSIS k-hat, and their standard
deviation measures the distance of guide and posterior in nats.
"""

from __future__ import annotations

import common  # isort: skip  (pins threads before numpy is loaded)

import argparse
import dataclasses
import time
from typing import Any

import numpy as np
import xarray as xr

from probmodels.bayesian_svd import make_problem
from probmodels.datasets import sst
from probmodels.guides.bayesian_svd import BayesianSVDGuide
from probmodels.inference.diagnostics.convergence import psis_khat
from probmodels.inference.mcmc.run import run_mcmc
from probmodels.inference.problem import Problem
from probmodels.inference.variational.svi import fit_svi

VARIABLES = ("U", "V", "d", "sigma", "cells")


def moments(posterior: xr.Dataset, problem: Problem, name: str) -> tuple[common.Array, common.Array]:
    """Posterior means and standard deviations of a variable, flat."""
    draws = posterior["U" if name == "cells" else name].values
    if name == "cells":
        draws = np.einsum("nr,cdrk->cdnk", problem.data["basis_space_matrix"].values, draws, optimize=True)
    draws = draws.reshape(draws.shape[0] * draws.shape[1], -1)
    return draws.mean(0), draws.std(0)


def compare(exact: xr.Dataset, fitted: xr.Dataset, problem: Problem, name: str) -> dict[str, Any]:
    """One row of the table."""
    mean, sd = moments(exact, problem, name)
    other_mean, other_sd = moments(fitted, problem, name)
    shift, ratio = np.abs(other_mean - mean) / sd, other_sd / sd
    return {
        "variable": name,
        "entries": mean.size,
        "mean off, sd": f"{np.median(shift):.3f}",
        "within 0.2": f"{(shift < 0.2).mean():.3f}",
        "sd ratio": f"{np.median(ratio):.3f}",
        "98 % of ratios": "{:.2f}-{:.2f}".format(*np.quantile(ratio, [0.01, 0.99])),
        "within 0.9-1.1": f"{(np.abs(ratio - 1) < 0.1).mean():.3f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--num-steps", type=int, default=600)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--lr-decay", type=float, default=0.05)
    parser.add_argument("--num-samples", type=int, default=1000)
    parser.add_argument("--structures", nargs="+", default=["full", "mean_field"])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    matrix = sst.to_matrix(sst.default_field())
    problem = make_problem(matrix, rank=options.rank, fixed_effects=["intercept", "trend"])
    exact = run_mcmc(problem, num_samples=1000, warmup_steps=500, num_chains=4, seed=options.seed).posterior
    rows = []
    for structure in options.structures:
        guided = dataclasses.replace(problem, guide=BayesianSVDGuide(structure=structure))
        began = time.process_time()
        result = fit_svi(
            guided,
            num_steps=options.num_steps,
            lr=options.lr,
            lr_decay=options.lr_decay,
            num_samples=options.num_samples,
            seed=options.seed,
        )
        log_weight = result.tree["sample_stats"]["log_weight"].values
        fit = {
            "CPU s": f"{time.process_time() - began:.0f}",
            "k-hat": f"{psis_khat(log_weight):.2f}",
            "sd of log weight": f"{log_weight.std():.2f}",
        }
        rows += [{"guide": structure, **compare(exact, result.posterior, problem, name), **fit} for name in VARIABLES]
    common.report("svi_vs_mcmc", rows, **vars(options))


if __name__ == "__main__":
    main()
