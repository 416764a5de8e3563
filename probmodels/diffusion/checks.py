"""Whether a fitted diffusion model can be trusted: its bound on data that were held out, and what it draws.

The guide of a diffusion model is fixed noise and meant to be no posterior, so that importance weights say nothing. What
is read of a model are its bound and the data that it makes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from scipy.stats import norm

from probmodels.diffusion.fitted import classes_of, fitted_problem, terms
from probmodels.diffusion.outputs import generate
from probmodels.errors import ProbmodelsError
from probmodels.inference.diagnostics.findings import Finding
from probmodels.inference.diagnostics.guides import still_falling
from probmodels.inference.problem import Problem
from probmodels.inference.result import Result

__all__ = ["check_draws"]

_JUDGED, _NOISES = 500, 10  # data whose bounds are compared, and draws of noise of each
_FEWEST = 10  # data held out
_GAP = 0.05  # nats a number by which the bound may be worse on data held out
_SMALL, _MOST_NUMBERS = 256, 10_000  # numbers of a datum, up to which many are drawn, and any
_STEPS = 50  # of the sampler
_COMPONENTS, _DIRECTIONS = 8, 16
_SHIFT = 0.3  # of a mean, in sds
_FALSE_ALARM = 1e-3


def check_draws(result: Result) -> Iterator[Finding]:
    """Findings on bound and draws of a diffusion model, in place of those on its guide as a posterior."""
    yield from still_falling(result.tree)
    problem = fitted_problem(result)
    yield _held_out(problem)
    yield _drawn(result, problem)


def _held_out(problem: Problem) -> Finding:
    """The bound of data that were held out against that of fitted ones."""
    model, data = _parts(problem)
    count = data.sizes.get("held_out", 0)
    if count < _FEWEST:
        verdict = f"{count} data were held out, so that the bound on others than the fitted ones is not known"
        advice = "give images with a split, or a Dataset of 'observation' (data, ...) and 'held_out' (held_out, ...)"
        return Finding(False, verdict, advice, judged=False)
    bounds = []
    for name, label in (("observation", "label"), ("held_out", "held_out_label")):
        values = torch.as_tensor(data[name].values[:_JUDGED]).to(next(model.parameters()))
        known = torch.as_tensor(data[label].values[:_JUDGED]) if label in data and model.num_classes else None
        bounds.append(-terms(model, values, known, num_draws=_NOISES)["elbo"].values)
    fitted, others = bounds
    size = math.prod(model.shape)
    error = math.sqrt(fitted.var(ddof=1) / len(fitted) + others.var(ddof=1) / len(others))
    gap, limit = float(others.mean() - fitted.mean()), _GAP * size + 2 * error
    verdict = f"the bound on minus the log likelihood is {others.mean():.4g} nats for {len(others):,} data held out "
    verdict += f"and {fitted.mean():.4g} for fitted ones (more by at most {limit:.3g})"
    bad = not gap <= limit
    return Finding(bad, verdict, "the model learned by heart: take fewer steps, dropout or more data" if bad else "")


def _drawn(result: Result, problem: Problem) -> Finding:
    """Means of features of draws against those of the data."""
    model, data = _parts(problem)
    size = math.prod(model.shape)
    if size > _MOST_NUMBERS:
        verdict = f"data of {size:,} numbers are not drawn to be compared with those that were fitted"
        return Finding(False, verdict, "compare draws of generate with the data", judged=False)
    try:
        drawn = _new(result, problem, 512 if size <= _SMALL else 256)
    except ProbmodelsError as fault:
        return Finding(False, f"nothing could be drawn: {fault}", "", judged=False)
    scale = 1 if model.num_values is None else model.num_values - 1
    values = data["observation"].values.reshape(data.sizes["data"], -1).astype(np.float64) / scale
    if not np.isfinite(drawn).all():
        return Finding(True, "draws of the model are not finite", "lower lr or clip the gradient")
    features = _features(values)
    found, wanted = features(drawn), features(values)
    spread = wanted.std(0) + 1e-12
    shift = np.abs(found.mean(0) - wanted.mean(0)) / spread
    error = np.sqrt(found.var(0) / len(found) + wanted.var(0) / len(wanted)) / spread
    surely = bool(((shift - _SHIFT) > norm.isf(_FALSE_ALARM / 2 / len(shift)) * error).any())
    verdict = f"means, products, and waves of principal components of {len(drawn)} draws differ from those of the data "
    verdict += f"by {shift.max():.2f} sd (at most {_SHIFT})"
    advice = "take more steps (num_steps) or a larger network, and look at the samples"
    if surely or shift.max() <= _SHIFT:
        return Finding(surely, verdict, advice if surely else "")
    return Finding(False, f"{verdict}, which may be chance", advice, judged=False)


def _parts(problem: Problem) -> tuple[Any, xr.Dataset]:
    assert problem.data is not None
    return problem.model, problem.data


def _new(result: Result, problem: Problem, count: int) -> NDArray[np.float64]:
    """Draws (draw, number), of the classes in their shares where the network is shown any."""
    model, data = _parts(problem)
    of: list[tuple[str | None, int]] = [(None, count)]
    if model.num_classes:
        rows = np.linspace(0, data.sizes["data"] - 1, count).astype(int)
        of = list(zip(classes_of(problem), np.bincount(data["label"].values[rows]).tolist(), strict=False))
    parts = [
        generate(result, number, label=label, num_steps=_STEPS, progress=False).values.reshape(number, -1)
        for label, number in of
        if number
    ]
    return np.concatenate(parts).astype(np.float64)


def _features(values: NDArray[np.float64]) -> Callable[[NDArray[np.float64]], NDArray[np.float64]]:
    """A map from data (row, number) to features (row, feature).

    They are standardised principal components, the products of two, and sines and cosines of these components along
    fixed random directions, which see more modes than one.
    """
    centre = values.mean(0)
    variance, axes = np.linalg.eigh(np.atleast_2d(np.cov(values.T)))
    kept = variance[::-1][:_COMPONENTS] > 1e-9 * max(float(variance[-1]), 1e-300)
    axes = (axes[:, ::-1][:, :_COMPONENTS] / np.sqrt(np.maximum(variance[::-1][:_COMPONENTS], 1e-300)))[:, kept]
    direction = np.random.default_rng(0).normal(size=(axes.shape[1], _DIRECTIONS))
    direction /= np.linalg.norm(direction, axis=0)
    one, other = np.triu_indices(axes.shape[1])

    def features(rows: NDArray[np.float64]) -> NDArray[np.float64]:
        z = (rows - centre) @ axes
        along = z @ direction
        waves = [wave(k * along) for k in (1.0, 2.0, 3.0) for wave in (np.cos, np.sin)]
        return np.concatenate([z, z[:, one] * z[:, other], *waves], axis=1)

    return features
