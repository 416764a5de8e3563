"""Figures: what their axes show, that they draw finite images, and that they leave matplotlib's state alone."""

from __future__ import annotations

from io import BytesIO

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection, PathCollection, PolyCollection, QuadMesh
from matplotlib.figure import Figure
from synthetic_modes import synthetic_result, toy_field

from probmodels import plots
from probmodels.bayesian_svd import figures as mode_figures, maps as _maps
from probmodels.bayesian_svd.summary import compare_eof, summarise_modes
from probmodels.errors import DataError, ResultError

RANKED = pd.DataFrame(
    {"elpd_diff": [0.0, -3.0, -20.0], "diff_se": [0.0, 2.5, 4.0], "weight": [0.7, 0.3, 0.0]},
    index=["rank 4", "rank 3", "a model of another name"],
)


OBSERVED = xr.Dataset({"y": ("obs", np.linspace(-1.0, 1.0, 40)), "count": ("obs", np.arange(40) % 5)})


def replicated(scale: float = 0.6) -> xr.Dataset:
    rng = np.random.default_rng(0)
    y, count = scale * rng.normal(size=(2, 60, 40)), rng.poisson(2.0, size=(2, 60, 40))
    return xr.Dataset({"y": (("chain", "draw", "obs"), y), "count": (("chain", "draw", "obs"), count)})


def bilevel_fit() -> xr.Dataset:
    """Seven steps in three rounds, of which the last was broken off; the second was the best."""
    return xr.Dataset(
        {
            "round": ("step", [0, 0, 0, 1, 1, 2, 2]),
            "inner_loss": ("step", [9.0, 6.0, 5.0, 8.0, 4.0, 7.0, 3.0]),
            "outer_loss": ("step", [3.0, 2.0, 1.5, 2.5, 1.0, 2.4, 1.1]),
            "log_loss": ("judged_round", [0.7, 0.4]),
        },
        attrs={"best_round": 1},
    )


@pytest.fixture(scope="module")
def tree():
    return synthetic_result(toy_field())


@pytest.fixture(scope="module")
def modes(tree):
    return summarise_modes(tree)


@pytest.fixture(scope="module")
def comparison(tree, modes):
    return compare_eof(tree, modes)


