"""Whether hidden blocks find the number of modes of a field.

    python benchmarks/ranks.py known [--sets 20] [--kinds NAME ...] [--seed 0]
    python benchmarks/ranks.py field [--data DIR] [--ranks 4 8 ...] [--seed 0]

``known``: simulated fields on a grid of 8 x 10 cells of 240 months of which the number of modes is known, 2 to 5,
drawn for each set. Patterns are smooth and orthonormal in coordinates where noise is white, series AR(1) processes of
.3 to .9. The variance of the last mode there is 1 to 2 times that of the edge of pure noise, (1 + (cells /
times)^1/2)^2; each one before has 1.6 to 3 times that of the next. Noise is white, or correlated between cells
(Matern 3/2 of e-folding 2 to 4 cells, a quarter of it white), persistent (AR(1) of .6), of a level of each cell (log-
normal of sd .4), or all of these with a fifth of the entries missing in blocks. Ranks 1 to 7 are compared at the
default settings. Printed are, for each kind: how often the chosen rank is that of the simulation, and how often it is
below and above; the error of hidden blocks of the chosen rank over that of the best, median and largest; how often
the number of axes above the edge of noise at the largest rank is that of the simulation (``edge``); the coverage of
95 % intervals at the chosen rank; CPU seconds of a set.

``field``: monthly anomalies of ERSST v5 in the north Pacific (``DIR`` holds ``ersst_v5_north_pacific_1950_2019.nc``),
717 cells, 20 % hidden in blocks of 6 months x 3 x 4 cells.
"""

from __future__ import annotations

import common  # noqa: F401  # isort: skip  (pins threads before numpy is loaded)

import argparse
import time
from pathlib import Path

import numpy as np
import xarray as xr

from probmodels.bayesian_svd.gaps.ranks import compare_ranks
from probmodels.bayesian_svd.noise import filtered_by, unfiltered_by
from probmodels.datasets.sst import load_sst
from probmodels.distributions.covariance import correlation, euclidean_distance

GRID, TIMES = (8, 10), 240
KINDS = {  # whether noise is correlated between cells, persistent, of different levels, and with gaps
    "white": (False, False, False, False),
    "local": (True, False, False, False),
    "persistent": (True, True, False, False),
    "levels": (True, False, True, False),
    "gaps": (True, True, True, True),
}
MOST = 7


def simulate(kind: str, rng: np.random.Generator) -> tuple[xr.DataArray, int]:
    """A field (time, lat, lon) and its number of modes."""
    local, persistent, levels, gaps = KINDS[kind]
    lat, lon = np.linspace(20, 40, GRID[0]), np.linspace(160, 180, GRID[1])
    points = (
        np.stack(np.meshgrid(np.arange(GRID[0]), np.arange(GRID[1]), indexing="ij"), -1).reshape(-1, 2).astype(float)
    )
    n, distance = len(points), euclidean_distance(points)
    scale = rng.uniform(2, 4)
    shape = 0.75 * correlation(distance, "matern32", scale).numpy() + 0.25 * np.eye(n) if local else np.eye(n)
    level = np.exp(0.4 * rng.standard_normal(n)) if levels else np.ones(n)
    root = np.linalg.cholesky(shape) * level[:, None]
    phi = 0.6 if persistent else 0.0
    rank = int(rng.integers(2, 6))
    smooth = np.linalg.cholesky(correlation(distance, "matern72", 4.0).numpy() + 1e-8 * np.eye(n))
    patterns = np.linalg.qr(np.linalg.solve(root, smooth @ rng.standard_normal((n, rank))))[0]
    edge = (1 + np.sqrt(n / (TIMES - 1))) ** 2
    variance = edge * rng.uniform(1, 2) * np.append(np.cumprod(rng.uniform(1.6, 3, rank - 1))[::-1], 1.0)
    series = np.array(
        [unfiltered_by(rng.standard_normal(TIMES), np.full(TIMES - 1, rho)) for rho in rng.uniform(0.3, 0.9, rank)]
    )
    series *= np.sqrt(variance / filtered_by(series, np.full(TIMES - 1, phi)).var(axis=1))[:, None]
    noise = unfiltered_by(rng.standard_normal((n, TIMES)), np.full(TIMES - 1, phi))
    values = root @ (patterns @ series + noise)
    field = (values + 3 * rng.standard_normal((n, 1))).T.reshape(TIMES, *GRID)
    if gaps:
        mask = np.zeros(field.shape, dtype=bool)
        while mask.mean() < 0.2:
            t, i, j = (rng.integers(size - width + 1) for size, width in zip(field.shape, (8, 3, 3), strict=True))
            mask[t : t + 8, i : i + 3, j : j + 3] = True
        field[mask] = np.nan
    months = np.datetime64("1980-01", "M") + np.arange(TIMES)
    coords = {"time": months.astype("datetime64[ns]"), "lat": lat, "lon": lon}
    return xr.DataArray(field, coords, ("time", "lat", "lon")), rank


