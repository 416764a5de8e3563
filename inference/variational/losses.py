"""Objectives: functions ``(model, guide, *args, **kwargs) -> Tensor ()`` to be minimised.

The value of an objective is its loss, a sum over all data whatever the minibatch; its gradient is the estimate that
moves the parameters. None reads a value out of a tensor, so that a step can be captured as a graph.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Annotated, Any

import pyro.infer
import torch
from annotated_types import Ge
from pyro import poutine
from pyro.distributions import Unit
from pyro.distributions.util import is_identically_zero, scale_and_mask
from pyro.infer import ELBO, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.util import MultiFrameTensor, get_plate_stacks
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.distributions import kl_divergence

from probmodels.errors import ProblemError
from probmodels.inference.flows.back_and_forth import BackAndForth, refined
from probmodels.inference.flows.balance import (
    Balance,
    DetailedBalance,
    SubTrajectoryBalance,
    TrajectoryBalance,
    VarGrad,
    Weights,
    model_loss,
)
from probmodels.inference.flows.exploration import drawn, with_values
from probmodels.inference.flows.seeding import AnnealedVarGrad
from probmodels.inference.problem import Problem
from probmodels.inference.programs.minibatch import whole
from probmodels.inference.programs.traces import by_datum, plate_scale, sample_sites, scored, shared_plates
from probmodels.inference.runtime.ops import Unobserve, isolated, part as of_prefix
from probmodels.options import Natural, Particles, checked, hint

__all__ = [
    "BALANCES",
    "Composite",
    "KLWeight",
    "Objective",
    "SampledBound",
    "Sleep",
    "chosen_rows",
    "make_loss",
    "objective_of",
    "refuse_auxiliary",
    "row_index",
    "wake",
    "wake_phi",
]

Objective = Callable[..., Tensor]

BALANCES: dict[str, Callable[..., Balance]] = {
    kind.__name__: kind
    for kind in (AnnealedVarGrad, BackAndForth, DetailedBalance, SubTrajectoryBalance, TrajectoryBalance, VarGrad)
}
"""Objectives of flow networks by name, as ``Problem.loss`` and phases may say it."""


def make_loss(problem: Problem, num_particles: int | None = None) -> Any:
    """The loss of a problem, from its name in ``pyro.infer`` or among ours, or as a copy of the one it holds."""
    if isinstance(problem.loss, ELBO):
        loss = copy.deepcopy(problem.loss)
    else:
        classes = {name: kind for name, kind in vars(pyro.infer).items() if isinstance(kind, type)}
        kinds: dict[str, Callable[..., Any]] = {
            name: kind for name, kind in classes.items() if issubclass(kind, ELBO) and kind is not ELBO
        }
        kinds |= BALANCES
        if problem.loss not in kinds:
            raise ProblemError(
                f"{problem.name}: loss {problem.loss!r} is no ELBO of pyro.infer and no objective of ours"
                f"{hint(problem.loss, sorted(kinds))}"
            )
        loss = kinds[problem.loss]()
    if num_particles is not None:
        loss.num_particles = num_particles
    return loss


def objective_of(loss: Any) -> Objective | ELBO:
    """A loss as an objective that can be captured, where it is one of Pyro's two that we know or says how by a method
    ``as_objective``; otherwise itself."""
    if hasattr(loss, "as_objective"):
        return loss.as_objective()
    particles: dict[type[Any], Any] = {Trace_ELBO: _trace_particle, TraceMeanField_ELBO: _mean_field_particle}
    particle = particles.get(type(loss))
    if particle is None:
        return loss

    return partial(_negative_elbo, loss, particle)


def _negative_elbo(loss: Any, particle: Any, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Minus the mean over particles."""
    total: Any = 0.0
    for model_trace, guide_trace in loss._get_traces(model, guide, args, kwargs):
        total = total - particle(model_trace, guide_trace) / loss.num_particles
    return total


def _trace_particle(model_trace: Any, guide_trace: Any) -> Tensor:
    """ELBO of one particle with the gradient of `pyro.infer.Trace_ELBO`: pathwise, and by the score where it must."""
    elbo: Any = 0.0
    surrogate: Any = 0.0
    log_ratio = None
    for site in sample_sites(model_trace):
        elbo, surrogate = elbo + site["log_prob_sum"], surrogate + site["log_prob_sum"]
    for site in sample_sites(guide_trace):
        _, score, entropy = site["score_parts"]
        elbo = elbo - site["log_prob_sum"]
        if not is_identically_zero(entropy):
            surrogate = surrogate - entropy.sum()
        if not is_identically_zero(score):
            log_ratio = log_ratio or _log_ratio(model_trace, guide_trace)
            surrogate = surrogate + (log_ratio.sum_to(site["cond_indep_stack"]) * score).sum()
    # The value of one and the gradient of the other.
    return surrogate + (elbo - surrogate).detach()


