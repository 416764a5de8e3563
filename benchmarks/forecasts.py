"""Forecasts of North Pacific sea surface temperature from the Bayesian SVD, from origins that roll through the record.

    python benchmarks/forecasts.py --root DATA

Monthly anomalies of ERSST v5 (``DATA/sst/ersst_v5_north_pacific_1950_2019.nc``), cells that are complete. A model is
fitted to the months up to the end of a year, and again eight years later; in between the state alone is updated with
each new month. From every third month twelve months are forecast. Climatology, patterns and all baselines are of the
months of the same fit.

Targets: the field (CRPS in degC, mean over cells by area), the projections of the field on the five leading EOFs of the
months of the fit (in units of their standard deviation there), and the mean of 35-45 N, 160-200 E (degC). CRPS and RMSE
are means over leads 1 to 12 and origins; of draws the unbiased estimator of the CRPS.

``climatology``: normal about zero. ``persistence``: normal about the last value, with the variance of differences over
the lead. ``AR(1)``: damped persistence of each cell, EOF and box. ``LIM``: linear inverse model
``G = C(1) C(0)^-1`` in the leading EOFs (Penland and Sardeshmukh, 1995), with what the EOFs leave as noise by cell;
``LIM, residual AR(1)``: with damped persistence of that. ``SVD``: the AR(1) process of the model; ``SVD, lags``: the
autoregression of its draws; ``coupled``: the same, in which each series follows the others too; ``residuals``: what
effects and modes leave goes on, too, as it persists and is alike in neighbouring cells.

PIT: ranks of what came among draws, of yearly origins, whose twelve months do not overlap: the p-value of a
Kolmogorov-Smirnov test against the uniform distribution, for the five EOFs together and the smallest of leads 1, 3, 6
and 12 times four, and the share in the central 80 %, which is printed by lead too. ``--controls``: an annual cycle that
the model does not have, and a break after the fit, which the table has to show.

Ratios of the CRPS to that of a baseline have 95 % intervals from resampled blocks of two years of origins, which do not
hold what another record would change.

Rank, effects, lags, how far series may follow others and the number of EOFs of the LIM were chosen on origins from 1976
to 1994 (``--validate``), never on later months.
"""

from __future__ import annotations

import common  # isort: skip  (pins threads before numpy is loaded)

import argparse
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from probmodels import run_mcmc
from probmodels.bayesian_svd import make_problem
from probmodels.bayesian_svd.forecasts.forecasting import forecast
from probmodels.datasets.sst import load_sst, to_matrix

FILE = "sst/ersst_v5_north_pacific_1950_2019.nc"
TEST, VALIDATION = (1995, 2003, 2011), (1975, 1985)  # last years of fits
NEXT = {1995: 2003, 2003: 2011, 2011: 2019, 1975: 1985, 1985: 1994}  # year of the next fit, whose December is its first
LEADS, EVERY, NUM_EOFS = 12, 3, 5
BOX = (35.0, 45.0, 160.0, 200.0)
SCALES = [600.0, 900.0, 1300.0, 1900.0, 2700.0, 4000.0]
CHAIN: dict[str, Any] = {"warmup_steps": 150, "num_samples": 200, "thin": 2, "num_chains": 1}
VARIANTS: dict[str, dict[str, str]] = {
    "AR(1)": {"transition": "ar1"},
    "lags": {"transition": "lags"},
    "coupled": {"transition": "coupled"},
    "coupled, residuals": {"transition": "coupled", "residuals": "persistent"},
}
ALL, LAGGED = tuple(VARIANTS)[:3], tuple(VARIANTS)[1:]
MODELS = {
    "test": [(20, "intercept", ALL), (5, "intercept", LAGGED), (20, "intercept,trend", ALL)],
    "validation": [(20, "intercept", ALL), (10, "intercept", ALL), (5, "intercept", LAGGED)],
}
SHOWN_LEADS = (1, 3, 6, 12)
LIMS = {"test": {"LIM": (10, 15, 30), "LIM, residual AR(1)": (5, 10)}}
BASES = ("AR(1)", "LIM, 15 EOFs", "LIM, 30 EOFs", "LIM, residual AR(1), 5 EOFs", "LIM, residual AR(1), 10 EOFs")
LIMS["validation"] = dict.fromkeys(LIMS["test"], (5, 10, 15, 20, 30))

