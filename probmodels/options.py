"""Options of loaders, problems and engines: checked in one place against the annotations of the function they go to.

A function whose options a spec may set is decorated with `checked`. Each call then compares every option with its
annotation and range before anything is read or computed::

    @checked(DataError)
    def make_problem(data: xr.DataArray, *, rank: Count = 4, kernel: Annotated[str, OneOf(KERNELS)] = "matern72"):

    make_problem(data, rank=0)       # DataError: rank=0; give a whole number of at least 1
    make_problem(data, rnak=3)       # DataError: unknown option 'rnak'; did you mean 'rank'?

The same annotations give the checks of specs (`check_options`) and their JSON Schema (`options_schema`). Pydantic does
the comparison, strictly: a truth value is no number, a text is no number, nan and infinity are no numbers unless the
annotation carries `NonFinite`, and NumPy's scalars count as what they hold.
"""

from __future__ import annotations

import collections.abc
import difflib
import functools
import inspect
import math
import os
import reprlib
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin

from annotated_types import Ge, Gt, Interval, Len

from probmodels.errors import DataError, ProbmodelsError

__all__ = [
    "Count",
    "Default",
    "Draws",
    "Fraction",
    "Layers",
    "Natural",
    "NonFinite",
    "NonNegative",
    "OneOf",
    "Option",
    "Particles",
    "Passes",
    "Positive",
    "Probability",
    "Seed",
    "Whole",
    "Width",
    "check_options",
    "checked",
    "filled",
    "hint",
    "options_of",
    "options_schema",
    "refuse_unused",
]

_P = ParamSpec("_P")
_R = TypeVar("_R")
_T = TypeVar("_T")

_LARGEST = 2**63 - 1  # what a netCDF attribute and a TOML file can hold
_MISSING = inspect.Parameter.empty

Whole = Annotated[int, Interval(ge=-_LARGEST, le=_LARGEST)]
Count = Annotated[int, Ge(1)]
Natural = Annotated[int, Ge(0)]
Seed = Annotated[int, Ge(0)]
Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Probability = Annotated[float, Interval(ge=0, le=1)]
Fraction = Annotated[float, Interval(gt=0, lt=1)]
Width = Annotated[int, Interval(ge=1, le=10_000)]  # of a network's layers, which decide its memory
Draws = Annotated[int, Interval(ge=1, le=10_000_000)]
Layers = Annotated[int, Interval(ge=0, le=64)]
Particles = Annotated[int, Interval(ge=1, le=1_000_000)]  # draws of a step


@dataclass(frozen=True)
class OneOf:
    """Annotates a text that has to be one of the given names: ``Annotated[str, OneOf(KERNELS)]``."""

    names: Collection[str]

    def __hash__(self) -> int:
        return hash(tuple(self.names))


@dataclass(frozen=True)
class NonFinite:
    """Annotates a number that may be nan or infinite."""


@dataclass(frozen=True)
class Passes:
    """Annotates an option whose parts a function checks: it raises an error of the project for what it refuses.

    The function is called once the type is right; its message names the option.
    """

    check: Callable[[Any], object]


@dataclass(frozen=True)
class Default:
    """Carries the default of an option that is declared in a TypedDict: ``num_samples: Annotated[Count, Default(9)]``.

    A function takes such options with ``**options: Unpack[FitOptions]``.
    """

    value: Any


@dataclass(frozen=True)
class Option:
    """An option of a function.

    Attributes
    ----------
    name
        Name of the parameter.
    annotation
        Its type, with ranges.
    default
        Its default; ``inspect.Parameter.empty`` where it has to be given.
    doc
        What the docstring says about it, in one paragraph.
    """

    name: str
    annotation: Any
    default: Any
    doc: str = ""

    @property
    def required(self) -> bool:
        """Whether it has to be given."""
        return self.default is _MISSING