def _log_ratio(model_trace: Any, guide_trace: Any) -> Any:
    """log p - log q by plate, so that a score term is weighted by no more than what it can change."""
    log_ratio = MultiFrameTensor()
    stacks = get_plate_stacks(model_trace)
    for site in sample_sites(model_trace):
        term = site["log_prob"]
        if not site["is_observed"]:
            term = term - guide_trace.nodes[site["name"]]["log_prob"]
        log_ratio.add((stacks[site["name"]], term.detach()))
    return log_ratio


def _mean_field_particle(model_trace: Any, guide_trace: Any) -> Tensor:
    """ELBO of one particle as `pyro.infer.TraceMeanField_ELBO` has it: analytic KL divergences where there are any."""
    elbo: Any = 0.0
    for site in sample_sites(model_trace):
        if site["is_observed"]:
            elbo = elbo + site["log_prob_sum"]
            continue
        other = guide_trace.nodes[site["name"]]
        try:
            divergence = kl_divergence(other["fn"], site["fn"])
        except NotImplementedError:
            elbo = elbo + site["log_prob_sum"] - other["score_parts"].entropy_term.sum()
        else:
            # A guide may lack axes of the plates that it stands in.
            divergence = torch.as_tensor(divergence).expand(other["fn"].batch_shape)
            elbo = elbo - scale_and_mask(divergence, scale=other["scale"], mask=other["mask"]).sum()
    for site in sample_sites(guide_trace):
        if site["name"] not in model_trace.nodes:
            elbo = elbo - site["score_parts"].entropy_term.sum()
    return elbo


class SampledBound(TraceMeanField_ELBO):
    """`pyro.infer.TraceMeanField_ELBO` of programs with factors that estimate a bound, not a density.

    The log ratio of such a model and its guide has the bound for its mean, but its exponential is no importance weight:
    results keep it by the name ``bound``, and diagnostics do not judge it by k-hat.
    """

    estimates_bound = True

    def as_objective(self) -> Objective:
        """As of the class it stems from."""
        return partial(_negative_elbo, self, _mean_field_particle)


class KLWeight(Messenger):
    """Weigh the log densities of latent sites, so that an ELBO weighs its KL divergence.

    Parameters
    ----------
    weight
        Number or tensor ().
    guide
        Whether the program is a guide, all of whose sites count.
    """

    def __init__(self, weight: Any, *, guide: bool) -> None:
        super().__init__()
        self.weight, self.guide = weight, guide

    def _pyro_sample(self, msg: Any) -> None:
        if not isinstance(msg["fn"], _Subsample) and (self.guide or not msg["is_observed"]):
            msg["scale"] = msg["scale"] * self.weight


