"""Annealed chains on composed scores: posteriors with closed forms, the test by line integrals, levels, resuming."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
import xarray as xr

from probmodels import run_mcmc
from probmodels.errors import DataError, ProblemError, ResultError
from probmodels.guides.schedules import LinearSchedule
from probmodels.score_composition import Composed, levels_of, make_move, make_problem, tiny
from probmodels.score_composition.specs import load_fields
from probmodels.scores.closed import GaussianMixture, UniformBox
from probmodels.scores.fields import (
    Conditioned,
    FunctionField,
    Product,
    ScoreOnly,
    linear_observation,
    tempered,
)

SCHEDULE = LinearSchedule(-6.0, 4.0)
FIRST = GaussianMixture(SCHEDULE, torch.tensor([[0.5, -0.3]]), torch.tensor([[[0.5, 0.2], [0.2, 0.3]]]))
SECOND = GaussianMixture(SCHEDULE, torch.tensor([[-0.2, 0.4]]), torch.tensor([[[0.3, -0.1], [-0.1, 0.6]]]))
KNOWN = Product([FIRST, SECOND])
SCORES = Product([ScoreOnly(FIRST), ScoreOnly(SECOND)])
WIDTH = 0.3


def product_of_normals(powers=(1.0, 1.0)):
    """Mean and covariance at level 0, of the noised factors."""
    alpha, sigma = FIRST.scales(0.0, FIRST.means)
    noise = sigma**2 * torch.eye(2, dtype=torch.float64)
    factors = list(zip((FIRST, SECOND), powers, strict=True))
    precisions = [power * torch.linalg.inv(alpha**2 * field.covariances[0] + noise) for field, power in factors]
    covariance = torch.linalg.inv(sum(precisions))
    mean = covariance @ sum(p @ (alpha * f.means[0]) for p, f in zip(precisions, (FIRST, SECOND), strict=True))
    return mean, covariance


def run(field, *, levels=12, per_level=4, chains=500, draws=8, thin=2, seed=0, width=WIDTH, **options):
    options = {"denoise": False} | options
    return run_mcmc(
        make_problem(field, num_levels=levels, width=width),
        num_samples=draws,
        warmup_steps=levels * per_level,
        num_chains=chains,
        thin=thin,
        kernel_options=options,
        seed=seed,
        progress=False,
    )


def drawn(result):
    """Draws (chain, draw, size)."""
    return torch.as_tensor(result.tree["posterior"]["x"].values).double()


def check_moments(x, mean, covariance, slack=0.0):
    """Means and covariances within 4.5 standard errors, found from the spread over chains, which are independent."""
    count = len(x)
    by_chain = x.mean(1)
    error = by_chain.std(0) / math.sqrt(count)
    assert ((by_chain.mean(0) - mean).abs() < 4.5 * error + slack * covariance.diagonal().sqrt()).all()
    centred = x - mean
    squares = torch.einsum("cdi,cdj->cij", centred, centred) / x.shape[1]
    error = squares.std(0) / math.sqrt(count)
    assert ((squares.mean(0) - covariance).abs() < 4.5 * error + slack * covariance.diagonal().max()).all()


# -- posteriors with closed forms -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rule": "curve-simpson"},
        {"sampler": "mala", "step_size": 1.2},
        {"predictor": True},
        {"adapt": True},
    ],
    ids=["hmc", "curve-simpson", "mala", "predictor", "adapted"],
)
def test_products_of_normals_are_drawn_from(options):
    result = run(SCORES, **options)
    check_moments(drawn(result), *product_of_normals())
    assert dict(result.tree["posterior"]["x"].sizes) == {"chain": 500, "draw": 8, "feature": 2}


def test_the_exact_rule_and_powers():
    check_moments(drawn(run(KNOWN, rule="exact")), *product_of_normals())
    powers = 1.5, 0.5
    field = Product([ScoreOnly(FIRST), SECOND], powers)  # a part whose density is known, and one whose is not
    check_moments(drawn(run(field)), *product_of_normals(powers))


def test_uncorrected_chains_are_wrong_where_steps_are_long():
    """At long steps leapfrog chains are wider than the product without the Metropolis test, and not with it."""
    _, covariance = product_of_normals()
    size = {"step_size": 1.1, "per_level": 8, "draws": 16, "chains": 1000}
    corrected = drawn(run(SCORES, rule="curve-simpson", **size)).reshape(-1, 2).T.cov()
    uncorrected = drawn(run(SCORES, sampler="uhmc", **size)).reshape(-1, 2).T.cov()
    assert float(torch.linalg.det(uncorrected) / torch.linalg.det(covariance)) > 1.1
    assert float(torch.linalg.det(corrected) / torch.linalg.det(covariance)) == pytest.approx(1.0, abs=0.1)


def test_nuts_agrees():
    """Where the field has a density, so has the model, and Pyro's NUTS draws from it."""
    result = run_mcmc(
        make_problem(KNOWN, width=WIDTH), kernel="nuts", num_samples=200, warmup_steps=60, num_chains=1,
        chain_method="sequential", progress=False,
    )  # fmt: skip
    x = drawn(result).reshape(-1, 2)
    mean, covariance = product_of_normals()
    effective = len(x) / 3
    assert ((x.mean(0) - mean).abs() < 4 * (covariance.diagonal() / effective).sqrt()).all()
    assert (x.T.cov() - covariance).abs().max() < 5 * float(covariance.diagonal().max()) * math.sqrt(2 / effective)


