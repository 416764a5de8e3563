"""How good a guide of discrete sites is: against the exact posterior where values can be enumerated, by importance
weights elsewhere. Both speak of each datum by itself, of all together where data share latent sites.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import numpy as np
import pyro
import torch
import xarray as xr
from annotated_types import Interval
from pyro import poutine
from scipy.special import logsumexp
from torch import Tensor

from probmodels.errors import ProblemError, ResultError
from probmodels.inference.diagnostics.convergence import EQUAL_WEIGHTS, psis
from probmodels.inference.problem import Problem
from probmodels.inference.programs.draws import map_draws
from probmodels.inference.programs.minibatch import whole
from probmodels.inference.programs.programs import fitted
from probmodels.inference.programs.traces import Frames, by_datum, leaf_of, sample_sites, shared_plates
from probmodels.inference.result import Result
from probmodels.inference.runtime.ops import is_generated, isolated
from probmodels.options import Seed, checked

__all__ = ["check_exact", "check_weights", "enumerate_posterior"]

_LIMIT = 100_000
Limit = Annotated[int, Interval(ge=1, le=10**8)]


@checked(ProblemError)
def enumerate_posterior(problem: Problem, result: Result | None = None, *, limit: Limit = _LIMIT) -> xr.Dataset:
    """The exact posterior of a problem all of whose latent sites are discrete, by listing their values.

    Parameters
    ----------
    problem
        What was inferred.
    result
        Result of an engine that fitted parameters of the model; None for the parameters that it starts with.
    limit
        Most configurations to list.

    Returns
    -------
    xr.Dataset
        ``probability`` (configuration, *data) and ``log_evidence`` (*data), where the data dims are the plates that
        all sites share; and the value of every site in each configuration, (configuration, ...) without data dims.

    Raises
    ------
    ProblemError
        If a latent site is continuous or has no finite support, or there are more configurations than ``limit``.
    """
    table = _Table(problem, limit)
    return table.dataset(table.scores(result, guided=False)["log_joint"])


@checked(ProblemError)
def check_exact(problem: Problem, result: Result, *, limit: Limit = _LIMIT) -> xr.Dataset:
    """A fitted guide against the exact posterior.

    A small total variation alone says little of a model: one whose posterior is its prior has none. Look at it beside
    the evidence.

    Parameters
    ----------
    problem
        What was inferred, or the same with other data.
    result
        Result of `fit_svi` or `fit_em`.
    limit
        Most configurations to list.

    Returns
    -------
    xr.Dataset
        By datum: ``total_variation`` between guide q and posterior p, ``kl`` KL(q || p), ``log_evidence`` log p(x),
        ``elbo``, ``mass``, the sum of q over all configurations, 1 but for rounding, ``marginal_error``, the largest
        difference between probabilities of a value of an element; and, where the guide has a site ``log_Z``,
        ``log_z_error``, its difference from the log evidence.

    Raises
    ------
    ProblemError
        As `enumerate_posterior`, or if the guide has auxiliary sites, whose paths would have to be summed.
    """
    table = _Table(problem, limit)
    scores = table.scores(result, guided=True)
    log_joint, log_q = scores["log_joint"], scores["log_q"]
    evidence = logsumexp(log_joint, 0)
    log_p, q = log_joint - evidence, np.exp(log_q)
    # Where q is zero its logarithm is not needed; where only p is, KL(q || p) is infinite, as it should be.
    gap = np.where(q > 0, log_q, 0.0) - np.where(q > 0, log_p, 0.0)
    kl = (q * gap).sum(0)
    found = {
        "total_variation": np.abs(q - np.exp(log_p)).sum(0) / 2,
        "kl": kl,
        "log_evidence": evidence,
        "elbo": evidence - kl,
        "mass": q.sum(0),
        "marginal_error": table.largest_marginal(q - np.exp(log_p)),
    }
    if "log_Z" in scores:
        log_z = scores["log_Z"]
        found["log_z_error"] = (log_z.reshape(evidence.shape) if log_z.size > 1 else log_z.reshape(())) - evidence
    return xr.Dataset({name: (table.data_dims, value) for name, value in found.items()}, coords=table.data_coords)


@checked(ProblemError)
def check_weights(
    problem: Problem, result: Result, *, num_draws: Annotated[int, Interval(ge=100, le=10**7)] = 1000, seed: Seed = 0
) -> xr.Dataset:
    """A fitted guide by its importance weights, where nothing can be enumerated.

    Parameters
    ----------
    problem
        What was inferred, or the same with other data.
    result
        Result of `fit_svi` or `fit_em`.
    num_draws
        Draws of the guide; fewer than 100 tell nothing about their tail.
    seed
        Seed of the draws.

    Returns
    -------
    xr.Dataset
        By datum: ``log_evidence`` log p(x) by importance sampling, whose expectation is a lower bound; its standard
        error ``mcse`` by the delta method; ``elbo``; ``ess``, effective draws; and ``khat``, Pareto k-hat: where it is
        above 0.7 the estimate cannot be trusted, and where weights differ by less than a hundredth it is nan.

    Raises
    ------
    ProblemError
        If there are fewer than 100 draws.
    ResultError
        If the result has no parameters of this problem.

    References
    ----------
    Vehtari, A., Simpson, D., Gelman, A., Yao, Y. and Gabry, J. (2024). Pareto smoothed importance sampling. JMLR 25.
    """
    frames: Frames = {}
    with _programs(problem, result) as (model, guide):
        store, all_rows = pyro.get_param_store(), whole(problem)
        parameters = store.get_state()

        def weigh(_: dict[str, Tensor]) -> dict[str, Tensor]:
            nonlocal frames
            with store.scope(parameters), all_rows():
                draw: Any = poutine.trace(guide).get_trace(*problem.args, **problem.kwargs)
                trace: Any = poutine.trace(poutine.replay(model, trace=draw)).get_trace(*problem.args, **problem.kwargs)
                draw.compute_log_prob()
                trace.compute_log_prob()
                frames = shared_plates(trace, draw)
                return {"log_weight": by_datum(trace, frames) - by_datum(draw, frames)}

        label = f"{problem.name}: weights of the guide"
        weights = map_draws(weigh, {}, (1, num_draws), label=label, seed=seed)["log_weight"]
    dims, coords = _data_dims(problem, frames)
    weights = weights.astype(np.float64).reshape(num_draws, *(len(coords[dim]) for dim in dims))
    scaled = np.exp(weights - weights.max(0))
    mean = scaled.mean(0)
    flat = weights.reshape(num_draws, -1)
    khat = [psis(column)[1] if np.ptp(column) > EQUAL_WEIGHTS else np.nan for column in flat.T]
    found = {
        "log_evidence": weights.max(0) + np.log(mean),
        "mcse": scaled.std(0, ddof=1) / mean / math.sqrt(num_draws),
        "elbo": weights.mean(0),
        "ess": scaled.sum(0) ** 2 / np.square(scaled).sum(0),
        "khat": np.array(khat).reshape(mean.shape),
    }
    return xr.Dataset({name: (dims, value) for name, value in found.items()}, coords=coords)


class _Table:
    """All values of the latent sites in a row of the plates that all sites share.

    Attributes
    ----------
    values
        By site (configuration, *shape), with axes of size 1 for the rows of these plates.
    data_dims, data_coords
        Names and labels of these plates.
    """

    def __init__(self, problem: Problem, limit: int) -> None:
        self._problem = problem
        with isolated(seed=0), torch.no_grad(), whole(problem)():
            nodes: Any = poutine.trace(poutine.block(problem.model, hide_fn=is_generated)).get_trace(
                *problem.args, **problem.kwargs
            )
        frames = shared_plates(nodes)
        self.data_dims, self.data_coords = _data_dims(problem, frames)
        rows, tables, shapes = {frame.dim for frame in frames.values()}, {}, {}
        self._dims: dict[str, list[str]] = {}
        for name in problem.names("latent"):
            site, fn = problem.sites[name], nodes.nodes[name]["fn"]
            leaf = leaf_of(fn)
            tables[name] = _values(problem, name, leaf)
            num_batch = len(site.shape) - fn.event_dim
            row_axes = [axis for axis in range(num_batch) if axis - num_batch in rows]
            elements = site.shape[: len(site.shape) - len(leaf.event_shape)]
            shapes[name] = tuple(1 if axis in row_axes else size for axis, size in enumerate(elements))
            self._dims[name] = [dim for axis, dim in enumerate(site.dims) if axis not in row_axes]
        counts = [len(tables[name]) for name in tables for _ in range(math.prod(shapes[name]))]
        total = math.prod(counts)
        self._counts = counts
        if total > limit:
            raise ProblemError(
                f"{problem.name}: there are {total:.3g} configurations of the latent sites, more than limit={limit:,}; "
                "take check_weights, or a smaller case"
            )
        self._choices = choices = torch.cartesian_prod(*map(torch.arange, counts)).reshape(total, len(counts))
        parts = choices.split([math.prod(shape) for shape in shapes.values()], 1)
        self.values = {
            name: tables[name][part].reshape(total, *shapes[name], *tables[name].shape[1:])
            for name, part in zip(tables, parts, strict=True)
        }

    def scores(self, result: Result | None, *, guided: bool) -> dict[str, np.ndarray]:
        """Log densities (configuration, *data) of the model and, if asked for, of the guide; then its ``log_Z`` too."""
        problem = self._problem
        shapes = {name: problem.sites[name].shape for name in self.values}
        total = len(next(iter(self.values.values())))
        with _programs(problem, result) as (model, guide):
            store, all_rows = pyro.get_param_store(), whole(problem)
            parameters = store.get_state()

            def score(collapsed: dict[str, Tensor]) -> dict[str, Tensor]:
                values = {name: value.expand(shapes[name]) for name, value in collapsed.items()}
                with store.scope(parameters), all_rows():
                    trace = _scored(model, values, problem)
                    frames = shared_plates(trace)
                    found = {"log_joint": by_datum(trace, frames)}
                    if guided:
                        draw = _scored(guide, values, problem)
                        self._check_guide(draw)
                        found["log_q"] = by_datum(draw, frames)
                        if "log_Z" in draw.nodes:
                            found["log_Z"] = draw.nodes["log_Z"]["value"]
                return found

            given = {name: value.unsqueeze(0).cpu().numpy() for name, value in self.values.items()}
            label = f"{problem.name}: configurations"
            found = map_draws(score, given, (1, total), label=label, random=False, progress=total > 2000)
        sizes = [len(self.data_coords[dim]) for dim in self.data_dims]
        out = {name: value[0].astype(np.float64) for name, value in found.items()}
        return {name: value.reshape(total, *sizes) if name != "log_Z" else value[0] for name, value in out.items()}

    def largest_marginal(self, measure: np.ndarray) -> np.ndarray:
        """Largest absolute measure (*data) of a value of an element, from that (configuration, *data) of all."""
        sums = []
        for element, count in enumerate(self._counts):
            hit = self._choices[:, element].numpy()[:, None] == np.arange(count)
            sums.append(np.abs(np.tensordot(hit.astype(float), measure, (0, 0))).max(0))
        return np.max(sums, axis=0)

    def dataset(self, log_joint: np.ndarray) -> xr.Dataset:
        """Probabilities, evidence and values."""
        evidence = logsumexp(log_joint, 0)
        variables: dict[str, Any] = {
            "probability": (("configuration", *self.data_dims), np.exp(log_joint - evidence)),
            "log_evidence": (self.data_dims, evidence),
        }
        sites = self._problem.sites
        for name, value in self.values.items():
            sizes = [sites[name].shape[sites[name].dims.index(dim)] for dim in self._dims[name]]
            variables[name] = (("configuration", *self._dims[name]), value.cpu().numpy().reshape(-1, *sizes))
        known = {
            dim: labels for dim, labels in self._problem.coords.items() if any(dim in d for d in self._dims.values())
        }
        return xr.Dataset(variables, coords={**self.data_coords, **known})

    def _check_guide(self, draw: Any) -> None:
        extra = [site["name"] for site in sample_sites(draw) if site["name"] not in self.values]
        if extra:
            raise ProblemError(
                f"{self._problem.name}: the guide draws {extra} beside the latent sites, so that its density "
                "of a value is a sum over these; take check_weights"
            )


@contextlib.contextmanager
def _programs(problem: Problem, result: Result | None) -> Iterator[tuple[Any, Any]]:
    """Model and guide with the parameters of a result, or the model as it starts; generated sites hidden."""
    if result is not None:
        if result.guide_state is None:
            raise ResultError(f"{problem.name}: the result has no parameters; take one of fit_svi or fit_em")
        result.check_problem(problem, data=False)
        with fitted(problem, result.guide_state, seed=0) as (model, guide):
            yield poutine.block(model, hide_fn=is_generated), guide
        return
    with isolated(seed=0):
        model, _ = problem.programs()
        yield poutine.block(model, hide_fn=is_generated), None


def _scored(program: Any, values: Mapping[str, Tensor], problem: Problem) -> Any:
    """Trace of a program at given values, with its log densities."""
    trace: Any = poutine.trace(poutine.condition(program, dict(values))).get_trace(*problem.args, **problem.kwargs)
    trace.compute_log_prob()
    return trace


def _data_dims(problem: Problem, frames: Frames) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Plates that all sites share, outermost first, and their labels."""
    ordered = sorted(frames.values(), key=lambda frame: frame.dim)
    coords = {frame.name: problem.coords.get(frame.name, np.arange(frame.full_size or frame.size)) for frame in ordered}
    return tuple(coords), coords


def _values(problem: Problem, name: str, leaf: Any) -> Tensor:
    """Values (value, *leaf) of an element of a site."""
    if not problem.sites[name].discrete:
        raise ProblemError(f"{problem.name}: site {name!r} is continuous, so that its values cannot be listed")
    try:
        values: Tensor = leaf.enumerate_support(expand=False)
    except NotImplementedError as error:
        raise ProblemError(
            f"{problem.name}: site {name!r} of distribution {type(leaf).__name__} has no finite list of values"
        ) from error
    return values.reshape(len(values), *leaf.event_shape)