def pixels(figure: Figure) -> np.ndarray:
    figure.set_dpi(50)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def overlapping_titles(figure: Figure) -> list[tuple[str, str]]:
    """Pairs of titles, axis and tick labels that cover one another."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    boxes = []
    for ax in figure.axes:
        if not ax.get_visible():
            continue
        texts = [ax._left_title, ax.title, ax.xaxis.label, ax.yaxis.label]
        for axis, limits in ((ax.xaxis, ax.get_xlim()), (ax.yaxis, ax.get_ylim())):
            ticks = axis.get_major_ticks()
            texts += [tick.label1 for tick in ticks if min(limits) <= tick.get_loc() <= max(limits)]
        boxes += [
            (t.get_text(), t.get_window_extent(renderer).shrunk(0.9, 0.9))
            for t in texts
            if t.get_visible() and t.get_text()
        ]
    return [(a, b) for i, (a, first) in enumerate(boxes) for b, second in boxes[i + 1 :] if first.overlaps(second)]


def joined(modes: xr.Dataset) -> xr.Dataset:
    """The same with the first two modes in a plane."""
    square = (modes["mode_mean"][:2] ** 2).sum("mode", skipna=False).expand_dims("plane").assign_attrs(units="degC2")
    found = modes.assign({f"plane_variance_{k}": square * x for k, x in {"mean": 1, "lower": 0.5, "upper": 2}.items()})
    found["plane_variance_mean"].attrs["units"] = "degC2"
    whole = {"plane_first_mode": 1, "plane_last_mode": 2, "plane_determined": 1, "plane_fraction_mean": 0.5}
    return found.assign({name: ("plane", [value]) for name, value in whole.items()})


def draw_all(tree, modes, comparison) -> dict[str, Figure]:
    posterior = tree["posterior"].to_dataset()
    r_hat = xr.Dataset({"U": modes["mode_r_hat"], "d": ("k", [1.0, 1.02, np.nan])})
    shares = xr.Dataset({f"local_fraction_{x}": np.abs(modes["mode_mean"]) / 10 for x in ("mean", "lower", "upper")})
    shares = shares.assign(
        {f"modes_fraction_{x}": shares[f"local_fraction_{x}"].sum("mode") for x in ("mean", "lower")}
    )
    shares["modes_fraction_upper"] = shares["modes_fraction_mean"]
    named = modes["mode_mean"][0].assign_attrs(long_name="linear trend", units="degC (10 year)-1")
    trend = xr.Dataset({"trend_mean": named, "trend_prob_positive": modes["prob_positive"][0]})
    return {
        "leading_modes": mode_figures.leading_modes(modes, comparison),
        "local_variance_maps": mode_figures.local_variance_maps(shares),
        "trend_map": mode_figures.trend_map(trend),
        "plane_maps": mode_figures.plane_maps(joined(modes)),
        "mode_maps": mode_figures.mode_maps(modes),
        "pcs": mode_figures.pcs(modes, comparison),
        "scree": mode_figures.scree(modes, comparison),
        "residual_maps": mode_figures.residual_maps(modes),
        "eof_difference": mode_figures.eof_difference(modes, comparison),
        "plot_trace": plots.plot_trace(posterior),
        "rank": plots.rank(posterior),
        "forest": plots.forest(posterior),
        "predictive_check": plots.predictive_check(OBSERVED, replicated()),
        "rhat_map": mode_figures.rhat_map(modes),
        "rhat_histogram": plots.rhat_histogram(r_hat),
        "loss": plots.loss(tree["fit"].to_dataset()),
        "bilevel_losses": plots.bilevel_losses(bilevel_fit()),
        "ranking": plots.ranking(RANKED),
        "image_grid": plots.image_grid(np.random.default_rng(0).random((2, 5, 8, 8)), "images", [["a"] * 5] * 2),
    }


@pytest.fixture(scope="module")
def figures(tree, modes, comparison):
    import matplotlib.pyplot as plt

    before, known = dict(mpl.rcParams), plt.get_fignums()
    out = draw_all(tree, modes, comparison)
    assert plt.get_fignums() == known, "pyplot has no figure of ours"
    assert dict(mpl.rcParams) == before, "no setting of matplotlib is touched"
    return out


def test_every_figure_draws_something_and_nothing_overlaps(figures):
    assert set(figures) == {*plots.__all__, *mode_figures.__all__}
    for name, figure in figures.items():
        assert type(figure) is Figure
        image = pixels(figure)
        assert len(np.unique(image.reshape(-1, 3), axis=0)) > 20, name
        assert overlapping_titles(figure) == [], name


def test_mode_maps_show_mean_and_sd_with_their_scales(figures, modes):
    figure = figures["mode_maps"]
    maps = [
        ax for ax in figure.axes if any(isinstance(c, QuadMesh) for c in ax.collections) and ax.get_title(loc="left")
    ]
    assert len(maps) == 6
    first = float(100 * modes["explained_variance_fraction_mean"][0])
    assert maps[0].get_title(loc="left").startswith(f"Mode 1 of these times: {first:.1f} % of variance [")
    assert maps[1].get_title(loc="left") == "posterior sd"
    for i in range(3):
        mean, sd = (next(c for c in ax.collections if isinstance(c, QuadMesh)) for ax in maps[2 * i : 2 * i + 2])
        assert mean.get_clim()[0] == -mean.get_clim()[1], "red and blue are balanced"
        assert mean.get_cmap().name == "RdBu_r"
        assert sd.get_clim()[1] >= 2 * sd.get_clim()[0] > 0, "an even field does not look rough"
        np.testing.assert_allclose(mean.get_array().filled(np.nan), modes["mode_mean"][i].values)
        assert any(isinstance(c, LineCollection) for c in maps[2 * i].collections), "a coast"
    labels = [ax.get_ylabel() for ax in figure.axes if not ax.get_title(loc="left")]
    assert labels == ["°C per sd of PC"] * 6


@pytest.mark.parametrize("draw", [mode_figures.mode_maps, mode_figures.leading_modes])
def test_dots_mark_cells_of_uncertain_sign(modes, draw):
    shown = modes.copy()
    shown["prob_positive"] = xr.full_like(modes["prob_positive"], 0.99)
    shown["prob_positive"][0, 1, 1] = 0.01
    shown["prob_positive"][0, 2, 3] = 0.94
    shown["prob_positive"][0, 4, 5] = 0.06
    shown["prob_positive"][0, 0, 0] = np.nan
    ax = draw(shown).axes[0]
    (dots,) = (c for c in ax.collections if isinstance(c, PathCollection))
    at = {tuple(x) for x in np.asarray(dots.get_offsets())}
    expected = {(float(modes["lon"][j]), float(modes["lat"][i])) for i, j in ((2, 3), (4, 5))}
    assert at == expected


@pytest.mark.parametrize("west", [120.0, -180.0, -20.0, 300.0])
def test_coast_follows_the_longitudes_of_the_map(west):
    """A point in the middle of land is covered, one in the middle of an ocean is not, whatever the convention."""
    figure = Figure()
    ax = figure.subplots()
    extent = (west, west + 180, -60.0, 75.0)
    _maps.map_axes(ax, extent)
    land = [path for c in ax.collections if isinstance(c, PolyCollection) for path in c.get_paths()]
    places = {(100.0, 60.0): True, (25.0, 0.0): True, (-100.0, 45.0): True, (134.0, -24.0): True}
    places |= {(-140.0, 0.0): False, (180.0, 30.0): False, (-30.0, 0.0): False, (75.0, -25.0): False}
    tried = 0
    for (lon, lat), expected in places.items():
        inside = (lon - west) % 360 + west
        if inside < west + 180:
            tried += 1
            assert any(path.contains_point((inside, lat)) for path in land) == expected, (lon, lat)
    assert tried >= 3
    assert ax.get_xlim() == (west, west + 180)


def test_coast_has_no_line_along_the_date_line():
    _, lines = _maps.coast()
    for line in lines:
        seam = np.abs(np.abs(line[:, 0]) - 180) < 0.02
        assert not (seam[1:] & seam[:-1]).any()
    assert np.abs(np.diff(np.concatenate([line[:, 0] for line in lines[:1]]))).max() < 30


@pytest.mark.parametrize(
    ("value", "label"),
    [(120, "120°E"), (180, "180°"), (240, "120°W"), (-120, "120°W"), (360, "0°"), (0, "0°"), (190.5, "169.5°W")],
)
def test_longitudes_are_named(value, label):
    assert _maps.longitude(value) == label


def test_latitudes_are_named():
    assert [_maps.latitude(x) for x in (-20, 0, 35)] == ["20°S", "EQ", "35°N"]


def test_map_has_the_true_aspect_in_its_middle(figures):
    ax = figures["mode_maps"].axes[0]
    middle = np.mean(ax.get_ylim())
    assert ax.get_aspect() == pytest.approx(1 / np.cos(np.deg2rad(middle)))


def test_scree_and_pcs_hold_the_numbers(figures, modes, comparison):
    ax = figures["scree"].axes[0]
    ours = ax.containers[0][0].get_ydata()
    np.testing.assert_allclose(ours, 100 * modes["explained_variance_fraction_mean"])
    theirs = ax.containers[1][0].get_ydata()
    np.testing.assert_allclose(theirs, 100 * comparison["eof_fraction"])
    axes = figures["pcs"].axes
    assert [ax.get_title(loc="left")[:4] for ax in axes] == ["PC 1", "PC 2", "PC 3"]
    np.testing.assert_allclose(axes[1].lines[-1].get_ydata(), modes["pc_mean"][1])


def test_calendars_without_datetime64_are_drawn_as_years(modes):
    cftime = pytest.importorskip("cftime")
    times = [cftime.Datetime360Day(1950 + i, 1, 15) for i in range(modes.sizes["time"])]
    figure = mode_figures.pcs(modes.assign_coords(time=times))
    assert figure.axes[0].lines[1].get_xdata()[0] == pytest.approx(1950, abs=0.1)


def test_cells_without_a_grid_or_position_are_drawn(tree):
    constant = tree["constant_data"].to_dataset()
    rng = np.random.default_rng(0)
    cells = constant.sizes["cell"]
    scattered = constant.assign_coords(
        lat=("cell", rng.uniform(20, 60, cells)), lon=("cell", rng.uniform(120, 240, cells))
    )
    for changed in (scattered, constant.drop_vars(["lat", "lon"])):
        groups = {"posterior": tree["posterior"].to_dataset(), "constant_data": changed}
        modes = summarise_modes(xr.DataTree.from_dict(groups), check_draws=10)
        for figure in (mode_figures.mode_maps(modes), mode_figures.residual_maps(modes)):
            assert len(np.unique(pixels(figure).reshape(-1, 3), axis=0)) > 20


def test_chosen_variables_and_their_limit(tree):
    posterior = tree["posterior"].to_dataset()
    figure = plots.plot_trace(posterior, ["sigma", "d"], most=3)
    assert [ax.get_ylabel() for ax in figure.axes[::2]] == ["sigma", "d[0]", "d[1]"]
    with pytest.raises(ResultError, match="no 'sigm'; did you mean 'sigma'"):
        plots.plot_trace(posterior, ["sigm"])


def test_ranks_of_equal_chains_stay_within_the_band(tree):
    rng = np.random.default_rng(0)
    posterior = xr.Dataset({"x": (("chain", "draw"), rng.normal(size=(2, 2000)))})
    ax = plots.rank(posterior, num_bins=10).axes[0]
    counts = np.array([patch.get_data().values for patch in ax.patches if hasattr(patch, "get_data")])
    assert counts.sum() == 4000
    assert (np.abs(counts - 200) < 4.5 * np.sqrt(200)).all()


def test_single_chain_has_no_rhat_map(modes):
    with pytest.raises(KeyError, match="single chain"):
        mode_figures.rhat_map(modes.drop_vars("mode_r_hat"))


def test_figures_can_be_saved_without_a_display(figures):
    buffer = BytesIO()
    figures["scree"].savefig(buffer, format="png", dpi=50)
    assert buffer.getvalue().startswith(b"\x89PNG")


def test_ranking_holds_the_numbers_best_on_top(figures):
    left, right = figures["ranking"].axes
    points, _, (bars,) = left.containers[0]
    np.testing.assert_allclose(points.get_xdata(orig=False), RANKED["elpd_diff"])
    widths = [float(segment[1][0] - segment[0][0]) for segment in bars.get_segments()]
    np.testing.assert_allclose(widths, 4 * RANKED["diff_se"])
    assert [label.get_text() for label in left.get_yticklabels()] == list(RANKED.index)
    assert left.get_ylim()[0] > left.get_ylim()[1]
    np.testing.assert_allclose([bar.get_width() for bar in right.patches], RANKED["weight"])


def test_losses_of_a_bilevel_program_stand_at_their_steps_and_the_best_round_is_marked():
    figure = plots.bilevel_losses(bilevel_fit())
    assert [ax.get_ylabel() for ax in figure.axes] == ["inner loss", "outer loss", "log loss"]
    for ax, values in zip(figure.axes, ([9, 6, 5, 8, 4, 7, 3], [3, 2, 1.5, 2.5, 1, 2.4, 1.1]), strict=False):
        between, course = ax.lines[:-1], ax.lines[-1]
        assert [line.get_xdata()[0] for line in between] == [3.5, 5.5]
        np.testing.assert_allclose(course.get_xydata(), np.column_stack([np.arange(1, 8), values]))
        box = ax.patches[0].get_extents().transformed(ax.transData.inverted())
        assert (box.x0, box.x1) == pytest.approx((3.5, 5.5))
    scores, best = figure.axes[2].lines[-2:]
    np.testing.assert_allclose(scores.get_xydata(), [[3, 0.7], [5, 0.4]])
    np.testing.assert_allclose(best.get_xydata(), [[5, 0.4]])
    assert "3 rounds" in figure.axes[0].get_title(loc="left")
    assert "round 2" in figure.axes[0].get_title(loc="left")


def test_a_bilevel_program_without_a_judged_round_has_no_best_one():
    fit = bilevel_fit().drop_vars("log_loss").assign_attrs(best_round=-1)
    figure = plots.bilevel_losses(fit)
    assert len(figure.axes) == 2
    assert not figure.axes[0].patches
    assert "best" not in figure.axes[0].get_title(loc="left")
    pixels(figure)


def test_losses_of_other_fits_are_refused():
    with pytest.raises(DataError, match=r"lacks \['round', 'inner_loss', 'outer_loss'\]"):
        plots.bilevel_losses(xr.Dataset({"loss": ("step", [1.0])}))


def test_large_variables_show_their_first_entries():
    rng = np.random.default_rng(0)
    dims = ("chain", "draw", "cell")
    posterior = xr.Dataset({"x": (dims, rng.normal(size=(2, 50, 100))), "s": (dims[:2], rng.normal(size=(2, 50)))})
    figure = plots.plot_trace(posterior)
    assert [ax.get_ylabel() for ax in figure.axes[::2]] == ["x[0]", "x[1]", "x[2]", "x[3]", "s"]
    assert len(plots.plot_trace(posterior, ["x"], most=7).axes[::2]) == 7


def test_draws_that_are_not_finite_are_drawn_as_far_as_they_are():
    values = np.random.default_rng(0).normal(size=(2, 50))
    values[0, 3], values[1, 4] = np.nan, np.inf
    posterior = xr.Dataset({"x": (("chain", "draw"), values), "nothing": (("chain", "draw"), values * np.nan)})
    posterior["truth"] = posterior["x"] > 0
    for figure in (plots.plot_trace(posterior), plots.rank(posterior), plots.forest(posterior)):
        pixels(figure)


def test_a_forest_shows_medians_and_intervals():
    draws = np.linspace(0.0, 1.0, 1001).reshape(1, -1)
    posterior = xr.Dataset({"a": (("chain", "draw"), draws), "b": (("chain", "draw"), 100 * draws)})
    figure = plots.forest(posterior, ci_prob=0.9)
    for ax, scale in zip(figure.axes, (1, 100), strict=True):
        outer, inner, middle = ax.lines
        np.testing.assert_allclose(outer.get_xdata(), [0.05 * scale, 0.95 * scale])
        np.testing.assert_allclose(inner.get_xdata(), [0.25 * scale, 0.75 * scale])
        np.testing.assert_allclose(middle.get_xdata(), [0.5 * scale])


def test_a_predictive_check_says_where_the_data_lie():
    wide, narrow = (plots.predictive_check(OBSERVED[["y"]], replicated(scale)).axes[0] for scale in (5.0, 0.1))
    assert "sd 100% of replicates above" in wide.get_title(loc="left")
    assert "sd 0% of replicates above" in narrow.get_title(loc="left")
    counts = plots.predictive_check(OBSERVED[["count"]], replicated()).axes[0]
    edges = counts.patches[-1].get_data().edges
    np.testing.assert_allclose(np.diff(edges), 1)  # a bin for each number
    with pytest.raises(ResultError, match="add 'posterior_predictive' first"):
        plots.predictive_check(OBSERVED, xr.Dataset())
