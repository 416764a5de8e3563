"""How many modes a field has: blocks of space and time are hidden, and each number of modes fills them.

One set of blocks is too little to tell a weak mode from none: what the best number wins by is mostly chance. So blocks
are hidden several times over, other ones each time, and numbers are compared block by block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, NamedTuple, NoReturn

import numpy as np
import xarray as xr
from annotated_types import Interval, Len
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr, ndtri
from threadpoolctl import threadpool_limits
from tqdm.auto import tqdm

from probmodels.bayesian_svd.gaps.blocks import Block, choose_block, hide_blocks
from probmodels.bayesian_svd.gaps.constant import data_of
from probmodels.bayesian_svd.gaps.quick import QuickFit, Table, quick_fit, table_of
from probmodels.bayesian_svd.sides import positions
from probmodels.errors import DataError
from probmodels.options import Positive, Seed, checked

__all__ = ["compare_ranks"]

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

_LEVEL = 0.95
_TOLD_APART = 2.0  # standard errors of their paired difference from which two numbers are told apart
_AS_GOOD = 1.5  # and up to which the smaller number is chosen


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
    repeats: Annotated[int, Interval(ge=1, le=50)] = 3,
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
    repeats
        How often blocks are hidden, other ones each time. Weak modes need several; cost is in proportion.
    noise
        As in `make_problem`: ``"correlated"`` between near cells and neighbouring times, of a level of each cell, or
        ``"white"``.
    seed
        Seed of the places of the blocks.
    progress
        Whether to show a progress bar.

    Returns
    -------
    xr.Dataset
        Over ``rank``: ``rmse``, ``crps`` and ``coverage`` (of 95 % intervals) of hidden entries in units of the data,
        each with its standard error over blocks (``..._se``); ``excess``, the CRPS over that of the best rank, with the
        standard error of this difference paired by block; ``alike``, whether it is not told apart from the best, by two
        such standard errors; and ``num_modes``, how many modes exceed noise, median over repeats: where these are fewer
        than the rank, the rest count for nothing, and the rank is not chosen. Over (rank, block) ``square`` and over
        block ``size``: sum of squares and number of entries. Over (rank, axis) ``spectrum``: the variance of the data
        along each axis in coordinates where noise is white, over that of noise, mean over repeats, and over rank
        ``edge``, what noise alone exceeds in 5 of 100 data sets. Attributes: ``best``, the rank of least CRPS among
        those whose modes all exceed noise; ``chosen``, the smallest of them whose excess is within 1.5 standard
        errors; ``best_rmse`` and ``best_crps``, of all ranks; ``sentence``, which says so; ``block``.

    Raises
    ------
    DataError
        For data that `make_problem` refuses or a rank that they do not carry, a block larger than the data, or fewer
        than ten blocks.
    """
    ranks = sorted(set(ranks))
    constant = data_of(data, ranks[-1], fixed_effects, covariates, area_weights)
    values, root = constant["data"].transpose("cell", "time").values, np.sqrt(constant["weight"].values)[:, None]
    whole = table_of(constant)
    seen, num_effects = whole.seen, whole.design.shape[1]
    size, places = choose_block(constant, block), positions(constant["data"])
    hidden = [hide_blocks(constant, seen, places, size, share, num_effects, seed + repeat) for repeat in range(repeats)]
    done: list[_Filled] = []
    with tqdm(total=repeats * len(ranks), desc="ranks", disable=not progress) as bar:
        for repeat, blocks in enumerate(hidden):
            left = seen & (blocks < 0)
            table = whole._replace(values=np.where(left, whole.values, 0.0), seen=left)
            done.append(_filled(table, ranks, values, root, blocks, noise == "correlated", seed + repeat, bar))
    found = _scored(done, ranks)
    units = str(constant["data"].attrs.get("units", "1"))
    shares = [float((blocks >= 0).sum() / seen.sum()) for blocks in hidden]
    found.attrs |= {"block": size, "share": float(np.mean(shares)), "repeats": repeats, "noise": noise, "seed": seed}
    found.attrs["units"] = units
    found.attrs["sentence"] = _sentence(found, size)
    return found


class _Filled(NamedTuple):
    """Hidden entries as each rank fills them: ``truth (L,)``, ``block (L,)``, ``means`` and ``sds (rank, L)``; how many
    modes exceed noise ``num_modes (rank,)``, ``spectrum (rank, axis)`` and ``edge (rank,)``."""

    truth: Array
    block: NDArray[np.int64]
    means: Array
    sds: Array
    num_modes: NDArray[np.int64]
    spectrum: Array
    edge: Array


def _filled(
    table: Table,
    ranks: Sequence[int],
    values: Array,
    root: Array,
    blocks: NDArray[np.int64],
    correlated: bool,
    seed: int,
    bar: tqdm[NoReturn],
) -> _Filled:
    """Fits of all ranks to what is left of values (n, T), each begun from the one before."""
    hidden, fits = blocks >= 0, list[QuickFit]()
    for rank in ranks:
        start = fits[-1] if fits else None
        fits.append(quick_fit(table, rank, correlated=correlated, rng=np.random.default_rng(seed), start=start))
        bar.update()
    scale = np.broadcast_to(root, values.shape)[hidden]
    return _Filled(
        values[hidden],
        blocks[hidden],
        np.array([fit.mean[hidden] / scale for fit in fits]),
        np.array([np.sqrt(fit.variance[hidden]) / scale for fit in fits]),
        np.array([np.sum(fit.spectrum[:rank] > fit.edge) for rank, fit in zip(ranks, fits, strict=True)]),
        np.array([fit.spectrum for fit in fits]),
        np.array([fit.edge for fit in fits]),
    )


