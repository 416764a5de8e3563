"""Textbook models with discrete latent sites, all of whose values can be listed."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from probmodels.inference import Problem

SERIES = torch.tensor([-1.0, -0.5, 0.3, 1.2, 0.8, -0.2, -1.4, 0.6])
SYMPTOMS = torch.tensor([1.0, 0.0, 1.0])
COUNTS = torch.tensor([2.0, 1.0, 3.0, 7.0, 6.0, 8.0, 2.0, 3.0, 4.0])
END = torch.tensor(1.6)
LENGTHS = torch.tensor([0.5, 0.3, 0.2])
STEPS = torch.tensor([0.6, 0.4])


def mixture(x: Tensor) -> None:
    with pyro.plate("data", len(x)) as rows:
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.5, 0.3, 0.2])))
        pyro.sample("x", dist.Normal(torch.tensor([-1.0, 1.0, 2.0])[z], 0.8), obs=x[rows])


def hidden_markov(x: Tensor) -> None:
    moves = torch.tensor([[0.85, 0.15], [0.25, 0.75]])
    z = torch.tensor(0)
    for t in range(len(x)):
        z = pyro.sample(f"z_{t}", dist.Categorical(moves.index_select(0, z.reshape(1)).squeeze(0)))
        pyro.sample(f"x_{t}", dist.Normal(2.0 * z - 1.0, 1.0), obs=x[t])


EDGES = [(0, 1), (1, 2), (3, 4), (4, 5), (6, 7), (7, 8), (0, 3), (3, 6), (1, 4), (4, 7), (2, 5), (5, 8)]


def ising_plate() -> None:
    with pyro.plate("spin", 9):
        s = 2 * pyro.sample("s", dist.Bernoulli(0.5)) - 1
    first, second = torch.tensor(EDGES).T
    energy = 0.45 * (s.index_select(-1, first) * s.index_select(-1, second)).sum(-1)
    pyro.factor("energy", energy + (torch.linspace(-0.3, 0.5, 9) * s).sum(-1))


def ising_sites() -> None:
    s = [2 * pyro.sample(f"s_{i}", dist.Bernoulli(0.5)) - 1 for i in range(9)]
    pyro.factor("energy", 0.45 * sum(s[i] * s[j] for i, j in EDGES) + 0.4 * s[0] - 0.2 * s[8])


def noisy_or(y: Tensor) -> None:
    weights = torch.tensor([[0.8, 0.1, 0.5, 0.3, 0.6], [0.2, 0.7, 0.0, 0.9, 0.1], [0.6, 0.6, 0.2, 0.1, 0.7]])
    with pyro.plate("cause", 5):
        cause = pyro.sample("cause_on", dist.Bernoulli(torch.tensor([0.1, 0.2, 0.3, 0.1, 0.4])))
    with pyro.plate("symptom", 3):
        pyro.sample("y", dist.Bernoulli(1 - 0.95 * (1 - weights * cause).prod(-1)), obs=y)


def change_points(counts: Tensor) -> None:
    num = len(counts)
    first = pyro.sample("first", dist.Categorical(torch.ones(num) / num))
    second = pyro.sample("second", dist.Categorical(torch.ones(num) / num))
    time = torch.arange(num)
    rate = 2.0 + 4.0 * (time >= first) - 1.5 * (time >= second)
    with pyro.plate("time", num):
        pyro.sample("count", dist.Poisson(rate), obs=counts)


def walk(y: Tensor) -> None:
    """A walk of one to three steps or halts, of which the end is seen."""
    length = int(pyro.sample("length", dist.Categorical(LENGTHS))) + 1
    place = torch.tensor(0.0)
    for t in range(length):
        place = place + pyro.sample(f"step_{t}", dist.Categorical(STEPS))
    pyro.sample("y", dist.Normal(place, 0.7), obs=y)


PROBLEMS = {
    "mixture": Problem("mixture", mixture, args=(torch.linspace(-3, 4, 30),), batch_plates=("data",)),
    "hidden_markov": Problem("hidden_markov", hidden_markov, args=(SERIES,)),
    "ising_plate": Problem("ising_plate", ising_plate),
    "ising_sites": Problem("ising_sites", ising_sites),
    "noisy_or": Problem("noisy_or", noisy_or, args=(SYMPTOMS,)),
    "change_points": Problem("change_points", change_points, args=(COUNTS,)),
    "walk": Problem("walk", walk, args=(END,)),
}
"""Problems by name, without guides."""
