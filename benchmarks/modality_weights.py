"""Posteriors of temperature, weight, and the times and scale of a path, by Markov chains, against grids and the truth.

    python benchmarks/modality_weights.py grid --sets 10
    python benchmarks/modality_weights.py paths --sets 40

``grid``: towers are fitted to 40 rows of two simulated modalities and held. Chains of `weights_problem` draw the
temperature, the weight of consistency, and time and scale of a path of one point. In plain torch their densities given
the towers are summed on grids. Printed are the largest difference of posterior means and sds of logarithms (of the
time itself) in units of the grid's sd, and in Monte Carlo standard errors. ``paths``: 60 simulated paths of three
points in 8 dimensions, times drawn from the prior and scale from LogNormal(log 0.25, 1); coverage of 95 % intervals,
with Student's intervals over sets.
"""

from __future__ import annotations

import common  # isort: skip  (pins threads before numpy is loaded)

import argparse
import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from probmodels import Problem, diagnose, fit_svi, run_mcmc
from probmodels.datasets.paired.views import make_views
from probmodels.inference.diagnostics.report import summarize
from probmodels.modality_structure import make_problem, weights_problem
from probmodels.modality_structure.paths import STEPS_PRIOR, path_site, sample_path
from probmodels.modality_structure.structures import sample_bridge

CHAINS: dict[str, Any] = {"num_chains": 8, "num_samples": 250, "warmup_steps": 200, "progress": False}
LONG: dict[str, Any] = {"num_chains": 8, "num_samples": 1000, "warmup_steps": 400, "progress": False}
LONG |= {"kernel_options": {"target_accept_prob": 0.95}}  # time and scale make a funnel where the time is near an end
QUANTITIES = ("temperature", "weight_consistency", "path_scale", "path_time")


def densities(z: Tensor, other: Tensor, points: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Values and probabilities on grids, given embeddings and the points of a path (row, size)."""
    count, own = len(z), torch.arange(len(z))
    log = torch.linspace(math.log(1e-4), math.log(3), 800).double()
    tables = [z @ other.T / one.exp() for one in log]
    fit = torch.stack(
        [-sum(F.cross_entropy(x, own, reduction="sum") for x in (t, t.T)) for t in tables]  # type: ignore[misc]
    )
    found = {"temperature": (log, (fit - 0.5 * (log - math.log(0.1)) ** 2).softmax(0))}
    squares = (z @ other.T - other @ z.T).square().sum() + (z @ z.T - other @ other.T).square().sum()
    log = torch.linspace(math.log(1e-3), math.log(1e4), 8000).double()
    fit = count * (count - 1) * log / 2 - log.exp() * squares - 0.5 * (log - math.log(0.05)) ** 2
    found["weight_consistency"] = log, fit.softmax(0)
    axes = torch.linspace(math.log(0.02), math.log(20), 800).double(), torch.linspace(-8, 8, 801).double()
    scale, logit = (x.flatten() for x in torch.meshgrid(*axes, indexing="ij"))
    time = logit.sigmoid()
    off, line = points - z, other - z
    square = off.square().sum() - 2 * time * (off * line).sum() + time**2 * line.square().sum()
    spread = (2 * scale).exp() * time * (1 - time)
    fit = -0.5 * square / spread - 0.5 * points.numel() * spread.log()
    fit = (fit - 0.5 * (scale - math.log(0.25)) ** 2 + STEPS_PRIOR * (time * (1 - time)).log()).softmax(0)
    return found | {"path_scale": (scale, fit), "path_time": (time, fit)}


def against_grid(seed: int) -> dict[str, tuple[float, float]]:
    """Differences of means and sds, in sds, and of means in Monte Carlo standard errors, for each quantity."""
    rng = np.random.default_rng(seed)
    shared, noise = rng.normal(size=(40, 3)), 0.3 * rng.normal(size=(2, 40, 6))
    views = [shared @ rng.normal(size=(3, 6)) + noise[i] for i in range(2)]
    problem = make_problem(
        make_views(dict(zip(("image", "text"), views, strict=True)), seed=seed), size=4, hidden=16, consistency=0.05
    )
    fitted = fit_svi(problem, num_steps=120, lr=0.005, num_samples=10, seed=seed, progress=False)
    held = weights_problem(fitted, inferred=["consistency"], path=1)
    result = run_mcmc(held, seed=seed, **LONG)
    draws = result.posterior
    model: Any = held.model
    (z, _), (other, _) = model.held.z.values()
    found = {}
    for name, (value, probability) in densities(z, other, model.held.points["image"].squeeze(1)).items():
        mean = float((probability * value).sum())
        sd = math.sqrt(float((probability * (value - mean).square()).sum()))
        time = draws["path_steps"].isel(path_step=0, drop=True).rename("path_time")
        drawn = time if name == "path_time" else np.log(draws[name])
        error = float(summarize(drawn.to_dataset(name=name))["mcse_mean"].iloc[0])
        off = float(drawn.mean()) - mean
        found[name] = max(abs(off), abs(float(drawn.std()) - sd)) / sd, abs(off) / error
    print(f"{seed}: {'passed' if diagnose(result).ok else 'failed'}", {k: np.round(v, 3) for k, v in found.items()})
    return found


def covered(seed: int) -> dict[str, float]:
    """Whether 95 % intervals hold the times and the scale of simulated paths."""
    generator = torch.Generator().manual_seed(seed)
    rng = np.random.default_rng(seed)
    steps, scale = rng.dirichlet([STEPS_PRIOR] * 4), float(0.25 * np.exp(rng.normal()))
    times = torch.as_tensor(steps.cumsum()[:3], dtype=torch.get_default_dtype())
    start, end = F.normalize(torch.randn(2, 60, 8, generator=generator), dim=-1)
    torch.manual_seed(seed)
    line = start.unsqueeze(1) + times.unsqueeze(-1) * (end - start).unsqueeze(1)
    points = line + scale * sample_bridge(0 * start, 0 * end, times)

    def model() -> None:
        path = sample_path(3, 0.25, points)
        path_site("path", points, (start, end), path, torch.ones(len(points), dtype=torch.bool))

    draws = run_mcmc(Problem("paths", model), seed=seed, **CHAINS).posterior
    dims = ("chain", "draw")
    drawn = [draws["path_steps"].cumsum("path_step").isel(path_step=k) for k in range(3)] + [draws["path_scale"]]
    truth = [*times.tolist(), scale]
    ends = [[float(x) for x in one.quantile([0.025, 0.975], dims)] for one in drawn]
    inside = [float(low < value < high) for (low, high), value in zip(ends, truth, strict=True)]
    return {"times": float(np.mean(inside[:3])), "scale": inside[3]}


def main() -> None:
    """Print one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("grid", "paths"))
    parser.add_argument("--sets", type=int, default=10)
    args = parser.parse_args()
    if args.part == "grid":
        runs = [against_grid(seed) for seed in range(args.sets)]
        for name in QUANTITIES:
            off, errors = (np.array([run[name][k] for run in runs]) for k in (0, 1))
            print(
                f"{name:20s} off by at most {off.max():.3f} sds, means by {common.spread(errors)} MC errors", flush=True
            )
        return
    held = [covered(seed) for seed in range(args.sets)]
    for what in ("times", "scale"):
        print(f"coverage of {what}: {common.interval([one[what] for one in held])} in {args.sets} sets", flush=True)


if __name__ == "__main__":
    main()