def _scored(done: Sequence[_Filled], ranks: Sequence[int]) -> xr.Dataset:
    """Scores of ranks at hidden entries, with standard errors over blocks, and the choice."""
    first = np.cumsum([0, *(part.block.max() + 1 for part in done[:-1])])
    blocks = np.concatenate([part.block + start for part, start in zip(done, first, strict=True)])
    places = np.unique(blocks, return_inverse=True)[1]
    size = np.bincount(places).astype(float)

    def by_block(entries: Array) -> Array:
        return np.array([np.bincount(places, row) for row in entries])

    def averaged(sums: Array) -> tuple[Array, Array]:
        """Mean over entries and its standard error over blocks, of sums (rank, block)."""
        mean = sums.sum(1) / size.sum()
        rest = sums - mean[:, None] * size
        return mean, np.sqrt(len(size) / (len(size) - 1) * np.sum(rest**2, axis=1)) / size.sum()

    truth = np.concatenate([part.truth for part in done])
    means, sds = (np.concatenate([getattr(part, name) for part in done], axis=1) for name in ("means", "sds"))
    errors = truth - means
    z = errors / sds
    density = np.exp(-0.5 * z**2) / np.sqrt(2 * np.pi)
    crps = sds * (z * (2 * ndtr(z) - 1) + 2 * density - 1 / np.sqrt(np.pi))
    square, score = by_block(errors**2), by_block(crps)
    mean, se = averaged(square)
    out = xr.Dataset(coords={"rank": list(ranks)})
    out["rmse"], out["rmse_se"] = ("rank", np.sqrt(mean)), ("rank", se / (2 * np.sqrt(mean)))
    inside = (np.abs(z) < ndtri((1 + _LEVEL) / 2)).astype(float)
    for name, sums in (("crps", score), ("coverage", by_block(inside))):
        mean, se = averaged(sums)
        out[name], out[f"{name}_se"] = ("rank", mean), ("rank", se)
    # A rank of which some modes do not exceed noise is a lower rank in truth.
    counts = np.array([part.num_modes for part in done])
    full = np.mean(counts == np.array(ranks), axis=0) >= 0.5
    full[0] |= not full.any()
    best = int(np.argmin(np.where(full, out["crps"].values, np.inf)))
    excess, se = averaged(score - score[best])
    out["excess"], out["excess_se"] = ("rank", excess), ("rank", se)
    out["alike"] = "rank", full & (excess <= _TOLD_APART * se)
    out["num_modes"] = "rank", np.median(counts, axis=0).astype(int)
    out["square"], out["size"] = (("rank", "block"), square), ("block", size)
    out["spectrum"] = ("rank", "axis"), np.mean([part.spectrum for part in done], axis=0)
    out["edge"] = "rank", np.mean([part.edge for part in done], axis=0)
    out.attrs = {"best": int(ranks[best]), "chosen": int(ranks[int(np.argmax(full & (excess <= _AS_GOOD * se)))])}
    out.attrs |= {f"best_{name}": int(ranks[int(np.argmin(out[name].values))]) for name in ("rmse", "crps")}
    return out


def _listed(numbers: Sequence[int]) -> str:
    """Numbers as words have them: 3, 4 and 6."""
    *first, last = map(str, numbers)
    return f"{', '.join(first)} and {last}" if first else last


def _sentence(found: xr.Dataset, block: Block) -> str:
    """What the comparison says, in words."""
    best, chosen, ranks = found.attrs["best"], found.attrs["chosen"], found["rank"].values
    units = "" if found.attrs["units"] == "1" else f" {found.attrs['units']}"
    one = found.sel(rank=chosen)
    count = found.sizes["block"]
    blocks = f"{count} hidden blocks of {block[0]} times x {block[1]} x {block[2]} cells"
    text = (
        f"With {found.attrs['noise']} noise, {best} mode{'s' * (best > 1)} fill{'s' * (best == 1)} {blocks} best (CRPS)"
    )
    if chosen < best:
        text += f", and {chosen} as well within {_AS_GOOD:g} standard errors"
    text += (
        f". {chosen} {'are' if chosen > 1 else 'is'} chosen: CRPS {float(one['crps']):.3g}, root mean square error "
        f"{float(one['rmse']):.3g} ± {float(one['rmse_se']):.1g}{units}"
    )
    if (above := int(one["num_modes"])) < chosen:
        text += f". Only {above} of these exceed{'s' * (above == 1)} the noise: the field may have no more"
    alike = [int(rank) for rank in ranks[found["alike"].values] if rank != best]
    if alike:
        text += f". Blocks do not tell {_listed(alike)} apart from {best}: differences are below two standard errors"
    else:
        text += ". All other numbers are worse by more than two standard errors"
    rmse, crps = found.attrs["best_rmse"], found.attrs["best_crps"]
    if rmse != crps:
        text += (
            f". Of all numbers the root mean square error is least with {rmse}, which is best where the filled values "
            f"alone count; CRPS is least with {crps}, which is best where their intervals count too"
        )
    if best == ranks[-1] and len(ranks) > 1:
        text += f". {best} is the largest number compared: more may fill better, so compare more than {best}"
    return text + "."
