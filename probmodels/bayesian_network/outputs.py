"""What was learned of the structure of a Bayesian network: probabilities of edges, paths, graphs and their classes.

Graphs that say the same independences are a class: they have the same edges but for directions, and the same colliders
a -> c <- b without an edge between a and b. The graph of a class has an arrow where all members agree on its direction,
and a line, arrows both ways, elsewhere.

References
----------
Meek, C. (1995). Causal inference and causal explanation with background knowledge. UAI.
https://arxiv.org/abs/1302.4972
Verma, T. and Pearl, J. (1990). Equivalence and synthesis of causal models. UAI. https://arxiv.org/abs/1304.1108
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from annotated_types import Interval
from numpy.typing import ArrayLike, NDArray

from probmodels.datasets.labelled import arranged
from probmodels.errors import ResultError
from probmodels.guides.bayesian_network import reachable
from probmodels.inference.metrics.graphs import cpdag as class_graph
from probmodels.inference.result import Result
from probmodels.options import Count, Probability, checked
from probmodels.outputs import Outputs, loss_figure, write_all

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["class_graph", "draw_arrows", "draw_network", "network_table", "summarise_network", "write_outputs"]

_CAUSAL = {"cause": "parent", "effect": "child"}  # the same axes of causal graphs
_SHOWN = 10  # edges and graphs in the table


@checked(ResultError)
def summarise_network(result: Result | xr.Dataset, *, top: Count = 10) -> xr.Dataset:
    """Posterior probabilities of edges, paths, graphs and classes of graphs, from draws.

    Parameters
    ----------
    result
        With draws of ``graph`` (parent, child) or (cause, effect), or these draws.
    top
        How many graphs and classes to keep, the most probable ones.

    Returns
    -------
    xr.Dataset
        Over (parent, child): ``edge_probability``; ``path_probability``, that of a directed path of any length;
        ``line_probability``, that of an edge in either direction. Over graph: ``graph`` (graph, parent, child) and
        ``graph_probability``. Over class: ``class`` graphs, see `class_graph`, as ``class_graph`` (class, parent,
        child) and ``class_probability``. Attribute ``num_draws``.

    Raises
    ------
    ResultError
        If there are no draws of graphs, or ``top`` is out of range.
    """
    posterior = result.posterior if isinstance(result, Result) else result
    posterior = posterior.rename({axis: name for axis, name in _CAUSAL.items() if axis in posterior.dims})
    if "graph" not in posterior or not {"parent", "child"} <= set(posterior["graph"].dims):
        raise ResultError("there are no draws of 'graph' (parent, child); give the result of a Bayesian network")
    found = posterior["graph"].transpose("chain", "draw", "parent", "child")
    draws = (found.values.reshape(-1, *found.shape[2:]) > 0.5).astype(np.int8)
    graphs, counts = np.unique(draws, axis=0, return_counts=True)
    share = counts / counts.sum()
    paths = reachable(torch.as_tensor(graphs, dtype=torch.float64)).numpy() - np.eye(graphs.shape[-1])
    classes, member = np.unique(np.stack([class_graph(graph) for graph in graphs]), axis=0, return_inverse=True)
    of_class = np.bincount(member.reshape(-1), share)
    best, best_class = np.argsort(-share, kind="stable")[:top], np.argsort(-of_class, kind="stable")[:top]
    edge = np.tensordot(share, graphs, 1)
    pair = ("parent", "child")
    return xr.Dataset(
        {
            "edge_probability": (pair, edge),
            "line_probability": (pair, edge + edge.T),
            "path_probability": (pair, np.tensordot(share, paths, 1)),
            "graph": (("rank", *pair), graphs[best]),
            "graph_probability": ("rank", share[best]),
            "class_graph": (("class_rank", *pair), classes[best_class]),
            "class_probability": ("class_rank", of_class[best_class]),
        },
        coords={name: found[name].values for name in pair if name in found.coords},
        attrs={"num_draws": len(draws), "num_graphs": len(graphs), "num_classes": len(classes)},
    )


@checked(ResultError)
def network_table(result: Result | xr.Dataset, *, top: Count = _SHOWN) -> str:
    """The most probable edges, graphs and classes, for the terminal.

    Parameters
    ----------
    result
        The result, or what `summarise_network` made of it.
    top
        How many of each.
    """
    out = result if isinstance(result, xr.Dataset) and "edge_probability" in result else summarise_network(result)
    names = _names(out)
    lines = [
        f"Bayesian network of {len(names)} variables: {out.attrs['num_draws']:,} draws of "
        f"{out.attrs['num_graphs']:,} graphs in {out.attrs['num_classes']:,} classes.",
        "",
        "Edges, the probability of this direction, of either, and of a path:",
    ]
    edge, line, path = (out[f"{kind}_probability"].values for kind in ("edge", "line", "path"))
    ranked = [np.unravel_index(place, edge.shape) for place in np.argsort(-edge, axis=None, kind="stable")]
    for at in [at for at in ranked if at[0] != at[1]][:top]:
        a, b = at
        lines.append(f"  {edge[a, b]:.3f}  {line[a, b]:.3f}  {path[a, b]:.3f}  {names[a]} -> {names[b]}")
    for kind, title in (("graph", "Graphs"), ("class", "Classes of graphs that say the same independences")):
        array = out["graph" if kind == "graph" else "class_graph"].values
        lines += ["", f"{title}:"]
        for chance, graph in zip(out[f"{kind}_probability"].values[:top], array[:top], strict=True):
            lines.append(f"  {chance:.3f}  {_spelled(graph, names)}")
    return "\n".join(lines)


@checked(ResultError)
def write_outputs(
    result: Result, folder: str | Path, *, top: Count = 20, dpi: Annotated[int, Interval(ge=20, le=1200)] = 110
) -> Outputs:
    """Write ``edges.csv``, ``graphs.csv``, ``summary.txt`` and ``figures/network.png``, ``figures/loss.png``.

    Parameters
    ----------
    result
        Result of a Bayesian network.
    folder
        Where to; made where it is missing, files of the same names are replaced.
    top
        How many graphs and classes to list.
    dpi
        Resolution of the figures.

    Raises
    ------
    ResultError
        As `summarise_network`.
    """
    out = summarise_network(result, top=top)
    frame = out[["edge_probability", "line_probability", "path_probability"]].to_dataframe().reset_index()
    truth = _truth(result)
    if truth is not None:
        frame["true"] = truth.reshape(-1)
    frame = frame[frame["parent"] != frame["child"]]
    names = _names(out)
    rows = [
        {"kind": kind, "probability": chance, "edges": _spelled(graph, names)}
        for kind, array in (("graph", "graph"), ("class", "class_graph"))
        for chance, graph in zip(out[f"{kind}_probability"].values, out[array].values, strict=True)
    ]
    return write_all(
        result,
        folder,
        table=network_table(out),
        summary=network_table(out, top=top),
        tables={"edges": frame, "graphs": pd.DataFrame(rows)},
        figures={"network": draw_network(out, truth=truth)} | loss_figure(result),
        dpi=dpi,
    )


@checked(ResultError)
def draw_network(summary: xr.Dataset, *, truth: ArrayLike | None = None, least: Probability = 0.05) -> Figure:
    """Arrows between variables on a circle, and the matrix of their probabilities.

    Parameters
    ----------
    summary
        What `summarise_network` returns.
    truth
        Known edges (parent, child), which are marked in the matrix; labelled ones in any order of the variables.
    least
        Probability below which an arrow is left out.

    Returns
    -------
    matplotlib.figure.Figure
    """
    from matplotlib.figure import Figure

    from probmodels._axes import RED

    chance, names = summary["edge_probability"].values, _names(summary)
    figure = Figure(figsize=(9.5, 4.5), layout="constrained")
    circle, matrix = figure.subplots(1, 2)
    draw_arrows(circle, chance, names, least=least)
    circle.set_title("Edges by their probability")
    image = matrix.imshow(chance, vmin=0, vmax=1, cmap="Blues")
    if truth is not None:
        edges = arranged(truth, "truth", {"parent": names, "child": names}, error=ResultError)
        for a, b in np.argwhere(np.asarray(edges) > 0):
            matrix.plot(b, a, marker="o", color=RED, markersize=6, fillstyle="none")
    matrix.set(title="Probability" + (", true edges as rings" if truth is not None else ""))
    matrix.set(xlabel="child", ylabel="parent", xticks=range(len(names)), yticks=range(len(names)))
    matrix.set_xticklabels(names)
    matrix.set_yticklabels(names)
    figure.colorbar(image, ax=matrix, shrink=0.8)
    return figure


def draw_arrows(
    ax: Axes, weight: NDArray[Any], names: Sequence[str], *, least: float = 0.05, spelled: str | None = None
) -> None:
    """Variables on a circle, and arrows between them, the darker the larger their weight.

    Parameters
    ----------
    ax
        Where to.
    weight
        Weights of edges (parent, child), 1 for a sure or strong one.
    names
        Names of the variables.
    least
        Weight below which an arrow is left out.
    spelled
        Format of the weights, written beside the arrows; None for none.
    """
    from matplotlib.patches import FancyArrowPatch

    from probmodels._axes import BLUE, SMALL

    angle = np.pi / 2 - 2 * np.pi * np.arange(len(names)) / len(names)
    points = np.stack([np.cos(angle), np.sin(angle)], -1)
    boxes = [
        ax.text(
            float(point[0]),
            float(point[1]),
            name,
            ha="center",
            va="center",
            bbox={"boxstyle": "round", "fc": "white", "ec": BLUE},
        )
        for point, name in zip(points, names, strict=True)
    ]
    bend = 0.12  # so that the two directions do not cover each other
    for a, b in np.argwhere(weight >= least):
        arrow = FancyArrowPatch(
            points[a],
            points[b],
            arrowstyle="-|>",
            mutation_scale=14,
            connectionstyle=f"arc3,rad={bend}",
            patchA=boxes[a].get_bbox_patch(),
            patchB=boxes[b].get_bbox_patch(),
            linewidth=0.5 + 2 * weight[a, b],
            alpha=float(min(1.0, 0.1 + 0.9 * weight[a, b])),
            color=BLUE,
            zorder=4,  # boxes first: they know their size once they are drawn
        )
        ax.add_patch(arrow)
        if spelled is not None:  # nearer to the cause, where arrows that cross are apart
            across = (points[b] - points[a])[::-1] * (bend, -bend)
            at = 0.6 * points[a] + 0.4 * points[b] + 0.48 * across  # of the quadratic curve that bends
            text = format(weight[a, b], spelled)
            pad = {"fc": "white", "ec": "none", "pad": 1}
            ax.text(float(at[0]), float(at[1]), text, fontsize=SMALL, ha="center", va="center", bbox=pad, zorder=5)
    ax.set(xlim=(-1.35, 1.35), ylim=(-1.35, 1.35), aspect="equal")
    ax.axis("off")


def _names(out: xr.Dataset) -> list[str]:
    return [str(name) for name in out["parent"].values]


def _truth(result: Result) -> NDArray[Any] | None:
    constant = result.group("constant_data")
    if "true_graph" not in constant:
        return None
    truth = constant["true_graph"]
    truth = truth.rename({axis: name for axis, name in _CAUSAL.items() if axis in truth.dims})
    return truth.transpose("parent", "child").values


def _spelled(graph: NDArray[np.int8], names: list[str]) -> str:
    """Edges in words; lines where a class leaves directions open."""
    arrows = [f"{names[a]} -> {names[b]}" for a, b in np.argwhere(graph) if not graph[b, a]]
    lines = [f"{names[a]} -- {names[b]}" for a, b in np.argwhere(graph) if graph[b, a] and a < b]
    return ", ".join([*arrows, *lines]) or "no edge"
