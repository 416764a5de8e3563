"""Result: round trips, predictions, tables, errors."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from inference_models import SCALE, auto_guide, data, exact, mean_model, mean_problem, normal_model

from probmodels.errors import ProblemError, ResultError
from probmodels.inference import Problem, Result, fit_svi, run_mcmc
from probmodels.inference.predictive import log_likelihood, prior_predictive, thin
from probmodels.inference.result import build_tree, changed_data

mcmc = partial(run_mcmc, num_samples=50, warmup_steps=5, num_chains=2, chain_method="sequential", progress=False)
svi = partial(fit_svi, num_steps=20, num_samples=30, progress=False)


@pytest.mark.parametrize("engine", [mcmc, svi])
def test_round_trip(tmp_path, engine):
    labelled = xr.Dataset(
        {"y": ("obs", data().numpy()), "mask": ("obs", np.ones(6, bool))}, attrs={"ok": True, "a": None}
    )
    problem = mean_problem(data=labelled, guide=auto_guide(mean_model))
    result = engine(problem)
    folder = result.save(tmp_path / "out")
    loaded = Result.load(folder, problem)
    for name, group in result.tree.children.items():
        xr.testing.assert_equal(loaded.tree[name].to_dataset(), group.to_dataset())
    assert loaded.tree["constant_data"]["mask"].dtype == bool
    assert loaded.tree["posterior"]["mu"].dtype == result.posterior["mu"].dtype
    assert loaded.tree.attrs["method"] == "mean"
    assert json.loads(loaded.tree.attrs["versions"])["torch"]
    assert loaded.predict(problem, seed=3).identical(result.predict(problem, seed=3))
    assert set(loaded.params()) == set(result.params())
    assert sorted(file.name for file in folder.iterdir() if file.name.startswith(".")) == []
    assert (folder / "guide.safetensors").exists() == (engine is svi)


def test_saving_does_not_replace_another_result_unasked(tmp_path):
    result = mcmc(mean_problem())
    result.save(tmp_path)
    with pytest.raises(ResultError, match="overwrite=True"):
        result.save(tmp_path)
    result.save(tmp_path, overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(ResultError, match="cannot write"):
        result.save(tmp_path / "file")


def test_what_cannot_be_loaded_is_said(tmp_path):
    with pytest.raises(ResultError, match=r"no result.nc"):
        Result.load(tmp_path)
    result = svi(mean_problem())
    result.save(tmp_path / "a")
    with pytest.raises(ResultError, match="the result is of 'mean', not of 'other'"):
        Result.load(tmp_path / "a", mean_problem(name="other"))
    with pytest.raises(ResultError, match="saved parameters do not fit"):
        Result.load(tmp_path / "a", mean_problem(guide=auto_guide(mean_model)))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a result of a guide."""
    return svi(mean_problem()).save(tmp_path_factory.mktemp("saved"))


@pytest.fixture
def damaged(saved, tmp_path):
    """A copy of it to damage."""
    return Path(shutil.copytree(saved, tmp_path / "damaged"))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def overwrite(file: Path) -> None:
    """Overwrite the values and the tables of the file, past what is read when it is opened."""
    content = bytearray(file.read_bytes())
    content[2000::7] = b"\xff" * len(content[2000::7])
    file.write_bytes(content)


