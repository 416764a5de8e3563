"""Agreement of samples with a reference: closed forms, invariances, tests under the null, and what is refused."""

from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest
import torch
import xarray as xr
from scipy import special, stats
from sklearn.dummy import DummyClassifier

from probmodels.errors import DiagnosticsError
from probmodels.inference import (
    classifier_two_sample,
    compare_samples,
    energy_distance,
    mmd,
    permutation_pvalues,
    sliced_wasserstein,
    wasserstein,
)
from probmodels.inference.metrics import samples as sample_quality

METRICS = [energy_distance, mmd, sliced_wasserstein, wasserstein]


def normals(rng, *shape, shift=0.0):
    return rng.normal(size=shape) + shift


def brute_force(x, y):
    """Squared 2-Wasserstein distance of two small sets of equal size, over all assignments."""
    orders = itertools.permutations(range(len(y)))
    return min(np.mean(np.sum((x - y[list(order)]) ** 2, axis=1)) for order in orders)


def folded_normal_mean(mean, sd):
    gaussian = sd * np.sqrt(2 / np.pi) * np.exp(-(mean**2) / (2 * sd**2))
    return gaussian + mean * special.erf(mean / (sd * np.sqrt(2)))


def within_error(values, expected):
    """Whether the mean of independent estimates is the expected one, within 4 standard errors."""
    return abs(np.mean(values) - expected) < 4 * np.std(values, ddof=1) / np.sqrt(len(values))


@pytest.mark.parametrize("shift", [0.0, 0.7])
def test_energy_distance_of_normals_is_the_closed_form_on_average(shift):
    rng = np.random.default_rng(0)
    found = [energy_distance(normals(rng, 80), normals(rng, 120, shift=shift)) for _ in range(200)]
    sd = np.sqrt(2)
    expected = 2 * folded_normal_mean(shift, sd) - 2 * folded_normal_mean(0.0, sd)
    assert within_error(found, expected)
    if shift:
        assert np.mean(found) > 10 * np.std(found) / np.sqrt(len(found))  # the closed form is told apart from 0


@pytest.mark.parametrize("shift", [0.0, 0.5])
@pytest.mark.parametrize("bandwidth", [0.8, (0.5, 1.0, 3.0)])
def test_mmd_of_normals_is_the_closed_form_on_average(shift, bandwidth):
    rng = np.random.default_rng(1)
    found = [mmd(normals(rng, 60, 3), normals(rng, 90, 3, shift=shift), bandwidth) for _ in range(200)]
    expected = 0.0
    for width in np.ravel(bandwidth):
        same = (width**2 / (width**2 + 2)) ** (3 / 2)
        apart = same * np.exp(-3 * shift**2 / (2 * (width**2 + 2)))
        expected += 2 * (same - apart) / np.size(bandwidth)
    assert within_error(found, expected)


def test_energy_distance_is_that_of_scipy_but_for_the_pairs_of_a_sample_with_itself():
    rng = np.random.default_rng(2)
    x, y = normals(rng, 30), normals(rng, 20, shift=1.0)
    bias = sum(np.abs(z[:, None] - z).mean() / (len(z) - 1) for z in (x, y))  # of means over all pairs
    assert energy_distance(x, y) == pytest.approx(stats.energy_distance(x, y) ** 2 - bias, rel=1e-9)


def test_the_median_distance_is_the_default_bandwidth():
    rng = np.random.default_rng(3)
    x, y = normals(rng, 15, 2), normals(rng, 20, 2)
    pooled = np.concatenate([x, y])
    distances = np.sqrt(((pooled[:, None] - pooled) ** 2).sum(-1))[np.triu_indices(35, 1)]
    assert mmd(x, y) == pytest.approx(mmd(x, y, np.median(distances)), abs=1e-12)
    assert mmd(5 * x, 5 * y) == pytest.approx(mmd(x, y), abs=1e-12)  # free of units


def test_wasserstein_of_a_shifted_set_is_the_length_of_the_shift():
    rng = np.random.default_rng(4)
    x, shift = normals(rng, 50, 3), np.array([1.0, -2.0, 0.5])
    assert wasserstein(x, x[::-1] + shift) == pytest.approx(np.linalg.norm(shift), rel=1e-9)
    assert wasserstein(x[:, 0], x[:, 0] - 0.3) == pytest.approx(0.3, rel=1e-9)
    assert wasserstein(x, x[::-1]) == pytest.approx(0.0, abs=1e-9)


