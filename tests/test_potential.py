"""Captured graphs against what they were captured from, and the potential of a model against closed forms."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from inference_models import data, mean_model, normal_model
from pyro.infer.reparam import LocScaleReparam, stable

from probmodels.errors import CaptureError, ProblemError
from probmodels.inference import Problem
from probmodels.inference.programs.capture import batch, capture, compare, compile_graph, lift
from probmodels.inference.programs.enumeration import Enumeration
from probmodels.inference.programs.potential import Potential

Y = data()


def operations(graph):
    return [node.target for node in graph.graph.nodes if node.op == "call_function"]


torch.manual_seed(0)
NORM = torch.nn.BatchNorm1d(2).requires_grad_(False)
LSTM = torch.nn.LSTM(1, 2).requires_grad_(False)

FUNCTIONS = {
    "constants": lambda x: (x * 1 + 0) / 2 - torch.ones(3) * math.log(2.0),
    "nested constants": lambda x: 3 - (2 - (x + 1)) - 4,
    "scaled": lambda x: x.neg().neg() * 2 * 3 / 4,
    "sums": lambda x: (5 - x).sum() + (x * 2).sum() - (-x).sum() + (x + x[0]).sum(),
    "sum over one": lambda x: x.unsqueeze(-1).sum(-1),
    "products": lambda x: torch.arange(12.0).reshape(4, 3) @ x,
    "products of matrices": lambda x: torch.arange(12.0).reshape(4, 3) @ x.unsqueeze(-1) @ x.unsqueeze(0),
    "transpositions": lambda x: (x[:, None] * x[None, :] ** 2).t().mT.permute(1, 0),
    "cross entropy": lambda x: dist.Bernoulli(logits=30 * x, validate_args=False).log_prob(torch.tensor([1.0, 0, 1])),
    "log sigmoid": lambda x: torch.nn.functional.logsigmoid(x),
    "logsumexp": lambda x: torch.logsumexp(torch.stack([x, x * 50, torch.full((3,), -math.inf)]), 0),
    "cholesky": lambda x: torch.linalg.cholesky(torch.eye(3) * 2 + x[:, None] * x[None, :]),
    "in place": lambda x: torch.zeros(3).add_(x).mul_(2).clamp_(min=0.1),
    "written into constants": lambda x: written(torch.zeros(4), slice(1, None), x) * torch.arange(4.0),
    "written into new tensors": lambda x: written(torch.tensor([1.0, 2.0, 3.0]), slice(1), x[:1] ** 2) * x,
    "written to entries": lambda x: written(torch.ones(2, 3), (1, [2, 0, 1]), x**2),
    "written to a diagonal": lambda x: (x[:, None] * x + written(torch.zeros(9), slice(None, None, 4), x).view(3, 3)).T,
    "diagonals filled": lambda x: (x[:, None] * x).fill_diagonal_(2.0) * torch.arange(3.0),
    "copied over": lambda x: torch.ones(2, 3).copy_(x),
    "batch norm": lambda x: NORM((x[:, None] + torch.tensor([0.2, 2.0])).exp()) * torch.tensor([[1.0], [0.0], [3.0]]),
    "recurrent network": lambda x: LSTM(x[:, None, None])[0],
    "written to a view": lambda x: added((x[:, None] * torch.ones(3)).contiguous(), x),
    "views of copies": lambda x: x[:, None].expand(3, 2).clone().t().reshape(6).view(2, 3).contiguous().view(-1),
    "masks": lambda x: torch.where(x > 0, x, -x).masked_fill(x > 0.5, 7.0),
    "powers": lambda x: x**2 + x**1 + x.abs() ** 0.5,
    "integers": lambda x: x * torch.arange(3) + torch.tensor([2, 0, 1])[torch.tensor([0, 1, 2])],
}


def written(into, place, value):
    into[place] = value
    return into


def added(matrix, value):
    matrix.view(-1)[::4] += value
    matrix[0, :2].mul_(3.0)
    return matrix


@pytest.mark.parametrize("name", FUNCTIONS)
def test_graphs_give_values_and_gradients_of_the_function_alone_and_in_batches(name):
    function = FUNCTIONS[name]

    def both(x):
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            value = function(x)
            (slope,) = torch.autograd.grad(value.sum(), x)
        return value.detach(), slope

    points = torch.linspace(-1.0, 1.2, 15).reshape(5, 3)
    graph = capture(both, points[0], checks=[(points[1],)])
    batched = batch(graph, points)
    for index, point in enumerate(points):
        for wanted, alone, together in zip(both(point), graph(point), batched(points), strict=True):
            torch.testing.assert_close(alone, wanted, rtol=2e-5, atol=1e-5)
            torch.testing.assert_close(together[index], wanted, rtol=2e-5, atol=1e-5)


def test_graphs_leave_out_what_no_argument_changes():
    graph = capture(lambda x: (x + torch.ones(3).log() + torch.arange(3.0).cumsum(0)) * 1, torch.zeros(3))
    assert len(operations(graph)) == 1
    doubled = capture(lambda x: x.exp() + x.exp(), torch.zeros(3))
    assert operations(doubled).count(torch.ops.aten.exp.default) == 1


def test_one_constant_matrix_multiplies_a_whole_batch_at_once():
    matrix = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    for product in (lambda x: matrix @ x, lambda x: (matrix @ x.unsqueeze(-1)).squeeze(-1), lambda x: x @ matrix.T):
        batched = batch(capture(product, torch.zeros(3)), torch.zeros(7, 3))
        targets = operations(batched)
        assert torch.ops.aten.mm.default in targets
        assert torch.ops.aten.bmm.default not in targets


def test_random_operations_stay_random_and_differ_within_a_batch():
    graph = capture(lambda x: x + torch.randn(3), torch.zeros(3))
    assert not torch.equal(graph(torch.zeros(3)), graph(torch.zeros(3)))
    torch.manual_seed(0)
    first = graph(torch.zeros(3))
    torch.manual_seed(0)
    assert torch.equal(first, torch.randn(3))
    rows = batch(graph, torch.zeros(4, 3))(torch.zeros(4, 3))
    assert len({tuple(row) for row in rows.tolist()}) == 4


def test_functions_without_a_faithful_graph_are_refused():
    with pytest.raises(CaptureError, match="cannot be captured"):
        capture(lambda x: x * 2 if x.sum() > 0 else x, torch.ones(3))
    calls = []

    def changing(x):
        calls.append(1)
        return x * len(calls)

    with pytest.raises(CaptureError, match="differs from the function"):
        capture(changing, torch.ones(3))
    with pytest.raises(ValueError, match="choose one of"):
        compile_graph(capture(torch.exp, torch.ones(3)), "jit", torch.ones(3))


ROWS = torch.tensor([3.0, 1.0, 2.0])


def reads_data(x):
    total = x * float(ROWS[0]) + ROWS.mean().item()
    for _ in range(int(ROWS[2])):
        total = total + (x if ROWS[1] > ROWS[2] else 2 * x)
    return total if torch.equal(ROWS, ROWS.clone()) else -total


def test_numbers_are_read_out_of_data_and_of_nothing_else():
    x = torch.linspace(-1.0, 1.0, 3)
    torch.testing.assert_close(capture(reads_data, x)(x), reads_data(x))

    def reads(value):
        return lambda x: x * float(value(x)[0])

    buffer = torch.zeros(3)
    for value in (
        lambda x: x,
        lambda x: torch.ones(3) * x,
        lambda x: torch.zeros(3).copy_(x),
        lambda x: written(torch.zeros(4), slice(1, None), x)[:1],
        lambda x: added(torch.zeros(3, 3), x)[2, 2:],
        lambda x: torch.randn(3),
        lambda x: torch.zeros(3).normal_(),
        lambda x: torch.add(x, x, out=buffer) * 0 + buffer,
    ):
        with pytest.raises(CaptureError, match=r"reads a value out of a tensor.*at test_potential.py:\d+, 'return"):
            capture(reads(value), x)
    weight = torch.ones(3)
    with pytest.raises(CaptureError, match="reads a value out of a tensor"):
        lift(lambda x: x * float(weight[0]), [weight], x)


def test_checks_of_values_are_captured_as_values_that_are_missing():
    def checked(x):
        y = x.exp()
        assert (y < 2).all()
        if torch.isnan(y).any() or not torch.isfinite(x).all():
            raise ValueError("not a number")
        return y.sum(), y * 2

    x = torch.linspace(-1.0, 0.5, 3)
    graph = capture(checked, x, checks=[(x - 1,)])
    for found, wanted in zip(graph(x), checked(x), strict=True):
        torch.testing.assert_close(found, wanted)
    assert all(value.isnan().all() for value in graph(x + 1))  # where the function raises
    rows = batch(graph, torch.stack([x, x + 1]))(torch.stack([x, x + 1]))
    assert [value.isnan().any().item() for value in rows[0]] == [False, True]

    def warns(x):
        if (x > 0.2).any():
            warnings.warn("large", stacklevel=1)
        return x * 2

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        np.testing.assert_allclose(capture(warns, x)(x + 1), 2 * (x + 1), rtol=1e-6)

    def branches(x):
        assert (x.exp() > 0).all()
        return x if x[0] > 0 else -x

    def same_here(x):
        shift = torch.ones(3) if (x > 5).all() else torch.zeros(3)
        return x.clamp(min=-9) if (x < -7).any() else x + shift

    with pytest.raises(CaptureError, match=r"'shift = torch.ones\(3\) if"):
        capture(same_here, x)

    with pytest.raises(CaptureError, match=r"reads a value out of a tensor.*'return x if x\[0\] > 0 else -x'"):
        capture(branches, x)


def test_shortcuts_of_stable_noise_give_way_to_the_formula_that_holds_everywhere():
    def shift(x):
        return stable._safe_shift(x, torch.tensor(0.3), torch.tensor(0.3).pow(1 / x), torch.tensor(0.3))

    x = torch.tensor([0.5, 1.5])
    graph = capture(shift, x, checks=[(x + 0.2,)])
    for special in (torch.tensor([0.7, 1.0]), torch.tensor([1.004, 0.996])):
        torch.testing.assert_close(graph(special), shift(special))
    with pytest.raises(CaptureError, match="reads a value"):
        capture(lambda x: x if (x > 0).any() else -x, x)  # of others nobody knows which formula holds everywhere


def test_distributions_that_check_what_they_are_given_are_captured():
    prior = dist.Normal(torch.zeros(()), 1.0, validate_args=True).expand([3]).to_event(1)

    def density(x):
        scored = dist.Normal(x, x.exp(), validate_args=True).log_prob(torch.zeros(3))
        return prior.log_prob(x) + scored.sum()

    x = torch.linspace(-1.0, 1.0, 3)
    torch.testing.assert_close(capture(density, x)(x), density(x))
    with pytest.raises(ValueError, match="support"):  # the checks are there again
        prior.log_prob(torch.full((3,), math.nan))
    with pytest.raises(ValueError, match="constraint"):
        dist.Normal(0.0, -torch.ones(()), validate_args=True)


def positive_part(x):
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        positive = x[x > 0]
        value = (positive * torch.arange(len(positive))).sum()  # as many terms as entries are positive
        (slope,) = torch.autograd.grad(value, x)
    return value.detach(), slope


def test_graphs_whose_shapes_depend_on_values_are_refused_but_errors_of_functions_come_through():
    one, two = torch.tensor([1.0, 3.0, -1.0, -2.0]), torch.tensor([1.0, 3.0, 2.0, -2.0])
    torch.manual_seed(0)
    state = torch.get_rng_state()
    with pytest.raises(CaptureError, match=r"its shapes depend on values.*'positive = x\[x > 0\]"):
        capture(positive_part, one, checks=[(two,)])
    with pytest.raises(CaptureError, match=r"fails where the function does not \(.*size.*\): shapes depend on values"):
        compare(torch.exp, lambda x: x[:2] + x, (one,), None)
    assert torch.equal(torch.get_rng_state(), state)

    def faulty(x):
        torch.rand(1)
        raise KeyError("a fault of the user's")

    with pytest.raises(KeyError, match="a fault of the user's"):
        compare(faulty, torch.exp, (one,), None)
    assert torch.equal(torch.get_rng_state(), state)


def selecting_model():
    x = pyro.sample("x", dist.Normal(0.0, 1.0).expand([6]).to_event(1))
    positive = x[x > 0]
    pyro.factor("few", -(positive.square() * torch.arange(len(positive))).sum())


def test_potentials_whose_shapes_depend_on_values_run_in_pyro_and_say_why(caplog):
    potential = Potential(Problem("selecting", selecting_model))
    with caplog.at_level("INFO", logger="probmodels"):
        assert potential.fastest() == potential.evaluate
    assert "selecting: the potential runs in Pyro" in caplog.text
    assert "shapes depend on values" in caplog.text


def test_a_failed_factorisation_in_a_batch_is_nan_there_and_nowhere_else():
    graph = batch(capture(lambda x: torch.linalg.cholesky(torch.eye(2) * x), torch.ones(1)), torch.ones(3, 1))
    found = graph(torch.tensor([[1.0], [-1.0], [4.0]]))
    assert torch.isfinite(found[[0, 2]]).all()
    assert found[1].isnan().any()


def supports_model():
    pyro.sample("real", dist.Normal(0.0, 2.0))
    pyro.sample("positive", dist.Gamma(2.0, 3.0))
    pyro.sample("unit", dist.Beta(2.0, 2.0))
    with pyro.plate("groups", 2):
        pyro.sample("simplex", dist.Dirichlet(torch.ones(3)))
    pyro.sample("cholesky", dist.LKJCholesky(3, 1.0))


def test_flat_vector_and_sites_map_to_each_other():
    potential = Potential(Problem("supports", supports_model))
    assert potential.size == 1 + 1 + 1 + 4 + 3
    torch.manual_seed(0)
    z = potential.uniform(2.0)
    values, _ = potential.constrain(z)
    torch.testing.assert_close(potential.unconstrain(values), z, rtol=1e-4, atol=1e-4)
    assert values["simplex"].shape == (2, 3)
    many = potential.export_many(torch.stack([z, 2 * z]).reshape(1, 2, -1))
    torch.testing.assert_close(many["simplex"][0, 0], values["simplex"])
    exported = potential.export(z)
    assert set(exported) == set(values)


def test_log_density_holds_the_jacobian_of_every_support():
    """Integrates to one over unconstrained space, so that the volume change is right."""

    def model():
        pyro.sample("positive", dist.LogNormal(0.3, 0.7))

    potential = Potential(Problem("one", model))
    grid = torch.linspace(-8, 8, 2001, dtype=torch.float64)
    with torch.no_grad():
        density = torch.stack([potential.log_density(point[None]) for point in grid.float()]).exp()
    assert float(torch.trapezoid(density.double(), grid)) == pytest.approx(1.0, abs=1e-5)


def test_potential_of_a_conjugate_model_is_the_closed_form():
    potential = Potential(Problem("mean", mean_model, args=(Y,)))
    z = torch.tensor([0.4], dtype=torch.float64)
    value, gradient = potential.evaluate(z)
    joint = dist.Normal(z.new_zeros(()), 2.0).log_prob(z).sum() + dist.Normal(z, 0.5).log_prob(Y).sum()
    assert float(value) == pytest.approx(-float(joint), abs=1e-10)  # the generated site is left out
    assert float(gradient) == pytest.approx(float(z / 4 - ((Y - z) / 0.25).sum()), abs=1e-10)


def mixture_model(x):
    weight = pyro.sample("weight", dist.Beta(2.0, 2.0))
    locs = pyro.sample("locs", dist.Normal(0.0, 3.0).expand([2]).to_event(1))
    with pyro.plate("points", len(x)):
        z = pyro.sample("z", dist.Bernoulli(weight))
        pyro.sample("x", dist.Normal(locs[z.long()], 1.0), obs=x)


def test_discrete_sites_are_summed_out_exactly_also_in_batches():
    x = torch.tensor([-1.0, 0.5, 2.0, 2.5])
    potential = Potential(Problem("mixture", mixture_model, args=(x,)))
    assert set(potential.slots) == {"weight", "locs"}
    torch.manual_seed(1)
    points = torch.stack([potential.uniform(1.5) for _ in range(4)])
    batched = potential.batched(4)(points)
    for index, point in enumerate(points):
        values, log_volume = potential.constrain(point)
        weight, locs = values["weight"], values["locs"]
        parts = torch.stack([(1 - weight).log() + dist.Normal(locs[0], 1.0).log_prob(x),
                             weight.log() + dist.Normal(locs[1], 1.0).log_prob(x)])  # fmt: skip
        joint = parts.logsumexp(0).sum() + dist.Beta(2.0, 2.0).log_prob(weight)
        joint = joint + dist.Normal(0.0, 3.0).log_prob(locs).sum() + log_volume
        assert float(potential.evaluate(point)[0]) == pytest.approx(-float(joint), rel=1e-5)
        assert float(batched[0][index]) == pytest.approx(-float(joint), rel=1e-5)
        torch.testing.assert_close(batched[1][index], potential.evaluate(point)[1], rtol=1e-4, atol=1e-4)


def chain(y):
    """Two hidden states, one program step per time."""
    transition = pyro.sample("transition", dist.Dirichlet(torch.ones(2, 2)).to_event(1))
    mu = pyro.sample("mu", dist.Normal(torch.tensor([-1.0, 1.0]), 1.0).to_event(1))
    state = 0
    for step in pyro.markov(range(len(y))):
        state = pyro.sample(f"state_{step}", dist.Categorical(transition[state]), infer={"enumerate": "parallel"})
        pyro.sample(f"y_{step}", dist.Normal(mu[state], 1.0), obs=y[step])


def test_chains_unrolled_over_time_are_summed_step_by_step():
    y = torch.randn(40, generator=torch.Generator().manual_seed(0))  # all paths at once would need terabytes
    potential = Potential(Problem("chain", chain, args=(y,)))
    points = torch.stack([potential._random(key) for key in range(3)])
    found, _ = potential.batched(3)(points)
    for z, density in zip(points, -found, strict=True):
        values, volume = potential.constrain(z)
        transition, mu = values["transition"], values["mu"]
        emission = dist.Normal(mu, 1.0).log_prob(y[:, None])
        forward = transition[0].log() + emission[0]
        for term in emission[1:]:
            forward = torch.logsumexp(forward[:, None] + transition.log(), 0) + term
        prior = dist.Dirichlet(torch.ones(2, 2)).log_prob(transition).sum()
        prior = prior + dist.Normal(torch.tensor([-1.0, 1.0]), 1.0).log_prob(mu).sum()
        torch.testing.assert_close(density, forward.logsumexp(0) + prior + volume, rtol=1e-5, atol=1e-4)


def test_states_of_chains_unrolled_over_time_are_found_step_by_step():
    y = torch.randn(35, generator=torch.Generator().manual_seed(0))
    values = {"transition": torch.tensor([[0.8, 0.2], [0.3, 0.7]]), "mu": torch.tensor([-1.0, 1.0])}
    enumeration = Enumeration(Problem("chain", chain, args=(y,)))
    emission = dist.Normal(values["mu"], 1.0).log_prob(y[:, None])
    move = values["transition"].log()
    before, after = [move[0] + emission[0]], [torch.zeros(2)]
    for term in emission[1:]:
        before.append(torch.logsumexp(before[-1][:, None] + move, 0) + term)
    for term in emission.flip(0)[:-1]:
        after.insert(0, torch.logsumexp(move + term + after[0], 1))
    wanted = torch.softmax(torch.stack(before) + torch.stack(after), 1)
    found = enumeration.marginals(values)
    names = [f"state_{step}" for step in range(len(y))]
    torch.testing.assert_close(torch.stack([found[name] for name in names]), wanted, rtol=1e-4, atol=1e-5)
    drawn = [enumeration.assign(values, names, 1) for _ in range(30)]
    mean = torch.stack([torch.stack([draw[name] for name in names]).float() for draw in drawn]).mean()
    assert abs(mean - wanted[:, 1].mean()) < 0.06  # over four standard errors


def test_reparametrised_sites_are_exported_as_the_model_names_them():
    def model():
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
        pyro.sample("w", dist.Normal(1.0, scale))

    potential = Potential(Problem("scaled", model, reparam={"w": LocScaleReparam(0.0)}))
    assert set(potential.slots) == {"scale", "w_decentered"}
    many = potential.export_many(torch.tensor([[0.2, -1.0], [0.0, 2.0]]))
    assert set(many) == {"scale", "w"}
    torch.testing.assert_close(many["w"], 1 + many["scale"] * torch.tensor([-1.0, 2.0]))


def changing_model():
    changing_model.calls += 1
    for index in range(1 + changing_model.calls % 2):
        pyro.sample(f"x_{index}", dist.Normal(0.0, 1.0))


def test_models_that_have_no_flat_density_are_refused():
    changing_model.calls = 0
    with pytest.raises(ProblemError, match=r"x_1.*come, go or change shape"):
        Potential(Problem("changing", changing_model))

    def counting():
        pyro.sample("k", dist.Poisson(3.0))
        pyro.sample("x", dist.Normal(0.0, 1.0))

    with pytest.raises(ProblemError, match=r"'k' cannot be enumerated.*Poisson"):
        Potential(Problem("counting", counting))


def test_a_start_without_density_names_the_site():
    def impossible():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("wall", -math.inf * (1 + x.abs()))

    potential = Potential(Problem("impossible", impossible))
    with pytest.raises(ProblemError, match=r"none of 5 starts.*site 'wall'"):
        potential.find_start(potential.evaluate, lambda: potential.uniform(1.0), tries=5)


def test_graph_of_one_chain_and_of_many_agree_on_a_model_with_plates():
    y = torch.tensor([[0.5, 1.0, 0.2], [-1.0, -2.0, 0.3]], dtype=torch.float64)
    potential = Potential(Problem("rows", normal_model, args=(y,)))
    points = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    value, gradient = potential.batched(5)(points)
    for index, point in enumerate(points):
        wanted = potential.evaluate(point)
        np.testing.assert_allclose(value[index], wanted[0], rtol=1e-12)
        np.testing.assert_allclose(gradient[index], wanted[1], rtol=1e-10)


@pytest.mark.parametrize("way", ["tolist", "numpy", "asarray", "dlpack", "flattened"])
def test_values_that_leave_torch_all_at_once_are_no_constants(way):
    """A graph would hold what an example had."""
    read = {
        "tolist": lambda z: sum(z.tolist()),
        "numpy": lambda z: float(z.numpy().sum()),
        "asarray": lambda z: float(np.asarray(z).sum()),
        "dlpack": lambda z: float(np.from_dlpack(z).sum()),
        "flattened": lambda z: sum(torch.stack([z, z]).flatten().tolist()),
    }[way]

    def function(z):
        return torch.tensor(1.0 if read(z) > 8 else 0.0) + 0 * z.sum()

    with pytest.raises(CaptureError, match="reads a value"):
        capture(function, torch.zeros(4), checks=[(torch.ones(4),)])
    data = torch.arange(4.0)
    graph = capture(lambda z: z * read(data), torch.zeros(4), checks=[(torch.ones(4),)])
    torch.testing.assert_close(graph(torch.ones(4)), torch.full((4,), read(data)))