def checked(error: type[ProbmodelsError], *, keep: bool = False) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Decorate a function so that its options are checked in every call, before its first line runs.

    Parameters
    ----------
    error
        What is raised for an option that is unknown, of a wrong type or out of range. Where the first argument is a
        `Problem`, messages begin with its name; those of an ``__init__`` with the name of the class.
    keep
        For ``make_problem``: whether the options that were given become ``Problem.options`` of what it returns, from
        which a result can be taken back to its problem.
    """

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        signature = inspect.signature(function)
        first = next(iter(signature.parameters), None)
        name = function.__qualname__.removesuffix(".__init__").rpartition(".")[2]

        @functools.wraps(function)
        def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            given = dict(zip(signature.parameters, args, strict=False)) | kwargs
            subject: Any = given.get(first) if first is not None else None
            where = f"{subject.name}: " if type(subject).__name__ == "Problem" else ""
            where = f"{type(given.pop('self')).__name__}: " if first == "self" else where
            given.pop("cls", None)
            check_options(call, given, where=where, error=error, of=f" of {name}")
            found: Any = function(*args, **kwargs)
            return replace(found, options={k: v for k, v in given.items() if k != first}) if keep else found

        call.__dict__["__options_error__"] = error
        expanded = [
            inspect.Parameter(option.name, inspect.Parameter.KEYWORD_ONLY, default=option.default)
            for option in _unpacked(function)
        ]
        if expanded:
            kept = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
            call.__dict__["__signature__"] = signature.replace(parameters=[*kept, *expanded])
        return call

    return decorate


def options_of(function: Callable[..., Any], *, skip: int = 0) -> dict[str, Option]:
    """Options of a function by name, in the order of its signature.

    Parameters
    ----------
    function
        A loader, a ``make_problem`` or an engine.
    skip
        How many leading parameters are no options: 1 for ``make_problem`` and engines, which take data or a problem.
    """
    return dict(list(_options(function).items())[skip:])


def filled(table: type[_T], given: Mapping[str, Any]) -> _T:
    """Options of a TypedDict: those that are given, and the defaults of all others.

    Parameters
    ----------
    table
        The TypedDict, each of whose options has a `Default`.
    given
        Options by name.
    """
    found: Any = {option.name: option.default for option in _declared(table)} | dict(given)
    return found


@functools.cache
def _options(function: Callable[..., Any]) -> dict[str, Option]:
    bound = isinstance(function, functools.partial)
    plain = inspect.unwrap(function.func if isinstance(function, functools.partial) else function)
    hints, docs = _hints(_body(plain)), _documented(plain)
    found = {}
    for name, parameter in inspect.signature(function if bound else plain).parameters.items():
        if parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
            continue
        if name in ("self", "cls"):
            continue
        annotation = hints.get(name, Any)
        annotation = getattr(annotation, "__bound__", None) or annotation  # of a type variable
        found[name] = Option(name, annotation, parameter.default, docs.get(name, ""))
    return found | {option.name: option for option in _unpacked(plain)}


def _body(function: Any) -> Any:
    """The function whose parameters a function or class has."""
    owner: Any = function
    return inspect.unwrap(owner.__init__) if isinstance(function, type) else function


def _hints(function: Any, only: str | None = None) -> dict[str, Any]:
    """Annotations of parameters, or of one; none where a name is there for type checkers only."""
    wanted = {k: v for k, v in function.__annotations__.items() if k != "return" and only in (None, k)}
    given = types.SimpleNamespace(__annotations__=wanted)
    try:
        return typing.get_type_hints(given, getattr(function, "__globals__", None), include_extras=True)
    except NameError:
        return {}


def _unpacked(function: Callable[..., Any]) -> list[Option]:
    """Options that a function takes as ``**options: Unpack[SomeTypedDict]``."""
    body = _body(function)
    for name, parameter in inspect.signature(body).parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            hint_ = _hints(body, name).get(name)  # of others, names may stand further below in the module
            return _declared(get_args(hint_)[0]) if get_origin(hint_) is typing.Unpack else []
    return []


def _declared(table: Any) -> list[Option]:
    """Options of a TypedDict."""
    docs, found = _documented(table), []
    for key, annotation in typing.get_type_hints(table, include_extras=True).items():
        default = [m.value for m in getattr(annotation, "__metadata__", ()) if isinstance(m, Default)]
        found.append(Option(key, annotation, default[0] if default else _MISSING, docs.get(key, "")))
    return found


def _documented(item: Any) -> dict[str, str]:
    """What a NumPy docstring says about each parameter, or that of a TypedDict which this one extends."""
    inherited: dict[str, str] = {}
    for base in getattr(item, "__orig_bases__", ()):
        inherited |= _documented(base)
    if not item.__doc__:
        return inherited
    import docstring_parser

    parsed = docstring_parser.parse(item.__doc__, style=docstring_parser.DocstringStyle.NUMPYDOC)
    return inherited | {
        name.strip(" *"): " ".join((entry.description or "").split())
        for entry in parsed.params
        for name in entry.arg_name.split(",")
    }


def check_options(
    function: Callable[..., Any],
    given: Mapping[str, Any],
    *,
    where: str = "",
    error: type[Exception] = DataError,
    of: str = "",
    known: Iterable[str] | None = None,
) -> None:
    """Check options against the annotations of the function that they are for.

    Parameters
    ----------
    function
        The function.
    given
        Options by name; those that are left out are not looked at.
    where
        What messages begin with, such as ``"[model] "``.
    error
        What is raised.
    of
        What the options belong to, for the message on an unknown one, such as ``" of fit_svi"``.
    known
        Names that may be given; None for all.

    Raises
    ------
    ``error``
        If an option is unknown, of a wrong type or out of range.
    """
    options = _options(function)
    names = list(options) if known is None else list(known)
    for name, value in given.items():
        if name not in options or name not in names:
            kinds = [parameter.kind for parameter in inspect.signature(function).parameters.values()]
            if inspect.Parameter.VAR_KEYWORD in kinds and known is None:
                continue
            raise error(f"{where}unknown option {name!r}{of}{hint(name, names)}")
        annotation = options[name].annotation
        _check(f"{where}{name}", value, annotation, error)
        for mark in getattr(annotation, "__metadata__", ()):
            if isinstance(mark, Passes):
                try:
                    mark.check(value)
                except ProbmodelsError as fault:
                    raise error(f"{where}{fault}") from fault


def _check(path: str, value: Any, annotation: Any, error: type[Exception]) -> None:
    from pydantic import ValidationError

    if annotation is Any:
        return
    try:
        _adapter(annotation).validate_python(value)
    except ValidationError:
        choices = _choices(annotation)
        near = hint(value, choices, otherwise=False) if isinstance(value, str) else ""
        said = _said(annotation)
        if isinstance(value, int) and abs(value) > _LARGEST:
            said += ", less than 2**63 in size"
        verb = "choose " if said.startswith("one of ") else "give "
        raise error(f"{path}={_shown.repr(value)}; {verb}{said}{near}") from None


def refuse_unused(function: Callable[..., Any], branch: str, /, **given: Any) -> None:
    """Refuse options that the branch taken does not use, where they differ from their defaults.

    Parameters
    ----------
    function
        The function, decorated with `checked`.
    branch
        What rules them out, such as ``"source='digits'"``.
    **given
        Values that the function received.

    Raises
    ------
    ``error`` of the function
        For the first of them that is not at its default.
    """
    options = _options(function)
    for name, value in given.items():
        default = options[name].default
        if value is default or (type(value) is type(default) and value == default):
            continue
        error = getattr(function, "__options_error__", DataError)
        raise error(f"{name}={_shown.repr(value)} is not used with {branch}; leave it out")


def options_schema(function: Callable[..., Any], *, skip: int = 0) -> dict[str, Any]:
    """JSON Schema of the options of a function; what no JSON can express is left out.

    Parameters
    ----------
    function, skip
        As in `options_of`.
    """
    properties, required = {}, []
    for name, option in options_of(function, skip=skip).items():
        schema = _json(option.annotation)
        if schema is None:
            continue
        if option.doc:
            schema["description"] = option.doc
        if option.required:
            required.append(name)
        elif isinstance(option.default, bool | int | float | str) and option.default == option.default:
            schema["default"] = option.default
        properties[name] = schema
    found: dict[str, Any] = {"type": "object", "properties": properties, "additionalProperties": False}
    return found | ({"required": required} if required else {})


def hint(word: Any, known: Iterable[Any], *, otherwise: bool = True) -> str:
    """End of a message on an unknown word: the closest of those known, or else, unless told otherwise, all of them."""
    names = [str(name) for name in known]
    close = difflib.get_close_matches(str(word), names, 1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(names)}" if otherwise and names else ""


_shown = reprlib.Repr()
_shown.maxstring = _shown.maxother = 80
_shown.maxlist = _shown.maxtuple = _shown.maxdict = 6


@functools.cache
def _adapter(annotation: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(_strict(annotation))


def _whole(value: Any) -> int:
    import numpy as np

    if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer) or abs(int(value)) > _LARGEST:
        raise ValueError("not a whole number")
    return int(value)


def _number(value: Any) -> float:
    if not math.isfinite(found := _real(value)):
        raise ValueError("not finite")
    return found


def _real(value: Any) -> float:
    import numpy as np

    if isinstance(value, bool | np.bool_) or not isinstance(value, int | float | np.integer | np.floating):
        raise ValueError("not a number")
    if isinstance(value, int) and abs(value) > _LARGEST:  # too large for arrays and files
        raise ValueError("too large")
    return float(value)


def _listed(value: Any) -> Any:
    """What an array holds, as lists in lists."""
    import numpy as np

    return value.tolist() if isinstance(value, np.ndarray) and value.ndim else value


def _strict(annotation: Any) -> Any:
    """The annotation as pydantic is to see it: scalars strictly, classes by instance, arrays as lists."""
    from numpy.typing import ArrayLike

    origin: Any = get_origin(annotation)
    args = get_args(annotation)
    if origin is Annotated:
        return _marked(*args)
    if annotation in (Any, None, type(None), list, tuple, dict, set) or origin is Literal:
        return annotation
    if annotation in (bool, int, float, str):
        return _marked(annotation)
    if _is_function(annotation):
        return Callable[..., Any]
    arrays = get_args(ArrayLike) or (ArrayLike,)  # no union but a name of its own since NumPy 2.5
    union = origin in (Union, types.UnionType)
    if annotation is ArrayLike or _name(annotation) == "NDArray" or (union and all(part in args for part in arrays)):
        return Any
    if union:
        return Union[tuple(_strict(arg) for arg in args)]  # noqa: UP007 -- of a number known at run time only
    return _of_class(annotation, origin, args)


def _marked(inner: Any, *marks: Any) -> Any:
    """A type with its ranges and choices."""
    from pydantic import BeforeValidator, StrictBool, StrictStr

    for mark in marks:
        if isinstance(mark, OneOf):
            return Literal[tuple(mark.names)]
    ranges = [mark for mark in marks if not isinstance(mark, Default | NonFinite | Passes)]
    if inner in (int, float):  # the ranges inside, so that the JSON Schema has them
        finite = not any(isinstance(mark, NonFinite) for mark in marks)
        before = _whole if inner is int else _number if finite else _real
        return Annotated[(inner, *ranges, BeforeValidator(before))]
    strict: Any = StrictBool if inner is bool else StrictStr if inner is str else _strict(inner)
    return Annotated[(strict, *ranges)] if ranges else strict


def _of_class(annotation: Any, origin: Any, args: tuple[Any, ...]) -> Any:
    """Collections with their items, paths, and instances of any other class."""
    from pydantic import BeforeValidator, InstanceOf

    instance: Any = InstanceOf  # of classes that are known at run time only
    if isinstance(annotation, type) and issubclass(annotation, Path):
        return Path
    kind = annotation if origin is None else origin
    if not isinstance(kind, type) or (args and kind.__name__ == "ndarray"):
        return Any
    if args and issubclass(kind, Collection | Iterable):
        generic: Any = kind
        found = generic[tuple(arg if arg is Ellipsis else _strict(arg) for arg in args)]
        return Annotated[found, BeforeValidator(_listed)] if issubclass(kind, Sequence) else found
    return instance[kind]


def _is_function(annotation: Any) -> bool:
    return get_origin(annotation) is collections.abc.Callable or annotation in (Callable, collections.abc.Callable)


def _name(annotation: Any) -> str:
    return str(getattr(annotation, "__name__", getattr(get_origin(annotation), "__name__", "")))


def _choices(annotation: Any) -> list[str]:
    """Texts that an annotation lists."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return [str(arg) for arg in args]
    if origin is Annotated:
        return [name for mark in args[1:] if isinstance(mark, OneOf) for name in mark.names] or _choices(args[0])
    return [name for arg in args for name in _choices(arg)] if origin in (Union, types.UnionType) else []


