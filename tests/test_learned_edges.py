"""Summaries of learned edges against numbers computed by hand."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from scipy import stats

from probmodels import fit_svi, get_method
from probmodels.edges.outputs import edge_table, write_edges
from probmodels.edges.summary import edge_marginals, summarise_edges
from probmodels.errors import DataError, ResultError
from probmodels.inference.result import Result

EDGE = np.array([[1, 0, 1], [1, 1, 1], [0, 1, 1], [1, 0, 1]], dtype=np.float32)  # (draw, pair): ab, ac, bd
CHANCE = np.array([[0.9, 0.2, 0.7], [0.7, 0.4, 0.7], [0.8, 0.1, 0.7], [0.8, 0.3, 0.7]], dtype=np.float32)


def make_result(
    draws: dict[str, Any] | None = None, *, method: str = "other", engine: str = "svi", data: Any = None, **groups: Any
) -> Result:
    """Four nodes a to d, candidate pairs ab (seen), ac and bd (seen); classes 0, 0, 1 and unknown."""
    draws = {"edge": EDGE, "edge_probability": CHANCE} if draws is None else draws
    posterior = {k: (("chain", "draw", "pair")[: np.ndim(v) + 1], np.asarray(v)[None]) for k, v in draws.items()}
    constant = xr.Dataset(
        {
            "pair_source": ("pair", ["a", "a", "b"]),
            "pair_target": ("pair", ["b", "c", "d"]),
            "pair_observed": ("pair", [True, False, True]),
            "y": ("node", [0, 0, 1, -1]),
        },
        {"node": list("abcd"), "class": ["x", "y"]},
    )
    constant = constant if data is None else constant.assign(data)
    groups = {"posterior": xr.Dataset(posterior), "constant_data": constant, **groups}
    tree = xr.DataTree.from_dict({f"/{name}": group for name, group in groups.items()})
    tree.attrs = {"method": method, "engine": engine}
    return Result(tree)


def moments(**values: Any) -> xr.Dataset:
    return xr.Dataset({name: ("pair", np.array(value)) for name, value in values.items()})


MOMENTS = moments(
    edge=[0.75, 0.5, 1.0], edge_sd=[0.5, 0.5, 0.0], edge_probability=[0.8, 0.25, 0.7], edge_probability_sd=[0.1, 0.1, 0]
)


def test_marginals_of_pairs_are_means_of_probabilities_with_their_spread() -> None:
    out = edge_marginals(make_result())
    np.testing.assert_allclose(out["probability"], [0.8, 0.25, 0.7], rtol=1e-6)
    sd = np.array([np.sqrt(0.02 / 3), np.sqrt(0.05 / 3), 0])
    np.testing.assert_allclose(out["probability_sd"], sd, atol=1e-6)
    np.testing.assert_allclose(out["probability_mcse"], sd / 2, atol=1e-6)  # of four independent draws
    assert list(zip(out["source"].values, out["target"].values, strict=True)) == [("a", "b"), ("a", "c"), ("b", "d")]
    assert out["source_node"].values.tolist() == [0, 0, 1]
    assert out["observed"].values.tolist() == [True, False, True]
    assert out["degree_observed"].values.tolist() == [1, 2, 0, 1]
    assert not {"count", "weight", "true", "graph"} & set(out.data_vars)


def test_degrees_and_totals_come_from_draws_of_edges() -> None:
    out = summarise_edges(make_result(), prob=0.5)
    np.testing.assert_allclose(out["degree_mean"], [1.05, 1.5, 0.25, 0.7], rtol=1e-6)
    degrees = np.array([[1, 2, 1, 1], [2, 2, 1, 2], [0, 1, 1, 0], [1, 1, 1, 1]])  # a: ab + ac, b: ab + bd, c: ac, d: bd
    np.testing.assert_allclose(out["degree_lower"], np.quantile(degrees, 0.25, axis=1))
    np.testing.assert_allclose(out["degree_upper"], np.quantile(degrees, 0.75, axis=1))
    totals = [2, 3, 2, 2]
    assert float(out["num_edges_mean"]) == 2.25
    assert float(out["num_edges_upper"]) == np.quantile(totals, 0.75)
    assert float(out["mean_degree_mean"]) == 2.25 * 2 / 4
    assert "draws of edges" in out.attrs["degree"]


def test_chance_in_few_draws_is_not_taken_for_pairs_outside_of_the_candidates() -> None:
    """One graph of three edges where 1.75 are expected, as another run may draw."""
    for method, said in (("lds", False), ("noisy_edges", True)):
        result = make_result({"edge_probability": CHANCE[:1]}, method=method)
        result.tree["posterior"] = xr.DataTree(result.posterior.assign(num_edges=(("chain", "draw"), [[3.0]])))
        assert ("no candidates" in summarise_edges(result).attrs["num_edges"]) == said


def test_predicted_classes_are_means_over_draws_and_tables_say_how_many_are_right() -> None:
    chance = np.array([[[0.9, 0.1], [0.4, 0.6], [0.2, 0.8], [0.5, 0.5]], [[0.7, 0.3], [0.3, 0.7], [0.9, 0.1], [1, 0]]])
    data = {"split": ("node", ["train", "test", "test", ""])}
    result = make_result(data=data)
    classes = (("chain", "draw", "node", "class"), chance[None, [0, 1, 0, 1]])
    result.tree["posterior"] = xr.DataTree(result.posterior.assign(class_probability=classes))
    out = summarise_edges(result)
    np.testing.assert_allclose(out["class_probability"], chance.mean(0))
    assert out["predicted"].values.tolist() == [0, 1, 0, 0]
    assert "0 of 2 test nodes are predicted right: 0.0%." in edge_table(out)  # classes are 0, 0, 1 and unknown
    assert "test nodes" not in edge_table(make_result())


def test_homophily_leaves_out_edges_at_nodes_of_unknown_class() -> None:
    out = summarise_edges(make_result(), prob=0.5)
    shares = [1, 0.5, 0, 1]  # ab joins one class, ac two; bd does not count, since the class of d is not known
    assert float(out["homophily_mean"]) == np.mean(shares)
    assert float(out["homophily_lower"]) == np.quantile(shares, 0.25)
    assert float(out["homophily_observed"]) == 1.0
    assert "1 of 4 nodes have none, and edges at these are left out" in out.attrs["homophily"]


def test_draws_without_an_edge_have_no_homophily() -> None:
    edge = EDGE.copy()
    edge[2] = 0
    out = summarise_edges(make_result({"edge": edge}))
    assert float(out["homophily_mean"]) == pytest.approx((1 + 0.5 + 1) / 3)
    assert "without an edge" in out.attrs["homophily"]


def test_homophily_of_predicted_classes_is_not_taken_for_that_of_known_ones() -> None:
    known = {"y": ("node", [0, 0, 1, 1])}
    draws = {"edge": EDGE, "edge_probability": CHANCE, "homophily": np.full(4, 0.123)}
    share = np.mean([1 / 2, 1 / 3, 0, 1 / 2])  # bd now joins two classes
    assert float(summarise_edges(make_result(draws, data=known, method="lds"))["homophily_mean"]) == pytest.approx(
        share
    )
    own = summarise_edges(make_result(draws, data=known, method="noisy_edges"))
    assert float(own["homophily_mean"]) == pytest.approx(0.123)
    assert "homophily_mean" not in summarise_edges(make_result(data={"y": ("node", [-1] * 4)}))


def test_moments_give_exact_means_and_intervals_of_independent_pairs() -> None:
    result = make_result({"num_edges": [2.0, 3.0, 2.0, 2.0]}, marginals=MOMENTS)
    out = summarise_edges(result, prob=0.9)
    np.testing.assert_allclose(out["probability"], [0.8, 0.25, 0.7])
    np.testing.assert_allclose(out["probability_mcse"], [0.05, 0.05, 0])
    np.testing.assert_allclose(out["degree_mean"], [1.05, 1.5, 0.25, 0.7])
    variance = np.array([0.16 + 0.1875, 0.16 + 0.21, 0.1875, 0.21])
    half = stats.norm.ppf(0.95) * np.sqrt(variance)
    np.testing.assert_allclose(out["degree_upper"], out["degree_mean"] + half)
    np.testing.assert_allclose(out["degree_lower"], np.maximum(out["degree_mean"] - half, 0))
    assert "independent" in out.attrs["degree"]
    assert float(out["num_edges_mean"]) == 2.25
    assert float(out["homophily_mean"]) == pytest.approx(0.8 / 1.05)
    assert np.isnan(out["homophily_lower"])
    assert "not kept" in edge_table(out)


def test_without_draws_of_their_number_edges_are_counted_as_independent() -> None:
    out = summarise_edges(make_result({"z": np.zeros(4)}, marginals=MOMENTS), prob=0.9)
    assert float(out["num_edges_mean"]) == pytest.approx(1.75)
    half = stats.norm.ppf(0.95) * np.sqrt(0.16 + 0.1875 + 0.21)
    assert float(out["num_edges_upper"]) == pytest.approx(1.75 + half)
    assert float(out["mean_degree_lower"]) == pytest.approx((1.75 - half) / 2)


def test_a_pair_that_stands_for_others_spreads_as_they_would() -> None:
    rng = np.random.default_rng(0)
    chance = np.broadcast_to(np.array([0.5, 0.2, 0.3], dtype=np.float32), (20_000, 3))
    edge = (rng.random(chance.shape) < chance).astype(np.float32)
    weight = {"pair_weight": ("pair", [1.0, 25.0, 1.0])}
    out = summarise_edges(make_result({"edge": edge, "edge_probability": chance}, data=weight), prob=0.9)
    np.testing.assert_allclose(out["degree_mean"], [5.5, 0.8, 5.0, 0.3], rtol=1e-5)
    # Two values only: 25 p + 5 (a - p), with the sd 2 of 25 independent edges and not 25 times that of one.
    assert float(out["degree_lower"][2]) == pytest.approx(4.0, abs=1e-4)
    assert float(out["degree_upper"][2]) == pytest.approx(9.0, abs=1e-4)
    assert "noise of that draw" in out.attrs["degree"]
    again = summarise_edges(make_result({"edge": edge}, data=weight))  # about the share of draws, where p is not known
    np.testing.assert_allclose(again["degree_mean"], out["degree_mean"], atol=0.35)  # 4 sd: 25 sqrt(.16 / 20000) = .07
    assert float(again["num_edges_mean"]) == pytest.approx(float(again["degree_mean"].sum()) / 2, rel=1e-5)


def test_new_and_doubtful_pairs_are_ranked_and_padded() -> None:
    out = summarise_edges(make_result(), top=2)
    assert out["new_pair"].values.tolist() == [1, -1]
    assert out["doubtful_pair"].values.tolist() == [2, 0]  # bd at 0.7 before ab at 0.8
    alike = np.tile(np.array([0.4, 0.1, 0.4], dtype=np.float32), (4, 1))
    table = edge_table(make_result({"edge": EDGE, "edge_probability": alike}), top=1)
    assert table.count("1 more are as probable as the last.") == 1


def test_labels_tell_of_edges_what_their_probability_leaves_out() -> None:
    seen = xr.Dataset({"label": ("known", [0, 1])})
    out = edge_marginals(make_result(method="noisy_edges", observed_data=seen))
    np.testing.assert_allclose(out["probability"], [0.75, 0.5, 1.0])
    assert out.attrs["from"] == "edge"
    assert out["probability_sd"].isnull().all()
    np.testing.assert_allclose(out["probability_mcse"], [0.25, np.sqrt(1 / 3) / 2, 0])
    other = edge_marginals(make_result(method="lds", observed_data=seen))
    assert other.attrs["from"] == "edge_probability"


def test_dependent_draws_of_chains_have_a_larger_monte_carlo_error() -> None:
    rng = np.random.default_rng(0)
    steps = rng.normal(size=(4000, 3))
    for t in range(1, len(steps)):
        steps[t] = 0.9 * steps[t - 1] + np.sqrt(1 - 0.81) * steps[t]
    draws = {"edge": np.ones((4000, 3)), "edge_probability": 1 / (1 + np.exp(-0.3 * steps))}
    chains, guide = (edge_marginals(make_result(draws, engine=engine)) for engine in ("mcmc", "svi"))
    ratio = chains["probability_mcse"] / guide["probability_mcse"]
    # sqrt((1 + 0.9) / (1 - 0.9)) = 4.36; an effective sample size of 200 is known to about a fifth
    assert ((ratio > 3.3) & (ratio < 5.8)).all()


def test_true_edges_are_found_in_either_direction_and_lost_ones_counted() -> None:
    truth = {"true_source": ("true_edge", [1, 2, 3]), "true_target": ("true_edge", [0, 3, 0])}  # ba, cd, da
    out = edge_marginals(make_result(data=truth))
    assert out["true"].values.tolist() == [True, False, False]
    assert out.attrs["true_edges_missed"] == 2


def test_edges_that_no_candidate_stands_for_are_said() -> None:
    draws = {"edge": EDGE, "edge_probability": CHANCE, "num_edges": np.array([10.0, 11.0, 9.0, 10.2])}
    out = summarise_edges(make_result(draws, method="noisy_edges"))
    assert "8.3 of them lie among pairs that are no candidates" in out.attrs["num_edges"]
    assert "given the parameters" in out.attrs["num_edges"]
    near = {**draws, "num_edges": np.array([1.7, 1.8, 1.75, 1.75])}
    assert "candidates" not in summarise_edges(make_result(near)).attrs["num_edges"]


def test_what_a_probability_means_depends_on_the_method() -> None:
    assert "that of a true edge" in edge_table(make_result(method="noisy_edges"))
    for method in ("vib_gsl", "lds"):
        assert "no belief about a true edge" in edge_table(make_result(method=method)).replace("\n", " ")
    assert "for the method to say" in edge_table(make_result())


def test_the_table_holds_the_numbers() -> None:
    lines = edge_table(make_result(data={"pair_observed": ("pair", [3, 0, 1])}), prob=0.5).splitlines()
    assert lines[0] == "Edges by other: 3 candidate pairs of 4 nodes, 2 of them observed."
    row = {line.split()[0]: line.split() for line in lines if line.strip()}
    assert row["edges"] == ["edges", "2.2", "[2.0,", "2.2]", "2.0"]
    place = lines.index("Most doubtful of those observed:")
    assert lines[place + 1].split() == ["source", "target", "probability", "sd", "Monte", "Carlo", "error", "seen"]
    assert lines[place + 3].split() == ["b", "d", "0.700", "0.000", "0.0000", "1"]
    assert lines[place + 4].split() == ["a", "b", "0.800", "0.082", "0.0408", "3"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"draws": {"z": np.zeros(4)}}, "neither draws nor moments"),
        ({"draws": {"edge_probability": CHANCE + 0.5}}, r"outside \[0, 1\]"),
        ({"data": {"pair_source": ("pair", ["a", "a", "q"])}}, "name nodes"),
        ({"constant_data": xr.Dataset({"y": ("node", [0])})}, "lack .*pair_source.*method on graphs"),
        ({"marginals": moments(edge=[0.5, 0.5], edge_sd=[0.1, 0.1]), "draws": {"z": np.zeros(4)}}, "there are 3 pairs"),
    ],
)
def test_results_without_edges_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ResultError, match=words):
        edge_marginals(make_result(**change))


@pytest.mark.parametrize(
    ("options", "words"), [({"top": 0}, "top=0"), ({"top": True}, "top=True"), ({"prob": 1.0}, "prob=1.0")]
)
def test_options_out_of_range_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        summarise_edges(make_result(), **options)


@pytest.fixture(scope="module", params=["noisy_edges", "vib_gsl"])
def fitted(request: pytest.FixtureRequest) -> Result:
    problem = get_method(request.param).tiny()
    return fit_svi(problem, num_steps=20, num_samples=200, progress=False)


def test_files_of_a_fit_hold_its_edges(fitted: Result, tmp_path: Path) -> None:
    written = write_edges(fitted, tmp_path / "new")
    folder = written.folder
    with (folder / "edges.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    chance = fitted.posterior["edge_probability"].mean(("chain", "draw"), dtype=float).values
    np.testing.assert_allclose([float(row["probability"]) for row in rows], chance, rtol=1e-5)
    constant = fitted.tree["constant_data"]
    for column, name in (("source", "pair_source"), ("target", "pair_target"), ("observed", "pair_observed")):
        assert [int(row[column]) for row in rows] == constant[name].values.astype(int).tolist()
    assert ("graph" in rows[0]) == ("graph_index" in constant)
    with (folder / "nodes.csv").open(encoding="utf-8") as file:
        nodes = list(csv.DictReader(file))
    out = summarise_edges(fitted)
    for column, name in (("degree_mean", "degree_mean"), ("degree_upper", "degree_upper"), ("node", "node")):
        np.testing.assert_allclose([float(row[column]) for row in nodes], out[name], rtol=1e-5)
    assert ("graph" in nodes[0]) == ("graph_index" in constant)
    assert {path.name for path in (folder / "figures").iterdir()} == {"adjacency.png", "loss.png"}
    for path in (folder / "figures").iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")
    text = written.report.read_text(encoding="utf-8")
    assert written.table.splitlines()[0] in text
    assert str(written.diagnosis) in text


def test_a_result_that_was_saved_gives_the_same(fitted: Result, tmp_path: Path) -> None:
    before = summarise_edges(fitted)
    after = summarise_edges(Result.load(fitted.save(tmp_path)))
    xr.testing.assert_identical(before, after)


def test_degrees_of_a_fit_add_up_to_its_edges(fitted: Result) -> None:
    out = summarise_edges(fitted)
    total = fitted.posterior["num_edges"]
    error = float(total.std()) / np.sqrt(total.size)
    # Draws of edges for VIB-GSL, expectations for noisy edges, whose number is then equal but for rounding.
    assert abs(float(out["degree_mean"].sum()) / 2 - float(out["num_edges_mean"])) < 4 * error + 1e-4
    assert (out["degree_lower"] <= out["degree_upper"]).all()
    assert float(out["mean_degree_mean"]) == pytest.approx(
        2 * float(out["num_edges_mean"]) / out.sizes["node"], rel=1e-5
    )


def test_known_truth_adds_a_figure_of_calibration(tmp_path: Path) -> None:
    truth = {"true_source": ("true_edge", [0]), "true_target": ("true_edge", [1])}
    draws = {"edge": np.tile(EDGE, (3, 1)), "edge_probability": np.tile(CHANCE, (3, 1))}
    stats_group = xr.Dataset({"log_weight": (("chain", "draw"), np.linspace(0, 0.1, 12)[None])})
    result = make_result(draws, data=truth, sample_stats=stats_group)
    write_edges(result, tmp_path)
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"adjacency.png", "reliability.png"}
    assert (tmp_path / "edges.csv").read_text(encoding="utf-8").splitlines()[1].startswith("a,b,1,0.8,")
