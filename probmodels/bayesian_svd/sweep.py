"""One sweep of the exact block sampler, compiled.

Everything here is plain arrays in the reduced coordinates of the model (see `probmodels.bayesian_svd.model`); the
kernel that calls it is `probmodels.bayesian_svd.sampler.BlockGibbs`, and ``docs/bayesian_svd.md`` derives each step.

Conventions. A *side* is the space side (frame U) or the time side (frame V). A frame is stored by rows, ``(k, r)``:
row i holds mode i in base coordinates. ``values (G, r)`` and ``vectors (G, r, r)`` are the eigenpairs of the G
candidate covariances; ``vectors`` has length 0 along its first axis where all candidates are diagonal already.
``images (k, k, r)`` keeps ``images[j] = frame @ vectors[g[j]]``, all modes in the eigenbasis of mode j. ``log_tau``
is the log of the scale-mixture variable of each *unit* vector.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

__all__ = [
    "JIT",
    "backward",
    "best_log_tau",
    "cholesky",
    "column_images",
    "forward",
    "grams_of",
    "log_minors_of",
    "log_prior",
    "log_prior_pair",
    "positive_normal",
    "relabel",
    "rotate",
    "sweep",
    "update_column",
]

Array = NDArray[np.float64]

# Reassociated sums vectorise; NaN and infinity keep their meaning, on which the failure of a Cholesky step relies.
JIT: dict[str, Any] = {"cache": True, "nogil": True, "fastmath": {"reassoc", "contract", "arcp", "nsz"}}


@njit(**JIT)
def cholesky(a, q):
    """Lower Cholesky factor of the leading q x q block, in place; log-determinant of the block, -inf on failure."""
    logdet = 0.0
    for i in range(q):
        for j in range(i + 1):
            s = a[i, j]
            for c in range(j):
                s -= a[i, c] * a[j, c]
            if i == j:
                if not s > 0.0:
                    return -np.inf
                a[i, i] = math.sqrt(s)
                logdet += math.log(s)
            else:
                a[i, j] = s / a[j, j]
    return logdet


@njit(**JIT)
def forward(a, q, x):
    for i in range(q):
        s = x[i]
        for c in range(i):
            s -= a[i, c] * x[c]
        x[i] = s / a[i, i]


@njit(**JIT)
def backward(a, q, x):
    for i in range(q - 1, -1, -1):
        s = x[i]
        for c in range(i + 1, q):
            s -= a[c, i] * x[c]
        x[i] = s / a[i, i]


@njit(**JIT)
def _dot3(x, y, w):
    s = 0.0
    for j in range(x.shape[0]):
        s += x[j] * y[j] * w[j]
    return s


@njit(**JIT)
def _image(rows, vectors, g):
    """Rows (q, r) in the eigenbasis of candidate g."""
    if vectors.shape[0] == 0:
        return rows.copy()
    return np.dot(rows, vectors[g])


@njit(**JIT)
def _log_minor(image, values, q, work):
    """Log-determinant of the leading q x q block of frame' Omega frame, Omega given by its eigenvalues."""
    for a in range(q):
        for b in range(a + 1):
            work[a, b] = _dot3(image[a], image[b], values)
    return cholesky(work, q)


@njit(**JIT)
def _prepare(i, frame, y, values, vectors, g, cols, yhat, products, work):
    """Everything about column i that depends on the candidate g alone.

    Fills ``cols`` (k-1, r) and ``yhat`` (r) (the other columns and y in the eigenbasis) and ``products`` (their
    pairwise products, one row each, so that all weighted Gram entries are one matrix-vector product); returns the log
    prior term ``0.5 logdet(C' Omega C)`` of the columns before i.
    """
    k, r = frame.shape
    rows = np.empty((k, r))
    q = 0
    for a in range(k):
        if a != i:
            rows[q] = frame[a]
            q += 1
    rows[k - 1] = y
    image = _image(rows, vectors, g)
    lam = values[g]
    p = 0
    for a in range(k - 1):
        for b in range(a + 1):
            for j in range(r):
                products[p, j] = image[a, j] * image[b, j]
            p += 1
    for a in range(k):  # the last of these rows is yhat squared
        for j in range(r):
            products[p, j] = image[a, j] * image[k - 1, j]
        p += 1
    cols[:] = image[: k - 1]
    yhat[:] = image[k - 1]
    p = 0
    for a in range(i):
        for b in range(a + 1):
            s = 0.0
            for j in range(r):
                s += products[p, j] * lam[j]
            work[a, b] = s
            p += 1
    return 0.5 * cholesky(work, i)


