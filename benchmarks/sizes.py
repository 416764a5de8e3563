"""What the size of a field costs: set-up, a sweep, memory, and the whole run, at the defaults.

Smooth fields are simulated on the ocean of the Pacific (coasts of Natural Earth) at ever finer resolution: five modes
of Matérn 7/2 patterns with length-scales from 1300 to 2500 km, AR(1) series, a trend, and white noise of the variance
of the fifth mode. Every row is a process of its own, and printed as it comes. Set-up is `make_problem` with
``series="ar1"``, or as ``--series`` says, and the effects intercept and trend; a sweep is one of `SeriesGibbs`.
``--all-directions`` adds rows with ``tail=0`` for the sizes up to it. ``--run`` makes one size a whole run: four chains
of 1500 sweeps, files, report. ``--agreement`` compares posteriors at one size with those of ``tail=0``: differences of
means in Monte Carlo errors, and ratios of standard deviations, over patterns in data units at every tenth cell, d and
sigma.
"""

from __future__ import annotations

import common  # isort: skip  (pins threads before numpy is loaded)

import argparse
import itertools
import json
import resource
import subprocess
import sys
import tempfile
import time
from importlib.resources import files
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.path import Path as Polygon

from probmodels.bayesian_svd import make_problem, write_outputs
from probmodels.bayesian_svd.series_sampler import SeriesGibbs
from probmodels.inference import run_mcmc

REGION = (-60.0, 62.0, 110.0, 290.0)  # south, north, west, east
SCALES = np.linspace(2500.0, 1300.0, 5)  # km
SIZES = ((700, 240), (1000, 240), (1700, 240), (3400, 240), (3404, 1800), (10_000, 240), (10_000, 5000), (50_000, 1000))
_WAVES = 1500  # of which a random field is the sum


def ocean(step: float) -> tuple[np.ndarray, np.ndarray]:
    """Latitudes and longitudes of the ocean cells of a grid."""
    south, north, west, east = REGION
    lat, lon = np.meshgrid(np.arange(south, north, step), np.arange(west, east, step), indexing="ij")
    with files("probmodels").joinpath("data/coastline_110m.npz").open("rb") as file, np.load(file) as stored:
        points, start = stored["points"].astype(float), stored["start"]
    places = np.stack([lon.ravel(), lat.ravel()], 1)
    land = np.zeros(len(places), dtype=bool)
    for first, last in itertools.pairwise(start):
        for shift in (0.0, 360.0):
            land |= Polygon(points[first:last] + np.array([shift, 0.0])).contains_points(places)
    return lat.ravel()[~land], lon.ravel()[~land]


def cells(num: int) -> tuple[np.ndarray, np.ndarray]:
    """About ``num`` ocean cells: the step of the grid is chosen, and surplus cells in the north are left out."""
    step = 1.0
    for _ in range(12):
        lat, lon = ocean(step)
        if num <= len(lat) <= 1.02 * num:
            break
        step *= np.sqrt(len(lat) / (1.01 * num))
    return lat[:num], lon[:num]


def simulate(num_cells: int, num_times: int, seed: int) -> xr.DataArray:
    """The field (cell, time)."""
    rng = np.random.default_rng(seed)
    lat, lon = cells(num_cells)
    phi, lam = np.deg2rad(lat), np.deg2rad(lon)
    points = 6371.0 * np.stack([np.cos(phi) * np.cos(lam), np.cos(phi) * np.sin(lam), np.sin(phi)], 1)
    values = 0.7 * rng.standard_normal((len(lat), num_times), dtype=np.float32)
    for size, scale in zip((3.0, 2.0, 1.5, 1.0, 0.7), SCALES, strict=True):
        # The spectrum of Matérn 7/2 is a t-distribution of seven degrees of freedom.
        waves = rng.standard_normal((3, _WAVES)) / scale * np.sqrt(7 / rng.chisquare(7, _WAVES))
        pattern = np.cos(points @ waves + rng.uniform(0, 2 * np.pi, _WAVES)).sum(1) * np.sqrt(2 / _WAVES)
        series = rng.standard_normal(num_times)
        for t in range(1, num_times):
            series[t] = 0.8 * series[t - 1] + 0.6 * series[t]
        values += np.outer(size * pattern, series).astype(np.float32)
    values += np.linspace(-0.3, 0.3, num_times, dtype=np.float32)
    coords = {
        "cell": np.arange(len(lat)),
        "lat": ("cell", lat),
        "lon": ("cell", lon),
        "time": np.datetime64("1000-01", "M").astype("datetime64[s]")
        + np.arange(num_times) * np.timedelta64(2_629_746, "s"),
    }
    return xr.DataArray(values, coords, ("cell", "time"), name="sst")


