"""Baselines of diffusion on images of few values, and a classifier that judges new images.

Mixtures of products of categoricals, by EM; an autoencoder with Gaussian latents; classifiers of images and of noised
images. Import `common` first.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
import xarray as xr
from numpy.typing import NDArray
from pyro.nn import PyroModule
from scipy import sparse
from scipy.special import logsumexp
from torch import Tensor, nn

from probmodels import Problem
from probmodels.inference.runtime.ops import isolated

Array = NDArray[np.floating[Any]]


def counted(images: xr.Dataset, split: str, num_values: int) -> NDArray[np.intp]:
    """Values (row, pixel) from 0 of the images of a split."""
    pixels = images["image"].values[images["split"].values == split]
    return np.rint(pixels * (num_values - 1)).astype(int).reshape(len(pixels), -1)


# -- mixtures of products of categoricals -----------------------------------------------------------------------------


def one_hot(x: NDArray[np.intp], num_values: int) -> sparse.csr_matrix:
    """Indicators (row, pixel * value) of values (row, pixel)."""
    rows, pixels = x.shape
    place = x + num_values * np.arange(pixels)
    ends = np.arange(0, x.size + 1, pixels)
    return sparse.csr_matrix((np.ones(x.size, np.float32), place.ravel(), ends), (rows, pixels * num_values))


def mixture_of_products(
    x: NDArray[np.intp], num_components: int, num_values: int, pseudo: float, seed: int, num_rounds: int = 100
) -> tuple[Array, Array]:
    """Log weights (component,) and log probabilities (component, pixel * value) by EM."""
    rng = np.random.default_rng(seed)
    data = one_hot(x, num_values)
    share = rng.dirichlet(np.ones(num_components), len(x))
    for _ in range(num_rounds if num_components > 1 else 1):
        counts = (data.T @ share).T.reshape(num_components, -1, num_values) + pseudo
        log_p = np.log(counts / counts.sum(-1, keepdims=True)).reshape(num_components, -1)
        log_w = np.log((share.sum(0) + pseudo) / (len(x) + pseudo * num_components))
        joint = log_w + data @ log_p.T
        share = np.exp(joint - logsumexp(joint, axis=1, keepdims=True))
    return log_w, log_p


def mixture_score(x: NDArray[np.intp], log_w: Array, log_p: Array) -> float:
    """Mean log likelihood in nats."""
    joint = log_w + one_hot(x, log_p.shape[1] // x.shape[1]) @ log_p.T
    return float(logsumexp(joint, axis=1).mean())


# -- an autoencoder ---------------------------------------------------------------------------------------------------


class GaussianVAE(PyroModule):
    """Normal latents, and values of pixels given them: a categorical distribution for each.

    Parameters
    ----------
    num_latents
        Number of latents of an image.
    num_values
        Number of values of pixels.
    hidden
        Channels of the convolutions at a quarter of 8 x 8.
    dropout
        Share of channels that are left out while fitting.
    """

    def __init__(self, num_latents: int, num_values: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.num_latents, self.num_values = num_latents, num_values
        act, drop = nn.SiLU(), nn.Dropout(dropout)
        self.decoder = nn.Sequential(
            nn.Linear(num_latents, 16 * hidden),
            nn.Unflatten(1, (hidden, 4, 4)),
            *(act, drop, nn.Conv2d(hidden, hidden, 3, padding=1), act, drop),
            nn.Upsample(scale_factor=2),
            *(nn.Conv2d(hidden, hidden // 2, 3, padding=1), act, drop),
            nn.Conv2d(hidden // 2, num_values, 3, padding=1),
        )
        self.encoder = nn.Sequential(
            *(nn.Conv2d(1, hidden // 2, 3, padding=1), act, drop),
            *(nn.Conv2d(hidden // 2, hidden, 3, stride=2, padding=1), act, drop),
            nn.Flatten(),
            nn.Linear(16 * hidden, 2 * num_latents),
        )

    def forward(self, values: Tensor) -> None:
        """Sites ``code`` (data, latent) and ``observation`` (data, row, column) of values from 0."""
        with pyro.plate("data", len(values)) as rows:
            unit = dist.Normal(values.new_zeros(self.num_latents), 1.0).to_event(1)
            code = pyro.sample("code", unit, infer={"event_dims": ["latent"]})
            pixels = dist.Categorical(logits=self.decoder(code).movedim(1, -1)).to_event(2)
            pyro.sample("observation", pixels, obs=values[rows], infer={"event_dims": ["row", "column"]})


class GaussianEncoder(PyroModule):
    """Independent normals whose means and scales a network makes of the image."""

    def __init__(self, network: nn.Module, num_values: int) -> None:
        super().__init__()
        self.network, self.num_values = network, num_values

    def forward(self, values: Tensor) -> None:
        """Site ``code`` (data, latent)."""
        with pyro.plate("data", len(values)) as rows:
            x = (2 * values[rows] + 1) / self.num_values - 1
            mean, scale = self.network(x.unsqueeze(1)).chunk(2, -1)
            normal = dist.Normal(mean, F.softplus(scale) + 1e-4).to_event(1)
            pyro.sample("code", normal, infer={"event_dims": ["latent"]})


def make_vae(images: xr.Dataset, split: str, num_values: int, *, seed: int = 0, **sizes: Any) -> Problem:
    """An autoencoder of the images of a split."""
    with isolated(seed):
        model = GaussianVAE(num_values=num_values, **sizes)
    guide = GaussianEncoder(model.encoder, num_values)
    del model.encoder
    rows = np.flatnonzero(images["split"].values == split)
    x = counted(images, split, num_values).reshape(len(rows), *images["image"].shape[1:])
    values = torch.as_tensor(x, dtype=torch.get_default_dtype())
    coords = {"data": list(images["data"].values[rows])}
    return Problem(
        "vae", model, guide, args=(values,), coords=coords, batch_plates=("data",), loss="TraceMeanField_ELBO"
    )
