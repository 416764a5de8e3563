"""Dates of gridded fields: time axes as files really declare them, and frequencies, periods, seasons.

A time axis is decoded with the calendar that it declares, unless its values form a clean monthly sequence in
another calendar only (ERDDAP serves ERSST with ``calendar = 360_day`` over true epoch seconds); then that calendar
is used, and this is reported. Whatever the calendar, dates come out as ``datetime64[ns]``, or ``datetime64[s]`` where
a date lies outside of the years 1678 to 2261, for which nanoseconds have no room.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import cftime
import numpy as np

from probmodels.errors import DataError
from probmodels.options import hint

__all__ = [
    "Period",
    "Season",
    "as_dates",
    "decode_times",
    "frequency",
    "is_date",
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
    "no_leap": "noleap",
    "thirty_day_months": "360_day",  # as GFDL's models write it in calendar_type
    "thirty_day": "360_day",
}
_KNOWN = ("standard", "proleptic_gregorian", "julian", "noleap", "all_leap", "360_day")
_SECONDS = {
    name: seconds
    for names, seconds in (
        ("nanosecond nanoseconds nanosec nanosecs ns", 1e-9),
        ("microsecond microseconds microsec microsecs us", 1e-6),
        ("millisecond milliseconds millisec millisecs msec msecs ms", 1e-3),
        ("second seconds sec secs s", 1.0),
        ("minute minutes min mins", 60.0),
        ("hour hours hr hrs h", 3600.0),
        ("day days d", 86400.0),
        ("week weeks", 7 * 86400.0),
    )
    for name in names.split()
}
_COUNTED = {"month": 1, "months": 1, "mon": 1, "year": 12, "years": 12, "yr": 12, "yrs": 12}  # in months
_TWELFTH = 365.25 * 86400 / 12
_FARTHEST = 10_000 * 366 * 86400.0
_OPEN = (-12 * 99_999, 12 * 99_999)  # month numbers of the open ends of a period
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
        Raw time values, shape (T,): numbers, texts such as ``"1990-01-15"``, datetime64 or objects with year and month.
    attrs
        Attributes of the time variable (``units``, ``calendar`` or ``calendar_type``).
    where
        Name of file and variable, for messages.
    bounds
        Raw bounds, shape (T, 2); dates that stamp the end of their month or year are moved into it.
    coverage_start
        The file's ``time_coverage_start``, a second witness of the calendar.

    Returns
    -------
    tuple
        Dates (shape (T,), see `as_dates`) and a sentence on each repair.

    Raises
    ------
    DataError
        If the units or the calendar cannot be read, a time is missing, or one is ten thousand years from its origin.
    """
    if np.issubdtype(values.dtype, np.datetime64):
        _refuse_missing(np.isnat(values), where)
        return as_dates(values), []
    if values.dtype.kind in "SUO":
        return _to_datetime64([_date_of(value, where) for value in values.tolist()]), []
    if values.dtype.kind not in "iuf":
        raise DataError(f"{where}: times of type {values.dtype} are no dates; write them as 'days since 1800-01-01'")
    numbers = values.astype(np.float64)
    _refuse_missing(~np.isfinite(numbers), where)
    units = str(attrs.get("units", "")).strip()
    match = re.match(r"(?i)(\w+)\s+since\s+(.+)", units)
    if match is None:
        return _decode_digits(numbers, units, where), []
    step, origin = match[1].lower(), _read_date(match[2])
    if origin is None:
        raise DataError(
            f"{where}: cannot read the origin '{match[2]}' of the time units; write them as in "
            f"'{match[1]} since 1960-01-31'"
        )
    if step in _COUNTED:
        return _decode_month_counts(numbers * _COUNTED[step], origin, where), []
    if step not in _SECONDS:
        raise DataError(
            f"{where}: the time units '{units}' count {match[1]}, which is not a unit of time; "
            "set them, for example to 'days since 1800-01-01'"
        )
    seconds = numbers * _SECONDS[step]
    if np.abs(seconds).max() > _FARTHEST:
        raise DataError(
            f"{where}: time {numbers[np.abs(seconds).argmax()]:g} lies more than 10000 years from the origin of "
            f"'{units}'; check the units and the values"
        )
    declared = _calendar(attrs, where)
    dates = _dates(seconds, origin, declared, where)
    calendar, why = _believable_calendar(seconds, origin, declared, dates, coverage_start, where)
    mends = []
    if calendar != declared:
        dates = _dates(seconds, origin, calendar, where)
        span = f"{year_month(_months(dates[:1])[0])} to {year_month(_months(dates[-1:])[0])}"
        mends.append(f"{where}: the time axis declares calendar '{declared}', but {why}; read as '{calendar}', {span}.")
    result = _to_datetime64(dates)
    if bounds is not None and _stamps_ends(numbers, bounds, _SECONDS[step]):
        middle = _to_datetime64(_dates(bounds.mean(axis=1) * _SECONDS[step], origin, calendar, where))
        if (month_number(middle) != month_number(result)).any():
            result = middle
            mends.append(
                f"{where}: times stamp the end of their interval; each month is dated by the middle of its bounds."
            )
    elif (first := _twelfths(seconds, result)) is not None:
        result = as_dates(np.datetime64(first, "M") + np.round((seconds - seconds[0]) / _TWELFTH).astype(np.int64))
        mends.append(
            f"{where}: times come in equal steps of {np.median(np.diff(seconds)) / 86400:.7g} days, a twelfth of a "
            f"year; read as successive months from {first}."
        )
    return result, mends


