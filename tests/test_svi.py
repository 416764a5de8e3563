"""fit_svi: exact posteriors, reproducible and resumable fits, errors."""

from __future__ import annotations

from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from inference_models import SCALE, MeanGuide, auto_guide, data, exact, mean_model, mean_problem
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDelta, AutoLowRankMultivariateNormal
from pyro.nn import PyroModule
from svi_models import Mixed, OwnELBO, decoder, local_model, mixed_model, problem, vae
from torch import nn

from probmodels.errors import CaptureError, CheckpointError, FitError, ProblemError
from probmodels.inference import Problem, Result, fit_svi
from probmodels.inference.variational.optimiser import Adam
from probmodels.inference.variational.options import make_schedule

quick = partial(fit_svi, num_steps=30, num_samples=20, progress=False)


def test_fit_finds_a_conjugate_posterior():
    problem = mean_problem(loss="TraceMeanField_ELBO")
    result = fit_svi(problem, num_steps=800, lr=0.05, lr_decay=0.02, num_samples=2000, progress=False)
    mean, sd = exact(data())
    draws = result.posterior["mu"].values
    # The optimum is exact; what remains is the noise of the last steps (lr 0.001) and of 2000 draws (0.022 sd).
    assert abs(draws.mean() - mean) < 0.15 * sd
    assert abs(draws.std() / sd - 1) < 0.12
    params = result.params()
    assert abs(params["loc"].item() - mean) < 0.12 * sd
    assert abs(params["spread"].item() / sd - 1) < 0.1
    np.testing.assert_array_equal(result.posterior["twice"], 2 * result.posterior["mu"])
    residual = (result.posterior["new"] - result.posterior["mu"]).values
    assert abs(residual.std() / SCALE - 1) < 4 / np.sqrt(2 * residual.size)
    assert result.tree["fit"].sizes["step"] == 800
    assert float(result.tree["fit"]["loss"][-50:].mean()) < float(result.tree["fit"]["loss"][:50].mean())
    assert result.diagnose().ok


def test_log_weights_are_log_p_minus_log_q():
    result = quick(mean_problem())
    params, posterior = result.params(), result.posterior
    mu, y = torch.as_tensor(posterior["mu"].values[0]), data()
    log_p = dist.Normal(0.0, 2.0).log_prob(mu) + dist.Normal(mu[:, None], SCALE).log_prob(y).sum(-1)
    log_q = dist.Normal(params["loc"], params["spread"]).log_prob(mu)
    np.testing.assert_allclose(result.tree["sample_stats"]["log_weight"][0], log_p - log_q, rtol=1e-6)


def test_a_guide_that_is_far_too_narrow_fails_the_diagnosis():
    result = quick(mean_problem(), num_steps=1, lr=1e-6, num_samples=500)
    wide = result.diagnose()
    assert wide.khat is not None
    narrow = Problem("narrow", mean_model, narrow_guide, (data(),))
    report = quick(narrow, num_samples=1000).diagnose()
    assert not report.ok
    assert report.khat > 0.7
    assert "misses part of the posterior" in str(report)


def narrow_guide(y):
    loc = pyro.param("loc", torch.tensor(1.0, dtype=torch.float64))
    pyro.sample("mu", dist.Normal(loc, 0.02))


@pytest.mark.parametrize("make_guide", [MeanGuide, lambda: auto_guide(mean_model)])
def test_the_same_seed_gives_the_same_numbers_and_the_guide_is_left_alone(make_guide):
    guide = make_guide()
    before = {name: value.detach().clone() for name, value in guide.named_parameters()}
    problem = mean_problem(guide=guide)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = quick(problem)
    assert torch.equal(state, torch.get_rng_state())
    assert first.posterior.identical(quick(problem).posterior)
    assert not first.posterior.identical(quick(problem, seed=1).posterior)
    assert all(torch.equal(value, before[name]) for name, value in guide.named_parameters())
    assert len(before) == len(list(guide.named_parameters()))
    assert not list(pyro.get_param_store().keys())


def test_point_estimates_have_no_khat():
    point = mean_problem(guide=AutoDelta(pyro.poutine.block(mean_model, hide=["new"])))
    report = quick(point).diagnose()
    assert report.inference == "not judged"
    assert np.isnan(report.khat)
    assert "point estimate" in str(report)


