"""A function of one posterior draw, evaluated at all of them: captured once, batched, in chunks of bounded memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from tqdm.auto import tqdm

from probmodels.errors import CaptureError, ProblemError
from probmodels.inference.programs.capture import batch, capture
from probmodels.inference.runtime.ops import chain_seed, isolated

__all__ = ["DrawFunction", "map_draws"]

DrawFunction = Callable[[dict[str, Tensor]], dict[str, Tensor]]

_log = logging.getLogger(__name__)
_aten = torch.ops.aten
_CHUNK_BYTES = 64 * 2**20
_CHUNK_DRAWS = 128
# Draws for which a capture, worth a few hundred calls, does not pay. Random numbers differ between the two ways, so
# that for random functions it must not depend on the number of chains.
_FEW, _FEW_PER_CHAIN = 200, 20


def map_draws(
    function: DrawFunction,
    given: Mapping[str, np.ndarray],
    shape: tuple[int, int],
    *,
    label: str,
    seed: int = 0,
    stream: int = 0,
    random: bool = True,
    moments: Collection[str] = (),
    device: torch.device | None = None,
    progress: bool = False,
) -> dict[str, np.ndarray]:
    """Evaluate a function at every draw.

    The function is captured as a graph and run for many draws at once; where it cannot be captured, as where it
    branches on values, it is called draw by draw, and the reason is logged.

    Parameters
    ----------
    function
        From the values of one draw to tensors by name, of the same names, shapes and types at every draw.
    given
        Arrays (chain, draw, ...).
    shape
        Number of chains and of draws.
    label
        What the log and the progress bar call it.
    seed, stream
        Every chunk of every chain draws random numbers of its own from them. Chunks have a size that depends on the
        model alone, so that the numbers of a chain do not depend on the number of chains; nor on the number of draws,
        from 20 on and but for rejection samplers in the last chunk.
    random
        Whether the function draws random numbers.
    moments
        Names whose values are not kept, but their mean and sd over all draws.
    device
        Where the function computes; None for the CPU.
    progress
        Whether to show a progress bar.

    Returns
    -------
    dict
        Arrays (chain, draw, ...) by name; of ``moments`` arrays (...) as ``<name>`` and ``<name>_sd``.

    Raises
    ------
    ProblemError
        If names or shapes of the results differ between draws.
    """
    num_chains, num_draws = shape
    names = list(given)

    def at(chain: int, draws: Any) -> list[Tensor]:
        return [torch.from_numpy(np.array(given[name][chain, draws])).to(device=device) for name in names]

    def plain(flag: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        return tuple(function(dict(zip(names, values, strict=True))).values())

    out: dict[str, np.ndarray] = {}
    sums: dict[str, np.ndarray] = {}  # of values and of their squares, after the first draw's are taken off
    origin: dict[str, np.ndarray] = {}
    with (
        isolated(chain_seed(seed, 0, stream)),
        torch.no_grad(),
        pyro.validation_enabled(False),
        tqdm(total=num_chains * num_draws, disable=not progress, desc=label, unit="draw", dynamic_ncols=True) as bar,
    ):
        shapes: dict[str, tuple[int, ...]] = {}
        first = function(dict(zip(names, at(0, 0), strict=True)))  # makes the parameters of the model as well
        for name, value in first.items():
            array = value.detach().cpu().numpy()
            shapes[name] = array.shape
            if name in moments:
                origin[name] = array.astype(np.float64)
                sums[name] = np.zeros((2, *array.shape))
            else:
                out[name] = np.empty((*shape, *array.shape), array.dtype)

        def keep(chain: int, draws: Any, values: Mapping[str, Tensor]) -> None:
            for name in shapes.keys() | values.keys():
                if name not in values or name not in shapes:
                    raise ProblemError(f"{label}: site {name!r} does not occur at every draw")
                row = values[name].detach().cpu().numpy()
                if row.shape[isinstance(draws, slice) :] != shapes[name]:
                    raise ProblemError(
                        f"{label}: site {name!r} changes shape between draws, "
                        f"from {shapes[name]} to {row.shape} in chain {chain}, draw {draws}"
                    )
                if name in moments:
                    shifted = (row - origin[name]).reshape(-1, *shapes[name])
                    sums[name] += shifted.sum(0), np.square(shifted).sum(0)
                else:
                    out[name][chain, draws] = row

        try:
            if num_draws < _FEW_PER_CHAIN if random else num_chains * num_draws < _FEW:
                raise CaptureError("a graph would not pay for so few draws")
            flag = torch.zeros((), dtype=torch.bool, device=device)
            graph, size = _batched(plain, flag, at(0, 0), at(num_chains - 1, num_draws - 1))
        except CaptureError as error:
            _log.info("%s: draw by draw, %s", label, error)
            for chain in range(num_chains):
                pyro.set_rng_seed(chain_seed(seed, chain, stream))
                for draw in range(num_draws):
                    keep(chain, draw, function(dict(zip(names, at(chain, draw), strict=True))))
                    bar.update()
            return out | _moments(origin, sums, num_chains * num_draws)
        flags = flag.expand(size).clone()
        for chain in range(num_chains):
            for chunk, start in enumerate(range(0, num_draws, size)):
                stop = min(start + size, num_draws)
                pyro.set_rng_seed(chain_seed(seed, chain, stream, chunk))
                rows = graph(flags, *at(chain, np.arange(start, start + size).clip(max=stop - 1)))
                values = {name: row[: stop - start] for name, row in zip(shapes, rows, strict=True)}
                keep(chain, slice(start, stop), values)
                bar.update(stop - start)
    return out | _moments(origin, sums, num_chains * num_draws)


def _moments(origin: Mapping[str, np.ndarray], sums: Mapping[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
    """Mean and sd from sums of shifted values and of their squares."""
    found = {}
    for name, (total, square) in sums.items():
        found[name] = origin[name] + total / count
        found[f"{name}_sd"] = np.sqrt(np.maximum(square - np.square(total) / count, 0) / max(count - 1, 1))
    return found


def _batched(
    function: Callable[..., Any], flag: Tensor, first: list[Tensor], last: list[Tensor]
) -> tuple[GraphModule, int]:
    """Graph for a chunk of draws, checked against the function at two of them, and the size of the chunk."""
    graph = capture(function, flag, *first, checks=[(flag, *last)])
    varying, noisy = _reach(graph)
    size = int(np.clip(_CHUNK_BYTES // max(_bytes(graph, varying, flag, *first), 1), 1, _CHUNK_DRAWS))
    stacked = [torch.stack([value] * (size - 1) + [other]) for value, other in zip(first, last, strict=True)]
    flags = flag.expand(size).clone()
    batched = batch(_Independent(graph).evaluate, flags, *stacked)
    rows = batched(flags, *stacked)
    for index, values in {0: first, size - 1: last}.items():
        for row, wanted, free in zip(rows, function(flag, *values), noisy, strict=True):
            limit = 1e-8 if wanted.dtype == torch.float64 else 1e-4
            scale = float(wanted.abs().nan_to_num(0, 0, 0).max()) if wanted.numel() else 0.0
            if row[index].shape != wanted.shape or row.dtype != wanted.dtype:
                raise CaptureError("the batched graph gives other shapes than the function")
            if not free and not torch.allclose(row[index], wanted, limit, limit * max(scale, 1e-6), equal_nan=True):
                raise CaptureError("the batched graph differs from the function")
    return batched, size


class _Independent(Interpreter):
    """Runs a graph whose first argument is batched so that ``vmap`` gives every draw random numbers of its own.

    Random operations on arguments that are alike for all draws would give one number to all of them, or be refused.
    """

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Run a node; noise is made out of place, from tensors that are batched."""
        if target is _aten.normal.Tensor_Tensor:
            loc, scale = torch.broadcast_tensors(*args[:2])
            return loc + scale * self._own(torch.empty_like(loc)).normal_()
        if target is _aten.binomial.default:
            args = tuple(self._own(value) for value in args[:2])
        if target in _IN_PLACE:
            return _IN_PLACE[target](self._own(args[0]), *args[1:], **kwargs)
        if target in _PLAIN:
            return _PLAIN[target](*args, **kwargs)
        return super().call_function(target, args, kwargs)

    def evaluate(self, flag: Tensor, *values: Tensor) -> Any:
        """Run the graph."""
        self._flag = flag
        return self.run(flag, *values)

    def _own(self, value: Tensor) -> Tensor:
        return torch.where(self._flag, value, value)


