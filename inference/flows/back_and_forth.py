"""Back and forth: forget the last steps of a draw of a guide, draw them anew by the guide, and compare the two.

With weights w = p(x, z) / q(z | x) the first steps, which both draws share, cancel in the ratio of their weights. So
that ratio is the acceptance probability of a Metropolis-Hastings move whose proposal is the new draw, whatever the
number of steps that are kept, and the difference of the log weights is zero where the guide is the posterior. This
makes a Markov kernel, a way to refine the draws of a guide before a model learns from them, and an objective.

What is data to `probmodels.inference.flows.balance` is moved and accepted by itself here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, Unpack

import torch
from annotated_types import Ge
from pyro import poutine
from torch import Tensor

from probmodels.errors import ProblemError
from probmodels.inference.flows.balance import BalanceOptions, Run, VarGrad
from probmodels.inference.flows.exploration import (
    Explore,
    Recall,
    by_event,
    count_steps,
    cut,
    drawn,
    retraced,
    with_values,
)
from probmodels.inference.mcmc.chains import KernelFactory
from probmodels.inference.mcmc.kernels import Kernel, Params
from probmodels.inference.problem import Problem
from probmodels.inference.programs.programs import Program, Programs
from probmodels.inference.programs.traces import Frames, by_datum, sample_sites, scored, shared_plates
from probmodels.inference.result import Result
from probmodels.inference.runtime.ops import FixGenerated
from probmodels.options import checked

__all__ = ["BackAndForth", "BackAndForthKernel", "guided_kernel", "refined"]

_TRIES = 100


class BackAndForth(VarGrad):
    """Back and forth: draws that differ in their last steps have to have the same log p(x, z) - log q(z | x).

    One draw of the guide is compared with others that keep its first steps and draw the rest anew; how many they keep
    is drawn uniformly for each datum, from none to all but one. Per datum the loss is half the unbiased variance over
    all of them. The first steps cancel in it, so that it is a sub-trajectory balance without flows: its gradient is
    that of KL(q || p) of what was drawn anew given what was kept, on average over what was kept. For guides with a
    backward policy see `retraced`.

    Parameters
    ----------
    num_particles
        At least 2, the first draw included.
    **options
        ``temperature``, ``epsilon``, ``reward_power``, ``floor`` and ``joint``; see
        `probmodels.inference.flows.balance.BalanceOptions`.

    References
    ----------
    E. J. Hu et al., GFlowNet-EM for learning compositional latent variable models, ICML 2023,
    https://arxiv.org/abs/2302.06576
    """

    @checked(ProblemError)
    def __init__(self, num_particles: Annotated[int, Ge(2)] = 2, **options: Unpack[BalanceOptions]) -> None:
        super().__init__(num_particles, **options)

    def _runs(self, model: Any, guide: Any, args: Any, kwargs: Any) -> list[Run]:
        with Explore(self.temperature, self.epsilon):
            draw: Any = poutine.trace(guide).get_trace(*args, **kwargs)
        draw = retraced(guide, draw, args, kwargs)
        draw.compute_log_prob()
        runs = [self._run(model, draw, args, kwargs)]
        kept = cut(draw, runs[0].shared)
        for _ in range(self.num_particles - 1):
            with Recall(draw, kept, self.temperature, self.epsilon):
                other: Any = poutine.trace(guide).get_trace(*args, **kwargs)
            other.compute_log_prob()
            runs.append(self._run(model, other, args, kwargs))
        return runs


@dataclass(frozen=True)
class _State:
    """A draw with its log densities by datum.

    Attributes
    ----------
    draw
        Trace of the guide, of which the values count.
    log_p, log_weight
        log p(x, z), and log p(x, z) - log q(z | x).
    shared
        Plates whose rows are data.
    """

    draw: Any
    log_p: Tensor
    log_weight: Tensor
    shared: Frames


def _evaluated(model: Any, draw: Any, args: Any, kwargs: Any) -> _State:
    """State of a draw whose trace has its log densities."""
    trace = scored(model, draw, args, kwargs)
    shared = shared_plates(trace, draw)
    log_p = by_datum(trace, shared)
    return _State(draw, log_p, log_p - by_datum(draw, shared), shared)


def _move(model: Any, guide: Any, state: _State, args: Any, kwargs: Any) -> tuple[_State, Tensor]:
    """One move, and which data took it."""
    if hasattr(guide, "retrace"):
        state = _evaluated(model, retraced(guide, state.draw, args, kwargs), args, kwargs)
    with Recall(state.draw, cut(state.draw, state.shared)):
        draw: Any = poutine.trace(guide).get_trace(*args, **kwargs)
    draw.compute_log_prob()
    other = _evaluated(model, draw, args, kwargs)
    # Both weights are zero where the model excludes both: the difference is nan, and the move is not taken.
    taken = torch.rand_like(other.log_weight).log() < other.log_weight - state.log_weight
    values = {}
    for site in sample_sites(draw):
        before = state.draw.nodes[site["name"]]["value"]
        values[site["name"]] = torch.where(by_event(taken, before, site["fn"]), site["value"], before)
    log_p, log_weight = (
        torch.where(taken, new, old) for new, old in ((other.log_p, state.log_p), (other.log_weight, state.log_weight))
    )
    return _State(with_values(draw, values), log_p, log_weight, other.shared), taken


def refined(model: Any, guide: Any, draw: Any, num_moves: int, args: Any, kwargs: Any) -> Any:
    """Draw of a guide after moves that leave the posterior invariant, so that it is nearer to a draw from there.

    Parameters
    ----------
    model, guide
        Programs of ``args`` and ``kwargs``.
    draw
        Trace of the guide with its log densities.
    num_moves
        Number of moves of every datum.

    Returns
    -------
    Trace
        Whose values are the new ones; its log densities are not.
    """
    with torch.no_grad():
        state = _evaluated(model, draw, args, kwargs)
        for _ in range(num_moves):
            state, _taken = _move(model, guide, state, args, kwargs)
    return state.draw


class BackAndForthKernel(Kernel):
    """Markov chain whose proposals are draws of a guide that keep the first steps of the present draw.

    It leaves the posterior invariant whatever the guide is, needs no gradient and moves discrete sites; it mixes as
    well as the guide is good. A chain starts at a draw of the guide. Make one by `guided_kernel`.

    Parameters
    ----------
    problem
        What to infer.
    guide
        Pyro program of the arguments of the model.
    state
        Parameters of model and guide, as a result of a fit keeps them; None for those that they come with.
    """

    def __init__(self, problem: Problem, *, guide: Program, state: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        self._problem, self._guide, self._state = replace(problem, guide=guide), guide, state
        self._names = problem.names("latent", "deterministic", "generated")

    def setup(self, warmup_steps: int, *args: Any, **kwargs: Any) -> None:
        """Make the programs and find a start that the model does not exclude.

        Raises
        ------
        ProblemError
            If there is none among a hundred draws of the guide.
        """
        self._programs = Programs(self._problem)
        if self._state is not None:
            self._programs.load(self._state)
        self._scored = FixGenerated()(self._programs.model)
        self._arguments = self._problem.args, self._problem.kwargs
        for _ in range(_TRIES):
            draw = drawn(self._programs.guide, *self._arguments)
            with torch.no_grad():
                self._now = _evaluated(self._scored, draw, *self._arguments)
            if self._now.log_weight.isfinite().all():
                break
        else:
            raise ProblemError(
                f"{self._problem.name}: none of {_TRIES} draws of the guide has a finite density under the model, so "
                "that a chain cannot start; mask the values that the model excludes in the guide"
            )
        self._rate = 0.0

    @property
    def initial_params(self) -> Params:
        """Values of the guide's sites."""
        return {site["name"]: site["value"] for site in sample_sites(self._now.draw)}

    @initial_params.setter
    def initial_params(self, params: Params) -> None:
        self._now = replace(self._now, draw=with_values(self._now.draw, params))

    def sample(self, params: Params) -> Params:
        """One move of every datum."""
        with torch.no_grad():
            self.initial_params = params
            self._now, taken = _move(self._scored, self._programs.guide, self._now, *self._arguments)
        self._rate = float(taken.double().mean())
        return self.initial_params

    def export(self, params: Params) -> Params:
        """Latent, deterministic and generated sites of the model, with its fitted parameters."""
        args, kwargs = self._arguments
        with torch.no_grad():
            draw = with_values(self._now.draw, params)
            trace: Any = poutine.trace(poutine.replay(self._programs.model, trace=draw)).get_trace(*args, **kwargs)
        return {name: trace.nodes[name]["value"] for name in self._names}

    def sample_stats(self) -> dict[str, Any]:
        """Log joint density, and the share of data that took the latest move."""
        return {"lp": float(self._now.log_p.sum()), "acceptance_rate": self._rate}

    def attrs(self) -> dict[str, Any]:
        """Steps of a draw of the guide."""
        return {"guide_steps": count_steps(self._now.draw)}

    def logging(self) -> dict[str, str]:
        """Acceptance for the progress bar."""
        return {"accepted": f"{self._rate:.2f}"}

    def state_dict(self) -> dict[str, Tensor | int | float | str]:
        """Log densities of the present draw, whose values are the parameters."""
        return {"log_p": self._now.log_p, "log_weight": self._now.log_weight, "rate": self._rate}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state_dict``."""
        self._now = replace(self._now, log_p=state["log_p"], log_weight=state["log_weight"])
        self._rate = float(state["rate"])


def guided_kernel(problem: Problem, fitted: Result | None = None) -> KernelFactory:
    """Maker of a kernel of `run_mcmc` that proposes by a guide.

    Parameters
    ----------
    problem
        Its guide proposes.
    fitted
        Result of a fit of that guide, and of the model's parameters if it has any; None for those that they come with.

    Raises
    ------
    ProblemError
        If the problem has no guide, or the result no fitted one.

    Examples
    --------
    >>> result = run_mcmc(problem, kernel=guided_kernel(problem, fit_em(problem)))  # doctest: +SKIP
    """
    if problem.guide is None:
        raise ProblemError(f"{problem.name}: the problem has no guide to go back and forth by; give it one")
    if fitted is not None and fitted.guide_state is None:
        raise ProblemError(f"{problem.name}: the result holds no fitted guide; give that of fit_svi or fit_em")
    state = None if fitted is None else fitted.guide_state
    return partial(BackAndForthKernel, guide=problem.guide, state=state)
