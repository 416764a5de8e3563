"""Posteriors with known answers: thirty-five of posteriordb with reference draws, and three models for timing.

    python benchmarks/reference.py                                          # all of them, both samplers
    python benchmarks/reference.py --kernel nuts --names sblri-blr arK-arK  # some of them, one sampler

As a script it prints, for every posterior and sampler: the largest difference of a mean from the reference in combined
Monte Carlo standard errors; the least and largest ratio of standard deviations, with the Monte Carlo error of the worse
one; whether all are within 4 standard errors and 5 %; and what the draws cost. Cells that were measured are kept in
``results/reference.jsonl`` and are not run again.

Every model is an ordinary Pyro program in double precision, at module level so that it pickles, without discrete
sites: hidden states are summed out. Recursions over time are written as scans of logarithmic depth, which keeps
captured graphs small. Sites carry the names of the reference, so that ``beta[1]`` is the first entry of site ``beta``.
"""

from __future__ import annotations

if __name__ == "__main__":
    import common  # noqa: F401 -- pins threads before numpy is imported

import argparse
import json
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from numpy.typing import ArrayLike, NDArray
from pyro.distributions import constraints
from torch import Size, Tensor
from torch.distributions import biject_to

if TYPE_CHECKING:  # Pyro itself is timed on these models: importing them must cost no more than Pyro does
    import xarray as xr

    from probmodels.inference.problem import Problem

__all__ = [
    "NAMES",
    "SPEED_NAMES",
    "Flat",
    "Reference",
    "ReferenceDataError",
    "check",
    "load",
    "speed_data",
    "speed_model",
    "speed_problem",
]

Array = NDArray[np.float64]
Data = Mapping[str, Any]


class ReferenceDataError(FileNotFoundError):
    """Reference posteriors that are not on this machine: where they were looked for and how to point to them."""


class Flat(dist.TorchDistribution):
    """Constant density 1 over a support; draws are standard normals mapped to the support.

    Parameters
    ----------
    support
        Constraint with a map from unconstrained space that keeps the shape.
    shape
        Shape of a value; event axes as many as the support has.
    dtype
        Type of draws.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012  (as torch has it)
    has_rsample = True

    def __init__(
        self, support: constraints.Constraint, shape: tuple[int, ...] = (), dtype: torch.dtype = torch.float64
    ) -> None:
        self._support, self._dtype = support, dtype
        split = len(shape) - support.event_dim
        super().__init__(Size(shape[:split]), Size(shape[split:]), validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        """The set on which the density is 1."""
        return self._support

    def expand(self, batch_shape: Any, _instance: Any = None) -> Flat:
        """The same distribution for another batch shape."""
        return Flat(self._support, (*batch_shape, *self.event_shape), self._dtype)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Values to start from, (*sample_shape, *shape)."""
        shape = self._extended_shape(Size(sample_shape))
        return biject_to(self._support)(torch.randn(shape, dtype=self._dtype))

    def log_prob(self, value: Tensor) -> Tensor:
        """Zeros of the batch shape."""
        return value.new_zeros(value.shape[: value.dim() - self.event_dim])


# -- scans ------------------------------------------------------------------------------------------------------------


def linear_recursion(inputs: Tensor, coefficient: Tensor) -> Tensor:
    """x with x_t = inputs_t + coefficient x_{t-1} and x_0 = 0, (time,), in log2(time) doublings."""
    shift = 1
    while shift < inputs.shape[-1]:
        inputs = inputs + coefficient * torch.nn.functional.pad(inputs[:-shift], (shift, 0))
        coefficient = coefficient.square()
        shift *= 2
    return inputs


def hidden_markov_log_prob(log_transition: Tensor, log_emission: Tensor) -> Tensor:
    """Log density of emissions (state, time) summed over paths; all first states count with weight one."""
    # Products of the matrices of neighbouring times, in pairs, until one is left; time is last, where memory is dense.
    steps = log_transition[:, :, None] + log_emission[:, 1:]  # (from, to, time - 1)
    while steps.shape[-1] > 1:
        paired = steps.shape[-1] // 2 * 2
        left, right = steps[..., 0:paired:2], steps[..., 1:paired:2]
        product = torch.logsumexp(left[:, :, None] + right, dim=1)
        steps = torch.cat([product, steps[..., paired:]], dim=-1)
    return torch.logsumexp((log_emission[:, :1] + steps[..., 0]).reshape(-1), dim=0)


