"""Verdicts on class probabilities: what is right passes, guesses, false certainty and too few units do not."""

from __future__ import annotations

import numpy as np
import pytest

from probmodels.edges.checks import judge_classes
from probmodels.inference.diagnostics.findings import Finding


def judged(probability: np.ndarray, y: np.ndarray) -> list[Finding]:
    shares = np.full(probability.shape[1], 1 / probability.shape[1])
    return list(judge_classes(probability, y, shares, units="graphs", advice="take more steps"))


def simulated(size: int, seed: int, sureness: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    """Class probabilities of three classes, and classes that have them."""
    rng = np.random.default_rng(seed)
    probability = rng.dirichlet(np.full(3, sureness), size)
    return probability, (rng.random((size, 1)) > probability.cumsum(1)[:, :2]).sum(1)


def test_right_probabilities_pass() -> None:
    harmful = [sum(finding.harmful for finding in judged(*simulated(100, seed))) for seed in range(300)]
    # The limit is two standard errors and 0.1 nats: at most 0.6 % of right probabilities fail, 300 x 0.006 + 3 sd.
    assert sum(harmful) <= 6
    assert all(finding.judged for finding in judged(*simulated(100, 0)))


@pytest.mark.parametrize("power", [4.0, 20.0])
def test_probabilities_that_are_too_sure_fail(power: float) -> None:
    probability, y = simulated(150, 1)
    sharp = probability**power / (probability**power).sum(1, keepdims=True)
    _, calibrated = judged(sharp, y)
    assert calibrated.harmful
    assert "too sure" in calibrated.verdict


def test_probabilities_that_are_not_sure_enough_are_said() -> None:
    probability, y = simulated(300, 2, sureness=0.1)
    flat = probability**0.2 / (probability**0.2).sum(1, keepdims=True)
    _, calibrated = judged(flat, y)
    assert not calibrated.harmful
    assert "not sure enough" in calibrated.verdict
    assert calibrated.advice


@pytest.mark.parametrize("sureness", [0.5, 1e4])
def test_guesses_fail(sureness: float) -> None:
    """Probabilities of other units, and the same ones for all."""
    probability, y = simulated(150, 3, sureness)
    learned, _ = judged(np.roll(probability, 1, axis=0), y)
    assert learned.harmful
    assert learned.advice == "take more steps"


def test_few_units_are_not_judged() -> None:
    assert [finding.judged for finding in judged(*simulated(9, 4))] == [False]
    probability, y = simulated(20, 5, 1e4)
    learned, _ = judged(probability, y)
    assert not learned.judged
    assert not learned.harmful