def test_draws_are_freed_of_the_noise_of_level_0():
    plain, clean = (run(SCORES, levels=4, chains=20, draws=1, thin=1, denoise=flag) for flag in (False, True))
    x = drawn(plain).reshape(-1, 2)
    torch.testing.assert_close(drawn(clean).reshape(-1, 2), SCORES.denoise(x, 0.0), rtol=1e-4, atol=1e-5)


# -- the test made of scores ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["curve-newton", "curve-simpson"])
def test_acceptance_by_line_integrals_is_that_of_energies(rule):
    """Check mean acceptance over all levels within 0.01 on a ring times a box, whose scores are far from linear."""
    ring = GaussianMixture(SCHEDULE, torch.tensor([[0.0, 0.5], [0.0, -0.5], [0.5, 0.0]]), 0.1)
    box = UniformBox(SCHEDULE, [-0.4, -1.0], [0.4, 1.0])
    size = {"step_size": 0.8, "width": 0.1, "chains": 1000, "draws": 2}
    exact = levels_of(run(Product([ring, box]), rule="exact", **size))
    found = levels_of(run(Product([ScoreOnly(ring), ScoreOnly(box)]), rule=rule, **size))
    assert float(exact["acceptance_rate"].mean()) < 0.99
    assert float(found["acceptance_rate"].mean()) == pytest.approx(float(exact["acceptance_rate"].mean()), abs=0.01)


def test_guidance_beyond_one_draws_from_prior_times_power():
    """``p(z) p(y | z)^3`` of two normals, in one dimension by quadrature; the reverse process draws something else."""
    from probmodels.scores.samplers import sample

    prior = GaussianMixture(SCHEDULE, torch.tensor([[0.6], [-0.6]]), 0.3)

    def log_label(z, t):
        return prior.components(z, t)[0].log_softmax(-1)[:, 0]

    field = Conditioned(ScoreOnly(prior), log_label, 3.0)
    grid = torch.linspace(-4, 5, 8001, dtype=torch.float64).unsqueeze(-1)
    share = Conditioned(prior, log_label, 3.0).log_density(grid, 0.0).softmax(0)
    mean = (share @ grid)[0]
    variance = share @ (grid[:, 0] - mean) ** 2
    check_moments(drawn(run(field, levels=20)), mean.unsqueeze(0), variance.reshape(1, 1))
    plain = sample(field, 4000, num_steps=100, progress=False).double()
    error = math.sqrt(float(variance) / 4000)
    assert abs(float(plain.mean() - mean)) > 6 * error


