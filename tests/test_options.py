"""Checks of options: what passes, and what is said of what does not."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from probmodels.errors import DataError
from probmodels.options import check_choices, check_counts, check_numbers


def test_what_is_in_range_passes() -> None:
    check_choices(pooling=("sum", {"mean": 1, "sum": 2}), backbone=("gin", ("gcn", "gin")))
    check_counts(0, neighbours=0, width=np.int64(3))
    check_numbers(0, 1, skip=0, rate=1.0, share=np.float32(0.5))
    check_numbers(0, beta=math.inf)
    check_numbers(0, 1, ends="()", rate=1e-9)


@pytest.mark.parametrize("value", ["max", None, 1])
def test_names_that_are_no_choice_are_refused(value: Any) -> None:
    with pytest.raises(DataError, match=rf"^pooling={value!r}; choose one of mean, sum$"):
        check_choices(backbone=("gin", ("gin",)), pooling=(value, ("mean", "sum")))


@pytest.mark.parametrize("value", [0, -1, 2.0, True, np.True_, "3", None])
def test_what_is_no_count_is_refused(value: Any) -> None:
    with pytest.raises(DataError, match=r"^width=.*; give a whole number of at least 1$"):
        check_counts(1, layers=1, width=value)


@pytest.mark.parametrize("value", [True, np.False_, "0.5", None, (1.0,)])
def test_what_is_no_number_is_refused(value: Any) -> None:
    with pytest.raises(DataError, match=r"^rate=.* is no number; give one, without quotes in a spec$"):
        check_numbers(0, 1, rate=value)


@pytest.mark.parametrize(
    ("ends", "value", "words"),
    [
        ("[]", -0.1, "of at least 0 and of at most 1"),
        ("[]", 1.1, "of at least 0 and of at most 1"),
        ("[)", 1, "of at least 0 and below 1"),
        ("(]", 0.0, "above 0 and of at most 1"),
        ("()", math.nan, "above 0 and below 1"),
    ],
)
def test_numbers_outside_of_their_interval_are_refused(ends: str, value: float, words: str) -> None:
    with pytest.raises(DataError, match=f"^rate={value!r} is out of range: give a number {words}$"):
        check_numbers(0, 1, ends=ends, rate=value)


def test_an_interval_without_end_is_said_by_its_beginning() -> None:
    with pytest.raises(DataError, match=r"^beta=-1 is out of range: give a number of at least 0$"):
        check_numbers(0, beta=-1)
