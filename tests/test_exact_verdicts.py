"""Verdicts on guides of discrete sites by exact evidence: they see what the guide never draws."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import xarray as xr

from probmodels import Result, fit_em, fit_svi, get_method
from probmodels.datasets import load
from probmodels.inference import Phase
from probmodels.inference.diagnostics.guides import judge_evidence

MISSED = 0.4  # of every posterior, by guides that are right elsewhere


def tree_of(log_weight: np.ndarray) -> xr.DataTree:
    stats = xr.Dataset({"log_weight_by_row": (("chain", "draw", "data"), log_weight[None])})
    return xr.DataTree.from_dict({"sample_stats": stats})


def blind(result: Result) -> Result:
    """The result of a guide that never draws a share of the posterior: its weights are smaller by one factor."""
    tree = result.tree.copy()
    stats = tree["sample_stats"].to_dataset()
    names = [name for name in stats if str(name).startswith("log_weight")]
    tree["sample_stats"] = xr.DataTree(stats.assign({name: stats[name] + math.log(1 - MISSED) for name in names}))
    return Result(tree, result.guide_state)


@pytest.mark.parametrize("far", [0.0, 0.05, 0.3])
def test_the_total_variation_is_that_of_the_two_distributions(far: float) -> None:
    rng = np.random.default_rng(0)
    p = np.array([0.4, 0.3, 0.2, 0.1])
    q = p + far * np.array([1, -0.5, -0.25, -0.25])
    drawn = rng.choice(4, p=q, size=(4000, 30))
    evidence = -3.0
    (finding,) = judge_evidence(tree_of(evidence + np.log(p / q)[drawn]), np.full(30, evidence))
    assert finding.harmful == (far > 0.1)
    average = float(finding.verdict.split(" ± ")[0].rsplit(" ", 1)[1])
    assert average == pytest.approx(far, abs=0.002)  # six errors of a mean over 120,000 draws


def test_few_draws_and_other_rows_are_left_to_the_weights() -> None:
    assert not list(judge_evidence(tree_of(np.zeros((5, 3))), np.zeros(3)))
    assert not list(judge_evidence(tree_of(np.zeros((50, 3))), np.zeros(4)))
    assert len(list(judge_evidence(tree_of(np.zeros((50, 3))), np.zeros(2), np.array([0, 2])))) == 1


def bayesian_network() -> tuple[Result, Result]:
    data = load("gaussian_network", num_variables=4, num_samples=100, seed=0)
    problem = get_method("bayesian_network").make_problem(data, num_particles=32, hidden=32, anneal=100)
    run = partial(fit_svi, problem, schedule="cosine", clip_norm=5.0, progress=False)
    return run(num_steps=300, lr=0.03), run(num_steps=1, lr=1e-9)


def hierarchical_mixture() -> tuple[Result, Result]:
    data = load("petals", num_rows=400, num_clusters=2, num_petals=3, distance=1.5, seed=1)
    options: dict[str, Any] = {"num_clusters": 2, "num_petals": 3, "init": [[0.3, -1.2], [-0.3, 1.2]], "hidden": 32}
    problem = get_method("hierarchical_mixture").make_problem(data, learn_sigma=True, sigma=0.25, **options)
    phases = [Phase("e_step", steps=4, lr=0.02, schedule=lambda step: 0.02 ** (step / 800)), Phase("wake", lr=0.03)]
    run = partial(fit_em, problem, num_samples=50, progress=False, batch_size=100)
    return run(phases=phases, num_rounds=200), run(phases=[Phase("e_step", lr=1e-9)], num_rounds=1)


def discrete_vae() -> tuple[Result, Result]:
    from test_discrete_vae import bars

    problem = get_method("discrete_vae").make_problem(
        bars(500), num_latents=2, num_codes=6, embedding=4, hidden=32, layers=1, guide_hidden=32
    )
    phase = Phase("joint", num_particles=4, lr=0.02, schedule=lambda step: 0.05 ** (step / 600), plus={"sleep": 0.1})
    run = partial(fit_em, problem, num_samples=40, progress=False, batch_size=100)
    return run(phases=[phase], num_rounds=600), run(phases=[Phase("joint", lr=1e-9)], num_rounds=1)


@pytest.mark.slow
@pytest.mark.parametrize("make", [bayesian_network, hierarchical_mixture, discrete_vae])
def test_right_guides_pass_and_blind_or_untrained_ones_do_not(make: Any) -> None:
    fitted, untrained = make()
    assert fitted.diagnose().ok, str(fitted.diagnose())
    assert "by the exact evidence" in str(fitted.diagnose())
    assert blind(fitted).diagnose().inference == "failed"
    assert not untrained.diagnose().ok


@pytest.mark.slow
def test_the_policy_of_a_grammar_is_judged_by_the_inside_algorithm() -> None:
    data = load("sentences", num_sentences=60, max_length=6, seed=0)
    problem = get_method("grammar").make_problem(data, num_nonterminals=3, num_preterminals=4, width=16, layers=1)
    result = fit_em(problem, phases=["joint"], num_rounds=5, lr=1e-3, num_samples=30, clip_norm=1e5, progress=False)
    report = result.diagnose()
    assert "by the exact evidence" in str(report)
    assert report.inference == "failed"  # of five rounds
    evidence = get_method("grammar").exact_log_likelihood(problem, result).values
    weights = result.sample_stats["log_weight_by_row"].values[0]
    gap = evidence - weights.mean(0)
    assert (gap > -4 * weights.std(0) / np.sqrt(len(weights))).all()  # the divergence of each sentence


@pytest.mark.slow
def test_a_decoder_is_judged_by_images_held_out() -> None:
    fitted, untrained = discrete_vae()
    assert fitted.diagnose().model == "passed"
    assert untrained.diagnose().model == "failed"
    from probmodels.datasets.images import make_images

    noise = np.random.default_rng(0).integers(2, size=(60, 4, 4))
    data = make_images(noise, split=np.repeat(["train", "test"], 30))
    problem = get_method("discrete_vae").make_problem(data, num_latents=2, num_codes=6, hidden=64)
    heart = fit_em(problem, phases=[Phase("joint", lr=0.01)], num_rounds=300, num_samples=30, progress=False)
    assert heart.diagnose().model == "failed"
