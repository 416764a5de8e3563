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
from probmodels.datasets.cells import coarse_values, coarsened, coarsened_axis
from probmodels.datasets.checks import SMALLER, check_fits, free_memory
from probmodels.datasets.climate import (
    Scale,
    find_scale,
    first_days,
    freezing_sentence,
    frozen_values,
    full_months,
    ice_sentence,
    in_celsius,
    mask_ice,
    middles,
    monthly_values,
    refuse_infinities,
    refuse_two_scales,
    unique_times,
)
from probmodels.datasets.gridded import (
    as_slice,
    fill_values,
    join,
    mask_fill_values,
    mask_invalid,
    present_fill_values,
)
from probmodels.datasets.reading.selection import OnGrid, Scattered
from probmodels.errors import DataError

__all__ = ["Selection", "read_field"]

_COPIES = 5  # of the values that reading and repairing them takes
_KEPT = 4  # of reduced values, until they are a matrix
_WHOLE = 2**28  # bytes of values up to which they are read at once
_CHUNK = 2**24  # bytes of values in a chunk
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

    def told(self, name: object) -> None:
        """Refuse what holds nothing but invalid values."""
        if self.invalid and not self.valid:
            low, high = self._range
            raise DataError(
                f"all values of '{name}', {self._low:g} to {self._high:g}, lie outside of the valid range {low:g} to "
                f"{high:g} that the file declares; if that is wrong, delete it with 'ncatted -a valid_range,{name},d,, "
                f"-a valid_min,{name},d,, -a valid_max,{name},d,, FILE'"
            )


def read_field(
    selection: Selection, *, daily: bool, coarsen: int, fill: Sequence[float], ice: float | None, mends: list[str]
) -> tuple[str, xr.DataArray, str]:
    """Kind ("anomaly" or "absolute"), values and step of a field: masked, in degC, coarser, and averaged to months.

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
    often = frequency(np.sort(selection.dates)) == "submonthly"
    if selection.is_large() and ((often and not daily) or coarsen > 1):
        return _in_chunks(selection, daily, coarsen, fill, ice, mends)
    field = _whole(selection, mends)
    field = mask_fill_values(field, [*fill_values(field), *fill], mends=mends)
    refuse_infinities(field)
    kind, field = in_celsius(field.astype(np.float64), mends)
    field = unique_times(mask_ice(field, ice, kind, mends), mends)
    field = coarsened(field, coarsen) if coarsen > 1 else field
    return kind, *monthly_values(field, mends, keep=daily)


def _whole(selection: Selection, mends: list[str]) -> xr.DataArray:
    """Only the cells and dates that are needed, in memory."""
    cells, count = selection.cells, selection.dates.size
    check_fits(f"{count} times of {cells.shape} cells", _COPIES * 8 * count * cells.num, SMALLER)
    selected, invalid = [], 0
    for part, index, _ in selection.times(np.arange(count)):
        reader = _Reader(cells)
        selected.append(reader.read(part, index))
        reader.told(part.name)
        invalid += reader.invalid
    _said_of_invalid(invalid, mends)
    return cells.labelled(join(selected))


def _said_of_invalid(count: int, mends: list[str]) -> None:
    if count:
        mends.append(f"{count} values lie outside of the valid range that the file declares; masked.")


def _in_chunks(
    selection: Selection, daily: bool, coarsen: int, fill: Sequence[float], ice: float | None, mends: list[str]
) -> tuple[str, xr.DataArray, str]:
    """The same of a field that is reduced as it is read."""
    dates = selection.dates
    order = np.argsort(dates, kind="stable")
    order = order[~_twins(selection, order, mends)]
    slots, times, step, sentence = _slots(dates, order, daily)
    plan = _Plan(selection, order, slots, times, coarsen, ice)
    known, scale = _sampled(selection, order, fill, mends)
    while True:  # once, but for a fill value that no sample held
        reduced = plan.carried_out([*known, *fill], scale)
        if (found := reduced.facts.fill_values) == sorted(known):
            break
        known = found
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

    if any(not np.array_equal(values(i), values(i - 1), equal_nan=True) for i in np.flatnonzero(twins).tolist()):
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


@dataclass(frozen=True)
class _Reduced:
    """What a pass over a field left."""

    field: xr.DataArray
    facts: _Facts
    invalid: int
    ice: float | None

    def told(self, mends: list[str]) -> None:
        """Say what was masked, and what is frozen."""
        _said_of_invalid(self.invalid, mends)
        if self.facts.num_masked:
            listed = ", ".join(f"{v:g}" for v in self.facts.fill_values) or "beyond 1e15"
            mends.append(
                f"{self.facts.num_masked} values ({listed}) are fill values that the file does not declare; masked."
            )
        if self.facts.num_frozen and self.ice is None:
            mends.append(freezing_sentence(self.facts.num_frozen, self.facts.frozen_cells))
        elif self.facts.num_frozen and self.ice is not None:
            mends.append(ice_sentence(self.facts.num_frozen, self.ice))


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
        self.needed = 8 * (_KEPT * len(times) * num + _COPIES * self.chunk * selection.cells.num)
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
        cells, reader, facts = self.selection.cells, _Reader(self.selection.cells), _Facts(scale)
        sums: _Sums | None = None
        for part, index, places in self.selection.times(self.wanted):
            for start in range(0, len(index), self.chunk):
                block = facts.masked(reader.read(part, index[start : start + self.chunk]), fill)
                field, frozen = facts.scaled(block, self.ice)
                values = field.values if self.ice is None else np.where(frozen, np.nan, field.values)
                if self.coarsen > 1:
                    values, frozen = coarse_values(values, frozen, field["lat"].values, self.coarsen)
                sums = sums or _Sums((len(self.times), *values.shape[1:]))
                sums.add(self.slots[places[start : start + self.chunk]], values, frozen)
        reader.told(field.name)
        facts.refuse_two_scales(self.selection.dates[self.wanted], str(field.name))
        assert sums is not None
        return _Reduced(self._labelled(sums, field, cells.labelled(field)), facts, reader.invalid, self.ice)

    def _labelled(self, sums: _Sums, field: xr.DataArray, example: xr.DataArray) -> xr.DataArray:
        """What was added up as a field; ``example`` is a chunk with its places."""
        out = xr.DataArray(sums.means(), {"time": self.times}, field.dims, name=field.name, attrs=field.attrs)
        if self.coarsen > 1:
            out = out.assign_coords({k: coarsened_axis(example[k].values, self.coarsen) for k in ("lat", "lon")})
        else:
            out = out.assign_coords({k: v for k, v in example.coords.items() if "time" not in v.dims})
            out.attrs |= example.attrs
        return out if self.ice is None else out.assign_coords(ice=(field.dims, sums.frozen & (sums.count == 0)))


class _Sums:
    """Sums of values over the times that become one, their number, and whether any was frozen."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.total, self.count = np.zeros(shape), np.zeros(shape, np.uint16)
        self.frozen = np.zeros(shape, bool)

    def add(self, places: np.ndarray, values: np.ndarray, frozen: np.ndarray) -> None:
        """Add times one after another, as a sum in memory does, so that it is the same to the last bit."""
        for place, row, cold in zip(places, values, frozen, strict=True):
            there = np.isfinite(row)
            self.total[place] += np.where(there, row, 0.0)
            self.count[place] += there
            self.frozen[place] |= cold

    def means(self) -> np.ndarray:
        """Means, NaN where there is no value; the sums are used up."""
        np.divide(self.total, self.count, out=self.total, where=self.count > 0)
        self.total[self.count == 0] = np.nan
        return self.total


