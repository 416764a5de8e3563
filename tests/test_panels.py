"""Modes of several results side by side."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from synthetic_modes import synthetic_result, toy_field
from typer.testing import CliRunner

from probmodels.bayesian_svd.patterns.panels import compare_patterns, mode_panels
from probmodels.bayesian_svd.summary import summarise_modes
from probmodels.cli import app
from probmodels.errors import SummaryError
from probmodels.inference.result import Result


@pytest.fixture(scope="module")
def trees():
    """The same waves with other noise, a smaller region of them, and patterns of noise."""
    field = toy_field()
    rough = field.copy(data=np.random.default_rng(5).standard_normal(field.shape)).where(field.notnull())
    return {
        "DJF": synthetic_result(field, rank=3),
        "JJA": synthetic_result(toy_field(3).isel(lon=slice(0, 10)), rank=2),
        "noise": synthetic_result(rough, rank=2),
    }


def test_patterns_of_one_climate_are_alike_and_those_of_noise_are_not(trees):
    found = compare_patterns(trees, num_draws=200)
    alike = found.sel(first="DJF", second="JJA")
    assert alike["common_cells"] == trees["JJA"]["constant_data"].sizes["cell"]
    assert alike["correlation_lower"][0, 0] > 0.9
    assert alike["correlation_mean"][0, 1] < 0.5
    assert np.isnan(alike["correlation_mean"][:, 2]).all()
    assert np.isnan(found["correlation_mean"].sel(first="DJF", second="DJF")).all()
    turned = found["correlation_mean"].sel(first="JJA", second="DJF").values
    assert np.allclose(turned, alike["correlation_mean"].values.T, equal_nan=True)
    assert found["correlation_mean"].sel(first="noise", second="DJF").max() < 0.6


def test_a_correlation_is_that_of_the_patterns_by_area(trees):
    """Every draw the same, so that the interval is a point."""
    one, two = (trees[name].copy() for name in ("DJF", "noise"))
    for tree in (one, two):
        posterior = tree["posterior"].to_dataset()
        tree["posterior"] = xr.DataTree(posterior.isel(chain=[0, 0], draw=[3, 3]).assign_coords(chain=[0, 1]))
    found = compare_patterns({"one": one, "two": two}, num_draws=10)
    maps = [summarise_modes(tree, check_draws=1)["mode_mean"] for tree in (one, two)]
    weight = np.cos(np.deg2rad(maps[0]["lat"])).broadcast_like(maps[0][0]).values
    seen = maps[0][0].notnull().values
    a, b = (x[0].values[seen] for x in maps)
    expected = np.cov(a, b, aweights=weight[seen])
    expected = abs(expected[0, 1]) / np.sqrt(expected[0, 0] * expected[1, 1])
    assert found["correlation_mean"].sel(first="one", second="two")[0, 0].item() == pytest.approx(expected, abs=1e-6)
    assert found["correlation_sd"].max() < 1e-9


def test_panels_share_their_colours(trees):
    summaries = {name: summarise_modes(tree, check_draws=2) for name, tree in trees.items()}
    figure = mode_panels(summaries, mode=2)
    meshes = [ax.collections[0] for ax in figure.axes[:3]]
    assert len({mesh.get_clim() for mesh in meshes}) == 1
    assert figure.axes[0].get_title(loc="left").startswith("DJF: ")
    assert not figure.axes[3].get_visible()
    with pytest.raises(SummaryError, match="'JJA' has 2 modes"):
        mode_panels(summaries, mode=3)
    other = summaries["JJA"].copy()
    other["mode_mean"] = other["mode_mean"].assign_attrs(units="hPa")
    with pytest.raises(SummaryError, match="one unit"):
        mode_panels({"a": summaries["DJF"], "b": other})


def test_what_cannot_be_compared_is_refused(trees):
    far = synthetic_result(toy_field().assign_coords(lon=toy_field()["lon"] + 3), rank=2, num_draws=5)
    with pytest.raises(SummaryError, match="share 0 cells"):
        compare_patterns({"a": trees["DJF"], "b": far})
    for wrong in ({"a": trees["DJF"]}, [], None, "ab"):
        with pytest.raises(SummaryError, match="trees"):
            compare_patterns(wrong)
    for wrong in (0, -1, 1.5, True, "3", 10**30):
        with pytest.raises(SummaryError, match="mode="):
            mode_panels({"a": summarise_modes(trees["DJF"], check_draws=1)}, mode=wrong)


def saved(trees, folder):
    for name, tree in trees.items():
        tree = tree.copy()
        tree.attrs["method"] = "bayesian_svd"
        Result(tree).save(folder / name)
    return [str(folder / name) for name in trees]


def test_the_command_draws_seasons_side_by_side_and_correlates_them(trees, tmp_path):
    folders = saved(trees, tmp_path)
    page, table = tmp_path / "page.png", tmp_path / "page.csv"
    found = CliRunner().invoke(app, ["panels", *folders, "--out", str(page), "--table", str(table)])
    assert found.exit_code == 0, found.output
    assert page.read_bytes().startswith(b"\x89PNG")
    frame = pd.read_csv(table).set_index(["first", "second", "mode", "other_mode"])
    assert len(frame) == 3 * 2 + 3 * 2 + 2 * 2  # modes of each pair
    mean = frame.loc[("DJF", "JJA", 1, 1), "correlation_mean"]
    assert mean > 0.9
    assert f"DJF and JJA: correlation {mean:.2f} [" in found.output
    again = CliRunner().invoke(app, ["panels", *folders, "--out", str(page)])
    assert "exists already" in str(again.exception)


def test_results_on_other_grids_are_refused_and_other_regions_are_only_drawn(trees, tmp_path):
    field = toy_field()
    between = synthetic_result(field.assign_coords(lon=field["lon"] + 0.3), rank=2, num_draws=5)
    west, east = (synthetic_result(field.isel(lon=part), rank=2) for part in (slice(0, 5), slice(-5, None)))
    saved({"DJF": trees["DJF"], "between": between, "west": west, "east": east}, tmp_path)
    folders = {name: str(tmp_path / name) for name in ("DJF", "between", "west", "east")}
    page = tmp_path / "page.png"
    refused = CliRunner().invoke(app, ["panels", folders["DJF"], folders["between"], "--out", str(page)])
    assert "cover the same region on different grids" in str(refused.exception)
    assert not page.exists()
    drawn = CliRunner().invoke(app, ["panels", folders["west"], folders["east"], "--out", str(page)])
    assert drawn.exit_code == 0, drawn.output
    assert "patterns are drawn, not correlated" in drawn.output
    table = ["--table", str(tmp_path / "t.csv"), "--overwrite"]
    refused = CliRunner().invoke(app, ["panels", folders["west"], folders["east"], "--out", str(page), *table])
    assert "nothing to correlate" in str(refused.exception)