def measure(
    num_cells: int, num_times: int, tail: float | None, whole: bool, seed: int, rank: int, series: str
) -> dict[str, Any]:
    """One row, in this process."""
    data = simulate(num_cells, num_times, seed)
    make_problem(data[:60, :30], rank=1, series=series)  # imports
    start = time.process_time()
    problem = make_problem(data, rank=rank, fixed_effects=["intercept", "trend"], series=series, tail=tail)
    setup = time.process_time() - start
    kernel = SeriesGibbs(problem)
    kernel.setup(0)
    for _ in range(5):
        kernel.sample({})
    start = time.process_time()
    sweeps = 40
    for _ in range(sweeps):
        kernel.sample({})
    sweep = (time.process_time() - start) / sweeps
    row: dict[str, Any] = {
        "cells": num_cells,
        "times": num_times,
        "functions": problem.data.sizes["basis_space"],
        "shortest km": float(problem.data["length_scales_space"].min()),
        "set-up CPU s": setup,
        "sweep ms": 1e3 * sweep,
        "peak GiB": _peak(resource.RUSAGE_SELF),
    }
    if whole:
        del kernel
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            result = run_mcmc(problem, num_chains=4, num_samples=1000, warmup_steps=500, seed=seed, progress=False)
            row["sampling wall s"] = time.perf_counter() - start
            result.save(folder)
            written = write_outputs(result, folder)
        row["with outputs wall s"] = time.perf_counter() - start
        row["peak GiB"] = _peak(resource.RUSAGE_SELF)
        row["peak of a chain GiB"] = _peak(resource.RUSAGE_CHILDREN)
        row["draws"] = written.diagnosis.inference
        row["first finding"] = str(written.diagnosis).splitlines()[1].strip()
    return row


def agreement(num_cells: int, num_times: int, seed: int) -> dict[str, Any]:
    """Posteriors of the default basis and of every direction."""
    data = simulate(num_cells, num_times, seed)
    found = []
    functions = 0
    for tail in (None, 0.0):
        problem = make_problem(data, rank=5, fixed_effects=["intercept", "trend"], series="ar1", tail=tail)
        functions = functions or problem.data.sizes["basis_space"]
        posterior = run_mcmc(
            problem, num_chains=4, num_samples=1000, warmup_steps=500, seed=seed, progress=False
        ).posterior
        basis = problem.data["basis_space_matrix"].values[::10]
        d, sigma = posterior["d"].values, posterior["sigma"].values
        patterns = basis @ posterior["U"].transpose("chain", "draw", "basis_space", "mode").values * d[:, :, None]
        draws = np.concatenate([patterns.reshape(*sigma.shape, -1), d, sigma[..., None]], 2)
        batches = draws.reshape(40, -1, draws.shape[2]).mean(1)  # of 100 draws
        found.append((draws.mean((0, 1)), batches.var(0, ddof=1) / len(batches), draws.std((0, 1))))
    (mean, error, sd), (other_mean, other_error, other_sd) = found
    z, ratio = (mean - other_mean) / np.sqrt(error + other_error), sd / other_sd
    return {
        "cells": num_cells,
        "times": num_times,
        "functions": functions,
        "rms difference, Monte Carlo errors": float(np.sqrt(np.mean(z**2))),
        "largest": float(np.abs(z).max()),
        "largest, sds": float(np.abs((mean - other_mean) / other_sd).max()),
        "ratio of sds": "{:.3f} ({:.3f} to {:.3f})".format(*np.quantile(ratio, [0.5, 0.025, 0.975])),
    }


def _peak(who: int) -> float:
    return resource.getrusage(who).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=[f"{n}x{m}" for n, m in SIZES], help="cells x times")
    parser.add_argument("--all-directions", type=int, default=0, help="largest number of cells for rows with tail=0")
    parser.add_argument("--run", default="", help="a size whose run is done whole")
    parser.add_argument("--agreement", action="store_true", help="compare posteriors at the first size, no more")
    parser.add_argument("--series", default="ar1", help="process of the series, as in make_problem")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rank", type=int, default=5, help="modes of the model; the field has five")
    parser.add_argument("--row", help=argparse.SUPPRESS)  # what the script calls itself with
    options = parser.parse_args()
    if options.row:
        print(json.dumps(measure(*json.loads(options.row))))
        return
    if options.agreement:
        n, m = map(int, options.sizes[0].split("x"))
        common.report("sizes_agreement", [agreement(n, m, options.seed)], **vars(options))
        return
    rows: list[dict[str, Any]] = []
    for size in options.sizes:
        n, m = map(int, size.split("x"))
        for tail in (None, 0.0) if n <= options.all_directions else (None,):
            row = json.dumps([n, m, tail, size == options.run, options.seed, options.rank, options.series])
            done = subprocess.run([sys.executable, __file__, "--row", row], check=True, capture_output=True, text=True)
            rows.append({"tail": "chosen" if tail is None else tail, **json.loads(done.stdout.splitlines()[-1])})
            print(
                {key: round(value, 3) if isinstance(value, float) else value for key, value in rows[-1].items()},
                flush=True,
            )
    sizes = [row for row in rows if row["times"] == 240 and row["tail"] == "chosen"]
    if len(sizes) > 1:
        logs = [np.log([row[key] for row in sizes]) for key in ("cells", "set-up CPU s", "sweep ms")]
        powers = [float(np.polyfit(logs[0], log, 1)[0]) for log in logs[1:]]
        print(
            f"\nat 240 times set-up grows as cells to the power {powers[0]:.2f}, a sweep to the power {powers[1]:.2f}"
        )
        options.set_up_exponent, options.sweep_exponent = powers
    common.report("sizes", rows, **vars(options))


if __name__ == "__main__":
    main()
