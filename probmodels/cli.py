"""The command line: ``probmodels sst``, ``ranks``, ``run``, ``list``, ``schema``, ``show``, ``diagnose``, ``report``,
``compare``, ``predict``, ``indices``, ``forecast`` and ``project``.

Heavy imports happen inside the commands, so that ``--help`` answers at once.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypedDict

import typer

from probmodels._version import __version__
from probmodels.errors import ProbmodelsError, ResultError

if TYPE_CHECKING:
    from probmodels.inference.problem import Problem
    from probmodels.inference.result import Result

__all__ = ["app", "main"]

app = typer.Typer(
    name="probmodels",
    help="Probabilistic models on Pyro: fit, diagnose, and look at the results.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

_RESULT = "result.nc"
_CHECKPOINT = "checkpoint"
_INTERRUPTED = 130  # exit status
_AGAIN = "the same command again goes on from what is kept, or starts anew"
_IMAGES = (".png", ".pdf", ".svg")
_MOST = 10_000_000  # draws
_LARGEST = 2**63 - 1  # seed


def _path(text: str | Path) -> Path:
    """A path; an empty text, as of a variable that a script has not set, would be the folder one stands in."""
    if not str(text):
        raise typer.BadParameter("an empty text is no path; write . for the current folder")
    return Path(text)


class _AsPath(TypedDict):
    parser: Callable[[str], Path]
    metavar: str


_PATH = _AsPath(parser=_path, metavar="PATH")
Out = Annotated[Path, typer.Option("--out", help="Folder for everything that is written.", **_PATH)]
Strict = Annotated[bool, typer.Option("--strict", help="Exit with status 1 if diagnostics fail.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a result that is in the folder.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Do not say what is being done, and show no progress bar.")]
Folder = Annotated[Path, typer.Argument(help="Folder of a result.", parser=_path)]
Device = Annotated[str | None, typer.Option(help="Where to compute: cpu, cuda or cuda:1; default: where the data are.")]
Changes = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Value that replaces the spec's, e.g. model.rank=6; repeatable."),
]
AllowFetch = Annotated[
    bool, typer.Option("--allow-fetch", help="Let the spec in a result file read data from other machines.")
]
AllowCode = Annotated[
    bool,
    typer.Option("--allow-code", help="Import the method and the loader of other packages that a result file names."),
]


def _method_names(incomplete: str) -> list[str]:
    from probmodels.methods import names_of_methods

    return [name for name in names_of_methods() if name.startswith(incomplete)]


@app.command()
def sst(
    files: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[FILE]... | fetch NAME | fill FILE...",
            help="NetCDF files or a pattern; none for the embedded field of Pacific winters; 'fetch' and one of "
            "ersstv5, hadisst, oisst, cobe2 downloads that data set; 'fill' and files fills the gaps of a field.",
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
    daily: Annotated[
        bool, typer.Option("--daily", help="Keep values more often than monthly as they are; else months are averaged.")
    ] = False,
    fill: Annotated[
        list[float] | None, typer.Option(help="Value of the file that means missing, e.g. 0; repeatable.")
    ] = None,
    min_valid: Annotated[
        float | None, typer.Option(help="Share of time steps that a cell must have to count as ocean (default 0.5).")
    ] = None,
    anomalies: Annotated[
        bool, typer.Option("--anomalies/--no-anomalies", help="Whether to remove the climatology.")
    ] = True,
    rank: Annotated[int | None, typer.Option(help="Number of modes (default 4, with 'fill' 20).")] = None,
    fixed_effects: Annotated[
        str, typer.Option(help="Terms of each location: intercept, trend, annual, semiannual.")
    ] = "intercept,trend",
    kernel: Annotated[str, typer.Option(help="Kernel of the patterns.")] = "matern72",
    series: Annotated[
        str | None,
        typer.Option(
            help="ar1 or iid: modes of the population, of which these times are a sample; frame: modes of these times. "
            "By default ar1, with --engine svi frame."
        ),
    ] = None,
    noise: Annotated[
        str | None,
        typer.Option(
            help="What no mode holds: white, or correlated, between near cells and neighbouring times, of a level of "
            "each cell (with --series ar1 or iid; default white)."
        ),
    ] = None,
    kernel_time: Annotated[
        str | None, typer.Option(help="Kernel of the series, with --series frame (default identity).")
    ] = None,
    tail: Annotated[
        float | None,
        typer.Option(help="Share of the kernel's variance that a truncated basis may drop; 0 keeps every direction."),
    ] = None,
    draws: Annotated[int | None, typer.Option(help="Draws kept per chain (default 1000); for mcmc.")] = None,
    warmup: Annotated[int | None, typer.Option(help="Sweeps before the first draw (default 500); for mcmc.")] = None,
    thin: Annotated[int | None, typer.Option(help="Sweeps per draw kept (default 1); for mcmc.")] = None,
    chains: Annotated[int | None, typer.Option(help="Number of chains (default 4); for mcmc.")] = None,
    steps: Annotated[int | None, typer.Option(help="Gradient steps (default 800); for svi.")] = None,
    seed: Annotated[int, typer.Option(help="Seed; the same seed gives the same draws.")] = 0,
    engine: Annotated[str, typer.Option(help="mcmc (exact) or svi (approximate).")] = "mcmc",
    changes: Changes = None,
    device: Device = None,
    out: Out = Path("runs/sst"),
    strict: Strict = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Bayesian SVD (EOF analysis with uncertainty) of sea surface temperature."""
    if files and files[0] == "fetch":
        _fetch(files[1:], quiet=quiet)
        return
    filling = files is not None and files[:1] == ["fill"]
    if filling:
        if not (files := (files or [])[1:]):
            raise _Refusal("'sst fill' takes the files of a field with gaps; the embedded field has none")
        if engine != "mcmc" or series not in (None, "ar1") or noise not in (None, "correlated"):
            raise _Refusal("'sst fill' needs --engine mcmc, --series ar1 and --noise correlated; leave them out")
        noise = "correlated"
    data = {
        "name": "sst",
        "path": None if not files else files[0] if len(files) == 1 else files,
        "region": region,
        "period": period,
        "season": season,
        "base_period": base_period,
        "variable": variable,
        "ice": ice,
        "daily": daily or None,
        "fill": fill or None,
        "min_valid": min_valid,
        "anomalies": None if anomalies else False,
    }
    effects = [term for term in fixed_effects.replace(" ", "").split(",") if term]
    sampling = {"--draws": draws, "--warmup": warmup, "--thin": thin, "--chains": chains}
    for option, value in {"--steps": steps}.items() if engine == "mcmc" else sampling.items():
        if value is not None:
            raise _Refusal(f"{option} {value} is not used with --engine {engine}; leave it out")
    own: dict[str, Any] = {"num_steps": _or(steps, 800), "lr": 0.01, "lr_decay": 0.05}
    if engine == "mcmc":
        own = {"num_samples": _or(draws, 1000), "warmup_steps": _or(warmup, 500), "thin": _or(thin, 1)}
        own["num_chains"] = _or(chains, 4)
    series, noise = _process(engine, series, noise, kernel_time)
    spec = {
        "method": "bayesian_svd",
        "data": {key: value for key, value in data.items() if value is not None},
        "model": {
            "rank": _or(rank, 20 if filling else 4),
            "fixed_effects": effects,
            "kernel_space": kernel,
            "series": series,
            "noise": noise,
            **({"kernel_time": kernel_time or "identity"} if series == "frame" else {}),
            **({} if tail is None else {"tail": tail}),
            **({"hold_out": 0.05} if filling else {}),
        },
        "inference": {"engine": engine, "seed": seed, **own},
        "output": {"path": str(out), "overwrite": overwrite},
    }
    if changes:
        from probmodels.spec import change_spec

        for change in changes:
            change_spec(spec, change)
    _execute(spec, device=device, strict=strict, quiet=quiet)