def known(args: argparse.Namespace) -> None:
    """Fields of known rank."""
    columns = ("right", "below", "above", "best right", "error / best", "edge", "coverage", "CPU s")
    print("kind        sets  " + "  ".join(f"{name:>12s}" for name in columns), flush=True)
    for kind in args.kinds:
        place = list(KINDS).index(kind)
        chosen: list[int] = []
        ratio: list[float] = []
        inside: list[float] = []
        edge = best = 0
        start = time.process_time()
        for number in range(args.sets):
            rng = np.random.default_rng([args.seed, place, number])
            field, rank = simulate(kind, rng)
            found = compare_ranks(field, range(1, MOST + 1), area_weights=False, seed=number, progress=False)
            own = found.sel(rank=found.attrs["chosen"])
            chosen.append(found.attrs["chosen"] - rank)
            ratio.append(float(own["rmse"] / found["rmse"].min()))
            inside.append(float(own["coverage"]))
            best += found.attrs["best"] == rank
            edge += int(found["num_modes"][-1]) == rank
            if args.verbose:
                print(
                    rank,
                    found.attrs["best"],
                    found.attrs["chosen"],
                    found["num_modes"].values,
                    np.round(found["rmse"].values, 4),
                    np.round(found["coverage"].values, 3),
                    flush=True,
                )
        seconds = (time.process_time() - start) / args.sets
        off = np.array(chosen)
        cells = [f"{np.sum(off == 0)}", f"{np.sum(off < 0)}", f"{np.sum(off > 0)}"]
        cells += [
            f"{best}",
            f"{np.median(ratio):.3f} ({max(ratio):.3f})",
            f"{edge}",
            f"{np.mean(inside):.3f}",
            f"{seconds:.1f}",
        ]
        print(f"{kind:12s}{args.sets:4d}  " + "  ".join(f"{cell:>12s}" for cell in cells), flush=True)


def field(args: argparse.Namespace) -> None:
    """Monthly anomalies of the north Pacific."""
    data = load_sst(str(args.data / "ersst_v5_north_pacific_1950_2019.nc"))
    start = time.process_time()
    found = compare_ranks(
        data, args.ranks, block=(6, 3, 4), share=0.2, fixed_effects=("intercept", "trend"), seed=args.seed
    )
    names = [
        "rmse",
        "rmse_se",
        "crps",
        "crps_se",
        "coverage",
        "coverage_se",
        "log_score",
        "loss",
        "loss_se",
        "num_modes",
    ]
    print(found[names].to_dataframe().to_string(float_format="%.4f"))
    print(found.attrs["sentence"])
    print(f"{time.process_time() - start:.0f} CPU s")


def main() -> None:
    """One of the two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("known", "field"))
    parser.add_argument("--sets", type=int, default=20)
    parser.add_argument("--kinds", nargs="*", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--data", type=Path, default=Path("data/sst"))
    parser.add_argument("--ranks", type=int, nargs="*", default=[4, 8, 12, 16, 20, 25, 30])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbose", action="store_true", help="print each set")
    args = parser.parse_args()
    {"known": known, "field": field}[args.what](args)


if __name__ == "__main__":
    main()
