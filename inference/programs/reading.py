"""Traces of functions of tensors, in which Python may read some numbers out of tensors and not others.

Python may read numbers out of tensors that depend on no argument and are not random, as ``float(x[0])`` of data does.
Reading any other number ends the trace, with an error that says where it happens; truth values may be read where the
opposite makes the function raise, or changes nothing.
"""

from __future__ import annotations

import contextlib
import logging
import math
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pyro.infer.reparam import stable
from torch import Tensor
from torch.distributions import Distribution
from torch.fx import GraphModule
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from probmodels.inference.programs.formulas import FORMULAS
from probmodels.inference.programs.record import functional, record
from probmodels.inference.programs.simplify import is_random

__all__ = ["LEAVING", "Randomness", "reason", "traced", "where"]

LEAVING = frozenset(getattr(Tensor, name) for name in ("tolist", "numpy", "__array__", "__dlpack__"))
"""What gives the values of a tensor, all at once, to something outside of torch."""

_MOST_TRUTHS = 100  # that a function may read; each is tried
_log = logging.getLogger(__name__)

TensorFunction = Callable[..., Any]


def traced(function: TensorFunction, examples: Sequence[Tensor], others: Sequence[Tensor] = ()) -> GraphModule:
    """Graph of a function as it runs at ``examples``; numbers that vary with ``others`` are not to be read either.

    Pyro's shortcuts that read values give way to the formulas that it has for a trace. Truth values may be read though
    they vary, where the opposite makes the function raise an error, as ``assert`` does, or changes nothing, as a
    warning does. The graph then gives NaN where the function raises.
    """
    trace = _Trace(function, examples, others)
    with contextlib.suppress(_ReadError):
        return trace.graph()
    trace.shortcuts = False
    try:
        return trace.guarded()
    except Exception as error:  # a program may refuse to be traced
        _log.debug("not traced without shortcuts: %s", error)
    trace.shortcuts = True
    return trace.guarded()


class _Trace:
    """Runs of a function at one point, in which values are read in one way or another.

    Attributes
    ----------
    shortcuts
        Whether Pyro may take shortcuts that read values.
    """

    def __init__(self, function: TensorFunction, examples: Sequence[Tensor], others: Sequence[Tensor]) -> None:
        self._function, self._examples, self._others = function, examples, others
        self._state = torch.get_rng_state()
        self.shortcuts = True

    def graph(self, *, truths: bool = False, flip: int | None = None, guards: Sequence[int] = ()) -> GraphModule:
        """Graph of the function; see `_Reading` for what may be read."""

        def run(*arguments: Tensor) -> Any:
            reading = _Reading([*arguments, *self._others], truths=truths, flip=flip)
            return reading.guarded(self._run(arguments, reading), guards)

        return record(run, *self._examples, formulas=FORMULAS)

    def guarded(self) -> GraphModule:
        """Graph that is NaN where a truth value makes the function raise an error.

        Raises
        ------
        _ReadError
            If another truth value matters.
        """
        reading = _Reading([*self._examples, *self._others], truths=True)
        self._run(self._examples, reading)
        guards: list[int] = []
        plain = None
        for place, (_, _, stack) in enumerate(reading.truths):
            if place == _MOST_TRUTHS:
                raise _ReadError(stack, "truth")
            if self._raises(place):
                guards.append(place)
                continue
            plain = plain or self.graph(truths=True)
            if not self._alike(plain, self.graph(truths=True, flip=place)):
                raise _ReadError(stack, "truth")
        return self.graph(truths=True, guards=guards)

    def _alike(self, one: GraphModule, other: GraphModule) -> bool:
        """Whether two graphs are the same as they were traced, or else simplified."""
        return _same(one, other) or _same(*(functional(graph, *self._examples) for graph in (one, other)))

    def _raises(self, flip: int) -> bool:
        try:
            self._run(self._examples, _Reading([*self._examples, *self._others], truths=True, flip=flip))
        except _ReadError:
            raise
        except Exception:
            return True
        return False

    def _run(self, arguments: Sequence[Tensor], reading: _Reading) -> Any:
        torch.set_rng_state(self._state)
        with _unchecked(shortcuts=self.shortcuts), _TensorIndices(), _Leaving(reading), reading:
            return self._function(*arguments)


def _same(one: GraphModule, other: GraphModule) -> bool:
    """Whether two graphs are the same, constants included."""
    if one.code != other.code:
        return False
    left, right = ({**dict(graph.named_parameters()), **dict(graph.named_buffers())} for graph in (one, other))
    return left.keys() == right.keys() and all(_identical(value, right[name]) for name, value in left.items())


