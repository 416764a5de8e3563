"""Binary images: scikit-learn's digits, and files in the IDX format, as of MNIST and Fashion-MNIST.

References
----------
Alpaydin, E. and Kaynak, C. (1998). Optical recognition of handwritten digits. UCI Machine Learning Repository.
https://doi.org/10.24432/C50P49
LeCun, Y., Cortes, C. and Burges, C. J. C. The MNIST database of handwritten digits, which defines the IDX format.
http://yann.lecun.com/exdb/mnist/
Xiao, H., Rasul, K. and Vollgraf, R. (2017). Fashion-MNIST. https://arxiv.org/abs/1708.07747
"""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from probmodels.datasets.checks import AnyPath, as_array, existing_file, existing_folder
from probmodels.datasets.labelled import arranged, row_labels
from probmodels.errors import DataError
from probmodels.options import Count, Probability, Seed, checked, refuse_unused

__all__ = ["check_images", "load_images", "make_images", "read_idx"]

_DIGITS_TRAIN = 1500  # of 1797
_IDX = {"train": "train", "test": "t10k"}  # as the files are called
_UNSIGNED = 0x08  # code of unsigned bytes in the header of an IDX file


@checked(DataError)
def load_images(
    dataset: Literal["digits", "idx"] = "digits",
    *,
    root: AnyPath | None = None,
    threshold: Probability | None = 0.5,
    num_train: Count | None = None,
    num_test: Count | None = None,
    seed: Seed = 0,
) -> xr.Dataset:
    """Images with their classes, for training and for testing.

    Parameters
    ----------
    dataset
        ``"digits"``: 1797 images of 8 x 8 of scikit-learn; or ``"idx"``: files of ``root``.
    root
        For ``"idx"``: folder with ``train-images-idx3-ubyte``, ``t10k-images-idx3-ubyte`` and, where classes are known,
        ``train-labels-idx1-ubyte`` and ``t10k-labels-idx1-ubyte``, each as it is or with ``.gz``.
    threshold
        Intensity, in (0, 1], from which on a pixel is 1, else 0; None or 0 for the intensities themselves.
    num_train, num_test
        How many images of each, chosen at random; None for all, which is 1500 and 297 of the digits.
    seed
        Seed of the choice.

    Returns
    -------
    xr.Dataset
        As `make_images` returns it.

    Raises
    ------
    DataError
        If the name is unknown, files are absent or broken, or an option is out of range or not used.
    """
    rng = np.random.default_rng(seed)
    labels: NDArray[Any] | None
    if dataset == "digits":
        refuse_unused(load_images, "dataset='digits' (dataset='idx' reads files)", root=root)
        images, labels, parts = _digits(num_train, rng)
        source = "scikit-learn, load_digits"
    else:
        if root is None:
            raise DataError("dataset='idx' needs root, the folder that holds train-images-idx3-ubyte and so on")
        folder = existing_folder(root)
        images, labels, parts = _idx_files(folder, rng)
        source = f"IDX files of {folder.name}"
    for name, wanted in (("train", num_train), ("test", num_test)):
        if wanted is not None and wanted > len(parts[name]):
            raise DataError(f"num_{name}={wanted} is out of range: there are {len(parts[name])} of {dataset}")
        parts[name] = parts[name][:wanted]
    chosen = np.concatenate(list(parts.values()))
    split = np.repeat(list(parts), [len(part) for part in parts.values()])
    return make_images(
        images[chosen] if images.dtype.kind == "f" else images[chosen] / 255.0,
        None if labels is None else labels[chosen],
        split=split,
        threshold=threshold,
        name=dataset,
        source=source,
    )


_Parts = dict[str, NDArray[np.int64]]  # rows in a random order, by split


def _digits(num_train: int | None, rng: np.random.Generator) -> tuple[NDArray[Any], NDArray[Any], _Parts]:
    """Images in [0, 1], labels, and rows of each split."""
    from sklearn.datasets import load_digits

    table = load_digits()
    order = rng.permutation(len(table.images))
    count = _DIGITS_TRAIN if num_train is None else num_train
    return table.images / 16.0, table.target, {"train": order[:count], "test": order[count:]}


def _idx_files(root: Path, rng: np.random.Generator) -> tuple[NDArray[Any], NDArray[Any] | None, _Parts]:
    """Images as bytes, labels where both splits have them, and rows of each split."""
    found = [_read_pair(root, prefix) for prefix in _IDX.values()]
    if found[0][0].shape[1:] != found[1][0].shape[1:]:
        shapes = [pair[0].shape[1:] for pair in found]
        raise DataError(f"{root}: training images are of {shapes[0]} pixels and test images of {shapes[1]}")
    images = np.concatenate([pair[0] for pair in found])
    known = [pair[1] for pair in found if pair[1] is not None]
    labels = np.concatenate(known) if len(known) == len(found) else None
    first = len(found[0][0])
    return images, labels, {"train": rng.permutation(first), "test": first + rng.permutation(len(images) - first)}


