"""Checkpoints of the engines: tensors in safetensors, the rest in JSON, every commit one atomic rename."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from probmodels.inference.ops import write_atomically, write_json

__all__ = ["FORMAT", "ChainStore", "CheckpointError", "State", "open_checkpoint", "read_state", "write_state"]

FORMAT = 1
_RUN = "run.json"

State = dict[str, Any]  # values: Tensor, int, float, bool or str


class CheckpointError(RuntimeError):
    """A checkpoint folder that cannot be used: what is wrong with it and how to mend it."""


def open_checkpoint(folder: str | Path, identity: Mapping[str, Any]) -> Path:
    """Make or reopen a checkpoint folder.

    Parameters
    ----------
    folder
        Where the checkpoint lies; made where it is missing.
    identity
        JSON-ready description of all that decides the numbers of the run.

    Raises
    ------
    CheckpointError
        If the folder cannot be written, holds other files, or belongs to a run with another identity.
    """
    path = Path(folder)
    identity = json.loads(json.dumps({"format": FORMAT, **identity}))
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".probe-{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise CheckpointError(f"cannot write to checkpoint folder {path}: {error}; choose another folder") from error
    found = _read_json(path / _RUN)
    if found is None:
        if any(path.iterdir()):
            raise CheckpointError(f"{path} holds files but no checkpoint; choose an empty or new folder")
        write_json(path / _RUN, identity)
    elif found != identity:
        raise CheckpointError(
            f"the checkpoint in {path} belongs to another run; "
            f"it differs in {'; '.join(_differences(found, identity))}. "
            "Repeat the call of that run to resume it, or give another folder, or delete this one to start afresh"
        )
    return path


def write_state(folder: Path, step: int, state: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    """Commit a state: tensors to a file of their own, the rest to ``state.json``, whose renaming is the commit."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items() if isinstance(value, Tensor)}
    scalars = {key: value for key, value in state.items() if not isinstance(value, Tensor)}
    file = folder / f"state-{step:09d}.safetensors"
    digest = _save_tensors(file, tensors)
    write_json(folder / "state.json", {**record, "step": step, "scalars": scalars, "file": file.name, "sha256": digest})
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
    record = _read_json(folder / "state.json")
    if record is None:
        return None
    if not isinstance(record, dict) or not {"step", "scalars", "file", "sha256"} <= set(record):
        raise _damaged(folder / "state.json", "entries are missing")
    return {**_load_tensors(folder / record["file"], record["sha256"]), **record["scalars"]}, record


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
        known = {chunk["file"] for chunk in self._chunks}
        for file in self._folder.glob("draws-*.safetensors"):
            if file.name not in known:
                file.unlink()
        return None if found is None else (found[0], int(found[1]["step"]))

    def append(self, draw: Mapping[str, Tensor], stats: Mapping[str, Any]) -> None:
        """Keep one draw in memory until the next commit."""
        row = {f"draw/{name}": value.detach().cpu().clone() for name, value in draw.items()}
        row |= {f"stat/{name}": torch.as_tensor(value, dtype=torch.float64).clone() for name, value in stats.items()}
        self._pending.append(row)
        self.pending_bytes += sum(value.nbytes for value in row.values())

    def commit(self, iteration: int, state: Mapping[str, Any], attrs: Mapping[str, Any] | None = None) -> None:
        """Write pending draws, the state that continues after them, and what is to be known about the draws."""
        if self._pending:
            file = self._folder / f"draws-{self.num_draws:09d}.safetensors"
            stacked = {name: torch.stack([row[name] for row in self._pending]) for name in self._pending[0]}
            digest = _save_tensors(file, stacked)
            self._chunks.append({"file": file.name, "draws": len(self._pending), "sha256": digest})
            self._pending, self.pending_bytes = [], 0
        write_state(self._folder, iteration, state, {"chunks": self._chunks, "attrs": dict(attrs or {})})

    def attrs(self) -> dict[str, Any]:
        """What the last commit said about the draws."""
        found = read_state(self._folder)
        return {} if found is None else dict(found[1].get("attrs", {}))

    def read(self, num_draws: int) -> dict[str, Tensor]:
        """The first ``num_draws`` draws as tensors (draw, ...), keys ``draw/<site>`` and ``stat/<name>``."""
        found = read_state(self._folder)
        chunks = [] if found is None else found[1].get("chunks", [])
        parts: list[Mapping[str, Tensor]] = []
        missing = num_draws
        for chunk in chunks:
            if missing <= 0:
                break
            tensors = _load_tensors(self._folder / chunk["file"], chunk["sha256"])
            parts.append({name: value[:missing] for name, value in tensors.items()})
            missing -= chunk["draws"]
        if missing > 0:
            raise CheckpointError(f"{self._folder} holds {num_draws - missing} draws where {num_draws} were expected")
        return {name: torch.cat([part[name] for part in parts]) for name in (parts[0] if parts else {})}


def _save_tensors(file: Path, tensors: Mapping[str, Tensor]) -> str:
    digest = ""

    def write(path: Path) -> None:
        nonlocal digest
        save_file({name: value.contiguous().clone() for name, value in tensors.items()}, str(path))
        digest = _sha256(path)

    try:
        write_atomically(file, write)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {file}: {error}; free some space or choose another folder") from error
    return digest


def _load_tensors(file: Path, digest: str) -> dict[str, Tensor]:
    if not file.exists():
        raise _damaged(file, "the file is missing")
    if _sha256(file) != digest:
        raise _damaged(file, "its checksum differs from the one recorded")
    return load_file(str(file))


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
    return [f"{prefix} (checkpoint: {_short(found)}, this run: {_short(wanted)})"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
