"""Learning discrete structures: a graph whose edges are hyperparameters of the network that classifies its nodes.

Model of one graph, with candidate pairs (u, v) and n nodes of known class::

    edge_uv ~ Bernoulli(theta_uv)
    weight_in_fh ~ Normal(0, 1 / (n l2)),  weight_out_hc ~ the same or flat
    label_u ~ Categorical(softmax(A relu(A x weight_in) weight_out)_u),  A = D^-1/2 (edges + I) D^-1/2

The probabilities ``theta`` are no part of the posterior: they minimise the loss of other nodes, given weights that
minimise that of the training nodes. `fit_bilevel` solves both::

    min_theta E[-log p(label_validation | edge, weight*)],  weight* = argmin E[-log p(label_train, weight | edge)]

References
----------
Franceschi, L., Niepert, M., Pontil, M. and He, X. (2019). Learning discrete structures for graph neural networks.
ICML. https://arxiv.org/abs/1903.11960
Kipf, T. N. and Welling, M. (2017). Semi-supervised classification with graph convolutional networks. ICLR.
https://arxiv.org/abs/1609.02907
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

import numpy as np
import pyro
import pyro.distributions as dist
import torch
import xarray as xr
from annotated_types import Interval
from numpy.typing import NDArray
from pyro import poutine
from pyro.distributions import constraints
from pyro.nn import PyroModule
from torch import Tensor
from torch.nn.functional import dropout

from probmodels.datasets.graph_data import SPLITS, check_graph, make_graph
from probmodels.datasets.pairs import count_pairs, some
from probmodels.edges.checks import class_probabilities, column, judge_classes
from probmodels.edges.outputs import write_edges as write_outputs
from probmodels.errors import DataError, ResultError
from probmodels.guides.edges import EdgeSet, label_pairs, make_edges, nearest_neighbours, transient_sites
from probmodels.guides.lds import WEIGHTS, EdgeProbability, LDSGuide, NodeData, weight_dims
from probmodels.guides.nets import propagate
from probmodels.guides.sparse import SparseMatrix, make_links
from probmodels.inference.diagnostics.findings import Finding
from probmodels.inference.diagnostics.guides import still_falling
from probmodels.inference.problem import Outer, Problem
from probmodels.inference.result import Result
from probmodels.inference.runtime.memory import check_memory
from probmodels.inference.runtime.ops import named_deterministic
from probmodels.options import Count, Natural, OneOf, Seed, Width, checked, refuse_unused

__all__ = ["ENGINES", "LDS", "REFERENCE", "check_draws", "make_problem", "refit_problem", "tiny", "write_outputs"]

REFERENCE = "Franceschi et al. (2019), https://arxiv.org/abs/1903.11960"
ENGINES = ("bilevel",)
STARTS = ("observed", "neighbours")

_ALL_PAIRS = 250_000  # pairs up to which all are candidates by default: those of some 700 nodes
_CANDIDATES = 20  # nearest neighbours that are candidates by default in larger graphs
_SPARSE = 0.1  # share of features that are not zero, below which they are kept as a sparse matrix
_STEPS = 6  # evaluations whose graph a step of `fit_bilevel` holds with its defaults
_KEPT = 200_000  # numbers per draw above which results hold moments


class LDS(PyroModule):
    """The model.

    Parameters
    ----------
    edges
        Probabilities of edges.
    shapes
        Shape of each weight matrix by site, in the order of layers.
    precisions
        Precisions of the normal priors of weights by site; 0 for a flat one.
    rate
        Dropout rate of inputs and hidden units while weights are learned.
    """

    def __init__(
        self,
        edges: EdgeProbability,
        shapes: dict[str, tuple[int, int]],
        precisions: dict[str, float],
        rate: float,
    ) -> None:
        super().__init__()
        self.edges, self.shapes, self.precisions, self.rate = edges, shapes, precisions, rate

    def forward(self, data: NodeData, known: Tensor, held_out: bool = False) -> None:
        """Sites ``edge`` (pair,), ``weight_in`` (feature, hidden), ``weight_out`` (hidden, class), ``label`` (known,).

        Where no gradient is taken also ``edge_probability`` (pair,), ``class_probability`` (node, class),
        ``num_edges``, ``mean_degree``, and ``homophily``, the share of edges within a class that the network expects.

        Parameters
        ----------
        data
            The graph.
        known
            Nodes whose classes are observed.
        held_out
            Whether these are not the training nodes: then there is neither prior nor dropout, and the loss is the mean
            over nodes.
        """
        learning = torch.is_grad_enabled()
        with pyro.plate("pair", data.edges.num_pairs), poutine.mask(mask=False):
            edge = pyro.sample("edge", dist.Bernoulli(self.edges.probability))
            if not learning:
                named_deterministic("edge_probability", self.edges.probability)
        with poutine.mask(mask=not held_out):
            first, second = (self._weight(name, edge) for name in self.shapes)
        logits = self._logits(data, edge, first, second, self.rate if learning and not held_out else 0.0)
        with pyro.plate("known", len(known)), poutine.scale(scale=1 / len(known) if held_out else 1.0):
            pyro.sample("label", dist.Categorical(logits=logits.index_select(0, known)), obs=data.y[known])
        if not learning:
            _summarise(data.edges, edge, logits.softmax(-1))

    def _weight(self, name: str, like: Tensor) -> Tensor:
        shape, precision = self.shapes[name], self.precisions[name]
        prior = dist.Normal(like.new_zeros(shape), 1 / math.sqrt(precision or 1.0)).to_event(2)
        named: Any = {"event_dims": weight_dims(name)}
        # A mask that is always there would hide the analytic divergence of normal weights.
        value: Tensor = pyro.sample(name, prior if precision else prior.mask(False), infer=named)
        return value

    def _logits(self, data: NodeData, edge: Tensor, first: Tensor, second: Tensor, rate: float) -> Tensor:
        x = data.x
        if rate:
            x = x.dropped(rate) if isinstance(x, SparseMatrix) else dropout(x, rate)
        hidden = propagate(x @ first, data.edges, edge, data.links).relu()
        hidden = dropout(hidden, rate) if rate else hidden
        return propagate(hidden @ second, data.edges, edge, data.links)


def _summarise(edges: EdgeSet, edge: Tensor, chance: Tensor) -> None:
    named_deterministic("class_probability", chance, ["node", "class"])
    total = edge.sum()
    alike = edge @ (chance[edges.source] * chance[edges.target]).sum(-1)
    pyro.deterministic("num_edges", total)
    pyro.deterministic("mean_degree", 2 * total / edges.num_nodes)
    pyro.deterministic("homophily", alike / total.clamp(min=1))


@checked(DataError, keep=True)
def make_problem(
    data: xr.Dataset,
    *,
    start: Annotated[str, OneOf(STARTS)] | None = None,
    neighbours: Count = 10,
    metric: str = "cosine",
    candidates: Natural | Literal["all"] | None = None,
    random: Annotated[float, Interval(ge=0, le=1e6)] = 0.0,
    hidden: Width = 16,
    rate: Annotated[float, Interval(ge=0, lt=1)] = 0.5,
    weights: Annotated[str, OneOf(WEIGHTS)] = "point",
    l2: Annotated[float, Interval(ge=0, le=1e6)] = 5e-4,
    seed: Seed = 0,
) -> Problem:
    """Classification of nodes through edges that are learned on nodes held out.

    Parameters
    ----------
    data
        One graph, as `probmodels.datasets.graphs` describes it, with splits ``"train"``, ``"validation"``, whose loss
        edges minimise, and, where there is one, ``"stop"``, which chooses the best round.
    start
        Pairs that start as edges, all others starting at probability 0: the ``"observed"`` ones, or nearest
        ``"neighbours"`` in the features; None for the observed ones where there are any.
    neighbours
        Nearest neighbours of every node that edges start from with ``start="neighbours"``.
    metric
        Distance of scikit-learn's ``NearestNeighbors``.
    candidates
        Pairs that may become edges beside those that start as such: ``"all"``, as in the paper, or the pairs of this
        many nearest neighbours. None for all of up to 250,000 pairs, and 20 neighbours in larger graphs.
    random
        Random pairs per other candidate pair; there are none where all pairs are candidates.
    hidden
        Units of the network.
    rate
        Dropout rate, in [0, 1).
    weights
        ``"point"`` fits the weights as the paper does; ``"normal"`` gives every weight a normal posterior.
    l2
        Weight decay of the first layer, per training node; with normal weights of both layers.
    seed
        Seed of the random pairs.

    Returns
    -------
    Problem
        For `fit_bilevel`. Draws have a graph each: ``edge`` (pair,), and ``class_probability`` (node, class) by it;
        average these. ``edge_probability`` (pair,) holds the hyperparameters. What is large is kept as mean and sd.

    Raises
    ------
    DataError
        If the data do not fit, a split is missing, a class is absent from training, or an option is out of range or
        not used.
    ProblemError
        If a step over all candidate pairs would not fit into memory.
    """
    check_graph(data)
    if "graph_index" in data:
        raise DataError("lds classifies the nodes of one graph, but these data hold many; take vib_gsl")
    start = start if start is not None else "observed" if data.sizes["edge"] else "neighbours"
    if weights == "normal" and not l2:
        raise DataError("l2=0 with weights='normal'; give a number above 0, so that their prior is a proper one")
    nearest = _checked_candidates(data.sizes["node"], candidates)
    if start == "observed" and not data.sizes["edge"]:
        raise DataError("start='observed', but no edge was observed; take start='neighbours'")
    _refuse_unused(start, nearest, neighbours=neighbours, metric=metric, random=random, seed=seed)
    known = {name: _known(data, name) for name in ("train", "validation", "stop")}
    _check_splits(data, known)
    x = torch.as_tensor(data["x"].values, dtype=torch.get_default_dtype())
    shapes = {"weight_in": (x.shape[1], hidden), "weight_out": (hidden, data.sizes["class"])}
    dense = float(x.count_nonzero()) > _SPARSE * x.numel()
    if nearest == "all":  # before they are listed
        _check_memory(x, count_pairs(np.zeros(len(x), dtype=np.int64)), hidden, dense and rate > 0)
    edges, begins = _candidates(data, start, neighbours, metric, nearest, random, seed)
    _check_memory(x, edges.num_pairs, hidden, dense and rate > 0)
    y = torch.as_tensor(data["y"].values.astype(np.int64)).clamp(min=0)
    graph = NodeData(x if dense else SparseMatrix.of(x), edges, make_links(edges), y)
    precision = l2 * len(known["train"])
    precisions = {"weight_in": precision, "weight_out": precision if weights == "normal" else 0.0}
    probability = EdgeProbability(torch.as_tensor(begins, dtype=x.dtype))
    model = LDS(probability, shapes, precisions, rate)
    guide = LDSGuide(probability, shapes, weights)
    problem = Problem(
        name="lds",
        model=model,
        guide=guide,
        args=(graph, torch.as_tensor(known["train"])),
        coords=_coords(data, known["train"], edges, hidden),
        data=label_pairs(data, edges),
        loss="TraceMeanField_ELBO",
        transient=_transient(edges, shapes, x.shape[0]),
    )
    held = {name: _held_out(problem, graph, nodes, data) for name, nodes in known.items() if name != "train"}
    hyper = {"edges.probability": constraints.unit_interval}
    return replace(problem, outer=Outer(held["validation"], hyper, held["stop"] if len(known["stop"]) else None))


@checked(DataError)
def refit_problem(problem: Problem, result: Result, splits: str | Sequence[str] = ("train", "validation")) -> Problem:
    """The network alone, to be fitted on more nodes with the edges that were learned.

    Nodes that chose the edges are left out of the loss of the weights. Once the edges are chosen these may learn from
    them too, as one fits anew with all data after cross-validation.

    Parameters
    ----------
    problem
        Problem that was fitted.
    result
        Result of `fit_bilevel`.
    splits
        Whose labelled nodes to learn from.

    Returns
    -------
    Problem
        For `fit_svi`, with the edges' probabilities held.

    Raises
    ------
    DataError
        If the problem is not one of lds, or a split has no labelled node.
    ResultError
        If the result is not one of this problem.
    """
    data, old, guide = problem.data, problem.model, problem.guide
    if data is None or not isinstance(old, LDS) or not isinstance(guide, LDSGuide):
        raise DataError(f"{problem.name!r} is no problem of lds with a guide of its own; give the one that was fitted")
    saved = result.params().get("edges.probability")
    if saved is None or saved.shape != old.edges.probability.shape:
        raise ResultError("the result holds no probabilities of edges that fit lds; give the problem that was fitted")
    parts = {name: _known(data, name) for name in ([splits] if isinstance(splits, str) else splits)}
    empty = [name for name, nodes in parts.items() if not len(nodes)]
    if empty or not parts:
        raise DataError(f"no labelled node has a split of {empty}; choose among {', '.join(SPLITS)}")
    known = np.concatenate([*parts.values()])
    edges = EdgeProbability(torch.as_tensor(saved).to(old.edges.probability).detach().clone(), learned=False)
    share = len(known) / len(problem.args[1])
    precisions = {name: share * value for name, value in old.precisions.items()}
    return replace(
        problem,
        model=LDS(edges, old.shapes, precisions, old.rate),
        guide=LDSGuide(edges, guide.shapes, guide.weights),
        args=(problem.args[0], torch.as_tensor(known).to(problem.args[1])),
        coords={**problem.coords, "known": list(_names(data)[known])},
        outer=None,
    )


def check_draws(result: Result) -> Iterator[Finding]:
    """Findings on the classes of nodes that took no part in any choice, in place of those on the guide as a posterior.

    Nodes of the splits ``"train"``, ``"validation"`` and ``"stop"`` chose weights, edges and the round, so that only
    others show what the predictions are worth. The edges are hyperparameters; nothing shows whether they are true.
    """
    tree = result.tree
    yield from still_falling(tree)
    probability, y, split = class_probabilities(tree), column(tree, "y").astype(np.int64), column(tree, "split")
    shares = np.bincount(y[(split == "train") & (y >= 0)], minlength=probability.shape[1])
    held_out = ~np.isin(split, ["train", "validation", "stop"]) & (y >= 0)
    advice = "take more rounds (num_rounds), more inner_steps, or more training nodes"
    yield from judge_classes(
        probability[held_out], y[held_out], shares / max(shares.sum(), 1), units="nodes", advice=advice
    )
    verdict = "edges are hyperparameters, fitted to the loss of the validation nodes: their probabilities are no "
    verdict += "posterior, and are not judged"
    yield Finding(False, verdict, "for beliefs about which edges are real, take noisy_edges")


def tiny() -> Problem:
    """Sixteen nodes of two classes with two features and a noisy graph, for the conformance tests."""
    rng = np.random.default_rng(0)
    y = np.tile([0, 1], 8)
    x = rng.normal(size=(16, 2)) + 1.5 * y[:, None]
    split = np.repeat(["train", "validation", "stop", "test"], 4)
    pairs = [(0, 2), (1, 3), (2, 8), (5, 7), (6, 9), (10, 12), (11, 15), (3, 13), (4, 14)]
    return make_problem(make_graph(x, y, pairs, split=split, name="two classes"), hidden=3, weights="normal", l2=0.05)


def _held_out(problem: Problem, graph: NodeData, nodes: NDArray[np.int64], data: xr.Dataset) -> Problem:
    return replace(
        problem,
        args=(graph, torch.as_tensor(nodes)),
        kwargs={"held_out": True},
        coords={**problem.coords, "known": list(_names(data)[nodes])},
        data=None,
    )


def _known(data: xr.Dataset, split: str) -> NDArray[np.int64]:
    return np.flatnonzero((data["split"].values == split) & (data["y"].values >= 0))


def _names(data: xr.Dataset) -> NDArray[Any]:
    return np.asarray(data["node"].values if "node" in data.coords else np.arange(data.sizes["node"]))


def _coords(data: xr.Dataset, train: NDArray[np.int64], edges: EdgeSet, hidden: int) -> dict[str, Any]:
    features: Any = data["feature"].values if "feature" in data.coords else np.arange(data.sizes["feature"])
    return {
        "node": _names(data),
        "feature": features,
        "class": data["class"].values,
        "hidden": np.arange(hidden),
        "known": _names(data)[train],
        "pair": np.arange(edges.num_pairs),
    }


def _refuse_unused(start: str, candidates: int | Literal["all"], **given: Any) -> None:
    """Refuse options of pairs that are not looked for."""
    if start == "observed":
        refuse_unused(make_problem, "start='observed'", neighbours=given["neighbours"])
        if candidates in ("all", 0):
            refuse_unused(make_problem, f"start='observed' and candidates={candidates!r}", metric=given["metric"])
    if candidates == "all":
        refuse_unused(make_problem, "candidates='all'", random=given["random"], seed=given["seed"])
    elif not given["random"]:
        refuse_unused(make_problem, "random=0", seed=given["seed"])


def _checked_candidates(num_nodes: int, candidates: int | Literal["all"] | None) -> int | Literal["all"]:
    """``"all"``, or a number of neighbours that every node has."""
    if candidates is None:
        few = count_pairs(np.zeros(num_nodes, dtype=np.int64)) <= _ALL_PAIRS
        return "all" if few else min(_CANDIDATES, num_nodes - 1)
    if not isinstance(candidates, str) and candidates >= num_nodes:
        raise DataError(
            f"candidates={candidates}, but every node has {num_nodes - 1} others; choose at most {num_nodes - 1}, or "
            "'all'"
        )
    return candidates


def _candidates(
    data: xr.Dataset, start: str, neighbours: int, metric: str, candidates: int | str, random: float, seed: int
) -> tuple[EdgeSet, NDArray[np.bool_]]:
    """Candidate pairs, and which of them start as edges (pair,)."""
    num_nodes, x = data.sizes["node"], data["x"].values
    nodes = np.zeros(num_nodes, dtype=np.int64)
    near, rank = np.zeros((0, 2), dtype=np.int64), np.zeros(0, dtype=np.int64)
    most = max(0 if candidates == "all" else int(candidates), neighbours if start == "neighbours" else 0)
    if most:
        near, rank = nearest_neighbours(x, nodes, most, metric=metric, seed=seed)
    edges = make_edges(
        np.stack([data["source"].values, data["target"].values], axis=1),
        nodes,
        near=near,
        random=random,
        all_pairs=candidates == "all",
        seed=seed,
    )
    if not edges.num_pairs:
        raise DataError("no pair of nodes could be an edge; give candidates='all' or a number of neighbours")
    if start == "observed":
        return edges, edges.observed.numpy()
    if (x == x[:1]).all():
        raise DataError("all nodes have the same features, so that none is nearer than others; give features or edges")
    number, first = edges.source.numpy() * num_nodes + edges.target.numpy(), near[rank < neighbours]
    return edges, np.isin(number, first[:, 0] * num_nodes + first[:, 1])


def _check_splits(data: xr.Dataset, known: dict[str, NDArray[np.int64]]) -> None:
    for name in ("train", "validation"):
        if not len(known[name]):
            raise DataError(
                f"no labelled node has the split {name!r}; lds learns weights on 'train' and edges on 'validation': "
                "see split of load_graph, or datasets.graphs.split_nodes"
            )
    absent = np.setdiff1d(np.arange(data.sizes["class"]), data["y"].values[known["train"]])
    if len(absent):
        raise DataError(
            f"classes {some(data['class'].values[absent])} have no node in 'train'; add some, or drop these classes"
        )


def _check_memory(x: Tensor, num_pairs: int, hidden: int, copied: bool) -> None:
    """Check that one step of the hyperparameters fits into memory, with `fit_bilevel`'s defaults.

    ``copied`` says whether every evaluation keeps features of its own, as dropout of dense ones does.
    """
    by_pair, by_node = 40, 8 * hidden + copied * x.shape[1]
    numbers = _STEPS * (by_pair * num_pairs + by_node * len(x)) + x.numel()
    needed = numbers * torch.finfo(x.dtype).bits // 8
    check_memory(
        "lds",
        needed,
        x.device,
        f"{num_pairs:,} candidate pairs of {len(x):,} nodes",
        "take fewer candidates, hidden units or features",
    )


def _transient(edges: EdgeSet, shapes: dict[str, tuple[int, int]], num_nodes: int) -> tuple[str, ...]:
    sizes = {name: rows * columns for name, (rows, columns) in shapes.items()}
    sizes["class_probability"] = num_nodes * shapes["weight_out"][1]
    return transient_sites(edges) + tuple(name for name, size in sizes.items() if size > _KEPT)
