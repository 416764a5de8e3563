"""Climate indices with posterior uncertainty: means of a field over boxes, such as those of El Niño.

Two questions may be asked of a box, and both have an answer here.

``field``: the mean of the field in the box as it was. Where every cell was observed this is a number without
uncertainty; where cells have gaps, each draw fills them with its effects, its modes and noise.

``signal``: the mean of what effects and modes say, noise left out, at gaps or not. It is uncertain at every time, and
what the modes do not hold is not in it.

Where the model has noise that is independent from cell to cell, real residuals are often alike in neighbours: in a
mean they cancel less. The noise of the mean is therefore made as large as what the modes leave of the mean at times at
which the box was observed, where that is larger (`noise_ratio` in what `box_indices` returns). Noise that the model
has correlated between cells fills gaps with its full variance, whatever residuals near by were observed.

Frozen cells are no gaps. Where the sea is frozen there is no sea surface temperature, and centres that publish means
leave such cells out: a mean is then that of the open water of its month, of anomalies of each cell's own. The share of
the box that was frozen is said at each time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Literal

import numpy as np
import pandas as pd
import xarray as xr
from annotated_types import Len

from probmodels.bayesian_svd.draws import Draws, blocks, read_draws
from probmodels.bayesian_svd.grids import to_grid
from probmodels.datasets.regions import Region, parse_region
from probmodels.errors import DataError, SummaryError
from probmodels.options import Count, Fraction, Seed, checked

__all__ = [
    "MOST_ICE",
    "NINO_BOXES",
    "box_areas",
    "box_indices",
    "box_overlap",
    "check_ice",
    "frozen_cells",
    "index_table",
    "parse_boxes",
    "summarise_indices",
]

NINO_BOXES = ("nino12", "nino3", "nino34", "nino4")
"""Names of the boxes of El Niño among `probmodels.datasets.regions.REGIONS`."""

_WORDS = {
    "field": "mean of the field in the box, gaps filled",
    "signal": "mean of effects and modes in the box, noise left out",
}

MOST_ICE = 0.5
"""Share of a box that may be frozen for the mean of the rest to stand for it."""

Ice = Literal["left_out", "filled"]
Boxes = Mapping[str, str | Mapping[str, Sequence[float]]] | Annotated[Sequence[str], Len(1)]


def parse_boxes(boxes: Boxes) -> dict[str, Region]:
    """Boxes by name, from names of `REGIONS`, texts ``"name=lat_min,lat_max,lon_min,lon_max"``, or a table of them.

    Raises
    ------
    DataError
        If a name is unknown or given twice, or bounds cannot be read or hold no area.
    """
    if isinstance(boxes, Mapping):
        pairs = [(str(name), bounds) for name, bounds in boxes.items()]
    else:
        pairs = [(name.strip(), bounds.strip() or name) for name, _, bounds in (x.partition("=") for x in boxes)]
    found: dict[str, Region] = {}
    for name, bounds in pairs:
        if not name:
            raise DataError(f"box={bounds!r} has no name; write it as 'name=lat_min,lat_max,lon_min,lon_max'")
        if name in found:
            raise DataError(f"the box {name!r} is given twice; give each a name of its own")
        region = parse_region(bounds)
        if region.width == 0 or region.south == region.north:
            raise DataError(f"the box {name!r} ({region.bounds}) has no area; give bounds that differ")
        found[name] = region
    return found


@checked(SummaryError)
def box_indices(
    tree: xr.DataTree,
    boxes: Boxes | None = None,
    *,
    effects: bool = True,
    min_covered: Fraction = 0.8,
    ice: Ice = "left_out",
    num_draws: Count = 1000,
    seed: Seed = 0,
) -> xr.Dataset:
    """Area-weighted means of the field over boxes, as draws of the posterior.

    A cell counts with the area that it shares with the box, so that a box may cut cells.

    Parameters
    ----------
    tree
        Result of a Bayesian SVD on cells with latitude and longitude.
    boxes
        Names of `probmodels.datasets.regions.REGIONS` (nino12, nino3, nino34, nino4, ...), texts
        ``"name=lat_min,lat_max,lon_min,lon_max"``, or a table of names and bounds. None for the boxes of El Niño that
        the field covers.
    effects
        Whether the mean and the trend that the model has for each cell belong to the index; without them it is the
        departure from them.
    min_covered
        Share of a box's area that cells of the field must cover. Land counts as not covered.
    ice
        What becomes of cells that are frozen and so masked, by the coordinate ``ice`` of the data. ``"left_out"``: the
        mean is over the open water of each time, of which at least half of the box has to be. ``"filled"``: the model
        fills them as it fills gaps, with what open water would have.
    num_draws
        Draws that are kept, of all chains together, evenly thinned.
    seed
        Seed of the noise that fills gaps.

    Returns
    -------
    xr.Dataset
        Over (chain, draw, index, time) ``field``, the mean of the field with its gaps filled, and ``signal``, that of
        effects and modes alone. Over index: ``covered``, the share of the box that cells cover (NaN for scattered
        cells); ``num_cells``; and ``noise_ratio``, the root mean square of what the modes leave of the mean of the box
        over what the noise of the model would leave. Over (index, time): ``observed``, the share, by area, of the
        box's cells that count that hold a value; and ``ice_share``, the share that was frozen, where the data say.

    Raises
    ------
    SummaryError
        If cells have no positions, a box is covered too little or frozen too far, or the result lacks what is needed.
    DataError
        If a box cannot be read.
    """
    draws, constant = read_draws(tree), tree["constant_data"].to_dataset()
    areas = box_areas(constant, boxes, min_covered)
    regions = parse_boxes(boxes if boxes is not None else NINO_BOXES)
    chosen, chains = thinned(draws, num_draws)
    data = constant["data"].transpose("cell", "time").values.astype(float)
    rng = np.random.default_rng(seed)
    frozen = frozen_cells(constant)
    if ice == "left_out":
        check_ice(constant, areas)
    out_of = np.zeros_like(frozen) if ice == "filled" else frozen
    found = [_box(draws, data, area / area.sum(), out_of, chosen, effects, rng) for area, _ in areas.values()]

    def chained(name: str) -> np.ndarray:
        values = np.stack([x[name] for x in found], axis=1)  # (draw, index, time)
        return values.reshape(chains, -1, *values.shape[1:])

    time = constant["time"] if "time" in constant.coords else xr.DataArray(np.arange(data.shape[1]), dims="time")
    units = str(constant["data"].attrs.get("units", "1"))
    out = xr.Dataset(
        {name: (("chain", "draw", "index", "time"), chained(name)) for name in _WORDS},
        coords={"index": list(areas), "time": ("time", time.values, time.attrs)},
    )
    for name, words in _WORDS.items():
        out[name].attrs = {"long_name": words, "units": units}
    out["observed"] = ("index", "time"), np.stack([x["observed"] for x in found]), {"units": "1"}
    out["covered"] = "index", [covered for _, covered in areas.values()], {"units": "1"}
    out["num_cells"] = "index", [int((area > 0).sum()) for area, _ in areas.values()], {"units": "1"}
    out["noise_ratio"] = "index", [float(x["noise_ratio"]) for x in found], {"units": "1"}
    out["observed"].attrs["long_name"] = "share of the cells of the box that count, by area, that hold a value"
    out["covered"].attrs["long_name"] = "share of the box that cells of the field cover"
    out["noise_ratio"].attrs["long_name"] = "what modes leave of the mean over what noise of the model would leave"
    if frozen.any():
        shares = np.stack([area / area.sum() @ frozen for area, _ in areas.values()])
        words = {"left_out": "left out of its mean", "filled": "filled by the model as open water"}[ice]
        label = f"share of the cells of the box, by area, that is frozen and {words}"
        out["ice_share"] = ("index", "time"), shares, {"units": "1", "long_name": label}
        out.attrs["ice"] = ice
    out.attrs |= {"effects": int(effects), "bounds": "; ".join(f"{name}: {regions[name].bounds}" for name in areas)}
    return out


def box_areas(constant: xr.Dataset, boxes: Boxes | None, min_covered: float) -> dict[str, tuple[np.ndarray, float]]:
    """Area that each cell shares with each box, and the share of the box that they cover, as `box_overlap` has them.

    Parameters
    ----------
    constant
        Group ``constant_data`` of a result.
    boxes, min_covered
        As for `box_indices`.

    Raises
    ------
    SummaryError
        If cells have no positions, or a box is covered too little.
    DataError
        If a box cannot be read.
    """
    lat, lon = cell_positions(constant)
    regions = parse_boxes(boxes if boxes is not None else NINO_BOXES)
    areas = {name: box_overlap(lat, lon, region, constant) for name, region in regions.items()}
    if boxes is None:
        areas = {name: found for name, found in areas.items() if found[1] >= min_covered}
        if not areas:
            raise SummaryError(
                f"the field covers none of the boxes {', '.join(NINO_BOXES)}; name one of your own: "
                "'name=lat_min,lat_max,lon_min,lon_max' (--box)"
            )
    for name, (area, covered) in areas.items():
        if not area.any() or covered < min_covered:
            raise SummaryError(
                f"cells of the field cover {max(covered, 0.0):.0%} of the box {name!r} ({regions[name].bounds}); "
                f"at least {min_covered:.0%} are needed (min_covered), land counts as not covered; choose a box inside "
                "the field"
            )
    return areas


def frozen_cells(constant: xr.Dataset) -> np.ndarray:
    """Which values are masked because the sea was frozen (cell, time)."""
    if "ice" not in constant.variables:
        return np.zeros((constant.sizes["cell"], constant.sizes["time"]), dtype=bool)
    return np.asarray(constant["ice"].transpose("cell", "time").values, dtype=bool)


def check_ice(constant: xr.Dataset, areas: Mapping[str, tuple[np.ndarray, float]]) -> None:
    """Check that at every time at least half of each box is open water.

    Parameters
    ----------
    constant
        Group ``constant_data`` of a result.
    areas
        From `box_areas`.

    Raises
    ------
    SummaryError
        If more of a box is frozen.
    """
    frozen = frozen_cells(constant)
    for name, (area, _) in areas.items():
        share = area / area.sum() @ frozen
        if (many := int((share > MOST_ICE).sum())) > 0:
            when = str(constant["time"].values[share.argmax()])[:10] if "time" in constant.coords else share.argmax()
            raise SummaryError(
                f"at {many} of {share.size} times more than {MOST_ICE:.0%} of the box {name!r} is frozen, most, "
                f"{share.max():.0%}, at {when}: the mean of its open water does not stand for it; choose a box or a "
                "season with less ice, or take frozen cells for open water: ice='filled' (--ice filled)"
            )


def cell_positions(constant: xr.Dataset) -> tuple[np.ndarray, np.ndarray]:
    if not {"lat", "lon"} <= set(constant.variables):
        raise SummaryError("the cells of this result have no lat and lon, which boxes need")
    return constant["lat"].values.astype(float), constant["lon"].values.astype(float)


def box_overlap(lat: np.ndarray, lon: np.ndarray, region: Region, constant: xr.Dataset) -> tuple[np.ndarray, float]:
    """Area on the unit sphere that each cell shares with a box, and the share of the box that they cover.

    Cells of a rectangular grid reach half a step in each direction. Others count with their weight where their centre
    lies in the box; what they cover is then unknown, NaN.
    """
    at = to_grid(xr.Dataset({"cell": ("cell", lat)}), constant)
    offset = (lon - region.west) % 360
    if "lat" not in at.dims:
        inside = (lat >= region.south) & (lat <= region.north) & (offset <= region.width)
        weight = constant["weight"].values if "weight" in constant else np.ones(len(lat))
        return np.where(inside, weight, 0.0), np.nan
    half_lat, half_lon = (_half_step(at[name].values) for name in ("lat", "lon"))
    south, north = np.maximum(lat - half_lat, region.south), np.minimum(lat + half_lat, region.north)
    height = np.sin(np.deg2rad(np.minimum(north, 90.0))) - np.sin(np.deg2rad(np.maximum(south, -90.0)))
    width = sum(
        np.clip(np.minimum(offset + turn + half_lon, region.width) - np.maximum(offset + turn - half_lon, 0.0), 0, None)
        for turn in (-360.0, 0.0, 360.0)
    )
    area = np.clip(height, 0.0, None) * width
    area[area < 1e-6 * area.max(initial=0.0)] = 0.0  # touched through rounding of coordinates
    full = region.width * (np.sin(np.deg2rad(region.north)) - np.sin(np.deg2rad(region.south)))
    return area, min(float(area.sum() / full), 1.0)


def _half_step(axis: np.ndarray) -> float:
    return float(np.median(np.diff(np.unique(axis)))) / 2 if len(axis) > 1 else 0.5


def thinned(draws: Draws, count: int) -> tuple[np.ndarray, int]:
    """Places of at most ``count`` draws, as many of each chain, and the number of chains."""
    chains = draws.num_chains
    length = draws.num_draws // chains
    own = np.unique(np.linspace(0, length - 1, min(max(count // chains, 1), length)).round().astype(int))
    return (np.arange(chains)[:, None] * length + own).ravel(), chains


def _box(
    draws: Draws,
    data: np.ndarray,
    share: np.ndarray,
    frozen: np.ndarray,
    chosen: np.ndarray,
    effects: bool,
    rng: np.random.Generator,
) -> dict[str, np.ndarray]:
    """Draws of one box: field and signal (draw, time), observed share (time,), noise ratio."""
    cells = np.flatnonzero(share)
    share, data, frozen = share[cells], data[cells], frozen[cells]
    seen = np.isfinite(data)
    weights = np.where(frozen, 0.0, share[:, None])  # of the open water of each time
    weights /= weights.sum(0)
    mean, observed = (weights * np.where(seen, data, 0.0)).sum(0), (weights * seen).sum(0)
    fixed, modes = np.empty((len(chosen), data.shape[1])), np.empty((len(chosen), data.shape[1]))
    noise, icy = np.empty(len(chosen)), frozen.any(0)
    own, common = _coefficients(draws)
    for part in _draw_blocks(draws, cells, chosen):
        index = chosen[part]
        patterns, effect = draws.patterns(cells, index), own[index][:, cells]
        noise[part] = _noise_of_mean(draws, cells, index, share) ** 2
        fixed[part] = common[index] @ draws.shared_design.T
        fixed[part] += (share @ effect) @ draws.design.T
        for times in blocks(data.shape[1], len(index), draws.d.shape[1]):
            modes[part, times] = np.einsum("sk,stk->st", share @ patterns, draws.series(times, index))
        for time in np.flatnonzero(icy):
            less = weights[:, time] - share
            series = draws.series(slice(time, time + 1), index)[:, 0]
            fixed[part, time] += (less @ effect) @ draws.design[time]
            modes[part, time] += ((less @ patterns) * series).sum(1)
    signal, whole = fixed + modes, observed > 1 - 1e-9
    judged = whole & ~icy  # the same cells at each of these times
    ratio = np.sqrt(np.mean((mean - signal)[:, judged] ** 2) / noise.mean()) if judged.any() else np.nan
    field = np.broadcast_to(mean, signal.shape).copy()
    if not whole.all():
        gaps = np.where(seen, 0.0, weights)[:, ~whole]
        field[:, ~whole] += _filled(draws, cells, chosen, gaps, np.flatnonzero(~whole), max(ratio, 1.0), rng)
    if not effects:
        field, signal = field - fixed, modes
    return {"field": field, "signal": signal, "observed": observed, "noise_ratio": np.asarray(ratio)}


def _filled(
    draws: Draws,
    cells: np.ndarray,
    chosen: np.ndarray,
    gaps: np.ndarray,
    times: np.ndarray,
    inflation: float,
    rng: np.random.Generator,
) -> np.ndarray:
    """What the missing cells add to a mean: (draw, time), with the share of each gap (cell, time), zero where observed.

    Noise of the mean is ``inflation`` times that of the model.
    """
    out = np.empty((len(chosen), len(times)))
    effects, shared = _coefficients(draws)
    for part in _draw_blocks(draws, cells, chosen):
        index = chosen[part]
        patterns = draws.patterns(cells, index)
        own = effects[index][:, cells]  # (draw, cell, effect)
        common = shared[index] @ draws.shared_design[times].T  # (draw, time)
        for place, time in enumerate(times):
            gap = gaps[:, place]
            series = draws.series(slice(time, time + 1), index)[:, 0]
            filled = ((gap @ patterns) * series).sum(1) + (gap @ own) @ draws.design[time]
            filled += gap.sum() * common[:, place]
            noise = inflation * _noise_of_mean(draws, cells, index, gap)
            out[part, place] = filled + noise * rng.standard_normal(len(index))
    return out


def _noise_of_mean(draws: Draws, cells: np.ndarray, index: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Standard deviation that noise has in a mean with these shares of the cells: (draw,)."""
    if draws.noise is None:
        return np.asarray(np.sqrt((share**2 * draws.noise_sd(cells, index) ** 2).sum(1)))
    along = draws.noise.vectors[cells].T @ (share / np.sqrt(draws.weight[cells]))
    return np.asarray(draws.sigma[index] * np.sqrt((along**2) @ draws.noise.values))


