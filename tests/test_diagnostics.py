"""Verdicts on chains and guides, convergence statistics, importance weights."""

from __future__ import annotations

import time

import numpy as np
import pytest
import xarray as xr

from probmodels.errors import DiagnosticsError, ImportanceError
from probmodels.inference import Finding, Result, diagnose, importance_resample
from probmodels.inference.diagnostics.convergence import convergence, psis, psis_khat
from probmodels.inference.diagnostics.importance import importance_moments


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
    assert str(report).startswith("Diagnostics passed;")


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


def test_unknown_variables_are_refused():
    bad = result(chains())
    bad.tree.attrs["diagnosed"] = '["y"]'
    with pytest.raises(DiagnosticsError, match="'y'"):
        diagnose(bad)


@pytest.mark.parametrize(("num_chains", "num_draws"), [(1, 1), (4, 3), (200, 1)])
def test_chains_that_are_too_short_get_a_verdict_too(num_chains, num_draws):
    report = diagnose(result(chains(num_chains=num_chains, num_draws=num_draws)))
    assert not report.ok
    assert f"chains of length {num_draws} are too short" in str(report)
    assert "keep at least 4 draws of each chain" in str(report)
    assert "frozen" not in str(report)


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


def autoregressive(num_chains, num_draws, phi, size=3, seed=0):
    noise = chains(num_draws, num_chains, size, seed)
    draws = noise.copy()
    draws[:, 0] /= np.sqrt(1 - phi**2)
    for t in range(1, num_draws):
        draws[:, t] = phi * draws[:, t - 1] + noise[:, t]
    return draws * np.sqrt(1 - phi**2)


def test_many_short_chains_that_agree_pass_by_nested_r_hat():
    report = diagnose(result(autoregressive(64, 100, 0.6)))
    assert report.ok, str(report)
    assert report.table.loc["x", "r_hat_max"] > 1.02  # which alone would fail them
    assert report.table.loc["x", "nested_r_hat_max"] < 1.01
    assert "nested_r_hat_max" not in diagnose(result(chains())).table


@pytest.mark.parametrize("fault", ["one apart", "two modes", "drift", "stuck at stationary places"])
def test_many_short_chains_that_disagree_fail(fault):
    draws = autoregressive(64, 100, 0.6)
    if fault == "one apart":
        draws[5] += 3
    elif fault == "two modes":
        draws[:20] += 3
    elif fault == "drift":
        draws += np.linspace(1, 0, 100)[None, :, None]
    else:
        draws = draws[:, :1] + 1e-3 * draws
    report = diagnose(result(draws), ess_min=0)
    assert not report.ok
    assert "nested r_hat" in str(report)


def test_saturated_trajectories_are_said_with_what_to_do():
    draws = chains()
    depth = np.where(np.random.default_rng(0).uniform(size=draws.shape[:2]) < 0.1, 10, 4)
    good = result(draws, tree_depth=depth)
    assert "max_tree_depth" not in str(diagnose(good))  # unknown limit
    good.tree["sample_stats"].attrs["max_tree_depth"] = 10
    report = diagnose(good)
    assert report.ok  # a matter of cost: r_hat and ess say whether the draws suffice
    finding = next(x for x in report.findings if "max_tree_depth=10" in x.verdict)
    assert finding.mark == "!"
    assert f"{(depth == 10).mean():.1%} of the trajectories" in finding.verdict
    ensemble = result(draws, n_steps=depth)
    ensemble.tree["sample_stats"]["n_steps"].attrs["max_leapfrog"] = 10
    assert "ended at max_leapfrog=10" in str(diagnose(ensemble))
    ensemble.tree["sample_stats"]["n_steps"].attrs["max_leapfrog"] = 11
    assert "max_leapfrog" not in str(diagnose(ensemble))


def test_acceptance_far_from_its_target_is_said():
    rates = np.full((4, 500), 0.8)
    rates[1], rates[2] = 0.3, 1.0
    found = result(chains(), acceptance_rate=rates)
    assert "acceptance" not in str(diagnose(found))  # no target is known
    found.tree["sample_stats"].attrs["target_accept_prob"] = 0.75
    said = str(diagnose(found))
    assert "chain 1 has mean acceptance far below the target of 0.75, least 0.30" in said
    assert "chain 2 has mean acceptance far above the target of 0.75, most 1.00" in said


