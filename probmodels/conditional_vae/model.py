"""Conditional variational autoencoders: images of a class from normal latents.

Generative model, for images n = 1..N of known classes y_n, with pixels d::

    z_n ~ Normal(0, I)
    image_nd ~ Bernoulli(sigmoid(f(z_n, y_n)_d)),
            or Normal(f(z_n, y_n)_d, scale),
            or Logistic(f(z_n, y_n)_d, scale), rounded to one of V intensities

f is a network of two hidden layers; the scale is one number, learned. The class is given and not modelled, so that new
images of any class can be drawn.

References
----------
Kingma, D. P. and Welling, M. (2014). Auto-encoding variational Bayes. ICLR. https://arxiv.org/abs/1312.6114
Sohn, K., Lee, H. and Yan, X. (2015). Learning structured output representation using deep conditional generative
models. NeurIPS 28.
Salimans, T., Karpathy, A., Chen, X. and Kingma, D. P. (2017). PixelCNN++. ICLR. https://arxiv.org/abs/1701.05517 (the
logistic distribution of rounded intensities)
"""

from __future__ import annotations

import json
import math
from typing import Annotated, Any, ClassVar

import numpy as np
import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
import xarray as xr
from annotated_types import Interval
from numpy.typing import NDArray
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import constraints

from probmodels.datasets.images import check_images, make_images
from probmodels.errors import DataError
from probmodels.guides.conditional_vae import ConditionalEncoder
from probmodels.guides.nets import make_writer
from probmodels.inference.problem import Problem
from probmodels.inference.runtime.ops import isolated
from probmodels.options import OneOf, Seed, Width, checked, refuse_unused

__all__ = ["ENGINES", "LIKELIHOODS", "REFERENCE", "ConditionalVAE", "RoundedLogistic", "make_problem", "tiny"]

REFERENCE = (
    "Sohn et al. (2015), https://papers.nips.cc/paper/5775; Kingma and Welling (2014), https://arxiv.org/abs/1312.6114"
)
ENGINES = ("svi",)
LIKELIHOODS = ("bernoulli", "normal", "logistic")
_OFF_GRID = 1e-4  # of a step between intensities