def _process(engine: str, series: str | None, noise: str | None, kernel_time: str | None) -> tuple[str, str]:
    """What the series and the noise are, by default or as asked, where they go together."""
    if series is None:
        series = "ar1" if engine == "mcmc" else "frame"
    if series != "frame" and engine == "svi":
        raise _Refusal(f"--series {series} needs --engine mcmc; take --series frame, or leave --engine out")
    if series != "frame" and kernel_time is not None:
        raise _Refusal(f"--kernel-time {kernel_time} is not used with --series {series}; take --series frame too")
    if noise == "correlated" and series == "frame":
        given = "--engine svi" if engine == "svi" else "--series frame"
        raise _Refusal(f"--noise correlated needs series that are a process: leave {given} out, or take --noise white")
    return series, "white" if noise is None else noise


@app.command()
def ranks(
    files: Annotated[
        list[str] | None,
        typer.Argument(metavar="[FILE]...", help="As in sst; none for the embedded field of Pacific winters."),
    ] = None,
    region: Annotated[str | None, typer.Option(help="As in sst.")] = None,
    period: Annotated[str | None, typer.Option(help="As in sst.")] = None,
    season: Annotated[str | None, typer.Option(help="As in sst.")] = None,
    base_period: Annotated[str | None, typer.Option(help="As in sst.")] = None,
    fixed_effects: Annotated[str, typer.Option(help="As in sst.")] = "intercept,trend",
    rank: Annotated[str, typer.Option(help="Numbers of modes to compare.")] = "1,2,3,4,5,6,8,10",
    block: Annotated[
        str | None, typer.Option(metavar="TIMES,LAT,LON", help="Times and cells of a hidden block; default 6,3,4.")
    ] = None,
    share: Annotated[float, typer.Option(help="Share of the values to hide.")] = 0.15,
    noise: Annotated[str, typer.Option(help="correlated or white.")] = "correlated",
    seed: Annotated[int, typer.Option(help="Seed of the places of the blocks.")] = 0,
    out: Out = Path("runs/ranks"),
    quiet: Quiet = False,
) -> None:
    """Compare numbers of modes: hide blocks of a field and see which fills them best (no sampling)."""
    from probmodels.bayesian_svd.gaps.rank_outputs import write_ranks
    from probmodels.bayesian_svd.gaps.ranks import compare_ranks
    from probmodels.datasets.sst import load_sst

    data: Any = load_sst(
        None if not files else files[0] if len(files) == 1 else files,
        region=region,
        period=period,
        season=season,
        base_period=base_period,
    )
    effects = [term for term in fixed_effects.replace(" ", "").split(",") if term]
    options: dict[str, Any] = {"noise": noise, "share": share, "seed": seed, "fixed_effects": effects}
    if block is not None:
        options["block"] = _counts("block", block)
    _make_folder(out / "ranks.csv")
    found = compare_ranks(data, _counts("rank", rank), **options, progress=not quiet)
    typer.echo(f"{write_ranks(found, out)}\n\n{found.attrs['sentence']}\n\nFigure: {out / 'ranks.png'}")


