"""Structures of Bayesian networks: how far the fitted guide is from the exact posterior over all graphs.

    python benchmarks/bayesian_network.py [--seeds 5] [--minutes 60]

Networks of 4 and 5 variables, of which all 543 and 29,281 graphs are listed. A seed makes graph, effects and data, and
starts guide and fit. For each row of the table: total variation between the guide's density and the posterior, without
draws; R^2 and the largest error of the probabilities of edges; KL(q || p), which is the error of the bound on the log
evidence; how many graphs share the posterior, the exponential of its entropy; CPU seconds of the fit. Means with 95 %
intervals over seeds, medians with ranges of CPU seconds. Cells that were measured are kept in results/.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from typing import Any

import common
import numpy as np
import torch

from probmodels import fit_svi
from probmodels.bayesian_network import make_problem
from probmodels.bayesian_network.graphs import all_graphs
from probmodels.datasets import load
from probmodels.guides.bayesian_network import GraphPolicy
from probmodels.inference.programs.programs import fitted

CASES: list[dict[str, Any]] = [
    {"score": "bge", "variables": 4, "samples": 100},
    {"score": "bge", "variables": 5, "samples": 100},
    {"score": "bge", "variables": 5, "samples": 1000},
    {"score": "bdeu", "variables": 5, "samples": 500},
]
FIT: dict[str, Any] = {"num_steps": 1500, "lr": 0.02, "schedule": "cosine", "clip_norm": 5.0}
ANNEAL = 700


def compute(score: str, variables: int, samples: int, seed: int) -> dict[str, Any]:
    """A fit, judged at every graph."""
    if score == "bge":
        data = load("gaussian_network", num_variables=variables, num_samples=samples, seed=seed)
    else:
        data = load("discrete_network", num_variables=variables, num_samples=samples, concentration=2.0, seed=seed)
    problem = make_problem(data, score=score, anneal=ANNEAL, seed=seed)
    start = time.process_time()
    result = fit_svi(problem, num_samples=1000, seed=seed, progress=False, **FIT)
    seconds = time.process_time() - start
    graphs = all_graphs(variables)
    programs: Any
    with fitted(problem, result.guide_state or {}, seed=0) as programs, torch.no_grad():
        model, guide = programs
        log_q = torch.cat([GraphPolicy(guide).log_prob(block) for block in graphs.split(2048)]).double()
        log_p = model.log_likelihood(graphs).double().log_softmax(0)
    p, q = log_p.exp(), log_q.exp()
    edges = torch.stack([torch.einsum("g,gab->ab", weight, graphs.double()) for weight in (p, q)])
    exact, found = edges[:, ~torch.eye(variables, dtype=torch.bool)]
    return {
        "tv": float((p - q).abs().sum() / 2),
        "kl": float((q * (log_q - log_p).where(q > 0, 0.0)).sum()),
        "r2": 1 - float((found - exact).square().sum() / (exact - exact.mean()).square().sum()),
        "edge": float((found - exact).abs().max()),
        "graphs": float(torch.exp(-(p * log_p.where(p > 0, 0.0)).sum())),
        "passed": bool(result.diagnose().ok),
        "fit": seconds,
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=np.inf, help="start no cell after these")
    options = parser.parse_args()
    until, lines = time.monotonic() + 60 * options.minutes, []
    for case in CASES:
        rows = []
        for seed in range(options.seeds):
            try:
                rows.append(
                    common.cell("bayesian_network", until, partial(compute, **case, seed=seed), **case, seed=seed)
                )
            except common.OutOfTime:
                break
            print(case, seed, {name: rows[-1][name] for name in ("tv", "r2", "edge", "fit")}, flush=True)
        if not rows:
            continue
        line: dict[str, Any] = {**case, "seeds": len(rows)}
        line["graphs in the posterior"] = common.spread([row["graphs"] for row in rows])
        for title, name in (("TV", "tv"), ("KL(q || p)", "kl")):
            line[title] = common.interval(row[name] for row in rows)
        line["largest TV"] = max(row["tv"] for row in rows)
        line["R^2 of edges"] = common.interval((row["r2"] for row in rows), digits=4)
        line["smallest R^2"] = f"{min(row['r2'] for row in rows):.4f}"
        line["largest error of an edge"] = max(row["edge"] for row in rows)
        line["diagnostics passed"] = f"{sum(row['passed'] for row in rows)} of {len(rows)}"
        lines.append(line | {"CPU s of the fit": common.spread([row["fit"] for row in rows])})
    common.report("bayesian_network", lines, **FIT, anneal=ANNEAL)


if __name__ == "__main__":
    main()
