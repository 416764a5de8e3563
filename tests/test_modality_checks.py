"""Verdicts on copies, on luck, and on the order of rows; measures where nothing can be measured."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from probmodels import diagnose, fit_svi
from probmodels.datasets import load
from probmodels.datasets.paired.views import make_views
from probmodels.errors import ResultError
from probmodels.modality_structure import information_bound, information_rows, make_problem, measure, modality_gap
from probmodels.modality_structure.checks import _by_heart, _copied, _in_order, _informed


def unit(rng: np.random.Generator, rows: int, size: int = 8) -> Any:
    z = rng.normal(size=(rows, size))
    return z / np.linalg.norm(z, axis=1, keepdims=True)


@pytest.mark.parametrize("jitter", [0.0, 1e-6])
def test_noise_whose_rows_held_out_are_copies_fails(jitter: float) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 100, 6))
    split = np.repeat(["train", "test"], 100)
    views = {"a": np.concatenate([a, a[::-1]]), "b": np.concatenate([b, b[::-1]])}
    views = {name: view + jitter * rng.normal(size=view.shape) for name, view in views.items()}
    problem = make_problem(make_views(views, split=split), size=8, hidden=64)
    report = diagnose(fit_svi(problem, num_steps=150, lr=0.01, num_samples=10, progress=False))
    assert report.model == "failed", str(report)
    assert [finding.verdict[:50] for finding in report.findings if finding.harmful] == [
        "100 of 100 rows held out (100.0%) are copies of ro"
    ]
    assert "hold out groups of equal rows with split" in str(report)


def test_copies_are_of_all_modalities_of_one_row() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(size=(80, 3))
    words = np.array([f"{one} {two}" for one, two in rng.choice(list("abcdefghijklmnop"), size=(80, 2))])
    split = np.repeat(["train", "test"], 40)
    a[40:], words[40:] = a[:40], np.roll(words[:40], 1)  # each is of a row to learn from, but of another
    present = np.ones((80, 2), dtype=bool)
    assert not list(_copied(make_views({"a": a, "text": words}, split=split, present=present)))
    words[40] = words[0]
    (note,) = _copied(make_views({"a": a, "text": words}, split=split, present=present))
    assert not note.harmful
    assert "1 of 40" in note.verdict
    words[41] = words[1]
    present[42, 1] = False  # what it has is of row 2
    (found,) = _copied(make_views({"a": a, "text": words}, split=split, present=present))
    assert found.harmful
    assert "3 of 40" in found.verdict
    present[2, 0] = False
    (found,) = _copied(make_views({"a": a, "text": words}, split=split, present=present))
    assert "2 of 40" in found.verdict


def test_halves_of_digits_are_no_copies() -> None:
    assert not list(_copied(load("digit_halves")))


def test_information_by_luck_is_not_enough() -> None:
    rng = np.random.default_rng(0)
    bounds, passed = [], 0
    for _ in range(120):
        gained = information_rows(unit(rng, 60) @ unit(rng, 60).T / 5.0)
        bounds.append(float(gained.mean()))
        passed += not _informed("a and b", gained).harmful
    assert np.mean(np.array(bounds) > 0) > 0.25
    assert passed <= 2
    z = unit(rng, 60)
    logits = z @ z.T / 0.2
    assert information_bound(logits) == pytest.approx(information_rows(logits).mean())
    found = _informed("a and b", information_rows(logits))
    assert not found.harmful
    assert "cannot exceed log 60" in found.verdict


def test_rows_are_not_learned_by_heart_where_fitted_ones_hold_nothing() -> None:
    noise = np.random.default_rng(0).normal(size=60)
    noise -= noise.mean()
    assert not list(_by_heart("a and b", 1e-5 + 1e-7 * noise, 1e-3 + 1e-7 * noise))  # all views at one point
    assert not list(_by_heart("a and b", 0.1 + noise, 0.4 + noise))
    (note,) = _by_heart("a and b", 0.5 + 0.3 * noise, 2.0 + 0.3 * noise)
    assert "2.00 nats in 60 fitted rows, far above those held out" in note.verdict


def test_the_gap_of_what_is_not_finite_is_an_error_of_the_project() -> None:
    z = np.eye(3)
    with pytest.raises(ResultError, match="1 embeddings are not finite"):
        modality_gap(z, np.where(z > 0, [1.0, 1.0, np.nan], z))


@pytest.mark.parametrize("label", [np.zeros(60, dtype=int), np.arange(60)])
def test_clusters_of_one_class_or_of_as_many_as_rows_are_not_measured(label: Any) -> None:
    rng = np.random.default_rng(0)
    data = make_views({name: rng.normal(size=(60, 3)) for name in "ab"}, label=label, held_out=0.4)
    result = fit_svi(make_problem(data, size=3, hidden=8), num_steps=2, num_samples=2, progress=False)
    assert measure(result)[["v_measure", "ari"]].isna().all(axis=None)


def test_rows_that_follow_each_other_are_said_unless_blocks_are_held_out() -> None:
    rng = np.random.default_rng(0)
    walks = {name: rng.normal(size=(200, 3)).cumsum(0) for name in "ab"}
    split = np.where(rng.random(200) < 0.3, "test", "train")
    (note,) = _in_order(make_views(walks, split=split))
    assert not note.harmful
    assert "in a, b," in note.verdict
    assert "hold out blocks with split" in note.advice
    assert not list(_in_order(make_views(walks, split=np.repeat(["train", "test"], [140, 60]))))
    words = [f"word{round(one)} some" for one in walks["b"][:, 0]]
    assert list(_in_order(make_views({"a": walks["a"], "text": words}, split=split)))
    mixed = rng.permutation(200)
    assert not list(_in_order(make_views({name: walk[mixed] for name, walk in walks.items()}, split=split)))
    assert not list(_in_order(make_views(walks | {"b": walks["b"][mixed]}, split=split)))  # in one modality alone


def test_rows_in_no_order_are_not_said_to_follow_each_other() -> None:
    assert not list(_in_order(load("digit_halves")))
    for seed in range(20):
        a, b = np.random.default_rng(seed).normal(size=(2, 60, 4))
        assert not list(_in_order(make_views({"a": a, "b": b})))
