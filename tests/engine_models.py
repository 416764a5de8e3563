"""Small models with exact posteriors, at module level so that they pickle, for tests of the engines.

Every maker takes a type and returns a `Case`: the problem, and per latent site arrays of the exact means, standard
deviations and, where they have a formula or a quadrature, 5 and 95 % quantiles.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from numpy.typing import ArrayLike, NDArray
from pyro import poutine
from pyro.infer.reparam import LocScaleReparam
from scipy import stats
from torch import Tensor

from probmodels.inference import Problem

__all__ = ["CASES", "Case"]

Array = NDArray[np.float64]
LEVELS = (0.05, 0.95)


@dataclass(frozen=True)
class Case:
    """A problem and its exact posterior; ``quantile`` (2, ...) at the `LEVELS`, for the sites that have one."""

    problem: Problem
    mean: Mapping[str, Array]
    sd: Mapping[str, Array]
    quantile: Mapping[str, Array] = field(default_factory=dict)
    gaussian: bool = False  # in unconstrained space


def _case(problem: Problem, posterior: Mapping[str, Any], *, gaussian: bool = False) -> Case:
    """A case from the posterior of each site as a frozen, array-valued distribution of scipy."""
    return Case(
        problem,
        {name: np.asarray(found.mean()) for name, found in posterior.items()},
        {name: np.asarray(found.std()) for name, found in posterior.items()},
        {name: np.stack([np.asarray(found.ppf(level)) for level in LEVELS]) for name, found in posterior.items()},
        gaussian,
    )


def _normals(precision: Array, shift: Array, names: Mapping[str, Any]) -> dict[str, Any]:
    """Marginals of the normal with density exp(shift' x - x' precision x / 2), by site and index."""
    covariance = np.linalg.inv(precision)
    mean, sd = covariance @ shift, np.sqrt(np.diag(covariance))
    return {name: stats.norm(mean[index], sd[index]) for name, index in names.items()}


def _tensor(values: ArrayLike, dtype: torch.dtype) -> Tensor:
    return torch.as_tensor(np.asarray(values), dtype=dtype)


# -- normal mean, normal hierarchy -------------------------------------------------------------------------------------

_Y = np.array([0.3, 1.1, -0.4, 2.0, 0.9])


def mean_model(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(y.new_tensor(1.0), 2.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(mu, 0.5), obs=y)


def normal_mean(dtype: torch.dtype) -> Case:
    """mu ~ N(1, 2), y ~ N(mu, 0.5)."""
    posterior = _normals(np.array([[1 / 4 + len(_Y) * 4]]), np.array([1 / 4 + _Y.sum() * 4]), {"mu": 0})
    return _case(Problem("normal mean", mean_model, args=(_tensor(_Y, dtype),)), posterior, gaussian=True)


_GROUPS = np.array([[1.2, 0.4, 0.9], [-0.5, 0.1, 0.3], [2.2, 1.6, 2.7], [0.2, 0.9, 0.1]])


def hierarchy_model(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 3.0))
    with pyro.plate("group", y.shape[0], dim=-2):
        theta = pyro.sample("theta", dist.Normal(mu, 0.2))  # (group, 1): far more certain given mu than alone
        with pyro.plate("row", y.shape[1], dim=-1):
            pyro.sample("y", dist.Normal(theta, 1.5), obs=y)


def normal_hierarchy(dtype: torch.dtype) -> Case:
    """mu ~ N(0, 3), theta_g ~ N(mu, 0.2), y_gi ~ N(theta_g, 1.5): strongly correlated."""
    count, rows = _GROUPS.shape
    precision = np.zeros((count + 1, count + 1))
    precision[0, 0] = 1 / 9 + count / 0.04
    precision[0, 1:] = precision[1:, 0] = -1 / 0.04
    precision[range(1, count + 1), range(1, count + 1)] = 1 / 0.04 + rows / 1.5**2
    shift = np.concatenate([[0.0], _GROUPS.sum(1) / 1.5**2])
    index = np.arange(1, count + 1)[:, None]
    posterior = _normals(precision, shift, {"mu": 0, "theta": index})
    return _case(Problem("hierarchy", hierarchy_model, args=(_tensor(_GROUPS, dtype),)), posterior, gaussian=True)


# -- conjugate pairs of other supports ---------------------------------------------------------------------------------

_HITS, _TRIALS = np.array([3.0, 0.0, 7.0]), np.array([10.0, 4.0, 8.0])
_COUNTS = np.array([[2.0, 0.0, 3.0, 1.0], [7.0, 9.0, 4.0, 8.0]])


def pairs_model(hits: Tensor, trials: Tensor, counts: Tensor) -> None:
    with pyro.plate("coin", len(hits)):
        p = pyro.sample("p", dist.Beta(hits.new_tensor(0.8), 2.0))
        pyro.sample("hits", dist.Binomial(trials, p), obs=hits)
    with pyro.plate("place", counts.shape[0], dim=-2):
        rate = pyro.sample("rate", dist.Gamma(counts.new_tensor(2.0), 0.5))
        with pyro.plate("day", counts.shape[1], dim=-1):
            pyro.sample("counts", dist.Poisson(rate), obs=counts)


def pairs(dtype: torch.dtype) -> Case:
    """Beta-binomial, with a posterior that has its mode at zero, beside gamma-Poisson."""
    args = tuple(_tensor(values, dtype) for values in (_HITS, _TRIALS, _COUNTS))
    shape = 2 + _COUNTS.sum(1, keepdims=True)
    posterior = {
        "p": stats.beta(0.8 + _HITS, 2 + _TRIALS - _HITS),
        "rate": stats.gamma(shape, scale=1 / (0.5 + _COUNTS.shape[1])),
    }
    return _case(Problem("pairs", pairs_model, args=args), posterior)


_TALLY = np.array([[4.0, 0.0, 2.0], [1.0, 12.0, 7.0]])


def simplex_model(tally: Tensor) -> None:
    with pyro.plate("urn", len(tally)):
        share = pyro.sample("share", dist.Dirichlet(tally.new_tensor([1.0, 0.7, 2.0])))
        pyro.sample("tally", dist.Multinomial(probs=share, validate_args=False), obs=tally)


def simplex(dtype: torch.dtype) -> Case:
    """Dirichlet-multinomial: an event axis, and a map that lowers the number of entries."""
    weight = _TALLY + np.array([1.0, 0.7, 2.0])
    posterior = {"share": stats.beta(weight, weight.sum(1, keepdims=True) - weight)}
    return _case(Problem("simplex", simplex_model, args=(_tensor(_TALLY, dtype),)), posterior)


# -- regression --------------------------------------------------------------------------------------------------------

_X = np.column_stack([np.ones(8), np.linspace(-1, 3, 8)])
_RESPONSE = np.array([0.2, 0.1, 1.4, 1.0, 2.2, 2.1, 2.6, 3.9])
_PRIOR_PRECISION = np.diag([0.5, 0.25])


def regression_model(x: Tensor, y: Tensor, root: Tensor) -> None:
    variance = pyro.sample("variance", dist.InverseGamma(y.new_tensor(3.0), 1.0))
    beta = pyro.sample("beta", dist.MultivariateNormal(y.new_zeros(2), scale_tril=variance.sqrt() * root))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(x @ beta, variance.sqrt()), obs=y)


def regression(dtype: torch.dtype) -> Case:
    """Normal-inverse-gamma prior: coefficients are t, the variance inverse gamma."""
    precision = _PRIOR_PRECISION + _X.T @ _X
    mean = np.linalg.solve(precision, _X.T @ _RESPONSE)
    shape = 3 + len(_RESPONSE) / 2
    rate = 1 + (_RESPONSE @ _RESPONSE - mean @ precision @ mean) / 2
    scale = np.sqrt(rate / shape * np.diag(np.linalg.inv(precision)))
    args = (_X, _RESPONSE, np.linalg.cholesky(np.linalg.inv(_PRIOR_PRECISION)))
    problem = Problem("regression", regression_model, args=tuple(_tensor(value, dtype) for value in args))
    return _case(problem, {"beta": stats.t(2 * shape, mean, scale), "variance": stats.invgamma(shape, scale=rate)})


# -- discrete sites marginalised ---------------------------------------------------------------------------------------

_MIXED = np.array([-1.2, -0.7, 0.4, 1.9, 2.4, 2.2, 1.1, 3.0])


def mixture_model(y: Tensor) -> None:
    weight = pyro.sample("weight", dist.Beta(y.new_tensor(2.0), 2.0))
    shift = pyro.sample("shift", dist.LogNormal(y.new_tensor(0.5), 0.5))
    with pyro.plate("row", len(y)):
        which = pyro.sample("which", dist.Bernoulli(weight))
        pyro.sample("y", dist.Normal((2 * which - 1) * shift, 1.0), obs=y)


def mixture(dtype: torch.dtype) -> Case:
    """Two normals at minus and plus ``shift``, whose assignments are marginalised; moments by quadrature."""
    weight, shift = np.linspace(0, 1, 1501)[1:-1], np.linspace(0, 12, 3001)[1:]
    w, s = weight[:, None], shift[None]
    log = stats.beta.logpdf(w, 2, 2) + stats.lognorm.logpdf(s, 0.5, scale=np.exp(0.5))
    for y in _MIXED:
        log = log + np.logaddexp(np.log(w) + stats.norm.logpdf(y, s), np.log1p(-w) + stats.norm.logpdf(y, -s))
    mass = np.exp(log - log.max())
    return _on_grid(
        Problem("mixture", mixture_model, args=(_tensor(_MIXED, dtype),)),
        {"weight": (weight, mass.sum(1)), "shift": (shift, mass.sum(0))},
    )


def _on_grid(problem: Problem, marginals: Mapping[str, tuple[Array, Array]]) -> Case:
    """A case from marginals as (points, masses) on even grids whose ends have no mass."""
    mean, sd, quantile = {}, {}, {}
    for name, (points, mass) in marginals.items():
        mass = mass / mass.sum()
        mean[name] = np.asarray(points @ mass)
        sd[name] = np.sqrt((points - mean[name]) ** 2 @ mass)
        half = (points[1] - points[0]) / 2  # a point stands for the cell around it
        quantile[name] = np.interp(LEVELS, np.cumsum(mass), points + half)
    return Case(problem, mean, sd, quantile)


# -- funnel ------------------------------------------------------------------------------------------------------------


def funnel_model(like: Tensor) -> None:
    log_scale = pyro.sample("log_scale", dist.Normal(like.new_zeros(()), 1.0))
    with pyro.plate("item", 4):
        pyro.sample("x", dist.Normal(like.new_zeros(()), log_scale.exp()))


def funnel(dtype: torch.dtype) -> Case:
    """Neal's funnel, sampled in its non-centred form: x = exp(log_scale) e has variance exp(2)."""
    grid = np.linspace(-8, 8, 4001)
    mass = stats.norm.pdf(grid) * (grid[1] - grid[0])
    points = np.linspace(-30, 30, 2401)
    upper = np.array([stats.norm.cdf(x / np.exp(grid)) @ mass for x in points])
    ends = np.interp(LEVELS, upper, points)
    return Case(
        Problem("funnel", funnel_model, args=(_tensor(0.0, dtype),), reparam={"x": LocScaleReparam(0.0)}),
        {"log_scale": np.asarray(0.0), "x": np.zeros(4)},
        {"log_scale": np.asarray(1.0)},  # draws of x are too heavy-tailed for their variance to be estimated
        {"log_scale": stats.norm.ppf(LEVELS), "x": np.repeat(ends[:, None], 4, 1)},
    )


