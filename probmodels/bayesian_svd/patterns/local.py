"""What the modes explain at each cell, and the trend of each cell with the probability of its sign."""

from __future__ import annotations

import numpy as np
import xarray as xr

from probmodels.bayesian_svd.attributes import TEMPERATURE
from probmodels.bayesian_svd.draws import MODES_OF, blocks, read_draws
from probmodels.bayesian_svd.grids import to_grid
from probmodels.errors import SummaryError
from probmodels.options import Count, Fraction, checked

__all__ = ["local_variance", "trend_maps"]

_MOST = 1000  # draws that maps are reduced from, of all chains, where not asked otherwise


@checked(SummaryError)
def local_variance(tree: xr.DataTree, *, level: Fraction = 0.95, num_draws: Count = _MOST) -> xr.Dataset:
    """Share of the variance of each cell, fixed effects taken out, that each mode explains.

    Parameters
    ----------
    tree
        Result of a Bayesian SVD.
    level
        Probability of the intervals.
    num_draws
        Draws that are used, evenly thinned.

    Returns
    -------
    xr.Dataset
        ``local_fraction_mean``, ``_lower`` and ``_upper`` over (mode, lat, lon), or (mode, cell) without a grid;
        ``modes_fraction_*`` over the cells alone, that of all modes together. The rest is noise. Where series are a
        process in time, the variance is that of the population, else that of these times.

    Raises
    ------
    SummaryError
        If the tree lacks a group or variable, or an option is out of range.
    """
    draws, constant = read_draws(tree), tree["constant_data"].to_dataset()
    chosen = draws.thinned(num_draws)
    num_cells, num_modes = len(draws.basis_space), draws.d.shape[1]
    variance = draws.spread()[1][chosen] ** 2  # of each series over time
    kinds, tails = ("mean", "lower", "upper"), [(1 - level) / 2, (1 + level) / 2]
    own = {kind: np.empty((num_modes, num_cells)) for kind in kinds}
    all_modes = {kind: np.empty(num_cells) for kind in kinds}
    for block in blocks(num_cells, len(chosen), num_modes):
        explained = draws.patterns(block, chosen) ** 2 * variance[:, None, :]  # (draw, cell, mode)
        total = explained.sum(2) + draws.noise_sd(block, chosen) ** 2
        share = explained / total[:, :, None]
        for found, values in ((own, share), (all_modes, share.sum(2))):
            for kind, reduced in zip(kinds, (values.mean(0), *np.quantile(values, tails, axis=0)), strict=True):
                found[kind][..., block] = reduced.T
    out = xr.Dataset(coords={"mode": np.arange(1, num_modes + 1, dtype=np.int32)})
    whose = "population" if draws.of == "population" else "field at these times"
    for kind in kinds:
        words = _words(kind, level)
        out[f"local_fraction_{kind}"] = ("mode", "cell"), own[kind], _attrs(whose, "the mode explains", words)
        out[f"modes_fraction_{kind}"] = "cell", all_modes[kind], _attrs(whose, "all modes together explain", words)
    return to_grid(out, constant).assign_attrs(estimand=MODES_OF[draws.of])


def _attrs(whose: str, what: str, words: str) -> dict[str, str]:
    return {"long_name": f"fraction of the variance of the {whose} at the cell that {what}, {words}", "units": "1"}


def _words(kind: str, level: float) -> str:
    if kind == "mean":
        return "posterior mean"
    return f"{kind} end of the {100 * level:g} % equal-tailed interval"


@checked(SummaryError)
def trend_maps(tree: xr.DataTree, *, level: Fraction = 0.95) -> xr.Dataset:
    """Linear trend of each cell where the fixed effects include one.

    Where series are a process in time, the trend is that of the climate which the times are a sample of, and its
    interval holds what slow variability can add by chance. Else it is that of these times.

    Parameters
    ----------
    tree
        Result of a Bayesian SVD.
    level
        Probability of the intervals.

    Returns
    -------
    xr.Dataset
        ``trend_mean``, ``trend_lower``, ``trend_upper`` and ``trend_prob_positive`` over (lat, lon), or cell without a
        grid; per decade where times are dates, else per unit of time. Empty where there is no trend among the effects.

    Raises
    ------
    SummaryError
        If the tree lacks a group or variable, or an option is out of range.
    """
    draws, constant = read_draws(tree), tree["constant_data"].to_dataset()
    names = [str(name) for name in constant["effect"].values] if "effect" in constant.coords else []
    if "trend" not in names or draws.effects is None:
        return xr.Dataset()
    values = draws.effects[:, :, names.index("trend")]  # (draw, cell)
    lower, upper = np.quantile(values, [(1 - level) / 2, (1 + level) / 2], axis=0)
    dated = constant["time"].dtype.kind == "M"
    unit = str(constant["data"].attrs.get("units", "1"))
    units = (f"{unit} (10 year)-1" if unit != "1" else "(10 year)-1") if dated else unit
    out = xr.Dataset({"trend_prob_positive": ("cell", (values > 0).mean(0), {"units": "1"})})
    out["trend_prob_positive"].attrs["long_name"] = "posterior probability that the trend is positive"
    whose = "of the population" if draws.of == "population" else "of these times"
    for kind, reduced in {"mean": values.mean(0), "lower": lower, "upper": upper}.items():
        label = f"linear trend {whose}, {_words(kind, level)}"
        out[f"trend_{kind}"] = "cell", reduced, {"long_name": label, "units": units}
        if unit in TEMPERATURE:
            out[f"trend_{kind}"].attrs["units_metadata"] = "temperature: difference"
    return to_grid(out, constant)
