"""What is written of a fitted conditional autoencoder: new images, fidelity, evidence, figures."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import xarray as xr

from probmodels.conditional_vae.sampling import (
    classes_of,
    fitted_problem,
    image_evidence,
    image_fidelity,
    latent_information,
    reconstructions,
    sample_images,
)
from probmodels.errors import ResultError
from probmodels.inference.metrics.fidelity import fidelity_table
from probmodels.inference.result import Result
from probmodels.options import checked
from probmodels.outputs import Dpi, Outputs, loss_figure, write_all

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["write_outputs"]

_EACH, _SHOWN, _CLASSES = 50, 6, 10  # new images of a class in the file, of a class in figures, and classes there


@checked(ResultError)
def write_outputs(result: Result, folder: str | Path, *, dpi: Dpi = 110) -> Outputs:
    """Write ``samples.nc``, ``fidelity.csv``, ``latents.csv``, ``summary.txt`` and ``figures/*.png``.

    The figures: ``samples``, new images by class, each beside the training image that is nearest to it;
    ``reconstructions``, held-out images and what they are decoded to; ``loss``.

    Parameters
    ----------
    result
        Result of `fit_svi`.
    folder
        Where to; made where it is missing, files of the same names are replaced.
    dpi
        Resolution of the figures.

    Raises
    ------
    ResultError
        If the result is not one of a conditional autoencoder.
    """
    problem = fitted_problem(result)
    assert problem.data is not None
    drawn, lines = sample_images(result, _EACH), [_evidence_line(result, False)]
    tables: dict[str, pd.DataFrame] = {}
    if problem.data.sizes.get("held_out", 0) > 1:
        lines.append(_evidence_line(result, True))
        report = image_fidelity(result)
        tables["fidelity"] = report.to_dataframe()
        lines += ["", "New images against training and held-out ones (95 % intervals):"]
        lines += fidelity_table(report).to_string().splitlines()
    try:
        information = latent_information(result)
    except ResultError:
        pass
    else:
        tables["latents"] = information.to_dataframe()
        told = ", ".join(f"{value:.2f}" for value in np.sort(information.values)[::-1])
        lines += ["", f"Information of latents, nats: {told}."]
    return write_all(
        result,
        folder,
        table="\n".join(lines),
        tables=tables,
        figures=_figures(result, drawn, problem.data, classes_of(problem)) | loss_figure(result),
        files={"samples.nc": lambda file: drawn.to_netcdf(file)},
        dpi=dpi,
    )


def _evidence_line(result: Result, held_out: bool) -> str:
    name = "held-out" if held_out else "fitted"
    try:
        found = image_evidence(result, held_out=held_out)
    except ResultError:
        return f"Log likelihood of {name} images: not estimated, the guide is not the method's own."
    values, elbo = found["log_evidence"].values, float(found["elbo"].mean())
    mean = f"{values.mean():.2f} ± {values.std() / math.sqrt(len(values)):.2f}"
    return (
        f"Log likelihood of {name} images: at least {mean} nats each by importance weights (ELBO {elbo:.2f}), "
        f"{len(values):,} images."
    )


def _figures(result: Result, drawn: xr.Dataset, data: xr.Dataset, classes: list[str]) -> dict[str, Figure]:
    from probmodels import plots

    labels = drawn["label"].values.astype(np.str_)
    known = torch.as_tensor(data["image"].values.astype(np.float64)).flatten(1)
    rows = []
    for name in classes[:_CLASSES]:
        images = drawn["image"].values[labels == name][:_SHOWN]
        nearest = torch.cdist(torch.as_tensor(images).flatten(1), known).argmin(1).numpy()
        rows.append(np.stack([images, data["image"].values[nearest]], 1).reshape(-1, *images.shape[1:]))
    figures = {
        "samples": plots.image_grid(
            np.stack(rows), "new images by class, each with the training image nearest to it at its right"
        )
    }
    try:
        pair = reconstructions(result, 2 * _SHOWN)
    except ResultError:
        return figures
    return figures | {"reconstructions": plots.image_grid(np.stack(pair), "images, and what they are decoded to")}
