"""Automatic guides: densities, exact posteriors, every support, plates and minibatches, starts and errors."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor
from torch.distributions import biject_to

from probmodels.errors import ProblemError
from probmodels.guides.auto import GUIDES, make_guide, with_guide
from probmodels.inference import Problem, fit_svi
from probmodels.inference.diagnostics.convergence import psis_khat
from probmodels.inference.predictive import log_joint
from probmodels.inference.programs.bijections import FlatCholesky, Gram
from probmodels.inference.programs.capture import capture, lift
from probmodels.inference.programs.minibatch import subsampled
from probmodels.inference.runtime.ops import isolated
from probmodels.inference.variational.losses import objective_of

NOISY = [name for name in GUIDES if name not in ("map", "delta", "laplace")]
DISTINCT = [name for name in GUIDES if name not in ("flow", "delta")]
fit = partial(fit_svi, num_steps=800, lr=0.05, lr_decay=0.01, num_samples=1000, progress=False)


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


# --- models ----------------------------------------------------------------------------------------------------------


def scalars(y: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(y.new_zeros(()), 2.0))
    scale = pyro.sample("scale", dist.HalfCauchy(y.new_ones(())))
    pyro.deterministic("precision", scale**-2)
    with pyro.plate("obs", len(y)):
        pyro.sample("y", dist.Normal(loc, scale), obs=y)
        pyro.sample("new", dist.Normal(loc, scale), infer={"generated": True})


def supports(y: Tensor) -> None:
    """One site of each support, a vector of them in a plate."""
    zero, one = y.new_zeros(()), y.new_ones(())
    parts = [
        pyro.sample("positive", dist.Gamma(2 * one, one)),
        pyro.sample("unit", dist.Beta(2 * one, 3 * one)),
        pyro.sample("interval", dist.Uniform(-one, 3 * one)),
        pyro.sample("simplex", dist.Dirichlet(y.new_ones(3)))[..., 0],
        pyro.sample("ordered", ordered(zero))[..., 1],
        pyro.sample("corr_cholesky", dist.LKJCholesky(3, one))[..., 2, 0],
        pyro.sample("cholesky", matrix(zero, FlatCholesky()))[..., 1, 0],
        pyro.sample("covariance", matrix(zero, FlatCholesky(), Gram()))[..., 1, 0],
    ]
    with pyro.plate("obs", len(y)):
        weights = pyro.sample("weights", dist.Dirichlet(y.new_ones(2)))
        pyro.sample("y", dist.Normal(sum(parts) + weights[..., 0], 1.0), obs=y)


def ordered(zero: Tensor) -> Any:
    base = dist.Normal(zero, 1.0).expand([3]).to_event(1)
    return dist.TransformedDistribution(base, [dist.transforms.OrderedTransform()])


def matrix(zero: Tensor, *transforms: Any) -> Any:
    return dist.TransformedDistribution(dist.Normal(zero, 1.0).expand([6]).to_event(1), list(transforms))


def hierarchy(y: Tensor) -> None:
    """mu ~ N(0, 1), rows a ~ N(mu, 1), columns b ~ N(mu, 1), cells c ~ N(a + b, 1), y ~ N(c, 0.5): all Gaussian."""
    rows, columns = pyro.plate("row", y.shape[0], dim=-2), pyro.plate("column", y.shape[1], dim=-1)
    mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 1.0))
    with columns as j:
        b = pyro.sample("b", dist.Normal(mu, 1.0))
    with rows as i:
        a = pyro.sample("a", dist.Normal(mu, 1.0))
    with rows, columns:
        c = pyro.sample("c", dist.Normal(a + b, 1.0))
        pyro.sample("y", dist.Normal(c, 0.5), obs=y[i][:, j])


def locals_(y: Tensor) -> None:
    """A positive scale, and for each row a vector and a weight: y (row, 2)."""
    scale = pyro.sample("scale", dist.LogNormal(y.new_zeros(()), 0.5))
    with pyro.plate("row", len(y)) as i:
        z = pyro.sample("z", dist.Normal(y.new_zeros(2), scale.unsqueeze(-1)).to_event(1))
        w = pyro.sample("w", dist.Gamma(y.new_tensor(3.0), 3.0))
        pyro.sample("y", dist.Normal(w.unsqueeze(-1) * z, 0.7).to_event(1), obs=y[i])


def regression(x: Tensor, y: Tensor) -> None:
    beta = pyro.sample("beta", dist.Normal(x.new_zeros(x.shape[1]), 1.0).to_event(1))
    with pyro.plate("obs", len(y)):
        pyro.sample("y", dist.Normal(x @ beta, 0.7), obs=y)


def banana() -> None:
    a = pyro.sample("a", dist.Normal(number(0.0), 1.0))
    pyro.sample("b", dist.Normal(a**2, 0.3))


def half_normal_rate(y: Tensor) -> None:
    """rate ~ Gamma(2, 1), y ~ Poisson(rate): the posterior is Gamma(2 + sum y, 1 + n)."""
    rate = pyro.sample("rate", dist.Gamma(y.new_tensor(2.0), 1.0))
    with pyro.plate("obs", len(y)):
        pyro.sample("y", dist.Poisson(rate), obs=y)


def grid(*shape: int) -> Tensor:
    size = int(np.prod(shape))
    return torch.sin(torch.arange(size, dtype=torch.float64) * 1.7).reshape(shape)


def regression_problem() -> tuple[Problem, Tensor, Tensor, float]:
    """Strongly correlated coefficients; problem, posterior mean, precision and log evidence."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 3, dtype=torch.float64, generator=generator)
    x[:, 1] = x[:, 0] + 0.5 * x[:, 1]
    y = torch.randn(8, dtype=torch.float64, generator=generator)
    precision = torch.eye(3, dtype=torch.float64) + x.T @ x / 0.49
    mean = torch.linalg.solve(precision, x.T @ y / 0.49)
    marginal = dist.MultivariateNormal(torch.zeros_like(y), 0.49 * torch.eye(8, dtype=torch.float64) + x @ x.T)
    return Problem("regression", regression, args=(x, y)), mean, precision, float(marginal.log_prob(y))