class RoundedLogistic(dist.TorchDistribution):
    """Intensities ``k / (V - 1)``, k = 0, ..., V - 1: a logistic number rounded to the nearest, the ends open.

    Parameters
    ----------
    location, scale
        Of the logistic number, in units of the intensity.
    num_values
        V.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.unit_interval

    def __init__(self, location: Tensor, scale: Tensor, num_values: int) -> None:
        self.location, self.scale = torch.broadcast_tensors(location, scale)
        self.num_values = num_values
        super().__init__(self.location.shape, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> RoundedLogistic:
        return RoundedLogistic(self.location.expand(batch_shape), self.scale.expand(batch_shape), self.num_values)

    def log_prob(self, value: Tensor) -> Tensor:
        last = self.num_values - 1
        half = 0.5 / last
        above, below = (value + half - self.location) / self.scale, (value - half - self.location) / self.scale
        upper, lower = F.logsigmoid(above), F.logsigmoid(-below)
        # sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - exp(b - a))
        inner = upper + lower + torch.log(-torch.expm1(below - above))
        place = (value * last).round()
        return torch.where(place <= 0, upper, torch.where(place >= last, lower, inner))

    def sample(self, sample_shape: Any = ()) -> Tensor:
        shape = self._extended_shape(sample_shape)
        with torch.no_grad():
            level = torch.rand(shape, dtype=self.location.dtype, device=self.location.device)
            level = level.clamp(torch.finfo(level.dtype).tiny, 1 - torch.finfo(level.dtype).eps)
            drawn = self.location + self.scale * torch.logit(level)
            last = self.num_values - 1
            return (drawn * last).round().clamp(0, last) / last

    @property
    def mean(self) -> Tensor:
        """Mean intensity, the sum over k of the chances of exceeding it."""
        last = self.num_values - 1
        total = torch.zeros_like(self.location)
        for k in range(last):
            total = total + torch.sigmoid((self.location - (k + 0.5) / last) / self.scale)
        return total / last


class ConditionalVAE(PyroModule):
    """The model.

    Parameters
    ----------
    shape
        Rows and columns of an image.
    num_latents, num_classes
        Numbers of latents, and of classes.
    likelihood
        One of `LIKELIHOODS`.
    num_values
        Number V of intensities, for ``"logistic"``.
    hidden
        Width of the two hidden layers.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        num_latents: int,
        num_classes: int,
        *,
        likelihood: str = "bernoulli",
        num_values: int | None = None,
        hidden: int = 256,
    ) -> None:
        super().__init__()
        self.shape, self.num_latents, self.num_classes = tuple(shape), num_latents, num_classes
        self.kind, self.num_values = likelihood, num_values
        self.decoder = make_writer(shape, num_latents + num_classes, hidden=hidden)
        if likelihood != "bernoulli":
            self.log_scale = nn.Parameter(torch.tensor(math.log(0.2)))

    def likelihood(self, z: Tensor, label: Tensor) -> dist.TorchDistribution:
        """Distribution of images (..., row, column) given latents (..., latent) and places of classes (...)."""
        shown = torch.eye(self.num_classes, dtype=z.dtype, device=z.device)[label].expand(
            *z.shape[:-1], self.num_classes
        )
        both = torch.cat([z, shown], -1)
        found = self.decoder(both.flatten(0, -2)).reshape(*z.shape[:-1], *self.shape)
        if self.kind == "bernoulli":
            return dist.Bernoulli(logits=found).to_event(2)
        scale = self.log_scale.exp()
        if self.num_values is None:
            return dist.Normal(0.5 + found, scale).to_event(2)
        return RoundedLogistic(0.5 + found, scale, self.num_values).to_event(2)

    def image(self, z: Tensor, label: Tensor) -> Tensor:
        """Images (..., row, column) in [0, 1] that latents (..., latent) and places of classes (...) stand for.

        These are means of pixels, or middles of the logistic numbers that are rounded; cut off at 0 and 1.
        """
        found: Any = self.likelihood(z, label).base_dist
        centre: Tensor = found.location if isinstance(found, RoundedLogistic) else found.mean
        return centre.clamp(0, 1)

    def forward(self, image: Tensor, label: Tensor) -> None:
        """Sites ``z`` (data, latent) and ``image`` (data, row, column).

        Parameters
        ----------
        image
            Images (data, row, column).
        label
            Places of their classes (data,).
        """
        latent: Any = {"event_dims": ["latent"]}
        axes: Any = {"event_dims": ["row", "column"]}
        zero, unit = (
            image.new_zeros(self.num_latents),
            torch.eye(self.num_latents, dtype=image.dtype, device=image.device),
        )
        with pyro.plate("data", len(image)) as rows:
            z = pyro.sample("z", dist.MultivariateNormal(zero, scale_tril=unit), infer=latent)
            pyro.sample("image", self.likelihood(z, label[rows]), obs=image[rows], infer=axes)


