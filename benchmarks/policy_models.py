"""Models with discrete latent sites for `policies.py`: those of its bar, and random ones of three families."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from probmodels import Problem

HEIGHTS = torch.tensor([-2.1, -1.8, -2.4, 2.0, 2.3, 1.7, 0.1])


def latin_square() -> None:
    """Twelve squares of three symbols, and others that break a rule here and there."""
    with pyro.plate("cell", 9):
        z = pyro.sample("z", dist.Categorical(torch.ones(3) / 3))
    square, broken = z.unflatten(-1, (3, 3)), 0.0
    for i, j in ((0, 1), (0, 2), (1, 2)):
        broken = broken + (square[..., i, :] == square[..., j, :]).float().sum(-1)
        broken = broken + (square[..., :, i] == square[..., :, j]).float().sum(-1)
    pyro.factor("rules", -4.0 * broken)


def magnet() -> None:
    """Ten spins that like to agree: all up or all down."""
    total = sum(2 * pyro.sample(f"s_{i}", dist.Bernoulli(0.5)) - 1 for i in range(10))
    pyro.factor("energy", 0.12 * total * total)


def unknown_number(x: Tensor) -> None:
    """One to three components, and the component of each value, of which there are no more."""
    count = pyro.sample("count", dist.Categorical(torch.ones(3) / 3))
    place = torch.tensor([[0.0, 0.0, 0.0], [-2.0, 2.0, 0.0], [-2.0, 0.0, 2.0]])[count]
    scale = torch.tensor([2.0, 0.6, 0.5])[count]
    share = (torch.arange(3) <= count).float() / (count + 1)
    for i in range(len(x)):
        z = pyro.sample(f"z_{i}", dist.Categorical(share))
        pyro.sample(f"x_{i}", dist.Normal(place[z], scale), obs=x[i])


def potts() -> None:
    """Six cells in two rows, of three colours that like to agree."""
    z = [pyro.sample(f"z_{i}", dist.Categorical(torch.ones(3) / 3)) for i in range(6)]
    edges = [(0, 1), (1, 2), (3, 4), (4, 5), (0, 3), (1, 4), (2, 5)]
    pyro.factor("energy", 1.5 * sum((z[a] == z[b]).float() for a, b in edges))


BAR = {
    "latin_square": Problem("latin_square", latin_square),
    "magnet": Problem("magnet", magnet),
    "unknown_number": Problem("unknown_number", unknown_number, args=(HEIGHTS,)),
    "potts": Problem("potts", potts),
}
"""Models of several modes that the bar names, beside the textbook ones."""


def spin_glass(seed: int) -> Problem:
    """Spins on a grid with couplings of both signs, as one site."""
    rng = np.random.default_rng(seed)
    rows, columns = [(3, 3), (2, 5), (3, 4)][rng.integers(3)]
    cell = np.arange(rows * columns).reshape(rows, columns)
    pairs = [(cell[1:], cell[:-1]), (cell[:, 1:], cell[:, :-1])]
    edges = np.concatenate([np.stack([a.ravel(), b.ravel()], -1) for a, b in pairs])
    coupling = torch.tensor(rng.normal(0.0, rng.uniform(0.8, 2.0), len(edges)), dtype=torch.float32)
    field = torch.tensor(rng.normal(0.0, 0.1, rows * columns), dtype=torch.float32)
    first, second = torch.tensor(edges).T

    def model() -> None:
        s = 2 * pyro.sample("s", dist.Bernoulli(0.5).expand([rows * columns]).to_event(1)) - 1
        pair = s.index_select(-1, first) * s.index_select(-1, second)
        pyro.factor("energy", (coupling * pair).sum(-1) + (field * s).sum(-1))

    return Problem(f"spin_glass_{seed}", model)


def constraints(seed: int) -> Problem:
    """Variables of three or four values under random rules on pairs of them, as sites of their own."""
    rng = np.random.default_rng(seed)
    count, values = [(7, 3), (6, 4), (8, 3)][rng.integers(3)]
    rules = []
    for _ in range(int(rng.integers(count, 2 * count))):
        a, b = rng.choice(count, 2, replace=False)
        rules.append((int(a), int(b), torch.tensor(rng.random((values, values)) < 0.35, dtype=torch.float32)))
    cost = float(rng.uniform(2.0, 5.0))

    def model() -> None:
        z = [pyro.sample(f"z_{i}", dist.Categorical(torch.ones(values) / values)) for i in range(count)]
        broken = sum(
            rule.flatten().index_select(0, (values * z[a] + z[b]).reshape(1)).squeeze(0) for a, b, rule in rules
        )
        pyro.factor("rules", -cost * broken)

    return Problem(f"constraints_{seed}", model)


def mixture_of_two(seed: int) -> Problem:
    """Values of two or three components whose means are one of a few, so that labels can be exchanged."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(2, 4))
    places = torch.tensor([-3.0, -1.0, 1.0, 3.0])
    truth = rng.choice(4, count, replace=False)
    size = int(rng.integers(4, 6 if count == 3 else 7))
    x = torch.tensor(places.numpy()[truth[np.arange(size) % count]] + rng.normal(0, 0.7, size), dtype=torch.float32)

    def model(x: Tensor) -> None:
        means = [places[pyro.sample(f"m_{k}", dist.Categorical(torch.ones(4) / 4))] for k in range(count)]
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(count) / count))
            loc = sum(torch.where(z == k, mean, 0.0) for k, mean in enumerate(means))
            pyro.sample("x", dist.Normal(loc, 0.7), obs=x)

    return Problem(f"mixture_{seed}", model, args=(x,))


FAMILIES: dict[str, Callable[[int], Problem]] = {
    "spin_glass": spin_glass,
    "constraints": constraints,
    "mixture": mixture_of_two,
}
"""Random models by seed."""
