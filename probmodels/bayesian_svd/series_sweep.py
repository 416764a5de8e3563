"""One sweep of the block sampler where series are a process in time, compiled.

The conventions are those of `probmodels.bayesian_svd.sweep`: frames by rows, plain arrays in reduced coordinates. Modes
are ``d_i u_i f_i'`` with orthonormal patterns u_i and series f_i of unit variance, independent normal processes whose
precision matrices are banded (`probmodels.bayesian_svd.banded`), one of G candidates each. Noise that persists in time
is white after a filter L, the root of its tridiagonal precision: the data ``z (ru, T)`` are filtered already. Local
effects of flat prior are integrated out by M = I - DD', D the orthonormal filtered design: the data are projected
already.
``docs/bayesian_svd.md`` derives the steps.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from probmodels.bayesian_svd.banded import back, factor, precision_times, quadratic, room, solve
from probmodels.bayesian_svd.sweep import (
    JIT,
    backward,
    cholesky,
    forward,
    grams_of,
    log_minors_of,
    log_prior,
    log_prior_pair,
    positive_normal,
    relabel,
    rotate,
    update_column,
)

__all__ = ["draw_all_series", "sweep"]

_WINDOW = 8  # candidates among which a decay is drawn at a time


@njit(**JIT)
def _filter(filter_, x, out):
    """L times a series (T,): what is new at each time, in units of the noise's persistence."""
    phi, root = filter_[0], filter_[1]
    out[0] = x[0]
    for t in range(1, x.shape[0]):
        out[t] = (x[t] - phi[t - 1] * x[t - 1]) / root[t - 1]


@njit(**JIT)
def _filter_transposed(filter_, x, out):
    """L' times a series (T,)."""
    phi, root = filter_[0], filter_[1]
    size = x.shape[0]
    out[0] = x[0]
    for t in range(1, size):
        out[t] = x[t] / root[t - 1]
    for t in range(size - 1):
        out[t] -= phi[t] / root[t] * x[t + 1]


@njit(**JIT)
def _condition(prior, weight, linear, filter_, effects, mean, spread, inner, along, lower):
    """A series given data: precision ``Q = P + weight L'(I - DD')L``, linear term ``linear``; P banded.

    With E = L'D, fills ``mean`` = A^-1 linear where A = P + weight L'L, ``spread (q, T)`` = A^-1 E by rows, ``inner
    (q, q)`` the Cholesky factor of S = I / weight - E'A^-1 E, and ``along (q,)`` = E' mean. The mean of the series is
    ``mean + spread' S^-1 along``, its covariance A^-1 + spread' S^-1 spread. S is formed without cancellation, as
    E'A^-1 P L^-1 D / weight. Returns the log density of the data up to terms that are free of P.
    """
    pulled, lifted = effects[1], effects[2]
    num_effects, size = pulled.shape
    bands, two = prior[0], prior[0].shape[0] == 2
    logdet = factor(bands, weight, filter_, lower)
    mean[:] = linear
    solve(lower, two, mean)
    value = 0.5 * (prior[1] - logdet + np.dot(linear, mean))
    if num_effects == 0:
        return value
    image = np.empty(size)
    for a in range(num_effects):
        spread[a] = pulled[a]
        solve(lower, two, spread[a])
        along[a] = np.dot(pulled[a], mean)
    for a in range(num_effects):
        precision_times(bands, lifted[a], image)
        for b in range(a, num_effects):
            inner[b, a] = np.dot(spread[b], image) / weight
    logdet_inner = cholesky(inner, num_effects)
    # log det of Q is that of A plus that of weight * S.
    value -= 0.5 * (logdet_inner + num_effects * math.log(weight))
    half = along.copy()
    forward(inner, num_effects, half)
    return value + 0.5 * np.dot(half, half)


@njit(**JIT)
def _choose(rng, scores):
    """A place, drawn with probability proportional to exp(scores)."""
    weights = np.exp(scores - scores.max())
    level = rng.random() * weights.sum()
    place = 0
    while place < len(weights) - 1 and (level > weights[place] or weights[place] == 0.0):
        level -= weights[place]
        place += 1
    return place


@njit(**JIT)
def _seen(f, design):
    """f'Mf: the square of what of a filtered series lies outside of the design (q, T)."""
    square = np.dot(f, f)
    for a in range(design.shape[0]):
        along = np.dot(design[a], f)
        square -= along * along
    return square