@njit(**JIT)
def _marginal(lam, log_tau, noise, products, num_before, shrink, precision, gram, work):
    """Log marginal of y and of the constraint C'f = 0 with f integrated out, up to terms free of (candidate, tau).

    Fills ``shrink`` = a / (a + noise) with a = lam / tau, and ``gram``, the Cholesky factor of C' diag(shrink) C. Also
    returns the expectation of |f|^2 without the constraint, at which the surrogate of the prior of |f| is evaluated.
    """
    r = lam.shape[0]
    q = gram.shape[0]
    inv_tau = math.exp(-log_tau)
    logdet = 0.0
    product = 1.0
    sum_shrink = 0.0
    for j in range(r):
        a = lam[j] * inv_tau
        v = a + noise
        precision[j] = 1.0 / v
        shrink[j] = a / v
        sum_shrink += shrink[j]
    for start in range(0, r, 4):  # one logarithm for four factors
        product = 1.0
        for j in range(start, min(start + 4, r)):
            product *= precision[j]
        logdet -= math.log(product)
    sums = np.dot(products, shrink)
    last = products.shape[0] - 1
    quad = 0.0
    squared = 0.0
    for j in range(r):
        quad += products[last, j] * precision[j]
        squared += products[last, j] * shrink[j] * shrink[j]
    p = 0
    for a in range(q):
        for b in range(a + 1):
            gram[a, b] = sums[p]
            p += 1
    for a in range(q):
        work[a] = sums[p + a]
    logdet_gram = cholesky(gram, q)
    if not logdet_gram > -np.inf:
        return -np.inf, squared + noise * sum_shrink
    forward(gram, q, work)
    for a in range(q):
        quad += work[a] * work[a] / noise
    value = -0.5 * (logdet + logdet_gram + quad + num_before * log_tau)
    return value, squared + noise * sum_shrink


@njit(**JIT)
def _log_size(d, scale, power):
    """Log prior of |f| = d beyond the Gaussian: HalfNormal(scale) times the power left from the polar coordinates."""
    return -0.5 * (d / scale) ** 2 + power * math.log(d)


@njit(**JIT)
def _leave_others(frame, i, x):
    """Remove from x, in place, what lies along the columns of a frame other than i."""
    for a in range(frame.shape[0]):
        if a != i:
            s = np.dot(frame[a], x)
            for j in range(x.shape[0]):
                x[j] -= s * frame[a, j]


