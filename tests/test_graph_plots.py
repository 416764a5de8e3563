"""Figures of learned graphs: numbers against hand-computed ones, what axes show, and what is refused."""

from __future__ import annotations

import tracemalloc
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import xarray as xr
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy import stats

from probmodels.edges import figures as graph_plots
from probmodels.edges.figures import (
    accuracy_against_noise,
    adjacency,
    calibration_table,
    information_curve,
    reliability,
)
from probmodels.errors import DataError

PROBABILITY, TRUTH = np.array([0.1, 0.1, 0.9, 0.9, 0.8]), np.array([0, 1, 1, 1, 0])
RUNS = {
    "method": ["gcn", "gcn", "gcn", "gcn", "lds", "lds"],
    "noise": [0.0, 0.0, 0.5, 0.5, 0.5, 0.0],
    "accuracy": [0.8, 0.9, 0.6, 0.64, 0.7, 0.85],
}


def small_graph(**variables: Any) -> xr.Dataset:
    """Five nodes; in the order of class and degree: 3, 0, 1, 4, 2, the last of unknown class."""
    found = xr.Dataset(
        {
            "source_node": ("pair", [0, 3, 1, 2]),
            "target_node": ("pair", [1, 0, 4, 4]),
            "observed": ("pair", [False, True, True, True]),
            "probability": ("pair", [0.2, 0.9, 0.7, 0.6]),
            "degree_observed": ("node", [1.0, 1.0, 1.0, 4.0, 2.0]),
            "node_class": ("node", [0, 1, -1, 0, 1]),
        },
        {"class": ["left", "right"]},
    )
    return found.assign(variables)


def draw(figure: Figure) -> np.ndarray:
    figure.set_dpi(50)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def test_every_figure_draws_and_leaves_matplotlib_alone() -> None:
    import matplotlib.pyplot as plt

    before, known = dict(mpl.rcParams), plt.get_fignums()
    figures = [
        reliability(PROBABILITY, TRUTH),
        adjacency(small_graph()),
        accuracy_against_noise(RUNS),
        information_curve([0.1, 1], [3.0, 1.0], [0.9, 0.8]),
    ]
    assert len(figures) == len(graph_plots.__all__) - 1  # calibration_table has none
    for figure in figures:
        assert len(np.unique(draw(figure).reshape(-1, 3), axis=0)) > 20
    assert dict(mpl.rcParams) == before
    assert plt.get_fignums() == known


# -- calibration ------------------------------------------------------------------------------------------------------


def test_calibration_error_by_hand() -> None:
    table = calibration_table(PROBABILITY, TRUTH, bins=2)
    assert table["count"].values.tolist() == [2, 3]
    np.testing.assert_allclose(table["probability"], [0.1, 2.6 / 3])
    np.testing.assert_allclose(table["frequency"], [0.5, 2 / 3])
    assert float(table["ece"]) == pytest.approx((2 * 0.4 + 3 * 0.2) / 5)
    np.testing.assert_allclose(table["lower"], stats.beta.ppf(0.025, [1.5, 2.5], [1.5, 1.5]))
    np.testing.assert_allclose(table["upper"], stats.beta.ppf(0.975, [1.5, 2.5], [1.5, 1.5]))


def test_bands_reach_the_end_where_all_or_none_are_edges() -> None:
    table = calibration_table([0.1, 0.2, 0.9], [0, 0, 1], bins=2, level=0.8)
    assert table["lower"].values[0] == 0
    assert table["upper"].values[1] == 1
    np.testing.assert_allclose(table["upper"].values[0], stats.beta.ppf(0.9, 0.5, 2.5))
    np.testing.assert_allclose(table["lower"].values[1], stats.beta.ppf(0.1, 1.5, 0.5))


def test_probabilities_on_the_edge_of_a_bin_belong_above_it() -> None:
    count = calibration_table([0.0, 0.1, 0.3, 0.7, 1.0], [0, 0, 0, 1, 1])["count"].values
    assert np.flatnonzero(count).tolist() == [0, 1, 3, 7, 9]
    uneven = calibration_table([0.01, 0.2, 0.3], [0, 0, 1], bins=[0, 0.05, 0.2, 1])
    assert uneven["count"].values.tolist() == [1, 0, 2]
    assert np.isnan(uneven["frequency"].values[1])


