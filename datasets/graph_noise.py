"""Graphs whose true edges are known: simulated ones, and given ones with edges taken away and others put in."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
import xarray as xr
from annotated_types import Interval, Len
from numpy.typing import NDArray

from probmodels.datasets.checks import check_size
from probmodels.datasets.graph_data import SPLITS, apportion, degree_features, import_pyg, make_graph, split_nodes
from probmodels.datasets.pairs import Pairs, free_pairs, pairs_of_numbers, some
from probmodels.errors import DataError
from probmodels.options import Count, Natural, NonNegative, OneOf, Probability, Seed, checked, refuse_unused

__all__ = ["Added", "corrupt", "load_explainer", "simulate_csbm"]

Added = Annotated[float, Interval(ge=0, le=1e6)]  # new edges as a fraction of those that are there


@checked(DataError)
def corrupt(
    data: xr.Dataset,
    *,
    deleted: Probability = 0.0,
    added: Added = 0.0,
    seed: Seed = 0,
    splits: Annotated[Sequence[Annotated[str, OneOf(SPLITS)]], Len(1)] | None = None,
) -> xr.Dataset:
    """The same data with edges deleted and others added at random; what was there stays as the true edges.

    Counts are exact: of E observed edges, ``round(deleted * E)`` go and ``round(added * E)`` come, among pairs that
    are neither observed nor true. Additions are shared out over graphs by their numbers of edges, as far as these have
    room. With one seed, what goes at a lower rate goes at a higher one too. Features made of degrees are made anew.

    Parameters
    ----------
    data
        Labelled nodes or labelled graphs.
    deleted
        Fraction of the observed edges to delete, 0 to 1.
    added
        New edges as a fraction of the observed ones.
    seed
        Seed of the draw.
    splits
        Splits of graphs to which this applies, such as ("test",); None for all.

    Returns
    -------
    xr.Dataset
        The data with ``true_source`` and ``true_target`` (true_edge): those that they have, else their edges.

    Raises
    ------
    DataError
        If a fraction is out of range, splits are asked for where nodes are classified, or too few pairs are free.
    """
    pairs = _edges(data)
    truth = _edges(data, "true_") if "true_source" in data else pairs
    index = data["graph_index"].values if "graph_index" in data else np.zeros(data.sizes["node"], dtype=np.int64)
    touched = _touched(data, splits)[index[pairs[:, 0]]]
    chosen = pairs[touched]
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(chosen))  # drawn whole, so that deletions at a lower rate are among those at a higher
    kept = chosen[order[round(deleted * len(chosen)) :]]
    fresh = _new_pairs(chosen, np.concatenate([pairs, truth]), index, round(added * len(chosen)), rng)
    result = _with_edges(data, np.concatenate([pairs[~touched], kept, fresh]), truth)
    made = [*json.loads(str(data.attrs.get("noise", "[]"))), {"deleted": deleted, "added": added, "seed": seed}]
    if splits is not None:
        made[-1]["splits"] = list(splits)
    return result.assign_attrs(noise=json.dumps(made))


@checked(DataError)
def simulate_csbm(
    num_nodes: Annotated[int, Interval(ge=1, le=1_000_000)] = 500,
    *,
    classes: Annotated[int, Interval(ge=1, le=1000)] = 2,
    mean_degree: NonNegative = 10.0,
    homophily: Probability = 0.8,
    within: Probability | None = None,
    between: Probability | None = None,
    num_features: Annotated[int, Interval(ge=1, le=100_000)] = 16,
    signal: NonNegative = 1.0,
    deleted: Probability = 0.0,
    added: Added = 0.0,
    train: Natural | None = None,
    validation: Natural | None = None,
    stop: Natural | None = None,
    seed: Seed = 0,
) -> xr.Dataset:
    """A contextual stochastic block model observed through a channel that deletes true edges and adds false ones.

    For classes of equal size, orthonormal directions ``m_c``, and pairs of nodes u, v::

        x_u ~ Normal(signal * m_{y_u}, I)
        A_uv ~ Bernoulli(within if y_u = y_v else between)
        O_uv ~ Bernoulli(A_uv (1 - deletion_rate) + (1 - A_uv) addition_rate)

    Only pairs that become edges take memory.

    Parameters
    ----------
    num_nodes, classes
        Number of nodes and of classes; classes are as equal as they can be, in random order.
    mean_degree
        Expected mean degree of the true graph.
    homophily
        Expected fraction of true edges that join nodes of one class.
    within, between
        Probabilities of true edges; given together, in place of mean degree and homophily.
    num_features, signal
        Number of features, and length of the mean of a class; directions are orthogonal where there are as many
        features as classes.
    deleted
        Probability that a true edge is not observed.
    added
        Expected number of false edges observed, as a fraction of the true ones; every pair without a true edge has the
        same chance.
    train, validation, stop
        Sizes of splits as in `split_nodes`, by default a tenth each; the rest is for testing.
    seed
        Seed of all draws.

    Returns
    -------
    xr.Dataset
        Observed edges in ``source`` and ``target``, true ones in ``true_source`` and ``true_target``; probabilities and
        rates as attributes.

    Raises
    ------
    DataError
        If sizes or probabilities are out of range, or an option is not used.

    References
    ----------
    Deshpande, Y., Montanari, A., Mossel, E. and Sen, S. (2018). Contextual stochastic block models. NeurIPS.
    """
    if classes > num_nodes:
        raise DataError(f"classes={classes} of {num_nodes} nodes: choose 1 to {num_nodes}")
    if (within is None) != (between is None):
        raise DataError("within and between go together: give both, or mean_degree and homophily")
    if within is not None:
        refuse_unused(simulate_csbm, "within and between", mean_degree=mean_degree, homophily=homophily)
    check_size(num_nodes=num_nodes, num_features=num_features)
    check_size(num_features=num_features, classes=classes)
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.arange(num_nodes) % classes)
    sizes = np.bincount(y, minlength=classes)
    same, all_pairs = int((sizes * (sizes - 1) // 2).sum()), num_nodes * (num_nodes - 1) // 2
    if within is None or between is None:
        expected = mean_degree * num_nodes / 2
        within = homophily * expected / max(same, 1)
        between = (1 - homophily) * expected / max(all_pairs - same, 1)
    for name, value in (("within", within), ("between", between)):
        if value > 1:
            raise DataError(
                f"mean_degree={mean_degree:g} and homophily={homophily:g} give {name}={value:.3g}, which is no "
                f"probability; choose a mean_degree that {num_nodes} nodes of {classes} classes can have"
            )
    check_size(expected_edges=round(within * same + between * (all_pairs - same)), ends=2)
    truth = _block_edges(y, sizes, within, between, rng)
    num_absent = all_pairs - len(truth)
    addition_rate = added * len(truth) / max(num_absent, 1)
    if addition_rate > 1:
        raise DataError(f"added={added} asks for more edges than the {num_absent} pairs without one; choose less")
    kept = truth[rng.random(len(truth)) >= deleted]
    false = free_pairs(truth, _one_graph(num_nodes), rng.binomial(num_absent, addition_rate), rng)

    direction = rng.standard_normal((num_features, classes))
    if num_features >= classes:
        direction = np.linalg.qr(direction)[0]
    direction = direction / np.linalg.norm(direction, axis=0)
    x = signal * direction.T[y] + rng.standard_normal((num_nodes, num_features))
    data = make_graph(
        x,
        y,
        np.concatenate([kept, false]),
        true_edges=truth,
        name="csbm",
        source="simulated: contextual stochastic block model",
        seed=seed,
        within=within,
        between=between,
        signal=signal,
        deletion_rate=deleted,
        addition_rate=addition_rate,
    )
    return _split_by_tenths(data, train, validation, stop, seed)


@checked(DataError)
def load_explainer(
    motif: Literal["house", "cycle"] = "house",
    *,
    num_nodes: Annotated[int, Interval(ge=2, le=100_000)] = 300,
    num_edges: Count = 5,
    num_motifs: Count = 80,
    deleted: Probability = 0.0,
    added: Added = 0.0,
    train: Natural | None = None,
    validation: Natural | None = None,
    stop: Natural | None = None,
    seed: Seed = 0,
) -> xr.Dataset:
    """PyG's explainer graph: motifs tied to a scale-free graph, each node labelled by its role.

    Parameters
    ----------
    motif
        "house" (classes 0 to 3: base, middle, bottom, top) or "cycle" (classes 0 and 1: base, cycle of six).
    num_nodes, num_edges
        Nodes of the Barabasi-Albert base, and edges that each new node brings.
    num_motifs
        Number of motifs, at most one for each node of the base.
    deleted, added
        Noise, as in `corrupt`.
    train, validation, stop
        Sizes of splits as in `split_nodes`, by default a tenth each; the rest is for testing.
    seed
        Seed of all draws.

    Returns
    -------
    xr.Dataset
        Features are degrees; ``true_motif`` (true_edge) is 1 for edges within a motif.

    Raises
    ------
    DataError
        If the motif is unknown or sizes are out of range.
    """
    import torch

    if num_edges >= num_nodes:
        raise DataError(f"num_edges={num_edges} for {num_nodes} nodes: choose 1 to {num_nodes - 1}")
    if num_motifs > num_nodes:
        raise DataError(f"num_motifs={num_motifs}: choose 1 to {num_nodes}, one for each node of the base")
    check_size(num_nodes=num_nodes, num_edges=num_edges)
    pyg = import_pyg("datasets")
    state = np.random.get_state()  # noqa: NPY002 - PyG draws from the global generators of NumPy and torch
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
            size = {"num_nodes": num_nodes, "num_edges": num_edges}
            base = import_pyg("datasets.graph_generator").BAGraph(**size)
            item = pyg.ExplainerDataset(base, _motif(motif), num_motifs=num_motifs)[0]
    finally:
        np.random.set_state(state)  # noqa: NPY002
    pairs = item.edge_index.numpy().T
    once = pairs[:, 0] < pairs[:, 1]
    data = make_graph(
        None,
        item.y.numpy(),
        pairs[once],
        true_edges=pairs[once],
        name=f"explainer {motif}",
        source="simulated: ExplainerDataset of PyG",
        seed=seed,
    )
    in_motif = item.edge_mask.numpy()[once][np.lexsort(pairs[once].T[::-1])]
    data["true_motif"] = ("true_edge", in_motif.astype(np.int8))
    data = _split_by_tenths(data, train, validation, stop, seed)
    return corrupt(data, deleted=deleted, added=added, seed=seed) if deleted or added else data


@checked(DataError)
def without_edges(data: xr.Dataset) -> xr.Dataset:
    """The same data with no observed edge; what was there stays as the true edges."""
    truth = _edges(data, "true_") if "true_source" in data else _edges(data)
    return _with_edges(data, np.zeros((0, 2), dtype=np.int64), truth)


# --------------------------------------------------------------------------------------------------------- pairs


def _edges(data: xr.Dataset, prefix: str = "") -> Pairs:
    return np.stack([data[f"{prefix}source"].values, data[f"{prefix}target"].values], axis=1)


def _with_edges(data: xr.Dataset, pairs: Pairs, truth: Pairs) -> xr.Dataset:
    pairs = pairs[np.lexsort(pairs.T[::-1])]
    result = data.drop_dims("edge").assign(source=("edge", pairs[:, 0]), target=("edge", pairs[:, 1]))
    if "true_source" not in data:
        result = result.assign(true_source=("true_edge", truth[:, 0]), true_target=("true_edge", truth[:, 1]))
    if data.attrs.get("features") == "degree":
        values, labels = degree_features(pairs, data.sizes["node"])
        result = result.drop_dims("feature").assign(x=(("node", "feature"), values)).assign_coords(feature=labels)
    return result


def _touched(data: xr.Dataset, splits: Sequence[str] | None) -> NDArray[np.bool_]:
    """Graphs (graph,) that noise applies to."""
    if "graph_index" not in data:
        if splits is not None:
            raise DataError("splits= chooses among graphs, but here the nodes of one graph are split; leave it out")
        return np.ones(1, dtype=bool)
    if splits is None:
        return np.ones(data.sizes["graph"], dtype=bool)
    absent = [name for name in splits if not (data["split"].values == name).any()]
    if absent:
        raise DataError(f"no graph is in the splits {some(absent)}; make them by split_graphs")
    return np.isin(data["split"].values, list(splits))


def _new_pairs(chosen: Pairs, taken: Pairs, index: NDArray[np.int64], count: int, rng: np.random.Generator) -> Pairs:
    """New edges (count, 2), shared out over graphs by the edges that they have, as far as they have room."""
    if not count:
        return np.zeros((0, 2), dtype=np.int64)
    num_graphs = int(index[-1]) + 1
    sizes = np.bincount(index)
    weights = np.bincount(index[chosen[:, 0]], minlength=num_graphs)
    taken = np.unique(taken, axis=0)
    room = sizes * (sizes - 1) // 2 - np.bincount(index[taken[:, 0]], minlength=num_graphs)
    room[weights == 0] = 0
    if count > room.sum():
        raise DataError(
            f"{count} new edges were asked for, but only {room.sum()} pairs are free; choose a smaller added"
        )
    shares = apportion(count, weights, room)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    bounds = np.searchsorted(taken[:, 0], starts)  # nodes of a graph stand together, and so do its edges
    parts = []
    for place in np.flatnonzero(shares):
        inside = taken[bounds[place] : bounds[place + 1]] - starts[place]
        parts.append(starts[place] + free_pairs(inside, _one_graph(sizes[place]), int(shares[place]), rng))
    return np.concatenate(parts)


def _block_edges(
    y: NDArray[np.int64], sizes: NDArray[np.int64], within: float, between: float, rng: np.random.Generator
) -> Pairs:
    """Edges (edge, 2): their number in every pair of blocks is binomial, and given that they are uniform."""
    members = np.split(np.argsort(y, kind="stable"), np.cumsum(sizes)[:-1])
    parts = [np.zeros((0, 2), dtype=np.int64)]
    for a, one in enumerate(members):
        inside = len(one) * (len(one) - 1) // 2
        drawn = rng.choice(inside, rng.binomial(inside, within), replace=False) if inside else np.zeros(0, np.int64)
        parts.append(one[pairs_of_numbers(drawn, _one_graph(len(one)))])
        for other in members[a + 1 :]:
            total = len(one) * len(other)
            drawn = rng.choice(total, rng.binomial(total, between), replace=False)
            parts.append(np.stack([one[drawn // len(other)], other[drawn % len(other)]], axis=1))
    return np.sort(np.concatenate(parts), axis=1)


def _split_by_tenths(
    data: xr.Dataset, train: int | None, validation: int | None, stop: int | None, seed: int
) -> xr.Dataset:
    """A tenth of the nodes in each split that has no size."""
    tenth = data.sizes["node"] // 10
    sizes = {"train": max(data.sizes["class"], tenth), "validation": tenth, "stop": tenth}
    given = {"train": train, "validation": validation, "stop": stop}
    return split_nodes(data, **{**sizes, **{k: size for k, size in given.items() if size is not None}}, seed=seed)


def _one_graph(num_nodes: int) -> NDArray[np.int64]:
    return np.zeros(num_nodes, dtype=np.int64)


def _motif(name: str) -> Any:
    motifs = import_pyg("datasets.motif_generator")
    return motifs.HouseMotif() if name == "house" else motifs.CycleMotif(6)
