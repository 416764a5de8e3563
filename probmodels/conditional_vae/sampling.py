"""What a fitted conditional autoencoder makes, and how good it is: new images, their fidelity, evidence, latents."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor

from probmodels.conditional_vae.model import ConditionalVAE
from probmodels.datasets.images import make_images
from probmodels.errors import ResultError
from probmodels.guides.conditional_vae import ConditionalEncoder
from probmodels.inference.diagnostics.evidence import check_weights
from probmodels.inference.metrics.fidelity import fidelity
from probmodels.inference.problem import Problem
from probmodels.inference.programs.programs import fitted
from probmodels.inference.result import Result
from probmodels.inference.runtime.ops import isolated
from probmodels.options import Draws, Seed, checked

__all__ = [
    "class_agreement",
    "class_names",
    "classes_of",
    "decoder_of",
    "fitted_problem",
    "image_evidence",
    "image_fidelity",
    "latent_information",
    "moments",
    "reconstructions",
    "sample_images",
    "some_rows",
]

_BLOCK = 1000  # images that are decoded at a time
_JUDGED = 1000  # images that are judged
_FEWEST = 2  # images of a class that are drawn to be judged
_DRAWS = 200  # of the guide for the evidence of an image


@checked(ResultError)
def sample_images(
    result: Result, num_samples: Draws, *, label: str | int | None = None, pixels: bool = True, seed: Seed = 0
) -> xr.Dataset:
    """New images of a class, or of each.

    Parameters
    ----------
    result
        Result of `make_problem` and `fit_svi`.
    num_samples
        Number of images, of each class where no label is given.
    label
        Class, as the data name it; None for all classes, one after the other.
    pixels
        Whether pixels are drawn from the likelihood; False for their means, which are smoother than images are.
    seed
        Seed of latents and pixels.

    Returns
    -------
    xr.Dataset
        ``image`` (data, row, column) in [0, 1], beyond which draws of ``"normal"`` are cut off; ``label`` and
        ``split`` (data,), as of `probmodels.datasets.images.make_images`.

    Raises
    ------
    ResultError
        If the result is not one of a conditional autoencoder, or the model knows no such class.
    """
    problem = fitted_problem(result)
    classes = classes_of(problem)
    if label is not None and str(label) not in classes:
        raise ResultError(f"label={label!r} is no class of the model; it knows {', '.join(classes)}")
    wanted = range(len(classes)) if label is None else [classes.index(str(label))]
    return _drawn(problem, np.repeat(list(wanted), num_samples), pixels, seed)


@checked(ResultError)
def image_fidelity(result: Result, *, num_permutations: Draws = 999, seed: Seed = 0) -> xr.Dataset:
    """Fidelity of new images, as many of each class as were held out, against training and held-out images.

    Parameters
    ----------
    result
        Result of a problem some of whose images were held out.
    num_permutations
        As of `probmodels.inference.fidelity`.
    seed
        Seed of images, permutations and classifiers.

    Returns
    -------
    xr.Dataset
        As `probmodels.inference.fidelity` returns it.

    Raises
    ------
    ResultError
        If the result is not one of a conditional autoencoder, or fewer than two images were held out.
    """
    problem = fitted_problem(result)
    data = problem.data
    assert data is not None
    if data.sizes.get("held_out", 0) < _FEWEST:
        raise ResultError("fewer than two images were held out to judge by; mark more with split='test'")
    held_out = data.isel(held_out=some_rows(data.sizes["held_out"]))
    classes = classes_of(problem)
    names = class_names(held_out["held_out_label"].values)
    counts = [max(int((names == name).sum()), _FEWEST) for name in classes]
    drawn = _drawn(problem, np.repeat(np.arange(len(classes)), counts), True, seed)
    return fidelity(
        drawn["image"].values,
        data["image"].values,
        held_out["held_out_image"].values,
        synthetic_label=class_names(drawn["label"].values),
        train_label=class_names(data["label"].values),
        held_out_label=names,
        num_permutations=num_permutations,
        seed=seed,
    )


@checked(ResultError)
def image_evidence(result: Result, *, held_out: bool = True, seed: Seed = 0) -> xr.Dataset:
    """Log likelihood of images given their classes, from 200 draws of the guide by importance weights.

    Parameters
    ----------
    result
        Result of a conditional autoencoder.
    held_out
        Whether of images that were held out; False for fitted ones. Of either, 1000 at most.
    seed
        Seed of the draws.

    Returns
    -------
    xr.Dataset
        By image, as `probmodels.inference.check_weights` returns it: ``log_evidence``, whose expectation is a lower
        bound of the log likelihood in nats; ``elbo``, ``mcse``, ``ess`` and ``khat``.

    Raises
    ------
    ResultError
        If the result is not one of a conditional autoencoder, or its parameters do not fit.
    """
    fitted_problem(result)
    return check_weights(_images_of(result.rebuild(), held_out), result, num_draws=_DRAWS, seed=seed)


def class_agreement(result: Result) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Whether the nearest training image is of the same class, for new images and for held-out ones.

    New images are as many of each class as there are among the held-out ones, 1000 at most.
    """
    problem = fitted_problem(result)
    (known, of_known), (held_out, place) = (_images_of(problem, held_out).args for held_out in (False, True))
    drawn = torch.as_tensor(_drawn(problem, place.cpu().numpy(), True, 1)["image"].values).to(known)
    new, old = (
        (of_known[torch.cdist(images.flatten(1), known.flatten(1)).argmin(1)] == place).cpu().numpy()
        for images in (drawn, held_out.to(known))
    )
    return new, old