@app.command()
def run(
    spec: Annotated[Path, typer.Argument(help="TOML spec, or a result.nc whose spec is run again.", parser=_path)],
    changes: Changes = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder, instead of the spec's own; a result file does not choose it.", **_PATH),
    ] = None,
    device: Device = None,
    strict: Strict = False,
    overwrite: Overwrite = False,
    allow_fetch: AllowFetch = False,
    allow_code: AllowCode = False,
    quiet: Quiet = False,
) -> None:
    """Run a spec."""
    _say("reading the spec", quiet=quiet)
    from probmodels.spec import change_spec, read_spec, spec_of_result

    again = spec.suffix == ".nc" or spec.is_dir()
    if again:
        _import_code(spec, allow_code)
    found = spec_of_result(spec, allow_fetch=allow_fetch) if again else read_spec(spec)
    for change in changes or []:
        change_spec(found, change)
    if out is not None:
        found["output"]["path"] = str(out)
    if overwrite:
        found["output"]["overwrite"] = True
    folder = spec if spec.is_dir() else spec.parent
    found["output"].setdefault("path", f"{folder.resolve()}-again" if again else f"runs/{spec.stem}")
    same_data = again and not any(change.startswith(("method", "data", "model")) for change in changes or [])
    _execute(found, device=device, strict=strict, quiet=quiet, former=spec if same_data else None)


