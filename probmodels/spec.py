"""A run written down: a TOML file or a dict that names a method, its data and the calls of model, engine and output.

::

    method = "bayesian_svd"
    [data]
    name = "sst"                 # datasets.load(name, **rest)
    [model]
    rank = 4                     # make_problem(data, **model)
    [inference]
    engine = "mcmc"              # run_mcmc(problem, **rest)
    [output]
    path = "runs/npac"
    rotation = "varimax"         # write_outputs(result, path, **rest)

``guide`` gives the problem an automatic guide in place of its own, for engines that fit one, by name or as a table of
name and options::

    [inference]
    engine = "svi"
    guide = { name = "low_rank", rank = 3 }

A method whose problems are made of something else than a data set has loaders of its own, ``LOADERS`` of its module,
and ``name`` is one of these: see `probmodels.score_composition.specs`. Those of ``FURTHER_LOADERS`` stand beside the
data sets.

``method`` is one of `METHODS`, the entry point of another package, or the dotted path of a module.

Without ``engine`` the first of those that the method names in ``ENGINES`` is taken. Engine ``"bilevel"`` is for methods
whose problem has an outer one.

Every key and every value is checked against the annotations of the function that it goes to, before anything is read
or computed. `probmodels.schema.spec_schema` writes the same down as JSON Schema.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Len

from probmodels.errors import DataError, ProblemError, ResultError, SpecError
from probmodels.methods import ENGINES, METHODS, foreign_code, get_method, refuse_code
from probmodels.options import OneOf, Passes, check_options, checked, hint, options_of

if TYPE_CHECKING:
    from types import ModuleType

    from probmodels.inference.problem import Problem
    from probmodels.inference.result import Result

__all__ = [
    "GUIDED",
    "build_problem",
    "change_spec",
    "check_keys",
    "check_output",
    "engine_of",
    "load_data",
    "load_spec",
    "loaders_of",
    "output_options",
    "own_outputs",
    "read_spec",
    "run_engine",
    "run_spec",
    "spec_of_result",
]

GUIDED = ("svi", "em", "bilevel")  # engines that fit a guide
_TABLES = ("data", "model", "inference", "output")
_LONGEST = 255  # bytes of a file name on most file systems


def _check_read(spec: Mapping[str, Any]) -> None:
    if lacking := [key for key in ("method", *_TABLES) if key not in spec]:
        raise SpecError(f"the spec lacks {', '.join(lacking)}; give what load_spec returns")


Read = Annotated[Mapping[str, Any], Passes(_check_read)]  # a spec that was read and checked


def output_options(*, path: Annotated[str, Len(1)] | None = None, overwrite: bool = False) -> None:
    """The table ``[output]``, beside the options of the method's ``write_outputs``.

    Parameters
    ----------
    path
        Folder for everything that is written.
    overwrite
        Whether to replace a result that lies there.
    """


def read_spec(source: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """Read a spec without checking it: a copy, with all tables present.

    Parameters
    ----------
    source
        Path of a TOML file, or the same as nested mappings.

    Raises
    ------
    SpecError
        If the file cannot be read as TOML, a top-level key is unknown, or a table is something else.
    """
    try:
        found = source if isinstance(source, Mapping) else _read_toml(source)
        spec = {key: _copied(str(key), value) for key, value in found.items()}
    except RecursionError:
        raise SpecError("the spec is nested too deeply") from None
    check_keys("top level", spec, ("method", *_TABLES))
    for table in _TABLES:
        if not isinstance(spec.setdefault(table, {}), dict):
            raise SpecError(f"{table!r} must be a table of keys, not {spec[table]!r}")
    return spec


@checked(SpecError)
def change_spec(spec: dict[str, Any], change: str) -> None:
    """Set one value of a spec that was read and is still to be checked.

    Parameters
    ----------
    spec
        Result of `read_spec`; changed in place.
    change
        Such as ``"model.rank=6"``: the keys that lead to the value, and the value as TOML has it. What is no TOML is
        taken as a text, so that ``model.kernel_space=matern52`` needs no quotes.

    Raises
    ------
    SpecError
        If there is no ``=``, a key is empty, or leads through something that is no table.
    """
    place, equals, text = change.partition("=")
    keys = [key.strip() for key in place.split(".")]
    if not equals or not all(keys):
        raise SpecError(f"{change!r} sets nothing; write a key and a value, such as model.rank=6")
    table = spec
    for depth, key in enumerate(keys[:-1], 1):
        inner = table.setdefault(key, {})
        if not isinstance(inner, dict):
            raise SpecError(f"{change!r}: {'.'.join(keys[:depth])} is {inner!r}, no table")
        table = inner
    try:
        value = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        value = {"value": text.strip()}
    table[keys[-1]] = _copied(place, value["value"] if len(value) == 1 else text.strip())


def load_spec(source: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """Read and check a spec.

    Parameters
    ----------
    source
        Path of a TOML file, or the same as nested mappings.

    Returns
    -------
    dict
        ``method`` and the tables ``data``, ``model``, ``inference``, ``output``, all present.

    Raises
    ------
    SpecError
        If the file cannot be read as TOML; a table, key or value is unknown, missing, of a wrong type or out of range;
        or the engine does not apply to the method.
    """
    spec = read_spec(source)
    if "method" not in spec:
        raise SpecError(f"the spec names no method; add method = one of {', '.join(METHODS)}")
    method = get_method(spec["method"])
    engine = _choose_engine(method, spec)
    if "name" in spec["data"]:
        loader = _loader(method, spec["data"]["name"])
        own = {key: value for key, value in spec["data"].items() if key != "name"}
        _check_table("data", loader, own, ("name",), of=f" of data set {spec['data']['name']!r}")
    elif spec["data"]:
        raise SpecError(f"[data] names no data set; add name = ... to {', '.join(spec['data'])}")
    _check_table("model", method.make_problem, spec["model"], skip=1)
    own = {key: value for key, value in spec["inference"].items() if key not in ("engine", "guide")}
    _check_engine_keys(engine, own)
    _check_table("inference", engine_of(engine), own, ("engine", "guide"), skip=1)
    _guide(spec["inference"])
    check_output(method, spec["output"])
    if hasattr(method, "check_spec"):
        method.check_spec(spec)
    return spec


def check_output(method: ModuleType, table: Mapping[str, Any]) -> None:
    """Check the table ``[output]`` of a method.

    Raises
    ------
    SpecError
        If a key is unknown, or a value of a wrong type or out of range.
    """
    common = options_of(output_options)
    further = {key: value for key, value in table.items() if key not in common}
    own = options_of(method.write_outputs, skip=2) if further and hasattr(method, "write_outputs") else {}
    check_keys("output", table, (*common, *own))
    _check_table("output", output_options, {key: value for key, value in table.items() if key in common})
    if further:
        check_options(method.write_outputs, further, where="[output] ", error=SpecError, known=own)
    _check_path(table.get("path"))


@checked(SpecError)
def spec_of_result(path: str | Path, *, allow_fetch: bool = False) -> dict[str, Any]:
    """The spec that a result file was made from.

    The file may come from anywhere, so that what it says about this machine is left out: where to write, whether to
    replace what lies there, and the folder of checkpoints.

    Parameters
    ----------
    path
        The file, or the folder that `Result.save` wrote.
    allow_fetch
        Whether the spec may name data that lie on other machines.

    Raises
    ------
    ResultError
        If the file cannot be read, or what it holds is no spec.
    SpecError
        If the file holds no spec of its data, which is so for problems that were built by hand; the spec is not valid;
        it names code of another package that is neither imported nor declared as an entry point; or it would fetch
        data and ``allow_fetch`` is False.
    """
    import xarray as xr

    path = Path(path)
    path = path / "result.nc" if path.is_dir() else path
    try:
        with xr.open_dataset(path, engine="netcdf4") as root:
            text = root.attrs.get("spec", "{}")
    except (OSError, ValueError, RuntimeError) as error:
        raise ResultError(f"cannot read {path}: {error}") from error
    try:
        spec = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise ResultError(f"the spec in {path} is damaged: {error}") from error
    if not isinstance(spec, dict):
        raise ResultError(f"the spec in {path} is damaged: it is {spec!r}")
    if "data" not in spec:
        raise SpecError(f"{path} holds no spec of its data, so it cannot be run again from the file alone")
    try:
        spec = read_spec(spec)
        spec["output"] = own_outputs(spec)
        spec["inference"].pop("checkpoint", None)
        refuse_code(spec.get("method", ""), spec["data"].get("name", ""))
        if not allow_fetch:
            _refuse_network(spec)
        return load_spec(spec)
    except SpecError as error:
        raise SpecError(f"the spec in {path}: {error}") from error


def own_outputs(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a spec for the outputs of its method."""
    return {key: value for key, value in spec.get("output", {}).items() if key not in options_of(output_options)}


