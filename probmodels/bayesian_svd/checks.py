"""Whether the model of a Bayesian SVD fits its data: residuals that are not white, cells that vary otherwise, grids.

The model takes what no mode holds for noise that is independent between cells and times and of one level. Where it is
not, the data hold less information than the model believes, and intervals are too narrow.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import xarray as xr

from probmodels.bayesian_svd.summary import residual_checks
from probmodels.inference.diagnostics.findings import Finding
from probmodels.inference.labels import ResultLike, group_of

__all__ = ["check_model", "misfit"]

_OUTSIDE, _LAG, _NEIGHBOUR = 0.10, 0.2, 0.3
_AT_END = 0.1  # share of draws at an end of a grid of length-scales that is worth a word
_HIDDEN = 0.05  # share of the variance of a leading pattern of the data that the basis may leave out
_SIDES = {"space": "length_scales_space", "time": "length_scales_time"}


def check_model(result: ResultLike) -> Iterator[Finding]:
    """Findings on the fit of the model: variance by cell, residuals of neighbouring times and cells, length-scales.

    Limits leave room for three standard errors of a share or correlation of data that are of the model. They cannot
    see dependence over longer distances or lags, nor a drift of the noise.
    """
    tree = result.tree
    found = misfit(residual_checks(tree))
    cells, times = (group_of(tree, "constant_data").sizes[dim] for dim in ("cell", "time"))
    narrow = "intervals are too narrow"
    limit = _OUTSIDE + 3 * math.sqrt(0.05 * 0.95 / cells)
    verdict = f"at {found['outside']:.0%} of the cells the variance is outside the central 95 % that the model expects "
    verdict += f"(at most {limit:.0%})"
    advice = f"one noise level does not fit all cells: where there is more variance, {narrow}"
    yield _finding(found["outside"], limit, verdict, advice)
    error = 3 * 1.25 / math.sqrt(cells * times)  # of the median of a correlation
    for name, limit, near in (("lag", _LAG, "times"), ("neighbour", _NEIGHBOUR, "cells")):
        if name in found:
            limit += error
            verdict = f"residuals of neighbouring {near} have a median correlation of {found[name]:.2f} "
            verdict += f"(at most {limit:.2f})"
            advice = f"the model takes them for independent, so that {narrow}: read them as lower bounds; more modes"
            advice += f"{' or means over longer times' * (near == 'times')} lower the correlation"
            yield _finding(found[name], limit, verdict, advice)
    yield from _ends(tree)
    yield from _hidden(group_of(tree, "constant_data"))


def misfit(checks: xr.Dataset) -> dict[str, float]:
    """What `residual_checks` or `summarise_modes` found, in one number each.

    Returns
    -------
    dict
        ``outside``, share of cells whose predictive p-value is outside 95 %; ``lag`` and, where cells have positions,
        ``neighbour``, the median correlation of the residuals of neighbouring times and cells.
    """
    p = checks["predictive_p_value"]
    found = {"outside": float(((p < 0.025) | (p > 0.975)).sum() / p.notnull().sum())}
    for key, name in (("lag", "residual_autocorrelation"), ("neighbour", "residual_neighbour_correlation")):
        if name in checks:
            found[key] = float(checks[name].median())
    return found


def _finding(value: float, limit: float, verdict: str, advice: str) -> Finding:
    bad = not value <= limit
    return Finding(bad, verdict, advice if bad else "", part="model")


def _ends(tree: xr.DataTree) -> Iterator[Finding]:
    """Length-scales of which draws pile up at an end of their grid."""
    posterior, constant = group_of(tree, "posterior"), group_of(tree, "constant_data")
    for side, option in _SIDES.items():
        name = f"length_scale_{side}"
        if name not in posterior or option not in constant:
            continue
        grid = np.unique(constant[option].values)
        grid = grid[grid > 0]
        if len(grid) < 2:
            continue
        draws = posterior[name].transpose(..., "mode").values.reshape(-1, posterior.sizes["mode"])
        for end, value in (("last", grid[-1]), ("first", grid[0])):
            share = np.isclose(draws, value).mean(0)
            if share.max() > _AT_END:
                mode = int(share.argmax())
                verdict = (
                    f"{share[mode]:.0%} of the draws of {name} of mode {mode + 1} are at the {end} point of its grid"
                )
                verdict += f", {value:.4g} (at most {_AT_END:.0%})"
                advice = f"give a wider grid, {option}=[...], or a prior, length_prior_{side}"
                yield Finding(False, verdict, advice, part="model")


def _hidden(constant: xr.Dataset) -> Iterator[Finding]:
    """Leading patterns of the data that the basis in space does not show."""
    if "hidden" not in constant:
        return
    hidden = constant["hidden"].values
    mode = int(hidden.argmax())
    verdict = (
        f"{hidden[mode]:.0%} of the variance of leading pattern {mode + 1} of the data is of a scale that the basis "
    )
    verdict += f"in space does not show (at most {_HIDDEN:.0%})"
    advice = "it counts as noise: give more functions, model.max_basis, or every direction, --tail 0"
    yield _finding(float(hidden[mode]), _HIDDEN, verdict, advice)
