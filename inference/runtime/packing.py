"""Result files that keep of draws what matters: digits far below the posterior sd are rounded away, the rest packed."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import xarray as xr

from probmodels.inference.runtime.ops import clean_attrs

__all__ = ["ROUNDING", "pack", "round_draws", "unpack"]

ROUNDING = 0.015
"""Largest error of a rounded draw, in posterior standard deviations of its entry."""

_MARK = "rounding"  # attribute of a rounded variable: it is not rounded again
_PACKED = "packed"  # attribute of a variable that a file holds as whole numbers: the type of its values
_HOW = "unpack"  # attribute that says how to read it without this package
_FORMULA = "centre + step * (value // 2, or -(value + 1) // 2 if value is odd)"
_GROUP = "packing"  # group of the steps and centres of what is packed
_SOME = 100  # draws of a chain that its quartiles are read from
_LARGE = 4096  # bytes from which it pays to compress a variable
_BLOCK = 2**20  # numbers that are packed at a time
_ROUNDED = {_MARK: f"by less than {ROUNDING:g} posterior standard deviations of each entry"}
_COMPRESSED = {"zlib": True, "shuffle": True, "complevel": 4}


def pack(tree: xr.DataTree, rounded: Collection[str]) -> xr.DataTree:
    """A tree that netCDF can hold, with draws rounded, packed and set to be compressed.

    A packed variable holds whole numbers: how many steps a draw lies from the centre of its entry, above it 0, 2, 4 and
    so on, below it 1, 3, 5. Most fit into a byte, so that compression byte by byte leaves hardly more bits than the
    digits of the draws have.

    Parameters
    ----------
    tree
        Tree of a result.
    rounded
        Posterior variables to round. Those of the group ``invariants``, which only diagnostics read, are rounded too;
        all else is kept digit by digit.

    Returns
    -------
    xr.DataTree
        Shares with the one given what it does not change; `unpack` takes it back.
    """
    packed = tree.map_over_datasets(_plain)
    for name, chosen in (("posterior", rounded), ("invariants", None)):
        if name in packed.children:
            group, scales = packed[name].to_dataset(), xr.Dataset()
            for key in [x for x in group.data_vars if chosen is None or x in chosen]:
                found = _in_steps(group[key])
                if found is None:
                    group[key] = _rounded(group[key])
                else:
                    group[key], scales[f"{key}_step"], scales[f"{key}_centre"] = found
            packed[name] = xr.DataTree(group)
            if scales.data_vars:
                packed[f"{_GROUP}/{name}"] = xr.DataTree(scales.drop_vars(scales.coords))
    return packed


def unpack(tree: xr.DataTree) -> xr.DataTree:
    """The tree that was packed, its draws rounded."""
    if _GROUP not in tree.children:
        return tree
    found = tree.copy()
    for name, scales in tree[_GROUP].children.items():
        group = found[name].to_dataset()
        for key in [x for x in group.data_vars if _PACKED in group[x].attrs]:
            values = group[key]
            whole = values.values.astype(np.int64)
            step, centre = (scales[f"{key}_{x}"].values for x in ("step", "centre"))
            draws = (centre + step * np.where(whole % 2, -(whole + 1) // 2, whole // 2)).astype(values.attrs[_PACKED])
            attrs = {k: v for k, v in values.attrs.items() if k not in (_PACKED, _HOW)}
            group[key] = values.dims, draws, attrs
        found[name] = xr.DataTree(group)
    del found[_GROUP]
    return found


def _plain(dataset: xr.Dataset) -> xr.Dataset:
    """Dataset without the encoding of the file that it came from and with attributes that netCDF can hold."""
    plain = dataset.drop_encoding()
    plain.attrs = clean_attrs(plain.attrs)
    for variable in plain.variables.values():
        variable.attrs = clean_attrs(variable.attrs)
        if variable.dtype.kind in "iufb" and variable.nbytes >= _LARGE and variable.ndim:
            variable.encoding = dict(_COMPRESSED)
    return plain


def _rounded(values: xr.DataArray) -> xr.DataArray:
    """Draws with chains and draws first, rounded unless they are so already."""
    if not _is_drawn(values):
        return values
    ordered = values.transpose("chain", "draw", ...)
    if _MARK not in values.attrs:
        ordered = ordered.copy(data=round_draws(ordered.values))
        ordered.attrs |= _ROUNDED
    ordered.encoding = dict(_COMPRESSED)
    return ordered


def _is_drawn(values: xr.DataArray) -> bool:
    return values.dtype.kind == "f" and {"chain", "draw"} <= set(values.dims)


def round_draws(draws: np.ndarray) -> np.ndarray:
    """Round every entry to a power of two of its own, so that most bits of a number are zeros.

    Steps of s posterior standard deviations widen an interval by a share of about s²/24: here by at most 4e-5. A
    quantile of a single entry moves by at most `ROUNDING` standard deviations, about a third of its Monte Carlo error
    with 4000 independent draws; quantiles of what is made of many entries, as maps are, move far less.

    Parameters
    ----------
    draws
        Floats (chain, draw, ...).

    Returns
    -------
    np.ndarray
        Of the same shape and dtype. No draw moves by more than `ROUNDING` times the standard deviation of its entry,
        where for chains that disagree or have long tails that of the narrowest chain counts, or that of a normal
        distribution with the same quartiles where this is less. Entries that do not vary or are not finite are kept.
    """
    few = draws[:, :: max(1, draws.shape[1] // _SOME)]
    with np.errstate(invalid="ignore"):
        lower, upper = np.quantile(few - np.median(few, 1, keepdims=True), [0.25, 0.75], axis=(0, 1))
        scale = np.min([(upper - lower) / 1.349, *(chain.std(0) for chain in draws)], axis=0)
    size = np.finfo(draws.dtype)
    known = np.isfinite(scale) & (scale > size.tiny / size.eps)
    step = np.exp2(np.floor(np.log2(2 * ROUNDING * np.where(known, scale, 1.0)))).astype(draws.dtype)
    rounded = draws / step
    np.rint(rounded, out=rounded)
    rounded *= step
    return rounded if known.all() else np.where(known, rounded, draws)


def _in_steps(values: xr.DataArray) -> tuple[xr.DataArray, xr.DataArray, xr.DataArray] | None:
    """Rounded draws as whole numbers, with the step and the centre of each entry; None where none give them back.

    Entries are taken some at a time: copies of all draws would be the most memory that a run needs.
    """
    if not _is_drawn(values) or not values.size:
        return None
    ordered = values.transpose("chain", "draw", ...)
    draws = ordered.values.reshape(*ordered.shape[:2], -1)
    whole: np.ndarray = np.empty(draws.shape, np.uint16)
    steps, centres = np.empty(draws.shape[2]), np.empty(draws.shape[2])
    size = max(1, _BLOCK // draws[..., 0].size)
    for start in range(0, draws.shape[2], size):
        part = slice(start, start + size)
        block = np.ascontiguousarray(draws[..., part])
        found = _block_in_steps(block if _MARK in values.attrs else round_draws(block))
        if found is None:
            return None
        if found[0].max() >= 2**16 and whole.dtype == np.uint16:
            whole = whole.astype(np.uint32)
        whole[..., part], steps[part], centres[part] = found
    packed = ordered.copy(data=whole.reshape(ordered.shape))
    packed.attrs |= {**_ROUNDED, _PACKED: str(draws.dtype), _HOW: _FORMULA}
    packed.encoding = dict(_COMPRESSED)
    entry = ordered[0, 0].drop_vars(["chain", "draw"], errors="ignore")
    return packed, entry.copy(data=steps.reshape(entry.shape)), entry.copy(data=centres.reshape(entry.shape))


def _block_in_steps(draws: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """The same of rounded draws (chain, draw, entry): whole numbers, steps (entry,), centres (entry,).

    The step of an entry is the largest power of two that divides all its draws, so that nothing is lost.
    """
    if not np.isfinite(draws).all():
        return None
    scale = np.ldexp(1.0, (53 - np.frexp(np.abs(draws).max((0, 1)))[1]).clip(-1000, 1000))
    digits = np.bitwise_or.reduce((draws * scale).astype(np.int64).reshape(-1, draws.shape[2]), axis=0)
    step = np.where(digits, digits & -digits, 1) / scale
    varies = (draws != draws[0, 0]).any((0, 1))
    centre = np.where(varies, step * np.rint(draws.mean((0, 1), dtype=np.float64) / step), draws[0, 0])
    steps = (draws - centre) / step
    if np.abs(steps).max() >= 2**31:
        return None
    whole = steps.astype(np.int64)
    if not np.array_equal((centre + step * whole).astype(draws.dtype), draws):
        return None
    return np.where(whole < 0, -2 * whole - 1, 2 * whole), step, centre
