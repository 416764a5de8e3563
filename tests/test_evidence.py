"""Exact posteriors by listing values, and guides judged by them and by their weights."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from probmodels.errors import ProblemError, ResultError
from probmodels.guides.auto import with_guide
from probmodels.inference import Problem, fit_svi, run_mcmc
from probmodels.inference.diagnostics.evidence import check_exact, check_weights, enumerate_posterior
from probmodels.inference.flows.balance import TrajectoryBalance

WEIGHTS = torch.tensor([0.5, 0.3, 0.2])
X = torch.tensor([-1.2, 0.3, 1.1, 2.6])


def mixture(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(WEIGHTS))
        pair = pyro.sample("pair", dist.Bernoulli(torch.tensor([0.3, 0.6])).to_event(1))
        loc = torch.tensor([-1.0, 1.0, 2.0])[z] + pair @ torch.tensor([0.5, -1.0])
        pyro.sample("x", dist.Normal(loc, 0.8), obs=x)
        pyro.sample("next", dist.Normal(loc, 0.8), infer={"generated": True})


def joint(x: float, z: int, first: int, second: int) -> float:
    loc = [-1.0, 1.0, 2.0][z] + 0.5 * first - second
    prior = [0.5, 0.3, 0.2][z] * (0.3 if first else 0.7) * (0.6 if second else 0.4)
    return prior * math.exp(-0.5 * ((x - loc) / 0.8) ** 2) / (0.8 * math.sqrt(2 * math.pi))


EXACT = torch.tensor([math.log(sum(joint(float(v), *z) for z in np.ndindex(3, 2, 2))) for v in X])


class Prior(nn.Module):
    """The prior as a guide, with a log normaliser that is one too large."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> None:
        pyro.module("prior", self)
        with pyro.plate("data", len(x)):
            pyro.deterministic("log_Z", EXACT + self.shift, event_dim=0)
            pyro.sample("z", dist.Categorical(logits=WEIGHTS.log() + 0 * self.shift))
            pyro.sample("pair", dist.Bernoulli(torch.tensor([0.3, 0.6])).to_event(1))


def test_probabilities_are_those_of_the_formula() -> None:
    found = enumerate_posterior(Problem("mixture", mixture, args=(X,), coords={"data": list("abcd")}))
    assert found["probability"].dims == ("configuration", "data")
    assert found.sizes["configuration"] == 12
    assert list(found["data"].values) == list("abcd")
    assert found["pair"].dims == ("configuration", "pair_dim_1")
    for row, x in enumerate(X.tolist()):
        total = sum(joint(x, *z) for z in np.ndindex(3, 2, 2))
        assert float(found["log_evidence"][row]) == pytest.approx(math.log(total), abs=1e-5)
        for place in range(12):
            pair = found["pair"].values[place].astype(int)
            expected = joint(x, int(found["z"][place]), *pair) / total
            assert float(found["probability"][place, row]) == pytest.approx(expected, abs=1e-5)


def test_sites_outside_of_plates_have_one_balance() -> None:
    def pairs() -> None:
        with pyro.plate("spin", 3):
            s = pyro.sample("s", dist.Bernoulli(0.5))
        pyro.factor("energy", 2.0 * s[0] * s[1] - s[2])

    found = enumerate_posterior(Problem("pairs", pairs))
    assert found["s"].dims == ("configuration", "spin")
    assert found["log_evidence"].ndim == 0
    energy = {s: math.exp(2.0 * s[0] * s[1] - s[2]) / 8 for s in np.ndindex(2, 2, 2)}
    assert float(found["log_evidence"]) == pytest.approx(math.log(sum(energy.values())), abs=1e-6)
    for place in range(8):
        expected = energy[tuple(found["s"].values[place].astype(int))] / sum(energy.values())
        assert float(found["probability"][place]) == pytest.approx(expected, abs=1e-6)


def hits() -> list[np.ndarray]:
    """Configurations in which an element has a value, for each of them."""
    every = list(np.ndindex(3, 2, 2))
    return [np.array([z[i] == k for z in every]) for i, count in enumerate((3, 2, 2)) for k in range(count)]