def stop_at(number):
    import os
    import signal

    def callback(step):
        if step.number == number:
            os.kill(os.getpid(), signal.SIGINT)

    return callback


@pytest.mark.parametrize("keep", ["last", "best", "average"])
def test_resumed_fit_gives_the_numbers_of_an_uninterrupted_one(tmp_path, keep):
    options = {"num_steps": 40, "num_samples": 10, "progress": False, "lr_decay": 0.1, "keep": keep}
    problem = mean_problem(guide=auto_guide(mean_model))
    plain = fit_svi(problem, **options)
    with pytest.raises(KeyboardInterrupt, match=r"after step 17 of 40.*repeat the same call"):
        fit_svi(problem, checkpoint=tmp_path / "fit", callbacks=[stop_at(17)], **options)
    resumed = fit_svi(problem, checkpoint=tmp_path / "fit", **options)
    assert resumed.posterior.identical(plain.posterior)
    np.testing.assert_array_equal(resumed.tree["fit"]["loss"], plain.tree["fit"]["loss"])
    again = fit_svi(problem, checkpoint=tmp_path / "fit", **options)
    assert again.posterior.identical(plain.posterior)
    with pytest.raises(CheckpointError, match="lr "):
        fit_svi(problem, checkpoint=tmp_path / "fit", lr=0.5, **options)


def test_callbacks_and_patience_end_a_fit():
    seen = []
    quick(mean_problem(), callbacks=[lambda step: seen.append(step.number) or step.number == 12])
    assert seen == list(range(1, 13))
    result = fit_svi(mean_problem(), num_steps=5000, lr=0.3, patience=60, num_samples=5, progress=False)
    assert result.tree["fit"].sizes["step"] < 3000


def test_a_loss_that_is_not_finite_says_what_to_try():
    class Cliff(Trace_ELBO):
        def loss_and_grads(self, *args, **kwargs):
            super().loss_and_grads(*args, **kwargs)
            return float("nan")

    with pytest.raises(FitError, match=r"at step 1 the loss is nan .* try a smaller lr than 0.01"):
        quick(mean_problem(loss=Cliff()))


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"guide": None}, {}, "use run_mcmc"),
        ({}, {"batch_size": 3}, r"batch_plates=\(...\) from \['obs'\]"),
        ({}, {"num_steps": 0}, "num_steps=0"),
        ({}, {"keep": "first"}, "choose one of last, best, average"),
        ({}, {"num_steps": 2.5}, r"num_steps=2\.5"),
        ({}, {"num_samples": -1}, "num_samples=-1"),
        ({}, {"num_particles": 0}, "num_particles=0"),
        ({}, {"seed": -1}, "seed=-1"),
        ({}, {"seed": True}, "seed=True"),
        ({}, {"seed": 2**32}, "seed=4294967296; give a whole number of at least 0 and below 4294967296"),
        ({}, {"num_samples": 2**45}, "num_samples=35184372088832; give a whole number"),
        ({}, {"seed": 0.5}, r"seed=0\.5"),
        ({}, {"lr": 0.0}, r"lr=0\.0"),
        ({}, {"patience": 0}, "patience=0"),
        ({}, {"kl_warmup": -3}, "kl_warmup=-3"),
        ({}, {"clip_norm": 0.0}, r"clip_norm=0\.0"),
        ({}, {"compile": "jit"}, "compile='jit'; choose one of"),
        ({}, {"dtype": "float16"}, "choose one of float32, float64 .*did you mean"),
        ({}, {"dtype": torch.float16}, "choose 'float32' or 'float64'"),
        ({}, {"device": "gpu"}, "cannot compute on device='gpu'"),
        ({}, {"checkpoint_every": 5.0}, "not used without checkpoint"),
        ({}, {"patince": 5}, "did you mean 'patience'"),
        ({}, {"schedule": "cosin"}, "choose one of"),
        ({}, {"schedule": "geometric"}, "needs lr_decay"),
        ({}, {"schedule": "constant", "lr_decay": 0.1}, "does not decay"),
        ({"loss": "Trace_ELB"}, {}, "did you mean 'Trace_ELBO'"),
        ({"loss": "bogus"}, {}, "known: .*VarGrad"),
        ({"guide": lambda y: pyro.sample("mu", dist.Normal(0.0, 1.0)) and None}, {}, "no parameter to fit"),
    ],
)
def test_arguments_out_of_range_are_refused(changes, options, message):
    with pytest.raises(ProblemError, match=message):
        quick(mean_problem(**changes), **options)


