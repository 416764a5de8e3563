"""JSON Schema of specs, from the annotations that check them; editors complete and check TOML files with it."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from probmodels.methods import get_method
from probmodels.options import options_schema
from probmodels.spec import GUIDED, engine_of, loaders_of, output_options

__all__ = ["spec_schema"]


def spec_schema(name: str) -> dict[str, Any]:
    """JSON Schema of the specs of a method.

    ``data`` has an alternative for each loader, ``inference`` one for each engine that applies, and its ``guide`` one
    for each automatic guide.

    Parameters
    ----------
    name
        As in `get_method`.

    Raises
    ------
    SpecError
        If there is no such method.
    """
    method = get_method(name)
    loaders = [
        _with(options_schema(loader), {"name": {"const": key}}, ["name"]) for key, loader in loaders_of(method).items()
    ]
    engines = [
        _with(options_schema(engine_of(key), skip=1), _engine(key), [] if key == method.ENGINES[0] else ["engine"])
        for key in method.ENGINES
    ]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"Spec of {name}",
        "description": (method.__doc__ or "").strip().partition("\n")[0],
        "type": "object",
        "properties": {
            "method": {"const": name},
            "data": {"anyOf": loaders},
            "model": options_schema(method.make_problem, skip=1),
            "inference": {"anyOf": engines},
            "output": _output(method),
        },
        "required": ["method"],
        "additionalProperties": False,
    }


def _output(method: ModuleType) -> dict[str, Any]:
    """Where to write, and options of the method's own outputs."""
    common = options_schema(output_options)
    own = options_schema(method.write_outputs, skip=2) if hasattr(method, "write_outputs") else {"properties": {}}
    return common | {"properties": {**common["properties"], **own["properties"]}}


def _engine(name: str) -> dict[str, Any]:
    return {"engine": {"const": name}} | ({"guide": _guides()} if name in GUIDED else {})


def _guides() -> dict[str, Any]:
    """A guide by its name, or by a table of name and options."""
    from probmodels.guides.auto import GUIDES, POLICIES, guide_functions

    tables = []
    for name in (*GUIDES, *POLICIES):
        properties: dict[str, Any] = {"name": {"const": name}}
        for function, own in guide_functions(name):
            known = options_schema(function)["properties"]
            properties |= {option: known[option] for option in own if option in known}
        tables.append({"type": "object", "properties": properties, "required": ["name"], "additionalProperties": False})
    return {"anyOf": [{"enum": [*GUIDES, *POLICIES]}, *tables]}


def _with(schema: dict[str, Any], properties: Mapping[str, Any], required: list[str]) -> dict[str, Any]:
    """A schema of a table with keys more than its function takes."""
    return schema | {
        "properties": {**properties, **schema["properties"]},
        "required": [*required, *schema.get("required", [])],
    }
