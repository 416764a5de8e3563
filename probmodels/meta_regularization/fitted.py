"""Generators that were fitted: conditional autoencoders and diffusion models, from their results.

An autoencoder gives the mean of its likelihood, or the middle of the logistic number that is rounded. A diffusion model
takes latents for its noise and runs a few steps of the deterministic sampler (Song et al. 2021), whose images are
differentiable in the noise.

References
----------
Song, J., Meng, C. and Ermon, S. (2021). Denoising diffusion implicit models. ICLR. https://arxiv.org/abs/2010.02502
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from probmodels.conditional_vae import sampling
from probmodels.datasets.checks import AnyPath
from probmodels.diffusion import fitted as diffusion
from probmodels.diffusion.model import Diffusion
from probmodels.errors import DataError, ProbmodelsError
from probmodels.inference.metrics.copies import near_copies
from probmodels.inference.problem import Problem
from probmodels.inference.result import Result
from probmodels.meta_regularization.generators import Generator

__all__ = ["FittedGenerator", "fitted_generator", "seen"]

_STEPS = 8  # of the deterministic sampler
_LEVEL = 1 / 255 + 1e-6  # difference of intensities that are the same: a grey level


@dataclass(frozen=True)
class FittedGenerator:
    """A generator with what is known of it.

    Attributes
    ----------
    generator
        From latents and positions of classes to images.
    num_latents
        Length of its latents.
    images
        Intensities (image, row, column) that it was fitted to.
    """

    generator: Generator
    num_latents: int
    images: NDArray[np.float64]


def fitted_generator(source: Result | AnyPath, classes: NDArray[Any], shape: tuple[int, ...]) -> FittedGenerator:
    """The generator of a result.

    Parameters
    ----------
    source
        Result of ``"conditional_vae"`` or of ``"diffusion"`` with ``conditional=True``, or its folder.
    classes
        Classes of the images to make, in the order of their positions.
    shape
        Rows and columns of the images.

    Raises
    ------
    DataError
        If there is no such result, or it is of other classes or images.
    """
    try:
        result = source if isinstance(source, Result) else Result.load(Path(source))
        method = str(result.tree.attrs.get("method"))
        if method not in _READERS:
            raise DataError(f"the result is of {method!r}; give one of {' or '.join(map(repr, _READERS))}")
        module, make = _READERS[method]
        problem = module.fitted_problem(result)
        names = module.classes_of(problem)
    except ProbmodelsError as error:
        where = "" if isinstance(source, Result) else f"={str(source)!r}"
        raise DataError(f"generator{where}: {error}") from error
    if not names:
        raise DataError("generator: the diffusion model knows no classes; fit one with conditional=True")
    wanted = [str(int(name)) if isinstance(name, float | np.floating) else str(name) for name in classes]
    strange = [name for name in wanted if name not in names]
    if strange:
        raise DataError(f"generator knows no class {strange[0]!r}; it was fitted to {', '.join(names)}")
    model: Any = problem.model
    if tuple(model.shape) != shape:
        raise DataError(f"generator makes images of {model.shape[0]} x {model.shape[1]}; the data are of {shape}")
    return make(problem, model, torch.tensor([names.index(name) for name in wanted]))


def seen(images: NDArray[np.float64], fitted: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which images (image,) are among those that a generator was fitted to, within a grey level.

    Where it was fitted to black and white, intensities are compared by which side of a half they are on.
    """
    asked_for = (images >= 0.5) if np.isin(fitted, (0.0, 1.0)).all() else images
    return near_copies(np.asarray(asked_for, np.float64), fitted, _LEVEL)


def _decoder(problem: Problem, model: Any, place: Tensor) -> FittedGenerator:
    def generate(z: Tensor, label: Tensor) -> Tensor:
        return model.image(z.to(_like(model)), place.to(label.device)[label]).to(z)

    assert problem.data is not None
    return FittedGenerator(generate, model.num_latents, problem.data["image"].values.astype(np.float64))


def _sampler(problem: Problem, model: Diffusion, place: Tensor) -> FittedGenerator:
    times = model.schedule.levels(_STEPS).tolist()

    def generate(noise: Tensor, label: Tensor) -> Tensor:
        z = noise.to(_like(model)).reshape(-1, *model.shape)
        shown = model.indicators(place.to(label.device)[label], z)
        clean = z
        for t, s in itertools.pairwise([*times, None]):
            gamma = model.schedule.gamma(z.new_tensor(t))
            clean = model.predict(z, gamma.expand(len(z)), shown, "x0")
            if s is not None:
                later = model.schedule.gamma(z.new_tensor(s))
                error = (z - torch.sigmoid(-gamma).sqrt() * clean) / torch.sigmoid(gamma).sqrt()
                z = torch.sigmoid(-later).sqrt() * clean + torch.sigmoid(later).sqrt() * error
        return _intensities(model, clean).clamp(0, 1).to(noise)

    assert problem.data is not None
    stored = problem.data["observation"].values.astype(np.float64)
    scale = model.num_values
    images = (stored + 1) / 2 if scale is None else stored / (scale - 1)
    return FittedGenerator(generate, math.prod(model.shape), images)


def _intensities(model: Diffusion, x: Tensor) -> Tensor:
    """Intensities of points as the model sees them, without rounding."""
    if model.num_values is None:
        return (x + 1) / 2
    return ((x + 1) * model.num_values / 2 - 0.5) / (model.num_values - 1)


def _like(model: Any) -> Tensor:
    parameter: Tensor = next(model.parameters())
    return parameter


_READERS: dict[str, tuple[Any, Any]] = {"conditional_vae": (sampling, _decoder), "diffusion": (diffusion, _sampler)}
