"""Verdicts, convergence statistics and calibration, with negative controls that must fail."""

from __future__ import annotations

import time

import numpy as np
import pytest
import xarray as xr

from probmodels.inference import Result, coverage, diagnose, sbc
from probmodels.inference.convergence import convergence, psis_khat
from probmodels.inference.diagnostics import DiagnosticsError


def chains(num_draws=500, num_chains=4, size=3, seed=0):
    return np.random.default_rng(seed).normal(size=(num_chains, num_draws, size))


def result(draws, **stats):
    groups = {"/posterior": xr.Dataset({"x": (("chain", "draw", "cell"), draws)})}
    groups["/sample_stats"] = xr.Dataset({name: (("chain", "draw"), value) for name, value in stats.items()})
    tree = xr.DataTree.from_dict(groups)
    tree.attrs = {"engine": "mcmc"}
    return Result(tree)


def test_good_draws_pass():
    draws = chains()
    report = diagnose(result(draws, diverging=np.zeros(draws.shape[:2], bool), energy=draws[..., 0]))
    assert report.ok
    assert report.divergences == 0
    assert min(report.bfmi) > 1.5  # independent energies: 2
    assert report.table.loc["x", "entries"] == 3
    assert str(report).startswith("Diagnostics passed.")


def test_chains_apart_fail():
    draws = chains()
    draws[0, :, 1] += 2
    report = diagnose(result(draws))
    assert not report.ok
    assert report.table.loc["x", "r_hat_share"] == pytest.approx(2 / 3)
    assert "x[1]: the chains have not come to agree" in str(report)
    assert diagnose(result(draws), entry_share=0.6, ess_min=0).ok


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: result(np.cumsum(chains(), axis=1)), "ess"),
        (lambda: result(chains(num_chains=1)), "there is one chain"),
        (lambda: result(chains(), diverging=np.eye(4, 500, dtype=bool)), "4 of 2000 trajectories diverged"),
        (lambda: result(chains(), energy=np.cumsum(chains(), axis=1)[..., 0]), "E-BFMI below 0.3"),
        (lambda: result(np.where(np.arange(3) == 1, np.nan, chains())), "1 of 3 entries .* not finite"),
    ],
)
def test_bad_draws_fail_in_plain_words(make, message):
    report = diagnose(make())
    assert not report.ok
    with pytest.raises(AssertionError, match=message):
        assert report.ok, str(report)


def test_constant_entries_are_no_failure():
    draws = chains()
    draws[..., 2] = 1.0
    assert diagnose(result(draws)).ok


def test_unknown_and_too_short_draws_are_refused():
    bad = result(chains())
    bad.tree.attrs["diagnosed"] = '["y"]'
    with pytest.raises(DiagnosticsError, match="'y'"):
        diagnose(bad)
    with pytest.raises(DiagnosticsError, match="4 draws are the least"):
        diagnose(result(chains(num_draws=3)))


def test_ess_of_an_autoregressive_chain_is_its_closed_form():
    noise, phi = chains(num_draws=4000, size=20, seed=3), 0.6
    draws = noise.copy()
    for t in range(1, 4000):
        draws[:, t] = phi * draws[:, t - 1] + noise[:, t]
    wanted = 16000 * (1 - phi) / (1 + phi)
    found = convergence(draws)["ess_bulk"]
    assert abs(found.mean() / wanted - 1) < 0.03  # one estimate scatters by about 5 %, the mean of 20 by 1 %
    assert np.all(np.abs(convergence(draws)["r_hat"] - 1) < 0.01)


def test_convergence_is_fast_and_keeps_the_shape():
    draws = chains(num_draws=1000, size=1000).astype(np.float32).reshape(4, 1000, 20, 50)
    began = time.process_time()
    found = convergence(draws)
    assert found["r_hat"].shape == (20, 50)
    assert time.process_time() - began < 10  # ArviZ takes about as long for a tenth of the entries
    assert np.isnan(convergence(draws[:, :3])["ess_bulk"]).all()


def test_khat_tells_weights_with_a_mean_from_weights_without():
    uniform = np.random.default_rng(0).uniform(size=20000)
    for shape in (0.3, 0.9):  # Pareto weights with that tail
        assert psis_khat(-shape * np.log(uniform)) == pytest.approx(shape, abs=0.12)  # sd about (1 + k) / sqrt(424)
    assert np.isnan(psis_khat(np.zeros(1000)))
    assert np.isnan(psis_khat(np.array([0.0, 1.0])))


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
    found = sbc(simulate, lambda data, seed: infer(data, seed, **wrong), num_replicates=300, seed=1)
    assert not found.ok
    assert "FAILED" in str(found)


def test_sbc_replicates_are_reproducible_and_errors_name_theirs():
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


def test_coverage_of_one_posterior():
    posterior = xr.Dataset({"x": (("chain", "draw", "cell"), chains(num_draws=2000, size=2))})
    found = coverage({"x": np.array([0.1, 1.8])}, posterior, probs=(0.5, 0.9, 0.95))
    assert found["x"].values.tolist() == [[True, False], [True, False], [True, True]]
    with pytest.raises(DiagnosticsError, match="shape"):
        coverage({"x": 0.0}, posterior)
