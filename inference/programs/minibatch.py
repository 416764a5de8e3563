"""Random subsets of plates: which rows a step sees, fixed from outside for model and guide alike."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from numbers import Integral
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.subsample_messenger import SubsampleMessenger, _Subsample
from torch import Tensor

from probmodels.errors import ProblemError
from probmodels.inference.problem import Problem
from probmodels.inference.runtime.ops import chain_seed, isolated
from probmodels.inference.runtime.tensors import device_of
from probmodels.options import hint

__all__ = ["Minibatches", "plate_sizes", "subsampled", "whole"]

_choose = SubsampleMessenger._subsample  # pyro's own, so that the innermost block decides
_STREAM = 2  # random stream of a run, beside those of its steps and draws


class Minibatches:
    """Indices of the rows that every step sees.

    Every epoch has a random order of its own, which is cut into batches of one size; what is left over at its end is
    left to later epochs. So every batch is a uniformly random subset without replacement, and a step's loss is unbiased
    for that of all data. Indices depend on seed and step alone.

    Parameters
    ----------
    problem
        Names the plates in ``batch_plates``.
    batch_size
        Rows of every batch plate, or of each by name; None for all rows.
    seed
        Seed of the run.

    Raises
    ------
    ProblemError
        If a plate is unknown or not declared, or a size does not fit it.
    """

    def __init__(self, problem: Problem, batch_size: int | Mapping[str, int] | None, seed: int) -> None:
        self.seed = seed
        self.device = device_of(problem.args, problem.kwargs, problem.model)
        self.sizes: dict[str, tuple[int, int]] = {}  # plate: (rows, rows of a batch)
        self._epochs: dict[str, tuple[int, tuple[Tensor, ...]]] = {}
        if batch_size is None:
            return
        name, plates = problem.name, plate_sizes(problem)
        if not problem.batch_plates:
            raise ProblemError(
                f"{name}: batch_size={batch_size} needs to know which plate holds the data; give the problem "
                f"batch_plates=(...) from {sorted(plates)}"
            )
        wanted: Mapping[str, Any] = (
            batch_size if isinstance(batch_size, Mapping) else dict.fromkeys(problem.batch_plates, batch_size)
        )
        for plate, size in wanted.items():
            if plate not in problem.batch_plates:
                near = hint(plate, problem.batch_plates)
                raise ProblemError(f"{name}: batch_size names {plate!r}, which is none of its batch_plates{near}")
            if plate not in plates:
                raise ProblemError(f"{name}: batch plate {plate!r} is no plate of the model; it has {sorted(plates)}")
            if isinstance(size, bool) or not isinstance(size, Integral) or not 1 <= int(size) <= plates[plate]:
                raise ProblemError(
                    f"{name}: batch_size={size!r} for plate {plate!r}; choose an integer from 1 to {plates[plate]}"
                )
            self.sizes[plate] = (plates[plate], int(size))

    def at(self, step: int) -> dict[str, Tensor]:
        """Indices of a step, counted from 0: plate to integers (rows of a batch,)."""
        return {plate: self._plate(place, plate, step) for place, plate in enumerate(self.sizes)}

    def _plate(self, place: int, plate: str, step: int) -> Tensor:
        rows, size = self.sizes[plate]
        if size == rows:  # in order, since pyro picks a parameter's rows only where a plate lacks some
            return torch.arange(rows, device=self.device)
        epoch, turn = divmod(step, rows // size)
        known = self._epochs.get(plate)
        if known is None or known[0] != epoch:
            generator = torch.Generator().manual_seed(chain_seed(self.seed, _STREAM, place, epoch))
            order = torch.randperm(rows, generator=generator).to(self.device)
            known = self._epochs[plate] = (epoch, order.split(size))
        return known[1][turn]

    def check(self, problem: Problem, program: Any) -> None:
        """Check that a program takes the rows that it is given, and no others.

        Parameters
        ----------
        problem
            Holds the arguments.
        program
            The model, inside the parameter store that holds its parameters.

        Raises
        ------
        ProblemError
            If a plate is not made inside the model, or an observed site holds other rows than those chosen.
        """
        if not self.sizes:
            return
        first, again = (_observed(problem, program, whole(problem)()) for _ in range(2))
        indices = self.at(0)
        found = _observed(problem, program, subsampled(indices))
        self._check_plates(problem, [frame for _, _, stack in found.values() for frame in stack])
        for site, (value, num_event, stack) in found.items():
            plates = [frame.name for frame in stack if frame.name in indices]
            if not plates or site not in first or not torch.equal(first[site][0], again[site][0]):
                continue  # other data, or data that the model itself makes at random
            wanted = _chosen_rows(first[site][0], num_event, stack, indices)
            if wanted.shape != value.shape or not torch.equal(wanted, value):
                raise ProblemError(
                    f"{problem.name}: site {site!r} of shape {tuple(value.shape)} does not hold the rows that plate "
                    f"{plates[0]!r} chose, of shape {tuple(wanted.shape)}; take them with what the plate gives: "
                    f"'with pyro.plate({plates[0]!r}, n) as i:' and 'obs=data[i]'"
                )

    def _check_plates(self, problem: Problem, met: Sequence[Any]) -> None:
        """Check that the plates around the observed sites have the sizes that were asked for."""
        for plate, (_, size) in self.sizes.items():
            frames = [frame for frame in met if frame.name == plate]
            if any(frame.size != size for frame in frames):
                raise ProblemError(
                    f"{problem.name}: plate {plate!r} keeps its size {frames[0].size} when {size} of its rows are "
                    "asked for; make it inside the model, not beforehand"
                )


@contextlib.contextmanager
def subsampled(indices: Mapping[str, Tensor]) -> Iterator[None]:
    """Make plates that are created inside the block, by name, choose these indices.

    A message handler does not suffice: a plate compares the indices that it gets with a ``subsample_size`` written in
    the program, and automatic guides make plates of their own.
    """
    outer = SubsampleMessenger._subsample

    def choose(name: str, size: int | None = None, given: Any = None, subsample: Any = None, *rest: Any) -> Any:
        if size is None or name not in indices:
            return outer(name, size, given, subsample, *rest)
        return _choose(name, size, None, indices[name], *rest)

    SubsampleMessenger._subsample = staticmethod(choose)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        SubsampleMessenger._subsample = staticmethod(outer)  # type: ignore[method-assign]


def whole(problem: Problem) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Makes blocks in which a problem's batch plates hold all their rows, even where it says ``subsample_size``."""
    if not problem.batch_plates:
        return partial(subsampled, {})
    sizes, device = plate_sizes(problem), device_of(problem.args, problem.kwargs, problem.model)
    rows = {name: torch.arange(sizes[name], device=device) for name in problem.batch_plates if name in sizes}
    return partial(subsampled, rows)


