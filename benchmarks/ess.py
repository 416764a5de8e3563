"""Effective draws per CPU second (k = 5, SNR 10) against the published sampler.

The chain of the published conditionals is run by the fast port, which draws from the same distributions as the plain
one; a sweep of the plain port, with all the work of the published software, is timed beside it. Each seed simulates a
field, runs both samplers from it and forms the ratios; the table gives the median and the range over seeds. Bulk
effective sample sizes are of one chain. A chain with few effective draws has not converged, and their number is no
estimate: where the published one has fewer than 30 in any seed, no ratio is given.

The standard deviations of the leading modes tell the same: a chain that does not rotate modes within their span reports
too narrow a posterior.
"""

from __future__ import annotations

import common  # isort: skip  (pins threads before numpy is loaded)

import argparse
from collections.abc import Mapping

import numpy as np

FEWEST = 30  # effective draws, below which a chain gives no figure

Run = dict[str, dict[str, float]]


def compare(seed: int, options: argparse.Namespace) -> tuple[Run, Run, dict[str, float]]:
    """Effective draws and facts about the chains by sampler, and CPU seconds of a draw, the plain port's included."""
    field = common.paper_example(seed) if options.size == 100 else common.growing_domain(options.size, seed)
    reference = field.reference()

    def error(frame: common.Array) -> float:
        return float(np.sqrt(((frame - field.U * np.sign((frame * field.U).sum(0))) ** 2).mean()))

    plain = common.published(field)
    common.warm_up(plain, 2, seed)
    cost = {"published": common.seconds_per_sweep(plain.kernel, max(1, 2000 // options.size))}
    sizes: Run = {}
    facts: Run = {}
    for name, sampler, num_warmup, num_draws in (
        ("fast", common.published(field, fast=True), options.port_warmup, options.port_draws),
        ("ours", common.block_gibbs(field), options.warmup, options.draws),
    ):
        common.warm_up(sampler, num_warmup, seed)
        raw, seconds = common.draw(sampler, num_draws)
        cost[name] = seconds / num_draws
        aligned = common.align(raw, reference)
        sizes[name] = common.effective_sample_sizes(aligned, reference)
        facts[name] = {
            "CPU ms per sweep": 1e3 * seconds / num_draws,
            "mean sd of entries of u1, u2": float(aligned["U"][:, :, :2].std(0).mean()),
            "RMSE of U over that of the plain SVD": error(aligned["U"].mean(0)) / error(reference[0]),
            "mean d5": float(aligned["d"][:, -1].mean()),
        }
    return sizes, facts, cost


def row(key: str, runs: list[tuple[Run, Run, dict[str, float]]], draws: Mapping[str, int]) -> dict[str, str]:
    """Effective draws of a quantity, and how many times as many ours has per second unless the peer has too few."""
    sizes = {name: np.array([found[name][key] for found, _, _ in runs]) for name in draws}
    per_draw = {name: size / draws[name] for name, size in sizes.items()}
    out = {"effective draws per CPU second of": key}
    for name in ("fast", "published"):
        cost = np.array([seconds[name] / seconds["ours"] for _, _, seconds in runs])
        few = sizes["fast"].min() < FEWEST
        ratio = per_draw["ours"] / per_draw["fast"] * cost
        out[f"ours / {name}"] = f"peer: fewer than {FEWEST} effective draws" if few else common.spread(ratio)
    return out | {f"effective draws, {name}": common.spread(size) for name, size in sizes.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=100, help="n = m")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--draws", type=int, default=4000)
    parser.add_argument("--warmup", type=int, default=1000)
    parser.add_argument("--port-draws", type=int, default=10_000)
    parser.add_argument("--port-warmup", type=int, default=2000)
    options = parser.parse_args()
    common.compile_samplers()
    runs = []
    for seed in options.seeds:
        runs.append(compare(seed, options))
        print(f"seed {seed} done", flush=True)
    draws = {"fast": options.port_draws, "ours": options.draws}
    common.report("ess", [row(key, runs, draws) for key in runs[0][0]["ours"]], **vars(options))
    facts = [
        {"fact": key} | {name: common.spread([found[name][key] for _, found, _ in runs]) for name in draws}
        for key in runs[0][1]["ours"]
    ]
    print(common.table(facts))


if __name__ == "__main__":
    main()
