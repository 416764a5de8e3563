"""Grammar induction: policies of trees against exact sums over trees.

    python benchmarks/grammar.py posterior
    python benchmarks/grammar.py induction
    python benchmarks/grammar.py parents
    python benchmarks/grammar.py treebank --root DATA

``posterior``
    Of a fixed random grammar, of either kind of rules: total variation between policy and posterior over all trees,
    exact, with both enumerated, for sentences of 3 to 6 words; the gap of the bound on the log likelihood.
``induction``
    Sentences of a small English, up to 11 words: negative log likelihood per word of other sentences, exact by the
    inside algorithm, of grammars learned by EM with the policy, with and without tempered rewards, and with trees
    summed out; unlabelled F1 of the least-risk trees of the policy, and of exact draws of trees of each grammar.
``parents``
    Sentences of a grammar whose rules depend on parents: the same of both kinds of grammars, with as many labels; and
    of steps at exact draws of trees, by which errors of the policy are told from those of draws.
``treebank``
    The same of the questions of English-ATIS up to 10 words, as Universal Dependencies has them: ``--root`` holds
    en_atis-ud-train.conllu and en_atis-ud-test.conllu. Constituents are subtrees of dependencies; right-branching trees
    are the baseline, and the best binary trees for them the ceiling.

A cell is one fit; see `common.cell`. Columns have the median over seeds, with the least and the largest.
"""

from __future__ import annotations

import common  # isort: skip  (pins threads before numpy is loaded)

import argparse
import time
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from pyro import poutine

from probmodels import fit_em, fit_svi
from probmodels.datasets.text import load_conllu, make_sentences, simulate_sentences
from probmodels.grammar import (
    draw_posterior_trees,
    exact_log_likelihood,
    exact_span_probabilities,
    fitted_tables,
    make_problem,
)
from probmodels.grammar.inside import draw_trees, leaf_weights, tree_log_weight
from probmodels.grammar.outputs import bracketing_metrics, branching_trees, least_risk_trees, summarise_parses
from probmodels.inference.variational.svi import fitted

EM: dict[str, Any] = {"phases": ["joint"], "lr": 0.004, "batch_size": 48, "clip_norm": 1e5, "num_samples": 20}
EXACT: dict[str, Any] = {"lr": 0.004, "lr_decay": 0.1, "batch_size": 96, "num_samples": 1}
POSTERIOR: dict[str, dict[str, Any]] = {
    # Particles run one after the other, copies of a sentence at once: many copies and few particles cost less.
    "VarGrad, large batch": {"loss": "VarGrad", "steps": 600, "copies": 64, "particles": 2, "lr": 0.01},
    "VarGrad, not started from the grammar": {
        "loss": "VarGrad",
        "steps": 600,
        "copies": 64,
        "particles": 2,
        "lr": 0.01,
        "look_ahead": False,
    },
    "VarGrad, fewer steps": {"loss": "VarGrad", "steps": 300},
}
# Of EM for rules by parent: larger steps and batches, and the loss that comes closest to the posterior.
LARGER: dict[str, Any] = {"kind": "em by VarGrad", "steps": 400, "lr": 0.01, "batch_size": 96}
LOOKS = {"look_ahead": True}  # policies whose actions start from the grammar
TEMPERED = {"start": 0.6, "over": 0.3}
SIZES: dict[str, dict[str, Any]] = {
    "english": {"num_nonterminals": 5, "num_preterminals": 5},
    "parents": {"num_nonterminals": 4, "num_preterminals": 4},
    "treebank": {"num_nonterminals": 8, "num_preterminals": 12},
}


@lru_cache(maxsize=2)
def load(name: str, root: str | None) -> tuple[xr.Dataset, xr.Dataset]:
    """Sentences to learn from, and others."""
    if name == "treebank":
        files = [Path(root or ".") / f"en_atis-ud-{part}.conllu" for part in ("train", "test")]
        train = load_conllu(files[0], max_length=10)
        return train, load_conllu(files[1], max_length=10, vocabulary=train["vocabulary"].values.tolist())
    data = simulate_sentences(3000, grammar=name, max_length=11)
    return data.isel(sentence=slice(2500)), data.isel(sentence=slice(2500, None))


def f1(trees: Any, data: xr.Dataset) -> float:
    """Unlabelled F1 of trees with the given ones, in per cent."""
    return 100 * bracketing_metrics(np.asarray(trees), data["gold"].values, data["length"].values)["f1"]


