"""Automatic policies for discrete sites on textbook models, and the time of flow networks beside torchgfn.

    python benchmarks/policies.py textbook
    python benchmarks/policies.py hypergrid --python PATH

``textbook``: ``with_guide(problem, "gflownet")`` with its defaults and one setting of `fit_svi` for all models of
``tests/textbook.py``, against the listed posterior: the largest error of a marginal probability, the total variation,
and the marginal error of a guide that is factorised where the model is not (``network="independent"``). Intervals are
Student's over seeds, which draw the path of the optimiser; the network starts alike.

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
from torch import Tensor, nn

from probmodels import Problem, fit_svi
from probmodels.guides import with_guide
from probmodels.inference import TrajectoryBalance, VarGrad, check_exact

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
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
    parser.add_argument("part", choices=("textbook", "hypergrid"))
    parser.add_argument("--models", nargs="*", choices=list(PROBLEMS))
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
    (textbook if args.part == "textbook" else hypergrid)(args)


if __name__ == "__main__":
    main()
