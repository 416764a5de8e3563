"""Scores of mechanisms: how probable a concept is given any set of its causes, whatever the function and the noise.

For concept y with causes x_S, columns standardised, of N rows::

    y = f(x_S) + noise,   f ~ GP(0, ratio * variance * kernel),   noise ~ Normal(0, variance),   variance ~ InverseGamma

With weights of f and the variance integrated out the log marginal likelihood is closed, a multivariate Student t. It
is averaged over a grid of kernels (linear; a sum of one smooth function of each cause; a smooth function of all of them
at once, of two lengths) and of signal-to-noise ratios. Kernels are of low rank, from inducing points (Nyström), so that
a set of causes costs one decomposition for all concepts.

Noise need not be normal: residuals of the best of these fits, left out one by one, are judged by a grid of noise
shapes, heavy or light in their tails and skewed or not. What their average gains over the normal shape is added.

The prior of the variance has a floor, below which residuals are errors of approximation rather than noise: they move
neither scale nor shape. Scores of functions without noise hang on that floor, so that there are several.

References
----------
Friedman, N. and Nachman, I. (2000). Gaussian process networks. UAI. https://arxiv.org/abs/1301.3857
Hoyer, P. O., Janzing, D., Mooij, J., Peters, J. and Schölkopf, B. (2008). Nonlinear causal discovery with additive
noise models. NeurIPS.
Jones, M. C. and Pewsey, A. (2009). Sinh-arcsinh distributions. Biometrika 96(4).
https://doi.org/10.1093/biomet/asp053
Rasmussen, C. E. and Williams, C. K. I. (2006). Gaussian processes for machine learning, eq. 5.8 to 5.12. MIT Press.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln, logsumexp

__all__ = ["FLOORS", "KERNELS", "Scores", "SmoothFeatures", "best_fit", "mechanism_scores", "noise_gain"]

Floats = NDArray[np.float64]

KERNELS = ("linear", "additive", "joint")
_RATIOS = 10.0 ** np.arange(-0.5, 4.6, 1.0)  # of signal to noise
_LENGTHS = {"linear": (1.0,), "additive": (0.7, 1.5), "joint": (0.8, 2.0)}  # in standard deviations
FLOORS = (0.005, 0.01, 0.02, 0.04)  # of noise, in standard deviations
_SHAPE = 1.0  # of the inverse gamma prior of the variance
_TAILS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.25)  # of noise: below 1 heavy ones
_SKEWS = (0.0, 0.15, 0.3, 0.5, 0.75, 1.0, 1.5)
_POWERS = (1.0, 1.4, 3.0, 5.0, 10.0)  # Laplace to nearly uniform
_EDGE, _STEP = 9.0, 0.02  # of the table of log densities
_RAREST = -60.0  # least log density: no single row decides
_SMALL = 1e-9  # share of a kernel's eigenvalues that is noise


class Scores(NamedTuple):
    """What data say of every concept and every set of its causes.

    Attributes
    ----------
    log_likelihood
        Log marginal likelihood (floor, concept, set), -inf for sets that cannot be; concept i belongs to a set whose
        number has bit i.
    remainder
        What the best fit leaves unexplained (concept, set), in standard deviations of the concept; inf for those sets.
    """

    log_likelihood: Floats
    remainder: Floats


def mechanism_scores(
    x: Floats,
    *,
    max_parents: int | None = None,
    kernels: Sequence[str] = KERNELS,
    noise: str = "any",
    num_points: int = 80,
    allowed: NDArray[np.bool_] | None = None,
    floors: Sequence[float] = FLOORS,
    seed: int = 0,
) -> Scores:
    """Log marginal likelihood of every concept given every set of causes.

    Parameters
    ----------
    x
        Values (row, concept), standardised.
    max_parents
        Most causes of a concept; None for any number.
    kernels
        What functions are averaged over, of `KERNELS`.
    noise
        ``"normal"``, or ``"any"`` for an average over shapes.
    num_points
        Inducing points, the largest rank of a kernel.
    allowed
        Which causes a concept may have (cause, effect); None for all others.
    floors
        Standard deviations of noise that is too little to be told from none: the rate of the variance's prior is that
        of as many residuals of this size as there are rows.
    seed
        Seed of the choice of inducing points.
    """
    count, size = x.shape
    most = size - 1 if max_parents is None else max_parents
    allowed = ~np.eye(size, dtype=bool) if allowed is None else allowed
    masks = [int((allowed[:, j] * 2 ** np.arange(size)).sum()) for j in range(size)]
    generator = np.random.default_rng(seed)
    rows = generator.permutation(count)[:num_points]
    rates = count / 2 * np.square(floors)
    found = np.full((len(rates), size, 2**size), -np.inf)
    remainder = np.full((size, 2**size), np.inf)
    for number in range(2**size):
        targets = [j for j in range(size) if number & ~masks[j] == 0]
        if number.bit_count() > most or not targets:
            continue
        causes = [i for i in range(size) if number >> i & 1]
        y = x[:, targets]
        fits, values, rests = [], [], []
        for vectors, spread in _spectra(x[:, causes], rows, kernels):
            shares = vectors.T @ y  # (rank, target)
            for ratio in _RATIOS if len(spread) else _RATIOS[:1]:
                shrink = ratio * spread / (1 + ratio * spread)
                rests.append((y**2).sum(0) - shrink @ shares**2)
                values.append(_student(rests[-1], count, rates) - 0.5 * np.log1p(ratio * spread).sum())
                fits.append((vectors, shrink, shares))
        value, rest = np.stack(values), np.stack(rests)  # (fit, floor, target), (fit, target)
        total = logsumexp(value, axis=0) - math.log(len(value))
        best = value.argmax(0)  # (floor, target)
        remainder[targets, number] = np.sqrt(np.take_along_axis(rest, best[:1], 0)[0] / count)
        if noise == "any":
            total = total + np.logaddexp(0, _gains(y, fits, best, rest, rates)) - math.log(2)
        found[:, targets, number] = total
    return Scores(found, remainder)


def _gains(y: Floats, fits: list[tuple[Floats, Floats, Floats]], best: Any, rest: Floats, rates: Floats) -> Floats:
    """Log Bayes factors (floor, target) of noise of any shape, as far as residuals, and not the prior, tell its scale.

    The weight of the factor is the share of the residuals in the scale: residuals far below the floor have no shape.
    """
    found = np.empty(best.shape)
    for target, chosen in enumerate(best.T):
        for fit in np.unique(chosen):
            vectors, shrink, shares = fits[fit]
            leverage = 1 - vectors**2 @ shrink
            gain = noise_gain((y[:, target] - vectors @ (shrink * shares[:, target])) / np.sqrt(leverage))
            told = rest[fit, target] / (2 * rates + rest[fit, target])
            found[chosen == fit, target] = (told * gain)[chosen == fit]
    return found


def best_fit(
    x: Floats, target: int, causes: Sequence[int], *, kernels: Sequence[str], num_points: int, floor: float, seed: int
) -> tuple[Floats, Floats]:
    """Eigenvectors (row, rank) and shrinkage (rank,) of the most probable fit of a concept given its causes.

    The fit of values y (row,) is ``vectors @ (shrink * (vectors.T @ y))``. Arguments are as in `mechanism_scores`.
    """
    count, y = len(x), x[:, target]
    rows = np.random.default_rng(seed).permutation(count)[:num_points]
    rates = np.array([count / 2 * floor**2])
    fits = []
    for vectors, spread in _spectra(x[:, causes], rows, kernels):
        squares = (vectors.T @ y) ** 2
        for ratio in _RATIOS if len(spread) else _RATIOS[:1]:
            shrink = ratio * spread / (1 + ratio * spread)
            value = _student(np.array([y @ y - shrink @ squares]), count, rates)[0, 0]
            fits.append((value - 0.5 * np.log1p(ratio * spread).sum(), vectors, shrink))
    _, vectors, shrink = max(fits, key=lambda fit: fit[0])
    return vectors, shrink


def noise_gain(residual: Floats) -> float:
    """Log Bayes factor of noise of any shape in the grid against normal noise.

    Parameters
    ----------
    residual
        (row,), of which the root mean square is taken as the scale.
    """
    place = np.rint((residual / np.sqrt(np.mean(residual**2)) + _EDGE) / _STEP)
    counts = np.bincount(np.clip(place, 0, _places().size - 1).astype(int), minlength=_places().size)
    gains = _shapes() @ counts
    return float(logsumexp(gains) - math.log(len(gains)))


def _places() -> Floats:
    return np.arange(-_EDGE, _EDGE + _STEP / 2, _STEP)


@cache
def _shapes() -> Floats:
    """Log densities of noise of mean 0 and variance 1, less that of the normal one (shape, place)."""
    found = []
    for tail in _TAILS:
        for skew in _SKEWS:
            for sign in (1, -1) if skew else (1,):
                found.append(_standardised(partial(_sinh_arcsinh, skew=sign * skew, tail=tail), 400.0))
    found += [_standardised(partial(_power, power=power), 30.0) for power in _POWERS]
    return np.stack(found) + 0.5 * _places() ** 2 + 0.5 * math.log(2 * math.pi)


def _sinh_arcsinh(x: Floats, *, skew: float, tail: float) -> Floats:
    """Log density but for a constant, of which the sinh of ``tail arcsinh(x) - skew`` is normal."""
    inner = tail * np.arcsinh(x) - skew
    found: Floats = np.logaddexp(inner, -inner) - 0.5 * np.log1p(x**2) - 0.5 * np.sinh(np.clip(inner, -50, 50)) ** 2
    return found


def _power(x: Floats, *, power: float) -> Floats:
    found: Floats = -(np.abs(x) ** power)
    return found


def _standardised(log_density: Callable[[Floats], Floats], edge: float) -> Floats:
    """A log density moved and scaled to mean 0 and variance 1, at the places of the table."""
    grid = np.linspace(-edge, edge, 40_001)
    density = log_density(grid)
    weight = np.exp(density - density.max())
    total = weight.sum() * (grid[1] - grid[0])
    mean = (weight * grid).sum() / weight.sum()
    scale = math.sqrt((weight * (grid - mean) ** 2).sum() / weight.sum())
    moved = log_density(mean + scale * _places()) - density.max() - math.log(total / scale)
    return np.maximum(moved, _RAREST)


def _student(rest: Floats, count: int, rates: Floats) -> Floats:
    """Log densities (rate, ...) of rows whose residual forms are ``rest`` (...), variance integrated out, but for the
    determinant."""
    rate = rates[:, None]
    value = _SHAPE * np.log(rate) - gammaln(_SHAPE) + gammaln(_SHAPE + count / 2) - count / 2 * math.log(2 * math.pi)
    found: Floats = value - (_SHAPE + count / 2) * np.log(rate + rest / 2)
    return found


def _spectra(x: Floats, rows: NDArray[np.int64], kernels: Sequence[str]) -> Iterator[tuple[Floats, Floats]]:
    """Eigenvectors (row, rank) and eigenvalues of the kernels of a set of causes."""
    count, number = x.shape
    if number == 0:
        yield np.zeros((count, 0)), np.zeros(0)
        return
    linear = x / math.sqrt(number)
    for kernel in kernels:
        if kernel == "linear":
            yield _decompose(linear)
            continue
        if kernel == "joint" and number == 1 and "additive" in kernels:
            continue  # the same functions
        for length in _LENGTHS[kernel]:
            if kernel == "additive":
                parts = [
                    SmoothFeatures(x[rows[: max(12, len(rows) // number)]][:, [i]], length)(x[:, [i]])
                    for i in range(number)
                ]
                yield _decompose(np.concatenate([linear, *(part / math.sqrt(number) for part in parts)], 1))
            else:
                yield _decompose(np.concatenate([linear, SmoothFeatures(x[rows], length * math.sqrt(number))(x)], 1))


class SmoothFeatures:
    """Functions whose products approximate the squared exponential kernel, by inducing points (Nyström).

    Parameters
    ----------
    points
        (point, cause).
    length
        Length-scale of the kernel.
    """

    def __init__(self, points: Floats, length: float) -> None:
        self.points, self.length = points, length
        values, vectors = np.linalg.eigh(self._kernel(points))
        kept = values > _SMALL * values[-1]
        self.projection: Floats = vectors[:, kept] / np.sqrt(values[kept])

    def __call__(self, x: Floats) -> Floats:
        """Values (row, rank) at causes (row, cause)."""
        found: Floats = self._kernel(x) @ self.projection
        return found

    def _kernel(self, x: Floats) -> Floats:
        squared = (x**2).sum(1)[:, None] + (self.points**2).sum(1) - 2 * x @ self.points.T
        found: Floats = np.exp(-0.5 * np.maximum(squared, 0) / self.length**2)
        return found


def _decompose(features: Floats) -> tuple[Floats, Floats]:
    """Eigenvectors (row, rank) and eigenvalues of the products of features (row, feature)."""
    values, vectors = np.linalg.eigh(features.T @ features)
    kept = values > _SMALL * values[-1]
    return features @ (vectors[:, kept] / np.sqrt(values[kept])), values[kept]
