"""Hierarchical models and regressions."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.reparam import LocScaleReparam
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn

from pyro_models.listing import listed, made, random

# Hierarchical models

EFFECT = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERROR = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def eight_schools(sigma: Tensor) -> Tensor:
    """Without plates, as published."""
    eta = pyro.sample("eta", dist.Normal(torch.zeros(8), torch.ones(8)))
    mu = pyro.sample("mu", dist.Normal(torch.zeros(1), 10 * torch.ones(1)))
    tau = pyro.sample("tau", dist.HalfCauchy(25 * torch.ones(1)))
    return pyro.sample("obs", dist.Normal(mu + tau * eta, sigma))


@listed("eight schools", "examples/eight_schools/mcmc.py", args=lambda: (ERROR, EFFECT))
def conditioned_schools(sigma: Tensor, y: Tensor) -> Tensor:
    return poutine.condition(eight_schools, data={"obs": y})(sigma)


AT_BATS = torch.tensor([45.0, 40.0, 50.0, 45.0, 42.0])
HITS = torch.tensor([18.0, 17.0, 16.0, 11.0, 7.0])


@listed("baseball: fully pooled", "examples/baseball.py", args=lambda: (AT_BATS, HITS))
def fully_pooled(at_bats: Tensor, hits: Tensor) -> None:
    phi = pyro.sample("phi", dist.Uniform(at_bats.new_tensor(0.0), at_bats.new_tensor(1.0)))
    with pyro.plate("num_players", at_bats.shape[0]):
        pyro.sample("obs", dist.Binomial(at_bats, phi), obs=hits)


@listed("baseball: partially pooled", "examples/baseball.py", args=lambda: (AT_BATS, HITS))
def partially_pooled(at_bats: Tensor, hits: Tensor) -> None:
    m = pyro.sample("m", dist.Uniform(at_bats.new_tensor(0.0), at_bats.new_tensor(1.0)))
    kappa = pyro.sample("kappa", dist.Pareto(at_bats.new_tensor(1.0), at_bats.new_tensor(1.5)))
    with pyro.plate("num_players", at_bats.shape[0]):
        phi = pyro.sample("phi", dist.Beta(m * kappa, (1 - m) * kappa))
        pyro.sample("obs", dist.Binomial(at_bats, phi), obs=hits)


@listed("baseball: pooled in logits", "examples/baseball.py", args=lambda: (AT_BATS, HITS))
def partially_pooled_with_logit(at_bats: Tensor, hits: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(at_bats.new_tensor(-1.0), at_bats.new_tensor(1.0)))
    scale = pyro.sample("scale", dist.HalfCauchy(at_bats.new_tensor(1.0)))
    with pyro.plate("num_players", at_bats.shape[0]):
        alpha = pyro.sample("alpha", dist.Normal(loc, scale))
        pyro.sample("obs", dist.Binomial(at_bats, logits=alpha), obs=hits)


@listed("Neal's funnel", "documentation of LocScaleReparam")
def funnel() -> None:
    y = pyro.sample("y", dist.Normal(0.0, 3.0))
    with pyro.plate("D", 10):
        pyro.sample("x", dist.Normal(0.0, torch.exp(y / 2)))


listed("Neal's funnel, decentred", "documentation of LocScaleReparam", reparam={"x": LocScaleReparam(0.0)})(funnel)


@listed("coin flips", "tutorial svi_part_i", args=lambda: ([1.0, 1.0, 0.0, 1.0],))
def coins(data: list[float]) -> None:
    f = pyro.sample("latent_fairness", dist.Beta(torch.tensor(10.0), torch.tensor(10.0)))
    for i in range(len(data)):
        pyro.sample(f"obs_{i}", dist.Bernoulli(f), obs=torch.tensor(data[i]))


@listed("a scale and its reading", "tutorial intro_part_i", args=lambda: (torch.tensor(8.5),))
def scale_of_weights(guess: Tensor) -> Tensor:
    weight = pyro.sample("weight", dist.Normal(guess, 1.0))
    return pyro.sample("measurement", dist.Normal(weight, 0.75), obs=torch.tensor(9.5))


@listed("minipyro", "examples/minipyro.py", args=lambda: (3.0 + random(100),))
def mini(data: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(data), dim=-1):
        pyro.sample("obs", dist.Normal(loc, 1.0), obs=data)


@listed("correlations by LKJ", "examples/lkj.py", args=lambda: (random(30, 3),))
def lkj(y: Tensor) -> None:
    d = y.shape[1]
    options = {"dtype": y.dtype, "device": y.device}
    theta = pyro.sample("theta", dist.HalfCauchy(torch.ones(d, **options)))
    l_omega = pyro.sample("L_omega", dist.LKJCholesky(d, torch.ones((), **options)))
    l_big = torch.mm(torch.diag(theta.sqrt()), l_omega)
    with pyro.plate("observations", len(y)):
        pyro.sample("obs", dist.MultivariateNormal(torch.zeros(d, **options), scale_tril=l_big), obs=y)


# Regressions


class Regression(PyroModule):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = PyroModule[nn.Linear](width, 1)
        self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, width]).to_event(2))
        self.linear.bias = PyroSample(dist.Normal(0.0, 10.0).expand([1]).to_event(1))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        sigma = pyro.sample("sigma", dist.Uniform(0.0, 10.0))
        mean = self.linear(x).squeeze(-1)
        with pyro.plate("data", x.shape[0]):
            pyro.sample("obs", dist.Normal(mean, sigma), obs=y)
        return mean


@made("linear regression by modules", "tutorial bayesian_regression")
def regression() -> Any:
    return Regression(3), (random(20, 3), random(20, seed=1))


@listed(
    "ruggedness",
    "tutorial bayesian_regression_ii",
    args=lambda: (random(20).gt(0).float(), random(20, seed=1), random(20, seed=2)),
)
def ruggedness(is_cont_africa: Tensor, rugged: Tensor, log_gdp: Tensor) -> None:
    a = pyro.sample("a", dist.Normal(8.0, 1000.0))
    b_a = pyro.sample("bA", dist.Normal(0.0, 1.0))
    b_r = pyro.sample("bR", dist.Normal(0.0, 1.0))
    b_ar = pyro.sample("bAR", dist.Normal(0.0, 1.0))
    sigma = pyro.sample("sigma", dist.Uniform(0.0, 10.0))
    mean = a + b_a * is_cont_africa + b_r * rugged + b_ar * is_cont_africa * rugged
    with pyro.plate("data", len(rugged)):
        pyro.sample("obs", dist.Normal(mean, sigma), obs=log_gdp)


class Network(PyroModule):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.activation = nn.Tanh()
        self.layer1 = PyroModule[nn.Linear](1, width)
        self.layer2 = PyroModule[nn.Linear](width, 1)
        self.layer1.weight = PyroSample(dist.Normal(0.0, 10.0).expand([width, 1]).to_event(2))
        self.layer1.bias = PyroSample(dist.Normal(0.0, 10.0).expand([width]).to_event(1))
        self.layer2.weight = PyroSample(dist.Normal(0.0, 10.0).expand([1, width]).to_event(2))
        self.layer2.bias = PyroSample(dist.Normal(0.0, 10.0).expand([1]).to_event(1))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        x = x.reshape(-1, 1)
        mu = self.layer2(self.activation(self.layer1(x))).squeeze()
        sigma = pyro.sample("sigma", dist.Gamma(0.5, 1.0))
        with pyro.plate("data", x.shape[0]):
            pyro.sample("obs", dist.Normal(mu, sigma * sigma), obs=y)
        return mu


@made("bayesian neural network", "tutorial modules")
def neurons() -> Any:
    return Network(), (random(15), random(15, seed=1))


class HalfNormalLinear(PyroModule):
    """Priors that depend on other priors, as functions of the module."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = PyroSample(dist.LogNormal(0.0, 1.0))
        self.weight = PyroSample(lambda self: dist.Normal(0.0, self.scale).expand([2]).to_event(1))
        self.bias = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor, y: Tensor) -> None:
        mean = x @ self.weight + self.bias
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(mean, 1.0), obs=y)


