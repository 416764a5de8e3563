"""Shorter ATen graphs with the same outputs: constants folded, no-ops dropped, work moved to smaller tensors.

A graph captured from a Pyro program carries much that does not depend on its arguments: normalising constants of
priors, checks of supports, zeros that start sums, sums over broadcast axes. For small models, where the time goes into
launching operations, dropping them is worth as much as a compiler and costs milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

__all__ = ["is_random", "simplify"]

_aten = torch.ops.aten
# Filled with one value whatever the values of their tensor arguments.
_FILLS = {
    _aten.zeros_like.default,
    _aten.ones_like.default,
    _aten.full_like.default,
    _aten.new_zeros.default,
    _aten.new_ones.default,
    _aten.new_full.default,
    _aten.fill.Scalar,
}
_ALIASES = {
    _aten.detach.default,
    _aten.alias.default,
    _aten.clone.default,
    _aten.contiguous.default,
    _aten.lift_fresh_copy.default,
    _aten.lift_fresh.default,
    _aten.lift.default,
}
_RESHAPES = {
    _aten.view.default,
    _aten.reshape.default,
    _aten._unsafe_view.default,
    _aten.expand.default,
    _aten._to_copy.default,
}
_TRANSPOSES = {_aten.t.default, _aten.transpose.int, _aten.permute.default}
_ADD, _SUB, _MUL, _DIV = _aten.add.Tensor, _aten.sub.Tensor, _aten.mul.Tensor, _aten.div.Tensor
_NEG, _SUM, _SUM_DIMS = _aten.neg.default, _aten.sum.default, _aten.sum.dim_IntList


def simplify(graph: GraphModule, *examples: Tensor) -> GraphModule:
    """Rewrite a functional graph without changing its outputs beyond rounding.

    Parameters
    ----------
    graph
        Without operations that change their arguments in place.
    examples
        Arguments of the shapes that the graph is for.

    Returns
    -------
    GraphModule
        Fewer operations, same arguments.
    """
    state = torch.get_rng_state()
    try:
        with torch.no_grad():
            return _Rewriter(graph).run(examples)
    finally:
        torch.set_rng_state(state)


class _Constant:
    """A tensor that no argument changes."""

    def __init__(self, value: Tensor) -> None:
        self.value = value

    @property
    def splat(self) -> float | None:
        """The one value that all entries have; None where they differ."""
        value = self.value
        if value.numel() == 0 or value.dtype == torch.bool or value.is_complex():
            return None
        first = value.reshape(-1)[0]
        return float(first) if bool((value == first).all()) else None


class _Rewriter:
    """Partial evaluation of a graph, node by node, into a new one."""

    def __init__(self, graph: GraphModule) -> None:
        self.old = graph
        self.new = Graph()
        self.root = torch.nn.Module()
        self.values: dict[Node, Any] = {}  # example value of every node of the new graph
        self.known: dict[Any, Any] = {}  # common subexpressions
        self.attributes: dict[int, Node] = {}
        self.kept: list[Tensor] = []  # keeps ids of constants from being used again

    def run(self, examples: tuple[Tensor, ...]) -> GraphModule:
        env: dict[Node, Any] = {}
        inputs = iter(examples)
        for node in self.old.graph.nodes:
            if node.op == "placeholder":
                env[node] = self.new.placeholder(node.target)
                self.values[env[node]] = next(inputs)
            elif node.op == "get_attr":
                value = _attribute(self.old, node.target)
                env[node] = _Constant(value) if isinstance(value, Tensor) else self._keep_module(node, value)
            elif node.op == "call_function":
                args = _map(node.args, env)
                kwargs = _map(node.kwargs, env)
                env[node] = self.call(node.target, args, kwargs)
            elif node.op == "output":
                self.new.output(_materialise(_map(node.args[0], env), self._node))
            else:
                raise NotImplementedError(f"graph node {node.op} {node.target}")
        self.new.eliminate_dead_code()
        return GraphModule(self.root, self.new)

    def call(self, target: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Value of an operation: a constant, an earlier node, or a new one."""
        if target in (_aten.view.default, _aten._unsafe_view.default):
            target = _aten.reshape.default  # a copy that was dropped may have made the strides that a view needs
        if target is _aten._linalg_check_errors.default:
            return None
        leaves = _leaves((args, kwargs))
        pure = not is_random(target)
        if pure and (not any(isinstance(leaf, Node) for leaf in leaves) or target in _FILLS):
            result = target(*self._examples(args), **self._examples(kwargs))
            return _wrap_constant(result)
        if pure:
            shorter = self._shorten(target, args, kwargs)
            if shorter is not None:
                return shorter
        return self.emit(target, args, kwargs, pure=pure)

    def emit(self, target: Any, args: Any, kwargs: Any, *, pure: bool = True) -> Node:
        args, kwargs = _materialise(args, self._node), _materialise(kwargs, self._node)
        key = (target, _freeze(args), _freeze(kwargs))
        if pure and key in self.known:
            return self.known[key]
        node = self.new.call_function(target, args, kwargs)
        self.values[node] = target(*self._examples(args), **self._examples(kwargs))
        if pure:
            self.known[key] = node
        return node

    def _shorten(self, target: Any, args: Any, kwargs: Any) -> Any:
        """A shorter way to the value of an operation without randomness; None where none is known."""
        first = args[0]
        if target in _ALIASES:
            return first
        if target is _aten.pow.Tensor_Scalar and args[1] in (1, 2):
            return self._power(first, args[1])
        if target is _aten.masked_fill.Tensor:  # which vmap runs entry by entry
            return self.call(_aten.where.self, (args[1], args[2], first), {})
        if target in (_aten.copy.default, _aten.fill.Tensor):  # so does it this
            return self._copied(first, args[1])
        if target is _aten.as_strided_scatter.default and self._examples(first).is_contiguous():
            return self._scattered(*args)
        if target is _aten.slice_scatter.default and (short := self._within(first, args)) != args:
            return self.call(target, short, kwargs)
        if target is _aten.mul.Scalar:
            return self._scaled(first, args[1])
        if target in (_ADD, _SUB, _MUL, _DIV) and not kwargs and len(args) == 2:
            return self._arithmetic(target, *args)
        if target is _aten.mm.default and isinstance(first, _Constant):
            return self._turned_product(first, args[1])
        if target is _aten.bmm.default:
            return self._batched_product(*args)
        return self._shorten_unary(target, first, args, kwargs) if isinstance(first, Node) else None

    def _shorten_unary(self, target: Any, first: Node, args: Any, kwargs: Any) -> Any:
        """The same for a change of shape, a sign or a sum of one node."""
        if target in _RESHAPES:
            return self._reshaped(target, first, args, kwargs)
        if target is _NEG and first.target is _NEG:
            return first.args[0]
        if target in (_SUM, _SUM_DIMS) and not kwargs:
            return self._sum(target, args)
        if target in _TRANSPOSES:
            return self._permuted(target, args)
        return None

    def _reshaped(self, target: Any, first: Node, args: Any, kwargs: Any) -> Any:
        """Nothing where the shape stays; two reshapes in a row as one."""
        before, after = self.values[first], target(*self._examples(args), **self._examples(kwargs))
        if before.shape == after.shape and before.dtype == after.dtype and before.device == after.device:
            return first
        if target is _aten.reshape.default and first.target is target:
            return self.call(target, (first.args[0], args[1]), {})
        return None

    def _copied(self, target: Any, source: Any) -> Any:
        """A source in the shape and of the type of what it is copied over."""
        into = self._examples(target)
        source = self.call(_aten._to_copy.default, (source,), {"dtype": into.dtype, "device": into.device})
        return self.call(_aten.expand.default, (source, list(into.shape)), {})

    def _scattered(self, target: Any, source: Any, size: Any, stride: Any, offset: int | None = None) -> Any:
        """What is put at places in memory, put at the entries that lie there, since memory differs in batches."""
        into = self._examples(target)
        places = _Constant(torch.arange(into.numel(), device=into.device).as_strided(size, stride, offset).reshape(-1))
        flat = [self.call(_aten.reshape.default, (item, [-1]), {}) for item in (target, source)]
        put = self.call(_aten.index_put.default, (flat[0], [places], flat[1]), {})
        return self.call(_aten.reshape.default, (put, list(into.shape)), {})

    def _within(self, first: Any, args: Any) -> Any:
        """Arguments of a slice whose ends are counted from the left and lie inside, as vmap needs them."""
        rest: list[Any] = [*args[2:], *(0, None, None, 1)[len(args) - 2 :]]
        dim, start, end, step = rest
        start, end, step = slice(start, end, step).indices(self._examples(first).shape[dim])
        return (*args[:2], dim, start, end, step)

    def _power(self, first: Any, exponent: int) -> Any:
        if exponent == 2:
            return self.call(_MUL, (first, first), {})
        return first if isinstance(first, Node) and self.values[first].is_floating_point() else None

    def _scaled(self, first: Any, factor: float) -> Any:
        if factor == 1:
            return first
        dtype = self.values[first].dtype
        return (
            self.call(_MUL, (first, _Constant(torch.tensor(factor, dtype=dtype))), {})
            if dtype.is_floating_point
            else None
        )

    def _arithmetic(self, target: Any, left: Any, right: Any) -> Any:
        left, right = self._number(left, right), self._number(right, left)
        shape, dtype = self._result(target, left, right)
        for one, other, swapped in ((left, right, False), (right, left, True)):
            value = _splat(other)
            if not isinstance(one, Node) or value is None:
                continue
            if self.values[one].shape == shape and self.values[one].dtype == dtype:
                found = self._beside_splat(target, one, other, value, swapped)
                if found is not None:
                    return found
        gathered = self._gather(target, left, right, shape)
        if gathered is not None:
            return gathered
        if target is _DIV and isinstance(right, _Constant) and right.value.is_floating_point():
            return self.call(_MUL, (left, _Constant(right.value.reciprocal())), {})
        if target in (_MUL, _DIV) and _negated(left) and _negated(right):
            return self.call(target, (left.args[0], right.args[0]), {})
        return None

    def _beside_splat(self, target: Any, one: Node, other: Any, value: float, swapped: bool) -> Any:
        """A term beside a constant whose entries are all ``value``: neutral ones go, others become a scalar."""
        additive, multiplicative = target is _ADD or (target is _SUB and not swapped), target is _MUL
        if value == 0 and additive:
            return one
        if value == 1 and (multiplicative or (target is _DIV and not swapped)):
            return one
        if value == -1 and multiplicative:
            return self.call(_NEG, (one,), {})
        if isinstance(other, _Constant) and other.value.dim() > 0 and other.value.dtype == self.values[one].dtype:
            scalar = _Constant(other.value.reshape(-1)[0].clone())
            return self.call(target, (scalar, one) if swapped else (one, scalar), {})
        return None

    def _gather(self, target: Any, left: Any, right: Any, shape: torch.Size) -> Any:
        """Bring constants of nested sums or products together: (x + a) + b, (a x) b, (-x) a."""
        for node, constant, swapped in ((left, right, False), (right, left, True)):
            if not isinstance(node, Node) or not isinstance(constant, _Constant):
                continue
            if self.values[node].shape != shape or self.values[node].dtype != constant.value.dtype:
                continue
            if target is _MUL and node.target is _NEG:
                return self.call(_MUL, (node.args[0], _Constant(-constant.value)), {})
            if len(node.args) != 2 or node.kwargs:
                continue
            found = None
            if target is _MUL and node.target is _MUL:
                found = self._nested_product(node, constant)
            elif target in (_ADD, _SUB) and node.target in (_ADD, _SUB):
                found = self._nested_sum(target, node, constant, swapped)
            if found is not None:
                return found
        return None

    def _nested_product(self, node: Node, constant: _Constant) -> Any:
        one, other = (self._constant(item) for item in node.args)
        for inner, known in ((one, other), (other, one)):
            if isinstance(known, _Constant) and isinstance(inner, Node):
                return self.call(_MUL, (inner, _Constant(known.value * constant.value)), {})
        return None

    def _nested_sum(self, target: Any, node: Node, constant: _Constant, swapped: bool) -> Any:
        """The nested term is sign * inner + known."""
        one, other = (self._constant(item) for item in node.args)
        outer = -1.0 if target is _SUB and swapped else 1.0
        shift = -constant.value if target is _SUB and not swapped else constant.value
        if isinstance(other, _Constant) and isinstance(one, Node):
            known, inner, sign = (other.value if node.target is _ADD else -other.value), one, 1.0
        elif isinstance(one, _Constant) and isinstance(other, Node):
            known, inner, sign = one.value, other, 1.0 if node.target is _ADD else -1.0
        else:
            return None
        total = _Constant(outer * known + shift)
        return self.call(_ADD, (inner, total), {}) if sign * outer > 0 else self.call(_SUB, (total, inner), {})

    def _sum(self, target: Any, args: Any) -> Any:
        """Move what is linear out of a sum, where the summand has the full shape."""
        node = args[0]
        value = self.values[node]
        if value.dim() == 0 or (target is _SUM_DIMS and all(value.shape[dim] == 1 for dim in args[1])):
            shape = target(*self._examples(args)).shape
            return self.call(_aten.reshape.default, (node, list(shape)), {})
        if node.target is _NEG:
            return self.call(_NEG, (self.call(target, (node.args[0], *args[1:]), {}),), {})
        if node.target in (_ADD, _SUB) and not node.kwargs and len(node.args) == 2:
            return self._sum_of_terms(target, node, args)
        if node.target is _MUL:
            left, right = (self._constant(item) for item in node.args)
            for one, other in ((left, right), (right, left)):
                if isinstance(other, _Constant) and other.value.dim() == 0 and isinstance(one, Node):
                    return self.call(_MUL, (self.call(target, (one, *args[1:]), {}), other), {})
        return None

    def _sum_of_terms(self, target: Any, node: Node, args: Any) -> Any:
        """The sum of a term and a constant as the two sums."""
        shape = self.values[node].shape
        left, right = (self._constant(self._number(item, node)) for item in node.args)
        if any(isinstance(item, Node) and self.values[item].shape != shape for item in (left, right)):
            return None
        if isinstance(left, _Constant) == isinstance(right, _Constant):
            return None
        parts = [
            _Constant(target(item.value.expand(shape), *args[1:]))
            if isinstance(item, _Constant)
            else self.call(target, (item, *args[1:]), {})
            for item in (left, right)
        ]
        kind: Any = node.target
        return self.call(kind, tuple(parts), {})

    def _permuted(self, target: Any, args: Any) -> Any:
        """Any transposition as ``permute``; two in a row as one, or none."""
        node = args[0]
        order = torch.arange(self.values[node].dim())
        if len(order) < 2:
            return node
        probe = torch.empty([1] * len(order)).as_strided([1] * len(order), [int(i) for i in order])
        turned = list(target(probe, *args[1:]).stride())
        if node.target is _aten.permute.default:
            turned = [node.args[1][axis] for axis in turned]
            node = node.args[0]
        if turned == sorted(turned):
            return node
        if target is _aten.permute.default and node is args[0]:
            return None
        return self.call(_aten.permute.default, (node, turned), {})

    def _turned_product(self, left: _Constant, right: Any) -> Any:
        """A constant matrix times a matrix, with the rows of the result, which are chains, stored together."""
        turned = self.call(_aten.permute.default, (right, [1, 0]), {})
        product = self.call(_aten.mm.default, (turned, _Constant(left.value.t())), {})
        return self.call(_aten.permute.default, (product, [1, 0]), {})

    def _batched_product(self, left: Any, right: Any) -> Any:
        """A batch of products with one and the same constant matrix as a single product."""
        if isinstance(right, _Constant) and isinstance(left, Node) and _repeats(right.value):
            chains, rows, inner = self.values[left].shape
            flat = self.call(_aten.reshape.default, (left, [chains * rows, inner]), {})
            product = self.call(_aten.mm.default, (flat, _Constant(right.value[0])), {})
            return self.call(_aten.reshape.default, (product, [chains, rows, right.value.shape[2]]), {})
        if isinstance(left, _Constant) and isinstance(right, Node) and _repeats(left.value):
            turned = self.call(_aten.permute.default, (right, [0, 2, 1]), {})
            product = self._batched_product(turned, _Constant(left.value.transpose(1, 2)))
            return self.call(_aten.permute.default, (product, [0, 2, 1]), {})
        return None

    def _result(self, target: Any, *args: Any) -> tuple[torch.Size, torch.dtype]:
        found = target(*self._examples(args))
        return found.shape, found.dtype

    def _number(self, item: Any, beside: Any) -> Any:
        """A Python number as a constant of the type of what stands beside it."""
        dtype = self.values[beside].dtype if isinstance(beside, Node) else None
        if isinstance(item, int | float) and dtype is not None and dtype.is_floating_point:
            return _Constant(torch.tensor(item, dtype=dtype))
        return item

    def _constant(self, item: Any) -> Any:
        """The constant behind an attribute node, or the item itself."""
        if isinstance(item, Node) and item.op == "get_attr":
            return _Constant(self.values[item])
        return item

    def _node(self, constant: _Constant) -> Node:
        found = self.attributes.get(id(constant.value))
        if found is not None:
            return found
        for node in self.attributes.values():
            value = self.values[node]
            same = value.shape == constant.value.shape and value.dtype == constant.value.dtype
            if same and value.numel() <= 16 and torch.equal(value, constant.value):
                return node
        name = f"constant_{len(self.attributes)}"
        self.root.register_buffer(name, constant.value)
        node = self.new.get_attr(name)
        self.attributes[id(constant.value)] = node
        self.kept.append(constant.value)
        self.values[node] = constant.value
        return node

    def _keep_module(self, node: Node, value: Any) -> Any:
        raise NotImplementedError(f"graph attribute {node.target} of type {type(value).__name__}")

    def _examples(self, item: Any) -> Any:
        def value(leaf: Any) -> Any:
            if isinstance(leaf, _Constant):
                return leaf.value
            return self.values[leaf] if isinstance(leaf, Node) else leaf

        return _apply(item, value)


