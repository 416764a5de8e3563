"""Draws of the modes as maps and series: what a calculation of one's own on a result starts from."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import xarray as xr

from probmodels.bayesian_svd.draws import MODES_OF, read_draws
from probmodels.bayesian_svd.grids import to_grid
from probmodels.errors import SummaryError
from probmodels.options import Count, OneOf, checked

__all__ = ["draw_maps"]

_MOST = 2**30  # bytes


@checked(SummaryError)
def draw_maps(
    tree: xr.DataTree, *, of: Annotated[str, OneOf(tuple(MODES_OF))] | None = None, num_draws: Count = 200
) -> xr.Dataset:
    """Draws of patterns and series on the grid of the data.

    Labels and signs are those of all other outputs: `probmodels.bayesian_svd.summary.summarise_modes` reduces the same
    maps, over all draws.

    Parameters
    ----------
    tree
        Result of a Bayesian SVD, as ``Result.load(folder).tree``.
    of
        Whose modes, as for `probmodels.bayesian_svd.summary.summarise_modes`.
    num_draws
        Draws that are taken, evenly thinned over all chains.

    Returns
    -------
    xr.Dataset
        Over (draw, mode, lat, lon), or (draw, mode, cell) for cells without a grid: ``pattern``, what one standard
        deviation of the series adds to the field, in units of the data. Over (draw, mode, time): ``pc``, the series;
        of the population with mean zero and unit variance in the process, of these times in the record. Over
        (draw, mode): ``d``.

    Raises
    ------
    SummaryError
        If the result lacks what is needed, or the maps of so many draws take more than 1 GiB.
    """
    draws, constant = read_draws(tree, of), tree["constant_data"].to_dataset()
    chosen = draws.thinned(num_draws)
    grid = to_grid(xr.Dataset({"x": ("cell", np.zeros(constant.sizes["cell"]))}), constant)["x"].size
    size = 8 * len(chosen) * draws.d.shape[1] * (grid + constant.sizes["time"])
    if size > _MOST:
        fewer = max(int(len(chosen) * _MOST / size), 1)
        raise SummaryError(
            f"num_draws={num_draws}: maps and series of {len(chosen)} draws take {size / 2**30:.1f} GiB; take {fewer} "
            "or fewer, or summarise_modes, which reduces all of them a block at a time"
        )
    mean, spread = (part[chosen] for part in draws.spread())
    patterns = draws.patterns(draws=chosen) * spread[:, None, :]
    series = (draws.series(draws=chosen) - mean[:, None, :]) / np.maximum(spread, 1e-300)[:, None, :]
    out = xr.Dataset(
        {
            "pattern": (("draw", "mode", "cell"), patterns.transpose(0, 2, 1)),
            "pc": (("draw", "mode", "time"), series.transpose(0, 2, 1)),
            "d": (("draw", "mode"), draws.d[chosen]),
        },
        coords={"draw": chosen, "mode": np.arange(1, draws.d.shape[1] + 1), "time": constant["time"].variable},
        attrs={"estimand": MODES_OF[draws.of]},
    )
    units = str(constant["data"].attrs.get("units") or "1")
    out["pattern"].attrs = {"long_name": "what one standard deviation of the series adds to the field", "units": units}
    out["pc"].attrs = {"long_name": "series of the mode", "units": "1"}
    out["draw"].attrs = {"long_name": "place of the draw among those of all chains, one after the other"}
    return to_grid(out, constant)
