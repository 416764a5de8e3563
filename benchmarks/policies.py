"""Automatic policies for discrete sites on textbook models, and the time of flow networks beside torchgfn.

    python benchmarks/policies.py textbook
    python benchmarks/policies.py bar
    python benchmarks/policies.py short
    python benchmarks/policies.py modes
    python benchmarks/policies.py hypergrid --python PATH

``textbook``: ``with_guide(problem, "gflownet")`` with its defaults and one setting of `fit_svi` for all models of
``tests/textbook.py``, against the listed posterior: the largest error of a marginal probability, the total variation,
and the marginal error of a guide that is factorised where the model is not (``network="independent"``). Intervals are
Student's over seeds, which draw the path of the optimiser; the network starts alike.

``bar``: the same without any setting, ``with_guide(problem, "gflownet")`` and `fit_svi` with their defaults, on the
textbook models and on four of several modes: total variation, CPU seconds of the fit with its check, and the verdict.

``short``: fits of random models (``--fits``) that are ended after 25 to 400 steps, with annealed draws and without
(`VarGrad`): how many pass though their total variation from enumeration is above 0.05 or 0.1, and how many fail though
it is below 0.05.

``modes``: `check_modes` on guides that are the exact posterior of a random model, or that without some of its modes. A
mode is the configurations from which the steepest ascent, one element at a time, leads to the same one. How often the
verdict fails, by the mass that is lost; and how often on exact guides.

``hypergrid``: trajectory balance on the grid of 8 x 8 states of Bengio et al. (2021), with the network, step sizes,
batches and exploration of torchgfn's example: two layers of 256 units, one trunk for forward and backward policy.
``PATH`` is the Python of an environment with torchgfn (``pip install --no-deps torchgfn tensordict einops dill pyvers``
beside this project's packages). Both run in fresh processes on one thread, one after the other, round after round:
milliseconds of CPU time a step, after ten steps, and CPU seconds until an exponential mean (0.98) of the error of log Z
stays below 0.01 for 50 steps. Ours runs without capturing a graph, which takes 3 s: more than so few steps repay.
"""

from __future__ import annotations

import common  # isort: skip  (pins threads before numpy is loaded)

import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from policy_models import BAR, FAMILIES
from torch import Tensor, nn

from probmodels import Problem, diagnose, fit_svi
from probmodels.guides import with_guide
from probmodels.inference import TrajectoryBalance, VarGrad, check_exact, enumerate_posterior

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from lost_modes import ExactGuide, fit as fit_nothing
from textbook import PROBLEMS

FIT: dict[str, Any] = {"num_steps": 600, "lr": 0.03, "lr_decay": 0.05, "num_samples": 2, "progress": False}
EPSILON, DRAWS = 0.05, 8

# -- textbook models --------------------------------------------------------------------------------------------------


def textbook_cell(name: str, network: str | None, seed: int) -> dict[str, float]:
    """Errors of a fitted policy."""
    problem = with_guide(PROBLEMS[name], "gflownet", network=network)
    problem = replace(problem, loss=VarGrad(DRAWS, epsilon=EPSILON))
    found = check_exact(problem, fit_svi(problem, **FIT, seed=seed))
    worst = {key: float(found[key].max()) for key in ("marginal_error", "total_variation", "kl")}
    return worst


def textbook(args: argparse.Namespace) -> None:
    """Errors of all models."""
    rows = []
    for name in args.models or PROBLEMS:
        try:
            key = {"model": name, **FIT, "draws": DRAWS, "epsilon": EPSILON}
            one = [
                common.cell("policies", args.until, partial(textbook_cell, name, None, s), **key, network=None, seed=s)
                for s in args.seeds
            ]
            two = [
                common.cell(
                    "policies",
                    args.until,
                    partial(textbook_cell, name, "independent", s),
                    **key,
                    network="independent",
                    seed=s,
                )
                for s in args.seeds
            ]
        except common.OutOfTime:
            print(f"{name}: out of time", flush=True)
            continue
        rows.append(
            {
                "model": name,
                "seeds": len(one),
                "marginal error, worst": f"{max(r['marginal_error'] for r in one):.3f}",
                "marginal error": common.interval(r["marginal_error"] for r in one),
                "total variation": common.interval(r["total_variation"] for r in one),
                "factorised: marginal error": common.interval(r["marginal_error"] for r in two),
                "factorised: total variation": common.interval(r["total_variation"] for r in two),
                "CPU s": float(np.median([r["cpu"] for r in one])),
            }
        )
        print(rows[-1], flush=True)
    common.report("policies_textbook", rows, fit=FIT, draws=DRAWS, epsilon=EPSILON, seeds=args.seeds)


