"""Latents against concepts: closed forms, latents in any order and with any sign, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

from probmodels.errors import ProblemError
from probmodels.inference.metrics.latents import _concentration, dci, match_latents, r_squared

RNG = np.random.default_rng(0)
CONCEPTS = RNG.normal(size=(400, 3))
TURNED = CONCEPTS[:, [2, 0, 1]] * [-1, 2, 0.5]  # concept 0 is latent 1, concept 1 latent 2, concept 2 latent 0, turned
ROTATION = np.linalg.qr(RNG.normal(size=(3, 3)))[0]
MIXED = CONCEPTS @ ROTATION
NOISE = RNG.normal(size=(400, 3))


# -- linear prediction ------------------------------------------------------------------------------------------------


def test_linear_maps_of_concepts_explain_them() -> None:
    np.testing.assert_allclose(r_squared(TURNED, CONCEPTS), 1)
    np.testing.assert_allclose(r_squared(MIXED, CONCEPTS), 1)


def test_share_explained_is_that_of_the_signal() -> None:
    rng = np.random.default_rng(1)
    concepts = rng.normal(size=(20_000, 2))
    latents = concepts + [1.0, 0.5] * rng.normal(size=concepts.shape)
    # the slope of concept on latent has R^2 1 / (1 + s^2); its standard error is about 2 R (1 - R^2) / sqrt(10,000)
    found, expected = r_squared(latents, concepts).values, np.array([1 / 2, 1 / 1.25])
    assert (abs(found - expected) < 4 * 2 * np.sqrt(expected) * (1 - expected) / 100).all()


def test_nothing_is_explained_by_noise_on_rows_held_out() -> None:
    rng = np.random.default_rng(2)
    found = r_squared(rng.normal(size=(60, 20)), rng.normal(size=(60, 3)), seed=3)
    assert (found < 0).all()  # fitted to 30 rows, 20 latents explain them well


def test_rows_are_held_out_as_told() -> None:
    test = np.arange(400) >= 200
    concepts = CONCEPTS.copy()
    concepts[test] = NOISE[test]  # what was fitted says nothing of these
    assert (r_squared(TURNED, concepts, test=test) < 0.1).all()
    np.testing.assert_allclose(r_squared(TURNED[~test], concepts[~test]), 1)
    slope = np.polyfit(TURNED[~test, 0], NOISE[~test, 0], 1)
    residual = NOISE[test, 0] - np.polyval(slope, TURNED[test, 0])
    expected = 1 - np.mean(residual**2) / NOISE[test, 0].var()
    assert float(r_squared(TURNED[:, :1], NOISE[:, :1], test=test)[0]) == pytest.approx(expected)


def test_rows_without_a_label_are_left_out_for_that_concept() -> None:
    concepts = CONCEPTS.copy()
    concepts[::3, 1] = np.nan
    np.testing.assert_allclose(r_squared(TURNED, concepts), 1)
    assert match_latents(TURNED, concepts)["position"].values.tolist() == [1, 2, 0]


# -- matches ----------------------------------------------------------------------------------------------------------


def test_permuted_and_turned_latents_are_matched_and_said_so() -> None:
    match = match_latents(TURNED, CONCEPTS)
    assert match["position"].values.tolist() == [1, 2, 0]
    np.testing.assert_allclose(match["correlation"], [1, 1, -1])
    assert bool(match["permuted"])
    assert float(match["mcc"]) == pytest.approx(1)
    np.testing.assert_allclose(match["correlations"], np.corrcoef(TURNED.T, CONCEPTS.T)[:3, 3:])
    again = match_latents(TURNED[:, match["position"].values], CONCEPTS)
    assert not bool(again["permuted"])


def test_matches_are_best_together_not_one_by_one() -> None:
    a, b = CONCEPTS[:, 0], CONCEPTS[:, 1]
    concepts = np.stack([a, a + 0.5 * b], axis=1)  # both are closest to the first latent
    latents = np.stack([a + 0.2 * b, NOISE[:, 0] + 2 * a], axis=1)
    match = match_latents(latents, concepts)
    size = abs(match["correlations"].values)
    assert (size.argmax(axis=0) == 0).all()
    assert sorted(match["position"].values.tolist()) == [0, 1]
    expected = max(size[0, 0] + size[1, 1], size[1, 0] + size[0, 1]) / 2
    assert float(match["mcc"]) == pytest.approx(expected)


def test_ranks_see_monotone_relations_in_full() -> None:
    latents = np.exp(3 * TURNED)
    np.testing.assert_allclose(match_latents(latents, CONCEPTS, ranks=True)["correlation"], [1, 1, -1])
    assert float(match_latents(latents, CONCEPTS)["mcc"]) < 0.9


def test_dead_latents_are_matched_last() -> None:
    latents = np.column_stack([np.ones(400), TURNED])
    match = match_latents(latents, CONCEPTS)
    assert match["position"].values.tolist() == [2, 3, 1]
    np.testing.assert_array_equal(match["correlations"][0], 0)


def test_labels_are_kept() -> None:
    latents = xr.DataArray(TURNED.T, {"latent": ["p", "q", "r"]}, ("latent", "data"))
    concepts = xr.DataArray(CONCEPTS, {"concept": ["sun", "pole", "shade"]}, ("data", "concept"))
    match = match_latents(latents, concepts)
    assert match["label"].values.tolist() == ["q", "r", "p"]
    assert match["concept"].values.tolist() == ["sun", "pole", "shade"]
    assert r_squared(latents, concepts)["concept"].values.tolist() == ["sun", "pole", "shade"]
    xr.testing.assert_identical(match.drop_vars(["label", "latent", "concept"]), bare(torch.tensor(TURNED)))


def bare(latents: Any) -> xr.Dataset:
    return match_latents(latents, torch.tensor(CONCEPTS)).drop_vars(["label", "latent", "concept"])


# -- disentanglement --------------------------------------------------------------------------------------------------


def test_concentration_by_hand() -> None:
    weight = np.array([[5.0, 0, 0], [1, 1, 1], [0, 2, 2], [0, 0, 0]])
    np.testing.assert_allclose(_concentration(weight), [1, 0, 1 - np.log(2) / np.log(3), np.nan], atol=1e-12)


@pytest.mark.parametrize("regressor", ["boosting", "forest", "lasso"])
def test_one_latent_for_each_concept_scores_near_one_and_mixtures_do_not(regressor: str) -> None:
    apart, mixed = (dci(latents, CONCEPTS, regressor=regressor) for latents in (TURNED, MIXED))
    for score in ("disentanglement", "completeness"):
        assert float(apart[score]) > 0.9
        assert float(mixed[score]) < 0.7
    assert (apart["importance"].argmax("latent") == [1, 2, 0]).all()
    assert float(apart["informativeness"]) > 0.9


def test_importances_of_a_rotation_by_lasso_are_its_entries() -> None:
    found = dci(MIXED, CONCEPTS, regressor="lasso", test=0.2)
    share = abs(ROTATION.T) / abs(ROTATION.T).sum(axis=0)
    importance = found["importance"].values
    # standardising scales by standard deviations of 320 rows, within 4 / sqrt(2 * 320) = 0.16 of 1
    np.testing.assert_allclose(importance / importance.sum(axis=0), share, atol=0.1)
    expected = 1 + np.sum(share * np.log(share), axis=0) / np.log(3)
    np.testing.assert_allclose(found["concept_completeness"], expected, atol=0.12)
    assert float(found["informativeness"]) > 0.99  # all is known, nothing is apart


def test_disentanglement_and_completeness_differ() -> None:
    concepts = CONCEPTS[:, :2]
    halves = concepts[:, [0, 0, 1]] + 0.3 * NOISE  # the first concept is split over two latents
    split = dci(halves, concepts, regressor="lasso")
    assert float(split["disentanglement"]) > 0.8
    complete = split["concept_completeness"].values
    assert complete[1] > 0.8 > 0.5 > complete[0]


def test_order_signs_and_scales_of_latents_do_not_count() -> None:
    latents = MIXED + 0.1 * NOISE
    one = dci(latents, CONCEPTS, regressor="lasso")
    other = dci(latents[:, [1, 2, 0]] * [3, -1, 0.1], CONCEPTS, regressor="lasso")
    for name in ("disentanglement", "completeness", "informativeness", "concept_completeness"):
        np.testing.assert_allclose(one[name], other[name], atol=1e-3)  # coordinate descent ends within its tolerance


def test_dead_latents_do_not_count() -> None:
    found = dci(np.column_stack([np.ones(400), TURNED]), CONCEPTS)
    assert np.isnan(found["latent_disentanglement"].values[0])
    assert float(found["disentanglement"]) > 0.9


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("latents", "concepts", "options", "says"),
    [
        (TURNED[:, 0], CONCEPTS, {}, "latents have shape"),
        (TURNED, CONCEPTS.astype(str), {}, "concepts have shape"),
        (TURNED[1:], CONCEPTS, {}, "row by row"),
        (TURNED[:, :0], CONCEPTS, {}, "no latent"),
        (np.where(TURNED > 2, np.nan, TURNED), CONCEPTS, {}, "missing"),
        (TURNED, np.where(CONCEPTS > 2, np.inf, CONCEPTS), {}, "infinite"),
        (TURNED, CONCEPTS * [1, 0, 1], {}, "concept 1 has fewer"),
        (TURNED, np.where(np.arange(3) == 2, np.nan, CONCEPTS), {}, "concept 2 has fewer"),
        (
            TURNED,
            np.where(np.arange(400)[:, None] < 200, 0.0, CONCEPTS),
            {"test": np.arange(400) >= 200},
            "rows to fit",
        ),
        (TURNED, CONCEPTS, {"test": np.zeros(400, dtype=bool)}, "held out"),
        (TURNED, CONCEPTS, {"test": np.zeros(400)}, "booleans"),
        (TURNED, CONCEPTS, {"test": 1.5}, "test=1.5"),
    ],
)
def test_refusals(latents: np.ndarray, concepts: np.ndarray, options: dict[str, Any], says: str) -> None:
    for score in (r_squared, dci) if options else (r_squared, dci, match_latents):
        with pytest.raises(ProblemError, match=says):
            score(latents, concepts, **options)


def test_refusals_of_each() -> None:
    with pytest.raises(ProblemError, match="2 latents for 3 concepts"):
        match_latents(TURNED[:, :2], CONCEPTS)
    with pytest.raises(ProblemError, match="one alone"):
        dci(TURNED[:, :1], CONCEPTS)
    with pytest.raises(ProblemError, match="boosting"):
        dci(TURNED, CONCEPTS, regressor="tree")
    with pytest.raises(ProblemError, match="fit a regression on 20"):
        r_squared(np.tile(TURNED[:40], 7)[:, :20], CONCEPTS[:40])
