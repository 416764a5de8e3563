"""The exact block sampler of the Bayesian singular value decomposition, as an MCMC kernel.

Each sweep draws, column by column on both sides, (length-scale, scale-mixture variable, d_i, u_i) jointly from their
conditional with u_i integrated out where the first two are chosen; then rotates pairs of modes within their spans,
swaps labels, and draws d and sigma exactly. With gaps the missing entries are drawn first, the local effects of their
cells integrated out. ``docs/bayesian_svd.md`` derives the steps; `probmodels.bayesian_svd.sweep` is the compiled
part.
"""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from probmodels.bayesian_svd.correlated import seen_by_modes
from probmodels.bayesian_svd.model import MatrixData, SideData
from probmodels.bayesian_svd.sweep import best_log_tau, column_images, sweep
from probmodels.errors import ProblemError
from probmodels.inference.mcmc.cost import seconds_of_sweep
from probmodels.inference.mcmc.kernels import Kernel
from probmodels.inference.problem import Problem
from probmodels.options import Count, Natural, NonNegative, checked

__all__ = ["BlockGibbs", "Side", "orthonormal_rows"]

Array = NDArray[np.float64]


class Side:
    """Arrays of one side as the compiled sweep takes them."""

    def __init__(self, side: SideData) -> None:
        self.values = np.ascontiguousarray(side.values.numpy())
        r = self.values.shape[1]
        self.vectors = np.empty((0, r, r)) if side.vectors is None else np.ascontiguousarray(side.vectors.numpy())
        self.log_weights = np.ascontiguousarray(side.log_weights.numpy())
        self.length_scales = side.length_scales.numpy()
        self.offset = np.zeros(self.log_weights.shape)

    @property
    def arrays(self) -> tuple[Array, ...]:
        return self.values, self.vectors, self.log_weights, self.offset

    def adapt(self, projected: Array, frame: Array, noise: float) -> None:
        """Let the scale-mixture variable follow a change of candidate so that a proposal keeps its fit.

        ``projected (k, r)`` holds the data times each mode of the other side.
        """
        for i, y in enumerate(projected):
            rest = np.delete(frame, i, axis=0)
            y = np.ascontiguousarray(y - (y @ rest.T) @ rest)
            middle = math.log(self.values[0].sum()) - math.log(max(y @ y, 1e-300))
            span = math.log(self.values.max() / self.values.min()) + 10.0
            self.offset[i] = best_log_tau(i, y, frame, self.values, self.vectors, noise, middle - span, middle + span)


