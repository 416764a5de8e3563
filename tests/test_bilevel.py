"""fit_bilevel: hypergradients against differences of the whole program and closed forms, rounds, resumption, errors."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDelta, AutoNormal
from torch import Tensor, nn
from torch.distributions import constraints

from probmodels import fit_bilevel, fit_svi
from probmodels.errors import CheckpointError, FitError, ProblemError
from probmodels.inference import Outer, Problem
from probmodels.inference.bilevel.hypergradients import Descent, Losses, hypergradient
from probmodels.inference.bilevel.scoring import score_guide
from probmodels.inference.programs.programs import opened

NOISE = 0.5
QUIET = {"progress": False, "num_samples": 4}


@pytest.fixture(autouse=True)
def double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def ridge(x: Tensor, y: Tensor, prior: bool = True) -> None:
    """Regression whose weights have prior sds exp(log_scale), which are hyperparameters."""
    log_scale = pyro.param("log_scale", lambda: torch.zeros(x.shape[1]))
    with poutine.mask(mask=prior):
        weight = pyro.sample("weight", dist.Normal(torch.zeros(x.shape[1]), log_scale.exp()).to_event(1))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(x @ weight, NOISE), obs=y)


def rows() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 5, generator=generator)
    return x, x @ torch.tensor([1.0, -1.0, 0.5, 0.0, 0.0]) + NOISE * torch.randn(40, generator=generator)


def problem(guide: Any = AutoDelta, hyper: Any = None, stop: bool = False, **options: Any) -> Problem:
    x, y = rows()
    shared = guide(ridge)
    of = partial(Problem, model=ridge, guide=shared)
    outer = Outer(
        of("outer", args=(x[15:30], y[15:30], False)),
        {"log_scale": None} if hyper is None else hyper,
        of("stop", args=(x[30:], y[30:], False)) if stop else None,
    )
    return of("ridge", args=(x[:15], y[:15]), outer=outer, **options)


def losses() -> Losses:
    """The two losses of `problem` with point weights, written out."""
    x, y = rows()

    def misfit(weight: Tensor, part: slice) -> Tensor:
        return 0.5 * ((y[part] - x[part] @ weight) / NOISE).square().sum()

    def inner(values: dict[str, Tensor]) -> Tensor:
        scaled = values["weight"] * torch.exp(-values["log_scale"])
        return misfit(values["weight"], slice(0, 15)) + 0.5 * scaled.square().sum() + values["log_scale"].sum()

    return Losses(inner, lambda values: misfit(values["weight"], slice(15, 30)))


def solved(log_scale: Tensor) -> Tensor:
    """Minimum of the inner loss."""
    x, y = rows()
    precision = x[:15].T @ x[:15] / NOISE**2 + torch.diag(torch.exp(-2 * log_scale))
    return torch.linalg.solve(precision, x[:15].T @ y[:15] / NOISE**2)


# -- hypergradients ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_unrolling_agrees_with_differences_of_the_whole_program(kind):
    start = {"weight": 0.1 * torch.ones(5)}
    log_scale = torch.tensor([0.1, -0.2, 0.3, 0.0, -0.5])

    def run(hyper: Tensor) -> Any:
        return hypergradient("unrolled", losses(), start, {"log_scale": hyper}, Descent(kind, 0.003, {}), 12)

    found = run(log_scale).gradient["log_scale"]
    step = 1e-5
    for place in range(5):
        shift = step * torch.eye(5)[place]
        difference = (run(log_scale + shift).outer_loss - run(log_scale - shift).outer_loss) / (2 * step)
        assert difference == pytest.approx(float(found[place]), rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("method", ["cg", "neumann"])
@pytest.mark.parametrize("linear", [False, True])
def test_parameters_without_curvature_count_as_constants(method, linear):
    def inner(values: dict[str, Tensor]) -> Tensor:
        return (values["a"] - values["h"]).square().sum() + (values["b"].sum() if linear else 0.0)

    pair = Losses(inner, lambda values: values["a"].square().sum() + values["b"].square().sum())
    start = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0])}
    hyper = {"h": torch.tensor([0.5])}
    found = hypergradient(method, pair, start, hyper, Descent("sgd", 0.1, {}), 200, solver_steps=200)
    assert float(found.gradient["h"]) == pytest.approx(2.0, rel=1e-6)  # of 2 h^2


def test_masked_observations_are_not_judged():
    seen = torch.tensor([1.0, 0.0, 1.0])

    def model(mask: Tensor) -> None:
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
        with pyro.plate("row", 3), poutine.mask(mask=mask):
            pyro.sample("y", dist.Bernoulli(logits=level.expand(3)), obs=seen)

    def guide(mask: Tensor) -> None:
        pyro.sample("level", dist.Delta(pyro.param("loc", torch.tensor(2.0))))

    for mask, error in ((torch.tensor([True, False, True]), 0.0), (torch.tensor([True, True, True]), 1 / 3)):
        with opened(Problem("judged", model, guide, args=(mask,)), seed=0) as programs:
            scores = score_guide(programs, num_draws=2, seed=0)
        assert scores["error"] == pytest.approx(error)
        logs = dist.Bernoulli(logits=torch.tensor(2.0)).log_prob(seen)[mask]
        assert scores["log_loss"] == pytest.approx(-float(logs.mean()))


@pytest.mark.parametrize(("method", "steps", "limit"), [("cg", 5, 1e-3), ("neumann", 4000, 1e-3)])
def test_implicit_methods_reach_the_exact_gradient_at_the_minimum(method, steps, limit):
    log_scale = torch.tensor([0.1, -0.2, 0.3, 0.0, -0.5], requires_grad=True)
    exact = torch.autograd.grad(losses().outer({"weight": solved(log_scale)}), log_scale)[0]
    hyper, inner = {"log_scale": log_scale.detach()}, {"weight": solved(log_scale).detach()}
    found = hypergradient(method, losses(), inner, hyper, Descent("sgd", 0.005, {}), 0, solver_steps=steps)
    error = torch.linalg.vector_norm(found.gradient["log_scale"] - exact) / torch.linalg.vector_norm(exact)
    assert error < limit
    blunt = hypergradient(
        method, losses(), inner, hyper, Descent("sgd", 0.005, {}), 0, solver_steps=steps, damping=100.0
    )
    assert torch.linalg.vector_norm(blunt.gradient["log_scale"] - exact) > 0.2 * torch.linalg.vector_norm(exact)


def test_a_finite_difference_is_one_unrolled_step_of_descent():
    hyper, inner = {"log_scale": torch.zeros(5)}, {"weight": torch.full((5,), 0.3)}
    one = hypergradient("unrolled", losses(), inner, hyper, Descent("sgd", 0.01, {}), 1)
    other = hypergradient("finite_difference", losses(), inner, hyper, Descent("sgd", 0.01, {}), 0)
    # The inner loss is quadratic in the weights, so that a central difference is exact but for rounding.
    torch.testing.assert_close(other.gradient["log_scale"], one.gradient["log_scale"], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("method", ["cg", "unrolled"])
def test_the_engine_finds_the_best_hyperparameters(method):
    result = fit_bilevel(
        problem(), hypergrad=method, inner_steps=400, unroll_steps=100, num_rounds=4, lr=0.004, optimiser="sgd",
        hyper_lr=0.05, restart=False, keep="last", compare="unrolled" if method == "cg" else "cg", **QUIET
    )  # fmt: skip
    fit = result.tree["fit"]
    assert fit["cosine"].values[1:].min() > 0.999
    assert fit["relative_error"].values[1:].max() < 0.05
    values = result.params()
    torch.testing.assert_close(values["AutoDelta.weight"], solved(values["log_scale"]), rtol=0, atol=0.02)
    scale, best = torch.zeros(5, requires_grad=True), []
    for _ in range(16):  # the same descent on the closed form
        loss = losses().outer({"weight": solved(scale)})
        scale = (scale - 0.05 * torch.autograd.grad(loss, scale)[0]).detach().requires_grad_()
        best.append(float(loss.detach()))
    torch.testing.assert_close(values["log_scale"], scale.detach(), rtol=0, atol=0.02)
    constant = 15 * np.log(NOISE * np.sqrt(2 * np.pi))
    assert fit["outer_loss"].values[-1] == pytest.approx(best[-1] + constant, abs=0.02)


# -- rounds ---------------------------------------------------------------------------------------------------------


def test_values_are_projected_on_their_constraint():
    bounded = {"log_scale": constraints.interval(-0.05, 0.05)}
    result = fit_bilevel(problem(hyper=bounded), num_rounds=2, inner_steps=20, hyper_lr=1.0, **QUIET)
    values = result.params()["log_scale"]
    assert values.abs().max() == 0.05
    simplex = fit_bilevel(problem(hyper={"log_scale": constraints.simplex}), num_rounds=2, inner_steps=20, **QUIET)
    weights = simplex.params()["log_scale"]
    assert float(weights.sum()) == pytest.approx(1, abs=1e-12)
    assert weights.min() >= 0


def test_rounds_stop_early_and_the_best_is_kept(tmp_path):
    run = partial(fit_bilevel, num_rounds=30, inner_steps=40, unroll_steps=10, lr=0.05, hyper_lr=0.3, **QUIET)
    result = run(problem(stop=True), patience=3)
    scores = result.tree["fit"]["log_loss"].values
    best = int(result.tree["fit"].attrs["best_round"])
    assert len(scores) < 30
    assert best == scores.argmin() == len(scores) - 4
    first, again = (run(problem(stop=True), patience=3, checkpoint=tmp_path) for _ in range(2))
    assert again.posterior.identical(first.posterior)
    assert again.tree["fit"].sizes == first.tree["fit"].sizes
    x, y = rows()
    error = (y[30:] - x[30:] @ result.params()["AutoDelta.weight"]) / NOISE
    exact = float((0.5 * error.square()).mean()) + np.log(NOISE * np.sqrt(2 * np.pi))
    assert scores[best] == pytest.approx(exact, rel=1e-10)


def test_a_settled_inner_problem_ends_its_round():
    short = fit_bilevel(problem(), num_rounds=1, inner_steps=2000, lr=0.05, tolerance=1e-3, **QUIET)
    assert short.tree["fit"].sizes["step"] < 400


def test_random_guides_work_and_seeds_reproduce():
    run = partial(fit_bilevel, num_rounds=2, inner_steps=20, **QUIET)
    one, two, other = (run(problem(AutoNormal), seed=seed) for seed in (0, 0, 1))
    assert one.posterior.identical(two.posterior)
    assert not one.posterior.equals(other.posterior)
    assert set(one.params()) == {"log_scale", "AutoNormal.locs.weight", "AutoNormal.scales.weight"}


class Stop(Exception):
    pass


class Point(nn.Module):
    """A point for the weights, moved by a layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 5)

    def forward(self, *args: Any) -> None:
        pyro.module("point", self)
        pyro.sample("weight", dist.Delta(self.layer(torch.ones(2))).to_event(1))


