"""A self-contained HTML report of a Bayesian SVD: one file, images inside, no scripts, nothing fetched."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd
import xarray as xr
from markupsafe import Markup
from matplotlib.figure import Figure

from probmodels._page import CAPTIONS, Section, code, diagnostics, image, join, paragraphs, verdict, write_page
from probmodels.bayesian_svd.joint.outputs import Coupled, coupled_section
from probmodels.bayesian_svd.reporting.citing import bibtex, methods_paragraphs
from probmodels.bayesian_svd.reporting.facts import Facts, data_section, provenance_section, what_was_done
from probmodels.bayesian_svd.reporting.judged import fit_section, sampler_section
from probmodels.bayesian_svd.reporting.sections import (
    comparison_section,
    el_nino_section,
    overview,
    patterns_section,
    variance_section,
)

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
    "joint_maps": "Joint modes: posterior mean of the pattern in each field, in its units, with dots where its sign is "
    "uncertain (probability of either sign under 95 %), and the principal component that the fields share, with its "
    "interval.",
    "coupled_maps": "Coupled modes: what goes in a field with one standard deviation of the series of the other, and "
    "the correlation r of the two series.",
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
    "first": ("joint_maps", "leading_modes"),
    "maps": ("mode_maps", "plane_maps"),
    "pcs": ("pcs",),
    "scree": ("scree", "number_of_modes", "local_variance"),
    "trend": ("trend",),
    "joint": ("coupled_maps",),
    "rotated": ("rotated_maps", "rotated_pcs"),
    "eof": ("eof_difference",),
    "checks": ("residual_maps",),
    "sampler": ("rhat_map", "rhat_histogram", "trace", "rank", "loss"),
}

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
    facts = Facts(tree)
    images = {name: image(figure, name, _caption(name), dpi=dpi) for name, figure in figures.items()}
    kinds = {name: _kind(name) for name in images}

    def shown(place: str) -> Markup:
        return join(*(images[name] for kind in _PLACES[place] for name in images if kinds[name] == kind))

    sampled = sampler_section(facts, modes) + diagnostics(diagnosis)
    sections = [
        Section("verdict", "Verdict", verdict(diagnosis) + overview(modes) + shown("first")),
        Section("done", "What was done", what_was_done(facts, modes)),
        Section("data", "Data", data_section(facts)),
        Section("maps", "Patterns", patterns_section(modes) + shown("maps")),
        Section("pcs", "Principal components", _PCS + shown("pcs")),
        Section("scree", "Variance explained", variance_section(modes, comparison, these) + shown("scree")),
        *([Section("trend", "Trend", _TREND + shown("trend"))] if "trend" in kinds.values() else []),
        *([Section("el_nino", "El Niño", el_nino_section(el_nino))] if el_nino is not None and len(el_nino) else []),
        Section("eof", "Compared with deterministic EOFs", comparison_section(comparison) + shown("eof")),
        Section("checks", "Does the model fit?", fit_section(facts, modes) + shown("checks")),
        Section("sampler", "Did the sampler work?", sampled + shown("sampler")),
    ]
    if rotated := shown("rotated"):
        sections.insert(6, Section("rotated", "Rotated modes", _ROTATED + rotated))
    if coupled is not None:
        sections.insert(4, Section("joint", "Several fields", coupled_section(coupled) + shown("joint")))
    placed = {name for names in _PLACES.values() for name in names}
    if rest := [name for name in images if kinds[name] not in placed]:
        sections.append(Section("more", "Further figures", join(*(images[name] for name in rest))))
    last = provenance_section(facts, modes, rerun)
    paper = paragraphs(*methods_paragraphs(tree, modes, diagnosis, these), _CITE) + code(bibtex(tree))
    sections.append(Section("cite", "For the methods section, and how to cite", paper))
    sections.append(Section("provenance", "Settings, provenance, and how to run it again", last))
    title = str(modes.attrs.get("title", "Modes of variability"))
    subtitle = f"Bayesian singular value decomposition, {facts.root('created', 'undated')}"
    return write_page(Path(out_dir) / "report.html", title, subtitle, sections)


def _kind(name: str) -> str:
    """What a figure shows; its name may end on that of a field or of a pair of fields."""
    return max((kind for kind in _CAPTIONS if f"{name}_".startswith(f"{kind}_")), key=len, default=name)


def _caption(name: str) -> str:
    kind = _kind(name)
    field = name[len(kind) + 1 :].replace("_", " ")
    return f"{field}: {_CAPTIONS[kind]}" if field else _CAPTIONS.get(kind, "")
