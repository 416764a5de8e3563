"""What commands share: refusals, words on the screen, results that are read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from probmodels.errors import ProbmodelsError, ResultError

if TYPE_CHECKING:
    from probmodels.inference.problem import Problem
    from probmodels.inference.result import Result

__all__ = [
    "INTERRUPTED",
    "Interrupted",
    "Refusal",
    "changed_names",
    "check_free",
    "counts",
    "exit_unless",
    "import_code",
    "load",
    "make_folder",
    "problem_of",
    "say",
    "short_names",
]

INTERRUPTED = 130  # exit status


class Refusal(ProbmodelsError, ValueError):
    """A request that the command line itself refuses."""


class Interrupted(ProbmodelsError):
    """A run that was interrupted: what is kept of it."""


def say(doing: str, *, quiet: bool) -> None:
    """Say what is being done, before the imports that it needs."""
    if not quiet:
        typer.echo(f"{doing} ...", err=True)


def exit_unless(ok: bool, strict: bool) -> None:
    if strict and not ok:
        raise typer.Exit(1)


def load(folder: Path) -> Result:
    from probmodels.inference.result import Result

    return Result.load(folder)


def import_code(folder: Path, allowed: bool) -> None:
    """Import the method and the loader that a result names by dotted paths, where the user allows it."""
    if not allowed:
        return
    from probmodels.datasets import get_loader
    from probmodels.inference.labels import read_json
    from probmodels.methods import get_method

    spec = read_json(load(folder).tree.attrs, "spec", {})
    method, data = spec.get("method"), spec.get("data")
    if isinstance(method, str) and "." in method:
        get_method(method)
    if isinstance(data, dict) and isinstance(name := data.get("name"), str) and ":" in name:
        get_loader(name)


def problem_of(result: Result, folder: Path, allow_fetch: bool) -> Problem:
    """The problem of a result: from the spec in its file, or else from the data and options that it keeps."""
    from probmodels.inference.labels import read_json
    from probmodels.spec import build_problem, spec_of_result

    if "data" not in read_json(result.tree.attrs, "spec", {}):
        return result.rebuild()
    problem = build_problem(spec_of_result(folder, allow_fetch=allow_fetch))
    if changed := changed_names(result, problem):
        raise ResultError(
            f"{folder}: the data that its spec names have changed since the run: {changed} differ; put the former data "
            "back, or run it again with the new ones"
        )
    return problem


def changed_names(result: Result, problem: Problem) -> str:
    """Names of the data of a problem that differ from those of a result."""
    from probmodels.inference.result import changed_data

    names = changed_data(result.tree, problem)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def check_free(overwrite: bool, *files: Path | None) -> None:
    """Check that no file would be replaced unasked."""
    for file in files:
        if file is not None and (file.is_dir() or (file.exists() and not overwrite)):
            raise Refusal(f"{file} exists already; choose another file, or pass --overwrite")


def make_folder(file: Path) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refusal(f"cannot make the folder of {file}: {error.strerror or error}") from error


def counts(name: str, text: str) -> tuple[int, ...]:
    """Whole numbers that a text lists."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise Refusal(f"--{name} {text} is no list of whole numbers; write e.g. 3,4,5") from error


def short_names(folders: list[Path]) -> list[str]:
    """Short names of results that tell them apart: of their folders, or else whole paths."""
    folders = [folder if folder.name != "result.nc" else folder.parent for folder in folders]
    if len(set(folders)) < len(folders):
        raise Refusal("the same result is given twice")
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]