# -- plates, event axes, masks, scales, factors ------------------------------------------------------------------------

_PANEL = np.array([[0.5, 1.0, np.nan], [-1.0, np.nan, np.nan], [2.0, 1.4, 0.7]])
_TABLE = np.array([[0.4, -1.0], [1.2, 0.3], [0.9, -0.2], [5.0, 5.0]])
_ROOT = np.array([[1.0, 0.0], [0.6, 0.8]])
_TILT, _WEIGHT = 0.7, 2.5


def panel_model(panel: Tensor, seen: Tensor, table: Tensor, kept: Tensor, root: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(panel.new_zeros(()), 2.0))
    pyro.factor("tilt", _TILT * mu)
    with pyro.plate("person", panel.shape[0], dim=-2):
        level = pyro.sample("level", dist.Normal(mu, 1.0))  # (person, 1)
        with pyro.plate("visit", panel.shape[1], dim=-1):
            pyro.sample("panel", dist.Normal(level, 0.8), obs=panel, obs_mask=seen)
    centre = pyro.sample("centre", dist.Normal(panel.new_zeros(2), 3.0).to_event(1))
    with pyro.plate("row", len(table)), poutine.scale(scale=_WEIGHT), poutine.mask(mask=kept):
        pyro.sample("table", dist.MultivariateNormal(centre, scale_tril=root), obs=table)