@checked(SpecError)
def load_data(spec: Read) -> Any:
    """The data of a checked spec.

    Raises
    ------
    SpecError
        If it names none, or is not what `load_spec` returns.
    """
    options = dict(spec["data"])
    if "name" not in options:
        raise SpecError("[data] names no data set; add name = ...")
    return _loader(get_method(spec["method"]), options.pop("name"))(**options)


@checked(SpecError)
def build_problem(spec: Read, data: Any = None) -> Problem:
    """The problem of a checked spec, automatic guide included; ``data`` stands in for what ``[data]`` would load."""
    method = get_method(spec["method"])
    problem = _made(method, spec, load_data(spec) if data is None else data)
    guide = _guide(spec["inference"])
    if guide is None:
        return problem
    from probmodels.guides import with_guide

    return with_guide(problem, **guide)


def _made(method: ModuleType, spec: Mapping[str, Any], data: Any) -> Problem:
    """What the method makes of data; faults of a method of another package are told as such."""
    from probmodels.inference.problem import Problem

    with foreign_code(method, spec["method"], "make_problem", SpecError):
        problem = method.make_problem(data, **spec["model"])
    if not isinstance(problem, Problem):
        raise SpecError(f"method {spec['method']!r}: make_problem returned a {type(problem).__name__}, not a Problem")
    return problem


