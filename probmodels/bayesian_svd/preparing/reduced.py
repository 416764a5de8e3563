"""Sufficient statistics of a weighted matrix on the bases of its sides, and the modes by which draws are aligned."""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from torch import Tensor

from probmodels.bayesian_svd.augment import basis_of
from probmodels.bayesian_svd.model import Gaps, MatrixData, SeriesData, SideData
from probmodels.errors import DataError

__all__ = ["filled_by_effects", "reduced", "reference_modes"]


def filled_by_effects(values: Tensor, mask: Tensor, design: Tensor) -> Tensor:
    """Data (n, m) with each gap filled by its cell's least-squares effects."""
    if bool(mask.all()):
        return values
    gram = torch.einsum("nt,tq,ts->nqs", mask.to(values.dtype), design, design)
    effects = torch.linalg.solve(gram, (values @ design).unsqueeze(-1)).squeeze(-1)
    return torch.where(mask, values, effects @ design.T)


def reduced(
    values: Tensor,
    filled: Tensor,
    mask: Tensor,
    space: SideData,
    time: SideData,
    design: Tensor,
    design_root: Tensor,
    weight: Tensor,
    common: Tensor,
    effect_scale: float | None,
    scale: float | None,
    noise_prior: tuple[float, float] | None,
    series: SeriesData | None,
) -> MatrixData:
    """Project weighted data (n, m), zeros in the gaps and filled, and shared covariates on the bases."""
    flat = effect_scale is None
    n = len(values)
    shared_full = torch.einsum("n,mp->pnm", weight.sqrt(), common)

    def centred(x: Tensor) -> Tensor:
        return x - (x @ design) @ design.T if flat else x

    def inside(x: Tensor) -> Tensor:
        return space.basis.T @ (x @ time.basis if len(time.basis) else centred(x))

    centre, shared_centre = centred(filled), centred(shared_full)
    z, shared = inside(filled), inside(shared_full)
    free = int(mask.sum()) - (n * design.shape[1] if flat else 0)
    norm = float(centre.square().sum())
    variation = float((filled - (filled @ design) @ design.T).square().sum())
    if variation == 0:
        raise DataError("nothing is left of the data after the fixed effects; drop effects or check the data")
    shape, rate = noise_prior if noise_prior is not None else (0.5, 0.5e-3 * variation / free)
    gaps = None if bool(mask.all()) else Gaps(values, mask, shared_full)
    number = functools.partial(torch.tensor, dtype=torch.float64)
    shared_scale = effect_scale or 1e3 * math.sqrt(variation / free)
    return MatrixData(
        z=z,
        rest=number(max(norm - float(z.square().sum()), 0.0)),
        num_free=number(free),
        space=space,
        time=time,
        scale=number(scale if scale is not None else math.sqrt(norm / (1 if series is None else values.shape[1]))),
        noise_shape=number(shape),
        noise_rate=number(rate),
        design=design,
        design_root=design_root,
        effect_precision=number(0.0 if effect_scale is None else effect_scale**-2),
        z_design=filled @ design,
        weight=weight,
        shared=shared,
        shared_cross=torch.einsum("pnm,nm->p", shared_centre, centre) - torch.einsum("pij,ij->p", shared, z),
        shared_gram=torch.einsum("pnm,qnm->pq", shared_centre, shared_centre)
        - torch.einsum("pij,qij->pq", shared, shared),
        shared_design=shared_full @ design,
        shared_precision=number(shared_scale**-2),
        gaps=gaps,
        series=series,
    )


def reference_modes(data: MatrixData, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Leading singular vectors of the reduced data less local effects, (ru, k), (rv, k); patterns of positive sum."""
    along = basis_of(data.time).T @ data.design.numpy()  # zero where the basis avoids the effects
    z = data.z.numpy()
    u, _, vt = np.linalg.svd(z - (z @ along) @ along.T, full_matrices=False)
    u, v = u[:, :rank], vt[:rank].T
    sign = np.where((data.space.basis.numpy() @ u).sum(0) < 0, -1.0, 1.0)
    return u * sign, v * sign
