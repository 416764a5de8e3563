"""Gaps of a field filled from the posterior of a Bayesian SVD, with intervals that are checked on blocks held out.

Given a draw of patterns, series and effects, what is missing is normal: the conditional of correlated noise at the
missing entries given the residual at all others. Blocks of what was observed that `make_problem` held out are filled
likewise. Where the errors there are larger or smaller than the draws say, intervals are widened or narrowed: by one
factor for each cell and month of the year, from the errors of near cells and months. What is missing is then filled
given all that was observed, the blocks too: their series are drawn anew.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import xarray as xr
from annotated_types import Interval
from numpy.typing import NDArray
from scipy.spatial.distance import cdist
from scipy.special import ndtri
from tqdm import tqdm

from probmodels._version import __version__
from probmodels.bayesian_svd.attributes import TEMPERATURE, coordinates_encoded
from probmodels.bayesian_svd.correlated import CorrelatedData
from probmodels.bayesian_svd.gaps.blocks import FEW, crps_of_draws, share_in_larger_gaps
from probmodels.bayesian_svd.grids import to_grid
from probmodels.bayesian_svd.model import REFERENCE, Gaps, MatrixData
from probmodels.bayesian_svd.series_sampler import SeriesGibbs
from probmodels.bayesian_svd.series_sweep import draw_all_series
from probmodels.bayesian_svd.sides import positions
from probmodels.errors import SummaryError
from probmodels.inference.problem import Problem
from probmodels.inference.result import Result
from probmodels.inference.runtime.ops import write_atomically
from probmodels.options import Fraction, Seed, checked

__all__ = ["fill_field", "held_out_sentence", "write_filled"]

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

_REACH = 500.0  # km from which cells lend their errors to the factor of a cell; of other units, a tenth of the field
_MONTHS = 1.5  # and months
_PRIOR = 30.0  # errors' worth of the factor of the whole field in that of a cell and month
_BLOCK = 4_000_000  # doubles at a time: 32 MB
_ROUNDS = 3  # of series and gaps in turns, by which the series take in the values that were held out


@checked(SummaryError)
def fill_field(
    result: Result,
    *,
    level: Fraction = 0.95,
    num_draws: Annotated[int, Interval(ge=20, le=5000)] = 100,
    keep_draws: bool = False,
    seed: Seed = 0,
    progress: bool = True,
) -> xr.Dataset:
    """Fill the gaps of a field.

    Parameters
    ----------
    result
        Of a Bayesian SVD with ``noise="correlated"``, by MCMC. Where its problem held blocks out (``hold_out``), they
        check the intervals and correct their width.
    level
        Probability content of the intervals.
    num_draws
        Draws of the posterior that are used, evenly thinned.
    keep_draws
        Whether the draws are returned too, as ``filled_draws`` over draw and the dims of the field.
    seed
        Of the draws.
    progress
        Whether a progress bar is shown.

    Returns
    -------
    xr.Dataset
        Over (time, lat, lon), or (time, cell): ``filled``, the data where there are some, elsewhere their posterior
        mean; ``filled_sd``, ``filled_lower``, ``filled_upper``, equal to the data where there are some; ``status``, 0
        where observed, 1 where filled, 2 where the sea was frozen, which is left missing. Units are those of the data
        of the result (for anomalies, anomalies). Attributes ``held_out_rmse``, ``held_out_crps``,
        ``held_out_coverage`` and ``held_out_coverage_uncalibrated`` are of the blocks held out; coverage is of blocks
        that the correction did not see (two halves check each other).
        ``share_in_larger_gaps`` is the share of the filled values whose gap has more cells at their time, or lasts
        longer, than any block held out: what the blocks say need not hold there. Where the data kept the climatology
        that was removed, ``sst_filled`` (``field_filled`` of other fields), ``sst_filled_lower`` and
        ``sst_filled_upper`` have values and their interval with it added back; their deviation is ``filled_sd``.

    Raises
    ------
    SummaryError
        If the result has no correlated noise or lacks draws of what is needed, nothing is missing, or an option is out
        of range.
    ResultError
        If the problem of the result cannot be made again.
    """
    with _step("building the problem again", progress):
        problem = result.rebuild()
    data = problem.args[0]
    if not isinstance(data, MatrixData) or data.noise is None:
        raise SummaryError(
            "white noise cannot say how far a filled value is off, as its errors are those of near cells: infer with "
            "noise='correlated' (--set model.noise=correlated)"
        )
    if data.gaps is None:
        raise SummaryError("nothing is missing in the data of this result, and no block was held out (hold_out=0.05)")
    constant = result.group("constant_data").transpose("cell", "time", ...)
    values = constant["data"].values
    seen = np.isfinite(values)
    block = constant["held_out_block"].values if "held_out_block" in constant else np.full(seen.shape, -1)
    hidden, rng = block >= 0, np.random.default_rng(seed)
    filled, again = _draw(result, problem, np.where(seen, values, 0.0), seen, hidden, num_draws, rng, progress)
    factor = np.ones(seen.shape)
    scores: dict[str, float] = {}
    if hidden.any():
        places = positions(constant["data"])
        scores["share_in_larger_gaps"] = share_in_larger_gaps(
            constant["data"], ~seen & ~_frozen(constant), hidden, places
        )
        factor, found = _calibrated(again, values[hidden], hidden, block, _months(constant), places, level)
        scores |= {f"held_out_{name}": value for name, value in found.items()}
        scores["held_out_share"] = float(hidden.sum() / seen.sum())
    created = result.tree.attrs.get("created", "undated")
    attrs = {"source": f"Bayesian SVD, probmodels {__version__}", "references": REFERENCE}
    attrs["history"] = f"{created}: draws by MCMC, gaps filled by probmodels {__version__}"
    with _step("intervals of what is filled", progress):
        return _dataset(constant, seen, filled, factor, scores, level, keep_draws, attrs)


def held_out_sentence(filled: xr.Dataset) -> str:
    """How well the blocks held out were filled, and whether gaps are larger; ``filled`` is from `fill_field`."""
    found = {name: float(filled.attrs[f"held_out_{name}"]) for name in ("rmse", "crps", "coverage")}
    units, level = filled["filled"].attrs["units"], float(filled.attrs["interval_level"])
    blocks, size, share = (filled.attrs[f"held_out_{name}"] for name in ("blocks", "size", "share"))
    text = (
        f"gaps filled: {blocks} blocks held out ({share:.1%} of the data, {size:.0f} values each) are met with a root "
        f"mean square error of {found['rmse']:.3g} {units} and a CRPS of {found['crps']:.3g}; {100 * level:g} % "
        f"intervals hold {found['coverage']:.1%} of them"
    )
    larger = float(filled.attrs["share_in_larger_gaps"])
    if larger <= FEW:
        return text
    return (
        f"{text}\nWARNING: {larger:.0%} of the filled values lie in gaps that are larger than any of these blocks; "
        "intervals there may be too narrow. Leave model.hold_out_block out to hold out blocks like the gaps, or give "
        "more room for large ones (--set model.hold_out=0.2)"
    )


@contextlib.contextmanager
def _step(doing: str, progress: bool) -> Iterator[None]:
    """Say what is being done, as a bar of one step."""
    with tqdm(total=1, desc=doing, disable=not progress) as bar:
        yield
        bar.update()


@checked(SummaryError)
def write_filled(filled: xr.Dataset, path: str | Path, *, progress: bool = False) -> Path:
    """Write what `fill_field` returns as NetCDF that keeps to the CF conventions 1.11.

    Parameters
    ----------
    filled
        From `fill_field`.
    path
        File to write; its folder is made, a file of that name is replaced.
    progress
        Whether to say that it is being written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    filled, encoding = coordinates_encoded(filled)
    packed = {"zlib": True, "complevel": 4, "shuffle": True}
    encoding |= {str(k): {"dtype": "float32", "_FillValue": np.float32(np.nan), **packed} for k in filled.data_vars}
    encoding["status"] = {"dtype": "int8", "_FillValue": np.int8(-1), **packed}
    with _step(f"writing {path.name}", progress):
        write_atomically(path, lambda file: filled.to_netcdf(file, engine="netcdf4", encoding=encoding))
    return path


