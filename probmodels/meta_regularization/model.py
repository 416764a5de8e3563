"""Meta generative regularisation: a classifier whose features stay the same when generated images are changed.

Classifier, for images n = 1..N of known class, with an extractor g and a linear head::

    weight, bias ~ Normal(0, prior_sd)
    y_n ~ Categorical(softmax(weight g(x_n) + bias))

Pseudo-consistency, for generated images x_s = G(z_s, y_s), s = 1..S, and a random change T of images::

    z_s ~ Normal(0, I)
    pcr_s ~ Normal(g(x_s), (2 lambda / F)^-1/2), observed at g(T(x_s))

with F features, so that ``-log p(pcr_s) = lambda mean_f (g_f(T(x_s)) - g_f(x_s))^2`` but for a constant: the weight of
the published loss is a precision. It holds no class, and moves the extractor alone. The guide's latents come from a
finder, see `probmodels.guides.meta_regularization`, whose parameters are hyperparameters::

    inner loss   -1/N [sum_n log p(y_n | x_n) + log p(weight, bias)] - 1/S sum_s log p(pcr_s)
    outer loss   -mean log p(y | x) of images held out + finder_weight mean_s [log q(z_s) - log p(z_s)]

References
----------
Yamaguchi, S., Chijiwa, D., Kanai, S., Kumagai, A. and Kashima, H. (2023). Regularizing neural networks with
meta-learning generative models. NeurIPS. https://arxiv.org/abs/2307.13899
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Annotated, Any, Literal

import numpy as np
import pyro
import pyro.distributions as dist
import torch
import xarray as xr
from annotated_types import Interval
from numpy.typing import NDArray
from pyro import poutine
from pyro.nn import PyroModule
from torch import Tensor, nn

from probmodels.datasets.checks import AnyPath
from probmodels.datasets.images import check_images, make_images
from probmodels.errors import DataError
from probmodels.guides.meta_regularization import (
    FINDERS,
    HEADS,
    FinderGuide,
    head_dims,
    head_terms,
    latent_terms,
    make_finder,
)
from probmodels.guides.nets import make_reader
from probmodels.inference.problem import Outer, Problem
from probmodels.inference.result import Result
from probmodels.inference.runtime.ops import isolated, named_deterministic
from probmodels.meta_regularization.fitted import fitted_generator, seen
from probmodels.meta_regularization.generators import Generator, LinearGenerator, Pictures
from probmodels.meta_regularization.transforms import Angle, Share, Transform, Zoom
from probmodels.options import Fraction, OneOf, Probability, Seed, Width, checked

__all__ = ["ENGINES", "REFERENCE", "MetaRegularization", "make_problem", "tiny"]

REFERENCE = "Yamaguchi et al. (2023), https://arxiv.org/abs/2307.13899"
ENGINES = ("bilevel",)

NETWORKS = ("mlp", "conv")
_LEAST_SQUARE = 1e-6  # of features that are divided by their root mean square
_KEPT = 10_000  # numbers up to which a result keeps the draws of a site, not their moments alone
_NUM_LATENTS = 8
_ROLES = ("train", "validation", "test")

_Weight = Annotated[float, Interval(ge=1e-6, le=1e6)]


class MetaRegularization(PyroModule):
    """The model.

    Parameters
    ----------
    extractor
        From images (image, channel, row, column) to features (image, feature).
    generator
        Makes images.
    transform
        Random changes.
    shapes
        Shape of ``weight`` and ``bias``.
    weight
        Lambda, the weight of the pseudo-consistency.
    distance
        ``"mean"`` of the squared differences of features, or their ``"sum"``.
    normalise
        Whether features are divided by their root mean square before they are compared.
    prior_sd
        Sd of the prior of the head.
    finder_weight
        Weight of the divergence of the latents.
    size
        Length of a latent.
    """

    def __init__(
        self,
        extractor: nn.Module,
        generator: Pictures,
        transform: Transform,
        shapes: dict[str, tuple[int, ...]],
        *,
        weight: float,
        distance: str,
        normalise: bool,
        prior_sd: float,
        finder_weight: float,
        size: int,
    ) -> None:
        super().__init__()
        self.extractor, self.generator, self.transform, self.shapes = extractor, generator, transform, shapes
        num_features = shapes["weight"][1]
        self.sd = (2 * weight / (num_features if distance == "mean" else 1)) ** -0.5
        self.normalise, self.prior_sd, self.finder_weight, self.size = normalise, prior_sd, finder_weight, size

    def forward(self, images: Tensor, rows: Tensor, label: Tensor, synthetic: Tensor, held_out: bool = False) -> None:
        """Sites ``z`` (synthetic, latent), ``weight`` (class, feature_axis), ``bias`` (class,), ``y`` (labelled,).

        In a step of the inner problem also ``pcr`` (synthetic, feature_axis), whose value moves with the parameters, so
        that a result has nothing to keep of it. Where no gradient is taken, ``class_probability`` (data, class), and
        ``consistency`` (), the mean of the squared differences of features that the weight multiplies.

        Parameters
        ----------
        images
            All images (data, channel, row, column).
        rows
            Those whose classes are observed.
        label
            Position of the class (data,).
        synthetic
            Classes of the generated images (synthetic,).
        held_out
            Whether the rows are those that judge the finder: there is neither prior nor consistency then.
        """
        learning = torch.is_grad_enabled()
        pictures = pyro.plate("synthetic", len(synthetic))
        with pictures, latent_terms(len(synthetic), self.finder_weight, held_out):
            named: Any = {"event_dims": ["latent"]}
            z = pyro.sample("z", dist.Normal(images.new_zeros(self.size), 1.0).to_event(1), infer=named)
        with head_terms(len(rows), held_out):
            weight, bias = (self._head(name, images) for name in self.shapes)
        if not learning:
            self._summarise(images, z, weight, bias, synthetic)
        elif not held_out:
            plain, changed = self.features(z, synthetic)
            with pictures, poutine.scale(scale=1 / len(synthetic)):
                pyro.sample("pcr", dist.Normal(plain, self.sd).to_event(1), obs=changed)
        logits = self.extractor(images[rows]) @ weight.mT + bias
        with pyro.plate("labelled", len(rows)), poutine.scale(scale=1 / len(rows)):
            pyro.sample("y", dist.Categorical(logits=logits), obs=label[rows])

    def features(self, z: Tensor, synthetic: Tensor) -> tuple[Tensor, Tensor]:
        """Features (synthetic, feature) of generated images, and of the same images changed."""
        images = self.generator(z, synthetic)
        found = self.extractor(torch.cat([images, self.transform(images)]))
        if self.normalise:
            found = found / (found.square().mean(-1, keepdim=True) + _LEAST_SQUARE).sqrt()
        plain, changed = found.chunk(2)
        return plain, changed

    def _head(self, name: str, like: Tensor) -> Tensor:
        shape = self.shapes[name]
        prior = dist.Normal(like.new_zeros(shape), self.prior_sd).to_event(len(shape))
        named: Any = {"event_dims": head_dims(name)}
        value: Tensor = pyro.sample(name, prior, infer=named)
        return value

    def _summarise(self, images: Tensor, z: Tensor, weight: Tensor, bias: Tensor, synthetic: Tensor) -> None:
        chance = (self.extractor(images) @ weight.mT + bias).softmax(-1)
        named_deterministic("class_probability", chance, ["data", "class"])
        plain, changed = self.features(z, synthetic)
        share = plain.shape[-1] / (2 * self.sd**2)  # 1, or the number of features
        pyro.deterministic("consistency", (changed - plain).square().mean() * share)


@checked(DataError, keep=True)
def make_problem(
    data: xr.Dataset,
    *,
    generator: Generator | Result | AnyPath | None = None,
    num_latents: Annotated[int, Interval(ge=1, le=10_000)] | None = None,
    num_synthetic: Annotated[int, Interval(ge=2, le=10_000)] = 64,
    weight: _Weight = 1.0,
    distance: Literal["mean", "sum"] = "mean",
    normalise: bool = True,
    finder: Annotated[str, OneOf(FINDERS)] = "residual",
    finder_hidden: Width = 64,
    finder_weight: _Weight = 1.0,
    network: Annotated[str, OneOf(NETWORKS)] = "mlp",
    hidden: Width = 64,
    num_features: Width = 32,
    head: Annotated[str, OneOf(HEADS)] = "point",
    prior_sd: _Weight = 1.0,
    validation: Fraction = 0.2,
    num_classes: Annotated[int, Interval(ge=2, le=10_000)] | None = None,
    flip: Probability = 0.0,
    degrees: Angle = 15.0,
    shift: Share = 0.1,
    zoom: Zoom = 0.1,
    erase: Share = 0.25,
    seed: Seed = 0,
) -> Problem:
    """Classification of images with generated images that regularise the features.

    Parameters
    ----------
    data
        Images with their classes, as `probmodels.datasets.images` describes them, of intensities (``threshold=0``).
        Those of split ``"test"`` take no part in the fit.
    generator
        From latents (image, latent) and positions of classes (image,) to intensities (image, row, column), with a
        derivative in the latents. It stays as it is. Or a result of ``"conditional_vae"``, or of ``"diffusion"`` with
        ``conditional=True``, or the folder of one. None for a linear one, fitted to the training images.
    num_latents
        Length of the generator's latents; of the linear one the number of its components. None for those of a result,
        and for 8.
    num_synthetic
        Generated images of a step, of all classes by turns.
    weight
        Lambda of the pseudo-consistency.
    distance
        What it multiplies: the ``"mean"`` of the squared differences over features, or their ``"sum"``, as in the
        paper, which grows with the number of features.
    normalise
        Whether features are first divided by their root mean square, so that they cannot agree by being small; False is
        the paper's.
    finder
        ``"mlp"``, the paper's, ``"residual"`` or ``"flow"``; see `probmodels.guides.meta_regularization`.
    finder_hidden
        Width of its hidden layers.
    finder_weight
        Weight of the divergence of its latents from their prior, beside the log loss of the validation images.
    network, hidden, num_features
        Extractor: ``"mlp"`` or ``"conv"``, the width of its hidden layers and the length of its output.
    head
        ``"point"`` for the most probable weights of the last layer, ``"normal"`` for a normal posterior of each.
    prior_sd
        Sd of their normal prior.
    validation
        Share of the training images of every class that is held out to judge the finder and the rounds.
    num_classes
        Number of classes, where labels are 0, 1, ... below it; None for the labels that training images have.
    flip, degrees, shift, zoom, erase
        Random changes of images, see `probmodels.meta_regularization.Transform`. They should keep the class: digits
        are not to be mirrored.
    seed
        Seed of the starting values and of the choice of validation images.

    Returns
    -------
    Problem
        For `fit_bilevel`. Draws have ``class_probability`` (data, class) of all images.

    Raises
    ------
    DataError
        If classes are unknown, out of range or absent from training, there are fewer images than classes, none is left
        for validation, the generator does not fit, or an option is out of range or not used.
    """
    check_images(data, binary=False)
    classes, label = _classes(data, num_classes)
    role = _roles(data, label, classes, validation, seed)
    dtype = torch.get_default_dtype()
    images = torch.as_tensor(data["image"].values, dtype=dtype).unsqueeze(1)
    places, shape = torch.as_tensor(label), tuple(images.shape[1:])
    rows = {name: torch.as_tensor(np.flatnonzero(role == name)) for name in _ROLES}
    synthetic = torch.arange(num_synthetic) % len(classes)
    shapes: dict[str, tuple[int, ...]] = {"weight": (len(classes), num_features), "bias": (len(classes),)}
    transform = Transform(flip=flip, degrees=degrees, shift=shift, zoom=zoom, erase=erase)
    transform.check(*shape[1:])
    if isinstance(generator, Result | str | os.PathLike):
        fitted = fitted_generator(generator, classes, shape[1:])
        if num_latents not in (None, fitted.num_latents):
            raise DataError(f"num_latents={num_latents}, but the generator has {fitted.num_latents}; leave it out")
        generator, num_latents = fitted.generator, fitted.num_latents
        known = seen(data["image"].values, fitted.images)
        data = data.assign_attrs({f"generator_saw_{name}": int(known[role == name].sum()) for name in _ROLES[1:]})
    num_latents = _NUM_LATENTS if num_latents is None else num_latents
    if generator is None:
        generator = LinearGenerator(images[rows["train"]], places[rows["train"]], len(classes), num_latents)
    pictures = Pictures(generator, shape)
    pictures.check(num_latents, synthetic[: 2 * len(classes)], images)
    with isolated(seed):
        extractor = make_reader(shape, num_features, network=network, hidden=hidden)
        found = make_finder(finder, num_latents, finder_hidden)
    model = MetaRegularization(
        extractor,
        pictures,
        transform,
        shapes,
        weight=weight,
        distance=distance,
        normalise=normalise,
        prior_sd=prior_sd,
        finder_weight=finder_weight,
        size=num_latents,
    )
    sizes = {"z": num_synthetic * num_latents, "class_probability": len(label) * len(classes)}
    names: NDArray[Any] = data["data"].values if "data" in data.coords else np.arange(len(label))
    problem = Problem(
        name="meta_regularization",
        model=model,
        guide=FinderGuide(found, num_latents, shapes, head, finder_weight),
        args=(images, rows["train"], places, synthetic),
        coords={
            "data": list(names),
            "class": list(classes),
            "labelled": list(names[rows["train"].numpy()]),
            "synthetic": range(num_synthetic),
            "latent": range(num_latents),
            "feature_axis": range(num_features),
        },
        data=data.assign(role=("data", role)),
        transient=tuple(name for name, size in sizes.items() if size > _KEPT),
    )
    held_out = replace(
        problem,
        args=(images, rows["validation"], places, synthetic),
        kwargs={"held_out": True},
        coords={**problem.coords, "labelled": list(names[rows["validation"].numpy()])},
        data=None,
    )
    # Pyro joins the name of a plain module and those of its parameters by $$$.
    hyper = {f"finder$$${name}": None for name, _ in found.named_parameters()}
    return replace(problem, outer=Outer(held_out, hyper))


def tiny() -> Problem:
    """Twenty-four images of 4 x 4 pixels, dark above or dark below, for the conformance tests."""
    rng = np.random.default_rng(0)
    label = np.tile([0, 1], 12)
    images = rng.uniform(0, 0.6, (24, 4, 4))
    images[label == 0, :2] += 0.4
    images[label == 1, 2:] += 0.4
    data = make_images(images, label, split=np.repeat(["train", "test"], [16, 8]), threshold=0)
    return make_problem(data, num_latents=2, num_synthetic=6, finder_hidden=4, hidden=4, num_features=3, head="normal")


def _classes(data: xr.Dataset, num_classes: int | None) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Names of the classes, and the position of the class of every image."""
    if "label" not in data:
        raise DataError("the images have no classes; give make_images their labels")
    label, training = data["label"].values, (data["split"] == "train").values
    if label.dtype.kind not in "biuUSO" and not (label == np.round(label)).all():
        bad = label[label != np.round(label)][0]
        raise DataError(f"label {bad} is no class; give whole numbers or texts, and leave out images of unknown class")
    if label.dtype.kind in "iuf" and (label < 0).any():
        raise DataError(f"label {label.min()} is below 0: leave out images of unknown class")
    if num_classes is not None:
        if label.dtype.kind not in "iuf":
            raise DataError(f"num_classes={num_classes} is not used with labels that are no numbers; leave it out")
        if label.max() >= num_classes:
            raise DataError(
                f"label {label.max()} is out of range: num_classes={num_classes} has 0 to {num_classes - 1}"
            )
        return np.arange(num_classes), label.astype(np.int64)
    classes = np.unique(label[training])
    strange = np.setdiff1d(label, classes)
    if len(strange):
        raise DataError(f"label {strange[0]!s} occurs among the test images alone; give training images of it too")
    return classes, np.searchsorted(classes, label).astype(np.int64)


def _roles(
    data: xr.Dataset, label: NDArray[np.int64], classes: NDArray[Any], validation: float, seed: int
) -> NDArray[np.str_]:
    """What every image is for: ``"train"``, ``"validation"`` or ``"test"``; every class keeps training images."""
    role = data["split"].values.astype("<U10")
    training = np.flatnonzero(role == "train")
    if len(classes) < 2:
        raise DataError("the training images are of fewer than two classes; a classifier needs two")
    if len(training) < len(classes):
        raise DataError(f"{len(training)} training images for {len(classes)} classes; give one or more of each")
    absent = np.setdiff1d(np.arange(len(classes)), label[training])
    if len(absent):
        raise DataError(f"class {classes[absent[0]]!s} has no training image; add some, or drop the class")
    rng = np.random.default_rng(seed)
    for place in range(len(classes)):
        own = rng.permutation(training[label[training] == place])
        role[own[: min(round(validation * len(own)), len(own) - 1)]] = "validation"
    if not (role == "validation").any():
        raise DataError(
            f"validation={validation:g} leaves no image to judge the finder, of at most "
            f"{np.bincount(label[training]).max()} in a class; give a larger share, or more images"
        )
    return role
