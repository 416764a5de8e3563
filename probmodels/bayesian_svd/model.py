"""Bayesian singular value decomposition with structured orthonormal modes.

Generative model, for n locations, m times and k modes (Z holds the data after weighting, rows scaled by the root of the
location's weight w)::

    U ~ frame prior on the Stiefel manifold V(k, n), kernel and length-scale of its own for each mode
    V ~ frame prior on V(k, m)
    d_i ~ HalfNormal(scale), or a mixture of such over a grid of scales
    sigma^2 ~ InverseGamma(shape, rate)
    Z = shared effects + local effects T' + U diag(d) V' + sigma * noise

Local effects (a coefficient of each location for each column of the time design T) are integrated out: with a flat
prior by working in the orthogonal complement of T, where V then lives, or under a normal prior in closed form. The
length-scale of a mode has a prior on a grid and is integrated out of the frame prior exactly, then drawn from its
conditional. Without gaps the likelihood needs only the data projected on the kernels' bases, so that a density
evaluation never forms an n x m matrix.

References
----------
North, J. S., Risser, M. D. and Breidt, F. J. (2023). A flexible class of priors for orthonormal matrices with basis
function-specific structure. https://arxiv.org/abs/2307.13627. The prior here differs from theirs where theirs is no
joint distribution; ``docs/bayesian_svd.md`` says where and why.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor

from probmodels.distributions.frames import (
    MatrixAngularCentralGaussian,
    SequentialConditioned,
    SequentialProjected,
    UniformFrame,
)
from probmodels.distributions.processes import correlation_at
from probmodels.distributions.series import ProcessSeries

__all__ = [
    "ENGINES",
    "FRAME_PRIORS",
    "REFERENCE",
    "Gaps",
    "MatrixData",
    "NoiseData",
    "SeriesData",
    "SideData",
    "frame_prior",
    "local_effects",
    "model",
]

REFERENCE = "North, Risser and Breidt (2023), https://arxiv.org/abs/2307.13627"
ENGINES = ("mcmc", "svi")

FRAME_PRIORS = ("conditioned", "projected", "macg", "uniform")


class SideData(NamedTuple):
    """Candidate covariances of one side in its base coordinates.

    ``values (G, r)`` eigenvalues, ``vectors (G, r, r)`` eigenvectors by columns or None where all are diagonal,
    ``log_weights (k, G)`` log prior weights of the candidates for each mode, ``length_scales (G,)``, ``basis (N, r)``,
    empty where the coordinates are the N points themselves.
    """

    values: Tensor
    vectors: Tensor | None
    log_weights: Tensor
    length_scales: Tensor
    basis: Tensor

    def at_points(self, coordinates: Tensor) -> Tensor:
        """From coordinates (r, ...) to the points (N, ...)."""
        return self.basis @ coordinates if len(self.basis) else coordinates


class SeriesData(NamedTuple):
    """Series as a process in time.

    ``process`` is one of `probmodels.distributions.processes.PROCESSES`; ``scale (G,)`` the grid of its decays over the
    usual step of the time axis, or of its length-scales in such steps; ``log_weights (k, G)``; times between neighbours
    ``steps (T-1,)`` in usual steps, and the length of one in the unit of the time axis, years where it has dates.
    """

    process: str
    scale: Tensor
    log_weights: Tensor
    steps: Tensor
    step: float

    def sites(self, index: Tensor) -> dict[str, Tensor]:
        """What is said of processes that are these places (..., k) in the grid: generated sites."""
        one = correlation_at(self.process, self.scale.numpy(), 1.0)
        sites = {"autocorrelation": torch.as_tensor(one)[index]}
        return sites if self.process == "ar1" else sites | {"length_scale_time": self.step * self.scale[index]}

    @property
    def index_site(self) -> str:
        """Name of the site that holds places in the grid."""
        return "decay_index" if self.process == "ar1" else "length_index_time"


class Gaps(NamedTuple):
    """Data with missing entries: ``observed (n, m)`` with zeros in the gaps, ``mask (n, m)`` true where observed, and
    the shared covariates ``shared (p, n, m)``, unprojected."""

    observed: Tensor
    mask: Tensor
    shared: Tensor


class NoiseData(NamedTuple):
    """Noise that is correlated between cells and between times, its variance apart.

    ``whitener (n, n)`` takes weighted data to coordinates where noise is white in space, ``root (n, n)`` back; ``left
    (ru, n)`` has the basis of the patterns in these as orthonormal rows; ``phi (T-1,)`` is the correlation of the
    noise of neighbouring times.
    """

    whitener: Tensor
    root: Tensor
    left: Tensor
    phi: Tensor

    def filter(self, x: Tensor) -> Tensor:
        """What is new along the last axis (T): white where x has the noise's persistence."""
        later = (x[..., 1:] - self.phi * x[..., :-1]) / (1 - self.phi.square()).sqrt()
        return torch.cat([x[..., :1], later], -1)