def test_chains_that_were_moved_are_said():
    found = result(chains(), diverging=np.zeros((4, 500), bool))
    assert "were moved" not in str(diagnose(found))
    found.tree["sample_stats"].attrs["moved_chains"] = 2
    report = diagnose(found)
    assert report.ok
    assert "2 chains got stuck in warm-up and were moved" in str(report)


def test_frozen_chains_are_named():
    draws = chains()
    draws[[0, 3]] = draws[[0, 3], :1]
    said = str(diagnose(result(draws, energy=draws[..., 0])))
    assert "chains 0, 3 have one value at all 500 draws" in said
    apart = np.broadcast_to(chains()[:, :1], (4, 500, 3))
    assert "chains 0, 1, 2, 3 have one value" in str(diagnose(result(apart)))
    assert "one value" not in str(diagnose(result(np.ones((4, 500, 3)))))  # fixed by the model


def test_few_divergences_are_reported_and_not_held_harmful():
    draws, diverging = chains(), np.zeros((4, 500), bool)
    diverging[0, :2] = True
    report = diagnose(result(draws, diverging=diverging))
    assert report.ok
    assert "2 of 2000 trajectories diverged (0.10%)" in str(report)
    assert "target_accept_prob" in str(report)
    assert not diagnose(result(draws, diverging=diverging), divergence_share=0).ok


def test_chains_too_short_for_an_effective_sample_size_say_so():
    report = diagnose(result(chains(num_draws=6, num_chains=32)))
    assert not report.ok
    assert "draw at least 8 per chain" in str(report)


def guide(draws, log_weight, **attrs):
    groups = {
        "/posterior": xr.Dataset({"x": (("chain", "draw", "cell"), draws[None])}),
        "/sample_stats": xr.Dataset({"log_weight": (("chain", "draw"), log_weight[None])}),
        "/log_likelihood": xr.Dataset({"y": (("chain", "draw"), draws[None, :, 0])}),
        "/constant_data": xr.Dataset({"a": ("cell", np.zeros(draws.shape[1]))}),
    }
    tree = xr.DataTree.from_dict(groups)
    tree.attrs = {"engine": "svi", **attrs}
    return Result(tree)


def normal_guide(mean=0.0, sd=1.0, size=2, num_draws=4000, seed=0):
    """Draws of a normal guide and their weights for the standard normal."""
    draws = mean + sd * np.random.default_rng(seed).normal(size=(num_draws, size))
    log_weight = (-0.5 * draws**2 + 0.5 * ((draws - mean) / sd) ** 2 + np.log(sd)).sum(1)
    return guide(draws, log_weight)


@pytest.mark.parametrize(
    ("spread", "poor", "ok", "said"),
    [
        (0.2, 0.0, True, "fits the posterior closely"),
        (0.7, 0.0, True, "usable, though not close"),
        (0.2, 0.1, False, "misses part of many posteriors"),  # in 4 of 40 rows
        (0.2, 0.025, True, "fewest 2% in data[39]"),  # in one
    ],
)
def test_rows_of_data_that_are_independent_are_judged_each_by_itself(spread, poor, ok, said):
    rng, rows = np.random.default_rng(0), 40
    sd = np.where(np.arange(rows) >= rows * (1 - poor), 2.5, spread)
    by_row = rng.normal(size=(1000, rows)) * sd
    found = guide(rng.normal(size=(1000, rows)), by_row.sum(1))
    if spread == 0.7:  # all together the weights are log-normal with sd 4.4, by which no guide of many rows is good
        assert not found.diagnose().ok
    stats = found.tree["sample_stats"].to_dataset()
    found.tree["sample_stats"] = stats.assign(log_weight_by_row=(("chain", "draw", "data"), by_row[None]))
    report = found.diagnose()
    assert report.ok is ok
    assert said in str(report)


