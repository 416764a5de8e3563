"""Guide of the Bayesian singular value decomposition: a normal in preconditioned coordinates of the two manifolds.

A rank-k matrix U diag(d) V' is described by its two spans, by how the modes lie within their spans, and by d. Around a
start (U0, V0, d0, sigma0) the guide writes each side, of r rows, as::

    U = (U0 R + N B) (I + B'B)^(-1/2),    R = (I + A)^(-1) (I - A),    A' = -A

where N completes U0 to an orthogonal basis: R rotates the modes within their span and B moves each of them out of it.
With A = angles / 2 the invariant measure on frames is::

    dU = det(I + B'B)^(-r/2) det(I + A)^(-(k-1)) dB d(angles)

B belongs to the rotated modes, so that a rotation does not mix what is rough in them, which their priors tell apart.

The coordinates are preconditioned by what is known in closed form, and the normal starts near the posterior:

- Mode i with kernel eigenvalues a has a conditional variance sigma^2 a / (a + sigma^2) of d_i u_i in the kernel's
  eigenvectors, in which its column of B is therefore written.
- What the modes leave of the data correlates B of U with B of V: a mode turns towards a neglected one of nearly its
  size on both sides at once. The weighted remainder's singular triples give this covariance exactly to first order.
- Within the spans U and V turn together with variance sigma^2 / 2(d_i - d_j)^2 and oppositely with variance
  sigma^2 / 2(d_i + d_j)^2: near-degenerate pairs rotate (North et al. 1982). The scale of the angles follows d and
  sigma from draw to draw.

On these coordinates stands a joint normal: a full covariance of angles, log d, log sigma and shared effects, a
low-rank-plus-diagonal one of the spans, and their cross-covariance. Its entropy is differentiated along the path alone,
which leaves no noise in the gradient where the guide is exact (Roeder et al. 2017). Length-scales need no site: the
model integrates them out. A draw costs O(r k^2 + r^2 k).

References
----------
North, G. R., Bell, T. L., Cahalan, R. F. and Moeng, F. J. (1982). Sampling errors in the estimation of empirical
orthogonal functions. Mon. Wea. Rev. 110(7).
Roeder, G., Wu, Y. and Duvenaud, D. (2017). Sticking the landing: simple, lower-variance gradient estimators for
variational inference. https://arxiv.org/abs/1703.09194
Chikuse, Y. (2003). Statistics on Special Manifolds. Lecture Notes in Statistics 174, Springer.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import scipy.linalg
import torch
from pyro.distributions import constraints
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn

__all__ = ["BayesianSVDGuide", "FrameChart"]

STRUCTURES = ("full", "mean_field")

_MAX_COUPLING = 0.95  # of a mode with a neglected one: beyond, the linearisation that it comes from is void
_MIN_COUPLING = 0.1  # below, independence changes a standard deviation by less than 1 %
_LOG_SCALES = tuple(0.25 * step for step in range(-12, 13))  # of a mode's prior variance, relative to d^2


class _InverseRoot(torch.autograd.Function):
    """S^(-1/2) of positive definite matrices, with a gradient that survives equal eigenvalues."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(matrix)
        root = values.rsqrt()
        ctx.save_for_backward(root, vectors)
        return (vectors * root.unsqueeze(-2)) @ vectors.mT

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        root, vectors = ctx.saved_tensors
        product, total = root.unsqueeze(-1) * root.unsqueeze(-2), root.unsqueeze(-1) + root.unsqueeze(-2)
        inner = vectors.mT @ grads[0] @ vectors * (-product.square() / total)
        return vectors @ inner @ vectors.mT