@checked(ResultError)
def latent_information(result: Result) -> xr.DataArray:
    """KL divergence (latent,) of each latent's marginal guide from its prior, in nats, on average over fitted images.

    A latent without any tells nothing of the image.

    Raises
    ------
    ResultError
        If the guide is not the method's own.
    """
    mean, sd = moments(result, *result.rebuild().args)
    found = (0.5 * (mean**2 + sd**2 - 1) - sd.log()).double().mean(0).cpu().numpy()
    return xr.DataArray(found, {"latent": np.arange(len(found))}, ("latent",), name="information")


def reconstructions(result: Result, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Held-out images, and the means that they are decoded to (image, row, column)."""
    problem = fitted_problem(result)
    image, label = (value[:count] for value in _images_of(problem, True).args)
    mean, _ = moments(result, image, label)
    with torch.no_grad():
        decoded = decoder_of(problem).likelihood(mean, label).mean
    return image.double().numpy(), decoded.clamp(0, 1).double().cpu().numpy()


def fitted_problem(result: Result) -> Problem:
    """The problem of a result, with the fitted parameters in its model.

    Raises
    ------
    ResultError
        If the result is not one of a conditional autoencoder.
    """
    if result.tree.attrs.get("method") != "conditional_vae":
        raise ResultError("the result is not one of probmodels.conditional_vae.make_problem")
    problem = result.rebuild()
    model = decoder_of(problem)
    state = {name.replace("$$$", "."): value for name, value in result.params().items()}
    if not state:
        raise ResultError("the result has no fitted parameters; load it from the folder that Result.save wrote")
    model.to(next(iter(state.values()))).load_state_dict({name: state[name] for name in model.state_dict()})
    model.requires_grad_(False).eval()
    return problem


def classes_of(problem: Problem) -> list[str]:
    """Names of the classes, in the order of their places."""
    assert problem.data is not None
    found: list[str] = json.loads(problem.data.attrs["classes"])
    return found


def decoder_of(problem: Problem) -> ConditionalVAE:
    """The model of a problem."""
    model: Any = problem.model
    return cast(ConditionalVAE, model)


def _drawn(problem: Problem, place: np.ndarray, pixels: bool, seed: int) -> xr.Dataset:
    """Images of classes by place."""
    model, parts = decoder_of(problem), []
    like = next(model.decoder.parameters())
    with isolated(seed), torch.no_grad():
        for label in torch.as_tensor(place).split(_BLOCK):
            z = torch.randn(len(label), model.num_latents).to(like)
            found = model.likelihood(z, label.to(like.device))
            image = found.sample() if pixels else found.mean
            parts.append(image.clamp(0, 1).double().cpu().numpy())
    assert problem.data is not None
    labels = np.unique(problem.data["label"].values)[place]  # as the data have them: every class has training images
    drawn = make_images(np.concatenate(parts), labels, threshold=None, name="synthetic")
    return drawn.assign_attrs(source="probmodels.conditional_vae")


def class_names(labels: NDArray[Any]) -> NDArray[np.str_]:
    """Labels as the classes are called."""
    return (labels.astype(np.int64) if labels.dtype.kind == "f" else labels).astype(np.str_)


def some_rows(count: int) -> NDArray[np.int64]:
    """Places of 1000 rows at most, spread over all."""
    return np.unique(np.linspace(0, count - 1, min(count, _JUDGED)).astype(np.int64))


def _images_of(problem: Problem, held_out: bool) -> Problem:
    """The problem of images that were held out, or of the fitted ones, 1000 at most."""
    data = problem.data
    assert data is not None
    image, label = (data[("held_out_" if held_out else "") + name].values for name in ("image", "label"))
    rows = some_rows(len(image))
    place = {name: i for i, name in enumerate(classes_of(problem))}
    places = torch.tensor([place[str(name)] for name in class_names(label[rows])])
    args = (torch.as_tensor(image[rows]).to(problem.args[0]), places.to(problem.args[1].device))
    return replace(problem, args=args, coords={"data": rows.tolist()}, data=None)


def moments(result: Result, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Means and sds (data, latent) of the guide, of images with places of their classes.

    Raises
    ------
    ResultError
        If the guide is not the method's own.
    """
    problem = result.rebuild()
    with fitted(problem, result.guide_state or {}, seed=0) as (_, guide), torch.no_grad():
        if not isinstance(guide, ConditionalEncoder):
            raise ResultError("the guide is not the encoder of the method, which reads any image")
        mean, triangle = guide.moments(image, label)
        return mean, triangle.square().sum(-1).sqrt()