# -- models -----------------------------------------------------------------------------------------------------------


def regression(features: Tensor, y: Tensor) -> None:
    """y ~ N(features beta, sigma), all flat; features (row, column), y (row,)."""
    beta = pyro.sample("beta", Flat(constraints.real_vector, (features.shape[1],)))
    sigma = pyro.sample("sigma", Flat(constraints.positive))
    _observe("y", dist.Normal(features @ beta, sigma), y)


def kidiq(features: Tensor, y: Tensor) -> None:
    """The same with sigma ~ HalfCauchy(2.5)."""
    beta = pyro.sample("beta", Flat(constraints.real_vector, (features.shape[1],)))
    sigma = pyro.sample("sigma", dist.HalfCauchy(y.new_full((), 2.5)))
    _observe("y", dist.Normal(features @ beta, sigma), y)


def blr(features: Tensor, y: Tensor) -> None:
    """The same with beta ~ N(0, 10) and sigma ~ HalfN(10)."""
    beta = pyro.sample("beta", dist.Normal(y.new_zeros(features.shape[1]), 10.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(y.new_full((), 10.0)))
    _observe("y", dist.Normal(features @ beta, sigma), y)


def kilpisjarvi(x: Tensor, y: Tensor, loc: Tensor, scale: Tensor) -> None:
    """y ~ N(alpha + beta x, sigma), normal priors of given loc (2,) and scale (2,); x as it is, so near-collinear."""
    alpha = pyro.sample("alpha", dist.Normal(loc[0], scale[0]))
    beta = pyro.sample("beta", dist.Normal(loc[1], scale[1]))
    sigma = pyro.sample("sigma", Flat(constraints.positive))
    _observe("y", dist.Normal(alpha + beta * x, sigma), y)


def autoregression(lags: Tensor, y: Tensor) -> None:
    """y ~ N(alpha + lags beta, sigma); lags (time, order), y (time,)."""
    alpha = pyro.sample("alpha", dist.Normal(y.new_zeros(()), 10.0))
    beta = pyro.sample("beta", dist.Normal(y.new_zeros(lags.shape[1]), 10.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfCauchy(y.new_full((), 2.5)))
    _observe("y", dist.Normal(alpha + lags @ beta, sigma), y)


def arma(y: Tensor) -> None:
    """ARMA(1, 1) by its innovations, y (time,)."""
    mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 10.0))
    phi = pyro.sample("phi", dist.Normal(y.new_zeros(()), 2.0))
    theta = pyro.sample("theta", dist.Normal(y.new_zeros(()), 2.0))
    sigma = pyro.sample("sigma", dist.HalfCauchy(y.new_full((), 2.5)))
    previous = torch.cat([mu[None], y[:-1]])
    innovations = linear_recursion(y - mu - phi * previous, -theta)
    pyro.factor("innovations", dist.Normal(y.new_zeros(()), sigma).log_prob(innovations).sum())


def garch(y: Tensor, sigma1: Tensor) -> None:
    """GARCH(1, 1), y (time,); alpha1 and beta1 uniform on the triangle, as two of three Dirichlet weights."""
    mu = pyro.sample("mu", Flat(constraints.real))
    alpha0 = pyro.sample("alpha0", Flat(constraints.positive))
    weights = pyro.sample("weights", dist.Dirichlet(y.new_ones(3)))
    alpha1 = pyro.deterministic("alpha1", weights[0])
    beta1 = pyro.deterministic("beta1", weights[1])
    inputs = alpha0 + alpha1 * (y[:-1] - mu).square()
    variance = linear_recursion(torch.cat([sigma1.square()[None], inputs]), beta1)
    _observe("y", dist.Normal(mu, variance.sqrt()), y)


