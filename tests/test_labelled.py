"""Labelled arrays, of xarray and pandas, are read by their labels wherever arrays are taken, and never by place."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

from probmodels.bayesian_network.model import make_problem as make_network
from probmodels.bayesian_network.outputs import draw_network
from probmodels.bayesian_svd.effects import effect_design
from probmodels.causal_graph import average_effect, make_problem as make_causal
from probmodels.datasets.cells import from_cells, to_matrix
from probmodels.datasets.graph_data import make_graph
from probmodels.datasets.images import make_images
from probmodels.datasets.labelled import arranged, arranged_together, labels_of
from probmodels.datasets.sem import draw_sem, simulate_sem
from probmodels.distributions.covariance import chordal_distance
from probmodels.edges.figures import accuracy_against_noise, information_curve, reliability
from probmodels.errors import (
    CovarianceError,
    DataError,
    DiagnosticsError,
    ImportanceError,
    ProblemError,
    ProbmodelsError,
    ResultError,
)
from probmodels.guides.edges import make_edges
from probmodels.guides.schedules import LinearSchedule
from probmodels.inference.diagnostics.calibration import _pairs
from probmodels.inference.diagnostics.comparison import kfold
from probmodels.inference.diagnostics.convergence import convergence, hdi
from probmodels.inference.diagnostics.importance import importance_moments
from probmodels.inference.metrics.dependence import mic
from probmodels.inference.metrics.graphs import calibration_table, edge_auroc, shd
from probmodels.inference.metrics.latents import match_latents, r_squared
from probmodels.inference.metrics.samples import energy_distance
from probmodels.scores.closed import GaussianMixture
from probmodels.scores.fields import linear_observation

ROWS = [f"r{i}" for i in range(12)]
RNG = np.random.default_rng(0)


def series(values: Any, labels: Any = ROWS, seed: int = 1) -> pd.Series:
    """Values under their labels, in another order."""
    return pd.Series(np.asarray(values), index=list(labels)).sample(frac=1, random_state=seed)


def array(values: Any, dim: str, labels: Any = ROWS, seed: int = 2) -> xr.DataArray:
    """The same of xarray."""
    found = xr.DataArray(np.asarray(values), {dim: list(labels)}, (dim,))
    return found[np.random.default_rng(seed).permutation(len(found))]


# -- the function ------------------------------------------------------------------------------------------------------


def test_axes_and_entries_are_put_in_order() -> None:
    values = np.arange(6).reshape(2, 3)
    given = xr.DataArray(values, {"row": ["a", "b"], "column": ["x", "y", "z"]}, ("row", "column"))
    dims = {"row": ["a", "b"], "column": ["x", "y", "z"]}
    for other in (given, given.T, given[::-1, [2, 0, 1]], given.T[[1, 2, 0]].to_pandas()):
        np.testing.assert_array_equal(arranged(other, "it", dims), values)
    np.testing.assert_array_equal(arranged(given.rename(row="other").T, "it", {"row": None, "column": None}), values)
    np.testing.assert_array_equal(arranged(given.drop_vars(["row", "column"]), "it", dims), values)
    with pytest.raises(DataError, match="it has the axes 'left', 'right'"):
        arranged(given.rename(row="left", column="right"), "it", dims)


@pytest.mark.parametrize(
    "labels", [["a", "c"], ["a", "a"], ["a", 2.5], [np.datetime64("2000-01-01"), np.datetime64("2001-01-01")]]
)
def test_labels_that_do_not_fit_are_refused(labels: Any) -> None:
    with pytest.raises(DataError, match="it along 'row'"):
        arranged(xr.DataArray([1, 2], {"row": labels}, ("row",)), "it", {"row": ["a", "b"]})


def test_numbers_in_order_say_nothing_and_arrays_agree_with_the_first_that_says_something() -> None:
    assert labels_of(pd.Series([1, 2]), "row") is None
    assert arranged(pd.Series([1, 2]), "it", {"row": ["a", "b"]}).tolist() == [1, 2]
    plain, first, other = arranged_together(
        {"plain": np.array([1, 2]), "first": pd.Series([1, 2], ["b", "a"]), "other": pd.Series([1, 2], ["a", "b"])},
        ["row"],
    )
    assert (plain.tolist(), first.tolist(), other.tolist()) == ([1, 2], [1, 2], [2, 1])


# -- graphs ------------------------------------------------------------------------------------------------------------


CHAIN = np.array([[0, 1, 0], [0, 0, 1], [0, 0, 0]])
NAMES = ["x", "y", "z"]


def graphs(names: list[str] = NAMES, axes: tuple[str, str] = ("cause", "effect")) -> list[Any]:
    """The chain, labelled, in other orders of axes and names."""
    plain = xr.DataArray(CHAIN, dict.fromkeys(axes, names), axes)
    turned = plain[[2, 0, 1], [1, 2, 0]]
    return [plain, plain[::-1, ::-1], turned, turned.T, turned.to_pandas(), turned.T.to_pandas()]


def chain(count: int = 300) -> xr.DataArray:
    rng = np.random.default_rng(0)
    x = rng.normal(size=count)
    y = 2 * x + 0.3 * rng.normal(size=count)
    z = -y + 0.3 * rng.normal(size=count)
    names = {"data": [f"r{i}" for i in range(count)], "concept": NAMES}
    return xr.DataArray(np.stack([x, y, z], 1), names, ("data", "concept"))


@pytest.mark.parametrize("place", range(6))
def test_effects_are_of_the_named_graph(place: int) -> None:
    labels, options = chain(), {"functions": "linear", "num_draws": 20}
    found = average_effect(labels, graphs()[place], "x", (0.0, 1.0), **options)
    np.testing.assert_allclose(found["effect"], [2, -2], atol=0.1)
    if place < 4:
        draws = graphs()[place].expand_dims(chain=2, draw=3)
        several = average_effect(labels, draws, "x", (0.0, 1.0), **options)
        np.testing.assert_allclose(several["effect"], [2, -2], atol=0.1)
        moved = average_effect(labels, draws.transpose("effect", "draw", "cause", "chain"), "x", (0.0, 1.0), **options)
        xr.testing.assert_identical(several, moved)
    strange = graphs(["x", "y", "w"])[place]
    with pytest.raises(DataError, match="graph"):
        average_effect(labels, strange, "x", (0.0, 1.0), **options)


def test_effects_of_the_rows_that_are_named() -> None:
    labels = chain(40)
    labels = labels.assign_coords(data=[f"r{i}" for i in range(40)])
    labels[:, 1] = labels[:, 0] ** 2
    given = xr.DataArray(labels.values[:, 0] > 0, {"data": labels["data"].values}, ("data",))
    one, other, third = (
        average_effect(labels, CHAIN, "x", (0.0, 1.0), given=rows, num_draws=5)
        for rows in (given.values, given[::-1], given[::-1].to_pandas())
    )
    xr.testing.assert_identical(one, other)
    xr.testing.assert_identical(one, third)


def test_true_graphs_are_kept_in_the_order_of_the_concepts() -> None:
    for place, graph in enumerate(graphs()[:4]):
        data = xr.Dataset({"label": chain(30)})
        data["graph"] = graph
        np.testing.assert_array_equal(make_causal(data).data["true_graph"], CHAIN, err_msg=str(place))
    rng = np.random.default_rng(0)
    table = xr.DataArray(rng.normal(size=(30, 3)), {"variable": NAMES}, ("sample", "variable"))
    for axes in (("parent", "child"), ("cause", "effect")):
        for graph in graphs(axes=axes)[:4]:
            problem = make_network(xr.Dataset({"x": table, "true_graph": graph}), score="bge", hidden=4)
            np.testing.assert_array_equal(problem.data["true_graph"], CHAIN)


@pytest.mark.parametrize("place", range(6))
def test_metrics_of_graphs_and_models_of_given_graphs(place: int) -> None:
    other = graphs()[place]
    assert shd(graphs()[0], other) == 0
    assert shd(other, graphs()[0].to_pandas()) == 0
    chance = other * 0.8 + 0.1
    assert edge_auroc(graphs()[0], chance) == 1.0
    with pytest.raises(ProblemError, match="other nodes"):
        shd(graphs()[0], graphs(["x", "y", "w"])[place])


def test_true_edges_are_marked_where_they_are() -> None:
    summary = xr.Dataset(
        {"edge_probability": (("parent", "child"), CHAIN * 0.9)}, coords={"parent": NAMES, "child": NAMES}
    )
    for graph in graphs(axes=("parent", "child")):
        figure = draw_network(summary, truth=graph)
        rings = sorted((int(line.get_ydata()[0]), int(line.get_xdata()[0])) for line in figure.axes[1].lines)
        assert rings == [(0, 1), (1, 2)]
    with pytest.raises(ResultError, match="truth along"):
        draw_network(summary, truth=graphs(["x", "y", "w"], ("parent", "child"))[0])


# -- rows --------------------------------------------------------------------------------------------------------------


def test_metrics_compare_rows_of_one_name() -> None:
    x, chance = RNG.normal(size=12), RNG.random(12)
    y, truth = x**2, (chance > 0.5).astype(int)
    assert mic(array(x, "data"), series(y)) == pytest.approx(mic(array(x, "data"), array(y, "data")))
    ordered = array(x, "data")
    assert mic(ordered, series(y)) == mic(ordered.values, ordered.values**2)
    with pytest.raises(ProblemError, match="y along 'data'"):
        mic(ordered, series(y, [f"s{i}" for i in range(12)]))
    xr.testing.assert_allclose(
        calibration_table(array(chance, "pair"), series(truth)), calibration_table(chance, truth)
    )
    with pytest.raises(DataError, match="truth along 'pair'"):
        calibration_table(array(chance, "pair"), series(truth, range(5, 17)))
    shown = [
        [text.get_text() for text in reliability(*given, observed=seen).axes[0].get_legend().get_texts()]
        for given, seen in (((chance, truth), x > 0), ((array(chance, "pair"), series(truth)), series(x > 0, seed=5)))
    ]
    assert shown[0] == shown[1]


def test_latents_and_concepts_are_compared_row_by_row() -> None:
    rows = [f"r{i}" for i in range(60)]
    z = np.random.default_rng(1).normal(size=(60, 2))
    latents = pd.DataFrame(z, rows, ["u", "v"])
    concepts = pd.DataFrame(2 * z[:, ::-1], rows, ["a", "b"]).sample(frac=1, random_state=0)
    test = pd.Series(np.arange(60) % 2 == 0, rows).sample(frac=1, random_state=3)
    assert r_squared(latents, concepts, test=test).values == pytest.approx(1.0)
    turned = xr.DataArray(concepts.to_numpy().T, {"concept": ["a", "b"], "data": concepts.index}, ("concept", "data"))
    match = match_latents(latents, turned)
    assert match["label"].values.tolist() == ["v", "u"]
    assert float(match["mcc"]) == pytest.approx(1.0)
    with pytest.raises(ProblemError, match="concepts along 'data'"):
        r_squared(latents, concepts.rename(index={"r3": "r99"}))


def test_samples_are_compared_event_by_event() -> None:
    rng = np.random.default_rng(2)
    x, y = (rng.normal([0, 3, 9], size=(50, 3)) for _ in range(2))
    wanted = energy_distance(x, y)
    one = xr.DataArray(x, {"feature": NAMES}, ("draw", "feature"))
    other = xr.DataArray(y, {"feature": NAMES}, ("draw", "feature"))
    for given in (one[:, ::-1], one.T, one[:, [1, 2, 0]]):
        assert energy_distance(given, other) == pytest.approx(wanted)
    with pytest.raises(DiagnosticsError, match="give an array or a Tensor or a DataArray"):
        energy_distance(one.to_pandas(), other)
    with pytest.raises(DiagnosticsError, match="x along 'feature'"):
        energy_distance(one.assign_coords(feature=["x", "y", "w"]), other)


def test_draws_are_read_by_the_names_of_their_axes() -> None:
    draws = xr.DataArray(RNG.normal(size=(2, 50, 3)).cumsum(1), dims=("chain", "draw", "entry"))
    for name, wanted in convergence(draws.values).items():
        np.testing.assert_array_equal(convergence(draws.transpose("entry", "draw", "chain"))[name], wanted)
    np.testing.assert_array_equal(hdi(draws.transpose("draw", "chain", "entry"), 0.9), hdi(draws.values, 0.9))
    weight = np.log(np.arange(1.0, 13) / 78)
    values = xr.DataArray(RNG.normal(size=(3, 12)), {"draw": ROWS}, ("entry", "draw"))
    wanted = importance_moments(values.values.T, weight)["mean"]
    np.testing.assert_allclose(importance_moments(values, array(weight, "draw"))["mean"], wanted)
    with pytest.raises(ImportanceError, match="log_weight along 'draw'"):
        importance_moments(values, array(weight, "draw", range(3, 15)))


def test_truths_of_calibration_are_matched_entry_by_entry() -> None:
    posterior = xr.Dataset({"w": xr.DataArray(RNG.normal(size=(1, 5, 3)), {"k": NAMES}, ("chain", "draw", "k"))})
    for truth in (array([1.0, 2.0, 3.0], "k", NAMES), series([1.0, 2.0, 3.0], NAMES)):
        np.testing.assert_array_equal(_pairs({"w": truth}, posterior)["w"][0], [1, 2, 3])
    with pytest.raises(DiagnosticsError, match="the truth of w along 'k'"):
        _pairs({"w": array([1.0, 2.0, 3.0], "k", ["x", "y", "w"])}, posterior)


def test_groups_of_observations_are_matched_by_number() -> None:
    seen: list[np.ndarray] = []

    def split(train: np.ndarray, test: np.ndarray) -> Any:
        seen.append(test)
        raise ProblemError("enough")

    groups = np.repeat([0, 1], 6)
    for given in (groups, pd.Series(groups).sample(frac=1, random_state=0)):
        with pytest.raises(ProbmodelsError, match="enough"):
            kfold(split, lambda problem, seed: None, 12, groups=given, num_folds=2)
    np.testing.assert_array_equal(seen[0], seen[1])


# -- data --------------------------------------------------------------------------------------------------------------


def test_images_labels_and_splits_are_put_in_order() -> None:
    images, label = RNG.random((12, 4, 5)), np.arange(12)
    split = np.where(np.arange(12) < 8, "train", "test")
    given = xr.DataArray(images, {"data": ROWS}, ("data", "row", "column"))
    wanted = make_images(images, label, split=split)
    for one in (given, given.transpose("column", "data", "row")):
        xr.testing.assert_identical(make_images(one, series(label), split=array(split, "data")), wanted)
    with pytest.raises(DataError, match="labels along 'data'"):
        make_images(given, series(label, [f"s{i}" for i in range(12)]))


def test_nodes_are_put_in_order() -> None:
    x, y = RNG.normal(size=(12, 2)), np.arange(12) % 3
    split = np.repeat(["train", "train", "validation", "test"], 3)
    edges, options = [(0, 1), (1, 2)], {"nodes": ROWS, "features": ["f", "g"]}
    wanted = make_graph(x, y, edges, split=split, **options)
    frame = pd.DataFrame(x, ROWS, ["f", "g"])[["g", "f"]].sample(frac=1, random_state=4)
    given = make_graph(frame, series(y), edges, split=array(split, "node"), **options)
    xr.testing.assert_identical(given, wanted)
    pair = xr.DataArray(np.array(edges).T, dims=("end", "edge"))
    xr.testing.assert_identical(make_graph(x, y, pair, split=split, **options), wanted)
    alone = make_graph(frame.iloc[::-1], series(y), edges)  # no names of nodes: all in the order of the features
    np.testing.assert_array_equal(alone["y"], pd.Series(y, ROWS)[frame.index[::-1]])
    with pytest.raises(DataError, match="features along 'node'"):
        make_graph(frame.rename(index={"r0": "r77"}), y, edges, nodes=ROWS)
    index = np.repeat([0, 1, 2], 4)
    several = make_graph(x, [0, 1, 0], graph=index, nodes=ROWS, graphs=["a", "b", "c"])
    labels = pd.Series([0, 0, 1], ["c", "a", "b"])
    moved = make_graph(frame[["f", "g"]], labels, graph=series(index), nodes=ROWS, graphs=["a", "b", "c"])
    xr.testing.assert_identical(moved, several)


def test_candidates_of_edges_are_of_the_right_nodes() -> None:
    features = pd.DataFrame(np.arange(12.0)[:, None], ROWS)
    graph = np.repeat([0, 1], 6)
    options: dict[str, Any] = {"neighbours": 1, "metric": "euclidean"}
    wanted = make_edges(np.zeros((0, 2), dtype=int), graph, features=features.to_numpy(), **options)
    found = make_edges(np.zeros((0, 2), dtype=int), series(graph), features=features, **options)
    torch.testing.assert_close(found.source, wanted.source)
    torch.testing.assert_close(found.target, wanted.target)


@pytest.mark.parametrize("place", range(6))
def test_models_of_given_graphs(place: int) -> None:
    graph = graphs(["v1", "v2", "v3"])[place]
    np.testing.assert_array_equal(draw_sem(3, graph=graph).graph, CHAIN)
    np.testing.assert_array_equal(simulate_sem(3, 20, graph=graph)["graph"], CHAIN)


def test_cells_are_put_back_where_they_were() -> None:
    rng = np.random.default_rng(0)
    axes = {"time": np.arange(4), "lat": [0.0, 1.0], "lon": [0.0, 1.0, 2.0]}
    field = xr.DataArray(rng.normal(size=(4, 2, 3)), axes, ("time", "lat", "lon"))
    matrix = to_matrix(field)
    np.testing.assert_array_equal(from_cells(matrix[::-1], matrix).transpose("time", "lat", "lon"), field)
    with pytest.raises(DataError, match="values along 'cell'"):
        from_cells(matrix.assign_coords(cell=np.arange(6) + 3), matrix)


def test_covariates_are_matched_by_their_times() -> None:
    time = xr.DataArray(pd.date_range("2000-01-01", periods=24, freq="MS"), dims="time", name="time")
    values = RNG.normal(size=24)
    for given in (array(values, "time", time.values), series(values, time.values), array(values, "month", time.values)):
        design = effect_design(time, ["intercept", "index"], {"index": given})
        np.testing.assert_array_equal(design.sel(effect="index"), values)
    with pytest.raises(DataError, match="covariate 'index' along 'time'"):
        effect_design(time, ["index"], {"index": series(values, pd.date_range("2000-02-01", periods=24, freq="MS"))})


def test_latitudes_go_with_their_longitudes() -> None:
    lat, lon = np.linspace(-60, 60, 12), np.linspace(0, 300, 12)
    wanted = chordal_distance(lat, lon)
    for one, other in (
        (pd.Series(lat, ROWS), array(lon, "cell").sel(cell=ROWS)),
        (pd.Series(lat), pd.Series(lon, ROWS)),
    ):
        torch.testing.assert_close(chordal_distance(one, other), wanted)
    with pytest.raises(CovarianceError, match="lat and lon have other labels"):
        chordal_distance(array(lat, "cell"), series(lon))


def test_observations_go_with_their_rows() -> None:
    prior = GaussianMixture(LinearSchedule(-8.0, 5.0), [[0.0, 0.0]], [np.eye(2)])
    matrix = pd.DataFrame([[1.0, 0.0], [0.0, 2.0]], ["first", "second"])
    observed = pd.Series([1.0, -3.0], ["first", "second"])
    wanted = prior.given(matrix.to_numpy(), observed.to_numpy(), 0.5)
    found = prior.given(matrix, observed[::-1], 0.5)
    torch.testing.assert_close(found.means, wanted.means)
    with pytest.raises(ProblemError, match="observed along 'observation'"):
        linear_observation(prior, matrix, pd.Series([1.0, -3.0], ["first", "third"]), 0.5)


def test_figures_read_runs_by_their_labels() -> None:
    table = pd.DataFrame({"method": ["a", "a", "b", "b"], "noise": [0, 1, 0, 1], "accuracy": [0.9, 0.8, 0.7, 0.1]})
    table.index = pd.Index(["p", "q", "r", "s"])
    columns = {name: table[name].sample(frac=1, random_state=i) for i, name in enumerate(table)}
    for given in (table, columns):
        first = accuracy_against_noise(given).axes[0].lines
        lines = {line.get_label(): sorted(zip(line.get_xdata(), line.get_ydata(), strict=True)) for line in first}
        assert lines == {"a": [(0.0, 0.9), (1.0, 0.8)], "b": [(0.0, 0.7), (1.0, 0.1)]}
    beta = array([0.1, 1.0, 10.0], "beta", NAMES)
    rate, accuracy = series([3.0, 2.0, 1.0], NAMES), array([0.9, 0.8, 0.7], "beta", NAMES, seed=7)
    texts = {text.get_text(): text.xy for text in information_curve(beta, rate, accuracy).axes[0].texts}
    assert texts["β = 0.1"] == (3.0, 0.9)
    assert texts["β = 10"] == (1.0, 0.7)
