"""The Bayesian SVD's model, data preparation and sampler mechanics against dense computations that share no code."""

from __future__ import annotations

import copy
import math

import numpy as np
import pyro
import pytest
import torch
import xarray as xr
from pyro import poutine
from scipy import linalg, special, stats

from probmodels.bayesian_svd import BlockGibbs, make_problem, tiny
from probmodels.bayesian_svd.align import align_draws, invariants
from probmodels.bayesian_svd.augment import ReducedData
from probmodels.bayesian_svd.model import local_effects
from probmodels.errors import DataError, ProblemError
from probmodels.inference.mcmc.run import run_mcmc

GRID = [0.15, 0.3, 0.6]
NUGGET = 1e-4


def matrix(n=9, m=12, missing=0, seed=0, scale=1.0):
    """A random field over irregular points, some entries missing, as make_problem takes it."""
    rng = np.random.default_rng(seed)
    values = scale * (rng.standard_normal((n, m)) + 2.0 * rng.standard_normal((n, 1)))
    values.ravel()[rng.choice(n * m, missing, replace=False)] = np.nan
    x = np.sort(rng.uniform(0, 1, n))
    return xr.DataArray(values, dims=("cell", "time"), coords={"cell": x, "time": np.linspace(0, 1, m) ** 1.1})


def problem(data, **options):
    settings = {
        "rank": 2,
        "kernel_space": "matern72",
        "kernel_time": "matern32",
        "length_scales_space": GRID,
        "length_scales_time": GRID,
        "nugget": NUGGET,
        "tail": 0.0,
        "area_weights": np.linspace(0.5, 1.5, len(data)),
        "scale": 4.0,
        "noise_prior": (3.0, 2.0),
    }
    if options.get("frame_prior") == "uniform":  # has no kernels
        settings = {k: v for k, v in settings.items() if k.split("_")[0] not in ("kernel", "length", "nugget", "tail")}
    return make_problem(data, **{**settings, **options})


# -- brute force ------------------------------------------------------------------------------------------------------


def matern(distance, order, length_scale):
    """Matérn covariance by the formula with a Bessel function, nugget added."""
    x = np.sqrt(2 * order) * np.maximum(distance, 1e-9) / length_scale
    kernel = 2 ** (1 - order) / special.gamma(order) * x**order * special.kv(order, x)
    np.fill_diagonal(kernel, 1.0)
    return kernel + NUGGET * np.eye(len(kernel))


def candidates(points, order, weight=None, complement=None):
    """Covariances (G, r, r), restricted to the complement of some columns, and a basis (n, r) of it."""
    distance = np.abs(points[:, None] - points[None])
    root = np.ones(len(points)) if weight is None else np.sqrt(weight)
    basis = np.eye(len(points)) if complement is None else linalg.null_space(complement.T)
    return [basis.T @ (root[:, None] * matern(distance, order, scale) * root) @ basis for scale in GRID], basis


def log_frame(frame, covariances):
    """The sequential conditioned prior of a frame, each column a mixture over equally likely covariances."""
    r, k = frame.shape
    total = 0.0
    for i in range(k):
        p, before, u = r - i, frame[:, :i], frame[:, i]
        terms = [
            special.gammaln(p / 2)
            - math.log(2)
            - p / 2 * math.log(math.pi)
            - 0.5 * np.linalg.slogdet(c)[1]
            + 0.5 * np.linalg.slogdet(before.T @ c @ before)[1]
            - p / 2 * math.log(u @ np.linalg.solve(c, u))
            for c in covariances
        ]
        total += special.logsumexp(terms) - math.log(len(terms))
    return total


def log_data(values, mean, sigma, design, precision):
    """Sum over rows of weighted data, orthonormal effects integrated out under a flat (precision 0) or normal prior."""
    total = 0.0
    for row, expected in zip(values, mean, strict=True):
        seen = np.isfinite(row)
        residual, t = (row - expected)[seen], design[seen]
        if precision:
            cov = sigma**2 * np.eye(seen.sum()) + t @ t.T / precision
            total += stats.multivariate_normal.logpdf(residual, cov=cov)
        else:
            contrasts = linalg.null_space(t.T) if t.shape[1] else np.eye(seen.sum())
            total += stats.norm.logpdf(contrasts.T @ residual, scale=sigma).sum()
            total -= 0.5 * np.linalg.slogdet(t.T @ t)[1]
    return total


