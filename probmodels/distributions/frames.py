"""Distributions over orthonormal frames: matrices U (n, k) with U'U = I_k.

All densities are taken with respect to the invariant measure on the Stiefel manifold, of total mass
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
eigenpairs are known (`probmodels.distributions.covariance.eigen_grid`). The mixture is summed exactly, so that a
length-scale on a grid needs no sampling, and `component_logits` gives its exact conditional. U is then in coordinates
of the grid's basis.

References
----------
Chikuse, Y. (1990). The matrix angular central Gaussian distribution. J. Multivariate Anal. 33(2).
https://doi.org/10.1016/0047-259X(90)90050-R
North, J. S., Risser, M. D. and Breidt, F. J. (2023). A flexible class of priors for orthonormal matrices with basis
function-specific structure. https://arxiv.org/abs/2307.13627
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Self

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from pyro.infer.reparam.reparam import Reparam, ReparamMessage, ReparamResult
from torch import Tensor

from probmodels.distributions._mixture import (
    FrameMixture,
    Stiefel,
    check_shape,
    eigenpairs,
    gram_schmidt,
    log_sphere_densities,
    stiefel,
)
from probmodels.distributions.covariance import EigenGrid

__all__ = [
    "FrameReparam",
    "MatrixAngularCentralGaussian",
    "SequentialConditioned",
    "SequentialProjected",
    "UniformFrame",
    "gram_schmidt",
    "stiefel",
]


class _Sequential(FrameMixture):
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
        values, vectors = eigenpairs(covariance)
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
        constant = self.values.new_tensor(log_sphere_densities(num_rows, num_columns))
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


class MatrixAngularCentralGaussian(FrameMixture):
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
        values, vectors = eigenpairs(covariance)
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
        uniform = sum(log_sphere_densities(num_rows, num_columns))
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
        Type and place of the draws; by default torch's.

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
        check_shape(num_rows, num_columns)
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
        constant = sum(log_sphere_densities(self.event_shape[0], self.event_shape[1]))
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
            self._values, self._vectors = eigenpairs(reference)

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
        if not isinstance(getattr(base, "support", None), Stiefel):
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
