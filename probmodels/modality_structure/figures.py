"""Pictures of embedded modalities: queries with what is nearest, maps, similarities, the gap before and after closing.

Each comes with what it shows in words and numbers, for readers who do not see it.
"""

from __future__ import annotations

from collections.abc import Mapping
from textwrap import wrap
from typing import Any, Literal, NamedTuple

import numpy as np
import xarray as xr
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from probmodels._axes import GREY, SMALL, clean
from probmodels.datasets.checks import as_array
from probmodels.datasets.paired.views import kind_of
from probmodels.errors import ResultError
from probmodels.inference.result import Result
from probmodels.modality_structure.measures import Embedded, close_gap, embed, modality_gap, recall_at, shared_rows
from probmodels.options import checked

__all__ = ["Pictured", "descriptions", "embedding_map", "figures_of"]

_QUERIES, _NEAREST = 6, 5
_MOST_CLASSES = 10  # that have colours of their own
_MOST_POINTS, _MOST_CELLS = 600, 80  # rows of a map, and of a matrix
_LETTERS = 24  # of a line of text

Floats = NDArray[np.float64]


class Pictured(NamedTuple):
    """A figure, and what it shows in words."""

    figure: Figure
    text: str


@checked(ResultError)
def embedding_map(
    result: Result, *, split: Literal["train", "test"] = "test", colour_by: ArrayLike | None = None
) -> Figure:
    """Embeddings on their two leading principal components, modalities by markers.

    The first panel has shared embeddings. With deep feature separation there is a second, of independent ones. Colour
    by a factor that only one modality tells, to see where it is kept.

    Parameters
    ----------
    result
        Result of `fit_svi`.
    split
        Whose rows.
    colour_by
        Classes or numbers of all rows of the data (row,); None for the labels.

    Raises
    ------
    ResultError
        If the result is not one of this method, or ``colour_by`` has another number of rows.
    """
    found = embed(result, split)
    values = found.label
    if colour_by is not None:
        rows = result.rebuild().data
        assert rows is not None
        values = as_array(colour_by, "colour_by")
        if values.shape != (rows.sizes["row"],):
            raise ResultError(f"colour_by has shape {values.shape}; give one for each of {rows.sizes['row']} rows")
        values = values[rows["split"].values == split]
    return _map(found, values).figure


def figures_of(result: Result) -> dict[str, Pictured]:
    """All figures of a result, by name, of rows held out."""
    problem = result.rebuild()
    assert problem.data is not None
    found, closed = embed(result), close_gap(result)
    rows = problem.data.isel(row=problem.data["split"].values == "test")
    made = {"map": _map(found, found.label)}
    for a, b in found.pairs:
        if (found.present[a] & found.present[b]).sum() > _NEAREST:
            made[f"nearest_{a}_to_{b}"] = _nearest(found, rows, a, b)
            made[f"similarity_{a}_to_{b}"] = _similarity(found, a, b)
            made[f"gap_{a}_to_{b}"] = _gap(found, closed, a, b)
    return made


def _components(z: Floats) -> tuple[Floats, float]:
    """Two leading principal components (row, 2) and their share of the variance."""
    centred = z - z.mean(0)
    left, size, _ = np.linalg.svd(centred, full_matrices=False)
    scores = np.zeros((len(z), 2))
    scores[:, : min(2, len(size))] = (left * size)[:, :2]
    return scores, float(np.square(size[:2]).sum() / max(np.square(size).sum(), 1e-300))


