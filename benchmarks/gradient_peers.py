"""The block sampler against gradients: NumPyro's No-U-Turn sampler on the same densities, compiled by XLA.

    python benchmarks/gradient_peers.py --seeds 0 1 2
    python benchmarks/gradient_peers.py --tune --seeds 99

Sixty cells, sixty times, three modes of size 3, 2 and 1.2 over noise of a tenth of their variance, in three models.
``frame``: series are numbers, both frames are uniform. ``iid``: series are white processes, patterns have the prior
"conditioned" with its default grid of length-scales. ``ar1``: the same with AR(1) series, the default of ``probmodels
sst``. Each seed makes a data set of its own.

**The peer.** ``pip install numpyro`` (it brings JAX) in the environment of the project. Frames are polar expanded
(Jauch, Hoff and Dunson 2021): X is a free matrix, normal with the covariance of one candidate, U = X (X'X)^(-1/2), and
the density is that of our model against the law of such a U. It gets the reduced data and the candidates that our
sampler gets, length-scales are summed out, products with the data are shared. Double precision, one thread, one chain;
it starts at the leading singular vectors. In ``iid`` series are integrated out for NUTS, in ``ar1`` decays are, and
NUTS moves series times their size, which the data fix; our sampler draws series and decays. ``--tune`` compares
step-size targets and mass matrices on a seed that no figure uses; the settings here are those of most effective draws
per second (median entry).

**What is measured.** CPU seconds of sampling alone, and with the warm-up (1000 steps each) counted; compilation counts
nowhere, and is in a column of its own. Effective draws (bulk) of loadings ``u_ai d_i``, modes sorted by
size and signed as the leading singular vectors.

**Where no ratio is given.** Both must sample one posterior: means and variances of loadings, d and sigma are compared
in Monte Carlo errors, root mean square and largest. A row whose largest exceeds the bound (1 % for all comparisons of
the run together) has no ratio. Nor has one where the worst entry of the peer has fewer than 30 effective draws.
"""

from __future__ import annotations

import common  # isort: skip  (pins threads before numpy is loaded)

import argparse
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from scipy import stats

os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
from numpyro.infer import NUTS

from probmodels.bayesian_svd import BlockGibbs, make_problem
from probmodels.bayesian_svd.model import MatrixData, SeriesData, SideData
from probmodels.bayesian_svd.series_sampler import SeriesGibbs
from probmodels.distributions.processes import banded_precision
from probmodels.inference.problem import Problem

jax.config.update("jax_enable_x64", True)

Array = common.Array
CASES = ("frame", "iid", "ar1")
SETTINGS: dict[str, dict[str, Any]] = {
    "frame": {"target_accept_prob": 0.65, "dense_mass": False},
    "iid": {"target_accept_prob": 0.65, "dense_mass": True},
    "ar1": {"target_accept_prob": 0.8, "dense_mass": False},
}
TUNED = [{"target_accept_prob": accept, "dense_mass": dense} for dense in (False, True) for accept in (0.65, 0.8, 0.9)]
SIZES = np.array([3.0, 2.0, 1.2])  # standard deviations of the modes
FEWEST = 30  # effective draws of a peer of which a ratio is taken
LEVEL = 0.01


def simulate(seed: int, cells: int, times: int, snr: float, decay: float) -> xr.DataArray:
    """A field (cell, time) of smooth patterns, AR(1) series and noise of variance var(signal) / snr."""
    rng = np.random.default_rng(seed)
    place = np.linspace(-5, 5, cells)
    patterns = common.frame(place[:, None], len(SIZES), common.LENGTH_SCALE, rng)
    series = rng.standard_normal((len(SIZES), times))
    for t in range(1, times):
        series[:, t] = decay * series[:, t - 1] + np.sqrt(1 - decay**2) * series[:, t]
    signal = (patterns * SIZES) @ series
    values = signal + np.sqrt(signal.var() / snr) * rng.standard_normal(signal.shape)
    return xr.DataArray(values, {"cell": place, "time": np.arange(times, dtype=float)}, ("cell", "time"))


def problem_of(case: str, seed: int, options: argparse.Namespace) -> Problem:
    data = simulate(seed, options.cells, options.times, options.snr, 0.6 if case == "ar1" else 0.0)
    prior: dict[str, Any] = {"frame_prior": "uniform"} if case == "frame" else {"series": case}
    return make_problem(data, rank=len(SIZES), fixed_effects=(), area_weights=False, **prior)


# -- the density, for JAX ---------------------------------------------------------------------------------------------


