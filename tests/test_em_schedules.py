"""fit_em over its rounds: powers of the reward, thresholds, weights of added objectives, and steps of both at once."""

from __future__ import annotations

import math
import tomllib
from functools import partial
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.nn import PyroModule
from torch import Tensor, nn

from probmodels.errors import CheckpointError, ProblemError
from probmodels.inference import Phase, Problem, VarGrad, fit_em, fit_svi
from probmodels.inference.flows.balance import TrajectoryBalance, model_loss
from probmodels.inference.variational.em import make_course
from probmodels.inference.variational.losses import Composite, make_loss, objective_of, wake_phi

F64 = torch.float64
quick = partial(fit_em, num_rounds=10, num_samples=5, progress=False)


def table(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


@pytest.fixture(autouse=True)
def _own_parameters() -> Any:
    with pyro.get_param_store().scope():
        pyro.set_rng_seed(0)
        yield


# Two sites of 2 and 3 values in every row; the model has a parameter.

FIRST, SECOND, SCORE = table(2, seed=1), table(2, 3, seed=2), table(2, 3, seed=3)


def model(x: Tensor) -> None:
    logit = pyro.param("logit", lambda: FIRST.clone())
    with pyro.plate("row", len(x)) as i:
        a = pyro.sample("a", dist.Categorical(logits=logit))
        b = pyro.sample("b", dist.Categorical(logits=SECOND[a]))
        pyro.sample("x", dist.Bernoulli(logits=2 * SCORE[a, b]), obs=x[i])


def log_joint(x: float = 1.0) -> Tensor:
    """log p(a, b, x) (2, 3)."""
    likelihood = torch.nn.functional.logsigmoid((2 * x - 1) * 2 * SCORE)
    return FIRST.log_softmax(0)[:, None] + SECOND.log_softmax(1) + likelihood


class Guide(PyroModule):
    """Any distribution of a and b for each value of x."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(table(2, 2, seed=4)), nn.Parameter(table(2, 2, 3, seed=5))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("row", len(x)) as i:
            seen = x[i].long()
            a = pyro.sample("a", dist.Categorical(logits=self.first[seen]))
            pyro.sample("b", dist.Categorical(logits=self.second[seen, a]))

    def log_q(self, x: int = 1) -> Tensor:
        return self.first[x].log_softmax(0)[:, None] + self.second[x].log_softmax(1)


def problem(rows: int = 40, **changes: Any) -> Problem:
    x = (torch.arange(rows) % 4 > 0).to(F64)
    return Problem("pairs", model, Guide(), args=(x,), batch_plates=("row",), **changes)


def distance(params: Any, power: float = 1.0) -> float:
    """Largest total variation distance from the posterior of a power of the joint density."""
    guide = Guide()
    guide.first.data, guide.second.data = params["first"], params["second"]
    found = [
        (guide.log_q(x).exp() - (power * log_joint(x)).flatten().softmax(0).reshape(2, 3)).abs().sum() / 2
        for x in (0, 1)
    ]
    return max(float(part.detach()) for part in found)


# Courses.


def test_courses_reach_their_end_in_equal_steps() -> None:
    rising = make_course("power", {"start": 0.4, "over": 0.6}, 10, end=1.0)
    np.testing.assert_allclose([rising(r) for r in range(10)], [0.4, 0.52, 0.64, 0.76, 0.88, *[1.0] * 5])
    falling = make_course("until", {"start": 6, "end": 3}, 4)
    np.testing.assert_allclose([falling(r) for r in range(6)], [6, 5, 4, 3, 3, 3])
    assert [make_course("w", 0.5, 10)(r) for r in (0, 9)] == [0.5, 0.5]
    assert make_course("w", {"start": 1.0, "end": 0.0}, 1)(0) == 1.0
    assert make_course("w", lambda r: r**2, 10)(3) == 9


# Powers of the reward.


@pytest.mark.parametrize("kind", ["VarGrad", "Trace_ELBO", "wake_phi"])
def test_gradients_are_those_of_the_tempered_posterior(kind: str) -> None:
    guide, x, power, repeats = Guide(), torch.ones(300, dtype=F64), 0.5, 40
    parts = {
        "VarGrad": lambda: objective_of(VarGrad(3)),
        "Trace_ELBO": lambda: objective_of(Trace_ELBO()),
        "wake_phi": lambda: wake_phi(60),
    }
    objective = Composite({kind: parts[kind]()}, [kind]).at({"reward_power": power})
    parameters, log_q = list(guide.parameters()), guide.log_q()
    if kind == "wake_phi":
        target = -((power * log_joint()).flatten().softmax(0).reshape(2, 3) * log_q).sum()
    else:
        target = (log_q.exp() * (log_q - power * log_joint())).sum()
    wanted = torch.cat([part.flatten() for part in torch.autograd.grad(target, parameters)])
    found = []
    for _ in range(5 if kind == "wake_phi" else repeats):
        loss = objective(model, guide, x) / len(x)
        found.append(torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters)]))
    mean, error = torch.stack(found).mean(0), torch.stack(found).std(0) / math.sqrt(len(found))
    bias = 0.02 if kind == "wake_phi" else 1e-9  # self-normalised weights of 60 draws
    assert ((mean - wanted).abs() < 4 * error + bias).all()


def test_a_power_tempers_what_the_guide_learns_and_ends_at_one() -> None:
    options = {"num_rounds": 300, "lr": 0.1}
    phases = [Phase("VarGrad", schedule=lambda step: 0.03 ** (step / 300))]
    half = quick(problem(), phases=phases, reward_power=0.5, **options)
    assert distance(half.params(), 0.5) < 0.02 < distance(half.params())
    risen = quick(problem(), phases=phases, reward_power={"start": 0.2, "over": 0.5}, compile="graph", **options)
    assert distance(risen.params()) < 0.02
    assert risen.tree.attrs["execution"] == "graph"


@pytest.mark.slow
def test_a_power_that_rises_runs_alike_as_a_graph_and_as_written() -> None:
    phases = [
        {"objective": "e_step", "plus": {"sleep": {"start": 1.0, "end": 0.0, "over": 0.5}, "wake_phi": 0.3}},
        "wake",
    ]
    for loss in ("VarGrad", "Trace_ELBO"):
        written, graph = (
            quick(problem(loss=loss), phases=phases, reward_power={"start": 0.3}, batch_size=16, compile=how)
            for how in ("eager", "graph")
        )
        assert graph.tree.attrs["execution"] == "e_step: graph; wake: graph"
        np.testing.assert_allclose(graph.tree["fit"]["loss"], written.tree["fit"]["loss"], rtol=1e-8)
        torch.testing.assert_close(graph.params(), written.params(), rtol=1e-8, atol=1e-10)
    flat = quick(problem(loss="VarGrad"), phases=phases, batch_size=16, compile="eager")
    assert abs(flat.params()["first"] - graph.params()["first"]).max() > 1e-3


def test_schedules_go_on_from_a_checkpoint(tmp_path: Any) -> None:
    phases = [
        {"objective": "VarGrad", "steps": 3, "until": {"start": 9.0, "end": 1.0}, "plus": {"replay": 0.5}},
        {"objective": "wake", "options": {"refine": 1}},
    ]
    run = partial(quick, problem(), phases=phases, reward_power={"start": 0.4, "over": 0.5}, batch_size=10)
    plain = run()

    def stop(step: Any) -> None:
        if step.number in (5, 17):
            raise RuntimeError("killed")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="killed"):
            run(checkpoint=tmp_path, checkpoint_every=0.0, callbacks=[stop])
    with pytest.raises(CheckpointError, match="rounds"):
        run(checkpoint=tmp_path, num_rounds=20)
    with pytest.raises(CheckpointError, match="reward_power"):
        run(checkpoint=tmp_path, reward_power=0.5)
    resumed = run(checkpoint=tmp_path)
    np.testing.assert_array_equal(resumed.tree["fit"]["loss"], plain.tree["fit"]["loss"])
    torch.testing.assert_close(resumed.params(), plain.params(), rtol=0, atol=0)


# Thresholds.


def test_the_model_moves_only_once_the_smoothed_loss_is_below_the_threshold() -> None:
    until = {"start": 60.0, "end": 8.0, "over": 0.8}
    phases = [Phase("e_step", steps=100, until=until, lr=0.03), Phase("wake", lr=1e-6)]
    fitted = quick(problem(loss="VarGrad"), phases=phases, num_rounds=12)
    losses, labels = (fitted.tree["fit"][name].values for name in ("loss", "phase"))
    threshold = make_course("until", until, 12)
    order: list[str] = []
    smooth, made, turn = math.nan, 0, 0
    for loss, label in zip(losses, labels, strict=True):
        below = bool(order) and order[-1] == "e_step" and smooth < threshold(turn)
        order.append("wake" if below else "e_step")
        if label == "wake":
            turn += 1
            continue
        made += 1
        smooth = loss if made == 1 else smooth + max(0.1, 1 / made) * (loss - smooth)
    assert order == labels.tolist()
    assert order.count("wake") == 12
    assert order.count("e_step") > 14  # some rounds had to wait
    assert order[:2] == ["e_step", "wake"]  # and some had not


# Steps of both.


def test_weights_of_draws_in_the_loss_of_a_model() -> None:
    log_p, log_q = table(3, 4, seed=6).requires_grad_(), table(3, 4, seed=7)
    shares = {
        "equal": torch.full((3, 4), 1 / 3, dtype=F64),
        "importance": (log_p - log_q).softmax(0).detach(),
        "best": (log_p == log_p.max(0).values).to(F64),
    }
    for weights, share in shares.items():
        loss = model_loss(log_p, log_q, weights)
        assert loss.shape == (4,)
        (found,) = torch.autograd.grad(loss.sum(), [log_p])
        torch.testing.assert_close(found, -share)
    assert model_loss(log_p, log_q, "importance")[0].item() == pytest.approx(
        -math.log((log_p - log_q).exp().mean(0)[0].item())
    )


def runs_of(objective: Any, guide: Any, x: Tensor) -> tuple[int, list[Tensor]]:
    """How often the guide runs in one evaluation, and gradients of model and guide."""
    made = []

    def counted(x: Tensor) -> None:
        made.append(1)
        guide(x)

    pyro.set_rng_seed(3)
    loss = objective(model, counted, x)
    parameters = [pyro.param("logit").unconstrained(), *guide.parameters()]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return len(made), [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


@pytest.mark.parametrize("weights", ["equal", "importance", "best"])
def test_a_joint_step_uses_the_same_draws_for_both(weights: str) -> None:
    guide, x = Guide(), torch.ones(20, dtype=F64)
    alone, both = objective_of(VarGrad(3)), objective_of(VarGrad(3, joint=weights))
    count, (of_model, *of_guide) = runs_of(both, guide, x)
    assert count == 3
    _, (nothing, *same) = runs_of(alone, guide, x)
    assert not nothing.any()
    for ours, theirs in zip(of_guide, same, strict=True):
        torch.testing.assert_close(ours, theirs)
    pyro.set_rng_seed(3)
    draws = [poutine.trace(guide).get_trace(x) for _ in range(3)]
    a = torch.stack([draw.nodes["a"]["value"] for draw in draws])
    b = torch.stack([draw.nodes["b"]["value"] for draw in draws])
    log_p, log_q = log_joint()[a, b], guide.log_q().detach()[a, b]
    share = {
        "equal": torch.full((3, 20), 1 / 3, dtype=F64),
        "importance": (log_p - log_q).softmax(0),
        "best": nn.functional.one_hot(log_p.argmax(0), 3).T.to(F64),
    }[weights]
    wanted = FIRST.softmax(0) * 20 - (share.unsqueeze(-1) * nn.functional.one_hot(a, 2)).sum((0, 1))
    torch.testing.assert_close(of_model, wanted)
    tempered = Composite({"joint": both}, ["joint"]).at({"reward_power": 0.5})
    _, (of_model, *of_guide) = runs_of(tempered, guide, x)
    torch.testing.assert_close(of_model, wanted)  # the power is for the guide alone
    assert abs(of_guide[0] - same[0]).max() > 1e-3


def test_joint_phases_and_losses_fit_guide_and_model() -> None:
    best = math.nan
    logits = torch.linspace(-6, 6, 2001, dtype=F64)
    likelihood = (SECOND.log_softmax(1).exp() * (2 * SCORE).sigmoid()).sum(1)  # p(x = 1 | a)
    seen = logits.sigmoid() * likelihood[1] + (1 - logits.sigmoid()) * likelihood[0]
    score = 0.75 * seen.log() + 0.25 * (1 - seen).log()
    best, worst = float(score.max()), float(score[(logits - (FIRST[1] - FIRST[0])).abs().argmin()])
    decay = {"schedule": lambda step: 0.03 ** (step / 400)}
    by_phase = quick(problem(loss="VarGrad"), phases=[{"objective": "joint", **decay}], num_rounds=400, lr=0.1)
    by_loss = fit_svi(
        problem(loss=VarGrad(4, joint="equal")), num_steps=400, lr=0.1, lr_decay=0.03, num_samples=5, progress=False
    )
    for fitted in (by_phase, by_loss):
        share = fitted.params()["logit"].softmax(0)
        chance = float(share @ likelihood)
        assert best - (0.75 * math.log(chance) + 0.25 * math.log(1 - chance)) < 0.05 * (best - worst)
    assert by_phase.tree.attrs["execution"] == "graph"
    left = quick(problem(loss=VarGrad(4, joint="equal")), phases=["e_step"], num_rounds=20)
    torch.testing.assert_close(left.params()["logit"], FIRST)  # an E-step leaves the model


# Objectives by name, and sums of them.


def test_a_sum_has_the_value_of_the_first_and_the_gradient_of_all() -> None:
    p = torch.tensor(2.0, dtype=F64, requires_grad=True)
    parts = {"first": lambda *_: p**2, "other": lambda *_: 7 * p + 100, "third": lambda *_: p**3}
    total = Composite(parts).at({"other": 0.5, "third": torch.tensor(0.0, dtype=F64)})
    loss = total(None, None)
    assert loss.item() == 4.0
    assert torch.autograd.grad(loss, p)[0].item() == 4.0 + 3.5
    assert total.loss(None, None).item() == 4.0


def test_balance_objectives_go_by_name_and_move_the_guide() -> None:
    for phase in ("VarGrad", VarGrad(4), {"objective": "VarGrad", "num_particles": 4}):
        fitted = quick(problem(), phases=[phase])
        torch.testing.assert_close(fitted.params()["logit"], FIRST)
        assert abs(fitted.params()["first"] - Guide().first).max() > 0.01
    first, again = (quick(problem(), phases=[phase]) for phase in ("VarGrad", VarGrad(4)))
    np.testing.assert_array_equal(first.tree["fit"]["loss"], again.tree["fit"]["loss"])
    warm = quick(problem(), phases=[{"objective": "VarGrad", "options": {"epsilon": 0.5, "temperature": 2.0}}])
    assert not np.array_equal(first.tree["fit"]["loss"], warm.tree["fit"]["loss"])
    both = quick(problem(), phases=[{"objective": "VarGrad", "options": {"joint": "equal"}}])
    assert abs(both.params()["logit"] - FIRST).max() > 0.01
    mixed = quick(problem(), phases=[{"objective": "VarGrad", "plus": {"wake": 0.5}}])
    assert abs(mixed.params()["logit"] - FIRST).max() > 0.01


def test_a_balance_at_remembered_values_finds_the_posterior() -> None:
    """Twelve of the remembered values are all that there are."""
    phase = {"objective": "replay", "num_particles": 6, "options": {"loss": "VarGrad"}}
    decay = {"schedule": lambda step: 0.05 ** (step / 150)}
    fitted = quick(problem(4), phases=[{**phase, **decay}], num_rounds=150, lr=0.1)
    assert distance(fitted.params()) < 0.03
    assert fitted.tree["fit"]["loss"].values[-20:].max() < 1e-2  # no noise at the minimum


def test_a_spec_can_say_it_all() -> None:
    text = """
    num_rounds = 6
    reward_power = { start = 0.4, over = 0.6 }
    [[phases]]
    objective = "VarGrad"
    steps = 5
    num_particles = 3
    until = { start = 40.0, end = 20.0, over = 0.5 }
    options = { temperature = 1.1 }
    plus = { sleep = { start = 1.0, end = 0.1 } }
    [[phases]]
    objective = "wake"
    num_particles = 2
    options = { weights = "best", refine = 2 }
    """
    fitted = fit_em(problem(), **tomllib.loads(text), num_samples=5, progress=False)
    assert set(fitted.tree["fit"]["phase"].values) == {"VarGrad", "wake"}


# What is refused.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reward_power": {"start": 0.4, "ower": 0.6}}, "reward_power=.*a course has no 'ower'; did you mean 'over'"),
        ({"reward_power": {"over": 0.6}}, "it lacks 'start'"),
        ({"reward_power": 0.0}, "reward_power=0.0; give numbers of at least 1e-06"),
        ({"reward_power": {"start": 0.4, "over": 1.5}}, "over is a share of all rounds"),
        ({"reward_power": {"start": "low"}}, "a table whose values are each a number"),
        ({"reward_power": 0.5, "phases": ["wake", "sleep"]}, "no phase takes reward_power"),
        ({"phases": [Phase("e_step", until=3.0)]}, "phase e_step: it has until and steps=1"),
        ({"phases": [Phase("e_step", until={"start": 3.0}, steps=4)]}, "phase e_step: until=.*it lacks 'end'"),
        ({"phases": [Phase("e_step", plus={"slepp": 1.0})]}, "did you mean 'sleep'"),
        ({"phases": [Phase("e_step", plus={"e_step": 1.0})]}, "adds itself"),
        ({"phases": [Phase("VarGrad", options="epsilon")]}, "options='epsilon'; give a table"),  # type: ignore[arg-type]
        ({"phases": [Phase("e_step", plus="sleep")]}, "plus='sleep'; give a table"),  # type: ignore[arg-type]
        (
            {"phases": [Phase("e_step", plus={"sleep": -1.0})]},
            "phase e_step: sleep=-1.0; give numbers of at least 0",
        ),
        ({"phases": [Phase("VarGrd")]}, "did you mean 'VarGrad'"),
        ({"phases": [Phase("VarGrad", options={"epsilo": 1})]}, "did you mean 'epsilon'"),
        ({"phases": [Phase("VarGrad", options={"epsilon": 2.0})]}, "epsilon=2.0; give a number of at least 0"),
        ({"phases": [Phase("VarGrad", options={"joint": "some"})]}, "joint='some'; choose one of"),
        ({"phases": [Phase("wake", options={"refin": 1})]}, "did you mean 'refine'"),
        ({"phases": [Phase("sleep", options={"refine": 1})]}, "unknown option 'refine' of sleep"),
        (
            {"phases": [Phase("wake", options={"weights": "some"})]},
            "weights='some'; choose one of equal, importance, best",
        ),
        (
            {"phases": [Phase("replay", options={"loss": "TraceEnum_ELBO"})]},
            "phase replay: loss='TraceEnum_ELBO'; choose one of",
        ),
        ({"phases": ["joint"]}, "phase joint takes a balance objective .*Trace_ELBO"),
    ],
)
def test_what_cannot_be_run_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ProblemError, match=message):
        quick(problem(), **options)


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        ("TraceMeanField_ELBO", {"reward_power": 0.5}, "does not go with TraceMeanField_ELBO"),
        (VarGrad(reward_power=lambda step: 0.5), {"reward_power": 0.5}, "a reward_power of its own that changes"),
        (
            VarGrad(reward_power=lambda step: 0.5),
            {"phases": [Phase("e_step", plus={"sleep": 1.0})]},
            "VarGrad cannot be a part of a sum",
        ),
        ("VarGrad", {"phases": [Phase("joint", options={"weights": "some"})]}, "phase joint: weights='some'"),
    ],
)
def test_losses_that_do_not_go_with_it_are_refused(loss: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ProblemError, match=message):
        quick(problem(loss=loss), **options)


def test_names_of_losses_are_those_of_phases() -> None:
    assert isinstance(make_loss(problem(loss="BackAndForth")), VarGrad)
    assert not isinstance(make_loss(problem(loss="TrajectoryBalance")), VarGrad)
    assert isinstance(make_loss(problem(loss="TrajectoryBalance")), TrajectoryBalance)
