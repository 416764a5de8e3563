"""Predictions, log likelihoods and discrete sites: in batches, against closed forms, enumeration and the plain loop."""

from __future__ import annotations

import itertools
import logging

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from inference_models import SCALE, data, exact, mean_problem
from scipy import stats
from torch import Tensor

from probmodels import fit_svi, run_mcmc, with_guide
from probmodels.errors import ProblemError
from probmodels.inference import Problem
from probmodels.inference.predictive import (
    complete,
    discrete_marginals,
    infer_discrete,
    log_likelihood,
    posterior_predictive,
    prior_predictive,
)
from probmodels.inference.programs import draws, reading

LOC = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64)
JUMP = torch.tensor([[0.9, 0.1], [0.0, 1.0]], dtype=torch.float64)  # the second state is never left


@pytest.fixture(autouse=True)
def log(caplog):
    """Log of how the functions draw."""
    caplog.set_level(logging.INFO, logger="probmodels.inference.programs.draws")
    return caplog


@pytest.fixture
def loop(monkeypatch):
    """Have all draws done one by one."""
    monkeypatch.setattr(draws, "_FEW", 10**9)
    monkeypatch.setattr(draws, "_FEW_PER_CHAIN", 10**9)


def normal(shape, seed=0, scale=1.0, dtype=np.float64):
    return (scale * np.random.default_rng(seed).normal(size=shape)).astype(dtype)


def dataset(**arrays):
    return xr.Dataset(
        {
            name: (("chain", "draw", *(f"{name}_dim_{axis}" for axis in range(value.ndim - 2))), value)
            for name, value in arrays.items()
        }
    )


def regression(x: Tensor, y: Tensor) -> None:
    """Plates in two places, an event axis, a deterministic and a generated site."""
    slope = pyro.sample("slope", dist.Normal(x.new_zeros(2), 1.0).to_event(1), infer={"event_dims": ["feature"]})
    group, row = pyro.plate("group", 3, dim=-2), pyro.plate("row", len(x), dim=-1)
    with group:
        shift = pyro.sample("shift", dist.Normal(x.new_zeros(()), 1.0))
    mean = pyro.deterministic("mean", shift + x @ slope)
    with group, row:
        pyro.sample("y", dist.StudentT(4.0, mean.unsqueeze(-1), 0.5).to_event(1), obs=y, infer={"event_dims": ["one"]})
        pyro.sample("new", dist.Normal(mean, 0.1), infer={"generated": True})


def regression_problem(dtype=torch.float64):
    x, y = torch.from_numpy(normal((4, 2))).to(dtype), torch.from_numpy(normal((3, 4, 1), 1)).to(dtype)
    return Problem("regression", regression, args=(x, y))


def mixture(x: Tensor) -> None:
    weight = pyro.sample("weight", dist.Dirichlet(x.new_ones(3)))
    with pyro.plate("point", len(x)):
        z = pyro.sample("z", dist.Categorical(weight))
        pyro.sample("x", dist.Normal(LOC[z], SCALE), obs=x)
        pyro.sample("new", dist.Normal(LOC[z], SCALE), infer={"generated": True})


MIXTURE = Problem("mixture", mixture, args=(data(5),), coords={"point": list("abcde")})


def mixture_draws(num_draws=150):
    rng = np.random.default_rng(0)
    weight = rng.dirichlet(np.ones(3), size=(2, num_draws))
    joint = np.log(weight)[:, :, None] + stats.norm.logpdf(data(5).numpy()[:, None], LOC.numpy(), SCALE)
    total = np.logaddexp.reduce(joint, -1)
    return dataset(weight=weight), total, np.exp(joint - total[..., None])


def hidden_markov(y: Tensor) -> None:
    step = pyro.sample("step", dist.Normal(y.new_zeros(()), 2.0))
    state: int | Tensor = 0
    for t in pyro.markov(range(len(y))):
        state = pyro.sample(f"z{t}", dist.Categorical(JUMP[state]))
        pyro.sample(f"y{t}", dist.Normal(step * state, 1.0), obs=y[t])


