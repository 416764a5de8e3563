"""Distributions over orthonormal frames: matrices U (n, k) with U'U = I_k.

All densities are taken with respect to the invariant (Hausdorff) measure on the Stiefel manifold, of total mass
prod_i 2 pi^(p_i/2) / Gamma(p_i/2) with p_i = n - i + 1. Omega is a covariance, Lambda its inverse, C = U_<i the columns
before the i-th.

`SequentialConditioned`
    u_i is the direction of x ~ Normal(0, Omega_i) conditioned on C'x = 0 ("kriging")::

        log p(u_i | C) = c_i - 1/2 logdet Omega_i + 1/2 logdet C'Omega_i C - p_i/2 log u_i'Lambda_i u_i

`SequentialProjected`
    u_i is the direction of x ~ Normal(0, Omega_i) projected on the complement of C (Gram-Schmidt)::

        log p(u_i | C) = c_i - 1/2 logdet Omega_i - 1/2 logdet C'Lambda_i C - p_i/2 log s_i

    where s_i is the Schur complement of C'Lambda_i C in the Gram matrix of (C, u_i).
`MatrixAngularCentralGaussian`
    U is the polar factor of X with columns Normal(0, Omega), one Omega for all.
`UniformFrame`
    the case Omega = I of all three.

with c_i = log Gamma(p_i/2) - log 2 - p_i/2 log pi. The scale of Omega drops out. A conditioned column keeps the
smoothness of its own kernel, where a projected one inherits what is rough in the columns before it.

Kernels may be uncertain: the covariance of a column is a mixture over G candidates with weights w_ig, of which the
eigenpairs are known (`probmodels.covariance.eigen_grid`). The mixture is summed exactly, so that a length-scale on a
grid needs no sampling, and `component_logits` gives its exact conditional. U is then in coordinates of the grid's
basis.

References
----------
Chikuse, Y. (1990). The matrix angular central Gaussian distribution. J. Multivariate Anal. 33(2).
https://doi.org/10.1016/0047-259X(90)90050-R
North, J. S., Risser, M. D. and Breidt, F. J. (2023). A flexible class of priors for orthonormal matrices with basis
function-specific structure. https://arxiv.org/abs/2307.13627
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, Self

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from pyro.infer.reparam.reparam import Reparam, ReparamMessage, ReparamResult
from torch import Tensor
from torch.distributions import constraints, transform_to
from torch.distributions.transforms import Transform

from probmodels.covariance import EigenGrid

__all__ = [
    "FrameReparam",
    "MatrixAngularCentralGaussian",
    "SequentialConditioned",
    "SequentialProjected",
    "UniformFrame",
    "gram_schmidt",
    "stiefel",
]


class _Stiefel(constraints.Constraint):
    """Matrices with orthonormal columns, up to rounding of the dtype (5e-7 in float64, 2e-3 in float32)."""

    event_dim = 2

    def check(self, value: Tensor) -> Tensor:
        gram = value.mT @ value
        error = (gram - torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)).abs()
        return error.amax((-2, -1)) <= torch.finfo(value.dtype).eps ** 0.4


stiefel = _Stiefel()
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


@transform_to.register(_Stiefel)
def _to_stiefel(constraint: _Stiefel) -> Transform:
    return _GramSchmidtTransform()


def _log_sphere_densities(n: int, k: int) -> list[float]:
    """Minus the log area of the unit spheres in n, n-1, .., n-k+1 dimensions, k numbers."""
    return [math.lgamma(p / 2) - math.log(2) - p / 2 * math.log(math.pi) for p in range(n, n - k, -1)]


def _check_shape(num_rows: int, num_columns: int) -> None:
    if not 1 <= num_columns <= num_rows:
        raise ValueError(
            f"num_columns={num_columns} is out of range: {num_rows} rows allow 1 to {num_rows} orthonormal columns"
        )


def _eigenpairs(covariance: Tensor) -> tuple[Tensor, Tensor]:
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


class _FrameMixture(TorchDistribution):
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
        _check_shape(num_rows, num_columns)
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
        if vectors is not None:
            error = (torch.linalg.vector_norm(vectors, dim=-2) - 1).abs().max()
            if not bool(error <= torch.finfo(vectors.dtype).eps ** 0.4):
                raise ValueError(f"vectors must hold orthonormal columns; a norm differs from 1 by {float(error):.3g}")

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
        """Log density, candidates summed out.

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
        return torch.einsum("...gab,...ak->...gbk", self.vectors, frame), self.values.unsqueeze(-1)

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


