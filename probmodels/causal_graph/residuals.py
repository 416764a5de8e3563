"""Tests of a causal graph by what its mechanisms leave unexplained: residuals that depend on causes or on each other.

Under the model, the noise of a concept is independent of its causes and of the noise of all other concepts, and rows
are independent. Hidden common causes, noise whose spread changes with a cause, transformed values, selected rows and
rows in sequence break one of these. Residuals of every concept are compared with the residuals of all concepts before
it in a causal order, with its causes, and with its own fit::

    products of  cosines of ranks, or powers, of residuals   and   cosines of ranks of the other variable

What these products are under the model is known by replicates: a draw of the function from its posterior, residuals in
random order, and a fit to their sum. The smallest tail probability of all comparisons is compared with those of the
replicates, so that its level holds over all of them together.

References
----------
Gretton, A. et al. (2008). A kernel statistical test of independence. NeurIPS.
Hoyer, P. O., Janzing, D., Mooij, J., Peters, J. and Schölkopf, B. (2008). Nonlinear causal discovery with additive
noise models. NeurIPS.
Ljung, G. M. and Box, G. E. P. (1978). On a measure of lack of fit in time series models. Biometrika 65(2).
Westfall, P. H. and Young, S. S. (1993). Resampling-based multiple testing. Wiley.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import gammaincc, ndtri
from scipy.stats import chi2, rankdata

from probmodels.causal_graph.scores import FLOORS, KERNELS, best_fit, noise_gain
from probmodels.datasets.causal import causal_order

__all__ = ["ResidualTests", "residual_tests"]

Floats = NDArray[np.float64]

_REPLICATES = 199
_MOST_ROWS = 2000  # that are compared; all of them tell serial dependence
_COSINES, _LOW = 6, 4  # all of them, and the low ones, which most dependence shows in
_FAR = 5.0  # standard deviations at which residuals are cut before powers are taken
_LAGS = 3


class ResidualTests(NamedTuple):
    """Tail probabilities under the model, and what they are of.

    Attributes
    ----------
    dependence
        Of the strongest dependence of all, in view of their number.
    pairs
        The same of every pair of concepts (concept, concept), symmetric: their residuals, or residuals of the effect
        with values of the cause or with the fit; 1 where nothing was compared.
    serial
        Of the dependence of residuals of neighbouring rows, in view of the number of concepts.
    lag
        Correlation of residuals of neighbouring rows (concept,).
    gain
        Log Bayes factor of noise of any shape against normal noise (concept,).
    """

    dependence: float
    pairs: Floats
    serial: float
    lag: Floats
    gain: Floats


def residual_tests(
    x: Floats,
    graph: ArrayLike,
    *,
    kernels: Sequence[str] = KERNELS,
    num_points: int = 80,
    floors: Sequence[float] = FLOORS,
    seed: int = 0,
) -> ResidualTests:
    """Test whether residuals under a graph depend on causes, on each other, or on those of the row before.

    Parameters
    ----------
    x
        Values (row, concept).
    graph
        Acyclic graph (cause, effect).
    kernels, num_points, floors, seed
        As in `probmodels.causal_graph.scores.mechanism_scores`. Residuals below the largest floor are errors of
        approximation and are not compared.
    """
    graph = np.asarray(graph) > 0
    options = {"kernels": kernels, "num_points": num_points, "floor": min(floors), "seed": seed}
    found = _fits(x, graph, options)
    residuals = np.stack([one.residual for one in found], 1)
    serial, lag = _serial(residuals)
    gain = np.array([noise_gain(residual) for residual in residuals.T])
    rng = np.random.default_rng(seed)
    if len(x) > _MOST_ROWS:
        x = x[np.sort(rng.permutation(len(x))[:_MOST_ROWS])]
        found = _fits(x, graph, options)
    dependence, pairs = _dependence(found, graph, max(floors), rng)
    return ResidualTests(dependence, pairs, serial, lag, gain)


class _Fit(NamedTuple):
    """A concept, its fit and residuals of one spread whatever their leverage (row,), and the smoother."""

    values: Floats
    fit: Floats
    residual: Floats
    vectors: Floats
    shrink: Floats

    @property
    def leverage(self) -> Floats:
        """Share of a row in its own fit (row,)."""
        found: Floats = self.vectors**2 @ self.shrink
        return found


def _fits(x: Floats, graph: NDArray[np.bool_], options: dict[str, Any]) -> list[_Fit]:
    x = (x - x.mean(0)) / x.std(0)
    found = []
    for node in range(len(graph)):
        vectors, shrink = best_fit(x, node, np.flatnonzero(graph[:, node]).tolist(), **options)
        fit = vectors @ (shrink * (vectors.T @ x[:, node]))
        residual = (x[:, node] - fit) / np.sqrt(1 - vectors**2 @ shrink)
        found.append(_Fit(x[:, node], fit, residual - residual.mean(), vectors, shrink))
    return found


def _dependence(
    fits: list[_Fit], graph: NDArray[np.bool_], floor: float, rng: np.random.Generator
) -> tuple[float, Floats]:
    """Tail probability of the strongest dependence, and those of all pairs."""
    judged = [one.residual.std() > floor for one in fits]
    tails, ends = [np.ones((_REPLICATES + 1, 1))], []
    earlier: list[int] = []
    for node in causal_order(graph.astype(np.int8)):
        if not judged[node]:
            continue
        causes = [int(cause) for cause in np.flatnonzero(graph[:, node])]
        bent = [cause for cause in causes if graph[:, cause].any() or not judged[cause]]  # others are their residuals
        others = [fits[one].residual for one in earlier] + [fits[cause].values for cause in bent]
        ends += [([one], node) for one in earlier + bent]
        if len(causes) > 1:
            others.append(fits[node].fit)
            ends.append((causes, node))
        earlier.append(node)
        if others:
            tails.append(_tails(fits[node], np.stack(others, 1), rng))
    every = np.concatenate(tails, 1)
    least = every.min(1)
    pairs = np.ones(graph.shape)
    for (causes, node), tail in zip(ends, every[0, 1:], strict=True):
        level = (least <= tail).mean()
        pairs[causes, node] = np.minimum(pairs[causes, node], level)
    return float((least <= least[0]).mean()), np.minimum(pairs, pairs.T)


def _tails(fit: _Fit, others: Floats, rng: np.random.Generator) -> Floats:
    """Tail probabilities of residuals and their replicates with other variables (replicate, other), the data first."""
    vectors, shrink, leverage = fit.vectors, fit.shrink, fit.leverage
    shuffled = rng.permuted(np.repeat(fit.residual[:, None], _REPLICATES, 1), axis=0)
    weights = np.sqrt(shrink)[:, None] * rng.standard_normal((len(shrink), _REPLICATES)) * fit.residual.std()
    y = fit.fit[:, None] + vectors @ weights + shuffled
    again = (y - vectors @ (shrink[:, None] * (vectors.T @ y))) / np.sqrt(1 - leverage)[:, None]
    residuals = np.concatenate([fit.residual[:, None], again], 1)
    # Where few rows hold a function, it is the prior that is seen.
    kept = leverage <= 3 * leverage.mean() + 0.05
    own = np.concatenate([_cosines(residuals), _powers(residuals)], -1)[kept]
    basis = _cosines(others)[kept]
    products = own.reshape(len(own), -1).T @ basis.reshape(len(basis), -1) / len(kept)
    products = products.reshape(_REPLICATES + 1, own.shape[-1], others.shape[1], _COSINES)
    spread = np.maximum(products.std(0), 0.3 / np.sqrt(len(kept)))
    squares = ((products - products.mean(0)) / spread) ** 2
    low = squares[:, :_LOW, :, :_LOW].max((1, 3))
    scales = np.einsum("raob,b->ro", squares[:, _COSINES:, :, :_LOW], 1 / np.arange(1, _LOW + 1))
    each = [_upper_tail(squares[:, :_COSINES].sum((1, 3))), _upper_tail(scales), _LOW**2 * chi2.sf(low, 1)]
    found: Floats = np.min(each, 0)
    return found


def _upper_tail(values: Floats) -> Floats:
    """Tail probabilities (replicate, other) of values under a gamma distribution of their moments."""
    mean, variance = values.mean(0), np.maximum(values.var(0), 1e-12)
    found: Floats = gammaincc(mean**2 / variance, values * mean / variance)
    return found


def _cosines(values: Floats) -> Floats:
    """Cosines of the ranks of columns (row, column, cosine), of mean 0 and variance 1."""
    place = (rankdata(values, axis=0) - 0.5) / len(values)
    return _standardised(np.cos(np.pi * place[..., None] * np.arange(1, _COSINES + 1)))


def _powers(values: Floats) -> Floats:
    """Values of columns, their sizes and their squares (row, column, 3), of mean 0 and variance 1."""
    cut = np.clip(values / values.std(0), -_FAR, _FAR)
    return _standardised(np.stack([cut, np.abs(cut), cut**2], -1))


def _standardised(values: Floats) -> Floats:
    found: Floats = (values - values.mean(0)) / np.maximum(values.std(0), 1e-12)
    return found


def _serial(residuals: Floats) -> tuple[float, Floats]:
    """Tail probability of the strongest dependence of neighbouring rows, and correlations (concept,) at lag one."""
    count, size = residuals.shape
    normal = ndtri((rankdata(residuals, axis=0) - 0.5) / count)
    scores = _standardised(np.stack([normal, normal**2], -1))
    lags = range(1, min(_LAGS, count - 1) + 1)
    each = np.stack([(scores[lag:] * scores[:-lag]).sum(0) ** 2 / (count - lag) for lag in lags])
    tails = chi2.sf(each.sum((0, 2)), 2 * len(lags))
    lag = (scores[1:, :, 0] * scores[:-1, :, 0]).mean(0)
    return float(min(1.0, size * tails.min())), lag
