"""Series of dates and values from CSV files, such as published climate indices, and their dates beside other ones."""

from __future__ import annotations

import re
from calendar import monthrange
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import xarray as xr

from probmodels.datasets.calendars import decode_times, frequency, month_number
from probmodels.errors import DataError
from probmodels.options import checked, hint

__all__ = ["load_series", "match_series", "time_steps"]

_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_MARKS = (99.0, 99.9, 99.99, 999.0, 999.9, 999.99, 9999.0, 9999.9, 99999.0, 1e20, 1e30, 1e36)
_UNITS = {"monthly": "month", "yearly": "year", "submonthly": "step"}


@checked(DataError)
def load_series(path: str | Path, *, column: str | None = None, missing: Sequence[float] = ()) -> xr.DataArray:
    """Read a series from a CSV file.

    Three layouts are read: a column of dates and columns of values; columns ``year`` and ``month`` and columns of
    values; and a row for each year with twelve columns of months. Lines that begin with ``#`` are passed over.

    Parameters
    ----------
    path
        File with one line of names, columns separated by commas, semicolons, tabs or blanks.
    column
        Name of the column of values; may be left out where there is one.
    missing
        Values that mean "missing", besides empty fields and texts such as NaN.

    Returns
    -------
    xr.DataArray
        Dims (time,), dates ascending, missing values left out; its name is that of the column.

    Raises
    ------
    DataError
        If the file cannot be read, a date is no date or stands there twice, a value is no number, or a value looks like
        a mark for missing ones that has not been named.
    """
    path = Path(path)
    table = _table(path)
    names = {str(name).strip().lower(): name for name in table}
    if _wide(table):
        texts, values, name = _from_wide(table, path.stem)
        if column is not None:
            raise DataError(f"column={column!r} is not used: {path.name} holds a row for each year")
    else:
        if {"year", "month"} <= set(names):
            own = [names["year"], names["month"]]
            texts = [f"{a}-{b.zfill(2)}" for a, b in zip(*(table[x].str.removesuffix(".0") for x in own), strict=True)]
        else:
            own = [next((names[x] for x in ("time", "date") if x in names), table.columns[0])]
            texts = table[own[0]].tolist()
        name = _value_column([str(x) for x in table if x not in own], column, path)
        values = table[name].tolist()
    dates = _dates([str(text).strip() for text in texts], path)
    numbers = _numbers(values, dates, path, missing)
    order = np.argsort(dates, kind="stable")
    dates, numbers = dates[order], numbers[order]
    if (again := np.flatnonzero(dates[1:] == dates[:-1])).size:
        day = np.datetime_as_string(dates[again[0]], unit="D")
        raise DataError(f"{path.name}: {again.size} dates stand there twice, the first {day}; keep one value of each")
    keep = np.isfinite(numbers)
    if keep.sum() < 2:
        raise DataError(f"{path.name}: column {name!r} holds {keep.sum()} values; a series has more")
    return xr.DataArray(numbers[keep], {"time": dates[keep]}, ("time",), name=name, attrs={"source": path.name})


def _table(path: Path) -> pd.DataFrame:
    if not path.is_file():
        raise DataError(f"{str(path)!r} is no file; name a CSV file of dates and values")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        head = next((line for line in lines if line.strip() and not line.startswith("#")), "")
        mark = max((x for x in ",;\t" if x in head), key=head.count, default=r"\s+")
        table = pd.read_csv(path, sep=mark, comment="#", dtype=str, skipinitialspace=True, encoding="utf-8-sig")
    except (ValueError, OSError) as error:  # of text, of pandas, of the file
        raise DataError(f"{path.name} cannot be read as CSV ({' '.join(str(error).split())})") from error
    table = table.dropna(how="all")
    if table.shape[1] < 2 or not len(table):
        raise DataError(f"{path.name} holds {table.shape[1]} columns; a series needs one of dates and one of values")
    return table


def _wide(table: pd.DataFrame) -> bool:
    """Whether a table has a row for each year and a column for each month."""
    heads = [str(name).strip().lower()[:3] for name in table.columns[1:13]]
    return table.shape[1] >= 13 and heads in (list(_MONTHS), [str(i) for i in range(1, 13)])


def _from_wide(table: pd.DataFrame, name: str) -> tuple[list[str], list[str], str]:
    years = [str(x).strip().removesuffix(".0") for x in table.iloc[:, 0]]
    texts = [f"{year}-{month:02d}" for year in years for month in range(1, 13)]
    return texts, table.iloc[:, 1:13].to_numpy().ravel().tolist(), name


def _value_column(names: list[str], column: str | None, path: Path) -> str:
    if column is not None:
        if column not in names:
            raise DataError(f"{path.name} has no column {column!r}{hint(column, names)}")
        return column
    if len(names) != 1:
        raise DataError(f"{path.name} has the columns {', '.join(names) or 'of dates only'}; name the one to read")
    return names[0]


