"""The guide of the Bayesian SVD: measures of its charts, density of its draws, agreement with the exact sampler."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pyro
import pytest
import torch
import xarray as xr
from pyro import poutine
from torch import Tensor

from probmodels.bayesian_svd import make_problem
from probmodels.distributions import UniformFrame
from probmodels.guides.bayesian_svd import BayesianSVDGuide, FrameChart, _InverseRoot
from probmodels.inference.mcmc.run import run_mcmc
from probmodels.inference.problem import Problem
from probmodels.inference.variational.svi import fit_svi

NUM_CELLS, NUM_TIMES = 30, 20


def orthonormal(*shape: int) -> Tensor:
    return torch.linalg.qr(torch.randn(*shape, dtype=torch.float64))[0]


def make_chart(n: int, k: int, *, rotated: bool) -> tuple[FrameChart, Tensor | None]:
    vectors = orthonormal(3, n, n) if rotated else None
    index = torch.randint(0, 3, (k,)) if rotated else torch.zeros(k, dtype=torch.long)
    return FrameChart(orthonormal(n, k), vectors, index), vectors


def log_volume(frame: Tensor, jacobian: Tensor) -> Tensor:
    """Rows of the invariant forms u_j'du_i (j > i) and n_j'du_i for a Jacobian (n, k, coordinates)."""
    k = frame.shape[1]
    normal = torch.linalg.svd(frame)[0][:, k:]
    within = [frame[:, j] @ jacobian[:, i] for i in range(k) for j in range(i + 1, k)]
    out = [row for i in range(k) for row in normal.mT @ jacobian[:, i]]
    return torch.stack(within + out)


@pytest.fixture(autouse=True)
def _seed():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


# ---------------------------------------------------------------------------------------------------------- charts


@pytest.mark.parametrize(("n", "k"), [(3, 1), (4, 2), (6, 3), (3, 3)])
@pytest.mark.parametrize("rotated", [False, True])
def test_chart_gives_frames_with_the_volume_of_its_jacobian(n, k, rotated):
    chart, vectors = make_chart(n, k, rotated=rotated)
    split = k * (n - k)

    def frame(w: Tensor) -> Tensor:
        return chart(w[:split].view(k, n - k), w[split:], vectors)[0]

    w = 0.7 * torch.randn(split + k * (k - 1) // 2, dtype=torch.float64)
    u, log_density = chart(w[:split].view(k, n - k), w[split:], vectors)
    torch.testing.assert_close(u.mT @ u, torch.eye(k, dtype=torch.float64))
    torch.testing.assert_close(frame(torch.zeros_like(w)), chart.start)
    forms = log_volume(u, torch.autograd.functional.jacobian(frame, w))
    torch.testing.assert_close(torch.linalg.slogdet(forms)[1], log_density)


@pytest.mark.parametrize(("n", "k", "limit"), [(3, 1, 1e-10), (3, 2, 0.01), (4, 2, 0.03)])
def test_chart_covers_half_of_the_manifold(n, k, limit):
    # The half of which the projection on the start has a positive determinant: E_q[uniform / q] = 1/2 for any q of full
    # support, here independent Cauchy distributions of the columns of B and of tan(angle / 2); exact for one column.
    chart, vectors = make_chart(n, k, rotated=True)
    num_draws, p, num_pairs = 3000, n - k, k * (k - 1) // 2
    b = torch.randn(num_draws, k, p, dtype=torch.float64)
    b = b / torch.randn(num_draws, k, 1, dtype=torch.float64).abs()
    half_angles = torch.randn(2, num_draws, num_pairs, dtype=torch.float64)
    half_angles = half_angles[0] / half_angles[1]
    log_q = math.lgamma((p + 1) / 2) - (p + 1) / 2 * (math.log(math.pi) + torch.log1p(b.square().sum(-1)))
    log_q = log_q.sum(-1) - (2 * math.pi * (1 + half_angles.square())).log().sum(-1)
    log_p = torch.stack([chart(x, 2 * y, vectors)[1] for x, y in zip(b, half_angles, strict=True)])
    log_p = log_p + UniformFrame(n, k, dtype=torch.float64).log_prob(chart.start)
    weight = (log_p - log_q).exp()
    error = float(weight.std()) / math.sqrt(num_draws)
    assert error < limit
    assert abs(float(weight.mean()) - 0.5) < 4 * error + 1e-10


def test_tangent_is_an_isometry_onto_the_complement():
    chart, vectors = make_chart(7, 3, rotated=True)
    x, y = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 7, 2, dtype=torch.float64)
    tangent = chart.tangent(x, vectors)
    torch.testing.assert_close(chart.start.mT @ tangent, torch.zeros(3, 3, dtype=torch.float64))
    torch.testing.assert_close(torch.linalg.vector_norm(tangent, dim=0), torch.linalg.vector_norm(x, dim=1))
    pulled = torch.einsum("irm,ir->im", chart.coordinates(y, vectors), x)
    torch.testing.assert_close(pulled, torch.einsum("irm,ri->im", y, tangent))


def test_inverse_root_has_a_gradient_at_equal_eigenvalues():
    def symmetric(x: Tensor) -> Tensor:
        return _InverseRoot.apply(0.5 * (x + x.mT))

    for matrix in (torch.eye(3, dtype=torch.float64), torch.diag(torch.tensor([2.0, 2.0, 0.5], dtype=torch.float64))):
        root = symmetric(matrix)
        torch.testing.assert_close(root @ matrix @ root, torch.eye(3, dtype=torch.float64))
        assert torch.autograd.gradcheck(symmetric, (matrix.requires_grad_(),))


# ------------------------------------------------------------------------------------------------------- densities


def small_data(scales: tuple[float, ...] = (10.0, 8.0), *, noise: float = 1.0, gaps: float = 0.0) -> xr.DataArray:
    """Waves on a line in quadrature, waves in time; noise of unit variance; a share of the entries missing."""
    rng = np.random.default_rng(3)
    x, t = np.linspace(0, 1, NUM_CELLS), np.arange(NUM_TIMES)
    u = np.stack([np.sin((3 + i // 2) * np.pi * x + i * np.pi / 2) for i in range(len(scales))], 1)
    v = np.stack([np.cos((i + 2) * np.pi * (t + 0.5) / NUM_TIMES) for i in range(len(scales))], 1)
    u, v = np.linalg.qr(u)[0], np.linalg.qr(v)[0]
    values = (u * scales) @ v.T + noise * rng.standard_normal((NUM_CELLS, NUM_TIMES))
    values[rng.random(values.shape) < gaps] = np.nan
    return xr.DataArray(values, dims=("cell", "time"), coords={"cell": x, "time": t})


def small_problem(data: xr.DataArray | None = None, rank: int = 2, **options) -> Problem:
    if options.get("frame_prior") != "uniform":
        options = {"length_scales_space": [0.1, 0.2, 0.4], "tail": 0.0, **options}
    return make_problem(small_data() if data is None else data, rank=rank, **options)


@pytest.mark.parametrize("structure", ["full", "mean_field"])
def test_log_density_of_a_draw_is_that_of_its_coordinates_pushed_forward(structure):
    data = small_data()[::5, ::2]
    problem = small_problem(data, shared_effects=["trend"], fixed_effects=["intercept"])
    guide = BayesianSVDGuide(rank=1, structure=structure)
    names = ("U", "V", "d", "sigma", "shared_effects")

    def sites(w: Tensor) -> dict[str, Tensor]:
        nodes = poutine.trace(poutine.condition(guide, {"coordinates": w})).get_trace(*problem.args).nodes
        return {name: nodes[name] for name in names}

    with pyro.get_param_store().scope():
        guide(*problem.args)
        w = 0.5 * torch.randn(len(guide.global_loc) + len(guide.local_loc), dtype=torch.float64)
        drawn = sites(w)
        forms = []
        for name in names:
            jacobian = torch.autograd.functional.jacobian(lambda w, name=name: sites(w)[name]["value"], w)
            value = drawn[name]["value"]
            rows = log_volume(value, jacobian) if name in "UV" else jacobian.reshape(-1, len(w))
            forms.append(rows)
        log_q = sum(site["fn"].log_density for site in drawn.values())
    torch.testing.assert_close(-torch.linalg.slogdet(torch.cat(forms))[1], log_q)


@pytest.mark.parametrize("structure", ["full", "mean_field"])
def test_normal_of_the_coordinates_has_the_density_that_it_claims(structure):
    problem = small_problem()
    guide = BayesianSVDGuide(rank=3, structure=structure)
    with pyro.get_param_store().scope(), torch.no_grad():
        guide(*problem.args)
        for parameter in guide.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        size = len(guide.global_loc)
        zeros = torch.zeros(len(guide.local_loc), 3, dtype=torch.float64)
        full = structure == "full"
        root = guide.global_root if full else guide.global_scale.diag()
        cross, factor = (guide.cross, guide.local_factor) if full else (zeros[:, :1].expand(-1, size), zeros)
        covariance = torch.cat([root, cross]) @ torch.cat([root, cross]).mT
        covariance[size:, size:] += factor @ factor.mT + guide.local_scale.square().diag()
        normal = torch.distributions.MultivariateNormal(torch.cat([guide.global_loc, guide.local_loc]), covariance)
        nodes = poutine.trace(guide).get_trace(*problem.args).nodes
        site = nodes["coordinates"]
        torch.testing.assert_close(site["fn"].log_density, normal.log_prob(site["value"]))


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 1},
        {"rank": 3, "kernel_time": "exponential"},
        {"frame_prior": "uniform"},
        {"frame_prior": "macg"},
        {"frame_prior": "projected", "fixed_effects": []},
        {"effect_scale": 3.0},
        {"data": small_data(gaps=0.2), "shared_effects": ["trend"]},
    ],
    ids=lambda options: "-".join(k for k in options),
)
def test_every_kind_of_problem_starts_near_its_optimum(options):
    problem = small_problem(**options).validate()
    result = fit_svi(problem, num_steps=100, lr=0.01, lr_decay=0.1, num_samples=5, progress=False)
    loss = result.tree["fit"]["loss"].values
    start, end = loss[:20].mean(), loss[-20:].mean()
    assert np.isfinite(loss).all()
    assert end < start + 1
    assert start - end < 40  # nats over 100 to 200 dimensions; from the prior it would be thousands


@pytest.mark.parametrize(
    ("options", "message"), [({"rank": -1}, "rank=-1"), ({"structure": "ful"}, "choose one of full, mean_field")]
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        BayesianSVDGuide(**options)


# ------------------------------------------------------------------------------------------------------- agreement


def rotation(posterior: xr.Dataset, problem: Problem) -> np.ndarray:
    """Angle (draw,) by which the first two modes are turned within the span of the reference, in radians."""
    turns = []
    for site, side in (("U", "space"), ("V", "time")):
        cosines = np.einsum("rj,cdrk->cdjk", problem.data[f"reference_{side}"].values, posterior[site].values)
        turns.append(np.arctan2(cosines[..., 1, 0], cosines[..., 0, 0]).ravel())
    return 0.5 * sum(turns)


@pytest.fixture(scope="module")
def degenerate() -> tuple[Problem, xr.Dataset]:
    """Two modes of nearly one size and roughness, five standard deviations apart, and the exact sampler's draws."""
    problem = small_problem(small_data((20.0, 15.0)), length_scales_space=None)
    exact = run_mcmc(problem, num_samples=4000, warmup_steps=500, num_chains=1, seed=1, progress=False)
    return problem, exact.posterior


