"""Figures, texts and models of results, given what is none: refused by an error of the project."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import xarray as xr
from wrong_values import WRONG

from probmodels import plots
from probmodels.bayesian_svd.published.compatibility import published_gibbs
from probmodels.diffusion.fitted import classes_of, fitted_model, fitted_problem
from probmodels.discrete_vae import code_usage, exact_log_likelihood, tiny
from probmodels.errors import ProbmodelsError
from probmodels.options import options_of
from probmodels.report import draw_result, show
from probmodels.spec import build_problem, change_spec, engine_of, load_data, load_spec, spec_of_result

POSTERIOR = xr.Dataset({"mu": (("chain", "draw"), np.random.default_rng(0).normal(size=(2, 20)))})
R_HAT = xr.Dataset({"mu": 1.002})
CASES: list[tuple[Callable[..., Any], dict[str, Any], dict[str, set[str]]]] = [
    (plots.forest, {"posterior": POSTERIOR}, {"variables": {"none", "empty list"}}),
    (plots.plot_trace, {"posterior": POSTERIOR}, {"variables": {"none", "empty list"}}),
    (plots.rank, {"posterior": POSTERIOR}, {"variables": {"none", "empty list"}}),
    (plots.predictive_check, {"observed": POSTERIOR.isel(chain=0), "predicted": POSTERIOR}, {}),
    (plots.rhat_histogram, {"r_hat": R_HAT}, {}),
    (plots.loss, {}, {}),
    (plots.bilevel_losses, {}, {}),
    (plots.ranking, {}, {}),
    (
        plots.image_grid,
        {"images": np.zeros((1, 1, 2, 2)), "title": ""},
        {"title": {"text", "empty text"}, "labels": {"none"}},
    ),
    (show, {}, {}),
    (draw_result, {}, {}),
    (code_usage, {}, {}),
    (exact_log_likelihood, {"problem": tiny()}, {}),
    (classes_of, {}, {}),
    (fitted_model, {}, {}),
    (fitted_problem, {}, {}),
    (published_gibbs, {}, {}),
    (load_data, {}, {}),
    (build_problem, {"spec": {}}, {}),
    (change_spec, {"spec": {}, "change": "a=1"}, {"spec": {"nested"}}),
    (engine_of, {}, {}),
    (spec_of_result, {"path": "absent"}, {}),
    (load_spec, {}, {}),
]


@pytest.mark.parametrize(("function", "arguments", "accepted"), CASES, ids=lambda item: getattr(item, "__name__", ""))
def test_every_value_is_refused_or_works(
    function: Callable[..., Any], arguments: dict[str, Any], accepted: dict[str, set[str]]
) -> None:
    for option in options_of(function):
        for kind, value in WRONG.items():
            given = {**arguments, option: copy.deepcopy(value)}  # what a call may change
            if kind in accepted.get(option, ()):
                function(**given)
                continue
            with pytest.raises(ProbmodelsError):
                pytest.fail(f"{option}={value!r} gave {function(**given)}")


@pytest.mark.parametrize("draw", [plots.loss, plots.bilevel_losses])
def test_a_group_that_is_no_fit_is_refused(draw: Callable[..., Any]) -> None:
    with pytest.raises(ProbmodelsError, match="group fit"):
        draw(POSTERIOR)