@pytest.mark.parametrize(
    ("fault", "ok", "said"),
    [
        ({}, True, "the importance weights are equal"),
        ({"mean": 0.1, "sd": 1.05}, True, "fits the posterior closely"),
        ({"mean": 0.4, "sd": 1.1}, True, "use importance_resample"),
        ({"sd": 2.0}, False, "where the weights give"),
        ({"mean": 1.0, "sd": 1.2}, False, "where the weights give"),
        ({"sd": 0.3}, False, "misses part of the posterior"),
    ],
)
def test_guides_are_judged_by_k_hat_and_by_what_their_weights_correct(fault, ok, said):
    report = diagnose(normal_guide(**fault))
    assert report.ok == ok, str(report)
    assert said in str(report)


@pytest.mark.parametrize(("slope", "falling"), [(0.0, False), (-0.01, True)])
def test_a_loss_that_still_falls_is_said(slope, falling):
    found = normal_guide(0.1, 1.05)
    steps = np.arange(2000)
    found.tree["fit"] = xr.Dataset({"loss": ("step", slope * steps + np.random.default_rng(0).normal(size=2000))})
    report = diagnose(found)
    assert report.ok
    assert ("still falling: by 1.9" in str(report)) == falling


def test_draws_without_weights_are_not_said_to_fit():
    found = normal_guide()
    found.tree["sample_stats"] = found.tree["sample_stats"].to_dataset().drop_vars("log_weight")
    found.tree.attrs["engine"] = "em"
    said = str(diagnose(found))
    assert "nothing shows how well the guide fits" in said
    assert "✓" not in said


def test_the_table_of_a_guide_holds_raw_and_corrected_moments():
    mean, sd = 0.4, 1.5
    row = diagnose(normal_guide(mean, sd, num_draws=20000)).table.iloc[0]
    assert abs(row["guide_mean"] - mean) < 4 * sd / np.sqrt(20000)
    assert abs(row["guide_sd"] - sd) < 4 * sd / np.sqrt(40000)
    assert abs(row["corrected_mean"]) < 4 * row["mcse_mean"]
    assert abs(row["corrected_sd"] - 1) < 4 * row["mcse_sd"]
    assert 0 < row["mcse_mean"] < 0.03


def test_errors_of_corrected_moments_are_their_scatter():
    found = []
    for seed in range(300):
        result = normal_guide(0.5, 1.2, size=1, num_draws=400, seed=seed)
        draws = result.posterior["x"].values[0]
        found.append(importance_moments(draws, psis(result.tree["sample_stats"]["log_weight"].values)[0]))
    for name in ("mean", "sd"):
        scatter = np.std([x[name] for x in found], ddof=1)
        claimed = np.mean([x[f"mcse_{name}"] for x in found])
        assert abs(claimed / scatter - 1) < 4 / np.sqrt(2 * 300) + 0.05  # sd of 300 values; bias of order 1 / 400


def test_impossible_and_broken_draws_of_a_guide_fail():
    draws, weights = np.random.default_rng(0).normal(size=(1000, 2)), np.zeros(1000)
    weights[:50] = -np.inf
    assert "50 of 1000 draws of the guide are impossible" in str(diagnose(guide(draws, weights)))
    weights[3] = np.nan
    report = diagnose(guide(draws, weights))
    assert not report.ok
    assert "not numbers" in str(report)
    broken = diagnose(guide(np.where(draws > 3, np.nan, draws), np.zeros(1000)))
    assert not broken.ok


def test_resampled_draws_follow_the_posterior_each_at_most_once():
    raw = normal_guide(0.5, 1.3, num_draws=20000)
    found = importance_resample(raw, 2000, seed=1)
    draws = found.posterior["x"].values[0]
    assert found.posterior["x"].shape == (1, 2000, 2)
    assert len(np.unique(draws[:, 0])) == 2000
    assert np.all(np.abs(draws.mean(0)) < 4 / np.sqrt(2000) + 0.02)  # a tenth of the draws, without replacement
    assert np.all(np.abs(draws.std(0) - 1) < 4 / np.sqrt(4000) + 0.02)
    np.testing.assert_array_equal(found.tree["log_likelihood"]["y"].values[0], draws[:, 0])
    assert "a" in found.tree["constant_data"]
    report = diagnose(found)
    assert report.ok
    assert "resampled draws stand for the posterior" in str(report)
    assert report.khat == pytest.approx(diagnose(raw).khat)
    assert importance_resample(raw, 2000, seed=1).posterior.identical(found.posterior)
    assert not importance_resample(raw, 2000, seed=2).posterior.identical(found.posterior)


