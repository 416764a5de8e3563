"""Dates of gridded fields: time axes as files really declare them, and frequencies, periods, seasons.

A time axis is decoded with the calendar that it declares, unless its values form a clean monthly sequence in
another calendar only (ERDDAP serves ERSST with ``calendar = 360_day`` over true epoch seconds); then that calendar
is used, and this is reported. Whatever the calendar, dates come out as ``datetime64[ns]``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cftime
import numpy as np

from probmodels.errors import DataError

__all__ = [
    "Period",
    "Season",
    "decode_times",
    "frequency",
    "month_number",
    "parse_period",
    "parse_season",
    "span_of",
    "year_month",
]

_CALENDARS = {
    "360": "360_day",
    "365": "noleap",
    "365_day": "noleap",
    "366_day": "all_leap",
    "gregorian": "standard",
    "": "standard",
}
_OPEN = (0, 12 * 9999)  # month numbers of the open ends of a period
_INITIALS = "JFMAMJJASOND"
_MONTHS = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)


def month_number(dates: np.ndarray) -> np.ndarray:
    """Months since year 0 of dates (datetime64), so that January of year y is ``12 * y``."""
    return dates.astype("datetime64[M]").astype(np.int64) + 12 * 1970


def year_month(number: int) -> str:
    """``"1950-01"`` from a month number."""
    return f"{number // 12:04d}-{number % 12 + 1:02d}"


def span_of(months: np.ndarray) -> str:
    """``"1950-01 to 2019-04"`` from ascending month numbers."""
    return f"{year_month(int(months[0]))} to {year_month(int(months[-1]))}"


def frequency(dates: np.ndarray) -> str:
    """``"submonthly"``, ``"monthly"``, ``"yearly"`` or ``"other"``, from the median step of ascending dates."""
    if len(dates) < 2:
        return "other"
    days = np.median(np.diff(dates) / np.timedelta64(1, "D"))
    for name, low, high in (("submonthly", 0, 20), ("monthly", 20, 45), ("yearly", 300, 430)):
        if low <= days < high:
            return name
    return "other"


# ---------------------------------------------------------------------------------------------------- time axes


def decode_times(
    values: np.ndarray,
    attrs: Mapping[str, Any],
    *,
    where: str,
    bounds: np.ndarray | None = None,
    coverage_start: str | None = None,
) -> tuple[np.ndarray, list[str]]:
    """Dates of a raw time axis.

    Parameters
    ----------
    values
        Raw time values, shape (T,): numbers, datetime64 or cftime objects.
    attrs
        Attributes of the time variable (``units``, ``calendar``).
    where
        Name of file and variable, for messages.
    bounds
        Raw bounds, shape (T, 2); monthly dates that stamp the end of their interval are moved into it.
    coverage_start
        The file's ``time_coverage_start``, a second witness of the calendar.

    Returns
    -------
    tuple
        Dates (datetime64[ns], shape (T,)) and a sentence on each repair.

    Raises
    ------
    DataError
        If the units cannot be read or a time is missing.
    """
    if np.issubdtype(values.dtype, np.datetime64):
        if np.isnat(values).any():
            raise DataError(
                f"{where}: {int(np.isnat(values).sum())} of {len(values)} times are missing; drop those steps"
            )
        return values.astype("datetime64[ns]"), []
    if values.dtype == object:
        return _to_datetime64(values), []
    numbers = values.astype(np.float64)
    if not np.isfinite(numbers).all():
        raise DataError(
            f"{where}: {int((~np.isfinite(numbers)).sum())} of {len(numbers)} times are missing; drop those steps"
        )
    units = str(attrs.get("units", "")).strip()
    match = re.match(r"(?i)(\w+)\s+since\s+(.+)", units)
    if match is None:
        return _decode_digits(numbers, units, where), []
    if match[1].lower() in ("month", "months", "year", "years"):
        return _decode_month_counts(
            numbers, months=match[1].lower().startswith("month"), origin=match[2], where=where
        ), []
    declared = str(attrs.get("calendar", "")).lower()
    declared = _CALENDARS.get(declared, declared)
    dates = _num2date(numbers, units, declared, where)
    calendar, why = _believable_calendar(numbers, units, declared, dates, coverage_start)
    mends = []
    if calendar != declared:
        dates = _num2date(numbers, units, calendar, where)
        span = f"{dates[0].strftime('%Y-%m')} to {dates[-1].strftime('%Y-%m')}"
        mends.append(f"{where}: the time axis declares calendar '{declared}', but {why}; read as '{calendar}', {span}.")
    result = _to_datetime64(dates)
    if bounds is not None and frequency(np.sort(result)) == "monthly" and np.allclose(bounds.max(axis=1), numbers):
        middle = _to_datetime64(_num2date(bounds.mean(axis=1), units, calendar, where))
        if (month_number(middle) != month_number(result)).any():
            result = middle
            mends.append(
                f"{where}: times stamp the end of their interval; each month is dated by the middle of its bounds."
            )
    return result, mends


def _num2date(numbers: np.ndarray, units: str, calendar: str, where: str) -> np.ndarray:
    try:
        return np.atleast_1d(cftime.num2date(numbers, units, calendar))
    except (ValueError, OverflowError) as error:
        raise DataError(
            f"{where}: times cannot be read with units '{units}' and calendar '{calendar}' ({error}); "
            "mend the attributes, for example units = 'days since 1800-01-01'"
        ) from error


def _is_monthly_grid(dates: np.ndarray) -> bool:
    """One date per calendar month, all near the same day of the month (month ends differ by three days)."""
    months = np.array([12 * d.year + d.month for d in dates])
    days = np.array([d.day for d in dates])
    steps = np.diff(months)
    return bool((steps >= 1).all() and np.median(steps) == 1 and np.ptp(days) <= 3)


def _believable_calendar(
    numbers: np.ndarray, units: str, declared: str, dates: np.ndarray, coverage_start: str | None
) -> tuple[str, str]:
    """The declared calendar, or the one under which the axis makes sense where the declared one does not."""
    ordered = np.argsort(numbers)
    standard = cftime.num2date(numbers, units, "standard")
    if len(numbers) > 1:
        step = np.median(np.diff(np.sort([(d - standard[0]).total_seconds() / 86400 for d in standard])))
        if 27 <= step <= 32 and not _is_monthly_grid(dates[ordered]):
            for calendar in ("standard", "noleap", "360_day"):
                if calendar != declared and _is_monthly_grid(cftime.num2date(numbers[ordered], units, calendar)):
                    return calendar, f"its values fall on one day of each month only in calendar '{calendar}'"
    if coverage_start and declared != "standard" and (match := re.match(r"(-?\d{1,4})-(\d\d)-(\d\d)", coverage_start)):
        start = 372 * int(match[1]) + 31 * int(match[2]) + int(match[3])
        off = {
            name: abs(372 * d.year + 31 * d.month + d.day - start)
            for name, d in (("declared", dates[0]), ("standard", standard[0]))
        }
        if off["declared"] > 31 >= off["standard"]:
            return "standard", f"the file says that it starts on {match[0]}"
    return declared, ""


def _to_datetime64(dates: np.ndarray) -> np.ndarray:
    """Gregorian datetime64 of the same year, month and day (30 February becomes the last day of February)."""
    out = np.empty(len(dates), dtype="datetime64[ns]")
    for i, date in enumerate(dates):
        month = np.datetime64(f"{date.year:04d}-{date.month:02d}", "M")
        last = int(
            ((month + np.timedelta64(1, "M")).astype("datetime64[D]") - month.astype("datetime64[D]")).astype(int)
        )
        day = month.astype("datetime64[D]") + np.timedelta64(min(date.day, last) - 1, "D")
        seconds = 3600 * date.hour + 60 * date.minute + date.second
        out[i] = day.astype("datetime64[s]") + np.timedelta64(seconds, "s")
    return out


def _decode_month_counts(numbers: np.ndarray, *, months: bool, origin: str, where: str) -> np.ndarray:
    """Dates of ``months since`` or ``years since`` an origin, which are not a length of time and so not in CF."""
    match = re.match(r"(-?\d{1,4})(?:-(\d{1,2}))?", origin.strip())
    if match is None:
        raise DataError(f"{where}: cannot read the origin '{origin}' of the time axis; write it as 1960-01-01")
    first = 12 * (int(match[1]) - 1970) + int(match[2] or 1) - 1
    count = np.floor(numbers * (1 if months else 12) + 1e-6).astype(np.int64)
    return (first + count).astype("datetime64[M]").astype("datetime64[ns]")


def _decode_digits(numbers: np.ndarray, units: str, where: str) -> np.ndarray:
    """Dates written as digits, 195001 or 19500101 (CDO's ``day as %Y%m%d.%f``)."""
    digits = np.floor(numbers).astype(np.int64)
    if ((digits >= 100000) & (digits <= 300012)).all():
        year, month, day = digits // 100, digits % 100, np.ones_like(digits)
    else:
        year, month, day = digits // 10000, digits // 100 % 100, digits % 100
    plausible = (year >= 1000) & (year <= 3000) & (month >= 1) & (month <= 12) & (day >= 1) & (day <= 31)
    if not plausible.all():
        raise DataError(
            f"{where}: the time axis has no readable units ({units!r}; first value {numbers[0]:g}); "
            "set its attribute units, for example 'days since 1800-01-01'"
        )
    start = (12 * (year - 1970) + month - 1).astype("datetime64[M]").astype("datetime64[D]")
    return (start + (day - 1).astype("timedelta64[D]")).astype("datetime64[ns]")


# ------------------------------------------------------------------------------------------------------ periods


@dataclass(frozen=True)
class Period:
    """A span of whole months, first and last included, as month numbers (`month_number`)."""

    first: int
    last: int
    label: str

    def covers(self, months: np.ndarray) -> np.ndarray:
        """Which month numbers lie within the period."""
        return (months >= self.first) & (months <= self.last)

    def reaches_beyond(self, months: np.ndarray, step: str) -> bool:
        """Whether ascending data of a frequency start or end a whole step inside the period."""
        slack = 1 if step == "monthly" else 12
        early = self.first != _OPEN[0] and months[0] - self.first >= slack
        late = self.last != _OPEN[1] and self.last - months[-1] >= slack
        return bool(early or late)


def parse_period(period: Any, *, name: str = "period") -> Period:
    """Period from ``"1950-2019"``, ``"1950-01/2019-04"``, ``(1950, 2019)``, ``("1950-01", None)`` or one year.

    Raises
    ------
    DataError
        If it cannot be read, or ends before it starts.
    """
    how = "write it as '1950-2019', '1950-01/2019-04' or (1950, 2019); an open end is None or left out ('1950/')"
    if isinstance(period, slice):
        period = (period.start, period.stop)
    if isinstance(period, int | np.integer):
        period = (period, period)
    if isinstance(period, str):
        text = period.strip()
        period = _ends(text)
        if period is None:
            raise DataError(f"{name}={text!r} is not a period; {how}")
    if not isinstance(period, Sequence) or len(period) != 2:
        raise DataError(f"{name}={period!r} is not a period; {how}")
    edges: list[int | None] = []
    for end, default_month in zip(period, (1, 12), strict=True):
        edge = None if end is None else _month(str(end).strip(), default_month)
        if end is not None and edge is None:
            raise DataError(f"{name}: {end!r} is not a year or a month; {how}")
        edges.append(edge)
    first, last = (edge if edge is not None else end for edge, end in zip(edges, _OPEN, strict=True))
    label = "/".join("" if edge is None else year_month(edge) for edge in edges)
    if last < first:
        raise DataError(f"{name}={label} ends before it starts; swap its ends")
    return Period(first, last, label)


def _ends(text: str) -> tuple[str | None, str | None] | None:
    """Start and end of a period in writing, None for an open end; None where it cannot be read."""
    if match := re.fullmatch(r"(\d{4})(?:\s*[-–:/]\s*(\d{4}))?", text):
        return match[1], match[2] or match[1]
    parts = re.split(r"\s*[/:]\s*|\s+to\s+|\.\.", text)
    return (parts[0] or None, parts[1] or None) if len(parts) == 2 and any(parts) else None


def _month(text: str, default_month: int) -> int | None:
    """Number of a month (`month_number`) in writing, where only a year is given that of ``default_month``."""
    match = re.match(r"(\d{4})(?:-(\d{1,2}))?(?:-\d{1,2}(?:[T ].*)?)?$", text)
    if match is None or not 1 <= int(match[2] or 1) <= 12:
        return None
    return 12 * int(match[1]) + int(match[2] or default_month) - 1


# ------------------------------------------------------------------------------------------------------ seasons


@dataclass(frozen=True)
class Season:
    """Months of a season in order of time, 1 to 12, and whether it runs over the end of the year."""

    label: str
    months: tuple[int, ...]

    @property
    def wraps(self) -> bool:
        """Whether the season starts in the year before the one that it is named by."""
        return any(b < a for a, b in zip(self.months, self.months[1:], strict=False))

    def years(self, months: np.ndarray) -> np.ndarray:
        """Year of the season that each month number belongs to: that of January where the season has one."""
        year, month = months // 12, months % 12 + 1
        before = self.months[: self.months.index(1)] if self.wraps and 1 in self.months else ()
        return year + np.isin(month, before)

    def stamps(self, years: np.ndarray) -> np.ndarray:
        """Dates of season means: 1 January where the season runs over the year's end, else its middle month."""
        month = 1 if self.wraps else self.months[(len(self.months) - 1) // 2]
        return (12 * (years - 1970) + month - 1).astype("datetime64[M]").astype("datetime64[ns]")


def parse_season(season: str | Sequence[int]) -> Season:
    """Season from initials of successive months (``"NDJFM"``, ``"JJA"``), ``"annual"``, or a list of months.

    Raises
    ------
    DataError
        If the initials are not of successive months, or of more than one season.
    """
    if isinstance(season, str):
        return _season_by_initials(season)
    found: Any = season
    months: list[Any] = list(found) if isinstance(found, Sequence | np.ndarray) else []
    if not all(isinstance(m, int | np.integer) and not isinstance(m, bool) for m in months):
        months = []
    if not months or len(set(months)) != len(months) or not all(1 <= m <= 12 for m in months):
        raise DataError(
            f"season={season!r} is not a list of different months from 1 to 12; "
            "write it as 'NDJFM', 'JJA', 'annual' or [11, 12, 1, 2, 3]"
        )
    for start in sorted(months):
        run = [(start + i - 1) % 12 + 1 for i in range(len(months))]
        if set(run) == set(months) and len(months) < 12:
            return Season("".join(_INITIALS[m - 1] for m in run), tuple(run))
    return Season(",".join(map(str, sorted(months))), tuple(sorted(months)))


def _season_by_initials(season: str) -> Season:
    """Season from the initials of its months, which have to fit one run of months alone."""
    text = season.strip().upper()
    letters = _INITIALS if text in ("ANNUAL", "ANN", "YEAR") else text
    starts = [s for s in range(12) if (_INITIALS * 2)[s : s + len(letters)] == letters]
    if not letters or len(letters) > 12 or not starts:
        raise DataError(
            f"season={season!r} is not a run of month initials; "
            "write it as 'NDJFM', 'JJA', 'annual' or [11, 12, 1, 2, 3]"
        )
    if len(starts) > 1:
        names = " or ".join(_MONTHS[s] for s in starts)
        raise DataError(
            f"season={season!r} may start in {names}; give the numbers of its months, as in [{starts[0] + 1}]"
        )
    return Season(text if text == letters else "annual", tuple((starts[0] + i) % 12 + 1 for i in range(len(letters))))