ZOO = {
    "scalars": Problem("scalars", scalars, args=(grid(6),)),
    "supports": Problem("supports", supports, args=(grid(4),)),
    "hierarchy": Problem("hierarchy", hierarchy, args=(grid(3, 2),)),
    "rows": Problem("hierarchy", hierarchy, args=(grid(3, 2),), batch_plates=("row",)),
    "rows and columns": Problem("hierarchy", hierarchy, args=(grid(3, 2),), batch_plates=("row", "column")),
    "locals": Problem("locals", locals_, args=(grid(5, 2),), batch_plates=("row",)),
}


def weights(problem: Problem, guide: Any, count: int) -> np.ndarray:
    """log p - log q of draws of a guide as it stands."""
    found = []
    with isolated(1), torch.no_grad():
        for _ in range(count):
            drawn = poutine.trace(guide).get_trace(*problem.args)
            found.append(log_joint(poutine.trace(poutine.replay(problem.model, drawn)).get_trace(*problem.args)))
            found[-1] -= log_joint(drawn)
    return np.array(found)


def set_normal(guide: Any, mean: Tensor, precision: Tensor) -> None:
    """Give a full-rank guide its moments."""
    root = torch.linalg.cholesky(torch.linalg.inv(precision))
    with torch.no_grad():
        guide.joint.loc.copy_(mean)
        guide.joint.scale = root.diagonal()
        guide.joint.lower.copy_(root / root.diagonal()[:, None])


