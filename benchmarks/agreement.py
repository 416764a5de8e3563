"""The block sampler against Pyro's No-U-Turn sampler on the same density.

``small`` compares posteriors where NUTS can be run to the end (n = 15, m = 12, k = 2): means in units of their Monte
Carlo error, ratios of standard deviations, effective draws per CPU second. The frame prior is not invariant under a
relabelling of modes, and NUTS does not leave the labelling that it starts in; draws are therefore compared within each
labelling that NUTS visits.

``large`` is the paper's example (n = m = 100, k = 5). NUTS starts from a draw of the block sampler, which spares it the
search for the posterior, tunes itself for a while and then draws until the time is up. Beside its effective draws the
table gives its trajectories per second: what it could reach at best if each were an independent draw.

NUTS is given its best: `FrameReparam` makes frames of independent normals, candidates are summed out, the density is
traced once by torch.jit, and arguments are not validated.
"""

from __future__ import annotations

import common  # isort: skip  (pins threads before numpy is loaded)

import argparse
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import torch
import xarray as xr
from torch import Tensor

from probmodels.bayesian_svd import make_problem
from probmodels.bayesian_svd.model import MatrixData, SideData, frame_prior
from probmodels.bayesian_svd.sampler import BlockGibbs
from probmodels.distributions import FrameReparam
from probmodels.inference.mcmc.kernels import Kernel, NUTSKernel
from probmodels.inference.problem import Problem

Array = common.Array
Draws = dict[str, Array]


class StartedNUTS(NUTSKernel):
    """NUTS in the coordinates of the model, that starts where it is told."""

    init = "uniform"

    def start_at(self, values: dict[str, Tensor]) -> None:
        """Start at given values of unconstrained frames and positive scales."""
        parts = [slot.bijection.inv(values[name]).reshape(-1) for name, slot in self._potential.slots.items()]
        self._nuts.initial_params = {"x": torch.cat(parts)}


def reference(side: SideData, candidate: int) -> Tensor:
    """Covariance of a candidate in base coordinates."""
    if side.vectors is None:
        return torch.diag(side.values[candidate])
    return (side.vectors[candidate] * side.values[candidate]) @ side.vectors[candidate].T


def for_nuts(problem: Problem, candidate: int | None) -> Problem:
    """The problem with frames parametrised by one of their candidate covariances, or by none."""
    data: MatrixData = problem.args[0]
    sides = {"U": data.space, "V": data.time}
    reparam = {
        name: FrameReparam() if candidate is None else FrameReparam(reference(side, candidate))
        for name, side in sides.items()
    }
    return dataclasses.replace(problem, reparam=reparam)


def white(frame: Tensor, covariance: Tensor | None) -> Tensor:
    """Normals of typical length of which `FrameReparam` makes the frame."""
    xi = frame
    if covariance is not None:
        values, vectors = torch.linalg.eigh(covariance)
        xi = vectors.T @ frame / values.sqrt().unsqueeze(-1)
        xi = xi.flip(0)  # FrameReparam orders eigenvectors by size, largest first
    return xi * (len(xi) ** 0.5 / torch.linalg.vector_norm(xi, dim=0))


def collect(kernel: Kernel, num_draws: int, export: Callable[[Any], Any]) -> tuple[Draws, float]:
    """Draws stacked, and CPU seconds of sampling alone."""
    params, kept, seconds = kernel.initial_params, [], 0.0
    for _ in range(num_draws):
        start = time.process_time()
        params = kernel.sample(params)
        seconds += time.process_time() - start
        kept.append(export(params))
    return {name: torch.stack([one[name] for one in kept]).numpy() for name in ("U", "V", "d", "sigma")}, seconds


def small_problem(seed: int) -> Problem:
    n, m = 15, 12
    x, t = np.linspace(0, 1, n), np.linspace(0, 1, m)
    u = np.linalg.qr(np.stack([np.sin(3 * x + 0.3), np.cos(5 * x)], 1))[0]
    v = np.linalg.qr(np.stack([np.cos(6 * t), np.sin(8 * t + 1)], 1))[0]
    values = (u * [8.0, 4.0]) @ v.T + 0.6 * np.random.default_rng(seed).standard_normal((n, m))
    grid = [0.1, 0.2, 0.4, 0.8]
    return make_problem(
        xr.DataArray(values, dims=("cell", "time"), coords={"cell": x, "time": t}),
        rank=2,
        fixed_effects=(),
        kernel_space="matern32",
        kernel_time="matern32",
        length_scales_space=grid,
        length_scales_time=grid,
        nugget=1e-2,
        tail=0.0,
        area_weights=False,
        scale=8.0,
        noise_prior=(3.0, 1.0),
    )


