"""The mixture of flowers against its sums over all components, and fits against the exact posterior."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine

from probmodels import fit_em
from probmodels.datasets.petals import petal_offsets, simulate_petals
from probmodels.errors import DataError
from probmodels.hierarchical_mixture import HierarchicalMixture, make_problem
from probmodels.inference import Phase
from probmodels.inference.programs.programs import fitted


@pytest.fixture(autouse=True)
def own_parameters() -> None:
    """Parameters of a module that is called as a program go to pyro's store."""
    pyro.clear_param_store()


@pytest.fixture
def model() -> HierarchicalMixture:
    torch.manual_seed(0)
    found = HierarchicalMixture(
        torch.randn(3, 2, dtype=torch.float64), torch.as_tensor(petal_offsets(2)), 0.7, learn_weights=True
    )
    found.weights = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    found.petal_weights = torch.tensor([0.6, 0.4], dtype=torch.float64)
    return found


def test_the_density_is_that_of_the_formula(model: HierarchicalMixture) -> None:
    x = torch.randn(4, 2, dtype=torch.float64)
    table, means = model.log_joint(x).detach(), model.means.detach()
    weights, petal_weights = [0.2, 0.5, 0.3], [0.6, 0.4]
    for n, i, j in itertools.product(range(4), range(3), range(2)):
        away = x[n] - means[i] - model.offsets[j]
        expected = math.log(weights[i] * petal_weights[j]) - math.log(2 * math.pi * 0.49) - float(away @ away) / 0.98
        assert float(table[n, i, j]) == pytest.approx(expected, abs=1e-12)


def test_the_program_has_the_density_of_the_table(model: HierarchicalMixture) -> None:
    x = torch.randn(4, 2, dtype=torch.float64)
    table = model.log_joint(x)
    rows = torch.arange(4)
    for i, j in itertools.product(range(3), range(2)):
        given = {"cluster": torch.full((4,), i), "petal": torch.full((4,), j)}
        trace = poutine.trace(poutine.condition(model, given)).get_trace(x)
        trace.compute_log_prob()
        found = sum(trace.nodes[name]["log_prob"] for name in ("cluster", "petal", "x"))
        torch.testing.assert_close(found, table[rows, i, j])


@pytest.mark.slow
def test_a_fit_recovers_flowers_and_the_exact_posterior() -> None:
    data = simulate_petals(400, num_clusters=2, num_petals=3, distance=1.5, seed=1)
    start = [[0.3, -1.2], [-0.3, 1.2]]
    problem = make_problem(data, num_clusters=2, num_petals=3, init=start, hidden=32)
    phases = [
        Phase("e_step", steps=4, lr=0.02, schedule=lambda step: 0.02 ** (step / 1200)),
        Phase("wake", lr=0.05, schedule=lambda step: 0.02 ** (step / 300)),
    ]
    result = fit_em(problem, phases=phases, num_rounds=300, batch_size=100, num_samples=5, progress=False)
    grid = torch.cartesian_prod(torch.arange(2), torch.arange(3))
    with fitted(problem, result.guide_state or {}, seed=0) as (model, guide), torch.no_grad():
        log_joint = model.log_joint(problem.args[0]).flatten(1)
        tables = []
        for i, j in grid:
            given = {"cluster": i.expand(400), "petal": j.expand(400)}
            trace = poutine.trace(poutine.condition(guide, given)).get_trace(*problem.args)
            trace.compute_log_prob()
            tables.append(trace.nodes["cluster"]["log_prob"] + trace.nodes["petal"]["log_prob"])
        means = model.means.clone()
    # A mean of 200 points has a standard error of 0.25 / sqrt(200) = 0.018; four of them, and noise of the fit.
    order = means[:, 1].sort().indices
    np.testing.assert_allclose(means[order], [[0.0, -1.5], [0.0, 1.5]], atol=0.1)
    q = torch.stack(tables, 1).exp()
    torch.testing.assert_close(q.sum(1), torch.ones(400), atol=1e-4, rtol=0)
    tv = (q - log_joint.softmax(1)).abs().sum(1) / 2
    assert float(tv.mean()) < 0.03
    # That of the means that the points were drawn around, which four fitted numbers exceed by 4 / 2 nats in all.
    true_means, offsets = (torch.as_tensor(value) for value in (data["true_mean"].values, petal_offsets(3)))
    true = HierarchicalMixture(true_means, offsets, 0.25).log_joint(torch.as_tensor(data["x"].values))
    assert abs(float(log_joint.logsumexp(1).mean()) - float(true.flatten(1).logsumexp(1).mean().detach())) < 0.03


def test_starts_are_points_of_the_seed_and_what_is_not_learned_stays() -> None:
    data = simulate_petals(50)
    one, same, other = (make_problem(data, seed=seed).model for seed in (0, 0, 1))
    assert torch.equal(one.means, same.means)
    assert not torch.equal(one.means, other.means)
    points = {tuple(point) for point in data["x"].values.astype(np.float32).tolist()}
    assert {tuple(mean) for mean in one.means.tolist()} <= points
    with pyro.poutine.trace(param_only=True) as trace:
        one(torch.zeros(3, 2))
    assert set(trace.trace.nodes) == {"means"}
    assert make_problem(data["x"]).args[0].shape == (50, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_clusters": 1}, "num_clusters=1; give a whole number of at least 2"),
        ({"num_clusters": 99}, "there are 9 points"),
        ({"num_petals": True}, "num_petals=True"),
        ({"sigma": 0.0}, "sigma=0.0; give a number above 0"),
        ({"radius": float("nan")}, "radius=nan"),
        ({"init": [[0.0, 0.0]]}, "init has rows of 2 numbers; give 4 pairs of numbers"),
        ({"init": [[0.0, 0.0]] * 3 + [[0.0]]}, "init has rows of 2, 2, 2, 1 numbers"),
        ({"init": [[0.0, float("nan")]] * 4}, "init="),
        ({"init": np.zeros((4, 2)), "seed": 1}, "seed=1 is not used with init; leave it out"),
        ({"network": "tree"}, "network='tree'; choose one of mlp, gru, independent"),
        ({"num_particles": 1}, "num_particles=1; give a whole number of at least 2"),
    ],
)
def test_options_out_of_range_are_refused(options: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        make_problem(simulate_petals(9), **options)


def test_points_that_are_none_are_refused() -> None:
    data = simulate_petals(9)
    with pytest.raises(DataError, match="no variable 'x'"):
        make_problem(data.drop_vars("x"))
    with pytest.raises(DataError, match=r"shape \(9, 1\)"):
        make_problem(data["x"][:, :1])
    with pytest.raises(DataError, match="point 3 is"):
        make_problem(data["x"].where(data["data"] != 3))
    with pytest.raises(DataError, match="points are of type"):
        make_problem(data["x"].astype(str))
    with pytest.raises(DataError, match="give a Dataset or a DataArray"):
        make_problem(data["x"].values)