@jax.custom_vjp
def inverse_root(a: Any) -> Any:
    """A^(-1/2) of a positive matrix; its derivative holds where eigenvalues are equal, as that of `eigh` does not."""
    values, vectors = jnp.linalg.eigh(a)
    return (vectors * values**-0.5) @ vectors.T


def _forward(a: Any) -> Any:
    values, vectors = jnp.linalg.eigh(a)
    return (vectors * values**-0.5) @ vectors.T, (values**0.5, vectors)


def _backward(kept: Any, slope: Any) -> Any:
    root, vectors = kept
    inner = vectors.T @ slope @ vectors
    return (-vectors @ (inner / (root[:, None] * root * (root[:, None] + root))) @ vectors.T,)


inverse_root.defvjp(_forward, _backward)


def polar(x: Any) -> Any:
    """X (X'X)^(-1/2)."""
    return x @ inverse_root(x.T @ x)


def log_conditioned(side: SideData) -> Callable[[Any], Any]:
    """Log density of a frame under the prior "conditioned", up to a constant; candidates summed out."""
    values, weights = jnp.asarray(side.values.numpy()), jnp.asarray(side.log_weights.numpy())
    vectors = None if side.vectors is None else jnp.asarray(side.vectors.numpy())
    log_det = jnp.log(values).sum(1)

    def density(u: Any) -> Any:
        rows, rank = u.shape
        image = jnp.broadcast_to(u, (len(values), rows, rank)) if vectors is None else jnp.swapaxes(vectors, 1, 2) @ u
        rough = jnp.einsum("gri,gr->gi", image**2, 1 / values)
        gram = jnp.einsum("gri,gr,grj->gij", image, values, image)
        root = jnp.log(jnp.diagonal(jnp.linalg.cholesky(gram), axis1=1, axis2=2))
        minors = jnp.cumsum(root, 1) - root  # half the log determinants of the columns before each
        free = rows - jnp.arange(rank)
        each = weights.T - 0.5 * log_det[:, None] + minors - 0.5 * free * jnp.log(rough)
        return jax.scipy.special.logsumexp(each, 0).sum()

    return density


def log_autoregressive(series: SeriesData) -> Callable[[Any], Any]:
    """Log density of series (T, k) of unit variance, up to a constant; decays summed out."""
    bands, log_det = map(jnp.asarray, banded_precision(series.process, series.scale.numpy(), series.steps.numpy()))
    diagonal, beside = bands[:, 0], bands[:, 1, :-1]
    weights = jnp.asarray(series.log_weights.numpy())

    def density(f: Any) -> Any:
        square = diagonal @ f**2 + 2 * (beside @ (f[1:] * f[:-1]))  # (G, k)
        return jax.scipy.special.logsumexp(weights.T + 0.5 * log_det[:, None] - 0.5 * square, 0).sum()

    return density


class Target(NamedTuple):
    """A density for NUTS: ``potential`` is minus its log at unconstrained ``parameters``, which ``read`` maps to U, d,
    sigma; ``start`` is near the leading singular vectors."""

    potential: Callable[[Any], Any]
    read: Callable[[Any], Any]
    start: dict[str, Any]


