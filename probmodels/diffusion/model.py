"""Diffusion models as hierarchical autoencoders whose guide is a fixed noising process.

Generative model, for data n = 1..N and levels T, ..., 0 of less and less noise (Kingma et al. 2021)::

    level_T ~ Normal(0, 1)
    level_s | level_t ~ q(level_s | level_t, x = denoiser(level_t, t))      for one level after the other
    x ~ Normal(level_0 / alpha_0, sigma_0 / alpha_0), or of those weights on the values that pixels can take

The guide is ``q(level_t | x) = Normal(alpha_t x, sigma_t)``, with nothing to learn. The bound on the log likelihood has
three terms: of the prior, of reconstruction, and of the steps between, each a squared error of the denoiser,

    KL(q(level_s | level_t, x) || p(level_s | level_t)) = (SNR_s - SNR_t) |x - denoiser(level_t, t)|^2 / 2.

Programs take one of three forms. ``explicit``: every level is a site, for a few steps. Otherwise the sum over steps is
a mean over a site ``time``, with noise that model and guide share, and the term a factor: with ``num_steps`` of the
same bound, without of its limit in continuous time, ``gamma'(t) |noise - predicted|^2 / 2``, whose mean depends on the
ends of the schedule alone.

The network predicts the noise, the datum, the score or the velocity, which are one another's linear functions
(`probmodels.guides.diffusion.convert`); or, for data of few values, ``values``: log odds of every pixel's values given
all others, to which the likelihood of the pixel's own noised value is added in closed form, with the mean over values
for the denoised datum. A network that starts at zero is then the exact denoiser of uniform independent pixels.

References
----------
Kingma, D. P., Salimans, T., Poole, B. and Ho, J. (2021). Variational diffusion models. NeurIPS.
https://arxiv.org/abs/2107.00630
Luo, C. (2022). Understanding diffusion models: a unified perspective. https://arxiv.org/abs/2208.11970
Ho, J., Jain, A. and Abbeel, P. (2020). Denoising diffusion probabilistic models. NeurIPS.
https://arxiv.org/abs/2006.11239
Gulrajani, I. and Hashimoto, T. (2023). Likelihood-based diffusion language models. NeurIPS.
https://arxiv.org/abs/2305.18619 (the output prior)
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, ClassVar

import numpy as np
import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
import xarray as xr
from annotated_types import Interval
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import constraints

from probmodels.datasets.images import check_images, make_images
from probmodels.errors import DataError, ProblemError
from probmodels.guides.diffusion import (
    PREDICTIONS,
    NoisingGuide,
    Stratified,
    convert,
    loss_weight,
    transition,
    unit_normal,
)
from probmodels.guides.nets import GradientNetwork, ResidualMLP, UNet
from probmodels.guides.schedules import SCHEDULES, LearnedSchedule, NoiseSchedule
from probmodels.inference.problem import Problem
from probmodels.inference.runtime.ops import isolated
from probmodels.inference.variational.losses import SampledBound
from probmodels.options import OneOf, Seed, Width, checked, refuse_unused

__all__ = [
    "ENGINES",
    "REFERENCE",
    "Diffusion",
    "make_problem",
    "tiny",
]

REFERENCE = "Kingma et al. (2021), https://arxiv.org/abs/2107.00630"
ENGINES = ("svi",)

NETWORKS: dict[str, Callable[..., nn.Module]] = {"mlp": ResidualMLP, "unet": UNet}
KINDS = (*PREDICTIONS, "values")
_OFF_CENTRE, _LEAST_SD, _MOST_SD = 0.5, 0.5, 2.0  # beyond which data are standardised
_MOST_EXPLICIT = 200  # steps of a chain whose levels are all sites
_NUMBERS = 2**22  # values of pixels whose odds are computed at a time: more are slower, not only larger

_Dropped = Annotated[float, Interval(ge=0, lt=1)]
_Gamma = Annotated[float, Interval(ge=-50, le=50)]  # whose exponentials single precision holds


class Diffusion(PyroModule):
    """The model.

    Parameters
    ----------
    schedule
        Noise schedule.
    network
        From points (row, *shape), levels of noise in [0, 1] (row,) and indicators of classes (row, class) to
        predictions (row, *shape), or (row, *shape, value) where it predicts values.
    shape
        Shape of a datum.
    prediction
        What the network predicts, one of `PREDICTIONS`, or ``"values"``.
    num_steps
        Number of steps between levels; None for continuous time.
    explicit
        Whether every level is a site.
    num_values
        Values 0, 1, ... that data can take; None for real numbers.
    num_classes
        Number of classes of labels; 0 for none.
    label_dropout
        Share of labels that the network is not shown, so that it learns to do without.
    dims
        Names of the axes of a datum.
    units
        Location and scale of real data, each a number or of the shape of a datum, by which they are standardised; None
        for data of about mean zero and variance one.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        network: nn.Module,
        shape: tuple[int, ...],
        *,
        prediction: str = "velocity",
        num_steps: int | None = None,
        explicit: bool = False,
        num_values: int | None = None,
        num_classes: int = 0,
        label_dropout: float = 0.0,
        dims: tuple[str, ...] = (),
        units: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.standardised = units is not None
        location, scale = (torch.zeros(()), torch.ones(())) if units is None else units
        self.register_buffer("location", location)
        self.register_buffer("scale", scale)
        self.schedule, self.network, self.shape, self.prediction = schedule, network, tuple(shape), prediction
        self.num_steps, self.explicit, self.num_values = num_steps, explicit, num_values
        self.num_classes, self.label_dropout = num_classes, label_dropout
        self.axes: Any = {"event_dims": list(dims)} if dims else {}
        with torch.no_grad():
            first, last = schedule.gamma(torch.tensor([0.0, 1.0]))
        self.range = float(first), float(last - first)  # of gamma, as the network sees it

    # -- data and noise

    def encode(self, data: Tensor) -> Tensor:
        """Observed values on the scale of the noise: numbers standardised, values of pixels between -1 and 1."""
        if self.num_values is None:
            return (data - self.location) / self.scale if self.standardised else data
        return (2 * data + 1) / self.num_values - 1

    def likelihood(self, z: Tensor) -> dist.TorchDistribution:
        """Distribution of data given level 0 (row, *shape)."""
        gamma = self.schedule.gamma(z.new_zeros(()))
        centre = z / torch.sigmoid(-gamma).sqrt()
        events = len(self.shape)
        if self.num_values is None:
            if self.standardised:
                return dist.Normal(self.location + self.scale * centre, (gamma / 2).exp() * self.scale).to_event(events)
            return dist.Normal(centre, (gamma / 2).exp()).to_event(events)
        return _ValueGiven(centre, partial(self.log_odds, gamma=gamma), self.num_values).to_event(events)

    def values(self, like: Tensor) -> Tensor:
        """What data can be (value,), on the scale of the noise."""
        assert self.num_values is not None
        return self.encode(torch.arange(self.num_values, dtype=like.dtype, device=like.device))

    def log_odds(self, centre: Tensor, gamma: Tensor) -> Tensor:
        """Log density (row, *shape, value) of noised data over alpha (row, *shape), but for what values share."""
        return -0.5 * (-gamma).exp().unsqueeze(-1) * (centre.unsqueeze(-1) - self.values(centre)) ** 2

    def decode(self, x: Tensor) -> Tensor:
        """Values (row, *shape) nearest to points as `probmodels.scores.samplers.sample` draws them; numbers stay."""
        if self.num_values is None:
            return x
        return ((x + 1) * self.num_values / 2 - 0.5).round().clamp(0, self.num_values - 1)

    def predict(self, z: Tensor, gamma: Tensor, label: Tensor | None, wanted: str) -> Tensor:
        """What the network makes of points (row, *shape) at levels gamma (row,), as one of `PREDICTIONS`."""
        level = (gamma - self.range[0]) / self.range[1]
        found, gamma = self.network(z, level, label), _beside(gamma, z)
        alpha, sigma = torch.sigmoid(-gamma).sqrt(), torch.sigmoid(gamma).sqrt()
        if self.prediction != "values":
            return convert(found, self.prediction, wanted, z, alpha, sigma)
        clean = (found + self.log_odds(z / alpha, gamma)).softmax(-1) @ self.values(z)
        return convert(clean, "x0", wanted, z, alpha, sigma)

    def log_density(self, z: Tensor, gamma: Tensor, label: Tensor | None) -> Tensor:
        """Log density (row,) of noised points (row, *shape), up to a constant of the level, of a `GradientNetwork`."""
        network: Any = self.network
        potential = network.potential(z, (gamma - self.range[0]) / self.range[1], label)
        alpha, sigma = torch.sigmoid(-gamma).sqrt(), torch.sigmoid(gamma).sqrt()
        # Conversions are linear in prediction and point: of antiderivatives they give that of the score.
        return convert(potential, self.prediction, "score", 0.5 * z.flatten(1).square().sum(-1), alpha, sigma)

    def indicators(self, label: Tensor | None, like: Tensor) -> Tensor | None:
        """Classes (row,) as indicators (row, class); a negative one is not known."""
        if not self.num_classes or label is None:
            return None
        return (label.unsqueeze(-1) == torch.arange(self.num_classes, device=label.device)).to(like)

    # -- the bound

    def prior_term(self, x: Tensor) -> Tensor:
        """KL divergence (row,) of the noisiest level from standard normal noise."""
        gamma = self.schedule.gamma(x.new_ones(()))
        signal, noise = torch.sigmoid(-gamma), torch.sigmoid(gamma)
        return 0.5 * (noise + signal * x**2 - 1 - F.logsigmoid(gamma)).flatten(1).sum(-1)

    def diffusion_term(self, x: Tensor, noise: Tensor, time: Tensor, label: Tensor | None) -> Tensor:
        """Unbiased estimate (row,) of the sum over steps of their KL divergences, from one time in [0, 1] each."""
        steps, schedule = self.num_steps, self.schedule
        backwards: Callable[[Tensor], None] | None = None
        if steps is not None:
            time = (time * steps).ceil().clamp(min=1) / steps
            gamma = schedule.gamma(time)
            weight = 0.5 * steps * torch.expm1(gamma - schedule.gamma(time - 1 / steps))
        elif isinstance(schedule, LearnedSchedule):
            gamma, slope, backwards = schedule.steadied(time)
            weight = 0.5 * slope
        else:
            gamma, weight = schedule.gamma(time), 0.5 * schedule.slope(time)
        alpha, sigma = torch.sigmoid(-gamma).sqrt(), torch.sigmoid(gamma).sqrt()
        a, s = _beside(alpha, x), _beside(sigma, x)
        z = a * x + s * noise
        kind = "x0" if self.prediction == "values" else self.prediction
        # Of the exact datum: by `convert` it would be divided by small numbers and multiplied again.
        target = {"noise": noise, "x0": x, "score": -noise / s, "velocity": a * noise - s * x}[kind]
        error = (target - self.predict(z, gamma, label, kind)).flatten(1).square().sum(-1)
        term = weight * loss_weight(kind, alpha, sigma) * error
        if backwards is not None:
            backwards(term)
        return term

    def forward(self, data: Tensor, label: Tensor | None = None) -> None:
        """Sites ``level_T`` to ``level_0``, or ``time``, ``noise`` and ``noise_0``; and ``observation``.

        Parameters
        ----------
        data
            (data, *shape), values counted from 0 where there are so many.
        label
            Classes (data,).
        """
        events = len(self.shape)
        with pyro.plate("data", len(data)) as rows:
            observed = data[rows]
            x = self.encode(observed)
            shown = None if label is None else self.indicators(label[rows], x)
            if shown is not None and self.label_dropout:
                chance = pyro.sample("label_shown", dist.Uniform(x.new_zeros(()), x.new_ones(())))
                shown = shown * (chance >= self.label_dropout).to(x).unsqueeze(-1)
            if self.explicit:
                assert self.num_steps is not None
                z = pyro.sample(f"level_{self.num_steps}", unit_normal(x, self.shape), infer=self.axes)
                times = torch.linspace(0.0, 1.0, self.num_steps + 1, dtype=x.dtype, device=x.device)
                for step in range(self.num_steps, 0, -1):
                    gamma = self.schedule.gamma(times[step]).expand(z.shape[0])
                    clean = self.predict(z, gamma, shown, "x0")
                    mean, sd = transition(self.schedule, z, clean, times[step], times[step - 1])
                    z = pyro.sample(f"level_{step - 1}", dist.Normal(mean, sd).to_event(events), infer=self.axes)
            else:
                time = pyro.sample("time", Stratified(x.new_zeros(()), x.new_ones(())))
                noise = pyro.sample("noise", unit_normal(x, self.shape), infer=self.axes)
                small = pyro.sample("noise_0", unit_normal(x, self.shape), infer=self.axes)
                pyro.factor("prior", -self.prior_term(x))
                terms = in_blocks(self.diffusion_term, self.num_values, x, noise, time.expand(len(x)), shown)
                pyro.factor("steps", -terms)
                gamma = self.schedule.gamma(x.new_zeros(()))
                z = torch.sigmoid(-gamma).sqrt() * x + torch.sigmoid(gamma).sqrt() * small
            pyro.sample("observation", self.likelihood(z), obs=observed, infer=self.axes)