def test_clipping_and_particles():
    result = quick(mean_problem(), clip_norm=1e-12, num_particles=3)
    assert result.tree["fit"]["grad_norm"].min() > 1e-12  # recorded before clipping
    assert fit_svi(mean_problem(), num_steps=5, num_samples=7, progress=True).posterior.sizes["draw"] == 7


def test_a_fit_says_what_it_does_from_the_start(capsys):
    fit_svi(mean_problem(), num_steps=3, num_samples=2, compile="graph")
    said = capsys.readouterr().err
    order = [said.index(words) for words in ("checking the problem", "capturing svi as a graph", "drawing from")]
    assert order == sorted(order)
    assert "3/3" in said
    quick(mean_problem(), compile="graph")
    assert capsys.readouterr().err == ""


def test_a_single_draw_is_a_result_and_no_diagnosis(tmp_path):
    result = quick(mean_problem(), num_samples=1)
    result.save(tmp_path / "one.nc")
    report = Result.load(tmp_path / "one.nc").diagnose()
    assert report.inference == "not judged"
    assert "1 draw is too few to judge the fit" in str(report)
    assert "20 draws are too few" in str(quick(mean_problem()).diagnose())
    assert "too few" not in str(quick(mean_problem(), num_samples=25).diagnose())


def spare_model(y):
    pyro.sample("spare", dist.Normal(y.new_zeros(()), 1.0))
    mean_model(y)


def spare_guide(y):
    loc = pyro.param("loc", lambda: torch.zeros(2, dtype=torch.float64))
    pyro.sample("spare", dist.Normal(loc[0], 0.5))  # its noise is drawn, but an analytic divergence does not read it
    pyro.sample("mu", dist.Normal(loc[1], 0.5))


CASES = {
    "unread": (lambda: Problem("spare", spare_model, spare_guide, (data(),), loss="TraceMeanField_ELBO"), {}),
    "pathwise": (lambda: mean_problem(), {}),
    "analytic": (lambda: mean_problem(loss="TraceMeanField_ELBO"), {}),
    "automatic": (lambda: mean_problem(guide=auto_guide(mean_model)), {"num_particles": 2}),
    "auxiliary": (lambda: problem(local_model, AutoLowRankMultivariateNormal(local_model)), {}),
    "score": (lambda: problem(mixed_model, Mixed()), {}),
    "particles": (lambda: problem(mixed_model, Mixed()), {"num_particles": 3}),
    "vectorised": (
        lambda: problem(mixed_model, Mixed(), loss=Trace_ELBO(num_particles=3, vectorize_particles=True)),
        {},
    ),
    "networks": (lambda: vae(loss="TraceMeanField_ELBO"), {"batch_size": 8, "kl_warmup": 10}),
    "clipped": (lambda: vae(), {"clip_norm": 0.5, "schedule": "cosine"}),
}


@pytest.mark.parametrize("case", CASES)
def test_graph_and_program_give_the_same_numbers(case):
    make, options = CASES[case]
    if "batch_size" in options:
        make = partial(vae, loss="TraceMeanField_ELBO", batch_plates=("row",))
    eager, graph = (quick(make(), compile=compile, **options) for compile in ("eager", "graph"))
    assert eager.tree.attrs["execution"] == "eager"
    assert graph.tree.attrs["execution"] == "graph"
    limit = 1e-8 if eager.posterior[next(iter(eager.posterior))].dtype == np.float64 else 1e-3
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(graph.tree["fit"][name], eager.tree["fit"][name], rtol=limit)
    for name, value in eager.params().items():
        torch.testing.assert_close(graph.params()[name], value, rtol=limit, atol=limit)


@pytest.mark.parametrize("case", ["pathwise", "automatic", "auxiliary", "score", "particles"])
def test_gradients_are_those_of_pyros_own_loss(case):
    make, options = CASES[case]
    ours = make()
    own = Problem(ours.name, ours.model, make().guide, ours.args, loss=OwnELBO())
    theirs = quick(own, compile="graph", **options)
    assert "OwnELBO computes its gradient by methods of its own" in theirs.tree.attrs["execution"]
    fit = quick(ours, **options).tree["fit"]
    np.testing.assert_allclose(fit["loss"], theirs.tree["fit"]["loss"], rtol=1e-8)
    np.testing.assert_allclose(fit["grad_norm"], theirs.tree["fit"]["grad_norm"], rtol=1e-8)


