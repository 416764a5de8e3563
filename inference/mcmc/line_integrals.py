"""Ratios of densities from their score alone: line integrals along straight segments and along trajectories.

Where only the gradient ``s`` of a log density is known, the log ratio of the densities of two points is the integral of
``s(r(u)) . r'(u)`` along any path ``r`` between them. Each rule here changes its sign, to rounding, when the path is
walked backwards, so that the ratio of a move and of its reverse multiply to one whatever the error of the rule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from probmodels.errors import ProblemError
from probmodels.options import hint

__all__ = ["RULES", "Evaluation", "Target", "check_rule", "density_target", "evaluate_start", "finite", "log_ratio"]


@dataclass(frozen=True)
class Evaluation:
    """What a target says at points (chain, *event).

    Attributes
    ----------
    score
        Gradient of the log density (chain, *event).
    line
        The part of ``score`` whose log density is unknown (chain, *event); None where all of it is known.
    known
        Log density (chain,) of the rest, up to a constant; None where nothing is known.
    """

    score: Tensor
    line: Tensor | None = None
    known: Tensor | None = None


Target = Callable[[Tensor], Evaluation]
_INEXACT = (
    "rule='exact' needs a log density that is all known, and this target gives only the score of a part of it, "
    "`line`; choose another rule"
)
# Integral (chain,) of ``line`` along points of a path, evaluated already, and the further evaluations that it took.
Rule = Callable[[Target, Sequence[Tensor], Sequence[Evaluation], int], tuple[Tensor, int]]


def density_target(log_density: Callable[[Tensor], Tensor]) -> Target:
    """Target whose log density is known: (chain, *event) to (chain,), differentiated automatically."""

    def target(x: Tensor) -> Evaluation:
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            value = log_density(x)
            (score,) = torch.autograd.grad(value.sum(), x)
        return Evaluation(score, None, value.detach())

    return target


def log_ratio(
    rule: str, target: Target, points: Sequence[Tensor], evaluations: Sequence[Evaluation], num_points: int = 5
) -> tuple[Tensor, int]:
    """Log density at the last point of a path less that at the first.

    The known part of the target counts exactly; ``rule`` integrates the rest, and costs nothing where all is known.

    Parameters
    ----------
    rule
        A key of `RULES`. ``"trapezoid"``, ``"simpson"`` and ``"gauss"`` take the straight segment from the first point
        to the last; ``"curve"``, ``"curve-simpson"`` and ``"curve-newton"`` follow all points. ``"exact"`` is for
        targets whose log density is known.
    target
        What the evaluations are of.
    points, evaluations
        At least two points (chain, *event) of the path, and the target at each.
    num_points
        Points of a rule on the straight segment, the end points included except for ``"gauss"``.

    Returns
    -------
    tuple
        Log ratio (chain,), and the number of further evaluations of the target.

    Raises
    ------
    ProblemError
        If the rule is ``"exact"`` and a part of the log density is unknown.
    """
    first, last = evaluations[0], evaluations[-1]
    total, extra = points[0].new_zeros(len(points[0])), 0
    if first.line is not None:
        total, extra = RULES[rule](target, points, evaluations, num_points)
    if first.known is not None and last.known is not None:
        total = total + (last.known - first.known)
    return total, extra


def evaluate_start(target: Target, x: Tensor, *, alive: Tensor | None = None) -> Evaluation:
    """Evaluate a target where chains start on it, and check what it returns.

    Parameters
    ----------
    target
        Function of positions.
    x
        Positions (chain, *event).
    alive
        Chains (chain,) whose numbers must be finite; all by default.

    Raises
    ------
    ProblemError
        If a tensor has the wrong shape, nothing says what the log density is, or a number is not finite.
    """
    with torch.no_grad():
        evaluation = target(x)
    for name, shape in (("score", x.shape), ("line", x.shape), ("known", x.shape[:1])):
        value = getattr(evaluation, name)
        if value is None:
            continue
        if value.shape != shape:
            raise ProblemError(
                f"`{name}` has shape {tuple(value.shape)} at positions {tuple(x.shape)}; it must be {tuple(shape)}"
            )
        bad = ~finite(value) if alive is None else ~finite(value) & alive
        if bool(bad.any()):
            where = "positions that are not finite" if not bool(finite(x)[bad].all()) else "finite positions"
            raise ProblemError(
                f"`{name}` is not finite for {int(bad.sum())} of {len(x)} chains, at {where}; start where the density "
                "is positive, or mend the score"
            )
    if evaluation.line is None and evaluation.known is None:
        raise ProblemError("it gives neither `line` nor `known`, and so no ratio of densities; set line=score")
    return evaluation


def check_rule(rule: str, num_points: int = 5, evaluation: Evaluation | None = None) -> None:
    """Refuse unknown rules, numbers of points that they cannot take, and targets (by an evaluation) that they cannot.

    Raises
    ------
    ProblemError
        Saying which rules there are, or which numbers of points.
    """
    if rule not in RULES:
        raise ProblemError(f"rule={rule!r}; choose one of {', '.join(RULES)}{hint(rule, RULES, otherwise=False)}")
    least = {"trapezoid": 2, "simpson": 3, "gauss": 1}.get(rule, 1)
    if num_points < least or (rule == "simpson" and num_points % 2 == 0):
        odd = "an odd number, " if rule == "simpson" else ""
        raise ProblemError(f"num_points={num_points}; rule {rule!r} takes {odd}{least} points or more")
    if rule == "exact" and evaluation is not None and evaluation.line is not None:
        raise ProblemError(_INEXACT)


def finite(x: Tensor) -> Tensor:
    """Chains (chain,) all of whose numbers (chain, ...) are finite."""
    return torch.isfinite(x).reshape(len(x), -1).all(1)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).reshape(len(a), -1).sum(1)


def _line(evaluation: Evaluation) -> Tensor:
    if evaluation.line is None:
        raise ProblemError("a target gives the unknown part of its score, `line`, at some points and not at others")
    return evaluation.line


def _straight(
    nodes: Sequence[float],
    weights: Sequence[float],
    target: Target,
    points: Sequence[Tensor],
    evaluations: Sequence[Evaluation],
) -> tuple[Tensor, int]:
    """Quadrature on the segment from the first point to the last, whose evaluations are nodes 0 and 1."""
    step = points[-1] - points[0]
    mean, extra = torch.zeros_like(step), 0
    for node, weight in zip(nodes, weights, strict=True):
        if node in (0, 1):
            line = _line(evaluations[-int(node)])
        else:
            line, extra = _line(target(points[0] + node * step)), extra + 1
        mean = mean + weight * line
    return _dot(mean, step), extra


def _trapezoid(
    target: Target, points: Sequence[Tensor], evaluations: Sequence[Evaluation], num_points: int
) -> tuple[Tensor, int]:
    panels = num_points - 1
    weights = [0.5 / panels, *[1 / panels] * (panels - 1), 0.5 / panels]
    return _straight([index / panels for index in range(num_points)], weights, target, points, evaluations)


def _simpson(
    target: Target, points: Sequence[Tensor], evaluations: Sequence[Evaluation], num_points: int
) -> tuple[Tensor, int]:
    panels = num_points - 1
    weights = [1.0, *[4.0, 2.0] * (panels // 2 - 1), 4.0, 1.0]
    nodes = [index / panels for index in range(num_points)]
    return _straight(nodes, [weight / (3 * panels) for weight in weights], target, points, evaluations)


def _gauss(
    target: Target, points: Sequence[Tensor], evaluations: Sequence[Evaluation], num_points: int
) -> tuple[Tensor, int]:
    nodes, weights = np.polynomial.legendre.leggauss(num_points)
    return _straight(((1 + nodes) / 2).tolist(), (weights / 2).tolist(), target, points, evaluations)


def _by_segment(rule: Rule, num_points: int) -> Rule:
    """A rule on every straight segment of the polyline."""

    def along(
        target: Target, points: Sequence[Tensor], evaluations: Sequence[Evaluation], _: int
    ) -> tuple[Tensor, int]:
        parts = [
            rule(target, points[index : index + 2], evaluations[index : index + 2], num_points)
            for index in range(len(points) - 1)
        ]
        return torch.stack([value for value, _ in parts]).sum(0), sum(extra for _, extra in parts)

    return along


def _curve_newton(
    target: Target, points: Sequence[Tensor], evaluations: Sequence[Evaluation], num_points: int
) -> tuple[Tensor, int]:
    """Parabolas through each three successive points and through their scores, averaged where they overlap.

    For three points it is Simpson's rule with the tangents of the parabola. Higher degrees do worse: at the steps of a
    sampler the score is far from a polynomial along the path.
    """
    if len(points) == 2:
        return _trapezoid(target, points, evaluations, 2)
    steps = [end - start for start, end in pairwise(points)]
    lines = [_line(evaluation) for evaluation in evaluations]
    last = len(points) - 3
    total = torch.zeros_like(points[0])
    for index in range(last + 1):
        s0, s1, s2 = lines[index : index + 3]
        d0, d1 = steps[index : index + 2]
        before = (6 * s0 + 7 * s1 - s2) * d0 + (s1 - s0) * d1
        after = (6 * s2 + 7 * s1 - s0) * d1 + (s1 - s2) * d0
        # The first and the last segment lie on one parabola, the others on two.
        total = total + (1.0 if index == 0 else 0.5) * before + (1.0 if index == last else 0.5) * after
    return total.reshape(len(total), -1).sum(1) / 12, 0


def _exact(
    target: Target, points: Sequence[Tensor], evaluations: Sequence[Evaluation], num_points: int
) -> tuple[Tensor, int]:
    raise ProblemError(_INEXACT)


RULES: dict[str, Rule] = {
    "trapezoid": _trapezoid,
    "simpson": _simpson,
    "gauss": _gauss,
    # On a leapfrog trajectory this and the change of kinetic energy add up to h^2/8 (|s_0|^2 - |s_L|^2), of the order
    # of the energy error that they are meant to measure.
    "curve": _by_segment(_trapezoid, 2),
    "curve-simpson": _by_segment(_simpson, 3),
    "curve-newton": _curve_newton,
    "exact": _exact,
}
