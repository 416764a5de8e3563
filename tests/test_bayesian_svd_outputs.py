"""What a run of the Bayesian SVD writes besides maps: local variance, trends, tables, the first figure."""

from __future__ import annotations

import json
import re

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from synthetic_modes import synthetic_result, toy_field

from probmodels.bayesian_svd import make_problem, write_outputs
from probmodels.bayesian_svd.eof import compare_eof
from probmodels.bayesian_svd.figures import leading_modes, local_variance_maps, trend_map
from probmodels.bayesian_svd.indices import el_nino_sentences, el_nino_table
from probmodels.bayesian_svd.maps import uncertain_sign
from probmodels.bayesian_svd.patterns.draw_maps import draw_maps
from probmodels.bayesian_svd.patterns.local import local_variance, trend_maps
from probmodels.bayesian_svd.reporting.citing import bibtex, data_set, methods_paragraphs
from probmodels.bayesian_svd.reporting.tables import effect_tables, mode_tables
from probmodels.bayesian_svd.summary import summarise_modes
from probmodels.datasets.fetch import SOURCES
from probmodels.datasets.sst import load_sst
from probmodels.errors import SummaryError
from probmodels.inference import run_mcmc
from probmodels.inference.result import Result


def population(seed: int = 0) -> xr.DataTree:
    """The synthetic result as one of the population: series of unit variance, a trend at each cell."""
    tree = synthetic_result(toy_field(seed), seed=seed)
    posterior, constant = tree["posterior"].to_dataset(), tree["constant_data"].to_dataset()
    rng = np.random.default_rng(seed)
    chains, draws, num_times = posterior.sizes["chain"], posterior.sizes["draw"], constant.sizes["time"]
    series = np.einsum("tr,cdrk->cdtk", constant["basis_time_matrix"].values, posterior["V"].values)
    posterior["F"] = ("chain", "draw", "time", "mode"), np.sqrt(num_times) * series
    posterior["d"] = posterior["d"] / np.sqrt(num_times)
    posterior["autocorrelation"] = ("chain", "draw", "mode"), np.full((chains, draws, posterior.sizes["mode"]), 0.3)
    effects = np.zeros((chains, draws, constant.sizes["cell"], 2))
    effects[..., 1] = 0.1 * np.linspace(-3, 3, constant.sizes["cell"]) + 0.1 * rng.standard_normal(effects.shape[:3])
    posterior["fixed_effects"] = ("chain", "draw", "cell", "effect"), effects
    constant["time_steps"] = "step", np.ones(num_times - 1)
    constant = constant.assign_coords(effect=["intercept", "trend"])
    groups = {"posterior": posterior.drop_vars("V"), "constant_data": constant}
    found = xr.DataTree.from_dict(groups)
    found.attrs = tree.attrs
    return found


@pytest.fixture(scope="module")
def tree() -> xr.DataTree:
    return population()


def test_shares_of_a_cell_are_those_of_each_draw(tree):
    local = local_variance(tree)
    posterior, constant = tree["posterior"].to_dataset(), tree["constant_data"].to_dataset()
    assert local.attrs["estimand"] == "modes of the population"
    cell = 7
    at = {"lat": constant["lat"].values[cell], "lon": constant["lon"].values[cell]}
    shares = []
    for chain in range(posterior.sizes["chain"]):
        for draw in range(posterior.sizes["draw"]):
            one = posterior.isel(chain=chain, draw=draw)
            own = (constant["basis_space_matrix"].values[cell] @ one["U"].values * one["d"].values) ** 2
            shares.append(own / (own.sum() + float(one["sigma"]) ** 2))  # the area weight cancels
    found = local.sel(at)
    np.testing.assert_allclose(found["local_fraction_mean"], np.mean(shares, axis=0), rtol=1e-9)
    np.testing.assert_allclose(found["local_fraction_upper"], np.quantile(shares, 0.975, axis=0), rtol=1e-9)
    np.testing.assert_allclose(found["modes_fraction_mean"], np.sum(shares, axis=1).mean(), rtol=1e-9)


