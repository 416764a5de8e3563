"""Stochastic variational inference: one Adam over the parameters of model and guide."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from probmodels.errors import FitError, ProblemError
from probmodels.inference.problem import Problem
from probmodels.inference.programs.programs import fitted, sample_guide
from probmodels.inference.result import Result
from probmodels.inference.runtime.fingerprints import fingerprint
from probmodels.inference.variational.gradient import Stage
from probmodels.inference.variational.loop import Setting
from probmodels.inference.variational.losses import make_loss, objective_of
from probmodels.inference.variational.options import Callback, Options, Schedule, Step, make_schedule, positive
from probmodels.inference.variational.training import Trainer, fit

__all__ = ["FitError", "Step", "fit_svi", "fitted", "make_loss", "sample_guide"]


def fit_svi(
    problem: Problem,
    *,
    num_steps: int = 2000,
    lr: float = 0.01,
    lr_decay: float = 1.0,
    schedule: str | Schedule | None = None,
    num_particles: int | None = None,
    batch_size: int | Mapping[str, int] | None = None,
    num_samples: int = 1000,
    clip_norm: float | None = None,
    patience: int | None = None,
    keep: str = "last",
    kl_warmup: int = 0,
    compile: str | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    callbacks: Sequence[Callback] = (),
    checkpoint: str | Path | None = None,
    checkpoint_every: float = 30.0,
    progress: bool = True,
    distributed: bool | None = None,
) -> Result:
    """Fit the guide of a problem, and the parameters of its model, and draw from the guide.

    Parameters
    ----------
    problem
        What to infer; its guide and modules are left as they are.
    num_steps
        Gradient steps.
    lr
        Step size of Adam.
    lr_decay
        Ratio of the last step size to the first, reached geometrically, or as ``schedule`` says.
    schedule
        Course of the step size: ``"constant"``, ``"geometric"``, ``"cosine"``, ``"warmup"``, ``"warmup_cosine"``, or a
        function from the step, counted from 0, to a factor of ``lr``.
    num_particles
        Draws per step; None for what ``problem.loss`` says.
    batch_size
        Rows that a step sees of every plate in ``problem.batch_plates``, or of each by name; None for all. Model and
        guide take their data with the indices that the plate gives. Every step's loss is unbiased for that of all data.
    num_samples
        Draws taken from the fitted guide, with all data.
    clip_norm
        Largest norm of the gradient over all parameters.
    patience
        Stop after so many steps in which the smoothed loss has not improved; None for never.
    keep
        ``"last"`` parameters; the ``"best"`` by smoothed loss; or their ``"average"`` over about the last tenth of the
        steps, which noise moves less.
    kl_warmup
        Steps in which the weight of the latent sites' log densities, in model and guide, rises from 0 to 1.
    compile
        ``"graph"``: loss and gradient are captured once and run without Python programs; ``"inductor"``: the graph
        becomes machine code, which takes seconds and a C++ compiler; ``"eager"``: as written. None for a graph where
        there is one and ``num_steps`` repay it. What cannot be captured runs eagerly; attribute ``execution`` of the
        result says which and why. All give the same numbers but for rounding.
    seed
        Non-negative; the same seed gives the same numbers.
    device
        Where to compute; None for where the problem lies.
    dtype
        ``"float32"`` or ``"float64"`` for data, parameters and draws; None for the problem's own.
    callbacks
        Called with a `Step` after every step; one that returns True ends the fit.
    checkpoint
        Folder for the state; an unfinished fit of the same call found there is continued to the same numbers.
    checkpoint_every
        Seconds between two checkpoints.
    progress
        Whether to show a progress bar.
    distributed
        Whether the processes that ``torchrun`` started fit together: each sees its share of the rows of a step, and all
        return the same result, that of one process but for rounding, or, where rows have latent sites, for noise. None
        for where a process group of ``torch.distributed`` has been started. Callbacks are called on the first rank.

    Returns
    -------
    Result
        Groups ``posterior`` (one chain), ``sample_stats`` with ``log_weight`` = log p(draw, data) - log q(draw),
        ``fit`` with ``loss``, ``grad_norm`` and ``seconds`` by step, and the data.

    Raises
    ------
    ProblemError
        If the problem has no guide or does not fit it, sites change between runs, or an argument is out of range.
    CheckpointError
        If the checkpoint cannot be used.
    FitError
        If the loss or its gradient stops being finite.
    KeyboardInterrupt
        After an interrupt, once the step is finished and the state saved.

    Examples
    --------
    >>> result = fit_svi(Problem("mine", model, guide, args=(x,)))  # doctest: +SKIP
    """
    positive(problem.name, num_steps=num_steps)
    for name, value in (("lr", lr), ("lr_decay", lr_decay)):
        if value <= 0:
            raise ProblemError(f"{problem.name}: {name}={value}; it must be positive")
    factor = make_schedule(problem.name, schedule, num_steps, lr_decay)
    loss = make_loss(problem, num_particles)

    def make(setting: Setting) -> Trainer:
        return Trainer(setting, [Stage("svi", objective_of(loss), "both", num_steps, lr, factor)], 1)

    options = Options(
        batch_size=batch_size,
        num_samples=num_samples,
        clip_norm=clip_norm,
        patience=patience,
        keep=keep,
        kl_warmup=kl_warmup,
        compile=compile,
        seed=seed,
        device=device,
        dtype=dtype,
        callbacks=callbacks,
        checkpoint=checkpoint,
        checkpoint_every=checkpoint_every,
        progress=progress,
        distributed=distributed,
    )
    constant = schedule == "constant" or (schedule is None and lr_decay == 1.0)
    settings = {"num_steps": num_steps, "lr": lr, "lr_decay": lr_decay, "num_particles": num_particles}
    # A finished fit may be continued where no step depends on how many there are.
    fixed = {"decay_over": None if constant or callable(schedule) else num_steps, "schedule": fingerprint(schedule)}
    fixed |= {key: settings[key] for key in ("lr", "lr_decay", "num_particles")}
    return fit(problem, "svi", make, options, settings | {"schedule": schedule}, fixed)
