"""Gaps of fields filled by a diffusion prior: draws of complete fields given the cells that were observed.

A field ``x`` (cell,) is seen where it was observed, ``y = x[seen] + sd noise``, and a diffusion model fitted to
complete fields is the prior. It may be one of the cells themselves, or of coordinates along the leading modes of the
fields (`leading_modes`), as fields of many cells have few degrees of freedom::

    x = mean + patterns c + noise,    c ~ diffusion model, of unit variance in every coordinate

A network that starts at zero and predicts the velocity is the exact denoiser of normal coordinates: such a prior starts
as probabilistic principal components (Tipping and Bishop 1999), and learns how fields differ from them.

All draws of all fields walk down the levels of noise at once. With ``A`` the map from coordinates to observed cells,
in units of their noise, the density of level t is that of the prior times ``Normal(y; alpha A z, 1 + sigma^2 A A')``:
the exact one where the prior is white and normal (Song et al. 2023), and at level 0 right for every prior. Steps of
Hamiltonian Monte Carlo leave each level invariant; their lengths along the axes of ``A'A`` are those of a normal prior.

References
----------
Tipping, M. E. and Bishop, C. M. (1999). Probabilistic principal component analysis. JRSS B 61.
Song, J., Vahdat, A., Mardani, M. and Kautz, J. (2023). Pseudoinverse-guided diffusion models for inverse problems.
ICLR. https://openreview.net/forum?id=9_gsMA8MRKQ
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
import xarray as xr
from annotated_types import Interval, Len
from torch import Tensor
from tqdm import tqdm

from probmodels.errors import DataError, ProblemError
from probmodels.inference.mcmc.line_integrals import Evaluation, evaluate_start
from probmodels.inference.mcmc.score_kernels import Transition
from probmodels.inference.runtime.ops import isolated
from probmodels.options import Count, Draws, OneOf, Positive, Probability, Seed, checked, refuse_unused
from probmodels.scores.fields import Field
from probmodels.scores.samplers import check_finite, reverse_step

__all__ = ["METHODS", "Modes", "ObservedCells", "fill_gaps", "leading_modes"]

METHODS = ("hmc", "reverse")
_ACCEPT = 0.8  # to which steps are tuned


@dataclass(frozen=True)
class Modes:
    """Leading modes of fields: ``field = mean + sum_k patterns_k c_k + noise``.

    Attributes
    ----------
    mean
        As a field, NaN in cells that are left out.
    patterns
        (mode, ...), in units of the fields for a coordinate of one.
    noise
        Sd of what the modes leave out of a cell, in units of the fields.
    """

    mean: xr.DataArray
    patterns: xr.DataArray
    noise: float

    def coordinates(self, fields: xr.DataArray) -> xr.DataArray:
        """Coordinates (time, mode) of complete fields, on which a diffusion model is fitted.

        Raises
        ------
        DataError
            If the fields have other cells, or gaps.
        """
        seen = _cells(self.mean.notnull(), fields)
        table = _table(fields, seen)
        if not np.isfinite(table).all():
            raise DataError("fields have values that are missing or infinite; coordinates are of complete fields")
        patterns = _table(self.patterns, seen)
        found = (table - _table(self.mean.expand_dims("mode"), seen)) @ patterns.T / (patterns**2).sum(1)
        rows = fields.dims[0]
        coords = {name: fields[name] for name in (rows,) if name in fields.coords}
        return xr.DataArray(found, coords | {"mode": self.patterns["mode"]}, (rows, "mode"))


@checked(DataError)
def leading_modes(fields: xr.DataArray, num_modes: Count, *, noise: Positive | None = None) -> Modes:
    """Modes of most variance of complete fields.

    Parameters
    ----------
    fields
        Axis of rows first, such as (time, lat, lon). Cells that are missing throughout, such as land, are left out.
    num_modes
        How many.
    noise
        Sd of what the modes leave out; None for that of these fields. Fields that the modes were not fitted to are
        further from them, the more so the fewer the fields: a larger value is often better.

    Raises
    ------
    DataError
        If some but not all values of a cell are missing, or fields cannot carry so many modes.
    """
    _check_rows(fields)
    seen = fields.notnull().any(str(fields.dims[0]))
    table = _table(fields, seen.values)
    if not np.isfinite(table).all():
        raise DataError("fields have gaps or infinite values; modes are fitted to complete fields: drop some rows")
    if num_modes >= min(table.shape):
        raise DataError(f"num_modes={num_modes} of {len(table)} fields with {table.shape[1]} cells; take fewer")
    mean = table.mean(0)
    _, size, axes = np.linalg.svd((table - mean) / math.sqrt(len(table)), full_matrices=False)
    if noise is None:
        noise = math.sqrt((size[num_modes:] ** 2).sum() / table.shape[1])
    if not noise > 0 or not size[num_modes - 1] > 0:
        raise DataError(f"{num_modes} modes with noise={noise} beside them; fields have fewer that vary: take fewer")
    patterns = _as_fields(size[:num_modes, None] * axes[:num_modes], seen, "mode", np.arange(1, num_modes + 1))
    return Modes(_as_fields(mean[None], seen, "row", [0])[0].drop_vars("row"), patterns, noise)


class ObservedCells(Field):
    """A prior given observed cells of many fields: points are the draws of one field after those of another.

    Parameters
    ----------
    prior
        A field of data of any shape, flattened below.
    curvature, target
        ``A'A`` (field, size, size) and ``A'y`` (field, size), in units of the noise of observations; the former
        (field, size) where it is diagonal.
    num_draws
        Draws of each field.
    """

    def __init__(self, prior: Field, curvature: Tensor, target: Tensor, num_draws: int) -> None:
        super().__init__(prior.schedule, prior.shape)
        self.prior, self._axes = prior, None
        if curvature.ndim == 3:
            curvature, self._axes = torch.linalg.eigh(curvature)
            target = torch.einsum("fdk,fd->fk", self._axes, target)
        self.sizes, self._target = (part.repeat_interleave(num_draws, 0) for part in (curvature.clamp(min=0.0), target))

    def along(self, z: Tensor) -> Tensor:
        """Points (sample, *shape) in coordinates (sample, size) along the axes of ``A'A``."""
        flat = z.flatten(1)
        return flat if self._axes is None else torch.einsum("fdk,fnd->fnk", self._axes, self._split(flat)).flatten(0, 1)

    def back(self, w: Tensor) -> Tensor:
        """The inverse of `along`."""
        flat = w if self._axes is None else torch.einsum("fdk,fnk->fnd", self._axes, self._split(w)).flatten(0, 1)
        return flat.reshape(len(w), *self.shape)

    def _split(self, flat: Tensor) -> Tensor:
        assert self._axes is not None
        return flat.unflatten(0, (len(self._axes), -1))

    def scale(self, t: float) -> Tensor:
        """Sds (sample, size) of level t along the axes, for a prior that is white and normal."""
        _, sigma = self.scales(t, self.sizes)
        return ((1 + sigma**2 * self.sizes) / (1 + self.sizes)).sqrt()

    def evaluate(self, z: Tensor, t: float) -> Evaluation:
        prior, w = self.prior.evaluate(z, t), self.along(z)
        alpha, sigma = self.scales(t, z)
        weight = alpha / (1 + sigma**2 * self.sizes)
        value = (weight * w * (self._target - 0.5 * alpha * self.sizes * w)).sum(-1)
        gradient = self.back(weight * (self._target - alpha * self.sizes * w))
        return Evaluation(prior.score + gradient, prior.line, value if prior.known is None else prior.known + value)

    def finish(self, z: Tensor) -> Tensor:
        """Draws of data given level 0 and what was observed, as if ``x | z ~ Normal(E[x | z], sigma)``.

        So it is for a prior that is white and normal, and for every prior as far as sigma is small.
        """
        _, sigma = self.scales(0.0, z)
        precision = 1 / sigma**2
        total = precision + self.sizes
        mean = (precision * self.along(self.prior.denoise(z, 0.0)) + self._target) / total
        return self.back(mean + torch.randn_like(mean) / total.sqrt())


