"""A self-contained HTML report of a Bayesian SVD: one file, images inside, no scripts, nothing fetched."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import xarray as xr
from markupsafe import Markup
from matplotlib.figure import Figure

from probmodels._page import (
    CAPTIONS,
    Section,
    bullets,
    code,
    diagnostics,
    facts as facts_table,
    image,
    join,
    paragraphs,
    provenance,
    table,
    verdict,
    write_page,
)
from probmodels.bayesian_svd.checks import misfit
from probmodels.bayesian_svd.draws import MODES_OF
from probmodels.bayesian_svd.indices.el_nino import el_nino_sentences
from probmodels.bayesian_svd.joint.outputs import Coupled, coupled_section
from probmodels.bayesian_svd.patterns.number import number_sentence
from probmodels.bayesian_svd.patterns.planes import plane_sentences
from probmodels.bayesian_svd.reporting.citing import bibtex, methods_paragraphs
from probmodels.inference.labels import group_of

__all__ = ["write_report"]

_CAPTIONS = CAPTIONS | {
    "leading_modes": "The leading modes: posterior mean of each pattern, with dots where its sign is uncertain "
    "(probability of either sign under 95 %); its principal component; and the share of variance that it explains.",
    "mode_maps": "Left: posterior mean of each pattern, with dots where its sign is uncertain. Right: its posterior "
    "standard deviation.",
    "local_variance": "Share of the variance of each cell, fixed effects taken out, that each mode explains: posterior "
    "mean, and both ends of the interval. What all modes together leave over is noise.",
    "trend": "Left: posterior mean of the linear trend of each cell, with dots where its sign is uncertain. Right: the "
    "probability that it is positive.",
    "plane_maps": "Modes that are not separated, together: the variance that they explain at each cell, and the width "
    "of its interval.",
    "rotated_maps": "Rotated modes: posterior mean of each pattern, and its posterior standard deviation.",
    "rotated_pcs": "Series of the rotated modes.",
    "joint_maps": "Joint modes: posterior mean of the pattern in each field, with dots where its sign is uncertain.",
    "coupled_maps": "Coupled modes: what goes in a field with one standard deviation of the series of the other.",
    "pcs": "Principal components: posterior mean, interval, and the EOF's.",
    "scree": "Variance explained by mode.",
    "number_of_modes": "Posterior probability of the number of modes whose variance in the population exceeds that of "
    "the noise in one direction.",
    "eof_difference": "Left: deterministic EOFs. Right: posterior mean less EOF; dots where the EOF lies outside the "
    "interval.",
    "residual_maps": "What the modes leave over, and whether the model's noise accounts for it.",
    "rhat_map": "Agreement of the chains at every cell; 1 is perfect, above 1.01 the draws are too few.",
    "rhat_histogram": "Agreement of the chains over all entries.",
}
_PLACES = {
    "first": ("leading_modes",),
    "maps": ("mode_maps", "plane_maps"),
    "pcs": ("pcs",),
    "scree": ("scree", "number_of_modes", "local_variance"),
    "trend": ("trend",),
    "joint": ("joint_maps", "coupled_maps"),
    "rotated": ("rotated_maps", "rotated_pcs"),
    "eof": ("eof_difference",),
    "checks": ("residual_maps",),
    "sampler": ("rhat_map", "rhat_histogram", "trace", "rank", "loss"),
}


def write_report(
    tree: xr.DataTree,
    modes: xr.Dataset,
    figures: Mapping[str, Figure | Path],
    out_dir: str | Path,
    *,
    diagnosis: object = None,
    comparison: xr.Dataset | None = None,
    these: xr.Dataset | None = None,
    el_nino: pd.DataFrame | None = None,
    coupled: Coupled | None = None,
    rerun: str | None = None,
    dpi: int = 110,
) -> Path:
    """Write ``report.html``.

    Parameters
    ----------
    tree
        The result: its attributes (``method``, ``engine``, ``seed``, ``spec``, ``versions``, ``created``) and group
        ``constant_data`` tell what was done to which data; mends are the JSON list of sentences ``mends``.
    modes
        From `probmodels.bayesian_svd.summary.summarise_modes`.
    figures
        By the name of the function in `probmodels.plots` that drew them, or PNG files of them, which saves drawing
        them twice; each lands in its section, others at the end.
    out_dir
        Folder; made where it is absent.
    diagnosis
        Verdict: the `probmodels.inference.diagnostics.findings.Report`, whose findings come first and
        whose table goes to the section on the sampler, or a text, or an object whose ``str`` is one.
    comparison
        From `probmodels.bayesian_svd.summary.compare_eof`.
    these
        Modes of the field at its times, where ``modes`` are those of the population.
    el_nino
        From `probmodels.bayesian_svd.indices.el_nino.el_nino_table`; nothing is said of El Niño without.
    coupled
        What couples the fields of a joint decomposition; nothing is said of fields without.
    rerun
        Command that repeats the run; by default the one that reads the spec from the result file.
    dpi
        Resolution at which figures are drawn.

    Returns
    -------
    Path
        The file.
    """
    facts = _Facts(tree)
    images = {name: image(figure, name, _CAPTIONS.get(name, ""), dpi=dpi) for name, figure in figures.items()}

    def shown(place: str) -> Markup:
        return join(*(images[name] for name in _PLACES[place] if name in images))

    sections = [
        Section("verdict", "Verdict", verdict(diagnosis) + _overview(modes) + shown("first")),
        Section("done", "What was done", _what_was_done(facts, modes)),
        Section("data", "Data", _data(facts)),
        Section("maps", "Patterns", _how_to_read(modes) + shown("maps")),
        Section("pcs", "Principal components", _PCS + shown("pcs")),
        Section("scree", "Variance explained", _scree(modes, comparison, these) + shown("scree")),
        *([Section("trend", "Trend", _TREND + shown("trend"))] if "trend" in images else []),
        *([Section("el_nino", "El Niño", _el_nino(el_nino))] if el_nino is not None and len(el_nino) else []),
        Section("eof", "Compared with deterministic EOFs", _comparison(comparison) + shown("eof")),
        Section("checks", "Does the model fit?", _checks(modes) + shown("checks")),
        Section("sampler", "Did the sampler work?", _sampler(facts, modes) + diagnostics(diagnosis) + shown("sampler")),
    ]
    if rotated := shown("rotated"):
        sections.insert(6, Section("rotated", "Rotated modes", _ROTATED + rotated))
    if coupled is not None:
        sections.insert(4, Section("joint", "Several fields", coupled_section(coupled) + shown("joint")))
    placed = {name for names in _PLACES.values() for name in names}
    if rest := [name for name in images if name not in placed]:
        sections.append(Section("more", "Further figures", join(*(images[name] for name in rest))))
    last = _provenance(facts, modes, rerun)
    paper = paragraphs(*methods_paragraphs(tree, modes, diagnosis), _CITE) + code(bibtex(tree))
    sections.append(Section("cite", "For the methods section, and how to cite", paper))
    sections.append(Section("provenance", "Settings, provenance, and how to run it again", last))
    title = str(modes.attrs.get("title", "Modes of variability"))
    subtitle = f"Bayesian singular value decomposition, {facts.root('created', 'undated')}"
    return write_page(Path(out_dir) / "report.html", title, subtitle, sections)


class _Facts:
    """Attributes of a result, wherever they were put."""

    def __init__(self, tree: xr.DataTree) -> None:
        self.attrs = dict(tree.attrs)
        self.constant = group_of(tree, "constant_data")
        self.data = self.constant["data"].attrs if "data" in self.constant else {}
        posterior = group_of(tree, "posterior")
        self.num_chains, self.num_draws = (int(posterior.sizes.get(x, 1)) for x in ("chain", "draw"))

    def root(self, name: str, default: str = "") -> str:
        return str(self.attrs.get(name, default))

    def any(self, name: str, default: str = "") -> str:
        """The attribute of the data, else of its group, else of the root."""
        return str(self.data.get(name) or self.constant.attrs.get(name) or self.attrs.get(name) or default)

    def sentences(self, name: str) -> list[str]:
        """A JSON list of sentences from the group, else from the data; text that is no JSON is one sentence."""
        text = str(self.constant.attrs.get(name) or self.data.get(name) or "")
        try:
            found = json.loads(text) if text else []
        except json.JSONDecodeError:
            return [text]
        return [str(x) for x in found] if isinstance(found, list) else [str(found)]


def _level(modes: xr.Dataset) -> str:
    return f"{100 * float(modes.attrs.get('interval_level', 0.95)):g} %"


def _interval(modes: xr.Dataset, name: str, i: int, scale: float = 1.0, digits: int = 1) -> str:
    mean, low, high = (scale * float(modes[f"{name}_{x}"][i]) for x in ("mean", "lower", "upper"))
    return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _overview(modes: xr.Dataset) -> Markup:
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


def _what_was_done(facts: _Facts, modes: xr.Dataset) -> Markup:
    effects = (
        ", ".join(str(x) for x in facts.constant["effect"].values) if "effect" in facts.constant.coords else "none"
    )
    data = facts.constant.get("data")
    size = f"{data.sizes['cell']} cells and {data.sizes['time']} times" if data is not None else "the data"
    unit = "matched by variational inference" if "svi" in facts.root("engine") else "drawn by Markov chain Monte Carlo"
    return paragraphs(
        f"The field, {size}, was written as fixed effects of time at each cell ({effects}) plus {modes.sizes['mode']} "
        + _model_in_words(modes, "noise_kernel" in facts.constant.attrs),
        f"That posterior was {unit}: {facts.num_chains} chain{'s' if facts.num_chains != 1 else ''} of "
        f"{facts.num_draws} draws. Cells weigh as their area where area weights are used. All that is shown below is "
        "reduced from these draws.",
    )


def _model_in_words(modes: xr.Dataset, correlated: bool) -> str:
    noise = "noise that is correlated between cells and times" if correlated else "independent noise"
    if _of_population(modes):
        return (
            f"modes plus {noise}: Z = effects + U diag(d) F' + noise. A mode is a pattern (a column of U), a "
            "time series (a column of F) and a size d. Patterns are orthogonal to each other, as for EOFs, and have a "
            "prior that knows how smooth they are. Series are a process in time, of which these times are one "
            "realisation: so the modes are those of the population that the times were drawn from, and their intervals "
            "say how far another stretch of the same climate could differ."
        )
    return (
        f"modes plus {noise}: Z = effects + U diag(d) V' + noise. A mode is a pattern (a column of U), a "
        "time series (a column of V) and a size d. Patterns are orthogonal to each other, and so are the series, as "
        "for EOFs; unlike EOFs, they carry a prior that knows how smooth they are, and everything has a posterior "
        "distribution. The modes are those of the field at these times."
    )


def _data(facts: _Facts) -> Markup:
    rows: list[tuple[str, str]] = [(name.replace("_", " "), facts.any(name)) for name in ("title", "long_name")]
    rows += [("units", facts.any("units")), ("region", facts.any("region"))]
    if "time" in facts.constant.coords and facts.constant.sizes["time"]:
        first, last = (str(x)[:10] for x in facts.constant["time"].values[[0, -1]])
        rows.append(("period", f"{first} to {last}, {facts.constant.sizes['time']} times"))
    rows += [(name.replace("_", " "), facts.any(name)) for name in ("season", "frequency", "kind", "base_period")]
    if "data" in facts.constant:
        missing = 100 * float(np.mean(~np.isfinite(facts.constant["data"].values)))
        rows += [
            ("cells", str(facts.constant.sizes["cell"])),
            ("missing values", f"{missing:.2g} %" if missing else "none"),
        ]
    rows += [("source", facts.any("source"))]
    try:
        files = json.loads(facts.any("source_files", "[]"))
        rows += [("file", f"{x['name']} (sha256 {x['sha256']})") for x in files]
    except (json.JSONDecodeError, TypeError, KeyError):
        rows.append(("files", facts.any("source_files")))
    rows.append(("sha256", facts.any("data_sha256") or facts.any("sha256")))
    mends = facts.sentences("mends")
    said = (
        paragraphs("What had to be mended in the data:") + bullets(mends)
        if mends
        else paragraphs("Nothing in the data had to be mended.")
    )
    return facts_table(rows) + said


def _how_to_read(modes: xr.Dataset) -> Markup:
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
        if _of_population(modes)
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


_PCS = paragraphs(
    "Time series of the modes, with mean zero and standard deviation one. The band holds, at each time separately, "
    "the stated probability. Multiply the series by the map of its mode to get the field that the mode contributes."
)


_ROTATED = paragraphs(
    "Rotation looks for simple patterns, each large in one region and small elsewhere, in the space that the modes "
    "span. Every draw was rotated on its own, and labels and signs follow one reference. The rotated patterns are not "
    "orthogonal, and depend on how many modes are rotated. Where other rotations are nearly as simple, the standard "
    "deviation shows it."
)

_CITE = (
    "The terms of a data set may ask for more; see its page. BibTeX of what the text above refers to, as far as the "
    "data set is known:"
)

_TREND = paragraphs(
    "The trend of each cell is part of the model, so that its interval holds what the modes and the noise can add to a "
    "straight line by chance."
)


def _el_nino(found: pd.DataFrame) -> Markup:
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


def _scree(modes: xr.Dataset, comparison: xr.Dataset | None, these: xr.Dataset | None) -> Markup:
    if not _of_population(modes):
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


def _of_population(modes: xr.Dataset) -> bool:
    return modes.attrs.get("estimand") == MODES_OF["population"]


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
    rows = []
    for i, mode in enumerate(modes["mode"].values):
        row = [
            str(mode),
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
            row += [f"overlaps {near}" if near else "apart"]
        rows.append(row)
    return table(header, rows)


def _comparison(comparison: xr.Dataset | None) -> Markup:
    if comparison is None:
        return paragraphs("No comparison was made.")
    check = comparison.attrs.get("eofs_check")
    text = "The EOFs are the singular value decomposition of the same weighted anomalies."
    if check is not None:
        text += f" The package eofs gives the same to {float(check):.0e} of the largest value."
    return paragraphs(text) + bullets(json.loads(comparison.attrs.get("sentences", "[]")))


def _checks(modes: xr.Dataset) -> Markup:
    found = misfit(modes)
    outside, lag, near = 100 * found["outside"], found["lag"], found.get("neighbour")
    text = (
        "If the model were right, data drawn from it would vary at each cell about as much as those observed. The map "
        "of predictive p-values shows the share of replicated data that vary more: near 0 the model has too little "
        f"variance at the cell (a process of its own that no mode holds), near 1 too much. Here {outside:.0f} % of the "
        "cells lie outside the central 95 %, where about 5 % would be expected at most."
    )
    if outside > 10:
        text += (
            " The noise is not the same everywhere, which one noise level cannot follow; intervals are too narrow "
            "where p is near 0."
        )
    second = f"The residual of neighbouring times has a median correlation of {lag:.2f}; the model takes it to be zero."
    if lag > 0.2:
        second += (
            " The noise is red, so that the series hold less independent information than the model believes, and the "
            "intervals are too narrow. More modes, or seasonal means in place of months, would help."
        )
    if near is not None:
        second += f" That of neighbouring cells is {near:.2f}, where the model again takes it to be zero."
        if near > 0.3:
            second += " Neighbours repeat each other, so that intervals are too narrow."
    known = (
        "All intervals hold that the number of modes is not known: those that the data do not ask for can vanish."
        if "number_of_modes" in modes
        else "All intervals are conditional on the number of modes: what further modes hold counts as noise."
    )
    return paragraphs(text, second, known)


def _sampler(facts: _Facts, modes: xr.Dataset) -> Markup:
    if "mode_r_hat" not in modes:
        return paragraphs("There is one chain, so that agreement between chains cannot be judged.")
    r_hat = modes["mode_r_hat"].values
    good = 100 * float(np.mean(r_hat[np.isfinite(r_hat)] <= 1.01))
    worst = float(np.nanmax(r_hat))
    return paragraphs(
        f"{facts.num_chains} chains started apart. R-hat compares the spread between them with that within; at "
        f"{good:.1f} % of the entries of the maps it is at most 1.01, the largest is {worst:.3f}."
    )


def _provenance(facts: _Facts, modes: xr.Dataset, rerun: str | None) -> Markup:
    sums = [(name.replace("_", " "), str(modes.attrs.get(name, ""))) for name in ("spec_sha256", "data_sha256")]
    return join(
        provenance(facts.attrs, sums),
        paragraphs("The same run again gives the same draws with the same versions:"),
        code(rerun or "probmodels run result.nc"),
        paragraphs(
            "Files beside this one: result.nc holds the draws and these settings, modes.nc the maps and series shown "
            "here, by the CF conventions, for any tool that reads NetCDF"
            + ("; modes_of_these_times.nc those of these times." if _of_population(modes) else ".")
            + " figures/ holds every figure as PNG and PDF, tables/ the numbers behind them as CSV.",
            f"References: {modes.attrs.get('references', '')}",
        ),
    )
