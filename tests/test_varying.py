"""Programs whose sites differ between runs, rewritten as programs with fixed sites."""

from __future__ import annotations

import copy
import itertools
import pickle

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import textbook
import torch
from pyro import poutine
from torch import Tensor

from probmodels.errors import ProblemError
from probmodels.guides.auto import with_guide
from probmodels.guides.gflownet import make_policy
from probmodels.inference import Problem, check_exact, enumerate_posterior, fit_svi
from probmodels.inference.flows.balance import VarGrad
from probmodels.inference.programs.varying import with_fixed_sites

LENGTHS, STEPS, Y = textbook.LENGTHS, textbook.STEPS, textbook.END


def exact() -> dict[tuple[int, tuple[int, ...]], float]:
    """Posterior probability of every length and its steps, from the formula of the model."""
    logs = {}
    for length in range(3):
        for steps in itertools.product(range(2), repeat=length + 1):
            prior = LENGTHS[length].log() + STEPS[list(steps)].log().sum()
            logs[length, steps] = float(prior + dist.Normal(float(sum(steps)), 0.7).log_prob(Y))
    total = np.logaddexp.reduce(list(logs.values()))
    return {key: float(np.exp(value - total)) for key, value in logs.items()}


def test_densities_are_those_of_the_program_times_a_normalised_factor() -> None:
    fixed = with_fixed_sites(textbook.PROBLEMS["walk"])
    assert set(fixed.sites) == {
        "length",
        "y",
        "step_0",
        *(f"step_{t}{end}" for t in (1, 2) for end in ("", "_present")),
    }
    for length in range(3):
        values = {"length": torch.tensor(length)} | {f"step_{t}": torch.tensor(1) for t in range(3)}
        trace = poutine.trace(poutine.condition(fixed.model, values)).get_trace(Y)
        plain = poutine.trace(poutine.condition(textbook.walk, values)).get_trace(Y)
        extra = (2 - length) * np.log(1 / 2)
        assert float(trace.log_prob_sum()) == pytest.approx(float(plain.log_prob_sum()) + extra, abs=1e-5)
        present = [float(trace.nodes[f"step_{t}_present"]["value"]) for t in (1, 2)]
        assert present == [float(t <= length) for t in (1, 2)]


@pytest.mark.slow
def test_an_automatic_policy_finds_the_posterior_of_a_program_of_random_length() -> None:
    problem = with_guide(textbook.PROBLEMS["walk"], "gflownet", hidden=16)
    problem = Problem(
        **{**{k: getattr(problem, k) for k in ("name", "model", "guide", "args")}, "loss": VarGrad(6, epsilon=0.1)}
    )
    result = fit_svi(problem, num_steps=250, lr=0.05, lr_decay=0.1, num_samples=1500, progress=False, compile="eager")
    draws = {name: result.posterior[name].values[0] for name in result.posterior}
    found: dict[tuple[int, tuple[int, ...]], float] = {}
    for row in range(1500):
        length = int(draws["length"][row])
        key = (length, tuple(int(draws[f"step_{t}"][row]) for t in range(length + 1)))
        found[key] = found.get(key, 0.0) + 1 / 1500
        assert [draws[f"step_{t}_present"][row] for t in (1, 2)] == [t <= length for t in (1, 2)]
    posterior = exact()
    for name, value in [("length", k) for k in range(3)] + [("step_0", 1)]:
        marginal = sum(p for (n, s), p in posterior.items() if (n if name == "length" else s[0]) == value)
        assert abs((draws[name] == value).mean() - marginal) < 0.04  # Monte Carlo error of 1500 draws: 0.013
    # As many draws of the exact posterior would differ from it by 0.035 on average.
    assert sum(abs(found.get(key, 0.0) - p) for key, p in posterior.items()) / 2 < 0.06


def test_sites_that_stay_are_left_as_they_are() -> None:
    def steady() -> None:
        pyro.sample("z", dist.Bernoulli(0.3))

    problem = Problem("steady", steady)
    assert with_fixed_sites(problem) is problem


def test_sites_in_plates_keep_their_shapes_and_copies_work() -> None:
    def model() -> None:
        if pyro.sample("more", dist.Bernoulli(0.5)):
            with pyro.plate("row", 3):
                pyro.sample("z", dist.Categorical(torch.ones(2, 4) / 4).to_event(1).mask(True))
                pyro.sample("hot", dist.OneHotCategorical(torch.ones(3) / 3))

    problem = with_fixed_sites(Problem("plates", model))
    assert problem.sites["z"].shape == (3, 2)
    assert problem.sites["hot"].shape == (3, 3)
    assert problem.sites["z"].dims[0] == "row"
    copy.deepcopy(problem.model)()
    trace = poutine.trace(poutine.condition(problem.model, {"more": torch.tensor(0.0)})).get_trace()
    assert float(trace.log_prob_sum()) == pytest.approx(np.log(0.5) + 6 * np.log(1 / 4) + 3 * np.log(1 / 3), abs=1e-5)
    assert pickle.dumps(problem.model.missing)  # type: ignore[union-attr]


