"""The exact block sampler of the Bayesian singular value decomposition whose series are a process in time.

Each sweep draws, mode by mode, (decay or length-scale in time, f_i) with f_i integrated out where the former is chosen,
then (length-scale in space, scale-mixture variable, d_i, u_i) as `BlockGibbs` does; then rotates pairs of modes at a
fixed signal, swaps labels, moves the scale of each mode at a fixed signal, and draws d and sigma exactly. Where the
prior of d is a mixture, the scale of each mode is drawn first. Local effects of proper prior are moved together with
the part of the series that lies along them. ``docs/bayesian_svd.md`` derives the steps;
`probmodels.bayesian_svd.series_sweep` is the compiled part.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from probmodels.bayesian_svd.augment import basis_of
from probmodels.bayesian_svd.banded import precision_times
from probmodels.bayesian_svd.correlated import CorrelatedData, seen_by_modes
from probmodels.bayesian_svd.noise import unfiltered_by
from probmodels.bayesian_svd.patterns.shrinkage import draw_scales
from probmodels.bayesian_svd.sampler import BlockGibbs, orthonormal_rows
from probmodels.bayesian_svd.series_sweep import sweep
from probmodels.bayesian_svd.sweep import column_images
from probmodels.distributions.processes import banded_precision
from probmodels.errors import ProblemError
from probmodels.inference.problem import Problem
from probmodels.options import Count, Natural, NonNegative, checked

__all__ = ["SeriesGibbs"]

Array = NDArray[np.float64]


class SeriesGibbs(BlockGibbs):
    """Exact block sampler of problems whose series are a process in time: any ``series`` but ``"frame"``.

    Parameters
    ----------
    problem
        Made by `probmodels.bayesian_svd.make_problem`.
    num_steps, num_passes, jitter
        As for `BlockGibbs`.
    """

    _series = "f"

    @checked(ProblemError)
    def __init__(
        self, problem: Problem, *, num_steps: Count = 6, num_passes: Natural = 10, jitter: NonNegative = 1.0
    ) -> None:
        super().__init__(problem, num_steps=num_steps, num_passes=num_passes, jitter=jitter)
        series = self.data.series
        if series is None:
            raise ProblemError("SeriesGibbs samples problems whose series are a process: make_problem(series='ar1')")
        self.sites = series.sites(torch.arange(len(series.scale)))  # what is said of each place in the grid
        self._index_site = series.index_site
        bands, log_dets = banded_precision(series.process, series.scale.numpy(), series.steps.numpy())
        self._process = (bands, log_dets, np.ascontiguousarray(series.log_weights.numpy()))
        num_times = len(series.steps) + 1
        phi = np.zeros(num_times - 1) if self.data.noise is None else self.data.noise.phi.numpy()
        self._phi, innovation = phi, 1.0 - phi**2
        diagonal = np.append(1.0, 1.0 / innovation)
        diagonal[:-1] += phi**2 / innovation
        self._filter = (phi, np.sqrt(innovation), diagonal, -phi / innovation)
        flat = float(self.data.effect_precision) == 0.0
        rows = np.ascontiguousarray(self.data.design.numpy().T[: None if flat else 0])
        pulled = rows.copy()  # by the transposed filter
        pulled[:, 1:] /= self._filter[1]
        pulled[:, :-1] -= phi / self._filter[1] * rows[:, 1:]
        self._effects = (rows, pulled, unfiltered_by(rows, phi))

    def setup(self, warmup_steps: int, *args: Any, **kwargs: Any) -> None:
        """Start near the plain SVD, spread over its sampling error; the model's arguments are already known."""
        self._data = seen_by_modes(self.data)
        z, rng = self._data.z, self._rng
        rank, num_times = self.data.space.log_weights.shape[0], z.shape[1]
        left, size, right = np.linalg.svd(z, full_matrices=False)
        size = np.maximum(size[:rank], 1e-6 * size[0])
        noise = max(self._data.total - float(size @ size), 1e-12 * self._data.total) / self._data.count
        error = self.jitter * math.sqrt(noise) / size[:, None]
        u = orthonormal_rows(left[:, :rank].T + error * rng.standard_normal((rank, z.shape[0])))
        v = orthonormal_rows(right[:rank] + error * rng.standard_normal((rank, num_times)))
        if len(self.space.length_scales) > 1:
            self.space.adapt(v @ z.T, u, noise)
        g = np.array([rng.choice(w.size, p=np.exp(w)) for w in self.space.log_weights], dtype=np.int64)
        spread = np.exp(0.2 * self.jitter * rng.standard_normal(rank))
        self._state = {
            "u": u,
            "f": unfiltered_by(v * math.sqrt(num_times) / spread[:, None], self._phi),
            "d": size / math.sqrt(num_times) * spread,
            "noise": np.array(noise * math.exp(0.2 * self.jitter * rng.standard_normal())),
            "g_u": g,
            "log_tau_u": np.log(self.space.values[g].sum(axis=1)),
            "images_u": column_images(u, self.space.vectors, g),
            "decay": np.array([rng.choice(w.size, p=np.exp(w)) for w in self._process[2]], dtype=np.int64),
        }

    def sample(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """One sweep from the kernel's own state, which ``params`` only mirrors."""
        state, data, model = self._state, self._data, self.data
        tried = self._accepted.copy()
        noise = float(state["noise"])
        if float(model.effect_precision) > 0:
            self._move_effects()
        data.draw(self._rng, state["u"], state["d"], state["f"], noise)
        if isinstance(data, CorrelatedData):
            self.draw_large_gaps(data, self._rng, state["u"], state["d"], state["f"], noise, state["decay"])
        noise = sweep(
            self._rng,
            (data.z, data.z_transposed, data.total, data.count),
            self._filter,
            self._effects,
            (state["u"], state["g_u"], state["log_tau_u"], state["images_u"]),
            (state["f"], state["decay"]),
            state["d"],
            noise,
            self.space.arrays,
            self._process,
            (draw_scales(self._rng, state["d"], model), float(model.noise_shape), float(model.noise_rate)),
            self.num_steps,
            self.num_passes,
            self._accepted,
        )
        state["noise"][()] = noise
        self._latest = self._accepted - tried
        return self._draw()

    def draw_large_gaps(
        self, data: CorrelatedData, rng: np.random.Generator, u: Array, d: Array, f: Array, noise: float, decay: Any
    ) -> None:
        """Draw series and what is missing at once where gaps are large; the series, in place, have these decays."""
        data.draw_large(rng, u, d, f, noise, self._process[0][decay])

    def _move_effects(self) -> None:
        """Hand parts of the local effects to the modes and back, the sum of both unchanged: b + c d u, f - c D.

        Along each column of the design the data see only the sum, so that drawn in turn both would move slowly. Given
        the rest c is normal.
        """
        state, effects, rng = self._state, self._data.effects, self._rng
        prior = float(self.data.effect_precision)
        patterns = basis_of(self.data.space) @ (state["u"].T * state["d"])  # (n, k)
        bands = self._process[0]
        image = np.empty(len(self.data.design))
        for mode, decay in enumerate(state["decay"]):
            for effect, column in enumerate(np.ascontiguousarray(self.data.design.numpy().T)):
                precision_times(bands[decay], column, image)
                precision = prior * float(patterns[:, mode] @ patterns[:, mode]) + float(column @ image)
                linear = float(state["f"][mode] @ image) - prior * float(effects[:, effect] @ patterns[:, mode])
                c = linear / precision + rng.standard_normal() / math.sqrt(precision)
                effects[:, effect] += c * patterns[:, mode]
                state["f"][mode] -= c * column

    def _draw(self) -> dict[str, Tensor]:
        """Copies of what the sweep moves, by site; modes in columns."""
        state = self._state
        draw = {
            "U": state["u"].T.copy(),
            "F": state["f"].T.copy(),
            "d": state["d"].copy(),
            "sigma": np.sqrt(state["noise"]),
            "length_index_space": state["g_u"].copy(),
            "length_scale_space": self.space.length_scales[state["g_u"]],
        }
        if len(self._data.shared):
            draw["shared_effects"] = self._data.shared.copy()
        index = torch.as_tensor(state["decay"].copy())
        own = {self._index_site: index} | {site: values[index] for site, values in self.sites.items()}
        return {site: torch.as_tensor(value) for site, value in draw.items()} | own
