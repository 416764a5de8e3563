"""Causal graphs of concepts: how well graphs are recovered, and whether probabilities of edges are calibrated.

    python benchmarks/causal_graph.py sem       [--seeds 5] [--minutes 60] [--python VENV/bin/python]
    python benchmarks/causal_graph.py pendulum  [--seeds 5] [--minutes 60] [--python VENV/bin/python]
    python benchmarks/causal_graph.py flags     [--seeds 50] [--rows 300 1000] [--minutes 60]
    python benchmarks/causal_graph.py sachs     --rows 853 --table DATA.csv --edges EDGES.csv

``sem``: structural equation models of 4, 6, 8 and 10 variables, 1000 rows, standardised. A seed makes graph, functions
and rows. For the posterior: AUROC of edges, expected calibration error (ECE) of their probabilities with the 95 % range
that exact calibration would have, pooled over seeds; structural Hamming distance (SHD) of the graph of the edges that
are more probable than not; beside SHD of NOTEARS, linear and with networks.

``pendulum``: four labels of pictures, of which two are functions of the other two without any noise: no method that
sees labels alone can know all directions. SHD by method, start and knowledge, and what the posterior says.

``flags``: data outside of the model, of the kinds of `causal_kinds`, and of the model itself: how often the verdict on
the model is that it does not fit, with Wilson's 95 % interval. Beside it, in how many data sets an edge that is not
there has a probability above 0.95, and in how many of these the verdict says nothing.

``sachs``: probabilities and verdict on proteins in cells (Sachs et al. 2005, `cyto_full_data.csv` and
`cyto_full_target.csv` of the package cdt), raw values and logarithms.

With ``--python`` an environment that has causal-learn, lingam and dagma runs PC, GES, DirectLiNGAM and DAGMA on the
same tables; a line between two variables that has no direction is compared with the class of the truth as well (SHD of
classes). CPU seconds are medians with ranges. Cells that were measured are kept in results/.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import common
import numpy as np
import pandas as pd
import xarray as xr
from causal_kinds import KINDS
from scipy.stats import binomtest

from probmodels import acyclic_sem, fit_svi
from probmodels.causal_graph import check_edges, edge_probabilities, make_problem
from probmodels.causal_graph.edges import SERIAL
from probmodels.datasets import load
from probmodels.guides.acyclicity import to_dag
from probmodels.inference.metrics.graphs import calibration_table, cpdag, edge_auroc, shd

SIZES = (4, 6, 8, 10)
MODELS: dict[str, dict[str, Any]] = {
    "additive, Gaussian": {"mechanism": "additive", "noise": "gaussian"},
    "linear, Laplace": {"mechanism": "linear", "noise": "laplace"},
    "linear, Gaussian": {"mechanism": "linear", "noise": "gaussian"},
}
ROWS = 1000
FLOORS: dict[str, dict[str, Any]] = {"all floors": {}, "floor 0.01": {"floors": [0.01]}}
FIT: dict[str, Any] = {"num_steps": 3000, "lr": 0.01, "num_samples": 2, "progress": False}
POINTS: dict[str, dict[str, Any]] = {
    "NOTEARS": {"mechanism": "linear", "constraint": "notears"},
    "DAGMA": {"mechanism": "linear", "constraint": "dagma"},
    "NOTEARS-MLP": {"mechanism": "any", "constraint": "notears"},
    "DAGMA-MLP": {"mechanism": "any", "constraint": "dagma"},
}
KNOWLEDGE: dict[str, dict[str, Any]] = {
    "none": {},
    "tiers": {"tiers": [["angle", "light"], ["length", "position"]]},
    "order": {"order": ["angle", "light", "length", "position"]},
}
PEER_NAMES = ("PC", "GES", "DirectLiNGAM", "DAGMA package")
PEERS = """
import json, sys, time, numpy as np
x, method = np.load(sys.argv[1]), sys.argv[2]
start = time.process_time()
if method == "PC":
    from causallearn.search.ConstraintBased.PC import pc
    found = pc(x, show_progress=False).G.graph
