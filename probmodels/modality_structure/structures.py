"""Losses of latent modality structures as plain functions, and as sites whose log densities they are.

Every squared loss is ``weight`` times a sum of squares of residuals. The log density of independent residuals that are
observed to be zero, with precision ``2 weight``, is that loss with the opposite sign and the normaliser
``log(weight / pi) / 2`` for each residual.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "bridge_covariance",
    "bridge_mean",
    "match_site",
    "matching_logits",
    "normaliser",
    "off_diagonal",
    "sample_bridge",
    "structure_site",
    "uniformity",
]

Order = Literal["paper", "reversed"]


def matching_logits(z: Tensor, others: Tensor, temperature: Tensor | float, seen: Tensor | None = None) -> Tensor:
    """Log odds (row, candidate) of which of the candidates belongs to a row, up to a constant of the row.

    Parameters
    ----------
    z, others
        Embeddings (row, size) of rows and candidates, in the same order.
    temperature
        By which inner products are divided.
    seen
        Rows (row,) that have both modalities; the others are no candidates. None for all.
    """
    logits = z @ others.mT / temperature
    if seen is None:
        return logits
    return logits.masked_fill(~seen, -math.inf).masked_fill(~seen.unsqueeze(-1), 0.0)


def match_site(name: str, logits: Tensor, seen: Tensor | None = None) -> None:
    """Site (row,) of which candidate belongs to each row: one event, since all rows are candidates of each.

    Its log density is minus the number of rows times the InfoNCE loss.
    """
    fn = dist.Categorical(logits=logits)
    fn = fn if seen is None else fn.mask(seen)
    pyro.sample(
        name,
        fn.to_event(1),
        obs=torch.arange(len(logits), device=logits.device),
        infer={"event_dims": ["fitted_row"]},  # type: ignore[arg-type]
    )


def structure_site(name: str, residual: Tensor, weight: Tensor | float, seen: Tensor, dims: Sequence[str]) -> None:
    """Site of residuals that are observed to be zero: log density ``-weight * sum of squares + normaliser``.

    Parameters
    ----------
    name
        Of the site.
    residual
        Residuals, of any shape.
    weight
        Of the sum of squares; half the precision.
    seen
        Which residuals count, of the same shape.
    dims
        Names of the axes.
    """
    sd = (2 * torch.as_tensor(weight, dtype=residual.dtype, device=residual.device)).rsqrt()
    fn = dist.Normal(residual, sd.expand(residual.shape)).mask(seen).to_event(residual.dim())
    zero = torch.zeros_like(residual).detach()
    pyro.sample(name, fn, obs=zero, infer={"event_dims": list(dims)})  # type: ignore[arg-type]


def normaliser(weight: float, count: int) -> float:
    """Log density of ``count`` residuals of zero in a `structure_site`."""
    return count * math.log(weight / math.pi) / 2


def off_diagonal(values: Tensor) -> Tensor:
    """Entries (..., pair) above the diagonal of (..., row, row).

    Differences of matrices of inner products are symmetric or antisymmetric with a zero diagonal: the sum of all their
    squares is twice that of these entries, which are the distinct ones.
    """
    first, second = torch.triu_indices(values.shape[-2], values.shape[-1], 1, device=values.device)
    return values[..., first, second]


def uniformity(own: Sequence[Tensor], seen: Sequence[Tensor], normalize: Literal["N", "N2"] = "N") -> Tensor:
    """Log of the mean of ``exp(-2 |u - v|^2)`` over pairs of rows, summed over modalities before the logarithm.

    Parameters
    ----------
    own
        Independent embeddings (row, size) of each modality, of length 1.
    seen
        Rows (row,) that have it.
    normalize
        ``"N"``, as printed, divides the sum over pairs by the number of rows, ``"N2"`` by its square.
    """
    total = own[0].new_zeros(())
    for z, there in zip(own, seen, strict=True):
        kernel = torch.exp(4 * (z @ z.mT) - 4)  # |u - v|^2 = 2 - 2 <u, v>
        total = total + (kernel * (there.unsqueeze(1) & there)).sum()
    count = len(own[0])
    return torch.log(total / (count if normalize == "N" else count**2))


def bridge_mean(z: Tensor, other: Tensor, time: float, order: Order = "paper") -> Tensor:
    """Means (row, size) of a bridge between two embeddings, brought to length 1.

    Parameters
    ----------
    z, other
        Embeddings (row, size) of the modality whose augmented view lies on the bridge, and of the other one.
    time
        t in (0, 1).
    order
        ``"paper"``: t multiplies ``z``, as printed; ``"reversed"``: t multiplies ``other``, as of a bridge that leaves
        ``z`` at time 0.
    """
    share = time if order == "paper" else 1 - time
    return F.normalize(share * z + (1 - share) * other, dim=-1)


def bridge_covariance(times: Tensor) -> Tensor:
    """Covariance (time, time) of one coordinate of a Brownian bridge: ``min(t, t') - t t'``."""
    return torch.minimum(times.unsqueeze(-1), times) - times.unsqueeze(-1) * times


def sample_bridge(start: Tensor, end: Tensor, times: Tensor) -> Tensor:
    """Paths (..., time, size) of a Brownian bridge from ``start`` at time 0 to ``end`` at 1, both (..., size).

    Parameters
    ----------
    start, end
        Ends of the paths.
    times
        Ascending, in (0, 1).
    """
    steps = torch.diff(times, prepend=times.new_zeros(1))
    last = torch.cat([steps, 1 - times[-1:]])
    moves = torch.randn(*start.shape[:-1], len(last), start.shape[-1], dtype=start.dtype) * last.sqrt().unsqueeze(-1)
    motion = moves.cumsum(-2)
    bent = motion[..., :-1, :] - times.unsqueeze(-1) * motion[..., -1:, :]
    return start.unsqueeze(-2) + times.unsqueeze(-1) * (end - start).unsqueeze(-2) + bent
