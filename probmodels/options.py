"""Checks of options, with one wording for all: names of a list, whole numbers, numbers of an interval."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from probmodels.errors import DataError

__all__ = ["check_choices", "check_counts", "check_numbers"]


def check_choices(**options: tuple[Any, Iterable[str]]) -> None:
    """See that options, given with what there is to choose from, are of it.

    Raises
    ------
    DataError
        If one is not.
    """
    for name, (value, known) in options.items():
        if value not in (names := list(known)):
            raise DataError(f"{name}={value!r}; choose one of {', '.join(names)}")


def check_counts(least: int, /, **options: Any) -> None:
    """See that options are whole numbers of at least ``least``; a truth value is none.

    Raises
    ------
    DataError
        If one is not.
    """
    for name, value in options.items():
        if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer) or value < least:
            raise DataError(f"{name}={value!r}; give a whole number of at least {least}")


def check_numbers(low: float, high: float = math.inf, /, *, ends: str = "[]", **options: Any) -> None:
    """See that options are numbers from ``low`` to ``high``; neither a truth value nor nan is one.

    Parameters
    ----------
    low, high
        Ends of the interval.
    ends
        Which of them belong to it, as it is written: ``"[]"``, ``"[)"``, ``"(]"`` or ``"()"``.
    **options
        By name.

    Raises
    ------
    DataError
        If one is not.
    """
    above, below = ends[0] == "(", ends[1] == ")"
    wanted = f"{'above' if above else 'of at least'} {low:g}"
    wanted += f" and {'below' if below else 'of at most'} {high:g}" if high < math.inf else ""
    for name, value in options.items():
        if isinstance(value, bool | np.bool_) or not isinstance(value, int | float | np.number):
            raise DataError(f"{name}={value!r} is no number; give one, without quotes in a spec")
        if not (low < value if above else low <= value) or not (value < high if below else value <= high):
            raise DataError(f"{name}={value!r} is out of range: give a number {wanted}")
