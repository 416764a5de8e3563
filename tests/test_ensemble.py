"""Vectorised chains: exact posteriors, adaptation, resumption, starts, fallback and what they report."""

from __future__ import annotations

import logging
import math
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from inference_models import data, exact, mean_model, mean_problem
from test_mcmc import check_mean_and_sd

from probmodels.errors import ProblemError
from probmodels.inference import Problem, fit_svi, run_mcmc
from probmodels.inference.mcmc.chees import ChEESKernel
from probmodels.inference.mcmc.metric import Metric
from probmodels.inference.mcmc.pathfinder import find_paths
from probmodels.inference.programs.potential import Potential
from probmodels.inference.runtime.ops import isolated

quick = partial(run_mcmc, num_samples=100, warmup_steps=150, num_chains=16, progress=False)


def spread_covariance(size, ratio):
    """Covariance with sds from 1 to ``ratio`` along random directions."""
    generator = torch.Generator().manual_seed(0)
    vectors, _ = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))
    sds = torch.logspace(0, math.log10(ratio), size, dtype=torch.float64)
    return vectors @ torch.diag(sds**2) @ vectors.T


COVARIANCE = spread_covariance(8, 30.0)


def correlated_model():
    loc = torch.arange(8, dtype=torch.float64)
    pyro.sample("x", dist.MultivariateNormal(loc, COVARIANCE), infer={"event_dims": ["axis"]})


@pytest.mark.parametrize("metric", ["auto", "dense", "low_rank", "diagonal"])
def test_a_correlated_normal_is_sampled_exactly_by_every_metric(metric):
    result = quick(Problem("normal", correlated_model), kernel_options={"metric": metric}, num_samples=150)
    draws = result.posterior["x"]
    assert draws.dims == ("chain", "draw", "axis")
    assert draws.shape[:2] == (16, 150)
    check_mean_and_sd(draws.values, np.arange(8), COVARIANCE.diagonal().sqrt().numpy())
    stats = result.tree["sample_stats"]
    assert stats.attrs["metric"] == ("dense" if metric in ("auto", "dense") else metric)
    assert set(stats.data_vars) >= {"lp", "energy", "acceptance_rate", "step_size", "n_steps", "diverging"}
    assert stats["lp"].shape == (16, 150)
    assert not stats["diverging"].any()
    assert 0.8 < float(stats["acceptance_rate"].mean()) < 0.99  # the target is 0.9
    energy = -dist.MultivariateNormal(torch.arange(8.0).double(), COVARIANCE).log_prob(torch.tensor(draws.values))
    np.testing.assert_allclose(-stats["lp"], energy, rtol=1e-6, atol=1e-6)
    if metric in ("auto", "dense"):  # a whitened normal needs short trajectories
        assert float(stats["n_steps"].mean()) < 8


def test_default_for_a_bare_model_is_vectorised_and_exact():
    problem = Problem("mean", mean_model, args=(data(),))
    result = quick(problem, num_chains=None, num_samples=None)
    assert result.tree.attrs["kernel"] == "ChEESKernel"
    assert dict(result.posterior.sizes)["chain"] == 32
    mean, sd = exact(data())
    check_mean_and_sd(result.posterior["mu"].values, mean, sd)
    np.testing.assert_array_equal(result.posterior["twice"], 2 * result.posterior["mu"])
    assert result.posterior["new"].dims == ("chain", "draw", "obs")
    assert result.diagnose().ok
    again = quick(problem, num_chains=None, num_samples=None)
    assert again.posterior.identical(result.posterior)
    assert not np.array_equal(
        quick(problem, num_chains=None, seed=1).posterior["mu"][:, :5], result.posterior["mu"][:, :5]
    )


def test_own_kernel_of_a_method_comes_first_and_vectorised_must_be_asked_for():
    assert quick(mean_problem(), num_chains=2, chain_method="sequential").tree.attrs["kernel"] == "ExactKernel"
    asked = quick(mean_problem(), chain_method="vectorized")
    assert asked.tree.attrs["kernel"] == "ChEESKernel"


class Stop(Exception):
    pass


@pytest.mark.parametrize("sweeps", [3, 70, 160])
def test_resumed_run_gives_the_draws_of_an_uninterrupted_one(tmp_path, monkeypatch, sweeps):
    problem = Problem("normal", correlated_model)
    whole = quick(problem, num_samples=30)
    sample, count = ChEESKernel.sample, [0]

    def stopping(self, params):
        count[0] += 1
        if count[0] > sweeps:
            raise Stop
        return sample(self, params)

    monkeypatch.setattr(ChEESKernel, "sample", stopping)
    with pytest.raises(Stop):
        quick(problem, num_samples=30, checkpoint=tmp_path / "run", checkpoint_every=0.0)
    monkeypatch.setattr(ChEESKernel, "sample", sample)
    resumed = quick(problem, num_samples=30, checkpoint=tmp_path / "run", checkpoint_every=0.0)
    assert resumed.posterior.identical(whole.posterior)
    assert resumed.tree["sample_stats"].to_dataset().identical(whole.tree["sample_stats"].to_dataset())
    longer = quick(problem, num_samples=50, checkpoint=tmp_path / "run")
    assert longer.posterior.isel(draw=slice(30)).identical(whole.posterior)


