"""Operations of ATen written out as others of the same value, which cost less or which batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["FORMULAS"]


def _cross_entropy(logits: Tensor, labels: Tensor, weight: Any = None, positive: Any = None, how: int = 1) -> Tensor:
    """Binary cross entropy with logits in one transcendental pass: (1 - y) x - log sigmoid(x)."""
    if weight is not None or positive is not None or how != 0:
        return torch.ops.aten.binary_cross_entropy_with_logits.default(logits, labels, weight, positive, how)
    return (1 - labels) * logits - torch.ops.aten.log_sigmoid_forward.default(logits)[0]


def _cholesky(matrix: Tensor, *, upper: bool = False, check_errors: bool = False) -> tuple[Tensor, Tensor]:
    """Cholesky factor that is NaN, instead of an error, where there is none: one entry of a batch may have one."""
    factor, info = torch.ops.aten.linalg_cholesky_ex.default(matrix, upper=upper)
    return torch.where((info == 0)[..., None, None], factor, math.nan), info


def _logsumexp(value: Tensor, dims: list[int], keepdim: bool = False) -> Tensor:
    """Log of a sum of exponentials from parts that batch; torch's own batched form warns at every call."""
    largest = value.amax(dims, keepdim=True)
    largest = torch.where(torch.isfinite(largest), largest, 0.0)
    total = (value - largest).exp().sum(dims, keepdim=True).log() + largest
    return total if keepdim else total.squeeze(dims)


def _index_put(value: Tensor, indices: Any, values: Tensor, accumulate: bool = False) -> Tensor:
    """One value put where a mask says, by an operation that batches, as indexing with a mask does not."""
    mask = _as_mask(value, indices, values, accumulate)
    if mask is None:
        return torch.ops.aten.index_put.default(value, indices, values, accumulate)
    return value.masked_fill(mask, values.reshape(()))


def _index_put_in_place(value: Tensor, indices: Any, values: Tensor, accumulate: bool = False) -> Tensor:
    mask = _as_mask(value, indices, values, accumulate)
    if mask is None:
        return torch.ops.aten.index_put_.default(value, indices, values, accumulate)
    return value.masked_fill_(mask, values.reshape(()))


def _as_mask(value: Tensor, indices: Any, values: Tensor, accumulate: bool) -> Tensor | None:
    """The mask that is the only index, of the axes of ``value``; None where one value is not put by a mask."""
    if accumulate or len(indices) != 1 or indices[0] is None or indices[0].dtype != torch.bool or values.numel() != 1:
        return None
    mask: Tensor = indices[0]
    return mask.reshape(mask.shape + (1,) * (value.dim() - mask.dim()))


def _batch_norm(value: Tensor, weight: Any, bias: Any, mean: Any, variance: Any, training: bool, *rest: Any) -> Any:
    """Normalised rows by parts that batch; means of rows that a module collects on the way are left as they are."""
    collected = (None, None) if training else (mean, variance)
    return torch._decomp.decomposition_table[torch.ops.aten.native_batch_norm.default](
        value, weight, bias, *collected, training, *rest
    )


def _log_sigmoid_backward(gradient: Tensor, value: Tensor, buffer: Tensor) -> Tensor:
    """Derivative of log sigmoid in parts that broadcast."""
    return gradient * torch.sigmoid(-value)


FORMULAS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.log_sigmoid_backward.default: _log_sigmoid_backward,
    torch.ops.aten.logsumexp.default: _logsumexp,
    torch.ops.aten.binary_cross_entropy_with_logits.default: _cross_entropy,
    torch.ops.aten.linalg_cholesky_ex.default: _cholesky,
    torch.ops.aten.native_batch_norm.default: _batch_norm,
    torch.ops.aten.native_batch_norm_backward.default: torch._decomp.decomposition_table[
        torch.ops.aten.native_batch_norm_backward.default
    ],
    torch.ops.aten.index_put.default: _index_put,
    torch.ops.aten.index_put_.default: _index_put_in_place,
}
