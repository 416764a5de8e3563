"""Samplers that follow a field of scores from noise to data, and the likelihood along the deterministic one.

``ancestral``
    One level given the one before, as the generative model has it.
``ddim``
    The same with less noise, or none: ``eta`` of it.
``flow``
    The ordinary differential equation with the same densities at all times,
    ``dz/dt = -gamma'(t) sigma^2 (z + score) / 2``, solved to a tolerance.

They take the densities of the levels for those of one noised density, which those of a composed field are not: for
these see `probmodels.score_composition`, and `weighted` here, which carries weights along.

References
----------
Song, Y., Sohl-Dickstein, J., Kingma, D. P., Kumar, A., Ermon, S. and Poole, B. (2021). Score-based generative modeling
through stochastic differential equations. ICLR. https://arxiv.org/abs/2011.13456
Song, J., Meng, C. and Ermon, S. (2021). Denoising diffusion implicit models. ICLR. https://arxiv.org/abs/2010.02502
Skreta, M. et al. (2025). Feynman-Kac correctors in diffusion: annealing, guidance, and product of experts. ICML.
https://arxiv.org/abs/2503.02819
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from annotated_types import Interval
from torch import Tensor
from tqdm import tqdm

from probmodels.errors import ProblemError
from probmodels.guides.diffusion import transition
from probmodels.inference.runtime.ops import isolated
from probmodels.options import Count, Draws, NonNegative, OneOf, Probability, Seed, checked, refuse_unused
from probmodels.scores.fields import Field, Product

__all__ = ["METHODS", "Weighted", "flow_log_density", "posterior_draws", "reverse_step", "sample", "weighted"]

METHODS = ("ancestral", "ddim", "flow")
_Tolerance = Annotated[float, Interval(ge=1e-12, lt=1)]
_PURE_NOISE = 6.0  # gamma from which on a density of unit scale is taken for that of the noise
_EXACT_DIVERGENCE = 64  # numbers of a datum up to which a divergence is summed, not estimated


def reverse_step(field: Field, z: Tensor, t: float, s: float, *, eta: float = 1.0) -> Tensor:
    """A draw (sample, *shape) of the level of time s given that of a later time t.

    Parameters
    ----------
    field
        A field of scores.
    z
        Points (sample, *shape).
    t, s
        Times, s < t.
    eta
        Share of the noise of the generative model; 0 for none, the deterministic step of DDIM.
    """
    _check_order(t, s)
    score = field.score(z, t).to(z)
    alpha, sigma = field.scales(t, z)
    clean = (z + sigma**2 * score) / alpha
    # Schedules that are learned have parameters in a type of their own.
    like = next(field.schedule.parameters(), z)
    with torch.no_grad():
        mean, sd = transition(field.schedule, z, clean, *(torch.tensor(time).to(like) for time in (t, s)))
    if eta == 1.0:
        return (mean + sd * torch.randn_like(z)).to(z)
    alpha_s, sigma_s = field.scales(s, z)
    sd = eta * sd.to(z)
    kept = (sigma_s**2 - sd**2).clamp(min=0.0).sqrt()
    return alpha_s * clean - kept * sigma * score + sd * torch.randn_like(z)


@checked(ProblemError)
def sample(
    field: Field,
    num_samples: Draws,
    *,
    method: Annotated[str, OneOf(METHODS)] = "ancestral",
    num_steps: Count = 100,
    eta: Probability = 0.0,
    tolerance: _Tolerance = 1e-4,
    batch_size: Count = 1000,
    seed: Seed = 0,
    progress: bool = True,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Draw data.

    Parameters
    ----------
    field
        A field of scores.
    num_samples
        How many.
    method
        ``"ancestral"``, ``"ddim"`` or ``"flow"``.
    num_steps
        Steps between levels at equal distances in time; ``"flow"`` chooses its own.
    eta
        Share of noise of ``"ddim"``.
    tolerance
        Absolute and relative tolerance of ``"flow"``.
    batch_size
        Data drawn at a time.
    seed
        The same seed gives the same data.
    progress
        Whether to show a progress bar.
    dtype
        Type of the data; None for torch's default.

    Returns
    -------
    Tensor
        (sample, *shape), level 0 with its noise taken off: posterior means of the data given it, in their units.

    Raises
    ------
    ProblemError
        If an option is out of range or not used by the method, or a score is not finite; the message has the time.
    """
    own = {"ancestral": ("num_steps",), "ddim": ("num_steps", "eta"), "flow": ("tolerance",)}[method]
    given = {"num_steps": num_steps, "eta": eta, "tolerance": tolerance}
    refuse_unused(sample, f"method={method!r}", **{name: value for name, value in given.items() if name not in own})
    times = field.schedule.levels(num_steps).tolist()
    found = []
    with isolated(seed), torch.no_grad():
        starts = range(0, num_samples, batch_size)
        total = len(starts) * (num_steps if method != "flow" else 1)
        with tqdm(total=total, desc=f"sampling ({method})", disable=not progress) as bar:
            for start in starts:
                z = torch.randn(min(batch_size, num_samples - start), *field.shape, dtype=dtype)
                if method == "flow":
                    z = _solved(field, z, 1.0, 0.0, tolerance)[0]
                    bar.update()
                else:
                    share = 1.0 if method == "ancestral" else eta
                    for t, s in itertools.pairwise(times):
                        z = reverse_step(field, z, t, s, eta=share)
                        check_finite(z, s)
                        bar.update()
                found.append(field.to_data(field.denoise(z, 0.0)))
    return torch.cat(found)


