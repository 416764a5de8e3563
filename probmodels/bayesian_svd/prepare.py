"""From a labelled matrix to a `Problem` of the Bayesian singular value decomposition."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
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
from probmodels.bayesian_svd.effects import effect_design, time_in_years
from probmodels.bayesian_svd.gaps.blocks import Block, hold_out_blocks
from probmodels.bayesian_svd.gaps.quick import Table, noise_about
from probmodels.bayesian_svd.model import FRAME_PRIORS, Gaps, MatrixData, SeriesData, SideData, model
from probmodels.bayesian_svd.noise import Noise, estimate_noise, with_noise
from probmodels.bayesian_svd.patterns.shrinkage import with_shrinkage
from probmodels.bayesian_svd.sampler import BlockGibbs
from probmodels.bayesian_svd.series_grid import series_data
from probmodels.bayesian_svd.series_sampler import SeriesGibbs
from probmodels.bayesian_svd.sides import (
    Grid as SpaceGrid,
    check_bases,
    check_room,
    leading_patterns,
    make_side,
    points,
    positions,
    space_distance,
    space_side,
)
from probmodels.datasets.calendars import decode_times
from probmodels.datasets.labelled import arranged
from probmodels.distributions.covariance import KERNELS, Kernel, time_distance
from probmodels.distributions.frames import FrameReparam
from probmodels.errors import CovarianceError, DataError
from probmodels.guides.bayesian_svd import BayesianSVDGuide
from probmodels.inference.problem import Problem
from probmodels.options import OneOf, Positive, checked, refuse_unused

__all__ = ["make_problem", "tiny"]

_MIN_TIMES = 10
_TAIL_TIME = 1e-6
_MOST_CORRELATED = 5_000  # cells: matrices of cells by cells
_KERNELS_SPACE = tuple(name for name in KERNELS if name != "periodic")

SpaceKernel = Annotated[str, OneOf(_KERNELS_SPACE)]
Scale = Annotated[float, Interval(ge=1e-12, le=1e12)]
Grid = Annotated[Sequence[Positive], Len(1)]


def _matrix(data: xr.DataArray | xr.Dataset) -> tuple[xr.DataArray, list[str]]:
    """The data as (cell, time), land dropped, and a sentence for each repair, those of earlier steps included."""
    try:
        mends: list[str] = list(map(str, json.loads(data.attrs.get("mends", "[]"))))
    except (TypeError, ValueError):  # an attribute of that name from elsewhere
        mends = []
    if isinstance(data, xr.Dataset):
        if "data" not in data:
            raise DataError(f"data hold {list(data.data_vars)}; give an array, or a data set with an array 'data'")
        data = data["data"]
    if {"lat", "lon"} <= set(data.dims):
        from probmodels.datasets.sst import to_matrix

        data = to_matrix(data)
    if data.ndim != 2:
        raise DataError(f"data has dims {tuple(map(str, data.dims))}; expected (cell, time) or (time, lat, lon)")
    row, column = data.dims
    data = data.rename({k: v for k, v in ((row, "cell"), (column, "time")) if k != v}).astype(np.float64)
    if np.isinf(data.values).any():
        raise DataError(f"data holds {int(np.isinf(data.values).sum())} infinite entries; mark missing entries by NaN")
    seen = np.isfinite(data.values)
    if not seen.any():
        raise DataError("data holds no finite entry")
    land = ~seen.any(axis=1)
    if land.any():
        mends.append(f"{int(land.sum())} of {land.size} cells never hold a value; they are land and left out")
        data = data[~land]
    if data.sizes["time"] < _MIN_TIMES:
        raise DataError(f"data has {data.sizes['time']} times; at least {_MIN_TIMES} are needed")
    empty = ~np.isfinite(data.values).any(axis=0)
    if empty.any():
        raise DataError(
            f"{int(empty.sum())} times hold no value at all, the first at index {int(np.argmax(empty))}; drop them, or "
            "choose a period without them (--period)"
        )
    with np.errstate(invalid="ignore"):
        spread = np.nanmax(data.values, axis=1) - np.nanmin(data.values, axis=1)
    if (spread == 0).any():
        raise DataError(
            f"{int((spread == 0).sum())} cells are constant in time, the first at index {int(np.argmax(spread == 0))}; "
            "drop them (load_sst and the command sst take them for land)"
        )
    for name in ("cell", "time"):
        if name not in data.coords:
            data = data.assign_coords({name: np.arange(data.sizes[name])})
    if data["time"].dtype.kind in "OSU":
        dates, _ = decode_times(data["time"].values, {}, where="the axis 'time'")
        data = data.assign_coords(time=dates)
    return data, mends


def _weights(data: xr.DataArray, area_weights: bool | Sequence[float]) -> np.ndarray:
    size = data.sizes["cell"]
    if area_weights is False:
        return np.ones(size)
    if area_weights is True:
        if "lat" not in data.coords:
            return np.ones(size)
        if "area_weight" in data.coords:
            weight = np.asarray(data["area_weight"].values, dtype=np.float64)
        else:
            weight = np.cos(np.deg2rad(np.asarray(data["lat"].values, dtype=np.float64)))
        if (weight <= 1e-6).any():
            raise DataError(
                "area weights vanish at the poles; leave out cells at latitude ±90 (--region=-89,89,0,360) or set "
                "area_weights=False (--set model.area_weights=false)"
            )
    else:
        given = arranged(area_weights, "area_weights", {"cell": data["cell"].values})
        weight = np.asarray(given, dtype=np.float64)
        if weight.shape != (size,):
            raise DataError(f"area_weights has {len(weight)} numbers; give {size}, one for each cell, or true or false")
    return weight / weight.mean()


def _families(name: str, kernel: str | Sequence[str], rank: int) -> list[str]:
    """Kernel of each mode."""
    families = [kernel] * rank if isinstance(kernel, str) else list(kernel)
    if len(families) != rank:
        raise DataError(f"kernel_{name} lists {len(families)} kernels for {rank} modes; give one name or one per mode")
    return families


def _check_unused(options: Mapping[str, Any], families: Mapping[str, Sequence[str]]) -> None:
    """Refuse options that the frame prior, kernels, noise and effects in question do not use."""

    def refuse(branch: str, *names: str) -> None:
        refuse_unused(make_problem, branch, **{name: options[name] for name in names})

    if not options["hold_out"]:
        refuse("hold_out=0", "hold_out_block")
    _check_frames(refuse, options)
    _check_noise(options, refuse)
    _check_kernels(refuse, options, families)
    _check_effects(refuse, options)


_LENGTHS = {name: (f"length_scales_{name}", f"length_prior_{name}") for name in ("space", "time")}


def _check_frames(refuse: Callable[..., None], options: Mapping[str, Any]) -> None:
    """Refuse what a uniform prior of the patterns, and series that are a process, do not use."""
    if options["series"] == "frame" and options["shrinkage"] != "none":
        raise DataError("shrinkage needs series that are a process: series='ar1', 'matern32', ...")
    matern = options["series"].startswith("matern")  # whose series have length-scales too
    if options["frame_prior"] == "uniform":
        kernels = ("kernel_space", "kernel_time", *_LENGTHS["space"], *(() if matern else _LENGTHS["time"]))
        refuse("frame_prior='uniform'", *kernels, "num_length_scales", "period", "nugget", "tail", "max_basis")
    if options["series"] != "frame":
        unused = ("period",) if matern else (*_LENGTHS["time"], "period")
        refuse(f"series={options['series']!r}", "kernel_time", *unused)


def _check_kernels(
    refuse: Callable[..., None], options: Mapping[str, Any], families: Mapping[str, Sequence[str]]
) -> None:
    """Refuse what kernels without a length-scale, or with given ones, do not use."""
    smooth = [name for name, kinds in families.items() if set(kinds) != {"identity"}]
    for name, (scales, prior) in _LENGTHS.items():
        if name not in smooth and not (name == "time" and options["series"].startswith("matern")):
            refuse(f"kernel_{name}='identity'", scales, prior)
        elif options[scales] is not None and len(options[scales]) == 1:
            refuse(f"a single value of {scales}", prior)
    if not smooth:
        refuse("kernels 'identity'", "nugget", "tail", "max_basis")
    if options["tail"] == 0:
        refuse("tail=0", "max_basis")
    if all(options[_LENGTHS[name][0]] is not None for name in smooth):
        refuse("the length-scales given", "num_length_scales")
    if "periodic" not in families["time"]:
        refuse("kernels that are not 'periodic'", "period")
    elif options["period"] is None:
        raise DataError("kernel_time 'periodic' needs a period; give it in the unit of the time axis")


def _check_effects(refuse: Callable[..., None], options: Mapping[str, Any]) -> None:
    """Refuse what the effects do not use."""
    named = {*options["fixed_effects"], *options["shared_effects"]}
    if not named:
        refuse("no effects", "effect_scale", "covariates")
    if options["effect_scale"] is not None and options["tail"]:  # effects of proper prior need bases of full rank
        refuse("a proper prior of the effects", "tail")
    for name in options["covariates"] or ():
        if name not in named:
            raise DataError(f"covariates[{name!r}] is in neither fixed_effects nor shared_effects; name it there")


def _check_noise(options: Mapping[str, Any], refuse: Callable[..., None]) -> None:
    """Refuse options that do not go with the noise."""
    if options["noise"] == "white":
        refuse("noise='white'", "noise_rank")
        return
    if options["series"] == "frame":
        raise DataError("noise='correlated' needs series that are a process: series='ar1', 'matern32', ...")
    for name in ("effect_scale", "shared_effects"):
        if options[name]:
            raise DataError(f"noise='correlated' has effects of flat prior, each cell's own: leave out {name}")
    if options["noise_rank"] is None and options["shrinkage"] != "none":
        raise DataError(
            "shrinkage with noise='correlated' needs noise_rank, the number of modes about which noise is estimated "
            "(about as many as rank it comes out too small, and the number of modes too large); probmodels ranks finds "
            "it (--set model.noise_rank=4)"
        )
    if options["noise_rank"] is not None and options["noise_rank"] > options["rank"]:
        raise DataError(f"noise_rank={options['noise_rank']}; give at most the rank, {options['rank']}")


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
    nugget: Annotated[float, Interval(ge=0, le=100)] = 1e-6,
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
        White share of each covariance, relative to its variance.
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
    uniform = frame_prior == "uniform"
    named = {"space": kernel_space, "time": kernel_time}
    families = {name: _families(name, "identity" if uniform else kernel, rank) for name, kernel in named.items()}
    _check_unused(options, families)
    alike = all(isinstance(kernel, str) for kernel in named.values())
    order = order or ("scale" if alike else "label")
    if frame_prior == "macg" and not alike:
        raise DataError(
            "the prior 'macg' has one kernel for all modes: give kernel_space and kernel_time as one name each"
        )
    matrix, mends = _matrix(data)
    local = effect_design(matrix["time"], fixed_effects, covariates)
    common = effect_design(matrix["time"], shared_effects, covariates)
    num_effects = local.sizes["effect"]
    seen = np.isfinite(matrix.values)
    held_out: np.ndarray | None = None
    if hold_out:
        held_out, said_of_blocks = hold_out_blocks(
            matrix, seen, positions(matrix), hold_out, hold_out_block, num_effects
        )
        mends += said_of_blocks
        seen &= held_out < 0
    _check_field(matrix, seen, local, common, options)
    weight = _weights(matrix, area_weights)
    values = torch.as_tensor(np.where(seen, matrix.values, 0.0) * np.sqrt(weight)[:, None])
    q, r = np.linalg.qr(local.values)
    design, design_root = torch.as_tensor(q), torch.as_tensor(r)
    if num_effects:
        _check_told_apart(seen, q, list(local["effect"].values))

    mask = torch.as_tensor(seen)
    filled = _fill(values, mask, design)
    leading = leading_patterns(filled - (filled @ design) @ design.T, rank)
    try:
        space, said, hidden = space_side(matrix, leading, None if uniform else weight, _space_grid(families, options))
        time, process = _time_side(matrix, design, families["time"], options)
    except CovarianceError as error:
        raise DataError(str(error)) from error
    check_bases({"space": space, "time": time}, rank)

    data_ = _reduce(
        values,
        filled,
        mask,
        space=space,
        time=time,
        design=design,
        design_root=design_root,
        weight=torch.as_tensor(weight),
        common=torch.as_tensor(common.values),
        effect_scale=effect_scale,
        scale=scale,
        noise_prior=noise_prior,
        series=process,
    )
    found: Noise | None = None
    if noise == "correlated":
        assert process is not None
        distance, steps = space_distance(matrix).numpy(), process.steps.numpy()
        if noise_rank is None:
            found, complete = estimate_noise(values.numpy(), seen, local.values, steps, distance, rank)
        else:
            table = Table(values.numpy(), seen, local.values, steps, distance)
            found, complete = noise_about(table, noise_rank)
        data_ = with_noise(data_, found, complete, local.values, scale=scale, default_rate=noise_prior is None)
    if shrinkage != "none":
        data_ = with_shrinkage(data_, noise_prior)
    reference = _reference(data_, rank)
    constant = _constant_data(matrix, weight, data_, reference, local, common)
    _keep_kernels(constant, options, families)
    if found is not None:
        _keep_noise(constant, found, weight)
        constant.attrs["noise_rank"] = rank if noise_rank is None else noise_rank
    if held_out is not None:
        constant["held_out_block"] = ("cell", "time"), held_out.astype(np.int32)
    constant["hidden"] = "mode", hidden
    constant.attrs["mends"] = json.dumps(mends + said)
    if shrinkage != "none":
        constant.attrs["shrinkage"] = shrinkage
    return Problem(
        name="bayesian_svd",
        model=model,
        guide=BayesianSVDGuide() if process is None else None,
        args=(data_,),
        kwargs={"prior": frame_prior},
        coords=_coords(rank, matrix, local, common),
        data=constant,
        kernel=_kernel(frame_prior, process),
        reparam={"U": FrameReparam()} | ({"V": FrameReparam()} if process is None else {}),
        align=functools.partial(align_draws, reference_space=reference[0], reference_time=reference[1], order=order),
        invariants=functools.partial(
            invariants, basis_space=basis_of(data_.space), basis_time=basis_of(time), reference_space=reference[0]
        ),
        diagnosed=_diagnosed(data_),
        rounded=("U", "V" if process is None else "F", *["fixed_effects"] * bool(data_.design.shape[1])),
    )


def _check_field(
    matrix: xr.DataArray, seen: np.ndarray, local: xr.DataArray, common: xr.DataArray, options: Mapping[str, Any]
) -> None:
    """Check that field, memory, effects and noise go together, before anything is computed."""
    _check_extent(options["rank"], seen, local.sizes["effect"])
    check_room(seen.shape[0], seen.shape[1], options["max_basis"])
    overlap = set(local["effect"].values) & set(common["effect"].values)
    if options["effect_scale"] is None and overlap:
        raise DataError(
            f"{sorted(overlap)} cannot be local and shared at once under a flat prior; drop one or set effect_scale"
        )
    if options["noise"] == "correlated" and matrix.sizes["cell"] > _MOST_CORRELATED:
        raise DataError(
            f"noise='correlated' takes at most {_MOST_CORRELATED} cells, not {matrix.sizes['cell']}; take a coarser "
            "grid or a smaller region, or noise='white'"
        )


def _tail(options: Mapping[str, Any]) -> float | None:
    """Share of variance that a basis may leave out.

    Effects of proper prior act outside a truncated basis, which the projected likelihood cannot see: none.
    """
    tail: float | None = options["tail"]
    return tail if options["effect_scale"] is None else 0.0


def _space_grid(families: Mapping[str, Sequence[str]], options: Mapping[str, Any]) -> SpaceGrid:
    """What is known of the candidates in space."""
    return SpaceGrid(
        families["space"],
        options["length_scales_space"],
        options["length_prior_space"],
        options["num_length_scales"],
        options["nugget"],
        _tail(options),
        options["max_basis"],
    )


def _time_side(
    matrix: xr.DataArray, design: Tensor, kinds: Sequence[str], options: Mapping[str, Any]
) -> tuple[SideData, SeriesData | None]:
    """The side of time, and its process where series are one."""
    series, scales, prior = (options[name] for name in ("series", *_LENGTHS["time"]))
    if series != "frame":
        process = series_data(matrix["time"], series, options["rank"], scales, prior)
        return points(matrix.sizes["time"], options["rank"]), process
    if "member" in matrix.coords and set(kinds) != {"identity"}:
        raise DataError("members share their times, so that kernel_time has none; give series='ar1' or 'iid'")
    tail = _tail(options)
    side = make_side(
        "time",
        time_distance(time_in_years(matrix["time"])),
        kinds,
        scales,
        prior,
        complement=design if options["effect_scale"] is None and design.shape[1] else None,
        period=options["period"],
        num_length_scales=options["num_length_scales"],
        nugget=options["nugget"],
        tail=_TAIL_TIME if tail is None else tail,
    )
    return side, None


def _kernel(frame_prior: str, process: SeriesData | None) -> Any:
    """The block sampler, where it serves the prior."""
    if frame_prior not in ("conditioned", "uniform"):
        return None
    return BlockGibbs if process is None else SeriesGibbs


def _check_extent(rank: int, seen: np.ndarray, num_effects: int) -> None:
    """Check that the data (cell, time) are enough for the modes, and each cell for its effects."""
    n, num_times = seen.shape
    if rank > (most := min(n, num_times - num_effects) - 1):
        data = f"{n} cell{'s' * (n != 1)} x {num_times} times with {num_effects} fixed effects"
        if most < 1:
            raise DataError(f"{data} are too few data for any mode; take a larger region or period, or fewer effects")
        raise DataError(f"rank={rank} is out of range: {data} allow 1 to {most}")
    if (seen.sum(1) <= num_effects + 1).any():
        worst = int(np.argmin(seen.sum(1)))
        raise DataError(
            f"cell {worst} holds {seen[worst].sum()} values, too few for {num_effects} fixed effects; "
            "drop it (--min-valid with a higher share), or take fewer effects (--fixed-effects)"
        )


def _check_told_apart(seen: np.ndarray, design: np.ndarray, effects: list[str]) -> None:
    """Check that the orthonormal design (time, effect) keeps full rank at the times that each cell holds."""
    smallest = np.linalg.eigvalsh(np.einsum("nt,tq,ts->nqs", seen.astype(float), design, design))[:, 0]
    if smallest.min() < 1e-10:
        worst = int(smallest.argmin())
        raise DataError(
            f"cell {worst} holds values at {seen[worst].sum()} times, which cannot tell its fixed effects "
            f"{effects} apart; drop the cell (--min-valid with a higher share) or an effect (--fixed-effects)"
        )


def _constant_data(
    matrix: xr.DataArray,
    weight: np.ndarray,
    reduced: MatrixData,
    reference: tuple[np.ndarray, np.ndarray],
    local: xr.DataArray,
    common: xr.DataArray,
) -> xr.Dataset:
    """What a result keeps of the data, to expand its draws."""
    space, time = reduced.space, reduced.time
    constant = xr.Dataset(
        {
            "data": matrix.rename("data"),
            "weight": ("cell", weight),
            "basis_space_matrix": (("cell", "basis_space"), space.basis.numpy()),
            "length_scales_space": ("length_index_space", space.length_scales.numpy()),
            "reference_space": (("basis_space", "mode"), reference[0]),
            "reference_time": (("basis_time" if len(time.basis) else "time", "mode"), reference[1]),
        }
    )
    if len(time.basis):
        constant["basis_time_matrix"] = ("time", "basis_time"), time.basis.numpy()
        constant["length_scales_time"] = "length_index_time", time.length_scales.numpy()
    if reduced.series is not None:
        series = reduced.series
        constant["time_steps"] = "step", series.steps.numpy()
        constant.attrs |= {"series": series.process, "time_step": series.step}
        if series.process != "ar1":
            constant["length_scales_time"] = "length_index_time", series.step * series.scale.numpy()
    if local.sizes["effect"]:
        constant["fixed_effects_design"] = local
    if common.sizes["effect"]:
        constant["shared_effects_design"] = common.rename(effect="shared_effect")
    return constant


def _keep_kernels(constant: xr.Dataset, options: Mapping[str, Any], families: Mapping[str, Sequence[str]]) -> None:
    """The kernel of each side, or those of its modes."""
    for name, kinds in families.items():
        alike = isinstance(options[f"kernel_{name}"], str)
        constant.attrs[f"kernel_{name}"] = kinds[0] if alike else ",".join(kinds)


def _keep_noise(constant: xr.Dataset, noise: Noise, weight: np.ndarray) -> None:
    """What summaries need of the covariance of the noise: levels in data units, correlation, persistence."""
    constant["noise_level"] = "cell", noise.level / np.sqrt(weight)
    constant["noise_vectors"] = ("cell", "noise_component"), noise.vectors.astype(np.float32)
    constant["noise_values"] = "noise_component", noise.values
    constant.attrs |= {"noise_kernel": noise.kernel, "noise_length_scale": noise.length_scale}
    constant.attrs |= {"noise_share": float(noise.share.mean()), "noise_decay": noise.decay}


def _coords(rank: int, matrix: xr.DataArray, local: xr.DataArray, common: xr.DataArray) -> dict[str, Any]:
    """Labels of the axes of sites; effects only where there are some."""
    coords: dict[str, Any] = {
        "mode": range(1, rank + 1),
        "cell": matrix["cell"].values,
        "time": matrix["time"].values,
        "effect": local["effect"].values,
        "shared_effect": common["effect"].values,
    }
    return {name: labels for name, labels in coords.items() if len(labels)}


def _diagnosed(data: MatrixData) -> tuple[str, ...]:
    """Sites whose convergence is judged: length-scales only where there is a choice."""
    names = ["U", "V" if data.series is None else "F", "d", "sigma"]
    names += ["length_scale_space"] * (len(data.space.length_scales) > 1)
    names += ["length_scale_time"] * (len(data.time.length_scales) > 1)
    names += ["autocorrelation"] * (data.series is not None and len(data.series.scale) > 1)
    names += ["shared_effects"] * bool(len(data.shared))
    return tuple(names)


def _fill(values: Tensor, mask: Tensor, design: Tensor) -> Tensor:
    """Data (n, m) with each gap filled by its cell's least-squares effects."""
    if bool(mask.all()):
        return values
    gram = torch.einsum("nt,tq,ts->nqs", mask.to(values.dtype), design, design)
    effects = torch.linalg.solve(gram, (values @ design).unsqueeze(-1)).squeeze(-1)
    return torch.where(mask, values, effects @ design.T)


