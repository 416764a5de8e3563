"""Back and forth against enumeration: the objective, the moves, the kernel, and draws refined before a model learns."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.nn import PyroModule
from scipy.stats import chi2
from torch import Tensor, nn

from probmodels.errors import ProblemError
from probmodels.inference import BackAndForth, Problem, fit_em, fit_svi, guided_kernel, run_mcmc
from probmodels.inference.flows import back_and_forth
from probmodels.inference.flows.back_and_forth import refined
from probmodels.inference.flows.exploration import Recall, count_steps, drawn
from probmodels.inference.mcmc.workers import pack
from probmodels.inference.programs.traces import scored
from probmodels.inference.variational.losses import Sleep, wake

F64 = torch.float64
ROWS = 4000


def table(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


@pytest.fixture(autouse=True)
def _own_parameters() -> Any:
    with pyro.get_param_store().scope():
        pyro.set_rng_seed(0)
        yield


# Three sites of 2, 3 and 2 values in a row each, all rows with the same datum.

SIZES = (2, 3, 2)
FIRST, SECOND, THIRD, SCORE = table(2, seed=1), table(2, 3, seed=2), table(3, 2, seed=3), table(2, 3, 2, seed=4)
VALUES = list(itertools.product(*(range(size) for size in SIZES)))


def chains(x: Tensor) -> None:
    """a, b | a, c | b, and a datum of Bernoulli by all three, in every row."""
    with pyro.plate("row", len(x)) as i:
        a = pyro.sample("a", dist.Categorical(logits=FIRST))
        b = pyro.sample("b", dist.Categorical(logits=SECOND[a]))
        c = pyro.sample("c", dist.Categorical(logits=THIRD[b]))
        pyro.sample("x", dist.Bernoulli(logits=3 * SCORE[a, b, c]), obs=x[i])


def log_posterior() -> Tensor:
    """log p(a, b, c | x = 1) (2, 3, 2)."""
    likelihood = torch.nn.functional.logsigmoid(3 * SCORE)
    prior = FIRST.log_softmax(0)[:, None, None] + SECOND.log_softmax(1)[:, :, None] + THIRD.log_softmax(1)
    joint = prior + likelihood
    return joint - joint.logsumexp((0, 1, 2))


class Tables(PyroModule):
    """Any distribution of a, b and c, the same in all rows."""

    def __init__(self, seed: int = 5) -> None:
        super().__init__()
        first, second, third = table(2, seed=seed), table(2, 3, seed=seed + 1), table(2, 3, 2, seed=seed + 2)
        self.first, self.second = nn.Parameter(first / 2), nn.Parameter(second / 2)
        self.third = nn.Parameter(third / 2)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("row", len(x)):
            a = pyro.sample("a", dist.Categorical(logits=self.first))
            b = pyro.sample("b", dist.Categorical(logits=self.second[a]))
            pyro.sample("c", dist.Categorical(logits=self.third[a, b]))

    def logs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Conditional log probabilities."""
        return self.first.log_softmax(0), self.second.log_softmax(1), self.third.log_softmax(2)


def exact() -> Tables:
    """The guide that is the posterior."""
    guide, log_p = Tables(), log_posterior()
    guide.first.data, guide.second.data, guide.third.data = log_p.logsumexp((1, 2)), log_p.logsumexp(2), log_p.clone()
    return guide


def counts(values: dict[str, Tensor]) -> Tensor:
    """How often each of the twelve values comes."""
    index = (values["a"] * 3 + values["b"]) * 2 + values["c"]
    return torch.bincount(index.flatten(), minlength=12).to(F64)


def p_value(found: Tensor, probs: Tensor) -> float:
    """p-value of a chi-square test of independent counts."""
    wanted = probs.detach().flatten() * found.sum()
    return float(chi2.sf(float(((found - wanted).square() / wanted).sum()), len(found) - 1))


def values_of(trace: Any) -> dict[str, Tensor]:
    return {name: trace.nodes[name]["value"] for name in "abc"}


# The objective.