def eight_schools(y: Tensor, sigma: Tensor) -> None:
    """Hierarchical normal, non-centred; effects y (school,) with standard errors sigma (school,)."""
    mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(y.new_full((), 5.0)))
    z = pyro.sample("z", dist.Normal(torch.zeros_like(y), 1.0).to_event(1))
    theta = pyro.deterministic("theta", mu + tau * z)
    _observe("y", dist.Normal(theta, sigma), y)


def eight_schools_centred(y: Tensor, sigma: Tensor) -> None:
    """The same with the effects themselves as unknowns, which makes a funnel."""
    mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(y.new_full((), 5.0)))
    theta = pyro.sample("theta", dist.Normal(mu, tau).expand(y.shape).to_event(1))
    _observe("y", dist.Normal(theta, sigma), y)


def absorption(dose: Tensor, volume: Tensor, times: Tensor, y: Tensor) -> None:
    """Concentration of a drug, absorbed at a rate and eliminated by Michaelis-Menten kinetics, with log-normal noise.

    The differential equation is solved by the Runge-Kutta rule of order four, with steps that grow from the start on,
    where elimination saturates at once if ``K_m`` is small: log concentrations are exact to 1e-4 in the posterior.
    """
    one = y.new_ones(())
    k_a, K_m, V_m, sigma = (pyro.sample(name, dist.HalfCauchy(one)) for name in ("k_a", "K_m", "V_m", "sigma"))

    def slope(t: float, c: Tensor) -> Tensor:
        return dose * k_a / volume * torch.exp(-k_a * t) - V_m / volume * c / (K_m + c)

    first, *later = times.tolist()
    ends = [first * (step / 8) ** 2 for step in range(1, 9)]
    for end in later:
        ends += [(ends[-1] + end) / 2, end]
    c, t, concentrations = y.new_zeros(()), 0.0, {}
    for end in ends:
        h = end - t
        k1 = slope(t, c)
        k2 = slope(t + h / 2, c + h / 2 * k1)
        k3 = slope(t + h / 2, c + h / 2 * k2)
        c, t = c + h / 6 * (k1 + 2 * k2 + 2 * k3 + slope(end, c + h * k3)), end
        concentrations[end] = c
    predicted = torch.stack([concentrations[end] for end in times.tolist()])
    _observe("y", dist.LogNormal(predicted.log(), sigma), y)


def gaussian_process(x: Tensor, y: Tensor) -> None:
    """y ~ N(0, alpha^2 exp(-(x - x')^2 / 2 rho^2) + sigma I), x and y (point,)."""
    rho = pyro.sample("rho", dist.Gamma(y.new_full((), 25.0), 4.0))
    alpha = pyro.sample("alpha", dist.HalfNormal(y.new_full((), 2.0)))
    sigma = pyro.sample("sigma", dist.HalfNormal(y.new_ones(())))
    squares = (x[:, None] - x).square()
    covariance = alpha.square() * torch.exp(-squares / (2 * rho.square())) + sigma * torch.eye(len(x)).to(x)
    pyro.sample("y", dist.MultivariateNormal(torch.zeros_like(y), covariance), obs=y)


def mixture(y: Tensor) -> None:
    """Two normals with ordered means, y (row,)."""
    mu = pyro.sample("mu", Flat(constraints.ordered_vector, (2,)))
    pyro.factor("mu_prior", dist.Normal(torch.zeros_like(mu), 2.0).log_prob(mu).sum())
    sigma = pyro.sample("sigma", dist.HalfNormal(y.new_full((2,), 2.0)).to_event(1))
    theta = pyro.sample("theta", dist.Beta(y.new_full((), 5.0), 5.0))
    weights = dist.Categorical(torch.stack([theta, 1 - theta]))
    _observe("y", dist.MixtureSameFamily(weights, dist.Normal(mu, sigma)), y)


def hidden_markov(y: Tensor) -> None:
    """Two states that emit N(mu_k, 1), y (time,)."""
    transition = torch.stack([pyro.sample(f"theta{k}", dist.Dirichlet(y.new_ones(2))) for k in (1, 2)])
    mu = pyro.sample("mu", Flat(constraints.positive_ordered_vector, (2,)))
    pyro.factor("mu_prior", dist.Normal(y.new_tensor([3.0, 10.0]), 1.0).log_prob(mu).sum())
    emission = dist.Normal(mu[:, None], 1.0).log_prob(y)
    pyro.factor("y", hidden_markov_log_prob(transition.log(), emission))


