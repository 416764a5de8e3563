"""How many modes a field has: blocks of space and time are hidden, and each number of modes fills them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import numpy as np
import xarray as xr
from annotated_types import Interval, Len
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from threadpoolctl import threadpool_limits
from tqdm.auto import tqdm

from probmodels.bayesian_svd.gaps.blocks import Block, choose_block, hide_blocks
from probmodels.bayesian_svd.gaps.quick import QuickFit, Table, quick_fit
from probmodels.bayesian_svd.prepare import make_problem
from probmodels.bayesian_svd.sides import positions, space_distance
from probmodels.errors import DataError
from probmodels.options import Positive, Seed, checked

__all__ = ["compare_ranks"]

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

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

    Each number is fitted without sampling (`probmodels.bayesian_svd.gaps.quick`) to what is left, and gives a normal
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
        Over ``rank``: ``rmse``, ``crps`` and ``coverage`` (of 95 % intervals) of hidden entries in units of the data,
        each with its standard error over blocks (``..._se``); ``excess``, the mean square error over that of the best
        rank, with the standard error of this paired difference; and ``num_modes``, how many modes exceed noise: where
        these are fewer than the rank, the rest count for nothing, and the rank is not chosen. Over (rank, block)
        ``square`` and over block ``size``: sum of squares and number of entries. Over (rank, axis) ``spectrum``: the
        variance of the data along each axis in coordinates where noise is white, over that of noise, and over rank
        ``edge``, what noise alone exceeds in 5 of 100 data sets. Attributes: ``best``, the rank of least error among
        those whose modes all exceed noise; ``chosen``, the smallest whose excess is within one standard error;
        ``sentence``, which says so; ``block``.

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
    size = choose_block(constant, block)
    blocks = hide_blocks(constant, seen, positions(constant["data"]), size, share, design.shape[1], seed)
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
    for name, entries in (("crps", crps), ("coverage", inside)):
        mean, se = averaged(by_block(entries))
        out[name], out[f"{name}_se"] = ("rank", mean), ("rank", se)
    out["num_modes"] = "rank", list(num_modes)
    # A rank of which some modes do not exceed noise is a lower rank in truth.
    full = np.array(num_modes) == np.array(ranks)
    full[0] |= not full.any()
    best = int(np.argmin(np.where(full, out["rmse"].values, np.inf)))
    excess, se = averaged(square - square[best])
    out["excess"], out["excess_se"] = ("rank", excess), ("rank", se)
    out["square"], out["size"] = (("rank", "block"), square), ("block", size)
    out.attrs = {"best": int(ranks[best]), "chosen": int(ranks[int(np.argmax(full & (excess <= se)))])}
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
    sharpest = int(found["rank"][int(np.argmin(found["crps"].values))])
    if sharpest not in (best, chosen):
        text += f". CRPS is least with {sharpest} modes: these have the best intervals"
    if best == ranks[-1] and len(ranks) > 1:
        text += f". That is the largest number compared: more may fill better, so compare more than {best}"
    return text + "."
