"""Latent modality structures: views of the same things embedded by towers, every loss a site of a Pyro model.

For rows n = 1..N, modalities a, b and embeddings ``z`` of length 1 that towers read in them::

    temperature      ~ LogNormal(log 0.1, 1)                        or fixed
    match_a_to_b     ~ Categorical(z_a z_b' / temperature)          observed to be the row itself; both directions
    orthogonality_a  ~ Normal(<z_a, own_a>, .)                      observed to be 0, as all that follow
    bridge_a_to_b    ~ Normal(augmented_a - norm(t z_a + (1 - t) z_b), .)
    path_a_to_b      ~ the law of a Brownian bridge, see `paths`
    cross_a_to_b     ~ Normal(<a_j, b_k> - <a_k, b_j>, .)           between_, within_ and paired_ alike

    fused_a_to_b, masked_a_to_b                                     of a fusion encoder, see `fusion`

The precisions of the normal sites are twice the weights of the losses, which are fixed or have priors. The candidates
of a row are the rows of its step: the batch is the event of the matching sites. See `structures` for each loss.

References
----------
Jiang, Q., Chen, C., Zhao, H., Chen, L., Ping, Q., Tran, S. D., Xu, Y., Zeng, B. and Chilimbi, T. (2023). Understanding
and constructing latent modality structures in multi-modal representation learning. CVPR.
https://arxiv.org/abs/2303.05952
Goel, S. et al. (2022). CyCLIP. NeurIPS. https://arxiv.org/abs/2205.14459 (cross-modal and in-modal consistency)
Oord, A. van den, Li, Y. and Vinyals, O. (2018). Representation learning with contrastive predictive coding.
https://arxiv.org/abs/1807.03748 (the bound on mutual information)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
import xarray as xr
from annotated_types import Interval
from pyro import poutine
from pyro.nn import PyroModule
from torch import Tensor, nn

from probmodels.datasets.paired.views import check_views, make_views
from probmodels.errors import DataError
from probmodels.guides.modality_structure import PositiveGuide, Tower
from probmodels.inference.problem import Problem
from probmodels.meta_regularization.transforms import Share
from probmodels.modality_structure.fusion import Fusion
from probmodels.modality_structure.paths import path_site, sample_path
from probmodels.modality_structure.structures import (
    bridge_mean,
    match_site,
    matching_logits,
    off_diagonal,
    structure_site,
    uniformity,
)
from probmodels.modality_structure.views import (
    TOWERS,
    Augmentation,
    augmentations,
    kinds_of,
    make_fusion,
    make_towers,
    tensors,
)
from probmodels.options import Fraction, OneOf, Positive, Probability, Seed, Width, checked, refuse_unused

__all__ = ["ENGINES", "REFERENCE", "ModalityStructure", "Points", "Read", "make_problem", "tiny"]

REFERENCE = "Jiang et al. (2023), https://arxiv.org/abs/2303.05952"
ENGINES = ("svi",)

GAUSSIAN = ("orthogonality", "bridge", "consistency", "augmented_consistency")  # whose weights are precisions
SEPARATION = ("orthogonality", "contrast", "uniformity")
_AUGMENTED = ("contrast", "bridge", "augmented_consistency")
_START = 0.1  # median of the prior of the temperature
_PRIOR_SD = 1.0  # of the logarithms of temperature and weights
_MOST_ROWS = 5000  # to learn from: outside of steps all are candidates of each
_LEAST_SHARED = 2  # rows of a pair of modalities


class Read(NamedTuple):
    """Embeddings of rows by modality.

    Attributes
    ----------
    z, near
        Shared and independent embeddings (row, size) of the rows, and of their augmented views.
    points
        Embeddings (row, time, size) of views along a path.
    """

    z: Mapping[str, tuple[Tensor, Tensor | None]]
    near: Mapping[str, tuple[Tensor, Tensor | None]]
    points: Mapping[str, Tensor]


class ModalityStructure(PyroModule):
    """The model.

    Parameters
    ----------
    towers
        Of each modality.
    pairs
        Names of the modalities that are matched.
    weights
        Name of a structure to its weight; those of weight 0 are left out.
    inferred
        Structures whose weight is a latent site ``weight_<name>``, with a prior about the weight given.
    temperature
        Of the matching; None for a latent site with a prior.
    in_modal
        Whether rows are matched with their own augmented views, too.
    bridge_time, bridge_order
        As `structures.bridge_mean` takes them.
    normalize
        ``"N"`` or ``"N2"``: by what sums over pairs of rows are divided.
    path, path_scale
        Points of the Brownian bridge whose times and scale are latent, and the median of the prior of its scale.
    fusion
        Encoder of pairs, with sites of its own; None for none.
    augment
        Kind of a modality to its random changes, as `modality_structure.views.augmentations` makes them.
    """

    def __init__(
        self,
        towers: Mapping[str, Tower],
        pairs: Sequence[tuple[str, str]],
        weights: Mapping[str, float],
        *,
        inferred: Sequence[str] = (),
        temperature: float | None = None,
        in_modal: bool = False,
        bridge_time: float = 0.25,
        bridge_order: Literal["paper", "reversed"] = "paper",
        normalize: Literal["N", "N2"] = "N",
        path: int = 0,
        path_scale: float = 0.25,
        fusion: Fusion | None = None,
        augment: Mapping[str, Augmentation] | None = None,
    ) -> None:
        super().__init__()
        self.fusion = fusion
        self.towers = nn.ModuleDict({_key(name): tower for name, tower in towers.items()})
        self.names, self.pairs = tuple(towers), tuple(pairs)
        self.weights = {name: weight for name, weight in weights.items() if weight}
        self.inferred, self.temperature, self.in_modal = tuple(inferred), temperature, in_modal
        self.bridge_time, self.bridge_order = bridge_time, bridge_order
        self.path, self.path_scale = path, path_scale
        self.normalize, self.augment = normalize, dict(augment or {})
        self.augments = in_modal or any(name in self.weights for name in _AUGMENTED)

    def embed(self, views: Sequence[Tensor]) -> dict[str, tuple[Tensor, Tensor | None]]:
        """Shared and independent embeddings (row, size) of each modality."""
        return {name: self.towers[_key(name)](x) for name, x in zip(self.names, views, strict=True)}

    def near(self, views: Sequence[Tensor], times: int = 1) -> dict[str, tuple[Tensor, Tensor | None]]:
        """Embeddings of rows changed at random ``times`` times; outside of steps in the same way in every run."""
        generators = [None if torch.is_grad_enabled() else torch.Generator().manual_seed(0) for _ in views]
        changes = [self.augment[name] for name in self.names]
        for _ in range(times):
            views = [change(x, g) for change, x, g in zip(changes, views, generators, strict=True)]
        return self.embed(views)

    def read(self, views: Sequence[Tensor]) -> Read:
        """All embeddings that the sites are of."""
        z = self.embed(views)
        near = self.near(views) if self.augments else z
        if not self.path:
            return Read(z, near, {})
        along = [self.near(views, times) for times in range(1, self.path + 1)]
        points = {name: torch.stack([point[name][0] for point in along], -2) for name in self.names}
        return Read(z, near, points)

    def forward(self, present: Tensor, *views: Tensor) -> None:
        """The sites above.

        Parameters
        ----------
        present
            Whether a row has a modality (row, modality).
        *views
            Rows of each modality, as `modality_structure.views.tensors` makes them.
        """
        rows = pyro.plate("fitted_row", len(present)).indices
        scale = len(present) / len(rows)  # an epoch is a partition of the rows into batches
        if scale != 1:
            present, views = present[rows], tuple(x[rows] for x in views)
        read = self.read(views)
        temperature = self.sites(present, read, scale)
        if self.fusion is not None:
            generator = None if torch.is_grad_enabled() else torch.Generator().manual_seed(0)
            rows_of = dict(zip(self.names, views, strict=True))
            seen = dict(zip(self.names, present.unbind(-1), strict=True))
            with poutine.scale(scale=scale):
                self.fusion(rows_of, {name: z[0] for name, z in read.z.items()}, seen, temperature, generator)

    def sites(self, present: Tensor, read: Read, scale: float = 1.0) -> Any:
        """The sites of embeddings, observed ones with ``scale`` times their log densities; returns the temperature."""
        z, near, points = read
        like = z[self.names[0]][0]
        temperature: Any = self.temperature
        if temperature is None:
            temperature = pyro.sample("temperature", dist.LogNormal(like.new_tensor(math.log(_START)), _PRIOR_SD))
        weights: dict[str, Any] = dict(self.weights)
        for name in self.inferred:
            prior = dist.LogNormal(like.new_tensor(math.log(weights[name])), _PRIOR_SD)
            weights[name] = pyro.sample(f"weight_{name}", prior)
        path = sample_path(self.path, self.path_scale, like) if self.path else None
        seen = dict(zip(self.names, present.unbind(-1), strict=True))
        with poutine.scale(scale=scale):
            for name in self.names:
                self._alone(name, z[name], near[name], seen[name], temperature, weights)
            if "uniformity" in weights:
                loss = uniformity([z[n][1] for n in self.names], list(seen.values()), self.normalize)  # type: ignore[misc]
                pyro.factor("uniformity", -weights["uniformity"] * len(present) * loss)
            for a, b in self.pairs:
                both = seen[a] & seen[b]
                self._paired((a, b), (z[a][0], z[b][0]), (near[a][0], near[b][0]), both, temperature, weights)
                if path is not None:
                    path_site(f"path_{a}_to_{b}", points[a], (z[a][0], z[b][0]), path, both)
        return temperature

    def _alone(
        self,
        name: str,
        z: tuple[Tensor, Tensor | None],
        near: tuple[Tensor, Tensor | None],
        seen: Tensor,
        temperature: Any,
        weights: Mapping[str, Any],
    ) -> None:
        """Sites of one modality."""
        if self.in_modal:
            match_site(f"match_{name}_to_augmented", matching_logits(z[0], near[0], temperature, seen), seen)
        if "orthogonality" in weights:
            assert z[1] is not None
            residual = (z[0] * z[1]).sum(-1)
            structure_site(f"orthogonality_{name}", residual, weights["orthogonality"], seen, ["fitted_row"])
        if "contrast" in weights:
            assert z[1] is not None
            assert near[1] is not None
            with poutine.scale(scale=weights["contrast"]):
                match_site(f"contrast_{name}", matching_logits(z[1], near[1], temperature, seen), seen)
        if "augmented_consistency" in weights:
            residual = z[0] @ z[0].mT - near[0] @ near[0].mT
            self._over_pairs(f"within_{name}", residual, weights["augmented_consistency"], seen)

    def _paired(
        self,
        names: tuple[str, str],
        z: tuple[Tensor, Tensor],
        near: tuple[Tensor, Tensor],
        both: Tensor,
        temperature: Any,
        weights: Mapping[str, Any],
    ) -> None:
        """Sites of two modalities."""
        (a, b), (first, second) = names, z
        match_site(f"match_{a}_to_{b}", matching_logits(first, second, temperature, both), both)
        match_site(f"match_{b}_to_{a}", matching_logits(second, first, temperature, both), both)
        if "bridge" in weights:
            residual = near[0] - bridge_mean(first, second, self.bridge_time, self.bridge_order)
            counted = both.unsqueeze(-1).expand(residual.shape)
            structure_site(f"bridge_{a}_to_{b}", residual, weights["bridge"], counted, ["fitted_row", "component"])
        if "consistency" in weights:
            across = first @ second.mT
            self._over_pairs(f"cross_{a}_to_{b}", across - across.mT, weights["consistency"], both)
            inside = first @ first.mT - second @ second.mT
            self._over_pairs(f"between_{a}_to_{b}", inside, weights["consistency"], both)
        if "augmented_consistency" in weights:
            residual = (first * second).sum(-1) - (near[0] * near[1]).sum(-1)
            weight = weights["augmented_consistency"]
            structure_site(f"paired_{a}_to_{b}", residual, weight, both, ["fitted_row"])

    def _over_pairs(self, name: str, residual: Tensor, weight: Any, seen: Tensor) -> None:
        """Site of the distinct residuals of all pairs of rows."""
        weight = 2 * weight if self.normalize == "N" else 2 * weight / seen.sum().clamp(min=1)
        counted = off_diagonal(seen.unsqueeze(1) & seen)
        structure_site(name, off_diagonal(residual), weight, counted, ["fitted_pair"])


def _key(name: str) -> str:
    """Name of a tower: a modality may be called as a method of a module is."""
    return f"tower_{name}"


Points = Annotated[int, Interval(ge=0, le=32)]
_Weight = Annotated[float, Interval(ge=0, le=1e6)]


@checked(DataError, keep=True)
def make_problem(
    data: xr.Dataset,
    *,
    size: Width = 32,
    hidden: Width = 128,
    towers: Mapping[str, Annotated[str, OneOf(TOWERS)]] | None = None,
    temperature: Annotated[float, Interval(ge=1e-3, le=1e2)] | None = None,
    in_modal: bool = False,
    orthogonality: _Weight = 0.0,
    contrast: _Weight = 0.0,
    uniformity: _Weight = 0.0,
    bridge: _Weight = 0.0,
    bridge_time: Fraction = 0.25,
    bridge_order: Literal["paper", "reversed"] = "paper",
    path: Points = 0,
    path_scale: Positive = 0.25,
    consistency: _Weight = 0.0,
    augmented_consistency: _Weight = 0.0,
    normalize: Literal["N", "N2"] = "N",
    inferred: Sequence[Annotated[str, OneOf(GAUSSIAN)]] = (),
    fusion: _Weight = 0.0,
    masked: _Weight = 0.0,
    masked_share: Fraction = 0.15,
    fusion_layers: Annotated[int, Interval(ge=1, le=12)] = 2,
    dropout: Fraction = 0.2,
    shift: Share = 0.1,
    flip: Probability = 0.0,
    erase: Share = 0.25,
    seed: Seed = 0,
) -> Problem:
    """Embeddings of two or more modalities that are matched, with structures between them.

    Parameters
    ----------
    data
        As `probmodels.datasets.paired.views.make_views` returns it. Rows of split ``"train"`` are learned from, the
        others decide the verdict. Rows that lack a modality are no candidates where it is matched.
    size, hidden
        Length of the embeddings, and width of the towers' layers.
    towers
        Name of a modality to its tower, where it is not the first of its kind: ``"mlp"`` for vectors; ``"conv"``, three
        convolutions, or ``"mlp"`` for pictures; ``"mean"`` or ``"attention"``, a mean of the words' embeddings with
        equal or learned weights, for texts.
    temperature
        Of the matching; None for a latent site with a prior about 0.1.
    in_modal
        Whether rows are matched with their own augmented views, too.
    orthogonality, contrast, uniformity
        Weights of deep feature separation: shared and independent embeddings at right angles, independent embeddings
        that tell rows apart, and that spread over the sphere.
    bridge, bridge_time, bridge_order
        Weight of the Brownian bridge, its t, and what t multiplies: the modality that is augmented, the first of a
        pair (``"paper"``, as printed), or the other one (``"reversed"``).
    path, path_scale
        Points of a Brownian bridge whose times and scale are latent: the k-th is the view of a row that was augmented
        k times, on the way from its embedding to that of the other modality. 0 for no such path. ``path_scale`` is the
        median of the prior of the scale.
    consistency, augmented_consistency
        Weights of geometric consistency across and in modalities, and of that with augmented views.
    normalize
        Sums over pairs of rows are divided by the number of rows (``"N"``, as printed, which grows with the batch) or
        by its square (``"N2"``).
    inferred
        Structures whose weights are latent, with log-normal priors about the weights given; among
        ``"orthogonality"``, ``"bridge"``, ``"consistency"`` and ``"augmented_consistency"``.
    fusion, masked
        Weights of a fusion encoder, of width ``hidden``: of whether rows match, with hard negatives, and of the words
        of a text that are hidden from it.
    masked_share
        Share of the words that are hidden; one of each text at least.
    fusion_layers
        Layers of self-attention and cross-attention.
    dropout
        Share of the features of a vector, or of the words of a text, that an augmented view lacks; one word is kept.
    shift, flip, erase
        Changes of an augmented picture: most that it is moved along either axis, as a share of its side; probability
        that it is mirrored, left to right; and side of the square that is erased, as a share of its own.
    seed
        Seed of the starting values.

    Returns
    -------
    Problem
        For `fit_svi`, best with ``batch_size``, which is the number of candidates of a step.

    Raises
    ------
    DataError
        If a modality shares no rows with another, nothing is held out, there are more than 5000 rows to learn from, or
        an option is out of range or not used.
    """
    weights = {
        "orthogonality": orthogonality,
        "contrast": contrast,
        "uniformity": uniformity,
        "bridge": bridge,
        "consistency": consistency,
        "augmented_consistency": augmented_consistency,
    }
    if not bridge:
        refuse_unused(make_problem, "bridge=0", bridge_time=bridge_time, bridge_order=bridge_order)
    if not path:
        refuse_unused(make_problem, "path=0", path_scale=path_scale)
    if not (consistency or augmented_consistency or uniformity):
        refuse_unused(make_problem, "no sum over pairs of rows", normalize=normalize)
    augments = bool(in_modal or path or any(weights[name] for name in _AUGMENTED))
    if not (fusion or masked):
        refuse_unused(make_problem, "no fusion encoder", fusion_layers=fusion_layers)
    if not masked:
        refuse_unused(make_problem, "masked=0", masked_share=masked_share)
    if not augments:
        refuse_unused(make_problem, "no augmented views", dropout=dropout, shift=shift, flip=flip, erase=erase)
    for place, name in enumerate(inferred):
        if not weights[name] or name in inferred[:place]:
            raise DataError(f"inferred={list(inferred)}; name each once, with a weight of its own, as {name}=1.0")
    check_views(data)
    kinds = set(kinds_of(data).values())
    if "pictures" not in kinds:
        refuse_unused(make_problem, "no pictures", shift=shift, flip=flip, erase=erase)
    if masked and "texts" not in kinds:
        raise DataError(f"masked={masked:g}, and no modality is a text; leave it out")
    if kinds == {"pictures"}:
        refuse_unused(make_problem, "pictures alone", dropout=dropout)
    pairs = _pairs(data)
    present, views = tensors(data, "train")
    if len(present) > _MOST_ROWS:
        raise DataError(
            f"{len(present)} rows to learn from; give at most {_MOST_ROWS}, since all are compared with all"
        )
    separate = any(weights[name] for name in SEPARATION)
    losses = {"fusion": fusion, "masked": masked}
    model = ModalityStructure(
        make_towers(data, size, hidden, separate, towers or {}, seed),
        pairs,
        weights,
        inferred=inferred,
        temperature=temperature,
        in_modal=in_modal,
        bridge_time=bridge_time,
        bridge_order=bridge_order,
        normalize=normalize,
        path=path,
        path_scale=path_scale,
        fusion=make_fusion(data, pairs, losses, hidden, fusion_layers, masked_share, seed),
        augment=augmentations(data, dropout, shift, flip, erase) if augments else None,
    )
    starts = {"temperature": _START} if temperature is None else {}
    starts |= {f"weight_{name}": weights[name] for name in inferred}
    starts |= {"path_scale": path_scale} if path else {}
    return Problem(
        name="modality_structure",
        model=model,
        guide=PositiveGuide(starts, path),
        args=(present, *views),
        data=data,
        batch_plates=("fitted_row",),
        loss="TraceMeanField_ELBO",
    )


def _pairs(data: xr.Dataset) -> list[tuple[str, str]]:
    """Pairs of modalities that share rows, both to learn from and held out."""
    names = [str(name) for name in data["modality"].values]
    present, training = data["present"].values.astype(bool), data["split"].values == "train"
    found, tested = [], 0
    for i, j in itertools.combinations(range(len(names)), 2):
        both = present[:, i] & present[:, j]
        if (both & training).sum() >= _LEAST_SHARED:
            found.append((names[i], names[j]))
            tested += (both & ~training).sum() >= _LEAST_SHARED
    for name in names:
        if not any(name in pair for pair in found):
            raise DataError(
                f"modality {name!r} shares fewer than {_LEAST_SHARED} rows to learn from with each of the others, so "
                "that it cannot be matched; leave it out, or give rows that have both"
            )
    if not tested:
        raise DataError("no two modalities share rows that are held out; hold out rows that have both")
    return found


def tiny() -> Problem:
    """Sixteen rows of a picture, a text and a sound, some of which lack one, with all structures, for the tests."""
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(16, 2))
    sound = shared @ rng.normal(size=(2, 3)) + 0.1 * rng.normal(size=(16, 3))
    image = (shared @ rng.normal(size=(2, 16))).reshape(16, 4, 4)
    text = [f"{'light' if one > 0 else 'dark'} and {'round' if two > 0 else 'square'}" for one, two in shared]
    views = {"image": image, "text": text, "sound": sound}
    present = np.ones((16, 3), dtype=bool)
    present[:3, 2] = False
    split = np.where(np.arange(16) % 4 == 3, "test", "train")
    data = make_views(views, present=present, split=split, label=np.arange(16) % 2)
    return make_problem(
        data,
        size=3,
        hidden=4,
        in_modal=True,
        orthogonality=1.0,
        contrast=0.25,
        uniformity=0.1,
        bridge=0.25,
        path=2,
        consistency=0.05,
        augmented_consistency=0.05,
        inferred=["bridge"],
        fusion=0.5,
        masked=0.2,
    )