def holding(start: Any) -> Problem:
    """Parameters of every origin: of a guide module, of a module and tensors that functions hold, of initialisers."""
    torch.manual_seed(0)
    net, held, log_scale = nn.Linear(5, 1), torch.tensor(0.3, requires_grad=True), nn.Parameter(torch.zeros(5))

    def model(x: Tensor, y: Tensor, prior: bool = True) -> None:
        pyro.module("net", net)
        level = pyro.param("level", start) + pyro.param("held", held)
        scale = pyro.param("log_scale", log_scale).exp()
        with poutine.mask(mask=prior):
            weight = pyro.sample("weight", dist.Normal(torch.zeros(5), scale).to_event(1))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(x @ weight + net(x).squeeze(-1) + level, NOISE), obs=y)

    x, y = rows()
    of = partial(Problem, model=model, guide=Point())
    outer = Outer(of("outer", args=(x[15:], y[15:], False)), {"log_scale": None})
    return of("holding", args=(x[:15], y[:15]), outer=outer)


def test_a_restart_brings_back_all_starting_values_and_runs_initialisers_anew():
    run = partial(fit_bilevel, num_rounds=3, inner_steps=30, unroll_steps=1, lr=0.02, hyper_lr=1e-12, **QUIET)
    constant = holding(lambda: torch.zeros(()))
    first = run(constant).tree["fit"]["inner_loss"].values.reshape(3, 30)
    np.testing.assert_allclose(first[1:], first[[0, 0]], rtol=1e-9)
    assert first[0, -1] < 0.5 * first[0, 0]  # which a round has left well behind
    going_on = run(constant, restart=False).tree["fit"]["inner_loss"].values.reshape(3, 30)
    assert going_on[1, 0] < first[0, -1]
    levels = []

    def note(step):
        levels.append(float(pyro.get_param_store()["level"].detach()))

    run(holding(lambda: torch.randn(())), lr=1e-12, callbacks=[note])
    drawn = np.array(levels).reshape(3, 30)
    assert np.ptp(drawn, axis=1).max() < 1e-9
    assert np.diff(np.sort(drawn[:, 0])).min() > 1e-3


