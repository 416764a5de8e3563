"""The user's own graphs: tables of nodes and edges, and PyG's `Data`.

`load_graph` reads CSV, Parquet, data frames and arrays; `from_pyg` takes one `Data` or a list of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import xarray as xr
from annotated_types import Len
from numpy.typing import NDArray

from probmodels.datasets.checks import as_array, existing_file
from probmodels.datasets.graph_data import (
    import_pyg,
    labels_of,
    make_graph,
    split_graphs,
    split_nodes,
    standardised,
)
from probmodels.datasets.pairs import Pairs, some
from probmodels.errors import DataError
from probmodels.options import Natural, checked, refuse_unused

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["from_pyg", "load_graph"]

_ENDS = ("source", "target")
_WEIGHTS = ("weight", "weights")
_UNUSED_WEIGHTS = "Weights of edges are not used: every listed edge counts as one."
_UNUSED_ATTRIBUTES = "Attributes of edges are not used."
_Sizes = Annotated[Mapping[str, Natural | None], Len(1)]  # options of split_nodes or split_graphs
_MASKS = {"train_mask": "train", "val_mask": "validation", "stop_mask": "stop", "test_mask": "test"}


@checked(DataError)
def load_graph(
    edges: Any = None,
    nodes: Any = None,
    *,
    label: str = "label",
    id: str | None = None,
    features: Sequence[str] | None = None,
    edge_columns: tuple[str, str] | None = None,
    graph: str | None = None,
    split: str | _Sizes | None = None,
    standardise: bool = False,
    unlabelled: bool = False,
    mend: bool = False,
) -> xr.Dataset:
    """A graph from a table of nodes and a list of edges, or from PyG.

    Parameters
    ----------
    edges
        CSV or Parquet file, data frame or array (edge, 2) of node ids; PyG's ``Data`` or a list of them, which brings
        its own nodes; None for no graph.
    nodes
        CSV or Parquet file, or data frame: a row for every node with its id, label and features.
    label
        Column of the class labels.
    id
        Column of the node ids, of any type; None takes the column "id" or "node" if there is one, else the index of
        the data frame, which numbers rows of a file from 0.
    features
        Columns of the features; None takes all numeric columns that are left, and degrees if none is left, as an empty
        list does.
    edge_columns
        The two columns of the edge list that name nodes; None takes "source" and "target", else the first two. Not used
        where edges are an array.
    graph
        Column of nodes that names the graph that each belongs to, for a collection of graphs with a label each.
    split
        A column of "train", "validation", "stop", "test" and nothing; or options of `split_nodes` or `split_graphs`,
        such as ``{"train": 100, "validation": 50, "seed": 0}``; None leaves nodes without a split.
    standardise
        Whether to scale features to mean 0 and standard deviation 1; not used with degrees.
    unlabelled
        Whether labels may be missing; such nodes are predicted, not learned from.
    mend
        Whether to drop self-loops, edges listed again and edges of weight 0, and report it in ``attrs["mends"]``.

    Returns
    -------
    xr.Dataset
        As `probmodels.datasets.graphs` describes it; coordinate ``node`` holds the ids.

    Raises
    ------
    DataError
        If files cannot be read, columns are absent, edges name unknown nodes, are loops or repeated, weights are
        negative or missing, an option is not used, or anything that `make_graph` refuses.
    """
    if edges is not None and _is_pyg(edges):
        if nodes is not None:
            raise DataError("PyG's Data brings its own nodes; leave out nodes")
        named = {"label": label, "id": id, "features": features, "edge_columns": edge_columns, "graph": graph}
        refuse_unused(load_graph, "PyG's Data, which have no columns", **named)
        return from_pyg(edges, split=split, standardise=standardise, unlabelled=unlabelled, mend=mend)
    if nodes is None:
        raise DataError("nodes is absent: name a table with a row for every node, its label and its features")
    if edges is None:
        refuse_unused(load_graph, "no edges", edge_columns=edge_columns, mend=mend)
    mends: list[str] = []
    table, where = _table(nodes, "nodes", lambda names: [name for name in (_id_column(id, names), graph) if name])
    if not len(table):
        raise DataError(f"{where} has no rows: a graph without nodes; give at least one node")
    key = _id_column(id, table.columns)
    column = split if isinstance(split, str) else None
    _check_columns(table, features, {"label": label, "id": key, "graph": graph, "split": column}, where)
    ids = _ids(table[key], f"column {key!r} of {where}") if key else labels_of(table.index.to_numpy())
    index = graphs = None
    if graph is not None:
        order, index, graphs = _graphs(table[graph], f"column {graph!r} of {where}")
        table, ids = table.iloc[order], ids[order]
    columns = list(features) if features is not None else [c for c in table if c not in (key, label, graph, column)]
    x, names = _chosen_features(table, columns, where, standardise, mends)
    y = _node_entries(table, label, None, index, graphs, where)
    parts = None if column is None else _node_entries(table, column, "", index, graphs, where)
    data = make_graph(
        x,
        y,
        None if edges is None else _positions(edges, edge_columns, ids, where, mend, mends),
        graph=index,
        split=parts,
        nodes=ids,
        features=names,
        graphs=graphs,
        unlabelled=unlabelled,
        mend=mend,
        mends=mends,
        name=Path(nodes).stem if isinstance(nodes, str | os.PathLike) else "graph",
        source=where,
    )
    return _split_by(data, split) if isinstance(split, Mapping) else data


@checked(DataError)
def from_pyg(
    data: Any,
    *,
    split: str | _Sizes | None = None,
    standardise: bool = False,
    unlabelled: bool = False,
    mend: bool = False,
    name: str = "graph",
) -> xr.Dataset:
    """Labelled data from PyG's ``Data``: one with labelled nodes, or a list, each a graph with one label.

    Edges may be listed in one direction or both; directions are not kept. ``train_mask``, ``val_mask``, ``stop_mask``
    and ``test_mask`` become the split.

    Parameters
    ----------
    data
        ``Data`` with ``edge_index``, ``y`` and, where there are any, features ``x``; or a sequence of them.
    split, standardise, unlabelled, mend
        As in `load_graph`; a split given here takes the place of masks.
    name
        Name of the data set.

    Raises
    ------
    DataError
        As in `load_graph`.
    """
    if isinstance(split, str):
        raise DataError(f"split={split!r} names a column, which PyG's Data have not; give sizes, or masks in the data")
    pyg = import_pyg("data")
    one = isinstance(data, pyg.data.BaseData)
    items = [data] if one else _listed(data)
    if not items:
        raise DataError("there are no graphs in the list; give at least one Data")
    mends: list[str] = []
    _check_items(items, pyg.Data)
    sizes = np.array([_num_nodes(item, place, one) for place, item in enumerate(items)])
    parts = [_pyg_pairs(item, int(sizes[place]), place, mend, mends) for place, item in enumerate(items)]
    ends = np.concatenate([part + start for part, start in zip(parts, np.cumsum(sizes) - sizes, strict=True)])
    if items[0].x is None:
        refuse_unused(from_pyg, "degrees as features", standardise=standardise)
    x = None if items[0].x is None else np.concatenate([_array(item.x) for item in items])
    y = _pyg_labels(items, sizes, one)
    result = make_graph(
        standardised(x) if x is not None and standardise else x,
        y,
        ends,
        graph=None if one else np.repeat(np.arange(len(items)), sizes),
        split=_pyg_split(items[0], len(y)) if one and split is None else None,
        unlabelled=unlabelled,
        mend=mend,
        mends=mends,
        name=name,
        source="Data of PyG",
    )
    return result if split is None else _split_by(result, split)


# -------------------------------------------------------------------------------------------------------- tables


def _table(source: Any, what: str, ids: Callable[[Sequence[str]], Sequence[str]]) -> tuple[pd.DataFrame, str]:
    """A data frame and what to call it; ``ids`` gives its columns of ids, which are kept as the file writes them."""
    import pandas as pd

    if isinstance(source, pd.DataFrame):
        again = source.columns[source.columns.duplicated()]
        if len(again):
            raise DataError(f"{what} has more than one column {again[0]!r}; names have to differ")
        return source.rename(columns=str), what
    if not isinstance(source, str | os.PathLike):
        raise DataError(f"{what} is a {type(source).__name__}; give a file, or a data frame of pandas")
    path = existing_file(source, what)
    if path.suffix.lower() in (".parquet", ".pq"):
        if find_spec("pyarrow") is None:
            raise DataError(f"{path} is Parquet, which pandas reads through pyarrow: pip install pyarrow, or use CSV")
        try:
            return pd.read_parquet(path), path.name
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read as Parquet: {error}") from error
    mark = "\t" if path.suffix.lower() in (".tsv", ".tab") else ","
    try:
        table = pd.read_csv(path, sep=mark)
        text = [name for name in ids(list(table.columns)) if name in table]
        if text:  # a node may be called NA, or 007
            table[text] = pd.read_csv(path, sep=mark, usecols=text, dtype=str, na_filter=False)[text]
    except (OSError, ValueError) as error:  # of pandas, and of other encodings
        raise DataError(f"{path} cannot be read as CSV: {error}; it needs a header, and commas between") from error
    for name in text:
        table[name] = found = table[name].str.strip()
        if found.str.fullmatch(r"0|-?[1-9]\d{0,17}").all():
            table[name] = found.astype(np.int64)
    return table, path.name


def _id_column(id: str | None, columns: Sequence[str]) -> str | None:
    return id if id is not None else next((name for name in ("id", "node") if name in columns), None)


def _entries(column: pd.Series, missing: Any) -> NDArray[Any]:
    absent = column.isna()
    return np.array([missing if gone else value for value, gone in zip(column, absent, strict=True)], dtype=object)


def _check_columns(
    table: pd.DataFrame, features: Sequence[str] | None, others: Mapping[str, str | None], where: str
) -> None:
    """Check that a table has all columns that are named, and that features have no other use."""
    _want(table, [*(name for name in others.values() if name is not None), *(features or ())], where)
    _refuse_twofold(features, others)


def _node_entries(
    table: pd.DataFrame, column: str, missing: Any, index: NDArray[Any] | None, graphs: Any, where: str
) -> NDArray[Any]:
    """Entries of a column by node, or by graph in a collection of graphs."""
    entries = _entries(table[column], missing)
    return entries if index is None else _one_per_graph(entries, index, graphs, f"column {column!r} of {where}")


def _chosen_features(
    table: pd.DataFrame, columns: list[str], where: str, standardise: bool, mends: list[str]
) -> tuple[NDArray[Any] | None, list[str] | None]:
    """Features and their names; None, and a sentence that says so, where degrees are taken."""
    x = _feature_values(table, columns, where) if columns else None
    if x is None:
        refuse_unused(load_graph, "degrees as features", standardise=standardise)
        mends.append("There are no columns of features: degrees of the nodes are taken.")
        return None, None
    return standardised(x) if standardise else x, columns


def _want(table: pd.DataFrame, names: Sequence[str], where: str) -> None:
    absent = [name for name in names if name not in table.columns]
    if absent:
        raise DataError(f"{where} has no column {some(map(repr, absent))}; it has {some(table.columns, 12)}")


def _refuse_twofold(features: Sequence[str] | None, others: Mapping[str, str | None]) -> None:
    """Refuse features that are named twice, or are columns of another use: a label would predict itself."""
    for place, name in enumerate(features or ()):
        if name in list(features or ())[:place]:
            raise DataError(f"features name {name!r} more than once; name each column once")
        for use, column in others.items():
            if name == column:
                raise DataError(f"features name {name!r}, which is the column of {use!r}; leave it out of the features")


def _ids(column: pd.Series, where: str) -> NDArray[Any]:
    missing = (column.isna() | (column.astype(object) == "")).to_numpy(dtype=bool)
    if missing.any():
        raise DataError(f"{where}: {missing.sum()} ids are missing, such as that of row {missing.argmax()}; fill them")
    return labels_of(column.to_numpy())


def _graphs(column: pd.Series, where: str) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[Any]]:
    """Order (node,) that brings graphs together, the graph (node,) of every node in it, and labels of graphs."""
    labels, index = np.unique(_ids(column, where), return_inverse=True)
    order = np.argsort(index, kind="stable")
    return order, index[order], labels


def _one_per_graph(values: NDArray[Any], index: NDArray[np.int64], graphs: NDArray[Any], where: str) -> NDArray[Any]:
    first = values[np.searchsorted(index, np.arange(len(graphs)))]
    differs = np.unique(index[values != first[index]])
    if len(differs):
        raise DataError(f"{where} differs within graphs {some(graphs[differs])}; all nodes of a graph share its entry")
    return first


def _feature_values(table: pd.DataFrame, columns: Sequence[str], where: str) -> NDArray[Any]:
    import pandas as pd

    words = [name for name in columns if not pd.api.types.is_numeric_dtype(table[name])]
    if "split" in words:
        raise DataError(
            f"{where} has a column 'split' of text, which is no feature: pass split='split' to split by it, or, where "
            "splits are drawn or not wanted, drop it or name the features by features=[...]"
        )
    if words:
        raise DataError(
            f"columns {some(map(repr, words))} of {where} are not numbers; encode them, drop them, or name the "
            "features by features=[...]"
        )
    return table[list(columns)].to_numpy(dtype=np.float64, na_value=np.nan)


def _positions(
    edges: Any, columns: Sequence[str] | None, ids: NDArray[Any], nodes: str, mend: bool, mends: list[str]
) -> Pairs:
    """Edges (edge, 2) as positions of nodes, from ids; weights are checked."""
    import pandas as pd

    if isinstance(edges, str | os.PathLike | pd.DataFrame):
        table, where = _table(edges, "edges", lambda names: list(columns or _end_columns(names)))
    else:
        refuse_unused(load_graph, "an array of edges", edge_columns=columns)
        found = as_array(edges, "edges")
        if found.size == 0:
            return np.zeros((0, 2), dtype=np.int64)
        if found.ndim != 2 or found.shape[1] not in (2, 3):
            raise DataError(f"edges have shape {found.shape}; give (edge, 2), or (edge, 3) with weights")
        table, where = pd.DataFrame(found, columns=[*_ENDS, "weight"][: found.shape[1]]), "edges"
    if columns is None:
        columns = _end_columns(list(table.columns))
        if len(columns) < 2:
            raise DataError(f"{where} has one column; edges need two, with the nodes that they join")
        if tuple(columns) != _ENDS and np.isin([str(name) for name in columns], ids.astype(np.str_)).all():
            raise DataError(f"the first row of {where}, {some(columns)}, is an edge; give {where} a header")
    _want(table, list(columns), where)
    ends = [_ids(table[name], f"column {name!r} of {where}") for name in columns]
    weight = next((name for name in table.columns if str(name).lower() in _WEIGHTS), None)
    if weight is not None:
        kept = _checked_weights(table[weight].to_numpy(), f"column {weight!r} of {where}", mend, mends)
        ends = [end[kept] for end in ends]
    return np.stack([_lookup(end, ids, where, nodes) for end in ends], axis=1)


def _end_columns(columns: Sequence[str]) -> Sequence[str]:
    return _ENDS if set(_ENDS) <= set(columns) else columns[:2]


def _lookup(end: NDArray[Any], ids: NDArray[Any], where: str, nodes: str) -> NDArray[np.int64]:
    if end.dtype.kind != ids.dtype.kind:  # one is text: compare both as text
        end, ids = end.astype(np.str_), ids.astype(np.str_)
    if not len(end):
        return np.zeros(0, dtype=np.int64)
    order = np.argsort(ids, kind="stable")
    place = np.minimum(np.searchsorted(ids[order], end), len(ids) - 1)
    unknown = np.unique(end[ids[order][place] != end])
    if len(unknown):
        raise DataError(
            f"{where} names nodes {some(unknown)} that {nodes} does not have; drop these edges, or add the nodes with "
            "features and labels"
        )
    return order[place]


def _checked_weights(weights: NDArray[Any], where: str, mend: bool, mends: list[str]) -> NDArray[np.bool_]:
    """Which edges stay."""
    try:
        values = np.asarray(weights, dtype=float).reshape(len(weights), -1)[:, 0]
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{where}: weights are not numbers ({error}); drop that column, weights are not used"
        ) from error
    for what, bad in (("missing or infinite", ~np.isfinite(values)), ("negative", values < 0)):
        if bad.any():
            raise DataError(
                f"{where}: {bad.sum()} weights are {what}, such as that of edge {bad.argmax()}; drop these edges, or "
                "the weights, which are not used otherwise"
            )
    kept = values > 0
    if not kept.all():
        told = f"{where}: {(~kept).sum()} weights are 0"
        if not mend:
            raise DataError(
                f"{told}; weights are not used, so drop these edges, or pass mend=True to have them dropped"
            )
        mends.append(f"{told}; these edges are dropped.")
    if _UNUSED_WEIGHTS not in mends and (values[kept] != 1).any():
        mends.append(_UNUSED_WEIGHTS)
    return kept


def _split_by(data: xr.Dataset, options: Mapping[str, Any]) -> xr.Dataset:
    splitter = split_graphs if "graph_index" in data else split_nodes
    try:
        return splitter(data, **options)
    except TypeError as error:
        raise DataError(f"split={dict(options)} does not fit {splitter.__name__}: {error}") from error


# ----------------------------------------------------------------------------------------------------------- PyG


def _listed(data: Any) -> list[Any]:
    if isinstance(data, str) or not hasattr(data, "__iter__"):
        raise DataError(f"data={data!r}; give PyG's Data, or a list of them")
    return list(data)


def _is_pyg(thing: Any) -> bool:
    first = thing[0] if isinstance(thing, list | tuple) and thing else thing
    return any(cls.__module__.startswith("torch_geometric") for cls in type(first).__mro__)


def _array(tensor: Any) -> NDArray[Any]:
    import torch

    if not isinstance(tensor, torch.Tensor):
        return np.asarray(tensor)
    dense = tensor if tensor.layout is torch.strided else tensor.to_dense()
    return dense.detach().cpu().numpy()


def _num_nodes(item: Any, place: int, one: bool) -> int:
    if item.x is not None:
        return len(item.x)
    if "num_nodes" in item:
        return int(item.num_nodes)
    if one:
        return len(item.y)
    raise DataError(f"graph {place} has no number of nodes: set data.x or data.num_nodes")


def _check_items(items: Sequence[Any], kind: type) -> None:
    """Check that all graphs are PyG's ``Data`` with labels, and all or none of them with features."""
    for place, item in enumerate(items):
        if not isinstance(item, kind):
            raise DataError(
                f"graph {place} is a {type(item).__name__}; only PyG's Data, with one kind of node, will do"
            )
        if getattr(item, "y", None) is None:
            raise DataError(f"graph {place} has no labels y; set data.y")
    if len({item.x is None for item in items}) > 1:
        raise DataError("some graphs have features x and others none; give all of them features, or none")


