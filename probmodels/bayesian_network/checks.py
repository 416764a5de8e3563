"""Whether a guide fits the posterior over graphs, by the exact evidence where all graphs can be listed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from probmodels.bayesian_network.graphs import AcyclicGraphs
from probmodels.inference.diagnostics.findings import Finding
from probmodels.inference.diagnostics.guides import judge_evidence
from probmodels.inference.result import Result

__all__ = ["check_draws"]


def check_draws(result: Result) -> Iterator[Finding]:
    """Findings on the guide by the exact evidence, a sum over all graphs of up to five variables."""
    model: Any = result.rebuild().model
    prior = AcyclicGraphs(model.num_nodes, model.edge_probability, model.max_parents)
    if not prior.has_enumerate_support:
        return
    with torch.no_grad():
        graphs = prior.enumerate_support().to(model.scores)
        evidence = (prior.log_prob(graphs).double() + model.log_likelihood(graphs).double()).logsumexp(0)
    yield from judge_evidence(result.tree, evidence.numpy())
