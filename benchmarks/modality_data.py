"""Views that `modality_structure.py` is measured on: spoken digits with images, and emoji with their names.

``DATA/multiview`` holds ``fsdd_logmel32.npz`` (Free Spoken Digit Dataset of github.com/Jakobovski: log-mel spectrograms
``logmel`` of 32 x 32, ``digit``, ``speaker``, ``index`` of the take), ``noto_emoji_32.npz`` (``images`` of Noto Emoji,
32 x 32) and ``noto_emoji_meta.json`` (names and subgroups of Unicode CLDR). ``DATA/images`` holds ``mnist_5k.csv.gz``,
500 images of MNIST for each digit with the digit in the last column.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

from probmodels.datasets.paired.views import make_views

PER_TAKE = 3  # images for each spoken digit that judges: 90 of each digit
NUM_HELD_OUT = 731


class Views(NamedTuple):
    """Labelled data, and what rows are to be told apart by: classes (row,), and what one modality alone has (row,)."""

    data: xr.Dataset
    shared: NDArray[Any]
    private: NDArray[Any] | None


def digits(root: Path, part: str) -> Views:
    """Images of handwritten digits, each with a spoken digit of the same class.

    The takes 0 to 4 of each speaker and digit, the official test set, are held out, or for ``part="validation"`` the
    takes 5 to 9 of those that are left. Each take that is held out has three images, the others one. Images of the
    test, of validation and to learn from are disjoint; validation is learned from once the choice is made. Speakers are
    private to the sound. Images are 14 x 14 and spectrograms 16 x 16, of means of four pixels, which quarters the
    time of a fit.
    """
    table = pd.read_csv(root / "images" / "mnist_5k.csv.gz", header=None).to_numpy()
    pictures, of = table[:, :-1].reshape(-1, 28, 28) / 255.0, table[:, -1].astype(int)
    with np.load(root / "multiview" / "fsdd_logmel32.npz") as file:
        sound, digit, speaker, take = (file[name] for name in ("logmel", "digit", "speaker", "index"))
    judged = take < 5 if part == "test" else (take >= 5) & (take < 10)
    learned = take >= (5 if part == "test" else 10)
    rng, rows = np.random.default_rng(0), []
    for one in range(10):
        order = rng.permutation(np.flatnonzero(of == one))
        test, validation, rest = np.split(order, [30 * PER_TAKE, 60 * PER_TAKE])
        rest = np.concatenate([rest, validation]) if part == "test" else rest
        spoken = np.repeat(np.flatnonzero(judged & (digit == one)), PER_TAKE)
        rows.append((spoken, test if part == "test" else validation, "test"))
        fitted = np.flatnonzero(learned & (digit == one))
        rows.append((fitted, rest[: len(fitted)], "train"))
    spoken = np.concatenate([row[0] for row in rows])
    images = np.concatenate([row[1] for row in rows])
    split = np.concatenate([[row[2]] * len(row[0]) for row in rows])
    views = {"image": _halved(pictures[images]), "sound": _halved(sound[spoken])}
    return Views(make_views(views, label=digit[spoken], split=split), digit[spoken], speaker[spoken])


def _halved(pictures: NDArray[Any]) -> NDArray[Any]:
    count, rows, columns = pictures.shape
    return pictures.reshape(count, rows // 2, 2, columns // 2, 2).mean((2, 4))


def emoji(root: Path, part: str) -> Views:
    """Emoji and their names, with 731 rows held out at random, or for ``part="validation"`` 731 of the others.

    Images are 16 x 16, of means of four pixels.
    """
    with np.load(root / "multiview" / "noto_emoji_32.npz") as file:
        images = file["images"]
    rows = json.loads((root / "multiview" / "noto_emoji_meta.json").read_text(encoding="utf-8"))
    order = np.random.default_rng(0).permutation(len(rows))
    test, validation = order[:NUM_HELD_OUT], order[NUM_HELD_OUT : 2 * NUM_HELD_OUT]
    split = np.full(len(rows), "train")
    split[test if part == "test" else validation] = "test"
    kept = np.arange(len(rows)) if part == "test" else np.setdiff1d(np.arange(len(rows)), test)
    names = [rows[row]["name"] for row in kept]
    subgroup = np.array([rows[row]["subgroup"] for row in kept])
    small = images[kept].reshape(len(kept), 16, 2, 16, 2, 3).mean((2, 4)) / 255.0
    views = {"image": small, "text": names}
    return Views(make_views(views, label=subgroup, split=split[kept]), subgroup, None)
