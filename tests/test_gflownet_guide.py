"""Policies for discrete sites against enumeration: textbook models, densities, local plates, amortisation, errors."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from textbook import PROBLEMS, mixture
from torch import Tensor

from probmodels.errors import ProblemError
from probmodels.guides.auto import check_guide, make_guide, with_guide
from probmodels.guides.gflownet import DiscretePolicy, make_policy
from probmodels.guides.policy_networks import Autoregressive
from probmodels.inference import Problem, Result, fit_svi
from probmodels.inference.flows.balance import SubTrajectoryBalance, TrajectoryBalance, VarGrad
from probmodels.inference.programs.minibatch import subsampled
from probmodels.inference.runtime.ops import isolated
from probmodels.inference.variational.losses import Sleep, wake_phi
from probmodels.inference.variational.svi import fitted

# A graph repays its capture only in longer fits.
fit = partial(fit_svi, num_steps=250, lr=0.03, lr_decay=0.1, num_samples=2, progress=False, compile="eager")
LONGER = {"ising_plate": 380, "hidden_markov": 300, "change_points": 350}  # steps, with 8 draws each
Values = dict[str, Tensor]


# --- models ----------------------------------------------------------------------------------------------------------


def mixed(x: Tensor) -> None:
    """Unknown distance of two clusters: posterior by quadrature."""
    gap = pyro.sample("gap", dist.LogNormal(0.0, 0.5))
    with pyro.plate("data", len(x)) as rows:
        z = pyro.sample("z", dist.Bernoulli(0.4))
        pyro.sample("x", dist.Normal(gap * (2 * z - 1), 0.7), obs=x[rows])


def shapes(x: Tensor) -> None:
    """Sites of every kind: event axes, one-hot and binomial values, nested plates, one of them not local."""
    top = pyro.sample("top", dist.OneHotCategorical(torch.tensor([0.2, 0.3, 0.5])))
    pair = pyro.sample("pair", dist.Bernoulli(torch.tensor([0.2, 0.6])).to_event(1))
    with pyro.plate("row", 2, dim=-2):
        pyro.sample("row_total", dist.Binomial(2, torch.tensor(0.4)).expand([2, 1]))
        with pyro.plate("column", 3, dim=-1):
            inside = pyro.sample("inside", dist.Categorical(torch.ones(2) / 2).expand([2, 3]))
    pyro.sample("x", dist.Normal(inside.sum(-1).sum(-1) + top[..., 0] + pair.sum(-1), 1.0), obs=x)


# --- enumeration -----------------------------------------------------------------------------------------------------


def assignments(shapes: Mapping[str, tuple[tuple[int, ...], Sequence[Any]]]) -> list[Values]:
    """All joint values of sites of given shapes, whose elements take given values."""
    every = []
    for shape, values in shapes.values():
        table = torch.as_tensor(values)
        size = math.prod(shape)
        found = [table[list(choice)] for choice in itertools.product(range(len(table)), repeat=size)]
        every.append([value.reshape([*shape, *table.shape[1:]]) for value in found])
    return [dict(zip(shapes, choice, strict=True)) for choice in itertools.product(*every)]


def log_densities(program: Any, args: Any, values: Sequence[Values]) -> Tensor:
    with torch.no_grad(), pyro.validation_enabled(False):
        traces = (poutine.trace(poutine.condition(program, v)).get_trace(*args) for v in values)
        return torch.stack([torch.as_tensor(trace.log_prob_sum()) for trace in traces]).double()


def stacked_densities(guide: Any, args: Any, values: Sequence[Values]) -> Tensor:
    """The same by one run of a guide whose plates take the dims -1 and -2."""
    found = {}
    for name, value in values[0].items():
        stacked = torch.stack([v[name] for v in values])
        num_event = value.dim() if name in ("top", "pair") else 0
        lead = (1,) * (2 - value.dim() + num_event)
        found[name] = stacked.reshape(len(values), *lead, *value.shape)
    with torch.no_grad(), pyro.plate("draws", len(values), dim=-3):
        trace: Any = poutine.trace(poutine.condition(guide, found)).get_trace(*args)
        trace.compute_log_prob()
    return sum(trace.nodes[name]["log_prob"].reshape(len(values), -1).sum(-1) for name in found).double()


def largest_error(values: Sequence[Values], log_p: Tensor, log_q: Tensor) -> float:
    """Largest difference between the posterior probabilities of single elements."""
    p, q = log_p.softmax(0), log_q.exp()
    worst = 0.0
    for name in values[0]:
        stacked = torch.stack([v[name].flatten() for v in values])
        for value in stacked.unique():
            hit = (stacked == value).double()
            worst = max(worst, float(((p - q) @ hit).abs().max()))
    return worst


def state_of(result: Result) -> dict[str, Tensor]:
    assert result.guide_state is not None
    return result.guide_state


def fitted_densities(problem: Problem, result: Result, values: Sequence[Values]) -> tuple[Tensor, Tensor]:
    with fitted(problem, state_of(result), seed=0) as (model, guide):
        return log_densities(model, problem.args, values), log_densities(guide, problem.args, values)


def scrambled(problem: Problem, **options: Any) -> DiscretePolicy:
    """A policy with random weights, far from the uniform start."""
    guide = make_policy(problem, **options)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.7 * torch.randn(parameter.shape, generator=generator))
    return guide


BITS = [0.0, 1.0]
DOMAINS: dict[str, dict[str, Any]] = {
    "hidden_markov": {f"z_{t}": ((), [0, 1]) for t in range(8)},
    "ising_plate": {"s": ((9,), BITS)},
    "noisy_or": {"cause_on": ((5,), BITS)},
    "change_points": {"first": ((), range(9)), "second": ((), range(9))},
}
SHAPES: dict[str, Any] = {
    "top": ((), torch.eye(3)),
    "pair": ((2,), BITS),
    "row_total": ((2, 1), [0.0, 1.0, 2.0]),
    "inside": ((2, 3), [0, 1]),
}


# --- posteriors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["noisy_or", *(pytest.param(n, marks=pytest.mark.slow) for n in DOMAINS if n != "noisy_or")]
)
def test_marginals_are_those_of_enumeration(name: str) -> None:
    plain, domain = PROBLEMS[name], DOMAINS[name]
    problem = with_guide(plain, "gflownet", hidden=32)
    values = assignments(domain)
    options = {"num_steps": LONGER[name], "num_particles": 8} if name in LONGER else {}
    log_p, log_q = fitted_densities(problem, fit(problem, **options), values)
    assert float(log_q.exp().sum()) == pytest.approx(1.0, abs=1e-4)
    assert largest_error(values, log_p, log_q) < 0.03
    # A control: the start, where every value is equally likely, is far off.
    with isolated(seed=0):
        assert largest_error(values, log_p, log_densities(make_policy(plain), plain.args, values)) > 0.1


def test_a_recurrent_network_does_as_well() -> None:
    plain, domain = PROBLEMS["noisy_or"], DOMAINS["noisy_or"]
    problem = with_guide(plain, "gflownet", hidden=16, network="gru")
    log_p, log_q = fitted_densities(problem, fit(problem, num_steps=150), values := assignments(domain))
    assert largest_error(values, log_p, log_q) < 0.03


def row_probabilities(problem: Problem, result: Result, x: Tensor) -> Tensor:
    with fitted(problem, state_of(result), seed=0) as (_, guide), torch.no_grad():
        trace: Any = poutine.trace(guide).get_trace(x)
    probs: Tensor = trace.nodes["z"]["fn"].probs
    return probs


def exact_rows(x: Tensor) -> Tensor:
    logs = dist.Normal(torch.tensor([-1.0, 1.0, 2.0]), 0.8).log_prob(x[:, None])
    return (logs + torch.tensor([0.5, 0.3, 0.2]).log()).softmax(-1)


def test_rows_of_data_are_amortised_over_minibatches() -> None:
    x = torch.linspace(-3, 4, 60)
    plain = Problem("mixture", mixture, args=(x,), batch_plates=("data",))
    problem = with_guide(plain, "gflownet", hidden=16)
    assert problem.guide.local_plates == ("data",)  # type: ignore[union-attr]
    result = fit(problem, batch_size=15, num_steps=500, lr=0.05)
    assert (row_probabilities(problem, result, x) - exact_rows(x)).abs().max() < 0.03
    other = torch.linspace(2.5, -1.5, 60)  # data that it has never seen
    assert (row_probabilities(problem, result, other) - exact_rows(other)).abs().max() < 0.03


def test_continuous_sites_come_first_and_are_looked_at() -> None:
    x = torch.tensor([1.2, 1.6, 0.9, -1.1, 1.4])
    problem = with_guide(Problem("mixed", mixed, args=(x,)), "gflownet", hidden=24, init_scale=0.3)
    assert problem.guide.local_plates == ("data",)  # type: ignore[union-attr]
    result = fit(problem, num_steps=350, num_samples=2000)
    # Quadrature over the gap, sums over rows.
    gap = torch.linspace(0.02, 5.0, 2000)
    low, high = (dist.Normal(s * gap[:, None], 0.7).log_prob(x) + math.log(w) for s, w in ((-1.0, 0.6), (1.0, 0.4)))
    rows = torch.logaddexp(low, high)  # (gap, row)
    mass = (rows.sum(-1) + dist.LogNormal(0.0, 0.5).log_prob(gap)).softmax(0)
    draws = result.posterior
    assert float(draws["gap"].mean()) == pytest.approx(float(mass @ gap), abs=0.05)
    assert torch.allclose(torch.tensor(draws["z"].values).mean((0, 1)), mass @ (high - rows).exp(), atol=0.04)


# --- densities -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", ["mlp", "gru"])
def test_densities_sum_to_one_and_draws_follow_them(network: str) -> None:
    problem = Problem("shapes", shapes, args=(torch.tensor(4.0),))
    guide = scrambled(problem, hidden=8, network=network)
    assert guide.local_plates == ()
    values = assignments(SHAPES)
    with isolated(seed=0):
        log_q = stacked_densities(guide, problem.args, values)
        some = slice(0, len(values), 997)
        assert torch.allclose(log_q[some], log_densities(guide, problem.args, values[some]), atol=1e-4)
        assert float(log_q.exp().sum()) == pytest.approx(1.0, abs=1e-4)
        if network == "mlp":  # the same code draws for both
            num, lead = 4000, pyro.plate("draws", 4000, dim=-3)
            with torch.no_grad(), lead:
                trace: Any = poutine.trace(guide).get_trace(*problem.args)
            for name, (shape, _) in SHAPES.items():
                want = torch.stack([v[name].double().flatten() for v in values]).T @ log_q.exp()
                got = trace.nodes[name]["value"].double().reshape(num, -1).mean(0)
                assert torch.allclose(got, want, atol=5 * 0.9 / math.sqrt(num)), (name, shape)  # five errors


def test_an_entry_of_a_plate_is_scored_given_the_earlier_ones() -> None:
    problem = PROBLEMS["ising_plate"]
    guide = scrambled(problem, hidden=8)
    with isolated(seed=0), torch.no_grad():
        trace: Any = poutine.trace(guide).get_trace()
        fn, value = trace.nodes["s"]["fn"], trace.nodes["s"]["value"]
        assert isinstance(fn, Autoregressive)
        changed = value.clone()
        changed[6] = 1 - changed[6]
        same = fn.log_prob(value) == fn.log_prob(changed)
    assert same[:6].all()
    assert not same[6:].any()


def test_exploring_changes_draws_and_no_density() -> None:
    problem = PROBLEMS["ising_plate"]
    guide = scrambled(problem, hidden=8)
    with isolated(seed=0), torch.no_grad():
        trace: Any = poutine.trace(guide).get_trace()
        fn = trace.nodes["s"]["fn"].expand([400, 9])
        wild, tame = fn.explored(epsilon=1.0), fn.explored(temperature=0.01)
        assert torch.allclose(wild.sample().mean(0), torch.full((9,), 0.5), atol=0.13)  # five errors
        assert len(tame.sample().unique(dim=0)) < 10
        value = fn.sample()
        assert torch.equal(wild.log_prob(value), fn.log_prob(value))


def test_given_values_are_scored_so_that_other_objectives_work() -> None:
    x = torch.linspace(-2, 3, 6)
    problem = Problem("mixture", mixture, args=(x,), batch_plates=("data",))
    for objective in (wake_phi(3), Sleep(problem)):
        guide = make_policy(problem, hidden=8)
        with isolated(seed=0):
            objective(mixture, guide, x).backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in guide.named_parameters() if "second" in n)


def test_a_minibatch_reads_its_own_rows() -> None:
    x = torch.linspace(-2, 3, 6)
    guide = scrambled(Problem("mixture", mixture, args=(x,), batch_plates=("data",)), hidden=8)
    with isolated(seed=0), torch.no_grad():
        whole: Any = poutine.trace(guide).get_trace(x)
        with subsampled({"data": torch.tensor([4, 1])}):
            some: Any = poutine.trace(guide).get_trace(x)
    assert torch.allclose(some.nodes["z"]["fn"].logits, whole.nodes["z"]["fn"].logits[[4, 1]])


# --- structure -------------------------------------------------------------------------------------------------------


def crossed(x: Tensor) -> None:
    with pyro.plate("u", 3, dim=-1):
        a = pyro.sample("a", dist.Categorical(torch.ones(2)))
    with pyro.plate("v", 2, dim=-2):
        b = pyro.sample("b", dist.Categorical(torch.ones(2)))
        with pyro.plate("u_again", 3, dim=-1):
            pyro.sample("x", dist.Normal((a + b).float(), 1.0), obs=x)


def crossed_plates(x: Tensor) -> None:
    columns, rows = pyro.plate("columns", 3, dim=-1), pyro.plate("rows", 2, dim=-2)
    with columns:
        a = pyro.sample("a", dist.Categorical(torch.ones(2)))
    with rows:
        b = pyro.sample("b", dist.Categorical(torch.ones(2)).expand([2, 1]))
    with rows, columns:
        pyro.sample("x", dist.Normal((a + b).float(), 1.0), obs=x)


def nested(x: Tensor) -> None:
    weight = pyro.sample("weight", dist.Categorical(torch.ones(2)))
    with pyro.plate("group", 3, dim=-2):
        a = pyro.sample("a", dist.Categorical(torch.ones(2)))
        with pyro.plate("member", 4, dim=-1):
            b = pyro.sample("b", dist.Bernoulli(0.3 + 0.2 * a + 0.1 * weight))
            pyro.sample("x", dist.Normal(b, 1.0), obs=x)


def test_local_plates_are_read_off_the_model() -> None:
    table = torch.arange(6.0).reshape(2, 3)
    assert make_policy(Problem("crossed", crossed, args=(table,))).local_plates == ("v",)
    assert make_policy(Problem("crossed", crossed_plates, args=(table,))).local_plates == ("columns",)
    deep = make_policy(Problem("nested", nested, args=(torch.arange(12.0).reshape(3, 4),)))
    assert deep.local_plates == ("group", "member")
    assert make_policy(PROBLEMS["noisy_or"]).local_plates == ()


def test_nested_plates_are_exact() -> None:
    x = torch.tensor([[2.0, 1.5, -0.5], [-1.0, 0.0, 0.3]])

    def model(x: Tensor) -> None:
        weight = pyro.sample("weight", dist.Categorical(torch.ones(2)))
        with pyro.plate("group", 2, dim=-2):
            a = pyro.sample("a", dist.Categorical(torch.ones(2)).expand([2, 1]))
            with pyro.plate("member", 3, dim=-1):
                b = pyro.sample("b", dist.Bernoulli(0.2 + 0.5 * a + 0.2 * weight))
                pyro.sample("x", dist.Normal(b, 0.7), obs=x)

    problem = with_guide(Problem("nested", model, args=(x,)), "gflownet", hidden=24)
    domain = {"weight": ((), [0, 1]), "a": ((2, 1), [0, 1]), "b": ((2, 3), BITS)}
    log_p, log_q = fitted_densities(problem, fit(problem, num_steps=200), values := assignments(domain))
    assert largest_error(values, log_p, log_q) < 0.03


def test_order_of_sites_is_kept() -> None:
    plain = PROBLEMS["change_points"]
    guide = make_policy(plain, order=["second", "first"])
    with isolated(seed=0):
        trace: Any = poutine.trace(guide).get_trace(*plain.args)
    assert [n for n, node in trace.nodes.items() if node["type"] == "sample"] == ["second", "first"]


def test_log_z_is_the_log_evidence() -> None:
    plain, domain = PROBLEMS["noisy_or"], DOMAINS["noisy_or"]
    problem = with_guide(plain, "gflownet", hidden=24, log_z=True)
    problem = Problem(**{**vars_of(problem), "loss": TrajectoryBalance(4)})
    evidence = log_densities(plain.model, plain.args, assignments(domain)).logsumexp(0)
    with fitted(problem, state_of(fit(problem)), seed=0) as (_, guide):
        trace: Any = poutine.trace(guide).get_trace(*plain.args)
    assert float(trace.nodes["log_Z"]["value"].detach()) == pytest.approx(float(evidence), abs=0.1)


def test_log_z_and_flows_belong_to_rows_where_all_sites_do() -> None:
    x = torch.linspace(-2, 3, 6)
    guide = make_policy(Problem("mixture", mixture, args=(x,)), log_z=True, flows=True)
    with isolated(seed=0):
        trace: Any = poutine.trace(guide).get_trace(x)
        assert trace.nodes["log_Z"]["value"].shape == trace.nodes["log_flow_z"]["value"].shape == (6,)
        assert SubTrajectoryBalance(2).differentiable_loss(mixture, guide, x).isfinite()
    y = torch.tensor([1.2, 1.6, 0.9, -1.1, 1.4])
    guide = make_policy(Problem("mixed", mixed, args=(y,)), log_z=True, flows=True)
    with isolated(seed=0):
        assert SubTrajectoryBalance(2).differentiable_loss(mixed, guide, y).isfinite()


def vars_of(problem: Problem) -> dict[str, Any]:
    return {name: getattr(problem, name) for name in problem.__dataclass_fields__}


# --- the guide as a module -------------------------------------------------------------------------------------------


def test_with_guide_takes_the_log_variance_loss_unless_told_otherwise() -> None:
    plain = PROBLEMS["noisy_or"]
    assert isinstance(with_guide(plain, "gflownet").loss, VarGrad)
    own = TrajectoryBalance(2)
    assert with_guide(Problem(**{**vars_of(plain), "loss": own}), "gflownet").loss is own
    with pytest.raises(ProblemError, match="has no option 'hiden'; did you mean 'hidden'"):
        check_guide("gflownet", {"hiden": 3})
    with pytest.raises(ProblemError, match="did you mean 'gflownet'"):
        check_guide("gflownets", {})


def test_equal_problems_give_equal_guides_that_copy_pickle_and_convert() -> None:
    problem = with_guide(Problem("mixed", mixed, args=(torch.linspace(-1, 1, 4),)), "gflownet", hidden=8)
    guide: Any = problem.guide
    again = make_guide(problem, "gflownet", hidden=8)
    assert all(torch.equal(a, b) for a, b in zip(guide.parameters(), again.parameters(), strict=True))
    for other in (copy.deepcopy(guide), pickle.loads(pickle.dumps(guide))):
        with isolated(seed=1):
            want = guide(*problem.args)
        with isolated(seed=1):
            got = other(*problem.args)
        assert all(torch.equal(want[name], got[name]) for name in want)
    double = fit(problem, num_steps=3, dtype="float64")
    assert double.posterior["gap"].dtype == "float64"
    assert problem.validate() is problem


def test_shapes_of_every_kind_are_valid() -> None:
    with_guide(Problem("shapes", shapes, args=(torch.tensor(4.0),)), "gflownet", hidden=8).validate()
    assert len(fit(with_guide(PROBLEMS["ising_plate"], "gflownet"), num_steps=2).posterior["s"].dims) == 3


# --- errors ----------------------------------------------------------------------------------------------------------


def continuous() -> None:
    pyro.sample("a", dist.Normal(0.0, 1.0))


def unbounded() -> None:
    pyro.sample("count", dist.Poisson(2.0))


def growing() -> None:
    first = pyro.sample("first", dist.Categorical(torch.ones(3)))
    pyro.sample("second", dist.Categorical(torch.ones(2 + int(first))))


def coming_and_going() -> None:
    for step in range(1 + int(pyro.sample("count", dist.Categorical(torch.ones(3))))):
        pyro.sample(f"z_{step}", dist.Bernoulli(0.5))


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (continuous, {}, "has no discrete latent site"),
        (unbounded, {}, "'count' of distribution Poisson has no finite list of values"),
        (growing, {}, "support of the discrete site 'second' changes between runs"),
        (coming_and_going, {}, "is not there in every run"),
        (PROBLEMS["ising_sites"].model, {"order": ["s_1", "s_2"]}, "must name each of the discrete sites"),
        (PROBLEMS["ising_sites"].model, {"network": "lstm"}, "network='lstm'; choose one of mlp, gru, independent"),
        (PROBLEMS["ising_sites"].model, {"hidden": 0}, "hidden=0; give a whole number of at least 1"),
        (PROBLEMS["ising_sites"].model, {"data": ["weights"]}, "data names 'weights'"),
        (PROBLEMS["ising_sites"].model, {"init": {"s_1": 0.0}}, "no continuous latent site"),
    ],
)
def test_what_a_policy_cannot_do_is_said(model: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ProblemError, match=message):
        make_policy(Problem("broken", model), **options)


def test_a_site_may_index_a_table_in_a_captured_step() -> None:
    table = torch.tensor([[0.9, 0.1], [0.2, 0.8]])

    def chain(y: Tensor) -> None:
        first = pyro.sample("first", dist.Categorical(torch.tensor([0.5, 0.5])))
        second = pyro.sample("second", dist.Categorical(table[first]))
        pyro.sample("y", dist.Normal(table[first, second] + table[-1][second], 0.3), obs=y)

    problem = with_guide(Problem("chain", chain, args=(torch.tensor(0.4),)), "gflownet", hidden=8)
    options = {"num_steps": 30, "num_samples": 2, "lr": 0.05}
    graph = fit(problem, **options, compile="graph")
    assert graph.tree.attrs["execution"] == "graph"
    eager = fit(problem, **options)
    for name, value in eager.params().items():
        assert torch.allclose(graph.params()[name], value, atol=1e-5)
