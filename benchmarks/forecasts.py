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

Ranks of what came among draws have to be uniform at each lead, those of forecasts that do not overlap independent, and
all alike at all seasons (`probmodels.bayesian_svd.forecasts.skill.rank_calibration`): p-values for the five EOFs
together and for the box, and the share in the central 80 % by lead. ``--controls``: an annual cycle that the model does
not have, a break after the fit, and series that are taken for independent in time, which the table has to show.

Each origin is kept in ``--run`` as soon as it is done, with the posteriors: a run that was cut goes on where it was.
``--noise correlated`` takes the covariance of the noise as estimated; ``--every N`` takes every N-th of these origins.
Cost with ``--rank 20``: 11 CPU minutes; with ``--rank 20 --effects intercept --noise correlated --every 2``: 9; with
``--controls``: 2.

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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from probmodels import run_mcmc
from probmodels.bayesian_svd import make_problem
from probmodels.bayesian_svd.forecasts.forecasting import forecast
from probmodels.bayesian_svd.forecasts.skill import rank_calibration, score_draws, score_normal
from probmodels.datasets.sst import load_sst, to_matrix
from probmodels.inference.result import Result

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


def fitted(block: Block, model: Model, seed: int) -> Result:
    """Posterior of the months of the fit."""
    data = block.field.copy(data=block.values)[:, : block.size]
    options: dict[str, Any] = {
        "series": model.series,
        "noise": model.noise,
        "length_scales_space": SCALES,
        "tail": 1e-3,
    }
    problem = make_problem(data, rank=model.rank, fixed_effects=model.effects.split(","), **options)
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

Row = dict[str, Any]


def scored(forecast_: Any, truth: Array) -> dict[str, Array]:
    """CRPS, error and rank, each (series, lead)."""
    if isinstance(forecast_, tuple):
        return score_normal(*forecast_, truth)
    return score_draws(forecast_, truth, np.random.default_rng(int(1e6 * abs(truth.sum()))))


def origin_row(block: Block, ahead: Forecasts, origin: int) -> Row:
    """Figures of one origin: means over leads, ranks of indices (index, lead), shares in 80 % bands (target, lead)."""
    weight = block.root**2 / (block.root**2).sum()
    field, indices = (scored(part, true) for part, true in zip(ahead(origin), block.truth(origin), strict=True))
    by_lead = weight @ field["crps"]
    held = np.abs(indices["pit"] - 0.5) < 0.4
    in_field = weight @ (np.abs(field["pit"] - 0.5) < 0.4)
    return {
        "field": float(by_lead.mean()),
        "field lead 1": float(by_lead[0]),
        "field lead 3": float(by_lead[2]),
        "EOFs": float(indices["crps"][:NUM_EOFS].mean()),
        "box": float(indices["crps"][NUM_EOFS].mean()),
        "field rmse": float((weight @ field["error"] ** 2).mean()),
        "EOFs rmse": float((indices["error"][:NUM_EOFS] ** 2).mean()),
        "box rmse": float((indices["error"][NUM_EOFS] ** 2).mean()),
        "pit": indices["pit"].tolist(),
        "covered": [in_field.tolist(), held[:NUM_EOFS].mean(0).tolist(), held[NUM_EOFS].tolist()],
    }


def figures(rows: Sequence[Row], every: int) -> Row:
    """A row of the table, of the rows of all origins."""
    found: Row = {"origins": len(rows)}
    for name in ("field", "field lead 1", "field lead 3", "EOFs", "box"):
        found[f"CRPS {name}"] = float(np.mean([row[name] for row in rows]))
    for name in ("field", "EOFs", "box"):
        found[f"RMSE {name}"] = float(np.sqrt(np.mean([row[f"{name} rmse"] for row in rows])))
    covered = np.mean([row["covered"] for row in rows], axis=0)  # (target, lead)
    for name, part in zip(("field", "EOFs", "box"), covered, strict=True):
        found[f"80 % {name}"] = float(part.mean())
        found[f"80 % {name} by lead"] = " ".join(f"{part[lead - 1]:.2f}" for lead in SHOWN_LEADS)
    pit = np.array([row["pit"] for row in rows])  # (origin, index, lead)
    said = []
    for name, part in (("EOFs", pit[:, :NUM_EOFS]), ("box", pit[:, NUM_EOFS:])):
        if len(part) >= 10:
            cycle = 12 if EVERY * every < 12 else None
            checks = rank_calibration(part, apart=EVERY * every, period=cycle)
            for key in ("p_uniform", "correlation", "p_independent", *(["p_cycle"] if cycle else [])):
                values = checks[key].values
                found[f"{key} {name} by lead"] = " ".join(f"{values[lead - 1]:.3f}" for lead in SHOWN_LEADS)
            said.append(f"{name}: {checks.attrs['verdict']}")
    found["verdict"] = "; ".join(said)
    return found