def test_wasserstein_is_the_best_of_all_assignments():
    rng = np.random.default_rng(5)
    x, y = normals(rng, 6, 2), normals(rng, 6, 2)
    assert wasserstein(x, y) ** 2 == pytest.approx(brute_force(x, y), rel=1e-9)
    x, y = normals(rng, 6, 1), normals(rng, 3, 1)
    assert wasserstein(x, y) ** 2 == pytest.approx(brute_force(x, np.repeat(y, 2, axis=0)), rel=1e-9)


def test_wasserstein_of_different_sizes_is_that_of_equal_weights():
    pytest.importorskip("ot", reason="POT is not installed")
    rng = np.random.default_rng(6)
    x, y = normals(rng, 6, 2), normals(rng, 3, 2)
    assert wasserstein(x, y) ** 2 == pytest.approx(brute_force(x, np.repeat(y, 2, axis=0)), rel=1e-9)
    padded = [np.column_stack([z[:, 0], np.zeros(len(z))]) for z in (x[:5], y)]  # by POT, and by quantiles below
    assert wasserstein(*padded) == pytest.approx(wasserstein(x[:5, 0], y[:, 0]), rel=1e-9)


def test_normals_of_one_dimension_are_as_far_apart_as_in_closed_form():
    x, y = np.random.default_rng(7).normal(size=(2, 20_000))
    found = wasserstein(0.5 + x, 2.0 * y)
    error = 4 * np.sqrt((2**2 + 1) / 20_000)  # of the difference of means; that of sds is smaller
    assert found == pytest.approx(np.hypot(0.5, 2.0 - 1.0), abs=error)


def test_sliced_wasserstein_of_a_shifted_set_is_the_shift_seen_from_random_directions():
    rng = np.random.default_rng(8)
    d, count = 6, 2000
    x, shift = normals(rng, 40, d), np.linspace(0.5, 1.5, d)
    squared = sliced_wasserstein(x, rng.permutation(x) + shift, num_projections=count, seed=1) ** 2
    error = np.sqrt(2 * (d - 1) / (d**2 * (d + 2)) / count)  # of the mean square of an entry of a unit vector
    assert abs(squared / (shift @ shift) - 1 / d) < 4 * error


def test_sliced_wasserstein_of_different_sizes_weighs_samples_alike():
    rng = np.random.default_rng(9)
    x, y = normals(rng, 4, 2), normals(rng, 6, 2)
    repeated = sliced_wasserstein(np.repeat(x, 3, axis=0), np.repeat(y, 2, axis=0), seed=2)
    assert sliced_wasserstein(x, y, seed=2) == pytest.approx(repeated, rel=1e-9)
    assert sliced_wasserstein(x[:, 0], y[:, 0]) == pytest.approx(wasserstein(x[:, 0], y[:, 0]), rel=1e-9)
    assert sliced_wasserstein(x, y, seed=2) != sliced_wasserstein(x, y, seed=3)