def paths(y, step):
    """Probability of every path of states given the data."""
    found = {}
    for path in itertools.product(range(2), repeat=len(y)):
        before, p = 0, 1.0
        for state, value in zip(path, y, strict=True):
            p *= float(JUMP[before, state]) * stats.norm.pdf(value, step * state, 1.0)
            before = state
        found[path] = p
    total = sum(found.values())
    return {path: p / total for path, p in found.items()}


def batched(log):
    return "draw by draw" not in log.text


def test_predictions_of_a_conjugate_normal(log):
    mean, sd = exact(data())
    mu = mean + sd * normal((4, 500))
    new = posterior_predictive(mean_problem(), dataset(mu=mu), seed=1)["y"]
    assert batched(log)
    assert new.dims == ("chain", "draw", "obs")
    assert list(new["obs"].values) == list("abcdef")
    spread = np.hypot(sd, SCALE)
    assert np.all(np.abs(new.mean(("chain", "draw")) - mean) < 4.5 * spread / np.sqrt(2000))
    assert np.all(np.abs(new.std(("chain", "draw")) / spread - 1) < 4.5 / np.sqrt(4000))
    noise = (new.values - mu[..., None]) / SCALE
    assert stats.kstest(noise.ravel(), "norm").pvalue > 1e-4
    assert len(np.unique(noise)) == noise.size
    between = np.corrcoef(np.moveaxis(noise, -1, 0).reshape(6, -1))[np.triu_indices(6, 1)]
    assert np.abs(between).max() < 4.5 / np.sqrt(2000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batches_equal_the_loop_over_draws(log, monkeypatch, dtype):
    problem = regression_problem(dtype)
    single = np.dtype(str(dtype).removeprefix("torch."))
    posterior = dataset(slope=normal((2, 130, 2), 3, dtype=single), shift=normal((2, 130, 3, 1), 4, dtype=single))
    arrays = {name: value.values for name, value in posterior.items()}
    full, density = complete(problem, arrays, seed=0), log_likelihood(problem, posterior)["y"]
    assert batched(log)
    monkeypatch.setattr(draws, "_FEW", 10**9)
    monkeypatch.setattr(draws, "_FEW_PER_CHAIN", 10**9)
    slow, slow_density = complete(problem, arrays, seed=0), log_likelihood(problem, posterior)["y"]
    assert not batched(log)
    limit = 1e-10 if dtype == torch.float64 else 1e-4
    np.testing.assert_allclose(full["mean"], slow["mean"], rtol=limit, atol=limit)
    np.testing.assert_allclose(density, slow_density, rtol=limit, atol=limit)
    wanted = stats.t.logpdf(problem.args[1].numpy()[..., 0], 4, full["mean"], 0.5)
    np.testing.assert_allclose(density, wanted, rtol=10 * limit, atol=10 * limit)
    assert density.dims == ("chain", "draw", "group", "row")
    assert list(full) == ["slope", "shift", "mean", "new"]
    for name, value in full.items():
        assert value.shape == (2, 130, *problem.sites[name].shape)
        assert value.dtype == slow[name].dtype == single
    for value in (full, slow):
        noise = (value["new"] - value["mean"]) / 0.1
        assert stats.kstest(noise.ravel(), "norm").pvalue > 1e-4


def test_a_model_that_branches_on_values_is_run_draw_by_draw(log):
    def model() -> None:
        x = pyro.sample("x", dist.Normal(torch.zeros(()), 1.0))
        pyro.deterministic("size", x if x > 0 else -x)

    x = normal((2, 120), dtype=np.float32)
    full = complete(Problem("branch", model), {"x": x}, seed=0)
    assert "draw by draw" in log.text
    assert "control flow" in log.text
    np.testing.assert_array_equal(full["size"], np.abs(x))


def test_a_site_that_comes_and_goes_is_refused():
    def model() -> None:
        x = pyro.sample("x", dist.Normal(torch.zeros(()), 1.0))
        if x < 2:
            pyro.deterministic("size", x.abs())

    with pytest.raises(ProblemError, match="'size' does not occur at every draw"):
        complete(Problem("branch", model), {"x": np.array([[0.0, 3.0]])}, seed=0)


NOISE = {
    "beta": (lambda m: dist.Beta(1 + m, 2.0), lambda m: stats.beta(1 + m, 2)),
    "binomial": (lambda m: dist.Binomial(10, m), lambda m: stats.binom(10, m)),
    "exponential": (lambda m: dist.Exponential(m), lambda m: stats.expon(scale=1 / m)),
    "fixed": (lambda m: dist.Exponential(torch.tensor(2.0)), lambda m: stats.expon(scale=0.5)),
    "geometric": (lambda m: dist.Geometric(m), lambda m: stats.geom(m, loc=-1)),
    "laplace": (lambda m: dist.Laplace(m, 1.0), lambda m: stats.laplace(m)),
    "lognormal": (lambda m: dist.LogNormal(m, 0.3), lambda m: stats.lognorm(0.3, scale=np.exp(m))),
    "multinomial": (lambda m: dist.Multinomial(5, torch.stack([m, 1 - m])), lambda m: stats.binom(5, m)),
    "poisson": (lambda m: dist.Poisson(m), lambda m: stats.poisson(m)),
}


@pytest.mark.parametrize("name", sorted(NOISE))
def test_noise_is_independent_between_draws_and_rightly_distributed(log, name):
    make, reference = NOISE[name]
    level = 0.3 + 0.4 * np.random.default_rng(0).uniform(size=(2, 400))

    def evaluate(values: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"x": make(values["m"]).sample()}

    found = draws.map_draws(evaluate, {"m": level.astype(np.float32)}, (2, 400), label=name)["x"]
    assert batched(log)
    x, wanted = found.reshape(800, -1)[:, 0], reference(level.ravel())
    score = (x - wanted.mean()) / wanted.std()
    assert abs(score.mean()) < 4.5 / np.sqrt(800)
    kurtosis = float(np.mean(wanted.stats("k")))
    assert abs((score**2).mean() - 1) < 5 * np.sqrt((kurtosis + 2) / 800)
    if x.dtype.kind == "f" and not hasattr(wanted.dist, "pmf"):
        assert len(np.unique(x)) == 800
    lagged = np.corrcoef(score[1:], score[:-1])[0, 1]
    assert abs(lagged) < 5 / np.sqrt(800)


def test_scalar_tensors_index_as_numbers_do():
    x, at = torch.arange(60.0).reshape(3, 4, 5), torch.tensor
    for index in (
        at(1),
        at(-1),
        (at(0), at(2)),
        (..., at(3)),
        (slice(None), at(1)),
        (None, at(1)),
        (at([0, 1]), at(2)),
        (..., at(2), at([0, 1, 1])),
        (at([True, False, True]), at(2)),
        (slice(None), ..., at(1), 2),
        at([True, False, True]),
    ):
        wanted = x[index]
        with reading._TensorIndices():
            assert torch.equal(x[index], wanted), index


def test_chunks_keep_to_their_memory(monkeypatch):
    monkeypatch.setattr(draws, "_CHUNK_BYTES", 40_000)
    wide = torch.arange(1000.0)

    def evaluate(x: Tensor) -> tuple[Tensor]:
        return ((x * wide).square().sum(),)

    _, size = draws._batched(lambda flag, x: evaluate(x), torch.tensor(False), [torch.tensor(1.0)], [torch.tensor(2.0)])
    assert 1 <= size <= 5  # two arrays of 4 kB in each draw
    level = normal((2, 101), dtype=np.float32)
    found = draws.map_draws(
        lambda values: {"s": evaluate(values["x"])[0]}, {"x": level}, (2, 101), label="sums", random=False
    )
    np.testing.assert_allclose(found["s"], level**2 * 332833500.0, rtol=1e-4)


def test_seeds_chains_and_lengths():
    mu = normal((3, 200))
    problem = mean_problem()

    def new(mu, seed):
        return complete(problem, {"mu": mu}, seed=seed)["new"]

    all_three = new(mu, 5)
    np.testing.assert_array_equal(new(mu, 5), all_three)
    np.testing.assert_array_equal(new(mu[:1], 5), all_three[:1])
    np.testing.assert_array_equal(new(mu[:, :60], 5), all_three[:, :60])
    np.testing.assert_array_equal(new(mu[:, :150], 5), all_three[:, :150])
    noise = all_three - mu[..., None]
    assert np.abs(np.corrcoef(noise.reshape(3, -1))[np.triu_indices(3, 1)]).max() < 5 / np.sqrt(1200)
    assert not np.any(new(mu, 6) == all_three)
    few = new(mu[:, :5], 5)
    np.testing.assert_array_equal(few, new(mu[:, :5], 5))
    np.testing.assert_array_equal(few[:2], new(mu[:2, :5], 5))
    state = torch.get_rng_state()
    new(mu, 5)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_prior_has_discrete_sites_too():
    prior = prior_predictive(MIXTURE, num_samples=600, seed=2)
    assert prior["z"].dims == ("chain", "draw", "point")
    assert prior["z"].dtype == np.int64
    weight = np.take_along_axis(prior["weight"].values[0], prior["z"].values[0], 1)
    assert abs(weight.mean() - 0.5) < 4.5 * 0.4 / np.sqrt(600)  # E sum_k w_k^2 = 3 * 2 / 12
    noise = (prior["x"].values - LOC.numpy()[prior["z"].values]) / SCALE
    assert stats.kstest(noise.ravel(), "norm").pvalue > 1e-4
    with pytest.raises(ProblemError, match="num_samples=0; give a whole number of at least 1"):
        prior_predictive(MIXTURE, num_samples=0)


def test_mixture_sums_out_its_components():
    posterior, total, share = mixture_draws()
    found = log_likelihood(MIXTURE, posterior)["x"]
    assert found.dims == ("chain", "draw", "point")
    np.testing.assert_allclose(found, total, rtol=1e-10)
    with_z = posterior.assign(z=(("chain", "draw", "point"), np.zeros((2, 150, 5), np.int64)))
    np.testing.assert_allclose(log_likelihood(MIXTURE, with_z)["x"], total, rtol=1e-10)
    marginals = discrete_marginals(MIXTURE, with_z)["z"]
    assert marginals.dims == ("chain", "draw", "point", "z_value")
    assert list(marginals["point"].values) == list("abcde")
    np.testing.assert_allclose(marginals, share, rtol=1e-9)


def test_mixture_components_are_drawn_from_their_conditional():
    posterior, _, share = mixture_draws()
    full = complete(MIXTURE, {"weight": posterior["weight"].values}, seed=3)
    assert list(full) == ["weight", "z", "new"]
    assert full["z"].dtype == np.int64
    for k in range(3):
        error = (full["z"] == k) - share[..., k]
        assert np.all(np.abs(error.mean((0, 1))) < 4.5 * np.sqrt((share * (1 - share))[..., k].mean((0, 1)) / 300))
    noise = (full["new"] - LOC.numpy()[full["z"]]) / SCALE
    assert stats.kstest(noise.ravel(), "norm").pvalue > 1e-4
    best = infer_discrete(MIXTURE, posterior, temperature=0)["z"]
    np.testing.assert_array_equal(best, share.argmax(-1))
    np.testing.assert_array_equal(
        infer_discrete(MIXTURE, posterior, seed=1)["z"], infer_discrete(MIXTURE, posterior, seed=1)["z"]
    )
    # Replications of the data keep the component of their point.
    again = posterior_predictive(MIXTURE, posterior, seed=4)["x"]
    mean = share @ LOC.numpy()
    spread = np.sqrt(SCALE**2 + share @ LOC.numpy() ** 2 - mean**2)
    assert np.all(np.abs(((again - mean) / spread).mean(("chain", "draw"))) < 4.5 / np.sqrt(300))


def test_states_of_a_hidden_markov_model(loop):
    y = np.array([0.3, -0.5, 1.4, 1.0, 2.2])
    problem = Problem("hmm", hidden_markov, args=(torch.from_numpy(y),))
    posterior = dataset(step=np.tile([[1.5], [2.5]], (1, 120)))
    marginals = discrete_marginals(problem, posterior.isel(draw=slice(0, 1)))
    drawn = infer_discrete(problem, posterior, seed=1)
    best = infer_discrete(problem, posterior.isel(draw=slice(0, 1)), temperature=0)
    for chain, step in enumerate((1.5, 2.5)):
        exact_paths = paths(y, step)
        share = np.array([sum(p for path, p in exact_paths.items() if path[t] == 1) for t in range(5)])
        np.testing.assert_allclose([marginals[f"z{t}"].values[chain, 0, 1] for t in range(5)], share, rtol=1e-9)
        states = np.stack([drawn[f"z{t}"].values[chain] for t in range(5)], -1)
        assert np.all(np.diff(states) >= 0)  # joint draws: no path leaves the second state
        onset = {path: p for path, p in exact_paths.items() if p > 0}
        counts = np.array([np.all(states == np.array(path), -1).sum() for path in onset])
        assert counts.sum() == 120
        chi2 = ((counts - 120 * np.array(list(onset.values()))) ** 2 / (120 * np.array(list(onset.values())))).sum()
        assert chi2 < stats.chi2.isf(1e-4, len(onset) - 1)
        top = max(exact_paths, key=exact_paths.__getitem__)
        assert tuple(int(best[f"z{t}"].values[chain, 0]) for t in range(5)) == top
    with pytest.raises(ProblemError, match=r"'y0' in plates \[\] and 'y1' .* discrete sites \['z0', 'z1'"):
        log_likelihood(problem, posterior)


def test_points_that_no_data_tell_apart_get_components_of_their_own():
    def model() -> None:
        with pyro.plate("point", 40):
            pyro.sample("z", dist.Bernoulli(torch.tensor(0.5)))

    drawn = complete(Problem("coins", model), {}, seed=0)["z"]
    assert drawn.shape == (1, 1, 40)
    assert 8 <= drawn.sum() <= 32
    assert drawn.dtype == np.float32


def test_log_likelihood_conditions_on_what_else_the_discrete_sites_explain():
    def model(y: Tensor) -> None:
        with pyro.plate("point", len(y)):
            z = pyro.sample("z", dist.Bernoulli(y.new_tensor(0.3)))
            b = pyro.sample("b", dist.Normal(2 * z, 1.0))
            pyro.sample("y", dist.Normal(b + z, SCALE), obs=y)

    y, b = data(4), normal((1, 3, 4))
    found = log_likelihood(Problem("both", model, args=(y,)), dataset(b=b))["y"]
    weight = np.stack([0.7 * stats.norm.pdf(b, 0), 0.3 * stats.norm.pdf(b, 2)])
    density = np.stack([stats.norm.pdf(y.numpy(), b + z, SCALE) for z in (0, 1)])
    np.testing.assert_allclose(found, np.log((weight * density).sum(0) / weight.sum(0)), rtol=1e-9)


def test_log_likelihood_that_does_not_factor_is_refused():
    def shared(y: Tensor) -> None:
        z = pyro.sample("z", dist.Bernoulli(y.new_tensor(0.3)))
        with pyro.plate("point", len(y)):
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def twice(y: Tensor) -> None:
        with pyro.plate("point", len(y)):
            z = pyro.sample("z", dist.Bernoulli(y.new_tensor(0.3)))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)
            pyro.sample("x", dist.Normal(z, 1.0), obs=y)

    def subsampled(y: Tensor) -> None:
        with pyro.plate("point", len(y), subsample_size=2) as index:
            pyro.sample("y", dist.Normal(0.0, 1.0), obs=y[index])

    posterior = xr.Dataset(coords={"chain": [0], "draw": [0]})
    for model, message in (
        (shared, r"'y' in plates \['point'\] and 'z' in plates \[\] are tied"),
        (twice, "'y' in plates .* and 'x' .* are tied by the discrete sites"),
        (subsampled, "plate 'point' holds 2 of 4 points"),
    ):
        with pytest.raises(ProblemError, match=message):
            log_likelihood(Problem("m", model, args=(data(4),)), posterior)


