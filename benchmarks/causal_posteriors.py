"""Causal autoencoders of simulated tables against exact posteriors of their concepts and regressions of their labels.

    python benchmarks/causal_posteriors.py tables
    python benchmarks/causal_posteriors.py effects

``tables``
    A cause a ~ N(0, 1), its effect b = g(a) + own noise, both seen with normal noise, all training rows labelled. Of
    1,000 new rows without labels: the sd of b given the observation over the exact one, the root mean squared error of
    its mean over that of the exact mean, and the shares of true concepts and of true counterfactuals (b, had a been 1)
    in 90 % intervals, a and b the worse of the two. The exact posterior: in closed form of ``linear``, by 200,000
    weighted draws from the prior for each of 300 rows of the curved ones. The effect on b of a set to 1 instead of -1,
    less that of least squares on the labels in standard errors (``linear``), or less the truth in sds of the interval
    (curved); and the verdict. ``forced`` is the same with the sd of all that is read forced to 0.02.
``effects``
    Coverage of 95 % intervals of effects given the labels: mechanisms of random linear chains a -> b -> c, a -> c,
    fitted by least squares, and curved ones of pairs, networks fitted by 600 steps.

Intervals are Student's over seeds, of shares binomial by Wilson.
"""

from __future__ import annotations

import common  # isort: skip  (pins threads before numpy is loaded)

import argparse
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import binomtest

from probmodels import Problem, Result, diagnose, fit_svi
from probmodels.causal_vae import counterfactual, effect, make_problem
from probmodels.causal_vae.mechanism_draws import MechanismDraws
from probmodels.datasets.causal import make_concepts
from probmodels.guides.causal_vae import AbductionGuide, Mechanisms, Proposal

Array = NDArray[np.float64]
Curve = Callable[[Array], Array]

CURVES: dict[str, Curve] = {
    "linear": lambda a: 0.8 * a,
    "tanh": lambda a: 1.5 * np.tanh(1.5 * a),
    "sine": lambda a: np.sin(2 * a),
}
CASES: dict[str, dict[str, Any]] = {
    "linear": {"own": 0.6, "noise": 1.0, "rows": 1200},
    "tanh": {"own": 0.4, "noise": 0.7, "rows": 3000},
    "sine": {"own": 0.4, "noise": 0.7, "rows": 3000},
}
FITS: dict[str, dict[str, Any]] = {
    "linear": {"num_steps": 450, "lr": 0.02, "batch_size": 200},
    "curved": {"num_steps": 1000, "lr": 0.005, "batch_size": 200},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "linear": {"mechanism": "linear", "hidden": 16},
    "curved": {"mechanism": "additive", "hidden": 64},
}
NEW, EXACT, PRIOR_DRAWS = 1000, 300, 200_000


# -- tables -----------------------------------------------------------------------------------------------------------


def table_cell(case: str, seed: int, *, forced: bool = False) -> dict[str, float]:
    """Figures of one fit."""
    curve, own, noise, rows = CURVES[case], *(CASES[case][key] for key in ("own", "noise", "rows"))
    kind = "linear" if case == "linear" else "curved"
    rng = np.random.default_rng(seed)
    a = rng.normal(size=rows + NEW)
    z = np.stack([a, curve(a) + own * rng.normal(size=len(a))], 1)
    x = z + noise * rng.normal(size=z.shape)
    split = np.where(np.arange(len(a)) < rows, "train", "test")
    data = make_concepts(x, z, names=["a", "b"], graph=[["a", "b"]], split=split)
    problem = make_problem(data, **OPTIONS[kind], seed=seed)
    result = fit_svi(problem, **FITS[kind], schedule="warmup_cosine", num_samples=2, seed=seed, progress=False)
    test = make_problem(data, **OPTIONS[kind], split="test")
    if forced:
        said = AbductionGuide.propose
        AbductionGuide.propose = _narrow(said)  # type: ignore[method-assign]
        try:
            return judged(test, result, z[rows:], x[rows:], case)
        finally:
            AbductionGuide.propose = said  # type: ignore[method-assign]
    return judged(test, result, z[rows:], x[rows:], case) | effect_errors(problem, result, z[:rows], case, seed)


def _narrow(said: Callable[..., Proposal]) -> Callable[..., Proposal]:
    def propose(self: AbductionGuide, observation: torch.Tensor, rows: Any = slice(None)) -> Proposal:
        found = said(self, observation, rows)
        return found._replace(sd=found.sd.clamp(max=0.02))

    return propose


