"""Parts of self-contained HTML pages: one file, images inside, no scripts, nothing fetched; all texts are escaped."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from probmodels.inference.runtime.ops import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "CAPTIONS",
    "Section",
    "bullets",
    "code",
    "diagnostics",
    "facts",
    "image",
    "join",
    "paragraphs",
    "provenance",
    "read_spec",
    "table",
    "verdict",
    "write_page",
]

CAPTIONS = {
    "trace": "Draws in their order, and their distribution; one colour per chain. Chains should look alike and not "
    "drift.",
    "rank": "Ranks of each chain among all draws; flat within the grey band when the chains agree.",
    "loss": "Loss of the fit by step; it should have levelled off.",
}
"""What figures that every page may have show."""

_MOST_FINDINGS = 5


@dataclass(frozen=True)
class Section:
    """A heading with the key that links lead to, and what stands below it."""

    key: str
    head: str
    body: Markup


def write_page(path: Path, title: str, subtitle: str, sections: Sequence[Section]) -> Path:
    """Write a page of sections, with links to them on top."""
    pages = Environment(loader=PackageLoader("probmodels", "templates"), autoescape=True)
    text = pages.get_template("page.html").render(title=title, subtitle=subtitle, sections=sections)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write_text(text, encoding="utf-8"))
    return path


def join(*parts: Markup) -> Markup:
    """Parts one after the other."""
    return Markup("").join(parts)


def paragraphs(*texts: str) -> Markup:
    """A paragraph for every text that is not empty."""
    return join(*(Markup("<p>{}</p>\n").format(text) for text in texts if text))


def bullets(items: Iterable[str]) -> Markup:
    """A list."""
    return Markup("<ul>{}</ul>\n").format(join(*(Markup("<li>{}</li>").format(item) for item in items)))


def code(text: str) -> Markup:
    """Text as it stands."""
    return Markup("<pre>{}</pre>\n").format(text)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Markup:
    """A table with a row of heads."""
    head = join(*(Markup("<th>{}</th>").format(cell) for cell in header))
    lines = (join(*(Markup("<td>{}</td>").format(cell) for cell in row)) for row in rows)
    body = join(*(Markup("<tr>{}</tr>").format(line) for line in lines))
    return Markup('<div class="scroll"><table><tr>{}</tr>{}</table></div>\n').format(head, body)


def facts(rows: Iterable[tuple[str, str]]) -> Markup:
    """A table of names and values; those without a value are left out."""
    body = join(*(Markup("<tr><td>{}</td><td>{}</td></tr>").format(key, value) for key, value in rows if value))
    return Markup('<table class="facts">{}</table>\n').format(body)


def image(figure: Figure | Path, name: str, caption: str = "", *, dpi: int = 110) -> Markup:
    """A figure, or the PNG file of one, inside the page."""
    if isinstance(figure, Path):
        content = figure.read_bytes()
    else:
        buffer = BytesIO()
        figure.savefig(buffer, format="png", dpi=dpi)
        content = buffer.getvalue()
    return Markup(
        '<figure id="figure-{0}"><img src="data:image/png;base64,{1}" alt="{2}"><figcaption>{2}</figcaption></figure>\n'
    ).format(name, base64.b64encode(content).decode("ascii"), caption or name.replace("_", " "))


def verdict(diagnosis: object, below: str = "Did the sampler work?") -> Markup:
    """The verdict of a diagnosis with its first findings, harmful ones before others.

    Parameters
    ----------
    diagnosis
        A `probmodels.inference.diagnostics.findings.Report`, a text, or an object whose ``str`` is one; None where the
        draws were not diagnosed.
    below
        Heading of the section that lists all findings.
    """
    box = Markup('<div class="verdict{}">{}</div>\n')
    if diagnosis is None:
        text = "The draws were not diagnosed; do not rely on the intervals before they are."
        return box.format(" bad", text)
    bad = getattr(diagnosis, "ok", True) is False
    if findings := _findings(diagnosis):
        head = str(getattr(diagnosis, "head", "Verdict"))
        more = [f"… and {len(findings) - _MOST_FINDINGS} more, under “{below}”"]
        body = "\n".join([head, *findings[:_MOST_FINDINGS], *(more * (len(findings) > _MOST_FINDINGS))])
    else:
        body = str(diagnosis).strip()
    return box.format(" bad" if bad else "", body)


def diagnostics(diagnosis: object) -> Markup:
    """Findings that the verdict had no room for, and the table of a diagnosis, one row per variable."""
    findings, frame = _findings(diagnosis), getattr(diagnosis, "table", None)
    listed = bullets(findings) if len(findings) > _MOST_FINDINGS else Markup()
    if frame is None or not len(frame):
        return listed
    rows = [[str(name), *(_shown(str(k), v) for k, v in row.items())] for name, row in frame.iterrows()]
    return listed + table(["variable", *(str(x).replace("_", " ") for x in frame.columns)], rows)


def provenance(attrs: Mapping[Any, Any], more: Iterable[tuple[str, str]] = ()) -> Markup:
    """What made a result, from its root attributes: method, engine, seed, versions, and the settings in full."""
    rows = [(name, str(attrs.get(name, ""))) for name in ("method", "engine", "seed", "created")]
    text = str(attrs.get("versions", "{}"))
    try:
        rows += [(f"version of {k}", str(v)) for k, v in json.loads(text).items()]
    except (json.JSONDecodeError, AttributeError):
        rows.append(("versions", text))
    settings = json.dumps(read_spec(attrs), indent=2, ensure_ascii=False)
    return join(facts([*rows, *more]), paragraphs("The settings, as stored in result.nc:"), code(settings))


def read_spec(attrs: Mapping[Any, Any]) -> dict[str, Any]:
    """The spec among the root attributes of a result; empty where that is none."""
    try:
        found = json.loads(str(attrs.get("spec", "{}")))
    except json.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}


def _findings(diagnosis: object) -> list[str]:
    """One line per finding of a diagnosis, harmful ones first; none for a text."""
    found = sorted(getattr(diagnosis, "findings", ()), key=lambda x: "✗?!✓".index(x.mark))
    return [f"{x.mark} {x.verdict}" + f" → {x.advice}" * bool(x.advice) for x in found]


def _shown(column: str, value: Any) -> str:
    if not isinstance(value, int | float | np.number):
        return str(value)
    if column.startswith("ess") or column == "entries":
        return f"{value:.0f}"
    return f"{100 * value:.1f} %" if column.endswith("share") else f"{value:.3f}"
