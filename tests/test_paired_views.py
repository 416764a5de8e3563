"""Kinds of views, the towers that read them, their random changes, and views from files."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from probmodels import Result, fit_svi
from probmodels.datasets import load
from probmodels.datasets.paired.views import kind_of, make_views
from probmodels.errors import DataError, ResultError
from probmodels.guides.modality_structure import TokenReader
from probmodels.modality_structure import embed, embed_new, make_problem, measure
from probmodels.modality_structure.views import augmentations, tensors
from probmodels.spec import run_spec

NOUNS, COLOURS = ("dog", "cat", "bird", "fish"), ("red", "green", "blue", "grey")


def captioned(num_rows: int = 240, seed: int = 0) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Pictures (row, 8, 8) of a bright spot in one of sixteen places, and what says where, with some noise."""
    rng = np.random.default_rng(seed)
    noun, colour = rng.integers(0, 4, size=(2, num_rows))
    pictures = 0.2 * rng.random((num_rows, 8, 8))
    for row, (i, j) in enumerate(zip(noun, colour, strict=True)):
        pictures[row, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2] += 1
    texts = [f"A {COLOURS[j]} {NOUNS[i]}." for i, j in zip(noun, colour, strict=True)]
    return pictures, texts, 4 * noun + colour


def test_views_carry_their_kind_and_lose_nothing() -> None:
    pictures, texts, classes = captioned(20)
    colour = np.stack([pictures, 1 - pictures, pictures], -1)
    views = {
        "image": pictures,
        "photo": colour,
        "flat": pictures,
        "text": texts,
        "code": np.array([[3, 1], [2, 0]] * 10),
    }
    data = make_views(views, kinds={"flat": "vectors", "code": "texts"}, label=classes)
    kinds = {str(name): kind_of(data[str(name)]) for name in data["modality"].values}
    assert list(kinds.values()) == ["pictures", "pictures", "vectors", "texts", "texts"]
    assert data["photo"].shape == (20, 3, 8, 8)
    np.testing.assert_allclose(data["photo"].values[:, 1], 1 - pictures, rtol=1e-6)
    np.testing.assert_allclose(data["flat"].values.reshape(pictures.shape), pictures)
    words = data["text_word"].values
    said = [" ".join(words[code] for code in row if code) for row in data["text"].values]
    assert said == [text.lower().rstrip(".") for text in texts]
    assert data["code"].values.tolist() == views["code"].tolist()


def test_pictures_with_channels_last_are_fitted_as_those_with_channels_first() -> None:
    pictures, texts, _ = captioned(40)
    colour = np.stack(
        [pictures.repeat(2, 1).repeat(2, 2)] * 2, -1
    )  # large enough for several places after convolutions
    found = []
    for view in (colour, np.moveaxis(colour, -1, 1)):
        problem = make_problem(make_views({"image": view, "text": texts}), size=4, hidden=8, temperature=0.2)
        result = fit_svi(problem, num_steps=5, batch_size=16, num_samples=2, progress=False, compile="graph")
        found.append(measure(result))
    assert found[0].equals(found[1])