def _pyg_labels(items: Sequence[Any], sizes: NDArray[Any], one: bool) -> NDArray[Any]:
    """Labels of the nodes of one graph, or of several graphs."""
    labels = [_array(item.y) for item in items]
    if one and len(labels[0]) != sizes[0]:
        raise DataError(f"y has {len(labels[0])} labels for {sizes[0]} nodes; give one for each")
    if not one and any(label.size != 1 for label in labels):
        place = next(place for place, label in enumerate(labels) if label.size != 1)
        raise DataError(f"graph {place} has {labels[place].size} labels; in a list, every graph has one, for all of it")
    return labels[0] if one else np.array([label.item() for label in labels])


def _pyg_pairs(item: Any, num_nodes: int, place: int, mend: bool, mends: list[str]) -> Pairs:
    """Undirected edges (edge, 2) of one graph; those in both directions stand once."""
    if item.edge_index is None:
        return np.zeros((0, 2), dtype=np.int64)
    pairs = _array(item.edge_index).T
    if getattr(item, "edge_weight", None) is not None:
        pairs = pairs[_checked_weights(_array(item.edge_weight), f"edge_weight of graph {place}", mend, mends)]
    if getattr(item, "edge_attr", None) is not None and _UNUSED_ATTRIBUTES not in mends:
        mends.append(_UNUSED_ATTRIBUTES)
    unknown = np.unique(pairs[(pairs < 0) | (pairs >= num_nodes)])
    if len(unknown):
        raise DataError(
            f"edge_index of graph {place} names nodes {some(unknown)}, but there are nodes 0 to {num_nodes - 1}; drop "
            "these edges, or add the nodes"
        )
    directed, count = np.unique(pairs, axis=0, return_counts=True)
    if (count > 1).any():
        again = directed[count > 1]
        told = f"{len(again)} edges of graph {place} stand more than once, such as {again[0].tolist()}"
        if not mend:
            raise DataError(f"{told}; list each once for a direction (PyG's coalesce), or pass mend=True")
        mends.append(f"{told}; taken once.")
    loops = directed[:, 0] == directed[:, 1]  # left to be refused or dropped with the others
    once = np.unique(np.sort(directed[~loops], axis=1), axis=0)
    return np.concatenate([once, directed[loops]])


def _pyg_split(item: Any, num_nodes: int) -> NDArray[np.str_] | None:
    masks = {name: part for name, part in _MASKS.items() if getattr(item, name, None) is not None}
    if not masks:
        return None
    split = np.full(num_nodes, "", dtype="<U10")
    for name, part in masks.items():
        mask = _array(getattr(item, name))
        if mask.shape != (num_nodes,):
            raise DataError(f"{name} has shape {mask.shape} for {num_nodes} nodes; keep one split, as a vector")
        mask = mask.astype(bool)
        if (split[mask] != "").any():
            raise DataError(
                f"{(split[mask] != '').sum()} nodes of {name} stand in another mask too; masks must be disjoint"
            )
        split[mask] = part
    return split
