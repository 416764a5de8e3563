"""Checks of options: what passes, and what is said of what does not."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict, Unpack

import numpy as np
import pytest
from annotated_types import Ge, Interval
from numpy.typing import ArrayLike

from probmodels.errors import DataError, SpecError
from probmodels.options import (
    Count,
    Default,
    Fraction,
    NonFinite,
    OneOf,
    Passes,
    Positive,
    Seed,
    check_options,
    checked,
    hint,
    options_of,
    options_schema,
    refuse_unused,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@checked(DataError)
def scored(
    width: Annotated[int, Ge(1)] = 1,
    neighbours: Annotated[int, Ge(0)] = 0,
    rate: Annotated[float, Interval(ge=0, le=1)] = 0.5,
    half_open: Annotated[float, Interval(ge=0, lt=1)] = 0.5,
    positive: Annotated[float, Interval(gt=0, le=1)] = 0.5,
    fraction: Annotated[float, Interval(gt=0, lt=1)] = 0.5,
    beta: Annotated[float, Ge(0), NonFinite()] = 1.0,
    pooling: Annotated[str, OneOf({"mean": 1, "sum": 2})] = "mean",
) -> None:
    """Takes ranges and choices of all kinds."""


def test_what_is_in_range_passes() -> None:
    scored(width=np.int64(3), neighbours=0, rate=0, half_open=np.float32(0.5), positive=1.0, fraction=1e-9)
    scored(beta=math.inf, pooling="sum")


@pytest.mark.parametrize("value", ["max", None, 1])
def test_names_that_are_no_choice_are_refused(value: Any) -> None:
    with pytest.raises(DataError, match=rf"^pooling={value!r}; choose one of mean, sum$"):
        scored(pooling=value)


@pytest.mark.parametrize("value", [0, -1, 2.0, True, np.True_, "3", None])
def test_what_is_no_count_is_refused(value: Any) -> None:
    with pytest.raises(DataError, match=r"^width=.*; give a whole number of at least 1$"):
        scored(width=value)


@pytest.mark.parametrize("value", [True, np.False_, "0.5", None, (1.0,)])
def test_what_is_no_number_is_refused(value: Any) -> None:
    with pytest.raises(DataError, match=r"^rate=.*; give a number of at least 0 and of at most 1$"):
        scored(rate=value)


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("rate", -0.1, "of at least 0 and of at most 1"),
        ("rate", 1.1, "of at least 0 and of at most 1"),
        ("half_open", 1, "of at least 0 and below 1"),
        ("positive", 0.0, "above 0 and of at most 1"),
        ("fraction", math.nan, "above 0 and below 1"),
        ("beta", -1, "of at least 0"),
    ],
)
def test_numbers_outside_of_their_interval_are_refused(option: str, value: float, words: str) -> None:
    with pytest.raises(DataError, match=f"^{option}={value!r}; give a number {words}$"):
        scored(**{option: value})


class Shared(TypedDict, total=False):
    """Options that several functions share.

    Attributes
    ----------
    seed
        Seed of all
        draws.
    draws
        Number of draws.
    """

    seed: Annotated[Seed, Default(0)]
    draws: Annotated[Count | None, Default(None)]


@checked(DataError)
def sample(
    data: np.ndarray,
    path: str | Path | None = None,
    *,
    rank: Count = 4,
    kernel: Annotated[str, OneOf({"matern": 1, "identity": 2})] = "matern",
    lr: Positive = 0.1,
    weight: Annotated[float, Ge(0), NonFinite()] = 1.0,
    share: Fraction = 0.5,
    sizes: Sequence[Count] = (1,),
    batch: int | Mapping[str, int] | None = None,
    flag: bool = False,
    score: Literal["bge", "bdeu"] = "bge",
    loss: Callable[..., float] | str | None = None,
    callbacks: Sequence[Callable[[int], object]] = (),
    region: tuple[float, float] | None = None,
    values: ArrayLike | None = None,
    **options: Unpack[Shared],
) -> dict[str, Any]:
    """Return what it was given.

    Parameters
    ----------
    data
        Data.
    rank, kernel
        Options of the model.
    """
    return {"rank": rank, **options}


DATA = np.zeros(2)
RIGHT = [
    {"rank": np.int64(3)},
    {"lr": 1},
    {"lr": np.float32(0.5)},
    {"weight": math.inf},
    {"sizes": [1, 2]},
    {"sizes": np.array([1, 2])},
    {"values": "anything that numpy takes"},
    {"batch": {"rows": 3}},
    {"batch": None},
    {"flag": True},
    {"loss": max},
    {"callbacks": [max]},
    {"region": [0, 1.5]},
    {"draws": None, "seed": 2**40},
    {"path": Path("x")},
]
WRONG = [
    ({"rank": 0}, "rank=0; give a whole number of at least 1"),
    ({"rank": True}, "rank=True; give a whole number of at least 1"),
    ({"rank": 2.0}, "rank=2.0; give a whole number of at least 1"),
    ({"rank": "2"}, "rank='2'; give a whole number of at least 1"),
    ({"rank": None}, "rank=None; give a whole number of at least 1"),
    (
        {"rank": 10**30},
        "rank=1000000000000000000000000000000; give a whole number of at least 1, less than 2**63 in size",
    ),
    ({"kernel": "mattern"}, "kernel='mattern'; choose one of matern, identity; did you mean 'matern'?"),
    ({"score": ""}, "score=''; choose one of bge, bdeu"),
    ({"lr": math.nan}, "lr=nan; give a number above 0"),
    ({"lr": math.inf}, "lr=inf; give a number above 0"),
    ({"lr": False}, "lr=False; give a number above 0"),
    ({"share": 1}, "share=1; give a number above 0 and below 1"),
    ({"weight": -1}, "weight=-1; give a number of at least 0"),
    ({"sizes": [1, 0]}, "sizes=[1, 0]; give a list, each item a whole number of at least 1"),
    ({"sizes": np.array([1, 0])}, "sizes=array([1, 0]); give a list, each item a whole number of at least 1"),
    ({"sizes": "12"}, "sizes='12'; give a list, each item a whole number of at least 1"),
    (
        {"batch": {"rows": 1.5}},
        "batch={'rows': 1.5}; give a whole number or a table whose values are each a whole number or None",
    ),
    ({"flag": 1}, "flag=1; give true or false"),
    ({"loss": 3}, "loss=3; give a function or a text or None"),
    ({"callbacks": [3]}, "callbacks=[3]; give a list, each item a function"),
    ({"region": [1]}, "region=[1]; give a list of 2 (a number, a number) or None"),
    ({"seed": -1}, "seed=-1; give a whole number of at least 0"),
    ({"draws": 0}, "draws=0; give a whole number of at least 1 or None"),
    ({"path": 3}, "path=3; give a text or a path or None"),
    ({"rnak": 3}, "unknown option 'rnak' of sample; did you mean 'rank'?"),
    ({"data": 3}, "data=3; give an array"),
]


@pytest.mark.parametrize("options", RIGHT, ids=str)
def test_options_that_fit_their_annotations_pass_unchanged(options: dict[str, Any]) -> None:
    found = sample(DATA, **options)
    assert all(found[name] is value for name, value in options.items() if name in found)


@pytest.mark.parametrize(("options", "message"), WRONG, ids=[str(options) for options, _ in WRONG])
def test_options_that_do_not_fit_are_refused_with_name_value_and_remedy(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        sample(**{"data": DATA, **options})


def test_what_is_returned_need_not_be_known_for_the_options_to_be_checked() -> None:
    @checked(DataError)
    def draw(width: Count = 1) -> Figure | None:
        return None

    with pytest.raises(DataError, match="width=0"):
        draw(0)


def test_positional_options_are_checked_as_well() -> None:
    with pytest.raises(DataError, match=r"^path=5; give a text or a path or None$"):
        sample(DATA, 5)


def test_options_that_a_branch_does_not_use_are_refused_unless_at_their_default() -> None:
    refuse_unused(sample, "kernel='identity'", rank=4, lr=0.1)
    with pytest.raises(DataError, match=r"^rank=5 is not used with kernel='identity'; leave it out$"):
        refuse_unused(sample, "kernel='identity'", lr=0.1, rank=5)


def test_shared_options_show_in_the_signature_with_their_defaults() -> None:
    parameters = inspect.signature(sample).parameters
    assert "options" not in parameters
    assert (parameters["seed"].default, parameters["draws"].default) == (0, None)
    assert options_of(sample, skip=1)["seed"].doc == "Seed of all draws."
    assert "data" not in options_of(sample, skip=1)


def test_the_schema_has_ranges_choices_docs_and_leaves_out_what_json_cannot_say() -> None:
    schema = options_schema(sample, skip=1)
    properties = schema["properties"]
    assert schema["additionalProperties"] is False
    assert properties["rank"] == {"type": "integer", "minimum": 1, "default": 4, "description": "Options of the model."}
    assert properties["kernel"]["enum"] == ["matern", "identity"]
    assert properties["lr"]["exclusiveMinimum"] == 0
    assert properties["loss"] == {"anyOf": [{"type": "string"}, {"type": "null"}]}
    assert "data" not in properties


def test_options_of_a_run_are_checked_for_another_error_and_place() -> None:
    with pytest.raises(SpecError, match=r"^\[model\] rank='4'; give a whole number of at least 1$"):
        check_options(sample, {"rank": "4"}, where="[model] ", error=SpecError)


@pytest.mark.parametrize(
    ("word", "known", "message"),
    [("bget", ["bge", "bdeu"], "; did you mean 'bge'?"), ("x", ["bge", "bdeu"], "; known: bge, bdeu"), ("x", [], "")],
)
def test_hints_name_the_closest_or_all(word: str, known: list[str], message: str) -> None:
    assert hint(word, known) == message


@checked(DataError)
def early(level: Annotated[float, Passes(_check_level)] = 1.0, **options: Unpack[Shared]) -> None:
    """Takes a range that stands below it."""


def _check_level(level: float) -> None:
    if level > 2:
        raise SpecError(f"level={level}; the sky is at 2")


def test_what_a_function_checks_is_refused_by_its_message_and_other_options_are_known() -> None:
    early(level=1.5)
    with pytest.raises(DataError, match=r"^level=3.0; the sky is at 2$"):
        early(level=3.0)
    with pytest.raises(DataError, match=r"^level='x'; give a number$"):
        early(level="x")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="unknown option 'lvl' of early; did you mean 'level'"):
        early(lvl=3)  # type: ignore[call-arg]