@njit(**JIT)
def update_column(rng, i, y, frame, g, log_tau, images, log_minors, d, noise, candidates, scale, num_steps):
    """Draw (length-scale, tau, d_i, u_i) of column i from their joint conditional; true where the draw is accepted."""
    k, r = frame.shape
    values, vectors, log_weights, offset = candidates
    num_candidates = values.shape[0]
    _leave_others(frame, i, y)  # only the part of y outside the other columns matters; removing the rest keeps digits
    num_products = k * (k + 1) // 2
    cols = np.empty((2, k - 1, r))
    yhat = np.empty((2, r))
    products = np.empty((2, num_products, r))
    prior = np.empty(2)
    shrink = np.empty(r)
    precision = np.empty(r)
    gram = np.empty((k - 1, k - 1))
    work = np.empty((k, k))
    rhs = np.empty(k)
    power = float(k - i)
    here = 0
    gi = g[i]
    lt = log_tau[i] - 2.0 * math.log(d[i])  # from the unit vector to the vector f of length d
    prior[0] = _prepare(i, frame, y, values, vectors, gi, cols[0], yhat[0], products[0], work) + log_weights[i, gi]
    value, size2 = _marginal(values[gi], lt, noise, products[0], i, shrink, precision, gram, rhs)
    surrogate = _log_size(math.sqrt(size2), scale, power)
    current = value + prior[0] + surrogate
    log_ratio = surrogate - _log_size(d[i], scale, power)
    for _ in range(num_steps):  # a power of one reversible kernel on (candidate, log tau), f integrated out
        step = rng.standard_normal() * 0.05 * math.exp(3.4 * rng.random())
        move = num_candidates > 1 and rng.random() < 0.3
        there = here
        gn = gi
        ltn = lt + step
        if move:
            jump = 1 if rng.random() < 0.6 else 1 + int(rng.random() ** 3 * (num_candidates - 1))
            if rng.random() < 0.5:
                jump = -jump
            gn = gi + jump
            if gn < 0 or gn >= num_candidates or not log_weights[i, gn] > -np.inf:
                continue
            ltn += offset[i, gn] - offset[i, gi]
            there = 1 - here
            prior[there] = log_weights[i, gn] + _prepare(
                i, frame, y, values, vectors, gn, cols[there], yhat[there], products[there], work
            )
        value, size2 = _marginal(values[gn], ltn, noise, products[there], i, shrink, precision, gram, rhs)
        proposed = value + prior[there] + _log_size(math.sqrt(size2), scale, power)
        if math.log(rng.random()) < proposed - current:
            gi, lt, current, here = gn, ltn, proposed, there
    value, size2 = _marginal(values[gi], lt, noise, products[here], i, shrink, precision, gram, rhs)
    log_ratio -= _log_size(math.sqrt(size2), scale, power)

    # f | y and C'f = 0: an independent Gaussian in the eigenbasis, corrected onto the constraint by kriging.
    f = np.empty(r)
    for j in range(r):
        f[j] = shrink[j] * yhat[here, j] + math.sqrt(noise * shrink[j]) * rng.standard_normal()
    for a in range(k - 1):
        rhs[a] = np.dot(cols[here, a], f)
    forward(gram, k - 1, rhs)
    backward(gram, k - 1, rhs)
    for a in range(k - 1):
        for j in range(r):
            f[j] -= shrink[j] * cols[here, a, j] * rhs[a]
    size = math.sqrt(np.dot(f, f))
    for j in range(r):
        f[j] /= size
    u = np.dot(vectors[gi], f) if vectors.shape[0] > 0 else f
    _leave_others(frame, i, u)  # rounding alone would let the columns drift apart
    s = math.sqrt(np.dot(u, u))
    for j in range(r):
        u[j] /= s

    log_ratio += _log_size(size, scale, power)
    old = np.empty((k, r))
    new_minors = log_minors.copy()
    for j in range(k):
        old[j] = images[j, i]
    row = u.reshape(1, r)
    for j in range(i + 1, k):
        images[j, i] = _image(row, vectors, g[j])[0]
        new_minors[j] = _log_minor(images[j], values[g[j]], j, work)
        log_ratio += 0.5 * (new_minors[j] - log_minors[j])
    if not math.log(rng.random()) < log_ratio:
        for j in range(i + 1, k):
            images[j, i] = old[j]
        return False
    frame[i] = u
    d[i] = size
    log_tau[i] = lt + 2.0 * math.log(size)
    for j in range(i):
        images[j, i] = _image(row, vectors, g[j])[0]
    if gi != g[i]:
        g[i] = gi
        images[i] = _image(frame, vectors, gi)
    else:
        images[i, i] = f
    log_minors[:] = new_minors
    log_minors[i] = _log_minor(images[i], values[gi], i, work)
    return True


