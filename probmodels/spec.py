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

``guide`` gives the problem an automatic guide in place of its own, for engines that fit one, by name or as a table of
name and options::

    [inference]
    engine = "svi"
    guide = { name = "low_rank", rank = 3 }

A method whose problems are made of something else than a data set has loaders of its own, ``LOADERS`` of its module,
and ``name`` is one of these: see `probmodels.score_composition.specs`.

Without ``engine`` the first of those that apply to the method is taken. Engine ``"bilevel"`` is for methods whose
problem has an outer one.

Every key is checked against the signature of the function that it goes to, before anything is read or computed.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import inspect
import json
import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probmodels.errors import SpecError
from probmodels.methods import METHODS, get_method

if TYPE_CHECKING:
    from probmodels.inference.problem import Problem
    from probmodels.inference.result import Result

__all__ = ["ENGINES", "build_problem", "check_keys", "hint", "load_spec", "run_engine", "run_spec", "spec_of_result"]

ENGINES = {"mcmc": "run_mcmc", "svi": "fit_svi", "em": "fit_em", "bilevel": "fit_bilevel"}
_GUIDED = ("svi", "em", "bilevel")  # engines that fit a guide
_TABLES = ("data", "model", "inference", "output")
_OUTPUT = ("path", "overwrite")


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
        If the file cannot be read as TOML, a table or key is unknown or missing, or the engine does not apply to the
        method.
    """
    if isinstance(source, Mapping):
        spec = copy.deepcopy(dict(source))
    else:
        try:
            spec = tomllib.loads(Path(source).read_text(encoding="utf-8"))
        except OSError as error:
            raise SpecError(f"cannot read the spec {str(source)!r}: {error.strerror or error}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise SpecError(f"{source} is not valid TOML: {error}") from error
    check_keys("top level", spec, ("method", *_TABLES))
    if "method" not in spec:
        raise SpecError(f"the spec names no method; add method = one of {', '.join(METHODS)}")
    for table in _TABLES:
        if not isinstance(spec.setdefault(table, {}), dict):
            raise SpecError(f"{table!r} must be a table of keys, not {spec[table]!r}")
    method = get_method(spec["method"])
    applicable = method.ENGINES
    engine = spec["inference"].setdefault("engine", applicable[0])
    if engine not in ENGINES:
        raise SpecError(f"[inference] unknown engine {engine!r}{hint(engine, ENGINES)}")
    if engine not in applicable:
        raise SpecError(
            f"[inference] engine {engine!r} does not apply to {spec['method']!r}; choose one of {', '.join(applicable)}"
        )
    if "name" in spec["data"]:
        loader = _loader(method, spec["data"]["name"])
        check_keys("data", spec["data"], ("name", *inspect.signature(loader).parameters))
    check_keys("model", spec["model"], _parameters(method.make_problem))
    check_keys("inference", spec["inference"], ("engine", "guide", *_parameters(_engine(engine))))
    _guide(spec["inference"])
    check_keys("output", spec["output"], _OUTPUT)
    return spec


def spec_of_result(path: str | Path) -> dict[str, Any]:
    """The spec that a result file was made from.

    Raises
    ------
    SpecError
        If the file holds none, which is so for problems that were built by hand.
    """
    import xarray as xr

    try:
        with xr.open_dataset(path, engine="netcdf4") as root:
            text = str(root.attrs.get("spec", "{}"))
    except (OSError, ValueError) as error:
        raise SpecError(f"cannot read {path}: {error}") from error
    spec = json.loads(text)
    if "data" not in spec:
        raise SpecError(f"{path} holds no spec of its data, so it cannot be run again from the file alone")
    return load_spec(spec)


def build_problem(spec: Mapping[str, Any], data: Any = None) -> Problem:
    """The problem of a checked spec, automatic guide included; ``data`` stands in for what ``[data]`` would load."""
    method = get_method(spec["method"])
    if data is None:
        options = dict(spec["data"])
        if "name" not in options:
            raise SpecError("[data] names no data set; add name = ...")
        loader = _loader(method, options.pop("name"))
        try:
            inspect.signature(loader).bind(**options)
        except TypeError as error:
            raise SpecError(f"[data] {error}") from error
        data = loader(**options)
    problem: Problem = method.make_problem(data, **spec["model"])
    guide = _guide(spec["inference"])
    if guide is None:
        return problem
    from probmodels.guides import with_guide

    return with_guide(problem, **guide)


def run_engine(spec: Mapping[str, Any], problem: Problem, **overrides: Any) -> Result:
    """Run the engine of a checked spec; the spec and its checksum are kept with the result."""
    options = {**spec["inference"], **overrides}
    options.pop("guide", None)  # which build_problem has given to the problem
    result: Result = _engine(options.pop("engine"))(problem, **options)
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
    path, overwrite = spec["output"].get("path"), bool(spec["output"].get("overwrite", False))
    if path is not None:
        check_target(path, overwrite=overwrite)
    result = run_engine(spec, build_problem(spec))
    if path is not None:
        result.save(path, overwrite=overwrite)
    return result


def _loader(method: Any, name: str) -> Callable[..., Any]:
    """What loads the data of a method: one of its own loaders where it has any, or else of a data set."""
    from probmodels.datasets import get_loader

    if not hasattr(method, "LOADERS"):
        return get_loader(name)
    if name not in method.LOADERS:
        raise SpecError(f"[data] unknown name {name!r}{hint(name, method.LOADERS)}")
    loader: Callable[..., Any] = method.LOADERS[name]
    return loader


def _engine(name: str) -> Callable[..., Any]:
    from probmodels import inference

    return getattr(inference, ENGINES[name])


def _guide(options: Mapping[str, Any]) -> dict[str, Any] | None:
    """Name and options of the automatic guide that ``[inference]`` asks for; None where it asks for none."""
    if "guide" not in options:
        return None
    engine, given = options["engine"], options["guide"]
    if engine not in _GUIDED:
        raise SpecError(f"[inference] engine {engine!r} fits no guide; leave out 'guide', or use one of {_GUIDED}")
    guide = {"name": given} if isinstance(given, str) else given
    if not isinstance(guide, Mapping) or not isinstance(guide.get("name"), str):
        raise SpecError(f'[inference] guide = {given!r}; give a name, or a table: guide = {{ name = "low_rank" }}')
    from probmodels.errors import ProblemError
    from probmodels.guides.auto import check_guide

    try:
        check_guide(guide["name"], set(guide) - {"name"})
    except ProblemError as error:
        raise SpecError(f"[inference] {error}") from error
    return dict(guide)


def _parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    """Names of the parameters that a spec may set: all but the first."""
    return tuple(inspect.signature(function).parameters)[1:]


def check_keys(where: str, table: Mapping[str, Any], known: Iterable[str]) -> None:
    """See that all keys of a table are known.

    Raises
    ------
    SpecError
        If one is not; the message names the closest.
    """
    known = tuple(known)
    for key in table:
        if key not in known:
            raise SpecError(f"[{where}] unknown key {key!r}{hint(key, known)}")


def hint(word: str, known: Iterable[str]) -> str:
    """End of a message on an unknown word: the closest of those known, or all."""
    known = tuple(known)
    close = difflib.get_close_matches(str(word), known, 1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