def elsewhere(file: Path) -> None:
    xr.Dataset({"sst": ("time", [1.0])}, attrs={"probmodels_format": "one"}).to_netcdf(file)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.write_bytes(b""), "cannot be read"),
        (lambda file: file.write_text("no netCDF"), "cannot be read"),
        (lambda file: file.write_bytes(file.read_bytes()[:500]), "cannot be read"),
        (cut, "cannot be read"),
        (overwrite, "cannot be read"),
        (lambda file: (file.unlink(), file.mkdir()), "cannot be read"),
        (elsewhere, r"not written by Result.save"),
        (lambda file: xr.Dataset().to_netcdf(file), r"not written by Result.save"),
        (lambda file: xr.Dataset(attrs={"probmodels_format": 1}).to_netcdf(file), "no group 'posterior'"),
    ],
)
def test_a_file_that_is_damaged_or_no_result_is_said(damaged, damage, message):
    damage(damaged / "result.nc")
    with pytest.raises(ResultError, match=message):
        Result.load(damaged)


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("spec", "{", "'spec' of the result is no JSON table"),
        ("spec", "null", "'spec' of the result is no JSON table"),
        ("spec", 3, "'spec' of the result is no JSON table"),
        ("spec", '{"output": []}', "has output = \\[\\]"),
        ("spec", '{"output": {"path": 3}}', "has output = {'path': 3}"),
        ("options", "[]", "'options' of the result is no JSON table"),
        ("versions", "none", "'versions' of the result is no JSON table"),
        ("diagnosed", "mu", "'diagnosed' of the result is no JSON list or null"),
        ("diagnosed", "{}", "'diagnosed' of the result is no JSON list or null"),
        ("method", 3, "'method' has to be the name of a method"),
        ("guide_sha256", [1.0, 2.0], "'guide_sha256' has to be a checksum"),
        ("seed", "one", "'seed' has to be a whole number"),
        ("probmodels_format", None, r"not written by Result.save"),
        ("probmodels_format", "first", r"not written by Result.save"),
        ("probmodels_format", 99, r"not written by Result.save of this version"),
    ],
)
def test_damaged_attributes_are_said(damaged, attribute, value, message):
    import netCDF4

    with netCDF4.Dataset(damaged / "result.nc", "r+") as file:
        file.delncattr(attribute)
        if value is not None:
            file.setncattr(attribute, value)
    with pytest.raises(ResultError, match=message):
        Result.load(damaged)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("x", [1.0, 2.0]), r"'mu' has dims \('x',\), without 'chain' and 'draw'"),
        ((("chain", "draw"), [["a", "b"]]), "'mu' holds no numbers"),
        ((("chain", "draw"), np.ones((2, 0))), "'mu' has no draws"),
    ],
)
def test_a_posterior_of_something_else_than_draws_is_said(tmp_path, values, message):
    Result(xr.DataTree.from_dict({"/posterior": xr.Dataset({"mu": values})})).save(tmp_path)
    with pytest.raises(ResultError, match=message):
        Result.load(tmp_path)


def test_a_result_made_by_hand_needs_nothing_but_draws(tmp_path):
    draws = xr.Dataset({"mu": (("chain", "draw"), np.ones((2, 8)))})
    loaded = Result.load(Result(xr.DataTree.from_dict({"/posterior": draws})).save(tmp_path))
    assert loaded.posterior.equals(draws)


def test_a_guide_of_other_shapes_is_said(saved, tmp_path):
    result = Result.load(saved)
    state = {name: value.reshape(-1, 1).repeat(2, 1) for name, value in result.guide_state.items()}
    folder = replace(result, guide_state=state).save(tmp_path / "other")
    with pytest.raises(ResultError, match="saved parameters do not fit"):
        Result.load(folder, mean_problem())
    with pytest.raises(ResultError, match="saved parameters do not fit"):
        Result.load(folder).predict(mean_problem())


def test_a_guide_that_is_lost_damaged_or_foreign_is_said(damaged, tmp_path):
    file = damaged / "guide.safetensors"
    content = file.read_bytes()
    for other in (b"", b"no tensors", content[:40], content[:-8] + bytes(8)):
        file.write_bytes(other)
        with pytest.raises(ResultError, match=r"guide.safetensors is damaged or of another result"):
            Result.load(damaged)
    file.unlink()
    with pytest.raises(ResultError, match=r"lacks guide.safetensors, the fitted guide that was saved with result.nc"):
        Result.load(damaged)
    file.write_bytes(content)
    assert Result.load(damaged).params()
    plain = mcmc(mean_problem()).save(tmp_path / "plain")
    assert Result.load(plain).guide_state is None
    (plain / "guide.safetensors").write_bytes(content)
    with pytest.raises(ResultError, match="of another result"):
        Result.load(plain)


def test_a_damaged_guide_of_the_first_release_is_said(tmp_path):
    folder = Path(shutil.copytree(Path(__file__).parent / "data" / "old_result", tmp_path / "old"))
    for content in (b"", b"no tensors", b"\x08" + bytes(7) + b"{}   "):
        (folder / "guide.safetensors").write_bytes(content)
        with pytest.raises(ResultError, match=r"guide.safetensors cannot be read"):
            Result.load(folder)