@checked(ProblemError)
def fill_gaps(
    prior: Field,
    fields: xr.DataArray,
    *,
    sd: Positive,
    modes: Modes | None = None,
    cells: xr.DataArray | None = None,
    num_draws: Draws = 100,
    method: Annotated[str, OneOf(METHODS)] = "hmc",
    num_levels: Annotated[int, Interval(ge=2, le=100_000)] = 30,
    num_steps: Count = 5,
    step_size: Positive = 0.5,
    probs: Annotated[Sequence[Probability], Len(1)] = (0.05, 0.25, 0.5, 0.75, 0.95),
    seed: Seed = 0,
    progress: bool = True,
) -> xr.Dataset:
    """Complete fields given the cells that were observed.

    Parameters
    ----------
    prior
        `probmodels.diffusion.fitted.make_field` of a fitted model, or any other field of scores, of the coordinates
        along ``modes`` or of the cells. Best of about unit variance, to which steps are scaled.
    fields
        Axis of rows first, such as (time, lat, lon), NaN in gaps; every row has gaps of its own.
    sd
        Standard deviation of the error of an observed cell, in units of the fields.
    modes
        Modes whose coordinates the prior is of; None where it is of the cells.
    cells
        Cells of the prior, true in a map (lat, lon) without land; all where None. ``modes`` know theirs.
    num_draws
        Draws of each field, every one a chain of its own.
    method
        ``"hmc"``: chains that leave the density of every level invariant; ``"reverse"``: guided steps of the reverse
        process, one a level, which are exact for a white and normal prior and many levels only.
    num_levels
        Number of levels of noise.
    num_steps
        Hamiltonian steps on each level, of ``"hmc"``.
    step_size
        Longest leapfrog step of ``"hmc"``, in sds of a level; shortened by acceptance on all levels but the last. Three
        of 0.5 turn a normal density by a quarter, which forgets where it was; three of 1 by a half, which only changes
        the sign.
    probs
        Probabilities of the quantiles.
    seed, progress
        The same seed gives the same draws; whether to show a progress bar.

    Returns
    -------
    xr.Dataset
        ``draws`` (draw, time, lat, lon), their ``mean`` and ``sd`` (time, lat, lon), ``quantiles`` (quantile, time,
        lat, lon), ``observed`` (time, lat, lon); NaN in cells left out. With ``method="hmc"`` also ``acceptance``
        (level,).

    Raises
    ------
    DataError
        If fields are no rows of cells, a value is infinite, a row has no observed cell, or observed cells are not
        those of the prior.
    ProblemError
        If an option is out of range or not used, sizes do not fit, or a score is not finite.
    """
    if method == "reverse":
        refuse_unused(fill_gaps, "method='reverse'", num_steps=num_steps, step_size=step_size)
    if modes is not None and cells is not None:
        raise ProblemError("give either modes, which know their cells, or cells")
    _check_rows(fields)
    ocean = modes.mean.notnull() if modes is not None else cells
    if ocean is None:
        ocean = xr.ones_like(fields[0], dtype=bool).drop_vars(str(fields.dims[0]), errors="ignore")
    chosen = _cells(ocean, fields)
    table = _table(fields, chosen)
    _check_values(fields, chosen)
    size = math.prod(prior.shape)
    wanted = table.shape[1] if modes is None else modes.patterns.sizes["mode"]
    if size != wanted:
        kind = "cells" if modes is None else "modes"
        raise ProblemError(f"the prior is of data {prior.shape} and there are {wanted} {kind}; fit it to these")

    seen, y = torch.as_tensor(np.isfinite(table)), torch.as_tensor(np.nan_to_num(table))
    location, scale = prior.units or (torch.zeros(()), torch.ones(()))
    location, scale = (value.double().expand(prior.shape).flatten() for value in (location, scale))
    if modes is None:
        gaps = ObservedCells(prior, seen * scale**2 / sd**2, seen * scale * (y - location) / sd**2, num_draws)
    else:
        mean, patterns = (
            torch.as_tensor(_table(part, chosen)) for part in (modes.mean.expand_dims("mode"), modes.patterns)
        )
        variance = sd**2 + modes.noise**2
        mean, patterns = mean + location @ patterns, scale[:, None] * patterns  # of standardised coordinates
        curvature = torch.einsum("kc,fc,lc->fkl", patterns, seen.double() / variance, patterns)
        gaps = ObservedCells(prior, curvature, (seen * (y - mean) / variance) @ patterns.mT, num_draws)
    with isolated(seed), torch.no_grad():
        times = prior.schedule.levels(num_levels - 1).tolist()
        rates: list[float] = []
        if method == "hmc":
            z, rates = _walk(gaps, times, num_steps, step_size, progress)
        else:
            z = _reverse(gaps, times, progress)
        x = gaps.finish(z).flatten(1).unflatten(0, (len(y), num_draws)).transpose(0, 1)
        if modes is None:
            x = location + scale * x
        else:
            x = mean + x @ patterns
            # Given the modes, an observed cell is what they leave out, seen with an error.
            share = seen.double() * modes.noise**2 / variance
            left = torch.where(seen, math.sqrt(modes.noise**2 / variance) * sd, modes.noise)
            x = x + share * (y - x) + left * torch.randn_like(x)
    return _summary(x.numpy(), fields, xr.DataArray(chosen, ocean.coords, ocean.dims), seen.numpy(), probs, rates)


