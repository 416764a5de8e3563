"""``probmodels indices``, ``forecast``, ``project`` and ``panels``: what is made of results of a Bayesian SVD."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from probmodels.cli.common import Refusal, check_free, exit_unless, load, make_folder, short_names
from probmodels.cli.options import IMAGES, LARGEST, MOST, PATH, Folder, Strict, path

__all__ = ["forecast", "indices", "panels", "project"]


def indices(
    folder: Folder,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write to.", **PATH)],
    box: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[=BOUNDS]",
            help="Box such as nino34, or NAME=lat_min,lat_max,lon_min,lon_max; repeatable; none: those of El Niño.",
        ),
    ] = None,
    effects: Annotated[
        bool,
        typer.Option("--effects/--no-effects", help="Whether mean and trend of the cells belong to a box's index."),
    ] = True,
    min_covered: Annotated[float, typer.Option(help="Share of a box that cells of the field must cover.")] = 0.8,
    ice: Annotated[
        str, typer.Option(help="Frozen cells of a box: left_out of its mean, or filled as open water by the model.")
    ] = "left_out",
    index: Annotated[list[str] | None, typer.Option(help="Index that is a mode: pdo or npgo; repeatable.")] = None,
    remove_mean: Annotated[
        bool, typer.Option("--remove-mean", help="Take the mean of the region out before the mode is found.")
    ] = False,
    base: Annotated[str | None, typer.Option(help="Period over which such an index has mean 0 and sd 1.")] = None,
    published: Annotated[
        Path | None, typer.Option("--published", help="CSV file of a published index to express in modes.", **PATH)
    ] = None,
    fitted: Annotated[str | None, typer.Option(help="Period whose published values are used, e.g. 1950:1993.")] = None,
    series: Annotated[
        Path | None, typer.Option("--with", help="CSV file of a series to correlate all indices with.", **PATH)
    ] = None,
    column: Annotated[str | None, typer.Option(help="Column of that file, where there are several.")] = None,
    missing: Annotated[
        list[float] | None, typer.Option(help="Value of that file that means missing, e.g. -99.9; repeatable.")
    ] = None,
    max_lag: Annotated[int, typer.Option(help="Largest lag of the correlation, in steps.")] = 0,
    detrend: Annotated[
        bool, typer.Option("--detrend", help="Take a line out of both before they are correlated.")
    ] = False,
    level: Annotated[float, typer.Option(help="Probability of the intervals.")] = 0.95,
    strict: Strict = False,
) -> None:
    """Write climate indices of a Bayesian SVD with their uncertainty, and their correlation with a series."""
    from probmodels.bayesian_svd.indices.outputs import indices_to_folder
    from probmodels.inference.diagnostics.findings import spell

    asked: dict[str, Any] = {"boxes": box, "modes": index or (), "missing": missing or ()}
    asked |= {"effects": effects, "min_covered": min_covered, "ice": ice, "remove_mean": remove_mean, "base": base}
    asked |= {"published": published, "fitted": fitted, "series": series, "column": column}
    result = load(folder)
    report = result.diagnose()
    asked |= {"max_lag": max_lag, "detrend": detrend}
    findings = indices_to_folder(result.tree, out, level=level, diagnosis=report.head, **asked)
    failed = [finding for finding in findings if finding.harmful]
    for finding in findings:
        if not finding.harmful:
            typer.echo(f"Note: {finding.verdict}")
    typer.echo(report.head)
    if failed:
        typer.echo("\n".join(["Indices FAILED: not all are what their names say.", *spell(failed)]))
    typer.echo(f"Written to {out}: {', '.join(sorted(path.name for path in out.iterdir()))}")
    exit_unless(report.ok and not failed, strict)


def forecast(
    folder: Folder,
    out: Annotated[Path, typer.Option("--out", "-o", help="NetCDF file to write.", **PATH)],
    steps: Annotated[int, typer.Option(min=1, max=10_000, help="Steps of the record, such as months.")] = 12,
    new: Annotated[
        str | None, typer.Option(help="File with months after the record, from the last of which it starts.")
    ] = None,
    box: Annotated[
        list[str] | None,
        typer.Option(help="Box whose mean is forecast: NAME=lat0,lat1,lon0,lon1 or a region; repeatable."),
    ] = None,
    ice: Annotated[
        str,
        typer.Option(
            help="Frozen cells of a box: left_out of its mean, as the years of the record had them, or filled as open "
            "water."
        ),
    ] = "left_out",
    lags: Annotated[
        bool, typer.Option("--lags", help="Autoregression on lags of up to 12 steps instead of the model's process.")
    ] = False,
    coupled: Annotated[
        bool, typer.Option("--coupled", help="The same, in which each series follows the others too.")
    ] = False,
    residuals: Annotated[
        bool, typer.Option("--residuals", help="What modes leave goes on as in the record, not as white noise.")
    ] = False,
    table: Annotated[Path | None, typer.Option("--table", help="CSV file of series and boxes.", **PATH)] = None,
    figure: Annotated[Path | None, typer.Option("--figure", help="Image of fan charts.", **PATH)] = None,
    num_samples: Annotated[int, typer.Option(min=2, max=MOST, help="Draws of the result that are used.")] = 1000,
    beyond: Annotated[bool, typer.Option("--beyond", help="Forecast further than the process tells.")] = False,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST, help="Seed; the same seed gives the same forecast.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")] = False,
) -> None:
    """Forecast series, field and box means beyond the record of a Bayesian SVD with --series ar1."""
    check_free(overwrite, out, table, figure)
    if figure is not None and figure.suffix not in IMAGES:
        raise Refusal(f"--figure {figure} must end in .png, .pdf or .svg")
    if lags and coupled:
        raise Refusal("--coupled has the lags of --lags; give one of the two")
    if ice not in ("left_out", "filled"):
        raise Refusal(f"--ice {ice} is unknown; choose left_out or filled")
    if ice == "filled" and not box:
        raise Refusal("--ice filled is of boxes; leave it out, or give --box")
    result = load(folder)
    from probmodels.bayesian_svd.forecasts.commands import forecast_result

    options: dict[str, Any] = {"new": new, "boxes": box or [], "ice": ice, "table": table, "figure": figure}
    options |= {"transition": "coupled" if coupled else "lags" if lags else "ar1"}
    options |= {"residuals": "persistent" if residuals else "noise"}
    options |= {"num_draws": num_samples, "beyond": beyond, "seed": seed, "source": str(folder)}
    typer.echo(forecast_result(result, out, steps, **options))


def project(
    folder: Folder,
    file: Annotated[
        str, typer.Argument(help="NetCDF file with the base period of the fit and months after its record.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="NetCDF file to write.", **PATH)],
    level: Annotated[float, typer.Option(help="Probability of the intervals, between 0 and 1.")] = 0.95,
    num_samples: Annotated[int, typer.Option(min=2, max=MOST, help="Draws of the result that are used.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST, help="Seed; the same seed gives the same draws.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it exists.")] = False,
) -> None:
    """Principal components of months after the record of a Bayesian SVD, its patterns as they are."""
    check_free(overwrite, out)
    result = load(folder)
    from probmodels.bayesian_svd.forecasts.commands import project_result

    typer.echo(project_result(result, file, out, level=level, num_draws=num_samples, seed=seed, source=str(folder)))


def panels(
    folders: Annotated[list[Path], typer.Argument(metavar="RESULT RESULT...", help="Folders of results.", parser=path)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Image to draw: .png, .pdf or .svg.", **PATH)],
    mode: Annotated[int, typer.Option(min=1, max=MOST, help="Number of the mode.")] = 1,
    columns: Annotated[int, typer.Option(min=1, max=20, help="Panels side by side.")] = 2,
    table: Annotated[
        Path | None, typer.Option("--table", help="CSV file of the correlations between patterns.", **PATH)
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")] = False,
) -> None:
    """Draw a mode of several results side by side: seasons, regions or data sets, and how alike patterns are."""
    if len(folders) < 2:
        raise Refusal("panels takes two results or more")
    if out.suffix not in IMAGES:
        raise Refusal(f"--out {out} must end in .png, .pdf or .svg")
    check_free(overwrite, out, table)
    results = {name: load(folder) for name, folder in zip(short_names(folders), folders, strict=True)}
    for file in filter(None, (out, table)):
        make_folder(file)
    from probmodels.bayesian_svd.patterns.panels import write_panels

    typer.echo(write_panels(results, out, mode=mode, columns=columns, table=table))