def panel(dtype: torch.dtype) -> Case:
    """Normal throughout: missing visits are latent, rows of the table weighted, the last one masked out."""
    seen, people = ~np.isnan(_PANEL), len(_PANEL)
    missing = [(p, v) for p, v in np.ndindex(_PANEL.shape) if not seen[p, v]]
    # Unknowns: mu, levels, missing visits.
    size = 1 + people + len(missing)
    precision, shift = np.zeros((size, size)), np.zeros(size)

    def tie(one: int, other: int, sd: float) -> None:
        precision[[one, other], [one, other]] += 1 / sd**2
        precision[[one, other], [other, one]] -= 1 / sd**2

    precision[0, 0], shift[0] = 1 / 4, _TILT
    for person in range(people):
        tie(0, 1 + person, 1.0)
        precision[1 + person, 1 + person] += seen[person].sum() / 0.8**2
        shift[1 + person] += np.nansum(_PANEL[person]) / 0.8**2
    for place, (person, _) in enumerate(missing):
        tie(1 + person, 1 + people + place, 0.8)
    found = _normals(precision, shift, {"mu": 0, "level": np.arange(1, 1 + people)[:, None]})
    inner = np.linalg.inv(_ROOT @ _ROOT.T) * _WEIGHT
    found |= _normals(np.eye(2) / 9 + 3 * inner, inner @ _TABLE[:3].sum(0), {"centre": np.arange(2)})
    case_args = (np.nan_to_num(_PANEL), _TABLE, _ROOT)
    filled, table, root = (_tensor(value, dtype) for value in case_args)
    args = (filled, torch.as_tensor(seen), table, torch.tensor([True, True, True, False]), root)
    case = _case(Problem("panel", panel_model, args=args), found, gaussian=True)
    # The panel itself is a deterministic site: data where seen, and what is missing elsewhere.
    covariance = np.linalg.inv(precision)
    mean, sd = np.nan_to_num(_PANEL), np.zeros(_PANEL.shape)
    for place, (person, visit) in enumerate(missing):
        mean[person, visit] = (covariance @ shift)[1 + people + place]
        sd[person, visit] = covariance[1 + people + place, 1 + people + place] ** 0.5
    ends = stats.norm.ppf(np.array(LEVELS))[:, None, None]
    return Case(
        case.problem,
        {**case.mean, "panel": mean},
        {**case.sd, "panel": sd},
        {**case.quantile, "panel": mean + ends * sd},
        gaussian=True,
    )


CASES: dict[str, Callable[[torch.dtype], Case]] = {
    "normal_mean": normal_mean,
    "normal_hierarchy": normal_hierarchy,
    "pairs": pairs,
    "simplex": simplex,
    "regression": regression,
    "mixture": mixture,
    "funnel": funnel,
    "panel": panel,
}
