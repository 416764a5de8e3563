"""Objectives of generative flow networks: a guide is the policy, the joint density of the model is the reward.

A guide q draws latent values step by step; its log density may subtract that of a backward policy. Every objective here
is a squared difference that vanishes, draw by draw, where q(z | x) is proportional to the reward p(x, z). So its
minimum is the same whatever the draws come from, no gradient passes through them, and it has no noise at the minimum.
The model gets no gradient, unless a loss of its own at the same draws is added (``joint``).

Where all sites of model and guide share a plate, its rows are data with a balance of their own; otherwise one balance
holds for all sites together.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Unpack

import pyro
import torch
from annotated_types import Ge
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer import ELBO
from torch import Tensor
from typing_extensions import TypedDict  # which knows what it extends in Python 3.11 as well

from probmodels.errors import ProblemError
from probmodels.inference.flows.exploration import Explore
from probmodels.inference.programs.traces import (
    Frames,
    by_datum,
    plate_scale,
    sample_sites,
    scored,
    shared_plates,
    sum_by_datum,
)
from probmodels.inference.runtime.ops import is_generated
from probmodels.options import Default, NonNegative, Particles, Positive, Probability, checked, filled

__all__ = [
    "Balance",
    "BalanceOptions",
    "DetailedBalance",
    "DrawOptions",
    "Explore",
    "ParallelVarGrad",
    "Run",
    "SubTrajectoryBalance",
    "TrajectoryBalance",
    "VarGrad",
    "Weights",
    "model_loss",
]

Weights = Literal["equal", "importance", "best"]
"""How draws weigh in a loss of the model; see `model_loss`."""

_FLOW = "log_flow_"
_Several = Annotated[int, Ge(2)]


class DrawOptions(TypedDict, total=False):
    """What all balance objectives take.

    Attributes
    ----------
    temperature, epsilon
        How draws explore beyond the guide; see `Explore`. The minimum does not depend on it.
    reward_power
        Power of the reward, or a function from the step, counted from 0, to it: rising to 1 it anneals. A function
        keeps the objective from being captured as a graph.
    floor
        Least log reward of a datum, before the power; what is below, -inf too, counts as that much.
    """

    temperature: Annotated[Positive, Default(1.0)]
    epsilon: Annotated[Probability, Default(0.0)]
    reward_power: Annotated[Positive | Callable[[int], float], Default(1.0)]
    floor: Annotated[float | None, Default(None)]


class BalanceOptions(DrawOptions, total=False):
    """What balance objectives of data by row take.

    Attributes
    ----------
    joint
        ``"equal"``, ``"importance"`` or ``"best"``: how the same draws weigh in a loss of the model that is added, see
        `model_loss`; guide and model move at once. None for a loss of the guide alone.
    """

    joint: Annotated[Weights | None, Default(None)]


@dataclass
class Run:
    """Traces of guide and model at one draw of the guide, with the plates whose rows are data."""

    draw: Any
    trace: Any
    shared: Frames

    def log_q(self, sites: Sequence[Any] | None = None) -> Tensor:
        """Log density of sites of the guide, None for all, by datum.

        Its value counts sites as their plates and handlers do; its gradient is that of the plain density, which
        multiplied by a counted difference is unbiased for rows and weights of any kind.
        """
        scale, terms = plate_scale(self.shared), []
        for site in sample_sites(self.draw) if sites is None else sites:
            score = scale * scale_and_mask(site["unscaled_log_prob"], mask=site["mask"])
            terms.append(score + (site["log_prob"] - score).detach())
        return sum_by_datum(terms, self.shared)

    def value(self, name: str) -> Tensor:
        """Value of a deterministic site of the guide, one for all data or one for each.

        Raises
        ------
        ProblemError
            If it has another shape.
        """
        value, sizes = self.draw.nodes[name]["value"], {frame.dim: frame.size for frame in self.shared.values()}
        data = [sizes.get(dim, 1) for dim in range(min(sizes, default=0), 0)]
        if value.numel() not in (1, math.prod(data)):
            raise ProblemError(
                f"site {name!r} of the guide has shape {tuple(value.shape)}; give it shape () or one entry for each of "
                f"the {math.prod(data)} rows of the plates {list(self.shared)} that all sites share"
            )
        return value.reshape(data if value.numel() > 1 else ())


class Balance(ELBO):
    """What the objectives share: draws, rewards, gradients and checks.

    Parameters
    ----------
    num_particles
        Draws of the guide in each step.
    **options
        ``temperature``, ``epsilon``, ``reward_power``, ``floor`` and ``joint``; see `BalanceOptions`.
    """

    least = 1  # fewest draws

    @checked(ProblemError)
    def __init__(self, num_particles: Particles, **options: Unpack[BalanceOptions]) -> None:
        super().__init__(num_particles=num_particles)
        given = filled(BalanceOptions, options)
        self.temperature, self.epsilon = given["temperature"], given["epsilon"]
        self.reward_power, self.floor, self.joint = given["reward_power"], given["floor"], given["joint"]
        self.step = 0

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Loss () over all data, whose gradient moves the guide and, unless it is ``joint``, leaves the model."""
        self._check_particles()
        return self._loss(self._runs(model, guide, args, kwargs))

    def at(self, model: Any, guide: Any, draws: Sequence[Any], *args: Any, **kwargs: Any) -> Tensor:
        """Loss () over all data at the values of traces of the guide, in the place of new draws."""
        found = (scored(guide, draw, args, kwargs) for draw in draws)
        return self._loss([self._run(model, draw, args, kwargs) for draw in found])

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """Loss over all data, after a check of all that the objective needs.

        Raises
        ------
        ProblemError
            If the guide lacks a site that the model or the objective needs, a flow has no parameter, or the reward is
            not finite.
        """
        self._check_particles()
        with torch.enable_grad():
            runs = self._runs(model, guide, args, kwargs)
            loss = self._loss(runs)
        self._check(runs)
        return float(loss.detach())

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """Loss over all data; adds its gradient to that of the parameters and counts a step."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        loss.backward()
        self.step += 1
        return float(loss.detach())

    def prepare(self, programs: Any, obstacle: str | None, say: Callable[[str], None]) -> str | None:
        """Do what has to be done before the first step, if anything; says what was done. See `AnnealedVarGrad`."""
        return None

    def as_objective(self) -> _Static | Balance:
        """A function that can be captured, or a copy of itself where it changes from step to step."""
        own = copy.deepcopy(self)
        return own if callable(self.reward_power) else _Static(own)

    def state_dict(self) -> dict[str, int]:
        """The step, where the power of the reward depends on it."""
        return {"step": self.step} if callable(self.reward_power) else {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from what `state_dict` returned."""
        self.step = int(state.get("step", 0))

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Traces of model and guide at one draw, gradients in that of the guide alone."""
        with Explore(self.temperature, self.epsilon):
            draw: Any = poutine.trace(guide).get_trace(*args, **kwargs)
        draw.compute_log_prob()
        return self._run(model, draw, args, kwargs).trace, draw

    def _run(self, model: Any, draw: Any, args: Any, kwargs: Any) -> Run:
        """Draw and model at it, which has gradients of its own only where they are wanted."""
        with torch.set_grad_enabled(self.joint is not None and torch.is_grad_enabled()):
            trace = scored(model, draw, args, kwargs)
        return Run(draw, trace, shared_plates(trace, draw))

    def _runs(self, model: Any, guide: Any, args: Any, kwargs: Any) -> list[Run]:
        traces = (self._get_trace(model, guide, args, kwargs) for _ in range(self.num_particles))
        return [Run(draw, trace, shared_plates(trace, draw)) for trace, draw in traces]

    def _loss(self, runs: Sequence[Run]) -> Tensor:
        loss = self._by_datum(runs)
        if self.joint is not None:
            log_p = torch.stack([by_datum(run.trace, run.shared) for run in runs])
            log_p = log_p if self.floor is None else log_p.clamp(min=self.floor)
            log_q = torch.stack([run.log_q().detach() for run in runs])
            loss = loss + model_loss(log_p, log_q, self.joint)
        return plate_scale(runs[0].shared) * loss.sum()

    def _by_datum(self, runs: Sequence[Run]) -> Tensor:
        """Loss of each datum."""
        raise NotImplementedError

    def _log_reward(self, run: Run, sites: Sequence[Any] | None = None) -> Tensor:
        """Log reward of sites of the model, None for all, by datum."""
        sites = sample_sites(run.trace) if sites is None else sites
        log_p = sum_by_datum([site["log_prob"] for site in sites], run.shared).detach()
        log_p = log_p if self.floor is None else log_p.clamp(min=self.floor)
        return log_p * (self.reward_power(self.step) if callable(self.reward_power) else self.reward_power)

    def _flows(self, run: Run) -> list[str]:
        """Names of the guide's deterministic sites that the objective fits."""
        return []

    def _check_particles(self) -> None:
        if self.num_particles < self.least:
            raise ProblemError(
                f"{type(self).__name__}: num_particles={self.num_particles}; it needs {self.least} or more"
            )

    def _check(self, runs: Sequence[Run]) -> None:
        kind = type(self).__name__
        for site in sample_sites(runs[0].trace):
            if not (site["is_observed"] or is_generated(site) or site["name"] in runs[0].draw.nodes):
                raise ProblemError(
                    f"{kind}: the guide does not sample {site['name']!r}, and no site is enumerated here; sample it in "
                    "the guide, or take TraceEnum_ELBO"
                )
        for run in runs:
            for site in sample_sites(run.trace):
                if site["log_prob"].isnan().any():
                    raise ProblemError(
                        f"{kind}: the log density of site {site['name']!r} of the model is nan at a draw"
                    )
            if not self._log_reward(run).isfinite().all():
                zero = [s["name"] for s in sample_sites(run.trace) if not s["log_prob"].isfinite().all()]
                raise ProblemError(
                    f"{kind}: the guide draws what the model excludes at sites {zero}: the log reward is -inf; give "
                    "the objective a floor, such as floor=-100, or mask these values in the guide"
                )
        known = list(dict(pyro.get_param_store().named_parameters()).values())
        for name in self._flows(runs[0]):
            value = runs[0].draw.nodes[name]["value"]
            found: tuple[Tensor | None, ...] = (None,)
            if value.requires_grad and known:
                found = torch.autograd.grad(value.sum(), known, allow_unused=True, retain_graph=True)
            if all(item is None for item in found):
                raise ProblemError(
                    f"{kind}: site {name!r} of the guide depends on no parameter, so that nothing would fit it; "
                    "compute it, without detach, from a pyro.param or a module that the guide registers by pyro.module"
                )