def plate_sizes(problem: Problem) -> dict[str, int]:
    """Rows of every vectorised plate of the model, all of them where it says ``subsample_size``."""
    with isolated(seed=0), torch.no_grad():
        trace = poutine.trace(problem.model).get_trace(*problem.args, **problem.kwargs)
    nodes: Any = trace.nodes
    return {name: node["fn"].size for name, node in nodes.items() if isinstance(node.get("fn"), _Subsample)}


def _chosen_rows(value: Tensor, num_event: int, stack: Sequence[Any], indices: Mapping[str, Tensor]) -> Tensor:
    """Rows of a site's value that the plates around it choose."""
    for frame in stack:
        axis = value.dim() - num_event + frame.dim
        if frame.name in indices and axis >= 0 and value.shape[axis] > 1:
            value = value.index_select(axis, indices[frame.name].to(value.device))
    return value


def _observed(problem: Problem, program: Any, rows: Any) -> dict[str, tuple[Tensor, int, tuple[Any, ...]]]:
    """Observed sites: value, number of event axes, plates around it."""
    try:
        with torch.no_grad(), pyro.validation_enabled(False), rows:
            trace = poutine.trace(program).get_trace(*problem.args, **problem.kwargs)
    except (ValueError, RuntimeError, IndexError) as error:
        raise ProblemError(f"{problem.name}: the model does not run on a subset of rows: {error}") from error
    nodes: Any = trace.nodes
    return {
        name: (node["value"].detach().clone(), node["fn"].event_dim, node["cond_indep_stack"])
        for name, node in nodes.items()
        if node["type"] == "sample"
        and node["is_observed"]
        and not isinstance(node["fn"], _Subsample | pyro.distributions.Unit)
        and not node["infer"].get("_deterministic")
    }
