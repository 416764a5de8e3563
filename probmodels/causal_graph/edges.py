"""Probabilities of edges without draws, and whether what the mechanisms leave unexplained casts doubt on them."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np
import xarray as xr

from probmodels.causal_graph.model import CausalGraph, make_problem
from probmodels.causal_graph.residuals import ResidualTests, residual_tests
from probmodels.causal_graph.scores import KERNELS
from probmodels.errors import ProblemError, ResultError
from probmodels.inference.labels import group_of, read_json
from probmodels.inference.problem import Problem
from probmodels.inference.result import Result
from probmodels.options import checked, options_of

__all__ = ["DEPENDENT", "NOT_NORMAL", "SERIAL", "Examined", "check_edges", "edge_probabilities", "examine"]

DEPENDENT, SERIAL = 0.04, 0.005  # tail probabilities that cast doubt
NOT_NORMAL = 5.0  # log Bayes factor against noise that is said to be normal
_DRAWS = 200  # of the posterior, of which the most probable is examined
_AXES = ["cause", "effect"]


class Examined(NamedTuple):
    """Residuals under the most probable graph that was drawn.

    Attributes
    ----------
    tests
        What the residuals show.
    names
        Names of the concepts.
    probability
        Of every edge (cause, effect).
    normal
        Whether the model takes noise to be normal.
    rows
        Number of rows.
    """

    tests: ResidualTests
    names: list[str]
    probability: np.ndarray
    normal: bool
    rows: int

    @property
    def doubtful(self) -> np.ndarray:
        """Pairs of concepts whose edges cannot be trusted (concept, concept)."""
        found = self.tests.pairs <= DEPENDENT
        if self.tests.serial < SERIAL:
            found[:] = True
        if self.normal:
            shaped = self.tests.gain > NOT_NORMAL
            found |= shaped[:, None] | shaped
        return found & ~np.eye(len(found), dtype=bool)


def examine(source: Result | Problem) -> Examined:
    """Residuals under the most probable graph of a problem or a result.

    Raises
    ------
    ResultError
        If a result has no draws of graphs or does not keep its data.
    ProblemError
        If a problem has no posterior over graphs.
    """
    if isinstance(source, Problem):
        model = source.model
        if not isinstance(model, CausalGraph):
            raise ProblemError(f"{source.name}: there is no posterior over graphs")
        rng = np.random.default_rng(0)
        graph = max((model.posterior.draw(rng) for _ in range(_DRAWS)), key=model.posterior.log_probability)
        probability = model.posterior.edge_probability()
        data, given = xr.Dataset() if source.data is None else source.data, dict(source.options)
    else:
        graph, probability = _of_draws(source)
        data, given = group_of(source.tree, "constant_data"), read_json(source.tree.attrs, "options", {})
    if "label" not in data:
        raise ResultError("the labels of the concepts were not kept; make problem and result again")
    labels = data["label"].transpose("data", "concept")
    options: Any = {name: option.default for name, option in options_of(make_problem, skip=1).items()} | given
    tests = residual_tests(
        labels.values.astype(np.float64),
        graph,
        kernels=KERNELS if options["mechanism"] == "any" else ("linear",),
        num_points=options["num_points"],
        floors=options["floors"],
        seed=options["seed"],
    )
    names = [str(name) for name in labels["concept"].values]
    return Examined(tests, names, probability, options["noise"] == "normal", len(labels))


@checked(ResultError)
def check_edges(source: Result | Problem) -> xr.Dataset:
    """Test whether residuals cast doubt on the edges: whether they depend on causes, on each other, on the row before.

    Parameters
    ----------
    source
        A problem of `make_problem`, or a result of it.

    Returns
    -------
    xr.Dataset
        Over (cause, effect): ``edge_probability``; ``tail_probability`` of the dependence that residuals of the pair
        show, in view of all pairs that were compared; and ``doubtful``, whether an edge of the pair, in either
        direction, cannot be trusted. Over concept: ``lag_correlation``, that of residuals of neighbouring rows.
        Attributes ``tail_probability``, the least, and ``serial_tail_probability``.

    Raises
    ------
    ResultError
        If a result has no draws of graphs or does not keep its data.
    ProblemError
        If a problem has no posterior over graphs.
    """
    found = examine(source)
    tests = found.tests
    return xr.Dataset(
        {
            "edge_probability": (_AXES, found.probability),
            "tail_probability": (_AXES, tests.pairs),
            "doubtful": (_AXES, found.doubtful),
            "lag_correlation": ("concept", tests.lag),
        },
        coords=dict.fromkeys([*_AXES, "concept"], found.names),
        attrs={"tail_probability": tests.dependence, "serial_tail_probability": tests.serial},
    )


@checked(ProblemError)
def edge_probabilities(problem: Problem) -> xr.DataArray:
    """Exact posterior probabilities of edges, without draws.

    Warns where residuals show that the model does not fit the data, see `check_edges`.

    Returns
    -------
    xr.DataArray
        (cause, effect), with the coordinate ``doubtful``: whether an edge of the pair cannot be trusted.

    Raises
    ------
    ProblemError
        If the problem has no posterior over graphs.
    """
    found = examine(problem)
    doubtful = found.doubtful
    if doubtful.any():
        pairs = [f"{found.names[i]} - {found.names[j]}" for i, j in np.argwhere(np.triu(doubtful))]
        warnings.warn(
            f"the model does not fit the data: what the graph leaves unexplained casts doubt on {', '.join(pairs[:5])}"
            f"{f' and {len(pairs) - 5} more pairs' * (len(pairs) > 5)}, however close to 0 or 1 probabilities are; "
            "diagnose a result for why, or see check_edges",
            stacklevel=3,
        )
    coords = {axis: problem.coords[axis] for axis in _AXES}
    return xr.DataArray(found.probability, dims=_AXES, coords=coords | {"doubtful": (_AXES, doubtful)})


def _of_draws(result: Result) -> tuple[np.ndarray, np.ndarray]:
    """The most probable graph among the draws, or the most frequent one, and frequencies of edges."""
    if "graph" not in result.posterior or set(result.posterior["graph"].dims) != {"chain", "draw", *_AXES}:
        raise ResultError("there are no draws of 'graph' (cause, effect); give a result of probmodels.causal_graph")
    draws = result.posterior["graph"].transpose("chain", "draw", *_AXES).values
    draws = draws.reshape(-1, *draws.shape[2:]) > 0.5
    if "lp" in result.sample_stats:
        return draws[result.sample_stats["lp"].transpose("chain", "draw").values.argmax()], draws.mean(0)
    graphs, counts = np.unique(draws, axis=0, return_counts=True)
    return graphs[counts.argmax()], draws.mean(0)
