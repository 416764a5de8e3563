"""Images: digits and IDX files against what is known of them; what is refused."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from probmodels.datasets import load
from probmodels.datasets.images import check_images, load_images, make_images, read_idx
from probmodels.datasets.petals import petal_offsets, simulate_petals
from probmodels.errors import DataError


def write_idx(path: Path, array: np.ndarray, *, compress: bool = False) -> None:
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">u4").tobytes()
    content = header + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if compress else content)


@pytest.fixture
def idx(tmp_path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    arrays = {
        "train-images-idx3-ubyte": rng.integers(256, size=(7, 3, 4)),
        "train-labels-idx1-ubyte": np.arange(7),
        "t10k-images-idx3-ubyte": rng.integers(256, size=(5, 3, 4)),
        "t10k-labels-idx1-ubyte": np.arange(5),
    }
    for i, (name, array) in enumerate(arrays.items()):
        write_idx(tmp_path / (f"{name}.gz" if i % 2 else name), array, compress=bool(i % 2))
    return tmp_path, arrays


def test_digits_are_those_of_scikit_learn_in_a_split_of_the_seed() -> None:
    from sklearn.datasets import load_digits

    table = load_digits()
    data = load("images")
    assert dict(data.sizes) == {"data": 1797, "row": 8, "column": 8}
    assert (data["split"] == "train").sum() == 1500
    known = {((image >= 8).tobytes(), int(label)) for image, label in zip(table.images, table.target, strict=True)}
    ours = zip(data["image"].values, data["label"].values, strict=True)
    assert {((image > 0).tobytes(), int(label)) for image, label in ours} == known
    assert load_images(seed=0).identical(data)
    assert not load_images(seed=1)["image"].equals(data["image"])


def test_intensities_stay_without_a_threshold() -> None:
    data = load_images(threshold=None, num_train=50, num_test=20)
    assert dict(data.sizes) == {"data": 70, "row": 8, "column": 8}
    assert data["image"].values.max() == 1.0
    assert len(np.unique(data["image"].values)) == 17
    check_images(data, binary=False)
    with pytest.raises(DataError, match="have to be 0 or 1"):
        check_images(data)


def test_idx_files_are_read_plain_and_compressed(idx: tuple[Path, dict[str, np.ndarray]]) -> None:
    root, arrays = idx
    data = load_images("idx", root=root, threshold=0.5)
    for split, prefix in (("train", "train"), ("test", "t10k")):
        part = data.isel(data=(data["split"] == split).values)
        images, labels = (arrays[f"{prefix}-{kind}-idx{axes}-ubyte"] for kind, axes in (("images", 3), ("labels", 1)))
        assert sorted(part["label"].values) == list(labels)
        np.testing.assert_array_equal(part["image"].values, images[part["label"].values] >= 127.5)
    few = load_images("idx", root=root, num_train=3, num_test=2)
    assert list(few["split"].values) == ["train"] * 3 + ["test"] * 2


def test_labels_may_be_absent(idx: tuple[Path, dict[str, np.ndarray]]) -> None:
    root, _ = idx
    (root / "t10k-labels-idx1-ubyte.gz").unlink()
    assert "label" not in load_images("idx", root=root)


def test_broken_files_are_refused(idx: tuple[Path, dict[str, np.ndarray]]) -> None:
    root, arrays = idx
    path = root / "train-images-idx3-ubyte"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(DataError, match=r"its header .* asks for"):
        load_images("idx", root=root)
    path.write_bytes(b"\0\0\x0d\3" + content[4:])
    with pytest.raises(DataError, match="no IDX file of unsigned bytes"):
        read_idx(path)
    (root / "broken.gz").write_bytes(gzip.compress(content)[:-9])
    with pytest.raises(DataError, match="cannot read"):
        read_idx(root / "broken.gz")
    write_idx(path, arrays["train-images-idx3-ubyte"][:, :2])
    with pytest.raises(DataError, match="test images of"):
        load_images("idx", root=root)
    write_idx(path, arrays["train-images-idx3-ubyte"][:2])
    with pytest.raises(DataError, match="2 images of 'train', but 7 labels"):
        load_images("idx", root=root)
    path.unlink()
    with pytest.raises(DataError, match="holds neither train-images-idx3-ubyte nor"):
        load_images("idx", root=root)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "letters"}, "dataset='letters'; choose one of digits, idx"),
        ({"dataset": "idx"}, "needs root"),
        ({"num_train": 1798}, "num_train=1798 is out of range: there are 1797"),
        ({"num_train": -1}, "num_train=-1; give a whole number"),
        ({"root": "pngs"}, "root='pngs' is not used with dataset='digits'"),
        ({"dataset": "idx", "root": "/nowhere"}, "root: there is no folder /nowhere"),
        ({"num_test": 298}, "num_test=298 is out of range: there are 297"),
        ({"threshold": -0.1}, "threshold=-0.1; give a number of at least 0 and of at most 1"),
    ],
)
def test_options_out_of_range_are_refused(options: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_images(**options)


def test_images_that_are_none_are_refused() -> None:
    good = np.zeros((3, 2, 2))
    with pytest.raises(DataError, match=r"images of shape \(3, 4\)"):
        make_images(good.reshape(3, 4))
    with pytest.raises(DataError, match=r"must lie in \[0, 1\]"):
        make_images(good - 1)
    with pytest.raises(DataError, match=r"must lie in \[0, 1\]"):
        make_images(np.where(good == 0, np.nan, good))
    with pytest.raises(DataError, match="labels of shape"):
        make_images(good, np.arange(2))
    with pytest.raises(DataError, match="images cannot be made an array"):
        make_images([[[0, 1]], [[0]]])
    with pytest.raises(DataError, match="split 'valid' is unknown"):
        make_images(good, split=np.array(["train", "valid", "test"]))
    with pytest.raises(DataError, match="make it by load_images"):
        check_images(xr.Dataset())
    with pytest.raises(DataError, match="expected"):
        check_images(make_images(good).transpose("row", "data", "column"))


def test_petals_lie_on_a_grid_and_points_around_them() -> None:
    data = simulate_petals(4000, seed=3)
    middle = data["true_mean"].values[data["true_cluster"]] + petal_offsets(4)[data["true_petal"]]
    places = np.unique(np.round(middle, 9), axis=0)
    np.testing.assert_allclose(np.unique(np.round(places[:, 0], 9)), np.sqrt(0.5) * np.array([-3, -1, 1, 3]))
    assert len(places) == 16
    residual = (data["x"].values - middle) / 0.25
    assert abs(residual.mean()) < 4 / np.sqrt(8000)  # four standard errors
    assert abs(residual.var() - 1) < 4 * np.sqrt(2 / 8000)
    assert simulate_petals(4000, seed=3).identical(data)


@pytest.mark.parametrize("options", [{"num_rows": 0}, {"num_petals": 2.5}, {"sigma": 0.0}, {"radius": np.inf}])
def test_petals_out_of_range_are_refused(options: dict) -> None:
    with pytest.raises(DataError, match=next(iter(options))):
        simulate_petals(**options)
