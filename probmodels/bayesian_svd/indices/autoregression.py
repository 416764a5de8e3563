"""The correlation of two persistent series, as the posterior of a joint autoregressive process.

Two series ``w_t = (x_t, y_t)`` of which each goes on from both,

    w_t - m = A (w_t-1 - m) + e_t,    e_t ~ N(0, S),

have the stationary covariance P = A P A' + S, whose correlation is sought. The process holds series of unlike decays:
one that is the other times a number and a persistent rest of its own is such a process, whatever the two decays.

The prior is flat in m, in the logs of the two standard deviations and in Fisher's z of the correlation r, which is the
prior whose intervals of a correlation of independent times are exact (Berger and Sun, 2008). In coordinates in which P
is the identity, where the process is stationary if A is a contraction, A has the density ``|I - AA'|^(-1/2)``: of one
series that is the reference prior of a decay, ``(1 - a^2)^(-1/2)`` (Berger and Yang, 1994). Priors that are flat in r
and A in place of these draw both towards zero, so that strong correlations of persistent series are missed. In A and S
the density is ``|S|^(-1/2) |P|^(-1) (1 - r^2)^(1/2) / J`` on stationary A, with the Jacobian
``J = (1 - det A) ((1 + det A)^2 - (tr A)^2)`` of ``S = P - A P A'`` at fixed A. The mean is integrated out of the
likelihood, of which the first value is a part: that keeps the decays from being underestimated as by least squares
(Cheang and Reinsel, 2000). Candidates are drawn from the posterior without the first value, with a free intercept and
the density ``|S|^(-3/2)``, which is normal inverse Wishart; of many one is kept, by its weight.

References
----------
Berger, J. O. and Sun, D. (2008). Objective priors for the bivariate normal model. Ann. Stat. 36.
https://doi.org/10.1214/07-AOS501

Berger, J. O. and Yang, R.-Y. (1994). Noninformative priors and Bayesian testing for the AR(1) model. Econom. Theory 10.

Cheang, W.-K. and Reinsel, G. C. (2000). Bias reduction of autoregressive estimates in time series regression model
through restricted maximum likelihood. J. Amer. Statist. Assoc. 95.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["LEAST_NEIGHBOURS", "neighbours", "stationary_correlation"]

Array = NDArray[np.float64]

LEAST_NEIGHBOURS = 8
"""Pairs of neighbouring times that the persistence of two series is told from."""

_CANDIDATES = 256  # of which one draw is kept
_BLOCK = 100_000  # candidates at a time
_RIDGE = 1e-6  # of the variance: series may be alike to the last digit


def neighbours(times: NDArray[np.int64]) -> NDArray[np.int64]:
    """Places of times (T,), ascending whole numbers, that the next one follows at their usual step."""
    gaps = np.diff(times)
    sizes, counts = np.unique(gaps, return_counts=True)
    return np.flatnonzero(gaps == sizes[np.argmax(counts)])


def stationary_correlation(x: Array, y: Array, near: NDArray[np.int64], rng: np.random.Generator) -> Array:
    """One draw of the correlation of the process for each row of x.

    Parameters
    ----------
    x, y
        Values (draw, T) and (T,).
    near
        From `neighbours`, at least `LEAST_NEIGHBOURS`.
    rng
        Source of randomness.

    Returns
    -------
    np.ndarray
        Shape (draw,).
    """
    rows = max(1, _BLOCK // _CANDIDATES)
    return np.concatenate([_drawn(x[i : i + rows], y, near, rng) for i in range(0, len(x), rows)])


def _drawn(x: Array, y: Array, near: NDArray[np.int64], rng: np.random.Generator) -> Array:
    w = np.stack([x, np.broadcast_to(y, x.shape)], axis=-1)
    w = w - w.mean(1, keepdims=True)
    w = w / np.maximum(np.sqrt((w**2).mean(1, keepdims=True)), 1e-300)
    before, after = w[:, near], w[:, near + 1]
    count = len(near)
    means = before.mean(1), after.mean(1)
    own, other = before - means[0][:, None], after - means[1][:, None]
    ridge = _RIDGE * count * np.eye(2)
    gram = np.einsum("sti,stj->sij", own, own) + ridge
    least = np.einsum("sti,stj->sij", other, own) @ np.linalg.inv(gram)
    rest = other - np.einsum("sij,stj->sti", least, own)
    scatter = np.einsum("sti,stj->sij", rest, rest) + ridge
    a, s = _candidates(least, gram, scatter, count - 3, rng)
    p = _stationary(a, s)
    weight = _log_weight(a, s, p, w[:, 0], *means, count)
    weight += rng.gumbel(size=weight.shape)  # the largest is a draw by weight
    kept = np.take_along_axis(p, np.argmax(weight, axis=1)[:, None, None, None], axis=1)[:, 0]
    return np.asarray(kept[:, 0, 1] / np.sqrt(kept[:, 0, 0] * kept[:, 1, 1]))


def _candidates(
    least: Array, gram: Array, scatter: Array, degrees: int, rng: np.random.Generator
) -> tuple[Array, Array]:
    """Coefficients and covariances of innovations (draw, candidate, 2, 2) without the first value."""
    shape = (len(least), _CANDIDATES)
    lower = np.zeros((*shape, 2, 2))  # Bartlett's decomposition of a Wishart draw
    lower[..., 0, 0] = np.sqrt(rng.chisquare(degrees, shape))
    lower[..., 1, 1] = np.sqrt(rng.chisquare(degrees - 1, shape))
    lower[..., 1, 0] = rng.standard_normal(shape)
    root = np.linalg.inv(np.linalg.cholesky(np.linalg.inv(scatter))[:, None] @ lower).swapaxes(-1, -2)
    spread = np.linalg.cholesky(np.linalg.inv(gram))[:, None]
    return least[:, None] + root @ rng.standard_normal((*shape, 2, 2)) @ spread.swapaxes(-1, -2), root @ (
        root.swapaxes(-1, -2)
    )


def _is_stationary(a: Array) -> NDArray[np.bool_]:
    """Whether both eigenvalues of 2 × 2 matrices are within the unit circle (Jury's conditions)."""
    trace, determinant = np.trace(a, axis1=-2, axis2=-1), np.linalg.det(a)
    return np.asarray((np.abs(determinant) < 1 - 1e-6) & (np.abs(trace) < 1 + determinant - 1e-9))


def _stationary(a: Array, s: Array) -> Array:
    """Solution P of P = A P A' + S; S where the process is not stationary."""
    inside = _is_stationary(a)
    kept, own = a[inside], s[inside]
    product = np.einsum("nik,njl->nijkl", kept, kept).reshape(-1, 4, 4)
    out = s.copy()
    out[inside] = np.linalg.solve(np.eye(4) - product, own.reshape(-1, 4, 1)).reshape(-1, 2, 2)
    return out


def _log_weight(a: Array, s: Array, p: Array, first: Array, before: Array, after: Array, count: int) -> Array:
    """Log of the posterior, with the first value and without the mean, over that which candidates were drawn from."""
    inverse, own = np.linalg.inv(s), np.linalg.inv(p)
    gap = after[:, None] - np.einsum("snij,sj->sni", a, before)  # mean of what the process leaves
    away = np.eye(2) - a
    known = away.swapaxes(-1, -2) @ inverse
    precision = own + count * known @ away
    linear = np.einsum("snij,sj->sni", own, first) + count * np.einsum("snij,snj->sni", known, gap)
    square = np.einsum("si,snij,sj->sn", first, own, first) + count * np.einsum("sni,snij,snj->sn", gap, inverse, gap)
    square -= (linear * np.linalg.solve(precision, linear[..., None])[..., 0]).sum(-1)
    size = np.linalg.det(p)
    found = -0.5 * (np.log(size) + np.log(np.linalg.det(precision)) + square)
    found += _log_prior(a, s, p) + 1.5 * np.log(np.linalg.det(s))
    return np.where(_is_stationary(a), found, -1e300)


def _log_prior(a: Array, s: Array, p: Array) -> Array:
    """Log density of the prior in A and S, up to a constant; of no meaning where the process is not stationary."""
    size, root = np.linalg.det(p), np.linalg.det(a)
    trace = np.trace(a, axis1=-2, axis2=-1)
    away = np.maximum((1 - root) * ((1 + root) ** 2 - trace**2), 1e-300)
    found = 0.5 * np.log(size / (p[..., 0, 0] * p[..., 1, 1])) - np.log(size) - 0.5 * np.log(np.linalg.det(s))
    return np.asarray(found - np.log(away))
