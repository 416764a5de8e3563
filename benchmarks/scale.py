"""Cost on large fields: n = 3600, m = 600, k = 5, and how the time of a sweep grows with n at fixed basis size.

A fixed domain is sampled ever more finely. The length-scales stay the same, so the number of basis functions that hold
all but ``tail`` of the variance stays the same too, and a sweep should cost the same; set-up grows.
"""

from __future__ import annotations

import common  # isort: skip  (pins threads before numpy is loaded)

import argparse
from typing import Any

import numpy as np


def prepare(side: int, m: int, tail: float, shortest: list[float], seed: int) -> tuple[common.Sampler, float]:
    """A sampler past its first sweeps on a grid of ``side`` x ``side`` cells, and the CPU seconds of its set-up."""
    sampler = common.block_gibbs(common.plane(side, m, seed), tail=tail, shortest=shortest)
    setup = sampler.setup_seconds + common.warm_up(sampler, 0, seed)
    common.warm_up(sampler, 200, seed)
    return sampler, setup


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="+", default=[30, 45, 60])
    parser.add_argument("--times", type=int, default=600)
    parser.add_argument("--tail", type=float, default=1e-5)
    parser.add_argument(
        "--shortest", type=float, nargs=2, default=[2.0, 1.5], help="shortest length-scales in space and time; truth 3"
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    common.compile_samplers()
    prepared = [prepare(side, options.times, options.tail, options.shortest, options.seed) for side in options.sides]
    times = np.array(  # sizes alternate, so that a busy machine slows all of them
        [[common.seconds_per_sweep(sampler.kernel, 40) for sampler, _ in prepared] for _ in range(options.repeats)]
    )
    rows: list[dict[str, Any]] = [
        {
            "n": side**2,
            "m": options.times,
            "basis": "{}/{}".format(*sampler.shape),
            "set-up CPU s": setup,
            "sweep ms": common.spread(1e3 * times[:, i]),
        }
        for i, (side, (sampler, setup)) in enumerate(zip(options.sides, prepared, strict=True))
    ]
    if len(rows) > 1:
        cells = 2 * np.log(options.sides)
        exponents = [np.polyfit(cells, np.log(repeat), 1)[0] for repeat in times]
        print(f"\nsweep time grows as n to the power {common.spread(exponents, 2)}")
        options.exponent = float(np.median(exponents))
    common.report("scale", rows, **vars(options))


if __name__ == "__main__":
    main()