def _attribute(module: GraphModule, target: str) -> Any:
    found: Any = module
    for name in target.split("."):
        found = getattr(found, name)
    return found


def _apply(item: Any, function: Callable[[Any], Any]) -> Any:
    if isinstance(item, tuple | list):
        return type(item)([_apply(part, function) for part in item])
    if isinstance(item, dict):
        return {key: _apply(part, function) for key, part in item.items()}
    return function(item)


def _map(item: Any, env: dict[Node, Any]) -> Any:
    if not isinstance(item, Node | tuple | list | dict) and hasattr(item, "__iter__") and not isinstance(item, str):
        item = list(item)  # fx's immutable collections
    return _apply(_plain(item), lambda leaf: env[leaf] if isinstance(leaf, Node) else leaf)


def _plain(item: Any) -> Any:
    if isinstance(item, tuple):
        return tuple(_plain(part) for part in item)
    if isinstance(item, list):
        return [_plain(part) for part in item]
    if isinstance(item, dict):
        return {key: _plain(part) for key, part in item.items()}
    return item


def _materialise(item: Any, make: Callable[[_Constant], Node]) -> Any:
    return _apply(item, lambda leaf: make(leaf) if isinstance(leaf, _Constant) else leaf)


def _leaves(item: Any) -> list[Any]:
    found: list[Any] = []
    _apply(item, found.append)
    return found


def _freeze(item: Any) -> Any:
    if isinstance(item, tuple | list):
        return tuple(_freeze(part) for part in item)
    if isinstance(item, dict):
        return tuple(sorted((key, _freeze(part)) for key, part in item.items()))
    return (type(item).__name__, item)


def _wrap_constant(result: Any) -> Any:
    if isinstance(result, Tensor):
        return _Constant(result)
    if isinstance(result, tuple | list):
        return type(result)([_wrap_constant(part) for part in result])
    return result


def _splat(item: Any) -> float | None:
    if isinstance(item, _Constant):
        return item.splat
    return float(item) if isinstance(item, int | float) and not isinstance(item, bool) else None


def _repeats(value: Tensor) -> bool:
    """Whether a batch of matrices holds the same matrix throughout."""
    return value.stride(0) == 0 or value.shape[0] == 1


def _negated(item: Any) -> bool:
    return isinstance(item, Node) and item.target is _NEG


def is_random(target: Any) -> bool:
    """Whether an operation of a graph draws random numbers."""
    tags = getattr(target, "tags", ())
    return torch.Tag.nondeterministic_seeded in tags