Array = NDArray[np.floating[Any]]
Forecasts = Callable[[int], Any]  # by origin: mean and sd of the three targets, or their draws


class Block:
    """Months of one fit, and the months that follow."""

    def __init__(self, root: Path, last: int, change: str = "") -> None:
        field = to_matrix(load_sst(str(root / FILE), base_period=f"1950-{last}", min_valid=0.99))
        self.field = field[np.isfinite(field.values).all(1)].copy()
        year, month = field["time"].dt.year.values, field["time"].dt.month.values
        self.size = int((year <= last).sum())
        values = self.field.values
        if change == "cycle":
            values += values[:, : self.size].std(1, keepdims=True) * np.cos(2 * np.pi * month / 12)
        if change == "break":
            values[:, self.size :] += 1.5 * values[:, : self.size].std(1, keepdims=True)
        self.values: Array = values
        self.root = np.sqrt(np.cos(np.deg2rad(self.field["lat"].values)))
        self.root /= np.sqrt(np.mean(self.root**2))
        first = self.size - 1
        at = np.arange(first, values.shape[1] - LEADS)
        self.origins = at[(at - first) % EVERY == 0]
        self.origins = self.origins[
            12 * year[self.origins] + month[self.origins] < 12 * NEXT[last] + 12
        ]  # Decembers end it
        weighted = self.root[:, None] * values
        self.eofs, _, _ = np.linalg.svd(weighted[:, : self.size], full_matrices=False)
        self.weighted = weighted
        table = self.eofs[:, :NUM_EOFS].T * self.root
        table = table / (table @ values[:, : self.size]).std(1)[:, None]
        lat, lon = self.field["lat"].values, self.field["lon"].values
        box = ((lat >= BOX[0]) & (lat <= BOX[1]) & (lon >= BOX[2]) & (lon <= BOX[3])) * self.root**2
        self.table = np.vstack([table, box / box.sum()])  # of EOFs and of the box
        self.indices: Array = self.table @ values

    def truth(self, origin: int) -> tuple[Array, Array]:
        """Field and indices of the months that follow."""
        at = slice(origin + 1, origin + 1 + LEADS)
        return self.values[:, at], self.indices[:, at]


# -- baselines: mean and sd of field and indices ----------------------------------------------------------------------


def univariate(block: Block, kind: str) -> Forecasts:
    """Climatology, persistence and AR(1), each series by itself."""
    lead, found = np.arange(1, LEADS + 1), []
    for values in (block.values, block.indices):
        fit = values[:, : block.size]
        sd, before, after = fit.std(1), fit[:, :-1], fit[:, 1:]
        decay = (before * after).mean(1) / (fit**2).mean(1)
        kept = decay[:, None] ** lead if kind == "AR(1)" else np.full((len(fit), LEADS), float(kind == "persistence"))
        spread = sd[:, None] * np.sqrt(1 - kept**2)
        if kind == "persistence":
            spread = np.stack([(fit[:, h:] - fit[:, :-h]).std(1) for h in lead], axis=1)
        found.append((values, kept, spread))
    return lambda origin: [(values[:, [origin]] * kept, spread) for values, kept, spread in found]


