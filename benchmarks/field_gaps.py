"""Gaps of sea surface temperature filled with a diffusion prior, beside linear priors and the Bayesian SVD.

    python benchmarks/field_gaps.py --root DATA

Monthly anomalies of ERSST v5 in the North Pacific (``DATA/sst/ersst_v5_north_pacific_1950_2019.nc``), 1950 to 2019, on
a grid of 4 degrees (means of four cells), base period and training months up to 2004. Of the later months three groups
of 20 are drawn by seed, and cells hidden: half of them at random, 80 % at random, or a block of 20 by 36 degrees around
a cell drawn at random. Errors are of hidden cells, in degC, all cells alike; observed ones have an error of sd 0.01.
CRPS (the unbiased estimator) and coverage are of 50 draws. CPU seconds are of fitting and of filling the 60 fields, on
one thread.

``climatology``: no anomaly, and the sd of each cell. ``normal, Ledoit-Wolf`` and ``normal, modes``: exact conditionals
of a normal prior, with the shrunk covariance of Ledoit and Wolf (2004), and with that of the leading modes and white
noise, from which the network starts. ``Bayesian SVD``: of the training months and the 60, gaps and all, identity along
time as others do not see the months before and after either. ``Bayesian SVD, correlated noise``: with persistent series
and noise, which do see them, and intervals corrected on a further 5 % of the data. ``diffusion``: a network on the
coordinates along these modes, filled by chains through the levels (``HMC``) or by the guided reverse process.

Number of modes, their noise, the rank, and size, dropout and steps of the network were chosen on the years 1995 to 2004
with those before for training (``--validate``), never on later months. Intervals are Student's over seeds, which draw
months, gaps, and the starts and noise of fits; the training months are fixed.
"""

from __future__ import annotations

import common  # isort: skip  (pins threads before numpy is loaded)

import argparse
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from sklearn.covariance import LedoitWolf

from probmodels import fit_svi, run_mcmc
from probmodels.bayesian_svd import make_problem as make_svd
from probmodels.bayesian_svd.gaps.fill import fill_field
from probmodels.datasets.sst import load_sst
from probmodels.diffusion import make_problem
from probmodels.diffusion.fitted import make_field
from probmodels.scores.gaps import fill_gaps, leading_modes

FILE = "sst/ersst_v5_north_pacific_1950_2019.nc"
PATTERNS = ("half", "most", "block")
NUM_MONTHS = 20  # of each pattern
NUM_DRAWS = 50
SD = 0.01
MODES: dict[str, Any] = {"num_modes": 60, "noise": 0.05}
NETWORK: dict[str, Any] = {"hidden": 128, "blocks": 1, "dropout": 0.3, "gamma": (-1.5, 5.0)}
FIT: dict[str, Any] = {"num_steps": 1000, "lr": 1e-3, "schedule": "warmup_cosine", "batch_size": 128, "keep": "average"}
SVD: dict[str, Any] = {"rank": 30, "fixed_effects": [], "num_length_scales": 8, "tail": 1e-4}
CHAIN = {"warmup_steps": 50, "num_samples": NUM_DRAWS, "num_chains": 1}
COMPLETE = {"warmup_steps": 300, "num_samples": NUM_DRAWS, "num_chains": 1, "thin": 4}
CORRELATED: dict[str, Any] = {
    "rank": 30,
    "series": "ar1",
    "noise": "correlated",
    "hold_out": 0.05,
    "hold_out_block": (1, 4, 9),
}
CORRELATED |= {"fixed_effects": ["intercept"], "num_length_scales": 12}
CORRELATED_CHAIN = {"warmup_steps": 200, "num_samples": 2 * NUM_DRAWS, "num_chains": 1, "thin": 4}
LEVELS = {"hmc": {"num_levels": 15, "num_steps": 4}, "reverse": {"num_levels": 60}}
METHODS = (
    "climatology",
    "normal, Ledoit-Wolf",
    "normal, modes",
    "Bayesian SVD",
    "Bayesian SVD, complete",
    "Bayesian SVD, correlated noise",
    "diffusion, hmc",
    "diffusion, reverse",
)

