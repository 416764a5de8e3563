"""Correlated noise of the Bayesian SVD: its density, its conditionals, the sampler, its estimate, and refusals."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
import xarray as xr
from pyro import poutine

from probmodels import run_mcmc
from probmodels.bayesian_svd import make_problem
from probmodels.bayesian_svd.checks import _by_mode, check_model, drift, misfit, noise_in_words
from probmodels.bayesian_svd.correlated import CorrelatedData, Missing
from probmodels.bayesian_svd.draws import read_draws
from probmodels.bayesian_svd.noise import (
    Noise,
    estimate_noise,
    filtered_by,
    unfiltered_by,
    with_noise,
)
from probmodels.bayesian_svd.series_sampler import SeriesGibbs
from probmodels.bayesian_svd.summary import _white, residual_checks, summarise_modes
from probmodels.bayesian_svd.sweep import column_images
from probmodels.datasets.sst import load_sst
from probmodels.distributions.covariance import correlation, euclidean_distance
from probmodels.errors import DataError

from joint_distribution import keeps_the_prior  # isort: skip

CELLS, TIMES = 8, 12


def problem(values: np.ndarray, **options: Any) -> Any:
    places = {"cell": np.linspace(0, 1, len(values)), "time": np.arange(values.shape[1], dtype=float)}
    data = xr.DataArray(values, dims=("cell", "time"), coords=places)
    settings: dict[str, Any] = {"rank": 2, "series": "ar1", "length_scales_space": [0.15, 0.4, 1.0], "tail": 0.0}
    return make_problem(data, **{**settings, **options})


def covariance(cells: int = CELLS, length: float = 0.3) -> np.ndarray:
    """Of noise: a level of each cell, partly correlated with its neighbours."""
    level = np.linspace(0.5, 1.5, cells)
    share = np.linspace(0.5, 0.9, cells)
    shape = correlation(euclidean_distance(np.linspace(0, 1, cells)[:, None]), "matern32", length).numpy()
    unit = shape * np.sqrt(share[:, None] * share) + np.diag(1 - share)
    return unit * level[:, None] * level


def known(values: np.ndarray, decay: float = 0.6, **options: Any) -> Any:
    """A problem whose noise is known."""
    white = problem(np.where(np.isnan(values), np.nan, values), **options)
    data = white.args[0]
    sizes, vectors = np.linalg.eigh(covariance(len(values)))
    noise = Noise(vectors, sizes, decay, "matern32", 0.3, np.ones(len(values)))
    named = data.design.numpy() @ data.design_root.numpy()
    filled = np.where(np.isnan(values), 0.0, values)
    made = with_noise(data, noise, filled, named, scale=options.get("scale"), default_rate="noise_prior" not in options)
    return replace(white, args=(made,))


def ar1(decay: float, times: int = TIMES) -> np.ndarray:
    return np.asarray(decay ** np.abs(np.subtract.outer(np.arange(times), np.arange(times))), dtype=float)


def test_a_filter_makes_the_process_white_and_is_undone() -> None:
    phi = 0.7 ** np.array([1.0, 1.0, 3.0, 1.0])
    times = np.concatenate([[0.0], np.cumsum([1.0, 1.0, 3.0, 1.0])])
    process = 0.7 ** np.abs(times[:, None] - times)
    matrix = filtered_by(np.eye(5), phi).T
    np.testing.assert_allclose(matrix @ process @ matrix.T, np.eye(5), atol=1e-12)
    np.testing.assert_allclose(unfiltered_by(filtered_by(np.eye(5), phi), phi), np.eye(5), atol=1e-12)


def test_the_density_is_that_of_correlated_noise_with_effects_integrated_out() -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((CELLS, TIMES))
    made = known(values, fixed_effects=("intercept", "trend"))
    data = made.args[0]
    dense = np.linalg.inv(np.kron(covariance(), ar1(0.6)))  # rows of the data one after the other
    design = np.kron(np.eye(CELLS), np.stack([np.ones(TIMES), np.arange(TIMES) - 5.5], 1))
    inner = np.linalg.inv(design.T @ dense @ design)
    project = dense - dense @ design @ inner @ design.T @ dense

    def both(seed: int) -> tuple[float, float]:
        torch.manual_seed(seed)
        trace = poutine.trace(made.model).get_trace(*made.args, **made.kwargs)
        trace.compute_log_prob(lambda name, _: name == "Z")
        draw = {name: trace.nodes[name]["value"].numpy() for name in ("U", "F", "d", "sigma")}
        residual = values - (data.space.basis.numpy() @ draw["U"] * draw["d"]) @ draw["F"].T
        free, variance = CELLS * (TIMES - 2), float(draw["sigma"]) ** 2
        direct = -0.5 * (residual.ravel() @ project @ residual.ravel() / variance + free * np.log(variance))
        return float(trace.nodes["Z"]["log_prob"]), float(direct)

    (first, want_first), (second, want_second) = both(1), both(2)
    np.testing.assert_allclose(first - second, want_first - want_second, rtol=1e-8)


def test_fixed_effects_have_the_conditional_of_generalised_least_squares() -> None:
    values = np.random.default_rng(1).standard_normal((CELLS, TIMES))
    made = known(values, fixed_effects=("intercept", "trend"))
    torch.manual_seed(3)
    node = poutine.trace(made.model).get_trace(*made.args, **made.kwargs).nodes
    signal = (made.args[0].space.basis @ node["U"]["value"] * node["d"]["value"]) @ node["F"]["value"].T
    design, precision = made.data["fixed_effects_design"].values, np.linalg.inv(ar1(0.6))
    gram = np.linalg.inv(design.T @ precision @ design)
    effects = node["fixed_effects"]["fn"]
    np.testing.assert_allclose(effects.loc, (values - signal.numpy()) @ precision @ design @ gram, atol=1e-10)
    torch.manual_seed(0)
    draws = effects.sample((20_000,)).numpy().reshape(20_000, -1) / float(node["sigma"]["value"])
    want = np.kron(covariance(), gram)
    np.testing.assert_allclose(np.cov(draws.T), want, atol=5 * np.sqrt(2 / 20_000) * np.diag(want).max())


def test_what_is_missing_has_its_conditional() -> None:
    rng = np.random.default_rng(2)
    mask = rng.random((CELLS, TIMES)) > 0.3
    mask[:, 4], mask[2, 3:9] = True, False  # a complete time, and a gap along time
    phi = 0.6 ** np.r_[np.ones(6), 2.0, np.ones(4)]
    times = np.r_[0.0, np.cumsum(np.log(phi) / np.log(0.6))]
    full = np.kron(covariance(), 0.6 ** np.abs(times[:, None] - times))
    residual, gone = rng.standard_normal((CELLS, TIMES)), ~mask.ravel()
    gain = full[np.ix_(gone, ~gone)] @ np.linalg.inv(full[np.ix_(~gone, ~gone)])
    missing = Missing(mask, np.linalg.inv(covariance()), phi)
    found = missing.draw(None, residual, 0.0)
    np.testing.assert_allclose(found[~mask], gain @ residual[mask], atol=1e-9)
    np.testing.assert_array_equal(found[mask], residual[mask])
    draws = np.array([missing.draw(rng, residual, 0.5)[~mask] for _ in range(4000)])
    want = 0.25 * (full[np.ix_(gone, gone)] - gain @ full[np.ix_(~gone, gone)])
    np.testing.assert_allclose(np.cov(draws.T), want, atol=5 * np.sqrt(2 / 4000) * np.diag(want).max())


@pytest.mark.parametrize("missing", [0.0, pytest.param(0.25, marks=pytest.mark.slow), 0.5])
@pytest.mark.parametrize("series", ["ar1", pytest.param("matern32", marks=pytest.mark.slow)])
def test_parameters_keep_their_prior_where_data_are_drawn_anew(series: str, missing: float) -> None:
    rng = np.random.default_rng(3)
    values = rng.standard_normal((CELLS, TIMES))
    values[rng.random(values.shape) < missing] = np.nan
    values[:, 5] = 1.0
    grid = {} if series == "ar1" else {"length_scales_time": [0.3, 1.0, 3.0, 8.0]}
    made = known(values, scale=1.5, noise_prior=(6.0, 1.8), fixed_effects=("intercept",), series=series, **grid)
    data = made.args[0]
    left, root = data.noise.left.numpy(), data.noise.root.numpy()
    phi, design = data.noise.phi.numpy(), data.design.numpy()

    def renew(seen: Any, draw: dict[str, Any], rng: np.random.Generator) -> None:
        assert isinstance(seen, CorrelatedData)
        white = (left.T @ draw["U"].numpy() * draw["d"].numpy()) @ filtered_by(draw["F"].numpy().T, phi)
        white += float(draw["sigma"]) * rng.standard_normal(white.shape)
        if missing:
            # Effects have a flat prior: those of the last draw stand for any.
            seen.take(root @ unfiltered_by(white, phi))
        else:
            centred = white - (white @ design) @ design.T
            seen._set(np.ascontiguousarray(left @ centred), float((centred**2).sum()))

    # Small gaps and series are drawn in turns, which mixes slowly: longer batches, whose means are independent.
    slow = missing == 0.25
    keeps_the_prior(made, renew, 24_000 if slow else 12_000, batches=20 if slow else 40)


def simulated(
    rng: np.random.Generator, cells: int, times: int, decay: float, length: float = 0.3
) -> tuple[np.ndarray, np.ndarray]:
    """Signal of two modes, and noise, both (cell, time)."""
    x = np.linspace(0, 1, cells)
    patterns = np.stack([np.sin(3 * x), np.cos(5 * x)], 1) * [3.0, 2.0]
    series = unfiltered_by(rng.standard_normal((2, times)), np.full(times - 1, 0.7))
    noise = np.linalg.cholesky(covariance(cells, length)) @ unfiltered_by(
        rng.standard_normal((cells, times)), np.full(times - 1, decay)
    )
    return patterns @ series, 0.5 * noise


def test_the_covariance_of_noise_is_found() -> None:
    rng = np.random.default_rng(4)
    signal, noise = simulated(rng, 30, 500, 0.5, 0.1)
    seen = rng.random(signal.shape) > 0.1
    distance = euclidean_distance(np.linspace(0, 1, 30)[:, None]).numpy()
    values = np.where(seen, signal + noise, 0.0)
    found, _ = estimate_noise(values, seen, np.ones((500, 1)), np.ones(499), distance, 2)
    want = np.sqrt(np.diag(covariance(30, 0.1)))
    ratio = found.level / want
    assert np.abs(ratio / ratio.mean() - 1).max() < 0.35  # the level trebles over the cells; modes take part of it
    assert np.corrcoef(found.level, want)[0, 1] > 0.9
    assert abs(found.decay - 0.5) < 0.08
    near = found.vectors * found.values @ found.vectors.T
    near = near[np.arange(29), np.arange(1, 30)] / found.level[1:] / found.level[:-1]
    truth = covariance(30, 0.1)[np.arange(29), np.arange(1, 30)] / want[1:] / want[:-1]
    assert np.median(np.abs(near - truth)) < 0.1
    assert np.abs(near - truth).max() < 0.3
    white, _ = estimate_noise(
        signal + 0.5 * rng.standard_normal(signal.shape), seen | True, np.ones((500, 1)), np.ones(499), distance, 2
    )
    assert white.decay < 0.06
    assert white.share.mean() < 0.1


def test_noise_that_is_smooth_like_the_modes_keeps_its_size() -> None:
    """Rough noise of e-folding 3 cells under modes of its own size: noise is neither left to modes nor takes them."""
    cells, times, sets = 40, 60, 8
    place = np.arange(cells)
    true = 0.25 * np.exp(-np.abs(place[:, None] - place) / 3)
    patterns = np.linalg.qr(np.stack([np.sin(place / 9), np.cos(place / 5)], 1))[0] * np.array([3.0, 2.0])
    distance, size, along = np.abs(place[:, None] - place) / (cells - 1.0), [], []
    for seed in range(sets):
        rng = np.random.default_rng(seed)
        field = patterns @ rng.standard_normal((2, times)) + np.linalg.cholesky(true) @ rng.standard_normal(
            (cells, times)
        )
        seen, flat = np.ones(field.shape, bool), np.ones((times, 1))
        noise, _ = estimate_noise(field, seen, flat, np.ones(times - 1), distance, 2)
        white = noise.whitener @ (field - field.mean(1, keepdims=True))
        squares = np.linalg.svd(white, compute_uv=False) ** 2
        found = (noise.vectors * noise.values) @ noise.vectors.T * squares[2:].sum() / ((cells - 2) * (times - 3))
        size.append(np.trace(found) / np.trace(true))
        along.append(np.trace(patterns.T @ found @ patterns) / np.trace(patterns.T @ true @ patterns))
    # Standard deviations over sets are .013 and .023; length-scales on a grid add up to .02.
    assert np.mean(size) == pytest.approx(1.0, abs=0.03)
    assert np.mean(along) == pytest.approx(1.0, abs=0.05)


def test_gaps_do_not_draw_the_persistence_of_noise_to_zero() -> None:
    rng = np.random.default_rng(8)
    signal, noise = simulated(rng, 30, 400, 0.8, 0.1)
    distance, ones = euclidean_distance(np.linspace(0, 1, 30)[:, None]).numpy(), np.ones((400, 1))
    for missing, least in ((0.0, 0.75), (0.3, 0.72)):
        seen = rng.random(signal.shape) >= missing
        found, _ = estimate_noise(np.where(seen, signal + noise, 0.0), seen, ones, np.ones(399), distance, 2)
        assert least < found.decay < 0.85


@pytest.mark.parametrize("smooth", [True, False])
def test_eigenvalues_come_from_the_data_where_no_kernel_fits(smooth: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.linspace(0, 1, 40)
    distance = euclidean_distance(x[:, None]).numpy()
    shape = np.exp(-0.5 * (distance / 0.1) ** 2) + 1e-3 * np.eye(40) if smooth else np.exp(-distance / 0.075)
    losses = []
    for complete in (20, 10_000):  # the second keeps the kernel's own eigenvalues
        monkeypatch.setattr("probmodels.bayesian_svd.noise._COMPLETE", complete)
        rng, loss = np.random.default_rng(7), 0.0
        for _ in range(3):
            values = 3 * simulated(rng, 40, 60, 0.0)[0] + np.linalg.cholesky(shape) @ rng.standard_normal((40, 60))
            found, _ = estimate_noise(values, values < np.inf, np.ones((60, 1)), np.ones(59), distance, 2)
            white = found.whitener @ shape @ found.whitener.T
            loss -= 0.5 * np.linalg.slogdet(white * 40 / np.trace(white))[1]  # Kullback-Leibler, up to a scale
        losses.append(loss)
    assert losses[0] < 0.9 * losses[1] if smooth else losses[0] < 1.05 * losses[1]
    assert losses[1] > 30 if smooth else losses[1] < 5


def test_an_ice_edge_leaves_few_complete_times_and_hardly_changes_the_noise() -> None:
    """Smooth noise that no kernel fits: its eigenvalues are found where cells at an edge are missing at most times."""
    x = np.linspace(0, 1, 40)
    distance = euclidean_distance(x[:, None]).numpy()
    shape = np.exp(-0.5 * (distance / 0.1) ** 2) + 1e-3 * np.eye(40)
    losses = np.zeros(2)
    for seed in range(4):
        rng = np.random.default_rng(seed)
        values = 3 * simulated(rng, 40, 60, 0.0)[0] + np.linalg.cholesky(shape) @ rng.standard_normal((40, 60))
        edge = unfiltered_by(rng.standard_normal((1, 60)), np.full(59, 0.5))
        iced = np.arange(40)[:, None] < 35 + 2.5 * edge
        iced[iced.mean(1) < 0.3] = True
        iced[:, :45] &= np.arange(40)[:, None] < 39  # at least one is missing
        for place, seen in enumerate([iced | True, iced]):
            found, _ = estimate_noise(np.where(seen, values, 0.0), seen, np.ones((60, 1)), np.ones(59), distance, 2)
            white = found.whitener @ shape @ found.whitener.T
            losses[place] -= 0.5 * np.linalg.slogdet(white * 40 / np.trace(white))[1]  # Kullback-Leibler, but for scale
        assert iced.all(0).sum() < 20
    assert losses[1] < 1.2 * losses[0]


def test_the_nugget_has_the_covariance_of_the_noise() -> None:
    """A white one is large beside smooth noise: rough patterns would be smooth ones of white error."""
    signal, noise = simulated(np.random.default_rng(4), 20, 60, 0.3)
    values = signal + noise
    made = {nugget: problem(values, noise="correlated", nugget=nugget) for nugget in (None, 0.0, 1e-6)}
    default, none, white = (made[nugget].args[0] for nugget in made)

    def covariances(data: Any) -> torch.Tensor:
        """Candidates between cells, (G, n, n)."""
        space = data.space
        half = space.basis @ space.vectors
        return (half * space.values[:, None]) @ half.mT

    share = covariances(default) - covariances(none)
    expected = 1e-6 * default.noise.root @ default.noise.root.T
    torch.testing.assert_close(share, expected.expand_as(share), rtol=1e-4, atol=1e-11)
    share = covariances(white) - covariances(none)
    torch.testing.assert_close(share, 1e-6 * torch.eye(20, dtype=share.dtype).expand_as(share), rtol=1e-4, atol=1e-11)


def test_length_scales_do_not_depend_on_where_they_start() -> None:
    """Chains that started with the longest one stayed there for thousands of sweeps: the nugget made it likely."""
    made = make_problem(load_sst(), rank=4, fixed_effects=["intercept", "trend"], series="ar1", noise="correlated")
    kernel = SeriesGibbs(made)
    kernel.seed(5)
    kernel.setup(10)
    state, space = kernel._state, kernel.space
    state["g_u"][:] = len(space.length_scales) - 1
    state["images_u"] = column_images(state["u"], space.vectors, state["g_u"])
    state["log_tau_u"][:] = np.log(space.values[state["g_u"]].sum(axis=1))
    for _ in range(200):
        kernel.sample({})
    assert space.length_scales[state["g_u"]].max() < 2000.0


def test_a_run_resumes_and_holds_the_truth() -> None:
    rng = np.random.default_rng(5)
    signal, noise = simulated(rng, 20, 200, 0.5)
    values = signal + noise
    gaps = np.zeros(values.shape, bool)
    gaps[4:9, 50:60] = gaps[10:14, 120:130] = True
    made = problem(np.where(gaps, np.nan, values), noise="correlated")
    first = SeriesGibbs(made)
    first.seed(3)
    first.setup(5)
    for _ in range(20):
        first.sample({})
    state = first.state_dict()
    second = SeriesGibbs(made)
    second.seed(4)
    second.setup(5)
    second.load_state_dict(state)
    for _ in range(3):
        one, two = first.export(first.sample({})), second.export(second.sample({}))
    for name, value in one.items():
        np.testing.assert_array_equal(value, two[name], err_msg=name)
    draws, root = [], np.sqrt(made.data["weight"].values)[:, None]
    for step in range(400):
        first.sample({})
        if step >= 100:
            draws.append((first._data.complete / root)[gaps])  # type: ignore[union-attr]
    low, high = np.quantile(draws, [0.025, 0.975], axis=0)
    held = np.mean((low <= values[gaps]) & (values[gaps] <= high))
    assert held > 0.85  # 90 correlated values


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"series": "frame"}, "needs series that are a process"),
        ({"effect_scale": 1.0}, "leave out effect_scale"),
        ({"shared_effects": ["trend"]}, "leave out shared_effects"),
        ({"noise": "red"}, "choose one of"),
    ],
)
def test_what_correlated_noise_does_not_serve_is_refused(options: dict[str, Any], message: str) -> None:
    values = np.random.default_rng(0).standard_normal((CELLS, TIMES))
    with pytest.raises(DataError, match=message):
        problem(values, **{"noise": "correlated", **options})


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    """Of the same data with correlated noise, under both models of noise."""
    rng = np.random.default_rng(6)
    signal, noise = simulated(rng, 25, 300, 0.5)
    settings: dict[str, Any] = {"num_chains": 2, "warmup_steps": 200, "num_samples": 400, "seed": 1, "progress": False}
    return {
        name: run_mcmc(problem(signal + noise, noise=name), **settings, chain_method="sequential")
        for name in ("white", "correlated")
    }


def test_modes_are_orthonormal_by_area_and_of_the_same_signal(results: dict[str, Any]) -> None:
    tree = results["correlated"].tree
    draws = read_draws(tree)
    posterior, basis = tree["posterior"], tree["constant_data"]["basis_space_matrix"].values
    unit = draws.patterns() * np.sqrt(draws.weight)[None, :, None] / draws.d[:, None, :]
    want = np.broadcast_to(np.eye(2), (draws.num_draws, 2, 2))
    np.testing.assert_allclose(np.einsum("sni,snj->sij", unit, unit), want, atol=1e-6)
    loading, series = (basis @ posterior["U"].values * posterior["d"].values[:, :, None])[0], posterior["F"].values[0]
    signal = loading[5] @ series[5].T
    weighted = np.sqrt(draws.weight)[:, None] * draws.patterns()[5] @ draws.series()[5].T
    np.testing.assert_allclose(weighted, signal, atol=1e-4 * np.abs(signal).max())
    assert (np.diff(draws.d, axis=1) <= 0).all()
    # Each mode keeps its sign from draw to draw.
    mean = draws.patterns().mean(0)
    assert (np.einsum("sni,ni->si", draws.patterns(), mean) > 0).mean() > 0.99


def test_the_verdict_sees_noise_that_is_not_white_and_passes_its_model(results: dict[str, Any]) -> None:
    found = {name: misfit(residual_checks(result.tree)) for name, result in results.items()}
    assert found["white"]["neighbour"] > 0.3
    assert found["white"]["lag"] > 0.3
    assert abs(found["correlated"]["neighbour"]) < 0.2
    assert abs(found["correlated"]["lag"]) < 0.1
    assert found["correlated"]["outside"] < 0.2
    assert [x for x in check_model(results["white"]) if x.harmful]
    assert [x.verdict for x in check_model(results["correlated"]) if x.harmful] == []


def test_findings_say_which_noise_was_assumed_and_what_to_take_instead(results: dict[str, Any]) -> None:
    white = " ".join(x.advice for x in check_model(results["white"]) if x.harmful)
    assert "takes the noise of times for independent" in white
    assert "--noise correlated" in white
    constant = results["correlated"].tree["constant_data"].to_dataset()
    words = noise_in_words(constant)
    assert "independent" not in " ".join(words)
    assert "--noise correlated" not in words.instead
    assert f"AR(1) of {constant.attrs['noise_decay']:.2f}" in words.times
    assert "--ice" in words.instead
    ice = xr.zeros_like(constant["data"], dtype=bool)
    assert "--ice" not in noise_in_words(constant.assign_coords(ice=ice)).instead
    said = [x.verdict for x in check_model(results["correlated"]) if "neighbouring" in x.verdict]
    assert len(said) == 2
    assert all("beyond that of the noise in the model" in verdict for verdict in said)
    frames = constant.assign_attrs(series="ar1")
    for name in ("noise_kernel", "series"):
        del frames.attrs[name]
    assert "--series ar1" in noise_in_words(frames).instead


def test_residuals_beside_gaps_are_white_where_the_model_is_right() -> None:
    rng = np.random.default_rng(3)
    sizes, vectors = np.linalg.eigh(covariance())
    noise = Noise(vectors, sizes, 0.6, "matern32", 0.3, np.ones(CELLS))
    rest = noise.root @ unfiltered_by(rng.standard_normal((CELLS, 600)), np.full(599, 0.6))
    mask = rng.random(rest.shape) > 0.5
    draws = SimpleNamespace(noise=noise, steps=np.ones(599), weight=np.ones(CELLS), sigma=np.ones(9))
    seen = SimpleNamespace(observed=mask, complete=False)
    white = _white(np.where(mask, rest, 0.0), cast("Any", draws), cast("Any", seen), rng)
    near, late = mask[1:] & mask[:-1], mask[:, 1:] & mask[:, :-1]
    assert np.mean(white[mask] ** 2) == pytest.approx(1.0, abs=0.1)
    assert abs(np.corrcoef(white[1:][near], white[:-1][near])[0, 1]) < 0.1
    assert abs(np.corrcoef(white[:, 1:][late], white[:, :-1][late])[0, 1]) < 0.1


def test_a_leading_eof_that_noise_took_is_said(results: dict[str, Any]) -> None:
    tree = results["correlated"].tree.copy()
    lost = np.outer(10 * np.cos(9 * np.linspace(0, 1, 25)), np.random.default_rng(0).standard_normal(300))
    constant = tree["constant_data"].to_dataset()
    tree["constant_data"] = xr.DataTree(
        constant.assign(data=constant["data"] + xr.DataArray(lost, dims=("cell", "time")))
    )
    said = [x.verdict for x in check_model(replace(results["correlated"], tree=tree)) if x.harmful]
    assert any("of the leading EOF" in verdict for verdict in said)
    text = next(verdict for verdict in said if "of the leading EOF" in verdict)
    whole = int(re.match(r"modes hold (\d+)%", text)[1])
    shares = [int(x) for x in re.findall(r"(\d+)%", text.rpartition("variance: ")[2])]
    assert "mode " in text.rpartition("variance: ")[2]
    assert abs(sum(shares) - whole) <= len(shares)


def test_which_mode_holds_how_much_of_the_leading_eof() -> None:
    assert _by_mode(np.array([0.2, 0.55, 0.03, 0.01])) == "mode 2 55%, mode 1 20%, the others 4%"
    assert _by_mode(np.array([0.9, 0.02])) == "mode 1 90%, the other 2%"
    assert _by_mode(np.array([0.03])) == "mode 1 3%"


def test_the_share_of_variance_counts_the_level_of_each_cell(results: dict[str, Any]) -> None:
    modes = summarise_modes(results["correlated"].tree)
    x = np.linspace(0, 1, 25)
    patterns = np.stack([3 * np.sin(3 * x), 2 * np.cos(5 * x)], 1)
    want = np.linalg.eigvalsh(patterns.T @ patterns)[-1]
    want /= np.sum(patterns**2) + 0.25 * np.trace(covariance(25))
    low, high = (float(modes[f"explained_variance_fraction_{end}"][0]) for end in ("lower", "upper"))
    assert low < want < high


@pytest.mark.parametrize("lag", [0.0, 0.6])
def test_a_drift_is_told_from_chance(lag: float) -> None:
    """Residuals of few effective cells: mean squares of eight values that persist, of one level or one that halves."""
    rng = np.random.default_rng(8)
    found = []
    for factor in (1.0, 0.5):
        rows = []
        for _ in range(200):
            values = unfiltered_by(rng.standard_normal((8, 90)), np.full(89, lag))
            rows.append(drift((values**2).mean(0) * np.where(np.arange(90) < 60, 1.0, factor)))
        ratio, error = np.array(rows).T
        found.append(np.mean(np.abs(ratio) > 4 * error))
    assert found[0] < 0.02
    assert found[1] > (0.1 if lag else 0.4)
    assert drift(np.r_[np.full(30, 2.0), np.ones(60)] + 0.1 * rng.random(90))[0] < -0.5


def test_a_drift_of_the_noise_is_said(results: dict[str, Any]) -> None:
    assert not [x for x in check_model(results["correlated"]) if "third" in x.verdict]
    tree = results["correlated"].tree.copy(deep=True)
    data, late = tree["constant_data"]["data"], np.arange(300) >= 200
    data.values = data.values + late * 0.8 * np.random.default_rng(9).standard_normal(data.shape)
    said = [x for x in check_model(replace(results["correlated"], tree=tree)) if "third" in x.verdict]
    assert len(said) == 1
    assert "in a later third of the record as in an earlier one" in said[0].verdict
    assert not said[0].harmful