@app.command("list")
def list_known(what: Annotated[str, typer.Argument(help="methods or data.")] = "methods") -> None:
    """List the methods, or the data sets; those that other packages declare are among them."""
    from probmodels.datasets import list_loaders
    from probmodels.methods import list_methods

    if what == "methods":
        for method in list_methods():
            typer.echo(f"{method.name:24s}{method.summary}\n{'':24s}{method.reference}".rstrip())
    elif what == "data":
        for name, summary in list_loaders().items():
            typer.echo(f"{name:24s}{summary}".rstrip())
    else:
        raise _Refusal(f"there is no list of {what!r}; choose methods or data")


@app.command()
def schema(
    method: Annotated[str, typer.Argument(help="Name of a method.", autocompletion=_method_names)],
) -> None:
    """Print the JSON Schema of the specs of a method, with which editors check and complete TOML files."""
    from probmodels.schema import spec_schema

    typer.echo(json.dumps(spec_schema(method), indent=2, ensure_ascii=False))


@app.command()
def show(folder: Folder) -> None:
    """Show what a result holds and its summary."""
    from probmodels import report as reports

    typer.echo(reports.show(_load(folder)))


@app.command()
def diagnose(folder: Folder, strict: Strict = False, allow_code: AllowCode = False) -> None:
    """Judge whether the draws of a result can be trusted, and say what to do."""
    _import_code(folder, allow_code)
    report = _load(folder).diagnose()
    typer.echo(str(report))
    _exit(report.ok, strict)


@app.command()
def report(
    folder: Folder,
    out: Annotated[Path | None, typer.Option("--out", help="Folder to write to.", **_PATH)] = None,
    allow_code: AllowCode = False,
) -> None:
    """Write maps, figures and the HTML report of a result again."""
    _import_code(folder, allow_code)
    result = _load(folder)
    try:
        _write(result, out or (folder if folder.is_dir() else folder.parent))
    except KeyError as error:  # of a file that names a method that did not make it; after a run it would be our fault
        name, lacking = result.tree.attrs.get("method"), str(error).strip("\"'").partition(".")[0]
        raise ResultError(f"the result is none that {name} made, whose outputs need more: {lacking}") from error


