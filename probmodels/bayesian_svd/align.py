"""Labels and signs of posterior draws, and quantities that need neither.

The decomposition is invariant under a relabelling of modes and under a joint change of sign of a pattern and its
series. Draws are comparable only once both are fixed; rotations within near-degenerate modes are *not* removed, they
are posterior uncertainty (North et al. 1982, Mon. Wea. Rev. 110).
"""

from __future__ import annotations

import numpy as np
import scipy.sparse
import xarray as xr
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

__all__ = ["ORDERS", "align_draws", "invariants"]

ORDERS = ("scale", "match", "label")

Array = NDArray[np.floating]


def align_draws(
    posterior: xr.Dataset, *, reference_space: Array, reference_time: Array, order: str = "scale"
) -> xr.Dataset:
    """Sort the modes of each draw and fix their signs.

    Parameters
    ----------
    posterior
        Variables ``U (chain, draw, basis_space, mode)``, ``V (chain, draw, basis_time, mode)``, ``d (chain, draw,
        mode)`` and any others with a dimension ``mode``.
    reference_space, reference_time
        Patterns (ru, k) and series (rv, k) to which signs, and with ``order="match"`` labels, are aligned.
    order
        "scale" sorts by d, largest first; "label" keeps the labels of the model; "match" assigns modes to the
        references by the absolute overlap of both sides.

    Returns
    -------
    xr.Dataset
        The same variables, relabelled.
    """
    site = "V" if "V" in posterior else "F"
    d = posterior["d"].transpose("chain", "draw", "mode").values
    if order == "match":
        line = "basis_time" if site == "V" else "time"
        u = posterior["U"].transpose("chain", "draw", "basis_space", "mode").values
        v = posterior[site].transpose("chain", "draw", line, "mode").values
        overlap = np.abs(np.einsum("cdrk,rj->cdkj", u, reference_space) * np.einsum("cdrk,rj->cdkj", v, reference_time))
        index = np.empty(d.shape, dtype=np.int64)
        for chain, draw in np.ndindex(d.shape[:2]):
            modes, labels = linear_sum_assignment(-overlap[chain, draw])
            index[chain, draw, labels] = modes
    elif order == "label":
        index = np.broadcast_to(np.arange(d.shape[-1]), d.shape)
    else:
        index = np.argsort(-d, axis=-1, kind="stable")
    indexer = xr.DataArray(index, dims=("chain", "draw", "mode"))
    modes_apart = posterior.drop_vars([c for c in posterior.coords if "mode" in posterior[c].dims])
    out = modes_apart.copy()
    for name, values in modes_apart.data_vars.items():
        if "mode" in values.dims:
            axes = [a for a in values.dims if a not in ("chain", "draw", "mode")]
            lined = values.transpose("chain", "draw", *axes, "mode").values
            where = indexer.values.reshape(d.shape[:2] + (1,) * len(axes) + (-1,))
            picked = np.take_along_axis(lined, np.broadcast_to(where, lined.shape), axis=-1)
            out[name] = (("chain", "draw", *axes, "mode"), picked, values.attrs)
    # The sum of both overlaps, not of their signs, which would leave a mode as drawn where pattern and series disagree.
    overlaps = np.einsum("cdrk,rk->cdk", out["U"].values, reference_space)
    overlaps = overlaps + np.einsum("cdrk,rk->cdk", out[site].values, reference_time)
    for name in ("U", site):  # copies that were made above; a product would be another, of the largest arrays there are
        np.multiply(
            out[name].values, np.where(overlaps < 0, -1.0, 1.0)[:, :, None], out=out[name].values, casting="same_kind"
        )
    return out.assign_coords({c: posterior[c] for c in posterior.coords if c not in out.coords})


def invariants(
    posterior: xr.Dataset,
    *,
    basis_space: Array,
    basis_time: Array,
    reference_space: Array,
    num_points: int = 50,
    seed: int = 0,
) -> xr.Dataset:
    """Functions of the draws that no label, sign or rotation touches.

    Parameters
    ----------
    posterior
        As in `align_draws`.
    basis_space, basis_time
        Bases (n, ru) and (m, rv).
    reference_space
        Patterns (ru, k) that span the subspace against which angles are taken.
    num_points, seed
        How many entries are followed, and the seed that picks them.

    Returns
    -------
    xr.Dataset
        ``projector_space (pair)`` and ``projector_time (pair)``: entries of UU' and VV' at random pairs; ``signal
        (pair)``: entries of U diag(d) V'; ``principal_angle (angle)`` in radians between span(U) and the reference;
        ``signal_norm``.
    """
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, len(basis_space), (num_points, 2))
    cols = rng.integers(0, basis_time.shape[0], (num_points, 2))
    u, v, d = (posterior[name].values for name in ("U", "V" if "V" in posterior else "F", "d"))

    def at(basis: Array, points: NDArray[np.int64], frame: Array) -> Array:
        if scipy.sparse.issparse(basis):  # the points themselves
            return frame[:, :, points]
        return np.einsum("pr,cdrk->cdpk", basis[points], frame, optimize=True)

    u0, u1 = at(basis_space, rows[:, 0], u), at(basis_space, rows[:, 1], u)
    v0, v1 = at(basis_time, cols[:, 0], v), at(basis_time, cols[:, 1], v)
    cosines = np.linalg.svd(np.einsum("rj,cdrk->cdjk", reference_space, u, optimize=True), compute_uv=False)
    dims = ("chain", "draw", "pair")
    return xr.Dataset(
        {
            "projector_space": (dims, (u0 * u1).sum(-1)),
            "projector_time": (dims, (v0 * v1).sum(-1)),
            "signal": (dims, (u0 * d[:, :, None, :] * v0).sum(-1)),
            "principal_angle": (("chain", "draw", "angle"), np.arccos(np.clip(cosines, -1.0, 1.0))),
            "signal_norm": (("chain", "draw"), np.sqrt((d**2).sum(-1))),
        }
    )
