"""What follows from posterior draws: deterministic, generated and discrete sites, predictions, log likelihoods.

Every function here runs the model at all draws at once where the model can be captured as a graph, else draw by draw
(`probmodels.inference.programs.draws`). Random numbers depend on ``seed``, the chain and the place of the draw.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from pyro import poutine
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from probmodels.errors import ProblemError
from probmodels.inference.labels import to_dataset
from probmodels.inference.problem import Problem
from probmodels.inference.programs.draws import map_draws
from probmodels.inference.programs.enumeration import Enumeration
from probmodels.inference.runtime.memory import check_memory
from probmodels.inference.runtime.ops import Unobserve, is_generated, isolated
from probmodels.inference.runtime.tensors import device_of
from probmodels.options import Draws, Seed, checked

__all__ = [
    "check_observed",
    "complete",
    "discrete_marginals",
    "infer_discrete",
    "log_likelihood",
    "posterior_predictive",
    "prior_predictive",
    "thin",
]

_COMPLETE, _PREDICT, _DISCRETE = 1, 2, 3  # random streams of a run, beside those of its chains


def complete(
    problem: Problem, draws: Mapping[str, np.ndarray], *, seed: int, progress: bool = False
) -> dict[str, np.ndarray]:
    """Add the deterministic, generated and discrete sites that posterior draws lack.

    Discrete sites are drawn from their exact conditional distribution given the continuous ones and the data.

    Parameters
    ----------
    problem
        The problem that was inferred.
    draws
        Latent sites, arrays (chain, draw, ...).
    seed
        Seed of the run; every chain draws from its own stream.
    progress
        Whether to show a progress bar.

    Returns
    -------
    dict
        All sites, in the order of the model where it knows them; of transient ones mean and sd, as `map_draws` has it.

    Raises
    ------
    ProblemError
        If draws lack a site that cannot be recomputed, or have another shape than the model.
    """
    wanted = problem.names("deterministic", "generated")
    missing = [n for n, site in problem.sites.items() if n not in draws and (n in wanted or site.discrete)]
    if missing:
        given = _latent(problem, draws)
        values = _simulate(problem, given, missing, problem.model, seed, _COMPLETE, progress=progress)
        draws = {**draws, **values}
    order = [name for name in problem.sites if name in draws]
    return {name: draws[name] for name in [*order, *(name for name in draws if name not in order)]}


@checked(ProblemError)
def posterior_predictive(
    problem: Problem, posterior: xr.Dataset, *, seed: Seed = 0, progress: bool = False
) -> xr.Dataset:
    """New values of the observed sites, one per posterior draw.

    Parameters
    ----------
    problem
        The problem that was inferred, or one with other data of the same latent sites.
    posterior
        Draws with dims (chain, draw, ...). Discrete sites that it lacks are drawn given the data of ``problem``.
    seed
        Seed of the new values.
    progress
        Whether to show a progress bar.

    Returns
    -------
    xr.Dataset
        Observed sites with dims (chain, draw, ...).

    Raises
    ------
    ProblemError
        If the model observes nothing, or the posterior lacks sites, has other shapes than the model, or holds NaN.
    """
    check_observed(problem)
    observed, given = problem.names("observed"), _latent(problem, _arrays(problem, posterior))
    program = Unobserve()(problem.model)
    values = _simulate(problem, given, observed, program, seed, _PREDICT, progress=progress)
    return to_dataset(values, problem.dims(), problem.coords)


@checked(ProblemError)
def prior_predictive(
    problem: Problem, *, num_samples: Draws = 500, seed: Seed = 0, progress: bool = False
) -> xr.Dataset:
    """All sites of the model, observed ones included, drawn from the prior.

    Parameters
    ----------
    problem
        The problem.
    num_samples
        Number of draws.
    seed
        Seed of the draws.
    progress
        Whether to show a progress bar.

    Returns
    -------
    xr.Dataset
        Dims (chain=1, draw, ...).

    Raises
    ------
    ProblemError
        If an option is out of range, the draws do not fit into memory, or a prior is improper.
    """
    problem.check_proper()
    size = num_samples * sum(math.prod(site.shape) for site in problem.sites.values())
    check_memory(problem.name, 8 * size, torch.device("cpu"), f"{num_samples} draws", "take fewer of them")
    program, names = Unobserve()(problem.model), list(problem.sites)
    values = _simulate(problem, {}, names, program, seed, _PREDICT, shape=(1, num_samples), progress=progress)
    return to_dataset(values, problem.dims(), problem.coords)


@checked(ProblemError)
def log_likelihood(problem: Problem, posterior: xr.Dataset, *, progress: bool = False) -> xr.Dataset:
    """Pointwise log likelihood of the observed sites.

    Discrete latent sites are enumerated, as over the component of each point of a mixture, whether the posterior
    holds draws of them or not; those of infinite support are taken from the posterior.

    Parameters
    ----------
    problem
        The problem that was inferred.
    posterior
        Draws with dims (chain, draw, ...).
    progress
        Whether to show a progress bar.

    Returns
    -------
    xr.Dataset
        Observed sites with dims (chain, draw, batch dims of the site).

    Raises
    ------
    ProblemError
        If the model observes nothing; the posterior lacks sites, has other shapes than the model or holds NaN; points
        share discrete sites, as in a hidden Markov model, so that their likelihood has no factor for each of them; or a
        plate is subsampled.
    """
    check_observed(problem)
    observed, sites = problem.names("observed"), problem.sites
    enumeration = _enumeration(problem)
    hidden = enumeration.names if enumeration is not None else []
    given = _latent(problem, _arrays(problem, posterior, without=hidden))
    _check_whole(problem)

    def evaluate(values: dict[str, Tensor]) -> dict[str, Tensor]:
        if enumeration is not None and hidden:
            return enumeration.log_prob(values, observed)
        program = poutine.condition(problem.model, values)
        trace: Any = poutine.trace(program).get_trace(*problem.args, **problem.kwargs)
        trace.compute_log_prob(site_filter=lambda name, site: name in observed)
        return {name: trace.nodes[name]["log_prob"] for name in observed}

    values = map_draws(
        evaluate, given, _shape(given), label="log likelihood", random=False, device=_device(problem), progress=progress
    )
    dims = {name: list(sites[name].dims[: value.ndim - 2]) for name, value in values.items()}
    return to_dataset(values, dims, problem.coords)


@checked(ProblemError)
def infer_discrete(
    problem: Problem, posterior: xr.Dataset, *, temperature: Literal[0, 1] = 1, seed: Seed = 0, progress: bool = False
) -> xr.Dataset:
    """Discrete latent sites given each posterior draw of the continuous ones and the data.

    Parameters
    ----------
    problem
        The problem that was inferred.
    posterior
        Draws with dims (chain, draw, ...); its own draws of discrete sites are left aside.
    temperature
        1 for a draw from the joint conditional distribution, 0 for its most probable value (for a hidden Markov
        model, the path of Viterbi).
    seed
        Seed of the draws.
    progress
        Whether to show a progress bar.

    Returns
    -------
    xr.Dataset
        Discrete sites with dims (chain, draw, ...).

    Raises
    ------
    ProblemError
        If there are none that can be enumerated, or the posterior does not fit the model.
    """
    enumeration, given = _discrete_given(problem, posterior)

    def evaluate(values: dict[str, Tensor]) -> dict[str, Tensor]:
        return enumeration.assign(values, enumeration.names, temperature)

    found = map_draws(
        evaluate,
        given,
        _shape(given),
        label="discrete sites",
        seed=seed,
        stream=_DISCRETE,
        random=temperature == 1,
        device=_device(problem),
        progress=progress,
    )
    return to_dataset(found, problem.dims(), problem.coords)


@checked(ProblemError)
def discrete_marginals(problem: Problem, posterior: xr.Dataset, *, progress: bool = False) -> xr.Dataset:
    """Probability of every value of every discrete latent site given each posterior draw and the data.

    For a mixture these are the responsibilities, for a hidden Markov model the smoothed state probabilities. Their
    average over draws has a smaller Monte Carlo error than the frequencies of drawn values.

    Parameters
    ----------
    problem
        The problem that was inferred.
    posterior
        Draws with dims (chain, draw, ...); its own draws of discrete sites are left aside.
    progress
        Whether to show a progress bar.

    Returns
    -------
    xr.Dataset
        By site, dims (chain, draw, batch dims of the site, ``<site>_value``), the last in the order of the support.

    Raises
    ------
    ProblemError
        If there are none that can be enumerated, or the posterior does not fit the model.
    """
    enumeration, given = _discrete_given(problem, posterior)
    label = "marginal probabilities"
    values = map_draws(
        enumeration.marginals,
        given,
        _shape(given),
        label=label,
        random=False,
        device=_device(problem),
        progress=progress,
    )
    dims = {name: [*problem.sites[name].dims[: value.ndim - 3], f"{name}_value"] for name, value in values.items()}
    return to_dataset(values, dims, problem.coords)


@checked(ProblemError)
def thin(posterior: xr.Dataset, num_samples: Draws | None) -> xr.Dataset:
    """About ``num_samples`` draws over all chains, evenly spaced; all of them for None."""
    if num_samples is None:
        return posterior
    per_chain = min(posterior.sizes["draw"], -(-num_samples // posterior.sizes["chain"]))
    keep = np.linspace(0, posterior.sizes["draw"] - 1, per_chain).round().astype(int)
    return posterior.isel(draw=keep)


def check_observed(problem: Problem) -> None:
    """Check that a model has observed sites.

    Raises
    ------
    ProblemError
        If it has none, as where data enter by a factor.
    """
    if not problem.names("observed"):
        raise ProblemError(
            f"{problem.name}: the model observes nothing (it has no site with obs=), so there is nothing to predict or "
            "to compare"
        )


def log_joint(trace: Any) -> float:
    """Log density of a trace without its generated sites."""
    return float(trace.log_prob_sum(site_filter=lambda name, site: not is_generated(site)))


def _enumeration(problem: Problem) -> Enumeration | None:
    return Enumeration(problem) if any(site.discrete for site in problem.sites.values()) else None


def _discrete_given(problem: Problem, posterior: xr.Dataset) -> tuple[Enumeration, dict[str, np.ndarray]]:
    enumeration = _enumeration(problem)
    if enumeration is None or not enumeration.names:
        discrete = [name for name, site in problem.sites.items() if site.discrete]
        why = f"its discrete sites {discrete} have no finite support" if discrete else "it has no discrete latent site"
        raise ProblemError(f"{problem.name}: nothing to infer by enumeration, since {why}")
    return enumeration, _latent(problem, _arrays(problem, posterior, without=enumeration.names))


def _arrays(problem: Problem, posterior: xr.Dataset, without: Iterable[str] = ()) -> dict[str, np.ndarray]:
    """Latent and generated sites of a posterior as arrays (chain, draw, ...), NaN refused."""
    lost = {"chain", "draw"} - {str(dim) for dim in posterior.dims}
    if lost:
        raise ProblemError(
            f"{problem.name}: the posterior has dims {[str(d) for d in posterior.dims]}; it needs 'chain' and 'draw' "
            "(posterior.expand_dims(chain=1) adds one)"
        )
    arrays = {}
    for name in problem.names("latent", "generated"):
        if name not in posterior or name in without:
            continue
        own = problem.sites[name].dims
        named = set(own) == {str(dim) for dim in posterior[name].dims} - {"chain", "draw"}
        variable = posterior[name].transpose("chain", "draw", *(own if named else (...,)))
        arrays[name] = variable.values
        if problem.sites[name].kind == "latent" and np.isnan(arrays[name]).any():
            chain, draw, *index = (int(i) for i in np.argwhere(np.isnan(arrays[name]))[0])
            at = f", {dict(zip(variable.dims[2:], index, strict=True))}" if index else ""
            raise ProblemError(
                f"{problem.name}: the posterior of {name!r} is NaN in chain {chain}, draw {draw}{at}, and in "
                f"{int(np.isnan(arrays[name]).sum())} entries altogether; leave those draws out"
            )
    return arrays


def _check_whole(problem: Problem) -> None:
    with isolated(seed=0), torch.no_grad():
        nodes: Any = poutine.trace(problem.model).get_trace(*problem.args, **problem.kwargs).nodes
    for name, node in nodes.items():
        if node["type"] == "sample" and isinstance(node["fn"], _Subsample) and len(node["value"]) < node["fn"].size:
            raise ProblemError(
                f"{problem.name}: plate {name!r} holds {len(node['value'])} of {node['fn'].size} points; give the "
                "problem a model without subsample_size (engines subsample the plates named in batch_plates)"
            )


def _latent(problem: Problem, draws: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Values that condition the model, checked against the shapes of its sites.

    Generated sites of another shape are left aside, since nothing that is observed depends on them.
    """
    given = {name: draws[name] for name in problem.names("latent", "generated") if name in draws}
    other = [name for name in problem.names("generated") if name in given]
    other = [name for name in other if given[name].shape[2:] != problem.sites[name].shape]
    given = {name: array for name, array in given.items() if name not in other}
    _check_complete(problem, given, draws)
    for name, array in given.items():
        site = problem.sites[name]
        if array.shape[2:] != site.shape:
            raise ProblemError(
                f"{problem.name}: the posterior of {name!r} has shape {array.shape[2:]} in each draw, but the model "
                f"has {site.shape}, dims {site.dims}; the problem may hold other data than the one inferred"
            )
    if len({array.shape[:2] for array in given.values()}) > 1:
        shapes = {name: array.shape[:2] for name, array in given.items()}
        raise ProblemError(f"{problem.name}: the sites differ in their numbers of chains and draws: {shapes}")
    return given


