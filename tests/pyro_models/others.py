"""Further distributions and handlers."""

from __future__ import annotations

from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from pyro.contrib.mue.missingdatahmm import MissingDataDiscreteHMM
from pyro.contrib.tracking.assignment import MarginalAssignment
from pyro.contrib.tracking.distributions import EKFDistribution
from pyro.contrib.tracking.dynamic_models import NcvContinuous
from pyro.infer import config_enumerate
from pyro.ops.indexing import Vindex
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_models.listing import PARALLEL, listed, random


class DualMoon(dist.TorchDistribution):
    """A distribution of one's own."""

    support = constraints.independent(constraints.real, 1)
    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self) -> None:
        super().__init__(event_shape=(2,))

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return torch.randn(*sample_shape, 2)

    def log_prob(self, z: Tensor) -> Tensor:
        ring = ((z.norm(dim=-1) - 2) / 0.4).square()
        arms = torch.stack([((z[..., 0] + shift) / 0.6).square() for shift in (2.0, -2.0)], -1)
        return -0.5 * ring + torch.logsumexp(-0.5 * arms, -1)


@listed("dual moon", "examples/neutra.py")
def dual_moon() -> None:
    pyro.sample("x", DualMoon())


@listed(
    "tensor shapes",
    "tutorial tensor_shapes",
    args=lambda: (random(8, 10),),
)
def shapes(y: Tensor) -> None:
    a = pyro.sample("a", dist.Normal(0, 1))
    b = pyro.sample("b", dist.Normal(torch.zeros(2), 1).to_event(1))
    with pyro.plate("c_plate", 2):
        c = pyro.sample("c", dist.Normal(torch.zeros(2), 1))
    with pyro.plate("d_plate", 3):
        d = pyro.sample("d", dist.Normal(torch.zeros(3, 4, 5), 1).to_event(2))
    x_axis, y_axis = pyro.plate("x_axis", 8, dim=-2), pyro.plate("y_axis", 10, dim=-1)
    with x_axis:
        x = pyro.sample("x", dist.Normal(0, 1))
    with y_axis:
        z = pyro.sample("y", dist.Normal(0, 1))
    with x_axis, y_axis:
        pyro.sample("xy", dist.Normal(x + z + a + b.sum() + c.sum() + d.sum(), 1), obs=y)


@listed("discrete sites in nested plates", "tutorial enumeration", args=lambda: (random(3, 2),))
@config_enumerate
def enumeration_plates(data: Tensor) -> None:
    p_x = pyro.sample("p_x", dist.Beta(1, 1))
    locs = pyro.sample("locs", dist.Normal(torch.zeros(2, 2), 1.0).to_event(2))
    with pyro.plate("outer", 3, dim=-2):
        x = pyro.sample("x", dist.Bernoulli(p_x)).long()
        with pyro.plate("inner", 2, dim=-1):
            y = pyro.sample("y", dist.Categorical(torch.tensor([[0.3, 0.7], [0.6, 0.4]])[x]))
            pyro.sample("z", dist.Normal(Vindex(locs)[x, y], 1.0), obs=data)


@listed(
    "ordinal regression",
    "documentation of OrderedLogistic",
    args=lambda: (random(9), torch.tensor([0.0, 1, 2, 1, 0, 2, 2, 1, 0])),
)
def ordinal(x: Tensor, y: Tensor) -> None:
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    ordered = dist.TransformedDistribution(
        dist.Normal(torch.zeros(2), 1.0).to_event(1), dist.transforms.OrderedTransform()
    )
    cuts = pyro.sample("cuts", ordered)
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.OrderedLogistic(b * x, cuts), obs=y)


@listed(
    "zero-inflated counts",
    "documentation of ZeroInflatedPoisson",
    args=lambda: (torch.tensor([0.0, 0, 3, 1, 0, 5, 0]),),
)
def zero_inflated(y: Tensor) -> None:
    gate = pyro.sample("gate", dist.Beta(1.0, 1.0))
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.ZeroInflatedPoisson(rate, gate=gate), obs=y)


@listed(
    "protein angles",
    "documentation of SineBivariateVonMises",
    args=lambda: (random(7, 2).clamp(-3, 3),),
    reason=("reads a value out of a tensor", "dist.SineBivariateVonMises("),
)
def sine(angles: Tensor) -> None:
    mix = pyro.sample("mix_weights", dist.Dirichlet(torch.ones(2)))
    with pyro.plate("mixture", 2):
        phi = pyro.sample("phi_loc", dist.VonMises(0.0, 1.0))
        psi = pyro.sample("psi_loc", dist.VonMises(0.0, 1.0))
        kappa = pyro.sample("kappa", dist.HalfNormal(2.0))
        corr = pyro.sample("corr_scale", dist.Beta(2.0, 5.0))
    with pyro.plate("obs_plate", len(angles)):
        k = pyro.sample("assign", dist.Categorical(mix), infer=PARALLEL)
        fn = dist.SineBivariateVonMises(phi[k], psi[k], kappa[k], kappa[k], weighted_correlation=corr[k])
        pyro.sample("angles", fn, obs=angles)


