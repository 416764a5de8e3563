"""Stochastic variational inference: one Adam over the parameters of model and guide."""

from __future__ import annotations

from typing import Literal, Unpack

from probmodels.errors import FitError, ProblemError
from probmodels.inference.problem import Problem
from probmodels.inference.programs.programs import fitted, sample_guide
from probmodels.inference.result import Result
from probmodels.inference.runtime.fingerprints import fingerprint
from probmodels.inference.variational.gradient import Stage
from probmodels.inference.variational.loop import Setting
from probmodels.inference.variational.losses import make_loss, objective_of
from probmodels.inference.variational.options import Decay, FitOptions, Schedule, Step, make_schedule
from probmodels.inference.variational.training import Trainer, fit
from probmodels.options import Count, Particles, Positive, checked

__all__ = ["FitError", "Step", "fit_svi", "fitted", "make_loss", "sample_guide"]


@checked(ProblemError)
def fit_svi(
    problem: Problem,
    *,
    num_steps: Count = 2000,
    lr: Positive = 0.01,
    lr_decay: Decay = 1.0,
    schedule: Literal["constant", "geometric", "cosine", "warmup", "warmup_cosine"] | Schedule | None = None,
    num_particles: Particles | None = None,
    **options: Unpack[FitOptions],
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
        Ratio of the last step size to the first, in (0, 1], reached geometrically, or as ``schedule`` says.
    schedule
        Course of the step size: ``"constant"``, ``"geometric"``, ``"cosine"``, ``"warmup"``, ``"warmup_cosine"``, or a
        function from the step, counted from 0, to a factor of ``lr``.
    num_particles
        Draws per step; None for what ``problem.loss`` says.
    **options
        ``batch_size``, ``num_samples``, ``clip_norm``, ``patience``, ``keep``, ``kl_warmup``, ``compile``, ``seed``,
        ``device``, ``dtype``, ``callbacks``, ``checkpoint``, ``checkpoint_every``, ``progress`` and ``distributed``:
        see `probmodels.inference.variational.options.FitOptions` and those that it extends.

    Returns
    -------
    Result
        Groups ``posterior`` (one chain), ``sample_stats`` with ``log_weight`` = log p(draw, data) - log q(draw),
        ``fit`` with ``loss``, ``grad_norm`` and ``seconds`` by step, and the data.

    Raises
    ------
    ProblemError
        If the problem has no guide or does not fit it, sites change between runs, or an option is out of range.
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
    factor = make_schedule(problem.name, schedule, num_steps, lr_decay)
    loss = make_loss(problem, num_particles)

    def make(setting: Setting) -> Trainer:
        return Trainer(setting, [Stage("svi", objective_of(loss), "both", num_steps, lr, factor)], 1)

    constant = schedule == "constant" or (schedule is None and lr_decay == 1.0)
    settings = {"num_steps": num_steps, "lr": lr, "lr_decay": lr_decay, "num_particles": num_particles}
    # A finished fit may be continued where no step depends on how many there are.
    fixed = {"decay_over": None if constant or callable(schedule) else num_steps, "schedule": fingerprint(schedule)}
    fixed |= {key: settings[key] for key in ("lr", "lr_decay", "num_particles")}
    return fit(problem, "svi", make, options, settings | {"schedule": schedule}, fixed)