@pytest.mark.parametrize("metric", METRICS)
def test_neither_order_nor_place_nor_side_matters(metric):
    rng = np.random.default_rng(10)
    x, y = normals(rng, 30, 2, 2), normals(rng, 30, 2, 2, shift=0.3)
    found = metric(x, y)
    assert metric(rng.permutation(x), rng.permutation(y)) == pytest.approx(found, rel=1e-9, abs=1e-12)
    assert metric(y, x) == pytest.approx(found, rel=1e-9, abs=1e-12)
    assert metric(x + 1e6, y + 1e6) == pytest.approx(found, rel=1e-6, abs=1e-8)  # the sums lose digits, no more
    assert metric(torch.tensor(x).requires_grad_(), xr.DataArray(y)) == pytest.approx(found, rel=1e-9, abs=1e-12)
    assert metric(x.reshape(30, 4), y) == pytest.approx(found, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("metric", [energy_distance, mmd, sliced_wasserstein])
def test_blocks_change_nothing_and_bound_what_is_held_at_once(metric, monkeypatch):
    rng = np.random.default_rng(11)
    x, y = normals(rng, 53, 40), normals(rng, 31, 40)
    found, sizes, cdist = metric(x, y), [], torch.cdist
    monkeypatch.setattr(sample_quality, "_BLOCK", 200)
    monkeypatch.setattr(torch, "cdist", lambda *sets: sizes.append(cdist(*sets).numel()) or cdist(*sets))
    assert metric(x, y) == pytest.approx(found, rel=1e-9)
    assert max(sizes, default=0) <= 200


def test_a_classifier_guesses_between_equal_sets_and_knows_separated_ones():
    rng = np.random.default_rng(12)
    x = normals(rng, 500, 2)
    equal = classifier_two_sample(x, normals(rng, 500, 2), seed=1)
    assert abs(equal.accuracy - 0.5) < 4 * 0.5 / np.sqrt(500)
    assert equal.se == pytest.approx(np.sqrt(equal.accuracy * (1 - equal.accuracy) / 500))
    shifted = normals(rng, 500, 2, shift=6.0)
    apart = classifier_two_sample(x, shifted, seed=1)
    assert apart.accuracy > 0.99
    assert apart.pvalue < 1e-10
    assert apart == classifier_two_sample(x, shifted, seed=1)


def test_a_classifier_sees_what_moments_of_single_entries_do_not():
    rng = np.random.default_rng(13)
    x = normals(rng, 800, 2)
    y = np.column_stack([x[:, 0], 0.8 * x[:, 0] + 0.6 * normals(rng, 800)])  # standard normal entries, correlated
    assert classifier_two_sample(x, y).pvalue < 1e-3


def test_a_larger_set_gives_guessing_no_advantage():
    rng = np.random.default_rng(14)
    found = classifier_two_sample(normals(rng, 1000), normals(rng, 60), classifier=DummyClassifier())
    assert found.accuracy == 0.5
    assert found.pvalue > 0.5


def test_pvalues_of_the_classifier_are_not_too_small_under_the_null():
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(15)
    tests = [
        classifier_two_sample(normals(rng, 60, 2), normals(rng, 60, 2), seed=s, classifier=LogisticRegression())
        for s in range(200)
    ]
    rejected = np.mean([test.pvalue < 0.1 for test in tests])
    assert rejected < 0.1 + 4 * np.sqrt(0.1 * 0.9 / 200)


def test_permutation_pvalues_are_uniform_under_the_null():
    rng = np.random.default_rng(16)
    found = [
        permutation_pvalues(normals(rng, 12, 2), normals(rng, 18, 2), num_permutations=99, seed=s) for s in range(200)
    ]
    for name in ("energy_distance", "mmd"):
        values = np.array([pvalues[name] for pvalues in found])
        assert values.min() >= 0.01  # the sets as they are count
        assert stats.kstest(values - 0.005, "uniform").pvalue > 0.01  # the middle of steps of 0.01


def test_permutation_pvalues_are_small_for_sets_that_differ_and_large_for_equal_ones():
    rng = np.random.default_rng(17)
    x = normals(rng, 40, 2)
    apart = permutation_pvalues(x, normals(rng, 40, 2, shift=1.5), num_permutations=199)
    assert apart == {"energy_distance": 1 / 200, "mmd": 1 / 200}
    assert permutation_pvalues(x, x, num_permutations=199, metrics=["mmd"])["mmd"] > 0.9


def test_permutation_pvalues_rank_the_metrics_themselves():
    rng = np.random.default_rng(18)
    pooled = normals(rng, 5, 2)
    for bandwidth, metric in ((None, energy_distance), (1.5, lambda x, y: mmd(x, y, 1.5))):
        observed = metric(pooled[:2], pooled[2:])
        every = []
        for chosen in itertools.combinations(range(5), 2):
            rest = [i for i in range(5) if i not in chosen]
            every.append(metric(pooled[list(chosen)], pooled[rest]) >= observed - 1e-12)
        name = "energy_distance" if bandwidth is None else "mmd"
        options = {"metrics": [name], "bandwidth": bandwidth, "num_permutations": 4000}
        found = permutation_pvalues(pooled[:2], pooled[2:], **options)[name]
        share = np.mean(every)
        assert abs(found - share) < 4 * np.sqrt(share * (1 - share) / 4000) + 1 / 4000


def test_samples_are_compared_beside_a_floor(tmp_path):
    rng = np.random.default_rng(19)
    reference, exact, off = normals(rng, 150, 2), normals(rng, 150, 2), normals(rng, 150, 2, shift=0.8)
    names = ["energy_distance", "mmd", "sliced_wasserstein", "wasserstein", "classifier_two_sample"]
    found = compare_samples(off, reference, metrics=names, floor=exact, num_permutations=99, num_projections=50)
    assert list(found["set"].values) == ["samples", "floor"]
    extra = ["classifier_two_sample_se", *(f"{name}_pvalue" for name in (*names[:2], names[-1]))]
    assert set(found.data_vars) == {"num_samples", *names, *extra}
    for name in names:
        assert float(found[name].sel(set="samples")) > float(found[name].sel(set="floor")), name
    for name in (*names[:2], names[-1]):
        assert float(found[f"{name}_pvalue"].sel(set="samples")) <= 0.01
        assert float(found[f"{name}_pvalue"].sel(set="floor")) > 0.01
    assert all(found[name].attrs["long_name"] for name in found.data_vars)
    assert float(found["mmd"][1]) == pytest.approx(mmd(exact, reference, found.attrs["bandwidth"]), abs=1e-12)
    assert float(found["wasserstein"][0]) == pytest.approx(wasserstein(off, reference))
    assert float(found["sliced_wasserstein"][0]) == pytest.approx(sliced_wasserstein(off, reference, 50))
    assert found.attrs["num_reference"] == 150
    found.to_netcdf(tmp_path / "found.nc")
    with xr.open_dataset(tmp_path / "found.nc") as loaded:
        xr.testing.assert_allclose(loaded.load(), found)


def test_the_bandwidth_of_a_comparison_is_of_the_reference_alone():
    rng = np.random.default_rng(20)
    reference, x = normals(rng, 50, 2), normals(rng, 50, 2)
    near, far = (compare_samples(x + shift, reference, metrics=["mmd"]) for shift in (0.0, 30.0))
    assert near.attrs["bandwidth"] == far.attrs["bandwidth"]
    assert list(near["set"].values) == ["samples"]
    assert set(near.data_vars) == {"num_samples", "mmd"}


ROWS = np.random.default_rng(21).normal(size=(30, 3))


@pytest.mark.parametrize("metric", [*METRICS, classifier_two_sample, permutation_pvalues, compare_samples])
@pytest.mark.parametrize(
    ("x", "said"),
    [
        (ROWS[:, :2], "differ in size"),
        (ROWS[:1], "at least 2 samples"),
        (np.array(1.0), "at least 2 samples"),
        (ROWS[:, :0], "at least 2 samples"),
        (np.where(ROWS > 1.5, np.nan, ROWS), "not finite"),
        (np.where(ROWS > 1.5, np.inf, ROWS), "not finite"),
    ],
)
def test_sets_that_cannot_be_compared_are_refused(metric, x, said):
    for sets in ((x, ROWS), (ROWS, x)):
        with pytest.raises(DiagnosticsError, match=said):
            metric(*sets)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: mmd(ROWS, ROWS, 0.0), "above 0"),
        (lambda: mmd(ROWS, ROWS, []), "above 0"),
        (lambda: mmd(np.ones((5, 2)), np.ones((5, 2))), "give a bandwidth"),
        (lambda: sliced_wasserstein(ROWS, ROWS, num_projections=0), "num_projections=0"),
        (lambda: classifier_two_sample(ROWS[:19], ROWS), "needs 20 of each"),
        (lambda: permutation_pvalues(ROWS, ROWS, num_permutations=0), "num_permutations=0"),
        (lambda: permutation_pvalues(ROWS, ROWS, metrics=["wasserstein"]), "energy_distance, mmd"),
        (lambda: compare_samples(ROWS, ROWS, metrics=["fid"]), "wasserstein, classifier_two_sample"),
        (lambda: compare_samples(ROWS, ROWS, metrics="mmd"), "give a list"),
        (lambda: compare_samples(ROWS, ROWS, floor=ROWS[:, :2]), "floor 2 and reference 3"),
        (lambda: compare_samples(ROWS, ROWS, num_permutations=0), "num_permutations=0"),
    ],
)
def test_options_out_of_range_are_refused(call, said):
    with pytest.raises(DiagnosticsError, match=said):
        call()


