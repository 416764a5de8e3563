"""The report of fidelity: fresh samples are not told apart, and copies, noise and missing classes are."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from scipy import stats
from sklearn.linear_model import LogisticRegression

from probmodels.errors import DiagnosticsError
from probmodels.inference import fidelity, fidelity_table

DIMENSION = 4
LINEAR = LogisticRegression()


def sets(seed: int, *sizes: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Sets of points around three centres, and their classes."""
    rng = np.random.default_rng(seed)
    labels = [rng.integers(3, size=size) for size in sizes]
    return [5.0 * label[:, None] + rng.normal(size=(len(label), DIMENSION)) for label in labels], labels


def report(synthetic: np.ndarray, label: np.ndarray, seed: int = 0, **options) -> xr.Dataset:
    (train, held_out), (train_label, held_out_label) = sets(seed, 300, 150)
    labels = {"train_label": train_label, "held_out_label": held_out_label, "synthetic_label": label}
    return fidelity(synthetic, train, held_out, **labels, **{"classifier": LINEAR, **options})


def training(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    (train, _), (label, _) = sets(seed, 300, 150)
    return train, label


def test_fresh_samples_have_uniform_pvalues_and_intervals_that_hold() -> None:
    rows = []
    for seed in range(40):
        (synthetic, train, held_out), _ = sets(100 + seed, 120, 150, 100)
        rows.append(fidelity(synthetic, train, held_out, classifier=LINEAR, num_permutations=99, seed=seed))
    found = xr.concat(rows, "repeat").isel({"class": 0})
    for name in ("memorised", "coverage", "accuracy"):
        pvalue = found[f"{name}_pvalue"].values
        # p-values of counts are no smaller than uniform ones.
        assert stats.kstest(pvalue, "uniform", alternative="greater").pvalue > 0.01, name
    assert stats.kstest(found["memorised_pvalue"].values, "uniform").pvalue > 0.01
    for name, truth in {"memorised": 0.0, "closer": 0.5, "accuracy": 0.5}.items():
        values = found[name].values
        assert abs(values.mean() - truth) < 4 * values.std(ddof=1) / np.sqrt(len(values)), name
    gap = (found["coverage"] - found["coverage_expected"]).values
    assert abs(gap.mean()) < 4 * gap.std(ddof=1) / np.sqrt(len(gap))
    for name, truth in {"memorised": 0.0, "accuracy": 0.5}.items():
        inside = ((found[f"{name}_low"] <= truth) & (truth <= found[f"{name}_high"])).sum()
        assert int(inside) >= stats.binom.ppf(1e-3, len(rows), 0.95), name


def test_coverage_of_fresh_samples_is_known() -> None:
    # Of the 3 nearest of 6 + 4 samples all are training samples with chance 6/10 5/9 4/8.
    rng = np.random.default_rng(0)
    found = [
        fidelity(*(rng.normal(size=(size, 2)) for size in (4, 6, 3)), neighbours=3, num_permutations=19)
        for _ in range(100)
    ]
    coverage = np.array([float(one["coverage"][0]) for one in found])
    assert float(found[0]["coverage_expected"][0]) == pytest.approx(1 - 6 * 5 * 4 / (10 * 9 * 8))
    assert abs(coverage.mean() - 5 / 6) < 4 * coverage.std(ddof=1) / np.sqrt(len(coverage))


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_copies_are_found_and_their_share_is_estimated(share: float) -> None:
    (fresh,), (label,) = sets(7, 300)
    train, train_label = training()
    copied = np.random.default_rng(0).random(300) < share
    synthetic = np.where(copied[:, None], train + 0.01, fresh)
    found = report(synthetic, np.where(copied, train_label, label)).sel({"class": "all"})
    assert float(found["memorised_pvalue"]) < 0.005
    assert float(found["memorised_low"]) <= copied.mean() <= float(found["memorised_high"])
    # Meehan's statistic: distances of copies are below all others.
    assert float(found["closer"]) == pytest.approx(copied.mean() + (1 - copied.mean()) / 2, abs=0.06)


def test_averages_are_close_to_training_samples_without_being_copies() -> None:
    (other,), (label,) = sets(8, 2000)
    means = np.stack([other[label == name].mean(0) for name in range(3)])
    chosen = np.arange(300) % 3
    synthetic = means[chosen] + 0.2 * np.random.default_rng(0).normal(size=(300, DIMENSION))
    found = report(synthetic, chosen).sel({"class": "all"})
    assert float(found["closer_low"]) > 0.6
    assert float(found["memorised_pvalue"]) > 0.01
    assert float(found["coverage_pvalue"]) < 0.005  # they do not vary


def test_noise_is_told_apart_in_every_class() -> None:
    label = np.arange(300) % 3
    noise = np.random.default_rng(0).uniform(-20, 30, size=(300, DIMENSION))
    found = report(noise, label, classifier=None)
    assert (found["accuracy_low"] > 0.5).all()
    assert (found["accuracy_pvalue"] < 1e-4).all()


def test_labels_that_are_swapped_are_told_apart_though_all_samples_together_are_right() -> None:
    (fresh,), (label,) = sets(9, 300)
    right, wrong = (report(fresh, one, classifier=None) for one in (label, (label + 1) % 3))
    assert float(wrong["accuracy"][0]) > 0.9 > float(right["accuracy"][0])
    assert (wrong["coverage"][1:] < 0.1).all()
    assert (right["coverage"][1:] > 0.8).all()
    assert float(wrong["coverage"][0]) == float(right["coverage"][0])


def test_a_missing_class_is_seen_by_coverage() -> None:
    (fresh,), (label,) = sets(10, 600)
    kept = label != 1
    found = report(fresh[kept], label[kept])
    assert float(found["coverage"].sel({"class": "1"})) == 0.0
    assert float(found["coverage_high"].sel({"class": "1"})) < 0.15
    assert np.isnan(found["accuracy"].sel({"class": "1"}))
    assert int(found["num_synthetic"].sel({"class": "1"})) == 0
    assert float(found["coverage_pvalue"].sel({"class": "all"})) < 0.005
    assert float(found["accuracy_pvalue"].sel({"class": "all"})) > 0.01  # classes that there are, are right


def test_equal_distances_favour_neither_set() -> None:
    # Every sample occurs in both sets, so that each nearest neighbour is tied.
    point = np.random.default_rng(0).integers(2, size=(200, 3)).astype(float)
    found = fidelity(point, point, point, classifier=LINEAR).sel({"class": "all"})
    assert float(found["memorised_low"]) < 0 < float(found["memorised_high"])
    assert float(found["closer"]) == 0.5


def test_the_table_has_a_row_of_text_for_each_class() -> None:
    train, label = training()
    table = fidelity_table(report(train[label != 2], label[label != 2]))
    assert list(table.index) == ["all", "0", "1", "2"]
    assert table.loc["2", "memorised"] == "-"
    assert table.loc["2", "coverage"].startswith("0.00 (0.00 to ")
    assert table.loc["all", "memorised"].startswith("1.00 (")
    with pytest.raises(DiagnosticsError, match="no report of fidelity"):
        fidelity_table(xr.Dataset({"memorised": 1.0}))


def test_what_does_not_fit_is_refused() -> None:
    (one, two, three), (a, b, c) = sets(0, 20, 30, 40)
    labels = {"synthetic_label": a, "train_label": b, "held_out_label": c}
    for given, message in (
        ({"train_label": b}, "synthetic_label, held_out_label is not given"),
        ({**labels, "held_out_label": c[:-1]}, r"held_out_label of shape \(39,\) for 40 samples"),
        ({**labels, "synthetic_label": np.full(20, 7)}, "synthetic samples of class '7'"),
        ({**labels, "train_label": np.full(30, "all")}, "a class 'all'"),
    ):
        with pytest.raises(DiagnosticsError, match=message):
            fidelity(one, two, three, **given)
    with pytest.raises(DiagnosticsError, match="events differ in size"):
        fidelity(one[:, :2], two, three)
    with pytest.raises(DiagnosticsError, match="held_out has shape"):
        fidelity(one, two, three[:0])
