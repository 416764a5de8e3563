"""Structural equation models under an acyclicity constraint: recovered graphs, knowledge, outputs, bad options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from probmodels import Result, fit_svi, run_mcmc
from probmodels.acyclic_sem import fitted_edges, make_problem, tiny, write_outputs
from probmodels.causal_graph import tiny as other_tiny
from probmodels.errors import DataError, ProblemError, ResultError
from probmodels.guides.acyclicity import is_dag, trace_exponential


def linear_table(seed: int = 0) -> tuple[pd.DataFrame, np.ndarray]:
    generator = np.random.default_rng(seed)
    weights = np.array([[0, 0, 0, 0], [1.2, 0, 0, 0], [0, -1.0, 0, 0], [0.9, 0, 1.5, 0]])  # d -> a, d -> c -> b -> a
    values = generator.standard_normal((500, 4))
    for node in (2, 1, 0):
        values[:, node] += values @ weights[:, node]
    return pd.DataFrame(values, columns=list("abcd")), (weights != 0).astype(float)


def bent(num: int, seed: int = 0) -> pd.DataFrame:
    """A common cause, a curved effect of it, and an effect of both."""
    generator = np.random.default_rng(seed)
    cause, first, second = generator.standard_normal((3, num))
    middle = cause**2 + 0.5 * first
    return pd.DataFrame({"cause": cause, "middle": middle, "last": np.tanh(2 * cause) * middle + 0.5 * second})


@pytest.mark.parametrize(
    ("constraint", "start", "mechanism"),
    [("notears", "zero", "linear"), ("dagma", "random", "linear"), ("dagma", "superset", "linear")],
)
def test_graphs_of_equal_variances_are_recovered(constraint: str, start: str, mechanism: str) -> None:
    data, truth = linear_table()
    problem = make_problem(data, constraint=constraint, start=start, mechanism=mechanism, standardise=False)
    result = fit_svi(problem, num_steps=1500, lr=0.02, num_samples=2, progress=False)
    np.testing.assert_array_equal(result.posterior["graph"].values[0, 0], truth)
    strength = result.params()["first"].squeeze(-1).fill_diagonal_(0)
    assert float(trace_exponential(strength.square())) < 0.05  # 7 rounds of multipliers; about 1e-4 after 15


def test_networks_obey_knowledge() -> None:
    problem = make_problem(bent(150), required=[("last", "cause")], forbidden=[("cause", "middle")], hidden=4)
    result = fit_svi(problem, num_steps=300, lr=0.02, num_samples=2, progress=False)
    graph = result.posterior["graph"].isel(chain=0, draw=0)
    assert is_dag(graph.values)
    assert graph.sel(cause="last", effect="cause") == 1
    assert graph.sel(cause="cause", effect="middle") == 0
    with pytest.raises(ProblemError, match="no continuous latent site"):
        run_mcmc(problem, num_samples=2, warmup_steps=0, num_chains=1, chain_method="sequential", progress=False)


def test_outputs_tell_edges_by_strength_beside_the_truth(tmp_path: Path) -> None:
    table, truth = linear_table()
    labels = xr.DataArray(table.to_numpy(), dims=("data", "concept"), coords={"concept": list("abcd")})
    data = xr.Dataset({"label": labels, "graph": (("cause", "effect"), truth)})
    problem = make_problem(data, mechanism="linear", standardise=False)
    fit_svi(problem, num_steps=1000, lr=0.02, num_samples=2, progress=False).save(tmp_path / "result")
    result = Result.load(tmp_path / "result")
    out = write_outputs(result, tmp_path)
    assert "c -> b" in out.table
    assert {"edges.csv", "summary.txt", "figures"} <= {path.name for path in tmp_path.iterdir()}
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"graph.png", "loss.png"}
    edges = pd.read_csv(tmp_path / "edges.csv")
    assert list(edges.columns) == ["cause", "effect", "strength", "true"]
    assert tuple(edges.iloc[0, :2]) == ("d", "c")  # of weight 1.5
    assert edges["strength"].iloc[0] == pytest.approx(abs(float(result.params()["first"][3, 2])), rel=1e-4)
    assert edges["strength"].is_monotonic_decreasing
    assert edges["true"].all()


def test_results_of_other_methods_are_refused() -> None:
    result = run_mcmc(
        other_tiny(), num_samples=2, warmup_steps=0, num_chains=1, chain_method="sequential", progress=False
    )
    with pytest.raises(ResultError, match="the result is of 'causal_graph'"):
        fitted_edges(result)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"constraint": "dagmar"}, "constraint='dagmar'; choose one of notears, dagma; did you mean 'dagma'"),
        ({"sparsity": -0.1}, "sparsity=-0.1"),
        ({"mechanism": "linear", "hidden": 4}, "hidden=4 is not used with mechanism='linear'"),
        ({"required": [("cause", "last"), ("last", "cause")]}, "cause -> last -> cause"),
        ({"edge_probability": 0.2}, "unknown option 'edge_probability'"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        make_problem(bent(40), **options)


def test_tiny_is_deterministic() -> None:
    assert tiny().model.violation() == tiny().model.violation()


# -- verdicts ---------------------------------------------------------------------------------------------------------


def fit(table: pd.DataFrame, *, steps: int = 1500, **options: Any) -> Result:
    return fit_svi(make_problem(table, **options), num_steps=steps, lr=0.02, num_samples=2, progress=False)


def test_a_right_graph_passes_as_a_point_estimate() -> None:
    report = fit(linear_table()[0], mechanism="linear", standardise=False).diagnose()
    assert report.ok, str(report)
    assert report.model == "passed"
    assert "one graph of 4 edges, a point estimate" in str(report)


def test_other_variances_than_the_loss_assumes_fail() -> None:
    report = fit(linear_table()[0], mechanism="linear").diagnose()  # standardised: variances decide directions
    assert report.inference == "passed"
    assert report.model == "failed"
    assert "the model has 1 for all" in str(report)


def test_a_graph_that_was_cut_out_of_cycles_fails() -> None:
    report = fit(linear_table()[0], steps=100, mechanism="linear", standardise=False).diagnose()
    assert report.inference == "failed"
    assert "taken out to break cycles" in str(report)


def test_dependent_residuals_fail() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal(600)
    table = pd.DataFrame({"x": x, "y": x + x**2 + rng.standard_normal(600)})
    report = fit(table, mechanism="linear", standardise=False).diagnose()
    assert report.model == "failed"
    assert "residuals of x and y depend" in str(report)
