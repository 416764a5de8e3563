"""Checkpoints of the engines: tensors in safetensors, the rest in JSON, every commit one atomic rename."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from probmodels.errors import CheckpointError
from probmodels.inference.runtime.ops import write_atomically, write_json

__all__ = ["FORMAT", "ChainStore", "State", "check_room", "open_checkpoint", "read_draws", "read_state", "write_state"]

FORMAT = 1
_log = logging.getLogger(__name__)
_RUN, _STATE, _LOCK = "run.json", "state.json", ".lock"
_PROBE = ".probmodels-probe-"

State = dict[str, Any]  # values: Tensor, int, float, bool or str


@contextlib.contextmanager
def open_checkpoint(folder: str | Path, identity: Mapping[str, Any]) -> Iterator[Path]:
    """Make or reopen a checkpoint folder, and keep other runs out of it while the block runs.

    Parameters
    ----------
    folder
        Where the checkpoint lies; made where it is missing.
    identity
        JSON-ready description of all that decides the numbers of the run.

    Yields
    ------
    Path
        The folder.

    Raises
    ------
    CheckpointError
        If the folder cannot be written, holds other files, belongs to a run with another identity, or is in use.
    """
    path = Path(folder)
    identity = json.loads(json.dumps({"format": FORMAT, **identity}))
    check_room(path, 0)
    lock = FileLock(path / _LOCK)  # the system lets go of it when a process dies, however it dies
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise CheckpointError(
            f"another run is writing to the checkpoint in {path}; wait for its end, stop it, or give another folder"
        ) from error
    except NotImplementedError:
        _log.warning("%s: its file system has no locks; see that no other run uses this checkpoint", path)
    try:
        _claim(path, identity)
        yield path
    finally:
        lock.release()


def _claim(path: Path, identity: Mapping[str, Any]) -> None:
    """Check that a folder is free or holds the same run."""
    for left in (*path.glob(f"{_PROBE}*"), *path.glob(f".{_RUN}.*.tmp")):  # by a process killed before its first step
        left.unlink(missing_ok=True)
    found = _read_json(path / _RUN)
    if found is None:
        if any(file.name != _LOCK for file in path.iterdir()):
            raise CheckpointError(f"{path} holds files but no checkpoint; choose an empty or new folder")
        write_json(path / _RUN, identity)
    elif found != identity:
        raise CheckpointError(
            f"the checkpoint in {path} belongs to another run; "
            f"it differs in {'; '.join(_differences(found, identity))}. "
            "Repeat the call of that run to resume it, or give another folder, or delete this one to start afresh"
        )
    _remove_temporary(path)


def check_room(folder: str | Path, num_bytes: int) -> None:
    """See, before anything is computed, that a folder can be written and that its disk has room.

    Parameters
    ----------
    folder
        Where files will lie; made where it is missing.
    num_bytes
        What all of them will need; what lies there already counts as part of it.

    Raises
    ------
    CheckpointError
        If the folder cannot be written, or less than ``num_bytes`` is left for it.
    """
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f"{_PROBE}{os.getpid()}"
        probe.write_bytes(b"probe")
        probe.unlink()
        free = shutil.disk_usage(path).free
    except OSError as error:
        raise CheckpointError(f"cannot write to folder {path}: {error}; choose another folder") from error
    if num_bytes <= free:
        return
    missing = num_bytes - sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    if missing > free:
        raise CheckpointError(
            f"the disk of {path} has {_size(free)} left, and this run will write about {_size(missing)}; free "
            "some space, choose another folder, or keep fewer draws"
        )


def write_state(folder: Path, step: int, state: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    """Commit a state: tensors to a file of their own, the rest to ``state.json``, whose renaming is the commit."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items() if isinstance(value, Tensor)}
    scalars = {key: value for key, value in state.items() if not isinstance(value, Tensor)}
    # Never a name that is taken: until the renaming below, the commit before must stay whole.
    names = (folder / f"state-{step:09d}-{count}.safetensors" for count in itertools.count())
    file = next(name for name in names if not name.exists())
    # Copies, since tensors of a state may share memory, which safetensors refuses.
    digest = _save_tensors(file, {name: value.clone() for name, value in tensors.items()})
    record = {**record, "step": step, "scalars": scalars, "file": file.name, "sha256": digest}
    try:
        write_json(folder / _STATE, {**record, "check": _check(record)})
    except OSError as error:
        raise _unwritable(folder / _STATE, error) from error
    for old in folder.glob("state-*.safetensors"):
        if old != file:
            old.unlink(missing_ok=True)