def ratio(rows: Sequence[Row], base: Sequence[Row], target: str, every: int) -> str:
    """CRPS over that of a baseline, with a 95 % interval by resampling blocks of two years of origins."""
    ours, theirs = (np.array([row[target] for row in part]) for part in (rows, base))
    rng, length = np.random.default_rng(0), max(2 * 12 // (EVERY * every), 1)
    starts = rng.integers(0, len(ours), (2000, -(-len(ours) // length)))
    at = (starts[:, :, None] + np.arange(length)).reshape(2000, -1) % len(ours)
    low, high = np.quantile(ours[at].mean(1) / theirs[at].mean(1), [0.025, 0.975])
    return f"{ours.mean() / theirs.mean():.3f} ({low:.3f} to {high:.3f})"


# -- runs -------------------------------------------------------------------------------------------------------------


class Run:
    """A folder of posteriors and of origins that are done."""

    def __init__(self, folder: Path, stop: float) -> None:
        self.folder, self.stop, self._file = folder, stop, folder / "origins.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        self._done: dict[str, Row] = {}
        if self._file.exists():
            for line in self._file.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                self._done[row["key"]] = row

    def row(self, key: str, compute: Callable[[], Row]) -> Row:
        """What was kept under a key, or else is computed and kept."""
        if key not in self._done:
            if time.monotonic() > self.stop:
                raise common.OutOfTime
            start = time.process_time()
            row = self._done[key] = {"key": key, **compute(), "cpu": round(time.process_time() - start, 2)}
            with self._file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(row) + "\n")
            shown = {name: f"{row[name]:.3f}" for name in ("field", "EOFs", "box")} | {"cpu": row["cpu"]}
            print("   ", key, shown, flush=True)
        return self._done[key]

    def posterior(self, name: str, compute: Callable[[], Result]) -> Result:
        """A posterior as it was saved: its draws are rounded a little."""
        folder = self.folder / name
        if not (folder / "result.nc").exists():
            start = time.process_time()
            compute().save(folder, overwrite=True)
            print(f"    fit {name}: {time.process_time() - start:.0f} CPU s", flush=True)
        return Result.load(folder)


class Model(NamedTuple):
    """A model, and the forecasts that are made of its posterior."""

    rank: int
    effects: str
    variants: Sequence[str]
    noise: str = "white"
    series: str = "ar1"
    change: str = ""

    def names(self) -> dict[str, str]:
        """Variants by the names of their rows."""
        name = f"SVD, {self.rank} modes, {self.effects}" + f", {self.noise} noise" * (self.noise != "white")
        name += f", series {self.series}" * (self.series != "ar1") + f", data with a {self.change}" * bool(self.change)
        return {f"{name}, {label}": label for label in self.variants}

    def rows(self, run: Run, root: Path, last: int, seed: int, every: int) -> Iterator[tuple[str, Row]]:
        """Rows of one fit, by name."""
        block = Block(root, last, self.change)
        fit = "_".join([self.series, str(self.rank), self.effects, self.noise, self.change, str(last), str(seed)])
        kept: list[Result] = []

        def ahead(label: str) -> Forecasts:
            if not kept:
                kept.append(run.posterior(fit, lambda: fitted(block, self, seed)))
            return posterior(block, kept[0], VARIANTS[label])

        for name, label in self.names().items():
            for origin in block.origins[::every]:
                key = f"{fit} {label} {origin}"
                row = run.row(key, lambda label=label, origin=origin: origin_row(block, ahead(label), int(origin)))
                yield name, row


class Baselines(NamedTuple):
    """All baselines, and the numbers of EOFs of linear inverse models by their name."""

    lims: dict[str, tuple[int, ...]]

    def rows(self, run: Run, root: Path, last: int, seed: int, every: int) -> Iterator[tuple[str, Row]]:
        """Rows of one fit, by name; they cost seconds and are not kept."""
        block = Block(root, last)
        found = {kind: univariate(block, kind) for kind in ("climatology", "persistence", "AR(1)")}
        for name, counts in self.lims.items():
            found |= {f"{name}, {count} EOFs": inverse_model(block, count, "residual" in name) for count in counts}
        for name, ahead in found.items():
            for origin in block.origins[::every]:
                yield name, origin_row(block, ahead, int(origin))


def jobs(args: argparse.Namespace) -> list[Baselines | Model]:
    """What is to be run."""
    if args.controls:
        both = ("AR(1)", "lags")
        return [
            *(Model(10, "intercept", both, args.noise, change=change) for change in ("", "cycle", "break")),
            Model(10, "intercept", ("AR(1)",), args.noise, series="iid"),
        ]
    part = "validation" if args.validate else "test"
    models = [Model(*x, noise=args.noise) for x in MODELS[part] if args.rank in (None, x[0])]
    if args.effects is not None:
        models = [model for model in models if model.effects == args.effects]
    if args.noise != "white":  # whose residuals persist already
        models = [x._replace(variants=[y for y in x.variants if "residuals" not in y]) for x in models]
    return [Baselines(LIMS[part]), *models]


def compared(known: dict[str, list[Row]], every: int) -> list[Row]:
    """CRPS of the model over that of the baselines, at the same origins."""
    return [
        {"forecast": name, "over": base}
        | {x: ratio(known[name], known[base], x, every) for x in ("field", "EOFs", "box")}
        for name in known
        for base in BASES
        if name.startswith("SVD") and len(known.get(base, ())) == len(known[name])
    ]


def main() -> None:
    """All rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder of the data")
    parser.add_argument("--run", type=Path, default=common.RESULTS / "forecasts", help="folder of what is done")
    parser.add_argument("--validate", action="store_true", help="origins from 1976 to 1994")
    parser.add_argument("--controls", action="store_true", help="what the table has to show: see above")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rank", type=int, help="models of this rank alone")
    parser.add_argument("--effects", help="models of these effects alone")
    parser.add_argument("--noise", choices=["white", "correlated"], default="white")
    parser.add_argument("--every", type=int, default=1, help="take every so many of the origins")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no origin after these")
    args = parser.parse_args()
    run = Run(args.run, time.monotonic() + 60 * args.minutes)
    blocks = TEST[-1:] if args.controls else VALIDATION if args.validate else TEST
    known: dict[str, list[Row]] = {}
    rows: list[Row] = []
    try:
        for job in jobs(args):
            found: dict[str, list[Row]] = {}
            for last in blocks:
                for name, row in job.rows(run, args.root, last, args.seed, args.every):
                    found.setdefault(name, []).append(row)
            for name, kept in found.items():
                rows.append({"forecast": name, **figures(kept, args.every)})
                print({k: round(v, 4) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
            known |= found
    except common.OutOfTime:
        print("out of time: run it again with the same --run, and it goes on from here", flush=True)
    ratios = compared(known, args.every)
    if ratios:
        print("\n" + common.table(ratios))
    shown = [{k: f"{v:.3f}" if isinstance(v, float) else v for k, v in row.items()} for row in rows]
    kind = "_controls" * args.controls + "_validation" * args.validate + f"_{args.noise}" * (args.noise != "white")
    settings = {"chain": CHAIN, "scales": SCALES, "box": BOX, "seed": args.seed, "blocks": blocks, "every": args.every}
    common.report(f"forecasts{kind}", shown, **settings, ratios=ratios)


if __name__ == "__main__":
    main()