class _Sequential(_FrameMixture):
    """Frames drawn column by column, each column with weights of its own over the candidates.

    Parameters
    ----------
    values
        Eigenvalues of G candidate covariances, positive, shape (*batch, G, n).
    vectors
        Their eigenvectors in columns, shape (*batch, G, n, n); None if all candidates are diagonal.
    num_columns
        Number k of columns, 1 <= k <= n.
    log_weights
        Log weights of the candidates, shape (*batch, k, G), or (G,) for all columns; normalised here. ``-inf`` rules
        a candidate out. Default: equal weights.
    validate_args
        Whether numbers are checked; default: Pyro's setting.

    Raises
    ------
    ValueError
        If shapes do not fit, k > n, eigenvalues are not positive, or a row of weights is empty.
    """

    _weights_dim = 2

    @classmethod
    def from_covariance(
        cls, covariance: Tensor, num_columns: int | None = None, *, validate_args: bool | None = None
    ) -> Self:
        """Fixed covariances.

        Parameters
        ----------
        covariance
            One for all columns, shape (n, n), with ``num_columns``; or one for each, shape (*batch, k, n, n).
        num_columns
            Number of columns; with one covariance for each it may be left out.
        validate_args
            As in the class.

        Raises
        ------
        ValueError
            If a covariance is not square, symmetric and positive definite, or the numbers of columns disagree.
        """
        values, vectors = _eigenpairs(covariance)
        if covariance.dim() == 2:
            if num_columns is None:
                raise ValueError("num_columns is needed where one covariance serves all columns")
            return cls(values[None], vectors[None], num_columns, validate_args=validate_args)
        if num_columns not in (None, covariance.shape[-3]):
            raise ValueError(f"num_columns={num_columns} but covariance holds {covariance.shape[-3]} matrices")
        own = torch.eye(covariance.shape[-3], dtype=values.dtype, device=values.device).log()
        return cls(values, vectors, covariance.shape[-3], own, validate_args=validate_args)

    @classmethod
    def from_grid(
        cls,
        grid: EigenGrid,
        num_columns: int,
        log_weights: Tensor | None = None,
        *,
        validate_args: bool | None = None,
    ) -> Self:
        """Candidates of an `EigenGrid`; frames are then in coordinates of its basis, shape (rank, k).

        Parameters
        ----------
        grid
            Candidates, float64.
        num_columns, log_weights, validate_args
            As in the class.
        """
        return cls(grid.values, grid.vectors, num_columns, log_weights, validate_args=validate_args)

    def _column_terms(self, gram_diagonal: Tensor, cholesky_diagonal: Tensor, sign: float) -> Tensor:
        """Log densities (..., k, G) from quadratic forms and the Cholesky diagonal of a Gram matrix (..., G, k)."""
        num_rows, num_columns = self.event_shape
        constant = self.values.new_tensor(_log_sphere_densities(num_rows, num_columns))
        half_dims = torch.arange(num_rows, num_rows - num_columns, -1, device=self.values.device) / 2
        log_diagonal = cholesky_diagonal.log()
        minors = log_diagonal.cumsum(-1) - log_diagonal  # half log determinants of the leading minors before i
        terms = constant + sign * minors - half_dims * gram_diagonal.log()
        return (terms - self._half_logdet.unsqueeze(-1)).mT

    @staticmethod
    @abstractmethod
    def _restrict(x: Tensor, values: Tensor, previous: Tensor) -> Tensor:
        """Normal draws (m, n) made orthogonal to previous columns (m, n, i), in coordinates of the eigenvectors."""

    def _draw(self, noise: Tensor, index: Tensor) -> Tensor:
        frame = torch.zeros_like(noise)
        for i in range(self.num_columns):
            for rows, values, vectors in self._groups(index[:, i]):
                previous = frame[rows, :, :i]
                x = noise[rows, :, i] * values.sqrt()
                if i:
                    x = self._restrict(x, values, previous if vectors is None else vectors.mT @ previous)
                if vectors is not None:
                    x = x @ vectors.mT
                x = x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)
                x = x - (previous @ (previous.mT @ x.unsqueeze(-1))).squeeze(-1)  # removes rounding only
                frame[rows, :, i] = x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return frame


class SequentialConditioned(_Sequential):
    __doc__ = (
        "Each column a normal vector conditioned on orthogonality to those before, normalised.\n"
        + str(_Sequential.__doc__).partition("\n")[2]
    )

    def _log_terms(self, frame: Tensor) -> Tensor:
        a, values = self._coordinates(frame)
        minors = torch.linalg.cholesky(a.mT @ (values * a)).diagonal(dim1=-2, dim2=-1)
        return self._column_terms((a * a / values).sum(-2), minors, 1.0)

    @staticmethod
    def _restrict(x: Tensor, values: Tensor, previous: Tensor) -> Tensor:
        weighted = values.unsqueeze(-1) * previous
        factor = torch.linalg.cholesky(previous.mT @ weighted)
        return x - (weighted @ torch.cholesky_solve(previous.mT @ x.unsqueeze(-1), factor)).squeeze(-1)


