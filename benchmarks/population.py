"""Whether intervals of modes of the population, and of trends, hold what they should.

    python benchmarks/population.py coverage [--sets 100] [--cases NAME ...] [--seed 0]
    python benchmarks/population.py trend [--sets 50] [--seed 0]
    python benchmarks/population.py noise [--sets 60] [--seed 0]
    python benchmarks/population.py variance [--sets 30] [--seed 7]
    python benchmarks/population.py fields [--data DIR]

``coverage``: data from a known population, 20 cells with three smooth patterns whose series are white, autoregressive
(.5 and .9) or Matérn processes (3/2, of length-scale 3 steps), over many or few effectively independent times. Printed
is the share of 95 % intervals that hold the population's patterns (all cells), explained variances and d, mode by mode,
for the posterior of the population (``series="ar1"``, or that of the Matérn process, and ``"ar1"`` beside it), for that
of the modes of these times (``series="frame"``), for a bootstrap of blocks of times, and for North's rule with the
effective number of times known. Standard errors are over sets.

``trend``: 30 cells x 80 times of one mode and noise .1, no trend: the share of 95 % intervals of the trend of a cell
that hold zero, and effective draws of the slowest trend per 1000 sweeps under flat and proper priors of the effects.

``noise``: two smooth modes of 40 cells and noise that is correlated between cells with an e-folding of 3 cells. Once 60
times, white along time; once 100 times, noise AR(1) .5 along time, of a level that trebles over the cells, under area
weights that double. The share of 95 % intervals that hold the population's patterns (all cells), explained variance and
d, where the model takes noise for white and where it takes it for correlated.

``variance``: how far off the covariance of the noise is that `estimate_noise` finds before a run. 40 cells x 100 times,
two modes with AR(1) .5 series, noise of an e-folding of 3 cells and AR(1) .3, its level trebling over the cells;
complete, with 10 % of single gaps, with 15 % in blocks of 6 cells x 6 times, and with an edge of ice that wanders over
the last cells. Mean over sets, its standard error, and the sd of sets, of what is estimated over what is true: the
variance of all cells, of cells of which less than 80 % was seen, and along the modes; the correlations of cells 1 and 3
apart; and the decay. The scale is that which the sampler would find from complete residuals.

``fields``: winter means of the embedded field of the Pacific and of ERSST's north Pacific (``DIR`` holds
``ersst_v5_north_pacific_1950_2019.nc``), four modes, linear trends taken out. The posterior sd of pattern entries times
d over that of a bootstrap of years, median by mode, modes of the resampled EOFs matched to those of all years; and the
share of cells at which the 95 % intervals of the two halves of the record agree, for modes of the population under
white and under correlated noise, and for modes of these times. Cells with ice at any time are left out.

One chain of 1200 sweeps after 300 in each set, at the default settings of the sampler.
"""

from __future__ import annotations

import common  # noqa: F401  # isort: skip  (pins threads before numpy is loaded)

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from scipy.optimize import linear_sum_assignment

from probmodels import run_mcmc
from probmodels.bayesian_svd import make_problem
from probmodels.bayesian_svd.draws import read_draws
from probmodels.bayesian_svd.noise import estimate_noise
from probmodels.datasets.sst import load_sst
from probmodels.distributions.processes import correlation_at
from probmodels.inference.diagnostics.convergence import convergence
from probmodels.inference.problem import Problem

WARMUP, DRAWS = 300, 1200
CELLS = 20
SIZE, NOISE = np.array([3.0, 2.0, 1.4]), 0.35
CASES: dict[str, tuple[str, float, int]] = {  # process, decay or length-scale in steps, times
    "white, 50 times": ("ar1", 0.0, 50),
    "AR(1) .5, 100 times": ("ar1", 0.5, 100),
    "AR(1) .9, 600 times": ("ar1", 0.9, 600),
    "white, 15 times": ("ar1", 0.0, 15),
    "AR(1) .5, 25 times": ("ar1", 0.5, 25),
    "AR(1) .9, 150 times": ("ar1", 0.9, 150),
    "Matern 3/2 of 3 steps, 100 times": ("matern32", 3.0, 100),
}
NOISY_CELLS, NOISY_SIZE = 40, np.array([3.0, 2.0])
NOISY = {  # weights and levels that differ by cell, times, decay of the noise, whether an edge leaves gaps
    "e-folding 3 cells, 60 times": (False, 60, 0.0, False),
    "e-folding 3 cells, AR(1) .5, levels .3 to .9, 100 times": (True, 100, 0.5, False),
    "the same, nothing seen beyond an edge that moves": (True, 100, 0.5, True),
}