def read_state(folder: Path) -> tuple[State, dict[str, Any]] | None:
    """State and record of the last commit, or None where there is none.

    Raises
    ------
    CheckpointError
        If a file is missing or damaged.
    """
    record = _read_record(folder)
    if record is None:
        return None
    tensors = _load_tensors(folder / record["file"], record["sha256"])
    # Copies lie aligned in memory, which parts of a file need not: linear algebra rounds by alignment, and a resumed
    # run shall give the same bits.
    return {**{name: value.clone() for name, value in tensors.items()}, **record["scalars"]}, record


class ChainStore:
    """Draws and state of one chain, streamed to a folder.

    Parameters
    ----------
    folder
        Folder of this chain; made where it is missing.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._chunks: list[dict[str, Any]] = []
        self._pending: list[dict[str, Tensor]] = []
        self.pending_bytes = 0

    @property
    def num_draws(self) -> int:
        """Draws committed so far."""
        return sum(chunk["draws"] for chunk in self._chunks)

    def resume(self) -> tuple[State, int] | None:
        """State and iteration of the last commit, or None; draws after it are forgotten."""
        self._folder.mkdir(parents=True, exist_ok=True)
        found = read_state(self._folder)
        self._chunks, self._pending, self.pending_bytes = [], [], 0
        if found is not None:
            self._chunks = list(found[1].get("chunks", []))
        known = {chunk["file"] for chunk in self._chunks} | ({found[1]["file"]} if found is not None else set())
        for file in self._folder.glob("*.safetensors"):
            if file.name not in known:
                file.unlink()
        _remove_temporary(self._folder)
        return None if found is None else (found[0], int(found[1]["step"]))

    def append(self, draw: Mapping[str, Tensor], stats: Mapping[str, Any]) -> None:
        """Keep one draw in memory until the next commit."""
        row = {f"draw/{name}": value.detach().cpu().clone() for name, value in draw.items()}
        for name, value in stats.items():
            known = value.detach().cpu() if isinstance(value, Tensor) else torch.as_tensor(value, dtype=torch.float64)
            row[f"stat/{name}"] = known.to(torch.float64, copy=True)
        self._pending.append(row)
        self.pending_bytes += sum(value.nbytes for value in row.values())

    def commit(self, iteration: int, state: Mapping[str, Any], attrs: Mapping[str, Any] | None = None) -> None:
        """Write pending draws, the state that continues after them, and what is to be known about the draws."""
        if self._pending:
            file = self._folder / f"draws-{self.num_draws:09d}.safetensors"
            names = list(self._pending[0])
            stacked = {name: torch.stack([row.pop(name) for row in self._pending]) for name in names}
            digest = _save_tensors(file, stacked)
            self._chunks.append({"file": file.name, "draws": len(self._pending), "sha256": digest})
            self._pending, self.pending_bytes = [], 0
        write_state(self._folder, iteration, state, {"chunks": self._chunks, "attrs": dict(attrs or {})})

    def attrs(self) -> dict[str, Any]:
        """What the last commit said about the draws."""
        found = _read_record(self._folder)
        return {} if found is None else dict(found.get("attrs", {}))

    def verify(self) -> None:
        """Check that all that was committed is there and whole, so that no run builds on what cannot be read later.

        Raises
        ------
        CheckpointError
            If a file is missing or damaged.
        """
        found = read_state(self._folder)
        for chunk in [] if found is None else found[1].get("chunks", []):
            _verify(self._folder / chunk["file"], chunk["sha256"])

    def chunks(self, num_draws: int) -> Iterator[tuple[slice, dict[str, Tensor]]]:
        """The first ``num_draws`` draws, file by file: their places and tensors (draw, ...).

        Raises
        ------
        CheckpointError
            If a file is missing or damaged, or there are fewer draws.
        """
        found, start = _read_record(self._folder), 0
        for chunk in [] if found is None else found.get("chunks", []):
            if start == num_draws:
                break
            tensors = _load_tensors(self._folder / chunk["file"], chunk["sha256"])
            stop = min(start + chunk["draws"], num_draws)
            yield slice(start, stop), {name: value[: stop - start] for name, value in tensors.items()}
            start = stop
        if start < num_draws:
            raise CheckpointError(f"{self._folder} holds {start} draws where {num_draws} were expected")

    def read(self, num_draws: int) -> dict[str, Tensor]:
        """The first ``num_draws`` draws as tensors (draw, ...), keys ``draw/<site>`` and ``stat/<name>``."""
        return {name: value[0] for name, value in read_draws([self], num_draws).items()}


def read_draws(stores: Sequence[ChainStore], num_draws: int) -> dict[str, Tensor]:
    """The first ``num_draws`` draws of all stores in one tensor (store, draw, ...) per name.

    No more than one file is held beside them.

    Parameters
    ----------
    stores
        Stores of the same variables.
    num_draws
        Draws of each.

    Returns
    -------
    dict
        Keys ``draw/<site>`` and ``stat/<name>``.

    Raises
    ------
    CheckpointError
        If a file is missing or damaged, or there are fewer draws.
    """
    out: dict[str, Tensor] = {}
    for place, store in enumerate(stores):
        for rows, tensors in store.chunks(num_draws):
            for name, value in tensors.items():
                if name not in out:
                    out[name] = value.new_empty(len(stores), num_draws, *value.shape[1:])
                out[name][place, rows] = value
    return out


def _save_tensors(file: Path, tensors: Mapping[str, Tensor]) -> str:
    digest = ""

    def write(path: Path) -> None:
        nonlocal digest
        save_file({name: value.contiguous() for name, value in tensors.items()}, str(path))
        digest = _sha256(path)

    try:
        write_atomically(file, write)
    except (OSError, SafetensorError) as error:
        raise _unwritable(file, error) from error
    return digest


def _load_tensors(file: Path, digest: str) -> dict[str, Tensor]:
    _verify(file, digest)
    return load_file(str(file))


def _verify(file: Path, digest: str) -> None:
    try:
        found = _sha256(file)
    except FileNotFoundError as error:
        raise _damaged(file, "the file is missing") from error
    except OSError as error:
        raise _damaged(file, str(error)) from error
    if found != digest:
        raise _damaged(file, "its checksum differs from the one recorded")


def _read_record(folder: Path) -> dict[str, Any] | None:
    """What the last commit wrote to ``state.json``, or None where there is none."""
    record = _read_json(folder / _STATE)
    if record is None:
        return None
    if not isinstance(record, dict) or not {"step", "scalars", "file", "sha256", "check"} <= set(record):
        raise _damaged(folder / _STATE, "entries are missing")
    if record.pop("check") != _check(record):
        raise _damaged(folder / _STATE, "its checksum differs from the one recorded")
    return record


def _check(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _remove_temporary(folder: Path) -> None:
    """Remove what processes that were killed have left half-written."""
    for file in folder.glob(".*.tmp"):
        file.unlink(missing_ok=True)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _read_json(file: Path) -> Any:
    if not file.exists():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(file, str(error)) from error


def _unwritable(file: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"cannot write {file}: {error}; free some space or choose another folder")


def _damaged(file: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"checkpoint file {file} is damaged: {why}; "
        f"restore it, or delete the folder {file.parent} to run that part again"
    )


def _differences(found: Any, wanted: Any, prefix: str = "") -> Sequence[str]:
    if isinstance(found, dict) and isinstance(wanted, dict):
        return [
            line
            for key in sorted(set(found) | set(wanted))
            if found.get(key) != wanted.get(key)
            for line in _differences(found.get(key), wanted.get(key), f"{prefix}.{key}" if prefix else key)
        ]
    if isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted):
        pairs = zip(found, wanted, strict=True)
        return [x for i, (a, b) in enumerate(pairs) if a != b for x in _differences(a, b, f"{prefix}[{i}]")]
    return [f"{prefix} (checkpoint: {_short(found)}, this run: {_short(wanted)})"]


def _size(num_bytes: float) -> str:
    units = ["bytes", "kB", "MB", "GB", "TB"]
    while num_bytes >= 1000 and len(units) > 1:
        num_bytes, units = num_bytes / 1000, units[1:]
    return f"{num_bytes:.3g} {units[0]}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