def run_engine(spec: Mapping[str, Any], problem: Problem, **overrides: Any) -> Result:
    """Run the engine of a checked spec; the spec and its checksum are kept with the result."""
    options = {**spec["inference"], **overrides}
    options.pop("guide", None)  # which build_problem has given to the problem
    result: Result = engine_of(options.pop("engine"))(problem, **options)
    text = json.dumps(spec, sort_keys=True, default=str)
    result.tree.attrs.update(spec=text, spec_sha256=hashlib.sha256(text.encode()).hexdigest())
    return result


def run_spec(source: str | Path | Mapping[str, Any]) -> Result:
    """Load the data, build the problem, run the engine, save the result where ``[output]`` says.

    Parameters
    ----------
    source
        As in `load_spec`.

    Returns
    -------
    Result
        Saved under ``output.path`` if that is given.

    Raises
    ------
    SpecError
        If the spec is not valid; errors of data, problem and engine are their own.
    ResultError
        Before anything is computed, if ``output.path`` holds a result already or cannot be written.
    """
    from probmodels.inference.result import check_target

    spec = load_spec(source)
    path, overwrite = spec["output"].get("path"), spec["output"].get("overwrite", False)
    if path is not None:
        check_target(path, overwrite=overwrite)
    result = run_engine(spec, build_problem(spec))
    if path is not None:
        result.save(path, overwrite=overwrite)
    return result


def loaders_of(method: ModuleType) -> dict[str, Callable[..., Any]]:
    """What may load the data of a method, by name: its own loaders where it has any, or else all data sets."""
    from probmodels.datasets import get_loader, list_loaders

    own: dict[str, Callable[..., Any]] | None = getattr(method, "LOADERS", None)
    further: dict[str, Callable[..., Any]] = getattr(method, "FURTHER_LOADERS", {})
    return {name: get_loader(name) for name in list_loaders()} | further if own is None else own


@checked(SpecError)
def engine_of(name: Annotated[str, OneOf(ENGINES)]) -> Callable[..., Any]:
    """The function of an engine."""
    from probmodels import inference

    return getattr(inference, ENGINES[name])


def check_keys(where: str, table: Mapping[str, Any], known: Iterable[str], *, of: str = "") -> None:
    """Check that all keys of a table are known; ``of`` says for the message what they belong to.

    Raises
    ------
    SpecError
        If one is not; the message names the closest.
    """
    known = tuple(known)
    for key in table:
        if key not in known:
            raise SpecError(f"[{where}] unknown key {key!r}{of}{hint(key, known)}")


def _read_toml(source: str | Path) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(source).read_text(encoding="utf-8"))
    except OSError as error:
        raise SpecError(f"cannot read the spec {str(source)!r}: {error.strerror or error}") from error
    except (TypeError, ValueError) as error:  # text that is no UTF-8, a path with NUL and huge numbers among them
        raise SpecError(f"{source} is not valid TOML: {error}") from error


