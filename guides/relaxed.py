"""Discrete variables with gradients: hard values forward, an approximate derivative backward.

Both families give values 0 and 1, have the log probability of the Bernoulli distribution that they stand for, and its
analytic Kullback–Leibler divergence from another one. They differ in the derivative of a value with respect to the
parameters, which is biased in both: compare with an unbiased estimator where that matters.

References
----------
Bengio, Y., Léonard, N. and Courville, A. (2013). Estimating or propagating gradients through stochastic neurons for
conditional computation. https://arxiv.org/abs/1308.3432
Maddison, C. J., Mnih, A. and Teh, Y. W. (2017). The concrete distribution. https://arxiv.org/abs/1611.00712
Jang, E., Gu, S. and Poole, B. (2017). Categorical reparameterization with Gumbel-softmax.
https://arxiv.org/abs/1611.01144
"""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import kl_divergence, register_kl
from torch.distributions.utils import clamp_probs

__all__ = ["BernoulliConcrete", "BernoulliIdentity"]


class BernoulliIdentity(dist.Bernoulli):
    """Bernoulli variable whose value counts as its probability in derivatives: ``d value / d probs = 1``.

    Parameters
    ----------
    probs, logits
        Probabilities in [0, 1], the ends included, or log odds; one of the two.

    Notes
    -----
    Exact where what follows is linear in the value, as its expectation is then the function of the probability.
    """

    has_rsample = True

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008  (as torch has it)
        """Draw values 0 and 1 of shape ``sample_shape + batch_shape``."""
        probs = self.probs.expand(self._extended_shape(sample_shape))
        value = torch.bernoulli(probs.detach())
        return value + (probs - probs.detach())

    def expand(self, batch_shape: Any, _instance: Any = None) -> BernoulliIdentity:
        """The same distribution over a larger batch."""
        new: BernoulliIdentity = super().expand(batch_shape, self._get_checked_instance(BernoulliIdentity, _instance))
        return new


class BernoulliConcrete(dist.Bernoulli):
    """Bernoulli variable with the derivative of a concrete one: ``sigmoid((logits + logistic noise) / temperature)``.

    Parameters
    ----------
    temperature
        Positive; lower is less biased and noisier.
    probs, logits
        Probabilities or log odds; one of the two.
    hard
        Whether values are 0 and 1; otherwise relaxed ones in (0, 1), whose log probability is no density.
    """

    has_rsample = True

    def __init__(
        self,
        temperature: Tensor | float,
        probs: Tensor | None = None,
        logits: Tensor | None = None,
        *,
        hard: bool = True,
        validate_args: bool | None = None,
    ) -> None:
        self.temperature, self.hard = temperature, hard
        super().__init__(probs=probs, logits=logits, validate_args=validate_args)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008  (as torch has it)
        """Draw values of shape ``sample_shape + batch_shape``."""
        logits = self.logits.expand(self._extended_shape(sample_shape))
        uniform = clamp_probs(torch.rand_like(logits))
        noisy = logits + uniform.log() - (-uniform).log1p()
        soft = torch.sigmoid(noisy / self.temperature)
        if not self.hard:
            return soft
        return (noisy > 0).to(soft.dtype).detach() + (soft - soft.detach())

    def expand(self, batch_shape: Any, _instance: Any = None) -> BernoulliConcrete:
        """The same distribution over a larger batch."""
        new = self._get_checked_instance(BernoulliConcrete, _instance)
        new.temperature, new.hard = self.temperature, self.hard
        expanded: BernoulliConcrete = super().expand(batch_shape, new)
        return expanded


def _divergence(q: Any, p: Any) -> Tensor:
    """Divergence of the Bernoulli variables behind two that may be relaxed, batches broadcast."""
    shape = torch.broadcast_shapes(q.batch_shape, p.batch_shape)
    plain = [
        torch.distributions.Bernoulli(logits=value.logits, validate_args=False)
        if "logits" in value.__dict__ or not hasattr(value, "probs")
        else torch.distributions.Bernoulli(probs=value.probs, validate_args=False)
        for value in (q, p)
    ]
    return kl_divergence(*(value.expand(shape) for value in plain))


# Pyro's own relaxed variable has a density where the model has a probability: the two must not be subtracted.
for _straight in (BernoulliIdentity, BernoulliConcrete, dist.RelaxedBernoulliStraightThrough):
    register_kl(_straight, torch.distributions.Bernoulli)(_divergence)