class SequentialProjected(_Sequential):
    __doc__ = (
        "Each column a normal vector projected on the complement of those before, normalised.\n"
        + str(_Sequential.__doc__).partition("\n")[2]
    )

    def _log_terms(self, frame: Tensor) -> Tensor:
        a, values = self._coordinates(frame)
        diagonal = torch.linalg.cholesky(a.mT @ (a / values)).diagonal(dim1=-2, dim2=-1)
        return self._column_terms(diagonal.square(), diagonal, -1.0)

    @staticmethod
    def _restrict(x: Tensor, values: Tensor, previous: Tensor) -> Tensor:
        return x - (previous @ (previous.mT @ x.unsqueeze(-1))).squeeze(-1)


class MatrixAngularCentralGaussian(_FrameMixture):
    """Polar factor of a matrix whose columns are Normal(0, Omega): invariant under rotation of the columns.

    Parameters
    ----------
    values
        Eigenvalues of G candidate covariances, positive, shape (*batch, G, n).
    vectors
        Their eigenvectors in columns, shape (*batch, G, n, n); None if all candidates are diagonal.
    num_columns
        Number k of columns, 1 <= k <= n.
    log_weights
        Log weights of the candidates, shape (*batch, G); the candidate is common to all columns. Default: equal.
    validate_args
        Whether numbers are checked; default: Pyro's setting.

    Raises
    ------
    ValueError
        If shapes do not fit, k > n, eigenvalues are not positive, or a row of weights is empty.
    """

    _weights_dim = 1

    @classmethod
    def from_covariance(cls, covariance: Tensor, num_columns: int, *, validate_args: bool | None = None) -> Self:
        """One fixed covariance for all columns, shape (*batch, n, n); ValueError unless positive definite."""
        values, vectors = _eigenpairs(covariance)
        return cls(values.unsqueeze(-2), vectors.unsqueeze(-3), num_columns, validate_args=validate_args)

    @classmethod
    def from_grid(
        cls,
        grid: EigenGrid,
        num_columns: int,
        log_weights: Tensor | None = None,
        *,
        validate_args: bool | None = None,
    ) -> Self:
        """Candidates of an `EigenGrid`; frames are then in coordinates of its basis, shape (rank, k)."""
        return cls(grid.values, grid.vectors, num_columns, log_weights, validate_args=validate_args)

    def _log_terms(self, frame: Tensor) -> Tensor:
        num_rows, num_columns = self.event_shape
        a, values = self._coordinates(frame)
        diagonal = torch.linalg.cholesky(a.mT @ (a / values)).diagonal(dim1=-2, dim2=-1)
        uniform = sum(_log_sphere_densities(num_rows, num_columns))
        return uniform - num_columns * self._half_logdet - num_rows * diagonal.log().sum(-1)

    def _draw(self, noise: Tensor, index: Tensor) -> Tensor:
        frame = torch.empty_like(noise)
        for rows, values, vectors in self._groups(index):
            x = values.sqrt().unsqueeze(-1) * noise[rows]
            left, _, right = torch.linalg.svd(x, full_matrices=False)
            polar = left @ right
            frame[rows] = polar if vectors is None else vectors @ polar
        return frame