def test_resampling_a_guide_that_misses_the_posterior_does_not_pass():
    report = diagnose(importance_resample(normal_guide(sd=0.3)))
    assert not report.ok
    assert "cannot mend" in str(report)


def test_resampling_refuses_what_has_no_weights():
    with pytest.raises(ImportanceError, match="log_weight"):
        importance_resample(result(chains()))
    with pytest.raises(ImportanceError, match="at most the 100 draws"):
        importance_resample(guide(np.zeros((100, 1)), np.zeros(100)), 101)
    with pytest.raises(ImportanceError, match="not finite"):
        importance_resample(guide(np.zeros((100, 1)), np.full(100, np.nan)))


def test_psis_leaves_equal_weights_and_the_body_alone():
    smoothed, khat = psis(np.zeros(50))
    np.testing.assert_allclose(smoothed, -np.log(50))
    assert np.isnan(khat)
    raw = np.random.default_rng(0).standard_t(2, size=1000)
    smoothed, khat = psis(raw)
    assert np.exp(smoothed).sum() == pytest.approx(1)
    assert khat > 0.7
    body = np.argsort(raw)[:900]
    np.testing.assert_allclose(np.diff(smoothed[body]), np.diff(raw[body]), atol=1e-9)
    assert np.isneginf(psis(np.r_[raw, -np.inf])[0][-1])


def test_reports_show_themselves_in_notebooks_and_escape():
    shown = diagnose(result(chains()))._repr_html_()
    assert "Diagnostics passed;" in shown
    assert "<table" in shown
    tree = xr.DataTree.from_dict(
        {"/posterior": xr.Dataset({"<b>": (("chain", "draw"), np.cumsum(chains()[..., 0], 1))})}
    )
    tree.attrs = {"engine": "mcmc"}
    shown = diagnose(Result(tree))._repr_html_()
    assert "&lt;b&gt;" in shown
    assert "<b>" not in shown


# -- a wrong answer must not pass --------------------------------------------------------------------------------------


def discrete_guide(posterior, proposal, num_draws=2000, seed=0, **attrs):
    """Draws and weights of a guide of one site of few values, by the probabilities of guide and posterior."""
    draws = np.random.default_rng(seed).choice(len(proposal), size=num_draws, p=proposal)
    log_weight = np.log(np.asarray(posterior)[draws]) - np.log(np.asarray(proposal)[draws])
    return guide(draws[:, None].astype(float), log_weight, finite_support=1, **attrs)


@pytest.mark.parametrize(("chance", "ok"), [(0.99, False), (0.9, False), (0.88, True), (0.81, True), (0.5, False)])
def test_guides_of_few_values_are_judged_by_total_variation(chance, ok):
    """Of two values weights have no tail: Pareto k-hat finds no fault with a guide that is far off."""
    found = discrete_guide([0.2, 0.8], [1 - chance, chance], num_draws=4000)
    report = diagnose(found)
    assert report.ok is ok, str(report)
    assert np.isnan(report.khat)
    assert "k-hat" not in str(report)
    said = float(str(report).partition("is about ")[2][:4])
    assert said == pytest.approx(abs(chance - 0.8), abs=0.03)


def test_independent_coins_on_coupled_spins_fail():
    """Marginal probabilities are right, the joint distribution is off by a total variation of 0.46."""
    spins = (np.arange(32)[:, None] >> np.arange(5)) & 1
    posterior = np.exp(1.2 * (spins[:, 1:] == spins[:, :-1]).sum(1))
    posterior /= posterior.sum()
    distance = np.abs(posterior - 1 / 32).sum() / 2
    report = diagnose(discrete_guide(posterior, np.full(32, 1 / 32)))
    assert not report.ok
    assert float(str(report).partition("is about ")[2][:4]) == pytest.approx(distance, abs=0.03)
    rng = np.random.default_rng(1)
    draws = rng.integers(32, size=(800, 30))
    by_row = np.log(posterior[draws] * 32)
    rows = guide(rng.normal(size=(800, 2)), by_row.sum(1), finite_support=1)
    stats = rows.tree["sample_stats"].to_dataset()
    rows.tree["sample_stats"] = stats.assign(log_weight_by_row=(("chain", "draw", "data"), by_row[None]))
    assert not diagnose(rows).ok


