"""Ground of `probmodels.distributions`: the Stiefel constraint, Gram-Schmidt, mixtures over candidate covariances."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, Self

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import constraints, transform_to
from torch.distributions.transforms import Transform

__all__ = ["FrameMixture", "Stiefel", "check_shape", "eigenpairs", "gram_schmidt", "log_sphere_densities", "stiefel"]


class Stiefel(constraints.Constraint):
    """Matrices with orthonormal columns, up to rounding of the dtype (5e-7 in float64, 2e-3 in float32)."""

    event_dim = 2

    def check(self, value: Tensor) -> Tensor:
        gram = value.mT @ value
        error = (gram - torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)).abs()
        return error.amax((-2, -1)) <= torch.finfo(value.dtype).eps ** 0.4


stiefel = Stiefel()
"""Constraint: U'U = I."""


def gram_schmidt(x: Tensor) -> Tensor:
    """Orthonormal columns that span the leading columns of ``x`` in turn, each at an acute angle with its own.

    Parameters
    ----------
    x
        Shape (*batch, n, k) with k <= n, of full column rank.

    Returns
    -------
    Tensor
        Q of the QR decomposition of which R has a positive diagonal, shape (*batch, n, k); differentiable.
    """
    q, r = torch.linalg.qr(x)
    diagonal = r.diagonal(dim1=-2, dim2=-1)
    return q * torch.where(diagonal < 0, -1.0, 1.0).to(q.dtype).unsqueeze(-2)


class _GramSchmidtTransform(Transform):
    """Any matrix to a frame. Not a bijection: it serves to initialise, not to change variables."""

    domain = constraints.independent(constraints.real, 2)
    codomain = stiefel

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _GramSchmidtTransform)

    def __hash__(self) -> int:
        return hash(_GramSchmidtTransform)

    def _call(self, x: Tensor) -> Tensor:
        return gram_schmidt(x)

    def _inverse(self, y: Tensor) -> Tensor:
        return y


@transform_to.register(Stiefel)
def _to_stiefel(constraint: Stiefel) -> Transform:
    return _GramSchmidtTransform()


def log_sphere_densities(n: int, k: int) -> list[float]:
    """Minus the log area of the unit spheres in n, n-1, .., n-k+1 dimensions, k numbers."""
    return [math.lgamma(p / 2) - math.log(2) - p / 2 * math.log(math.pi) for p in range(n, n - k, -1)]


def check_shape(num_rows: int, num_columns: int) -> None:
    if not 1 <= num_columns <= num_rows:
        raise ValueError(
            f"num_columns={num_columns} is out of range: {num_rows} rows allow 1 to {num_rows} orthonormal columns"
        )