def fit(problem: Problem, structure: str) -> xr.Dataset:
    problem = dataclasses.replace(problem, guide=BayesianSVDGuide(structure=structure))
    return fit_svi(problem, num_steps=400, lr=0.01, lr_decay=0.05, num_samples=600, progress=False).posterior


@pytest.mark.slow
def test_guide_agrees_with_the_exact_sampler(degenerate):
    problem, exact = degenerate
    fitted = fit(problem, "full")
    # Monte Carlo alone: 4 % of a ratio of standard deviations (600 draws of the guide), 0.05 sd of a mean.
    assert rotation(fitted, problem).std() / rotation(exact, problem).std() == pytest.approx(1, abs=0.12)
    basis = problem.data["basis_space_matrix"]
    exact, fitted = (x.assign(cells=basis.dot(x["U"], dim="basis_space")) for x in (exact, fitted))
    for name in ("cells", "V", "d", "sigma"):
        mean, sd = exact[name].mean(("chain", "draw")), exact[name].std(("chain", "draw"))
        shift = np.abs(fitted[name].mean(("chain", "draw")) - mean) / sd
        ratio = fitted[name].std(("chain", "draw")) / sd
        assert float(shift.max()) < 0.25, name
        assert float(np.abs(ratio - 1).max()) < 0.15, name


@pytest.mark.slow
def test_mean_field_misses_the_rotation(degenerate):
    problem, exact = degenerate
    assert rotation(fit(problem, "mean_field"), problem).std() < 0.4 * rotation(exact, problem).std()
