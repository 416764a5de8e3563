"""What every engine has to do, on one bare Pyro model and guide; a new engine is a new row."""

from __future__ import annotations

import json
import logging
import random

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from inference_models import MeanGuide, data, exact, mean_model

from probmodels import Problem, Result, fit_em, fit_svi, run_mcmc
from probmodels.errors import CheckpointError, ProblemError
from probmodels.inference.diagnostics.convergence import convergence

MCMC = {"num_samples": 150, "warmup_steps": 120}
ENGINES = {
    "vectorized": lambda problem, **given: run_mcmc(problem, **{**MCMC, "num_chains": 8, **given}),
    "nuts": lambda problem, **given: run_mcmc(
        problem, **{**MCMC, "num_chains": 2, "kernel": "nuts", "chain_method": "sequential", **given}
    ),
    "svi": lambda problem, **given: fit_svi(problem, **{"num_steps": 400, "lr": 0.03, "num_samples": 1000, **given}),
    "em": lambda problem, **given: fit_em(
        problem, **{"num_rounds": 400, "phases": ["e_step"], "lr": 0.03, "num_samples": 1000, **given}
    ),
}


@pytest.fixture(params=sorted(ENGINES))
def engine(request):
    run = ENGINES[request.param]
    return lambda problem, **given: run(problem, progress=False, **given)


@pytest.fixture
def problem():
    return Problem("mean", mean_model, MeanGuide(), args=(data(),), coords={"obs": list("abcdef")})


def test_the_posterior_is_found_labelled_and_complete(engine, problem):
    result = engine(problem)
    mean, sd = exact(data())
    draws = result.posterior["mu"].values
    ess = min(float(convergence(draws)["ess_bulk"]), draws.size)
    # Fits end within a few steps' noise of the optimum: 0.1 sd.
    slack = 0.1 if "log_weight" in result.tree["sample_stats"] else 0.0
    assert abs(draws.mean() - mean) < (4 / np.sqrt(ess) + slack) * sd
    assert abs(draws.std() / sd - 1) < 4 / np.sqrt(2 * min(ess, draws.size / 2)) + slack
    np.testing.assert_allclose(result.posterior["twice"], 2 * result.posterior["mu"], rtol=1e-12)
    assert result.posterior["new"].dims == ("chain", "draw", "obs")
    assert list(result.posterior["obs"].values) == list("abcdef")
    assert result.tree["observed_data"]["y"].dims == ("obs",)
    assert {"sample_stats", "posterior", "observed_data"} <= set(result.tree.children)
    assert set(json.loads(result.tree.attrs["versions"])) >= {"torch", "pyro-ppl", "probmodels"}


def test_a_seed_reproduces_and_the_callers_state_is_untouched(engine, problem):
    pyro.get_param_store().clear()
    pyro.param("mine", torch.ones(2))
    torch.manual_seed(11)
    np.random.seed(11)  # noqa: NPY002 -- the global state is what is tested
    random.seed(11)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    short = {"num_samples": 20}
    one, two, other = engine(problem, **short), engine(problem, **short), engine(problem, seed=5, **short)
    assert one.posterior.identical(two.posterior)
    assert not one.posterior.equals(other.posterior)
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002
    assert before[2] == random.getstate()
    assert list(pyro.get_param_store()) == ["mine"]
    pyro.get_param_store().clear()


def test_results_outlive_the_process(engine, problem, tmp_path):
    result = engine(problem, num_samples=20)
    result.save(tmp_path)
    loaded = Result.load(tmp_path, problem)
    assert loaded.posterior.equals(result.posterior)
    before, after = (r.predict(problem, num_samples=8, seed=3) for r in (result, loaded))
    assert before.equals(after)


def test_a_finished_checkpoint_answers_at_once_and_a_foreign_one_is_refused(engine, problem, tmp_path):
    first = engine(problem, num_samples=20, checkpoint=tmp_path / "run")
    again = engine(problem, num_samples=20, checkpoint=tmp_path / "run")
    assert again.posterior.identical(first.posterior)
    with pytest.raises(CheckpointError, match="seed"):
        engine(problem, num_samples=20, seed=1, checkpoint=tmp_path / "run")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        engine(problem, num_samples=20, checkpoint=tmp_path / "other")


def broken(kind):
    def model(y):
        scale = {"nan": math_nan(y), "zero": y.new_ones(())}[kind]
        mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 2.0))
        with pyro.plate("obs", len(y)):
            pyro.sample("y", dist.Normal(mu, scale, validate_args=False), obs=y)

    return model


def math_nan(y):
    return y.new_tensor(float("nan"))


def test_what_cannot_work_is_refused_before_the_first_step(engine, problem, monkeypatch):
    with pytest.raises(ProblemError, match=r"'y' gives nan"):
        engine(Problem("nan", broken("nan"), MeanGuide(), args=(data(),)))
    with pytest.raises(ProblemError, match=r"'y' gives inf"):
        engine(Problem("inf", broken("zero"), MeanGuide(), args=(data().index_fill(0, torch.tensor([2]), np.inf),)))
    with pytest.raises(ProblemError, match=r"coords\['obs'\] holds 2 labels"):
        engine(Problem("labels", mean_model, MeanGuide(), args=(data(),), coords={"obs": ["a", "b"]}))
    for bad in ({"seed": -1}, {"seed": 1.5}, {"num_samples": 0}):
        with pytest.raises(ProblemError, match=next(iter(bad))):
            engine(problem, **bad)


def test_engines_log_and_print_nothing_of_their_own(engine, problem, capsys, caplog):
    with caplog.at_level(logging.WARNING):
        engine(problem, num_samples=20)
    assert capsys.readouterr().out == ""
    assert not [record for record in caplog.records if record.name.startswith("probmodels")]
