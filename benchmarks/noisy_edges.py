"""Edges seen through a noisy channel: recovery and calibration on contextual block models, ranks of rates, labels.

    python benchmarks/noisy_edges.py recovery
    python benchmarks/noisy_edges.py sbc
    python benchmarks/noisy_edges.py labels

``recovery``: graphs of two classes with 25 % or 50 % of the true edges deleted and 25 % added. Area under the ROC
curve of edge probabilities over all pairs, beside the oracle that knows all classes and rates, the observed graph, the
cosine of features and the two together; expected calibration error in ten bins of equal width, over all pairs and over
seen and unseen ones apart; then, pooled over graphs, how often pairs of a bin are true edges. ``classes known``: the
block model with all classes given; ``a fifth known``: with those of training nodes, the others inferred; ``features``:
no classes, log odds linear in the inner product of features; ``three looks``: classes known, every pair looked at
three times.

``sbc``: simulation-based calibration of the channel, of rates and of the number of true edges by `run_mcmc`, classes
known, with a control whose prior of the deletion rate is wrong.

``labels``: four nodes, whose 64 graphs are enumerated, under labels and a given network: edge probabilities of the
guide by how derivatives pass through edges; then graphs as in ``recovery``, a fifth of the labels known, by the bound
that is reached, the accuracy of the test labels and the number of edges.

A cell is one fit, or one replicate. It is appended to ``results/noisy_edges.jsonl`` when it is done and is not run
again; ``--minutes`` stops before the next one. Intervals are Student's over seeds.
"""

from __future__ import annotations

import common  # isort: skip  (pins threads before numpy is loaded)

import argparse
import itertools
import time
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
import xarray as xr
from pyro import poutine
from sklearn.metrics import roc_auc_score
from sklearn.metrics.pairwise import cosine_similarity

from probmodels import Problem, Result, fit_svi, run_mcmc
from probmodels.datasets.graphs import simulate_csbm
from probmodels.inference import sbc
from probmodels.noisy_edges.model import label_fit, make_problem

cell = partial(common.cell, "noisy_edges")
NOISE = ((0.25, 0.25), (0.5, 0.25))
BINS = 10
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "classes known": ("mcmc", {"blocks": True}),
    "a fifth known": ("mcmc", {"blocks": True}),
    "a fifth known, guide": ("svi", {"blocks": True}),
    "features": ("mcmc", {"similarity": ["inner"]}),
    "three looks": ("mcmc", {"blocks": True, "trials": 3}),
}


# -- recovery ---------------------------------------------------------------------------------------------------------


