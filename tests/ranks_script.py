"""Fits that tests run under torchrun and by themselves; results go to the folder that the command line names."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoDelta, AutoNormal

from probmodels.errors import RankError
from probmodels.inference import Problem, Result, fit_svi


def regression(x: torch.Tensor, y: torch.Tensor) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(3, dtype=x.dtype), 1.0).to_event(1))
    with pyro.plate("row", len(x)) as i:
        pyro.sample("y", dist.Normal(x[i] @ w, 0.3), obs=y[i])


def groups(y: torch.Tensor) -> None:
    """A mean per row and a scale for all."""
    scale = pyro.sample("scale", dist.LogNormal(y.new_zeros(()), 0.5))
    with pyro.plate("row", len(y)) as i:
        theta = pyro.sample("theta", dist.Normal(y.new_zeros(()), 2.0))
        pyro.sample("y", dist.Normal(theta, scale), obs=y[i])


def crossed(y: torch.Tensor) -> None:
    """Two plates that are both subsampled."""
    mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 2.0))
    rows, columns = pyro.plate("row", y.shape[0], dim=-2), pyro.plate("column", y.shape[1], dim=-1)
    with rows as i, columns as j:
        pyro.sample("y", dist.Normal(mu, 0.5), obs=y[i][:, j])


def problems() -> dict[str, tuple[Problem, dict[str, Any]]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(13, 3, generator=generator, dtype=torch.float64)
    y = x.sum(-1) + 0.3 * torch.randn(13, generator=generator, dtype=torch.float64)
    table = torch.randn(6, 8, generator=generator, dtype=torch.float64)
    rows, both = ("row",), ("row", "column")
    options = {"lr": 0.05, "lr_decay": 0.1, "num_steps": 40, "clip_norm": 5.0, "keep": "best"}
    return {
        # Noise of latent sites that all rows share is that of one process; 5 rows are 3 and 2.
        "regression": (
            Problem("regression", regression, AutoNormal(regression), (x, y), batch_plates=rows),
            {**options, "batch_size": 5, "compile": "graph", "kl_warmup": 10},
        ),
        "groups": (Problem("groups", groups, AutoDelta(groups), (y,), batch_plates=rows), options),
        "crossed": (
            Problem("crossed", crossed, AutoNormal(crossed), (table,), batch_plates=both),
            {**options, "batch_size": {"row": 3, "column": 4}},
        ),
    }


def fit(name: str, **changes: Any) -> Result:
    problem, options = problems()[name]
    return fit_svi(problem, **{**options, "num_samples": 5, "progress": False, **changes})


def interrupt(step: Any) -> None:
    if step.number == 17:
        os.kill(os.getpid(), signal.SIGINT)


def main(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    torch.manual_seed(rank)  # what a guide starts from must not differ between ranks
    for name in problems():
        fit(name, distributed=True).save(folder / f"{name}-{rank}")
    noisy = {"guide": AutoNormal(groups)}
    problem, options = problems()["groups"]
    options = {**options, "num_samples": 5, "progress": False}
    whole = fit_svi(Problem("noisy", groups, args=problem.args, batch_plates=("row",), **noisy), **options)
    whole.save(folder / f"noisy-{rank}")
    try:
        problem = Problem("noisy", groups, args=problem.args, batch_plates=("row",), **noisy)
        fit_svi(problem, **options, checkpoint=folder / "checkpoint", callbacks=[interrupt])
    except KeyboardInterrupt as stopped:
        (folder / f"stopped-{rank}").write_text(str(stopped))
    fit_svi(problem, **options, checkpoint=folder / "checkpoint").save(folder / f"resumed-{rank}")
    try:
        fit("regression", seed=rank)
    except RankError as error:
        (folder / f"refused-{rank}").write_text(str(error))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # threads of torch now and then abort an interpreter that shuts down; all fits are on disk by now
