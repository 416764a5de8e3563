"""Bayesian networks of unknown structure: which variables depend directly on which, with probabilities.

Generative model, for variables j = 1..n with parents P_j in a directed acyclic graph::

    graph ~ AcyclicGraphs,  each edge with odds p / (1 - p) but for the ban on cycles
    x_j | x_P_j ~ Normal or Categorical,  parameters integrated out

The likelihood is a sum over nodes of the score of their parents, BGe or BDeu, read from a table of all sets of parents:
see `probmodels.bayesian_network.scores`. Data tell graphs apart only up to the independences that they say, so that
directions of edges are often uncertain however many rows there are.

The guide, `probmodels.guides.bayesian_network`, draws graphs pair by pair and knows their density.

References
----------
Deleu, T., Góis, A., Emezue, C., Rankawat, M., Lacoste-Julien, S., Bauer, S. and Bengio, Y. (2022). Bayesian structure
learning with generative flow networks. UAI. https://arxiv.org/abs/2202.13903
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
import pyro
import torch
import xarray as xr
from annotated_types import Interval
from numpy.typing import NDArray
from pyro.nn import PyroModule
from torch import Tensor

from probmodels.bayesian_network.graphs import AcyclicGraphs
from probmodels.bayesian_network.scores import bdeu, best_score, bge, parent_scores
from probmodels.datasets.bayesian_networks import simulate_gaussian_network
from probmodels.datasets.labelled import arranged
from probmodels.errors import DataError
from probmodels.guides.bayesian_network import EdgePolicy
from probmodels.inference.flows.balance import ParallelVarGrad
from probmodels.inference.problem import Problem
from probmodels.options import Count, Fraction, Natural, Positive, Seed, checked, refuse_unused

__all__ = ["ENGINES", "REFERENCE", "BayesianNetwork", "Rising", "make_problem", "tiny"]

REFERENCE = "Deleu et al. (2022), https://arxiv.org/abs/2202.13903"
ENGINES = ("svi",)

_MOST_NODES = 12  # 24,576 sets of parents
_NEGLIGIBLE = 30.0  # of log probabilities
_MOST_STATES = 50  # of a discrete variable


@dataclass(frozen=True)
class Rising:
    """A power that rises to 1 in so many steps."""

    steps: int

    def __call__(self, step: int) -> float:
        """Power at a step, counted from 0."""
        return min(1.0, (step + 1) / self.steps)


class BayesianNetwork(PyroModule):
    """The model.

    Parameters
    ----------
    scores
        Log marginal likelihood of every node given every set of its parents (node, set), as `parent_scores` has it.
    edge_probability, max_parents
        Hyperparameters of the prior, see `AcyclicGraphs`.
    """

    scores: Tensor
    empty: Tensor
    first: Tensor
    place: Tensor

    def __init__(self, scores: Tensor, *, edge_probability: float = 0.5, max_parents: int | None = None) -> None:
        super().__init__()
        self.num_nodes, self.edge_probability, self.max_parents = len(scores), edge_probability, max_parents
        # Differences are what matters: of numbers that are small they are precise.
        self.register_buffer("empty", scores[:, 0].sum().clone())
        self.register_buffer("scores", (scores - scores[:, :1]).flatten().to(torch.get_default_dtype()))
        node = torch.arange(self.num_nodes)
        self.register_buffer("first", node << self.num_nodes)
        self.register_buffer("place", 2.0**node)

    def forward(self) -> None:
        """Site ``graph`` (parent, child) and the factor ``score``."""
        prior = AcyclicGraphs(self.num_nodes, self.edge_probability, self.max_parents)
        named: Any = {"event_dims": ["parent", "child"]}
        graph = pyro.sample("graph", prior, infer=named)
        pyro.factor("score", self.log_likelihood(graph))

    def log_likelihood(self, graph: Tensor) -> Tensor:
        """Log marginal likelihood (...) of graphs (..., parent, child)."""
        sets = (graph.mT.to(self.place) @ self.place).long()
        found: Tensor = self.scores[sets + self.first].sum(-1) + self.empty.to(self.scores)
        return found


@checked(DataError, keep=True)
def make_problem(
    data: xr.Dataset | xr.DataArray | pd.DataFrame,
    *,
    score: Literal["bge", "bdeu"] = "bge",
    edge_probability: Fraction = 0.5,
    max_parents: Count | None = None,
    standardise: bool = True,
    mean_weight: Positive = 1.0,
    extra_degrees: Annotated[float, Interval(gt=1, le=1e6)] = 2.0,
    sample_size: Annotated[float, Interval(gt=0, le=1e6)] = 1.0,
    hidden: Annotated[int, Interval(ge=1, le=4096)] = 64,
    num_particles: Annotated[int, Interval(ge=2, le=1_000_000)] = 64,
    epsilon: Annotated[float, Interval(ge=0, lt=1)] = 0.05,
    anneal: Natural = 1000,
    seed: Seed = 0,
) -> Problem:
    """A Bayesian network of the columns of a table.

    Parameters
    ----------
    data
        Rows are samples, columns variables: a frame, an array (sample, variable), or a data set with such an array
        ``x`` and, where variables are discrete, ``num_states`` (variable,).
    score
        ``"bge"`` for continuous variables, ``"bdeu"`` for discrete ones.
    edge_probability
        Probability of an edge in the prior, but for the ban on cycles; 0.5 makes all graphs equally probable, smaller
        values prefer fewer edges.
    max_parents
        Most parents of a node; None for any number.
    standardise
        Whether continuous variables are brought to mean 0 and standard deviation 1, as the prior of ``"bge"`` has them.
    mean_weight, extra_degrees
        Hyperparameters of ``"bge"``, see `probmodels.bayesian_network.scores.bge`.
    sample_size
        Equivalent sample size of ``"bdeu"``, see `probmodels.bayesian_network.scores.bdeu`.
    hidden
        Width of the guide's hidden layers.
    num_particles
        Number of graphs in each step.
    epsilon
        Share of actions that are drawn uniformly while the guide is fitted.
    anneal
        Steps in which the power of the posterior that the guide is fitted to rises to 1; 0 for none. With many rows
        few graphs are probable, and a guide may find some of them only.
    seed
        Seed of the guide's starting values.

    Returns
    -------
    Problem
        For `fit_svi`.

    Raises
    ------
    DataError
        If the table is no such table, has missing or constant columns, too many of them or too few rows, or an option
        is out of range or not used with this score.
    """
    if score == "bge":
        refuse_unused(make_problem, "score='bge'", sample_size=sample_size)
    else:
        unused = {"standardise": standardise, "mean_weight": mean_weight, "extra_degrees": extra_degrees}
        refuse_unused(make_problem, "score='bdeu'", **unused)
    table = _table(data)
    names: Any = table["variable"].values
    rows: Any = table["sample"].values
    if score == "bge":
        x = _numbers(table)
        kept: dict[str, Any] = {"x": (("sample", "variable"), x)}
        x = (x - x.mean(0)) / x.std(0) if standardise else x
        of_sets = bge(x, mean_weight=mean_weight, extra_degrees=extra_degrees)
    else:
        states, counts = _states(table, data.get("num_states") if isinstance(data, xr.Dataset) else None)
        of_sets = bdeu(states, counts, sample_size=sample_size)
        kept = {"x": (("sample", "variable"), states), "num_states": ("variable", counts)}
    scores = parent_scores(of_sets)
    weights = _weights(scores, edge_probability, max_parents)
    guide = EdgePolicy(torch.as_tensor(weights), hidden=hidden, seed=seed)
    # Graphs that are together less probable than the best one by this factor need not be told from each other.
    log_total, log_count = (AcyclicGraphs(len(names), p, max_parents).log_total for p in (edge_probability, 0.5))
    floor = best_score(weights) - log_total - log_count - _NEGLIGIBLE
    if isinstance(data, xr.Dataset) and "true_graph" in data:
        kept["true_graph"] = (("parent", "child"), _truth(data["true_graph"], names))
    return Problem(
        name="bayesian_network",
        model=BayesianNetwork(torch.as_tensor(scores), edge_probability=edge_probability, max_parents=max_parents),
        guide=guide,
        coords={"parent": names, "child": names, "variable": names, "sample": rows},
        data=xr.Dataset(kept, coords={"variable": names, "sample": rows}, attrs={"score": score}),
        loss=ParallelVarGrad(
            num_particles, epsilon=epsilon, floor=floor, reward_power=Rising(anneal) if anneal else 1.0
        ),
    )


def tiny() -> Problem:
    """Three variables in a chain or the like, for tests."""
    return make_problem(simulate_gaussian_network(3, 30, degree=1.5, seed=1), hidden=8, num_particles=16, anneal=0)


def _truth(truth: xr.DataArray, names: Sequence[str]) -> Any:
    """Edges (parent, child) in the order of the variables."""
    named = {"cause": "parent", "effect": "child"}
    truth = truth.rename({axis: name for axis, name in named.items() if axis in truth.dims})
    if truth.shape != (len(names), len(names)):
        raise DataError(f"true_graph has shape {truth.shape}; give (parent, child) for {len(names)} variables")
    return arranged(truth, "true_graph", {"parent": names, "child": names})


def _table(data: xr.Dataset | xr.DataArray | pd.DataFrame) -> xr.DataArray:
    """Rows and columns with names."""
    if isinstance(data, pd.DataFrame):
        parts = [_column(data.iloc[:, place]) for place in range(data.shape[1])]
        values = np.stack(parts, -1) if parts else np.zeros((len(data), 0))
        table = xr.DataArray(values, dims=("sample", "variable"), coords={"variable": data.columns.astype(str).values})
    elif isinstance(data, xr.Dataset):
        if "x" not in data:
            raise DataError(f"data hold {list(data.data_vars)}; name the table (sample, variable) 'x'")
        table = data["x"]
    else:
        table = data
    if table.ndim != 2 or not {"sample", "variable"} <= set(table.dims):
        raise DataError(f"the table has dims {table.dims}; expected sample and variable")
    table = table.transpose("sample", "variable")
    rows, columns = table.shape
    if not 2 <= columns <= _MOST_NODES:
        raise DataError(
            f"the table has {columns} variables; give 2 to {_MOST_NODES}, since every set of parents gets a score"
        )
    if rows < 2:
        raise DataError(f"the table has {rows} rows; give at least 2")
    for dim in table.dims:
        if dim not in table.coords:
            table = table.assign_coords({dim: np.arange(table.sizes[dim])})
    names = pd.Index(table["variable"].values)
    if not names.is_unique:
        raise DataError(f"variable {str(names[names.duplicated()][0])!r} occurs twice; give each a name of its own")
    missing = pd.isna(pd.DataFrame(table.values)).to_numpy().sum(0)
    _refuse(table, missing > 0, "has missing values; drop their rows, or fill them")
    return table


def _column(column: pd.Series) -> NDArray[Any]:
    """Values of a column of a frame."""
    return column.astype(object).to_numpy() if column.dtype.kind == "O" else column.to_numpy()


def _columns(table: xr.DataArray) -> list[NDArray[Any]]:
    """Values of each variable, of the type that suits them."""
    return [pd.Series(column).infer_objects().to_numpy() for column in table.values.T]


def _numbers(table: xr.DataArray) -> NDArray[np.float64]:
    """Values of continuous variables."""
    columns = _columns(table)
    words = np.array([column.dtype.kind not in "iuf" for column in columns])
    _refuse(table, words, "holds categories; take score='bdeu', or leave it out")
    x = np.stack(columns, -1).astype(np.float64)
    _refuse(table, ~np.isfinite(x).all(0), "has infinite values; drop their rows")
    _refuse(table, np.ptp(x, axis=0) <= 1e-12 * np.abs(x).max(0), "is constant; leave it out")
    return x


def _states(table: xr.DataArray, given: xr.DataArray | None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """States of discrete variables, counted from 0, and how many there are."""
    columns = _columns(table)
    broken = np.array([column.dtype.kind == "f" and (column != np.round(column)).any() for column in columns])
    _refuse(table, broken, "has fractions; take score='bge', or sort its values into classes")
    coded = [np.unique(column.astype(str), return_inverse=True) for column in columns]
    seen = np.array([len(labels) for labels, _ in coded])
    _refuse(table, seen < 2, "is constant; leave it out")
    _refuse(table, seen > _MOST_STATES, f"has more than {_MOST_STATES} states; join some of them")
    if given is None:
        return np.stack([code.reshape(-1) for _, code in coded], -1).astype(np.int64), seen
    counts = given.values.astype(np.int64)
    if counts.shape != seen.shape:
        raise DataError(f"num_states has shape {counts.shape}; give one number for each of {len(seen)} variables")
    whole = np.array([column.dtype.kind in "iufb" for column in columns])
    _refuse(table, ~whole, "holds words, but num_states is given; number its states from 0")
    x = np.stack(columns, -1).astype(np.int64)
    _refuse(table, (x.min(0) < 0) | (x.max(0) >= counts), "has a state that is not between 0 and num_states - 1")
    return x, counts


def _refuse(table: xr.DataArray, bad: Any, why: str) -> None:
    if bad.any():
        raise DataError(f"variable {str(table['variable'].values[bad.argmax()])!r} {why}")


def _weights(scores: NDArray[np.float64], edge_probability: float, max_parents: int | None) -> NDArray[np.float64]:
    """Log weights of sets of parents, those of prior and score together."""
    size = np.array([number.bit_count() for number in range(scores.shape[1])])
    weights = scores + size * math.log(edge_probability / (1 - edge_probability))
    return np.where(size <= (max_parents or len(scores)), weights, -np.inf)