def point(made, seed=1):
    """Parameters from the prior, as tensors by site."""
    torch.manual_seed(seed)
    with torch.no_grad():
        trace = poutine.trace(made.model).get_trace(*made.args, **made.kwargs)
    values = {name: trace.nodes[name]["value"] for name in trace.stochastic_nodes}
    if "shared_effects" in values:
        values["shared_effects"] = torch.tensor([0.7, -0.4], dtype=torch.float64)[: len(values["shared_effects"])]
    return values


def log_model(made, values):
    """Log density of the Pyro program, without its generated sites."""
    hidden = poutine.block(made.model, hide_fn=lambda node: bool(node.get("infer", {}).get("generated")))
    known = {k: v for k, v in values.items() if k in ("U", "V", "d", "sigma", "shared_effects")}
    return float(poutine.trace(pyro.condition(hidden, known)).get_trace(*made.args, **made.kwargs).log_prob_sum())


def dense(made, data, values, *, local, shared=0, precision=0.0, shared_sd=None):
    """Joint log density of data and parameters in the coordinates of the cells."""
    times, weight = data["time"].values, np.linspace(0.5, 1.5, data.sizes["cell"])
    reduced = made.args[0]
    u, v = (reduced.space.basis @ values["U"]).numpy(), (reduced.time.basis @ values["V"]).numpy()
    d, sigma = values["d"].numpy(), float(values["sigma"])
    named = np.stack([np.ones_like(times), times - times.mean()], 1)[:, :local]
    design = np.linalg.qr(named)[0]
    space, _ = candidates(data["cell"].values, 3.5, weight)
    time, basis = candidates(times, 1.5, complement=design if local and not precision else None)
    mean = (u * d) @ v.T
    out = log_frame(u, space) + log_frame(basis.T @ v, time)
    if shared:
        coefficients = values["shared_effects"].numpy()
        mean = mean + np.sqrt(weight)[:, None] * (coefficients[0] * (times - times.mean()))
        out += stats.norm.logpdf(coefficients, scale=shared_sd).sum()
    out += stats.halfnorm.logpdf(d, scale=4.0).sum()
    out += stats.invgamma.logpdf(sigma**2, 3.0, scale=2.0) + math.log(2 * sigma)
    return out + log_data(data.values * np.sqrt(weight)[:, None], mean, sigma, design, precision)


# -- the density ------------------------------------------------------------------------------------------------------

TERMS = ["intercept", "trend"]


@pytest.mark.parametrize("missing", [0, 14])
@pytest.mark.parametrize(
    ("options", "brute"),
    [
        ({"fixed_effects": ()}, {"local": 0}),
        ({"fixed_effects": TERMS}, {"local": 2}),
        ({"fixed_effects": TERMS, "effect_scale": 0.8}, {"local": 2, "precision": 0.8**-2}),
        ({"shared_effects": ["trend"]}, {"local": 1, "shared": 1, "shared_sd": "data"}),
        (
            {"fixed_effects": TERMS, "shared_effects": ["trend"], "effect_scale": 0.8},
            {"local": 2, "shared": 1, "precision": 0.8**-2, "shared_sd": 0.8},
        ),
    ],
    ids=["none", "flat", "proper", "flat and shared", "proper and shared"],
)
def test_density_is_the_dense_one(options, brute, missing):
    data = matrix(missing=missing)
    made = problem(data, **options)
    brute = dict(brute)
    if brute.get("shared_sd") == "data":
        brute["shared_sd"] = float(made.args[0].shared_precision) ** -0.5
    for seed in (1, 2, 3):
        values = point(made, seed)
        assert log_model(made, values) == pytest.approx(dense(made, data, values, **brute), rel=1e-9, abs=1e-7)


