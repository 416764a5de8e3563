"""Fields of scores written down: tables that name closed forms and fitted diffusion models, and combine them.

::

    [data]
    name = "fields"
    target = "both"                      # what is drawn from
    schedule = "linear"                  # of the closed forms
    gamma = [-7.0, 6.0]
    [data.fields.ring]
    kind = "gaussian_mixture"            # GaussianMixture(schedule, means, covariances)
    means = [[0.0, 0.5], [0.0, -0.5], [0.5, 0.0]]
    covariances = 0.001
    [data.fields.bar]
    kind = "uniform_box"
    low = [-0.2, -1.0]
    high = [0.2, 1.0]
    [data.fields.both]
    kind = "product"                     # of fields by their names here
    fields = ["ring", "bar"]

The keys of a table are the parameters of the class or function of `KINDS` that its kind names. Other fields are given
by name, numbers and arrays as they are, or arrays as the path of a ``.npy`` file.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from probmodels.diffusion.fitted import make_field
from probmodels.errors import DataError, ProblemError, ResultError, SpecError
from probmodels.guides.schedules import SCHEDULES, NoiseSchedule
from probmodels.inference.result import Result
from probmodels.options import checked, hint, refuse_unused
from probmodels.scores.closed import GaussianMixture, UniformBox
from probmodels.scores.fields import Field, Mixture, Product, guided, linear_observation, negated, tempered
from probmodels.spec import check_keys

__all__ = ["KINDS", "fitted_field", "load_fields"]

_LARGE = 1e300
_GIVEN = ("linear", "cosine")  # schedules with nothing to learn
# How the parameters of KINDS are read; all others are arrays.
_FIELD = ("conditional", "field", "other", "unconditional")
_NUMBER = ("power", "sd", "strength", "weight")
_PLAIN = ("bridge", "label", "path")


def fitted_field(path: str, label: str | int | None = None) -> Field:
    """Scores of the diffusion model in a folder of results, or of one class of it; see `make_field`."""
    return make_field(Result.load(path), label)


KINDS: dict[str, Callable[..., Field]] = {
    "diffusion": fitted_field,
    "gaussian_mixture": GaussianMixture,
    "guided": guided,
    "linear_observation": linear_observation,
    "mixture": Mixture,
    "negated": negated,
    "product": Product,
    "tempered": tempered,
    "uniform_box": UniformBox,
}


@checked(SpecError)
def load_fields(
    fields: Mapping[str, Any],
    target: str,
    schedule: str = "linear",
    gamma: tuple[float, float] | None = None,
) -> Field:
    """The field that tables describe.

    Parameters
    ----------
    fields
        Name of each field to its table: ``kind`` and the parameters of that one of `KINDS`.
    target
        Name of the field to draw from; those that it is not made of are checked for their keys only.
    schedule
        Schedule of closed forms: ``"linear"``, ``"cosine"``, or the name of a field of kind ``"diffusion"``, whose
        schedule they take. Only fields of one schedule can be combined.
    gamma
        Minus the log signal-to-noise ratio of the first and the last level, -13.3 and 5 for None.

    Raises
    ------
    SpecError
        If a name, a kind or a key is unknown, a key is missing, a value is not what it should be, or fields refer to
        themselves; the message has the table.
    """
    reader = _Reader(fields, schedule, gamma)
    found = reader.build(target, "[data] target", ())
    if not reader.closed_forms:
        refuse_unused(load_fields, f"target={target!r}, of no closed form", schedule=schedule, gamma=gamma)
    kept = {"fields": fields, "target": target, "schedule": schedule, "gamma": gamma}
    found.tables = json.loads(json.dumps(kept, default=_as_lists))
    return found


def _as_lists(value: Any) -> Any:
    """Arrays and other sequences or tables as JSON has them."""
    if isinstance(value, Mapping):
        return dict(value)
    return value.tolist() if hasattr(value, "tolist") else list(value)


class _Reader:
    """Builds fields by name, each once.

    Parameters
    ----------
    fields, schedule, gamma
        As those of `load_fields`.
    """

    def __init__(self, fields: Mapping[str, Any], schedule: str, gamma: tuple[float, float] | None) -> None:
        if not fields:
            raise SpecError("[data] fields must be tables of fields, such as [data.fields.ring]")
        self.tables, self.built = fields, dict[str, Field]()
        for name, table in fields.items():
            _check_table(_place(name), table)
        self._chosen, self._gamma = schedule, gamma
        self._schedule: NoiseSchedule | None = None

    @property
    def closed_forms(self) -> bool:
        """Whether any field that was built has the schedule of closed forms."""
        return self._schedule is not None

    def build(self, name: Any, where: str, users: tuple[str, ...]) -> Field:
        """The field of a name, asked for at a place and on behalf of fields that are being built."""
        if name in users:
            raise SpecError(f"{where}: {name!r} is made of itself: {' -> '.join((*users[users.index(name) :], name))}")
        if not isinstance(name, str) or name not in self.tables:
            raise SpecError(f"{where}: there is no field {name!r}{hint(str(name), self.tables)}")
        if name not in self.built:
            given = dict(self.tables[name])
            kind = KINDS[given.pop("kind")]
            options = {key: self._read(_place(name), key, value, (*users, name)) for key, value in given.items()}
            if "schedule" in inspect.signature(kind).parameters:
                options["schedule"] = self._closed_form_schedule()
            try:
                self.built[name] = kind(**options)
            except (ProblemError, ResultError, DataError) as error:
                raise SpecError(f"{_place(name)} {error}") from error
        return self.built[name]

    def _read(self, where: str, key: str, value: Any, users: tuple[str, ...]) -> Any:
        """One value of a table."""
        place = f"{where} {key}"
        if key in _FIELD:
            return self.build(value, place, users)
        if key == "fields":
            if not isinstance(value, list):
                raise SpecError(f"{place}={value!r}; give a list of names of fields")
            return [self.build(name, place, users) for name in value]
        if key in _NUMBER:
            return _number(place, value)
        if key in _PLAIN:
            if not isinstance(value, str) and not (key == "label" and type(value) is int):
                raise SpecError(f"{place}={value!r}; give a text")
            return value
        return _array(place, value)

    def _closed_form_schedule(self) -> NoiseSchedule:
        if self._schedule is None:
            if self._chosen in _GIVEN:
                try:
                    self._schedule = SCHEDULES[self._chosen](*(self._gamma or ()))
                except ProblemError as error:
                    raise SpecError(f"[data] {error}") from error
            elif self.tables.get(self._chosen, {}).get("kind") != "diffusion":
                raise SpecError(
                    f"[data] schedule={self._chosen!r}; choose one of {_GIVEN}, or name a field of kind 'diffusion'"
                )
            elif self._gamma is not None:
                raise SpecError(f"[data] gamma goes with {_GIVEN}; leave it out with schedule={self._chosen!r}")
            else:
                self._schedule = self.build(self._chosen, "[data] schedule", ()).schedule
        return self._schedule


def _place(name: str) -> str:
    return f"[data.fields.{name}]"


def _check_table(where: str, table: Any) -> None:
    """Check that the kind is known, and its keys are there."""
    if not isinstance(table, Mapping):
        raise SpecError(f"{where} must be a table with a kind, not {table!r}")
    if "kind" not in table:
        raise SpecError(f"{where} has no kind; add kind = one of {', '.join(KINDS)}")
    kind = table["kind"]
    if not isinstance(kind, str) or kind not in KINDS:
        raise SpecError(f"{where} unknown kind {kind!r}{hint(kind, KINDS)}")
    parameters = {name: p for name, p in inspect.signature(KINDS[kind]).parameters.items() if name != "schedule"}
    check_keys(where[1:-1], table, ("kind", *parameters))
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and name not in table:
            raise SpecError(f"{where} has no {name!r}, which kind {kind!r} needs; its keys: {', '.join(parameters)}")


def _number(place: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < _LARGE:
        raise SpecError(f"{place}={value!r}; give a number")
    return float(value)


def _array(place: str, value: Any) -> Tensor:
    """Numbers in double precision, from lists or a file."""
    if isinstance(value, str):
        if Path(value).suffix != ".npy":
            raise SpecError(f"{place}={value!r}; give numbers, or the path of a .npy file")
        try:
            value = np.load(value, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise SpecError(f"{place}: cannot read {value!r}: {error}") from error
    try:
        found = np.asarray(value)
        if found.dtype.kind not in "iuf" or not np.isfinite(found).all():
            raise TypeError
    except (TypeError, ValueError):
        raise SpecError(f"{place}={value!r}; give numbers, in lists of equal lengths") from None
    return torch.as_tensor(found.astype(np.float64))
