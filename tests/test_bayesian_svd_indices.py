"""Means of the field over boxes: weights, gaps, what is refused, and whether intervals hold what they should."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from probmodels import run_mcmc
from probmodels.bayesian_svd import make_problem
from probmodels.bayesian_svd.draws import read_draws
from probmodels.bayesian_svd.indices.boxes import (
    box_indices,
    box_overlap,
    index_table,
    parse_boxes,
    summarise_indices,
)
from probmodels.bayesian_svd.indices.outputs import index_sentences, indices_to_folder, write_indices
from probmodels.datasets.regions import parse_region
from probmodels.errors import DataError, SummaryError

LAT, LON = np.arange(-8.75, 9.0, 2.5), np.arange(183.75, 217.0, 2.5)
TIMES = 60
BOX = {"box": "-5,5,190,205"}


def field(seed: int = 0, noise: float = 0.3) -> xr.DataArray:
    """Two smooth modes and white noise over (time, lat, lon); the means of cells differ."""
    rng = np.random.default_rng(seed)
    y, x = np.meshgrid(LAT / 10, (LON - 200) / 20, indexing="ij")
    waves = np.array([np.exp(-(x**2) - y**2), np.sin(2 * x) * np.cos(y)])
    values = np.tensordot(rng.standard_normal((TIMES, 2)) * [1.5, 1.0], waves, 1) + 0.5 + y
    values += noise * rng.standard_normal(values.shape) / np.sqrt(np.cos(np.deg2rad(LAT)))[:, None]
    time = np.arange("1990-01", "1995-01", dtype="datetime64[M]").astype("datetime64[ns]")
    coords = {"time": time, "lat": LAT, "lon": LON}
    return xr.DataArray(values, coords, ("time", "lat", "lon"), attrs={"units": "degC"})


def inferred(data: xr.DataArray, rank: int = 2, draws: int = 200, **options: object) -> xr.DataTree:
    settings = {"series": "ar1", "num_length_scales": 4, "tail": 1e-4, **options}
    problem = make_problem(data, rank=rank, **settings)
    sampling = {"num_samples": draws, "warmup_steps": 100, "num_chains": 2, "chain_method": "sequential"}
    return run_mcmc(problem, **sampling, seed=0, progress=False).tree


@pytest.fixture(scope="module")
def complete() -> xr.DataTree:
    return inferred(field())


@pytest.fixture(scope="module")
def gapped() -> tuple[xr.DataTree, xr.DataArray]:
    """Thirty times lack all or half of the box."""
    data = field()
    gaps = data.copy()
    gaps.loc[{"time": gaps["time"][::4], "lat": slice(-5, 5), "lon": slice(188, 207)}] = np.nan
    gaps.loc[{"time": gaps["time"][2::4], "lat": slice(0, 5), "lon": slice(188, 207)}] = np.nan
    return inferred(gaps), data


def overlap(data: xr.DataArray, south: float, north: float, west: float, east: float) -> xr.DataArray:
    """Mean over a box by brute force: each cell split into many."""
    fine = np.linspace(-1.25, 1.25, 251)[:-1] + 0.005
    lat, lon = (data[name].values[:, None] + fine for name in ("lat", "lon"))
    tall = (((lat > south) & (lat < north)) * np.cos(np.deg2rad(lat))).sum(1)
    wide = ((lon > west) & (lon < east)).sum(1)
    weight = xr.DataArray(np.outer(tall, wide), dims=("lat", "lon"))
    return (data * weight).sum(("lat", "lon")) / weight.sum()


@pytest.mark.parametrize("bounds", [(-5.0, 5.0, 190.0, 205.0), (-4.1, 3.3, 191.0, 202.2)], ids=["lines", "cut"])
def test_a_box_that_is_observed_is_the_area_weighted_mean(complete: xr.DataTree, bounds: tuple[float, ...]) -> None:
    found = box_indices(complete, {"box": "{},{},{},{}".format(*bounds)})
    want = overlap(field(), *bounds).values
    np.testing.assert_allclose(found["field"].sel(index="box"), np.broadcast_to(want, (2, 200, TIMES)), atol=2e-3)
    assert float(found["field"].std(("chain", "draw")).max()) < 1e-12
    assert float(found["covered"].sel(index="box")) == pytest.approx(1.0)
    assert (found["observed"] > 1 - 1e-12).all()


def test_longitudes_may_be_written_either_way(complete: xr.DataTree) -> None:
    found = box_indices(complete, ["east=-5,5,190,205", "west=-5,5,-170,-155"])
    np.testing.assert_array_equal(found["signal"].sel(index="east"), found["signal"].sel(index="west"))


def test_the_signal_is_that_of_the_draws_cell_by_cell(complete: xr.DataTree) -> None:
    draws = read_draws(complete)
    constant = complete["constant_data"]
    inside = (np.abs(constant["lat"].values) < 5) & (constant["lon"].values > 190) & (constant["lon"].values < 205)
    weight = np.where(inside, np.cos(np.deg2rad(constant["lat"].values)), 0.0)
    signal = np.einsum("c,sck,stk->st", weight / weight.sum(), draws.patterns(), draws.series())
    fixed = np.einsum("c,sct->st", weight / weight.sum(), draws.fixed())
    with_, without = (box_indices(complete, BOX, effects=x)["signal"].values.reshape(400, -1) for x in (True, False))
    np.testing.assert_allclose(without, signal, atol=1e-9)
    np.testing.assert_allclose(with_ - without, fixed, atol=1e-9)


def test_intervals_of_gaps_hold_what_was_hidden(gapped: tuple[xr.DataTree, xr.DataArray]) -> None:
    tree, data = gapped
    found = box_indices(tree, BOX)
    summary = summarise_indices(found).sel(index="box")
    truth = overlap(data, -5, 5, 190, 205).values
    hidden = found["observed"].sel(index="box").values < 1 - 1e-9
    assert hidden.sum() == 30
    held = (summary["field_lower"] <= truth) & (truth <= summary["field_upper"])
    assert held.values[hidden].sum() >= 25  # of 30, 28.5 expected; five sd below that
    np.testing.assert_allclose(summary["field_mean"].values[~hidden], truth[~hidden], atol=2e-3)
    assert (summary["field_sd"].values[~hidden] == 0).all()
    whole, half = summary["field_sd"].values[::4], summary["field_sd"].values[2::4]
    assert half.mean() < 0.8 * whole.mean()  # what was observed counts
    assert np.sqrt(np.mean((summary["field_mean"].values - truth)[::4] ** 2)) < 0.5 * truth.std()


def test_draws_of_a_gap_are_those_of_the_cells() -> None:
    data = field()
    data[7, :, :] = data[7].where((np.abs(data["lat"]) > 5) | (data["lon"] < 195))
    tree = inferred(data, draws=400)
    draws = read_draws(tree)
    constant = tree["constant_data"]
    lat, lon = constant["lat"].values, constant["lon"].values
    cells = np.flatnonzero((np.abs(lat) < 5) & (lon > 190) & (lon < 205))
    share = np.cos(np.deg2rad(lat[cells]))
    share /= share.sum()
    seen = constant["data"].transpose("cell", "time").values[cells, 7]
    gap = share * np.isnan(seen)
    series = draws.series(slice(7, 8))[:, 0]
    mean = np.nansum(share * seen) + np.einsum("c,sck,sk->s", gap, draws.patterns(cells), series)
    mean += draws.fixed(cells)[:, :, 7] @ gap
    own = np.sqrt((gap**2 * draws.noise_sd(cells) ** 2).sum(1))
    found = box_indices(tree, BOX).sel(index="box")
    inflation = max(float(found["noise_ratio"]), 1.0)
    standardised = (found["field"][..., 7].values.ravel() - mean) / (inflation * own)
    assert abs(standardised.mean()) < 4 / np.sqrt(800)
    assert standardised.std() == pytest.approx(1.0, abs=4 / np.sqrt(1600))


def test_noise_that_is_alike_in_neighbours_widens_gaps_and_is_said() -> None:
    rng = np.random.default_rng(5)
    data = field()
    common = 0.5 * rng.standard_normal(TIMES)  # a third mode that one mode cannot hold
    data = data + xr.DataArray(common, dims="time") * np.cos(data["lat"] / 4) * np.cos((data["lon"] - 197) / 8)
    data[3] = data[3].where(np.abs(data["lat"]) > 5)
    tree = inferred(data, rank=1)
    found = box_indices(tree, BOX)
    assert float(found["noise_ratio"].sel(index="box")) > 2
    assert any("times as much of the mean" in sentence for sentence in index_sentences(found))
    white = inferred(field())
    assert float(box_indices(white, BOX)["noise_ratio"].sel(index="box")) == pytest.approx(1.0, abs=0.35)
    assert not index_sentences(box_indices(white, BOX))


def test_a_box_beyond_the_field_is_refused_or_said(complete: xr.DataTree) -> None:
    with pytest.raises(SummaryError, match=r"cover 55% of the box 'far'.*at least 80%"):
        box_indices(complete, {"far": "-5,5,190,240"})
    found = box_indices(complete, {"far": "-5,5,190,240"}, min_covered=0.5)
    assert float(found["covered"].sel(index="far")) == pytest.approx(0.55)
    assert any("cells cover 5" in sentence for sentence in index_sentences(found))
    with pytest.raises(SummaryError, match=r"cover 0% of the box 'nino12'"):
        box_indices(complete, ["nino12"])
    with pytest.raises(SummaryError, match="covers none of the boxes nino12"):
        box_indices(complete)


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        (["nino35"], "unknown region 'nino35'; did you mean"),
        (["a=1,2,3"], "unknown region"),
        (["=0,5,190,200"], "has no name"),
        (["a=0,5,190,200", "a=0,5,195,200"], "given twice"),
        (["a=0,0,190,200"], "has no area"),
        (["a=0,95,190,200"], "within -90 to 90"),
    ],
)
def test_boxes_that_cannot_be_read_are_refused(boxes: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_boxes(boxes)


def test_cells_without_positions_have_no_boxes(complete: xr.DataTree) -> None:
    bare = complete.copy()
    bare["constant_data"] = xr.DataTree(complete["constant_data"].to_dataset().drop_vars(["lat", "lon"]))
    with pytest.raises(SummaryError, match="no lat and lon"):
        box_indices(bare, BOX)


def test_scattered_cells_count_where_they_lie_in_the_box() -> None:
    rng = np.random.default_rng(1)
    lat, lon = rng.uniform(-8, 8, 40), rng.uniform(180, 220, 40)
    wave = np.exp(-((lon - 200) ** 2) / 200)
    values = wave[:, None] * rng.standard_normal(50) + 0.2 * rng.standard_normal((40, 50))
    coords = {"lat": ("cell", lat), "lon": ("cell", lon), "time": np.arange(50.0)}
    tree = inferred(xr.DataArray(values, dims=("cell", "time"), coords=coords), rank=1, draws=20)
    found = box_indices(tree, BOX)
    inside = (np.abs(lat) <= 5) & (lon >= 190) & (lon <= 205)
    weight = np.cos(np.deg2rad(lat[inside]))
    want = weight @ values[inside] / weight.sum()
    np.testing.assert_allclose(found["field"].sel(index="box")[0, 0], want, atol=1e-3)
    assert np.isnan(found["covered"]).all()
    assert any("have no grid" in sentence for sentence in index_sentences(found))


def test_what_is_written_can_be_read(gapped: tuple[xr.DataTree, xr.DataArray], tmp_path: Path) -> None:
    found = box_indices(gapped[0], ["box=-5,5,190,205", "all=-8,8,182,216"], num_draws=60)
    assert found.sizes == {"chain": 2, "draw": 30, "index": 2, "time": TIMES}
    findings = write_indices({"boxes": found}, tmp_path / "new")
    assert any("30 of 60 times have gaps in the box" in found.verdict for found in findings)
    table = pd.read_csv(tmp_path / "new" / "indices.csv")
    assert list(table) == ["index", "estimand", "time", "mean", "sd", "lower", "upper"]
    assert len(table) == 2 * 2 * TIMES
    row = table[(table["index"] == "box") & (table["estimand"] == "signal") & (table["time"] == "1991-03-01")].iloc[0]
    draws = found["signal"].sel(index="box", time="1991-03-01").values.ravel()
    assert row["mean"] == pytest.approx(draws.mean(), rel=1e-4)
    assert row["lower"] == pytest.approx(np.quantile(draws, 0.025), rel=1e-3)
    with xr.open_dataset(tmp_path / "new" / "indices.nc", group="boxes") as read:
        np.testing.assert_allclose(read["field"].values, found["field"].values, atol=1e-5)
        assert "30 of 60 times" in read.attrs["comment"]
    assert (tmp_path / "new" / "indices.png").stat().st_size > 5000


def test_a_summary_needs_draws(complete: xr.DataTree) -> None:
    with pytest.raises(SummaryError, match="no variable has the dims chain and draw"):
        summarise_indices(xr.Dataset({"x": ("time", np.zeros(3))}))
    summary = summarise_indices(box_indices(complete, BOX), level=0.5)
    wide = summarise_indices(box_indices(complete, BOX))
    assert (summary["signal_upper"] - summary["signal_lower"] < wide["signal_upper"] - wide["signal_lower"]).all()
    assert len(index_table(summary)) == 2 * TIMES


def test_correlated_noise_counts_with_its_covariance() -> None:
    data = field()
    data[7, :, :] = data[7].where((np.abs(data["lat"]) > 5) | (data["lon"] < 190) | (data["lon"] > 205))
    tree = inferred(data, noise="correlated", draws=400)
    draws, constant = read_draws(tree), tree["constant_data"]
    assert draws.noise is not None
    lat, lon = constant["lat"].values, constant["lon"].values
    share = np.where((np.abs(lat) < 5) & (lon > 190) & (lon < 205), np.cos(np.deg2rad(lat)), 0.0)
    share /= share.sum()
    covariance = (draws.noise.vectors * draws.noise.values) @ draws.noise.vectors.T
    root = share / np.sqrt(draws.weight)
    own = draws.sigma * np.sqrt(root @ covariance @ root)
    found = box_indices(tree, BOX).sel(index="box")
    extra = (found["field"] - found["signal"])[..., 7].values.ravel()
    inflation = max(float(found["noise_ratio"]), 1.0)
    assert (extra / (inflation * own)).std() == pytest.approx(1.0, abs=4 / np.sqrt(1600))


# -- ice ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def icy() -> tuple[xr.DataTree, xr.DataArray, np.ndarray]:
    """The north of the box is frozen in the first 15 times, and in the next 15 it is a gap."""
    data = field()
    north = (data["lat"] > 2.5) & (data["lat"] < 5) & (data["lon"] > 188) & (data["lon"] < 207)
    ice, gaps = (north & (data["time"] >= data["time"][a]) & (data["time"] < data["time"][b]) for a, b in ICY)
    ice = ice.transpose("time", "lat", "lon")
    masked = data.where(~ice & ~gaps).transpose("time", "lat", "lon")
    return inferred(masked.assign_coords(ice=ice.drop_vars(["time", "lat", "lon"]).variable)), data, ice.values


ICY = ((0, 15), (15, 30))


def test_frozen_cells_are_left_out_of_a_mean_and_gaps_are_filled(icy):
    tree, data, ice = icy
    found = box_indices(tree, BOX)
    share = found["ice_share"].sel(index="box").values
    assert 0.2 < share[0] <= 0.5
    assert (share[:15] == share[0]).all()
    assert (share[15:] == 0).all()
    whole = overlap(data, -5, 5, 190, 205)
    fine = xr.where(xr.DataArray(ice, dims=data.dims), 0.0, 1.0)
    expected = overlap(data * fine, -5, 5, 190, 205) / overlap(fine + 0 * data, -5, 5, 190, 205)
    mean = found["field"].sel(index="box").mean(("chain", "draw")).values
    np.testing.assert_allclose(mean[:15], expected.values[:15], rtol=1e-6)
    assert (found["field"].sel(index="box")[:, :, :15].std(("chain", "draw")) < 1e-9).all()  # open water was observed
    assert np.abs(expected - whole).values[:15].max() > 0.05  # and its mean is another than that of the whole box
    np.testing.assert_allclose(found["observed"].sel(index="box").values[:15], 1.0)
    assert (found["field"].sel(index="box")[:, :, 15:30].std(("chain", "draw")) > 0).all()  # gaps are filled
    said = " ".join(index_sentences(found))
    assert "frozen at 15 of 60 times" in said
    assert "left out of its mean" in said
    table = index_table(summarise_indices(found))
    np.testing.assert_allclose(table["ice_share"][table["estimand"] == "field"], share)


def test_signal_of_open_water_is_that_of_its_cells(icy):
    tree, _, _ = icy
    found = box_indices(tree, BOX)["signal"].sel(index="box")
    draws, constant = read_draws(tree), tree["constant_data"].to_dataset()
    area, _ = box_overlap(constant["lat"].values, constant["lon"].values, parse_region("-5,5,190,205"), constant)
    weight = area[:, None] * ~constant["ice"].transpose("cell", "time").values
    weight = weight / weight.sum(0)
    whole = draws.fixed() + draws.patterns() @ draws.series().transpose(0, 2, 1)
    np.testing.assert_allclose(found.values.reshape(-1, 60), np.einsum("ct,sct->st", weight, whole), atol=1e-8)


def test_frozen_cells_are_filled_where_that_is_asked_for(icy):
    tree, data, _ = icy
    found = box_indices(tree, BOX, ice="filled")
    assert found.attrs["ice"] == "filled"
    field_, whole = found["field"].sel(index="box"), overlap(data, -5, 5, 190, 205)
    assert (field_[:, :, :15].std(("chain", "draw")) > 0).all()
    miss = (field_.mean(("chain", "draw")) - whole.values) / field_.std(("chain", "draw"))
    assert float(np.abs(miss[:15]).max()) < 4  # of open water the box would have held
    assert "filled by the model as open water" in " ".join(index_sentences(found))


def test_a_box_that_is_mostly_ice_is_refused(icy, complete, tmp_path):
    tree, _, _ = icy
    with pytest.raises(SummaryError, match=r"at 15 of 60 times more than 50% of the box 'north' is frozen, most, 100%"):
        box_indices(tree, ["north=2.5,5,190,205"])
    assert box_indices(tree, ["north=2.5,5,190,205"], ice="filled").sizes["time"] == 60
    with pytest.raises(SummaryError, match="ice='filled'"):
        indices_to_folder(tree, tmp_path / "new", boxes=["north=2.5,5,190,205"])
    assert not (tmp_path / "new").exists()
    assert "ice_share" not in box_indices(complete, BOX)
    with pytest.raises(SummaryError, match="left_out"):
        box_indices(complete, BOX, ice="melted")
