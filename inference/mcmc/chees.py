"""Hamiltonian Monte Carlo on all chains at once, with trajectory length, step size and metric adapted across chains."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import torch
from annotated_types import Interval
from torch import Tensor

from probmodels.errors import ProblemError
from probmodels.inference.mcmc.kernels import Kernel, Params
from probmodels.inference.mcmc.metric import Metric, most_rows, whiten
from probmodels.inference.problem import Problem
from probmodels.inference.programs.potential import Potential
from probmodels.inference.runtime.ops import part
from probmodels.options import Count, Fraction, Positive, checked

__all__ = ["ChEESKernel"]

_log = logging.getLogger(__name__)

_DIVERGENCE = 1000.0  # energy error above which a trajectory counts as divergent
_WINDOWS = (0.1, 0.3, 0.6)  # where warm-up ends a window and renews the metric
_STUCK = 0.05  # mean acceptance over a window below which a chain counts as stuck
_TIME = 1.5  # mean trajectory time to begin with, near a quarter period of a whitened normal
_JITTER = 0.5  # trajectory times lie within this share of their mean


class ChEESKernel(Kernel):
    """ChEES-HMC: all chains move in lock-step along trajectories of one jittered length.

    The mean trajectory time maximises the change of the estimator of the expected square (ChEES), the step size meets
    an acceptance rate, and the metric follows the pooled covariance of all chains; all of it in warm-up only.

    Parameters
    ----------
    problem
        What to infer; discrete sites are enumerated.
    num_chains
        Chains; 16 or more make adaptation reliable, and for small models cost no more than one.
    target_accept_prob
        Mean acceptance that the step size is tuned to; raise it where trajectories diverge.
    metric
        ``"diagonal"``, ``"dense"``, ``"low_rank"``, or ``"auto"``: dense where draws suffice for it, else low rank.
    max_leapfrog
        Longest trajectory in leapfrog steps.
    init_radius
        Uniform starts lie in ``[-init_radius, init_radius]`` in unconstrained space.
    compiler
        ``"graph"``, or ``"inductor"`` for machine code, which pays for runs of minutes.

    Raises
    ------
    ProblemError
        If the model cannot be sampled by gradients, or no finite start is found.
    CaptureError
        If the model has no static graph.

    References
    ----------
    Hoffman, M., Radul, A. and Sountsov, P. (2021). An adaptive-MCMC scheme for setting trajectory lengths in
    Hamiltonian Monte Carlo. AISTATS.
    """

    vectorized = True
    inits = ("pathfinder", "uniform", "prior")

    @checked(ProblemError)
    def __init__(
        self,
        problem: Problem,
        *,
        num_chains: Count = 64,
        target_accept_prob: Fraction = 0.9,
        metric: Literal["auto", "diagonal", "dense", "low_rank"] = "auto",
        max_leapfrog: Annotated[int, Interval(ge=1, le=2**20)] = 1023,
        init_radius: Positive = 2.0,
        compiler: Literal["graph", "inductor"] = "graph",
    ) -> None:
        super().__init__()
        self._name = problem.name
        self.potential = Potential(problem)
        self.num_chains, self._target, self._kind = num_chains, target_accept_prob, metric
        self._max_leapfrog, self._radius, self._compiler = max_leapfrog, init_radius, compiler
        self._z = self._x = self._potential = self._slope = self._centre = self._progress = torch.empty(0)
        self._step, self._time, self._count, self._updates, self._rescued = 0.5, 1.0, 0, 0, 0
        self._mean_error = self._shift = self._log_step_mean = self._log_time_mean = 0.0
        self._criterion = self._climb = 0.0
        self._rows: list[Tensor] = []
        self._steps, self._accept = 0, torch.empty(0)
        self._seen = self._diverged = 0  # of this process; what the progress bar shows need not survive a resumption

    def setup(self, warmup_steps: int, *args: Any, **kwargs: Any) -> None:
        """Capture the potential, find finite starts and a first step size."""
        self.say("capturing the graph")
        self._evaluate: Callable[[Tensor], tuple[Tensor, Tensor]] = self.potential.batched(
            self.num_chains, compiler=self._compiler
        )
        self._warmup = warmup_steps
        self._ends = sorted({round(warmup_steps * share) for share in _WINDOWS} - {0})
        self.say("finding starting points")
        with torch.no_grad():
            z = self._find_starts()
            self._metric = Metric(torch.ones_like(z[0]))
            if self.init in (None, "pathfinder"):
                z, self._metric = whiten(self._evaluate, z, self._kind)
            self._place(z)
            self._progress = torch.zeros_like(z[:, 0])
            self._restart(self._first_step_size())

    @property
    def initial_params(self) -> Params:
        """Starts of the chains: ``z`` (chain, size), unconstrained."""
        return {"z": self._z}

    @initial_params.setter
    def initial_params(self, params: Params) -> None:
        with torch.no_grad():
            self._place(params["z"])

    @torch.no_grad()
    def sample(self, params: Params) -> Params:
        """One trajectory of every chain; ``z`` (chain, size) to ``z`` (chain, size)."""
        self._count += 1
        adapting = self._count <= self._warmup
        jitter = 1 + _JITTER * (2 * _halton(self._count) - 1)
        steps = max(1, min(self._max_leapfrog, round(jitter * self._time / self._step)))
        momentum = torch.randn_like(self._x)
        start = self._potential + 0.5 * momentum.square().sum(1)
        x, velocity, potential, slope = self._leapfrog(momentum, steps)
        end = potential + 0.5 * velocity.square().sum(1)
        error = torch.nan_to_num(end - start, nan=math.inf)
        accept = torch.exp(-error.clamp(min=0))
        chosen = torch.rand_like(accept) < accept
        if adapting:
            self._adapt_time(x, velocity, accept, steps)
            self._adapt_step(float(accept.mean()))
            self._progress += accept
        keep = chosen[:, None]
        self._x = torch.where(keep, x, self._x)
        self._slope = torch.where(keep, slope, self._slope)
        self._potential = torch.where(chosen, potential, self._potential)
        self._z = self._metric.forward(self._x)
        self._energy, self._accept, self._diverging, self._steps = start, accept, error > _DIVERGENCE, steps
        if adapting:
            self._adapt_metric()
        else:
            self._tally()
        return {"z": self._z}

    def sample_stats(self) -> dict[str, Any]:
        """Log density, energy, acceptance, step size, leapfrog steps, trajectory time and divergence, by chain."""
        return {
            "lp": -self._potential,
            "energy": self._energy,
            "acceptance_rate": self._accept,
            "diverging": self._diverging,
            "step_size": self._step,
            "n_steps": self._steps,
            "trajectory_length": self._steps * self._step,
        }

    def attrs(self) -> dict[str, Any]:
        """Target acceptance, longest trajectory, kind of metric, and chains that were moved in warm-up."""
        metric = self._metric
        kind = "dense" if metric.factor is not None else "low_rank" if metric.vectors is not None else "diagonal"
        return {
            "target_accept_prob": self._target,
            "max_leapfrog": self._max_leapfrog,
            "metric": kind,
            "moved_chains": self._rescued,
        }

    def end_warmup(self) -> None:
        """Fix step size and trajectory time at their averages over the last window."""
        if self._updates:
            self._step = math.exp(self._log_step_mean)
            self._time = math.exp(self._log_time_mean)

    def logging(self) -> dict[str, str]:
        """Step size, leapfrog steps, acceptance, and after warm-up divergences and the effective sample size so far."""
        shown = {
            "step size": f"{self._step:.2e}",
            "leapfrog": str(self._steps),
            "acc": f"{float(self._accept.mean()) if len(self._accept) else 0.0:.2f}",
        }
        if self._seen > 1:
            shown |= {"divergences": str(self._diverged), "least ess": f"~{self._ess_so_far():.0f}"}
        return shown

    def state_dict(self) -> dict[str, Tensor | int | float | str]:
        """Positions, metric, step size, trajectory time and the state of their adaptation."""
        scalars = ["count", "step", "time", "updates", "mean_error", "log_step_mean", "log_time_mean", "shift"]
        scalars += ["criterion", "climb", "rescued"]
        state: dict[str, Tensor | int | float | str] = {name: getattr(self, f"_{name}") for name in scalars}
        state |= {"x": self._x, "z": self._z, "potential": self._potential, "slope": self._slope}
        state |= {"centre": self._centre, "progress": self._progress}
        state |= {f"metric/{name}": value for name, value in self._metric.state_dict().items()}
        if self._rows:
            state["rows"] = torch.stack(self._rows)
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state_dict``."""
        self._metric = Metric(**part(state, "metric/"))
        for name, value in state.items():
            if name != "rows" and not name.startswith("metric/"):
                setattr(self, f"_{name}", value)
        self._rows = list(state["rows"]) if "rows" in state else []

    def _tally(self) -> None:
        """Running moments of the draws, for the progress bar alone."""
        if not self._seen:
            self._sum, self._square = torch.zeros_like(self._z), torch.zeros_like(self._z)
            self._origin = self._z.mean(0)
        shifted = self._z - self._origin
        self._sum += shifted
        self._square += shifted.square()
        self._seen += 1
        self._diverged += int(self._diverging.sum())

    def _ess_so_far(self) -> float:
        """Rough effective sample size of the worst unknown: the variance of draws over that of the chains' means."""
        means = self._sum / self._seen
        within = (self._square / self._seen - means.square()).mean(0)
        between = means.var(0) if self.num_chains > 1 else torch.full_like(within, math.nan)
        return float(
            (self.num_chains * within / between.clamp(min=1e-30)).min().clamp(max=self.num_chains * self._seen)
        )

    def _place(self, z: Tensor) -> None:
        """Put the chains at ``z`` in the present metric."""
        self._z, self._x = z, self._metric.inverse(z)
        self._potential, gradient = self._evaluate(z)
        self._slope = self._metric.transposed(gradient)

    def _leapfrog(self, momentum: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x, step, metric = self._x, self._step, self._metric
        velocity = momentum - 0.5 * step * self._slope
        for index in range(steps):
            x = torch.add(x, velocity, alpha=step)
            potential, gradient = self._evaluate(metric.forward(x))
            slope = metric.transposed(gradient)
            velocity = torch.sub(velocity, slope, alpha=step if index < steps - 1 else 0.5 * step)
        return x, velocity, potential, slope

    def _restart(self, step: float) -> None:
        """Begin a window of adaptation at a step size."""
        self._step, self._updates, self._mean_error = step, 0, 0.0
        self._shift, self._log_step_mean = math.log(10 * step), math.log(step)
        self._log_time_mean = math.log(self._time)
        self._criterion, self._climb = 0.0, 0.0
        self._centre = self._x.mean(0)

    def _adapt_step(self, accept: float) -> None:
        """Dual averaging of the log step size (Hoffman and Gelman 2014, section 3.2)."""
        self._updates += 1
        count = self._updates
        self._mean_error += (self._target - accept - self._mean_error) / (count + 10)
        log_step = self._shift - math.sqrt(count) / 0.05 * self._mean_error
        weight = count**-0.75
        self._log_step_mean += weight * (log_step - self._log_step_mean)
        self._step = math.exp(log_step)

    def _adapt_time(self, x: Tensor, velocity: Tensor, accept: Tensor, steps: int) -> None:
        """Climb the ChEES criterion: the mean squared change of the squared distance from the centre."""
        good = torch.isfinite(x).all(1) & torch.isfinite(velocity).all(1) & (accept > 0)
        if not bool(good.any()):
            return
        before, after = (self._x - self._centre)[good], (x - self._centre)[good]
        change = after.square().sum(1) - before.square().sum(1)
        weight = accept[good] / len(accept)  # not normalised: a step at which all is refused says nothing
        criterion = float((weight * change.square()).sum()) / 4
        climb = float((weight * change * (after * velocity[good]).sum(1)).sum()) * steps * self._step
        count = self._updates + 1
        fade = max(1 / count, 0.1)
        self._criterion += fade * (criterion - self._criterion)
        self._climb += fade * (climb - self._climb)
        slope = self._climb / max(self._criterion, 1e-300) - math.log(self._time / _TIME) / self._metric.spread**2
        # With few chains the slope is mostly noise, and the time stays near that of a whitened normal.
        gain = 0.2 * self.num_chains / (self.num_chains + 16)
        log_time = math.log(self._time) + gain * count**-0.5 * max(-1.0, min(1.0, slope))
        log_time = min(max(log_time, math.log(self._step)), math.log(self._step * self._max_leapfrog))
        self._time = math.exp(log_time)
        self._log_time_mean += count**-0.75 * (log_time - self._log_time_mean)
        self._centre = self._centre + max(1 / (count + 1), 0.05) * (self._x.mean(0) - self._centre)

    def _adapt_metric(self) -> None:
        later = [end for end in self._ends if end >= self._count]
        if not later:
            return
        begin = max((end for end in self._ends if end < self._count), default=0)
        # The first half of a window is still on its way from the metric before.
        stride = max(1, math.ceil((later[0] - begin) * self.num_chains / (2 * most_rows(self._z.shape[1]))))
        if (self._count - begin) % stride == 0 and 2 * (self._count - begin) > later[0] - begin:
            self._rows.append(self._z)
        if self._count == later[0] and self._rows:
            self._rescue(self._count - begin)
            self._metric = self._metric.renewed(torch.stack(self._rows), self._kind)
            self._rows = []
            self._place(self._z)
            self._time = _TIME
            self._restart(self._first_step_size())

    def _rescue(self, steps: int) -> None:
        """Move chains that got stuck to the places of others: warm-up may, since its draws are left out."""
        stuck = self._progress < _STUCK * steps
        if bool(stuck.any()) and not bool(stuck.all()):
            others = torch.nonzero(~stuck)[:, 0]
            chosen = others[torch.randint(len(others), (int(stuck.sum()),))]
            self._z = self._z.clone()
            self._z[stuck] = self._z[chosen]
            self._rows = [torch.where(stuck[:, None], row.mean(0), row) for row in self._rows]
            self._rescued += int(stuck.sum())
            _log.info("%s: %d chains got stuck in warm-up and were moved", self._name, int(stuck.sum()))
        self._progress = torch.zeros_like(self._progress)

    def _first_step_size(self) -> float:
        """A step size at which one leapfrog step is accepted about four times in five."""
        direction = 0
        for _ in range(40):
            momentum = torch.randn_like(self._x)
            start = self._potential + 0.5 * momentum.square().sum(1)
            _, velocity, potential, _ = self._leapfrog(momentum, 1)
            error = torch.nan_to_num(potential + 0.5 * velocity.square().sum(1) - start, nan=math.inf)
            turn = 1 if float(torch.exp(-error.clamp(min=0)).mean()) > 0.8 else -1
            if direction and turn != direction:
                break
            direction = turn
            self._step *= 2.0**turn
        return self._step

    def _find_starts(self) -> Tensor:
        potential, chains = self.potential, range(self.num_chains)
        if isinstance(self.init, Mapping):
            z = torch.stack([potential.from_draw({k: v[chain] for k, v in self.init.items()}) for chain in chains])
        elif self.init == "prior":
            z = torch.stack([potential.from_prior() for _ in chains])
        else:
            z = torch.stack([potential.uniform(self._radius) for _ in chains])
        value, gradient = self._evaluate(z)
        bad = torch.nonzero(~(torch.isfinite(value) & torch.isfinite(gradient).all(1)))[:, 0]
        propose = potential.from_prior if self.init == "prior" else lambda: potential.uniform(self._radius)
        for chain in bad.tolist():
            z[chain] = potential.find_start(potential.evaluate, propose)
        return z


def _halton(index: int) -> float:
    """The index-th point of the base-two van der Corput sequence."""
    share, value = 1.0, 0.0
    while index > 0:
        share /= 2
        value += share * (index % 2)
        index //= 2
    return value
