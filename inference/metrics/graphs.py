r"""How well graphs are recovered: distances, precision and recall of edges, ranking and calibration of probabilities.

Graphs are adjacencies (..., cause, effect) of 0 and 1, arrays or labelled: entry [i, j] is 1 where i -> j. An edge
without a direction, as in graphs of equivalence classes, is an arrow either way. Leading axes broadcast, so that a true
graph is held against all draws of a posterior at once. Labelled estimates are put into the order of a labelled truth.

References
----------
Meek, C. (1995). Causal inference and causal explanation with background knowledge. UAI.
https://arxiv.org/abs/1302.4972
Naeini, M. P., Cooper, G. F. and Hauskrecht, M. (2015). Obtaining well calibrated probabilities using Bayesian binning.
AAAI. https://doi.org/10.1609/aaai.v29i1.9602
Peters, J. and Bühlmann, P. (2015). Structural intervention distance for evaluating causal graphs. Neural Computation
27(3). https://arxiv.org/abs/1306.1043
Tsamardinos, I., Brown, L. E. and Aliferis, C. F. (2006). The max-min hill-climbing Bayesian network structure learning
algorithm. Machine Learning 65.
van der Zander, B., Liśkiewicz, M. and Textor, J. (2014). Constructing separators and adjustment sets in ancestral
graphs. UAI, theorem 5.
Verma, T. and Pearl, J. (1990). Equivalence and synthesis of causal models. UAI. https://arxiv.org/abs/1304.1108
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple, TypeAlias

import numpy as np
import pandas as pd
import xarray as xr
from annotated_types import Interval, Len
from numpy.typing import ArrayLike, NDArray
from scipy.stats import beta as beta_distribution

from probmodels.datasets.checks import as_array
from probmodels.datasets.labelled import arranged_together
from probmodels.errors import DataError, ProblemError
from probmodels.options import Fraction, Probability, checked

__all__ = [
    "EdgeScores",
    "calibration_table",
    "cpdag",
    "edge_auroc",
    "edge_average_precision",
    "edge_calibration",
    "edge_scores",
    "shd",
    "shd_cpdag",
    "structural_intervention_distance",
]

_AXES = (("cause", "effect"), ("parent", "child"))

Bins: TypeAlias = Annotated[int, Interval(ge=1, le=100_000)] | Annotated[Sequence[Probability], Len(2)]


class EdgeScores(NamedTuple):
    """Shares of edges found; floats, or arrays over the leading axes of the graphs."""

    precision: Any
    recall: Any
    f1: Any


def shd(truth: ArrayLike, estimate: ArrayLike) -> Any:
    """Structural Hamming distance: pairs of nodes with another edge, or one where the other graph has none.

    A missing, an added and a reversed edge count 1 each, and so does, between graphs of equivalence classes, one with a
    direction in one graph alone (Tsamardinos et al. 2006).

    Parameters
    ----------
    truth, estimate
        Graphs (..., cause, effect), acyclic or of equivalence classes.

    Returns
    -------
    int or NDArray
        (...) of the graphs' leading axes.

    Raises
    ------
    ProblemError
        If shapes or labels do not fit, entries are not 0 or 1, or an edge leads from a node to itself.
    """
    true, found = _graphs(truth, estimate)
    differ = true != found
    return np.triu(differ | differ.swapaxes(-1, -2)).sum(axis=(-2, -1))[()]


def shd_cpdag(truth: ArrayLike, estimate: ArrayLike) -> Any:
    """Structural Hamming distance of the equivalence classes: 0 for graphs that no observation can tell apart.

    Parameters
    ----------
    truth, estimate
        Acyclic graphs (..., cause, effect).

    Returns
    -------
    int or NDArray
        (...) of the graphs' leading axes.

    Raises
    ------
    ProblemError
        As `shd`, or if a graph has a cycle.
    """
    true, found = _graphs(truth, estimate)
    return shd(_each(cpdag, true), _each(cpdag, found))


@checked(ProblemError)
def edge_scores(truth: ArrayLike, estimate: ArrayLike, *, skeleton: bool = False) -> EdgeScores:
    """Precision, recall and F1 of edges.

    Parameters
    ----------
    truth, estimate
        Graphs (..., cause, effect).
    skeleton
        Whether directions do not count. If they do, a reversed edge is a wrong and a missing one, and an edge without a
        direction counts as two.

    Returns
    -------
    EdgeScores
        nan where there is nothing to take a share of: the precision of no edges, the recall of none, F1 of neither.

    Raises
    ------
    ProblemError
        As `shd`.
    """
    true, found = _graphs(truth, estimate)
    if skeleton:
        true, found = (np.triu(graph | graph.swapaxes(-1, -2)) for graph in (true, found))
    both, actual, claimed = (graph.sum(axis=(-2, -1)) for graph in np.broadcast_arrays(true & found, true, found))
    with np.errstate(invalid="ignore"):
        return EdgeScores(
            *(np.divide(*pair)[()] for pair in ((both, claimed), (both, actual), (2 * both, actual + claimed)))
        )


def edge_auroc(truth: ArrayLike, probability: ArrayLike) -> float:
    """Chance that a true edge has a larger score than an ordered pair without one, ties counted half.

    Parameters
    ----------
    truth
        Graphs (..., cause, effect).
    probability
        Probability, or any score, of every ordered pair (..., cause, effect); the diagonal is left out.

    Returns
    -------
    float
        Over all pairs of all graphs together: 0.5 is what chance achieves.

    Raises
    ------
    ProblemError
        If shapes or labels do not fit, scores are missing, or all ordered pairs are edges, or none.
    """
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(*_two_kinds(truth, probability)))


def edge_average_precision(truth: ArrayLike, probability: ArrayLike) -> float:
    """Precision averaged over the recall of edges, by falling score; chance achieves the share of true edges.

    Parameters
    ----------
    truth, probability
        As in `edge_auroc`.

    Raises
    ------
    ProblemError
        As `edge_auroc`.
    """
    from sklearn.metrics import average_precision_score

    return float(average_precision_score(*_two_kinds(truth, probability)))


@checked(DataError)
def edge_calibration(truth: ArrayLike, probability: ArrayLike, *, bins: Bins = 10) -> xr.Dataset:
    """Whether edges of a stated probability are true as often, over all ordered pairs of all graphs together.

    Parameters
    ----------
    truth
        Graphs (..., cause, effect).
    probability
        Probability of every ordered pair (..., cause, effect); the diagonal is left out.
    bins
        As in `calibration_table`.

    Returns
    -------
    xr.Dataset
        `calibration_table`, with the expected calibration error ``ece`` (Naeini et al. 2015), and ``brier``: the mean
        square of truth minus probability, which rewards sharp probabilities, too.

    Raises
    ------
    ProblemError
        If shapes or labels do not fit, or a probability is missing or outside [0, 1].
    DataError
        If bins are out of range.
    """
    true, chance = _pairs(truth, probability)
    if not ((chance >= 0) & (chance <= 1)).all():
        raise ProblemError("probabilities must lie in [0, 1]; give probabilities, not log odds")
    return calibration_table(chance, true, bins=bins).assign(brier=float(np.mean((true - chance) ** 2)))


@checked(DataError)
def calibration_table(
    probability: ArrayLike, truth: ArrayLike, *, bins: Bins = 10, level: Fraction = 0.95
) -> xr.Dataset:
    """How often edges of a stated probability are true, by bins of the probability.

    Parameters
    ----------
    probability
        Probability of every pair (pair,), in [0, 1].
    truth
        Whether the pair is an edge (pair,), as 0 and 1 or False and True.
    bins
        Number of bins of equal width, or their ascending edges from 0 to 1. A probability on an edge belongs to the
        bin above it, 1 to the last.
    level
        Probability of the bands of the frequencies.

    Returns
    -------
    xr.Dataset
        Over bin: ``count``, ``probability`` (their mean) and ``frequency`` of true edges, both nan in an empty bin,
        ``lower`` and ``upper`` (equal-tailed interval of a frequency under Jeffreys' prior, 0 or 1 at the end where no
        edge, or every one, is true). Scalar ``ece``: the mean over pairs of the distance of frequency and probability
        of their bin. Over edge: ``bin_edge``.

    Raises
    ------
    DataError
        If shapes differ, there are no pairs, or values or bins are out of range.
    """
    probability, truth = arranged_together({"probability": probability, "truth": truth}, ["pair"])
    chance = as_array(probability, "probability", numbers=True).astype(float)
    true = as_array(truth, "truth", numbers=True)
    if chance.ndim != 1 or chance.shape != true.shape:
        raise DataError(
            f"probability of shape {chance.shape} and truth of shape {true.shape}; give both by pair (pair,)"
        )
    if not len(chance):
        raise DataError("there is no pair to compare with the truth; give at least one")
    if not ((chance >= 0) & (chance <= 1)).all():
        raise DataError("probabilities must lie in [0, 1], none missing; give probabilities, not log odds")
    if not np.isin(true, (0, 1)).all():
        raise DataError("truth must hold 0 and 1, none missing; leave out pairs whose truth is not known")
    edges = _bin_edges(bins)
    place = np.clip(np.searchsorted(edges, chance, side="right") - 1, 0, len(edges) - 2)
    count, total, hits = (
        np.bincount(place, weight, len(edges) - 1) for weight in (np.ones_like(chance), chance, true.astype(float))
    )
    some = np.where(count > 0, count, np.nan)
    tail = (1 - level) / 2
    lower = np.where(hits > 0, beta_distribution.ppf(tail, hits + 0.5, count - hits + 0.5), 0.0)
    upper = np.where(hits < count, beta_distribution.ppf(1 - tail, hits + 0.5, count - hits + 0.5), 1.0)
    variables = {
        "count": count.astype(np.int64),
        "probability": total / some,
        "frequency": hits / some,
        "lower": np.where(count > 0, lower, np.nan),
        "upper": np.where(count > 0, upper, np.nan),
    }
    found = xr.Dataset({name: ("bin", value) for name, value in variables.items()}, attrs={"level": level})
    return found.assign(ece=float(np.abs(hits - total).sum() / len(chance)), bin_edge=("edge", edges))


def cpdag(graph: ArrayLike) -> NDArray[np.int8]:
    """The equivalence class of a graph: arrows that all its members share, and arrows both ways for the other edges.

    Members have the same edges but for directions, and the same colliders a -> c <- b without an edge between a and b
    (Verma and Pearl 1990): they say the same independences. Directions follow from those of colliders by the first
    three rules of Meek (1995).

    Parameters
    ----------
    graph
        Acyclic graph (cause, effect).

    Returns
    -------
    NDArray
        The completed partially directed acyclic graph (cause, effect).

    Raises
    ------
    ProblemError
        If it is no adjacency of 0 and 1, or has a cycle.
    """
    (arrows,) = _graphs(graph)
    if arrows.ndim != 2:
        raise ProblemError(f"graph has shape {arrows.shape}; give one graph (cause, effect)")
    _reach(arrows)
    size, joined = len(arrows), arrows | arrows.T
    known = np.zeros_like(arrows)  # arrows of colliders, then those that follow from them
    for child in range(size):
        for one in np.flatnonzero(arrows[:, child]):
            known[one, child] |= (arrows[:, child] & ~joined[one] & (np.arange(size) != one)).any()
    while True:
        lines = joined & ~known & ~known.T
        more = np.zeros_like(known)
        for a, b in np.argwhere(lines):
            after_other = (known[:, a] & ~joined[:, b]).any()  # or there were a collider at a
            round_trip = (known[a] & known[:, b]).any()  # or there were a cycle
            both = np.flatnonzero(lines[a] & known[:, b])
            two_ways = any(not joined[c, d] for c in both for d in both if c != d)
            more[a, b] = after_other or round_trip or two_ways
        if not more.any():
            return (known | lines).astype(np.int8)
        known |= more


def structural_intervention_distance(truth: ArrayLike, estimate: ArrayLike) -> int:
    """Ordered pairs (i, j) for which the estimate gets the distribution of j under interventions on i wrong.

    The effect of i on j is computed from observations by adjusting for the parents of i in the estimate, and is none
    where j is such a parent. It counts if that is wrong for some distribution of the true graph (Peters and Bühlmann
    2015). Unlike other distances, this one is not symmetric, and added edges may cost nothing.

    Parameters
    ----------
    truth, estimate
        Acyclic graphs (cause, effect).

    Raises
    ------
    ProblemError
        As `shd`, or if a graph has a cycle, or there are several.
    """
    true, found = _graphs(truth, estimate)
    if true.ndim != 2 or found.ndim != 2:
        raise ProblemError(f"graphs have shapes {true.shape} and {found.shape}; give one of each (cause, effect)")
    below = _reach(true)
    _reach(found)
    size, wrong = len(true), 0
    for i in range(size):
        given = found[:, i]
        for j in np.flatnonzero(np.arange(size) != i):
            wrong += bool(below[i, j]) if given[j] else not _adjusts(true, below, i, int(j), given)
    return wrong


def _adjusts(graph: NDArray[np.bool_], below: NDArray[np.bool_], i: int, j: int, given: NDArray[np.bool_]) -> bool:
    """Whether adjusting for ``given`` (node,), without j, yields the effect of i on j in every distribution."""
    size = len(graph)
    reflexive = below | np.eye(size, dtype=bool)
    between = below[i] & reflexive[:, j]  # on directed paths from i to j, i apart
    if (reflexive[between] & given).any():
        return False
    # What is left is to block all other paths: separation without the first edges of directed ones, in the moral graph
    # of the ancestors.
    rest = graph.copy()
    rest[i, between] = False
    upward = _reach(rest) | np.eye(size, dtype=bool)
    kept = upward[:, given].any(axis=1) | upward[:, i] | upward[:, j]
    rest &= kept[:, None] & kept
    moral = rest | rest.T | (rest.astype(int) @ rest.T.astype(int) > 0)
    open_to = np.arange(size) == i
    for _ in range(size):
        open_to = open_to | (moral[open_to].any(axis=0) & ~given)
    return not open_to[j]


def _reach(graph: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which nodes directed paths lead to (cause, effect)."""
    paths = graph.copy()
    for node in range(len(graph)):
        paths |= paths[:, [node]] & paths[node]
    if paths.diagonal().any():
        node = int(np.argmax(paths.diagonal()))
        raise ProblemError(f"the graph has a cycle through node {node}; give an acyclic graph")
    return paths