def test_it_vanishes_at_the_posterior_whatever_is_kept() -> None:
    guide, x = exact(), torch.ones(50, dtype=F64)
    objective = BackAndForth(3, temperature=2.0, epsilon=0.3)
    loss = objective.differentiable_loss(chains, guide, x)
    gradients = torch.autograd.grad(loss, list(guide.parameters()))
    assert loss.item() < 1e-20
    assert all(part.abs().max() < 1e-9 for part in gradients)
    guide.third.data[0, 0, 0] += 0.1
    assert objective.differentiable_loss(chains, guide, x).item() > 1e-5


def test_its_gradient_is_that_of_the_divergence_of_what_is_drawn_anew() -> None:
    guide, x, repeats = Tables(), torch.ones(200, dtype=F64), 150
    parameters = list(guide.parameters())
    first, second, third = guide.logs()
    log_p = log_posterior()
    log_q = first[:, None, None] + second[:, :, None] + third
    whole = (log_q.exp() * (log_q - log_p)).sum()
    tail_q, tail_p = second[:, :, None] + third, log_p - log_p.logsumexp((1, 2), keepdim=True)
    middle = (first.detach().exp() * (tail_q.exp() * (tail_q - tail_p)).sum((1, 2))).sum()
    last = third.exp() * (third - log_p + log_p.logsumexp(2, keepdim=True))
    head = (first[:, None] + second).detach().exp()
    target = (whole + middle + (head * last.sum(2)).sum()) / 3
    wanted = torch.cat([part.flatten() for part in torch.autograd.grad(target, parameters, retain_graph=True)])
    objective, found = BackAndForth(3), []
    for _ in range(repeats):
        loss = objective.differentiable_loss(chains, guide, x) / len(x)
        found.append(torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters)]))
    mean, error = torch.stack(found).mean(0), torch.stack(found).std(0) / math.sqrt(repeats)
    assert ((mean - wanted).abs() < 4 * error).all()
    plain = torch.cat([part.flatten() for part in torch.autograd.grad(whole, parameters)])
    assert ((mean - plain).abs() > 4 * error).any()  # it is not that of the divergence of all steps


@pytest.mark.parametrize("loss", ["BackAndForth", BackAndForth(4, epsilon=0.1)])
def test_a_fit_by_it_finds_the_posterior(loss: Any) -> None:
    problem = Problem("chains", chains, Tables(), args=(torch.ones(30, dtype=F64),), loss=loss)
    result = fit_svi(problem, num_steps=400, lr=0.1, lr_decay=0.05, num_samples=5, progress=False, compile="graph")
    assert result.tree.attrs["execution"] == "graph"
    params = result.params()
    log_q = params["first"].log_softmax(0)[:, None, None] + params["second"].log_softmax(1)[:, :, None]
    log_q = log_q + params["third"].log_softmax(2)
    assert (log_q.exp() - log_posterior().exp()).abs().sum() / 2 < 0.02


# Moves.


def test_what_is_kept_is_kept_row_by_row_and_the_rest_is_drawn_given_it() -> None:
    guide, x = Tables(), torch.ones(ROWS, dtype=F64)
    past = drawn(guide, (x,), {})
    kept = torch.arange(ROWS) % 3
    assert count_steps(past) == 3
    with Recall(past, kept):
        trace: Any = poutine.trace(guide).get_trace(x)
    before, after = values_of(past), values_of(trace)
    for step, name in enumerate("abc"):
        same = before[name] == after[name]
        assert same[kept > step].all()
        assert not same[kept <= step].all()
    # c given the b that was kept, in rows that keep two steps
    _, _, third = guide.logs()
    rows = (kept == 2) & (after["a"] == 1) & (after["b"] == 2)
    found = torch.bincount(after["c"][rows], minlength=2).to(F64)
    assert p_value(found, third[1, 2].exp()) > 1e-3


def moved(start: Any, guide: Any, num_moves: int) -> dict[str, Tensor]:
    x = torch.ones(ROWS, dtype=F64)
    draw = scored(guide, drawn(start, (x,), {}), (x,), {})
    return values_of(refined(chains, guide, draw, num_moves, (x,), {}))


def test_moves_leave_the_posterior_invariant() -> None:
    """Rows start from the posterior, and moves propose from a guide that is not the posterior."""
    assert p_value(counts(moved(exact(), Tables(), 1)), log_posterior().exp()) > 1e-3
    assert p_value(counts(moved(exact(), Tables(8), 3)), log_posterior().exp()) > 1e-3
    start = torch.ones(ROWS, dtype=F64)
    assert p_value(counts(values_of(drawn(Tables(), (start,), {}))), log_posterior().exp()) < 1e-6


