"""What result files keep of draws: how far rounding goes, what it leaves alone, and that verdicts stay."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from functools import partial

import netCDF4
import numpy as np
import pytest
import xarray as xr
from inference_models import mean_problem

from probmodels.bayesian_svd import make_problem
from probmodels.bayesian_svd.summary import summarise_modes
from probmodels.errors import ProblemError
from probmodels.inference import Result, run_mcmc
from probmodels.inference.diagnostics.convergence import convergence
from probmodels.inference.runtime.packing import ROUNDING, pack, round_draws, unpack

mcmc = partial(run_mcmc, num_samples=200, warmup_steps=5, num_chains=2, chain_method="sequential", progress=False)


def draws(seed: int = 0) -> np.ndarray:
    """Four chains of 1000 draws: entries of means and sds far from each other, as a first-order autoregression."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((4, 1000, 6))
    for i in range(1, 1000):
        values[:, i] = 0.5 * values[:, i - 1] + values[:, i]
    return np.array([0.0, 1.0, -300.0, 1e-8, 5.0, 1e6]) + values * np.array([1.0, 1e-3, 2.0, 1e-12, 40.0, 1e-4])


def test_no_draw_moves_by_more_than_the_share_of_its_sd_that_is_said_and_verdicts_stay():
    before = draws()
    after = round_draws(before)
    assert (np.abs(after - before) <= ROUNDING * before.std((0, 1))).all()
    assert len(np.unique(after[..., 0])) < 4000  # and yet it has been rounded
    found, expected = convergence(after), convergence(before)
    np.testing.assert_allclose(found["r_hat"], expected["r_hat"], atol=5e-4)
    np.testing.assert_allclose(found["ess_bulk"], expected["ess_bulk"], rtol=2e-3)
    np.testing.assert_allclose(found["ess_tail"], expected["ess_tail"], rtol=8e-2)  # counts of draws below a quantile


def test_quantiles_move_by_less_than_two_fifths_of_their_monte_carlo_error():
    rng = np.random.default_rng(4)
    before = rng.standard_normal((4, 1000, 200))
    after = round_draws(before)
    for level, density in ((0.025, 0.0584), (0.5, 0.3989), (0.95, 0.1031)):  # of a standard normal at the quantile
        error = np.sqrt(level * (1 - level) / 4000) / density  # draws are independent: chains that are not have more
        moved = np.quantile(after, level, axis=(0, 1)) - np.quantile(before, level, axis=(0, 1))
        assert np.abs(moved).max() <= ROUNDING
        assert np.sqrt(np.mean(moved**2)) < 0.4 * error
        assert abs(moved.mean()) < 0.1 * error
    ratio = after.std((0, 1)) / before.std((0, 1))
    np.testing.assert_allclose(ratio.mean(), 1 + (2 * ROUNDING * 0.72) ** 2 / 24, atol=2e-5)  # steps are 0.5 to 1 of 2R


def test_chains_that_disagree_and_long_tails_keep_their_own_scale():
    rng = np.random.default_rng(1)
    apart = 1e-3 * rng.standard_normal((2, 500)) + np.array([[0.0], [1e3]])  # the sd over both chains is 500
    assert (np.abs(round_draws(apart) - apart) <= 1.5e-3 * ROUNDING).all()
    long = np.tan(np.pi * (rng.random((2, 2000)) - 0.5))  # Cauchy, quartiles at -1 and 1
    assert long.std() > 30
    assert (np.abs(round_draws(long) - long) <= 2 * ROUNDING).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_entries_that_do_not_vary_or_are_not_finite_are_kept(dtype):
    values = np.random.default_rng(2).standard_normal((2, 50, 4)).astype(dtype)
    values[..., 1] = 0.1
    values[0, 3, 2] = np.nan
    values[:, ::2, 3] = np.inf
    after = round_draws(values)
    assert after.dtype == dtype
    np.testing.assert_array_equal(after[..., 1:], values[..., 1:])
    assert (after[..., 0] != values[..., 0]).mean() > 0.9


