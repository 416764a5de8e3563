"""Cost on large fields: n = 3600, m = 600, k = 5, and how the time of a sweep grows with n at fixed basis size.

A fixed domain is sampled ever more finely. The length-scales stay the same, so the number of basis functions that hold
all but ``tail`` of the variance stays the same too, and a sweep should cost the same; set-up grows.
"""

from __future__ import annotations

import common  # isort: skip  (pins threads before numpy is loaded)

import argparse
import time
from typing import Any

import numpy as np


def measure(side: int, m: int, tail: float, repeats: int, seed: int) -> dict[str, Any]:
    """One row of the table, for a grid of ``side`` x ``side`` cells."""
    field = common.plane(side, m, seed)
    sampler = common.block_gibbs(field, tail=tail)
    start = time.process_time()
    sampler.kernel.seed(seed)
    sampler.kernel.setup(200)
    setup = sampler.setup_seconds + time.process_time() - start
    common.warm_up(sampler, 200, seed)
    times = [common.seconds_per_sweep(sampler.kernel, 50) for _ in range(repeats)]
    return {
        "n": side**2,
        "m": m,
        "basis": "{}/{}".format(*sampler.shape),
        "set-up CPU s": setup,
        "sweep ms": common.spread(1e3 * np.array(times)),
        "median ms": float(1e3 * np.median(times)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="+", default=[30, 40, 50, 60])
    parser.add_argument("--times", type=int, default=600)
    parser.add_argument("--tail", type=float, default=1e-5)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    common.compile_samplers()
    rows = []
    for side in options.sides:
        rows.append(measure(side, options.times, options.tail, options.repeats, options.seed))
        print(common.table(rows[-1:]), flush=True)
    if len(rows) > 1:
        cells, cost = (np.log([row[key] for row in rows]) for key in ("n", "median ms"))
        exponent = float(np.polyfit(cells, cost, 1)[0])
        print(f"\nsweep time ~ n^{exponent:.2f}")
        rows[-1]["exponent of sweep time in n"] = exponent
    common.report("scale", rows, **vars(options))


if __name__ == "__main__":
    main()
