"""Problem: names of dimensions, and what validate refuses."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from datetime import datetime

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from inference_models import MeanGuide, auto_guide, data, mean_model, mean_problem, normal_model
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from pyro.infer.reparam import StableReparam
from torch.distributions import constraints

from probmodels.errors import ProblemError
from probmodels.inference import Problem, Result, fit_svi, prior_predictive, run_mcmc


def test_dims_come_from_plates_and_event_dims():
    def model():
        with pyro.plate("row", 4, dim=-2):
            pyro.sample("w", dist.Dirichlet(torch.ones(3)), infer={"event_dims": ["part"]})  # (4, 1, 3)
        pyro.sample("v", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with pyro.plate("column", 5, dim=-1):
            pyro.deterministic("d", torch.zeros(5))
        pyro.factor("f", torch.zeros(()))

    dims = Problem("p", model).dims()
    assert dims == {"w": ["row", "w_dim_1", "part"], "v": ["v_dim_0"], "d": ["column"]}


def test_sites_know_their_kind():
    kinds = {site.name: site.kind for site in mean_problem().sites.values()}
    assert kinds == {"mu": "latent", "twice": "deterministic", "y": "observed", "new": "generated"}


def test_validate_returns_the_problem_and_leaves_no_trace():
    problem = mean_problem(guide=auto_guide(mean_model))
    pyro.clear_param_store()
    before = torch.get_rng_state()
    assert problem.validate() is problem
    assert torch.equal(before, torch.get_rng_state())
    assert not list(pyro.get_param_store().keys())
    assert problem.guide.prototype_trace is None  # the guide itself was not run
    assert problem.guide.model is not None  # and copying it left its model alone


def guide_misspelt(y):
    pyro.sample("mu_", dist.Normal(0.0, 1.0))


def guide_silent(y):
    pass


def guide_generates(y):
    pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("obs", len(y)):
        pyro.sample("new", dist.Normal(0.0, 1.0))


def guide_shaped(y):
    pyro.sample("mu", dist.Normal(0.0, 1.0).expand([2]).to_event(1))


def guide_infinite(y):
    pyro.sample("mu", dist.Delta(torch.tensor(float("inf"))))


def guide_auxiliary(y):
    x = pyro.sample("helper", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
    pyro.sample("mu", dist.Normal(x, 1.0))


@pytest.mark.parametrize(
    ("guide", "message"),
    [
        (guide_misspelt, "guide does not sample 'mu'; did you mean 'mu_'"),
        (guide_silent, "guide does not sample 'mu'"),
        (guide_generates, "'new', which is generated in the model"),
        (guide_shaped, r"shape \(2,\) in the guide and \(\) in the model"),
        (guide_infinite, "not finite: site 'mu' gives inf"),
    ],
)
def test_guides_that_do_not_fit_are_refused(guide, message):
    with pytest.raises(ProblemError, match=message):
        mean_problem(guide=guide).validate()


@pytest.mark.parametrize("guide", [guide_auxiliary, auto_guide(mean_model), MeanGuide()])
def test_guides_that_fit_pass(guide):
    mean_problem(guide=guide).validate()


def test_a_parameter_of_model_and_guide_with_one_name_is_refused():
    def model(y):
        loc = pyro.param("loc", torch.tensor(1.0, dtype=torch.float64))
        pyro.sample("mu", dist.Normal(loc, 1.0))

    guide = MeanGuide()
    with pytest.raises(ProblemError, match="both have a parameter 'loc'"):
        Problem("p", model, guide, (data(),)).validate()


def test_a_module_that_model_and_guide_share_on_purpose_passes():
    net = torch.nn.Linear(1, 1)

    def model(y):
        pyro.module("net", net)
        pyro.sample("mu", dist.Normal(0.0, 1.0))

    Problem("p", model, model, (data(),)).validate()


def test_labels_that_do_not_fit_are_refused():
    with pytest.raises(ProblemError, match=r"coords\['obs'\] holds 2 labels, but site 'y'"):
        mean_problem(coords={"obs": ["a", "b"]}).validate()
    extra = xr.Dataset({"x": ("other", np.zeros(3))})
    with pytest.raises(ProblemError, match="data has size 3"):
        mean_problem(data=extra, coords={"other": [1, 2]}).validate()


def test_event_dims_must_name_every_event_axis():
    def model():
        pyro.sample("w", dist.Dirichlet(torch.ones(3)), infer={"event_dims": ["part", "whole"]})

    with pytest.raises(ProblemError, match="names 2 event_dims"):
        Problem("p", model).validate()


def test_unknown_names_are_refused_with_a_suggestion():
    with pytest.raises(ProblemError, match=r"batch_plates names 'ob', .* did you mean 'obs'"):
        mean_problem(batch_plates=("ob",)).validate()


def test_missing_values_in_the_data_are_named():
    y = data()
    y[2] = float("nan")
    for guide in (None, auto_guide(mean_model)):
        with pytest.raises(ProblemError, match=r"'?y'?"):
            mean_problem(args=(y,), guide=guide).validate()


def test_errors_of_the_model_say_where_they_arose():
    def model():
        raise KeyError("nothing")

    with pytest.raises(KeyError) as caught:
        Problem("p", model).validate()
    assert "while running the model of problem 'p'" in caught.value.__notes__


def test_to_moves_tensors_and_modules():
    moved = mean_problem(kwargs={}).to("meta")
    assert moved.args[0].device.type == "meta"
    assert next(moved.guide.parameters()).device.type == "meta"
    assert mean_problem().to("cpu").validate().name == "mean"


def test_copies_share_what_was_shared():
    guide = AutoNormal(poutine.block(normal_model))
    problem = replace(mean_problem(), model=normal_model, guide=guide, args=(data(6).reshape(3, 2),), coords={})
    _, copied = problem.programs()
    assert copied is not guide
    assert copied.model is not None
    assert guide.model is not None


def test_a_problem_shows_its_sites_plates_and_guide() -> None:
    shown = repr(mean_problem(batch_plates=("obs",), loss="TraceMeanField_ELBO"))
    lines = [line.split() for line in shown.splitlines()]
    assert shown.startswith("Problem 'mean'")
    for line in (["mu", "latent", "scalar"], ["y", "observed", "obs", "6"], ["new", "generated", "obs", "6"]):
        assert line in lines
    assert "  plates: obs 6 (may be subsampled)" in shown
    assert "  guide: MeanGuide" in shown
    assert "  loss: TraceMeanField_ELBO" in shown
    assert "  kernel: ExactKernel" in shown
    assert "guide: none, for run_mcmc" in repr(mean_problem(guide=None))


def test_a_problem_shows_itself_in_notebooks_escaped() -> None:
    def odd() -> None:
        pyro.sample("a<b", dist.Bernoulli(0.5))

    shown = Problem("<script>", odd)._repr_html_()
    assert "&lt;script&gt;" in shown
    assert "<td>a&lt;b</td><td>discrete latent</td><td>scalar</td>" in shown
    assert "<script>" not in shown


def test_a_problem_whose_model_fails_says_so_when_shown() -> None:
    def broken() -> None:
        raise KeyError("rate")

    assert "model: cannot be run: 'rate'" in repr(Problem("broken", broken))
    assert "cannot be run" in Problem("broken", broken)._repr_html_()


def never(problem, **options):
    raise AssertionError("a kernel was made")


def named_model(y, *, site="mu", dim="obs", size=None, axis="obs"):
    mu = pyro.sample(site, dist.Normal(y.new_zeros(()), 2.0))
    with pyro.plate(dim, len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
    if size is not None:
        pyro.sample("w", dist.Normal(y.new_zeros(size), 1.0).to_event(1), infer={"event_dims": [axis]})


def loose_model(y):
    z = pyro.sample("z", dist.Categorical(y.new_ones(len(y), 2)), infer={"enumerate": "parallel"})
    pyro.sample("y", dist.Normal(z.to(y), 1.0), obs=y)


def listless_model(y):
    pyro.sample("z", dist.Poisson(y.new_ones(())), infer={"enumerate": "parallel"})
    pyro.sample("y", dist.Normal(y.new_zeros(len(y)), 1.0).to_event(1), obs=y)


UNSAVABLE = {
    "slash": ({"kwargs": {"site": "a/b"}}, "site 'a/b' cannot be saved: files nest groups by '/'; rename it"),
    "empty": ({"kwargs": {"site": ""}}, "site '' cannot be saved: a name is a text that is not empty"),
    "space": ({"kwargs": {"site": "mu "}}, "does not begin or end with a space"),
    "first": ({"kwargs": {"site": "(mu)"}}, "the first character must be a letter"),
    "control": ({"kwargs": {"site": "m\nu"}}, "no control characters"),
    "accent": ({"kwargs": {"site": "e\u0301"}}, "normalise it"),
    "long": ({"kwargs": {"site": "m" * 241}}, "it takes 241 bytes, and 240 are the most"),
    "wide": ({"kwargs": {"site": "é" * 130}}, "it takes 260 bytes"),
    "dim": ({"kwargs": {"dim": "a/b"}}, "dim 'a/b' cannot be saved"),
    "own dim": ({"kwargs": {"size": 3, "axis": "w"}}, "site 'w' has the name of a dim"),
    "chain": ({"kwargs": {"site": "chain"}}, "site 'chain' has the name of a dim"),
    "two sizes": ({"kwargs": {"size": 3}}, "dim 'obs' has size 6 in site 'y' and 3 in site 'w'"),
    "labels": (
        {"coords": {"obs": [None] * 6}},
        r"coords\['obs'\] cannot be saved: .* type NoneType",
    ),
    "pairs": ({"coords": {"obs": [(1, 2)] * 6}}, r"labels are a list of single values, .* shape \(6, 2\)"),
    "ragged": ({"coords": {"obs": [[1], [1, 2], [], [], [], []]}}, "each label must be one value"),
    "complex": ({"coords": {"obs": np.zeros(6, complex)}}, "no values of type complex128"),
    "half": ({"coords": {"obs": np.zeros(6, np.float16)}}, "no float16"),
    "zones": ({"coords": {"obs": list(pd.date_range("2020", periods=6, tz="UTC"))}}, "no time zones"),
    "surrogate": ({"coords": {"obs": ["a", "b", "c", "d", "e", "\ud800"]}}, "holds characters that files cannot"),
    "data": ({"data": xr.Dataset({"a/b": ("obs", np.zeros(6))})}, "variable of data 'a/b' cannot be saved"),
    "values": ({"data": xr.Dataset({"a": ("obs", [{}] * 6)})}, r"data\['a'\] cannot be saved: .* type dict"),
    "plates": ({"model": loose_model}, r"'z' has batch shape \(6,\), of which axis 0 stands in no plate; .*dim=-1"),
    "values of z": ({"model": listless_model}, "its Poisson does not list its values"),
}


@pytest.mark.parametrize("name", UNSAVABLE)
def test_what_could_not_be_saved_or_enumerated_is_refused_before_a_step(name, monkeypatch):
    changes, message = UNSAVABLE[name]
    problem = mean_problem(**{"model": named_model, "coords": {}, "kernel": never, **changes})
    with pytest.raises(ProblemError, match=f"mean: .*{message}"):
        run_mcmc(problem, num_chains=1, chain_method="sequential", progress=False)
    monkeypatch.setattr(
        "probmodels.inference.variational.training.Trainer.run", lambda trainer: pytest.fail("a step was made")
    )
    with pytest.raises(ProblemError, match=f"mean: .*{message}"):
        fit_svi(problem, num_steps=1, progress=False)


def test_a_seed_that_files_cannot_hold_is_refused_before_a_step():
    with pytest.raises(ProblemError, match=r"seed=9223372036854775808; .*less than 2\*\*63"):
        run_mcmc(mean_problem(kernel=never), seed=2**63, progress=False)


def test_data_beside_which_an_observed_site_cannot_lie_are_refused():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 2.0))
        with pyro.plate("obs", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
            pyro.sample("second", dist.Normal(mu, 1.0), obs=y)

    seen = xr.Dataset({"y": ("obs", data().numpy())}, {"obs": range(6)})
    problem = mean_problem(model=model, data=seen, kernel=never)
    with pytest.raises(ProblemError, match=r"data give dim 'obs' of \['y'\] another size or other labels"):
        run_mcmc(problem, num_chains=1, chain_method="sequential", progress=False)
    replace(problem, data=seen.assign_coords(obs=list("abcdef"))).validate(guide=False)


@pytest.mark.parametrize(
    "labels",
    [
        list("abcdef"),
        range(6),
        np.linspace(0, 1, 6, dtype=np.float32),
        [True, False] * 3,
        np.array(["é", "日本", "a b", "", "x" * 300, "😀"], dtype=object),
        pd.date_range("2020", periods=6),
        [datetime(2020, 1, day) for day in range(1, 7)],
        np.arange(6).astype("timedelta64[s]"),
        pd.Categorical(list("aabbcc")),
        ["a", 1, 2.5, "b", "c", "d"],
    ],
)
def test_labels_that_pass_come_back_from_a_file(labels, tmp_path):
    problem = mean_problem(coords={"obs": labels})
    result = run_mcmc(problem, num_samples=4, num_chains=1, chain_method="sequential", warmup_steps=1, progress=False)
    result.save(tmp_path)
    assert Result.load(tmp_path).posterior["obs"].equals(result.posterior["obs"])


@pytest.mark.parametrize("name", ["m" * 240, "é" * 120, "_mu", "1", "μ", "a.b[0] (c)", "日本"])
def test_names_that_pass_come_back_from_a_file(name, tmp_path):
    problem = Problem("names", named_model, args=(data(),), kwargs={"site": name, "dim": f"{name[:100]}_row"})
    options = {"kernel": "nuts", "kernel_options": {"compiler": "eager"}, "chain_method": "sequential"}
    result = run_mcmc(problem, num_samples=4, num_chains=2, warmup_steps=1, progress=False, **options)
    result.save(tmp_path)
    assert Result.load(tmp_path).posterior.equals(result.posterior)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": None}, "model=None is no Pyro program; give a function"),
        ({"guide": 3}, "guide=3 is no Pyro program"),
        ({"args": torch.ones(3)}, r"args is a Tensor; give a tuple, as \(y,\) for one argument"),
        ({"kwargs": [3]}, "kwargs is a list; give a dict"),
        ({"coords": [3]}, "coords is a list; give a dict"),
        ({"data": {"y": 3}}, "data is a dict; give an xarray.Dataset"),
        ({"name": 3}, "name is a int; give a text"),
    ],
)
def test_parts_of_a_wrong_kind_are_refused_at_once(change, message):
    with pytest.raises(ProblemError, match=message):
        Problem(**{"name": "small", "model": lambda: None, **change})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"args": (torch.ones(2),)}, "missing a required argument: 'error'"),
        ({"args": (torch.ones(2),), "kwargs": {"eror": 1.0}}, "argument: ?'error'|unexpected keyword argument 'eror'"),
        ({"args": torch.ones(3).unbind()}, "too many positional arguments"),
    ],
)
def test_arguments_that_the_model_does_not_take_are_named(arguments, message):
    def model(effect, error):
        pyro.sample("y", dist.Normal(0.0, error).expand(effect.shape).to_event(1), obs=effect)

    with pytest.raises(ProblemError, match="the model does not take the args and kwargs of the problem") as failed:
        Problem("small", model, **arguments).validate()
    assert re.search(message, str(failed.value))
    assert "\n" not in str(failed.value)


def straight_line(x, y):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("station", len(y)):
        pyro.sample("y", dist.Normal(slope * x, 1.0), obs=y)


def choices(y, *, kind="plated"):
    weight = pyro.sample("weight", dist.Beta(1.0, 1.0))
    if kind == "loose":
        z = pyro.sample("z", dist.Bernoulli(weight).expand([6]))
    else:
        with pyro.plate("row", 6):
            z = pyro.sample("z", dist.Bernoulli(weight))
    if kind == "read":
        z = torch.stack(list(z.reshape(6)))
    if kind == "event":
        pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=y)
    elif kind != "loose":
        with pyro.plate("rows", 6):
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def coin(y, *, plate="row"):
    share = pyro.sample("share", dist.Beta(1.0, 1.0))
    with pyro.plate(plate, len(y)):
        pyro.sample("y", dist.Bernoulli(share), obs=y)


X, ROWS = torch.linspace(-1.0, 1.0, 6), torch.arange(6.0)
UNFIT = {
    "array observed": (straight_line, (X, ROWS.numpy()), {}, "site 'y' observes a ndarray; give it a tensor"),
    "series observed": (straight_line, (X, pd.Series(ROWS.numpy())), {}, "site 'y' observes a Series"),
    "list observed": (straight_line, (X, ROWS.tolist()), {}, "site 'y' observes a list"),
    "array given": (straight_line, (X.numpy(), ROWS), {}, r"args\[0\] is a ndarray: give tensors"),
    "series given": (straight_line, (pd.Series(X.numpy()), ROWS), {}, r"args\[0\] is a Series: give tensors"),
    "argument missing": (
        straight_line,
        (X,),
        {},
        "kwargs of the problem: missing a required argument: 'y'",
    ),
    "labels misspelt": (straight_line, (X, ROWS), {"coords": {"stations": "abcdef"}}, "did you mean 'station'"),
    "labels of nothing": (straight_line, (X, ROWS), {"coords": {"m": "abcdef"}}, "names 'm', .*did you mean 'station'"),
    "truth values": (coin, (ROWS > 2,), {}, "site 'y' has no log density at its observed values.*value.float"),
    "plate of a site": (coin, (ROWS,), {"kwargs": {"plate": "y"}}, "sites named 'y'; rename one: sites and plates"),
    "shapes": (straight_line, (X, ROWS[:4]), {}, "running the model fails|site 'y' has no log density"),
    "loose choices": (choices, (ROWS,), {"kwargs": {"kind": "loose"}}, "'z' has batch shape .*in no plate"),
    "choices in an event": (choices, (ROWS,), {"kwargs": {"kind": "event"}}, r"\['z'\] cannot be enumerated.*site 'y'"),
    "choices read": (choices, (ROWS,), {"kwargs": {"kind": "read"}}, r"\['z'\] cannot be enumerated.*z.reshape\(6\)"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_what_does_not_fit_a_model_is_named(name):
    model, args, changes, message = UNFIT[name]
    with pytest.raises(ProblemError, match=f"(?s)p: .*{message}"):
        run_mcmc(Problem("p", model, args=args, **changes), num_chains=4, num_samples=4, progress=False)


def test_labels_that_no_dim_could_have_are_left_alone():
    Problem("p", straight_line, args=(X, ROWS), coords={"station": range(6), "elsewhere": ["a", "b"]}).validate()


def overflowing(x, y):
    level = pyro.sample("level", dist.Normal(0.0, 10.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 100.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Poisson((level + slope * x).exp()), obs=y)


def underflowing(y):
    scale = pyro.sample("scale", dist.Normal(0.0, 1000.0)).exp()
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(0.0, scale), obs=y)


def test_a_prior_draw_without_density_is_no_reason_to_refuse_a_model():
    Problem("p", overflowing, args=(X, ROWS)).validate()
    Problem("p", underflowing, args=(ROWS,)).validate()


def never_possible(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.factor("wall", -math.inf * mu.abs())


def test_models_without_density_anywhere_are_refused_unless_starts_are_given():
    with pytest.raises(ProblemError, match="'wall' gives inf"):
        Problem("p", never_possible, args=(ROWS,)).validate()
    Problem("p", never_possible, args=(ROWS,)).validate(density=False)


def flat_priors(y):
    loc = pyro.sample("loc", dist.ImproperUniform(constraints.real, (), (2,)))
    scale = pyro.sample("scale", dist.ImproperUniform(constraints.positive, (), ()))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(loc.sum(), scale), obs=y)


def test_improper_priors_have_starts_and_no_draws():
    problem = Problem("p", flat_priors, args=(ROWS,)).validate()
    assert problem.sites["loc"].shape == (2,)
    with pytest.raises(ProblemError, match=r"\['loc', 'scale'\] have improper priors, which cannot be drawn"):
        run_mcmc(problem, init="prior", progress=False)


def heavy_tails(y):
    scale = pyro.sample("scale", dist.Exponential(1.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Stable(1.5, 0.0, scale, 0.0), obs=y)


def test_an_observed_site_may_be_reparametrised():
    problem = Problem("p", heavy_tails, args=(ROWS,), reparam={"y": StableReparam()}).validate()
    result = run_mcmc(problem, num_chains=4, num_samples=4, warmup_steps=4, progress=False)
    assert set(result.posterior) == {"scale"}


def test_prior_draws_of_improper_priors_are_refused():
    with pytest.raises(ProblemError, match="improper"):
        prior_predictive(Problem("p", flat_priors, args=(ROWS,)), num_samples=2, progress=False)
