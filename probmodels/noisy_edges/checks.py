"""Whether the model of noisy edges fits the graph that was seen: degrees and triangles of new graphs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from probmodels.inference.diagnostics.findings import Finding
from probmodels.inference.result import Result
from probmodels.inference.runtime.ops import isolated
from probmodels.noisy_edges.channel import NoisyCount
from probmodels.noisy_edges.model import prior_logits

__all__ = ["check_model"]

_GRAPHS = 200  # new ones, that all lie to one side of the observed one with a probability of one in a hundred


def check_model(result: Result) -> Iterator[Finding]:
    """Findings on the variance of degrees and the number of triangles, against graphs of posterior predictive draws.

    Given the parameters, the model has independent edges. Hubs that it has no propensities for, and neighbours of a
    node that are neighbours of each other, are outside of it. Only graphs all of whose pairs are candidates are judged.
    """
    problem = result.rebuild()
    data, prior = problem.args
    if data.rest is not None or bool((data.weight != 1).any()):
        return
    names = [name for name in problem.names("latent") if name in result.posterior and name != "edge"]
    draws = {name: result[name].stack(all=("chain", "draw")).transpose("all", ...).values for name in names}
    count = len(draws["deletion"])
    edges = data.edges.source.numpy(), data.edges.target.numpy()
    found = []
    with isolated(0), torch.no_grad():
        for place in np.linspace(0, count - 1, _GRAPHS).astype(int):
            values = {name: torch.as_tensor(value[place]).to(data.weight) for name, value in draws.items()}
            addition = values["addition_ratio"] * (1 - values["deletion"])
            channel: Any = NoisyCount(prior_logits(data, prior, values), values["deletion"], addition, data.trials)
            found.append(_figures(edges, channel.sample().numpy() > 0, data.edges.num_nodes))
    observed = _figures(edges, data.seen.numpy() > 0, data.edges.num_nodes)
    told = {
        "variance of degrees": "nodes differ in more than the model knows: take propensity=True",
        "number of triangles": "edges depend on each other, which the model does not know: read probabilities as rough",
    }
    for (name, advice), value, draw in zip(told.items(), observed, np.array(found).T, strict=True):
        low, high = draw.min(), draw.max()
        bad = not low <= value <= high
        verdict = (
            f"the {name} of the graph that was seen is {value:.4g}; {_GRAPHS} graphs of the model have {low:.4g} to "
        )
        yield Finding(bad, f"{verdict}{high:.4g}", advice if bad else "", part="model")


def _figures(
    edges: tuple[NDArray[np.int64], NDArray[np.int64]], seen: NDArray[np.bool_], num_nodes: int
) -> tuple[float, float]:
    """Variance of the degrees of nodes, and number of triangles."""
    one, other = edges[0][seen], edges[1][seen]
    shape = (num_nodes, num_nodes)
    half = csr_matrix((np.ones(len(one)), (one, other)), shape)
    matrix = half + half.T
    degree = np.asarray(matrix.sum(1)).ravel()
    return float(degree.var()), float((matrix @ matrix).multiply(half).sum() / 3)
