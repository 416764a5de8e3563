"""LDS: accuracy without and with a graph beside graph convolutional networks with as many labels; cost.

    python benchmarks/lds.py accuracy --root DATA        # Wine, Cancer, Digits; Cora and Citeseer without their graph
    python benchmarks/lds.py graph --root DATA --retained 0.25 0.5 0.75 1
    python benchmarks/lds.py cost --root DATA

``--root DATA`` holds Cora and Citeseer as PyG has them; without it they are left out. Splits are those of the paper:
10 nodes each for training, validation (the loss of the edges) and stopping in Wine and Cancer, 50 in Digits, and
Planetoid's training nodes with its validation nodes halved in the citation networks.

What there is to choose is chosen by the log loss of the stopping nodes, never by the test nodes:

``gcn``
    Graph convolutional network on the given or the nearest-neighbour graph; the best of its epochs and, without a
    graph, of four neighbour graphs.
``gcn+``
    The same, trained on the validation nodes too: as many labels as LDS spends.
``lds``
    `fit_bilevel`, from the graph of ``gcn``; where there are several settings, the best of these.
``lds+``
    Its edges, with the network fitted anew on training and validation nodes, in 300 steps.

A cell is one fit; see `common.cell`. Intervals are Student's over seeds, which draw splits and starts.
"""

from __future__ import annotations

import common  # isort: skip  (pins threads before numpy is loaded)

import argparse
import itertools
import json
import resource
import subprocess
import sys
import time
from collections.abc import Mapping
from functools import lru_cache, partial
from inspect import signature
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import xarray as xr
from scipy import stats

from probmodels import fit_bilevel, fit_svi
from probmodels.datasets.graphs import load_planetoid, load_tabular_graph, make_graph, split_nodes
from probmodels.guides.lds import NodeData
from probmodels.guides.nets import propagate
from probmodels.guides.sparse import SparseMatrix, make_links
from probmodels.inference.bilevel.hypergradients import Descent, gradient
from probmodels.lds import make_problem, refit_problem

TABLES, NETWORKS = ("wine", "cancer", "digits"), ("Cora", "Citeseer")
STARTS = tuple(itertools.product(("cosine", "euclidean"), (10, 20)))
METHODS = ("gcn", "gcn+", "lds", "lds+")
EPOCHS, LR = 300, 0.01
TRAINED = {"epochs": (EPOCHS, 300), "lr": (LR, 0.01)}  # as they are, and as they were when cells had no such keys
FIT: dict[str, Any] = {
    "num_rounds": 10,
    "inner_steps": 200,
    "tolerance": 0.01,
    "patience": 4,
    "num_samples": 64,
}
ADAM = {"hyper_optimiser": "adam", "hyper_lr": 0.005}
# Of these the one of the least stopping loss. The tables are small enough for two.
GRID: dict[str, list[dict[str, Any]]] = {
    name: [{"hyper_optimiser": "sgd", "hyper_lr": 1.0}, {"hyper_optimiser": "adam", "hyper_lr": 0.01}]
    for name in TABLES
}
percent = partial(common.interval, factor=100.0, digits=1)


@lru_cache(maxsize=4)
def load(dataset: str, root: str | None, graph: bool, retained: float, seed: int) -> xr.Dataset:
    """A data set with the split of a seed."""
    if dataset in TABLES:
        return load_tabular_graph(dataset, seed=seed)
    return load_planetoid(dataset, root=root, graph=graph, retained=retained, seed=seed)


def scores(data: xr.Dataset, chance: np.ndarray) -> dict[str, float]:
    """Accuracy on the test nodes, and log loss of the stopping nodes."""
    split, y = data["split"].values, data["y"].values
    found = {"accuracy": float((chance.argmax(1) == y)[split == "test"].mean())}
    stop = split == "stop"
    found["stop"] = float(-np.log(np.maximum(chance[stop, y[stop]], 1e-12)).mean())
    return found