class FrameChart(nn.Module):
    """A chart of the frames (r, k) around a start, with the density of its measure.

    Parameters
    ----------
    start
        Frame U0 (r, k) that has all coordinates zero.
    vectors
        Orthonormal bases (G, r, r), or None for the identity.
    index
        Which of the bases the coordinates of each column follow, (k,).
    """

    start: Tensor
    index: Tensor
    rows: Tensor
    mirror: Tensor
    inverse: Tensor

    def __init__(self, start: Tensor, vectors: Tensor | None, index: Tensor) -> None:
        super().__init__()
        num_rows, k = start.shape
        rows, mirrors, inverses = [], [], []
        for i in range(k):
            image = start if vectors is None else vectors[int(index[i])].mT @ start
            # The reflection of k axes on the span, which changes the others least where the axes carry most of it.
            _, _, order = scipy.linalg.qr(image.detach().cpu().numpy().T, mode="economic", pivoting=True)
            axes = torch.as_tensor(np.sort(order[:k]), device=start.device)
            left, values, right = torch.linalg.svd(image[axes])
            mirror = image @ (left @ right).mT
            mirror[axes] += torch.eye(k, dtype=start.dtype, device=start.device)
            keep = torch.ones(num_rows, dtype=torch.bool, device=start.device)
            keep[axes] = False
            rows.append(keep.nonzero().squeeze(-1))
            mirrors.append(mirror)
            inverses.append((left / (1 + values)) @ left.mT)
        self.register_buffer("start", start)
        self.register_buffer("index", index)
        self.register_buffer("rows", torch.stack(rows))
        self.register_buffer("mirror", torch.stack(mirrors))
        self.register_buffer("inverse", torch.stack(inverses))

    def tangent(self, x: Tensor, vectors: Tensor | None) -> Tensor:
        """N B (r, k) from coordinates (k, r - k): an isometry onto the complement of the start, column by column."""
        full = x.new_zeros(self.mirror.shape[:2]).scatter(1, self.rows, x)
        full = full - torch.einsum("irk,ikl,isl,is->ir", self.mirror, self.inverse, self.mirror, full)
        if vectors is None:
            return full.mT
        return torch.stack([vectors[i] @ column for i, column in zip(self.index.tolist(), full, strict=True)], -1)

    def coordinates(self, y: Tensor, vectors: Tensor | None) -> Tensor:
        """The adjoint of `tangent`: coordinates (k, r - k, m) of matrices (k, r, m), one for each column."""
        if vectors is not None:
            y = torch.stack([vectors[i].mT @ part for i, part in zip(self.index.tolist(), y, strict=True)])
        y = y - self.mirror @ (self.inverse @ (self.mirror.mT @ y))
        return y.gather(1, self.rows.unsqueeze(-1).expand(-1, -1, y.shape[-1]))

    def forward(self, x: Tensor, angles: Tensor, vectors: Tensor | None) -> tuple[Tensor, Tensor]:
        """Frame (r, k) and log density of the invariant measure in the coordinates, shape ().

        Parameters
        ----------
        x
            Coordinates of the span (k, r - k).
        angles
            Rotation within it, k(k-1)/2 numbers for the pairs of modes (2,1), (3,1), (3,2)...; radians where small.
        vectors
            The bases that the chart was made with.
        """
        num_rows, k = self.start.shape
        eye = torch.eye(k, dtype=x.dtype, device=x.device)
        shift = self.tangent(x, vectors)
        gram = eye + shift.mT @ shift
        lower = x.new_zeros(k, k)
        lower[tuple(torch.tril_indices(k, k, -1))] = angles / 2
        plus = eye + lower - lower.mT
        rotation = torch.linalg.solve(plus, plus.mT)
        frame = (self.start @ rotation + shift) @ _InverseRoot.apply(gram)
        log_volume = -num_rows / 2 * torch.linalg.slogdet(gram)[1] - (k - 1) * torch.linalg.slogdet(plus)[1]
        return frame, log_volume


class _Modes(NamedTuple):
    """Modes of one side: frame (r, k), kernel candidate of each (k,), shrinkage in its eigenvectors (k, r)."""

    frame: Tensor
    kernel: Tensor
    shrinkage: Tensor


class _Start(NamedTuple):
    """Modes of both sides, singular values (k,), noise (), shared effects (p,), the data without them (ru, rv)."""

    space: _Modes
    time: _Modes
    d: Tensor
    sigma: Tensor
    shared: Tensor
    z: Tensor