def test_thinning_keeps_every_nth_sweep():
    problem = Problem("normal", correlated_model)
    every, third = quick(problem, num_samples=30), quick(problem, num_samples=10, thin=3)
    np.testing.assert_array_equal(third.posterior["x"], every.posterior["x"][:, 2::3])


def test_discrete_sites_are_summed_out_and_drawn_afterwards():
    x = torch.tensor([-2.0, -1.8, 2.1, 1.9, 2.2])

    def mixture():
        locs = pyro.sample("locs", dist.Normal(torch.tensor([-2.0, 2.0]), 0.5).to_event(1))
        with pyro.plate("points", 5):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(locs[z.long()], 0.5), obs=x)

    posterior = quick(Problem("mixture", mixture)).posterior
    assert posterior["z"].dims == ("chain", "draw", "points")
    # So far apart that every point belongs to its mode, which makes the rest conjugate.
    for index, members in enumerate((x[:2], x[2:])):
        precision = 1 / 0.25 + len(members) / 0.25
        mean = float((torch.tensor([-2.0, 2.0])[index] / 0.25 + members.sum() / 0.25) / precision)
        check_mean_and_sd(posterior["locs"].values[..., index], mean, precision**-0.5)
    np.testing.assert_allclose(posterior["z"].mean(("chain", "draw")), [0, 0, 1, 1, 1], atol=0.01)


def test_models_without_a_graph_fall_back_to_nuts_and_say_why(caplog):
    def branching_model(y):
        x = pyro.sample("x", dist.Normal(y.new_zeros(()), 2.0))
        scale = 0.5 if float(x.detach()) < 100 else 0.6
        with pyro.plate("obs", len(y)):
            pyro.sample("y", dist.Normal(x, scale), obs=y)

    problem = Problem("branching", branching_model, args=(data(),))
    with caplog.at_level(logging.WARNING, logger="probmodels"):
        result = run_mcmc(problem, num_samples=150, warmup_steps=100, num_chains=2, progress=False)
    assert "NUTS instead of vectorised HMC" in caplog.text
    assert "sequential" in result.tree.attrs["spec"]  # a model defined in a function cannot go to other processes
    assert "value out of a tensor" in result.tree.attrs["fallback"]
    mean, sd = exact(data())
    check_mean_and_sd(result.posterior["x"].values, mean, sd)
    with pytest.raises(ProblemError, match=r"cannot be vectorised.*kernel='nuts'"):
        quick(problem, chain_method="vectorized")


@pytest.mark.parametrize("init", ["pathfinder", "uniform", "prior"])
def test_starts_by_name_lead_to_one_posterior(init):
    mean, sd = exact(data())
    result = quick(Problem("mean", mean_model, args=(data(),)), init=init)
    check_mean_and_sd(result.posterior["mu"].values, mean, sd)


def test_warm_starts_begin_at_draws_of_a_guide_or_of_an_earlier_run():
    problem = mean_problem()
    guide = fit_svi(problem, num_steps=400, lr=0.05, num_samples=50, progress=False)
    for kernel, method in (("chees", None), ("nuts", "sequential")):
        result = run_mcmc(
            problem, kernel=kernel, chain_method=method, init=guide, num_samples=1, warmup_steps=0, num_chains=5,
            progress=False, kernel_options={"target_accept_prob": 0.95},
        )  # fmt: skip
        assert result.posterior["mu"].shape == (5, 1)
    with pytest.raises(ProblemError, match=r"init lacks the sites \['mu'\]"):
        quick(problem, kernel="chees", init=guide.posterior[["twice"]])
    with pytest.raises(ProblemError, match=r"init='mode', which ChEESKernel does not know; known: .*prior"):
        quick(problem, kernel="chees", init="mode")
    with pytest.raises(ProblemError, match="chooses its starts itself"):
        quick(problem, init=guide, chain_method="sequential")