def test_a_restart_leaves_hyperparameters_that_functions_hold():
    seen = []

    def note(step):
        seen.append(pyro.get_param_store()["log_scale"].detach().clone())

    fit = fit_bilevel(
        holding(lambda: torch.zeros(())), num_rounds=3, inner_steps=4, unroll_steps=2, callbacks=[note], **QUIET
    ).tree["fit"]
    moves = torch.stack([torch.zeros(5), *seen]).diff(dim=0).norm(dim=1)
    np.testing.assert_allclose(moves, 0.1 * fit["hypergrad_norm"].values, rtol=1e-9)


def test_a_resumed_run_needs_the_starting_values_that_it_restarts_from(tmp_path):
    run = partial(fit_bilevel, num_rounds=3, inner_steps=4, unroll_steps=2, **QUIET)

    def fail(step):
        if step.number == 2:
            raise Stop

    known = holding(lambda: torch.zeros(()))
    with pytest.raises(Stop):
        run(known, checkpoint=tmp_path, checkpoint_every=0.0, callbacks=[fail])
    other = Point()
    assert known.outer is not None
    moved = replace(known, guide=other, outer=replace(known.outer, problem=replace(known.outer.problem, guide=other)))
    with pytest.raises(CheckpointError, match="had other starting values"):
        run(moved, checkpoint=tmp_path)
    resumed = run(holding(lambda: torch.zeros(())), checkpoint=tmp_path)
    np.testing.assert_array_equal(resumed.tree["fit"]["outer_loss"], run(known).tree["fit"]["outer_loss"])
    run(moved, checkpoint=tmp_path)  # at its end there is nothing left to restart