_WORDS = {
    bool: "true or false",
    str: "a text",
    type(None): "None",
    Any: "anything",
    list: "a list",
    tuple: "a list",
    dict: "a table",
}


def _said(annotation: Any, marks: tuple[Any, ...] = ()) -> str:
    """What an annotation asks for, in words."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        names = [name for mark in args[1:] if isinstance(mark, OneOf) for name in mark.names]
        return f"one of {', '.join(names)}" if names else _said(args[0], args[1:])
    if origin is Literal:
        return f"one of {', '.join(str(arg) for arg in args)}"
    if origin in (Union, types.UnionType):
        said = dict.fromkeys(_said(arg) for arg in args if arg is not type(None))
        return " or ".join([*said, *(["None"] if type(None) in args else [])])
    if isinstance(origin, type) and args and issubclass(origin, Iterable):
        return _said_collection(origin, args, marks)
    return _said_plainly(annotation, marks)


def _said_plainly(annotation: Any, marks: tuple[Any, ...]) -> str:
    if annotation in (int, float):
        return f"a {'whole ' if annotation is int else ''}number{_range(marks, annotation is int)}"
    if _is_function(annotation):
        return "a function"
    if annotation is str and any(isinstance(mark, Len) for mark in marks):
        return "a text that is not empty"
    if annotation in _WORDS:
        return _WORDS[annotation]
    if (isinstance(annotation, type) and issubclass(annotation, Path)) or get_origin(annotation) is os.PathLike:
        return "a path"
    if _name(annotation) == "ndarray":
        return "an array"
    name = _name(annotation) or str(annotation)
    return f"{'an' if name[:1] in 'AEIOU' else 'a'} {name}"


def _said_collection(origin: type, args: tuple[Any, ...], marks: tuple[Any, ...]) -> str:
    least = max((mark.min_length for mark in marks if isinstance(mark, Len)), default=0)
    if issubclass(origin, tuple) and args[-1] is not Ellipsis:
        return f"a list of {len(args)} ({', '.join(_said(arg) for arg in args)})"
    if issubclass(origin, collections.abc.Mapping):
        return "a table" if args[-1] is Any else f"a table whose values are each {_said(args[-1])}"
    return f"a list{f' of at least {least}' if least else ''}, each item {_said(args[0])}"


def _range(marks: Iterable[Any], whole: bool) -> str:
    low, high = "", ""
    for mark in marks:
        if isinstance(mark, Default | NonFinite | Passes):
            continue
        ge, gt, le, lt = (getattr(mark, key, None) for key in ("ge", "gt", "le", "lt"))
        low = f"of at least {_plain(ge)}" if ge is not None else f"above {_plain(gt)}" if gt is not None else low
        high = f"of at most {_plain(le)}" if le is not None else f"below {_plain(lt)}" if lt is not None else high
        if whole and (ge == -_LARGEST or le == _LARGEST):
            low, high = "", ""
    both = " and ".join(part for part in (low, high) if part)
    return f" {both}" if both else ""


def _plain(end: Any) -> str:
    return str(end) if isinstance(end, int) else f"{end:g}"


def _json(annotation: Any) -> dict[str, Any] | None:
    """JSON Schema of an annotation; None where JSON cannot express any of it."""
    from pydantic import PydanticUserError
    from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
    from pydantic_core import PydanticOmit, core_schema

    class Expressible(GenerateJsonSchema):
        """Leaves out what has no JSON form."""

        def handle_invalid_for_json_schema(self, schema: core_schema.CoreSchema, error_info: str) -> JsonSchemaValue:
            raise PydanticOmit

        def json_or_python_schema(self, schema: core_schema.JsonOrPythonSchema) -> JsonSchemaValue:
            if schema["python_schema"]["type"] == "is-instance":  # a class of ours, for which JSON has no form
                raise PydanticOmit
            return super().json_or_python_schema(schema)

    try:
        found = dict(_adapter(annotation).json_schema(schema_generator=Expressible))
    except (PydanticOmit, PydanticUserError):
        return None
    return found
