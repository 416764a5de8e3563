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

from pathlib import Path
from typing import Annotated

import numpy as np
import xarray as xr

from probmodels.bayesian_svd.attributes import coordinates_encoded, describe
from probmodels.bayesian_svd.checking.neighbours import neighbours
from probmodels.bayesian_svd.correlated import Missing
from probmodels.bayesian_svd.draws import MODES_OF, Draws, blocks, expand, read_draws
from probmodels.bayesian_svd.eof import Anomalies, compare_eof, eof_baseline, make_anomalies, shared_mean
from probmodels.bayesian_svd.grids import to_grid
from probmodels.bayesian_svd.noise import filtered_by
from probmodels.bayesian_svd.patterns.number import has_number, number_of_modes, number_sentence
from probmodels.bayesian_svd.patterns.planes import add_planes, joined_modes, plane_sentences
from probmodels.bayesian_svd.patterns.rotation import ROTATIONS, rotate_draws
from probmodels.distributions.processes import products_summed
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


@checked(SummaryError)
def summarise_modes(
    tree: xr.DataTree,
    *,
    of: Annotated[str, OneOf(tuple(MODES_OF))] | None = None,
    level: Fraction = 0.95,
    check_draws: Count = 400,
    seed: Seed = 0,
    rotation: Annotated[str, OneOf(ROTATIONS)] | None = None,
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
    rotation
        ``"varimax"`` or ``"promax"`` rotates the modes of each draw to simple patterns, by
        `probmodels.bayesian_svd.patterns.rotation`. Patterns are then no longer orthogonal; with promax the series
        correlate, so that shares of variance do not add up to that of all modes.

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
        `probmodels.bayesian_svd.patterns.planes` says. Over ``plane``, where modes are not separated:
        ``plane_first_mode``, ``plane_last_mode``, ``plane_fraction_*``, ``plane_angle_*``, ``plane_determined``, and
        over the cells too ``plane_variance_*``. Rotated modes have none of these and no length-scales; those of promax
        have ``series_correlation_*`` over mode and other_mode. Where modes of the population could vanish,
        ``number_of_modes_*`` of `probmodels.bayesian_svd.patterns.number`. Maps of the fit: ``noise_sd``,
        ``residual_sd``, ``observed_sd``, ``replicated_sd``, ``predictive_p_value`` (probability that replicated data
        vary more than those observed), ``residual_autocorrelation`` at lag 1, ``residual_neighbour_correlation`` with
        that of the nearest cell in the direction, east or north, in which they are more alike, ``area_weight``.

    Raises
    ------
    SummaryError
        If the tree lacks a group or variable, or an option is out of range.
    """
    draws, constant, anomalies = _parts(tree, of)
    population, correlation = draws.of == "population", None
    everything = (draws.d**2).sum(1, keepdims=True) + draws.noise_variance()[:, None]
    if rotation is not None:
        draws, correlation = rotate_draws(draws, rotation)
    num_times, num_modes = anomalies.values.shape[1], draws.d.shape[1]
    bounds = np.array([(1 - level) / 2, (1 + level) / 2])
    mean, spread = draws.spread()

    out = xr.Dataset(coords={"mode": np.arange(1, num_modes + 1, dtype=np.int32)})
    out.coords["other_mode"] = "other_mode", out["mode"].values
    _add_maps(out, draws, draws.basis_space / np.sqrt(anomalies.weight)[:, None], draws.d * spread, bounds)
    _add_pcs(out, draws, mean, spread, bounds)
    if population:
        fraction = draws.d**2 / everything
    else:
        design = constant["fixed_effects_design"].values if "fixed_effects_design" in constant else None
        lost = 0.0 if design is None else np.sum(draws.along(np.linalg.qr(design)[0]) ** 2, axis=0)  # (draw, mode)
        fraction = draws.d**2 * (draws.moments()[1] - lost) / anomalies.total
    _add_interval(out, "explained_variance_fraction", fraction, bounds)
    _add_interval(out, "singular_value", draws.d, bounds)
    _add_interval(out, "sigma", draws.sigma[:, None], bounds)
    if draws.turn is None:
        _add_length_scales(out, tree["posterior"].to_dataset(), constant, bounds)
    if population:
        _add_persistence(out, draws, bounds)
    if correlation is None:
        _add_rotation(out, draws)
        add_planes(out, draws, draws.d * spread, fraction, bounds)
        if population and has_number(tree):
            out = out.merge(number_of_modes(tree, level=level))
    elif rotation == "promax":
        for key, value in _reduce(correlation, bounds).items():
            out[f"series_correlation_{key}"] = ("mode", "other_mode"), value
    _add_checks(out, draws, anomalies, constant, check_draws, seed)
    out["area_weight"] = "cell", anomalies.weight

    out = to_grid(out, constant)
    time = constant["time"] if "time" in constant.coords else xr.DataArray(np.arange(num_times), dims="time")
    out = out.assign_coords(time=("time", time.values, time.attrs))
    return describe(out, tree, constant, level, draws.of, rotation)


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
        ``residual_autocorrelation``, and ``residual_neighbour_correlation`` where cells have positions; over time
        ``residual_variance``.

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
            found = convergence(loading.reshape(draws.num_chains, -1, *loading.shape[1:]), ("r_hat", "ess_bulk"))
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
    that mix processes of correlation r_j by shares p_j of their variance, r^2 is sum_jl p_j p_l r_j r_l.
    """
    assert draws.steps is not None
    _add_interval(out, "autocorrelation", draws.autocorrelation(), bounds)
    unique, place = np.unique(draws.scale, return_inverse=True)
    place = place.reshape(draws.scale.shape)
    sums = products_summed(draws.process, unique, draws.steps)
    if draws.turn is None:
        total = sums[place, place]
    else:
        shares = draws.turn**2
        total = np.einsum("sji,sjl,sli->si", shares, sums[place[:, :, None], place[:, None, :]], shares)
    _add_interval(out, "effective_times", (len(draws.steps) + 1) ** 2 / total, bounds)


def _add_rotation(out: xr.Dataset, draws: Draws) -> None:
    """Share of the posterior variance of each unit pattern that lies along the mean pattern of another mode."""
    mean = draws.space.mean(1)  # (basis, mode)
    gram_mean = draws.basis_space.T @ (draws.basis_space @ mean)
    length = np.sqrt(np.sum(mean * gram_mean, axis=0))
    along = np.einsum("rsi,rj->sij", draws.space, gram_mean / np.maximum(length, 1e-300))
    spread = np.maximum(1 - length**2, 1e-300)  # patterns have unit norm
    out["rotation_share"] = ("mode", "other_mode"), np.minimum(along.var(0) / spread[:, None], 1.0)


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
        rest = _white(rest, draws, anomalies, rng) * mask
    seen = mask * np.isfinite(dof)[:, None]
    level = np.sum(rest**2 * seen, axis=1) / np.maximum(seen.sum(1), 1)  # each cell counts alike
    share = np.sum((rest**2 / np.maximum(level, 1e-300)[:, None]) * seen, axis=0)
    out["residual_variance"] = "time", share / np.maximum(seen.sum(0), 1)
    both = mask[:, 1:] * mask[:, :-1]
    with np.errstate(invalid="ignore", divide="ignore"):  # cells without neighbouring values become NaN
        lag = np.sum(rest[:, 1:] * rest[:, :-1], axis=1) / both.sum(1)
        out["residual_autocorrelation"] = "cell", lag / (np.sum(rest**2, axis=1) / mask.sum(1))
        found = []
        for near in neighbours(constant):
            both = mask * mask[near]
            product = np.sum(rest * rest[near] * both, axis=1)
            size = np.sqrt(np.sum(rest**2 * both, axis=1) * np.sum(rest[near] ** 2 * both, axis=1))
            found.append(product / size)
        if found:  # of the direction in which residuals are more alike
            out["residual_neighbour_correlation"] = "cell", max(found, key=_median)


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


def _white(rest: np.ndarray, draws: Draws, anomalies: Anomalies, rng: np.random.Generator) -> np.ndarray:
    """Residuals (cell, time) as the model has them white: each cell less what near cells and the time before tell.

    Where data are missing, what their noise is expected to be is drawn.
    """
    assert draws.noise is not None
    assert draws.steps is not None
    noise, phi = draws.noise, draws.noise.decay**draws.steps
    rest = np.sqrt(draws.weight)[:, None] * rest
    if not anomalies.complete:
        rest = Missing(anomalies.observed, noise.precision, phi).draw(rng, rest, float(draws.sigma.mean()))
    symmetric = (noise.vectors / np.sqrt(noise.values)) @ noise.vectors.T
    return filtered_by(symmetric @ rest, phi)


def _median(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(np.median(known)) if known.size else -1.0


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
    modes, encoding = coordinates_encoded(modes)
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
    level, joined = 100 * float(modes.attrs.get("interval_level", 0.95)), joined_modes(modes)
    worst = _worst(_diagnosed(modes, "mode_r_hat") if r_hat is None else r_hat, "max")
    least = _worst(_diagnosed(modes, "mode_ess") if ess is None else ess, "min")
    columns: dict[str, list[str]] = {
        "mode": [f"{mode}{'~' * (mode in joined)}" for mode in modes["mode"].values],
        f"variance % [{level:g} %]": _intervals(modes, "explained_variance_fraction", 100),
        f"d [{level:g} %]": _intervals(modes, "singular_value"),
        **_of_priors(modes),
        **({"r_hat max": [f"{x:.3f}" for x in worst]} if worst is not None else {}),
        **({"ESS min": [f"{x:.0f}" for x in least]} if least is not None else {}),
        **({} if comparison is None else _of_eofs(comparison)),
    }
    rows = [list(columns), *map(list, zip(*columns.values(), strict=True))]
    lines = _aligned(rows)
    low, high = float(modes["sigma_lower"]), float(modes["sigma_upper"])
    lines.append(f"noise sd of the weighted anomalies: {float(modes['sigma_mean']):.4g} [{low:.4g}, {high:.4g}]")
    if "number_of_modes" in modes:
        lines.append(number_sentence(modes))
    if comparison is not None and comparison["north_neighbour"].values.any():
        lines.append(
            "* North's rule does not separate this mode from its neighbour: its pattern is defined up to rotation"
        )
    if "rotation" in modes.attrs:
        lines.append(str(modes.attrs["rotation"]))
    lines += [f"~ {text[0].lower()}{text[1:]}" for text in plane_sentences(modes)]
    return "\n".join(lines)


def _intervals(modes: xr.Dataset, name: str, scale: float = 1.0) -> list[str]:
    """Mean and interval of each mode."""
    parts = [scale * modes[f"{name}_{part}"].values for part in ("mean", "lower", "upper")]
    return [f"{mean:.1f} [{low:.1f}, {high:.1f}]" for mean, low, high in zip(*parts, strict=True)]


def _of_priors(modes: xr.Dataset) -> dict[str, list[str]]:
    """Columns of what the series and the patterns were found to be: persistence and length-scales."""
    found = {}
    if "autocorrelation_mean" in modes:
        found["lag-1"] = [f"{x:.2f}" for x in modes["autocorrelation_mean"].values]
        found["eff. times"] = [f"{x:.0f}" for x in modes["effective_times_mean"].values]
    for name in ("space", "time"):
        if (key := f"length_scale_{name}_mean") in modes:
            units = str(modes[key].attrs.get("units", "1"))
            head = f"length {name}" + (f" ({units})" if units != "1" else "")
            found[head] = [f"{x:.4g}" for x in modes[key].values]
    return found


def _of_eofs(comparison: xr.Dataset) -> dict[str, list[str]]:
    """Columns of the EOFs, with a star at those that North's rule does not separate from a neighbour."""
    marks = ["*" if near else " " for near in comparison["north_neighbour"].values]
    correlation = comparison["pattern_correlation"].values
    return {
        "EOF corr.": [f"{x:.3f}{mark}" for x, mark in zip(correlation, marks, strict=True)],
        "EOF var. %": [f"{100 * x:.1f}" for x in comparison["eof_fraction"].values],
    }


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
