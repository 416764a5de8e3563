"""All tensors that an object reaches: found, and replaced in a copy of the object; and the devices that they lie on."""

from __future__ import annotations

import copyreg
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from functools import _lru_cache_wrapper, lru_cache, partial
from types import CellType, FunctionType, MappingProxyType, MethodType, ModuleType
from typing import Any, TypeVar

import torch
from pyro.nn.module import _Context
from torch import Tensor, nn

from probmodels.errors import ProblemError

__all__ = ["device_of", "find_device", "tensors_of", "with_tensors"]

T = TypeVar("T")
_PLAIN = (type(None), bool, int, float, complex, str, bytes, type, ModuleType)
_CONTAINERS = (OrderedDict, defaultdict, dict, list, set)
_NUMERIC = ("numpy", "pandas", "xarray", "scipy", "logging")  # packages whose objects hold no tensors


def tensors_of(*values: Any) -> Iterator[Tensor]:
    """Tensors that values reach, each once, in the order in which they are met.

    Followed are attributes, slots, containers, buffers and parameters of modules, `functools.partial`, bound methods,
    and the defaults and closures of functions; not the globals of modules, nor attributes of classes.
    """
    return (item for item in _Reach(values).objects.values() if isinstance(item, Tensor))


def device_of(*values: Any) -> torch.device | None:
    """Device of the first tensor that values reach; None where there is none."""
    return next((tensor.device for tensor in tensors_of(*values)), None)


def with_tensors(value: T, change: Callable[[Tensor], Tensor]) -> T:
    """A copy of a value in which every tensor that it reaches is replaced, as `tensors_of` finds them.

    What held one tensor, module or object in two places does so in the copy too. Objects that reach no tensor stay the
    same objects, except modules, which are copied always, with parameters of their own. The value is left as it is.

    Parameters
    ----------
    value
        Such as a problem.
    change
        From a tensor to what replaces it, such as the same on another device.

    Raises
    ------
    ProblemError
        If an object that reaches a tensor is of a class that Python cannot copy.
    """
    return _Copies(_Reach([value]), change).of(value)


def find_device(name: str, device: str | torch.device | None) -> torch.device | None:
    """Where to compute; None for where the problem lies.

    Raises
    ------
    ProblemError
        If there is no such device.
    """
    if device is None:
        return None
    try:
        found = torch.device(device)
        torch.zeros(1, device=found).item()  # an error of a device that is not there, or holds no numbers
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = str(error).splitlines()[0]
        raise ProblemError(f"{name}: cannot compute on device={str(device)!r}: {first}; choose 'cpu'") from error
    return found


class _Reach:
    """Objects that values reach, by id; holding them keeps the ids valid.

    Attributes
    ----------
    objects
        All that was met, plain values left out.
    touched
        Ids of those that reach a tensor or are modules.
    buffers
        Ids of the buffers of modules.
    """

    def __init__(self, values: Sequence[Any]) -> None:
        self.objects: dict[int, Any] = {}
        self.buffers: set[int] = set()
        parents: dict[int, list[int]] = {}
        left = [(item, 0) for item in reversed(values)]
        while left:
            item, parent = left.pop()
            if isinstance(item, _PLAIN):
                continue
            parents.setdefault(id(item), []).append(parent)
            if id(item) not in self.objects:
                self.objects[id(item)] = item
                left += [(child, id(item)) for child in reversed(_children(item))]
            if isinstance(item, nn.Module):
                self.buffers |= {id(buffer) for buffer in item._buffers.values() if buffer is not None}
        self.touched = {0}
        up = [key for key, item in self.objects.items() if isinstance(item, Tensor | nn.Module | _Context)]
        while up:
            key = up.pop()
            if key not in self.touched:
                self.touched.add(key)
                up += parents.get(key, [])