class _ValueGiven(dist.TorchDistribution):
    """Values of pixels given noised ones (row, ...): a categorical whose log odds, of all rows, might fill the memory.

    Parameters
    ----------
    centre
        Noised pixels (row, ...).
    log_odds
        From some of them to log odds (row, ..., value).
    num_values
        Number of values.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, centre: Tensor, log_odds: Callable[[Tensor], Tensor], num_values: int) -> None:
        self.centre, self.log_odds, self.num_values = centre, log_odds, num_values
        super().__init__(centre.shape, validate_args=False)

    @property
    def support(self) -> Any:
        return constraints.integer_interval(0, self.num_values - 1)

    def expand(self, batch_shape: Any, _instance: Any = None) -> _ValueGiven:
        return _ValueGiven(self.centre.expand(batch_shape), self.log_odds, self.num_values)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        def draw(centre: Tensor) -> Tensor:
            return dist.Categorical(logits=self.log_odds(centre)).sample().to(centre)

        return in_blocks(draw, self.num_values, self.centre.expand(*sample_shape, *self.centre.shape))

    def log_prob(self, value: Tensor) -> Tensor:
        def score(centre: Tensor, value: Tensor) -> Tensor:
            return dist.Categorical(logits=self.log_odds(centre)).log_prob(value)

        return in_blocks(score, self.num_values, *torch.broadcast_tensors(self.centre, value))


def in_blocks(function: Callable[..., Tensor], num_values: int | None, *arrays: Tensor | None) -> Tensor:
    """A function of arrays (row, ...) in blocks of rows, to bound memory; at once where gradients need all."""
    first = arrays[0]
    assert first is not None
    size = max(1, _NUMBERS // (math.prod(first.shape[1:]) * (num_values or 1)))
    if torch.is_grad_enabled() or len(first) <= size:
        return function(*arrays)
    blocks = [[part] * math.ceil(len(first) / size) if part is None else part.split(size) for part in arrays]
    return torch.cat([function(*block) for block in zip(*blocks, strict=True)])


def _beside(value: Tensor, like: Tensor) -> Tensor:
    """A number for each row (row,) with the axes of a datum."""
    return value.reshape(*value.shape, *[1] * (like.dim() - value.dim()))


@checked(DataError, keep=True)
def make_problem(
    data: xr.Dataset | xr.DataArray,
    *,
    network: Annotated[str, OneOf(NETWORKS)] = "mlp",
    hidden: Width = 128,
    blocks: Annotated[int, Interval(ge=1, le=64)] = 3,
    depth: Annotated[int, Interval(ge=0, le=8)] = 2,
    frequencies: Annotated[int, Interval(ge=0, le=32)] = 0,
    dropout: _Dropped = 0.0,
    energy: bool = False,
    schedule: Annotated[str, OneOf(SCHEDULES)] = "linear",
    gamma: tuple[_Gamma, _Gamma] = (-13.3, 5.0),
    learn_ends: bool = False,
    prediction: Annotated[str, OneOf(KINDS)] = "velocity",
    num_steps: Annotated[int, Interval(ge=1, le=1_000_000)] | None = None,
    explicit: bool = False,
    num_values: Annotated[int, Interval(ge=2, le=65_536)] | None = None,
    conditional: bool = False,
    label_dropout: _Dropped = 0.1,
    split: str = "train",
    seed: Seed = 0,
) -> Problem:
    """A diffusion model of images or of any array of data.

    Parameters
    ----------
    data
        Images as `probmodels.datasets.images` describes them, or an array whose first axis counts data: points, fields.
        Where their means are off zero by more than half, or their sds off one by a factor of two, they are standardised
        inside: each number of a datum of one axis by itself, fields as a whole. Bounds are of the data as they are,
        and so are draws. Or the data of another such problem, its ``observation`` (data, ...).
    network
        ``"mlp"``, or ``"unet"`` for images.
    hidden
        Width of the network's layers, or channels at full resolution.
    blocks, frequencies
        Residual blocks and Fourier features of ``"mlp"``, see `ResidualMLP`.
    depth
        How often ``"unet"`` halves the resolution.
    dropout
        Dropout rate of the network's units.
    energy
        Whether predictions are the gradient of a scalar (`GradientNetwork`), so that log densities are known.
    schedule
        ``"linear"``, ``"cosine"`` or ``"learned"``, see `probmodels.guides.schedules`.
    gamma
        Minus the log signal-to-noise ratio of the first and the last level.
    learn_ends
        Whether these are learned as well, with ``schedule="learned"``.
    prediction
        What the network predicts: ``"noise"``, ``"x0"``, ``"score"`` or ``"velocity"``; or, with
        ``num_values``, ``"values"``, log odds of them (see above).
    num_steps
        Number of steps between levels; None for continuous time.
    explicit
        Whether every level is a site of the program.
    num_values
        Number of intensities of the images, whose likelihood then is one of values; None for one of densities.
    conditional
        Whether the network is shown the labels of the images.
    label_dropout
        Share of labels that it is not shown.
    split
        Split of the images to take.
    seed
        Seed of the starting values of the network.

    Returns
    -------
    Problem
        For `fit_svi`, best with ``batch_size`` and ``keep="average"``; plate ``data`` may be subsampled.

    Raises
    ------
    DataError
        If data are missing or out of range, noise would not increase, or an option is out of range or not used.
    """
    _check_unused(dict(locals()))
    if explicit:
        _check_explicit(num_steps)
    if prediction == "values":
        _check_values(num_values, energy)
    kept, classes = read_data(data, split, num_values, conditional)
    table = kept["observation"]
    shape = tuple(table.shape[1:])
    if network == "unet" and len(shape) not in (2, 3):
        raise DataError(f"network='unet' for data of shape {shape}; it takes images, and 'mlp' takes all")
    of_network: dict[str, Any] = {"hidden": hidden, "dropout": dropout, "num_classes": len(classes)}
    of_network |= {"num_outputs": num_values if prediction == "values" else None}
    of_network |= {"depth": depth} if network == "unet" else {"blocks": blocks, "frequencies": frequencies}
    with isolated(seed):
        noise = _noise_schedule(schedule, gamma, learn_ends)
        made: nn.Module = NETWORKS[network](shape, **of_network)
    model = Diffusion(
        noise,
        GradientNetwork(made) if energy else made,
        shape,
        prediction=prediction,
        num_steps=num_steps,
        explicit=explicit,
        num_values=num_values,
        num_classes=len(classes),
        label_dropout=label_dropout if conditional else 0.0,
        dims=tuple(str(dim) for dim in table.dims[1:]),
        units=_units(table) if num_values is None and not len(classes) else None,
    )
    values = torch.as_tensor(table.values, dtype=torch.get_default_dtype())
    extra = ("label_shown",) if model.label_dropout else ()
    return Problem(
        name="diffusion",
        model=model,
        guide=NoisingGuide(model.schedule, shape, model.encode, num_steps if explicit else None, extra),
        args=(values, torch.as_tensor(kept["label"].values)) if conditional else (values,),
        coords={str(dim): list(table[dim].values) for dim in table.dims if dim in table.coords},
        data=kept.assign_attrs(data.attrs | {"split": split, "classes": json.dumps([str(value) for value in classes])}),
        batch_plates=("data",),
        loss="TraceMeanField_ELBO" if explicit else SampledBound(),
        transient=_noise_sites(num_steps if explicit else None) if values.numel() > 10_000 else (),
    )


def _units(table: xr.DataArray) -> tuple[Tensor, Tensor] | None:
    """Location and scale of data far from mean zero and variance one; None for others."""
    values = table.values.astype(np.float64)
    axes = (0,) if values.ndim == 2 else None
    with np.errstate(over="ignore"):
        location, scale = values.mean(axes), values.std(axes)
    if not np.isfinite(location).all() or not np.isfinite(scale).all():
        raise DataError("data are so large that their variance is not finite; divide them by a constant")
    if (np.abs(location) <= _OFF_CENTRE).all() and ((scale >= _LEAST_SD) & (scale <= _MOST_SD)).all():
        return None
    if not (scale > 0).all():
        raise DataError(
            f"number {int(np.argmin(np.atleast_1d(scale)))} of the data is constant, so that it cannot be "
            "standardised; leave it out"
        )
    dtype = torch.get_default_dtype()
    return torch.as_tensor(location, dtype=dtype), torch.as_tensor(scale, dtype=dtype)


def _check_unused(options: Mapping[str, Any]) -> None:
    """Refuse options that the network, the schedule and the data in question do not use."""

    def refuse(branch: str, *names: str) -> None:
        refuse_unused(make_problem, branch, **{name: options[name] for name in names})

    if options["network"] == "unet":
        refuse("network='unet'", "blocks", "frequencies")
    else:
        refuse("network='mlp'", "depth")
    if options["schedule"] != "learned":
        refuse(f"schedule={options['schedule']!r}, whose ends are given", "learn_ends")
    if not options["conditional"]:
        refuse("conditional=False", "label_dropout")
    if isinstance(options["data"], xr.DataArray):
        refuse("data without splits", "split")


def _check_explicit(num_steps: int | None) -> None:
    """Check that there are few enough levels for a site each."""
    if not (num_steps and num_steps <= _MOST_EXPLICIT):
        raise DataError(
            f"explicit=True with num_steps={num_steps}; a chain whose levels are all sites has 1 to {_MOST_EXPLICIT} "
            "steps"
        )


def _check_values(num_values: int | None, energy: bool) -> None:
    """Check that log odds of values can be predicted."""
    if num_values is None:
        raise DataError("prediction='values' without num_values; give their number, or predict another")
    if energy:
        raise DataError("energy=True with prediction='values'; log odds are no gradient: predict 'velocity'")


def _noise_sites(num_steps: int | None) -> tuple[str, ...]:
    """Sites of noise: one for each level where levels are explicit, else two."""
    return ("noise", "noise_0") if num_steps is None else tuple(f"level_{step}" for step in range(num_steps + 1))


def _noise_schedule(name: str, gamma: Sequence[float], learn_ends: bool) -> NoiseSchedule:
    ends: dict[str, Any] = {"learn_ends": learn_ends} if name == "learned" else {}
    try:
        found: NoiseSchedule = SCHEDULES[name](*gamma, **ends)
        found.check(f"schedule={name!r}")
    except ProblemError as error:
        raise DataError(str(error)) from error
    return found


def read_data(
    data: xr.Dataset | xr.DataArray, split: str, num_values: int | None, conditional: bool
) -> tuple[xr.Dataset, np.ndarray]:
    """Data as the model takes them, and the classes.

    ``observation`` (data, ...) and, where wanted, ``label`` (data,), places among the classes; and of images of other
    splits ``held_out`` and ``held_out_label``.
    """
    if isinstance(data, xr.DataArray):
        if data.ndim < 2 or 0 in data.shape:
            raise DataError(f"data of shape {data.shape}; the first axis counts data, and there must be another")
        if conditional or num_values is not None:
            raise DataError("conditional and num_values are for images: give a Dataset as make_images returns it")
        _check_finite(data)
        return data.rename({data.dims[0]: "data"}).rename("observation").to_dataset(), np.empty(0)
    if "observation" in data:
        return data, _check_stored(data, split, num_values, conditional)
    return _read_images(data, split, num_values, conditional)


def _check_finite(table: xr.DataArray) -> None:
    if table.dtype.kind not in "iuf":
        raise DataError(f"data are of type {table.dtype}; give numbers")
    wrong = ~np.isfinite(table.values)
    if wrong.any():
        place = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise DataError(f"data{list(place)} is {table.values[place]}; drop what is missing, or fill it")


def _check_stored(data: xr.Dataset, split: str, num_values: int | None, conditional: bool) -> np.ndarray:
    """Check the data of another problem; returns their classes, where these are shown to the network."""
    table = data["observation"]
    if split != data.attrs.get("split", split):
        raise DataError(f"split={split!r}, but the data are those of {data.attrs['split']!r} alone; give the images")
    if table.ndim < 2 or table.dims[0] != "data" or 0 in table.shape:
        raise DataError(f"observation has dims {table.dims}; expected data first, and another")
    _check_finite(table)
    values = table.values
    if num_values is not None and not ((values == values.round()) & (values >= 0) & (values < num_values)).all():
        raise DataError(f"observation holds other numbers than 0 to {num_values - 1}; give the images that it is of")
    if not conditional:
        return np.empty(0)
    classes: list[str] = json.loads(data.attrs.get("classes", "[]"))
    if "label" not in data or not classes or not np.isin(data["label"].values, range(len(classes))).all():
        raise DataError("conditional=True, and the data hold no labels of their classes; give the images")
    return np.array(classes)


def _read_images(
    data: xr.Dataset, split: str, num_values: int | None, conditional: bool
) -> tuple[xr.Dataset, np.ndarray]:
    check_images(data, binary=False)
    rows = (data["split"] == split).values
    if not rows.any():
        known = ", ".join(repr(str(name)) for name in np.unique(data["split"].values))
        raise DataError(f"no image has split={split!r}; choose among {known}")
    table = data["image"].astype(np.float64)
    if num_values is None:
        table = 2 * table - 1
    else:
        scaled = table * (num_values - 1)
        table = scaled.round()
        worst = float(abs(scaled - table).max())
        if worst > 1e-4:
            raise DataError(
                f"intensities are not of {num_values} values in equal steps: one is {worst:.3g} of a step off; "
                "give their number, 256 for 8 bits, and load them with threshold=None"
            )
    classes, label = np.empty(0), None
    if conditional:
        if "label" not in data:
            raise DataError("conditional=True, and the images have no labels; load them with their classes")
        classes, label = np.unique(data["label"].values, return_inverse=True)
    found = xr.Dataset()
    for name, of, dim in (("", rows, "data"), ("held_out", ~rows, "held_out")):
        if of.any():
            found[name or "observation"] = table[of].rename({"data": dim})
            if label is not None:
                found[f"{name}_label".lstrip("_")] = (dim, label[of])
    return found, classes


def tiny() -> Problem:
    """Twelve images of 2 x 3 pixels of 3 values in two classes, for the conformance tests."""
    rng = np.random.default_rng(0)
    data = make_images(rng.integers(3, size=(12, 2, 3)) / 2, rng.integers(2, size=12), threshold=None)
    return make_problem(data, hidden=8, blocks=1, num_values=3, conditional=True, schedule="learned", gamma=(-6.0, 4.0))