def _coefficients(draws: Draws) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients of the effects of each cell (draw, cell, effect), and of shared ones (draw, shared_effect)."""
    if draws.effects is None or draws.shared_effects is None:
        raise SummaryError("the posterior lacks the fixed effects of its design; was the result cut down?")
    return draws.effects, draws.shared_effects


def _draw_blocks(draws: Draws, cells: np.ndarray, chosen: np.ndarray) -> Iterator[slice]:
    """Slices of the draws chosen, within which patterns of these cells take little memory."""
    return blocks(len(chosen), len(cells), draws.d.shape[1])


@checked(SummaryError)
def summarise_indices(indices: xr.Dataset, *, level: Fraction = 0.95) -> xr.Dataset:
    """Posterior mean, standard deviation and equal-tailed interval of each index at each time.

    Parameters
    ----------
    indices
        From `box_indices`, or any data set whose variables have the dims chain and draw.
    level
        Probability content of the intervals.

    Returns
    -------
    xr.Dataset
        ``field_mean``, ``field_sd``, ``field_lower``, ``field_upper``, likewise for ``signal``, over (index, time); and
        ``ice_share`` where there is ice.

    Raises
    ------
    SummaryError
        If no variable has draws, or the level is out of range.
    """
    names = [str(name) for name, array in indices.data_vars.items() if {"chain", "draw"} <= set(array.dims)]
    if not names:
        raise SummaryError(f"no variable has the dims chain and draw; there are {list(indices.data_vars)}")
    tails, over = [(1 - level) / 2, (1 + level) / 2], ("chain", "draw")
    out = xr.Dataset(attrs={**indices.attrs, "interval_level": level})
    for name in names:
        array = indices[name]
        limits = array.quantile(tails, over).drop_vars("quantile")
        sd = array.std(over, ddof=1).where(array.max(over) > array.min(over), 0.0)  # of one number, without rounding
        parts = {"mean": array.mean(over), "sd": sd, "lower": limits[0], "upper": limits[1]}
        for part, values in parts.items():
            out[f"{name}_{part}"] = values.assign_attrs(
                units=array.attrs.get("units", "1"), long_name=f"{array.attrs.get('long_name', name)}, {part}"
            )
    return out.assign(ice_share=indices["ice_share"]) if "ice_share" in indices else out


@checked(SummaryError)
def index_table(summary: xr.Dataset) -> pd.DataFrame:
    """Summary of indices as a table: one row for each index, estimand and time.

    Parameters
    ----------
    summary
        From `summarise_indices`.

    Returns
    -------
    pd.DataFrame
        Columns ``index``, ``estimand``, ``time``, ``mean``, ``sd``, ``lower``, ``upper``, and ``ice_share``, the share
        of the box that was frozen, where there is ice.
    """
    names = [str(name).removesuffix("_mean") for name in summary.data_vars if str(name).endswith("_mean")]
    time = summary["time"].values
    label = np.datetime_as_string(time, unit="D") if np.issubdtype(time.dtype, np.datetime64) else time.astype(str)
    parts = ("mean", "sd", "lower", "upper")
    rows = [
        pd.DataFrame(
            {"index": str(index), "estimand": name, "time": label}
            | {part: summary[f"{name}_{part}"].sel(index=index).values for part in parts}
            | ({"ice_share": summary["ice_share"].sel(index=index).values} if "ice_share" in summary else {})
        )
        for index in summary["index"].values
        for name in names
    ]
    return pd.concat(rows, ignore_index=True)
