"""A spec that is run: checked, its data loaded, sampled with checkpoints, saved, and its outputs written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from probmodels.cli.common import Interrupted, Refusal, changed_names, exit_unless, load, say
from probmodels.errors import ResultError

if TYPE_CHECKING:
    from probmodels.inference.problem import Problem
    from probmodels.inference.result import Result

__all__ = ["execute", "write"]

RESULT = "result.nc"
CHECKPOINT = "checkpoint"


def execute(
    spec: dict[str, Any], *, device: str | None = None, strict: bool, quiet: bool, former: Path | None = None
) -> None:
    """Check, load, sample with checkpoints, save, write outputs; say where data differ from those of a former run."""
    say("checking the spec", quiet=quiet)
    from probmodels.inference.result import check_target
    from probmodels.inference.runtime.checkpoint import check_room
    from probmodels.inference.runtime.tensors import find_device
    from probmodels.spec import build_problem, load_data, load_spec, run_engine

    spec = load_spec(spec)
    folder = Path(spec["output"]["path"])
    overwrite = spec["output"].get("overwrite", False)
    if _lacks_outputs(folder, spec):
        typer.echo(f"{folder} holds the result of this run, whose outputs are not complete: writing them.")
        shutil.rmtree(folder / CHECKPOINT, ignore_errors=True)
        exit_unless(write(load(folder), folder, quiet=quiet), strict)
        return
    if (folder / RESULT).exists() and not overwrite:
        raise Refusal(f"{folder} holds a result already; choose another folder with --out, or pass --overwrite")
    check_target(folder, overwrite=overwrite)
    find_device("--device", device)
    find_device("inference.device", spec["inference"].get("device"))
    if isinstance(chosen := spec["inference"].get("checkpoint"), str):
        check_room(chosen, 0)
    say(f"loading data: {spec['data'].get('name')}", quiet=quiet)
    data = load_data(spec)
    say(f"building the problem: {spec['method']}", quiet=quiet)
    problem = build_problem(spec, data)
    problem = problem if device is None else problem.to(device)
    _say_mends(problem)
    if former is not None:
        _say_changes(former, problem)
    checkpoint = folder / CHECKPOINT
    options: dict[str, Any] = {"checkpoint": str(checkpoint), **spec["inference"]}
    options |= {"progress": False} if quiet else {}
    options |= {"device": device} if device is not None and "device" in options else {}
    if checkpoint.exists():
        typer.echo(f"Continuing from {checkpoint}.")
    elif not quiet:
        _say_cost(problem, spec["inference"])
    say(f"compiling, and running {spec['inference']['engine']}", quiet=quiet)
    try:
        result = run_engine(spec, problem, **options)
    except KeyboardInterrupt as error:
        raise Interrupted(str(error) or f"nothing is kept yet in {options['checkpoint']}") from error
    say(f"writing to {folder}", quiet=quiet)
    (folder / "report.html").unlink(missing_ok=True)  # of an earlier run: it is the sign that outputs are complete
    result.save(folder, overwrite=overwrite)
    shutil.rmtree(checkpoint, ignore_errors=True)
    exit_unless(write(result, folder, quiet=quiet), strict)


def _lacks_outputs(folder: Path, spec: dict[str, Any]) -> bool:
    """Whether a folder holds the result of the same spec, and the run was killed before its last output, the page."""
    from probmodels.inference.labels import read_json

    if not (folder / RESULT).exists() or (folder / "report.html").exists():
        return False
    try:
        written = read_json(load(folder).tree.attrs, "spec", {})
    except ResultError:
        return False
    return _core(written) == _core(json.loads(json.dumps(spec, default=str)))


def _core(spec: dict[str, Any]) -> dict[str, Any]:
    """What decides the draws: a spec without its output and the folder of checkpoints."""
    inference = {key: value for key, value in spec.get("inference", {}).items() if key != "checkpoint"}
    return {key: value for key, value in spec.items() if key != "output"} | {"inference": inference}


def write(result: Result, folder: Path, options: dict[str, Any] | None = None, *, quiet: bool = False) -> bool:
    """Tables, figures and a page on any result, with those of its method; whether draws and model passed.

    Options are those of the method's outputs; by default those of the spec of the result.
    """
    from probmodels.report import write_report

    written = write_report(result, folder, options=options, progress=not quiet)
    typer.echo(f"\n{written.table}\n\n{written.diagnosis.text(where='summary.txt')}\n\nReport: {written.report}")
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
        changed = changed_names(load(former), problem)
    except ResultError:
        return
    if changed:
        typer.echo(
            f"Note: the data have changed since the run of {former}: {changed} differ; this run has the new ones"
        )
