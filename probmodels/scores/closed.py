"""Fields of scores in closed form: mixtures of normals, and uniform boxes."""

from __future__ import annotations

import math

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from probmodels.errors import ProblemError
from probmodels.guides.schedules import NoiseSchedule
from probmodels.inference.mcmc.line_integrals import Evaluation
from probmodels.options import Draws, Positive, checked
from probmodels.scores.fields import Field, as_numbers, observation

__all__ = ["GaussianMixture", "UniformBox"]


class GaussianMixture(Field):
    """Normal components, whose noised form is one of normal components too.

    Parameters
    ----------
    schedule
        Noise schedule.
    means
        Means (component, size).
    covariances
        Covariances (component, size, size), or variances (component, size), or one number.
    weights
        Weights (component,), not negative, of any sum; None for equal ones.

    Raises
    ------
    ProblemError
        If shapes differ, weights are negative, or a covariance is not positive definite.
    """

    has_density = True

    @checked(ProblemError)
    def __init__(
        self,
        schedule: NoiseSchedule,
        means: ArrayLike | Tensor,
        covariances: ArrayLike | Tensor,
        weights: ArrayLike | Tensor | None = None,
    ) -> None:
        means = as_numbers("means", means).double()
        if means.ndim != 2 or 0 in means.shape:
            raise ProblemError(f"means of shape {tuple(means.shape)}; give (component, size)")
        count, size = means.shape
        super().__init__(schedule, (size,))
        covariances = as_numbers("covariances", covariances).double()
        fits = all(n in (1, m) for n, m in zip(covariances.shape[::-1], (size, count), strict=False))
        if covariances.ndim < 3 and fits:
            covariances = torch.diag_embed(covariances.expand(count, size))
        if covariances.shape != (count, size, size):
            raise ProblemError(f"covariances of shape {tuple(covariances.shape)} for {count} means of size {size}")
        weights = torch.ones(count) if weights is None else as_numbers("weights", weights)
        if weights.shape != (count,) or not (weights >= 0).all() or not weights.sum() > 0:
            raise ProblemError(f"weights={weights.tolist()}; give {count} that are not negative, some positive")
        self.means, self.covariances = means, covariances
        self.weights = weights.double() / weights.sum()
        self._variances, self._axes = torch.linalg.eigh(covariances)
        if not (self._variances > 0).all():
            raise ProblemError(f"covariances have an eigenvalue of {float(self._variances.min()):.3g}; all must be > 0")

    def components(self, z: Tensor, t: float) -> tuple[Tensor, Tensor]:
        """Log densities with weights (sample, component), and scores (sample, component, size), of the components."""
        alpha, sigma = self.scales(t, z)
        variances = alpha**2 * self._variances.to(z) + sigma**2
        axes = self._axes.to(z)
        along = torch.einsum("nkd,kde->nke", z.unsqueeze(1) - alpha * self.means.to(z), axes)
        log_norm = variances.log().sum(-1) + self.shape[0] * math.log(2 * math.pi)
        log_density = self.weights.log().to(z) - 0.5 * ((along**2 / variances).sum(-1) + log_norm)
        return log_density, -torch.einsum("nke,kde->nkd", along / variances, axes)

    def evaluate(self, z: Tensor, t: float) -> Evaluation:
        log_density, scores = self.components(z, t)
        share = log_density.softmax(-1)
        return Evaluation((share.unsqueeze(-1) * scores).sum(1), None, log_density.logsumexp(-1))

    @checked(ProblemError)
    def sample(self, num_samples: Draws, t: float = 0.0, *, generator: torch.Generator | None = None) -> Tensor:
        """Exact draws (sample, size) of the density at a time, in double precision."""
        chosen = torch.multinomial(self.weights, num_samples, replacement=True, generator=generator)
        alpha, sigma = self.scales(t, self.means)
        noise = torch.randn(num_samples, self.shape[0], dtype=torch.float64, generator=generator)
        scale = (alpha**2 * self._variances[chosen] + sigma**2).sqrt()
        return alpha * self.means[chosen] + torch.einsum("nde,ne->nd", self._axes[chosen], scale * noise)

    @checked(ProblemError)
    def given(self, matrix: ArrayLike | Tensor, observed: ArrayLike | Tensor, sd: Positive) -> GaussianMixture:
        """Exact posterior of a datum given ``observed ~ Normal(matrix x, sd)``, a mixture too.

        Parameters
        ----------
        matrix
            What is observed of a datum (observation, size).
        observed
            Observations (observation,).
        sd
            Standard deviation of their noise.
        """
        matrix, observed = (numbers.double() for numbers in observation(matrix, observed))
        crossed = self.covariances @ matrix.mT
        spread = matrix @ crossed + sd**2 * torch.eye(len(matrix), dtype=torch.float64)
        gain = torch.linalg.solve(spread, crossed.mT).mT
        left = observed - self.means @ matrix.mT
        means = self.means + torch.einsum("kdo,ko->kd", gain, left)
        covariances = self.covariances - gain @ crossed.mT
        seen = torch.distributions.MultivariateNormal(torch.zeros(len(matrix), dtype=torch.float64), spread)
        weights = (self.weights.log() + seen.log_prob(left)).softmax(-1)
        return GaussianMixture(self.schedule, means, (covariances + covariances.mT) / 2, weights)


