"""Blocks of space and time that are hidden to see how well a model fills them, and scores of what it says there.

Single entries would not do: with neighbours correlated at .9, whoever copies a neighbour fills them best.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from probmodels.errors import DataError

__all__ = ["blocks_of_cells", "crps_of_draws", "hide_blocks"]

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]


def hide_blocks(
    seen: Mask, near: NDArray[np.int_], rng: np.random.Generator, *, times: int, share: float, least: int = 10
) -> tuple[Mask, NDArray[np.int_]]:
    """Hide blocks at random until a share of what was seen is hidden.

    Parameters
    ----------
    seen
        True where observed (n, T).
    near
        Cells of a block about each cell, itself among them (n, c).
    rng
        Places the blocks.
    times
        Length of a block along time.
    share
        Of the observed entries that are hidden, in (0, 1).
    least
        Values that each cell keeps.

    Returns
    -------
    tuple
        What is hidden (n, T), and the number of its block at each hidden entry, -1 elsewhere.

    Raises
    ------
    DataError
        If blocks are longer than the record, wider than the field, or the share is not to be had.
    """
    n, num_times = seen.shape
    if not 0 < share < 1:
        raise DataError(f"share={share}; give the share of entries to hide, above 0 and below 1")
    if times > num_times:
        raise DataError(f"blocks of {times} times are longer than the record of {num_times}; take shorter ones")
    block = np.full(seen.shape, -1)
    wanted, hidden = share * seen.sum(), 0
    for number in range(100 * int(np.ceil(wanted / (times * near.shape[1])) + 1)):
        cells, start = near[rng.integers(n)], int(rng.integers(num_times - times + 1))
        part = np.s_[cells, start : start + times]
        fresh = seen[part] & (block[part] < 0)
        left = (seen[cells] & (block[cells] < 0)).sum(1) - fresh.sum(1)
        fresh &= (left >= least)[:, None]
        block[part] = np.where(fresh, number, block[part])
        hidden += int(fresh.sum())
        if hidden >= wanted:
            return block >= 0, block
    raise DataError(
        f"blocks of {times} times and {near.shape[1]} cells cannot hide {share:.0%} of the data and leave {least} "
        "values to each cell; hide a smaller share"
    )


def blocks_of_cells(
    seen: Mask, places: Array, *, times: int, cells: int, share: float, seed: int = 0
) -> tuple[Mask, NDArray[np.int_]]:
    """Hide blocks of times in a row and nearest cells.

    Parameters
    ----------
    seen, times, share
        As for `hide_blocks`.
    places
        Positions of the cells (n, p).
    cells
        Cells of a block.
    seed
        Of the places of the blocks.
    """
    if cells >= len(places):
        raise DataError(f"blocks of {cells} cells hide all of the {len(places)} cells; take smaller ones")
    near = cKDTree(places).query(places, k=cells)[1].reshape(len(places), -1)
    return hide_blocks(seen, near, np.random.default_rng(seed), times=times, share=share)


def crps_of_draws(draws: Array, values: Array) -> Array:
    """Continuous ranked probability score (L,) of draws (S, L), the unbiased estimator of Ferro (2014)."""
    count = len(draws)
    order = np.arange(1, count + 1)[:, None]
    spread = ((2 * order - count - 1) * np.sort(draws, axis=0)).sum(0) * 2 / (count * (count - 1))
    return np.abs(draws - values).mean(0) - 0.5 * spread
