"""Small HTML for notebooks; everything that is shown is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["block", "frame", "listed", "rows", "text"]


class Finding(Protocol):
    """What a list shows of a finding."""

    @property
    def mark(self) -> str: ...
    @property
    def verdict(self) -> str: ...
    @property
    def advice(self) -> str: ...


def block(title: str, *bodies: str) -> str:
    """A heading, which is escaped, and HTML below it."""
    return f"<div><h4>{escape(title)}</h4>{''.join(bodies)}</div>"


def listed(findings: Sequence[Finding]) -> str:
    """Findings as a list, with what to do."""
    lines = (f"{escape(f'{x.mark} {x.verdict}')}{f'<br>→ {escape(x.advice)}' if x.advice else ''}" for x in findings)
    return f'<ul style="list-style: none">{"".join(f"<li>{line}</li>" for line in lines)}</ul>'


def frame(table: pd.DataFrame) -> str:
    """A table; numbers have four digits."""
    return str(table.to_html(border=0, float_format=lambda value: f"{value:.4g}")) if len(table) else ""


def rows(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table of texts, which are escaped."""
    head = f"<tr>{''.join(f'<th>{escape(cell)}</th>' for cell in heads)}</tr>" if heads else ""
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in line)}</tr>" for line in lines)
    return f'<table style="text-align: left">{head}{body}</table>' if lines else ""


def text(sentence: str) -> str:
    """A paragraph, escaped; nothing for an empty one."""
    return f"<p>{escape(sentence)}</p>" if sentence else ""
