"""Generators of images: a linear one in closed form, and functions of the user's own, checked.

The linear generator is a principal component model around the mean of every class, clipped to intensities::

    G(z, y) = clip(mean_y + z W, 0, 1)

with W the first eigenvectors of the covariance within classes, each times the root of its eigenvalue. It needs no
training, and draws with little detail.

References
----------
Tipping, M. E. and Bishop, C. M. (1999). Probabilistic principal component analysis. J. R. Stat. Soc. B 61(3).
https://doi.org/10.1111/1467-9868.00196
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from probmodels.errors import DataError
from probmodels.inference.runtime.ops import isolated

__all__ = ["Generator", "LinearGenerator", "Pictures"]

Generator = Callable[[Tensor, Tensor], Tensor]
_SLACK = 1e-4  # that intensities may lie outside of [0, 1]


class LinearGenerator:
    """Class means with principal components.

    Parameters
    ----------
    images
        Intensities (image, channel, row, column) to fit.
    label
        Position of the class (image,); every class occurs.
    num_classes
        Number of classes.
    size
        Number of components.

    Raises
    ------
    DataError
        If the images vary in fewer directions within classes.
    """

    def __init__(self, images: Tensor, label: Tensor, num_classes: int, size: int) -> None:
        flat = images.flatten(1)
        count = torch.bincount(label, minlength=num_classes).to(flat)
        total = flat.new_zeros(num_classes, flat.shape[1]).index_add(0, label, flat)
        self.mean = total / count.unsqueeze(1)
        left = flat - self.mean[label]
        values, vectors = torch.linalg.svd(left, full_matrices=False)[1:]
        rank = int((values > 1e-6 * values.max().clamp(min=1e-6)).sum())
        if size > rank:
            raise DataError(
                f"num_latents={size}, but the {len(flat)} training images vary in {rank} directions within classes; "
                f"give at most {rank}, more images, or a generator"
            )
        self.loading = values[:size, None] * vectors[:size] / max(len(flat) - num_classes, 1) ** 0.5
        self.shape = tuple(images.shape[1:])

    def __call__(self, z: Tensor, label: Tensor) -> Tensor:
        """Images (image, channel, row, column) of latents (image, latent) and classes (image,)."""
        return (self.mean[label] + z @ self.loading).clamp(0, 1).unflatten(-1, self.shape)


class Pictures:
    """A generator whose parameters stay as they are, with images as networks take them.

    It is no module, so that the parameters of a generator that is one are not fitted.

    Parameters
    ----------
    generator
        From latents (image, latent) and positions of classes (image,) to images (image, row, column),
        or (image, 1, row, column).
    shape
        Shape of an image, (channel, row, column).
    """

    def __init__(self, generator: Generator, shape: tuple[int, ...]) -> None:
        if isinstance(generator, nn.Module):
            generator = copy.deepcopy(generator).eval().requires_grad_(False)
        self.generator, self.shape = generator, shape

    def __call__(self, z: Tensor, label: Tensor) -> Tensor:
        """Images (image, channel, row, column)."""
        return self.generator(z, label).reshape(len(z), *self.shape)

    def check(self, size: int, label: Tensor, like: Tensor) -> None:
        """Run the generator once, at latents from the prior.

        Raises
        ------
        DataError
            If it fails, or its images have another shape or type, lie outside of [0, 1], or have no derivative in the
            latents.
        """
        with isolated(seed=0), torch.enable_grad():
            z = torch.randn(len(label), size, dtype=like.dtype, device=like.device).requires_grad_()
            try:
                images: Any = self.generator(z, label)
            except Exception as error:  # of anyone's function
                raise DataError(
                    f"generator fails for latents of shape {tuple(z.shape)} and classes of shape {tuple(label.shape)}: "
                    f"{type(error).__name__}: {error}; num_latents={size} has to be the length of its latents"
                ) from error
            if not isinstance(images, Tensor) or not images.is_floating_point():
                raise DataError(f"generator returns a {_kind(images)}; it has to return a tensor of intensities")
            if tuple(images.shape) not in {(len(label), *self.shape), (len(label), *self.shape[1:])}:
                raise DataError(
                    f"generator returns images of shape {tuple(images.shape)} for {len(label)} latents; expected "
                    f"{(len(label), *self.shape[1:])}"
                )
            if not ((images >= -_SLACK) & (images <= 1 + _SLACK)).all():
                low, high = images.min().item(), images.max().item()
                raise DataError(
                    f"generator returns values from {low:.3g} to {high:.3g}; intensities have to lie in [0, 1], as "
                    "those of the data do"
                )
            slope = torch.autograd.grad(images.sum(), z, allow_unused=True)[0] if images.requires_grad else None
            if slope is None or not torch.isfinite(slope).all() or not slope.any():
                raise DataError(
                    "generator has no derivative in its latents, so that no finder could learn; leave out "
                    "torch.no_grad and rounding"
                )


def _kind(value: Any) -> str:
    return f"tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