def recover(method: str, nodes: int, deleted: float, added: float, seed: int, steps: int) -> dict[str, Any]:
    """Figures of one method on one graph."""
    data = simulate_csbm(nodes, deleted=deleted, added=added, signal=2.0, train=nodes // 5, seed=seed)
    u, v = np.triu_indices(nodes, 1)
    true = np.isin(u * nodes + v, data["true_source"].values * nodes + data["true_target"].values)
    seen = np.isin(u * nodes + v, data["source"].values * nodes + data["target"].values).astype(int)
    trials = 3 if method in ("three looks", "oracle, three looks") else 1
    rates = data.attrs["deletion_rate"], data.attrs["addition_rate"]
    if trials > 1:  # the channel twice more
        again = np.random.default_rng([seed, 1]).binomial(trials - 1, np.where(true, 1 - rates[0], rates[1]))
        seen = seen + again
        kept = seen > 0
        data = data.drop_dims("edge").assign(
            source=("edge", u[kept]), target=("edge", v[kept]), count=("edge", seen[kept])
        )
    y = data["y"].values
    cosine = cosine_similarity(data["x"].values)[u, v]
    found: dict[str, Any] = {}
    if method in METHODS:
        engine, options = METHODS[method]
        whole = data if method.startswith("a fifth") or method == "features" else data.drop_vars("split")
        problem = make_problem(whole, all_pairs=True, **options)
        result = _run(problem, engine, seed, steps)
        probability, found = _by_pair(result, problem), _rates(result)
    else:
        chance = np.where(y[u] == y[v], data.attrs["within"], data.attrs["between"])
        odds = seen * np.log((1 - rates[0]) / rates[1]) + (trials - seen) * np.log(rates[0] / (1 - rates[1]))
        probability = {
            "observed": seen.astype(float),
            "cosine": cosine,
            "observed, then cosine": seen + 0.5 * (cosine + 1),
        }.get(method, 1 / (1 + np.exp(-odds - np.log(chance / (1 - chance)))))
    found["auroc"] = roc_auc_score(true, probability)
    if method in METHODS or method.startswith("oracle"):
        for name, chosen in (("all", seen >= 0), ("seen", seen > 0), ("unseen", seen == 0)):
            found[f"bins {name}"] = _bins(probability[chosen], true[chosen])
    return {**found, "edges": int(true.sum()), "deletion_true": rates[0], "addition_true": rates[1]}


def _run(problem: Problem, engine: str, seed: int, steps: int) -> Result:
    if engine == "mcmc":
        # With many unknowns the first metric of Pathfinder may degenerate.
        start = "prior" if "membership_noise" in problem.sites else None
        sizes = {"num_chains": 8, "warmup_steps": steps, "num_samples": steps // 2}
        return run_mcmc(problem, init=start, seed=seed, progress=False, **sizes)
    return fit_svi(problem, num_steps=10 * steps, lr=0.03, lr_decay=0.05, num_samples=500, seed=seed, progress=False)


def _by_pair(result: Result, problem: Problem) -> common.Array:
    """Edge probabilities in the order of all pairs u < v."""
    if "marginals" in result.tree.children:
        values = result.tree["marginals"]["edge_probability"].values
    else:
        values = result.posterior["edge_probability"].mean(("chain", "draw")).values
    edges, size = problem.args[0].edges, problem.args[0].edges.num_nodes
    order = np.argsort((edges.source * size + edges.target).numpy())
    return values[order]


def _rates(result: Result) -> dict[str, float]:
    posterior = result.posterior
    found = {name: float(posterior[name].mean()) for name in ("deletion", "addition", "num_edges")}
    found |= {f"{name}_sd": float(posterior[name].std()) for name in ("deletion", "addition", "num_edges")}
    if "sample_stats" in result.tree.children and "diverging" in result.tree["sample_stats"]:
        found["diverging"] = float(result.tree["sample_stats"]["diverging"].mean())
    return found


def _bins(probability: common.Array, true: common.Array) -> list[list[float]]:
    """Number, sum of probabilities and number of edges by bin."""
    place = np.clip((probability * BINS).astype(int), 0, BINS - 1)
    sums = [np.bincount(place, weight, BINS) for weight in (np.ones(len(true)), probability, true)]
    return np.stack(sums, axis=1).tolist()


def calibration_error(bins: list[list[float]]) -> float:
    """Mean distance of probabilities and frequencies, weighted by the number of pairs."""
    number, probability, true = np.array(bins).T
    return float(np.abs(probability - true).sum() / number.sum())


def run_recovery(options: argparse.Namespace) -> None:
    until = time.monotonic() + 60 * options.minutes
    names = ["oracle", "oracle, three looks", "observed", "cosine", "observed, then cosine", *options.methods]
    cells: dict[tuple[Any, ...], dict[str, Any]] = {}
    try:
        for seed, noise, name in itertools.product(range(options.seeds), NOISE, names):
            key = {"part": "recovery", "method": name, "nodes": options.nodes, "noise": noise, "seed": seed}
            key["steps"] = options.steps if name in METHODS else 0
            setting = (name, options.nodes, *noise, seed, options.steps)
            cells[name, noise, seed] = cell(until, partial(recover, *setting), **key)
            print(name, noise, seed, f"{cells[name, noise, seed]['auroc']:.4f}", flush=True)
    except common.OutOfTime:
        print("out of time; what follows is what there is", flush=True)
    rows, reliability = [], []
    for noise, name in itertools.product(NOISE, names):
        found = {seed: cells[name, noise, seed] for seed in range(options.seeds) if (name, noise, seed) in cells}
        if not found:
            continue
        best = "oracle, three looks" if name.endswith("three looks") else "oracle"
        below = [cells[best, noise, seed]["auroc"] - row["auroc"] for seed, row in found.items()]
        line: dict[str, Any] = {"deleted": noise[0], "added": noise[1], "method": name, "graphs": len(found)}
        line["AUROC"] = common.interval(row["auroc"] for row in found.values())
        line["below the oracle"] = common.interval(below)
        for part in ("all", "seen", "unseen"):
            parts = [row.get(f"bins {part}") for row in found.values()]
            line[f"ECE {part}"] = common.interval(calibration_error(x) for x in parts if x) if all(parts) else ""
        for rate in ("deletion", "addition"):
            given = [row for row in found.values() if rate in row]
            line[rate] = f"{np.mean([row[rate] for row in given]):.3f}" if given else ""
            line[f"its sd ({rate})"] = f"{np.mean([row[f'{rate}_sd'] for row in given]):.3f}" if given else ""
        line["CPU s"] = f"{np.median([row['cpu'] for row in found.values()]):.0f}"
        rows.append(line)
        if name in METHODS:
            total = np.sum([row["bins all"] for row in found.values()], axis=0)
            for low, (number, probability, true) in zip(range(BINS), total, strict=True):
                if number:
                    place = f"{low / BINS:.1f} to {(low + 1) / BINS:.1f}"
                    values = {"pairs": int(number), "mean probability": probability / number, "edges": true / number}
                    reliability.append({"deleted": noise[0], "method": name, "bin": place, **values})
    common.report("noisy_edges_recovery", rows, **vars(options))
    common.report("noisy_edges_reliability", reliability, **vars(options))


# -- calibration of parameters ----------------------------------------------------------------------------------------


class Ranks:
    """Simulator and inference, as `sbc` takes them: two known classes, all rates from the prior."""

    def __init__(self, nodes: int, deletion: tuple[float, float], options: argparse.Namespace, until: float) -> None:
        self.nodes, self.deletion, self.options, self.until = nodes, deletion, options, until
        self.u, self.v = np.triu_indices(nodes, 1)
        self.y = np.arange(nodes) % 2
        self.prior = self.problem(np.zeros(len(self.u), dtype=bool), (2.0, 4.0)).args[1]

    def problem(self, seen: common.Array, deletion: tuple[float, float]) -> Problem:
        """The problem of a graph with these pairs seen."""
        columns = {"source": ("edge", self.u[seen]), "target": ("edge", self.v[seen]), "y": ("node", self.y)}
        return make_problem(xr.Dataset(columns), blocks=True, expected_degree=self.nodes / 4, deletion=deletion)

    def simulate(self, rng: np.random.Generator) -> tuple[dict[str, Any], common.Array]:
        """Parameters from the prior, true edges, then what was seen of them."""
        prior = self.prior
        deletion, ratio = rng.beta(*prior.deletion), rng.beta(*prior.addition_ratio)
        rates = prior.rate[0] + prior.rate[1] * rng.standard_normal(3)
        place = np.where(self.y[self.u] != self.y[self.v], 1, 2 * self.y[self.u])  # 00, 01, 11
        edge = rng.random(len(self.u)) < 1 / (1 + np.exp(-rates[place]))
        seen = rng.random(len(self.u)) < np.where(edge, 1 - deletion, ratio * (1 - deletion))
        truth = {
            "deletion": deletion,
            "addition": ratio * (1 - deletion),
            "rate_logit": rates,
            "true edges": edge.sum(),
        }
        return {name: np.asarray(value, dtype=float) for name, value in truth.items()}, seen

    def infer(self, seen: common.Array, seed: int) -> xr.Dataset:
        """Draws, from the file where it has them."""
        number = int(np.packbits(seen).astype(int) @ np.arange(1, len(np.packbits(seen)) + 1))
        key = {"part": "sbc", "nodes": self.nodes, "seed": seed, "data": number, "deletion": self.deletion}
        row = cell(self.until, lambda: self._draws(seen, seed), **key, steps=self.options.steps)
        return xr.Dataset(
            {
                name: (("chain", "draw", *(("block_pair",) if np.ndim(value) == 2 else ())), np.array(value)[None])
                for name, value in row["draws"].items()
            }
        )

    def _draws(self, seen: common.Array, seed: int) -> dict[str, Any]:
        steps = self.options.steps
        problem = self.problem(seen, self.deletion)
        result = run_mcmc(problem, num_chains=16, warmup_steps=steps, num_samples=50, seed=seed, progress=False)
        posterior = result.posterior.stack(sample=("chain", "draw")).transpose("sample", ...)
        posterior = posterior.isel(sample=np.linspace(0, posterior.sizes["sample"] - 1, 99).round().astype(int))
        names = ("deletion", "addition", "rate_logit")
        draws = {name: posterior[name].values.astype(float).tolist() for name in names}
        draws["true edges"] = posterior["edge"].sum("pair").values.astype(float).tolist()
        return {"draws": draws, "diverging": float(result.tree["sample_stats"]["diverging"].mean())}


def run_ranks(options: argparse.Namespace) -> None:
    until = time.monotonic() + 60 * options.minutes
    rows = []
    for name, deletion, number in (
        ("the prior of the simulation", (2.0, 4.0), options.replicates),
        ("control: deletion ~ Beta(6, 2)", (6.0, 2.0), options.controls),
    ):
        if not number:
            continue
        ranks = Ranks(options.nodes, deletion, options, until)
        try:
            found = sbc(ranks.simulate, ranks.infer, num_replicates=number, num_draws=99, seed=options.seed)
        except common.OutOfTime:
            print(f"{name}: out of time; run again to go on", flush=True)
            continue
        print(found, flush=True)
        table = found.table
        for variable in table.index:
            low = [float(p[variable].min()) for p in (found.ks, found.chi_square)]
            row = {"prior of the model": name, "data sets": number, "quantity": str(variable)}
            row |= {"lowest KS p": low[0], "lowest chi-square p": low[1], "limit": found.limit}
            row |= {f"{prob} intervals hold": float(table.loc[variable, prob]) for prob in ("50%", "90%", "95%")}
            rows.append({**row, "uniform": "yes" if table.loc[variable, "ok"] else "NO"})
    if rows:
        common.report("noisy_edges_sbc", rows, **vars(options))


# -- labels on four nodes ---------------------------------------------------------------------------------------------


def run_labels(options: argparse.Namespace) -> None:
    enumerate_labels(options)
    compare_labels(options)


def enumerate_labels(options: argparse.Namespace) -> None:
    """Edge probabilities of four nodes against all graphs."""
    data = xr.Dataset(
        {
            "x": (("node", "feature"), np.array([[1.5, 0.0], [-0.2, 0.3], [0.2, -0.3], [-1.5, 0.0]])),
            "y": ("node", [0, 1, 1, 1]),
            "source": ("edge", [0, 1, 2]),
            "target": ("edge", [1, 2, 3]),
        }
    )
    settings: dict[str, Any] = {"similarity": ["inner"], "expected_degree": 2.0}
    plain = run_mcmc(make_problem(data, **settings), num_chains=32, warmup_steps=200, num_samples=400, progress=False)
    chance = torch.as_tensor(plain.posterior["edge_probability"].values).flatten(0, 1).unsqueeze(1)
    every = torch.tensor(list(itertools.product([0.0, 1.0], repeat=6)))
    rows = []
    for strength, estimator in itertools.product((1.0, 2.0), ("disarm", "concrete", "identity")):
        problem = make_problem(data, labels=True, hidden=2, estimator=estimator, **settings)
        weights = {"weight_in": torch.tensor([[3.0, 0.0], [-3.0, 0.0]])}
        weights["weight_out"] = strength * torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
        fit = label_fit(problem.args[0], weights, every).exp()
        joint = torch.where(every == 1, chance, 1 - chance).prod(-1) * fit
        exact = (joint.sum(0) @ every / joint.sum()).numpy()
        off = []
        for seed in range(options.seeds):
            given = replace(
                problem,
                model=poutine.condition(problem.model, weights),
                guide=poutine.block(poutine.condition(problem.guide, weights), hide=list(weights)),
            )
            result = fit_svi(
                given, num_steps=2000, lr=0.03, lr_decay=0.05, num_samples=10_000, seed=seed, progress=False
            )
            off.append(float(np.abs(result.posterior["edge"].mean(("chain", "draw")).values - exact).max()))
        moved = float(np.abs(exact - chance.mean((0, 1)).numpy()).max())
        row = {"logits of the network": f"x {strength:g}", "labels move an edge by": moved, "derivatives": estimator}
        rows.append({**row, "farthest edge off": common.interval(off), "seeds": options.seeds})
        print(rows[-1], flush=True)
    common.report("noisy_edges_labels", rows, **vars(options))


def classify(nodes: int, seed: int, estimator: str) -> dict[str, Any]:
    """Figures of one fit with labels of a fifth of the nodes, or without."""
    data = simulate_csbm(nodes, deleted=0.25, added=0.25, signal=2.0, train=nodes // 5, seed=seed)
    with_labels = {} if estimator == "no labels" else {"labels": True, "estimator": estimator}
    problem = make_problem(data, similarity=["inner"], all_pairs=True, **with_labels)
    result = fit_svi(problem, num_steps=1500, lr=0.03, lr_decay=0.05, num_samples=300, seed=seed, progress=False)
    u, v = np.triu_indices(nodes, 1)
    true = np.isin(u * nodes + v, data["true_source"].values * nodes + data["true_target"].values)
    edge = result.posterior["edge"].mean(("chain", "draw")).values
    order = np.argsort((problem.args[0].edges.source * nodes + problem.args[0].edges.target).numpy())
    found = {"auroc": roc_auc_score(true, edge[order]), "edges": float(result.posterior["num_edges"].mean())}
    found["true edges"] = float(true.sum())
    found["bound"] = float(result.tree["sample_stats"]["log_weight"].mean())
    if with_labels:
        chance = result.posterior["class_probability"].mean(("chain", "draw")).values
        found["accuracy"] = float((chance.argmax(1) == data["y"].values)[data["split"].values == "test"].mean())
    return found


def compare_labels(options: argparse.Namespace) -> None:
    """Estimators on larger graphs, by their bound."""
    rows = []
    for estimator in ("no labels", "disarm", "concrete", "identity"):
        found = []
        for seed in range(options.seeds):
            key = {"part": "labels", "nodes": options.nodes, "seed": seed, "estimator": estimator}
            found.append(cell(np.inf, partial(classify, options.nodes, seed, estimator), **key))
        row = {"derivatives": estimator, "graphs": len(found), "bound": common.interval(x["bound"] for x in found)}
        row["accuracy"] = common.interval(x["accuracy"] for x in found) if "accuracy" in found[0] else ""
        row |= {
            "AUROC": common.interval(x["auroc"] for x in found),
            "edges": common.interval(x["edges"] for x in found),
        }
        row |= {
            "true edges": common.interval(x["true edges"] for x in found),
            "CPU s": f"{np.mean([x['cpu'] for x in found]):.0f}",
        }
        rows.append(row)
        print(row, flush=True)
    common.report("noisy_edges_estimators", rows, **vars(options))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recovery = commands.add_parser("recovery", help="edges of contextual block models")
    recovery.add_argument("--nodes", type=int, default=120)
    recovery.add_argument("--seeds", type=int, default=5)
    recovery.add_argument(
        "--steps", type=int, default=200, help="of warm-up; half as many draws, ten times the guide's"
    )
    recovery.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    ranks = commands.add_parser("sbc", help="ranks of rates")
    ranks.add_argument("--nodes", type=int, default=30)
    ranks.add_argument("--replicates", type=int, default=200)
    ranks.add_argument("--controls", type=int, default=40)
    ranks.add_argument("--steps", type=int, default=200)
    ranks.add_argument("--seed", type=int, default=0)
    labels = commands.add_parser("labels", help="estimators against enumeration")
    labels.add_argument("--seeds", type=int, default=5)
    labels.add_argument("--nodes", type=int, default=120, help="of the larger graphs")
    for one in (recovery, ranks):
        one.add_argument("--minutes", type=float, default=600.0)
    options = parser.parse_args()
    {"recovery": run_recovery, "sbc": run_ranks, "labels": run_labels}[options.command](options)


if __name__ == "__main__":
    main()