def _draw(
    result: Result,
    problem: Problem,
    values: Array,
    seen: Mask,
    hidden: Mask,
    num_draws: int,
    rng: np.random.Generator,
    progress: bool,
) -> tuple[Array, Array]:
    """Draws of what is missing (S, L) and of what was held out (S, H), in data units, cell by cell."""
    data: MatrixData = problem.args[0]
    names = ("U", "F", "d", "sigma", "autocorrelation")
    if absent := set(names) - set(result.posterior.data_vars):
        raise SummaryError(f"the posterior lacks {sorted(absent)}; was the result cut down?")
    stacked = result.posterior[list(names)].stack(sample=("chain", "draw")).transpose("sample", ...)
    chosen = np.unique(np.linspace(0, stacked.sizes["sample"] - 1, num_draws).round().astype(int))
    kernel = SeriesGibbs(problem)
    kernel.setup(0)
    grid, unit = kernel.sites["autocorrelation"].numpy(), 1.0 / np.sqrt(data.weight.numpy())[:, None]
    without, whole = CorrelatedData(data), None
    if hidden.any() and not seen.all():
        whole = CorrelatedData(_with_gaps(data, values / unit, seen))
    filled, again = [], []
    for place in tqdm(chosen, "filling gaps", disable=not progress):
        draw = {name: stacked[name].values[place].astype(float) for name in names}
        u, f = np.ascontiguousarray(draw["U"].T), np.ascontiguousarray(draw["F"].T)
        d, variance = draw["d"], float(draw["sigma"]) ** 2
        decay = np.abs(grid - draw["autocorrelation"][:, None]).argmin(1)
        for _ in range(2):  # effects given the data as filled before, then what is missing given effects
            without.draw(rng, u, d, f, variance)
        complete = without.complete
        again.append((complete * unit)[hidden])
        if whole is not None:
            whole.take(np.where(hidden, values / unit, complete))
            for _ in range(_ROUNDS):
                draw_all_series(
                    rng,
                    whole.z_transposed,
                    kernel._filter,
                    kernel._effects,
                    u,
                    d,
                    variance,
                    kernel._process,
                    (f, decay),
                )
                whole.draw(rng, u, d, f, variance)
                kernel.draw_large_gaps(whole, rng, u, d, f, variance, decay)
            complete = whole.complete
        filled.append((complete * unit)[~seen])
    return np.array(filled), np.array(again)