def target_of(case: str, data: MatrixData) -> Target:
    """The density of a case."""
    z = jnp.asarray(data.z.numpy())
    moments = z @ z.T
    total, count = float(data.rest) + float((data.z**2).sum()), float(data.num_free)
    scale, shape, rate = (float(x) for x in (data.scale, data.noise_shape, data.noise_rate))
    smooth = case != "frame"
    log_prior = log_conditioned(data.space)
    log_series = log_prior if data.series is None else log_autoregressive(data.series)
    middle = len(data.space.values) // 2
    root = jnp.sqrt(jnp.asarray(data.space.values[middle].numpy()))  # of the covariance of X, a candidate; any is valid
    turn = jnp.eye(len(root)) if data.space.vectors is None else jnp.asarray(data.space.vectors[middle].numpy())

    def frame(parameters: Any) -> Any:
        x = parameters["x"]
        return polar(turn @ (root[:, None] * x)) if smooth else polar(x)

    def read(parameters: Any) -> Any:
        return frame(parameters), jnp.exp(parameters["log_d"]), jnp.exp(parameters["log_sigma"])

    def potential(parameters: Any) -> Any:
        u, d, sigma = read(parameters)
        noise = sigma**2
        value = -0.5 * (parameters["x"] ** 2).sum()
        if smooth:  # the law of u by expansion alone is the matrix angular central Gaussian one
            image = (turn.T @ u) / root[:, None]
            value += log_prior(u) + len(u) * jnp.log(jnp.diagonal(jnp.linalg.cholesky(image.T @ image))).sum()
        value += (parameters["log_d"] - 0.5 * (d / scale) ** 2).sum()  # with the Jacobian of the logarithm
        value += -2 * shape * parameters["log_sigma"] - rate / noise
        if case == "iid":  # columns of z are normal, of covariance U d^2 U' + noise
            along = jnp.einsum("ri,rs,si->i", u, moments, u)
            value -= 0.5 * z.shape[1] * jnp.log1p(d**2 / noise).sum()
            residual = total - (d**2 / (noise + d**2) * along).sum()
        else:
            series = parameters["y"]
            if case == "frame":
                value -= 0.5 * (series**2).sum()
                series = polar(series) * d
            else:
                value += log_series(series / d) - len(series) * parameters["log_d"].sum()
            # Patterns are orthonormal, so that modes do not meet.
            residual = total + ((series - 2 * (z.T @ u)) * series).sum()
        return count * parameters["log_sigma"] + 0.5 * residual / noise - value

    left, size, right = (x[..., : len(SIZES)] for x in _svd(data.z.numpy()))
    x = np.asarray(turn).T @ left / np.asarray(root)[:, None] if smooth else left
    start = {
        "x": x * np.sqrt(len(x)) / np.linalg.norm(x, axis=0),
        "log_sigma": 0.5 * np.log((total - float(size @ size)) / count),
        "log_d": np.log(size) - (0.5 * np.log(z.shape[1]) if smooth else 0.0),
    }
    if case != "iid":
        start["y"] = right * (np.sqrt(z.shape[1]) if case == "frame" else size)
    return Target(potential, read, {name: jnp.asarray(value) for name, value in start.items()})


def _svd(z: Array) -> tuple[Array, Array, Array]:
    """Left and right singular vectors by columns."""
    left, size, right = np.linalg.svd(z, full_matrices=False)
    return left, size, right.T