def test_words_that_rows_to_learn_from_lack_are_left_out() -> None:
    texts = ["red dog", "red dog", "blue dog", "red zebra", "quagga"]
    split = ["train", "train", "train", "test", "test"]
    data = make_views({"x": np.ones((5, 1)), "text": texts}, split=split)
    words = list(data["text_word"].values)
    assert words == ["", "<unknown>", "blue", "dog", "red"]
    assert [words[code] for code in data["text"].values[3] if code] == ["red"]
    assert [words[code] for code in data["text"].values[4] if code] == ["<unknown>"]
    rare = make_views({"x": np.ones((5, 1)), "text": texts}, split=split, min_count=2)
    assert "blue" not in rare["text_word"].values


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"views": {"text": ["a dog", "...", "c", "d"]}}, r"modality 'text': the text '...' of row 1 has no words"),
        ({"views": {"text": ["a dog", None, "c", "d"]}}, r"row 1 holds None where a text is expected"),
        ({"views": {"text": ["a dog", "c", "d"]}}, "different numbers of rows"),
        ({"views": {"text": np.zeros((4, 2), dtype=int)}, "kinds": {"text": "texts"}}, "an empty caption says nothing"),
        ({"views": {"text": -np.ones((4, 2), dtype=int)}, "kinds": {"text": "texts"}}, "code -1 of row 0, column 0"),
        ({"views": {"text": np.full((4, 2), 10**15)}, "kinds": {"text": "texts"}}, "out of range"),
        ({"views": {"text": np.ones((4, 2))}, "kinds": {"text": "texts"}}, "is no texts"),
        ({"views": {"text": np.ones((4, 9, 9, 9))}}, "up to 4 channels"),
        ({"views": {"text": np.ones((4, 9))}, "kinds": {"text": "pictures"}}, "pictures are"),
        ({"kinds": {"txet": "texts"}}, "which is no modality"),
        ({"views": {"text": np.ones((4, 2))}, "min_count": 2}, "min_count=2 is not used with no texts"),
        ({"label": [0, 1, 2, 1], "classes": ["0", "1"]}, r"label '2' of row 2 is none of the classes 0, 1"),
        ({"label": [0, 1, np.nan, 1]}, "label of row 2 is missing"),
        ({"label": [0, 1]}, "label has shape"),
        ({"classes": ["0", "1"]}, "classes=.* is not used with no label"),
        ({"split": ["train"] * 4}, "no row has split='test'"),
        ({"held_out": 0.01}, "no row has split='test'"),
        ({"split": ["train"] * 3 + ["test"], "held_out": 0.5}, "held_out=0.5 is not used with split"),
    ],
)
def test_bad_views_are_refused(change: dict[str, Any], message: str) -> None:
    views = {"image": np.arange(1.0, 5.0)[:, None], "text": ["a", "b", "c", "d"], **change.pop("views", {})}
    with pytest.raises(DataError, match=message):
        make_views(views, **change)


def test_towers_are_chosen_by_kind_and_can_be_overridden() -> None:
    pictures, texts, _ = captioned(30)
    data = make_views({"image": pictures, "text": texts})
    names = {name: type(tower.trunk).__name__ for name, tower in _towers(make_problem(data))}
    assert names == {"tower_image": "Sequential", "tower_text": "TokenReader"}
    assert any("Conv2d" in str(module) for module in _towers(make_problem(data)))
    plain = make_problem(data, towers={"image": "mlp", "text": "attention"})
    assert not any("Conv2d" in str(module) for module in _towers(plain))
    assert any(".score." in name for name in dict(plain.model.named_parameters()))  # type: ignore[attr-defined]
    for towers, message in (
        ({"image": "mean"}, "'mean' reads no pictures, which 'image' holds; choose one of conv, mlp"),
        ({"sound": "mlp"}, "'sound', which is no modality"),
    ):
        with pytest.raises(DataError, match=message):
            make_problem(data, towers=towers)
    for unused in ({"shift": 0.2}, {"erase": 0.1}):
        with pytest.raises(DataError, match="not used with no pictures"):
            make_problem(make_views({"a": np.ones((9, 2)), "b": texts[:9]}), in_modal=True, **unused)
    with pytest.raises(DataError, match="not used with pictures alone"):
        make_problem(make_views({"a": pictures, "b": pictures}), in_modal=True, dropout=0.1)
    with pytest.raises(DataError, match="strengths"):
        make_problem(data, in_modal=True, shift=0.0, flip=0.0, erase=0.0)


def _towers(problem: Any) -> Any:
    return problem.model.towers.items()


@pytest.mark.parametrize("network", ["mean", "attention"])
def test_reading_words_depends_on_neither_their_order_nor_what_is_absent(network: str) -> None:
    torch.manual_seed(0)
    reader = TokenReader(9, 5, network)
    found = reader(torch.tensor([[3, 4, 0, 0], [4, 0, 3, 0], [3, 4, 5, 0], [0, 0, 0, 0]]))
    torch.testing.assert_close(found[0], found[1])
    assert (found[0] - found[2]).abs().max() > 1e-3
    assert found.isfinite().all()
    short = reader(torch.tensor([[3, 4]]))
    torch.testing.assert_close(found[:1], short)


