"""Figures of learned graphs: calibration of edges, adjacency, accuracy against noise, the information curve.

As in `probmodels.plots`, every function returns a new `matplotlib.figure.Figure` and touches neither pyplot nor
matplotlib's settings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
import pandas as pd
import xarray as xr
from annotated_types import Interval
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray
from scipy.stats import t as student

from probmodels._axes import BLUE, COLOURS, GREY, RED, SMALL, clean
from probmodels.datasets.labelled import arranged, arranged_together, row_labels
from probmodels.edges.summary import edge_marginals
from probmodels.errors import DataError
from probmodels.inference.metrics.graphs import calibration_table
from probmodels.inference.result import Result
from probmodels.options import Count, Fraction, Natural, checked

__all__ = [
    "accuracy_against_noise",
    "adjacency",
    "calibration_table",
    "information_curve",
    "reliability",
]

Floats = NDArray[np.float64]

_MARKERS = "osD^vPX*"
_LEVEL = 0.95  # of bands over replicates
_NARROW = 0.06  # share of the nodes below which the name of a class has no room
_MOST_CLASSES = 12  # whose names fit beside an image


@checked(DataError)
def reliability(
    probability: ArrayLike,
    truth: ArrayLike,
    *,
    bins: Count | Sequence[float] = 10,
    observed: ArrayLike | None = None,
    level: Fraction = 0.95,
) -> Figure:
    """How often edges of a stated probability are true, with bands, the number of pairs in every bin, and the error.

    The legend has the expected calibration error (ECE) of `calibration_table`. It depends on the bins, and is not zero
    for a calibrated model with few pairs.

    Parameters
    ----------
    probability, truth, bins, level
        As in `calibration_table`.
    observed
        Whether each pair was observed (pair,). Pairs that were and those that were not are then shown apart: most pairs
        are no edges, all methods know it, and an error over all pairs together flatters every one of them.

    Raises
    ------
    DataError
        As `calibration_table`, or if ``observed`` has another shape.
    """
    parts = {"probability": probability, "truth": truth, "observed": observed}
    probability, truth, observed = arranged_together(parts, ["pair"])
    chance, true = np.asarray(probability, dtype=float), np.asarray(truth)
    tables = {"all pairs": calibration_table(chance, true, bins=bins, level=level)}
    if observed is not None:
        seen = np.asarray(observed)
        if seen.shape != chance.shape:
            raise DataError(
                f"observed has shape {seen.shape}, but there are {len(chance)} pairs; give it by pair (pair,)"
            )
        kinds = {"observed pairs": seen > 0, "other pairs": ~(seen > 0)}
        tables = {
            name: calibration_table(chance[which], true[which], bins=bins, level=level)
            for name, which in kinds.items()
            if which.any()
        }
    figure = Figure(figsize=(5.2, 6.0), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    upper.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle="--", zorder=0)
    most = max(int(table["count"].max()) for table in tables.values())
    for place, ((name, table), color) in enumerate(zip(tables.items(), (BLUE, RED), strict=False)):
        x, y, low, high = (table[part].values for part in ("probability", "frequency", "lower", "upper"))
        filled = table["count"].values > 0
        upper.errorbar(
            x[filled],
            y[filled],
            [np.maximum(y - low, 0)[filled], np.maximum(high - y, 0)[filled]],
            marker=_MARKERS[place],
            color=color,
            markersize=5,
            linewidth=1.1,
            capsize=3,
            label=f"{name}: ECE {float(table['ece']):.3f}, {int(table['count'].sum()):,} pairs",
        )
        edges, count = table["bin_edge"].values, table["count"].values
        width, shift = np.diff(edges) / len(tables), place * np.diff(edges) / len(tables)
        lower.bar(edges[:-1] + shift, count, width, align="edge", color=color, alpha=0.7, linewidth=0)
        for left, number in zip(edges[:-1] + shift + width / 2, count, strict=True):
            if number:
                lower.text(left, number, f" {number:,}", fontsize=6, rotation=90, ha="center", va="bottom", color=color)
    upper.set_xlim(-0.02, 1.02)
    upper.set_ylim(-0.02, 1.02)
    upper.set_ylabel("share of true edges")
    upper.set_title(f"Bars: {100 * level:g} % intervals of the shares", fontsize=10, loc="left")
    upper.legend(fontsize=SMALL, frameon=False, loc="upper left")
    lower.set_yscale("log")
    lower.set_ylim(0.7, 0.7 * (most / 0.7) ** 1.6)  # room for the numbers above the bars
    lower.set_xlabel("stated probability of an edge")
    lower.set_ylabel("pairs")
    for ax in (upper, lower):
        clean(ax)
    return figure


@checked(DataError)
def adjacency(
    graph_of: Result | xr.Dataset,
    *,
    graph: Natural | None = None,
    cells: Annotated[int, Interval(ge=2, le=20_000)] = 400,
) -> Figure:
    """Observed edges above the diagonal, learned probabilities below it, nodes by class and then by degree.

    Graphs of more nodes than ``cells`` are binned: every cell then shows edges, or probabilities times the number of
    pairs that candidates stand for, over the pairs of nodes in it, and the diagonal is left out. No array is larger
    than the image.

    Parameters
    ----------
    graph_of
        A result, or what `probmodels.edges.summary.edge_marginals` or ``summarise_edges`` made of it.
    graph
        Which graph of a collection, by its position.
    cells
        Most cells along a side of the image.

    Raises
    ------
    DataError
        If the data hold several graphs and none is chosen, or the graph has no nodes, or an option is out of range.
    ResultError
        If the result is not one of a method on graphs.
    """
    data = graph_of if isinstance(graph_of, xr.Dataset) else edge_marginals(graph_of)
    lost = [x for x in ("source_node", "target_node", "observed", "probability", "degree_observed") if x not in data]
    if lost:
        raise DataError(f"the data set lacks {lost}; give what edge_marginals or summarise_edges returns")
    nodes = _nodes_of_graph(data, graph)
    ordered, number = _ordered(data, nodes), len(nodes)
    rank = np.full(data.sizes["node"], -1)
    rank[ordered] = np.arange(number)
    one, other = (rank[data[f"{end}_node"].values] for end in ("source", "target"))
    inside = (one >= 0) & (other >= 0)
    first, second = np.minimum(one, other)[inside], np.maximum(one, other)[inside]
    observed, chance = data["observed"].values[inside].astype(float), data["probability"].values[inside]
    binned = number > cells
    if binned:
        weight = data["weight"].values[inside] if "weight" in data else 1.0
        image = _binned(first, second, observed, weight * chance, number, cells)
        norm: Any = PowerNorm(0.5, 0, max(float(np.nanmax(image)), 1e-12))
    else:
        image = np.full((number, number), np.nan)
        image[np.triu_indices(number, 1)] = 0.0
        image[first, second], image[second, first] = observed, chance
        norm = Normalize(0, 1)
    figure = Figure(figsize=(6.4, 5.6), layout="constrained")
    ax = figure.subplots()
    colours = colormaps["magma_r"].with_extremes(bad="0.88")
    shown = ax.imshow(image, cmap=colours, norm=norm, extent=(0, number, number, 0), interpolation="nearest")
    ax.plot([0, number], [0, number], color=GREY, linewidth=0.5)
    _mark_classes(ax, data, ordered)
    said = f"{number / cells:.1f} to a cell" if binned else ""
    gaps = not binned and bool(np.isnan(image[np.tril_indices(number, -1)]).any())
    said = "grey is no candidate" if gaps else said
    where = f" of graph {graph}" if graph is not None and "node_graph" in data else ""
    ax.set_title(f"{number:,} nodes{where}{', ' * bool(said)}{said}", fontsize=10, loc="left")
    ax.set_title("above: observed, below: learned", fontsize=SMALL, loc="right", color=GREY)
    bar = figure.colorbar(shown, ax=ax, shrink=0.85, aspect=22)
    bar.set_label("edges per pair of nodes" if binned else "probability of an edge", fontsize=SMALL)
    bar.ax.tick_params(labelsize=SMALL, length=2.5)
    return figure


@checked(DataError)
def accuracy_against_noise(
    table: xr.Dataset | pd.DataFrame | Mapping[str, ArrayLike],
    *,
    metric: str = "accuracy",
    noise: str = "noise",
    method: str = "method",
) -> Figure:
    """Accuracy of several methods over levels of noise: means over replicates and Student's 95 % intervals of them.

    A level with a single replicate has no interval.

    Parameters
    ----------
    table
        A data set with the variable ``metric`` over dims ``method``, ``noise`` and those of replicates, nan where one
        is absent; or columns of equal length by these names, as of a data frame, one row for each run.
    metric, noise, method
        Names of the variable and of the two dims, or of the three columns.

    Raises
    ------
    DataError
        If a variable, dim or column is absent, columns differ in length, or values lie outside [0, 1].
    """
    names, levels, found = _long_form(table, metric, noise, method)
    figure = Figure(figsize=(6.2, 4.0), layout="constrained")
    ax = figure.subplots()
    tops = []
    for place, name in enumerate(dict.fromkeys(names.tolist())):
        own = names == name
        x = np.unique(levels[own])
        moments = np.array([_interval(found[own & (levels == value)]) for value in x])
        color = COLOURS[place % len(COLOURS)]
        mean, half = moments.T
        marker = _MARKERS[place % len(_MARKERS)]
        ax.plot(x, mean, color=color, marker=marker, markersize=4.5, linewidth=1.3, label=str(name))
        low, high = np.clip(mean - half, 0, 1), np.clip(mean + half, 0, 1)
        ax.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
        tops += [np.nanmin([low, mean]), np.nanmax([high, mean])]
    pad = 0.05 * (max(tops) - min(tops)) or 0.02
    ax.set_ylim(max(min(tops) - pad, 0), min(max(tops) + pad, 1.005))
    ax.set_xlabel(noise.replace("_", " "))
    ax.set_ylabel(metric.replace("_", " "))
    ax.set_title(f"means, {100 * _LEVEL:g} % intervals of the means", fontsize=10, loc="left")
    ax.legend(fontsize=SMALL, frameon=False)
    clean(ax)
    return figure


@checked(DataError)
def information_curve(
    beta: ArrayLike, rate: ArrayLike, accuracy: ArrayLike, *, log_loss: ArrayLike | None = None
) -> Figure:
    """What an embedding keeps about a graph, in nats, against how well it classifies, along the weight beta.

    Points are means over replicates with Student's 95 % intervals of them, joined in the order of beta.

    Parameters
    ----------
    beta
        Weights of the divergence of the embedding (beta,), of 0 or more, each once.
    rate
        Mean divergence in nats, (beta,) or (beta, replicate), where replicates are seeds or folds.
    accuracy
        Share of graphs classified right, of the same kind.
    log_loss
        Mean negative log probability of the right class in nats, of the same kind, for a second panel.

    Raises
    ------
    DataError
        If shapes do not fit, values are missing or negative, or accuracies exceed 1.
    """
    given = {"beta": beta, "rate": rate, "accuracy": accuracy} | ({} if log_loss is None else {"log_loss": log_loss})
    runs = row_labels(*given.values(), dim="beta")
    given = {
        name: arranged(one, name, {"beta": runs} | ({"replicate": None} if np.ndim(one) == 2 else {}))
        for name, one in given.items()
    }
    weights = np.asarray(given.pop("beta"), dtype=float)
    if weights.ndim != 1 or not len(weights) or not (np.isfinite(weights) & (weights >= 0)).all():
        raise DataError(f"beta={weights!r}; give a list of weights of 0 or more (beta,)")
    if len(np.unique(weights)) < len(weights):
        raise DataError("beta names a weight twice; put its runs along a second axis of rate and accuracy")
    order = np.argsort(weights)
    found = {name: _replicates(name, values, len(weights))[order] for name, values in given.items()}
    if (found["accuracy"] > 1).any():
        raise DataError(f"accuracy reaches {found['accuracy'].max():g}; give shares from 0 to 1, not per cent")
    panels = [name for name in found if name != "rate"]
    figure = Figure(figsize=(4.8 * len(panels), 3.8), layout="constrained")
    x, x_half = np.array([_interval(row) for row in found["rate"]]).T
    for ax, name in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        y, y_half = np.array([_interval(row) for row in found[name]]).T
        bars: dict[str, Any] = {} if np.isnan(x_half).all() else {"xerr": np.nan_to_num(x_half)}
        bars |= {} if np.isnan(y_half).all() else {"yerr": np.nan_to_num(y_half)}
        ax.errorbar(x, y, marker="o", color=BLUE, markersize=5, linewidth=1.1, capsize=3, **bars)
        for value, place in zip(weights[order], zip(x, y, strict=True), strict=True):
            ax.annotate(f"β = {value:g}", place, (4, 5), textcoords="offset points", fontsize=7, color=GREY)
        ax.margins(0.12)
        ax.set_xlim(left=min(0.0, *ax.get_xlim()))
        ax.set_xlabel("rate (nats)")
        ax.set_ylabel("log loss (nats)" if name == "log_loss" else "accuracy")
        clean(ax)
    return figure


def _nodes_of_graph(data: xr.Dataset, graph: Any) -> NDArray[np.int64]:
    """Positions of the nodes of one graph."""
    if "node_graph" not in data:
        if graph not in (None, 0):
            raise DataError(f"graph={graph!r}, but the data hold one graph; leave it out")
        return np.arange(data.sizes["node"])
    index = data["node_graph"].values
    known = np.unique(index)
    if graph is None and len(known) > 1:
        raise DataError(f"the data hold {len(known):,} graphs; choose one by its position, such as graph={known[0]}")
    nodes = np.flatnonzero(index == (known[0] if graph is None else graph))
    if not len(nodes):
        raise DataError(f"graph={graph!r} is not there; choose a position from {known[0]} to {known[-1]}")
    return nodes


def _classes(data: xr.Dataset, nodes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Classes of nodes, unknown ones as the last."""
    if "node_class" not in data:
        return np.zeros(len(nodes), dtype=np.int64)
    own = data["node_class"].values[nodes]
    return np.where(own < 0, np.iinfo(np.int64).max, own)


