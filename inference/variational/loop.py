"""A run of steps that can be watched, interrupted, saved and gone on with, whatever a step is."""

from __future__ import annotations

import contextlib
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyro
import torch
import xarray as xr
from torch import Tensor
from tqdm.auto import tqdm

from probmodels.inference.programs.minibatch import Minibatches
from probmodels.inference.programs.programs import Programs
from probmodels.inference.runtime.checkpoint import check_room, read_state, write_state
from probmodels.inference.runtime.ops import Interrupts, part, restore_rng, rng_tensors
from probmodels.inference.variational.data_parallel import Ranks
from probmodels.inference.variational.options import FitOptions, Step

__all__ = ["Bar", "Loop", "Setting", "quiet"]


class Bar:
    """What a fit is doing: first in words, then as a progress bar of steps, drawn ten times a second.

    Parameters
    ----------
    label
        What is fitted, and how.
    shown
        Whether anything is drawn.
    """

    def __init__(self, label: str, shown: bool) -> None:
        self._label, self._shown, self._shown_at = label, shown, 0.0

    def __enter__(self) -> Self:
        self._bar = tqdm(disable=not self._shown, desc=self._label, unit="step")
        return self

    def say(self, doing: str) -> None:
        """Say what is being done where no steps are made."""
        self._bar.set_description(f"{self._label}, {doing}")

    def count(self, label: str, done: int, total: int) -> None:
        """Begin to count steps."""
        self._label = label
        if self._shown:
            self._bar.reset(total)
            self._bar.initial = self._bar.n = self._bar.last_print_n = min(done, total)
        self._bar.set_description(label)

    @property
    def due(self) -> bool:
        """Whether it is time to draw."""
        return self._shown and time.monotonic() - self._shown_at >= 0.1

    def show(self, done: int, state: str) -> None:
        """Draw how many steps are made, and what the loop says of itself."""
        self._shown_at = time.monotonic()
        self._bar.set_postfix_str(state, refresh=False)
        self._bar.update(done - self._bar.n)

    def __exit__(self, *exc: object) -> None:
        self._bar.set_description(self._label)
        self._bar.close()


@dataclass
class Setting:
    """What a loop runs in.

    Attributes
    ----------
    programs
        Model and guide.
    batches
        Rows of every step.
    options
        Options of the engine.
    folder
        Checkpoint folder, or None.
    ranks
        This process among those that fit together.
    bar
        Shows what is being done.
    """

    programs: Programs
    batches: Minibatches
    options: FitOptions
    folder: Path | None
    ranks: Ranks
    bar: Bar