def as_dates(dates: np.ndarray) -> np.ndarray:
    """Dates as ``datetime64[ns]``, or ``datetime64[s]`` where one lies before 1678 or after 2261."""
    seconds = dates.astype("datetime64[s]")
    fits = (seconds >= np.datetime64("1678-01-01")) & (seconds < np.datetime64("2262-01-01"))
    return dates.astype("datetime64[ns]") if fits.all() else seconds


def is_date(value: Any) -> bool:
    """Whether an object is a date: text that reads as one, or an object with year, month and day."""
    if isinstance(value, str | bytes):
        return _read_date(_text(value)) is not None
    return all(isinstance(getattr(value, part, None), int) for part in ("year", "month", "day"))


def _refuse_missing(missing: np.ndarray, where: str) -> None:
    if missing.any():
        raise DataError(f"{where}: {int(missing.sum())} of {len(missing)} times are missing; drop those steps")


def _text(value: str | bytes) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _date_of(value: Any, where: str) -> Any:
    """A date out of a text or an object."""
    if not is_date(value):
        raise DataError(f"{where}: {value!r} is not a date; write times as 1990-01-31, or as 'days since 1800-01-01'")
    if not isinstance(value, str | bytes):
        return value
    year, month, day, rest = _read_date(_text(value)) or (0, 0, 0, "")
    if not (1 <= month <= 12 and 1 <= day <= 31):
        raise DataError(f"{where}: {_text(value)!r} is no date; months run from 1 to 12 and days from 1 to 31")
    clock = re.match(r"(\d{1,2})(?::(\d{1,2}))?(?::(\d{1,2}))?", rest)
    hour, minute, second = (int(part or 0) for part in clock.groups()) if clock else (0, 0, 0)
    return _Date(year, month, day, hour, minute, second)


class _Date(NamedTuple):
    year: int
    month: int
    day: int
    hour: int
    minute: int
    second: int