@pytest.mark.parametrize("missing", [0, 14])
def test_projected_likelihood_is_dense_up_to_a_constant(missing):
    """A truncated basis leaves a part of the data that no mode can reach: it counts as noise, not as nothing."""
    data = matrix(30, 25, missing)
    made = problem(data, tail=1e-2, length_scales_space=[0.6], length_scales_time=[0.6], nugget=1e-6)
    reduced = made.args[0]
    assert reduced.space.basis.shape[1] < 15
    design = np.full((25, 1), 0.2)
    gaps = []
    for seed in (1, 2, 3):
        values = point(made, seed)
        u, v = (reduced.space.basis @ values["U"]).numpy(), (reduced.time.basis @ values["V"]).numpy()
        mean = (u * values["d"].numpy()) @ v.T
        weighted = data.values * np.sqrt(np.linspace(0.5, 1.5, 30))[:, None]
        with torch.no_grad():
            trace = poutine.trace(pyro.condition(made.model, values)).get_trace(*made.args, **made.kwargs)
        trace.compute_log_prob()
        expected = log_data(weighted, mean, float(values["sigma"]), design, 0.0)
        gaps.append(float(trace.nodes["Z"]["log_prob_sum"]) - expected)
    assert np.ptp(gaps) == pytest.approx(0.0, abs=1e-8)


@pytest.mark.parametrize("missing", [0, 14])
@pytest.mark.parametrize("effect_scale", [None, 0.8])
def test_local_effects_are_regression_of_what_the_modes_leave(effect_scale, missing):
    data = matrix(missing=missing)
    made = problem(
        data,
        fixed_effects=["intercept", "ramp"],
        shared_effects=["wave"],
        covariates={"ramp": data["time"].values, "wave": np.cos(np.arange(12.0))},
        effect_scale=effect_scale,
    )
    values, reduced = point(made), made.args[0]
    found = local_effects(reduced, *(values[s] for s in ("U", "d", "V", "sigma", "shared_effects")))
    times, weight, sigma = data["time"].values, np.linspace(0.5, 1.5, 9), float(values["sigma"])
    named = np.stack([np.ones(12), times], 1)  # an oblique design, of which the triangular factor matters
    root = np.linalg.qr(named)[1]
    signal = ((reduced.space.basis @ values["U"] * values["d"]) @ (reduced.time.basis @ values["V"]).T).numpy()
    shared = float(values["shared_effects"][0]) * np.cos(np.arange(12.0))
    for cell in range(9):
        seen = np.isfinite(data.values[cell])
        t = named[seen]
        residual = (data.values[cell] - shared - signal[cell] / np.sqrt(weight[cell]))[seen]
        prior = 0.0 if effect_scale is None else weight[cell] * root.T @ root / effect_scale**2
        covariance = np.linalg.inv(weight[cell] / sigma**2 * t.T @ t + prior)
        expected = covariance @ t.T @ residual * weight[cell] / sigma**2
        np.testing.assert_allclose(found.loc[cell].numpy(), expected, rtol=1e-8, atol=1e-10)
        np.testing.assert_allclose(found.covariance_matrix[cell].numpy(), covariance, rtol=1e-8, atol=1e-12)


# -- what the sampler draws beside the modes --------------------------------------------------------------------------

AUGMENTED = {
    "flat": {"fixed_effects": TERMS},
    "none": {"fixed_effects": ()},
    "proper": {"fixed_effects": TERMS, "effect_scale": 0.8},
    "flat and shared": {"fixed_effects": ["intercept"], "shared_effects": ["trend"]},
    "proper and shared": {"fixed_effects": TERMS, "shared_effects": ["trend"], "effect_scale": 0.8},
}


@pytest.mark.parametrize("options", AUGMENTED.values(), ids=AUGMENTED)
def test_reduced_data_follow_the_completed_matrix(options):
    data = matrix(missing=14)
    made = problem(data, **options)
    values, reduced = point(made), made.args[0]
    state = ReducedData(reduced)
    frames = values["U"].numpy().T.copy(), values["d"].numpy(), values["V"].numpy().T.copy()
    state.draw(np.random.default_rng(0), *frames, float(values["sigma"]) ** 2)
    flat = "effect_scale" not in options
    space, time, design = reduced.space.basis.numpy(), reduced.time.basis.numpy(), reduced.design.numpy()
    along = state._along if flat else state._along @ (design.T @ time @ time.T @ design) * 0.0
    completed = space @ state._z_data @ time.T + along @ design.T
    weighted = data.values * np.sqrt(np.linspace(0.5, 1.5, 9))[:, None]
    seen = np.isfinite(weighted)
    np.testing.assert_allclose(completed[seen], weighted[seen], atol=1e-9)
    np.testing.assert_allclose(completed @ design, state._along, atol=1e-9)
    left = completed.copy()
    times = data["time"].values
    column = np.sqrt(np.linspace(0.5, 1.5, 9))[:, None] * (times - times.mean())
    if len(state.shared):
        left -= state.shared[0] * column
    left = left - left @ design @ design.T if flat else left - state.effects @ design.T
    assert state.total == pytest.approx((left**2).sum(), rel=1e-10)
    np.testing.assert_allclose(state.z, space.T @ left @ time, atol=1e-9)
    np.testing.assert_array_equal(state.z_transposed, state.z.T)
    assert state.count == completed.size - (9 * design.shape[1] if flat else 0)


