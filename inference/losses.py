"""Objectives: functions ``(model, guide, *args, **kwargs) -> Tensor ()`` to be minimised.

The value of an objective is its loss, a sum over all data whatever the minibatch; its gradient is the estimate that
moves the parameters. None reads a value out of a tensor, so that a step can be captured as a graph.
"""

from __future__ import annotations

import copy
import difflib
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import pyro.infer
import torch
from pyro import poutine
from pyro.distributions import Unit
from pyro.distributions.util import is_identically_zero, scale_and_mask
from pyro.infer import ELBO, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.util import MultiFrameTensor, get_plate_stacks
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.distributions import kl_divergence

from probmodels.inference.balance import OBJECTIVES
from probmodels.inference.minibatch import whole
from probmodels.inference.ops import Unobserve, isolated
from probmodels.inference.problem import Problem, ProblemError
from probmodels.inference.traces import Frames, by_datum, plate_scale, sample_sites, scored, shared_plates

__all__ = ["KLWeight", "Memory", "Objective", "Sleep", "make_loss", "objective_of", "wake", "wake_phi"]

Objective = Callable[..., Tensor]


def make_loss(problem: Problem, num_particles: int | None = None) -> Any:
    """The loss of a problem, from its name in ``pyro.infer`` or among ours, or as a copy of the one it holds."""
    if isinstance(problem.loss, ELBO):
        loss = copy.deepcopy(problem.loss)
    else:
        kinds = {name: kind for name, kind in vars(pyro.infer).items() if isinstance(kind, type)}
        kinds = {name: kind for name, kind in kinds.items() if issubclass(kind, ELBO) and kind is not ELBO}
        kinds |= OBJECTIVES
        if problem.loss not in kinds:
            close = difflib.get_close_matches(problem.loss, sorted(kinds), n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"choose one of {sorted(kinds)}"
            raise ProblemError(
                f"{problem.name}: loss {problem.loss!r} is no ELBO of pyro.infer and no objective of ours; {hint}"
            )
        loss = kinds[problem.loss]()
    if num_particles is not None:
        if num_particles < 1:
            raise ProblemError(f"{problem.name}: num_particles={num_particles}; it must be at least 1")
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

    def negative_elbo(model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        total: Any = 0.0
        for model_trace, guide_trace in loss._get_traces(model, guide, args, kwargs):
            total = total - particle(model_trace, guide_trace) / loss.num_particles
        return total

    return negative_elbo


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


def wake(num_particles: int = 1) -> Objective:
    """Objective of a model: the importance-weighted bound on -log p(data), the guide being held fixed.

    For every datum the bound is log mean_k p(x, z_k) / q(z_k | x), where the latent sites and the data share a plate;
    without one it is that of all data together.

    Parameters
    ----------
    num_particles
        Draws of the guide; 1 for the ELBO.

    References
    ----------
    J. Bornschein, Y. Bengio, Reweighted wake-sleep, ICLR 2015, https://arxiv.org/abs/1406.2751
    """

    def bound(model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        weights = []
        for _ in range(num_particles):
            draw = _draw(guide, args, kwargs)
            trace = scored(model, draw, args, kwargs)
            shared = shared_plates(trace, draw)
            weights.append(by_datum(trace, shared) - by_datum(draw, shared))
        return -plate_scale(shared) * (torch.stack(weights).logsumexp(0) - math.log(num_particles)).sum()

    return bound


def wake_phi(num_particles: int = 8) -> Objective:
    """Objective of a guide: cross entropy from the posterior, estimated by self-normalised importance sampling.

    Its draws come from the guide itself, held fixed; no gradient passes through them, so that discrete sites are fine.
    See `wake` for the weights.

    Parameters
    ----------
    num_particles
        Draws of the guide, at least 2.

    References
    ----------
    J. Bornschein, Y. Bengio, Reweighted wake-sleep, ICLR 2015, https://arxiv.org/abs/1406.2751
    """
    if num_particles < 2:
        raise ValueError(f"wake_phi weighs draws against each other: num_particles={num_particles} is too few")

    def cross_entropy(model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        weights, logs = [], []
        for _ in range(num_particles):
            draw = _draw(guide, args, kwargs)
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
            trace = scored(guide, dream, dreamed, dreamed_kwargs)
            _refuse_auxiliary(self._problem, trace, dream)
            total = total - trace.log_prob_sum() / self._count
        return total

    def _inserted(self, dream: Any, args: Any, kwargs: Any) -> Any:
        """Arguments with dreams in the place of data."""
        if self._insert is not None:
            return self._insert(args, kwargs, {name: dream.nodes[name]["value"] for name in self._names})
        places: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
        for name, place in self._places.items():
            given, node, shape = places[place], dream.nodes[name], self._shapes[name]
            rows = _rows(shape, node["fn"].event_dim, node["cond_indep_stack"], _chosen(dream, self._plates))
            value = node["value"].to(given.dtype)
            full = value if not rows else given.reshape(shape).index_put(rows, value)
            places[place] = full.reshape(given.shape)
        return tuple(places[i] for i in range(len(args))), {key: places[key] for key in kwargs}


class Memory:
    """Objective of a guide: cross entropy from the best latent values met so far, weighed by p(data, z).

    Every step draws from the guide, keeps for each datum the ``capacity`` different values of largest p(data, z) among
    those drawn and those remembered, and fits the guide to them. See `wake` for what a datum is.

    Parameters
    ----------
    problem
        Holds the data.
    capacity
        Values kept for each datum.
    plates
        Plates of which a step sees some rows.

    References
    ----------
    L. B. Hewitt, T. A. Le, J. B. Tenenbaum, Learning to learn generative programs with Memoised Wake-Sleep, UAI 2020,
    https://arxiv.org/abs/2007.03132
    """

    def __init__(self, problem: Problem, capacity: int = 8, plates: Collection[str] = ()) -> None:
        self._problem, self.capacity, self._plates = problem, capacity, set(plates)
        self._values: dict[str, Tensor] = {}  # (capacity, rows ...) by site
        self._valid: Tensor | None = None  # (capacity, data ...)

    def state_dict(self) -> dict[str, Tensor]:
        """Remembered values by site, and which of them are any."""
        known = {} if self._valid is None else {"valid": self._valid}
        return known | {f"value/{name}": value for name, value in self._values.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Remember what `state_dict` returned."""
        self._valid = state.get("valid")
        self._values = {k.removeprefix("value/"): v for k, v in state.items() if k.startswith("value/")}

    def __call__(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        with torch.no_grad():
            draw = _draw(guide, args, kwargs)
            _refuse_auxiliary(self._problem, draw, self._problem.sites)
            trace = scored(model, draw, args, kwargs)
            shared = shared_plates(trace, draw)
            if self._valid is None:
                self._make(model, guide, args, kwargs)
            kept, weight = self._update(model, draw, by_datum(trace, shared), shared, args, kwargs)
        loss: Any = 0.0
        for slot in range(self.capacity):
            log_q = by_datum(scored(guide, _with(draw, kept, slot), args, kwargs), shared)
            loss = loss - plate_scale(shared) * (weight[slot] * log_q).where(weight[slot] > 0, 0.0).sum()
        return loss

    def _make(self, model: Any, guide: Any, args: Any, kwargs: Any) -> None:
        """Room for the values of all data."""
        with whole(self._problem)():
            draw = _draw(guide, args, kwargs)
            trace = scored(model, draw, args, kwargs)
        size = by_datum(trace, shared_plates(trace, draw))
        self._valid = size.new_zeros((self.capacity, *size.shape), dtype=torch.bool)
        self._values = {
            site["name"]: site["value"].expand(self.capacity, *site["value"].shape).clone()
            for site in sample_sites(draw)
        }

    def _update(
        self, model: Any, draw: Any, score: Tensor, shared: Frames, args: Any, kwargs: Any
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Best values (capacity, ...) by site of the rows at hand, remembered as well, and their weights."""
        assert self._valid is not None
        chosen = _chosen(draw, self._plates)
        sites = {site["name"]: site for site in sample_sites(draw)}
        here: dict[str, Any] = {}
        for name, site in sites.items():
            shape = self._values[name].shape[1:]
            here[name] = (slice(None), *_rows(shape, site["fn"].event_dim, site["cond_indep_stack"], chosen))
        there = (slice(None), *_rows(self._valid.shape[1:], 0, tuple(shared.values()), chosen))
        valid = self._valid[there]
        kept = {name: self._values[name][here[name]] for name in sites}
        scores, repeated = [], torch.zeros_like(score, dtype=torch.bool)
        for slot in range(self.capacity):
            past = _with(draw, kept, slot)
            log_p = by_datum(scored(model, past, args, kwargs), shared)
            scores.append(log_p.where(valid[slot], -torch.inf))
            repeated = repeated | (valid[slot] & _same(draw, past, shared))
        scores.append(score.where(~repeated, -torch.inf))
        best, order = torch.stack(scores).topk(self.capacity, 0)
        for name, site in sites.items():
            candidates = torch.cat([kept[name], site["value"].unsqueeze(0)])
            index = order.reshape(*order.shape, *[1] * site["fn"].event_dim)
            kept[name] = torch.take_along_dim(candidates, index.expand(-1, *candidates.shape[1:]), 0)
            self._values[name][here[name]] = kept[name]
        self._valid[there] = best > -torch.inf
        return kept, best.softmax(0)


def _draw(guide: Any, args: Any, kwargs: Any) -> Any:
    """Trace of a guide that no gradient enters, with its log densities."""
    with torch.no_grad():
        trace = poutine.trace(guide).get_trace(*args, **kwargs)
        trace.compute_log_prob()
    for node in sample_sites(trace):  # or a transform that remembers its result would answer with constants
        node["value"] = node["value"].detach()
    return trace


def _with(trace: Any, values: Mapping[str, Tensor], slot: int) -> Any:
    """Copy of a trace that holds other values."""
    changed = trace.copy()
    for name, value in values.items():
        changed.nodes[name] = {**changed.nodes[name], "value": value[slot]}
    return changed


def _same(left: Any, right: Any, shared: Frames) -> Tensor:
    """Whether two traces hold the same values in each row of the plates."""
    dims = {frame.dim for frame in shared.values()}
    same: Any = torch.tensor(True)
    for site in sample_sites(left):
        equal = site["value"] == right.nodes[site["name"]]["value"]
        equal = equal.flatten(equal.dim() - site["fn"].event_dim).all(-1) if site["fn"].event_dim else equal
        for axis in range(equal.dim()):
            if axis - equal.dim() not in dims:
                equal = equal.all(axis, keepdim=True)
        same = same & equal
    return same


def _chosen(trace: Any, plates: Collection[str]) -> dict[str, Tensor]:
    """Indices of plates that hold some of their rows, or all of them in another order."""
    nodes = {name: node for name, node in trace.nodes.items() if isinstance(node.get("fn"), _Subsample)}
    return {name: n["value"] for name, n in nodes.items() if name in plates or len(n["value"]) < n["fn"].size}


def _rows(shape: Sequence[int], event_dim: int, frames: Sequence[Any], chosen: Mapping[str, Tensor]) -> tuple[Any, ...]:
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


def _refuse_auxiliary(problem: Problem, trace: Any, known: Any) -> None:
    """Error where a guide draws what the model does not know: its density of the rest alone is unknown then."""
    names = known.nodes if hasattr(known, "nodes") else known
    extra = [site["name"] for site in sample_sites(trace) if site["name"] not in names]
    if extra:
        raise ProblemError(
            f"{problem.name}: the guide has auxiliary sites {extra}, so that its density of the model's sites is not "
            "known; use the phases e_step or wake_phi, or an objective of your own"
        )
