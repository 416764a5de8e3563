"""Graphs of the ATen operations that a function runs, written down one by one at little cost.

``make_fx`` of torch does the same and more: it keeps a fake tensor of every operation, which takes several times as
long as the operation itself. Programs that are unrolled over time have thousands.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from probmodels.inference.programs.simplify import simplify

__all__ = ["functional", "record", "with_arguments"]

Formulas = Mapping[Any, Callable[..., Any]]
_LIFTS = {torch.ops.aten.lift_fresh.default, torch.ops.aten.lift_fresh_copy.default, torch.ops.aten.lift.default}


def record(function: Callable[..., Any], *examples: Tensor, formulas: Formulas | None = None) -> GraphModule:
    """Graph of what a function does at its arguments.

    Parameters
    ----------
    function
        Takes tensors, returns a tensor or a nested tuple of tensors.
    examples
        Its arguments.
    formulas
        Operations to write out as others of the same value: functions by operation.

    Returns
    -------
    GraphModule
        With a placeholder per argument; other tensors that the function reads are attributes. Operations in place stay.
    """
    mode = _Recorder(formulas or {})
    arguments = [mode.argument(tensor, f"arg{index}_1") for index, tensor in enumerate(examples)]
    with mode:
        found = function(*arguments)
    mode.graph.output(mode.nodes(found))
    return GraphModule(mode.root, mode.graph)


def functional(graph: GraphModule, *examples: Tensor) -> GraphModule:
    """Graph without operations in place, simplified."""
    with torch.no_grad():
        if _changes_in_place(graph):
            names = sorted({node.target for node in graph.graph.nodes if node.op == "get_attr"})
            constants = [getattr(graph, name) for name in names]
            graph = with_arguments(graph, constants)  # or operations in place on them would be refused
            graph = record(torch.func.functionalize(graph), *constants, *examples)
            _with_attributes(graph, constants)
        return simplify(graph, *examples)


def _with_attributes(graph: GraphModule, tensors: Sequence[Tensor]) -> None:
    """Make the first arguments of a graph its attributes, in place."""
    places = [node for node in graph.graph.nodes if node.op == "placeholder"]
    for place, value in zip(places, tensors, strict=False):
        name = f"constant_argument_{place.name}"
        graph.register_buffer(name, value)
        with graph.graph.inserting_before(next(node for node in graph.graph.nodes if node.op != "placeholder")):
            place.replace_all_uses_with(graph.graph.get_attr(name))
        graph.graph.erase_node(place)
    graph.recompile()


def with_arguments(graph: GraphModule, tensors: Sequence[Tensor]) -> GraphModule:
    """Make attributes of a graph its first arguments, in place."""
    with graph.graph.inserting_before(next(iter(graph.graph.nodes))):
        places = [graph.graph.placeholder(f"lifted_{index}") for index in range(len(tensors))]
    owners = {id(tensor): place for tensor, place in zip(tensors, places, strict=True)}
    for node in list(graph.graph.nodes):
        if node.op == "get_attr" and id(getattr(graph, node.target, None)) in owners:
            node.replace_all_uses_with(owners[id(getattr(graph, node.target))])
            graph.graph.erase_node(node)
    graph.recompile()
    return graph


def _changes_in_place(graph: GraphModule) -> bool:
    """Whether an operation of a graph writes to its arguments or returns a part of their memory to be written to."""
    return any(node.op == "call_function" and _schema_changes(node.target) for node in graph.graph.nodes)


@cache
def _schema_changes(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


@cache
def _composite(target: Any) -> bool:
    return bool(target.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd))


class _Recorder(TorchDispatchMode):
    """Runs operations and writes them down. Tensors are told apart by identity and forgotten when they are freed."""

    def __init__(self, formulas: Formulas) -> None:
        super().__init__()
        self.graph, self.root = Graph(), torch.nn.Module()
        self._formulas, self._writing_out = formulas, False
        self._known: Any = WeakTensorKeyDictionary()
        self._constants = 0

    def argument(self, tensor: Tensor, name: str) -> Tensor:
        """A tensor of its own for an argument."""
        tensor = tensor.detach().requires_grad_(tensor.requires_grad)
        self._known[tensor] = self.graph.placeholder(name)
        return tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation of ATen."""
        kwargs = kwargs or {}
        formula = self._formulas.get(func)
        if formula is not None and not self._writing_out:
            self._writing_out = True
            try:
                with self:
                    return formula(*args, **kwargs)
            finally:
                self._writing_out = False
        if _composite(func):
            with self:
                found = func.decompose(*args, **kwargs)
            if found is not NotImplemented:
                return found
        if func in _LIFTS:  # a tensor made of numbers, new at every call, that may be written to
            found = func(*args)
            self._known[found] = self.graph.call_function(torch.ops.aten.clone.default, (self._node(args[0].clone()),))
            return found
        inputs = self.nodes(args), self.nodes(kwargs)  # before an operation in place changes what they are
        found = func(*args, **kwargs)
        if isinstance(found, Tensor):
            self._known[found] = self.graph.call_function(func, *inputs)
        elif isinstance(found, tuple | list) and any(isinstance(part, Tensor) for part in found):
            node = self.graph.call_function(func, *inputs)
            for index, part in enumerate(found):
                if isinstance(part, Tensor):
                    self._known[part] = self.graph.call_function(operator.getitem, (node, index))
        elif _schema_changes(func):
            self.graph.call_function(func, *inputs)
        return found

    def nodes(self, item: Any) -> Any:
        """Nodes in place of tensors."""
        if isinstance(item, Tensor):
            return self._node(item)
        if isinstance(item, tuple | list):
            parts = [self.nodes(part) for part in item]
            return parts if isinstance(item, list | torch.Size) else tuple(parts)
        if isinstance(item, dict):
            return {key: self.nodes(part) for key, part in item.items()}
        return item

    def _node(self, tensor: Tensor) -> Node:
        """Node of a tensor, an attribute where it comes from elsewhere."""
        node = self._known.get(tensor)
        if node is None:
            name = f"_tensor_constant{self._constants}"
            self._constants += 1
            self.root.register_buffer(name, tensor)
            node = self._known[tensor] = self.graph.get_attr(name)
        return node