def _identical(one: Tensor, other: Tensor) -> bool:
    same = one.shape == other.shape and one.dtype == other.dtype
    return same and torch.allclose(one, other, rtol=0.0, atol=0.0, equal_nan=True)


@contextlib.contextmanager
def _unchecked(*, shortcuts: bool) -> Iterator[None]:
    """No distribution checks its parameters or values, which reads them, and Pyro may be told that this is a trace.

    Pyro's switch decides for distributions that are made after it is turned; these may be older, or ask for checks.
    """
    make, check, state = Distribution.__init__, Distribution._validate_sample, torch._C._get_tracing_state
    shift = stable._safe_shift

    def without(self: Any, batch_shape: Any = (), event_shape: Any = (), validate_args: bool | None = None) -> None:
        make(self, batch_shape, event_shape, validate_args=False)

    Distribution.__init__ = without  # type: ignore[method-assign]
    Distribution._validate_sample = lambda self, value: None  # type: ignore[method-assign]
    if not shortcuts:
        torch._C._get_tracing_state = lambda: True  # type: ignore[assignment, return-value]
        stable._safe_shift = _without_shortcut(shift)  # which asks for no trace
    try:
        yield
    finally:
        Distribution.__init__, Distribution._validate_sample = make, check  # type: ignore[method-assign]
        torch._C._get_tracing_state, stable._safe_shift = state, shift


def _without_shortcut(function: TensorFunction) -> TensorFunction:
    """A function of Pyro's that has a formula for special entries, and a shorter one where there are none: the first.

    The formula gives the value of the shorter one at all other entries.
    """

    def general(*arguments: Tensor) -> Any:
        with _SomeAreSpecial():
            return function(*arguments)

    return general


class _SomeAreSpecial(TorchFunctionMode):
    """Answer yes whenever it is asked whether any entry is true."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation of torch."""
        return True if func is Tensor.any else func(*args, **(kwargs or {}))


