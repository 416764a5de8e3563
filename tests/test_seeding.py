"""Policies that are fitted at annealed draws, too: they keep all modes, and say where nothing was annealed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import lost_modes
import pyro
import pyro.distributions as dist
import pytest
import textbook
import torch
from pyro import poutine
from torch import Tensor, nn

from probmodels.errors import ProblemError
from probmodels.guides import with_guide
from probmodels.guides.branches import read_branches
from probmodels.inference import (
    AnnealedVarGrad,
    Problem,
    VarGrad,
    check_exact,
    diagnose,
    fit_em,
    fit_svi,
    with_fixed_sites,
)
from probmodels.inference.flows import seeding
from probmodels.inference.flows.annealing import Annealed
from probmodels.inference.flows.density import Density
from probmodels.inference.programs.programs import opened
from probmodels.inference.programs.traces import shared_plates
from probmodels.inference.runtime.ops import isolated

FIT: dict[str, Any] = {"num_samples": 1000, "progress": False}
SQUARE = with_guide(lost_modes.PROBLEMS["latin_square"], "gflownet")
SMALL = with_guide(textbook.PROBLEMS["noisy_or"], "gflownet", hidden=8)


def worst(problem: Problem, result: Any) -> float:
    """Largest total variation of any row."""
    return float(check_exact(problem, result)["total_variation"].max())


def test_all_modes_are_kept_where_annealed_draws_show_them() -> None:
    result = fit_svi(SQUARE, num_steps=600, **FIT)
    assert "2000 draws" in result.tree.attrs["annealing"]
    assert result.tree.attrs["execution"] == "graph"
    assert worst(SQUARE, result) < 0.05
    assert diagnose(result).inference == "passed"


def test_without_annealed_draws_modes_are_lost_and_the_verdict_says_so() -> None:
    problem = replace(SQUARE, loss=VarGrad())
    result = fit_svi(problem, num_steps=600, **FIT)
    assert "annealing" not in result.tree.attrs
    assert worst(problem, result) > 0.3
    assert diagnose(result).inference == "failed"


def unknown_number(x: Tensor) -> None:
    """One to three components, then the component of each value in a plate of rows."""
    count = pyro.sample("count", dist.Categorical(torch.ones(3) / 3))
    place = torch.tensor([[0.0, 0.0, 0.0], [-2.0, 2.0, 0.0], [-2.0, 0.0, 2.0]])[count]
    share = (torch.arange(3) <= count).float()
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(share / share.sum()))
        pyro.sample("x", dist.Normal(place[z], torch.tensor([2.0, 0.6, 0.5])[count]), obs=x)


def test_rows_that_share_a_site_and_values_that_are_impossible() -> None:
    problem = with_guide(Problem("number", unknown_number, args=(lost_modes.HEIGHTS,)), "gflownet")
    result = fit_svi(problem, num_steps=600, **FIT)
    assert worst(problem, result) < 0.05
    assert diagnose(result).inference == "passed"


@pytest.mark.parametrize(("name", "most"), [("walk", 0.01), ("mixture", 0.04), ("noisy_or", 0.03)])
def test_programs_that_branch_and_rows_and_plates(name: str, most: float) -> None:
    problem = with_guide(textbook.PROBLEMS[name], "gflownet")
    result = fit_svi(problem, num_steps=400, **FIT)
    assert "draws in" in result.tree.attrs["annealing"]
    assert worst(problem, result) < most


def test_equal_seeds_give_equal_numbers() -> None:
    one, two, other = (fit_svi(SMALL, num_steps=20, seed=seed, **FIT) for seed in (3, 3, 4))
    assert one.group("fit")["loss"].equals(two.group("fit")["loss"])
    assert not one.group("fit")["loss"].equals(other.group("fit")["loss"])


def test_an_interrupted_fit_goes_on_to_the_same_numbers(tmp_path: Path) -> None:
    whole = fit_svi(SMALL, num_steps=30, **FIT)
    stop = [lambda step: step.number == 12]
    fit_svi(SMALL, num_steps=30, callbacks=stop, checkpoint=tmp_path, **FIT)
    again = fit_svi(SMALL, num_steps=30, checkpoint=tmp_path, **FIT)
    assert again.group("fit")["loss"].equals(whole.group("fit")["loss"])
    assert again.posterior.equals(whole.posterior)


# --- where nothing is annealed ---------------------------------------------------------------------------------------


def shifted(y: Tensor) -> None:
    z = pyro.sample("z", dist.Bernoulli(0.5))
    mu = pyro.sample("mu", dist.Normal(4 * z - 2, 1.0))
    pyro.sample("y", dist.Normal(mu.abs(), 1.0), obs=y)


def learned(y: Tensor) -> None:
    logit = pyro.param("logit", torch.tensor(0.3))
    z = pyro.sample("z", dist.Bernoulli(logits=logit))
    pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def tied() -> None:
    total = pyro.sample("z", dist.Bernoulli(0.5).expand([100]).to_event(1)).sum(-1)
    pyro.factor("even", -0.001 * total)


def stubborn() -> None:
    """A guide that reads the value of its first site, so that it cannot run for many draws."""
    first = pyro.sample("s_0", dist.Bernoulli(pyro.param("p", torch.tensor(0.5))))
    pyro.sample("s_1", dist.Bernoulli(0.9 if float(first) > 0 else 0.1))


def pair() -> None:
    s = [pyro.sample(f"s_{i}", dist.Bernoulli(0.5)) for i in range(2)]
    pyro.factor("energy", 2.0 * (s[0] == s[1]).float())


Y = torch.tensor(0.7)
ELSEWHERE: dict[str, tuple[Problem, dict[str, Any], str]] = {
    "minibatches": (textbook.PROBLEMS["mixture"], {"batch_size": 10}, "a part of the rows"),
    "warm-up": (textbook.PROBLEMS["noisy_or"], {"kl_warmup": 5}, "kl_warmup"),
    "continuous sites": (Problem("shifted", shifted, args=(Y,)), {}, "continuous"),
    "large models": (Problem("tied", tied), {}, "takes too long"),
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_results_say_why_nothing_was_annealed(name: str) -> None:
    plain, options, why = ELSEWHERE[name]
    problem = with_guide(plain, "gflownet", hidden=8)
    result = fit_svi(problem, num_steps=2, num_samples=10, progress=False, **options)
    assert result.tree.attrs["annealing"].startswith("none: ")
    assert why in result.tree.attrs["annealing"]
    same = fit_svi(replace(problem, loss=VarGrad()), num_steps=2, num_samples=10, progress=False, **options)
    assert same.group("fit")["loss"].equals(result.group("fit")["loss"])  # it is plain VarGrad then


def test_em_that_learns_the_model_says_so() -> None:
    problem = with_guide(Problem("learned", learned, args=(Y,)), "gflownet", hidden=8)
    result = fit_em(problem, num_rounds=2, num_samples=10, progress=False)
    assert "parameters of the model are learned" in result.tree.attrs["annealing"]


def test_joint_fits_and_guides_for_one_draw_say_so() -> None:
    problem = with_guide(Problem("learned", learned, args=(Y,)), "gflownet", hidden=8)
    result = fit_svi(replace(problem, loss=AnnealedVarGrad(joint="equal")), num_steps=2, num_samples=10, progress=False)
    assert "joint" in result.tree.attrs["annealing"]
    result = fit_svi(
        Problem("pair", pair, stubborn, loss="AnnealedVarGrad"), num_steps=2, num_samples=10, progress=False
    )
    assert "many draws at once" in result.tree.attrs["annealing"]


def test_own_guides_that_run_in_a_plate_are_fitted_at_annealed_draws() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.logit = nn.Parameter(torch.zeros(3))

        def forward(self) -> None:
            pyro.module("own", self)
            first = pyro.sample("s_0", dist.Bernoulli(logits=self.logit[0]))
            pyro.sample("s_1", dist.Bernoulli(logits=self.logit[1] + self.logit[2] * first))

    problem = Problem("pair", pair, Own(), loss=AnnealedVarGrad(batch=16))
    result = fit_svi(problem, num_steps=300, lr=0.05, num_samples=10, progress=False)
    assert "draws in" in result.tree.attrs["annealing"]
    assert worst(problem, result) < 0.02


def test_more_draws_may_be_asked_for_in_each_step() -> None:
    few, many = (fit_svi(SMALL, num_steps=2, num_particles=count, **FIT) for count in (2, 300))
    assert not few.group("fit")["loss"].equals(many.group("fit")["loss"])
    assert few.group("fit")["loss"].equals(fit_svi(SMALL, num_steps=2, **FIT).group("fit")["loss"])


def test_replayed_values_say_so() -> None:
    problem = with_guide(Problem("pair", pair), "gflownet", hidden=8)
    phases = [{"objective": "replay", "options": {"loss": "AnnealedVarGrad"}}]
    result = fit_em(problem, phases=phases, num_rounds=2, num_samples=10, progress=False)
    assert "remembered values" in result.tree.attrs["annealing"]


# --- parts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["walk", "mixture", "noisy_or"])
def test_vectorised_densities_are_those_of_the_program(name: str) -> None:
    problem = with_fixed_sites(textbook.PROBLEMS[name])
    with isolated(seed=1), torch.no_grad():
        frames = shared_plates(poutine.trace(problem.model).get_trace(*problem.args))
        density = Density(problem, problem.model, frames, 100)
        evaluate = density.vectorised(20)
        index, _ = density.start(20)
        assert torch.allclose(evaluate(index), density.evaluate(index, []).log_joint, atol=1e-4)
        values = density.values(index, [])
        one = poutine.trace(poutine.condition(problem.model, {k: v[7] for k, v in values.items()}))
        assert abs(float(one.get_trace(*problem.args).log_prob_sum()) - float(evaluate(index)[7].sum())) < 1e-3


def test_few_draws_of_large_weight_are_not_all_that_steps_see(monkeypatch: pytest.MonkeyPatch) -> None:
    heavy = torch.full((2000,), -12.0, dtype=torch.float64)
    heavy[:20] = 0.0

    def weighted(density: Density) -> Annealed:
        index, _ = density.start()
        return Annealed(density.values(index, []), heavy[: len(index[0])], torch.zeros(len(index[0])), 1)

    monkeypatch.setattr(seeding, "anneal", weighted)
    loss = AnnealedVarGrad()
    with opened(SQUARE, 0) as programs, pyro.validation_enabled(False):
        assert "20 of them effective" in loss.prepare(programs, None, lambda _: None)
    assert loss._seeds is not None
    (draws,) = loss._seeds.values.values()
    assert len(draws.unique(dim=0)) > 300


def test_branches_are_read_from_runs() -> None:
    tables = {name: torch.tensor([0.0, 1.0]) for name in "abc"}
    runs: dict[Any, Any] = {(0,): {"b_present": {"value": 0.0}}, (1,): {"b_present": {"value": 1.0}}}
    branches = read_branches(["a", "b", "c"], tables, ["a"], runs)
    found = branches.has("b", {"a": torch.tensor([1.0, 0.0, 1.0])})
    assert found is not None
    assert found.tolist() == [1.0, 0.0, 1.0]
    assert branches.has("c", {}) is None
    with pytest.raises(ProblemError, match="'b' is drawn before"):
        read_branches(["b", "a", "c"], tables, ["a"], runs)


def test_refusals() -> None:
    with pytest.raises(ProblemError, match="batch=1"):
        AnnealedVarGrad(batch=1)