def gcn(data: xr.Dataset, start: Mapping[str, Any], more: bool, seed: int) -> dict[str, Any]:
    """A graph convolutional network on the edges that LDS starts from, at its best epoch."""
    problem = make_problem(data, **start)
    graph: NodeData = problem.args[0]
    begun = problem.guide.edges.probability.detach() > 0
    source, target, origin = (part[begun] for part in graph.edges[:3])
    edges = graph.edges._replace(source=source, target=target, origin=origin)
    graph, weight = graph._replace(edges=edges, links=make_links(edges)), torch.ones(edges.num_pairs)
    split = data["split"].values
    rows = torch.as_tensor(np.flatnonzero(np.isin(split, ["train", "validation"] if more else ["train"])))
    torch.manual_seed(seed)
    sizes = [graph.x.shape[1], 16, data.sizes["class"]]
    layers = [torch.nn.init.xavier_uniform_(torch.empty(a, b)).requires_grad_() for a, b in pairwise(sizes)]
    groups = [{"params": layers[:1], "weight_decay": 5e-4}, {"params": layers[1:]}]
    optimiser = torch.optim.Adam(groups, lr=LR)

    def network(rate: float) -> torch.Tensor:
        x = graph.x.dropped(rate) if isinstance(graph.x, SparseMatrix) else F.dropout(graph.x, rate)
        h = propagate(x @ layers[0], graph.edges, weight, graph.links).relu()
        return propagate(F.dropout(h, rate) @ layers[1], graph.edges, weight, graph.links)

    best: dict[str, Any] = {"stop": np.inf}
    for epoch in range(EPOCHS):
        optimiser.zero_grad()
        F.cross_entropy(network(0.5)[rows], graph.y[rows]).backward()
        optimiser.step()
        if epoch % 5 == 4:
            with torch.no_grad():
                found = scores(data, network(0.0).softmax(-1).double().numpy())
            best = min(best, {**found, "epoch": epoch}, key=lambda row: row["stop"])
    return best