class UniformFrame(TorchDistribution):
    """Frames distributed evenly over the Stiefel manifold.

    Parameters
    ----------
    num_rows, num_columns
        Shape (n, k) of the frame, 1 <= k <= n.
    dtype, device
        Of the draws; default: torch's.

    Raises
    ------
    ValueError
        If k > n.
    """

    arg_constraints = {}  # noqa: RUF012 - the name and type that torch reads
    support = stiefel
    has_rsample = False

    def __init__(
        self,
        num_rows: int,
        num_columns: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        validate_args: bool | None = None,
    ) -> None:
        _check_shape(num_rows, num_columns)
        self._like = torch.empty(0, dtype=dtype, device=device)
        super().__init__(torch.Size(), torch.Size([num_rows, num_columns]), validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> UniformFrame:
        """The same distribution with a larger batch shape."""
        new = self._get_checked_instance(UniformFrame, _instance)
        new._like = self._like
        TorchDistribution.__init__(new, torch.Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def mean(self) -> Tensor:
        """Zero by symmetry."""
        return self._like.new_zeros(self._extended_shape())

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008 - torch's own default
        """Exact independent draws, shape (*sample, *batch, n, k), from torch's global generator."""
        shape = self._extended_shape(torch.Size(sample_shape))
        with torch.no_grad():
            return gram_schmidt(torch.randn(shape, dtype=self._like.dtype, device=self._like.device))

    def log_prob(self, value: Tensor) -> Tensor:
        """Minus the log volume of the manifold, shape (*sample, *batch)."""
        if self._validate_args:
            self._validate_sample(value)
        constant = sum(_log_sphere_densities(self.event_shape[0], self.event_shape[1]))
        return value.new_full(torch.broadcast_shapes(value.shape[:-2], self.batch_shape), constant)


class FrameReparam(Reparam):
    """Makes a frame a function of independent standard normals, for HMC, NUTS and automatic guides.

    The site ``name`` becomes a deterministic function U of a new site ``<name>_unconstrained``, Xi (*batch, n, k)
    with independent standard normal entries: U = gram_schmidt(L Xi), where L L' is a reference covariance. U then has
    the density of `SequentialProjected` under the reference (of `UniformFrame` without one), and the site carries
    the log ratio of its own density to this. The posterior is exact for any reference; a reference near the prior
    makes it easy to sample.

    Parameters
    ----------
    reference
        Covariance (n, n) in the coordinates of the frame, or an `EigenGrid` that holds one candidate (see
        `EigenGrid.select`). Default: the identity.

    Raises
    ------
    ValueError
        If the reference is not positive definite or holds several candidates; when applied, if the site is observed,
        is no frame, or has another number of rows than the reference.
    """

    def __init__(self, reference: Tensor | EigenGrid | None = None) -> None:
        self._values: Tensor | None = None
        self._vectors: Tensor | None = None
        if isinstance(reference, EigenGrid):
            if reference.size != 1:
                raise ValueError(
                    f"the reference grid holds {reference.size} candidates; choose one: grid.select(index)"
                )
            self._values = reference.values[0]
            self._vectors = None if reference.vectors is None else reference.vectors[0]
        elif reference is not None:
            if reference.dim() != 2:
                raise ValueError(f"the reference has shape {tuple(reference.shape)}; expected one covariance (n, n)")
            self._values, self._vectors = _eigenpairs(reference)

    def _color(self, xi: Tensor) -> Tensor:
        if self._values is None:
            return xi
        x = self._values.sqrt().unsqueeze(-1) * xi
        return x if self._vectors is None else self._vectors @ x

    def _whiten(self, frame: Tensor) -> Tensor:
        """Some Xi that gives the frame, its columns as long as normal ones typically are."""
        xi = frame
        if self._values is not None:
            xi = frame if self._vectors is None else self._vectors.mT @ frame
            xi = xi / self._values.sqrt().unsqueeze(-1)
        return xi * (xi.shape[-2] ** 0.5 / torch.linalg.vector_norm(xi, dim=-2, keepdim=True))

    def _reference(self, fn: Any) -> TorchDistribution:
        num_rows, num_columns = fn.event_shape[-2:]
        if self._values is None:
            return UniformFrame(num_rows, num_columns, validate_args=False)
        vectors = None if self._vectors is None else self._vectors[None]
        return SequentialProjected(self._values[None], vectors, num_columns, validate_args=False)

    def apply(self, msg: ReparamMessage) -> ReparamResult:
        """Replace a frame site; called by Pyro's reparam handler."""
        name, value = msg["name"], msg["value"]
        if msg["is_observed"]:
            raise ValueError(f"site {name!r} is observed: FrameReparam is for latent frames")
        fn: Any = msg["fn"]
        base, event_dim = self._unwrap(fn)
        if not isinstance(getattr(base, "support", None), _Stiefel):
            raise ValueError(f"site {name!r} is a {type(base).__name__}; FrameReparam needs a distribution over frames")
        num_rows = base.event_shape[-2]
        if self._values is not None and self._values.shape[-1] != num_rows:
            raise ValueError(
                f"the reference of site {name!r} has {self._values.shape[-1]} rows but the frame has {num_rows}"
            )
        xi = None if value is None else self._whiten(value)  # an arbitrary injection, which serves to initialise
        like = base.mean if self._values is None else self._values
        normal = dist.Normal(like.new_zeros(fn.batch_shape + fn.event_shape), 1.0).to_event(event_dim)
        xi = pyro.sample(f"{name}_unconstrained", normal, obs=xi, infer={"is_observed": False})
        if value is None:
            value = gram_schmidt(self._color(xi))
        ratio = base.log_prob(value) - self._reference(base).log_prob(value)
        ratio = ratio.reshape((*fn.batch_shape, -1)).sum(-1) if event_dim > 2 else ratio
        return {"fn": dist.Delta(value, log_density=ratio, event_dim=event_dim), "value": value, "is_observed": True}