@pytest.mark.parametrize(
    ("local", "effect_scale", "missing"),
    [
        (["intercept"], None, 0),
        (["intercept"], None, 15),
        (["intercept", "ramp"], 0.8, 0),
        (["intercept", "ramp"], 0.8, 15),
    ],
    ids=["flat", "flat, gaps", "proper", "proper, gaps"],
)
def test_effects_have_their_exact_posterior(local, effect_scale, missing):
    """Given the modes everything is Gaussian: means and variances of all coefficients within 4.5 standard errors."""
    data = matrix(4, 12, missing, scale=0.7)
    times = data["time"].values
    made = problem(
        data,
        rank=1,
        fixed_effects=local,
        shared_effects=["trend"],
        effect_scale=effect_scale,
        covariates={"ramp": times} if "ramp" in local else None,
    )
    values, reduced = point(made), made.args[0]
    weight, sigma, q = np.linspace(0.5, 1.5, 4), 0.9, len(local)
    signal = ((reduced.space.basis @ values["U"] * values["d"]) @ (reduced.time.basis @ values["V"]).T).numpy()
    named = np.stack([np.ones(12), times], 1)[:, :q]
    root = np.linalg.qr(named)[1]
    design = np.zeros((4, 12, 4 * q + 1))
    prior = np.zeros((4 * q + 1, 4 * q + 1))
    prior[-1, -1] = float(reduced.shared_precision)
    for cell in range(4):
        block = slice(cell * q, (cell + 1) * q)
        design[cell, :, block] = np.sqrt(weight[cell]) * named
        design[cell, :, -1] = np.sqrt(weight[cell]) * (times - times.mean())
        prior[block, block] = weight[cell] * root.T @ root * float(reduced.effect_precision)
    seen = np.isfinite(data.values)
    residual = (data.values * np.sqrt(weight)[:, None] - signal)[seen]
    covariance = np.linalg.inv(design[seen].T @ design[seen] / sigma**2 + prior)
    mean = covariance @ design[seen].T @ residual / sigma**2

    state, rng = ReducedData(reduced), np.random.default_rng(3)
    frames = values["U"].numpy().T.copy(), values["d"].numpy(), values["V"].numpy().T.copy()
    draws = []
    for _ in range(3200):
        state.draw(rng, *frames, sigma**2)
        draws.append(np.append(state.local_effects(rng, *frames, sigma**2).ravel(), state.shared))
    found = (np.array(draws[200:]) - mean) / np.sqrt(np.diag(covariance))
    for moment, expected in ((found, 0.0), (found**2, 1.0)):
        batches = moment.reshape(50, -1, moment.shape[1]).mean(1)
        error = batches.std(0, ddof=1) / np.sqrt(50)
        assert np.abs((batches.mean(0) - expected) / error).max() < 4.5


# -- kernel -----------------------------------------------------------------------------------------------------------


def chain(kernel, sweeps):
    params = kernel.initial_params
    for _ in range(sweeps):
        params = kernel.sample(params)
    return kernel.export(params)


@pytest.mark.parametrize("missing", [0, 14])
def test_kernel_continues_to_identical_draws(missing):
    made = problem(matrix(missing=missing), **AUGMENTED["proper and shared"])
    first, second = BlockGibbs(made), BlockGibbs(made)
    first.seed(3)
    first.setup(5)
    chain(first, 7)
    state = copy.deepcopy(first.state_dict())
    expected = chain(first, 6)
    second.seed(99)
    second.setup(5)
    second.load_state_dict(state)
    found = chain(second, 6)
    assert sorted(found) == sorted(expected)
    for name in found:
        assert torch.equal(found[name], expected[name]), name
    assert first.diagnostics() == second.diagnostics()