def scalars(problem: Problem, draws: Draws) -> dict[str, Array]:
    """What is compared, (draw, ...), signs fixed; probabilities of the candidates given each draw of a frame."""
    data: MatrixData = problem.args[0]
    assert problem.data is not None
    ends = problem.data["reference_space"].values, problem.data["reference_time"].values
    # A labelling with the smaller mode first meets the references in the other order.
    order = np.arange(draws["d"].shape[1]) if draws["d"][0, 0] > draws["d"][0, 1] else np.array([1, 0])
    overlaps = np.einsum("sik,ik->sk", draws["U"], ends[0][:, order])
    overlaps = overlaps + np.einsum("sik,ik->sk", draws["V"], ends[1][:, order])
    sign = np.where(overlaps < 0, -1.0, 1.0)[:, None, :]
    out = {
        "U": data.space.basis.numpy() @ (draws["U"] * sign),
        "V": data.time.basis.numpy() @ (draws["V"] * sign),
        "d": draws["d"],
        "sigma^2": draws["sigma"] ** 2,
    }
    for name, side, site in (("space", data.space, "U"), ("time", data.time, "V")):
        logits = frame_prior(side, "conditioned").component_logits(torch.as_tensor(draws[site]))
        out[f"length-scale {name}"] = logits.exp().numpy()[..., :-1]
    return out


def compare(first: dict[str, Array], second: dict[str, Array]) -> list[dict[str, Any]]:
    """Means in Monte Carlo errors and ratios of standard deviations, a row for each quantity."""
    rows = []
    for name, draws in first.items():
        sizes = [common.effective_sample_size(x).ravel() for x in (draws, second[name])]
        sds = [x.std(0, ddof=1).ravel() for x in (draws, second[name])]
        difference = (draws.mean(0) - second[name].mean(0)).ravel()
        error = np.sqrt(sum(sd**2 / size for sd, size in zip(sds, sizes, strict=True)))
        z, ratio = difference / error, sds[0] / sds[1]
        rows.append(
            {
                "quantity": name,
                "entries": len(z),
                "z rms": float(np.sqrt((z**2).mean())),
                "z max": float(np.abs(z).max()),
                "sd ratio min": float(ratio.min()),
                "sd ratio max": float(ratio.max()),
                "ESS min block": float(sizes[0].min()),
                "ESS min NUTS": float(sizes[1].min()),
                "ESS median block": float(np.median(sizes[0])),
                "ESS median NUTS": float(np.median(sizes[1])),
            }
        )
    return rows


def run_small(options: argparse.Namespace) -> None:
    problem = small_problem(options.seed)
    kernel = BlockGibbs(problem)
    kernel.seed(options.seed)
    kernel.setup(500)
    collect(kernel, 500, dict)
    block, block_seconds = collect(kernel, options.sweeps, dict)
    chosen = for_nuts(problem, options.candidate)
    chains, nuts_seconds = [], 0.0
    for chain in range(options.chains):
        nuts = StartedNUTS(chosen)
        nuts.seed(options.seed + chain)
        nuts.setup(options.warmup, *chosen.args, **chosen.kwargs)
        params = nuts.initial_params
        for _ in range(options.warmup):
            params = nuts.sample(params)
        nuts.end_warmup()
        nuts.initial_params = params
        draws, seconds = collect(nuts, options.draws, nuts.export)
        chains.append(draws)
        nuts_seconds += seconds
        print(f"NUTS chain {chain}: {seconds:.0f} CPU s for {options.draws} draws, d {draws['d'].mean(0)}", flush=True)
    pooled = {name: np.concatenate([chain[name] for chain in chains]) for name in block}
    rows: list[dict[str, Any]] = []
    for larger in (0, 1):
        parts = [{name: x[d["d"][:, larger] > d["d"][:, 1 - larger]] for name, x in d.items()} for d in (block, pooled)]
        if min(len(part["d"]) for part in parts) < 100:
            continue
        found = compare(*(scalars(problem, part) for part in parts))
        share = [len(part["d"]) / len(d["d"]) for part, d in zip(parts, (block, pooled), strict=True)]
        for row in found:
            rate = {
                f"ESS/s ratio {kind}": (row[f"ESS {kind} block"] / (block_seconds * share[0]))
                / (row[f"ESS {kind} NUTS"] / (nuts_seconds * share[1]))
                for kind in ("min", "median")
            }
            rows.append({"larger mode": larger + 1, **row, **rate})
    common.report("agreement_small", rows, **vars(options), block_seconds=block_seconds, nuts_seconds=nuts_seconds)