def _each(function: Any, graphs: NDArray[np.bool_]) -> NDArray[np.int8]:
    flat = graphs.reshape(-1, *graphs.shape[-2:])
    return np.array([function(graph) for graph in flat], dtype=np.int8).reshape(graphs.shape)


def _graphs(*graphs: ArrayLike) -> list[NDArray[np.bool_]]:
    arrays = _aligned(*graphs)
    for array in arrays:
        if not np.isin(array, (0, 1)).all():
            raise ProblemError("graphs must hold 0 and 1, none missing; cut probabilities at a threshold first")
        if array[..., np.arange(array.shape[-1]), np.arange(array.shape[-1])].any():
            raise ProblemError("a graph has an edge from a node to itself; set its diagonal to 0")
    return [array.astype(bool) for array in arrays]


def _pairs(truth: ArrayLike, probability: ArrayLike) -> tuple[NDArray[np.int8], NDArray[np.float64]]:
    """Truth and probability of all ordered pairs of different nodes (pair,)."""
    true, score = _aligned(truth, probability)
    (true,) = _graphs(true)
    off = ~np.eye(true.shape[-1], dtype=bool)
    true, score = np.broadcast_arrays(true[..., off], np.asarray(score, dtype=float)[..., off])
    if not np.isfinite(score).all():
        raise ProblemError("probabilities of some pairs are missing or infinite; give one for every ordered pair")
    if not score.size:
        raise ProblemError("there is no pair of nodes; give graphs of at least 2 nodes")
    return true.reshape(-1).astype(np.int8), score.reshape(-1)