def eigenpairs(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (*batch, n) and eigenvectors (*batch, n, n) of positive definite matrices, leading ones first."""
    if covariance.dim() < 2 or covariance.shape[-1] != covariance.shape[-2]:
        raise ValueError(f"covariance has shape {tuple(covariance.shape)}; expected square matrices (..., n, n)")
    if not bool(torch.isfinite(covariance).all()):
        raise ValueError("covariance holds non-finite entries")
    asymmetry = (covariance - covariance.mT).abs().max()
    if asymmetry > 10 * torch.finfo(covariance.dtype).eps ** 0.5 * covariance.abs().max():
        raise ValueError(f"covariance is not symmetric (largest difference {float(asymmetry):.3g})")
    values, vectors = torch.linalg.eigh(covariance)
    if not bool((values[..., 0] > 0).all()):
        raise ValueError(
            f"covariance is not positive definite (smallest eigenvalue {float(values[..., 0].min()):.3g}); "
            "add a nugget to its diagonal"
        )
    return values.flip(-1), vectors.flip(-1)


class FrameMixture(TorchDistribution):
    """What the frame distributions share: candidates by their eigenpairs, weights, shapes, grouping of draws."""

    arg_constraints = {  # noqa: RUF012 - the name and type that torch reads
        "values": constraints.independent(constraints.positive, 2),
        "log_weights": constraints.independent(constraints.real, 1),
    }
    support = stiefel
    has_rsample = False
    _weights_dim: int  # event dims of log_weights: (k, G) or (G,)

    def __init__(
        self,
        values: Tensor,
        vectors: Tensor | None,
        num_columns: int,
        log_weights: Tensor | None = None,
        *,
        validate_args: bool | None = None,
    ) -> None:
        if values.dim() < 2:
            raise ValueError(f"values has shape {tuple(values.shape)}; expected (*batch, candidates, rows)")
        num_candidates, num_rows = values.shape[-2:]
        check_shape(num_rows, num_columns)
        if vectors is not None and vectors.shape[-3:] != (num_candidates, num_rows, num_rows):
            raise ValueError(
                f"vectors has shape {tuple(vectors.shape)}; expected (*batch, {num_candidates}, {num_rows}, {num_rows})"
                " to go with values"
            )
        if log_weights is None:
            log_weights = values.new_zeros(num_candidates)
        if log_weights.dim() == 0 or log_weights.shape[-1] != num_candidates:
            raise ValueError(
                f"log_weights has shape {tuple(log_weights.shape)}; its last size must be {num_candidates} candidates"
            )
        if self._weights_dim == 2:
            if log_weights.dim() == 1:
                log_weights = log_weights.expand(num_columns, num_candidates)
            if log_weights.shape[-2] != num_columns:
                raise ValueError(
                    f"log_weights has shape {tuple(log_weights.shape)}; expected ({num_candidates},) or "
                    f"(*batch, {num_columns}, {num_candidates}), one row per column of the frame"
                )
        batches = [values.shape[:-2], log_weights.shape[: -self._weights_dim]]
        batches += [] if vectors is None else [vectors.shape[:-3]]
        try:
            batch_shape = torch.broadcast_shapes(*batches)
        except RuntimeError as error:
            raise ValueError(f"batch shapes {[tuple(b) for b in batches]} do not broadcast") from error
        if validate_args is not False and self._validate_args:
            self._check_numbers(values, vectors, log_weights)
        self.values = values
        self.vectors = vectors
        self.log_weights = log_weights.log_softmax(-1)
        self._half_logdet = 0.5 * values.log().sum(-1)  # (*batch, G)
        super().__init__(batch_shape, torch.Size([num_rows, num_columns]), validate_args=validate_args)

    @staticmethod
    def _check_numbers(values: Tensor, vectors: Tensor | None, log_weights: Tensor) -> None:
        if not bool(((values > 0) & torch.isfinite(values)).all()):
            raise ValueError(f"values must be positive and finite eigenvalues; smallest is {float(values.min()):.3g}")
        if not bool((log_weights < math.inf).all()) or not bool((log_weights > -math.inf).any(-1).all()):
            raise ValueError("log_weights must be below infinity, not NaN, and leave each row a candidate above -inf")
        if vectors is not None:  # one row each, which an orthogonal matrix has of norm one: all would cost as a density
            error = (torch.linalg.vector_norm(vectors[..., 0, :], dim=-1) - 1).abs().max()
            if not bool(error <= torch.finfo(vectors.dtype).eps ** 0.4):
                raise ValueError(
                    f"vectors must be orthogonal matrices; the norm of a row differs from 1 by {error:.3g}"
                )

    def expand(self, batch_shape: Any, _instance: Any = None) -> Self:
        """The same distribution with a larger batch shape; parameters are shared, not copied."""
        new = self._get_checked_instance(type(self), _instance)
        new.values, new.vectors, new.log_weights = self.values, self.vectors, self.log_weights
        new._half_logdet = self._half_logdet
        TorchDistribution.__init__(new, torch.Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def num_columns(self) -> int:
        """Number k of columns."""
        return self.event_shape[-1]

    @property
    def mean(self) -> Tensor:
        """Zero: the density does not change when a column changes sign."""
        return self.values.new_zeros(self._extended_shape())

    @abstractmethod
    def _log_terms(self, frame: Tensor) -> Tensor:
        """Log density under each candidate, shape of `log_weights` behind the batch of ``frame``."""

    @abstractmethod
    def _draw(self, noise: Tensor, index: Tensor) -> Tensor:
        """Frames (N, n, k) from standard normals (N, n, k) and indices of candidates (N,) or (N, k)."""

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density, candidates marginalised.

        Parameters
        ----------
        value
            Frames, shape (*sample, *batch, n, k).

        Returns
        -------
        Tensor
            Shape (*sample, *batch); differentiable in the frame and the parameters.
        """
        if self._validate_args:
            self._validate_sample(value)
        total = (self.log_weights + self._log_terms(value)).logsumexp(-1)
        total = total.sum(-1) if self._weights_dim == 2 else total
        return total.expand(torch.broadcast_shapes(total.shape, self.batch_shape))

    def component_logits(self, value: Tensor) -> Tensor:
        """Normalised log probabilities of the candidates given a frame: their exact conditional.

        Parameters
        ----------
        value
            Frames, shape (*sample, *batch, n, k).

        Returns
        -------
        Tensor
            Shape (*sample, *batch, k, G); of `MatrixAngularCentralGaussian` (*sample, *batch, G).
        """
        logits = (self.log_weights + self._log_terms(value)).log_softmax(-1)
        batch = torch.broadcast_shapes(logits.shape[: -self._weights_dim], self.batch_shape)
        return logits.expand(batch + logits.shape[-self._weights_dim :])

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008 - torch's own default
        """Exact independent draws, shape (*sample, *batch, n, k), from torch's global generator."""
        with torch.no_grad():
            shape = self._extended_shape(torch.Size(sample_shape))
            weights = self.log_weights.expand(self.batch_shape + self.log_weights.shape[-self._weights_dim :])
            if weights.shape[-1] > 1:
                index = dist.Categorical(logits=weights, validate_args=False).sample(torch.Size(sample_shape))
            else:
                index = torch.zeros(shape[:-2] + weights.shape[len(self.batch_shape) : -1], dtype=torch.long)
            noise = torch.randn(shape, dtype=self.values.dtype, device=self.values.device)
            index = index.to(noise.device).reshape(shape[:-2].numel(), *index.shape[len(shape) - 2 :])
            return self._draw(noise.reshape(-1, *self.event_shape), index).reshape(shape)

    def _coordinates(self, frame: Tensor) -> tuple[Tensor, Tensor]:
        """Coordinates of the frame in the eigenvectors of each candidate (..., G, n, k), and values (..., G, n, 1)."""
        if self.vectors is None:
            return frame.unsqueeze(-3), self.values.unsqueeze(-1)
        # Frames that share eigenvectors stand side by side in one product: broadcasting matmul or einsum would copy
        # the eigenvectors, which are by far the largest array, and cost ten times as much as the product.
        vectors, (n, k) = self.vectors, frame.shape[-2:]
        split = max(frame.dim() - vectors.dim() + 1, 0)
        sample, rest = frame.shape[:split], frame.shape[split:-2]
        batch = torch.broadcast_shapes(rest, vectors.shape[:-3])
        num = vectors.shape[-3]
        x = frame.reshape(-1, *rest, n, k).movedim(0, -2).flatten(-2).unsqueeze(-3)  # (*rest, 1, n, samples k)
        x = x.expand(*batch, num, -1, -1).reshape(-1, n, x.shape[-1])
        a = torch.bmm(vectors.expand(*batch, -1, -1, -1).reshape(-1, n, n).mT, x)
        a = a.reshape(*batch, num, n, -1, k).movedim(-2, 0).reshape(*sample, *batch, num, n, k)
        return a, self.values.unsqueeze(-1)

    def _groups(self, index: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Draws that share a candidate: their positions, its eigenvalues (n,) and its eigenvectors (n, n)."""
        vector_batch = self.values.shape[:-2] if self.vectors is None else self.vectors.shape[:-3]
        batch = torch.broadcast_shapes(self.values.shape[:-2], vector_batch)
        num_candidates, num_rows = self.values.shape[-2:]
        values = self.values.expand(*batch, num_candidates, num_rows).reshape(-1, num_rows)
        vectors = self.vectors
        if vectors is not None:
            vectors = vectors.expand(*batch, -1, -1, -1).reshape(-1, num_rows, num_rows)
        place = torch.arange(batch.numel(), device=index.device).reshape(batch).expand(self.batch_shape).reshape(-1)
        which = place.repeat(len(index) // max(len(place), 1)) * num_candidates + index
        for one in which.unique().tolist():
            rows = (which == one).nonzero().squeeze(-1)
            yield rows, values[one], None if vectors is None else vectors[one]