def _check_complete(problem: Problem, given: Mapping[str, np.ndarray], draws: Iterable[str]) -> None:
    """Check that every latent site is given or can be recovered from those that are."""
    lost = [name for name, site in problem.sites.items() if site.kind == "latent" and name not in given]
    if any(problem.sites[name].discrete for name in lost):
        enumeration = _enumeration(problem)
        assert enumeration is not None
        lost = [name for name in lost if name not in enumeration.names]
    if lost:
        raise ProblemError(
            f"{problem.name}: the posterior lacks the latent sites {lost}; it has {list(draws)}, and only discrete "
            "sites of finite support can be recovered from the others"
        )


def _shape(given: Mapping[str, np.ndarray]) -> tuple[int, int]:
    for array in given.values():
        return array.shape[0], array.shape[1]
    return 1, 1


def _simulate(
    problem: Problem,
    given: Mapping[str, np.ndarray],
    names: list[str],
    program: Callable[..., Any],
    seed: int,
    stream: int,
    *,
    shape: tuple[int, int] | None = None,
    progress: bool = False,
) -> dict[str, np.ndarray]:
    """Values of sites at every draw, or from the prior where ``shape`` says how many."""
    lost = [name for name in problem.names("latent") if name not in given and shape is None]
    enumeration = _enumeration(problem) if lost else None

    def evaluate(values: dict[str, Tensor]) -> dict[str, Tensor]:
        if enumeration is not None:
            values = {**values, **enumeration.assign(values, lost, 1)}
        trace: Any = poutine.trace(poutine.condition(program, values)).get_trace(*problem.args, **problem.kwargs)
        return {name: trace.nodes[name]["value"] for name in names if name in trace.nodes}

    return map_draws(
        evaluate,
        given,
        shape or _shape(given),
        label="prior" if shape else "sites" if stream == _COMPLETE else "predictions",
        seed=seed,
        stream=stream,
        random=bool(lost) or any(problem.sites[name].kind != "deterministic" for name in names),
        moments=problem.transient if stream == _COMPLETE else (),
        device=_device(problem),
        progress=progress,
    )


def _device(problem: Problem) -> torch.device | None:
    return device_of(problem.args, problem.kwargs, problem.model)