def test_shares_of_these_times_are_those_of_the_field():
    field = toy_field()
    local = local_variance(synthetic_result(field))
    assert local.attrs["estimand"] == "modes of these times"
    t = np.linspace(-1, 1, field.sizes["time"])
    design = np.linalg.qr(np.stack([np.ones_like(t), t], axis=1))[0]
    values = field.stack(cell=("lat", "lon")).transpose("time", "cell").dropna("cell").values
    rest = values - design @ (design.T @ values)
    noise = 1 - 0.2**2 / rest.var(axis=0, ddof=2)
    found = local["modes_fraction_mean"].stack(cell=("lat", "lon")).dropna("cell").values
    strong = noise > 0.5
    assert strong.sum() > 30
    np.testing.assert_allclose(found[strong], noise[strong], atol=0.12)


def test_a_trend_whose_sign_is_known_has_no_dot(tree):
    trend = trend_maps(tree)
    values = tree["posterior"]["fixed_effects"].values[..., 1]
    constant = tree["constant_data"].to_dataset()
    for cell in (0, 40, 80):
        at = trend.sel(lat=constant["lat"].values[cell], lon=constant["lon"].values[cell])
        assert float(at["trend_mean"]) == pytest.approx(values[..., cell].mean())
        assert float(at["trend_prob_positive"]) == pytest.approx((values[..., cell] > 0).mean())
    assert trend["trend_mean"].attrs["units"] == "degC (10 year)-1"
    assert trend["trend_mean"].attrs["long_name"] == "linear trend of the population, posterior mean"
    dots = uncertain_sign(trend["trend_prob_positive"])
    known = np.abs(trend["trend_mean"]) > 0.25  # 2.5 standard deviations
    assert not bool((dots & known).any())
    assert int((dots & (np.abs(trend["trend_mean"]) < 0.05)).sum()) > 5
    assert not bool((dots & trend["trend_mean"].isnull()).any()), "land has no dots"


def test_without_a_trend_there_is_no_map_of_one(tree):
    groups = {name: tree[name].to_dataset() for name in ("posterior", "constant_data")}
    groups["posterior"] = groups["posterior"].isel(effect=[0])
    groups["constant_data"] = groups["constant_data"].isel(effect=[0])
    without = xr.DataTree.from_dict(groups)
    assert not trend_maps(without).data_vars
    assert "trend" not in effect_tables(local_variance(without), trend_maps(without))
    with pytest.raises(SummaryError, match="level=95"):
        trend_maps(tree, level=95)


def test_figures_name_what_they_show(tree):
    modes, local, trend = summarise_modes(tree), local_variance(tree), trend_maps(tree)
    page = leading_modes(modes, compare_eof(tree, modes), most=2)
    titles = [ax.get_title(loc="left") for ax in page.axes]
    assert "Mode 1 of the population" in titles
    assert not any("Mode 3" in title for title in titles)
    assert any("share of the variance" in title and "of the population" in title for title in titles)
    shown = [text.get_text() for ax in page.axes for text in ax.texts]
    mean, low, high = (100 * float(modes[f"explained_variance_fraction_{x}"][1]) for x in ("mean", "lower", "upper"))
    assert f"{mean:.1f} % [{low:.1f}, {high:.1f}]" in shown
    shares = local_variance_maps(local)
    assert shares.axes[0].get_title(loc="left") == "Mode 1: share of the variance of the population"
    assert trend_map(trend).axes[0].get_title(loc="left") == "linear trend of the population, posterior mean"