def drives(u: Tensor, v: Tensor, concentration: Tensor) -> None:
    """Two states that emit exponential u and v (time,); rows of the transition ~ Dirichlet(concentration row)."""
    transition = torch.stack([pyro.sample(f"theta{k}", dist.Dirichlet(concentration[k - 1])) for k in (1, 2)])
    emission = u.new_zeros(2, len(u))
    for name, values in (("phi", u), ("lambda", v)):
        rate = pyro.sample(name, Flat(constraints.positive_ordered_vector, (2,)))
        pyro.factor(f"{name}_prior", dist.Normal(u.new_tensor([0.0, 3.0]), 1.0).log_prob(rate).sum())
        emission = emission + dist.Exponential(rate[:, None]).log_prob(values)
    pyro.factor("drives", hidden_markov_log_prob(transition.log(), emission))


def logistic(features: Tensor, y: Tensor) -> None:
    """y ~ Bernoulli(logits = features w), w ~ N(0, 1); features (row, column), y (row,)."""
    w = pyro.sample("w", dist.Normal(features.new_zeros(features.shape[1]), 1.0).to_event(1))
    _observe("y", dist.Bernoulli(logits=features @ w), y)


def gaussian(precision: Tensor) -> None:
    """x ~ N(0, precision^-1), by its quadratic form: the cheapest way, and the same in every library compared."""
    x = pyro.sample("x", Flat(constraints.real_vector, (len(precision),), precision.dtype))
    pyro.factor("density", -0.5 * (x * (precision @ x)).sum())


def _observe(name: str, conditional: dist.TorchDistribution, y: Tensor) -> None:
    with pyro.plate(f"{name}_rows", len(y)):
        pyro.sample(name, conditional, obs=y)


# -- reference posteriors ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reference:
    """A posterior and what is known of it.

    Attributes
    ----------
    name
        As in posteriordb.
    model, args
        Pyro program and what it receives.
    summary
        Variable, as ``beta[1]``, to ``mean``, ``sd``, ``q05``, ``q50`` and ``q95`` of the reference draws.
    num_draws
        Number of reference draws, nearly independent.
    heavy
        Variables whose variance does not exist: their quantiles are compared instead.
    """

    name: str
    model: Callable[..., None]
    args: tuple[Tensor, ...]
    summary: Mapping[str, Mapping[str, float]]
    num_draws: int
    heavy: tuple[str, ...] = ()

    @property
    def problem(self) -> Problem:
        """The posterior as an engine takes it."""
        from probmodels.inference.problem import Problem

        return Problem(name=self.name, model=self.model, args=self.args)

    def variables(self, posterior: xr.Dataset) -> dict[str, Array]:
        """Draws (chain, draw) of every variable of the reference, from those of the sites and deterministics."""
        draws = {}
        for name in self.summary:
            site, index = _VARIABLE.fullmatch(name).groups()  # type: ignore[union-attr]
            values = posterior[site].transpose("chain", "draw", ...).values
            draws[name] = values if index is None else values[..., int(index) - 1]
        return draws


_VARIABLE = re.compile(r"(\w+?)(?:\[(\d+)\])?")


def _tensor(value: ArrayLike) -> Tensor:
    return torch.as_tensor(np.asarray(value, dtype=np.float64))


def _simple(*keys: str) -> Callable[[Data], tuple[Tensor, ...]]:
    return lambda data: tuple(_tensor(data[key]) for key in keys)


def _lags(data: Data) -> tuple[Tensor, ...]:
    y, order = np.asarray(data["y"], dtype=np.float64), data["K"]
    return _tensor(np.stack([y[order - k : len(y) - k] for k in range(1, order + 1)], 1)), _tensor(y[order:])


def _features(*columns: ArrayLike) -> Tensor:
    return _tensor(np.stack([np.ones(len(np.asarray(columns[0]))), *map(np.asarray, columns)], axis=1))


