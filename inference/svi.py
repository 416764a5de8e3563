"""Stochastic variational inference: one Adam over the parameters of model and guide."""

from __future__ import annotations

import contextlib
import copy
import difflib
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.infer
import torch
import xarray as xr
from pyro import poutine
from pyro.infer import ELBO
from torch import Tensor, nn
from tqdm.auto import tqdm

from probmodels.inference.checkpoint import open_checkpoint, read_state, write_state
from probmodels.inference.ops import (
    Interrupts,
    chain_seed,
    fingerprint,
    is_generated,
    isolated,
    part,
    restore_rng,
    rng_tensors,
    single_thread,
)
from probmodels.inference.predictive import log_joint
from probmodels.inference.problem import Problem, ProblemError
from probmodels.inference.result import Result, ResultError, build_tree, to_dataset

__all__ = ["FitError", "Step", "fit_svi", "fitted", "make_loss", "sample_guide"]

_SAMPLE_STREAM = 1


class FitError(RuntimeError):
    """A fit that broke down: at which step and what to try."""


@dataclass(frozen=True)
class Step:
    """What a callback learns after a step: its number from 1, the loss, the gradient norm and the seconds it took."""

    number: int
    loss: float
    grad_norm: float
    seconds: float


Callback = Callable[[Step], bool | None]


def fit_svi(
    problem: Problem,
    *,
    num_steps: int = 2000,
    lr: float = 0.01,
    lr_decay: float = 1.0,
    num_particles: int | None = None,
    batch_size: int | None = None,
    num_samples: int = 1000,
    clip_norm: float | None = None,
    patience: int | None = None,
    keep: str = "last",
    seed: int = 0,
    device: str | torch.device | None = None,
    callbacks: Sequence[Callback] = (),
    checkpoint: str | Path | None = None,
    checkpoint_every: float = 30.0,
    progress: bool = True,
) -> Result:
    """Fit the guide of a problem and draw from it.

    Parameters
    ----------
    problem
        What to infer; its guide and modules are copied, not changed.
    num_steps
        Gradient steps.
    lr
        Step size of Adam.
    lr_decay
        Ratio of the last step size to the first, reached geometrically.
    num_particles
        Draws per step; None for what ``problem.loss`` says.
    batch_size
        Not available: every step uses all data.
    num_samples
        Draws taken from the fitted guide.
    clip_norm
        Largest norm of the gradient over all parameters.
    patience
        Stop after so many steps in which the smoothed loss has not improved; None for never.
    keep
        ``"last"`` parameters, or the ``"best"`` by smoothed loss.
    seed
        Non-negative; the same seed gives the same numbers.
    device
        Where to compute; None for where the problem lies.
    callbacks
        Called with a `Step` after every step; one that returns True ends the fit.
    checkpoint
        Folder for the state; an unfinished fit of the same call found there is continued to the same numbers.
    checkpoint_every
        Seconds between two checkpoints.
    progress
        Whether to show a progress bar.

    Returns
    -------
    Result
        Groups ``posterior`` (one chain), ``sample_stats`` with ``log_weight`` = log p(draw, data) - log q(draw),
        ``fit`` with ``loss``, ``grad_norm`` and ``seconds`` by step, and the data.

    Raises
    ------
    ProblemError
        If the problem has no guide or does not fit it, or an argument is out of range.
    CheckpointError
        If the checkpoint cannot be used.
    FitError
        If the loss or its gradient stops being finite.
    KeyboardInterrupt
        After an interrupt, once the step is finished and the state saved.
    """
    if problem.guide is None:
        raise ProblemError(f"{problem.name}: fit_svi needs a guide and the problem has none; use run_mcmc")
    if batch_size is not None:
        raise ProblemError(f"{problem.name}: batch_size={batch_size} is not available; leave it out to use all data")
    for name, value in (("num_steps", num_steps), ("num_samples", num_samples), ("lr", lr), ("lr_decay", lr_decay)):
        if value <= 0:
            raise ProblemError(f"{problem.name}: {name}={value}; it must be positive")
    if keep not in ("last", "best"):
        raise ProblemError(f"{problem.name}: keep={keep!r}; choose 'last' or 'best'")
    problem = problem if device is None else problem.to(device)
    problem.validate()
    settings: dict[str, Any] = {"lr": lr, "lr_decay": lr_decay, "num_particles": num_particles, "clip_norm": clip_norm}
    settings |= {"patience": patience, "keep": keep}
    folder = None
    if checkpoint is not None:
        length = num_steps if lr_decay != 1.0 else None  # without decay, a finished fit may be continued
        folder = open_checkpoint(checkpoint, _identity(problem, seed, {**settings, "decay_over": length}))
    model, guide = problem.programs()
    assert guide is not None
    with isolated(seed), single_thread():
        fit = _Fit(problem, model, guide, make_loss(problem, num_particles), lr, folder, keep_best=keep == "best")
        with pyro.validation_enabled(False):
            _descend(fit, num_steps, lr_decay, clip_norm, patience, callbacks, checkpoint_every, bar=progress)
            if keep == "best":
                fit.restore_best()
        state = _guide_state(model, guide)
        pyro.set_rng_seed(chain_seed(seed, _SAMPLE_STREAM))
        draws, log_weight = sample_guide(problem, model, guide, num_samples=num_samples)
    posterior = to_dataset(draws, problem.dims(), problem.coords)
    groups = {"sample_stats": to_dataset({"log_weight": log_weight}, {}, {}), "fit": fit.history()}
    settings |= {"num_steps": num_steps, "num_samples": num_samples, "seed": seed}
    tree = build_tree(problem, posterior, engine="svi", seed=seed, settings=settings, groups=groups)
    return Result(tree, state)