def test_moves_lead_from_the_guide_to_the_posterior() -> None:
    assert p_value(counts(moved(Tables(), Tables(), 40)), log_posterior().exp()) > 1e-3


@pytest.mark.parametrize("fault", ["no proposal density", "no model", "all taken"])
def test_a_wrong_ratio_is_found_out(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = back_and_forth._evaluated

    def wrong(*arguments: Any) -> Any:
        state = right(*arguments)
        weights = {
            "no proposal density": state.log_p,
            "no model": state.log_weight - state.log_p,
            "all taken": torch.zeros_like(state.log_weight),
        }
        return replace(state, log_weight=weights[fault])

    monkeypatch.setattr(back_and_forth, "_evaluated", wrong)
    assert p_value(counts(moved(exact(), Tables(), 3)), log_posterior().exp()) < 1e-6


def test_joint_data_are_moved_as_one() -> None:
    """Without a plate around all sites there is one acceptance for them."""

    def model() -> None:
        a = pyro.sample("a", dist.Categorical(logits=FIRST))
        with pyro.plate("leaf", 2):
            b = pyro.sample("b", dist.Categorical(logits=SECOND[a]))
            pyro.sample("x", dist.Bernoulli(logits=SECOND[a, b]), obs=torch.ones(2, dtype=F64))

    def guide() -> None:
        a = pyro.sample("a", dist.Categorical(logits=torch.zeros(2, dtype=F64)))
        with pyro.plate("leaf", 2):
            pyro.sample("b", dist.Categorical(logits=a * torch.ones(3, dtype=F64)))

    problem = Problem("joint", model, guide)
    result = run_mcmc(
        problem,
        kernel=guided_kernel(problem),
        num_samples=1500,
        warmup_steps=20,
        num_chains=1,
        progress=False,
        chain_method="sequential",
    )
    log_b = SECOND.log_softmax(1) + torch.nn.functional.logsigmoid(SECOND)
    exact_a = (FIRST.log_softmax(0) + 2 * log_b.logsumexp(1)).softmax(0)[1]
    batches = (result.posterior["a"].values == 1).reshape(30, 50).mean(1)
    assert abs(batches.mean() - exact_a) < 4 * batches.std(ddof=1) / math.sqrt(30)
    assert 0.1 < float(result.tree["sample_stats"]["acceptance_rate"].mean()) < 0.95
    assert set(np.unique(result.tree["sample_stats"]["acceptance_rate"].values)) == {0.0, 1.0}


class Word(dist.TorchDistribution):
    """Three letters of an alphabet of two, each given the one before: one site of three steps."""

    has_enumerate_support = False
    num_steps = 3
    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 -- as torch declares it

    def __init__(self, logits: Tensor, rows: int) -> None:
        self.logits = logits  # (3, 2 before, 2)
        super().__init__(torch.Size([rows]), torch.Size([3]), validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Word:
        return Word(self.logits, batch_shape[0])

    def explored(self, temperature: float, epsilon: float) -> Word:
        assert (temperature, epsilon) == (1.0, 0.0)
        return self

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008 -- torch's own signature
        return self.completed(torch.zeros(*self.batch_shape, 3, dtype=torch.long), torch.tensor(0))

    def completed(self, value: Tensor, kept: Tensor) -> Tensor:
        letters, before = [], torch.zeros(self.batch_shape, dtype=torch.long)
        for step in range(3):
            fresh = dist.Categorical(logits=self.logits[step, before]).sample()
            before = torch.where(kept > step, value[..., step], fresh)
            letters.append(before)
        return torch.stack(letters, -1)

    def log_prob(self, value: Tensor) -> Tensor:
        before = torch.cat([torch.zeros_like(value[..., :1]), value[..., :-1]], -1)
        logs = self.logits.log_softmax(-1)
        return torch.stack([logs[step, before[..., step], value[..., step]] for step in range(3)]).sum(0)


def test_a_site_of_several_steps_forgets_some_of_them() -> None:
    spelling, other = table(3, 2, 2, seed=9), table(3, 2, 2, seed=10)
    word = torch.arange(3)

    def model(x: Tensor) -> None:
        with pyro.plate("row", len(x)) as i:
            z = pyro.sample("z", Word(spelling, len(x)))
            pyro.sample("x", dist.Bernoulli(logits=(2.0 * z * word).sum(-1) - 3.0), obs=x[i])

    def guide(x: Tensor) -> None:
        with pyro.plate("row", len(x)):
            pyro.sample("z", Word(other, len(x)))

    x = torch.ones(ROWS, dtype=F64)
    past = drawn(guide, (x,), {})
    assert count_steps(past) == 3
    kept = torch.arange(ROWS) % 3
    with Recall(past, kept):
        trace: Any = poutine.trace(guide).get_trace(x)
    same = past.nodes["z"]["value"] == trace.nodes["z"]["value"]
    assert [bool(same[kept == k, :k].all()) for k in range(3)] == [True] * 3
    assert not any(same[kept == k, step].all() for k in range(3) for step in range(k, 3))
    words = torch.tensor(list(itertools.product(range(2), repeat=3)))
    joint = Word(spelling, 8).log_prob(words) + torch.nn.functional.logsigmoid((2.0 * words * word).sum(-1) - 3.0)
    found = refined(model, guide, past, 40, (x,), {}).nodes["z"]["value"]
    assert (
        p_value(torch.bincount((found * torch.tensor([4, 2, 1])).sum(-1), minlength=8).to(F64), joint.softmax(0)) > 1e-3
    )


# A guide with two paths to each value.

PAIR = table(2, 2, seed=11)


def pair(y: Tensor) -> None:
    """Two bits that depend on each other, seen through noise."""
    with pyro.plate("row", len(y)) as i:
        z = pyro.sample("z", dist.Categorical(logits=PAIR.flatten()))
        pyro.sample("y", dist.Bernoulli(torch.tensor([0.9, 0.2, 0.4, 0.7], dtype=F64)[z]), obs=y[i])


class Orders(PyroModule):
    """Draws the two bits in one of two orders; given the bits, each order is as probable."""

    def __init__(self) -> None:
        super().__init__()
        self.which = nn.Parameter(torch.tensor([0.5, -0.5], dtype=F64))
        self.first, self.second = (
            nn.Parameter(table(2, 2, 2, seed=12) / 2),
            nn.Parameter(table(2, 2, 2, 2, seed=13) / 2),
        )

    def forward(self, y: Tensor) -> None:
        hidden = {"is_auxiliary": True}
        with pyro.plate("row", len(y)) as i:
            seen = y[i].long()
            order = pyro.sample("order", dist.Categorical(logits=self.which), infer=hidden)
            one = pyro.sample("one", dist.Categorical(logits=self.first[seen, order]), infer=hidden)
            two = pyro.sample("two", dist.Categorical(logits=self.second[seen, order, one]), infer=hidden)
            z = torch.where(order == 0, 2 * one + two, 2 * two + one)
            pyro.sample("z", dist.Delta(z, log_density=torch.full((), math.log(2), dtype=F64)))

    def retrace(self, values: dict[str, Tensor], y: Tensor) -> dict[str, Tensor]:
        """The bits in an order of their own."""
        order = torch.randint(2, values["z"].shape)
        high, low = values["z"] // 2, values["z"] % 2
        return {"order": order, "one": torch.where(order == 0, high, low), "two": torch.where(order == 0, low, high)}


def pair_posterior() -> Tensor:
    likelihood = torch.tensor([[0.1, 0.8, 0.6, 0.3], [0.9, 0.2, 0.4, 0.7]], dtype=F64)
    return (PAIR.flatten().softmax(0) * likelihood) / (PAIR.flatten().softmax(0) * likelihood).sum(1, keepdim=True)


@pytest.mark.parametrize("retraced", [True, False])
def test_moves_with_auxiliary_sites_lead_to_the_posterior(retraced: bool) -> None:
    guide: Any = Orders() if retraced else poutine.block(Orders(), hide=[])
    assert hasattr(guide, "retrace") == retraced
    y = torch.ones(ROWS, dtype=F64)
    past = drawn(guide, (y,), {})
    assert count_steps(past) == 3
    found = refined(pair, guide, past, 30, (y,), {}).nodes["z"]["value"]
    assert p_value(torch.bincount(found, minlength=4).to(F64), pair_posterior()[1]) > 1e-3


def orders_log_q(params: Any) -> Tensor:
    """q(z | y) (2, 4), summed over orders."""
    order, first, second = (params[name].log_softmax(-1) for name in ("which", "first", "second"))
    found = torch.zeros(2, 4, dtype=F64)
    for seen, z, o in itertools.product(range(2), range(4), range(2)):
        one, two = ((z // 2, z % 2), (z % 2, z // 2))[o]
        found[seen, z] += (order[o] + first[seen, o, one] + second[seen, o, one, two]).exp()
    return found


@pytest.mark.parametrize("objective", ["BackAndForth", "sleep"])
def test_guides_with_a_backward_policy_learn_back_and_forth_and_asleep(objective: str) -> None:
    y = torch.tensor([0.0, 1.0] * 50, dtype=F64)
    problem = Problem("pair", pair, Orders(), args=(y,))
    options = {"schedule": lambda step: 0.02 ** (step / 400)}
    result = fit_em(
        problem,
        phases=[{"objective": objective, "num_particles": 4, **options}],
        num_rounds=400,
        lr=0.1,
        num_samples=5,
        progress=False,
    )
    assert result.tree.attrs["execution"] == "graph"
    assert ((orders_log_q(result.params()) - pair_posterior()).abs().sum(1) / 2 < 0.04).all()


def test_dreams_need_the_backward_policy() -> None:
    y = torch.ones(4, dtype=F64)
    with pytest.raises(ProblemError, match=r"auxiliary sites \['order', 'one', 'two'\]"):
        Sleep(Problem("pair", pair, Orders(), args=(y,)))(pair, poutine.block(Orders(), hide=[]), y)


# The kernel.


def counted(x: Tensor) -> None:
    """One row of the chains, with a parameter and what follows from it."""
    scale = pyro.param("scale", lambda: torch.tensor(1.0, dtype=F64))
    with pyro.plate("row", len(x)) as i:
        a = pyro.sample("a", dist.Categorical(logits=FIRST))
        b = pyro.sample("b", dist.Categorical(logits=SECOND[a]))
        c = pyro.sample("c", dist.Categorical(logits=THIRD[b]))
        pyro.deterministic("size", scale * (a + b + c))
        pyro.sample("x", dist.Bernoulli(logits=scale * SCORE[a, b, c]), obs=x[i])


def test_chains_of_run_mcmc_follow_the_posterior() -> None:
    problem = Problem("chains", chains, Tables(), args=(torch.ones(40, dtype=F64),))
    maker = guided_kernel(problem)
    result = run_mcmc(
        problem,
        kernel=maker,
        num_samples=50,
        warmup_steps=20,
        num_chains=2,
        thin=10,
        progress=False,
        chain_method="sequential",
    )
    values = {name: torch.as_tensor(result.posterior[name].values) for name in "abc"}
    assert p_value(counts(values), log_posterior().exp()) > 1e-3  # 4000 nearly independent draws
    stats = result.tree["sample_stats"]
    rate = stats["acceptance_rate"].values
    assert 0.2 < rate.mean() < 0.9
    assert stats.attrs["guide_steps"] == 3
    assert result.tree.attrs["kernel"] == "BackAndForthKernel"
    last = {name: torch.as_tensor(result.posterior[name].values[0, -1]) for name in "abc"}
    trace: Any = poutine.trace(poutine.condition(chains, data=last)).get_trace(*problem.args)
    assert float(stats["lp"][0, -1]) == pytest.approx(float(trace.log_prob_sum()))
    assert pack(problem, maker)  # processes can run it


def test_a_chain_goes_on_where_it_stopped(tmp_path: Any) -> None:
    problem = Problem("chains", chains, Tables(), args=(torch.ones(3, dtype=F64),))
    run = partial(
        run_mcmc,
        problem,
        kernel=guided_kernel(problem),
        warmup_steps=3,
        num_chains=1,
        progress=False,
        chain_method="sequential",
    )
    whole = run(num_samples=30)
    run(num_samples=12, checkpoint=tmp_path)
    assert run(num_samples=30, checkpoint=tmp_path).posterior.identical(whole.posterior)


def test_fitted_parameters_of_model_and_guide_are_those_of_the_chain() -> None:
    problem = Problem("counted", counted, Tables(), args=(torch.ones(20, dtype=F64),), loss="VarGrad")
    fitted = fit_em(problem, phases=("e_step", "wake"), num_rounds=40, lr=0.1, num_samples=5, progress=False)
    scale = float(fitted.params()["scale"])
    assert abs(scale - 1) > 0.1
    run = partial(run_mcmc, num_samples=20, warmup_steps=5, num_chains=1, progress=False, chain_method="sequential")
    result = run(problem, kernel=guided_kernel(problem, fitted))
    total = sum(result.posterior[name] for name in "abc")
    np.testing.assert_allclose(result.posterior["size"], scale * total)
    first = run(problem, kernel=guided_kernel(problem))
    np.testing.assert_allclose(first.posterior["size"], sum(first.posterior[name] for name in "abc"))
    better = result.tree["sample_stats"]["acceptance_rate"].mean()
    assert better > first.tree["sample_stats"]["acceptance_rate"].mean()


def test_what_has_no_start_or_no_guide_is_refused() -> None:
    x = torch.ones(2, dtype=F64)

    def program(x: Tensor, last: float) -> None:
        with pyro.plate("row", len(x)):
            pyro.sample(
                "a", dist.Categorical(logits=torch.tensor([0.0, last] if last < 0 else [-last, 0.0], dtype=F64))
            )

    problem = Problem("none", partial(program, last=-torch.inf), partial(program, last=torch.inf), args=(x,))
    with pytest.raises(ProblemError, match="none of 100 draws of the guide has a finite density"):
        run_mcmc(problem, kernel=guided_kernel(problem), num_chains=1, chain_method="sequential", progress=False)
    with pytest.raises(ProblemError, match="no guide to go back and forth by"):
        guided_kernel(Problem("bare", chains, args=(x,)))
    problem = Problem("chains", chains, Tables(), args=(x,))
    drawn_once = run_mcmc(
        problem,
        kernel=guided_kernel(problem),
        num_samples=2,
        warmup_steps=0,
        num_chains=1,
        progress=False,
        chain_method="sequential",
    )
    with pytest.raises(ProblemError, match="holds no fitted guide"):
        guided_kernel(problem, drawn_once)


# Refined draws for a model.


def learner(x: Tensor) -> None:
    """The chains with a parameter of the first site."""
    logit = pyro.param("logit", lambda: FIRST.clone())
    with pyro.plate("row", len(x)) as i:
        a = pyro.sample("a", dist.Categorical(logits=logit))
        b = pyro.sample("b", dist.Categorical(logits=SECOND[a]))
        c = pyro.sample("c", dist.Categorical(logits=THIRD[b]))
        pyro.sample("x", dist.Bernoulli(logits=3 * SCORE[a, b, c]), obs=x[i])


def test_a_model_learns_from_refined_draws_as_from_the_posterior() -> None:
    """The gradient of -log p(x), by any guide."""
    x, guide, repeats = torch.ones(2000, dtype=F64), Tables(), 12
    wanted = FIRST.softmax(0) - log_posterior().logsumexp((1, 2)).exp()
    found: dict[int, Tensor] = {}
    error: dict[int, Tensor] = {}
    for refine in (0, 30):
        objective, gradients = wake(1, "equal", refine), []
        for _ in range(repeats):
            loss = objective(learner, guide, x) / len(x)
            (gradient,) = torch.autograd.grad(loss, [pyro.param("logit").unconstrained()])
            gradients.append(gradient)
        found[refine] = torch.stack(gradients).mean(0)
        error[refine] = torch.stack(gradients).std(0) / math.sqrt(repeats)
    assert ((found[30] - wanted).abs() < 4 * error[30]).all()
    assert ((found[0] - wanted).abs() > 10 * error[0]).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "some"}, "weights='some'; choose one of equal"),
        ({"weights": "importance", "refine": 2}, "does not go with refine=2; choose 'equal' or 'best'"),
        ({"refine": -1}, "refine=-1; give a whole number of at least 0"),
        ({"refine": 1.5}, "refine=1.5; give a whole number"),
    ],
)
def test_options_of_wake_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ProblemError, match=message):
        wake(2, **options)