def _logs(data: Data) -> dict[str, Array]:
    """Logarithms of the measures of a mesquite bush."""
    names = ("diam1", "diam2", "canopy_height", "total_height", "density", "weight")
    logs = {name: np.log(np.asarray(data[name], dtype=np.float64)) for name in names}
    area = logs["diam1"] + logs["diam2"]
    return logs | {"area": area, "volume": area + logs["canopy_height"], "shape": logs["diam1"] - logs["diam2"]}


def _mesquite(*names: str, group: bool = True) -> Callable[[Data], tuple[Tensor, ...]]:
    def prepare(data: Data) -> tuple[Tensor, ...]:
        logs = _logs(data)
        columns = [logs[name] for name in names] + [np.asarray(data["group"])] * group
        return _features(*columns), _tensor(logs["weight"])

    return prepare


def _columns(response: str, *names: str) -> Callable[[Data], tuple[Tensor, ...]]:
    return lambda data: (_features(*(data[name] for name in names)), _tensor(data[response]))


def _earnings(data: Data, *columns: ArrayLike) -> tuple[Tensor, ...]:
    return _features(*columns), _tensor(np.log(data["earn"]))


def _with_product(data: Data, response: ArrayLike, first: ArrayLike, second: ArrayLike) -> tuple[Tensor, ...]:
    first, second = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    return _features(first, second, first * second), _tensor(response)


def _interaction_z(data: Data) -> tuple[Tensor, ...]:
    height, male = np.asarray(data["height"], dtype=np.float64), np.asarray(data["male"], dtype=np.float64)
    z = (height - height.mean()) / height.std(ddof=1)
    return _earnings(data, z, male, z * male)


def _kidiq(data: Data, hs: float, iq: float) -> tuple[Tensor, ...]:
    """High school, score of the mother and their product, from given origins."""
    return _with_product(data, data["kid_score"], np.asarray(data["mom_hs"]) - hs, np.asarray(data["mom_iq"]) - iq)


def _nes(data: Data) -> tuple[Tensor, ...]:
    ages = [(np.asarray(data["age_discrete"]) == group).astype(np.float64) for group in (2, 3, 4)]
    first, last = (
        [data[name] for name in names] for names in (("real_ideo", "race_adj"), ("educ1", "gender", "income"))
    )
    return _features(*first, *ages, *last), _tensor(data["partyid7"])


def _kilpisjarvi(data: Data) -> tuple[Tensor, ...]:
    priors = [[data[f"{kind}{name}"] for name in ("alpha", "beta")] for kind in ("pmu", "ps")]
    return (*_simple("x", "y")(data), *map(_tensor, priors))


