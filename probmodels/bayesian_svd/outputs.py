"""Everything that a person looks at after a run: maps as CF NetCDF, figures, a table, an HTML report."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from annotated_types import Interval

from probmodels import plots
from probmodels.bayesian_svd import figures as mode_figures
from probmodels.bayesian_svd.eof import compare_eof
from probmodels.bayesian_svd.report import write_report
from probmodels.bayesian_svd.summary import summarise_modes, summary_table, write_modes
from probmodels.errors import SummaryError
from probmodels.inference.result import Result
from probmodels.options import Fraction, checked
from probmodels.outputs import Outputs, loss_figure, write_all

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["write_outputs"]

_TRACED = ["d", "sigma", "length_scale_space", "length_scale_time"]


@checked(SummaryError)
def write_outputs(
    result: Result, folder: str | Path, *, level: Fraction = 0.95, dpi: Annotated[int, Interval(ge=20, le=1200)] = 110
) -> Outputs:
    """Write ``modes.nc``, ``figures/*.png``, ``summary.txt`` and ``report.html``.

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

    Returns
    -------
    Outputs
        The folder, the table of the modes, and the verdict of the diagnostics.

    Raises
    ------
    SummaryError
        If the result lacks what its summary needs, or an option is out of range.
    """
    tree, posterior = result.tree, result.posterior
    modes = summarise_modes(tree, level=level)
    comparison = compare_eof(tree, modes)
    gridded = "lat" in modes.dims
    figures: dict[str, Figure] = {
        "pcs": mode_figures.pcs(modes, comparison),
        "scree": mode_figures.scree(modes, comparison),
    }
    if gridded:
        figures["mode_maps"] = mode_figures.mode_maps(modes)
        figures["eof_difference"] = mode_figures.eof_difference(modes, comparison)
        figures["residual_maps"] = mode_figures.residual_maps(modes)
    traced = [name for name in _TRACED if name in posterior and float(posterior[name].std()) > 0]
    if posterior.sizes["chain"] > 1:
        if gridded:
            figures["rhat_map"] = mode_figures.rhat_map(modes)
        figures["rank"] = plots.rank(posterior, traced)
    figures["trace"] = plots.plot_trace(posterior, traced)
    written = write_all(
        result,
        folder,
        table=summary_table(modes, comparison),
        figures=figures | loss_figure(result),
        files={"modes.nc": lambda file: write_modes(modes, file)},
        dpi=dpi,
    )
    write_report(tree, modes, written.figures, folder, diagnosis=written.diagnosis, comparison=comparison, dpi=dpi)
    return replace(written, file="report.html")
