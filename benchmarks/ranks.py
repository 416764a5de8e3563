"""Whether the number of modes of a field is found: by hidden blocks, and as a posterior.

    python benchmarks/ranks.py known [--sets 20] [--kinds NAME ...] [--seed 0]
    python benchmarks/ranks.py field [--data DIR] [--ranks 4 8 ...] [--seed 0]
    python benchmarks/ranks.py prior [--sets 200] [--seed 0]
    python benchmarks/ranks.py posterior [--sets 12] [--kinds NAME ...] [--seed 0]

``known``: simulated fields on a grid of 8 x 10 cells of 240 months of which the number of modes is known, 2 to 5,
drawn for each set. Patterns are smooth and orthonormal in coordinates where noise is white, series AR(1) processes of
.3 to .9. The variance of the last mode there is 1 to 2 times that of the edge of pure noise, (1 + (cells /
times)^1/2)^2; each one before has 1.6 to 3 times that of the next. Noise is white, or correlated between cells (Matern
3/2 of e-folding 2 to 4 cells, a quarter of it white), persistent (AR(1) of .6), of a level of each cell (log- normal
of sd .4), or all of these with a fifth of the entries missing in blocks. Ranks 1 to 7 are compared at the default
settings. Printed are, for each kind: how often the chosen rank is that of the simulation, and how often it is below
and above; how often it is among those that are not told apart from the best (``alike``, with their mean number); how
often the ranks of least root mean square error and CRPS are right; the error of hidden blocks of the chosen rank over
that of the best, median and largest; the coverage of 95 % intervals at the chosen rank; CPU seconds of a set. The rule
was chosen on sets of seed 77.

``field``: monthly anomalies of ERSST v5 in the north Pacific (``DIR`` holds ``ersst_v5_north_pacific_1950_2019.nc``),
717 cells, 20 % hidden in blocks of 6 months x 3 x 4 cells.

``prior``: the posterior of the number of modes (``shrinkage="log_uniform"``) where all parameters are drawn from the
prior, 20 cells x 60 times, up to 6 modes, white noise. Here any function of the parameters must be calibrated: a check
of the code.

``posterior``: the same posterior, up to 8 modes, for the fields of ``known``, whose modes all vary more than the noise;
and for noise alone, of no mode. The row ``white`` has white noise in the model too, the others correlated noise, whose
covariance is estimated about the number of modes that hidden blocks choose.

Printed are, for the last two: how often the most probable number is right, too few and too many, and how probable it is
on average (``says``); how often the most probable numbers of 95 % together hold the truth, and their probability; the
mean probability of the truth, and the mean that calibration would give. Two chains of 1000 sweeps after 300.
"""

from __future__ import annotations

import common  # noqa: F401  # isort: skip  (pins threads before numpy is loaded)

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import xarray as xr
from pyro import poutine

from probmodels.bayesian_svd import make_problem
from probmodels.bayesian_svd.gaps.ranks import compare_ranks
from probmodels.bayesian_svd.noise import filtered_by, unfiltered_by
from probmodels.datasets.sst import load_sst
from probmodels.distributions.covariance import correlation, euclidean_distance
from probmodels.inference.problem import Problem

GRID, TIMES = (8, 10), 240
KINDS = {  # whether noise is correlated between cells, persistent, of different levels, and with gaps
    "white": (False, False, False, False),
    "local": (True, False, False, False),
    "persistent": (True, True, False, False),
    "levels": (True, False, True, False),
    "gaps": (True, True, True, True),
}
MOST = 7
ROOM, CHAINS, WARMUP, DRAWS = 8, 2, 300, 1000


def simulate(kind: str, rng: np.random.Generator, empty: bool = False) -> tuple[xr.DataArray, int]:
    """A field (time, lat, lon) and its number of modes, none where it is empty."""
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
    if empty:
        patterns, series, rank = patterns[:, :0], series[:0], 0
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
    columns = ("right", "below", "above", "alike", "by RMSE", "by CRPS", "error / best", "coverage", "CPU s")
    print("kind        sets  " + "  ".join(f"{name:>13s}" for name in columns), flush=True)
    for kind in args.kinds:
        rows = []
        start = time.process_time()
        for number in range(args.sets):
            rng = np.random.default_rng([args.seed, list(KINDS).index(kind), number])
            field, rank = simulate(kind, rng)
            found = compare_ranks(field, range(1, MOST + 1), area_weights=False, seed=number, progress=False)
            own = found.sel(rank=found.attrs["chosen"])
            alike = found["rank"].values[found["alike"].values]
            best = [found.attrs[name] == rank for name in ("best_rmse", "best_crps")]
            ratio = float(own["rmse"] / found["rmse"].min())
            rows.append((found.attrs["chosen"] - rank, rank in alike, len(alike), *best, ratio, float(own["coverage"])))
            if args.verbose:
                print(number, rank, found.attrs["chosen"], list(alike), np.round(found["crps"].values, 4), flush=True)
        off, held, count, *right, error, inside = np.array(rows).T
        cells = [f"{np.sum(x)}" for x in (off == 0, off < 0, off > 0)]
        cells += [f"{held.sum():.0f} of {count.mean():.1f}", *(f"{x.sum():.0f}" for x in right)]
        cells += [f"{np.median(error):.3f} ({error.max():.3f})", f"{inside.mean():.3f}"]
        cells.append(f"{(time.process_time() - start) / args.sets:.1f}")
        print(f"{kind:12s}{args.sets:4d}  " + "  ".join(f"{cell:>13s}" for cell in cells), flush=True)


