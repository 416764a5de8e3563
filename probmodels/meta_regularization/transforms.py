"""Random changes of images that keep their class: mirroring, affine maps and erased squares, in torch alone.

Drawing and applying are two steps, so that one draw can be applied again. All random numbers come from one generator:
with the generator at the same state, the same change is drawn, as the passes of a finite difference need.

References
----------
Cubuk, E. D., Zoph, B., Shlens, J. and Le, Q. V. (2020). RandAugment. https://arxiv.org/abs/1909.13719
Zhong, Z., Zheng, L., Kang, G., Li, S. and Yang, Y. (2020). Random erasing data augmentation. AAAI.
https://arxiv.org/abs/1708.04896
"""

from __future__ import annotations

import math
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
from annotated_types import Interval
from torch import Generator, Tensor

from probmodels.errors import DataError
from probmodels.options import Probability, checked

__all__ = ["Angle", "Drawn", "Share", "Transform", "Zoom"]

Angle = Annotated[float, Interval(ge=0, le=180)]  # in degrees
Share = Annotated[float, Interval(ge=0, le=1)]  # of the side of an image
Zoom = Annotated[float, Interval(ge=0, le=0.9)]


class Drawn(NamedTuple):
    """Changes of some images.

    Attributes
    ----------
    theta
        Affine maps (image, 2, 3) from places in the new image to places in the old one, both in [-1, 1].
    kept
        1 where a pixel stays and 0 where it is erased (image, 1, row, column).
    """

    theta: Tensor
    kept: Tensor


class Transform:
    """Distribution of changes; every strength of 0 turns its part off.

    Parameters
    ----------
    flip
        Probability that an image is mirrored, left to right.
    degrees
        Most that an image is turned to either side, in degrees.
    shift
        Most that it is moved along either axis, as a share of its side.
    zoom
        Most that its size changes, as a share: factors lie between 1 - zoom and 1 + zoom.
    erase
        Side of the square that is set to 0 at a random place, as a share of the side of the image.

    Raises
    ------
    DataError
        If a strength is out of range, or all are 0.
    """

    @checked(DataError)
    def __init__(
        self,
        *,
        flip: Probability = 0.0,
        degrees: Angle = 15.0,
        shift: Share = 0.1,
        zoom: Zoom = 0.1,
        erase: Share = 0.25,
    ) -> None:
        self.flip, self.degrees, self.shift, self.zoom, self.erase = flip, degrees, shift, zoom, erase
        if not any((flip, degrees, shift, zoom, erase)):
            raise DataError("all strengths of the transformation are 0, so that it changes nothing; raise one of them")

    def check(self, rows: int, columns: int) -> None:
        """Check that images of some size can be changed.

        Raises
        ------
        DataError
            If squares are to be erased and nothing else, and these have no pixel.
        """
        moved = self.flip or self.degrees or self.shift or self.zoom
        if not moved and not (round(self.erase * rows) and round(self.erase * columns)):
            raise DataError(
                f"erase={self.erase:g} is less than a pixel of images of {rows} x {columns}, so that nothing "
                "changes; raise it, or another strength"
            )

    def draw(self, images: Tensor, generator: Generator | None = None) -> Drawn:
        """Changes of images (image, channel, row, column).

        Parameters
        ----------
        images
            For their number, size, type and device.
        generator
            Source of the random numbers; None for that of torch.
        """
        count, _, rows, columns = images.shape
        like: Any = {"dtype": images.dtype, "device": images.device}
        # The number of values drawn depends on nothing but the number of images.
        unit = torch.rand(count, 7, generator=generator, device=None if generator is None else generator.device)
        mirrored, *rest, top, left = unit.to(**like).unbind(1)
        angle, size, down, across = (2 * value - 1 for value in rest)
        sign = 1 - 2 * (mirrored < self.flip).to(images)
        angle, size = angle * math.radians(self.degrees), 1 + self.zoom * size
        cos, sin, ratio = angle.cos() / size, angle.sin() / size, rows / columns
        # Sides have length 2 in the coordinates of grid_sample; the ratio keeps a rotation one where they differ.
        first = torch.stack([sign * cos, -sin * ratio, 2 * self.shift * across], -1)
        second = torch.stack([sign * sin / ratio, cos, 2 * self.shift * down], -1)
        kept = torch.ones(count, 1, rows, columns, **like)
        high, wide = round(self.erase * rows), round(self.erase * columns)
        if high and wide:
            outside = [
                (place < start.unsqueeze(1)) | (place >= start.unsqueeze(1) + length)
                for place, start, length in (
                    (torch.arange(rows, **like), (top * (rows - high + 1)).floor(), high),
                    (torch.arange(columns, **like), (left * (columns - wide + 1)).floor(), wide),
                )
            ]
            kept = (outside[0][:, :, None] | outside[1][:, None, :]).unsqueeze(1).to(images)
        return Drawn(torch.stack([first, second], 1), kept)

    def apply(self, images: Tensor, drawn: Drawn) -> Tensor:
        """Changed images, differentiable; what comes from outside of an image is 0."""
        if self.flip or self.degrees or self.shift or self.zoom:
            rows, columns = (
                (2 * torch.arange(side, dtype=images.dtype, device=images.device) + 1) / side - 1
                for side in images.shape[-2:]
            )
            down, across = torch.meshgrid(rows, columns, indexing="ij")
            places = torch.stack([across, down, torch.ones_like(down)], -1)  # (row, column, 3)
            grid = torch.einsum("ijk,nlk->nijl", places, drawn.theta)
            images = F.grid_sample(images, grid, padding_mode="zeros", align_corners=False)
        return images * drawn.kept

    def __call__(self, images: Tensor, generator: Generator | None = None) -> Tensor:
        """Changed images (image, channel, row, column), each changed in its own way."""
        return self.apply(images, self.draw(images, generator))
