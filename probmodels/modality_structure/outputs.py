"""Tables and figures of embedded modalities."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from probmodels.errors import ResultError
from probmodels.inference.labels import read_json
from probmodels.inference.result import Result
from probmodels.modality_structure.figures import descriptions, figures_of
from probmodels.modality_structure.fused import fused_scores
from probmodels.modality_structure.measures import measure
from probmodels.options import checked
from probmodels.outputs import Dpi, Outputs, loss_figure, write_all

__all__ = ["write_outputs"]


@checked(ResultError)
def write_outputs(result: Result, folder: str | Path, *, dpi: Dpi = 110) -> Outputs:
    """Write ``measures.csv``, ``summary.txt`` and figures, as ``figures/*.png`` and ``*.pdf``.

    Figures are of rows held out: ``map``, embeddings on two principal components; and for each pair of modalities
    ``nearest_a_to_b``, queries with what is nearest, ``similarity_a_to_b``, and ``gap_a_to_b``, the gap as fitted and
    closed. ``summary.txt`` says in words what each shows. ``measures.csv`` has the rows of `measure` as fitted and with
    the gap closed.

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
    states = [("as fitted", measure(result)), ("closed", measure(result, closed=True))]
    table = pd.concat([one.assign(gap=state) for state, one in states], ignore_index=True)
    lines = ["Matching in nats, with N candidates; recall_k by chance is k / N", ""]
    lines.append(table.to_string(index=False, float_format=lambda value: f"{value:.3f}"))
    options = read_json(result.tree.attrs, "options", {})
    tables = {"measures": table}
    if options.get("fusion") or options.get("masked"):
        tables["fused"] = fused_scores(result)
        lines += ["", "Fusion encoder, rows held out; partner is by chance a half", ""]
        lines.append(tables["fused"].to_string(index=False, float_format=lambda value: f"{value:.3f}"))
    made = figures_of(result)
    text = "\n".join(lines)
    return write_all(
        result,
        folder,
        table=text,
        summary="\n".join([text, "", "Figures", "", *descriptions(made)]),
        tables=tables,
        figures={name: one.figure for name, one in made.items()} | loss_figure(result),
        dpi=dpi,
        pdf=True,
    )
