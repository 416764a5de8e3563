"""The noising process of diffusion, which is the guide: nothing in it is learned but, if asked for, the schedule.

With ``q(z_t | x) = Normal(alpha_t x, sigma_t)``, for times s < t and ``c = 1 - exp(gamma_s - gamma_t)``::

    q(z_s | z_t, x) = Normal((alpha_s / alpha_t) (1 - c) z_t + alpha_s c x, sigma_s sqrt(c))

The guide draws the noisiest level first and goes down, as the model does: an ELBO with analytic KL divergences is wrong
for a guide that draws in another order than the model.

References
----------
Kingma, D. P., Salimans, T., Poole, B. and Ho, J. (2021). Variational diffusion models. NeurIPS.
https://arxiv.org/abs/2107.00630
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor

from probmodels.guides.schedules import NoiseSchedule

__all__ = ["PREDICTIONS", "NoisingGuide", "Stratified", "convert", "loss_weight", "transition", "unit_normal"]

PREDICTIONS = ("noise", "x0", "score", "velocity")


class Stratified(dist.Uniform):
    """Uniform on [0, 1], drawn at equal distances along the last axis: each entry is uniform, all together are even.

    Entries depend on each other, which their log density, zero, does not say: for sites that model and guide share.
    """

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008 -- torch's own signature
        """A shift at random, and steps of one over the length."""
        shape = self._extended_shape(sample_shape)
        if not shape:
            return super().rsample(sample_shape)
        shift = torch.rand(*shape[:-1], 1, dtype=self.low.dtype, device=self.low.device)
        return (shift + torch.arange(shape[-1], dtype=shift.dtype, device=shift.device) / shape[-1]) % 1.0


def unit_normal(like: Tensor, shape: tuple[int, ...]) -> dist.TorchDistribution:
    """Standard normal noise of a datum."""
    return dist.Normal(like.new_zeros(shape), 1.0).to_event(len(shape))


def transition(schedule: NoiseSchedule, z: Tensor, x: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (row, ...) and sd () of the level of time s given those of a later time t and of the datum.

    With the exact datum it is the guide's, with a predicted one the model's.
    """
    gamma_t, gamma_s = schedule.gamma(t), schedule.gamma(s)
    share = -torch.expm1(gamma_s - gamma_t)
    alpha_t, alpha_s = torch.sigmoid(-gamma_t).sqrt(), torch.sigmoid(-gamma_s).sqrt()
    sd = (torch.sigmoid(gamma_s) * share).sqrt()
    return (alpha_s / alpha_t) * (1 - share) * z + alpha_s * share * x, sd


def convert(value: Tensor, given: str, wanted: str, z: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """One prediction as another, of points ``z = alpha x0 + sigma noise``.

    ``score = -noise / sigma`` and ``velocity = alpha noise - sigma x0``.

    Parameters
    ----------
    value
        Prediction (..., *shape).
    given, wanted
        Two of `PREDICTIONS`.
    z
        Points (..., *shape).
    alpha, sigma
        Signal and noise, which broadcast with z.

    References
    ----------
    Salimans, T. and Ho, J. (2022). Progressive distillation for fast sampling of diffusion models, appendix D.
    https://arxiv.org/abs/2202.00512
    """
    if given == wanted:
        return value
    noise: dict[str, Callable[[], Tensor]] = {
        "noise": lambda: value,
        "x0": lambda: (z - alpha * value) / sigma,
        "score": lambda: -sigma * value,
        "velocity": lambda: sigma * z + alpha * value,
    }
    x0: dict[str, Callable[[], Tensor]] = {
        "noise": lambda: (z - sigma * value) / alpha,
        "x0": lambda: value,
        "score": lambda: (z + sigma**2 * value) / alpha,
        "velocity": lambda: alpha * z - sigma * value,
    }
    if wanted == "noise":
        return noise[given]()
    if wanted == "x0":
        return x0[given]()
    if wanted == "score":
        return -noise[given]() / sigma
    return alpha * noise[given]() - sigma * x0[given]()


def loss_weight(kind: str, alpha: Tensor, sigma: Tensor) -> Tensor:
    """What turns the squared error of a prediction into that of the noise."""
    if kind == "x0":
        return (alpha / sigma) ** 2
    if kind == "score":
        return sigma**2
    return alpha**2 if kind == "velocity" else torch.ones_like(alpha)


class NoisingGuide(PyroModule):
    """Draws what the model of the same options asks for: all levels, or a time and noise.

    Parameters
    ----------
    schedule
        Noise schedule, which the model shares.
    shape
        Shape of a datum.
    encode
        From observed values to data on the scale of the noise.
    num_steps
        Steps between levels, all of them drawn; None for a time and noise.
    extra
        Uniform sites of the model that are drawn as well.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        shape: tuple[int, ...],
        encode: Callable[[Tensor], Tensor],
        num_steps: int | None,
        extra: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        self.schedule, self.shape, self.encode, self.num_steps, self.extra = schedule, shape, encode, num_steps, extra

    def forward(self, data: Tensor, *labels: Tensor) -> None:
        """Sites ``level_T`` to ``level_0``, or ``time``, ``noise`` and ``noise_0``; see `probmodels.diffusion`."""
        with pyro.plate("data", len(data)) as rows:
            x = self.encode(data[rows])
            for name in self.extra:
                pyro.sample(name, dist.Uniform(x.new_zeros(()), x.new_ones(())))
            if self.num_steps is None:
                pyro.sample("time", Stratified(x.new_zeros(()), x.new_ones(())))
                pyro.sample("noise", unit_normal(x, self.shape))
                pyro.sample("noise_0", unit_normal(x, self.shape))
                return
            times = torch.linspace(0.0, 1.0, self.num_steps + 1, dtype=x.dtype, device=x.device)
            gamma = self.schedule.gamma(times[-1])
            mean, sd = torch.sigmoid(-gamma).sqrt() * x, torch.sigmoid(gamma).sqrt()
            z = pyro.sample(f"level_{self.num_steps}", dist.Normal(mean, sd).to_event(len(self.shape)))
            for step in range(self.num_steps, 0, -1):
                mean, sd = transition(self.schedule, z, x, times[step], times[step - 1])
                z = pyro.sample(f"level_{step - 1}", dist.Normal(mean, sd).to_event(len(self.shape)))