def judged(problem: Any, result: Any, test: xr.Dataset) -> dict[str, float]:
    """Figures of the grammar on other sentences."""
    chance = exact_span_probabilities(problem, result, test).values
    return {
        "nll": -float(exact_log_likelihood(problem, result, test).sum() / test["length"].sum()),
        "f1 drawn": f1(draw_posterior_trees(problem, result, test), test),
        "f1 least risk": f1(least_risk_trees(chance, test["length"].values), test),
    }


def learned(
    name: str,
    root: str | None,
    seed: int,
    kind: str,
    steps: int,
    parents: bool,
    power: Any = 1.0,
    look_ahead: bool = True,
    **changed: Any,
) -> dict[str, float]:
    """Fit a grammar by EM, or with trees marginalised; ``changed`` are options of `fit_em` that differ."""
    train, test = load(name, root)
    if kind == "exact draws":
        return judged(by_exact_draws(train, seed, steps, parents, **SIZES[name]), None, test)
    exact = kind == "exact"
    varied: dict[str, Any] = {"loss": "VarGrad", "num_particles": 2} if "VarGrad" in kind else {}
    varied["look_ahead"] = look_ahead
    problem = make_problem(train, exact=exact, parents=parents, seed=seed, **varied, **SIZES[name])
    if exact:
        result = fit_svi(problem, num_steps=steps, seed=seed, progress=False, compile="eager", **EXACT)
        return judged(problem, result, test)

    def decay(step: int) -> float:
        return 0.1 ** max(0.0, (step / steps - 0.7) / 0.3)

    phases = [{"objective": "joint", "schedule": decay, "options": {"weights": "equal"}}]
    options = {
        **EM,
        "phases": phases,
        "batch_size": EM["batch_size"] // (2 if "VarGrad" in kind else 1),
        "reward_power": power,
        "compile": "eager",
        **changed,
    }
    result = fit_em(problem, num_rounds=steps, seed=seed, progress=False, **options)
    words = float(train["length"].sum())
    gap = float(exact_log_likelihood(problem, result).sum()) - float(result.tree["sample_stats"]["log_weight"].mean())
    summary = summarise_parses(result)
    policy = {"gap": gap / words, "f1 policy": 100 * summary.attrs["f1_least_risk"]}
    return {**judged(problem, result, test), **policy}


def by_exact_draws(train: xr.Dataset, seed: int, steps: int, parents: bool, **size: Any) -> Any:
    """A grammar learned from one exact posterior tree of each sentence: EM as it would be without a policy's error."""
    problem = make_problem(train, parents=parents, seed=seed, **size)
    word, length = problem.args
    model: Any = problem.model
    adam = torch.optim.Adam(model.parameters(), lr=EM["lr"])
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 0.1 ** max(0.0, (step / steps - 0.7) / 0.3))
    torch.manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(len(word), (EM["batch_size"],))
        tables, few = model.tables(), word[rows]
        leaf = leaf_weights(tables, few, few)
        with torch.no_grad():
            tree = draw_trees(tables, leaf, length[rows])
        adam.zero_grad()
        (-tree_log_weight(tables, tree, leaf, length[rows]).sum()).backward()
        adam.step()
        schedule.step()
    return make_problem(train, tables=fitted_tables(problem), learn=False)


def learn(args: argparse.Namespace, name: str, rows: dict[str, dict[str, Any]]) -> None:
    """Table of learned grammars; rows are options of `learned`."""
    lines: list[dict[str, Any]] = []
    for label, options in rows.items():
        if args.rows and label not in args.rows:
            continue
        found = []
        try:
            for seed in args.seeds:
                key = {"data": name, "seed": seed, **({} if "exact" in options["kind"] else LOOKS), **options}
                fit = EXACT if options["kind"] == "exact" else EM
                compute = partial(learned, name, args.root, seed, **options)
                found.append(common.cell("grammar", args.until, compute, **key, fit=fit, size=SIZES[name]))
                print(label, seed, found[-1], flush=True)
        except common.OutOfTime:
            print(f"{label}: out of time after {len(found)} seeds", flush=True)
        if found:
            names = ("nll", "f1 drawn", "f1 least risk", "f1 policy", "gap", "cpu")
            line = {"grammar": label, "seeds": len(found)}
            lines.append(line | {n: span([row[n] for row in found]) if n in found[0] else "" for n in names})
    _, test = load(name, args.root)
    size, length = test.sizes["position"], test["length"].values
    for label, right in (("right branching", True), ("left branching", False)):
        lines.append({"grammar": label, "f1 least risk": f"{f1(branching_trees(length, size, right=right), test):.1f}"})
    ceiling = least_risk_trees(test["gold"].values.astype(float), length)
    lines.append({"grammar": "best binary trees", "f1 least risk": f"{f1(ceiling, test):.1f}"})
    if name != "treebank":
        true = make_problem(test, learn=False)
        found_true = judged(true, None, test)
        lines.append({"grammar": "the true one", **{n: f"{value:.4g}" for n, value in found_true.items()}})
    common.report(f"grammar_{name}", lines, seeds=args.seeds, em=EM, exact=EXACT, size=SIZES[name])


