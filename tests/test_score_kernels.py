"""Sampling by scores: invariance, momentum on rejection, bias without correction, annealing, and runs of chains."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from probmodels.errors import ProblemError
from probmodels.inference import Problem, run_mcmc
from probmodels.inference.mcmc.line_integrals import Evaluation, density_target
from probmodels.inference.mcmc.score_kernels import ScoreKernel, Transition

CENTRES = torch.tensor([[-1.2, 0.0], [1.0, 0.8], [0.5, -1.0]], dtype=torch.float64)
COVARIANCE = torch.tensor([[1.0, 0.8], [0.8, 1.5]], dtype=torch.float64)
PRECISION = torch.linalg.inv(COVARIANCE)
MIXTURE_SD = 0.6


def quartic(x):
    return -0.25 * x.pow(4).sum(1)


def correlated(x):
    return -0.5 * ((x @ PRECISION) * x).sum(1)


def mixture(x):
    return torch.logsumexp(-(x[:, None] - CENTRES).square().sum(2) / (2 * MIXTURE_SD**2), 1)


def normal(x):
    return -0.5 * x.square().sum(1)


def score_only(log_density):
    full = density_target(log_density)

    def target(x):
        score = full(x).score
        return Evaluation(score, line=score)

    return target


def draw(name, count):
    """Exact draws (count, size)."""
    if name == "quartic":
        grid = torch.linspace(-4, 4, 8001, dtype=torch.float64)
        return (grid[torch.multinomial(quartic(grid[:, None]).exp(), count, True)] + 1e-3 * (torch.rand(count) - 0.5))[
            :, None
        ]
    noise = torch.randn(count, 2, dtype=torch.float64)
    if name == "correlated":
        return noise @ torch.linalg.cholesky(COVARIANCE).T
    return CENTRES[torch.randint(3, (count,))] + MIXTURE_SD * noise


def moments(name, x):
    """Squares and products of positions (count, number)."""
    return x.square() if name == "quartic" else torch.stack([x[:, 0], *x.square().T, x[:, 0] * x[:, 1]], 1)


TRUE_MOMENTS = {
    "quartic": torch.tensor([2 * math.gamma(0.75) / math.gamma(0.25)], dtype=torch.float64),
    "correlated": torch.tensor([0.0, 1.0, 1.5, 0.8], dtype=torch.float64),
    "mixture": torch.cat(
        [
            CENTRES[:, 0].mean()[None],
            CENTRES.square().mean(0) + MIXTURE_SD**2,
            (CENTRES[:, 0] * CENTRES[:, 1]).mean()[None],
        ]
    ),
}
DENSITIES = {"quartic": quartic, "correlated": correlated, "mixture": mixture}


def deviations(name, transition, target, step, *, steps=20, chains=10000, move=None):
    """Deviations of moments from the truth after ``steps`` from exact draws, in standard errors; mean acceptance."""
    torch.manual_seed(1)
    x = draw(name, chains)
    v, evaluation, total, accept = torch.randn_like(x), target(x), 0.0, 0.0
    for index in range(steps):
        moved = (move or transition)(target, x, v, evaluation, step)
        x, v, evaluation = moved.x, moved.v, moved.evaluation
        accept += float(moved.accept_prob.mean()) / steps
        if index >= steps // 2:
            total = total + moments(name, x) / (steps - steps // 2)
    error = total.std(0) / math.sqrt(chains)
    return (total.mean(0) - TRUE_MOMENTS[name]) / error, accept


# Each rule where it is exact, or where its error is far below that of the moments.
@pytest.mark.parametrize(
    ("name", "proposal", "rule", "num_points", "step"),
    [
        ("quartic", "hamiltonian", "exact", 5, 0.6),
        ("quartic", "hamiltonian", "curve-simpson", 5, 0.6),
        ("quartic", "langevin", "exact", 5, 1.1),
        ("quartic", "langevin", "simpson", 3, 1.1),
        ("correlated", "hamiltonian", "curve-newton", 5, 0.9),
        ("correlated", "hamiltonian", "curve", 5, 0.9),
        ("correlated", "langevin", "trapezoid", 2, 0.8),
        ("mixture", "hamiltonian", "exact", 5, 0.7),
        ("mixture", "hamiltonian", "gauss", 8, 0.6),
        ("mixture", "langevin", "gauss", 8, 0.8),
    ],
)
def test_the_target_is_left_invariant(name, proposal, rule, num_points, step):
    target = (density_target if rule == "exact" else score_only)(DENSITIES[name])
    transition = Transition(proposal, rule=rule, num_points=num_points, damping=0.7)
    deviation, accept = deviations(name, transition, target, step)
    assert 0.4 < accept < 0.95
    assert float(deviation.abs().max()) < 4, deviation


def test_momentum_is_negated_on_rejection_and_must_be():
    target, transition = score_only(quartic), Transition(rule="curve-simpson", damping=0.9)

    def unflipped(target, x, v, evaluation, step):
        moved = transition(target, x, v, evaluation, step)
        rejected = (moved.x == x).all(1, keepdim=True)
        return type(moved)(**{**vars(moved), "v": torch.where(rejected, -moved.v, moved.v)})

    right, accept = deviations("quartic", transition, target, 0.55, steps=40, chains=20000)
    wrong, _ = deviations("quartic", transition, target, 0.55, steps=40, chains=20000, move=unflipped)
    assert 0.9 < accept < 0.97
    assert float(right.abs().max()) < 4
    assert float(wrong.abs().max()) > 6


@pytest.mark.parametrize(("proposal", "step"), [("hamiltonian", 0.5), ("langevin", 0.8)])
@pytest.mark.parametrize("name", ["quartic", "mixture"])
def test_acceptance_by_the_default_rule_is_that_of_the_density(name, proposal, step):
    by_line, by_density = (
        deviations(name, Transition(proposal), kind(DENSITIES[name]), step, steps=10, chains=5000)[1]
        for kind in (score_only, density_target)
    )
    assert abs(by_line - by_density) < 0.01


@pytest.mark.parametrize(("proposal", "step"), [("hamiltonian", 1.2), ("langevin", 1.2)])
def test_uncorrected_proposals_are_biased_and_corrected_ones_are_not(proposal, step):
    variances = {}
    for corrected in (True, False):
        torch.manual_seed(2)
        transition, target = Transition(proposal, corrected=corrected), score_only(normal)
        x = torch.randn(10000, 2, dtype=torch.float64)
        v, evaluation = None, target(x)
        for _ in range(30):
            moved = transition(target, x, v, evaluation, step)
            x, v, evaluation = moved.x, moved.v, moved.evaluation
        variances[corrected] = float(x.square().mean())
    error = math.sqrt(2 / 20000)
    assert abs(variances[True] - 1) < 4 * error
    # The leapfrog integrator leaves a normal of variance 1 / (1 - step^2 / 4) invariant.
    wide = 1 / (1 - step**2 / 4)
    assert abs(variances[False] - wide) < 4 * error * wide


def test_a_langevin_step_is_that_of_mala():
    target, x, h = score_only(mixture), draw("mixture", 50), 0.1
    evaluation = target(x)
    torch.manual_seed(3)
    moved = Transition("langevin", rule="gauss", num_points=12, corrected=True)(
        target, x, None, evaluation, math.sqrt(2 * h)
    )
    torch.manual_seed(3)
    noise = torch.randn_like(x)
    y = x + h * evaluation.score + math.sqrt(2 * h) * noise
    forward = -(y - x - h * evaluation.score).square().sum(1) / (4 * h)
    backward = -(x - y - h * target(y).score).square().sum(1) / (4 * h)
    torch.testing.assert_close(moved.log_ratio, mixture(y) - mixture(x) + backward - forward, rtol=1e-6, atol=1e-6)
    accepted = (moved.x != x).any(1)
    torch.testing.assert_close(moved.x[accepted], y[accepted])
    assert moved.evaluations == 1 + 12


def test_the_trapezoid_along_a_trajectory_sees_the_ends_alone():
    """The reason why free rules are not the default: their error is as large as the energy error that they measure."""
    target, x = score_only(mixture), draw("mixture", 100)
    evaluation, step = target(x), 0.3
    free = Transition(rule="curve", num_leapfrog=4, corrected=True)
    torch.manual_seed(5)
    moved = free(target, x, None, evaluation, step)
    accepted = (moved.x != x).any(1)
    change = (moved.evaluation.score.square() - evaluation.score.square()).sum(1)
    torch.testing.assert_close(moved.log_ratio[accepted], -(step**2) / 8 * change[accepted])


def test_rules_that_evaluate_midpoints_remove_the_bias_that_free_ones_leave():
    deviation, accept = deviations("mixture", Transition(), score_only(mixture), 0.5)
    assert 0.93 < accept < 0.96
    assert float(deviation.abs().max()) < 4
    for rule in ("curve", "curve-newton"):
        deviation, _ = deviations("mixture", Transition(rule=rule), score_only(mixture), 0.5)
        assert float(deviation.abs().max()) > 4, rule


@pytest.mark.parametrize("rule", ["curve", "curve-newton"])
def test_free_rules_take_no_evaluation_more_than_the_uncorrected_twin(rule):
    for corrected in (True, False):
        target, count = score_only(mixture), 0

        def counted(x, target=target):
            nonlocal count
            count += 1
            return target(x)

        transition = Transition(rule=rule, corrected=corrected, num_leapfrog=4)
        x = draw("mixture", 30)
        v, evaluation = None, counted(x)
        for _ in range(10):
            moved = transition(counted, x, v, evaluation, 1.0)
            x, v, evaluation = moved.x, moved.v, moved.evaluation
            torch.testing.assert_close(evaluation.score, target(x).score)
        assert count == 41
        assert moved.evaluations == 4


def test_a_known_part_is_weighed_exactly():
    """Score of a normal and density of another: their product."""

    def target(x):
        return Evaluation(-x - 3 * (x - 1), line=-x, known=-1.5 * (x - 1).square().sum(1))

    torch.manual_seed(4)
    x = torch.randn(8000, 2, dtype=torch.float64)
    transition, v, evaluation = Transition(), None, target(x)
    for _ in range(40):
        moved = transition(target, x, v, evaluation, 0.4)
        x, v, evaluation = moved.x, moved.v, moved.evaluation
    assert abs(float(x.mean()) - 0.75) < 4 * 0.5 / math.sqrt(16000)
    assert abs(float(x.var()) - 0.25) < 4 * 0.25 * math.sqrt(2 / 16000)


def test_proposals_that_are_not_finite_are_rejected_and_uncorrected_chains_stay_flagged():
    target, x = score_only(quartic), torch.full((4, 1), 2.0, dtype=torch.float64)
    x[0] = 0.01
    v = torch.zeros_like(x)
    moved = Transition(num_leapfrog=12)(target, x, v, target(x), torch.tensor([0.1, 4.0, 4.0, 4.0]))
    assert moved.diverging.tolist() == [False, True, True, True]
    assert torch.equal(moved.x[1:], x[1:])
    assert torch.isfinite(moved.v).all()
    assert torch.equal(moved.accept_prob[1:], torch.zeros(3, dtype=torch.float64))
    free = Transition(num_leapfrog=12, corrected=False)
    for _ in range(3):
        moved = free(target, moved.x, moved.v, moved.evaluation, torch.tensor([0.1, 4.0, 4.0, 4.0]))
        assert moved.diverging.tolist() == [False, True, True, True]


# Runs of chains.


def model():
    x = dist.Normal(torch.zeros(3, 2, dtype=torch.float64), 1.0).to_event(2).mask(False)
    pyro.sample("x", x, infer={"event_dims": ["row", "column"]})


PROBLEM = Problem("scores", model)
SCALES = (4.0, 2.0, 1.0)


def scaled(scale, x):
    score = -x / scale**2
    return Evaluation(score, line=score)


def wide_start(num_chains):
    return 4 * torch.randn(num_chains, 3, 2, dtype=torch.float64)


OPTIONS = {
    "targets": [partial(scaled, scale) for scale in SCALES],
    "step_size": [0.3 * scale for scale in SCALES],
    "start": wide_start,
}


def run(problem=PROBLEM, warmup_steps=60, num_samples=40, num_chains=32, seed=0, checkpoint=None, **changes):
    return run_mcmc(
        problem,
        kernel=ScoreKernel,
        kernel_options={**OPTIONS, **changes},
        chain_method="vectorized",
        warmup_steps=warmup_steps,
        num_samples=num_samples,
        num_chains=num_chains,
        seed=seed,
        checkpoint=checkpoint,
        progress=False,
    )


@pytest.mark.parametrize("proposal", ["hamiltonian", "langevin"])
def test_a_run_anneals_through_its_targets_and_samples_the_last(proposal, tmp_path):
    result = run(proposal=proposal, names=["hot", "warm", "cold"], num_samples=150, check_points=6)
    draws = result.posterior["x"]
    assert draws.dims == ("chain", "draw", "row", "column")
    squares = draws.values**2
    error = squares.mean((1, 2, 3)).std() / math.sqrt(32)
    assert abs(squares.mean() - 1) < 4 * error
    assert error < 0.05
    stats = result.tree["sample_stats"]
    assert set(stats.data_vars) == {"acceptance_rate", "energy_change", "diverging", "step_size"}
    assert stats["energy_change"].shape == (32, 150)
    np.testing.assert_allclose(np.exp(-stats["energy_change"]).clip(max=1), stats["acceptance_rate"], rtol=1e-10)
    aim = 0.8 if proposal == "hamiltonian" else 0.574
    assert abs(float(stats["acceptance_rate"].mean()) - aim) < 0.08
    assert len(np.unique(stats["step_size"])) == 1  # never adapted after warm-up
    levels = stats.attrs["levels"]
    assert levels["name"] == ["hot", "warm", "cold"]
    assert levels["steps"] == [20, 20, 170]
    each = 6 if proposal == "hamiltonian" else 4
    assert levels["evaluations"] == [1 + each * steps for steps in levels["steps"]]
    assert levels["divergences"] == [0, 0, 0]
    assert max(levels["line_error"]) < 1e-10  # linear scores
    assert levels["step_size"][-1] == float(stats["step_size"][0, -1])
    ratios = [step / (0.3 * scale) for step, scale in zip(levels["step_size"], SCALES, strict=True)]
    assert min(ratios) > 1.5  # carried over from target to target
    result.save(tmp_path / "saved")


def test_seeds_decide_the_draws_and_a_resumed_run_continues_them(tmp_path):
    whole = run(num_samples=30)
    assert np.array_equal(run(num_samples=30).posterior["x"], whole.posterior["x"])
    assert not np.array_equal(run(num_samples=30, seed=1).posterior["x"], whole.posterior["x"])
    run(num_samples=7, checkpoint=tmp_path)
    resumed = run(num_samples=30, checkpoint=tmp_path)
    assert np.array_equal(resumed.posterior["x"], whole.posterior["x"])
    assert resumed.tree["sample_stats"].attrs == whole.tree["sample_stats"].attrs


def test_a_run_stopped_in_warmup_continues_to_the_same_state():
    first, second = (ScoreKernel(PROBLEM, num_chains=5, **OPTIONS) for _ in range(2))
    for kernel in (first, second):
        torch.manual_seed(0)
        kernel.setup(31)
    params = first.initial_params
    for _ in range(15):
        params = first.sample(params)
    state, rng = first.state_dict(), torch.get_rng_state()
    state = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in state.items()}
    ends = []
    for kernel in (first, second):
        if kernel is second:
            kernel.load_state_dict(state)
        torch.set_rng_state(rng)
        for index in range(20):
            if index == 16:
                kernel.end_warmup()
            moved = kernel.sample(params)
        ends.append((moved["z"], kernel.attrs()))
    assert torch.equal(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]


def test_moves_between_targets_and_after_the_last():
    entered = []

    def shrink(level, x):
        entered.append(level)
        return x * SCALES[level] / SCALES[level - 1]

    result = run(between=shrink, final=lambda x: x + 100, warmup_steps=3, adapt=False, num_samples=20)
    assert entered == [1, 2]
    values = result.posterior["x"].values
    # Exact draws of the first target, scaled to each next one, stay exact: one step of each is no burn-in.
    assert abs(values[:, 0].mean() - 100) < 4 / math.sqrt(values[:, 0].size)
    assert abs(values[:, 0].var() - 1) < 4 * math.sqrt(2 / values[:, 0].size)
    levels = result.tree["sample_stats"].attrs["levels"]
    assert levels["steps"] == [1, 1, 21]
    assert levels["step_size"] == OPTIONS["step_size"]
    assert "line_error" not in levels


def test_uncorrected_runs_do_not_adapt_and_report_what_was_lost():
    result = run(corrected=False, step_size=2.5, num_samples=400, num_chains=4)  # stable on wide targets only
    stats = result.tree["sample_stats"]
    assert np.unique(stats["step_size"]).tolist() == [2.5]
    assert stats["diverging"][:, -1].all()
    assert stats.attrs["levels"]["divergences"][-1] > 400
    assert result.diagnose().divergences > 400


def test_uncorrected_chains_that_go_astray_on_the_way_stop_no_others():
    def bounded(scale, x):
        score = torch.where(x.abs() < 6 * scale, -x / scale**2, math.nan)
        return Evaluation(score, line=score)

    targets = [partial(bounded, scale) for scale in SCALES]
    result = run(corrected=False, targets=targets, step_size=1.0, num_samples=2, num_chains=200)
    lost = result.tree["sample_stats"]["diverging"].values[:, -1]
    assert 0 < lost.sum() < 200
    assert np.isfinite(result.posterior["x"].values[~lost]).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"proposal": "gibbs"}, "choose one of"),
        ({"rule": "romberg"}, "choose one of"),
        ({"rule": "exact"}, "target 0: rule='exact' needs a log density"),
        ({"rule": "simpson", "num_points": 4}, "odd number"),
        ({"num_leapfrog": 0}, "num_leapfrog=0"),
        ({"damping": 1.0}, "damping=1.0"),
        ({"target_accept": 1.5}, "target_accept=1.5"),
        ({"check_points": 0}, "check_points=0"),
        ({"targets": []}, r"targets=\[\]; give a list of at least 1"),
        ({"step_size": [0.1, 0.2]}, "step_size holds 2 numbers for 3 targets"),
        ({"step_size": 0.0}, "step_size=0.0; give a number above 0"),
        ({"names": ["one"]}, "1 names for 3 targets"),
        ({"start": torch.zeros(5, 6)}, "32 chains of 6 unknowns"),
        ({"start": torch.zeros(32, 5)}, "32 chains of 6 unknowns"),
        ({"warmup_steps": 2}, "warmup_steps=2 cannot visit 3 targets"),
        ({"between": lambda level, x: x * math.nan}, "target 1: .* at positions that are not finite"),
        (
            {
                "targets": [partial(scaled, 4.0), lambda x: Evaluation(x * math.nan, x), partial(scaled, 1.0)],
                "names": ["a", "b", "c"],
            },
            r"target 1 \(b\): `score` is not finite for 32 of 32 chains, at finite positions",
        ),
        ({"targets": [lambda x: Evaluation(x[:, :1], x)] * 3}, r"target 0: `score` has shape \(32, 1, 2\)"),
    ],
)
def test_bad_input_is_refused(changes, message):
    with pytest.raises(ProblemError, match=message):
        run(**changes)