@pytest.mark.parametrize("spread", [40.0, 1e4, 4e6])
def test_weights_of_which_few_count_fail(spread):
    """The tail of such weights is empty, which is no sign of a good guide."""
    log_weight = spread * np.random.default_rng(0).normal(size=400)
    found = guide(np.random.default_rng(1).normal(size=(400, 2)), log_weight)
    report = diagnose(found)
    assert not report.ok
    assert report.khat > 0.7
    assert psis_khat(log_weight) > 0.7
    resampled = diagnose(importance_resample(found))
    assert not resampled.ok


def test_resampled_draws_that_stand_on_few_fail():
    found = discrete_guide([0.001, 0.999], [0.97, 0.03], num_draws=1000)
    report = diagnose(importance_resample(found))
    assert not report.ok
    assert "effective draws of the guide, of 100 needed" in str(report)
    better = diagnose(importance_resample(discrete_guide([0.2, 0.8], [0.5, 0.5], num_draws=1000)))
    assert better.ok, str(better)


def test_equal_weights_are_exact_only_where_the_guide_draws():
    spread = diagnose(discrete_guide([0.5, 0.5], [0.5, 0.5]))
    assert spread.ok
    assert "what it never draws does not show" in str(spread)
    assert "check_modes" in str(spread)
    point = diagnose(guide(np.ones((100, 2)), np.zeros(100)))
    assert point.inference == "not judged"
    assert not point.ok
    assert "point estimate" in str(point)


def test_what_could_not_be_judged_is_not_passed():
    constant = diagnose(result(np.ones((4, 500, 3))))
    assert constant.inference == "not judged"
    assert not constant.ok
    assert "NOT PASSED" in str(constant)
    assert "all 1 variables" not in str(constant)
    few = diagnose(guide(np.random.default_rng(0).normal(size=(5, 2)), np.arange(5.0)))
    assert few.inference == "not judged"
    assert "5 draws are too few" in str(few)
    bare = guide(np.random.default_rng(0).normal(size=(100, 2)), np.zeros(100))
    bare.tree["sample_stats"] = bare.tree["sample_stats"].to_dataset().drop_vars("log_weight")
    assert diagnose(bare).inference == "not judged"


def test_the_line_of_success_names_the_criterion_that_held():
    said = str(diagnose(result(autoregressive(64, 100, 0.6))))
    assert "r_hat or nested r_hat <= 1.01" in said
    draws = chains(num_draws=500, size=200)
    draws[0, :, 0] += 2
    report = diagnose(result(draws))
    assert report.ok
    assert "x: r_hat <= 1.01 at 99.5% of the entries (needed 99%), largest r_hat 1." in str(report)
    failed = str(diagnose(result(np.cumsum(chains(), axis=1))))
    assert "(needed 99%)" in failed


def test_variables_that_never_vary_are_named_beside_those_that_do():
    found = result(chains())
    found.tree["posterior"] = found.tree["posterior"].to_dataset().assign(fixed=(("chain", "draw"), np.ones((4, 500))))
    report = diagnose(found)
    assert report.ok
    assert "fixed: the same at all draws" in str(report)
    assert "x: r_hat at most 1.0" in str(report)


@pytest.mark.parametrize(
    ("drop", "values", "ok"), [(2.0, 100, True), (20.0, 100, False), (20.0, 3000, True), (3e5, 3000, False)]
)
def test_a_loss_that_falls_by_much_fails(drop, values, ok):
    found = normal_guide(0.1, 1.05)
    steps, noise = np.arange(1000), np.random.default_rng(0).normal(size=1000)
    found.tree["fit"] = xr.Dataset({"loss": ("step", -drop / 100 * steps + 0.1 * noise)})
    found.tree["observed_data"] = xr.Dataset({"y": ("row", np.zeros(values))})
    report = diagnose(found)
    assert report.ok is ok
    assert "still falling" in str(report)


