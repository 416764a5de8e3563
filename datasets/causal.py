"""Data with concepts: images or tables whose rows carry labels of what causes what in them.

A data set is an `xr.Dataset` with

- ``image`` (data, channel, row, column), 32-bit floats in [0, 1], or ``observation`` (data, feature);
- ``label`` (data, concept), 64-bit floats in units of the concept, nan where a row is not labelled;
- ``split`` (data,), "train" or "test";
- ``graph`` (cause, effect), where it is known: 1 where the row's concept is a direct cause of the column's, else 0.

References
----------
Yang, M., Liu, F., Chen, Z., Shen, X., Hao, J. and Wang, J. (2021). CausalVAE: disentangled representation learning via
neural structural causal models. CVPR. https://arxiv.org/abs/2004.08697
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, TypeAlias

import numpy as np
import pandas as pd
import xarray as xr
from annotated_types import Len
from numpy.typing import ArrayLike, NDArray

from probmodels.datasets.checks import Share, as_array
from probmodels.datasets.labelled import arranged, labels_of
from probmodels.errors import DataError
from probmodels.options import Seed, checked, hint

__all__ = [
    "Edges",
    "as_graph",
    "causal_order",
    "check_concepts",
    "hide_labels",
    "make_concepts",
    "position_of",
    "split_rows",
]

Edges: TypeAlias = Sequence[Sequence[str | float]] | np.ndarray | xr.DataArray | pd.DataFrame

_DIMS = {"image": ("data", "channel", "row", "column"), "observation": ("data", "feature")}


@checked(DataError)
def make_concepts(
    values: ArrayLike,
    labels: ArrayLike,
    *,
    names: Annotated[Sequence[str], Len(1)],
    split: ArrayLike | None = None,
    graph: Edges | None = None,
    features: Sequence[str] | None = None,
    units: Sequence[str] | None = None,
    name: str = "concepts",
    source: str = "",
) -> xr.Dataset:
    """Label arrays of images or of tables, and of the concepts in them.

    Arrays of xarray and frames of pandas are put in order by the labels that they carry: concepts by their names, axes
    by theirs, and rows by the labels of the rows, where more than one of ``values``, ``labels`` and ``split`` has any.

    Parameters
    ----------
    values
        Images (data, channel, row, column) of intensities in [0, 1], or a table (data, feature).
    labels
        Concepts (data, concept), nan where not labelled.
    names
        Names of the concepts.
    split
        ``"train"`` or ``"test"`` for every row (data,); None for all to train.
    graph
        As in `as_graph`; None where it is not known.
    features
        Names of the columns of a table; None for those that the table carries, or for those of the concepts where
        there are as many, else numbers.
    units
        Units of the concepts, for the record.
    name, source
        Attributes of the data set, for the record.

    Returns
    -------
    xr.Dataset
        As the module describes it.

    Raises
    ------
    DataError
        If the data cannot be used, as `check_concepts` finds it; or if labels of arrays do not fit each other.
    """
    names = [str(entry) for entry in names]
    rows = _rows(values, labels, split)
    kind = "image" if getattr(values, "ndim", 2) == 4 else "observation"
    columns = labels_of(values, "feature", axis=1) if kind == "observation" else None
    if features is None and columns is not None:
        features = [str(column) for column in columns]
    axes = {dim: rows if dim == "data" else features if dim == "feature" else None for dim in _DIMS[kind]}
    values = as_array(arranged(values, "values", axes), "values")
    labels = as_array(arranged(labels, "labels", {"data": rows, "concept": names}), "labels")
    if values.ndim not in (2, 4) or 0 in values.shape:
        raise DataError(
            f"values of shape {values.shape}; give images (data, channel, row, column) or a table (data, feature), "
            "none of them empty"
        )
    if labels.shape != (len(values), len(names)):
        raise DataError(
            f"labels of shape {labels.shape} for {len(values)} rows and {len(names)} concepts; give a row of labels "
            "for each, with nan where one is missing"
        )
    splits = np.full(len(values), "train") if split is None else _splits(split, rows)
    if splits.shape != (len(values),):
        raise DataError(f"split of shape {splits.shape} for {len(values)} rows; give one for each")
    try:
        values, labels = values.astype(np.float32 if kind == "image" else np.float64), labels.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"values and labels have to be numbers: {error}") from error
    coords: dict[str, Any] = {"data": np.arange(len(values)), "concept": names}
    if kind == "observation":
        width = values.shape[1]
        features = (
            features if features is not None else names if width == len(names) else [str(i) for i in range(width)]
        )
        if len(features) != width:
            raise DataError(f"{len(features)} names for {width} features; give one for each")
        coords["feature"] = list(features)
    if units is not None:
        if len(units) != len(names):
            raise DataError(f"{len(units)} units for {len(names)} concepts; give one for each")
        coords["unit"] = ("concept", list(units))
    data = xr.Dataset(
        {kind: (_DIMS[kind], values), "label": (("data", "concept"), labels), "split": ("data", splits)},
        coords=coords,
        attrs={"name": name, "source": source},
    )
    if graph is not None:
        data = data.assign_coords(cause=names, effect=names)
        data["graph"] = (("cause", "effect"), as_graph(graph, names))
    check_concepts(data)
    return data


def _rows(*parts: Any) -> pd.Index | None:
    """Labels of the rows: those of the first part that has any which say something."""
    return next((found for part in parts if (found := labels_of(part, "data")) is not None), None)


def _splits(split: Any, rows: pd.Index | None) -> NDArray[np.str_]:
    return as_array(arranged(split, "split", {"data": rows}), "split").astype(np.str_)


def check_concepts(data: Any) -> None:
    """Check that data are what `make_concepts` returns, and that every concept can be learned from the training rows.

    Raises
    ------
    DataError
        If variables or dims are not those of the module; intensities are outside of [0, 1] or numbers are not finite;
        names or splits are repeated or unknown; no row is for training; a concept has no label there or is constant;
        or the graph is not acyclic.
    """
    kinds = [kind for kind in _DIMS if isinstance(data, xr.Dataset) and kind in data]
    if len(kinds) != 1 or "label" not in data or "split" not in data:
        raise DataError(
            "data must be a Dataset with 'image' or 'observation', and 'label' and 'split'; make it by make_concepts"
        )
    for variable, dims in {kinds[0]: _DIMS[kinds[0]], "label": ("data", "concept"), "split": ("data",)}.items():
        if data[variable].dims != dims:
            raise DataError(f"{variable} has dims {data[variable].dims}; expected {dims}")
    _check_values(kinds[0], data[kinds[0]].values)
    names = _names(data["concept"].values if "concept" in data.coords else None)
    splits = data["split"].values
    unknown = np.setdiff1d(splits, ["train", "test"])
    if len(unknown):
        raise DataError(f"split {str(unknown[0])!r} is unknown; choose 'train' or 'test'")
    training = splits == "train"
    if not training.any():
        raise DataError("no row has split 'train'; there is nothing to learn from")
    _check_labels(data["label"].values, names, training)
    if "graph" in data:
        _check_graph(data, names)


def _check_values(kind: str, values: NDArray[Any]) -> None:
    """Check that intensities lie in [0, 1] and that other numbers are finite."""
    wrong = ~((values >= 0) & (values <= 1)) if kind == "image" else ~np.isfinite(values)
    if wrong.any():
        place = tuple(int(i) for i in np.argwhere(wrong)[0])
        remedy = "in [0, 1]: divide those of 8 bits by 255" if kind == "image" else "finite: fill or drop the row"
        raise DataError(f"{kind}{list(place)} is {values[place]}; values have to be {remedy}")


def _check_labels(labels: NDArray[Any], names: Sequence[str], training: NDArray[np.bool_]) -> None:
    """Check that labels are finite or nan, and that each concept varies over the rows for training."""
    if np.isinf(labels).any():
        row, column = np.argwhere(np.isinf(labels))[0]
        raise DataError(f"label of {names[column]!r} in row {row} is infinite; mend it, or leave it out as nan")
    for name, column in zip(names, labels[training].T, strict=True):
        known = column[~np.isnan(column)]
        if not len(known):
            raise DataError(f"concept {name!r} has no label in any row for training; label some, or leave it out")
        if known.min() == known.max():
            raise DataError(
                f"concept {name!r} is constant: each of its {len(known)} labels for training is {known[0]:g}; a "
                "concept that does not vary cannot be learned, so leave it out or add rows where it differs"
            )


def _check_graph(data: xr.Dataset, names: Sequence[str]) -> None:
    """Check that the graph is one of the concepts and has no cycle."""
    if data["graph"].dims != ("cause", "effect"):
        raise DataError(f"graph has dims {data['graph'].dims}; expected ('cause', 'effect')")
    for dim in ("cause", "effect"):
        if dim not in data.coords or list(data[dim].values) != list(names):
            raise DataError(f"coordinate {dim!r} of the graph is not that of the concepts, {', '.join(names)}")
    as_graph(data["graph"].values, names)


@checked(DataError)
def hide_labels(data: xr.Dataset, share: Share, seed: Seed = 0) -> xr.Dataset:
    """The same data with the labels of some training rows, chosen at random, set to nan; a row goes as a whole.

    With one seed, rows that go at a lower share go at a higher one too. Test rows keep their labels.

    Parameters
    ----------
    data
        As `make_concepts` returns them.
    share
        Share of the training rows, 0 up to below 1; the number of rows is rounded.
    seed
        Seed of the choice.

    Raises
    ------
    DataError
        If the share is out of range, or what is left of the labels does not do.
    """
    check_concepts(data)
    training = np.flatnonzero(data["split"].values == "train")
    order = np.random.default_rng(seed).permutation(training)
    labels = data["label"].values.copy()
    labels[order[: round(share * len(training))]] = np.nan
    hidden = data.assign(label=data["label"].copy(data=labels)).assign_attrs(hidden=float(share), hidden_seed=seed)
    check_concepts(hidden)
    return hidden


def as_graph(graph: Any, names: Sequence[str]) -> NDArray[np.int8]:
    """Adjacency (cause, effect) of a directed acyclic graph.

    Parameters
    ----------
    graph
        Pairs of names ``[cause, effect]``, or a matrix (cause, effect) of 0 and 1. Of an array of xarray the axes
        ``cause`` and ``effect`` may be in any order, and so may nodes that carry their names, also in a frame of
        pandas, whose rows are causes.
    names
        Names of the nodes.

    Raises
    ------
    DataError
        If a name is unknown, an entry is neither 0 nor 1, the shape is wrong, or there is a cycle.
    """
    names = _names(names)
    graph = arranged(graph, "graph", {"cause": names, "effect": names})
    if isinstance(graph, Sequence) and not all(isinstance(row, Sequence | np.ndarray) for row in graph):
        raise DataError(f"graph={graph!r}; give pairs of names, [cause, effect], or a matrix of 0 and 1")
    listed = isinstance(graph, Sequence) and not isinstance(graph, str)
    if listed and all(isinstance(end, str) for pair in graph for end in np.atleast_1d(pair).tolist()):
        matrix = np.zeros((len(names), len(names)), dtype=np.int8)
        for pair in graph:
            if isinstance(pair, str) or len(pair) != 2:
                raise DataError(f"edge {pair!r} of the graph; give pairs of names, [cause, effect]")
            matrix[position_of(pair[0], names), position_of(pair[1], names)] = 1
    else:
        found = as_array(graph, "graph")
        if found.shape != (len(names), len(names)):
            raise DataError(
                f"graph of shape {found.shape} for {len(names)} concepts; give (cause, effect), or pairs of names"
            )
        if not np.isin(found, (0, 1)).all():
            raise DataError("graph has entries other than 0 and 1; give 1 for an edge from the row to the column")
        matrix = found.astype(np.int8)
    causal_order(matrix, names)
    return matrix


def causal_order(graph: NDArray[Any], names: Sequence[str] | None = None) -> list[int]:
    """Nodes of a graph (cause, effect), causes before their effects; among those that may come next, the first.

    Raises
    ------
    DataError
        If there is a cycle, the message names the nodes that are in cycles or behind one; or if it is no square array.
    """
    edges = as_array(graph, "graph", numbers=True) != 0
    if edges.ndim != 2 or edges.shape[0] != edges.shape[1]:
        raise DataError(f"graph of shape {edges.shape}; give (cause, effect)")
    left = list(range(len(edges)))
    order: list[int] = []
    while left:
        free = next((node for node in left if not edges[left, node].any()), None)
        if free is None:
            stuck = ", ".join(str(node if names is None else names[node]) for node in left)
            raise DataError(f"the graph has a cycle among {stuck}; causes have to come before their effects")
        order.append(free)
        left.remove(free)
    return order


def position_of(name: Any, names: Sequence[str]) -> int:
    """Place of a concept among the names.

    Raises
    ------
    DataError
        If it is none of them.
    """
    if name not in names:
        raise DataError(f"unknown concept {name!r}{hint(name, names)}")
    return list(names).index(name)


def split_rows(num_rows: int, num_train: int, rng: np.random.Generator) -> NDArray[np.str_]:
    """ "train" for so many rows, chosen at random, and "test" for the others."""
    split = np.full(num_rows, "test", dtype="<U5")
    split[rng.permutation(num_rows)[:num_train]] = "train"
    return split


def _names(names: Sequence[str] | NDArray[Any] | None) -> list[str]:
    if not isinstance(names, Sequence | np.ndarray) or isinstance(names, str) or not len(names):
        raise DataError("the concepts have no names; give them as coordinate 'concept', or as names")
    found = [str(name) for name in names]
    again = sorted({name for name in found if found.count(name) > 1})
    if again:
        raise DataError(f"concepts {', '.join(map(repr, again))} are named more than once; names have to differ")
    return found