def test_a_guide_is_judged_as_sums_over_all_values_say() -> None:
    problem = Problem("mixture", mixture, Prior(), args=(X,), loss=TrajectoryBalance())
    result = fit_svi(problem, num_steps=1, lr=1e-9, num_samples=2, progress=False)
    found = check_exact(problem, result)
    for row, x in enumerate(X.tolist()):
        total = sum(joint(x, *z) for z in np.ndindex(3, 2, 2))
        q = np.array(
            [[0.5, 0.3, 0.2][z] * (0.3 if a else 0.7) * (0.6 if b else 0.4) for z, a, b in np.ndindex(3, 2, 2)]
        )
        p = np.array([joint(x, *z) for z in np.ndindex(3, 2, 2)]) / total
        assert float(found["total_variation"][row]) == pytest.approx(np.abs(q - p).sum() / 2, abs=1e-5)
        assert float(found["kl"][row]) == pytest.approx((q * np.log(q / p)).sum(), abs=1e-4)
        assert float(found["elbo"][row]) == pytest.approx(math.log(total) - (q * np.log(q / p)).sum(), abs=1e-4)
        assert float(found["log_z_error"][row]) == pytest.approx(1.0, abs=1e-4)
        marginals = [abs(((q - p) * hit).sum()) for hit in hits()]
        assert float(found["marginal_error"][row]) == pytest.approx(max(marginals), abs=1e-5)
    np.testing.assert_allclose(found["mass"], 1.0, atol=1e-5)

    weights = check_weights(problem, result, num_draws=4000)
    error = (weights["log_evidence"] - found["log_evidence"]) / weights["mcse"]
    assert (np.abs(error) < 4).all()
    assert (np.abs(weights["elbo"] - found["elbo"]) < 0.15).all()  # sd of a log weight is below 2
    assert ((weights["ess"] > 1) & (weights["ess"] < 4000)).all()


@pytest.mark.slow
def test_a_fitted_policy_is_close_in_every_measure() -> None:
    problem = with_guide(Problem("mixture", mixture, args=(X,), batch_plates=("data",)), "gflownet", hidden=16)
    result = fit_svi(problem, num_steps=300, lr=0.03, lr_decay=0.1, num_samples=2, progress=False)
    found = check_exact(problem, result)
    assert float(found["total_variation"].max()) < 0.1
    assert float(found["kl"].max()) < 0.05
    weights = check_weights(problem, result, num_draws=4000)
    assert (np.abs(weights["log_evidence"] - found["log_evidence"]) < 4 * weights["mcse"] + 1e-4).all()
    assert float(weights["khat"].max()) < 0.7


def test_what_cannot_be_listed_is_refused() -> None:
    def continuous() -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))

    def counts() -> None:
        pyro.sample("z", dist.Poisson(1.0))

    def many() -> None:
        with pyro.plate("spin", 40):
            pyro.sample("s", dist.Bernoulli(0.5))
        pyro.factor("energy", torch.tensor(0.0))

    with pytest.raises(ProblemError, match="'z' is continuous"):
        enumerate_posterior(Problem("continuous", continuous))
    with pytest.raises(ProblemError, match="'z' of distribution Poisson has no finite list"):
        enumerate_posterior(Problem("counts", counts))
    with pytest.raises(ProblemError, match="more than limit=100,000"):
        enumerate_posterior(Problem("many", many))
    problem = Problem("mixture", mixture, Prior(), args=(X,), loss=TrajectoryBalance())
    with pytest.raises(ProblemError, match="give a whole number of at least 100"):
        check_weights(problem, fit_svi(problem, num_steps=1, num_samples=2, progress=False), num_draws=10)

    def normal() -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))

    drawn = run_mcmc(Problem("normal", normal), num_samples=5, warmup_steps=5, num_chains=1, progress=False)
    with pytest.raises(ResultError, match="no parameters"):
        check_weights(problem, drawn)


def test_guides_with_paths_are_refused_by_name() -> None:
    def simple() -> None:
        pyro.sample("z", dist.Bernoulli(0.3))

    def guide() -> None:
        logit = pyro.param("logit", torch.zeros(()))
        pyro.sample("path", dist.Bernoulli(0.5), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Bernoulli(logits=logit))

    problem = Problem("paths", simple, guide)
    result = fit_svi(problem, num_steps=1, num_samples=2, progress=False)
    with pytest.raises(ProblemError, match=r"the guide draws \['path'\] beside the latent sites"):
        check_exact(problem, result)