def lds(data: xr.Dataset, start: Mapping[str, Any], options: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """`fit_bilevel`, and the network fitted anew."""
    options = dict(options)
    model = {name: options.pop(name) for name in list(options) if name not in signature(fit_bilevel).parameters}
    start = {**start, **model}
    problem = make_problem(data, **start)
    result = fit_bilevel(problem, **{**FIT, **options}, seed=seed, progress=False)
    found: dict[str, Any] = scores(data, chance(result))
    fit = result.tree["fit"]
    found |= {"steps": fit.sizes["step"], "rounds": fit.sizes["judged_round"], "best": fit.attrs["best_round"]}
    theta = result.params()["edges.probability"]
    begun = make_problem(data, **start).guide.edges.probability.detach()
    found |= {"pairs": len(theta), "edges": float(theta.sum()), "begun": float(begun.sum())}
    found["hyper_step_seconds"] = float(fit["seconds"].median())
    again = fit_svi(refit_problem(problem, result), num_steps=EPOCHS, lr=LR, num_samples=64, seed=seed, progress=False)
    return found | {f"{name}+": value for name, value in scores(data, chance(again)).items()}


def chance(result: Any) -> np.ndarray:
    """Probabilities of classes (node, class), averaged over draws."""
    name = "class_probability"
    if "marginals" in result.tree and name in result.tree["marginals"]:
        return np.asarray(result.tree["marginals"][name].values, dtype=float)
    return np.asarray(result.posterior[name].mean(("chain", "draw")).values, dtype=float)


def run(dataset: str, seed: int, graph: bool, retained: float, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Rows of all methods on one data set and seed."""
    data = load(dataset, args.root, graph, retained, seed)
    key: dict[str, Any] = {"dataset": dataset, "seed": seed, "graph": graph, "retained": retained}
    key |= {f"network_{name}": now for name, (now, before) in TRAINED.items() if now != before}
    cell = partial(common.cell, "lds", args.until)
    starts = [{"start": "observed"}] if graph else [{"metric": m, "neighbours": k} for m, k in STARTS]
    rows: dict[str, dict[str, Any]] = {}
    for name in ("gcn", "gcn+"):
        found = [(cell(partial(gcn, data, s, name == "gcn+", seed), **key, method=name, **s), s) for s in starts]
        rows[name], start = min(found, key=lambda pair: pair[0]["stop"])
        if name == "gcn":
            begin = start
    grid = [args.options] if args.options else GRID.get(dataset, [ADAM])
    fits = [cell(partial(lds, data, begin, o, seed), **key, method="lds", **begin, **(FIT | o)) for o in grid]
    row = {**min(fits, key=lambda fit: fit["stop"]), "cpu": sum(fit["cpu"] for fit in fits)}
    rows["lds"] = row
    rows["lds+"] = {"accuracy": row["accuracy+"], "stop": row["stop+"], "cpu": row["cpu"]}
    return rows


def compare(found: list[dict[str, dict[str, Any]]], name: str, other: str) -> str:
    """Paired difference of two methods over seeds, and its p-value."""
    difference = np.array([rows[name]["accuracy"] - rows[other]["accuracy"] for rows in found])
    text = percent(difference)
    if len(difference) > 2 and difference.std() > 0:
        text += f" (p {stats.ttest_1samp(difference, 0).pvalue:.2g})"
    return text


def accuracy(args: argparse.Namespace, graph: bool) -> None:
    """Test accuracy of all methods."""
    datasets = args.datasets or (NETWORKS if graph else TABLES + NETWORKS)
    lines = []
    for dataset, retained in itertools.product(datasets, args.retained if graph else (1.0,)):
        found = []
        try:
            for seed in args.seeds:
                found.append(run(dataset, seed, graph, retained, args))
        except common.OutOfTime:
            print(f"{dataset}: out of time after {len(found)} seeds", flush=True)
        if not found:
            continue
        line: dict[str, Any] = {"data": dataset, "seeds": len(found)} | ({"retained": retained} if graph else {})
        line |= {name: percent(rows[name]["accuracy"] for rows in found) for name in METHODS}
        line |= {"lds - gcn": compare(found, "lds", "gcn"), "lds+ - gcn+": compare(found, "lds+", "gcn+")}
        line["CPU s"] = float(np.median([rows["lds"]["cpu"] for rows in found]))  # of all settings
        edges = found[0]["lds"]
        line["edges, seed 0"] = f"{edges['begun']:.0f} to {edges['edges']:.0f} of {edges['pairs']}"
        lines.append(line)
        print(line, flush=True)
    common.report(f"lds_{'graph' if graph else 'accuracy'}", lines, seeds=args.seeds, fit=FIT, grid=GRID, others=ADAM)


# -- cost -------------------------------------------------------------------------------------------------------------


def synthetic(num_nodes: int) -> xr.Dataset:
    """Points around five centres, a hundredth of them labelled for each of the splits."""
    rng = np.random.default_rng(0)
    y = rng.integers(5, size=num_nodes)
    x = rng.standard_normal((num_nodes, 32)) + 1.5 * np.eye(5, 32)[y]
    few = max(num_nodes // 100, 20)
    return split_nodes(make_graph(x, y), train=few, validation=few, stop=few)


def problem_of(name: str, root: str | None, candidates: int | str) -> Any:
    """LDS on a data set without its graph, or on ``name`` synthetic nodes."""
    data = synthetic(int(name)) if name.isdigit() else load(name, root, False, 1.0, 0)
    return make_problem(data, neighbours=10, candidates=candidates)


def ours(name: str, root: str | None, candidates: int) -> dict[str, float]:
    """Cost of steps of the hyperparameters, each of five inner steps and a hypergradient."""
    problem = problem_of(name, root, candidates)
    before = peak()
    fit = {"num_rounds": 1, "inner_steps": 60, "num_samples": 1, "num_scores": 1, "progress": False}
    result = fit_bilevel(problem, **fit)
    return _cost(problem.args[0].edges.num_pairs, result.tree["fit"]["seconds"].values, before)


def dense(name: str, root: str | None, steps: int = 4) -> dict[str, float]:
    """The same steps written with square matrices, as published: every pair of nodes is a candidate."""
    graph, train = problem_of(name, root, 0).args
    num_nodes, y = graph.edges.num_nodes, graph.y
    sizes = [graph.x.shape[1], 16, int(y.max()) + 1]
    before, times = peak(), []
    theta = torch.zeros(num_nodes, num_nodes)
    theta[graph.edges.source, graph.edges.target] = 1.0
    upper = torch.ones_like(theta).triu_(1)

    def loss(values: dict[str, torch.Tensor], theta: torch.Tensor, rate: float) -> torch.Tensor:
        chance = theta * upper
        edge = torch.bernoulli(chance.detach()) + (chance - chance.detach())
        matrix = edge + edge.mT + torch.eye(num_nodes)
        scale = matrix.sum(1).rsqrt()
        matrix = scale[:, None] * matrix * scale
        x = graph.x.dropped(rate) if isinstance(graph.x, SparseMatrix) else F.dropout(graph.x, rate)
        h = F.dropout((matrix @ (x @ values["0"])).relu(), rate)
        return F.cross_entropy((matrix @ (h @ values["1"]))[train], y[train])

    for _ in range(steps):
        begin = time.perf_counter()
        theta.requires_grad_()
        shapes = enumerate(pairwise(sizes))
        values = {str(i): torch.randn(shape).mul(0.1).requires_grad_() for i, shape in shapes}
        descent = Descent("adam", LR, {})
        for _ in range(5):
            values = descent.step(values, gradient(loss(values, theta, 0.5), values, create_graph=True))
        (slope,) = torch.autograd.grad(loss(values, theta, 0.0), theta)
        theta = (theta.detach() - 0.1 * slope).clamp(0, 1)
        times.append(time.perf_counter() - begin)
    return _cost(num_nodes * (num_nodes - 1) // 2, times, before)


def _cost(pairs: int, seconds: Any, before: float) -> dict[str, float]:
    grown, total = (peak() - before) / 2**30, peak() / 2**30
    return {"pairs": pairs, "seconds a step": float(np.median(seconds)), "GiB of steps": grown, "GiB in all": total}


def peak() -> float:
    """Largest resident memory of this process so far, in bytes."""
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def cost(args: argparse.Namespace) -> None:
    """Time and memory of a step, each row in a process of its own."""
    cases = [("ours", str(n), 15) for n in (3000, 10_000, 30_000, 100_000)]
    cases += [(kind, "digits", 20) for kind in ("ours", "dense")]
    cases += [(kind, "Cora", 20) for kind in ("ours", "dense")] if args.root else []
    rows = []
    for kind, name, candidates in cases:
        command = [sys.executable, __file__, "cost", "--one", kind, name, str(candidates)]
        command += ["--root", args.root] if args.root else []
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        label = f"{int(name):,} points" if name.isdigit() else name
        rows.append({"data": label, "program": kind, **json.loads(text)})
        print(rows[-1], flush=True)
    common.report("lds_cost", rows)


def main() -> None:
    """Run the parts that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("accuracy", "graph", "cost"))
    parser.add_argument("--root", help="folder with Cora and Citeseer as PyG has them")
    parser.add_argument("--datasets", nargs="*")
    parser.add_argument("--seeds", nargs="*", type=int, default=list(range(5)))
    parser.add_argument("--retained", nargs="*", type=float, default=[1.0])
    parser.add_argument("--options", type=json.loads, default={}, help="of make_problem and fit_bilevel, as JSON")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no cell after these")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        kind, name, candidates = args.one
        print(json.dumps(ours(name, args.root, int(candidates)) if kind == "ours" else dense(name, args.root)))
        return
    if args.part == "cost":
        cost(args)
        return
    if args.part == "graph" and not args.root:
        parser.error("graph needs --root, the folder with Cora and Citeseer")
    args.until = time.monotonic() + 60 * args.minutes
    if not args.root:
        args.datasets = [name for name in args.datasets or TABLES if name in TABLES]
    accuracy(args, args.part == "graph")


if __name__ == "__main__":
    main()
