"""Points in groups of groups: super-clusters, each a ring of clusters of the same shape.

References
----------
Hu, E. J., Malkin, N., Jain, M., Everett, K., Graikos, A. and Bengio, Y. (2023). GFlowNet-EM for learning compositional
latent variable models. ICML. https://arxiv.org/abs/2302.06576
"""

from __future__ import annotations

import math
from typing import Annotated

import numpy as np
import xarray as xr
from annotated_types import Interval
from numpy.typing import NDArray

from probmodels.errors import DataError
from probmodels.options import Positive, Seed, checked

__all__ = ["petal_offsets", "simulate_petals"]

_Rows = Annotated[int, Interval(ge=1, le=10_000_000)]
_Parts = Annotated[int, Interval(ge=1, le=10_000)]


@checked(DataError)
def petal_offsets(num_petals: _Parts, radius: Positive = 1.0) -> NDArray[np.float64]:
    """Offsets (petal, axis) of the petals of a flower: radius times cosine and sine of (j + 1/2) 2 pi / J."""
    angle = (np.arange(num_petals) + 0.5) * 2 * math.pi / num_petals
    return radius * np.stack([np.cos(angle), np.sin(angle)], -1)


@checked(DataError)
def simulate_petals(
    num_rows: _Rows = 4000,
    *,
    num_clusters: _Parts = 4,
    num_petals: _Parts = 4,
    distance: Positive = 2.0,
    radius: Positive = 1.0,
    sigma: Positive = 0.25,
    seed: Seed = 0,
) -> xr.Dataset:
    """Points in the plane around the petals of flowers, which stand on a circle.

    With the defaults all sixteen petals lie on a square grid.

    Parameters
    ----------
    num_rows
        Number of points.
    num_clusters, num_petals
        Number of flowers, and of petals of each; all are equally likely.
    distance
        Distance of the centre of a flower from the origin.
    radius
        Distance of a petal from the centre of its flower.
    sigma
        Standard deviation of points around their petal, along each axis.
    seed
        Seed of the points.

    Returns
    -------
    xr.Dataset
        ``x`` (data, axis); ``true_cluster`` and ``true_petal`` (data,); ``true_mean`` (true_super_cluster, axis).

    Raises
    ------
    DataError
        If a number is out of range.
    """
    rng = np.random.default_rng(seed)
    means = petal_offsets(num_clusters, distance)
    cluster, petal = rng.integers(num_clusters, size=num_rows), rng.integers(num_petals, size=num_rows)
    middle = means[cluster] + petal_offsets(num_petals, radius)[petal]
    x = middle + sigma * rng.standard_normal((num_rows, 2))
    return xr.Dataset(
        {
            "x": (("data", "axis"), x),
            "true_cluster": ("data", cluster),
            "true_petal": ("data", petal),
            "true_mean": (("true_super_cluster", "axis"), means),
        },
        coords={"data": np.arange(num_rows), "axis": ["x", "y"]},
        attrs={"name": "petals", "source": f"simulate_petals, seed {seed}"},
    )
