"""Functions of tensors captured once as plain ATen graphs, which run without Python programs, handlers and checks.

A capture bakes in all that is not an argument: data, shapes, the branch that was taken. It is therefore compared
with the function itself before it is used, and whoever captures must pass what varies (parameters, minibatches) as
arguments. Random operations stay random: they draw from torch's global generator, in the order of the function.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.grad_mode import _force_original_view_tracking
from torch.fx import GraphModule

from probmodels.errors import CaptureError
from probmodels.inference.programs.reading import reason, traced
from probmodels.inference.programs.record import functional, record, with_arguments

__all__ = ["COMPILERS", "batch", "capture", "compare", "compile_graph", "lift"]

COMPILERS = ("graph", "inductor")

TensorFunction = Callable[..., Any]


def capture(
    function: TensorFunction, *examples: Tensor, checks: Sequence[tuple[Tensor, ...]] = (), rtol: float | None = None
) -> GraphModule:
    """Graph of a function for arguments of the shapes of ``examples``.

    Parameters
    ----------
    function
        Takes tensors, returns a tensor or a tuple of tensors; may call ``torch.autograd.grad`` inside.
    examples
        Arguments to trace with.
    checks
        Further arguments at which graph and function must agree, given the same random numbers.
    rtol
        Largest relative difference; None for ``1e-4`` in single and ``1e-8`` in double precision.

    Returns
    -------
    GraphModule
        Callable with tensors of the same shapes; call it inside ``torch.no_grad()``.

    Raises
    ------
    CaptureError
        If the function branches on values, or graph and function differ.
    """
    try:
        with _tracing():
            graph = functional(traced(function, examples), *examples)
    except Exception as error:  # torch raises many kinds here, all of which mean the same: run the function itself
        raise CaptureError(f"the function cannot be captured as a graph ({reason(error)})") from error
    for arguments in (examples, *checks):
        compare(function, graph, arguments, rtol)
    return graph


def batch(graph: TensorFunction, *examples: Tensor, in_dims: Any = 0) -> GraphModule:
    """Graph that runs a captured graph for a whole batch, one entry per index of the batched arguments' first axis.

    Capturing first and batching after keeps ``vmap`` out of Pyro's handlers, which it cannot enter where discrete
    sites are enumerated.

    Raises
    ------
    CaptureError
        If an operation of the graph cannot be batched.
    """
    try:
        with _tracing():
            batched = record(torch.func.vmap(graph, in_dims=in_dims, randomness="different"), *examples)
            batched = functional(batched, *examples)
    except Exception as error:
        raise CaptureError(f"the graph cannot be batched ({reason(error)})") from error
    return batched


def compile_graph(graph: GraphModule, compiler: str, *examples: Tensor) -> TensorFunction:
    """The graph as it is for ``"graph"``, or as machine code for ``"inductor"``, at seconds and a C++ compiler.

    Raises
    ------
    CaptureError
        If the compiler fails.
    """
    if compiler == "graph":
        return graph
    if compiler != "inductor":
        raise ValueError(f"compiler={compiler!r}; choose one of {COMPILERS}")
    # Random numbers as the graph draws them, which is no slower for the few that a program asks for.
    compiled: TensorFunction = torch.compile(graph, dynamic=False, options={"fallback_random": True})
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compiled(*examples)
    except Exception as error:
        raise CaptureError(f"inductor cannot compile the graph ({reason(error)})") from error
    return compiled


@contextlib.contextmanager
def _tracing() -> Iterator[None]:
    """Quiet, and with gradients of what is written in place by views, not by strides, which differ in batches.

    Networks are traced as the operations that they are made of, not as those of a library.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with _force_original_view_tracking(True), torch.backends.mkldnn.flags(enabled=False):
            yield


def lift(function: TensorFunction, tensors: Sequence[Tensor], *examples: Tensor) -> GraphModule:
    """Graph of a function that reads ``tensors`` from elsewhere, as a function of them and of its arguments.

    Programs keep their parameters in modules, closures and parameter stores. Wherever they are, an operation that reads
    one shows itself to the trace, so that a parameter can be made an argument without its owner being touched.

    Parameters
    ----------
    function
        Takes tensors of the shapes of ``examples``.
    tensors
        Leaf tensors that the function reads.

    Returns
    -------
    GraphModule
        Callable with ``(*tensors, *examples)``; not simplified, so that `capture` can follow.

    Raises
    ------
    CaptureError
        If the function branches on values.
    """
    try:
        with _tracing():
            graph = traced(function, examples, tensors)
    except Exception as error:
        raise CaptureError(f"the function cannot be captured as a graph ({reason(error)})") from error
    return with_arguments(graph, tensors)


def compare(function: TensorFunction, graph: TensorFunction, arguments: Sequence[Tensor], rtol: float | None) -> None:
    """Call function and graph with the same arguments and random numbers, whose state is left as it was.

    Raises
    ------
    CaptureError
        If the graph fails where the function does not, or an output differs by more than ``rtol``, or the default of
        `capture` for None. Errors of the function itself come through as they are.
    """
    state = torch.get_rng_state()
    try:
        wanted = _flat(function(*arguments))
        torch.set_rng_state(state)
        try:
            with torch.no_grad():
                found = _flat(graph(*arguments))
        except Exception as error:
            raise CaptureError(
                f"the graph fails where the function does not ({reason(error)}): shapes depend on values"
            ) from error
    finally:
        torch.set_rng_state(state)
    if len(wanted) != len(found):
        raise CaptureError(f"the graph returns {len(found)} tensors where the function returns {len(wanted)}")
    for index, (left, right) in enumerate(zip(wanted, found, strict=True)):
        limit = rtol if rtol is not None else (1e-8 if left.dtype == torch.float64 else 1e-4)
        scale = left.abs().nan_to_num(0, 0, 0).max().item() if left.numel() else 0.0
        if left.shape != right.shape or not torch.allclose(
            left, right, rtol=limit, atol=limit * max(scale, 1e-6), equal_nan=True
        ):
            raise CaptureError(
                f"output {index} of the graph differs from the function's: something other than the arguments changes "
                "between calls (random subsets, counters, branches on values)"
            )


def _flat(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [item for part in value for item in _flat(part)]
