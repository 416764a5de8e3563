"""What was learned of a graph for people to read: a table, files and figures."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

from probmodels.edges.summary import Top, summarise_edges
from probmodels.errors import DataError, ResultError
from probmodels.inference.result import Result
from probmodels.options import Fraction, checked
from probmodels.outputs import Dpi, Outputs, loss_figure, write_all

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["edge_table", "write_edges"]

_WIDTH = 100  # of sentences in the table
_SHOWN = 10  # pairs of each kind in the table that goes to the terminal
_TIE = 1e-6  # difference of probabilities that are the same


@checked(DataError)
def edge_table(result: Result | xr.Dataset, *, top: Top = _SHOWN, prob: Fraction = 0.9) -> str:
    """Numbers of the graph, new pairs and doubtful ones, for the terminal.

    Parameters
    ----------
    result
        The result, or what `summarise_edges` made of it, which then has its own ``prob``.
    top, prob
        As in `summarise_edges`.

    Returns
    -------
    str
        Aligned lines, without a final newline.
    """
    out = result if isinstance(result, xr.Dataset) else summarise_edges(result, top=top, prob=prob)
    observed = int(out["observed"].sum())
    lines = [
        f"Edges by {out.attrs['method']}: {out.sizes['pair']:,} candidate pairs of {out.sizes['node']:,} nodes, "
        f"{observed:,} of them observed.",
        textwrap.fill(str(out.attrs["meaning"]), _WIDTH),
        "",
    ]
    rows = [["", "mean", f"{100 * out.attrs['interval_level']:g} % interval", "observed"]]
    seen = {"num_edges": float(observed), "mean_degree": 2 * observed / out.sizes["node"]}
    seen["homophily"] = float(out.get("homophily_observed", np.nan))
    for name, digits in (("num_edges", 1), ("mean_degree", 2), ("homophily", 3)):
        if f"{name}_mean" in out:
            mean, low, high = (float(out[f"{name}_{x}"]) for x in ("mean", "lower", "upper"))
            interval = f"[{low:.{digits}f}, {high:.{digits}f}]" if np.isfinite(low) else "not kept"
            rows.append([name.replace("num_", "").replace("_", " "), f"{mean:.{digits}f}", interval])
            rows[-1].append(f"{seen[name]:.{digits}f}" if np.isfinite(seen[name]) else "")
    lines += _aligned(rows) + _class_lines(out)
    for name, title in (
        ("new", "Most probable of those not observed"),
        ("doubtful", "Most doubtful of those observed"),
    ):
        chosen = out[f"{name}_pair"].values
        chosen = chosen[chosen >= 0][:top]
        lines += ["", f"{title}{':' if len(chosen) else ': none.'}"]
        lines += _aligned(_pair_rows(out, chosen)) if len(chosen) else []
        lines += _ties(out, chosen)
    notes = [str(out.attrs[name]) for name in ("degree", "num_edges", "homophily") if name in out.attrs]
    return "\n".join([*lines, "", *(textwrap.fill(note, _WIDTH) for note in notes)])


@checked(ResultError)
def write_edges(result: Result, folder: str | Path, *, top: Top = 20, prob: Fraction = 0.9, dpi: Dpi = 110) -> Outputs:
    """Write ``edges.csv``, ``nodes.csv``, ``summary.txt`` and ``figures/*.png``.

    The figures: ``adjacency``, in collections of the first graph; ``reliability`` where true edges are known; ``loss``,
    of bilevel programs the two losses by step and the metrics of the rounds.

    Parameters
    ----------
    result
        Result of a method on graphs.
    folder
        Where to; made where it is missing, files of the same names are replaced.
    top, prob
        As in `summarise_edges`.
    dpi
        Resolution of the figures.

    Returns
    -------
    Outputs
        The folder, the table of the edges, and the verdict of the diagnostics.

    Raises
    ------
    ResultError
        As `edge_marginals`.
    """
    out = summarise_edges(result, top=top, prob=prob)
    columns = {"graph": "graph", "source": "source", "target": "target", "observed": "observed", "count": "count"}
    columns |= {"probability": "probability", "probability_sd": "sd", "probability_mcse": "mcse"}
    columns |= {"weight": "weight", "true": "true"}
    written = pd.DataFrame({new: out[name].values for name, new in columns.items() if name in out})
    written = written.astype({name: np.int8 for name in ("observed", "true") if name in written})
    return write_all(
        result,
        folder,
        table=edge_table(out),
        summary=edge_table(out, top=top),
        tables={"edges": written, "nodes": _node_frame(out)},
        figures=_figures(out, result),
        dpi=dpi,
    )


def _class_lines(out: xr.Dataset) -> list[str]:
    """How many of the test nodes are predicted right, where that is known."""
    if not {"predicted", "node_class", "split"} <= set(out.data_vars):
        return []
    test = (out["split"].values == "test") & (out["node_class"].values >= 0)
    right = int((out["predicted"].values == out["node_class"].values)[test].sum())
    share = f"{right:,} of {test.sum():,} test nodes are predicted right: {right / max(test.sum(), 1):.1%}."
    return ["", share] if test.any() else []


def _node_frame(out: xr.Dataset) -> pd.DataFrame:
    """A row for every node: its graph, class, degree and predicted class."""
    columns: dict[str, Any] = {"node": out["node"].values}
    if "node_graph" in out:
        columns["graph"] = out["node_graph"].values
    labels = out["class"].values.astype(str) if "class" in out.coords else None
    for name, title in (("node_class", "class"), ("predicted", "predicted")):
        if name in out and labels is not None:
            columns[title] = np.append(labels, "")[out[name].values]  # position -1, an unknown class, is the last
        if name == "node_class" and "split" in out:
            columns["split"] = out["split"].values
    if "class_probability" in out and labels is not None:
        columns |= {f"probability_{label}": out["class_probability"].values[:, k] for k, label in enumerate(labels)}
    columns["degree_observed"] = out["degree_observed"].values.astype(np.int64)
    return pd.DataFrame(columns | {f"degree_{x}": out[f"degree_{x}"].values for x in ("mean", "lower", "upper")})


def _pair_rows(out: xr.Dataset, chosen: NDArray[np.int64]) -> list[list[str]]:
    """Header and one row for each chosen pair."""
    digits = {"probability": 3, "probability_sd": 3, "probability_mcse": 4}
    titles = {"graph": "graph", "source": "source", "target": "target", "probability": "probability"}
    titles |= {"probability_sd": "sd", "probability_mcse": "Monte Carlo error", "count": "seen", "true": "true"}
    columns = []
    for name, title in titles.items():
        if name not in out or (name == "probability_sd" and np.isnan(out[name].values).any()):
            continue
        values = out[name].values[chosen]
        cells = [f"{x:.{digits[name]}f}" if name in digits else str(x) for x in values]
        cells = ["yes" if x else "no" for x in values] if name == "true" else cells
        columns.append([title, *cells])
    return [list(row) for row in zip(*columns, strict=True)]


def _ties(out: xr.Dataset, chosen: NDArray[np.int64]) -> list[str]:
    """A line that says how many pairs were left out that are as probable as the last one shown."""
    if not len(chosen):
        return []
    probability, observed = out["probability"].values, out["observed"].values
    alike = (np.abs(probability - probability[chosen[-1]]) < _TIE) & (observed == observed[chosen[-1]])
    alike[chosen] = False
    return [f"{alike.sum():,} more are as probable as the last."] if alike.any() else []


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns to the right, a rule below the first row."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return lines


def _figures(out: xr.Dataset, result: Result) -> dict[str, Figure]:
    from probmodels import plots
    from probmodels.edges import figures as graph_plots

    first = out["node_graph"].values[0] if "node_graph" in out else None
    figures = {"adjacency": graph_plots.adjacency(out, graph=first)}
    if "true" in out:
        figures["reliability"] = graph_plots.reliability(out["probability"], out["true"], observed=out["observed"])
    fit = result.group("fit")
    if "outer_loss" in fit:
        figures["loss"] = plots.bilevel_losses(fit)
        return figures
    return figures | loss_figure(result)
