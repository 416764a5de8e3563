"""The published Gibbs sampler of the Bayesian SVD, kept for comparison.

Generative idea, for data ``Z`` (n space x m time) and rank k::

    Z   = M + U diag(d) V' + noise,  noise ~ Normal(0, sigma^2)
    u_i | other columns  ~  projected normal of N' Omega_i N,  N = null space of the other columns
    v_i | other columns  ~  the same in time

North, Risser and Breidt specify full conditionals of the columns rather than a joint density, and sample them one at
a time. `PublishedGibbs` runs those conditionals, at the cost at which they are published: dense linear algebra in the
full space, a null space and an inverse for every column of every sweep.

**It is no sampler of a posterior.** See `PublishedGibbs` for why; use the sampler of `probmodels.bayesian_svd` for
inference and this one to reproduce or to measure against the paper.

References
----------
North, J. S., Risser, M. D. and Breidt, F. J. (2023). A flexible class of priors for orthonormal matrices with basis
function-specific structure. https://arxiv.org/abs/2307.13627
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import linalg
from scipy.special import log_ndtr, ndtr, ndtri
from torch import Tensor

from probmodels.bayesian_svd.published.side import Side, cholesky, factorise, log_normal, make_side, project
from probmodels.errors import ProblemError
from probmodels.inference.mcmc.kernels import Kernel

__all__ = ["PublishedGibbs"]

Array = NDArray[np.float64]

_SCALE_BOUND = 1e6  # scale A of the half-Cauchy and half-t priors on standard deviations
_BETA_VARIANCE = 100.0  # prior variance of a fixed effect


class PublishedGibbs(Kernel):
    r"""Full conditionals of North, Risser and Breidt as they are published: a compatibility mode.

    .. warning::
       For comparison with the paper only. The draws do not come from a posterior:

       - When kernels differ by column, the conditionals of the columns belong to **no joint density**
         (pseudo-Gibbs): what the chain converges to depends on the order in which columns are visited.
       - The exponents of ``d`` are one short of the Jacobian of polar coordinates. With the scales integrated out this
         leaves ``p(d) ~ d^-2`` at zero: **improper** for any data, and components that the data do not need drift to 0.
       - A column moves only in the null space of the others, so that the modes **cannot rotate within their span**,
         where most of the uncertainty of neighbouring modes lies. Intervals come out too narrow.
       - The length of the normal draw of a column is discarded, which is no Gibbs step for a column on the sphere.
       - As in the published software, ``d`` is updated with the null spaces and length-scales of the previous sweep,
         and proposals of length-scales, truncated at both bounds, are corrected for the lower bound only.

       `coherent` is False and `caveats` sums this up, so that a result can carry it.

    One sweep draws, in this order: fixed effects, ``d`` (Metropolis, one at a time), columns of ``U``, columns of
    ``V``, the noise variance, the mixture variances, the length-scales (Metropolis, one at a time). With
    ``p = n - k + 1``, ``N`` the null space of the other columns and ``w = N' u_i``, a column is

    .. math:: w \sim N_C\Big(\tfrac{d}{\sigma^2} N'\tilde Z v_i,\;
              \tfrac{d^2}{\sigma_{U,i}^2} (N'\Omega_i N)^{-1} + \tfrac{d^2}{\sigma^2} I\Big), \qquad u_i = N w / |w| .

    Parameters
    ----------
    z
        Data, (n, m), finite: the conditionals know no missing entries.
    distance_space, distance_time
        Pairwise distances, (n, n) and (m, m).
    rank
        Number of modes k, ``1 <= k <= min(n, m) - 1``.
    kernel_space, kernel_time
        Names out of `probmodels.distributions.covariance.KERNELS`, ``periodic`` excepted.
    length_scale_space, length_scale_time
        Starting values, one or one for each mode; the fixed values where the bounds are None. By default the middle of
        the bounds.
    bounds_space, bounds_time
        Lower and upper end of the uniform prior of the length-scales; None keeps them fixed.
    covariates
        Fixed effects with prior Normal(0, 100): of shape (m, q) each location has coefficients ``beta`` (n, q) of its
        own; of shape (n, m, q) one ``beta`` (q,) is shared, as in the paper. None leaves the data as they are.
    nugget
        Added to the diagonal of each kernel; the paper has none, and fine grids then fail to factorise.
    bessel
        Matérn kernels through Bessel functions, as in the published software; the same values to rounding.
    redundant
        Also do the work that the published software repeats without need (each proposed kernel built twice with
        inverse and determinant, ``N'R`` before ``N'R v``, ``trace(R'R)`` of the residual for each value of ``d``).
        Draws agree to rounding; only time differs. For benchmarks.
    seed
        Seed of the kernel's own generator; `seed` sets it anew.

    Raises
    ------
    ProblemError
        If shapes disagree, entries are not finite, rank or bounds are out of range, or a kernel is unknown.
    numpy.linalg.LinAlgError
        While sampling, if a kernel matrix cannot be factorised.

    Examples
    --------
    >>> import numpy as np
    >>> z = np.random.default_rng(0).standard_normal((8, 6))
    >>> line = lambda n: np.abs(np.subtract.outer(np.arange(n), np.arange(n))).astype(float)
    >>> kernel = PublishedGibbs(z, line(8), line(6), rank=2, bounds_space=(0.5, 4), bounds_time=(0.5, 4))
    >>> kernel.setup(warmup_steps=10)
    >>> sorted(kernel.sample(kernel.initial_params))
    ['U', 'V', 'd', 'length_scale_space', 'length_scale_time', 'sigma']
    """

    on_cpu = True
    coherent = False
    side_type: type[Side] = Side
    caveats = (
        "Published full conditionals, for comparison only: they form no joint density when kernels differ by column; "
        "they are improper as d goes to 0; they cannot rotate modes within their span."
    )

    def __init__(
        self,
        z: ArrayLike,
        distance_space: ArrayLike,
        distance_time: ArrayLike,
        rank: int,
        *,
        kernel_space: str = "matern72",
        kernel_time: str = "matern72",
        length_scale_space: float | Sequence[float] | None = None,
        length_scale_time: float | Sequence[float] | None = None,
        bounds_space: tuple[float, float] | None = None,
        bounds_time: tuple[float, float] | None = None,
        covariates: ArrayLike | None = None,
        nugget: float = 1e-8,
        bessel: bool = False,
        redundant: bool = False,
        seed: int = 0,
    ) -> None:
        self.z = np.array(z, dtype=float)  # (n, m)
        if self.z.ndim != 2:
            raise ProblemError(f"z has shape {self.z.shape}; expected a matrix (space, time)")
        if not np.isfinite(self.z).all():
            count = int((~np.isfinite(self.z)).sum())
            raise ProblemError(
                f"z holds {count} entries that are not finite; the published conditionals know no gaps: fill them, or "
                "use the sampler of probmodels.bayesian_svd, which augments them"
            )
        n, m = self.z.shape
        if not 1 <= rank < min(n, m):
            raise ProblemError(f"rank={rank} is out of range: choose 1 to {min(n, m) - 1} for data of shape ({n}, {m})")
        self.rank = rank
        self.redundant = redundant
        self.covariates = None if covariates is None else _check_covariates(covariates, n, m)
        self.beta = np.zeros(0)
        self.mean = np.zeros((n, m))
        if self.covariates is not None:
            self._set_beta(self._least_squares())

        left, d, right = np.linalg.svd(self.z - self.mean, full_matrices=False)
        self.d = d[:rank].copy()
        self.noise_variance = float((d[rank:] ** 2).sum() / (n * m)) or 1e-6 * float(d[0] ** 2) / (n * m)
        self.step_d = np.full(rank, np.sqrt(self.noise_variance))
        self.sides: Mapping[str, Side] = {
            name: make_side(
                name, frame, distance, kernel, scale, bounds, nugget=nugget, bessel=bessel, kind=self.side_type
            )
            for name, frame, distance, kernel, scale, bounds in (
                ("space", left[:, :rank], distance_space, kernel_space, length_scale_space, bounds_space),
                ("time", right[:rank].T, distance_time, kernel_time, length_scale_time, bounds_time),
            )
        }
        self._rng = np.random.default_rng(seed)
        self._sweeps = 0
        self._warmup_steps = 0
        self._warming = False
        self._accepted = {name: np.zeros(rank) for name in ("d", "space", "time")}  # of the latest sweep
        self._window = {name: np.zeros(rank) for name in self._accepted}  # since the latest adaptation
        self._total = {name: np.zeros(rank) for name in self._accepted}  # since the end of warm-up
        self._kept = 0

    # -- the conditionals ---------------------------------------------------------------------------------------------

    def draw_beta(self) -> None:
        """Fixed effects given everything else: normal with prior precision 1/100."""
        if self.covariates is None:
            return
        x = self.covariates
        residual = self.z - self._signal()
        if x.ndim == 2:  # (m, q), coefficients of each location
            gram, cross = x.T @ x, residual @ x
        else:  # (n, m, q), shared
            flat = x.reshape(-1, x.shape[-1])
            gram, cross = flat.T @ flat, residual.ravel() @ flat
        precision = gram / self.noise_variance + np.eye(len(gram)) / _BETA_VARIANCE
        factor = cholesky(precision, "the precision of the fixed effects")
        mean = linalg.cho_solve((factor, False), cross.T / self.noise_variance)
        noise = linalg.solve_triangular(factor, self._rng.standard_normal(mean.shape))
        self._set_beta((mean + noise).T)

    def draw_d(self) -> None:
        """Singular values, one Metropolis step each, with the null spaces as the latest column draws left them."""
        space, time = self.sides["space"], self.sides["time"]
        exponent = (space.size - self.rank - 1) + (time.size - self.rank - 1)
        rate = 0.5 * (space.quadratic / space.variance + time.quadratic / time.variance)  # (k,)
        for i in range(self.rank):
            old, step = self.d[i], self.step_d[i]
            new = self._truncated_normal(old, step, 0.0, np.inf)
            ratio = exponent * np.log(new / old) - rate[i] * (new**2 - old**2)
            ratio -= 0.5 * (self._squares(i, new) - self._squares(i, old)) / self.noise_variance
            ratio += log_ndtr(old / step) - log_ndtr(new / step)
            if np.log(self._rng.random()) < ratio:
                self.d[i] = new
                self._accepted["d"][i] = 1.0

    def draw_column(self, name: str, i: int) -> None:
        """Column i of the frame of side ``name``: a normal draw in the null space of the others, scaled to length 1."""
        side = self.sides[name]
        partner = self.sides["time" if name == "space" else "space"].frame[:, i]
        side.project(i)
        null, d = side.null[i], self.d[i]
        if self.redundant:
            residual = self.z - self.mean - self._signal(without=i)
            cross = (null.T @ (residual if name == "space" else residual.T)) @ partner
        else:  # the other modes vanish in the null space
            data = self.z - self.mean
            cross = null.T @ ((data if name == "space" else data.T) @ partner)
        precision = d**2 / side.variance[i] * side.inverse[i]
        precision[np.diag_indices_from(precision)] += d**2 / self.noise_variance
        factor = cholesky(precision, f"the precision of column {i} in {name}")
        draw = linalg.cho_solve((factor, False), d / self.noise_variance * cross)
        draw += linalg.solve_triangular(factor, self._rng.standard_normal(len(draw)))
        side.locate(i, draw / np.linalg.norm(draw))
        side.frame[:, i] = null @ side.coordinates[i]

    def draw_columns(self, name: str) -> None:
        """All columns of a side, one after the other."""
        for i in range(self.rank):
            self.draw_column(name, i)

    def draw_noise(self) -> None:
        """Noise variance under a half-t prior on the standard deviation (1 degree of freedom, 2 with fixed effects)."""
        residual = self.z - self.mean - self._signal()
        dof = 1.0 if self.covariates is None else 2.0
        self.noise_variance = self._half_t(self.noise_variance, dof, self.z.size, float((residual**2).sum()))

    def draw_variances(self, name: str) -> None:
        """Mixture variances of the columns of a side; half-Cauchy prior on their square roots."""
        side = self.sides[name]
        for i in range(self.rank):
            squares = self.d[i] ** 2 * side.quadratic[i]
            side.variance[i] = self._half_t(side.variance[i], 1.0, len(side.coordinates[i]), squares)

    def draw_length_scales(self, name: str) -> None:
        """Length-scales of a side, one Metropolis step each with the kernel matrix recomputed."""
        side = self.sides[name]
        if side.bounds is None:
            return
        lower, upper = side.bounds
        for i in range(self.rank):
            old, step = side.length_scale[i], side.step[i]
            new = self._truncated_normal(old, step, lower, upper)
            matrix = side.build(new)
            if self.redundant:
                factorise(side.build(old))
                factorise(matrix)
            value = self.d[i] * side.coordinates[i]
            ratio = log_normal(value, side.variance[i], project(side.null[i], matrix))
            ratio -= log_normal(value, side.variance[i], side.projected[i])
            ratio += float(log_ndtr((old - lower) / step) - log_ndtr((new - lower) / step))
            if np.log(self._rng.random()) < ratio:
                side.length_scale[i] = new
                side.matrix[i] = matrix
                self._accepted[name][i] = 1.0

    # -- the kernel protocol ------------------------------------------------------------------------------------------

    def seed(self, seed: int) -> None:
        """Start the kernel's own generator anew."""
        self._rng = np.random.default_rng(seed)

    def setup(self, warmup_steps: int, *args: Any, **kwargs: Any) -> None:
        """Begin warm-up, which adapts the Metropolis steps every ten sweeps."""
        self._warmup_steps = int(warmup_steps)
        self._warming = warmup_steps > 0

    def end_warmup(self) -> None:
        """Freeze the Metropolis steps."""
        self._warming = False

    @property
    def initial_params(self) -> dict[str, Tensor]:
        """Present state by site name; the truncated SVD before the first sweep."""
        return self._params()

    @initial_params.setter
    def initial_params(self, params: Mapping[str, Tensor]) -> None:
        values = {name: value.detach().cpu().double().numpy().copy() for name, value in params.items()}
        expected = {name: tuple(value.shape) for name, value in self._params().items()}
        for name, value in values.items():
            if expected.get(name) != value.shape:
                known = ", ".join(f"{k} {v}" for k, v in expected.items())
                raise ProblemError(f"initial value {name!r} of shape {value.shape} does not fit; the sites are {known}")
        if "beta" in values:
            self._set_beta(values["beta"])
        self.d = values.get("d", self.d)
        if "sigma" in values:
            self.noise_variance = float(values["sigma"]) ** 2
        for name, site in (("space", "U"), ("time", "V")):
            side = self.sides[name]
            side.frame = values.get(site, side.frame)
            side.length_scale = values.get(f"length_scale_{name}", side.length_scale)
            side.rebuild()

    def sample(self, params: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """One sweep. The state lives in the kernel; ``params`` is not read.

        Returns
        -------
        dict
            ``U`` (n, k), ``V`` (m, k), ``d`` (k,), ``sigma`` (), ``length_scale_space`` (k,), ``length_scale_time``
            (k,), and ``beta`` where there are covariates; double precision.
        """
        for accepted in self._accepted.values():
            accepted[:] = 0.0
        self.draw_beta()
        self.draw_d()
        for name in ("space", "time"):
            self.draw_columns(name)
        self.draw_noise()
        for name in ("space", "time"):
            self.draw_variances(name)
        for name in ("space", "time"):
            self.draw_length_scales(name)
        self._count()
        return self._params()

    def sample_stats(self) -> dict[str, float]:
        """Statistics of the latest draw; with no joint density the Gaussian log-likelihood stands in for ``lp``."""
        squares = float(((self.z - self.mean - self._signal()) ** 2).sum())
        log_likelihood = -0.5 * (self.z.size * np.log(2 * np.pi * self.noise_variance) + squares / self.noise_variance)
        stats = {"log_likelihood": float(log_likelihood), "acceptance_d": float(self._accepted["d"].mean())}
        for name, side in self.sides.items():
            if side.bounds is not None:
                stats[f"acceptance_length_scale_{name}"] = float(self._accepted[name].mean())
        return stats

    def diagnostics(self) -> dict[str, Any]:
        """Mean acceptance by mode since warm-up, and the caveats of the method."""
        rates = {f"acceptance_{name}": (total / max(self._kept, 1)).tolist() for name, total in self._total.items()}
        return {**rates, "caveats": self.caveats}

    def logging(self) -> dict[str, str]:
        """Short state for a progress bar."""
        return {"sigma": f"{np.sqrt(self.noise_variance):.3g}", "acc d": f"{self._accepted['d'].mean():.2f}"}

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next draw depends on, generator included."""
        arrays: dict[str, Array] = {"d": self.d, "beta": self.beta, "step_d": self.step_d}
        for name, side in self.sides.items():
            for key in ("frame", "length_scale", "variance", "step", "quadratic"):
                arrays[f"{name}.{key}"] = getattr(side, key)
        for name in self._accepted:
            arrays[f"window.{name}"] = self._window[name]
            arrays[f"total.{name}"] = self._total[name]
        state: dict[str, Any] = {key: _tensor(value) for key, value in arrays.items()}
        state["noise_variance"] = self.noise_variance
        state["rng"] = json.dumps(self._rng.bit_generator.state)
        for key in ("sweeps", "warmup_steps", "warming", "kept"):
            state[key] = int(getattr(self, f"_{key}"))
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict` to identical draws.

        Raises
        ------
        ProblemError
            If the state belongs to data of another shape or to another rank.
        """
        shape = tuple(state["space.frame"].shape) + tuple(state["time.frame"].shape)
        mine = self.sides["space"].frame.shape + self.sides["time"].frame.shape
        if shape != mine:
            raise ProblemError(
                f"the saved state has frames of shapes {shape[:2]}, {shape[2:]}; this problem has "
                f"{mine[:2]}, {mine[2:]}: load the state that belongs to these data and this rank"
            )
        arrays = {key: value.numpy().copy() for key, value in state.items() if isinstance(value, Tensor)}
        self.d, self.step_d = arrays["d"], arrays["step_d"]
        if self.covariates is not None:
            self._set_beta(arrays["beta"])
        for name, side in self.sides.items():
            side.frame, side.length_scale = arrays[f"{name}.frame"], arrays[f"{name}.length_scale"]
            side.variance, side.step = arrays[f"{name}.variance"], arrays[f"{name}.step"]
            side.rebuild()
            side.quadratic = arrays[f"{name}.quadratic"]  # of the length-scales before the latest update
        for name in self._accepted:
            self._window[name], self._total[name] = arrays[f"window.{name}"], arrays[f"total.{name}"]
        self.noise_variance = float(state["noise_variance"])
        self._rng = np.random.default_rng()
        self._rng.bit_generator.state = json.loads(state["rng"])
        self._sweeps, self._warmup_steps = int(state["sweeps"]), int(state["warmup_steps"])
        self._warming, self._kept = bool(state["warming"]), int(state["kept"])

    # -- parts --------------------------------------------------------------------------------------------------------

    def _params(self) -> dict[str, Tensor]:
        space, time = self.sides["space"], self.sides["time"]
        params = {
            "U": space.frame,
            "V": time.frame,
            "d": self.d,
            "sigma": np.sqrt(self.noise_variance),
            "length_scale_space": space.length_scale,
            "length_scale_time": time.length_scale,
        }
        if self.covariates is not None:
            params["beta"] = self.beta
        return {name: _tensor(value) for name, value in params.items()}

    def _signal(self, without: int | None = None) -> Array:
        """U diag(d) V', (n, m), with all modes or all but one."""
        left, right, d = self.sides["space"].frame, self.sides["time"].frame, self.d
        if without is not None:
            left, right, d = (np.delete(x, without, axis=-1) for x in (left, right, d))
        return (left * d) @ right.T

    def _squares(self, i: int, d: float) -> float:
        """Sum of squared residuals with ``d`` in place i, up to a constant that all values of ``d`` share."""
        space, time = self.sides["space"].frame, self.sides["time"].frame
        if not self.redundant:  # orthonormal frames: modes do not interact
            return d**2 - 2.0 * d * float(space[:, i] @ ((self.z - self.mean) @ time[:, i]))
        values = self.d.copy()
        values[i] = d
        for side in self.sides.values():
            np.linalg.slogdet(side.projected[i])
        first, second = (self.z - self.mean - (space * values) @ time.T for _ in range(2))
        return float(np.trace(first.T @ second))

    def _half_t(self, variance: float, dof: float, count: int, squares: float) -> float:
        """Variance given ``squares`` of ``count`` normals; half-t prior on its root as a mixture of inverse gammas."""
        auxiliary = (1.0 / _SCALE_BOUND**2 + dof / variance) / self._rng.gamma(0.5 * (dof + 1.0))
        return float((dof / auxiliary + 0.5 * squares) / self._rng.gamma(0.5 * (count + dof)))

    def _truncated_normal(self, mean: float, scale: float, lower: float, upper: float) -> float:
        low, high = ndtr((lower - mean) / scale), ndtr((upper - mean) / scale)
        value = mean + scale * float(ndtri(low + (high - low) * self._rng.random()))
        return float(np.clip(value, np.nextafter(lower, upper), upper))

    def _least_squares(self) -> Array:
        assert self.covariates is not None
        if self.covariates.ndim == 2:
            return np.linalg.lstsq(self.covariates, self.z.T, rcond=None)[0].T
        return np.linalg.lstsq(self.covariates.reshape(self.z.size, -1), self.z.ravel(), rcond=None)[0]

    def _set_beta(self, beta: Array) -> None:
        assert self.covariates is not None
        self.beta = beta
        self.mean = beta @ self.covariates.T if self.covariates.ndim == 2 else self.covariates @ beta

    def _count(self) -> None:
        """Counters, and during warm-up the published rule: every ten sweeps aim at an acceptance of 0.25 to 0.45."""
        self._sweeps += 1
        if not self._warming:
            self._kept += 1
            for name, accepted in self._accepted.items():
                self._total[name] += accepted
            return
        for name, accepted in self._accepted.items():
            self._window[name] += accepted
            if self._sweeps % 10 == 0:
                step = self.step_d if name == "d" else self.sides[name].step
                rate = self._window[name] / 10.0
                step *= np.where(rate < 0.25, 0.7, np.where(rate > 0.45, 1.0 / 0.7, 1.0))
                self._window[name][:] = 0.0
        if self._sweeps >= self._warmup_steps:
            self._warming = False


def _check_covariates(covariates: ArrayLike, n: int, m: int) -> Array:
    x = np.array(covariates, dtype=float)
    if x.shape[:-1] not in ((m,), (n, m)):
        raise ProblemError(
            f"covariates have shape {x.shape}; expected ({m}, q), coefficients of each location, or "
            f"({n}, {m}, q), shared coefficients"
        )
    if not np.isfinite(x).all():
        raise ProblemError("covariates hold entries that are not finite; drop or fill them")
    return x


def _tensor(value: ArrayLike) -> Tensor:
    return torch.as_tensor(np.array(value, dtype=float))