@pytest.mark.parametrize("optimiser", ["adam", "sgd"])
def test_an_interrupted_run_goes_on_to_the_same_numbers(tmp_path, optimiser):
    run = partial(
        fit_bilevel, num_rounds=3, inner_steps=20, unroll_steps=4, hyper_optimiser=optimiser, hyper_lr=0.02, **QUIET
    )

    def fail(step):
        if step.number == 8:
            raise Stop

    with pytest.raises(Stop):
        run(problem(AutoNormal, stop=True), checkpoint=tmp_path, checkpoint_every=0.0, callbacks=[fail])
    resumed = run(problem(AutoNormal, stop=True), checkpoint=tmp_path)
    plain = run(problem(AutoNormal, stop=True))
    assert resumed.posterior.identical(plain.posterior)
    for name in ("outer_loss", "hypergrad_norm", "log_loss"):
        np.testing.assert_array_equal(resumed.tree["fit"][name], plain.tree["fit"][name])
    with pytest.raises(CheckpointError, match="hyper_lr"):
        run(problem(AutoNormal, stop=True), checkpoint=tmp_path, hyper_lr=0.5)


def wide(x: Tensor, y: Tensor) -> None:
    """Normal means whose common prior sd is a hyperparameter."""
    log_scale = pyro.param("log_scale", lambda: torch.zeros(()))
    with pyro.plate("row", len(y)):
        mean = pyro.sample("mean", dist.Normal(0.0, log_scale.exp()))
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def test_memory_stays_flat_over_steps():
    """A history that is kept by one step too many grows by some 10 MB at each of these."""
    y = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    shared, resident = AutoDelta(wide), []
    page = os.sysconf("SC_PAGE_SIZE")

    def measure(step):
        resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * page)

    outer = Outer(Problem("outer", wide, shared, args=(y, y)), {"log_scale": None})
    fit_bilevel(
        Problem("wide", wide, shared, args=(y, y), outer=outer),
        num_rounds=2, inner_steps=60, unroll_steps=2, restart=False, hyper_lr=1e-6, callbacks=[measure], **QUIET
    )  # fmt: skip
    assert len(resident) == 60
    assert max(resident[20:]) - max(resident[10:20]) < 50e6


