"""Blocks of a monthly field hidden and filled: the Bayesian SVD beside DINEOF and optimal interpolation.

    python benchmarks/filling.py --root DATA [--seeds 0 1 2] [--rank 20]
    python benchmarks/filling.py --root DATA --only --seeds 0 --block 6 5 8 --held-out 6 3 4   # gaps larger than blocks
    python benchmarks/filling.py --root DATA --only --seeds 0 --block 6 5 8                    # blocks like the gaps

Monthly anomalies of ERSST v5 in the north Pacific (``DATA/sst/ersst_v5_north_pacific_1950_2019.nc``), 717 cells, 832
months. By seed, blocks of 6 months x 3 x 4 cells hide 20 % of the entries. Errors are of hidden entries, in degC, all
alike. ``95 %`` is the share that 95 % intervals hold, ``at p5`` that share at the fifth percentile of the cells.

``climatology``: mean and sd of each cell. ``DINEOF``: gaps filled by leading EOFs in turns (Beckers and Rixen, 2003),
their number chosen on further blocks, and a normal error of each cell whose sd is that on these. ``optimal
interpolation``: the conditional of a normal distribution at each month, mean and covariance those of the field that
DINEOF fills, shrunk as Ledoit and Wolf (2004) have it. ``Bayesian SVD``: ``noise="correlated"``, ``series="ar1"``,
trend of each cell, two chains, and `fill_field`, which checks and corrects its intervals on a further 5 % of the data
that the fit has not seen, in blocks like those that are hidden unless ``--held-out`` gives their size. The number of
modes was chosen on blocks of seed 100 among 10, 20 and 30.
"""

from __future__ import annotations

import common  # isort: skip  (pins threads before numpy is loaded)

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from scipy import stats
from sklearn.covariance import LedoitWolf

from probmodels import run_mcmc
from probmodels.bayesian_svd import make_problem
from probmodels.bayesian_svd.gaps.fill import fill_field
from probmodels.datasets.sst import load_sst, to_matrix

FILE = "sst/ersst_v5_north_pacific_1950_2019.nc"
BLOCK, SHARE = (6, 3, 4), 0.2
RANKS = (8, 12, 16, 24, 32, 40, 48)
LENGTHS = np.geomspace(600, 6000, 12)
HELD_OUT = 0.05
CHAIN: dict[str, Any] = {"num_chains": 2, "warmup_steps": 150, "num_samples": 100, "thin": 2}

Array = NDArray[np.float64]


def hidden_blocks(field: xr.DataArray, seed: int, share: float, block: Sequence[int] = BLOCK) -> NDArray[np.bool_]:
    """What is hidden (cell, time) of the cells of a field that have values."""
    rng = np.random.default_rng(seed)
    ocean, hidden = field.notnull().any("time").values, np.zeros(field.shape, bool)
    while hidden[:, ocean].mean() < share:
        corner = [int(rng.integers(size - length + 1)) for size, length in zip(field.shape, block, strict=True)]
        hidden[tuple(slice(a, a + b) for a, b in zip(corner, block, strict=True))] = True
    return hidden[:, ocean].T


def dineof(values: Array, seen: NDArray[np.bool_], rank: int) -> tuple[Array, Array]:
    """The field with gaps filled, and what the modes say everywhere."""
    filled = np.where(seen, values, 0.0)
    for _ in range(100):
        mean = filled.mean(1, keepdims=True)
        _, vectors = np.linalg.eigh((filled - mean) @ (filled - mean).T)
        modes = vectors[:, -rank:]
        fit = mean + modes @ (modes.T @ (filled - mean))
        update = np.where(seen, values, fit)
        change = np.linalg.norm(update - filled) / np.linalg.norm(update)
        filled = update
        if change < 1e-4:
            break
    return filled, fit


def normal_scores(mean: Array, sd: Array, values: Array) -> tuple[Array, Array]:
    """CRPS of normal predictions, and whether 95 % intervals hold."""
    z = (values - mean) / sd
    score = sd * (z * (2 * stats.norm.cdf(z) - 1) + 2 * stats.norm.pdf(z) - 1 / np.sqrt(np.pi))
    return score, np.abs(z) < stats.norm.ppf(0.975)


def row(name: str, mean: Array, values: Array, score: Array, held: Array, cells: Array, start: float) -> dict[str, Any]:
    """Figures of one method."""
    count = np.bincount(cells)
    by_cell = np.bincount(cells, held)[count > 30] / count[count > 30]
    out = {
        "method": name,
        "RMSE": float(np.sqrt(np.mean((mean - values) ** 2))),
        "CRPS": float(np.mean(score)),
        "95 %": float(np.mean(held)),
        "at p5": float(np.quantile(by_cell, 0.05)),
        "CPU s": time.process_time() - start,
    }
    print({k: v if isinstance(v, str) else round(v, 4) for k, v in out.items()}, flush=True)
    return out