Array = NDArray[np.floating[Any]]
Gaps = Mapping[str, tuple[xr.DataArray, xr.DataArray]]


# -- data -------------------------------------------------------------------------------------------------------------


def months(root: Path, validate: bool) -> tuple[xr.DataArray, xr.DataArray]:
    """Anomalies to fit and to fill."""
    last = 1994 if validate else 2004
    field = load_sst(str(root / FILE), period="1950-2019", base_period=f"1950-{last}", min_valid=0.99)
    field = field.where(field.notnull().all("time")).coarsen(lat=2, lon=2, boundary="trim").mean()
    year = field["time"].dt.year
    return field[(year <= last).values], field[((year > last) & (year <= last + 15)).values]


def hidden(later: xr.DataArray, seed: int) -> Gaps:
    """Complete months, and the same months with gaps, by pattern of gaps."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(later.sizes["time"])
    ocean = np.argwhere(later[0].notnull().values)
    found = {}
    for place, name in enumerate(PATTERNS):
        full = later[np.sort(order[place * NUM_MONTHS : (place + 1) * NUM_MONTHS])]
        keep = np.ones(full.shape, dtype=bool)
        for part in keep:
            if name == "block":
                row, column = ocean[rng.integers(len(ocean))]
                part[max(row - 2, 0) : row + 3, max(column - 4, 0) : column + 5] = False
            else:
                part[rng.random(part.shape) < {"half": 0.5, "most": 0.8}[name]] = False
        found[name] = full, full.where(keep)
    return found


def scored(draws: Array, full: xr.DataArray, gapped: xr.DataArray) -> dict[str, float]:
    """Figures of draws (draw, time, lat, lon) in cells that were hidden."""
    gaps = gapped.isnull().values & full.notnull().values
    x, truth, count = np.sort(draws[:, gaps], axis=0), full.values[gaps], len(draws)
    spread = ((2 * np.arange(1, count + 1) - count - 1)[:, None] * x).sum(0) / (count * (count - 1))
    found = {
        "RMSE": float(np.sqrt(np.mean((x.mean(0) - truth) ** 2))),
        "CRPS": float(np.mean(np.abs(x - truth).mean(0) - spread)),
    }
    for prob in (0.5, 0.9):
        low, high = np.quantile(x, [(1 - prob) / 2, (1 + prob) / 2], axis=0)
        found[f"{prob:.0%}"] = float(np.mean((low <= truth) & (truth <= high)))
    return found


# -- methods: draws (draw, time, lat, lon) by pattern -----------------------------------------------------------------


def normal(mean: Array, covariance: Array, fields: xr.DataArray, rng: np.random.Generator) -> Array:
    """Draws of each cell given what was observed, from the exact conditional of a normal prior."""
    ocean = np.isfinite(mean)
    draws = np.full((NUM_DRAWS, *fields.shape), np.nan)
    for place, field in enumerate(fields.values):
        seen = np.isfinite(field[ocean])
        spread = covariance[np.ix_(seen, seen)] + SD**2 * np.eye(seen.sum())
        gain = np.linalg.solve(spread, covariance[seen]).T
        centre = mean[ocean] + gain @ (field[ocean] - mean[ocean])[seen]
        variance = np.diag(covariance) - (gain * covariance[:, seen]).sum(1)
        draws[:, place, ocean] = centre + np.sqrt(variance.clip(0)) * rng.standard_normal((NUM_DRAWS, len(centre)))
    return draws


def linear(name: str, train: xr.DataArray, gaps: Gaps, seed: int) -> dict[str, Array]:
    """Climatology and normal priors."""
    rng = np.random.default_rng(seed)
    mean = train.mean("time").values
    ocean = np.isfinite(mean)
    table = train.values[:, ocean]
    if name == "climatology":
        sd = train.std("time").values
        return {key: sd * rng.standard_normal((NUM_DRAWS, *full.shape)) for key, (full, _) in gaps.items()}
    if name == "normal, modes":
        modes = leading_modes(train, **MODES)
        patterns = modes.patterns.values[:, ocean]
        covariance = patterns.T @ patterns + modes.noise**2 * np.eye(table.shape[1])
    else:
        covariance = LedoitWolf().fit(table).covariance_
    return {key: normal(mean, covariance, gapped, rng) for key, (_, gapped) in gaps.items()}


def posterior_modes(data: xr.DataArray, chain: Mapping[str, Any], seed: int) -> tuple[xr.Dataset, tuple[Array, ...]]:
    """Draws of the Bayesian SVD: modes over cells (draw, cell, mode), scores (draw, month, mode), scales and noise."""
    problem = make_svd(data, **SVD)
    result = run_mcmc(problem, **chain, chain_method="sequential", seed=seed, progress=False)
    constant, posterior = result.tree["constant_data"].to_dataset(), result.posterior.isel(chain=0)
    u = constant["basis_space_matrix"].values @ posterior["U"].transpose("draw", "basis_space", "mode").values
    v = constant["basis_time_matrix"].values @ posterior["V"].transpose("draw", "basis_time", "mode").values
    return constant, (u, v, posterior["d"].transpose("draw", "mode").values, posterior["sigma"].values)


def bayesian_svd(train: xr.DataArray, gaps: Gaps, seed: int) -> dict[str, Array]:
    """Signal and noise of the months with gaps, fitted along with the others."""
    data = xr.concat([train, *(gapped for _, gapped in gaps.values())], "time").sortby("time")
    constant, (u, v, d, sigma) = posterior_modes(data, CHAIN, seed)
    rng, ocean, found = np.random.default_rng(seed), train[0].notnull().values, {}
    for key, (full, _) in gaps.items():
        rows = np.searchsorted(constant["time"].values, full["time"].values)
        signal = np.einsum("ank,ak,atk->atn", u, d, v[:, rows])
        noise = sigma[:, None, None] * rng.standard_normal(signal.shape)
        found[key] = np.full((len(d), *full.shape), np.nan)
        found[key][:, :, ocean] = (signal + noise) / np.sqrt(constant["weight"].values)
    return found


def svd_of_complete(train: xr.DataArray, gaps: Gaps, seed: int) -> dict[str, Array]:
    """Scores of the months with gaps given draws of modes, scales and noise of the months before, in closed form.

    A score is normal of variance 1 / months, what columns of unit length have on average, and independent in time.
    """
    constant, (u, v, d, sigma) = posterior_modes(train, COMPLETE, seed)
    scale, precision = np.sqrt(constant["weight"].values), v.shape[1]
    rng, ocean, found = np.random.default_rng(seed), train[0].notnull().values, {}
    for key, (full, gapped) in gaps.items():
        found[key] = np.full((len(d), *full.shape), np.nan)
        for draw in range(len(d)):
            modes = u[draw] * d[draw]
            for place, field in enumerate(gapped.values[:, ocean] * scale):
                seen = np.isfinite(field)
                root = np.linalg.cholesky(
                    modes[seen].T @ modes[seen] / sigma[draw] ** 2 + precision * np.eye(len(d[draw]))
                )
                mean = np.linalg.solve(root.T, np.linalg.solve(root, modes[seen].T @ field[seen] / sigma[draw] ** 2))
                score = mean + np.linalg.solve(root.T, rng.standard_normal(len(mean)))
                value = modes @ score + sigma[draw] * rng.standard_normal(len(modes))
                found[key][draw, place, ocean] = value / scale
    return found


def correlated_noise(train: xr.DataArray, gaps: Gaps, seed: int) -> dict[str, Array]:
    """The field filled by the Bayesian SVD of all months, series and noise persistent, intervals checked on blocks."""
    data = xr.concat([train, *(gapped for _, gapped in gaps.values())], "time").sortby("time")
    problem = make_svd(data, **CORRELATED)
    result = run_mcmc(problem, **CORRELATED_CHAIN, chain_method="sequential", seed=seed, progress=False)
    filled = fill_field(result, num_draws=NUM_DRAWS, keep_draws=True, seed=seed, progress=False)
    return {
        key: filled["filled_draws"].sel(time=full["time"], lat=full["lat"], lon=full["lon"]).values
        for key, (full, _) in gaps.items()
    }


def diffusion(method: str, train: xr.DataArray, gaps: Gaps, seed: int) -> dict[str, Array]:
    """A network on coordinates along modes."""
    modes = leading_modes(train, **MODES)
    problem = make_problem(modes.coordinates(train), **NETWORK, seed=seed)
    result = fit_svi(problem, **FIT, num_samples=2, seed=seed, progress=False)
    options = {"sd": SD, "modes": modes, "num_draws": NUM_DRAWS, "method": method, **LEVELS[method]}
    field = make_field(result)
    return {
        key: fill_gaps(field, gapped, **options, seed=seed, progress=False)["draws"].values
        for key, (_, gapped) in gaps.items()
    }


def figures(name: str, root: Path, seed: int, validate: bool) -> dict[str, Any]:
    """Figures of one method."""
    train, later = months(root, validate)
    gaps = hidden(later, seed)
    start = time.process_time()
    if name == "Bayesian SVD, correlated noise":
        draws = correlated_noise(train, gaps, seed)
    elif name.startswith("Bayesian SVD"):
        draws = (svd_of_complete if name.endswith("complete") else bayesian_svd)(train, gaps, seed)
    elif name.startswith("diffusion"):
        draws = diffusion(name.split(", ")[1], train, gaps, seed)
    else:
        draws = linear(name, train, gaps, seed)
    seconds = time.process_time() - start
    return {key: scored(draws[key], *gaps[key]) for key in PATTERNS} | {"seconds": seconds}


def main() -> None:
    """All methods."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder of the data")
    parser.add_argument("--seeds", nargs="*", type=int, default=list(range(5)))
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--validate", action="store_true", help="fill 1995 to 2004 from the years before")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no cell after these")
    args = parser.parse_args()
    until, rows = time.monotonic() + 60 * args.minutes, []
    settings = {"modes": MODES, "network": NETWORK, "fit": FIT, "svd": SVD, "chain": CHAIN, "levels": LEVELS}
    settings |= {"complete": COMPLETE, "correlated": CORRELATED, "correlated_chain": CORRELATED_CHAIN}
    uses = {
        "Bayesian SVD": ("svd", "chain"),
        "Bayesian SVD, complete": ("svd", "complete"),
        "Bayesian SVD, correlated noise": ("correlated", "correlated_chain"),
        "normal, modes": ("modes",),
    }
    for name in args.methods:
        cells = []
        known = uses.get(name, ("modes", "network", "fit", "levels") if name.startswith("diffusion") else ())
        for seed in args.seeds:
            key = {"method": name, "seed": seed, "validate": args.validate} | {part: settings[part] for part in known}
            run = partial(figures, name, args.root, seed, args.validate)
            try:
                cells.append(common.cell("field_gaps", until, run, **key))
            except common.OutOfTime:
                break
        for pattern in PATTERNS if cells else ():
            row: dict[str, Any] = {"gaps": pattern, "prior": name, "seeds": len(cells)}
            for figure in ("RMSE", "CRPS", "50%", "90%"):
                row[figure] = common.interval(cell[pattern][figure] for cell in cells)
            rows.append(row | {"CPU s": common.spread([cell["seconds"] for cell in cells], 2)})
            print(rows[-1], flush=True)
    rows.sort(key=lambda row: PATTERNS.index(row["gaps"]))
    common.report("field_gaps_validation" if args.validate else "field_gaps", rows, **settings, seeds=args.seeds)


if __name__ == "__main__":
    main()
