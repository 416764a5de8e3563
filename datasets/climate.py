"""Steps from a raw field to what is analysed: units, plausible values, months, anomalies, seasons, the period.

Every step takes a field in memory with dims (time, lat, lon) or (time, cell), and appends to ``mends`` a sentence on
each change that the caller did not ask for.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr

from probmodels.datasets.calendars import Period, Season, as_dates, frequency, month_number, span_of, year_month
from probmodels.datasets.units import Temperature, read_temperature
from probmodels.errors import DataError

__all__ = [
    "Scale",
    "find_scale",
    "first_days",
    "freezing_sentence",
    "frozen_values",
    "full_months",
    "ice_sentence",
    "in_celsius",
    "mask_ice",
    "middles",
    "monthly_values",
    "refuse_infinities",
    "refuse_two_scales",
    "remove_climatology",
    "removed_cycle",
    "season_means",
    "unique_times",
    "within_period",
]

MIN_TIME_STEPS = 10
_TEMPERATURE = r"temperature$|\b(sst|ssta|tos|tas|ts|temp|thetao)\b"
_OTHER_UNITS = r".*[\s/*^\d%].*|none|unitless|dimensionless|fraction|[cmk]?m|h?pa|mb|mbar|k?g|w|j|s|psu|sigma"
_SEA = r"\bsea|sst|\btos\b"
_ABSOLUTE = {"degC": (-10.0, 60.0), "K": (200.0, 340.0), "degF": (14.0, 140.0)}  # what temperatures of the sea can be
_FREEZING = -1.8  # degC, which products of sea surface temperature give under ice
_LEVEL = 0.2  # mean of anomalies beside their spread, at most
_HARMONICS = 3  # of the year, in the climatology of daily values
_CYCLE = 3.0  # variance of their monthly means beside what chance explains, at most


# ------------------------------------------------------------------------------------------------------- values


def _spot(field: xr.DataArray, wrong: np.ndarray) -> str:
    """Where the first of the wrong values lies, for messages."""
    first = field[tuple(int(k[0]) for k in np.nonzero(wrong))]
    place = f"{float(first['lat']):g} N, {float(first['lon']):g} E"
    return f"the first is {float(first):g} on {str(first['time'].values)[:10]} at {place}"


def refuse_infinities(field: xr.DataArray) -> None:
    """Raise DataError where a value is infinite."""
    infinite = np.isinf(field.values)
    if infinite.any():
        raise DataError(
            f"{int(infinite.sum())} values of '{field.name}' are infinite; {_spot(field, infinite)}; "
            "set them to NaN or to the file's fill value"
        )


@dataclass(frozen=True)
class Scale:
    """How the values of a field become degC, and what they can be.

    ``kind`` "anomaly" or "absolute"; ``unit`` what one of them counts in degrees; then ``factor`` and ``shift``;
    ``name`` of the scale that they are on, empty for what is no temperature; ``bounds`` of temperatures of the sea in
    degC, none for other fields.
    """

    kind: str
    unit: float = 1.0
    factor: float = 1.0
    shift: float = 0.0
    name: str = ""
    bounds: tuple[float, float] | None = None

    def applied(self, field: xr.DataArray) -> xr.DataArray:
        """A field in degC, checked; others as they are.

        Raises
        ------
        DataError
            If values are no temperatures of the sea.
        """
        if not self.name:
            return field
        scaled = field.values if self.unit == 1 else field.values * self.unit
        celsius = field.copy(data=scaled * self.factor + self.shift).assign_attrs(units="degC")
        if self.bounds is not None:
            floor, ceiling = self.bounds
            wrong = (celsius.values < floor) | (celsius.values > ceiling)
            if wrong.any():
                value = f"{float(field.values[wrong][0]):g}"
                raise DataError(
                    f"{int(wrong.sum())} values of '{field.name}' are no sea surface temperatures (expected {floor:g} "
                    f"to {ceiling:g} degC, and the file is in {self.name}); {_spot(field, wrong)}; if the file writes "
                    f"that for 'missing', name it with fill={value} (--fill {value} on the command line)"
                )
        return celsius


def in_celsius(field: xr.DataArray, mends: list[str]) -> tuple[str, xr.DataArray]:
    """Kind of the field ("anomaly" or "absolute") and the field, temperatures in degC."""
    scale = find_scale(field, mends)
    return scale.kind, scale.applied(field)


def find_scale(field: xr.DataArray, mends: list[str]) -> Scale:
    """Kind and scale of a field, by what it says of itself and by its values."""
    values = field.values
    finite = values[np.isfinite(values)]
    if not finite.size:
        raise DataError(f"the selection is all land: '{field.name}' holds no valid value there; choose another region")
    low, high = float(finite.min()), float(finite.max())
    units = str(field.attrs.get("units", "")).strip()
    texts = [str(field.attrs.get(key, "")) for key in ("standard_name", "long_name", "var_desc")] + [str(field.name)]
    words = " ".join(texts)
    declared = read_temperature(units)
    if declared is None:  # by its name and values, the scale still to be found
        warm = any(re.search(_TEMPERATURE, text, re.IGNORECASE) for text in texts)
        if units:
            known = warm and not re.fullmatch(_OTHER_UNITS, units, re.IGNORECASE)
        else:
            known = warm or "temperature" in words.lower() or 200 < low <= high < 340
        declared = Temperature("") if known else None
    if declared is None:
        if not units:
            mends.append(f"'{field.name}' declares no units; its values ({low:g} to {high:g}) are left as they are.")
        return Scale(_kind(field, words, mends))
    unit = _unit(field, declared, mends)
    scaled = field if unit == 1 else field.copy(data=field.values * unit)
    refuse_two_scales(middles(scaled), field["time"].values, str(field.name))
    kind = _kind(scaled, words, mends)
    name, factor, shift = _conversion(scaled, declared, kind, mends)
    bounds = None
    if re.search(_SEA, words, re.IGNORECASE):
        bounds = _ABSOLUTE["degC"] if kind == "absolute" else (-50.0, 50.0)
    return Scale(kind, unit, factor, shift, name, bounds)


def _unit(field: xr.DataArray, declared: Temperature, mends: list[str]) -> float:
    """What a value counts in degrees: its units may be a multiple of them, as 0.01 degC."""
    if declared.factor == 1:
        return 1.0
    low, high = float(field.min()), float(field.max())
    floor, ceiling = _ABSOLUTE[declared.scale]
    units = field.attrs["units"]
    if floor <= low and high <= ceiling and high - low > 1:
        mends.append(
            f"'{field.name}' declares units '{units}', but its values ({low:g} to {high:g}) are whole degrees."
        )
        return 1.0
    mends.append(f"'{field.name}' is in units of {units}; multiplied by {declared.factor:g}.")
    return declared.factor


def middles(field: xr.DataArray) -> np.ndarray:
    """Median of each time, NaN where it holds no value."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of steps without a value
        return np.asarray(np.nanmedian(field.values.reshape(len(field), -1), axis=1))


