"""How many modes a field has: blocks of space and time are hidden, and each number of modes fills them.

Single hidden entries would not do. Their neighbours in space and time tell nearly all of them, so that they reward
modes that fit the noise. A block is large enough that only what is shared with the rest of the field can fill it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import numpy as np
import xarray as xr
from annotated_types import Interval, Len
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from threadpoolctl import threadpool_limits
from tqdm.auto import tqdm

from probmodels._axes import BLUE, RED, SMALL, clean
from probmodels.bayesian_svd.prepare import make_problem
from probmodels.bayesian_svd.quick import QuickFit, Table, quick_fit
from probmodels.bayesian_svd.sides import space_distance
from probmodels.errors import DataError
from probmodels.options import Count, Positive, Seed, checked

__all__ = ["compare_ranks", "draw_ranks", "hide_blocks"]

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
Block = tuple[Count, Count, Count]

_BLOCK = (6, 3, 4)
_LEAST = 10  # blocks
_TRIES = 50  # places looked at for each block
_KEPT = 0.4  # share of the values of each cell that stays
_LEVEL = 0.95


@checked(DataError)
@threadpool_limits.wrap(limits=1)
def compare_ranks(
    data: xr.DataArray | xr.Dataset,
    ranks: Annotated[Sequence[Annotated[int, Interval(ge=1, le=10_000)]], Len(1, 100)] = (1, 2, 3, 4, 5, 6, 8, 10),
    *,
    fixed_effects: Sequence[str] = ("intercept",),
    covariates: Mapping[str, ArrayLike] | None = None,
    area_weights: bool | Annotated[Sequence[Positive], Len(1)] = True,
    block: Block | None = None,
    share: Annotated[float, Interval(gt=0, le=0.5)] = 0.15,
    noise: Literal["correlated", "white"] = "correlated",
    seed: Seed = 0,
    progress: bool = True,
) -> xr.Dataset:
    """Compare numbers of modes by how well they fill hidden blocks of the data.

    Each number is fitted without sampling (`probmodels.bayesian_svd.quick`) to what is left, and gives a normal
    distribution of each hidden entry.

    Parameters
    ----------
    data
        As `make_problem` takes it: (cell, time), or a field (time, lat, lon); missing entries NaN.
    ranks
        Numbers of modes.
    fixed_effects, covariates, area_weights
        As in `make_problem`.
    block
        Times, and cells along latitude and longitude, of a hidden block. Cells without a grid are hidden together with
        their nearest ones, as many as the product of the last two. None for 6, 3 and 4, or less where the data are
        small: at most a tenth of the times and a quarter of each axis.
    share
        Share of the entries to hide.
    noise
        ``"correlated"`` between cells and times, with a level of each cell, or ``"white"``.
    seed
        Seed of the places of the blocks.
    progress
        Whether to show a progress bar.

    Returns
    -------
    xr.Dataset
        Over ``rank``: ``rmse``, ``crps``, ``log_score`` (mean log density) and ``coverage`` (of 95 % intervals) of
        hidden entries in units of the data, each with its standard error over blocks (``..._se``); ``loss``, the mean
        log density of the best rank less that of each, with the standard error of this paired difference; and
        ``num_modes``, how many modes exceed noise: where these are fewer than the rank, the rest count for nothing,
        and the rank is not chosen. Over (rank, block) ``square`` and ``density``, and over block ``size``: sums of
        squares and of log densities, and the number of entries. Over (rank, axis) ``spectrum``: the variance of the
        data along each axis in coordinates where noise is white, over that of noise, and over rank ``edge``, what
        noise alone exceeds in 5 of 100 data sets. Attributes: ``best``, the rank of largest log density among those
        whose modes all exceed noise; ``chosen``, the smallest whose loss is within one standard error; ``sentence``,
        which says so; ``block``.

    Raises
    ------
    DataError
        For data that `make_problem` refuses or a rank that they do not carry, a block larger than the data, or fewer
        than ten blocks.
    """
    ranks = sorted(set(ranks))
    problem = make_problem(
        data,
        rank=ranks[-1],
        series="ar1",
        frame_prior="uniform",
        fixed_effects=fixed_effects,
        covariates=covariates,
        area_weights=area_weights,
    )
    assert problem.data is not None
    constant = problem.data
    values = constant["data"].transpose("cell", "time").values.astype(float)
    seen, root = np.isfinite(values), np.sqrt(constant["weight"].values)[:, None]
    if "fixed_effects_design" in constant:
        design = constant["fixed_effects_design"].transpose("time", ...).values.astype(float)
    else:
        design = np.zeros((values.shape[1], 0))
    distance = space_distance(constant["data"]).numpy()
    size = _block(constant, block)
    blocks = hide_blocks(constant, seen, distance, size, share, design.shape[1], seed)
    hidden = blocks >= 0
    table = Table(
        np.where(seen & ~hidden, values * root, 0.0), seen & ~hidden, design, constant["time_steps"].values, distance
    )
    fits: list[QuickFit] = []
    for rank in tqdm(ranks, desc="ranks", disable=not progress):
        start = fits[-1] if fits else None
        rng = np.random.default_rng(seed)
        fits.append(quick_fit(table, rank, correlated=noise == "correlated", rng=rng, start=start))
    truth = values[hidden]
    scale = np.broadcast_to(root, values.shape)[hidden]
    means = np.array([fit.mean[hidden] / scale for fit in fits])
    sds = np.array([np.sqrt(fit.variance[hidden]) / scale for fit in fits])
    num_modes = [int(np.sum(fit.spectrum[:rank] > fit.edge)) for rank, fit in zip(ranks, fits, strict=True)]
    found = _scored(truth, means, sds, blocks[hidden], ranks, num_modes)
    found["spectrum"] = ("rank", "axis"), np.array([fit.spectrum for fit in fits])
    found["edge"] = "rank", [fit.edge for fit in fits]
    units = str(constant["data"].attrs.get("units", "1"))
    found.attrs |= {"block": size, "share": float(hidden.sum() / seen.sum()), "noise": noise, "seed": seed}
    found.attrs["units"] = units
    found.attrs["sentence"] = _sentence(found, size)
    return found


def _block(constant: xr.Dataset, block: Block | None) -> Block:
    """The block as given, or that of the data."""
    num_cells, num_times = (constant["data"].sizes[name] for name in ("cell", "time"))
    if "lat_index" in constant.coords:
        axes = [len(np.unique(constant[name].values)) for name in ("lat_index", "lon_index")]
    else:
        axes = [max(int(np.sqrt(num_cells)), 1)] * 2
    if block is None:
        times = max(min(_BLOCK[0], num_times // 10), 1)
        return (times, max(min(_BLOCK[1], axes[0] // 4), 1), max(min(_BLOCK[2], axes[1] // 4), 1))
    names = ("times", "cells along latitude", "cells along longitude")
    for name, own, most in zip(names, block, (num_times, *axes), strict=True):
        if own > max(most // 2, 1):
            raise DataError(
                f"block={tuple(block)} is too large: the data have {most} {name}, of which a block may "
                f"have {max(most // 2, 1)}; take a smaller block"
            )
    return block


def hide_blocks(
    constant: xr.Dataset, seen: Mask, distance: Array, block: Block, share: float, num_effects: int, seed: int
) -> NDArray[np.int64]:
    """Number of the block in which each entry is hidden (n, T), -1 where it is not.

    Parameters
    ----------
    constant
        Holds ``data (cell, time)``, with coordinates ``lat_index`` and ``lon_index`` where cells are on a grid.
    seen
        True where observed (n, T).
    distance
        Distances of the cells (n, n).
    block
        Times, and cells along latitude and longitude.
    share
        Of the observed entries to hide.
    num_effects
        Effects of each cell, for which enough values stay.
    seed
        Of the places.

    Raises
    ------
    DataError
        If fewer than ten blocks can be hidden.
    """
    (n, num_times), (length, rows, columns) = seen.shape, block
    wanted = share * seen.sum()
    advice = "take a smaller block or a larger share"
    if (expected := wanted / (length * min(rows * columns, n))) < _LEAST:
        raise DataError(
            f"share={share} of {seen.sum()} entries are {expected:.1f} blocks of {length} x {rows} x {columns}; at "
            f"least {_LEAST} are needed to tell ranks apart; {advice}"
        )
    rng = np.random.default_rng(seed)
    index = [constant[name].values for name in ("lat_index", "lon_index") if name in constant.coords]
    out = np.full(seen.shape, -1)
    left = seen.sum(axis=1)
    least = np.maximum(_KEPT * left, num_effects + 3)
    count = done = 0
    for _ in range(_TRIES * (int(expected) + 1)):
        if done >= wanted:
            break
        cell, first = int(rng.integers(n)), int(rng.integers(num_times - length + 1))
        if len(index) == 2:
            south, west = (axis[cell] - rng.integers(width) for axis, width in zip(index, block[1:], strict=True))
            inside = (index[0] >= south) & (index[0] < south + rows) & (index[1] >= west) & (index[1] < west + columns)
        else:
            inside = np.zeros(n, dtype=bool)
            inside[np.argsort(distance[cell], kind="stable")[: rows * columns]] = True
        place = np.zeros_like(seen)
        place[inside, first : first + length] = True
        place &= seen & (out < 0)
        lost = place.sum(axis=1)
        if 2 * place.sum() < length * inside.sum() or (left - lost < least)[lost > 0].any():
            continue
        out[place] = count
        left -= lost
        count, done = count + 1, done + int(place.sum())
    if count < _LEAST:
        raise DataError(f"only {count} blocks fit into what is observed; at least {_LEAST} are needed; {advice}")
    return out


def _scored(
    truth: Array, means: Array, sds: Array, block: NDArray[np.int64], ranks: Sequence[int], num_modes: Sequence[int]
) -> xr.Dataset:
    """Scores of ranks at hidden entries (rank, entry), with standard errors over blocks, and the choice."""
    places = np.unique(block, return_inverse=True)[1]
    size = np.bincount(places).astype(float)

    def by_block(entries: Array) -> Array:
        return np.array([np.bincount(places, row) for row in entries])

    def averaged(sums: Array) -> tuple[Array, Array]:
        """Mean over entries and its standard error over blocks, of sums (rank, block)."""
        mean = sums.sum(1) / size.sum()
        rest = sums - mean[:, None] * size
        return mean, np.sqrt(len(size) / (len(size) - 1) * np.sum(rest**2, axis=1)) / size.sum()

    errors = truth - means
    z = errors / sds
    crps = sds * (z * (2 * stats.norm.cdf(z) - 1) + 2 * stats.norm.pdf(z) - 1 / np.sqrt(np.pi))
    square = by_block(errors**2)
    mean, se = averaged(square)
    out = xr.Dataset(coords={"rank": list(ranks)})
    out["rmse"], out["rmse_se"] = ("rank", np.sqrt(mean)), ("rank", se / (2 * np.sqrt(mean)))
    inside = (np.abs(z) < stats.norm.ppf((1 + _LEVEL) / 2)).astype(float)
    density = by_block(stats.norm.logpdf(errors, scale=sds))
    for name, sums in (("crps", by_block(crps)), ("log_score", density), ("coverage", by_block(inside))):
        mean, se = averaged(sums)
        out[name], out[f"{name}_se"] = ("rank", mean), ("rank", se)
    out["num_modes"] = "rank", list(num_modes)
    # A rank of which some modes do not exceed noise is a lower rank in truth.
    full = np.array(num_modes) == np.array(ranks)
    full[0] |= not full.any()
    best = int(np.argmax(np.where(full, out["log_score"].values, -np.inf)))
    loss, se = averaged(density[best] - density)
    out["loss"], out["loss_se"] = ("rank", loss), ("rank", se)
    out["square"], out["density"] = (("rank", "block"), square), (("rank", "block"), density)
    out["size"] = "block", size
    out.attrs = {"best": int(ranks[best]), "chosen": int(ranks[int(np.argmax(full & (loss <= se)))])}
    return out


def _sentence(found: xr.Dataset, block: Block) -> str:
    """What the comparison says, in words."""
    best, chosen, ranks = found.attrs["best"], found.attrs["chosen"], found["rank"].values
    units = "" if found.attrs["units"] == "1" else f" {found.attrs['units']}"
    one = found.sel(rank=best)
    text = (
        f"{found.sizes['block']} hidden blocks of {block[0]} times x {block[1]} x {block[2]} cells are filled best by "
        f"{best} mode{'s' * (best > 1)} (root mean square error {float(one['rmse']):.3g} ± {float(one['rmse_se']):.1g}"
        f"{units})"
    )
    if chosen < best:
        text += f"; {chosen} do as well within one standard error"
    if best == ranks[-1] and len(ranks) > 1:
        text += f". That is the largest number compared: more may fill better, so compare more than {best}"
    return text + "."


@checked(DataError)
def draw_ranks(comparison: xr.Dataset) -> Figure:
    """Errors by number of modes, and variances along all axes beside the edge of noise.

    Parameters
    ----------
    comparison
        From `compare_ranks`.
    """
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    rank, chosen, best = comparison["rank"].values, comparison.attrs["chosen"], comparison.attrs["best"]
    left.errorbar(rank, comparison["rmse"], comparison["rmse_se"], color=BLUE, marker="o", markersize=4, capsize=2)
    for place, colour, words in ((best, BLUE, "least error"), (chosen, RED, "fewest within one standard error")):
        left.axvline(place, color=colour, linewidth=0.8, linestyle="--", label=f"{words}: {place}")
    left.set_xlabel("number of modes")
    units = comparison.attrs["units"]
    left.set_ylabel("error of hidden blocks" + ("" if units == "1" else f" ({units})"), fontsize=SMALL)
    left.legend(fontsize=SMALL, frameon=False)

    widest = comparison.isel(rank=-1)
    shown = min(comparison.sizes["axis"], max(2 * int(rank[-1]), int(rank[-1]) + 5))
    axis, spectrum = np.arange(1, shown + 1), widest["spectrum"].values[:shown]
    reported = axis <= chosen
    for which, colour, words in ((reported, RED, f"the {chosen} chosen"), (~reported, BLUE, "beyond them")):
        right.plot(axis[which], spectrum[which], "o", color=colour, markersize=4, label=words)
    right.axhline(float(widest["edge"]), color="0.4", linewidth=0.8, linestyle="--", label="edge of noise")
    right.set_yscale("log")
    right.set_xlabel("mode")
    right.set_ylabel("variance over that of noise", fontsize=SMALL)
    right.legend(fontsize=SMALL, frameon=False)
    for ax in (left, right):
        clean(ax)
    return figure
