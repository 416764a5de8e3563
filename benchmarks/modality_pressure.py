"""Which month of sea level pressure belongs to which month of sea surface temperature? Towers beside linear CCA.

    python benchmarks/modality_pressure.py --root DATA --seeds 8

ERSST v5 and NCEP/NCAR sea level pressure of the North Pacific, 832 months from January 1950 to April 2019
(``DATA/sst``: ``ersst_v5_north_pacific_1950_2019.nc``, ``ncep_slp_north_pacific_1948_2019.nc``, ``pdo_ncei.csv``).
Each seed deals blocks of five whole years to training (about 60 %), validation (20 %) and test (20 %), since months
near each other are alike; training months within six of another part are left out. Climatology and principal components
are of the training months, cells weighted by the square root of the cosine of latitude. All methods read the same
leading components of each field, divided by their sds, and embed them in 8 numbers.

Rows: towers with the matching loss alone, with one structure each, and with the gap closed after training; ridge CCA;
the same towers and CCA with the pressure months of training shuffled among years of the same calendar month (control);
and, for the probes, the first 8 components themselves. Number of components, ridge, number of
steps and weight of a structure are chosen by the mean reciprocal rank on the validation blocks of the seed; the test
blocks are read once, after that. The choices on offer were settled on seed 100, which the table leaves out.

Columns: recall of the right month of pressure among all test months (R@1, R@10, mean of both directions; chance is in
the heading), mean reciprocal rank, information in nats, squared distance of the centroids, and accuracy of logistic
regressions, fitted to embeddings of training months, for the season (of four) and for the sign of the PDO, from
temperature and from pressure. Means over seeds with Student's 95 % intervals, and the paired difference of the mean
reciprocal rank to CCA. Seeds share months, so that intervals are of the choice of blocks and of starting values, not
of another century.
"""

from __future__ import annotations

import common  # isort: skip  (pins threads before numpy is loaded)

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import linalg
from sklearn.linear_model import LogisticRegression

from probmodels import fit_svi
from probmodels.datasets.paired.views import make_views
from probmodels.datasets.sst import load_sst
from probmodels.modality_structure import close_gap, embed, information_bound, make_problem, modality_gap, recall_at

Array = NDArray[np.float64]
Pair = tuple[Array, Array]

SIZE = 8
BLOCK, GAP = 5, 6  # years of a block; months left out beside another part
COMPONENTS = (10, 20, 40)
STEPS = (25, 60, 150)
RIDGES = (0.01, 0.1, 0.3, 1.0)
STRUCTURES: dict[str, list[dict[str, Any]]] = {
    "separation": [{"orthogonality": w, "contrast": w / 4, "uniformity": w / 10} for w in (0.3, 1.0)],
    "bridge": [{"bridge": w} for w in (0.25, 1.0)],
    "path": [{"path": k} for k in (1, 3)],
    "consistency": [{"consistency": w, "normalize": "N2"} for w in (1.0, 10.0)],
}
TOWERS: dict[str, Any] = {"size": SIZE, "hidden": 64}
FIT: dict[str, Any] = {"lr": 0.003, "batch_size": 128, "num_samples": 10, "progress": False}


def matrix(path: Path) -> tuple[Array, Any]:
    """Field (month, cell) weighted by area, and its months."""
    field = load_sst(str(path), anomalies=False, period="1950-01/2019-04")
    values = (field * np.sqrt(np.cos(np.deg2rad(field["lat"])))).values.reshape(field.sizes["time"], -1)
    return values[:, np.isfinite(values).all(0)].astype(float), pd.DatetimeIndex(field["time"].values)


def parts_of(months: Any, seed: int) -> NDArray[Any]:
    """``train``, ``validation``, ``test`` or ``none`` for each month, by blocks of years."""
    block = (months.year - months.year[0]) // BLOCK
    order = np.random.default_rng(seed).permutation(block.max() + 1)
    fifth = round(len(order) / 5)
    name = np.full(len(order), "train", dtype="<U10")
    name[order[:fifth]], name[order[fifth : 2 * fifth]] = "test", "validation"
    part = name[block]
    held = np.flatnonzero(part != "train")
    near = np.abs(np.arange(len(part))[:, None] - held).min(1) <= GAP
    part[(part == "train") & near] = "none"
    return part