def test_random_changes_follow_the_kind() -> None:
    pictures, texts, _ = captioned(60)
    data = make_views({"image": pictures, "text": texts, "numbers": pictures.reshape(60, -1)}, seed=1)
    changes = augmentations(data, dropout=0.5, shift=0.0, flip=0.0, erase=0.25)
    image, text, numbers = tensors(data, "train")[1]
    generator = torch.Generator().manual_seed(0)
    erased = (changes["image"](image, generator) == 0) & (image != 0)
    assert erased.flatten(1).sum(1).tolist() == [4] * len(image)  # a square of 2 x 2
    shorter = changes["text"](text, generator)
    assert ((shorter > 0).sum(1) >= 1).all()
    assert ((shorter == text) | (shorter == 0)).all()
    assert 0.3 < float((shorter == 0)[text > 0].double().mean()) < 0.6
    assert 0.45 < float((changes["numbers"](numbers, generator) == 0).double().mean()) < 0.55
    again = changes["text"](text, torch.Generator().manual_seed(5))
    assert torch.equal(again, changes["text"](text, torch.Generator().manual_seed(5)))


def test_pictures_find_their_texts_and_shuffled_ones_do_not(tmp_path: Path) -> None:
    pictures, texts, classes = captioned()
    found = {}
    for kind, rows in (("right", np.arange(240)), ("shuffled", np.random.default_rng(1).permutation(240))):
        data = make_views({"image": pictures, "text": [texts[row] for row in rows]}, label=classes, held_out=0.4)
        problem = make_problem(data, size=8, hidden=32, bridge=0.25, augmented_consistency=0.01)
        result = fit_svi(problem, num_steps=80, lr=0.01, batch_size=48, num_samples=5, progress=False)
        found[kind] = measure(result).set_index("split").loc["test"]
    # Sixteen different texts: the information of rows is at most log 16 = 2.77 nats.
    assert found["right"]["information"] > 1.5
    assert found["right"]["v_measure"] > 0.7
    assert found["shuffled"]["information"] < 0.5
    result.save(tmp_path / "result")
    assert measure(Result.load(tmp_path / "result")).equals(measure(result))  # the words came along


def write_folder(folder: Path, rows: list[dict[str, Any]]) -> None:
    for place in range(4):
        Image.new("RGB", (6, 5), (60 * place, 0, 0)).save(folder / f"{place}.png")
    (folder / "captions.json").write_text(json.dumps(rows))
    pd.DataFrame(rows).to_csv(folder / "captions.csv", index=False)


ROWS = [{"file": f"{place}.png", "text": text} for place, text in enumerate(("black", "dark red", "red", "red"))]


