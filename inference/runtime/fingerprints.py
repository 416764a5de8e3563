"""What decides the numbers of a run, boiled down to JSON, so that a checkpoint is never continued by another program.

Functions count by what they do: bytecode, constants, defaults, the values that they close over, and the functions and
constants of their own module that they name. A changed comment changes nothing; a changed prior does.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import partial
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
from torch import Tensor, nn

__all__ = ["fingerprint"]

_ENGINES = "probmodels.inference"  # kernels, losses and engines of ours go by name


def fingerprint(value: Any) -> Any:
    """JSON-ready description of a value that changes whenever its content does; arrays by shape, dtype and SHA-256.

    Parameters
    ----------
    value
        Arguments, options, functions, modules, or containers of them. Of other objects the class and the attributes
        count; functions of other packages count by name alone.

    Returns
    -------
    object
        Made of dicts, lists, strings, numbers and None.
    """
    return _Description().of(value)


class _Description:
    """One description under way, which enters nothing twice that leads back to itself."""

    def __init__(self) -> None:
        self._inside: set[int] = set()  # objects that are being described
        self._known: set[int] = set()  # functions and classes that were

    def of(self, value: Any) -> Any:
        """JSON-ready description of a value."""
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, Tensor):
            value = value.detach().cpu().numpy()
        if isinstance(value, np.ndarray) and value.dtype != object:
            return f"{value.dtype}{list(value.shape)} {_digest(np.ascontiguousarray(value).tobytes())}"
        if id(value) in self._inside:
            return f"{type(value).__qualname__} within itself"
        self._inside.add(id(value))
        try:
            return self._entered(value)
        finally:
            self._inside.remove(id(value))

    def _entered(self, value: Any) -> Any:
        if isinstance(value, bytes):
            return _digest(value)
        if isinstance(value, Mapping):
            return {str(key): self.of(item) for key, item in value.items()}
        if isinstance(value, set | frozenset):
            return sorted((self.of(item) for item in value), key=json.dumps)
        if isinstance(value, Sequence | np.ndarray):
            return [self.of(item) for item in value]
        if isinstance(value, nn.Module):
            return {"class": self._class(type(value)), "state": self.of(dict(value.state_dict())), **self._plain(value)}
        if callable(value):
            return self._called(value)
        return self._object(value)

    def _called(self, value: Any) -> Any:
        """Description of a function, a method, a class, or an object that can be called."""
        if isinstance(value, partial):
            return [self.of(part) for part in (value.func, value.args, value.keywords)]
        if isinstance(value, FunctionType):
            return self._function(value)
        if isinstance(value, MethodType):
            return [self._function(value.__func__), self.of(value.__self__)]
        if isinstance(value, type):
            return self._class(value)
        if hasattr(value, "__qualname__"):  # builtin: there is no code to see
            return f"{value.__module__}.{value.__qualname__}"
        return self._object(value)

    def _object(self, value: Any) -> Any:
        """Class and attributes of any other object."""
        if hasattr(value, "__dict__") and not isinstance(value, ModuleType):
            return {"class": self._class(type(value)), **{name: self.of(item) for name, item in vars(value).items()}}
        text = repr(value)
        return type(value).__qualname__ if " at 0x" in text or isinstance(value, ModuleType) else text

    def _plain(self, module: nn.Module) -> dict[str, Any]:
        """Options that a module and its parts keep beside their state, such as rates and sizes."""
        kinds = (bool, int, float, str, tuple, list, dict, type(None))
        return {
            f"{prefix}.{name}": self.of(item)
            for prefix, part in module.named_modules()
            for name, item in vars(part).items()
            if name != "training" and not name.startswith("_") and isinstance(item, kinds)
        }

    def _function(self, function: Any) -> str:
        """Name of a function, and a digest of all in reach of it that its author can edit."""
        name = f"{function.__module__}.{function.__qualname__}"
        if id(function) in self._known or function.__module__.startswith(_ENGINES):
            return name
        self._known.add(id(function))
        near = {key: function.__globals__.get(key) for key in sorted(_names(function.__code__))}
        parts = [
            _code(function.__code__),
            self.of(function.__defaults__),
            self.of(function.__kwdefaults__),
            [self.of(_content(cell)) for cell in function.__closure__ or ()],
            [[key, self.of(value)] for key, value in near.items() if _follows(function, value)],
        ]
        return f"{name} {_digest(json.dumps(parts).encode())}"

    def _class(self, kind: type) -> str:
        """Name of a class, and a digest of the methods that it and its bases of the same module define."""
        name = f"{kind.__module__}.{kind.__qualname__}"
        if id(kind) in self._known or kind.__module__.startswith(_ENGINES):
            return name
        self._known.add(id(kind))
        bases = [base for base in kind.__mro__ if base.__module__ == kind.__module__]
        methods = [item for base in bases for item in vars(base).values() if isinstance(item, FunctionType)]
        return f"{name} {_digest(json.dumps([self._function(item) for item in methods]).encode())}"


def _follows(function: Any, value: Any) -> bool:
    """Whether a global that a function names is to be looked into: a plain value, or a function of its own module."""
    if isinstance(value, FunctionType):
        return value.__module__ == function.__module__
    return isinstance(value, bool | int | float | str | Tensor | np.ndarray)


def _names(code: CodeType) -> set[str]:
    """Names that a function and the functions inside it look up outside themselves."""
    return set(code.co_names).union(*(_names(item) for item in code.co_consts if isinstance(item, CodeType)))


def _code(code: CodeType) -> list[Any]:
    """Bytecode, names and constants, without places in the file."""
    constants = [_code(item) if isinstance(item, CodeType) else _constant(item) for item in code.co_consts]
    return [code.co_code.hex(), code.co_names, code.co_varnames, constants]


def _constant(value: Any) -> Any:
    if isinstance(value, frozenset):
        return sorted(map(repr, value))
    return [_constant(item) for item in value] if isinstance(value, tuple) else repr(value)


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _digest(content: bytes) -> str:
    return "sha256:" + hashlib.sha256(content).hexdigest()
