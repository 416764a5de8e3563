"""Classifiers of noised images, whose gradients guide a diffusion model that knows no classes.

Generative model, for images n = 1..N and a noise schedule (Dhariwal and Nichol 2021, section 4)::

    time_n ~ Uniform(0, 1),  noise_n ~ Normal(0, 1)
    z_n = alpha(time_n) x_n + sigma(time_n) noise_n
    label_n ~ Categorical(network(z_n, time_n))

The guide draws times and noise as the model does, so that the bound is the mean log probability of labels over levels.
A fitted one gives ``log p(label | z, t)`` for `probmodels.scores.fields.Conditioned`.

References
----------
Dhariwal, P. and Nichol, A. (2021). Diffusion models beat GANs on image synthesis. NeurIPS.
https://arxiv.org/abs/2105.05233
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Annotated, Any

import pyro
import pyro.distributions as dist
import torch
import xarray as xr
from annotated_types import Interval, Len
from pyro.nn import PyroModule
from torch import Tensor, nn

from probmodels.diffusion.fitted import NetworkField
from probmodels.diffusion.model import NETWORKS, Diffusion, read_data
from probmodels.errors import DataError
from probmodels.guides.diffusion import Stratified, unit_normal
from probmodels.inference.problem import Problem
from probmodels.inference.programs.programs import fitted
from probmodels.inference.result import Result
from probmodels.inference.runtime.ops import isolated
from probmodels.inference.variational.losses import SampledBound
from probmodels.options import OneOf, Seed, Width, checked

__all__ = ["NoisyClassifier", "class_likelihood", "make_problem"]


class NoisyClassifier(PyroModule):
    """The model.

    Parameters
    ----------
    diffusion
        Whose images and noise it is for; nothing of it is fitted.
    network
        From points (row, *shape) and levels of noise in [0, 1] (row,) to (row, *shape, class), whose mean over a datum
        is taken for log odds.
    """

    def __init__(self, diffusion: Diffusion, network: nn.Module) -> None:
        super().__init__()
        self.network, self.shape = network, diffusion.shape
        # Inside a tuple, so that its parameters are not taken for those of the classifier.
        self._diffusion = (copy.deepcopy(diffusion).requires_grad_(False),)

    def log_odds(self, z: Tensor, gamma: Tensor) -> Tensor:
        """Log odds of classes (row, class), for points (row, *shape) at levels gamma (row,)."""
        low, width = self._diffusion[0].range
        return self.network(z, (gamma - low) / width).flatten(1, -2).mean(1)

    def forward(self, data: Tensor, label: Tensor) -> None:
        """Sites ``time`` and ``label`` (data,), ``noise`` (data, *shape); data as of `Diffusion`, classes (data,)."""
        diffusion = self._diffusion[0]
        with pyro.plate("data", len(data)) as rows:
            x = diffusion.encode(data[rows])
            time, noise = noising(x, self.shape)
            gamma = diffusion.schedule.gamma(time.expand(len(x)))
            alpha, sigma = (torch.sigmoid(sign * gamma).sqrt() for sign in (-1, 1))
            z = (alpha * x.movedim(0, -1) + sigma * noise.movedim(0, -1)).movedim(-1, 0)
            pyro.sample("label", dist.Categorical(logits=self.log_odds(z, gamma)), obs=label[rows])


def noising(x: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Sites ``time`` (data,) and ``noise`` (data, *shape), of model and guide."""
    time = pyro.sample("time", Stratified(x.new_zeros(()), x.new_ones(())))
    return time, pyro.sample("noise", unit_normal(x, shape))


class _Noising(PyroModule):
    """The guide."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, data: Tensor, label: Tensor) -> None:
        """Sites ``time`` and ``noise``."""
        with pyro.plate("data", len(data)):
            noising(data, self.shape)


@checked(DataError)
def make_problem(
    data: xr.Dataset,
    field: NetworkField,
    *,
    network: Annotated[str, OneOf(NETWORKS)] = "mlp",
    hidden: Width = 128,
    dropout: Annotated[float, Interval(ge=0, lt=1)] = 0.0,
    split: str = "train",
    seed: Seed = 0,
) -> Problem:
    """A classifier of images under the noise of a fitted diffusion model.

    Parameters
    ----------
    data
        Images with labels, as `probmodels.datasets.images` describes them.
    field
        Scores of a diffusion model of such images, as `probmodels.diffusion.fitted.make_field` makes it.
    network
        ``"mlp"`` or ``"unet"``.
    hidden, dropout
        Width of the network's layers, or channels at full resolution, and dropout rate of its units.
    split
        Split of the images to take.
    seed
        Seed of the starting values of the network.

    Returns
    -------
    Problem
        For `fit_svi`, with ``batch_size``.

    Raises
    ------
    DataError
        If the images have no labels or another shape than those of the field, or an option is out of range.
    """
    model = field.model
    kept, classes = read_data(data, split, model.num_values, True)
    table = kept["observation"]
    if table.shape[1:] != model.shape:
        raise DataError(f"images of shape {table.shape[1:]} and a field of {model.shape}; they must be the same")
    with isolated(seed):
        reader = NETWORKS[network](model.shape, hidden=hidden, dropout=dropout, num_outputs=len(classes))
    like = next(model.network.parameters())
    values, label = torch.as_tensor(table.values).to(like), torch.as_tensor(kept["label"].values)
    return Problem(
        name="noisy_classifier",
        model=NoisyClassifier(model, reader.to(like)),
        guide=_Noising(model.shape),
        args=(values, label),
        coords={str(dim): list(table[dim].values) for dim in table.dims if dim in table.coords},
        data=kept[["label"]].assign_attrs(data.attrs | {"classes": json.dumps([str(name) for name in classes])}),
        batch_plates=("data",),
        loss=SampledBound(),
        transient=("noise",),
    )


@checked(DataError)
def class_likelihood(
    problem: Problem, result: Result, label: str | int | Annotated[list[str], Len(1)] | Annotated[list[int], Len(1)]
) -> Callable[[Tensor, float], Tensor]:
    """``log p(label | z, t)`` of a fitted classifier, for `probmodels.scores.fields.Conditioned`.

    Parameters
    ----------
    problem, result
        The problem of a classifier, and its result.
    label
        A class, as the data name it, or one for each point.

    Returns
    -------
    Callable
        From points (sample, *shape) and a time to log probabilities (sample,), differentiable.

    Raises
    ------
    DataError
        If there is no such class.
    """
    if problem.data is None or "classes" not in problem.data.attrs:
        raise DataError(f"{problem.name}: the problem is none of a classifier of noised images")
    classes = json.loads(problem.data.attrs["classes"])
    wanted = [str(name) for name in (label if isinstance(label, list) else [label])]
    unknown = [name for name in wanted if name not in classes]
    if unknown:
        raise DataError(f"label={unknown[0]!r}; the classifier knows {classes}")
    place = torch.tensor([classes.index(name) for name in wanted])
    with fitted(problem, result.guide_state or {}, seed=0) as (model, _):
        copied: Any = copy.deepcopy(model)
    classifier: NoisyClassifier = copied.eval().requires_grad_(False)
    schedule = classifier._diffusion[0].schedule

    def log_likelihood(z: Tensor, t: float) -> Tensor:
        points = z.to(next(classifier.network.parameters()))
        gamma = schedule.gamma(points.new_tensor(float(t))).expand(len(points))
        found = classifier.log_odds(points, gamma).log_softmax(-1)
        return found.gather(1, place.expand(len(points)).unsqueeze(1)).squeeze(1).to(z)

    return log_likelihood