_IN_PLACE: dict[Any, Any] = {
    _aten.bernoulli.p: _aten.bernoulli_.float,
    _aten.cauchy.default: _aten.cauchy_.default,
    _aten.exponential.default: _aten.exponential_.default,
    _aten.geometric.default: _aten.geometric_.default,
    _aten.log_normal.default: _aten.log_normal_.default,
    _aten.normal_functional.default: _aten.normal_.default,
    _aten.random.default: _aten.random_.default,
    _aten.random.to: _aten.random_.to,
    _aten.uniform.default: _aten.uniform_.default,
}

# Operations that vmap knows only for other memory layouts, or not at all, in words that it knows.
_PLAIN: dict[Any, Any] = {
    _aten.copy.default: lambda target, source, *_: source.to(target.dtype).expand_as(target).clone(),
    _aten.fill.Scalar: torch.full_like,
    _aten.slice_scatter.default: lambda target, source, dim=0, start=None, stop=None, step=1: torch.slice_scatter(
        target, source, dim, *slice(start, stop, step).indices(target.shape[dim])
    ),
    _aten.view.default: torch.reshape,
}


def _reach(graph: GraphModule) -> tuple[set[Node], list[bool]]:
    """Nodes that differ between draws, and which outputs random operations reach."""
    varying: set[Node] = set()
    noisy: set[Node] = set()
    for node in graph.graph.nodes:
        drawn = node.op == "call_function" and torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        if drawn or noisy.intersection(node.all_input_nodes):
            noisy.add(node)
        if drawn or node.op == "placeholder" or varying.intersection(node.all_input_nodes):
            varying.add(node)
    outputs = next(node for node in graph.graph.nodes if node.op == "output").args[0]
    return varying, [value in noisy for value in outputs]


def _bytes(graph: GraphModule, varying: set[Node], *values: Tensor) -> int:
    """Bytes of all tensors that one draw needs, which a batch may have to hold at the same time."""

    class Meter(Interpreter):
        total = 0

        def run_node(self, n: Node) -> Any:
            result = super().run_node(n)
            parts = result if isinstance(result, tuple | list) else [result]
            if n in varying and n.op == "call_function":
                self.total += sum(part.numel() * part.element_size() for part in parts if isinstance(part, Tensor))
            return result

    meter = Meter(graph)
    meter.run(*values)
    return meter.total
