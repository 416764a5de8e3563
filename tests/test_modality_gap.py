"""The gap between modalities before and after it is closed, and clusters against classes."""

from __future__ import annotations

import math

import numpy as np
import pytest

from probmodels import Result, fit_svi
from probmodels.datasets.paired.views import make_views
from probmodels.errors import ResultError
from probmodels.modality_structure import close_gap, embed, make_problem, measure
from probmodels.modality_structure.measures import information_bound, shared_rows


@pytest.fixture(scope="module")
def result() -> Result:
    rng = np.random.default_rng(0)
    label = rng.integers(0, 3, 300)
    shared = 4.0 * np.eye(3)[label] + rng.normal(size=(300, 3))
    a, b = rng.normal(size=(2, 3, 6))
    views = {"image": shared @ a, "text": shared @ b + 0.2 * rng.normal(size=(300, 6))}
    present = rng.random((300, 2)) < np.array([1.0, 0.9])
    data = make_views(views, present=present, label=label, held_out=0.3)
    problem = make_problem(data, size=4, hidden=32)
    return fit_svi(problem, num_steps=60, lr=0.005, num_samples=10, progress=False)


def test_closing_takes_the_centroids_together_by_rows_to_learn_from(result: Result) -> None:
    before, after = (measure(result, closed=closed).set_index("split") for closed in (False, True))
    assert after["gap_centroid"].loc["train"] < 0.1 * before["gap_centroid"].loc["train"]
    assert after["gap_centroid"].loc["test"] < before["gap_centroid"].loc["test"]
    assert after["gap_centroid"].loc["train"] < after["gap_centroid"].loc["test"]  # of rows that it has not seen
    assert (after["N"] == before["N"]).all()
    assert after.loc["train", "loss"] == pytest.approx(
        math.log(after.loc["train", "N"]) - after.loc["train", "information"]
    )
    known, closed, raw = embed(result, "train"), close_gap(result), embed(result)
    seen = known.present["text"]
    expected = raw.z["text"] - known.z["text"][seen].mean(0)
    np.testing.assert_allclose(closed.z["text"] * np.linalg.norm(expected, axis=1, keepdims=True), expected)
    assert not np.allclose(expected, raw.z["text"] - known.z["text"].mean(0))  # rows that lack it do not count


def test_the_temperature_of_closed_embeddings_is_the_best_of_rows_to_learn_from(result: Result) -> None:
    closed = close_gap(result, "train")
    z, other = shared_rows(closed, "image", "text")
    bounds = [information_bound(z @ other.T / (closed.temperature * factor)) for factor in (0.9, 1.0, 1.1)]
    assert bounds[1] > max(bounds[0], bounds[2])


def test_clusters_agree_with_classes_and_not_with_shuffled_ones(result: Result) -> None:
    test = measure(result, closed=True).set_index("split").loc["test"]
    assert test["v_measure"] > 0.6
    assert test["ari"] > 0.6
    other = result.tree.copy(deep=True)
    labels = other["constant_data"]["label"]
    rng = np.random.default_rng(0)
    other["constant_data"]["label"] = labels.copy(data=rng.permutation(labels.values))
    test = measure(Result(other, guide_state=result.guide_state), closed=True).set_index("split").loc["test"]
    assert test["v_measure"] < 0.1
    assert abs(test["ari"]) < 0.1


def test_only_results_of_the_method_have_a_gap() -> None:
    with pytest.raises(ResultError, match="result"):
        close_gap("no result")  # type: ignore[arg-type]