def test_tables_hold_the_numbers_of_the_figures(tree):
    summaries = []
    for of in ("population", "times"):
        modes = summarise_modes(tree, of=of)
        summaries.append((modes, compare_eof(tree, modes)))
    tables = mode_tables(*summaries)
    pcs, shares = tables["principal_components"], tables["explained_variance"]
    assert list(pcs["estimand"].unique()) == ["modes of the population", "modes of these times"]
    row = pcs[(pcs["estimand"] == "modes of these times") & (pcs["mode"] == 2)].iloc[5]
    expected = summaries[1][0].sel(mode=2).isel(time=5)
    assert row["time"] == str(expected["time"].values)[:10]
    assert row["upper"] == float(expected["pc_upper"])
    assert row["eof"] == float(summaries[1][1]["eof_pc"].sel(mode=2).isel(time=5))
    assert shares["fraction_lower"][0] == float(summaries[0][0]["explained_variance_fraction_lower"][0])
    assert shares["autocorrelation_mean"].isna().tolist() == [False] * 3 + [True] * 3  # of the population alone
    cells = effect_tables(local_variance(tree), trend_maps(tree))
    num_cells = tree["constant_data"].sizes["cell"]
    assert len(cells["trend"]) == num_cells
    assert set(cells["trend"]["units"]) == {"degC per decade"}
    assert cells["local_variance"]["mode"].value_counts().to_dict() == dict.fromkeys(("1", "2", "3", "all"), num_cells)