@njit(**JIT)
def best_log_tau(i, y, frame, values, vectors, noise, lowest, highest):
    """The log_tau of the vector f of column i that fits y best, for each candidate, by golden-section search; (G,)."""
    k, r = frame.shape
    cols = np.empty((k - 1, r))
    yhat = np.empty(r)
    products = np.empty((k * (k + 1) // 2, r))
    shrink = np.empty(r)
    precision = np.empty(r)
    gram = np.empty((k - 1, k - 1))
    work = np.empty((k, k))
    rhs = np.empty(k)
    out = np.empty(values.shape[0])
    golden = 0.5 * (math.sqrt(5.0) - 1.0)
    for g in range(values.shape[0]):
        _prepare(i, frame, y, values, vectors, g, cols, yhat, products, work)
        low, high = lowest, highest
        a = high - golden * (high - low)
        b = low + golden * (high - low)
        at_a, _ = _marginal(values[g], a, noise, products, i, shrink, precision, gram, rhs)
        at_b, _ = _marginal(values[g], b, noise, products, i, shrink, precision, gram, rhs)
        while high - low > 0.01:
            if at_a > at_b:
                high, b, at_b = b, a, at_a
                a = high - golden * (high - low)
                at_a, _ = _marginal(values[g], a, noise, products, i, shrink, precision, gram, rhs)
            else:
                low, a, at_a = a, b, at_b
                b = low + golden * (high - low)
                at_b, _ = _marginal(values[g], b, noise, products, i, shrink, precision, gram, rhs)
        out[g] = 0.5 * (low + high)
    return out


@njit(**JIT)
def column_images(frame, vectors, g):
    """All modes in the eigenbasis of each mode, (k, k, r)."""
    k, r = frame.shape
    images = np.empty((k, k, r))
    for j in range(k):
        images[j] = _image(frame, vectors, g[j])
    return images


@njit(**JIT)
def grams_of(images, values, g, precision, covariance):
    """frame' Lambda_j frame and frame' Omega_j frame for each mode j, (k, k, k)."""
    k = images.shape[0]
    for j in range(k):
        lam = values[g[j]]
        inv = 1.0 / lam
        for a in range(k):
            for b in range(a + 1):
                precision[j, a, b] = _dot3(images[j, a], images[j, b], inv)
                covariance[j, a, b] = _dot3(images[j, a], images[j, b], lam)
                precision[j, b, a] = precision[j, a, b]
                covariance[j, b, a] = covariance[j, a, b]


@njit(**JIT)
def rotate(m, a, b, c, s, rows, cols):
    """Givens rotation of rows and columns a, b of m: new a = c a + s b, new b = c b - s a."""
    if rows:
        for j in range(m.shape[1]):
            x, y = m[a, j], m[b, j]
            m[a, j] = c * x + s * y
            m[b, j] = c * y - s * x
    if cols:
        for j in range(m.shape[0]):
            x, y = m[j, a], m[j, b]
            m[j, a] = c * x + s * y
            m[j, b] = c * y - s * x


@njit(**JIT)
def _minor(m, q, work):
    for a in range(q):
        for b in range(a + 1):
            work[a, b] = m[a, b]
    return cholesky(work, q)


@njit(**JIT)
def log_prior_pair(precision, covariance, a, b, c, s, r, work):
    """The terms of the sequential prior that a rotation (c, s) of columns a < b can change, after that rotation."""
    p = precision[a]
    out = -0.5 * (r - a) * math.log(c * c * p[a, a] + 2.0 * c * s * p[a, b] + s * s * p[b, b])
    p = precision[b]
    out -= 0.5 * (r - b) * math.log(s * s * p[a, a] - 2.0 * c * s * p[a, b] + c * c * p[b, b])
    for j in range(a + 1, b + 1):  # minors that hold a but not b; those with both are invariant
        h = covariance[j]
        for x in range(j):
            for y in range(x + 1):
                work[x, y] = h[x, y]
        for x in range(j):
            value = c * h[a, x] + s * h[b, x]
            if x <= a:
                work[a, x] = value
            else:
                work[x, a] = value
        work[a, a] = c * c * h[a, a] + 2.0 * c * s * h[a, b] + s * s * h[b, b]
        out += 0.5 * cholesky(work, j)
    return out


@njit(**JIT)
def log_prior(precision, covariance, log_weights, g, r, work):
    """The sequential prior of a whole frame, up to terms that no relabelling changes."""
    out = 0.0
    for j in range(g.shape[0]):
        out += (
            log_weights[j, g[j]] - 0.5 * (r - j) * math.log(precision[j, j, j]) + 0.5 * _minor(covariance[j], j, work)
        )
    return out


@njit(**JIT)
def relabel(m, p):
    out = np.empty_like(m)
    for j in range(p.shape[0]):
        for a in range(p.shape[0]):
            for b in range(p.shape[0]):
                out[j, a, b] = m[p[j], p[a], p[b]]
    return out


@njit(**JIT)
def _try_rotation(rng, a, b, c, s, c2, s2, core, d, noise, grams, ru, rv, work):
    """Accept or refuse one rotation of the pair (a, b), by (c, s) in space and (c2, s2) in time."""
    aa = c * (c2 * core[a, a] + s2 * core[a, b]) + s * (c2 * core[b, a] + s2 * core[b, b])
    bb = s * (s2 * core[a, a] - c2 * core[a, b]) + c * (c2 * core[b, b] - s2 * core[b, a])
    log_ratio = (d[a] * (aa - core[a, a]) + d[b] * (bb - core[b, b])) / noise
    if s != 0.0:
        log_ratio += log_prior_pair(grams[0, 0], grams[0, 1], a, b, c, s, ru, work)
        log_ratio -= log_prior_pair(grams[0, 0], grams[0, 1], a, b, 1.0, 0.0, ru, work)
    if s2 != 0.0:
        log_ratio += log_prior_pair(grams[1, 0], grams[1, 1], a, b, c2, s2, rv, work)
        log_ratio -= log_prior_pair(grams[1, 0], grams[1, 1], a, b, 1.0, 0.0, rv, work)
    if not math.log(rng.random()) < log_ratio:
        return False
    rotate(core, a, b, c, s, True, False)
    rotate(core, a, b, c2, s2, False, True)
    for j in range(d.shape[0]):
        for kind in range(2):
            if s != 0.0:
                rotate(grams[0, kind, j], a, b, c, s, True, True)
            if s2 != 0.0:
                rotate(grams[1, kind, j], a, b, c2, s2, True, True)
    return True


@njit(**JIT)
def _rotations(rng, z, space, time, d, noise, candidates_space, candidates_time, num_passes, accepted):
    """Moves within the spans of U and V: Givens pairs on one side or both, label swaps; then fresh scale-mixture
    variables.

    After the Gram matrices are formed, everything is k x k algebra. Returns core = U Z V'.
    """
    u, g_u, log_tau_u, images_u = space
    v, g_v, log_tau_v, images_v = time
    values_u, log_weights_u = candidates_space[0], candidates_space[2]
    values_v, log_weights_v = candidates_time[0], candidates_time[2]
    k, ru = u.shape
    rv = v.shape[1]
    grams = np.empty((2, 2, k, k, k))
    trial = np.empty((2, 2, k, k, k))
    work = np.empty((k, k))
    grams_of(images_u, values_u, g_u, grams[0, 0], grams[0, 1])
    grams_of(images_v, values_v, g_v, grams[1, 0], grams[1, 1])
    core = np.dot(np.dot(u, z), v.T)
    turn_u = np.eye(k)
    turn_v = np.eye(k)
    sd = math.sqrt(noise)
    for _ in range(num_passes):
        for a in range(k - 1):
            for b in range(a + 1, k):
                kind = int(4 * rng.random())
                e = rng.standard_normal() * 2.5 * math.exp(-3.4 * rng.random())
                alpha = 0.0
                beta = 0.0
                if kind == 0:  # together: the direction that near-degenerate pairs leave free (North et al. 1982)
                    alpha = e * sd / max(abs(d[a] - d[b]), sd)
                    beta = alpha
                elif kind == 1:  # against each other
                    alpha = e * sd / (d[a] + d[b] + sd)
                    beta = -alpha
                else:
                    alone = e * sd / math.sqrt(d[a] * d[a] + d[b] * d[b] + noise)
                    if kind == 2:
                        alpha = alone
                    else:
                        beta = alone
                c, s, c2, s2 = math.cos(alpha), math.sin(alpha), math.cos(beta), math.sin(beta)
                accepted[0, 1] += 1
                if _try_rotation(rng, a, b, c, s, c2, s2, core, d, noise, grams, ru, rv, work):
                    accepted[0, 0] += 1
                    rotate(turn_u, a, b, c, s, True, False)
                    rotate(turn_v, a, b, c2, s2, True, False)
    p = np.arange(k)
    if k > 1 and num_passes > 0:
        a = int(k * rng.random())
        b = int(k * rng.random())
        if a != b:
            p[a], p[b] = b, a
            log_ratio = -log_prior(grams[0, 0], grams[0, 1], log_weights_u, g_u, ru, work)
            log_ratio -= log_prior(grams[1, 0], grams[1, 1], log_weights_v, g_v, rv, work)
            for side in range(2):
                trial[side, 0] = relabel(grams[side, 0], p)
                trial[side, 1] = relabel(grams[side, 1], p)
            log_ratio += log_prior(trial[0, 0], trial[0, 1], log_weights_u, g_u[p], ru, work)
            log_ratio += log_prior(trial[1, 0], trial[1, 1], log_weights_v, g_v[p], rv, work)
            accepted[1, 1] += 1
            if math.log(rng.random()) < log_ratio:
                accepted[1, 0] += 1
                grams[:] = trial
                d[:] = d[p]
                g_u[:] = g_u[p]
                g_v[:] = g_v[p]
                turn_u = turn_u[p]
                turn_v = turn_v[p]
                core = core[p][:, p]
                images_u[:] = images_u[p]
                images_v[:] = images_v[p]
    u[:] = np.dot(turn_u, u)
    v[:] = np.dot(turn_v, v)
    for j in range(k):
        images_u[j] = np.dot(turn_u, images_u[j])
        images_v[j] = np.dot(turn_v, images_v[j])
        log_tau_u[j] = math.log(rng.standard_gamma(0.5 * (ru - j)) * 2.0 / grams[0, 0, j, j, j])
        log_tau_v[j] = math.log(rng.standard_gamma(0.5 * (rv - j)) * 2.0 / grams[1, 0, j, j, j])
    return core


@njit(**JIT)
def log_minors_of(images, values, g):
    k = images.shape[0]
    out = np.empty(k)
    work = np.empty((k, k))
    for j in range(k):
        out[j] = _log_minor(images[j], values[g[j]], j, work)
    return out


@njit(**JIT)
def positive_normal(rng, mean, sd):
    """A normal variable conditioned to be positive, by rejection (Robert 1995 for the far tail)."""
    low = -mean / sd
    if low < 0.5:
        while True:
            x = rng.standard_normal()
            if x > low:
                return mean + sd * x
    rate = 0.5 * (low + math.sqrt(low * low + 4.0))
    while True:
        x = low - math.log(1.0 - rng.random()) / rate
        if math.log(rng.random()) < -0.5 * (x - rate) ** 2:
            return mean + sd * x


@njit(**JIT)
def sweep(rng, data, space, time, d, noise, candidates_space, candidates_time, prior, num_steps, num_passes, accepted):
    """One sweep over all parameters, in place; returns the new noise variance.

    Parameters
    ----------
    rng
        NumPy generator.
    data
        ``z (ru, rv)`` and its transpose, both contiguous; squared norm of the data before reduction; number of free
        entries.
    space, time
        State of each side: frame (k, r), candidates (k,), log_tau (k,), images (k, k, r).
    d, noise
        Singular values (k,) and noise variance.
    candidates_space, candidates_time
        ``values``, ``vectors``, log prior weights (k, G), and the shifts of log_tau that go with a change of candidate
        (k, G): `best_log_tau`; any shift is valid, a good one mixes better.
    prior
        HalfNormal scale of d; shape and rate of the InverseGamma prior of the noise variance.
    num_steps, num_passes
        Steps of the inner kernel in a column update; passes of the rotation block over all pairs.
    accepted
        Counts (3, 2) of accepted and tried moves: rotations, swaps, columns.
    """
    z, z_transposed, total, count = data
    scale, noise_shape, noise_rate = prior
    u, g_u, log_tau_u, images_u = space
    v, g_v, log_tau_v, images_v = time
    minors_u = log_minors_of(images_u, candidates_space[0], g_u)
    minors_v = log_minors_of(images_v, candidates_time[0], g_v)
    for i in range(d.shape[0]):
        y = np.dot(z, v[i])
        if update_column(
            rng, i, y, u, g_u, log_tau_u, images_u, minors_u, d, noise, candidates_space, scale, num_steps
        ):
            accepted[2, 0] += 1
        y = np.dot(z_transposed, u[i])
        if update_column(rng, i, y, v, g_v, log_tau_v, images_v, minors_v, d, noise, candidates_time, scale, num_steps):
            accepted[2, 0] += 1
        accepted[2, 1] += 2
    core = _rotations(rng, z, space, time, d, noise, candidates_space, candidates_time, num_passes, accepted)
    residual = total
    precision = 1.0 / noise + 1.0 / (scale * scale)
    for i in range(d.shape[0]):  # exact: the residual separates over modes since both frames are orthonormal
        mean = core[i, i] / noise / precision
        d[i] = positive_normal(rng, mean, 1.0 / math.sqrt(precision))
        residual += d[i] * d[i] - 2.0 * d[i] * core[i, i]
    return (noise_rate + 0.5 * residual) / rng.standard_gamma(noise_shape + 0.5 * count)
