"""Everything that a person looks at after a run: maps as CF NetCDF, figures, a table, an HTML report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import pandas as pd
from annotated_types import Interval

from probmodels import plots
from probmodels.bayesian_svd import figures as mode_figures
from probmodels.bayesian_svd.draws import MODES_OF
from probmodels.bayesian_svd.eof import compare_eof
from probmodels.bayesian_svd.gaps.fill import fill_field, held_out_sentence, write_filled
from probmodels.bayesian_svd.indices.el_nino import el_nino_sentences, el_nino_table
from probmodels.bayesian_svd.joint.outputs import Coupled, Coupling, coupled_modes, file_name
from probmodels.bayesian_svd.joint.stack import split_fields
from probmodels.bayesian_svd.patterns.local import local_variance, trend_maps
from probmodels.bayesian_svd.patterns.number import draw_number
from probmodels.bayesian_svd.patterns.rotation import ROTATIONS
from probmodels.bayesian_svd.report import write_report
from probmodels.bayesian_svd.reporting.tables import effect_tables, mode_tables
from probmodels.bayesian_svd.summary import summarise_modes, summary_table, write_modes
from probmodels.errors import SummaryError
from probmodels.inference.result import Result
from probmodels.options import Fraction, OneOf, checked
from probmodels.outputs import Outputs, loss_figure, write_all

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.figure import Figure

__all__ = ["write_outputs"]

_TRACED = ["d", "sigma", "autocorrelation", "length_scale_space", "length_scale_time"]


@checked(SummaryError)
def write_outputs(
    result: Result,
    folder: str | Path,
    *,
    level: Fraction = 0.95,
    dpi: Annotated[int, Interval(ge=20, le=1200)] = 110,
    rotation: Annotated[str, OneOf(ROTATIONS)] | None = None,
    coupling: Coupling | None = None,
    progress: bool = False,
) -> Outputs:
    """Write ``report.html``, ``modes.nc``, ``summary.txt``, figures as PNG and PDF, and their numbers as CSV.

    Where its problem held blocks out, ``filled.nc`` holds the field with its gaps filled.
    Where the series of a result are a process in time, all are of the modes of the population, and
    ``modes_of_these_times.nc`` and a second table hold the modes of the field at these times, from the same draws.

    Parameters
    ----------
    result
        Result of a Bayesian SVD, by MCMC or SVI.
    folder
        Where to; made where it is missing, files of the same names are replaced.
    level
        Probability of the intervals.
    dpi
        Resolution of the figures.
    rotation
        ``"varimax"`` or ``"promax"``: rotated modes are written beside the others, as ``modes_varimax.nc``, figures and
        a table of their own.
    coupling
        How modes that couple several fields are found, ``"mca"`` (by default) or ``"cca"``; see
        `probmodels.bayesian_svd.joint.coupled.couple`.
    progress
        Whether bars are shown while gaps are filled, which may take minutes.

    Returns
    -------
    Outputs
        The folder, the table of the modes, and the verdict of the diagnostics.

    Raises
    ------
    SummaryError
        If the result lacks what its summary needs, or an option is out of range or not used.
    """
    tree, posterior = result.tree, result.posterior
    modes = summarise_modes(tree, level=level)
    comparison = compare_eof(tree, modes)
    local, trend = local_variance(tree, level=level), trend_maps(tree, level=level)
    modes = modes.assign({name: array.variable for part in (local, trend) for name, array in part.data_vars.items()})
    joint = "field" in tree["constant_data"].coords  # one map or box would mix the fields
    mapped = "lat" in modes.coords and not joint
    figures = _figures(modes, comparison, posterior)
    if mapped:
        figures |= _maps(modes, comparison, level=level)
    table = summary_table(modes, comparison)
    files: dict[str, Callable[[Path], object]] = {"modes.nc": lambda file: write_modes(modes, file)}
    these, summaries = None, [(modes, comparison)]
    if modes.attrs["estimand"] != (name := MODES_OF["times"]):
        these = summarise_modes(tree, of="times", level=level)
        summaries.append((these, compare_eof(tree, these)))
        table = "\n".join([f"{modes.attrs['estimand']}:", table, "", f"{name}:", summary_table(*summaries[1])])
        files["modes_of_these_times.nc"] = lambda file: write_modes(these, file)
    if "held_out_block" in tree["constant_data"]:
        filled = fill_field(result, level=level, progress=progress)
        table += f"\n\n{held_out_sentence(filled)}"
        files["filled.nc"] = lambda file: write_filled(filled, file, progress=progress)
    coupled = _coupled(tree, modes, coupling, level=level)
    if coupled is not None:
        figures = coupled.figures() | {key: value for key, value in figures.items() if key != "leading_modes"}
        for name, part in coupled.fields.items():
            figures |= {f"{key}_{file_name(name)}": value for key, value in _maps(part, None, level=level).items()}
        files |= coupled.files(write_modes)
        table = "\n\n".join(filter(None, [table, coupled.text()]))
    if rotation is not None:
        rotated = summarise_modes(tree, level=level, rotation=rotation)
        table += f"\n\nrotated {rotated.attrs['estimand']}:\n{summary_table(rotated)}"
        files[f"modes_{rotation}.nc"] = lambda file: write_modes(rotated, file)
        figures["rotated_pcs"] = mode_figures.pcs(rotated)
        if mapped:
            figures["rotated_maps"] = mode_figures.mode_maps(rotated)
        for name, part in split_fields(rotated, tree).items() if joint else ():
            figures[f"rotated_maps_{file_name(name)}"] = mode_figures.mode_maps(part)
    tables = mode_tables(*summaries)
    if coupled is None:
        tables |= effect_tables(local, trend)
    else:
        tables |= coupled.tables()
    el_nino = pd.DataFrame() if joint else el_nino_table(tree, modes, level=level)
    if len(el_nino):
        tables["el_nino"] = el_nino
        table = "\n".join([table, "", *el_nino_sentences(el_nino)])
    written = write_all(
        result,
        folder,
        table=table,
        tables={f"tables/{key}": frame for key, frame in tables.items()},
        figures=figures | loss_figure(result),
        files=files,
        dpi=dpi,
        pdf=True,
        progress=progress,
    )
    write_report(
        tree,
        modes,
        written.figures,
        folder,
        diagnosis=written.diagnosis,
        comparison=comparison,
        these=these,
        el_nino=el_nino,
        coupled=coupled,
        dpi=dpi,
    )
    return replace(written, file="report.html")


def _coupled(tree: xr.DataTree, modes: xr.Dataset, coupling: Coupling | None, *, level: float) -> Coupled | None:
    """Maps of several fields and what couples them; None for one field."""
    if "field" in tree["constant_data"].coords:
        return coupled_modes(tree, modes, method=coupling or "mca", level=level)
    if coupling is not None:
        raise SummaryError(f"coupling={coupling!r} is of several fields; the result is of one")
    return None


def _figures(modes: xr.Dataset, comparison: xr.Dataset, posterior: xr.Dataset) -> dict[str, Figure]:
    """Figures of the modes and of the draws."""
    figures: dict[str, Figure] = {
        "leading_modes": mode_figures.leading_modes(modes, comparison),
        "pcs": mode_figures.pcs(modes, comparison),
        "scree": mode_figures.scree(modes, comparison),
    }
    if "number_of_modes" in modes:
        figures["number_of_modes"] = draw_number(modes)
    traced = [name for name in _TRACED if name in posterior and float(posterior[name].std()) > 0]
    if posterior.sizes["chain"] > 1:
        figures["rank"] = plots.rank(posterior, traced)
    figures["trace"] = plots.plot_trace(posterior, traced)
    return figures


def _maps(modes: xr.Dataset, comparison: xr.Dataset | None, *, level: float) -> dict[str, Figure]:
    """Maps of a field; none where its cells have no positions."""
    if "lat" not in modes.coords:
        return {}
    figures = {"mode_maps": mode_figures.mode_maps(modes)}
    if "plane" in modes.dims:
        figures["plane_maps"] = mode_figures.plane_maps(modes)
    figures["local_variance"] = mode_figures.local_variance_maps(modes, level=level)
    if "trend_mean" in modes:
        figures["trend"] = mode_figures.trend_map(modes)
    if comparison is not None:
        figures["eof_difference"] = mode_figures.eof_difference(modes, comparison)
    figures["residual_maps"] = mode_figures.residual_maps(modes)
    if "mode_r_hat" in modes:
        figures["rhat_map"] = mode_figures.rhat_map(modes)
    return figures
