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
from probmodels.modality_structure.checks import _copied, _informed


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
