"""Rotated modes: varimax and promax in every draw, labels and signs as in one reference.

Rotation looks for *simple* patterns, each large in one region and small elsewhere, in the space that the modes span. It
maximises the varimax criterion of the loadings, which are patterns in data units; cells count by their area:

    sum over modes of  mean_w(l^4) - mean_w(l^2)^2 .

Varimax keeps the series uncorrelated and gives up that patterns are orthogonal; promax lets the series correlate too.

References
----------
Kaiser, H. F. (1958). The varimax criterion for analytic rotation in factor analysis. Psychometrika 23, 187-200.
Hendrickson, A. E. and White, P. O. (1964). Promax. Brit. J. Statist. Psychol. 17, 65-70.
Richman, M. B. (1986). Rotation of principal components. J. Climatology 6, 293-335.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from scipy.optimize import linear_sum_assignment

from probmodels.bayesian_svd.draws import Draws, expand
from probmodels.bayesian_svd.patterns.planes import main_axes
from probmodels.errors import SummaryError

__all__ = ["ROTATIONS", "rotate", "rotate_draws"]

ROTATIONS = ("varimax", "promax")

_POWER = 4  # of promax's target
_STEPS, _TOLERANCE = 500, 1e-10
_STARTS = 20  # of the reference
_BLOCK = 4_000_000  # doubles of loadings at a time: 32 MB


def rotate(loadings: np.ndarray, weight: np.ndarray, start: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Varimax from a start.

    Parameters
    ----------
    loadings
        Patterns in data units (draw, cell, mode).
    weight
        Area weight of each cell (cell,).
    start
        Orthogonal matrices (draw, mode, mode).

    Returns
    -------
    tuple
        Orthogonal matrices that the loadings are to be multiplied by, (draw, mode, mode), and the criterion (draw,).
    """
    share = (weight / weight.sum())[:, None]
    turn, active = start.copy(), np.arange(len(loadings))
    weighted = share * loadings
    last = np.full(len(loadings), -np.inf)
    for _ in range(_STEPS):
        at = loadings[active] @ turn[active]
        gradient = weighted[active].transpose(0, 2, 1) @ (at * (at**2 - (share * at**2).sum(1, keepdims=True)))
        left, size, right = np.linalg.svd(gradient)
        turn[active] = left @ right
        total = size.sum(1)
        moving = total > last[active] * (1 + _TOLERANCE)
        last[active] = total
        active = active[moving]
        if not len(active):
            break
    at = loadings @ turn
    square = (share * at**2).sum(1)
    return turn, ((share * at**4).sum(1) - square**2).sum(1)