def _smooth(images: Tensor, variance: Tensor, side: Any) -> _Modes:
    """Conditional means of d_i u_i given their images (r, k) and the noise, made orthonormal.

    Each mode takes the candidate kernel and the scale of largest evidence: under kernel eigenvalues a, an image has
    independent normal coordinates of variance a + sigma^2 in the kernel's eigenvectors.
    """
    values, vectors = side.values, side.vectors
    rotated = images.mT.unsqueeze(0) if vectors is None else torch.stack([images.mT @ v for v in vectors])  # (G, k, r)
    shapes = values / values.sum(-1, keepdim=True)
    means, index, shrinkages = [], [], []
    for i, size in enumerate(images.square().sum(0)):
        a = (size.new_tensor(_LOG_SCALES).exp() * size).view(-1, 1, 1) * shapes  # (scales, G, r)
        total = a + variance
        evidence = -0.5 * (total.log() + rotated[:, i].square() / total).sum(-1) + side.log_weights[i]
        scale, g = divmod(int(evidence.argmax()), evidence.shape[1])
        shrinkage = a[scale, g] / total[scale, g]
        mean = images[:, i] * shrinkage if vectors is None else vectors[g] @ (rotated[g, i] * shrinkage)
        means.append(mean / torch.linalg.vector_norm(mean))
        index.append(g)
        shrinkages.append(shrinkage)
    left, _, right = torch.linalg.svd(torch.stack(means, -1), full_matrices=False)
    return _Modes(left @ right, torch.tensor(index, device=images.device), torch.stack(shrinkages))


def _fill(data: Any, fit: Tensor) -> tuple[Tensor, Tensor]:
    """Reduced data (ru, rv) and squared norm outside the bases, gaps filled by a fit (n, m) and each cell's effects."""
    mask, design = data.gaps.mask.to(fit.dtype), data.design
    filled = torch.where(data.gaps.mask, data.gaps.observed, fit)
    if design.shape[1]:
        gram = torch.einsum("nt,tq,ts->nqs", mask, design, design)
        along = ((filled - fit) * mask) @ design
        effects = torch.linalg.solve(gram, along.unsqueeze(-1)).squeeze(-1) @ design.T
        filled = torch.where(data.gaps.mask, filled, fit + effects)
    z = data.space.basis.T @ filled @ data.time.basis
    centred = filled if bool(data.effect_precision > 0) else filled - (filled @ design) @ design.T
    return z, (centred.square().sum() - z.square().sum()).clamp(min=0.0)


def _find_start(data: Any, num_sweeps: int = 12) -> _Start:
    """Closed-form coordinate ascent from the plain SVD: smoothed modes, d, noise, shared effects, gaps in turn."""
    k = data.space.log_weights.shape[0]
    z, rest, along = data.z, data.rest, data.time.basis.T @ data.design
    shared, gram = z.new_zeros(len(data.shared)), _shared_gram(data)
    u, d, vt = torch.linalg.svd(z, full_matrices=False)
    u, d, v = u[:, :k], d[:k], vt[:k].mT
    variance = (rest + z.square().sum() - d.square().sum()) / data.num_free
    for _ in range(num_sweeps):
        signal = (u * d) @ v.mT
        if data.gaps is not None:
            fit = data.space.basis @ signal @ data.time.basis.T + torch.einsum("p,pnm->nm", shared, data.gaps.shared)
            z, rest = _fill(data, fit)
        if len(shared):
            cross = data.shared_cross + torch.einsum("pij,ij->p", data.shared, z - signal)
            ridge = variance * data.shared_precision * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
            shared = torch.linalg.solve(gram + ridge, cross)
        clean = z - torch.einsum("p,pij->ij", shared, data.shared)
        clean = clean - clean @ along @ along.mT / (1 + variance * data.effect_precision)
        space = _smooth(clean @ v, variance, data.space)
        time = _smooth(clean.mT @ space.frame, variance, data.time)
        left, d, right = torch.linalg.svd(space.frame.mT @ clean @ time.frame)
        u, v = space.frame @ left, time.frame @ right.mT
        freedom = data.num_free - space.shrinkage.sum() - time.shrinkage.sum()
        norm = (clean - (u * d) @ v.mT).square().sum() + rest
        variance = norm / freedom.clamp(min=0.1 * data.num_free)
    space = _smooth(clean @ v, variance, data.space)._replace(frame=u)
    time = _smooth(clean.mT @ u, variance, data.time)._replace(frame=v)
    return _Start(space, time, d, variance.sqrt(), shared, clean)