def test_seeds_decide_draws():
    made = tiny()
    ends = []
    for seed in (1, 1, 2):
        kernel = BlockGibbs(made)
        kernel.seed(seed)
        kernel.setup(3)
        ends.append(chain(kernel, 3))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert not torch.equal(ends[0]["d"], ends[2]["d"])


def test_keeping_draws_does_not_change_the_chain():
    made = problem(matrix(), fixed_effects=TERMS)
    ends = []
    for keep in (False, True):
        kernel = BlockGibbs(made)
        kernel.seed(1)
        kernel.setup(1)
        params = kernel.initial_params
        for _ in range(5):
            params = kernel.sample(params)
            if keep:
                kernel.export(params)
        ends.append(params)
    assert torch.equal(ends[0]["U"], ends[1]["U"])


@pytest.mark.parametrize("prior", ["conditioned", "uniform"])
def test_draws_stay_on_the_manifold_and_follow_the_grid(prior):
    made = problem(matrix(missing=5), frame_prior=prior)
    result = run_mcmc(made, num_chains=1, num_samples=300, warmup_steps=20, chain_method="sequential", progress=False)
    draws = result.posterior
    for site in ("U", "V"):
        frame = draws[site].transpose("chain", "draw", ..., "mode").values
        gram = np.einsum("cdrk,cdrl->cdkl", frame, frame)
        np.testing.assert_allclose(gram, np.broadcast_to(np.eye(2), gram.shape), atol=1e-12)
    assert (draws["d"] > 0).all()
    assert (draws["sigma"] > 0).all()
    if prior == "conditioned":
        assert set(np.unique(draws["length_scale_space"])) <= set(GRID)


def test_kernel_refuses_what_it_cannot_sample():
    made = problem(matrix(), frame_prior="projected")
    assert made.kernel is None
    with pytest.raises(ProblemError, match="no sampler for the frame prior 'projected'"):
        BlockGibbs(made)


@pytest.mark.parametrize("rank", [1, 4])
def test_any_rank_runs(rank):
    made = problem(matrix(missing=6), rank=rank)
    kernel = BlockGibbs(made)
    kernel.seed(0)
    kernel.setup(0)
    assert all(torch.isfinite(value).all() for value in chain(kernel, 20).values())


# -- labels, signs, invariants ----------------------------------------------------------------------------------------


def drawn(num=6, seed=0):
    """Constructed draws: two frames, two scales, shuffled labels and signs of one truth."""
    rng = np.random.default_rng(seed)
    u, v = (np.linalg.qr(rng.standard_normal((size, 3)))[0] for size in (7, 8))
    d = np.array([5.0, 3.0, 1.0])
    order = np.stack([rng.permutation(3) for _ in range(num)])
    sign = rng.choice([-1.0, 1.0], (num, 1, 3))
    posterior = xr.Dataset(
        {
            "U": (("chain", "draw", "basis_space", "mode"), (np.stack([u[:, o] for o in order]) * sign)[None]),
            "V": (("chain", "draw", "basis_time", "mode"), (np.stack([v[:, o] for o in order]) * sign)[None]),
            "d": (("chain", "draw", "mode"), d[order][None]),
            "length_scale_space": (("chain", "draw", "mode"), (10 * d)[order][None]),
            "sigma": (("chain", "draw"), np.ones((1, num))),
        },
        coords={"mode": [1, 2, 3]},
    )
    return posterior, u, v, d


@pytest.mark.parametrize("order", ["scale", "match"])
def test_alignment_undoes_labels_and_signs(order):
    posterior, u, v, d = drawn()
    reference = (u, v) if order == "scale" else (u[:, [2, 0, 1]], v[:, [2, 0, 1]])
    found = align_draws(posterior, reference_space=reference[0], reference_time=reference[1], order=order)
    expected = d if order == "scale" else d[[2, 0, 1]]
    assert (found["d"].values == expected).all()
    assert (found["length_scale_space"].values == 10 * expected).all()
    for name, frame in (("U", reference[0]), ("V", reference[1])):
        np.testing.assert_allclose(found[name].values, np.broadcast_to(frame, found[name].shape))
    assert list(found["mode"].values) == [1, 2, 3]
    xr.testing.assert_identical(found["sigma"], posterior["sigma"])


