"""``probmodels sst`` and ``ranks``: the Bayesian SVD of a field of sea surface temperature."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from probmodels.cli import runs
from probmodels.cli.common import Refusal, counts, make_folder
from probmodels.cli.options import Changes, Device, Out, Overwrite, Quiet, Strict

__all__ = ["ranks", "sst"]


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
            help="ar1, matern32, matern52 (smooth in time) or iid: modes of the population, of which these times are a "
            "sample; frame: modes of these times. By default ar1, with --engine svi frame."
        ),
    ] = None,
    noise: Annotated[
        str | None,
        typer.Option(
            help="What no mode holds: white, or correlated, between near cells and neighbouring times, of a level of "
            "each cell (not with --series frame; default white)."
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
    target_ess: Annotated[
        float | None,
        typer.Option(
            help="Effective sample size at which chains stop, --draws at the latest (verdict: 400); for mcmc."
        ),
    ] = None,
    warmup: Annotated[int | None, typer.Option(help="Sweeps before the first draw (default 500); for mcmc.")] = None,
    thin: Annotated[int | None, typer.Option(help="Sweeps per draw kept (default 1); for mcmc.")] = None,
    chains: Annotated[int | None, typer.Option(help="Number of chains (default 4); for mcmc.")] = None,
    steps: Annotated[int | None, typer.Option(help="Gradient steps (default 800); for svi.")] = None,
    joint: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FILE[:VARIABLE]",
            help="A further field, whose modes are found together with those of FILE, e.g. slp=slp.nc:slp; repeatable.",
        ),
    ] = None,
    coupling: Annotated[
        str | None, typer.Option(help="What couples the fields: mca, of covariance (default), or cca, of correlation.")
    ] = None,
    lags: Annotated[
        int | None, typer.Option(help="Times in a window, for patterns that evolve over as many; 2 or more.")
    ] = None,
    members: Annotated[
        bool,
        typer.Option(
            "--members", help="The files, or the members that one file holds, are an ensemble: they share patterns."
        ),
    ] = False,
    rotation: Annotated[
        str | None, typer.Option(help="varimax or promax: modes rotated to simple patterns, beside the others.")
    ] = None,
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
    files = files or []
    if files[:1] == ["fetch"]:
        _fetch(files[1:], quiet=quiet)
        return
    filling = files[:1] == ["fill"]
    if filling:
        files, noise = _to_fill(files[1:], engine, series, noise, joint or lags or members)
    series, noise = _process(engine, series, noise, kernel_time)
    data = {
        **_read_from(files, variable, joint or [], lags, members),
        "region": region,
        "period": period,
        "season": season,
        "base_period": base_period,
        "ice": ice,
        "fill": fill or None,
        "min_valid": min_valid,
        **_anomalies(anomalies, daily, filling),
    }
    model = {
        "rank": _or(rank, 20 if filling else 4),
        "fixed_effects": _effects(fixed_effects),
        "kernel_space": kernel,
        "series": series,
        "noise": noise,
        **_of_frame(series, kernel_time),
        "tail": tail,
        "hold_out": 0.05 if filling else None,
    }
    spec = {
        "method": "bayesian_svd",
        "data": _given(data),
        "model": _given(model),
        "inference": {
            "engine": engine,
            "seed": seed,
            **_sampling(engine, draws, target_ess, warmup, thin, chains, steps),
        },
        "output": _given({"path": str(out), "overwrite": overwrite, "rotation": rotation, "coupling": coupling}),
    }
    _change(spec, changes or [])
    runs.execute(spec, device=device, strict=strict, quiet=quiet)


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if value is not None}


def _or(value: int | None, default: int) -> int:
    return default if value is None else value


def _path_of(files: list[str] | None) -> str | list[str] | None:
    """What the loader takes: one file or pattern as it is, none for the embedded field."""
    return files[0] if files and len(files) == 1 else files or None


def _read_from(
    files: list[str], variable: str | None, joint: list[str], lags: int | None, members: bool
) -> dict[str, Any]:
    """Name and files of the data set: one field, or what the data set ``joint`` makes of files."""
    if not joint and lags is None and not members:
        return {"name": "sst", "path": _path_of(files), "variable": variable}
    if not files:
        raise Refusal("--joint, --lags and --members take the files of a field; the embedded one stands alone")
    own = {"path": _path_of(files)} | ({} if variable is None else {"variable": variable})
    fields: dict[str, Any] = {"sst": own}
    for text in joint:
        found = re.fullmatch(r"([A-Za-z]\w*)=(.+?)(?::([A-Za-z_]\w*))?", text)
        if found is None or found[1] in fields:
            raise Refusal(f"--joint {text} must be NAME=FILE or NAME=FILE:VARIABLE, each name once, and not sst")
        fields[found[1]] = {"path": found[2]} | ({} if found[3] is None else {"variable": found[3]})
    return {"name": "joint", "fields": fields, "lags": lags, "members": members or None}


def _change(spec: dict[str, Any], changes: list[str]) -> None:
    from probmodels.spec import change_spec

    for change in changes:
        change_spec(spec, change)


def _anomalies(anomalies: bool, daily: bool, filling: bool) -> dict[str, bool]:
    """What is made of the values of the files, where it is not the default; a filled field is written with its
    climatology too."""
    found = {"daily": True} if daily else {}
    if not anomalies:
        return found | {"anomalies": False}
    return found | ({"keep_climatology": True} if filling and not daily else {})


def _of_frame(series: str, kernel_time: str | None) -> dict[str, str]:
    return {"kernel_time": kernel_time or "identity"} if series == "frame" else {}


def _effects(text: str) -> list[str]:
    return [term for term in text.replace(" ", "").split(",") if term]


def _to_fill(
    files: list[str], engine: str, series: str | None, noise: str | None, several: object
) -> tuple[list[str], str]:
    """Files and noise of ``sst fill``, which can fill gaps with one kind of model only."""
    if several:
        raise Refusal("'sst fill' is of one field; leave --joint, --lags and --members out")
    if not files:
        raise Refusal("'sst fill' takes the files of a field with gaps; the embedded field has none")
    if engine != "mcmc" or series == "frame" or noise not in (None, "correlated"):
        raise Refusal(
            "'sst fill' needs --engine mcmc, series that are a process and --noise correlated; leave them out"
        )
    return files, "correlated"


def _sampling(
    engine: str,
    draws: int | None,
    target_ess: float | None,
    warmup: int | None,
    thin: int | None,
    chains: int | None,
    steps: int | None,
) -> dict[str, Any]:
    """Options of the engine; those of the other engine are refused."""
    of_mcmc = {"--draws": draws, "--target-ess": target_ess, "--warmup": warmup, "--thin": thin, "--chains": chains}
    for option, value in {"--steps": steps}.items() if engine == "mcmc" else of_mcmc.items():
        if value is not None:
            raise Refusal(f"{option} {value} is not used with --engine {engine}; leave it out")
    if engine != "mcmc":
        return {"num_steps": _or(steps, 800), "lr": 0.01, "lr_decay": 0.05}
    return {
        "num_samples": _or(draws, 1000),
        "warmup_steps": _or(warmup, 500),
        "thin": _or(thin, 1),
        "num_chains": _or(chains, 4),
        **_given({"target_ess": target_ess}),
    }


def _process(engine: str, series: str | None, noise: str | None, kernel_time: str | None) -> tuple[str, str]:
    """What the series and the noise are, by default or as asked, where they go together."""
    if series is None:
        series = "ar1" if engine == "mcmc" else "frame"
    if series != "frame" and engine == "svi":
        raise Refusal(f"--series {series} needs --engine mcmc; take --series frame, or leave --engine out")
    if series != "frame" and kernel_time is not None:
        raise Refusal(f"--kernel-time {kernel_time} is not used with --series {series}; take --series frame too")
    if noise == "correlated" and series == "frame":
        given = "--engine svi" if engine == "svi" else "--series frame"
        raise Refusal(f"--noise correlated needs series that are a process: leave {given} out, or take --noise white")
    return series, "white" if noise is None else noise


def _fetch(names: list[str], *, quiet: bool) -> None:
    from probmodels.datasets.fetch import SOURCES, fetch

    if len(names) != 1:
        raise Refusal(f"'sst fetch' takes one name: {', '.join(SOURCES)}")
    typer.echo(f"{fetch(names[0], progress=not quiet)}")


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
    repeats: Annotated[int, typer.Option(help="How often blocks are hidden, other ones each time.")] = 3,
    noise: Annotated[
        str,
        typer.Option(
            help="What no mode holds, as in sst: white, or correlated, between near cells and neighbouring times, of a "
            "level of each cell. Take the one that the run will have."
        ),
    ] = "correlated",
    seed: Annotated[int, typer.Option(help="Seed of the places of the blocks.")] = 0,
    out: Out = Path("runs/ranks"),
    quiet: Quiet = False,
) -> None:
    """Compare numbers of modes: hide blocks of a field and see which fills them best (no sampling)."""
    from probmodels.bayesian_svd.gaps.rank_outputs import write_ranks
    from probmodels.bayesian_svd.gaps.ranks import compare_ranks
    from probmodels.datasets.sst import load_sst

    data: Any = load_sst(
        _path_of(files),
        region=region,
        period=period,
        season=season,
        base_period=base_period,
    )
    options: dict[str, Any] = {"noise": noise, "share": share, "repeats": repeats, "seed": seed}
    options["fixed_effects"] = _effects(fixed_effects)
    if block is not None:
        options["block"] = counts("block", block)
    make_folder(out / "ranks.csv")
    found = compare_ranks(data, counts("rank", rank), **options, progress=not quiet)
    run = f"Run with it: probmodels sst ... --rank {found.attrs['chosen']} --noise {noise}"
    typer.echo(f"{write_ranks(found, out)}\n\n{found.attrs['sentence']}\n{run}\n\nFigure: {out / 'ranks.png'}")
