"""Models with networks."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_models.listing import PARALLEL, made, random


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc21 = nn.Linear(2, 5), nn.Linear(5, 6)
        self.softplus = nn.Softplus()

    def forward(self, z: Tensor) -> Tensor:
        return torch.sigmoid(self.fc21(self.softplus(self.fc1(z))))


class VAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.decoder = Decoder()

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            zeros = torch.zeros(x.shape[0], 2, dtype=x.dtype, device=x.device)
            z = pyro.sample("latent", dist.Normal(zeros, torch.ones_like(zeros)).to_event(1))
            image = self.decoder.forward(z)
            pyro.sample("obs", dist.Bernoulli(image, validate_args=False).to_event(1), obs=x.reshape(-1, 6))


@made("variational autoencoder", "tutorial vae")
def vae() -> Any:
    return VAE().model, (random(4, 6).gt(0).float(),)


class Topics(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.beta = nn.Linear(3, 7, bias=False)
        self.bn = nn.BatchNorm1d(7, affine=False)

    def forward(self, docs: Tensor) -> None:
        pyro.module("decoder", self)
        with pyro.plate("documents", docs.shape[0]):
            logtheta_loc = docs.new_zeros((docs.shape[0], 3))
            logtheta_scale = docs.new_ones((docs.shape[0], 3))
            logtheta = pyro.sample("logtheta", dist.Normal(logtheta_loc, logtheta_scale).to_event(1))
            theta = nn.functional.softmax(logtheta, -1)
            count_param = nn.functional.softmax(self.bn(self.beta(theta)), dim=1)
            total_count = int(docs.sum(-1).max())
            pyro.sample("obs", dist.Multinomial(total_count, count_param), obs=docs)


@made("ProdLDA", "tutorial prodlda")
def prodlda() -> Any:
    return Topics(), (torch.randint(0, 4, (5, 7)).float(),)


class Transition(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.mean, self.scale = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        gate = torch.sigmoid(self.gate(z))
        loc = (1 - gate) * z + gate * self.mean(torch.relu(z))
        return loc, nn.functional.softplus(self.scale(torch.relu(loc)))


class DMM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trans, self.emitter = Transition(), nn.Linear(2, 3)
        self.z_0 = nn.Parameter(torch.zeros(2))

    def model(self, mini_batch: Tensor, mask: Tensor, annealing: float = 0.7) -> None:
        pyro.module("dmm", self)
        z_prev = self.z_0.expand(mini_batch.size(0), self.z_0.size(0))
        with pyro.plate("z_minibatch", len(mini_batch)):
            for t in pyro.markov(range(1, mini_batch.size(1) + 1)):
                loc, scale = self.trans(z_prev)
                with poutine.scale(None, annealing):
                    z_t = pyro.sample(f"z_{t}", dist.Normal(loc, scale).to_event(1).mask(mask[:, t - 1]))
                emission = torch.sigmoid(self.emitter(z_t))
                fn = dist.Bernoulli(emission).to_event(1).mask(mask[:, t - 1])
                pyro.sample(f"obs_x_{t}", fn, obs=mini_batch[:, t - 1, :])
                z_prev = z_t


@made("deep Markov model", "tutorial dmm")
def dmm() -> Any:
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[2, 2:] = False
    return DMM().model, (random(3, 4, 3).gt(0).float(), mask)


class SemiSupervised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Linear(2 + 3, 4)

    def model(self, xs: Tensor, ys: Tensor | None = None) -> None:
        pyro.module("ss_vae", self)
        with pyro.plate("data", len(xs)):
            prior_loc = xs.new_zeros([len(xs), 2])
            zs = pyro.sample("z", dist.Normal(prior_loc, torch.ones_like(prior_loc)).to_event(1))
            alpha_prior = xs.new_ones([len(xs), 3]) / 3
            ys = pyro.sample("y", dist.OneHotCategorical(alpha_prior), obs=ys, infer=PARALLEL)
            shape = torch.broadcast_shapes(zs.shape[:-1], ys.shape[:-1])
            joined = torch.cat([zs.expand(*shape, 2), ys.expand(*shape, 3)], -1)
            loc = torch.sigmoid(self.decoder(joined))
            pyro.sample("x", dist.Bernoulli(loc, validate_args=False).to_event(1), obs=xs)


@made("semi-supervised autoencoder", "tutorial ss-vae")
def semi_supervised() -> Any:
    return SemiSupervised().model, (random(4, 4).gt(0).float(),)


@made(
    "flow as a prior",
    "tutorial vae_flow_prior",
    reason=("shapes depend on values", "outputs[outside_interval_mask] ="),
)
def flow_prior() -> Any:
    flow = dist.transforms.affine_coupling(2, hidden_dims=[4])
    spline = dist.transforms.spline(2, count_bins=3)

    def model(y: Tensor) -> None:
        pyro.module("flow", nn.ModuleList([flow, spline]))
        base = dist.Normal(torch.zeros(2), torch.ones(2))
        z = pyro.sample("z", dist.TransformedDistribution(base, [spline, flow]))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(z.sum(), 1.0), obs=y)

    return model, (random(6),)
