"""Everything that a person looks at after a run: maps as CF NetCDF, figures, a table, an HTML report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
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
    joint = "field" in tree["constant_data"].coords  # one map or box would mix the fields
    if coupling is not None and not joint:
        raise SummaryError(f"coupling={coupling!r} is of several fields; the result is of one")
    modes = summarise_modes(tree, level=level)
    comparison = compare_eof(tree, modes)
    local, trend = local_variance(tree, level=level), trend_maps(tree, level=level)
    modes = modes.assign({name: array.variable for part in (local, trend) for name, array in part.data_vars.items()})
    made = _Made(_figures(modes, comparison, posterior), {}, {"modes.nc": lambda file: write_modes(modes, file)}, [])
    these = _add_modes(made, tree, modes, comparison, level=level)
    if "held_out_block" in tree["constant_data"]:
        field = fill_field(result, level=level, progress=progress)
        made.text.append(held_out_sentence(field))
        made.files["filled.nc"] = lambda file: write_filled(field, file, progress=progress)
    coupled = coupled_modes(tree, modes, method=coupling or "mca", level=level) if joint else None
    el_nino = pd.DataFrame()
    if coupled is not None:
        _add_fields(made, coupled, level=level)
    else:
        made.tables |= effect_tables(local, trend)
        made.figures |= _maps(modes, comparison, level=level)
        el_nino = el_nino_table(tree, modes, level=level)
    if rotation is not None:
        _add_rotated(made, tree, rotation, coupled, level=level)
    if len(el_nino):
        made.tables["el_nino"] = el_nino
        made.text.append("\n".join(el_nino_sentences(el_nino)))
    written = write_all(
        result,
        folder,
        table="\n\n".join(made.text),
        tables={f"tables/{key}": frame for key, frame in made.tables.items()},
        figures=made.figures | loss_figure(result),
        files=made.files,
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


@dataclass
class _Made:
    """What is to be written, and said at the end."""

    figures: dict[str, Figure]
    tables: dict[str, pd.DataFrame]
    files: dict[str, Callable[[Path], object]]
    text: list[str]


def _add_modes(
    made: _Made, tree: xr.DataTree, modes: xr.Dataset, comparison: xr.Dataset, *, level: float
) -> xr.Dataset | None:
    """Tables of the modes; where they are those of the population, also the modes of these times, which it returns."""
    table = summary_table(modes, comparison)
    if modes.attrs["estimand"] == (name := MODES_OF["times"]):
        made.tables |= mode_tables((modes, comparison))
        made.text.append(table)
        return None
    these = summarise_modes(tree, of="times", level=level)
    other = compare_eof(tree, these)
    made.tables |= mode_tables((modes, comparison), (these, other))
    made.text += [f"{modes.attrs['estimand']}:\n{table}", f"{name}:\n{summary_table(these, other)}"]
    made.files["modes_of_these_times.nc"] = lambda file: write_modes(these, file)
    return these


def _add_fields(made: _Made, coupled: Coupled, *, level: float) -> None:
    """Maps of several fields, each in its units, and what couples them."""
    made.figures = coupled.figures() | {key: made.figures[key] for key in made.figures if key != "leading_modes"}
    for name, part in coupled.fields.items():
        made.figures |= {f"{key}_{file_name(name)}": value for key, value in _maps(part, None, level=level).items()}
    made.files |= coupled.files(write_modes)
    made.tables |= coupled.tables()
    made.text += filter(None, [coupled.text()])


def _add_rotated(made: _Made, tree: xr.DataTree, rotation: str, coupled: Coupled | None, *, level: float) -> None:
    """Rotated modes beside the others."""
    rotated = summarise_modes(tree, level=level, rotation=rotation)
    made.text.append(f"rotated {rotated.attrs['estimand']}:\n{summary_table(rotated)}")
    made.files[f"modes_{rotation}.nc"] = lambda file: write_modes(rotated, file)
    made.figures["rotated_pcs"] = mode_figures.pcs(rotated)
    fields = {"": rotated} if coupled is None else split_fields(rotated, tree)
    for name, part in fields.items():
        if "lat" in part.coords:
            made.figures[f"rotated_maps_{file_name(name)}".rstrip("_")] = mode_figures.mode_maps(part)


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
