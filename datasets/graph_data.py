"""The labelled data set of a graph, or of many: how it is put together, checked and split.

`probmodels.datasets.graphs` describes what it holds and offers the loaders.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from importlib import import_module
from types import ModuleType
from typing import Annotated, Any

import numpy as np
import xarray as xr
from annotated_types import Ge
from numpy.typing import ArrayLike, NDArray

from probmodels.datasets.checks import as_array
from probmodels.datasets.labelled import arranged, row_labels
from probmodels.datasets.pairs import Pairs, check_pairs, some
from probmodels.errors import DataError
from probmodels.options import Natural, Seed, checked, refuse_unused

__all__ = ["SPLITS", "Folds", "check_graph", "degree_features", "make_graph", "split_graphs", "split_nodes"]

SPLITS = ("train", "validation", "stop", "test")
Folds = Annotated[int, Ge(3)]  # one for testing, one for validation
_ONE_HOT_LIMIT = 1000  # the custom of the field: degrees from here on are one number, not a column each


@checked(DataError)
def make_graph(
    x: ArrayLike | None,
    y: ArrayLike,
    edges: ArrayLike | None = None,
    *,
    graph: ArrayLike | None = None,
    split: ArrayLike | None = None,
    true_edges: ArrayLike | None = None,
    nodes: ArrayLike | None = None,
    features: Sequence[str] | None = None,
    graphs: ArrayLike | None = None,
    unlabelled: bool = False,
    mend: bool = False,
    mends: Sequence[str] = (),
    name: str = "graph",
    source: str = "arrays",
    **attrs: str | float,
) -> xr.Dataset:
    """Labelled graph data from arrays, checked.

    Parameters
    ----------
    x
        Features (node, feature), finite; None takes the degrees of the edges, see `degree_features`.
    y
        Class labels of any type, (node,), or (graph,) where ``graph`` is given.
    edges
        Undirected edges (edge, 2) as positions of nodes; None for no graph.
    graph
        Graph of every node (node,), ascending from 0, for a collection of graphs.
    split
        "train", "validation", "stop", "test" or "" for every label; None leaves all of them "".
    true_edges
        Edges (true_edge, 2), where they are known.
    nodes, features, graphs
        Labels of nodes, features and graphs; numbered from 0 where None. Those of features are not used with degrees,
        those of graphs not with one graph.
    unlabelled
        Whether labels may be missing; such nodes get ``y = -1``.
    mend
        Whether to drop self-loops and edges listed again, and report it in ``mends``, in place of an error.
    mends
        Sentences on earlier repairs.
    name, source, **attrs
        Attributes of the data set.

    Returns
    -------
    xr.Dataset
        As `probmodels.datasets.graphs` describes it.

    Raises
    ------
    DataError
        If anything does not fit: no nodes, unknown nodes, self-loops, repeated edges, lengths that differ, missing
        values, a class without a node to train on.
    """
    if x is None:
        refuse_unused(make_graph, "degrees as features", features=features)
    if graph is None:
        refuse_unused(make_graph, "one graph", graphs=graphs)
    said = list(mends)
    if graph is None:
        x, y, split = _in_order({"features": x, "labels": y, "split": split}, "node", nodes, features)
    else:
        x, graph = _in_order({"features": x, "graph": graph}, "node", nodes, features)
        y, split = _in_order({"labels": y, "split": split}, "graph", graphs)
    y_position, classes = _classes(y, unlabelled, "graph" if graph is not None else "node")
    index = None if graph is None else _graph_index(graph, len(y_position))
    num_nodes = len(y_position) if index is None else len(index)
    if num_nodes == 0:
        raise DataError(f"{name}: a graph without nodes; give at least one node")
    node = np.arange(num_nodes) if nodes is None else _labels(nodes, num_nodes, "nodes")
    pairs = check_pairs(edges, node, index, mend=mend, mends=said)
    if x is None:
        values, feature = degree_features(pairs, num_nodes)
        attrs["features"] = "degree"
    else:
        values = _features(x, num_nodes, node, features)
        feature = np.arange(values.shape[1]) if features is None else np.asarray(features, dtype=np.str_)
    unit = "node" if index is None else "graph"
    variables: dict[str, Any] = {
        "x": (("node", "feature"), values),
        "source": ("edge", pairs[:, 0]),
        "target": ("edge", pairs[:, 1]),
        "y": (unit, y_position),
        "split": (unit, _split(split, y_position, classes)),
    }
    coords: dict[str, Any] = {"node": node, "feature": feature, "class": classes}
    if index is not None:
        variables["graph_index"] = ("node", index)
        coords["graph"] = np.arange(len(y_position)) if graphs is None else _labels(graphs, len(y_position), "graphs")
    if true_edges is not None:
        truth = check_pairs(true_edges, node, index, what="true edge")
        variables |= {"true_source": ("true_edge", truth[:, 0]), "true_target": ("true_edge", truth[:, 1])}
    text = {"name": name, "source": source, **attrs, "mends": json.dumps(said, ensure_ascii=False)}
    return xr.Dataset(variables, coords, text)


def _in_order(values: Mapping[str, Any], unit: str, labels: Any, features: Any = None) -> list[Any]:
    """Arrays over a unit, those that carry labels in the order of its labels, or else of the first that has any."""
    rows = None if labels is None else as_array(labels, f"{unit}s")
    if rows is None or rows.ndim != 1:
        rows = row_labels(*values.values(), dim=unit)
    columns = {"features": {"feature": features}}
    return [arranged(one, name, {unit: rows} | columns.get(name, {})) for name, one in values.items()]


def check_graph(data: xr.Dataset) -> xr.Dataset:
    """The data set itself, once everything in it fits; methods call this on what they are given.

    Raises
    ------
    DataError
        If variables are absent, have other dims, or hold what `make_graph` would refuse.
    """
    if not isinstance(data, xr.Dataset):
        raise DataError(f"graph data must be an xr.Dataset, not {type(data).__name__}; see datasets.graphs.make_graph")
    unit = "graph" if "graph_index" in data else "node"
    wanted = {"x": ("node", "feature"), "y": (unit,), "split": (unit,), "source": ("edge",), "target": ("edge",)}
    if unit == "graph":
        wanted["graph_index"] = ("node",)
    for name, dims in wanted.items():
        if name not in data:
            raise DataError(f"graph data lack the variable {name!r} {dims}; see datasets.graphs.make_graph")
        if data[name].dims != dims:
            raise DataError(f"{name} has dims {data[name].dims}; expected {dims}")
    if data.sizes["node"] == 0:
        raise DataError("a graph without nodes; give at least one node")
    if "class" not in data.coords:
        raise DataError("graph data lack the coordinate 'class', the labels of the classes")
    node = data["node"].values if "node" in data.coords else np.arange(data.sizes["node"])
    features = [str(f) for f in data["feature"].values] if "feature" in data.coords else None
    y, classes = data["y"].values, data["class"].values
    if y.dtype.kind not in "iu" or (y < -1).any() or (y >= len(classes)).any():
        raise DataError(f"y must hold positions of the {len(classes)} classes, -1 where unknown; got {y.dtype}")
    index = _graph_index(data["graph_index"].values, len(y)) if unit == "graph" else None
    _features(data["x"].values, data.sizes["node"], node, features)
    for prefix in ("", "true_"):
        if f"{prefix}source" in data:
            ends = np.stack([data[f"{prefix}source"].values, data[f"{prefix}target"].values], axis=1)
            check_pairs(ends, node, index, what=f"{prefix}edge".replace("_", " "))
    _split(data["split"].values, y, classes)
    return data


def degree_features(pairs: Pairs, num_nodes: int) -> tuple[NDArray[np.float32], NDArray[Any]]:
    """Degrees as features (node, feature), and the features' labels.

    One column for every degree from 0 to the highest, or the standardised degree where that is 1000 or more.
    """
    degree = np.bincount(pairs.ravel(), minlength=num_nodes)
    if degree.max() < _ONE_HOT_LIMIT:
        values = np.zeros((num_nodes, int(degree.max()) + 1), dtype=np.float32)
        values[np.arange(num_nodes), degree] = 1
        return values, np.array([f"degree {k}" for k in range(values.shape[1])])
    return standardised(degree[:, None]), np.array(["degree"])


def standardised(values: NDArray[Any]) -> NDArray[np.float32]:
    """Columns with mean 0 and standard deviation 1; constant columns become 0."""
    constant = (values == values[:1]).all(axis=0)  # exactly, where a deviation would be that of rounding
    centred = np.where(constant, 0.0, values - values.mean(axis=0))
    return (centred / np.where(constant, 1.0, centred.std(axis=0))).astype(np.float32)


# -------------------------------------------------------------------------------------------------------- splits


@checked(DataError)
def split_nodes(
    data: xr.Dataset,
    *,
    train: Natural,
    validation: Natural,
    stop: Natural = 0,
    test: Natural | None = None,
    seed: Seed = 0,
) -> xr.Dataset:
    """Nodes at random into splits of given sizes, stratified by class.

    Every class gets its share of each split, to the nearest whole number, and at least one node to train on.

    Parameters
    ----------
    data
        Labelled nodes.
    train, validation, stop, test
        Numbers of nodes, of all classes together; ``stop`` is for early stopping, and ``test=None`` takes the rest.
    seed
        Seed of the draw.

    Raises
    ------
    DataError
        If the data hold graphs to classify, a count is no count, more nodes are asked for than have a label, or there
        are fewer training nodes than classes.
    """
    if data["y"].dims != ("node",):
        raise DataError("split_nodes splits labelled nodes, but the labels here are of graphs; take split_graphs")
    counts = {"train": train, "validation": validation, "stop": stop, "test": test or 0}
    y = data["y"].values
    members = [np.flatnonzero(y == label) for label in range(data.sizes["class"])]
    left = np.array([len(nodes) for nodes in members])
    if sum(counts.values()) > left.sum():
        asked = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise DataError(f"{asked} are more than the {left.sum()} labelled nodes; choose smaller counts")
    if train < len(members):
        raise DataError(f"train={train} leaves classes out of the training split: choose at least {len(members)}")
    if test is None:
        counts["test"] = int(left.sum()) - sum(counts.values())
    rng = np.random.default_rng(seed)
    queues = [rng.permutation(nodes) for nodes in members]
    split = np.full(len(y), "", dtype="<U10")
    for name, count in counts.items():
        shares = apportion(count, left, left)
        if name == "train":
            for rare in np.flatnonzero(shares == 0):
                shares[shares.argmax()] -= 1
                shares[rare] = 1
        for label, share in enumerate(shares):
            split[queues[label][:share]] = name
            queues[label] = queues[label][share:]
        left = left - shares
    return _with_split(data, split, {**counts, "seed": seed})


@checked(DataError)
def split_graphs(data: xr.Dataset, *, folds: Folds = 10, fold: Natural = 0, seed: Seed = 0) -> xr.Dataset:
    """Graphs into stratified folds: test is one fold, validation the one before it, train the others.

    Parameters
    ----------
    data
        Labelled graphs.
    folds
        Number of folds, 3 or more.
    fold
        The test fold, 0 to ``folds - 1``; all folds of one seed are disjoint and cover the graphs.
    seed
        Seed of the shuffling.

    Raises
    ------
    DataError
        If the data hold nodes to classify, the fold is out of range, or a class has fewer graphs than there are folds.
    """
    from sklearn.model_selection import StratifiedKFold

    if data["y"].dims != ("graph",):
        raise DataError("split_graphs splits labelled graphs, but the labels here are of nodes; take split_nodes")
    if fold >= folds:
        raise DataError(f"fold={fold} is out of range: choose 0 to {folds - 1}")
    labelled = np.flatnonzero(data["y"].values >= 0)
    y = data["y"].values[labelled]
    sizes = np.bincount(y, minlength=data.sizes["class"])
    if sizes.min() < folds:
        rare = data["class"].values[sizes.argmin()]
        raise DataError(f"class {rare} has {sizes.min()} graphs, fewer than folds={folds}; choose fewer folds")
    folder = StratifiedKFold(folds, shuffle=True, random_state=seed % 2**32)  # which takes no larger seeds
    parts = [labelled[part] for _, part in folder.split(y, y)]
    split = np.full(data.sizes["graph"], "", dtype="<U10")
    split[labelled] = "train"
    split[parts[fold - 1]] = "validation"
    split[parts[fold]] = "test"
    return _with_split(data, split, {"folds": folds, "fold": fold, "seed": seed})


def _with_split(data: xr.Dataset, split: NDArray[np.str_], made: dict[str, int]) -> xr.Dataset:
    split = _split(split, data["y"].values, data["class"].values)
    text = json.dumps({key: int(value) for key, value in made.items()})
    return data.assign(split=(data["y"].dims, split)).assign_attrs(split=text)


def apportion(count: int, weights: NDArray[np.int64], limits: NDArray[np.int64]) -> NDArray[np.int64]:
    """Whole shares (k,) of a count in proportion to weights, by largest remainders, none above its limit.

    What a full share cannot take goes to the others; the limits of positive weights must have room for the count.
    """
    shares = np.zeros(len(weights), dtype=np.int64)
    while left := count - int(shares.sum()):
        room = limits - shares
        quota = np.where(room > 0, weights, 0).astype(float)
        quota *= left / quota.sum()
        extra = np.minimum(np.floor(quota).astype(np.int64), room)
        rest = left - int(extra.sum())
        if (np.floor(quota) <= room).all():
            remainder = np.where((room > extra) & (quota > 0), quota - extra, -1.0)
            first = np.argsort(-remainder, kind="stable")[:rest]
            extra[first[remainder[first] >= 0]] += 1
        shares += extra
    return shares


# -------------------------------------------------------------------------------------------------------- checks


def import_pyg(module: str) -> ModuleType:
    """A module of PyG, imported without the warning of torch about what PyG compiles."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*torch\.jit", category=DeprecationWarning)
        return import_module(f"torch_geometric.{module}")