elif method == "GES":
    from causallearn.search.ScoreBased.GES import ges
    found = ges(x)["G"].graph
elif method == "DirectLiNGAM":
    from lingam import DirectLiNGAM
    found = DirectLiNGAM().fit(x).adjacency_matrix_.T
    found = np.abs(found) > 0.1
elif method == "DAGMA package":
    from dagma.linear import DagmaLinear
    found = DagmaLinear(loss_type="l2").fit(x, lambda1=0.03) != 0
if method in ("PC", "GES"):  # -1 at the tail and 1 at the head of an arrow, -1 at both ends of a line
    found = (found == -1) & (found.T != 0)
json.dump({"graph": np.asarray(found).astype(int).tolist(), "fit": time.process_time() - start}, open(sys.argv[3], "w"))
"""


def posterior(data: xr.Dataset, **options: Any) -> dict[str, Any]:
    """Exact probabilities of edges."""
    start = time.process_time()
    chance = edge_probabilities(make_problem(data, **options)).values
    return {"probability": chance.tolist(), "fit": time.process_time() - start}


def point(data: xr.Dataset, seed: int, **options: Any) -> dict[str, Any]:
    """One graph by gradients."""
    start = time.process_time()
    result = fit_svi(acyclic_sem.make_problem(data, seed=seed, **options), seed=seed, **FIT)
    graph = result.posterior["graph"].values[0, 0]
    return {"graph": graph.astype(int).tolist(), "fit": time.process_time() - start}


def peer(data: xr.Dataset, method: str, python: str) -> dict[str, Any]:
    """A graph by another package."""
    labels = data["label"].transpose("data", "concept").values[(data["split"] == "train").values]
    with tempfile.TemporaryDirectory() as folder:
        table, found = Path(folder) / "x.npy", Path(folder) / "found.json"
        np.save(table, (labels - labels.mean(0)) / labels.std(0))
        subprocess.run([python, "-c", PEERS, table, method, found], check=True, capture_output=True)
        answer: dict[str, Any] = json.loads(found.read_text())
    return answer


def distances(truth: np.ndarray, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """SHD (structural Hamming distance) of graphs, and of their equivalence classes."""
    graphs = [np.array(row["graph"]) for row in rows]
    classes = [graph if (graph * graph.T).any() else cpdag(graph) for graph in graphs]
    return {
        "SHD": common.interval(float(shd(t, g)) for t, g in zip(truth, graphs, strict=True)),
        "SHD of classes": common.interval(float(shd(cpdag(t), c)) for t, c in zip(truth, classes, strict=True)),
        "CPU s": common.spread([row["fit"] for row in rows]),
    }


def likely(chance: np.ndarray) -> np.ndarray:
    """Edges that are more probable than not; they have no cycle of two, and hardly ever a longer one."""
    return to_dag(chance, 0.5).numpy().astype(int)


def in_time(until: float, runs: list[tuple[Callable[[], Any], dict[str, Any]]]) -> list[dict[str, Any]]:
    """Cells of the first seeds, as many as are stored or can be started before the time limit."""
    rows = []
    for compute, key in runs:
        try:
            rows.append(common.cell("causal_graph", until, compute, **key))
        except common.OutOfTime:
            break
    return rows


def sem(options: argparse.Namespace, until: float) -> list[dict[str, Any]]:
    """Structural equation models by size."""
    lines: list[dict[str, Any]] = []
    for title, model in MODELS.items():
        pooled: list[tuple[np.ndarray, np.ndarray]] = []
        for size in SIZES:
            tables = [
                load("sem", num_nodes=size, num_rows=ROWS, test=0.0, seed=seed, **model)
                for seed in range(options.seeds)
            ]
            truth = [table["graph"].values for table in tables]
            runs = {"posterior": posterior}
            points = ["NOTEARS", "NOTEARS-MLP"][: 1 + (model["mechanism"] != "linear")]
            runs |= {name: partial(point, **POINTS[name]) for name in points}
            runs |= {name: partial(peer, method=name, python=options.python) for name in PEER_NAMES if options.python}
            for name, run in runs.items():
                seeded = {"seed": 0} if name in POINTS else {}
                key = {"part": "sem", "model": title, "size": size, "method": name}
                rows = in_time(
                    until, [(partial(run, table, **seeded), key | {"seed": s}) for s, table in enumerate(tables)]
                )
                if not rows:
                    continue
                line: dict[str, Any] = {"model": title, "concepts": size, "method": name}
                if name == "posterior":
                    chance = [np.array(row["probability"]) for row in rows]
                    pooled += zip(truth, chance, strict=False)
                    line |= {"AUROC": edge_auroc(np.stack(truth[: len(rows)]), np.stack(chance))}
                    rows = [{**row, "graph": likely(c)} for row, c in zip(rows, chance, strict=True)]
                found = {"seeds": len(rows)} | distances(np.array(truth[: len(rows)]), rows)
                lines.append({"AUROC": "", "ECE": "", **line, **found})
                print(lines[-1], flush=True)
        if not pooled:
            continue
        off = [~np.eye(len(t), dtype=bool) for t, _ in pooled]
        flat = [np.concatenate([pair[k][o] for pair, o in zip(pooled, off, strict=True)]) for k in (0, 1)]
        lines.append({"model": title, "concepts": "all", "method": "posterior", **pooled_scores(*flat)})
        print(lines[-1], flush=True)
    order = ["model", "concepts", "method", "seeds", "AUROC", "ECE", "SHD", "SHD of classes", "CPU s"]
    return [{name: line.get(name, "") for name in order} for line in lines]


def pooled_scores(truth: np.ndarray, chance: np.ndarray) -> dict[str, Any]:
    """AUROC and ECE over all pairs, beside the ECE that exactly calibrated probabilities would have."""
    rng = np.random.default_rng(0)
    floor = [float(calibration_table(chance, rng.random(len(chance)) < chance)["ece"]) for _ in range(200)]
    low, high = np.quantile(floor, [0.025, 0.975])
    ece = float(calibration_table(chance, truth)["ece"])
    more = (chance[truth > 0, None] > chance[truth == 0]).mean() + (
        chance[truth > 0, None] == chance[truth == 0]
    ).mean() / 2
    return {"AUROC": float(more), "ECE": f"{ece:.3f} (exact {low:.3f} to {high:.3f})"}


def pendulum(options: argparse.Namespace, until: float) -> list[dict[str, Any]]:
    """Labels of the pendulum by method, start and knowledge."""
    lines = []
    tables = [load("pendulum", size=8, num=ROWS, num_train=ROWS, seed=seed) for seed in range(options.seeds)]
    truth = np.array([table["graph"].values for table in tables])
    runs: list[tuple[str, str, str, Any]] = []
    for knowledge, known in KNOWLEDGE.items():
        for title, floors in FLOORS.items():
            runs.append(("posterior", title, knowledge, partial(posterior, **floors, **known)))
        for name, point_options in POINTS.items():
            starts = ("zero", "random", "superset") if knowledge == "none" else ("zero",)
            runs += [
                (name, start, knowledge, partial(point, start=start, **point_options, **known)) for start in starts
            ]
    if options.python:
        runs += [(name, "", "none", partial(peer, method=name, python=options.python)) for name in PEER_NAMES]
    for name, start, knowledge, run in runs:
        cells = []
        for seed, table in enumerate(tables):
            seeded = {"seed": seed} if name in POINTS else {}
            key = {"part": "pendulum", "method": name, "start": start, "knowledge": knowledge, "seed": seed}
            cells.append((partial(run, table, **seeded), key))
        rows = in_time(until, cells)
        if not rows:
            continue
        if name == "posterior":
            chance = np.mean([row["probability"] for row in rows], 0)
            print(knowledge, start, "mean probability of every edge", np.round(chance, 2).tolist(), flush=True)
            rows = [{**row, "graph": likely(np.array(row["probability"]))} for row in rows]
        line = {"method": name, "start": start, "knowledge": knowledge, "seeds": len(rows)}
        lines.append(line | distances(truth[: len(rows)], rows))
        print(lines[-1], flush=True)
    return lines


def verdict(kind: str, seed: int, rows: int) -> dict[str, Any]:
    """Whether a data set of a kind is flagged, and whether an edge that is not there is almost certain."""
    values, truth = KINDS[kind](seed, rows)
    found = check_edges(make_problem(pd.DataFrame(values, columns=[f"v{i}" for i in range(values.shape[1])])))
    return {
        "flagged": bool(found["doubtful"].any()),
        "serial": found.attrs["serial_tail_probability"] < SERIAL,
        "wrong": bool((found["edge_probability"].values[truth == 0] > 0.95).any()),
    }


def flags(options: argparse.Namespace, until: float) -> list[dict[str, Any]]:
    """How often the verdict says that the model does not fit, by kind of data and number of rows."""
    lines = []
    for count in options.rows:
        for kind in KINDS:
            key = {"part": "flags", "kind": kind, "rows": count}
            seeds = range(options.seeds)
            rows = in_time(until, [(partial(verdict, kind, seed, count), key | {"seed": seed}) for seed in seeds])
            if not rows:
                continue
            found = sum(row["flagged"] for row in rows)
            ends = binomtest(found, len(rows)).proportion_ci(method="wilson")
            wrong = [row for row in rows if row["wrong"]]
            line = {"kind": kind, "rows": count, "data sets": len(rows), "flagged": found / len(rows)}
            line |= {"95 % interval": f"{ends.low:.2f} to {ends.high:.2f}", "with a wrong edge > 0.95": len(wrong)}
            lines.append(line | {"not flagged": sum(not row["flagged"] for row in wrong)})
            print(lines[-1], flush=True)
    return lines


def sachs(options: argparse.Namespace, until: float) -> list[dict[str, Any]]:
    """Edges above 0.99, how many of them are in the consensus, and the verdict."""
    table, edges = pd.read_csv(options.table), pd.read_csv(options.edges)
    truth = {(str(cause).lower(), str(effect).lower()) for cause, effect in edges.iloc[:, :2].values}
    lines = []
    for scale in ("raw", "logarithms"):
        values = table if scale == "raw" else np.log(table.clip(lower=table[table > 0].min(), axis=1))
        start = time.process_time()
        problem = make_problem(values.iloc[: options.rows[-1]])
        built = time.process_time() - start
        found = check_edges(problem)
        sure = found["edge_probability"].to_series()
        sure = sure[sure > 0.99]
        doubtful = found["doubtful"].to_series()
        lines.append(
            {
                "values": scale,
                "rows": problem.data.sizes["data"] if problem.data is not None else 0,
                "edges > 0.99": len(sure),
                "in the consensus": sum((c.lower(), e.lower()) in truth for c, e in sure.index),
                "doubtful": int(doubtful[sure.index].sum()),
                "tail probability": found.attrs["tail_probability"],
                "serial tail probability": found.attrs["serial_tail_probability"],
                "CPU s": f"{built:.0f} and {time.process_time() - start - built:.0f}",
            }
        )
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    """Print the table of a part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["sem", "pendulum", "flags", "sachs"])
    parser.add_argument("--seeds", type=int, help="5, or 50 for flags")
    parser.add_argument("--rows", type=int, nargs="+", default=[300, ROWS], help="of flags; sachs takes the last")
    parser.add_argument("--table", help="of sachs: values, a column for each protein")
    parser.add_argument("--edges", help="of sachs: cause and effect in each row")
    parser.add_argument("--minutes", type=float, default=np.inf, help="start no cell after these")
    parser.add_argument("--python", help="of an environment with causal-learn, lingam and dagma")
    options = parser.parse_args()
    options.seeds = options.seeds or (50 if options.part == "flags" else 5)
    lines = {"sem": sem, "pendulum": pendulum, "flags": flags, "sachs": sachs}[options.part](
        options, time.monotonic() + 60 * options.minutes
    )
    common.report(f"causal_graph_{options.part}", lines, seeds=options.seeds, num_rows=ROWS, **FIT)


if __name__ == "__main__":
    main()