def test_a_result_of_the_first_release_is_still_read():
    result = Result.load(Path(__file__).parent / "data" / "old_result")
    assert "Result of noisy_edges by svi, 1 × 40 draws" in repr(result)
    assert "edge_probability" in result._repr_html_()
    assert result.diagnose().khat == pytest.approx(0.71, abs=0.01)
    assert list(result.summary("deletion").index) == ["deletion"]
    assert result.params()
    with pytest.raises(ResultError, match="keeps no options of noisy_edges"):
        result.rebuild()


def test_draws_are_not_compressed(tmp_path):
    import netCDF4

    with netCDF4.Dataset(mcmc(mean_problem()).save(tmp_path) / "result.nc") as file:
        assert not file["posterior"]["mu"].filters()["zlib"]


def test_predictions_have_the_predictive_distribution():
    result = mcmc(mean_problem(), num_samples=2000)
    mean, sd = exact(data())
    new = result.predict(mean_problem())["y"]
    assert new.dims == ("chain", "draw", "obs")
    wanted = np.hypot(sd, SCALE)
    assert np.all(np.abs(new.mean(("chain", "draw")) - mean) < 4.5 * wanted / np.sqrt(4000 / 3))  # ess of AR(1/2)
    assert np.all(np.abs(new.std(("chain", "draw")) / wanted - 1) < 4.5 / np.sqrt(2 * 4000 / 3))
    assert result.predict(mean_problem(), num_samples=20)["y"].sizes["draw"] == 10


def test_a_fitted_guide_predicts_data_of_another_size():
    result = svi(mean_problem())
    longer = mean_problem(args=(data(9),), coords={})
    assert result.predict(longer, num_samples=4)["y"].shape == (1, 4, 9)


def test_log_likelihood_is_pointwise():
    problem = Problem("rows", normal_model, args=(data(6).reshape(2, 3),))
    posterior = prior_predictive(problem, num_samples=5)[["theta"]]
    found = log_likelihood(problem, posterior)["y"]
    theta, y = posterior["theta"].values[..., 0], data(6).reshape(2, 3).numpy()
    wanted = -0.5 * ((y - theta[..., None]) / SCALE) ** 2 - np.log(SCALE * np.sqrt(2 * np.pi))
    assert found.dims == ("chain", "draw", "row", "column")
    np.testing.assert_allclose(found, wanted, rtol=1e-10)


def test_prior_predictive_has_the_prior_distribution():
    prior = prior_predictive(mean_problem(), num_samples=1000, seed=2)
    assert abs(float(prior["mu"].std()) / 2 - 1) < 4.5 / np.sqrt(2000)
    assert abs(float((prior["y"] - prior["mu"]).std()) / SCALE - 1) < 4.5 / np.sqrt(2 * 6000)


def test_summary_names_entries_by_label():
    result = mcmc(mean_problem(diagnosed=("mu",)))
    assert list(result.summary().index) == ["mu"]
    table = result.summary(["mu", "new"])
    assert list(table.index[:2]) == ["mu", "new[a]"]
    assert table.loc["mu", "hdi_lower"] < table.loc["mu", "mean"] < table.loc["mu", "hdi_upper"]
    with pytest.raises(ResultError, match="has no"):
        result.summary(["nu"])


def test_thin_spaces_draws_evenly():
    posterior = xr.Dataset({"x": (("chain", "draw"), np.zeros((2, 10)))})
    assert thin(posterior, None) is posterior
    assert thin(posterior, 6).sizes["draw"] == 3


def test_a_result_shows_itself_on_one_screen():
    shown = repr(svi(mean_problem()))
    assert shown.splitlines()[0] == "Result of mean by svi, 1 × 30 draws"
    assert "  mu     scalar" in shown
    assert "  new    obs 6" in shown
    assert "groups: sample_stats, fit, observed_data" in shown
    assert "guide: fitted" in shown
    assert "verdict: not computed" in shown
    many = xr.Dataset({f"v{i}": (("chain", "draw"), np.zeros((2, 5))) for i in range(40)})
    shown = repr(Result(xr.DataTree.from_dict({"/posterior": many})))
    assert "… and 28 more" in shown
    assert "guide" not in shown
    assert len(shown.splitlines()) < 20
    assert "Result of" in repr(Result(xr.DataTree()))