class Composite:
    """An objective, others added to it by weight, and a power of the reward.

    Its value is that of the first objective, so that it can be followed while weights change; its gradient is that of
    the sum.

    Parameters
    ----------
    parts
        Objectives by name, the first one first.
    tempered
        Names of those that see p(x, z) to a power.
    values
        Numbers or tensors () by name: weights of the others, 1 where there is none, and ``reward_power``.
    """

    def __init__(
        self, parts: Mapping[str, Objective], tempered: Collection[str] = (), values: Mapping[str, Any] | None = None
    ) -> None:
        self.parts, self.tempered, self.values = dict(parts), tempered, values or {}

    def at(self, values: Mapping[str, Any]) -> Composite:
        """The same at other values; what its objectives remember is shared."""
        return Composite(self.parts, self.tempered, values)

    def state_dict(self) -> dict[str, Any]:
        """What the objectives remember, by name."""
        states: dict[str, Any] = {name: getattr(part, "state_dict", dict)() for name, part in self.parts.items()}
        return {f"{name}/{key}": value for name, state in states.items() for key, value in state.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Remember what `state_dict` returned."""
        for name, part in self.parts.items():
            if hasattr(part, "load_state_dict"):
                part.load_state_dict(of_prefix(state, f"{name}/"))

    def __call__(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        first, *others = self.parts
        total: Any = self._run(first, model)(guide, *args, **kwargs)
        for name in others:
            loss = self._run(name, model)(guide, *args, **kwargs)
            total = total + self.values.get(name, 1.0) * (loss - loss.detach())
        return total

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Any:
        """Loss after the checks of all objectives."""
        first, *_ = [self._run(name, model, "loss")(guide, *args, **kwargs) for name in self.parts]
        return first

    def prepare(self, *args: Any) -> str | None:
        """What the objectives do before the first step, in words."""
        said = [part.prepare(*args) for part in self.parts.values() if hasattr(part, "prepare")]
        return "; ".join(filter(None, said)) or None

    def _run(self, name: str, model: Any, how: str = "__call__") -> Callable[..., Any]:
        """An objective, or a method of it, with its model at the present power."""
        part: Any = self.parts[name]
        if name in self.tempered:
            power = self.values.get("reward_power", 1.0)
            if hasattr(part, "powered"):
                part = part.powered(power)
            else:
                model = poutine.scale(model, scale=power)
        return partial(getattr(part, how, part), model)


@checked(ProblemError)
def wake(num_particles: Particles = 1, weights: Weights | None = None, refine: Natural = 0) -> Objective:
    """Objective of a model: the importance-weighted bound on -log p(data), or -log p(data, z), at draws of the guide.

    For every datum the bound is log mean_k p(x, z_k) / q(z_k | x), where the latent sites and the data share a plate;
    without one it is that of all data together. The guide is held fixed.

    Parameters
    ----------
    num_particles
        Draws of the guide.
    weights
        How they weigh; see `model_loss`. None for ``"importance"``, or for ``"equal"`` where they are refined.
    refine
        Metropolis-Hastings moves of every draw towards the posterior; see `probmodels.inference.flows.back_and_forth`.
        Importance weights of what they lead to are not known.

    References
    ----------
    J. Bornschein, Y. Bengio, Reweighted wake-sleep, ICLR 2015, https://arxiv.org/abs/1406.2751
    """
    if refine and weights == "importance":
        raise ProblemError(f"weights='importance' of wake does not go with refine={refine}; choose 'equal' or 'best'")
    chosen = weights or ("equal" if refine else "importance")

    def bound(model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        log_p, log_q = [], []
        for _ in range(num_particles):
            draw = drawn(guide, args, kwargs)
            draw = refined(model, guide, draw, refine, args, kwargs) if refine else draw
            trace = scored(model, draw, args, kwargs)
            shared = shared_plates(trace, draw)
            log_p.append(by_datum(trace, shared))
            log_q.append(torch.zeros_like(log_p[-1]) if refine else by_datum(draw, shared))
        return plate_scale(shared) * model_loss(torch.stack(log_p), torch.stack(log_q), chosen).sum()

    return bound


@checked(ProblemError)
def wake_phi(num_particles: Annotated[int, Ge(2)] = 8) -> Objective:
    """Objective of a guide: cross entropy from the posterior, estimated by self-normalised importance sampling.

    Its draws come from the guide itself, held fixed; no gradient passes through them, so that discrete sites are fine.
    The weights are those of `wake`.

    Parameters
    ----------
    num_particles
        Draws of the guide, at least 2.

    References
    ----------
    J. Bornschein, Y. Bengio, Reweighted wake-sleep, ICLR 2015, https://arxiv.org/abs/1406.2751
    """

    def cross_entropy(model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        weights, logs = [], []
        for _ in range(num_particles):
            draw = drawn(guide, args, kwargs)
            with torch.no_grad():
                trace = scored(model, draw, args, kwargs)
            shared = shared_plates(trace, draw)
            logs.append(by_datum(scored(guide, draw, args, kwargs), shared))
            weights.append(by_datum(trace, shared) - logs[-1].detach())
        return -plate_scale(shared) * (torch.stack(weights).softmax(0) * torch.stack(logs)).sum()

    return cross_entropy


class Sleep:
    """Objective of a guide: -log q(z | x) at latent and observed sites dreamed by the model.

    Parameters
    ----------
    problem
        Holds the data.
    observed_args
        Observed site to the argument that holds its data: a position in ``args`` or a name in ``kwargs``; or a function
        ``(args, kwargs, dreams) -> (args, kwargs)``. None where every site's data is an argument as it stands.
    plates
        Plates of which a step sees some rows: there dreams take the place of those rows.
    num_particles
        Dreams of each step.

    Raises
    ------
    ProblemError
        If the data of a site is not found among the arguments, or the model has factors, which no dream obeys.

    References
    ----------
    G. E. Hinton, P. Dayan, B. J. Frey, R. M. Neal, The wake-sleep algorithm for unsupervised neural networks, Science
    268 (1995), https://doi.org/10.1126/science.7761831
    """

    def __init__(
        self,
        problem: Problem,
        observed_args: Mapping[str, int | str] | Callable[..., Any] | None = None,
        plates: Collection[str] = (),
        num_particles: int = 1,
    ) -> None:
        self._problem, self._plates, self._count = problem, set(plates), num_particles
        self._names = problem.names("observed")
        with isolated(seed=0), torch.no_grad(), whole(problem)():
            trace: Any = poutine.trace(problem.model).get_trace(*problem.args, **problem.kwargs)
        factors = [site["name"] for site in sample_sites(trace) if isinstance(site["fn"], Unit)]
        if factors:
            raise ProblemError(
                f"{problem.name}: the model cannot be dreamed from, since its factors {factors} are no distributions; "
                "leave out the sleep phase, or write them as sample sites"
            )
        self._insert = observed_args if callable(observed_args) else None
        values = {name: trace.nodes[name]["value"] for name in self._names}
        self._shapes = {name: value.shape for name, value in values.items()}
        self._places = {} if callable(observed_args) else _arguments(problem, values, observed_args or {})

    def __call__(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        total: Any = 0.0
        for _ in range(self._count):
            with torch.no_grad():
                dream: Any = poutine.trace(Unobserve()(model)).get_trace(*args, **kwargs)
                dreamed, dreamed_kwargs = self._inserted(dream, args, kwargs)
                if hasattr(guide, "retrace"):
                    values = {site["name"]: site["value"] for site in sample_sites(dream)}
                    dream = with_values(dream, guide.retrace(values, *dreamed, **dreamed_kwargs))
            trace = scored(guide, dream, dreamed, dreamed_kwargs)
            refuse_auxiliary(self._problem, trace, dream)
            total = total - trace.log_prob_sum() / self._count
        return total

    def _inserted(self, dream: Any, args: Any, kwargs: Any) -> Any:
        """Arguments with dreams in the place of data."""
        if self._insert is not None:
            return self._insert(args, kwargs, {name: dream.nodes[name]["value"] for name in self._names})
        places: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
        for name, place in self._places.items():
            given, node, shape = places[place], dream.nodes[name], self._shapes[name]
            rows = row_index(shape, node["fn"].event_dim, node["cond_indep_stack"], chosen_rows(dream, self._plates))
            value = node["value"].to(given.dtype)
            full = value if not rows else given.reshape(shape).index_put(rows, value)
            places[place] = full.reshape(given.shape)
        return tuple(places[i] for i in range(len(args))), {key: places[key] for key in kwargs}


def chosen_rows(trace: Any, plates: Collection[str]) -> dict[str, Tensor]:
    """Indices of plates that hold some of their rows, or all of them in another order."""
    nodes = {name: node for name, node in trace.nodes.items() if isinstance(node.get("fn"), _Subsample)}
    return {name: n["value"] for name, n in nodes.items() if name in plates or len(n["value"]) < n["fn"].size}


def row_index(
    shape: Sequence[int], event_dim: int, frames: Sequence[Any], chosen: Mapping[str, Tensor]
) -> tuple[Any, ...]:
    """Index, axis by axis, of the rows that plates chose of a tensor with all rows; empty where they chose none."""
    axes = {len(shape) - event_dim + frame.dim: chosen[frame.name] for frame in frames if frame.name in chosen}
    axes = {axis: rows for axis, rows in axes.items() if axis >= 0 and shape[axis] > 1}
    if not axes:
        return ()
    index = [axes[axis] if axis in axes else torch.arange(size) for axis, size in enumerate(shape)]
    return tuple(rows.reshape([-1] + [1] * (len(shape) - axis - 1)) for axis, rows in enumerate(index))


def _arguments(problem: Problem, values: Mapping[str, Tensor], given: Mapping[str, int | str]) -> dict[str, int | str]:
    """Which argument holds the data of each observed site."""
    places: dict[Any, Any] = {**dict(enumerate(problem.args)), **problem.kwargs}
    unknown = [name for name in given if name not in values]
    if unknown:
        raise ProblemError(f"{problem.name}: observed_args names {unknown}; the observed sites are {sorted(values)}")
    found: dict[str, int | str] = {}
    for name, value in values.items():
        fits = {key: arg for key, arg in places.items() if isinstance(arg, Tensor) and arg.numel() == value.numel()}
        if name in given:
            if given[name] not in fits:
                raise ProblemError(
                    f"{problem.name}: observed_args puts site {name!r}, of shape {tuple(value.shape)}, into argument "
                    f"{given[name]!r}, which holds no such tensor; choose from {list(places)} or give a function"
                )
            found[name] = given[name]
            continue
        equal = [key for key, arg in fits.items() if arg is value or torch.equal(arg.reshape(value.shape), value)]
        if len(equal) != 1:
            raise ProblemError(
                f"{problem.name}: the data of site {name!r} is {'no' if not equal else 'more than one'} argument of "
                f"the model as it stands; say which one holds it: observed_args={{{name!r}: position or name}}, or a "
                "function (args, kwargs, dreams) -> (args, kwargs)"
            )
        found[name] = equal[0]
    return found


def refuse_auxiliary(problem: Problem, trace: Any, known: Any) -> None:
    """Error where a guide draws what the model does not know: its density of the rest alone is unknown then."""
    names = known.nodes if hasattr(known, "nodes") else known
    extra = [site["name"] for site in sample_sites(trace) if site["name"] not in names]
    if extra:
        raise ProblemError(
            f"{problem.name}: the guide has auxiliary sites {extra}, so that its density of the model's sites is not "
            "known; use the phases e_step or wake_phi, or an objective of your own"
        )