def refuse_two_scales(middle: np.ndarray, times: np.ndarray, name: str) -> None:
    """Raise DataError where, by their medians, some time steps are in kelvin and others are not."""
    kelvin = (middle > 200) & (middle < 340)
    other = np.abs(middle) < 100
    if kelvin.any() and other.any():
        dates = [str(date)[:10] for date in times[kelvin][[0, -1]]]
        raise DataError(
            f"'{name}' is in kelvin at {int(kelvin.sum())} of {len(kelvin)} times, {dates[0]} to {dates[1]}, and "
            "in degC at others; bring all to one scale, for example with "
            f"'cdo subc,273.15 -seldate,{dates[0]},{dates[1]} IN OUT'"
        )


def _conversion(field: xr.DataArray, declared: Temperature, kind: str, mends: list[str]) -> tuple[str, float, float]:
    """The scale that values are on, and factor and shift to degC."""
    low, high = float(field.min()), float(field.max())
    filled = field.values[np.isfinite(field.values) & (field.values != 0)]  # land may be at 0 K
    middle = float(np.median(filled)) if filled.size else 0.0
    units = str(field.attrs.get("units", "")).strip()
    stated = f"'{field.name}' declares " + (f"units '{units}'" if units else "no units")
    span = f"its values ({low:g} to {high:g})"
    if declared.scale == "degF":
        mends.append(f"{stated}; converted to degC.")
        return "degF", 5 / 9, -32.0 * (5 / 9) if kind == "absolute" else 0.0
    if kind == "absolute" and middle > 150:
        if declared.scale != "K":
            mends.append(f"{stated}, but {span} are in kelvin; converted to degC.")
        return "K", 1.0, -273.15
    if declared.scale == "K" and kind == "absolute":
        mends.append(f"{stated}, but {span} are in degC; not converted.")
    elif not declared.scale:
        mends.append(f"{stated}{', no known scale' if units else ''}; by {span} it is in degC.")
    return "degC", 1.0, 0.0


def _named_kind(words: str) -> str:
    named = "anom" in words.lower() or re.search(r"\bssta\b", words, re.IGNORECASE)
    return "anomaly" if named else "absolute"


