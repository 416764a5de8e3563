"""The commands, in the order of the help, and the entry point."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Annotated, Any, NoReturn

import typer

from probmodels._version import __version__
from probmodels.cli.common import INTERRUPTED, Interrupted
from probmodels.cli.modes import forecast, indices, panels, project
from probmodels.cli.processes import processes
from probmodels.cli.results import compare, diagnose, predict, report, show
from probmodels.cli.skill import skill
from probmodels.cli.specs import list_known, run, schema
from probmodels.cli.sst import ranks, sst
from probmodels.errors import ProbmodelsError

__all__ = ["app", "main"]

_AGAIN = "the same command again goes on from what is kept, or starts anew"

app = typer.Typer(
    name="probmodels",
    help="Probabilistic models on Pyro: fit, diagnose, and look at the results.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
_COMMANDS: dict[str, Callable[..., None]] = {
    "sst": sst,
    "ranks": ranks,
    "processes": processes,
    "run": run,
    "list": list_known,
    "schema": schema,
    "show": show,
    "diagnose": diagnose,
    "report": report,
    "compare": compare,
    "predict": predict,
    "indices": indices,
    "forecast": forecast,
    "skill": skill,
    "project": project,
    "panels": panels,
}
for name, command in _COMMANDS.items():
    app.command(name)(command)

_UsageError: Any = typer.BadParameter.__base__  # of typer, or of click, which some versions of typer take it from


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


def main() -> None:
    """Run the command line; what a user can mend is one line and exit status 2."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", "30")  # seconds between lines of progress in a log file
    # Chains run in processes of their own, and threads of BLAS that wait for a busy processor cost a tenth of a run.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
    try:
        status = app(standalone_mode=False)
    except _UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # which has shown the help
            sys.exit(2)
        _fail("Usage", error.format_message())
    except Interrupted as error:
        _fail("Interrupted", f"{error}; {_AGAIN}", INTERRUPTED)
    except ProbmodelsError as error:
        _fail(type(error).__name__.lstrip("_"), str(error))
    except (KeyboardInterrupt, typer.Abort):
        status = INTERRUPTED
    except MemoryError:
        _fail("MemoryError", "not enough memory for this; take fewer data, draws or a smaller model")
    except OSError as error:
        _fail("Error", str(error))
    if status == INTERRUPTED:  # which typer makes of an interrupt
        _fail("Interrupted", _AGAIN, INTERRUPTED)
    sys.exit(status if isinstance(status, int) else 0)


def _fail(kind: str, message: str, status: int = 2) -> NoReturn:
    print(f"{kind}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)
