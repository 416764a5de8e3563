"""Effective draws per CPU second on the paper's example (n = m = 100, k = 5, SNR 10) against the published sampler.

Each seed simulates a field, runs both samplers from it and forms the ratios; the table gives the median and the range
over seeds. Bulk effective sample sizes are of one chain. Where the published sampler has a handful of effective draws
its chain has not converged and the ratio is a lower bound of an order of magnitude rather than a number. The
standard deviations of the leading modes tell the same: a chain that does not rotate modes within their span reports too
narrow a posterior.
"""

from __future__ import annotations

import common  # isort: skip  (pins threads before numpy is loaded)

import argparse

import numpy as np

Run = dict[str, dict[str, float]]


def compare(seed: int, draws: int, warmup: int, port_draws: int, port_warmup: int) -> tuple[Run, Run, Run]:
    """Effective draws, the same per CPU second, and facts about the chains, for both samplers."""
    field = common.paper_example(seed)
    reference = field.reference()

    def error(frame: common.Array) -> float:
        return float(np.sqrt(((frame - field.U * np.sign((frame * field.U).sum(0))) ** 2).mean()))

    lean = common.published(field, bessel=False, redundant=False)  # the same draws at the least cost
    common.warm_up(lean, 10, seed)
    lean_seconds = common.seconds_per_sweep(lean.kernel, 100)
    sizes: Run = {}
    rates: Run = {}
    facts: Run = {}
    for name, sampler, num_warmup, num_draws in (
        ("published", common.published(field), port_warmup, port_draws),
        ("ours", common.block_gibbs(field), warmup, draws),
    ):
        common.warm_up(sampler, num_warmup, seed)
        raw, seconds = common.draw(sampler, num_draws)
        aligned = common.align(raw, reference)
        sizes[name] = common.effective_sample_sizes(aligned, reference)
        rates[name] = {key: value / seconds for key, value in sizes[name].items()}
        rates["lean"] = {key: value / lean_seconds / port_draws for key, value in sizes["published"].items()}
        facts[name] = {
            "CPU ms per sweep": 1e3 * seconds / num_draws,
            "mean sd of entries of u1, u2": float(aligned["U"][:, :, :2].std(0).mean()),
            "RMSE of U over that of the plain SVD": error(aligned["U"].mean(0)) / error(reference[0]),
            "mean d5": float(aligned["d"][:, -1].mean()),
        }
    return sizes, rates, facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--draws", type=int, default=4000)
    parser.add_argument("--warmup", type=int, default=1000)
    parser.add_argument("--port-draws", type=int, default=1500)
    parser.add_argument("--port-warmup", type=int, default=500)
    options = parser.parse_args()
    common.compile_samplers()
    runs = []
    for seed in options.seeds:
        runs.append(compare(seed, options.draws, options.warmup, options.port_draws, options.port_warmup))
        print(f"seed {seed} done", flush=True)
    rows = []
    for part, label in ((1, "effective draws per CPU second: "), (2, "")):
        for key in runs[0][part]["ours"]:
            ours, port = (np.array([run[part][name][key] for run in runs]) for name in ("ours", "published"))
            row = {
                "quantity": label + key,
                "published": common.spread(port),
                "ours": common.spread(ours),
                "ours / published": common.spread(ours / port),
                "ours / lean": "",
            }
            if part == 1:
                row["ours / lean"] = common.spread(ours / np.array([run[part]["lean"][key] for run in runs]))
            for name in ("published", "ours"):
                sizes = [run[0][name][key] for run in runs] if part == 1 else []
                row[f"effective draws, {name}"] = common.spread(sizes) if sizes else ""
            rows.append(row)
    common.report("ess", rows, **vars(options))


if __name__ == "__main__":
    main()