@njit(**JIT)
def _draw_series(rng, i, y, d, noise, process, h, filter_, effects, f):
    """Draw the decay (an index, returned) and the series ``f (T,)`` of mode i, given the data along its pattern ``y``.

    The series is integrated out where the decay is chosen, from a window of candidates that lies at random about the
    present one.
    """
    bands, log_dets, log_weights = process
    num_candidates, _, size = bands.shape
    num_effects = len(effects[0])
    weight = d * d / noise
    linear = np.empty(size)
    _filter_transposed(filter_, y * (d / noise), linear)
    mean, lower = np.empty(size), room(bands[0])
    spread = np.empty((num_effects, size))
    inner = np.empty((num_effects, num_effects))
    along = np.empty(num_effects)
    if num_candidates > 1:
        first = h - int(_WINDOW * rng.random())
        scores = np.full(_WINDOW, -np.inf)
        for w in range(_WINDOW):
            g = first + w
            if 0 <= g < num_candidates and log_weights[i, g] > -np.inf:
                scores[w] = log_weights[i, g] + _condition(
                    (bands[g], log_dets[g]), weight, linear, filter_, effects, mean, spread, inner, along, lower
                )
        h = first + _choose(rng, scores)
    prior = (bands[h], log_dets[h])
    _condition(prior, weight, linear, filter_, effects, mean, spread, inner, along, lower)
    # A^-1/2 noise: L' x = D^-1/2 e.
    two = bands.shape[1] == 2
    for t in range(size):
        f[t] = rng.standard_normal() / math.sqrt(lower[0, t] if two else lower[t, 0])
    back(lower, two, f)
    for t in range(size):
        f[t] += mean[t]
    if num_effects > 0:  # S^-1 along + S^-1/2 noise, through the Cholesky factor of S
        part = along.copy()
        forward(inner, num_effects, part)
        for a in range(num_effects):
            part[a] += rng.standard_normal()
        backward(inner, num_effects, part)
        for a in range(num_effects):
            for t in range(size):
                f[t] += part[a] * spread[a, t]
    return h


@njit(**JIT)
def _von_mises(rng, concentration):
    """An angle of density proportional to exp(concentration cos angle), by Best and Fisher (1979)."""
    if concentration < 1e-8:
        return math.pi * (2.0 * rng.random() - 1.0)
    if concentration > 1e6:  # rejection loses its digits; the angle is normal by then
        return rng.standard_normal() / math.sqrt(concentration)
    tau = 1.0 + math.sqrt(1.0 + 4.0 * concentration * concentration)
    rho = (tau - math.sqrt(2.0 * tau)) / (2.0 * concentration)
    r = (1.0 + rho * rho) / (2.0 * rho)
    while True:
        z = math.cos(math.pi * rng.random())
        f = (1.0 + r * z) / (r + z)
        c = concentration * (r - f)
        u = rng.random()
        if c * (2.0 - c) - u > 0.0 or math.log(c / u) + 1.0 - c >= 0.0:
            f = min(max(f, -1.0), 1.0)
            return math.acos(f) if rng.random() < 0.5 else -math.acos(f)


@njit(**JIT)
def _turn(m, a, b, c, s, ratio):
    """New rows and columns a, b of m (k, k) where f_a <- c f_a + s ratio f_b and f_b <- c f_b - s / ratio f_a."""
    for j in range(m.shape[0]):
        x, y = m[a, j], m[b, j]
        m[a, j] = c * x + s * ratio * y
        m[b, j] = c * y - s / ratio * x
    for j in range(m.shape[0]):
        x, y = m[j, a], m[j, b]
        m[j, a] = c * x + s * ratio * y
        m[j, b] = c * y - s / ratio * x


