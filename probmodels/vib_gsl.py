"""Graph structure learning with a variational information bottleneck: classes of graphs from learned random edges.

Model, for graphs g and their candidate pairs of nodes::

    edge_uv ~ Bernoulli(rate), one of two rates as the pair was observed as an edge or not
    z_g ~ Normal(0, I)
    y_g ~ Categorical(softmax(classifier(z_g)))

The guide draws edges from the features of their nodes, and z from the graph that was drawn; see
`probmodels.guides.vib_gsl`. With weights ``beta`` and ``edge_beta`` of its divergences, the loss is the bottleneck::

    sum_g  -E log p(y_g | z_g) + beta KL[q(z_g) || p(z_g)] + edge_beta sum_uv KL[q(edge_uv) || p(edge_uv)]

References
----------
Sun, Q., Li, J., Peng, H., Wu, J., Fu, X., Ji, C. and Yu, P. S. (2022). Graph structure learning with variational
information bottleneck. AAAI. https://arxiv.org/abs/2112.08903
Alemi, A. A., Fischer, I., Dillon, J. V. and Murphy, K. (2017). Deep variational information bottleneck. ICLR.
https://arxiv.org/abs/1612.00410
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
import pyro
import pyro.distributions as dist
import torch
import xarray as xr
from annotated_types import Interval, Len
from pyro import poutine
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import kl_divergence

from probmodels.datasets.graph_data import check_graph, make_graph
from probmodels.datasets.pairs import count_pairs, some
from probmodels.edges.checks import class_probabilities, column, judge_classes
from probmodels.edges.outputs import write_edges as write_outputs
from probmodels.errors import DataError
from probmodels.guides.edges import RANDOM, EdgeSet, label_pairs, make_edges, transient_sites
from probmodels.guides.vib_gsl import (
    BACKBONES,
    HEADS,
    POOLINGS,
    EdgeNetwork,
    Encoder,
    FeatureMask,
    VIBGSLGuide,
    check_step,
    choose_graphs,
    pair_sites,
)
from probmodels.inference.diagnostics.findings import Finding
from probmodels.inference.diagnostics.guides import still_falling
from probmodels.inference.labels import read_json
from probmodels.inference.problem import Problem
from probmodels.inference.programs.checks import parameters_without_gradient
from probmodels.inference.programs.programs import fitted
from probmodels.inference.result import Result
from probmodels.inference.runtime.ops import isolated, named_deterministic
from probmodels.options import (
    Count,
    Draws,
    Natural,
    OneOf,
    Probability,
    Seed,
    Width,
    checked,
    options_of,
    refuse_unused,
)

__all__ = ["ENGINES", "REFERENCE", "VIBGSL", "check_draws", "make_problem", "predict", "tiny", "write_outputs"]

REFERENCE = "Sun et al. (2022), https://arxiv.org/abs/2112.08903"
ENGINES = ("svi",)

_STARTING_GRAPHS = 256  # whose features are standardised at the start
_CHECKED_GRAPHS = 16  # that are run to see whether gradients reach the edges
_LEAST_SPREAD = 0.02  # of class probabilities between graphs, below which the embedding says nothing about a graph
_RATES = (1e-3, 0.5)  # bounds of a rate that nobody gave

_Rate = Annotated[float, Interval(ge=1e-6, le=1 - 1e-6)]  # whose log odds single precision holds


class VIBGSL(PyroModule):
    """The model.

    Parameters
    ----------
    size
        Length of ``z``.
    width
        Hidden units of the classifier; 0 for a linear one.
    num_classes
        Number of classes.
    beta, edge_beta
        Weights of the divergences of ``z`` and of every edge, in nats; the guide has the same.
    rates
        Prior probabilities of an edge, for pairs that were not observed as one and for those that were.
    edge_probability
        Probabilities (pair,) of edges in the guide from features and pairs, for the record.
    """

    def __init__(
        self,
        size: int,
        width: int,
        num_classes: int,
        *,
        beta: float,
        edge_beta: float,
        rates: tuple[float, float],
        edge_probability: Callable[[Tensor, EdgeSet], Tensor],
    ) -> None:
        super().__init__()
        hidden = [nn.Linear(size, width), nn.ReLU()] if width else []
        self.classifier = nn.Sequential(*hidden, nn.Linear(width or size, num_classes))
        self.size, self.beta, self.edge_beta, self.rates = size, beta, edge_beta, rates
        self.edge_probability = edge_probability

    def forward(self, x: Tensor, edges: EdgeSet, y: Tensor, labelled: Tensor) -> None:
        """Sites ``edge`` (pair,), ``z`` (graph, component), ``y`` (graph,).

        Outside of the fit also ``edge_probability`` (pair,), ``num_edges``, ``mean_degree`` and ``class_probability``
        (graph, class), which a step need not compute.

        The arguments are features (node, feature), candidate pairs by ascending source, classes (graph,), and whether a
        graph is one to learn from (graph,).
        """
        named: Any = {"event_dims": ["component"]}
        graphs = pyro.plate("graph", edges.num_graphs)
        x, chosen = choose_graphs(x, edges, graphs.indices)
        mask: Any = labelled if chosen is edges else labelled[graphs.indices]
        y = y if chosen is edges else y[graphs.indices]
        with pair_sites(chosen, mask, self.edge_beta * edges.num_graphs / chosen.num_graphs):
            low, high = self.rates
            rate = low + (high - low) * chosen.observed.to(x)
            edge = pyro.sample("edge", dist.Bernoulli(rate))
            if not torch.is_grad_enabled():
                named_deterministic("edge_probability", self.edge_probability(x, chosen))
        with graphs, poutine.mask(mask=mask):
            prior = dist.Normal(x.new_zeros(self.size), 1.0).to_event(1)
            with poutine.scale(scale=self.beta):
                z = pyro.sample("z", prior, infer=named)
            logits = self.classifier(z)
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)
            if not torch.is_grad_enabled():
                named_deterministic("class_probability", logits.softmax(-1), ["class"])
        if not torch.is_grad_enabled():
            pyro.deterministic("num_edges", edge.sum())
            pyro.deterministic("mean_degree", 2 * edge.sum() / chosen.num_nodes)


@checked(DataError, keep=True)
def make_problem(
    data: xr.Dataset,
    *,
    backbone: Annotated[str, OneOf(BACKBONES)] = "gin",
    width: Width = 32,
    layers: Annotated[int, Interval(ge=1, le=64)] = 2,
    pooling: Annotated[str, OneOf(POOLINGS)] = "mean",
    bottleneck: Width = 16,
    beta: Annotated[float, Interval(gt=0, le=1e6)] = 0.01,
    candidates: Literal["all", "observed"] = "all",
    neighbours: Natural = 0,
    metric: str = "cosine",
    random: Annotated[float, Interval(ge=0, le=1e6)] = 0.0,
    informed: bool = True,
    skip: Probability = 0.5,
    temperature: Annotated[float, Interval(ge=1e-3, le=1e3)] = 0.5,
    edge_beta: Annotated[float, Interval(ge=0, le=1e6)] = 0.05,
    edge_rate: _Rate | None = None,
    observed_rate: _Rate | None = 0.99,
    feature_mask: bool = False,
    learn_edges: bool = True,
    train: str | Annotated[Sequence[str], Len(1)] = ("train",),
    seed: Seed = 0,
) -> Problem:
    """Classification of graphs through edges that are learned with the classifier.

    Parameters
    ----------
    data
        Graphs to classify, as `probmodels.datasets.graphs` describes them.
    backbone
        Layers of the encoder: ``"gcn"``, ``"gat"`` or ``"gin"``.
    width, layers
        Columns and number of its layers; ``width`` is that of edge network and classifier too, a multiple of 4 with
        ``"gat"``.
    pooling
        ``"mean"`` or ``"sum"`` over the nodes of a graph.
    bottleneck
        Length of the embedding ``z``.
    beta
        Weight of the divergence of ``z``: the price of a nat that the embedding keeps about a graph.
    candidates
        Pairs that may be edges: ``"all"`` within a graph, or the ``"observed"`` ones with what the next options add.
    neighbours, metric, random
        Nearest neighbours of every node by its features, and random pairs per other pair; see `make_edges`. Every step
        of a fit, and every draw of `predict`, has random pairs of its own.
    informed
        Whether log odds of an edge depend on whether it was observed, beside the features of its nodes. False is the
        paper's: edges then follow from features alone, and with degrees as features pairs of equal degrees are alike.
    skip
        Weight of the observed edges in the graph that the encoder sees, in [0, 1]; the drawn edges have the rest.
    temperature
        Temperature of the concrete distribution whose derivative edges have.
    edge_beta
        Weight of the divergence of every edge; 0, the paper's, for edges that are drawn and not penalised.
    edge_rate, observed_rate
        Prior probabilities of an edge, in (0, 1), for pairs that were not observed and for those that were; edges start
        from them. None for a rate that expects one new edge for twenty observed ones, and for one rate for all.
    feature_mask
        Whether a learned share of every feature is replaced by noise.
    learn_edges
        False leaves edges at their starting values, as a control.
    train
        Splits to learn from; graphs of the others are drawn for and take no part in the loss. Where no graph has a
        split, all that have a label are learned from.
    seed
        Seed of the starting values of the networks and of random pairs.

    Returns
    -------
    Problem
        For `fit_svi`; ``batch_size`` counts graphs. Draws of edges are kept for up to 10,000 pairs, else their moments.

    Raises
    ------
    DataError
        If the data do not fit, there is nothing to learn from, no pair could be an edge, or an option is out of range
        or not used.
    ProblemError
        If a pass over all candidate pairs would not fit into memory.
    UserWarning
        As a warning: if no gradient reaches parameters of the edges, which would stay as they are.
    """
    _check_collection(data)
    if candidates == "all":
        unused = {"neighbours": neighbours, "metric": metric, "random": random}
        refuse_unused(make_problem, "candidates='all'", **unused)
    elif not neighbours:
        refuse_unused(make_problem, "neighbours=0", metric=metric)
    if not learn_edges:
        refuse_unused(make_problem, "learn_edges=False", temperature=temperature)
    if backbone == "gat" and width % HEADS:
        raise DataError(f"width={width} is shared by {HEADS} attention heads; choose a multiple of {HEADS}")
    settings = {"candidates": candidates, "neighbours": neighbours, "metric": metric, "random": random, "seed": seed}
    labelled = _labelled(data, train)
    with isolated(seed):
        network = EdgeNetwork(data.sizes["feature"], width, informed)
        encoder = Encoder(data.sizes["feature"], width, layers, bottleneck, backbone, pooling)
        x, edges, y = _tensors(data, settings, encoder, network)
        if not edges.num_pairs:
            raise DataError("no pair of nodes could be an edge; take candidates='all', or graphs of more than one node")
        rates = _rates(edges, edge_rate, observed_rate)
        level = rates[0] + (rates[1] - rates[0]) * float(edges.observed.double().mean())  # expects as many edges
        network.start(*(rates if informed else (level, level)))
        some_x, few = choose_graphs(x, edges, labelled.nonzero().squeeze(1)[:_STARTING_GRAPHS])
        encoder.start(some_x, few, few.observed.to(x))
        guide = VIBGSLGuide(
            network,
            encoder,
            FeatureMask(some_x) if feature_mask else None,
            temperature=temperature,
            skip=skip,
            beta=beta,
            edge_beta=edge_beta,
            learn_edges=learn_edges,
            refresh=bool((edges.origin == RANDOM).any()),
        )
        model = VIBGSL(
            bottleneck,
            width,
            data.sizes["class"],
            beta=beta,
            edge_beta=edge_beta,
            rates=rates,
            edge_probability=guide.edge_probability,
        )
    problem = _problem(data, model, guide, (x, edges, y, labelled))
    if learn_edges:
        _warn_without_gradient(guide, problem.args, skip)
    return problem


@checked(DataError)
def predict(
    result: Result,
    problem: Problem,
    data: xr.Dataset | None = None,
    *,
    num_samples: Draws = 64,
    batch_size: Count = 256,
    seed: Seed = 0,
) -> xr.Dataset:
    """Classes of graphs, averaged over draws of edges and embeddings; the graphs may be new ones of any size.

    Parameters
    ----------
    result
        Result of `fit_svi`.
    problem
        The problem that was fitted.
    data
        Graphs with the features of those that were fitted; labels and splits may be absent. None for all graphs of the
        problem.
    num_samples
        Draws to average over.
    batch_size
        Graphs that are drawn for at a time.
    seed
        Seed of the draws.

    Returns
    -------
    xr.Dataset
        ``probability`` (graph, class) with its standard deviation over draws ``probability_sd``; ``predicted`` (graph),
        the position of the most probable class; ``rate`` (graph), the divergence of the embedding in nats;
        ``edge_probability`` (pair) with ``pair_source``, ``pair_target`` and ``pair_observed``. Where there are random
        pairs, every draw has others.

    Raises
    ------
    DataError
        If the graphs do not fit the problem or an argument is out of range.
    ResultError
        If the result is not one of this problem.
    """
    if data is not None:
        problem = _renewed(problem, data)
    assert problem.data is not None
    x, edges, y, labelled = problem.args
    parts: list[dict[str, Any]] = []
    with fitted(problem, result.guide_state or {}, seed=seed) as (model, guide), torch.no_grad():
        for chosen in torch.arange(edges.num_graphs, device=x.device).split(batch_size):
            some_x, few = choose_graphs(x, edges, chosen)
            parts.append({})
            for _ in range(num_samples):
                for name, value in _predicted(model, guide, (some_x, few, y[chosen], labelled[chosen])).items():
                    parts[-1][name] = parts[-1].get(name, 0.0) + value.double() / num_samples
    sums = {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}
    mean, square = sums["probability"], sums["square"]
    named = problem.data
    return xr.Dataset(
        {
            "probability": (("graph", "class"), mean.numpy()),
            "probability_sd": (("graph", "class"), (square - mean**2).clamp(min=0).sqrt().numpy()),
            "predicted": ("graph", mean.argmax(1).numpy()),
            "rate": ("graph", sums["rate"].numpy()),
            "edge_probability": ("pair", sums["edge_probability"].numpy()),
            **{name: named[name] for name in ("pair_source", "pair_target", "pair_observed")},
        },
        coords={dim: list(problem.coords[dim]) for dim in ("graph", "class", "pair")},
        attrs={"num_samples": num_samples, "seed": seed},
    )


def check_draws(result: Result) -> Iterator[Finding]:
    """Findings on the classes of graphs that were held out, in place of those on the guide as a posterior.

    With weights of the divergences below one the guide is the encoder of a bottleneck and meant to be no posterior, and
    its weights say nothing. Checked are the loss, and accuracy, log loss and calibration of the class probabilities.
    """
    tree = result.tree
    yield from still_falling(tree)
    probability, y, split = class_probabilities(tree), column(tree, "y").astype(np.int64), column(tree, "split")
    train = read_json(tree.attrs, "options", {}).get("train", ["train"])
    learned = np.isin(split, [train] if isinstance(train, str) else train) if (split != "").any() else y >= 0
    shares = np.bincount(y[learned & (y >= 0)], minlength=probability.shape[1]) / max((learned & (y >= 0)).sum(), 1)
    advice = "take more steps, or a larger width"
    if probability[:, 0].std() < _LEAST_SPREAD:
        advice = "all graphs get the same probabilities, so that the embedding is not used: take a smaller beta"
    held_out = ~learned & (y >= 0)
    yield from judge_classes(probability[held_out], y[held_out], shares, units="graphs", advice=advice)
    verdict = "drawn edges and embeddings are parts of a classifier: they are no posterior, and are not judged"
    yield Finding(False, verdict, "for beliefs about which edges are real, take noisy_edges")


def tiny() -> Problem:
    """Eight graphs of three to six nodes, rings and paths, for the conformance tests."""
    rng = np.random.default_rng(0)
    sizes = np.array([3, 4, 5, 6, 3, 4, 5, 6])
    starts = np.cumsum(sizes) - sizes
    edges = [
        (s + i, s + (i + 1) % n) for g, (s, n) in enumerate(zip(starts, sizes, strict=True)) for i in range(n - g // 4)
    ]
    x = np.column_stack([np.ones(sizes.sum()), rng.standard_normal((sizes.sum(), 2))])
    data = make_graph(
        x,
        np.repeat(["ring", "path"], 4),
        edges,
        graph=np.repeat(np.arange(8), sizes),
        split=np.tile(["train", "train", "train", "test"], 2),
        name="rings and paths",
    )
    return make_problem(data, width=4, bottleneck=2, edge_beta=0.1, feature_mask=True)


def _predicted(model: Any, guide: Any, args: tuple[Any, ...]) -> dict[str, Tensor]:
    """One draw of random pairs, edges and embeddings."""
    x, edges, *rest = args
    args = (x, edges.refreshed() if guide.refresh else edges, *rest)
    drawn: Any = poutine.trace(guide).get_trace(*args)
    nodes: Any = poutine.trace(poutine.replay(model, trace=drawn)).get_trace(*args).nodes
    probability = nodes["class_probability"]["value"]
    return {
        "probability": probability,
        "square": probability.square(),
        "rate": kl_divergence(drawn.nodes["z"]["fn"], nodes["z"]["fn"]),
        # Of the pairs that were asked about, which others may have stood in for.
        "edge_probability": guide.edge_probability(x, edges) if guide.refresh else nodes["edge_probability"]["value"],
    }


def _problem(data: xr.Dataset, model: Any, guide: Any, args: tuple[Any, ...]) -> Problem:
    edges: EdgeSet = args[1]
    coords: dict[str, Any] = {
        dim: data[dim].values for dim in ("node", "feature", "graph", "class") if dim in data.coords
    }
    coords |= {"graph": coords.get("graph", np.arange(edges.num_graphs)), "pair": np.arange(edges.num_pairs)}
    return Problem(
        name="vib_gsl",
        model=model,
        guide=guide,
        args=args,
        coords=coords,
        data=label_pairs(data, edges),
        batch_plates=("graph",),
        loss="TraceMeanField_ELBO",
        transient=transient_sites(edges),
    )


def _renewed(problem: Problem, data: xr.Dataset) -> Problem:
    """The problem with other graphs, whose labels and splits are left aside."""
    known: Any = problem.data
    if "graph_index" in data and "x" in data:
        num_graphs = int(data["graph_index"].values.max(initial=-1)) + 1
        labels = {"y": ("graph", np.full(num_graphs, -1)), "split": ("graph", np.full(num_graphs, ""))}
        data = _same_features(data, known).assign(labels).assign_coords({"class": known["class"].values})
    settings = {name: option.default for name, option in options_of(make_problem).items()} | dict(problem.options)
    _check_collection(data)
    guide: Any = problem.guide
    x, edges, y = _tensors(data, settings, guide.encoder, guide.edges)
    old: Tensor = problem.args[0]
    source, target, origin, graph = (part.to(old.device) for part in edges[:4])
    edges = EdgeSet(source, target, origin, graph, edges.num_graphs)
    args = (x.to(old), edges, y.to(old.device), torch.ones(len(y), dtype=torch.bool, device=old.device))
    return _problem(data, problem.model, guide, args)


def _same_features(data: xr.Dataset, known: xr.Dataset) -> xr.Dataset:
    """The data with the columns of others, matched by their labels where both have any; those that are absent are 0."""
    if "feature" in data.coords and "feature" in known.coords:
        wanted = known["feature"].values
        extra = np.setdiff1d(data["feature"].values, wanted)
        if len(extra):
            raise DataError(f"features {some(extra)} were not among those fitted, {some(wanted)}; drop or rename them")
        return data.reindex(feature=wanted, fill_value=0)
    if data.sizes["feature"] != known.sizes["feature"]:
        raise DataError(f"there are {data.sizes['feature']} features, but {known.sizes['feature']} were fitted")
    return data


def _tensors(
    data: xr.Dataset, settings: dict[str, Any], encoder: Encoder, network: EdgeNetwork
) -> tuple[Tensor, EdgeSet, Tensor]:
    """Features, candidate pairs by ascending source, classes; seen to be few enough for one evaluation."""
    x, graph = torch.as_tensor(data["x"].values, dtype=torch.get_default_dtype()), data["graph_index"].values
    check = partial(check_step, encoder, network, x, num_graphs=int(graph[-1]) + 1)
    every = settings["candidates"] == "all"
    if every:
        with torch.no_grad():
            check(num_pairs=count_pairs(graph))  # before they are listed
    edges = make_edges(
        np.stack([data["source"].values, data["target"].values], axis=1),
        graph,
        features=data["x"].values,
        neighbours=settings["neighbours"],
        metric=settings["metric"],
        random=settings["random"],
        all_pairs=every,
        seed=settings["seed"],
    )
    with torch.no_grad():
        check(num_pairs=edges.num_pairs)
    order = torch.argsort(edges.source * edges.num_nodes + edges.target)
    edges = edges._replace(source=edges.source[order], target=edges.target[order], origin=edges.origin[order])
    return x, edges, torch.as_tensor(data["y"].values.astype(np.int64)).clamp(min=0)


def _labelled(data: xr.Dataset, train: Sequence[str]) -> Tensor:
    """Whether a graph is one to learn from (graph,)."""
    split, y = data["split"].values, data["y"].values
    wanted = [train] if isinstance(train, str) else list(train)
    labelled = np.isin(split, wanted) if (split != "").any() else y >= 0
    labelled &= y >= 0
    if not labelled.any():
        raise DataError(f"no graph to learn from: train={wanted}, but the splits are {some(np.unique(split))}")
    absent = np.setdiff1d(np.arange(data.sizes["class"]), y[labelled])
    if len(absent):
        raise DataError(
            f"classes {some(data['class'].values[absent])} have no graph in {wanted}; add some, or drop these classes"
        )
    return torch.from_numpy(labelled)


def _rates(edges: EdgeSet, edge_rate: float | None, observed_rate: float | None) -> tuple[float, float]:
    """Prior probabilities of unobserved and of observed pairs."""
    seen = int(edges.observed.sum())
    if edge_rate is None:
        share = seen / edges.num_pairs if observed_rate is None else 0.05 * seen / max(edges.num_pairs - seen, 1)
        edge_rate = float(np.clip(share, *_RATES))
    return edge_rate, edge_rate if observed_rate is None else observed_rate


def _warn_without_gradient(guide: VIBGSLGuide, args: tuple[Any, ...], skip: float) -> None:
    """Say so where edges would not be learned."""
    x, edges, y, labelled = args
    chosen = torch.unique(edges.graph_of_pair)[:_CHECKED_GRAPHS]
    x, edges = choose_graphs(x, edges, chosen)
    dead = parameters_without_gradient(guide, (x, edges, y[chosen], labelled[chosen]), "z", "edges")
    why = "log odds or hidden units may be saturated: standardise the features, or raise the temperature"
    why = "skip=1 leaves drawn edges no weight; choose a smaller one" if skip == 1 else why
    if dead:
        text = f"vib_gsl: no gradient reaches {dead} of the edges, which will not be learned: {why}"
        warnings.warn(text, stacklevel=4)  # at the call of make_problem, behind the check of its options


def _check_collection(data: Any) -> None:
    if isinstance(data, xr.Dataset) and "graph_index" not in data:
        raise DataError("vib_gsl classifies graphs, but these data hold one graph; take lds or noisy_edges")
    check_graph(data)