def test_a_folder_of_images_with_captions(tmp_path: Path) -> None:
    write_folder(tmp_path, [row | {"tone": "red" * (place > 1) or "dark"} for place, row in enumerate(ROWS)])
    by_csv = load("captioned_images", root=tmp_path, label="tone", classes=["dark", "red"], size=4)
    by_json = load("captioned_images", root=tmp_path, captions="captions.json", label="tone", size=4)
    assert by_csv.equals(by_json)
    assert by_csv["image"].shape == (4, 3, 4, 4)
    assert by_csv["file"].values.tolist() == ["0.png", "1.png", "2.png", "3.png"]
    np.testing.assert_allclose(by_csv["image"].values[3, 0], 180 / 255, rtol=1e-6)
    (tmp_path / "short.json").write_text(json.dumps({row["file"]: row["text"] for row in ROWS}))
    assert load("captioned_images", root=tmp_path, captions="short.json", size=4)["text"].equals(by_csv["text"])


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({2: {"text": ""}}, {}, r"captions.csv: column 'text' of row 2 is empty"),
        ({2: {"text": "?!"}}, {}, r"captions.csv: column 'text' of row 2 holds '\?!'"),
        ({2: {"file": "9.png"}}, {}, r"1 are not in .* such as '9.png'"),
        ({2: {"file": "1.png"}}, {}, r"captions.csv lists '1.png' more than once"),
        ({}, {"text": "caption"}, r"captions.csv has no column 'caption'; it has 'file', 'text', 'tone'"),
        ({}, {"label": "tone", "classes": ["dark", "light"]}, "label 'red' of row 2 is none of the classes"),
        ({1: {"tone": None}}, {"label": "tone"}, "label of row 1 is missing"),
        ({}, {"held_out": 0.05}, "no row has split='test'"),
        ({}, {"captions": "absent.csv"}, "there is no file absent.csv"),
    ],
)
def test_bad_folders_are_refused(
    change: dict[int, dict[str, Any]], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    rows = [row | {"tone": "red" * (place > 1) or "dark"} | change.get(place, {}) for place, row in enumerate(ROWS)]
    write_folder(tmp_path, rows)
    with pytest.raises(DataError, match=message):
        load("captioned_images", root=tmp_path, **options)


def tables() -> dict[str, pd.DataFrame]:
    first = pd.DataFrame({"id": list("cabde"), "x": [3.0, 1.0, 2.0, 4.0, 5.0], "class": list("ppqqp")})
    return {"left": first, "right": pd.DataFrame({"id": list("bdcaf"), "says": ["two", "four", "three", "one", "six"]})}


def test_tables_are_joined_by_their_key_and_what_is_absent_is_a_gap(tmp_path: Path) -> None:
    parts = tables()
    parts["left"] = parts["left"].drop(columns="class")
    data = load("paired_tables", tables=parts, key="id")
    keys = data["key"].values.tolist()
    assert keys == list("cabdef")
    assert data["present"].values.tolist() == [[1, 1], [1, 1], [1, 1], [1, 1], [1, 0], [0, 1]]
    value = dict(zip(keys, data["left"].values[:, 0], strict=True))
    assert value == {"a": 1, "b": 2, "c": 3, "d": 4, "e": 5, "f": 0}
    for name, part in parts.items():
        part.to_csv(tmp_path / f"{name}.csv", index=False)
    files = {name: str(tmp_path / f"{name}.csv") for name in parts}
    assert load("paired_tables", tables=files, key="id").equals(data)
    images = np.random.default_rng(0).random((5, 4, 4)) + 0.1
    np.savez(tmp_path / "images.npz", id=np.array(list("abcdf")), images=images)
    mixed = load("paired_tables", tables=files | {"image": str(tmp_path / "images.npz")}, key="id")
    assert kind_of(mixed["image"]) == "pictures"
    np.testing.assert_allclose(mixed["image"].values[keys.index("c"), 0], images[2], rtol=1e-6)
    np.testing.assert_allclose(mixed["image"].values[keys.index("e")], 0)


def _dropped(column: str) -> Any:
    return lambda parts: parts | {"left": parts["left"].drop(columns=column)}


def _set(name: str, column: str, row: int, value: Any) -> Any:
    def change(parts: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
        part = parts[name].astype({column: object})
        part.loc[row, column] = value
        return parts | {name: part}

    return change


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (_set("left", "x", 2, np.nan), {}, "column 'x' of row 2 is empty"),
        (
            lambda parts: _set("left", "x", 2, "much")(parts | {"left": parts["left"].assign(y=1.0)}),
            {},
            "column 'x' holds texts, as 'much'",
        ),
        (_set("left", "id", 2, None), {}, "row 2 has no key"),
        (_set("left", "id", 2, "a"), {}, "more than one row of key 'a'"),
        (_set("right", "says", 1, "--"), {}, "table 'right': column 'says' of row 1 holds '--'"),
        (_dropped("id"), {}, "has no column 'id'"),
        (
            lambda parts: parts | {"left": parts["left"].assign(id=range(5))},
            {},
            "no 'id' of table 'left' is in another",
        ),
        (lambda parts: parts, {"label": "class"}, "no table says 'class' of the row 'f'"),
        (lambda parts: parts, {"label": "kind"}, "no table has the column 'kind'"),
        (lambda parts: {"left": parts["left"]}, {}, "tables"),
        (lambda parts: parts | {"left": "absent.csv"}, {}, "there is no file absent.csv"),
    ],
)
def test_bad_tables_are_refused(change: Any, options: dict[str, Any], message: str) -> None:
    parts = tables()
    if options.get("label") != "class":
        parts["left"] = parts["left"].drop(columns="class")
    with pytest.raises(DataError, match=message):
        load("paired_tables", tables=change(parts), key="id", **options)


