"""Time of a sweep against the published sampler, n = m = 100, 200, 500, k = 5.

Repeats alternate between the samplers, so that a busy machine slows all of them; the ratio is taken within a repeat.
Two ports of the published conditionals are timed: ``published`` does all that the published software does (Bessel
functions, kernels built twice, residual products); ``fast`` samples the same conditionals, implemented as fast as we
could, and is what claims refer to. Ours is timed at full rank (tail 0) and on a truncated basis, whose size follows
from the shortest length-scale that the prior allows. ``--parts`` times our sweep without some of its parts, no more.
"""

from __future__ import annotations

import common  # isort: skip  (pins threads before numpy is loaded)

import argparse
import time
from typing import Any

import numpy as np


def measure(size: int, repeats: int, tail: float, shortest: float, seed: int) -> dict[str, Any]:
    """One row of the table."""
    field = common.paper_example(seed) if size == 100 else common.growing_domain(size, seed)
    samplers = {
        "published": common.published(field),
        "fast": common.published(field, fast=True),
        "ours": common.block_gibbs(field, tail=tail, shortest=(shortest, shortest)),
    }
    for name, sampler in samplers.items():
        common.warm_up(sampler, 2 if name == "published" else 200, seed=seed)
    sweeps = {"published": max(1, 1000 // size), "fast": 5000 // size, "ours": 100}
    times: dict[str, list[float]] = {name: [] for name in samplers}
    for _ in range(repeats):
        for name, sampler in samplers.items():
            times[name].append(common.seconds_per_sweep(sampler.kernel, sweeps[name]))
    ours = np.array(times["ours"])
    return {
        "n = m": size,
        "basis": "{}/{}".format(*samplers["ours"].shape),
        "published ms": common.spread(1e3 * np.array(times["published"])),
        "fast ms": common.spread(1e3 * np.array(times["fast"])),
        "ours ms": common.spread(1e3 * ours),
        "published / ours": common.spread(np.array(times["published"]) / ours),
        "fast / ours": common.spread(np.array(times["fast"]) / ours),
    }


def parts(size: int, repeats: int, tail: float, shortest: float, seed: int) -> dict[str, Any]:
    """Milliseconds of our sweep, of the same without some parts, and of handing a draw over."""
    field = common.paper_example(seed) if size == 100 else common.growing_domain(size, seed)
    sampler = common.block_gibbs(field, tail=tail, shortest=(shortest, shortest))
    common.warm_up(sampler, 200, seed=seed)
    kernel: Any = sampler.kernel
    kinds = {"whole": (6, 10), "no rotations": (6, 0), "one step": (1, 10), "one step, no rotations": (1, 0)}
    times: dict[str, list[float]] = {name: [] for name in [*kinds, "handing over"]}
    for _ in range(repeats):
        for name, (kernel.num_steps, kernel.num_passes) in kinds.items():
            times[name].append(common.seconds_per_sweep(kernel, 300))
        start = time.process_time()
        for _ in range(300):
            kernel.initial_params  # noqa: B018  (a property that makes the tensors of a draw)
        times["handing over"].append((time.process_time() - start) / 300)
    return {"n = m": size} | {name: common.spread(1e3 * np.array(found)) for name, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 200, 500])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--tails", type=float, nargs="+", default=[0.0, 1e-6], help="variance that a basis may cut off")
    parser.add_argument(
        "--shortest", type=float, default=1.5, help="shortest length-scale of our prior; the truth is 3"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--parts", action="store_true", help="time our sweep without some of its parts")
    options = parser.parse_args()
    if options.parts:
        found = [parts(x, options.repeats, options.tails[-1], options.shortest, options.seed) for x in options.sizes]
        common.report("sweep_parts", found, **vars(options))
        return
    common.compile_samplers()
    rows = [
        {"tail": tail, **measure(size, options.repeats, tail, options.shortest, options.seed)}
        for tail in options.tails
        for size in options.sizes
    ]
    common.report("sweep_time", rows, **vars(options))


if __name__ == "__main__":
    main()
