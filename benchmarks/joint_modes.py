"""Whether intervals of planes of modes, and of what couples two fields, hold the truth.

    python benchmarks/joint_modes.py planes [--sets 40] [--seed 0]
    python benchmarks/joint_modes.py coupled [--sets 40] [--seed 0]
    python benchmarks/joint_modes.py field [--data DIR]

``planes``: two modes of equal size and white series in noise, 14 cells x 60 times. Printed is the share of 95 %
intervals that hold the variance of a cell that the plane explains, and its share of the whole variance; and the
posterior sd of a single pattern's entries over that of the plane's (as a standard deviation), in units of each.

``coupled``: two fields of 12 cells whose series are coupled in two pairs, correlations .8 and .4, with series of their
own else; white, 80 times. Printed are coverage of the canonical correlations, of the correlations and squared
covariance fractions of maximum covariance analysis, and the bias of the posterior mean beside that of the canonical
correlations of the sample, from all cells and from the four leading EOFs of each field.

``field``: winter sea surface temperature and sea level pressure of the north Pacific (``DIR`` holds the ERSST and NCEP
files), eight joint modes: what couples them, with intervals, beside the sample's figures from four EOFs of each.

Two chains of 600 sweeps after 300 in each set, at the default settings of the sampler.
"""

from __future__ import annotations

import common  # noqa: F401  # isort: skip  (pins threads before numpy is loaded)

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from probmodels import run_mcmc
from probmodels.bayesian_svd import make_problem
from probmodels.bayesian_svd.joint.coupled import couple
from probmodels.bayesian_svd.joint.stack import stack_fields
from probmodels.bayesian_svd.patterns.planes import read_plane
from probmodels.bayesian_svd.summary import summarise_modes
from probmodels.datasets.sst import load_sst

RUN: dict[str, Any] = {
    "num_chains": 2,
    "chain_method": "sequential",
    "warmup_steps": 300,
    "num_samples": 600,
    "progress": False,
}
CELLS, TIMES, NOISE = 12, 80, 0.35
SIZES, COUPLING = np.array([3.0, 2.0]), np.array([0.8, 0.4])


def smooth(rng: np.random.Generator, cells: int, count: int) -> np.ndarray:
    """Orthonormal smooth patterns (cell, mode)."""
    x = np.linspace(0, 1, cells)
    covariance = np.exp(-0.5 * ((x[:, None] - x) / 0.25) ** 2) + 1e-8 * np.eye(cells)
    return np.asarray(np.linalg.qr(np.linalg.cholesky(covariance) @ rng.standard_normal((cells, count)))[0])


def on_a_line(values: np.ndarray) -> xr.DataArray:
    """Values (cell, time) with positions and times."""
    coords = {"cell": np.linspace(0, 1, len(values)), "time": np.arange(float(values.shape[1]))}
    return xr.DataArray(values, dims=("cell", "time"), coords=coords)