def _read_date(text: str) -> tuple[int, int, int, str] | None:
    """Year, month, day and what follows of a date in writing; None where it cannot be read in one way only."""
    text = text.strip()
    if match := re.match(r"(\d{1,2})[-/ ]([A-Za-z]{3,9})[-/ ](\d{4})(?!\d)", text):  # 01-JAN-1990
        found = [i + 1 for i, name in enumerate(_MONTHS) if name.lower().startswith(match[2].lower())]
        date = (int(match[3]), found[0], int(match[1])) if len(found) == 1 else None
    elif match := re.match(r"(\d{1,2})([-/.])(\d{1,2})\2(\d{4})(?!\d)", text):  # 31.01.1990, but not 02.01.1990
        a, b, year = int(match[1]), int(match[3]), int(match[4])
        date = (year, b, a) if a == b or a > 12 else (year, a, b) if b > 12 else None
    elif match := re.match(r"([-+]?\d{1,4})([-/])(\d{1,2})(?:\2(\d{1,2}))?(?!\d)", text):  # 1990-01-31, 1990-01
        date = int(match[1]), int(match[3]), int(match[4] or 1)
    elif match := re.match(r"(\d{4})(\d{2})(\d{2})(?!\d)", text):
        date = int(match[1]), int(match[2]), int(match[3])
    elif match := re.match(r"(-?\d{1,4})(?![\d:])", text):
        date = int(match[1]), 1, 1
    else:
        return None
    return None if date is None else (*date, text[match.end() :].lstrip("T ").strip())


def _calendar(attrs: Mapping[str, Any], where: str) -> str:
    """The declared calendar under the name that the CF conventions give it."""
    name = str(attrs.get("calendar", attrs.get("calendar_type", ""))).strip().lower()
    name = _CALENDARS.get(name, name)
    if name not in _KNOWN:
        raise DataError(
            f"{where}: unknown calendar '{name}'{hint(name, _KNOWN)}; set the attribute calendar of the time axis to "
            f"one of {', '.join(_KNOWN)}, for example with 'cdo setcalendar,360_day IN OUT'"
        )
    return name


def _dates(seconds: np.ndarray, origin: tuple[int, int, int, str], calendar: str, where: str) -> np.ndarray:
    """Dates (cftime) of seconds since an origin."""
    year, month, day, clock = origin
    units = f"seconds since {year:05d}-{month:02d}-{day:02d} {clock}" if year < 0 else ""
    units = units or f"seconds since {year:04d}-{month:02d}-{day:02d} {clock}"
    zero = {"has_year_zero": True} if year == 0 else {}  # mixed calendars have none of themselves
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of year 0, which is read as such
            return np.atleast_1d(cftime.num2date(np.round(seconds, 3), units.strip(), calendar, **zero))
    except (ValueError, OverflowError, TypeError) as error:
        raise DataError(
            f"{where}: times cannot be read with the units' origin '{units[14:].strip()}' and calendar '{calendar}' "
            f"({error}); mend the attributes, for example units = 'days since 1800-01-01'"
        ) from error


def _months(dates: Sequence[Any] | np.ndarray) -> np.ndarray:
    """Month numbers of dates with year and month; years before 1 count on from 0 backwards."""
    years = np.array([d.year + (d.year < 0 and not getattr(d, "has_year_zero", True)) for d in dates], dtype=np.int64)
    return 12 * years + np.array([d.month for d in dates], dtype=np.int64) - 1


def _is_monthly_grid(dates: np.ndarray) -> bool:
    """One date per calendar month, all near the same day of the month (month ends differ by three days)."""
    steps = np.diff(_months(dates))
    return bool((steps >= 1).all() and np.median(steps) == 1 and np.ptp([d.day for d in dates]) <= 3)