def test_a_result_shows_itself_in_notebooks_escaped():
    result = mcmc(mean_problem(name="<script>"))
    result.tree["posterior"] = result.posterior.rename(twice="a<b")
    shown = result._repr_html_()
    assert "Result of &lt;script&gt; by mcmc, 2 × 50 draws" in shown
    assert "<script>" not in shown
    assert "a&lt;b" in shown
    assert "ess_bulk" in shown  # a table of the scalars
    assert "xr-wrap" in shown  # xarray's tree
    assert "new[d]" in shown
    assert "new[e]" not in shown
    assert "… and 2 more of new" in shown
    many = xr.Dataset({f"v{i}": (("chain", "draw"), np.zeros((2, 5))) for i in range(40)})
    assert "… and 28 more variables" in Result(xr.DataTree.from_dict({"/posterior": many}))._repr_html_()
    assert "Result of" in Result(xr.DataTree())._repr_html_()


def test_entries_that_are_fixed_are_not_what_a_result_shows():
    values = np.zeros((2, 30, 3, 3))
    values[..., 0, 1] = np.random.default_rng(0).normal(size=(2, 30))
    draws = xr.Dataset({"graph": (("chain", "draw", "a", "b"), values), "fixed": (("chain", "draw"), np.ones((2, 30)))})
    table, more = Result(xr.DataTree.from_dict({"/posterior": draws})).head()
    assert list(table.index) == ["graph[0, 1]", "fixed"]
    assert more == "… and 8 more of graph"


def drawn(problem: Problem) -> Result:
    """A result whose draws mean nothing, for what it keeps of its problem."""
    posterior = xr.Dataset({"x": (("chain", "draw"), np.zeros((1, 4)))})
    return Result(build_tree(problem, posterior, engine="mcmc", seed=0, settings={}))


@pytest.mark.parametrize("again", [False, True])
def test_a_result_takes_one_back_to_its_problem(tmp_path, again):
    from probmodels import hierarchical_mixture

    problem = hierarchical_mixture.tiny()
    result = drawn(problem)
    if again:
        result = Result.load(result.save(tmp_path))
    rebuilt = result.rebuild()
    assert rebuilt.sites == problem.sites
    assert dict(rebuilt.options) == dict(problem.options)
    for name, values in problem.observed(problem.names("observed")).items():
        np.testing.assert_array_equal(rebuilt.observed([name])[name], values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "mean"}, "give the problem itself, since 'mean' is no registered method: it was built by hand"),
        ({"method": "hierarchical_mixtur"}, "did you mean 'hierarchical_mixture'"),
        ({"options": None}, "keeps no options"),
        ({"options": "{"}, "'options' of the result is no JSON table"),
        ({"options": "[1]"}, "'options' of the result is no JSON table"),
        ({"options_lost": '["tables"]'}, "the options tables of .* are objects"),
        ({"method": "bayesian_network", "options": '{"nonsense": 1}'}, "made again: unknown option 'nonsense'"),
        ({"method": "bayesian_svd"}, "keeps no rank of bayesian_svd"),
    ],
)
def test_why_a_problem_cannot_be_made_again_is_said(change, message):
    from probmodels import hierarchical_mixture

    result = drawn(hierarchical_mixture.tiny())
    attrs = {**result.tree.attrs, **change}
    result.tree.attrs = {key: value for key, value in attrs.items() if value is not None}
    with pytest.raises(ResultError, match=message):
        result.rebuild()


def test_options_that_no_file_holds_are_named(tmp_path):
    options = {"width": np.int64(3), "shape": np.arange(3), "folder": tmp_path, "link": len, "one": {"of": len}}
    attrs = drawn(mean_problem(options=options)).tree.attrs
    assert json.loads(attrs["options"]) == {"width": 3, "shape": [0, 1, 2], "folder": str(tmp_path)}
    assert json.loads(attrs["options_lost"]) == ["link", "one"]


