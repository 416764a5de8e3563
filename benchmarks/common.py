"""What the benchmarks share: one thread, simulators, the samplers under test, effective sample sizes, tables.

Import this module before numpy: it pins BLAS, OpenMP and numba to one thread, so that CPU seconds compare algorithms
and not thread pools. Times are CPU seconds of the process, which other jobs on the machine disturb least.
"""

from __future__ import annotations

import os
import sys

_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
if "numpy" in sys.modules and any(os.environ.get(name) != "1" for name in _THREADS):
    raise RuntimeError("numpy was imported before benchmarks/common.py could pin it to one thread; import common first")
os.environ.update(dict.fromkeys(_THREADS, "1"))

import importlib.metadata  # noqa: E402
import json  # noqa: E402
import platform  # noqa: E402
import time  # noqa: E402
import warnings  # noqa: E402
from collections.abc import Callable, Iterable, Mapping, Sequence  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
import xarray as xr  # noqa: E402
from numpy.typing import ArrayLike, NDArray  # noqa: E402
from scipy import linalg, stats  # noqa: E402

from probmodels.bayesian_svd.published.fast import FastPublishedGibbs  # noqa: E402
from probmodels.bayesian_svd.published.sampler import PublishedGibbs  # noqa: E402
from probmodels.distributions.covariance import correlation, euclidean_distance  # noqa: E402
from probmodels.inference.mcmc.kernels import Kernel  # noqa: E402

torch.set_num_threads(1)

Array = NDArray[np.floating[Any]]
Draws = dict[str, Array]

RESULTS = Path(__file__).parent / "results"
PAPER_SCALES = (40.0, 30.0, 20.0, 10.0, 5.0)
LENGTH_SCALE = 3.0
MAX_LENGTH_SCALE = 5.0


# -- data -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Simulation:
    """A field of known modes. Points (n, p) and times (m,), frames (n, k) and (m, k), signal and data (n, m)."""

    points: Array
    times: Array
    U: Array
    V: Array
    d: Array
    signal: Array
    z: Array
    sigma: float

    def reference(self) -> tuple[Array, Array]:
        """Leading singular vectors of the data, which draws are aligned to."""
        left, _, right = np.linalg.svd(self.z, full_matrices=False)
        return left[:, : len(self.d)], right[: len(self.d)].T


def frame(points: Array, rank: int, length_scale: float, rng: np.random.Generator) -> Array:
    """Gram-Schmidt of independent Matérn-7/2 fields, (n, rank): the generator of the paper."""
    kernel = correlation(euclidean_distance(points), "matern72", length_scale).numpy()
    kernel[np.diag_indices_from(kernel)] += 1e-10
    normal = linalg.cholesky(kernel, lower=True) @ rng.standard_normal((len(kernel), rank))
    q, r = np.linalg.qr(normal)
    return q * np.sign(np.diag(r))


def simulate(points: Array, times: Array, scales: Sequence[float], snr: float, seed: int) -> Simulation:
    """Smooth orthonormal frames with given singular values, and noise of variance var(signal) / snr."""
    rng = np.random.default_rng(seed)
    left, right = (frame(x, len(scales), LENGTH_SCALE, rng) for x in (points, times))
    signal = (left * np.asarray(scales)) @ right.T
    sigma = float(np.sqrt(signal.var() / snr))
    z = signal + sigma * rng.standard_normal(signal.shape)
    points = points if points.ndim == 2 else points[:, None]
    return Simulation(points, times, left, right, np.asarray(scales, dtype=float), signal, z, sigma)


def paper_example(seed: int, n: int = 100, m: int = 100, snr: float = 10.0) -> Simulation:
    """The one-dimensional example of the paper: x in [-5, 5], t in [0, 10], d = 40, 30, 20, 10, 5."""
    return simulate(np.linspace(-5, 5, n), np.linspace(0, 10, m), PAPER_SCALES, snr, seed)


def growing_domain(size: int, seed: int, snr: float = 10.0) -> Simulation:
    """The same in a domain that grows with its number of points at steps of 0.2."""
    axis = 0.2 * np.arange(size)
    return simulate(axis, axis, PAPER_SCALES, snr, seed)


def plane(side: int, m: int, seed: int, snr: float = 1.0) -> Simulation:
    """A ``side`` x ``side`` grid over [-5, 5]^2, with m times at steps of 0.2."""
    axis = np.linspace(-5, 5, side)
    points = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    return simulate(points, 0.2 * np.arange(m), PAPER_SCALES, snr, seed)


# -- samplers ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sampler:
    """A kernel ready for `draw`, with the map from its draws to frames over points and times."""

    kernel: Kernel
    expand: Callable[[Draws], Draws]
    setup_seconds: float
    shape: tuple[int, int]  # sizes of the frames that the kernel works on