def test_a_verdict_has_two_parts():
    rng = np.random.default_rng(0)
    found = result(chains())
    assert diagnose(found).model == "not checked"
    found.tree["observed_data"] = xr.Dataset({"y": ("row", 3 * rng.normal(size=200))})
    for spread, state in ((3.0, "passed"), (1.0, "failed")):
        predicted = spread * rng.normal(size=(4, 500, 200))
        found.tree["posterior_predictive"] = xr.Dataset({"y": (("chain", "draw", "row"), predicted)})
        report = diagnose(found)
        assert report.inference == "passed"
        assert report.model == state
        assert report.ok is (state == "passed")
    assert "FAILED: the model does not fit the data; the draws themselves passed." in str(report)
    found.tree["posterior"] = xr.Dataset({"x": (("chain", "draw"), np.cumsum(rng.normal(size=(4, 500)), 1))})
    assert "do not trust these draws yet; and the model does not fit the data" in str(diagnose(found))


def test_a_method_adds_findings_on_its_model_and_may_judge_its_draws(monkeypatch):
    import types

    from probmodels.inference.diagnostics import report as reports

    found = result(np.cumsum(chains(), axis=1))
    found.tree.attrs["method"] = "mine"
    own = types.SimpleNamespace()
    monkeypatch.setattr(reports, "get_method", lambda name: own)
    assert not diagnose(found).ok
    own.check_model = lambda result: [Finding(True, "residuals are correlated", "add modes", part="model")]
    assert diagnose(found).model == "failed"
    own.check_draws = lambda result: [Finding(False, "independent by construction")]
    report = diagnose(found)
    assert report.inference == "passed"
    assert not report.ok
    lost = chains()
    lost[0, 0, 0] = np.nan
    found.tree["posterior"] = xr.Dataset({"x": (("chain", "draw", "cell"), lost)})
    assert "draws of ['x'] are not finite" in str(diagnose(found))
    assert diagnose(found).inference == "failed"
    own.check_model = lambda result: result.tree["nowhere"]
    broken = diagnose(found)
    assert "check_model of mine could not be run" in str(broken)
    assert broken.model == "not checked"


def test_of_many_variables_that_fail_the_worst_are_named_and_the_others_counted():
    rng = np.random.default_rng(8)
    drift = np.linspace(0, 1, 200)
    posterior = xr.Dataset(
        {f"x{i}": (("chain", "draw"), rng.standard_normal((2, 200)) + 0.3 * (i + 1) * drift) for i in range(20)}
    )
    report = diagnose(Result(xr.DataTree.from_dict({"/posterior": posterior})))
    failing = [finding for finding in report.findings if finding.harmful]
    said, everything = str(report), report.text(None)
    assert said.count("✗") == len(failing) == 2  # r_hat, and effective sample size
    far = int((report.table["r_hat_max"] > 1.01).sum())
    assert f"; {far - 1} other variables miss it too: the chains" in said
    size = report.table[["ess_bulk_min", "ess_tail_min"]].min(axis=1)
    assert failing[1].verdict.startswith(f"{size.idxmin()}: ")
    assert f"{int((size < 400).sum()) - 1} other variables miss it too" in failing[1].verdict
    assert failing[1].advice.startswith(f"draw about {np.ceil(4000 / size.min()) / 10:g} times")
    assert "… and 5 more variables of smaller r_hat, in summary.txt" in report.text(where="summary.txt")
    assert "suffices for all" in said
    one = diagnose(Result(xr.DataTree.from_dict({"/posterior": posterior[["x19"]]})))
    assert "other variable" not in str(one)
    assert "for all" not in str(one)
    worst = report.table["r_hat_max"].idxmax()
    assert failing[0].verdict.startswith(f"{worst}:")
    assert all(f"\nx{i} " in f"\n{everything}" for i in range(20))
