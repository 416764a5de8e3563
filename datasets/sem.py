"""Structural equation models with known graphs: what they produce, under interventions too, and their average effects.

With parents pa(j), and noise ``e_j`` of mean 0 and standard deviation ``s_j``, in an order in which causes come first::

    linear           x_j = sum_i w_ij x_i + e_j            w_ij uniform on [0.5, 2], of either sign
    additive         x_j = f_j(x_pa) + e_j
    post_nonlinear   x_j = g_j(f_j(x_pa) + e_j)            g_j(z) = z + a_j tanh(b_j z), increasing

``f_j`` is a draw from a Gaussian process of unit length scale, by random Fourier features, of parents scaled to unit
standard deviation. The variables are then scaled to mean 0 and standard deviation 1 as a part of the model, so that
its effects are in units of the data.

References
----------
Zheng, X., Aragam, B., Ravikumar, P. and Xing, E. (2018). DAGs with NO TEARS. NeurIPS. https://arxiv.org/abs/1803.01422.
Its linear models.
Peters, J., Mooij, J., Janzing, D. and Schoelkopf, B. (2014). Causal discovery with continuous additive noise models.
JMLR 15. https://arxiv.org/abs/1309.6779
Zhang, K. and Hyvarinen, A. (2009). On the identifiability of the post-nonlinear causal model. UAI.
https://arxiv.org/abs/1205.2599
Rahimi, A. and Recht, B. (2007). Random features for large-scale kernel machines. NeurIPS.
Reisach, A., Seiler, C. and Weichwald, S. (2021). Beware of the simulated DAG! NeurIPS.
https://arxiv.org/abs/2102.13647. Why to standardise: otherwise variances give away the order.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import xarray as xr
from annotated_types import Interval
from numpy.typing import NDArray

from probmodels.datasets.bayesian_networks import expected_degree
from probmodels.datasets.causal import Edges, as_graph, causal_order, make_concepts, position_of
from probmodels.datasets.checks import Share, as_array, check_size
from probmodels.errors import DataError
from probmodels.options import NonNegative, OneOf, Seed, checked, refuse_unused

__all__ = [
    "Sem",
    "average_effects",
    "draw_sem",
    "sample_sem",
    "sem_of",
    "simulate_sem",
]

Array = NDArray[np.float64]

_Nodes = Annotated[int, Interval(ge=2, le=1000)]
_Rows = Annotated[int, Interval(ge=2, le=10_000_000)]

_GRAPHS = ("er", "scale_free", "chain", "fork", "collider")
_MECHANISMS = ("linear", "additive", "post_nonlinear")
_FEATURES = 64
_AMPLITUDE = 2.0  # of functions of a Gaussian process, beside noise of about 1
_MOMENT_ROWS = 1 << 14  # for the scale of variables whose moments have no closed form
_NOISES = {  # of mean 0 and variance 1
    "gaussian": lambda rng, shape: rng.standard_normal(shape),
    "laplace": lambda rng, shape: rng.laplace(scale=np.sqrt(0.5), size=shape),
    "gumbel": lambda rng, shape: (rng.gumbel(size=shape) - np.euler_gamma) * np.sqrt(6) / np.pi,
    "uniform": lambda rng, shape: rng.uniform(-np.sqrt(3), np.sqrt(3), size=shape),
}


@dataclass(frozen=True)
class Sem:
    """A structural equation model; made by `draw_sem`.

    Attributes
    ----------
    names
        Names of the variables.
    graph
        Adjacency (cause, effect).
    mechanism, noise
        As in `draw_sem`.
    weight
        Weights of causes (cause, effect), before scaling; 0 where the mechanism is not linear.
    frequency, phase, amplitude
        Random features of functions: (node, feature, cause), (node, feature), (node, feature).
    bend
        ``a`` and ``b`` of the outer function (node, 2).
    noise_scale
        Standard deviation of the noise (node,), before scaling.
    location, scale
        Location and scale of the variables (node,): what data show is ``(x - location) / scale``.
    input_scale
        Standard deviations (node,) by which variables enter functions.
    """

    names: tuple[str, ...]
    graph: NDArray[np.int8]
    mechanism: str
    noise: str
    weight: Array
    frequency: Array
    phase: Array
    amplitude: Array
    bend: Array
    noise_scale: Array
    location: Array
    scale: Array
    input_scale: Array

    def draw_noise(self, num_rows: int, rng: np.random.Generator) -> Array:
        """Noise (row, node), before scaling."""
        return self.noise_scale * _NOISES[self.noise](rng, (num_rows, len(self.names)))

    def solve(self, noise: Array, interventions: Mapping[str, Any] | None = None) -> Array:
        """Variables (row, node), in units of the data, that noise (row, node) leads to under interventions.

        Raises
        ------
        DataError
            If an intervention is on an unknown variable, not finite, or not of the number of rows.
        """
        held: dict[int, Array] = {}
        for name, value in (interventions or {}).items():
            column = as_array(value, f"intervention on {name!r}", numbers=True).astype(np.float64)
            if column.shape not in ((), (len(noise),)) or not np.isfinite(column).all():
                raise DataError(
                    f"intervention on {name!r} has shape {column.shape} for {len(noise)} rows; give a finite number, "
                    "or one for each row"
                )
            held[position_of(name, self.names)] = column
        x, scaled = np.zeros_like(noise), np.zeros_like(noise)
        for node in causal_order(self.graph):
            if node in held:
                scaled[:, node] = held[node]
                x[:, node] = self.location[node] + self.scale[node] * held[node]
            else:
                x[:, node] = self._node(node, x, noise[:, node])
                scaled[:, node] = (x[:, node] - self.location[node]) / self.scale[node]
        return scaled

    def _node(self, node: int, x: Array, noise: Array) -> Array:
        if self.mechanism == "linear":
            return x @ self.weight[:, node] + noise
        parents = np.flatnonzero(self.graph[:, node])
        value = noise
        if len(parents):
            angle = (x[:, parents] / self.input_scale[parents]) @ self.frequency[node][:, parents].T + self.phase[node]
            value = value + np.cos(angle) @ self.amplitude[node]
        if self.mechanism == "post_nonlinear":
            value = value + self.bend[node, 0] * np.tanh(self.bend[node, 1] * value)
        return value


@checked(DataError)
def draw_sem(
    num_nodes: _Nodes = 5,
    *,
    graph: Annotated[str, OneOf(_GRAPHS)] | Edges = "er",
    degree: NonNegative | None = None,
    mechanism: Annotated[str, OneOf(_MECHANISMS)] = "linear",
    noise: Annotated[str, OneOf(_NOISES)] = "gaussian",
    equal_variances: bool = True,
    standardise: bool = True,
    seed: Seed = 0,
) -> Sem:
    """A random structural equation model.

    Parameters
    ----------
    num_nodes
        Number of variables, v1, v2, and so on.
    graph
        ``"er"``, each pair with the same chance; ``"scale_free"``, by preferential attachment; ``"chain"``, ``"fork"``
        (v1 causes all others), ``"collider"`` (all others cause the last); or edges as in `as_graph`.
    degree
        Expected number of edges at a node of ``"er"`` and, about, of ``"scale_free"``, at most ``num_nodes - 1``; not
        used with other graphs. None for 2, or 1 where there are two nodes.
    mechanism
        ``"linear"``, ``"additive"`` or ``"post_nonlinear"``.
    noise
        ``"gaussian"``, ``"laplace"``, ``"gumbel"`` or ``"uniform"``.
    equal_variances
        Whether all noise has, before scaling, standard deviation 1, or else one uniform on [0.5, 1.5].
    standardise
        Whether variables are scaled: exactly where the model is linear, else by moments of many draws.
    seed
        Seed of all draws.

    Raises
    ------
    DataError
        If an option is out of range or not used, or the graph is not acyclic.
    """
    degree = _degree(graph, degree, num_nodes)
    rng = np.random.default_rng(seed)
    names = tuple(f"v{number}" for number in range(1, num_nodes + 1))
    edges = _draw_graph(graph, names, degree, rng) if isinstance(graph, str) else as_graph(graph, names)
    weight = edges * rng.uniform(0.5, 2.0, edges.shape) * rng.choice([-1, 1], edges.shape)
    ones, zeros = np.ones(num_nodes), np.zeros(num_nodes)
    parts: dict[str, Any] = {
        "names": names,
        "graph": edges,
        "mechanism": mechanism,
        "noise": noise,
        "weight": weight if mechanism == "linear" else np.zeros_like(weight),
        "frequency": rng.standard_normal((num_nodes, _FEATURES, num_nodes)),
        "phase": rng.uniform(0, 2 * np.pi, (num_nodes, _FEATURES)),
        "amplitude": _AMPLITUDE * np.sqrt(2 / _FEATURES) * rng.standard_normal((num_nodes, _FEATURES)),
        "bend": rng.uniform([1.0, 0.5], [3.0, 2.0], (num_nodes, 2)),
        "noise_scale": ones if equal_variances else rng.uniform(0.5, 1.5, num_nodes),
        "location": zeros,
        "scale": ones,
        "input_scale": ones.copy(),
    }
    if mechanism == "linear":
        spread = np.sqrt((parts["noise_scale"][:, None] ** 2 * _paths(weight) ** 2).sum(0))
        return Sem(**(parts | ({"scale": spread} if standardise else {})))
    # Functions take parents in units of their own spread, which is known once these are drawn.
    bare = Sem(**parts)
    noises = bare.draw_noise(_MOMENT_ROWS, rng)
    x = np.zeros_like(noises)
    for node in causal_order(edges):
        x[:, node] = bare._node(node, x, noises[:, node])
        parts["input_scale"][node] = x[:, node].std()
    return Sem(**(parts | ({"location": x.mean(0), "scale": x.std(0)} if standardise else {})))


@checked(DataError)
def sample_sem(
    sem: Sem,
    num_rows: Annotated[int, Interval(ge=1, le=10_000_000)],
    *,
    interventions: Mapping[str, Any] | None = None,
    seed: Seed = 0,
) -> Array:
    """Rows (row, node) of a model under interventions; with one seed, noise is that of any other interventions.

    Parameters
    ----------
    sem
        The model, of `draw_sem` or `sem_of`.
    num_rows
        Number of rows.
    interventions
        Values in units of the data, numbers or arrays (row,), by name.
    seed
        Seed of the noise.

    Raises
    ------
    DataError
        If an option is out of range, or an intervention is on an unknown variable or not finite.
    """
    check_size(num_rows=num_rows, num_nodes=len(sem.names))
    return sem.solve(sem.draw_noise(num_rows, np.random.default_rng(seed)), interventions)


@checked(DataError)
def average_effects(
    sem: Sem, low: float = 0.0, high: float = 1.0, *, num_rows: _Rows = 100_000, seed: Seed = 0
) -> xr.Dataset:
    """Average total effects: E[x_j | do(x_i = high)] - E[x_j | do(x_i = low)].

    In a linear model these are sums over paths of products of weights, ``(I - W)^-1 - I`` times ``high - low``. Else
    they are means over draws of the noise, of which the two interventions share each.

    Parameters
    ----------
    sem
        The model, of `draw_sem` or `sem_of`.
    low, high
        Values in units of the data.
    num_rows
        Number of draws for models that have no closed form.
    seed
        Seed of these draws.

    Returns
    -------
    xr.Dataset
        ``average_effect`` and its ``standard_error`` (cause, effect), 0 where exact; that of a cause on itself
        is left at 0.

    Raises
    ------
    DataError
        If an option is out of range.
    """
    num_nodes = len(sem.names)
    effect, error = np.zeros((num_nodes, num_nodes)), np.zeros((num_nodes, num_nodes))
    if sem.mechanism == "linear":
        total = _paths(sem.weight) - np.eye(num_nodes)
        effect = (high - low) * total * sem.scale[:, None] / sem.scale
    else:
        check_size(num_rows=num_rows, num_nodes=num_nodes)
        noise = sem.draw_noise(num_rows, np.random.default_rng(seed))
        for node, name in enumerate(sem.names):
            if sem.graph[node].any():
                change = sem.solve(noise, {name: high}) - sem.solve(noise, {name: low})
                change[:, node] = 0
                effect[node], error[node] = change.mean(0), change.std(0) / np.sqrt(num_rows)
    dims = ("cause", "effect")
    names = list(sem.names)
    return xr.Dataset(
        {"average_effect": (dims, effect), "standard_error": (dims, error)}, coords={"cause": names, "effect": names}
    )


@checked(DataError)
def simulate_sem(
    num_nodes: _Nodes = 5,
    num_rows: _Rows = 1000,
    *,
    graph: Annotated[str, OneOf(_GRAPHS)] | Edges = "er",
    degree: NonNegative | None = None,
    mechanism: Annotated[str, OneOf(_MECHANISMS)] = "linear",
    noise: Annotated[str, OneOf(_NOISES)] = "gaussian",
    equal_variances: bool = True,
    standardise: bool = True,
    test: Share = 0.2,
    seed: Seed = 0,
) -> xr.Dataset:
    """A table of a random structural equation model, whose variables are concepts that are observed as they are.

    Parameters
    ----------
    num_rows
        Number of rows of the table.
    test
        Share of rows for testing, the last ones.
    num_nodes, graph, degree, mechanism, noise, equal_variances, standardise, seed
        As in `draw_sem`; the seed is that of the rows too.

    Returns
    -------
    xr.Dataset
        As `make_concepts` returns it; ``true_weight`` (cause, effect), in units of the data, where the model is linear.
        `sem_of` gives the model.

    Raises
    ------
    DataError
        If an option is out of range or not used, or the graph is not acyclic.
    """
    names = [f"v{number}" for number in range(1, num_nodes + 1)]
    options: dict[str, Any] = {
        "num_nodes": num_nodes,
        "graph": graph if isinstance(graph, str) else as_graph(graph, names).tolist(),
        "degree": degree,
        "mechanism": mechanism,
        "noise": noise,
        "equal_variances": equal_variances,
        "standardise": standardise,
        "seed": seed,
    }
    check_size(num_rows=num_rows, num_nodes=num_nodes)
    sem = draw_sem(**options)
    x = sample_sem(sem, num_rows, seed=seed)
    data = make_concepts(
        x,
        x,
        names=sem.names,
        split=np.where(np.arange(num_rows) < num_rows - round(test * num_rows), "train", "test"),
        graph=sem.graph,
        name="sem",
        source=f"simulate_sem, {mechanism}, {noise} noise, seed {seed}",
    ).assign_attrs(sem=json.dumps(options))
    if mechanism == "linear":
        data["true_weight"] = (("cause", "effect"), sem.weight * sem.scale[:, None] / sem.scale)
    return data


@checked(DataError)
def sem_of(data: xr.Dataset) -> Sem:
    """The model that data of `simulate_sem` are from.

    Raises
    ------
    DataError
        If they are other data.
    """
    if "sem" not in data.attrs:
        raise DataError("data have no attribute 'sem'; only those of simulate_sem name the model that they are from")
    try:
        options = dict(json.loads(data.attrs["sem"]))
    except (TypeError, ValueError) as error:
        raise DataError(f"attribute 'sem' of the data cannot be read ({error}); simulate them anew") from error
    return draw_sem(**options)


def _degree(graph: str | Edges, degree: float | None, num_nodes: int) -> float:
    """The expected number of edges at a node of a random graph."""
    if not isinstance(graph, str) or graph not in ("er", "scale_free"):
        branch = f"graph={graph!r}" if isinstance(graph, str) else "a graph that is given"
        refuse_unused(draw_sem, branch, degree=degree)
    return expected_degree(degree, num_nodes=num_nodes)


def _draw_graph(kind: str, names: tuple[str, ...], degree: float, rng: np.random.Generator) -> NDArray[np.int8]:
    num = len(names)
    edges = np.zeros((num, num), dtype=np.int8)
    if kind == "chain":
        edges[np.arange(num - 1), np.arange(1, num)] = 1
    elif kind == "fork":
        edges[0, 1:] = 1
    elif kind == "collider":
        edges[:-1, -1] = 1
    else:
        ordered = np.zeros_like(edges)
        if kind == "er":
            ordered[:] = np.triu(rng.random((num, num)) < degree / (num - 1), 1)
        else:  # every new node takes causes by their numbers of edges
            for node in range(1, num):
                weight = ordered[:node].sum(1) + ordered[:, :node].sum(0) + 1.0
                size = min(node, max(1, round(degree / 2)))
                ordered[rng.choice(node, size, replace=False, p=weight / weight.sum()), node] = 1
        order = rng.permutation(num)  # so that the order of columns says nothing
        edges[np.ix_(order, order)] = ordered
    return edges


def _paths(weight: Array) -> Array:
    """Sums (cause, effect) over all directed paths of products of weights, with 1 from a node to itself."""
    return np.asarray(np.linalg.inv(np.eye(len(weight)) - weight), dtype=np.float64)
