"""Several fields, members and lags in one decomposition, and what couples two fields."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import xarray as xr
from synthetic_modes import toy_field

from probmodels import run_mcmc
from probmodels.bayesian_svd import make_problem, outputs, write_outputs
from probmodels.bayesian_svd.draws import read_draws
from probmodels.bayesian_svd.figures import pcs
from probmodels.bayesian_svd.joint.coupled import couple
from probmodels.bayesian_svd.joint.stack import split_fields, stack_fields, stack_lags, stack_members
from probmodels.bayesian_svd.sides import space_distance
from probmodels.bayesian_svd.summary import summarise_modes
from probmodels.distributions.covariance import correlation
from probmodels.distributions.series import ProcessSeries
from probmodels.errors import DataError, SummaryError
from probmodels.inference.result import Result

QUICK = {
    "num_chains": 1,
    "chain_method": "sequential",
    "warmup_steps": 100,
    "num_samples": 200,
    "progress": False,
}


def line(values, start=0.0):
    coords = {"cell": np.linspace(0, 1, len(values)), "time": start + np.arange(float(values.shape[1]))}
    return xr.DataArray(values, dims=("cell", "time"), coords=coords)


def pair(coupling, seed=0, times=60, cells=8):
    """Two fields of one pattern each, whose series correlate."""
    rng = np.random.default_rng(seed)
    root = np.linalg.cholesky([[1, coupling], [coupling, 1]])
    series = root @ rng.standard_normal((2, times))
    x = np.linspace(0, 1, cells)
    one = np.outer(np.sin(3 * x) + 0.2, series[0]) + 0.2 * rng.standard_normal((cells, times))
    two = 50 * (np.outer(np.cos(2 * x) + 0.2, series[1]) + 0.2 * rng.standard_normal((cells, times)))
    return {"sst": line(one), "slp": line(two)}


@pytest.fixture(scope="module")
def coupled():
    problem = make_problem(stack_fields(pair(0.7)), rank=2, series="iid")
    return run_mcmc(problem, seed=0, **QUICK).tree


# -- stacks -----------------------------------------------------------------------------------------------------------


def test_fields_have_the_same_total_variance_or_the_shares_asked_for():
    fields = {"sst": toy_field(), "slp": 300 * toy_field(1)[:, :, :7]}
    data = stack_fields(fields)
    assert data.dims == ("cell", "time")
    assert set(np.unique(data["field"])) == {"sst", "slp"}
    total = (data.var("time") * data["area_weight"]).groupby("field").sum()
    assert total.sel(field="sst").item() == pytest.approx(total.sel(field="slp").item())
    shared = stack_fields(fields, weights={"sst": 3.0, "slp": 1.0})
    total = (shared.var("time") * shared["area_weight"]).groupby("field").sum()
    assert total.sel(field="sst").item() == pytest.approx(3 * total.sel(field="slp").item())
    back = data.where(data["field"] == "slp", drop=True) * data["field_scale"]
    field = fields["slp"].stack(cell=("lat", "lon")).dropna("cell", how="all")
    assert np.allclose(back.values.std(), field.values.std())


def test_no_kernel_joins_two_fields():
    fields = {"sst": toy_field(), "slp": toy_field(1)}
    both, alone = (space_distance(stack_fields(x)) for x in (fields, {"sst": fields["sst"], "copy": fields["sst"]}))
    size = len(both) // 2
    within = both[:size, :size]
    assert torch.allclose(within, alone[:size, :size], atol=1e-4)
    for kernel in ("matern12", "matern72", "squared_exponential"):
        between = correlation(both[:size, size:], kernel, 4 * float(within.max()))
        assert float(between.max()) < 1e-30
        assert float(correlation(within, kernel, float(within.max())).min()) > 0.1


def test_default_length_scales_are_those_of_the_fields_not_of_the_gap_between_them():
    problem = make_problem(stack_fields(pair(0.5)), rank=1)
    scales = problem.args[0].space.length_scales
    assert 0.05 < float(scales.min()) < 0.2
    assert float(scales.max()) == pytest.approx(1.0)


def test_fields_that_do_not_belong_together_are_refused():
    fields = pair(0.5)
    late = fields | {"slp": line(fields["slp"].values, start=3.0)}
    with pytest.raises(DataError, match="57 are in both"):
        stack_fields(late)
    dated = fields["slp"].assign_coords(time=np.datetime64("2000-01-01", "ns") + np.arange(60) * np.timedelta64(1, "D"))
    with pytest.raises(DataError, match="one calendar"):
        stack_fields(fields | {"slp": dated})
    with pytest.raises(DataError, match="fields="):
        stack_fields({"sst": fields["sst"]})
    with pytest.raises(DataError, match="give one for each"):
        stack_fields(fields, weights={"sst": 1.0, "spl": 1.0})
    with pytest.raises(DataError, match="weights"):
        stack_fields(fields, weights={"sst": 1.0, "slp": -1.0})
    with pytest.raises(DataError, match="kind of coordinates"):
        stack_fields(fields | {"slp": toy_field(num_times=60).assign_coords(time=fields["sst"]["time"].values)})
    with pytest.raises(DataError, match="does not vary"):
        stack_fields(fields | {"slp": fields["slp"] * 0})
    with pytest.raises(DataError, match="no position"):
        stack_fields({name: field.drop_vars("cell") for name, field in fields.items()})
    for wrong in (None, [], "two fields", [fields["sst"], fields["slp"]], {"a": 1, "b": 2}):
        with pytest.raises(DataError, match="fields"):
            stack_fields(wrong)


# -- what couples two fields ------------------------------------------------------------------------------------------


def test_coupling_of_each_draw_is_that_of_its_covariance(coupled):
    """Against the full covariance of both fields, draw by draw."""
    draws = read_draws(coupled)
    names = coupled["constant_data"]["field"].values
    weighted = np.einsum("nr,rsk->snk", draws.basis_space, draws.space * draws.d)
    found = {"cca": [], "mca": []}
    for loading, sigma in zip(weighted, draws.sigma, strict=True):
        full = loading @ loading.T + sigma**2 * np.eye(len(loading))
        one, two = names == "sst", names == "slp"
        xx, yy, xy = full[np.ix_(one, one)], full[np.ix_(two, two)], full[np.ix_(one, two)]
        a, b = (np.linalg.eigh(side)[1][:, -1] for side in (xx, yy))  # one pattern of each field is kept
        found["cca"].append([abs(a @ xy @ b) / np.sqrt((a @ xx @ a) * (b @ yy @ b))])
        found["mca"].append(found["cca"][-1])  # of one pattern there is one axis
    cca, mca = couple(coupled, ["sst", "slp"], method="cca"), couple(coupled, ["sst", "slp"])
    for summary, name, key in (
        (cca, "correlation", "cca"),
        (mca, "correlation", "mca"),
    ):
        low, high = np.quantile(found[key], [0.025, 0.975], axis=0)
        assert np.allclose(summary[f"{name}_mean"], np.mean(found[key], axis=0), atol=1e-6)
        assert np.allclose(summary[f"{name}_lower"], low, atol=1e-6)
        assert np.allclose(summary[f"{name}_upper"], high, atol=1e-6)
    assert mca["squared_covariance_fraction_mean"].values.tolist() == [1.0]
    assert mca["correlation_lower"][0] < 0.7 < mca["correlation_upper"][0]


def test_maps_are_covariances_with_the_series_of_the_other_field(coupled):
    draws = read_draws(coupled)
    names = coupled["constant_data"]["field"].values
    for method in ("cca", "mca"):
        maps = couple(coupled, ["sst", "slp"], method=method)["map_mean"]
        assert maps.sizes["mode"] == 1
        assert np.isfinite(maps).all()
        truth = np.cos(2 * np.linspace(0, 1, 8)) + 0.2
        assert abs(np.corrcoef(maps[0][names == "slp"], truth)[0, 1]) > 0.98
    # The canonical map of one draw is its covariance with the other field's variate of unit variance.
    tree = xr.DataTree.from_dict(
        {
            "posterior": coupled["posterior"].to_dataset().isel(draw=[0, 0]),
            "constant_data": coupled["constant_data"].to_dataset(),
        }
    )
    loading = np.einsum("nr,rk->nk", draws.basis_space, draws.space[:, 0] * draws.d[0])
    x, y = loading[names == "sst"], loading[names == "slp"]
    axis = np.linalg.svd(y)[0][:, 0]
    variance = axis @ y @ y.T @ axis + draws.sigma[0] ** 2
    own = np.linalg.svd(x)[0][:, 0]
    expected = own * (own @ x @ y.T @ axis) / np.sqrt(variance)
    for method in ("cca", "mca"):
        found = couple(tree, ["sst", "slp"], method=method)["map_mean"].values[0][names == "sst"]
        assert np.allclose(np.abs(found), np.abs(expected), atol=1e-6)


def test_maximum_covariance_of_two_patterns_is_that_of_the_dense_covariance():
    rng = np.random.default_rng(1)
    loadings = rng.standard_normal((16, 4)) * [2.0, 1.5, 1.0, 0.8]
    values = loadings @ rng.standard_normal((4, 60)) + 0.2 * rng.standard_normal((16, 60))
    data = stack_fields({"sst": line(values[:8]), "slp": line(values[8:])})
    tree = run_mcmc(make_problem(data, rank=4, series="iid"), **QUICK | {"num_samples": 20}).tree
    draws, fractions, correlations = read_draws(tree), [], []
    for s, sigma in enumerate(draws.sigma):
        loading = draws.basis_space @ (draws.space[:, s] * draws.d[s])
        sides = []
        for half in (loading[:8], loading[8:]):
            left = np.linalg.svd(half)[0][:, :2]
            sides.append(left @ left.T @ half)
        left, size, right = np.linalg.svd(sides[0] @ sides[1].T)
        fractions.append((size**2 / (size**2).sum())[:2])
        scale = [np.diag(a.T @ (x @ x.T) @ a)[:2] + sigma**2 for a, x in zip((left, right.T), sides, strict=True)]
        correlations.append(size[:2] / np.sqrt(scale[0] * scale[1]))
    found = couple(tree, ["sst", "slp"])
    assert np.allclose(found["squared_covariance_fraction_mean"], np.mean(fractions, axis=0), atol=1e-6)
    assert np.allclose(found["correlation_mean"], np.mean(correlations, axis=0), atol=1e-6)


def test_fields_that_are_not_coupled_are_not_called_so():
    problem = make_problem(stack_fields(pair(0.0, seed=3)), rank=2, series="iid")
    tree = run_mcmc(problem, seed=0, **QUICK).tree
    found = couple(tree, ["sst", "slp"], method="cca")
    assert found.sizes["mode"] == 1
    assert found["correlation_lower"][0] < 0.1


def test_more_patterns_than_joint_modes_can_tell_apart_are_refused():
    """Independent fields of three patterns each: three joint modes are shared by both whatever the data."""
    rng = np.random.default_rng(0)
    fields = {}
    for name in ("sst", "slp"):
        patterns = np.linalg.qr(rng.standard_normal((12, 3)))[0] * [3.0, 2.8, 2.6]
        fields[name] = line(patterns @ rng.standard_normal((3, 80)) + 0.1 * rng.standard_normal((12, 80)))
    tree = run_mcmc(make_problem(stack_fields(fields), rank=6, series="iid"), seed=0, **QUICK).tree
    for method in ("cca", "mca"):
        found = couple(tree, ["sst", "slp"], method=method)
        assert found.sizes["mode"] == 3
        assert found["correlation_upper"].max() < 0.7
    few = run_mcmc(make_problem(stack_fields(fields), rank=3, series="iid"), seed=0, **QUICK).tree
    for method in ("cca", "mca"):
        found = couple(few, ["sst", "slp"], method=method)
        assert found.sizes["mode"] == 1
        assert found["correlation_lower"].max() < 0.2
    with pytest.raises(SummaryError, match="higher rank"):
        couple(few, ["sst", "slp"], method="cca", num_patterns=2)
    one = run_mcmc(make_problem(stack_fields(fields), rank=1, series="iid"), seed=0, **QUICK).tree
    with pytest.raises(SummaryError, match="higher rank"):
        couple(one, ["sst", "slp"], method="cca")


def test_maps_of_each_field_are_on_its_grid_and_in_its_units():
    sst, slp = toy_field(), 100 * toy_field()[:, :, :6].rename("slp")
    slp.attrs["units"] = "hPa"
    problem = make_problem(stack_fields({"sst": sst, "slp": slp}), rank=2, series="iid")
    tree = run_mcmc(problem, **QUICK | {"warmup_steps": 20, "num_samples": 30}).tree
    modes = summarise_modes(tree)
    assert modes["mode_mean"].dims == ("mode", "cell")
    parts = split_fields(modes, tree)
    assert list(parts) == ["sst", "slp"]
    assert parts["sst"]["mode_mean"].dims == parts["slp"]["mode_mean"].dims == ("mode", "lat", "lon")
    assert parts["slp"].sizes["lon"] == 6
    assert parts["slp"]["mode_mean"].attrs["units"] == "hPa"
    same = parts["sst"]["mode_mean"][:, :, :6].values * 100
    assert np.allclose(parts["slp"]["mode_mean"], same, rtol=0.1, atol=0.05 * np.nanmax(same), equal_nan=True)
    assert parts["slp"]["prob_positive"].max() <= 1
    maps = split_fields(couple(tree, ["sst", "slp"]), tree)
    assert maps["slp"]["map_mean"].dims == ("mode", "lat", "lon")


def test_outputs_hold_each_field(coupled, tmp_path):
    written = write_outputs(Result(coupled), tmp_path)
    assert written.folder == tmp_path
    assert {"modes_sst.nc", "modes_slp.nc"} <= {path.name for path in tmp_path.iterdir()}


def test_couplings_that_cannot_be_are_refused(coupled, tmp_path, monkeypatch):
    with pytest.raises(SummaryError, match="did you mean 'slp'"):
        couple(coupled, ["sst", "slq"])
    with pytest.raises(SummaryError, match="different fields"):
        couple(coupled, ["sst", "sst"])
    for wrong in (["sst"], "sst", None, ["sst", "slp", "ssh"], [1, 2]):
        with pytest.raises(SummaryError, match="fields"):
            couple(coupled, wrong)
    for wrong in (0, 2, 1.5, True, "1", 10**30):
        with pytest.raises(SummaryError, match="num_patterns"):
            couple(coupled, ["sst", "slp"], method="cca", num_patterns=wrong)
    alone = run_mcmc(make_problem(pair(0.5)["sst"], rank=1, series="iid"), **QUICK | {"num_samples": 5}).tree
    with pytest.raises(SummaryError, match="stack_fields"):
        couple(alone, ["sst", "slp"])
    with pytest.raises(SummaryError, match="stack_fields"):
        split_fields(summarise_modes(alone), alone)
    with monkeypatch.context() as patch:
        patch.setattr(outputs, "summarise_modes", lambda *_, **__: pytest.fail("summarised before it was checked"))
        with pytest.raises(SummaryError, match="of several fields"):
            write_outputs(Result(alone), tmp_path / "new", coupling="mca")
    frame = run_mcmc(make_problem(stack_fields(pair(0.5)), rank=1), **QUICK | {"num_samples": 5}).tree
    with pytest.raises(SummaryError, match="series='ar1'"):
        couple(frame, ["sst", "slp"])


# -- members and lags -------------------------------------------------------------------------------------------------


def test_series_start_afresh_with_each_member():
    rng = np.random.default_rng(0)
    field = xr.concat([line(rng.standard_normal((6, 20))) for _ in range(3)], "member")
    data = stack_members(field)
    assert data.dims == ("cell", "time")
    assert data.sizes["time"] == 60
    assert np.array_equal(data.values[:, 20:40], field.isel(member=1).values)
    problem = make_problem(data, rank=1, series="ar1")
    steps = problem.args[0].series.steps
    assert steps[[19, 39]].min() > 1e5
    assert (steps[:19] == 1).all()
    series = torch.as_tensor(rng.standard_normal((60, 1)))
    decay, weights = torch.tensor([0.8], dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    whole = ProcessSeries("ar1", decay, steps, weights).log_prob(series)
    parts = [ProcessSeries("ar1", decay, steps[:19], weights).log_prob(series[i : i + 20]) for i in (0, 20, 40)]
    assert float(whole) == pytest.approx(float(sum(parts)))


def test_a_gridded_ensemble_is_a_matrix_and_shares_its_trend():
    field = xr.concat([toy_field(i) for i in range(2)], "run")
    data = stack_members(field, member="run")
    assert data.sizes["time"] == 80
    assert {"lat", "area_weight"} <= set(data.coords)
    tree = run_mcmc(
        make_problem(data, rank=2, series="ar1", fixed_effects=["intercept", "trend"]),
        **QUICK | {"num_samples": 20, "warmup_steps": 10},
    ).tree
    modes = summarise_modes(tree)
    assert modes.sizes["time"] == 80
    assert np.isfinite(modes["pc_mean"]).all()
    lines = [line.get_xdata() for line in pcs(modes).axes[0].lines[1:]]  # after the one at zero
    assert [len(x) for x in lines] == [40, 40]  # a line for each member, none from one to the next


def test_members_are_refused_where_they_cannot_be():
    field = xr.concat([line(np.random.default_rng(i).standard_normal((6, 20))) for i in range(2)], "member")
    with pytest.raises(DataError, match="two or more"):
        stack_members(field[:1])
    with pytest.raises(DataError, match="expected 'run'"):
        stack_members(field, member="run")
    with pytest.raises(DataError, match="members share their times"):
        make_problem(stack_members(field), rank=1, kernel_time="matern32")


def test_lags_are_windows_that_share_no_value():
    values = np.arange(7 * 41.0).reshape(7, 41)
    data = stack_lags(line(values), 3)
    assert data.sizes == {"cell": 21, "time": 13}
    assert np.array_equal(data.values[:7], values[:, 0:39:3])
    assert np.array_equal(data.values[14:], values[:, 2:39:3])
    assert len(np.unique(data.values)) == data.size
    assert data["time"].values.tolist() == list(range(0, 39, 3))
    assert "last 2 times" in json.loads(data.attrs["mends"])[0]
    assert np.unique(data["field"]).tolist() == ["lag 0", "lag 1", "lag 2"]
    with pytest.raises(DataError, match="1 windows"):
        stack_lags(line(values), 40)
    with pytest.raises(DataError, match="uneven"):
        stack_lags(line(values)[:, [0, 1, 2, 5, 6, 20]], 2)
    for wrong in (1, 0, -2, True, "2", 2.5, None, [2], 10**30):
        with pytest.raises(DataError, match="lags"):
            stack_lags(line(values), wrong)


def test_a_wave_that_travels_is_one_pair_of_lagged_patterns():
    rng = np.random.default_rng(0)
    x, t = np.linspace(0, 1, 10), np.arange(120)
    phase = 2 * np.pi * (x[:, None] - t / 4)
    field = line(np.cos(phase) * rng.uniform(0.8, 1.2, 120) + 0.05 * rng.standard_normal((10, 120)))
    problem = make_problem(stack_lags(field, 2), rank=1, series="iid", fixed_effects=["intercept"])
    tree = run_mcmc(problem, **QUICK).tree
    parts = [split_fields(summarise_modes(tree), tree)[f"lag {i}"]["mode_mean"].values[0] for i in range(2)]
    # A quarter of a period between the lags: cosine and sine of one wave.
    assert abs(np.corrcoef(*parts)[0, 1]) < 0.35
    assert min(np.abs(part).max() for part in parts) > 0.3