def test_analytic_divergences_are_those_of_pyros_own_loss():
    class OwnMeanField(TraceMeanField_ELBO):
        pass

    ours, theirs = (quick(mean_problem(loss=loss)).tree["fit"] for loss in ("TraceMeanField_ELBO", OwnMeanField()))
    np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=1e-10)
    np.testing.assert_allclose(ours["grad_norm"], theirs["grad_norm"], rtol=1e-10)
    assert not np.allclose(quick(mean_problem()).tree["fit"]["loss"], ours["loss"], rtol=1e-3)


def branching_model(y):
    mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 2.0))
    scale = SCALE if mu > -100 else 2 * SCALE
    with pyro.plate("obs", len(y)):
        pyro.sample("y", dist.Normal(mu, scale), obs=y)


def test_what_cannot_be_captured_runs_as_written_and_says_why(caplog):
    result = quick(Problem("branch", branching_model, MeanGuide(), (data(),)), compile="graph")
    assert "reads a value out of a tensor" in result.tree.attrs["execution"]
    assert "branching_model" not in result.tree.attrs["execution"]
    assert "scale = SCALE if mu > -100" in caplog.text
    assert quick(mean_problem()).tree.attrs["execution"] == "eager"  # too short to repay a capture
    quiet = fit_svi(Problem("b", branching_model, MeanGuide(), (data(),)), num_steps=200, num_samples=5, progress=False)
    assert quiet.tree.attrs["execution"].startswith("eager: ")


def test_graphs_whose_shapes_depend_on_values_are_not_used():
    points = torch.linspace(-0.01, 0.01, 1001)

    def selecting(y):
        mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 2.0))
        above = points[points > pyro.param("edge", torch.zeros(()))]
        pyro.factor("loss", -(mu * above * torch.arange(len(above))).square().sum())

    result = quick(Problem("selecting", selecting, MeanGuide(), (data(),)), compile="graph")
    assert "shapes depend on values" in result.tree.attrs["execution"]


def test_a_program_that_counts_its_calls_is_not_captured():
    calls = []

    def growing(y):
        calls.append(1)
        mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 2.0))
        with pyro.plate("obs", len(y)):
            pyro.sample("y", dist.Normal(mu, SCALE + 0.01 * len(calls)), obs=y)

    result = quick(Problem("counter", growing, MeanGuide(), (data(),)), compile="graph")
    assert "something other than the arguments changes" in result.tree.attrs["execution"]


def test_networks_with_running_statistics_are_not_captured():
    class Normed(PyroModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.BatchNorm1d(1), nn.Linear(1, 1)).double()

        def forward(self, y):
            loc = self.net(y.unsqueeze(-1)).mean()
            pyro.sample("mu", dist.Normal(loc, 0.2))

    def model(y):
        mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 2.0))
        with pyro.plate("obs", len(y)):
            pyro.sample("y", dist.Normal(mu, SCALE), obs=y)

    eager, wanted = (quick(Problem("norm", model, Normed(), (data(),)), compile=c) for c in ("eager", "graph"))
    assert "buffers change" in wanted.tree.attrs["execution"]
    assert eager.posterior.identical(wanted.posterior)
    assert eager.guide_state["buffer/guide/net.0.num_batches_tracked"] > 30


def test_a_compiler_that_fails_leaves_the_graph(monkeypatch):
    def fail(*args):
        raise CaptureError("no compiler")

    monkeypatch.setattr("probmodels.inference.variational.gradient.compile_graph", fail)
    result = quick(mean_problem(), compile="inductor")
    assert result.tree.attrs["execution"] == "graph: no compiler"
    assert result.posterior.identical(quick(mean_problem(), compile="graph").posterior)