def _some(count: int, most: int) -> NDArray[np.int_]:
    """At most so many rows, evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))


def _map(found: Embedded, values: NDArray[Any] | None) -> Pictured:
    panels = [("shared", found.z)] + ([("independent", found.own)] if found.own else [])
    figure = Figure(figsize=(4.6 * len(panels) + 1.2, 4), layout="constrained")
    words = []
    for (what, z), ax in zip(panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True):
        rows = {name: np.flatnonzero(found.present[name]) for name in z}
        rows = {name: there[_some(len(there), _MOST_POINTS)] for name, there in rows.items() if len(there)}
        scores, share = _components(np.concatenate([z[name][there] for name, there in rows.items()]))
        start = 0
        for place, (name, there) in enumerate(rows.items()):
            own = scores[start : start + len(there)]
            _points(ax, own, None if values is None else values[there], "os^Dv*P"[place % 7], name, place == 0)
            start += len(there)
        ax.set_title(f"{what} embeddings", fontsize=9)
        ax.set(xlabel="first component", ylabel="second component")
        ax.legend(fontsize=SMALL, frameon=False)
        clean(ax)
        words.append(f"{what} embeddings of {', '.join(rows)} on two components, {share:.0%} of their variance")
    return Pictured(figure, "; ".join(words))


def _points(ax: Axes, xy: Floats, values: NDArray[Any] | None, marker: str, name: str, first: bool) -> None:
    """Points of one modality, coloured by classes or by numbers."""
    size: dict[str, Any] = {"s": 14, "marker": marker, "alpha": 0.7, "linewidths": 0}
    if values is None:
        ax.scatter(xy[:, 0], xy[:, 1], color=GREY, label=name, **size)
        return
    classes = np.unique(values)
    if len(classes) <= _MOST_CLASSES:
        colours = colormaps["tab10"](np.searchsorted(classes, values))
        ax.scatter(xy[:, 0], xy[:, 1], c=colours, **size)
        for place, one in enumerate(classes if first else ()):
            ax.scatter([], [], color=colormaps["tab10"](place), label=str(one)[:_LETTERS], s=14)
    elif values.dtype.kind in "fiu":
        ax.scatter(xy[:, 0], xy[:, 1], c=values, cmap="viridis", **size)
    else:
        ax.scatter(xy[:, 0], xy[:, 1], c=np.searchsorted(classes, values), cmap="turbo", **size)
    ax.scatter([], [], color="0.3", marker=marker, label=name, s=14)


def _similarity(found: Embedded, a: str, b: str) -> Pictured:
    z, other = shared_rows(found, a, b)
    rows = _some(len(z), _MOST_CELLS)
    both = found.present[a] & found.present[b]
    if found.label is not None:
        rows = rows[np.argsort(found.label[both][rows], kind="stable")]
    table = z[rows] @ other[rows].T
    figure = Figure(figsize=(5, 4), layout="constrained")
    ax = figure.subplots()
    shown = ax.imshow(table, cmap="RdBu_r", vmin=-1, vmax=1)
    order = " (by label)" if found.label is not None else ""
    ax.set(xlabel=f"rows of {b}{order}", ylabel=f"rows of {a}{order}", xticks=[], yticks=[])
    figure.colorbar(shown, ax=ax, label="similarity")
    own = np.diag(table).mean()
    others = (table.sum() - np.trace(table)) / max(table.size - len(table), 1)
    return Pictured(
        figure,
        f"similarities of {len(rows)} rows of {a} and {b} held out: {own:.2f} on average to the partner, {others:.2f} "
        "to others",
    )


def _gap(found: Embedded, closed: Embedded, a: str, b: str) -> Pictured:
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    said = []
    for what, one, ax in zip(
        ("as fitted", "closed"), (found, closed), figure.subplots(1, 2, sharex=True, sharey=True), strict=True
    ):
        z, other = shared_rows(one, a, b)
        some = _some(len(z), _MOST_POINTS)
        scores, _ = _components(np.concatenate([z[some], other[some]]))
        parts = scores[: len(some)], scores[len(some) :]
        for name, part, colour, marker in zip((a, b), parts, colormaps["tab10"].colors, "os", strict=False):  # type: ignore[attr-defined]
            ax.scatter(*part.T, s=10, color=colour, marker=marker, alpha=0.5, linewidths=0, label=name)
        middles = np.array([part.mean(0) for part in parts])
        ax.plot(*middles.T, color="k", marker="x", linewidth=1.2, label="centroids")
        ax.set_title(what, fontsize=9)
        ax.legend(fontsize=SMALL, frameon=False)
        clean(ax)
        gap = modality_gap(z, other)
        said.append(f"{what}: squared distance of centroids {gap[0]:.3f}, of distributions {gap[1]:.3f}")
    return Pictured(figure, f"{a} and {b} held out, {'; '.join(said)}")


def _nearest(found: Embedded, rows: xr.Dataset, a: str, b: str) -> Pictured:
    """Queries of one modality, their partners in the other, and what is nearest."""
    z, other = shared_rows(found, a, b)
    there = np.flatnonzero(found.present[a] & found.present[b])
    table = z @ other.T
    queries = _some(len(z), _QUERIES)
    heads = [a, f"its {b}", *(str(place + 1) for place in range(_NEAREST))]
    figure = Figure(figsize=(1.35 * len(heads), 1.1 * len(queries) + 0.5), layout="constrained")
    axes = figure.subplots(len(queries), len(heads), squeeze=False)
    hits = 0
    for line, query in zip(axes, queries, strict=True):
        nearest = np.argsort(-table[query], kind="stable")[:_NEAREST]
        hits += int(query in nearest)
        _show(line[0], rows, a, int(there[query]))
        _show(line[1], rows, b, int(there[query]))
        for ax, candidate in zip(line[2:], nearest, strict=True):
            _show(ax, rows, b, int(there[candidate]), right=bool(candidate == query))
    for ax, head in zip(axes[0], heads, strict=True):
        ax.set_title(head, fontsize=8)
    text = (
        f"{len(queries)} rows of {a} held out, each with its {b} and the {_NEAREST} nearest of {len(z)}: {hits} have "
    )
    text += f"it among them, framed; of all rows {recall_at(table, _NEAREST):.0%}"
    return Pictured(figure, text)


def _show(ax: Axes, rows: xr.Dataset, name: str, place: int, right: bool = False) -> None:
    """One view: a picture, the words of a text, or a line through the numbers of a vector."""
    view = rows[name].isel(row=place).values
    kind = kind_of(rows[name])
    if kind == "pictures":
        low, high = view.min(), view.max()
        picture = np.moveaxis((view - low) / max(high - low, 1e-12), 0, -1)
        colours = picture.shape[-1] >= 3
        ax.imshow(picture[..., :3] if colours else picture[..., 0], cmap=None if colours else "gray")
    elif kind == "texts":
        said = " ".join(str(word) for word in rows[f"{name}_word"].values[view[view > 0]])
        ax.text(
            0.5,
            0.5,
            "\n".join(wrap(said, _LETTERS - 4, max_lines=5, placeholder=" …")),
            ha="center",
            va="center",
            fontsize=5,
            transform=ax.transAxes,
        )
    else:
        ax.plot(view, color="0.3", linewidth=0.8)
    ax.set(xticks=[], yticks=[])
    if right:
        for spine in ax.spines.values():
            spine.set(color="tab:green", linewidth=2.5)


def descriptions(made: Mapping[str, Pictured]) -> list[str]:
    """Lines that say what each figure shows."""
    return [f"{name}: {one.text}" for name, one in made.items()]
