"""When chains have drawn enough: looks at their draws, ever later, until these would pass the verdict.

A run that stops at the first look whose estimates are good enough selects lucky estimates: of effective sample sizes
whose own error is a few per cent, a handful of looks favours those that are too large. Means and intervals hardly
suffer, since the rule does not look at where draws lie, only at how they are correlated and whether chains agree.
Looks are few for this reason, and each waits for what the one before foretold.
"""

from __future__ import annotations

import math

import xarray as xr

from probmodels.inference.diagnostics.report import judge_draws

__all__ = ["first_look", "next_look"]

_FIRST = 0.25  # share of all draws at the first look
_LEAST = 100  # draws of a chain at the first look: r_hat of shorter ones is mostly noise
_MARGIN = 1.1  # times as many draws as the least effective sample size seen says
_GROWTH = (1.25, 2.0)  # times as many draws from one look to the next
_NEARLY = 0.9  # share of all draws after which the next look is the last


def first_look(limit: int) -> int:
    """Draws of each chain at the first look, of at most ``limit``."""
    return min(limit, max(_LEAST, math.ceil(_FIRST * limit)))


def next_look(tree: xr.DataTree, num_samples: int, limit: int, target_ess: float) -> int | None:
    """Draws of each chain at the next look; None where these are enough, or as many as there may be.

    Parameters
    ----------
    tree
        Result of the draws so far.
    num_samples
        Draws of each chain so far.
    limit
        Draws of each chain at most.
    target_ess
        Smallest effective sample size, as ``ess_min`` of `probmodels.inference.diagnose`.
    """
    if num_samples >= limit:
        return None
    report = judge_draws(tree, ess_min=target_ess)
    if report.ok:
        return None
    least = float(report.table[["ess_bulk_min", "ess_tail_min"]].min().min())
    factor = _MARGIN * target_ess / least if least > 0 else math.inf  # nan where nothing moves yet: as far as may be
    factor = min(max(factor, _GROWTH[0]), _GROWTH[1]) if math.isfinite(factor) else _GROWTH[1]
    found = math.ceil(num_samples * factor)
    return limit if found > _NEARLY * limit else found