def _with_gaps(data: MatrixData, weighted: Array, mask: Mask) -> MatrixData:
    """The same model of weighted data (n, T) of which only some are observed."""
    seen = torch.as_tensor(mask)
    none = torch.zeros(0, *mask.shape, dtype=torch.float64)
    return data._replace(gaps=Gaps(torch.as_tensor(np.where(mask, weighted, 0.0)), seen, none))


def _months(constant: xr.Dataset) -> NDArray[np.int_]:
    """Month of the year of each time, 0 to 11; zeros where times are no dates."""
    if not np.issubdtype(constant["time"].dtype, np.datetime64):
        return np.zeros(constant.sizes["time"], dtype=int)
    return np.asarray(constant["time"].dt.month.values - 1)


def _calibrated(
    draws: Array,
    values: Array,
    hidden: Mask,
    block: NDArray[np.int_],
    months: NDArray[np.int_],
    places: Array,
    level: float,
) -> tuple[Array, dict[str, float]]:
    """Factor (n, T) by which draws are spread about their mean, and scores at the hidden entries.

    Two halves of the blocks check each other: the coverage of each is that under the factor of the other.
    """
    mean, sd = draws.mean(0), draws.std(0, ddof=1)
    error = np.abs(values - mean) / sd
    cells, times = np.nonzero(hidden)
    month, half = months[times], block[hidden] % 2 == 0
    bound = ndtri(0.5 + level / 2)
    near = _nearness(places)
    held = np.empty(len(error))
    for part in (half, ~half):
        factor = _factors(error[~part], cells[~part], month[~part], near, level)
        held[part] = error[part] <= bound * factor[cells[part], month[part]]
    factor = _factors(error, cells, month, near, level)
    scores = {
        "rmse": float(np.sqrt(np.mean((values - mean) ** 2))),
        "blocks": len(np.unique(block[hidden])),
        "size": float(hidden.sum() / len(np.unique(block[hidden]))),
        "crps": float(crps_of_draws(mean + (draws - mean) * factor[cells, month], values).mean()),
        "coverage": float(held.mean()),
        "coverage_uncalibrated": float(np.mean(error <= bound)),
    }
    return factor[:, months], scores


def _nearness(places: Array) -> Array:
    """How much errors at one cell tell of another (n, n)."""
    distance = cdist(places, places)
    reach = _REACH if places.shape[1] == 3 else distance.max() / 10
    return np.asarray(np.exp(-0.5 * (distance / reach) ** 2))


