"""Copies with other tensors: whatever holds them, shared things stay shared, and the original stays as it was."""

from __future__ import annotations

import functools
import weakref
from collections import OrderedDict, defaultdict, deque, namedtuple
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import nn

from probmodels.errors import ProblemError
from probmodels.inference import Problem
from probmodels.inference.problem import Outer
from probmodels.inference.programs.programs import cast
from probmodels.inference.runtime.tensors import device_of, tensors_of, with_tensors

Pair = namedtuple("Pair", "first second")


@dataclass(frozen=True)
class Frozen:
    value: Any
    label: str = "kept"


@dataclass(frozen=True, slots=True)
class Slotted:
    value: Any


@dataclass
class Derived:
    value: Any
    twice: Any = field(init=False)

    def __post_init__(self) -> None:
        self.twice = self.value


class Plain:
    def __init__(self, value: Any) -> None:
        self.value = value

    def method(self) -> Any:
        return self.value


class Picky(Plain):
    def __new__(cls, value: Any) -> Any:
        return super().__new__(cls)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in vars(self):
            raise AttributeError("set once")
        super().__setattr__(name, value)


class Table(dict):
    """A dict with an attribute."""


def closure(value: Any) -> Any:
    def inner() -> Any:
        return value

    return inner


def default(value: Any) -> Any:
    def inner(x: Any = value, *, y: Any = value) -> Any:
        return x, y

    inner.note = value
    return inner


def table(value: Any) -> Table:
    found = Table(a=value)
    found.other = value
    return found


HOLDERS: dict[str, Any] = {
    "list": lambda x: [x],
    "tuple": lambda x: (1, (x,)),
    "namedtuple": lambda x: Pair(x, "b"),
    "dict": lambda x: {"a": x},
    "ordered": lambda x: OrderedDict(a=x, b=2),
    "default": lambda x: defaultdict(list, a=[x]),
    "proxy": lambda x: MappingProxyType({"a": x}),
    "subclass": table,
    "set": lambda x: {x},
    "frozenset": lambda x: frozenset([x]),
    "deque": lambda x: deque([x], maxlen=3),
    "frozen": Frozen,
    "slotted": Slotted,
    "derived": Derived,
    "object": Plain,
    "picky": Picky,
    "partial": lambda x: functools.partial(print, x, end=x),
    "closure": closure,
    "defaults": default,
    "method": lambda x: Plain(x).method,
    "cached": lambda x: functools.lru_cache(maxsize=7)(closure(x)),
    "distribution": lambda x: dist.Exponential(x).to_event(1),
    "constraint": lambda x: dist.constraints.greater_than(x),
    "transform": lambda x: dist.transforms.AffineTransform(x, x).inv,
}


@pytest.mark.parametrize("name", HOLDERS)
def test_a_tensor_is_found_and_replaced_in(name: str) -> None:
    x = torch.tensor([1.0, 2.0])
    held = HOLDERS[name](x)
    copied = with_tensors(held, lambda tensor: tensor + 1 if tensor is not x and tensor.shape == (2,) else tensor)
    assert any(tensor is x for tensor in tensors_of(held))  # the original holds it still
    assert type(copied) is type(held)
    found = [tensor for tensor in tensors_of(copied) if tensor.shape == (2,)]
    assert found
    assert all(torch.equal(tensor, x + 1) for tensor in found)


def test_what_functions_and_caches_do_stays_the_same() -> None:
    x = torch.tensor(1.0)
    doubled = with_tensors(
        [closure(x), default(x), functools.lru_cache(maxsize=7)(closure(x))], lambda tensor: 2 * tensor
    )
    inner, defaults, cached = doubled
    assert inner() == 2
    assert defaults() == (2, 2)
    assert defaults.note == 2
    assert (inner.__name__, inner.__qualname__, inner.__module__) == ("inner", "closure.<locals>.inner", __name__)
    assert cached() == 2
    assert cached.cache_parameters() == {"maxsize": 7, "typed": False}


def test_what_was_shared_is_shared_and_cycles_close() -> None:
    x = torch.tensor([1.0])
    shared = Plain(x)
    ring: list[Any] = [shared]
    ring.append({"again": ring, "tuple": (ring,), "function": closure(ring), "weak": weakref.ref(shared)})
    copied = with_tensors([ring, shared, (x, Frozen(x))], lambda tensor: tensor + 1)
    new, holder, (value, frozen) = copied
    assert new is not ring
    assert new[0] is holder
    assert holder.value is value is frozen.value
    assert new[1]["again"] is new[1]["tuple"][0] is new[1]["function"]() is new
    assert new[1]["weak"]() is holder
    assert shared.value is x