def independent(process: str, scale: float, times: int) -> tuple[float, float]:
    """Effectively independent times of a variance, and the times that one of a mean is worth, in the limit of many."""
    lags = np.arange(1, 10_000)
    correlation = correlation_at(process, scale, lags)
    return times / (1 + 2 * float(correlation @ correlation)), 1 + 2 * float(correlation.sum())


def walks(rng: np.random.Generator, process: str, scale: float, times: int, count: int) -> np.ndarray:
    """Series of unit variance (count, times)."""
    if process == "ar1":
        return autoregressive(rng, scale, times, count)
    lags = np.subtract.outer(np.arange(times), np.arange(times))
    root = np.linalg.cholesky(correlation_at(process, scale, lags) + 1e-10 * np.eye(times))
    return rng.standard_normal((count, times)) @ root.T


def autoregressive(rng: np.random.Generator, decay: float, times: int, count: int) -> np.ndarray:
    """Series of unit variance (count, times)."""
    out = np.empty((count, times))
    out[:, 0] = rng.standard_normal(count)
    for t in range(1, times):
        out[:, t] = decay * out[:, t - 1] + np.sqrt(1 - decay**2) * rng.standard_normal(count)
    return out


def patterns(rng: np.random.Generator, count: int, cells: int = CELLS) -> np.ndarray:
    """Orthonormal smooth patterns (cell, mode), from draws of a smooth process."""
    x = np.linspace(0, 1, cells)
    covariance = np.exp(-0.5 * ((x[:, None] - x) / 0.25) ** 2) + 1e-8 * np.eye(cells)
    draws = np.linalg.cholesky(covariance) @ rng.standard_normal((cells, count))
    return np.asarray(np.linalg.qr(draws)[0])


def sampled(data: xr.DataArray, rank: int, series: str, noise: str) -> dict[str, np.ndarray]:
    """Draws of a real field, linear trends integrated out."""
    problem = make_problem(data, rank=rank, fixed_effects=["intercept", "trend"], series=series, noise=noise)
    if noise == "white":
        return draws_of(problem, 0)
    tree = run_mcmc(problem, num_chains=1, warmup_steps=WARMUP, num_samples=DRAWS, seed=0, progress=False).tree
    draws = read_draws(tree)
    return {"pattern": draws.patterns() * np.sqrt(draws.weight)[:, None] / draws.d[:, None, :], "d": draws.d}


def posterior(values: np.ndarray, seed: int, **options: Any) -> dict[str, np.ndarray]:
    """Draws of values (cell, time) on a line."""
    data = xr.DataArray(
        values,
        dims=("cell", "time"),
        coords={"cell": np.linspace(0, 1, len(values)), "time": np.arange(values.shape[1], dtype=float)},
    )
    return draws_of(make_problem(data, area_weights=False, **options), seed)


def draws_of(problem: Problem, seed: int) -> dict[str, np.ndarray]:
    """Draws by site, the first axis draws, of one chain; patterns at the cells."""
    assert problem.kernel is not None
    kernel = problem.kernel(problem)
    kernel.seed(seed)
    kernel.setup(WARMUP)
    params = kernel.initial_params
    kept = []
    for step in range(WARMUP + DRAWS):
        params = kernel.sample(params)
        if step >= WARMUP:
            kept.append({name: x.numpy() for name, x in kernel.export(params).items()})
    draws = {name: np.stack([row[name] for row in kept]) for name in kept[0]}
    basis = problem.args[0].space.basis.numpy()
    draws["pattern"] = np.einsum("nr,srk->snk", basis, draws["U"])
    if "V" in draws:
        basis = problem.args[0].time.basis.numpy()
        draws["series"] = np.einsum("tr,srk->stk", basis, draws["V"])
    return draws


