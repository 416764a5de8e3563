"""Data of the model of causal graphs, and data outside of it in one respect each, with the edges that are true."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from probmodels.datasets.sem import Sem, draw_sem, sample_sem

Floats = NDArray[np.float64]
Made = tuple[Floats, NDArray[np.int8]]  # values (row, concept), true edges (cause, effect)

NOISES = ("gaussian", "laplace", "gumbel", "uniform")
MECHANISMS = ("linear", "additive")
BENT: tuple[Callable[[Floats], Floats], ...] = (
    np.square,
    lambda h: np.tanh(2 * h),
    lambda h: 1.5 * np.abs(h),
    lambda h: np.sin(2 * h),
    lambda h: np.exp(0.5 * h),
)


def _model(seed: int, size: int, mechanism: str | None = None, noise: str | None = None) -> Sem:
    kind = {"mechanism": mechanism or MECHANISMS[seed % 2], "noise": noise or NOISES[seed // 2 % 4]}
    return draw_sem(size, equal_variances=False, degree=2.0, seed=seed, **kind)


def own(seed: int, rows: int) -> Made:
    """Five concepts, linear or curved, with noise of four shapes."""
    sem = _model(seed, 5)
    return sample_sem(sem, rows, seed=10_000 + seed), sem.graph


def without_a_cause(seed: int, rows: int, *, normal: bool = False) -> Made:
    """Six concepts, of which one that causes at least two others is left out."""
    for number in range(1000 * seed, 1000 * seed + 1000):
        sem = _model(number, 6, *(("linear", "gaussian") if normal else ()))
        place = int(sem.graph.sum(1).argmax())
        if sem.graph[place].sum() < 2 or ((sem.mechanism, sem.noise) == ("linear", "gaussian") and not normal):
            continue
        keep = [i for i in range(6) if i != place]
        return sample_sem(sem, rows, seed=10_000 + number)[:, keep], sem.graph[np.ix_(keep, keep)]
    raise ValueError(seed)


def pair_with_a_cause(seed: int, rows: int, *, curved: bool) -> Made:
    """Two effects of a hidden cause, joined by nothing else; an effect of the first, and a concept of its own."""
    rng = np.random.default_rng(seed)
    shapes = NOISES if curved else NOISES[1:]
    noise = draw_sem(5, graph=np.zeros((5, 5)), noise=shapes[seed % len(shapes)]).draw_noise(rows, rng)
    hidden, first, second, third, other = noise.T
    a = (BENT[rng.integers(len(BENT))](hidden) if curved else rng.uniform(0.7, 1.5) * hidden) + 0.5 * first
    b = (hidden if curved else rng.uniform(-1.5, -0.7) * hidden) + 0.5 * second
    graph = np.zeros((4, 4), dtype=np.int8)
    graph[0, 2] = 1
    return np.stack([a, b, 0.8 * a + third, other], 1), graph


def growing_noise(seed: int, rows: int) -> Made:
    """A chain of three and a concept of its own; the first sets the spread of the second."""
    rng = np.random.default_rng(seed)
    other, x, noise, last = rng.standard_normal((4, rows))
    spread = 0.2 + 0.6 * np.abs(x) if seed % 4 < 2 else 0.5 * np.exp(0.6 * x)
    y = (x if seed % 2 else np.sin(2 * x)) + spread * noise
    graph = np.zeros((4, 4), dtype=np.int8)
    graph[1, 2] = graph[2, 3] = 1
    return np.stack([other, x, y, 0.8 * y + last], 1), graph


def exponentials(seed: int, rows: int) -> Made:
    """Linear with normal noise, four concepts, each exponentiated."""
    sem = _model(seed, 4, "linear", "gaussian")
    return np.exp(sample_sem(sem, rows, seed=10_000 + seed)), sem.graph


def selected(seed: int, rows: int) -> Made:
    """Two normal causes, of which only rows with a large noisy sum are seen; the first causes a third or does not."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((30 * rows, 3))
    graph = np.zeros((3, 3), dtype=np.int8)
    graph[0, 2] = seed % 2
    x[:, 2] += seed % 2 * x[:, 0]
    return x[x[:, 0] + x[:, 1] + 0.5 * rng.standard_normal(len(x)) > 1][:rows], graph


def in_sequence(seed: int, rows: int) -> Made:
    """Noise of five concepts with a correlation of 0.3 to 0.9 between neighbouring rows."""
    rng = np.random.default_rng(seed)
    sem = _model(seed, 5, noise="gaussian")
    noise, rho = sem.draw_noise(rows + 50, rng), (0.3, 0.5, 0.7, 0.9)[seed // 2 % 4]
    for row in range(1, len(noise)):
        noise[row] = rho * noise[row - 1] + np.sqrt(1 - rho**2) * noise[row]
    return sem.solve(noise)[50:], sem.graph


KINDS: dict[str, Callable[[int, int], Made]] = {
    "of the model": own,
    "hidden cause, random models": without_a_cause,
    "hidden cause, curved pair": lambda seed, rows: pair_with_a_cause(seed, rows, curved=True),
    "hidden cause, linear pair": lambda seed, rows: pair_with_a_cause(seed, rows, curved=False),
    "hidden cause, linear and normal": lambda seed, rows: without_a_cause(seed, rows, normal=True),
    "noise grows with its cause": growing_noise,
    "exp of normal values": exponentials,
    "selected rows": selected,
    "rows in sequence": in_sequence,
}