def test_generated_sites_take_no_part():
    def with_leaf(x, y, prior=True):
        ridge(x, y, prior)
        pyro.sample("new", dist.Normal(torch.zeros(3), 100.0).to_event(1), infer={"generated": True})

    x, y = rows()
    shared = AutoDelta(poutine.block(with_leaf, hide=["new"]))
    outer = Outer(Problem("outer", with_leaf, shared, args=(x[15:30], y[15:30], False)), {"log_scale": None})
    leaf = Problem("leaf", with_leaf, shared, args=(x[:15], y[:15]), outer=outer)
    run = partial(fit_bilevel, num_rounds=1, inner_steps=10, **QUIET)
    found, plain = run(leaf), run(problem())
    np.testing.assert_array_equal(found.tree["fit"]["outer_loss"], plain.tree["fit"]["outer_loss"])
    assert found.posterior["new"].std() > 10


# -- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hypergrad": "magic"}, "hypergrad='magic'; choose one of"),
        ({"unroll_steps": 50, "inner_steps": 10}, "unroll_steps=50 exceeds inner_steps=10"),
        ({"compare": "unrolled"}, "is the method itself"),
        ({"hyper_lr": 0.0}, "hyper_lr=0.0; give a number above 0"),
        ({"num_rounds": 0}, "num_rounds=0; give a whole number of at least 1"),
        ({"solver_steps": 5}, "solver_steps=5 is not used with hypergrad='unrolled'"),
        ({"batch_size": 2}, "unknown option 'batch_size' of fit_bilevel"),
        ({"stop_by": "error"}, "needs observations of a discrete distribution"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ProblemError, match=message):
        fit_bilevel(problem(), **{**QUIET, **options})


def test_hyperparameters_have_to_exist_and_to_matter():
    with pytest.raises(ProblemError, match="no hyperparameter 'scale'"):
        fit_bilevel(problem(hyper={"scale": None}), **QUIET)
    with pytest.raises(ProblemError, match="cannot project hyperparameter 'log_scale'"):
        fit_bilevel(problem(hyper={"log_scale": constraints.positive_definite}), **QUIET)
    with pytest.raises(ProblemError, match="needs an outer problem"):
        fit_bilevel(Problem("bare", ridge, AutoDelta(ridge), args=rows()), **QUIET)

    def idle(x, y, prior=True):
        pyro.param("idle", lambda: torch.zeros(2))
        ridge(x, y, prior)

    shared, args = AutoDelta(idle), rows()
    lazy = Problem("lazy", idle, shared, args=args, outer=Outer(Problem("o", idle, shared, args=args), {"idle": None}))
    with pytest.raises(ProblemError, match=r"no gradient reaches the hyperparameters \['idle'\]"):
        fit_bilevel(lazy, **QUIET)


def test_a_loss_that_breaks_down_says_where():
    with pytest.raises(FitError, match="round 1, step"):
        fit_bilevel(problem(), num_rounds=1, inner_steps=200, lr=10.0, optimiser="sgd", **QUIET)


def test_an_automatic_guide_of_a_model_with_parameters_is_no_clash():
    x, y = rows()
    result = fit_svi(
        Problem("ridge", ridge, AutoNormal(ridge), args=(x, y)), num_steps=5, num_samples=4, progress=False
    )
    assert "log_scale" in result.params()
