"""What the modes are: sections of the report on patterns, variances, EOFs and El Niño."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import xarray as xr
from markupsafe import Markup

from probmodels._page import bullets, paragraphs, table
from probmodels.bayesian_svd.checks import misfit
from probmodels.bayesian_svd.indices.el_nino import el_nino_sentences
from probmodels.bayesian_svd.patterns.number import number_sentence
from probmodels.bayesian_svd.patterns.planes import joined_modes, plane_sentences
from probmodels.bayesian_svd.reporting.facts import is_of_population

__all__ = ["comparison_section", "el_nino_section", "overview", "patterns_section", "variance_section"]


def _level(modes: xr.Dataset) -> str:
    return f"{100 * float(modes.attrs.get('interval_level', 0.95)):g} %"


def _interval(modes: xr.Dataset, name: str, i: int, scale: float = 1.0, digits: int = 1) -> str:
    mean, low, high = (scale * float(modes[f"{name}_{x}"][i]) for x in ("mean", "lower", "upper"))
    return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def overview(modes: xr.Dataset) -> Markup:
    count = modes.sizes["mode"]
    total = 100 * float(modes["explained_variance_fraction_mean"].sum())
    first = _interval(modes, "explained_variance_fraction", 0, 100)
    sure = [100 * float(((p > 0.95) | (p < 0.05)).sum() / p.notnull().sum()) for p in modes["prob_positive"]]
    text = (
        f"The {count} modes explain {total:.0f} % of the variance, the first {first} %. Share of cells whose sign is "
        "certain to 95 %: " + ", ".join(f"mode {i + 1} {x:.0f} %" for i, x in enumerate(sure)) + "."
    )
    found = misfit(modes)
    outside, lag, near = 100 * found["outside"], found["lag"], found.get("neighbour", 0.0)
    doubts = [f"at {outside:.0f} % of the cells the variance is not what the model expects"] * (outside > 10)
    doubts += [f"its residual is correlated in time ({lag:.2f} between neighbours)"] * (lag > 0.2)
    doubts += [f"its residual is correlated in space ({near:.2f} between neighbours)"] * (near > 0.3)
    fit = (
        f"The model does not fit everywhere: {' and '.join(doubts)}; take intervals as lower bounds." if doubts else ""
    )
    number = f"By the posterior, {number_sentence(modes)}." if "number_of_modes" in modes else ""
    return paragraphs(text, number, fit)


def patterns_section(modes: xr.Dataset) -> Markup:
    units = str(modes["mode_mean"].attrs.get("units", "")).replace("degC", "°C")
    units = "" if units == "1" else f" ({units})"
    text = [
        f"Colours on the left show the departure{units} that goes with one standard deviation of the mode's principal "
        "component. The sign of a mode as a whole is arbitrary: turn both its map and its series round and nothing "
        "changes. Dots mark cells where the sign relative to the rest of the pattern is not certain to 95 %: there "
        "the colour may be noise.",
        "The maps on the right show the posterior standard deviation, in the same unit: how far the pattern is still "
        "open, given these data. Where it is as large as the mean, the pattern says little about that cell.",
        "Two modes that explain nearly the same variance can turn into one another: any rotation of the pair fits "
        "the data almost as well. Then the standard deviation of one has the shape of the other, each pattern is "
        "less certain than both together, and neither should be given a physical meaning of its own.",
    ]
    north = (
        "North's rule of thumb (North et al. 1982) asks the same question as these intervals: would another sample of "
        "times of the same climate give the same modes? It does so by the variances alone and for independent times; "
        "the posterior holds that times depend on each other, that patterns are smooth, and that there is noise."
        if is_of_population(modes)
        else "North's rule of thumb (North et al. 1982) asks a related question: would another sample of years of the "
        "same climate give the same EOFs? Its sampling error is that of the population; the posterior's uncertainty "
        "is about the modes of these years, given the noise, and is usually the smaller. A mode that passes here and "
        "fails North's rule is well measured, but may be a feature of the period."
    )
    out = paragraphs(*text, north)
    if "rotation_share" in modes and modes.sizes["mode"] > 1:
        share = modes["rotation_share"].values - np.diag(np.diag(modes["rotation_share"].values))
        pairs = [(i, int(row.argmax()), 100 * row.max()) for i, row in enumerate(share) if row.max() > 0.25]
        if pairs:
            out += bullets(
                f"Mode {i + 1}: {x:.0f} % of its posterior variance is rotation towards mode {j + 1}."
                for i, j, x in pairs
            )
        else:
            out += paragraphs("Here no mode has more than a quarter of its posterior variance along another one.")
    return out + _pairs(modes)


def _pairs(modes: xr.Dataset) -> Markup:
    """How neighbouring modes turn into one another, and the planes of those that are not separated."""
    if "pair" not in modes.dims:
        return Markup()
    header = ["modes", "order", f"rotation, sd and {_level(modes)}"]
    header += ["North's rule"] if "north_angle" in modes else []
    rows = []
    for i, first in enumerate(modes["pair"].values):
        sd, low, high = (float(modes[f"rotation_{x}"][i]) for x in ("sd", "lower", "upper"))
        row = [f"{first}, {first + 1}", f"{float(modes['order_probability'][i]):.2f}"]
        row += [f"{sd:.0f}° [{low:.0f}, {high:.0f}]"]
        rows.append(row + ([f"{float(modes['north_angle'][i]):.0f}°"] if "north_angle" in modes else []))
    text = (
        "How far two neighbours turn into one another: the posterior probability of their order, by pattern, and the "
        "angle by which a draw's pair is rotated in the plane of both. Where the order is known with less than 95 %, "
        "the two are not separated and marked by ~; an angle of 52° says that nothing is known."
    )
    return paragraphs(text) + table(header, rows) + bullets(plane_sentences(modes))


def variance_section(modes: xr.Dataset, comparison: xr.Dataset | None, these: xr.Dataset | None) -> Markup:
    if not is_of_population(modes):
        return paragraphs(
            "Each fraction is relative to the area-weighted variance of the anomalies, that is of the data after the "
            "fixed effects were taken out. The posterior's interval is about these data; North's bar is about another "
            "sample of years."
        ) + _mode_table(modes, comparison)
    out = paragraphs(
        "Each fraction is relative to the area-weighted variance of the population: of all modes and the noise. "
        "Interval and North's bar answer the same question, how far another sample of times could lie from it; North's "
        "takes all times for independent. The effective number of times is how many independent ones would tell as "
        "much of the variance of a mode as these, whose values depend on those before them."
    ) + _mode_table(modes, comparison)
    if these is not None:
        out += paragraphs(
            "The modes of these times, from the same draws: the decomposition of the field as it was, about which only "
            "noise leaves doubt. Maps and series of them are in modes_of_these_times.nc."
        ) + _mode_table(these, None)
    return out


def _mode_table(modes: xr.Dataset, comparison: xr.Dataset | None) -> Markup:
    level = _level(modes)
    header = ["mode", f"variance, % [{level}]", f"d [{level}]"]
    persistent = "autocorrelation_mean" in modes
    header += [f"lag-1 autocorrelation [{level}]", f"effective times [{level}]"] if persistent else []
    scales = [x for x in ("length_scale_space", "length_scale_time") if f"{x}_mean" in modes]
    for name in scales:
        units = str(modes[f"{name}_mean"].attrs.get("units", "1"))
        header.append(name.replace("_", "-", 1).replace("_", " in ") + ("" if units == "1" else f", {units}"))
    header += ["EOF, %", "pattern corr.", "PC corr.", "North's rule"] if comparison is not None else []
    rows, joined = [], joined_modes(modes)
    for i, mode in enumerate(modes["mode"].values):
        row = [
            f"{mode}{'~' * (int(mode) in joined)}",
            _interval(modes, "explained_variance_fraction", i, 100),
            _interval(modes, "singular_value", i),
        ]
        if persistent:
            row += [_interval(modes, "autocorrelation", i, digits=2), _interval(modes, "effective_times", i, digits=0)]
        row += [
            _interval(modes, name, i, digits=0 if float(modes[f"{name}_mean"].max()) > 20 else 2) for name in scales
        ]
        if comparison is not None:
            near = int(comparison["north_neighbour"][i])
            row += [f"{100 * float(comparison['eof_fraction'][i]):.1f}"]
            row += [f"{float(comparison[x][i]):.3f}" for x in ("pattern_correlation", "pc_correlation")]
            apart = "apart in its data, not by the posterior (~)" if int(mode) in joined else "apart"
            row += [f"overlaps {near}" if near else apart]
        rows.append(row)
    return table(header, rows)


def comparison_section(comparison: xr.Dataset | None) -> Markup:
    if comparison is None:
        return paragraphs("No comparison was made.")
    check = comparison.attrs.get("eofs_check")
    text = "The EOFs are the singular value decomposition of the same weighted anomalies."
    if check is not None:
        text += f" The package eofs gives the same to {float(check):.0e} of the largest value."
    return paragraphs(text) + bullets(json.loads(comparison.attrs.get("sentences", "[]")))


def el_nino_section(found: pd.DataFrame) -> Markup:
    rows = [
        [
            row.time,
            f"{row.mean:.2f} [{row.lower:.2f}, {row.upper:.2f}]",
            f"{row.prob_el_nino:.2f}",
            f"{row.prob_la_nina:.2f}",
        ]
        for row in found.itertuples()
        if max(row.prob_el_nino, row.prob_la_nina) >= 0.5
    ]
    size = found.attrs["threshold"]
    header = ["time", "index of Niño 3.4", f"P(above {size:g})", f"P(below −{size:g})"]
    sentences = el_nino_sentences(found)
    text = "All times are in tables/el_nino.csv; listed are those of either with a probability of 0.5 or more."
    if len(sentences) == 1:
        return bullets(sentences) + paragraphs("The index of every time is in tables/el_nino.csv.")
    return bullets(sentences) + paragraphs(text) + table(header, rows)