def test_matrices_that_are_too_large_are_refused_before_anything_is_computed(monkeypatch):
    monkeypatch.setattr(sample_quality, "_WHOLE", 899)
    monkeypatch.setattr(torch, "cdist", None)
    with pytest.raises(DiagnosticsError, match="30 x 30"):
        wasserstein(ROWS, ROWS)
    with pytest.raises(DiagnosticsError, match="60 x 60"):
        permutation_pvalues(ROWS, ROWS)
    for options in ({"metrics": ["mmd", "wasserstein"]}, {"metrics": ["mmd"], "num_permutations": 9}):
        with pytest.raises(DiagnosticsError, match="whole matrix"):
            compare_samples(ROWS, ROWS, **options)
    assert wasserstein(ROWS[:, 0], ROWS[:, 0]) == 0.0  # by quantiles, without a matrix


def test_without_pot_different_sizes_are_refused_with_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ot", None)
    for call in (wasserstein, lambda x, y: compare_samples(x, y, metrics=["mmd", "wasserstein"])):
        with pytest.raises(DiagnosticsError, match=r"pip install probmodels\[ot\]"):
            call(ROWS, ROWS[:20])
    assert wasserstein(ROWS, ROWS) == pytest.approx(0.0, abs=1e-9)
    assert wasserstein(ROWS[:, 0], ROWS[:20, 0]) > 0
