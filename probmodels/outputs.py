"""What `write_outputs` of every method returns, and the one function that writes it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Interval
from tqdm.auto import tqdm

from probmodels.errors import ResultError
from probmodels.inference.runtime.ops import foreign_faults

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from probmodels.inference.diagnostics.findings import Report
    from probmodels.inference.result import Result

__all__ = ["Dpi", "Outputs", "laid_out", "loss_figure", "write_all"]

Dpi = Annotated[int, Interval(ge=20, le=1200)]

_COMPRESSION = 3  # of PNG files: 6, as is usual, takes twice as long and saves a few per cent
_PATIENCE = 5.0  # seconds of writing before there is a progress bar


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
    figures
        Name to file of the figures.
    """

    folder: Path
    table: str
    diagnosis: Report
    file: str = "summary.txt"
    figures: Mapping[str, Path] = field(default_factory=dict)

    @property
    def report(self) -> Path:
        """The file to read first."""
        return self.folder / self.file


def write_all(
    result: Result,
    folder: str | Path,
    *,
    table: str,
    summary: str | None = None,
    tables: Mapping[str, pd.DataFrame] | None = None,
    figures: Mapping[str, Figure] | None = None,
    files: Mapping[str, Callable[[Path], object] | None] | None = None,
    dpi: Dpi = 110,
    pdf: bool = False,
    progress: bool = False,
) -> Outputs:
    """Write ``summary.txt``, tables as ``<name>.csv`` and figures as ``figures/<name>.png``.

    All is written beside the folder's files first and then put in their place: a failure leaves the folder as it was.

    Parameters
    ----------
    result
        What the outputs are of; its diagnosis ends the summary.
    folder
        Where to; made where it is missing. Files of the same names are replaced, and figures of the same method that
        an earlier call wrote and this one does not are removed.
    table
        Text for the terminal.
    summary
        Text of ``summary.txt``; the table for None.
    tables
        By name; an index is written where it has a name.
    figures
        By name.
    files
        Path within the folder to a function that writes the file which it is given; None removes one that an earlier
        call wrote.
    dpi
        Resolution of the figures.
    pdf
        Whether to write each figure as ``figures/<name>.pdf`` too.
    progress
        Whether to show a progress bar where writing takes more than five seconds.

    Raises
    ------
    ResultError
        If the folder cannot be written.
    """
    folder, diagnosis = Path(folder), result.diagnose()
    text = f"{table if summary is None else summary}\n\n{diagnosis.text(None)}\n"
    mark = f"probmodels {result.tree.attrs.get('method', '')}"
    writers: dict[str, Callable[[Path], object] | None] = {
        "summary.txt": lambda file: file.write_text(text, encoding="utf-8")
    }
    writers |= {f"{name}.csv": _csv(frame) for name, frame in (tables or {}).items()}
    for name, figure in (figures or {}).items():
        writers[f"figures/{name}.png"] = _png(figure, dpi, mark)
        if pdf:
            writers[f"figures/{name}.pdf"] = _pdf(figure)
    writers |= files or {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".outputs-", dir=folder) as aside:
            shown: dict[str, Any] = {"disable": not progress, "delay": _PATIENCE, "unit": "file", "leave": False}
            for name, write in tqdm(writers.items(), "writing", **shown):
                if write is not None:
                    (Path(aside) / name).parent.mkdir(parents=True, exist_ok=True)
                    with foreign_faults():
                        write(Path(aside) / name)
            for name, write in writers.items():
                if write is None:
                    (folder / name).unlink(missing_ok=True)
                else:
                    (folder / name).parent.mkdir(exist_ok=True)
                    os.replace(Path(aside) / name, folder / name)
        for path in (folder / "figures").glob("*.png"):
            if f"figures/{path.name}" not in writers and _mark_of(path) == mark:
                path.unlink()
                path.with_suffix(".pdf").unlink(missing_ok=True)
    except OSError as error:
        raise ResultError(f"cannot write to {folder}: {error.strerror or error}; choose another folder") from error
    return Outputs(
        folder, table, diagnosis, figures={name: folder / "figures" / f"{name}.png" for name in figures or {}}
    )


def loss_figure(result: Result) -> dict[str, Figure]:
    """Figure ``loss`` of a result whose fit kept its loss by step; empty for others."""
    from probmodels import plots

    fit = result.group("fit")
    return {"loss": plots.loss(fit)} if "loss" in fit else {}


def _csv(frame: pd.DataFrame) -> Callable[[Path], object]:
    return lambda file: frame.to_csv(file, index=frame.index.name is not None, float_format="%.6g")


def _png(figure: Figure, dpi: int, mark: str) -> Callable[[Path], object]:
    return lambda file: laid_out(figure).savefig(
        file, dpi=dpi, format="png", metadata={"Source": mark}, pil_kwargs={"compress_level": _COMPRESSION}
    )


def _pdf(figure: Figure) -> Callable[[Path], object]:
    return lambda file: laid_out(figure).savefig(file, format="pdf", metadata={"CreationDate": None})


def laid_out(figure: Figure) -> Figure:
    """The same figure with the places of its axes settled, which saving would otherwise compute for every file."""
    if figure.get_layout_engine() is not None:
        figure.draw_without_rendering()
        figure.set_layout_engine(None)
    return figure


def _mark_of(path: Path) -> str | None:
    """What `_png` marked a figure with; None for pictures from elsewhere."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            found = image.info.get("Source")
    except (UnidentifiedImageError, SyntaxError):
        return None
    return found if isinstance(found, str) else None
