"""What is written of a fit with meta generative regularisation: class probabilities, chosen images, their changes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor

from probmodels.edges.checks import class_probabilities, column
from probmodels.errors import ResultError
from probmodels.inference.programs.programs import fitted
from probmodels.inference.result import Result
from probmodels.inference.runtime.ops import isolated
from probmodels.meta_regularization.checks import expected_calibration_error, positions
from probmodels.options import Seed, checked
from probmodels.outputs import Dpi, Outputs, loss_figure, write_all

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["chosen_images", "write_outputs"]

_SHOWN, _CLASSES = 6, 10  # images of a class in figures, and classes there
_MOMENTS = 2000  # latents whose moments are written


@checked(ResultError)
def chosen_images(result: Result, *, seed: Seed = 0) -> xr.Dataset:
    """Images that the finder chooses before its first step and after its last, from the same noise, and their changes.

    Parameters
    ----------
    result
        Result of `make_problem` and `fit_bilevel`.
    seed
        Seed of noise and changes.

    Returns
    -------
    xr.Dataset
        By ``class`` and ``image``, 6 of each class: ``early`` and ``late`` (class, image, row, column), and
        ``changed``, the late ones after a random change. ``early_latent`` and ``late_latent`` (draw, latent) are 2000
        latents of either.

    Raises
    ------
    ResultError
        If the result is of another method, or its generator is a function that no file holds.
    """
    problem, finder = _finders(result)
    model: Any = problem.model
    classes = problem.coords["class"]
    label = torch.arange(len(classes)).repeat_interleave(_SHOWN)
    like = problem.args[0]
    with isolated(seed), torch.no_grad():
        noise = torch.randn(_MOMENTS + len(label), model.size).to(like)
        latents = {when: one(noise)[0] for when, one in finder.items()}
        pictures = {when: model.generator(z[_MOMENTS:], label.to(like.device)) for when, z in latents.items()}
        pictures["changed"] = model.transform(pictures["late"])

    def arranged(images: Tensor) -> NDArray[np.float64]:
        return images.double().cpu().numpy().reshape(len(classes), _SHOWN, *images.shape[-2:])

    found = {when: (("class", "image", "row", "column"), arranged(images)) for when, images in pictures.items()}
    drawn = {f"{when}_latent": (("draw", "latent"), z[:_MOMENTS].double().cpu().numpy()) for when, z in latents.items()}
    return xr.Dataset({**found, **drawn}, {"class": list(classes)})


@checked(ResultError)
def write_outputs(result: Result, folder: str | Path, *, dpi: Dpi = 110) -> Outputs:
    """Write ``classes.csv``, ``latents.csv``, ``summary.txt`` and ``figures/*.png``.

    ``classes.csv`` has the class probabilities of all images, ``latents.csv`` mean and sd of each latent that the
    finder chooses, before its first step and after its last. The figures: ``chosen``, images of either by class, from
    the same noise; ``changes``, the late ones, each beside its changed form; ``loss``. Of a generator that is a
    function, which no file holds, there are neither latents nor images.

    Parameters
    ----------
    result
        Result of `fit_bilevel`.
    folder
        Where to; made where it is missing, files of the same names are replaced.
    dpi
        Resolution of the figures.

    Raises
    ------
    ResultError
        If the result is of another method.
    """
    _check_method(result)
    probability, role = class_probabilities(result.tree), column(result.tree, "role").astype(str)
    label = positions(result)
    lines = ["Class probabilities (log loss in nats, expected calibration error in ten bins):"]
    for name in ("train", "validation", "test"):
        own = role == name
        if own.any():
            right = (probability[own].argmax(1) == label[own]).mean()
            loss = -np.log(np.maximum(probability[own, label[own]], 1e-300)).mean()
            error = expected_calibration_error(probability[own], label[own])
            lines.append(f"  {name}: {own.sum():,} images, {right:.1%} right, log loss {loss:.3f}, error {error:.3f}")
    columns = {f"p_{place}": probability[:, place] for place in range(probability.shape[1])}
    tables = {"classes": pd.DataFrame({"role": role, "class": label, **columns})}
    figures = loss_figure(result)
    try:
        chosen = chosen_images(result)
    except ResultError as error:
        lines += ["", f"Images that the finder chooses are not shown: {error}"]
    else:
        tables["latents"] = _moments(chosen)
        figures = _figures(chosen) | figures
    return write_all(result, folder, table="\n".join(lines), tables=tables, figures=figures, dpi=dpi)


def _finders(result: Result) -> tuple[Any, dict[str, Any]]:
    """The problem, and the finder as it starts and as it was fitted."""
    _check_method(result)
    problem = result.rebuild()
    guide: Any = problem.guide
    early = copy.deepcopy(guide.finder)
    late = copy.deepcopy(early)
    with fitted(problem, result.guide_state or {}, seed=0) as (_, found):
        learned: Any = found
        late.load_state_dict(learned.finder.state_dict())
    return problem, {"early": early, "late": late}


def _check_method(result: Result) -> None:
    if result.tree.attrs.get("method") != "meta_regularization":
        raise ResultError("the result is not one of probmodels.meta_regularization.make_problem")


def _moments(chosen: xr.Dataset) -> pd.DataFrame:
    found = {
        f"{when}_{name}": getattr(chosen[f"{when}_latent"], how)("draw").values
        for when in ("early", "late")
        for name, how in (("mean", "mean"), ("sd", "std"))
    }
    return pd.DataFrame(found, pd.Index(range(chosen.sizes["latent"]), name="latent"))


def _figures(chosen: xr.Dataset) -> dict[str, Figure]:
    from probmodels import plots

    shown = chosen.isel({"class": slice(_CLASSES)})

    def beside(one: str, other: str) -> NDArray[np.float64]:
        return np.stack([shown[one].values, shown[other].values], 2).reshape(
            shown.sizes["class"], -1, shown.sizes["row"], shown.sizes["column"]
        )

    return {
        "chosen": plots.image_grid(
            beside("early", "late"), "images by class from the finder's first latents, each with that from its last"
        ),
        "changes": plots.image_grid(beside("late", "changed"), "generated images, each with its changed form"),
    }