class _Facts:
    """Masks chunks and brings them to degC; remembers what has to be judged over all of them."""

    def __init__(self, scale: Scale) -> None:
        self._scale, self._middle = scale, list[np.ndarray]()
        self._seen, self._low, self._high = set[float](), np.inf, -np.inf
        self.num_masked, self.num_frozen, self._cells = 0, 0, np.zeros(1, dtype=bool)

    def masked(self, block: xr.DataArray, fill: Sequence[float]) -> xr.DataArray:
        """Without fill values; infinite ones are refused."""
        found, low, high = present_fill_values(block)
        self._seen, self._low, self._high = self._seen | found, min(self._low, low), max(self._high, high)
        before = int(block.count())
        block = mask_fill_values(block, fill, mends=[])
        self.num_masked += before - int(block.count())
        refuse_infinities(block)
        return block

    def scaled(self, block: xr.DataArray, ice: float | None) -> tuple[xr.DataArray, np.ndarray]:
        """In degC, and which values are frozen."""
        self._middle.append(self._scale.unit * _middle(block))
        field = self._scale.applied(block.astype(np.float64))
        frozen = frozen_values(field, ice, self._scale.kind)
        self.num_frozen += int(frozen.sum())
        self._cells = self._cells | frozen.any(axis=0)
        return field, frozen

    @property
    def frozen_cells(self) -> int:
        """Cells that are frozen at any time."""
        return int(self._cells.sum())

    @property
    def fill_values(self) -> list[float]:
        """Well-known fill values among all values."""
        spread = max(self._high - self._low, 1.0)
        return sorted(v for v in self._seen if not self._low - spread <= v <= self._high + spread)

    def refuse_two_scales(self, times: np.ndarray, name: str) -> None:
        """Refuse a field that is in kelvin at some times only."""
        if self._scale.name:
            refuse_two_scales(np.concatenate(self._middle), times, name)


def _chunk_length(part: xr.DataArray, cells: int) -> int:
    """Times in a chunk: as many as fit, in whole chunks of the file or of Dask, which are unpacked as a whole.

    Where those take more than half the memory that is free, they are unpacked again and again.
    """
    length = max(1, _CHUNK // (8 * cells))
    stored = int(part.encoding.get("preferred_chunks", {}).get("time", 1))
    if part.chunks is not None:
        stored = max(part.variable.chunksizes["time"])
    if stored <= length:
        return stored * (length // stored)
    free = free_memory()
    return length if free is not None and 8 * _COPIES * stored * cells > free / 2 else stored


def _middle(field: xr.DataArray) -> np.ndarray:
    """Median of each time over some of the cells."""
    flat = field.values.reshape(len(field), -1)
    step = max(1, flat.shape[1] // _LOOK)
    return middles(xr.DataArray(flat[:, ::step], dims=("time", "cell")))