def labels_of(values: ArrayLike) -> NDArray[Any]:
    """Labels as whole numbers where they all are, else as text: what a file can hold."""
    found = np.asarray(values)
    if found.dtype.kind == "O":
        found = np.array(found.tolist())
    if found.dtype.kind == "f" and np.isfinite(found).all() and (found == np.round(found)).all():
        return found.astype(np.int64)
    return found.astype(np.int64) if found.dtype.kind in "iu" else np.array([str(v) for v in found], dtype=np.str_)


def _labels(values: ArrayLike, length: int, what: str) -> NDArray[Any]:
    found = as_array(values, what)
    if found.shape != (length,):
        raise DataError(f"{what}: labels of shape {found.shape} for {length} of them; give one for each")
    labels = labels_of(found)
    known, count = np.unique(labels, return_counts=True)
    if len(known) < length:
        raise DataError(f"{what} are labelled {some(known[count > 1])} more than once; give each a label of its own")
    return labels


def _classes(y: ArrayLike, unlabelled: bool, unit: str) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """Class positions, -1 where a label is missing, and the labels of the classes in ascending order."""
    found = as_array(y, "labels")
    if found.ndim == 2 and found.shape[1] == 1:
        found = found[:, 0]
    if found.ndim != 1:
        raise DataError(f"labels of shape {found.shape}; give one class label for each {unit}")
    if found.dtype.kind == "f":
        missing = np.isnan(found)
    elif found.dtype.kind in "OT":
        missing = np.array([v is None or v != v or v == "" for v in found], dtype=bool)
    else:
        missing = np.zeros(len(found), dtype=bool)
    if missing.any() and not unlabelled:
        raise DataError(
            f"{missing.sum()} of {len(found)} labels are missing, such as that of {unit} {missing.argmax()}; drop "
            "these, or pass unlabelled=True to keep them without a label"
        )
    if len(found) and missing.all():
        raise DataError(f"no {unit} has a label; give the column of the labels")
    known = np.array(found[~missing].tolist()) if found.dtype.kind == "O" else found[~missing]
    if known.dtype.kind == "f" and (known != np.round(known)).any():
        raise DataError("labels are fractions, but the methods on graphs classify; give classes, binned if need be")
    classes, position = np.unique(labels_of(known), return_inverse=True)
    result = np.full(len(found), -1, dtype=np.int64)
    result[~missing] = position
    return result, classes