@app.command()
def compare(
    folders: Annotated[
        list[Path], typer.Argument(metavar="RESULT RESULT...", help="Folders of results.", parser=_path)
    ],
    method: Annotated[str, typer.Option(help="Weights by stacking or pseudo_bma.")] = "stacking",
    unit: Annotated[
        str | None,
        typer.Option(
            help="Dim of the observations whose entries are left out as a whole, e.g. group; none: single values."
        ),
    ] = None,
    num_samples: Annotated[int, typer.Option(min=1, max=_MOST, help="Draws of each result that are used.")] = 1000,
    figure: Annotated[Path | None, typer.Option("--figure", help="Image to draw the ranking to.", **_PATH)] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with status 1 where figures cannot be trusted.")
    ] = False,
    allow_fetch: AllowFetch = False,
    allow_code: AllowCode = False,
) -> None:
    """Rank models of the same data by how well they predict observations left out (PSIS-LOO)."""
    from probmodels.inference.diagnostics.comparison import WEIGHTINGS, compare as rank_models, loo

    if len(folders) < 2:
        raise _Refusal("compare takes two results or more")
    if method not in WEIGHTINGS:
        raise _Refusal(f"--method {method} is unknown; choose {' or '.join(WEIGHTINGS)}")
    if figure is not None:
        if figure.suffix not in _IMAGES:
            raise _Refusal(f"--figure {figure} must end in .png, .pdf or .svg")
        _make_folder(figure)
    judged = {}
    for folder, name in zip(folders, _names(folders), strict=True):
        _import_code(folder, allow_code)
        result = _load(folder)
        problem = None if "log_likelihood" in result.tree.children else _problem(result, folder, allow_fetch)
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
    out: Annotated[Path, typer.Option("--out", "-o", help="NetCDF file to write.", **_PATH)],
    num_samples: Annotated[
        int | None,
        typer.Option(min=1, max=_MOST, help="Predictions over all chains; none: one for each draw."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=_LARGEST, help="Seed; the same seed gives the same predictions.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it exists.")] = False,
    allow_fetch: AllowFetch = False,
    allow_code: AllowCode = False,
) -> None:
    """Draw new values of what was observed from the posterior predictive distribution."""
    from probmodels.inference.runtime.ops import write_atomically

    if out.exists() and not overwrite:
        raise _Refusal(f"{out} exists already; choose another file with --out, or pass --overwrite")
    _import_code(folder, allow_code)
    result = _load(folder)
    problem = _problem(result, folder, allow_fetch)
    _make_folder(out)
    predicted = result.predict(problem, num_samples=num_samples, seed=seed)
    kept = {key: result.tree.attrs[key] for key in ("method", "engine", "spec", "versions") if key in result.tree.attrs}
    predicted.attrs.update(title="posterior predictive draws", source=str(folder), prediction_seed=seed, **kept)
    try:
        write_atomically(out, lambda file: predicted.to_netcdf(file, engine="netcdf4"))
    except OSError as error:
        raise _Refusal(f"cannot write {out}: {error.strerror or error}; choose another file with --out") from error
    sizes = ", ".join(f"{dim} {size}" for dim, size in predicted.sizes.items())
    typer.echo(f"{', '.join(map(str, predicted.data_vars))} ({sizes}) written to {out}")