def jitter(guide: Any, size: float = 0.3) -> Any:
    """Move all parameters off their start, at which many families coincide."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter += size * torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
    return guide


# --- conformance -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ZOO)
@pytest.mark.parametrize("name", DISTINCT)
def test_every_guide_fits_every_model(name: str, model: str) -> None:
    problem = with_guide(ZOO[model], name).validate()
    guide = pickle.loads(pickle.dumps(copy.deepcopy(problem.guide)))
    with pyro.validation_enabled(True), isolated(0):
        values = guide(*problem.args)
        loss = Trace_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=2)
        hidden = poutine.block(problem.model, hide=["new"])
        assert np.isfinite(loss.loss(hidden, guide, *problem.args))
        nodes: Any = poutine.trace(problem.model).get_trace(*problem.args).nodes
    assert set(values) == set(problem.names("latent"))
    for site, value in values.items():
        assert nodes[site]["fn"].support.check(value).all(), site
        assert value.dtype == torch.float64


def correlation(y: Tensor) -> None:
    pyro.sample("correlation", dist.LKJ(3, y.new_ones(())))


def test_supports_whose_transforms_do_not_survive_copying() -> None:
    problem = with_guide(Problem("correlation", correlation, args=(grid(3),)), "full_rank").validate()
    with isolated(0):
        value = pickle.loads(pickle.dumps(copy.deepcopy(problem.guide)))(grid(3))["correlation"]
    assert dist.constraints.corr_matrix.check(value)


@pytest.mark.parametrize("name", DISTINCT)
def test_equal_problems_give_equal_guides_and_random_numbers_are_left_alone(name: str) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = make_guide(ZOO["locals"], name).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    two = make_guide(ZOO["locals"], name).state_dict()
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("model", ["supports", "rows", "rows and columns", "locals"])
@pytest.mark.parametrize("name", [name for name in NOISY if name != "flow"])
def test_log_densities_are_those_of_the_transformed_noise(name: str, model: str) -> None:
    problem = ZOO[model]
    guide = jitter(make_guide(problem, name))
    with isolated(0):
        trace: Any = poutine.trace(guide).get_trace(*problem.args)
        noises = {key: node["value"].detach() for key, node in trace.nodes.items() if key.startswith("_noise")}
        supports_ = {site: trace.nodes[site]["value"] for site in problem.names("latent")}
        fns = poutine.trace(problem.model).get_trace(*problem.args).nodes
        bijections = {site: biject_to(fns[site]["fn"].support) for site in supports_}

        def vector(flat: Tensor) -> Tensor:
            pieces = flat.split([value.numel() for value in noises.values()])
            given = {key: piece.reshape(noises[key].shape) for key, piece in zip(noises, pieces, strict=True)}
            values = poutine.condition(guide, given)(*problem.args)
            return torch.cat([bijections[site].inv(values[site]).reshape(-1) for site in values])

        flat = torch.cat([value.reshape(-1) for value in noises.values()])
        jacobian = torch.autograd.functional.jacobian(vector, flat)
    expected = dist.Normal(torch.zeros_like(flat), 1.0).log_prob(flat).sum() - torch.linalg.slogdet(jacobian)[1]
    for site, value in supports_.items():
        z = bijections[site].inv(value)
        expected = expected - bijections[site].log_abs_det_jacobian(z, value).sum()
    assert trace.log_prob_sum().item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("name", ["mean_field", "full_rank", "map"])
def test_analytic_divergences_leave_no_jacobian_out(name: str) -> None:
    problem = ZOO["supports"]
    guide = jitter(make_guide(problem, name))
    losses = []
    for loss in (Trace_ELBO(), TraceMeanField_ELBO()):
        with isolated(0), torch.no_grad():
            losses.append(loss.loss(problem.model, guide, *problem.args))
    assert losses[0] == pytest.approx(losses[1])


@pytest.mark.parametrize("name", DISTINCT)
def test_steps_can_be_captured(name: str) -> None:
    problem = ZOO["locals"]
    guide = jitter(make_guide(problem, name), 0.05)
    with isolated(0):
        guide(*problem.args)
        leaves, objective = list(guide.parameters()), objective_of(Trace_ELBO())

        def step() -> tuple[Tensor, ...]:
            return torch.autograd.grad(objective(problem.model, guide, *problem.args), leaves)

        with pyro.validation_enabled(False):
            graph = capture(lift(step, leaves), *(leaf.detach().clone() for leaf in leaves))
            torch.manual_seed(5)
            wanted = step()
            torch.manual_seed(5)
            with torch.no_grad():
                found = graph(*leaves)
    for left, right in zip(wanted, found, strict=True):
        torch.testing.assert_close(left, right)


@pytest.mark.parametrize("name", ["mean_field", "full_rank", "map"])
def test_guides_follow_the_type_of_the_sites(name: str) -> None:
    problem = Problem("supports", supports, args=(grid(4).float(),))
    guide = make_guide(problem, name)
    assert {parameter.dtype for parameter in guide.parameters()} == {torch.float32}
    with isolated(0):
        assert {value.dtype for value in guide(*problem.args).values()} == {torch.float32}
        double = guide.to(torch.float64)
        assert {value.dtype for value in double(*ZOO["supports"].args).values()} == {torch.float64}


# --- exact posteriors ------------------------------------------------------------------------------------------------


def test_a_full_rank_normal_at_the_posterior_has_constant_weights() -> None:
    problem, mean, precision, evidence = regression_problem()
    guide = make_guide(problem, "full_rank")
    set_normal(guide, mean, precision)
    np.testing.assert_allclose(weights(problem, guide, 5), evidence, rtol=1e-10)


@pytest.mark.parametrize("name", ["mean_field", "low_rank", "full_rank"])
def test_scores_are_gradients_of_the_log_density(name: str) -> None:
    guide = jitter(make_guide(regression_problem()[0], name))
    noise = grid(3)
    with torch.no_grad():
        score = guide.joint.score(noise, lambda parameter: parameter)
    jacobian = torch.autograd.functional.jacobian(lambda e: guide.joint(e, lambda parameter: parameter, [])[0], noise)
    normal = dist.MultivariateNormal(torch.zeros(3, dtype=torch.float64), jacobian @ jacobian.T)
    z = (jacobian @ noise).requires_grad_(True)
    torch.testing.assert_close(score, torch.autograd.grad(normal.log_prob(z), z)[0])


def test_the_path_gradient_vanishes_at_the_posterior_and_leaves_values_alone() -> None:
    problem, mean, precision, evidence = regression_problem()
    guide = make_guide(problem, "full_rank", path_gradient=True)
    set_normal(guide, mean, precision)
    with isolated(0):
        loss = Trace_ELBO().differentiable_loss(problem.model, guide, *problem.args)
        gradients = torch.autograd.grad(loss, list(guide.parameters()))
    assert -loss.item() == pytest.approx(evidence)
    assert all(gradient.abs().max() < 1e-10 for gradient in gradients)


@pytest.mark.parametrize(("name", "options"), [("full_rank", {}), ("low_rank", {"rank": 2})])
def test_normals_recover_a_correlated_posterior(name: str, options: dict[str, Any]) -> None:
    problem, mean, precision, evidence = regression_problem()
    result = fit(with_guide(problem, name, **options), num_steps=2000)
    covariance = torch.linalg.inv(precision)
    sd = covariance.diagonal().sqrt()
    draws = torch.as_tensor(result.posterior["beta"].values[0])
    # Four standard errors of 1000 draws, and the noise of the last steps, of lr 5e-4.
    assert ((draws.mean(0) - mean).abs() / sd).max() < 4 / 1000**0.5 + 0.05
    error = (draws.T.cov() - covariance) / torch.outer(sd, sd)
    assert error.abs().max() < 4 * (2 / 1000) ** 0.5 + 0.05
    weight = result.tree["sample_stats"]["log_weight"].values
    assert weight.mean() == pytest.approx(evidence, abs=0.05)
    assert weight.mean() <= evidence + 4 * weight.std() / 1000**0.5


def test_mean_field_finds_the_diagonal_of_the_precision() -> None:
    problem, mean, precision, evidence = regression_problem()
    result = fit(with_guide(problem, "mean_field"))
    params = result.params()
    sd = precision.diagonal().rsqrt()
    assert ((params["guide.joint.loc"] - mean).abs() / sd).max() < 0.1
    assert (params["guide.joint.scale"] / sd - 1).abs().max() < 0.05
    # The bound falls short by half of log |diag(P)| - log |P|.
    gap = 0.5 * (precision.diagonal().log().sum() - torch.linalg.slogdet(precision)[1])
    weight = result.tree["sample_stats"]["log_weight"].values
    assert evidence - weight.mean() == pytest.approx(float(gap), abs=0.02 + 4 * weight.std() / 1000**0.5)
    full = fit(with_guide(problem, "low_rank", rank=1)).tree["sample_stats"]["log_weight"].values
    assert psis_khat(weight) > 0.5 > psis_khat(full)


def nested(y: Tensor) -> None:
    """mu ~ N(0, 1), rows a ~ N(mu, 1), cells c ~ N(a, 1), y ~ N(c, 0.5)."""
    rows, cells = pyro.plate("row", y.shape[0], dim=-2), pyro.plate("cell", y.shape[1], dim=-1)
    mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 1.0))
    with rows:
        a = pyro.sample("a", dist.Normal(mu, 1.0))
    with rows, cells:
        c = pyro.sample("c", dist.Normal(a, 1.0))
        pyro.sample("y", dist.Normal(c, 0.5), obs=y)


def test_structured_is_exact_where_elements_are_independent_given_what_encloses_them() -> None:
    y = grid(3, 2)
    row = torch.arange(6) // 2
    covariance = 1.0 + (row == row[:, None]).double() + 1.25 * torch.eye(6, dtype=torch.float64)
    evidence = dist.MultivariateNormal(torch.zeros(6, dtype=torch.float64), covariance).log_prob(y.reshape(-1))
    result = fit(with_guide(Problem("nested", nested, args=(y,)), "structured"), num_steps=1000)
    weight = result.tree["sample_stats"]["log_weight"].values
    assert weight.mean() == pytest.approx(float(evidence), abs=0.05)
    assert weight.std() < 0.5  # of weights that are constant for the posterior itself


@pytest.mark.slow
def test_a_flow_bends_where_a_normal_cannot() -> None:
    problem = Problem("banana", banana)  # of evidence 1
    bent = fit(with_guide(problem, "nsf", hidden=16), lr=0.03, num_steps=1000).tree["sample_stats"]["log_weight"].values
    straight = fit(with_guide(problem, "full_rank")).tree["sample_stats"]["log_weight"].values
    error = ((bent.var() + straight.var()) / 1000) ** 0.5
    assert bent.mean() > straight.mean() + 4 * error
    assert bent.mean() < 4 * error


def test_map_is_the_mode_of_the_density_of_the_sites() -> None:
    y = torch.tensor([1.0, 3.0, 2.0], dtype=torch.float64)
    result = fit(with_guide(Problem("rate", half_normal_rate, args=(y,)), "map"), num_steps=300, num_samples=5)
    np.testing.assert_allclose(result.posterior["rate"], (8 - 1) / 4, rtol=1e-3)


def test_laplace_is_the_normal_at_the_mode_in_unconstrained_space() -> None:
    y = torch.tensor([1.0, 3.0, 2.0], dtype=torch.float64)
    problem = Problem("rate", half_normal_rate, args=(y,))
    guide = make_guide(problem, "laplace")
    # log rate has density exp(8 u - 4 e^u): its mode is log 2 and its curvature there 8.
    with isolated(0):
        guide.joint.loc.data.fill_(np.log(2.0))
        guide.finish(problem)
        draws = torch.stack([guide(y)["rate"].log() for _ in range(1000)])
        assert guide.joint.root.item() == pytest.approx(8**-0.5)
    assert abs(draws.mean() - np.log(2.0)) < 4 * 8**-0.5 / 1000**0.5
    assert abs(draws.std() * 8**0.5 - 1) < 4 / 2000**0.5


def test_laplace_of_a_normal_posterior_is_that_posterior() -> None:
    problem, mean, _, evidence = regression_problem()
    guide = make_guide(problem, "laplace")
    with isolated(0):
        guide.joint.loc.data.copy_(mean)
        guide.finish(problem)
    np.testing.assert_allclose(weights(problem, guide, 5), evidence, rtol=1e-10)


def test_laplace_refuses_what_is_no_mode() -> None:
    guide = make_guide(Problem("banana", banana), "laplace")
    guide.joint.loc.data.copy_(torch.tensor([0.0, 3.0]))
    with isolated(0), pytest.raises(ProblemError, match="not that of a mode"):
        guide.finish(Problem("banana", banana))


# --- minibatches -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DISTINCT)
def test_gradients_of_minibatches_average_to_that_of_all_rows(name: str) -> None:
    y = grid(6, 2)
    problem = Problem("locals", locals_, args=(y,), batch_plates=("row",))
    guide = jitter(make_guide(problem, name), 0.1)
    generator = torch.Generator().manual_seed(0)
    with isolated(0):
        nodes: Any = poutine.trace(guide).get_trace(y).nodes
        noises = {
            key: torch.randn(node["value"].shape, dtype=torch.float64, generator=generator)
            for key, node in nodes.items()
            if key.startswith("_noise")
        }

        def gradient(rows: Tensor) -> list[Tensor]:
            given = {key: value[rows] if key == "_noise_in_row" else value for key, value in noises.items()}
            with subsampled({"row": rows}), pyro.validation_enabled(True):
                drawn = poutine.trace(poutine.condition(guide, given)).get_trace(y)
                joint = poutine.trace(poutine.replay(problem.model, drawn)).get_trace(y).log_prob_sum()
            # Conditioned noise is observed and scaled alike; its density has no gradient.
            return torch.autograd.grad(joint - drawn.log_prob_sum(), list(guide.parameters()))

        whole = gradient(torch.arange(6))
        batches = [gradient(rows) for rows in torch.tensor([[4, 0, 3], [1, 5, 2]])]
    assert any(value.abs().max() > 1e-3 for value in whole)
    for full, *parts in zip(whole, *batches, strict=True):
        torch.testing.assert_close(torch.stack(parts).mean(0), full)


@pytest.mark.parametrize("name", ["mean_field", "structured", "map"])
def test_a_minibatch_moves_its_own_rows_only(name: str) -> None:
    problem = ZOO["locals"]
    guide = make_guide(problem, name)
    with isolated(0), subsampled({"row": torch.tensor([3, 1])}):
        Trace_ELBO().differentiable_loss(problem.model, guide, *problem.args).backward()
    moved = guide.in_row.loc.grad.abs().sum(-1) > 0
    assert moved.tolist() == [False, True, False, True, False]


def subsampling(y: Tensor) -> None:
    with pyro.plate("row", len(y), subsample_size=2) as i:
        z = pyro.sample("z", dist.Normal(y.new_zeros(()), 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y[i])


@pytest.mark.parametrize("batch_plates", [(), ("row",)])
def test_a_model_may_subsample_by_itself(batch_plates: tuple[str, ...]) -> None:
    problem = with_guide(Problem("own", subsampling, args=(grid(5),), batch_plates=batch_plates)).validate()
    assert sum(parameter.numel() for parameter in problem.guide.parameters()) == 10  # type: ignore[union-attr]


# --- starts and errors -----------------------------------------------------------------------------------------------


def test_guides_start_at_the_prior_median() -> None:
    guide = make_guide(ZOO["scalars"], "mean_field", init_scale=0.2)
    with isolated(0), torch.no_grad():
        guide.joint.scale.data  # noqa: B018 -- registers the parameter
        values = make_guide(ZOO["scalars"], "map")(*ZOO["scalars"].args)
    # The median of 15 draws has a standard error of about 1.25 / sqrt(15) = 0.32 sd.
    assert abs(values["loc"]) < 4 * 0.32 * 2
    assert abs(values["scale"].log()) < 4 * 0.5
    torch.testing.assert_close(guide.joint.scale.detach(), torch.full((2,), 0.2, dtype=torch.float64))


def test_guides_start_where_they_are_told() -> None:
    guide = make_guide(ZOO["supports"], "map", init={"simplex": [0.2, 0.3, 0.5], "unit": 0.7})
    with isolated(0), torch.no_grad():
        values = guide(*ZOO["supports"].args)
    torch.testing.assert_close(values["simplex"], torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64))
    assert values["unit"].item() == pytest.approx(0.7)


def far_from_the_prior(y: Tensor) -> None:
    p = pyro.sample("p", dist.Beta(y.new_tensor(1.0), 1.0))
    with pyro.plate("obs", len(y)):
        pyro.sample("y", dist.Uniform(y.new_zeros(()), 0.8 * p), obs=y)


def impossible(y: Tensor) -> None:
    p = pyro.sample("p", dist.Beta(y.new_tensor(1.0), 1.0))
    pyro.factor("never", -torch.inf * p)


def test_a_start_of_finite_density_is_sought() -> None:
    problem = Problem("far", far_from_the_prior, args=(torch.tensor([0.1, 0.6], dtype=torch.float64),))
    with isolated(0):
        assert make_guide(problem, "map")(*problem.args)["p"] > 0.75
    with pytest.raises(ProblemError, match="neither the median of the prior nor 50 points"):
        make_guide(Problem("impossible", impossible, args=(grid(3),)))


def mixture(y: Tensor, enumerate_: str | None = None) -> None:
    loc = pyro.sample("loc", dist.Normal(y.new_zeros(2), 1.0).to_event(1))
    infer: Any = {"enumerate": enumerate_} if enumerate_ else {}
    with pyro.plate("obs", len(y)):
        kind = pyro.sample("kind", dist.Categorical(y.new_ones(2)), infer=infer)
        pyro.sample("y", dist.Normal(loc[kind], 1.0), obs=y)


def test_discrete_sites_are_refused_unless_the_loss_sums_them_out() -> None:
    problem = Problem("mixture", mixture, args=(grid(4),), kwargs={"enumerate_": "parallel"})
    with pytest.raises(ProblemError, match=r"\['kind'\] are discrete; sum them out .* loss 'TraceEnum_ELBO'"):
        make_guide(problem)
    guide = make_guide(Problem("mixture", mixture, args=(grid(4),), kwargs=problem.kwargs, loss="TraceEnum_ELBO"))
    with isolated(0):
        assert set(guide(grid(4))) == {"loc"}


def test_draws_of_summed_out_sites_and_weights_are_exact() -> None:
    """Two distant groups of points, one for each component: k-hat of a good guide is small, labels are certain."""
    y = torch.tensor([-4.0, -4.2, 4.0, 4.1])

    def apart(y: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(y.new_tensor([-4.0, 4.0]), 0.5).to_event(1))
        with pyro.plate("obs", len(y)):
            kind = pyro.sample("kind", dist.Categorical(y.new_ones(2)), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal(loc[kind], 1.0), obs=y)

    problem = with_guide(Problem("apart", apart, args=(y,), loss="TraceEnum_ELBO"), "full_rank")
    result = fit_svi(problem, num_steps=800, lr=0.02, num_samples=400, progress=False)
    np.testing.assert_array_equal(result.posterior["kind"][0], np.tile([0, 0, 1, 1], (400, 1)))
    # log p(y) with the labels certain: two conjugate pairs, and two labels out of two for each point.
    means, points = np.repeat([-4.0, 4.0], 2), y.numpy()
    covariance = np.kron(np.eye(2), np.full((2, 2), 0.25)) + np.eye(4)
    residual = points - means
    evidence = -0.5 * (residual @ np.linalg.solve(covariance, residual) + np.linalg.slogdet(2 * np.pi * covariance)[1])
    weight = result.tree["sample_stats"]["log_weight"].values
    assert abs(weight.mean() - (evidence - 4 * np.log(2))) < 0.05
    assert weight.std() < 0.5


def moving(y: Tensor) -> None:
    top = pyro.sample("top", dist.Gamma(y.new_tensor(3.0), 1.0))
    pyro.sample("x", dist.Uniform(y.new_zeros(()), top))


def round_(y: Tensor) -> None:
    pyro.sample("direction", dist.ProjectedNormal(y.new_tensor([1.0, 0.0, 0.0])))


def sequential(y: Tensor) -> None:
    for i in pyro.plate("step", 3):
        pyro.sample(f"x_{i}", dist.Normal(y.new_zeros(()), 1.0))


def chosen(y: Tensor) -> None:
    with pyro.plate("row", len(y), subsample=torch.tensor([0, 2])) as i:
        z = pyro.sample("z", dist.Normal(y.new_zeros(()), 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y[i])


def ragged(y: Tensor) -> None:
    with pyro.plate("row", len(y)) as i:
        pyro.sample("z", dist.Uniform(y.new_zeros(()), y.exp()[i]))


def empty(y: Tensor) -> None:
    with pyro.plate("obs", len(y)):
        pyro.sample("y", dist.Normal(y.new_zeros(()), 1.0), obs=y)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (moving, "support of site 'x' moves with other sites"),
        (round_, "site 'direction' has support .* no map"),
        (sequential, "sequential plate 'step'"),
        (chosen, "plate 'row' around the latent site 'z' is given its subsample"),
        (ragged, "support of site 'z' differs between the elements of plate 'row'"),
        (empty, "no continuous latent site"),
    ],
)
def test_models_that_a_guide_cannot_follow_are_refused(model: Any, message: str) -> None:
    plates = ("row",) if model is ragged else ()
    with pytest.raises(ProblemError, match=message):
        make_guide(Problem("bad", model, args=(grid(4),), batch_plates=plates))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("meanfield", {}, "no automatic guide is called 'meanfield'; did you mean 'mean_field'"),
        ("low_rank", {"rnk": 2}, "guide 'low_rank' has no option 'rnk'; did you mean 'rank'"),
        ("full_rank", {"rank": 2}, "guide 'full_rank' has no option 'rank'"),
        ("low_rank", {"rank": 0}, "guide 'low_rank': rank=0; give a whole number of at least 1"),
        ("nsf", {"num_flows": 1.5}, "num_flows=1.5; give a whole number of at least 1 and of at most 64"),
        ("mean_field", {"init_scale": -1.0}, "init_scale=-1.0; give a number above 0"),
        ("mean_field", {"init": {"lock": 0.0}}, "init names 'lock', .* did you mean 'loc'"),
        ("mean_field", {"init": {"loc": [0.0, 1.0]}}, r"init\['loc'\] has shape \(2,\) and the site \(\)"),
    ],
)
def test_wrong_names_and_options_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ProblemError, match=message):
        make_guide(ZOO["scalars"], name, **options)