@dataclass
class _Static:
    """An objective that is the same at every step, as a function."""

    balance: Balance

    def __call__(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        return self.balance.differentiable_loss(model, guide, *args, **kwargs)

    def powered(self, power: Any) -> _Static:
        """The same with the reward raised to a power, a number or a tensor ()."""
        own = copy.copy(self.balance)
        own.reward_power = own.reward_power * power
        return _Static(own)

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """Loss over all data, after the checks of the objective."""
        return self.balance.loss(model, guide, *args, **kwargs)

    def prepare(self, *args: Any) -> str | None:
        """What the objective does before the first step, if it does anything, in words."""
        return self.balance.prepare(*args)


class VarGrad(Balance):
    """Log-variance loss: log p(x, z) - log q(z | x) has to be the same for all draws.

    Per datum half the unbiased variance over the draws; its gradient is that of KL(q || p) where draws come from q,
    with the mean of the other draws as the baseline. It needs no log Z.

    Parameters
    ----------
    num_particles
        At least 2.
    **options
        ``temperature``, ``epsilon``, ``reward_power``, ``floor`` and ``joint``; see `BalanceOptions`.

    References
    ----------
    L. Richter, A. Boustati, N. Nüsken, F. J. R. Ruiz, Ö. D. Akyildiz, VarGrad: a low-variance gradient estimator for
    variational inference, NeurIPS 2020, https://arxiv.org/abs/2010.10436
    """

    least = 2

    @checked(ProblemError)
    def __init__(self, num_particles: _Several = 4, **options: Unpack[BalanceOptions]) -> None:
        super().__init__(num_particles, **options)

    def _by_datum(self, runs: Sequence[Run]) -> Tensor:
        return torch.stack([self._log_reward(run) - run.log_q() for run in runs]).var(0) / 2


class ParallelVarGrad(VarGrad):
    """`VarGrad` whose draws are the rows of a plate around guide and model, so that all cost little more than one.

    For programs whose sites can be vectorised and stand in no plate.

    Parameters
    ----------
    num_particles
        At least 2.
    **options
        ``temperature``, ``epsilon``, ``reward_power`` and ``floor``; see `DrawOptions`.
    """

    @checked(ProblemError)
    def __init__(self, num_particles: _Several = 64, **options: Unpack[DrawOptions]) -> None:
        super().__init__(num_particles, **options)

    def _runs(self, model: Any, guide: Any, args: Any, kwargs: Any) -> list[Run]:
        count = self.num_particles
        trace, draw = self._get_trace(_repeated(model, count), _repeated(guide, count), args, kwargs)
        return [Run(draw, trace, shared_plates(trace, draw))]

    def _by_datum(self, runs: Sequence[Run]) -> Tensor:
        gaps = [(self._log_reward(run) - run.log_q()).reshape(-1) for run in runs]
        return torch.cat(gaps).var() / 2


def _repeated(program: Callable[..., Any], count: int) -> Callable[..., Any]:
    """A program within a plate."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with pyro.plate("draws", count, dim=-1):
            return program(*args, **kwargs)

    return run


class TrajectoryBalance(Balance):
    """Trajectory balance: log Z(x) + log q(z | x) has to be log p(x, z), with log Z(x) a site of the guide.

    Per datum half the mean square of the difference; its gradient for the guide is that of KL(q || p) where draws come
    from q, with log Z as the baseline.

    Parameters
    ----------
    num_particles
        Draws of each step.
    log_z
        Deterministic site of the guide, of shape () or one entry per datum; at the minimum the log evidence.
    **options
        ``temperature``, ``epsilon``, ``reward_power``, ``floor`` and ``joint``; see `BalanceOptions`.

    References
    ----------
    N. Malkin, M. Jain, E. Bengio, C. Sun, Y. Bengio, Trajectory balance: improved credit assignment in GFlowNets,
    NeurIPS 2022, https://arxiv.org/abs/2201.13259
    """

    @checked(ProblemError)
    def __init__(
        self, num_particles: Particles = 1, *, log_z: str = "log_Z", **options: Unpack[BalanceOptions]
    ) -> None:
        super().__init__(num_particles, **options)
        self.log_z = log_z

    def _flows(self, run: Run) -> list[str]:
        if self.log_z not in run.draw.nodes:
            raise ProblemError(
                f"{type(self).__name__}: the guide has no site {self.log_z!r}; add pyro.deterministic({self.log_z!r}, "
                "value) with a value computed from parameters, one per datum, or take VarGrad, which needs none"
            )
        return [self.log_z]

    def _by_datum(self, runs: Sequence[Run]) -> Tensor:
        (log_z,) = self._flows(runs[0])
        gaps = [run.value(log_z) + run.log_q() - self._log_reward(run) for run in runs]
        return torch.stack(gaps).square().mean(0) / 2


class SubTrajectoryBalance(Balance):
    """Sub-trajectory balance: flows of partial draws have to agree along every piece of a draw.

    A deterministic site ``log_flow_<site>`` of the guide, just before ``<site>``, is the log flow of what was drawn so
    far; the flow of a whole draw is its reward. Sites without a flow belong to the step before, and the first one has
    to have one, which at the minimum is the log evidence. Per datum the loss is half the weighted mean square, over all
    pieces from flow i to flow j > i with weights decay^(j - i - 1), of log F_i + log q(piece) - log F_j.

    Parameters
    ----------
    num_particles
        Draws of each step.
    decay
        Weight of a piece relative to one shorter by a step: 0 for detailed balance, large for trajectory balance.
    forward_looking
        Whether flows are given relative to the log density of what the model knows by then: of its sites, in program
        order, before the first latent one that has not been drawn. Take it where rewards come step by step.
    **options
        ``temperature``, ``epsilon``, ``reward_power``, ``floor`` and ``joint``; see `BalanceOptions`.

    References
    ----------
    K. Madan et al., Learning GFlowNets from partial episodes for improved convergence and stability, ICML 2023,
    https://arxiv.org/abs/2209.12782

    L. Pan, N. Malkin, D. Zhang, Y. Bengio, Better training of GFlowNets with local credit and incomplete trajectories,
    ICML 2023, https://arxiv.org/abs/2302.01687
    """

    @checked(ProblemError)
    def __init__(
        self,
        num_particles: Particles = 1,
        *,
        decay: NonNegative = 0.9,
        forward_looking: bool = False,
        **options: Unpack[BalanceOptions],
    ) -> None:
        super().__init__(num_particles, **options)
        self.decay, self.forward_looking = decay, forward_looking

    def _flows(self, run: Run) -> list[str]:
        sites = {site["name"] for site in sample_sites(run.draw)}
        order = [name for name, node in run.draw.nodes.items() if _is_flow(node) or name in sites]
        flows = [name for name in order if name not in sites]
        for name, after in zip(order, [*order[1:], ""], strict=True):
            if name in flows and name != _FLOW + after:
                raise ProblemError(
                    f"{type(self).__name__}: site {name!r} of the guide stands before {after or 'nothing'!r}; a flow "
                    "stands just before the site that it is named after"
                )
        if order[0] not in flows:
            raise ProblemError(
                f"{type(self).__name__}: the guide has no flow before its first site; add "
                f"pyro.deterministic({_FLOW + order[0]!r}, value) with a value computed from parameters, one per "
                "datum, or take VarGrad, which needs none"
            )
        return flows

    def _by_datum(self, runs: Sequence[Run]) -> Tensor:
        count = len(self._flows(runs[0]))
        weights = [[self.decay ** (j - i - 1) if j > i else 0.0 for j in range(count + 1)] for i in range(count + 1)]
        total: Any = 0.0
        for run in runs:
            heights = torch.stack(torch.broadcast_tensors(*self._heights(run)))
            pairs = (heights.unsqueeze(1) - heights).square()
            weight = torch.tensor(weights).to(heights).reshape(count + 1, count + 1, *[1] * (heights.dim() - 1))
            total = total + (weight * pairs).sum((0, 1)) / weight.sum() / (2 * len(runs))
        return total

    def _heights(self, run: Run) -> list[Tensor]:
        """Log flow less the log density of what led to it, of every partial draw: all are equal at the minimum."""
        heights: list[Tensor] = []
        drawn: set[str] = set()
        log_q = torch.zeros(())
        sites = {site["name"] for site in sample_sites(run.draw)}
        for name, node in run.draw.nodes.items():
            if _is_flow(node):
                known = self._log_reward(run, _known(run, drawn)) if self.forward_looking else 0.0
                heights.append(run.value(name) + known - log_q)
            elif name in sites:
                drawn.add(name)
                log_q = log_q + run.log_q([node])
        return [*heights, self._log_reward(run) - log_q]


class DetailedBalance(SubTrajectoryBalance):
    """Detailed balance: `SubTrajectoryBalance` of single steps.

    Parameters
    ----------
    num_particles
        Draws of each step.
    forward_looking
        As in `SubTrajectoryBalance`.
    **options
        ``temperature``, ``epsilon``, ``reward_power``, ``floor`` and ``joint``; see `BalanceOptions`.

    References
    ----------
    Y. Bengio, S. Lahlou, T. Deleu, E. J. Hu, M. Tiwari, E. Bengio, GFlowNet foundations, JMLR 24(210), 2023,
    https://arxiv.org/abs/2111.09266
    """

    @checked(ProblemError)
    def __init__(
        self, num_particles: Particles = 1, *, forward_looking: bool = False, **options: Unpack[BalanceOptions]
    ) -> None:
        super().__init__(num_particles, decay=0.0, forward_looking=forward_looking, **options)


def model_loss(log_p: Tensor, log_q: Tensor, weights: Weights) -> Tensor:
    """Loss of a model, by datum, at draws that are held fixed.

    Parameters
    ----------
    log_p, log_q
        Log densities of data and draws under the model, and of draws under the guide, (draw, data ...).
    weights
        ``"equal"``: minus the mean of log p - log q, whose gradient is that of -log p at draws of the guide.
        ``"importance"``: minus the log of the mean of p / q, whose gradient weighs draws by p / q.
        ``"best"``: -log p at the draw of largest p, as hard EM has it.
    """
    if weights == "best":
        best = log_p.detach().argmax(0, keepdim=True)
        return -torch.take_along_dim(log_p, best, 0).squeeze(0)
    gap = log_p - log_q
    return -gap.mean(0) if weights == "equal" else math.log(len(gap)) - gap.logsumexp(0)


def _is_flow(node: Any) -> bool:
    """Whether a node of a guide's trace is the log flow of a partial draw."""
    return node["type"] == "sample" and node["infer"].get("_deterministic", False) and node["name"].startswith(_FLOW)


def _known(run: Run, drawn: Collection[str]) -> list[Any]:
    """Sites of the model that depend on nothing but what has been drawn, since they stand before all else."""
    sites = sample_sites(run.trace)
    return list(itertools.takewhile(lambda site: site["is_observed"] or site["name"] in drawn, sites))
