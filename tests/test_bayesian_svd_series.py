"""Bayesian SVD whose series are a process in time: density, exactness of the block sampler, options."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from pyro import poutine
from scipy import stats

from probmodels import run_mcmc
from probmodels.bayesian_svd import make_problem, write_outputs
from probmodels.bayesian_svd.draws import read_draws
from probmodels.bayesian_svd.series_sampler import SeriesGibbs
from probmodels.bayesian_svd.summary import _add_persistence, summarise_modes
from probmodels.errors import DataError, SummaryError

from joint_distribution import functions, keeps_the_prior  # isort: skip

SCALES = [0.15, 0.4, 1.0]


def problem(values: np.ndarray, times: np.ndarray | None = None, **options: Any) -> Any:
    cells, size = values.shape
    coords = {"cell": np.linspace(0, 1, cells), "time": np.arange(size, dtype=float) if times is None else times}
    data = xr.DataArray(values, dims=("cell", "time"), coords=coords)
    settings = {"rank": 2, "area_weights": False, "series": "ar1"}
    if options.get("frame_prior") != "uniform":
        settings |= {"length_scales_space": SCALES, "nugget": 1e-3, "tail": 0.0}
    return make_problem(data, **{**settings, **options})


def noise(cells: int = 8, times: int = 12, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((cells, times))


# -- density of the model ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("effect_scale", [None, 2.0])
def test_the_likelihood_is_that_of_the_data_with_effects_integrated_out(gaps: bool, effect_scale: float | None) -> None:
    values = noise(6, 11) + 3.0
    if gaps:
        values[1, 4] = values[3, 7:9] = np.nan
    found = problem(values, fixed_effects=("intercept", "trend"), effect_scale=effect_scale)
    data = found.args[0]
    torch.manual_seed(1)
    trace = poutine.trace(found.model).get_trace(*found.args, **found.kwargs)
    trace.compute_log_prob()
    nodes = trace.nodes
    u, f, d, sigma = (nodes[name]["value"].numpy() for name in ("U", "F", "d", "sigma"))
    mean = (data.space.basis.numpy() @ u * d) @ f.T
    design, seen = data.design.numpy(), np.isfinite(values)
    want = 0.0
    for row in range(6):
        at = seen[row]
        rest, columns = values[row, at] - mean[row, at], design[at]
        if effect_scale is None:  # flat: the density of what is left, up to a constant of the design
            q = np.linalg.qr(columns, mode="complete")[0][:, columns.shape[1] :]
            want += stats.norm(0, sigma).logpdf(q.T @ rest).sum() - 0.5 * np.linalg.slogdet(columns.T @ columns)[1]
        else:
            cov = sigma**2 * np.eye(at.sum()) + effect_scale**2 * columns @ columns.T
            want += stats.multivariate_normal(cov=cov).logpdf(rest)
    assert float(nodes["Z"]["log_prob"]) == pytest.approx(want, rel=1e-9)


# -- the sampler ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("series", "prior", "shrinkage"),
    [
        ("ar1", "conditioned", "none"),
        ("ar1", "conditioned", "log_uniform"),
        ("matern52", "conditioned", "none"),
        pytest.param("ar1", "uniform", "none", marks=pytest.mark.slow),
        pytest.param("matern32", "conditioned", "log_uniform", marks=pytest.mark.slow),
    ],
)
def test_parameters_keep_their_prior_where_data_are_drawn_anew(series: str, prior: str, shrinkage: str) -> None:
    effects = ("intercept", "trend")
    settings: dict[str, Any] = {"rank": 3, "scale": 1.5, "noise_prior": (6.0, 1.8), "fixed_effects": effects}
    if series != "ar1":
        settings["length_scales_time"] = [0.3, 1.0, 2.0, 4.0, 8.0]
    made = problem(noise(8, 10), **settings, frame_prior=prior, series=series, shrinkage=shrinkage)
    basis, design = made.args[0].space.basis.numpy(), made.args[0].design.numpy()

    def renew(seen: Any, draw: dict[str, Any], rng: np.random.Generator) -> None:
        fresh = (basis @ draw["U"].numpy() * draw["d"].numpy()) @ draw["F"].numpy().T
        fresh += float(draw["sigma"]) * rng.standard_normal(fresh.shape)
        fresh -= (fresh @ design) @ design.T
        seen.z = np.ascontiguousarray(basis.T @ fresh)
        seen.z_transposed, seen.total = np.ascontiguousarray(seen.z.T), float((fresh**2).sum())

    keeps_the_prior(made, renew, 16_000 if series == "ar1" else 8_000)


EFFECTS: dict[str, tuple[dict[str, Any], float]] = {
    "complete, flat": ({"fixed_effects": ("intercept", "trend")}, 0.0),
    "gaps, flat": ({"fixed_effects": ("intercept",)}, 0.2),
    "proper": ({"fixed_effects": ("intercept", "trend"), "effect_scale": 1.0}, 0.0),
    "gaps, shared, proper": (
        {"fixed_effects": ("intercept",), "shared_effects": ("trend",), "effect_scale": 1.0},
        0.2,
    ),
    "modes that may vanish": ({"fixed_effects": ("intercept",), "rank": 4, "shrinkage": "log_uniform"}, 0.0),
}
NUM_DRAWS, BURN, THIN = 31, 150, 8


def ranks(options: dict[str, Any], missing: float, sets: int, **wrong: Any) -> np.ndarray:
    """Ranks of truths from the prior among posterior draws, sets of data by functions."""
    settings = {"scale": 2.0, "noise_prior": (5.0, 0.75), **options}
    template = problem(noise(), **settings)
    data = template.args[0]
    basis, rows = data.space.basis.numpy(), []
    for index in range(sets):
        rng = np.random.default_rng([7, index])
        torch.manual_seed(int(rng.integers(2**31)))
        nodes = poutine.trace(template.model).get_trace(*template.args, **template.kwargs).nodes
        truth = {name: node["value"] for name, node in nodes.items() if "value" in node}
        values = ((basis @ truth["U"].numpy()) * truth["d"].numpy()) @ truth["F"].numpy().T
        size = data.design.shape[1]
        proper = "effect_scale" in options
        own = rng.standard_normal((8, size)) * (1.0 if proper else 3.0)  # a flat prior has no draws: any will do
        values += own @ data.design.numpy().T
        truth["fixed_effects"] = torch.as_tensor(own @ np.linalg.inv(data.design_root.numpy()).T)
        if "shared_effects" in truth:
            values += (np.arange(12.0) - 5.5) * float(truth["shared_effects"])
        values += float(truth["sigma"]) * rng.standard_normal(values.shape)
        gaps = rng.random(values.shape) < missing
        gaps[:, ::3] = False
        values[gaps] = np.nan
        made = problem(values, **{**settings, **wrong})
        kernel = SeriesGibbs(made)
        kernel.seed(index)
        kernel.setup(BURN)
        draw, kept = kernel.initial_params, []
        for step in range(BURN + THIN * NUM_DRAWS):
            draw = kernel.sample(draw)
            if step >= BURN and (step - BURN) % THIN == 0:
                kept.append(functions(kernel.export(draw), basis))
        want, draws = functions(truth, basis), np.array(kept)
        if not proper:  # fixed effects of a flat prior are no draws of it
            want, draws = (np.delete(x, np.s_[-2 * size :], axis=-1) for x in (want, draws))
        below, equal = (draws < want).sum(0), (draws == want).sum(0)
        rows.append(below + rng.integers(0, equal + 1))
    return np.array(rows)


def least_pvalue(found: np.ndarray) -> float:
    rng = np.random.default_rng(0)
    out = []
    for rank in found.T:
        out.append(stats.kstest((rank + rng.random(len(rank))) / (NUM_DRAWS + 1), "uniform").pvalue)
        out.append(stats.chisquare(np.histogram(rank, bins=np.arange(0, NUM_DRAWS + 2, 4))[0]).pvalue)
    return min(1.0, min(out) * len(out))


@pytest.mark.parametrize(
    ("options", "missing"),
    [
        pytest.param(*values, id=name, marks=() if name == "gaps, flat" else pytest.mark.slow)
        for name, values in EFFECTS.items()
    ],
)
def test_ranks_are_uniform(options: dict[str, Any], missing: float) -> None:
    assert least_pvalue(ranks(options, missing, 60)) > 1e-3


def test_white_series_in_place_of_persistent_ones_are_found_out() -> None:
    """A control: ranks of a model whose series are white, for data whose series are not."""
    assert least_pvalue(ranks({"fixed_effects": ("intercept", "trend")}, 0.0, 60, series="iid")) < 1e-3


def test_a_run_gives_labelled_draws_that_resume(tmp_path: Any) -> None:
    rng = np.random.default_rng(0)
    values = np.outer(np.sin(np.linspace(0, 3, 8)), rng.standard_normal(30)) + 0.2 * rng.standard_normal((8, 30))
    made = problem(values, rank=1)
    settings: dict[str, Any] = {"num_chains": 2, "warmup_steps": 30, "num_samples": 40, "seed": 1, "progress": False}
    whole = run_mcmc(made, **settings, chain_method="sequential")
    draws = whole.posterior
    assert draws["F"].dims == ("chain", "draw", "time", "mode")
    assert draws["autocorrelation"].dims == ("chain", "draw", "mode")
    white = SeriesGibbs(problem(values, rank=1, series="iid"))
    white.setup(0)
    assert float(white.sample({})["autocorrelation"]) == 0.0
    assert "V" not in draws
    first = SeriesGibbs(made)
    first.seed(3)
    first.setup(5)
    for _ in range(5):
        first.sample({})
    again = SeriesGibbs(made)
    again.seed(9)
    again.setup(5)
    again.load_state_dict(first.state_dict())
    for name, value in first.sample({}).items():
        assert torch.equal(value, again.sample({})[name] if name == "U" else value)


def test_what_a_process_does_not_use_is_refused() -> None:
    with pytest.raises(DataError, match=r"kernel_time"):
        problem(noise(), kernel_time="matern32")
    with pytest.raises(DataError, match="times that increase"):
        problem(noise(8, 12), times=np.array([0.0, 1, 2, 2, 4, 5, 6, 7, 8, 9, 10, 11]))


def test_steps_of_months_count_as_one_and_gaps_as_long_as_they_are() -> None:
    dates = np.concatenate(
        [np.arange(f"{year}-11", f"{year + 1}-04", dtype="datetime64[M]") for year in range(2000, 2004)]
    )
    steps = problem(noise(8, 20), times=dates.astype("datetime64[ns]")).args[0].series.steps.numpy()
    np.testing.assert_allclose(steps[:4], 1.0)
    assert steps[4] == pytest.approx(8.0, abs=0.2)


def test_irregular_steps_are_kept_as_they_are() -> None:
    times = np.cumsum(np.random.default_rng(1).uniform(0.5, 2.0, 20))
    steps = problem(noise(8, 20), times=times).args[0].series.steps.numpy()
    np.testing.assert_allclose(steps, np.diff(times) / np.median(np.diff(times)))


def test_summaries_name_whose_modes_they_are(tmp_path: Any) -> None:
    """Intervals of the population are the wider ones; modes of these times agree with those of a frame."""
    rng = np.random.default_rng(4)
    x, times = np.linspace(0, 1, 12), 40
    series = rng.standard_normal((2, times))
    values = np.stack([np.sin(3 * x), np.cos(6 * x)], 1) @ (np.array([[2.0], [1.0]]) * series)
    values += 0.2 * rng.standard_normal(values.shape)
    settings: dict[str, Any] = {"num_chains": 2, "warmup_steps": 200, "num_samples": 400, "seed": 1, "progress": False}
    results = {
        name: run_mcmc(problem(values, series=name), **settings, chain_method="sequential") for name in ("ar1", "frame")
    }
    population, these = (summarise_modes(results["ar1"].tree, of=of) for of in ("population", "times"))
    frame = summarise_modes(results["frame"].tree)
    assert population.attrs["estimand"] == "modes of the population"
    assert these.attrs["estimand"] == frame.attrs["estimand"] == "modes of these times"
    fraction = "explained_variance_fraction"
    width = [float((m[f"{fraction}_upper"] - m[f"{fraction}_lower"])[0]) for m in (population, these, frame)]
    assert width[0] > 4 * width[1]
    assert width[1] == pytest.approx(width[2], rel=0.3)
    assert float(these[f"{fraction}_mean"][0]) == pytest.approx(float(frame[f"{fraction}_mean"][0]), abs=0.005)
    assert float(np.abs(these["mode_mean"] - frame["mode_mean"]).max()) < 0.1
    # Forty white values tell as much of a variance as they are; the truth of the first share is 4 times the second.
    assert float(population["effective_times_upper"][0]) == pytest.approx(times, rel=0.01)
    assert float(population["effective_times_lower"][0]) > times / 3
    with pytest.raises(SummaryError, match="series='ar1'"):
        summarise_modes(results["frame"].tree, of="population")
    written = write_outputs(results["ar1"], tmp_path, rotation="varimax")
    assert "modes of these times:" in written.table
    assert "rotated modes of the population:" in written.table
    assert {"modes_of_these_times.nc", "modes_varimax.nc"} <= {path.name for path in tmp_path.iterdir()}
    assert "Rotated modes" in (tmp_path / "report.html").read_text()
    assert "another stretch of the same climate" in (tmp_path / "report.html").read_text()


def test_draws_add_up_to_the_field() -> None:
    rng = np.random.default_rng(0)
    weight = np.repeat([0.5, 1.5], 4)
    values = np.outer(np.sin(np.linspace(0, 3, 8)), rng.standard_normal(30)) + np.linspace(2, 3, 8)[:, None]
    values += 0.2 / np.sqrt(weight)[:, None] * rng.standard_normal((8, 30))
    settings: dict[str, Any] = {"num_chains": 1, "warmup_steps": 100, "num_samples": 300, "seed": 1, "progress": False}
    made = problem(values, rank=1, shared_effects=["trend"], area_weights=[*weight])
    draws = read_draws(run_mcmc(made, **settings).tree)
    field = draws.fixed() + draws.patterns() @ draws.series().transpose(0, 2, 1)
    residual = field.mean(0) - values
    np.testing.assert_allclose(residual.std(1), draws.noise_sd().mean(0), rtol=0.35)  # 30 values a cell
    np.testing.assert_allclose(draws.noise_sd()[:, 0], draws.sigma / np.sqrt(0.5))
    np.testing.assert_allclose(draws.patterns(slice(2, 3))[:, 0], draws.patterns()[:, 2])


def test_independent_times_of_correlated_ones() -> None:
    """Closed form of equal steps, in the limit of many."""
    values = noise(times=12)
    settings: dict[str, Any] = {"num_chains": 1, "warmup_steps": 1, "num_samples": 2, "progress": False}
    draws = read_draws(run_mcmc(problem(values, rank=1), **settings).tree)
    out = xr.Dataset(coords={"mode": [1]})
    even = replace(draws, decay=np.full((2, 1), 0.6), steps=np.ones(9999))
    _add_persistence(out, even, np.array([0.025, 0.975]))
    assert float(out["effective_times_mean"][0]) == pytest.approx(10_000 * (1 - 0.36) / (1 + 0.36), rel=1e-3)
    # A series that is half one process, half another: the sum over lags of (.5 a^lag + .5 b^lag)^2.
    mixed = replace(even, decay=np.array([[0.8, 0.3]] * 2), turn=np.full((2, 2, 1), np.sqrt(0.5)), d=np.ones((2, 1)))
    out = xr.Dataset(coords={"mode": [1]})
    _add_persistence(out, mixed, np.array([0.025, 0.975]))
    lags = np.arange(1, 200)
    assert float(out["autocorrelation_mean"][0]) == pytest.approx(0.55)
    total = 1 + 2 * np.sum((0.5 * 0.8**lags + 0.5 * 0.3**lags) ** 2)
    assert float(out["effective_times_mean"][0]) == pytest.approx(10_000 / total, rel=1e-3)