@njit(**JIT)
def _rotations(rng, space, series, d, scale, process, candidates, num_passes, accepted):
    """Rotations of pairs of modes at a fixed signal, and label swaps.

    Patterns turn by an angle, series by what leaves the signal as it is. Given both decays the prior of the series is
    von Mises in twice the angle, from which the angle is drawn; the prior of the patterns accepts or refuses. After the
    Gram matrices are formed all is k x k algebra.
    """
    u, g_u, log_tau, images = space
    f, decay = series
    values, log_weights = candidates[0], candidates[2]
    bands, _, log_weights_series = process
    k, ru = u.shape
    size = f.shape[1]
    grams = np.empty((2, k, k, k))
    trial = np.empty((2, k, k, k))
    quad = np.empty((k, k, k))  # f_a' P_j f_b
    work = np.empty((k, k))
    image = np.empty(size)
    grams_of(images, values, g_u, grams[0], grams[1])
    for j in range(k):
        for a in range(k):
            precision_times(bands[decay[j]], f[a], image)
            for b in range(k):
                quad[j, a, b] = np.dot(f[b], image)
    turn_u = np.eye(k)
    turn_f = np.eye(k)
    for step in range(num_passes):
        for a in range(k - 1):
            for b in range(a + 1, k):
                r = d[b] / d[a]
                x = 0.25 * (r * r * quad[a, b, b] + quad[b, a, a] / (r * r) - quad[a, a, a] - quad[b, b, b])
                y = 0.5 * (quad[b, a, b] / r - r * quad[a, a, b])
                size_xy = math.hypot(x, y)
                if step % 2 == 0:  # anew, from the prior of the series
                    angle = 0.5 * (math.atan2(y, x) + _von_mises(rng, size_xy))
                    if rng.random() < 0.5:
                        angle += math.pi
                    log_ratio = 0.0
                else:  # a small step
                    angle = rng.standard_normal() * 2.0 * math.exp(-5.0 * rng.random()) / math.sqrt(1.0 + size_xy)
                    log_ratio = x * (math.cos(2.0 * angle) - 1.0) + y * math.sin(2.0 * angle)
                c, s = math.cos(angle), math.sin(angle)
                log_ratio += log_prior_pair(grams[0], grams[1], a, b, c, s, ru, work)
                log_ratio -= log_prior_pair(grams[0], grams[1], a, b, 1.0, 0.0, ru, work)
                accepted[0, 1] += 1
                if not math.log(rng.random()) < log_ratio:
                    continue
                accepted[0, 0] += 1
                for j in range(k):
                    rotate(grams[0, j], a, b, c, s, True, True)
                    rotate(grams[1, j], a, b, c, s, True, True)
                    _turn(quad[j], a, b, c, s, r)
                rotate(turn_u, a, b, c, s, True, False)
                for j in range(k):
                    p, q = turn_f[a, j], turn_f[b, j]
                    turn_f[a, j] = c * p + s * r * q
                    turn_f[b, j] = c * q - s / r * p
    p = np.arange(k)
    if k > 1 and num_passes > 0:
        a = int(k * rng.random())
        b = int(k * rng.random())
        if a != b:
            p[a], p[b] = b, a
            trial[0] = relabel(grams[0], p)
            trial[1] = relabel(grams[1], p)
            log_ratio = log_prior(trial[0], trial[1], log_weights, g_u[p], ru, work)
            log_ratio -= log_prior(grams[0], grams[1], log_weights, g_u, ru, work)
            for j in range(k):
                log_ratio += log_weights_series[j, decay[p[j]]] - log_weights_series[j, decay[j]]
            accepted[1, 1] += 1
            if math.log(rng.random()) < log_ratio:
                accepted[1, 0] += 1
                grams[:] = trial
                quad[:] = relabel(quad, p)
                d[:] = d[p]
                scale[:] = scale[p]
                g_u[:] = g_u[p]
                decay[:] = decay[p]
                turn_u = turn_u[p]
                turn_f = turn_f[p]
                images[:] = images[p]
    u[:] = np.dot(turn_u, u)
    f[:] = np.dot(turn_f, f)
    for j in range(k):
        images[j] = np.dot(turn_u, images[j])
        log_tau[j] = math.log(rng.standard_gamma(0.5 * (ru - j)) * 2.0 / grams[0, j, j, j])


@njit(**JIT)
def _rescale(rng, f, decay, d, scale, process):
    """Draw decay and scale of each mode at a fixed signal: (a d_i, f_i / a).

    The scale is integrated out where the decay is chosen, its prior taken for flat; the prior accepts or refuses. Where
    noise is small, data fix the signal, and decay and scale given all else would hold each other.
    """
    bands, log_dets, log_weights = process
    num_candidates, width, size = bands.shape
    quads = np.empty(num_candidates)
    scores = np.empty(num_candidates)
    products = np.zeros((width, size))
    for i in range(d.shape[0]):
        for j in range(min(width, size)):
            for t in range(size - j):
                products[j, t] = f[i, t] * f[i, t + j]
        for g in range(num_candidates):
            quads[g] = quadratic(bands[g], products)
            scores[g] = log_weights[i, g] + 0.5 * log_dets[g] - 0.5 * (size - 1) * math.log(quads[g])
        h = _choose(rng, scores)
        a = math.sqrt(0.5 * quads[h] / rng.standard_gamma(0.5 * (size - 1)))
        if math.log(rng.random()) < 0.5 * (1.0 - a * a) * (d[i] / scale[i]) ** 2:
            decay[i] = h
            d[i] *= a
            for t in range(size):
                f[i, t] /= a


