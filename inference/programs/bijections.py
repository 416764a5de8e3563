"""Bijections from unconstrained vectors to matrices, for supports that torch can transform to but not invert densely.

Importing this module registers them with `torch.distributions.biject_to`, so that sites with a Wishart or another
distribution of positive definite matrices can be moved by gradient-based samplers and automatic guides.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import ComposeTransform, Transform, biject_to, constraints

__all__ = ["FlatCholesky", "Gram"]


def _order(x: int) -> int:
    """Rows of the triangular matrix of ``x`` entries."""
    rows = (math.isqrt(8 * x + 1) - 1) // 2
    if rows * (rows + 1) // 2 != x:
        raise ValueError(f"a vector of {x} entries fills no triangular matrix; use rows * (rows + 1) / 2 entries")
    return rows


class FlatCholesky(Transform):
    """Vectors (..., n (n + 1) / 2) to lower triangular matrices (..., n, n) of positive diagonal.

    The first n entries are the logarithms of the diagonal, the others the rows below it.
    """

    domain = constraints.real_vector
    codomain = constraints.lower_cholesky
    bijective = True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FlatCholesky)

    def __hash__(self) -> int:
        return hash(FlatCholesky)

    def _call(self, x: Tensor) -> Tensor:
        rows = _order(x.shape[-1])
        index = torch.full((rows, rows), x.shape[-1], device=x.device)  # a zero that stands behind the vector
        index.diagonal().copy_(torch.arange(rows))
        lower = torch.tril_indices(rows, rows, -1, device=x.device)
        index[lower[0], lower[1]] = torch.arange(rows, x.shape[-1], device=x.device)
        entries = torch.cat([x[..., :rows].exp(), x[..., rows:], torch.zeros_like(x[..., :1])], -1)
        return entries[..., index]

    def _inverse(self, y: Tensor) -> Tensor:
        lower = torch.tril_indices(y.shape[-1], y.shape[-1], -1, device=y.device)
        return torch.cat([y.diagonal(dim1=-2, dim2=-1).log(), y[..., lower[0], lower[1]]], -1)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Sum of the logarithms of the diagonal, (...)."""
        return x[..., : y.shape[-1]].sum(-1)

    def forward_shape(self, shape: Any) -> Any:
        """(..., n (n + 1) / 2) to (..., n, n)."""
        rows = _order(shape[-1])
        return (*shape[:-1], rows, rows)

    def inverse_shape(self, shape: Any) -> Any:
        """(..., n, n) to (..., n (n + 1) / 2)."""
        return (*shape[:-2], shape[-1] * (shape[-1] + 1) // 2)


class Gram(Transform):
    """Lower triangular L (..., n, n) of positive diagonal to the positive definite L L'."""

    domain = constraints.lower_cholesky
    codomain = constraints.positive_definite
    bijective = True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Gram)

    def __hash__(self) -> int:
        return hash(Gram)

    def _call(self, x: Tensor) -> Tensor:
        return x @ x.mT

    def _inverse(self, y: Tensor) -> Tensor:
        return torch.linalg.cholesky(y)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """n log 2 + sum_i (n + 1 - i) log L_ii, (...)."""
        rows = x.shape[-1]
        powers = torch.arange(rows, 0, -1, dtype=x.dtype, device=x.device)
        return rows * math.log(2) + (powers * x.diagonal(dim1=-2, dim2=-1).log()).sum(-1)


@biject_to.register(constraints.lower_cholesky)
def _to_lower_cholesky(constraint: Any) -> Transform:
    return FlatCholesky()


@biject_to.register(constraints.positive_definite)
def _to_positive_definite(constraint: Any) -> Transform:
    return ComposeTransform([FlatCholesky(), Gram()])