def _ordered(data: xr.Dataset, nodes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Nodes by class, then by descending observed degree, then as they come."""
    return nodes[np.lexsort((-data["degree_observed"].values[nodes], _classes(data, nodes)))]


def _binned(
    first: NDArray[np.int64], second: NDArray[np.int64], above: Floats, below: Floats, number: int, cells: int
) -> Floats:
    """Sums by cell (cell, cell) over the pairs of nodes there; nan on the diagonal, to which both triangles belong."""
    row, column = first * cells // number, second * cells // number
    image = np.zeros((cells, cells))
    np.add.at(image, (row, column), above)
    np.add.at(image, (column, row), below)
    size = np.bincount(np.arange(number) * cells // number, minlength=cells)
    image /= np.outer(size, size)
    np.fill_diagonal(image, np.nan)
    return image


def _mark_classes(ax: Axes, data: xr.Dataset, ordered: NDArray[np.int64]) -> None:
    """Lines between classes, and their names at the sides."""
    own = _classes(data, ordered)
    starts = np.append(np.flatnonzero(np.diff(own, prepend=-1)), len(own))
    alone = "node_class" not in data or len(starts) < 3
    ax.set_xlabel("nodes by observed degree" if alone else "nodes by class, then by observed degree", fontsize=SMALL)
    ax.tick_params(labelsize=SMALL, length=2.5)
    if alone or len(starts) > _MOST_CLASSES + 1:
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(MaxNLocator(6, integer=True))
        return
    for start in starts[1:-1]:
        ax.axhline(start, color=GREY, linewidth=0.5)
        ax.axvline(start, color=GREY, linewidth=0.5)
    names = data["class"].values if "class" in data.coords else None
    found = own[starts[:-1]]
    labels = [
        "unknown" if k == np.iinfo(np.int64).max else str(names[k]) if names is not None else f"class {k}"
        for k in found
    ]
    wide = np.diff(starts) >= _NARROW * len(own)  # the names of others would overlap
    labels = [label if shown else "" for label, shown in zip(labels, wide, strict=True)]
    middle = (starts[1:] + starts[:-1]) / 2
    ax.set_yticks(middle, labels, fontsize=SMALL, rotation=90, va="center")
    ax.set_xticks(middle, labels, fontsize=SMALL)
    ax.tick_params(length=0)


def _interval(values: Floats) -> tuple[float, float]:
    """Mean and half-width of Student's interval of it; the latter nan for one value."""
    if len(values) < 2:
        return float(values.mean()), float("nan")
    half = student.ppf((1 + _LEVEL) / 2, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean()), float(half)


def _replicates(name: str, values: ArrayLike, number: int) -> Floats:
    """Values (beta, replicate), checked."""
    array = np.asarray(values, dtype=float)
    if array.ndim not in (1, 2) or len(array) != number or not array.size:
        raise DataError(f"{name} has shape {array.shape}; give (beta,) or (beta, replicate) for {number} weights")
    if not (np.isfinite(array) & (array >= 0)).all():
        raise DataError(f"{name} holds values that are missing or negative; drop these runs")
    return array.reshape(number, -1)


def _long_form(
    table: xr.Dataset | pd.DataFrame | Mapping[str, ArrayLike], metric: str, noise: str, method: str
) -> tuple[NDArray[Any], Floats, Floats]:
    """Methods, levels and values of every run."""
    if isinstance(table, xr.Dataset):
        names, levels, found = _runs_of_array(table, metric, noise, method)
    else:
        names, levels, found = _runs_of_columns(table, metric, noise, method)
    if found.dtype.kind not in "biuf" or levels.dtype.kind not in "biuf" or not np.isfinite(levels).all():
        raise DataError(f"{noise} and {metric} must be numbers, no level missing")
    if not len(found) or not ((found >= 0) & (found <= 1)).all():
        raise DataError(f"{metric} must lie in [0, 1] for at least one run, none missing; give shares, not per cent")
    return names, levels.astype(float), found.astype(float)


def _runs_of_array(
    table: xr.Dataset, metric: str, noise: str, method: str
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Methods, levels and values of the runs in an array (method, noise, ...) that are not missing."""
    if metric not in table:
        raise DataError(f"the table has no variable {metric!r}; it has {[str(x) for x in table.data_vars]}")
    lost = [dim for dim in (method, noise) if dim not in table[metric].dims]
    if lost:
        raise DataError(f"{metric} has dims {table[metric].dims}; it lacks {lost}")
    values = table[metric].transpose(method, noise, ...)
    labels = [values[dim].values if dim in values.coords else np.arange(values.sizes[dim]) for dim in (method, noise)]
    numbers = values.values.astype(float)
    grid = np.meshgrid(*(np.arange(size) for size in numbers.shape[:2]), indexing="ij")
    rows, columns = (
        np.broadcast_to(part.reshape(*part.shape, *[1] * (numbers.ndim - 2)), numbers.shape).ravel() for part in grid
    )
    kept = np.isfinite(numbers.ravel())
    return labels[0][rows][kept], labels[1][columns][kept], numbers.ravel()[kept]


def _runs_of_columns(
    table: pd.DataFrame | Mapping[str, ArrayLike], metric: str, noise: str, method: str
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Methods, levels and values of the runs in a table with one row for each."""
    lost = [name for name in (method, noise, metric) if name not in table]
    if lost:
        raise DataError(f"the table lacks the columns {lost}; it has {[str(x) for x in table]}")
    columns = arranged_together({name: table[name] for name in (method, noise, metric)}, ["run"])
    names, levels, found = (np.asarray(column) for column in columns)
    if names.ndim != 1 or not names.shape == levels.shape == found.shape:
        raise DataError(
            f"columns have shapes {names.shape}, {levels.shape} and {found.shape}; give one row for each run"
        )
    return names, levels, found