def _factors(error: Array, cells: NDArray[np.int_], months: NDArray[np.int_], near: Array, level: float) -> Array:
    """Factor of each cell and month (n, 12): weighted quantile of standardised errors over that of a normal."""
    bound = ndtri(0.5 + level / 2)
    apart = np.abs(np.subtract.outer(np.arange(12), np.arange(12)))
    of_month = np.exp(-0.5 * (np.minimum(apart, 12 - apart) / _MONTHS) ** 2)
    order = np.argsort(error)
    error, cells, months = error[order], cells[order], months[order]
    out = np.empty((len(near), 12))
    # The errors of the whole field count as a few more: a cell with none about it has their quantile.
    common = _PRIOR * np.linspace(1 / len(error), 1, len(error))
    step = max(1, _BLOCK // len(error))
    for start in range(0, len(near), step):
        rows = near[start : start + step][:, cells]
        for month in range(12):
            below = np.cumsum(rows * of_month[month, months], axis=1) + common
            place = (below < level * below[:, -1:]).sum(1)
            out[start : start + step, month] = error[np.minimum(place, len(error) - 1)]
    return out / bound


def _frozen(constant: xr.Dataset) -> Mask:
    """Entries (cell, time) that were masked as sea ice."""
    if "ice" not in constant.variables:
        return np.zeros(constant["data"].shape, dtype=bool)
    return np.asarray(constant["ice"].transpose("cell", "time").values, dtype=bool)


def _dataset(
    constant: xr.Dataset,
    seen: Mask,
    filled: Array,
    factor: Array,
    scores: dict[str, float],
    level: float,
    keep_draws: bool,
    attrs: dict[str, Any],
) -> xr.Dataset:
    """What `fill_field` returns."""
    data = constant["data"].transpose("cell", "time")
    parts = {name: data.values.astype(float).copy() for name in ("filled", "filled_lower", "filled_upper")}
    parts["filled_sd"] = np.zeros(data.shape)
    if filled.shape[1]:
        mean = filled.mean(0)
        spread = (filled - mean) * factor[~seen]
        parts["filled"][~seen], parts["filled_sd"][~seen] = mean, spread.std(0, ddof=1)
        for name, end in (("filled_lower", (1 - level) / 2), ("filled_upper", (1 + level) / 2)):
            parts[name][~seen] = mean + np.quantile(spread, end, axis=0)
        filled = mean + spread
    for values in parts.values():  # the modes of open water say nothing of ice
        values[_frozen(constant)] = np.nan
    units = str(data.attrs.get("units") or constant.attrs.get("units") or "1")
    percent = f"{100 * level:g} % interval"
    anomaly = "anomalies" if data.attrs.get("kind") == "anomaly" else "data"
    words = {
        "filled": f"{anomaly}, gaps filled by their posterior mean",
        "filled_sd": "posterior standard deviation, 0 where observed",
        "filled_lower": f"lower end of the {percent}",
        "filled_upper": f"upper end of the {percent}",
    }
    out = xr.Dataset({k: (("time", "cell"), v.T, {"long_name": words[k], "units": units}) for k, v in parts.items()})
    status = np.where(seen, 0.0, np.where(_frozen(constant), 2.0, 1.0)).T
    flags = {"flag_values": np.array([0, 1, 2], np.int8), "flag_meanings": "observed filled sea_ice"}
    label = "whether a value was observed or filled, or the sea was frozen"
    out["status"] = ("time", "cell"), status, {"long_name": label, **flags}
    if keep_draws:
        draws = np.repeat(data.values[None].astype(np.float32), len(filled), 0)
        draws[:, ~seen] = filled
        draws[:, _frozen(constant)] = np.nan
        out["filled_draws"] = ("draw", "time", "cell"), draws.transpose(0, 2, 1), {**out["filled"].attrs}
        out["filled_draws"].attrs["long_name"] = "data, gaps filled by draws of the posterior"
    out["filled"].attrs["ancillary_variables"] = "filled_sd filled_lower filled_upper status"
    if units in TEMPERATURE:
        for name in parts:
            scale = "on_scale" if anomaly == "data" and name != "filled_sd" else "difference"
            out[name].attrs["units_metadata"] = f"temperature: {scale}"
    if "climatology" in constant:
        out = out.assign(_with_climatology(out, constant["climatology"], units))
    out = to_grid(out.assign_coords(time=constant["time"].variable), constant)
    out.attrs = {"Conventions": "CF-1.11", "title": "Field with gaps filled", "interval_level": level, **attrs}
    if anomaly == "anomalies" and data.attrs.get("base_period"):
        out.attrs["comment"] = f"anomalies from the mean seasonal cycle of {data.attrs['base_period']}"
    out.attrs |= scores
    return out


def _with_climatology(out: xr.Dataset, climatology: xr.DataArray, units: str) -> dict[str, xr.DataArray]:
    """Values in place of anomalies and their interval, by their names."""
    standard = climatology.attrs.get("standard_name")
    name = "sst_filled" if standard == "sea_surface_temperature" else "field_filled"
    cycle = climatology.transpose("time", "cell").values
    found = {}
    for part in ("", "_lower", "_upper"):
        label = "values, gaps filled: the mean seasonal cycle and the filled anomalies"
        label = f"{out[f'filled{part}'].attrs['long_name']} of {name}" if part else label
        found[name + part] = values = (out[f"filled{part}"] + cycle).assign_attrs(long_name=label, units=units)
        if standard is not None:
            values.attrs["standard_name"] = standard
        if units in TEMPERATURE:
            values.attrs["units_metadata"] = "temperature: on_scale"
    found[name].attrs["ancillary_variables"] = f"filled_sd {name}_lower {name}_upper status"
    return found