# -- defaults, and what the verdict says ------------------------------------------------------------------------------


def judged_cell(problem: Problem, **options: Any) -> dict[str, Any]:
    """Total variation, CPU time and verdict of a fit."""
    start = time.process_time()
    result = fit_svi(problem, progress=False, **options)
    seconds = time.process_time() - start
    found = float(check_exact(problem, result)["total_variation"].max())
    return {"distance": found, "seconds": seconds, "verdict": diagnose(result).inference}


def bar(args: argparse.Namespace) -> None:
    """All models with defaults."""
    rows = []
    for name, problem in {**BAR, **PROBLEMS}.items():
        if args.models and name not in args.models:
            continue
        found = []
        for seed in args.seeds:
            run = partial(judged_cell, with_guide(problem, "gflownet"), seed=seed)
            found.append(common.cell("policies_bar", args.until, run, model=name, seed=seed))
        distance = [one["distance"] for one in found]
        rows.append(
            {
                "model": name,
                "seeds": len(found),
                "total variation, worst": max(distance),
                "total variation": common.interval(distance),
                "CPU s, most": max(one["seconds"] for one in found),
                "CPU s": common.spread([one["seconds"] for one in found]),
                "passed": sum(one["verdict"] == "passed" for one in found),
            }
        )
        print(rows[-1], flush=True)
    common.report("policies_bar", rows, seeds=args.seeds)


SHORT_STEPS = (25, 50, 100, 200, 400)


def short(args: argparse.Namespace) -> None:
    """Short fits of random models, with annealed draws and without."""
    rows = []
    for kind in ("annealed", "VarGrad"):
        found = []
        for number in range(args.fits):
            family, steps = list(FAMILIES)[number % len(FAMILIES)], SHORT_STEPS[number % len(SHORT_STEPS)]
            problem = with_guide(FAMILIES[family](1000 + number), "gflownet")
            problem = problem if kind == "annealed" else replace(problem, loss=VarGrad())
            run = partial(judged_cell, problem, num_steps=steps, seed=number)
            key = {"kind": kind, "number": number, "family": family, "steps": steps}
            found.append(common.cell("policies_short", args.until, run, **key))
            if number % 10 == 9:
                print(kind, number + 1, flush=True)
        passed = [one["distance"] for one in found if one["verdict"] == "passed"]
        failed = [one["distance"] for one in found if one["verdict"] == "failed"]
        rows.append(
            {
                "draws": kind,
                "fits": len(found),
                "total variation": common.spread([one["distance"] for one in found]),
                "passed": len(passed),
                "passed above 0.05": sum(one > 0.05 for one in passed),
                "passed above 0.1": sum(one > 0.1 for one in passed),
                "worst that passed": max(passed, default=0.0),
                "failed": len(failed),
                "failed below 0.05": sum(one < 0.05 for one in failed),
                "not judged": len(found) - len(passed) - len(failed),
            }
        )
    common.report("policies_short", rows, fits=args.fits, steps=SHORT_STEPS)


def basins(problem: Problem, found: Any) -> np.ndarray:
    """Number (configuration,) of the configuration that single steps of steepest ascent end in."""
    values = [found[name].values.reshape(found.sizes["configuration"], -1) for name in problem.names("latent")]
    table = np.concatenate(values, 1).astype(int)
    counts = table.max(0) + 1
    weight = np.cumprod([1, *counts[:-1]])
    code = table @ weight
    place = np.empty(counts.prod(), dtype=int)
    place[code] = np.arange(len(table))
    probability = found["probability"].values
    best = np.arange(len(table))
    for element, count in enumerate(counts):
        for value in range(count):
            other = place[code + (value - table[:, element]) * weight[element]]
            best = np.where(probability[other] > probability[best], other, best)
    while (best[best] != best).any():
        best = best[best]
    return best


LOST = (0.03, 0.07, 0.15, 0.3)