def test_groups_and_variables_by_name():
    result = mcmc(mean_problem())
    assert list(result.group("posterior")) == list(result) == ["mu", "twice", "new"]
    assert not result.group("prior").variables
    assert "mu" in result
    assert "chain" not in result
    assert result["new"].identical(result.posterior["new"])
    assert result.sample_stats["lp"].dims == ("chain", "draw")
    with pytest.raises(ResultError, match="no 'twise'; did you mean 'twice'"):
        result["twise"]
    with pytest.raises(ResultError, match="no 'draw'"):
        result["draw"]


def test_adding_a_group_leaves_the_result_as_it_was():
    problem = mean_problem()
    result = mcmc(problem)
    added = result.add("log_likelihood", problem).add("log_likelihood", problem, num_samples=10)
    assert "log_likelihood" not in result.tree.children
    assert added.group("log_likelihood").sizes["draw"] == 5
    assert added.group("posterior").identical(result.group("posterior"))
    assert added.tree.attrs == result.tree.attrs
    predicted = added.add("posterior_predictive", problem, seed=3).group("posterior_predictive")
    assert predicted.identical(result.predict(problem, seed=3))
    prior = result.add("prior_predictive", problem, num_samples=7)
    assert set(prior.group("prior")) == {"mu", "twice", "new"}
    assert dict(prior.group("prior_predictive").sizes) == {"chain": 1, "draw": 7, "obs": 6}
    with pytest.raises(ResultError, match=r"name='posterior_predictve'; .*did you mean 'posterior_predictive'"):
        result.add("posterior_predictve", problem)
    with pytest.raises(ResultError, match="num_samples=0"):
        result.add("prior", problem, num_samples=0)
    with pytest.raises(ResultError, match="no registered method"):
        result.add("prior")


def test_groups_are_added_of_the_problem_that_was_inferred_only():
    problem = mean_problem()
    result = mcmc(problem)
    for name in ("log_likelihood", "posterior_predictive", "prior"):
        with pytest.raises(ResultError, match="the result is of 'mean', not of 'pooled'"):
            result.add(name, mean_problem(name="pooled"))
    for other in (mean_problem(args=(100 * data(),)), mean_problem(args=(data(9),), coords={})):
        for name in ("log_likelihood", "posterior_predictive"):
            with pytest.raises(ResultError, match=r"other data than the result was inferred from: y.* differ"):
                result.add(name, other)
    with pytest.raises(ResultError, match="not of 'pooled'"):
        result.predict(mean_problem(name="pooled"))
    assert result.predict(mean_problem(args=(data(9),), coords={}), num_samples=4)["y"].sizes["obs"] == 9


def test_single_precision_is_no_other_data():
    result = mcmc(mean_problem())
    single = mean_problem(args=(data().float(),))
    assert not changed_data(result.tree, single)
    assert changed_data(result.tree, mean_problem(args=(data() + 0.01,))) == ["y"]


def test_constant_data_and_labels_count_as_data():
    def problem(size: float = 1.0, labels: str = "abcdef") -> Problem:
        held = xr.Dataset({"y": ("obs", data().numpy()), "size": ("obs", np.full(6, size))}, {"obs": list(labels)})
        held["day"] = ("obs", np.arange(6).astype("datetime64[D]").astype("datetime64[ns]"))
        return mean_problem(data=held, coords={"obs": list(labels)})

    tree = drawn(problem()).tree
    assert not changed_data(tree, problem())
    assert changed_data(tree, problem(size=2.0)) == ["size"]
    assert changed_data(tree, problem(labels="abcdeg")) == ["obs"]


def test_a_registered_method_adds_groups_without_its_problem():
    from probmodels import bayesian_network

    problem = bayesian_network.tiny()
    result = svi(problem)
    added = result.add("prior")
    assert added.group("prior").identical(result.add("prior", problem).group("prior"))
    assert "prior_predictive" not in added.tree.children
    for name in ("log_likelihood", "posterior_predictive"):
        with pytest.raises(ProblemError, match="observes nothing"):
            result.add(name, problem)
    with pytest.raises(ProblemError, match="observes nothing"):
        result.predict(problem)


def test_a_registered_method_predicts_without_its_problem():
    from probmodels import noisy_edges

    result = svi(noisy_edges.tiny())
    assert result.predict(seed=1).identical(result.predict(noisy_edges.tiny(), seed=1))
