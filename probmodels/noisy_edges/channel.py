"""What a noisy channel shows of a hidden truth, the truth marginalised."""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor
from torch.nn.functional import logsigmoid

__all__ = ["NoisyCount"]


class NoisyCount(TorchDistribution):
    """How often a pair was seen as an edge, its true edge marginalised.

    Parameters
    ----------
    logits
        Log odds of a true edge.
    deletion, addition
        Probabilities of not seeing an edge, and of seeing one where there is none.
    trials
        How often the pair was looked at.
    """

    arg_constraints = {  # noqa: RUF012  (as torch has it)
        "logits": constraints.real,
        "deletion": constraints.unit_interval,
        "addition": constraints.unit_interval,
    }

    def __init__(
        self, logits: Tensor, deletion: Tensor, addition: Tensor, trials: int = 1, *, validate_args: bool | None = None
    ) -> None:
        self.logits, self.deletion, self.addition = torch.broadcast_tensors(logits, deletion, addition)
        self.trials = trials
        super().__init__(self.logits.shape, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> Any:
        """Whole numbers up to the number of trials."""
        return constraints.integer_interval(0, self.trials)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log probability of counts."""
        missed = self.trials - value
        edge = value * (-self.deletion).log1p() + missed * self.deletion.log()
        none = value * self.addition.log() + missed * (-self.addition).log1p()
        total = torch.logaddexp(logsigmoid(self.logits) + edge, logsigmoid(-self.logits) + none)
        if self.trials > 1:
            total = total + math.lgamma(self.trials + 1) - (value + 1).lgamma() - (missed + 1).lgamma()
        return total

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008  (as torch has it)
        """Draw true edges, then counts."""
        shape = self._extended_shape(sample_shape)
        edge = torch.bernoulli(torch.sigmoid(self.logits).expand(shape))
        rate = torch.where(edge > 0, 1 - self.deletion, self.addition)
        return torch.binomial(torch.full_like(rate, float(self.trials)), rate)

    def expand(self, batch_shape: Any, _instance: Any = None) -> NoisyCount:
        """The same distribution over a larger batch."""
        logits, deletion, addition = (x.expand(batch_shape) for x in (self.logits, self.deletion, self.addition))
        return NoisyCount(logits, deletion, addition, self.trials, validate_args=False)