@njit(**JIT)
def sweep(
    rng, data, filter_, effects, space, series, d, noise, candidates, process, prior, num_steps, num_passes, accepted
):
    """One sweep over all parameters, in place; returns the new noise variance.

    Parameters
    ----------
    rng
        NumPy generator.
    data
        ``z (ru, T)``, filtered along time, projected off the design where effects are flat, and its transpose, both
        contiguous; squared norm of the data before reduction; number of free entries.
    filter_
        L: correlation of the noise between neighbouring times and the root of one less its square (T-1,), both; then
        the diagonal (T,) of L'L and what is beside it (T-1,). Noise that is white has the correlation zero.
    effects
        Rows (q, T) of the effects that are integrated out: orthonormal ones D of the filtered design, L'D, L^-1 D.
    space, series
        State of the patterns: frame (k, ru), candidates (k,), log_tau (k,), images (k, k, ru); and of the series
        (k, T), decays or length-scales (k,) as places in the grid.
    d, noise
        Standard deviations of the modes (k,) and noise variance.
    candidates, process
        Of the patterns as in `probmodels.bayesian_svd.sweep.sweep`; of the series the bands (G, p + 1, T)
        of their precisions, the log determinants of these (G,), and log prior weights (k, G).
    prior
        HalfNormal scales of d (k,), which label swaps move with it; shape and rate of the InverseGamma prior of the
        noise variance.
    num_steps, num_passes
        Steps of the inner kernel in a column update; passes of the rotation block over all pairs.
    accepted
        Counts (3, 2) of accepted and tried moves: rotations, swaps, columns.
    """
    z, z_transposed, total, count = data
    scale, noise_shape, noise_rate = prior
    u, g_u, log_tau, images = space
    f, decay = series
    k = len(f)
    minors = log_minors_of(images, candidates[0], g_u)
    lengths = np.empty(k)
    sizes = np.empty(k)
    design = effects[0]
    new = np.empty(f.shape[1])
    for i in range(k):
        y = np.dot(z_transposed, u[i])
        decay[i] = _draw_series(rng, i, y, d[i], noise, process, decay[i], filter_, effects, f[i])
        _filter(filter_, f[i], new)
        square = _seen(new, design)
        lengths[i] = math.sqrt(max(square, 1e-300))
        sizes[i] = d[i] * lengths[i]
        y = np.dot(z, new) / lengths[i]
        if update_column(
            rng, i, y, u, g_u, log_tau, images, minors, sizes, noise, candidates, scale[i] * lengths[i], num_steps
        ):
            accepted[2, 0] += 1
        accepted[2, 1] += 1
        d[i] = sizes[i] / lengths[i]
    _rotations(rng, space, series, d, scale, process, candidates, num_passes, accepted)
    _rescale(rng, f, decay, d, scale, process)
    residual = total
    for i in range(k):  # exact: the residual separates over modes since patterns are orthonormal
        _filter(filter_, f[i], new)
        square = _seen(new, design)
        product = np.dot(u[i], np.dot(z, new))
        precision = square / noise + 1.0 / (scale[i] * scale[i])
        d[i] = positive_normal(rng, product / noise / precision, 1.0 / math.sqrt(precision))
        residual += d[i] * d[i] * square - 2.0 * d[i] * product
    return (noise_rate + 0.5 * residual) / rng.standard_gamma(noise_shape + 0.5 * count)


@njit(**JIT)
def draw_all_series(rng, z_transposed, filter_, effects, u, d, noise, process, series):
    """Draw decays and series of all modes given patterns, d and noise, in place; arguments as of `sweep`."""
    f, decay = series
    for i in range(len(f)):
        y = np.dot(z_transposed, u[i])
        decay[i] = _draw_series(rng, i, y, d[i], noise, process, decay[i], filter_, effects, f[i])