@made("modules whose priors depend on each other", "tutorial modules")
def dependent_modules() -> Any:
    return HalfNormalLinear(), (random(10, 2), random(10, seed=1))


class Logistic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).squeeze(-1)


@made("logistic regression by random_module", "examples/bayesian_regression.py")
def random_module() -> Any:
    network = Logistic()

    def model(x: Tensor, y: Tensor) -> None:
        priors = {
            "linear.weight": dist.Normal(torch.zeros(1, 3), torch.ones(1, 3)).to_event(2),
            "linear.bias": dist.Normal(torch.zeros(1), 10 * torch.ones(1)).to_event(1),
        }
        lifted = pyro.random_module("module", network, priors)()
        with pyro.plate("map", len(x)):
            pyro.sample("obs", dist.Bernoulli(logits=lifted(x)), obs=y)

    return model, (random(12, 3), random(12, seed=1).gt(0).float())


def kernel(x: Tensor, z: Tensor, eta1: Tensor, eta2: Tensor, c: float) -> Tensor:
    one, two = eta1.pow(2.0), eta2.pow(2.0)
    dot = torch.mm(x, z.t())
    squares = torch.mm(x.pow(2.0), z.pow(2.0).t())
    return 0.5 * two * (1.0 + dot).pow(2.0) - 0.5 * two * squares + (one - two) * dot + c**2 - 0.5 * two


