"""Data-parallel gradients: ranks of ``torch.distributed`` share the rows of every step and agree on all the rest.

Every rank evaluates the loss on its rows of the batch that one process alone would see. Plates rescale by the rows that
they hold, so that the mean of losses and gradients, weighted by the share of the rows, is that of the whole batch.
"""

from __future__ import annotations

import atexit
import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import pyro
import torch
import torch.distributed as dist
from torch import Tensor

from probmodels.errors import ProblemError, RankError
from probmodels.inference.problem import Problem
from probmodels.inference.programs.minibatch import plate_sizes
from probmodels.inference.runtime.ops import chain_seed

__all__ = ["Ranks", "join", "shared_sizes"]

_STREAM = 3  # random stream of a run, beside those of its steps, draws and rows
T = TypeVar("T")


def join(name: str, distributed: bool | None) -> tuple[int, int]:
    """Number of this process, from 0, and of all that fit together; starts the process group if that is asked for.

    Parameters
    ----------
    name
        Name of the problem, for errors.
    distributed
        Whether to take part in a process group; None for where there is one.

    Raises
    ------
    ProblemError
        If it was asked for and the environment is not that of ``torchrun``.
    """
    there = dist.is_available() and dist.is_initialized()
    if distributed and not there:
        missing = [key for key in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if key not in os.environ]
        if missing or not dist.is_available():
            raise ProblemError(
                f"{name}: distributed=True needs the ranks that torchrun starts, and {missing} are not in the "
                "environment; run 'torchrun --nproc-per-node=2 script.py'"
            )
        dist.init_process_group("nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo")
        atexit.register(_leave)
    return (dist.get_rank(), dist.get_world_size()) if there or distributed else (0, 1)


def shared_sizes(problem: Problem, batch_size: int | Mapping[str, int] | None) -> int | Mapping[str, int]:
    """Rows of a step for which there are several ranks: all of them where none are named.

    Raises
    ------
    ProblemError
        If the problem has no plate that could be shared.
    """
    if batch_size is not None:
        return batch_size
    if not problem.batch_plates:
        raise ProblemError(
            f"{problem.name}: ranks share the rows of a plate; give the problem batch_plates=(...) from "
            f"{sorted(plate_sizes(problem))}, or pass distributed=False"
        )
    sizes = plate_sizes(problem)
    return {plate: sizes[plate] for plate in problem.batch_plates if plate in sizes}


class Ranks:
    """This process among those that fit together; alone it does nothing.

    Methods that exchange anything are called by every rank in the same order.

    Parameters
    ----------
    problem
        What is fitted.
    sizes
        Rows and rows of a batch, by plate.
    seed
        Seed of the run.
    size
        Number of ranks.

    Attributes
    ----------
    rank, size
        Number of this process, from 0, and of all.
    own_noise
        Whether ranks draw noise of their own, as they do where a row that is shared has latent sites. Otherwise all
        draw what one process alone would draw.
    """

    def __init__(self, problem: Problem, sizes: Mapping[str, tuple[int, int]], seed: int, size: int) -> None:
        self.size, self._seed = size, seed
        self.rank = dist.get_rank() if size > 1 else 0
        self.weight, self.own_noise, self._plate = 1.0, False, ""
        if size == 1:
            return
        # One plate is shared: were two, only the rows that meet on one rank would be seen.
        self._plate = max(sizes, key=lambda plate: sizes[plate][1])
        rows = sizes[self._plate][1]
        if rows < size:
            raise ProblemError(
                f"{problem.name}: {size} ranks cannot share {rows} rows of plate {self._plate!r}; give a larger "
                "batch_size, or start fewer ranks"
            )
        self.weight = len(torch.arange(rows).tensor_split(size)[self.rank]) / rows
        sites = [site for site in problem.sites.values() if site.kind == "latent"]
        self.own_noise = any(self._plate in site.dims for site in sites)

    def identity(self) -> dict[str, Any]:
        """What the numbers of a fit depend on here, beyond rounding."""
        return {"ranks": self.size} if self.own_noise else {}

    def share(self, indices: dict[str, Tensor]) -> dict[str, Tensor]:
        """The rows of a step that this rank sees."""
        if self.size == 1:
            return indices
        return {**indices, self._plate: indices[self._plate].tensor_split(self.size)[self.rank]}

    def seed_step(self, step: int) -> None:
        """Start the noise of a step, where it is this rank's own."""
        if self.own_noise:
            pyro.set_rng_seed(chain_seed(self._seed, _STREAM, step, self.rank))

    def mean(
        self, loss: Any, gradients: Mapping[str, Tensor], params: Mapping[str, Tensor]
    ) -> tuple[Any, dict[str, Tensor]]:
        """Loss and gradients of the whole batch.

        Parameters
        ----------
        loss, gradients
            Loss and gradients of this rank's rows.
        params
            All that may have a gradient, by name.
        """
        names = sorted(params)
        like = params[names[0]]
        dtype = torch.float64 if any(params[name].dtype == torch.float64 for name in names) else torch.float32
        found = torch.tensor([float(loss), *(float(name in gradients) for name in names)], dtype=dtype)
        parts = [gradients[name] if name in gradients else torch.zeros_like(params[name]) for name in names]
        flat = torch.cat([found.to(like.device), *(value.detach().reshape(-1).to(dtype) for value in parts)])
        flat *= self.weight
        with _collective():
            dist.all_reduce(flat)
        head, *pieces = flat.split([len(found), *(value.numel() for value in parts)])
        return head[0], {
            name: piece.reshape(value.shape).to(value.dtype)
            for name, value, piece, there in zip(names, parts, pieces, head[1:].tolist(), strict=True)
            if there
        }

    def agree(self, *flags: bool) -> tuple[bool, ...]:
        """Flags that any rank has raised."""
        if self.size == 1:
            return flags
        raised = torch.tensor([float(flag) for flag in flags], device=self._device)
        with _collective():
            dist.all_reduce(raised, dist.ReduceOp.MAX)
        return tuple(value > 0 for value in raised.tolist())

    def first(self, function: Callable[[], T]) -> T:
        """What the first rank gets from a function, which it alone calls; its exception on all."""
        if self.size == 1:
            return function()
        answer: list[Any] = [None, None]
        if self.rank == 0:
            try:
                answer[0] = function()
            except Exception as error:
                answer[1] = error
        with _collective():
            dist.broadcast_object_list(answer)
        if answer[1] is not None:
            raise answer[1]
        return answer[0]

    def equalise(self, values: Iterable[Tensor]) -> None:
        """Overwrite tensors with those of the first rank."""
        if self.size == 1:
            return
        with _collective(), torch.no_grad():
            for value in values:
                whole = value.detach().contiguous()
                dist.broadcast(whole, 0)
                value.copy_(whole)

    def check_same(self, name: str, identity: Any) -> None:
        """Check that all ranks fit the same.

        Raises
        ------
        RankError
            If they do not.
        """
        if self.size == 1:
            return
        every: list[Any] = [None] * self.size
        with _collective():
            dist.all_gather_object(every, identity)
        differing = sorted({key for other in every for key in identity if other.get(key) != every[0].get(key)})
        if differing:
            raise RankError(
                f"{name}: the ranks of one fit differ in {differing}; call it with the same arguments on every rank, "
                "or pass distributed=False"
            )

    @property
    def _device(self) -> torch.device:
        return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


@contextlib.contextmanager
def _collective() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RankError(
            f"another rank of this fit is gone or does something else ({error}); look at its messages, and repeat the "
            "call on all ranks, which continues from the checkpoint if there is one"
        ) from error


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