def test_bad_posteriors_are_refused():
    problem, slope, shift = regression_problem(), normal((2, 3, 2)), normal((2, 3, 3, 1))
    good = dataset(slope=slope, shift=shift)
    broken = shift.copy()
    broken[1, 2, 0, 0] = np.nan
    for posterior, message in (
        (good[["slope"]], r"lacks the latent sites \['shift'\]; it has \['slope'\]"),
        (dataset(slope=slope, shift=shift[:, :, :2]), r"'shift' has shape \(2, 1\) .* model has \(3, 1\), dims \('gro"),
        (dataset(slope=slope, shift=broken), r"'shift' is NaN in chain 1, draw 2, \{'shift_dim_0': 0, .* 1 entries"),
        (good.isel(chain=0), "needs 'chain' and 'draw'"),
    ):
        for function in (log_likelihood, posterior_predictive):
            with pytest.raises(ProblemError, match=message):
                function(problem, posterior)
    with pytest.raises(ProblemError, match=r"lacks the latent sites \['shift'\]"):
        complete(problem, {"slope": slope}, seed=0)
    turned = good.rename(shift_dim_0="group").transpose("shift_dim_1", "draw", "group", "chain", "slope_dim_0")
    assert log_likelihood(problem, turned)["y"].equals(log_likelihood(problem, good)["y"])


