"""Normal series in time: first-order autoregressions of unit variance whose decay is uncertain.

A series f at times t_1 < t_2 < ... has correlation ``rho^|t - s|``, with ``rho`` per unit of time; at equal steps of
one unit it is an AR(1) process, at unequal ones the same process seen less often. ``rho = 0`` is white noise. Its
precision matrix is tridiagonal, so that a density costs O(T).

The decay lives on a grid of G values with weights, and is summed out of the density; `component_logits` gives its exact
conditional, as for the frames of `probmodels.distributions.frames`.
"""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor

__all__ = ["AutoregressiveSeries", "tridiagonal_precision"]


def tridiagonal_precision(decay: Tensor, steps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Precision matrices of series of unit variance.

    Parameters
    ----------
    decay
        Correlation over one unit of time, in [0, 1), shape (G,).
    steps
        Times between neighbours, positive, shape (T-1,).

    Returns
    -------
    tuple of Tensor
        Diagonals (G, T), the entries beside them (G, T-1), and log determinants (G,).
    """
    phi = decay[:, None] ** steps
    innovation = -torch.expm1(2 * steps * decay.clamp(min=1e-300).log()[:, None])  # 1 - phi^2, without cancellation
    diagonal = torch.ones(len(decay), len(steps) + 1, dtype=decay.dtype, device=decay.device)
    diagonal[:, 1:] = 1 / innovation
    diagonal[:, :-1] += phi.square() / innovation
    return diagonal, -phi / innovation, -innovation.log().sum(-1)


class AutoregressiveSeries(TorchDistribution):
    """k independent series of T values, each with a decay of its own from a grid that is summed out.

    Parameters
    ----------
    decay
        Grid of correlations over one unit of time, in [0, 1), shape (G,).
    steps
        Times between neighbours, shape (T-1,).
    log_weights
        Log prior weights of the grid for each series, shape (k, G); normalised here.
    validate_args
        Whether numbers are checked; default: Pyro's setting.

    Raises
    ------
    ValueError
        If a decay is not in [0, 1), steps are not positive, or shapes do not fit.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012 -- the attribute that torch defines
    support = constraints.independent(constraints.real, 2)
    has_rsample = False

    def __init__(self, decay: Tensor, steps: Tensor, log_weights: Tensor, *, validate_args: bool | None = None) -> None:
        if decay.dim() != 1 or log_weights.dim() != 2 or log_weights.shape[-1] != len(decay):
            raise ValueError(
                f"decay of shape {tuple(decay.shape)} and log_weights of shape {tuple(log_weights.shape)}; give (G,) "
                "and (k, G)"
            )
        if not bool(((decay >= 0) & (decay < 1)).all()):
            raise ValueError("decay must be at least 0 and below 1")
        if not bool((steps > 0).all()):
            raise ValueError("steps must be positive: times that increase")
        self.decay, self.steps = decay, steps
        self.log_weights = log_weights.log_softmax(-1)
        event = torch.Size([len(steps) + 1, len(log_weights)])
        super().__init__(torch.Size(), event, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> AutoregressiveSeries:
        if torch.Size(batch_shape) != self.batch_shape:
            raise ValueError(f"AutoregressiveSeries has no batch; cannot expand to {tuple(batch_shape)}")
        return self

    @property
    def mean(self) -> Tensor:
        """Zero."""
        return self.steps.new_zeros(self.event_shape)

    def _log_terms(self, value: Tensor) -> Tensor:
        """Log density of each series under each decay, (*sample, k, G)."""
        diagonal, side, log_det = tridiagonal_precision(self.decay, self.steps)
        quad = torch.einsum("gt,...tk->...kg", diagonal, value.square())
        quad = quad + 2 * torch.einsum("gt,...tk->...kg", side, value[..., 1:, :] * value[..., :-1, :])
        return 0.5 * (log_det - quad - self.event_shape[0] * math.log(2 * math.pi))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density with respect to Lebesgue measure, decays summed out; shape (*sample,)."""
        return (self.log_weights + self._log_terms(value)).logsumexp(-1).sum(-1)

    def component_logits(self, value: Tensor) -> Tensor:
        """Normalised log probabilities of the decays given series (*sample, T, k): shape (*sample, k, G)."""
        return (self.log_weights + self._log_terms(value)).log_softmax(-1)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008 -- torch's own default
        """Exact independent draws, shape (*sample, T, k)."""
        with torch.no_grad():
            index = dist.Categorical(logits=self.log_weights, validate_args=False).sample(torch.Size(sample_shape))
            decay = self.decay[index]  # (*sample, k)
            noise = torch.randn(torch.Size(sample_shape) + self.event_shape, dtype=decay.dtype, device=decay.device)
            rows = [noise[..., 0, :]]
            for step, fresh in zip(self.steps, noise[..., 1:, :].unbind(-2), strict=True):
                phi = decay**step
                rows.append(phi * rows[-1] + (1 - phi.square()).clamp(min=0).sqrt() * fresh)
            return torch.stack(rows, -2)
