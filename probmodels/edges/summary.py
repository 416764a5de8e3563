"""What is known of learned edges: marginals of pairs, degrees, homophily, new and doubtful edges.

Methods on graphs say how probable every candidate pair is as an edge. Here this becomes labelled arrays, of which
`probmodels.edges.outputs` makes a table, files and figures. With draws a_uv of the edges, their probabilities q_uv
given the parameters of the draw, and the number w_uv of pairs that a candidate stands for:

- the probability of a pair is the mean of q_uv over draws, or of a_uv where q_uv leaves out what other sites tell,
- the degree of a node is ``sum_v w q + sqrt(w) (a - q)``: the sum of its edges where every pair stands for itself;
  otherwise it has the mean and the variance of w independent edges,
- homophily is the share of edges that join nodes of one class, among edges between two nodes of known class.

Intervals are equal-tailed. A draw counts as one, whatever its chain.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import pandas as pd
import xarray as xr
from annotated_types import Interval
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from scipy.stats import norm

from probmodels.errors import DataError, ResultError
from probmodels.inference.diagnostics.convergence import convergence
from probmodels.inference.result import Result
from probmodels.options import Fraction, checked

__all__ = ["edge_marginals", "summarise_edges"]

_BLOCK = 4_000_000  # degrees of nodes at draws that are held at a time
_PRECISE = 0.01  # share of the edges beyond which those outside of the candidates are worth a sentence

_MEANING = {
    "noisy_edges": "The probability of a pair is that of a true edge, given what was seen, the model of errors and its "
    "priors.",
    "vib_gsl": "The probability of a pair says how often the classifier is given it as an edge. It is fitted to the "
    "classes of graphs and is no belief about a true edge; its sd is not its uncertainty.",
    "lds": "The probability of a pair is a parameter, chosen so that a classifier on random graphs does well on labels "
    "held out. It is no belief about a true edge, and its sd is not its uncertainty.",
}
Top = Annotated[int, Interval(ge=1, le=1_000_000)]  # pairs that are listed

_OTHER_MEANING = "What the probability of a pair means is for the method to say."


@checked(ResultError)
def edge_marginals(result: Result) -> xr.Dataset:
    """Probability of every candidate pair, and what the data say of pairs and nodes.

    Parameters
    ----------
    result
        Result of a method on graphs, with draws of ``edge_probability`` and ``edge`` (pair,), or their moments in group
        ``marginals``.

    Returns
    -------
    xr.Dataset
        Over pair: ``source``, ``target`` (labels), ``source_node``, ``target_node`` (positions), ``observed``,
        ``probability``; ``probability_sd``, its posterior sd over parameters, nan where only draws of edges tell;
        ``probability_mcse``, its Monte Carlo standard error; where they apply ``count``, how often the pair was seen,
        ``weight``, how many pairs it stands for, ``true``, and in collections ``graph`` (label). Over node:
        ``degree_observed``, and where they apply ``node_class`` (position, -1 where unknown) and ``node_graph``
        (position). Attributes: ``method``, ``meaning``, ``from`` (the site behind the probability), and with known
        edges ``true_edges_missed``, how many are among no candidate.

    Raises
    ------
    ResultError
        If the result holds no edges, or probabilities outside [0, 1].
    """
    constant = result.group("constant_data")
    lost = [name for name in ("pair_source", "pair_target", "pair_observed") if name not in constant]
    if lost:
        raise ResultError(f"constant_data of the result lack {lost}; give the result of a method on graphs")
    out = _nodes(result, constant)
    labels = pd.Index(out["node"].values)
    ends = [constant[name].values for name in ("pair_source", "pair_target")]
    places = [labels.get_indexer(end) if labels.is_unique else np.full(len(end), -1) for end in ends]
    if min(place.min(initial=0) for place in places) < 0:
        raise ResultError("pair_source and pair_target name nodes that coordinate 'node' lacks or has twice")
    seen = constant["pair_observed"].values
    for name, end, place in zip(("source", "target"), ends, places, strict=True):
        out[name], out[f"{name}_node"] = ("pair", end), ("pair", place.astype(np.int64))
    out["observed"] = "pair", seen > 0
    if seen.max(initial=0) > 1:
        out["count"] = "pair", seen
    if "pair_weight" in constant and (constant["pair_weight"].values != 1).any():
        out["weight"] = "pair", constant["pair_weight"].values.astype(float)
    out["degree_observed"] = "node", _incidence(out) @ out["observed"].values.astype(float)
    if "node_graph" in out:
        graph = out["node_graph"].values[out["source_node"].values]
        out["graph"] = "pair", constant["graph"].values[graph] if "graph" in constant.coords else graph
    out.attrs["method"] = str(result.tree.attrs.get("method", "a method"))
    out.attrs["meaning"] = _MEANING.get(out.attrs["method"], _OTHER_MEANING)
    _add_truth(out, constant)
    _add_probability(out, result)
    return out


@checked(DataError)
def summarise_edges(result: Result, *, top: Top = 20, prob: Fraction = 0.9) -> xr.Dataset:
    """Marginals of pairs, degrees of nodes, numbers of the whole graph, and the pairs most worth a look.

    Parameters
    ----------
    result
        Result of a method on graphs.
    top
        How many new and how many doubtful pairs to list.
    prob
        Probability of the intervals.

    Returns
    -------
    xr.Dataset
        What `edge_marginals` returns, and: over node ``degree_mean``, ``degree_lower``, ``degree_upper``; as scalars
        ``num_edges_mean`` and so on, ``mean_degree_*``, and ``homophily_*`` where classes of nodes are known, nan
        bounds where only moments of pairs were kept; over top ``new_pair``, positions of the most probable pairs that
        were not observed, and ``doubtful_pair``, of the least probable ones that were, -1 where there are fewer; of
        methods that classify nodes ``class_probability`` (node, class), the mean over draws, and ``predicted`` (node),
        the position of the most probable class.
        Attributes say what the intervals of ``degree``, ``num_edges`` and ``homophily`` hold.

    Raises
    ------
    ResultError
        As `edge_marginals`.
    DataError
        If an option is out of range.
    """
    out = edge_marginals(result)
    out.attrs["interval_level"] = prob
    bounds = np.array([(1 - prob) / 2, (1 + prob) / 2])
    strength = _strength(out, result)
    _add_degrees(out, strength, bounds)
    _add_totals(out, result, strength, bounds)
    _add_homophily(out, result, strength, bounds)
    _add_classes(out, result)
    probability, observed = out["probability"].values, out["observed"].values
    for name, among, order in (("new", ~observed, -probability), ("doubtful", observed, probability)):
        found = np.flatnonzero(among)
        found = found[np.argsort(order[found], kind="stable")][:top]
        out[f"{name}_pair"] = "top", np.pad(found, (0, top - len(found)), constant_values=-1)
    return out


@dataclass(frozen=True)
class _Strength:
    """How many edges every candidate makes: mean, variance if it were independent, draws where they were kept."""

    mean: NDArray[np.float64]  # (pair,)
    variance: NDArray[np.float64]  # (pair,)
    draws: NDArray[np.floating[Any]] | None  # (pair, draw)


def _nodes(result: Result, constant: xr.Dataset) -> xr.Dataset:
    """Labels, graphs and classes of nodes."""
    if "node" not in constant.sizes:
        raise ResultError("constant_data of the result have no dim 'node'; give the result of a method on graphs")
    label: Any = constant["node"].values if "node" in constant.coords else np.arange(constant.sizes["node"])
    out = xr.Dataset(coords={"node": label})
    if "graph_index" in constant:
        out["node_graph"] = "node", constant["graph_index"].values
    for data in (constant, result.group("observed_data")):
        if "y" in data and data["y"].dims == ("node",) and data["y"].sizes["node"] == len(label):
            out["node_class"] = "node", data["y"].values.astype(np.int64)
            names = data if "class" in data.coords else constant
            if "class" in names.coords:
                out = out.assign_coords({"class": names["class"].values})
    return out


def _add_truth(out: xr.Dataset, constant: xr.Dataset) -> None:
    if "true_source" not in constant or "true_target" not in constant:
        return
    size = out.sizes["node"]

    def numbers(one: NDArray[Any], other: NDArray[Any]) -> NDArray[Any]:
        return np.minimum(one, other).astype(np.int64) * size + np.maximum(one, other)

    pairs = numbers(out["source_node"].values, out["target_node"].values)
    edges = numbers(constant["true_source"].values, constant["true_target"].values)
    out["true"] = "pair", np.isin(pairs, edges)
    out.attrs["true_edges_missed"] = int((~np.isin(edges, pairs)).sum())


def _add_probability(out: xr.Dataset, result: Result) -> None:
    """Mean over draws, its sd and its Monte Carlo error."""
    posterior, marginals = result.posterior, result.group("marginals")
    # With labels, the probability given parameters leaves out what these say, and only draws of edges know it.
    labelled = out.attrs["method"] == "noisy_edges" and "label" in result.group("observed_data")
    names = ("edge",) if labelled else ("edge_probability", "edge")
    name = next((name for name in names if name in posterior or name in marginals), None)
    if name is None:
        raise ResultError(f"the result has neither draws nor moments of {' or '.join(names)}; is it of another method?")
    if name in posterior:
        draws = posterior[name].transpose("chain", "draw", "pair").values
        mean, sd = (
            draws.mean((0, 1), dtype=float),
            draws.std((0, 1), ddof=1 if draws[..., 0].size > 1 else 0, dtype=float),
        )
        error = sd / np.sqrt(draws[..., 0].size)
        if "mcmc" in str(result.tree.attrs.get("engine", "")) and draws.shape[1] >= 4:
            found = convergence(draws)["mcse_mean"]
            error = np.where(np.isfinite(found), found, error)
    else:
        mean, sd = marginals[name].values.astype(float), marginals[f"{name}_sd"].values.astype(float)
        error = sd / np.sqrt(posterior.sizes.get("chain", 1) * posterior.sizes.get("draw", 1))
    if not ((mean > -1e-6) & (mean < 1 + 1e-6)).all():
        raise ResultError(f"{name} has means outside [0, 1], or missing ones; is it a probability?")
    if mean.shape != (out.sizes["pair"],):
        raise ResultError(f"{name} has shape {mean.shape}, but there are {out.sizes['pair']} pairs")
    out["probability"] = "pair", mean.clip(0, 1)
    out["probability_sd"] = "pair", np.full_like(sd, np.nan) if name == "edge" else sd
    out["probability_mcse"] = "pair", error
    out.attrs["from"] = name


def _weight(out: xr.Dataset) -> NDArray[np.float64]:
    return out["weight"].values if "weight" in out else np.ones(out.sizes["pair"])


def _incidence(out: xr.Dataset) -> csr_matrix:
    """Ones (node, pair) at the two ends of every pair."""
    ends = np.concatenate([out["source_node"].values, out["target_node"].values])
    pairs = np.tile(np.arange(out.sizes["pair"]), 2)
    return csr_matrix((np.ones(len(ends), np.float32), (ends, pairs)), (out.sizes["node"], out.sizes["pair"]))


def _strength(out: xr.Dataset, result: Result) -> _Strength:
    mean, weight, posterior = out["probability"].values, _weight(out), result.posterior
    draws = None
    if "edge" in posterior:
        edge = posterior["edge"].transpose("pair", "chain", "draw").values.reshape(len(mean), -1)
        draws = edge
        if (weight != 1).any():
            chance: Any = mean[:, None]
            if out.attrs["from"] == "edge_probability":
                chance = posterior["edge_probability"].transpose("pair", "chain", "draw").values.reshape(edge.shape)
            draws = weight[:, None] * chance + np.sqrt(weight)[:, None] * (edge - chance)
    return _Strength(weight * mean, weight * mean * (1 - mean), draws)


def _add_degrees(out: xr.Dataset, strength: _Strength, bounds: NDArray[np.float64]) -> None:
    incidence = _incidence(out)
    mean = incidence @ strength.mean
    if strength.draws is not None:
        step = max(1, _BLOCK // strength.draws.shape[1])
        blocks = range(0, len(mean), step)
        found = [np.quantile(incidence[start : start + step] @ strength.draws, bounds, axis=1) for start in blocks]
        low, high = np.concatenate(found, axis=1)
        text = "Intervals of degrees are those of the degree itself, from draws of edges."
    else:
        half = norm.ppf(bounds[1]) * np.sqrt(incidence @ strength.variance)
        low, high = np.maximum(mean - half, 0), mean + half
        text = (
            "Draws of edges were too many to keep. Means of degrees are exact averages over draws; their intervals are "
            "normal and take pairs as independent, which makes them too narrow where pairs share parameters."
        )
    for name, value in (("mean", mean), ("lower", low), ("upper", high)):
        out[f"degree_{name}"] = "node", value
    if "weight" in out:
        text += " Pairs drawn at random stand for others, so that degrees of single nodes carry the noise of that draw."
    out.attrs["degree"] = text


def _add_interval(out: xr.Dataset, name: str, draws: NDArray[Any], bounds: NDArray[np.float64]) -> None:
    low, high = np.quantile(draws, bounds)
    out[f"{name}_mean"], out[f"{name}_lower"], out[f"{name}_upper"] = float(np.mean(draws)), low, high


def _add_totals(out: xr.Dataset, result: Result, strength: _Strength, bounds: NDArray[np.float64]) -> None:
    """Number of edges and mean degree, as the method counts them where it does."""
    posterior, per_node = result.posterior, 2 / out.sizes["node"]
    inside = float(strength.mean.sum())
    if "num_edges" in posterior:
        total = posterior["num_edges"].values.astype(float)
        text = "The number of edges is the method's own, draw by draw."
        if out.attrs["method"] == "noisy_edges" and out.attrs["from"] == "edge_probability":
            text = (
                "The number of edges is the expected one given the parameters; its interval is that of the parameters."
            )
        # Others count candidates alone, where a difference is the chance of few draws.
        outside = float(total.mean()) - inside if out.attrs["method"] == "noisy_edges" else 0.0
        if outside > max(_PRECISE * inside, 4 * float(total.std()) / np.sqrt(total.size)):
            text += f" {outside:.1f} of them lie among pairs that are no candidates, and count to no node's degree."
    elif strength.draws is not None:
        total, text = strength.draws.sum(0), "The number of edges is that of draws of edges."
    else:
        half = float(norm.ppf(bounds[1]) * np.sqrt(strength.variance.sum()))
        out["num_edges_mean"], out["num_edges_upper"] = inside, inside + half
        out["num_edges_lower"] = max(inside - half, 0.0)
        text = "The interval of the number of edges takes pairs as independent."
        for name in ("mean", "lower", "upper"):
            out[f"mean_degree_{name}"] = per_node * out[f"num_edges_{name}"]
        out.attrs["num_edges"] = text
        return
    _add_interval(out, "num_edges", total, bounds)
    degree = posterior["mean_degree"].values.astype(float) if "mean_degree" in posterior else per_node * total
    _add_interval(out, "mean_degree", degree, bounds)
    out.attrs["num_edges"] = text


def _add_homophily(out: xr.Dataset, result: Result, strength: _Strength, bounds: NDArray[np.float64]) -> None:
    if "node_class" not in out or (out["node_class"] < 0).all():
        return
    one, other = (out["node_class"].values[out[f"{end}_node"].values] for end in ("source", "target"))
    known, same = (one >= 0) & (other >= 0), (one >= 0) & (one == other)
    unknown = int((out["node_class"] < 0).sum())
    text = "Homophily is the share of edges that join nodes of one class, by all classes in the data, of test nodes too"
    if unknown:
        text += f"; {unknown:,} of {out.sizes['node']:,} nodes have none, and edges at these are left out"
    # Some methods have a homophily of predicted classes; that of noisy edges is of known ones, and of all pairs.
    if not unknown and out.attrs["method"] == "noisy_edges" and "homophily" in result.posterior:
        _add_interval(out, "homophily", result.posterior["homophily"].values.astype(float), bounds)
    elif strength.draws is not None:
        total = strength.draws[known].sum(0, dtype=float)
        if not (total > 0).any():
            return
        share = strength.draws[same].sum(0, dtype=float)[total > 0] / total[total > 0]
        _add_interval(out, "homophily", share, bounds)
        text += "; draws without an edge do not count" * bool((total <= 0).any())
    else:
        total = float(strength.mean[known].sum())
        if not total:
            return
        out["homophily_mean"] = float(strength.mean[same].sum() / total)
        out["homophily_lower"] = out["homophily_upper"] = np.nan
        text += "; it is the ratio of expected numbers, as draws of edges were not kept"
    observed = out["observed"].values
    if (observed & known).any():
        out["homophily_observed"] = float((observed & same).sum() / (observed & known).sum())
    out.attrs["homophily"] = f"{text}."


def _add_classes(out: xr.Dataset, result: Result) -> None:
    """Classes of nodes as the method predicts them, where it does."""
    name, constant = "class_probability", result.group("constant_data")
    if "split" in constant and constant["split"].dims == ("node",):
        out["split"] = "node", constant["split"].values.astype(np.str_)
    for group in (result.posterior, result.group("marginals")):
        if name in group and {"node", "class"} <= set(group[name].dims):
            others = [dim for dim in ("chain", "draw") if dim in group[name].dims]
            mean = group[name].mean(others, dtype=float).transpose("node", "class").values
            out[name], out["predicted"] = (("node", "class"), mean), ("node", mean.argmax(1))