@checked(ProblemError)
def posterior_draws(
    field: Field,
    z: Tensor,
    t: Probability,
    num_draws: Draws,
    *,
    until: Probability | None = None,
    num_steps: Count = 100,
    seed: Seed = 0,
    progress: bool = True,
) -> Tensor:
    """Draws of the data given their noised form: the generative model from that level down.

    Parameters
    ----------
    field
        A field of scores.
    z
        Noised data (datum, *shape).
    t
        Their time.
    num_draws
        Draws of each datum.
    until
        Time of the level to draw, noise and all; None for the data.
    num_steps
        Steps at equal distances in time.
    seed, progress
        As those of `sample`.

    Returns
    -------
    Tensor
        (draw, datum, *shape), whose mean approaches `Field.denoise`.
    """
    end = 0.0 if until is None else until
    _check_order(t, end)
    times = torch.linspace(t, end, num_steps + 1, dtype=torch.float64).tolist()
    with isolated(seed), torch.no_grad():
        points = z.repeat(num_draws, *[1] * (z.dim() - 1))
        for late, early in _pairs(times, progress):
            points = reverse_step(field, points, late, early)
            check_finite(points, early)
        found = field.to_data(field.denoise(points, 0.0)) if until is None else points
        return found.unflatten(0, (num_draws, len(z)))


@checked(ProblemError)
def flow_log_density(
    field: Field, z: Tensor, *, tolerance: _Tolerance = 1e-5, num_probes: Count | None = None, seed: Seed = 0
) -> Tensor:
    """Log density (sample,) of level 0 at points, by the change of volume along the flow to the noise.

    Parameters
    ----------
    field
        A field of scores that can be differentiated.
    z
        Points (sample, *shape), on the scale of level 0.
    tolerance
        Absolute and relative tolerance of the solver.
    num_probes
        Random directions by which the divergence is estimated, without bias (Grathwohl et al. 2019); None for its exact
        sum where a datum has up to 64 numbers, else 1.
    seed
        Seed of the directions.
    """
    size = math.prod(field.shape)
    if num_probes is None and size > _EXACT_DIVERGENCE:
        num_probes = 1
    with isolated(seed):
        if num_probes is None:
            probes = torch.eye(size, dtype=z.dtype, device=z.device).reshape(size, 1, *field.shape).expand(-1, *z.shape)
        else:
            probes = torch.randint(2, (num_probes, *z.shape), device=z.device).to(z) * 2 - 1
        weight = 1.0 if num_probes is None else 1.0 / num_probes
        last, change = _solved(field, z, 0.0, 1.0, tolerance, lambda: probes, weight)
    return _log_normal(last) + change


