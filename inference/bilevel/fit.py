"""The engine for bilevel programs: hyperparameters that minimise one loss while other parameters minimise another.

    min_h  F(w*(h), h)   where   w*(h) = argmin_w L(w, h)

``L`` is the loss of a problem, ``F`` that of another one with the same parameters.

References
----------
Franceschi, L., Frasconi, P., Salzo, S., Grazzi, R. and Pontil, M. (2018). Bilevel programming for hyperparameter
optimization and meta-learning. https://arxiv.org/abs/1806.04910
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Annotated, Any, Literal, Unpack

from annotated_types import Interval

from probmodels.errors import ProblemError
from probmodels.inference.bilevel.hypergradients import HYPERGRADIENTS
from probmodels.inference.bilevel.rounds import STOP_BY, Plan, Rounds
from probmodels.inference.problem import Outer, Problem
from probmodels.inference.result import Result
from probmodels.inference.variational.options import RunOptions
from probmodels.inference.variational.training import fit
from probmodels.options import Count, Draws, NonNegative, Particles, Positive, checked, refuse_unused

__all__ = ["HYPERGRADIENTS", "STOP_BY", "fit_bilevel"]

Method = Literal["unrolled", "cg", "neumann", "finite_difference"]
_SOLVED = ("cg", "neumann")  # methods that solve a linear system


@checked(ProblemError)
def fit_bilevel(
    problem: Problem,
    *,
    outer: Outer | None = None,
    num_rounds: Count = 20,
    inner_steps: Count = 400,
    unroll_steps: Count = 5,
    hypergrad: Method = "unrolled",
    lr: Positive = 0.01,
    optimiser: Literal["adam", "sgd"] = "adam",
    hyper_lr: Positive = 0.1,
    hyper_optimiser: Literal["adam", "sgd"] = "sgd",
    hyper_decay: NonNegative = 0.0,
    solver_steps: Count = 20,
    damping: NonNegative = 0.0,
    restart: bool = True,
    tolerance: Annotated[float, Interval(ge=0, lt=1)] | None = None,
    compare: Method | None = None,
    stop_by: Literal["log_loss", "error"] = "log_loss",
    patience: Count | None = None,
    keep: Literal["best", "last"] = "best",
    num_scores: Count = 16,
    num_samples: Draws = 100,
    num_particles: Particles | None = None,
    **options: Unpack[RunOptions],
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
        For ``"cg"`` and ``"neumann"``; damping is added to the Hessian.
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
    **options
        ``seed``, ``device``, ``dtype``, ``callbacks``, ``checkpoint``, ``checkpoint_every`` and ``progress``: see
        `probmodels.inference.variational.options.RunOptions`. A step is one of the hyperparameters, and its loss the
        outer one.

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
        moves nothing, or an option is out of range.
    CheckpointError, FitError, KeyboardInterrupt
        As in `fit_svi`.

    Examples
    --------
    >>> result = fit_bilevel(problem, hypergrad="cg", unroll_steps=200, inner_steps=200)  # doctest: +SKIP
    """
    given, name = dict(locals()), problem.name
    plan = Plan(**{field.name: given[field.name] for field in fields(Plan)})
    if unroll_steps > inner_steps:
        raise ProblemError(
            f"{name}: unroll_steps={unroll_steps} exceeds inner_steps={inner_steps}, the steps of a round"
        )
    if compare == hypergrad:
        raise ProblemError(f"{name}: compare={compare!r} is the method itself; choose another one")
    if hypergrad not in _SOLVED and compare not in _SOLVED:
        refuse_unused(fit_bilevel, f"hypergrad={hypergrad!r}", solver_steps=solver_steps, damping=damping)
    if outer is not None:
        problem = replace(problem, outer=outer)
    if problem.outer is None:
        raise ProblemError(
            f"{name}: fit_bilevel needs an outer problem; give outer=Outer(problem, hyper) or use fit_svi"
        )
    chosen: Any = {**options, "num_samples": num_samples, "patience": patience, "keep": keep}
    settings = vars(plan)
    return fit(
        problem, "bilevel", lambda setting: Rounds(setting, plan), chosen | {"distributed": False}, settings, settings
    )