def test_a_posterior_serves_other_data_of_the_same_latent_sites():
    posterior = mixture_draws()[0].assign(
        z=(("chain", "draw", "point"), np.zeros((2, 150, 5), np.int64)),
        new=(("chain", "draw", "point"), np.zeros((2, 150, 5))),
    )
    longer = Problem("mixture", mixture, args=(data(7),))
    found = log_likelihood(longer, posterior)["x"]
    joint = np.log(posterior["weight"].values)[:, :, None] + stats.norm.logpdf(
        data(7).numpy()[:, None], LOC.numpy(), SCALE
    )
    np.testing.assert_allclose(found, np.logaddexp.reduce(joint, -1), rtol=1e-10)
    assert posterior_predictive(longer, posterior.drop_vars("z"))["x"].shape == (2, 150, 7)
    with pytest.raises(ProblemError, match=r"'z' has shape \(5,\) in each draw, but the model has \(7,\)"):
        posterior_predictive(longer, posterior)


def test_discrete_sites_beyond_enumeration():
    def model(y: Tensor) -> None:
        with pyro.plate("point", len(y)):
            n = pyro.sample("n", dist.Poisson(y.new_tensor(2.0)))
            pyro.sample("y", dist.Normal(n, 1.0), obs=y)

    problem = Problem("counts", model, args=(data(3),))
    n = np.array([[[0.0, 1.0, 2.0], [3.0, 1.0, 1.0]]])
    np.testing.assert_allclose(
        log_likelihood(problem, dataset(n=n))["y"], stats.norm.logpdf(data(3).numpy(), n, 1), rtol=1e-6
    )
    with pytest.raises(ProblemError, match=r"\['n'\] have no finite support"):
        infer_discrete(problem, dataset(n=n))
    with pytest.raises(ProblemError, match=r"lacks the latent sites \['n'\]"):
        posterior_predictive(problem, xr.Dataset(coords={"chain": [0], "draw": [0]}))
    with pytest.raises(ProblemError, match="no discrete latent site"):
        discrete_marginals(mean_problem(), dataset(mu=normal((1, 2))))
    with pytest.raises(ProblemError, match="temperature=2; choose one of 0, 1"):
        infer_discrete(MIXTURE, mixture_draws()[0], temperature=2)


