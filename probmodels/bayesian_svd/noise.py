"""The covariance of what no mode holds: a level of each cell, correlation between near cells, persistence in time.

With ``e (n, T)`` the residual of the weighted data, ``cov(vec e) = sigma^2 A kron N``: A the correlation of an AR(1)
process in time, and N of cells: ``N_ij = s_i s_j (p_i p_j)^1/2 C_ij``, with level s_i, of whose square the share p_i is
correlated with other cells by a Matern kernel C, and the rest white. Of this the eigenvectors are kept; its eigenvalues
are found from the data, in the same order, where that is likelier: real fields are often smoother. In coordinates
``N^-1/2 e`` along space, and filtered by the process along time, the residual is white: there the modes are sampled,
and their exact sampler needs no other change. `estimate_noise` finds s, p, C, the eigenvalues and the persistence from
the data before sampling; they are held fixed, which n T residuals for 3 n + 3 numbers allow, and sigma is sampled.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import eigh
from scipy.optimize import isotonic_regression, minimize_scalar

from probmodels.bayesian_svd.gaps.states import States, decays
from probmodels.bayesian_svd.model import MatrixData, NoiseData, SideData
from probmodels.distributions.covariance import correlation

__all__ = ["MOST_CELLS", "Noise", "estimate_noise", "filtered_by", "unfiltered_by", "whitened_side", "with_noise"]

Array = NDArray[np.float64]

MOST_CELLS = 5_000  # matrices are of cells by cells

_KERNELS = ("matern12", "matern32")
_NUM_SCALES = 10
_REACH = (2.0, 4.0, 0.1)  # longest length-scale: spacings of cells, at least and at most, and share of the extent
_ROUNDS = 10
_FILLS = 30  # rounds of filling gaps by modes
_MOST = 600  # cells from which the correlation is estimated
_CLOSE = 0.005  # precision of the share that is correlated
_SHRINK = 10.0  # residuals' worth of the mean variance in that of a cell
_STEPS = 8  # of expectation maximisation in each round
_LEAST = 1e-3  # share of a cell's variance that is white
_COMPLETE = 20  # times from which eigenvalues are found
_WORK, _FEWEST = 4e11, 3  # cubed sizes of gaps that are expected in all, but so many rounds at least


class Noise(NamedTuple):
    """Covariance of the noise of the weighted data, up to its variance.

    ``vectors (n, n)`` and ``values (n,)`` eigenvectors by columns and eigenvalues of the covariance of cells; ``decay``
    correlation over one unit of time; ``kernel`` and ``length_scale`` of what is correlated, ``share (n,)`` of the
    variance of each cell that it is, the rest being white.
    """

    vectors: Array
    values: Array
    decay: float
    kernel: str
    length_scale: float
    share: Array

    @property
    def level(self) -> Array:
        """Standard deviation of each cell (n,)."""
        return np.sqrt((self.vectors**2) @ self.values)

    @property
    def precision(self) -> Array:
        """Inverse of the covariance (n, n)."""
        return (self.vectors / self.values) @ self.vectors.T

    @property
    def whitener(self) -> Array:
        """Matrix (n, n) that takes weighted data to coordinates where noise is white in space."""
        return (self.vectors / np.sqrt(self.values)).T

    @property
    def root(self) -> Array:
        """Inverse of the whitener."""
        return self.vectors * np.sqrt(self.values)


def filtered_by(x: Array, phi: Array) -> Array:
    """Innovations of unit variance along the last axis of x (..., T), given the correlations of neighbours (T-1,)."""
    out = x.copy()
    out[..., 1:] = (x[..., 1:] - phi * x[..., :-1]) / np.sqrt(1 - phi**2)
    return out


def unfiltered_by(x: Array, phi: Array) -> Array:
    """Inverse of `filtered_by`."""
    root = np.sqrt(1 - phi**2)
    out = x.copy()
    for t in range(1, x.shape[-1]):
        out[..., t] = phi[t - 1] * out[..., t - 1] + root[t - 1] * x[..., t]
    return out


def _centred(x: Array, design: Array) -> Array:
    """Off the columns of a design (T, q), by least squares."""
    basis = np.linalg.qr(design)[0]
    return x - (x @ basis) @ basis.T


def estimate_noise(
    values: Array, seen: NDArray[np.bool_], design: Array, steps: Array, distance: Array, rank: int, seed: int = 0
) -> tuple[Noise, Array]:
    """Find the covariance of the noise about modes, in turns with the modes.

    Parameters
    ----------
    values
        Weighted data (n, T), anything in the gaps.
    seen
        True where observed (n, T).
    design
        Columns of the effects of each cell (T, q), in any basis.
    steps
        Times between neighbours (T-1,), in the unit of the decay.
    distance
        Distances of the cells (n, n).
    rank
        Number of modes.
    seed
        Of the choice of cells for the correlation where they are many.

    Returns
    -------
    tuple
        The covariance, and the data with gaps filled by effects and modes (n, T).
    """
    n, num_times = values.shape
    chosen = np.sort(np.random.default_rng(seed).choice(n, min(n, _MOST), replace=False))
    kernels = _Kernels(distance[np.ix_(chosen, chosen)], rank)
    pairs = seen[:, 1:] & seen[:, :-1] & (np.abs(steps - 1) < 1e-6)
    free, count = num_times - rank - design.shape[1], seen.sum(axis=1).astype(float)
    data = _Completed(values, seen, design, steps, rank)
    noise = _levels(data, count)
    for step in range(_ROUNDS):
        if step in data.rounds:
            data.expect(noise)
        modes = data.modes(noise)
        lagged = noise.root @ unfiltered_by(modes.rest, noise.decay**steps)
        decay = _persistence(lagged / noise.level[:, None], pairs)
        phi = decay**steps
        own = filtered_by(lagged, phi)
        moments = own @ own.T
        if data.hidden is not None:
            off = (noise.root - noise.root @ modes.axes @ modes.axes.T) @ noise.whitener
            moments += off @ data.hidden @ off.T
        moments /= free
        parts = _Parts(moments, noise.root @ modes.axes, count, noise)
        with_modes = _centred(filtered_by(data.drawn, phi), filtered_by(design.T, phi).T)[chosen]
        noise = parts.fitted(kernels, with_modes, chosen, distance, decay)
    # Not in each round: a mode that takes a direction of little noise would leave it ever less.
    if num_times >= _COMPLETE:
        along = np.einsum("ij,ij->j", noise.vectors, (moments + parts.unseen(noise.precision)) @ noise.vectors)
        values_ = _monotone(noise.values, along / parts.scale, free)
        noise = noise._replace(values=values_.clip(1e-10 * values_[-1]))
    return noise, data.filled


def _levels(data: _Completed, count: Array) -> Noise:
    """White noise of a level of each cell, from which to start: else noisy cells are taken for modes, and some stay."""
    n = len(count)
    noise = Noise(np.eye(n), np.ones(n), 0.0, "none", 0.0, np.zeros(n))
    variance = _shrunken(np.sum((data.modes(noise).rest * data.seen) ** 2, axis=1) / count, count)
    return noise._replace(values=variance / variance.mean())


def _persistence(residual: Array, pairs: NDArray[np.bool_]) -> float:
    """Correlation of unit residuals (n, T) of neighbouring times, from the pairs of which both are seen."""
    products = np.sum((residual[:, 1:] * residual[:, :-1])[pairs])
    squares = 0.5 * (np.sum(residual[:, 1:][pairs] ** 2) + np.sum(residual[:, :-1][pairs] ** 2))
    return float(np.clip(products / max(squares, 1e-300), 0.0, 0.98))


class _Modes(NamedTuple):
    """Leading axes (n, k) of data in coordinates where noise is white, their mean squares (k,), that of the other axes,
    and what is off them (n, T)."""

    axes: Array
    squares: Array
    variance: float
    rest: Array


class _Completed:
    """Data of which the missing entries are expected, given modes and noise.

    What is expected is too smooth: its covariance is added to second moments, and a draw of what is missing stands for
    data where no moments will do.

    Parameters
    ----------
    values, seen, design, steps, rank
        As in `estimate_noise`.

    Attributes
    ----------
    filled, drawn
        Data (n, T) with the expectation and with a draw of what is missing.
    hidden
        Covariance (n, n) of what is missing about its expectation, summed over the innovations of all times; None where
        nothing is.
    rounds
        Those in which to renew the expectation: all, unless gaps are so large that this would take minutes.
    """

    def __init__(self, values: Array, seen: NDArray[np.bool_], design: Array, steps: Array, rank: int) -> None:
        self.values, self.seen, self.design, self.steps, self.rank = values, seen, design, steps, rank
        self.filled = self.drawn = _filled(values, seen, design, rank)
        self.hidden: Array | None = None
        absent = (~seen).sum(axis=0).astype(float)
        number = 0 if seen.all() else int(np.clip(_WORK / np.sum(absent**3), _FEWEST, _ROUNDS))
        self.rounds = {int(x) for x in np.linspace(0, _ROUNDS - 1, number)}

    def modes(self, noise: Noise) -> _Modes:
        """The leading axes under a covariance of the noise."""
        phi, rank = noise.decay**self.steps, self.rank
        white = _centred(noise.whitener @ filtered_by(self.filled, phi), filtered_by(self.design.T, phi).T)
        if self.hidden is None:
            u, d, _ = np.linalg.svd(white, full_matrices=False)
            axes, squares, total = u[:, :rank], d[:rank] ** 2, float(d @ d)
        else:
            gram = white @ white.T + noise.whitener @ self.hidden @ noise.whitener.T
            sizes, vectors = np.linalg.eigh(gram)
            axes, squares, total = vectors[:, : -rank - 1 : -1], sizes[: -rank - 1 : -1], float(sizes.sum())
        free = white.shape[1] - self.design.shape[1]
        variance = (total - float(squares.sum())) / ((len(white) - rank) * (free - rank))
        return _Modes(axes, squares / free, variance, white - axes @ (axes.T @ white))

    def expect(self, noise: Noise) -> None:
        """Renew what is expected of the missing entries: series of the modes and noise jointly, in space and time."""
        phi, whitener = noise.decay**self.steps, noise.whitener
        modes = self.modes(noise)
        variance = modes.variance / (1.0 if self.hidden is not None else float(self.seen.mean()))
        basis, back = np.linalg.qr(filtered_by(np.ascontiguousarray(self.design.T), phi).T)
        effects = (filtered_by(self.filled, phi) @ basis) @ np.linalg.inv(back).T @ self.design.T
        decay = decays(modes.axes.T @ (whitener @ (self.filled - effects)), noise.decay, variance, self.steps)
        gain = (1 + noise.decay**2 - 2 * noise.decay * decay) / (1 - noise.decay**2)
        size = np.sqrt(np.maximum(modes.squares - variance, 1e-6 * variance) / gain)
        state = States(self.seen, self.steps, whitener, phi, modes.axes * size, decay, variance)
        rng = np.random.default_rng(0)  # the same draw in each round, so that rounds come to rest
        known = np.where(self.seen, self.values - effects, 0.0)
        mean, _, hidden, _, deviation = state.conditional(known, rng)
        self.filled = np.where(self.seen, self.values, effects + mean)
        self.drawn = self.filled + deviation
        self.hidden = noise.root @ hidden @ noise.root.T


def _shrunken(variance: Array, count: Array) -> Array:
    """Variances drawn a little to their mean, the more the fewer values they come from."""
    return (count * variance + _SHRINK * variance.mean()) / (count + _SHRINK)


class _Parts:
    """Level, kernel and white share of cells from second moments of residuals, by expectation maximisation.

    Along the modes no noise is left to see. It is expected to be what the present covariance has there, which is
    renewed at each step: else cells that modes fit closely get ever less noise.

    Parameters
    ----------
    moments
        Of the residuals about the modes (n, n).
    span
        Patterns of the modes (n, k).
    count
        Values of each cell (n,).
    start
        Covariance to start from.
    """

    def __init__(self, moments: Array, span: Array, count: Array, start: Noise) -> None:
        self.moments, self.span, self.count, self.start = moments, span, count, start
        self.scale = 1.0

    def unseen(self, precision: Array) -> Array:
        """What noise is expected to have along the modes (n, n), of the size that residuals have elsewhere."""
        image = precision @ self.span
        inside = np.linalg.inv(self.span.T @ image)
        n, rank = self.span.shape
        size = (np.sum(precision * self.moments) - np.sum((image @ inside) * (self.moments @ image))) / (n - rank)
        return size * self.span @ inside @ self.span.T

    def fitted(
        self, kernels: _Kernels, with_modes: Array, chosen: NDArray[np.int_], distance: Array, decay: float
    ) -> Noise:
        """The covariance after a choice of the kernel and some steps for the cells.

        The kernel is that under which data of the chosen cells ``with_modes (chosen, T)`` are likeliest.
        """
        precision, white = self.start.precision, np.zeros(0)
        shape, kernel, scale = np.zeros((0, 0)), "", 0.0
        for step in range(_STEPS):
            total = self.moments + self.unseen(precision)
            size = _shrunken(np.diag(total), self.count)
            root = np.sqrt(size)
            unit = total / (root[:, None] * root)
            if step == 0:
                kernel, scale, share = kernels.of_data(with_modes / root[chosen, None])
                shape = correlation(distance, kernel, scale).numpy()
                white = np.full(len(size), 1 - share)
            joined = np.sqrt(1 - white)
            covariance = shape * joined[:, None] * joined + np.diag(white)
            inverse = np.linalg.inv(covariance)
            image = inverse @ unit
            expected = white - white**2 * np.diag(inverse) + white**2 * np.einsum("ij,ji->i", image, inverse)
            precision = inverse / (root[:, None] * root)
            white = np.clip(expected, _LEAST, 0.999)
        joined = np.sqrt(1 - white)
        covariance = (shape * joined[:, None] * joined + np.diag(white)) * (root[:, None] * root) / size.mean()
        self.scale = float(size.mean())
        values, vectors = np.linalg.eigh(covariance)
        return Noise(vectors, values.clip(1e-10 * values[-1]), decay, kernel, scale, 1 - white)


def _monotone(values: Array, along: Array, free: int) -> Array:
    """Eigenvalues (n,) in increasing order, or mean squares along eigenvectors made monotone where these are likelier.

    Each of their levels counts as a parameter (Akaike). ``free`` values each mean square comes from.
    """
    found = isotonic_regression(along).x
    scaled = values * np.mean(along / values)
    gain = 0.5 * free * np.sum(np.log(scaled / found) + along / scaled - along / found)
    return np.asarray(found) if gain > len(np.unique(found)) else values


def _filled(values: Array, seen: NDArray[np.bool_], design: Array, rank: int) -> Array:
    """Gaps filled by the effects of each cell and leading modes, in turns."""
    if seen.all():
        return values
    basis = np.linalg.qr(design)[0]
    gram = np.einsum("nt,tq,ts->nqs", seen.astype(float), basis, basis)
    effects = np.linalg.solve(gram, (np.where(seen, values, 0.0) @ basis)[..., None])[..., 0]
    filled = np.where(seen, values, effects @ basis.T)
    for _ in range(_FILLS):
        effects = filled @ basis
        rest = filled - effects @ basis.T
        _, vectors = np.linalg.eigh(rest @ rest.T)
        u = vectors[:, -rank:]
        filled = np.where(seen, values, effects @ basis.T + u @ (u.T @ rest))
    return filled


class _Kernels:
    """Candidate correlations of cells, and which of them is likeliest.

    Parameters
    ----------
    distance
        Of the cells (n, n).
    rank
        Number of modes.
    """

    def __init__(self, distance: Array, rank: int) -> None:
        near = np.median(np.sort(distance, axis=1)[:, 1])
        least, most, share = _REACH  # what reaches further is for modes to hold
        longest = max(least * near, min(most * near, share * distance.max()))
        self._rank, self._spectra = rank, []
        for kernel in _KERNELS:
            for scale in np.geomspace(near / 2, longest, _NUM_SCALES):
                values, vectors = np.linalg.eigh(correlation(distance, kernel, float(scale)).numpy())
                self._spectra.append((kernel, float(scale), values.clip(0), vectors))
        self._latest: int | None = None

    def of_data(self, unit: Array) -> tuple[str, float, float]:
        """Kernel, length-scale and share under which data (n, T) of unit residuals, with modes, are likeliest.

        The modes and the variance of the noise are at their most likely values (probabilistic principal components,
        Tipping and Bishop 1999): in coordinates where noise is white, modes take the leading eigenvalues, and the mean
        of the others is the variance. Modes are thus free for each candidate, and noise that looks like a mode, or a
        mode like noise, does not depend on where the search begins.
        """
        n, num_times = unit.shape
        moments = unit @ unit.T / num_times if num_times > n else None

        def fit(values: Array, vectors: Array) -> tuple[float, float]:
            turned = vectors.T @ (unit if moments is None else moments @ vectors)

            def minus(share: float) -> float:
                variance = share * values + 1 - share
                white = turned / np.sqrt(variance)[:, None]
                gram = white.T @ white / num_times if moments is None else white / np.sqrt(variance)
                last = len(gram) - 1
                top = eigh(gram, eigvals_only=True, subset_by_index=(last - self._rank + 1, last), check_finite=False)
                rest = (np.trace(gram) - top.sum()) / (n - self._rank)
                return float(np.log(variance).sum() + np.log(top).sum() + (n - self._rank) * np.log(rest))

            found = minimize_scalar(minus, bounds=(0.0, 0.999), method="bounded", options={"xatol": _CLOSE})
            return float(found.fun), float(found.x)

        return self._best(fit, self._near())

    def _near(self) -> list[int]:
        """All candidates at first, then those whose length-scale is next to the latest one's, of any kernel."""
        if self._latest is None:
            return list(range(len(self._spectra)))
        place = self._latest % _NUM_SCALES
        return [j for j in range(len(self._spectra)) if abs(j % _NUM_SCALES - place) <= 1]

    def _best(
        self, fit: Callable[[Array, Array], tuple[float, float]], places: Iterable[int]
    ) -> tuple[str, float, float]:
        fits = {place: fit(*self._spectra[place][2:]) for place in places}
        self._latest = min(fits, key=lambda place: fits[place][0])
        return (*self._spectra[self._latest][:2], fits[self._latest][1])