@app.command()
def indices(
    folder: Folder,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write to.", **_PATH)],
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
    index: Annotated[list[str] | None, typer.Option(help="Index that is a mode: pdo or npgo; repeatable.")] = None,
    remove_mean: Annotated[
        bool, typer.Option("--remove-mean", help="Take the mean of the region out before the mode is found.")
    ] = False,
    base: Annotated[str | None, typer.Option(help="Period over which such an index has mean 0 and sd 1.")] = None,
    published: Annotated[
        Path | None, typer.Option("--published", help="CSV file of a published index to express in modes.", **_PATH)
    ] = None,
    fitted: Annotated[str | None, typer.Option(help="Period whose published values are used, e.g. 1950:1993.")] = None,
    series: Annotated[
        Path | None, typer.Option("--with", help="CSV file of a series to correlate all indices with.", **_PATH)
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
) -> None:
    """Write climate indices of a Bayesian SVD with their uncertainty, and their correlation with a series."""
    from probmodels.bayesian_svd.indices.outputs import indices_to_folder

    asked: dict[str, Any] = {"boxes": box, "modes": index or (), "missing": missing or ()}
    asked |= {"effects": effects, "min_covered": min_covered, "remove_mean": remove_mean, "base": base}
    asked |= {"published": published, "fitted": fitted, "series": series, "column": column}
    for sentence in indices_to_folder(_load(folder).tree, out, level=level, max_lag=max_lag, detrend=detrend, **asked):
        typer.echo(f"Note: {sentence}")
    typer.echo(f"Written to {out}: {', '.join(sorted(path.name for path in out.iterdir()))}")


def _counts(name: str, text: str) -> tuple[int, ...]:
    """Whole numbers that a text lists."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise _Refusal(f"--{name} {text} is no list of whole numbers; write e.g. 3,4,5") from error


@app.command()
def forecast(
    folder: Folder,
    out: Annotated[Path, typer.Option("--out", "-o", help="NetCDF file to write.", **_PATH)],
    steps: Annotated[int, typer.Option(min=1, max=10_000, help="Steps of the record, such as months.")] = 12,
    new: Annotated[
        str | None, typer.Option(help="File with months after the record, from the last of which it starts.")
    ] = None,
    box: Annotated[
        list[str] | None,
        typer.Option(help="Box whose mean is forecast: NAME=lat0,lat1,lon0,lon1 or a region; repeatable."),
    ] = None,
    lags: Annotated[
        bool, typer.Option("--lags", help="Autoregression on lags of up to 12 steps instead of the model's AR(1).")
    ] = False,
    table: Annotated[Path | None, typer.Option("--table", help="CSV file of series and boxes.", **_PATH)] = None,
    figure: Annotated[Path | None, typer.Option("--figure", help="Image of fan charts.", **_PATH)] = None,
    num_samples: Annotated[int, typer.Option(min=2, max=_MOST, help="Draws of the result that are used.")] = 1000,
    beyond: Annotated[bool, typer.Option("--beyond", help="Forecast further than the process tells.")] = False,
    seed: Annotated[int, typer.Option(min=0, max=_LARGEST, help="Seed; the same seed gives the same forecast.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")] = False,
) -> None:
    """Forecast series, field and box means beyond the record of a Bayesian SVD with --series ar1."""
    _check_free(overwrite, out, table, figure)
    if figure is not None and figure.suffix not in _IMAGES:
        raise _Refusal(f"--figure {figure} must end in .png, .pdf or .svg")
    result = _load(folder)
    from probmodels.bayesian_svd.forecasts.commands import forecast_result

    options: dict[str, Any] = {"new": new, "boxes": box or [], "lags": lags, "table": table, "figure": figure}
    options |= {"num_draws": num_samples, "beyond": beyond, "seed": seed, "source": str(folder)}
    typer.echo(forecast_result(result, out, steps, **options))


@app.command()
def project(
    folder: Folder,
    file: Annotated[
        str, typer.Argument(help="NetCDF file with the base period of the fit and months after its record.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="NetCDF file to write.", **_PATH)],
    level: Annotated[float, typer.Option(help="Probability of the intervals, between 0 and 1.")] = 0.95,
    num_samples: Annotated[int, typer.Option(min=2, max=_MOST, help="Draws of the result that are used.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, max=_LARGEST, help="Seed; the same seed gives the same draws.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it exists.")] = False,
) -> None:
    """Principal components of months after the record of a Bayesian SVD, its patterns as they are."""
    _check_free(overwrite, out)
    result = _load(folder)
    from probmodels.bayesian_svd.forecasts.commands import project_result

    typer.echo(project_result(result, file, out, level=level, num_draws=num_samples, seed=seed, source=str(folder)))


def _check_free(overwrite: bool, *files: Path | None) -> None:
    """Check that no file would be replaced unasked."""
    for file in files:
        if file is not None and (file.is_dir() or (file.exists() and not overwrite)):
            raise _Refusal(f"{file} exists already; choose another file, or pass --overwrite")


def _or(value: int | None, default: int) -> int:
    return default if value is None else value


def _execute(
    spec: dict[str, Any], *, device: str | None = None, strict: bool, quiet: bool, former: Path | None = None
) -> None:
    """Check, load, sample with checkpoints, save, write outputs; say where data differ from those of a former run."""
    _say("checking the spec", quiet=quiet)
    from probmodels.inference.result import check_target
    from probmodels.inference.runtime.checkpoint import check_room
    from probmodels.inference.runtime.tensors import find_device
    from probmodels.spec import build_problem, load_data, load_spec, run_engine

    spec = load_spec(spec)
    folder = Path(spec["output"]["path"])
    overwrite = spec["output"].get("overwrite", False)
    if _lacks_outputs(folder, spec):
        typer.echo(f"{folder} holds the result of this run, whose outputs are not complete: writing them.")
        shutil.rmtree(folder / _CHECKPOINT, ignore_errors=True)
        _exit(_write(_load(folder), folder), strict)
        return
    if (folder / _RESULT).exists() and not overwrite:
        raise _Refusal(f"{folder} holds a result already; choose another folder with --out, or pass --overwrite")
    check_target(folder, overwrite=overwrite)
    find_device("--device", device)
    find_device("inference.device", spec["inference"].get("device"))
    if isinstance(chosen := spec["inference"].get("checkpoint"), str):
        check_room(chosen, 0)
    _say(f"loading data: {spec['data'].get('name')}", quiet=quiet)
    data = load_data(spec)
    _say(f"building the problem: {spec['method']}", quiet=quiet)
    problem = build_problem(spec, data)
    problem = problem if device is None else problem.to(device)
    _say_mends(problem)
    if former is not None:
        _say_changes(former, problem)
    checkpoint = folder / _CHECKPOINT
    options: dict[str, Any] = {"checkpoint": str(checkpoint), **spec["inference"]}
    options |= {"progress": False} if quiet else {}
    options |= {"device": device} if device is not None and "device" in options else {}
    if checkpoint.exists():
        typer.echo(f"Continuing from {checkpoint}.")
    elif not quiet:
        _say_cost(problem, spec["inference"])
    _say(f"compiling, and running {spec['inference']['engine']}", quiet=quiet)
    try:
        result = run_engine(spec, problem, **options)
    except KeyboardInterrupt as error:
        raise _Interrupted(str(error) or f"nothing is kept yet in {options['checkpoint']}") from error
    _say(f"writing to {folder}", quiet=quiet)
    (folder / "report.html").unlink(missing_ok=True)  # of an earlier run: it is the sign that outputs are complete
    result.save(folder, overwrite=overwrite)
    shutil.rmtree(checkpoint, ignore_errors=True)
    _exit(_write(result, folder), strict)


def _lacks_outputs(folder: Path, spec: dict[str, Any]) -> bool:
    """Whether a folder holds the result of the same spec, and the run was killed before its last output, the page."""
    from probmodels.inference.labels import read_json

    if not (folder / _RESULT).exists() or (folder / "report.html").exists():
        return False
    try:
        written = read_json(_load(folder).tree.attrs, "spec", {})
    except ResultError:
        return False
    return _core(written) == _core(json.loads(json.dumps(spec, default=str)))


def _core(spec: dict[str, Any]) -> dict[str, Any]:
    """What decides the draws: a spec without its output and the folder of checkpoints."""
    inference = {key: value for key, value in spec.get("inference", {}).items() if key != "checkpoint"}
    return {key: value for key, value in spec.items() if key != "output"} | {"inference": inference}


def _write(result: Result, folder: Path) -> bool:
    """Tables, figures and a page on any result, with those of its method; whether draws and model passed."""
    from probmodels.report import write_report

    written = write_report(result, folder)
    typer.echo(f"\n{written.table}\n\n{written.diagnosis}\n\nReport: {written.report}")
    return bool(written.diagnosis.ok)


def _say_mends(problem: Any) -> None:
    mends = json.loads(problem.data.attrs.get("mends", "[]")) if problem.data is not None else []
    for sentence in mends:
        typer.echo(f"Note: {sentence}")


def _say_cost(problem: Problem, options: dict[str, Any]) -> None:
    """Say how long sampling will take, where its kernel can tell, and how much memory."""
    from probmodels.inference.mcmc.cost import foresee

    if options["engine"] != "mcmc" or options.get("kernel") is not None or options.get("chain_method") is not None:
        return
    names = ("num_chains", "num_samples", "warmup_steps", "thin", "num_workers")
    cost = foresee(problem, **{name: options[name] for name in names if options.get(name) is not None})
    if cost is not None:
        typer.echo(f"{cost}.", err=True)


def _say_changes(former: Path, problem: Problem) -> None:
    """Say that a run again is of other data than the run before; a file that holds no more than a spec says nothing."""
    try:
        changed = _changed(_load(former), problem)
    except ResultError:
        return
    if changed:
        typer.echo(
            f"Note: the data have changed since the run of {former}: {changed} differ; this run has the new ones"
        )


def _fetch(names: list[str], *, quiet: bool) -> None:
    from probmodels.datasets.fetch import SOURCES, fetch

    if len(names) != 1:
        raise _Refusal(f"'sst fetch' takes one name: {', '.join(SOURCES)}")
    typer.echo(f"{fetch(names[0], progress=not quiet)}")


def _import_code(folder: Path, allowed: bool) -> None:
    """Import the method and the loader that a result names by dotted paths, where the user allows it."""
    if not allowed:
        return
    from probmodels.datasets import get_loader
    from probmodels.inference.labels import read_json
    from probmodels.methods import get_method

    spec = read_json(_load(folder).tree.attrs, "spec", {})
    method, data = spec.get("method"), spec.get("data")
    if isinstance(method, str) and "." in method:
        get_method(method)
    if isinstance(data, dict) and isinstance(name := data.get("name"), str) and ":" in name:
        get_loader(name)


def _problem(result: Result, folder: Path, allow_fetch: bool) -> Problem:
    """The problem of a result: from the spec in its file, or else from the data and options that it keeps."""
    from probmodels.inference.labels import read_json
    from probmodels.spec import build_problem, spec_of_result

    if "data" not in read_json(result.tree.attrs, "spec", {}):
        return result.rebuild()
    problem = build_problem(spec_of_result(folder, allow_fetch=allow_fetch))
    if changed := _changed(result, problem):
        raise ResultError(
            f"{folder}: the data that its spec names have changed since the run: {changed} differ; put the former data "
            "back, or run it again with the new ones"
        )
    return problem


def _changed(result: Result, problem: Problem) -> str:
    """Names of the data of a problem that differ from those of a result."""
    from probmodels.inference.result import changed_data

    names = changed_data(result.tree, problem)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _say(doing: str, *, quiet: bool) -> None:
    """Say what is being done, before the imports that it needs."""
    if not quiet:
        typer.echo(f"{doing} ...", err=True)


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


_UsageError: Any = typer.BadParameter.__base__  # of typer, or of click, which some versions of typer take it from


class _Refusal(ProbmodelsError, ValueError):
    """A request that the command line itself refuses."""


class _Interrupted(ProbmodelsError):
    """A run that was interrupted: what is kept of it."""


def main() -> None:
    """Run the command line; what a user can mend is one line and exit status 2."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", "30")  # seconds between lines of progress in a log file
    try:
        status = app(standalone_mode=False)
    except _UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # which has shown the help
            sys.exit(2)
        _fail("Usage", error.format_message())
    except _Interrupted as error:
        _fail("Interrupted", f"{error}; {_AGAIN}", _INTERRUPTED)
    except ProbmodelsError as error:
        _fail(type(error).__name__.lstrip("_"), str(error))
    except (KeyboardInterrupt, typer.Abort):
        status = _INTERRUPTED
    except MemoryError:
        _fail("MemoryError", "not enough memory for this; take fewer data, draws or a smaller model")
    except OSError as error:
        _fail("Error", str(error))
    if status == _INTERRUPTED:  # which typer makes of an interrupt
        _fail("Interrupted", _AGAIN, _INTERRUPTED)
    sys.exit(status if isinstance(status, int) else 0)


def _fail(kind: str, message: str, status: int = 2) -> NoReturn:
    print(f"{kind}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


if __name__ == "__main__":
    main()
