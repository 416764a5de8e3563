"""Coverage of intervals of average effects, in random structural equation models whose effects are known.

    python benchmarks/causal_effects.py
    python benchmarks/causal_effects.py --rows linear --graphs posterior

200 data sets of 200 rows of 5 concepts each, Erdos-Renyi graphs of 2 edges a concept, labels standardised. The effect
of setting a concept with most descendants from 0 to 1, the mean and one standard deviation, on each of these; truths in
closed form for linear models, else by 100,000 rows. ``known`` takes the true graph; ``posterior`` draws of that of
`probmodels.causal_graph`, all graphs being equally probable before, and covers what is not identified. Coverage is that
of 95 % intervals: of one effect chosen at random in each data set, with its binomial 95 % interval, and of all effects.
"""

from __future__ import annotations

import common  # isort: skip  (pins threads before numpy is loaded)

import argparse
import time
from functools import partial
from typing import Any

import numpy as np
from scipy.stats import binomtest

from probmodels.causal_graph.effects import average_effect
from probmodels.datasets.sem import average_effects, sem_of, simulate_sem

ROWS: dict[str, dict[str, Any]] = {
    "linear": {"mechanism": "linear"},
    "linear, Laplace noise": {"mechanism": "linear", "noise": "laplace"},
    "smooth": {"mechanism": "additive"},
}
NUM_NODES, NUM_ROWS = 5, 200
DEGREE = 2.0
SHARE = DEGREE / (NUM_NODES - 1)  # of pairs with an edge; as odds of each edge all graphs are equally probable
NUM_DRAWS = {"linear": 2000, "smooth": 400}


def functions_of(options: dict[str, Any]) -> str:
    """Name of the kind of functions that the data are simulated with."""
    return "linear" if options["mechanism"] == "linear" else "smooth"


def effects_cell(options: dict[str, Any], graphs: str, seed: int) -> dict[str, Any]:
    """Coverage and width of intervals in one data set."""
    functions = functions_of(options)
    draws = NUM_DRAWS[functions]
    data = simulate_sem(NUM_NODES, NUM_ROWS, graph="er", degree=DEGREE, **options, seed=seed)
    names, edges = [str(name) for name in data["concept"].values], data["graph"].values
    reach = np.linalg.matrix_power(np.eye(NUM_NODES) + edges, NUM_NODES) - np.eye(NUM_NODES) > 0.5
    treatment = int(reach.sum(1).argmax())
    outcomes = [names[j] for j in np.flatnonzero(reach[treatment])]
    if not outcomes:
        return {"covered": [], "width": []}
    exact = average_effects(sem_of(data), 0.0, 1.0)
    truth = next(iter(exact.data_vars.values())).sel(cause=names[treatment], effect=outcomes).values
    taken: Any = edges
    if graphs == "posterior":
        from probmodels import run_mcmc
        from probmodels.causal_graph import model as causal_graph

        problem = causal_graph.make_problem(data, edge_probability=SHARE)
        chain: dict[str, Any] = {"num_chains": 1, "warmup_steps": 0, "chain_method": "sequential", "progress": False}
        result = run_mcmc(problem, num_samples=draws, seed=seed, **chain)
        taken = result.posterior["graph"].values[0].astype(int)
    found = average_effect(
        data,
        taken,
        names[treatment],
        (0.0, 1.0),
        outcomes=outcomes,
        functions=functions,
        num_draws=draws,
        seed=seed,
    )
    covered = (truth >= found["low"].values) & (truth <= found["high"].values)
    return {"covered": covered.tolist(), "width": (found["high"] - found["low"]).values.tolist()}


def main() -> None:
    """Run all rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="*", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--graphs", choices=("known", "posterior"), default="known")
    parser.add_argument("--sets", type=int, default=200, help="data sets")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no cell after these")
    args = parser.parse_args()
    until, table = time.monotonic() + 60 * args.minutes, []
    for name in args.rows:
        options, cells = ROWS[name], []
        for seed in range(args.sets):
            key = {
                "row": name,
                "graphs": args.graphs,
                "seed": seed,
                "draws": NUM_DRAWS[functions_of(options)],
                "rows": NUM_ROWS,
                **({"share": SHARE} if args.graphs == "posterior" else {}),
                **options,
            }
            compute = partial(effects_cell, options, args.graphs, seed)
            try:
                cells.append(common.cell("causal_effects", until, compute, **key))
            except common.OutOfTime:
                break
        rng = np.random.default_rng(0)
        one = [rng.choice(cell["covered"]) for cell in cells if cell["covered"]]
        ends = binomtest(int(sum(one)), len(one)).proportion_ci()
        table.append(
            {
                "model": name,
                "graph": args.graphs,
                "data sets": len(one),
                "one effect of each": f"{np.mean(one):.3f} ({ends.low:.3f} to {ends.high:.3f})",
                "all effects": f"{np.mean(np.concatenate([cell['covered'] for cell in cells])):.3f}",
                "mean width": f"{np.mean(np.concatenate([cell['width'] for cell in cells])):.2f}",
                "CPU s": common.spread([cell["cpu"] for cell in cells]),
            }
        )
        print(table[-1], flush=True)
    common.report(f"causal_effects_{args.graphs}", table, num_nodes=NUM_NODES, num_rows=NUM_ROWS, num_draws=NUM_DRAWS)


if __name__ == "__main__":
    main()