class MatrixData(NamedTuple):
    """Everything that model, guide and kernel need to know of the data, weighted and in reduced coordinates.

    ``z (ru, rv)`` the data between the two bases; ``rest ()`` squared norm of what the bases leave out and ``count
    ()`` the number of free entries; ``scale``, ``noise_shape``, ``noise_rate`` the hyperparameters; ``design (m, q)``
    orthonormal local effects with ``design_root (q, q)`` such that the named design is ``design @ design_root``;
    ``effect_precision ()`` of their coefficients, 0 for a flat prior; ``z_design (n, q)`` data times design; ``weight
    (n,)``; ``shared (p, ru, rv)`` shared covariates, reduced, with their products with data and each other outside
    the bases, ``shared_cross (p,)`` and ``shared_gram (p, p)``, products with the design ``shared_design (p, n, q)``,
    and the prior precision ``shared_precision ()``; ``gaps`` where entries are missing (``z``, ``rest`` and the
    products are then those of the data with each gap filled by its cell's least-squares effects: a start for
    samplers, no part of the density); ``series`` where the series of modes are a process in time in place of a frame:
    ``z`` is then ``(ru, m)``, projected off the design where effects are flat; ``noise`` where the noise is correlated:
    data and design are then in the coordinates where it is white (n x m in all), the design orthonormal there;
    ``sizes (G,)`` scales of half-normals whose even mixture is the prior of d, in place of ``scale``.
    """

    z: Tensor
    rest: Tensor
    num_free: Tensor
    space: SideData
    time: SideData
    scale: Tensor
    noise_shape: Tensor
    noise_rate: Tensor
    design: Tensor
    design_root: Tensor
    effect_precision: Tensor
    z_design: Tensor
    weight: Tensor
    shared: Tensor
    shared_cross: Tensor
    shared_gram: Tensor
    shared_design: Tensor
    shared_precision: Tensor
    gaps: Gaps | None
    series: SeriesData | None = None
    noise: NoiseData | None = None
    sizes: Tensor | None = None

    def whitened(self, weighted: Tensor) -> MatrixData:
        """The same with complete weighted data (n, m) in place of its own, where noise is correlated."""
        assert self.noise is not None
        white = self.noise.filter(self.noise.whitener @ weighted)
        along = white @ self.design
        centred = white - along @ self.design.T
        z = self.noise.left @ centred
        return self._replace(z=z, rest=centred.square().sum() - z.square().sum(), z_design=along, gaps=None)


def frame_prior(side: SideData, name: str) -> TorchDistribution:
    """The prior of a frame in base coordinates, event shape (r, k).

    Parameters
    ----------
    side
        Candidate covariances and their weights.
    name
        One of `FRAME_PRIORS`: sequential conditioned, sequential projected (the generator of the paper), matrix angular
        central Gaussian (one candidate common to all modes), or uniform.
    """
    num_columns = side.log_weights.shape[0]
    if name == "uniform":
        return UniformFrame(side.values.shape[-1], num_columns, dtype=side.values.dtype)
    if name == "macg":
        return MatrixAngularCentralGaussian(side.values, side.vectors, num_columns, side.log_weights[0])
    family = SequentialProjected if name == "projected" else SequentialConditioned
    return family(side.values, side.vectors, num_columns, side.log_weights)