def test_a_model_that_enumeration_breaks_is_refused():
    def model(y: Tensor) -> None:
        with pyro.plate("point", len(y)):
            z = pyro.sample("z", dist.Bernoulli(y.new_tensor(0.3)))
            mean = torch.stack([z, 1 - z], 0).sum(0).reshape(len(y))  # no room for an enumerated dim
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    with pytest.raises(ProblemError, match=r"\['z'\] cannot be enumerated: .* broadcasts over dims left of its plates"):
        discrete_marginals(Problem("m", model, args=(data(4),)), xr.Dataset(coords={"chain": [0], "draw": [0]}))


def test_progress_is_shown_on_request(capsys):
    posterior = dataset(mu=normal((2, 10)))
    log_likelihood(mean_problem(), posterior)
    assert capsys.readouterr().err == ""
    log_likelihood(mean_problem(), posterior, progress=True)
    assert "log likelihood: 100%" in capsys.readouterr().err


def test_deterministic_sites_in_a_plate_keep_their_shape_in_predictions():
    def effects(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("groups", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            effect = pyro.deterministic("effect", mu + z)
            pyro.sample("y", dist.Normal(effect, 1.0), obs=y)

    problem = Problem("effects", effects, args=(torch.zeros(3),))
    drawn = prior_predictive(problem, num_samples=30)
    assert drawn["effect"].dims == ("chain", "draw", "groups")
    np.testing.assert_allclose(drawn["effect"], drawn["mu"] + drawn["z"], rtol=1e-5, atol=1e-6)
    assert posterior_predictive(problem, drawn)["y"].shape == (1, 30, 3)


# -- sites too large to keep ------------------------------------------------------------------------------------------


def wide_model(y: torch.Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(y)):
        pyro.deterministic("shifted", mu + y)
        pyro.sample("new", dist.Normal(mu, 1.0), infer={"generated": True})
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


@pytest.mark.parametrize("engine", ["mcmc", "svi"])
@pytest.mark.parametrize("few", [True, False])
def test_transient_sites_leave_mean_and_sd(engine, few):
    count = 10 if few else 150  # draw by draw, and as a graph

    def run(**options):
        y = torch.tensor([0.5, 2.0, -1.0])
        problem = Problem("wide", wide_model, args=(y,), coords={"row": list("abc")}, **options)
        if engine == "mcmc":
            return run_mcmc(problem, num_samples=count, warmup_steps=50, num_chains=2, seed=1, progress=False)
        return fit_svi(with_guide(problem, "mean_field"), num_steps=5, num_samples=count, seed=1, progress=False)

    full, short = run(), run(transient=("shifted", "new"))
    assert set(short.posterior.data_vars) == set(full.posterior.data_vars) - {"shifted", "new"}
    assert short.posterior["mu"].equals(full.posterior["mu"])
    marginals = short.tree["marginals"].to_dataset()
    assert list(marginals["row"].values) == list("abc")
    for name in ("shifted", "new"):
        draws = full.posterior[name].stack(sample=("chain", "draw"))
        np.testing.assert_allclose(marginals[name], draws.mean("sample"), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(marginals[f"{name}_sd"], draws.std("sample", ddof=1), rtol=1e-4)


def test_transient_sites_must_exist_and_chains_keep_latent_ones():
    with pytest.raises(ProblemError, match=r"transient names 'shiftd'.*did you mean 'shifted'"):
        Problem("wide", wide_model, args=(torch.zeros(2),), transient=("shiftd",)).validate(guide=False)
    with pytest.raises(ProblemError, match=r"transient=\['mu'\]"):
        run_mcmc(Problem("wide", wide_model, args=(torch.zeros(2),), transient=("mu",)), progress=False)
