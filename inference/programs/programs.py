"""Model and guide of a problem with their parameters: made, checked, saved, put back, drawn from."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pyro
import torch
import xarray as xr
from pyro import poutine
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from probmodels.errors import ProblemError, ResultError
from probmodels.inference.labels import to_dataset
from probmodels.inference.problem import Problem
from probmodels.inference.programs.draws import map_draws
from probmodels.inference.programs.enumeration import Enumeration
from probmodels.inference.programs.minibatch import whole
from probmodels.inference.programs.traces import by_datum, shared_plates
from probmodels.inference.runtime.fingerprints import fingerprint
from probmodels.inference.runtime.ops import Unobserve, is_generated, isolated
from probmodels.inference.runtime.tensors import device_of

__all__ = ["Programs", "cast", "fitted", "opened", "sample_guide", "with_parameters"]

Program = Callable[..., Any]
_WEIGHT, _BY_ROW = "log p - log q", "log p - log q by row"
_MOST_ROWS = 2**23  # numbers of weights by row that are kept


class Programs:
    """Model and guide of a problem, run once so that all their parameters exist.

    Make one by `opened`, inside whose block its parameter store is the current one.

    Parameters
    ----------
    problem
        Is copied.
    memo
        That of other programs in the same store, with which these share what the problems share.

    Attributes
    ----------
    model, guide
        Copies of those of the problem.
    owned
        Names of the parameters that each of ``"model"`` and ``"guide"`` uses.
    """

    def __init__(self, problem: Problem, memo: dict[int, Any] | None = None) -> None:
        self.memo: dict[int, Any] = {} if memo is None else memo
        model, guide = problem.programs(self.memo)
        if guide is None:
            raise ProblemError(f"{problem.name}: this needs a guide and the problem has none; use run_mcmc")
        self.problem, self.model, self.guide = problem, model, guide
        traces = self._run()
        self.owned = {
            role: {name for name, node in trace.nodes.items() if node["type"] == "param"}
            for role, trace in traces.items()
        }
        self._outline = {role: _outline(trace) for role, trace in traces.items()}
        copied = {id(p) for part in (model, guide) if isinstance(part, nn.Module) for p in part.parameters()}
        # Modules and tensors that functions hold are not copied with them, but pyro trains them in place.
        self._borrowed = [(p, p.detach().clone()) for p in self.params().values() if id(p) not in copied]

    def params(self) -> dict[str, Tensor]:
        """Unconstrained parameters by name."""
        return dict(pyro.get_param_store().named_parameters())

    def buffers(self) -> dict[str, Tensor]:
        """Buffers of the modules by ``<role>/<name>``."""
        parts = (("model", self.model), ("guide", self.guide))
        named = {role: part.named_buffers() for role, part in parts if isinstance(part, nn.Module)}
        return {f"{role}/{name}": value for role, buffers in named.items() for name, value in buffers}

    @contextlib.contextmanager
    def standing_in(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Run programs with other tensors in the place of parameters, through which derivatives pass.

        Parameters
        ----------
        values
            By name, of the shapes of the unconstrained parameters.
        """
        params = self.params()
        with _StandIns({id(params[name]): value for name, value in values.items()}):
            yield

    def moved_by(self, moves: str) -> list[str]:
        """Names of the parameters of the ``"guide"`` alone, of the ``"model"``, or of ``"both"``."""
        names = {"guide": self.owned["guide"] - self.owned["model"], "model": self.owned["model"]}
        return [name for name in self.params() if moves == "both" or name in names[moves]]

    def check_stable(self) -> None:
        """Check that a second run has the sites of the first.

        Raises
        ------
        ProblemError
            If sites come, go or change their shape between runs.
        """
        for role, trace in self._run().items():
            before, after = self._outline[role], _outline(trace)
            for name in sorted(set(before) | set(after)):
                if before.get(name) != after.get(name):
                    shapes = [f"shape {found[name]}" if name in found else "absent" for found in (before, after)]
                    raise ProblemError(
                        f"{self.problem.name}: site {name!r} of the {role} changes between two runs: {shapes[0]}, then "
                        f"{shapes[1]}; sites and shapes have to stay the same, so mask what is not always there "
                        "(poutine.mask) rather than leave it out"
                    )

    def state(self) -> dict[str, Tensor]:
        """Parameters and buffers as they are, to go on from."""
        state = {f"param/{name}": value for name, value in self.params().items()}
        return state | {f"buffer/{name}": value for name, value in self.buffers().items()}

    def result_state(self) -> dict[str, Tensor]:
        """Copies of parameters and buffers for a result, constrained values beside those that differ from them."""
        state = {name: value.detach().cpu().clone() for name, value in self.state().items()}
        store = pyro.get_param_store()
        for name, raw in store.named_parameters():
            value = store[name].detach()
            if value.shape != raw.shape or not torch.equal(value, raw):
                state[f"constrained/{name}"] = value.cpu().clone()
        return state

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take parameters and buffers from what `state` or `result_state` returned.

        Raises
        ------
        ResultError
            If the parameters are not those of this problem.
        """
        self.load_params({k.removeprefix("param/"): v for k, v in state.items() if k.startswith("param/")})
        for name, buffer in self.buffers().items():
            saved = state.get(f"buffer/{name}")
            if saved is not None and saved.shape == buffer.shape:
                buffer.copy_(saved)

    def load_params(self, saved: Mapping[str, Tensor]) -> None:
        """Take parameters by name; see `load`."""
        current = self.params()
        differing = sorted(set(saved) ^ set(current)) or [k for k in current if saved[k].shape != current[k].shape]
        if differing:
            raise ResultError(
                f"{self.problem.name}: the saved parameters do not fit model and guide; they differ in {differing}"
            )
        with torch.no_grad():
            for key, value in current.items():
                value.copy_(saved[key])

    def end_training(self) -> None:
        """Modules leave out what is for fitting alone, such as dropout."""
        for program in (self.model, self.guide):
            if isinstance(program, nn.Module):
                program.eval()

    def put_back(self) -> None:
        """Give parameters that are not ours the values that they came with."""
        with torch.no_grad():
            for parameter, value in self._borrowed:
                parameter.copy_(value)

    def _run(self) -> dict[str, Any]:
        """Traces of guide and model; automatic guides and lazy parameters come into being in a first run only."""
        args, kwargs = self.problem.args, self.problem.kwargs
        with torch.no_grad():
            guide: Any = poutine.trace(self.guide).get_trace(*args, **kwargs)
            model = poutine.trace(poutine.replay(self.model, trace=guide)).get_trace(*args, **kwargs)
        return {"guide": guide, "model": model}


class _StandIns(TorchFunctionMode):
    """Give operations other tensors in the place of some, wherever a program keeps these."""

    def __init__(self, values: Mapping[int, Tensor]) -> None:
        super().__init__()
        self._values = values

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation of torch."""
        return func(*self._all(args), **{key: self._one(value) for key, value in (kwargs or {}).items()})

    def _one(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._values.get(id(value), value)
        return self._all(value) if type(value) in (list, tuple) else value

    def _all(self, values: Any) -> Any:
        return type(values)([self._one(value) for value in values])


@contextlib.contextmanager
def opened(problem: Problem, seed: int) -> Iterator[Programs]:
    """Programs of a problem inside a parameter store of their own; nothing outside it is changed in the end."""
    with isolated(seed):
        programs = Programs(problem)
        try:
            yield programs
        finally:
            programs.put_back()


@contextlib.contextmanager
def fitted(problem: Problem, state: Mapping[str, Tensor], *, seed: int) -> Iterator[tuple[Program, Program]]:
    """Model and guide of a problem with saved parameters, inside their parameter store.

    Raises
    ------
    ResultError
        If the parameters are not those of this problem.
    """
    if problem.guide is None:
        raise ResultError(f"{problem.name}: the result has the state of a guide, but the problem has no guide")
    with opened(problem, seed) as programs:
        programs.load(state)
        programs.end_training()
        yield programs.model, programs.guide


@contextlib.contextmanager
def with_parameters(problem: Problem, state: Mapping[str, Tensor] | None) -> Iterator[Problem]:
    """The problem with the saved parameters in its model; the problem itself where the model has none of its own.

    Raises
    ------
    ResultError
        If the parameters are not those of this problem.
    """
    with isolated(seed=0), torch.no_grad():
        nodes: Any = poutine.trace(problem.model).get_trace(*problem.args, **problem.kwargs).nodes
    if not state or not any(node["type"] == "param" for node in nodes.values()):
        yield problem
        return
    with fitted(problem, state, seed=0) as (model, _):
        store = pyro.get_param_store()
        parameters = store.get_state()

        def run(*args: Any, **kwargs: Any) -> Any:
            with store.scope(parameters):
                return model(*args, **kwargs)

        yield dataclasses.replace(problem, model=run)


def sample_guide(
    problem: Problem, model: Program, guide: Program, *, num_samples: int, predict: bool = False
) -> tuple[dict[str, np.ndarray], xr.Dataset]:
    """Draw from a fitted guide and complete the draws with the model.

    Parameters
    ----------
    problem
        Names the sites.
    model, guide
        Fitted programs, inside the parameter store that holds their parameters.
    num_samples
        Number of draws.
    predict
        Draw new values of the observed sites as well.

    Returns
    -------
    tuple
        Arrays (1, draw, ...) by site, of transient sites their mean (...) and, as ``<site>_sd``, sd; and a dataset of
        log p - log q of each draw, ``log_weight``, and where all sites share plates, of each of their rows,
        ``log_weight_by_row``, unless that were too many numbers; ``bound`` with the loss `SampledBound`.
    """
    kinds = ("latent", "generated", "deterministic") + (("observed",) if predict else ())
    names = problem.names(*kinds)
    program = Unobserve()(model) if predict else model
    store = pyro.get_param_store()
    parameters, all_rows = store.get_state(), whole(problem)
    # Sites that the loss sums out and the guide leaves out are drawn from their exact conditional.
    summed = [site.name for site in problem.sites.values() if site.enumerated]
    enumeration = Enumeration(dataclasses.replace(problem, model=model)) if summed else None
    sizes: dict[str, int] = {}  # of plates that all sites share

    def draw(_: dict[str, Tensor]) -> dict[str, Tensor]:
        with store.scope(parameters), all_rows():
            guide_trace: Any = poutine.trace(guide).get_trace(*problem.args, **problem.kwargs)
            replayed: Any = poutine.replay(program, trace=guide_trace)
            left = [name for name in summed if name not in guide_trace.nodes]
            joint = None
            if left and enumeration is not None:
                drawn = {n: node["value"] for n, node in guide_trace.nodes.items() if node["type"] == "sample"}
                replayed = poutine.condition(replayed, enumeration.assign(drawn, left, 1))
                joint = enumeration.joint(drawn)
            trace: Any = poutine.trace(replayed).get_trace(*problem.args, **problem.kwargs)
        values = {name: trace.nodes[name]["value"] for name in names}
        if joint is not None:
            return {**values, _WEIGHT: joint - _log_joint(guide_trace)}
        scored = _without_generated(trace)
        scored.compute_log_prob()
        guide_trace.compute_log_prob()
        weight = {_WEIGHT: _log_joint(scored) - _log_joint(guide_trace)}
        frames = shared_plates(scored, guide_trace)
        if frames and math.prod(frame.size for frame in frames.values()) * num_samples <= _MOST_ROWS:
            sizes.update((frame.name, frame.size) for frame in sorted(frames.values(), key=lambda frame: frame.dim))
            by_row = by_datum(scored, frames) - by_datum(guide_trace, frames)
            weight[_BY_ROW] = by_row.reshape(list(sizes.values()))
        return values | weight

    seed = int(torch.randint(2**31, ()))
    label = f"{problem.name}: draws of the guide"
    device = device_of(problem.args, problem.kwargs, problem.model)
    draws = map_draws(draw, {}, (1, num_samples), label=label, seed=seed, moments=problem.transient, device=device)
    what = "bound" if getattr(problem.loss, "estimates_bound", False) else "log_weight"
    weights = {what: draws.pop(_WEIGHT).astype(np.float64)}
    if _BY_ROW in draws:
        weights[f"{what}_by_row"] = draws.pop(_BY_ROW).astype(np.float64)
    return draws, to_dataset(weights, {f"{what}_by_row": list(sizes)}, problem.coords)


def cast(problem: Problem, dtype: torch.dtype) -> Problem:
    """The same problem with all floating-point tensors and modules of one type."""
    return problem.mapped(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)


def identity(problem: Problem) -> dict[str, Any]:
    """All of a problem that decides the numbers of a fit, JSON-ready."""
    guide: Any = problem.guide
    if isinstance(guide, nn.Module):  # without starting values, which a resumed fit overwrites
        shapes = {name: list(value.shape) for name, value in guide.named_parameters()}
        guide = {"class": fingerprint(type(guide)), "parameters": shapes}
    found = {
        "problem": problem.name,
        "model": fingerprint(problem.model),
        "guide": fingerprint(guide),
        "loss": fingerprint(problem.loss),
        "args": fingerprint(problem.args),
        "kwargs": fingerprint(problem.kwargs),
    }
    if problem.outer is not None:
        found["outer"] = [identity(other) for other in problem.outer.problems()]
        found["hyper"] = {name: repr(constraint) for name, constraint in problem.outer.hyper.items()}
    return found


def _without_generated(trace: Any) -> Any:
    """The trace without its generated sites."""
    kept = trace.copy()
    for name, node in trace.nodes.items():
        if node["type"] == "sample" and is_generated(node):
            kept.remove_node(name)
    return kept


def _log_joint(trace: Any) -> Tensor:
    """Log density of a trace without its generated sites."""
    return torch.as_tensor(trace.log_prob_sum(site_filter=lambda name, site: not is_generated(site)))


def _outline(trace: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of the sample sites of a trace by name."""
    nodes: Mapping[str, Any] = trace.nodes
    return {
        name: tuple(node["value"].shape)
        for name, node in nodes.items()
        if node["type"] == "sample" and not isinstance(node["fn"], _Subsample) and not is_generated(node)
    }