def _reduce(
    values: Tensor,
    filled: Tensor,
    mask: Tensor,
    space: SideData,
    time: SideData,
    design: Tensor,
    design_root: Tensor,
    weight: Tensor,
    common: Tensor,
    effect_scale: float | None,
    scale: float | None,
    noise_prior: tuple[float, float] | None,
    series: SeriesData | None,
) -> MatrixData:
    """Project weighted data (n, m), zeros in the gaps and filled, and shared covariates on the bases."""
    flat = effect_scale is None
    n = len(values)
    shared_full = torch.einsum("n,mp->pnm", weight.sqrt(), common)

    def centred(x: Tensor) -> Tensor:
        return x - (x @ design) @ design.T if flat else x

    def inside(x: Tensor) -> Tensor:
        return space.basis.T @ (x @ time.basis if len(time.basis) else centred(x))

    centre, shared_centre = centred(filled), centred(shared_full)
    z, shared = inside(filled), inside(shared_full)
    free = int(mask.sum()) - (n * design.shape[1] if flat else 0)
    norm = float(centre.square().sum())
    variation = float((filled - (filled @ design) @ design.T).square().sum())
    if variation == 0:
        raise DataError("nothing is left of the data after the fixed effects; drop effects or check the data")
    shape, rate = noise_prior if noise_prior is not None else (0.5, 0.5e-3 * variation / free)
    gaps = None if bool(mask.all()) else Gaps(values, mask, shared_full)
    number = functools.partial(torch.tensor, dtype=torch.float64)
    shared_scale = effect_scale or 1e3 * math.sqrt(variation / free)
    return MatrixData(
        z=z,
        rest=number(max(norm - float(z.square().sum()), 0.0)),
        num_free=number(free),
        space=space,
        time=time,
        scale=number(scale if scale is not None else math.sqrt(norm / (1 if series is None else values.shape[1]))),
        noise_shape=number(shape),
        noise_rate=number(rate),
        design=design,
        design_root=design_root,
        effect_precision=number(0.0 if effect_scale is None else effect_scale**-2),
        z_design=filled @ design,
        weight=weight,
        shared=shared,
        shared_cross=torch.einsum("pnm,nm->p", shared_centre, centre) - torch.einsum("pij,ij->p", shared, z),
        shared_gram=torch.einsum("pnm,qnm->pq", shared_centre, shared_centre)
        - torch.einsum("pij,qij->pq", shared, shared),
        shared_design=shared_full @ design,
        shared_precision=number(shared_scale**-2),
        gaps=gaps,
        series=series,
    )