def judged(test: Problem, result: Result, z: Array, x: Array, case: str) -> dict[str, float]:
    """What is read in new observations, against their concepts and the exact posterior."""
    curve = CURVES[case]
    found = counterfactual(test, result, {"a": 1.0}, num_draws=399, observations=False, progress=False)
    factual, other = found["factual"].values, found["counterfactual"].values[..., 1]
    wanted = curve(np.ones(1)) + z[:, 1] - curve(z[:, 0])
    exact = exact_posterior(case, x[:EXACT])
    error, exact_error = (
        np.sqrt(((mean - z[:EXACT, 1]) ** 2).mean()) for mean in (factual.mean(0)[:EXACT, 1], exact["mean"])
    )
    report = diagnose(result)
    return {
        "sd": float(factual.std(0)[:EXACT, 1].mean()),
        "sd over exact": float(factual.std(0)[:EXACT, 1].mean() / exact["sd"].mean()),
        "counterfactual sd over exact": float(other.std(0)[:EXACT].mean() / exact["other"].mean()),
        "error over exact": float(error / exact_error),
        "coverage, worst": min(inside(factual[..., k], z[:, k]) for k in (0, 1)),
        "coverage, counterfactual": inside(other, wanted),
        "passed": float(report.ok),
        "draws": exact["draws"],
    }


def inside(draws: Array, truth: Array) -> float:
    """Share of true values (row,) in central 90 % intervals of draws (draw, row)."""
    low, high = np.quantile(draws, [0.05, 0.95], axis=0, method="weibull")
    return float(((low <= truth) & (truth <= high)).mean())


def exact_posterior(case: str, x: Array) -> dict[str, Any]:
    """Mean and sd of b, and sd of b had a been 1, given each observation (row, 2); and effective draws, the fewest."""
    curve, own, noise = CURVES[case], CASES[case]["own"], CASES[case]["noise"]
    if case == "linear":
        prior = np.array([[1.0, 0.8], [0.8, 0.64 + own**2]])
        posterior = np.linalg.inv(np.linalg.inv(prior) + np.eye(2) / noise**2)
        kept = np.array([-0.8, 1.0])
        mean = x @ (posterior / noise**2)[:, 1]
        ones = np.ones(len(x))
        other = math.sqrt(kept @ posterior @ kept)
        return {"mean": mean, "sd": math.sqrt(posterior[1, 1]) * ones, "other": other * ones, "draws": math.inf}
    rng = np.random.default_rng(99)
    a = rng.normal(size=PRIOR_DRAWS)
    b = curve(a) + own * rng.normal(size=PRIOR_DRAWS)
    left = b - curve(a)
    found: dict[str, list[float]] = {"mean": [], "sd": [], "other": [], "draws": []}
    for row in x:
        log_weight = -0.5 * ((a - row[0]) ** 2 + (b - row[1]) ** 2) / noise**2
        weight = np.exp(log_weight - log_weight.max())
        weight /= weight.sum()
        mean, moved = weight @ b, weight @ left
        found["mean"].append(mean)
        found["sd"].append(math.sqrt(weight @ (b - mean) ** 2))
        found["other"].append(math.sqrt(weight @ (left - moved) ** 2))
        found["draws"].append(1 / (weight @ weight))
    return {key: np.array(found[key]) for key in ("mean", "sd", "other")} | {"draws": min(found["draws"])}


def effect_errors(problem: Problem, result: Result, z: Array, case: str, seed: int) -> dict[str, float]:
    """The effect of a set to 1 instead of -1 on b, against least squares or the truth."""
    curve = CURVES[case]
    found = effect(problem, result, "a", (-1.0, 1.0), outcomes=["b"], num_draws=399, seed=seed, progress=False)
    value, low, high = (float(found[key][0]) for key in ("effect", "low", "high"))
    truth = float(curve(np.ones(1))[0] - curve(-np.ones(1))[0])
    if case != "linear":
        return {
            "effect": value,
            "effect off, se": (value - truth) / ((high - low) / 3.92),
            "holds": low <= truth <= high,
        }
    slope, cut = np.polyfit(*z.T, 1)
    left = z[:, 1] - slope * z[:, 0] - cut
    error = 2 * math.sqrt(left @ left / (len(z) - 2) / ((z[:, 0] - z[:, 0].mean()) ** 2).sum())
    return {
        "effect": value,
        "least squares": 2 * slope,
        "effect off, se": (value - 2 * slope) / error,
        "interval over least squares'": (high - low) / (3.92 * error),
        "holds": low <= truth <= high,
    }


def tables(seeds: list[int], cases: list[str]) -> None:
    """A row for each case."""
    rows = []
    for name in cases:
        case, forced = name.removesuffix(", forced"), name.endswith(", forced")
        cells = []
        for seed in seeds:
            cells.append(table_cell(case, seed, forced=forced))
            print(name, seed, {key: round(float(value), 4) for key, value in cells[-1].items()}, flush=True)
        keys = [key for key in cells[0] if key not in ("passed", "draws", "holds", "effect off, se")]
        row: dict[str, Any] = {"case": name, "seeds": len(cells)}
        row |= {key: common.interval([cell[key] for cell in cells]) for key in keys}
        if not forced:
            row["effect off, se"] = common.spread([cell["effect off, se"] for cell in cells])
            row["intervals that hold the true effect"] = int(sum(cell["holds"] for cell in cells))
        row["passed"] = int(sum(cell["passed"] for cell in cells))
        rows.append(row)
    for row in rows:
        common.report(f"causal_posteriors_{row['case']}".replace(", ", "_"), [row], seeds=seeds, fits=FITS, cases=CASES)


