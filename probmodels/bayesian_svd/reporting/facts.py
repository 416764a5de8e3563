"""What was done to which data, by the attributes of a result: sections of the report on the run itself."""

from __future__ import annotations

import json

import numpy as np
import xarray as xr
from markupsafe import Markup

from probmodels._page import bullets, code, facts as facts_table, join, paragraphs, provenance
from probmodels.bayesian_svd.draws import MODES_OF
from probmodels.inference.labels import group_of

__all__ = ["Facts", "data_section", "is_of_population", "provenance_section", "what_was_done"]


def is_of_population(modes: xr.Dataset) -> bool:
    """Whether a summary is of the modes of the population."""
    return modes.attrs.get("estimand") == MODES_OF["population"]


class Facts:
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


def what_was_done(facts: Facts, modes: xr.Dataset) -> Markup:
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
    if is_of_population(modes):
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


def data_section(facts: Facts) -> Markup:
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


def provenance_section(facts: Facts, modes: xr.Dataset, rerun: str | None) -> Markup:
    sums = [(name.replace("_", " "), str(modes.attrs.get(name, ""))) for name in ("spec_sha256", "data_sha256")]
    return join(
        provenance(facts.attrs, sums),
        paragraphs("The same run again gives the same draws with the same versions:"),
        code(rerun or "probmodels run result.nc"),
        paragraphs(
            "Files beside this one: result.nc holds the draws and these settings, modes.nc the maps and series shown "
            "here, by the CF conventions, for any tool that reads NetCDF"
            + ("; modes_of_these_times.nc those of these times." if is_of_population(modes) else ".")
            + " figures/ holds every figure as PNG and PDF, tables/ the numbers behind them as CSV.",
            f"References: {modes.attrs.get('references', '')}",
        ),
    )
