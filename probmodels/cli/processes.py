"""``probmodels processes``: which process the series of a field follow."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from probmodels.cli.common import Refusal, make_folder
from probmodels.cli.options import Out, Quiet

__all__ = ["processes"]


def processes(
    files: Annotated[
        list[str] | None,
        typer.Argument(metavar="[FILE]...", help="As in sst; none for the embedded field of Pacific winters."),
    ] = None,
    region: Annotated[str | None, typer.Option(help="As in sst.")] = None,
    period: Annotated[str | None, typer.Option(help="As in sst.")] = None,
    season: Annotated[str | None, typer.Option(help="As in sst.")] = None,
    base_period: Annotated[str | None, typer.Option(help="As in sst.")] = None,
    fixed_effects: Annotated[str, typer.Option(help="As in sst.")] = "intercept,trend",
    series: Annotated[str, typer.Option(help="Processes to compare.")] = "iid,ar1,matern32,matern52",
    rank: Annotated[int, typer.Option(help="Number of modes.")] = 5,
    block: Annotated[
        int | None, typer.Option(help="Times of a hidden block; default 6, or a tenth of them where that is less.")
    ] = None,
    folds: Annotated[int, typer.Option(help="In how many rounds the blocks are hidden, each block once.")] = 5,
    noise: Annotated[str, typer.Option(help="As in ranks.")] = "correlated",
    seed: Annotated[int, typer.Option(help="Seed of which blocks are hidden together.")] = 0,
    out: Out = Path("runs/processes"),
    quiet: Quiet = False,
) -> None:
    """Compare processes of the series: hide blocks of times and see which fills them best (no sampling)."""
    from probmodels.bayesian_svd.gaps.processes import compare_processes, write_processes
    from probmodels.datasets.sst import load_sst

    path: Any = files[0] if files and len(files) == 1 else files or None
    data: Any = load_sst(path, region=region, period=period, season=season, base_period=base_period)
    options: dict[str, Any] = {"rank": rank, "block": block, "folds": folds, "noise": noise, "seed": seed}
    options["fixed_effects"], names = (
        [word for word in text.replace(" ", "").split(",") if word] for text in (fixed_effects, series)
    )
    if len(names) < 2:
        raise Refusal(f"--series {series}: give two or more of iid, ar1, matern32, matern52")
    make_folder(out / "processes.csv")
    found = compare_processes(data, names, **options, progress=not quiet)
    run = f"Run with it: probmodels sst ... --series {found.attrs['best']} --noise {noise}"
    typer.echo(f"{write_processes(found, out)}\n\n{found.attrs['sentence']}\n{run}")