def test_what_reaches_no_tensor_is_not_copied() -> None:
    plain, marker = Plain(3), object()
    copied = with_tensors([plain, marker, print, Plain, torch.zeros(())], lambda tensor: tensor)
    assert copied[0] is plain
    assert copied[1] is marker
    assert copied[2:4] == [print, Plain]


class Net(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = PyroModule[nn.Linear](2, 2)
        self.norm = nn.BatchNorm1d(2)
        self.scale = PyroParam(torch.ones(2), constraint=dist.constraints.greater_than(torch.zeros(2)))
        self.tied = self.layer.weight
        self.plain = torch.zeros(3)


def test_modules_keep_their_structure_and_own_their_parameters() -> None:
    net = Net()
    net.layer.weight.grad = torch.ones(2, 2)
    for change in (lambda tensor: tensor, lambda tensor: tensor.clone()):
        copied = with_tensors(net, change)
        assert copied.tied is copied.layer.weight
        assert dict(copied.named_parameters()).keys() == dict(net.named_parameters()).keys()
        assert not {id(p) for p in copied.parameters()} & {id(p) for p in net.parameters()}
        assert not {p.data_ptr() for p in copied.parameters()} & {p.data_ptr() for p in net.parameters()}
        assert copied.norm.running_mean is not net.norm.running_mean
        assert torch.equal(copied.layer.weight.grad, torch.ones(2, 2))
        assert isinstance(copied.layer.weight, nn.Parameter)
        with torch.no_grad():
            copied.layer.weight += 1
        assert not torch.equal(copied.layer.weight, net.layer.weight)
        assert torch.equal(copied.layer.weight, copied.tied)
        assert (copied.scale == 1).all()
        assert copied._pyro_context is copied.layer._pyro_context is not net._pyro_context
    meta = with_tensors(net, lambda tensor: tensor.to("meta"))
    assert {tensor.device.type for tensor in tensors_of(meta)} == {"meta"}
    assert {tensor.device.type for tensor in tensors_of(net)} == {"cpu"}


def test_what_cannot_be_copied_is_named() -> None:
    error = type("Trouble", (Exception,), {})("message")
    error.held = torch.zeros(2)
    with pytest.raises(ProblemError, match="a Trouble holds tensors and cannot be copied"):
        with_tensors([error], lambda tensor: tensor)


def model(y: torch.Tensor, *, offset: Frozen) -> None:
    mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 1.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(mu + offset.value, 1.0), obs=y)


class Weighted(Trace_ELBO):
    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = weight


def problem() -> Problem:
    y = torch.tensor([1.0, 2.0])
    options: dict[str, Any] = {"args": (y,), "kwargs": {"offset": Frozen(torch.zeros(()))}}
    inner = Problem("p", model, AutoNormal(model), loss=Weighted(torch.ones(2)), **options)
    kernel = functools.partial(print, init=torch.zeros(3))
    align = closure(torch.zeros(1))
    outer = Outer(Problem("p", model, inner.guide, args=(y,), kwargs=options["kwargs"]), {"mu": None})
    return Problem("p", model, inner.guide, loss=inner.loss, kernel=kernel, align=align, outer=outer, **options)


def test_problems_move_with_all_that_they_hold_except_what_takes_labelled_arrays() -> None:
    before = problem()
    moved = before.to("meta")
    for name in ("args", "kwargs", "loss", "kernel", "outer"):
        assert {t.device.type for t in tensors_of(getattr(moved, name))} == {"meta"}, name
        assert {t.device.type for t in tensors_of(getattr(before, name))} == {"cpu"}, name
    assert moved.align is before.align
    assert moved.outer.problem.args[0] is moved.args[0]
    assert moved.outer.problem.guide is moved.guide
    assert moved.guide is not before.guide
    assert moved.model is before.model
    assert device_of(moved.args) == torch.device("meta")
    assert device_of(3, "a") is None


def test_casts_reach_as_far_and_leave_whole_numbers() -> None:
    before = problem()
    wide = cast(
        Problem("p", model, before.guide, args=(before.args[0], [torch.arange(3)]), loss=before.loss), torch.float64
    )
    assert wide.args[0].dtype == torch.float64
    assert wide.loss.weight.dtype == torch.float64
    assert wide.args[1][0].dtype == torch.int64
