"""Modes of several results side by side."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from synthetic_modes import synthetic_result, toy_field

from probmodels.bayesian_svd.patterns.panels import compare_patterns, mode_panels
from probmodels.bayesian_svd.summary import summarise_modes
from probmodels.errors import SummaryError


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
