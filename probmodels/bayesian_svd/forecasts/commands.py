"""What the commands ``probmodels forecast`` and ``probmodels project`` do with a result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xarray as xr

from probmodels.bayesian_svd.forecasts.figures import fan_charts
from probmodels.bayesian_svd.forecasts.forecasting import forecast
from probmodels.bayesian_svd.forecasts.new_fields import later_times, new_matrix, positions
from probmodels.bayesian_svd.forecasts.projection import project
from probmodels.bayesian_svd.forecasts.tables import forecast_table
from probmodels.bayesian_svd.forecasts.weights import box_weights, frozen_ahead
from probmodels.bayesian_svd.indices.boxes import frozen_cells, parse_boxes
from probmodels.bayesian_svd.summary import write_modes
from probmodels.datasets.sst import load_sst
from probmodels.errors import DataError, SpecError, SummaryError
from probmodels.inference.labels import group_of, read_json
from probmodels.inference.result import Result
from probmodels.inference.runtime.ops import write_atomically

__all__ = ["forecast_result", "project_result", "read_new"]

_KEPT = (
    "region",
    "season",
    "variable",
    "ice",
    "fill",
    "anomalies",
    "daily",
    "coarsen",
)  # options of the fit that new files share
_REVISED = 0.05  # of the standard deviation of the record: how far months that both hold may differ


def read_new(result: Result, file: str) -> xr.DataArray:
    """Months after the record of a result from a file, as its spec loaded those of the record.

    The file has to hold the base period of the fit as well, so that its anomalies are of the same climatology; months
    that it shares with the record are compared.

    Raises
    ------
    SpecError
        If the result did not come from a spec with ``data.name = "sst"``.
    DataError
        If the file cannot be read, lacks the base period, differs from the record, or has no month after it.
    """
    table = read_json(result.tree.attrs, "spec", {}).get("data", {})
    if not isinstance(table, dict) or table.get("name") != "sst":
        raise SpecError(
            "the result keeps no spec with data.name='sst'; give the new field in Python: project(result, new)"
        )
    constant = result.tree["constant_data"].to_dataset()
    options: dict[str, Any] = {name: table[name] for name in _KEPT if name in table}
    base = str(constant["data"].attrs.get("base_period", ""))
    if base:
        options["base_period"] = base
    try:
        found = load_sst(file, min_valid=0.0, **options)
    except DataError as error:
        said = f"; its base period is that of the fit, {base}, which it has to hold too" if base else ""
        raise DataError(f"{file}: {error}{said}") from error
    matrix = new_matrix(found, constant)
    record = constant["data"].transpose("cell", "time")
    both = np.intersect1d(matrix["time"].values, record["time"].values)
    if both.size:
        own, other = record.sel(time=both).values, matrix.sel(time=both).values
        apart = float(np.nanmean(np.abs(own - other)) / np.nanstd(own))
        if not apart < _REVISED:
            raise DataError(
                f"{file}: the {both.size} times that it shares with the record differ from it, by {apart:.2g} of its "
                "standard deviation: another data set, version or climatology; fit the new file instead"
            )
    later = np.flatnonzero(matrix["time"].values > record["time"].values[-1])
    if not later.size:
        raise DataError(
            f"{file} ends at {str(matrix['time'].values[-1])[:10]}, not after the record, which ends at "
            f"{str(record['time'].values[-1])[:10]}; give a file with newer months"
        )
    new = matrix.isel(time=later).assign_coords(cell=constant["cell"].values)
    return new.assign_attrs({name: found.attrs[name] for name in ("units", "kind", "season") if name in found.attrs})


def _make_room(*files: Path | None) -> None:
    """Make the folders of files, so that what cannot be written is said before anything is computed."""
    for file in files:
        if file is not None:
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise SummaryError(f"cannot write {file}: {error.strerror or error}; choose another file") from error


def _times_ahead(own: xr.DataArray, new: xr.DataArray | None, steps: int) -> xr.DataArray:
    """Times of a forecast after the record, or after new months."""
    gone = 0 if new is None else int(positions(own, new["time"])[1][-1])
    return later_times(own, gone + steps)[gone:]


def _write(file: Path, write: Callable[[Path], object]) -> None:
    try:
        write_atomically(file, write)
    except OSError as error:
        raise SummaryError(f"cannot write {file}: {error.strerror or error}; choose another file") from error


def forecast_result(
    result: Result,
    out: Path,
    steps: int,
    *,
    new: str | None,
    boxes: Sequence[str],
    ice: Literal["left_out", "filled"],
    transition: Literal["ar1", "lags", "coupled"],
    residuals: Literal["noise", "persistent"],
    table: Path | None,
    figure: Path | None,
    num_draws: int,
    beyond: bool,
    seed: int,
    source: str,
) -> str:
    """Forecast, write what is asked for, and say what was found."""
    _make_room(out, table, figure)
    later = None if new is None else read_new(result, new)
    weights = {name: box_weights(result, region) for name, region in parse_boxes(boxes).items()}
    indices, constant, times = weights, group_of(result.tree, "constant_data"), None
    if ice == "left_out" and weights and frozen_cells(constant).any():
        times = _times_ahead(constant["time"], later, steps)
        indices = {name: box_weights(result, region, times=times) for name, region in parse_boxes(boxes).items()}
    found = forecast(
        result,
        steps,
        new=later,
        indices=indices,
        transition=transition,
        residuals=residuals,
        num_draws=num_draws,
        beyond=beyond,
        seed=seed,
    )
    found.attrs |= {"result": source, "new_months": new or ""}
    if times is not None:
        share = np.stack([x @ frozen_ahead(constant, times) for x in weights.values()])
        label = "share of the box that was frozen at this time of the year, left out of its mean"
        found["index_ice_share"] = ("index", "time"), share, {"long_name": label, "units": "1"}
        found.attrs["ice"] = ice
    _write(out, lambda file: write_modes(found, file))
    rows = forecast_table(found)
    lines = [rows[rows["lead"].isin({1, 3, 6, 12, steps})].to_string(index=False, float_format=lambda x: f"{x:.3g}")]
    if table is not None:
        _write(table, lambda file: rows.to_csv(file, index=False))
    if figure is not None:
        charts = fan_charts(result, found, indices=weights)
        _write(figure, lambda file: charts.savefig(file, dpi=150, format=figure.suffix[1:]))
    return "\n".join([*lines, "", str(found.attrs["verdict"]), f"Forecast: {out}"])


def project_result(
    result: Result, file: str, out: Path, *, level: float, num_draws: int, seed: int, source: str
) -> str:
    """Project the months of a file after the record, write them, and say what was found."""
    _make_room(out)
    found = project(result, read_new(result, file), level=level, num_draws=num_draws, seed=seed)
    report = result.diagnose()
    found.attrs |= {"result": source, "new_months": file, "verdict": report.head}
    _write(out, lambda path: write_modes(found, path))
    lines = [found[["pc_mean", "pc_sd"]].to_dataframe().unstack("mode").to_string(float_format=lambda x: f"{x:.3g}")]
    lines += [f"Note: {found.attrs['notes']}"] if found.attrs["notes"] else []
    return "\n".join([*lines, "", report.head, f"Projection: {out}"])
