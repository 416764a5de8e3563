"""The engine for bilevel programs: hyperparameters that minimise one loss while other parameters minimise another.

    min_h  F(w*(h), h)   where   w*(h) = argmin_w L(w, h)

``L`` is the loss of a problem, ``F`` that of another one with the same parameters.

References
----------
Franceschi, L., Frasconi, P., Salzo, S., Grazzi, R. and Pontil, M. (2018). Bilevel programming for hyperparameter
optimization and meta-learning. https://arxiv.org/abs/1806.04910
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

import torch

from probmodels.errors import ProblemError
from probmodels.inference.bilevel.hypergradients import HYPERGRADIENTS
from probmodels.inference.bilevel.rounds import STOP_BY, Plan, Rounds
from probmodels.inference.problem import Outer, Problem
from probmodels.inference.result import Result
from probmodels.inference.variational.options import Callback, Options
from probmodels.inference.variational.training import fit

__all__ = ["HYPERGRADIENTS", "STOP_BY", "fit_bilevel"]


def fit_bilevel(
    problem: Problem,
    *,
    outer: Outer | None = None,
    num_rounds: int = 20,
    inner_steps: int = 400,
    unroll_steps: int = 5,
    hypergrad: str = "unrolled",
    lr: float = 0.01,
    optimiser: str = "adam",
    hyper_lr: float = 0.1,
    hyper_optimiser: str = "sgd",
    hyper_decay: float = 0.0,
    solver_steps: int = 20,
    damping: float = 0.0,
    restart: bool = True,
    tolerance: float | None = None,
    compare: str | None = None,
    stop_by: str = "log_loss",
    patience: int | None = None,
    keep: str = "best",
    num_scores: int = 16,
    num_samples: int = 100,
    num_particles: int | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    callbacks: Sequence[Callback] = (),
    checkpoint: str | Path | None = None,
    checkpoint_every: float = 30.0,
    progress: bool = True,
) -> Result:
    """Fit hyperparameters to an outer loss and all other parameters to the loss of the problem.

    A round solves the inner problem; every ``unroll_steps`` of its steps the hyperparameters make one. At its end it is
    judged, and the best round decides the result.

    Parameters
    ----------
    problem
        The inner problem: model, guide, loss and data.
    outer
        Hyperparameters and their loss; None for ``problem.outer``.
    num_rounds
        Most rounds.
    inner_steps
        Most inner steps of a round.
    unroll_steps
        Inner steps between two steps of the hyperparameters; for ``"unrolled"``, those that are differentiated. Memory
        grows with it, and with nothing else.
    hypergrad
        ``"unrolled"``: reverse mode through the last inner steps and their optimiser, whose state goes on. Beyond them
        the inner parameters count as constants, which is a bias that more steps lessen. ``"cg"``, ``"neumann"``: the
        implicit function theorem at the present inner parameters, with ``solver_steps`` of conjugate gradients or of
        the Neumann series; exact where these solve the inner problem and the Hessian is positive definite.
        ``"finite_difference"``: one virtual step of gradient descent, the mixed derivative by central differences.
    lr, optimiser
        Step size of the inner problem, and ``"adam"`` or ``"sgd"``.
    hyper_lr, hyper_optimiser, hyper_decay
        The same for hyperparameters; step k has size ``hyper_lr / (1 + hyper_decay k)``. With ``"sgd"`` and a
        constraint in ``outer`` this is projected gradient descent.
    solver_steps, damping
        Of ``"cg"`` and ``"neumann"``; damping is added to the Hessian.
    restart
        Whether every round begins with inner parameters made afresh; otherwise they go on. Afresh: initialisers of
        `pyro.param` and automatic guides run again, with a seed of the round's own; what modules and tensors of the
        problem hold starts from the values that it came with, the same in every round. Moments of the optimiser are
        forgotten. Hyperparameters and their moments go on, and so do buffers.
    tolerance
        A round ends early where over 20 steps the lowest inner loss has not fallen by this share of its whole fall in
        the round; None for never.
    compare
        A second method, whose hypergradient is computed beside the first; group ``fit`` then has their ``cosine`` and
        ``relative_error``.
    stop_by
        What a round is judged by: ``"log_loss"``, of every observation the negative log of its mean probability over
        ``num_scores`` draws of the guide, or ``"error"``, the share of discrete observations that are not the most
        probable value. Without ``outer.stop``, the outer problem's observations are judged.
    patience
        Rounds without a better one after which to stop; None for never.
    keep
        Parameters of the ``"best"`` round, or the ``"last"`` ones.
    num_scores
        Draws that a round is judged by.
    num_samples
        Draws taken from the guide in the end.
    num_particles
        Draws per evaluation of either loss; None for what the problems say.
    seed, device, dtype, callbacks, checkpoint, checkpoint_every, progress
        As in `fit_svi`; a step is one of the hyperparameters, and its loss the outer one.

    Returns
    -------
    Result
        Draws of the guide of the inner problem, parameters, hyperparameters among them, and group ``fit``: by step
        ``round``, ``inner_loss``, ``outer_loss``, ``grad_norm`` (inner), ``hypergrad_norm``, ``seconds``; by round
        ``log_loss`` and, where observations are discrete, ``error``.

    Raises
    ------
    ProblemError
        If there is no outer problem, its parameters are not those of the inner one, a hyperparameter is unknown or
        moves nothing, or an argument is out of range.
    CheckpointError, FitError, KeyboardInterrupt
        As in `fit_svi`.

    Examples
    --------
    >>> result = fit_bilevel(problem, hypergrad="cg", unroll_steps=200, inner_steps=200)  # doctest: +SKIP
    """
    given, name = dict(locals()), problem.name
    plan = Plan(**{field.name: given[field.name] for field in fields(Plan)})
    plan.check(name)
    if keep not in ("last", "best"):
        raise ProblemError(f"{name}: keep={keep!r}; fit_bilevel keeps the 'last' or the 'best' round")
    if outer is not None:
        problem = replace(problem, outer=outer)
    if problem.outer is None:
        raise ProblemError(
            f"{name}: fit_bilevel needs an outer problem; give outer=Outer(problem, hyper) or use fit_svi"
        )
    options = Options(
        num_samples=num_samples,
        patience=patience,
        keep=keep,
        seed=seed,
        device=device,
        dtype=dtype,
        callbacks=callbacks,
        checkpoint=checkpoint,
        checkpoint_every=checkpoint_every,
        progress=progress,
    )
    settings = vars(plan)
    return fit(problem, "bilevel", lambda setting: Rounds(setting, plan), options, settings, settings)
