"""What `write_outputs` of every method returns."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from probmodels.inference.diagnostics.report import Report

__all__ = ["Outputs"]


@dataclass(frozen=True)
class Outputs:
    """Where things were written, and what there is to say about them.

    Attributes
    ----------
    folder
        Where to.
    table
        Text for the terminal.
    diagnosis
        Verdict of the diagnostics.
    file
        Name in the folder of the one to read first.
    """

    folder: Path
    table: str
    diagnosis: Report
    file: str = "summary.txt"

    @property
    def report(self) -> Path:
        """The file to read first."""
        return self.folder / self.file
