"""What follows from posterior draws: deterministic and generated sites, predictions, pointwise log likelihood."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import numpy as np
import pyro
import torch
import xarray as xr
from pyro import poutine
from torch import Tensor

from probmodels.inference.ops import chain_seed, is_generated, isolated
from probmodels.inference.problem import Problem, ProblemError
from probmodels.inference.result import to_dataset

__all__ = ["complete", "log_likelihood", "posterior_predictive", "prior_predictive", "thin"]

_COMPLETE, _PREDICT = 1, 2  # random streams of a run, beside those of its chains


def complete(problem: Problem, draws: Mapping[str, np.ndarray], *, seed: int) -> dict[str, np.ndarray]:
    """Add the deterministic and generated sites that posterior draws lack.

    Parameters
    ----------
    problem
        The problem that was inferred.
    draws
        Latent sites, arrays (chain, draw, ...).
    seed
        Seed of the run; every chain draws from its own stream.

    Returns
    -------
    dict
        All sites, in the order of the model where it knows them.
    """
    missing = [name for name in problem.names("deterministic", "generated") if name not in draws]
    if missing:
        draws = {**draws, **_simulate(problem, draws, missing, problem.model, seed, _COMPLETE)}
    order = [name for name in problem.sites if name in draws]
    return {name: draws[name] for name in [*order, *(name for name in draws if name not in order)]}


def posterior_predictive(problem: Problem, posterior: xr.Dataset, *, seed: int = 0) -> xr.Dataset:
    """New values of the observed sites, one per posterior draw.

    Parameters
    ----------
    problem
        The problem that was inferred, or one with other data of the same latent sites.
    posterior
        Draws with dims (chain, draw, ...).
    seed
        Seed of the new values.

    Returns
    -------
    xr.Dataset
        Observed sites with dims (chain, draw, ...).
    """
    observed = problem.names("observed")
    program = poutine.uncondition(problem.model)
    values = _simulate(problem, _arrays(problem, posterior), observed, program, seed, _PREDICT)
    return to_dataset(values, problem.dims(), problem.coords)


def prior_predictive(problem: Problem, *, num_samples: int = 500, seed: int = 0) -> xr.Dataset:
    """All sites of the model, observed ones included, drawn from the prior: dims (chain=1, draw, ...)."""
    names = list(problem.sites)
    values = _simulate(problem, {}, names, poutine.uncondition(problem.model), seed, _PREDICT, shape=(1, num_samples))
    return to_dataset(values, problem.dims(), problem.coords)


def log_likelihood(problem: Problem, posterior: xr.Dataset) -> xr.Dataset:
    """Pointwise log likelihood of the observed sites: dims (chain, draw, batch dims of the site)."""
    observed = problem.names("observed")
    arrays = _arrays(problem, posterior)
    dims: dict[str, list[str]] = {}

    def read(trace: Any) -> dict[str, Tensor]:
        trace.compute_log_prob()
        values = {}
        for name in observed:
            value = trace.nodes[name]["log_prob"]
            dims[name] = list(problem.sites[name].dims[: value.dim()])
            values[name] = value
        return values

    values = _sweep(problem, arrays, problem.model, read, seed=0, stream=_PREDICT)
    return to_dataset(values, dims, problem.coords)


def thin(posterior: xr.Dataset, num_samples: int | None) -> xr.Dataset:
    """About ``num_samples`` draws over all chains, evenly spaced; all of them for None."""
    if num_samples is None:
        return posterior
    if num_samples < 1:
        raise ProblemError(f"num_samples={num_samples}; ask for at least one draw")
    per_chain = min(posterior.sizes["draw"], -(-num_samples // posterior.sizes["chain"]))
    keep = np.linspace(0, posterior.sizes["draw"] - 1, per_chain).round().astype(int)
    return posterior.isel(draw=keep)


def _arrays(problem: Problem, posterior: xr.Dataset) -> dict[str, np.ndarray]:
    latent = problem.names("latent", "generated")
    lost = [name for name in problem.names("latent") if name not in posterior]
    if lost:
        raise ProblemError(f"{problem.name}: the posterior lacks the latent sites {lost}")
    return {name: posterior[name].transpose("chain", "draw", ...).values for name in latent if name in posterior}


def _simulate(
    problem: Problem,
    draws: Mapping[str, np.ndarray],
    names: Collection[str],
    program: Callable[..., Any],
    seed: int,
    stream: int,
    shape: tuple[int, int] | None = None,
) -> dict[str, np.ndarray]:
    def read(trace: Any) -> dict[str, Tensor]:
        return {name: trace.nodes[name]["value"] for name in names}

    return _sweep(problem, draws, program, read, seed=seed, stream=stream, shape=shape)


def _sweep(
    problem: Problem,
    draws: Mapping[str, np.ndarray],
    program: Callable[..., Any],
    read: Callable[[Any], dict[str, Tensor]],
    *,
    seed: int,
    stream: int,
    shape: tuple[int, int] | None = None,
) -> dict[str, np.ndarray]:
    """Run the program at every draw and stack what ``read`` takes from its trace, arrays (chain, draw, ...)."""
    free = set(problem.names("latent", "generated"))
    given = {name: torch.as_tensor(value) for name, value in draws.items() if name in free}
    if shape is None:
        shape = tuple(next(iter(given.values())).shape[:2]) if given else (1, 1)  # type: ignore[assignment]
    assert shape is not None
    out: dict[str, np.ndarray] = {}
    for chain, draw, trace in _traces(problem, given, program, shape, seed, stream):
        for name, value in read(trace).items():
            array = value.detach().cpu().numpy()
            if name not in out:
                out[name] = np.empty((*shape, *array.shape), array.dtype)
            out[name][chain, draw] = array
    return out


def _traces(
    problem: Problem,
    given: Mapping[str, Tensor],
    program: Callable[..., Any],
    shape: tuple[int, int],
    seed: int,
    stream: int,
) -> Iterator[tuple[int, int, Any]]:
    for chain in range(shape[0]):
        with isolated(chain_seed(seed, chain, stream)), torch.no_grad(), pyro.validation_enabled(False):
            for draw in range(shape[1]):
                values = {name: value[chain, draw] for name, value in given.items()}
                trace = poutine.trace(poutine.condition(program, values)).get_trace(*problem.args, **problem.kwargs)
                yield chain, draw, trace


def log_joint(trace: Any) -> float:
    """Log density of a trace without its generated sites."""
    return float(trace.log_prob_sum(site_filter=lambda name, site: not is_generated(site)))