def components(values: Array, months: Any, train: NDArray[np.bool_], count: int) -> Array:
    """Leading principal components (month, component) of anomalies, with unit variance in training."""
    for month in range(1, 13):
        here = months.month == month
        values = np.where(here[:, None], values - values[here & train].mean(0), values)
    vectors = np.linalg.svd(values[train], full_matrices=False)[2][:count]
    found = values @ vectors.T
    return found / found[train].std(0)


def shuffled(rows: NDArray[np.int_], months: Any, rng: np.random.Generator) -> NDArray[np.int_]:
    """The same rows in another order of the years of each calendar month."""
    found = rows.copy()
    for month in range(1, 13):
        here = np.flatnonzero(months.month[rows] == month)
        found[here] = rows[rng.permutation(here)]
    return found


def cca(x: Array, y: Array, fitted: NDArray[np.int_], partner: NDArray[np.int_], ridge: float) -> Pair:
    """Canonical variates of unit length (month, 8), each times its correlation, by ridge CCA on whitened components."""
    a, b = x[fitted], y[partner]
    roots = [linalg.inv(linalg.sqrtm((1 - ridge) * np.cov(z.T) + ridge * np.eye(z.shape[1]))).real for z in (a, b)]
    cross = roots[0] @ ((a - a.mean(0)).T @ (b - b.mean(0)) / len(a)) @ roots[1]
    left, size, right = np.linalg.svd(cross)
    found = (x - a.mean(0)) @ roots[0] @ left[:, :SIZE], (y - b.mean(0)) @ roots[1] @ right[:SIZE].T
    u, v = (z * np.sqrt(size[:SIZE]) for z in found)
    return u / np.linalg.norm(u, axis=1, keepdims=True), v / np.linalg.norm(v, axis=1, keepdims=True)


def towers(
    x: Array,
    y: Array,
    fitted: NDArray[np.int_],
    partner: NDArray[np.int_],
    seed: int,
    steps: int,
    closed: bool = False,
    **options: Any,
) -> tuple[Pair, float]:
    """Embeddings of all months by towers that learn from some, and the temperature."""
    views = {"sst": np.concatenate([x[fitted], x]), "slp": np.concatenate([y[partner], y])}
    split = np.array(["train"] * len(fitted) + ["test"] * len(x))
    problem = make_problem(make_views(views, split=split), seed=seed, **TOWERS, **options)
    result = fit_svi(problem, num_steps=steps, seed=seed, **FIT)
    found = (close_gap if closed else embed)(result, "test")
    return (found.z["sst"], found.z["slp"]), found.temperature


def rank_score(pair: Pair, rows: NDArray[np.int_]) -> float:
    """Mean reciprocal rank of the right month, both directions."""
    table = pair[0][rows] @ pair[1][rows].T
    own = np.diag(table)
    ranks = [(t >= own[:, None]).sum(1) for t in (table, table.T)]
    return float(np.mean([1 / r for r in ranks]))


def best_temperature(pair: Pair, rows: NDArray[np.int_]) -> float:
    """Temperature of the largest bound on given months; for methods that fit none."""
    table = pair[0][rows] @ pair[1][rows].T
    grid = np.geomspace(0.01, 10, 60)
    return float(grid[np.argmax([information_bound(table / t) for t in grid])])


def probe(z: Array, label: NDArray[Any], train: NDArray[np.int_], test: NDArray[np.int_]) -> float:
    """Accuracy of a logistic regression on months of the test blocks."""
    model = LogisticRegression(max_iter=2000).fit(z[train], label[train])
    return float(model.score(z[test], label[test]))


def judged(
    pair: Pair, temperature: float, rows: dict[str, NDArray[np.int_]], season: NDArray[Any], sign: NDArray[Any]
) -> dict[str, float]:
    """All columns of a method for one seed."""
    test, train = rows["test"], rows["train"]
    z, other = pair[0][test], pair[1][test]
    table = z @ other.T
    found = {f"R@{k}": (recall_at(table, k) + recall_at(table.T, k)) / 2 for k in (1, 10)}
    found["MRR"] = rank_score(pair, test)
    found["nats"] = information_bound(table / temperature)
    found["gap"] = modality_gap(z, other)[0]
    return found | probes(pair, train, test, season, sign)


def probes(
    pair: Pair, train: NDArray[np.int_], test: NDArray[np.int_], season: NDArray[Any], sign: NDArray[Any]
) -> dict[str, float]:
    """Accuracies of the probes."""
    found = {}
    for what, label in (("season", season), ("PDO", sign)):
        for name, one in zip(("sst", "slp"), pair, strict=True):
            found[f"{what} {name}"] = probe(one, label, train, test)
    return found