# posteriordb's name: the program and how its arguments come from the file
_POSTERIORS: dict[str, tuple[Callable[..., None], Callable[[Data], tuple[Tensor, ...]]]] = {
    "arK-arK": (autoregression, _lags),
    "arma-arma11": (arma, _simple("y")),
    "bball_drive_event_0-hmm_drive_0": (drives, _simple("u", "v", "alpha")),
    "earnings-log10earn_height": (regression, lambda d: (_features(d["height"]), _tensor(np.log10(d["earn"])))),
    "earnings-logearn_height": (regression, lambda d: _earnings(d, d["height"])),
    "earnings-logearn_height_male": (regression, lambda d: _earnings(d, d["height"], d["male"])),
    "earnings-logearn_interaction_z": (regression, _interaction_z),
    "earnings-logearn_logheight_male": (regression, lambda d: _earnings(d, np.log(d["height"]), d["male"])),
    "eight_schools-eight_schools_centered": (eight_schools_centred, _simple("y", "sigma")),
    "eight_schools-eight_schools_noncentered": (eight_schools, _simple("y", "sigma")),
    "garch-garch11": (garch, _simple("y", "sigma1")),
    "gp_pois_regr-gp_regr": (gaussian_process, _simple("x", "y")),
    "hmm_example-hmm_example": (hidden_markov, _simple("y")),
    "kidiq-kidscore_interaction": (kidiq, lambda d: _kidiq(d, 0.0, 0.0)),
    "kidiq-kidscore_momhs": (kidiq, _columns("kid_score", "mom_hs")),
    "kidiq-kidscore_momhsiq": (kidiq, _columns("kid_score", "mom_hs", "mom_iq")),
    "kidiq-kidscore_momiq": (kidiq, _columns("kid_score", "mom_iq")),
    "kidiq_with_mom_work-kidscore_interaction_c": (
        regression,
        lambda d: _kidiq(d, float(np.mean(d["mom_hs"])), float(np.mean(d["mom_iq"]))),
    ),
    "kidiq_with_mom_work-kidscore_interaction_c2": (regression, lambda d: _kidiq(d, 0.5, 100.0)),
    "kilpisjarvi_mod-kilpisjarvi": (kilpisjarvi, _kilpisjarvi),
    "low_dim_gauss_mix-low_dim_gauss_mix": (mixture, _simple("y")),
    "mesquite-logmesquite": (regression, _mesquite("diam1", "diam2", "canopy_height", "total_height", "density")),
    "mesquite-logmesquite_logva": (regression, _mesquite("volume", "area")),
    "mesquite-logmesquite_logvash": (regression, _mesquite("volume", "area", "shape", "total_height")),
    "mesquite-logmesquite_logvolume": (regression, _mesquite("volume", group=False)),
    "mesquite-mesquite": (
        regression,
        _columns("weight", "diam1", "diam2", "canopy_height", "total_height", "density", "group"),
    ),
    **{f"nes{year}-nes": (regression, _nes) for year in (1972, 1976, 1980, 1984, 1988, 1996, 2000)},
    "one_comp_mm_elim_abs-one_comp_mm_elim_abs": (absorption, _simple("D", "V", "times", "C_hat")),
    "sblri-blr": (blr, _simple("X", "y")),
}
_HEAVY = {"one_comp_mm_elim_abs-one_comp_mm_elim_abs": ("K_m", "V_m")}
NAMES = tuple(_POSTERIORS)


def data_file(name: str) -> Path:
    """The file of a reference posterior; it need not exist."""
    default = Path(__file__).parents[2] / "shared" / "data"
    return Path(os.environ.get("PROBMODELS_TEST_DATA", default)) / "posteriordb" / f"{name}.json"


def load(name: str) -> Reference:
    """A reference posterior by its name in posteriordb.

    Raises
    ------
    ValueError
        If there is none of this name.
    ReferenceDataError
        If its file is absent.

    References
    ----------
    Magnusson, M. et al. (2025). posteriordb: testing, benchmarking and developing Bayesian inference algorithms.
    AISTATS.
    """
    if name not in _POSTERIORS:
        raise ValueError(f"no reference posterior {name!r}; choose one of {list(NAMES)}")
    path = data_file(name)
    if not path.exists():
        raise ReferenceDataError(f"{path} not found; set PROBMODELS_TEST_DATA to the folder that holds posteriordb/")
    content = json.loads(path.read_text(encoding="utf-8"))
    model, prepare = _POSTERIORS[name]
    args, heavy = prepare(content["data"]), _HEAVY.get(name, ())
    return Reference(name, model, args, content["reference"], content["reference_draws"], heavy)


