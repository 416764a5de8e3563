"""Line integrals of a score: exactness, order, reversal, accuracy on trajectories, and what they refuse."""

from __future__ import annotations

import math

import pytest
import torch

from probmodels.errors import ProblemError
from probmodels.inference.mcmc.line_integrals import (
    RULES,
    Evaluation,
    check_rule,
    density_target,
    evaluate_start,
    log_ratio,
)

INEXACT = [rule for rule in RULES if rule != "exact"]


@pytest.fixture(autouse=True)
def double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)


def score_only(log_density):
    """Target of which the score is known alone, with a count of its evaluations."""
    full = density_target(log_density)

    def target(x):
        target.count += 1
        score = full(x).score
        return Evaluation(score, line=score)

    target.count = 0
    return target


def wavy(x):
    return (1.5 * x).sin().sum(1) + 0.5 * (x[:, 0] - 0.3).cos() * (1 + x[:, 1]).sin()


def ring(sd):
    angles = torch.arange(8) * math.pi / 4
    centres = 0.5 * torch.stack([angles.cos(), angles.sin()], 1)
    return centres, lambda x: torch.logsumexp(-(x[:, None] - centres).square().sum(2) / (2 * sd**2), 1)


def leapfrog(target, x, v, step, count):
    points, evaluations = [x], [target(x)]
    for _ in range(count):
        v = v + 0.5 * step * evaluations[-1].score
        points.append(points[-1] + step * v)
        evaluations.append(target(points[-1]))
        v = v + 0.5 * step * evaluations[-1].score
    return points, evaluations


def mean_error(rule, log_density, points, num_points=5):
    target = score_only(log_density)
    value, _ = log_ratio(rule, target, points, [target(x) for x in points], num_points)
    return float((value - (log_density(points[-1]) - log_density(points[0]))).abs().mean())


@pytest.mark.parametrize("rule", INEXACT)
@pytest.mark.parametrize("segments", [1, 2, 3, 4, 7])
def test_every_rule_is_exact_where_the_score_is_linear(rule, segments):
    matrix = torch.tensor([[2.0, 0.7, 0.0], [0.7, 1.0, -0.2], [0.0, -0.2, 3.0]])
    points = [torch.randn(6, 3) for _ in range(segments + 1)]
    assert mean_error(rule, lambda x: -0.5 * ((x @ matrix) * x).sum(1) + x[:, 0], points) < 1e-13


def test_straight_rules_are_exact_to_their_degree():
    points = [torch.randn(50, 1), torch.randn(50, 1)]

    def error(rule, num_points, power):
        return mean_error(rule, lambda x: x.pow(power).sum(1), points, num_points)

    for rule, num_points, degree in [
        ("trapezoid", 2, 1),
        ("trapezoid", 6, 1),
        ("simpson", 3, 3),
        ("simpson", 7, 3),
        ("gauss", 1, 1),
        ("gauss", 3, 5),
        ("curve-simpson", 5, 3),
    ]:
        assert error(rule, num_points, degree + 1) < 1e-12, (rule, num_points)  # the score has one degree less
        assert error(rule, num_points, degree + 3) > 1e-4, (rule, num_points)


def test_three_points_of_a_curve_have_simpsons_rule_with_tangents():
    x0, x1, x2 = points = [torch.randn(4, 2) for _ in range(3)]
    target = score_only(wavy)
    s0, s1, s2 = (target(x).score for x in points)
    expected = (s0 * (-3 * x0 + 4 * x1 - x2) + 4 * s1 * (x2 - x0) + s2 * (x0 - 4 * x1 + 3 * x2)).sum(1) / 6
    value, extra = log_ratio("curve-newton", target, points, [target(x) for x in points])
    torch.testing.assert_close(value, expected)
    assert extra == 0


@pytest.mark.parametrize(
    ("rule", "order"), [("trapezoid", 2), ("simpson", 4)], ids=lambda value: str(value).replace(" ", "")
)
def test_errors_on_a_segment_fall_with_the_number_of_panels(rule, order):
    points = [torch.randn(200, 2), torch.randn(200, 2)]
    coarse, fine = (mean_error(rule, wavy, points, panels + 1) for panels in (16, 32))
    assert abs(math.log2(coarse / fine) - order) < 0.15


@pytest.mark.parametrize(("rule", "order"), [("curve", 3), ("curve-simpson", 5), ("curve-newton", 5)])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_errors_on_a_trajectory_fall_with_the_step(rule, order, count):
    x, v = torch.randn(500, 2), torch.randn(500, 2)
    coarse, fine = (mean_error(rule, wavy, leapfrog(score_only(wavy), x, v, step, count)[0]) for step in (0.1, 0.05))
    assert abs(math.log2(coarse / fine) - order) < 0.3


