"""Draws of a Bayesian SVD as arrays: what maps, indices, forecasts and filled fields are made of.

A draw says ``field = effects D' + patterns F' + noise``, cells by times, all in data units: patterns are ``w^-1/2 U d``
with the area weight w, and noise of a cell has the standard deviation ``sigma w^-1/2``, or ``sigma`` times its level
where noise is correlated. There the sampler's patterns are orthonormal in coordinates that make noise white; here they
are turned, in each draw, to the modes of the same signal that are orthonormal by area, largest first. Series of modes
are then mixtures of the processes that were sampled.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import scipy.linalg
import xarray as xr

from probmodels.bayesian_svd.eof import cell_weights
from probmodels.bayesian_svd.noise import Noise
from probmodels.errors import SummaryError

__all__ = ["MODES_OF", "Draws", "blocks", "expand", "read_draws"]

MODES_OF = {"population": "modes of the population", "times": "modes of these times"}
"""Whose modes draws hold, in words."""

_BLOCK = 4_000_000  # doubles expanded at a time: 32 MB

_ALL = slice(None)


@dataclass(frozen=True)
class Draws:
    """Draws of all chains, basis coordinates first so that one product expands them all.

    Attributes
    ----------
    space
        Coordinates of the patterns (basis_space, draw, mode).
    time
        Coordinates of the series (basis_time, draw, mode), or the series themselves (time, draw, mode).
    d
        Standard deviations of the modes of the population, or singular values of those of the times (draw, mode).
    sigma
        Standard deviation of the noise of the weighted data (draw,).
    num_chains
        Chains, each with as many draws, one after the other.
    basis_space
        Basis of the patterns (cell, basis_space).
    weight
        Area weight of each cell (cell,), mean 1.
    basis_time
        Basis of the series (time, basis_time); None where series are given at the times themselves.
    design, shared_design
        Columns of the fixed effects (time, effect), and of those that all cells share (time, shared_effect).
    effects, shared_effects
        Their coefficients in data units (draw, cell, effect), (draw, shared_effect); None where they were not kept.
    process
        Name of the process that series are, of `probmodels.distributions.processes.PROCESSES`.
    decay
        Correlation over one step of each process (draw, process); None where series are no process.
    length_scale
        Length-scale in steps of each process (draw, process); None under first-order autoregressions.
    turn
        Series of the modes by processes, ``series = processes @ turn`` (draw, process, mode), orthogonal; None where
        each series is a process of its own.
    noise_level
        Standard deviation of the noise of each cell over sigma, in data units (cell,).
    noise
        Covariance of the noise of the weighted data; None where it is white.
    steps
        Times between neighbours (time - 1,) in steps, the usual one; None where series are no process.
    of
        A key of `MODES_OF`.
    """

    space: np.ndarray
    time: np.ndarray
    d: np.ndarray
    sigma: np.ndarray
    num_chains: int
    basis_space: np.ndarray
    weight: np.ndarray
    basis_time: np.ndarray | None
    design: np.ndarray
    effects: np.ndarray | None
    shared_design: np.ndarray
    shared_effects: np.ndarray | None
    process: str
    decay: np.ndarray | None
    length_scale: np.ndarray | None
    turn: np.ndarray | None
    steps: np.ndarray | None
    noise_level: np.ndarray
    noise: Noise | None
    of: str

    @property
    def num_draws(self) -> int:
        """Draws of all chains."""
        return len(self.d)

    def thinned(self, count: int) -> np.ndarray:
        """Places of at most ``count`` draws, evenly spread."""
        return np.unique(np.linspace(0, self.num_draws - 1, min(count, self.num_draws)).round().astype(int))

    def series(self, times: slice = _ALL, draws: np.ndarray | slice = _ALL) -> np.ndarray:
        """Series at some times, of some draws: (draw, time, mode)."""
        chosen = self.time[:, draws]
        if self.basis_time is None:
            return chosen[times].transpose(1, 0, 2)
        return expand(self.basis_time[times], chosen)

    def patterns(self, cells: slice | np.ndarray = _ALL, draws: np.ndarray | slice = _ALL) -> np.ndarray:
        """What one unit of each series adds to the field, in data units: (draw, cell, mode)."""
        basis = self.basis_space[cells] / np.sqrt(self.weight[cells])[:, None]
        return expand(basis, self.space[:, draws]) * self.d[draws][:, None, :]

    def noise_sd(self, cells: slice | np.ndarray = _ALL, draws: np.ndarray | slice = _ALL) -> np.ndarray:
        """Standard deviation of the noise in data units: (draw, cell)."""
        return self.sigma[draws][:, None] * self.noise_level[cells]

    def noise_variance(self) -> np.ndarray:
        """Variance of the noise of all cells together, weighted by area: (draw,)."""
        return self.sigma**2 * float(self.weight @ self.noise_level**2)

    def autocorrelation(self) -> np.ndarray:
        """Correlation of each series over one unit of time (draw, mode)."""
        if self.decay is None:
            raise SummaryError("series that are no process have no autocorrelation; infer with series='ar1'")
        return self.decay if self.turn is None else np.einsum("sj,sji->si", self.decay, self.turn**2)

    @property
    def scale(self) -> np.ndarray:
        """What parametrises the processes (draw, process): decays over one step, or length-scales in steps."""
        if self.decay is None:
            raise SummaryError("series that are no process have no scale in time; infer with series='ar1'")
        return self.decay if self.length_scale is None else self.length_scale

    def processes(self, draws: np.ndarray | slice = _ALL) -> np.ndarray:
        """The processes of which series are mixtures, at the times of the record: (draw, time, process)."""
        series = self.series(draws=draws)
        return series if self.turn is None else series @ self.turn[draws].transpose(0, 2, 1)

    def fixed(self, cells: slice | np.ndarray = _ALL, draws: np.ndarray | slice = _ALL) -> np.ndarray:
        """What fixed and shared effects add to the field, in data units: (draw, cell, time)."""
        if self.effects is None or self.shared_effects is None:
            raise SummaryError("the posterior lacks the fixed effects of its design; was the result cut down?")
        found = self.effects[draws][:, cells] @ self.design.T
        return found + (self.shared_effects[draws] @ self.shared_design.T)[:, None, :]

    def along(self, effects: np.ndarray) -> np.ndarray:
        """Products of the series with effects (time, effect): (effect, draw, mode)."""
        return np.tensordot(effects.T if self.basis_time is None else effects.T @ self.basis_time, self.time, 1)

    def orthonormal(self) -> Draws:
        """The same draws in an orthonormal basis of the weighted field; bases of white noise are so already."""
        if self.noise is None:
            return self
        root = np.linalg.cholesky(self.basis_space.T @ self.basis_space)
        basis = scipy.linalg.solve_triangular(root, self.basis_space.T, lower=True).T
        return replace(self, space=np.tensordot(root.T, self.space, 1), basis_space=basis)

    def spread(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of each series (draw, mode): 0 and 1 for those of the population."""
        if self.of == "population":
            return np.zeros_like(self.d), np.ones_like(self.d)
        mean, square = self.moments()
        times = len(self.time if self.basis_time is None else self.basis_time)
        return mean, np.sqrt(np.maximum(square - times * mean**2, 0.0) / (times - 1))

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and sum of squares of each series over time (draw, mode), from its Gram matrix, not its expansion."""
        if self.basis_time is None:
            return self.time.mean(0), np.einsum("tsk,tsk->sk", self.time, self.time)
        mean = np.einsum("r,rsk->sk", self.basis_time.mean(0), self.time)
        gram = self.basis_time.T @ self.basis_time
        return mean, np.einsum("rsk,rsk->sk", self.time, np.tensordot(gram, self.time, 1))


def read_draws(tree: xr.DataTree, of: str | None = None) -> Draws:
    """Draws of a result.

    Parameters
    ----------
    tree
        Result of a Bayesian SVD with the groups ``posterior`` and ``constant_data``.
    of
        Whose modes, a key of `MODES_OF`; None for the population where series are a process, else for the times.

    Returns
    -------
    Draws
        All chains, one after the other.

    Raises
    ------
    SummaryError
        If a group or variable is absent, or modes of the population are asked where series are no process.
    """
    posterior, constant = _groups(tree, of)
    process = "F" in posterior
    space, d = _stacked(posterior, "U", "basis_space", "mode").transpose(1, 0, 2), _stacked(posterior, "d", "mode")
    time = _stacked(posterior, *(("F", "time", "mode") if process else ("V", "basis_time", "mode"))).transpose(1, 0, 2)
    design, shared_design = (_design(constant, name) for name in ("fixed_effects_design", "shared_effects_design"))
    effects = _effects(posterior, "fixed_effects", design, ("cell", "effect"), (constant.sizes["cell"],))
    shared = _effects(posterior, "shared_effects", shared_design, ("shared_effect",), ())
    basis_space = constant["basis_space_matrix"].transpose("cell", ...).values.astype(float)
    weight = cell_weights(constant)
    level, noise, turn = 1 / np.sqrt(weight), None, None
    if "noise_level" in constant:
        level, noise = constant["noise_level"].values.astype(float), _noise(constant)
        space, d, time, turn = _by_area(space, d, time, basis_space)
    if process and of == "times":
        space, d, time = _of_these_times(space, d, time, design)
    return Draws(
        space=np.ascontiguousarray(space),
        time=np.ascontiguousarray(time),
        d=d,
        sigma=_stacked(posterior, "sigma"),
        num_chains=posterior.sizes["chain"],
        basis_space=basis_space,
        weight=weight,
        basis_time=None if process else constant["basis_time_matrix"].transpose("time", ...).values.astype(float),
        design=design,
        effects=effects,
        shared_design=shared_design,
        shared_effects=shared,
        process=str(constant.attrs.get("series", "ar1")),
        turn=turn,
        noise_level=level,
        noise=noise,
        of=of or ("population" if process else "times"),
        **_of_process(posterior, constant, process),
    )


def _groups(tree: xr.DataTree, of: str | None) -> tuple[xr.Dataset, xr.Dataset]:
    """Posterior and constant data of a result that has draws of such modes."""
    if "posterior" not in tree.children or "constant_data" not in tree.children:
        raise SummaryError(f"the result has the groups {sorted(tree.children)}; posterior and constant_data are needed")
    posterior = tree["posterior"].to_dataset()
    process = "F" in posterior
    missing = {"U", "F" if process else "V", "d", "sigma"} - set(posterior.data_vars)
    if missing:
        raise SummaryError(f"the posterior lacks {sorted(missing)}; is this the result of a Bayesian SVD?")
    if of == "population" and not process:
        raise SummaryError(
            "the series of this result are numbers, not a process in time, so that it knows the modes of its times "
            "alone; infer with series='ar1' (--set model.series=ar1), or ask of='times'"
        )
    return posterior, tree["constant_data"].to_dataset()


def _stacked(posterior: xr.Dataset, name: str, *dims: str) -> np.ndarray:
    """Draws of a variable (draw of all chains, *dims)."""
    array = posterior[name].transpose("chain", "draw", *dims).values.astype(float, copy=False)
    return array.reshape(-1, *array.shape[2:])


def _effects(
    posterior: xr.Dataset, name: str, design: np.ndarray, dims: tuple[str, ...], shape: tuple[int, ...]
) -> np.ndarray | None:
    """Coefficients of a design; none of a design without columns, None where they were not kept."""
    if not design.shape[1]:
        return np.zeros((posterior["d"][..., 0].size, *shape, 0))
    return _stacked(posterior, name, *dims) if name in posterior else None


def _of_process(posterior: xr.Dataset, constant: xr.Dataset, process: bool) -> dict[str, np.ndarray | None]:
    """What draws hold of the process that series are, by the names of `Draws`."""
    found: dict[str, np.ndarray | None] = {"decay": None, "length_scale": None, "steps": None}
    if process and "autocorrelation" in posterior:
        found["decay"] = _stacked(posterior, "autocorrelation", "mode")
    if process and str(constant.attrs.get("series", "ar1")) != "ar1":
        found["length_scale"] = _stacked(posterior, "length_scale_time", "mode") / float(constant.attrs["time_step"])
    if "time_steps" in constant:
        found["steps"] = constant["time_steps"].values.astype(float)
    return found


def _design(constant: xr.Dataset, name: str) -> np.ndarray:
    """Columns of effects (time, effect), none where there are none."""
    if name not in constant:
        return np.zeros((constant.sizes["time"], 0))
    return np.asarray(constant[name].transpose("time", ...).values, dtype=float)


def _noise(constant: xr.Dataset) -> Noise:
    """Covariance of the noise that a result keeps."""
    vectors, values = constant["noise_vectors"].values.astype(float), constant["noise_values"].values.astype(float)
    attrs = constant.attrs
    share = np.full(len(vectors), float(attrs["noise_share"]))
    kernel, scale = str(attrs["noise_kernel"]), float(attrs["noise_length_scale"])
    return Noise(vectors, values, float(attrs["noise_decay"]), kernel, scale, share)


def _by_area(
    space: np.ndarray, d: np.ndarray, time: np.ndarray, basis: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The same signal by patterns that are orthonormal over the cells: patterns, d, series, and how series turn.

    Signs follow the modes of the mean covariance of the signal.
    """
    loading = space * d
    gram = basis.T @ basis
    values, turn = np.linalg.eigh(np.einsum("rsi,rsj->sij", loading, np.tensordot(gram, loading, 1)))
    values, turn = np.sqrt(np.maximum(values[:, ::-1], 1e-300)), turn[:, :, ::-1]
    turned = np.einsum("rsi,sij->rsj", loading, turn) / values
    root = np.linalg.cholesky(gram)  # of the mean covariance over cells only its leading modes matter
    flat = (root.T @ loading.reshape(len(loading), -1)) / np.sqrt(len(d))
    leading = np.linalg.svd(flat, full_matrices=False)[0][:, : d.shape[1]]
    sign = np.where(np.einsum("rk,rsk->sk", root @ leading, turned) < 0, -1.0, 1.0)
    turn = turn * sign[:, None, :]
    return turned * sign, values, np.einsum("tsi,sij->tsj", time, turn), turn