def test_bad_options_are_refused_before_the_run():
    problem = Problem("mean", mean_model, args=(data(),))
    for options, message in (
        (
            {"kernel_options": {"target_accept": 0.9}},
            "unknown option 'target_accept' of ChEESKernel; did you mean 'target_accept_prob'",
        ),
        ({"kernel_options": {"metric": "round"}}, "metric='round'; choose one of"),
        ({"kernel_options": {"target_accept_prob": 1.5}}, "target_accept_prob=1.5; give a number above 0 and below 1"),
        ({"kernel": "chees", "chain_method": "process"}, "moves all chains at once"),
        ({"kernel": "nuts", "chain_method": "vectorized"}, "moves one chain at a time"),
        ({"num_chains": 0}, "num_chains=0"),
    ):
        with pytest.raises(ProblemError, match=message):
            quick(problem, **options)


def test_metric_follows_rows_and_is_its_own_inverse():
    rows = torch.randn(200, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    rows = rows @ torch.linalg.cholesky(COVARIANCE).T
    identity = Metric(torch.ones(8, dtype=torch.float64))
    x = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for kind in ("dense", "low_rank", "diagonal"):
        metric = identity.renewed(rows, kind)
        torch.testing.assert_close(metric.inverse(metric.forward(x)), x)
        pulled = (metric.transposed(x) * x).sum(1)  # <S'g, x> = <g, S x>
        torch.testing.assert_close(pulled, (x * metric.forward(x)).sum(1))
        whitened = metric.inverse(rows.reshape(-1, 8))
        eigenvalues = torch.linalg.eigvalsh(whitened.T @ whitened / len(whitened))
        if kind != "diagonal":  # 1600 rows of 8 unknowns: eigenvalues within about four sds, sqrt(8 / 1600) each
            assert 0.7 < float(eigenvalues.min()) < float(eigenvalues.max()) < 1.35


def test_low_rank_metric_finds_the_few_stretched_directions_of_a_wide_posterior():
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(20, 32, 400, dtype=torch.float64, generator=generator)
    rows[..., :50] += 3 * rows[..., -1:]
    metric = Metric(torch.ones(400, dtype=torch.float64)).renewed(rows, "auto")
    assert metric.vectors is not None
    assert metric.vectors.shape[1] <= 5
    along = metric.vectors[:, metric.stretch.argmax()]
    assert float(along[:50].square().sum() + along[-1].square()) > 0.9


def test_chains_that_get_stuck_in_warm_up_are_moved_and_counted(monkeypatch):
    kernel = ChEESKernel(Problem("normal", correlated_model), num_chains=8)
    with isolated(0):
        kernel.setup(40)
        params = kernel.initial_params
        accept = torch.ones(8, dtype=torch.float64)
        accept[2] = 0.0
        kernel._progress = accept * 10
        kernel._rescue(10)
        assert kernel.attrs()["moved_chains"] == 1
        assert any(torch.equal(kernel._z[2], params["z"][other]) for other in range(8) if other != 2)
        assert torch.equal(kernel._z[3], params["z"][3])


def test_paths_find_the_normal_itself_and_the_mass_of_a_funnel():
    potential = Potential(Problem("normal", correlated_model))
    with isolated(0):
        evaluate = potential.batched(8)
        starts = torch.stack([potential.uniform(2.0) for _ in range(8)])
        paths = find_paths(evaluate, starts, num_draws=200, max_steps=80)
    # The elbo of the posterior itself is the log of the normalising constant, here zero, without error.
    torch.testing.assert_close(paths.elbo, torch.zeros(8, dtype=torch.float64), atol=1e-2, rtol=0)
    draws = paths.draws.reshape(-1, 8).numpy()
    np.testing.assert_allclose(draws.std(0), COVARIANCE.diagonal().sqrt(), rtol=4 * (2 * len(draws)) ** -0.5 + 0.01)

    def funnel():
        scale = pyro.sample("log_scale", dist.Normal(0.0, 1.5))
        pyro.sample("x", dist.Normal(0.0, (scale / 2).exp()).expand([9]).to_event(1))

    potential = Potential(Problem("funnel", funnel))
    with isolated(0):
        evaluate = potential.batched(16)
        paths = find_paths(evaluate, torch.stack([potential.uniform(2.0) for _ in range(16)]))
    assert torch.isfinite(evaluate(paths.starts)[0]).all()
    # The density grows without bound towards log_scale = -10 (mode at -10.1); the mass lies within a few sds of zero.
    assert (paths.starts[:, 0].abs() < 6).float().mean() > 0.6


@pytest.mark.parametrize(("size", "count", "ratio"), [(300, 4, 2), (300, 64, 2), (12, 5, 5)])
def test_a_few_paths_of_few_calls_serve_any_number_of_chains_at_any_scale(size, count, ratio):
    generator = torch.Generator().manual_seed(5)
    scales = torch.logspace(-ratio, ratio, size, dtype=torch.float64)[torch.randperm(size, generator=generator)]
    loc = scales * torch.randn(size, dtype=torch.float64, generator=generator)
    calls = []

    def evaluate(z):
        assert z.shape == (count, size)
        calls.append(1)
        x = (z - loc) / scales
        return 0.5 * x.square().sum(1), x / scales

    with isolated(0):
        starts = 4 * torch.rand(count, size, dtype=torch.float64) - 2
        paths = find_paths(evaluate, starts)
    assert len(paths.elbo) <= 9
    assert paths.calls == len(calls) < 400
    exact = float(scales.log().sum()) + 0.5 * size * np.log(2 * np.pi)
    if size <= 20:  # the Hessian itself is known
        np.testing.assert_allclose(paths.elbo, exact, atol=0.05)
    # A draw from the posterior has a squared distance of chi-square law; uniform starts have 1e6 and more.
    distance = ((paths.starts - loc) / scales).square().sum(1)
    assert float(distance.max()) < 2 * size + 6 * np.sqrt(2 * size)


def two_modes():
    x = pyro.sample("x", dist.Normal(0.0, 1.0).expand([19]).to_event(1))
    narrow = 17 - 0.5 * ((x[0] - 1.7) / 0.1) ** 2
    pyro.factor("modes", torch.logaddexp(-0.5 * ((x[0] + 0.5) / 0.3) ** 2, narrow))


def test_paths_in_modes_without_mass_draw_from_the_normals_of_others():
    potential = Potential(Problem("modes", two_modes))
    with isolated(3):
        evaluate = potential.batched(8)
        starts = torch.stack([potential.uniform(2.0) for _ in range(8)])
        paths = find_paths(evaluate, starts)
    assert 1 <= int((paths.elbo > paths.elbo.max() - 10).sum()) <= 2  # so few paths end in the narrow mode
    rows = torch.cat([paths.starts[None], paths.draws]).flatten(0, 1)
    assert (rows[:, 0] > 1).all()
    assert len(torch.unique(paths.draws.flatten(0, 1), dim=0)) == 80


def test_one_path_that_finds_the_mass_is_enough_for_a_metric():
    result = quick(
        Problem("modes", two_modes), seed=3, num_chains=8, warmup_steps=100, num_samples=100,
        kernel_options={"metric": "low_rank", "max_leapfrog": 127},
    )  # fmt: skip
    others = result.posterior["x"].values[..., 1:]
    assert np.abs(others.std((0, 1)) - 1).max() < 0.2  # effective sizes of 300 and more: five standard errors


def test_copies_among_rows_make_no_direction_of_a_metric():
    generator = torch.Generator().manual_seed(4)
    rows = torch.randn(10, 19, dtype=torch.float64, generator=generator)
    rows = rows[torch.randint(10, (80,), generator=generator)].reshape(10, 8, 19)
    identity = Metric(torch.ones(19, dtype=torch.float64))
    assert float(identity.renewed(rows, "low_rank").stretch.min()) < 1e-6  # what they pass for if nobody counts
    metric = identity.renewed(rows, "low_rank", distinct=10)
    assert metric.stretch is None or float(metric.stretch.min()) > 0.1


def test_a_path_in_a_steep_place_leaves_the_normals_of_others_alone():
    scales = torch.logspace(0, 2.5, 6, dtype=torch.float64)

    def evaluate(z):
        steep = z[:, :1] > 1e4
        wide, narrow = z / scales, 1e7 * (z - 2e4)
        potential = 0.5 * torch.where(steep, narrow, wide).square().sum(1)
        return potential, torch.where(steep, 1e7 * narrow, wide / scales)

    starts = torch.zeros(2, 6, dtype=torch.float64)
    starts[0], starts[1] = scales, 2e4
    with isolated(0):
        paths = find_paths(evaluate, starts)
    exact = float(scales.log().sum()) + 3 * np.log(2 * np.pi)  # the log of the wide normal's volume
    np.testing.assert_allclose(float(paths.elbo[0]), exact, atol=1e-3)


def test_callbacks_learn_where_the_chains_stand_and_the_bar_says_what_is_worth_knowing(monkeypatch):
    monkeypatch.setattr("probmodels.inference.mcmc.chains._REPORT_SECONDS", 0.0)
    seen = []
    quick(Problem("normal", correlated_model), num_samples=20, warmup_steps=30, callbacks=[seen.append])
    assert [step.phase for step in seen[:2]] == ["capturing the graph", "finding starting points"]
    assert [step.iteration for step in seen] == [0, 0, *range(51), 50]
    assert {step.total for step in seen} == {50}
    assert [step.phase for step in seen[2:]] == ["warm-up"] * 30 + ["sampling"] * 22
    assert seen[12].text.startswith("10/50 ")
    assert "divergences 0" in seen[47].text
    shown = float(seen[-2].text.split("least ess ~")[1])
    assert 16 <= shown <= 16 * 20
