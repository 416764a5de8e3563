"""Tables and figures of embedded modalities."""

from __future__ import annotations

from pathlib import Path

from probmodels.errors import ResultError
from probmodels.inference.result import Result
from probmodels.modality_structure.measures import measure
from probmodels.options import checked
from probmodels.outputs import Dpi, Outputs, loss_figure, write_all

__all__ = ["write_outputs"]


@checked(ResultError)
def write_outputs(result: Result, folder: str | Path, *, dpi: Dpi = 110) -> Outputs:
    """Write ``measures.csv``, ``summary.txt`` and ``figures/loss.png``.

    Parameters
    ----------
    result
        Result of `fit_svi`.
    folder
        Where to; made where it is missing, files of the same names are replaced.
    dpi
        Resolution of the figures.

    Returns
    -------
    Outputs
        The folder, the table of `measure`, and the verdict of the diagnostics.

    Raises
    ------
    ResultError
        If the result is not one of this method.
    """
    table = measure(result)
    lines = ["Matching in nats, with N candidates; recall_k by chance is k / N", ""]
    lines.append(table.to_string(index=False, float_format=lambda value: f"{value:.3f}"))
    return write_all(
        result, folder, table="\n".join(lines), tables={"measures": table}, figures=loss_figure(result), dpi=dpi
    )
