"""Families of automatic guides: maps from standard normal noise to unconstrained vectors, with their log volumes.

Equations and references stand in `probmodels.guides.auto`, which makes guides of these.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import pyro.distributions as dist
import torch
from annotated_types import Interval
from pyro.distributions import constraints
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn

from probmodels.guides.flows import AffineFlow, SplineFlow

__all__ = ["GUIDES", "LaplaceMap", "Map", "Pick", "PointMap", "Width"]

Pick = Callable[[Tensor], Tensor]
Rank = Annotated[int, Interval(ge=1, le=10_000)]
Width = Annotated[int, Interval(ge=1, le=10_000)]  # of hidden layers


class Map(PyroModule):
    """From standard normal noise to the vectors of a group.

    Parameters
    ----------
    start
        Vectors (*batch, size) at the start.
    scale
        Their standard deviation.
    enclosing
        Sizes of the noise of the groups that enclose this one.
    """

    splits = "none"  # groups of one vector each; "batch": by batch plates; "all": by all plates
    noisy = True
    path_gradient = False

    def __init__(self, start: Tensor, scale: float, enclosing: Sequence[int]) -> None:
        super().__init__()
        self.loc = nn.Parameter(start.clone())

    def forward(self, noise: Tensor, pick: Pick, enclosing: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Vectors (..., *batch, size) and log volume change (..., *batch) of noise (..., *batch, size).

        ``pick`` selects the rows of a minibatch from parameters (*batch, ...); ``enclosing`` is the noise of the groups
        that enclose this one.
        """
        raise NotImplementedError

    def score(self, noise: Tensor, pick: Pick) -> Tensor:
        """Gradient (..., *batch, size) of the log density of a vector at the image of noise (..., *batch, size)."""
        raise NotImplementedError