def test_a_draw_and_its_mirror_image_align_alike():
    """Check also draws whose pattern and series would get different signs from the reference."""
    posterior, u, v, _ = drawn(num=8)
    reference = {"reference_space": u, "reference_time": -0.5 * v}
    mirrored = posterior.assign(U=-posterior["U"], V=-posterior["V"])
    xr.testing.assert_allclose(align_draws(posterior, **reference), align_draws(mirrored, **reference))


def test_invariants_ignore_labels_and_signs():
    posterior, u, v, d = drawn()
    basis = {"basis_space": np.linalg.qr(np.random.default_rng(1).standard_normal((20, 7)))[0], "basis_time": np.eye(8)}
    found = invariants(posterior, **basis, reference_space=u[:, :2], num_points=9)
    for name, values in found.data_vars.items():
        np.testing.assert_allclose(values, np.broadcast_to(values[:, :1], values.shape), atol=1e-7, err_msg=str(name))
    np.testing.assert_allclose(found["principal_angle"], 0.0, atol=1e-7)
    np.testing.assert_allclose(found["signal_norm"], np.linalg.norm(d))
    projector, signal = basis["basis_space"] @ u @ u.T @ basis["basis_space"].T, basis["basis_space"] @ (u * d) @ v.T
    assert np.isin(np.round(found["projector_space"].values[0, 0], 9), np.round(projector, 9)).all()
    assert np.isin(np.round(found["signal"].values[0, 0], 9), np.round(signal, 9)).all()


# -- preparation ------------------------------------------------------------------------------------------------------


def spoiled(change):
    data = matrix(9, 12)
    change(data.values)
    return data


def put(place, value):
    def change(values):
        values[place] = value

    return change


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (matrix()[0], {}, "has dims"),
        (spoiled(put((2, 3), np.inf)), {}, "1 infinite"),
        (spoiled(put(slice(None), np.nan)), {}, "no finite entry"),
        (matrix(9, 9), {}, "9 times; at least 10"),
        (spoiled(put((slice(None), 4), np.nan)), {}, "1 times hold no value at all, the first at index 4"),
        (spoiled(put(5, 3.0)), {}, "1 cells are constant in time, the first at index 5"),
        (spoiled(put((4, slice(1, None)), np.nan)), {}, "constant in time, the first at index 4"),
        (spoiled(put((4, slice(3, None)), np.nan)), {"fixed_effects": TERMS}, "cell 4 holds 3 values, too few"),
        (matrix(), {"rank": 0}, "rank=0; give a whole number of at least 1"),
        (matrix(), {"rank": 9}, "allow 1 to 8"),
        (matrix(20, 12), {"rank": 10, "fixed_effects": TERMS}, "allow 1 to 9"),
        (matrix(), {"kernel_space": "matern7"}, "kernel_space='matern7'; .*did you mean 'matern72'"),
        (matrix(), {"kernel_time": ["matern12"]}, "lists 1 kernels for 2 modes"),
        (matrix(), {"fixed_effects": ["trends"]}, "did you mean 'trend'"),
        (matrix(), {"fixed_effects": "trend"}, "fixed_effects='trend'; give a list"),
        (matrix(), {"fixed_effects": ["annual"]}, "needs dates"),
        (matrix(), {"fixed_effects": ["trend", "trend"]}, "twice"),
        (matrix(), {"fixed_effects": ["x"], "covariates": {"x": [1.0, 2.0]}}, "must hold 12 finite values"),
        (matrix(), {"fixed_effects": TERMS, "shared_effects": ["trend"]}, "local and shared at once"),
        (matrix(), {"effect_scale": -1.0}, "effect_scale=-1.0; give a number of at least 1e-12"),
        (matrix(), {"frame_prior": "normal"}, "frame_prior='normal'; choose one of conditioned"),
        (matrix(), {"order": "size"}, "order='size'; choose one of scale, match, label"),
        (matrix(), {"area_weights": [1.0, 2.0]}, "area_weights has 2 numbers; give 9"),
        (matrix(), {"noise_prior": (0.0, 1.0)}, r"noise_prior=\(0.0, 1.0\); give a list of 2"),
        (matrix(), {"kernel_space": "periodic"}, "kernel_space='periodic'; choose one of"),
        (matrix(), {"kernel_time": "periodic"}, "needs a period"),
        (
            matrix(),
            {"kernel_time": "periodic", "period": 2e6, "length_scales_time": [0.25, 1.0, 4.0], "tail": 1e-6},
            "constant over these points|keeps 1 directions",  # which of them is a matter of rounding
        ),
        (matrix(), {"period": 1.0}, "period=1.0 is not used with kernels that are not 'periodic'"),
        (matrix(), {"kernel_time": "identity"}, r"length_scales_time=.* is not used with kernel_time='identity'"),
        (matrix(), {"num_length_scales": 9}, "num_length_scales=9 is not used with the length-scales given"),
        (matrix(), {"frame_prior": "uniform", "kernel_space": "matern12"}, "is not used with frame_prior='uniform'"),
        (matrix(), {"effect_scale": 1.0, "fixed_effects": []}, "effect_scale=1.0 is not used with no effects"),
        (matrix(), {"effect_scale": 1.0, "tail": 0.1}, "tail=0.1 is not used with a proper prior of the effects"),
        (matrix(), {"covariates": {"x": np.zeros(12)}}, r"covariates\['x'\] is in neither"),
        (matrix(), {"fixed_effects": ["x"], "covariates": {"x": "words"}}, "covariate 'x' is no series of numbers"),
        (
            matrix(),
            {"length_scales_space": [2.0, 3.0], "length_prior_space": torch.distributions.Beta(2.0, 2.0)},
            "length_prior_space has no density",
        ),
        (matrix(), {"length_prior_space": torch.distributions.Gamma(torch.ones(3), 1.0)}, "is a batch"),
        (matrix().to_dataset(name="x"), {}, r"data hold \['x'\]"),
        (matrix(), {"frame_prior": "macg", "kernel_space": ["matern12", "matern32"]}, "one kernel for all modes"),
        (
            matrix(30, 25),
            {"rank": 20, "tail": 0.2, "length_scales_space": [5.0], "length_scales_time": [5.0]},
            "fewer than the 20 modes",
        ),
        (
            spoiled(put((4, slice(0, 6)), np.nan)),
            {"fixed_effects": ["intercept", "step"], "covariates": {"step": [1.0] * 6 + [0.0] * 6}},
            "cell 4 .* cannot tell",
        ),
    ],
)
def test_bad_input_says_what_is_wrong(data, options, message):
    with pytest.raises(DataError, match=message):
        problem(data, **({"area_weights": False} | options))


