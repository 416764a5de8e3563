"""Blocks of space and time that are hidden to see how well a model fills them, and a score of what it says there.

Single entries would not do. Their neighbours in space and time tell nearly all of them, so that they reward modes that
fit the noise. A block is large enough that only what is shared with the rest of the field can fill it.

Where what is hidden has to stand for gaps that are there, it takes their shapes: `hide_like_gaps` puts gaps
at other times.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from scipy import ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import KDTree

from probmodels.errors import DataError
from probmodels.options import Count

__all__ = [
    "FEW",
    "Block",
    "Extents",
    "choose_block",
    "crps_of_draws",
    "gap_extents",
    "hide_blocks",
    "hide_like_gaps",
    "hold_out_blocks",
    "share_in_larger_gaps",
]

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
Block = tuple[Count, Count, Count]

_BLOCK = (6, 3, 4)
_LEAST = 10  # blocks
_TRIES = 50  # places looked at for each block
_KEPT = 0.4  # share of the values of each cell that stays
FEW = 0.02  # share of missing values of which it is not said that their gaps are larger than the blocks
_NEIGHBOURS = 4  # of a cell that lies on no grid


class Extents(NamedTuple):
    """How large the gap is that an entry lies in (n, T), 0 where nothing is missing."""

    region: NDArray[np.int64]  # number of the connected region of cells that are missing at the same time, from 1
    cells: NDArray[np.int64]  # how many it has
    times: NDArray[np.int64]  # how many times in a row the cell is missing


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
    index = [cells[name].values for name in ("lat_index", "lon_index") if name in cells.coords]

    def drawn(rng: np.random.Generator) -> tuple[Mask, slice]:
        cell, first = int(rng.integers(n)), int(rng.integers(num_times - length + 1))
        if len(index) == 2:
            south, west = (axis[cell] - rng.integers(width) for axis, width in zip(index, block[1:], strict=True))
            inside = (index[0] >= south) & (index[0] < south + rows) & (index[1] >= west) & (index[1] < west + columns)
        else:
            inside = np.zeros(n, dtype=bool)
            inside[np.argsort(((places - places[cell]) ** 2).sum(1), kind="stable")[: rows * columns]] = True
        return inside, slice(first, first + length)

    out, count = _hidden(drawn, seen, wanted, _TRIES * (int(expected) + 1), num_effects, seed)
    if count < _LEAST:
        raise DataError(f"only {count} blocks fit into what is observed; at least {_LEAST} are needed; {advice}")
    return out


def hold_out_blocks(
    cells: xr.Dataset | xr.DataArray, seen: Mask, places: Array, share: float, block: Block | None, num_effects: int
) -> tuple[NDArray[np.int64], list[str]]:
    """Number of the block in which each entry is held out (n, T), -1 elsewhere, and what there is to say about it.

    Blocks are of the size that is given, or else like the gaps, or else of the default size where nothing is missing.
    """
    missing = ~seen
    if "ice" in cells.coords:  # frozen sea is no gap: it is not filled
        missing &= ~cells["ice"].transpose("cell", "time").values.astype(bool)
    if block is None and missing.any():
        out = hide_like_gaps(cells, seen, missing, places, share, num_effects, seed=0)
    else:
        out = hide_blocks(cells, seen, places, choose_block(cells, block), share, num_effects, seed=0)
    larger = share_in_larger_gaps(cells, missing, out >= 0, places)
    if larger <= FEW:
        return out, []
    advice = "hold out more" if block is None else "leave the size of the blocks out, and they are like the gaps"
    return out, [
        f"{larger:.0%} of the missing values lie in gaps that are larger than any of the blocks held out, so that "
        f"their intervals are not checked: {advice}"
    ]


def share_in_larger_gaps(cells: xr.Dataset | xr.DataArray, missing: Mask, hidden: Mask, places: Array) -> float:
    """Share of what is missing (n, T) in gaps of more cells or times than any block that is hidden."""
    if not missing.any():
        return 0.0
    gaps, blocks = (gap_extents(cells, mask, places) for mask in (missing, hidden))
    larger = (gaps.cells > blocks.cells.max()) | (gaps.times > blocks.times.max())
    return float(larger[missing].mean())


def hide_like_gaps(
    cells: xr.Dataset | xr.DataArray,
    seen: Mask,
    missing: Mask,
    places: Array,
    share: float,
    num_effects: int,
    seed: int,
) -> NDArray[np.int64]:
    """Number of the block in which each entry is hidden (n, T), -1 where it is not; blocks have the shapes of gaps.

    A block is the region that is missing at one time, and as long as one of its cells is missing there, at another
    time. Gaps of which fewer than ten would fit are made shorter, and of fewer cells where they still do not.

    Parameters
    ----------
    cells, seen, places, share, num_effects, seed
        As for `hide_blocks`.
    missing
        Entries of the gaps (n, T), one or more.

    Raises
    ------
    DataError
        If fewer than ten blocks can be hidden.
    """
    num_times, wanted = seen.shape[1], share * seen.sum()
    extents = gap_extents(cells, missing, places)
    gap_cells, gap_times = np.nonzero(missing)
    most = int(wanted / _LEAST)
    if not most:
        raise DataError(f"share={share} of {seen.sum()} entries are fewer than {_LEAST}; take a larger share")

    def drawn(rng: np.random.Generator) -> tuple[Mask, slice]:
        one = int(rng.integers(len(gap_cells)))
        cell, time = gap_cells[one], gap_times[one]
        inside = extents.region[:, time] == extents.region[cell, time]
        if inside.sum() > most:
            near = np.argsort(np.where(inside, ((places - places[cell]) ** 2).sum(1), np.inf), kind="stable")[:most]
            inside = np.isin(np.arange(len(seen)), near)
        length = max(min(int(extents.times[cell, time]), most // int(inside.sum()), num_times // 4), 1)
        first = int(rng.integers(num_times - length + 1))
        return inside, slice(first, first + length)

    size = float((extents.cells * np.minimum(extents.times, num_times // 4))[missing].mean())
    tries = _TRIES * (int(wanted / min(max(size, 1.0), most)) + 1)
    out, count = _hidden(drawn, seen, wanted, tries, num_effects, seed)
    if count < _LEAST:
        raise DataError(
            f"only {count} blocks like the gaps fit into what is observed; at least {_LEAST} are needed; give their "
            "size (hold_out_block) or take a larger share"
        )
    return out


def _hidden(
    drawn: Callable[[np.random.Generator], tuple[Mask, slice]],
    seen: Mask,
    wanted: float,
    tries: int,
    num_effects: int,
    seed: int,
) -> tuple[NDArray[np.int64], int]:
    """Blocks of cells and times that are drawn until enough is hidden, and their number."""
    rng = np.random.default_rng(seed)
    out = np.full(seen.shape, -1)
    left = seen.sum(axis=1)
    least = np.maximum(_KEPT * left, num_effects + 3)
    count = done = 0
    for _ in range(tries):
        if done >= wanted:
            break
        inside, times = drawn(rng)
        place = np.zeros_like(seen)
        place[inside, times] = True
        place &= seen & (out < 0)
        lost = place.sum(axis=1)
        if 2 * place.sum() < (times.stop - times.start) * inside.sum() or (left - lost < least)[lost > 0].any():
            continue
        out[place] = count
        left -= lost
        count, done = count + 1, done + int(place.sum())
    return out, count


def gap_extents(cells: xr.Dataset | xr.DataArray, missing: Mask, places: Array) -> Extents:
    """How large the gap is that each missing entry lies in, in cells at its time and in times at its cell.

    Parameters
    ----------
    cells
        Has the coordinates ``lat_index`` and ``lon_index`` where cells are on a grid: they touch at their sides.
    missing
        Entries (n, T).
    places
        Positions of the cells (n, p): on no grid the nearest four touch.
    """
    before, after = np.zeros(missing.shape, dtype=np.int64), np.zeros(missing.shape, dtype=np.int64)
    for run, order in ((before, range(missing.shape[1])), (after, reversed(range(missing.shape[1])))):
        last = np.zeros(len(missing), dtype=np.int64)
        for time in order:
            last = np.where(missing[:, time], last + 1, 0)
            run[:, time] = last
    region = _regions(cells, missing, places)
    sizes = np.bincount(region.ravel())
    sizes[0] = 0
    return Extents(region, sizes[region], np.where(missing, before + after - 1, 0))


def _regions(cells: xr.Dataset | xr.DataArray, missing: Mask, places: Array) -> NDArray[np.int64]:
    """Numbers, from 1, of the connected regions of cells that are missing at one time (n, T)."""
    if "lat_index" in cells.coords:
        rows, columns = (cells[name].values for name in ("lat_index", "lon_index"))
        if "field" in cells.coords:  # side by side, apart from each other
            columns = columns + (columns.max() + 2) * np.unique(cells["field"].values, return_inverse=True)[1]
        grid = np.zeros((missing.shape[1], rows.max() + 1, columns.max() + 1), dtype=bool)
        grid[:, rows, columns] = missing.T
        touching = np.zeros((3, 3, 3), dtype=bool)
        touching[1] = ndimage.generate_binary_structure(2, 1)
        return np.asarray(ndimage.label(grid, touching)[0][:, rows, columns].T.astype(np.int64))
    near = KDTree(places).query(places, min(_NEIGHBOURS + 1, len(places)))[1].reshape(len(places), -1)
    one, two = np.repeat(np.arange(len(places)), near.shape[1]), near.ravel()
    out, last = np.zeros(missing.shape, dtype=np.int64), 0
    for time, gone in enumerate(missing.T):
        both = gone[one] & gone[two]
        graph = coo_array((np.ones(both.sum()), (one[both], two[both])), shape=(len(places), len(places)))
        count, label = connected_components(graph, directed=False)
        out[gone, time] = last + 1 + label[gone]
        last += count
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
