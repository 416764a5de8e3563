"""The command line: ``probmodels sst``, ``run``, ``list``, ``show``, ``diagnose``, ``report``, ``compare`` and
``predict``.

Heavy imports happen inside the commands, so that ``--help`` answers at once.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from probmodels._version import __version__
from probmodels.errors import ProbmodelsError

if TYPE_CHECKING:
    from probmodels.inference.problem import Problem
    from probmodels.inference.result import Result

__all__ = ["app", "main"]

app = typer.Typer(
    name="probmodels",
    help="Probabilistic models on Pyro: fit, diagnose, and look at the results.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_RESULT = "result.nc"
_CHECKPOINT = "checkpoint"

Out = Annotated[Path, typer.Option("--out", help="Folder for everything that is written.")]
Strict = Annotated[bool, typer.Option("--strict", help="Exit with status 1 where diagnostics fail.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a result that lies in the folder.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bar.")]
Folder = Annotated[Path, typer.Argument(help="Folder of a result.")]


@app.command()
def sst(
    files: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[FILE]... | fetch NAME",
            help="NetCDF files or a pattern; none for the embedded field of Pacific winters; 'fetch' and one of "
            "ersstv5, hadisst, oisst, cobe2 downloads that data set.",
        ),
    ] = None,
    region: Annotated[str | None, typer.Option(help="Name such as north_pacific, or lat0,lat1,lon0,lon1.")] = None,
    period: Annotated[str | None, typer.Option(help="First and last time, e.g. 1950:2019 or 1950-01:2019-04.")] = None,
    season: Annotated[str | None, typer.Option(help="Months to average, e.g. DJF or NDJFM.")] = None,
    base_period: Annotated[
        str | None, typer.Option(help="Period whose climatology is removed, e.g. 1981:2010.")
    ] = None,
    variable: Annotated[str | None, typer.Option(help="Variable of the file, where there are several.")] = None,
    ice: Annotated[
        float | None, typer.Option(help="Temperature at or below which a value is sea ice, e.g. -1.79.")
    ] = None,
    rank: Annotated[int, typer.Option(help="Number of modes.")] = 4,
    fixed_effects: Annotated[
        str, typer.Option(help="Terms of each location: intercept, trend, annual, semiannual.")
    ] = "intercept,trend",
    kernel: Annotated[str, typer.Option(help="Kernel of the patterns.")] = "matern72",
    kernel_time: Annotated[str, typer.Option(help="Kernel of the series.")] = "identity",
    tail: Annotated[float, typer.Option(help="Share of the kernel's variance that a truncated basis may drop.")] = 1e-6,
    draws: Annotated[int, typer.Option(help="Draws kept per chain.")] = 1000,
    warmup: Annotated[int, typer.Option(help="Sweeps before the first draw.")] = 500,
    thin: Annotated[int, typer.Option(help="Sweeps per draw kept.")] = 1,
    chains: Annotated[int, typer.Option(help="Number of chains.")] = 4,
    steps: Annotated[int, typer.Option(help="Steps of SVI.")] = 800,
    seed: Annotated[int, typer.Option(help="Seed; the same seed gives the same draws.")] = 0,
    engine: Annotated[str, typer.Option(help="mcmc (exact) or svi (approximate).")] = "mcmc",
    out: Out = Path("runs/sst"),
    strict: Strict = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Bayesian SVD (EOF analysis with uncertainty) of sea surface temperature."""
    if files and files[0] == "fetch":
        _fetch(files[1:], quiet=quiet)
        return
    data = {
        "name": "sst",
        "path": None if not files else files[0] if len(files) == 1 else files,
        "region": region,
        "period": period,
        "season": season,
        "base_period": base_period,
        "variable": variable,
        "ice": ice,
    }
    effects = [term for term in fixed_effects.replace(" ", "").split(",") if term]
    sampling = {"num_samples": draws, "warmup_steps": warmup, "thin": thin, "num_chains": chains}
    fitting = {"num_steps": steps, "lr": 0.01, "lr_decay": 0.05}
    spec = {
        "method": "bayesian_svd",
        "data": {key: value for key, value in data.items() if value is not None},
        "model": {
            "rank": rank,
            "fixed_effects": effects,
            "kernel_space": kernel,
            "kernel_time": kernel_time,
            "tail": tail,
        },
        "inference": {"engine": engine, "seed": seed, **(sampling if engine == "mcmc" else fitting)},
        "output": {"path": str(out), "overwrite": overwrite},
    }
    _execute(spec, strict=strict, quiet=quiet)