def held(low: np.ndarray, high: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Whether intervals hold the truth."""
    return np.asarray((low <= truth) & (truth <= high), dtype=float)


def mean_error(values: list[Any]) -> str:
    """Means over sets with their standard errors."""
    array = np.array(values, dtype=float).reshape(len(values), -1)
    error = array.std(0, ddof=1) / np.sqrt(len(array))
    return " ".join(f"{m:.3f}±{e:.3f}" for m, e in zip(array.mean(0), error, strict=True))


def planes(sets: int, seed: int) -> None:
    """Print coverage of the variance that a plane of equal modes explains."""
    cells, times, noise, size = 14, 60, 0.3, 2.0
    rows: dict[str, list[Any]] = {"local variance": [], "share": [], "pattern": [], "plane": [], "separated": []}
    for index in range(sets):
        rng = np.random.default_rng([seed, index])
        patterns = smooth(rng, cells, 2)
        values = size * patterns @ rng.standard_normal((2, times)) + noise * rng.standard_normal((cells, times))
        problem = make_problem(on_a_line(values), rank=2, series="iid", area_weights=False)
        tree = run_mcmc(problem, seed=index, **RUN).tree
        plane, modes = read_plane(tree, [1, 2]), summarise_modes(tree, check_draws=2)
        local = plane.local_variance()
        truth = size**2 * (patterns**2).sum(1)
        rows["local variance"].append(held(*np.quantile(local, [0.025, 0.975], axis=0), truth).mean())
        total = 2 * size**2 / (2 * size**2 + cells * noise**2)
        share = tree["posterior"]
        explained = (share["d"] ** 2).sum("mode")
        fraction = (explained / (explained + cells * share["sigma"] ** 2)).values.ravel()
        rows["share"].append(held(*np.quantile(fraction, [0.025, 0.975]), np.array(total)))
        rows["separated"].append(modes["order_probability"].item() >= 0.95)
        unit = np.sqrt(truth.mean())
        rows["pattern"].append(modes["mode_sd"].mean().item() / unit)
        rows["plane"].append(np.sqrt(local).std(0).mean() / unit)
    print(f"two equal modes, {sets} sets: 95 % intervals hold", flush=True)
    for name in ("local variance", "share"):
        print(f"  {name:16s} {mean_error(rows[name])}")
    print(f"  sd of a pattern's entries {mean_error(rows['pattern'])}, of the plane's {mean_error(rows['plane'])}")
    print(f"  called separated in {100 * np.mean(rows['separated']):.0f} % of the sets", flush=True)


def sample_cca(one: np.ndarray, two: np.ndarray, eofs: int | None) -> np.ndarray:
    """Canonical correlations of samples (cell, time), of their leading EOFs where a number is given."""
    sides = []
    for values in (one, two):
        right = np.linalg.svd(values - values.mean(1, keepdims=True), full_matrices=False)[2]
        sides.append(right[: eofs or min(len(values), values.shape[1] - 1)])
    return np.asarray(np.linalg.svd(sides[0] @ sides[1].T, compute_uv=False))


def truth_of(loadings: np.ndarray, noise: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Canonical correlations, correlations of MCA and squared covariance fractions of two fields of CELLS cells."""
    covariance = loadings @ loadings.T + noise**2 * np.eye(2 * CELLS)
    xx, yy, xy = covariance[:CELLS, :CELLS], covariance[CELLS:, CELLS:], covariance[:CELLS, CELLS:]
    roots = [np.linalg.inv(np.linalg.cholesky(x)) for x in (xx, yy)]
    canonical = np.linalg.svd(roots[0] @ xy @ roots[1].T, compute_uv=False)[:2]
    left, size, right = np.linalg.svd(xy)
    spread = np.sqrt(np.diag(left.T @ xx @ left) * np.diag(right @ yy @ right.T))
    return canonical, (size / spread)[:2], (size**2 / (size**2).sum())[:2]


def coupled(sets: int, seed: int) -> None:
    """Print coverage and bias of what couples two fields."""
    rows: dict[str, list[Any]] = {}
    for index in range(sets):
        rng = np.random.default_rng([seed, index, 1])
        root = [np.linalg.cholesky([[1, r], [r, 1]]) for r in COUPLING]
        loadings = np.zeros((2 * CELLS, 4))
        sides = smooth(rng, CELLS, 2), smooth(rng, CELLS, 2)
        for pair in range(2):
            for side, pattern in enumerate(sides):
                rows_of = slice(side * CELLS, (side + 1) * CELLS)
                loadings[rows_of, 2 * pair : 2 * pair + 2] = SIZES[pair] * np.outer(pattern[:, pair], root[pair][side])
        values = loadings @ rng.standard_normal((4, TIMES)) + NOISE * rng.standard_normal((2 * CELLS, TIMES))
        truth = truth_of(loadings, NOISE)
        fields = {"one": on_a_line(values[:CELLS]), "two": on_a_line(values[CELLS:])}
        problem = make_problem(stack_fields(fields), rank=4, series="iid")
        tree = run_mcmc(problem, seed=index, **RUN).tree
        cca, mca = (couple(tree, ["one", "two"], method=method) for method in ("cca", "mca"))
        found = {
            "canonical": (cca, "correlation"),
            "MCA correlation": (mca, "correlation"),
            "MCA fraction": (mca, "squared_covariance_fraction"),
        }
        for (kind, (summary, name)), right in zip(found.items(), truth, strict=True):
            low, high, mean = (summary[f"{name}_{x}"].values[:2] for x in ("lower", "upper", "mean"))
            rows.setdefault(f"{kind} held", []).append(held(low, high, right))
            rows.setdefault(f"{kind} bias of the mean", []).append(mean - right)
        rows.setdefault("canonical bias, sample of all cells", []).append(
            sample_cca(values[:CELLS], values[CELLS:], None)[:2] - truth[0]
        )
        rows.setdefault("canonical bias, sample of 4 EOFs", []).append(
            sample_cca(values[:CELLS], values[CELLS:], 4)[:2] - truth[0]
        )
        if (index + 1) % 10 == 0:
            print(f"{index + 1} sets: canonical held {mean_error(rows['canonical held'])}", flush=True)
    print(f"two fields coupled at {COUPLING.tolist()}, {sets} sets, first and second pair", flush=True)
    for name, values_ in rows.items():
        print(f"  {name:38s} {mean_error(values_)}", flush=True)


def field(folder: Path) -> None:
    """Print what couples temperature and pressure of the north Pacific."""
    options: dict[str, Any] = {"season": "DJF", "period": (1951, 2018)}
    sst = load_sst(folder / "ersst_v5_north_pacific_1950_2019.nc", **options)
    slp = load_sst(folder / "ncep_slp_north_pacific_1948_2019.nc", **options)
    data = stack_fields({"sst": sst, "slp": slp})
    problem = make_problem(data, rank=8, fixed_effects=["intercept", "trend"], series="ar1")
    tree = run_mcmc(problem, seed=0, **RUN).tree
    names, counts = np.unique(data["field"], return_counts=True)
    print(f"{names.tolist()} with {counts.tolist()} cells, {data.sizes['time']} winters", flush=True)
    values = problem.data["data"].values * np.sqrt(problem.data["weight"].values)[:, None]
    design = np.linalg.qr(problem.data["fixed_effects_design"].values)[0]
    values = values - (values @ design) @ design.T
    one = data["field"].values == "sst"
    print(f"sample, 4 EOFs of each: canonical {np.round(sample_cca(values[one], values[~one], 4), 2)}")
    size = np.linalg.svd(values[one] @ values[~one].T, compute_uv=False)[:5] ** 2
    whole = float(np.sum((values[one] @ values[~one].T) ** 2))
    print(f"sample: squared covariance fractions {np.round(size / whole, 2)}")
    for method in ("cca", "mca"):
        found = couple(tree, ["sst", "slp"], method=method)
        for name in ("correlation", "squared_covariance_fraction"):
            if f"{name}_mean" in found:
                parts = zip(*(found[f"{name}_{x}"].values for x in ("mean", "lower", "upper")), strict=True)
                print(f"{method} {name}: " + ", ".join(f"{m:.2f} [{a:.2f}, {b:.2f}]" for m, a, b in parts), flush=True)


def main() -> None:
    """Print what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["planes", "coupled", "field"])
    parser.add_argument("--sets", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the ERSST and NCEP files")
    options = parser.parse_args()
    if options.what == "field":
        field(options.data)
    else:
        (planes if options.what == "planes" else coupled)(options.sets, options.seed)


if __name__ == "__main__":
    main()