def counts(problem: Problem, seed: int) -> np.ndarray:
    """Number of modes that vary more than the noise, in each draw."""
    assert problem.kernel is not None
    found = []
    for chain in range(CHAINS):
        kernel = problem.kernel(problem)
        kernel.seed(100 * seed + chain)
        kernel.setup(WARMUP)
        draws = [kernel.sample({}) for _ in range(WARMUP + DRAWS)][WARMUP:]
        found += [int((draw["d"] > draw["sigma"]).sum()) for draw in draws]
    return np.array(found)


def judged(found: np.ndarray, truth: int, most: int) -> tuple[float, ...]:
    """Most probable number less the truth and its probability; whether the 95 % set holds the truth and the set's
    probability; probability of the truth, and its mean were the posterior right."""
    probability = np.bincount(found, minlength=most + 1) / len(found)
    order = np.argsort(-probability, kind="stable")
    inside = order[: 1 + int(np.searchsorted(np.cumsum(probability[order]), 0.95 - 1e-12))]
    one = (order[0] - truth, probability[order[0]], truth in inside, probability[inside].sum())
    return (*map(float, one), float(probability[truth]), float((probability**2).sum()))


def print_judged(name: str, rows: list[tuple[float, ...]], seconds: float) -> None:
    """One line of either table; a header where there are no rows."""
    if not rows:
        columns = ("right", "below", "above", "says", "in set", "says", "p(truth)", "if right", "CPU s")
        print("kind               sets  " + "  ".join(f"{column:>8s}" for column in columns), flush=True)
        return
    off, top, held, mass, own, expected = np.array(rows).T
    cells = [f"{np.mean(x):.2f}" for x in (off == 0, off < 0, off > 0)]
    cells += [f"{x.mean():.2f}" for x in (top, held, mass, own, expected)] + [f"{seconds / len(rows):.1f}"]
    print(f"{name:18s}{len(rows):5d}  " + "  ".join(f"{cell:>8s}" for cell in cells), flush=True)


def prior(args: argparse.Namespace) -> None:
    """Parameters from the prior."""
    cells, times, most = 20, 60, 6
    coords = {"cell": np.arange(cells, dtype=float), "time": np.arange(times, dtype=float)}

    def problem(values: np.ndarray) -> Problem:
        data = xr.DataArray(values, dims=("cell", "time"), coords=coords)
        options = {"series": "ar1", "frame_prior": "uniform", "shrinkage": "log_uniform", "area_weights": False}
        made: Problem = make_problem(data, rank=most, scale=8.0, noise_prior=(8.0, 8.0), **options)
        return made

    template, rows, start = problem(np.random.default_rng(0).standard_normal((cells, times))), [], time.process_time()
    print_judged("", [], 0.0)
    for number in range(args.sets):
        rng = np.random.default_rng([args.seed, 9, number])
        torch.manual_seed(int(rng.integers(2**31)))
        nodes = poutine.trace(template.model).get_trace(*template.args, **template.kwargs).nodes
        u, d, f, sigma = (nodes[name]["value"].numpy() for name in ("U", "d", "F", "sigma"))
        values = template.args[0].space.basis.numpy() @ (u * d) @ f.T + sigma * rng.standard_normal((cells, times))
        rows.append(judged(counts(problem(values), number), int((d > sigma).sum()), most))
    print_judged("from the prior", rows, time.process_time() - start)


def about(field: xr.DataArray, seed: int) -> int:
    """Number of modes about which noise is to be estimated, as `compare_ranks` finds it."""
    found = compare_ranks(field, range(1, MOST + 1), area_weights=False, seed=seed, progress=False)
    chosen = found.sel(rank=found.attrs["chosen"])
    return min(int(chosen["rank"]), int(chosen["num_modes"]))


def posterior(args: argparse.Namespace) -> None:
    """Known numbers of modes."""
    print_judged("", [], 0.0)
    cases = [(kind, empty) for empty in (False, True) for kind in args.kinds]
    for kind, empty in cases:
        rows, start = [], time.process_time()
        for number in range(args.sets):
            rng = np.random.default_rng([args.seed, list(KINDS).index(kind), number])
            field, rank = simulate(kind, rng, empty)
            options = {"series": "ar1", "shrinkage": "log_uniform", "area_weights": False}
            if kind != "white":
                options |= {"noise": "correlated", "noise_rank": about(field, number)}
            problem = make_problem(field, rank=ROOM, frame_prior="uniform", **options)
            found = counts(problem, number)
            rows.append(judged(found, rank, ROOM))
            if args.verbose:
                print(number, rank, np.round(np.bincount(found, minlength=ROOM + 1) / len(found), 2), flush=True)
        print_judged(f"{kind}{', no mode' * empty}", rows, time.process_time() - start)


def field(args: argparse.Namespace) -> None:
    """Monthly anomalies of the north Pacific."""
    data = load_sst(str(args.data / "ersst_v5_north_pacific_1950_2019.nc"))
    start = time.process_time()
    found = compare_ranks(
        data, args.ranks, block=(6, 3, 4), share=0.2, fixed_effects=("intercept", "trend"), seed=args.seed
    )
    names = [name for name in found.data_vars if found[name].dims == ("rank",)]
    print(found[names].to_dataframe().to_string(float_format="%.4f"))
    print(found.attrs["sentence"])
    print(f"{time.process_time() - start:.0f} CPU s")


def main() -> None:
    """One of the four."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("known", "field", "prior", "posterior"))
    parser.add_argument("--sets", type=int, default=20)
    parser.add_argument("--kinds", nargs="*", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--data", type=Path, default=Path("data/sst"))
    parser.add_argument("--ranks", type=int, nargs="*", default=[4, 8, 12, 16, 20, 25, 30])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbose", action="store_true", help="print each set")
    args = parser.parse_args()
    {"known": known, "field": field, "prior": prior, "posterior": posterior}[args.what](args)


if __name__ == "__main__":
    main()