@checked(DataError)
def make_images(
    images: NDArray[Any],
    labels: NDArray[Any] | None = None,
    *,
    split: NDArray[Any] | None = None,
    threshold: Probability | None = 0.5,
    name: str = "images",
    source: str = "",
) -> xr.Dataset:
    """Label arrays of images.

    Parameters
    ----------
    images
        Intensities (data, row, column) in [0, 1].
    labels
        Classes (data,); None where they are not known.
    split
        ``"train"`` or ``"test"`` for every image (data,); None for all to train.
    threshold
        As in `load_images`.
    name, source
        Attributes of the data set, for the record.

    Returns
    -------
    xr.Dataset
        ``image`` (data, row, column), 0 and 1 as unsigned bytes, or intensities; ``split`` (data,); ``label`` (data,)
        where classes are known.

    Raises
    ------
    DataError
        If shapes differ, values lie outside of [0, 1] or are missing, or a split is unknown.
    """
    rows = row_labels(images, labels, split)
    images = arranged(images, "images", {"data": rows, "row": None, "column": None})
    labels, split = (arranged(one, name, {"data": rows}) for name, one in {"labels": labels, "split": split}.items())
    images = as_array(images, "images", numbers=True)
    if images.ndim != 3 or 0 in images.shape:
        raise DataError(f"images of shape {images.shape}; give (data, row, column), none of them empty")
    if not ((images >= 0) & (images <= 1)).all():
        raise DataError("intensities must lie in [0, 1], none missing; divide those of 8 bits by 255")
    if threshold:
        images = (images >= threshold).astype(np.uint8)
    splits = np.full(len(images), "train") if split is None else as_array(split, "split").astype(np.str_)
    labels = None if labels is None else as_array(labels, "labels")
    for what, value in (("labels", labels), ("split", splits)):
        if value is not None and value.shape != (len(images),):
            raise DataError(f"{what} of shape {value.shape} for {len(images)} images; give one for each")
    unknown = np.setdiff1d(splits, ["train", "test"])
    if len(unknown):
        raise DataError(f"split {str(unknown[0])!r} is unknown; choose 'train' or 'test'")
    data = xr.Dataset(
        {"image": (("data", "row", "column"), images), "split": ("data", splits)},
        coords={"data": np.arange(len(images))},
        attrs={"name": name, "source": source},
    )
    return data if labels is None else data.assign(label=("data", labels))


def check_images(data: Any, *, binary: bool = True) -> None:
    """Check that data are what `make_images` returns.

    Raises
    ------
    DataError
        If they are not, or pixels are not 0 and 1 where they have to be.
    """
    if not isinstance(data, xr.Dataset) or "image" not in data or "split" not in data:
        raise DataError("data must be a Dataset with 'image' and 'split'; make it by load_images or make_images")
    if data["image"].dims != ("data", "row", "column"):
        raise DataError(f"image has dims {data['image'].dims}; expected (data, row, column)")
    pixels = data["image"].values
    wrong = ~np.isin(pixels, (0, 1)) if binary else ~((pixels >= 0) & (pixels <= 1))
    if wrong.any():
        place = tuple(int(i) for i in np.argwhere(wrong)[0])
        remedy = "0 or 1: load them with a threshold, such as threshold=0.5" if binary else "in [0, 1], none missing"
        raise DataError(f"image{list(place)} is {pixels[place]}; pixels have to be {remedy}")


@checked(DataError)
def read_idx(path: AnyPath) -> NDArray[np.uint8]:
    """Array of unsigned bytes from a file in the IDX format, plain or compressed by gzip.

    Raises
    ------
    DataError
        If the file is absent, no IDX file of unsigned bytes, or shorter or longer than its header says.
    """
    path = existing_file(path)
    try:
        raw = path.read_bytes()
        content = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] != _UNSIGNED or not 1 <= content[3] <= 4:
        raise DataError(f"{path} is no IDX file of unsigned bytes; its first bytes are {content[:4].hex(' ')}")
    start = 4 + 4 * content[3]
    shape = tuple(int(size) for size in np.frombuffer(content[4:start], dtype=">u4"))
    expected = start + int(np.prod(shape, dtype=object))
    if len(shape) < content[3] or len(content) != expected:
        raise DataError(f"{path} holds {len(content)} bytes where its header {shape} asks for {expected}: copy it anew")
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape)


def _read_pair(root: Path, prefix: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None]:
    """Images (image, row, column) of a split, and its labels (image,) where their file is there."""
    found: list[NDArray[np.uint8] | None] = []
    for kind, axes in (("images", 3), ("labels", 1)):
        name = f"{prefix}-{kind}-idx{axes}-ubyte"
        path = next((p for p in (root / name, root / f"{name}.gz") if p.exists()), None)
        if path is None and kind == "images":
            raise DataError(f"{root} holds neither {name} nor {name}.gz")
        array = None if path is None else read_idx(path)
        if array is not None and array.ndim != axes:
            raise DataError(f"{path} has {array.ndim} axes where {kind} have {axes}")
        found.append(array)
    images, labels = found
    assert images is not None
    if labels is not None and len(images) != len(labels):
        raise DataError(f"{root}: {len(images)} images of {prefix!r}, but {len(labels)} labels")
    return images, labels