def _kind(field: xr.DataArray, words: str, mends: list[str]) -> str:
    """Whether a field holds anomalies: by its names, else where its cells have neither a level nor a seasonal cycle.

    A cold sea in degC has means near zero, too. To take it for anomalies would leave its seasonal cycle in the
    analysis, while anomalies that are taken for absolute values only have their mean removed; hence the strict rule.
    """
    if _named_kind(words) == "anomaly":
        return "anomaly"
    values = field.values
    months = month_number(field["time"].values)
    month = months % 12
    count = np.isfinite(values).sum(axis=0)
    some = count > 1
    if not some.any():
        return "absolute"
    cells = values[:, some]
    mean = _mean(cells)
    variance = _mean((cells - mean) ** 2)
    if not np.mean(mean**2) < _LEVEL**2 * np.mean(variance):
        return "absolute"
    present = np.unique(month)
    means = np.stack([_mean(cells[month == m]) for m in present])
    years = [len(np.unique(months[month == m])) for m in present]
    within = [
        np.mean((cells[month == m] - mean) ** 2, where=np.isfinite(cells[month == m])) * n / max(n - 1, 1)
        for m, mean, n in zip(present, means, years, strict=True)
    ]
    chance = float(np.mean(np.asarray(within) / years))
    if len(present) > 1 and np.nanvar(means, axis=0, ddof=1).mean() > _CYCLE * chance:
        return "absolute"
    mends.append(f"'{field.name}' is taken for anomalies: its cells have neither a level nor a seasonal cycle.")
    return "anomaly"


def frozen_values(field: xr.DataArray, ice: float | None, kind: str) -> np.ndarray:
    """Which temperatures are at or below ``ice`` degC; for None, which are at the freezing point of sea water.

    Raises
    ------
    DataError
        If ``ice`` is given and the field holds no temperatures.
    """
    warm = kind == "anomaly" or field.attrs.get("units") != "degC"
    if ice is None:
        if warm:
            return np.zeros(field.shape, dtype=bool)
        return (field.values >= _FREEZING - 1e-3) & (field.values <= _FREEZING + 1e-3)
    if warm:
        held = "anomalies" if kind == "anomaly" else "no temperatures"
        raise DataError(f"ice={ice:g} needs temperatures in degC, but '{field.name}' holds {held}; leave ice out")
    return np.asarray(field.values <= ice + 1e-4)  # float32 files write -1.8 as -1.79999995


def ice_sentence(count: int, ice: float) -> str:
    """How many values were masked as sea ice."""
    return f"{count} values at or below {ice:g} degC are taken for sea ice; masked."


def freezing_sentence(count: int, cells: int) -> str:
    """How many values lie at the freezing point, where products put it under ice."""
    return (
        f"{count} values in {cells} cells are {_FREEZING:g} degC, the freezing point, as under sea ice, where the "
        "field does not vary; ice=-1.79 (--ice=-1.79) masks them."
    )


def mask_ice(field: xr.DataArray, ice: float | None, kind: str, mends: list[str]) -> xr.DataArray:
    """Mask temperatures at or below ``ice`` degC, and keep where that was as the coord ``ice``; for None, only say
    which are at the freezing point."""
    frozen = frozen_values(field, ice, kind)
    if ice is None:
        if frozen.any():
            mends.append(freezing_sentence(int(frozen.sum()), int(frozen.any(axis=0).sum())))
        return field
    if frozen.any():
        mends.append(ice_sentence(int(frozen.sum()), ice))
    return field.where(~frozen).assign_coords(ice=(field.dims, frozen))


def _of_times(field: xr.DataArray, values: np.ndarray, times: np.ndarray, groups: Sequence[np.ndarray]) -> xr.DataArray:
    """A field of other times, each made of a group of those before; it is ice where no value is left for it."""
    coords = field.drop_vars(["time", "ice"], errors="ignore").coords | {"time": times}
    out = xr.DataArray(values, coords, field.dims, name=field.name, attrs=field.attrs)
    if "ice" in field.coords:
        frozen = np.stack([field["ice"].values[group].any(axis=0) for group in groups])
        out = out.assign_coords(ice=(field.dims, frozen & np.isnan(values)))
    return out


# -------------------------------------------------------------------------------------------------------- dates


