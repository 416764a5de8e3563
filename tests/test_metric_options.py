"""Every argument of metrics and of statistics of draws, given values that are wrong for most."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from wrong_values import WRONG

from probmodels.errors import DataError, DiagnosticsError, ImportanceError, ProblemError, ProbmodelsError
from probmodels.inference.diagnostics.convergence import bfmi, convergence, hdi, psis, psis_khat
from probmodels.inference.diagnostics.importance import importance_moments
from probmodels.inference.metrics.dependence import characteristic_matrix, mic, tic
from probmodels.inference.metrics.fidelity import fidelity, fidelity_table
from probmodels.inference.metrics.graphs import (
    calibration_table,
    cpdag,
    edge_auroc,
    edge_average_precision,
    edge_calibration,
    edge_scores,
    shd,
    shd_cpdag,
    structural_intervention_distance,
)
from probmodels.inference.metrics.latents import dci, match_latents, r_squared
from probmodels.inference.metrics.samples import (
    classifier_two_sample,
    compare_samples,
    energy_distance,
    mmd,
    permutation_pvalues,
    sliced_wasserstein,
    wasserstein,
)
from probmodels.options import options_of

RNG = np.random.default_rng(0)
DRAWS, X, Y = RNG.normal(size=(4, 30)), RNG.normal(size=(30, 2)), RNG.normal(size=(30, 2))
GRAPH, CHANCE = np.array([[0, 1], [0, 0]]), np.array([[0, 0.7], [0.2, 0]])
SETS, GRAPHS = {"x": X, "y": Y}, {"truth": GRAPH, "estimate": GRAPH}
EDGES = {"truth": GRAPH, "probability": CHANCE}
LATENTS, PAIRS = {"latents": X, "concepts": Y}, {"x": X[:, 0], "y": X[:, 1]}
SEED, GRIDS = {"seed": {"zero"}}, {"equipartition": {"true"}}
REPORT = fidelity(X, Y, DRAWS.reshape(60, 2), num_permutations=19)
BANDWIDTH = {"bandwidth": {"list", "none"}}


@dataclass(frozen=True)
class Case:
    """A function, what it raises, good arguments, and by argument the names of the `WRONG` that it takes."""

    function: Callable[..., Any]
    error: tuple[type[ProbmodelsError], ...]
    arguments: Mapping[str, Any]
    accepted: Mapping[str, set[str]] = field(default_factory=dict)


CASES = [
    Case(convergence, (DiagnosticsError,), {"draws": DRAWS}),
    Case(hdi, (DiagnosticsError,), {"draws": DRAWS, "prob": 0.5}),
    Case(bfmi, (DiagnosticsError,), {"energy": DRAWS}),
    Case(psis, (DiagnosticsError,), {"log_weight": DRAWS[0]}, {"log_weight": {"list", "empty list"}}),
    Case(psis_khat, (DiagnosticsError,), {"log_weight": DRAWS[0]}, {"log_weight": {"list", "empty list"}}),
    Case(importance_moments, (ImportanceError,), {"draws": X, "log_weight": np.full(30, -np.log(30))}),
    Case(energy_distance, (DiagnosticsError,), SETS),
    Case(mmd, (DiagnosticsError,), SETS, BANDWIDTH),
    Case(sliced_wasserstein, (DiagnosticsError,), SETS, SEED),
    Case(wasserstein, (DiagnosticsError,), SETS),
    Case(classifier_two_sample, (DiagnosticsError,), SETS, SEED | {"classifier": {"none"}}),
    Case(permutation_pvalues, (DiagnosticsError,), SETS | {"num_permutations": 9}, SEED | BANDWIDTH),
    Case(
        compare_samples,
        (DiagnosticsError,),
        {"x": X, "reference": Y, "metrics": ["mmd", "sliced_wasserstein"], "num_permutations": 9},
        SEED | BANDWIDTH | {"floor": {"none"}, "num_permutations": {"none"}},
    ),
    Case(
        fidelity,
        (DiagnosticsError,),
        {"synthetic": X, "train": Y, "held_out": DRAWS.reshape(60, 2), "num_permutations": 19},
        SEED
        | {name: {"none"} for name in ("synthetic_label", "train_label", "held_out_label", "classifier", "neighbours")},
    ),
    Case(fidelity_table, (DiagnosticsError,), {"report": REPORT}),
    Case(r_squared, (ProblemError,), LATENTS, SEED),
    Case(match_latents, (ProblemError,), LATENTS, {"ranks": {"true"}}),
    Case(dci, (ProblemError,), LATENTS | {"regressor": "lasso"}, SEED),
    Case(mic, (ProblemError,), PAIRS, GRIDS),
    Case(tic, (ProblemError,), PAIRS, GRIDS | {"normalised": {"true"}}),
    Case(characteristic_matrix, (ProblemError,), PAIRS, GRIDS),
    Case(shd, (ProblemError,), GRAPHS),
    Case(shd_cpdag, (ProblemError,), GRAPHS),
    Case(edge_scores, (ProblemError,), GRAPHS, {"skeleton": {"true"}}),
    Case(edge_auroc, (ProblemError,), EDGES),
    Case(edge_average_precision, (ProblemError,), EDGES),
    Case(edge_calibration, (ProblemError, DataError), EDGES),
    Case(calibration_table, (DataError,), {"probability": CHANCE[~np.eye(2, dtype=bool)], "truth": np.array([1, 0])}),
    Case(cpdag, (ProblemError,), {"graph": GRAPH}),
    Case(structural_intervention_distance, (ProblemError,), GRAPHS),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.function.__name__)
def test_every_value_is_refused_or_works(case: Case) -> None:
    case.function(**case.arguments)
    for option in options_of(case.function):
        for kind, value in WRONG.items():
            given = {**case.arguments, option: value}
            if kind in case.accepted.get(option, ()):
                case.function(**given)
                continue
            with pytest.raises(case.error):
                pytest.fail(f"{option}={value!r} gave {case.function(**given)}")


def test_sizes_that_no_memory_holds_are_refused_at_once() -> None:
    with pytest.raises(DiagnosticsError, match="num_permutations=1000000000; give a whole number of at least 1"):
        permutation_pvalues(X, Y, num_permutations=10**9)
    with pytest.raises(DataError, match="bins=1000000000; give a whole number of at least 1"):
        edge_calibration(GRAPH, CHANCE, bins=10**9)
    with pytest.raises(ImportanceError, match=r"draws of shape \(4, 30\) and log_weight of shape \(30,\)"):
        importance_moments(DRAWS, DRAWS[0])