def _obliquely(loadings: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Promax from varimax loadings (draw, cell, mode): what they are to be multiplied by (draw, mode, mode)."""
    target = loadings * np.abs(loadings) ** (_POWER - 1)
    left = (weight[:, None] * loadings).transpose(0, 2, 1)
    turn = np.linalg.solve(left @ loadings, left @ target)
    turn = turn / np.linalg.norm(turn, axis=1, keepdims=True)  # only directions matter, powers may underflow
    inverse = np.linalg.inv(turn.transpose(0, 2, 1) @ turn)
    return np.asarray(turn * np.sqrt(np.einsum("sii->si", inverse))[:, None, :])


def rotate_draws(draws: Draws, method: str) -> tuple[Draws, np.ndarray]:
    """Rotate the modes of every draw.

    The reference is the rotation of the mean covariance of the signal, the best of several starts; its modes are sorted
    by variance. A draw is rotated from the reference and from its own modes, whichever ends higher, and takes labels
    and signs from the reference.

    Parameters
    ----------
    draws
        From `probmodels.bayesian_svd.draws.read_draws`.
    method
        One of `ROTATIONS`.

    Returns
    -------
    tuple
        Draws with unit patterns that are not orthogonal to each other, ``d`` the standard deviation that a mode adds to
        the weighted field, series of unit variance, and ``turn`` as they are made of the processes; and the correlation
        of the series (draw, mode, mode), the identity for varimax.

    Raises
    ------
    SummaryError
        If there is only one mode.
    """
    num_draws, num_modes = draws.d.shape
    if num_modes < 2:
        raise SummaryError(f"rotation={method!r} of one mode; rotation needs two modes or more")
    draws, spread = draws.orthonormal(), draws.spread()[1]
    scale = draws.d * spread
    basis = draws.basis_space / np.sqrt(draws.weight)[:, None]
    reference = _reference(draws, scale, basis)
    if method == "promax":
        reference = reference @ _obliquely(reference[None], draws.weight)[0]
    turns, mixings = np.empty((2, num_draws, num_modes, num_modes))
    for block in _draw_blocks(num_draws, len(basis) * num_modes):
        loadings = expand(basis, draws.space[:, block]) * scale[block][:, None, :]
        turn = _varimax(loadings, draws.weight, reference)
        mixing = turn
        if method == "promax":
            oblique = _obliquely(loadings @ turn, draws.weight)
            turn, mixing = turn @ oblique, turn @ np.linalg.inv(oblique).transpose(0, 2, 1)
        order, sign = _labels(loadings @ turn, draws.weight, reference)
        for kept, matrix in ((turns, turn), (mixings, mixing)):
            kept[block] = np.take_along_axis(matrix, order[:, None, :], axis=2) * sign[:, None, :]
    space = np.einsum("rsj,sjk->rsk", draws.space, scale[:, :, None] * turns, optimize=True)
    length = np.linalg.norm(scale[:, :, None] * turns, axis=1)
    rotated = replace(
        draws,
        space=space / length,
        time=np.einsum("tsj,sjk->tsk", draws.time, mixings / spread[:, :, None], optimize=True),
        d=length,
        turn=mixings if draws.turn is None else draws.turn @ mixings,
    )
    return rotated, mixings.transpose(0, 2, 1) @ mixings


def _draw_blocks(num_draws: int, size: int) -> Iterator[slice]:
    step = max(1, _BLOCK // size)
    for start in range(0, num_draws, step):
        yield slice(start, start + step)


def _reference(draws: Draws, scale: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """Varimax loadings (cell, mode) of the leading directions of the mean covariance of the signal."""
    num_modes = scale.shape[1]
    frames = draws.space * scale
    axes = main_axes(frames, num_modes)
    along = np.tensordot(axes.T, frames, 1)  # (axis, draw, mode)
    values, vectors = np.linalg.eigh(np.einsum("asi,bsi->ab", along, along) / len(scale))
    loadings = basis @ (axes @ (vectors * np.sqrt(np.maximum(values, 0.0))))
    rng = np.random.default_rng(0)
    starts = np.linalg.qr(rng.standard_normal((_STARTS, num_modes, num_modes)))[0]
    starts[0] = np.eye(num_modes)
    turns, criteria = rotate(np.broadcast_to(loadings, (_STARTS, *loadings.shape)), draws.weight, starts)
    rotated = loadings @ turns[criteria.argmax()]
    rotated = rotated * np.where(draws.weight @ rotated < 0, -1.0, 1.0)
    return np.asarray(rotated[:, np.argsort(-(draws.weight @ rotated**2))])


def _varimax(loadings: np.ndarray, weight: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """The better of two rotations of each draw: from the one nearest to the reference, and from its own modes."""
    left, _, right = np.linalg.svd(loadings.transpose(0, 2, 1) @ (weight[:, None] * reference))
    near, high = rotate(loadings, weight, left @ right)
    own, other = rotate(loadings, weight, np.broadcast_to(np.eye(loadings.shape[2]), near.shape))
    return np.where((other > high * (1 + 1e-6))[:, None, None], own, near)


def _labels(rotated: np.ndarray, weight: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places of the modes of each draw (draw, mode) in the order of the reference, and their signs."""
    overlap = (weight[:, None] * rotated).transpose(0, 2, 1) @ reference  # (draw, mode, reference mode)
    overlap = overlap / np.sqrt(weight @ rotated**2)[:, :, None]
    order = np.stack([linear_sum_assignment(-np.abs(one.T))[1] for one in overlap])
    chosen = np.take_along_axis(overlap.transpose(0, 2, 1), order[:, :, None], axis=2)[:, :, 0]
    return order, np.where(chosen < 0, -1.0, 1.0)