def check(reference: Reference, posterior: xr.Dataset) -> list[dict[str, Any]]:
    """Compare draws with a reference.

    Parameters
    ----------
    posterior
        Sites and deterministics with axes chain, draw, ...

    Returns
    -------
    list of dict
        A row per variable: ``z``, the difference of the means over its Monte Carlo standard error (both sides');
        ``sd_ratio``, ours over the reference's, and ``sd_error``, its Monte Carlo standard error (both sides'); the
        means, and ``ess_bulk`` and ``r_hat`` of our draws. For variables without variance, ``z`` is the largest
        difference of the shares of draws below the quantiles of the reference, and ``sd_ratio`` is nan.
    """
    from probmodels.inference.diagnostics.convergence import convergence

    rows = []
    for name, draws in reference.variables(posterior).items():
        known, ours = reference.summary[name], {key: float(value) for key, value in convergence(draws).items()}
        squares, variance = (draws - draws.mean()) ** 2, draws.var(ddof=1)
        if name in reference.heavy:
            z = max(_share_z(draws, known[key], level, reference.num_draws) for key, level in _LEVELS.items())
            ratio = error = np.nan
        else:
            z = abs(draws.mean() - known["mean"]) / np.hypot(ours["mcse_mean"], known["sd"] / reference.num_draws**0.5)
            ratio = variance**0.5 / known["sd"]
            theirs = squares.std() / reference.num_draws**0.5
            error = float(np.hypot(float(convergence(squares)["mcse_mean"]), theirs) / (2 * variance))
        rows.append(
            {
                "posterior": reference.name,
                "variable": name,
                "mean": float(draws.mean()),
                "reference_mean": known["mean"],
                "z": float(z),
                "sd_ratio": float(ratio),
                "sd_error": float(error),
                "ess_bulk": ours["ess_bulk"],
                "r_hat": ours["r_hat"],
            }
        )
    return rows


_LEVELS = {"q05": 0.05, "q50": 0.5, "q95": 0.95}


def _share_z(draws: Array, quantile: float, level: float, num_draws: int) -> float:
    """How many standard errors the share of draws below a quantile of the reference is from its level."""
    from probmodels.inference.diagnostics.convergence import convergence

    below = (draws <= quantile).astype(np.float64)
    error = np.hypot(float(convergence(below)["mcse_mean"]), np.sqrt(level * (1 - level) / num_draws))
    return float(abs(below.mean() - level) / error)


# -- models for timing ------------------------------------------------------------------------------------------------

_SPEED: dict[str, Callable[..., None]] = {"eight_schools": eight_schools, "logistic": logistic, "gaussian": gaussian}
SPEED_NAMES = tuple(_SPEED)


def speed_data(name: str) -> dict[str, Array]:
    """Arguments of a model for timing by name, as arrays: the same for every library compared.

    ``eight_schools``: 10 dimensions, data of Rubin (1981). ``logistic``: 5000 rows of 20 standard normal features, true
    weights N(0, 0.5), generator seeded with 0. ``gaussian``: 50 dimensions, dense precision, random axes (seed 0) whose
    standard deviations run from 0.1^0.5 to 10^0.5.
    """
    rng = np.random.default_rng(0)
    if name == "eight_schools":
        return {
            "y": np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0]),
            "sigma": np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0]),
        }
    if name == "logistic":
        features = rng.standard_normal((5000, 20))
        odds = features @ (0.5 * rng.standard_normal(20))
        return {"features": features, "y": (rng.random(5000) < 1 / (1 + np.exp(-odds))).astype(np.float64)}
    if name == "gaussian":
        axes = np.linalg.qr(rng.standard_normal((50, 50)))[0]
        precision = axes @ np.diag(np.logspace(-0.5, 0.5, 50) ** -2) @ axes.T
        return {"precision": (precision + precision.T) / 2}
    raise ValueError(f"no model for timing {name!r}; choose one of {list(SPEED_NAMES)}")


def speed_model(name: str) -> tuple[Callable[..., None], tuple[Tensor, ...]]:
    """Pyro program of a model for timing by name, see `speed_data`, and what it receives: single precision.

    That is the default of every library compared.
    """
    args = tuple(_tensor(value).float() for value in speed_data(name).values())
    return _SPEED[name], args


def speed_problem(name: str) -> Problem:
    """A model for timing by name, see `speed_data`, as an engine takes it."""
    from probmodels.inference.problem import Problem

    model, args = speed_model(name)
    return Problem(name=name, model=model, args=args)


# -- all of them against their references -----------------------------------------------------------------------------

# The engine's own settings, but for more draws, and two of NUTS: a dense mass matrix, since regressions are not centred
# and a chain with a diagonal one takes a thousand steps per draw, and starts along quasi-Newton paths.
KERNELS: dict[str, dict[str, Any]] = {
    "chees": {"num_chains": 32, "warmup_steps": 300, "num_samples": 1000},
    "nuts": {
        "num_chains": 4,
        "warmup_steps": 1000,
        "num_samples": 1000,
        "kernel_options": {"full_mass": True},
        "init": "pathfinder",
        "chain_method": "sequential",
    },
}


