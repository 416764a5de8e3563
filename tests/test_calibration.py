"""Simulation-based calibration and its variational kin, with negative controls that must fail."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing import get_context

import numpy as np
import pytest
import xarray as xr
from scipy import stats

from probmodels.errors import DiagnosticsError
from probmodels.inference import coverage, sbc, vsbc
from probmodels.inference.diagnostics.calibration import _symmetry


def simulate(rng):
    mu = rng.normal(size=2)
    return {"mu": mu}, mu + rng.normal(size=2)


def infer(data, seed, spread=0.5**0.5, shift=0.0):
    draws = data / 2 + shift + spread * np.random.default_rng(seed).normal(size=(1, 200, 2))
    return xr.Dataset({"mu": (("chain", "draw", "cell"), draws)})


def test_an_exact_sampler_is_calibrated():
    found = sbc(simulate, infer, num_replicates=300, seed=1, alpha=0.01)
    assert found.ok, str(found)
    assert found.ranks["mu"].dims == ("replicate", "cell")
    assert found.ks["mu"].dims == ("cell",)
    assert found.num_tests == 4
    for prob in (0.5, 0.9, 0.95):
        tolerance = 4 * np.sqrt(prob * (1 - prob) / 600) + 0.01  # 600 truths, quantiles of 200 draws
        assert abs(float(found.coverage["mu"].sel(prob=prob).mean()) - prob) < tolerance
    assert "passed" in str(found)


@pytest.mark.parametrize("wrong", [{"spread": 0.5}, {"spread": 1.0}, {"shift": 0.3}])
def test_a_wrong_sampler_is_found_out(wrong):
    found = sbc(simulate, partial(infer, **wrong), num_replicates=300, seed=1)
    assert not found.ok
    assert "FAILED" in str(found)


@pytest.mark.parametrize("spread", [0.5**0.5, 0.4])
def test_a_guide_right_on_average_passes_the_variational_test_whatever_its_sds(spread):
    found = vsbc(simulate, partial(infer, spread=spread), num_replicates=300, seed=1)
    assert found.ok, str(found)
    assert found.num_tests == 2
    assert "look at the coverage" in str(found)
    if spread == 0.4:
        assert float(found.coverage["mu"].sel(prob=0.9).mean()) < 0.8  # which shows what symmetry cannot


@pytest.mark.parametrize(("shift", "said"), [(0.3, "too high"), (-0.3, "too low")])
def test_a_biased_guide_is_found_out_and_the_side_is_said(shift, said):
    found = vsbc(simulate, partial(infer, shift=shift, spread=0.4), num_replicates=300, seed=1)
    assert not found.ok
    assert said in str(found)


def test_symmetry_p_values_are_uniform_under_symmetry_and_exact_for_a_few():
    rng = np.random.default_rng(0)
    ranks = rng.binomial(20, 0.5, size=(2000, 60))  # symmetric, far from uniform
    found = np.array([_symmetry(row, 20, rng) for row in ranks])
    for level in (0.01, 0.05, 0.2):  # the statistic is discrete: at most the level, and near it
        share = (found <= level).mean()
        assert 0.5 * level < share < level + 3 * np.sqrt(level / 2000)
    assert _symmetry(np.array([9] * 5), 9, rng) == pytest.approx(2 / 2**5)  # five steps one way, or the other
    assert stats.kstest(ranks[:, 0], "uniform", args=(0, 20)).pvalue < 1e-6


def test_replicates_are_reproducible_and_errors_name_theirs():
    first = sbc(simulate, infer, num_replicates=20, num_draws=19)
    longer = sbc(simulate, infer, num_replicates=30, num_draws=19)
    assert first.ranks.identical(longer.ranks.isel(replicate=slice(20)))

    def broken(data, seed):
        raise ArithmeticError("no")

    with pytest.raises(ArithmeticError) as caught:
        sbc(simulate, broken)
    assert "replicate 0" in caught.value.__notes__[0]
    with pytest.raises(DiagnosticsError, match="fewer than num_draws"):
        sbc(simulate, infer, num_draws=999)
    with pytest.raises(DiagnosticsError, match="share no variable"):
        sbc(lambda rng: ({"nu": 0.0}, np.zeros(2)), infer)
    with pytest.raises(DiagnosticsError, match="19 of 20 replicates"):
        sbc(simulate, infer, num_replicates=20, num_draws=19, map=lambda f, xs: [f(x) for x in xs][1:])


def test_any_map_gives_the_same_numbers():
    run = partial(sbc, simulate, infer, num_replicates=24, num_draws=19, seed=3)
    plain = run()
    backwards = run(map=lambda f, xs: [f(x) for x in reversed(xs)])
    with ThreadPoolExecutor(2) as threads:
        threaded = run(map=threads.map)
    with get_context("spawn").Pool(2) as pool:
        processes = run(map=pool.imap_unordered)
    for other in (backwards, threaded, processes):
        assert plain.ranks.identical(other.ranks)
        assert plain.ks.identical(other.ks)
        assert plain.coverage.identical(other.coverage)


def test_coverage_of_one_posterior():
    draws = np.random.default_rng(0).normal(size=(4, 2000, 2))
    posterior = xr.Dataset({"x": (("chain", "draw", "cell"), draws)})
    found = coverage({"x": np.array([0.1, 1.8])}, posterior, probs=(0.5, 0.9, 0.95))
    assert found["x"].values.tolist() == [[True, False], [True, False], [True, True]]
    with pytest.raises(DiagnosticsError, match="shape"):
        coverage({"x": 0.0}, posterior)


def test_a_calibration_shows_itself_in_notebooks():
    found = sbc(simulate, infer, num_replicates=20, num_draws=19)
    assert "<table" in found._repr_html_()
    assert "Calibration passed" in found._repr_html_()
    assert found.table.loc["mu", "mean_rank"] == pytest.approx(float(found.ranks["mu"].mean()) / 19)
