"""Edges seen through a noisy channel: true edges with calibrated posterior probabilities.

Generative model, for candidate pairs (u, v) of nodes, each looked at n times::

    deletion ~ Beta,  addition_ratio ~ Beta,  addition = addition_ratio (1 - deletion)
    rate_logit_kl ~ Normal                                    (one for each pair of classes, or one for all)
    logit p_uv = rate_logit_kl + coefficient . similarity_uv + propensity_u + propensity_v
    A_uv ~ Bernoulli(p_uv)
    O_uv | A_uv ~ Binomial(n, A_uv (1 - deletion) + (1 - A_uv) addition)

Given the parameters, pairs are independent. Therefore the true edges are marginalised in closed form, and every draw of
the parameters has the exact conditional probability of every edge::

    logit P(A_uv = 1 | O_uv) = logit p_uv - O_uv log addition_ratio + (n - O_uv) log(deletion / (1 - addition))

With ``blocks`` the classes are those of a stochastic block model: known for training nodes, otherwise concrete
memberships of a logistic regression on the features. With ``labels`` the classes of training nodes are explained by a
graph convolutional network on the true edges, which are then latent, and the model is fitted by `fit_svi`.

References
----------
Butts, C. T. (2003). Network inference, error, and informant (in)accuracy: a Bayesian approach. Social Networks 25(2).
Newman, M. E. J. (2018). Network structure from rich but noisy data. Nature Physics 14.
https://doi.org/10.1038/s41567-018-0076-1
Peixoto, T. P. (2018). Reconstructing networks with unknown and heterogeneous errors. Physical Review X 8.
https://doi.org/10.1103/PhysRevX.8.041011
Elinas, P., Bonilla, E. V. and Tiao, L. (2020). Variational inference for graph convolutional networks in the absence of
graph data and adversarial settings. https://arxiv.org/abs/1906.01852
Horvitz, D. G. and Thompson, D. J. (1952). A generalization of sampling without replacement from a finite universe.
JASA 47. https://doi.org/10.1080/01621459.1952.10483446
Maddison, C. J., Mnih, A. and Teh, Y. W. (2017). The concrete distribution. https://arxiv.org/abs/1611.00712
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
import xarray as xr
from annotated_types import Interval
from numpy.typing import NDArray
from pyro import poutine
from torch import Tensor

from probmodels.edges.outputs import write_edges as write_outputs
from probmodels.errors import DataError, ProblemError
from probmodels.guides.auto import make_guide
from probmodels.guides.edges import label_pairs, transient_sites
from probmodels.guides.nets import propagate
from probmodels.guides.noisy_edges import ESTIMATORS, WEIGHTS, make_edge_guide
from probmodels.inference.problem import Problem
from probmodels.inference.runtime.ops import named_deterministic
from probmodels.noisy_edges.channel import NoisyCount
from probmodels.noisy_edges.pairs import SIMILARITIES, PairData, check_room, make_pairs, takes_all_pairs
from probmodels.options import Natural, OneOf, Seed, Width, checked, refuse_unused

__all__ = [
    "ENGINES",
    "REFERENCE",
    "NoisyCount",
    "Prior",
    "edge_logits",
    "evidence",
    "make_problem",
    "model",
    "tiny",
    "write_outputs",
]

REFERENCE = "Newman (2018), https://doi.org/10.1038/s41567-018-0076-1"
ENGINES = ("mcmc", "svi")

_Shape = Annotated[float, Interval(gt=0, le=1e6)]  # of a Beta distribution


class Prior(NamedTuple):
    """Hyperparameters.

    Attributes
    ----------
    deletion, addition_ratio
        Parameters of the two Beta distributions.
    rate
        Mean and standard deviation of ``rate_logit``.
    coefficient
        Standard deviation of a coefficient, per standard deviation of its similarity.
    propensity
        Scale of the half-normal prior of ``propensity_scale``.
    membership
        Standard deviation of the log odds of a class that features give a node.
    temperature
        Temperature of the concrete memberships of nodes of unknown class.
    network
        Standard deviation of what a layer of the network gives for standardised input.
    """

    deletion: tuple[float, float]
    addition_ratio: tuple[float, float]
    rate: tuple[float, float]
    coefficient: float = 2.0
    propensity: float = 1.0
    membership: float = 2.5
    temperature: float = 0.5
    network: float = 4.0


def model(
    data: PairData,
    prior: Prior,
    *,
    labels: bool = False,
    propensity: bool = False,
    hidden: int = 16,
) -> None:
    """The model of the module's docstring.

    Latent sites: ``deletion``, ``addition_ratio`` (), ``rate_logit`` (block_pair,) and, where wanted, ``coefficient``
    (similarity,), ``propensity_scale`` (), ``propensity_noise`` (node,), those of memberships and of the network.
    Observed: ``observed`` (pair,), ``block`` or ``label`` (known,). ``edge`` (pair,) is generated, or latent with
    ``labels``. Deterministic: ``addition``, ``edge_probability`` (pair,) given the parameters and what was seen,
    ``num_edges``, ``mean_degree``, ``homophily``.

    Parameters
    ----------
    data
        Candidate pairs and what is known of them.
    prior
        Hyperparameters.
    labels
        Whether a network on the edges explains the classes of the known nodes.
    propensity
        Whether nodes differ in their log odds of edges.
    hidden
        Width of the network.
    """
    like = data.weight
    values: dict[str, Tensor] = {}
    for name, (one, other) in (("deletion", prior.deletion), ("addition_ratio", prior.addition_ratio)):
        values[name] = pyro.sample(name, dist.Beta(like.new_tensor(one), like.new_tensor(other)))
    pyro.deterministic("addition", _addition(values))
    rates = dist.Normal(like.new_tensor(prior.rate[0]), prior.rate[1]).expand([data.num_block_pairs]).to_event(1)
    values["rate_logit"] = pyro.sample("rate_logit", rates, infer=_axis("block_pair"))
    if data.similarity.shape[1]:
        slopes = dist.Normal(like.new_zeros(data.similarity.shape[1]), prior.coefficient).to_event(1)
        values["coefficient"] = pyro.sample("coefficient", slopes, infer=_axis("similarity"))
    if propensity:
        values["propensity_scale"] = pyro.sample("propensity_scale", dist.HalfNormal(like.new_tensor(prior.propensity)))
        with pyro.plate("node", data.edges.num_nodes, dim=-1):
            values["propensity_noise"] = pyro.sample("propensity_noise", dist.Normal(like.new_zeros(()), 1.0))
    if len(data.unknown):
        values |= _sample_memberships(data, prior)
    if labels:
        values |= _sample_weights(data, prior, hidden)
    before = prior_logits(data, prior, values)
    after = before + evidence(data.seen, data.trials, values)
    with pyro.plate("pair", data.edges.num_pairs, dim=-1):
        with poutine.scale(scale=data.weight):
            pyro.sample("observed", _channel(before, data, values), obs=data.seen)
        strength = pyro.deterministic("edge_probability", after.sigmoid(), event_dim=0)
        # p(O) p(A | O) in place of p(A) p(O | A): without labels nothing depends on A, and its factor is left out.
        generated: Any = {"generated": not labels}
        edge = pyro.sample("edge", dist.Bernoulli(logits=after), infer=generated)
    if data.rest is not None:
        never = _channel(values["rate_logit"], data, values).log_prob(torch.zeros_like(data.rest))
        pyro.factor("rest", (data.rest * never).sum())
    if labels:
        strength = edge
        _explain_labels(data, values, edge)
    _summarise(data, values, strength)


def edge_logits(data: PairData, prior: Prior, values: Mapping[str, Tensor]) -> Tensor:
    """Log odds of every true edge (pair,) given what was seen and the parameters."""
    return prior_logits(data, prior, values) + evidence(data.seen, data.trials, values)


def prior_logits(data: PairData, prior: Prior, values: Mapping[str, Tensor]) -> Tensor:
    """Log odds of every true edge (pair,) before anything was seen.

    Parameters
    ----------
    data, prior
        As `model` takes them.
    values
        Latent sites by name.
    """
    source, target, rate = data.edges.source, data.edges.target, values["rate_logit"]
    shift: Tensor | None = None
    if "coefficient" in values:
        shift = data.similarity @ values["coefficient"]
    if "propensity_noise" in values:
        propensity = values["propensity_scale"] * values["propensity_noise"]
        both = propensity.index_select(0, source) + propensity.index_select(0, target)
        shift = both if shift is None else shift + both
    if "membership_noise" not in values:
        logits = rate.index_select(0, data.block_pair)
        return logits if shift is None else logits + shift
    member = _memberships(data, prior, values)
    one, other = member.index_select(0, source), member.index_select(0, target)
    if shift is None:
        chance = ((one @ rate[data.blocks].sigmoid()) * other).sum(-1)
    else:
        cells = (rate[data.blocks] + shift[:, None, None]).sigmoid()
        chance = ((one.unsqueeze(-2) @ cells).squeeze(-2) * other).sum(-1)
    return torch.logit(chance, eps=1e-7)


def evidence(count: Tensor, trials: int, values: Mapping[str, Tensor]) -> Tensor:
    """Log likelihood ratio of an edge against none, for counts of any shape."""
    missed = values["deletion"].log() - (-_addition(values)).log1p()
    return (trials - count) * missed - count * values["addition_ratio"].log()


def _axis(name: str) -> Any:
    return {"event_dims": [name]}


def _addition(values: Mapping[str, Tensor]) -> Tensor:
    return values["addition_ratio"] * (1 - values["deletion"])


def _channel(logits: Tensor, data: PairData, values: Mapping[str, Tensor]) -> NoisyCount:
    return NoisyCount(logits, values["deletion"], _addition(values), data.trials)


def _sample_memberships(data: PairData, prior: Prior) -> dict[str, Tensor]:
    """Sites of the classes of nodes: ``membership_bias`` (class,), ``membership_weight`` (feature, class),
    ``membership_noise`` (unlabelled, class), ``block`` (known,); deterministic ``membership`` (unlabelled, class)."""
    zero, num_features = data.weight.new_zeros(()), data.x.shape[1]
    gumbel = dist.Gumbel(zero, torch.ones_like(zero))
    values = {}
    with pyro.plate("class", data.num_classes, dim=-1):
        values["membership_bias"] = pyro.sample("membership_bias", dist.Normal(zero, 1.0))
        with pyro.plate("feature", num_features, dim=-2):
            weight = dist.Normal(zero, prior.membership / math.sqrt(num_features))
            values["membership_weight"] = pyro.sample("membership_weight", weight)
        with pyro.plate("unlabelled", len(data.unknown), dim=-2):
            values["membership_noise"] = pyro.sample("membership_noise", gumbel)
            pyro.deterministic("membership", _memberships(data, prior, values)[data.unknown], event_dim=0)
    with pyro.plate("known", len(data.known), dim=-1):
        pyro.sample("block", dist.Categorical(logits=_class_logits(data, values)[data.known]), obs=data.y)
    return values


def _class_logits(data: PairData, values: Mapping[str, Tensor]) -> Tensor:
    return data.x @ values["membership_weight"] + values["membership_bias"]


def _memberships(data: PairData, prior: Prior, values: Mapping[str, Tensor]) -> Tensor:
    """Memberships (node, class): one class where it is known, concrete elsewhere."""
    logits = _class_logits(data, values)
    soft = torch.softmax((logits[data.unknown] + values["membership_noise"]) / prior.temperature, -1)
    hard = (data.y.unsqueeze(-1) == torch.arange(data.num_classes, device=data.y.device)).to(logits)
    return torch.zeros_like(logits).index_copy(0, data.known, hard).index_copy(0, data.unknown, soft)


def _sample_weights(data: PairData, prior: Prior, hidden: int) -> dict[str, Tensor]:
    """Sites of the network: ``weight_in`` (hidden, feature), ``weight_out`` (hidden, class)."""
    zero, num_features = data.weight.new_zeros(()), data.x.shape[1]
    values, units = {}, pyro.plate("hidden", hidden, dim=-2)
    with units, pyro.plate("feature", num_features, dim=-1):
        values["weight_in"] = pyro.sample("weight_in", dist.Normal(zero, prior.network / math.sqrt(num_features)))
    with units, pyro.plate("class", data.num_classes, dim=-1):
        values["weight_out"] = pyro.sample("weight_out", dist.Normal(zero, prior.network / math.sqrt(hidden)))
    return values


def class_logits(data: PairData, values: Mapping[str, Tensor], edge: Tensor) -> Tensor:
    """Log odds of the classes (..., node, class) by a graph convolutional network on edges (..., pair)."""
    inner = propagate(data.x @ values["weight_in"].mT, data.edges, edge).relu()
    return propagate(inner @ values["weight_out"], data.edges, edge)


def label_fit(data: PairData, values: Mapping[str, Tensor], edge: Tensor) -> Tensor:
    """Log likelihood (...) of the known classes given edges (..., pair)."""
    logs = class_logits(data, values, edge)[..., data.known, :].log_softmax(-1)
    return logs.gather(-1, data.y.unsqueeze(-1).expand(*logs.shape[:-1], 1)).sum((-1, -2))


def _explain_labels(data: PairData, values: Mapping[str, Tensor], edge: Tensor) -> None:
    """Site ``label`` (known,); deterministic ``class_probability`` (node, class)."""
    logits = class_logits(data, values, edge)
    named_deterministic("class_probability", logits.softmax(-1), ["node", "class"])
    with pyro.plate("known", len(data.known), dim=-1):
        pyro.sample("label", dist.Categorical(logits=logits[data.known]), obs=data.y)


def _summarise(data: PairData, values: Mapping[str, Tensor], strength: Tensor) -> None:
    """Deterministic sites of the graph as a whole, from the edges (pair,) or their probabilities."""
    strength = data.weight * strength
    total = strength.sum()
    alike = None if data.same is None else (strength * data.same).sum()
    if data.rest is not None and data.rest_same is not None:
        chance = (values["rate_logit"] + evidence(torch.zeros_like(data.rest), data.trials, values)).sigmoid()
        total = total + (data.rest * chance).sum()
        alike = None if alike is None else alike + (data.rest_same * chance).sum()
    pyro.deterministic("num_edges", total)
    pyro.deterministic("mean_degree", 2 * total / data.edges.num_nodes)
    if alike is not None:
        pyro.deterministic("homophily", alike / total.clamp(min=1e-6))


@checked(DataError, keep=True)
def make_problem(
    data: xr.Dataset,
    *,
    blocks: bool = False,
    similarity: Sequence[Annotated[str, OneOf(SIMILARITIES)]] | None = None,
    propensity: bool = False,
    labels: bool = False,
    trials: Annotated[int, Interval(ge=1, le=1_000_000)] = 1,
    all_pairs: bool | None = None,
    neighbours: Natural = 10,
    metric: str = "cosine",
    random: Annotated[float, Interval(ge=0, le=1e6)] = 3.0,
    deletion: tuple[_Shape, _Shape] = (2.0, 4.0),
    addition_ratio: tuple[_Shape, _Shape] | None = None,
    expected_degree: Annotated[float, Interval(ge=1e-6, le=1e9)] = 8.0,
    hidden: Width = 16,
    weights: Annotated[str, OneOf(WEIGHTS)] = "normal",
    estimator: Annotated[str, OneOf(ESTIMATORS)] | None = None,
    seed: Seed = 0,
) -> Problem:
    """True edges of a graph that was observed with errors.

    Parameters
    ----------
    data
        Observed ``source``, ``target`` (edge); ``x`` (node, feature) where features are used; ``y`` (node) and
        ``split`` (node) where classes are, of which only those of nodes with split "train" enter inference (all,
        without a ``split``); ``graph_index`` (node) for several graphs; ``count`` (edge) with ``trials`` above one.
    blocks
        Whether rates of edges depend on the classes of the two nodes. Classes that are not known are inferred.
    similarity
        What the log odds of an edge depend on, of `SIMILARITIES`: cosine of the features, their inner product and their
        negative distance, both standardised. None for the cosine, or for none with ``blocks`` or without features.
    propensity
        Whether nodes differ in their log odds of edges, for graphs of uneven degrees.
    labels
        Whether a graph convolutional network on the true edges explains the known classes. Fitted by `fit_svi` only.
    trials
        How often each pair was looked at; ``count`` of an observed edge says how often it was seen.
    all_pairs
        Whether all pairs are candidates; None for up to 50,000 of them.
    neighbours, metric, random
        Otherwise candidates are the observed pairs, nearest neighbours by features, and ``random`` others for each of
        these; see `make_edges`. Random pairs stand for all that are left, by their weight.
    deletion
        Parameters of the Beta prior of the probability of not seeing an edge.
    addition_ratio
        Parameters of the Beta prior of the probability of seeing an edge where there is none, over that
        of seeing one where there is. None for (1, b) with a mean of a quarter of the expected density.
    expected_degree
        Prior guess of the mean degree of the true graph, right within a factor of about five.
    hidden, weights, estimator
        With ``labels``: width of the network, whether the guide has its weights ``"normal"`` or as a ``"point"``, and
        how derivatives pass through edges, see `EdgeGuide`; None for ``"disarm"`` up to 500 pairs, else
        ``"concrete"``.
    seed
        Seed of the random pairs and of the start of the network.

    Returns
    -------
    Problem
        For `run_mcmc`, which is exact, and `fit_svi`. The posterior has ``edge_probability`` (pair,), whose mean is the
        probability of an edge, draws ``edge`` (pair,), ``num_edges``, ``mean_degree``, and ``homophily`` with classes.
        Above 10,000 pairs results keep means and sds of both in group ``marginals`` instead of draws.

    Raises
    ------
    DataError
        If data lack a variable or hold what cannot be used, or an option is out of range or not used.
    ProblemError
        If one evaluation over all candidate pairs would not fit into memory.
    """
    if blocks and labels:
        raise DataError("blocks and labels both explain y, which would count it twice; choose one of them")
    kinds = tuple(similarity) if similarity is not None else () if blocks or "x" not in data else ("cosine",)
    if len(set(kinds)) < len(kinds):
        raise DataError(f"similarity={list(kinds)} names one of them twice; give each once")
    every = takes_all_pairs(data, all_pairs)
    given = {"neighbours": neighbours, "metric": metric, "random": random, "seed": seed}
    _refuse_unused(data, every, labels, **given, hidden=hidden, weights=weights, estimator=estimator)
    pairs = make_pairs(
        data,
        blocks=blocks,
        classes=blocks or labels,
        similarity=kinds,
        uneven=propensity,
        trials=trials,
        all_pairs=every,
        neighbours=neighbours,
        metric=metric,
        random=random,
        seed=seed,
    )
    _check_memory(pairs, hidden if labels else 0)
    partners = 2 * float(pairs.weight.sum() + (0 if pairs.rest is None else pairs.rest.sum())) / pairs.edges.num_nodes
    density = min(0.5, expected_degree / partners)
    ratio = (1.0, max(4 / density - 1, 1.0)) if addition_ratio is None else addition_ratio
    prior = Prior((deletion[0], deletion[1]), (ratio[0], ratio[1]), (math.log(density / (1 - density)), 1.5))
    names: Any = data["node"].values if "node" in data.coords else np.arange(pairs.edges.num_nodes)
    kept = label_pairs(data, pairs.edges).assign(
        pair_observed=("pair", pairs.seen.numpy().astype(np.int64)), pair_weight=("pair", pairs.weight.numpy())
    )
    labelled: Any = data["class"].values if "class" in data.coords else np.arange(pairs.num_classes)
    features: Any = data["feature"].values if "feature" in data.coords else range(pairs.x.shape[1])
    problem = Problem(
        name="noisy_edges",
        model=model,
        args=(pairs, prior),
        kwargs={"labels": labels, "propensity": propensity, "hidden": hidden},
        coords={
            "node": names,
            "pair": range(pairs.edges.num_pairs),
            "known": names[pairs.known.numpy()],
            "unlabelled": names[pairs.unknown.numpy()],
            "similarity": kinds,
            "feature": features,
            "class": labelled,
            "block_pair": _block_names(pairs, labelled),
        },
        data=kept,
        loss="TraceMeanField_ELBO",
        kernel=_refuse if labels else None,
        transient=transient_sites(pairs.edges),
    )
    guide = (
        make_edge_guide(problem, edge_logits, label_fit, weights=weights, estimator=estimator, seed=seed)
        if labels
        else make_guide(problem, "structured")
    )
    return replace(problem, guide=guide)


def _refuse_unused(data: xr.Dataset, every: bool, labels: bool, **given: Any) -> None:
    """Refuse options of pairs that are not looked for, and of a network that there is not."""

    def refuse(branch: str, *names: str) -> None:
        refuse_unused(make_problem, branch, **{name: given[name] for name in names})

    if not labels:
        refuse("labels=False", "hidden", "weights", "estimator")
    if every:
        refuse("all pairs as candidates", "neighbours", "metric", "random", *([] if labels else ["seed"]))
        return
    if "x" not in data:
        refuse("data without features x", "neighbours", "metric")
    elif not given["neighbours"]:
        refuse("neighbours=0", "metric")
    if not given["random"] and not labels:
        refuse("random=0", "seed")


def _check_memory(pairs: PairData, hidden: int) -> None:
    """Check that one evaluation with its gradient fits into memory; chains that move together need as many."""
    classes = 4 * pairs.num_classes * (pairs.num_classes if pairs.similarity.shape[1] else 2)
    more = (classes if len(pairs.unknown) else 0) + (4 * (hidden + pairs.num_classes) if hidden else 0)
    check_room(pairs.edges.num_pairs, more)


def _refuse(problem: Problem) -> Any:
    raise ProblemError(
        f"{problem.name}: with labels the edges depend on each other and cannot be marginalised; use fit_svi, or leave "
        "labels out"
    )


def tiny() -> Problem:
    """Eight nodes of two classes with two features, for the conformance tests."""
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1], 4)
    x = rng.normal(size=(8, 2)) + 2.0 * y[:, None]
    source, target = [0, 0, 1, 4, 4, 5, 2], [1, 2, 3, 5, 6, 7, 6]
    data = xr.Dataset(
        {"x": (("node", "feature"), x), "y": ("node", y), "source": ("edge", source), "target": ("edge", target)}
    )
    return make_problem(data, expected_degree=2.0)


def _block_names(pairs: PairData, labels: NDArray[Any]) -> list[str]:
    if len(pairs.blocks) == 1:
        return ["all"]
    names = {int(pairs.blocks[k, l]): f"{labels[k]}-{labels[l]}" for l in range(len(labels)) for k in range(l + 1)}
    return [names[number] for number in sorted(names)]