def modes_cell(family: str, number: int) -> dict[str, Any]:
    """The verdict on an exact guide, and on one that lacks a mode."""
    rng = np.random.default_rng(number)
    problem = FAMILIES[family](2000 + number)
    exact = enumerate_posterior(problem)
    ends = basins(problem, exact)
    probability = exact["probability"].values
    kept, mass, tops = np.ones(len(ends), dtype=bool), 0.0, rng.permutation(np.unique(ends))
    for top in tops[1:]:  # modes in random order, until they hold enough
        if mass < LOST[number // 2 % len(LOST)]:
            kept &= ends != top
            mass = float(probability[~kept].sum())
    whole = ExactGuide(problem)
    part = ExactGuide(problem)
    part.weight *= torch.tensor(kept)
    guides = {"exact": whole, "lost": part}
    verdicts = {name: diagnose(fit_nothing(problem, guide, seed=number)[1]).inference for name, guide in guides.items()}
    return {"mass": mass, "modes": len(tops), **verdicts}


BANDS = ((0.0, 0.05), (0.05, 0.1), (0.1, 0.2), (0.2, 0.5), (0.5, 1.0))


def modes(args: argparse.Namespace) -> None:
    """How often a lost mode is exposed, and how often an exact guide is blamed."""
    found = []
    for number in range(args.fits):
        family = ("spin_glass", "constraints")[number % 2]
        run = partial(modes_cell, family, number)
        found.append(common.cell("policies_modes", args.until, run, number=number, family=family))
        if number % 10 == 9:
            print(number + 1, flush=True)
    exact = [one["exact"] for one in found]
    rows = [{"guide": "exact", "guides": len(exact), **_verdicts(exact)}]
    for low, high in BANDS:
        lost = [one["lost"] for one in found if low < one["mass"] <= high]
        rows.append({"guide": f"lacks {low:.0%} to {high:.0%}", "guides": len(lost), **_verdicts(lost)})
    common.report("policies_modes", rows, fits=args.fits)


def _verdicts(found: list[str]) -> dict[str, int]:
    known = {name: found.count(name) for name in ("passed", "failed")}
    return known | {"not judged": len(found) - sum(known.values())}


# -- the grid ---------------------------------------------------------------------------------------------------------

SIDE, AXES, WIDTH = 8, 2, 256
STEPS = AXES * (SIDE - 1) + 1
EXPLORE, LR, LR_LOG_Z = 0.1, 1e-3, 0.1


def log_reward(state: Tensor) -> Tensor:
    """Log reward of states (..., axis), from Bengio et al. (2021)."""
    away = (state.float() / (SIDE - 1) - 0.5).abs()
    return (0.1 + 0.5 * (away > 0.25).all(-1) + 2.0 * ((away > 0.3) & (away < 0.4)).all(-1)).log()


LOG_Z = float(log_reward(torch.cartesian_prod(*[torch.arange(SIDE)] * AXES)).logsumexp(0))


class GridPolicy(nn.Module):
    """Logits of going on along an axis or stopping, and of the axis along which a state was reached."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(SIDE * AXES, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU())
        self.forward_head, self.backward_head = nn.Linear(WIDTH, AXES + 1), nn.Linear(WIDTH, AXES)
        self.log_z = nn.Parameter(torch.zeros(()))

    def features(self, state: Tensor) -> Tensor:
        """Features (..., feature) of states (..., axis)."""
        return self.trunk((state.unsqueeze(-1) == torch.arange(SIDE)).float().flatten(-2))

    def ahead(self, features: Tensor, state: Tensor) -> Tensor:
        """Log probabilities (..., axis or stop)."""
        edge = F.pad(state == SIDE - 1, (0, 1))
        return self.forward_head(features).masked_fill(edge, -1e9).log_softmax(-1)

    def back(self, features: Tensor, state: Tensor) -> Tensor:
        """Log probabilities (..., axis)."""
        return self.backward_head(features).masked_fill(state == 0, -1e9).log_softmax(-1)


class Paths(dist.TorchDistribution):
    """All actions (path, step) of a batch of paths: drawn one by one, scored at once."""

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 -- as torch declares it
    support = dist.constraints.independent(dist.constraints.integer_interval(0, AXES), 1)

    def __init__(self, policy: GridPolicy, num_paths: int, epsilon: float = 0.0) -> None:
        self.policy, self.epsilon = policy, epsilon
        self._known: Any = None
        super().__init__(torch.Size([num_paths]), torch.Size([STEPS]), validate_args=False)

    def explored(self, temperature: float = 1.0, epsilon: float = 0.0) -> Paths:
        """The same with draws that are uniform with probability epsilon."""
        return Paths(self.policy, self.batch_shape[0], epsilon)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Paths:
        """The same, which has one size."""
        return self

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008 -- torch's own signature
        """Draw action after action of the paths that go on."""
        with torch.no_grad():
            actions = torch.full((*self.batch_shape, STEPS), AXES)
            going, state = torch.arange(self.batch_shape[0]), torch.zeros(self.batch_shape[0], AXES, dtype=torch.long)
            for step in range(STEPS):
                chance = self.policy.ahead(self.policy.features(state), state).exp()
                possible = F.pad(state < SIDE - 1, (0, 1), value=1).float()
                chance = (1 - self.epsilon) * chance + self.epsilon * possible / possible.sum(-1, keepdim=True)
                action = (chance / torch.empty_like(chance).exponential_()).argmax(-1)
                actions[going, step] = action
                state = (state + (action.unsqueeze(-1) == torch.arange(AXES)))[action < AXES]
                going = going[action < AXES]
                if not len(going):
                    break
            return actions

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of the paths."""
        return self.densities(value)[0]

    def densities(self, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log densities (path,) ahead and back, and ends (path, axis)."""
        if self._known is None or self._known[0] is not value:  # asked for twice: by the guide and for its density
            self._known = (value, self._densities(value))
        return self._known[1]

    def _densities(self, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        moves = (value.unsqueeze(-1) == torch.arange(AXES)).long()  # (path, step, axis)
        after = moves.cumsum(-2)
        path, step = (F.pad((value == AXES).cumsum(-1)[..., :-1], (1, 0)) == 0).nonzero().T  # until the stop
        before = (after - moves)[path, step]
        features = self.policy.features(before)  # of every state on a path, its end included
        ahead = self.policy.ahead(features, before).gather(-1, value[path, step].unsqueeze(-1)).squeeze(-1)
        came = step > 0
        back = (self.policy.back(features, before)[came] * moves[path[came], step[came] - 1]).sum(-1)
        none = ahead.new_zeros(len(value))
        return none.index_add(0, path, ahead), none.index_add(0, path[came], back), after[..., -1, :]


def grid_problem(policy: GridPolicy, num_paths: int) -> Problem:
    """The grid as a model of one site, and paths to it as the guide."""

    def model() -> None:
        with pyro.plate("path", num_paths):
            state = pyro.sample("state", dist.Delta(torch.zeros(num_paths, AXES), event_dim=1).mask(False))
            pyro.factor("reward", log_reward(state))

    def guide() -> None:
        pyro.module("policy", policy)
        pyro.deterministic("log_Z", policy.log_z * (LR_LOG_Z / LR))  # whose step size is that of torchgfn
        with pyro.plate("path", num_paths):
            paths = Paths(policy, num_paths)
            actions = pyro.sample("actions", paths, infer={"is_auxiliary": True})
            _, back, end = paths.densities(actions)
            pyro.sample("state", dist.Delta(end.float(), log_density=-back, event_dim=1))

    return Problem("hypergrid", model, guide, loss=TrajectoryBalance(1, epsilon=EXPLORE))


class Clock:
    """CPU time of steps, and seconds until log Z is right."""

    def __init__(self) -> None:
        self.start = self.first = self.last = time.process_time()
        self.number, self.error, self.good, self.reached = 0, 1.0, 0, float("nan")

    def __call__(self, log_z: float) -> None:
        """Count a step."""
        self.last, self.number = time.process_time(), self.number + 1
        if self.number == 10:
            self.first = self.last
        self.error = 0.98 * self.error + 0.02 * abs(log_z - LOG_Z)
        self.good = self.good + 1 if self.error < 0.01 else 0
        if self.good == 50 and np.isnan(self.reached):
            self.reached = self.last - self.start

    def figures(self) -> dict[str, float]:
        """What was measured."""
        ms = 1e3 * (self.last - self.first) / (self.number - 10)
        return {"ms": ms, "seconds": self.reached, "log Z error": self.error}


def ours(num_paths: int, num_steps: int, seed: int) -> dict[str, float]:
    """Trajectory balance by `fit_svi`."""
    torch.manual_seed(seed)
    policy = GridPolicy()
    clock = Clock()

    def count(_: Any) -> None:
        clock(policy.log_z.item() * LR_LOG_Z / LR)

    problem = grid_problem(policy, num_paths)
    options: dict[str, Any] = {"compile": "eager", "num_samples": 1, "progress": False}
    fit_svi(problem, num_steps=num_steps, lr=LR, seed=seed, callbacks=[count], **options)
    return clock.figures() | {"parameters": sum(value.numel() for value in policy.parameters())}


def torchgfn(num_paths: int, num_steps: int, seed: int) -> dict[str, float]:
    """The same by torchgfn."""
    import types

    missing: Any = types.ModuleType("linear_attention_transformer")  # imported by torchgfn, not used here
    missing.LinearAttentionTransformer = object
    sys.modules.setdefault("linear_attention_transformer", missing)
    from gfn.estimators import DiscretePolicyEstimator
    from gfn.gflownet import TBGFlowNet
    from gfn.gym import HyperGrid
    from gfn.preprocessors import KHotPreprocessor
    from gfn.samplers import Sampler
    from gfn.utils.modules import MLP

    torch.manual_seed(seed)
    rewards = {"R0": 0.1, "R1": 0.5, "R2": 2.0}
    grid = HyperGrid(ndim=AXES, height=SIDE, reward_fn_str="original", reward_fn_kwargs=rewards, debug=False)
    look = KHotPreprocessor(height=SIDE, ndim=AXES)
    ahead = MLP(input_dim=look.output_dim, output_dim=grid.n_actions)
    back = MLP(input_dim=look.output_dim, output_dim=grid.n_actions - 1, trunk=ahead.trunk)
    forward = DiscretePolicyEstimator(ahead, grid.n_actions, preprocessor=look, is_backward=False)
    backward = DiscretePolicyEstimator(back, grid.n_actions, preprocessor=look, is_backward=True)
    network = TBGFlowNet(pf=forward, pb=backward, init_logZ=0.0)
    optimiser = torch.optim.Adam(network.pf_pb_parameters(), LR)
    optimiser.add_param_group({"params": network.logz_parameters(), "lr": LR_LOG_Z})
    sampler, clock = Sampler(estimator=forward), Clock()
    for _ in range(num_steps):
        paths = sampler.sample_trajectories(
            grid, n=num_paths, save_logprobs=False, save_estimator_outputs=False, epsilon=EXPLORE
        )
        optimiser.zero_grad()
        network.loss_from_trajectories(grid, paths, recalculate_all_logprobs=False).backward()
        optimiser.step()
        clock(network.logZ.item())
    return clock.figures() | {"parameters": sum(value.numel() for value in network.parameters())}


def hypergrid(args: argparse.Namespace) -> None:
    """Both, one after the other."""
    rows = []
    for num_paths in args.paths:
        found: dict[str, list[dict[str, float]]] = {"ours": [], "torchgfn": []}
        for seed in args.seeds:
            for who in found:
                command = [sys.executable if who == "ours" else args.python, __file__, "hypergrid"]
                command += ["--one", who, str(num_paths), str(args.steps), str(seed)]
                text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                found[who].append(json.loads(text.splitlines()[-1]))
                print(num_paths, who, seed, found[who][-1], flush=True)
        row: dict[str, Any] = {"paths": num_paths, "seeds": len(args.seeds), "steps": args.steps}
        for key in ("ms", "seconds"):
            mine, other = (np.array([one[key] for one in found[who]]) for who in found)
            row |= {f"{key}, ours": common.spread(mine), f"{key}, torchgfn": common.spread(other)}
            row[f"{key}, ratio"] = float(np.nanmedian(mine / other))
        row["log Z error, ours"] = max(one["log Z error"] for one in found["ours"])
        row["log Z error, torchgfn"] = max(one["log Z error"] for one in found["torchgfn"])
        row["parameters"] = "{ours:.0f}, {torchgfn:.0f}".format(**{k: v[0]["parameters"] for k, v in found.items()})
        rows.append(row)
        print(row, flush=True)
    common.report("policies_hypergrid", rows, explore=EXPLORE, lr=LR, lr_log_z=LR_LOG_Z)


def main() -> None:
    """Run the part that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("textbook", "bar", "short", "modes", "hypergrid"))
    parser.add_argument("--models", nargs="*", choices=[*BAR, *PROBLEMS])
    parser.add_argument("--fits", type=int, default=100, help="of random models")
    parser.add_argument("--seeds", nargs="*", type=int, default=list(range(5)))
    parser.add_argument("--fit-steps", type=int, default=FIT["num_steps"], help="of the textbook fits")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no cell after these")
    parser.add_argument("--paths", nargs="*", type=int, default=[16, 128])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--python", default=sys.executable, help="of an environment with torchgfn")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    FIT["num_steps"] = args.fit_steps
    if args.one:
        who, *numbers = args.one
        print(json.dumps({"ours": ours, "torchgfn": torchgfn}[who](*map(int, numbers))))
        return
    args.until = time.monotonic() + 60 * args.minutes
    {"textbook": textbook, "bar": bar, "short": short, "modes": modes, "hypergrid": hypergrid}[args.part](args)


if __name__ == "__main__":
    main()