# -- runs -------------------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """U (draw, r, k), d (draw, k) and sigma (draw,); CPU seconds of sampling, of warm-up and of compilation; gradients
    and divergences while sampling."""

    u: Array
    d: Array
    sigma: Array
    seconds: float
    warmup: float
    compilation: float = 0.0
    gradients: int = 0
    divergences: int = 0


def run_ours(problem: Problem, num_draws: int, num_warmup: int, seed: int) -> Run:
    kernel = (BlockGibbs if problem.args[0].series is None else SeriesGibbs)(problem)
    kernel.seed(seed)
    start = time.process_time()
    kernel.setup(num_warmup)
    params = kernel.initial_params
    for _ in range(num_warmup):
        params = kernel.sample(params)
    warm = time.process_time()
    kept = []
    for _ in range(num_draws):
        params = kernel.sample(params)
        kept.append(params)
    seconds = time.process_time() - warm
    u, d, sigma = (np.stack([params[name].numpy() for params in kept]) for name in ("U", "d", "sigma"))
    return Run(u, d, sigma, seconds, warm - start)


def run_peer(target: Target, num_draws: int, num_warmup: int, seed: int, settings: dict[str, Any]) -> Run:
    """One chain of NUTS; each stretch of 100 steps is one call of a compiled function."""
    kernel = NUTS(potential_fn=target.potential, **settings)
    stretch = 100

    def steps(state: Any) -> Any:
        def step(state: Any, _: None) -> Any:
            state = kernel.sample(state, (), {})
            return state, (target.read(state.z), state.num_steps, state.diverging)

        return jax.lax.scan(step, state, None, length=stretch)

    clock = time.process_time()
    state = kernel.init(jax.random.PRNGKey(seed), num_warmup, target.start, (), {})
    compiled = jax.jit(steps).lower(state).compile()
    compilation, clock = time.process_time() - clock, time.process_time()
    for _ in range(num_warmup // stretch):
        state, _ = compiled(state)
    jax.block_until_ready(state)
    warmup, clock = time.process_time() - clock, time.process_time()
    kept = []
    for _ in range(num_draws // stretch):
        state, out = compiled(state)
        kept.append(jax.device_get(out))
    seconds = time.process_time() - clock
    (u, d, sigma), gradients, divergences = jax.tree.map(lambda *x: np.concatenate(x), *kept)
    return Run(u, d, sigma, seconds, warmup, compilation, int(gradients.sum()), int(divergences.sum()))


def loadings(run: Run, data: MatrixData) -> Array:
    """Modes by size, signed as the leading singular vectors: ``u_ai d_i``, (draw, n, k)."""
    basis = data.space.basis.numpy()
    order = np.argsort(-run.d, axis=1)[:, None]
    values = np.take_along_axis(run.u * run.d[:, None], order, 2)
    reference = _svd(data.z.numpy())[0][:, : len(SIZES)]
    values = values * np.sign(np.einsum("sri,ri->si", values, reference))[:, None]
    return values if not len(basis) else basis @ values


def differences(first: Run, second: Run, data: MatrixData) -> Array:
    """Means and variances of loadings, d and sigma: how far two runs are apart, in Monte Carlo errors."""
    sides = [
        np.concatenate([loadings(x, data).reshape(len(x.d), -1), -np.sort(-x.d, 1), x.sigma[:, None]], 1)
        for x in (first, second)
    ]
    centre = 0.5 * (sides[0].mean(0) + sides[1].mean(0))
    sides = [np.concatenate([x, (x - centre) ** 2], 1) for x in sides]
    error = sum(x.var(0) / common.effective_sample_size(x) for x in sides)
    return (sides[0].mean(0) - sides[1].mean(0)) / np.sqrt(error)


def compare(case: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One row."""
    problem = problem_of(case, seed, options)
    data: MatrixData = problem.args[0]
    run_ours(problem, 5, 5, seed)  # compiles
    ours = run_ours(problem, options.sweeps, options.warmup, seed)
    peer = run_peer(target_of(case, data), options.draws, options.warmup, seed, SETTINGS[case])
    apart = differences(ours, peer, data)
    comparisons = len(apart) * len(options.cases) * len(options.seeds)
    bound = float(stats.norm.isf(LEVEL / 2 / comparisons))
    sizes = [common.effective_sample_size(loadings(run, data)) for run in (ours, peer)]
    agree, enough = np.abs(apart).max() < bound, sizes[1].min() >= FEWEST
    row: dict[str, Any] = {
        "case": case,
        "seed": seed,
        "apart, rms": float(np.sqrt(np.mean(apart**2))),
        f"largest (bound {bound:.1f})": float(np.abs(apart).max()),
        "ms a sweep": 1e3 * ours.seconds / len(ours.d),
        "ms a draw of NUTS": 1e3 * peer.seconds / len(peer.d),
        "gradients a draw": peer.gradients / len(peer.d),
        "divergences": peer.divergences,
        "warm-up, ours": ours.warmup,
        "warm-up and compilation, NUTS": f"{peer.warmup:.1f} + {peer.compilation:.1f}",
    }
    for name, of in (("median", np.median), ("worst", np.min)):
        rates = [float(of(size)) / run.seconds for size, run in zip(sizes, (ours, peer), strict=True)]
        row[f"{name}: ESS, ours"], row[f"{name}: ESS, NUTS"] = (float(of(size)) for size in sizes)
        row[f"{name}: ESS/s, ours"], row[f"{name}: ESS/s, NUTS"] = rates
        why = "posteriors differ" if not agree else f"peer: fewer than {FEWEST} effective draws"
        row[f"{name}: ratio"] = rates[0] / rates[1] if agree and enough else why
        whole = [float(of(x)) / (run.seconds + run.warmup) for x, run in zip(sizes, (ours, peer), strict=True)]
        row[f"{name}: ratio, warm-up counted"] = whole[0] / whole[1] if agree and enough else why
    return row


def tune(case: str, seed: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Effective draws of the peer per second of sampling by its settings."""
    data: MatrixData = problem_of(case, seed, options).args[0]
    rows = []
    for settings in TUNED:
        run = run_peer(target_of(case, data), options.draws, options.warmup, seed, settings)
        size = common.effective_sample_size(loadings(run, data))
        rates = {"median ESS/s": float(np.median(size)) / run.seconds, "worst ESS/s": float(size.min()) / run.seconds}
        gradients = run.gradients / len(run.d)
        rows.append(
            {"case": case, "seed": seed, **settings, **rates, "gradients": gradients, "divergences": run.divergences}
        )
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cells", type=int, default=60)
    parser.add_argument("--times", type=int, default=60)
    parser.add_argument("--snr", type=float, default=10.0)
    parser.add_argument("--sweeps", type=int, default=20_000)
    parser.add_argument("--draws", type=int, default=1500)
    parser.add_argument("--warmup", type=int, default=1000)
    parser.add_argument("--tune", action="store_true", help="settings of the peer compared, no more")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for case in options.cases:
        for seed in options.seeds:
            if options.tune:
                rows += tune(case, seed, options)
                continue
            rows.append(compare(case, seed, options))
            print(rows[-1], flush=True)
    common.report("gradient_peers_tune" if options.tune else "gradient_peers", rows, **vars(options))


if __name__ == "__main__":
    main()