# -- parts ------------------------------------------------------------------------------------------------------------


def _walk(
    gaps: ObservedCells, times: Sequence[float], num_steps: int, step_size: float, progress: bool
) -> tuple[Tensor, list[float]]:
    """Draws of level 0 by Hamiltonian steps on one level after the other, and their acceptance by level."""
    transition, rates, step = Transition("hamiltonian"), [], step_size
    z = torch.randn(len(gaps.sizes), *gaps.shape, dtype=torch.float64)
    for t in tqdm(times, desc="levels", disable=not progress):
        scale = gaps.scale(t)

        def target(u: Tensor, t: float = t, scale: Tensor = scale) -> Evaluation:
            found = gaps.evaluate(gaps.back(u * scale), t)
            line = None if found.line is None else gaps.along(found.line) * scale
            return Evaluation(gaps.along(found.score) * scale, line, found.known)

        u, momentum, accepted = gaps.along(z) / scale, None, 0.0
        try:
            evaluation = evaluate_start(target, u)
        except ProblemError as error:
            raise ProblemError(f"field_gaps: at t={t:.4g}: {error}") from error
        for _ in range(num_steps):
            moved = transition(target, u, momentum, evaluation, step)
            u, momentum, evaluation = moved.x, moved.v, moved.evaluation
            rate = float(moved.accept_prob.mean())
            accepted += rate / num_steps
            if t != times[-1]:
                step = min(step * math.exp(0.5 * (rate - _ACCEPT)), step_size)
        rates.append(accepted)
        z = gaps.back(u * scale)
    return z, rates