def make_loss(problem: Problem, num_particles: int | None = None) -> Any:
    """The loss of a problem, from its name in ``pyro.infer`` or as a copy of the one it holds."""
    if isinstance(problem.loss, ELBO):
        loss = copy.deepcopy(problem.loss)
    else:
        kinds = {name for name in dir(pyro.infer) if isinstance(getattr(pyro.infer, name), type)}
        kinds = {name for name in kinds if issubclass(getattr(pyro.infer, name), ELBO)} - {"ELBO"}
        if problem.loss not in kinds:
            close = difflib.get_close_matches(problem.loss, sorted(kinds), n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"choose one of {sorted(kinds)}"
            raise ProblemError(f"{problem.name}: loss {problem.loss!r} is no ELBO of pyro.infer; {hint}")
        loss = getattr(pyro.infer, problem.loss)()
    if num_particles is not None:
        if num_particles < 1:
            raise ProblemError(f"{problem.name}: num_particles={num_particles}; it must be at least 1")
        loss.num_particles = num_particles
    return loss


def sample_guide(
    problem: Problem,
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *,
    num_samples: int,
    predict: bool = False,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Draw from a fitted guide and complete the draws with the model.

    Parameters
    ----------
    problem
        Names the sites.
    model, guide
        Fitted programs, inside the parameter store that holds their parameters.
    num_samples
        Number of draws.
    predict
        Draw new values of the observed sites as well.

    Returns
    -------
    tuple
        Arrays (1, draw, ...) by site, and log p - log q of each draw (1, draw).
    """
    kinds = ("latent", "generated", "deterministic") + (("observed",) if predict else ())
    names = problem.names(*kinds)
    program = poutine.uncondition(model) if predict else model
    rows: dict[str, list[np.ndarray]] = {name: [] for name in names}
    log_weight = np.empty((1, num_samples))
    with torch.no_grad(), pyro.validation_enabled(False):
        for draw in range(num_samples):
            guide_trace = poutine.trace(guide).get_trace(*problem.args, **problem.kwargs)
            replayed = poutine.replay(program, trace=guide_trace)
            trace: Any = poutine.trace(replayed).get_trace(*problem.args, **problem.kwargs)
            log_weight[0, draw] = log_joint(trace) - log_joint(guide_trace)
            for name in names:
                rows[name].append(trace.nodes[name]["value"].detach().cpu().numpy())
    return {name: np.stack(values)[None] for name, values in rows.items()}, log_weight


@contextlib.contextmanager
def fitted(
    problem: Problem, state: Mapping[str, Tensor], *, seed: int
) -> Iterator[tuple[Callable[..., Any], Callable[..., Any]]]:
    """Model and guide of a problem with saved parameters, inside their parameter store.

    Raises
    ------
    ResultError
        If the parameters are not those of this problem.
    """
    model, guide = problem.programs()
    if guide is None:
        raise ResultError(f"{problem.name}: the result has the state of a guide, but the problem has no guide")
    with isolated(seed):
        _warm_up(problem, model, guide)
        _load_params({k.removeprefix("param/"): v for k, v in state.items() if k.startswith("param/")}, problem.name)
        for role, program in (("model", model), ("guide", guide)):
            for name, buffer in _buffers(program).items():
                saved = state.get(f"buffer/{role}/{name}")
                if saved is not None and saved.shape == buffer.shape:
                    buffer.copy_(saved)
        yield model, guide


class _Fit:
    """State of a fit: programs, optimiser, losses so far, best parameters."""

    def __init__(
        self,
        problem: Problem,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        loss: Any,
        lr: float,
        folder: Path | None,
        *,
        keep_best: bool,
    ) -> None:
        self.problem, self.loss, self.lr, self.folder, self.keep_best = problem, loss, lr, folder, keep_best
        self.model, self.guide = model, guide
        self.hidden = poutine.block(model, hide_fn=is_generated)
        _warm_up(problem, model, guide)
        self._check_loss()
        self.optimizer = torch.optim.Adam([{"params": list(self.params().values())}], lr=lr)
        self._known = set(self.params())
        self.rows: list[tuple[float, float, float]] = []
        self.smooth = self.best_loss = math.inf
        self.best_step = 0
        self.best: dict[str, Tensor] = {}
        if not self._known:
            raise ProblemError(f"{problem.name}: model and guide have no parameter to fit; use run_mcmc")
        saved = None if folder is None else read_state(folder)
        if saved is not None:
            self._load(saved[0])

    def params(self) -> dict[str, Tensor]:
        """Unconstrained parameters by name."""
        return dict(pyro.get_param_store().named_parameters())

    def step(self, lr: float, clip_norm: float | None) -> tuple[float, float]:
        """One gradient step; its loss and gradient norm."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = float(self.loss.loss_and_grads(self.hidden, self.guide, *self.problem.args, **self.problem.kwargs))
        current = self.params()
        if len(current) > len(self._known):  # a program may make a parameter late
            self.optimizer.add_param_group({"params": [v for k, v in current.items() if k not in self._known]})
            self._known = set(current)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        norm = float(nn.utils.clip_grad_norm_(list(current.values()), math.inf if clip_norm is None else clip_norm))
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise FitError(
                f"{self.problem.name}: at step {len(self.rows) + 1} the loss is {loss} and its gradient norm {norm}; "
                f"try a smaller lr than {self.lr}, clip_norm=10, or other starting values of the guide"
            )
        self.optimizer.step()
        return loss, norm

    def record(self, loss: float, norm: float, seconds: float) -> None:
        """Keep the figures of a step, and the parameters where the smoothed loss is the best so far."""
        self.rows.append((loss, norm, seconds))
        weight = max(0.02, 1 / len(self.rows))
        self.smooth = loss if len(self.rows) == 1 else (1 - weight) * self.smooth + weight * loss
        if self.smooth < self.best_loss:
            self.best_loss, self.best_step = self.smooth, len(self.rows)
            if self.keep_best:
                self.best = {name: value.detach().clone() for name, value in self.params().items()}

    def restore_best(self) -> None:
        """Go back to the parameters of the best smoothed loss."""
        _load_params(self.best, self.problem.name)

    def history(self) -> xr.Dataset:
        """Loss, gradient norm and seconds by step, numbered from 1."""
        table = np.array(self.rows).reshape(-1, 3)
        names = ("loss", "grad_norm", "seconds")
        variables = {name: ("step", table[:, column]) for column, name in enumerate(names)}
        return xr.Dataset(variables, coords={"step": np.arange(1, len(table) + 1)})

    def save(self) -> None:
        """Commit the state to the checkpoint folder, if there is one."""
        if self.folder is None:
            return
        state: dict[str, Any] = {f"param/{name}": value for name, value in self.params().items()}
        state |= {f"best/{name}": value for name, value in self.best.items()}
        for index, slots in self.optimizer.state_dict()["state"].items():
            state |= {f"adam/{index}/{slot}": torch.as_tensor(value) for slot, value in slots.items()}
        state |= {f"rng/{name}": value for name, value in rng_tensors().items()}
        for role, program in (("model", self.model), ("guide", self.guide)):
            state |= {f"buffer/{role}/{name}": value for name, value in _buffers(program).items()}
        state |= {"rows": torch.tensor(self.rows, dtype=torch.float64).reshape(-1, 3), "smooth": self.smooth}
        state |= {"best_loss": self.best_loss, "best_step": self.best_step}
        write_state(self.folder, len(self.rows), state, {})

    def _load(self, state: Mapping[str, Any]) -> None:
        _load_params(part(state, "param/"), self.problem.name)
        self.best = part(state, "best/")
        slots: dict[int, dict[str, Tensor]] = {}
        for key, value in part(state, "adam/").items():
            index, slot = key.split("/")
            slots.setdefault(int(index), {})[slot] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": slots})
        for role, program in (("model", self.model), ("guide", self.guide)):
            for name, buffer in _buffers(program).items():
                buffer.copy_(state[f"buffer/{role}/{name}"])
        self.rows = [tuple(row) for row in state["rows"].tolist()]
        self.smooth, self.best_loss = float(state["smooth"]), float(state["best_loss"])
        self.best_step = int(state["best_step"])
        restore_rng(part(state, "rng/"))

    def _check_loss(self) -> None:
        """One evaluation with pyro's own checks on, which the steps then do without."""
        saved = rng_tensors()
        try:
            with pyro.validation_enabled(True):
                self.loss.loss(self.hidden, self.guide, *self.problem.args, **self.problem.kwargs)
        except ValueError as error:
            raise ProblemError(f"{self.problem.name}: the loss cannot be evaluated: {error}") from error
        finally:
            restore_rng(saved)


def _descend(
    fit: _Fit,
    num_steps: int,
    lr_decay: float,
    clip_norm: float | None,
    patience: int | None,
    callbacks: Sequence[Callback],
    checkpoint_every: float,
    *,
    bar: bool,
) -> None:
    last_save = time.monotonic()
    start = len(fit.rows)
    with (
        Interrupts() as interrupts,
        warnings.catch_warnings(),
        tqdm(total=num_steps, initial=min(start, num_steps), disable=not bar, desc="svi", unit="step") as shown,
    ):
        warnings.filterwarnings("ignore", message="Encountered (NaN|\\+inf)")  # raised as FitError
        for number in range(start + 1, num_steps + 1):
            began = time.perf_counter()
            loss, norm = fit.step(fit.lr * lr_decay ** ((number - 1) / max(num_steps - 1, 1)), clip_norm)
            seconds = time.perf_counter() - began
            fit.record(loss, norm, seconds)
            shown.update()
            if number % 20 == 0:
                shown.set_postfix_str(f"loss {fit.smooth:.4g}, gradient {norm:.3g}", refresh=False)
            if any([callback(Step(number, loss, norm, seconds)) for callback in callbacks]):
                break
            if patience is not None and number - fit.best_step >= patience:
                break
            if interrupts.count:
                fit.save()
                how = (
                    "nothing was kept, since no checkpoint folder was given"
                    if fit.folder is None
                    else f"the state is saved in {fit.folder}; repeat the same call to resume"
                )
                raise KeyboardInterrupt(f"stopped after step {number} of {num_steps}: {how}")
            if time.monotonic() - last_save >= checkpoint_every:
                fit.save()
                last_save = time.monotonic()
    fit.save()


def _warm_up(problem: Problem, model: Callable[..., Any], guide: Callable[..., Any]) -> None:
    """Run both programs once: automatic guides and lazy parameters come into being in a first call only."""
    with torch.no_grad():
        trace = poutine.trace(guide).get_trace(*problem.args, **problem.kwargs)
        poutine.replay(model, trace=trace)(*problem.args, **problem.kwargs)


def _load_params(saved: Mapping[str, Tensor], name: str) -> None:
    current = dict(pyro.get_param_store().named_parameters())
    differing = sorted(set(saved) ^ set(current)) or [k for k in current if saved[k].shape != current[k].shape]
    if differing:
        raise ResultError(f"{name}: the saved parameters do not fit model and guide; they differ in {differing}")
    with torch.no_grad():
        for key, value in current.items():
            value.copy_(saved[key])


def _guide_state(model: Callable[..., Any], guide: Callable[..., Any]) -> dict[str, Tensor]:
    store = pyro.get_param_store()
    state = {f"param/{name}": value.detach().cpu().clone() for name, value in store.named_parameters()}
    for name, raw in store.named_parameters():
        value = store[name].detach()
        if value.shape != raw.shape or not torch.equal(value, raw):
            state[f"constrained/{name}"] = value.cpu().clone()
    for role, program in (("model", model), ("guide", guide)):
        state |= {f"buffer/{role}/{name}": value.cpu().clone() for name, value in _buffers(program).items()}
    return state


def _buffers(program: Any) -> dict[str, Tensor]:
    return dict(program.named_buffers()) if isinstance(program, nn.Module) else {}


def _outline(guide: Any) -> Any:
    """A guide's identity without the starting values of its parameters, which a resumed fit overwrites."""
    if isinstance(guide, nn.Module):
        shapes = {name: list(value.shape) for name, value in guide.named_parameters()}
        return {"class": type(guide).__qualname__, "parameters": shapes}
    return fingerprint(guide)


def _identity(problem: Problem, seed: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    """All that decides the numbers of a fit."""
    return {
        "engine": "svi",
        "problem": problem.name,
        "model": fingerprint(problem.model),
        "guide": _outline(problem.guide),
        "loss": fingerprint(problem.loss),
        "args": fingerprint(problem.args),
        "kwargs": fingerprint(problem.kwargs),
        "seed": seed,
        **settings,
        "dtype": str(torch.get_default_dtype()),
    }
