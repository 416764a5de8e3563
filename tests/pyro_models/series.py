"""Gaussian processes and time series."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.contrib.gp as gp
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.contrib.forecast import ForecastingModel
from pyro.contrib.timeseries import IndependentMaternGP
from pyro.infer.reparam import DiscreteCosineReparam, LinearHMMReparam, LocScaleReparam, StableReparam
from pyro.nn import PyroSample
from torch import Tensor

from pyro_models.listing import listed, made, random

# Gaussian processes


def curve() -> tuple[Tensor, Tensor]:
    x = torch.linspace(0.0, 5.0, 10)
    return x, 0.5 * torch.sin(3 * x) + 0.2 * random(10)


@made("Gaussian process regression", "tutorial gp")
def gpr() -> Any:
    x, y = curve()
    rbf = gp.kernels.RBF(input_dim=1, variance=torch.tensor(5.0), lengthscale=torch.tensor(1.0))
    regression = gp.models.GPRegression(x, y, rbf, noise=torch.tensor(1.0))
    rbf.lengthscale = PyroSample(dist.LogNormal(0.0, 1.0))
    rbf.variance = PyroSample(dist.LogNormal(0.0, 1.0))
    return regression.model, ()


@made("sparse Gaussian process regression", "tutorial gp")
def sgpr() -> Any:
    x, y = curve()
    rbf = gp.kernels.RBF(input_dim=1)
    regression = gp.models.SparseGPRegression(x, y, rbf, Xu=torch.arange(5.0), jitter=1e-3)
    rbf.lengthscale = PyroSample(dist.LogNormal(0.0, 1.0))
    return regression.model, ()


@made("GPLVM", "tutorial gplvm")
def gplvm() -> Any:
    x, y = random(6, 2), random(3, 6, seed=1)
    rbf = gp.kernels.RBF(input_dim=2, lengthscale=torch.ones(2))
    module = gp.models.SparseGPRegression(x, y, rbf, Xu=random(3, 2, seed=2), noise=torch.tensor(0.01), jitter=1e-2)
    module.X = PyroSample(dist.Normal(x, 0.1).to_event())
    return module.model, ()


@made("Matern process of a time series", "examples/contrib/timeseries/gp_models.py")
def matern() -> Any:
    process = IndependentMaternGP(nu=1.5, obs_dim=2)
    series = random(8, 2).cumsum(0)

    def model(y: Tensor) -> None:
        shift = pyro.sample("shift", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.factor("y", process.log_prob(y - shift).sum())

    return model, (series,)


# Time series


@listed("local level by GaussianHMM", "documentation of GaussianHMM", args=lambda: (random(9, 1).cumsum(0),))
def gaussian_hmm(y: Tensor) -> None:
    level = pyro.sample("level", dist.LogNormal(0.0, 1.0))
    noise = pyro.sample("noise", dist.LogNormal(0.0, 1.0))
    hmm = dist.GaussianHMM(
        dist.Normal(torch.zeros(1), 10.0).to_event(1),
        torch.eye(1),
        dist.Normal(torch.zeros(1), level.unsqueeze(-1)).to_event(1),
        torch.eye(1),
        dist.Normal(torch.zeros(1), noise.unsqueeze(-1)).to_event(1),
        duration=len(y),
    )
    pyro.sample("obs", hmm, obs=y)


class LocalLinearTrend(ForecastingModel):
    def model(self, zero_data: Tensor, covariates: Tensor) -> None:
        bias = pyro.sample("bias", dist.Normal(0.0, 10.0))
        weight = pyro.sample("weight", dist.Normal(0.0, 0.1))
        drift_scale = pyro.sample("drift_scale", dist.LogNormal(-2.0, 1.0))
        with self.time_plate, poutine.reparam(config={"drift": LocScaleReparam(0.0)}):
            drift = pyro.sample("drift", dist.Normal(zero_data.squeeze(-1), drift_scale))
        motion = drift.cumsum(-1)
        prediction = (motion + bias + (weight * covariates).sum(-1)).unsqueeze(-1)
        noise = pyro.sample("sigma", dist.LogNormal(-5.0, 5.0))
        self.predict(dist.Normal(0, noise.unsqueeze(-1)), prediction)


@made("forecasting: local linear trend", "tutorial forecasting_i")
def forecast() -> Any:
    return LocalLinearTrend(), (random(8, 1).cumsum(0), random(8, 2, seed=1))


class DynamicModel(ForecastingModel):
    def model(self, zero_data: Tensor, covariates: Tensor) -> None:
        init = dist.Normal(0, 10).expand([1]).to_event(1)
        timescale = pyro.sample("timescale", dist.LogNormal(math.log(24), 1))
        matrix = torch.exp(-1 / timescale).unsqueeze(-1).unsqueeze(-1)
        scale = pyro.sample("trans_scale", dist.LogNormal(-0.5, 0.5).expand([1]).to_event(1))
        noise = pyro.sample("obs_scale", dist.LogNormal(-0.5, 0.5).expand([1]).to_event(1))
        stability = pyro.sample("obs_stability", dist.Uniform(1, 2).expand([1]).to_event(1))
        transition = dist.Normal(torch.zeros(1), scale).to_event(1)
        observation = dist.Stable(stability, 0, noise, 0).to_event(1)
        hmm = dist.LinearHMM(init, matrix, transition, torch.eye(1), observation, duration=zero_data.shape[-2])
        with poutine.reparam(config={"residual": LinearHMMReparam(obs=StableReparam())}):
            self.predict(hmm, zero_data)


@made("forecasting: LinearHMM with stable noise", "tutorial forecasting_ii")
def forecast_hmm() -> Any:
    return DynamicModel(), (random(8, 1).cumsum(0), torch.zeros(8, 0))


def volatility(data: Tensor) -> None:
    h_0 = pyro.sample("h_0", dist.Normal(0, 1)).unsqueeze(-1)
    sigma = pyro.sample("sigma", dist.LogNormal(0, 1)).unsqueeze(-1)
    v = pyro.sample("v", dist.Normal(0, 1).expand(data.shape).to_event(1))
    log_h = pyro.deterministic("log_h", h_0 + sigma * v.cumsum(dim=-1))
    sqrt_h = log_h.mul(0.5).exp().clamp(min=1e-8, max=1e8)
    r_loc = pyro.sample("r_loc", dist.Normal(0, 1e-2)).unsqueeze(-1)
    r_skew = pyro.sample("r_skew", dist.Uniform(-1, 1)).unsqueeze(-1)
    r_stability = pyro.sample("r_stability", dist.Uniform(0, 2)).unsqueeze(-1)
    pyro.sample("r", dist.Stable(r_stability, r_skew, sqrt_h, r_loc * sqrt_h).to_event(1), obs=data)


listed("stochastic volatility, reparametrised", "tutorial stable", args=lambda: (0.01 * random(8),))(
    poutine.reparam(volatility, {"v": DiscreteCosineReparam(), "r": StableReparam()})
)
listed(
    "stochastic volatility, reparam of the problem",
    "tutorial stable",
    args=lambda: (0.01 * random(8),),
    reparam={"v": DiscreteCosineReparam(), "r": StableReparam()},
)(volatility)
