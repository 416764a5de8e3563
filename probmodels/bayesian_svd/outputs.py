"""Everything that a person looks at after a run: maps as CF NetCDF, figures, a table, an HTML report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from probmodels import plots
from probmodels.bayesian_svd import figures as mode_figures
from probmodels.bayesian_svd.eof import compare_eof
from probmodels.bayesian_svd.report import write_report
from probmodels.bayesian_svd.summary import summarise_modes, summary_table, write_modes
from probmodels.outputs import Outputs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from probmodels.inference.result import Result

__all__ = ["write_outputs"]

_TRACED = ["d", "sigma", "length_scale_space", "length_scale_time"]


def write_outputs(result: Result, folder: str | Path, *, level: float = 0.95, dpi: int = 110) -> Outputs:
    """Write ``modes.nc``, ``figures/*.png``, ``summary.txt`` and ``report.html``.

    Parameters
    ----------
    result
        Of a Bayesian SVD, by MCMC or SVI.
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
    """
    folder = Path(folder)
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    tree = result.tree
    modes = summarise_modes(tree, level=level)
    write_modes(modes, folder / "modes.nc")
    comparison = compare_eof(tree, modes)
    diagnosis = result.diagnose()
    table = summary_table(modes, comparison)
    (folder / "summary.txt").write_text(f"{table}\n\n{diagnosis}\n", encoding="utf-8")

    posterior = result.posterior
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
    figures["trace"] = plots.trace(posterior, traced)
    if "loss" in (fit := result.group("fit")):
        figures["loss"] = plots.loss(fit)
    images = {name: folder / "figures" / f"{name}.png" for name in figures}
    for name, figure in figures.items():
        figure.savefig(images[name], dpi=dpi)
    write_report(tree, modes, images, folder, diagnosis=diagnosis, comparison=comparison, dpi=dpi)
    return Outputs(folder, table, diagnosis, "report.html")
