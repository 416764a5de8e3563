"""Problem: names of dimensions, and what validate refuses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from inference_models import MeanGuide, auto_guide, data, mean_model, mean_problem, normal_model
from pyro import poutine
from pyro.infer.autoguide import AutoNormal

from probmodels.errors import ProblemError
from probmodels.inference import Problem


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