@pytest.mark.parametrize("bridge", ["noised", "denoised"])
def test_linear_observations_give_the_exact_posterior(bridge):
    schedule = LinearSchedule(-9.0, 4.0)
    prior = GaussianMixture(
        schedule,
        torch.tensor([[0.5, 0.0, 0.2], [-0.5, 0.4, -0.3]]),
        torch.tensor([[0.4, 0.2, 0.3], [0.2, 0.4, 0.3]]),
        [0.6, 0.4],
    )
    matrix, observed, sd = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.5, -1.0]]), torch.tensor([0.3, 0.2]), 0.3
    exact = prior.given(matrix, observed, sd)
    mean = exact.weights @ exact.means
    centred = exact.means - mean
    covariance = torch.einsum(
        "k,kij->ij", exact.weights, exact.covariances + centred.unsqueeze(2) * centred.unsqueeze(1)
    )
    assert float(exact.weights.min()) > 0.1
    field = linear_observation(ScoreOnly(prior), matrix, observed, sd, bridge=bridge)
    check_moments(drawn(run(field, levels=15, per_level=5, num_leapfrog=4, width=0.2)), mean, covariance, slack=0.01)


def test_moves_leave_the_product_invariant():
    mean, covariance = product_of_normals()
    torch.manual_seed(0)
    x = torch.distributions.MultivariateNormal(mean, covariance).sample((4000,))
    for sampler in ("hmc", "mala"):
        moved, count = make_move(SCORES, num_steps=5, sampler=sampler, width=WIDTH, rule="curve-simpson")(x, 0.0, 3)
        assert (moved - x).abs().mean() > 0.2
        check_moments(moved.unsqueeze(1), mean, covariance)
        assert count == 1 + 5 * (6 if sampler == "hmc" else 2)


# -- runs -------------------------------------------------------------------------------------------------------------


def test_levels_tell_what_happened_on_each():
    result = run(SCORES, levels=6, per_level=3, chains=7, draws=2, thin=1, check_points=8)
    found = levels_of(result)
    np.testing.assert_allclose(found["time"], SCHEDULE.levels(5))
    assert dict(found.sizes) == {"level": 6}
    assert (found["steps"].values == [3, 3, 3, 3, 3, 5]).all()
    assert (found["evaluations"].values == 1 + 6 * found["steps"].values).all()  # three more in the middle of steps
    assert (found["divergences"] == 0).all()
    assert ((found["acceptance_rate"] > 0.3) & (found["acceptance_rate"] <= 1)).all()
    scales = [Composed(SCORES, (0.0,), WIDTH, ()).scale(float(t)) for t in found["time"]]
    np.testing.assert_allclose(found["step_size"], 0.8 * np.array(scales), rtol=1e-6)
    assert (found["line_error"] < 0.05).all()
    assert (found["line_error"] > 0).any()
    stats = result.tree["sample_stats"]
    assert {"acceptance_rate", "energy_change", "diverging", "step_size"} <= set(stats.data_vars)


def test_results_of_other_kernels_have_no_levels():
    result = run_mcmc(
        make_problem(KNOWN), kernel="nuts", num_samples=3, warmup_steps=3, num_chains=1, chain_method="sequential",
        progress=False,
    )  # fmt: skip
    with pytest.raises(ResultError, match="has no levels"):
        levels_of(result)


def test_levels_survive_a_file(tmp_path):
    result = run(SCORES, levels=3, per_level=2, chains=3, draws=1, thin=1)
    result.save(tmp_path / "one.nc")
    again = type(result).load(tmp_path / "one.nc")
    np.testing.assert_allclose(levels_of(again)["step_size"], levels_of(result)["step_size"])