@listed("flat priors", "documentation of ImproperUniform", args=lambda: (random(12),))
def flat(y: Tensor) -> None:
    loc = pyro.sample("loc", dist.ImproperUniform(constraints.real, (), ()))
    scale = pyro.sample("scale", dist.ImproperUniform(constraints.positive, (), ()))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(loc, scale), obs=y)


@listed("extended Kalman filter", "tutorial ekf", args=lambda: (random(5, 2).cumsum(0),))
def kalman(positions: Tensor) -> None:
    noise = pyro.sample("noise", dist.LogNormal(0.0, 1.0))
    model = NcvContinuous(4, 2.0)
    start, covariance = torch.zeros(4), torch.eye(4)
    fn = EKFDistribution(start, covariance, model, noise * torch.eye(2), time_steps=len(positions))
    pyro.sample("track", fn, obs=positions)


@listed(
    "profile HMM",
    "examples/contrib/mue/ProfileHMM.py",
    args=lambda: (nn.functional.one_hot(torch.tensor([[0, 1, 2], [1, 1, 0]]), 3).float(),),
)
def profile(x: Tensor) -> None:
    initial = pyro.sample("initial", dist.Dirichlet(torch.ones(2)))
    transition = pyro.sample("transition", dist.Dirichlet(torch.ones(2, 2)).to_event(1))
    emission = pyro.sample("emission", dist.Dirichlet(torch.ones(2, 3)).to_event(1))
    with pyro.plate("batch", len(x)):
        pyro.sample("x", MissingDataDiscreteHMM(initial.log(), transition.log(), emission.log()), obs=x)


@listed(
    "states of an election",
    "tutorial elections",
    args=lambda: (random(4, 3).abs().round() + 1, torch.tensor([1.0, 0, 2])),
)
def election(votes: Tensor, total: Tensor) -> None:
    prior = dist.MultivariateNormal(torch.zeros(3), 0.5 * torch.eye(3) + 0.1)
    alpha = pyro.sample("alpha", prior)
    with pyro.plate("polls", len(votes), dim=-1):
        pyro.sample("y", dist.Poisson(alpha.exp()).to_event(1), obs=votes)
    pyro.factor("total", -(alpha * total).sum().square())


@listed(
    "causal effect variational autoencoder",
    "examples/contrib/cevae/synthetic.py",
    args=lambda: (random(6, 3), torch.tensor([1.0, 0, 1, 1, 0, 0])),
)
def cevae(x: Tensor, t: Tensor) -> None:
    weight = pyro.param("weight", lambda: torch.ones(2, 3))
    with pyro.plate("data", len(x), subsample=x):
        z = pyro.sample("z", dist.Normal(0, 1).expand([2]).to_event(1))
        pyro.sample("x", dist.Normal(z @ weight, 1.0).to_event(1), obs=x)
        pyro.sample("t", dist.Bernoulli(logits=z.sum(-1)), obs=t)
        logits = torch.where(t.bool(), z[:, 0], z[:, 1])
        pyro.sample("y", dist.Laplace(logits, 1.0), obs=x[:, 0])


@listed("tracking by assignments", "tutorial tracking_1d", args=lambda: (random(3, 2), torch.ones(3, 2)))
def tracking(observations: Tensor, mask: Tensor) -> None:
    with pyro.plate("objects", 2):
        loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
    exists = dist.Normal(loc, 1.0).log_prob(observations[:, :1])
    found = MarginalAssignment(torch.zeros(2), exists, bp_iters=5)
    probability = found.assign_dist.logits.logsumexp(-1).sum() + found.exists_dist.probs.sum()
    pyro.factor("observations", probability)


@listed(
    "coin flips by data",
    "none; reads its data",
    args=lambda: (torch.tensor([1.0, 0, 1, 1]), {"strength": torch.tensor(2.0)}),
)
def reads_data(y: Tensor, config: dict[str, Tensor]) -> None:
    f = pyro.sample("f", dist.Beta(float(config["strength"]), config["strength"].item()))
    ones = int(y.sum())
    if y.mean() > 0.5:
        pyro.factor("ones", ones * f.log())
    for index in y.nonzero().squeeze(-1).tolist():
        pyro.sample(f"y_{index}", dist.Bernoulli(f), obs=y[index])
    weights = torch.zeros(4)
    for t in range(1, 4):
        weights[t] = 0.5 * weights[t - 1] + f
    pyro.factor("weights", -weights.sum())
