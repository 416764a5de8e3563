"""A result as a person looks at it: a text for the terminal, and one HTML page with its tables and figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Interval
from markupsafe import Markup
from matplotlib.figure import Figure

from probmodels import plots
from probmodels._page import (
    CAPTIONS,
    Section,
    code,
    diagnostics,
    facts,
    image,
    join,
    paragraphs,
    provenance,
    read_spec,
    table,
    verdict,
    write_page,
)
from probmodels.errors import ResultError, SpecError
from probmodels.inference.diagnostics.findings import Report
from probmodels.inference.labels import read_json
from probmodels.inference.result import Result
from probmodels.methods import foreign_code, get_method, refuse_code
from probmodels.options import checked, options_of
from probmodels.outputs import Outputs, loss_figure, write_all
from probmodels.spec import own_outputs

__all__ = ["draw_result", "show", "write_report"]

_MOST = 40  # variables of which a page has rows
_BELOW = "Did the inference work?"
_CAPTIONS = CAPTIONS | {
    "forest": "Medians, with intervals of half the draws (thick) and of 94 % of them (thin).",
    "predictive_check": "Observed values (blue) among data sets drawn from the posterior predictive distribution "
    "(grey). Shares near 0 % or 100 % show what the model misses.",
}
_PLACES = {"posterior": ("forest",), "checks": ("predictive_check",), "inference": ("trace", "rank", "loss")}


@checked(ResultError)
def show(result: Result) -> str:
    """What a result holds: where it comes from, its groups, and a summary of its posterior; plain text."""
    lines = [repr(result).partition("\n")[0], ""]
    for key in ("method", "engine", "seed", "created", "sampling_seconds", "spec", "options"):
        if key in result.tree.attrs:
            lines.append(f"{key:18s}{result.tree.attrs[key]}")
    for name, group in result.tree.children.items():
        sizes = ", ".join(f"{dim} {size}" for dim, size in group.sizes.items())
        lines.append(f"{name:18s}{', '.join(map(str, group.data_vars))} ({sizes})")
    summary, more = result.head(_MOST)
    if len(summary):
        lines += ["", summary.to_string(float_format=lambda value: f"{value:.4g}")]
    return "\n".join([*lines, *([more] if more else [])])


@checked(ResultError)
def draw_result(result: Result) -> dict[str, Figure]:
    """Figures that every result has: intervals, traces, ranks of several chains, the loss of a fit, and a predictive
    check where the result has the group ``posterior_predictive``.
    """
    posterior = result.group("posterior")
    found = loss_figure(result)
    if any({"chain", "draw"} <= set(values.dims) for values in posterior.data_vars.values()):
        found |= {"forest": plots.forest(posterior), "trace": plots.plot_trace(posterior)}
        if posterior.sizes["chain"] > 1:
            found["rank"] = plots.rank(posterior)
    observed, predicted = result.group("observed_data"), result.group("posterior_predictive")
    if set(observed.data_vars) & set(predicted.data_vars):
        found["predictive_check"] = plots.predictive_check(observed, predicted)
    return found


@checked(ResultError)
def write_report(
    result: Result,
    folder: str | Path,
    *,
    dpi: Annotated[int, Interval(ge=20, le=1200)] = 110,
    options: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> Outputs:
    """Write ``report.html``, one self-contained page with the verdict on top, for a result of any model.

    A registered method that has outputs of its own writes its tables and figures as well, and they are on the page;
    for others ``summary.txt``, ``summary.csv`` and the figures of `draw_result` are written.

    Parameters
    ----------
    result
        The result of any engine.
    folder
        Where to; made where it is missing. Files of the same names are replaced.
    dpi
        Resolution of the figures that all results have.
    options
        Options of the outputs of the method; by default those of its spec.
    progress
        Whether bars are shown, where the outputs of the method take long.

    Returns
    -------
    Outputs
        The folder, a table for the terminal and the verdict of the diagnostics; its ``report`` is the page.

    Raises
    ------
    ResultError
        If the folder cannot be written, or the method of another package fails to write its outputs.
    """
    write_outputs = _own_outputs(result)
    if write_outputs is None:
        figures = draw_result(result)
        summary, more = result.head(_MOST)
        written = write_all(
            result,
            folder,
            table="\n".join(filter(None, [summary.to_string(float_format=lambda value: f"{value:.4g}"), more])),
            tables={"summary": result.summary().rename_axis("entry")},
            figures=figures,
            dpi=dpi,
            progress=progress,
        )
        images = {name: image(figure, name, _CAPTIONS[name], dpi=dpi) for name, figure in figures.items()}
        own = {}
    else:
        name = _method_of(result)
        with foreign_code(get_method(name), name, "write_outputs", ResultError):
            written = write_outputs(result, folder, **_options(result, options, progress))
        if not isinstance(written, Outputs):
            raise ResultError(
                f"method {name!r}: write_outputs returned a {type(written).__name__}, not what write_all returns"
            )
        if written.report.suffix == ".html":
            return written
        files = written.figures or {path.stem: path for path in sorted((written.folder / "figures").glob("*.png"))}
        own = {name: image(path, name, dpi=dpi) for name, path in files.items()}
        images = {
            name: image(figure, name, _CAPTIONS[name], dpi=dpi)
            for name, figure in draw_result(result).items()
            if name not in own
        }
    try:
        _write_page(result, written, images, own)
    except OSError as error:
        raise ResultError(f"cannot write to {folder}: {error.strerror or error}; choose another folder") from error
    return replace(written, file="report.html")


def _method_of(result: Result) -> str:
    return str(read_spec(result.tree.attrs).get("method", result.tree.attrs.get("method")))


def _options(result: Result, given: Mapping[str, Any] | None, progress: bool) -> dict[str, Any]:
    """What is asked of the outputs of a method, or else what the spec of the result asks, where the method takes it."""
    method: Any = get_method(_method_of(result))
    known = options_of(method.write_outputs, skip=2)
    asked = own_outputs(read_spec(result.tree.attrs)) if given is None else given
    asked = {"progress": progress} | dict(asked)
    return {key: value for key, value in asked.items() if key in known}


def _own_outputs(result: Result) -> Callable[[Result, str | Path], Outputs] | None:
    """The function of a method that writes its outputs; None where the method has none or is not registered."""
    try:
        refuse_code(name := _method_of(result))
        method: Any = get_method(name)
    except SpecError:
        return None
    found: Callable[[Result, str | Path], Outputs] | None = getattr(method, "write_outputs", None)
    return found


def _write_page(result: Result, written: Outputs, images: dict[str, Markup], own: dict[str, Markup]) -> None:
    attrs, diagnosis = result.tree.attrs, written.diagnosis

    def shown(place: str) -> Markup:
        return join(*(images[name] for name in _PLACES[place] if name in images))

    sections = [Section("verdict", "Verdict", verdict(diagnosis, _BELOW) + _overview(result, diagnosis))]
    if own:
        sections.append(Section("method", "Results of the method", code(written.table) + join(*own.values())))
    sections.append(Section("posterior", "Posterior", _posterior(result) + shown("posterior")))
    if checks := shown("checks"):
        sections.append(Section("checks", "Does the model fit?", checks))
    sections += [
        Section("inference", _BELOW, diagnostics(diagnosis) + shown("inference")),
        Section("contents", "What the result holds", _contents(result)),
        Section("provenance", "Settings and provenance", _provenance(result)),
    ]
    title = f"{attrs.get('method', 'A model')} by {attrs.get('engine', 'an engine')}"
    write_page(written.folder / "report.html", title, str(attrs.get("created", "undated")), sections)


def _overview(result: Result, diagnosis: Report) -> Markup:
    sizes = result.group("posterior").sizes
    chains, draws = sizes.get("chain", 1), sizes.get("draw", 1)
    text = f"{chains} chain{'s' if chains != 1 else ''} of {draws} draws, "
    text += f"{len(result.group('posterior').data_vars)} variables."
    doubt = "" if diagnosis.ok else "Read all that is shown below with these findings in mind."
    return paragraphs(text, doubt)


def _posterior(result: Result) -> Markup:
    summary, more = result.head(_MOST)
    if not len(summary):
        return paragraphs("The posterior holds no draws.")
    rows = [[str(name), *(f"{value:.4g}" for value in row)] for name, *row in summary.itertuples()]
    return table(["entry", *(str(x).replace("_", " ") for x in summary.columns)], rows) + paragraphs(more)


def _contents(result: Result) -> Markup:
    def said(name: str) -> str:
        group = result.group(name)
        sizes = ", ".join(f"{dim} {size}" for dim, size in group.sizes.items())
        return f"{', '.join(map(str, group.data_vars))} ({sizes})"

    return facts((str(name), said(str(name))) for name in result.tree.children)


def _provenance(result: Result) -> Markup:
    attrs = result.tree.attrs
    again = paragraphs("The same run again gives the same draws with the same versions:")
    again = again + code("probmodels run result.nc") if "data" in read_spec(attrs) else Markup()
    options = read_json(attrs, "options", {}).items()
    return join(provenance(attrs, [(f"option {key}", str(value)) for key, value in options]), again)
