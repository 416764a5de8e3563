"""Maps, series and checks of a Bayesian SVD from its draws, as labelled arrays, CF-NetCDF and a table.

The result of inference holds the modes in coordinates of two bases, so that draws stay small. Here they are expanded,
a block of cells at a time, and reduced to what is looked at. With draws U, V, d, sigma and the area weight w:

- the map of a mode is ``w^-1/2 (B_space U) d sd(V)``, in data units per standard deviation of its principal component,
- the principal component is ``(V - mean V) / sd(V)`` with ``V <- B_time V``,
- the fraction of variance is ``d^2 |P V|^2 / total``, where P removes the fixed effects and the total is the weighted
  sum of squares of the anomalies, as for EOFs,
- the noise of a cell has the standard deviation ``sigma w^-1/2``, or ``sigma`` times its level where noise is
  correlated.

Intervals are equal-tailed. A draw counts as one, whatever its chain.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated

import numpy as np
import xarray as xr
from scipy.spatial import cKDTree

from probmodels._version import __version__
from probmodels.bayesian_svd.draws import MODES_OF, Draws, blocks, expand, read_draws
from probmodels.bayesian_svd.eof import Anomalies, compare_eof, eof_baseline, make_anomalies, shared_mean, to_grid
from probmodels.bayesian_svd.noise import filtered_by
from probmodels.bayesian_svd.planes import add_planes, joined_modes, plane_sentences
from probmodels.errors import SummaryError
from probmodels.inference.diagnostics.convergence import convergence
from probmodels.options import Count, Fraction, OneOf, Seed, checked

__all__ = [
    "SummaryError",
    "compare_eof",
    "eof_baseline",
    "residual_checks",
    "summarise_modes",
    "summary_table",
    "write_modes",
]

REFERENCES = (
    "North et al. (1982), https://doi.org/10.1175/1520-0493(1982)110<0699:SEITEO>2.0.CO;2; probmodels, Bayesian "
    "singular value decomposition"
)
_TEMPERATURE = ("degC", "K", "kelvin", "celsius", "degree_Celsius", "degrees_C", "degree_C", "Celsius", "deg_C")


@checked(SummaryError)
def summarise_modes(
    tree: xr.DataTree,
    *,
    of: Annotated[str, OneOf(tuple(MODES_OF))] | None = None,
    level: Fraction = 0.95,
    check_draws: Count = 400,
    seed: Seed = 0,
) -> xr.Dataset:
    """Posterior maps, principal components, explained variance and predictive checks of a Bayesian SVD.

    Parameters
    ----------
    tree
        Result with aligned draws: groups ``posterior`` (``U``, ``V``, ``d``, ``sigma``) and ``constant_data``
        (``basis_space_matrix``, ``basis_time_matrix``, ``data``, optionally ``weight``, ``fixed_effects_design``, and
        lat and lon over cell).
    of
        Whose modes: ``"population"``, of which these times are one realisation, where the series of the result are a
        process in time; or ``"times"``, the modes of the field at these times. None for the population where it is
        known.
    level
        Probability content of the intervals.
    check_draws
        Number of draws that the predictive checks use, evenly thinned; at most those there are.
    seed
        Seed of the replicated data.

    Returns
    -------
    xr.Dataset
        Over (mode, lat, lon), or (mode, cell) for cells without a grid: ``mode_mean``, ``mode_sd``, ``mode_lower``,
        ``mode_upper``, ``prob_positive``, and for two chains or more ``mode_r_hat`` and ``mode_ess``. Over
        (mode, time): ``pc_mean`` and so on. Over mode: ``explained_variance_fraction_*``, ``singular_value_*``,
        ``length_scale_*``, and for modes of the population ``autocorrelation_*`` and ``effective_times_*``. Over mode
        and other_mode: ``rotation_share``, the part of a pattern's posterior variance
        that lies along the mean of another. Over ``pair``, neighbouring modes: ``order_probability``, ``rotation_sd``,
        ``rotation_lower``, ``rotation_upper`` and for the population ``north_angle``, as
        `probmodels.bayesian_svd.planes` says. Over ``plane``, where modes are not separated: ``plane_first_mode``,
        ``plane_last_mode``, ``plane_fraction_*``, ``plane_angle_*``, ``plane_determined``, and over the cells too
        ``plane_variance_*``. Maps of the fit: ``noise_sd``, ``residual_sd``, ``observed_sd``,
        ``replicated_sd``, ``predictive_p_value`` (probability that replicated data vary more than those observed),
        ``residual_autocorrelation`` at lag 1, ``residual_neighbour_correlation`` with that of the nearest cell,
        ``area_weight``.

    Raises
    ------
    SummaryError
        If the tree lacks a group or variable, or an option is out of range.
    """
    draws, constant, anomalies = _parts(tree, of)
    basis_space = constant["basis_space_matrix"].transpose("cell", ...).values.astype(float)
    num_times, num_modes = anomalies.values.shape[1], draws.d.shape[1]
    bounds = np.array([(1 - level) / 2, (1 + level) / 2])
    population = draws.of == "population"
    mean_v, square_v = draws.moments()  # (draw, mode)
    spread = np.sqrt(np.maximum(square_v - num_times * mean_v**2, 0.0) / (num_times - 1))
    if population:  # the process has mean zero and variance one
        mean_v, spread = np.zeros_like(mean_v), np.ones_like(spread)

    out = xr.Dataset(coords={"mode": np.arange(1, num_modes + 1, dtype=np.int32)})
    _add_maps(out, draws, basis_space / np.sqrt(anomalies.weight)[:, None], draws.d * spread, bounds)
    _add_pcs(out, draws, mean_v, spread, bounds)
    if population:
        everything = (draws.d**2).sum(1, keepdims=True) + draws.noise_variance()[:, None]
        fraction = draws.d**2 / everything
    else:
        design = constant["fixed_effects_design"].values if "fixed_effects_design" in constant else None
        lost = 0.0 if design is None else np.sum(draws.along(np.linalg.qr(design)[0]) ** 2, axis=0)  # (draw, mode)
        fraction = draws.d**2 * (square_v - lost) / anomalies.total
    _add_interval(out, "explained_variance_fraction", fraction, bounds)
    _add_interval(out, "singular_value", draws.d, bounds)
    _add_interval(out, "sigma", draws.sigma[:, None], bounds)
    if draws.turn is None:
        _add_length_scales(out, tree["posterior"].to_dataset(), constant, bounds)
    if population:
        _add_persistence(out, draws, bounds)
    _add_rotation(out, draws, basis_space)
    add_planes(out, draws, draws.d * spread, fraction, bounds)
    _add_checks(out, draws, anomalies, constant, check_draws, seed)
    out["area_weight"] = "cell", anomalies.weight

    out = to_grid(out, constant)
    time = constant["time"] if "time" in constant.coords else xr.DataArray(np.arange(num_times), dims="time")
    out = out.assign_coords(time=("time", time.values, time.attrs))
    return _describe(out, tree, constant, level, draws.of)


@checked(SummaryError)
def residual_checks(tree: xr.DataTree, *, check_draws: Count = 400, seed: Seed = 0) -> xr.Dataset:
    """The predictive checks and residuals of `summarise_modes` alone, over cell.

    Parameters
    ----------
    tree, check_draws, seed
        As for `summarise_modes`.

    Returns
    -------
    xr.Dataset
        ``noise_sd``, ``residual_sd``, ``observed_sd``, ``replicated_sd``, ``predictive_p_value``,
        ``residual_autocorrelation``, and ``residual_neighbour_correlation`` where cells have positions.

    Raises
    ------
    SummaryError
        If the tree lacks a group or variable, or an option is out of range.
    """
    out = xr.Dataset()
    draws, constant, anomalies = _parts(tree, None)
    _add_checks(out, draws, anomalies, constant, check_draws, seed)
    return out


def _parts(tree: xr.DataTree, of: str | None) -> tuple[Draws, xr.Dataset, Anomalies]:
    """Draws, data and anomalies of a result."""
    draws, constant = read_draws(tree, of), tree["constant_data"].to_dataset()
    return draws, constant, make_anomalies(constant, shared_mean(tree))


def _reduce(values: np.ndarray, bounds: np.ndarray) -> dict[str, np.ndarray]:
    """Mean, sd and quantiles over draws of (draw, ..., mode), each (..., mode)."""
    lower, upper = np.quantile(values, bounds, axis=0)
    return {"mean": values.mean(0), "sd": values.std(0, ddof=1), "lower": lower, "upper": upper}


def _add_maps(out: xr.Dataset, draws: Draws, basis: np.ndarray, scale: np.ndarray, bounds: np.ndarray) -> None:
    num_cells, (num_draws, num_modes) = len(basis), draws.d.shape
    maps: dict[str, np.ndarray] = {}
    for block in blocks(num_cells, num_draws, num_modes):
        loading = expand(basis[block], draws.space) * scale[:, None, :]  # (draw, cell, mode)
        reduced = {f"mode_{k}": v for k, v in _reduce(loading, bounds).items()}
        reduced["prob_positive"] = np.mean(loading > 0, axis=0)
        if draws.num_chains > 1:
            found = convergence(loading.reshape(draws.num_chains, -1, *loading.shape[1:]))
            reduced |= {"mode_r_hat": found["r_hat"], "mode_ess": found["ess_bulk"]}
        for name, value in reduced.items():
            maps.setdefault(name, np.empty((num_modes, num_cells)))[:, block] = value.T
    for name, value in maps.items():
        out[name] = ("mode", "cell"), value


def _add_pcs(out: xr.Dataset, draws: Draws, mean: np.ndarray, spread: np.ndarray, bounds: np.ndarray) -> None:
    num_times = len(draws.time if draws.basis_time is None else draws.basis_time)
    num_draws, num_modes = draws.d.shape
    series = {f"pc_{k}": np.empty((num_modes, num_times)) for k in ("mean", "sd", "lower", "upper")}
    for block in blocks(num_times, num_draws, num_modes):
        pc = (draws.series(block) - mean[:, None, :]) / spread[:, None, :]
        for name, value in _reduce(pc, bounds).items():
            series[f"pc_{name}"][:, block] = value.T
    for name, value in series.items():
        out[name] = ("mode", "time"), value


def _add_interval(out: xr.Dataset, name: str, values: np.ndarray, bounds: np.ndarray, units: str = "1") -> None:
    for key, value in _reduce(values, bounds).items():
        if key != "sd":
            array = xr.DataArray(value, dims="mode") if value.size > 1 or name != "sigma" else xr.DataArray(value[0])
            out[f"{name}_{key}"] = array.assign_attrs(units=units)


def _add_length_scales(out: xr.Dataset, posterior: xr.Dataset, constant: xr.Dataset, bounds: np.ndarray) -> None:
    dated = "time" in constant.coords and np.issubdtype(constant["time"].dtype, np.datetime64)
    units = {
        "length_scale_space": "km" if "lat" in constant.coords else "1",
        "length_scale_time": "year" if dated else "1",
    }
    for name, unit in units.items():
        if name not in posterior or set(posterior[name].dims) != {"chain", "draw", "mode"}:
            continue
        values = posterior[name].transpose("chain", "draw", "mode").values.reshape(-1, posterior.sizes["mode"])
        if np.isfinite(values).all() and values.any():  # a mode without correlation has the length zero
            _add_interval(out, name, values, bounds, str(posterior[name].attrs.get("units", unit)))


def _add_persistence(out: xr.Dataset, draws: Draws, bounds: np.ndarray) -> None:
    """Autocorrelation of each series over one step, and how many independent times have as much of its variance.

    The variance of a mean square of T correlated values is 2 / T^2 sum r(t - s)^2: that of T^2 / sum values. For series
    that mix processes of decay rho_j by shares p_j of their variance, r^2 is sum_jl p_j p_l (rho_j rho_l)^lag.
    """
    assert draws.decay is not None
    assert draws.steps is not None
    _add_interval(out, "autocorrelation", draws.autocorrelation(), bounds)
    decay = draws.decay
    products = decay**2 if draws.turn is None else decay[:, :, None] * decay[:, None, :]
    unique, place = np.unique(products, return_inverse=True)
    total, inner = np.ones(len(unique)), np.ones(len(unique))
    for step in draws.steps:  # inner: sum over earlier times, this one included
        inner = 1.0 + unique**step * inner
        total += 2 * inner - 1
    sums = total[place].reshape(products.shape)
    if draws.turn is not None:
        sums = np.einsum("sji,sjl,sli->si", draws.turn**2, sums, draws.turn**2)
    _add_interval(out, "effective_times", (len(draws.steps) + 1) ** 2 / sums, bounds)


def _add_rotation(out: xr.Dataset, draws: Draws, basis_space: np.ndarray) -> None:
    """Share of the posterior variance of each unit pattern that lies along the mean pattern of another mode."""
    mean = draws.space.mean(1)  # (basis, mode)
    gram_mean = basis_space.T @ (basis_space @ mean)
    length = np.sqrt(np.sum(mean * gram_mean, axis=0))
    along = np.einsum("rsi,rj->sij", draws.space, gram_mean / np.maximum(length, 1e-300))
    spread = np.maximum(1 - length**2, 1e-300)  # patterns have unit norm
    out["rotation_share"] = ("mode", "other_mode"), np.minimum(along.var(0) / spread[:, None], 1.0)
    out.coords["other_mode"] = "other_mode", out["mode"].values


def _add_checks(
    out: xr.Dataset,
    draws: Draws,
    anomalies: Anomalies,
    constant: xr.Dataset,
    check_draws: int,
    seed: int,
) -> None:
    """Residuals, and the variance of each cell against that of replicated data.

    About the fixed effects, the replicated sum of squares of a cell is noise variance times a non-central chi-square
    with the degrees of freedom of the cell and non-centrality |P signal|^2 / noise variance: no data need be simulated.
    """
    num_draws, num_modes = draws.d.shape
    num_cells = len(draws.weight)
    rng = np.random.default_rng(seed)
    chosen = np.unique(np.linspace(0, num_draws - 1, min(check_draws, num_draws)).round().astype(int))
    mask = anomalies.observed.astype(float)
    effects = anomalies.effects
    noise = draws.noise_level
    scale = _persistent_share(draws, anomalies)
    observed = np.sum(anomalies.values**2, axis=1)  # (cell,)
    dof = np.where(anomalies.dof > 0, anomalies.dof, np.nan)
    exceed, replicated, residual = np.zeros(num_cells), np.zeros(num_cells), np.zeros(num_cells)
    signal = np.zeros(anomalies.values.shape)
    for block in blocks(len(chosen), num_cells, num_modes * (num_modes + effects.shape[2] * (len(effects) > 1))):
        index = chosen[block]
        u = draws.patterns(draws=index)  # (draw, cell, mode)
        v = draws.series(draws=index)  # (draw, time, mode)
        if len(effects) == 1 and anomalies.complete:
            v = v - effects[0] @ (effects[0].T @ v)
            gram = np.einsum("sti,stj->sij", v, v)
            square = np.einsum("sni,sij,snj->sn", u, gram, u)
        else:
            square = np.zeros(u.shape[:2])
            inner = np.einsum("ntq,sti->snqi", effects, v, optimize=True)
            for i in range(num_modes):
                for j in range(i + 1):
                    pair = (v[:, :, i] * v[:, :, j]) @ mask.T - np.sum(inner[..., i] * inner[..., j], axis=2)
                    square += (1 + (i != j)) * u[:, :, i] * u[:, :, j] * pair
        square = np.maximum(square, 0.0)
        cross = np.sum(u * np.einsum("nt,sti->sni", anomalies.values, v, optimize=True), axis=2)
        variance = draws.sigma[index, None] ** 2 * noise**2  # (draw, cell)
        spread = variance * scale
        fake = spread * rng.noncentral_chisquare(np.where(anomalies.dof > 0, anomalies.dof / scale, 1), square / spread)
        exceed += np.sum(fake >= observed, axis=0)
        replicated += np.sum(np.sqrt(fake / dof), axis=0)
        residual += np.sum(observed - 2 * cross + square, axis=0)
        signal += np.einsum("sni,sti->nt", u, v, optimize=True)
    count = len(chosen)
    out["noise_sd"] = "cell", draws.sigma.mean() * noise
    out["residual_sd"] = "cell", np.sqrt(np.maximum(residual / count, 0.0) / dof)
    out["observed_sd"] = "cell", np.sqrt(observed / dof)
    out["replicated_sd"] = "cell", replicated / count
    out["predictive_p_value"] = "cell", np.where(np.isfinite(dof), exceed / count, np.nan)
    rest = anomalies.values - anomalies.remove_effects(signal / count)
    if draws.noise is not None:
        rest = _white(rest, draws) * mask
    both = mask[:, 1:] * mask[:, :-1]
    with np.errstate(invalid="ignore", divide="ignore"):  # cells without neighbouring values become NaN
        lag = np.sum(rest[:, 1:] * rest[:, :-1], axis=1) / both.sum(1)
        out["residual_autocorrelation"] = "cell", lag / (np.sum(rest**2, axis=1) / mask.sum(1))
        if (near := _nearest(constant)) is not None:
            both = mask * mask[near]
            product = np.sum(rest * rest[near] * both, axis=1)
            size = np.sqrt(np.sum(rest**2 * both, axis=1) * np.sum(rest[near] ** 2 * both, axis=1))
            out["residual_neighbour_correlation"] = "cell", product / size


def _persistent_share(draws: Draws, anomalies: Anomalies) -> float:
    """How much rarer independent values of the noise are than values: 1 where it is white.

    A sum of squares e'Me of persistent noise has the mean tr MA and the variance 2 tr MAMA, A its correlation: that of
    a chi-square with dof / scale degrees of freedom times scale = tr MAMA / tr MA.
    """
    if draws.noise is None or draws.steps is None:
        return 1.0
    times = np.concatenate([[0.0], np.cumsum(draws.steps)])
    process = draws.noise.decay ** np.abs(times[:, None] - times)
    if draws.design.shape[1]:
        basis = np.linalg.qr(draws.design)[0]
        process = process - basis @ (basis.T @ process)
    return max(1.0, float(np.sum(process * process.T) / np.trace(process)))


def _white(rest: np.ndarray, draws: Draws) -> np.ndarray:
    """Residuals (cell, time) as the model has them white: each cell less what near cells and the time before tell."""
    assert draws.noise is not None
    assert draws.steps is not None
    noise = draws.noise
    symmetric = (noise.vectors / np.sqrt(noise.values)) @ noise.vectors.T
    return filtered_by(symmetric @ (np.sqrt(draws.weight)[:, None] * rest), noise.decay**draws.steps)


def _nearest(constant: xr.Dataset) -> np.ndarray | None:
    """Index of the cell nearest to each cell; None where cells have no positions."""
    if {"lat", "lon"} <= set(constant.coords):
        lat, lon = (np.deg2rad(constant[name].values.astype(float)) for name in ("lat", "lon"))
        points = np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)], axis=1)
    else:
        axes = [name for name in ("x", "y", "z") if name in constant.coords and constant[name].dims == ("cell",)]
        axes = axes or [name for name in ("cell",) if name in constant.coords]
        if not axes or any(constant[name].dtype.kind not in "iuf" for name in axes):
            return None
        points = np.stack([constant[name].values.astype(float) for name in axes], axis=1)
    if len(points) < 2:
        return None
    return np.asarray(cKDTree(points).query(points, k=2)[1][:, 1])


def _describe(out: xr.Dataset, tree: xr.DataTree, constant: xr.Dataset, level: float, of: str) -> xr.Dataset:
    """Attributes of every variable and of the whole, as the CF conventions want them."""
    data = constant["data"]

    def attribute(name: str, default: str = "") -> str:
        return str(data.attrs.get(name) or constant.attrs.get(name) or tree.attrs.get(name) or default)

    units = attribute("units", "1")
    _describe_intervals(out, units, level, of)
    _describe_single(out, units)
    for name in out.data_vars:
        if str(name).startswith("plane_variance"):
            out[name].attrs["units"] = "1" if units == "1" else f"{units}2"
    for array in out.data_vars.values():
        if array.attrs["units"] in _TEMPERATURE:
            array.attrs["units_metadata"] = "temperature: difference"
    _describe_axes(out)
    engine = attribute("engine", "inference")
    title = (
        attribute("title")
        or ", ".join(x for x in map(attribute, ("long_name", "region", "period")) if x not in ("", "all"))
        or "field"
    )
    sources = json.loads(attribute("source_files", "[]"))
    source = attribute("source") or ", ".join(str(x["name"]) for x in sources)
    checksum = attribute("data_sha256") or attribute("sha256") or " ".join(str(x["sha256"]) for x in sources)
    out.attrs = {
        "Conventions": "CF-1.11",
        "title": f"Modes of variability by Bayesian SVD: {title}",
        "estimand": MODES_OF[of],
        "source": f"Bayesian SVD ({engine}), probmodels {__version__}" + (f", of {source}" if source else ""),
        "history": f"{attribute('created', 'undated')}: draws by {engine}, reduced by probmodels {__version__}",
        "references": REFERENCES,
        "comment": "Cells of a map are in data units per standard deviation of the principal component of its mode"
        + (", that of the process that its series is." if of == "population" else "."),
        "interval_level": level,
        "spec_sha256": hashlib.sha256(attribute("spec", "{}").encode()).hexdigest(),
        "data_sha256": checksum or "unknown",
    }
    return out


def _describe_intervals(out: xr.Dataset, units: str, level: float, of: str) -> None:
    """Names and units of what has a posterior mean, a standard deviation and an interval."""
    percent = f"{100 * level:g} % equal-tailed interval"
    parts = {"mean": "posterior mean", "sd": "posterior standard deviation"}
    parts |= {"lower": f"lower end of the {percent}", "upper": f"upper end of the {percent}"}
    roots = {
        "mode": ("pattern per standard deviation of its principal component", units),
        "pc": ("standardised principal component", "1"),
        "explained_variance_fraction": (
            "fraction of the weighted variance of the anomalies explained"
            if of == "times"
            else "fraction of the weighted variance of the population explained",
            "1",
        ),
        "singular_value": ("singular value", "1") if of == "times" else ("standard deviation of the mode", units),
        "autocorrelation": ("autocorrelation of the principal component over one time step", "1"),
        "effective_times": ("number of independent times that tell as much of the variance of the mode", "1"),
        "sigma": ("standard deviation of the noise of the weighted anomalies", units),
        "length_scale_space": ("length-scale of the pattern", None),
        "length_scale_time": ("length-scale of the principal component", None),
    }
    for root, (label, unit) in roots.items():
        for part, words in parts.items():
            if (name := f"{root}_{part}") in out:
                out[name].attrs["long_name"] = f"{label}, {words}"
                if unit is not None:
                    out[name].attrs["units"] = unit
        if f"{root}_mean" in out:
            linked = [f"{root}_{p}" for p in ("sd", "lower", "upper") if f"{root}_{p}" in out]
            if root == "mode":
                linked += [x for x in ("prob_positive", "mode_r_hat", "mode_ess") if x in out]
            out[f"{root}_mean"].attrs["ancillary_variables"] = " ".join(linked)


def _describe_single(out: xr.Dataset, units: str) -> None:
    """Names and units of variables that are one number by mode or cell."""
    single = {
        "prob_positive": ("posterior probability that the pattern is positive", "1"),
        "mode_r_hat": ("rank-normalised split R-hat of the pattern", "1"),
        "mode_ess": ("bulk effective sample size of the pattern", "1"),
        "rotation_share": ("share of the posterior variance of a pattern along the mean pattern of another mode", "1"),
        "noise_sd": ("standard deviation of the noise of the model, posterior mean", units),
        "residual_sd": ("standard deviation of the data about fixed effects and modes", units),
        "observed_sd": ("standard deviation of the data about the fixed effects", units),
        "replicated_sd": ("standard deviation of replicated data about the fixed effects, posterior mean", units),
        "predictive_p_value": ("posterior probability that replicated data vary more than those observed", "1"),
        "residual_autocorrelation": ("lag-1 autocorrelation of the residual", "1"),
        "residual_neighbour_correlation": ("correlation of the residual with that of the nearest cell", "1"),
        "area_weight": ("area weight", "1"),
    }
    for name, (label, unit) in single.items():
        if name in out:
            out[name].attrs.update(long_name=label, units=unit)


def _describe_axes(out: xr.Dataset) -> None:
    """Names and units of the coordinates."""
    out["mode"].attrs.update(long_name="number of the mode", units="1")
    out["other_mode"].attrs.update(long_name="number of the other mode", units="1")
    if "lat" in out.coords:
        out["lat"].attrs.update(standard_name="latitude", long_name="latitude", units="degrees_north")
        out["lon"].attrs.update(standard_name="longitude", long_name="longitude", units="degrees_east")
    if "lat" in out.dims:
        out["lat"].attrs["axis"], out["lon"].attrs["axis"] = "Y", "X"
    if np.issubdtype(out["time"].dtype, np.number):
        out["time"].attrs = {"long_name": "time step", "units": str(out["time"].attrs.get("units", "1"))}
    else:
        out["time"].attrs = {"standard_name": "time", "long_name": "time", "axis": "T"}
        if np.issubdtype(out["time"].dtype, np.datetime64):
            out["time"].attrs["units_metadata"] = "leap_seconds: unknown"


@checked(SummaryError)
def write_modes(modes: xr.Dataset, path: str | Path) -> Path:
    """Write the maps and series of `summarise_modes` as NetCDF that keeps to the CF conventions 1.11.

    A time axis without dates becomes ``step``, since the conventions know no other time.

    Parameters
    ----------
    modes
        From `summarise_modes`.
    path
        File to write; its folder is made.

    Returns
    -------
    Path
        The file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    encoding: dict[str, dict[str, object]] = {str(name): {"_FillValue": None} for name in modes.coords}
    if np.issubdtype(modes["time"].dtype, np.number):
        modes = modes.rename(time="step")
        encoding["step"] = encoding.pop("time")
    else:
        encoding["time"] |= {"units": "days since 1850-01-01", "dtype": "float64"}
    for name, array in modes.data_vars.items():
        if array.ndim > 1:
            encoding[str(name)] = {"dtype": "float32", "_FillValue": np.float32(np.nan)}
        else:
            encoding[str(name)] = {"_FillValue": None}
    modes.to_netcdf(path, engine="netcdf4", encoding=encoding)
    return path


