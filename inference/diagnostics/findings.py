"""What diagnostics find, and the verdict that it adds up to."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pandas as pd
import xarray as xr

from probmodels.inference.diagnostics import _html

__all__ = ["Finding", "Part", "Report", "label", "spell"]

Part = Literal["inference", "model"]
_MOST = 5  # findings on draws that fail, of what is printed


@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    Attributes
    ----------
    harmful
        Whether what it is about cannot be trusted.
    verdict
        What was found, with the limit that it met or missed.
    advice
        What to do.
    part
        What it is about: ``"inference"``, whether the draws are those of the posterior; or ``"model"``, whether the
        model fits the data.
    judged
        False where nothing could be judged. What could not be judged is not passed.
    """

    harmful: bool
    verdict: str
    advice: str = ""
    part: Part = "inference"
    judged: bool = True

    @property
    def mark(self) -> str:
        """✗ for what is harmful, ? for what could not be judged, ! for what is worth a look, ✓ for what is well."""
        return "✗" if self.harmful else "?" if not self.judged else "!" if self.advice else "✓"


@dataclass(frozen=True)
class Report:
    """What `diagnose` found.

    A verdict has two parts: whether the draws are those of the posterior, and whether the model fits the data. Draws
    may be right while the model is not, and no interval of a model that does not fit can be trusted.

    Attributes
    ----------
    findings
        In plain words.
    table
        One row per variable. Of chains: entries, worst r_hat, share of entries within the limit, smallest and median
        ess (bulk and tail), worst Monte Carlo error in units of the posterior sd; from 16 chains on, worst nested
        r_hat. Of a guide: the entry that importance weights move most, its mean and sd under the guide, and the
        corrected ones with their Monte Carlo errors.
    divergences
        Divergent trajectories; None where the kernel does not tell.
    bfmi
        Fraction of missing information per chain; None without energies.
    khat
        Pareto k-hat of the guide; None for MCMC, nan where it says nothing, as for sites of finitely many values.
    """

    findings: tuple[Finding, ...]
    table: pd.DataFrame = field(repr=False)
    divergences: int | None = None
    bfmi: tuple[float, ...] | None = None
    khat: float | None = None

    @property
    def inference(self) -> Literal["passed", "failed", "not judged"]:
        """Whether the draws are those of the posterior."""
        found = [finding for finding in self.findings if finding.part == "inference"]
        if any(finding.harmful for finding in found):
            return "failed"
        return "passed" if all(finding.judged for finding in found) else "not judged"

    @property
    def model(self) -> Literal["passed", "failed", "not checked"]:
        """Whether the model fits the data, by the checks of its method and of posterior predictive draws."""
        found = [finding for finding in self.findings if finding.part == "model" and finding.judged]
        if not found:
            return "not checked"
        return "failed" if any(finding.harmful for finding in found) else "passed"

    @property
    def ok(self) -> bool:
        """Whether the inference passed, and the model did not fail."""
        return self.inference == "passed" and self.model != "failed"

    @property
    def head(self) -> str:
        """The verdict in one line."""
        unfit = "the model does not fit the data"
        if self.inference == "failed":
            return f"Diagnostics FAILED: do not trust these draws yet{f'; and {unfit}' * (self.model == 'failed')}."
        if self.inference == "not judged":
            return (
                f"Diagnostics NOT PASSED: the draws could not be judged{f'; and {unfit}' * (self.model == 'failed')}."
            )
        if self.model == "failed":
            return f"Diagnostics FAILED: {unfit}; the draws themselves passed."
        if self.model == "passed":
            return "Diagnostics passed: the draws and the fit of the model."
        return "Diagnostics passed; the fit of the model was not checked."

    def text(self, most: int | None = _MOST, where: str = "the findings of the report") -> str:
        """The verdict, its findings and the table.

        Parameters
        ----------
        most
            Number of findings on draws that fail, worst first, and three times as many rows of a table of chains;
            None for all.
        where
            Where the others are, for what is said of them.
        """
        failed = [finding for finding in self.findings if finding.harmful and finding.part == "inference"]
        left_out = failed[most:] if most is not None else []
        lines = [self.head]
        for finding in self.findings:
            if finding not in left_out:
                lines += spell([finding])
            elif finding is left_out[0]:
                lines.append(f"  … and {len(left_out)} more that fail, in {where}")
        return "\n".join(lines + (["", *self._rows(most, where)] if len(self.table) else []))

    def _rows(self, most: int | None, where: str) -> list[str]:
        """Lines of the table, of the variables of largest r_hat where they are many."""
        shown = self.table.copy()
        if most is not None and len(shown) > 3 * most and "r_hat_max" in shown:
            kept = set(shown["r_hat_max"].sort_values(ascending=False, kind="stable").index[: 3 * most])
            shown = shown.loc[[name for name in shown.index if name in kept]]
        for column in shown.columns:
            if column.startswith("ess") or column == "entries":
                shown[column] = shown[column].map(lambda value: f"{value:.0f}")
            elif column.endswith("share"):
                shown[column] = shown[column].map(lambda value: f"{value:.1%}")
        lines = [shown.to_string(float_format=lambda value: f"{value:.3f}")]
        if left := len(self.table) - len(shown):
            lines.append(f"… and {left} more variables of smaller r_hat, in {where}")
        return lines

    def __str__(self) -> str:
        return self.text()

    def _repr_html_(self) -> str:
        return _html.block(self.head, _html.listed(self.findings), _html.frame(self.table))


def spell(findings: Iterable[Finding]) -> list[str]:
    """Lines of text that say what was found and what to do."""
    lines = []
    for finding in findings:
        lines.append(f"  {finding.mark} {finding.verdict}")
        if finding.advice:
            lines.append(f"      → {finding.advice}")
    return lines


def label(name: Hashable, values: xr.DataArray, place: Sequence[Any]) -> str:
    """Name of an entry of draws (chain, draw, ...) by its coordinate labels, as in ``U[3, PC1]``."""
    labels = [
        values[dim].values[i] if dim in values.coords else i for dim, i in zip(values.dims[2:], place, strict=True)
    ]
    return f"{name}[{', '.join(str(label) for label in labels)}]" if labels else str(name)