def ordered(draws: dict[str, np.ndarray], truth: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Patterns with the truth's signs, d by size, and shares of the variance of the population."""
    order = np.argsort(-draws["d"], axis=1)
    pattern = np.take_along_axis(draws["pattern"], order[:, None, :], axis=2)
    pattern = pattern * np.sign((pattern * truth).sum(1))[:, None]
    d = np.take_along_axis(draws["d"], order, axis=1)
    share = d**2 / ((d**2).sum(1) + CELLS * draws["sigma"] ** 2)[:, None]
    return pattern, d, share


def bootstrap(values: np.ndarray, block: int, rng: np.random.Generator, count: int = 400) -> dict[str, np.ndarray]:
    """EOFs of resampled blocks of times."""
    times, rank = values.shape[1], len(SIZE)
    rows = []
    for _ in range(count):
        starts = rng.integers(times - block + 1, size=-(-times // block))
        index = (starts[:, None] + np.arange(block)).ravel()[:times]
        sample = values[:, index] - values[:, index].mean(1, keepdims=True)
        left, size, _ = np.linalg.svd(sample, full_matrices=False)
        noise = (size[rank:] ** 2).sum() / (times * (CELLS - rank))
        rows.append((left[:, :rank], size[:rank] / np.sqrt(times), np.sqrt(noise)))
    pattern, d, sigma = (np.array(x) for x in zip(*rows, strict=True))
    return {"pattern": pattern, "d": d, "sigma": sigma}


def holds(draws: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Whether equal-tailed 95 % intervals hold the truth."""
    low, high = np.quantile(draws, [0.025, 0.975], axis=0)
    return (low <= truth) & (truth <= high)


def coverage_set(process: str, scale: float, times: int, seed: int) -> dict[str, np.ndarray]:
    """What each kind of interval holds in one set: (3, mode) for patterns, explained variance and d."""
    rng = np.random.default_rng([seed, times, int(100 * scale)])
    truth = patterns(rng, len(SIZE))
    values = (truth * SIZE) @ walks(rng, process, scale, times, len(SIZE))
    values += NOISE * rng.standard_normal(values.shape)
    share = SIZE**2 / ((SIZE**2).sum() + CELLS * NOISE**2)
    found: dict[str, np.ndarray] = {}

    def note(name: str, draws: dict[str, np.ndarray]) -> None:
        pattern, d, shares = ordered(draws, truth)
        held = holds(pattern, truth).mean(0), holds(shares, share), holds(d, SIZE)
        found[name] = np.array(held, dtype=float)

    note("population", posterior(values, seed, rank=3, series=process))
    if process != "ar1":
        note("population, AR(1)", posterior(values, seed, rank=3, series="ar1"))
    these = posterior(values, seed, rank=3)
    note("these times", these | {"d": these["d"] / np.sqrt(times)})
    effective, worth = independent(process, scale, times)
    block = max(1, round(1.5 * worth)) if worth > 1 else 1
    note("bootstrap", bootstrap(values, min(block, times // 4), rng))
    size = np.linalg.svd(values - values.mean(1, keepdims=True), compute_uv=False) ** 2
    fraction = size[: len(SIZE)] / size.sum()
    north = np.abs(fraction - share) < 1.96 * fraction * np.sqrt(2 / effective)
    found["North"] = np.array([np.full(3, np.nan), north, np.full(3, np.nan)])
    return found


def coverage(sets: int, cases: list[str], seed: int) -> None:
    """Print a table for each case."""
    for name in cases:
        rows = [coverage_set(*CASES[name], 1000 * seed + index) for index in range(sets)]
        print(f"{name} (N* = {independent(*CASES[name])[0]:.0f}), {sets} sets", flush=True)
        print_held(rows)


def print_held(rows: list[dict[str, np.ndarray]]) -> None:
    """Print a line for each kind of interval, mode by mode."""
    for kind in rows[0]:
        held = np.array([row[kind] for row in rows])  # (set, quantity, mode)
        mean, error = held.mean(0), held.std(0, ddof=1) / np.sqrt(len(rows))
        parts = (
            f"{what} " + " ".join(f"{m:.3f}±{e:.3f}" for m, e in zip(mean[q], error[q], strict=True))
            for q, what in enumerate(("patterns", "variance", "d"))
        )
        print(f"  {kind:18s} " + "  ".join(parts), flush=True)


def noisy(weighted: bool, times: int, decay: float, rng: np.random.Generator) -> tuple[Any, ...]:
    """Data (cell, time) with correlated noise, area weights, patterns that are orthonormal by area, and shares."""
    place = np.arange(NOISY_CELLS)
    level = np.linspace(0.3, 0.9, NOISY_CELLS) if weighted else np.full(NOISY_CELLS, 0.5)
    weight = np.linspace(2.0, 1.0, NOISY_CELLS) if weighted else np.ones(NOISY_CELLS)
    weight = weight / weight.mean()
    covariance = np.exp(-np.abs(place[:, None] - place) / 3) * level[:, None] * level
    truth = patterns(rng, len(NOISY_SIZE), NOISY_CELLS)
    values = (truth / np.sqrt(weight)[:, None] * NOISY_SIZE) @ autoregressive(rng, 0.5, times, len(NOISY_SIZE))
    values += np.linalg.cholesky(covariance) @ autoregressive(rng, decay, times, NOISY_CELLS)
    share = NOISY_SIZE**2 / ((NOISY_SIZE**2).sum() + weight @ level**2)
    return values, weight, truth, share


def noise_set(case: tuple[bool, int, float, bool], seed: int) -> dict[str, np.ndarray]:
    """What intervals hold in one set: (3, mode) for patterns, explained variance and d, by model of noise."""
    weighted, times, decay, gaps = case
    rng = np.random.default_rng([seed, times, int(weighted)])
    values, weight, truth, share = noisy(weighted, times, decay, rng)
    if gaps:
        edge = NOISY_CELLS - 3 + 2 * autoregressive(rng, 0.5, times, 1)
        values[np.arange(NOISY_CELLS)[:, None] >= edge] = np.nan
    places = {"cell": np.linspace(0, 1, NOISY_CELLS), "time": np.arange(times, dtype=float)}
    data = xr.DataArray(values, dims=("cell", "time"), coords=places)
    found = {}
    for noise in ("white", "correlated"):
        problem = make_problem(data, rank=len(NOISY_SIZE), series="ar1", noise=noise, area_weights=weight.tolist())
        tree = run_mcmc(problem, num_chains=1, warmup_steps=WARMUP, num_samples=DRAWS, seed=seed, progress=False).tree
        draws = read_draws(tree)
        order = np.argsort(-draws.d, axis=1)
        d = np.take_along_axis(draws.d, order, axis=1)
        pattern = draws.patterns() * np.sqrt(weight)[:, None] / draws.d[:, None, :]
        pattern = np.take_along_axis(pattern, order[:, None, :], axis=2)
        pattern = pattern * np.sign((pattern * truth).sum(1))[:, None]
        shares = d**2 / ((d**2).sum(1) + draws.noise_variance())[:, None]
        found[noise] = np.array([holds(pattern, truth).mean(0), holds(shares, share), holds(d, NOISY_SIZE)], float)
    return found


def noise(sets: int, seed: int) -> None:
    """Print a table for each kind of noise."""
    for name, case in NOISY.items():
        rows = [noise_set(case, 1000 * seed + index) for index in range(sets)]
        print(f"{name}, {sets} sets", flush=True)
        print_held(rows)


VARIED = ("complete", "single gaps", "blocks", "ice")


def seen_of(kind: str, rng: np.random.Generator, times: int) -> np.ndarray:
    """Which values are seen (cell, time)."""
    seen = np.ones((NOISY_CELLS, times), dtype=bool)
    if kind == "single gaps":
        seen = rng.random(seen.shape) > 0.1
    while kind == "blocks" and seen.mean() > 0.85:
        cell, time = rng.integers(NOISY_CELLS - 5), rng.integers(times - 6)
        seen[cell : cell + 6, time : time + 6] = False
    if kind == "ice":
        edge = NOISY_CELLS - 4.5 + 3 * autoregressive(rng, 0.5, times, 1)[0]
        seen = np.arange(NOISY_CELLS)[:, None] < edge
    return seen


def variance_set(kind: str, rng: np.random.Generator, times: int = 100, rank: int = 2) -> dict[str, float]:
    """What is estimated of the noise over what is true, in one set."""
    place = np.arange(NOISY_CELLS)
    apart = np.abs(place[:, None] - place)
    level = np.linspace(0.3, 0.9, NOISY_CELLS)
    true = np.exp(-apart / 3) * np.outer(level, level)
    modes = np.linalg.qr(np.stack([np.sin(place / 9), np.cos(place / 5)], 1))[0]
    values = (modes * NOISY_SIZE) @ autoregressive(rng, 0.5, times, rank)
    values += np.linalg.cholesky(true) @ autoregressive(rng, 0.3, times, NOISY_CELLS)
    seen = seen_of(kind, rng, times)
    kept = seen.mean(1) > 0.3
    values, seen, modes, both = values[kept], seen[kept], modes[kept], np.ix_(kept, kept)
    true, distance = true[both], apart[both] / (NOISY_CELLS - 1)
    design = np.ones((times, 1))
    found, _ = estimate_noise(np.where(seen, values, 0.0), seen, design, np.ones(times - 1), distance, rank)
    rest = found.whitener @ ((values[:, 1:] - found.decay * values[:, :-1]) / np.sqrt(1 - found.decay**2))
    square = np.linalg.svd(rest - rest.mean(1, keepdims=True), compute_uv=False)[rank:] ** 2
    own = (found.vectors * found.values) @ found.vectors.T
    own *= square.sum() / ((len(values) - rank) * (times - 2 - rank))
    ratio, spread = np.diag(own) / np.diag(true), np.sqrt(np.diag(own))
    alike = own / np.outer(spread, spread)
    few = seen.mean(1) < 0.8
    return {
        "seen": float(seen.mean()),
        "variance": float(np.trace(own) / np.trace(true)),
        "of cells seen less than 80 %": float(ratio[few].mean()) if few.any() else np.nan,
        "along the modes": float(np.trace(modes.T @ own @ modes) / np.trace(modes.T @ true @ modes)),
        "correlation 1 apart": float(np.diag(alike, 1).mean() / np.exp(-1 / 3)),
        "correlation 3 apart": float(np.diag(alike, 3).mean() / np.exp(-1)),
        "decay": found.decay / 0.3,
    }


def variance(sets: int, seed: int) -> None:
    """Print how far off the noise is in each kind of gaps."""
    for kind in VARIED:
        rows = [variance_set(kind, np.random.default_rng([index, seed])) for index in range(sets)]
        print(f"{kind} ({sets} sets, {np.mean([row['seen'] for row in rows]):.0%} seen)")
        for name in list(rows[0])[1:]:
            found = np.array([row[name] for row in rows])
            found = found[np.isfinite(found)]
            if len(found) > 1:
                sd = found.std(ddof=1)
                text = f"{found.mean():.3f} ± {sd / np.sqrt(len(found)):.3f}, sd {sd:.3f}"
                print(f"  {name:30s}{text}{f' ({len(found)} sets)' * (len(found) < sets)}", flush=True)


def trend(sets: int, seed: int) -> None:
    """Print how often intervals of the trend hold zero."""
    times = 80
    for decay in (0.0, 0.8):
        for name, options in (
            ("these times, flat", {}),
            ("population, flat", {"series": "ar1"}),
            ("population, proper", {"series": "ar1", "effect_scale": 3.0, "tail": 0.0}),
        ):
            held, least = [], []
            for index in range(sets):
                rng = np.random.default_rng([1000 * seed + index, int(10 * decay)])
                pattern = rng.standard_normal((30, 1))
                pattern /= np.linalg.norm(pattern)
                values = 3.0 * pattern @ autoregressive(rng, decay, times, 1) + 0.1 * rng.standard_normal((30, times))
                draws = posterior(
                    values,
                    index,
                    rank=1,
                    frame_prior="uniform",
                    fixed_effects=("intercept", "trend"),
                    **_known(options),
                )["fixed_effects"][..., 1]
                held.append(holds(draws, np.zeros(30)).mean())
                least.append(float(np.min(convergence(draws[None])["ess_bulk"])) * 1000 / DRAWS)
            error = np.std(held, ddof=1) / np.sqrt(sets)
            print(
                f"AR(1) {decay:.1f}  {name:20s} holds zero {np.mean(held):.3f}±{error:.3f}, least ESS of a trend in "
                f"1000 sweeps: median {np.median(least):.0f}, smallest {np.min(least):.0f} ({sets} sets)",
                flush=True,
            )


def _known(options: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key != "tail"}  # the uniform prior has no truncation


def loadings(draws: dict[str, np.ndarray], reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and sd (cell, mode) of patterns times d, modes matched to a reference (cell, mode)."""
    rows = np.stack([matched(u * d, reference) for u, d in zip(draws["pattern"], draws["d"], strict=True)])
    return rows.mean(0), rows.std(0, ddof=1)


def matched(patterns_: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Columns in the order and with the signs of those of the reference that they are nearest to."""
    unit = patterns_ / np.linalg.norm(patterns_, axis=0)
    overlap = reference.T @ unit
    order = linear_sum_assignment(-np.abs(overlap))[1]
    return np.asarray(patterns_[:, order] * np.sign(overlap[np.arange(len(order)), order]))


def field_of(name: str, folder: Path) -> xr.DataArray:
    """Winter means on the grid."""
    if name == "embedded":
        return load_sst()
    path = folder / "ersst_v5_north_pacific_1950_2019.nc"
    return load_sst(path, season="DJF", ice=-1.79, min_valid=1.0)  # correlated noise does not hold frozen cells


def fields(folder: Path) -> None:
    """Print the figures of the real fields."""
    rank, rng = 4, np.random.default_rng(0)
    for name in ("embedded", "ERSST north Pacific"):
        data = field_of(name, folder)
        problem = make_problem(data, rank=rank, fixed_effects=["intercept", "trend"], series="ar1")
        values, weight = problem.data["data"], problem.data["weight"].values
        root = np.sqrt(weight)[:, None]
        times = values.sizes["time"]
        design = np.linalg.qr(np.stack([np.ones(times), np.arange(times)], 1))[0]
        z = root * values.values
        z = z - (z @ design) @ design.T
        reference = np.linalg.svd(z, full_matrices=False)[0][:, :rank]
        print(f"{name}: {z.shape[0]} cells x {times} winters", flush=True)
        rows = []
        for _ in range(300):
            left, size, _ = np.linalg.svd(z[:, rng.integers(times, size=times)], full_matrices=False)
            rows.append(matched((left * size)[:, : rank + 2] / np.sqrt(times), reference))
        spread = np.std(rows, 0, ddof=1)
        half = times // 2
        parts = {"whole": slice(None), "first": slice(0, half), "second": slice(half, 2 * half)}
        for series, noise, label in (
            ("ar1", "white", "population"),
            ("ar1", "correlated", "correlated"),
            ("frame", "white", "these times"),
        ):
            found = {}
            for part, chosen in parts.items():
                sub = data.isel(time=chosen)
                draws = sampled(sub, rank, series, noise)
                if series == "frame":
                    draws["d"] = draws["d"] / np.sqrt(sub.sizes["time"])
                found[part] = loadings(draws, reference)
            ratio = np.median(found["whole"][1] / spread, axis=0)
            gap = np.abs(found["first"][0] - found["second"][0])
            agree = gap < 1.96 * np.hypot(found["first"][1], found["second"][1])
            print(
                f"  {label:12s} posterior sd / bootstrap sd {np.round(ratio, 2)}, "
                f"halves agree at {np.round(agree.mean(0), 3)} of the cells",
                flush=True,
            )


def main() -> None:
    """Print what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["coverage", "trend", "noise", "variance", "fields"])
    parser.add_argument("--sets", type=int)
    parser.add_argument("--seed", type=int, help="default 0, of variance 7")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the ERSST file")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else 7 if options.what == "variance" else 0
    if options.what == "coverage":
        coverage(options.sets or 100, options.cases, seed)
    elif options.what == "trend":
        trend(options.sets or 50, seed)
    elif options.what == "noise":
        noise(options.sets or 60, seed)
    elif options.what == "variance":
        variance(options.sets or 30, seed)
    else:
        fields(options.data)


if __name__ == "__main__":
    main()