def block_gibbs(
    simulation: Simulation,
    *,
    tail: float = 1e-6,
    shortest: Sequence[float] = (1.0, 1.0),
    num_length_scales: int = 12,
    **options: Any,
) -> Sampler:
    """The sampler of `probmodels.bayesian_svd`; the only function here that knows its interface.

    Parameters
    ----------
    tail
        Share of variance that the bases may leave out; 0 keeps full rank.
    shortest
        Shortest length-scale of the prior in space and in time; the longest is `MAX_LENGTH_SCALE`.
    num_length_scales
        Values of the length-scale on the grid.
    **options
        Options of `BlockGibbs`.
    """
    from probmodels.bayesian_svd import make_problem
    from probmodels.bayesian_svd.sampler import BlockGibbs

    axes = dict(zip(("x", "y"), simulation.points.T, strict=False))
    data = xr.DataArray(
        simulation.z,
        dims=("cell", "time"),
        coords={
            "cell": np.arange(len(simulation.z)),
            "time": simulation.times,
            **{k: ("cell", v) for k, v in axes.items()},
        },
    )
    space_grid, time_grid = (np.linspace(low, MAX_LENGTH_SCALE, num_length_scales).tolist() for low in shortest)
    start = time.process_time()
    problem = make_problem(
        data,
        rank=len(simulation.d),
        fixed_effects=(),
        kernel_space="matern72",
        kernel_time="matern72",
        length_scales_space=space_grid,
        length_scales_time=time_grid,
        tail=tail,
        area_weights=False,
    )
    kernel = BlockGibbs(problem, **options)
    seconds = time.process_time() - start
    if problem.data is None:
        raise RuntimeError("make_problem returned a problem without data; the benchmark needs its bases")
    space, times = (problem.data[f"basis_{side}_matrix"].values for side in ("space", "time"))

    def expand(draws: Draws) -> Draws:
        return {**draws, "U": space @ draws["U"], "V": times @ draws["V"]}

    return Sampler(kernel, expand, seconds, (space.shape[1], times.shape[1]))


def published(simulation: Simulation, *, fast: bool = False) -> Sampler:
    """The published conditionals: with all the work that the published software does, or as fast as we could."""
    start = time.process_time()
    kernel = (FastPublishedGibbs if fast else PublishedGibbs)(
        simulation.z,
        euclidean_distance(simulation.points).numpy(),
        euclidean_distance(simulation.times).numpy(),
        len(simulation.d),
        length_scale_space=LENGTH_SCALE,
        length_scale_time=LENGTH_SCALE,
        bounds_space=(0.0, MAX_LENGTH_SCALE),
        bounds_time=(0.0, MAX_LENGTH_SCALE),
        bessel=not fast,
        redundant=not fast,
    )
    n, m = simulation.z.shape
    return Sampler(kernel, lambda draws: draws, time.process_time() - start, (n, m))


def warm_up(sampler: Sampler, num_sweeps: int, seed: int) -> float:
    """Seed, set up and run warm-up sweeps; CPU seconds of all this."""
    kernel = sampler.kernel
    start = time.process_time()
    kernel.seed(seed)
    kernel.setup(num_sweeps)
    params = kernel.initial_params
    for _ in range(num_sweeps):
        params = kernel.sample(params)
    kernel.end_warmup()
    return time.process_time() - start


def seconds_per_sweep(kernel: Kernel, num_sweeps: int) -> float:
    """CPU seconds of a sweep, output included, over ``num_sweeps`` of them."""
    params = kernel.initial_params
    start = time.process_time()
    for _ in range(num_sweeps):
        params = kernel.sample(params)
    return (time.process_time() - start) / num_sweeps


def draw(sampler: Sampler, num_draws: int) -> tuple[Draws, float]:
    """Draws stacked along a first axis, frames expanded, and the CPU seconds that sampling took."""
    kept = []
    params = sampler.kernel.initial_params
    start = time.process_time()
    for _ in range(num_draws):
        params = sampler.kernel.sample(params)
        kept.append(params)
    seconds = time.process_time() - start
    stacked = {name: torch.stack([params[name] for params in kept]).numpy() for name in kept[0]}
    return sampler.expand(stacked), seconds


def compile_samplers() -> None:
    """Run each sampler once on a small field, so that no later time includes compilation."""
    tiny = paper_example(0, 20, 20)
    for sampler in (block_gibbs(tiny), published(tiny), published(tiny, fast=True)):
        warm_up(sampler, 5, seed=0)


# -- what is compared -------------------------------------------------------------------------------------------------