def inverse_model(block: Block, count: int, damped: bool) -> Forecasts:
    """Linear inverse model in the leading EOFs."""
    eofs = block.eofs[:, :count]
    scores = eofs.T @ block.weighted
    fit = scores[:, : block.size]
    zero = fit @ fit.T / block.size
    step = fit[:, 1:] @ fit[:, :-1].T / (block.size - 1) @ np.linalg.inv(zero)
    powers = [np.linalg.matrix_power(step, h) for h in range(1, LEADS + 1)]
    covariances = [zero - power @ zero @ power.T for power in powers]
    rest = block.weighted - eofs @ scores
    noise = (rest[:, : block.size] ** 2).mean(1)
    decay = (rest[:, 1 : block.size] * rest[:, : block.size - 1]).mean(1) / noise if damped else 0 * noise
    kept = decay[:, None] ** np.arange(1, LEADS + 1)
    maps = [np.eye(len(noise)) / block.root[:, None], block.table / block.root]
    spreads = []
    for place in maps:
        part = place @ eofs
        variance = np.stack([np.einsum("ij,jk,ik->i", part, x, part) for x in covariances], axis=1)
        spreads.append(np.sqrt(variance + place**2 @ (noise[:, None] * (1 - kept**2))))

    def ahead(origin: int) -> Any:
        mean = eofs @ np.stack([power @ scores[:, origin] for power in powers], axis=1) + rest[:, [origin]] * kept
        return [(place @ mean, spread) for place, spread in zip(maps, spreads, strict=True)]

    return ahead


# -- the model: draws of field and indices ----------------------------------------------------------------------------


def fitted(block: Block, rank: int, effects: str, seed: int) -> Any:
    """Posterior of the months of the fit."""
    data = block.field.copy(data=block.values)[:, : block.size]
    options: dict[str, Any] = {"series": "ar1", "length_scales_space": SCALES, "tail": 1e-3}
    problem = make_problem(data, rank=rank, fixed_effects=effects.split(","), **options)
    return run_mcmc(problem, **CHAIN, chain_method="sequential", seed=seed, progress=False)


def posterior(block: Block, result: Any, how: dict[str, str]) -> Forecasts:
    """Forecasts from a posterior whose state is updated to the origin."""
    names = [*(f"eof{i}" for i in range(NUM_EOFS)), "box"]
    indices = dict(zip(names, block.table, strict=True))
    options: dict[str, Any] = {"indices": indices, "beyond": True, "judge": False, **how}

    def ahead(origin: int) -> Any:
        new = block.field.copy(data=block.values)[:, block.size : origin + 1] if origin >= block.size else None
        found = forecast(result, LEADS, new=new, quantiles=[0.5], keep_draws=True, seed=origin, **options)
        field = found["field"].stack(cell=("lat", "lon")).dropna("cell", how="all") if "lat" in found.dims else None
        cells = found["field"] if field is None else field
        draws = cells.transpose("chain", "draw", "cell", "time").values[0].astype(float)
        return [draws, found["index_draws"].transpose("chain", "draw", "index", "time").values[0]]

    return ahead


# -- scores -----------------------------------------------------------------------------------------------------------


def scored(forecast_: Any, truth: Array) -> dict[str, Array]:
    """CRPS, error and PIT, each (series, lead)."""
    if isinstance(forecast_, tuple):
        mean, sd = forecast_
        z = (truth - mean) / sd
        crps = sd * (z * (2 * stats.norm.cdf(z) - 1) + 2 * stats.norm.pdf(z) - 1 / np.sqrt(np.pi))
        return {"crps": crps, "error": truth - mean, "pit": stats.norm.cdf(z)}
    x, count = np.sort(forecast_, axis=0), len(forecast_)
    rank = (x < truth).sum(0)
    spread = np.tensordot(2 * np.arange(1, count + 1) - count - 1, x, 1) / (count * (count - 1))
    return {
        "crps": np.abs(x - truth).mean(0) - spread,
        "error": truth - x.mean(0),
        "pit": (rank + np.random.default_rng(int(rank.sum())).random(rank.shape)) / (count + 1),
    }