def _dates(texts: list[str], path: Path) -> np.ndarray:
    """Dates of texts; fractional years, whose month is a guess, and days that the calendar lacks are refused."""
    for place, text in enumerate(texts):
        if re.fullmatch(r"\d{6}", text):
            texts[place] = text = f"{text[:4]}-{text[4:]}"
        if re.fullmatch(r"\d+\.\d+", text):
            raise DataError(f"{path.name}: {text!r} is a fraction of a year; write times as 1950-01 or 1950-01-31")
        if (match := re.match(r"(\d{4})-(\d{1,2})-(\d{1,2})", text)) and 1 <= int(match[2]) <= 12:
            year, month, day = (int(x) for x in match.groups())
            if year and day > monthrange(year, month)[1]:
                raise DataError(
                    f"{path.name}: {text!r} is no date of the standard calendar; a series in another calendar, such as "
                    "360_day, has to be brought to months (1950-01) or to the standard calendar"
                )
    return decode_times(np.array(texts, dtype=object), {}, where=path.name)[0]


def _numbers(values: list[str], dates: np.ndarray, path: Path, missing: Sequence[float]) -> np.ndarray:
    numbers = np.full(len(values), np.nan)
    for place, text in enumerate(values):
        try:
            numbers[place] = float(text) if str(text).strip() else np.nan  # pandas has made empty fields NaN
        except ValueError:
            day = np.datetime_as_string(dates[place], unit="D")
            raise DataError(f"{path.name}: {text!r} at {day} is no number; leave missing values empty") from None
    if np.isinf(numbers).any():
        raise DataError(f"{path.name} holds {np.isinf(numbers).sum()} infinite values; leave missing values empty")
    numbers[np.isin(numbers, np.asarray(missing, dtype=float))] = np.nan
    for mark in _MARKS:
        marked = np.isclose(np.abs(numbers), mark, rtol=1e-6)
        rest = np.abs(numbers[~marked & np.isfinite(numbers)])
        if marked.any() and rest.size and mark > 5 * rest.max():
            value = numbers[marked][0]
            raise DataError(
                f"{path.name} holds {value:g} {marked.sum()} times, far from all other values, as a mark of missing "
                f"ones would be; say so: missing=[{value:g}] (--missing={value:g}), or leave missing values empty"
            )
    return numbers


def time_steps(time: xr.DataArray | np.ndarray, name: str) -> tuple[np.ndarray, str]:
    """Dates as whole numbers of months, years, or days, and which.

    Parameters
    ----------
    time
        Dates, ascending.
    name
        What they are the dates of, for messages.

    Returns
    -------
    tuple
        Numbers, shape (T,), and "monthly", "yearly" or "submonthly" (numbers of days).

    Raises
    ------
    DataError
        If these are no dates, their step is none of these, or two fall into one month or year.
    """
    dates = np.asarray(time)
    if not np.issubdtype(dates.dtype, np.datetime64):
        raise DataError(
            f"{name} has no dates but {dates.dtype} values along time; another series cannot be set beside it"
        )
    step = frequency(dates)
    if step == "other":
        raise DataError(f"the dates of {name} are neither days, months nor years apart; bring them to one step")
    months = month_number(dates)
    numbers = {"monthly": months, "yearly": months // 12}.get(step, dates.astype("datetime64[D]").astype(np.int64))
    if (again := np.flatnonzero(np.diff(numbers) == 0)).size:
        first, second = (np.datetime_as_string(dates[again[0] + i], unit="D") for i in (0, 1))
        raise DataError(f"{name} has two values in one {_UNITS[step]}, {first} and {second}; keep one")
    return numbers, step


def match_series(series: xr.DataArray, time: xr.DataArray, *, shift: int = 0) -> np.ndarray:
    """Values of a series at other dates, by month, year or day.

    Parameters
    ----------
    series
        Over time, as from `load_series`.
    time
        Dates wanted, of the same step.
    shift
        Steps by which the series is read later than the dates.

    Returns
    -------
    np.ndarray
        Shape of ``time``; NaN where the series has no value.

    Raises
    ------
    DataError
        If the two have different steps, or dates of which none are common.
    """
    name = f"the series {str(series.name)!r}"
    wanted, step = time_steps(time.values, "the field")
    have, own = time_steps(series["time"].values, name)
    if own != step:
        raise DataError(
            f"{name} is {own}, the field {step}; bring them to one step, by means over the same months or days"
        )
    if step == "submonthly":
        unit, its = (int(np.median(np.diff(x))) for x in (wanted, have))
        if unit != its:
            raise DataError(f"{name} has steps of {its} days, the field of {unit}; bring them to one step")
        shift = shift * unit
    place = np.searchsorted(have, wanted + shift)
    found = np.full(len(wanted), np.nan)
    inside = place < len(have)
    inside[inside] &= have[place[inside]] == (wanted + shift)[inside]
    found[inside] = series.values[place[inside]]
    if not inside.any():
        spans = [" to ".join(np.datetime_as_string(x[[0, -1]], unit="M")) for x in (series["time"].values, time.values)]
        raise DataError(f"{name} and the field have no dates in common: {spans[0]} and {spans[1]}")
    return found