def _solved(
    field: Field,
    z: Tensor,
    start: float,
    end: float,
    tolerance: float,
    probes: Callable[[], Tensor] | None = None,
    weight: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Points after the flow from one time to another, and the integral of its divergence."""
    from torchdiffeq import odeint

    like = next(field.schedule.parameters(), z)

    def velocity(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        points = state[0]
        time = min(max(float(t), 0.0), 1.0)
        _, sigma = field.scales(time, points)
        slope = field.schedule.slope(torch.tensor(time).to(like)).detach().to(points)
        pace = -0.5 * slope * sigma**2
        if probes is None:
            score = field.score(points, time).to(points)
            check_finite(score, time)
            return pace * (points + score), torch.zeros_like(state[1])
        with torch.enable_grad():
            points = points.detach().requires_grad_()
            score = field.score(points, time)
            directions = probes()
            traces = torch.zeros_like(state[1])
            for direction in directions:
                (product,) = torch.autograd.grad(score, points, direction, retain_graph=True)
                traces = traces + weight * (product * direction).flatten(1).sum(-1)
        size = math.prod(field.shape)
        return pace * (points + score).detach(), pace * (size + traces.detach())

    times = torch.tensor([start, end], dtype=torch.float64, device=z.device)
    state = z, z.new_zeros(len(z))
    found: Any = odeint(velocity, state, times, rtol=tolerance, atol=tolerance, method="dopri5")
    return found[0][-1], found[1][-1]


# -- weights ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weighted:
    """What `weighted` returns.

    Attributes
    ----------
    samples
        (sample, *shape), resampled at the end so that all count alike.
    effective
        Effective number of samples (step,) before each resampling, by level.
    resampled
        Steps after which they were resampled.
    log_evidence
        Log of the integral of level 0's density, as the field gives it; NaN for weights by ``"feynman_kac"``, which
        leave out what all samples share.
    evaluations
        Scores computed for each sample.
    """

    samples: Tensor
    effective: Tensor
    resampled: tuple[int, ...]
    log_evidence: float
    evaluations: int


@checked(ProblemError)
def weighted(
    field: Field,
    num_samples: Draws,
    *,
    num_steps: Count = 100,
    weights: Literal["energy", "feynman_kac"] | None = None,
    move: Callable[[Tensor, float, int], tuple[Tensor, int]] | None = None,
    threshold: NonNegative = 0.5,
    denoise: bool = True,
    seed: Seed = 0,
    progress: bool = True,
    dtype: torch.dtype | None = None,
) -> Weighted:
    """Draw from a composed field by sequential Monte Carlo: samples with weights, resampled where these differ.

    Parameters
    ----------
    field
        A composed field.
    num_samples
        How many, all at once.
    num_steps
        Steps between levels.
    weights
        ``"energy"``: samples stay where they are from level to level and are weighed by the ratio of its densities,
        which are known; ``move`` brings them on. ``"feynman_kac"``: samples take reverse steps, and weights make up for
        what these get wrong of a `Product`, by scores alone (Skreta et al. 2025). None for the first where densities
        are known.
    move
        From samples, a time and the number of the level to samples after moves that leave the density of that level
        invariant, and how many scores each took; `probmodels.score_composition.make_move` makes one.
    threshold
        Share of effective samples below which they are resampled; above 1 they are after every step.
    denoise
        Whether the noise of level 0 is taken off.
    seed
        The same seed gives the same samples.
    progress
        Whether to show a progress bar.
    dtype
        Type of the samples; None for torch's default.

    Raises
    ------
    ProblemError
        If weights ask for what the field does not know, an option is out of range, or a score is not finite.

    Notes
    -----
    For ``p = prod_i p_i^w_i`` and reverse steps by its score, log weights grow with the log signal-to-noise ratio, from
    the noisy end down, at the rate ``sigma^2 (|sum_i w_i s_i|^2 - sum_i w_i |s_i|^2) / 2``, up to what all samples
    share: in the equation of the densities all terms with second derivatives cancel.
    """
    if weights is None:
        weights = "energy" if field.has_density else "feynman_kac"
    if weights == "energy" and not field.has_density:
        raise ProblemError("weights='energy' needs log densities, which the field does not know; take 'feynman_kac'")
    if weights == "feynman_kac" and not isinstance(field, Product):
        raise ProblemError(f"weights='feynman_kac' is for a Product of fields; this is a {type(field).__name__}")
    times = field.schedule.levels(num_steps).tolist()
    effective, resampled, evaluations, total = [], [], 0, 0.0
    with isolated(seed), torch.no_grad():
        z = torch.randn(num_samples, *field.shape, dtype=dtype)
        log_weight = z.new_zeros(num_samples)
        if weights == "energy":
            log_weight = field.log_density(z, times[0]) - _log_normal(z)
        else:
            assert isinstance(field, Product)
            if not sum(field.weights) > 0:
                raise ProblemError(f"weights {field.weights} sum to {sum(field.weights)}: noise has no such density")
            z = z / math.sqrt(sum(field.weights))
            # Where there is nothing but noise, reverse steps of a product have nothing to go by.
            noisy = field.schedule.double_gamma(torch.tensor(times, dtype=torch.float64)) > _PURE_NOISE
            times = times[min(int(noisy.sum()), len(times) - 2) :]
        for step, (t, s) in enumerate(_pairs(times, progress)):
            if weights == "energy":
                log_weight = log_weight + field.log_density(z, s) - field.log_density(z, t)
                evaluations += 1
            else:
                z, gain = _feynman_kac(field, z, t, s)
                log_weight = log_weight + gain
                evaluations += 1
            check_finite(z, s)
            log_weight = torch.where(log_weight.isnan(), -math.inf, log_weight)
            share = log_weight.softmax(0)
            effective.append(1 / (share**2).sum())
            if effective[-1] < threshold * num_samples or step == len(times) - 2:
                total += float(log_weight.logsumexp(0)) - math.log(num_samples)
                z, log_weight = z[_systematic(share)], torch.zeros_like(log_weight)
                resampled.append(step)
            if move is not None:
                z, made = move(z, s, step + 1)
                evaluations += made
        samples = field.to_data(field.denoise(z, times[-1])) if denoise else z
    evidence = total if weights == "energy" else math.nan
    return Weighted(samples, torch.stack(effective), tuple(resampled), evidence, evaluations)


def _feynman_kac(field: Any, z: Tensor, t: float, s: float) -> tuple[Tensor, Tensor]:
    """A reverse step of a product, and what it adds to the log weights (sample,)."""
    scores = [part.score(z, t).to(z) for part in field.fields]
    joint = sum(weight * score for weight, score in zip(field.weights, scores, strict=True))
    like = next(field.schedule.parameters(), z)
    alpha, sigma = field.scales(t, z)
    gamma = [field.schedule.gamma(torch.tensor(time).to(like)).detach().to(z) for time in (t, s)]
    excess = (joint**2).flatten(1).sum(-1)
    for weight, score in zip(field.weights, scores, strict=True):
        excess = excess - weight * (score**2).flatten(1).sum(-1)
    gain = 0.5 * sigma**2 * (gamma[0] - gamma[1]) * excess
    mean, sd = transition(
        field.schedule, z, (z + sigma**2 * joint) / alpha, *(torch.tensor(time).to(like) for time in (t, s))
    )
    return (mean + sd * torch.randn_like(z)).to(z), gain


def _log_normal(z: Tensor) -> Tensor:
    """Log density (sample,) of independent standard normals."""
    return -0.5 * (z.flatten(1) ** 2 + math.log(2 * math.pi)).sum(-1)


def _systematic(share: Tensor) -> Tensor:
    """Places (sample,) drawn in proportion, with one random number (Kitagawa 1996)."""
    count = len(share)
    points = (torch.arange(count, dtype=torch.float64) + torch.rand((), dtype=torch.float64)) / count
    return torch.searchsorted(share.double().cumsum(0), points.to(share.device)).clamp(max=count - 1)


def _pairs(times: list[float], progress: bool) -> Iterator[tuple[float, float]]:
    pairs = list(itertools.pairwise(times))
    return iter(tqdm(pairs, desc="levels", disable=not progress))


def check_finite(z: Tensor, t: float) -> None:
    """Check that points are finite.

    Raises
    ------
    ProblemError
        If one is not; the message has the time.
    """
    if not bool(z.isfinite().all()):
        where = tuple(int(i) for i in (~z.isfinite()).nonzero()[0])
        raise ProblemError(
            f"sample {list(where)} is {float(z[where])} at t={t:.4g}: the score there is not finite, or steps are too "
            "large; take more steps, and look at the scores of that level"
        )


def _check_order(t: float, s: float) -> None:
    if not 0.0 <= s < t <= 1.0:
        raise ProblemError(f"a reverse step from t={t} to s={s}; times go down, within [0, 1]")