class UniformBox(Field):
    """Uniform between ``low`` and ``high`` (size,) in every direction; noised, differences of normal tails."""

    has_density = True

    @checked(ProblemError)
    def __init__(self, schedule: NoiseSchedule, low: ArrayLike | Tensor, high: ArrayLike | Tensor) -> None:
        self.low, self.high = as_numbers("low", low).double(), as_numbers("high", high).double()
        if self.low.ndim != 1 or self.low.shape != self.high.shape or not (self.low < self.high).all():
            raise ProblemError("low and high are to be vectors of one size, low below high")
        super().__init__(schedule, self.low.shape)

    def evaluate(self, z: Tensor, t: float) -> Evaluation:
        alpha, sigma = self.scales(t, z)
        low, high = alpha * self.low.to(z), alpha * self.high.to(z)
        # Differences of tails on the side where they are small; the density is symmetric about the middle.
        middle, half = (low + high) / 2, (high - low) / (2 * sigma)
        side = torch.where(z > middle, -1.0, 1.0)
        place = side * (z - middle) / sigma
        near, far = place + half, place - half
        log_near = torch.special.log_ndtr(near)
        hazards = _hazard(near), _hazard(far)
        # Tail beyond over tail within; far out, normal densities give the ratio that logarithms of tails round away.
        log_share = torch.where(
            near < 0,
            2 * place * half + (_hazard(near.clamp(max=0.0)) / hazards[1]).log(),
            torch.special.log_ndtr(far) - log_near,
        )
        share = log_share.exp()
        log_density = (log_near + torch.log1p(-share) - (high - low).log()).sum(-1)
        return Evaluation(side * (hazards[0] - share * hazards[1]) / (1 - share) / sigma, None, log_density)

    @checked(ProblemError)
    def sample(self, num_samples: Draws, t: float = 0.0, *, generator: torch.Generator | None = None) -> Tensor:
        """Exact draws (sample, size) of the density at a time, in double precision."""
        alpha, sigma = self.scales(t, self.low)
        rows = (num_samples, *self.shape)
        share = torch.rand(rows, dtype=torch.float64, generator=generator)
        noise = torch.randn(rows, dtype=torch.float64, generator=generator)
        return alpha * (self.low + (self.high - self.low) * share) + sigma * noise


def _hazard(x: Tensor) -> Tensor:
    """Normal density over the tail below x, as far out as x goes."""
    below = math.sqrt(2 / math.pi) / torch.special.erfcx(-x.clamp(max=0.0) / math.sqrt(2))
    above = torch.exp(-0.5 * x**2 - torch.special.log_ndtr(x.clamp(min=0.0))) / math.sqrt(2 * math.pi)
    return torch.where(x < 0, below, above)
