"""Which process series follow: how often the comparison by hidden blocks of times is right, and a real field.

    python benchmarks/processes.py known [--sets 20] [--seed 0]
    python benchmarks/processes.py field --data DATA [--rank 5]

``known``: fields of 24 cells and 240 months, two modes six and four times as strong as the white noise, whose series
are independent in time, AR(1) of .9, Matérn 3/2 of a length-scale of 6 months, or Matérn 5/2 of 6; `compare_processes`
with all four, blocks of 6 months and of 2. Printed for each: sets in which each process is best, and in which it is
told apart from the best (by two standard errors): of the true process that should be a few of a hundred.

``field``: monthly ERSST v5 of the North Pacific since 1980 (``DATA/sst/ersst_v5_north_pacific_1950_2019.nc``), white
and correlated noise.
"""

from __future__ import annotations

import common  # noqa: F401  # isort: skip  (pins threads before numpy is loaded)

import argparse
import time
from pathlib import Path

import numpy as np
import xarray as xr

from probmodels.bayesian_svd.gaps.processes import compare_processes
from probmodels.datasets.sst import load_sst
from probmodels.distributions.processes import correlation_at

SERIES = ("iid", "ar1", "matern32", "matern52")
TRUE = {"iid": ("ar1", 0.0), "ar1": ("ar1", 0.9), "matern32": ("matern32", 6.0), "matern52": ("matern52", 6.0)}
CELLS, TIMES, SIZES, BLOCKS = 24, 240, (6.0, 4.0), (6, 2)


def simulated(name: str, seed: int) -> xr.DataArray:
    """A field of two modes of a process and white noise."""
    rng = np.random.default_rng([seed, list(TRUE).index(name)])
    lag = np.abs(np.subtract.outer(np.arange(TIMES), np.arange(TIMES)))
    root = np.linalg.cholesky(correlation_at(*TRUE[name], lag) + 1e-9 * np.eye(TIMES))
    patterns = np.linalg.qr(rng.standard_normal((CELLS, 2)))[0] * SIZES
    values = patterns @ (root @ rng.standard_normal((TIMES, 2))).T + rng.standard_normal((CELLS, TIMES))
    dates = (np.datetime64("1990-01", "M") + np.arange(TIMES)).astype("datetime64[ns]")
    return xr.DataArray(values, {"time": dates, "cell": np.arange(CELLS)}, ("cell", "time"))


def known(sets: int, seed: int) -> None:
    """Print a row for each true process and length of blocks."""
    for name in TRUE:
        for block in BLOCKS:
            best, apart = dict.fromkeys(SERIES, 0), dict.fromkeys(SERIES, 0)
            for index in range(sets):
                data = simulated(name, 1000 * seed + index)
                found = compare_processes(data, SERIES, rank=2, noise="white", block=block, progress=False)
                best[found.attrs["best"]] += 1
                for other in SERIES:
                    apart[other] += not bool(found["alike"].sel(series=other))
            print(
                f"true {name:9s} blocks of {block} ({sets} sets): best {best}, told apart from the best {apart}",
                flush=True,
            )


def field(data: Path, rank: int) -> None:
    """Print the comparison for a real field."""
    values = load_sst(str(data / "sst/ersst_v5_north_pacific_1950_2019.nc"), period="1980:2018")
    for noise in ("white", "correlated"):
        start = time.process_time()
        found = compare_processes(values, SERIES, rank=rank, noise=noise, progress=False)
        print(found.attrs["sentence"], f"({time.process_time() - start:.0f} CPU s)", flush=True)


def main() -> None:
    """Print what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["known", "field"])
    parser.add_argument("--sets", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the data")
    parser.add_argument("--rank", type=int, default=5)
    options = parser.parse_args()
    if options.what == "known":
        known(options.sets, options.seed)
    else:
        field(options.data, options.rank)


if __name__ == "__main__":
    main()