def test_a_label_may_stand_in_one_table_or_more() -> None:
    parts = tables()
    parts["right"] = parts["right"].assign(**{"class": list("qqppq")})
    data = load("paired_tables", tables=parts, key="id", label="class", classes=["p", "q"])
    assert data["label"].values.tolist() == list("ppqqpq")
    parts["right"].loc[0, "class"] = "p"
    with pytest.raises(DataError, match="'class' of 'b' is 'p', and 'q' in another table"):
        load("paired_tables", tables=parts, key="id", label="class")


@pytest.fixture(scope="module")
def searched() -> Result:
    pictures, texts, _ = captioned()
    problem = make_problem(make_views({"image": pictures, "text": texts}), size=8, hidden=32, temperature=0.1)
    return fit_svi(problem, num_steps=80, lr=0.01, batch_size=48, num_samples=2, progress=False)


def test_new_rows_are_embedded_as_those_of_the_data_and_find_what_they_describe(searched: Result) -> None:
    pictures, texts, classes = captioned()
    test = searched.group("constant_data")["split"].values == "test"
    known = embed(searched, "test")
    np.testing.assert_allclose(embed_new(searched, "image", pictures[test]), known.z["image"], atol=1e-5)
    np.testing.assert_allclose(embed_new(searched, "text", np.array(texts)[test]), known.z["text"], atol=1e-5)
    prompts = [f"a {colour} {noun}, please!" for noun in NOUNS for colour in COLOURS]
    nearest = (known.z["image"] @ embed_new(searched, "text", prompts).T).argmax(1)
    assert (nearest == classes[test]).mean() > 0.9
    assert (nearest == np.random.default_rng(0).permutation(classes[test])).mean() < 0.3


@pytest.mark.parametrize(
    ("modality", "rows", "message"),
    [
        ("sound", ["a dog"], "choose one of image, text"),
        ("text", ["..."], "has no words"),
        ("text", [[99]], "no codes"),
        ("text", [0.5], "shape"),
        ("image", np.ones((2, 4, 4)), "those that were fitted"),
        ("image", np.full((2, 8, 8), np.nan), "not finite"),
        ("image", ["a dog"], "give numbers"),
    ],
)
def test_new_rows_that_are_not_of_the_modality_are_refused(
    modality: str, rows: Any, message: str, searched: Result
) -> None:
    with pytest.raises(ResultError, match=message):
        embed_new(searched, modality, rows)


def test_the_spec_of_the_page_runs_on_two_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[1] / "docs" / "modality_structure.md").read_text(encoding="utf-8")
    spec = tomllib.loads(page.split("```toml\n")[1].split("```")[0])
    _, texts, classes = captioned(120)
    rng = np.random.default_rng(0)
    codes = np.stack([classes // 4, classes % 4], 1) + 0.1 * rng.normal(size=(120, 2))
    keys = [f"k{row}" for row in range(120)]
    sensors = pd.DataFrame({"id": keys, "x": codes[:, 0], "y": codes[:, 1], "kind": classes})
    sensors.to_csv(tmp_path / "sensors.csv", index=False)
    order = rng.permutation(100)  # twenty rows lack notes
    pd.DataFrame({"id": keys, "note": texts}).iloc[order].to_csv(tmp_path / "notes.csv", index=False)
    monkeypatch.chdir(tmp_path)
    spec["inference"] |= {"num_steps": 60, "num_samples": 2, "lr": 0.01, "progress": False}
    result = run_spec(spec)
    assert int(result.group("constant_data")["present"].sum()) == 220
    assert measure(result).set_index("split")["recall_5"]["test"] > 0.5
