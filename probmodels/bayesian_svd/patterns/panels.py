"""Modes of several results side by side: seasons, regions or data sets in one scale, and how alike they are."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Annotated

import numpy as np
import xarray as xr
from annotated_types import Interval, Len
from matplotlib.figure import Figure

from probmodels.bayesian_svd.draws import MODES_OF, Draws, read_draws
from probmodels.bayesian_svd.maps import draw_map, grid_of_maps, largest
from probmodels.bayesian_svd.summary import summarise_modes
from probmodels.errors import SummaryError
from probmodels.inference.result import Result
from probmodels.inference.runtime.ops import write_atomically
from probmodels.options import Count, Draws as NumDraws, Fraction, OneOf, Seed, checked
from probmodels.outputs import laid_out

__all__ = ["compare_patterns", "mode_panels", "write_panels"]

_FEWEST = 3  # cells that two results share
_DECIMALS = 2  # of degrees, to which cells of two results are the same


@checked(SummaryError)
def mode_panels(
    summaries: Annotated[Mapping[str, xr.Dataset], Len(1)],
    *,
    mode: Count = 1,
    columns: Annotated[int, Interval(ge=1, le=20)] = 2,
) -> Figure:
    """Posterior mean of one mode of several results, in one colour scale.

    Parameters
    ----------
    summaries
        From `probmodels.bayesian_svd.summary.summarise_modes`, on grids, by the titles of the panels.
    mode
        Number of the mode, from 1.
    columns
        Panels side by side.

    Returns
    -------
    Figure
        One panel for each result, with the share of variance and its interval.

    Raises
    ------
    SummaryError
        If a result lacks the mode or a grid, or they are in different units.
    """
    units = {str(modes["mode_mean"].attrs.get("units", "1")) for modes in summaries.values()}
    if len(units) > 1:
        raise SummaryError(f"the results are in {sorted(units)}; one colour scale needs one unit")
    for title, modes in summaries.items():
        if mode > modes.sizes["mode"]:
            raise SummaryError(f"mode={mode}; {title!r} has {modes.sizes['mode']} modes")
        if "lat" not in modes["mode_mean"].coords or "cell" in modes["mode_mean"].dims:
            raise SummaryError(f"{title!r} is not on a grid; give results of gridded fields")
    first = next(iter(summaries.values()))["mode_mean"]
    rows = -(-len(summaries) // columns)
    figure, axes = grid_of_maps(first, rows, min(columns, len(summaries)))
    bound = max(largest(modes["mode_mean"][mode - 1]) for modes in summaries.values())
    unit = units.pop()
    label = f"{'' if unit == '1' else unit} per sd of PC".strip().replace("degC", "°C")
    for ax, (title, modes) in zip(axes.flat, summaries.items(), strict=False):
        draw_map(figure, ax, modes["mode_mean"][mode - 1], label, cmap="RdBu_r", vmin=-bound, vmax=bound)
        share = [100 * float(modes[f"explained_variance_fraction_{x}"][mode - 1]) for x in ("mean", "lower", "upper")]
        ax.set_title(f"{title}: {share[0]:.0f} % [{share[1]:.0f}, {share[2]:.0f}]", fontsize=10, loc="left")
    for ax in axes.flat[len(summaries) :]:
        ax.set_visible(False)
    return figure


def write_panels(
    results: Mapping[str, Result], out: Path, *, mode: int = 1, columns: int = 2, table: Path | None = None
) -> str:
    """Draw a mode of several results, and say how alike its patterns are.

    Parameters
    ----------
    results
        Of a Bayesian SVD, by name.
    out
        Image to write.
    mode, columns
        As for `mode_panels`.
    table
        CSV file to write, of the correlations between all modes of each pair of results.

    Returns
    -------
    str
        Correlations of the mode between results, with their intervals.

    Raises
    ------
    SummaryError
        If a result is of another method or of several fields, lacks the mode or a grid, units differ, or results cover
        the same region on different grids.
    """
    for name, result in results.items():
        if result.tree.attrs.get("method") != "bayesian_svd":
            raise SummaryError(f"{name!r} is a result of {result.tree.attrs.get('method')!r}, not of bayesian_svd")
        if "field" in result.group("constant_data").coords:
            raise SummaryError(f"{name!r} is of several fields; its report has them side by side")
    trees = {name: result.tree for name, result in results.items()}
    apart = _check_grids(trees)
    summaries = {name: summarise_modes(tree) for name, tree in trees.items()}
    figure = mode_panels(summaries, mode=mode, columns=columns)
    if apart and table is not None:
        raise SummaryError(f"{' and '.join(map(repr, apart))} share no cell, so that there is nothing to correlate")
    found = None if apart else compare_patterns(trees)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, lambda file: laid_out(figure).savefig(file, dpi=150, format=out.suffix[1:]))
    if found is None:
        return f"{' and '.join(map(repr, apart))} share no cell: patterns are drawn, not correlated\n\nFigure: {out}"
    lines = []
    for one, two in combinations(results, 2):
        at = found.sel(first=one, second=two, mode=mode, other_mode=mode)
        mean, low, high = (float(at[f"correlation_{key}"]) for key in ("mean", "lower", "upper"))
        cells = int(at["common_cells"])
        lines.append(f"{one} and {two}: correlation {mean:.2f} [{low:.2f}, {high:.2f}] over {cells} cells")
    if table is not None:
        frame = found.to_dataframe().reset_index()
        later = frame["first"].map(list(results).index) < frame["second"].map(list(results).index)
        frame[later].dropna().to_csv(table, index=False, float_format="%.6g")
        lines.append(f"\nTable: {table}")
    return "\n".join([f"mode {mode}:", *lines, f"\nFigure: {out}"])


def _check_grids(trees: Mapping[str, xr.DataTree]) -> tuple[str, ...]:
    """Two results that are of different regions, if any; two of one region on different grids are refused."""
    places = {name: _places(name, tree) for name, tree in trees.items()}
    apart: tuple[str, ...] = ()
    for one, two in combinations(places, 2):
        if len(np.intersect1d(places[one], places[two])) >= _FEWEST:
            continue
        boxes = [(p.real.min(), p.real.max(), p.imag.min(), p.imag.max()) for p in (places[one], places[two])]
        (south, north, west, east), (low, high, left, right) = boxes
        if max(south, low) <= min(north, high) and max(west, left) <= min(east, right):
            raise SummaryError(
                f"{one!r} and {two!r} cover the same region on different grids; bring both to one grid, so that their "
                "patterns can be compared cell by cell"
            )
        apart = (one, two)
    return apart


@checked(SummaryError)
def compare_patterns(
    trees: Annotated[Mapping[str, xr.DataTree], Len(2)],
    *,
    of: Annotated[str, OneOf(tuple(MODES_OF))] | None = None,
    level: Fraction = 0.95,
    num_draws: NumDraws = 1000,
    seed: Seed = 0,
) -> xr.Dataset:
    """Correlations between the patterns of several results with their posterior.

    Results are independent: draws of two are paired at random. A correlation is centred and weighted by area, over the
    cells that both have; the sign of a mode is arbitrary, so that its size is what is reported.

    Parameters
    ----------
    trees
        Results by name, with lat and lon of their cells.
    of
        Whose modes, as for `probmodels.bayesian_svd.summary.summarise_modes`.
    level
        Probability of the intervals.
    num_draws
        Pairs of draws.
    seed
        Seed of the pairs.

    Returns
    -------
    xr.Dataset
        ``correlation_mean``, ``_sd``, ``_lower``, ``_upper`` over (first, second, mode, other_mode), NaN where first
        and second are one result or a result has fewer modes; ``common_cells`` over (first, second).

    Raises
    ------
    SummaryError
        If cells have no positions, or two results share fewer than three cells.
    """
    rng = np.random.default_rng(seed)
    names, draws = list(trees), {name: read_draws(tree, of) for name, tree in trees.items()}
    places = {name: _places(name, tree) for name, tree in trees.items()}
    most = max(x.d.shape[1] for x in draws.values())
    dims = ("first", "second", "mode", "other_mode")
    shape = (len(names), len(names), most, most)
    found = {key: np.full(shape, np.nan) for key in ("mean", "sd", "lower", "upper")}
    common = np.zeros(shape[:2], dtype=np.int32)
    for i, one in enumerate(names):
        for j, two in enumerate(names[:i]):
            _, a, b = np.intersect1d(places[one], places[two], return_indices=True)
            common[i, j] = common[j, i] = len(a)
            if len(a) < _FEWEST:
                raise SummaryError(f"{one!r} and {two!r} share {len(a)} cells; three are needed, on the same grid")
            left = _unit(draws[one], a, rng.integers(draws[one].num_draws, size=num_draws), draws[one].weight[a])
            right = _unit(draws[two], b, rng.integers(draws[two].num_draws, size=num_draws), draws[one].weight[a])
            size = np.abs(left.transpose(0, 2, 1) @ right)
            lower, upper = np.quantile(size, [(1 - level) / 2, (1 + level) / 2], axis=0)
            for key, value in {"mean": size.mean(0), "sd": size.std(0, ddof=1), "lower": lower, "upper": upper}.items():
                found[key][i, j, : value.shape[0], : value.shape[1]] = value
                found[key][j, i, : value.shape[1], : value.shape[0]] = value.T
    numbers = np.arange(1, most + 1, dtype=np.int32)
    return xr.Dataset(
        {f"correlation_{key}": (dims, value) for key, value in found.items()}
        | {"common_cells": (("first", "second"), common)},
        coords={"first": names, "second": names, "mode": numbers, "other_mode": numbers},
        attrs={"interval_level": level},
    )


def _places(name: str, tree: xr.DataTree) -> np.ndarray:
    """Latitude and longitude of each cell as one complex number."""
    constant = tree["constant_data"].to_dataset()
    if not {"lat", "lon"} <= set(constant.coords):
        raise SummaryError(f"cells of {name!r} have no lat and lon, by which patterns could be compared")
    lon = constant["lon"].values.astype(float) % 360
    return np.asarray(np.round(constant["lat"].values.astype(float), _DECIMALS) + 1j * np.round(lon, _DECIMALS))


def _unit(draws: Draws, cells: np.ndarray, chosen: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Centred patterns at some cells, times the roots of weights, of norm one: (draw, cell, mode)."""
    patterns = draws.patterns(cells, chosen)
    share = (weight / weight.sum())[:, None]
    centred = (patterns - (share * patterns).sum(1, keepdims=True)) * np.sqrt(share)
    return np.asarray(centred / np.linalg.norm(centred, axis=1, keepdims=True))