def _graph_index(graph: ArrayLike, num_graphs: int) -> NDArray[np.int64]:
    index = as_array(graph, "graph")
    if index.ndim != 1 or index.dtype.kind not in "iu":
        raise DataError(f"graph has shape {index.shape} and type {index.dtype}; give the number of every node's graph")
    if len(index) and (np.diff(index) < 0).any():
        raise DataError("nodes of a graph must stand together: sort nodes by graph, graphs numbered from 0")
    empty = np.setdiff1d(np.arange(num_graphs), index)
    if len(empty):
        raise DataError(f"graphs {some(empty)} have no nodes; drop them and their labels")
    if len(index) and (index[0] != 0 or index[-1] >= num_graphs):
        raise DataError(f"graph runs from {index[0]} to {index[-1]}, but there are labels for {num_graphs} graphs")
    return index.astype(np.int64)


def _features(x: ArrayLike, num_nodes: int, node: NDArray[Any], features: Sequence[str] | None) -> NDArray[np.float32]:
    values = as_array(x, "features")
    if values.ndim != 2:
        raise DataError(f"features have shape {values.shape}; give (node, feature)")
    if len(values) != num_nodes:
        raise DataError(
            f"features have {len(values)} rows, but labels tell of {num_nodes} nodes; give each node a row and a label"
        )
    if values.dtype.kind not in "fiub":
        raise DataError(f"features are of type {values.dtype}; encode them as numbers")
    if values.shape[1] == 0:
        raise DataError("there are no features; give at least one column, or none at all for the degrees")
    if features is not None and len(features) != values.shape[1]:
        raise DataError(f"{len(features)} names for {values.shape[1]} features; give one for each")
    values = values.astype(np.float32)
    bad = ~np.isfinite(values)
    if bad.any():
        rows, columns = np.nonzero(bad)
        named = columns if features is None else np.asarray(features)[columns]
        raise DataError(
            f"{bad.sum()} values of the features are missing or infinite, in {some(dict.fromkeys(named.tolist()))} of "
            f"nodes {some(node[np.unique(rows)])}; fill them, or drop these nodes or features"
        )
    return values


def _split(split: ArrayLike | None, y: NDArray[np.int64], classes: NDArray[Any]) -> NDArray[np.str_]:
    if split is None:
        return np.full(len(y), "", dtype="<U10")
    found = as_array(split, "split").astype(np.str_)
    if found.shape != y.shape:
        raise DataError(f"split has shape {found.shape} for {len(y)} labels; give one entry for each")
    unknown = np.setdiff1d(found, [*SPLITS, ""])
    if len(unknown):
        raise DataError(
            f"split has entries {some(map(repr, unknown.tolist()))}; choose among {', '.join(SPLITS)} and ''"
        )
    if ((y < 0) & (found != "")).any():
        raise DataError(f"{((y < 0) & (found != '')).sum()} entries of a split have no label; set their split to ''")
    absent = np.setdiff1d(y[y >= 0], y[found == "train"])
    if (found != "").any() and len(absent):
        raise DataError(
            f"classes {some(classes[absent])} are absent from the training split, so that nothing could be learned of "
            "them; add examples to it, or drop these classes"
        )
    return found.astype("<U10")