@app.command()
def run(
    spec: Annotated[Path, typer.Argument(help="TOML spec, or a result.nc whose spec is run again.")],
    out: Annotated[Path | None, typer.Option("--out", help="Folder, instead of the spec's own.")] = None,
    strict: Strict = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Run a spec."""
    from probmodels.spec import load_spec, spec_of_result

    loaded = spec_of_result(spec) if spec.suffix == ".nc" else load_spec(spec)
    if out is not None:
        loaded["output"]["path"] = str(out)
    if overwrite:
        loaded["output"]["overwrite"] = True
    loaded["output"].setdefault("path", f"runs/{spec.stem}")
    _execute(loaded, strict=strict, quiet=quiet)


@app.command("list")
def list_methods() -> None:
    """List the methods."""
    from probmodels.methods import METHODS, get_method

    for name in METHODS:
        module = get_method(name)
        typer.echo(f"{name:24s}{(module.__doc__ or '').strip().splitlines()[0]}")
        typer.echo(f"{'':24s}{module.REFERENCE}")


@app.command()
def show(folder: Folder) -> None:
    """Show what a result holds and its summary."""
    result = _load(folder)
    for key in ("method", "engine", "seed", "created", "sampling_seconds", "spec"):
        if key in result.tree.attrs:
            typer.echo(f"{key:18s}{result.tree.attrs[key]}")
    for name, group in result.tree.children.items():
        sizes = ", ".join(f"{dim} {size}" for dim, size in group.sizes.items())
        typer.echo(f"{name:18s}{', '.join(map(str, group.data_vars))} ({sizes})")
    table = (folder if folder.is_dir() else folder.parent) / "summary.txt"
    if table.exists():
        typer.echo("\n" + table.read_text(encoding="utf-8").rstrip())


@app.command()
def diagnose(folder: Folder, strict: Strict = False) -> None:
    """Judge whether the draws of a result can be trusted, and say what to do."""
    report = _load(folder).diagnose()
    typer.echo(str(report))
    _exit(report.ok, strict)


@app.command()
def report(
    folder: Folder, out: Annotated[Path | None, typer.Option("--out", help="Folder to write to.")] = None
) -> None:
    """Write maps, figures and the HTML report of a result again."""
    result = _load(folder)
    _write(result, out or (folder if folder.is_dir() else folder.parent))


@app.command()
def compare(
    folders: Annotated[list[Path], typer.Argument(metavar="RESULT RESULT...", help="Folders of results.")],
    method: Annotated[str, typer.Option(help="Weights by stacking or pseudo_bma.")] = "stacking",
    unit: Annotated[
        str | None,
        typer.Option(help="Dim whose entries are left out as a whole, e.g. time; none: single values."),
    ] = None,
    num_samples: Annotated[int, typer.Option(help="Draws of each result that are used.")] = 1000,
    figure: Annotated[Path | None, typer.Option("--figure", help="Image to draw the ranking to.")] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with status 1 where figures cannot be trusted.")
    ] = False,
) -> None:
    """Rank models of the same data by how well they predict observations left out (PSIS-LOO)."""
    from probmodels.inference.diagnostics.comparison import METHODS, compare as rank_models, loo

    if len(folders) < 2:
        raise _Refusal("compare takes two results or more")
    if method not in METHODS:
        raise _Refusal(f"--method {method} is unknown; choose {' or '.join(METHODS)}")
    if figure is not None:
        if figure.suffix not in (".png", ".pdf", ".svg"):
            raise _Refusal(f"--figure {figure} must end in .png, .pdf or .svg")
        _make_folder(figure)
    judged = {}
    for folder, name in zip(folders, _names(folders), strict=True):
        result = _load(folder)
        problem = None if "log_likelihood" in result.tree.children else _problem(folder)
        judged[name] = loo(result, problem, unit=unit, num_samples=num_samples)
    found = rank_models(judged, method=method)
    typer.echo(str(found))
    if figure is not None:
        from probmodels import plots

        plots.ranking(found.table).savefig(figure, dpi=150)
        typer.echo(f"\nFigure: {figure}")
    _exit(found.ok, strict)


@app.command()
def predict(
    folder: Folder,
    out: Annotated[Path, typer.Option("--out", "-o", help="NetCDF file to write.")],
    num_samples: Annotated[
        int | None, typer.Option(help="Predictions over all chains; as many as there are draws if not given.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed; the same seed gives the same predictions.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it exists.")] = False,
) -> None:
    """Draw new values of what was observed from the posterior predictive distribution."""
    from probmodels.inference.runtime.ops import write_atomically

    if out.exists() and not overwrite:
        raise _Refusal(f"{out} exists already; choose another file with --out, or pass --overwrite")
    _make_folder(out)
    result = _load(folder)
    predicted = result.predict(_problem(folder), num_samples=num_samples, seed=seed)
    kept = {key: result.tree.attrs[key] for key in ("method", "engine", "spec", "versions") if key in result.tree.attrs}
    predicted.attrs.update(title="posterior predictive draws", source=str(folder), prediction_seed=seed, **kept)
    try:
        write_atomically(out, lambda file: predicted.to_netcdf(file, engine="netcdf4"))
    except OSError as error:
        raise _Refusal(f"cannot write {out}: {error.strerror or error}; choose another file with --out") from error
    sizes = ", ".join(f"{dim} {size}" for dim, size in predicted.sizes.items())
    typer.echo(f"{', '.join(map(str, predicted.data_vars))} ({sizes}) written to {out}")


def _execute(spec: dict[str, Any], *, strict: bool, quiet: bool) -> None:
    """Check, load, sample with checkpoints, save, write outputs."""
    from probmodels.spec import build_problem, load_spec, run_engine

    spec = load_spec(spec)
    folder = Path(spec["output"]["path"])
    overwrite = bool(spec["output"].get("overwrite", False))
    if (folder / _RESULT).exists() and not overwrite:
        raise _Refusal(f"{folder} holds a result already; choose another folder with --out, or pass --overwrite")
    problem = build_problem(spec)
    _say_mends(problem)
    checkpoint = folder / _CHECKPOINT
    if checkpoint.exists():
        typer.echo(f"Continuing from {checkpoint}.")
    try:
        result = run_engine(spec, problem, checkpoint=str(checkpoint), progress=not quiet)
    except KeyboardInterrupt as error:
        typer.echo(f"\nInterrupted: {error}" if str(error) else "\nInterrupted.", err=True)
        raise typer.Exit(130) from error
    result.save(folder, overwrite=overwrite)
    shutil.rmtree(checkpoint, ignore_errors=True)
    _exit(_write(result, folder), strict)


def _write(result: Result, folder: Path) -> bool:
    """Outputs of the method, where it has any; whether the diagnostics passed."""
    from probmodels.methods import get_method

    method = get_method(result.tree.attrs["method"])
    if not hasattr(method, "write_outputs"):
        diagnosis = result.diagnose()
        typer.echo(str(diagnosis))
        return diagnosis.ok
    written = method.write_outputs(result, folder)
    typer.echo(f"\n{written.table}\n\n{written.diagnosis}\n\nReport: {written.report}")
    return bool(written.diagnosis.ok)


def _say_mends(problem: Any) -> None:
    mends = json.loads(problem.data.attrs.get("mends", "[]")) if problem.data is not None else []
    for sentence in mends:
        typer.echo(f"Note: {sentence}")


def _fetch(names: list[str], *, quiet: bool) -> None:
    from probmodels.datasets.fetch import SOURCES, fetch

    if len(names) != 1:
        raise _Refusal(f"'sst fetch' takes one name: {', '.join(SOURCES)}")
    typer.echo(f"{fetch(names[0], progress=not quiet)}")


def _problem(folder: Path) -> Problem:
    """The problem of a result, built again from the spec in its file."""
    from probmodels.spec import build_problem, spec_of_result

    return build_problem(spec_of_result(folder / _RESULT if folder.is_dir() else folder))


def _names(folders: list[Path]) -> list[str]:
    """Short names of results that tell them apart: of their folders, or else whole paths."""
    folders = [folder if folder.name != _RESULT else folder.parent for folder in folders]
    if len(set(folders)) < len(folders):
        raise _Refusal("the same result is given twice")
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def _make_folder(file: Path) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _Refusal(f"cannot make the folder of {file}: {error.strerror or error}") from error


def _load(folder: Path) -> Result:
    from probmodels.inference.result import Result

    return Result.load(folder)


def _exit(ok: bool, strict: bool) -> None:
    if strict and not ok:
        raise typer.Exit(1)


class _Refusal(ProbmodelsError, ValueError):
    """A request that the command line itself refuses."""


def main() -> None:
    """Run the command line; the project's own errors, which a user can mend, are one line and exit status 2."""
    try:
        app(standalone_mode=True)
    except ProbmodelsError as error:
        print(f"{type(error).__name__.lstrip('_')}: {error}", file=sys.stderr)
        sys.exit(2)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit()


if __name__ == "__main__":
    main()
