"""``probmodels show``, ``diagnose``, ``report``, ``compare`` and ``predict``: on results of any method."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from probmodels.cli import runs
from probmodels.cli.common import Refusal, exit_unless, import_code, load, make_folder, problem_of, short_names
from probmodels.cli.options import IMAGES, LARGEST, MOST, PATH, AllowCode, AllowFetch, Folder, Strict, path
from probmodels.errors import ResultError

if TYPE_CHECKING:
    from probmodels.inference.result import Result

__all__ = ["compare", "diagnose", "predict", "report", "show"]


def show(folder: Folder) -> None:
    """Show what a result holds and its summary."""
    from probmodels import report as reports

    typer.echo(reports.show(load(folder)))


def diagnose(folder: Folder, strict: Strict = False, allow_code: AllowCode = False) -> None:
    """Judge whether the draws of a result can be trusted, and say what to do."""
    import_code(folder, allow_code)
    report = load(folder).diagnose()
    typer.echo(str(report))
    exit_unless(report.ok, strict)


def report(
    folder: Folder,
    out: Annotated[Path | None, typer.Option("--out", help="Folder to write to.", **PATH)] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Option of the outputs that replaces the spec's, e.g. output.rotation=varimax; repeatable.",
        ),
    ] = None,
    allow_code: AllowCode = False,
) -> None:
    """Write maps, figures and the HTML report of a result again."""
    import_code(folder, allow_code)
    result = load(folder)
    options = _changed_outputs(result, changes) if changes else None
    try:
        runs.write(result, out or (folder if folder.is_dir() else folder.parent), options)
    except KeyError as error:  # of a file that names a method that did not make it; after a run it would be our fault
        name, lacking = result.tree.attrs.get("method"), str(error).strip("\"'").partition(".")[0]
        raise ResultError(f"the result is none that {name} made, whose outputs need more: {lacking}") from error


def _changed_outputs(result: Result, changes: list[str]) -> dict[str, Any]:
    """Options of the outputs of a result, as its spec has them and as changed."""
    from probmodels.inference.labels import read_json
    from probmodels.methods import get_method, refuse_code
    from probmodels.spec import change_spec, check_output, own_outputs, read_spec

    known = {key: value for key, value in read_json(result.tree.attrs, "spec", {}).items() if key == "output"}
    spec = read_spec(known)
    for change in changes:
        key = change.partition("=")[0].strip()
        if not key.startswith("output.") or key in ("output.path", "output.overwrite"):
            raise Refusal(f"--set {change}: only options of outputs can be changed, such as output.rotation=varimax")
        change_spec(spec, change)
    options = own_outputs(spec)
    refuse_code(name := str(result.tree.attrs.get("method")))
    check_output(get_method(name), options)
    return options


def compare(
    folders: Annotated[list[Path], typer.Argument(metavar="RESULT RESULT...", help="Folders of results.", parser=path)],
    method: Annotated[str, typer.Option(help="Weights by stacking or pseudo_bma.")] = "stacking",
    unit: Annotated[
        str | None,
        typer.Option(
            help="Dim of the observations whose entries are left out as a whole, e.g. group; none: single values."
        ),
    ] = None,
    num_samples: Annotated[int, typer.Option(min=1, max=MOST, help="Draws of each result that are used.")] = 1000,
    figure: Annotated[Path | None, typer.Option("--figure", help="Image to draw the ranking to.", **PATH)] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with status 1 where figures cannot be trusted.")
    ] = False,
    allow_fetch: AllowFetch = False,
    allow_code: AllowCode = False,
) -> None:
    """Rank models of the same data by how well they predict observations left out (PSIS-LOO)."""
    from probmodels.inference.diagnostics.comparison import WEIGHTINGS, compare as rank_models, loo

    if len(folders) < 2:
        raise Refusal("compare takes two results or more")
    if method not in WEIGHTINGS:
        raise Refusal(f"--method {method} is unknown; choose {' or '.join(WEIGHTINGS)}")
    if figure is not None:
        if figure.suffix not in IMAGES:
            raise Refusal(f"--figure {figure} must end in .png, .pdf or .svg")
        make_folder(figure)
    judged = {}
    for folder, name in zip(folders, short_names(folders), strict=True):
        import_code(folder, allow_code)
        result = load(folder)
        problem = None if "log_likelihood" in result.tree.children else problem_of(result, folder, allow_fetch)
        judged[name] = loo(result, problem, unit=unit, num_samples=num_samples)
    found = rank_models(judged, method=method)
    typer.echo(str(found))
    if figure is not None:
        from probmodels import plots

        plots.ranking(found.table).savefig(figure, dpi=150)
        typer.echo(f"\nFigure: {figure}")
    exit_unless(found.ok, strict)


def predict(
    folder: Folder,
    out: Annotated[Path, typer.Option("--out", "-o", help="NetCDF file to write.", **PATH)],
    num_samples: Annotated[
        int | None,
        typer.Option(min=1, max=MOST, help="Predictions over all chains; none: one for each draw."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST, help="Seed; the same seed gives the same predictions.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it exists.")] = False,
    allow_fetch: AllowFetch = False,
    allow_code: AllowCode = False,
) -> None:
    """Draw new values of what was observed from the posterior predictive distribution."""
    from probmodels.inference.runtime.ops import write_atomically

    if out.exists() and not overwrite:
        raise Refusal(f"{out} exists already; choose another file with --out, or pass --overwrite")
    import_code(folder, allow_code)
    result = load(folder)
    problem = problem_of(result, folder, allow_fetch)
    make_folder(out)
    predicted = result.predict(problem, num_samples=num_samples, seed=seed)
    kept = {key: result.tree.attrs[key] for key in ("method", "engine", "spec", "versions") if key in result.tree.attrs}
    predicted.attrs.update(title="posterior predictive draws", source=str(folder), prediction_seed=seed, **kept)
    try:
        write_atomically(out, lambda file: predicted.to_netcdf(file, engine="netcdf4"))
    except OSError as error:
        raise Refusal(f"cannot write {out}: {error.strerror or error}; choose another file with --out") from error
    sizes = ", ".join(f"{dim} {size}" for dim, size in predicted.sizes.items())
    typer.echo(f"{', '.join(map(str, predicted.data_vars))} ({sizes}) written to {out}")
