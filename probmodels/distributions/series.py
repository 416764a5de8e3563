"""Normal series in time: processes of unit variance whose decay or length-scale is uncertain.

Series are autoregressions of first order, whose correlation is ``decay^|t - s|`` at times t and s, or Matérn processes
of order 3/2 or 5/2, at times that need not be even. Their precision matrices are banded, so that a density costs O(T).

The decay or length-scale lives on a grid of G values with weights, and is summed out of the density;
`component_logits` gives its exact conditional, as for the frames of `probmodels.distributions.frames`.
"""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor

from probmodels.distributions.processes import PROCESSES, banded_precision, kriging

__all__ = ["ProcessSeries"]


class ProcessSeries(TorchDistribution):
    """k independent series of T values, each with a decay or length-scale of its own from a grid that is summed out.

    Parameters
    ----------
    process
        ``"ar1"``, ``"matern32"`` or ``"matern52"``.
    scale
        Grid (G,): under ``"ar1"`` correlations over one unit of time, in [0, 1); else length-scales, positive.
    steps
        Times between neighbours, shape (T-1,).
    log_weights
        Log prior weights of the grid for each series, shape (k, G); normalised here.
    validate_args
        Whether numbers are checked; default: Pyro's setting.

    Raises
    ------
    ValueError
        If the process is unknown, the scale out of range, steps are not positive, or shapes do not fit.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012 -- the attribute that torch defines
    support = constraints.independent(constraints.real, 2)
    has_rsample = False

    def __init__(
        self, process: str, scale: Tensor, steps: Tensor, log_weights: Tensor, *, validate_args: bool | None = None
    ) -> None:
        if process not in PROCESSES:
            raise ValueError(f"process={process!r}; give one of {', '.join(PROCESSES)}")
        if scale.dim() != 1 or log_weights.dim() != 2 or log_weights.shape[-1] != len(scale):
            raise ValueError(
                f"scale of shape {tuple(scale.shape)} and log_weights of shape {tuple(log_weights.shape)}; give (G,) "
                "and (k, G)"
            )
        if process == "ar1" and not bool(((scale >= 0) & (scale < 1)).all()):
            raise ValueError("decay must be at least 0 and below 1")
        if process != "ar1" and not bool((scale > 0).all()):
            raise ValueError("length-scales must be positive")
        if not bool((steps > 0).all()):
            raise ValueError("steps must be positive: times that increase")
        self.process, self.scale, self.steps = process, scale, steps
        self.log_weights = log_weights.log_softmax(-1)
        bands, log_det = banded_precision(process, scale.double().cpu().numpy(), steps.double().cpu().numpy())
        self._bands, self._log_det = (torch.as_tensor(x).to(log_weights) for x in (bands, log_det))
        event = torch.Size([len(steps) + 1, len(log_weights)])
        super().__init__(torch.Size(), event, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> ProcessSeries:
        if torch.Size(batch_shape) != self.batch_shape:
            raise ValueError(f"ProcessSeries has no batch; cannot expand to {tuple(batch_shape)}")
        return self

    @property
    def mean(self) -> Tensor:
        """Zero."""
        return self.steps.new_zeros(self.event_shape)

    def _log_terms(self, value: Tensor) -> Tensor:
        """Log density of each series under each value of the grid, (*sample, k, G)."""
        size = self.event_shape[0]
        quad = torch.einsum("gt,...tk->...kg", self._bands[:, 0], value.square())
        for beside in range(1, min(self._bands.shape[1], size)):
            products = value[..., beside:, :] * value[..., :-beside, :]
            quad = quad + 2 * torch.einsum("gt,...tk->...kg", self._bands[:, beside, : size - beside], products)
        return 0.5 * (self._log_det - quad - size * math.log(2 * math.pi))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density with respect to Lebesgue measure, the grid summed out; shape (*sample,)."""
        return (self.log_weights + self._log_terms(value)).logsumexp(-1).sum(-1)

    def component_logits(self, value: Tensor) -> Tensor:
        """Normalised log probabilities of the grid given series (*sample, T, k): shape (*sample, k, G)."""
        return (self.log_weights + self._log_terms(value)).log_softmax(-1)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008 -- torch's own default
        """Exact independent draws, shape (*sample, T, k)."""
        with torch.no_grad():
            index = dist.Categorical(logits=self.log_weights, validate_args=False).sample(torch.Size(sample_shape))
            chosen, place = torch.unique(index, return_inverse=True)
            scale, steps = (x.double().cpu().numpy() for x in (self.scale[chosen], self.steps))
            weights, variance = (torch.as_tensor(x).to(self.log_weights) for x in kriging(self.process, scale, steps))
            sd, memory = variance.sqrt(), weights.shape[2]
            noise = torch.randn(torch.Size(sample_shape) + self.event_shape).to(self.log_weights)
            rows: list[Tensor] = []
            for t, fresh in enumerate(noise.unbind(-2)):
                row = sd[place, t] * fresh
                for back in range(min(memory, t)):
                    row = row + weights[place, t, back] * rows[t - 1 - back]
                rows.append(row)
            return torch.stack(rows, -2)