def test_a_file_is_rounded_where_the_problem_says_so_only(tmp_path):
    problem = replace(mean_problem(), rounded=("twice",))
    result = mcmc(problem)
    folder = result.save(tmp_path)
    loaded = Result.load(folder)
    np.testing.assert_array_equal(loaded["mu"], result["mu"])
    moved = np.abs(loaded["twice"] - result["twice"])
    assert 0 < float(moved.max()) <= ROUNDING * float(result["twice"].std())
    with netCDF4.Dataset(folder / "result.nc") as file:  # which other tools unpack as the file itself says
        stored = file["posterior"]["twice"]
        assert stored.filters()["zlib"]
        assert str(ROUNDING) in stored.rounding
        assert stored.unpack == "centre + step * (value // 2, or -(value + 1) // 2 if value is odd)"
        value = stored[:].astype(int)
        steps = np.where(value % 2, -(value + 1) // 2, value // 2)
        scales = file["packing"]["posterior"]
        centre, step = (scales[f"twice_{name}"][...] for name in ("centre", "step"))
        np.testing.assert_array_equal(centre + step * steps, loaded["twice"])
    assert set(loaded.tree.children) == set(result.tree.children)


def test_what_is_rounded_is_not_rounded_again(tmp_path):
    first = Result.load(mcmc(replace(mean_problem(), rounded=("mu",))).save(tmp_path / "a"))
    second = Result.load(first.save(tmp_path / "b"))
    assert first.tree.identical(second.tree)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_packed_draws_come_back_bit_by_bit(dtype):
    values = draws().astype(dtype)
    values[..., 1] = 0.1  # does not vary
    values[0, 0, 4] = 1e5  # far from the others
    tree = xr.DataTree.from_dict({"/posterior": xr.Dataset({"x": (("draw", "chain", "i"), values.swapaxes(0, 1))})})
    packed = pack(tree, ["x"])
    assert packed["posterior"]["x"].dtype.kind == "u"
    found = unpack(packed)["posterior"]["x"]
    assert found.dtype == dtype
    assert "packing" not in unpack(packed).children
    np.testing.assert_array_equal(found.transpose("chain", "draw", "i"), round_draws(values))


def test_draws_that_no_whole_numbers_give_back_stay_numbers():
    values = np.random.default_rng(5).standard_normal((2, 50, 3))
    values[0, 3, 1] = np.nan
    wide = np.random.default_rng(6).standard_normal((2, 50, 1))
    wide[0, 7] = 1e12  # steps of a hundredth from others that lie about 0
    data = xr.Dataset({"x": (("chain", "draw", "i"), values), "y": (("chain", "draw", "j"), wide)})
    packed = pack(xr.DataTree.from_dict({"/posterior": data}), ["x", "y"])
    for name, former in (("x", values), ("y", wide)):
        assert packed["posterior"][name].dtype.kind == "f"
        np.testing.assert_array_equal(unpack(packed)["posterior"][name], round_draws(former))


def test_a_draw_takes_hardly_more_than_a_byte(tmp_path):
    values = np.random.default_rng(7).standard_normal((4, 1000, 100)) * np.geomspace(1e-6, 1e6, 100)
    data = {"x": (("chain", "draw", "i"), values)}
    tree = xr.DataTree.from_dict({"/posterior": xr.Dataset(data)})
    tree.attrs["rounded"] = '["x"]'
    size = (Result(tree).save(tmp_path) / "result.nc").stat().st_size
    assert size - 40_000 < 1.1 * values.size  # the room that groups and steps take
    assert size > 0.8 * values.size  # as digits of a normal draw rounded to this step cannot take less than 7 bits


def test_whole_numbers_are_compressed_and_kept():
    index = xr.DataArray(np.arange(1200).reshape(2, 300, 2), dims=("chain", "draw", "mode"), name="index")
    packed = pack(xr.DataTree.from_dict({"/posterior": index.to_dataset()}), ["index"])
    assert packed["posterior"]["index"].encoding["zlib"]
    np.testing.assert_array_equal(packed["posterior"]["index"], index)


def test_names_that_the_model_lacks_are_refused():
    with pytest.raises(ProblemError, match="rounded names 'theta', which the model lacks"):
        replace(mean_problem(), rounded=("theta",)).validate()


def test_a_bayesian_svd_takes_less_than_a_sixth_of_the_room_and_says_the_same(tmp_path):
    rng = np.random.default_rng(3)
    lat, lon = np.meshgrid(np.arange(0.0, 40, 5), np.arange(0.0, 50, 5), indexing="ij")
    cells = {"lat": ("cell", lat.ravel()), "lon": ("cell", lon.ravel())}
    pattern = np.stack([np.sin(np.deg2rad(4 * lat)).ravel(), np.cos(np.deg2rad(5 * lon)).ravel()], axis=1)
    values = pattern * [3.0, 1.5] @ rng.standard_normal((2, 40)) + 0.5 * rng.standard_normal((80, 40))
    data = xr.DataArray(values, dims=("cell", "time"), coords=cells | {"time": np.arange(40)})
    problem = make_problem(data, rank=2, series="ar1", fixed_effects=["intercept"])
    result = run_mcmc(
        problem, num_samples=300, warmup_steps=50, num_chains=2, chain_method="sequential", progress=False
    )
    folder = result.save(tmp_path)
    held = sum(result[name].nbytes for name in ("U", "F", "fixed_effects"))
    others = result.tree.copy()
    others["posterior"] = xr.DataTree(result.posterior.drop_vars(["U", "F", "fixed_effects"]))
    rest = (Result(others).save(tmp_path / "rest") / "result.nc").stat().st_size
    assert (folder / "result.nc").stat().st_size - rest < 0.16 * held
    loaded = Result.load(folder)
    found, expected = summarise_modes(loaded.tree), summarise_modes(result.tree)
    for name in ("mode", "pc", "explained_variance_fraction"):
        width = expected[f"{name}_upper"] - expected[f"{name}_lower"]
        assert float((np.abs(found[f"{name}_mean"] - expected[f"{name}_mean"]) / width).max()) < 2e-3
    table, former = loaded.diagnose().table, result.diagnose().table
    np.testing.assert_allclose(table["r_hat_max"], former["r_hat_max"], atol=1e-3)
    np.testing.assert_allclose(table["ess_bulk_min"], former["ess_bulk_min"], rtol=1e-2)


def test_packing_takes_little_memory_beside_the_draws():
    draws = np.random.default_rng(0).standard_normal((4, 500, 4000))
    tree = xr.DataTree.from_dict({"/posterior": xr.Dataset({"F": (("chain", "draw", "time"), draws)})})
    tracemalloc.start()
    packed = pack(tree, ["F"])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.5 * draws.nbytes
    assert packed["posterior"]["F"].dtype == np.uint16
    np.testing.assert_array_equal(unpack(packed)["posterior"]["F"].values, round_draws(draws))


def test_one_entry_of_large_numbers_widens_the_whole_variable():
    draws = np.random.default_rng(0).standard_normal((2, 50, 3))
    draws[:, 0, 1] = 1e6  # beside ordinary draws, so that the step stays small
    tree = xr.DataTree.from_dict({"/posterior": xr.Dataset({"x": (("chain", "draw", "i"), draws)})})
    packed = pack(tree, ["x"])
    assert packed["posterior"]["x"].dtype == np.uint32
    np.testing.assert_array_equal(unpack(packed)["posterior"]["x"].values, round_draws(draws))