def rolled(block: Block, ahead: Forecasts) -> dict[str, Any]:
    """Sums over the origins of a block, and PITs of yearly origins."""
    weight = block.root**2 / (block.root**2).sum()
    found: dict[str, Any] = {"origins": len(block.origins), "pit": [], "covered": []}  # covered: (target, lead)
    for place, origin in enumerate(block.origins):
        field, indices = (
            scored(part, true) for part, true in zip(ahead(int(origin)), block.truth(origin), strict=True)
        )
        by_lead = weight @ field["crps"]
        rows = {
            "field": by_lead,
            "field lead 1": by_lead[:1],
            "field lead 3": by_lead[2:3],
            "EOFs": indices["crps"][:NUM_EOFS],
            "box": indices["crps"][NUM_EOFS],
            "field rmse": weight @ field["error"] ** 2,
            "EOFs rmse": indices["error"][:NUM_EOFS] ** 2,
            "box rmse": indices["error"][NUM_EOFS] ** 2,
        }
        for name, values in rows.items():
            found.setdefault(name, []).append(float(values.mean()))
        held = np.abs(indices["pit"] - 0.5) < 0.4
        in_field = weight @ (np.abs(field["pit"] - 0.5) < 0.4)
        found["covered"].append([in_field.tolist(), held[:NUM_EOFS].mean(0).tolist(), held[NUM_EOFS].tolist()])
        if place % (12 // EVERY) == 0:
            found["pit"].append(indices["pit"].tolist())
    return found


def figures(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """A row of the table."""
    row: dict[str, Any] = {"origins": sum(cell["origins"] for cell in cells)}
    for name in ("field", "field lead 1", "field lead 3", "EOFs", "box"):
        row[f"CRPS {name}"] = float(np.mean(np.concatenate([cell[name] for cell in cells])))
    for name in ("field", "EOFs", "box"):
        row[f"RMSE {name}"] = float(np.sqrt(np.mean(np.concatenate([cell[f"{name} rmse"] for cell in cells]))))
    pit = np.concatenate([np.array(cell["pit"]) for cell in cells])  # (origin, index, lead)
    for name, part in (("EOFs", pit[:, :NUM_EOFS]), ("box", pit[:, NUM_EOFS:])):
        smallest = min(stats.kstest(part[:, :, lead].ravel(), "uniform").pvalue for lead in (0, 2, 5, 11))
        row[f"PIT p {name}"] = min(1.0, 4 * float(smallest))
        row[f"80 % {name}"] = float(np.mean(np.abs(part - 0.5) < 0.4))
    covered = np.concatenate([np.array(cell["covered"], dtype=float) for cell in cells]).mean(0)  # (target, lead)
    row["80 % field"] = float(covered[0].mean())
    for name, part in zip(("field", "EOFs", "box"), covered, strict=True):
        row[f"80 % {name} by lead"] = " ".join(f"{part[lead - 1]:.2f}" for lead in SHOWN_LEADS)
    row["PIT"] = "uniform" if min(row["PIT p EOFs"], row["PIT p box"]) > 0.01 else "NOT uniform"
    return row


def ratio(cells: list[dict[str, Any]], base: list[dict[str, Any]], target: str) -> str:
    """CRPS over that of a baseline, with a 95 % interval by resampling blocks of two years of origins."""
    ours, theirs = (np.concatenate([cell[target] for cell in part]) for part in (cells, base))
    rng, length = np.random.default_rng(0), 2 * 12 // EVERY
    starts = rng.integers(0, len(ours), (2000, -(-len(ours) // length)))
    at = (starts[:, :, None] + np.arange(length)).reshape(2000, -1) % len(ours)
    low, high = np.quantile(ours[at].mean(1) / theirs[at].mean(1), [0.025, 0.975])
    return f"{ours.mean() / theirs.mean():.3f} ({low:.3f} to {high:.3f})"


def baselines(root: Path, last: int, lims: Any) -> dict[str, Any]:
    """All baselines of a block."""
    block = Block(root, last)
    found = {kind: rolled(block, univariate(block, kind)) for kind in ("climatology", "persistence", "AR(1)")}
    for name, counts in lims.items():
        for count in counts:
            found[f"{name}, {count} EOFs"] = rolled(block, inverse_model(block, count, "residual" in name))
    return found


def model(
    root: Path, last: int, rank: int, effects: str, variants: Sequence[str], seed: int, change: str = ""
) -> dict[str, Any]:
    """Variants of the forecast of the model in a block."""
    block = Block(root, last, change)
    result = fitted(block, rank, effects, seed)
    name = f"SVD, {rank} modes, {effects}"
    return {f"{name}, {label}": rolled(block, posterior(block, result, VARIANTS[label])) for label in variants}


def jobs(args: argparse.Namespace) -> list[tuple[str, dict[str, Any], Any]]:
    """Change of the data, key of the stored figures, and what computes them for the last year of a fit."""
    part = "validation" if args.validate else "test"
    settings = {"seed": args.seed, "chain": CHAIN, "scales": SCALES}
    fit = partial(model, args.root, seed=args.seed)
    if args.controls:
        return [
            (
                change or "none",
                {"rank": 10, "change": change, **settings},
                partial(fit, rank=10, effects="intercept", variants=("AR(1)", "lags"), change=change),
            )
            for change in ("", "cycle", "break")
        ]
    found: list[Any] = [("", {"lims": json.dumps(LIMS[part])}, partial(baselines, args.root, lims=LIMS[part]))]
    for rank, effects, variants in MODELS[part]:
        if args.rank in (None, rank):
            key = {"rank": rank, "effects": effects, "variants": variants, **settings}
            found.append(("", key, partial(fit, rank=rank, effects=effects, variants=variants)))
    return found


def stored(compute: Any, key: dict[str, Any], blocks: Sequence[int], stop: float) -> dict[str, list[dict[str, Any]]]:
    """Figures by forecast, one for each fit that is done or can be begun."""
    cells: dict[str, list[dict[str, Any]]] = {}
    for last in blocks:
        try:
            done = common.cell("forecasts", stop, partial(compute, last=last), last=last, **key)
        except common.OutOfTime:
            break
        for name, cell in done.items():
            if isinstance(cell, dict) and "origins" in cell:
                cells.setdefault(name, []).append(cell)
    return cells


def compared(known: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """CRPS of the model over that of the baselines."""
    return [
        {"forecast": name, "over": base} | {x: ratio(known[name], known[base], x) for x in ("field", "EOFs", "box")}
        for name in known
        for base in BASES
        if name.startswith("SVD") and len(known.get(base, ())) == len(known[name])
    ]


def main() -> None:
    """All rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder of the data")
    parser.add_argument("--validate", action="store_true", help="origins from 1976 to 1994")
    parser.add_argument("--controls", action="store_true", help="an annual cycle and a break, which PITs have to show")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rank", type=int, help="models of this rank alone")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no cell after these")
    args = parser.parse_args()
    stop = time.monotonic() + 60 * args.minutes
    blocks = TEST[-1:] if args.controls else VALIDATION if args.validate else TEST
    rows: list[dict[str, Any]] = []
    known: dict[str, list[dict[str, Any]]] = {}
    for change, key, compute in jobs(args):
        cells = stored(compute, key, blocks, stop)
        known |= cells
        for name, found in cells.items():
            row = ({"change": change} if change else {}) | {"forecast": name, "fits": len(found)} | figures(found)
            rows.append(row)
            print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    shown = [{k: f"{v:.3f}" if isinstance(v, float) else v for k, v in row.items()} for row in rows]
    ratios = compared(known)
    if ratios:
        print("\n" + common.table(ratios))
    name = "forecasts" + "_controls" * args.controls + "_validation" * args.validate
    common.report(name, shown, chain=CHAIN, scales=SCALES, box=BOX, seed=args.seed, blocks=blocks, ratios=ratios)


if __name__ == "__main__":
    main()