class _Reading(TorchDispatchMode):
    """Let Python read numbers and shapes out of tensors that neither depend on some tensors nor are random.

    Memory is what depends, not tensors, so that views of it do too, whichever was written to.

    Parameters
    ----------
    tensors
        What varies.
    truths
        Whether truth values may be read that vary.
    flip
        Which of them is read as its opposite.

    Attributes
    ----------
    truths
        Varying truth values that were read: tensor, value, and where.
    """

    def __init__(self, tensors: Sequence[Tensor], *, truths: bool = False, flip: int | None = None) -> None:
        super().__init__()
        self._varying: set[StorageWeakRef] = set()  # weak references, so that the memory's address is not used again
        self._may_read, self._flip = truths, flip
        self.truths: list[tuple[Tensor, bool, traceback.StackSummary]] = []
        for tensor in tensors:
            self._mark(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation of ATen."""
        kwargs = kwargs or {}
        given = _tensors((args, list(kwargs.values())))
        varies = is_random(func) or any(self.varies(tensor) for tensor in given)
        if torch.Tag.data_dependent_output in func.tags:
            return self._read(func, args, kwargs, varies)
        if torch.Tag.dynamic_output_shape in func.tags and any(map(self.varies, _deciding(func, args, given))):
            raise _ReadError(traceback.extract_stack(), "shape")
        found = func(*args, **kwargs)
        if varies:
            for tensor in [*_tensors(found), *_written(func, args, kwargs)]:
                self._mark(tensor)
        return found

    def guarded(self, found: Any, guards: Sequence[int]) -> Any:
        """What a function returned, NaN where one of some truth values is the opposite."""
        if not guards:
            return found
        truths = [self.truths[place] for place in guards]
        held = torch.stack([truth.reshape(()) == value for truth, value, _ in truths]).all()
        return tree_map_only(Tensor, lambda value: torch.where(held, value, math.nan), found)

    def _read(self, func: Any, args: Any, kwargs: Any, varies: bool) -> Any:
        truth = func is torch.ops.aten._local_scalar_dense.default and args[0].dtype == torch.bool
        if varies and not (truth and self._may_read):
            raise _ReadError(traceback.extract_stack(), "truth" if truth else "value")
        found = func(*args, **kwargs)
        if varies:
            self.truths.append((args[0], found, traceback.extract_stack()))
            found = found != (self._flip == len(self.truths) - 1)
        return found

    def _mark(self, tensor: Tensor) -> None:
        if torch._C._has_storage(tensor):
            self._varying.add(StorageWeakRef(tensor.untyped_storage()))

    def varies(self, tensor: Tensor) -> bool:
        """Whether a tensor may vary; what has no memory of its own, as a sparse tensor, is taken to."""
        return not torch._C._has_storage(tensor) or StorageWeakRef(tensor.untyped_storage()) in self._varying


class _Leaving(TorchFunctionMode):
    """Refuse to give all values of a tensor that varies to Python or numpy: that is no operation of ATen."""

    def __init__(self, reading: _Reading) -> None:
        super().__init__()
        self._reading = reading

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation of torch."""
        if func in LEAVING and self._reading.varies(args[0]):
            raise _ReadError(traceback.extract_stack(), "value")
        return func(*args, **(kwargs or {}))


class _ReadError(Exception):
    """A number that varies was read, perhaps a truth value or a shape.

    It is no RuntimeError, which Pyro would make anew, from its text alone.
    """

    def __init__(self, stack: traceback.StackSummary, what: Literal["value", "truth", "shape"]) -> None:
        super().__init__(what)
        self.stack, self.what = stack, what


class Randomness(TorchDispatchMode):
    """Note the first random operation of a block.

    Attributes
    ----------
    name
        Of the operation.
    line
        Where it is, as the end of a message; None where there is none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.name = ""
        self.line: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation of ATen."""
        if self.line is None and is_random(func):
            self.name, self.line = str(func.overloadpacket).removeprefix("aten."), where(traceback.extract_stack())
        return func(*args, **(kwargs or {}))


def _tensors(item: Any) -> list[Tensor]:
    if isinstance(item, Tensor):
        return [item]
    return [tensor for part in item for tensor in _tensors(part)] if isinstance(item, tuple | list) else []


def _deciding(func: Any, args: Sequence[Any], given: list[Tensor]) -> list[Tensor]:
    """Tensors among the given ones that decide the shape of a result."""
    if func is torch.ops.aten.index.Tensor:
        return [index for index in args[1] if _is_bool(index)]
    return [args[1]] if func is torch.ops.aten.masked_select.default else given


def _written(func: Any, args: Sequence[Any], kwargs: Any) -> list[Tensor]:
    """Arguments that an operation changes in place."""
    named = [(argument, args[place]) for place, argument in enumerate(func._schema.arguments[: len(args)])]
    named += [(argument, kwargs[argument.name]) for argument in func._schema.arguments if argument.name in kwargs]
    changed = [value for argument, value in named if argument.alias_info is not None and argument.alias_info.is_write]
    return _tensors(changed)


class _TensorIndices(TorchFunctionMode):
    """Index by scalar tensors, as ``transition[state]``, without reading their values, which no graph could hold."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation of torch."""
        if func is Tensor.__getitem__:
            value, index = args
            entries = list(index) if isinstance(index, tuple) else [index]
            axes = [e.dim() if _is_bool(e) else 0 if e is None or e is ... else 1 for e in entries]
            for place, entry in enumerate(entries):
                if isinstance(entry, Tensor) and entry.dim() == 0 and not entry.is_floating_point() and axes[place]:
                    after = ... in entries[:place]
                    axis = -sum(axes[place:]) if after else sum(axes[:place])
                    chosen = torch.where(entry < 0, entry + value.shape[axis], entry).reshape(1)
                    value, entries[place] = value.index_select(axis, chosen), 0
            args = (value, tuple(entries))
        return func(*args, **(kwargs or {}))


def _is_bool(entry: Any) -> bool:
    return isinstance(entry, Tensor) and entry.dtype in (torch.bool, torch.uint8)


def reason(error: Exception) -> str:
    """First line of an error; for a value that is read while tracing, where that happens."""
    if not isinstance(error, _ReadError):
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    what = {"shape": "its shapes depend on values, as in indexing with a mask"}
    found = what.get(error.what, "it reads a value out of a tensor, for control flow or by .item()")
    return f"{found}{where(error.stack)}"


def where(stack: Sequence[traceback.FrameSummary]) -> str:
    """The innermost line of a stack that is the user's, else one that is Pyro's, as the end of a message."""
    ours, pythons = Path(__file__).parents[1], Path(contextlib.__file__).parent
    owners: dict[str, Any] = {"": None, "pyro": None, "torch": None}
    first = next((place for place, frame in enumerate(stack) if Path(frame.filename).is_relative_to(ours)), 0)
    for frame in stack[first:]:  # what called us stands before
        path = Path(frame.filename)
        inside = path.is_relative_to(pythons) and "site-packages" not in path.parts
        if frame.line and not inside and not path.is_relative_to(ours):
            owners[next((name for name in ("torch", "pyro") if name in path.parts), "")] = frame
    frame = owners[""] or owners["pyro"]
    return f", at {Path(frame.filename).name}:{frame.lineno}, {frame.line!r}" if frame else ""
