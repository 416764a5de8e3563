"""Points in groups of groups: super-clusters, each a ring of clusters of the same shape.

References
----------
Hu, E. J., Malkin, N., Jain, M., Everett, K., Graikos, A. and Bengio, Y. (2023). GFlowNet-EM for learning compositional
latent variable models. ICML. https://arxiv.org/abs/2302.06576
"""

from __future__ import annotations

import math

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from probmodels.options import check_counts, check_numbers

__all__ = ["petal_offsets", "simulate_petals"]


def petal_offsets(num_petals: int, radius: float = 1.0) -> NDArray[np.float64]:
    """Offsets (petal, axis) of the petals of a flower: radius times cosine and sine of (j + 1/2) 2 pi / J."""
    angle = (np.arange(num_petals) + 0.5) * 2 * math.pi / num_petals
    return radius * np.stack([np.cos(angle), np.sin(angle)], -1)


def simulate_petals(
    num_rows: int = 4000,
    *,
    num_clusters: int = 4,
    num_petals: int = 4,
    distance: float = 2.0,
    radius: float = 1.0,
    sigma: float = 0.25,
    seed: int = 0,
) -> xr.Dataset:
    """Points in the plane around the petals of flowers, which stand on a circle.

    With the defaults all sixteen petals lie on a square grid.

    Parameters
    ----------
    num_rows
        Number of points.
    num_clusters, num_petals
        Flowers, and petals of each; all are equally likely.
    distance
        Of the centre of a flower from the origin.
    radius
        Of a petal from the centre of its flower.
    sigma
        Standard deviation of points around their petal, along each axis.
    seed
        Of the points.

    Returns
    -------
    xr.Dataset
        ``x`` (data, axis); ``true_cluster`` and ``true_petal`` (data,); ``true_mean`` (true_super_cluster, axis).

    Raises
    ------
    DataError
        If a number is out of range.
    """
    check_counts(1, num_rows=num_rows, num_clusters=num_clusters, num_petals=num_petals)
    check_numbers(0, ends="()", distance=distance, radius=radius, sigma=sigma)
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