def _reference(data: MatrixData, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Leading singular vectors of the reduced data less local effects, (ru, k), (rv, k); patterns of positive sum."""
    along = basis_of(data.time).T @ data.design.numpy()  # zero where the basis avoids the effects
    z = data.z.numpy()
    u, _, vt = np.linalg.svd(z - (z @ along) @ along.T, full_matrices=False)
    u, v = u[:, :rank], vt[:rank].T
    sign = np.where((data.space.basis.numpy() @ u).sum(0) < 0, -1.0, 1.0)
    return u * sign, v * sign


def tiny() -> Problem:
    """Twelve cells, eleven times, one gap, two modes; for conformance tests."""
    rng = np.random.default_rng(0)
    x, t = np.linspace(0, 1, 12), np.linspace(0, 1, 11)
    signal = np.outer(np.sin(3 * x), np.cos(7 * t)) + 0.6 * np.outer(np.cos(5 * x), np.sin(9 * t))
    values = 3 * signal + 0.1 * rng.standard_normal(signal.shape)
    values[4, 5] = np.nan
    data = xr.DataArray(values, dims=("cell", "time"), coords={"cell": x, "time": t})
    return make_problem(data, rank=2, length_scales_space=[0.15, 0.3, 0.6], tail=0.0, area_weights=False)
