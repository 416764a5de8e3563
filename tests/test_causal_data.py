"""Data with concepts: geometry by hand, interventions, pictures, structural equations, files, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from PIL import Image
from small_data import write_celeba

from probmodels.datasets import load
from probmodels.datasets.causal import as_graph, causal_order, check_concepts, hide_labels, make_concepts
from probmodels.datasets.earnings import sample_earnings
from probmodels.datasets.scenes import SCENES, counterfactual, mechanism, render
from probmodels.datasets.sem import average_effects, draw_sem, sample_sem, sem_of, simulate_sem
from probmodels.errors import DataError

TYPICAL = {"pendulum": [[20.0, 80.0, 6.0, 9.0]], "flow": [[0.9, 3.0, 4.0, 3.5]]}


# --------------------------------------------------------------------------------------------------------- physics


def test_shadow_of_a_vertical_pendulum_in_light_at_45_degrees() -> None:
    # Pivot (10, 10.5) and tip (10, 1), ground at -0.5: shadows at 10 - 11 and at 10 - 1.5.
    assert mechanism("pendulum", {"angle": 0, "light": 50}) == pytest.approx(np.array([[0, 50, 9.5, 3.75]]))


def test_shadow_of_a_horizontal_pendulum_with_the_sun_overhead() -> None:
    # Tip (19.5, 10.5): shadows straight below, at 10 and 19.5; the tangent of light is infinite here.
    assert mechanism("pendulum", {"angle": 100, "light": 100}) == pytest.approx(np.array([[100, 100, 9.5, 14.75]]))


def test_shadow_of_a_vertical_pendulum_overhead_keeps_the_least_length() -> None:
    assert mechanism("pendulum", {"angle": 0, "light": 100}) == pytest.approx(np.array([[0, 100, 3, 10]]))


def test_reach_of_the_jet() -> None:
    # Ball of radius 1 lifts a level of 1.5 to 2.5; a fall of 2: sqrt(1.96 * 2.5 * 2) = sqrt(9.8).
    found = mechanism("flow", {"ball": 1.0, "height": 2.5, "hole": 2.5})
    assert found == pytest.approx(np.array([[1, 2.5, np.sqrt(9.8), 2.5]]))
    assert mechanism("flow", {"ball": 1.0, "hole": 2.5})[0, 1] == pytest.approx(1 + 2.45)  # a level unknown


@pytest.mark.parametrize("scene", SCENES)
def test_published_grids_have_their_sizes_and_ranges(scene: str) -> None:
    data = load(scene, size=8)
    total, train = {"pendulum": (7308, 5482), "flow": (8100, 6480)}[scene]
    assert (data.sizes["data"], int((data["split"] == "train").sum())) == (total, train)
    assert len(np.unique(data["label"].values, axis=0)) == total
    spread = np.ptp(data["label"].values, axis=0)
    for low, high, labels, width in zip(
        SCENES[scene].low, SCENES[scene].high, data["label"].values.T, spread, strict=True
    ):
        assert low <= labels.min() + 1e-9
        assert labels.max() <= high + 1e-9
        assert low == pytest.approx(labels.min(), abs=0.01 * width)
        assert high == pytest.approx(labels.max(), abs=0.01 * width)
    if scene == "pendulum":
        position, half = data["label"].values[:, 3], data["label"].values[:, 2] / 2
        left, _, side = SCENES[scene].frame
        assert left < (position - half).min()
        assert (position + half).max() < left + side  # no shadow leaves the frame
        length = data["label"].sel(concept="length").values
        assert (length == 3).mean() == pytest.approx(0.396, abs=0.001)


@pytest.mark.parametrize("scene", SCENES)
def test_factual_values_come_back_to_the_bit(scene: str) -> None:
    concepts = load(scene, size=8, num=200, noise=0.3)["label"].values
    np.testing.assert_array_equal(mechanism(scene, concepts), concepts)
    for place, name in enumerate(SCENES[scene].concepts):
        np.testing.assert_array_equal(mechanism(scene, concepts, {name: concepts[:, place]}), concepts)


@pytest.mark.parametrize("scene", SCENES)
def test_interventions_move_descendants_and_nothing_else(scene: str) -> None:
    known = SCENES[scene]
    concepts = load(scene, size=8, num=50)["label"].values
    reach = np.linalg.matrix_power(np.eye(4) + known.graph, 4) > 0
    for place, name in enumerate(known.concepts):
        value = concepts[:, place] + 0.1 * (known.high[place] - known.low[place])
        after = mechanism(scene, concepts, {name: value})
        np.testing.assert_array_equal(after[:, place], value)
        np.testing.assert_array_equal(after[:, ~reach[place]], concepts[:, ~reach[place]])
        for descendant in np.flatnonzero(reach[place]):
            assert (after[:, descendant] != concepts[:, descendant]).any()


def test_disturbances_are_kept_under_interventions() -> None:
    noisy = load("pendulum", size=8, num=100, noise=0.5, seed=3)["label"].values
    clean = mechanism("pendulum", {"angle": noisy[:, 0], "light": noisy[:, 1]})
    do = {"angle": np.linspace(-30, 30, 100)}
    moved = mechanism("pendulum", noisy, do) - mechanism("pendulum", clean, do)
    np.testing.assert_allclose(moved, noisy - clean, atol=1e-12)
    assert (noisy - clean)[:, 2:].std() == pytest.approx(0.5, rel=4 / np.sqrt(2 * 200))


def test_a_chain_of_effects_and_several_interventions() -> None:
    one = np.array([[0.5, 2.0, 3.0, 3.0]])
    after = mechanism("flow", one, {"ball": [0.5, 1.0, 1.0], "hole": [3.0, 3.0, 4.0]})
    assert after[:, 1] == pytest.approx([2.0, 2.875, 2.875])
    reach = np.sqrt(1.96 * after[:, 1] * (after[:, 3] - 0.5))
    assert after[:, 2] == pytest.approx(reach + (3.0 - np.sqrt(1.96 * 2 * 2.5)))  # what was exogenous stays
    held = mechanism("flow", one, {"ball": 1.0, "height": 3.0})
    assert held[0, :2] == pytest.approx([1, 3])


@pytest.mark.parametrize(
    ("values", "do", "message"),
    [
        (TYPICAL["pendulum"], {"lenght": 3}, "did you mean 'length'"),
        (TYPICAL["pendulum"], {"length": np.nan}, "missing or infinite"),
        (TYPICAL["pendulum"] * 3, {"length": [1.0, 2.0]}, "3 rows"),
        ([[1.0, 2.0]], {}, r"shape \(1, 2\)"),
        ({"angle": 3.0}, {}, "'light' is absent"),
        ([[np.nan, 80.0, 6.0, 9.0]], {}, "'angle' is missing"),
        ([[20.0, 80.0, np.inf, 9.0]], {}, "'length' is missing or infinite"),
    ],
)
def test_mechanism_refuses(values: Any, do: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        mechanism("pendulum", values, do)


# -------------------------------------------------------------------------------------------------------- pictures


def covered(image: np.ndarray, background: np.ndarray, pixel: float, colour: tuple[float, ...]) -> float:
    """Area of what was laid over a background in a colour, from the channel where the two differ most."""
    gap = np.asarray(colour)[:, None, None] - background
    channel = np.abs(gap).mean((1, 2)).argmax()
    return float(((image - background)[channel] / gap[channel]).sum()) * pixel**2


@pytest.mark.parametrize("size", [32, 64])
def test_sun_has_the_area_of_a_disc(size: int) -> None:
    pixel = 25 / size
    for light in (60.0, 93.3, 147.0):
        image = render("pendulum", [[0.0, light, 6.0, 9.0]], size)[0]
        top = image[:, : size // 4]  # holds all of the sun and nothing else
        assert covered(top, np.ones_like(top), pixel, (1.0, 0.65, 0.0)) == pytest.approx(9 * np.pi, rel=0.01)


@pytest.mark.parametrize("radius", [0.17, 0.5, 1.1])
def test_ball_has_the_area_of_a_disc_even_where_it_is_less_than_a_pixel(radius: float) -> None:
    pair = render("flow", [[radius, 3.0, 4.0, 3.5], [0.0, 3.0, 4.0, 3.5]], 32)
    assert covered(pair[0], pair[1], 14 / 32, (0.7, 0.13, 0.13)) == pytest.approx(np.pi * radius**2, rel=0.06)


def test_shadow_has_its_length_and_place() -> None:
    low, high = 3.3, 9.1
    concepts = [[0.0, 80.0, high - low, (low + high) / 2], [0.0, 80.0, -1.0, 5.0]]
    image, without = render("pendulum", concepts, 64)
    dark = ((without - image)[0] / 0.8).clip(0)
    assert dark.sum() * (25 / 64) ** 2 == pytest.approx(high - low, rel=1e-5)  # 1 high
    x = -2.5 + (np.arange(64) + 0.5) * 25 / 64
    assert (dark * x).sum() / dark.sum() == pytest.approx((low + high) / 2, abs=0.01)  # to the ends' pixels


def test_jet_comes_down_at_its_reach() -> None:
    size, pixel = 96, 14 / 96
    for reach in (3.0, 5.5):
        image = render("flow", [[0.5, 3.0, reach, 4.0]], size)[0]
        row = int(np.floor((13.5 - 0.55) / pixel))  # just above the landing, at 0.5
        blue = 1 - image[0, row]
        blue[: int((8.5 - 1.5) / pixel)] = 0
        x = 1.5 + (np.arange(size) + 0.5) * pixel
        assert (blue * x).sum() / blue.sum() == pytest.approx(8 + reach, abs=0.1)


def test_jitter_lengthens_the_jet_in_the_picture_only() -> None:
    row = np.array(TYPICAL["flow"])
    changed = render("flow", row, 32, jitter=[0.2]) - render("flow", row, 32)
    assert np.abs(changed).max() > 0.1
    longer = row * [1, 1, np.sqrt(1 + 0.2 / 0.98), 1]
    np.testing.assert_allclose(render("flow", row, jitter=[0.2]), render("flow", longer), atol=1e-4)


@pytest.mark.parametrize("scene", SCENES)
def test_every_concept_changes_the_picture_by_itself_and_smoothly(scene: str) -> None:
    known = SCENES[scene]
    for place in range(4):
        rows = np.repeat(np.array(TYPICAL[scene]), 201, axis=0)
        rows[:, place] = np.linspace(known.low[place], known.high[place], 201)
        images = render(scene, rows, 32)
        steps = np.abs(np.diff(images, axis=0))
        assert (steps.sum((1, 2, 3)) > 1e-3).all()  # no step goes unseen
        assert steps.max() < 0.35  # and none jumps, though a step is up to a sixth of a pixel


@pytest.mark.parametrize("scene", SCENES)
def test_pictures_are_in_range_and_do_not_depend_on_the_batch(scene: str) -> None:
    concepts = load(scene, size=8, num=600)["label"].values
    images = render(scene, concepts, 40)
    assert images.dtype == np.float32
    assert images.shape == (600, 3, 40, 40)
    assert images.min() >= 0
    assert images.max() <= 1
    np.testing.assert_array_equal(images[577:578], render(scene, concepts[577:578], 40))


def test_counterfactual_pictures() -> None:
    data = load("flow", size=24, num=20, seed=5)
    concepts, jitter = data["label"].values, data["jitter"].values
    after, images = counterfactual("flow", concepts, {}, size=24, jitter=jitter)
    np.testing.assert_array_equal(after, concepts)
    np.testing.assert_array_equal(images, data["image"].values)
    after, images = counterfactual("flow", concepts, {"flow": 5.0}, size=24, jitter=jitter)
    tank = slice(0, int((8 - 1.5) / 14 * 24))
    np.testing.assert_array_equal(images[..., tank], data["image"].values[..., tank])  # causes look as they did
    assert (np.abs(images - data["image"].values).max((1, 2, 3)) > 0.05).all()


def test_simulated_scenes_follow_their_seed() -> None:
    for scene in SCENES:
        one, again, other = (load(scene, size=8, num=50, seed=seed) for seed in (1, 1, 2))
        xr.testing.assert_identical(one, again)
        assert not np.array_equal(one["label"], other["label"])
        check_concepts(one)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 4}, "size=4"),
        ({"num": 1}, "num=1"),
        ({"noise": -1.0}, "noise=-1.0"),
        ({"num": 10, "num_train": 11}, "there are 10"),
    ],
)
def test_scenes_refuse_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load("pendulum", **options)


def test_render_refuses() -> None:
    with pytest.raises(DataError, match="finite"):
        render("flow", [[np.nan, 1, 1, 1]])
    with pytest.raises(DataError, match="jitter"):
        render("flow", TYPICAL["flow"], jitter=[0.1, 0.2])
    with pytest.raises(DataError, match="choose one of pendulum, flow"):
        render("tank", TYPICAL["flow"])


# ------------------------------------------------------------------------------------------- structural equations


def test_linear_models_have_their_exact_moments() -> None:
    sem = draw_sem(6, degree=3, equal_variances=False, seed=4)
    weight, scale = sem.weight, sem.scale
    total = np.linalg.inv(np.eye(6) - weight)
    covariance = (total.T * sem.noise_scale**2) @ total / np.outer(scale, scale)
    assert np.diag(covariance) == pytest.approx(np.ones(6))
    x = sample_sem(sem, 40_000, seed=1)
    assert x.mean(0) == pytest.approx(np.zeros(6), abs=4.5 / np.sqrt(40_000))
    assert np.cov(x.T) == pytest.approx(covariance, abs=4.5 * np.sqrt(2 / 40_000))


def test_average_effects_of_a_chain_are_products_of_weights() -> None:
    data = simulate_sem(4, 50, graph="chain", standardise=False, seed=2)
    weight = data["true_weight"].values
    effect = average_effects(sem_of(data), high=2.0)["average_effect"]
    assert float(effect.sel(cause="v1", effect="v4")) == pytest.approx(2 * weight[0, 1] * weight[1, 2] * weight[2, 3])
    assert (np.tril(effect) == 0).all()


@pytest.mark.parametrize("mechanism", ["linear", "additive", "post_nonlinear"])
def test_average_effects_are_those_of_interventions(mechanism: str) -> None:
    sem = draw_sem(4, degree=3, mechanism=mechanism, noise="laplace", seed=7)
    truth = average_effects(sem, -1.0, 1.5, num_rows=5000)
    rows = 5000
    for place, name in enumerate(sem.names):
        arms = [sample_sem(sem, rows, interventions={name: v}, seed=s) for v, s in ((-1.0, 50), (1.5, 51))]
        error = np.sqrt(sum(arm.var(0) for arm in arms) / rows + truth["standard_error"].values[place] ** 2)
        found = arms[1].mean(0) - arms[0].mean(0)
        others = np.arange(4) != place
        assert (np.abs(found - truth["average_effect"].values[place])[others] <= 4 * error[others] + 1e-12).all()
        assert (arms[0][:, place] == -1).all()


@pytest.mark.parametrize(
    ("mechanism", "noise"),
    [
        ("linear", "gaussian"),
        ("linear", "gumbel"),
        ("linear", "uniform"),
        ("additive", "laplace"),
        ("post_nonlinear", "gaussian"),
    ],
)
def test_data_of_models_are_standardised_by_the_model(mechanism: str, noise: str) -> None:
    data = simulate_sem(5, 4000, mechanism=mechanism, noise=noise, seed=11)
    x = data["observation"].values
    np.testing.assert_array_equal(x, data["label"].values)
    kurtosis = ((x - x.mean(0)) ** 4).mean(0) / x.var(0) ** 2
    assert x.mean(0) == pytest.approx(np.zeros(5), abs=5 * np.sqrt(1 / 4000 + 1 / 16384))
    assert (np.abs(x.var(0) - 1) < 5 * np.sqrt((kurtosis - 1) * (1 / 4000 + 1 / 16384))).all()
    np.testing.assert_array_equal(sample_sem(sem_of(data), 4000, seed=11), x)
    assert ("true_weight" in data) == (mechanism == "linear")


def test_interventions_on_models_leave_causes_as_they_are() -> None:
    sem = draw_sem(5, graph="chain", mechanism="additive", seed=3)
    free = sample_sem(sem, 100, seed=1)
    held = sample_sem(sem, 100, interventions={"v3": 0.7, "v5": free[:, 4]}, seed=1)
    np.testing.assert_array_equal(held[:, :2], free[:, :2])
    np.testing.assert_allclose(held[:, 4], free[:, 4], atol=1e-12)
    assert np.allclose(held[:, 2], 0.7)
    assert (held[:, 3] != free[:, 3]).all()
    same = sample_sem(sem, 100, interventions={"v2": free[:, 1]}, seed=1)
    np.testing.assert_allclose(same, free, atol=1e-10)


def test_graphs_of_models() -> None:
    assert draw_sem(4, graph="fork").graph.sum(1).tolist() == [3, 0, 0, 0]
    assert draw_sem(4, graph="collider").graph.sum(0).tolist() == [0, 0, 0, 3]
    assert draw_sem(3, graph=[["v3", "v1"]]).graph.tolist() == [[0, 0, 0], [0, 0, 0], [1, 0, 0]]
    assert draw_sem(2).graph.sum() == 1  # the default is what two nodes can have
    edges = [draw_sem(20, degree=3, seed=seed).graph.sum() for seed in range(40)]
    assert np.mean(edges) == pytest.approx(30, abs=4 * np.sqrt(190 * 3 / 19 * 16 / 19 / 40))
    tree = draw_sem(30, graph="scale_free", seed=1).graph
    assert tree.sum() == 29
    assert tree.sum(1).max() > 3


def test_models_refuse() -> None:
    for options, message in (
        ({"graph": "ring"}, "choose one of er"),
        ({"graph": [["v1", "v2"], ["v2", "v1"]]}, "cycle among v1, v2"),
        ({"noise": "cauchy"}, "choose one of gaussian"),
        ({"mechanism": "quadratic"}, "choose one of linear"),
        ({"num_nodes": 1}, "num_nodes=1"),
        ({"test": 1.0}, "test=1.0"),
    ):
        with pytest.raises(DataError, match=message):
            simulate_sem(**{"num_nodes": 3, "num_rows": 20, **options})  # type: ignore[arg-type]
    with pytest.raises(DataError, match="unknown concept 'v9'"):
        sample_sem(draw_sem(3), 5, interventions={"v9": 1.0})
    with pytest.raises(DataError, match="finite"):
        sample_sem(draw_sem(3), 5, interventions={"v1": [1.0, 2.0]})
    with pytest.raises(DataError, match="simulate_sem"):
        sem_of(load("earnings", num_rows=50))


def test_earnings_follow_their_equations() -> None:
    rows = 20_000
    free = sample_earnings(rows, seed=1)
    np.testing.assert_array_equal(load("earnings", num_rows=rows, seed=1)["label"].values, free)
    one, more = (sample_earnings(rows, interventions={"education": years}, seed=1) for years in (10.0, 11.0))
    np.testing.assert_array_equal(one[:, [0, 2]], free[:, [0, 2]])
    assert (more[:, 3] - one[:, 3]).min() >= -1 - 1e-9
    assert (more[:, 3] - one[:, 3]).mean() == pytest.approx(-1, abs=0.01)
    both = [sample_earnings(rows, interventions={"education": e, "experience": 10.0}, seed=1) for e in (10.0, 11.0)]
    np.testing.assert_allclose(np.log(both[1][:, 4] / both[0][:, 4]), 0.09)
    slope = np.polyfit(free[:, 0], free[:, 1], 1)[0]
    assert slope == pytest.approx(0.6, abs=4 * 1.8 / 2.5 / np.sqrt(rows))


# ----------------------------------------------------------------------------------------------------------- labels


def table(rows: int = 10) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {"values": rng.random((rows, 3, 4, 4)), "labels": rng.random((rows, 2)), "names": ["a", "b"]}


def test_concepts_are_labelled() -> None:
    data = make_concepts(**table(), graph=[["a", "b"]], units=["m", "s"])
    assert data["image"].dims == ("data", "channel", "row", "column")
    assert data["image"].dtype == np.float32
    assert data["label"].sel(concept="b").dims == ("data",)
    assert data["graph"].sel(cause="a", effect="b") == 1
    assert data["graph"].values.sum() == 1
    assert (data["split"] == "train").all()
    assert data["unit"].values.tolist() == ["m", "s"]
    check_concepts(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": np.zeros((9, 2))}, r"shape \(9, 2\) for 10 rows and 2 concepts"),
        ({"labels": np.stack([np.arange(10), np.full(10, 4)], 1)}, "'b' is constant.* 10 labels for training is 4"),
        ({"labels": np.stack([np.arange(10), np.full(10, np.nan)], 1)}, "'b' has no label"),
        ({"labels": np.stack([np.arange(10), np.full(10, np.inf)], 1)}, "'b' in row 0 is infinite"),
        ({"values": np.full((10, 3, 4, 4), 200)}, "divide those of 8 bits"),
        ({"values": np.full((10, 3, 4, 4), np.nan)}, "divide those of 8 bits"),
        ({"values": np.full((10, 3), np.nan)}, r"observation\[0, 0\] is nan"),
        ({"values": np.zeros((10, 4, 4))}, r"shape \(10, 4, 4\)"),
        ({"names": ["a", "a"]}, "more than once"),
        ({"split": ["test"] * 10}, "nothing to learn"),
        ({"split": ["train"] * 9 + ["dev"]}, "'dev' is unknown"),
        ({"split": ["train"]}, "give one for each"),
        ({"units": ["m"]}, "1 units"),
        ({"graph": [["a", "c"]]}, "unknown concept 'c'"),
        ({"graph": [["a", "b"], ["b", "a"]]}, "cycle among a, b"),
        ({"graph": [[1, 0], [0, 0]]}, "cycle"),
        ({"graph": [[0, 0.5], [0, 0]]}, "other than 0 and 1"),
        ({"graph": np.zeros((3, 3))}, r"shape \(3, 3\)"),
    ],
)
def test_unusable_concepts_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        make_concepts(**{**table(), **change})


def test_check_refuses_other_data() -> None:
    data = make_concepts(**table(), graph=[["a", "b"]])
    for wrong in (data["image"], data.drop_vars("label"), data.assign(observation=("data", np.zeros(10)))):
        with pytest.raises(DataError, match="make it by make_concepts"):
            check_concepts(wrong)
    with pytest.raises(DataError, match="coordinate 'cause'"):
        check_concepts(data.assign_coords(cause=["b", "a"]))


def test_hidden_rows_go_as_a_whole_and_are_nested() -> None:
    data = make_concepts(**table(40), split=["train"] * 30 + ["test"] * 10)
    few, many = hide_labels(data, 0.3, seed=1), hide_labels(data, 0.9, seed=1)
    gone = [np.isnan(d["label"].values) for d in (few, many)]
    assert [g.all(1).sum() for g in gone] == [9, 27]
    assert [g.any(1).sum() for g in gone] == [9, 27]
    assert (gone[1] >= gone[0]).all()
    assert not gone[1][30:].any()
    assert not np.isnan(data["label"].values).any()
    for share in (1.0, -0.1):
        with pytest.raises(DataError, match="share"):
            hide_labels(data, share)
    with pytest.raises(DataError, match="constant"):
        hide_labels(data, 0.97)


def test_orders_have_causes_first() -> None:
    graph = as_graph([["c", "a"], ["a", "b"], ["c", "b"]], ["a", "b", "c", "d"])
    assert causal_order(graph) == [2, 0, 1, 3]
    assert causal_order(np.zeros((0, 0))) == []


# ------------------------------------------------------------------------------------------------------------ files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "more").mkdir()
    files = ["007.png", "b.jpg", "more/c.png", "d.png", "e.png"]
    for grey, name in zip((0, 60, 120, 180, 240), files, strict=True):
        Image.new("RGB", (20, 10), (grey, grey, grey)).save(tmp_path / name)
    rows = {"file": files, "size": [1.5, 2, None, 4, 5], "bright": [0, 1, 0, 1, 1]}
    pd.DataFrame(rows).to_csv(tmp_path / "labels.csv", index=False)
    return tmp_path


def test_a_folder_of_images(folder: Path) -> None:
    data = load("concept_images", root=folder, size=6, graph=[["bright", "size"]], test=0.2)
    assert data["image"].shape == (5, 3, 6, 6)
    assert data["concept"].values.tolist() == ["size", "bright"]
    expected = np.array([0, 60, 120, 180, 240]) / 255
    assert data["image"].values.mean((1, 2, 3)) == pytest.approx(expected, abs=0.01)
    assert np.isnan(data["label"].values).sum() == 1
    assert np.isnan(data["label"].values[2, 0])
    assert data["file"].values[0] == "007.png"
    assert int((data["split"] == "test").sum()) == 1
    grey = load("concept_images", root=folder, concepts=["bright"], size=6, colour=False, crop=False)
    assert grey["image"].shape == (5, 1, 6, 6)
    assert grey["concept"].values.tolist() == ["bright"]


def test_images_are_cut_to_their_middle_and_transparency_is_white(tmp_path: Path) -> None:
    pixels = np.zeros((10, 30, 4), dtype=np.uint8)
    pixels[:, 10:20] = (255, 0, 0, 255)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(np.zeros((10, 10, 4), dtype=np.uint8)).save(tmp_path / "b.png")
    labels = pd.DataFrame({"file": ["a.png", "b.png"], "x": [0, 1], "split": ["train", "train"]})
    data = load("concept_images", root=tmp_path, table=labels, size=5)
    assert data["image"].values[0].mean((1, 2)) == pytest.approx([1, 0, 0])
    assert data["image"].values[1].min() == 1


def test_unusable_folders_are_refused(folder: Path) -> None:
    rows = pd.read_csv(folder / "labels.csv", dtype={"file": str})
    for changed, message in (
        (rows.iloc[:4], "5 images, but table labels of 4; there is no row for 'e.png'"),
        (pd.concat([rows, rows.iloc[:1]]), "'007.png' more than once"),
        (rows.assign(file=["x.png", *rows["file"][1:]]), "'x.png'"),
        (rows.drop(columns="file"), "no column 'file'"),
        (rows[["file"]], "no columns of concepts"),
        (rows.assign(bright=1), "'bright' is constant"),
        (rows.assign(size=np.nan), "'size' has no label"),
        (rows.assign(size="big"), "'size' of table is no numbers"),
        (rows.assign(split="validation"), "'validation' is unknown"),
        (rows.iloc[:0], "no rows"),
        (3, "is a int"),
    ):
        options = {} if isinstance(changed, pd.DataFrame) and "split" in changed else {"test": 0.0}
        with pytest.raises(DataError, match=message):
            load("concept_images", root=folder, table=changed, **options)
    for given, options, message in (
        (rows.assign(split="train"), {"test": 0.5}, "test=0.5 is not used with column 'split' of table"),
        (rows.assign(split="train"), {"seed": 1}, "seed=1 is not used with column 'split' of table"),
        (rows, {"test": 0.0, "seed": 1}, "seed=1 is not used with test=0"),
        (rows, {"graph": [["bright", "wide"]]}, "unknown concept 'wide'"),
        (rows, {"concepts": ["size", "size"]}, "'size' of table is named more than once"),
    ):
        with pytest.raises(DataError, match=message):
            load("concept_images", root=folder, table=given, **options)
    with pytest.raises(DataError, match=r"labels\.csv is a file; name the folder"):
        load("concept_images", root=folder / "labels.csv")
    with pytest.raises(DataError, match="no folder"):
        load("concept_images", root=folder / "none")
    with pytest.raises(DataError, match="no file"):
        load("concept_images", root=folder, table="none.csv")
    content = (folder / "d.png").read_bytes()
    for broken in (b"no image", content[: len(content) // 2]):
        (folder / "d.png").write_bytes(broken)
        with pytest.raises(DataError, match=r"cannot read the image .*d\.png"):
            load("concept_images", root=folder)


@pytest.mark.parametrize("csv", [False, True])
def test_celeba_of_the_user(tmp_path: Path, csv: bool) -> None:
    write_celeba(tmp_path, csv=csv)
    data = load("celeba", root=tmp_path, concepts=["Male", "Young"], size=8, graph=[["Young", "Male"]])
    assert data["image"].shape == (8, 3, 8, 8)
    assert data["split"].values.tolist() == ["train"] * 6 + ["test"] * 2
    number = np.array([int(name[:6]) for name in data["file"].values]) - 1
    assert sorted(number[:6]) == list(range(6))
    assert sorted(number[6:]) == [8, 9]
    np.testing.assert_array_equal(data["label"].values, np.stack([(3 * number + 1) % 4 < 2, 3 * number % 4 < 2], 1))
    assert load("celeba", root=tmp_path, concepts=["Male"], num_train=4, num_test=0).sizes["data"] == 4


def test_unusable_copies_of_celeba_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="img_align_celeba"):
        load("celeba", root=tmp_path)
    write_celeba(tmp_path, partition=False)
    assert (load("celeba", root=tmp_path, concepts=["Male"], size=8)["split"] == "test").sum() == 1
    with pytest.raises(DataError, match="did you mean 'Young'"):
        load("celeba", root=tmp_path, concepts=["young"])
    with pytest.raises(DataError, match="'Always' is constant"):
        load("celeba", root=tmp_path, concepts=["Always"], size=8)
    (tmp_path / "img_align_celeba" / "000003.jpg").unlink()
    with pytest.raises(DataError, match=r"000003\.jpg"):
        load("celeba", root=tmp_path, concepts=["Male"], size=8)


def test_tables_of_the_user(tmp_path: Path) -> None:
    rows = pd.DataFrame({"a": [1.0, 2, 3, 4, 5], "b": [2.0, 1, 4, 3, 6], "sensor": [0.1, 0.2, 0.3, 0.4, 0.5]})
    rows.to_csv(tmp_path / "plant.csv", index=False)
    data = load("causal_table", path=tmp_path / "plant.csv", graph=[["a", "b"], ["b", "sensor"]], test=0.4)
    assert data.attrs["name"] == "plant"
    assert int((data["split"] == "test").sum()) == 2
    np.testing.assert_array_equal(data["observation"], rows.to_numpy())
    np.testing.assert_array_equal(data["label"], rows.to_numpy())
    part = load("causal_table", path=rows.assign(b=[None, 1, 4, 3, 6]), concepts=["a", "b"], test=0)
    assert part["feature"].values.tolist() == ["sensor"]
    assert part["label"].isnull().sum() == 1
    named = load("causal_table", path=rows, concepts=["a"], observed=["a", "sensor"], test=0)
    assert named["feature"].values.tolist() == ["a", "sensor"]
    for source, options, message in (
        (rows.assign(b=[None, 1, 4, 3, 6]), {}, "'b' of row 0 is missing"),
        (rows, {"concepts": ["c"]}, "no column 'c'"),
        (rows.assign(a=7), {}, "'a' is constant"),
        (tmp_path / "none.csv", {}, "no file"),
        (rows, {"test": 1.0}, "test=1.0"),
    ):
        with pytest.raises(DataError, match=message):
            load("causal_table", path=source, **options)
    (tmp_path / "twice.csv").write_text("a,a\n1,2\n3,4\n")
    with pytest.raises(DataError, match="more than one column 'a'"):
        load("causal_table", path=tmp_path / "twice.csv")


# ------------------------------------------------------------------------------------------------- labels of arrays


def chain() -> tuple[pd.DataFrame, np.ndarray]:
    """Concepts by name with rows by name, and what is observed."""
    rng = np.random.default_rng(3)
    labels = pd.DataFrame(rng.normal(size=(12, 3)), columns=["a", "b", "c"], index=[f"r{i}" for i in range(12)])
    return labels, labels.to_numpy() + 0.1 * rng.normal(size=(12, 3))


CHAIN = np.array([[0, 1, 0], [0, 0, 1], [0, 0, 0]])


@pytest.mark.parametrize("kind", ["frame", "array", "transposed"])
def test_graphs_are_read_by_their_names(kind: str) -> None:
    order = ["c", "a", "b"]
    frame = pd.DataFrame(CHAIN, index=["a", "b", "c"], columns=["a", "b", "c"]).loc[order, order[::-1]]
    array = xr.DataArray(frame.to_numpy(), {"cause": order, "effect": order[::-1]}, ("cause", "effect"))
    given = {"frame": frame, "array": array, "transposed": array.transpose("effect", "cause")}[kind]
    np.testing.assert_array_equal(as_graph(given, ["a", "b", "c"]), CHAIN)
    labels, values = chain()
    data = make_concepts(values, labels.to_numpy(), names=["a", "b", "c"], graph=given)
    np.testing.assert_array_equal(data["graph"], CHAIN)
    assert as_graph(xr.DataArray(CHAIN.T, dims=("effect", "cause")), ["a", "b", "c"]).tolist() == CHAIN.tolist()
    assert as_graph(pd.DataFrame(CHAIN), ["a", "b", "c"]).tolist() == CHAIN.tolist()  # numbered: by place
    for lost in (frame.rename(index={"a": "z"}), frame.iloc[:2, :2]):
        with pytest.raises(DataError, match="graph along 'cause'"):
            as_graph(lost, ["a", "b", "c"])


def test_labels_and_rows_are_put_in_order_by_name() -> None:
    labels, values = chain()
    expected = make_concepts(values, labels.to_numpy(), names=["a", "b", "c"], graph=CHAIN)
    shuffled = labels.sample(frac=1, random_state=0)[["b", "c", "a"]]
    observed = pd.DataFrame(values, index=labels.index, columns=["u", "v", "w"])
    split = pd.Series(["train"] * 9 + ["test"] * 3, index=labels.index)
    data = make_concepts(observed, shuffled, names=["a", "b", "c"], split=split.sample(frac=1, random_state=1))
    np.testing.assert_array_equal(data["label"], expected["label"])
    assert data["feature"].values.tolist() == ["u", "v", "w"]
    assert data["split"].values.tolist() == ["train"] * 9 + ["test"] * 3
    array = xr.DataArray(shuffled.to_numpy().T, {"concept": ["b", "c", "a"]}, ("concept", "data"))
    placed = make_concepts(values, array, names=["a", "b", "c"])  # rows without labels are as they lie
    np.testing.assert_array_equal(placed["label"].sel(concept="a"), shuffled["a"])
    numbered = labels.reset_index(drop=True)
    np.testing.assert_array_equal(make_concepts(observed, numbered, names=["a", "b", "c"])["label"], expected["label"])
    images = xr.DataArray(np.random.default_rng(0).random((12, 4, 5, 3)), dims=("data", "row", "column", "channel"))
    assert make_concepts(images, labels, names=["a", "b", "c"])["image"].shape == (12, 3, 4, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"names": ["a", "b", "x"]}, r"labels along 'concept' has the labels 'a', 'b', 'c'.*\('c' is not expected\)"),
        ({"values": pd.DataFrame(np.zeros((12, 1)), index=[f"s{i}" for i in range(12)])}, "labels along 'data'"),
        ({"values": pd.DataFrame(np.zeros((12, 1)), columns=["u"]), "features": ["v"]}, "values along 'feature'"),
    ],
)
def test_labels_that_do_not_fit_each_other_are_refused(change: dict[str, Any], message: str) -> None:
    labels, values = chain()
    with pytest.raises(DataError, match=message):
        make_concepts(**{"values": values, "labels": labels, "names": ["a", "b", "c"], **change})
    again = labels.set_axis(["r0", *labels.index[:-1]])
    with pytest.raises(DataError, match="the label 'r0' occurs more than once"):
        make_concepts(again.iloc[::-1], labels, names=["a", "b", "c"], features=["a", "b", "c"])


def test_scenes_take_concepts_by_name() -> None:
    data = load("pendulum", size=8, num=6)
    label = data["label"]
    turned = label.sel(concept=["length", "light", "angle", "position"]).transpose("concept", "data")
    wanted = counterfactual("pendulum", label.values, {"angle": 5.0}, size=8)
    for found in (turned, turned.transpose().to_pandas()):
        for one, other in zip(counterfactual("pendulum", found, {"angle": 5.0}, size=8), wanted, strict=True):
            np.testing.assert_array_equal(one, other)


def test_a_data_set_whose_graph_is_in_another_order_is_refused() -> None:
    data = make_concepts(**table(), graph=[["a", "b"]])
    for turned in (data["graph"].sel(cause=["b", "a"]), data["graph"].transpose("effect", "cause")):
        with pytest.raises(DataError, match=r"coordinate 'cause' of the graph is not|graph has dims"):
            check_concepts(data.drop_vars(["graph", "cause", "effect"]).assign(graph=turned))