class Phases:
    """CPU seconds of the phases of `run_mcmc`, of which it is a callback; ``"called"`` begins when it is made."""

    def __init__(self) -> None:
        self._begun = {"called": time.process_time()}

    def __call__(self, step: Any) -> None:
        self._begun.setdefault(step.phase, time.process_time())

    def between(self, first: str, second: str) -> float:
        """Seconds from the first time that one phase began to the first time that another did."""
        return self._begun[second] - self._begun[first]


def measure(name: str, kernel: str, **options: Any) -> dict[str, Any]:
    """One run of a sampler on a posterior: the worst variables, divergences, verdict and CPU seconds."""
    from probmodels.inference import run_mcmc

    reference, phases = load(name), Phases()
    problem = reference.problem
    start = time.process_time()
    result = run_mcmc(problem, kernel=kernel, **{**KERNELS[kernel], **options}, progress=False, callbacks=[phases])
    seconds = time.process_time() - start
    rows, report = check(reference, result.posterior), result.diagnose()
    ratios = [row for row in rows if np.isfinite(row["sd_ratio"])]
    stats = result.tree["sample_stats"].to_dataset()
    return {
        "unknowns": int(sum(np.prod(problem.sites[site].shape) for site in problem.names("latent"))),
        "z": max(row["z"] for row in rows),
        "low": min(row["sd_ratio"] for row in ratios),
        "high": max(row["sd_ratio"] for row in ratios),
        "sd_error": max(ratios, key=lambda row: abs(row["sd_ratio"] - 1))["sd_error"],
        "ess": min(row["ess_bulk"] for row in rows),
        "r_hat": max(row["r_hat"] for row in rows),
        "divergences": int(stats["diverging"].sum()),
        "gradients": int(stats["n_steps"].sum()) // (1 if kernel == "nuts" else stats.sizes["chain"]),
        "start": phases.between("finding starting points", "warm-up") / phases.between("warm-up", "sampling"),
        "seconds": seconds,
        "verdict": report.inference,
        "reasons": [finding.verdict for finding in report.findings if finding.harmful],
    }


def within(found: Mapping[str, Any]) -> bool:
    """Whether all means are within 4 standard errors of the reference and all standard deviations within 5 %."""
    return bool(found["z"] < 4 and found["low"] > 0.95 and found["high"] < 1.05)


def main() -> None:
    import common  # isort: skip

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", nargs="*", default=list(KERNELS), choices=list(KERNELS))
    parser.add_argument("--names", nargs="*", default=list(NAMES), choices=list(NAMES), metavar="NAME")
    parser.add_argument("--draws", type=int, default=1000, help="per chain; 32 vectorised chains, 4 of NUTS")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rows = []
    for name in options.names:
        for kernel in options.kernel:
            settings = {"num_samples": options.draws, "seed": options.seed}

            def run(name: str = name, kernel: str = kernel, settings: dict[str, Any] = settings) -> dict[str, Any]:
                return measure(name, kernel, **settings)

            found = common.cell("reference", float("inf"), run, posterior=name, kernel=kernel, **settings)
            rows.append(
                {
                    "posterior": name,
                    "unknowns": found["unknowns"],
                    "kernel": kernel,
                    "largest z of a mean": f"{found['z']:.1f}",
                    "sd ratios (error)": f"{found['low']:.3f}-{found['high']:.3f} ({found['sd_error']:.3f})",
                    "within": "yes" if within(found) else "no",
                    "verdict": found["verdict"],
                    "r_hat": f"{found['r_hat']:.3f}",
                    "least ess": round(found["ess"]),
                    "divergences": found["divergences"],
                    "CPU s": f"{found['seconds']:.0f}",
                    "start / warm-up": f"{100 * found['start']:.0f} %",
                }
            )
            lines = common.table(rows[-1:]).splitlines()
            print("\n".join(lines if len(rows) == 1 else lines[-1:]), flush=True)
    common.report("reference", rows, draws=options.draws, seed=options.seed)


if __name__ == "__main__":
    main()
