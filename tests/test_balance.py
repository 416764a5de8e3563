"""Objectives of generative flow networks against enumeration: gradients, minima, exploration, plates, many orders."""

from __future__ import annotations

import itertools
import math
import os
import signal
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI
from pyro.nn import PyroModule, PyroParam
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import constraints

from probmodels.errors import ProblemError
from probmodels.inference import Phase, Problem, fit_em, fit_svi
from probmodels.inference.flows.balance import (
    DetailedBalance,
    Explore,
    SubTrajectoryBalance,
    TrajectoryBalance,
    VarGrad,
)
from probmodels.inference.programs.minibatch import subsampled
from probmodels.inference.variational.losses import make_loss, objective_of

F64 = torch.float64
fit = partial(fit_svi, num_samples=20, progress=False, lr=0.1, lr_decay=0.1)


def table(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def pick(values: Tensor, index: Tensor) -> Tensor:
    """Row of a table; an index () would be read out of its tensor, which no graph can do."""
    return values[index.reshape(1)].squeeze(0)


@pytest.fixture(autouse=True)
def _own_parameters() -> Any:
    with pyro.get_param_store().scope():
        pyro.set_rng_seed(0)
        yield


# Two discrete sites and a datum, by tables.

PRIOR, NEXT, SCORE = table(3, seed=1), table(3, 2, seed=2), table(3, 2, seed=3)


def chain() -> None:
    """a ~ Categorical(3), b | a ~ Categorical(2), and a datum of Bernoulli by both."""
    a = pyro.sample("a", dist.Categorical(logits=PRIOR))
    b = pyro.sample("b", dist.Categorical(logits=pick(NEXT, a)))
    pyro.sample("y", dist.Bernoulli(logits=2 * pick(SCORE.flatten(), 2 * a + b)), obs=torch.ones((), dtype=F64))


def chain_joint() -> Tensor:
    """log p(a, b, y) (3, 2)."""
    likelihood = torch.nn.functional.logsigmoid(2 * SCORE)
    return PRIOR.log_softmax(0).unsqueeze(1) + NEXT.log_softmax(1) + likelihood


class Tables(PyroModule):
    """Any distribution of a and b, with flows of all partial draws."""

    def __init__(self, seed: int = 4) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(table(3, seed=seed)), nn.Parameter(table(3, 2, seed=seed + 1))
        self.log_z, self.flow = nn.Parameter(torch.zeros((), dtype=F64)), nn.Parameter(torch.zeros(3, dtype=F64))

    def forward(self) -> None:
        pyro.deterministic("log_Z", self.log_z)
        pyro.deterministic("log_flow_a", self.log_z)
        a = pyro.sample("a", dist.Categorical(logits=self.first))
        pyro.deterministic("log_flow_b", pick(self.flow, a))
        pyro.sample("b", dist.Categorical(logits=pick(self.second, a)))

    def log_q(self) -> Tensor:
        return self.first.log_softmax(0).unsqueeze(1) + self.second.log_softmax(1)


class Give(Messenger):
    """Give sites the values of one draw after the other, whatever else is asked for."""

    def __init__(self, *draws: dict[str, Tensor]) -> None:
        super().__init__()
        self.left = {name: [draw[name] for draw in draws] for name in draws[0]}

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.left and not msg["done"]:
            msg["value"], msg["done"] = self.left[msg["name"]].pop(0), True


def gradient(loss: Tensor, parameters: Any) -> list[Tensor]:
    found = torch.autograd.grad(loss, list(parameters), allow_unused=True, retain_graph=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def divergence(log_q: Tensor, log_p: Tensor) -> Tensor:
    """KL(q || p) less the log evidence."""
    return (log_q.exp() * (log_q - log_p)).sum()


def pairs() -> list[tuple[int, int]]:
    return list(itertools.product(range(3), range(2)))


def expected(objective: Any, guide: Tables, count: int) -> Tensor:
    """Loss of all tuples of draws, weighted by their probability, which is no part of the gradient."""
    total: Any = 0.0
    weights = guide.log_q().detach().exp()
    for draws in itertools.product(pairs(), repeat=count):
        given = Give(*({"a": torch.tensor(a), "b": torch.tensor(b)} for a, b in draws))
        loss = objective.differentiable_loss(chain, given(guide))
        total = total + math.prod(float(weights[draw]) for draw in draws) * loss
    return total


@pytest.mark.parametrize("count", [2, 3])
def test_vargrad_has_the_gradient_of_the_divergence(count: int) -> None:
    guide = Tables()
    found = gradient(expected(VarGrad(count), guide, count), (guide.first, guide.second))
    exact = gradient(divergence(guide.log_q(), chain_joint()), (guide.first, guide.second))
    for ours, true in zip(found, exact, strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_trajectory_balance_has_it_with_any_log_z(offset: float) -> None:
    guide = Tables()
    evidence = chain_joint().logsumexp((0, 1))
    guide.log_z.data += evidence + offset
    found = gradient(expected(TrajectoryBalance(), guide, 1), (guide.first, guide.second, guide.log_z))
    bound = divergence(guide.log_q(), chain_joint())
    exact = gradient(bound, (guide.first, guide.second))
    for ours, true in zip(found, exact, strict=False):
        torch.testing.assert_close(ours, true, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found[2], evidence + offset + bound.detach(), rtol=1e-10, atol=1e-12)


def test_draws_of_the_guide_estimate_that_gradient() -> None:
    guide, draws = Tables(), 250
    parameters = (guide.first, guide.second)
    objective = VarGrad(4)
    found = []
    for _ in range(draws):
        parts = gradient(objective.differentiable_loss(chain, guide), parameters)
        found.append(torch.cat([part.flatten() for part in parts]))
    exact = torch.cat([p.flatten() for p in gradient(divergence(guide.log_q(), chain_joint()), parameters)])
    mean, error = torch.stack(found).mean(0), torch.stack(found).std(0) / math.sqrt(draws)
    assert ((mean - exact).abs() < 4 * error).all()


ALL = {
    "VarGrad": VarGrad,
    "TrajectoryBalance": TrajectoryBalance,
    "SubTrajectoryBalance": SubTrajectoryBalance,
    "SubTrajectoryBalance forward": partial(SubTrajectoryBalance, forward_looking=True),
    "DetailedBalance": DetailedBalance,
    "DetailedBalance forward": partial(DetailedBalance, forward_looking=True),
}


def minimum(kind: str) -> Tables:
    """The guide that balances all flows."""
    guide, joint = Tables(), chain_joint()
    guide.first.data, guide.second.data = joint.logsumexp(1), joint.clone()
    guide.log_z.data, guide.flow.data = joint.logsumexp((0, 1)), joint.logsumexp(1)
    if "forward" in kind:  # the model knows log p(a) once a is drawn
        guide.flow.data = guide.flow.data - PRIOR.log_softmax(0)
    return guide


@pytest.mark.parametrize("kind", ALL)
def test_loss_and_gradient_vanish_at_the_posterior_whatever_the_draws(kind: str) -> None:
    guide, objective = minimum(kind), ALL[kind](4, temperature=3.0, epsilon=0.2)
    for _ in range(5):
        loss = objective.differentiable_loss(chain, guide)
        assert loss.item() < 1e-20
        assert all(part.abs().max() < 1e-9 for part in gradient(loss, list(guide.parameters())))
    guide.second.data[0, 0] += 0.1
    assert max(objective.differentiable_loss(chain, guide).item() for _ in range(20)) > 1e-5


@pytest.mark.parametrize(
    "explore",
    [
        pytest.param({}, marks=pytest.mark.slow, id="on-policy"),
        pytest.param({"temperature": 2.0, "epsilon": 0.3}, id="off-policy"),
    ],
)
@pytest.mark.parametrize("kind", ALL)
def test_fits_find_posterior_and_evidence(kind: str, explore: dict[str, float]) -> None:
    problem = Problem("chain", chain, Tables(), loss=ALL[kind](4, **explore))
    result = fit(problem, num_steps=400)
    params, joint = result.params(), chain_joint()
    log_q = params["first"].log_softmax(0).unsqueeze(1) + params["second"].log_softmax(1)
    evidence = joint.logsumexp((0, 1))
    assert (log_q.exp() - (joint - evidence).exp()).abs().sum() / 2 < 0.01
    # Every draw has the weight of the evidence.
    weights = torch.as_tensor(result.tree["sample_stats"]["log_weight"].values)
    assert (weights - evidence).abs().max() < 0.05
    if kind != "VarGrad":
        assert abs(params["log_z"] - evidence) < 0.01


def test_sub_trajectories_of_one_step_and_of_all_are_the_others() -> None:
    guide = Tables()

    def loss(objective: Any) -> float:
        given = Give({"a": torch.tensor(2), "b": torch.tensor(1)})
        return objective.differentiable_loss(chain, given(guide)).item()

    joint, log_q = chain_joint()[2, 1], guide.log_q()[2, 1]
    first = guide.first.log_softmax(0)[2]
    whole = (guide.log_z + log_q - joint) ** 2 / 2
    steps = (guide.log_z + first - guide.flow[2]) ** 2 / 2, (guide.flow[2] + log_q - first - joint) ** 2 / 2
    assert loss(TrajectoryBalance()) == pytest.approx(whole.item(), rel=1e-12)
    assert loss(DetailedBalance()) == pytest.approx(sum(steps).item() / 2, rel=1e-12)
    assert loss(SubTrajectoryBalance(decay=0.5)) == pytest.approx((sum(steps) + whole / 2).item() / 2.5, rel=1e-12)
    assert loss(SubTrajectoryBalance(decay=1e9)) == pytest.approx(whole.item(), rel=1e-6)


# Exploration.


@pytest.mark.parametrize(
    "fn",
    [
        dist.Categorical(logits=torch.tensor([[2.0, 0.0, -torch.inf], [0.0, 1.0, 2.0]])),
        dist.OneHotCategorical(logits=torch.tensor([[2.0, 0.0, -torch.inf], [0.0, 1.0, 2.0]])),
        dist.Bernoulli(logits=torch.tensor([2.0, -1.0])).to_event(1),
        dist.Bernoulli(logits=torch.tensor([2.0, -1.0])).mask(torch.tensor([True, False])).to_event(1),
    ],
    ids=["categorical", "one hot", "independent", "masked"],
)
def test_exploration_changes_draws_and_no_density(fn: Any) -> None:
    def program() -> None:
        with pyro.plate("draw", 4000, dim=-3):
            pyro.sample("z", fn)

    with Explore(temperature=2.0, epsilon=0.3):
        trace = poutine.trace(program).get_trace()
    value = trace.nodes["z"]["value"]
    trace.compute_log_prob()
    torch.testing.assert_close(trace.nodes["z"]["log_prob"], trace.nodes["z"]["fn"].log_prob(value))
    torch.testing.assert_close(trace.nodes["z"]["log_prob"].squeeze(), fn.log_prob(value).squeeze())
    base = fn
    while hasattr(base, "base_dist"):
        base = base.base_dist
    probs = base.probs if base.probs.dim() > 1 else torch.stack([1 - base.probs, base.probs], -1)
    flatter = probs.sqrt() / probs.sqrt().sum(-1, keepdim=True)
    wanted = 0.7 * flatter + 0.3 * (probs > 0) / (probs > 0).sum(-1, keepdim=True)
    value = value if isinstance(base, dist.OneHotCategorical) else nn.functional.one_hot(value.long())
    found = value.reshape(4000, *wanted.shape).float().mean(0)
    assert ((found - wanted).abs() <= 4.5 * (wanted * (1 - wanted) / 4000).sqrt()).all()


def test_exploration_leaves_continuous_and_given_sites_alone() -> None:
    loc = torch.zeros((), requires_grad=True)

    def program() -> None:
        pyro.sample("x", dist.Normal(loc, 1.0))
        pyro.sample("y", dist.Bernoulli(0.5), obs=torch.tensor(1.0))

    pyro.set_rng_seed(1)
    plain: Any = poutine.trace(program).get_trace().nodes["x"]["value"]
    pyro.set_rng_seed(1)
    with Explore(2.0, 0.5):
        trace = poutine.trace(program).get_trace()
    drawn = trace.nodes["x"]["value"]
    assert plain.requires_grad
    assert not drawn.requires_grad
    assert drawn.item() == plain.item()
    assert trace.nodes["y"]["value"] == 1.0


def test_a_continuous_site_beside_a_discrete_one_is_fitted_too() -> None:
    """k ~ Bernoulli, x | k ~ Normal, y | x ~ Normal: the posterior is a mixture that the guide can hold."""

    def model() -> None:
        k = pyro.sample("k", dist.Bernoulli(torch.tensor(0.4, dtype=F64)))
        x = pyro.sample("x", dist.Normal(2 * k - 1, 1.0))
        pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(0.6, dtype=F64))

    class Guide(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.logit, self.loc = nn.Parameter(torch.zeros((), dtype=F64)), nn.Parameter(torch.zeros(2, dtype=F64))
            self.scale = PyroParam(torch.ones((), dtype=F64), constraint=constraints.positive)

        def forward(self) -> None:
            k = pyro.sample("k", dist.Bernoulli(logits=self.logit))
            x = dist.TransformedDistribution(
                dist.Normal(torch.zeros((), dtype=F64), 1.0),
                [dist.transforms.AffineTransform(pick(self.loc, k.long()), self.scale, cache_size=1)],
            )
            pyro.sample("x", x)

    result = fit(Problem("mixed", model, Guide(), loss=VarGrad(8)), num_steps=400, lr_decay=0.01)
    params = result.params()
    torch.testing.assert_close(params["loc"], torch.tensor([-0.2, 0.8], dtype=F64), atol=0.01, rtol=0)
    assert float(params["scale"]) == pytest.approx(math.sqrt(0.5), abs=0.01)
    odds = math.log(0.4 / 0.6) + (1.6**2 - 0.4**2) / 4
    assert float(params["logit"]) == pytest.approx(odds, abs=0.02)


# Plates.

DATA = torch.tensor([0.3, -1.2, 2.0, 0.7], dtype=F64)


def rows(y: Tensor = DATA) -> None:
    with pyro.plate("row", len(y)) as i:
        k = pyro.sample("k", dist.Categorical(logits=PRIOR[:2]))
        pyro.sample("y", dist.Normal(2.0 * k - 1.0, 1.0), obs=y[i])


class Rows(PyroModule):
    """Row by row; its log Z is one for each row."""

    def __init__(self) -> None:
        super().__init__()
        self.logits, self.log_z = nn.Parameter(table(4, 2, seed=5)), nn.Parameter(table(4, seed=6))

    def forward(self, y: Tensor = DATA) -> None:
        with pyro.plate("row", len(y)) as i:
            pyro.deterministic("log_Z", self.log_z[i])
            pyro.sample("k", dist.Categorical(logits=self.logits[i]))


def rows_joint() -> Tensor:
    likelihood = dist.Normal(torch.tensor([-1.0, 1.0], dtype=F64), 1.0).log_prob(DATA.unsqueeze(-1))
    return PRIOR[:2].log_softmax(0) + likelihood


@pytest.mark.parametrize("count", [1, 2])
def test_rows_have_a_balance_each_and_minibatches_are_unbiased(count: int) -> None:
    guide, joint = Rows(), rows_joint()
    objective = TrajectoryBalance() if count == 1 else VarGrad(2)
    parameters = list(guide.parameters())
    draws = [torch.tensor(draw) for draw in ([0, 1, 1, 0], [1, 1, 0, 0])[:count]]
    log_q = guide.logits.log_softmax(1)
    heights = torch.stack([(joint - log_q).gather(1, draw.unsqueeze(1)).squeeze(1) for draw in draws])
    by_row = heights.var(0) / 2 if count == 2 else (guide.log_z - heights[0]) ** 2 / 2
    losses, gradients = [], []
    for size in (4, 2):
        batches = [torch.tensor(batch) for batch in itertools.combinations(range(4), size)]
        total: Any = 0.0
        for batch in batches:
            with subsampled({"row": batch}):
                given = Give(*({"k": draw[batch]} for draw in draws))
                total = total + objective.differentiable_loss(rows, given(guide)) / len(batches)
        losses.append(total)
        gradients.append(gradient(total, parameters))
    exact = gradient(by_row.sum(), parameters)
    for loss, found in zip(losses, gradients, strict=True):
        torch.testing.assert_close(loss, by_row.sum(), rtol=1e-12, atol=0)
        for ours, true in zip(found, exact, strict=True):
            torch.testing.assert_close(ours, true, rtol=1e-10, atol=1e-12)


def test_gradients_of_minibatches_are_unbiased_where_some_sites_are_shared() -> None:
    """A global site beside those of rows: one balance for all, whose gradient counts every row once."""
    shift = table(2, seed=7)

    def model() -> None:
        g = pyro.sample("g", dist.Categorical(logits=PRIOR[:2]))
        with pyro.plate("row", 3) as i:
            k = pyro.sample("k", dist.Categorical(logits=NEXT[g]))
            pyro.sample("y", dist.Normal(2 * k.to(F64) + shift[g], 1.0), obs=DATA[i])

    class Guide(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.rows = nn.Parameter(table(2, seed=8)), nn.Parameter(table(3, 2, 2, seed=9))

        def forward(self) -> None:
            g = pyro.sample("g", dist.Categorical(logits=self.first))
            with pyro.plate("row", 3) as i:
                pyro.sample("k", dist.Categorical(logits=self.rows[i, g]))

    guide = Guide()
    objective, parameters = VarGrad(2), list(guide.parameters())
    log_first, log_rows = guide.first.log_softmax(0), guide.rows.log_softmax(-1)
    total: Any = 0.0
    for batch in itertools.combinations(range(3), 2):
        values = list(itertools.product(range(2), repeat=3))
        for draws in itertools.product(values, repeat=2):
            given = Give(*({"g": torch.tensor(g), "k": torch.tensor(k)} for g, *k in draws))
            weight = sum(
                log_first[g] + sum(log_rows[n, g, z] for n, z in zip(batch, k, strict=True)) for g, *k in draws
            )
            with subsampled({"row": torch.tensor(batch)}):
                loss = objective.differentiable_loss(model, given(guide))
            total = total + weight.detach().exp() * loss / 3
    found = gradient(total, parameters)
    likelihood = dist.Normal(2.0 * torch.arange(2) + shift.unsqueeze(1), 1.0).log_prob(DATA[:3].reshape(3, 1, 1))
    of_rows = log_rows.exp() * (log_rows - NEXT[:2].log_softmax(1) - likelihood)  # (row, g, k)
    bound = (log_first.exp() * (log_first - PRIOR[:2].log_softmax(0) + of_rows.sum((0, 2)))).sum()
    for ours, true in zip(found, gradient(bound, parameters), strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-9, atol=1e-12)


def test_minibatches_reach_the_evidence_of_every_row_and_names_stand_for_objectives() -> None:
    problem = Problem("rows", rows, Rows(), args=(DATA,), batch_plates=("row",), loss="TrajectoryBalance")
    result = fit(problem, num_steps=500, batch_size=2, num_particles=4)
    params, joint = result.params(), rows_joint()
    assert (params["log_z"] - joint.logsumexp(1)).abs().max() < 0.02
    assert (params["logits"].softmax(1) - joint.softmax(1)).abs().sum(1).max() / 2 < 0.01


# Many orders of one set.

SIZE, ITEMS = 2, 4
WORTH, TOGETHER = table(ITEMS, seed=10), table(ITEMS, ITEMS, seed=11)


def subset() -> None:
    """Subsets of two of four items, by the worth of items and pairs."""
    x = pyro.sample("x", dist.Bernoulli(logits=torch.zeros(ITEMS, dtype=F64)).to_event(1))
    pyro.factor("worth", x @ WORTH + x @ TOGETHER @ x)


class Builder(PyroModule):
    """Add one item after the other; each of the orders in which a set can be taken apart is as probable."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(2**ITEMS, ITEMS, dtype=F64))
        self.log_z = nn.Parameter(torch.zeros((), dtype=F64))

    def forward(self) -> None:
        pyro.deterministic("log_Z", self.log_z)
        x = torch.zeros(ITEMS, dtype=F64)
        for step in range(SIZE):
            logits = pick(self.logits, (x.long() * 2 ** torch.arange(ITEMS)).sum()).masked_fill(x > 0, -torch.inf)
            item = pyro.sample(f"item_{step}", dist.Categorical(logits=logits), infer={"is_auxiliary": True})
            x = x + (torch.arange(ITEMS) == item)
        orders = torch.tensor(math.factorial(SIZE), dtype=F64)
        pyro.sample("x", dist.Delta(x, log_density=orders.log(), event_dim=1))


@pytest.mark.parametrize("kind", ["TrajectoryBalance", "VarGrad"])
def test_a_set_built_in_any_order_has_the_evidence_over_sets(kind: str) -> None:
    sets = torch.tensor([x for x in itertools.product((0.0, 1.0), repeat=ITEMS) if sum(x) == SIZE], dtype=F64)
    joint = sets @ WORTH + ((sets @ TOGETHER) * sets).sum(1) - ITEMS * math.log(2)
    evidence = joint.logsumexp(0)
    result = fit(Problem("subset", subset, Builder(), loss=ALL[kind](4, epsilon=0.4)), num_steps=400)
    weights = torch.as_tensor(result.tree["sample_stats"]["log_weight"].values)
    assert (weights - evidence).abs().max() < 0.03
    if kind == "TrajectoryBalance":
        assert abs(result.params()["log_z"] - evidence) < 0.01
    logits = result.params()["logits"].masked_fill(
        (torch.arange(16).unsqueeze(1) >> torch.arange(4)) & 1 > 0, -torch.inf
    )
    probs = torch.zeros(len(sets), dtype=F64)
    for order in itertools.permutations(range(ITEMS), SIZE):
        x, log_q = torch.zeros(ITEMS, dtype=F64), 0.0
        for item in order:
            log_q = log_q + logits[int((x * 2 ** torch.arange(ITEMS)).sum())].log_softmax(0)[item]
            x[item] = 1
        probs[(sets == x).all(1)] += math.exp(log_q)
    assert (probs - joint.softmax(0)).abs().sum() / 2 < 0.01


# Rewards of zero, annealed rewards.


def holes() -> None:
    """One of three values, the last of which is impossible."""
    z = pyro.sample("z", dist.Categorical(logits=torch.zeros(3, dtype=F64)))
    pyro.factor("reward", torch.tensor([1.0, 2.0, -torch.inf], dtype=F64)[z])


def three() -> None:
    pyro.sample("z", dist.Categorical(logits=pyro.param("logits", lambda: torch.zeros(3, dtype=F64))))


def test_rewards_of_zero_have_a_floor() -> None:
    """Run by pyro's own SVI, as any ELBO can be."""
    with pytest.raises(ProblemError, match=r"excludes at sites \['reward'\].*floor"):
        VarGrad(16).loss(holes, three)
    svi = SVI(holes, three, pyro.optim.Adam({"lr": 0.1}), loss=VarGrad(8, floor=-15.0, epsilon=0.1))
    for _ in range(400):
        assert math.isfinite(svi.step())
    found = pyro.param("logits").detach().softmax(0)
    exact = torch.tensor([1.0, 2.0, -torch.inf], dtype=F64).softmax(0)
    assert (found - exact).abs().sum() / 2 < 0.01


def test_a_power_of_the_reward_tempers_the_posterior() -> None:
    result = fit(Problem("chain", chain, Tables(), loss=VarGrad(4, reward_power=0.5)), num_steps=400)
    params = result.params()
    found = (params["first"].log_softmax(0).unsqueeze(1) + params["second"].log_softmax(1)).exp()
    assert (found - (0.5 * chain_joint()).flatten().softmax(0).reshape(3, 2)).abs().sum() / 2 < 0.01


def test_an_annealed_power_counts_steps_and_goes_on_from_a_checkpoint(tmp_path: Any) -> None:
    loss = VarGrad(4, reward_power=_rising)
    problem = Problem("chain", chain, Tables(), loss=loss)
    seen: list[Any] = []
    whole = fit(problem, num_steps=40, num_samples=2)
    stopped = partial(fit, problem, num_steps=40, num_samples=2, checkpoint=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        stopped(callbacks=[lambda step: _interrupt(step, seen)])
    again = stopped()
    torch.testing.assert_close(again.params(), whole.params(), rtol=0, atol=0)
    assert loss.step == 0  # a fit works on a copy
    one = VarGrad(4)
    assert one.state_dict() == {}
    guide = Tables()
    loss.loss(chain, guide)
    assert loss.step == 0
    loss.loss_and_grads(chain, guide)
    other = VarGrad(4, reward_power=_rising)
    other.load_state_dict(loss.state_dict())
    assert other.step == 1


def _rising(step: int) -> float:
    return min(1.0, 0.1 + step / 30)


def _interrupt(step: Any, seen: list[Any]) -> None:
    seen.append(step)
    if len(seen) == 15:
        os.kill(os.getpid(), signal.SIGINT)


# The engines.


@pytest.mark.parametrize("kind", ALL)
def test_a_graph_gives_the_numbers_of_the_program(kind: str) -> None:
    problem = Problem("chain", chain, Tables(), loss=ALL[kind](4, temperature=1.5, epsilon=0.1))
    eager, graph = (fit(problem, num_steps=20, num_samples=2, compile=how) for how in ("eager", "graph"))
    assert graph.tree.attrs["execution"] == "graph"
    torch.testing.assert_close(eager.params(), graph.params(), rtol=1e-9, atol=1e-12)


def test_a_power_that_changes_is_not_captured() -> None:
    problem = Problem("chain", chain, Tables(), loss=VarGrad(2, reward_power=_rising))
    execution = fit(problem, num_steps=5, num_samples=2, compile="graph").tree.attrs["execution"]
    assert execution.startswith("eager: VarGrad computes its gradient by methods of its own")


def points() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    left = torch.rand(60, generator=generator) < 0.3
    return (torch.where(left, -1.5, 1.0) + 0.7 * torch.randn(60, generator=generator)).to(F64)


def mixture(x: Tensor) -> None:
    weights = pyro.param("weights", lambda: torch.full((2,), 0.5, dtype=F64), constraint=constraints.simplex)
    means = pyro.param("means", lambda: torch.tensor([-0.5, 0.5], dtype=F64))
    with pyro.plate("row", len(x)) as i:
        k = pyro.sample("k", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(means[k], 0.7), obs=x[i])


class Assignment(PyroModule):
    """The posterior of a component is logistic in x, so that this guide can hold it."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Parameter(torch.tensor([0.0, 0.5], dtype=F64))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("row", len(x)) as i:
            pyro.sample("k", dist.Categorical(logits=torch.stack([0 * x[i], self.line[0] + self.line[1] * x[i]], -1)))


def log_likelihood(x: Tensor, weights: Tensor, means: Tensor) -> Tensor:
    """(components, rows) before the sum over components."""
    return weights.log().unsqueeze(1) + dist.Normal(means.unsqueeze(1), 0.7).log_prob(x)


def test_em_by_balance_reaches_the_likelihood_of_exact_em() -> None:
    x = points()
    weights, means = torch.full((2,), 0.5, dtype=F64), torch.tensor([-0.5, 0.5], dtype=F64)
    for _ in range(200):
        belief = log_likelihood(x, weights, means).softmax(0)
        weights, means = belief.mean(1), (belief @ x) / belief.sum(1)
    best = log_likelihood(x, weights, means).logsumexp(0).mean()
    phases = [
        Phase(VarGrad(4), moves="guide", lr=0.05),
        Phase("wake", num_particles=4, lr=0.05, schedule=lambda step: 0.02 ** (step / 300)),
    ]
    problem = Problem("mixture", mixture, Assignment(), args=(x,), batch_plates=("row",))
    result = fit_em(problem, phases=phases, num_rounds=300, num_samples=5, progress=False)
    params = result.params()
    found = log_likelihood(x, params["weights"], params["means"])
    assert best - found.logsumexp(0).mean() < 0.002
    belief = torch.stack([0 * x, params["line"][0] + params["line"][1] * x]).softmax(0)
    assert (belief - found.softmax(0)).abs().sum(0).mean() / 2 < 0.03
    assert result.tree.attrs["execution"] == "VarGrad: graph; wake: graph"


def test_balance_leaves_the_parameters_of_the_model() -> None:
    x = points()
    problem = Problem("mixture", mixture, Assignment(), args=(x,), loss="VarGrad")
    params = fit(problem, num_steps=10, num_samples=2).params()
    torch.testing.assert_close(params["means"], torch.tensor([-0.5, 0.5], dtype=F64), rtol=0, atol=0)
    assert params["line"][0] != 0.0


# What is refused.


def without(name: str) -> Any:
    return poutine.block(Tables(), hide=[name])


def plain_guide(**flows: Any) -> Any:
    """Guide of the chain with deterministic sites as given, before b."""

    def guide() -> None:
        logits = pyro.param("logits", lambda: torch.zeros(3, dtype=F64))
        pyro.deterministic("log_flow_a", logits.sum())
        a = pyro.sample("a", dist.Categorical(logits=logits))
        for name, value in flows.items():
            pyro.deterministic(name, value(logits))
        pyro.sample("b", dist.Categorical(logits=logits[:2] * a))

    return guide


@pytest.mark.parametrize(
    ("objective", "guide", "message"),
    [
        (TrajectoryBalance(), lambda: without("log_Z"), r"no site 'log_Z'; add pyro.deterministic\('log_Z', value\)"),
        (DetailedBalance(), lambda: without("log_flow_a"), r"no flow before its first site.*'log_flow_a'"),
        (VarGrad(), lambda: without("b"), "does not sample 'b'"),
        (TrajectoryBalance(), lambda: plain_guide(log_Z=lambda p: p.detach().sum()), "'log_Z' .* no parameter"),
        (TrajectoryBalance(), lambda: plain_guide(log_Z=lambda p: nn.Parameter(p.sum())), "'log_Z' .* no parameter"),
        (TrajectoryBalance(), lambda: plain_guide(log_Z=lambda p: p), r"shape \(3,\); give it shape \(\)"),
        (DetailedBalance(), lambda: plain_guide(log_flow_c=lambda p: p.sum()), "'log_flow_c' .* stands before 'b'"),
        (DetailedBalance(), lambda: plain_guide(log_flow_b=lambda p: torch.ones(())), "'log_flow_b' .* no parameter"),
    ],
)
def test_guides_that_do_not_fit_are_refused_with_a_remedy(objective: Any, guide: Any, message: str) -> None:
    with pytest.raises(ProblemError, match=message):
        objective.loss(chain, guide())


def test_engines_refuse_before_the_first_step() -> None:
    guide = plain_guide(log_Z=lambda p: p.detach().sum())
    with pytest.raises(ProblemError, match="depends on no parameter"):
        fit(Problem("chain", chain, guide, loss=TrajectoryBalance()), num_steps=5)
    with pytest.raises(ProblemError, match="num_particles=1; it needs 2"):
        fit(Problem("chain", chain, guide, loss="VarGrad"), num_steps=5, num_particles=1)
    with pytest.raises(ProblemError, match="did you mean 'VarGrad'"):
        fit(Problem("chain", chain, guide, loss="VarGard"), num_steps=5)


@pytest.mark.parametrize(
    "options",
    [
        {"num_particles": 1},
        {"temperature": 0.0},
        {"epsilon": 1.5},
        {"reward_power": 0.0},
        {"floor": -math.inf},
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ProblemError, match=next(iter(options))):
        VarGrad(**options)


def test_names_give_objectives_and_other_losses_stay() -> None:
    problem = Problem("chain", chain, Tables(), loss="SubTrajectoryBalance")
    loss = make_loss(problem, 3)
    assert type(loss) is SubTrajectoryBalance
    assert loss.num_particles == 3
    assert callable(objective_of(loss))
    assert not hasattr(objective_of(loss), "loss_and_grads")
    with pytest.raises(ProblemError, match="decay"):
        SubTrajectoryBalance(decay=-1.0)