def test_calibrated_probabilities_have_no_error_but_that_of_monte_carlo() -> None:
    rng = np.random.default_rng(0)
    chance = rng.random(20_000)
    truth = rng.random(len(chance)) < chance
    table = calibration_table(chance, truth)
    share = table["count"].values / len(chance)
    p = table["probability"].values
    # Given p, the distance in a bin is about |N(0, s)|: mean s sqrt(2 / pi), variance s^2 (1 - 2 / pi).
    s = np.sqrt(p * (1 - p) / table["count"].values)
    mean, sd = np.sum(share * s) * np.sqrt(2 / np.pi), np.sqrt(np.sum((share * s) ** 2) * (1 - 2 / np.pi))
    assert abs(float(table["ece"]) - mean) < 4 * sd
    assert float(calibration_table(chance**2, truth)["ece"]) > 0.15  # the control: 1/2 - 1/3 on average


def test_bands_cover_the_frequency_as_often_as_they_say() -> None:
    rng = np.random.default_rng(1)
    chance = np.repeat([0.1, 0.3, 0.5, 0.7, 0.9], 60)
    covered = []
    for _ in range(400):
        table = calibration_table(chance, rng.random(len(chance)) < chance, bins=5)
        p = np.array([0.1, 0.3, 0.5, 0.7, 0.9])
        covered.append((table["lower"].values <= p) & (p <= table["upper"].values))
    # 2000 bands: standard error 0.005; Jeffreys' coverage itself swings by about 0.01 about its level
    assert abs(np.mean(covered) - 0.95) < 0.025


def test_reliability_shows_shares_counts_and_the_error() -> None:
    upper, lower = reliability(PROBABILITY, TRUTH, bins=2).axes
    line, _, (bars,) = upper.containers[0]
    np.testing.assert_allclose(line.get_xdata(), [0.1, 2.6 / 3])
    np.testing.assert_allclose(line.get_ydata(), [0.5, 2 / 3])
    table = calibration_table(PROBABILITY, TRUTH, bins=2)
    for segment, low, high in zip(bars.get_segments(), table["lower"].values, table["upper"].values, strict=True):
        np.testing.assert_allclose(segment[:, 1], [low, high])
    diagonal = upper.lines[0]
    np.testing.assert_allclose(diagonal.get_xdata(), diagonal.get_ydata())
    (text,) = upper.get_legend().get_texts()
    assert text.get_text() == "all pairs: ECE 0.280, 5 pairs"
    assert [bar.get_height() for bar in lower.patches] == [2, 3]
    assert [text.get_text().strip() for text in lower.texts] == ["2", "3"]
    assert upper.get_xlim() == (-0.02, 1.02) == upper.get_ylim()
    assert upper.get_ylabel() == "share of true edges"
    assert lower.get_yscale() == "log"


def test_reliability_tells_observed_pairs_from_others() -> None:
    upper, lower = reliability(PROBABILITY, TRUTH, bins=2, observed=[0, 0, 2, 1, 1]).axes
    texts = [text.get_text() for text in upper.get_legend().get_texts()]
    assert texts == ["observed pairs: ECE 0.200, 3 pairs", "other pairs: ECE 0.400, 2 pairs"]
    assert [bar.get_height() for bar in lower.patches] == [0, 3, 2, 0]
    assert len(reliability([0.5], [1], observed=[True]).axes[0].get_legend().get_texts()) == 1