class Loop(ABC):
    """Steps that can be watched, stopped, saved and gone on with; `Trainer` and the bilevel engine say which.

    Attributes
    ----------
    number
        Steps made.
    total
        Most steps that there can be.
    label
        Name on the progress bar.
    annealing
        What annealed draws were made for the guide, or why none; None where nobody asked for any.
    """

    annealing: str | None = None
    number: int
    total: int
    label: str

    def __init__(self, setting: Setting, columns: Sequence[str]) -> None:
        self.programs, self.batches, self.options = setting.programs, setting.batches, setting.options
        self.folder, self.ranks, self.bar = setting.folder, setting.ranks, setting.bar
        self.name = setting.programs.problem.name
        self._columns = list(columns)
        self._rows = np.empty((1024, len(self._columns)))  # of the history, one per step
        self.number = 0

    @abstractmethod
    def advance(self) -> Step | None:
        """Make the next step; None at the end of the plan."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """All that has to be saved beside parameters, buffers, history and random-number state."""

    @abstractmethod
    def load(self, state: Mapping[str, Any]) -> None:
        """Take what `state` returned."""

    @abstractmethod
    def settle(self) -> None:
        """Leave the parameters as the result shall have them."""

    @property
    @abstractmethod
    def execution(self) -> str:
        """How steps were evaluated."""

    @property
    @abstractmethod
    def progress(self) -> str:
        """What the progress bar says."""

    @property
    def stalled(self) -> bool:
        """Whether to stop for lack of progress."""
        return False

    @property
    def history(self) -> np.ndarray:
        """One row per step."""
        return self._rows[: self.number]

    def dataset(self) -> xr.Dataset:
        """History by step, numbered from 1."""
        variables = {name: ("step", self.history[:, place].copy()) for place, name in enumerate(self._columns)}
        return xr.Dataset(variables, coords={"step": np.arange(1, self.number + 1)})

    def record(self, *row: float) -> None:
        """Count a step and keep its row of the history."""
        if self.number == len(self._rows):
            self._rows = np.concatenate([self._rows, np.empty_like(self._rows)])
        self._rows[self.number] = row
        self.number += 1

    def resume(self) -> None:
        """Go on from the checkpoint, if there is one."""
        folder = self.folder
        found = None if folder is None else self.ranks.first(lambda: read_state(folder))
        if found is None:
            return
        state = found[0]
        self.programs.load(state)
        self.number = state["number"]
        self._rows = np.concatenate([state["rows"].numpy(), np.empty((1024, len(self._columns)))])
        self.load(state)
        restore_rng(part(state, "rng/"))

    def save(self) -> None:
        """Commit the state to the checkpoint folder, if there is one."""
        if self.folder is None:
            return
        state, folder = self._whole_state(), self.folder
        self.ranks.first(lambda: write_state(folder, self.number, state, {}))

    def check_room(self) -> None:
        """Check that the disk holds two states at once, of which the old one goes when the new one is whole.

        Raises
        ------
        CheckpointError
            If it does not.
        """
        if self.folder is None:
            return
        state = self._whole_state()
        size = sum(value.nbytes for value in state.values() if isinstance(value, Tensor))
        folder, needed = self.folder, 2 * (size + (self.total - self.number) * self._rows[0].nbytes)
        self.ranks.first(lambda: check_room(folder, needed))

    def _whole_state(self) -> dict[str, Any]:
        state: dict[str, Any] = {**self.programs.state(), **self.state(), "number": self.number}
        state |= {f"rng/{name}": value for name, value in rng_tensors().items()}
        return state | {"rows": torch.from_numpy(self.history)}

    def run(self) -> None:
        """Make the steps that are left.

        Raises
        ------
        FitError
            If a loss or its gradient stops being finite.
        KeyboardInterrupt
            After an interrupt, once the step is finished and the state saved.
        """
        options, bar, saved_at = self.options, self.bar, time.monotonic()
        bar.count(self.label, self.number, self.total)
        with Interrupts() as interrupts, quiet(), self._saying_where():
            # A run that stalled is at its end, also when it is asked for again.
            while not self.stalled and (step := self.advance()) is not None:
                if bar.due:
                    bar.show(self.number, self.progress)
                ended = any([callback(step) for callback in options["callbacks"]])  # noqa: C419 -- each is called
                due = self.folder is not None and time.monotonic() - saved_at >= options["checkpoint_every"]
                ended, interrupted, due = self.ranks.agree(ended, interrupts.count > 0, due)
                if ended or self.stalled:
                    break
                if interrupted:
                    self.save()
                    raise KeyboardInterrupt
                if due:
                    self.save()
                    saved_at = time.monotonic()
        if self.number:
            bar.show(self.number, self.progress)
        self.save()
        self.settle()

    @contextlib.contextmanager
    def _saying_where(self) -> Iterator[None]:
        """Let an interrupt say where the fit stands and how to resume."""
        try:
            yield
        except KeyboardInterrupt as error:
            if error.args:
                raise
            how = (
                "nothing was kept, since no checkpoint folder was given"
                if self.folder is None
                else f"the state is saved in {self.folder}; repeat the same call to resume"
            )
            raise KeyboardInterrupt(f"stopped after step {self.number} of {self.total}: {how}") from None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Pyro's checks off, and its warnings of losses that are not finite, which are errors here."""
    with warnings.catch_warnings(), pyro.validation_enabled(False):
        warnings.filterwarnings("ignore", message="Encountered (NaN|\\+inf)")
        yield