@checked(SummaryError)
def summary_table(
    modes: xr.Dataset,
    comparison: xr.Dataset | None = None,
    *,
    r_hat: xr.Dataset | None = None,
    ess: xr.Dataset | None = None,
) -> str:
    """One line per mode for the terminal, then one for the noise.

    Parameters
    ----------
    modes, comparison
        From `summarise_modes` and `compare_eof`.
    r_hat, ess
        Diagnostics of the posterior, variables and dims as there less chain and draw; the worst of each mode is shown.
        By default those of the maps, where these come from more than one chain.

    Returns
    -------
    str
        Aligned lines, without a final newline.
    """
    level = 100 * float(modes.attrs.get("interval_level", 0.95))
    header = ["mode", f"variance % [{level:g} %]", f"d [{level:g} %]"]
    scales = [x for x in ("length_scale_space", "length_scale_time") if f"{x}_mean" in modes]
    units = {x: str(modes[f"{x}_mean"].attrs.get("units", "1")) for x in scales}
    if "autocorrelation_mean" in modes:
        header += ["lag-1", "eff. times"]
    header += [x.replace("length_scale_", "length ") + (f" ({units[x]})" if units[x] != "1" else "") for x in scales]
    worst = _worst(_diagnosed(modes, "mode_r_hat") if r_hat is None else r_hat, "max")
    least = _worst(_diagnosed(modes, "mode_ess") if ess is None else ess, "min")
    header += ["r_hat max"] * (worst is not None) + ["ESS min"] * (least is not None)
    header += ["EOF corr.", "EOF var. %"] * (comparison is not None)

    def interval(name: str, i: int, scale: float = 1.0) -> str:
        mean, low, high = (scale * float(modes[f"{name}_{x}"][i]) for x in ("mean", "lower", "upper"))
        return f"{mean:.1f} [{low:.1f}, {high:.1f}]"

    rows, joined = [header], joined_modes(modes)
    for i, mode in enumerate(modes["mode"].values):
        row = [
            str(mode) + "~" * (mode in joined),
            interval("explained_variance_fraction", i, 100),
            interval("singular_value", i),
        ]
        if "autocorrelation_mean" in modes:
            row += [f"{float(modes['autocorrelation_mean'][i]):.2f}", f"{float(modes['effective_times_mean'][i]):.0f}"]
        row += [f"{float(modes[f'{x}_mean'][i]):.4g}" for x in scales]
        row += [f"{worst[i]:.3f}"] if worst is not None else []
        row += [f"{least[i]:.0f}"] if least is not None else []
        if comparison is not None:
            mark = "*" if comparison["north_neighbour"].values[i] else " "
            row += [f"{float(comparison['pattern_correlation'][i]):.3f}{mark}"]
            row += [f"{100 * float(comparison['eof_fraction'][i]):.1f}"]
        rows.append(row)
    lines = _aligned(rows)
    low, high = float(modes["sigma_lower"]), float(modes["sigma_upper"])
    lines.append(f"noise sd of the weighted anomalies: {float(modes['sigma_mean']):.4g} [{low:.4g}, {high:.4g}]")
    if comparison is not None and comparison["north_neighbour"].values.any():
        lines.append(
            "* North's rule does not separate this mode from its neighbour: its pattern is defined up to rotation"
        )
    lines += [f"~ {text[0].lower()}{text[1:]}" for text in plane_sentences(modes)]
    return "\n".join(lines)


def _aligned(rows: list[list[str]]) -> list[str]:
    """Lines with columns of equal width, a rule below the first."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return lines


def _diagnosed(modes: xr.Dataset, name: str) -> xr.Dataset:
    """A diagnostic of the maps; nothing where it was not computed."""
    return modes[[name] if name in modes else []]


def _worst(diagnostic: xr.Dataset, how: str) -> np.ndarray | None:
    """Largest or least value per mode over all variables that have the dim mode."""
    arrays = [x for x in diagnostic.data_vars.values() if "mode" in x.dims]
    if not arrays:
        return None
    values = [getattr(x, how)([d for d in x.dims if d != "mode"]).values for x in arrays]
    return np.max(values, axis=0) if how == "max" else np.min(values, axis=0)