def run_large(options: argparse.Namespace) -> None:
    simulation = common.paper_example(options.seed)
    grid = np.linspace(1.0, common.MAX_LENGTH_SCALE, 12).tolist()
    problem = make_problem(
        xr.DataArray(
            simulation.z,
            dims=("cell", "time"),
            coords={"cell": simulation.points[:, 0], "time": simulation.times},
        ),
        rank=len(simulation.d),
        fixed_effects=(),
        kernel_space="matern72",
        kernel_time="matern72",
        length_scales_space=grid,
        length_scales_time=grid,
        area_weights=False,
    )
    data: MatrixData = problem.args[0]
    kernel = BlockGibbs(problem)
    kernel.seed(options.seed)
    kernel.setup(1000)
    collect(kernel, 1000, dict)
    block, block_seconds = collect(kernel, options.sweeps, dict)
    ends = simulation.reference()

    def sizes(draws: Draws) -> dict[str, float]:
        full = {**draws, "U": data.space.basis.numpy() @ draws["U"], "V": data.time.basis.numpy() @ draws["V"]}
        aligned = common.align(full, ends)
        found = {name: common.effective_sample_size(aligned[name]) for name in ("U", "V", "d")}
        out = {f"{name} {kind.__name__}": float(kind(x)) for name, x in found.items() for kind in (np.min, np.median)}
        return {**out, "sigma^2": float(common.effective_sample_size(draws["sigma"] ** 2)[0])}

    chosen = for_nuts(problem, options.candidate)
    nuts = StartedNUTS(chosen)
    nuts.seed(options.seed)
    nuts.setup(options.warmup, *chosen.args, **chosen.kwargs)
    last = {name: torch.as_tensor(x[-1]) for name, x in block.items()}
    covariances = [
        None if options.candidate is None else reference(s, options.candidate) for s in (data.space, data.time)
    ]
    nuts.start_at(
        {
            "U_unconstrained": white(last["U"], covariances[0]),
            "V_unconstrained": white(last["V"], covariances[1]),
            "d": last["d"],
            "sigma": last["sigma"],
        }
    )
    nuts._nuts.setup(options.warmup)
    params, kept, gradients = nuts.initial_params, [], 0
    check = nuts.export(params)
    if not torch.allclose(check["U"], last["U"], atol=1e-6):
        raise RuntimeError("NUTS does not start from the draw of the block sampler; check `white` against FrameReparam")
    start = warm = time.process_time()
    warm_gradients = 0
    step = 0
    while time.process_time() - start < 60 * options.minutes:
        if step == options.warmup:
            nuts.end_warmup()
            warm, warm_gradients, gradients = time.process_time(), gradients, 0
        params = nuts.sample(params)
        stats = nuts.sample_stats()
        gradients += int(stats["n_steps"])
        if step >= options.warmup:
            kept.append(nuts.export(params))
        step += 1
        if step % 20 == 0:
            print(
                step,
                stats["step_size"],
                stats["n_steps"],
                stats["lp"],
                f"{time.process_time() - start:.0f} s",
                flush=True,
            )
    if len(kept) < 10:
        raise SystemExit(f"only {len(kept)} draws after warm-up; raise --minutes or lower --warmup")
    seconds = time.process_time() - warm
    drawn = {name: torch.stack([one[name] for one in kept]).numpy() for name in block}
    rows = []
    ours, theirs = sizes(block), sizes(drawn)
    for name, size in ours.items():
        rate = size / block_seconds
        rows.append(
            {
                "quantity": name,
                "block ESS/s": rate,
                "NUTS ESS/s": theirs[name] / seconds,
                "ratio": rate / (theirs[name] / seconds),
                "ratio if each trajectory were independent": rate / (len(kept) / seconds),
            }
        )
    common.report(
        "agreement_large",
        rows,
        **vars(options),
        ms_per_sweep=1e3 * block_seconds / options.sweeps,
        nuts_draws=len(kept),
        leapfrog_steps_per_draw=gradients / len(kept),
        ms_per_gradient=1e3 * seconds / gradients,
        warmup_gradients=warm_gradients,
        step_size=float(nuts.sample_stats()["step_size"]),
        ranks=list(data.z.shape),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    small = commands.add_parser("small", help="posteriors compared, n = 15")
    small.add_argument("--sweeps", type=int, default=60000)
    small.add_argument("--draws", type=int, default=3000)
    small.add_argument("--warmup", type=int, default=500)
    small.add_argument("--chains", type=int, default=2)
    large = commands.add_parser("large", help="speed at n = 100")
    large.add_argument("--sweeps", type=int, default=4000)
    large.add_argument("--warmup", type=int, default=100)
    large.add_argument("--minutes", type=float, default=10.0)
    for one in (small, large):
        one.add_argument("--seed", type=int, default=5)
        one.add_argument("--candidate", type=int, default=None, help="covariance that NUTS is whitened by")
    options = parser.parse_args()
    pyro.enable_validation(False)
    run_small(options) if options.command == "small" else run_large(options)


if __name__ == "__main__":
    main()