def test_schedules():
    def factors(*args):
        return np.array([make_schedule("p", args[0], 100, args[1])(step) for step in range(100)])

    np.testing.assert_allclose(factors(None, 0.01), np.geomspace(1, 0.01, 100))
    np.testing.assert_allclose(factors("geometric", 0.01), np.geomspace(1, 0.01, 100))
    cosine = factors("cosine", 1.0)
    np.testing.assert_allclose(cosine + cosine[::-1], 1.0)
    assert cosine[0] == 1
    assert abs(factors("cosine", 0.2)[-1] - 0.2) < 1e-12
    warm = factors("warmup", 1.0)
    np.testing.assert_allclose(warm[:10], np.arange(1, 11) / 10)
    assert (warm[10:] == 1).all()
    assert (factors("constant", 1.0) == 1).all()
    both = factors("warmup_cosine", 1.0)
    assert 5 <= both.argmax() <= 10
    start = quick(mean_problem(), num_steps=1, lr=1e-12).params()["loc"]
    held = quick(mean_problem(), schedule=lambda step: float(step >= 30))
    assert abs(held.params()["loc"] - start) < 1e-9
    moved = quick(mean_problem(), schedule=lambda step: float(step >= 29))
    assert abs(abs(moved.params()["loc"] - start) - 0.01) < 0.005  # one step of Adam


def test_annealing_weighs_the_divergence_from_nothing_to_one():
    options = {"lr": 1e-14, "num_steps": 12}
    for loss in ("TraceMeanField_ELBO", "Trace_ELBO"):
        plain = quick(mean_problem(loss=loss), **options).tree["fit"]["loss"].values
        risen = quick(mean_problem(loss=loss), kl_warmup=10, **options).tree["fit"]["loss"].values
        np.testing.assert_allclose(risen[10:], plain[10:], rtol=1e-10)
        if loss == "TraceMeanField_ELBO":
            divergence = torch.distributions.kl_divergence(dist.Normal(0.0, 1.0), dist.Normal(0.0, 2.0)).item()
            np.testing.assert_allclose(plain - risen, divergence * (1 - np.arange(12) / 10).clip(0), atol=1e-6)
        else:
            assert abs(plain[:10] - risen[:10]).min() > 1e-3


def test_the_best_state_is_of_the_full_divergence():
    low = {"num_steps": 40, "num_samples": 3, "keep": "best", "progress": False, "lr": 1e-14}
    best = fit_svi(mean_problem(), kl_warmup=30, patience=100, **low)
    assert best.tree["fit"].sizes["step"] == 40
    waiting = fit_svi(mean_problem(), kl_warmup=30, patience=1, **{**low, "num_steps": 200})
    assert waiting.tree["fit"].sizes["step"] > 30  # losses of smaller weights are not judged


def test_best_parameters_are_those_before_a_fit_goes_astray():
    options = {"num_steps": 400, "lr": 0.05, "num_samples": 3, "progress": False, "loss": "TraceMeanField_ELBO"}
    astray = partial(
        fit_svi, mean_problem(loss=options.pop("loss")), schedule=lambda step: 1.0 if step < 300 else 40.0, **options
    )
    mean, sd = exact(data())
    best, last = (astray(keep=keep).params()["loc"].item() for keep in ("best", "last"))
    assert abs(best - mean) < sd < abs(last - mean)


@pytest.mark.slow
def test_average_parameters_scatter_less_than_the_last_ones():
    mean, _ = exact(data())
    options = {"num_steps": 300, "lr": 0.05, "num_samples": 3, "compile": "eager", "progress": False}
    error = {
        keep: [fit_svi(mean_problem(), keep=keep, seed=s, **options).params()["loc"].item() - mean for s in range(8)]
        for keep in ("average", "last")
    }
    # Steps of Adam forget in some 10; an average over 30 or so has at most three quarters of the scatter, and here the
    # ratio of two root mean squares of 8 has a relative sd of a quarter.
    assert np.square(error["average"]).mean() < 0.75 * np.square(error["last"]).mean()
    one = [fit_svi(mean_problem(), keep=keep, **{**options, "num_steps": 1}).params()["loc"] for keep in error]
    assert torch.equal(*one)


@pytest.mark.parametrize("dtype", ["float32", torch.float64])
def test_types_are_those_asked_for(dtype):
    wanted = np.dtype(str(dtype).removeprefix("torch."))
    for made in (mean_problem(), mean_problem(args=(data(dtype=torch.float32),))):
        result = quick(made, dtype=dtype)
        assert result.posterior["mu"].dtype == wanted
        assert all(value.numpy().dtype == wanted for value in result.params().values())
    assert torch.get_default_dtype() == torch.float32
    assert made.guide.loc.dtype == torch.float64


