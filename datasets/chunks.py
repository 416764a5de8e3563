"""Values of the cells and times that are needed: all at once, or a chunk of times after another where they are many.

In chunks a field is masked, brought to degC, made coarser and averaged to months as it is read, so that memory holds
what is left and one chunk. Fields in memory go through the same steps, with the same result. Files need no more than
the NetCDF library for that; data sets that Dask holds are computed a chunk at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr

from probmodels.datasets.calendars import frequency, month_number
from probmodels.datasets.cells import coarse_values, coarsened_axis
from probmodels.datasets.checks import SMALLER, check_fits
from probmodels.datasets.climate import (
    Scale,
    find_scale,
    first_days,
    freezing_sentence,
    frozen_values,
    full_months,
    ice_sentence,
    middles,
    refuse_infinities,
    refuse_two_scales,
)
from probmodels.datasets.gridded import (
    as_slice,
    fill_values,
    join,
    mask_fill_values,
    mask_invalid,
    present_fill_values,
)
from probmodels.datasets.selection import OnGrid, Scattered
from probmodels.errors import DataError

__all__ = ["Selection", "read_chunks", "read_whole"]

_COPIES = 5  # of the values that reading and repairing them takes
_WHOLE = 2**28  # bytes of values up to which they are read at once
_CHUNK = 2**25  # bytes of values in a chunk
_SAMPLE = 120  # times from which the scale of a field is found
_SAMPLED = 2**21  # values in them
_LOOK = 4096  # cells from which the middle of a time is found


@dataclass(frozen=True)
class Selection:
    """Cells, and the times of each part that are needed (bool arrays)."""

    parts: Sequence[xr.DataArray]
    cells: OnGrid | Scattered
    keep: Sequence[np.ndarray]

    @property
    def dates(self) -> np.ndarray:
        """All times that are needed, part after part."""
        return np.concatenate([part["time"].values[keep] for part, keep in zip(self.parts, self.keep, strict=True)])

    def is_large(self) -> bool:
        """Whether values are too many to be read at once without need."""
        return 8 * self.dates.size * self.cells.num > _WHOLE

    def times(self, chosen: np.ndarray) -> Iterator[tuple[xr.DataArray, np.ndarray, np.ndarray]]:
        """Parts, times in each, and their places among all that are needed, of those ``chosen`` (places)."""
        start = 0
        for part, keep in zip(self.parts, self.keep, strict=True):
            index = np.flatnonzero(keep)
            own = chosen[(chosen >= start) & (chosen < start + len(index))]
            if len(own):
                yield part, index[own - start], own
            start += len(index)


class _Reader:
    """Reads times of a part and masks what the file says is invalid; counts what that was."""

    def __init__(self, cells: OnGrid | Scattered) -> None:
        self._cells, self.invalid, self.valid = cells, 0, False

    def read(self, part: xr.DataArray, index: np.ndarray) -> xr.DataArray:
        """Values at some times, in memory."""
        read = self._cells.read(part.isel(time=as_slice(index)))
        valid = mask_invalid(read)
        if valid is not read:
            self.invalid += int(read.notnull().sum() - valid.notnull().sum())
        self.valid = self.valid or bool(valid.notnull().any())
        if self.invalid and not self.valid:
            self._low, self._high, self._range = float(read.min()), float(read.max()), read.attrs["valid_range"]
        return valid

    def told(self, name: object, mends: list[str]) -> None:
        """Say how many values were invalid; refuse a part where all were."""
        if self.invalid and not self.valid:
            low, high = self._range
            raise DataError(
                f"all values of '{name}', {self._low:g} to {self._high:g}, lie outside of the valid range {low:g} to "
                f"{high:g} that the file declares; if that is wrong, delete it with 'ncatted -a valid_range,{name},d,, "
                f"-a valid_min,{name},d,, -a valid_max,{name},d,, FILE'"
            )


def read_whole(selection: Selection, mends: list[str]) -> xr.DataArray:
    """Only the cells and dates that are needed, in memory."""
    cells, count = selection.cells, selection.dates.size
    check_fits(f"{count} times of {cells.shape} cells", _COPIES * 8 * count * cells.num, SMALLER)
    selected, invalid = [], 0
    for part, index, _ in selection.times(np.arange(count)):
        reader = _Reader(cells)
        selected.append(reader.read(part, index))
        reader.told(part.name, mends)
        invalid += reader.invalid
    _said_of_invalid(invalid, mends)
    return cells.labelled(join(selected))


def _said_of_invalid(count: int, mends: list[str]) -> None:
    if count:
        mends.append(f"{count} values lie outside of the valid range that the file declares; masked.")


def read_chunks(
    selection: Selection, *, daily: bool, coarsen: int, fill: Sequence[float], ice: float | None, mends: list[str]
) -> tuple[str, xr.DataArray, str]:
    """Kind, values and step of a field that is reduced as it is read.

    Parameters
    ----------
    selection
        What is read.
    daily
        Whether values more often than monthly are kept.
    coarsen
        Cells along a side of those that are averaged into one.
    fill
        Values that mean "missing".
    ice
        Temperature of sea ice, which is masked; None for none.
    mends
        Sentences on what was done.
    """
    dates = selection.dates
    order = np.argsort(dates, kind="stable")
    order = order[~_twins(selection, order, mends)]
    slots, times, step, sentence = _slots(dates, order, daily)
    plan = _Plan(selection, order, slots, times, coarsen, ice)
    known, scale = _sampled(selection, order, fill, mends)
    while True:  # once, but for a fill value that no sample held
        reduced = plan.carried_out([*known, *fill], scale)
        if sorted(reduced.fill_values) == sorted(known):
            break
        known = reduced.fill_values
    reduced.told(mends)
    mends.extend(sentence)
    mends.append(plan.sentence())
    return scale.kind, reduced.field, step


def _twins(selection: Selection, order: np.ndarray, mends: list[str]) -> np.ndarray:
    """Which times, in their order, repeat the one before; that they differ is refused."""
    dates = selection.dates[order]
    twins = np.concatenate([[False], np.diff(dates) == np.timedelta64(0, "ns")])
    if not twins.any():
        return twins
    doubled = [str(date)[:10] for date in np.unique(dates[twins])]
    listed = ", ".join(doubled[:5] + ["..."] * (len(doubled) > 5))

    def values(place: int) -> np.ndarray:
        part, index, _ = next(selection.times(order[[place]]))
        return np.asarray(selection.cells.read(part.isel(time=index)).values)

    if any(not np.array_equal(values(i), values(i - 1), equal_nan=True) for i in np.flatnonzero(twins)):
        raise DataError(
            f"dates occur twice with different values: {listed}; remove one of each, "
            "or open only files that do not overlap"
        )
    mends.append(f"{int(twins.sum())} dates occur twice with equal values ({listed}); kept once.")
    return twins


def _slots(dates: np.ndarray, order: np.ndarray, daily: bool) -> tuple[np.ndarray, np.ndarray, str, list[str]]:
    """Where each time goes, -1 where nowhere; the times that come out, their step, and what is said."""
    sorted_dates, slots = dates[order], np.full(len(dates), -1)
    step = frequency(sorted_dates)
    if step != "submonthly" or daily:
        slots[order] = np.arange(len(order))
        return slots, first_days(month_number(sorted_dates)) if step == "monthly" else sorted_dates, step, []
    months = month_number(sorted_dates)
    present, sentence = full_months(months)
    place = np.minimum(np.searchsorted(present, months), len(present) - 1)
    slots[order] = np.where(present[place] == months, place, -1)
    return slots, first_days(present), "monthly", [sentence]


def _sampled(
    selection: Selection, order: np.ndarray, fill: Sequence[float], mends: list[str]
) -> tuple[list[float], Scale]:
    """Undeclared fill values and scale of a field, from some of its times and cells."""
    chosen = np.sort(np.random.default_rng(0).choice(order, min(_SAMPLE, len(order)), replace=False))
    thin = max(1, int(np.ceil(np.sqrt(len(chosen) * selection.cells.num / _SAMPLED))))
    rows = []
    for part, index, _ in selection.times(chosen):
        for one in index:
            field = mask_invalid(selection.cells.read(part.isel(time=[one])))
            rows.append(field[(slice(None), *[slice(None, None, thin)] * (field.ndim - 1))])
    sample = join(rows)
    known = fill_values(sample)
    sample = mask_fill_values(sample, [*known, *fill], mends=[])
    refuse_infinities(sample)
    return known, find_scale(sample.astype(np.float64), mends)


@dataclass
class _Reduced:
    """What a pass over a field left."""

    field: xr.DataArray
    fill_values: list[float]
    invalid: int
    masked: int
    frozen: int
    frozen_cells: int
    ice: float | None

    def told(self, mends: list[str]) -> None:
        """Say what was masked, and what is frozen."""
        _said_of_invalid(self.invalid, mends)
        if self.masked:
            listed = ", ".join(f"{v:g}" for v in self.fill_values) or "beyond 1e15"
            mends.append(f"{self.masked} values ({listed}) are fill values that the file does not declare; masked.")
        if self.frozen:
            said = freezing_sentence(self.frozen, self.frozen_cells)
            mends.append(said if self.ice is None else ice_sentence(self.frozen, self.ice))


class _Plan:
    """A pass over a field in chunks of times."""

    def __init__(
        self,
        selection: Selection,
        order: np.ndarray,
        slots: np.ndarray,
        times: np.ndarray,
        coarsen: int,
        ice: float | None,
    ) -> None:
        self.selection, self.slots, self.times = selection, slots, times
        self.coarsen, self.ice = coarsen, ice
        self.wanted = np.sort(order[slots[order] >= 0])
        first = selection.parts[0]
        self.chunk = _chunk_length(first, selection.cells.num)
        num = selection.cells.num // coarsen**2
        self.needed = _COPIES * 8 * (len(times) * num + self.chunk * selection.cells.num)
        what = f"{len(times)} times of {num} cells, reduced from {len(self.wanted)} times of {selection.cells.shape},"
        check_fits(what, self.needed, SMALLER)

    def sentence(self) -> str:
        """What was read, and in how much memory."""
        return (
            f"{len(self.wanted)} times of {self.selection.cells.shape} cells were read in chunks of {self.chunk}, in "
            f"about {self.needed / 2**30:.1f} GiB of memory."
        )

    def carried_out(self, fill: Sequence[float], scale: Scale) -> _Reduced:
        """Masked, scaled, coarser and averaged values; what else may be fill values is looked at on the way."""
        cells, reader = self.selection.cells, _Reader(self.selection.cells)
        seen: set[float] = set()
        low, high, masked, number, middle = np.inf, -np.inf, 0, 0, []
        total = count = gone = anywhere = None
        for part, index, places in self.selection.times(self.wanted):
            for start in range(0, len(index), self.chunk):
                block = reader.read(part, index[start : start + self.chunk])
                place = self.slots[places[start : start + self.chunk]]
                found, least, most = present_fill_values(block)
                seen, low, high = seen | found, min(low, least), max(high, most)
                before = int(block.count())
                block = mask_fill_values(block, fill, mends=[])
                masked += before - int(block.count())
                refuse_infinities(block)
                middle.append(scale.unit * _middle(block))
                field = scale.applied(block.astype(np.float64))
                frozen = frozen_values(field, self.ice, scale.kind)
                number += int(frozen.sum())
                anywhere = frozen.any(axis=0) if anywhere is None else anywhere | frozen.any(axis=0)
                values = field.values
                if self.ice is not None:
                    values = np.where(frozen, np.nan, values)
                if self.coarsen > 1:
                    values, frozen = coarse_values(values, frozen, field["lat"].values, self.coarsen)
                if total is None:
                    shape = (len(self.times), *values.shape[1:])
                    total, count = np.zeros(shape), np.zeros(shape, np.uint16)
                    gone = np.zeros(shape, bool) if self.ice is not None else None
                assert count is not None
                for at, row, cold in zip(place, values, frozen, strict=True):
                    there = np.isfinite(row)
                    total[at] += np.where(there, row, 0.0)
                    count[at] += there
                    if gone is not None:
                        gone[at] |= cold
        reader.told(self.selection.parts[0].name, [])
        assert total is not None
        assert count is not None
        if scale.name:
            refuse_two_scales(np.concatenate(middle), self.selection.dates[self.wanted], str(field.name))
        np.divide(total, count, out=total, where=count > 0)
        total[count == 0] = np.nan
        coords = {"time": self.times}
        out = xr.DataArray(total, coords, field.dims, name=field.name, attrs=field.attrs)
        example = cells.labelled(field)
        if self.coarsen > 1:
            out = out.assign_coords({k: coarsened_axis(example[k].values, self.coarsen) for k in ("lat", "lon")})
        else:
            out = out.assign_coords({k: v for k, v in example.coords.items() if "time" not in v.dims})
            out.attrs |= example.attrs
        if gone is not None:
            out = out.assign_coords(ice=(field.dims, gone & (count == 0)))
        spread = max(high - low, 1.0)
        fills = sorted(v for v in seen if not low - spread <= v <= high + spread)
        return _Reduced(out, fills, reader.invalid, masked, number, int(np.sum(anywhere)), self.ice)


def _chunk_length(part: xr.DataArray, cells: int) -> int:
    """Times in a chunk: as many as fit, in whole chunks of the file or of Dask where those are not too large."""
    length = max(1, _CHUNK // (8 * cells))
    own = part.variable.encoding.get("chunksizes") or ()
    stored = int(own[0]) if len(own) == part.ndim else 1
    if part.chunks is not None:
        stored = max(part.chunks[0])
    if stored > 1 and 8 * stored * cells <= 8 * _CHUNK:
        length = stored * max(1, length // stored)
    return length


def _middle(field: xr.DataArray) -> np.ndarray:
    """Median of each time over some of the cells."""
    flat = field.values.reshape(len(field), -1)
    step = max(1, flat.shape[1] // _LOOK)
    return middles(xr.DataArray(flat[:, ::step], dims=("time", "cell")))
