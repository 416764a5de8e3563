"""Attributes of a summary of modes, as the CF conventions want them."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import xarray as xr

from probmodels._version import __version__
from probmodels.bayesian_svd.draws import MODES_OF

__all__ = ["REFERENCES", "TEMPERATURE", "coordinates_encoded", "describe"]

REFERENCES = (
    "North et al. (1982), https://doi.org/10.1175/1520-0493(1982)110<0699:SEITEO>2.0.CO;2; probmodels, Bayesian "
    "singular value decomposition"
)
TEMPERATURE = ("degC", "K", "kelvin", "celsius", "degree_Celsius", "degrees_C", "degree_C", "Celsius", "deg_C")

_NUMBERS = {"mode": "number of the mode", "other_mode": "number of the other mode"}
_LAST = ("time", "cell", "y", "x", "lat", "lon")  # dims in the order of the conventions
_ROTATED = {
    "varimax": "varimax: series are uncorrelated, patterns are not orthogonal",
    "promax": "promax: series are correlated, so that shares of variance do not add up; patterns are not orthogonal",
}


def describe(
    out: xr.Dataset, tree: xr.DataTree, constant: xr.Dataset, level: float, of: str, rotation: str | None
) -> xr.Dataset:
    """Attributes of every variable and of the whole, as the CF conventions want them."""
    data = constant["data"]

    def attribute(name: str, default: str = "") -> str:
        return str(data.attrs.get(name) or constant.attrs.get(name) or tree.attrs.get(name) or default)

    units = attribute("units", "1")
    _describe_intervals(out, units, level, of, rotation)
    _describe_single(out, units)
    for name in out.data_vars:
        if str(name).startswith("plane_variance"):
            out[name].attrs["units"] = "1" if units == "1" else f"{units}2"
    for array in out.data_vars.values():
        if array.attrs["units"] in TEMPERATURE:
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
    kind = "Modes" if rotation is None else f"{rotation.capitalize()} modes"
    out.attrs = {
        "Conventions": "CF-1.11",
        "title": f"{kind} of variability by Bayesian SVD: {title}",
        "estimand": MODES_OF[of],
        "source": f"Bayesian SVD ({engine}), probmodels {__version__}" + (f", of {source}" if source else ""),
        "history": f"{attribute('created', 'undated')}: draws by {engine}, reduced by probmodels {__version__}",
        "references": REFERENCES,
        "comment": "Cells of a map are in data units per standard deviation of the principal component of its mode"
        + (", that of the process that its series is." if of == "population" else "."),
        "interval_level": level,
        **({} if rotation is None else {"rotation": _ROTATED[rotation]}),
        "spec_sha256": hashlib.sha256(attribute("spec", "{}").encode()).hexdigest(),
        "data_sha256": checksum or "unknown",
    }
    return out


def _describe_intervals(out: xr.Dataset, units: str, level: float, of: str, rotation: str | None) -> None:
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
        "singular_value": ("singular value", "1")
        if of == "times" and rotation is None
        else ("standard deviation of the mode", units),
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
        "series_correlation_mean": ("correlation of the series of two modes, posterior mean", "1"),
        "series_correlation_sd": ("correlation of the series of two modes, posterior standard deviation", "1"),
        "series_correlation_lower": ("correlation of the series of two modes, lower end of the interval", "1"),
        "series_correlation_upper": ("correlation of the series of two modes, upper end of the interval", "1"),
        "rotation_share": ("share of the posterior variance of a pattern along the mean pattern of another mode", "1"),
        "noise_sd": ("standard deviation of the noise of the model, posterior mean", units),
        "residual_sd": ("standard deviation of the data about fixed effects and modes", units),
        "observed_sd": ("standard deviation of the data about the fixed effects", units),
        "replicated_sd": ("standard deviation of replicated data about the fixed effects, posterior mean", units),
        "predictive_p_value": ("posterior probability that replicated data vary more than those observed", "1"),
        "residual_autocorrelation": ("lag-1 autocorrelation of the residual", "1"),
        "residual_neighbour_correlation": ("correlation of the residual with that of the nearest cell", "1"),
        "residual_variance": ("mean square of the residuals over cells, relative to that of all times", "1"),
        "area_weight": ("area weight", "1"),
    }
    for name, (label, unit) in single.items():
        if name in out:
            out[name].attrs.update(long_name=label, units=unit)


def _describe_axes(out: xr.Dataset) -> None:
    """Names and units of the coordinates."""
    out["mode"].attrs.update(long_name="number of the mode", units="1")
    out["other_mode"].attrs.update(long_name="number of the other mode", units="1")
    out["time"].attrs = _of_time(out["time"])


def _of_time(time: xr.DataArray) -> dict[str, str]:
    """Attributes of a time axis, with dates or without."""
    if np.issubdtype(time.dtype, np.number):
        return {"long_name": "time step", "units": str(time.attrs.get("units", "1"))}
    attrs = {"standard_name": "time", "long_name": "time", "axis": "T"}
    leap = {"units_metadata": "leap_seconds: unknown"} if np.issubdtype(time.dtype, np.datetime64) else {}
    return attrs | leap


def coordinates_encoded(dataset: xr.Dataset) -> tuple[xr.Dataset, dict[str, dict[str, object]]]:
    """How coordinates are written; a time axis without dates becomes ``step``, as CF knows no other time.

    Only cells of a curvilinear grid may lack a place. The share of ice is a variable in files.
    """
    dataset = dataset.reset_coords("ice_share") if "ice_share" in dataset.coords else dataset
    dataset = dataset.assign_coords(time=dataset["time"].assign_attrs(_of_time(dataset["time"])))
    for name, words in _NUMBERS.items():
        if name in dataset.coords:
            dataset[name].attrs = {"long_name": words, "units": "1"} | dataset[name].attrs
    dataset = dataset.transpose(..., *(dim for dim in _LAST if dim in dataset.dims))
    dataset.attrs.setdefault("history", f"made by probmodels {__version__}")
    encoding: dict[str, dict[str, object]] = {str(name): {"_FillValue": None} for name in dataset.coords}
    for coord, array in dataset.coords.items():
        if array.ndim > 1 and array.isnull().any():
            encoding[str(coord)] = {"_FillValue": np.nan}
    if np.issubdtype(dataset["time"].dtype, np.number):
        dataset = dataset.rename(time="step")
        encoding["step"] = encoding.pop("time")
    else:
        encoding["time"] |= {"units": "days since 1850-01-01", "dtype": "float64"}
    return dataset, encoding
