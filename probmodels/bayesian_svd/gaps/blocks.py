"""Blocks of space and time that are hidden to see how well a model fills them, and a score of what it says there.

Single entries would not do. Their neighbours in space and time tell nearly all of them, so that they reward modes that
fit the noise. A block is large enough that only what is shared with the rest of the field can fill it.
"""

from __future__ import annotations

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from probmodels.errors import DataError
from probmodels.options import Count

__all__ = ["Block", "choose_block", "crps_of_draws", "hide_blocks"]

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
Block = tuple[Count, Count, Count]

_BLOCK = (6, 3, 4)
_LEAST = 10  # blocks
_TRIES = 50  # places looked at for each block
_KEPT = 0.4  # share of the values of each cell that stays


def hide_blocks(
    cells: xr.Dataset | xr.DataArray, seen: Mask, places: Array, block: Block, share: float, num_effects: int, seed: int
) -> NDArray[np.int64]:
    """Number of the block in which each entry is hidden (n, T), -1 where it is not.

    Parameters
    ----------
    cells
        Has the coordinates ``lat_index`` and ``lon_index`` where cells are on a grid.
    seen
        True where observed (n, T).
    places
        Positions of the cells (n, p): where they are on no grid, a block holds nearest ones.
    block
        Times, and cells along latitude and longitude.
    share
        Of the observed entries to hide.
    num_effects
        Effects of each cell, for which enough values stay.
    seed
        Of the places.

    Raises
    ------
    DataError
        If fewer than ten blocks can be hidden.
    """
    (n, num_times), (length, rows, columns) = seen.shape, block
    wanted = share * seen.sum()
    advice = "take a smaller block or a larger share"
    if (expected := wanted / (length * min(rows * columns, n))) < _LEAST:
        raise DataError(
            f"share={share} of {seen.sum()} entries are {expected:.1f} blocks of {length} x {rows} x {columns}; at "
            f"least {_LEAST} are needed to judge by; {advice}"
        )
    rng = np.random.default_rng(seed)
    index = [cells[name].values for name in ("lat_index", "lon_index") if name in cells.coords]
    out = np.full(seen.shape, -1)
    left = seen.sum(axis=1)
    least = np.maximum(_KEPT * left, num_effects + 3)
    count = done = 0
    for _ in range(_TRIES * (int(expected) + 1)):
        if done >= wanted:
            break
        cell, first = int(rng.integers(n)), int(rng.integers(num_times - length + 1))
        if len(index) == 2:
            south, west = (axis[cell] - rng.integers(width) for axis, width in zip(index, block[1:], strict=True))
            inside = (index[0] >= south) & (index[0] < south + rows) & (index[1] >= west) & (index[1] < west + columns)
        else:
            inside = np.zeros(n, dtype=bool)
            inside[np.argsort(((places - places[cell]) ** 2).sum(1), kind="stable")[: rows * columns]] = True
        place = np.zeros_like(seen)
        place[inside, first : first + length] = True
        place &= seen & (out < 0)
        lost = place.sum(axis=1)
        if 2 * place.sum() < length * inside.sum() or (left - lost < least)[lost > 0].any():
            continue
        out[place] = count
        left -= lost
        count, done = count + 1, done + int(place.sum())
    if count < _LEAST:
        raise DataError(f"only {count} blocks fit into what is observed; at least {_LEAST} are needed; {advice}")
    return out


def choose_block(cells: xr.Dataset | xr.DataArray, block: Block | None) -> Block:
    """The block as given, checked, or one of 6 times x 3 x 4 cells or less where the data (cell, time) are small."""
    num_cells, num_times = (cells.sizes[name] for name in ("cell", "time"))
    if "lat_index" in cells.coords:
        axes = [len(np.unique(cells[name].values)) for name in ("lat_index", "lon_index")]
    else:
        axes = [max(int(np.sqrt(num_cells)), 1)] * 2
    if block is None:
        times = max(min(_BLOCK[0], num_times // 10), 1)
        return (times, max(min(_BLOCK[1], axes[0] // 4), 1), max(min(_BLOCK[2], axes[1] // 4), 1))
    names = ("times", "cells along latitude", "cells along longitude")
    for name, own, most in zip(names, block, (num_times, *axes), strict=True):
        if own > max(most // 2, 1):
            raise DataError(
                f"block={tuple(block)} is too large: the data have {most} {name}, of which a block may "
                f"have {max(most // 2, 1)}; take a smaller block"
            )
    return block


def crps_of_draws(draws: Array, values: Array) -> Array:
    """Continuous ranked probability score (L,) of draws (S, L), the unbiased estimator of Ferro (2014)."""
    count = len(draws)
    order = np.arange(1, count + 1)[:, None]
    spread = ((2 * order - count - 1) * np.sort(draws, axis=0)).sum(0) * 2 / (count * (count - 1))
    return np.abs(draws - values).mean(0) - 0.5 * spread