@listed("sparse regression", "examples/sparse_regression.py", args=lambda: (random(8, 4), random(8, seed=1)))
def sparse_regression(x: Tensor, y: Tensor, jitter: float = 1e-4) -> None:
    n, p = x.shape
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    eta1 = pyro.sample("eta1", dist.HalfCauchy(sigma * (2.0 / math.sqrt(n)) / (p - 2.0)))
    msq = pyro.sample("msq", dist.InverseGamma(3.0, 1.0))
    xisq = pyro.sample("xisq", dist.InverseGamma(3.0, 1.0))
    eta2 = eta1.pow(2.0) * xisq.sqrt() / msq
    lam = pyro.sample("lambda", dist.HalfCauchy(torch.ones(p, device=x.device)).to_event(1))
    kappa = msq.sqrt() * lam / (msq + (eta1 * lam).pow(2.0)).sqrt()
    var_obs = pyro.sample("var_obs", dist.InverseGamma(3.0, 1.0))
    k = kernel(kappa * x, kappa * x, eta1, eta2, 1.0) + (var_obs + jitter) * torch.eye(n, device=x.device)
    pyro.sample("Y", dist.MultivariateNormal(torch.zeros(n, device=x.device), covariance_matrix=k), obs=y)


@listed("horseshoe", "documentation of HalfCauchy", args=lambda: (random(10, 4), random(10, seed=1)))
def horseshoe(x: Tensor, y: Tensor) -> None:
    tau = pyro.sample("tau", dist.HalfCauchy(1.0))
    with pyro.plate("features", x.shape[1]):
        lam = pyro.sample("lambda", dist.HalfCauchy(1.0))
        beta = pyro.sample("beta", dist.Normal(0.0, 1.0)) * lam * tau
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ beta, 1.0), obs=y)


@listed(
    "working memory",
    "tutorial working_memory",
    args=lambda: (torch.arange(1.0, 8.0), torch.tensor([1.0, 1, 1, 1, 0, 1, 0])),
)
def working_memory(lengths: Tensor, y: Tensor) -> None:
    theta = pyro.sample("theta", dist.Normal(torch.tensor(7.0), torch.tensor(2.0)))
    with pyro.plate("trials", len(lengths)):
        pyro.sample("y", dist.Bernoulli(logits=theta - lengths), obs=y)


@listed(
    "logistic growth",
    "tutorial logistic-growth",
    args=lambda: (torch.linspace(0.0, 3.0, 12), random(12, seed=1).abs() * 10),
)
def logistic_growth(t: Tensor, cases: Tensor) -> None:
    r = pyro.sample("r", dist.LogNormal(0.0, 0.5))
    k = pyro.sample("K", dist.LogNormal(3.0, 0.5))
    start = pyro.sample("start", dist.LogNormal(0.0, 1.0))
    mean = k / (1 + (k / start - 1) * torch.exp(-r * t))
    dispersion = pyro.sample("dispersion", dist.HalfNormal(1.0))
    with pyro.plate("days", len(t)):
        pyro.sample(
            "cases", dist.GammaPoisson(1 / dispersion, 1 / (dispersion * mean.clamp(min=1e-3))), obs=cases.round()
        )
