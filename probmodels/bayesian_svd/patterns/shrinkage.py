"""Sizes of modes that may be of any order of magnitude, so that a mode that the data do not ask for can vanish.

A half-normal prior whose scale is that of the data has no room for a mode of next to no variance: of more modes than
there are, all come out with some. Here the scale of each mode is one of a grid, even in its logarithm, from a tenth of
the noise to the size of the data. The size is then nearly log-uniform in between, and half-normal below. Given the size
the scale has a discrete distribution, from which the sampler draws it.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray

from probmodels.bayesian_svd.model import MatrixData

__all__ = ["draw_scales", "with_shrinkage"]

Array = NDArray[np.float64]

_LEAST = 0.1  # of the noise of one direction, well below what counts as a mode
_NUM_SCALES = 24


def with_shrinkage(data: MatrixData, noise_prior: tuple[float, float] | None) -> MatrixData:
    """The same with a grid of scales for the sizes of the modes.

    Parameters
    ----------
    data
        Reduced data, in coordinates where noise is white.
    noise_prior
        Shape and rate of the prior of the noise variance where they were given: their ratio then says how large the
        noise is, so that the prior depends on no data. Else what the leading axes of the data leave does.
    """
    total = float(data.z.square().sum() + data.rest)
    if noise_prior is None:
        rank = data.space.log_weights.shape[0]
        leading = float(torch.linalg.svdvals(data.z)[:rank].square().sum())
        variance = max(total - leading, 1e-12 * total) / float(data.num_free)
    else:
        variance = noise_prior[1] / noise_prior[0]
    largest = float(data.scale)
    least = min(_LEAST * math.sqrt(variance), 0.5 * largest)
    return data._replace(sizes=torch.as_tensor(np.geomspace(least, largest, _NUM_SCALES)))


def draw_scales(rng: np.random.Generator, d: Array, data: MatrixData) -> Array:
    """Scale of the half-normal prior of each size (k,), drawn given the sizes where the prior is a mixture of them."""
    if data.sizes is None:
        return np.full(len(d), float(data.scale))
    scales = data.sizes.numpy()
    scores = -np.log(scales) - 0.5 * (d[:, None] / scales) ** 2
    chosen = np.argmax(scores + rng.gumbel(size=scores.shape), axis=1)
    return scales[chosen]