def _shared_gram(data: Any) -> Tensor:
    """Products of the shared covariates with each other, (p, p)."""
    return data.shared_gram + torch.einsum("pij,qij->pq", data.shared, data.shared)


class _SpanRoot(nn.Module):
    """Linear map from standard coordinates to B of both sides: the root of their covariance to first order.

    Mode i has the precision [[D_u, -K], [-K', D_v]], where D are the prior's and the data's precisions in the
    coordinates of each side and K = d_i N_u' Z N_v / sigma^2. With the singular triples (p, S, q) of
    D_u^(-1/2) K D_v^(-1/2) the sum and the difference of the coordinates along p and q have variances 1 / (1 - S) and
    1 / (1 + S).

    Parameters
    ----------
    scales
        D^(-1/2) of each side, (k, ru - k) and (k, rv - k).
    remainder
        K, shape (k, ru - k, rv - k); None for independent sides.
    """

    scale_u: Tensor
    scale_v: Tensor
    left: Tensor
    right: Tensor
    sum_root: Tensor
    difference_root: Tensor

    def __init__(self, scales: tuple[Tensor, Tensor], remainder: Tensor | None) -> None:
        super().__init__()
        scale_u, scale_v = scales
        if remainder is None:
            left, right, size = (x.new_zeros(*x.shape, 0) for x in (scale_u, scale_v, scale_u[:, 0]))
        else:
            weighted = scale_u.unsqueeze(-1) * remainder * scale_v.unsqueeze(-2)
            left, size, right = torch.linalg.svd(weighted, full_matrices=False)
            num = int((size > _MIN_COUPLING).sum(-1).max())
            left, size, right = left[..., :num], size[..., :num].clamp(max=_MAX_COUPLING), right[..., :num, :].mT
        tensors = {"scale_u": scale_u, "scale_v": scale_v, "left": left, "right": right}
        tensors |= {"sum_root": (1 - size).rsqrt(), "difference_root": (1 + size).rsqrt()}
        for name, value in tensors.items():
            self.register_buffer(name, value.contiguous())

    @property
    def sizes(self) -> tuple[int, int]:
        """Number of coordinates of each side."""
        return self.scale_u.numel(), self.scale_v.numel()

    @property
    def log_det(self) -> Tensor:
        """Log determinant of the map, shape ()."""
        parts = (self.scale_u, self.scale_v, self.sum_root, self.difference_root)
        return torch.stack([part.log().sum() for part in parts]).sum()

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """B of both sides, (k, ru - k) and (k, rv - k), from as many standard coordinates, flat or not."""
        x, y = x.view_as(self.scale_u), y.view_as(self.scale_v)
        a, b = torch.einsum("irp,ir->ip", self.left, x), torch.einsum("irp,ir->ip", self.right, y)
        both, apart = 0.5 * (a + b) * self.sum_root, 0.5 * (a - b) * self.difference_root
        x = x + torch.einsum("irp,ip->ir", self.left, both + apart - a)
        y = y + torch.einsum("irp,ip->ir", self.right, both - apart - b)
        return x * self.scale_u, y * self.scale_v


