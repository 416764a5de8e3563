"""Views as tensors, the networks that read them by their kinds, and their random changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Generator, Tensor

from probmodels.datasets.paired.views import kind_of
from probmodels.errors import DataError
from probmodels.guides.modality_structure import NETWORKS, Tower
from probmodels.inference.runtime.ops import isolated
from probmodels.meta_regularization.transforms import Transform
from probmodels.modality_structure.fusion import Fusion, Layout

__all__ = [
    "TOWERS",
    "Augmentation",
    "as_tensor",
    "augmentations",
    "kinds_of",
    "make_fusion",
    "make_towers",
    "tensors",
]

Augmentation = Callable[[Tensor, Generator | None], Tensor]

_MOST_LOGITS = 5 * 10**8  # log odds of words: a row, token and code each
TOWERS = tuple(dict.fromkeys(network for networks in NETWORKS.values() for network in networks))


def kinds_of(data: xr.Dataset) -> dict[str, str]:
    """Kind of each modality, in their order."""
    return {str(name): kind_of(data[str(name)]) for name in data["modality"].values}


def tensors(data: xr.Dataset, split: str) -> tuple[Tensor, list[Tensor]]:
    """Which rows of a split have which modality (row, modality), and their views as towers read them.

    Vectors (row, feature) are standardised feature by feature, and pictures (row, channel, row, column) channel by
    channel, by the rows to learn from; texts are codes (row, token) of words.
    """
    rows = data["split"].values == split
    seen = data["present"].values[rows].astype(bool)
    names = [str(name) for name in data["modality"].values]
    views = [as_tensor(data, name, data[name].values[rows]) for name in names]
    for view, there in zip(views, seen.T, strict=True):
        view[torch.as_tensor(~there)] = 0
    return torch.as_tensor(seen), views


def as_tensor(data: xr.Dataset, name: str, values: NDArray[Any]) -> Tensor:
    """Rows of a modality as its tower reads them: standardised by the rows to learn from, or codes of words."""
    kind = kind_of(data[name])
    if kind == "texts":
        return torch.as_tensor(values, dtype=torch.int64)
    training = (data["split"].values == "train") & data["present"].sel(modality=name).values.astype(bool)
    known, axes = data[name].values[training], 0 if kind == "vectors" else (0, 2, 3)
    spread = known.std(axes, keepdims=True)
    standard = (values - known.mean(axes, keepdims=True)) / np.where(spread > 0, spread, 1.0)
    return torch.as_tensor(np.ascontiguousarray(standard), dtype=torch.get_default_dtype())


def make_towers(
    data: xr.Dataset, size: int, hidden: int, separate: bool, chosen: Mapping[str, str], seed: int
) -> dict[str, Tower]:
    """A tower for each modality: the one chosen, else the first of its kind.

    Raises
    ------
    DataError
        If what is chosen is for no modality, or not for its kind.
    """
    kinds = kinds_of(data)
    for name, network in chosen.items():
        if name not in kinds:
            raise DataError(f"towers names {name!r}, which is no modality; choose among {', '.join(kinds)}")
        if network not in NETWORKS[kinds[name]]:
            raise DataError(
                f"towers: {network!r} reads no {kinds[name]}, which {name!r} holds; choose one of "
                f"{', '.join(NETWORKS[kinds[name]])}"
            )
    towers = {}
    with isolated(seed):
        for name, kind in kinds.items():
            shape = (data.sizes[f"{name}_word"],) if kind == "texts" else data[name].shape[1:]
            towers[name] = Tower(shape, size, hidden, separate, chosen.get(name, NETWORKS[kind][0]))
    return towers


def make_fusion(
    data: xr.Dataset,
    pairs: Sequence[tuple[str, str]],
    weights: Mapping[str, float],
    width: int,
    layers: int,
    share: float,
    seed: int,
) -> Fusion | None:
    """Fusion encoder of the pairs; None without weights.

    Raises
    ------
    DataError
        If the words of a text are too many to be told from each other.
    """
    if not any(weights.values()):
        return None
    layouts = {}
    for name, kind in kinds_of(data).items():
        layouts[name] = Layout(kind, data[name].shape[1:], data.sizes.get(f"{name}_word", 0))
        size = data[name].size * layouts[name].num_words
        if weights["masked"] and size > _MOST_LOGITS:
            raise DataError(
                f"masked={weights['masked']:g}: {name!r} has {len(data[name])} rows of {data[name].shape[1]} tokens "
                f"and {layouts[name].num_words} codes, {size:.1e} log odds; give fewer rows, or a larger min_count"
            )
    with isolated(seed):
        return Fusion(layouts, pairs, weights, width=width, layers=layers, share=share)


def augmentations(data: xr.Dataset, dropout: float, shift: float, flip: float, erase: float) -> dict[str, Augmentation]:
    """Random changes of each modality by its kind.

    Raises
    ------
    DataError
        If pictures would not change.
    """
    found: dict[str, Augmentation] = {}
    for name, kind in kinds_of(data).items():
        if kind == "pictures":
            transform = Transform(flip=flip, degrees=0.0, shift=shift, zoom=0.0, erase=erase)
            transform.check(*data[name].shape[2:])
            found[name] = transform
        else:
            found[name] = _Dropout(dropout, words=kind == "texts")
    return found


class _Dropout:
    """Rows without a random share of their features, or texts without a share of their words but for one at least."""

    def __init__(self, share: float, words: bool) -> None:
        self.share, self.words = share, words

    def __call__(self, x: Tensor, generator: Generator | None = None) -> Tensor:
        dtype = torch.get_default_dtype() if self.words else x.dtype
        chance = torch.rand(x.shape, generator=generator, dtype=dtype)
        kept = chance >= self.share
        if self.words:  # the word of the highest chance stays
            kept = kept | (torch.where(x > 0, chance, -1.0).argmax(1, keepdim=True) == torch.arange(x.shape[1]))
        return x * kept.to(x)