@checked(DataError, keep=True)
def make_problem(
    data: xr.Dataset,
    *,
    likelihood: Annotated[str, OneOf(LIKELIHOODS)] = "bernoulli",
    num_values: Annotated[int, Interval(ge=2, le=65_536)] | None = None,
    num_latents: Annotated[int, Interval(ge=1, le=1000)] = 8,
    num_classes: Annotated[int, Interval(ge=2, le=10_000)] | None = None,
    hidden: Width = 256,
    guide_hidden: Width = 256,
    seed: Seed = 0,
) -> Problem:
    """A conditional autoencoder of images with classes.

    Parameters
    ----------
    data
        Images with labels as `probmodels.datasets.images` describes them. Those with ``split="test"`` are held out, to
        judge new images by.
    likelihood
        ``"bernoulli"`` for pixels 0 and 1; ``"normal"`` for intensities as densities; ``"logistic"`` for intensities of
        ``num_values`` values.
    num_values
        Number of intensities in equal steps from 0 to 1, 256 for images of 8 bits; for ``"logistic"`` only.
    num_latents
        Number of latents of an image.
    num_classes
        Number of classes, where labels are 0, 1, ... below it; None for the labels that training images have.
    hidden, guide_hidden
        Width of the two hidden layers of decoder and encoder.
    seed
        Seed of the starting values of the networks.

    Returns
    -------
    Problem
        For `fit_svi`; plate ``data`` may be subsampled.

    Raises
    ------
    DataError
        If images have no labels or labels out of range, fewer than two classes, a class without a training image, or
        pixels that the likelihood does not know; if no image is held out; or an option is out of range or not used.
    """
    if likelihood == "logistic":
        if num_values is None:
            raise DataError("likelihood='logistic' needs num_values, the number of intensities: 256 for 8 bits")
    else:
        refuse_unused(make_problem, f"likelihood={likelihood!r}", num_values=num_values)
    check_images(data, binary=likelihood == "bernoulli")
    if num_values is not None:
        _check_grid(data["image"].values, num_values)
    rows = (data["split"] == "train").values
    classes, label = _classes(data, rows, num_classes)
    kept = data.isel(data=rows).assign_attrs(classes=json.dumps(classes))
    if not rows.all():
        others = data.isel(data=~rows)
        kept = kept.assign(
            held_out_image=(("held_out", "row", "column"), others["image"].values),
            held_out_label=("held_out", others["label"].values),
        )
    if not kept.sizes.get("held_out", 0):
        raise DataError("no image is held out, to judge new images by; mark some with split='test'")
    image = torch.as_tensor(kept["image"].values, dtype=torch.get_default_dtype())
    shape, sizes = (image.shape[1], image.shape[2]), (num_latents, len(classes))
    with isolated(seed):
        model = ConditionalVAE(shape, *sizes, likelihood=likelihood, num_values=num_values, hidden=hidden)
        guide = ConditionalEncoder(shape, *sizes, hidden=guide_hidden)
    return Problem(
        name="conditional_vae",
        model=model,
        guide=guide,
        args=(image, torch.as_tensor(label[rows])),
        coords={"data": list(kept["data"].values)},
        data=kept,
        batch_plates=("data",),
        loss="TraceMeanField_ELBO",
    )


def _check_grid(image: np.ndarray, num_values: int) -> None:
    scaled = image.astype(np.float64) * (num_values - 1)
    worst = float(np.abs(scaled - scaled.round()).max())
    if worst > _OFF_GRID:
        raise DataError(
            f"intensities are not of {num_values} values in equal steps: one is {worst:.3g} of a step off; give their "
            "number, 256 for 8 bits, and load them with threshold=None"
        )


def _classes(data: xr.Dataset, rows: NDArray[np.bool_], num_classes: int | None) -> tuple[list[str], NDArray[np.int64]]:
    """Names of the classes, and their place for every image."""
    if "label" not in data:
        raise DataError("the images have no labels; load them with their classes, or give labels to make_images")
    labels = data["label"].values
    if labels.dtype.kind == "f" and not (labels == np.round(labels)).all():
        strange = labels[labels != np.round(labels)][0]
        raise DataError(
            f"label {strange} is no class; give whole numbers or texts, and leave out images of unknown class"
        )
    if labels.dtype.kind in "iuf" and (labels < 0).any():
        raise DataError(f"label {labels.min()} is below 0: leave out images of unknown class")
    if labels.dtype.kind == "f":
        labels = labels.astype(np.int64)
    known = np.unique(labels[rows])
    if num_classes is not None:
        if labels.dtype.kind not in "iu":
            raise DataError(f"num_classes={num_classes} is not used with labels that are no numbers; leave it out")
        if labels.max() >= num_classes:
            raise DataError(
                f"label {labels.max()} is out of range: num_classes={num_classes} has 0 to {num_classes - 1}"
            )
        if rows.sum() < num_classes:
            raise DataError(f"{rows.sum()} training images for {num_classes} classes; give one or more of each")
        known = np.arange(num_classes)
    lacking = np.setdiff1d(np.union1d(known, labels), labels[rows])
    if len(lacking):
        raise DataError(f"class {lacking[0]!s} has no training image; add some, or leave out its images")
    classes = [str(name) for name in known]
    if len(classes) < 2:
        raise DataError("the training images are of fewer than two classes; a conditional model needs two or more")
    if "all" in classes:
        raise DataError("a class is called 'all', as reports call all classes together; rename it")
    return classes, np.searchsorted(known, labels).astype(np.int64)


def tiny() -> Problem:
    """Twelve images of 2 x 3 pixels in two classes, for the conformance tests."""
    rng = np.random.default_rng(0)
    data = make_images(rng.integers(2, size=(16, 2, 3)), np.arange(16) % 2, split=np.repeat(["train", "test"], [12, 4]))
    return make_problem(data, num_latents=2, hidden=4, guide_hidden=4)