def align(draws: Draws, reference: tuple[Array, Array]) -> Draws:
    """Modes sorted by d in each draw, then signed as the reference: (draw, n, k), (draw, m, k), (draw, k)."""
    order = np.argsort(-draws["d"], axis=1)
    aligned = {
        name: np.take_along_axis(value, order if value.ndim == 2 else order[:, None, :], axis=-1)
        for name, value in draws.items()
        if value.ndim > 1
    }
    sign = np.sign(np.einsum("sik,ik->sk", aligned["U"], reference[0]))[:, None, :]
    return {**aligned, "U": aligned["U"] * sign, "V": aligned["V"] * sign, "sigma": draws["sigma"]}


def in_plane_angles(frames: Array, reference: Array) -> Array:
    """u_i' r_j for i != j: how far modes are rotated among each other, (draw, k (k - 1))."""
    products = np.einsum("sik,il->skl", frames, reference)
    rank = products.shape[-1]
    return products[:, ~np.eye(rank, dtype=bool)]


def effective_sample_size(draws: Array) -> Array:
    """Bulk effective sample size of one chain, draws (draw, ...)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        import arviz as az

    flat = draws.reshape(1, len(draws), -1)
    return az.ess(xr.Dataset({"x": (("chain", "draw", "i"), flat)}), method="bulk")["x"].values


def effective_sample_sizes(draws: Draws, reference: tuple[Array, Array]) -> dict[str, float]:
    """Effective sample sizes of aligned draws: medians and minima over entries, modes and angles."""
    u, v, d = (effective_sample_size(draws[name]) for name in ("U", "V", "d"))
    angles = np.concatenate(
        [effective_sample_size(in_plane_angles(draws[name], r)) for name, r in zip("UV", reference, strict=True)]
    )
    return {
        "U median": float(np.median(u)),
        "U min": float(u.min()),
        "V median": float(np.median(v)),
        "d min": float(d.min()),
        "d median": float(np.median(d)),
        "sigma2": float(effective_sample_size(draws["sigma"] ** 2)[0]),
        "angle worst": float(angles.min()),
        "angle median": float(np.median(angles)),
        "length-scale U median": float(np.median(effective_sample_size(draws["length_scale_space"]))),
    }


# -- reports ----------------------------------------------------------------------------------------------------------


def machine() -> dict[str, str]:
    """Processor and versions."""
    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        processor = names[0] if names else processor
    packages = ("numpy", "scipy", "numba", "torch", "pyro-ppl", "arviz")
    versions = {name: importlib.metadata.version(name) for name in packages}
    load = f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores" if hasattr(os, "getloadavg") else "unknown"
    return {"processor": processor, "load": load, "python": platform.python_version(), **versions}


def spread(values: ArrayLike, digits: int = 3) -> str:
    """Median with smallest and largest value."""
    ordered = np.sort(np.asarray(values))
    return f"{np.median(ordered):.{digits}g} ({ordered[0]:.{digits}g} to {ordered[-1]:.{digits}g})"


def interval(values: Iterable[float], *, factor: float = 1.0, digits: int = 3) -> str:
    """Mean and half-width of Student's 95 % interval of it."""
    found = factor * np.array(list(values), dtype=float)
    if len(found) < 2:
        return f"{found.mean():.{digits}f}"
    half = stats.t.ppf(0.975, len(found) - 1) * found.std(ddof=1) / np.sqrt(len(found))
    return f"{found.mean():.{digits}f} ± {half:.{digits}f}"


class OutOfTime(Exception):
    """The time limit has passed."""


def cell(name: str, until: float, compute: Callable[[], Mapping[str, Any]], **key: Any) -> dict[str, Any]:
    """Figures of one cell of a long benchmark, from ``results/<name>.jsonl`` or else computed and appended there.

    A stored cell is used whatever the code is now: delete the file to measure again.

    Raises
    ------
    OutOfTime
        If the cell is not there and ``time.monotonic()`` has passed ``until``.
    """
    file, text = RESULTS / f"{name}.jsonl", json.dumps(key, sort_keys=True)
    if file.exists():
        for line in file.read_text(encoding="utf-8").splitlines():
            row: dict[str, Any] = json.loads(line)
            if row["key"] == text:
                return row
    if time.monotonic() > until:
        raise OutOfTime
    start = time.process_time()
    row = {"key": text, **compute(), "cpu": time.process_time() - start}
    RESULTS.mkdir(exist_ok=True)
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row, default=float) + "\n")
    return row


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown table; columns are the keys of the first row."""
    names = list(rows[0])
    cells = [names, ["---"] * len(names)] + [[_cell(row.get(name, "")) for name in names] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def report(name: str, rows: Sequence[Mapping[str, Any]], **settings: Any) -> None:
    """Print the table and write it with machine and settings to ``benchmarks/results/<name>.json``."""
    header = machine()
    print("\n" + "  ".join(f"{key} {value}" for key, value in header.items()))
    print("\n" + table(rows) + "\n", flush=True)
    RESULTS.mkdir(exist_ok=True)
    content = {"machine": header, "settings": settings, "rows": [dict(row) for row in rows]}
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1, default=float) + "\n")
