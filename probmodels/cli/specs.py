"""``probmodels run``, ``list`` and ``schema``: runs by a spec, and what a spec can name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from probmodels.cli import runs
from probmodels.cli.common import Refusal, import_code, say
from probmodels.cli.options import PATH, AllowCode, AllowFetch, Changes, Device, Overwrite, Quiet, Strict, path

__all__ = ["list_known", "run", "schema"]


def run(
    spec: Annotated[Path, typer.Argument(help="TOML spec, or a result.nc whose spec is run again.", parser=path)],
    changes: Changes = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder, instead of the spec's own; a result file does not choose it.", **PATH),
    ] = None,
    device: Device = None,
    strict: Strict = False,
    overwrite: Overwrite = False,
    allow_fetch: AllowFetch = False,
    allow_code: AllowCode = False,
    quiet: Quiet = False,
) -> None:
    """Run a spec."""
    say("reading the spec", quiet=quiet)
    from probmodels.spec import change_spec, read_spec, spec_of_result

    again = spec.suffix == ".nc" or spec.is_dir()
    if again:
        import_code(spec, allow_code)
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
    runs.execute(found, device=device, strict=strict, quiet=quiet, former=spec if same_data else None)


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
        raise Refusal(f"there is no list of {what!r}; choose methods or data")


def _method_names(incomplete: str) -> list[str]:
    from probmodels.methods import names_of_methods

    return [name for name in names_of_methods() if name.startswith(incomplete)]


def schema(
    method: Annotated[str, typer.Argument(help="Name of a method.", autocompletion=_method_names)],
) -> None:
    """Print the JSON Schema of the specs of a method, with which editors check and complete TOML files."""
    from probmodels.schema import spec_schema

    typer.echo(json.dumps(spec_schema(method), indent=2, ensure_ascii=False))