def span(values: list[float]) -> str:
    """Median, least and largest."""
    return f"{np.median(values):.4g} ({min(values):.4g} to {max(values):.4g})"


def trees_of(length: int, size: int, labels: int) -> torch.Tensor:
    """All trees of a sentence, (tree, size - 1, 3)."""

    def below(start: int, end: int) -> list[dict[int, tuple[int, int, int]]]:
        if end - start == 1:
            return [{}]
        cuts = [(below(start, m), below(m, end), m) for m in range(start + 1, end)]
        joined = [(left | right, m) for lefts, rights, m in cuts for left in lefts for right in rights]
        return [{**nodes, m - 1: (label, start, end)} for nodes, m in joined for label in range(labels)]

    found = below(0, length)
    trees = np.full((len(found), size - 1, 3), -1)
    for row, nodes in enumerate(found):
        for place, node in nodes.items():
            trees[row, place] = node
    return torch.as_tensor(trees)


def fixed(
    parents: bool,
    seed: int,
    loss: str,
    steps: int,
    copies: int = 8,
    particles: int | None = None,
    lr: float = 0.005,
    look_ahead: bool = True,
) -> dict[str, float]:
    """A policy of a fixed random grammar, by the posterior of all trees; ``copies`` of each sentence are a batch."""
    rng = np.random.default_rng(seed)
    words = [rng.integers(6, size=n).tolist() for n in (3, 4, 5, 6)]
    text = [[f"w{code}" for code in row] for row in words for _ in range(copies)]
    data = make_sentences(text, vocabulary=[f"w{code}" for code in range(6)])
    options: dict[str, Any] = {"num_nonterminals": 2, "num_preterminals": 3, "parents": parents, "seed": seed}
    tables = fitted_tables(make_problem(data, **options))
    options = {"loss": loss, "num_particles": particles, "epsilon": 0.01, "look_ahead": look_ahead}
    problem = make_problem(data, tables=tables, learn=False, **options)
    settings: dict[str, Any] = {"lr": lr, "lr_decay": 0.02, "num_samples": 800 // copies}
    result = fit_svi(problem, num_steps=steps, seed=seed, compile="eager", progress=False, **settings)
    gap = float(exact_log_likelihood(problem).sum()) - float(result.tree["sample_stats"]["log_weight"].mean())
    word, length = problem.args
    found = {}
    with fitted(problem, result.guide_state, seed=0) as (_, guide), torch.no_grad():
        for row in range(0, len(text), copies):
            every = trees_of(int(length[row]), 6, 2)
            leaf = leaf_weights(tables, word[row], word[row])
            chance = tree_log_weight(tables, every, leaf, length[row]).softmax(0)
            distance = (probabilities(guide, word[row], int(length[row]), every) - chance).abs().sum() / 2
            found[f"TV, {int(length[row])} words"] = float(distance)
    return {**found, "gap per word": gap / float(length.sum())}


def probabilities(guide: Any, word: torch.Tensor, length: int, trees: torch.Tensor, labels: int = 2) -> torch.Tensor:
    """Probabilities that a policy gives to trees: sums over all paths."""
    size = len(word)
    steps = [torch.arange((length - 1 - step) * labels if step < length - 1 else 1) for step in range(size - 1)]
    actions = torch.cartesian_prod(*steps)
    path = poutine.Trace()
    for step, action in enumerate(actions.unbind(-1)):
        node: Any = {"type": "sample", "is_observed": False, "infer": {"is_auxiliary": True}, "value": action}
        path.add_node(f"merge_{step}", name=f"merge_{step}", **node)
    rows = len(actions)
    replayed = poutine.replay(guide, trace=path)
    trace: Any = poutine.trace(replayed).get_trace(word.expand(rows, -1), torch.tensor(length).expand(rows))
    trace.compute_log_prob()
    log_q = torch.stack([trace.nodes[f"merge_{step}"]["log_prob"] for step in range(size - 1)]).sum(0)
    code = _codes(trees)
    order = code.argsort()
    place = order[torch.searchsorted(code[order], _codes(trace.nodes["tree"]["value"]))]
    return torch.zeros(len(trees)).index_add(0, place, log_q.exp())


def _codes(trees: torch.Tensor) -> torch.Tensor:
    """A number for each tree."""
    flat = trees.flatten(1) + 1
    return (flat * 8 ** torch.arange(flat.shape[1])).sum(1)


def posterior(args: argparse.Namespace) -> None:
    """Table of policies of fixed grammars."""
    lines = []
    for label, options in POSTERIOR.items():
        if args.rows and label not in args.rows:
            continue
        for parents in (True, False):
            found = []
            try:
                for seed in args.seeds:
                    compute: Callable[[], Any] = partial(fixed, parents, seed, **options)
                    key = {"part": "posterior", "parents": parents, "seed": seed, **LOOKS, **options}
                    found.append(common.cell("grammar", args.until, compute, **key))
                    print(found[-1], flush=True)
            except common.OutOfTime:
                print(f"{label}: out of time after {len(found)} seeds", flush=True)
            if found:
                names = [name for name in found[0] if name != "key"]
                line = {
                    "rules by parent": str(parents),
                    "policy": label,
                    "steps": options["steps"],
                    "seeds": len(found),
                }
                lines.append(line | {name: span([row[name] for row in found]) for name in names})
    common.report("grammar_posterior", lines, seeds=args.seeds)


def main() -> None:
    """Run the parts that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("posterior", "induction", "parents", "treebank"))
    parser.add_argument("--root", help="folder with English-ATIS of Universal Dependencies")
    parser.add_argument("--seeds", nargs="*", type=int, default=list(range(5)))
    parser.add_argument("--steps", type=int, default=800, help="of learning")
    parser.add_argument("--rows", nargs="*", help="of the table, by name; all by default")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no cell after these")
    args = parser.parse_args()
    args.until = time.monotonic() + 60 * args.minutes
    em: dict[str, Any] = {"kind": "em", "steps": args.steps, "power": 1.0}
    blind = {**em, "look_ahead": False}
    exact = {"kind": "exact", "steps": args.steps}
    if args.part == "posterior":
        posterior(args)
    elif args.part == "induction":
        rows = {
            "trees marginalised": {**exact, "parents": False},
            "EM": {**em, "parents": False},
            "EM, VarGrad": {**em, "kind": "em by VarGrad", "parents": False},
            "EM, tempered": {**em, "power": TEMPERED, "parents": False},
            "EM, policy not started from the grammar": {**blind, "parents": False},
        }
        learn(args, "english", rows)
    elif args.part == "parents":
        rows = {
            "context-free, trees marginalised": {**exact, "parents": False},
            "rules by parent, trees marginalised": {**exact, "parents": True},
            "rules by parent, trees drawn exactly": {"kind": "exact draws", "steps": 500, "parents": True},
            "context-free, EM": {**em, "parents": False},
            "rules by parent, EM": {**em, "parents": True},
            "rules by parent, EM, VarGrad": {**em, **LARGER, "parents": True},
            "rules by parent, EM, policy not started from the grammar": {**blind, "parents": True},
        }
        learn(args, "parents", rows)
    else:
        if not args.root:
            parser.error("treebank needs --root, the folder with English-ATIS of Universal Dependencies")
        rows = {
            "trees marginalised": {**exact, "parents": False},
            "trees drawn exactly": {"kind": "exact draws", "steps": args.steps, "parents": False},
            "EM": {**em, "parents": False},
            "EM, tempered": {**em, "power": {"start": 0.5, "over": 0.5}, "parents": False},
            "EM, policy not started from the grammar": {**blind, "parents": False},
        }
        learn(args, "treebank", rows)


if __name__ == "__main__":
    main()