def _two_kinds(truth: ArrayLike, probability: ArrayLike) -> tuple[NDArray[np.int8], NDArray[np.float64]]:
    true, score = _pairs(truth, probability)
    if true.min() == true.max():
        kind = "is an edge" if true[0] else "is no edge"
        raise ProblemError(f"every ordered pair {kind}, so that there is nothing to rank; pool graphs that have both")
    return true, score


def _aligned(*graphs: ArrayLike) -> list[NDArray[Any]]:
    """Arrays (..., cause, effect) of one number of nodes, labelled ones in the order of the first that is labelled."""
    arrays, labels = [], None
    for graph in graphs:
        if isinstance(graph, pd.DataFrame):
            graph = _from_frame(graph)
        if isinstance(graph, xr.DataArray):
            graph, own = _labelled(graph)
            if labels is None:
                labels = own
            elif own is not None:
                if sorted(map(str, own)) != sorted(map(str, labels)):
                    raise ProblemError(f"graphs have other nodes: {list(labels)} and {list(own)}; give the same ones")
                order = [list(own).index(name) for name in labels]
                graph = graph[..., order, :][..., order]
        arrays.append(as_array(graph, "a graph", numbers=True, error=ProblemError))
    shapes = [array.shape for array in arrays]
    if any(len(shape) < 2 or shape[-1] != shape[-2] for shape in shapes) or len({shape[-1] for shape in shapes}) > 1:
        raise ProblemError(f"graphs have shapes {shapes}; give square ones of the same nodes (..., cause, effect)")
    try:
        np.broadcast_shapes(*shapes)
    except ValueError:
        raise ProblemError(f"graphs have shapes {shapes}, whose leading axes do not fit; give one for each") from None
    return arrays