def unique_times(field: xr.DataArray, mends: list[str]) -> xr.DataArray:
    """Ascending dates, each once; equal fields of one date are merged, different ones refused."""
    field = field.isel(time=np.argsort(field["time"].values, kind="stable"))
    dates = field["time"].values
    twins = np.flatnonzero(np.diff(dates) == np.timedelta64(0, "ns")) + 1
    if not len(twins):
        return field
    values = field.values
    doubled = [str(date)[:10] for date in np.unique(dates[twins])]
    listed = ", ".join(doubled[:5] + ["..."] * (len(doubled) > 5))
    if any(not np.array_equal(values[i], values[i - 1], equal_nan=True) for i in twins):
        raise DataError(
            f"dates occur twice with different values: {listed}; remove one of each, "
            "or open only files that do not overlap"
        )
    mends.append(f"{len(twins)} dates occur twice with equal values ({listed}); kept once.")
    return field.isel(time=np.setdiff1d(np.arange(len(dates)), twins))


def monthly_values(field: xr.DataArray, mends: list[str], *, keep: bool = False) -> tuple[xr.DataArray, str]:
    """Daily or weekly values averaged to months, or kept; monthly values dated by the first of the month."""
    step = frequency(field["time"].values)
    if step not in ("submonthly", "monthly") or (keep and step == "submonthly"):
        return field, step
    months = month_number(field["time"].values)
    if step == "monthly":
        return unique_times(field.assign_coords(time=first_days(months)), mends), step
    present, sentence = full_months(months)
    groups = [months == m for m in present]
    mends.append(sentence)
    values = np.stack([_mean(field.values[group]) for group in groups])
    return _of_times(field, values, first_days(present), groups), "monthly"


def full_months(months: np.ndarray) -> tuple[np.ndarray, str]:
    """Months that hold at least half the values of the fullest, and what is said of the others."""
    present, counts = np.unique(months, return_counts=True)
    full = counts >= 0.5 * counts.max()
    sentence = f"{len(months)} values more often than monthly were averaged to {int(full.sum())} months"
    if not full.all():
        sentence += "; dropped for lack of half their days: " + ", ".join(year_month(int(m)) for m in present[~full])
    return present[full], f"{sentence}."


def first_days(months: np.ndarray) -> np.ndarray:
    """Dates of the first of months, by their numbers."""
    return as_dates((months - 12 * 1970).astype("datetime64[M]"))


def _mean(values: np.ndarray) -> np.ndarray:
    """Mean over the first axis of the values that are there, NaN where there is none."""
    count = np.isfinite(values).sum(axis=0)
    return np.where(count > 0, np.nansum(values, axis=0) / np.maximum(count, 1), np.nan)


def remove_climatology(
    field: xr.DataArray, kind: str, base: Period | None, span: Period | None, mends: list[str]
) -> tuple[str, Period | None, xr.DataArray]:
    """Kind, base period and values after the mean of each calendar month over the base period is removed."""
    if kind == "anomaly" and base is None:
        mends.append(f"'{field.name}' holds anomalies already; no climatology was removed.")
        return kind, None, field
    if kind == "anomaly" and base is not None:
        mends.append(f"'{field.name}' holds anomalies already; they were brought onto the base period {base.label}.")
    months = month_number(field["time"].values)
    wanted = base or span or Period(int(months[0]), int(months[-1]), "")
    inside = wanted.covers(months)
    used = months[inside]
    if not len(used):
        raise DataError(f"base period {wanted.label} is empty: the field covers {span_of(months)}; choose within that")
    if base is not None and base.reaches_beyond(used, frequency(field["time"].values)):
        mends.append(f"The base period {base.label} reaches beyond the data; {span_of(used)} was used.")
    values = field.values.copy()
    before = np.isfinite(values).sum()
    smooth = frequency(field["time"].values) == "submonthly"
    for month in np.unique(months % 12):
        rows = months % 12 == month
        if not (rows & inside).any():
            raise DataError(
                f"base period {wanted.label} holds no month {month + 1} to take a climatology from; choose a longer one"
            )
        if not smooth:
            values[rows] -= _mean(values[rows & inside])
    if smooth:
        values -= _smooth_cycle(field["time"].values, values, inside)
        mends.append(
            f"The seasonal cycle that was removed is a mean and {_HARMONICS} harmonics of the year at each cell."
        )
    lost = int(before - np.isfinite(values).sum())
    if lost:
        mends.append(f"{lost} values have no climatology, as their cells are missing in the whole base period; masked.")
    label = span_of(used).replace(" to ", "/")
    return "anomaly", Period(int(used[0]), int(used[-1]), label), field.copy(data=values)