def test_a_device_can_be_named():
    assert quick(mean_problem(), device="cpu").posterior.identical(quick(mean_problem()).posterior)


def test_networks_outside_the_functions_are_left_as_they_were():
    before = [value.detach().clone() for value in decoder.parameters()]
    first, second = (quick(vae()) for _ in range(2))
    assert first.posterior.identical(second.posterior)
    assert all(torch.equal(value, old) for value, old in zip(decoder.parameters(), before, strict=True))
    assert any(not torch.equal(first.params()[f"decoder$$${n}"], v) for n, v in decoder.named_parameters())
    assert first.predict(vae(), num_samples=3).equals(second.predict(vae(), num_samples=3))
    assert all(torch.equal(value, old) for value, old in zip(decoder.parameters(), before, strict=True))


def test_sites_that_change_between_runs_are_named():
    def moody(y):
        mean_model(y)
        if torch.rand(()) < 0.5:
            pyro.sample("mood", dist.Normal(0.0, 1.0), obs=torch.tensor(0.3))

    caught = 0
    for seed in range(8):
        try:
            quick(Problem("moody", moody, MeanGuide(), (data(),)), seed=seed, num_steps=1)
        except ProblemError as error:
            caught += "site 'mood' of the model changes between two runs" in str(error)
    assert caught >= 2  # half of the pairs of runs differ


def test_draws_in_batches_are_those_of_the_guide():
    result = quick(mean_problem(), num_samples=4000)
    params, mu = result.params(), result.posterior["mu"].values[0]
    assert abs(mu.mean() - params["loc"].item()) < 4 * params["spread"].item() / np.sqrt(4000)
    assert abs(mu.std() / params["spread"].item() - 1) < 4 / np.sqrt(8000)
    assert len(np.unique(mu)) == 4000
    new = (result.posterior["new"] - result.posterior["mu"]).values
    assert abs(np.corrcoef(new[0, :, 0], new[0, :, 1])[0, 1]) < 4 / np.sqrt(4000)


def test_the_optimiser_is_adam_whatever_the_layout_of_gradients():
    torch.manual_seed(0)
    made = {"a": torch.randn(3, 4), "b": torch.randn(5).double(), "c": torch.randn(4, 3).t()}
    ours = {name: value.clone(memory_format=torch.preserve_format).requires_grad_() for name, value in made.items()}
    theirs = {name: value.clone().requires_grad_() for name, value in made.items()}
    mine, reference = Adam(), torch.optim.Adam(theirs.values(), lr=0.1, fused=False, foreach=False)
    for step in range(6):
        gradients = {"a": torch.randn(4, 3).t(), "b": torch.tensor(0.3).double().expand(5)}
        if step > 2:  # a parameter that comes late
            gradients["c"] = torch.randn(3, 4)
        if step == 4:
            saved, mine = mine.state_dict(), Adam()
            mine.load_state_dict(saved)
        mine.step(ours, gradients, lr=0.1 / (step + 1))
        reference.param_groups[0]["lr"] = 0.1 / (step + 1)
        for name, value in theirs.items():
            value.grad = gradients.get(name)
        reference.step()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-5, atol=1e-6)


def test_a_fit_that_stopped_early_answers_at_once(tmp_path):
    run = partial(fit_svi, num_steps=2000, patience=20, lr=0.1, num_samples=5, progress=False)
    problem = mean_problem(guide=auto_guide(mean_model))
    first, again = (run(problem, checkpoint=tmp_path) for _ in range(2))
    assert first.tree["fit"].sizes["step"] < 2000
    assert again.tree["fit"].sizes == first.tree["fit"].sizes
    assert again.posterior.identical(first.posterior)


def test_dropout_is_for_fitting_alone():
    layers = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))

    class Model(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.layers = layers

        def forward(self) -> None:
            mean = pyro.deterministic("mean", self.layers(torch.ones(1)))
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(mean + z, 1.0).to_event(1), obs=torch.ones(1))

    model = Model()
    problem = Problem("dropout", model=model, guide=auto_guide(pyro.poutine.block(model, expose=["z"])))
    result = fit_svi(problem, num_steps=3, num_samples=20, progress=False, compile="eager")
    assert np.ptp(result.posterior["mean"].values) == 0
    assert model.training, "the caller's own module stays as it was"