def _from_frame(graph: pd.DataFrame) -> xr.DataArray:
    """A frame whose rows are causes, or whose axes are named, and whose names are nodes where they are no numbers."""
    dims = [name for axes in _AXES for name in axes if {graph.index.name, graph.columns.name} == set(axes)]
    if dims and graph.index.name == dims[1]:
        graph = graph.T
    numbered = all(isinstance(axis, pd.RangeIndex) for axis in graph.axes)
    coords = {} if numbered else dict(zip(_AXES[0], map(list, graph.axes), strict=True))
    return xr.DataArray(graph.to_numpy(), coords, _AXES[0])


def _labelled(graph: xr.DataArray) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """Values (..., cause, effect) with nodes in the order of causes, and their labels."""
    for axes in _AXES:
        if set(axes) <= set(graph.dims):
            ordered = graph.transpose(..., *axes)
            if not all(axis in graph.coords for axis in axes):
                return ordered.values, None
            cause, effect = (list(graph[axis].values) for axis in axes)
            if sorted(map(str, cause)) != sorted(map(str, effect)) or len(set(cause)) < len(cause):
                raise ProblemError(f"causes {cause} and effects {effect} are not the same nodes, each once")
            return ordered.sel({axes[1]: cause}).values, np.asarray(cause)
    raise ProblemError(f"a graph has dims {graph.dims}; name two of them 'cause' and 'effect'")


def _bin_edges(bins: Bins) -> NDArray[np.float64]:
    if isinstance(bins, int | np.integer):
        return np.arange(int(bins) + 1) / int(bins)
    edges = np.asarray(bins, dtype=float)
    if edges[0] != 0 or edges[-1] != 1 or (np.diff(edges) <= 0).any():
        raise DataError(f"bins={bins!r}; give a number of bins, or ascending edges from 0 to 1")
    return edges