# -- effects ----------------------------------------------------------------------------------------------------------


def chain_hits(seed: int) -> list[bool]:
    """Whether intervals of the effects of a on b and c hold the true ones, of one random chain."""
    rng = np.random.default_rng(1000 + seed)
    weight = rng.uniform(0.3, 1.5, size=3) * rng.choice([-1, 1], size=3)
    own = rng.uniform(0.3, 1.0, size=3)
    count = int(rng.integers(50, 400))
    noise = own * rng.normal(size=(count, 3))
    a = noise[:, 0]
    b = weight[0] * a + noise[:, 1]
    label = np.stack([a, b, weight[1] * a + weight[2] * b + noise[:, 2]], 1)
    mechanisms = Mechanisms(torch.tensor([[0, 1, 1], [0, 0, 1], [0, 0, 0]]), "linear")
    with torch.no_grad():
        for i, causes in enumerate(mechanisms.parents):
            design = np.column_stack([np.ones(count), label[:, causes]])
            found = np.linalg.lstsq(design, label[:, i], rcond=None)[0]
            mechanisms.base[i] = float(found[0])
            mechanisms.weight[causes, i] = torch.as_tensor(found[1:]).to(mechanisms.weight)
            mechanisms.log_scale[i] = math.log(max((label[:, i] - design @ found).std() - 0.02, 0.001))
    low, high = interval_of(mechanisms, ["a", "b", "c"], label, (-1.0, 1.0), seed)
    truth = 2 * np.array([weight[0], weight[1] + weight[0] * weight[2]])
    return [bool(hit) for hit in (low[1:] <= truth) & (truth <= high[1:])]


def curve_hits(seed: int) -> list[bool]:
    """The same of a curved effect, of one random pair."""
    rng = np.random.default_rng(2000 + seed)
    curve = [CURVES["tanh"], CURVES["sine"], lambda a: a**2 - 1][seed % 3]
    count, own = int(rng.integers(200, 800)), rng.uniform(0.3, 0.8)
    a = rng.normal(size=count)
    label = np.stack([a, curve(a) + own * rng.normal(size=count)], 1)
    first, second = np.sort(rng.uniform(-1.2, 1.2, size=2))
    torch.manual_seed(seed)
    mechanisms, seen = Mechanisms(torch.tensor([[0, 1], [0, 0]])), torch.as_tensor(label, dtype=torch.float32)
    optimiser = torch.optim.Adam(mechanisms.parameters(), lr=0.005)
    steps = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 600)
    for _ in range(600):
        some = seen[torch.randint(count, (100,))]
        location = mechanisms.location(1, [some[:, 0]])
        optimiser.zero_grad()
        torch.distributions.Normal(location, mechanisms.scale(1)).log_prob(some[:, 1]).mean().neg().backward()
        optimiser.step()
        steps.step()
    low, high = interval_of(mechanisms, ["a", "b"], label, (float(first), float(second)), seed)
    truth = float(curve(np.array(second)) - curve(np.array(first)))
    return [bool(low[1] <= truth <= high[1])]


def interval_of(
    mechanisms: Mechanisms, names: list[str], label: Array, values: tuple[float, float], seed: int
) -> tuple[Array, Array]:
    """Ends (concept,) of 95 % intervals of what the first concept does to all."""
    seen = torch.as_tensor(label, dtype=torch.float32)
    draws = MechanismDraws(mechanisms, names, seen, list(range(1, len(names))))
    generator, found = torch.Generator().manual_seed(seed), []
    for _ in range(199):
        carry = draws.draw(generator)
        low, high = (carry(seen[:1], {names[0]: value})[0].double().numpy() for value in values)
        found.append(high - low)
    ends = np.quantile(found, [0.025, 0.975], axis=0, method="weibull")
    return ends[0], ends[1]


def effects(num_sets: int) -> None:
    """Coverage over random sets."""
    rows = []
    for name, hits in (("linear chains", chain_hits), ("curved pairs", curve_hits)):
        found = [hits(seed) for seed in range(num_sets)]
        first = [one[0] for one in found]
        error = binomtest(sum(first), len(first)).proportion_ci(method="wilson")
        row: dict[str, Any] = {"mechanisms": name, "data sets": num_sets}
        row["first effect of each"] = f"{np.mean(first):.3f} ({error.low:.3f} to {error.high:.3f})"
        rows.append(row | {"all effects": f"{np.mean(found):.3f}"})
        print(rows[-1], flush=True)
    common.report("causal_posteriors_effects", rows, sets=num_sets)


def main() -> None:
    """Run the part that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("tables", "effects"))
    names = [*CASES, "linear, forced"]
    parser.add_argument("--cases", nargs="*", choices=names, default=names)
    parser.add_argument("--seeds", nargs="*", type=int, default=[1, 2, 3, 4, 5])
    parser.add_argument("--sets", type=int, default=100)
    args = parser.parse_args()
    if args.part == "tables":
        tables(args.seeds, args.cases)
    else:
        effects(args.sets)


if __name__ == "__main__":
    main()