def whitened_side(
    side: SideData, noise: Noise, nugget: float = 0.0, weight: Array | float = 1.0
) -> tuple[SideData, Array]:
    """A side in coordinates where noise is white, and its basis there as orthonormal rows (r, n).

    The patterns keep their span and their candidate covariances; what is orthonormal is the whitened basis. The part
    ``nugget * diag(weight)`` of these covariances, which serves their numerics alone, is replaced by the same share of
    the covariance of the noise: noise that is smooth has directions of so little variance that a white nugget would be
    a part of the model there.
    """
    white, turn = np.linalg.qr(noise.whitener @ side.basis.numpy())
    shift: Array | float = 0.0
    if nugget:
        image = side.basis.numpy() @ turn.T
        shift = nugget * (np.eye(len(turn)) - image.T @ (np.reshape(weight, (-1, 1)) * image))
    basis = torch.as_tensor(np.ascontiguousarray(np.linalg.solve(turn.T, side.basis.numpy().T).T))
    if side.vectors is None and bool((side.values == side.values[:, :1]).all()):  # white stays so by definition
        return side._replace(basis=basis), white.T
    values, vectors = [], []
    for place in range(len(side.values)):
        root = turn * np.sqrt(side.values[place].numpy())
        if side.vectors is not None:
            root = (turn @ side.vectors[place].numpy()) * np.sqrt(side.values[place].numpy())
        variances, axes = np.linalg.eigh(root @ root.T + shift)
        values.append(np.maximum(variances, 1e-12 * variances[-1]))
        vectors.append(axes)
    return (
        side._replace(
            values=torch.as_tensor(np.array(values)), vectors=torch.as_tensor(np.array(vectors)), basis=basis
        ),
        np.ascontiguousarray(white.T),
    )