def _copied(place: str, value: Any) -> Any:
    """A value with containers of its own; texts that no file name and no netCDF attribute can hold are refused."""
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise SpecError(f"{place} has the key {key!r}; keys are texts")
        return {_copied(place, key): _copied(f"{place}.{key}", item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [_copied(place, item) for item in value]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, str) and ("\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value)):
        raise SpecError(f"{place}={value!r} holds a character that is none, NUL or half of a pair; leave it out")
    return value


def _check_table(
    where: str,
    function: Callable[..., Any],
    table: Mapping[str, Any],
    others: tuple[str, ...] = (),
    *,
    skip: int = 0,
    of: str = "",
) -> None:
    """Check a table against the function that takes its values; ``others`` are keys that are checked elsewhere."""
    options = options_of(function, skip=skip)
    check_keys(where, table, (*others, *options), of=of)
    check_options(function, table, where=f"[{where}] ", error=SpecError, known=options)
    lacking = [name for name, option in options.items() if option.required and name not in table]
    if lacking:
        raise SpecError(f"[{where}] needs {', '.join(lacking)}; add {lacking[0]} = ...")


def _choose_engine(method: ModuleType, spec: dict[str, Any]) -> str:
    """The engine that a spec names, or else the first that applies; it is written into the spec."""
    applicable = tuple(method.ENGINES)
    engine = spec["inference"].setdefault("engine", applicable[0])
    if not isinstance(engine, str) or engine not in ENGINES:
        raise SpecError(f"[inference] unknown engine {engine!r}{hint(engine, ENGINES)}")
    if engine not in applicable:
        raise SpecError(
            f"[inference] engine {engine!r} does not apply to {spec['method']!r}; choose one of {', '.join(applicable)}"
        )
    return engine


def _check_engine_keys(engine: str, table: Mapping[str, Any]) -> None:
    """Check that no key belongs to another engine, as where only the engine of a spec was changed."""
    known = options_of(engine_of(engine), skip=1)
    for key in table:
        others = [name for name in ENGINES if key not in known and key in options_of(engine_of(name), skip=1)]
        if others:
            raise SpecError(
                f"[inference] {key!r} is a key of engine {' and '.join(others)}, not of {engine!r}; leave it out"
            )


def _loader(method: ModuleType, name: Any) -> Callable[..., Any]:
    """What loads the data of a method: one of its own loaders where it has any, or else of a data set."""
    from probmodels.datasets import get_loader

    if not isinstance(name, str):
        raise SpecError(f"[data] name={name!r}; give the name of a data set")
    if not hasattr(method, "LOADERS"):
        further: dict[str, Callable[..., Any]] = getattr(method, "FURTHER_LOADERS", {})
        try:
            return further[name] if name in further else get_loader(name)
        except DataError as error:
            raise SpecError(f"[data] {error}") from error
    if name not in method.LOADERS:
        raise SpecError(f"[data] unknown name {name!r}{hint(name, method.LOADERS)}")
    loader: Callable[..., Any] = method.LOADERS[name]
    return loader


def _guide(options: Mapping[str, Any]) -> dict[str, Any] | None:
    """Name and options of the automatic guide that ``[inference]`` asks for; None where it asks for none."""
    if "guide" not in options:
        return None
    engine, given = options["engine"], options["guide"]
    if engine not in GUIDED:
        raise SpecError(f"[inference] engine {engine!r} fits no guide; leave out 'guide', or use one of {GUIDED}")
    guide = {"name": given} if isinstance(given, str) else given
    if not isinstance(guide, Mapping) or not isinstance(guide.get("name"), str):
        raise SpecError(f'[inference] guide = {given!r}; give a name, or a table: guide = {{ name = "low_rank" }}')
    from probmodels.guides.auto import check_guide

    try:
        check_guide(guide["name"], {key: value for key, value in guide.items() if key != "name"})
    except ProblemError as error:
        raise SpecError(f"[inference] {error}") from error
    return dict(guide)


def _check_path(path: str | None) -> None:
    """Check that a folder can have this name."""
    for part in Path(path or ".").parts:
        if len(os.fsencode(part)) > _LONGEST:
            raise SpecError(f"[output] path has a part of {len(os.fsencode(part))} bytes; {_LONGEST} are the most")


def _refuse_network(table: Any, place: str = "") -> None:
    """Refuse what would be read from another machine: addresses, network paths, downloads."""
    for key, value in table.items() if isinstance(table, Mapping) else enumerate(table):
        where = f"{place}.{key}" if place else str(key)
        if isinstance(value, Mapping | list | tuple):
            _refuse_network(value, where)
        remote = isinstance(value, str) and re.search(r"://|^\\\\|^//", value.strip())
        if remote or (key == "download" and value):
            raise SpecError(
                f"{where}={value!r} would be fetched from another machine, on the word of a file alone; "
                "look at it, and pass --allow-fetch (in Python: allow_fetch=True) if that is right"
            )