def baselines(values: Array, hidden: NDArray[np.bool_], more: NDArray[np.bool_]) -> list[dict[str, Any]]:
    """Climatology, DINEOF and optimal interpolation."""
    seen, truth, cells = ~hidden, values[hidden], np.nonzero(hidden)[0]
    rows, start = [], time.process_time()
    some = np.where(seen, values, np.nan)
    mean, sd = (np.broadcast_to(f(some, axis=1)[:, None], values.shape)[hidden] for f in (np.nanmean, np.nanstd))
    rows.append(row("climatology", mean, truth, *normal_scores(mean, sd, truth), cells, start))
    start, inner = time.process_time(), seen & more
    errors = {rank: (dineof(values, seen & ~more, rank)[1] - values) for rank in RANKS}
    rank = min(RANKS, key=lambda k: np.mean(errors[k][inner] ** 2))
    square = np.where(inner, errors[rank] ** 2, 0.0)
    by_cell = np.sqrt((square.sum(1) + square.sum() / inner.sum()) / (inner.sum(1) + 1))
    filled, fit = dineof(values, seen, rank)
    mean, sd = fit[hidden], np.broadcast_to(by_cell[:, None], values.shape)[hidden]
    rows.append(row(f"DINEOF, {rank} modes", mean, truth, *normal_scores(mean, sd, truth), cells, start))
    start = time.process_time()
    covariance, centre = LedoitWolf().fit(filled.T).covariance_, filled.mean(1)
    mean_all, sd_all = np.zeros(values.shape), np.zeros(values.shape)
    for t in range(values.shape[1]):
        s, h = seen[:, t], hidden[:, t]
        gain = np.linalg.solve(covariance[np.ix_(s, s)], covariance[np.ix_(s, h)])
        mean_all[h, t] = centre[h] + gain.T @ (values[s, t] - centre[s])
        sd_all[h, t] = np.sqrt(np.diag(covariance)[h] - (gain * covariance[np.ix_(s, h)]).sum(0))
    mean, sd = mean_all[hidden], sd_all[hidden]
    rows.append(row("optimal interpolation", mean, truth, *normal_scores(mean, sd, truth), cells, start))
    return rows


def bayesian_svd(
    field: xr.DataArray, hidden: NDArray[np.bool_], rank: int, seed: int, held_out: Sequence[int] | None
) -> list[dict[str, Any]]:
    """Our own."""
    cells = to_matrix(field)
    truth, places, start = cells.values[hidden], np.nonzero(hidden)[0], time.process_time()
    problem = make_problem(
        cells.where(~hidden),
        rank=rank,
        series="ar1",
        noise="correlated",
        fixed_effects=["intercept", "trend"],
        length_scales_space=list(LENGTHS),
        hold_out=HELD_OUT,
        hold_out_block=None if held_out is None else tuple(held_out),
    )
    result = run_mcmc(problem, **CHAIN, seed=seed, progress=False, chain_method="sequential")
    filled = fill_field(result, num_draws=100, seed=seed, progress=False)
    mask = np.isfinite(filled["status"].isel(time=0).values)  # the grid has land
    mean, sd, low, high = (
        np.asarray(filled[name].values[:, mask].T[hidden])
        for name in ("filled", "filled_sd", "filled_lower", "filled_upper")
    )
    print({k: round(v, 4) for k, v in filled.attrs.items() if "held_out" in k or "larger" in k}, flush=True)
    score, _ = normal_scores(mean, sd, truth)
    return [row(f"Bayesian SVD, {rank} modes", mean, truth, score, (low <= truth) & (truth <= high), places, start)]


def main() -> None:
    """All methods."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder of the data")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--rank", type=int, default=20)
    parser.add_argument("--block", nargs=3, type=int, default=BLOCK, help="months and cells that are hidden together")
    parser.add_argument("--held-out", nargs=3, type=int, help="size of the blocks that correct the intervals")
    parser.add_argument("--only", action="store_true", help="the Bayesian SVD alone")
    args = parser.parse_args()
    field = load_sst(str(args.root / FILE))
    values, found = to_matrix(field).values, []
    for seed in args.seeds:
        hidden = hidden_blocks(field, seed, SHARE, args.block)
        if not args.only:
            found += [
                r | {"seed": seed}
                for r in baselines(values, hidden, hidden_blocks(field, 1000 + seed, 0.1, args.block))
            ]
        found += [r | {"seed": seed} for r in bayesian_svd(field, hidden, args.rank, seed, args.held_out)]
    names = list(dict.fromkeys(r["method"] for r in found))
    rows = []
    for name in names:
        cells = [r for r in found if r["method"] == name]
        figures = {k: common.interval(r[k] for r in cells) for k in ("RMSE", "CRPS", "95 %", "at p5")}
        rows.append({"method": name, "seeds": len(cells), **figures})
    chosen = {"rank": args.rank, "block": args.block, "held_out": args.held_out, "seeds": args.seeds}
    common.report("filling", rows, chain=CHAIN, share=SHARE, **chosen)


if __name__ == "__main__":
    main()