def _believable_calendar(
    seconds: np.ndarray,
    origin: tuple[int, int, int, str],
    declared: str,
    dates: np.ndarray,
    coverage_start: str | None,
    where: str,
) -> tuple[str, str]:
    """The declared calendar, or the one under which the axis makes sense where the declared one does not."""
    ordered = np.argsort(seconds)
    if len(seconds) > 1 and 27 * 86400 <= np.median(np.diff(seconds[ordered])) <= 32 * 86400:
        others = [name for name in ("standard", "noleap", "360_day") if name != declared]
        if not _is_monthly_grid(dates[ordered]):
            for calendar in others:
                if _is_monthly_grid(_dates(seconds[ordered], origin, calendar, where)):
                    return calendar, f"its values fall on one day of each month only in calendar '{calendar}'"
        elif declared == "standard" and origin[0] < 1583 and len({d.day for d in dates}) > 1:
            # some programs count from year 1 in today's calendar, two days off the Julian one
            proleptic = _dates(seconds[ordered], origin, "proleptic_gregorian", where)
            if {d.day for d in proleptic} == {1} and _is_monthly_grid(proleptic):
                name = "proleptic_gregorian"
                return name, f"its values fall on the first day of each month only in calendar '{name}'"
    if coverage_start and declared != "standard" and (match := re.match(r"(-?\d{1,4})-(\d\d)-(\d\d)", coverage_start)):
        start = 372 * int(match[1]) + 31 * int(match[2]) + int(match[3])
        off = {
            name: abs(372 * d.year + 31 * d.month + d.day - start)
            for name, d in (("declared", dates[0]), ("standard", _dates(seconds[:1], origin, "standard", where)[0]))
        }
        if off["declared"] > 31 >= off["standard"]:
            return "standard", f"the file says that it starts on {match[0]}"
    return declared, ""


def _stamps_ends(numbers: np.ndarray, bounds: np.ndarray, scale: float) -> bool:
    """Whether times are the ends of the intervals that their bounds give, of a month or longer."""
    if not np.isfinite(bounds).all():
        return False
    days = np.median(np.ptp(bounds, axis=1)) * scale / 86400
    return bool(20 <= days < 430 and np.allclose(bounds.max(axis=1), numbers))


def _twelfths(seconds: np.ndarray, dates: np.ndarray) -> str | None:
    """First month of an axis in equal steps of a twelfth of a year, where dates skip or repeat months; else None."""
    steps = np.diff(seconds)
    months = month_number(dates)
    regular = len(steps) > 1 and np.ptp(steps) < 60 and abs(np.median(steps) - _TWELFTH) < 0.1 * 86400
    return year_month(int(months[0])) if regular and (np.diff(months) != 1).any() else None


def _to_datetime64(dates: Sequence[Any] | np.ndarray) -> np.ndarray:
    """Gregorian datetime64 of the same year, month and day (30 February becomes the last day of February)."""
    months = (_months(dates) - 12 * 1970).astype("datetime64[M]")
    first = months.astype("datetime64[D]")
    last = ((months + 1).astype("datetime64[D]") - first).astype(np.int64)
    days = np.minimum([d.day for d in dates], last) - 1
    clock = [3600 * getattr(d, "hour", 0) + 60 * getattr(d, "minute", 0) + getattr(d, "second", 0) for d in dates]
    return as_dates((first + days).astype("datetime64[s]") + np.asarray(clock, dtype="timedelta64[s]"))


def _decode_month_counts(counts: np.ndarray, origin: tuple[int, int, int, str], where: str) -> np.ndarray:
    """Dates of months since an origin, which are not a length of time and so not in CF."""
    year, month = origin[:2]
    if not 1 <= month <= 12 or np.abs(counts).max() > 12 * 10_000:
        raise DataError(
            f"{where}: times up to {counts[np.abs(counts).argmax()]:g} months from {year}-{month} are no dates; "
            "check the units and the values"
        )
    return as_dates((12 * (year - 1970) + month - 1 + np.floor(counts + 1e-6).astype(np.int64)).astype("datetime64[M]"))


def _decode_digits(numbers: np.ndarray, units: str, where: str) -> np.ndarray:
    """Dates written as digits, 195001 or 19500101 (CDO's ``day as %Y%m%d.%f``)."""
    digits = np.floor(np.clip(numbers, -1, 1e9)).astype(np.int64)
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
    return as_dates(start + (day - 1).astype("timedelta64[D]"))


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
        year = isinstance(end, int | np.integer) and not isinstance(end, bool)
        edge = None if end is None else _month(f"{end:04d}" if year else str(end).strip(), default_month)
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
        return as_dates((12 * (years - 1970) + month - 1).astype("datetime64[M]"))


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
