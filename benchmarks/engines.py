"""Every claim on the engines in one table: speed against peers, exactness, calibration, memory, faults.

    python benchmarks/engines.py                      # all parts
    python benchmarks/engines.py speed cold           # some of them
    python benchmarks/engines.py --python PATH        # interpreter that has numpyro, blackjax and nutpie

Parts: ``speed`` (effective draws per CPU second, start included), ``cold`` (CPU and wall seconds from a cold process
to 400 effective draws), ``reference`` (posteriors with known summaries), ``svi``, ``calibration``, ``memory``
and ``faults``, which are scripts of their own in this folder. Every sampler runs in a process of its own, pinned to
one core and one thread; `peers` says how its time is taken. Chains, warm-up and draws stand in the tables.
"""

from __future__ import annotations

import common  # isort: skip  -- pins threads before numpy is imported

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import peers

# Model, chains of ours, peers with their chains: NUTS of Pyro takes its chains one after the other, so that its
# effective draws per second do not depend on their number.
SPEED: tuple[tuple[str, int, tuple[tuple[str, int], ...]], ...] = (
    ("eight_schools", 64, (("pyro", 4), ("numpyro", 4), ("numpyro", 64), ("blackjax", 64), ("nutpie", 4))),
    ("gaussian", 64, (("pyro", 4), ("numpyro", 4), ("numpyro", 64), ("blackjax", 64), ("nutpie", 4))),
    ("eight_schools", 4, ()),
    ("gaussian", 4, ()),
    ("logistic", 8, (("pyro", 4), ("numpyro", 4), ("numpyro", 8), ("nutpie", 4))),
)
WARMUP = {"probmodels": 300, "blackjax": 200}
COLD_PEERS = ("probmodels", "blackjax", "numpyro", "nutpie", "pyro")
SCRIPTS = {
    "reference": ["reference.py"],
    "svi": ["svi.py"],
    "calibration": ["engine_calibration.py"],
    "memory": ["memory.py"],
    "faults": ["faults.py"],
}
PARTS = ("speed", "cold", *SCRIPTS)


def speed(seeds: int, python: str | None, models: tuple[str, ...]) -> None:
    """Effective draws per CPU second, everything but the import of packages counted, and ratios to ours."""
    found: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for seed in range(seeds):
        for model, chains, others in (row for row in SPEED if row[0] in models):
            for peer, count in (("probmodels", chains), *others):
                warmup = WARMUP.get(peer, 500)
                out = _try(
                    peers.run_peer, peer, model, chains=count, warmup=warmup, draws=500, seed=seed, python=python
                )
                if out is not None:
                    found.setdefault((model, count, peer), []).append(out)
    rows = []
    for (model, chains, peer), runs in found.items():
        ours = [(c, r) for (m, c, p), r in found.items() if m == model and p == "probmodels"]
        row = {
            "model": model,
            "sampler": peer,
            "chains": chains,
            "warmup": runs[0]["warmup"],
            "draws": runs[0]["draws"],
            "ess per CPU s": common.spread([run["ess_per_cpu"] for run in runs]),
            "without compilation": common.spread([run["ess_per_cpu_run"] for run in runs]),
            "r_hat": max(run["max_r_hat"] for run in runs),
            "divergences": "/".join(str(run["divergences"]) for run in runs),
        }
        for count, mine in ours:
            ratio = np.median([r["ess_per_cpu"] for r in mine]) / np.median([r["ess_per_cpu"] for r in runs])
            row[f"ours with {count} chains ="] = f"{ratio:.3g} x"
        rows.append(row)
    for model in dict.fromkeys(row["model"] for row in rows):
        common.report(f"engines_speed_{model}", [row for row in rows if row["model"] == model], seeds=seeds)


def cold(seeds: int, python: str | None, models: tuple[str, ...]) -> None:
    """CPU and wall seconds of a whole process, imports included, to 400 effective draws in the worst dimension."""
    rows = []
    for model in models:
        for peer in COLD_PEERS:
            runs = [_try(peers.run_cold, peer, model, seed=seed, python=python) for seed in range(seeds)]
            good = [run for run in runs if run is not None]
            if good:
                rows.append(
                    {
                        "model": model,
                        "sampler": peer,
                        "chains": good[0]["chains"],
                        "warmup": good[0]["warmup"],
                        "draws": "/".join(str(run["draws"]) for run in good),
                        "CPU s": common.spread([run["cpu_total"] for run in good]),
                        "wall s": common.spread([run["wall"] for run in good]),
                        "ess": "/".join(f"{run['min_ess']:.0f}" for run in good),
                        "reached": "/".join("yes" if run["reached"] else "no" for run in good),
                    }
                )
    common.report("engines_cold", rows, seeds=seeds)


def _try(run: Any, *args: Any, **kwargs: Any) -> dict[str, Any] | None:
    """The outcome, or None with a line on stderr where a peer is not installed or fails."""
    try:
        out: dict[str, Any] = run(*args, **kwargs)
    except peers.PeerError as error:
        print(f"{args}: {str(error).splitlines()[0]}", file=sys.stderr)
        return None
    print(f"{args} {kwargs}: {out['ess_per_cpu']:.4g} effective draws per CPU s", file=sys.stderr, flush=True)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=(*PARTS, []), help="which parts; all by default")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each cell")
    parser.add_argument("--python", help="interpreter of an environment that has the peers")
    parser.add_argument("--models", nargs="*", default=list(peers.SITES), choices=list(peers.SITES))
    options = parser.parse_args()
    for part in options.parts or PARTS:
        print(f"\n## {part}", flush=True)
        if part == "speed":
            speed(options.seeds, options.python, tuple(options.models))
        elif part == "cold":
            cold(options.seeds, options.python, tuple(options.models))
        else:
            subprocess.run([sys.executable, str(Path(__file__).with_name(SCRIPTS[part][0]))], check=True)


if __name__ == "__main__":
    main()
