"""LOO and K-fold against exact answers, stacking of known mixtures, comparisons that must be refused."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from inference_models import SCALE, data, mean_model, mean_problem, normal_model

from probmodels.errors import DiagnosticsError, ResultError
from probmodels.inference import Problem, Result, compare, kfold, loo
from probmodels.inference.diagnostics.comparison import Elpd
from probmodels.inference.result import build_tree

NOISE = np.random.default_rng(7).normal(size=12)
Y = torch.tensor(0.8 + SCALE * NOISE)


def posterior(y, num_draws=1000, num_chains=4, seed=0):
    """Exact posterior mean and sd of ``mean_model``, and draws."""
    y = np.asarray(y, dtype=float)
    precision = 1 / 4 + len(y) / SCALE**2
    mean, sd = y.sum() / SCALE**2 / precision, precision**-0.5
    draws = mean + sd * np.random.default_rng(seed).normal(size=(num_chains, num_draws))
    return mean, sd, xr.Dataset({"mu": (("chain", "draw"), draws)})


def predictive_density(new, y):
    """Exact log density of each of ``new`` given ``y``."""
    mean, sd, _ = posterior(y)
    variance = sd**2 + SCALE**2
    return -0.5 * ((np.asarray(new, dtype=float) - mean) ** 2 / variance + np.log(2 * np.pi * variance))


def result_of(terms, **stats):
    groups = {"/posterior": xr.Dataset({"mu": (("chain", "draw"), np.zeros(terms["y"].shape[:2]))})}
    groups["/log_likelihood"] = terms
    if stats:
        groups["/sample_stats"] = xr.Dataset({name: (("chain", "draw"), value) for name, value in stats.items()})
    return Result(xr.DataTree.from_dict(groups))


def exact_result(y, **options):
    tree = xr.DataTree.from_dict({"/posterior": posterior(y, **options)[2]})
    return Result(tree), Problem("mean", mean_model, args=(torch.as_tensor(y),))


def test_loo_of_a_conjugate_model_is_that_of_refits():
    found = loo(*exact_result(Y))
    y = Y.numpy()
    exact = np.array([predictive_density(y[i], np.delete(y, i)) for i in range(12)])
    # Draws of a weighted mean of 4000: the log of each scatters by less than 0.005.
    np.testing.assert_allclose(found.pointwise["y"], exact, atol=0.03)
    assert abs(found.elpd - exact.sum()) < 0.06
    assert found.se == pytest.approx(np.sqrt(12) * exact.std(ddof=1), rel=0.05)
    assert 0.3 < found.num_parameters < 2  # one parameter
    assert found.ok
    assert "12 observations" in str(found)


def test_an_outlier_is_found_by_its_k_hat():
    y = Y.clone()
    y[4] = 30.0
    result, problem = exact_result(y)
    problem = Problem("mean", mean_model, args=problem.args, coords={"obs": [f"s{i}" for i in range(12)]})
    found = loo(result, problem)
    assert not found.ok
    assert found.bad == ["y[s4]"]
    assert "1 of 12 observations have Pareto k-hat above 0.70 (y[s4])" in str(found)
    assert "kfold gives a figure" in str(found)
    assert "k-hat above" in found._repr_html_()


def test_weights_of_a_guide_correct_loo():
    mean, sd, _ = posterior(Y)
    rng = np.random.default_rng(3)
    mu = mean + 0.3 * sd + 1.6 * sd * rng.normal(size=(1, 8000))  # a guide off in mean and sd
    y = Y.numpy()
    terms = -0.5 * ((y - mu[..., None]) / SCALE) ** 2 - np.log(SCALE * np.sqrt(2 * np.pi))
    log_weight = -0.5 * ((mu - mean) / sd) ** 2 + 0.5 * ((mu - mean - 0.3 * sd) / (1.6 * sd)) ** 2
    result = result_of(xr.Dataset({"y": (("chain", "draw", "obs"), terms)}), log_weight=log_weight + 5)
    exact = sum(predictive_density(y[i], np.delete(y, i)) for i in range(12))
    corrected, raw = loo(result), loo(result, correct=False)
    assert corrected.ok
    assert abs(corrected.elpd - exact) < 0.05
    assert abs(raw.elpd - exact) > 0.1  # the guide as it is predicts otherwise
    short = result.tree.copy()
    short["log_likelihood"] = short["log_likelihood"].to_dataset().isel(draw=slice(4000))
    with pytest.raises(DiagnosticsError, match="correct=False"):
        loo(Result(short))


def test_units_are_left_out_as_a_whole():
    y = torch.tensor(0.8 + SCALE * np.random.default_rng(1).normal(size=(3, 8)))
    problem = Problem("rows", normal_model, args=(y,))
    rng = np.random.default_rng(0)
    precision = 1 / 4 + 8 / SCALE**2
    theta = y.numpy().sum(1) / SCALE**2 / precision + precision**-0.5 * rng.normal(size=(4, 1000, 3))
    tree = xr.DataTree.from_dict(
        {"/posterior": xr.Dataset({"theta": (("chain", "draw", "row", "one"), theta[..., None])})}
    )
    by_column = loo(Result(tree), problem, unit="column")
    assert by_column.pointwise["y"].dims == ("column",)
    exact = 0.0
    for column in range(8):  # rows are independent
        exact += sum(predictive_density(y[r, column], np.delete(y[r].numpy(), column)) for r in range(3))
    assert abs(by_column.elpd - exact) < 0.3  # three densities under each weight
    assert loo(Result(tree), problem).pointwise["y"].shape == (3, 8)
    with pytest.raises(DiagnosticsError, match="unit='time' is no dim"):
        loo(Result(tree), problem, unit="time")


def test_masked_observations_do_not_count():
    terms = np.random.default_rng(0).normal(-1, 0.1, size=(2, 200, 5))
    terms[..., 2] = 0
    found = loo(result_of(xr.Dataset({"y": (("chain", "draw", "obs"), terms)})))
    assert len(found.values) == 4
    assert np.isnan(found.pointwise["y"].values[2])
    whole = loo(result_of(xr.Dataset({"y": (("chain", "draw", "obs"), np.delete(terms, 2, axis=2))})))
    assert found.elpd == pytest.approx(whole.elpd, abs=0.01)


def test_loo_refuses_what_it_cannot_judge():
    terms = np.random.default_rng(0).normal(size=(1, 100, 3))
    with pytest.raises(DiagnosticsError, match="give the problem"):
        loo(exact_result(Y)[0])
    with pytest.raises(DiagnosticsError, match="25 are the least"):
        loo(result_of(xr.Dataset({"y": (("chain", "draw", "obs"), terms[:, :20])})))
    with pytest.raises(DiagnosticsError, match=r"observes y as one whole"):
        loo(result_of(xr.Dataset({"y": (("chain", "draw"), terms[..., 0])})))
    terms[0, 3, 1] = -np.inf
    with pytest.raises(DiagnosticsError, match="observation 1 of y is not finite at 1 draws"):
        loo(result_of(xr.Dataset({"y": (("chain", "draw", "obs"), terms)})))


def test_few_draws_lower_the_limit_of_k_hat():
    found = loo(*exact_result(Y, num_draws=50, num_chains=2))
    assert found.khat_max == pytest.approx(0.5)
    assert loo(*exact_result(Y), num_samples=100).khat_max == pytest.approx(0.5)


def make_split(y):
    def split(train, test):
        return tuple(Problem("mean", mean_model, args=(y[torch.as_tensor(part)],)) for part in (train, test))

    return split


def refit(problem, seed):
    return posterior(problem.args[0].numpy(), seed=seed)[2]


def test_kfold_is_exact():
    y = Y.numpy()
    found = kfold(make_split(Y), refit, 12, num_folds=12)
    exact = np.array([predictive_density(y[i], np.delete(y, i)) for i in range(12)])
    np.testing.assert_allclose(found.pointwise["elpd"], exact, atol=0.03)  # 4000 draws: scatter below 0.005
    assert found.ok
    assert "exact refits" in str(found)
    assert abs(found.elpd - loo(*exact_result(Y)).elpd) < 0.1


def test_folds_are_even_keep_groups_together_and_follow_the_seed():
    seen = []

    def spy(split, train, test):
        seen.append(test)
        assert len(np.intersect1d(train, test)) == 0
        assert len(train) + len(test) == 12
        return split(train, test)

    run = partial(kfold, partial(spy, make_split(Y)), refit, 12)
    first = run(num_folds=5, seed=1)
    assert sorted(len(test) for test in seen) == [2, 2, 2, 3, 3]
    assert sorted(np.concatenate(seen)) == list(range(12))
    assert not run(num_folds=5, seed=2).pointwise.identical(first.pointwise)
    with ThreadPoolExecutor(1) as pool:
        assert run(num_folds=5, seed=1, map=pool.map).pointwise.identical(first.pointwise)
    seen.clear()
    run(num_folds=3, groups=list("aabbccddeeff"))
    assert all(len(test) == 4 and (test[::2] + 1 == test[1::2]).all() for test in seen)


def test_kfold_of_units_sums_the_others():
    y = torch.tensor(0.8 + SCALE * np.random.default_rng(1).normal(size=(1, 6)))

    def split(train, test):
        return tuple(Problem("rows", normal_model, args=(y[:, part],)) for part in (train, test))

    def infer(problem, seed):
        _, _, draws = posterior(problem.args[0][0].numpy(), seed=seed)
        return xr.Dataset({"theta": (("chain", "draw", "row", "one"), draws["mu"].values[..., None, None])})

    found = kfold(split, infer, 6, num_folds=3, unit="column")
    assert found.pointwise["elpd"].dims == ("column",)
    with pytest.raises(DiagnosticsError, match="by unit="):
        kfold(split, infer, 6, num_folds=3)


def test_kfold_refuses_bad_arguments_and_names_the_fold_of_an_error():
    split = make_split(Y)
    for bad, message in (
        ({"num_folds": 13}, "at most the 12 observations"),
        ({"num_folds": 1}, "num_folds=1"),
        ({"groups": [1, 2]}, "one label per observation"),
        ({"groups": [0] * 6 + [1] * 6}, "2 groups"),
    ):
        with pytest.raises(DiagnosticsError, match=message):
            kfold(split, refit, 12, **bad)
    with pytest.raises(DiagnosticsError, match="holds 6 observations, but its test problem 12") as caught:
        kfold(lambda train, test: (split(train, test)[0], mean_problem(args=(Y,), coords={})), refit, 12, num_folds=2)
    assert "fold 0" in str(caught.value)

    def broken(problem, seed):
        raise ArithmeticError("no")

    with pytest.raises(ArithmeticError) as failed:
        kfold(split, broken, 12)
    assert "in fold 0" in failed.value.__notes__[0]


def elpd(values, kind="loo"):
    khat = xr.Dataset({"y": ("obs", np.zeros(len(values)))}) if kind == "loo" else None
    return Elpd(kind, xr.Dataset({"y": ("obs", np.asarray(values, dtype=float))}), khat)


def log_normal(x, mean, sd):
    return -0.5 * ((x - mean) / sd) ** 2 - np.log(sd * np.sqrt(2 * np.pi))


@pytest.mark.parametrize("share", [0.3, 0.8, 1.0])
def test_stacking_finds_the_weights_of_a_mixture(share):
    rng = np.random.default_rng(0)
    first = rng.uniform(size=5000) < share
    x = np.where(first, rng.normal(-1, 1, 5000), rng.normal(2, 0.7, 5000))
    models = {
        "left": elpd(log_normal(x, -1, 1)),
        "right": elpd(log_normal(x, 2, 0.7)),
        "far": elpd(log_normal(x, 9, 1)),
    }
    weight = compare(models).table["weight"]
    assert weight.sum() == pytest.approx(1)
    assert abs(weight["left"] - share) < 4 * np.sqrt(0.25 / 5000) + 0.01  # the two overlap a little
    assert weight["far"] < 0.01
    assert compare(models, method="pseudo_bma").table["weight"].max() > 0.99  # chooses one, mixture or not


def test_a_comparison_ranks_and_says_so():
    x = np.random.default_rng(0).normal(size=300)
    models = {
        "narrow": elpd(log_normal(x, 0, 0.6)),
        "true": elpd(log_normal(x, 0, 1)),
        "near": elpd(log_normal(x, 0.05, 1)),
    }
    found = compare(models)
    assert found.table.index[0] in ("true", "near")
    assert found.table.index[-1] == "narrow"
    row = found.table.loc["narrow"]
    gap = models["narrow"].values - models[found.table.index[0]].values
    assert row["elpd_diff"] == pytest.approx(gap.sum())
    assert row["diff_se"] == pytest.approx(np.sqrt(300) * gap.std(ddof=1))
    assert found.ok
    assert "predicts about as well as" in str(found)
    assert str(found).startswith("None of 3 models predicts clearly best; ")
    assert str(compare({name: models[name] for name in ("narrow", "true")})).startswith("'true' predicts best of 2")
    assert "'narrow' predicts worse than" in str(found)
    assert "may be half" not in str(found)
    assert "<table" in found._repr_html_()
    few = compare({name: elpd(model.values[:40]) for name, model in models.items()} | {"bad": elpd([-9] * 40)})
    assert "with 40 observations the se may be half" in str(few)


def test_unreliable_parts_fail_a_comparison():
    good = elpd(np.full(20, -1.0))
    bad = Elpd("loo", good.pointwise - 0.1, xr.Dataset({"y": ("obs", np.r_[np.zeros(19), 0.9])}))
    found = compare({"good": good, "bad": bad})
    assert not found.ok
    assert found.table.loc["bad", "bad_k"] == 1
    assert str(found).startswith(
        "It cannot be said which of 2 models predicts best: the parts of 1 observations in elpd"
    )
    assert "predicts about as well" not in str(found)
    assert "bad: 1 of 20 observations" in str(found)
    assert "judge all by the same" in str(compare({"a": good, "b": elpd(np.full(20, -2.0), "kfold")}))


def test_loo_of_another_problem_is_refused():
    problem = Problem("mean", mean_model, args=(Y,))
    result = Result(build_tree(problem, posterior(Y)[2], engine="mcmc", seed=0, settings={}))
    assert loo(result, problem).ok
    with pytest.raises(ResultError, match="not of 'another'"):
        loo(result, replace(problem, name="another"))
    with pytest.raises(ResultError, match="other data than the result was inferred from"):
        loo(result, replace(problem, args=(Y + 1.0,)))


def test_loo_says_what_it_needs_where_discrete_sites_forbid_it():
    def chained(y):
        with pyro.plate("obs", len(y)):
            at = pyro.sample("at", dist.Bernoulli(0.5))
            pyro.sample("y", dist.Normal(at[int(at[0])] + y.new_zeros(len(y)), 1.0), obs=y)

    def enumerated(y):
        with pyro.plate("obs", len(y)):
            pyro.sample("y", dist.Normal(pyro.sample("at", dist.Bernoulli(0.5)), 1.0), obs=y)

    y = torch.linspace(0.0, 1.0, 4)
    draws = xr.Dataset({"at": (("chain", "draw", "obs"), np.zeros((1, 30, 4)))})
    for model, said in (
        (chained, "loo needs the likelihood of each observation by itself, which this model does not give"),
        (enumerated, "the log likelihood does not differ between draws"),
    ):
        problem = Problem("discrete", model, args=(y,))
        with pytest.raises(DiagnosticsError, match=said):
            loo(Result(build_tree(problem, draws, engine="svi", seed=0, settings={})), problem)


def test_models_of_other_data_are_not_compared():
    terms = np.random.default_rng(0).normal(size=(2, 100, 5))

    def fitted(y):
        result = result_of(xr.Dataset({"y": (("chain", "draw", "obs"), terms)}))
        result.tree["observed_data"] = xr.Dataset({"y": ("obs", y)})
        return result

    y = np.linspace(0, 1, 5)
    assert len(compare({"double": fitted(y), "single": fitted(y.astype(np.float32))}).table) == 2
    with pytest.raises(DiagnosticsError, match="other observed data"):
        compare({"a": fitted(y), "b": fitted(y + 1e-3)})
    with pytest.raises(DiagnosticsError, match="20 and 19 observations"):
        compare({"a": elpd(np.zeros(20) - 1), "b": elpd(np.zeros(19) - 1)})
    gap = elpd(np.r_[np.full(19, -1.0), np.nan])
    other = elpd(np.r_[np.nan, np.full(19, -1.0)])
    with pytest.raises(DiagnosticsError, match="gaps that differ"):
        compare({"a": gap, "b": other})
    with pytest.raises(DiagnosticsError, match="give two or more"):
        compare({"a": gap})
    with pytest.raises(DiagnosticsError, match="method='bma'; choose one of stacking, pseudo_bma"):
        compare({"a": gap, "b": gap}, method="bma")


def test_loo_of_a_fitted_problem_agrees_with_its_own_log_likelihood():
    result, problem = exact_result(data(8))
    from probmodels.inference.predictive import log_likelihood

    held = result.tree.copy()
    held["log_likelihood"] = log_likelihood(problem, result.posterior)
    assert loo(Result(held)).pointwise.identical(loo(result, problem).pointwise)