@pytest.mark.parametrize("rule", INEXACT)
@pytest.mark.parametrize("segments", [1, 2, 3, 4, 6])
def test_the_way_back_has_the_opposite_sign(rule, segments):
    def rotating(x):  # no gradient of anything, so that only the rule can make the signs opposite
        line = torch.stack([x[:, 1].sin(), -x[:, 0].square()], 1)
        return Evaluation(line, line, -x.square().sum(1))

    points = [torch.randn(20, 2) for _ in range(segments + 1)]
    there, _ = log_ratio(rule, rotating, points, [rotating(x) for x in points])
    back, _ = log_ratio(rule, rotating, points[::-1], [rotating(x) for x in points[::-1]])
    torch.testing.assert_close(there, -back, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("sd", "share"), [(0.1, 0.8), (0.2, 0.8), (0.1, 0.4), (0.2, 0.4)])
def test_rules_on_trajectories_are_the_better_ones(sd, share):
    centres, log_density = ring(sd)
    x, v = centres[torch.randint(8, (3000,))] + sd * torch.randn(3000, 2), torch.randn(3000, 2)
    points, _ = leapfrog(score_only(log_density), x, v, share * sd, 3)
    free, newton, simpson = (
        mean_error(rule, log_density, points) for rule in ("curve", "curve-newton", "curve-simpson")
    )
    straight = mean_error("trapezoid", log_density, points, 4)
    assert simpson < straight / 5  # measured: 8.8, 12, 43 and 130 times as accurate
    assert newton < free * (0.5 if share == 0.4 and sd == 0.2 else 1)
    if share == 0.4:
        assert newton < straight / 1.8


@pytest.mark.parametrize(
    ("rule", "num_points", "extra"),
    [("trapezoid", 5, 3), ("simpson", 5, 3), ("gauss", 4, 4), ("curve", 5, 0), ("curve-simpson", 5, 3)],
)
def test_evaluations_are_counted(rule, num_points, extra):
    target = score_only(wavy)
    points = [torch.randn(2, 2) for _ in range(4)]
    evaluations = [target(x) for x in points]
    target.count = 0
    assert log_ratio(rule, target, points, evaluations, num_points)[1] == extra == target.count


def test_the_known_part_counts_exactly_and_is_not_integrated():
    hidden, stated = density_target(wavy), density_target(lambda x: (3 * x).cos().sum(1))

    def target(x):
        return Evaluation(hidden(x).score + stated(x).score, hidden(x).score, stated(x).known)

    points = [torch.randn(10, 2), torch.randn(10, 2)]
    for rule in INEXACT:
        whole, _ = log_ratio(rule, target, points, [target(x) for x in points], 4 if rule == "gauss" else 5)
        line, _ = log_ratio(
            rule, score_only(wavy), points, [score_only(wavy)(x) for x in points], 4 if rule == "gauss" else 5
        )
        torch.testing.assert_close(whole - line, stated(points[1]).known - stated(points[0]).known)


def test_events_may_have_any_shape_and_all_known_targets_take_no_rule():
    target = density_target(lambda x: -x.pow(4).flatten(1).sum(1))
    points = [torch.randn(3, 2, 2, 2) for _ in range(3)]
    evaluations = [target(x) for x in points]
    for rule in RULES:
        value, extra = log_ratio(rule, target, points, evaluations)
        assert extra == 0
        torch.testing.assert_close(value, evaluations[2].known - evaluations[0].known)
    half = [Evaluation(e.score, e.score) for e in evaluations]
    flat = [Evaluation(e.score.flatten(1), e.score.flatten(1)) for e in evaluations]
    value, _ = log_ratio("curve-newton", target, points, half)
    torch.testing.assert_close(value, log_ratio("curve-newton", target, [x.flatten(1) for x in points], flat)[0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: check_rule("romberg"), "choose one of"),
        (lambda: check_rule("simpson", 4), "odd number, 3 points or more"),
        (lambda: check_rule("trapezoid", 1), "2 points or more"),
        (lambda: check_rule("gauss", 0), "1 points or more"),
        (lambda: check_rule("exact", 5, score_only(wavy)(torch.zeros(2, 2))), "log density that is all known"),
        (lambda: evaluate_start(lambda x: Evaluation(x[:, 0], x), torch.zeros(3, 2)), r"`score` has shape \(3,\)"),
        (lambda: evaluate_start(lambda x: Evaluation(x, x[:1]), torch.zeros(3, 2)), r"`line` has shape \(1, 2\)"),
        (lambda: evaluate_start(lambda x: Evaluation(x), torch.zeros(3, 2)), "set line=score"),
        (lambda: evaluate_start(lambda x: Evaluation(1 / x, 1 / x), torch.zeros(3, 2)), "3 of 3 chains, at finite"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ProblemError, match=message):
        call()


def test_no_rule_is_exact_where_only_the_score_is_known():
    target, points = score_only(wavy), [torch.zeros(2, 2), torch.ones(2, 2)]
    evaluations = [target(x) for x in points]
    with pytest.raises(ProblemError, match="log density that is all known"):
        log_ratio("exact", target, points, evaluations)
