"""From a labelled matrix to a `Problem` of the Bayesian singular value decomposition."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch
import xarray as xr
from annotated_types import Interval, Len
from numpy.typing import ArrayLike
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.distributions import Distribution

from probmodels.bayesian_svd.align import ORDERS, align_draws, invariants
from probmodels.bayesian_svd.augment import basis_of
from probmodels.bayesian_svd.effects import effect_design
from probmodels.bayesian_svd.gaps.blocks import Block, hold_out_blocks
from probmodels.bayesian_svd.gaps.quick import Table, noise_about
from probmodels.bayesian_svd.model import FRAME_PRIORS, MatrixData, SeriesData, model
from probmodels.bayesian_svd.noise import Noise, estimate_noise, with_noise
from probmodels.bayesian_svd.patterns.shrinkage import with_shrinkage
from probmodels.bayesian_svd.preparing.bases import NUGGET, make_bases
from probmodels.bayesian_svd.preparing.constant import (
    constant_data,
    diagnosed_sites,
    keep_kernels,
    keep_noise,
    labels_of_sites,
)
from probmodels.bayesian_svd.preparing.matrix import as_matrix, cell_weights, check_field, check_told_apart
from probmodels.bayesian_svd.preparing.options import check_options, kernels_of_modes, labelling
from probmodels.bayesian_svd.preparing.reduced import filled_by_effects, reduced, reference_modes
from probmodels.bayesian_svd.sampler import BlockGibbs
from probmodels.bayesian_svd.series_sampler import SeriesGibbs
from probmodels.bayesian_svd.sides import positions, space_distance
from probmodels.distributions.covariance import KERNELS, Kernel
from probmodels.distributions.frames import FrameReparam
from probmodels.errors import DataError
from probmodels.guides.bayesian_svd import BayesianSVDGuide
from probmodels.inference.problem import Problem
from probmodels.options import OneOf, Positive, checked

__all__ = ["make_problem", "tiny"]

_KERNELS_SPACE = tuple(name for name in KERNELS if name != "periodic")

SpaceKernel = Annotated[str, OneOf(_KERNELS_SPACE)]
Scale = Annotated[float, Interval(ge=1e-12, le=1e12)]
Grid = Annotated[Sequence[Positive], Len(1)]


@checked(DataError, keep=True)
@threadpool_limits.wrap(limits=1)  # on shared cores more threads lose more by waiting than they gain
def make_problem(
    data: xr.DataArray | xr.Dataset,
    *,
    rank: Annotated[int, Interval(ge=1, le=10_000)],
    fixed_effects: Sequence[str] = ("intercept",),
    shared_effects: Sequence[str] = (),
    covariates: Mapping[str, ArrayLike] | None = None,
    effect_scale: Scale | None = None,
    kernel_space: SpaceKernel | Annotated[Sequence[SpaceKernel], Len(1)] = "matern72",
    series: Literal["frame", "iid", "ar1", "matern32", "matern52"] = "frame",
    kernel_time: Kernel | Annotated[Sequence[Kernel], Len(1)] = "identity",
    length_scales_space: Grid | None = None,
    length_scales_time: Grid | None = None,
    length_prior_space: Distribution | None = None,
    length_prior_time: Distribution | None = None,
    num_length_scales: Annotated[int, Interval(ge=1, le=500)] = 24,
    period: Positive | None = None,
    nugget: Annotated[float, Interval(ge=0, le=100)] | None = None,
    tail: Annotated[float, Interval(ge=0, lt=1)] | None = None,
    max_basis: Annotated[int, Interval(ge=50, le=2000)] = 500,
    area_weights: bool | Annotated[Sequence[Positive], Len(1)] = True,
    frame_prior: Annotated[str, OneOf(FRAME_PRIORS)] = "conditioned",
    noise: Literal["white", "correlated"] = "white",
    noise_rank: Annotated[int, Interval(ge=1, le=10_000)] | None = None,
    hold_out: Annotated[float, Interval(ge=0, le=0.5)] = 0.0,
    hold_out_block: Block | None = None,
    scale: Scale | None = None,
    shrinkage: Literal["none", "log_uniform"] = "none",
    noise_prior: tuple[Scale, Scale] | None = None,
    order: Annotated[str, OneOf(ORDERS)] | None = None,
) -> Problem:
    """Bayesian SVD of a labelled matrix.

    Parameters
    ----------
    data
        Dims (cell, time), or a gridded field (time, lat, lon), or a data set with such an array ``data``; missing
        entries NaN. Distances between cells come from coordinates ``lat`` and ``lon`` of the cells (chordal, km), else
        ``x``, ``y``, ``z``, else the cell coordinate; along time from dates (years) or numbers.
    rank
        Number of modes k.
    fixed_effects
        Terms with a coefficient per location (see `probmodels.bayesian_svd.effects.TERMS`), integrated out.
    shared_effects
        Terms with one coefficient for all locations, sampled.
    covariates
        User's series along time, by the names under which the two lists refer to them.
    effect_scale
        Prior standard deviation of the coefficients of both kinds, in weighted units and for orthonormal time columns
        in the local case; None is a flat prior for local effects (modes are then orthogonal to them in time) and a
        scale a thousand times that of the data for shared ones.
    series
        What the series of the modes are. ``"ar1"``, ``"matern32"``, ``"matern52"`` and ``"iid"``: a process in time of
        unit variance. The first is autoregressive with a decay of each mode's own that is learned; the next two are
        Matérn processes, smooth in time, with a length-scale of each mode's own that is learned (site
        ``length_scale_time``, in years or the axis's unit); the last is white. The modes are then those of the
        population that the times were drawn from, and their uncertainty holds that other times would have given
        others. ``"frame"``: numbers, orthonormal at these times; the modes are those of these times, and only noise
        makes them uncertain.
    kernel_space, kernel_time
        A kernel name for all modes, or one for each (see `probmodels.distributions.covariance.KERNELS`).
    length_scales_space, length_scales_time
        Grid on which the length-scales live: km or the coordinate's unit, years or the axis's unit. In time by default
        a hundred values from a quarter of the usual step to half the record where series are a Matérn process, at most
        a hundred times the shortest step, which is the limit for a grid that is given, too. Else by default
        ``num_length_scales`` log-spaced values from the spacing of the points to half the largest distance. For space
        the longest is doubled up to three times where the leading patterns are likeliest there, and with more than
        ``max_basis`` cells the shortest is the first that is plausible for a leading pattern.
    num_length_scales
        Number of length-scales on a grid that is not given.
    length_prior_space, length_prior_time
        Prior of the length-scales, a distribution over positive numbers; by default equal weights on the grid.
    period
        Period of the kernel "periodic" in time.
    nugget
        White share of each covariance, relative to its variance. By default 1e-6, for the numerics alone; where noise
        is correlated, this share then has the covariance of the noise.
    tail
        Share of the roughest covariance's variance that the bases may leave out; 0 keeps full rank. By default 1e-6,
        and 1e-3 in space where its length-scales are chosen from the data (of the likeliest ones far less is left out).
    max_basis
        Most functions of which patterns in space are made; with fewer cells ``tail`` alone decides.
    area_weights
        True weights cells by cos(lat) where latitudes are known (noise variance is then ``sigma^2 / w``), False treats
        cells alike; numbers are weights of one's own. They are scaled to mean 1.
    frame_prior
        "conditioned" (default), "projected", "macg" or "uniform". The block sampler serves the first and the last.
    noise
        What no mode holds. ``"white"``: independent, of variance ``sigma^2 / weight``. ``"correlated"``: each cell has
        a level of its own, near cells and neighbouring times are correlated (see `probmodels.bayesian_svd.noise`);
        this covariance is estimated once, beforehand, and only its size sigma is sampled. The sites ``U``, ``d`` and
        ``F`` are then in coordinates where noise is white; `read_draws` and the summaries turn them into modes.
        Needs a process in time, effects of flat prior that are each cell's own, and at most 5,000 cells.
    noise_rank
        Number of modes about which the covariance of correlated noise is estimated; by default ``rank``. With
        ``shrinkage`` it must be given, since about more modes than there are noise comes out too small, so that too
        many modes exceed it: `probmodels.bayesian_svd.gaps.ranks.compare_ranks` finds it.
    hold_out
        Share of the observed entries that are hidden from the model, in blocks of space and time, so that
        `probmodels.bayesian_svd.gaps.fill.fill_field` can check its intervals on them.
    hold_out_block
        Size of such a block: times, and cells along latitude and longitude (of cells without a grid, as many nearest
        ones). By default blocks have the shapes of the gaps in the data, at other times; where nothing is missing, they
        are 6 x 3 x 4, less where the data are small.
    scale
        Scale of the HalfNormal prior of d; by default the norm of the data.
    shrinkage
        ``"log_uniform"``: a size d of any order of magnitude from a tenth of the noise to ``scale`` is as likely, so
        that modes that the data do not ask for vanish, and the number of modes that exceed the noise has a posterior
        (see `probmodels.bayesian_svd.patterns.number`); ``rank`` is then the most modes there can be. ``"none"``: all
        modes have the prior ``HalfNormal(scale)``. Needs series that are a process.
    noise_prior
        Shape and rate of the InverseGamma prior of sigma squared; by default shape 1/2 and a rate
        that puts little mass below a thousandth of the variance left by the effects.
    order
        How draws are labelled: "scale" sorts modes by d in each draw, "match" assigns them to the modes of the plain
        SVD, "label" keeps them as the model has them. By default "label" where kernels are given mode by mode, else
        "scale".

    Returns
    -------
    Problem
        With the compiled block sampler as its kernel, and `FrameReparam` for gradient-based MCMC.

    Raises
    ------
    DataError
        For data of wrong shape, infinite or constant in time, fewer than 10 times, a rank that the data cannot carry,
        effects that are unknown or cannot be told apart, or an option that is out of range or not used.
    """
    options = dict(locals())
    families = kernels_of_modes(options)
    check_options(make_problem, options, families)
    order = labelling(options)
    matrix, mends = as_matrix(data)
    local = effect_design(matrix["time"], fixed_effects, covariates)
    common = effect_design(matrix["time"], shared_effects, covariates)
    seen, held_out, said_of_blocks = _hidden(matrix, hold_out, hold_out_block, local.sizes["effect"])
    check_field(matrix, seen, local, common, options)
    weight = cell_weights(matrix, area_weights)
    values = torch.as_tensor(np.where(seen, matrix.values, 0.0) * np.sqrt(weight)[:, None])
    q, r = np.linalg.qr(local.values)
    check_told_apart(seen, q, list(local["effect"].values))
    design, mask = torch.as_tensor(q), torch.as_tensor(seen)
    filled = filled_by_effects(values, mask, design)
    bases = make_bases(matrix, filled - (filled @ design) @ design.T, design, weight, families, options)
    data_ = reduced(
        values,
        filled,
        mask,
        space=bases.space,
        time=bases.time,
        design=design,
        design_root=torch.as_tensor(r),
        weight=torch.as_tensor(weight),
        common=torch.as_tensor(common.values),
        effect_scale=effect_scale,
        scale=scale,
        noise_prior=noise_prior,
        series=bases.process,
    )
    found: Noise | None = None
    if noise == "correlated":
        found, complete = _estimated(matrix, values, seen, local, data_, noise_rank, rank)
        regular = nugget is None and "identity" not in families["space"]
        data_ = with_noise(
            data_,
            found,
            complete,
            local.values,
            scale=scale,
            default_rate=noise_prior is None,
            nugget=NUGGET if regular else 0.0,
            weight=weight,
        )
    if shrinkage != "none":
        data_ = with_shrinkage(data_, noise_prior)
    reference = reference_modes(data_, rank)
    constant = constant_data(matrix, weight, data_, reference, local, common)
    keep_kernels(constant, options, families)
    if found is not None:
        keep_noise(constant, found, weight, rank if noise_rank is None else noise_rank)
    if held_out is not None:
        constant["held_out_block"] = ("cell", "time"), held_out.astype(np.int32)
    constant["hidden"] = "mode", bases.hidden
    constant.attrs["mends"] = json.dumps([*mends, *said_of_blocks, *bases.said])
    if shrinkage != "none":
        constant.attrs["shrinkage"] = shrinkage
    frames = ("U", "V") if bases.process is None else ("U",)
    return Problem(
        name="bayesian_svd",
        model=model,
        guide=BayesianSVDGuide() if bases.process is None else None,
        args=(data_,),
        kwargs={"prior": frame_prior},
        coords=labels_of_sites(rank, matrix, local, common),
        data=constant,
        kernel=_sampler(frame_prior, bases.process),
        reparam={name: FrameReparam() for name in frames},
        align=functools.partial(align_draws, reference_space=reference[0], reference_time=reference[1], order=order),
        invariants=functools.partial(
            invariants,
            basis_space=basis_of(data_.space),
            basis_time=basis_of(bases.time),
            reference_space=reference[0],
        ),
        diagnosed=diagnosed_sites(data_),
        rounded=("U", "V" if bases.process is None else "F", *["fixed_effects"] * bool(data_.design.shape[1])),
    )


def _hidden(
    matrix: xr.DataArray, share: float, block: Block | None, num_effects: int
) -> tuple[np.ndarray, np.ndarray | None, list[str]]:
    """Which entries the model sees, the numbers of hidden blocks where some are, and sentences about them."""
    seen = np.isfinite(matrix.values)
    if not share:
        return seen, None, []
    held_out, said = hold_out_blocks(matrix, seen, positions(matrix), share, block, num_effects)
    return seen & (held_out < 0), held_out, said


def _estimated(
    matrix: xr.DataArray,
    values: Tensor,
    seen: np.ndarray,
    local: xr.DataArray,
    reduced_data: MatrixData,
    noise_rank: int | None,
    rank: int,
) -> tuple[Noise, np.ndarray]:
    """The covariance of correlated noise, about ``noise_rank`` modes, and the data without gaps."""
    assert reduced_data.series is not None
    distance, steps = space_distance(matrix).numpy(), reduced_data.series.steps.numpy()
    if noise_rank is None:
        return estimate_noise(values.numpy(), seen, local.values, steps, distance, rank)
    return noise_about(Table(values.numpy(), seen, local.values, steps, distance), noise_rank)


def _sampler(frame_prior: str, process: SeriesData | None) -> Any:
    """The block sampler, where it serves the prior."""
    if frame_prior not in ("conditioned", "uniform"):
        return None
    return BlockGibbs if process is None else SeriesGibbs


def tiny() -> Problem:
    """Twelve cells, eleven times, one gap, two modes; for conformance tests."""
    rng = np.random.default_rng(0)
    x, t = np.linspace(0, 1, 12), np.linspace(0, 1, 11)
    signal = np.outer(np.sin(3 * x), np.cos(7 * t)) + 0.6 * np.outer(np.cos(5 * x), np.sin(9 * t))
    values = 3 * signal + 0.1 * rng.standard_normal(signal.shape)
    values[4, 5] = np.nan
    data = xr.DataArray(values, dims=("cell", "time"), coords={"cell": x, "time": t})
    return make_problem(data, rank=2, length_scales_space=[0.15, 0.3, 0.6], tail=0.0, area_weights=False)