def test_the_same_seed_gives_the_same_draws_and_runs_resume(tmp_path):
    options = {"levels": 4, "per_level": 3, "chains": 5, "thin": 1}
    first, again, other = (drawn(run(SCORES, draws=6, seed=seed, **options)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    call = {"num_chains": 5, "warmup_steps": 12, "kernel_options": {"denoise": False}, "seed": 1, "progress": False}
    problem = make_problem(SCORES, num_levels=4, width=WIDTH)
    run_mcmc(problem, num_samples=2, checkpoint=tmp_path, **call)
    longer = run_mcmc(problem, num_samples=6, checkpoint=tmp_path, **call)
    assert torch.equal(drawn(longer), first)


def test_images_keep_their_axes():
    normal = FunctionField(SCHEDULE, (1, 2, 3), lambda z, t: -z)
    x = run(tempered(normal, 4.0), levels=3, chains=4, draws=2).tree["posterior"]["x"]
    assert x.dims == ("chain", "draw", "channel", "row", "column")
    assert x.shape == (4, 2, 1, 2, 3)


# -- what is refused --------------------------------------------------------------------------------------------------


def test_options_out_of_range_are_refused():
    for options, text in (
        ({"num_levels": 1}, "num_levels=1"),
        ({"num_levels": True}, "num_levels=True"),
        ({"width": 0.0}, "width=0"),
        ({"width": math.inf}, "width=inf"),
        ({"dims": ("a", "b")}, "name every axis"),
    ):
        with pytest.raises(DataError, match=text):
            make_problem(SCORES, **options)
    with pytest.raises(DataError, match="name every axis"):
        make_problem(FunctionField(SCHEDULE, (1, 1, 1, 2), lambda z, t: -z))
    with pytest.raises(DataError, match="give a Field or a Dataset"):
        make_problem(lambda z, t: -z)
    with pytest.raises(DataError, match="the data hold no tables of fields"):
        make_problem(xr.Dataset())
    with pytest.raises(ProblemError, match="sampler='sgld'; choose one of"):
        run(SCORES, sampler="sgld")
    for options, text in (
        ({"sampler": "uhmc", "rule": "curve-simpson"}, "rule='curve-simpson' is not used with sampler='uhmc', which"),
        (
            {"sampler": "mala", "num_leapfrog": 5},
            "num_leapfrog=5 is not used with sampler='mala', which",
        ),
        ({"target_accept": 0.7}, "target_accept=0.7 is not used with adapt=False"),
    ):
        with pytest.raises(ProblemError, match=text):
            run(SCORES, **options)
    with pytest.raises(ProblemError, match="rule"):
        run(SCORES, rule="exact")
    with pytest.raises(ProblemError, match="cannot visit 12 targets"):
        run_mcmc(make_problem(SCORES, num_levels=12), warmup_steps=11, num_chains=2, num_samples=1, progress=False)


def test_unknown_options_of_the_kernel_are_refused():
    with pytest.raises(Exception, match="temperature") as caught:
        run(SCORES, temperature=2.0)
    assert isinstance(caught.value, ProblemError | TypeError)


def test_scores_are_looked_at_before_work_starts():
    with pytest.raises(DataError, match=r"score_composition: at t=1.0: `score` is not finite for 4 of 4 chains"):
        make_problem(FunctionField(SCHEDULE, (2,), lambda z, t: z * math.nan))
    with pytest.raises(DataError, match=r"the score at t=1 is \(4, 1\) for points \(4, 2\)"):
        make_problem(FunctionField(SCHEDULE, (2,), lambda z, t: z[:, :1]))
    with pytest.raises(DataError, match=r"at t=0.0: `score` is not finite"):
        make_problem(FunctionField(SCHEDULE, (2,), lambda z, t: -z / t if t else z / 0))


def test_scores_that_fail_on_the_way_are_named_with_their_level():
    field = FunctionField(SCHEDULE, (2,), lambda z, t: z * math.nan if 0.3 < t < 0.7 else -z)
    with pytest.raises(Exception, match=r"target 1 \(t=0.5\): `score` is not finite"):
        run(field, levels=3, chains=3, draws=1)


def test_results_of_written_fields_give_their_problem_back_and_others_say_why_not():
    call = {"num_samples": 1, "warmup_steps": 6, "num_chains": 2, "progress": False}
    problem = tiny()
    again = run_mcmc(problem, **call).rebuild()
    z = torch.randn(5, 2, dtype=torch.float64)
    torch.testing.assert_close(again.model.field.score(z, 0.3), problem.model.field.score(z, 0.3))
    with pytest.raises(ResultError, match="the field was made in Python, and no file holds it"):
        run(SCORES, levels=3, per_level=2, chains=3, draws=1, thin=1).rebuild()


# -- verdicts on annealed chains ---------------------------------------------------------------------------------------


RING = [[0.5 * math.cos(math.pi * i / 4), 0.5 * math.sin(math.pi * i / 4)] for i in range(8)]


def annealed(half_width: float = 0.1, seed: int = 0, **options):
    tables = {
        "ring": {"kind": "gaussian_mixture", "means": RING, "covariances": 0.0009},
        "bar": {"kind": "uniform_box", "low": [-half_width, -1.0], "high": [half_width, 1.0]},
        "both": {"kind": "product", "fields": ["ring", "bar"]},
    }
    problem = make_problem(load_fields(tables, "both", schedule="cosine", gamma=(-8.0, 6.0)), num_levels=60, width=0.03)
    chosen = {"num_chains": 300, "num_samples": 6, "thin": 3, "warmup_steps": 600} | options
    return run_mcmc(problem, seed=seed, progress=False, **chosen)


def test_chains_in_modes_of_the_right_mass_pass():
    report = annealed().diagnose()
    assert report.inference == "passed", str(report)
    assert "may stay in the modes" in str(report)
    assert "r_hat or nested" not in str(report)


def test_chains_trapped_in_modes_that_the_product_lacks_fail():
    """Some chains end beyond the bar, where the product has no mass; acceptance and drift show nothing of it."""
    result = annealed(0.2)
    truth_sd = 0.03
    assert float(result.posterior["x"][..., 0].std()) > 1.5 * truth_sd
    report = result.diagnose()
    assert report.inference == "failed", str(report)
    assert "weighted samples" in str(report)


def test_chains_that_lost_a_mode_fail():
    result = annealed()
    draws = result.posterior["x"]
    one = draws.isel(chain=np.flatnonzero(draws.values[:, 0, 1] > 0))
    result.tree["posterior"] = xr.Dataset({"x": one})
    assert result.diagnose().inference == "failed"


def test_steps_without_a_test_few_chains_and_bad_levels_do_not_pass():
    raw = annealed(kernel_options={"sampler": "uhmc"}).diagnose()
    assert raw.inference != "passed"
    assert "without a Metropolis test" in str(raw)
    few = annealed(num_chains=10).diagnose()
    assert few.inference == "not judged"
    assert "too few" in str(few)
    long = annealed(kernel_options={"sampler": "hmc", "step_size": 4.0}).diagnose()
    assert long.inference == "failed"
    assert "acceptance rate" in next(x.verdict for x in long.findings if x.harmful)


@pytest.mark.parametrize("rule", ["curve", "curve-newton"])
def test_free_rules_are_refused_where_steps_are_long(rule):
    """Their error is as large as that of the steps: the second moment was 0.777 where 0.676 is right."""
    field = GaussianMixture(LinearSchedule(-7.0, 6.0), torch.tensor([[0.8, 0.0], [-0.8, 0.0]]), 0.04)
    problem = make_problem(field, num_levels=5, width=0.2)
    run = partial(run_mcmc, problem, num_samples=2, warmup_steps=150, num_chains=100, progress=False)
    with pytest.raises(ProblemError, match=f"acceptance is 0.* with rule='{rule}'.* shorten step_size"):
        run(kernel_options={"rule": rule, "step_size": 1.5})
    short = run(kernel_options={"rule": rule, "step_size": 0.1})
    assert float(levels_of(short)["acceptance_rate"].min()) > 0.95