@pytest.mark.parametrize(
    ("probability", "truth", "options", "words"),
    [
        ([0.1, 0.2], [1], {}, r"shape \(2,\) and truth of shape \(1,\)"),
        ([[0.1]], [[1]], {}, "by pair"),
        ([], [], {}, "no pair"),
        ([1.2], [1], {}, r"lie in \[0, 1\]"),
        ([np.nan], [1], {}, r"lie in \[0, 1\]"),
        ([0.5], [np.nan], {}, "truth must hold 0 and 1"),
        ([0.5], [2], {}, "truth must hold 0 and 1"),
        ([0.5], ["yes"], {}, "truth of type <U3"),
        ([0.5], [1], {"bins": 0}, "bins=0"),
        ([0.5], [1], {"bins": [0, 0.5]}, "ascending edges from 0 to 1"),
        ([0.5], [1], {"level": 1.0}, "level=1.0"),
        ([0.5], [1], {"observed": [True, False]}, r"observed has shape \(2,\)"),
    ],
)
def test_reliability_refuses_what_does_not_fit(probability: Any, truth: Any, options: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        reliability(probability, truth, **options)


# -- adjacency --------------------------------------------------------------------------------------------------------


def test_adjacency_has_observed_above_and_learned_below_by_class_and_degree() -> None:
    figure = adjacency(small_graph())
    ax = figure.axes[0]
    image = ax.images[0].get_array()
    blank = np.nan
    expected = np.array(  # nodes 3, 0 | 4, 1 | 2
        [
            [blank, 1.0, 0.0, 0.0, 0.0],
            [0.9, blank, 0.0, 0.0, 0.0],
            [blank, blank, blank, 1.0, 1.0],
            [blank, 0.2, 0.7, blank, 0.0],
            [blank, blank, 0.6, blank, blank],
        ]
    )
    np.testing.assert_array_equal(np.ma.filled(image.astype(float), np.nan), expected)
    assert ax.images[0].get_extent() == [0, 5, 5, 0]
    assert ax.images[0].get_clim() == (0, 1)
    assert [text.get_text() for text in ax.get_yticklabels()] == ["left", "right", "unknown"]
    np.testing.assert_allclose(ax.get_yticks(), [1, 3, 4.5])
    assert ax.get_title(loc="left") == "5 nodes, grey is no candidate"
    assert ax.get_title(loc="right") == "above: observed, below: learned"
    assert figure.axes[1].get_ylabel() == "probability of an edge"


def test_large_graphs_are_binned_and_keep_their_sums() -> None:
    rng = np.random.default_rng(0)
    number, cells = 30_000, 100
    one, other = np.sort(rng.integers(0, number, (2, 50_000)), axis=0)
    one, other = one[one < other], other[one < other]
    observed = rng.random(len(one)) < 0.5
    data = xr.Dataset(
        {
            "source_node": ("pair", one),
            "target_node": ("pair", other),
            "observed": ("pair", observed),
            "probability": ("pair", rng.random(len(one))),
            "weight": ("pair", np.where(observed, 1.0, 3.0)),
            "degree_observed": ("node", -np.arange(number)),  # keeps the order of the nodes
        }
    )
    tracemalloc.start()
    figure = adjacency(data, cells=cells)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6  # a square of bytes would take 900 MB
    image = np.ma.filled(figure.axes[0].images[0].get_array().astype(float), np.nan)
    assert image.shape == (cells, cells)
    assert np.isnan(np.diag(image)).all()
    apart = one * cells // number != other * cells // number
    pairs = (number / cells) ** 2
    assert np.nansum(np.triu(image, 1)) * pairs == pytest.approx((observed & apart).sum())
    learned = (data["weight"] * data["probability"]).values[apart].sum()
    assert np.nansum(np.tril(image, -1)) * pairs == pytest.approx(learned)
    cell = (one * cells // number == 3) & (other * cells // number == 70)
    assert image[3, 70] * pairs == pytest.approx((observed & cell).sum())
    assert "300.0 to a cell" in figure.axes[0].get_title(loc="left")
    assert figure.axes[1].get_ylabel() == "edges per pair of nodes"
    assert figure.axes[0].get_xlim() == (0, number)


def test_one_graph_of_a_collection_is_shown() -> None:
    data = small_graph(node_graph=("node", [0, 0, 1, 0, 1])).drop_vars("node_class").isel(pair=[0, 1, 3])
    ax = adjacency(data, graph=1).axes[0]
    np.testing.assert_array_equal(ax.images[0].get_array().filled(np.nan), [[np.nan, 1.0], [0.6, np.nan]])
    assert ax.get_title(loc="left") == "2 nodes of graph 1"
    assert ax.get_xlabel() == "nodes by observed degree"
    with pytest.raises(DataError, match="hold 2 graphs; choose one"):
        adjacency(data)
    with pytest.raises(DataError, match="graph=7 is not there; choose a position from 0 to 1"):
        adjacency(data, graph=7)


def test_adjacency_refuses_what_does_not_fit() -> None:
    with pytest.raises(DataError, match="cells=1;"):
        adjacency(small_graph(), cells=1)
    with pytest.raises(DataError, match=r"lacks \['probability'\]"):
        adjacency(small_graph().drop_vars("probability"))
    with pytest.raises(DataError, match="graph=2, but the data hold one graph"):
        adjacency(small_graph(), graph=2)


# -- accuracy against noise -------------------------------------------------------------------------------------------


def test_accuracy_lines_have_students_intervals_of_the_mean() -> None:
    ax = accuracy_against_noise(RUNS).axes[0]
    gcn, lds = ax.lines
    assert (gcn.get_label(), lds.get_label()) == ("gcn", "lds")
    np.testing.assert_allclose(gcn.get_xydata(), [[0, 0.85], [0.5, 0.62]])
    np.testing.assert_allclose(lds.get_xydata(), [[0, 0.85], [0.5, 0.7]])
    half = stats.t.ppf(0.975, 1) * np.array([np.std([0.8, 0.9], ddof=1), np.std([0.6, 0.64], ddof=1)]) / np.sqrt(2)
    corners = {(round(x, 6), round(y, 6)) for x, y in ax.collections[0].get_paths()[0].vertices}
    mean = np.array([0.85, 0.62])
    for x, low, high in zip([0, 0.5], mean - half, mean + half, strict=True):
        assert (x, round(max(low, 0), 6)) in corners
        assert (x, round(min(high, 1), 6)) in corners
    assert not len(ax.collections[1].get_paths()), "a single replicate has no band"
    assert ax.get_xlabel() == "noise"
    assert ax.get_ylim()[1] <= 1.005


def test_a_labelled_table_is_drawn_as_its_rows() -> None:
    scores = np.full((2, 2, 2), np.nan)
    scores[0], scores[1, :, 0] = [[0.8, 0.9], [0.6, 0.64]], [0.85, 0.7]
    table = xr.Dataset(
        {"accuracy": (("method", "noise", "seed"), scores)}, {"method": ["gcn", "lds"], "noise": [0.0, 0.5]}
    )
    one, other = accuracy_against_noise(RUNS).axes[0], accuracy_against_noise(table.transpose("seed", ...)).axes[0]
    for first, second in zip(one.lines, other.lines, strict=True):
        np.testing.assert_allclose(first.get_xydata(), second.get_xydata())
    np.testing.assert_allclose(one.collections[0].get_paths()[0].vertices, other.collections[0].get_paths()[0].vertices)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"method": ["a"], "noise": [0.1]}, r"lacks the columns \['accuracy'\]"),
        ({**RUNS, "noise": [0.1]}, "one row for each run"),
        ({**RUNS, "accuracy": [80, 90, 60, 64, 70, 85]}, "not per cent"),
        ({**RUNS, "accuracy": [np.nan] * 6}, "none missing"),
        ({**RUNS, "noise": list("abcdef")}, "must be numbers"),
        (xr.Dataset({"score": ("noise", [0.1])}), "no variable 'accuracy'"),
        (xr.Dataset({"accuracy": ("noise", [0.1])}), r"lacks \['method'\]"),
    ],
)
def test_tables_that_do_not_fit_are_refused(table: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        accuracy_against_noise(table)


# -- information curve ------------------------------------------------------------------------------------------------


def test_the_information_curve_runs_in_the_order_of_beta_with_intervals() -> None:
    rate, accuracy = [[1.0, 3.0], [8.0, 12.0], [20.0, 22.0]], [[0.6, 0.7], [0.8, 0.9], [0.9, 0.9]]
    log_loss = [[0.6, 0.5], [0.3, 0.2], [0.2, 0.2]]
    figure = information_curve([1.0, 0.01, 0.1], rate, accuracy, log_loss=log_loss)
    left, right = figure.axes
    line, _, bars = left.containers[0]
    np.testing.assert_allclose(line.get_xydata(), [[10, 0.85], [21, 0.9], [2, 0.65]])
    half = stats.t.ppf(0.975, 1) * np.std([8, 12], ddof=1) / np.sqrt(2)
    np.testing.assert_allclose(bars[0].get_segments()[0][:, 0], [10 - half, 10 + half])
    assert [text.get_text() for text in left.texts] == ["β = 0.01", "β = 0.1", "β = 1"]
    assert (left.get_xlabel(), left.get_ylabel(), right.get_ylabel()) == ("rate (nats)", "accuracy", "log loss (nats)")
    np.testing.assert_allclose(right.containers[0][0].get_ydata(), [0.25, 0.2, 0.55])
    assert left.get_xlim()[0] <= 0


def test_single_runs_have_no_error_bars() -> None:
    figure = information_curve([0.1, 1.0], [5.0, 1.0], [0.9, 0.8])
    (ax,) = figure.axes
    assert ax.containers[0][2] == ()
    np.testing.assert_allclose(ax.containers[0][0].get_xdata(), [5, 1])


@pytest.mark.parametrize(
    ("beta", "rate", "accuracy", "words"),
    [
        ([0.1, 0.1], [1, 2], [0.5, 0.6], "names a weight twice"),
        ([-1.0], [1], [0.5], "0 or more"),
        (0.1, [1], [0.5], "list of weights"),
        ([0.1, 1.0], [1], [0.5, 0.6], r"rate has shape \(1,\)"),
        ([0.1], [np.nan], [0.5], "missing or negative"),
        ([0.1], [1], [50.0], "not per cent"),
    ],
)
def test_curves_that_do_not_fit_are_refused(beta: Any, rate: Any, accuracy: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        information_curve(beta, rate, accuracy)