def test_land_is_left_out_and_said():
    made = problem(spoiled(put((slice(3, 5), slice(None)), np.nan)), area_weights=False)
    assert made.data.sizes["cell"] == 7
    assert "2 of 9 cells never hold a value" in made.data.attrs["mends"]


def test_start_of_gaps_is_filled_by_effects():
    """The start must not treat the zeros that fill gaps as data."""
    full = matrix(scale=0.1) + 50.0
    gappy = full.where(np.random.default_rng(0).random(full.shape) > 0.2)
    sizes = []
    for data in (full, gappy):
        kernel = BlockGibbs(problem(data))
        kernel.seed(0)
        kernel.setup(0)
        sizes.append(float(kernel.initial_params["d"].max()))
    assert sizes[1] < 2 * sizes[0]


def test_weights_of_latitude_are_scaled_to_mean_one():
    lat = np.linspace(-60, 60, 9)
    data = matrix().assign_coords(lat=("cell", lat), lon=("cell", np.linspace(150, 200, 9)))
    made = problem(data, area_weights=True, length_scales_space=[1000.0, 3000.0])
    weight = np.cos(np.deg2rad(lat))
    np.testing.assert_allclose(made.data["weight"], weight / weight.mean())


def test_length_priors_weight_the_grid_by_the_width_of_its_cells():
    prior = torch.distributions.LogNormal(0.0, 1.0)
    grid = np.geomspace(0.1, 10.0, 200)
    made = problem(matrix(), length_scales_space=grid, length_prior_space=prior)
    mass = made.args[0].space.log_weights[0].exp().numpy()
    below = prior.cdf(torch.tensor(1.7, dtype=torch.float64)) - prior.cdf(torch.tensor(0.1, dtype=torch.float64))
    total = prior.cdf(torch.tensor(10.0)) - prior.cdf(torch.tensor(0.1))
    assert mass[grid < 1.7].sum() == pytest.approx(float(below / total), abs=0.02)
