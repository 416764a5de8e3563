"""Linear maps that whiten a posterior: from pooled draws, and from normals along quasi-Newton paths."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from probmodels.inference.mcmc.pathfinder import Evaluate, find_paths

__all__ = ["Metric", "most_rows", "whiten"]

_DENSE_LIMIT = 200  # unknowns up to which a dense metric is tried
_MAX_ROWS = 4096  # positions kept for a metric,
_MAX_ENTRIES = 2**23  # and numbers in them
_PATH_ENTRIES = 2**21  # numbers in the starts of all chains up to which better ones are sought along paths
_FEWEST = 8  # different draws along paths below which they say nothing about a metric


class Metric:
    """Linear map ``z = S x`` between the position ``z`` and a whitened ``x`` in which momenta are standard normal.

    ``S`` is diagonal, triangular, or a diagonal times identity plus low rank.

    Parameters
    ----------
    scale
        Diagonal (size,).
    factor
        Lower triangle (size, size) of a dense ``S``, whose diagonal ``scale`` it replaces; or None.
    vectors, stretch
        Orthonormal columns (size, rank) and factors (rank,): ``S = diag(scale) (I + V (diag(stretch) - I) V')``.
    """

    def __init__(
        self,
        scale: Tensor,
        factor: Tensor | None = None,
        vectors: Tensor | None = None,
        stretch: Tensor | None = None,
    ) -> None:
        self.scale, self.factor, self.vectors, self.stretch = scale, factor, vectors, stretch

    def forward(self, x: Tensor) -> Tensor:
        """``S x`` for rows ``x`` (chain, size)."""
        if self.factor is not None:
            return x @ self.factor.T
        if self.vectors is not None and self.stretch is not None:
            x = x + ((x @ self.vectors) * (self.stretch - 1)) @ self.vectors.T
        return x * self.scale

    def transposed(self, gradient: Tensor) -> Tensor:
        """``S' g``: a gradient with respect to ``z`` turned into one with respect to ``x``."""
        if self.factor is not None:
            return gradient @ self.factor
        gradient = gradient * self.scale
        if self.vectors is not None and self.stretch is not None:
            gradient = gradient + ((gradient @ self.vectors) * (self.stretch - 1)) @ self.vectors.T
        return gradient

    def inverse(self, z: Tensor) -> Tensor:
        """``S^-1 z``."""
        if self.factor is not None:
            return torch.linalg.solve_triangular(self.factor, z.T, upper=False).T
        x = z / self.scale
        if self.vectors is not None and self.stretch is not None:
            x = x + ((x @ self.vectors) * (1 / self.stretch - 1)) @ self.vectors.T
        return x

    def state_dict(self) -> dict[str, Tensor]:
        """Its tensors."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def renewed(self, rows: Tensor, kind: str, distinct: float = math.inf) -> Metric:
        """Metric of the posterior that positions ``rows`` (step, chain, size) were drawn from, ``distinct`` of them.

        A dense metric starts from the present one and is shrunk towards it, the more the fewer rows there are per
        unknown. A low-rank one is made afresh and keeps the directions whose variance lies outside what noise alone
        would give (Marchenko and Pastur 1967).
        """
        steps, chains, size = rows.shape
        if kind == "auto":
            kind = "dense" if size <= _DENSE_LIMIT else "low_rank"
        flat = rows.reshape(-1, size).cpu().double()  # where all of linear algebra is to be had, in double precision
        present = Metric(*(None if value is None else value.cpu().double() for value in self._tensors()))  # type: ignore[arg-type]
        wide = present.inverse(flat) if kind == "dense" else flat
        wide = wide - wide.mean(0)
        variance = wide.square().mean(0)
        standard = wide / variance.sqrt().clamp(min=1e-12)
        effective = min(distinct, _effective_rows(standard.reshape(steps, chains, size)))
        if kind == "dense":
            scale = variance.clamp(min=1e-300) ** (0.5 * effective**2 / (effective**2 + 25))
            # Half at as many rows as unknowns, next to nothing at ten times as many: small variances are meant.
            weight = effective**2 / (effective**2 + size**2)
            correlation = standard.T @ standard / len(standard)
            correlation = weight * correlation + (1 - weight) * torch.eye(size, dtype=wide.dtype)
            factor, failed = torch.linalg.cholesky_ex(correlation)
            if failed or not bool(torch.isfinite(scale).all()):
                return self
            # S times the new factor is a square root of the covariance; its triangular form is the Cholesky factor.
            root = present.forward((scale[:, None] * factor).T)
            factor = torch.linalg.qr(root)[1].T
            factor = factor * factor.diagonal().sign()
            return Metric(self.scale, factor.to(rows))
        scale = variance.sqrt().clamp(min=1e-12)
        diagonal = Metric(scale.to(rows))
        if kind == "diagonal" or effective < 8:
            return diagonal
        _, singular, vectors = torch.linalg.svd(standard / math.sqrt(len(standard)), full_matrices=False)
        edge, variances = math.sqrt(size / effective), singular.square()
        keep = variances > 1.2 * (1 + edge) ** 2
        if edge < 0.5:
            keep = keep | (variances < (1 - edge) ** 2 / 1.2)
        if not keep.any():
            return diagonal
        return Metric(diagonal.scale, None, vectors[keep].T.contiguous().to(rows), singular[keep].to(rows))

    @property
    def spread(self) -> float:
        """Sd of the prior of the log trajectory time: whitened by a dense metric, times far from one are noise."""
        return 1.0 if self.factor is not None else 2.0

    def _tensors(self) -> tuple[Tensor | None, ...]:
        return self.scale, self.factor, self.vectors, self.stretch


def _effective_rows(standard: Tensor) -> float:
    """Number of independent rows that autocorrelated ones (step, chain, size), of unit variance, are worth."""
    steps, chains, _ = standard.shape
    if steps < 4:
        return float(chains)
    correlation = float((standard[1:] * standard[:-1]).mean().clamp(0, 0.999))
    return max(float(chains), steps * chains * (1 - correlation) / (1 + correlation))


def most_rows(size: int) -> int:
    """Number of positions of ``size`` unknowns that are kept for a metric."""
    return max(1, min(_MAX_ROWS, _MAX_ENTRIES // size))


def whiten(evaluate: Evaluate, z: Tensor, kind: str = "auto") -> tuple[Tensor, Metric]:
    """Better starts than ``z`` (start, size), and a metric, from normals along quasi-Newton paths.

    With very many unknowns, the starts stay as they are and the metric is the identity.
    """
    count, size = z.shape
    metric = Metric(torch.ones_like(z[0]))
    if z.numel() > _PATH_ENTRIES:
        return z, metric
    wanted = max(10 * count, 100, 4 * min(size, _DENSE_LIMIT))  # a dense metric needs several rows per unknown
    paths = find_paths(evaluate, z, num_draws=max(1, min(wanted, most_rows(size)) // count))
    # Copies stand where normals reached too far: they show no direction that others did not.
    distinct = len(torch.unique(paths.draws.flatten(0, 1), dim=0))
    if distinct >= _FEWEST:
        metric = metric.renewed(paths.draws.to(z), kind, distinct)
    return paths.starts.to(z), metric