def removed_cycle(before: xr.DataArray, after: xr.DataArray) -> xr.DataArray:
    """The mean seasonal cycle between a monthly field and its anomalies, where values are missing too."""
    values = before.values - after.values
    month = month_number(before["time"].values) % 12
    for number in np.unique(month):
        rows = month == number
        values[rows] = _mean(values[rows])
    attrs = {"long_name": "mean seasonal cycle that was removed", "units": before.attrs.get("units", "1")}
    if "standard_name" in before.attrs or attrs["units"] == "degC":
        attrs["standard_name"] = before.attrs.get("standard_name", "sea_surface_temperature")
    return xr.DataArray(values, before.coords, before.dims, name=before.name, attrs=attrs)


def _smooth_cycle(dates: np.ndarray, values: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Mean and harmonics of the year, fitted to each cell over the times ``inside``; NaN where too few are there."""
    year = dates.astype("datetime64[Y]")
    phase = 2 * np.pi * (dates - year) / ((year + 1).astype(dates.dtype) - year)
    waves = [wave(n * phase) for n in range(1, _HARMONICS + 1) for wave in (np.cos, np.sin)]
    design = np.stack([np.ones(len(dates)), *waves], 1)
    flat = values.reshape(len(values), -1)
    used, there = design[inside], np.isfinite(flat[inside])
    gram = np.einsum("tq,ts,tn->nqs", used, used, there, optimize=True)
    fits = there.sum(0) > 2 * used.shape[1]
    fits[fits] = np.linalg.cond(gram[fits]) < 1e6
    right = used.T @ np.where(there, flat[inside], 0.0)
    cycle = np.full(flat.shape, np.nan)
    cycle[:, fits] = design @ np.linalg.solve(gram[fits], right.T[fits][..., None])[..., 0].T
    return cycle.reshape(values.shape)


def season_means(field: xr.DataArray, season: Season, span: Period | None, step: str, mends: list[str]) -> xr.DataArray:
    """One mean per season of the period; seasons that lack a month are dropped, cells that lack one are missing."""
    if step != "monthly":
        raise DataError(f"season={season.label} needs monthly data, but '{field.name}' is {step}; leave season out")
    months = month_number(field["time"].values)
    years = season.years(months)
    member = np.isin(months % 12 + 1, season.months)
    candidates = np.unique(years[member])
    if span is not None:
        candidates = candidates[span.covers(month_number(season.stamps(candidates)))]
    complete = np.array([int((member & (years == y)).sum()) == len(season.months) for y in candidates], dtype=bool)
    if not complete.all():
        dropped = ", ".join(map(str, candidates[~complete]))
        mends.append(f"Seasons {season.label} that lack a month were dropped: {dropped}.")
    if not complete.any():
        raise DataError(f"no complete season {season.label} within the period; choose a longer one")
    kept = candidates[complete]
    groups = [member & (years == y) for y in kept]
    values = np.stack([field.values[group].mean(axis=0) for group in groups])
    long_name = f"{season.label} mean of {field.attrs.get('long_name', field.name)}"
    return _of_times(field, values, season.stamps(kept), groups).assign_attrs(long_name=long_name)


def within_period(field: xr.DataArray, span: Period | None, mends: list[str]) -> xr.DataArray:
    """The period of the analysis; data that fall short of it or have holes are reported."""
    months = month_number(field["time"].values)
    if span is not None:
        inside = span.covers(months)
        if not inside.any():
            raise DataError(f"period {span.label} is empty: the field covers {span_of(months)}; choose within that")
        field, months = field.isel(time=np.flatnonzero(inside)), months[inside]
        if span.reaches_beyond(months, frequency(field["time"].values)):
            mends.append(f"The period {span.label} reaches beyond the data; {span_of(months)} was used.")
    if len(months) < MIN_TIME_STEPS:
        raise DataError(
            f"only {len(months)} time steps are left, at least {MIN_TIME_STEPS} are needed; "
            "choose a longer period or more files"
        )
    _said_of_holes(field["time"].values, months, mends)
    return field


def _said_of_holes(dates: np.ndarray, months: np.ndarray, mends: list[str]) -> None:
    """Say between which dates a step is longer than usual."""
    often = frequency(dates) == "submonthly"
    steps = np.diff(dates) / np.timedelta64(1, "D") if often else np.diff(months)
    holes = np.flatnonzero(steps > (1.5 if often else 1) * np.median(steps))
    if holes.size:
        pairs = [(dates[i : i + 2], months[i : i + 2]) for i in holes[:5]]
        names = [" to ".join(str(x)[:10] for x in days) if often else span_of(numbers) for days, numbers in pairs]
        listed = ", ".join(names + ["..."] * (holes.size > 5))
        mends.append(f"The dates have holes, which the analysis spans: {listed}.")
