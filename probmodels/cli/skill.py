"""``probmodels skill``: how good past forecasts of a model would have been."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from probmodels.cli.common import Refusal, check_free, load, make_folder
from probmodels.cli.options import LARGEST, PATH, Folder, Quiet

__all__ = ["skill"]


def skill(
    folder: Folder,
    out: Annotated[Path, typer.Option("--out", "-o", help="CSV file to write.", **PATH)],
    steps: Annotated[int, typer.Option(min=1, max=120, help="Leads, in steps of the record.")] = 12,
    every: Annotated[int, typer.Option(min=1, max=120, help="Steps between origins.")] = 3,
    share: Annotated[float, typer.Option(help="Share of the record that is fitted; the rest is forecast.")] = 0.7,
    lags: Annotated[bool, typer.Option("--lags", help="As in forecast.")] = False,
    coupled: Annotated[bool, typer.Option("--coupled", help="As in forecast.")] = False,
    num_samples: Annotated[int, typer.Option(min=20, max=10_000, help="Draws of each of two chains of the fit.")] = 200,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST, help="Seed of the fit and of the forecasts.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it exists.")] = False,
    quiet: Quiet = False,
) -> None:
    """Score past forecasts of the field beside climatology, persistence, AR(1) and a linear inverse model."""
    if lags and coupled:
        raise Refusal("--coupled has the lags of --lags; give one of the two")
    check_free(overwrite, out)
    result = load(folder)
    make_folder(out)
    from probmodels.bayesian_svd.forecasts.rolling import forecast_skill, skill_sentence

    transition: Any = "coupled" if coupled else "lags" if lags else "ar1"
    options: dict[str, Any] = {"steps": steps, "every": every, "share": share, "num_samples": num_samples, "seed": seed}
    say = None if quiet else lambda text: typer.echo(text, err=True)
    found = forecast_skill(result, transition=transition, **options, progress=not quiet, say=say)
    found[["crps", "rmse", "coverage"]].to_dataframe().reset_index().to_csv(out, index=False, float_format="%.6g")
    table = found[["ratio", "ratio_lower", "ratio_upper"]].assign(
        crps=found["crps"].mean("lead"), rmse=found["rmse"].mean("lead"), coverage=found["coverage"].mean("lead")
    )
    typer.echo(table.to_dataframe().to_string(float_format=lambda x: f"{x:.3f}"))
    typer.echo(f"\n{skill_sentence(found)}\nBy lead: {out}")
