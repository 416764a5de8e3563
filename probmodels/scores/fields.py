"""Fields of scores: gradients of log densities at every level of noise, closed forms of some, and their composition.

A `Field` belongs to a noise schedule and gives, at a time t in [0, 1], the score of the density of
``z_t = alpha(t) x + sigma(t) noise``, and the log density itself where that is known. Fields compose:

==============  ==========================================  ==================================================
`Product`       ``prod_i p_i(z)^w_i``                       products, negation, tempering, guidance by classes
`Mixture`       ``sum_i w_i p_i(z)``                        needs log densities: scores do not tell which is likelier
`Conditioned`   ``p(z) l(z)``                               guidance by a classifier or a likelihood
==============  ==========================================  ==================================================

What is composed at a level of noise is not the noised composition, but for mixtures: a sampler that follows the reverse
process draws from another density than the one at level 0. Samplers that leave the density of each level invariant
(`probmodels.score_composition`) do not.

References
----------
Du, Y. et al. (2023). Reduce, reuse, recycle: compositional generation with energy-based diffusion models and MCMC.
ICML. https://arxiv.org/abs/2302.11552
Sjöberg, A., Lindqvist, J., Önnheim, M., Jirstrand, M. and Svensson, L. (2023). MCMC-correction of score-based diffusion
models for model composition. https://arxiv.org/abs/2307.14012
Ho, J. and Salimans, T. (2022). Classifier-free diffusion guidance. https://arxiv.org/abs/2207.12598
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from probmodels.datasets.labelled import arranged, row_labels
from probmodels.errors import ProblemError
from probmodels.guides.schedules import NoiseSchedule, TableSchedule
from probmodels.inference.mcmc.line_integrals import Evaluation
from probmodels.options import Count, Positive, checked

__all__ = [
    "Conditioned",
    "EnergyField",
    "Field",
    "FunctionField",
    "Mixture",
    "Product",
    "ScoreOnly",
    "as_numbers",
    "from_diffusers",
    "guided",
    "linear_observation",
    "negated",
    "observation",
    "tempered",
    "value_and_gradient",
]


class Field:
    """Scores at all levels; a new one gives `score`, and `log_density` with ``has_density``, or `evaluate`.

    Parameters
    ----------
    schedule
        Noise schedule.
    shape
        Shape of a datum.

    Attributes
    ----------
    units
        Location and scale of the data, each a number or of their shape, where the levels are those of standardised
        data; None where data are on the scale of the noise.
    """

    has_density = False
    units: tuple[Tensor, Tensor] | None = None
    tables: Mapping[str, Any] | None = None  # those that it was made from, with their options, by load_fields

    def __init__(self, schedule: NoiseSchedule, shape: Sequence[int]) -> None:
        self.schedule, self.shape = schedule, tuple(int(size) for size in shape)

    def score(self, z: Tensor, t: float) -> Tensor:
        """Gradient (sample, *shape) of the log density at points (sample, *shape), at a time."""
        return self.evaluate(z, t).score

    def log_density(self, z: Tensor, t: float) -> Tensor:
        """Log density (sample,) up to a constant of the time.

        Raises
        ------
        ProblemError
            If it is not known.
        """
        known = self.evaluate(z, t)
        if known.line is not None or known.known is None:
            raise ProblemError(
                f"{type(self).__name__} knows scores but no log density; take a rule of line integrals, or fields "
                "with densities, such as EnergyField"
            )
        return known.known

    def evaluate(self, z: Tensor, t: float) -> Evaluation:
        """Score, the part of it whose log density is not known, and the log density of the rest."""
        score = self.score(z, t)
        if self.has_density:
            return Evaluation(score, None, self.log_density(z, t))
        return Evaluation(score, score, None)

    def denoise(self, z: Tensor, t: float) -> Tensor:
        """Posterior mean of the datum given its noised form, ``(z + sigma^2 score) / alpha``.

        References
        ----------
        Efron, B. (2011). Tweedie's formula and selection bias. JASA 106. https://doi.org/10.1198/jasa.2011.tm11181
        """
        alpha, sigma = self.scales(t, z)
        return (z + sigma**2 * self.score(z, t).to(z)) / alpha

    def to_data(self, x: Tensor) -> Tensor:
        """Points (sample, *shape) on the scale of the noise in the units of the data."""
        if self.units is None:
            return x
        location, scale = (value.to(x) for value in self.units)
        return location + scale * x

    def scales(self, t: float, like: Tensor) -> tuple[Tensor, Tensor]:
        """Signal and noise, alpha and sigma, at a time."""
        time = torch.as_tensor(t, dtype=torch.float64)
        if not 0.0 <= float(time) <= 1.0:
            raise ProblemError(f"t={float(time)} lies outside of [0, 1]")
        with torch.no_grad():
            parameter = next(self.schedule.parameters(), None)
            gamma = self.schedule.gamma(time if parameter is None else time.to(parameter)).double()
            return torch.sigmoid(-gamma).sqrt().to(like), torch.sigmoid(gamma).sqrt().to(like)


# -- functions and networks -------------------------------------------------------------------------------------------


class FunctionField(Field):
    """Scores from a function, and log densities where there is one of them.

    Parameters
    ----------
    schedule, shape
        As of every field.
    score
        From points (sample, *shape) and a time to scores (sample, *shape).
    noise
        Instead of ``score``: to predicted noise, ``-sigma score``.
    log_density
        To log densities (sample,); None where they are not known.
    """

    @checked(ProblemError)
    def __init__(
        self,
        schedule: NoiseSchedule,
        shape: Sequence[Count],
        score: Callable[[Tensor, float], Tensor] | None = None,
        *,
        noise: Callable[[Tensor, float], Tensor] | None = None,
        log_density: Callable[[Tensor, float], Tensor] | None = None,
    ) -> None:
        super().__init__(schedule, shape)
        if (score is None) == (noise is None):
            raise ProblemError("give either score or noise, functions of points and a time")
        self._score, self._noise, self._log_density = score, noise, log_density

    def evaluate(self, z: Tensor, t: float) -> Evaluation:
        if self._score is not None:
            score = self._checked(self._score(z, t), z, t)
        else:
            assert self._noise is not None
            score = -self._checked(self._noise(z, t), z, t) / self.scales(t, z)[1]
        if self._log_density is None:
            return Evaluation(score, score, None)
        return Evaluation(score, None, self._log_density(z, t))

    @property
    def has_density(self) -> bool:  # type: ignore[override]
        """Whether there is a function of log densities."""
        return self._log_density is not None

    def _checked(self, value: Any, z: Tensor, t: float) -> Tensor:
        if not isinstance(value, Tensor) or value.shape != z.shape:
            found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ProblemError(f"the score at t={float(t):.4g} is {found} for points {tuple(z.shape)}; give one alike")
        return value.to(z)


class EnergyField(Field):
    """Log density ``-energy``, its score by automatic differentiation.

    Parameters
    ----------
    schedule, shape
        As of every field.
    energy
        From points (sample, *shape) and a time to energies (sample,), differentiable.
    """

    has_density = True

    @checked(ProblemError)
    def __init__(
        self, schedule: NoiseSchedule, shape: Sequence[Count], energy: Callable[[Tensor, float], Tensor]
    ) -> None:
        super().__init__(schedule, shape)
        self._energy = energy

    def log_density(self, z: Tensor, t: float) -> Tensor:
        return -self._energy(z, t)

    def evaluate(self, z: Tensor, t: float) -> Evaluation:
        value, gradient = value_and_gradient(lambda points: -self._energy(points, t), z)
        return Evaluation(gradient, None, value)


class ScoreOnly(Field):
    """A field whose log densities are not looked at."""

    def __init__(self, field: Field) -> None:
        super().__init__(field.schedule, field.shape)
        self.field, self.units = field, field.units

    def score(self, z: Tensor, t: float) -> Tensor:
        return self.field.score(z, t)


def from_diffusers(network: Any, scheduler: Any, shape: Sequence[int], **given: Any) -> FunctionField:
    """A network of the ``diffusers`` library that predicts noise, with the schedule of its scheduler.

    Parameters
    ----------
    network
        Called as ``network(sample, timestep, **given).sample``.
    scheduler
        Has ``alphas_cumprod`` and ``config.prediction_type == "epsilon"``.
    shape
        Shape of a datum, as (channel, row, column).
    given
        Passed on, such as ``encoder_hidden_states``.

    Raises
    ------
    ProblemError
        If the scheduler predicts something else.
    """
    kind = getattr(getattr(scheduler, "config", None), "prediction_type", "epsilon")
    if kind != "epsilon":
        raise ProblemError(f"the scheduler predicts {kind!r}; only 'epsilon' is known: convert with FunctionField")
    schedule = TableSchedule(scheduler.alphas_cumprod)
    last = len(schedule.table) - 1

    def noise(z: Tensor, t: float) -> Tensor:
        with torch.no_grad():
            found: Tensor = network(z, t * last, **given).sample
        return found

    return FunctionField(schedule, shape, noise=noise)


# -- composition ------------------------------------------------------------------------------------------------------


class Product(Field):
    """``prod_i p_i^w_i``: the weighted sum of scores.

    Weights of one multiply densities, other positive ones temper, negative ones push away.

    Raises
    ------
    ProblemError
        If fields have different shapes or schedules, or a weight is zero or not finite.
    """

    @checked(ProblemError)
    def __init__(self, fields: Sequence[Field], weights: ArrayLike | Tensor | None = None) -> None:
        self.fields, self.weights = _checked_fields(fields, weights)
        super().__init__(self.fields[0].schedule, self.fields[0].shape)
        self.units = self.fields[0].units

    @property
    def has_density(self) -> bool:  # type: ignore[override]
        """Whether all factors have one."""
        return all(field.has_density for field in self.fields)

    def log_density(self, z: Tensor, t: float) -> Tensor:
        return _weighted([field.log_density(z, t) for field in self.fields], self.weights)

    def evaluate(self, z: Tensor, t: float) -> Evaluation:
        found = [field.evaluate(z, t) for field in self.fields]
        return Evaluation(
            _weighted([one.score for one in found], self.weights),
            _optional([one.line for one in found], self.weights),
            _optional([one.known for one in found], self.weights),
        )


class Mixture(Field):
    """``sum_i w_i p_i``, of fields with log densities that are normalised alike.

    Raises
    ------
    ProblemError
        If a field has no log density, shapes or schedules differ, or a weight is not positive.
    """

    has_density = True

    @checked(ProblemError)
    def __init__(self, fields: Sequence[Field], weights: ArrayLike | Tensor | None = None) -> None:
        self.fields, self.weights = _checked_fields(fields, weights)
        if min(self.weights) < 0:
            raise ProblemError(f"weights={list(self.weights)} of a mixture; they must be positive")
        for place, field in enumerate(self.fields):
            if not field.has_density:
                raise ProblemError(
                    f"field {place} of the mixture, a {type(field).__name__}, has no log density, and scores alone do "
                    "not say how likely each component is at a point; take an EnergyField, or a Product"
                )
        super().__init__(self.fields[0].schedule, self.fields[0].shape)
        self.units = self.fields[0].units

    def _joint(self, log_densities: Sequence[Tensor]) -> Tensor:
        """With the weights (component, sample)."""
        stacked = torch.stack(list(log_densities))
        return stacked + stacked.new_tensor(self.weights).log().unsqueeze(-1)

    def log_density(self, z: Tensor, t: float) -> Tensor:
        return self._joint([field.log_density(z, t) for field in self.fields]).logsumexp(0)

    def evaluate(self, z: Tensor, t: float) -> Evaluation:
        found = [field.evaluate(z, t) for field in self.fields]
        log_density = self._joint([one.known for one in found if one.known is not None])
        scores = torch.stack([one.score for one in found])
        share = log_density.softmax(0)
        share = share.reshape(*share.shape, *[1] * len(self.shape))
        return Evaluation((share * scores).sum(0), None, log_density.logsumexp(0))


class Conditioned(Field):
    """``p(z) l(z, t)`` with a likelihood that is known: its log ratio is exact, whatever is known of the field.

    Parameters
    ----------
    field
        Prior.
    log_likelihood
        From points (sample, *shape) and a time to log likelihoods (sample,), differentiable; points are on the scale of
        the noise, `Field.to_data` gives those of level 0 in units of the data.
    weight
        Power of the likelihood.
    """

    @checked(ProblemError)
    def __init__(self, field: Field, log_likelihood: Callable[[Tensor, float], Tensor], weight: float = 1.0) -> None:
        if weight == 0:
            raise ProblemError("weight=0 of a likelihood; leave the likelihood out, or give another number")
        super().__init__(field.schedule, field.shape)
        self.units = field.units
        self.field, self.log_likelihood, self.weight = field, log_likelihood, weight

    @property
    def has_density(self) -> bool:  # type: ignore[override]
        """Whether the prior has one."""
        return self.field.has_density

    def log_density(self, z: Tensor, t: float) -> Tensor:
        return self.field.log_density(z, t) + self.weight * self.log_likelihood(z, t)

    def evaluate(self, z: Tensor, t: float) -> Evaluation:
        prior = self.field.evaluate(z, t)
        value, gradient = value_and_gradient(lambda points: self.weight * self.log_likelihood(points, t), z)
        known = value if prior.known is None else prior.known + value
        return Evaluation(prior.score + gradient, prior.line, known)


@checked(ProblemError)
def negated(field: Field, other: Field, strength: float = 1.0) -> Product:
    """What is like one field and unlike another: ``p^(1 + strength) / other^strength``."""
    return Product([field, other], [1 + strength, -strength])


@checked(ProblemError)
def tempered(field: Field, power: float) -> Product:
    """``p^power``: peaks sharper above one, flatter below."""
    return Product([field], [power])


@checked(ProblemError)
def guided(conditional: Field, unconditional: Field, weight: float) -> Field:
    """``p(z | label)^weight p(z)^(1 - weight)``, guidance without a classifier; a weight of one is no guidance."""
    if weight == 1.0:
        return conditional
    return Product([conditional, unconditional], [weight, 1 - weight])


@checked(ProblemError)
def linear_observation(
    field: Field,
    matrix: ArrayLike | Tensor,
    observed: ArrayLike | Tensor,
    sd: Positive,
    *,
    bridge: Literal["noised", "denoised"] = "noised",
) -> Conditioned:
    """A field given ``observed ~ Normal(matrix x, sd)``: gaps to fill, sums, blurs.

    The density at level 0 is that of the posterior but for the noise left there. Levels above are a way to it:

    ``"noised"``
        ``Normal(alpha observed; matrix z, alpha^2 sd^2 + sigma^2 matrix matrix')``, which asks for no gradient of the
        field.
    ``"denoised"``
        ``Normal(observed; matrix E[x | z], sd^2 + sigma^2 / (alpha^2 + sigma^2) matrix matrix')``, nearer to the noised
        posterior, by the derivative of the field (Song et al. 2023, equation 7, for data of unit variance).

    Parameters
    ----------
    field
        Prior of data of any shape, flattened below.
    matrix
        What is observed of the data (observation, size).
    observed
        Observations (observation,).
    sd
        Standard deviation of their noise.
    bridge
        Which of the two.

    Raises
    ------
    ProblemError
        If shapes do not fit, or an option is out of range.

    References
    ----------
    Song, J., Vahdat, A., Mardani, M. and Kautz, J. (2023). Pseudoinverse-guided diffusion models for inverse problems.
    ICLR. https://openreview.net/forum?id=9_gsMA8MRKQ
    """
    size = math.prod(field.shape)
    matrix, observed = observation(matrix, observed)
    if matrix.ndim != 2 or matrix.shape[1] != size or observed.shape != matrix.shape[:1]:
        raise ProblemError(
            f"matrix {tuple(matrix.shape)} and observed {tuple(observed.shape)} for data of {size} numbers; give "
            "(observation, size) and (observation,)"
        )
    if field.units is not None:  # of the standardised data
        location, scale = (value.to(matrix.double()).expand(field.shape).flatten() for value in field.units)
        matrix, observed = matrix.double() * scale, observed.double() - matrix.double() @ location
    rows = matrix.double() @ matrix.double().mT
    variances, axes = torch.linalg.eigh(rows)
    variances = variances.clamp(min=0.0)

    def log_likelihood(z: Tensor, t: float) -> Tensor:
        alpha, sigma = field.scales(t, z)
        if bridge == "noised":
            spread = alpha**2 * sd**2 + sigma**2 * variances.to(z)
            left = alpha * observed.to(z) - z.flatten(1) @ matrix.to(z).mT
        else:
            spread = sd**2 + sigma**2 * variances.to(z)
            left = observed.to(z) - field.denoise(z, t).flatten(1) @ matrix.to(z).mT
        along = left @ axes.to(z)
        return -0.5 * (along**2 / spread + spread.log()).sum(-1)

    return Conditioned(field, log_likelihood)


def observation(matrix: ArrayLike | Tensor, observed: ArrayLike | Tensor) -> tuple[Tensor, Tensor]:
    """What is observed (observation, size) and its observations (observation,), labelled ones in one order.

    Raises
    ------
    ProblemError
        As `as_numbers`, or if labels of observations differ.
    """
    rows = row_labels(matrix, observed, dim="observation")
    matrix = arranged(matrix, "matrix", {"observation": rows, "size": None}, error=ProblemError)
    observed = arranged(observed, "observed", {"observation": rows}, error=ProblemError)
    return as_numbers("matrix", matrix), as_numbers("observed", observed)


def as_numbers(name: str, value: ArrayLike | Tensor) -> Tensor:
    """An argument as a tensor of numbers, which stay of their type.

    Raises
    ------
    ProblemError
        If it holds something else, or a number is not finite.
    """
    try:
        found = value if isinstance(value, Tensor) else torch.as_tensor(np.array(value))
        good = found.dtype != torch.bool and bool(torch.isfinite(found).all())
    except (TypeError, ValueError, RuntimeError):
        good = False
    if not good:
        raise ProblemError(f"{name} must be finite numbers, in lists of equal lengths; leave out what is missing")
    return found


def _checked_fields(
    fields: Sequence[Field], weights: ArrayLike | Tensor | None
) -> tuple[tuple[Field, ...], tuple[float, ...]]:
    """Fields that go together, and a weight for each."""
    fields = tuple(fields)
    if not fields:
        raise ProblemError("there is no field to compose; give at least one")
    chosen = (1.0,) * len(fields) if weights is None else tuple(as_numbers("weights", weights).flatten().tolist())
    if len(chosen) != len(fields):
        raise ProblemError(f"{len(chosen)} weights for {len(fields)} fields")
    for place, weight in enumerate(chosen):
        if weight == 0:
            raise ProblemError(f"weight {place} is {weight}; leave the field out, or give a number that is not 0")
    first = fields[0]
    times = torch.linspace(0.0, 1.0, 33, dtype=torch.float64)
    with torch.no_grad():
        gammas = [field.schedule.double_gamma(times) for field in fields]
    for place, field in enumerate(fields):
        if field.shape != first.shape:
            raise ProblemError(f"field {place} is of data {field.shape} and field 0 of {first.shape}")
        if not _same_units(field.units, first.units):
            raise ProblemError(
                f"field {place} has another location or scale of its data than field 0; levels of noise of the one are "
                "not those of the other: fit both to data that are standardised alike"
            )
        worst = (gammas[place] - gammas[0]).abs().max()
        if not worst < 1e-4:
            raise ProblemError(
                f"field {place} has another noise schedule than field 0: gamma differs by {float(worst):.3g}; scores "
                "of different levels of noise cannot be composed"
            )
    return fields, chosen


def _same_units(a: tuple[Tensor, Tensor] | None, b: tuple[Tensor, Tensor] | None) -> bool:
    if a is None or b is None:
        return a is None and b is None
    return all(x.shape == y.shape and torch.allclose(x, y) for x, y in zip(a, b, strict=True))


def _weighted(parts: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    total = parts[0] * weights[0]
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        total = total + weight * part
    return total


def _optional(parts: Sequence[Tensor | None], weights: Sequence[float]) -> Tensor | None:
    """Weighted sum of those that are there."""
    there = [(part, weight) for part, weight in zip(parts, weights, strict=True) if part is not None]
    return _weighted(*zip(*there, strict=True)) if there else None


def value_and_gradient(function: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
    """A function (sample,) of points (sample, *shape), and its gradient."""
    with torch.enable_grad():
        points = z.detach().requires_grad_()
        value = function(points)
        (gradient,) = torch.autograd.grad(value.sum(), points)
    return value.detach(), gradient