class BayesianSVDGuide(PyroModule):
    """Joint normal of spans, rotations, singular values, noise and shared effects, in the coordinates of this module.

    The parameters are made in the first call, from the data that it receives. Start, scales and correlations come in
    closed form, so that few steps suffice: 600 of Adam with ``lr=0.01, lr_decay=0.05``.

    Parameters
    ----------
    rank
        Columns of the low-rank factor of the spans' covariance, beyond what the coordinates know; 0 for none.
    structure
        "full"; or "mean_field", independent coordinates of U and V each on its own, for comparison: it misses that
        U and V turn together, which is most of the uncertainty of near-degenerate modes.

    Raises
    ------
    ValueError
        If the rank is negative or the structure unknown.
    """

    # PyroModule gives back tensors where PyroParams were set.
    global_loc: Any
    global_root: Any
    global_scale: Any
    local_loc: Any
    local_scale: Any
    local_factor: Any
    cross: Any
    d_start: Tensor
    sigma_start: Tensor
    log_sigma_scale: Tensor
    shared_start: Tensor
    shared_root: Tensor

    def __init__(self, rank: int = 4, structure: str = "full") -> None:
        super().__init__()
        if rank < 0:
            raise ValueError(f"rank={rank} of the guide's low-rank factor must not be negative")
        if structure not in STRUCTURES:
            raise ValueError(f"structure={structure!r} is unknown; choose one of {', '.join(STRUCTURES)}")
        self.rank, self.structure = rank, structure
        self._ready = False

    def _set_up(self, data: Any) -> None:
        start = _find_start(data)
        k, like, full = len(start.d), start.z, self.structure == "full"
        self.space = FrameChart(start.space.frame, data.space.vectors, start.space.kernel)
        self.time = FrameChart(start.time.frame, data.time.vectors, start.time.kernel)
        relative = (start.sigma / start.d).unsqueeze(-1)
        scales = tuple(
            relative * modes.shrinkage.gather(1, chart.rows).sqrt()
            for chart, modes in ((self.space, start.space), (self.time, start.time))
        )
        remainder = None
        if full:
            remainder = self.space.coordinates(start.z.expand(k, *start.z.shape), data.space.vectors)
            remainder = self.time.coordinates(remainder.mT, data.time.vectors).mT
            remainder = remainder * (start.d / start.sigma.square()).view(-1, 1, 1)
        self.span_root = _SpanRoot((scales[0], scales[1]), remainder)
        eye = torch.eye(len(start.shared), dtype=like.dtype, device=like.device)
        precision = _shared_gram(data) / start.sigma.square() + data.shared_precision * eye
        constants = {
            "d_start": start.d,
            "sigma_start": start.sigma,
            "log_sigma_scale": (2 * data.num_free).rsqrt(),
            "shared_start": start.shared,
            "shared_root": torch.linalg.inv(torch.linalg.cholesky(precision)).mT,
        }
        for name, value in constants.items():
            self.register_buffer(name, value)

        num_pairs, num_local = k * (k - 1), sum(self.span_root.sizes)
        loc = like.new_zeros(num_pairs + k + 1 + len(start.shared))
        # Modes that vary about the start project less of the data than the start itself.
        freedom = start.space.shrinkage.sum(-1) + start.time.shrinkage.sum(-1)
        loc[num_pairs : num_pairs + k] = -0.5 * relative.squeeze(-1) * freedom
        self.global_loc = PyroParam(loc)
        self.local_loc = PyroParam(like.new_zeros(num_local))
        self.local_scale = PyroParam(like.new_ones(num_local), constraints.softplus_positive)
        if not full:
            self.global_scale = PyroParam(torch.ones_like(loc), constraints.softplus_positive)
            return
        self.global_root = PyroParam(loc.new_ones(len(loc)).diag(), constraints.softplus_lower_cholesky)
        self.cross = PyroParam(like.new_zeros(num_local, len(loc)))
        if self.rank:
            # Small but not zero, where its gradient would vanish.
            noise = torch.randn(num_local, self.rank, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            self.local_factor = PyroParam((0.1 / math.sqrt(num_local)) * noise.to(like))

    def _sample_coordinates(self) -> Tensor:
        """All coordinates, global ones first, with a log density in which the parameters are held fixed."""
        loc, local_loc, scale = self.global_loc, self.local_loc, self.local_scale
        if self.structure == "full":
            root, cross = self.global_root, self.cross
        else:
            root, cross = self.global_scale.diag(), loc.new_zeros(len(local_loc), len(loc))
        low_rank = self.structure == "full" and self.rank > 0
        factor = self.local_factor if low_rank else local_loc.new_zeros(len(local_loc), 1)
        noise = torch.randn_like(loc)
        g = loc + root @ noise
        x = local_loc + cross @ noise + factor @ torch.randn_like(factor[0]) + scale * torch.randn_like(scale)

        loc, local_loc, scale, root, cross, factor = (p.detach() for p in (loc, local_loc, scale, root, cross, factor))
        white = torch.linalg.solve_triangular(root, (g - loc).unsqueeze(-1), upper=False).squeeze(-1)
        log_q = dist.MultivariateNormal(loc, scale_tril=root).log_prob(g)
        log_q = log_q + dist.LowRankMultivariateNormal(local_loc + cross @ white, factor, scale.square()).log_prob(x)
        normal = dist.Delta(torch.cat([g, x]), log_density=log_q, event_dim=1)
        return pyro.sample("coordinates", normal, infer={"is_auxiliary": True})

    def _angles(self, near: Tensor, far: Tensor, d: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotations within the spans of U and V from standard coordinates, and the log determinant of the map."""
        k = len(d)
        i, j = torch.tril_indices(k, k, -1, device=d.device)
        start, variance = self.d_start, sigma.square()
        if self.structure == "mean_field":
            scale = self.sigma_start / (start[i].square() + start[j].square()).sqrt()
            return near * scale, far * scale, 2 * scale.log().sum()
        # Curvature of the likelihood along the two rotations; that of the first is kept from vanishing where labels
        # swap, so that an angle stays below a radian.
        gap = ((start[i] - start[j]) * (d[i] - d[j])).square() + variance.square()
        near_scale = (0.5 * variance).sqrt() * gap.pow(-0.25)
        far_scale = (0.5 * variance / ((start[i] + start[j]) * (d[i] + d[j]))).sqrt()
        log_det = near_scale.log().sum() + far_scale.log().sum() + len(near) * math.log(2)
        near, far = near * near_scale, far * far_scale
        return near + far, near - far, log_det

    def forward(self, data: Any, prior: str = "conditioned") -> None:
        """Sites U (ru, k), V (rv, k), d (k,), sigma (), shared_effects (p,) where there are any.

        Parameters
        ----------
        data
            Reduced data, as `probmodels.bayesian_svd.make_problem` prepares it for the model.
        prior
            Name of the frame prior, which the model alone needs.
        """
        if not self._ready:
            with torch.no_grad():
                self._set_up(data)
            self._ready = True
        k, num_shared = len(self.d_start), len(self.shared_start)
        num_pairs = k * (k - 1) // 2
        sizes = [num_pairs, num_pairs, k, 1, num_shared, *self.span_root.sizes]
        near, far, log_d, log_sigma, shared, x, y = self._sample_coordinates().split(sizes)

        relative = self.sigma_start / self.d_start
        d = self.d_start * (relative * log_d).exp()
        sigma = self.sigma_start * (self.log_sigma_scale * log_sigma.squeeze(0)).exp()
        angles_u, angles_v, log_det = self._angles(near, far, d, sigma)
        b_u, b_v = self.span_root(x, y)
        u, volume_u = self.space(b_u, angles_u, data.space.vectors)
        v, volume_v = self.time(b_v, angles_v, data.time.vectors)

        # The maps that U and V share are counted with U.
        log_u = -volume_u - log_det - self.span_root.log_det
        pyro.sample("U", dist.Delta(u, log_density=log_u, event_dim=2))
        pyro.sample("V", dist.Delta(v, log_density=-volume_v, event_dim=2))
        pyro.sample("d", dist.Delta(d, log_density=-(relative * d).log().sum(), event_dim=1))
        pyro.sample("sigma", dist.Delta(sigma, log_density=-(self.log_sigma_scale * sigma).log()))
        if num_shared:
            effects = self.shared_start + self.shared_root @ shared
            log_shared = -torch.linalg.slogdet(self.shared_root)[1]
            pyro.sample("shared_effects", dist.Delta(effects, log_density=log_shared, event_dim=1))
