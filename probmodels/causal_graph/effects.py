"""Average effects in a labelled table, with intervals that know what graph and mechanisms leave open.

Every concept is a function of its causes and noise of its own, ``x_j = f_j(x_causes) + noise_j``. The functions have
conjugate priors, linear or smooth, on features of the causes::

    f = features(x_causes) w,   w ~ Normal(0, variance * scales),   variance ~ InverseGamma

so that a draw of their posterior is a draw of a normal. A draw of an effect takes a draw of the graph (or the graph
that is known), draws of the functions on the way from treatment to outcome, and rows drawn by the Bayesian bootstrap:
setting the treatment changes its effects by what their functions change, and leaves their noise.

References
----------
Pearl, J. (2009). Causality, 2nd edition. Cambridge University Press.
Rubin, D. B. (1981). The Bayesian bootstrap. Ann. Statist. 9. https://doi.org/10.1214/aos/1176345338
Rasmussen, C. E. and Williams, C. K. I. (2006). Gaussian processes for machine learning, chapter 8. MIT Press.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import pandas as pd
import xarray as xr
from annotated_types import Interval, Len
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import solve_triangular
from scipy.special import gammaln
from tqdm.auto import tqdm

from probmodels.causal_graph.scores import SmoothFeatures
from probmodels.causal_graph.tables import rows_given
from probmodels.datasets.causal import as_graph, causal_order, position_of
from probmodels.datasets.labelled import arranged
from probmodels.errors import DataError
from probmodels.options import Fraction, OneOf, Seed, checked

__all__ = ["average_effect"]

Floats = NDArray[np.float64]

FUNCTIONS = ("linear", "smooth")
_LENGTHS = (0.5, 1.0, 2.0)  # of smooth functions, in standard deviations
_RATIOS = 10.0 ** np.arange(-1.0, 4.1, 1.0)  # of their variance to that of the noise
_WIDE = 1e4  # prior variance of linear weights, in that of the noise
_SHAPE, _RATE = 0.5, 0.05  # of the inverse gamma prior of the variance
_POINTS = 80  # inducing points of a smooth function


@checked(DataError)
def average_effect(
    data: xr.Dataset | xr.DataArray,
    graph: ArrayLike,
    treatment: str,
    values: tuple[float, float],
    *,
    outcomes: Annotated[Sequence[str], Len(1)] | None = None,
    given: ArrayLike | None = None,
    functions: Annotated[str, OneOf(FUNCTIONS)] = "smooth",
    num_draws: Annotated[int, Interval(ge=2, le=10_000_000)] = 500,
    prob: Fraction = 0.95,
    seed: Seed = 0,
    progress: bool = False,
) -> xr.Dataset:
    """Mean difference that a concept makes to others when it is set to the second of two values instead of the first.

    Parameters
    ----------
    data
        Labels (data, concept), or a data set with ``label``; rows with a missing label are left out.
    graph
        Edges (cause, effect) as `as_graph` takes them, or draws of graphs (draw, cause, effect), as of the posterior of
        `probmodels.causal_graph`; labelled ones in any order of axes and concepts.
    treatment
        The concept that is set.
    values
        In units of the labels.
    outcomes
        Concepts to look at; None for all others.
    given
        Rows to average over, a conditional effect: places or truth values (data,); None for all. Functions are fitted
        to all rows whatever is given.
    functions
        ``"linear"`` or ``"smooth"``.
    num_draws
        Number of draws of graphs, functions and rows.
    prob
        Mass of the intervals, whose ends are quantiles.
    seed, progress
        Seed of the draws; whether to show a bar.

    Returns
    -------
    xr.Dataset
        ``effect``, the mean over draws, ``low`` and ``high`` (concept,), and ``draws`` (draw, concept).

    Raises
    ------
    DataError
        If a concept is not known, a graph has a cycle, there are fewer than 10 complete rows, or an option is out of
        range.
    """
    if isinstance(data, xr.Dataset) and "label" not in data:
        raise DataError(f"data hold {list(data.data_vars)}; name the concepts' values 'label' (data, concept)")
    labels = data["label"] if isinstance(data, xr.Dataset) else data
    if set(labels.dims) != {"data", "concept"}:
        raise DataError(f"labels have dims {labels.dims}; expected data and concept")
    names = [str(name) for name in labels["concept"].values]
    place = position_of(treatment, names)
    chosen = [name for name in names if name != treatment] if outcomes is None else list(outcomes)
    columns = [position_of(name, names) for name in chosen]
    table = np.asarray(labels.transpose(..., "concept").values, dtype=np.float64)
    if str(getattr(given, "dtype", "")) == "bool":
        given = arranged(given, "given", {"data": labels["data"].values if "data" in labels.coords else None})
    complete = np.isfinite(table).all(1)
    wanted = np.zeros(len(table), dtype=bool)
    wanted[slice(None) if given is None else rows_given(given, len(table), DataError)] = True
    if complete.sum() < 10 or not (wanted & complete).any():
        raise DataError(f"{int(complete.sum())} rows have all labels, {int((wanted & complete).sum())} of those given; "
                        "10 are needed, and one that is given")  # fmt: skip
    table, wanted = table[complete], wanted[complete]
    graphs = _graphs(graph, names)
    centre, scale = table.mean(0), table.std(0)
    x = (table - centre) / scale
    worlds = (np.asarray(values) - centre[place]) / scale[place]
    rng = np.random.default_rng(seed)
    fits: dict[tuple[int, tuple[int, ...]], _Function] = {}
    points = rng.permutation(len(x))[:_POINTS]
    draws = np.empty((num_draws, len(columns)))
    for number in tqdm(range(num_draws), desc="draws", disable=not progress):
        edges = graphs[number % len(graphs)]
        weight = rng.exponential(size=wanted.sum())
        change = _difference(x, wanted, edges, place, worlds, fits, points, functions, rng)
        draws[number] = (weight @ change[:, columns]) / weight.sum() * scale[columns]
    ends = np.quantile(draws, [(1 - prob) / 2, (1 + prob) / 2], axis=0)
    return xr.Dataset(
        {
            "effect": ("concept", draws.mean(0)),
            "low": ("concept", ends[0]),
            "high": ("concept", ends[1]),
            "draws": (("draw", "concept"), draws),
        },
        coords={"concept": chosen},
        attrs={"treatment": treatment, "values": [float(value) for value in values], "prob": prob},
    )


def _graphs(graph: Any, names: Sequence[str]) -> list[NDArray[np.int8]]:
    if isinstance(graph, xr.DataArray):
        lead = [str(dim) for dim in graph.dims if dim not in ("cause", "effect")][: graph.ndim - 2]
        graph = arranged(graph, "graph", {**dict.fromkeys(lead), "cause": names, "effect": names})
    elif isinstance(graph, pd.DataFrame):
        graph = arranged(graph, "graph", {"cause": names, "effect": names})
    found = np.asarray(graph) if not isinstance(graph, Sequence) else None
    if found is None or found.ndim == 2:
        return [as_graph(graph if found is None else found, names)]
    return [as_graph(one, names) for one in found.reshape(-1, *found.shape[-2:])]


def _difference(
    x: Floats, wanted: NDArray[np.bool_], edges: NDArray[np.int8], treatment: int, worlds: Floats,
    fits: dict[tuple[int, tuple[int, ...]], _Function], points: NDArray[np.int64], functions: str,
    rng: np.random.Generator,
) -> Floats:  # fmt: skip
    """Second world less the first (row, concept), of one graph and draws of the functions that matter."""
    first, second = x[wanted].copy(), x[wanted].copy()
    first[:, treatment], second[:, treatment] = worlds
    moved = {treatment}
    for node in causal_order(edges):
        causes = tuple(int(i) for i in np.flatnonzero(edges[:, node]))
        if node == treatment or not moved & set(causes):
            continue
        if (node, causes) not in fits:
            fits[node, causes] = _Function(x[:, causes], x[:, node], points, functions)
        function = fits[node, causes].draw(rng)
        there = function(x[wanted][:, causes])
        for world in (first, second):
            world[:, node] = x[wanted, node] + function(world[:, causes]) - there
        moved.add(node)
    change: Floats = second - first
    return change


@dataclass
class _Fit:
    """Posterior of the weights at one setting of the prior."""

    length: float | None
    mean: Floats
    root: Floats  # of their covariance over the variance
    rate: float
    log_evidence: float


class _Function:
    """Posterior of a function of causes (row, cause), averaged over settings of its prior."""

    def __init__(self, x: Floats, y: Floats, points: NDArray[np.int64], functions: str) -> None:
        self.smooth = {length: SmoothFeatures(x[points], length * math.sqrt(x.shape[1])) for length in _LENGTHS}
        self.shape = _SHAPE + len(y) / 2
        self.fits: list[_Fit] = []
        for length in (None,) if functions == "linear" else _LENGTHS:
            features = self.features(x, length)
            gram, cross = features.T @ features, features.T @ y
            plain = 1 + x.shape[1]
            for ratio in (1.0,) if length is None else _RATIOS:
                prior = np.full(features.shape[1], ratio)
                prior[:plain] = _WIDE
                root = np.linalg.cholesky(gram + np.diag(1 / prior))
                mean = np.linalg.solve(root.T, np.linalg.solve(root, cross))
                rate = _RATE + 0.5 * float(y @ y - cross @ mean)
                evidence = -0.5 * np.log(prior).sum() - np.log(root.diagonal()).sum()
                evidence += gammaln(self.shape) - self.shape * math.log(rate)
                inverse = solve_triangular(root.T, np.eye(len(root)))
                self.fits.append(_Fit(length, mean, inverse, rate, float(evidence)))
        log = np.array([fit.log_evidence for fit in self.fits])
        self.shares = np.exp(log - log.max())
        self.shares /= self.shares.sum()

    def features(self, x: Floats, length: float | None) -> Floats:
        """One, the causes, and what smooth functions of a length are sums of (row, feature)."""
        plain = np.concatenate([np.ones((len(x), 1)), x], 1)
        return plain if length is None else np.concatenate([plain, self.smooth[length](x)], 1)

    def draw(self, rng: np.random.Generator) -> Any:
        """A function of causes (row, cause)."""
        fit = self.fits[rng.choice(len(self.fits), p=self.shares)]
        sd = math.sqrt(fit.rate / rng.gamma(self.shape))
        weights = fit.mean + sd * fit.root @ rng.normal(size=len(fit.mean))
        return lambda x: self.features(x, fit.length) @ weights