class DiagonalMap(Map):
    splits = "batch"

    def __init__(self, start: Tensor, scale: float, enclosing: Sequence[int], *, path_gradient: bool = False) -> None:
        super().__init__(start, scale, enclosing)
        self.path_gradient = path_gradient
        self.scale: Any = PyroParam(torch.full_like(start, scale), constraints.positive)

    def forward(self, noise: Tensor, pick: Pick, enclosing: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        scale = pick(self.scale)
        mixed, log_volume = self.mix(noise, pick, enclosing)
        return pick(self.loc) + scale * mixed, scale.log().sum(-1) + log_volume

    def score(self, noise: Tensor, pick: Pick) -> Tensor:
        return -self.unmix(noise) / pick(self.scale)

    def mix(self, noise: Tensor, pick: Pick, enclosing: Sequence[Tensor]) -> tuple[Tensor, Any]:
        """Noise with correlated entries, before it is scaled, and the log volume change."""
        return noise, 0.0

    def unmix(self, noise: Tensor) -> Tensor:
        """The inverse of the adjoint of `mix`."""
        return noise


class LowRankMap(DiagonalMap):
    splits = "none"

    def __init__(
        self,
        start: Tensor,
        scale: float,
        enclosing: Sequence[int],
        *,
        rank: Rank | None = None,
        path_gradient: bool = False,
    ) -> None:
        super().__init__(start, scale, enclosing, path_gradient=path_gradient)
        size = start.shape[-1]
        rank = max(1, round(math.sqrt(size))) if rank is None else rank
        # At U = V = 0 both gradients would be zero for good.
        self.left = nn.Parameter(torch.randn(size, rank, dtype=torch.float64).to(start) / math.sqrt(size))
        self.right = nn.Parameter(torch.zeros_like(self.left))

    def mix(self, noise: Tensor, pick: Pick, enclosing: Sequence[Tensor]) -> tuple[Tensor, Any]:
        mixed = noise + (noise @ self.right) @ self.left.mT
        return mixed, torch.linalg.slogdet(self._core())[1]

    def unmix(self, noise: Tensor) -> Tensor:
        inner = torch.linalg.solve(self._core(), (noise @ self.left).unsqueeze(-1)).squeeze(-1)
        return noise - inner @ self.right.mT

    def _core(self) -> Tensor:
        """I + U'V, which has the determinant of I + U V'."""
        product = self.left.mT @ self.right
        return torch.eye(len(product), dtype=product.dtype, device=product.device) + product


class DenseMap(DiagonalMap):
    splits = "none"

    def __init__(self, start: Tensor, scale: float, enclosing: Sequence[int], *, path_gradient: bool = False) -> None:
        super().__init__(start, scale, enclosing, path_gradient=path_gradient)
        self.lower = nn.Parameter(start.new_zeros(*start.shape, start.shape[-1]))
        for index, count in enumerate(enclosing):
            setattr(self, f"slope_{index}", nn.Parameter(start.new_zeros(*start.shape, count)))

    def mix(self, noise: Tensor, pick: Pick, enclosing: Sequence[Tensor]) -> tuple[Tensor, Any]:
        mixed = noise + _times(pick(self.lower).tril(-1), noise)
        for index, outer in enumerate(enclosing):
            mixed = mixed + _times(pick(getattr(self, f"slope_{index}")), outer)
        return mixed, 0.0

    def unmix(self, noise: Tensor) -> Tensor:
        upper = self.lower.tril(-1).mT
        return torch.linalg.solve_triangular(upper, noise.unsqueeze(-1), upper=True, unitriangular=True).squeeze(-1)


class StructuredMap(DenseMap):
    splits = "all"

    def __init__(self, start: Tensor, scale: float, enclosing: Sequence[int]) -> None:
        super().__init__(start, scale, enclosing)


class SplineMap(DenseMap):
    layer: Any = SplineFlow

    def __init__(
        self,
        start: Tensor,
        scale: float,
        enclosing: Sequence[int],
        *,
        num_flows: Annotated[int, Interval(ge=1, le=64)] = 2,
        hidden: Width | None = None,
    ) -> None:
        super().__init__(start, scale, enclosing)
        size = start.shape[-1]
        hidden = min(max(32, 2 * size), 512) if hidden is None else hidden
        layers = [self.layer(size, hidden) for _ in range(num_flows)]
        self.flows = nn.ModuleList(layers).to(start)

    def forward(self, noise: Tensor, pick: Pick, enclosing: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        log_volume = noise.new_zeros(noise.shape[:-1])
        for flow in self.flows:
            noise, stretch = flow(noise)
            noise, log_volume = noise.flip(-1), log_volume + stretch
        if len(self.flows) % 2:
            noise = noise.flip(-1)
        z, stretch = super().forward(noise, pick, enclosing)
        return z, log_volume + stretch


class AffineMap(SplineMap):
    layer = AffineFlow


class PointMap(Map):
    splits = "batch"
    noisy = False

    def forward(self, noise: Tensor, pick: Pick, enclosing: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        loc = pick(self.loc)
        return loc, loc.new_zeros(loc.shape[:-1])


class LaplaceMap(Map):
    root: Tensor
    spread: Tensor

    def __init__(self, start: Tensor, scale: float, enclosing: Sequence[int]) -> None:
        super().__init__(start, scale, enclosing)
        self.register_buffer("root", torch.eye(start.shape[-1], dtype=start.dtype, device=start.device))
        self.register_buffer("spread", start.new_zeros(()))  # 0 while the mode is sought, 1 with the curvature there

    def forward(self, noise: Tensor, pick: Pick, enclosing: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        log_noise = dist.Normal(torch.zeros_like(noise), 1.0).log_prob(noise).sum(-1)
        log_volume = self.spread * self.root.diagonal().log().sum() + (1 - self.spread) * log_noise
        return self.loc + self.spread * _times(self.root, noise), log_volume


GUIDES: dict[str, type[Map]] = {
    "mean_field": DiagonalMap,
    "low_rank": LowRankMap,
    "full_rank": DenseMap,
    "iaf": AffineMap,
    "nsf": SplineMap,
    "flow": SplineMap,
    "structured": StructuredMap,
    "map": PointMap,
    "delta": PointMap,
    "laplace": LaplaceMap,
}


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)
