"""Verdicts on causal autoencoders: coverage of labels that were held out, of wide, narrow and exact proposals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import xarray as xr
from scipy.stats import norm
from torch import Tensor

from probmodels import Result, diagnose, fit_svi
from probmodels.causal_vae import check_draws, check_model, make_problem, refine
from probmodels.causal_vae.checks import _coverage
from probmodels.datasets.causal import make_concepts
from probmodels.guides.causal_vae import AbductionGuide, Mechanisms, Proposal


def noisy_pair(num_rows: int, num_test: int, seed: int = 0) -> xr.Dataset:
    """A cause and its effect, seen with an error of sd 1: the posterior sd of each is 0.636."""
    rng = np.random.default_rng(seed)
    count = num_rows + num_test
    a = rng.normal(size=count)
    z = np.stack([a, 0.8 * a + 0.6 * rng.normal(size=count)], 1)
    split = np.where(np.arange(count) < num_rows, "train", "test")
    return make_concepts(z + rng.normal(size=z.shape), z, names=["a", "b"], graph=[["a", "b"]], split=split)


@pytest.fixture(scope="module")
def fit() -> Result:
    problem = make_problem(noisy_pair(1200, 400), mechanism="linear", hidden=16)
    options: dict[str, Any] = {"num_steps": 450, "lr": 0.02, "schedule": "warmup_cosine", "batch_size": 200}
    return fit_svi(problem, **options, num_samples=2, progress=False)


def test_a_fit_whose_intervals_hold_passes(fit: Result) -> None:
    report = diagnose(fit)
    assert report.ok, str(report)
    assert "90% intervals of concepts read in 400 rows held out hold" in str(report)
    assert "too few to judge" not in str(report)  # the weights of the guide are not what counts
    held = fit.rebuild().data
    assert held is not None
    np.testing.assert_allclose(
        held["held_out_label"],
        (noisy_pair(1200, 400)["label"].values[1200:] - held["centre"].values) / held["scale"].values,
    )


def test_proposals_that_are_too_narrow_fail(fit: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    said = AbductionGuide.propose

    def narrow(self: AbductionGuide, observation: Tensor, rows: Any = slice(None)) -> Proposal:
        found = said(self, observation, rows)
        return found._replace(sd=found.sd.clamp(max=0.02))

    monkeypatch.setattr(AbductionGuide, "propose", narrow)
    report = diagnose(fit)
    assert not report.ok
    assert "too few of a, b" in str(report)
    assert "(at least 8" in str(report)  # found and needed
    assert [finding.harmful for finding in check_draws(fit)] == [True, True]


def test_proposals_that_are_too_wide_are_said_to_be(fit: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    said = AbductionGuide.propose

    def wide(self: AbductionGuide, observation: Tensor, rows: Any = slice(None)) -> Proposal:
        found = said(self, observation, rows)
        return found._replace(sd=3 * found.sd)

    monkeypatch.setattr(AbductionGuide, "propose", wide)
    findings = list(check_draws(fit))
    assert not any(finding.harmful for finding in findings)
    assert all("wider than they have to be" in finding.advice for finding in findings)


def test_mechanisms_that_are_too_certain_fail(fit: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [finding.harmful for finding in check_model(fit)] == [False]
    scale = Mechanisms.scale
    monkeypatch.setattr(Mechanisms, "scale", lambda self, i: 0.3 * scale(self, i))
    (finding,) = check_model(fit)
    assert finding.harmful
    assert finding.part == "model"
    assert "of the labels of 'b'" in finding.verdict  # a has no cause


def test_without_labels_held_out_nothing_is_judged() -> None:
    for data, options, words in (
        (noisy_pair(60, 0), {}, "rows with labels were held out"),
        (noisy_pair(60, 29), {}, "rows with labels were held out"),
        (noisy_pair(60, 40), {"label_weight": 0.0}, "which latent is which concept"),
    ):
        problem = make_problem(data, hidden=4, **options)
        result = fit_svi(problem, num_steps=2, num_samples=2, progress=False)
        (finding,) = check_draws(result)
        assert not finding.judged
        assert words in finding.verdict
        assert not diagnose(result).ok
        assert not list(check_model(result))


def test_refined_proposals_are_not_judged_but_their_mechanisms_are(fit: Result) -> None:
    _, refined = refine(fit.rebuild(), fit, num_steps=2, progress=False)
    (finding,) = check_draws(refined)
    assert not finding.judged
    assert "refined" in finding.verdict
    assert [one.verdict for one in check_model(refined)] == [one.verdict for one in check_model(fit)]


def test_many_rows_are_held_out_by_500_and_those_of_other_splits_by_none() -> None:
    data = noisy_pair(50, 1300)
    kept = make_problem(data, hidden=4).data
    assert kept is not None
    assert kept["held_out_observation"].shape == (500, 2)
    test = make_problem(data, hidden=4, split="test").data
    assert test is not None
    assert "held_out_label" not in test


def test_limits_leave_exact_intervals_alone_and_find_others() -> None:
    rng = np.random.default_rng(0)
    names = ["a", "b", "c"]
    exact = [_coverage(rng.uniform(size=(200, 3)), 0.9, names, "", "", "inference").harmful for _ in range(500)]
    assert sum(exact) <= 3  # of 1e-3 in two checks
    # Of normal concepts whose sd is taken for 0.7 of what it is, 90 % intervals hold 75 %.
    places = norm.cdf(rng.normal(size=(50, 200, 3)) / 0.7)
    assert all(_coverage(place, 0.9, names, "", "", "inference").harmful for place in places)