def with_noise(
    data: MatrixData,
    noise: Noise,
    filled: Array,
    design: Array,
    *,
    scale: float | None,
    default_rate: bool,
    nugget: float = 0.0,
    weight: Array | float = 1.0,
) -> MatrixData:
    """Data of white noise as data of correlated noise.

    Parameters
    ----------
    data
        Reduced data of white noise with series as a process and effects of flat prior.
    noise
        From `estimate_noise`.
    filled
        Weighted data (n, T) with gaps filled; what a chain starts from.
    design
        Named columns of the effects (T, q).
    scale
        Of the HalfNormal prior of d; None for the norm of the whitened data.
    default_rate
        Whether the rate of the prior of the noise variance is the default one, a thousandth of the whitened variance.
    nugget, weight
        As for `whitened_side`.
    """
    assert data.series is not None
    space, left = whitened_side(data.space, noise, nugget, weight)
    phi = noise.decay ** data.series.steps.numpy()
    basis, root = np.linalg.qr(filtered_by(np.ascontiguousarray(design.T), phi).T)
    colour = NoiseData(*map(torch.as_tensor, (noise.whitener, noise.root, left, phi)))
    gaps, (n, num_times) = data.gaps, filled.shape
    out = data._replace(
        space=space,
        design=torch.as_tensor(basis),
        design_root=torch.as_tensor(root),
        num_free=torch.tensor(float(n * (num_times - basis.shape[1])), dtype=torch.float64),
        noise=colour,
        shared_design=data.shared_design[:, :, : basis.shape[1]],
    ).whitened(torch.as_tensor(filled))
    norm = float(out.z.square().sum() + out.rest)
    number = functools.partial(torch.tensor, dtype=torch.float64)
    if default_rate:
        out = out._replace(noise_rate=number(0.5e-3 * norm / float(out.num_free)))
    return out._replace(gaps=gaps, scale=number(math.sqrt(norm / num_times) if scale is None else scale))
