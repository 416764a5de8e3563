"""Options and arguments that several commands have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypedDict

import typer

__all__ = [
    "IMAGES",
    "LARGEST",
    "MOST",
    "PATH",
    "AllowCode",
    "AllowFetch",
    "Changes",
    "Device",
    "Folder",
    "Out",
    "Overwrite",
    "Quiet",
    "Strict",
    "path",
]

IMAGES = (".png", ".pdf", ".svg")
MOST = 10_000_000  # draws
LARGEST = 2**63 - 1  # seed


def path(text: str | Path) -> Path:
    """A path; an empty text, as of a variable that a script has not set, would be the folder one stands in."""
    if not str(text):
        raise typer.BadParameter("an empty text is no path; write . for the current folder")
    return Path(text)


class _AsPath(TypedDict):
    parser: Callable[[str], Path]
    metavar: str


PATH = _AsPath(parser=path, metavar="PATH")
Out = Annotated[Path, typer.Option("--out", help="Folder for everything that is written.", **PATH)]
Strict = Annotated[bool, typer.Option("--strict", help="Exit with status 1 if diagnostics fail.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a result that is in the folder.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Do not say what is being done, and show no progress bar.")]
Folder = Annotated[Path, typer.Argument(help="Folder of a result.", parser=path)]
Device = Annotated[str | None, typer.Option(help="Where to compute: cpu, cuda or cuda:1; default: where the data are.")]
Changes = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Value that replaces the spec's, e.g. model.rank=6; repeatable."),
]
AllowFetch = Annotated[
    bool, typer.Option("--allow-fetch", help="Let the spec in a result file read data from other machines.")
]
AllowCode = Annotated[
    bool,
    typer.Option("--allow-code", help="Import the method and the loader of other packages that a result file names."),
]