def _reverse(gaps: ObservedCells, times: Sequence[float], progress: bool) -> Tensor:
    """Draws of level 0 by the reverse process under the score of every level."""
    z = torch.randn(len(gaps.sizes), *gaps.shape, dtype=torch.float64)
    for t, s in tqdm(list(itertools.pairwise(times)), desc="levels", disable=not progress):
        z = reverse_step(gaps, z, t, s)
        check_finite(z, s)
    return z


def _check_rows(fields: xr.DataArray) -> None:
    if fields.ndim < 2 or 0 in fields.shape:
        raise DataError(
            f"fields are {fields.shape}; give an array whose first axis counts fields, such as (time, lat, lon)"
        )


def _cells(ocean: xr.DataArray, fields: xr.DataArray) -> np.ndarray:
    """Which cells (lat, lon) are meant, after a look at whether fields have the same."""
    dims = fields.dims[1:]
    if ocean.dims != dims or ocean.shape != fields.shape[1:]:
        raise DataError(f"fields {dict(fields.sizes)} have other cells than the prior's map {dict(ocean.sizes)}")
    for dim in dims:
        if dim in ocean.coords and dim in fields.coords and not np.array_equal(ocean[dim], fields[dim]):
            raise DataError(f"fields have other values of {dim!r} than the prior's map; regrid them")
    found: np.ndarray = ocean.values.astype(bool)
    if not found.any():
        raise DataError("the prior's map has no cell")
    return found


def _check_values(fields: xr.DataArray, chosen: np.ndarray) -> None:
    values = fields.values
    if np.isinf(values).any():
        place = tuple(int(i) for i in np.argwhere(np.isinf(values))[0])
        raise DataError(f"fields{list(place)} is infinite; mark gaps by NaN")
    seen = np.isfinite(values)
    if seen[:, ~chosen].any():
        raise DataError("fields have values in cells that the prior does not have; set them to NaN")
    empty = ~seen[:, chosen].any(1)
    if empty.any():
        row = int(np.flatnonzero(empty)[0])
        raise DataError(f"no cell of field {row} is observed ({int(empty.sum())} such fields); leave them out")


def _table(fields: xr.DataArray, chosen: np.ndarray) -> np.ndarray:
    """Values (row, cell) of the cells that are meant."""
    return np.asarray(fields.values, dtype=np.float64)[:, chosen]


def _as_fields(
    table: np.ndarray, chosen: xr.DataArray, dim: str, labels: Sequence[object] | np.ndarray
) -> xr.DataArray:
    """The inverse of `_table`, with the labels of a map."""
    values = np.full((len(table), *chosen.shape), np.nan)
    values[:, chosen.values] = table
    return xr.DataArray(values, {dim: labels} | {name: chosen[name] for name in chosen.coords}, (dim, *chosen.dims))


def _summary(
    x: np.ndarray,
    fields: xr.DataArray,
    chosen: xr.DataArray,
    seen: np.ndarray,
    probs: Sequence[float],
    rates: list[float],
) -> xr.Dataset:
    """Draws (draw, row, cell) on the map, and what is said of them."""
    values = np.full((len(x), *fields.shape), np.nan)
    values[..., chosen.values] = x
    quantiles = np.full((len(probs), *fields.shape), np.nan)
    quantiles[..., chosen.values] = np.quantile(x, list(probs), axis=0)
    observed = np.zeros(fields.shape, dtype=bool)
    observed[:, chosen.values] = seen
    dims = fields.dims
    found = xr.Dataset(
        {
            "draws": (("draw", *dims), values),
            "mean": (dims, values.mean(0)),
            "sd": (dims, values.std(0)),
            "quantiles": (("quantile", *dims), quantiles),
            "observed": (dims, observed),
        },
        {name: fields[name] for name in fields.coords} | {"draw": np.arange(len(x)), "quantile": list(probs)},
    )
    units = {"units": fields.attrs["units"]} if "units" in fields.attrs else {}
    for name in ("draws", "mean", "sd", "quantiles"):
        found[name].attrs |= units
    return found.assign(acceptance=("level", rates)) if rates else found