def _with_gaps(data: MatrixData, u: Tensor, d: Tensor, v: Tensor, shared: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Masked residual (n, m), its products with the design (n, q), Gram of the design at each row's times (n, q, q)."""
    assert data.gaps is not None
    signal = (data.space.at_points(u) * d) @ data.time.at_points(v).T
    mask = data.gaps.mask.to(signal.dtype)
    residual = (data.gaps.observed - signal - torch.einsum("p,pnm->nm", shared, data.gaps.shared)) * mask
    gram = torch.einsum("nt,tq,ts->nqs", mask, data.design, data.design)
    return residual, residual @ data.design, gram


class LowRankNormal(TorchDistribution):
    """The data about ``U diag(d) V'`` with independent noise, local effects integrated out.

    Parameters
    ----------
    data
        Reduced data.
    u, d, v
        Frames (ru, k) and (rv, k) in base coordinates and singular values (k,).
    sigma
        Noise standard deviation, shape ().
    shared
        Coefficients of the shared covariates (p,).

    Notes
    -----
    Without gaps the event is the reduced matrix (ru, rv), and the part of the data outside the bases, on which no mode
    acts, enters by its squared norm. With gaps the event is the matrix (n, m), of which only observed entries count.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012 (the attribute that torch defines)
    support = constraints.independent(constraints.real, 2)
    has_rsample = True

    def __init__(self, data: MatrixData, u: Tensor, d: Tensor, v: Tensor, sigma: Tensor, shared: Tensor) -> None:
        self.data, self.u, self.d, self.v, self.sigma, self.shared = data, u, d, v, sigma, shared
        shape = data.z.shape if data.gaps is None else data.gaps.observed.shape
        super().__init__(batch_shape=torch.Size(), event_shape=shape, validate_args=False)

    @property
    def mean(self) -> Tensor:
        data = self.data
        if data.gaps is None:
            return (self.u * self.d) @ self.v.T + torch.einsum("p,pij->ij", self.shared, data.shared)
        signal = (data.space.at_points(self.u) * self.d) @ data.time.at_points(self.v).T
        return signal + torch.einsum("p,pnm->nm", self.shared, data.gaps.shared)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008 (torch's own default)
        mean = self.mean
        return mean + self.sigma * torch.randn(
            torch.Size(sample_shape) + mean.shape, dtype=mean.dtype, device=mean.device
        )

    def expand(self, batch_shape: Any, _instance: Any = None) -> LowRankNormal:
        if torch.Size(batch_shape) != self.batch_shape:
            raise ValueError(f"LowRankNormal has no batch; cannot expand to {tuple(batch_shape)}")
        return self

    def log_prob(self, value: Tensor) -> Tensor:
        data, variance = self.data, self.sigma.square()
        num_effects = data.design.shape[1]
        flat = not data.effect_precision.item() > 0
        if data.gaps is None:
            residual = value - self.mean
            norm = residual.square().sum() + data.rest - 2 * self.shared @ data.shared_cross
            norm = norm + self.shared @ data.shared_gram @ self.shared
            out = -0.5 * (data.num_free * torch.log(2 * math.pi * variance) + norm / variance)
            if flat or num_effects == 0:
                return out
            design = data.time.basis.T @ data.design if len(data.time.basis) else data.design
            along = (residual @ design).square().sum()
            ratio = 1 / (variance * data.effect_precision)
            log_det = data.weight.numel() * num_effects * torch.log1p(ratio)
            return out - 0.5 * (log_det - along / variance * ratio / (1 + ratio))
        residual, along, gram = _with_gaps(data, self.u, self.d, self.v, self.shared)
        norm = residual.square().sum()
        log_det = variance.new_zeros(())
        if num_effects:
            ridge = variance * data.effect_precision
            factor = torch.linalg.cholesky(gram + ridge * torch.eye(num_effects, dtype=gram.dtype, device=gram.device))
            norm = norm - torch.linalg.solve_triangular(factor, along.unsqueeze(-1), upper=False).square().sum()
            log_det = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum()
            if not flat:
                log_det = log_det - gram.shape[0] * num_effects * torch.log(ridge)
        return -0.5 * (data.num_free * torch.log(2 * math.pi * variance) + norm / variance + log_det)


class EffectsOfCells(TorchDistribution):
    """Effects (n, q) about a mean, correlated between cells and between effects: ``loc + sigma root e back'``.

    ``loc (n, q)``, ``root (n, n)``, ``back (q, q)``, ``sigma ()``; e is standard normal.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012 (the attribute that torch defines)
    support = constraints.independent(constraints.real, 2)

    def __init__(self, loc: Tensor, root: Tensor, back: Tensor, sigma: Tensor) -> None:
        self.loc, self.root, self.back, self.sigma = loc, root, back, sigma
        super().__init__(batch_shape=torch.Size(), event_shape=loc.shape, validate_args=False)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008 (torch's own default)
        with torch.no_grad():
            noise = torch.randn(torch.Size(sample_shape) + self.loc.shape, dtype=self.loc.dtype)
            return self.loc + self.sigma * self.root @ noise @ self.back.T

    def expand(self, batch_shape: Any, _instance: Any = None) -> EffectsOfCells:
        if torch.Size(batch_shape) != self.batch_shape:
            raise ValueError(f"EffectsOfCells has no batch; cannot expand to {tuple(batch_shape)}")
        return self

    def log_prob(self, value: Tensor) -> Tensor:
        n, q = self.loc.shape
        back = torch.linalg.inv(self.back)
        white = torch.linalg.solve(self.root, value - self.loc) @ back.T / self.sigma
        log_det = q * torch.linalg.slogdet(self.root)[1] - n * torch.linalg.slogdet(back)[1]
        log_det = log_det + n * q * (self.sigma.log() + 0.5 * math.log(2 * math.pi))
        return -0.5 * white.square().sum() - log_det


def local_effects(
    data: MatrixData, u: Tensor, d: Tensor, v: Tensor, sigma: Tensor, shared: Tensor
) -> TorchDistribution:
    """Exact conditional of the local effects given everything else, in the units of the data.

    Batch (n,) and event (q,), or event (n, q) where noise correlates the cells. The coefficients are those of the named
    design, before orthonormalisation and without the weights.
    """
    if data.noise is not None:
        seen = data.noise.filter(v.T)
        along = data.z_design - (data.noise.left.T @ u * d) @ (seen @ data.design)
        root = data.weight.rsqrt().unsqueeze(-1) * data.noise.root
        back = torch.linalg.inv(data.design_root)
        return EffectsOfCells(root @ along @ back.T, root, back, sigma)
    num_effects = data.design.shape[1]
    eye = torch.eye(num_effects, dtype=data.z.dtype, device=data.z.device)
    if data.gaps is None:
        along = data.z_design - torch.einsum("p,pnq->nq", shared, data.shared_design)
        along = along - (data.space.at_points(u) * d) @ (data.design.T @ data.time.at_points(v)).T
        gram = eye.expand(along.shape[0], -1, -1)
    else:
        _, along, gram = _with_gaps(data, u, d, v, shared)
    factor = torch.linalg.cholesky(gram + sigma.square() * data.effect_precision * eye)
    loc = torch.cholesky_solve(along.unsqueeze(-1), factor).squeeze(-1)
    back = torch.linalg.inv(data.design_root)  # from coefficients of the orthonormal columns to those of the named ones
    weight = data.weight.rsqrt().unsqueeze(-1)
    root = back @ torch.linalg.inv(factor).mT * sigma * weight.unsqueeze(-1)
    loc = loc @ back.mT * weight
    return dist.MultivariateNormal(loc, covariance_matrix=root @ root.mT)


def _axes(*names: str, **flags: bool) -> Any:
    """What Pyro calls ``infer``: the names of a site's event axes, and flags for the engines."""
    return {"event_dims": list(names), **flags}


def _sample_frame(site: str, side: SideData, name: str, prior: str) -> Tensor:
    """A frame in base coordinates (r, k), and the length-scales of its modes as leaves."""
    frame = frame_prior(side, prior)
    value: Tensor = pyro.sample(site, frame, infer=_axes(f"basis_{name}", "mode"))
    if prior != "uniform":
        logits = frame.component_logits(value)
        index = pyro.sample(  # one candidate for each mode; under "macg" one for all
            f"length_index_{name}",
            dist.Categorical(logits=logits).to_event(logits.dim() - 1),
            infer=_axes(*["mode"] * (logits.dim() - 1), generated=True),
        )
        scales = side.length_scales[index].expand(value.shape[-1])
        pyro.sample(f"length_scale_{name}", dist.Delta(scales, event_dim=1), infer=_axes("mode", generated=True))
    return value


def _size_prior(data: MatrixData, rank: int) -> TorchDistribution:
    """Prior of the sizes d, event shape (k,)."""
    if data.sizes is None:
        return dist.HalfNormal(data.scale).expand([rank]).to_event(1)
    scales = data.sizes.expand(rank, -1)
    return dist.MixtureSameFamily(dist.Categorical(torch.ones_like(scales)), dist.HalfNormal(scales)).to_event(1)


def _sample_series(series: SeriesData) -> Tensor:
    """Series of unit variance (m, k), with their decays or length-scales as leaves."""
    process = ProcessSeries(series.process, series.scale, series.steps, series.log_weights)
    value: Tensor = pyro.sample("F", process, infer=_axes("time", "mode"))
    choice = dist.Categorical(logits=process.component_logits(value)).to_event(1)
    index = pyro.sample(series.index_site, choice, infer=_axes("mode", generated=True))
    for site, scale in series.sites(index).items():
        pyro.sample(site, dist.Delta(scale, event_dim=1), infer=_axes("mode", generated=True))
    return value


def model(data: MatrixData, prior: str = "conditioned") -> None:
    """Sites ``U`` (ru, k), ``V`` (rv, k) or ``F`` (m, k), ``d`` (k,), ``sigma``, ``Z``; leaves ``length_scale_*`` (k,)
    and ``fixed_effects``, with ``F`` also ``autocorrelation`` (k,), over one step.

    Parameters
    ----------
    data
        Reduced data, as `make_problem` prepares it.
    prior
        Name of the frame prior, one of `FRAME_PRIORS`.
    """
    rank = data.space.log_weights.shape[0]
    u = _sample_frame("U", data.space, "space", prior)
    flat = not data.effect_precision.item() > 0
    if data.series is None:
        v = seen = _sample_frame("V", data.time, "time", prior)
    else:
        v = seen = _sample_series(data.series)
        if data.noise is not None:
            seen = data.noise.filter(v.T).T
        if flat:  # what lies along effects of flat prior is not seen
            seen = seen - data.design @ (data.design.T @ seen)
    d = pyro.sample("d", _size_prior(data, rank), infer=_axes("mode"))
    variance = dist.InverseGamma(data.noise_shape, data.noise_rate)
    sigma = pyro.sample(
        "sigma", dist.TransformedDistribution(variance, [dist.transforms.PowerTransform(torch.tensor(0.5))])
    )
    if data.noise is not None and data.gaps is not None:  # what is missing has no density of its own
        count = int((~data.gaps.mask).sum())
        flat_ = dist.Normal(data.z.new_zeros(count), 1.0).mask(False).to_event(1)
        missing = pyro.sample("missing", flat_, infer=_axes("gap"))
        data = data.whitened(data.gaps.observed.masked_scatter(~data.gaps.mask, missing))
    shared = data.z.new_zeros(0)
    if len(data.shared):
        sd = data.shared_precision.rsqrt()
        shared = pyro.sample(
            "shared_effects",
            dist.Normal(0.0, sd).expand([len(data.shared)]).to_event(1),
            infer=_axes("shared_effect"),
        )
    time = "basis_time" if data.series is None else "time"
    event_dims = ("basis_space", time) if data.gaps is None else ("cell", "time")
    observed = data.z if data.gaps is None else data.gaps.observed
    pyro.sample(
        "Z",
        LowRankNormal(data, u, d, seen, sigma, shared),
        obs=observed,
        infer=_axes(*event_dims),
    )
    if data.design.shape[1]:
        effects = local_effects(data, u, d, v, sigma, shared)
        if effects.batch_shape:  # cells are independent
            effects = effects.to_event(1)
        pyro.sample("fixed_effects", effects, infer=_axes("cell", "effect", generated=True))