def run(fields: Pair, months: Any, sign: NDArray[Any], seed: int) -> dict[str, dict[str, float]]:
    """All methods for one deal of blocks."""
    part = parts_of(months, seed)
    rows = {name: np.flatnonzero(part == name) for name in ("train", "validation", "test")}
    train, valid = rows["train"], rows["validation"]
    season = (months.month.values % 12) // 3
    read = {k: [components(f, months, part == "train", k) for f in fields] for k in COMPONENTS}
    # With chosen settings only; test months are not looked at before.
    count, ridge = max(
        ((k, r) for k in COMPONENTS for r in RIDGES),
        key=lambda kr: rank_score(cca(*read[kr[0]], train, train, kr[1]), valid),
    )
    linear = cca(*read[count], train, train, ridge)
    found = {"ridge CCA": judged(linear, best_temperature(linear, valid), rows, season, sign)}
    tried = {(k, steps): towers(*read[k], train, train, seed, steps) for k in COMPONENTS for steps in STEPS}
    k, steps = max(tried, key=lambda setting: rank_score(tried[setting][0], valid))
    found["matching alone"] = judged(*tried[k, steps], rows, season, sign)
    closed = towers(*read[k], train, train, seed, steps, closed=True)
    found["matching, gap closed"] = judged(*closed, rows, season, sign)
    for name, choices in STRUCTURES.items():
        fits = [towers(*read[k], train, train, seed, steps, **options) for options in choices]
        found[name] = judged(*max(fits, key=lambda fit: rank_score(fit[0], valid)), rows, season, sign)
    partner = shuffled(train, months, np.random.default_rng(seed))
    control = cca(*read[count], train, partner, ridge)
    found["ridge CCA, shuffled"] = judged(control, best_temperature(control, valid), rows, season, sign)
    found["matching, shuffled"] = judged(*towers(*read[k], train, partner, seed, steps), rows, season, sign)
    first: Pair = (read[k][0][:, :SIZE], read[k][1][:, :SIZE])
    found["first 8 components"] = probes(first, train, rows["test"], season, sign)
    common_season = np.bincount(season[train]).argmax()
    common_sign = np.bincount(sign[train].astype(int)).argmax()
    most = {"season": (season[rows["test"]] == common_season).mean(), "PDO": (sign[rows["test"]] == common_sign).mean()}
    found["commonest class"] = {f"{what} {name}": float(most[what]) for what in most for name in ("sst", "slp")}
    number = len(rows["test"])
    found["chance"] = {"R@1": 1 / number, "R@10": 10 / number, "MRR": float(np.mean(1 / np.arange(1, number + 1)))}
    print(
        f"seed {seed}: {[len(r) for r in rows.values()]} months, {count} components, ridge {ridge}; towers {k}, {steps}"
    )
    for name, values in found.items():
        print(f"  {name:22s}", ", ".join(f"{key} {value:.3f}" for key, value in values.items()), flush=True)
    return found


def main() -> None:
    """Print one line for each method and seed, and a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--first", type=int, default=0)
    args = parser.parse_args()
    folder = args.root / "sst"
    sst, months = matrix(folder / "ersst_v5_north_pacific_1950_2019.nc")
    slp, same = matrix(folder / "ncep_slp_north_pacific_1948_2019.nc")
    shared = months.to_period("M").intersection(same.to_period("M"))
    sst, slp = (f[m.to_period("M").isin(shared)] for f, m in ((sst, months), (slp, same)))
    months = shared.to_timestamp()
    index = pd.read_csv(folder / "pdo_ncei.csv").set_index("time")["pdo"]
    sign = index.loc[months.strftime("%Y-%m")].values > 0
    print(f"{len(months)} months, {sst.shape[1]} and {slp.shape[1]} cells", flush=True)
    runs = [run((sst, slp), months, sign, seed) for seed in range(args.first, args.first + args.seeds)]
    columns = list(runs[0]["ridge CCA"])
    print("| |", " | ".join([*columns, "MRR − CCA"]), "|")
    print("|---" * (len(columns) + 2) + "|")
    for name in runs[0]:
        cells = [common.interval([r[name][c] for r in runs]) if c in runs[0][name] else "" for c in columns]
        both = [r[name]["MRR"] - r["ridge CCA"]["MRR"] for r in runs] if "MRR" in runs[0][name] else None
        cells.append("" if both is None or name == "ridge CCA" else common.interval(both))
        print(f"| {name} |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