def _of_these_times(
    space: np.ndarray, d: np.ndarray, time: np.ndarray, design: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The singular value decomposition of the signal of each draw at these times, fixed effects taken out.

    It is what a decomposition of the field without noise would find. Signs follow the draws.
    """
    effects = np.linalg.qr(design)[0] if design.shape[1] else design
    signal = np.tensordot(effects, np.tensordot(effects.T, time, 1), 1)  # (time, draw, mode)
    np.subtract(time, signal, out=signal)  # in place: where times are many, these are the largest arrays there are
    signal *= d
    gram = np.einsum("tsi,tsj->sij", signal, signal)
    values, turn = np.linalg.eigh(gram)
    values, turn = np.sqrt(np.maximum(values[:, ::-1], 0.0)), turn[:, :, ::-1]
    turn = turn * np.where(np.einsum("sii->si", turn) < 0, -1.0, 1.0)[:, None, :]
    series = np.einsum("tsi,sij->tsj", signal, turn)
    series /= np.maximum(values, 1e-300)
    return np.einsum("rsi,sij->rsj", space, turn), values, series


def blocks(length: int, num_draws: int, num_modes: int) -> Iterator[slice]:
    """Slices of an axis that keep (draw, slice, mode) within 32 MB."""
    step = max(1, _BLOCK // max(1, num_draws * num_modes))
    for start in range(0, length, step):
        yield slice(start, start + step)


def expand(basis: np.ndarray, coordinates: np.ndarray) -> np.ndarray:
    """Rows of a basis (cell, basis) times draws (basis, draw, mode): (draw, cell, mode)."""
    return np.tensordot(basis, coordinates, 1).transpose(1, 0, 2)
