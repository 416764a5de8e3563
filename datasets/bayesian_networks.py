"""Tables of variables of which some depend on others, as a random directed acyclic graph has it.

A data set is an `xr.Dataset` with ``x`` (sample, variable) and ``true_graph`` (parent, child), 1 for an edge. Discrete
variables have states in ``x``, counted from 0, and ``num_states`` (variable,).
"""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
import xarray as xr
from annotated_types import Interval
from numpy.typing import NDArray

from probmodels.datasets.checks import check_size
from probmodels.errors import DataError
from probmodels.options import NonNegative, Positive, Seed, checked

__all__ = ["expected_degree", "simulate_discrete_network", "simulate_gaussian_network"]

_Variables = Annotated[int, Interval(ge=2, le=10_000)]
_Rows = Annotated[int, Interval(ge=2, le=10_000_000)]


@checked(DataError)
def simulate_gaussian_network(
    num_variables: _Variables = 5,
    num_samples: _Rows = 100,
    *,
    degree: NonNegative | None = None,
    effect: Positive = 1.0,
    noise: Positive = 1.0,
    seed: Seed = 0,
) -> xr.Dataset:
    """Continuous variables, each a sum of its parents times normal effects, plus normal noise.

    Parameters
    ----------
    num_variables, num_samples
        Size of the table.
    degree
        Expected number of edges at a node, at most ``num_variables - 1``; None for 2, or 1 of two variables.
    effect
        Standard deviation of the effects.
    noise
        Standard deviation of the noise.
    seed
        Seed of graph, effects and data.

    Returns
    -------
    xr.Dataset
        ``x``, ``true_graph`` and ``true_effect`` (parent, child).

    Raises
    ------
    DataError
        If an option is out of range.
    """
    generator = np.random.default_rng(seed)
    graph, order = _graph(generator, num_variables, num_samples, degree)
    effects = graph * effect * generator.standard_normal(graph.shape)
    x = np.zeros((num_samples, num_variables))
    for node in order:
        x[:, node] = x @ effects[:, node] + noise * generator.standard_normal(num_samples)
    data = _labelled(x, graph, "gaussian_network", f"simulate_gaussian_network, seed {seed}")
    return data.assign(true_effect=(("parent", "child"), effects))


@checked(DataError)
def simulate_discrete_network(
    num_variables: _Variables = 5,
    num_samples: _Rows = 500,
    *,
    num_states: Annotated[int, Interval(ge=2, le=1000)] = 2,
    degree: NonNegative | None = None,
    concentration: Positive = 0.5,
    seed: Seed = 0,
) -> xr.Dataset:
    """Discrete variables, the probabilities of whose states are Dirichlet draws for each joint state of the parents.

    Parameters
    ----------
    num_variables, num_samples
        Size of the table.
    num_states
        Number of states of every variable.
    degree
        Expected number of edges at a node, at most ``num_variables - 1``; None for 2, or 1 of two variables.
    concentration
        Concentration of the Dirichlet distributions: small for strong dependence.
    seed
        Seed of graph, probabilities and data.

    Returns
    -------
    xr.Dataset
        ``x``, ``num_states`` and ``true_graph``.

    Raises
    ------
    DataError
        If an option is out of range.
    """
    check_size(num_samples=num_samples, num_states=num_states)
    generator = np.random.default_rng(seed)
    graph, order = _graph(generator, num_variables, num_samples, degree)
    x = np.zeros((num_samples, num_variables), dtype=np.int64)
    for node in order:
        joint = np.unique(x[:, graph[:, node] > 0], axis=0, return_inverse=True)[1].reshape(-1)
        chances = generator.dirichlet(np.full(num_states, concentration), joint.max() + 1)
        x[:, node] = (generator.random((num_samples, 1)) > chances.cumsum(1)[joint, :-1]).sum(1)
    data = _labelled(x, graph, "discrete_network", f"simulate_discrete_network, seed {seed}")
    return data.assign(num_states=("variable", np.full(num_variables, num_states)))


def expected_degree(degree: float | None, **size: int) -> float:
    """Expected number of edges at a node of a random graph: None for 2, or 1 where there are two nodes.

    Raises
    ------
    DataError
        If it is above the number of other nodes, which ``size`` gives by the name of its option.
    """
    (name, nodes), *_ = size.items()
    if degree is not None and degree > nodes - 1:
        raise DataError(f"degree={degree}; give a number of at most {name} - 1 = {nodes - 1}")
    return min(2.0, nodes - 1) if degree is None else degree


def _graph(
    generator: np.random.Generator, num_variables: int, num_samples: int, degree: float | None
) -> tuple[NDArray[np.int64], list[Any]]:
    """Adjacency (parent, child), and nodes in an order in which parents come first."""
    check_size(num_variables=num_variables, num_samples=num_samples)
    degree = expected_degree(degree, num_variables=num_variables)
    order = generator.permutation(num_variables)
    edges = np.triu(generator.random((num_variables, num_variables)) < degree / (num_variables - 1), 1)
    graph = np.zeros((num_variables, num_variables), dtype=np.int64)
    graph[np.ix_(order, order)] = edges
    return graph, list(order)


def _labelled(x: NDArray[Any], graph: NDArray[np.int64], name: str, source: str) -> xr.Dataset:
    names = [f"v{number}" for number in range(1, len(graph) + 1)]
    return xr.Dataset(
        {"x": (("sample", "variable"), x), "true_graph": (("parent", "child"), graph)},
        coords={"sample": np.arange(len(x)), "variable": names, "parent": names, "child": names},
        attrs={"name": name, "source": source},
    )