class _Copies:
    """Copies under way, by id of the original."""

    def __init__(self, reach: _Reach, change: Callable[[Tensor], Tensor]) -> None:
        self._reach, self._change = reach, change
        self._made: dict[int, Any] = {}

    def of(self, item: Any) -> Any:
        """The copy of an object that was reached, or itself where nothing in it changes."""
        key = id(item)
        if isinstance(item, _PLAIN) or key not in self._reach.touched:
            return item
        if key not in self._made:
            made = self._copy(item)
            self._made.setdefault(key, made)  # where a cycle leads back to it, it has been made meanwhile
        return self._made[key]

    def _copy(self, item: Any) -> Any:
        if isinstance(item, Tensor):
            return self._tensor(item)
        if isinstance(item, FunctionType):
            return self._function(item)
        if isinstance(item, MethodType):
            return MethodType(self.of(item.__func__), self.of(item.__self__))
        if isinstance(item, weakref.ref):
            return weakref.ref(self.of(item()))
        if isinstance(item, _lru_cache_wrapper):
            return lru_cache(**item.cache_parameters())(self.of(item.__wrapped__))
        if isinstance(item, MappingProxyType):
            return MappingProxyType({key: self.of(value) for key, value in item.items()})
        if isinstance(item, frozenset):
            return self._filled(frozenset.__new__(type(item), [self.of(value) for value in item]), item)
        if isinstance(item, tuple):
            return self._filled(tuple.__new__(type(item), [self.of(value) for value in item]), item)
        if isinstance(item, partial):
            arguments = [self.of(value) for value in item.args]
            keywords = {key: self.of(value) for key, value in item.keywords.items()}
            return self._filled(type(item)(self.of(item.func), *arguments, **keywords), item)
        return self._mutable(item)

    def _mutable(self, item: Any) -> Any:
        """An empty copy, known before it is filled, since what it holds may lead back to it."""
        if isinstance(item, CellType):
            made: Any = CellType()
        elif isinstance(item, deque):
            made = type(item)(maxlen=item.maxlen)
        else:
            base = next((kind for kind in _CONTAINERS if isinstance(item, kind)), object)
            try:
                made = base.__new__(type(item))
            except TypeError as error:
                kind = type(item).__qualname__
                raise ProblemError(
                    f"a {kind} holds tensors and cannot be copied ({error}); keep tensors in modules, containers, "
                    "functions or objects of plain classes"
                ) from error
        self._made[id(item)] = made
        if isinstance(item, CellType):
            made.cell_contents = self.of(item.cell_contents)
        elif isinstance(item, dict):
            if isinstance(item, defaultdict):
                made.default_factory = self.of(item.default_factory)
            put = OrderedDict.__setitem__ if isinstance(item, OrderedDict) else dict.__setitem__
            for key, value in dict.items(item):
                put(made, self.of(key), self.of(value))
        elif isinstance(item, list | deque):
            made.extend(self.of(value) for value in item)
        elif isinstance(item, set):
            made.update(self.of(value) for value in item)
        return self._filled(made, item)

    def _filled(self, made: Any, item: Any) -> Any:
        """The copy with the attributes of the original, whatever the class makes of setting them."""
        if hasattr(item, "__dict__"):
            made.__dict__.update({name: self.of(value) for name, value in vars(item).items()})
        for name, value in _slots(item).items():
            object.__setattr__(made, name, self.of(value))
        return made

    def _tensor(self, item: Tensor) -> Tensor:
        if not item.is_leaf:
            return self._change(item)
        value = item.detach()
        made = self._change(value)
        if isinstance(item, nn.Parameter):
            # A copy of its own, since whoever fits the one shall not move the other.
            made = nn.Parameter(made.clone() if made is value else made, requires_grad=item.requires_grad)
        elif made is value:
            made = value.clone() if id(item) in self._reach.buffers else item
        else:
            made = made.requires_grad_(item.requires_grad)
        if item.grad is not None and made is not item:
            made.grad = self._change(item.grad)
        if made is not item:
            self._made[id(item)] = made
            made.__dict__.update({name: self.of(value) for name, value in vars(item).items()})
        return made

    def _function(self, item: FunctionType) -> FunctionType:
        cells = None if item.__closure__ is None else tuple(self.of(cell) for cell in item.__closure__)
        made = FunctionType(item.__code__, item.__globals__, item.__name__, None, cells)
        self._made[id(item)] = made
        made.__defaults__ = self.of(item.__defaults__)
        made.__kwdefaults__ = self.of(item.__kwdefaults__)
        made.__annotations__, made.__qualname__ = item.__annotations__, item.__qualname__
        made.__doc__, made.__module__ = item.__doc__, item.__module__
        made.__dict__.update({name: self.of(value) for name, value in vars(item).items()})
        return made


def _children(item: Any) -> list[Any]:
    """What an object holds, in order."""
    if isinstance(item, FunctionType):
        inside: list[Any] = [item.__defaults__, item.__kwdefaults__, *(item.__closure__ or ())]
    elif isinstance(item, CellType):
        return _content(item)
    elif isinstance(item, MethodType):
        return [item.__func__, item.__self__]
    elif isinstance(item, _lru_cache_wrapper):
        return [item.__wrapped__]
    elif isinstance(item, weakref.ref):
        return [item()] if type(item) is weakref.ref else []
    elif type(item).__module__.partition(".")[0] in _NUMERIC:
        return []
    elif isinstance(item, dict | MappingProxyType):
        inside = [part for pair in item.items() for part in pair]
        inside += [item.default_factory] if isinstance(item, defaultdict) else []
    elif isinstance(item, list | tuple | set | frozenset | deque):
        inside = list(item)
    elif isinstance(item, partial):
        inside = [item.func, *item.args, *item.keywords.values()]
    else:
        inside = []
    attributes = list(vars(item).values()) if hasattr(item, "__dict__") else []
    return [*inside, *attributes, *_slots(item).values()]


def _content(cell: CellType) -> list[Any]:
    try:
        return [cell.cell_contents]
    except ValueError:  # not filled yet
        return []


def _slots(item: Any) -> dict[str, Any]:
    """Values of the slots that classes of an object declare."""
    if isinstance(item, Tensor):
        return {}
    names = copyreg._slotnames(type(item))  # type: ignore[attr-defined]
    return {name: getattr(item, name) for name in names if hasattr(item, name)}