def test_all_is_written_and_keeps_to_the_cf_conventions(tree, tmp_path):
    checker = pytest.importorskip("compliance_checker.runner")
    tree = tree.copy()
    tree.attrs |= {"method": "bayesian_svd", "engine": "mcmc"}
    write_outputs(Result(tree), tmp_path, dpi=30)
    for name in ("leading_modes", "local_variance", "trend", "pcs", "scree", "mode_maps"):
        assert (tmp_path / "figures" / f"{name}.png").stat().st_size > 0
        assert (tmp_path / "figures" / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    for name in ("principal_components", "explained_variance", "local_variance", "trend"):
        assert len(pd.read_csv(tmp_path / "tables" / f"{name}.csv")) > 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.index("figure-leading_modes") < page.index("figure-mode_maps")
    checker.CheckSuite.load_all_available_checkers()
    with xr.open_dataset(tmp_path / "modes.nc") as file:
        assert {"local_fraction_mean", "trend_prob_positive"} <= set(file)
    passed, errors = checker.ComplianceChecker.run_checker(
        str(tmp_path / "modes.nc"), ["cf:1.11"], 0, "normal", output_filename=str(tmp_path / "cf.txt")
    )
    assert (passed, errors) == (True, False), (tmp_path / "cf.txt").read_text()


def told(tree: xr.DataTree, **attrs: object) -> xr.DataTree:
    """The same with attributes of the data, and options of the method, as a run keeps them."""
    found = tree.copy(deep=True)
    found["constant_data"]["data"].attrs |= attrs
    options = {"rank": 3, "series": "ar1", "kernel_space": "matern72"}
    spec = {"inference": {"warmup_steps": 250, "thin": 2}}
    found.attrs |= {"options": json.dumps(options), "spec": json.dumps(spec), "kernel": "SeriesGibbs", "seed": 7}
    return found


def test_a_methods_section_says_what_was_done(tree):
    known = told(
        tree, long_name="sea surface temperature anomaly", title="NOAA ERSSTv5", season="DJF", base_period="1971/2000"
    )
    known["constant_data"]["data"].values[3, 4] = np.nan
    ice = "12 values at or below -1.79 degC are taken for sea ice; masked."
    known["constant_data"]["data"].attrs["mends"] = json.dumps(["Units were read as degC.", ice])
    found = Result(known)
    modes = summarise_modes(known, check_draws=5)
    data, model, sampler = methods_paragraphs(known, modes, found.diagnose())
    for words in (
        "from ERSST v5 (Huang et al., 2017)",
        "means over December to February, 1970-01 to 2009-",
        "anomalies from the mean seasonal cycle of 1971/2000",
        "left out of the likelihood",
        ice,
        "weighted by their area",
    ):
        assert words in data
    assert "Units were read" not in data
    assert "fixed effects of each cell (intercept, trend), 3 modes" in model
    assert "Matérn-7/2" in model
    assert "autoregressive processes" in model
    assert "noise, independent between cells and times" in model
    assert "modes of the population" in model
    assert "2 chains of 50 draws after 250 sweeps of warm-up, one of 2 sweeps kept, seed 7" in sampler
    worst = max(float(found.diagnose().table["r_hat_max"].max()), float(modes["mode_r_hat"].max()))
    assert f"R-hat (Vehtari et al., 2021), of all variables and maps, is {worst:.3f}" in sampler
    bad = modes.assign(mode_r_hat=modes["mode_r_hat"] + 0.5, mode_ess=modes["mode_ess"] * 0 + 7)
    for summaries in ({"modes": bad}, {"modes": modes, "these": bad}):  # the paragraph is no milder than the tables
        sampler = methods_paragraphs(known, diagnosis=found.diagnose(), **summaries)[2]
        assert f"is {float(bad['mode_r_hat'].max()):.3f}, the smallest bulk effective sample size 7." in sampler


def test_noise_that_is_correlated_is_said(tree):
    known = told(tree)
    noise = {"noise_kernel": "matern32", "noise_length_scale": 812.3, "noise_share": 0.63, "noise_decay": 0.25}
    known["constant_data"].attrs |= noise
    model = methods_paragraphs(known, summarise_modes(tree, check_draws=5))[1]
    assert "independent" not in model
    for words in ("63 %", "Matérn-3/2, length-scale 812 km", "correlation of 0.25 between neighbouring times"):
        assert words in model


def test_what_is_not_known_is_not_said(tree):
    bare = tree.copy(deep=True)
    bare.attrs = {}
    bare["constant_data"]["data"].attrs = {"units": "1"}
    modes = summarise_modes(bare, check_draws=5)
    text = " ".join(methods_paragraphs(bare, modes))
    for words in ("ERSST", "region", "season", "seed", "R-hat", "None", "nan", " ,", "  "):
        assert words not in text
    assert data_set(bare) is None
    assert "huang" not in bibtex(bare)
    assert bibtex(bare).count("@") == 3


@pytest.mark.parametrize(
    ("attrs", "expected"),
    [
        ({"source_files": '[{"name": "sst_ndjfm_anom.nc", "sha256": "a"}]'}, "eofs"),
        ({"source_files": '[{"name": "HadISST_sst.nc", "sha256": "a"}]'}, "hadisst"),
        ({"title": "NOAA 1/4° Daily Optimum Interpolation SST"}, "oisst"),
        ({"title": "COBE-SST 2"}, "cobe2"),
        ({"source_files": "no json", "title": "my field"}, None),
    ],
)
def test_public_data_sets_are_cited(tree, attrs, expected):
    found = told(tree, **({"title": ""} | attrs))
    assert data_set(found) == expected
    entries = bibtex(found)
    assert entries.count("{") == entries.count("}")
    assert entries.count("@") == 3 + (expected is not None)


def test_every_data_set_that_can_be_fetched_has_an_entry():
    for name, source in SOURCES.items():
        tree = xr.DataTree()
        tree.attrs["spec"] = json.dumps({"data": {"name": "sst", "path": name}})
        doi = re.search(r"10\.\S+", source.citation).group()
        assert doi in bibtex(tree)


def tropics(seed: int = 0) -> xr.DataTree:
    """A field over the equator whose first mode is the index of Niño 3.4 at winters dated by their January."""
    rng = np.random.default_rng(seed)
    lat, lon = np.arange(-12.5, 15.0, 5.0), np.arange(152.5, 280.0, 5.0)
    index = np.array([2.0, -2.0, 0.0, 1.0, -1.0] * 6)
    shape = np.exp(-((lat[:, None] / 8) ** 2) - ((lon[None, :] - 220) / 40) ** 2)
    other = np.sin(np.deg2rad(lon))[None, :] * np.sign(lat)[:, None]
    field = index[:, None, None] * shape + 0.5 * rng.standard_normal(30)[:, None, None] * other
    field += 0.1 * rng.standard_normal(field.shape)
    time = (np.datetime64("1970-01", "M") + 12 * np.arange(30)).astype("datetime64[ns]")
    coords = {"time": time, "lat": lat, "lon": lon}
    tree = synthetic_result(xr.DataArray(field, coords, ("time", "lat", "lon"), attrs={"units": "degC"}), rank=2)
    posterior, constant = tree["posterior"].to_dataset(), tree["constant_data"].to_dataset()
    shape = (posterior.sizes["chain"], posterior.sizes["draw"], constant.sizes["cell"], 2)
    posterior["fixed_effects"] = ("chain", "draw", "cell", "effect"), np.zeros(shape)
    constant["data"].attrs["frequency"] = "yearly"
    found = xr.DataTree.from_dict({"posterior": posterior, "constant_data": constant})
    found.attrs = tree.attrs
    return found


def test_winters_of_el_nino_are_named_with_both_their_years():
    tree = tropics()
    table = el_nino_table(tree, summarise_modes(tree, check_draws=5))
    assert table["time"][:2].tolist() == ["1969/70", "1970/71"]
    np.testing.assert_allclose(table["mean"], np.array([2.0, -2.0, 0.0, 1.0, -1.0] * 6) / np.sqrt(2), atol=0.15)
    assert (table["prob_el_nino"][[0, 3]] > 0.99).all()
    assert (table["prob_la_nina"][[1, 4]] > 0.99).all()
    assert table[["prob_el_nino", "prob_la_nina"]].loc[2].max() < 0.01, "a winter between the two is neither"
    assert table.attrs["mode"] == 1
    first, warm, cold = el_nino_sentences(table)
    assert "Mode 1 goes with the index" in first
    assert "1969/70 (1.00)" in warm
    assert "1970/71" not in warm
    assert "1970/71 (1.00)" in cold
    strict = el_nino_table(tree, summarise_modes(tree, check_draws=5), threshold=1.0)
    assert strict["prob_el_nino"][3] < 0.05
    assert strict["prob_el_nino"][0] > 0.99


def test_nothing_is_said_of_el_nino_where_the_field_does_not_reach_it(tree):
    table = el_nino_table(tree, summarise_modes(tree, check_draws=5))
    assert table.empty
    assert el_nino_sentences(table) == []


@pytest.mark.slow
def test_the_known_winters_of_el_nino_are_found_in_the_embedded_field():
    """Against the list of NOAA; weak events, and winters beside the bound, may be either."""
    data = load_sst()
    problem = make_problem(data, rank=4, fixed_effects=["intercept", "trend"], series="ar1")
    result = run_mcmc(problem, num_samples=150, warmup_steps=100, num_chains=2, progress=False)
    modes = summarise_modes(result.tree, check_draws=5)
    table = el_nino_table(result.tree, modes).set_index("time")
    strong = ["1965/66", "1972/73", "1982/83", "1986/87", "1987/88", "1991/92", "1997/98", "2002/03", "2009/10"]
    assert (table["prob_el_nino"][strong] > 0.9).all()
    assert (table["prob_la_nina"][["1970/71", "1973/74", "1975/76", "1988/89", "1999/00", "2007/08"]] > 0.9).all()
    assert (table["prob_el_nino"] > 0.9).sum() <= len(strong) + 4


def test_maps_of_draws_are_those_that_the_summary_reduces(tree):
    """Of the population and of these times, on the grid."""
    for of in ("population", "times"):
        maps, modes = draw_maps(tree, of=of, num_draws=100_000), summarise_modes(tree, of=of, check_draws=5)
        np.testing.assert_allclose(maps["pattern"].mean("draw"), modes["mode_mean"], atol=1e-9)
        np.testing.assert_allclose(
            maps["pattern"].quantile(0.975, "draw", skipna=False), modes["mode_upper"], atol=1e-9
        )
        np.testing.assert_allclose(maps["pc"].mean("draw"), modes["pc_mean"], atol=1e-9)
        assert maps.attrs["estimand"] == modes.attrs["estimand"]
    with pytest.raises(SummaryError, match=r"of='years'"):
        draw_maps(tree, of="years")
    assert draw_maps(tree, num_draws=3).sizes["draw"] == 3