def test_what_may_not_come_and_go_is_named() -> None:
    def vary(fn: dist.Distribution, obs: Tensor | None = None) -> Problem:
        def model() -> None:
            pyro.sample("always", dist.Bernoulli(0.5))
            if pyro.sample("more", dist.Bernoulli(0.5)):
                pyro.sample("z", fn, obs=obs)

        return Problem("vary", model)

    with pytest.raises(ProblemError, match="continuous site 'z' is not there in every run"):
        with_fixed_sites(vary(dist.Normal(0.0, 1.0)))
    with pytest.raises(ProblemError, match="observed site 'z' is not there"):
        with_fixed_sites(vary(dist.Bernoulli(0.5), torch.tensor(1.0)))
    with pytest.raises(ProblemError, match="'z' of distribution Poisson"):
        with_fixed_sites(vary(dist.Poisson(2.0)))

    def grows() -> None:
        size = int(pyro.sample("size", dist.Bernoulli(0.5))) + 1
        pyro.sample("z", dist.Bernoulli(torch.full((size,), 0.5)).to_event(1))

    with pytest.raises(ProblemError, match=r"'z' has shape \(\d,\) in one run of the model and \(\d,\)"):
        with_fixed_sites(Problem("grows", grows))

    with pytest.raises(ProblemError, match="not there in every run of the model; list its sites by with_fixed_sites"):
        make_policy(vary(dist.Bernoulli(0.5)))


def test_a_program_without_bound_is_refused_when_it_runs_over() -> None:
    def model() -> None:
        t = 0
        while pyro.sample(f"more_{t}", dist.Bernoulli(0.3)):
            t += 1

    problem = with_fixed_sites(Problem("geometric", model), num_traces=30)
    over = {f"more_{t}": torch.tensor(1.0) for t in range(40)} | {"more_40": torch.tensor(0.0)}
    with pytest.raises(ProblemError, match=r"'more_\d+' was in none of the prior draws"):
        poutine.condition(problem.model, over)()


def number_of_parts(x: Tensor) -> None:
    """One to three parts, each value in one of them: as many values of a label as there are parts."""
    count = int(pyro.sample("count", dist.Categorical(torch.ones(3) / 3))) + 1
    place = [torch.tensor([0.0]), torch.tensor([-2.0, 2.0]), torch.tensor([-2.0, 0.0, 2.0])][count - 1]
    for i in range(len(x)):
        z = pyro.sample(f"z_{i}", dist.Categorical(torch.ones(count) / count)) if count > 1 else torch.tensor(0)
        pyro.sample(f"x_{i}", dist.Normal(place[z], 0.8), obs=x[i])


PARTS = torch.tensor([-1.5, 1.8, 0.2])


def test_labels_with_more_values_in_some_runs_than_in_others() -> None:
    fixed = with_fixed_sites(Problem("parts", number_of_parts, args=(PARTS,)))
    values = {"count": torch.tensor(1), **{f"z_{i}": torch.tensor(i % 2) for i in range(3)}}

    def log_density(**changed: Tensor) -> float:
        return float(poutine.trace(poutine.condition(fixed.model, values | changed)).get_trace(PARTS).log_prob_sum())

    plain = poutine.trace(poutine.condition(number_of_parts, values)).get_trace(PARTS)
    assert log_density() == pytest.approx(float(plain.log_prob_sum()), abs=1e-5)
    assert log_density(z_0=torch.tensor(2)) == -np.inf
    assert log_density(z_0=torch.tensor(2), count=torch.tensor(2)) > -np.inf

    table = enumerate_posterior(fixed)
    prior = torch.tensor([-2.0, 0.0, 2.0])
    places = [prior[1:2], prior[[0, 2]], prior]
    each = [torch.stack([dist.Normal(p, 0.8).log_prob(x) for p in places[k]]) for k in range(3) for x in PARTS]
    logs = torch.stack([sum(each[3 * k + i].exp().mean().log() for i in range(3)) for k in range(3)])  # type: ignore[arg-type]
    for count, expected in enumerate(logs.softmax(0).tolist()):
        found = float(table["probability"].values[table["count"].values == count].sum())
        assert found == pytest.approx(expected, abs=1e-5)


def test_an_automatic_policy_fits_labels_of_varying_range() -> None:
    problem = with_guide(Problem("parts", number_of_parts, args=(PARTS,)), "gflownet", hidden=32)
    result = fit_svi(problem, num_steps=250, num_samples=300, progress=False)
    assert result.tree.attrs["execution"] == "graph"
    assert float(check_exact(problem, result)["total_variation"]) < 0.05
    assert np.isfinite(result.tree["sample_stats"]["log_weight"].values).all()


def test_more_values_than_any_prior_draw_had_are_refused() -> None:
    def rare() -> None:
        many = pyro.sample("many", dist.Bernoulli(torch.tensor(1e-6)))
        some = pyro.sample("some", dist.Bernoulli(0.5))
        count = 4 if many else 2 + int(some)
        pyro.sample("z", dist.Categorical(torch.ones(count) / count))

    problem = with_fixed_sites(Problem("rare", rare))
    with pytest.raises(ProblemError, match="'z' has 4 values, more than the 3"):
        poutine.condition(problem.model, {"many": torch.tensor(1.0)})()

    def masked() -> None:
        count = 2 + int(pyro.sample("some", dist.Bernoulli(0.5)))
        pyro.sample("z", dist.Categorical(torch.ones(count) / count).mask(True))

    with pytest.raises(ProblemError, match="the masked site 'z'"):
        with_fixed_sites(Problem("masked", masked))
