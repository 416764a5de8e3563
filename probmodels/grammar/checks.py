"""Whether a policy that draws trees fits their posterior, by the exact probability of every sentence."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import xarray as xr

from probmodels.grammar.model import exact_log_likelihood
from probmodels.inference.diagnostics.findings import Finding
from probmodels.inference.diagnostics.guides import judge_evidence
from probmodels.inference.result import Result

__all__ = ["check_draws"]

_LABELS = 40  # nonterminals and preterminals up to which exact sums take seconds


def check_draws(result: Result) -> Iterator[Finding]:
    """Findings on the policy by the exact probability of sentences, summed over trees by the inside algorithm."""
    problem = result.rebuild()
    stats: xr.Dataset = result.sample_stats
    options = problem.options
    labels = int(options.get("num_nonterminals", 0)) + int(options.get("num_preterminals", 0))
    if "log_weight_by_row" not in stats or labels > _LABELS:
        return
    yield from judge_evidence(result.tree, np.asarray(exact_log_likelihood(problem, result).values, dtype=np.float64))