class BlockGibbs(Kernel):
    """Exact block sampler of `probmodels.bayesian_svd.model` under the priors "conditioned" and "uniform".

    Parameters
    ----------
    problem
        Made by `probmodels.bayesian_svd.make_problem`.
    num_steps
        Steps on (length-scale, scale-mixture variable) within a column update.
    num_passes
        Passes of the rotation block over all pairs of modes; 0 leaves rotations and label swaps out, which is valid
        but mixes slowly within the spans.
    jitter
        Spread of the random starts about the plain SVD, in units of its sampling error.
    """

    on_cpu = True
    _series = "v"  # array of the state that holds the series of the modes

    @checked(ProblemError)
    def __init__(
        self, problem: Problem, *, num_steps: Count = 6, num_passes: Natural = 10, jitter: NonNegative = 1.0
    ) -> None:
        super().__init__()
        data = problem.args[0]
        if not isinstance(data, MatrixData):
            raise ProblemError(
                f"BlockGibbs samples problems made by probmodels.bayesian_svd.make_problem, not {problem.name!r}"
            )
        if problem.kwargs.get("prior", "conditioned") not in ("conditioned", "uniform"):
            raise ProblemError(
                f"BlockGibbs has no sampler for the frame prior {problem.kwargs['prior']!r}; use kernel='nuts'"
            )
        self.data = data
        self.num_steps, self.num_passes, self.jitter = num_steps, num_passes, jitter
        self.space, self.time = Side(data.space), Side(data.time)
        self._rng = np.random.default_rng(0)
        self._accepted = np.zeros((3, 2))
        self._latest = np.zeros((3, 2))
        self._state: dict[str, NDArray[Any]] = {}

    @classmethod
    def prepare(cls, problem: Problem) -> None:
        """Compile the sweep by one run of it on the problem, or load it from the cache of an earlier run.

        Chains that compiled it side by side could differ in the last bits of their sums, and so in their draws.
        """
        kernel = cls(problem)
        kernel.setup(0)
        kernel.sample({})

    @classmethod
    def seconds_of_sweep(cls, problem: Problem) -> float:
        """Time of a sweep of the problem, with its draw."""
        kernel = cls(problem)
        kernel.setup(0)
        return seconds_of_sweep(kernel)

    def seed(self, seed: int) -> None:
        """Seed the kernel's own generator; call before `setup`."""
        self._rng = np.random.default_rng(seed)

    def setup(self, warmup_steps: int, *args: Any, **kwargs: Any) -> None:
        """Start near the plain SVD, spread over its sampling error; the model's arguments are already known."""
        self._data = seen_by_modes(self.data)
        z, rng = self._data.z, self._rng
        rank = self.data.space.log_weights.shape[0]
        left, size, right = np.linalg.svd(z, full_matrices=False)
        size = np.maximum(size[:rank], 1e-6 * size[0])
        noise = max(self._data.total - float(size @ size), 1e-12 * self._data.total) / self._data.count
        error = self.jitter * math.sqrt(noise) / size[:, None]
        u = orthonormal_rows(left[:, :rank].T + error * rng.standard_normal((rank, z.shape[0])))
        v = orthonormal_rows(right[:rank] + error * rng.standard_normal((rank, z.shape[1])))
        self._state = {
            "u": u,
            "v": v,
            "d": size * np.exp(0.02 * self.jitter * rng.standard_normal(rank)),
            "noise": np.array(noise * math.exp(0.2 * self.jitter * rng.standard_normal())),
        }
        for side, frame, arrays, projected in (("u", u, self.space, v @ z.T), ("v", v, self.time, u @ z)):
            if len(arrays.length_scales) > 1:
                arrays.adapt(projected, frame, noise)
            g = np.array([rng.choice(w.size, p=np.exp(w)) for w in arrays.log_weights], dtype=np.int64)
            self._state[f"g_{side}"] = g
            self._state[f"log_tau_{side}"] = np.log(arrays.values[g].sum(axis=1))
            self._state[f"images_{side}"] = column_images(frame, arrays.vectors, g)

    @property  # type: ignore[misc]  # Pyro lets it be set; this kernel finds its own start
    def initial_params(self) -> dict[str, Tensor]:
        """The start, as `sample` returns draws."""
        return self._draw()

    def sample(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """One sweep from the kernel's own state, which ``params`` only mirrors."""
        state, data, model = self._state, self._data, self.data
        tried = self._accepted.copy()
        noise = float(state["noise"])
        data.draw(self._rng, state["u"], state["d"], state["v"], noise)
        noise = sweep(
            self._rng,
            (data.z, data.z_transposed, data.total, data.count),
            (state["u"], state["g_u"], state["log_tau_u"], state["images_u"]),
            (state["v"], state["g_v"], state["log_tau_v"], state["images_v"]),
            state["d"],
            noise,
            self.space.arrays,
            self.time.arrays,
            (float(model.scale), float(model.noise_shape), float(model.noise_rate)),
            self.num_steps,
            self.num_passes,
            self._accepted,
        )
        state["noise"][()] = noise
        self._latest = self._accepted - tried
        return self._draw()

    def _draw(self) -> dict[str, Tensor]:
        """Copies of what the sweep moves, by site; the frames have modes in columns."""
        state = self._state
        draw = {
            "U": state["u"].T.copy(),
            "V": state["v"].T.copy(),
            "d": state["d"].copy(),
            "sigma": np.sqrt(state["noise"]),
            "length_index_space": state["g_u"].copy(),
            "length_index_time": state["g_v"].copy(),
            "length_scale_space": self.space.length_scales[state["g_u"]],
            "length_scale_time": self.time.length_scales[state["g_v"]],
        }
        if len(self._data.shared):
            draw["shared_effects"] = self._data.shared.copy()
        return {site: torch.as_tensor(value) for site, value in draw.items()}

    def export(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """The draw with the local effects, which are drawn for kept draws alone."""
        if not self.data.design.shape[1]:
            return params
        # A generator of its own, so that the chain does not depend on which draws are kept.
        rng = np.random.default_rng(self._rng.bit_generator.state["state"]["state"] % 2**64)
        state = self._state
        effects = self._data.local_effects(rng, state["u"], state["d"], state[self._series], float(state["noise"]))
        return {**params, "fixed_effects": torch.from_numpy(effects)}

    def sample_stats(self) -> dict[str, float]:
        """Acceptance rates of the latest sweep."""
        rates = self._latest[:, 0] / np.maximum(self._latest[:, 1], 1.0)
        return {"acceptance_rate": float(rates[2]), "rotation_acceptance": float(rates[0])}

    def logging(self) -> OrderedDict[str, str]:
        """Acceptance rates since the start, for the progress bar."""
        rates = self._accepted[:, 0] / np.maximum(self._accepted[:, 1], 1.0)
        return OrderedDict(column=f"{rates[2]:.2f}", rotation=f"{rates[0]:.2f}")

    def diagnostics(self) -> dict[str, float]:
        """Acceptance rates since the start: rotations, label swaps, columns."""
        rates = self._accepted[:, 0] / np.maximum(self._accepted[:, 1], 1.0)
        return dict(zip(("rotation", "swap", "column"), map(float, rates), strict=True))

    def state_dict(self) -> dict[str, Tensor | int | float | str]:
        """State of chain and generator."""
        out: dict[str, Any] = {name: torch.from_numpy(value.copy()) for name, value in self._state.items()}
        out["accepted"] = torch.from_numpy(self._accepted.copy())
        out |= {f"data_{name}": torch.from_numpy(value) for name, value in self._data.state().items()}
        out["offset_u"], out["offset_v"] = (torch.from_numpy(side.offset.copy()) for side in (self.space, self.time))
        out["generator"] = json.dumps(self._rng.bit_generator.state)
        return out

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`; call after `setup`."""
        for name in self._state:
            self._state[name] = state[name].numpy().copy()
        self._accepted = state["accepted"].numpy().copy()
        self.space.offset, self.time.offset = (state[f"offset_{side}"].numpy().copy() for side in "uv")
        own = {name.removeprefix("data_"): value.numpy() for name, value in state.items() if name.startswith("data_")}
        self._data.load(own)
        self._rng.bit_generator.state = json.loads(state["generator"])


def orthonormal_rows(rows: Array) -> Array:
    """The frame nearest to given rows (polar factor)."""
    left, _, right = np.linalg.svd(rows, full_matrices=False)
    return np.ascontiguousarray(left @ right)
